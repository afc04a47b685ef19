"""Offline model selection: which evaluation counts, told by the loss of cloning instead of by the simulator.

Source: Diffusion-QL (Wang et al. 2023, its offline selection and early stop) and the authors' code, which means to take
the evaluation whose mean diffusion loss is the ``top_k``-th smallest, but compares the ranks where it should index with
them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from lit_diffrl.errors import ConfigError, check_choice, check_range
from lit_diffrl.rollout.results import write_bytes
from lit_diffrl.rollout.scores import RunningScores

log = logging.getLogger(__name__)


class OfflineSelection:
    """The mean of a policy's loss over all updates between two evaluations, and the evaluation that it chooses.

    Args:
        select: Whether it chooses at all: ``offline``.
        rank: Rank by the loss of the evaluation that is chosen, 0 for the least.
        early_stop: End the run at the first mean above the one before.

    Attributes:
        means: Epochs of the evaluations with their means.
        chooses: Whether the choice counts.
        measures: Whether losses are needed for anything.
    """

    def __init__(self, select: Literal["online", "offline"], rank: int, early_stop: bool) -> None:
        check_choice("rollout.select", select, ("online", "offline"))
        check_range("rollout.select_rank", rank, 0)
        self.rank, self.early_stop = rank, early_stop
        self.chooses = select == "offline"
        self.measures = self.chooses or early_stop
        self.means = RunningScores()
        self._sum: Tensor | float = 0.0
        self._updates = 0

    def refuse_without_loss(self, pl_module: LightningModule) -> None:
        """Refuse a method without a loss to go by.

        Raises:
            ConfigError: With the option that asks for one.
        """
        if self.measures and getattr(pl_module, "offline_loss", None) is None:
            option = "select 'offline'" if self.chooses else "early_stop true"
            raise ConfigError(
                f"rollout.{option} goes by the loss of a diffusion policy, which {type(pl_module).__name__} has not; "
                "use rollout.select 'online' without rollout.early_stop"
            )

    def count(self, pl_module: LightningModule, outputs: Any) -> None:
        """Count in the loss of an update, if what ``training_step`` returned has one: models of data have none."""
        if self.measures and isinstance(outputs, Mapping) and pl_module.offline_loss in outputs:
            self._sum = self._sum + outputs[pl_module.offline_loss].double()  # type: ignore[index]
            self._updates += 1

    def close(self, trainer: Trainer) -> dict[str, float]:
        """End the period with the evaluation of this epoch, in all processes; returns what there is to log."""
        if not self.measures:
            return {}
        mean = self._shared_sum(trainer) / self._updates
        risen = bool(self.means.history) and mean > self.means.last
        self.means.add(trainer.current_epoch, mean)
        self._sum, self._updates = 0.0, 0
        if self.early_stop and risen:
            trainer.should_stop = True
            log.info("eval/loss rose in epoch %d: the run ends early", trainer.current_epoch)
        return {"eval/loss": mean}

    def _shared_sum(self, trainer: Trainer) -> float:
        """The open period's sum, as the mean over processes."""
        own = torch.as_tensor(self._sum, dtype=torch.float64, device=trainer.strategy.root_device)
        return float(trainer.strategy.reduce(own, reduce_op="mean"))

    def chosen(self) -> tuple[int, float]:
        """Epoch and loss of the evaluation of the rank, or of the last rank if there are fewer."""
        ranked = sorted((loss, epoch) for epoch, loss in self.means.history)
        loss, epoch = ranked[min(self.rank, len(ranked) - 1)]
        return epoch, loss

    def rows(self, unit: str, running: RunningScores) -> list[tuple[str, str]]:
        """The choice, with its score where there are scores, for the end of a run."""
        if not self.chooses or not self.means.history:
            return []
        epoch, loss = self.chosen()
        score = "".join(f"{value:.2f} " for e, value in running.history if e == epoch)
        return [(f"{unit}, offline (rank {self.rank})", f"{score}(epoch {epoch}, loss {loss:.4g})")]

    def state_dict(self, trainer: Trainer) -> dict[str, Any]:
        """Means and the open period, in plain types; asks all processes."""
        return {"means": self.means.state_dict(), "sum": self._shared_sum(trainer), "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved state."""
        self.means.load_state_dict(state["means"])
        self._sum, self._updates = float(state["sum"]), int(state["updates"])


class OfflineCheckpoint(Checkpoint):
    """Keeps the checkpoint of the evaluation that the losses choose as ``best.ckpt``.

    The choice is final only with the last evaluation. Until then it is among the ``rank + 1`` of least loss, which are
    kept beside it as ``candidate-<epoch>.ckpt``.

    Args:
        dirpath: Folder of the checkpoints.
        selection: The losses of this run's evaluations, and the rank that is chosen.
    """

    def __init__(self, dirpath: str, selection: OfflineSelection) -> None:
        self.folder, self.selection = Path(dirpath), selection
        self.kept: dict[int, float] = {}

    def _path(self, epoch: int) -> Path:
        return self.folder / f"candidate-{epoch}.ckpt"

    def _worst(self) -> int:
        return max(self.kept, key=lambda epoch: (self.kept[epoch], epoch))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if this epoch's evaluation is among the candidates, and let ``best.ckpt`` be the chosen one."""
        epoch, history = trainer.current_epoch, self.selection.means.history
        if trainer.fast_dev_run or not history or history[-1][0] != epoch:  # type: ignore[attr-defined]
            return
        self.kept[epoch] = history[-1][1]
        dropped = self._worst() if len(self.kept) > self.selection.rank + 1 else None
        if dropped is not None:
            del self.kept[dropped]
        if dropped == epoch:
            return
        trainer.save_checkpoint(self._path(epoch), weights_only=False)
        if trainer.is_global_zero:
            write_bytes(self.folder / "best.ckpt", self._path(self._worst()).read_bytes())
        if dropped is not None:
            trainer.strategy.remove_checkpoint(self._path(dropped))

    def state_dict(self) -> dict[str, Any]:
        """The candidates."""
        return {"kept": self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.kept = dict(state_dict["kept"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the candidates that are here; a run that branches off has none yet and chooses among its own."""
        if not self.kept:
            return
        here = [epoch for epoch in self.kept if self._path(epoch).is_file()]
        begun = (self.folder / "best.ckpt").is_file()
        here, begun = trainer.strategy.broadcast((here, begun))  # another machine may not see the files
        self.kept = {epoch: self.kept[epoch] for epoch in here}
        if not begun:
            log.warning(
                "no candidates of the offline selection are in %s: it begins anew with this run's evaluations",
                self.folder,
            )
            self.kept = {}
            self.selection.means.load_state_dict(RunningScores().state_dict())
