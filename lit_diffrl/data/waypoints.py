"""A controller that walks point mazes: it collects the data, and its return is the reference score of 100."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

from lit_diffrl.errors import ConfigError, check_range

Cell = tuple[int, int]


def observed_frame(env: Any) -> tuple[np.ndarray, np.ndarray]:
    """How a maze turns simulator coordinates into observed ones.

    Args:
        env: An unwrapped maze of gymnasium-robotics.

    Returns:
        Rotation (2, 2) and translation (2,); those of :class:`~lit_diffrl.data.maze_env.PointMaze`, and
        nothing changed for any other maze.
    """
    return getattr(env, "rotation", np.eye(2)), getattr(env, "translation", np.zeros(2))


class WaypointController:
    """Walks a point maze to a goal in nearly the shortest time.

    The way is the shortest path over cells. Each axis heads for the end of the straight run ahead: the run
    along the way, the middle of the corridor across it. Shortly before the cell of a turn the next run
    begins, so the axis that brakes and the axis that accelerates overlap. Per axis, with e the distance left,
    the wanted speed is the highest from which the ball can still stop, ``min(v_max, sqrt(2 a |e|), gain
    |e|)``, and the action is the one that reaches it within a step.

    Args:
        env: A point maze (gymnasium-robotics), wrapped or not.
        braking: Share of the available deceleration counted on, in (0, 1].
        gain: Approach rate near the target [1/s]; ends the square root's infinite slope at e = 0.
        foresight: The next run begins this long [s] before its cell is entered. Much more drives the ball
            into the inner corner.
    """

    def __init__(self, env: Any, *, braking: float = 0.9, gain: float = 15.0, foresight: float = 0.04) -> None:
        check_range("braking", braking, 0.0, 1.0, low_open=True)
        check_range("gain", gain, 0.0, low_open=True)
        check_range("foresight", foresight, 0.0)
        env = env.unwrapped
        self._maze = env.maze
        self._rotation, self._translation = observed_frame(env)
        model = env.point_env.model
        # Velocity gained by a full action in one step, and the acceleration behind it.
        self._kick = float(model.actuator_gear[0, 0] * model.opt.timestep / model.body_mass[-1])
        self._deceleration = braking * self._kick / float(model.opt.timestep)
        self._gain = gain
        self._foresight = foresight
        self._max_speed = 5.0  # per axis; the simulator clips there
        self._run_ends: dict[Cell, dict[Cell, Cell]] = {}

    def act(self, obs: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Choose an action.

        Args:
            obs: (4,), position and velocity as observed.
            goal: (2,), position to reach and rest at, same frame.

        Returns:
            (2,) float32 in [-1, 1].

        Raises:
            ConfigError: When position or goal lie in a wall, or no way joins them.
        """
        position = self._rotation.T @ (obs[:2] - self._translation)
        velocity = self._rotation.T @ obs[2:4]
        target = self._rotation.T @ (goal - self._translation)
        cell, goal_cell = self._cell(position), self._cell(target)
        ends = self._run_ends_to(goal_cell)
        soon = self._cell(position + self._foresight * velocity)
        if soon in ends and abs(soon[0] - cell[0]) + abs(soon[1] - cell[1]) == 1:
            cell = soon
        if cell not in ends:
            raise ConfigError(
                f"no way through the maze from cell {cell} to cell {goal_cell} (row, column); "
                "positions and goals must lie in free, connected cells and in the frame of the environment"
            )
        end = ends[cell]
        if end != goal_cell:
            target = self._maze.cell_rowcol_to_xy(end)
        action = [self._axis(float(e), float(v)) for e, v in zip(target - position, velocity)]
        return np.clip(self._rotation @ action, -1.0, 1.0).astype(np.float32)

    def _axis(self, error: float, velocity: float) -> float:
        distance = abs(error)
        speed = min(self._max_speed, math.sqrt(2 * self._deceleration * distance), self._gain * distance)
        return (math.copysign(speed, error) - velocity) / self._kick

    def _cell(self, position: np.ndarray) -> Cell:
        row, column = self._maze.cell_xy_to_rowcol(position)
        return int(row), int(column)

    def _run_ends_to(self, goal: Cell) -> dict[Cell, Cell]:
        if goal not in self._run_ends:
            self._run_ends[goal] = _run_ends(self._maze.maze_map, goal)
        return self._run_ends[goal]


def _run_ends(maze_map: list[list[Any]], goal: Cell) -> dict[Cell, Cell]:
    """For every cell from which ``goal`` can be reached: where the straight run towards it ends."""
    free = {(r, c) for r, row in enumerate(maze_map) for c, content in enumerate(row) if content != 1}
    if goal not in free:
        return {}
    ends = {goal: goal}
    following = {goal: goal}
    queue = deque([goal])
    while queue:  # breadth first from the goal: `following` leads back along a shortest way
        here = queue.popleft()
        ahead = following[here]
        for step in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            cell = (here[0] + step[0], here[1] + step[1])
            if cell in free and cell not in ends:
                straight = here == goal or (here[0] - ahead[0], here[1] - ahead[1]) == step
                ends[cell] = ends[here] if straight else here
                following[cell] = here
                queue.append(cell)
    return ends
