"""Numbers that a specification prints, to be met to the last digit."""

from __future__ import annotations

from typing import Any

import pytest


def digits(number: str) -> Any:
    """What rounds to a printed number: half a unit of its last digit, and next to nothing for ties."""
    mantissa, _, exponent = number.partition("e")
    unit = int(exponent or 0) - len(mantissa.partition(".")[2])
    return pytest.approx(float(number), rel=0, abs=0.5001 * 10.0**unit)


def printed(line: str) -> list[Any]:
    """The same for each number of a line."""
    return [digits(number) for number in line.split()]
