"""Where randomness comes from: one seed for a run, hashed with the place in the run where it is used."""

from __future__ import annotations

import os

import numpy as np


def mix_seed(*numbers: int) -> int:
    """Hash integers, e.g. (seed, epoch, rank, batch), to one 63-bit seed: nearby inputs, unrelated streams."""
    high, low = np.random.SeedSequence([int(n) for n in numbers]).generate_state(2)
    return (int(high) << 31) ^ int(low)


def global_seed() -> int:
    """Return the run's seed, set by ``--seed_everything`` (0 when none was set)."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
