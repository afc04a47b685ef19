"""The batches of an epoch, as Lightning wants them: an iterable that knows its length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer

from lit_diffrl.seeding import Place


class Drawing(Protocol):
    """A data module whose batches are drawn by their place in the run."""

    trainer: Trainer | None
    updates_per_epoch: int

    def draw(self, phase: Any, place: Place) -> Any:
        """Draw the batch that a phase learns from at a place."""

    def to(self, device: torch.device) -> None:
        """Keep the data on the device where batches are wanted."""


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
