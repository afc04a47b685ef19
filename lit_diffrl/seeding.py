"""Where randomness comes from: one seed for a run, hashed with the place in the run where it is used.

Nothing random is carried from one update to the next, so a checkpoint needs no generator states: an update that is
repeated after a crash draws what it drew before.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def mix_seed(*numbers: int) -> int:
    """Hash integers, e.g. (seed, epoch, rank, batch), to one 63-bit seed: nearby inputs, unrelated streams."""
    high, low = np.random.SeedSequence([len(numbers), *(int(n) for n in numbers)]).generate_state(2)
    return (int(high) << 31) ^ int(low)


def global_seed() -> int:
    """Return the run's seed, set by ``--seed_everything`` (0 when none was set)."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch (the CPU's generator and the device's), numpy and Python.

    ``torch.manual_seed`` does more and takes fifty times as long, too much for every update.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@dataclass(frozen=True)
class Place:
    """Where an update stands in the run, and which of its rows a process has.

    The batch of an update is drawn as a whole, and each process takes its rows of it: ``n`` processes with
    ``batch_size`` rows each see what one process with ``n * batch_size`` rows sees.

    Args:
        epoch: Epoch of the run.
        index: Batch of the epoch.
        rank: Process.
        world_size: Number of processes.
    """

    epoch: int
    index: int
    rank: int = 0
    world_size: int = 1

    def seed(self, *purpose: int) -> int:
        """Seed of this update for one of several purposes, the same in all processes."""
        return mix_seed(global_seed(), self.epoch, self.index, *purpose)

    def generator(self, *purpose: int) -> torch.Generator:
        """Generator on the CPU with that seed."""
        return torch.Generator().manual_seed(self.seed(*purpose))

    def randint(self, high: int, shape: tuple[int, ...], *purpose: int) -> Tensor:
        """Integers in ``[0, high)`` of ``shape``: this process's columns of those drawn for all."""
        *rows, size = shape
        whole = torch.randint(high, (*rows, self.world_size * size), generator=self.generator(*purpose))
        return whole[..., self.rank * size : (self.rank + 1) * size]


class Draws:
    """The noise of an update, drawn for all processes' rows, of which each takes its own.

    Args:
        place: The update; None draws from torch's global generator, as outside of a run.
        device: Where the numbers are drawn.
    """

    def __init__(self, place: Place | None = None, device: torch.device | None = None) -> None:
        self.place = place or Place(0, 0)
        self._generator = None
        if place is not None:
            self._generator = torch.Generator(device or "cpu").manual_seed(place.seed(3))

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal numbers like ``x``, whose first dimension is the batch."""
        return self._own(torch.randn((self._whole(len(x)), *x.shape[1:]), **self._options(x)))

    def randint(self, low: int, high: int, like: Tensor) -> Tensor:
        """Integers ``(B,)`` in ``[low, high)``, one for each row of ``like``."""
        options = {**self._options(like), "dtype": torch.int64}
        return self._own(torch.randint(low, high, (self._whole(len(like)),), **options))

    def _whole(self, rows: int) -> int:
        return rows * self.place.world_size

    def _own(self, whole: Tensor) -> Tensor:
        rows = len(whole) // self.place.world_size
        return whole[self.place.rank * rows : (self.place.rank + 1) * rows]

    def _options(self, x: Tensor) -> dict[str, Any]:
        return {"generator": self._generator, "dtype": x.dtype, "device": x.device}
