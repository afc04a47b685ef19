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

    def seed(self) -> int:
        """Seed of this update, the same in all processes."""
        return mix_seed(global_seed(), self.epoch, self.index)

    def share(self, size: int) -> slice:
        """This process's rows of ``size`` that are drawn for all."""
        own = size // self.world_size
        return slice(self.rank * own, (self.rank + 1) * own)


class Draws:
    """The noise of an update, drawn for all processes' rows, of which each takes its own.

    Outside of a run it comes from torch's global generator.
    """

    def __init__(self) -> None:
        self.place = Place(0, 0)
        self._generator: torch.Generator | None = None

    def begin(self, place: Place, device: torch.device) -> None:
        """Seed the noise of an update, and every other generator with seeds of their own."""
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device)
        seed = place.seed()
        self.place = place
        self._generator.manual_seed(seed)
        seed_generators(seed + 1 + place.rank, device)

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal numbers like ``x``, whose first dimension is the batch; the same in every precision."""
        size = len(x) * self.place.world_size
        whole = torch.randn((size, *x.shape[1:]), dtype=torch.float32, **self._where(x))
        return whole[self.place.share(size)].to(x.dtype)

    def randint(self, low: int, high: int, like: Tensor) -> Tensor:
        """Integers ``(B,)`` in ``[low, high)``, one for each row of ``like``."""
        size = len(like) * self.place.world_size
        return torch.randint(low, high, (size,), **self._where(like))[self.place.share(size)]

    def coin(self) -> int:
        """0 or 1, the same in all processes; read from the update's seed, so that no device is waited for."""
        return self.place.seed() >> 40 & 1

    def _where(self, x: Tensor) -> dict[str, Any]:
        return {"generator": self._generator, "device": x.device}
