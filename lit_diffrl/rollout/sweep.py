"""Several ways to act on the same episodes: a table, a picture, and plain values for the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lit_diffrl.rollout.episodes import EpisodeResult, summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, COLORS = "#1b1f27", ("#21618c", "#c0392b", "#1e8449", "#7d3c98")


class Variant(Protocol):
    """What is known of a way to act."""

    axis: str
    value: float
    curve: str
    enter: Callable[[], AbstractContextManager[None]]


class Point(NamedTuple):
    """What came of one way to act.

    Args:
        axis: What is varied.
        value: Its value.
        curve: Which curve over the values this is a point of.
        results: Its episodes.
    """

    axis: str
    value: float
    curve: str
    results: list[EpisodeResult]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        summary, episodes = summarize(self.results), [r.to_dict() for r in self.results]
        return {self.axis: self.value, "curve": self.curve, "summary": summary, "episodes": episodes}


def compare(variants: Iterable[Variant], play: Callable[[], list[EpisodeResult]]) -> list[Point]:
    """Play the same episodes in every way."""
    points = []
    for variant in variants:
        with variant.enter():
            points.append(Point(variant.axis, variant.value, variant.curve, play()))
    return points


def spread(point: Point) -> tuple[str, float, float]:
    """``score`` or, without reference returns, ``return``; its mean; and the standard error of that."""
    summary = summarize(point.results)
    unit = "return" if summary["score"] is None else "score"
    return unit, summary[unit]["mean"], summary[unit]["std"] / len(point.results) ** 0.5


def comparison(points: Sequence[Point]) -> str:
    """The table: a line for each value, a column for each curve."""
    curves = list(dict.fromkeys(p.curve for p in points))
    unit = spread(points[0])[0]
    cells = {(p.curve, p.value): "{1:.1f} ± {2:.1f}".format(*spread(p)) for p in points}
    head = [points[0].axis, *(f"{unit}, {curve}" for curve in curves)]
    lines = [head]
    for value in dict.fromkeys(p.value for p in points):
        lines.append([f"{value:g}", *(cells.get((curve, value), "") for curve in curves)])
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Set cells in columns, the first line over a rule."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)) for line in lines]
    return "\n".join([rows[0], "─" * len(rows[0]), *rows[1:]])


def sweep_figure(points: Sequence[Point], title: str) -> Figure:
    """Draw the mean over the values with its standard error, a line for each curve; not registered with pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), facecolor="white", layout="constrained")
    axis = figure.subplots()
    unit = spread(points[0])[0]
    for curve, color in zip(dict.fromkeys(p.curve for p in points), COLORS):
        own = sorted((p.value, *spread(p)[1:]) for p in points if p.curve == curve)
        values, means, errors = zip(*own)
        axis.errorbar(values, means, yerr=errors, color=color, marker="o", markersize=4, capsize=3, label=curve)
    axis.set_xlabel(points[0].axis, color=INK)
    axis.set_ylabel(f"{unit} ± standard error", color=INK)
    axis.set_title(title, fontsize=9, color=INK)
    axis.grid(color="#d8dbe2", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return figure
