"""What policies cost, in Hopper's sizes and batches of 256: loading, drawing, updates and decisions.

python -m pytest benchmarks/test_policies.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lit_diffrl.data import TransitionData
from lit_diffrl.methods import BC, CQL, CRR, EDPCRR, EDPIQL, EDPTD3, IQL, TD3BC, DiffusionQL
from lit_diffrl.methods.base import Method, Phase
from lit_diffrl.methods.policy_options import ActionSamplerOptions, SelectionOptions
from lit_diffrl.seeding import Place

HOPPER_OBS = 11
DDPM = ActionSamplerOptions()
UPDATES = {
    "BC": (BC, {}, ""),
    "TD3+BC": (TD3BC, {}, 4.6),
    "IQL": (IQL, {}, 7.1),
    "CRR": (CRR, {}, ""),
    "CQL": (CQL, {}, 94),
    "Diffusion-QL, K 5": (DiffusionQL, {}, 41),
    "Diffusion-QL, K 100": (DiffusionQL, {"n_diffusion_steps": 100}, 442),
    "EDP-TD3, K 1000, 15 calls": (EDPTD3, {}, 43),
    "EDP-TD3, K 1000, 8 calls": (EDPTD3, {"sampler": ActionSamplerOptions(name="dpm", steps=8)}, ""),
    "EDP-TD3 without action approximation": (EDPTD3, {"action_approximation": False}, ""),
    "EDP-TD3 without DPM-Solver, K 100": (EDPTD3, {"n_diffusion_steps": 100, "sampler": DDPM}, ""),
    "EDP-CRR, K 1000, 15 calls": (EDPCRR, {}, ""),
    "EDP-IQL, K 1000": (EDPIQL, {}, ""),
}


@pytest.fixture(scope="session")
def hopper(hopper_file: str) -> TransitionData:
    return loaded(hopper_file)


def loaded(path: str) -> TransitionData:
    data = TransitionData(path, updates_per_epoch=1)
    data.setup("fit")
    return data


def test_load_transitions(benchmark: Any, million_file: str) -> None:
    benchmark.extra_info["label"] = "load 1,000,000 transitions, D4RL file"
    benchmark.pedantic(loaded, (million_file,), rounds=3)


def test_draw_transitions(benchmark: Any, hopper: TransitionData) -> None:
    benchmark.extra_info["label"] = "draw 256 transitions"
    benchmark(hopper.draw, Phase("policy", 1), Place(0, 0))


@pytest.mark.usefixtures("unlogged")
@pytest.mark.parametrize("label", UPDATES)
def test_update(benchmark: Any, hopper: TransitionData, label: str, profiled: Any) -> None:
    kind, options, published = UPDATES[label]
    benchmark.extra_info.update(label=f"{label}: update", published=published)

    class Timed(kind):  # type: ignore[valid-type, misc]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            step = partial(super().training_step, batch, batch_idx)
            benchmark(step)
            profiled(f"{label}: update", step)

    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, num_sanity_val_steps=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Timed(policy_epochs=1, **options), datamodule=hopper)


def built(data: TransitionData, kind: Callable[..., Method], **options: Any) -> Any:
    torch.manual_seed(0)
    method = kind(policy_epochs=1, **options)
    method.build(data.spec)
    return method.eval()


DECISIONS = [
    ("TD3+BC", TD3BC, {}, 1, ""),
    ("Diffusion-QL, K 5, 50 candidates", DiffusionQL, {}, 1, 3.0),
    ("EDP-TD3, 15 calls, 10 candidates", EDPTD3, {}, 1, ""),
    ("EDP-TD3, 15 calls, 50 candidates", EDPTD3, {"selection": SelectionOptions(50)}, 1, 8.4),
    ("EDP-TD3 without DPM-Solver, K 100, 50 candidates", EDPTD3,
     {"selection": SelectionOptions(50), "n_diffusion_steps": 100, "sampler": DDPM}, 1, ""),
    ("Diffusion-QL, K 100, 50 candidates", DiffusionQL, {"n_diffusion_steps": 100}, 1, ""),
    ("Diffusion-QL, K 5, 50 candidates, 50 environments", DiffusionQL, {}, 50, ""),
    ("EDP-TD3, 15 calls, 50 candidates, 50 environments", EDPTD3, {"selection": SelectionOptions(50)}, 50, 85),
]  # fmt: skip


@pytest.mark.parametrize(("label", "kind", "options", "envs", "published"), DECISIONS, ids=[d[0] for d in DECISIONS])
def test_decision(
    benchmark: Any,
    hopper: TransitionData,
    label: str,
    kind: Any,
    options: Any,
    envs: int,
    published: Any,
    profiled: Any,
) -> None:
    benchmark.extra_info.update(label=f"{label}: decision", published=published, count=envs)
    agent = built(hopper, kind, **options)
    agent.reset(seeds=list(range(envs)))
    act = partial(agent.act, np.zeros((envs, HOPPER_OBS), dtype=np.float32))
    benchmark(act)
    profiled(f"{label}: decision", act)
