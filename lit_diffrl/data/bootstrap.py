"""Which transitions an ensemble learns from: some are held out to stop it, each member has its sample of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffrl.seeding import global_seed, mix_seed


def hold_out(usable: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Split transitions at random, always in the same way.

    Args:
        usable: ``(n,)`` transitions.
        count: How many are held out.

    Returns:
        Those held out and those to learn from, in random order.
    """
    order = usable[torch.randperm(len(usable), generator=torch.Generator().manual_seed(0))]
    return order[:count], order[count:]


def bootstrap(n: int, members: int) -> Tensor:
    """Each member's own sample of n transitions, ``(members, n)`` int32 positions, drawn with replacement.

    It is drawn once for a run: members that saw fresh draws in every epoch would come to see the same data.
    """
    fixed = torch.Generator().manual_seed(mix_seed(global_seed(), members))
    return torch.randint(n, (members, n), generator=fixed, dtype=torch.int32)
