"""Stopping a run so that it goes on as if it had not been stopped: on Ctrl-C, SIGTERM and a cluster's warning."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_diffrl.errors import ConfigError

REQUEUE = getattr(signal, "SIGUSR1", None)  # what `sbatch --signal=USR1@…` sends before the time is up
AGREE_EVERY = 16  # updates between two rounds in which several processes ask each other
STDERR = 2


class StopAfterUpdate(Callback):
    """Ends a run between two updates, after saving ``last.ckpt``, when a signal asks for it.

    Saving in the midst of an update would tear it: half the networks stepped, the averages behind. During an evaluation
    the run stops after it, since its score belongs to the epoch's checkpoint. A second Ctrl-C stops at once, and what
    came after the last checkpoint is then done again on resuming. ``validate`` and ``test`` have nothing to save and
    end at once.

    On SIGUSR1 in a SLURM job the job is queued again after saving.

    Args:
        path: The checkpoint to write; None stops without saving.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    # ---------------------------------------------------------------- signals

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, in place of the Trainer's own handlers: they act wherever in an update the process happens to be."""
        if trainer.received_sigterm:  # a moment ago, when they were the ones to listen
            self.received = signal.SIGTERM
        self._listen(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen in ``validate``, where the Trainer's own handlers let an evaluation run to its end."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._listen(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen in ``test``."""
        self._listen(trainer)

    def _listen(self, trainer: Trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        launcher: Any = trainer.strategy.launcher
        fitting = trainer.state.fn == TrainerFn.FITTING

        def note(number: int, frame: FrameType | None) -> None:
            if self.received is not None:
                if number == signal.SIGINT:
                    raise KeyboardInterrupt
                return
            self.received = number
            if number != signal.SIGINT and hasattr(launcher, "kill"):
                launcher.kill(number)  # the processes that this one started; Ctrl-C reaches them by itself
            if not fitting:
                raise SIGTERMException
            if trainer.is_global_zero:
                # Not print: the interrupted code may be within a write of its own.
                with contextlib.suppress(OSError):
                    os.write(STDERR, _notice(number, trainer).encode())

        for number in (signal.SIGINT, signal.SIGTERM, REQUEUE) if fitting else (signal.SIGTERM,):
            # A run in the background of a script ignores Ctrl-C, which is not meant for it.
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, note)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen no more."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self._restore()

    # ---------------------------------------------------------------- stopping

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save and stop if asked to: the update before is done and logged, this one not begun.

        Before the first update of an epoch ``last.ckpt`` is there already.
        """
        if not self._agreed(trainer, batch_idx):
            return
        if self.path is not None and batch_idx > 0:
            self._save(trainer, self.path)
        trainer.strategy.barrier("stopping")
        if self.received == REQUEUE and trainer.is_global_zero and "SLURM_JOB_ID" in os.environ:
            requeue(os.environ["SLURM_JOB_ID"])
        raise SIGTERMException

    def _agreed(self, trainer: Trainer, batch_idx: int) -> bool:
        asked = self.received is not None
        if trainer.world_size == 1:
            return asked
        return batch_idx % AGREE_EVERY == 0 and trainer.strategy.reduce_boolean_decision(asked, all=False)

    @staticmethod
    def _save(trainer: Trainer, path: Path) -> None:
        for logger in trainer.loggers:
            logger.save()
        # The Trainer has fetched and counted the batch that is not begun: it belongs to the run that continues.
        progress = trainer.fit_loop.epoch_loop.batch_progress
        progress.current.ready -= 1
        progress.total.ready -= 1
        progress.is_last_batch = False
        trainer.save_checkpoint(path, weights_only=False)


def requeue(job: str) -> None:
    """Queue a SLURM job again.

    Raises:
        ConfigError: If SLURM does not do it.
    """
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        problem = done.stderr.strip() or f"it ended with {done.returncode}" if done.returncode else ""
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        raise ConfigError(
            f"the run is saved, but its job could not be queued again: {' '.join(command)}: {problem}; submit it anew"
        )


def _notice(number: int, trainer: Trainer) -> str:
    when = "this evaluation" if trainer.validating else "this update"
    again = " (Ctrl-C again stops at once)" if number == signal.SIGINT else ""
    return f"\n{signal.Signals(number).name}: saving and stopping after {when}{again}\n"
