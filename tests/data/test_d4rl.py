"""D4RL files: splitting, names, and refusing what is not plain numbers."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from lit_diffrl.data.d4rl import TASKS, load_d4rl, split_flat, task_name
from lit_diffrl.data.sources import load_source
from lit_diffrl.errors import ConfigError, DataError
from lit_diffrl.rollout.environments import check_env


def arrays(steps: int = 30, obs_dim: int = 11, action_dim: int = 3, **changes: Any) -> dict[str, Any]:
    """Observations count the rows, so that it shows where each came from."""
    content: dict[str, Any] = {
        "observations": np.arange(steps, dtype=np.float32)[:, None] + np.zeros((1, obs_dim), dtype=np.float32),
        "actions": np.full((steps, action_dim), 0.5, dtype=np.float32),
        "rewards": np.arange(steps, dtype=np.float32),
        "terminals": np.zeros(steps, dtype=bool),
        "timeouts": np.zeros(steps, dtype=bool),
    }
    return {**content, **changes}


def flags(steps: int, *rows: int) -> np.ndarray:
    return np.isin(np.arange(steps), rows)


def write(path: Path, content: dict[str, Any]) -> str:
    with h5py.File(path, "w") as file:
        for key, value in content.items():
            if value is not None:
                file[key] = value
    return str(path)


@pytest.fixture
def hopper(tmp_path):
    def make(**changes: Any) -> str:
        return write(tmp_path / "hopper_medium-v2.hdf5", arrays(**changes))

    return make


def test_episodes_end_at_terminals_and_timeouts_and_the_rest_is_dropped(hopper):
    path = hopper(terminals=flags(30, 4, 19), timeouts=flags(30, 9, 19))
    episodes, info = load_d4rl(path)
    assert episodes.lengths.tolist() == [5, 5, 10], "steps 20 to 29 belong to no episode that ends"
    assert episodes.terminated.nonzero().flatten().tolist() == [4, 19], "terminal and timeout is terminal"
    assert episodes.truncated.nonzero().flatten().tolist() == [9]
    assert episodes.obs.dtype == torch.float32 and info.dataset_ids == ["hopper_medium-v2.hdf5"]


def test_without_next_observations_they_follow_within_the_episode(hopper):
    episodes, _ = load_d4rl(hopper(terminals=flags(30, 4), timeouts=flags(30, 9)))
    assert episodes.next_obs[:, 0].tolist() == [1, 2, 3, 4, 4, 6, 7, 8, 9, 9]


def test_recorded_next_observations_are_used(hopper):
    given = np.arange(30, dtype=np.float32)[:, None] + np.full((1, 11), 100, dtype=np.float32)
    episodes, _ = load_d4rl(hopper(terminals=flags(30, 4), timeouts=flags(30, 9), next_observations=given))
    assert torch.equal(episodes.next_obs, torch.from_numpy(given[:10]))


@pytest.mark.parametrize(
    ("terminals", "max_steps", "starts", "steps"),
    [
        ((), 10, [0, 10, 20], 30),
        ((), 12, [0, 12], 24),
        ((4, 29), 10, [0, 5, 15, 25], 30),
        ((9,), 10, [0, 10, 20], 30),
        ((4,), 10, [0, 5, 15], 25),
    ],
)
def test_without_timeouts_episodes_are_cut_at_the_time_limit(terminals, max_steps, starts, steps):
    found, used = split_flat("file", flags(30, *terminals), None, max_steps)
    assert (found.tolist(), used) == (starts, steps)
    if not terminals:  # recorded, but never set
        found, used = split_flat("file", flags(30), flags(30), max_steps)
        assert (found.tolist(), used) == (starts, steps)


def test_a_cut_at_the_time_limit_is_no_terminal(tmp_path):
    content = arrays(650, 4, 2, timeouts=None, terminals=flags(650, 99))
    episodes, _ = load_d4rl(write(tmp_path / "maze2d-umaze-sparse-v1.hdf5", content))
    assert episodes.lengths.tolist() == [100, 300]
    assert episodes.terminated.nonzero().flatten().tolist() == [99]
    assert episodes.truncated.nonzero().flatten().tolist() == [399]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("hopper_medium-v2", "hopper"),
        ("halfcheetah_medium_expert-v2", "halfcheetah"),
        ("walker2d_full_replay-v2", "walker2d"),
        ("walker_mixed", "walker2d"),
        ("ant_random-v2", "ant"),
        ("maze2d-umaze-sparse-v1", "maze2d-umaze"),
        ("maze2d-large-dense-v1", "maze2d-large-dense"),
        ("maze2d-medium", "maze2d-medium"),
        ("Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed", "antmaze-large"),
        ("pen-v0_demos_clipped", "pen"),
        ("mini_kitchen_microwave_kettle_light_slider-v0", "kitchen"),
        ("bullet-hopper_medium", None),
        ("maze2d-eval-umaze-sparse-v1", None),
        ("antelope", None),
    ],
)
def test_tasks_are_found_by_name(name, task):
    assert task_name(name) == task


def test_environment_and_reference_returns_follow_from_the_name(hopper):
    _, info = load_d4rl(hopper(timeouts=flags(30, 29)))
    assert (info.ref_min, info.ref_max, info.max_episode_steps) == (-20.272305, 3234.3, 1000)
    assert info.env_spec is not None and json.loads(info.env_spec)["id"] == "Hopper-v4"
    assert info.action_low == [-1.0] * 3 and info.obs_keys is None and info.goal is None


def test_mazes_have_their_fixed_goal_and_environment(tmp_path):
    content = arrays(30, 4, 2, timeouts=flags(30, 29))
    content["infos/goal"] = np.random.default_rng(0).normal(size=(30, 2))
    _, info = load_d4rl(write(tmp_path / "maze2d-large-dense-v1.hdf5", content))
    assert info.goal == [7.0, 9.0] and info.goal_key == "desired_goal" and info.obs_keys == ["observation"]
    assert info.env_spec is not None
    spec = json.loads(info.env_spec)
    assert spec["max_episode_steps"] == 800
    assert spec["kwargs"] == {"size": "large", "reward_type": "dense", "goal": "fixed", "frame": "d4rl"}


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.env_id])
def test_evaluation_environments_fit_the_data(name, tmp_path):
    import gymnasium as gym

    task = TASKS[name]
    path = write(tmp_path / f"{name}-v2.hdf5", arrays(5, task.obs_dim, task.action_dim, timeouts=flags(5, 4)))
    _, info = load_d4rl(path)
    assert info.env_spec is not None
    env = gym.make(check_env(info.env_spec))
    try:
        assert env.observation_space.shape == (task.obs_dim,)
        assert env.action_space.shape == (task.action_dim,)
        assert env.spec is not None and env.spec.max_episode_steps == task.max_steps
        assert np.all(env.action_space.low == -1) and np.all(env.action_space.high == 1)  # type: ignore[attr-defined]
    finally:
        env.close()


def test_a_file_of_any_name_loads_and_env_names_its_task(tmp_path, caplog):
    path = write(tmp_path / "mine.h5", arrays(timeouts=flags(30, 29), actions=np.full((30, 3), 7.0)))
    _, info = load_source(path)
    assert info.env_spec is None and info.ref_min is None and info.action_high == [np.inf] * 3
    assert "mine.h5" in caplog.text and "--data.env" in caplog.text

    path = write(tmp_path / "mine.h5", arrays(timeouts=flags(30, 29)))
    _, info = load_source(path, env="hopper-medium-v2")
    assert info.ref_max == 3234.3 and info.env_spec is not None
    with pytest.raises(ConfigError, match=r"data.env 'hoper' .*did you mean 'hopper'"):
        load_source(path, env="hoper")


def test_tasks_without_an_environment_load(tmp_path, caplog):
    content = arrays(30, 29, 8, timeouts=flags(30, 29))
    content["infos/goal"] = np.full((30, 2), 3.0)
    _, info = load_d4rl(write(tmp_path / "antmaze-umaze-v2.hdf5", content))
    assert info.env_spec is None and info.ref_max == 1.0 and info.goal == [3.0, 3.0]
    assert "no evaluation" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards": None}, "lacks rewards, holds actions, observations, terminals, timeouts"),
        ({"observations": np.zeros((30, 17))}, "17 columns.*hopper has 11 and 3.*--data.env"),
        ({"observations": np.zeros(30)}, r"observations has shape \(30,\), expected \(steps, dimensions\)"),
        ({"rewards": np.zeros((30, 2))}, r"rewards has shape \(30, 2\), expected \(steps,\)"),
        ({"rewards": np.zeros(29)}, "rewards has 29 rows, observations 30"),
        ({"next_observations": np.zeros((30, 10))}, r"next_observations has shape \(30, 10\)"),
        ({"terminals": np.full(30, 2)}, "terminals is 2 at row 0, expected 0 or 1"),
        ({"observations": np.full((30, 11), np.nan)}, "episode 0, step 0: obs.* is nan"),
        ({"actions": np.full((30, 3), 1.2)}, "action.* is 1.2, outside .*clip"),
        ({"timeouts": None}, "no episode ends within its 30 steps"),
        ({"observations": None, "observations/a": np.zeros(3)}, "observations is a group"),
        ({"rewards": np.array([b"x"] * 30)}, "rewards is of type"),
    ],
)
def test_malformed_files_are_refused(hopper, changes, words):
    path = hopper(**{"timeouts": flags(30, 29), **changes})
    with pytest.raises(DataError, match=words) as caught:
        load_d4rl(path)
    assert "hopper_medium-v2.hdf5" in str(caught.value)


def test_timeouts_are_needed_when_the_time_limit_is_unknown(tmp_path):
    with pytest.raises(DataError, match="no timeouts are recorded.*--data.env"):
        load_d4rl(write(tmp_path / "mine.hdf5", arrays(timeouts=None)))


def test_column_vectors_of_rewards_and_flags_are_accepted(hopper):
    episodes, _ = load_d4rl(hopper(rewards=np.ones((30, 1)), timeouts=flags(30, 29)[:, None].astype(np.float32)))
    assert episodes.reward.shape == (30,) and episodes.lengths.tolist() == [30]


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_truncated_files_are_refused(hopper, kept):
    path = Path(hopper(timeouts=flags(30, 29)))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(DataError, match=r"hopper_medium-v2.hdf5: not a readable HDF5 file.*download or copy it again"):
        load_d4rl(str(path))


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("form", ["file", "opaque", "objects"])
def test_pickles_are_never_executed(tmp_path, form):
    target = tmp_path / "executed"
    payload = pickle.dumps(Payload(target))
    path = tmp_path / "hopper_medium-v2.hdf5"
    if form == "file":
        path.write_bytes(payload)
    else:
        rewards = np.void(payload) if form == "opaque" else None
        write(path, arrays(timeouts=flags(30, 29), rewards=rewards))
        if form == "objects":
            with h5py.File(path, "a") as file:
                file.create_dataset("rewards", (30,), dtype=h5py.vlen_dtype(np.uint8))[0] = np.frombuffer(payload, "u1")
    with pytest.raises(DataError, match="hopper_medium-v2.hdf5"):
        load_d4rl(str(path))
    assert not target.exists()
    pickle.loads(payload)
    assert target.exists(), "the payload would have shown"
