"""What the agent planned and where it went: maze figures and short animations."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_diffrl.rollout.environments import make_env
from lit_diffrl.rollout.episodes import EpisodeResult
from lit_diffrl.rollout.results import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lit_diffrl.data.spec import DatasetSpec

WALL, FLOOR, INK = "#3b4252", "#f5f6f8", "#1b1f27"
COLORS = "viridis"
GIF_FPS = 20
GIF_SIZE = 240  # pixels along the longer side, about
PANELS = 6  # episodes in a picture


@dataclass(frozen=True)
class Maze:
    """A maze as drawn: everything in the coordinates of the observations.

    Args:
        walls: ``(n, 2)`` centres of the wall cells.
        cell: Side of a cell.
        extent: ``(x_min, x_max, y_min, y_max)``.
        columns: The two dimensions of a state that are the position, or None when it is not part of the state.
    """

    walls: np.ndarray
    cell: float
    extent: tuple[float, float, float, float]
    columns: tuple[int, int] | None

    @classmethod
    def from_spec(cls, spec: DatasetSpec) -> Maze | None:
        """Read the map of the dataset's environment; None when it is not a maze."""
        assert spec.env_spec is not None
        env: Any = make_env(spec.env_spec)
        try:
            layout = getattr(env.unwrapped, "maze", None)
            spaces = getattr(env.observation_space, "spaces", None)
            if layout is None or not hasattr(layout, "maze_map") or not isinstance(spaces, dict):
                return None
            cells = [(r, c, value) for r, row in enumerate(layout.maze_map) for c, value in enumerate(row)]
            centres = np.array([layout.cell_rowcol_to_xy(np.array([r, c])) for r, c, _ in cells], dtype=np.float64)
            # Our own mazes may show the simulator's axes turned and shifted.
            rotation = getattr(env.unwrapped, "rotation", np.eye(2))
            centres = centres @ rotation.T + getattr(env.unwrapped, "translation", np.zeros(2))
            cell = float(layout.maze_size_scaling)
            low, high = centres.min(0) - cell / 2, centres.max(0) + cell / 2
            sizes = {key: space.shape[0] for key, space in spaces.items()}
        finally:
            env.close()
        walls = centres[[value == 1 for _, _, value in cells]]
        return cls(walls, cell, (low[0], high[0], low[1], high[1]), _position_columns(spec, sizes))


def _position_columns(spec: DatasetSpec, sizes: dict[str, int]) -> tuple[int, int] | None:
    keys = list(spec.obs_keys or [])
    if "achieved_goal" in keys:
        first = sum(sizes[key] for key in keys[: keys.index("achieved_goal")])
        return first, first + 1
    # A point's state begins with its position; a walking robot's leaves it out.
    return (0, 1) if keys[:1] == ["observation"] and sizes["observation"] == 4 else None


def maze_figure(maze: Maze, results: Sequence[EpisodeResult], title: str) -> Figure:
    """Draw recorded episodes in their maze, one panel each.

    Args:
        maze: The map.
        results: Episodes run with ``record``.
        title: Line above the panels.

    Returns:
        A figure of its own, not registered with pyplot. Plans are dots coloured by plan time, the first one in full
        and later ones faintly; the walked path is a line.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = {1: 1, 2: 2, 4: 2}.get(len(results), 3)
    rows = -(-len(results) // columns)
    x_min, x_max, y_min, y_max = maze.extent
    # Inches: panels of one width, gaps that hold their titles, a heading and a legend.
    panel_width, gap_x, gap_y, left, top, bottom = 3.2, 0.12, 0.34, 0.1, 0.62, 0.5
    panel_height = panel_width * (y_max - y_min) / (x_max - x_min)
    full_width = columns * panel_width + (columns - 1) * gap_x + 2 * left
    full_height = rows * panel_height + (rows - 1) * gap_y + top + bottom
    figure = Figure(figsize=(full_width, full_height), facecolor="white")
    figure.subplots_adjust(
        left=left / full_width, right=1 - left / full_width, wspace=gap_x / panel_width,
        bottom=bottom / full_height, top=1 - top / full_height, hspace=gap_y / panel_height,
    )  # fmt: skip
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, result in zip(axes.flat, results):
        _draw_maze(axis, maze)
        _draw_episode(axis, maze, result)
    for axis in axes.flat[len(results) :]:
        axis.set_axis_off()
    marker: dict[str, Any] = {"linestyle": "none", "markeredgecolor": INK}
    handles = [
        Line2D([], [], marker="o", color="white", markersize=7, label="start", **marker),
        Line2D([], [], marker="*", color="#f2b632", markersize=12, label="goal", **marker),
        Line2D([], [], color=INK, linewidth=1.4, label="walked"),
    ]
    if any(result.plans for result in results) and maze.columns is not None:
        dot: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 5}
        handles += [
            Line2D([], [], color="#440154", label="plan, first steps", **dot),
            Line2D([], [], color="#21918c", label="middle", **dot),
            Line2D([], [], color="#fde725", label="last steps", **dot),
        ]
    figure.suptitle(title, fontsize=10.5 if columns > 1 else 8.5, color=INK, y=1 - 0.1 / full_height, va="top")
    figure.legend(
        handles=handles, loc="lower center", ncols=3 if columns == 1 else 6, fontsize=7.5, frameon=False,
        handletextpad=0.3, columnspacing=1.2, labelcolor=INK,
    )  # fmt: skip
    return figure


def _draw_maze(axis: Axes, maze: Maze) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    side = maze.cell
    squares = [Rectangle((x - side / 2, y - side / 2), side, side) for x, y in maze.walls]
    axis.add_collection(PatchCollection(squares, facecolor=WALL, edgecolor=WALL, linewidth=0.5))
    axis.set(xlim=maze.extent[:2], ylim=maze.extent[2:], xticks=[], yticks=[], aspect="equal", facecolor=FLOOR)
    axis.spines[:].set_visible(False)


def _draw_episode(axis: Axes, maze: Maze, result: EpisodeResult) -> None:
    if maze.columns is not None:
        for i, (_, plan) in enumerate(result.plans):
            points = plan[:, list(maze.columns)]
            time = np.linspace(0, 1, len(points))
            style: dict[str, Any] = {"alpha": 0.95, "s": 13} if i == 0 else {"alpha": 0.3, "s": 4}
            axis.scatter(points[:, 0], points[:, 1], c=time, cmap=COLORS, linewidths=0, zorder=4 - 0.1 * i, **style)
    walked = result.position
    if walked is None and maze.columns is not None and result.path is not None:
        walked = result.path[:, list(maze.columns)]
    if walked is not None:
        axis.plot(*walked.T, color="white", linewidth=3.0, alpha=0.7, zorder=5, solid_capstyle="round")
        axis.plot(*walked.T, color=INK, linewidth=1.4, zorder=6, solid_capstyle="round")
        axis.plot(*walked[0], "o", color="white", markeredgecolor=INK, markersize=8, zorder=8)
    if result.goal is not None:
        axis.plot(*result.goal[:2], "*", color="#f2b632", markeredgecolor=INK, markersize=15, zorder=7)
    score = "" if result.score is None else f" · score {result.score:.0f}"
    axis.set_title(f"return {result.return_:.4g}{score}", fontsize=8.5, color=INK, pad=4)
    axis.text(
        0.015, 0.01, f"seed {result.seed}, {result.length} steps", transform=axis.transAxes, fontsize=6.5,
        color=FLOOR, zorder=9,
    )  # fmt: skip


def figure_pixels(figure: Figure, dpi: int = 120) -> np.ndarray:
    """Rasterise a figure: ``(height, width, 3)`` uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode ``(height, width, 3)`` uint8 as PNG."""
    import imageio.v3 as imageio

    data = io.BytesIO()
    imageio.imwrite(data, pixels, extension=".png")
    return data.getvalue()


def encode_gif(frames: Sequence[np.ndarray]) -> tuple[bytes, tuple[int, int]]:
    """Encode pictures as an endless GIF, which needs no video codec and plays in TensorBoard's image tab.

    Args:
        frames: ``(height, width, 3)`` uint8 each, of one size.

    Returns:
        The file's bytes and the ``(height, width)`` they were reduced to.
    """
    import imageio.v3 as imageio

    every = max(1, max(frames[0].shape[:2]) // GIF_SIZE)
    small = np.stack([frame[::every, ::every] for frame in frames])
    data = io.BytesIO()
    imageio.imwrite(data, small, extension=".gif", duration=1000 / GIF_FPS, loop=0)
    return data.getvalue(), (small.shape[1], small.shape[2])


def add_gif(board: Any, tag: str, data: bytes, size: tuple[int, int], step: int) -> None:
    """Put an encoded animation into TensorBoard, whose own writer would need a video package.

    Args:
        board: A ``torch.utils.tensorboard.SummaryWriter``.
        tag: Name, e.g. ``eval/video``.
        data: The GIF file's bytes.
        size: ``(height, width)``.
        step: Place on the x-axis.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    height, width = size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
    board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


class Gallery:
    """The pictures of a run's evaluations, on disk and in TensorBoard.

    Args:
        plans: Draw plans and walked paths of mazes.
        video: Animate the first episode.
    """

    def __init__(self, plans: bool, video: bool) -> None:
        self.plans, self.video = plans, video
        self._maze: Maze | None = None
        self._maze_read = False

    def hang(
        self,
        spec: DatasetSpec,
        results: Sequence[EpisodeResult],
        title: str,
        path: Path,
        boards: Sequence[Any],
        step: int,
    ) -> None:
        """Draw an evaluation.

        Args:
            spec: Of the dataset, whose environment may be a maze.
            results: The evaluation's episodes.
            title: Above the maze.
            path: Of the files, without their suffixes.
            boards: TensorBoard's writers.
            step: Where on their axis.
        """
        if self.plans:
            if not self._maze_read:
                self._maze, self._maze_read = Maze.from_spec(spec), True
            if self._maze is not None:
                pixels = figure_pixels(maze_figure(self._maze, results[:PANELS], title))
                write_bytes(path.with_name(f"{path.name}.png"), encode_png(pixels))
                for board in boards:
                    board.add_image("eval/plans", pixels, step, dataformats="HWC")
        if self.video and results[0].frames:
            data, size = encode_gif(results[0].frames)
            write_bytes(path.with_name(f"{path.name}.gif"), data)
            for board in boards:
                add_gif(board, "eval/video", data, size, step)
