"""Windows and transitions: oracles 23 to 25 of the planners' specification, and the purity of the draws."""

from __future__ import annotations

import pytest
import torch

from lit_diffrl.data.episodes import Episodes
from lit_diffrl.data.segments import discounted_returns, goal_departures, window_starts
from lit_diffrl.data.sources import SourceInfo
from lit_diffrl.data.stream import Blocks
from lit_diffrl.data.windows import WindowData
from lit_diffrl.errors import ConfigError, DataError
from lit_diffrl.methods.base import Phase
from lit_diffrl.seeding import Draws, Place


def make_episodes(lengths: list[int], obs_dim: int = 2, action_dim: int = 1, terminal: bool = False) -> Episodes:
    """Episodes whose observation is (step in episode + 1, episode), action the step, reward 1."""
    n = sum(lengths)
    step = torch.cat([torch.arange(length) for length in lengths]).float()
    episode = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).float()
    obs = torch.stack([step + 1, episode], dim=1).repeat(1, obs_dim // 2)
    ends = torch.tensor(lengths).cumsum(0)
    last = torch.zeros(n, dtype=torch.bool)
    last[ends - 1] = True
    return Episodes(
        obs=obs,
        action=step[:, None].repeat(1, action_dim) / 10,
        reward=torch.ones(n),
        terminated=last if terminal else torch.zeros_like(last),
        truncated=torch.zeros_like(last) if terminal else last,
        next_obs=obs + torch.tensor([1.0, 0.0]).repeat(obs_dim // 2),
        starts=ends - torch.tensor(lengths),
    )


def make_info(obs_dim: int = 2, action_dim: int = 1, **changes: object) -> SourceInfo:
    fields: dict = dict(
        env_spec=None,
        ref_min=None,
        ref_max=None,
        max_episode_steps=None,
        obs_keys=None,
        goal_key=None,
        goal=None,
        action_low=[-1.0] * action_dim,
        action_high=[1.0] * action_dim,
        dataset_ids=["test/set-v0"],
    )
    return SourceInfo(**{**fields, **changes})


def make_data(lengths: list[int], terminal: bool = False, **options: object) -> WindowData:
    data = WindowData(dataset="test/set-v0", **{"horizon": 8, "batch_size": 16, **options})  # type: ignore[arg-type]
    data.load(make_episodes(lengths, terminal=terminal), make_info())
    return data


@pytest.mark.parametrize(
    ("length", "horizon", "padding", "compat", "limit", "count"),
    [
        (1000, 32, True, True, 1000, 968),
        (1000, 32, True, False, 1000, 969),
        (100, 32, True, True, 1000, 99),
        (100, 32, False, True, 1000, 68),
        (100, 32, False, False, 1000, 69),
        (32, 32, False, True, 1000, 0),
        (32, 32, False, False, 1000, 1),
    ],
)
def test_number_of_window_starts(length, horizon, padding, compat, limit, count):
    found = window_starts(torch.tensor([length]), horizon, use_padding=padding, max_path_length=limit, compat=compat)
    assert found.tolist() == [count]


def test_padded_rows_unnormalise_to_raw_zeros_and_are_masked():
    data = make_data([5, 9], use_padding=True, normalizer="gaussian")
    batch = data.windows(torch.tensor([3]), 8)
    assert batch.mask[0].tolist() == [True] * 2 + [False] * 6
    action, obs = batch.trajectory[0].split([1, 2], dim=-1)
    assert torch.allclose(data.obs_normalizer.unnormalize(obs)[2:], torch.zeros(6, 2), atol=1e-5)
    assert torch.allclose(data.action_normalizer.unnormalize(action)[2:], torch.zeros(6, 1), atol=1e-6)
    assert batch.reward[0].tolist() == [1.0] * 2 + [0.0] * 6


def test_windows_never_cross_episodes():
    data = make_data([12, 9, 30], horizon=4)
    batch = data.windows(data.starts[4], 4)
    obs = data.obs_normalizer.unnormalize(batch.trajectory[..., 1:])
    assert bool((obs[..., 1] == obs[:, :1, 1]).all()), "a window mixes episodes"
    assert torch.allclose(obs[:, 1:, 0] - obs[:, :-1, 0], torch.ones(()), atol=1e-4)


def test_stride_takes_every_sth_state_the_mean_action_and_the_summed_reward():
    data = make_data([40], horizon=4, stride=5)
    batch = data.windows(torch.tensor([2]), 4)
    obs = data.obs_normalizer.unnormalize(batch.trajectory[0, :, 1:])
    action = data.action_normalizer.unnormalize(batch.trajectory[0, :, :1])
    assert torch.allclose(obs[:, 0], torch.tensor([3.0, 8.0, 13.0, 18.0]), atol=1e-4)
    assert torch.allclose(action[:, 0], torch.tensor([4.0, 9.0, 14.0, 19.0]) / 10, atol=1e-5)
    assert batch.reward[0].tolist() == [5.0] * 4
    transition = data.transitions(torch.tensor([[2]]))
    assert torch.allclose(data.obs_normalizer.unnormalize(transition.next_obs[0, 0])[0], torch.tensor(8.0), atol=1e-4)
    assert data.spec.reward_max == 5.0 and data.spec.stride == 5


@pytest.mark.parametrize(
    ("length", "terminal", "penalty", "value"), [(1000, False, None, 316.8123), (100, True, -100.0, 12.2340)]
)
def test_value_target_runs_to_the_end_of_the_episode(length, terminal, penalty, value):
    returns = discounted_returns(make_episodes([length, 3], terminal=terminal), 0.997, penalty)
    assert returns[0].item() == pytest.approx(value, abs=2e-4)


def test_episode_return_is_undiscounted_and_without_penalty():
    data = make_data([20, 10], terminal=True, termination_penalty=-100.0)
    assert data.windows(torch.tensor([3, 22]), 8).episode_return.tolist() == [20.0, 10.0]


WINDOWS = Phase("diffusion", 1)


def ensemble(members):
    return Phase("world_model", 1, "transitions", members)


def test_draws_are_a_pure_function_of_seed_and_place(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    first, second = make_data([50, 60]), make_data([50, 60])
    second.draw(WINDOWS, Place(0, 0))  # earlier draws leave no trace
    torch.manual_seed(123)
    here = Place(3, 5, 1, 2)
    for a, b in zip(first.draw(WINDOWS, here), second.draw(WINDOWS, here)):
        assert torch.equal(a, b)
    assert torch.equal(first.draw(ensemble(3), Place(2, 9)).obs, second.draw(ensemble(3), Place(2, 9)).obs)
    base = first.draw(WINDOWS, here).trajectory
    for other in (Place(4, 5, 1, 2), Place(3, 5, 0, 2), Place(3, 6, 1, 2)):
        assert not torch.equal(base, first.draw(WINDOWS, other).trajectory)
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    assert not torch.equal(base, first.draw(WINDOWS, here).trajectory)


@pytest.mark.parametrize("number", [0, 1])
def test_batches_and_noise_have_streams_of_their_own(number):
    """Also where the block of batches and the update have the same number."""
    drawn = []

    def draw(phase, place, generator):
        drawn.append(torch.rand(4, generator=generator))
        return [None] * 64

    Blocks(64).row(WINDOWS, Place(3, 64 * number), draw)
    draws = Draws()
    draws.begin(Place(3, number), torch.device("cpu"))
    assert not torch.equal(drawn[0], torch.rand(4, generator=draws._generator))


@pytest.mark.parametrize(("phase", "size"), [(WINDOWS, "batch_size"), (ensemble(3), "transition_batch_size")])
def test_the_processes_of_an_update_share_the_batch_of_one(phase, size):
    whole, half = make_data([50, 60], **{size: 12}), make_data([50, 60], **{size: 6})
    parts = [half.draw(phase, Place(1, 7, rank, 2)) for rank in range(2)]
    for one, *shares in zip(whole.draw(phase, Place(1, 7)), *parts):
        assert torch.equal(one, torch.cat(shares, dim=1 if phase.batch == "transitions" else 0))


def test_several_horizons_alternate_between_batches_but_not_between_ranks():
    data = make_data([80], horizon=[4, 8, 12])

    def seen(rank):
        return [data.draw(WINDOWS, Place(0, i, rank, 2)).trajectory.shape[1] for i in range(40)]

    assert set(seen(0)) == {4, 8, 12} and seen(0) == seen(1)


def test_members_draw_different_transitions_and_never_held_out_ones():
    data = make_data([400])
    batch = data.draw(ensemble(3), Place(0, 0))
    assert batch.obs.shape == (3, 256, 2) and not torch.equal(batch.obs[0], batch.obs[1])
    steps = data.obs_normalizer.unnormalize(batch.obs)[..., 0].round().long() - 1
    assert not set(steps.flatten().tolist()) & set(data.held_out.tolist())


def test_goal_segmentation_runs_from_departure_to_departure():
    position = torch.tensor([3.0, 0.2, 0.1, 2.0, 3.0, 0.0, 1.0, 2.0])
    episodes = make_episodes([8])
    episodes = Episodes(**{**episodes.__dict__, "obs": torch.stack([position, torch.zeros(8)], dim=1)})
    cut = goal_departures(episodes, [0.0, 0.0])
    assert cut.lengths.tolist() == [2, 2] and cut.obs[:, 0].tolist() == pytest.approx([3.0, 0.2, 2.0, 3.0])
    with pytest.raises(DataError, match="never|leaves the goal"):
        goal_departures(episodes, [50.0, 50.0])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"horizon": 60}, DataError, "no window of 60 rows.*--data.horizon"),
        ({"max_path_length": 20}, DataError, "50 steps.*max_path_length 20"),
        ({"segmentation": "goal"}, ConfigError, "no constant goal"),
    ],
)
def test_data_that_does_not_fit_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        make_data([50], **options)


@pytest.mark.parametrize(
    "options", [{"horizon": 1}, {"stride": 0}, {"batch_size": 0}, {"discount": 1.1}, {"normalizer": "gausian"}]
)
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        WindowData(**options)
