"""The maze environments, the controller and the datasets collected with it."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

import lit_diffrl
from lit_diffrl.data import pointmaze
from lit_diffrl.data.maze_env import D4RL_OFFSET, GOAL_CELLS, MAPS, PointMaze
from lit_diffrl.data.pointmaze import DATASETS, WaypointController, collect, env_spec, wall_boxes
from lit_diffrl.errors import ConfigError, DataError

UMAZE = "lit_diffrl/pointmaze/umaze-v0"
SIZES = tuple(GOAL_CELLS)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(pointmaze, "REFERENCE_EPISODES", 5)
    return tmp_path


def play(env: PointMaze, steps: int, seed: int) -> float:
    controller = WaypointController(env)
    obs, _ = env.reset(seed=seed)
    total = 0.0
    for _ in range(steps):
        obs, reward, *_ = env.step(controller.act(obs["observation"], obs["desired_goal"]))
        total += reward
    return total


# The environment


@pytest.mark.parametrize("size", SIZES)
def test_fixed_goal_is_the_middle_of_its_free_cell(size):
    env = PointMaze(size)
    assert GOAL_CELLS[size] in env.free_cells
    for seed in range(5):
        obs, _ = env.reset(seed=seed)
        np.testing.assert_array_equal(obs["desired_goal"], env.maze.cell_rowcol_to_xy(np.array(GOAL_CELLS[size])))
    for _ in range(3):
        obs, *_ = env.step(np.ones(2))
        np.testing.assert_array_equal(obs["desired_goal"], env.goal)


@pytest.mark.parametrize("size", SIZES)
def test_starts_cover_every_free_cell_evenly_with_little_noise(size):
    env = PointMaze(size)
    env.reset(seed=0)
    starts = np.array([env.reset()[0]["observation"] for _ in range(60 * len(env.free_cells))])
    centres = np.array([env.cell_position(cell) for cell in env.free_cells])
    offsets = starts[:, None, :2] - centres
    nearest = np.abs(offsets).max(-1).argmin(1)
    counts = np.bincount(nearest, minlength=len(centres))
    assert counts.min() > 25 and counts.max() < 110  # 60 each on average, deviation 7.7
    noise = offsets[np.arange(len(starts)), nearest]
    assert 0.09 < np.abs(noise).max() <= 0.1
    assert np.std(starts[:, 2:]) == pytest.approx(0.1, rel=0.1)


def test_seed_decides_the_episode():
    first, second = PointMaze("medium", goal="random"), PointMaze("medium", goal="random")
    second.reset(seed=3)
    for _ in range(3):  # the first reset from the seed, the others from where the generator stands
        a, b = first.reset(seed=7)[0], second.reset(seed=7)[0]
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
        np.testing.assert_array_equal(first.reset()[0]["observation"], second.reset()[0]["observation"])
    assert not np.array_equal(first.reset(seed=8)[0]["observation"], a["observation"])


def test_random_goals_are_drawn_from_all_cells():
    env = PointMaze("umaze", goal="random")
    goals = np.array([env.reset(seed=seed)[0]["desired_goal"] for seed in range(100)])
    cells = {tuple(env.maze.cell_xy_to_rowcol(goal)) for goal in goals}
    assert cells == set(env.free_cells)
    assert len(np.unique(goals, axis=0)) == 100


def test_chosen_cells_are_used_and_walls_refused():
    env = PointMaze("large")
    obs, info = env.reset(seed=0, options={"goal_cell": (1, 1), "reset_cell": (1, 1)})
    assert info["success"]
    np.testing.assert_allclose(obs["desired_goal"], env.cell_position((1, 1)), atol=0.1)
    with pytest.raises(ConfigError, match=r"reset_cell must be a free cell.*got \(0, 0\)"):
        env.reset(options={"reset_cell": (0, 0)})


def test_rewards_are_paid_within_the_radius_and_the_episode_goes_on():
    env = PointMaze("umaze")
    env.reset(seed=0)
    for distance, expected in ((0.44, 1.0), (0.46, 0.0)):
        env.point_env.set_state(env.goal + np.array([distance, 0.0]), np.zeros(2))
        _, reward, terminated, truncated, info = env.step(np.zeros(2))
        assert reward == expected and info["success"] == bool(expected)
        assert not terminated and not truncated
    dense = PointMaze("umaze", reward_type="dense")
    obs, _ = dense.reset(seed=0)
    obs, reward, *_ = dense.step(np.zeros(2))
    assert reward == pytest.approx(np.exp(-np.linalg.norm(obs["achieved_goal"] - obs["desired_goal"])))


@pytest.mark.parametrize("size", SIZES)
def test_d4rl_frame_is_the_same_physics_seen_turned(size):
    centered, turned = PointMaze(size), PointMaze(size, frame="d4rl")
    a, _ = centered.reset(seed=0)
    turned.reset(seed=0)
    turned.point_env.set_state(centered.data.qpos.copy(), centered.data.qvel.copy())
    rng = np.random.default_rng(0)
    for _ in range(300):
        action = rng.uniform(-1, 1, size=2) + 0.5
        a, *_ = centered.step(action)
        b, *_ = turned.step(np.array([-action[1], action[0]]))  # x runs down the rows, y along the columns
        np.testing.assert_allclose(turned.data.qpos, centered.data.qpos, atol=1e-9)
        position, velocity = a["observation"][:2], a["observation"][2:]
        row = centered.maze.y_map_center - 0.5 - position[1] - D4RL_OFFSET
        column = position[0] + centered.maze.x_map_center - 0.5 - D4RL_OFFSET
        np.testing.assert_allclose(b["observation"][:2], [row, column], atol=1e-9)
        np.testing.assert_allclose(b["observation"][2:], [-velocity[1], velocity[0]], atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_d4rl_goals_and_starts_lie_about_the_integers(size):
    env = PointMaze(size, frame="d4rl")
    np.testing.assert_array_equal(env.reset(seed=0)[0]["desired_goal"], GOAL_CELLS[size])
    for seed in range(30):
        start = env.reset(seed=seed)[0]["observation"][:2]
        assert tuple(np.rint(start).astype(int)) in env.free_cells
        assert np.abs(start - np.rint(start)).max() <= 0.1
    target = env.point_env.model.site_pos[env.target_site_id, :2]
    np.testing.assert_allclose(env.rotation @ target + env.translation, env.goal)


def test_spec_survives_json_and_needs_no_registration():
    spec = EnvSpec.from_json(env_spec("medium", reward_type="dense", goal="random", frame="d4rl").to_json())
    env = gym.make(spec)
    assert isinstance(env.unwrapped, PointMaze)
    env.reset(seed=0)
    steps, truncated = 0, False
    while not truncated:
        _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        steps += 1
        assert 0 < reward <= 1 and not terminated
    assert steps == 600
    copy = pickle.loads(pickle.dumps(env.unwrapped))
    np.testing.assert_array_equal(copy.reset(seed=1)[0]["observation"], env.reset(seed=1)[0]["observation"])


def test_no_file_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    PointMaze("large")
    assert list(tmp_path.iterdir()) == [] and tempfile.tempdir == str(tmp_path)


@pytest.mark.parametrize("argument", ["size", "reward_type", "goal", "frame"])
def test_unknown_words_are_refused(argument):
    with pytest.raises(ConfigError, match=f"{argument} must be one of"):
        PointMaze(**{argument: "humaze"})


@pytest.mark.parametrize("frame", ["centered", "d4rl"])
@pytest.mark.parametrize("size", SIZES)
def test_wall_boxes_are_the_cells_that_hold_no_start(size, frame):
    env = gym.make(env_spec(size, frame=frame))
    boxes = np.array(wall_boxes(env))
    assert len(boxes) == sum(content == 1 for row in MAPS[size] for content in row)
    np.testing.assert_array_equal(boxes[:, 2:], 1.0)
    for seed in range(40):
        x, y = env.reset(seed=seed)[0]["observation"][:2]
        inside = (boxes[:, 0] < x) & (x < boxes[:, 0] + 1) & (boxes[:, 1] < y) & (y < boxes[:, 1] + 1)
        assert not inside.any()
    # The ball pushed down a column stops at a wall, a radius (0.1) away from it.
    obs = env.reset(seed=0)[0]
    for _ in range(200):
        obs, *_ = env.step(np.array([0.0, -1.0], dtype=np.float32))
    x, y = obs["observation"][:2]
    below = boxes[(boxes[:, 0] < x) & (x < boxes[:, 0] + 1) & (boxes[:, 1] < y)]
    assert y - (below[:, 1] + 1).max() == pytest.approx(0.1, abs=0.02)


# The controller


@pytest.mark.parametrize("frame", ["centered", "d4rl"])
@pytest.mark.parametrize(("size", "at_least"), [("umaze", 215), ("medium", 440), ("large", 560)])
def test_controller_is_fast_from_anywhere_and_rests_at_the_goal(size, at_least, frame):
    env = PointMaze(size, frame=frame)
    returns = [play(env, pointmaze.MAX_EPISODE_STEPS[size], seed) for seed in range(20)]
    assert np.mean(returns) > at_least and min(returns) > 0.4 * pointmaze.MAX_EPISODE_STEPS[size]
    assert np.abs(env.data.qvel).max() < 1e-3
    np.testing.assert_allclose(env.rotation @ env.data.qpos + env.translation, env.goal, atol=1e-3)


def test_controller_beats_random_actions_by_far():
    env = PointMaze("umaze")
    rng = np.random.default_rng(0)
    returns = []
    for seed in range(20):
        env.reset(seed=seed)
        returns.append(sum(env.step(rng.uniform(-1, 1, size=2))[1] for _ in range(300)))
    assert np.mean([play(env, 300, seed) for seed in range(20)]) > np.mean(returns) + 120


def test_controller_names_a_goal_in_a_wall():
    controller = WaypointController(PointMaze("umaze"))
    with pytest.raises(ConfigError, match=r"to cell \(0, 0\)"):
        controller.act(np.array([-1.0, 1.0, 0.0, 0.0]), np.array([-2.0, 2.0]))


# Datasets


def gather(dataset: minari.MinariDataset) -> dict[str, np.ndarray]:
    episodes = list(dataset.iterate_episodes())
    return {
        "obs": np.concatenate([e.observations["observation"][:-1] for e in episodes]),
        "next_position": np.concatenate([e.observations["achieved_goal"][1:] for e in episodes]),
        "goal": np.concatenate([e.observations["desired_goal"][1:] for e in episodes]),
        "action": np.concatenate([e.actions for e in episodes]),
        "reward": np.concatenate([e.rewards for e in episodes]),
    }


def test_collected_dataset_is_one_walk_of_true_transitions(root, monkeypatch):
    monkeypatch.setattr(pointmaze, "STRETCH", 1000)
    collect(UMAZE, steps=2500, progress=False)
    dataset = minari.load_dataset(UMAZE)
    assert dataset.total_steps == 2500 and dataset.total_episodes == 3
    assert list(minari.list_local_datasets()) == [UMAZE]
    episodes = list(dataset.iterate_episodes())
    for episode in episodes:
        steps = len(episode.rewards)
        assert all(len(rows) == steps + 1 for rows in episode.observations.values())
        assert len(episode.actions) == steps and episode.actions.dtype == np.float32
        assert not episode.terminations.any()
        np.testing.assert_array_equal(np.flatnonzero(episode.truncations), [steps - 1])
    for before, after in itertools.pairwise(episodes):
        for key in before.observations:
            np.testing.assert_array_equal(before.observations[key][-1], after.observations[key][0])

    data = gather(dataset)
    distance = np.linalg.norm(data["next_position"] - data["goal"], axis=1)
    np.testing.assert_array_equal(data["reward"], (distance <= 0.45).astype(float))
    env = dataset.recover_environment().unwrapped
    for t in range(0, 2499, 97):  # the stored action leads from one stored state to the next
        env.reset(seed=0)
        env.point_env.set_state(data["obs"][t, :2], data["obs"][t, 2:])
        obs, *_ = env.step(data["action"][t])
        np.testing.assert_allclose(obs["observation"], data["obs"][t + 1], atol=1e-6)


def test_walk_visits_all_cells_at_speed_and_rests(root):
    collect(UMAZE, steps=6000, progress=False)
    data = gather(minari.load_dataset(UMAZE))
    env = PointMaze("umaze")
    cells, counts = np.unique([env.maze.cell_xy_to_rowcol(p) for p in data["obs"][:, :2]], axis=0, return_counts=True)
    assert {tuple(cell) for cell in cells} == set(env.free_cells) and counts.min() > 100
    speed = np.linalg.norm(data["obs"][:, 2:], axis=1)
    assert np.quantile(speed, 0.9) > 4.5
    still = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], speed < 0.3, [0]]))))[::2]
    assert (still >= 5).sum() > 10 and still.max() > 40
    assert 0.1 < (speed < 0.3).mean() < 0.4


def test_collection_repeats_exactly_and_depends_on_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(pointmaze, "REFERENCE_EPISODES", 1)
    walks = []
    for name, seed in (("a", None), ("b", 0), ("c", 1)):
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / name))
        collect(UMAZE, steps=1500, seed=seed, progress=False)
        walks.append(gather(minari.load_dataset(UMAZE)))
    for key, values in walks[0].items():
        np.testing.assert_array_equal(values, walks[1][key])
    assert not np.array_equal(walks[0]["obs"], walks[2]["obs"])


def test_variants_share_the_walk(root):
    data, eval_specs = {}, {}
    for variant in ("", "-dense", "-multi"):
        name = f"lit_diffrl/pointmaze/umaze{variant}-v0"
        assert name in DATASETS
        collect(name, steps=1200, progress=False)
        dataset = minari.load_dataset(name)
        data[variant] = gather(dataset)
        env = dataset.recover_environment(eval_env=True)
        assert env.spec.max_episode_steps == 300
        eval_specs[variant] = env.spec.kwargs
        metadata = dataset.storage.metadata
        assert metadata["ref_max_score"] > metadata["ref_min_score"] + 50
        assert float(minari.get_normalized_score(dataset, metadata["ref_max_score"])) == 1.0
    assert [eval_specs[v]["goal"] for v in data] == ["fixed", "fixed", "random"]
    assert [eval_specs[v]["reward_type"] for v in data] == ["sparse", "dense", "sparse"]
    for variant in ("-dense", "-multi"):
        np.testing.assert_array_equal(data[variant]["obs"], data[""]["obs"])
    np.testing.assert_array_equal(data["-multi"]["reward"], data[""]["reward"])
    distance = np.linalg.norm(data["-dense"]["next_position"] - data["-dense"]["goal"], axis=1)
    np.testing.assert_allclose(data["-dense"]["reward"], np.exp(-distance))


def test_second_call_keeps_the_data_and_refuses_another_walk(root):
    collect(UMAZE, steps=500, progress=False)
    file = root / UMAZE / "data" / "main_data.hdf5"
    before = file.stat().st_mtime_ns
    collect(UMAZE, progress=False)
    collect(UMAZE, steps=500, seed=0, progress=False)
    assert file.stat().st_mtime_ns == before
    with pytest.raises(DataError, match="with steps=500, asked for steps=600"):
        collect(UMAZE, steps=600, progress=False)
    with pytest.raises(DataError, match="with seed=0, asked for seed=4"):
        collect(UMAZE, seed=4, progress=False)


@pytest.mark.parametrize("moment", ["_walk", "_mean_return", "minari_root"])
def test_interrupted_collection_leaves_nothing_and_can_be_repeated(root, monkeypatch, moment):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pointmaze, moment, interrupt)
        with pytest.raises(KeyboardInterrupt):
            collect(UMAZE, steps=500, progress=False)
    assert os.environ["MINARI_DATASETS_PATH"] == str(root)
    assert minari.list_local_datasets() == {} and not list(root.rglob("*.hdf5"))
    collect(UMAZE, steps=500, progress=False)
    assert list(minari.list_local_datasets()) == [UMAZE]


def test_killed_collection_is_hidden_and_swept_away(root):
    # What a process killed while writing leaves: a dataset in the hidden folder, without its last rows.
    hidden = root / "lit_diffrl" / "pointmaze" / ".umaze-v0.partial" / UMAZE / "data"
    hidden.mkdir(parents=True)
    (hidden / "metadata.json").write_text(json.dumps({"dataset_id": UMAZE}))
    assert minari.list_local_datasets() == {}
    with pytest.raises(FileNotFoundError):
        minari.load_dataset(UMAZE)
    collect(UMAZE, steps=500, progress=False)
    assert minari.load_dataset(UMAZE).total_steps == 500 and not hidden.exists()


def test_processes_that_collect_together_both_find_the_whole_dataset(root):
    script = (
        "import minari; from lit_diffrl.data import pointmaze; pointmaze.REFERENCE_EPISODES = 5\n"
        f"pointmaze.collect({UMAZE!r}, steps=3000); print(minari.load_dataset({UMAZE!r}).total_steps)"
    )
    search = os.pathsep.join([str(Path(lit_diffrl.__path__[0]).parent), os.environ.get("PYTHONPATH", "")])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": search},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for worker in workers:
        out, errors = worker.communicate(timeout=120)
        assert out.split()[-1:] == ["3000"], errors
    assert list(minari.list_local_datasets()) == [UMAZE]


def test_unknown_dataset_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'lit_diffrl/pointmaze/umaze-v0'"):
        collect("lit_diffrl/pointmaze/umaze-v1")
    with pytest.raises(ConfigError, match="steps must be in"):
        collect(UMAZE, steps=0)
