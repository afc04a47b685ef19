"""The two checkpoints of a run: its last state and its best evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint with the highest return in the simulator.

    Evaluations are rarer than epochs, begin only when the method can act, and never come without an environment;
    Lightning's own class stops the run when its metric is missing, this one waits. It watches the return, not the
    score: the score is an increasing function of it and needs reference returns, which not every dataset has.

    Args:
        dirpath: Folder of the checkpoints; null for the logger's.
        filename: Name without ``.ckpt``.
        monitor: Logged metric, the higher the better.
    """

    def __init__(self, dirpath: str | None = None, filename: str = "best", monitor: str = "eval/return") -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode="max",
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def _waits(self, trainer: Trainer) -> bool:
        return self.monitor not in trainer.callback_metrics

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Do nothing: evaluations happen between epochs."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if this epoch's evaluation is the best so far."""
        if not self._waits(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if this evaluation is the best so far."""
        if not self._waits(trainer):
            super().on_validation_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Carry on with the best evaluation so far, if its checkpoint is here.

        Lightning's own class goes by the path of that file and forgets it when the run's folder has been moved. A run
        that branches off has none yet and begins anew.
        """
        assert self.dirpath is not None
        path = str(Path(self.dirpath, f"{self.filename}{self.FILE_EXTENSION}"))
        score = state_dict["best_model_score"]
        if score is None or not Path(path).is_file():
            return
        self.best_model_path = self.kth_best_model_path = path
        self.best_model_score = self.kth_value = self.current_score = score
        self.best_k_models = {path: score}


class LastCheckpoint(ModelCheckpoint):
    """Keeps the state after the latest epoch, from which the run continues.

    Args:
        dirpath: Folder of the checkpoints; null for the logger's.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        super().__init__(dirpath, "last", save_on_train_epoch_end=True, enable_version_counter=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the curves up to here before the checkpoint that continues them."""
        for logger in trainer.loggers:
            logger.save()
        super().on_train_epoch_end(trainer, pl_module)
