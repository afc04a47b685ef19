"""Maze data collected here: one long walk between random goals, stored as an ordinary Minari dataset.

A waypoint controller walks a point maze from one random goal to the next, as in D4RL's maze2d sets: the walk
knows nothing of the goal on which agents are scored, so a planner has to stitch its way there. About half of
the goals are passed, at the others the walker rests for a while, so that the data holds windows that start or
end at rest.

The walk is cut into stretches of :data:`STRETCH` steps, stored as truncated episodes: each begins where the
one before ended. Rewards are those of the fixed evaluation goal. The reference scores stored with the data
are mean returns measured in the evaluation environment: 0 is random actions, 100 the controller without
noise.

``-dense`` sets hold the same walk with dense rewards; ``-multi`` sets the same walk and rewards, to be
evaluated on a goal drawn anew for every episode.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_diffrl.data.waypoints import WaypointController, observed_frame
from lit_diffrl.errors import DataError, check_choice, check_range

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec
    from tqdm import tqdm

ENTRY_POINT = "lit_diffrl.data.maze_env:PointMaze"
MAX_EPISODE_STEPS = {"umaze": 300, "medium": 600, "large": 800}
STEPS = {"umaze": 100_000, "medium": 200_000, "large": 400_000}
DATASETS = tuple(f"lit_diffrl/pointmaze/{size}{variant}-v0" for size in STEPS for variant in ("", "-dense", "-multi"))

STRETCH = 10_000
REFERENCE_EPISODES = 100
ACTION_NOISE = 0.15
GOAL_JITTER = 0.3
REST_PROBABILITY = 0.5
REST_STEPS = (5, 60)
# A goal counts as reached within the first distance when it is passed, within the second [m] and below the
# speed [m/s] when the walker rests there.
PASSING_DISTANCE, RESTING_DISTANCE, RESTING_SPEED = 0.25, 0.05, 0.3

_log = logging.getLogger(__name__)


def env_spec(size: str, *, reward_type: str = "sparse", goal: str = "fixed", frame: str = "centered") -> EnvSpec:
    """Describe a maze so that ``gymnasium.make(spec)`` builds it without registration, also from JSON.

    Args:
        size: ``umaze``, ``medium`` or ``large``.
        reward_type: ``sparse`` or ``dense``.
        goal: ``fixed`` or ``random``.
        frame: ``centered`` or ``d4rl``.

    Returns:
        The spec, with maze2d's episode length.
    """
    from gymnasium.envs.registration import EnvSpec

    check_choice("size", size, MAX_EPISODE_STEPS)
    return EnvSpec(
        id=f"lit_diffrl/PointMaze-{size}-v0",
        entry_point=ENTRY_POINT,
        max_episode_steps=MAX_EPISODE_STEPS[size],
        disable_env_checker=True,
        kwargs={"size": size, "reward_type": reward_type, "goal": goal, "frame": frame},
    )


def wall_boxes(env: Any) -> list[tuple[float, float, float, float]]:
    """Find the walls of a maze as rectangles in the coordinates of its observations.

    Args:
        env: A :class:`~lit_diffrl.data.maze_env.PointMaze` or any maze of gymnasium-robotics, wrapped or not.

    Returns:
        (x0, y0, width, height) of each wall cell, (x0, y0) being its lowest corner.
    """
    env = env.unwrapped
    maze, (rotation, translation) = env.maze, observed_frame(env)
    side = float(maze.maze_size_scaling)
    boxes = []
    for row, cells in enumerate(maze.maze_map):
        for column, content in enumerate(cells):
            if content == 1:
                x, y = rotation @ maze.cell_rowcol_to_xy(np.array([row, column])) + translation
                boxes.append((float(x) - side / 2, float(y) - side / 2, side, side))
    return boxes


def _walk(env: Any, steps: int, rng: np.random.Generator, bar: tqdm) -> tuple[np.ndarray, ...]:
    """Walk from random goal to random goal with a noisy controller, without a break.

    Args:
        env: The unwrapped evaluation environment, just reset.
        steps: Steps to walk.
        rng: Draws goals, rests and action noise.
        bar: Advanced as the walk goes on.

    Returns:
        Observations (steps + 1, 4), actions (steps, 2) float32, rewards (steps,) and the evaluation goal
        (2,).
    """
    controller = WaypointController(env)
    obs = np.empty((steps + 1, 4))
    actions = np.empty((steps, 2), dtype=np.float32)
    rewards = np.empty(steps)
    noise = rng.normal(scale=ACTION_NOISE, size=(steps, 2)).astype(np.float32)

    start, _ = env.reset(seed=int(rng.integers(2**31)))
    obs[0] = start["observation"]
    goal, rest = _next_goal(env, None, rng)
    for t in range(steps):
        actions[t] = np.clip(controller.act(obs[t], goal) + noise[t], -1.0, 1.0)
        step_obs, rewards[t], *_ = env.step(actions[t])
        obs[t + 1] = step_obs["observation"]

        distance, speed = np.linalg.norm(obs[t + 1, :2] - goal), np.linalg.norm(obs[t + 1, 2:])
        if rest == 0 and distance < PASSING_DISTANCE:
            goal, rest = _next_goal(env, goal, rng)
        elif rest > 0 and distance < RESTING_DISTANCE and speed < RESTING_SPEED:
            rest -= 1
        if t % 1000 == 999:
            bar.update(1000)
    bar.update(steps % 1000)
    return obs, actions, rewards, env.goal.copy()


def _next_goal(env: Any, last: np.ndarray | None, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Draw a goal in another cell than the last, and the steps to rest there (0: pass it)."""
    here = None if last is None else tuple(env.maze.cell_xy_to_rowcol(last))
    cells = [cell for cell in env.free_cells if cell != here]
    goal = env.cell_position(cells[rng.integers(len(cells))]) + rng.uniform(-GOAL_JITTER, GOAL_JITTER, size=2)
    rests = rng.random() < REST_PROBABILITY
    return goal, int(rng.integers(REST_STEPS[0], REST_STEPS[1] + 1)) if rests else 0


def _mean_return(env: Any, max_steps: int, policy: Callable[[dict[str, np.ndarray]], np.ndarray], bar: tqdm) -> float:
    """Mean return over :data:`REFERENCE_EPISODES` episodes, which are seeded from 0 on."""
    total = 0.0
    for episode in range(REFERENCE_EPISODES):
        obs, _ = env.reset(seed=episode)
        for _ in range(max_steps):
            obs, reward, *_ = env.step(policy(obs))
            total += float(reward)
        bar.update(max_steps)
    return total / REFERENCE_EPISODES


def collect(dataset_id: str, *, steps: int | None = None, seed: int | None = None, progress: bool = True) -> None:
    """Collect a maze dataset, unless it is there already.

    The data appears under Minari's root (``MINARI_DATASETS_PATH``) all at once or not at all. When another
    process is collecting the same dataset, this one waits for it.

    Args:
        dataset_id: One of :data:`DATASETS`.
        steps: Length of the walk; by default that of :data:`STEPS`.
        seed: Seed of the walk, by default 0. The same id, steps and seed give the same data.
        progress: Show a progress bar on stderr.

    Raises:
        ConfigError: When the id is unknown or ``steps`` is not positive.
        DataError: When the dataset is there with another number of steps, or another seed, than asked for.
    """
    from filelock import FileLock, Timeout
    from minari.storage import get_dataset_path

    check_choice("dataset", dataset_id, DATASETS)
    if steps is not None:
        check_range("steps", steps, 1)
    folder = get_dataset_path(dataset_id)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("another process is collecting %s; waiting for it", dataset_id)
        lock.acquire()
    try:
        if (folder / "data").exists():
            _check_same(dataset_id, folder, steps, seed)
            return
        size = _size(dataset_id)
        partial = folder.parent / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a collection that was killed
        try:
            _create(dataset_id, partial, STEPS[size] if steps is None else steps, seed or 0, progress)
            os.replace(partial / dataset_id, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        lock.release()


def _size(dataset_id: str) -> str:
    return dataset_id.rsplit("/", 1)[1].split("-")[0]


def _check_same(dataset_id: str, folder: Path, steps: int | None, seed: int | None) -> None:
    metadata = json.loads((folder / "data" / "metadata.json").read_text())
    for name, asked, key in (("steps", steps, "total_steps"), ("seed", seed, "walk_seed")):
        if asked is not None and asked != metadata.get(key):
            raise DataError(
                f"{dataset_id} is in {folder} with {name}={metadata.get(key)}, asked for {name}={asked}; "
                "remove that folder to collect it anew, or set MINARI_DATASETS_PATH to another one"
            )


def _create(dataset_id: str, root: Path, steps: int, seed: int, progress: bool) -> None:
    """Walk, measure the reference returns and write the dataset below ``root``."""
    import gymnasium as gym
    import minari
    from minari.data_collector import EpisodeBuffer
    from tqdm import tqdm

    size = _size(dataset_id)
    data_spec = env_spec(size, reward_type="dense" if "-dense-" in dataset_id else "sparse")
    eval_spec = env_spec(size, goal="random") if "-multi-" in dataset_id else data_spec
    max_steps = MAX_EPISODE_STEPS[size]
    total = steps + 2 * REFERENCE_EPISODES * max_steps
    with (
        contextlib.closing(gym.make(data_spec).unwrapped) as env,
        contextlib.closing(gym.make(eval_spec).unwrapped) as eval_env,
        tqdm(total=total, desc=f"collecting {dataset_id}", unit=" steps", unit_scale=True, disable=not progress) as bar,
    ):
        obs, actions, rewards, goal = _walk(env, steps, np.random.default_rng(seed), bar)
        rng = np.random.default_rng(0)
        random = _mean_return(eval_env, max_steps, lambda _: rng.uniform(-1.0, 1.0, size=2), bar)
        controller = WaypointController(eval_env)
        reference = _mean_return(
            eval_env, max_steps, lambda o: controller.act(o["observation"], o["desired_goal"]), bar
        )

    stretches = []
    for start in range(0, steps, STRETCH):
        part = slice(start, min(start + STRETCH, steps))
        rows = obs[start : part.stop + 1]
        truncations = np.zeros(len(rows) - 1, dtype=bool)
        truncations[-1] = True
        stretches.append(
            EpisodeBuffer(
                observations={
                    "observation": rows,
                    "achieved_goal": rows[:, :2],
                    "desired_goal": np.tile(goal, (len(rows), 1)),
                },
                actions=actions[part],  # type: ignore[arg-type]  # arrays are stored as they are
                rewards=rewards[part],  # type: ignore[arg-type]
                terminations=np.zeros_like(truncations),  # type: ignore[arg-type]
                truncations=truncations,  # type: ignore[arg-type]
                infos={},
            )
        )
    with minari_root(root), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for an e-mail address and a permalink
        dataset = minari.create_dataset_from_buffers(
            dataset_id,
            buffer=stretches,
            env=data_spec,
            eval_env=eval_spec,
            algorithm_name=f"waypoint controller, action noise {ACTION_NOISE}",
            author="lit_diffrl",
            description=(
                f"One walk of {steps} steps between random goals of the {size} maze, cut every {STRETCH}. "
                "Rewards are those of the fixed goal. Reference scores: random actions and the noise-free "
                f"controller, {REFERENCE_EPISODES} episodes each."
            ),
            ref_min_score=random,
            ref_max_score=reference,
            num_episodes_average_score=REFERENCE_EPISODES,
            requirements=["gymnasium-robotics"],
        )
        dataset.storage.update_metadata({"walk_seed": seed})


@contextlib.contextmanager
def minari_root(root: Path) -> Iterator[None]:
    """Let Minari write below another root: it offers no way to create a dataset elsewhere and move it in."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
