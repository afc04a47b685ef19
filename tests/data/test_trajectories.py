"""TrajectoryData: where windows begin and end, their scale, their padding, and what each phase is given."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from lit_diffrl.data import TrajectoryData
from lit_diffrl.data.episodes import Episodes
from lit_diffrl.data.sources import SourceInfo
from lit_diffrl.errors import ConfigError, DataError
from lit_diffrl.methods.base import Phase
from lit_diffrl.seeding import Place

LENGTHS = (12, 3, 8)
PHASES = {kind: Phase("x", 1, kind, 3) for kind in ("windows", "bootstraps", "rows")}  # type: ignore[arg-type]


def episodes(lengths: tuple[int, ...] = LENGTHS) -> Episodes:
    """Every number tells its step: states (step, -2 step), actions step / 100; the first episode terminates."""
    n = sum(lengths)
    step = torch.arange(n).float()
    obs = torch.stack([step, -2 * step], 1)
    ends = torch.tensor(lengths).cumsum(0)
    last = torch.isin(torch.arange(n), ends - 1)
    terminated = last & (torch.arange(n) < lengths[0])
    starts = ends - torch.tensor(lengths)
    return Episodes(obs, step[:, None] / 100, step, terminated, last & ~terminated, obs + torch.tensor([1, -2]), starts)


def data(horizon: int | None = 5, lengths: tuple[int, ...] = LENGTHS, **options: Any) -> TrajectoryData:
    made = TrajectoryData(dataset="test/steps-v0", horizon=horizon, **options)
    info = SourceInfo(None, None, None, None, None, None, None, [-1.0], [1.0], ["test/steps-v0"])
    made.load(episodes(lengths), info)
    return made


def raw(made: TrajectoryData, trajectory: torch.Tensor) -> torch.Tensor:
    return made.limits.unnormalize(trajectory)


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("horizon", [2, 5, 8, 12, 20])
@pytest.mark.parametrize("padding", ["repeat", "drop"])
def test_an_episode_has_as_many_windows_as_fit_and_a_short_one_has_one(horizon: int, padding: str) -> None:
    """Oracle 14: max(T - H, 0) + 1."""
    counts = [max(n - horizon, 0) + 1 if padding == "repeat" or n >= horizon else 0 for n in LENGTHS]
    if not any(counts):
        with pytest.raises(DataError, match=r"no episode has data.horizon 20 steps \(longest 12\)"):
            data(horizon, padding=padding, terminal=False)
        return
    made = data(horizon, padding=padding, terminal=False)
    assert len(made.starts) == sum(counts)
    firsts = np.cumsum([0, *LENGTHS[:-1]])
    assert made.starts.tolist() == [int(f) + i for f, c in zip(firsts, counts) for i in range(c)]


def test_windows_hold_consecutive_steps_states_first() -> None:
    made = data()
    batch = made.windows(torch.tensor([3, 15]), 5)
    assert batch.mask.all()
    for first, window in zip((3, 15), raw(made, batch.trajectory)):
        steps = torch.arange(first, first + 5).float()
        torch.testing.assert_close(window, torch.stack([steps, -2 * steps, steps / 100], 1), rtol=0, atol=1e-5)


def test_the_scale_runs_from_minus_one_to_one_over_all_rows_short_episodes_included() -> None:
    """Oracle 21, and pitfall 28: what is padded does not enter the limits, and the last state of an episode does."""
    made = data(lengths=(12, 8, 3))
    assert made.scaled.amin(0).tolist() == pytest.approx([-1, -1 + 2 * 2 / 46, -1], abs=1e-6)
    assert made.scaled.amax(0).tolist() == pytest.approx([1 - 2 / 23, 1, 1], abs=1e-6)
    assert made.limits.low.tolist() == [0, -46, 0]
    assert made.limits.high.tolist() == pytest.approx([23, 0, 0.22])
    torch.testing.assert_close(made.limits.unnormalize(torch.full((3,), 1.5)), made.limits.high)


def test_padding_repeats_the_last_state_with_still_actions_and_is_not_learnt_from() -> None:
    made = data()
    batch = made.windows(torch.tensor([12]), 5)
    assert batch.mask.tolist() == [[True, True, True, False, False]]
    window = raw(made, batch.trajectory)[0]
    torch.testing.assert_close(window[:, 0], torch.tensor([12.0, 13, 14, 14, 14]))
    torch.testing.assert_close(window[3:, 2], torch.zeros(2), rtol=0, atol=1e-7)


def test_windows_go_on_to_a_terminal_state_which_stays_whatever_is_done() -> None:
    made = data()
    assert made.starts.tolist() == [*range(12), 12, *range(15, 19)], "the first episode alone terminates"
    batch = made.windows(torch.tensor([7, 8, 11]), 5)
    assert batch.mask.int().tolist() == [[1] * 5] * 3
    window = raw(made, batch.trajectory)
    states = [[7.0, 8, 9, 10, 11], [8, 9, 10, 11, 12], [11, 12, 12, 12, 12]]
    torch.testing.assert_close(window[..., 0], torch.tensor(states), rtol=0, atol=1e-5)
    steps = torch.tensor([[7, 8, 9, 10, 11], [8, 9, 10, 11, 12 - 12], [11, 12 - 12, 13 - 12, 14 - 12, 15 - 12]])
    torch.testing.assert_close(window[..., 2], steps / 100, rtol=0, atol=1e-6)  # 23 rows: 11 further, around the end
    constant = data(padding="constant").windows(torch.tensor([11]), 5)
    assert constant.mask.all() and torch.equal(constant.trajectory[0], batch.trajectory[2]), "padding tells of the end"


def test_terminal_windows_are_of_the_episodes_that_are_kept_and_long_enough() -> None:
    assert data(padding="drop").starts.tolist() == [*range(12), *range(15, 19)]
    assert data(padding="drop", horizon=13, lengths=(12, 13)).starts.tolist() == [12]
    kept = data(top_fraction=0.67)  # without the short episode
    assert kept.starts.tolist() == [*range(12), *range(12, 16)] and kept.first_steps[12] == 15
    window = raw(kept, kept.windows(torch.tensor([11]), 3).trajectory)[0]
    torch.testing.assert_close(window[:, 2], torch.tensor([0.11, 0.02, 0.03]), rtol=0, atol=1e-6)  # 20 rows are kept


def test_data_without_the_states_after_the_last_ones_has_no_terminal_states() -> None:
    made, source = TrajectoryData(dataset="test/steps-v0", horizon=5), episodes()
    next_obs = torch.where((source.terminated | source.truncated)[:, None], source.obs, source.next_obs)
    info = SourceInfo(None, None, None, None, None, None, None, [-1.0], [1.0], ["test/steps-v0"])
    made.load(dataclasses.replace(source, next_obs=next_obs), info)
    assert not made.falls.any() and made.starts.tolist() == [*range(8), 12, *range(15, 19)]


@pytest.mark.parametrize("padding", ["repeat", "constant", "drop"])
def test_windows_without_terminal_states_are_the_papers(padding: str) -> None:
    """Equation 2: every window ends at the latest with the last state that was acted in."""
    made, other = data(terminal=False, padding=padding), data(padding=padding)
    assert made.starts.tolist() == [*range(8), *([12] if padding != "drop" else []), *range(15, 19)]
    assert raw(made, made.windows(made.starts, 5).trajectory)[:8, :, 0].max() == 11
    for x, y in zip(made.windows(made.starts, 5), other.windows(made.starts, 5)):
        assert torch.equal(x, y)


def test_recorded_windows_hold_steps_that_were_acted_in() -> None:
    obs, _ = data().recorded(100)
    assert obs.shape[0] == 8 + 4 and obs[:8, -1, 0].max() == 11


def test_constant_padding_is_learnt_from() -> None:
    made = data(padding="constant")
    batch = made.windows(torch.tensor([12]), 5)
    assert batch.mask.all() and torch.equal(batch.trajectory[0, 3:], torch.full((2, 3), -1.0001))


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("kind", PHASES)
def test_a_draw_depends_on_the_place_alone_and_processes_share_it(kind: str) -> None:
    phase, whole = PHASES[kind], data(window_batch_size=8, transition_batch_size=8)
    one = whole.draw(phase, Place(2, 70))
    whole.draw(phase, Place(0, 0))
    assert all(torch.equal(a, b) for a, b in zip(one, whole.draw(phase, Place(2, 70))))
    half = data(window_batch_size=4, transition_batch_size=4)
    parts = [half.draw(phase, Place(2, 70, rank, 2)) for rank in (0, 1)]
    axis = 0 if kind == "windows" else 1
    for x, *own in zip(one, *parts):
        assert torch.equal(torch.cat(own, axis), x)


def test_what_is_held_out_is_learnt_by_no_member_and_seen_by_the_row_model() -> None:
    made = data(transition_batch_size=400)
    held = set(made.held_out.tolist())
    assert len(held) == int(0.2 * len(made.table)) and not held & set(made.usable.tolist())
    members = made.rows(PHASES["bootstraps"], Place(0, 0))
    assert members.shape == (3, 400) and not held & set(members.flatten().tolist())
    assert not torch.equal(members[0].unique(), members[1].unique()), "each member has its own sample"
    later = made.rows(PHASES["bootstraps"], Place(5, 9))
    assert set(later[0].tolist()) == set(members[0].tolist()), "which does not change"
    assert held & set(made.rows(PHASES["rows"], Place(0, 0)).flatten().tolist())


def test_a_report_names_the_steps_of_the_dataset() -> None:
    made = data(top_fraction=0.4)  # the last episode alone
    steps, horizon = made.indices(PHASES["windows"], Place(0, 0))
    assert horizon == 5 and set(steps.tolist()) <= set(range(15, 19))
    window = raw(made, made.draw(PHASES["windows"], Place(0, 0)).trajectory)
    torch.testing.assert_close(window[:, 0, 0], steps.float(), rtol=0, atol=1e-4)


def test_rollouts_may_start_from_all_states_from_living_ones_or_from_initial_ones() -> None:
    made = data()
    steps = {kind: made.steps[made.start_rows(kind)].tolist() for kind in ("transitions", "non_terminal", "initial")}  # type: ignore[arg-type]
    assert steps["transitions"] == list(range(23)) and steps["initial"] == [0, 12, 15]
    assert steps["non_terminal"] == [s for s in range(23) if s != 11]


def test_deviations_are_those_of_all_raw_states() -> None:
    steps = torch.arange(23).double()
    expected = torch.stack([steps, -2 * steps], 1).std(0, correction=0)
    torch.testing.assert_close(data().deviations(), expected, rtol=1e-5, atol=1e-5)


def test_states_are_spread_over_what_rollouts_may_start_from() -> None:
    made = data()
    torch.testing.assert_close(made.spread_states(100)[:, 0], torch.tensor([*range(11), *range(12, 23)]).float())
    torch.testing.assert_close(made.spread_states(2), torch.tensor([[0.0, 0.0], [22.0, -44.0]]), rtol=1e-4, atol=1e-4)


def test_recorded_windows_are_whole_and_raw() -> None:
    made = data()
    obs, action = made.recorded(4)
    assert obs.shape == (4, 5, 2) and action.shape == (4, 5, 1)
    assert obs[0, 0, 0] == 0 and obs[-1, -1, 0] == 22, "spread over the whole data"
    torch.testing.assert_close(obs[..., 0].diff(dim=1), torch.ones(4, 4), rtol=0, atol=1e-4)
    torch.testing.assert_close(action[..., 0], obs[..., 0] / 100, rtol=0, atol=1e-6)


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.n_step is 3"):
        TrajectoryData(n_step=3)
    with pytest.raises(ConfigError, match="data.horizon is null"):
        data(None).draw(PHASES["windows"], Place(0, 0))
    with pytest.raises(DataError, match=r"no episode has data.horizon 40 steps to compare"):
        data(40).recorded(2)
