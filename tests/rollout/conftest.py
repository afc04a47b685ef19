"""A tiny environment and agents for it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

from lit_diffrl.data.spec import DatasetSpec


class Countdown(gym.Env):
    """Ends after a number of steps that its seed decides; pays 1 + action; may not be stepped after its end."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-0.5, 0.5, (1,))
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(2, 20))
        return self._obs(), {}

    def step(self, action):
        assert self.left > 0, "stepped after its end"
        assert action.dtype == np.float32 and self.action_space.contains(action)
        self.left -= 1
        return self._obs(), 1.0 + float(action[0]), self.left == 0, False, {}

    def render(self):
        return np.full((40, 60, 3), 10 * self.left, dtype=np.uint8)

    def _obs(self):
        return np.array([self.left, self.np_random.normal()])


# An EnvSpec names its class by module, and test modules have no importable name.
_module = types.ModuleType("lit_diffrl_toy_env")
_module.Countdown = Countdown  # type: ignore[attr-defined]
sys.modules["lit_diffrl_toy_env"] = _module
# What a description names must be registered, where it is of no known package.
gym.register("Countdown-v0", entry_point="lit_diffrl_toy_env:Countdown")


def make_spec(env_spec: str | None, **changes) -> DatasetSpec:
    values = dict(
        obs_dim=2, action_dim=1, action_low=[-0.5], action_high=[0.5], dataset_ids=["toy/countdown-v0"],
        env_spec=env_spec, ref_min=0.0, ref_max=20.0, max_episode_steps=None, obs_keys=None, goal_key=None, goal=None,
        obs_normalizer={}, action_normalizer={}, reward_max=1.5, reward_min=0.5, stride=1,
    )  # fmt: skip
    return DatasetSpec(**{**values, **changes})


@pytest.fixture
def toy_spec() -> Callable[..., DatasetSpec]:
    """A function that describes the Countdown environment; keyword arguments change the description."""
    env_spec = EnvSpec("Countdown-v0", entry_point="lit_diffrl_toy_env:Countdown", max_episode_steps=100).to_json()

    def spec(**changes) -> DatasetSpec:
        return make_spec(**{"env_spec": env_spec, **changes})

    return spec


class NoisyAgent:
    """Acts by the observation and by noise from its episode's seed; also disturbs every global generator."""

    can_act = True

    def __init__(self, scale: float = 0.1) -> None:
        self.scale = scale
        self.seeds: list[int] = []
        self.batches: list[tuple[int, int]] = []

    def reset(self, mask=None, seeds=None) -> None:
        self.generators = [np.random.default_rng(s) for s in seeds or []]
        self.seeds += list(seeds or [])

    def act(self, obs, active=None):
        import random

        import torch

        torch.rand(3), np.random.rand(3), random.random()
        self.batches.append((len(obs), int(active.sum())))
        action = np.full((len(obs), 1), np.nan)  # rows that have ended must not be looked at
        for row in np.flatnonzero(active):
            action[row] = self.scale * (np.sin(obs[row, 1]) + self.generators[row].normal())
        return action


@pytest.fixture
def noisy_agent() -> type[NoisyAgent]:
    return NoisyAgent
