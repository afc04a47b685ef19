"""What QGPO and AEPO cost, in Hopper's sizes and batches of 256: updates of each part, support actions, decisions.

python -m pytest benchmarks/test_energy.py
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lit_diffrl.data import TransitionData
from lit_diffrl.methods import AEPO, QGPO
from lit_diffrl.methods.support import States

HOPPER_OBS, ACTIONS = 11, 16
UPDATES = [
    ("QGPO: behaviour model, 16 x 256 actions", QGPO, "behaviour", ""),
    ("QGPO: critics, 16 support actions", QGPO, "critic", 19),
    ("QGPO: energy beside critics, 16 support actions", QGPO, "both", 51),
    ("QGPO: energy alone, 16 support actions", QGPO, "energy", 51),
    ("AEPO: values and critics", AEPO, "critic", ""),
    ("AEPO: energy", AEPO, "energy", ""),
]


@pytest.fixture(scope="session")
def hopper(hopper_file: str) -> TransitionData:
    data = TransitionData(hopper_file, updates_per_epoch=1)
    data.setup("fit")
    return data


@pytest.mark.usefixtures("unlogged")
@pytest.mark.parametrize(("label", "kind", "part", "published"), UPDATES, ids=[u[0] for u in UPDATES])
def test_update(benchmark: Any, hopper: TransitionData, label: str, kind: Any, part: str, published: Any) -> None:
    benchmark.extra_info.update(label=label, published=published)

    class Timed(kind):  # type: ignore[valid-type, misc]
        def draw_support(self) -> None:
            n = len(hopper.table)
            self.states = States(hopper.table[:, :HOPPER_OBS], torch.arange(n))
            self.support = torch.rand(n, ACTIONS, 3) * 2 - 1

        def prepare(self, phase: str) -> None:
            super().prepare(phase)
            if part == "both":
                self.labels = None

        def training_step(self, batch: Any, batch_idx: int) -> None:
            if part == "both" and self.phase.name == "critic":
                optimizer, rows = self.optimizers()[2], self.rows()
                benchmark(lambda: self.update_energy(optimizer, self.energy_loss(batch, rows), batch))
            elif part == "critic" and kind is QGPO and self.phase.name == "critic":
                benchmark(partial(self.update_critics, self.optimizers()[1], batch, self.rows()))
            elif part == self.phase.name:
                benchmark(partial(super().training_step, batch, batch_idx))

    options: dict[str, Any] = {"posterior": {"samples": 64}} if kind is AEPO else {}
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, num_sanity_val_steps=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Timed(behaviour_epochs=1, critic_epochs=1, energy_epochs=1, **options), datamodule=hopper)


def built(data: TransitionData, kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    method = kind(**options)
    method.build(data.spec)
    method.energy_updates += 1
    if kind is AEPO:
        method.target_scale.fill_(1.0)
    return method.eval()


def test_support_actions(benchmark: Any, hopper: TransitionData) -> None:
    benchmark.extra_info.update(label="support actions: 256 states x 16, 15 calls", published=1783)
    agent = built(hopper, QGPO)
    obs, noise = torch.randn(256, HOPPER_OBS), torch.randn(256, ACTIONS, 3)

    def draw() -> None:
        with torch.no_grad():
            agent.draw_actions(obs, noise, agent.sampler, (0.0, False))

    benchmark(draw)


DECISIONS = [
    ("QGPO, 15 calls", QGPO, {}, 1, 27),
    ("QGPO without guidance, 15 calls", QGPO, {"guidance_scale": 0.0}, 1, ""),
    ("AEPO, 15 calls, rescaled", AEPO, {"rescale": True}, 1, ""),
    ("QGPO by Monte Carlo, 256 actions, 15 calls", QGPO, {"guidance": "monte_carlo"}, 1, ""),
    ("QGPO, 15 calls, 50 environments", QGPO, {}, 50, 48),
    ("QGPO without guidance, 15 calls, 50 environments", QGPO, {"guidance_scale": 0.0}, 50, ""),
    ("AEPO, 15 calls, rescaled, 50 environments", AEPO, {"rescale": True}, 50, ""),
]


@pytest.mark.parametrize(("label", "kind", "options", "envs", "published"), DECISIONS, ids=[d[0] for d in DECISIONS])
def test_decision(
    benchmark: Any, hopper: TransitionData, label: str, kind: Any, options: Any, envs: int, published: Any
) -> None:
    benchmark.extra_info.update(label=f"{label}: decision", published=published, count=envs)
    agent = built(hopper, kind, **options)
    agent.reset(seeds=list(range(envs)))
    benchmark(agent.act, np.zeros((envs, HOPPER_OBS), dtype=np.float32))
