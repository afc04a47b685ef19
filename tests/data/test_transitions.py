"""Transitions: what a row holds, which rows there are, and the purity of the draws."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lit_diffrl.data import PolicyBatch, TransitionData
from lit_diffrl.data.episodes import Episodes
from lit_diffrl.data.normalizers import normalizer_from_state
from lit_diffrl.data.sources import SourceInfo
from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.errors import ConfigError, DataError
from lit_diffrl.methods.agreement import refuse_other_data
from lit_diffrl.methods.base import Method, Phase
from lit_diffrl.seeding import Place

POLICY = Phase("policy", 1)


def make_episodes(lengths: list[int], terminal: list[bool] | None = None) -> Episodes:
    """Episodes whose state is (step of the dataset, 7), whose reward is the step, and which end or are cut."""
    ends = torch.tensor(lengths).cumsum(0)
    step = torch.arange(sum(lengths)).float()
    terminated, truncated = torch.zeros(len(step), dtype=torch.bool), torch.zeros(len(step), dtype=torch.bool)
    terminated[ends - 1] = torch.tensor(terminal or [False] * len(lengths))
    truncated[ends - 1] = ~terminated[ends - 1]
    obs = torch.stack([step, torch.full_like(step, 7.0)], dim=1)
    return Episodes(
        obs=obs,
        action=torch.stack([step % 21 / 10 - 1, -(step % 21 / 10 - 1)], dim=1),
        reward=step,
        terminated=terminated,
        truncated=truncated,
        next_obs=obs + torch.tensor([0.5, 0.0]),
        starts=ends - torch.tensor(lengths),
    )


def make_info(**changes: Any) -> SourceInfo:
    fields: dict[str, Any] = dict(
        env_spec=None,
        ref_min=None,
        ref_max=None,
        max_episode_steps=None,
        obs_keys=None,
        goal_key=None,
        goal=None,
        action_low=[-1.0, -1.0],
        action_high=[1.0, 1.0],
        dataset_ids=["test/set-v0"],
    )
    return SourceInfo(**{**fields, **changes})


def make_data(episodes: Episodes | list[int], info: SourceInfo | None = None, **options: Any) -> TransitionData:
    data = TransitionData("test/set-v0", **options)
    data.load(make_episodes(episodes) if isinstance(episodes, list) else episodes, info or make_info())
    return data


def everything(data: TransitionData) -> PolicyBatch:
    return data.transitions(torch.arange(len(data.table)))


def load(dataset: str | list[str], **options: Any) -> TransitionData:
    data = TransitionData(dataset, **options)
    data.prepare_data()
    data.setup("fit")
    return data


# ---------------------------------------------------------------- what a transition is


def test_a_row_holds_the_transition_of_its_step():
    episodes = make_episodes([5, 30], terminal=[True, False])
    batch = make_data(episodes, discount=0.9).transitions(torch.tensor([4, 5, 20]))
    assert torch.equal(batch.obs, episodes.obs[[4, 5, 20]]) and torch.equal(
        batch.next_obs, episodes.next_obs[[4, 5, 20]]
    )
    assert torch.allclose(batch.action, episodes.action[[4, 5, 20]])
    assert batch.reward.tolist() == [4.0, 5.0, 20.0] and batch.done.tolist() == [1.0, 0.0, 0.0]
    assert batch.discount.tolist() == pytest.approx([0.9] * 3)
    assert {x.dtype for x in batch} == {torch.float32} and [x.dim() for x in batch] == [2, 2, 1, 2, 1, 1]


def test_a_termination_ends_the_return_and_a_time_limit_does_not():
    done = everything(make_data(make_episodes([3, 4, 2], terminal=[True, False, True]))).done
    assert done.nonzero().flatten().tolist() == [2, 8]


def test_states_are_normalised_as_they_will_be_when_acting():
    data = make_data([40], normalizer="gaussian")
    batch, steps = everything(data), torch.arange(40.0)
    deviation = steps.std(correction=0) + 1e-3
    assert torch.allclose(batch.obs[:, 0], (steps - 19.5) / deviation, atol=1e-5)
    assert torch.allclose(batch.next_obs[:, 0], (steps + 0.5 - 19.5) / deviation, atol=1e-5)
    assert batch.obs[:, 1].abs().max() == 0, "a constant dimension is 0"
    acting = normalizer_from_state(data.spec.obs_normalizer)
    assert torch.equal(acting.normalize(torch.tensor([[3.0, 7.0]]))[0], batch.obs[3])
    assert acting.normalize(torch.tensor([3.0, 8.0]))[1].item() == pytest.approx(1, abs=0.01), "divided by almost 0"


def test_actions_of_other_bounds_are_mapped_to_minus_1_and_1_and_back():
    episodes = make_episodes([21])
    raw = episodes.action * torch.tensor([0.4, 2.0]) + torch.tensor([0.0, 1.0])
    info = make_info(action_low=[-0.4, -1.0], action_high=[0.4, 3.0])
    data = make_data(dataclasses.replace(episodes, action=raw), info)
    batch = everything(data)
    assert torch.allclose(batch.action, episodes.action, atol=1e-6)
    acting = normalizer_from_state(data.spec.action_normalizer)
    assert torch.allclose(acting.unnormalize(batch.action), raw, atol=1e-6)
    assert make_data(episodes).spec.action_normalizer == {"kind": "none"}


def test_actions_are_clipped_on_demand_and_never_beyond_1():
    over = dataclasses.replace(make_episodes([3]), action=torch.tensor([[1.00005, -1.0], [0.5, 0.9995], [0.0, 0.0]]))
    assert everything(make_data(over)).action.tolist() == [[1.0, -1.0], [0.5, pytest.approx(0.9995)], [0.0, 0.0]]
    clipped = everything(make_data(over, action_clip=0.999)).action
    assert torch.allclose(clipped, torch.tensor([[0.999, -0.999], [0.5, 0.999], [0.0, 0.0]]))


def test_unbounded_actions_are_taken_as_they_are_if_they_lie_within_1():
    unbounded = make_info(action_low=[-float("inf")] * 2, action_high=[float("inf")] * 2)
    assert make_data([10], unbounded).spec.action_normalizer == {"kind": "none"}
    wild = dataclasses.replace(make_episodes([10]), action=torch.full((10, 2), 1.5))
    with pytest.raises(DataError, match=r"test/set-v0: actions have no bounds .*greatest 1.5.*\[-1, 1\]"):
        make_data(wild, unbounded)


def test_several_steps_make_one_transition_whose_discount_says_how_many():
    data = make_data(make_episodes([4, 2], terminal=[False, True]), n_step=3, discount=0.5)
    batch = everything(data)
    assert batch.reward.tolist() == [0 + 0.5 + 0.5, 1 + 1 + 0.75, 2 + 1.5, 3, 4 + 2.5, 5]
    assert batch.next_obs[:, 0].tolist() == [2.5, 3.5, 3.5, 3.5, 5.5, 5.5]
    assert batch.done.tolist() == [0, 0, 0, 0, 1, 1]
    assert batch.discount.tolist() == [0.125, 0.125, 0.25, 0.5, 0.25, 0.5]


def test_targets_of_several_steps_agree_with_those_of_one_under_the_true_values():
    # V = the discounted rewards that follow, to a terminal state: then each row's target is V of its own state.
    data = make_data(make_episodes([8], terminal=[True]), discount=0.9, reward="standardise")
    single = everything(data)
    values = [0.0]
    for reward in reversed(single.reward.tolist()):
        values.append(reward + 0.9 * values[-1])
    value = {float(step): v for step, v in enumerate(reversed(values))}
    for n in (1, 2, 3, 20):
        batch = everything(make_data(make_episodes([8], terminal=[True]), discount=0.9, reward="standardise", n_step=n))
        after = torch.tensor([value[float(s) + 0.5] for s in batch.next_obs[:, 0]])
        target = batch.reward + batch.discount * (1 - batch.done) * after
        assert torch.allclose(target, torch.tensor([value[float(s)] for s in batch.obs[:, 0]]), atol=1e-5), n


# ---------------------------------------------------------------- which transitions there are


def test_the_best_episodes_are_kept_and_everything_is_computed_from_them():
    # Returns 0 + 1 + 2, 3 + 4 + 5, 6, 7 + ... + 10: the second and the last are the best half.
    data = make_data([3, 3, 1, 4], top_fraction=0.5, normalizer="gaussian", reward="minmax")
    kept = torch.tensor([3.0, 4, 5, 7, 8, 9, 10])
    assert data.steps.tolist() == kept.tolist()
    mean = normalizer_from_state(data.spec.obs_normalizer).unnormalize(torch.zeros(2))[0]
    assert mean.item() == pytest.approx(kept.mean().item())
    assert everything(data).reward.tolist() == pytest.approx(((kept - 3) / 7 * 2 - 1).tolist())
    assert (data.spec.reward_min, data.spec.reward_max) == (-1.0, 1.0)


def test_return_range_is_that_of_whole_episodes_among_those_kept():
    # Returns 3, 12, 6 and 34; each episode loses its last step, whose successor is not recorded.
    episodes = make_episodes([3, 3, 1, 4])
    cut = torch.where(episodes.truncated[:, None], episodes.obs, episodes.next_obs)
    data = make_data(dataclasses.replace(episodes, next_obs=cut), reward="return_range", top_fraction=0.5)
    assert everything(data).reward.tolist() == pytest.approx([1000 * r / (34 - 12) for r in (3, 4, 7, 8, 9)])


@pytest.mark.parametrize(("fraction", "spread"), [(1.0, 34 - 3), (0.5, 34 - 12)])
def test_stretches_are_those_of_the_episodes_kept(fraction: float, spread: int) -> None:
    """Their returns are 3, 12 and 34: of the episode that is cut after its only step nothing is left."""
    episodes = make_episodes([3, 3, 1, 4], terminal=[True, True, False, True])
    data = make_data(episodes, reward="return_range_1000", top_fraction=fraction)
    steps = [float(i) for i in data.steps]
    assert everything(data).reward.tolist() == pytest.approx([1000 * r / spread for r in steps])
    assert 6.0 in steps or fraction < 1, "it is learnt from all the same"


def test_spec_has_the_extent_of_tuned_single_rewards():
    data = make_data([5], reward="affine", reward_scale=2.0, reward_shift=1.0, n_step=3)
    assert (data.spec.reward_min, data.spec.reward_max, data.spec.stride) == (1.0, 9.0, 1)
    assert DatasetSpec.from_dict(data.spec.to_dict()) == data.spec


def write_d4rl(path: Path, *, successors: bool, terminal: bool = False) -> str:
    """Three episodes of hopper, of 10 steps: cut at 10, ended (if ``terminal``) or cut at 20, cut at 30."""
    step = np.arange(30, dtype=np.float32)
    obs = np.tile(step[:, None], (1, 11))
    last = step % 10 == 9
    ended = last & (step == 19) & terminal
    with h5py.File(path, "w") as file:
        file["observations"] = obs
        file["actions"] = np.zeros((30, 3), dtype=np.float32)
        file["rewards"] = step
        file["terminals"], file["timeouts"] = ended, last & ~ended
        if successors:
            file["next_observations"] = obs + 0.5
    return str(path)


def test_minari_records_what_follows_a_time_limit(make_minari):
    kept: list[np.ndarray] = []
    data = load(make_minari(edit=lambda arrays, i: kept.append(arrays["observations"])))
    assert data.steps.tolist() == list(range(60))
    assert torch.equal(everything(data).next_obs[[19, 39, 59]], torch.tensor(np.array([e[-1] for e in kept])).float())
    assert everything(data).done.sum() == 0


@pytest.mark.parametrize("n_step", [1, 3])
def test_a_d4rl_file_without_successors_loses_the_steps_at_time_limits(tmp_path, n_step):
    data = load(write_d4rl(tmp_path / "hopper_medium-v2.hdf5", successors=False, terminal=True), n_step=n_step)
    steps = [step for step in range(30) if step not in (9, 29)]
    assert data.steps.tolist() == steps
    batch = everything(data)
    end = {**dict.fromkeys(range(9), 9), **dict.fromkeys(range(10, 20), 20), **dict.fromkeys(range(20, 29), 29)}
    following = [min(step + n_step, end[step]) for step in steps]
    alive = batch.done == 0
    assert batch.next_obs[alive, 0].tolist() == [s for s, a in zip(following, alive.tolist()) if a]
    assert batch.done.nonzero().flatten().tolist() == [steps.index(step) for step in range(20 - n_step, 20)]


def test_a_d4rl_file_with_successors_keeps_them(tmp_path):
    data = load(write_d4rl(tmp_path / "hopper_medium-v2.hdf5", successors=True))
    assert data.steps.tolist() == list(range(30))
    assert everything(data).next_obs[9, 0] == 9.5 and data.spec.env_spec is not None


def test_data_without_any_successor_is_refused():
    episodes = make_episodes([1, 1])
    with pytest.raises(DataError, match="test/set-v0: no transition is left.*next_observations"):
        make_data(dataclasses.replace(episodes, next_obs=episodes.obs))


def test_a_union_holds_the_transitions_of_its_parts(make_minari):
    names = [make_minari("test/a-v0", n_episodes=2), make_minari("test/b-v0", n_episodes=1)]
    data = load("+".join(names))
    assert len(data.table) == 60 and data.spec.dataset_ids == names
    assert torch.equal(everything(data).obs, torch.cat([everything(load(name)).obs for name in names]))


@pytest.mark.parametrize("variant", ["umaze", "umaze-dense"])
def test_mazes_collected_here_load(mazes, monkeypatch, variant):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    data = load(f"lit_diffrl/pointmaze/{variant}-v0", normalizer="gaussian")
    assert len(data.table) == 3_000 and data.spec.obs_dim == 4 and data.spec.env_spec is not None
    assert everything(data).done.sum() == 0, "no maze ends"
    assert data.spec.action_normalizer == {"kind": "none"}


def test_a_goal_becomes_part_of_the_state_on_demand_and_of_the_state_when_acting(make_minari):
    data = load(make_minari(dict_obs=True, goal=(1.0, -1.0)), obs_keys=["observation", "desired_goal"])
    assert everything(data).obs[:, 4:].unique(dim=0).tolist() == [[1.0, -1.0]]
    state, _ = data.spec.split_obs({"observation": np.zeros(4), "desired_goal": np.array([3.0, 4.0])})
    assert state.tolist() == [[0, 0, 0, 0, 3, 4]]


def test_goals_that_a_state_does_not_tell_are_warned_of(make_minari, caplog):
    def move(arrays: dict[str, Any], i: int) -> None:
        arrays["observations"]["desired_goal"] += i

    name = make_minari(dict_obs=True, edit=move)
    with caplog.at_level(logging.WARNING, "lit_diffrl"):
        load(name)
        assert "goals differ" in caplog.text and "--data.obs_keys '[observation,desired_goal]'" in caplog.text
        caplog.clear()
        load(name, obs_keys=["observation", "desired_goal"])
        load(make_minari("test/fixed-v0", dict_obs=True))
        assert caplog.text == ""


def test_rewards_of_one_goal_and_an_evaluation_on_others_are_warned_of(caplog):
    from lit_diffrl.data import pointmaze

    maze = {"obs_keys": ["observation"], "goal_key": "desired_goal", "goal": [1.0, 1.0]}
    for goal, warned in (("random", True), ("fixed", False)):
        caplog.clear()
        make_data([10], make_info(**maze, env_spec=pointmaze.env_spec("umaze", goal=goal).to_json()))
        assert ("evaluated on others" in caplog.text) == warned


# ---------------------------------------------------------------- drawing


def test_draws_are_a_pure_function_of_seed_and_place(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    first, second = make_data([50, 60]), make_data([50, 60])
    second.draw(POLICY, Place(0, 0))  # earlier draws leave no trace
    torch.manual_seed(123)
    here = Place(3, 5, 1, 2)
    base = first.draw(POLICY, here)
    assert all(torch.equal(a, b) for a, b in zip(base, second.draw(POLICY, here)))
    for other in (Place(4, 5, 1, 2), Place(3, 5, 0, 2), Place(3, 6, 1, 2)):
        assert not torch.equal(base.obs, first.draw(POLICY, other).obs)
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    assert not torch.equal(base.obs, first.draw(POLICY, here).obs)


def test_the_processes_of_an_update_share_the_batch_of_one():
    whole, half = make_data([50, 60], batch_size=12), make_data([50, 60], batch_size=6)
    for index in (0, 7, 70):  # of two blocks
        parts = [half.draw(POLICY, Place(1, index, rank, 2)) for rank in range(2)]
        for one, *shares in zip(whole.draw(POLICY, Place(1, index)), *parts):
            assert torch.equal(one, torch.cat(shares))


def test_indices_are_the_steps_of_the_dataset_that_a_batch_is_made_of():
    data = make_data([3, 3, 1, 4], top_fraction=0.5, batch_size=64)
    (steps,) = data.indices(POLICY, Place(2, 3))
    assert torch.equal(steps.float(), data.draw(POLICY, Place(2, 3)).obs[:, 0])
    assert set(steps.tolist()) == {3, 4, 5, 7, 8, 9, 10}, "64 draws meet all 7"


def test_draws_are_uniform_over_transitions_and_with_replacement():
    data = make_data([2, 8], batch_size=256)
    counts = torch.zeros(10)
    for index in range(128):
        counts += torch.bincount(data.indices(POLICY, Place(0, index))[0], minlength=10)
    expected = 128 * 256 / 10
    assert float(((counts - expected) ** 2 / expected).sum()) < 27.9, "chi squared of 9 degrees, p = 0.001"


def test_the_data_moves_to_the_device_of_the_training():
    data = make_data([50])
    before = data.draw(POLICY, Place(0, 1))
    data.to(torch.device("meta"))  # stands for an accelerator: mixing it with tensors of the CPU fails in the same way
    assert all(x.is_meta for x in data.draw(POLICY, Place(0, 1))) and before.obs.device.type == "cpu"
    assert all(x.is_meta for x in data.validation_batch())


def test_validation_sees_a_small_batch_that_is_always_the_same():
    data = make_data([1000])
    first, second = (next(iter(data.val_dataloader())) for _ in range(2))
    assert len(first.obs) == 256 and torch.equal(first.obs, second.obs)
    assert (first.obs[0, 0], first.obs[-1, 0]) == (0, 999)
    assert len(make_data([5]).validation_batch().obs) == 5


class Learner(Method):
    """Takes each batch's mean reward for its weight, and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[PolicyBatch] = []

    @property
    def phases(self) -> list[Phase]:
        return [POLICY]

    def build(self, spec: DatasetSpec) -> None:
        super().build(spec)
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> None:
        self.seen.append(batch)
        self.optimizers().step()


def test_a_trainer_draws_an_epoch_of_batches_by_their_places(make_minari, tmp_path):
    data = TransitionData(make_minari(), batch_size=8, updates_per_epoch=3)
    learner = Learner()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False, **quiet)
    trainer.fit(learner, datamodule=data)
    assert len(learner.seen) == 6 and learner.spec == data.spec
    for i, batch in enumerate(learner.seen):
        assert isinstance(batch, PolicyBatch)
        assert torch.equal(batch.obs, data.draw(POLICY, Place(i // 3, i % 3)).obs)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"updates_per_epoch": 0},
        {"normalizer": "limits"},
        {"reward": "iql"},
        {"reward_scale": 0.0},
        {"reward_shift": float("nan")},
        {"top_fraction": 0.0},
        {"top_fraction": 10},
        {"action_clip": 1.5},
        {"n_step": 0},
        {"discount": 1.1},
    ],
)
def test_arguments_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(ConfigError, match=rf"data\.{name} must be .*{options[name]}"):
        TransitionData(**options)


def test_numbers_of_a_tuning_that_is_not_chosen_are_refused():
    with pytest.raises(ConfigError, match="reward_scale 2 and reward_shift -5 are of data.reward 'affine', got 'none'"):
        TransitionData(reward_scale=2.0)


def test_a_tuning_that_does_not_fit_the_data_is_refused_with_its_name():
    with pytest.raises(DataError, match="test/set-v0: data.reward 'iql_antmaze' is for rewards of 0 and"):
        make_data([5], reward="iql_antmaze")


@pytest.mark.parametrize("options", [{"reward": "affine"}, {"normalizer": "gaussian"}, {"top_fraction": 0.5}])
def test_a_checkpoint_of_other_rewards_or_states_does_not_go_on(options):
    saved = make_data([5, 9]).spec
    refuse_other_data(saved, make_data([5, 9]).spec)
    with pytest.raises(ConfigError, match="trained on other data"):
        refuse_other_data(saved, make_data([5, 9], **options).spec)


def test_bounds_of_a_minari_action_space_are_those_that_actions_are_mapped_from(make_minari):
    name = make_minari(action_space=gym.spaces.Box(-2, 2, (2,), np.float32))
    data = load(name)
    assert data.spec.action_high == [2.0, 2.0] and data.spec.action_normalizer["high"] == [2.0, 2.0]
    assert everything(data).action.abs().max() <= 0.5
