"""The batches of an epoch, as Lightning wants them: an iterable that knows its length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer

from lit_diffrl.seeding import Place, global_seed, mix_seed


class Drawing(Protocol):
    """A data module whose batches are drawn by their place in the run."""

    trainer: Trainer | None
    updates_per_epoch: int

    def draw(self, phase: Any, place: Place) -> Any:
        """Draw the batch that a phase learns from at a place."""

    def to(self, device: torch.device) -> None:
        """Keep the data on the device where batches are wanted."""


class Blocks:
    """Indices drawn for many updates at once: what an update costs is then a look-up.

    Args:
        size: Updates of a block.
    """

    def __init__(self, size: int = 64) -> None:
        self.size = size
        self._key: tuple[Any, ...] = ()
        self._rows: list[Any] = []

    def row(self, phase: Any, place: Place, draw: Callable[[Any, Place, torch.Generator], list[Any]]) -> Any:
        """What ``draw`` has for an update.

        Args:
            phase: What the update belongs to.
            place: The update.
            draw: ``(phase, place, generator) -> rows``, one for each update of the block.
        """
        block, index = divmod(place.index, self.size)
        key = (phase, replace(place, index=block), global_seed())
        if self._key != key:
            # Mixed with one number more than the seeds of updates: noise and batches have nothing in common.
            generator = torch.Generator().manual_seed(mix_seed(global_seed(), place.epoch, block, self.size))
            self._key, self._rows = key, draw(phase, place, generator)
        return self._rows[index]


class BatchStream:
    """The batches of one epoch. Batch i is a function of its place alone, so that a resumed run draws the same.

    Args:
        data: Draws the batches.
    """

    def __init__(self, data: Drawing) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.updates_per_epoch

    def __iter__(self) -> Iterator[Any]:
        trainer = self.data.trainer
        assert trainer is not None
        self.data.to(trainer.strategy.root_device)
        # A run resumed in the middle of an epoch has already used this many batches.
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        phase = trainer.lightning_module.phase
        for index in range(done, len(self)):
            yield self.data.draw(phase, Place(trainer.current_epoch, index, trainer.global_rank, trainer.world_size))
