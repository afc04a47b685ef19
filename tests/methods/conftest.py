"""Small planners and batches that the tests of the methods share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.windows import WindowBatch
from lit_diffrl.methods import DMEMM, Diffuser

SMALL: dict[str, Any] = {
    "horizon": 8,
    "n_diffusion_steps": 10,
    "dim": 8,
    "dim_mults": [1, 2],
    "diffusion_epochs": 1,
    "ema": {"decay": 0.9, "every": 1, "start": 0},
    "world_model": {"members": 3, "elites": 2, "hidden": 16, "layers": 2, "reward_hidden": 16},
}


def small_spec(obs_dim: int = 4, action_dim: int = 2, **changes: Any) -> DatasetSpec:
    from lit_diffrl.data.normalizers import fit_normalizer

    def normaliser(width: int) -> dict[str, Any]:
        return fit_normalizer("limits", torch.tensor([[-2.0] * width, [2.0] * width])).state()

    fields: dict[str, Any] = dict(
        obs_dim=obs_dim,
        action_dim=action_dim,
        action_low=[-1.0] * action_dim,
        action_high=[1.0] * action_dim,
        dataset_ids=["test/set-v0"],
        env_spec=None,
        ref_min=0.0,
        ref_max=10.0,
        max_episode_steps=40,
        obs_keys=None,
        goal_key=None,
        goal=[0.5, -0.5],
        obs_normalizer=normaliser(obs_dim),
        action_normalizer=normaliser(action_dim),
        reward_max=2.0,
        reward_min=0.0,
        stride=1,
    )
    return DatasetSpec(**{**fields, **changes})


@pytest.fixture
def spec() -> DatasetSpec:
    return small_spec()


@pytest.fixture
def make_diffuser(spec: DatasetSpec) -> Callable[..., Diffuser]:
    def make(kind: type[Diffuser] = Diffuser, spec: DatasetSpec = spec, **options: Any) -> Diffuser:
        torch.manual_seed(0)
        if options.get("goal_conditioned"):
            options.setdefault("plan", {"mode": "waypoints"})
        planner = kind(**{**SMALL, **options})
        planner.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        planner.build(spec)
        return planner

    return make


@pytest.fixture
def make_dmemm(make_diffuser: Callable[..., Diffuser]) -> Callable[..., DMEMM]:
    def make(**options: Any) -> DMEMM:
        return make_diffuser(DMEMM, **{"world_model_epochs": 1, **options})  # type: ignore[return-value]

    return make


@pytest.fixture
def make_batch() -> Callable[..., WindowBatch]:
    def make(
        size: int = 4, horizon: int = 8, width: int = 6, real: int | None = None, reward: float = 1.0
    ) -> WindowBatch:
        generator = torch.Generator().manual_seed(1)
        mask = torch.ones(size, horizon, dtype=torch.bool)
        mask[:, real if real is not None else horizon :] = False
        rewards = torch.full((size, horizon), reward) * mask
        return WindowBatch(
            torch.randn(size, horizon, width, generator=generator) * 0.5,
            mask,
            rewards,
            rewards.sum(-1),
            rewards.sum(-1) * 3,
        )

    return make
