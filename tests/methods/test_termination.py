from __future__ import annotations

import json
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from lit_diffrl.errors import ConfigError
from lit_diffrl.methods.termination import termination_rule


def spec_of(env_id: str, **kwargs: Any) -> str:
    return json.dumps({"id": env_id, "kwargs": kwargs})


def states(*rows: dict[int, float], base: tuple[float, ...] = (1.2, 0.0, 0.0, 0.0)) -> torch.Tensor:
    out = torch.tensor(base).repeat(len(rows), 1)
    for row, changes in zip(out, rows):
        for column, value in changes.items():
            row[column] = value
    return out


def test_a_hopper_falls_when_it_is_low_or_tilted_to_either_side_or_out_of_range() -> None:
    rule = termination_rule("auto", spec_of("Hopper-v5"))
    alive: list[dict[int, float]] = [{}, {0: 0.71}, {1: 0.19}, {1: -0.19}, {3: 99.0}]
    dead: list[dict[int, float]] = [
        {0: 0.69}, {1: 0.21}, {1: -0.21}, {3: 101.0}, {3: -101.0}, {2: math.nan}, {0: math.inf},
    ]  # fmt: skip
    assert rule(states(*alive, *dead)).tolist() == [False] * len(alive) + [True] * len(dead)
    assert rule(torch.zeros(2, 5, 4)).shape == (2, 5)


def test_walker_and_ant_have_rules_of_their_own_and_the_cheetah_and_mazes_none() -> None:
    rows = states({}, {0: 0.79}, {0: 2.01}, {1: 0.99}, {1: -1.01}, {3: 1e3})
    assert termination_rule("auto", spec_of("Walker2d-v4"))(rows).tolist() == [False, True, True, False, True, False]
    ant = states({0: 0.2}, {0: 1.0}, {0: 0.19}, {0: 1.01}, {3: math.nan}, base=(0.5, 0.0, 0.0, 0.0))
    assert termination_rule("auto", spec_of("Ant-v5"))(ant).tolist() == [False, False, True, True, True]
    for env_id in ("HalfCheetah-v5", "lit_diffrl/PointMaze-umaze-v0", "PointMaze_UMaze-v3"):
        assert not termination_rule("auto", spec_of(env_id))(100 * rows).any()


def test_limits_are_those_that_the_environment_was_made_with() -> None:
    rows = states({}, {0: 0.65}, {1: 0.5})
    loose = spec_of("Hopper-v5", healthy_z_range=[0.6, 2.0], healthy_angle_range=[-1.0, 1.0])
    assert not termination_rule("auto", loose)(rows).any()
    assert not termination_rule("auto", spec_of("Hopper-v5", terminate_when_unhealthy=False))(rows).any()
    assert termination_rule("hopper", loose)(rows).tolist() == [False, True, True], "a rule by name is the standard one"
    assert termination_rule("never", spec_of("Hopper-v5"))(rows).tolist() == [False] * 3


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Walker2d-v5", "Ant-v5", "HalfCheetah-v5"])
def test_rules_agree_with_the_simulator(env_id: str) -> None:
    env: Any = gym.make(env_id).unwrapped
    rule, rng = termination_rule("auto", gym.spec(env_id).to_json()), np.random.default_rng(0)
    seen, ends = [], []
    for seed in range(4):
        env.reset(seed=seed)
        for _ in range(60):
            obs, _, terminated, _, _ = env.step(env.action_space.low * rng.uniform(-1, 1, env.action_space.shape))
            seen.append(obs)
            ends.append(bool(terminated))
    env.close()
    assert rule(torch.tensor(np.array(seen))).tolist() == ends
    assert any(ends) == (env_id != "HalfCheetah-v5")


@pytest.mark.parametrize(
    ("name", "env_spec", "message"),
    [
        ("auto", None, "names no environment.*model.termination hopper, walker2d, ant, never"),
        ("auto", spec_of("Humanoid-v5"), "no rule is known for Humanoid-v5"),
        ("auto", spec_of("PointMaze_UMaze-v3", continuing_task=False), "no rule is known"),
        ("auto", spec_of("Hopper-v5", exclude_current_positions_from_observation=False), "begin with its position"),
        ("hoper", None, "did you mean 'hopper'"),
    ],
)
def test_where_the_end_cannot_be_told_the_user_is_asked(name: str, env_spec: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        termination_rule(name, env_spec)
