"""Support actions: what the behaviour model does in every state of a dataset, drawn once.

Sources: QGPO (Lu et al. 2023, section 4.2) and SfBC (Chen et al. 2023).

The state after a transition is nearly always the state of the next one, and may share its actions then, which halves
the draws; a terminal state has no value and needs none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.seeding import Place, global_seed, mix_seed

_log = logging.getLogger(__name__)

ROWS = 4096  # actions drawn together: the fastest on a CPU, whose caches then hold a layer
PURPOSE = 0x5C0EE  # keeps this noise apart from that of updates


class States(NamedTuple):
    """The states of the transitions, then those next states that have actions of their own.

    Args:
        obs: ``(M, S)``; the first N are those of the transitions.
        after: ``(N,)`` place in ``obs`` of each transition's next state; its own where it ended.
    """

    obs: Tensor
    after: Tensor


def states_of(transitions: PolicyBatch, shared: bool = True) -> States:
    """Collect the states of transitions in their order in the data.

    Args:
        transitions: All of the data.
        shared: Let the state after a transition be that of the next one where they are the same.
    """
    obs, next_obs = transitions.obs, transitions.next_obs
    count = len(obs)
    after = torch.arange(count, device=obs.device)
    follows = torch.zeros(count, dtype=torch.bool, device=obs.device)
    if shared:
        follows[:-1] = (next_obs[:-1] == obs[1:]).all(dim=1)
    after[follows] += 1
    alone = ~follows & (transitions.done == 0)
    after[alone] = count + torch.arange(int(alone.sum()), device=obs.device)
    return States(torch.cat([obs, next_obs[alone]]), after)


def in_chunks(
    like: Tensor, shape: tuple[int, ...], place: Place, compute: Callable[[int, slice], Tensor], what: str
) -> Tensor:
    """Fill a table of one row for each state, chunk by chunk, the chunks shared among processes.

    Args:
        like: ``(M, ...)``, whose number of rows, type and device the table has.
        shape: Of a row, its first entry the number of actions.
        place: Whose share of the chunks is filled; the rest is 0, so that the sum over processes is the table.
        compute: ``(number, rows) -> (rows, *shape)``, a pure function of a chunk.
        what: What is computed, for the log.

    Returns:
        ``(M, *shape)``.
    """
    table = like.new_zeros(len(like), *shape)
    chunk = max(1, ROWS // shape[0])
    numbers = range(place.rank, -(-len(like) // chunk), place.world_size)
    _log.info("%s in %d states (%.0f MB)", what, len(like), table.numel() * table.element_size() / 1e6)
    begun = shown = time.monotonic()
    for done, number in enumerate(numbers, start=1):
        rows = slice(number * chunk, min((number + 1) * chunk, len(like)))
        table[rows] = compute(number, rows)
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            share = done / len(numbers)
            _log.info("%s: %.0f %%, %.0f s left", what, 100 * share, (shown - begun) * (1 / share - 1))
    return table


def chunk_noise(number: int, rows: slice, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise ``(rows, *shape)`` of a chunk: a function of the run's seed, on every device the same."""
    generator = torch.Generator().manual_seed(mix_seed(global_seed(), number, rows.start, rows.stop, PURPOSE))
    # float32 whatever the default is, which the Trainer changes under 64-true
    return torch.randn((rows.stop - rows.start, *shape), generator=generator, dtype=torch.float32)
