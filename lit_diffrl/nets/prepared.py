"""Weights as products take them, rounded or packed, prepared once where many calls of a network follow each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Prepared(NamedTuple):
    """A weight, held so that its identity stays its own, its version then, and what it was made into."""

    weight: Tensor
    version: int
    value: Tensor


class _Region(threading.local):
    table: dict[tuple[int, str, torch.dtype], _Prepared] | None = None
    long = False


_region = _Region()


@contextmanager
def prepared_once(*, long: bool = False) -> Iterator[None]:
    """Prepare each weight once until the end, for what calls networks many times while nobody changes them.

    Autocast's own cache knows no inference mode, no averaged or target networks (whose weights want no gradient) and,
    as Lightning switches it off, no updates; so each of a solver's calls would round all weights anew, which on a CPU
    takes as long as the products of 50 rows. Where gradients are recorded nothing happens. Regions may lie within each
    other, and it serves as a decorator, too.

    Weights must stay as they are within. Changes that torch counts are noticed; those by a fused optimizer or through
    ``.data`` are not. What :func:`~lit_diffrl.nets.linear.fixed` has settled notices none.

    Args:
        long: Hundreds of calls will follow, which is when laying weights out for oneDNN pays, too: for those of one
            chain it costs what it saves.
    """
    before = _region.table, _region.long
    _region.table, _region.long = before[0] if before[0] is not None else {}, before[1] or long
    try:
        yield
    finally:
        _region.table, _region.long = before


def in_long_region() -> bool:
    """Whether a region of :func:`prepared_once` is open that was called long."""
    return _region.long


def once(weight: Tensor, kind: str, dtype: torch.dtype, make: Callable[[Tensor], Tensor]) -> Tensor | None:
    """What ``make`` makes of a parameter, made once within :func:`prepared_once`; None elsewhere.

    Args:
        weight: A parameter; None is given back for what is none, or has no count of its changes.
        kind: Name of what is made.
        dtype: Type of what is made.
        make: Called with the weight; again after a change that torch counts.
    """
    table = _region.table
    if table is None or torch.is_grad_enabled() or not isinstance(weight, nn.Parameter) or weight.is_inference():
        return None
    key, version = (id(weight), kind, dtype), weight._version
    found = table.get(key)
    if found is None or found.version != version:
        found = table[key] = _Prepared(weight, version, make(weight))
    return found.value


def rounded(weight: Tensor) -> Tensor:
    """A weight as a product under autocast takes it: a parameter rounded once, if a region is open; else as it is."""
    if _region.table is None or weight.dtype != torch.float32:
        return weight
    device = weight.device.type
    if not torch.is_autocast_enabled(device):
        return weight
    dtype = torch.get_autocast_dtype(device)
    found = once(weight, "rounded", dtype, lambda w: w.to(dtype))
    return weight if found is None else found
