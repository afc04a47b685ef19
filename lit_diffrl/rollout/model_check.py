"""ModelCheck: models of the dynamics that a method has learnt, measured against the simulator."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_diffrl.errors import check_range
from lit_diffrl.rollout.callback import _checkpoint_name, _rehearsing, _run_folder
from lit_diffrl.rollout.model_errors import (
    ModelErrors,
    closed_loop_errors,
    errors_figure,
    model_errors,
    one_step_errors,
    replayed_errors,
    wholly_observed,
)
from lit_diffrl.rollout.publish import publish
from lit_diffrl.rollout.replay import Simulator
from lit_diffrl.rollout.results import unused_name, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


class ModelCheck(Callback):
    """Compares predicted states with the simulator's, by horizon, on the data's own actions (DyDiff, Fig. 3).

    ``fit`` does so once, when the models are finished and the policy begins to learn; ``test`` with a checkpoint, and
    writes the numbers into ``results/``. The picture goes into TensorBoard (``model/errors``) and ``pictures/``.
    ``test`` also compares the policy's rollouts in the models, after each round of correction, with its own in the
    simulator (``…-rollouts``), which the rounds are to bring closer, with the share of them that ends in either and
    their returns (unless ``data.reward`` changes rewards, or a maze's goals differ); with what the simulator makes of
    their own actions (``…-replayed``); and each of their steps with the simulator's from the same predicted state
    (``…-steps``).

    Logged: ``model/<name>_<horizon>``, mean squared error of a state's entries in units of their deviations; 2 is that
    of a state that has nothing to do with the true one. ``first_state`` is the error of predicting that nothing moves;
    ``recorded_states`` is the simulator's own, below which nothing can be told.

    Args:
        starts: Windows of the data to compare on, spread evenly over it; 0 compares nothing.
    """

    def __init__(self, starts: int = 0) -> None:
        check_range("model_check.starts", starts, 0)
        self.starts = starts

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse data that nothing can be compared on, or an environment that cannot be set to a state, at once."""
        method: Any = pl_module
        if self._wanted(trainer, method):
            trainer.datamodule.recorded(1)  # type: ignore[attr-defined]
            Simulator(method.spec).close()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compare before the policy's first update."""
        method: Any = pl_module
        first = sum(phase.epochs for phase in getattr(method, "model_phases", []))
        if batch_idx or trainer.current_epoch != first or not self.starts:
            return
        folder = _run_folder(trainer)  # asks all processes
        if not self._wanted(trainer, method):
            return
        errors = self._measure(trainer, method)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics({f"model/{name}": value for name, value in errors.at().items()}, step=step)
        publish(trainer, folder, self._figure(method, errors), "model/errors", f"models-epoch={trainer.current_epoch}")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, and write the numbers."""
        method: Any = pl_module
        run = _run_folder(trainer)  # asks all processes
        if not self._wanted(trainer, method):
            return
        folder = run / "results"
        found = {"models": self._measure(trainer, method), **self._measure_rollouts(trainer, method)}
        for kind, errors in found.items():
            name = unused_name(folder, f"{_checkpoint_name(trainer)}-{kind}")
            values = {
                "mean": {k: v.tolist() for k, v in errors.mean.items()},
                "median": {k: v.tolist() for k, v in errors.median.items()},
                "rows": errors.rows.tolist(),
                **{k: v for k, v in (("ended", errors.ended), ("returns", errors.returns)) if v},
            }
            write_json(folder / f"{name}.json", {"dataset": method.spec.dataset_ids, **values})
            publish(trainer, run, self._figure(method, errors), "model/errors", name)
            log.info("wrote %s", folder / f"{name}.json")

    def _wanted(self, trainer: Trainer, method: Any) -> bool:
        known = self.starts > 0 and trainer.is_global_zero and not _rehearsing(trainer)
        return known and bool(getattr(method, "predictors", {}))

    def _measure(self, trainer: Trainer, method: Any) -> ModelErrors:
        obs, actions = trainer.datamodule.recorded(self.starts)  # type: ignore[attr-defined]
        with Simulator(method.spec) as simulator:
            scale = trainer.datamodule.deviations()  # type: ignore[attr-defined]
            return model_errors(simulator, obs.cpu(), actions.cpu(), scale, method.predictors)

    def _measure_rollouts(self, trainer: Trainer, method: Any) -> dict[str, ModelErrors]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        obs, scale = data.spread_states(self.starts), data.deviations()
        loop = method.closed_loop(data.require_windows())
        with Simulator(method.spec) as simulator:
            rollouts = loop.roll_out(obs[wholly_observed(simulator, obs)].cpu())
            comparable = simulator.knows_rewards and data.hparams["reward"] == "none"
            reward = loop.reward if comparable else None
            return {
                "rollouts": closed_loop_errors(simulator, rollouts, loop.policy, scale, method.rule, reward),
                "replayed": replayed_errors(simulator, rollouts, scale, method.rule),
                "steps": one_step_errors(simulator, rollouts, scale, method.rule),
            }

    @staticmethod
    def _figure(method: Any, errors: ModelErrors) -> Figure:
        return errors_figure(errors, f"{type(method).__name__} · {'+'.join(method.spec.dataset_ids)}")
