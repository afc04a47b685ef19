"""D4RL's own files: flat HDF5 arrays, the only data on which published scores were measured.

Source: D4RL (Fu et al. 2020), its file layout and its published reference returns; the splitting is Diffuser's.
Nothing in a file is ever unpickled: it is read with h5py as plain numbers, and anything else is refused.

The environment and the reference returns follow from the file's name (``hopper_medium-v2.hdf5``,
``maze2d-umaze-sparse-v1.hdf5``) or from ``env``. The environments that recorded the data no longer run; each task
is evaluated on the nearest that does:

- hopper, walker2d, halfcheetah, ant (recorded on v2): Gymnasium's v4, of the same dynamics and rewards; ant with
  contact forces, for its 111 observations.
- maze2d: :class:`lit_diffrl.data.maze_env.PointMaze` with D4RL's fixed goal, starts and coordinates (row, column).
- pen, hammer, relocate, door: Gymnasium-Robotics' Adroit hand with D4RL's time limits.
- antmaze, kitchen, maze2d-open: none, since those that run use other coordinates, observations or maps. Methods train
  on them without evaluation.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lit_diffrl.data.episodes import Episodes
from lit_diffrl.data.spec import SourceInfo, constant_goal
from lit_diffrl.errors import ConfigError, DataError, nearest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """An environment of D4RL.

    Args:
        obs_dim: Numbers in an observation.
        action_dim: Numbers in an action; every action space of D4RL is [-1, 1].
        max_steps: Time limit in steps.
        ref_min: Published return of a random policy.
        ref_max: Published return of the reference policy.
        env_id: Id of the nearest environment that runs; None when there is none, and for mazes made here.
        entry_point: Its class.
        kwargs: Its arguments.
    """

    obs_dim: int
    action_dim: int
    max_steps: int
    ref_min: float
    ref_max: float
    env_id: str | None = None
    entry_point: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


_MUJOCO = "gymnasium.envs.mujoco"
_ADROIT = "gymnasium_robotics.envs.adroit_hand"
_FORCES = {"use_contact_forces": True}

TASKS = {
    "hopper": Task(11, 3, 1000, -20.272305, 3234.3, "Hopper-v4", f"{_MUJOCO}.hopper_v4:HopperEnv"),
    "walker2d": Task(17, 6, 1000, 1.629008, 4592.3, "Walker2d-v4", f"{_MUJOCO}.walker2d_v4:Walker2dEnv"),
    "halfcheetah": Task(
        17, 6, 1000, -280.178953, 12135.0, "HalfCheetah-v4", f"{_MUJOCO}.half_cheetah_v4:HalfCheetahEnv"
    ),
    "ant": Task(111, 8, 1000, -325.6, 3879.7, "Ant-v4", f"{_MUJOCO}.ant_v4:AntEnv", _FORCES),
    "maze2d-open": Task(4, 2, 150, 0.01, 20.66),
    "maze2d-open-dense": Task(4, 2, 150, 11.17817, 27.166538620695782),
    "maze2d-umaze": Task(4, 2, 300, 23.85, 161.86),
    "maze2d-umaze-dense": Task(4, 2, 300, 68.537689, 193.66285642381482),
    "maze2d-medium": Task(4, 2, 600, 13.13, 277.39),
    "maze2d-medium-dense": Task(4, 2, 600, 44.264742, 297.4552547777125),
    "maze2d-large": Task(4, 2, 800, 6.7, 273.99),
    "maze2d-large-dense": Task(4, 2, 800, 30.569041, 303.4857382709002),
    "antmaze-umaze": Task(29, 8, 700, 0.0, 1.0),
    "antmaze-medium": Task(29, 8, 1000, 0.0, 1.0),
    "antmaze-large": Task(29, 8, 1000, 0.0, 1.0),
    "pen": Task(
        45, 24, 100, 96.262799, 3076.8331017826877, "AdroitHandPen-v1", f"{_ADROIT}.adroit_pen:AdroitHandPenEnv"
    ),
    "hammer": Task(
        46, 26, 200, -274.856578, 12794.134825156867,
        "AdroitHandHammer-v1", f"{_ADROIT}.adroit_hammer:AdroitHandHammerEnv",
    ),
    "relocate": Task(
        39, 30, 200, -6.425911, 4233.877797728884,
        "AdroitHandRelocate-v1", f"{_ADROIT}.adroit_relocate:AdroitHandRelocateEnv",
    ),
    "door": Task(
        39, 28, 200, -56.512833, 2880.5693087298737, "AdroitHandDoor-v1", f"{_ADROIT}.adroit_door:AdroitHandDoorEnv"
    ),
    "kitchen": Task(60, 9, 280, 0.0, 4.0),
}  # fmt: skip

# D4RL's files do not always bear their task's name.
_ALIASES = {
    "walker-": "walker2d-",
    "mini-kitchen-": "kitchen-",
    "ant-maze-u-maze-": "antmaze-umaze-",
    "ant-maze-big-maze-": "antmaze-medium-",
    "ant-maze-hardest-maze-": "antmaze-large-",
}
_MAZE = re.compile(r"maze2d-(umaze|medium|large)(-dense)?")


def task_name(name: str) -> str | None:
    """Find the task that a file or dataset name begins with.

    Args:
        name: E.g. ``hopper_medium_expert-v2``, ``maze2d-large-dense-v1`` or just ``hopper``.

    Returns:
        A key of :data:`TASKS`, the longest that fits, or None.
    """
    plain = name.lower().replace("_", "-") + "-"
    for alias, stands_for in _ALIASES.items():
        if plain.startswith(alias):
            plain = stands_for + plain[len(alias) :]
    return max((key for key in TASKS if plain.startswith(key + "-")), key=len, default=None)


def load_d4rl(path: str, *, env: str | None = None) -> tuple[Episodes, SourceInfo]:
    """Read a file: ``observations``, ``actions``, ``rewards``, ``terminals`` and, where present, ``timeouts``,
    ``next_observations`` and ``infos/goal``.

    An episode ends at every step with a terminal or a timeout; a step with both is terminal. Steps after the last
    such step are dropped. Without timeouts (or with neither flag set anywhere) episodes are cut at the environment's
    time limit. What follows a step is taken from ``next_observations``; in files without them it is the next row of
    the episode, and for an episode's last step, whose successor was not recorded, that step's own observation.

    Args:
        path: A ``.hdf5`` or ``.h5`` file.
        env: Name of the D4RL task, where the file's name does not begin with it.

    Returns:
        The episodes and their description. A file of an unknown task has neither environment, nor reference
        returns, nor action bounds.

    Raises:
        ConfigError: When ``env`` is not a D4RL task.
        DataError: When the file is not readable or its content is not as above.
    """
    if env is not None and task_name(env) is None:
        raise ConfigError(
            f"data.env {env!r} is not a task of D4RL; {nearest(env, TASKS) or 'accepted: ' + ', '.join(TASKS)}"
        )
    name = task_name(Path(path).stem if env is None else env)
    task = None if name is None else TASKS[name]
    if task is None:
        _log.warning(
            "%s: the file's name begins with no D4RL task (%s): no evaluation and no scores; name it with --data.env",
            path, ", ".join(TASKS),
        )  # fmt: skip
    arrays = _read(path)
    obs, action = arrays["observations"], arrays["actions"]
    if task is not None and (obs.shape[1], action.shape[1]) != (task.obs_dim, task.action_dim):
        raise DataError(
            f"{path}: observations have {obs.shape[1]} columns and actions {action.shape[1]}, but {name} has "
            f"{task.obs_dim} and {task.action_dim}; if the file is of another task, name it with --data.env"
        )
    starts, steps = split_flat(path, arrays["terminals"], arrays.get("timeouts"), task.max_steps if task else None)
    terminated = arrays["terminals"][:steps]
    truncated = np.zeros(steps, dtype=bool)
    truncated[np.append(starts[1:], steps) - 1] = True
    if "next_observations" in arrays:
        next_obs = arrays["next_observations"][:steps]
    else:
        last = terminated | truncated
        next_obs = np.where(last[:, None], obs[:steps], np.roll(obs[:steps], -1, axis=0))
    env_spec, goal = (None, None) if name is None else _evaluation(name)
    bounds = [np.inf if task is None else 1.0] * action.shape[1]
    info = SourceInfo(
        env_spec=env_spec,
        ref_min=task.ref_min if task else None,
        ref_max=task.ref_max if task else None,
        max_episode_steps=task.max_steps if task else None,
        obs_keys=["observation"] if goal else None,
        goal_key="desired_goal" if goal else None,
        goal=goal or constant_goal(arrays.get("infos/goal")),
        action_low=[-bound for bound in bounds],
        action_high=bounds,
        dataset_ids=[Path(path).name],
    )
    episodes = Episodes.from_numpy(
        path,
        obs=obs[:steps],
        action=action[:steps],
        reward=arrays["rewards"][:steps],
        terminated=terminated,
        truncated=truncated,
        next_obs=next_obs,
        starts=starts,
        action_low=info.action_low,
        action_high=info.action_high,
    )
    return episodes, info


def split_flat(
    source: str, terminals: np.ndarray, timeouts: np.ndarray | None, max_steps: int | None
) -> tuple[np.ndarray, int]:
    """Find the episodes in flat arrays.

    Args:
        source: Name of the file, for messages.
        terminals: ``(N,)`` bool.
        timeouts: ``(N,)`` bool, or None when they were not recorded.
        max_steps: Time limit, at which episodes are cut when there are no timeouts.

    Returns:
        ``(E,)`` first steps, and the number of steps up to the last end; those after it are of no episode.

    Raises:
        DataError: When no episode ends, or timeouts are needed and neither recorded nor known.
    """
    if timeouts is not None and (terminals.any() or timeouts.any()):
        ends = np.flatnonzero(terminals | timeouts) + 1
    elif max_steps is None:
        raise DataError(
            f"{source}: no timeouts are recorded and the time limit is unknown; name the task with --data.env, e.g. "
            "hopper, or store `timeouts` (N,) with the last step of each episode set"
        )
    else:
        # Cuts are counted from the end before, so they are laid out terminal by terminal.
        found, begin = [], 0
        for end in [*(np.flatnonzero(terminals) + 1).tolist(), len(terminals)]:
            found += [*range(begin + max_steps, end, max_steps)]
            if (end - begin and terminals[end - 1]) or (end - begin) % max_steps == 0 < end - begin:
                found.append(end)
            begin = end
        ends = np.asarray(found, dtype=np.int64)
    if len(ends) == 0:
        raise DataError(
            f"{source}: no episode ends within its {len(terminals)} steps (time limit {max_steps}); set `terminals` "
            "or `timeouts` on the last step of each episode"
        )
    return np.concatenate([[0], ends[:-1]]), int(ends[-1])


def _evaluation(name: str) -> tuple[str | None, list[float] | None]:
    """EnvSpec as JSON of the environment in which a task is evaluated, and its fixed goal, if it has one."""
    task, maze = TASKS[name], _MAZE.fullmatch(name)
    if maze is not None:
        from lit_diffrl.data import pointmaze
        from lit_diffrl.data.maze_env import GOAL_CELLS

        size, reward_type = maze[1], "dense" if maze[2] else "sparse"
        spec = pointmaze.env_spec(size, reward_type=reward_type, goal="fixed", frame="d4rl")
        return spec.to_json(), [float(i) for i in GOAL_CELLS[size]]  # cells are D4RL's coordinates
    if task.env_id is None:
        _log.warning("D4RL's %s has no environment that still runs and fits its data: no evaluation", name)
        return None, None
    from gymnasium.envs.registration import EnvSpec

    return EnvSpec(
        id=task.env_id,
        entry_point=task.entry_point,
        max_episode_steps=task.max_steps,
        disable_env_checker=True,
        kwargs=task.kwargs,
    ).to_json(), None


def _read(path: str) -> dict[str, np.ndarray]:
    """Read the arrays that are used, as numbers, and check that they are rows of the same steps."""
    import h5py

    required = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1}
    optional = {"timeouts": 1, "next_observations": 2, "infos/goal": 2}
    arrays: dict[str, np.ndarray] = {}
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in required if key not in file]
            if missing:
                raise DataError(
                    f"{path}: lacks {', '.join(missing)}, holds {', '.join(file) or 'nothing'}; a D4RL file has "
                    f"{', '.join(required)} (Minari sets are named by their id, not by their file)"
                )
            for key, ndim in {**required, **optional}.items():
                if key in file:
                    arrays[key] = _array(path, key, file[key], ndim)
    except (OSError, RuntimeError, KeyError, MemoryError) as error:  # what h5py raises on damaged files
        raise DataError(
            f"{path}: not a readable HDF5 file, or damaged ({type(error).__name__}: {error}); download or copy it again"
        ) from error
    steps = len(arrays["observations"])
    for key, array in arrays.items():
        if len(array) != steps:
            raise DataError(
                f"{path}: {key} has {len(array)} rows, observations {steps}; the arrays must be of the same steps"
            )
    if "next_observations" in arrays and arrays["next_observations"].shape != arrays["observations"].shape:
        raise DataError(
            f"{path}: next_observations has shape {arrays['next_observations'].shape}, observations "
            f"{arrays['observations'].shape}; the two must be equal"
        )
    return arrays


def _array(path: str, key: str, item: Any, ndim: int) -> np.ndarray:
    dtype = getattr(item, "dtype", None)
    if dtype is None or dtype.kind not in "fiub":
        what = "a group" if dtype is None else f"of type {dtype}"
        raise DataError(
            f"{path}: {key} is {what}, expected plain numbers; other objects are not read, since they may "
            "hide code: store it as float32 (flags as bool)"
        )
    flat = ndim == 1 and item.ndim == 2 and item.shape[1] == 1
    if item.ndim != ndim and not flat:
        wanted = "(steps, dimensions)" if ndim == 2 else "(steps,)"
        raise DataError(f"{path}: {key} has shape {item.shape}, expected {wanted}")
    array = np.asarray(item[()]).reshape(-1) if flat else np.asarray(item[()])
    if key not in ("terminals", "timeouts") or array.dtype.kind == "b":
        return array
    wrong = np.flatnonzero((array != 0) & (array != 1))
    if len(wrong):
        raise DataError(f"{path}: {key} is {array[wrong[0]]} at row {wrong[0]}, expected 0 or 1; store it as bool")
    return array.astype(bool)
