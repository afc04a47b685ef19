"""What planners cost: loading, drawing, updates and decisions. Untrained networks take the same time as trained ones.

python -m pytest benchmarks
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from lit_diffrl.data import WindowData
from lit_diffrl.methods import DMEMM, Diffuser
from lit_diffrl.methods.base import Method, Phase
from lit_diffrl.seeding import Place

CONF = Path(__file__).resolve().parents[1] / "conf"
HOPPER_OBS = 11
UMAZE = "lit_diffrl/pointmaze/umaze-v0"
pytestmark = pytest.mark.usefixtures("unlogged")


def options(config: str, **changes: Any) -> dict[str, Any]:
    """The model's arguments in a config, with changes; those of groups are merged."""
    model: Any = OmegaConf.to_container(OmegaConf.load(CONF / config), resolve=True)["model"]["init_args"]  # type: ignore[index, call-overload]
    for name, value in changes.items():
        model[name] = {**model.get(name, {}), **value} if isinstance(value, dict) else value
    return model


def loaded(dataset: str, **arguments: Any) -> WindowData:
    data = WindowData(dataset, updates_per_epoch=1, **arguments)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture(scope="session")
def hopper(hopper_file: str) -> WindowData:
    return loaded(hopper_file, horizon=32, batch_size=32, normalizer="gaussian", use_padding=True)


@pytest.fixture(scope="session")
def umaze() -> WindowData:
    return loaded(UMAZE, horizon=options("dmemm.yaml")["horizon"], stride=4, batch_size=64)


# ---------------------------------------------------------------- data


def test_load_file(benchmark: Any, hopper: WindowData) -> None:
    benchmark.extra_info["label"] = "load 100,000 steps, D4RL file"
    benchmark(loaded, hopper.dataset, horizon=32, normalizer="gaussian", use_padding=True)


def test_load_minari(benchmark: Any, umaze: WindowData) -> None:
    benchmark.extra_info["label"] = "load 100,000 steps, Minari"
    benchmark(loaded, umaze.dataset, horizon=umaze.horizons, stride=4)


def test_draw_windows(benchmark: Any, umaze: WindowData) -> None:
    benchmark.extra_info["label"] = "draw 64 windows, 9 horizons, stride 4"
    benchmark(umaze.draw, Phase("diffusion", 1), Place(0, 0))


def test_draw_hopper_windows(benchmark: Any, hopper: WindowData) -> None:
    benchmark.extra_info["label"] = "draw 32 windows, H 32, stride 1"
    benchmark(hopper.draw, Phase("diffusion", 1), Place(0, 0))


def test_draw_transitions(benchmark: Any, hopper: WindowData) -> None:
    benchmark.extra_info["label"] = "draw 7 x 256 transitions"
    benchmark(hopper.draw, Phase("world_model", 1, "transitions", 7), Place(0, 0))


# ---------------------------------------------------------------- updates


def time_update(benchmark: Any, kind: type[Method], data: WindowData, phase: str, arguments: dict[str, Any]) -> None:
    """Fit with one update per phase and repeat that of ``phase``: with optimizer and EMA, without loop and logs."""

    class Timed(kind):  # type: ignore[valid-type, misc]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            update = partial(super().training_step, batch, batch_idx)
            benchmark(update) if self.phase.name == phase else update()

    method = Timed(**arguments)
    trainer = Trainer(
        max_epochs=method.total_epochs,
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, datamodule=data)


ONE_EACH = {"diffusion_epochs": 1, "world_model_epochs": 1}


def test_diffuser_update(benchmark: Any, hopper: WindowData) -> None:
    benchmark.extra_info.update(label="Diffuser update, hopper, batch 32", published=80)
    arguments = options(
        "paper/diffuser/hopper.yaml", diffusion_epochs=1, value_epochs=0, guide={"kind": "none"},
        plan={"candidates": 1, "rank_by": "none"},
    )  # fmt: skip
    time_update(benchmark, Diffuser, hopper, "diffusion", arguments)


def test_value_update(benchmark: Any, hopper: WindowData) -> None:
    benchmark.extra_info["label"] = "Diffuser's return regressor, hopper, batch 32"
    arguments = options("paper/diffuser/hopper.yaml", diffusion_epochs=1, value_epochs=1)
    time_update(benchmark, Diffuser, hopper, "value", arguments)


def test_dmemm_update(benchmark: Any, hopper: WindowData) -> None:
    benchmark.extra_info["label"] = "DMEMM update (tweedie), hopper, batch 32"
    arguments = options("paper/dmemm/hopper.yaml", horizon=32, n_diffusion_steps=20, **ONE_EACH)
    time_update(benchmark, DMEMM, hopper, "diffusion", arguments)


def test_world_model_update(benchmark: Any, hopper: WindowData) -> None:
    benchmark.extra_info["label"] = "world model update, hopper, 7 x 256"
    arguments = options("paper/dmemm/hopper.yaml", horizon=32, n_diffusion_steps=20, **ONE_EACH)
    time_update(benchmark, DMEMM, hopper, "world_model", arguments)


def test_maze_diffuser_update(benchmark: Any) -> None:
    benchmark.extra_info.update(label="Diffuser update, maze (1, 4, 8), H 128, batch 32", published=217)
    data = loaded(UMAZE, horizon=128, batch_size=32)
    arguments = options("paper/diffuser/maze2d-umaze.yaml", diffusion_epochs=1)
    time_update(benchmark, Diffuser, data, "diffusion", arguments)


@pytest.mark.parametrize("horizon", [8, 24, 40])
def test_laptop_dmemm_update(benchmark: Any, umaze: WindowData, horizon: int) -> None:
    benchmark.extra_info["label"] = f"DMEMM update, conf/dmemm.yaml, H {horizon}, batch 64"
    data = loaded(UMAZE, horizon=horizon, stride=4, batch_size=64)
    arguments = options("dmemm.yaml", horizon=horizon, plan={"replan_every": None}, **ONE_EACH)
    time_update(benchmark, DMEMM, data, "diffusion", arguments)


# ---------------------------------------------------------------- decisions


def built(kind: type[Method], data: WindowData, arguments: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    method = kind(**arguments)
    method.build(data.spec)
    return method.eval()


@pytest.mark.parametrize(
    ("candidates", "sampler", "steps", "guide_steps"),
    [
        (64, "ddpm", 20, 2),  # as released
        (64, "ddim", 5, 1),
        (32, "ddim", 5, 1),
        (16, "ddim", 10, 1),
        (16, "ddim", 5, 2),
        (16, "ddim", 5, 1),
    ],
)
def test_hopper_decision(
    benchmark: Any, hopper: WindowData, candidates: int, sampler: str, steps: int, guide_steps: int
) -> None:
    label = f"Diffuser decision, hopper: {candidates} plans, {steps} {sampler} steps, {guide_steps} guide"
    benchmark.extra_info.update(label=label, published="1331-2383" if steps == 20 else "")
    arguments = options(
        "paper/diffuser/hopper.yaml", sampler={"name": sampler, "steps": steps}, guide={"n_steps": guide_steps},
        plan={"candidates": candidates},
    )  # fmt: skip
    benchmark(built(Diffuser, hopper, arguments).act, np.zeros(HOPPER_OBS, dtype=np.float32))


@pytest.mark.parametrize(("candidates", "sampler", "steps"), [(1, "ddpm", 20), (16, "ddim", 5)])
def test_dmemm_hopper_decision(benchmark: Any, hopper: WindowData, candidates: int, sampler: str, steps: int) -> None:
    plans = f"{candidates} plans" if candidates > 1 else "1 plan"
    benchmark.extra_info["label"] = f"DMEMM decision, hopper: {plans}, {steps} {sampler} steps"
    arguments = options(
        "paper/dmemm/hopper.yaml", horizon=32, n_diffusion_steps=20, sampler={"name": sampler, "steps": steps},
        plan={"candidates": candidates, "rank_by": "model" if candidates > 1 else "none"},
    )  # fmt: skip
    benchmark(built(DMEMM, hopper, arguments).act, np.zeros(HOPPER_OBS, dtype=np.float32))


@pytest.mark.parametrize(("starts", "steps"), [(1, 5), (1, 10), (1, 64), (20, 5)])
def test_maze_plan(benchmark: Any, umaze: WindowData, starts: int, steps: int) -> None:
    planner = built(DMEMM, umaze, options("dmemm.yaml", sampler={"name": "ddim", "steps": steps}))
    plans = len(planner.horizons) * planner.plan_options.candidates
    where = f"{starts} starts" if starts > 1 else "1 start"
    benchmark.extra_info["label"] = f"DMEMM maze plan, conf/dmemm.yaml: {where}, {plans} plans each, {steps} steps"
    benchmark.extra_info["count"] = starts
    benchmark(planner.plan, np.zeros((starts, 4), dtype=np.float32))
