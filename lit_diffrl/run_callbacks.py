"""What every run brings to the Trainer: its progress bar, its saved config, and its optimizers' options on resuming."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.profilers import PassThroughProfiler

from lit_diffrl.rollout.results import write_bytes


class SaveRunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run folder when training starts, and never otherwise.

    The names of this very run (``run``, ``ckpt_path``) are left out: the file starts a fresh run of the same settings.

    Args:
        parser: Parser of the subcommand.
        config: What it parsed.
        folder: The run folder.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, folder: Path) -> None:
        super().__init__(parser, config, overwrite=True)
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet: a checkpoint that does not fit has still to be refused."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file on the first process."""
        if not trainer.is_global_zero:
            return
        config = self.config.clone()
        config["run"] = config["ckpt_path"] = None
        write_bytes(self.folder / "config.yaml", self.parser.dump(config, skip_none=False).encode())


class ConfiguredOptimizers(Callback):
    """Lets the configuration decide learning rates and the like when a run is resumed.

    A checkpoint restores the optimizers' options with their state: ``--model.lr`` would have no effect, and a run moved
    from a GPU would keep its fused kernels. So options that are configured otherwise than before are written over what
    was restored; the others stay, as decayed as they are. Where schedulers run, the rates are theirs.
    """

    def __init__(self) -> None:
        self._configured: list[dict[str, Any]] = []
        self._before: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """What is configured now, for the run that continues to compare with."""
        return {"configured": self._configured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take note of what was configured before."""
        self._before = state_dict["configured"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the options before the state is restored."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._configured = [{k: v for k, v in group.items() if k != "params"} for group in groups]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them back."""
        if trainer.lr_scheduler_configs:
            return
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        before = self._before or [{}] * len(groups)
        for group, now, then in zip(groups, self._configured, before, strict=True):
            group.update({k: v for k, v in now.items() if k not in then or then[k] != v})


class RunProgressBar(TQDMProgressBar):
    """One bar per epoch that says which phase it is in and when the whole run will end.

    In a file or a pipe, where a bar cannot redraw itself, each epoch ends with one line instead.
    """

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        super().__init__(refresh_rate=10 if self._live else 0)
        self._phase = ""
        self._since = (0.0, 0.0)
        self._stale: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        """Begin: a run that continues within an epoch is not told that this epoch starts."""
        super().on_train_start(trainer, *args)
        self.on_train_epoch_start(trainer)
        begun, epoch = self._since
        self._since = begun, epoch + self._within(trainer) % 1

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Name the phase and the epoch; a new phase has its own speed, so its clock starts again."""
        super().on_train_epoch_start(trainer, *args)
        phase: str = trainer.lightning_module.phase.name  # type: ignore[union-attr, assignment]
        if phase != self._phase:
            self._phase, self._since = phase, (time.monotonic(), float(trainer.current_epoch))
            # The Trainer goes on showing the losses of networks that have stopped learning.
            shown = trainer.progress_bar_metrics
            self._stale = {k: v for k, v in shown.items() if k.startswith("loss/")}
        self.train_progress_bar.set_description(self._place(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the epoch where there is no bar."""
        super().on_train_epoch_end(trainer, pl_module)
        if not self._live and trainer.is_global_zero:
            items = self.get_metrics(trainer, pl_module).items()
            values = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in items)
            print(f"{self._place(trainer)}: {values}", flush=True)

    def _place(self, trainer: Trainer) -> str:
        return f"{self._phase}, epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Logged losses and score, and the time left at the pace of the current phase, rollouts included."""
        items = {
            k: v
            for k, v in super().get_metrics(trainer, pl_module).items()
            if k != "v_num" and (k not in self._stale or v != self._stale[k])
        }
        left = self.time_left(trainer)
        return items if left is None else {**items, "left": str(left)}

    @staticmethod
    def _within(trainer: Trainer) -> float:
        """How much of the epoch is done."""
        batches = max(trainer.num_training_batches, 1)  # infinite before training
        return trainer.fit_loop.epoch_loop.batch_progress.current.completed / batches

    def time_left(self, trainer: Trainer) -> timedelta | None:
        """Estimate the time to the end of the run; None before the first update."""
        if not trainer.max_epochs or trainer.max_epochs < 0:
            return None
        begun, first_epoch = self._since
        done = trainer.current_epoch - first_epoch + self._within(trainer)
        if done <= 0:
            return None
        remaining = max(trainer.max_epochs - first_epoch - done, 0.0)
        return timedelta(seconds=round((time.monotonic() - begun) / done * remaining))


class NoProfiler(PassThroughProfiler):
    """Lightning's idle profiler without its cost: it makes some ninety generators in every update.

    ``--trainer.profiler simple`` and the like take its place.
    """

    _nothing = nullcontext()

    def profile(self, action_name: str) -> Any:
        """Measure nothing."""
        return self._nothing
