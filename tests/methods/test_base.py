"""What all methods share: phases, seeding, the agent's interface, the guard, and which checkpoints fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import Namespace
from torch import Tensor

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.windows import WindowBatch
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods.base import CHECKPOINT_KEY, Method, Phase, as_options, plain
from lit_diffrl.methods.options import PlanOptions, SamplerOptions


class Noisy(Method):
    """Acts by ten times the position and a little noise; knows what it was asked."""

    fixed_arguments = ("meaning",)

    def __init__(self, width: int = 3, meaning: str = "x0", epochs: tuple[int, ...] = (2, 0, 3)) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width, self.epochs = width, epochs
        self.asked: list[tuple[Tensor, Tensor | None, list[int]]] = []

    @property
    def phases(self) -> list[Phase]:
        return [Phase(name, n) for name, n in zip("abc", self.epochs)]

    def build(self, spec: DatasetSpec) -> None:
        super().build(spec)
        self.net = torch.nn.Linear(spec.obs_dim, self.width)

    def choose_action(self, state: Tensor, goal: Tensor | None, rows: list[int]) -> Tensor:
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        self.asked.append((state, goal, rows))
        return 10 * state[:, :2] + 0.01 * self.row_noise(rows, (2,))


@pytest.fixture
def agent(spec: DatasetSpec) -> Noisy:
    method = Noisy()
    method.build(spec)
    return method


class Place:
    """As much of a Trainer as a phase looks at."""

    def __init__(self, epoch: int, rank: int = 0) -> None:
        self.current_epoch, self.global_rank, self.world_size = epoch, rank, 2


def at(method: Noisy, epoch: int, rank: int = 0) -> Noisy:
    method._trainer = Place(epoch, rank)  # type: ignore[assignment]
    return method


# ---------------------------------------------------------------- phases and seeds


def test_phases_follow_one_another_and_empty_ones_are_left_out() -> None:
    method = Noisy()
    assert method.total_epochs == 5 and method.phase.name == "a"
    assert [at(method, epoch).phase.name for epoch in range(7)] == [*"aacccc", "c"]


def test_the_noise_of_an_update_is_its_place_in_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(seed: int = 0, epoch: int = 0, batch: int = 0, rank: int = 0) -> float:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        torch.rand(torch.randint(10, ()))  # whatever happened before
        at(Noisy(), epoch, rank).on_train_batch_start(None, batch)
        return float(torch.rand(()))

    assert draw(3, 1, 4, 1) == draw(3, 1, 4, 1)
    places = [(s, e, b, r) for s in (0, 1) for e in (0, 1) for b in (0, 1) for r in (0, 1)]
    assert len({draw(*place) for place in places}) == len(places)


def test_options_are_plain_in_a_checkpoint_and_come_back() -> None:
    options = PlanOptions(candidates=2, rank_by="model", horizons=[8, 12])
    stored = plain({"plan": options, "sampler": Namespace(name="ddim", steps=3), "mults": (1, 2), "none": None})
    assert stored["plan"] == dataclasses.asdict(options) and stored["mults"] == [1, 2]
    assert as_options(PlanOptions(), stored["plan"]) == options
    assert as_options(SamplerOptions(), stored["sampler"]) == SamplerOptions(name="ddim", steps=3)
    assert as_options(PlanOptions(), options) is options


# ---------------------------------------------------------------- acting


@pytest.mark.parametrize("kind", ["numpy", "numpy64", "list", "torch"])
def test_actions_have_the_form_of_the_observations(agent: Noisy, kind: str) -> None:
    one = [0.02, -0.03, 0.0, 0.0]
    convert: Any = {
        "numpy": lambda x: np.asarray(x, dtype=np.float32),
        "numpy64": np.asarray,
        "list": list,
        "torch": torch.tensor,
    }[kind]
    array = torch.Tensor if kind == "torch" else np.ndarray
    single, batch = agent.act(convert(one)), agent.act(convert([one] * 3))
    for action, shape in ((single, (2,)), (batch, (3, 2))):
        assert isinstance(action, array) and action.shape == shape
        assert str(action.dtype).endswith("float32")
        np.testing.assert_allclose(np.broadcast_to([0.2, -0.3], shape), action, atol=0.05)
    assert [rows for _, _, rows in agent.asked] == [[0], [0, 1, 2]]


def test_dict_observations_bring_their_goals(spec: DatasetSpec) -> None:
    agent = Noisy()
    agent.build(dataclasses.replace(spec, obs_keys=["observation"], goal_key="desired_goal"))
    obs = {"observation": np.zeros((2, 4)), "achieved_goal": np.ones((2, 2)), "desired_goal": np.full((2, 2), 0.25)}
    assert agent.act(obs).shape == (2, 2)
    state, goal, _ = agent.asked[-1]
    assert state.shape == (2, 4) and goal is not None and goal.tolist() == [[0.25, 0.25]] * 2
    assert agent.act({k: v[0] for k, v in obs.items()}).shape == (2,)
    agent.act(np.zeros(4))
    assert agent.asked[-1][1].tolist() == [[0.5, -0.5]], "the data's own"  # type: ignore[union-attr]


def test_actions_are_within_bounds_and_only_active_rows_are_asked(agent: Noisy) -> None:
    obs = np.full((4, 4), 5.0)
    actions = agent.act(obs, active=[False, True, False, True])
    assert actions.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]
    assert agent.asked[-1][2] == [1, 3] and len(agent.asked[-1][0]) == 2
    assert agent.act(obs, active=np.zeros(4, dtype=bool)).tolist() == [[0, 0]] * 4 and len(agent.asked) == 1


def test_acting_works_in_inference_mode_and_touches_no_global_generator(agent: Noisy) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    expected = (float(torch.rand(())), np.random.rand())
    torch.manual_seed(0)
    np.random.seed(0)
    with torch.inference_mode():
        agent.act(np.zeros((3, 4)))
    assert (float(torch.rand(())), np.random.rand()) == expected


def test_without_networks_there_is_no_action() -> None:
    with pytest.raises(ConfigError, match="Noisy has no networks yet"):
        Noisy().act(np.zeros(4))


@pytest.mark.parametrize(
    ("obs", "words"),
    [
        (np.zeros(5), r"shape obs \(5,\).*takes \(4,\) or \(n, 4\)"),
        (np.zeros((2, 3, 4)), r"got float64 of shape \(2, 3, 4\)"),
        (np.array([0, np.nan, 0, 0]), "obs is nan in row 0, column 1"),
        ({"observation": np.zeros(4)}, "is a dict with the keys"),
    ],
)
def test_observations_of_another_kind_are_refused(agent: Noisy, obs: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        agent.act(obs)


# ---------------------------------------------------------------- noise streams


def test_an_episodes_noise_is_its_own(agent: Noisy) -> None:
    agent.reset(seeds=[5, 6, 7])
    batch = agent.row_noise([0, 1, 2], (3,))
    agent.reset(seeds=[7])
    assert torch.equal(agent.row_noise([0], (3,))[0], batch[2])
    agent.reset(seeds=[5, 6, 7])
    assert torch.equal(agent.row_noise([2], (3,))[0], batch[2]), "rows that have ended draw nothing"
    assert not torch.equal(agent.row_noise([2], (3,))[0], batch[2])


def test_a_reset_of_some_rows_leaves_the_others(agent: Noisy) -> None:
    agent.reset(seeds=[5, 6])
    agent.row_noise([0, 1], (3,))
    expected = agent.row_noise([0], (3,))
    agent.reset(seeds=[5, 6])
    first = agent.row_noise([0, 1], (3,))
    agent.reset(mask=[False, True], seeds=[0, 6])
    assert torch.equal(agent.row_noise([0], (3,)), expected)
    assert torch.equal(agent.row_noise([1], (3,))[0], first[1])


def test_without_seeds_every_episode_has_fresh_noise(agent: Noisy) -> None:
    agent.reset()
    first = agent.row_noise([0, 1], (3,))
    agent.reset()
    assert not torch.equal(agent.row_noise([0, 1], (3,)), first) and not torch.equal(first[0], first[1])


# ---------------------------------------------------------------- guard


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(agent: Noisy, bad: float) -> None:
    batch = WindowBatch(*(torch.ones(2) for _ in WindowBatch._fields))
    one = torch.tensor(1.0)
    agent.guard({"loss/a": one}, {"grad_norm/a": one}, batch)
    for losses, norms in (({"loss/a": one, "b": torch.tensor(bad)}, {}), ({"loss/a": one}, {"b": torch.tensor(bad)})):
        with pytest.raises(
            ConfigError, match=rf"Noisy, phase a, .*: b is not finite .loss/a = 1, b = {bad}.*smaller learning rate"
        ):
            agent.guard(losses, norms, batch)


# ---------------------------------------------------------------- checkpoints


def saved(agent: Noisy) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {"state_dict": agent.state_dict(), "hyper_parameters": dict(agent.hparams)}
    agent.on_save_checkpoint(checkpoint)
    return checkpoint


def test_a_checkpoint_builds_what_saved_it(agent: Noisy) -> None:
    checkpoint = saved(agent)
    assert checkpoint["hyper_parameters"] == {"width": 3, "meaning": "x0", "epochs": [2, 0, 3]}
    assert checkpoint[CHECKPOINT_KEY]["method"].endswith("Noisy")
    other = Noisy()
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    assert other.spec == agent.spec and torch.equal(other.net.weight, agent.net.weight)


def limits(*values: float) -> dict[str, Any]:
    return {"kind": "limits", "low": [-v for v in values], "high": list(values)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"obs_dim": 5}, "obs_dim: checkpoint 4, now 5"),
        ({"dataset_ids": ["b", "c"]}, r"dataset_ids: checkpoint \['test/set-v0'\], now \['b', 'c'\]"),
        ({"stride": 4}, "stride: checkpoint 1, now 4"),
        ({"obs_normalizer": {"kind": "gaussian", "mean": [0] * 4, "std": [1] * 4}}, "'limits', now 'gaussian'"),
        ({"obs_normalizer": limits(2, 2, 2, 3)}, "obs_normalizer: its low and high are others"),
        ({"action_normalizer": limits(2, 2.1)}, "action_normalizer: its low and high are others"),
    ],
)
def test_a_checkpoint_of_other_data_is_refused(
    agent: Noisy, spec: DatasetSpec, changes: dict[str, Any], words: str
) -> None:
    other = Noisy()
    other.build(dataclasses.replace(spec, **changes))
    with pytest.raises(ConfigError, match=words):
        other.on_load_checkpoint(saved(agent))


def test_rounding_makes_no_other_data(agent: Noisy, spec: DatasetSpec) -> None:
    other = Noisy()
    other.build(dataclasses.replace(spec, obs_normalizer=limits(2, 2, 2, 2 + 1e-7), ref_max=11.0))
    other.on_load_checkpoint(saved(agent))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 4}, r"net.weight: checkpoint \(3, 4\), now \(4, 4\); net.bias: "),
        ({"meaning": "eps"}, "model.meaning: checkpoint 'x0', now 'eps'"),
    ],
)
def test_a_checkpoint_of_other_networks_is_refused(
    agent: Noisy, spec: DatasetSpec, options: dict[str, Any], words: str
) -> None:
    other = Noisy(**options)
    other.build(spec)
    with pytest.raises(ConfigError, match=words):
        other.on_load_checkpoint(saved(agent))


def test_a_foreign_checkpoint_is_refused(agent: Noisy) -> None:
    with pytest.raises(ConfigError, match="not written by lit_diffrl"):
        agent.on_load_checkpoint({"state_dict": agent.state_dict()})
