"""Pictures show the maze in the coordinates of the observations, and plans and walks where they were."""

from __future__ import annotations

import io

import imageio.v3 as imageio
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

from lit_diffrl.rollout import pictures as draw
from lit_diffrl.rollout.episodes import EpisodeResult, run_episodes


def maze_spec(toy_spec, **kwargs):
    env_spec = EnvSpec(
        "lit_diffrl/PointMaze-v0",
        entry_point="lit_diffrl.data.maze_env:PointMaze",
        max_episode_steps=40,
        kwargs={"size": "umaze", **kwargs},
    ).to_json()
    return toy_spec(
        env_spec=env_spec, obs_dim=4, action_dim=2, action_low=[-1.0] * 2, action_high=[1.0] * 2,
        obs_keys=["observation"], goal_key="desired_goal",
    )  # fmt: skip


class Straight:
    """Plans a straight line to the goal and pushes along it."""

    def reset(self, mask=None, seeds=None):
        self.plans = {}

    def act(self, obs, active=None):
        start, goal = obs["observation"][:, :2], obs["desired_goal"]
        for row in range(len(goal)):
            line = np.linspace(start[row], goal[row], 16)
            self.plans.setdefault(row, np.concatenate([line, 0 * line], axis=1))
        return goal - start

    def plan_trace(self):
        return list(self.plans.values())


@pytest.mark.parametrize("frame", ["centered", "d4rl"])
def test_nobody_walks_through_drawn_walls(toy_spec, frame):
    spec = maze_spec(toy_spec, frame=frame)
    maze = draw.Maze.from_spec(spec)
    assert maze is not None and maze.columns == (0, 1) and maze.cell == 1.0
    assert len(maze.walls) == 18  # of 25 cells, 7 are free
    for result in run_episodes(spec, Straight(), episodes=8, num_envs=4, record=8):
        inside = np.abs(result.position[:, None] - maze.walls[None]).max(-1) < maze.cell / 2
        assert not inside.any()
        np.testing.assert_allclose(result.path[:, :2], result.position, atol=1e-6)
        assert np.abs(result.goal - maze.walls).max(-1).min() > maze.cell / 2


def test_figure_has_a_panel_per_episode_and_shows_plan_and_walk(toy_spec):
    spec = maze_spec(toy_spec)
    maze = draw.Maze.from_spec(spec)
    results = run_episodes(spec, Straight(), episodes=3, num_envs=3, record=3)
    figure = draw.maze_figure(maze, results, "Straight · umaze · epoch=1")
    assert [axis.get_title() for axis in figure.axes] == [
        f"return {r.return_:.4g} · score {r.score:.0f}" for r in results
    ]
    walked = figure.axes[1].lines[0].get_xydata()
    np.testing.assert_allclose(walked, results[1].position)
    plan = figure.axes[1].collections[1].get_offsets()
    np.testing.assert_allclose(plan, results[1].plans[0][1][:, :2])
    pixels = draw.figure_pixels(figure)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    np.testing.assert_array_equal(imageio.imread(io.BytesIO(draw.encode_png(pixels))), pixels)


def test_figures_leave_pyplot_alone(toy_spec):
    import matplotlib.pyplot as plt

    maze = draw.Maze(np.zeros((1, 2)), 1.0, (-1.0, 1.0, -1.0, 1.0), None)
    result = EpisodeResult(1, 0.0, None, 3, False, 1.0, 1.0, path=np.zeros((4, 2)))
    draw.figure_pixels(draw.maze_figure(maze, [result], "nothing known"))
    assert plt.get_fignums() == []


def test_only_mazes_have_a_maze(toy_spec):
    assert draw.Maze.from_spec(toy_spec()) is None


def test_position_of_an_achieved_goal_is_found_behind_other_keys(toy_spec):
    spec = maze_spec(toy_spec)
    keys = {"observation": 27, "achieved_goal": 2}
    wide = type(spec)(**{**spec.__dict__, "obs_keys": ["observation", "achieved_goal"]})
    assert draw._position_columns(wide, keys) == (27, 28)
    assert draw._position_columns(spec, keys) is None


def test_gif_round_trip_keeps_count_and_reduces_size():
    frames = [np.full((480, 360, 3), 2 * i, dtype=np.uint8) for i in range(30)]
    data, size = draw.encode_gif(frames)
    read = imageio.imread(io.BytesIO(data), extension=".gif")
    assert size == (240, 180) and read.shape == (30, 240, 180, 3)
    assert read[20].mean() == pytest.approx(40, abs=4)
