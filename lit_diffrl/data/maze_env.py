"""Point mazes with the start and goal rules of D4RL's maze2d tasks, on gymnasium-robotics' simulator.

A ball in a maze is pushed by a force. gymnasium-robotics redraws the goal, jitters it and never starts near
it; maze2d, on which the planners report, fixes the goal and starts anywhere. :class:`PointMaze` restores that
protocol, and nothing else: physics, rewards and observations are the parent's.

Two differences from D4RL remain. The sparse reward is paid within 0.45 of the goal (gymnasium-robotics),
where D4RL pays within 0.5: at full speed one step later. And the episode length is not the environment's: it
is the ``max_episode_steps`` of the EnvSpec (300, 600, 800).

This module imports the simulator; everything else in the package names it by :data:`ENTRY_POINT`.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils.ezpickle import EzPickle
from gymnasium_robotics.envs.maze.maps import LARGE_MAZE, MEDIUM_MAZE, U_MAZE
from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv

from lit_diffrl.errors import ConfigError, check_choice

MAPS: dict[str, list[list[int]]] = {"umaze": U_MAZE, "medium": MEDIUM_MAZE, "large": LARGE_MAZE}
GOAL_CELLS: dict[str, tuple[int, int]] = {"umaze": (1, 1), "medium": (6, 6), "large": (7, 9)}
POSITION_NOISE = 0.1
VELOCITY_NOISE = 0.1
# D4RL hangs the ball at 1.2 and the walls at cell + 1, so its coordinates lead its own cells by 0.2.
D4RL_OFFSET = 0.2

_tempdir_lock = threading.Lock()


@contextmanager
def _private_tempdir() -> Iterator[None]:
    """Give the parent class a temporary folder of its own to write the maze's XML into.

    It names the file by the clock, directly in the shared temporary folder, and leaves it there: workers that
    build their environments together can overwrite each other's maze.
    """
    with _tempdir_lock:
        shared, own = tempfile.tempdir, tempfile.mkdtemp(prefix="lit_diffrl-maze-")
        tempfile.tempdir = own
        try:
            yield
        finally:
            tempfile.tempdir = shared
            for name in os.listdir(own):
                if name.startswith("ant_maze"):
                    os.remove(os.path.join(own, name))
            if not os.listdir(own):  # a thread that asked for a temporary file meanwhile keeps it
                os.rmdir(own)


class PointMaze(PointMazeEnv):
    """A point maze with maze2d's starts and goal.

    Observation: dict of ``observation`` (4,) = position [m] and velocity [m/s], ``achieved_goal`` (2,) =
    position, ``desired_goal`` (2,). Action: (2,) in [-1, 1], the force per axis. An episode never terminates
    and its goal never moves, so the sparse return counts the steps spent at the goal.

    Args:
        size: ``umaze``, ``medium`` or ``large``.
        reward_type: ``sparse`` (1 within 0.45 of the goal, else 0) or ``dense`` (exp of minus the distance).
        goal: ``fixed`` (maze2d: the middle of cell (1, 1), (6, 6) or (7, 9) of the three mazes) or ``random``
            (Multi2D: a free cell drawn at each reset, ± 0.1 per coordinate).
        frame: ``centered`` (origin in the middle of the maze, x along columns, y up the rows) or ``d4rl``
            (x = row, y = column, as in D4RL's files; goals and starts lie about the integers, which D4RL puts
            0.2 past the middle of each cell, so there the walls of cell (r, c) are centred on (r - 0.2, c -
            0.2)).
        render_mode: ``rgb_array``, ``human``, ``depth_array`` or None.

    Raises:
        ConfigError: When an argument is not one of these words.

    Attributes:
        rotation: (2, 2), turns simulator axes into those of the observations.
        translation: (2,), observed position of the simulator's origin.
        free_cells: Cells that are not walls, as (row, column).
    """

    def __init__(
        self,
        size: str = "umaze",
        reward_type: str = "sparse",
        goal: str = "fixed",
        frame: str = "centered",
        render_mode: str | None = None,
    ) -> None:
        check_choice("size", size, MAPS)
        check_choice("reward_type", reward_type, ("sparse", "dense"))
        check_choice("goal", goal, ("fixed", "random"))
        check_choice("frame", frame, ("centered", "d4rl"))
        with _private_tempdir():
            super().__init__(
                maze_map=MAPS[size],
                render_mode=render_mode,
                reward_type=reward_type,
                continuing_task=True,
                reset_target=False,
            )
        EzPickle.__init__(self, size, reward_type, goal, frame, render_mode)
        self.free_cells = [(r, c) for r, row in enumerate(MAPS[size]) for c, wall in enumerate(row) if wall != 1]
        self._goal_cell = GOAL_CELLS[size] if goal == "fixed" else None
        self._frame = frame
        self.rotation, self.translation = np.eye(2), np.zeros(2)
        if frame == "d4rl":
            corner = np.array([self.maze.y_map_center, self.maze.x_map_center])
            self.rotation = np.array([[0.0, -1.0], [1.0, 0.0]])
            self.translation = corner - 0.5 - D4RL_OFFSET
        # Seen from straight above: the default camera looks at the mazes from the side.
        self.point_env.mujoco_renderer.default_cam_config = {
            "distance": 1.35 * max(self.maze.map_length, self.maze.map_width),
            "elevation": -90.0,
            "azimuth": 90.0,
            "lookat": np.zeros(3),
        }

    def cell_position(self, cell: tuple[int, int]) -> np.ndarray:
        """Where goals and starts of a cell lie in the observations, before their noise.

        Args:
            cell: (row, column).

        Returns:
            (2,): the middle of the cell, or (row, column) itself in D4RL's frame.
        """
        if self._frame == "d4rl":
            return np.array(cell, dtype=np.float64)
        return self.maze.cell_rowcol_to_xy(np.array(cell))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Restarts the environment's generator; without it the draws go on.
            options: ``goal_cell`` and ``reset_cell``, (row, column) each, choose the cell of the goal and of
                the start instead of the rule; the noise stays.

        Returns:
            The first observation, and ``{"success": whether it lies at the goal}``.

        Raises:
            ConfigError: When a chosen cell is not free.
        """
        gym.Env.reset(self, seed=seed)
        options = options or {}
        goal_cell, start_cell = (self._chosen_cell(options, key) for key in ("goal_cell", "reset_cell"))
        if goal_cell is None and self._goal_cell is not None:
            self.goal = self.cell_position(self._goal_cell)
        else:
            self.goal = self._near_cell(goal_cell)
        self.update_target_site_pos()
        self.reset_pos = self.rotation.T @ (self._near_cell(start_cell) - self.translation)
        self.point_env.init_qpos[:] = self.reset_pos
        self.point_env.init_qvel[:] = VELOCITY_NOISE * self.rotation.T @ self.np_random.standard_normal(2)
        point_obs, _ = self.point_env.reset(seed=seed)
        obs = self._get_obs(point_obs)
        return obs, {"success": bool(np.linalg.norm(obs["achieved_goal"] - self.goal) <= 0.45)}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Apply a force, given along the axes of the observations, for 0.01 s."""
        # The simulator limits each of its own axes, and the frames differ by a quarter turn: same limits.
        return super().step(self.rotation.T @ np.asarray(action))

    def update_target_site_pos(self, pos: np.ndarray | None = None) -> None:
        """Move the drawn target to the goal."""
        self.point_env.model.site_pos[self.target_site_id, :2] = self.rotation.T @ (self.goal - self.translation)

    def _get_obs(self, point_obs: np.ndarray) -> dict[str, np.ndarray]:
        position = self.rotation @ point_obs[:2] + self.translation
        return {
            "observation": np.concatenate([position, self.rotation @ point_obs[2:]]),
            "achieved_goal": position.copy(),
            "desired_goal": self.goal.copy(),
        }

    def _near_cell(self, cell: tuple[int, int] | None) -> np.ndarray:
        if cell is None:
            cell = self.free_cells[self.np_random.integers(len(self.free_cells))]
        return self.cell_position(cell) + self.np_random.uniform(-POSITION_NOISE, POSITION_NOISE, size=2)

    def _chosen_cell(self, options: dict[str, Any], key: str) -> tuple[int, int] | None:
        if options.get(key) is None:
            return None
        row, column = (int(i) for i in options[key])
        if (row, column) not in self.free_cells:
            raise ConfigError(f"{key} must be a free cell (row, column), one of {self.free_cells}; got {(row, column)}")
        return row, column
