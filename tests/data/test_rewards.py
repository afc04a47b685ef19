"""Rewards: oracle 15 of the policies' specification, returns, the best episodes, and sums over several steps."""

from __future__ import annotations

import pytest
import torch

from lit_diffrl.data.episodes import Episodes
from lit_diffrl.data.rewards import best_episodes, episode_returns, look_ahead, stretch_returns, tune_rewards
from lit_diffrl.data.segments import keep_steps
from lit_diffrl.errors import ConfigError, DataError


def make_episodes(rewards: list[list[float]], terminal: list[bool] | None = None) -> Episodes:
    """Episodes of these rewards, whose state is the number of the step in the dataset; all cut but the terminal."""
    lengths = torch.tensor([len(part) for part in rewards])
    ends = lengths.cumsum(0)
    reward = torch.tensor([r for part in rewards for r in part])
    n = len(reward)
    terminated, truncated = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    terminated[ends - 1] = torch.tensor(terminal or [False] * len(rewards))
    truncated[ends - 1] = ~terminated[ends - 1]
    step = torch.arange(n).float()
    return Episodes(
        obs=torch.stack([step, -step], dim=1),
        action=(step[:, None] % 19 - 9) / 10,
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        next_obs=torch.stack([step + 1, -step - 1], dim=1),
        starts=ends - lengths,
    )


def tuned(tuning: str, reward: list[float], returns: list[float] | None = None, **options: float) -> list[float]:
    out = tune_rewards(
        tuning,
        torch.tensor(reward),
        torch.tensor(returns or [0.0, 1.0], dtype=torch.float64),
        source="test/set-v0",
        **options,
    )
    assert out.dtype == torch.float32
    return out.tolist()


@pytest.mark.parametrize(
    ("tuning", "zero", "one"),
    [("none", 0, 1), ("cql_antmaze", -2, 2), ("iql_antmaze", -1, 0), ("antmaze", -0.5, 1.5), ("affine", -5, 5)],
)
def test_rewards_of_0_and_1_become(tuning, zero, one):
    assert tuned(tuning, [0.0, 1.0, 0.0]) == [zero, one, zero]


def test_affine_takes_scale_and_shift():
    assert tuned("affine", [0.0, 1.0, -2.0], scale=3.0, shift=0.5) == [0.5, 3.5, -5.5]


def test_standardise_has_mean_0_and_sample_deviation_1():
    assert tuned("standardise", [1.0, 2.0, 3.0]) == [-1.0, 0.0, 1.0]


def test_minmax_runs_from_minus_1_to_1():
    assert tuned("minmax", [0.0, 1.0, 4.0]) == [-1.0, -0.5, 1.0]


def test_return_range_divides_by_the_range_of_the_returns_and_does_not_shift():
    assert tuned("return_range", [0.5, -1.0, 3.0], [0.0, 500.0]) == [1.0, -2.0, 6.0]


def as_published(reward: list[float], terminal: list[bool], length: int) -> list[float]:
    """The loop that the published codes run over the transitions which D4RL's loader leaves."""
    returns, total, steps = [], 0.0, 0
    for r, done in zip(reward, terminal):
        total, steps = total + r, steps + 1
        if done or steps == length:
            returns.append(total)
            total, steps = 0.0, 0
    return returns


@pytest.mark.parametrize("length", [3, 4, 1000])
@pytest.mark.parametrize("last", [True, False])
def test_stretches_are_cut_by_terminations_and_their_length_alone(length: int, last: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    rewards = [torch.randn(n, generator=generator).double().tolist() for n in (4, 5, 1, 9, 3, 1, 8)]
    terminal = [False, False, True, True, False, False, last]
    left = [part if ended else part[:-1] for part, ended in zip(rewards, terminal)]
    flat = [r for part in left for r in part]
    ends = [ended and i == len(part) - 1 for part, ended in zip(left, terminal) for i in range(len(part))]
    found = stretch_returns(make_episodes(rewards, terminal), length).tolist()
    assert found == pytest.approx(as_published(flat, ends, length), abs=1e-5)


def test_full_episodes_lose_a_step_each_to_the_stretch_before() -> None:
    """Three episodes of the limit's 1000 steps, which are 999 without the cut one: the scale is another."""
    episodes = make_episodes([[1.0] * 1000, [2.0] * 1000, [5.0] * 1000])
    assert episode_returns(episodes).tolist() == [1000, 2000, 5000]
    assert stretch_returns(episodes).tolist() == [999 + 2, 998 * 2 + 2 * 5]
    assert len(stretch_returns(make_episodes([[1.0] * 500]))) == 0
    assert tuned("return_range_1000", [0.5, 3.0], [0.0, 500.0]) == [1.0, 6.0]


def test_the_scale_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lit_diffrl"):
        tuned("return_range", [1.0], [0.0, 500.0])
    assert "return_range multiplies rewards by 2" in caplog.text


def test_large_rewards_keep_their_differences():
    # In float32 the mean of these would swallow what is left of it.
    found = torch.tensor(tuned("standardise", [1e6 + i for i in range(5)]))
    assert torch.allclose(found, (torch.arange(5.0) - 2) / 2.5**0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("tuning", "reward", "returns", "words"),
    [
        ("iql_antmaze", [0.0, 0.0], None, r"rewards of 0 and, at the goal, 1; .* 0 of 2 are 1"),
        ("cql_antmaze", [0.0, 0.5, 1.0], None, r"rewards of 0 and, at the goal, 1; these lie in \[0, 1\] and 1 of 3"),
        ("standardise", [3.0, 3.0], None, r"spread of the rewards, but all 2 are 3"),
        ("standardise", [3.0], None, r"spread of the rewards, but all 1 are 3"),
        ("minmax", [3.0, 3.0], None, r"spread of the rewards, but all 2 are 3"),
        ("return_range", [1.0, 2.0], [7.0, 7.0], r"spread of the episodes' returns, but all 2 are 7"),
        ("return_range_1000", [1.0, 2.0], [7.0, 7.0], r"spread of the stretches' returns, but all 2 are 7"),
    ],
)
def test_rewards_that_cannot_be_tuned_so_are_refused(tuning, reward, returns, words):
    with pytest.raises(DataError, match=rf"test/set-v0: data.reward '{tuning}' .*{words}.*none"):
        tuned(tuning, reward, returns)


def test_stretches_need_steps() -> None:
    with pytest.raises(DataError, match=r"test/set-v0: data.reward 'return_range_1000' needs 1000 steps"):
        tune_rewards("return_range_1000", torch.ones(2), torch.zeros(0), source="test/set-v0")


def test_an_unknown_tuning_is_refused():
    with pytest.raises(ConfigError, match="data.reward must be one of .*did you mean 'standardise'"):
        tuned("standardize", [0.0, 1.0])


def test_returns_are_undiscounted_and_stay_within_episodes():
    assert episode_returns(make_episodes([[1.0, 2.0, 4.0], [8.0], [16.0, -32.0]])).tolist() == [7.0, 8.0, -16.0]


@pytest.mark.parametrize(
    ("n", "fraction", "count"), [(20, 0.1, 2), (19, 0.1, 1), (3, 0.1, 1), (100, 0.29, 29), (7, 1.0, 7)]
)
def test_the_best_episodes_are_a_tenth_or_at_least_one(n, fraction, count):
    returns = (torch.arange(n) * 7 % n).double() if n % 7 else torch.arange(n).double()
    best = best_episodes(returns, fraction)
    assert int(best.sum()) == count and set(returns[best].tolist()) == {float(i) for i in range(n - count, n)}


def test_of_equal_returns_the_earlier_episode_is_kept():
    # Sorts that are not stable keep the order of a few equal numbers all the same, so there are many.
    best = best_episodes(torch.tensor([1.0] + [3.0] * 999), 0.5)
    assert best.nonzero().flatten().tolist() == list(range(1, 501))


def test_kept_steps_form_episodes_that_end_where_they_were_cut():
    episodes = make_episodes([[1.0] * 3, [1.0] * 2, [1.0], [1.0] * 4], terminal=[True, False, False, True])
    keep = torch.tensor([1, 1, 1, 0, 0, 0, 1, 1, 1, 0]).bool()
    kept = keep_steps(episodes, keep)
    assert kept.lengths.tolist() == [3, 3] and kept.obs[:, 0].tolist() == [0, 1, 2, 6, 7, 8]
    assert kept.terminated.tolist() == [False, False, True, False, False, False]
    assert kept.truncated.tolist() == [False, False, False, False, False, True]
    assert torch.equal(keep_steps(episodes, torch.ones(10, dtype=torch.bool)).truncated, episodes.truncated)


def test_one_step_ahead_is_the_transition_itself():
    episodes = make_episodes([[1.0, 2.0], [3.0]])
    ahead = look_ahead(episodes, episodes.reward, 1, 0.9)
    assert ahead.reward.tolist() == [1.0, 2.0, 3.0] and ahead.last.tolist() == [0, 1, 2]
    assert ahead.discount.tolist() == pytest.approx([0.9] * 3)


def test_several_steps_ahead_are_discounted_and_stop_at_the_end_of_the_episode():
    episodes = make_episodes([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0]])
    ahead = look_ahead(episodes, episodes.reward, 3, 0.5)
    assert ahead.reward.tolist() == [1 + 1 + 1, 2 + 2 + 2, 4 + 4, 8, 16 + 16, 32]
    assert ahead.last.tolist() == [2, 3, 3, 3, 5, 5]
    assert ahead.discount.tolist() == [0.125, 0.125, 0.25, 0.5, 0.25, 0.5]
