"""Episodes: what is accepted becomes float32 tensors, anything else an error that says where, what and what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lit_diffrl.data.episodes import Episodes
from lit_diffrl.errors import DataError


def make_arrays(lengths: tuple[int, ...] = (3, 4, 5), obs_dim: int = 3, action_dim: int = 2) -> dict[str, Any]:
    n, ends = sum(lengths), np.cumsum(lengths)
    rng = np.random.default_rng(0)
    truncated = np.zeros(n, dtype=bool)
    truncated[ends - 1] = True
    return {
        "obs": rng.normal(size=(n, obs_dim)),
        "action": rng.uniform(-1, 1, size=(n, action_dim)),
        "reward": rng.normal(size=n),
        "terminated": np.zeros(n, dtype=bool),
        "truncated": truncated,
        "next_obs": rng.normal(size=(n, obs_dim)),
        "starts": ends - np.asarray(lengths),
        "action_low": [-1.0] * action_dim,
        "action_high": [1.0] * action_dim,
    }


def build(**changes: Any) -> Episodes:
    return Episodes.from_numpy("test/set-v0", **{**make_arrays(), **changes})


def changed(name: str, index: Any, value: Any) -> dict[str, Any]:
    array = np.asarray(make_arrays()[name]).copy()
    array[index] = value
    return {name: array}


def test_arrays_become_tensors_with_boundaries():
    arrays = make_arrays()
    episodes = Episodes.from_numpy("test/set-v0", **arrays)
    assert (episodes.num_steps, episodes.num_episodes, episodes.obs_dim, episodes.action_dim) == (12, 3, 3, 2)
    assert episodes.starts.tolist() == [0, 3, 7] and episodes.starts.dtype == torch.int64
    assert episodes.ends.tolist() == [3, 7, 12] and episodes.lengths.tolist() == [3, 4, 5]
    assert {t.dtype for t in (episodes.obs, episodes.action, episodes.reward, episodes.next_obs)} == {torch.float32}
    assert torch.equal(episodes.obs, torch.tensor(arrays["obs"]).float())


def test_tensors_do_not_change_with_the_arrays_they_came_from():
    arrays = {k: v.astype(np.float32) if k == "obs" else v for k, v in make_arrays().items()}
    episodes = Episodes.from_numpy("test/set-v0", **arrays)
    before = episodes.obs.clone()
    arrays["obs"][:] = 7
    assert torch.equal(episodes.obs, before)


def test_a_step_both_terminal_and_cut_is_terminal():
    episodes = build(**changed("terminated", 2, True))
    assert episodes.terminated.nonzero().flatten().tolist() == [2]
    assert episodes.truncated.nonzero().flatten().tolist() == [6, 11]


def test_flags_may_be_numbers():
    assert build(terminated=np.zeros(12), truncated=make_arrays()["truncated"].astype(np.uint8)).num_episodes == 3


def test_concatenation_keeps_episodes_apart():
    first, second = build(), build()
    joined = Episodes.concat([first, second, first])
    assert joined.starts.tolist() == [0, 3, 7, 12, 15, 19, 24, 27, 31]
    assert torch.equal(joined.obs[12:24], second.obs) and joined.lengths.tolist() == [3, 4, 5] * 3


@pytest.mark.parametrize("name", ["obs", "action", "reward", "next_obs"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite_are_located(name, value):
    with pytest.raises(DataError, match=r"test/set-v0: episode 1, step 2: " + name) as caught:
        build(**changed(name, 5, value))
    assert str(value) in str(caught.value) and "repair or remove" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"obs": np.zeros((12,))}, r"obs has shape \(12,\), expected \(12, obs_dim\)"),
        ({"obs": np.zeros((12, 0))}, r"obs has shape \(12, 0\)"),
        ({"obs": np.zeros((0, 3))}, "no steps"),
        ({"action": np.zeros((11, 2))}, r"action has shape \(11, 2\)"),
        ({"reward": np.zeros((12, 1))}, r"reward has shape \(12, 1\), expected \(12,\)"),
        ({"next_obs": np.zeros((12, 2))}, r"next_obs has shape \(12, 2\), expected \(12, 3\)"),
        ({"terminated": np.zeros(13, dtype=bool)}, r"terminated has shape \(13,\)"),
        ({"obs": np.full((12, 3), "x")}, "obs has dtype <U1.*float32"),
        ({"obs": np.zeros((12, 3), dtype=object)}, "obs has dtype object"),
        ({"action": np.zeros((12, 2), dtype=complex)}, "action has dtype complex"),
        ({"truncated": np.full(12, "x")}, "truncated has dtype.*bool"),
        ({"terminated": np.full(12, 0.5)}, "terminated is 0.5, expected 0 or 1"),
        ({"starts": []}, "starts"),
        ({"starts": [0.0, 3.0]}, "starts must be a list of step numbers"),
        ({"starts": [1, 3, 7]}, "first must start at row 0"),
        ({"starts": [0, 3, 3, 7]}, "episode 1 is empty"),
        ({"starts": [0, 3, 7, 12]}, "episode 3 is empty"),
        ({"starts": [0, 7, 3]}, "episode 1 ends before it starts"),
        ({"starts": [0, 3]}, "episode 1, step 3: truncated is set, but the episode goes on for 5 steps"),
        ({"starts": [0, 3, 7, 9]}, "episode 2, step 1: the episode's last step is neither"),
        (changed("terminated", 4, True), "episode 1, step 1: terminated is set.*split it there"),
        (changed("truncated", 6, False), "episode 1, step 3: the episode's last step.*mark it truncated"),
        (changed("action", (4, 1), 1.5), r"episode 1, step 1: action\[1\] is 1.5, outside \[-1, 1\].*clip"),
        ({"action_low": [-1.0]}, "action_low is .*expected 2 numbers"),
        ({"action_high": [1.0, np.nan]}, "action_high"),
    ],
)
def test_malformed_data_is_refused(changes, words):
    with pytest.raises(DataError, match=words) as caught:
        build(**changes)
    assert "test/set-v0" in str(caught.value)


def test_actions_may_exceed_bounds_by_rounding_and_bounds_may_be_infinite():
    episodes = build(**changed("action", (4, 1), 1.00009))
    assert episodes.action[4, 1].item() == pytest.approx(1.00009)
    wild = changed("action", (4, 1), 900.0)
    assert build(**wild, action_high=[np.inf, np.inf]).action.max() == 900
    assert build(**wild, action_low=None, action_high=None).action.max() == 900
