"""The two errors of the package and the words they are written with.

They are no ValueErrors on purpose: argument parsers take those for a value of the wrong type and report their own.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence

# What synthetic numbers that are not finite tell, and what to do.
DIVERGED = (
    "a model or the policy has diverged; look at the losses of their phases, lower their learning rates, or train in "
    "32-true"
)


class DataError(Exception):
    """A dataset that cannot be used: the message names dataset, place, finding and next step."""


class ConfigError(Exception):
    """An option, name or checkpoint that does not fit: the message names it, its value and what is accepted."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def nearest(name: str, valid: Iterable[str], n: int = 3) -> str:
    """Suggest the names closest to a mistyped one.

    Args:
        name: What was typed.
        valid: Accepted names.
        n: How many suggestions at most.

    Returns:
        ``"did you mean 'a' or 'b'?"``, or an empty string when nothing is close.
    """
    close = difflib.get_close_matches(name, list(valid), n=n, cutoff=0.5)
    return f"did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def check_range(
    name: str,
    value: float,
    low: float = float("-inf"),
    high: float = float("inf"),
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Refuse a number outside an interval.

    Args:
        name: The argument as the user writes it, e.g. ``horizon``.
        value: The value received.
        low: Lower end.
        high: Upper end.
        low_open: Exclude the lower end.
        high_open: Exclude the upper end.

    Raises:
        ConfigError: With the argument, the interval and the value (NaN and infinity are never accepted).
    """
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below and math.isfinite(value)):
        left = "(" if low_open or low == float("-inf") else "["
        right = ")" if high_open or high == float("inf") else "]"
        raise ConfigError(f"{name} must be in {left}{low}, {high}{right}, got {value}")


def check_each(name: str, values: Sequence[float], low: float = float("-inf"), **options: bool) -> None:
    """Refuse a list that is empty or has a number outside an interval; arguments as for :func:`check_range`.

    Raises:
        ConfigError: With the argument and the first such number.
    """
    if len(values) == 0:
        raise ConfigError(f"{name} needs at least one number, got []")
    for value in values:
        check_range(name, value, low, **options)


def check_choice(name: str, value: str, valid: Iterable[str]) -> None:
    """Refuse a word that is not among the accepted ones.

    Raises:
        ConfigError: With the argument, the value, the accepted words and the nearest of them.
    """
    accepted = list(valid)
    if value not in accepted:
        hint = nearest(str(value), accepted)
        raise ConfigError(f"{name} must be one of {', '.join(accepted)}; got {value!r}{'; ' + hint if hint else ''}")
