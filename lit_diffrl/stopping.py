"""Stopping a run so that it goes on as if it had not been stopped: on Ctrl-C, SIGTERM and a cluster's warning."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

REQUEUE = getattr(signal, "SIGUSR1", None)  # what `sbatch --signal=USR1@…` sends before the time is up
AGREE_EVERY = 16  # updates between two rounds in which several processes ask each other


class StopAfterUpdate(Callback):
    """Ends a run between two updates, after saving ``last.ckpt``, when a signal asks for it.

    Saving in the midst of an update would tear it: half the networks stepped, the averages behind. During an evaluation
    the run stops after it, since its score belongs to the epoch's checkpoint. A second Ctrl-C stops at once, and what
    came after the last checkpoint is then done again on resuming.

    On SIGUSR1 in a SLURM job the job is queued again after saving.

    Args:
        path: The checkpoint to write; None stops without saving.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._saved = False

    # ---------------------------------------------------------------- signals

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, in place of the Trainer's own handlers: they act wherever in an update the process happens to be."""
        if threading.current_thread() is not threading.main_thread():
            return
        launcher: Any = trainer.strategy.launcher

        def note(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.received is not None:
                raise KeyboardInterrupt
            if self.received is None:
                self.received = number
                if number != signal.SIGINT and hasattr(launcher, "kill"):
                    launcher.kill(number)  # the processes that this one started
                if trainer.is_global_zero:
                    # Not print: the interrupted code may be within a write of its own.
                    os.write(sys.stderr.fileno(), _notice(number, trainer).encode())

        for number in (signal.SIGINT, signal.SIGTERM, REQUEUE):
            if number is not None:
                self._before[number] = signal.signal(number, note)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no more."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self._restore()

    # ---------------------------------------------------------------- stopping

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between two updates if asked to; after the last one of an epoch its evaluation comes first."""
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if last or not self._agreed(trainer, batch_idx):
            return
        if self.path is not None:
            for logger in trainer.loggers:
                logger.save()
            trainer.save_checkpoint(self.path)
        self._saved = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop, now that the Trainer has logged the update that was saved."""
        if self._saved:
            self._stop(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop, now that the epoch has been evaluated and saved."""
        if self._agreed(trainer, 0):
            self._stop(trainer)

    def _agreed(self, trainer: Trainer, batch_idx: int) -> bool:
        asked = self.received is not None
        if trainer.world_size == 1:
            return asked
        return batch_idx % AGREE_EVERY == 0 and trainer.strategy.reduce_boolean_decision(asked, all=False)

    def _stop(self, trainer: Trainer) -> None:
        trainer.strategy.barrier("stopping")
        if self.received == REQUEUE and trainer.is_global_zero and "SLURM_JOB_ID" in os.environ:
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
        raise SIGTERMException


def _notice(number: int, trainer: Trainer) -> str:
    when = "this evaluation" if trainer.validating else "this update"
    again = " (Ctrl-C again stops at once)" if number == signal.SIGINT else ""
    return f"\n{signal.Signals(number).name}: saving and stopping after {when}{again}\n"
