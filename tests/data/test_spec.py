"""DatasetSpec: scores (oracle 31), observations in every form, and plain types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lit_diffrl.data.d4rl import TASKS
from lit_diffrl.data.normalizers import fit_normalizer
from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.errors import ConfigError


def make_spec(**changes: Any) -> DatasetSpec:
    state = fit_normalizer("limits", torch.tensor([[-1.0], [1.0]])).state()
    fields: dict[str, Any] = dict(
        obs_dim=4,
        action_dim=2,
        action_low=[-1.0, float("-inf")],
        action_high=[1.0, float("inf")],
        dataset_ids=["test/set-v0"],
        env_spec=None,
        ref_min=None,
        ref_max=None,
        max_episode_steps=None,
        obs_keys=None,
        goal_key=None,
        goal=None,
        obs_normalizer=state,
        action_normalizer=state,
        reward_max=1.0,
        reward_min=0.0,
    )
    return DatasetSpec(**{**fields, **changes})


MAZE = {"obs_keys": ["observation"], "goal_key": "desired_goal"}


def maze_obs(*batch: int) -> dict[str, np.ndarray]:
    return {
        "observation": np.arange(4.0) + np.zeros((*batch, 4)),
        "achieved_goal": np.zeros((*batch, 2)),
        "desired_goal": np.ones((*batch, 2)),
    }


@pytest.mark.parametrize(
    ("task", "returned", "score"),
    [
        ("hopper", 1000, 31.3489),
        ("hopper", 1607.0138475, 50.0),
        ("kitchen", 2, 50.0),
        ("pen", 3076.8331017826877, 100.0),
        ("walker2d", 1000, 21.7478),
        ("halfcheetah", 5000, 42.5300),
        ("maze2d-umaze", 172, 107.347),
    ],
)
def test_scores_are_those_of_d4rl(task, returned, score):
    spec = make_spec(ref_min=TASKS[task].ref_min, ref_max=TASKS[task].ref_max)
    assert spec.score(returned) == pytest.approx(score, abs=1e-3)
    assert spec.score(np.array([returned, TASKS[task].ref_max])) == pytest.approx([score, 100], abs=1e-3)
    assert spec.score(torch.tensor(float(TASKS[task].ref_min))).item() == pytest.approx(0, abs=1e-3)


def test_without_reference_returns_there_is_no_score():
    assert make_spec().score(3.0) is None and make_spec(ref_min=0.0).score(3.0) is None


def test_survives_a_checkpoint(tmp_path):
    spec = make_spec(env_spec="{}", goal=[1.0, 2.0], stride=5)
    torch.save(spec.to_dict(), tmp_path / "spec.pt")
    assert DatasetSpec.from_dict(torch.load(tmp_path / "spec.pt", weights_only=True)) == spec


def test_a_spec_of_another_version_is_refused():
    fields = make_spec().to_dict()
    with pytest.raises(ConfigError, match=r"unknown \['colour'\]"):
        DatasetSpec.from_dict({**fields, "colour": 1})
    fields.pop("goal")
    with pytest.raises(ConfigError, match=r"lacks \['goal'\]"):
        DatasetSpec.from_dict(fields)


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor, list])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_plain_observations(convert, batch):
    spec, given = make_spec(), np.arange(4.0) + np.zeros((*batch, 4))
    state, goal = spec.split_obs(convert(given.tolist()))
    assert state.dtype == np.float32 and goal is None
    assert np.array_equal(state, np.atleast_2d(given)) and spec.is_single(convert(given.tolist())) == (batch == ())


@pytest.mark.parametrize("batch", [(), (3,)])
def test_dict_observations_give_their_own_goal(batch):
    spec = make_spec(**MAZE, goal=[9.0, 9.0])
    state, goal = spec.split_obs(maze_obs(*batch))
    n = batch[0] if batch else 1
    assert goal is not None and goal.dtype == np.float32
    assert state.shape == (n, 4) and np.array_equal(goal, np.ones((n, 2)))
    assert spec.is_single(maze_obs(*batch)) == (batch == ())


def test_keys_are_concatenated_in_their_order():
    spec = make_spec(obs_dim=6, obs_keys=["achieved_goal", "observation"])
    state, goal = spec.split_obs(maze_obs(2))
    assert state[0].tolist() == [0, 0, 0, 1, 2, 3] and goal is None


def test_the_constant_goal_stands_in_for_one_not_given():
    spec = make_spec(**MAZE, goal=[9.0, 8.0])
    for obs in (np.zeros((2, 4)), {"observation": np.zeros((2, 4))}):
        goal = spec.split_obs(obs)[1]
        assert goal is not None and goal.tolist() == [[9.0, 8.0]] * 2


@pytest.mark.parametrize(
    ("spec", "obs", "words"),
    [
        ({}, np.zeros(5), r"obs \(5,\).*takes \(4,\) or \(n, 4\)"),
        ({}, np.zeros((2, 3, 4)), r"obs must be numbers of shape .*\(2, 3, 4\)"),
        ({}, np.array(["a", "b"]), "obs must be numbers"),
        ({}, maze_obs(), "is a dict with the keys"),
        ({}, np.array([[0, 0, 0, 0], [0, 0, np.nan, 0]]), "obs is nan in row 1, column 2"),
        (MAZE, {"desired_goal": np.zeros(2)}, r"lacks \['observation'\].*got \['desired_goal'\]"),
        (MAZE, maze_obs(2) | {"desired_goal": np.zeros((3, 2))}, r"desired_goal has shape \(3, 2\)"),
        (MAZE | {"goal": [1.0, 2.0]}, maze_obs() | {"desired_goal": np.zeros(3)}, r"desired_goal .*expected \(1, 2\)"),
        (
            {"obs_dim": 6, "obs_keys": ["achieved_goal", "observation"]},
            maze_obs(2) | {"achieved_goal": np.zeros((3, 2))},
            "as many rows",
        ),
    ],
)
def test_observations_that_do_not_fit_are_refused(spec, obs, words):
    with pytest.raises(ConfigError, match=words):
        make_spec(**spec).split_obs(obs)
