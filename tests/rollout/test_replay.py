from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from printed import digits
from torch import Tensor

from lit_diffrl.data.pointmaze import env_spec
from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods.policy_rollouts import ClosedLoop
from lit_diffrl.rollout.model_check import ModelCheck
from lit_diffrl.rollout.model_errors import (
    DATASET,
    START,
    ModelErrors,
    _mean_return,
    closed_loop_errors,
    errors_figure,
    model_errors,
    one_step_errors,
    replayed_errors,
)
from lit_diffrl.rollout.pictures import figure_pixels
from lit_diffrl.rollout.replay import Replay, Simulator, replay

ROBOTS = {"Hopper-v5": (11, 3), "Walker2d-v5": (17, 6), "HalfCheetah-v5": (17, 6)}


def spec_of(
    text: str | None, obs_dim: int, action_dim: int, obs_keys: list[str] | None = None, goal: list[float] | None = None
) -> DatasetSpec:
    return DatasetSpec(
        obs_dim=obs_dim, action_dim=action_dim, action_low=[-1.0] * action_dim, action_high=[1.0] * action_dim,
        dataset_ids=["test/data-v0"], env_spec=text, ref_min=None, ref_max=None, max_episode_steps=None,
        obs_keys=obs_keys, goal_key=None, goal=goal, obs_normalizer={}, action_normalizer={}, reward_max=1.0,
        reward_min=0.0,
    )  # fmt: skip


def simulator_of(env_id: str) -> Simulator:
    return Simulator(spec_of(gym.spec(env_id).to_json(), *ROBOTS[env_id]))


@contextmanager
def recorded(env_id: str, steps: int, seed: int = 0) -> Iterator[tuple[Any, list, list, np.ndarray, np.ndarray]]:
    """Positions, velocities, observations and random actions of an episode that goes on after its end."""
    env: Any = gym.make(env_id).unwrapped
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    qpos, qvel, seen, actions = [env.data.qpos.copy()], [env.data.qvel.copy()], [obs], []
    for _ in range(steps):
        actions.append(rng.uniform(-1, 1, env.action_space.shape))
        seen.append(env.step(actions[-1])[0])
        qpos.append(env.data.qpos.copy())
        qvel.append(env.data.qvel.copy())
    yield env, qpos, qvel, np.array(seen), np.array([*actions, actions[-1]])
    env.close()


def replay_errors(env_id: str, seed: int) -> np.ndarray:
    """Greatest difference ``(61,)`` of observations when positions and velocities are set and 60 actions replayed."""
    with recorded(env_id, 60, seed) as (_, qpos, qvel, seen, actions), simulator_of(env_id) as simulator:
        start = np.concatenate([[0.0], qpos[0][1:]])
        again = simulator.run([simulator.state_at(start, qvel[0])], lambda _, t: actions[None, t], 61)
    assert again.states.shape == (1, 61, ROBOTS[env_id][0]) and again.terminated.shape == (1, 60)
    return np.abs(again.states[0] - seen).max(axis=1)


@pytest.mark.parametrize(("env_id", "printed"), [("Hopper-v5", 1e-14), ("Walker2d-v5", 2e-13)])
def test_recorded_positions_and_velocities_replay_an_episode_wherever_it_took_place(
    env_id: str, printed: float
) -> None:
    """Oracle 22. How rounding adds up depends on the actions, so the printed limits are of a typical episode."""
    errors = [replay_errors(env_id, seed) for seed in range(5)]
    assert np.median([error[-1] for error in errors]) < printed and np.max(errors) < 10 * printed


def test_rounding_grows_in_a_cheetah() -> None:
    """Oracle 22: 2e-15 after one step, 2e-5 after 60, where the actions decide on the power of ten."""
    errors = np.array([replay_errors("HalfCheetah-v5", seed) for seed in range(5)])
    assert errors[:, 1].max() < 2.5e-15
    assert 2e-6 < errors[0, 60] < 2e-4 and errors[:, 60].max() < 1e-2 and errors[:, 60].min() > 1e-10


@pytest.mark.parametrize("env_id", ["Hopper-v5", "HalfCheetah-v5"])
def test_an_observation_tells_the_state_where_no_velocity_is_clipped(env_id: str) -> None:
    with recorded(env_id, 60) as (_, _, _, seen, actions), simulator_of(env_id) as simulator:
        usable = np.flatnonzero(simulator.settable(seen[:-1]))
        pairs = np.repeat(actions[usable, None], 2, axis=1)
        after = replay(simulator, seen[usable], pairs).states[:, 1]
    assert len(usable) == 60
    assert np.abs(after - seen[usable + 1]).max() < 1e-12


def test_a_walkers_clipped_velocities_cannot_be_replayed_and_are_told() -> None:
    """Oracle 22."""
    with recorded("Walker2d-v5", 60) as (_, _, _, seen, actions), simulator_of("Walker2d-v5") as simulator:
        after = replay(simulator, seen[:-1], np.repeat(actions[:-1, None], 2, axis=1)).states[:, 1]
        usable = simulator.settable(seen[:-1])
    error = np.abs(after - seen[1:]).max(axis=1)
    # The first observation, of a robot at rest, is none of the 59 that are printed.
    assert (~usable[1:]).sum() == 46 and len(usable[1:]) == 59 and np.median(error[1:]) == digits("1.7")
    assert error[usable].max() < 1e-12


@pytest.mark.parametrize("frame", ["centered", "d4rl"])
def test_mazes_replay_in_the_coordinates_of_their_observations(frame: str) -> None:
    text = env_spec("umaze", frame=frame).to_json()
    env: Any = gym.make(gym.envs.registration.EnvSpec.from_json(text), disable_env_checker=True).unwrapped
    rng = np.random.default_rng(0)
    seen = [env.reset(seed=3)[0]["observation"]]
    actions = rng.uniform(-1, 1, (60, 2))
    for action in actions[:-1]:
        seen.append(env.step(action)[0]["observation"])
    env.close()
    with Simulator(spec_of(text, 4, 2, ["observation"])) as simulator:
        again = replay(simulator, seen[0][None], actions[None])
        middle = replay(simulator, seen[30][None], actions[None, 30:])
    assert np.abs(again.states[0] - np.array(seen)).max() < 1e-12
    assert np.abs(middle.states[0] - np.array(seen[30:])).max() < 1e-9
    assert not again.terminated.any() and again.counts.all()


def test_rows_do_not_depend_on_each_other_and_a_policy_is_asked_in_the_states_it_reaches() -> None:
    rng = np.random.default_rng(0)

    def policy(obs: np.ndarray, t: int) -> np.ndarray:
        return np.tanh(obs[:, :3] * (t + 1))

    with simulator_of("Hopper-v5") as simulator:
        first = np.array([1.25] + [0.0] * 10) + rng.uniform(-0.01, 0.01, (3, 11))
        states = [simulator.state_of(obs) for obs in first]
        together = simulator.run(states, policy, 20)
        alone = [simulator.run([state], policy, 20) for state in states]
        taken = np.stack([policy(together.states[:, t], t) for t in range(20)], axis=1)
        replayed = replay(simulator, first, taken)
    np.testing.assert_array_equal(together.states, np.concatenate([a.states for a in alone]))
    np.testing.assert_array_equal(together.states, replayed.states)
    np.testing.assert_allclose(together.states[:, 0], first, rtol=0, atol=1e-15)


def test_states_count_up_to_the_terminal_one() -> None:
    terminated = np.array([[0, 0, 0], [0, 1, 0], [1, 0, 1]], dtype=bool)
    counts = Replay(np.zeros((3, 4, 1)), terminated, np.zeros((3, 3))).counts
    assert counts.tolist() == [[True] * 4, [True, True, True, False], [True, True, False, False]]


@pytest.mark.parametrize(
    ("text", "obs_dim", "message"),
    [
        (None, 4, "names no environment"),
        (gym.spec("Pendulum-v1").to_json(), 3, "no MuJoCo robot"),
        (gym.spec("Reacher-v5").to_json(), 10, "cannot be set to an observed state"),
        (gym.spec("Ant-v5").to_json(), 105, "105 numbers are observed"),
    ],
)
def test_environments_that_observations_do_not_determine_are_refused(
    text: str | None, obs_dim: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Simulator(spec_of(text, obs_dim, 2))


# ------------------------------------------------------------------ errors of models


@pytest.fixture(scope="module")
def maze_errors(mazes: Path) -> tuple[ModelErrors, Tensor]:
    """Errors of an exact model and of one that is off by 0.1 t deviations, on windows of the small maze."""
    from lit_diffrl.data import WindowData

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(mazes))
        data = WindowData("lit_diffrl/pointmaze/umaze-v0", horizon=24)
        data.prepare_data()
        data.setup("fit")
    episodes = data.episodes
    assert episodes is not None
    rows = data.starts[24][::200, None] + torch.arange(24)
    obs, scale = episodes.obs[rows], episodes.obs.std(0)
    drift = 0.1 * torch.arange(24)[None, :, None] * scale
    models = {"exact": lambda first, actions: obs, "drifting": lambda first, actions: obs + drift}
    with Simulator(data.spec) as simulator:
        return model_errors(simulator, obs, episodes.action[rows], scale, models), obs


def test_errors_are_squares_of_deviations_at_each_horizon(maze_errors: tuple[ModelErrors, Tensor]) -> None:
    errors, obs = maze_errors
    assert list(errors.mean) == ["exact", "drifting", START, DATASET]
    assert errors.rows.tolist() == [len(obs)] * 24
    np.testing.assert_allclose(errors.mean["drifting"], (0.1 * np.arange(24)) ** 2, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(errors.median["drifting"], (0.1 * np.arange(24)) ** 2, rtol=1e-3, atol=1e-9)
    np.testing.assert_array_equal(errors.mean["exact"], errors.mean[DATASET])
    assert errors.mean[DATASET].max() < 1e-9, "the simulator does not repeat its own data"
    assert errors.mean[START][0] < 1e-12 < 1e-4 < errors.mean[START][5] < errors.mean[START][20]


def test_errors_are_logged_at_the_horizons_that_were_reached(maze_errors: tuple[ModelErrors, Tensor]) -> None:
    logged = maze_errors[0].at()
    assert logged["drifting_10"] == pytest.approx(1.0, rel=1e-3)
    assert {name for name in logged if name.startswith("first_state")} == {f"first_state_{t}" for t in (1, 5, 10, 20)}


def test_the_figure_shows_every_curve(maze_errors: tuple[ModelErrors, Tensor]) -> None:
    figure = errors_figure(maze_errors[0], "small maze")
    legend = figure.axes[0].get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["exact (below)", "drifting", START, f"{DATASET} (below)"]
    assert figure_pixels(figure, dpi=40).std() > 5


@pytest.mark.parametrize(
    ("first", "rest", "recorded", "floor"),
    [
        (0.01, 0.1, 0.05, 0.008),  # all of it
        (1e-4, 0.1, 0.05, 0.04),  # the first step, a thousandth of the others, is out
        (0.0, 0.1, 1e-9, 0.08),  # and what is none at all
        (1e-5, 1e-5, 1e-9, 0.8e-5),  # models that are as good as that are shown
        (1e-9, 1e-9, 1e-9, 0.24),  # but not those that cannot be told from the truth
    ],
)
def test_the_figure_begins_at_errors_that_are_some(first: float, rest: float, recorded: float, floor: float) -> None:
    curves = {"model": np.full(20, rest), START: np.full(20, 0.3), DATASET: np.full(20, recorded)}
    curves["model"][:2] = 0.0, first
    errors = ModelErrors(curves, curves, np.full(20, 4))
    axis = errors_figure(errors, "model").axes[0]
    assert axis.get_ylim()[0] == pytest.approx(floor) and axis.get_yscale() == "log"
    labels = {text.get_text() for text in axis.get_legend().get_texts()}  # type: ignore[union-attr]
    assert (f"{DATASET} (below)" in labels) == (recorded < floor) and ("model (below)" in labels) == (rest < floor)
    nothing = {name: np.zeros(20) for name in curves}
    assert errors_figure(ModelErrors(nothing, nothing, errors.rows), "exact").axes[0].get_ylim()[0] > 0


def test_states_after_the_true_end_and_clipped_starts_do_not_count() -> None:
    obs = torch.zeros(3, 30, 11)
    obs[:, :, 0] = 1.25
    obs[1, 0, 2] = 0.5  # bent: falls in another way
    obs[2, 0, 7] = 10.0  # a clipped velocity
    actions = torch.ones(3, 30, 3)
    with simulator_of("Hopper-v5") as simulator:
        errors = model_errors(
            simulator, obs, actions, torch.ones(11), {"none": lambda first, a: torch.zeros(2, 30, 11)}
        )
        truth = replay(simulator, obs[:2, 0].double().numpy(), actions[:2].double().numpy())
        with pytest.raises(ConfigError, match="none of 1 first states"):
            model_errors(simulator, obs[2:], actions[2:], torch.ones(11), {})
    ends = truth.terminated.argmax(axis=1) + 1
    assert truth.terminated.any(axis=1).all(), "the robots should fall"
    assert errors.rows.tolist() == [(ends >= t).sum() for t in range(30)]
    last = int(ends.max())
    assert np.isfinite(errors.mean["none"][: last + 1]).all() and np.isnan(errors.mean["none"][last + 1 :]).all()
    assert all(int(name.rpartition("_")[2]) <= last for name in errors.at())
    figure_pixels(errors_figure(errors, "hopper"), dpi=40)


def test_a_policys_rollouts_are_compared_with_its_own_in_the_simulator() -> None:
    """The policy pushes a ball against its velocity: the exact rollout has no error, that of open-loop actions has."""
    text = env_spec("umaze").to_json()
    first = torch.tensor([[-1.0, 1.0, 1.0, 0.0], [0.5, 1.0, -2.0, 0.1]])

    def policy(obs: Tensor) -> Tensor:
        return -obs[:, 2:].tanh()

    with Simulator(spec_of(text, 4, 2, ["observation"])) as simulator:
        states = [simulator.state_of(row) for row in first.double().numpy()]
        truth = simulator.run(states, lambda obs, t: policy(torch.from_numpy(obs).float()).numpy(), 15).states
        free = replay(simulator, first.double().numpy(), np.zeros((2, 15, 2))).states
        still = torch.zeros(2, 15, 2)
        rollouts = {"exact": (torch.from_numpy(truth), still), "open loop": (torch.from_numpy(free), still)}
        errors = closed_loop_errors(simulator, rollouts, policy, torch.ones(4), lambda x: x[..., 0] > truth[1, 3, 0])
    assert list(errors.mean) == ["exact", "open loop", START] and errors.returns == {}
    assert errors.mean["exact"].max() == 0 < errors.mean["open loop"][1] < errors.mean["open loop"][14]
    share = (truth[:, 1:, 0] > truth[1, 3, 0]).any(axis=1).mean()
    assert share > 0 and list(errors.ended) == ["simulator", "exact", "open loop"]
    assert errors.ended["simulator"] == {"all": 0, "of those that end": None, "of the others": 0}, "a maze goes on"
    assert errors.ended["exact"] == {"all": share, "of those that end": None, "of the others": share}


def test_ends_and_returns_in_models_stand_beside_those_in_the_simulator() -> None:
    """A reward model that knows the simulator's rewards errs by its states alone, and counts steps up to the end."""
    first = torch.zeros(3, 11)
    first[:, 0], first[2, 1] = 1.25, 0.16  # the last leans nearly too far, and on
    first[2, 7] = 2.0

    def fallen(x: Tensor) -> Tensor:
        return (x[..., 0] <= 0.7) | (x[..., 1].abs() >= 0.2)

    def policy(obs: Tensor) -> Tensor:
        return 0.1 * obs[:, 5:8].tanh()

    def in_states(x: Tensor) -> Tensor:
        return policy(x.float().flatten(0, 1)).unflatten(0, x.shape[:2])

    with simulator_of("Hopper-v5") as simulator:
        states = [simulator.state_of(row) for row in first.double().numpy()]
        truth = simulator.run(states, lambda obs, t: policy(torch.from_numpy(obs).float()), 8)
        exact = torch.from_numpy(truth.states)
        known = {tuple(x.tolist()): r for x, r in zip(exact[:, :-1].float().flatten(0, 1), truth.rewards.flatten())}

        def reward(x: Tensor, actions: Tensor) -> Tensor:
            assert x.shape[:2] == (3, 7)
            torch.testing.assert_close(actions, in_states(x))
            found = [known.get(tuple(row), 100.0) for row in x.float().flatten(0, 1).tolist()]
            return torch.tensor(found).view(3, 7)

        blind = first[:, None].expand(-1, 8, -1) + 0.001
        fearful = torch.where(torch.arange(8)[None, :, None] > 4, 0.0, blind)
        models = {name: (x, in_states(x)) for name, x in [("exact", exact), ("blind", blind), ("fearful", fearful)]}
        errors = closed_loop_errors(simulator, models, policy, torch.ones(11), fallen, reward)
    third = pytest.approx(1 / 3)
    assert errors.ended["simulator"] == {"all": third, "of those that end": 1, "of the others": 0}
    assert errors.ended["exact"] == errors.ended["simulator"]
    assert errors.ended["blind"] == {"all": 0, "of those that end": 0, "of the others": 0}
    assert errors.ended["fearful"] == {"all": 1, "of those that end": 1, "of the others": 1}
    last = int(truth.terminated[2].argmax())
    assert 0 < last < 6
    true = (truth.rewards[:2].sum() + truth.rewards[2, : last + 1].sum()) / 3
    assert list(errors.returns) == ["simulator", "simulator, predicted rewards", "exact", "blind", "fearful"]
    assert list(errors.returns.values()) == pytest.approx([true, true, true, 700, 500], rel=1e-5)


@pytest.mark.parametrize("env_id", list(ROBOTS))
def test_rewards_are_those_of_ordinary_steps(env_id: str) -> None:
    with recorded(env_id, 20) as (env, qpos, qvel, _, actions), simulator_of(env_id) as simulator:
        env.reset(seed=0)
        rewards = [env.step(action)[1] for action in actions[:20]]
        again = simulator.run([simulator.state_at(qpos[0], qvel[0])], lambda _, t: actions[None, t], 21)
    assert simulator.knows_rewards and np.std(rewards) > 0.01
    np.testing.assert_allclose(again.rewards[0], rewards, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frame", ["centered", "d4rl"])
def test_rewards_in_a_maze_are_those_of_the_datas_goal(frame: str) -> None:
    """The environment would draw other goals; one ball at the goal does not move it away from the next."""
    text = env_spec("umaze", goal="random", frame=frame).to_json()
    made = gym.make(EnvSpec.from_json(text)).unwrapped
    at, far = made.cell_position((1, 1)), made.cell_position((3, 3))
    made.close()
    obs = torch.tensor([[*at, 0, 0], [*far, 0, 0], [*at, 0, 0]]).double().numpy()
    with Simulator(spec_of(text, 4, 2, ["observation"], list(at))) as simulator:
        assert simulator.knows_rewards
        assert replay(simulator, obs, np.zeros((3, 3, 2))).rewards.tolist() == [[1, 1], [0, 0], [1, 1]]
    with Simulator(spec_of(text, 4, 2, ["observation"])) as simulator:
        assert not simulator.knows_rewards


@pytest.mark.parametrize(
    ("tuning", "goal", "compared"),
    [("none", [1.0, 1.0], True), ("standardise", [1.0, 1.0], False), ("none", None, False)],
)
def test_returns_are_compared_where_rewards_are_the_simulators(
    tuning: str, goal: list[float] | None, compared: bool
) -> None:
    starts = torch.tensor([[-1.0, 1.0, 0.0, 0.0], [0.5, 1.0, 0.0, 0.0]])
    loop = ClosedLoop(
        policy=lambda obs: torch.zeros(len(obs), 2),
        roll_out=lambda first: {"still": (first[:, None].repeat(1, 4, 1), torch.zeros(len(first), 4, 2))},
        reward=lambda x, actions: torch.full(x.shape[:2], 2.0),
    )
    data = SimpleNamespace(
        spread_states=lambda n: starts[:n], deviations=lambda: torch.ones(4), require_windows=lambda: 4,
        hparams={"reward": tuning},
    )  # fmt: skip
    method = SimpleNamespace(
        spec=spec_of(env_spec("umaze").to_json(), 4, 2, ["observation"], goal),
        closed_loop=lambda horizon: loop, rule=lambda x: torch.zeros(x.shape[:-1], dtype=torch.bool),
    )  # fmt: skip
    found: Any = ModelCheck(2)._measure_rollouts(SimpleNamespace(datamodule=data), method)  # type: ignore[arg-type]
    expected = {"simulator": 0.0, "simulator, predicted rewards": 6.0, "still": 6.0}
    assert found["rollouts"].returns == (expected if compared else {})


def test_what_comes_after_the_end_does_not_count() -> None:
    ends = np.array([[False, True, False], [False, False, False]])
    assert _mean_return(np.array([[1.0, 2.0, np.nan], [1.0, 1.0, 1.0]]), ends) == 3


def test_steps_are_compared_from_where_the_rollout_is() -> None:
    """One wrong step in the middle is one wrong step; compared with the true rollout, all that follow are wrong."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (2, 12, 2))
    start = np.array([[-1.0, 1.0, 1.0, 0.0], [0.5, 1.0, -2.0, 0.1]])
    with Simulator(spec_of(env_spec("umaze").to_json(), 4, 2, ["observation"])) as simulator:
        before = replay(simulator, start, actions).states
        jump = before[:, 5] + np.array([0.0, 0.0, 0.3, 0.0])
        after = replay(simulator, jump, actions[:, 5:]).states
        states = torch.from_numpy(np.concatenate([before[:, :5], after], axis=1))
        rollouts = {"a": (states, torch.from_numpy(actions))}
        errors = one_step_errors(simulator, rollouts, torch.tensor([1, 1, 0.1, 1.0]), lambda x: x[..., 0] > 100)
    assert errors.rows.tolist() == [2] * 12
    # A velocity moves within the step too; of a solver's warm start a restored state knows nothing.
    assert errors.mean["a"][5] == pytest.approx(3.0**2 / 4, rel=1e-6)
    assert np.delete(errors.mean["a"], [0, 5]).max() < 1e-9


def test_rollouts_are_compared_with_what_their_own_actions_do() -> None:
    """States of other actions than those beside them are wrong from the first that differs on."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (2, 12, 2))
    start = np.array([[-1.0, 1.0, 1.0, 0.0], [0.5, 1.0, -2.0, 0.1]])
    with Simulator(spec_of(env_spec("umaze").to_json(), 4, 2, ["observation"])) as simulator:
        states = torch.from_numpy(replay(simulator, start, actions).states)
        others = torch.from_numpy(actions).clone()
        others[:, 5] *= -1
        rollouts = {"own": (states, torch.from_numpy(actions)), "others": (states, others)}
        errors = replayed_errors(simulator, rollouts, torch.ones(4), lambda x: x[..., 0] > 100)
        level = states[0, 8, 0]
        cut = replayed_errors(simulator, rollouts, torch.ones(4), lambda x: x[..., 0] == level)
    assert cut.rows.tolist() == [2] * 9 + [1] * 3, "a row ends with the state that is terminal"
    assert errors.mean["own"].max() < 1e-12
    assert errors.mean["others"][:6].max() < 1e-12 < errors.mean["others"][6:].min()


def test_steps_after_a_predicted_end_and_from_clipped_states_do_not_count() -> None:
    states, actions = torch.zeros(2, 30, 11), torch.ones(2, 30, 3)
    states[:, :, 0] = 1.25
    with simulator_of("Hopper-v5") as simulator:
        truth = replay(simulator, states[:, 0].double().numpy(), actions.double().numpy())
        states = torch.from_numpy(truth.states)
        states[1, 3, 7] = 10.0
        states[0, 6, 0] = 0.5  # predicted to have fallen, earlier than it would
        errors = one_step_errors(simulator, {"a": (states, actions)}, torch.ones(11), lambda x: x[..., 0] <= 0.6)
    assert truth.terminated[:, 6:].any() and (states[1, :, 0] > 0.6).sum() > 20, "the other goes on after its fall"
    counts = ~(states[..., 5:].abs() >= 10).any(-1)
    counts[0, 6:], counts[1, int((states[1, :, 0] <= 0.6).int().argmax()) or 30 :] = False, False
    assert not counts[1, 3] and errors.rows.tolist() == [2, *counts[:, :29].sum(0).tolist()]
