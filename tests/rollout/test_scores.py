"""RAT and OMS in closed form."""

from __future__ import annotations

import pytest
import torch

from lit_diffrl.errors import ConfigError
from lit_diffrl.rollout.scores import RunningScores


def run(values, window=10):
    scores = RunningScores(window)
    for epoch, value in enumerate(values):
        scores.add(epoch, value)
    return scores


def test_known_values():
    scores = run(range(1, 21))
    assert (scores.oms, scores.rat, scores.last, scores.best_epoch) == (20, 15.5, 20, 19)
    scores = run([100] * 10 + [0] * 10)
    assert (scores.oms, scores.rat, scores.last, scores.best_epoch) == (100, 0, 0, 0)


def test_before_the_window_is_full_rat_is_the_mean_so_far():
    scores = run([4, 8])
    assert (scores.rat, scores.oms) == (6, 8)


def test_rat_never_exceeds_oms_and_a_window_of_one_is_the_last():
    values = [3.0, -7.5, 12.25, 0.5]
    for n in range(1, 5):
        assert run(values[:n]).rat <= run(values[:n]).oms
        assert run(values[:n], window=1).rat == values[n - 1]


def test_a_resumed_history_continues(tmp_path):
    values = [float(v * v % 17) for v in range(23)]
    torch.save(run(values[:12]).state_dict(), tmp_path / "state.pt")
    resumed = RunningScores()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for epoch in range(12, 23):
        resumed.add(epoch, values[epoch])
    whole = run(values)
    assert resumed.history == whole.history
    assert (resumed.rat, resumed.oms) == (whole.rat, whole.oms)


def test_an_epoch_evaluated_again_counts_once():
    scores = run([1, 2, 3])
    scores.add(2, 9)
    assert scores.history == [(0, 1.0), (1, 2.0), (2, 9.0)]


def test_window_is_positive():
    with pytest.raises(ConfigError, match="rat_window"):
        RunningScores(0)
