"""RolloutEvaluation: the place where training meets the simulator."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.errors import ConfigError, check_range
from lit_diffrl.nets.prepared import prepared_once
from lit_diffrl.precision import constant_weights
from lit_diffrl.rollout import pictures as draw
from lit_diffrl.rollout.environments import rehearse
from lit_diffrl.rollout.episodes import EpisodeResult, run_episodes, summarize
from lit_diffrl.rollout.results import duration, table, unused_name, write_bytes, write_json
from lit_diffrl.rollout.scores import RunningScores
from lit_diffrl.rollout.selection import OfflineSelection
from lit_diffrl.rollout.sweep import Variant, compare, comparison, sweep_figure

log = logging.getLogger(__name__)
REHEARSAL = {"episodes": 2, "max_steps": 5}  # under --trainer.fast_dev_run


class RolloutEvaluation(Callback):
    """Evaluates the agent in the simulator and logs its return, score, episode length and speed.

    ``fit`` evaluates after the first epoch in which the agent can act, then after every ``every_n_epochs``-th, counted
    from that one (a run with models of its own and one with lent models are asked alike), and after the last;
    ``validate`` repeats exactly those episodes with a checkpoint, and so gives the score that was logged when it was
    saved; ``test`` runs other, unseen episodes and writes ``results/<checkpoint>-test.json`` into the run's folder
    (``-test-2`` and so on when there is one already). Several processes share the episodes and log the same numbers.
    Where a method names several ways to act (degrees of guidance, say), ``test`` plays the same episodes in each,
    prints a table, adds them to the results as ``comparison`` and draws them into ``pictures/``.

    Logged: ``eval/return`` (mean undiscounted return), ``eval/score`` (0 = random policy, 100 = reference policy,
    if the dataset names both), ``eval/length`` (steps), ``eval/action_ms`` (time to choose an action, per environment
    step), ``eval/score_rat`` (mean of the last ``rat_window`` evaluations) and ``eval/score_oms`` (best evaluation so
    far); the last two are ``eval/return_rat`` and ``eval/return_oms`` when there are no scores. A healthy score
    rises and then holds; RAT far below OMS means that single evaluations are luck. With offline selection or early stop
    also ``eval/loss``, the mean ``loss/diffusion`` over all updates since the evaluation before.

    Args:
        episodes: Episodes of an evaluation during ``fit`` and ``validate``.
        num_envs: Environments that step side by side in each process; the results do not depend on it.
        every_n_epochs: Epochs between evaluations.
        seed: Seed of the first episode; episode k has seed + k, in every evaluation the same.
        max_steps: Stop episodes after this many steps; null for the environment's own limit.
        pictures: Draw plans and walked paths of mazes, into TensorBoard and ``pictures/``.
        video: Animate the first episode, into TensorBoard and ``pictures/``; needs OpenGL and some seconds.
        rat_window: Evaluations that ``eval/score_rat`` averages.
        select: Which evaluation ``best.ckpt`` is of: the one of highest return (``online``), or, without asking the
            simulator, the one that ``eval/loss`` chooses (``offline``, Diffusion-QL's own; diffusion policies alone).
        select_rank: Rank by that loss of the evaluation that ``offline`` takes, 0 the least: Diffusion-QL's ``top_k``.
        early_stop: End the run at the first evaluation whose ``eval/loss`` is above that of the one before.
        mixed: Act in the Trainer's mixed precision too, rather than in that of the weights; where many actions are
            denoised at once that is faster.
        test_episodes: Episodes of ``test``.
        test_seed: Seed of the first episode of ``test``.
    """

    def __init__(
        self,
        episodes: int = 10,
        num_envs: int = 10,
        every_n_epochs: int = 1,
        seed: int = 1_000,
        max_steps: int | None = None,
        pictures: bool = True,
        video: bool = False,
        rat_window: int = 10,
        select: Literal["online", "offline"] = "online",
        select_rank: int = 0,
        early_stop: bool = False,
        mixed: bool = False,
        test_episodes: int = 50,
        test_seed: int = 10_000,
    ) -> None:
        positive = {
            "episodes": episodes,
            "num_envs": num_envs,
            "every_n_epochs": every_n_epochs,
            "rat_window": rat_window,
            "test_episodes": test_episodes,
        }
        for name, value in positive.items():
            check_range(f"rollout.{name}", value, 1)
        for name, value in {"seed": seed, "test_seed": test_seed}.items():
            check_range(f"rollout.{name}", value, 0)
        if max_steps is not None:
            check_range("rollout.max_steps", max_steps, 1)
        if seed < test_seed + test_episodes and test_seed < seed + episodes:
            raise ConfigError(
                f"rollout.test_seed {test_seed} would test on episodes seen during fit (seeds {seed} to "
                f"{seed + episodes - 1}); choose one of at least {seed + episodes}"
            )
        self.episodes, self.num_envs, self.every_n_epochs, self.seed = episodes, num_envs, every_n_epochs, seed
        self.max_steps, self.mixed = max_steps, mixed
        self.test_episodes, self.test_seed = test_episodes, test_seed
        self.scores = RunningScores(rat_window)
        self.returns = RunningScores(rat_window)
        self.offline = OfflineSelection(select, select_rank, early_stop)
        self.gallery = draw.Gallery(pictures, video)
        self._earlier_seconds = 0.0
        self._started: float | None = None

    # ---------------------------------------------------------------- stages

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to act in a mixed precision that the Trainer does not have."""
        if self.mixed and not trainer.precision.endswith("-mixed"):
            raise ConfigError(
                f"rollout.mixed acts in the Trainer's mixed precision, but --trainer.precision is {trainer.precision}; "
                "give bf16-mixed or 16-mixed, or leave rollout.mixed out"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an environment that this installation cannot build before any time is spent on training."""
        self._started = time.monotonic()
        self.offline.refuse_without_loss(pl_module)
        if self._has_env(pl_module):
            rehearse(_spec(pl_module), self.max_steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so when no evaluation will take place."""
        if not trainer.is_global_zero:
            return
        if not self._has_env(pl_module):
            missing = "evaluation and scores" if self.offline.chooses else "evaluation, best.ckpt and scores"
            log.warning("the dataset names no environment: training goes on without %s", missing)
        elif not trainer.enable_validation:
            log.warning("no validation batches (--trainer.limit_val_batches 0?): the agent will not be evaluated")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so when ``validate`` has no simulator to ask."""
        if trainer.state.fn == TrainerFn.VALIDATING and not self._has_env(pl_module) and trainer.is_global_zero:
            log.warning("the dataset names no environment: there is no score to validate")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count in the loss of the update."""
        self.offline.count(pl_module, outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate: an epoch of ``fit`` that is due, or ``validate``."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if trainer.sanity_checking or (fitting and not (pl_module.can_act and self._due(trainer))):
            return
        if fitting:
            self._log(pl_module, self.offline.close(trainer))
        if not self._has_env(pl_module):
            return
        results = self._evaluate(trainer, pl_module, self.episodes, self.seed)
        metrics = self._metrics(results)
        name = f"epoch={trainer.current_epoch}" if fitting else f"{_checkpoint_name(trainer)}-validate"
        if fitting:
            self.returns.add(trainer.current_epoch, metrics["eval/return"])
            kind, running = "eval/return", self.returns
            if "eval/score" in metrics:
                self.scores.add(trainer.current_epoch, metrics["eval/score"])
                kind, running = "eval/score", self.scores
            metrics |= {f"{kind}_rat": running.rat, f"{kind}_oms": running.oms}
        self._log(pl_module, metrics)
        self._show(trainer, pl_module, results, name)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the unseen episodes and write what came of them."""
        if not self._has_env(pl_module):
            raise ConfigError("the dataset names no environment (env_spec): there is nothing to test in")

        def play() -> list[EpisodeResult]:
            return self._evaluate(trainer, pl_module, self.test_episodes, self.test_seed)

        variants: list[Variant] = getattr(pl_module, "variants", list)()
        points = compare(variants, play) if len(variants) > 1 else []
        results = points[0].results if points else play()
        self._log(pl_module, self._metrics(results))
        folder = _run_folder(trainer) / "results"
        name = unused_name(folder, f"{_checkpoint_name(trainer)}-test")
        self._show(trainer, pl_module, results, name)
        if not trainer.is_global_zero or _rehearsing(trainer):
            return
        path = folder / f"{name}.json"
        write_json(
            path,
            {
                "method": type(pl_module).__name__,
                "dataset": _spec(pl_module).dataset_ids,
                "environment": json.loads(_spec(pl_module).env_spec or "{}").get("id"),
                "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "seeds": [self.test_seed, self.test_seed + self.test_episodes - 1],
                "summary": summarize(results),
                "episodes": [r.to_dict() for r in results],
                "options": dict(pl_module.hparams),
                **({"comparison": [point.to_dict() for point in points]} if points else {}),
            },
        )
        log.info("wrote %s", path)
        if points:
            title = f"{type(pl_module).__name__} · {'+'.join(_spec(pl_module).dataset_ids)} · {name}"
            picture = draw.encode_png(draw.figure_pixels(sweep_figure(points, title)))
            write_bytes(folder.parent / "pictures" / f"{name}-comparison.png", picture)
            print(comparison(points), flush=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the run with its figures."""
        if trainer.is_global_zero and self._evaluations and not _rehearsing(trainer):
            print(table(self._closing_rows(trainer, pl_module)), flush=True)

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Evaluations so far and time spent, so that a resumed run carries on its RAT, OMS and clock."""
        return {
            "scores": self.scores.state_dict(),
            "returns": self.returns.state_dict(),
            "seconds": self._earlier_seconds + self._elapsed(),
        }

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the losses, which all processes have a part in."""
        if self.offline.measures:
            checkpoint["callbacks"][self.state_key]["offline"] = self.offline.state_dict(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Carry on from a checkpoint."""
        self.scores.load_state_dict(state_dict["scores"])
        self.returns.load_state_dict(state_dict["returns"])
        self._earlier_seconds = float(state_dict["seconds"])
        if "offline" in state_dict:
            self.offline.load_state_dict(state_dict["offline"])

    def _elapsed(self) -> float:
        return 0.0 if self._started is None else time.monotonic() - self._started

    # ---------------------------------------------------------------- evaluating

    @staticmethod
    def _has_env(pl_module: LightningModule) -> bool:
        return _spec(pl_module).env_spec is not None

    @property
    def _evaluations(self) -> list[tuple[int, float]]:
        """Epochs and returns of those so far; where there is no environment, the losses in their place."""
        return self.returns.history or self.offline.means.history

    def _due(self, trainer: Trainer) -> bool:
        epoch = trainer.current_epoch
        evaluations = self._evaluations
        if not evaluations or epoch + 1 == trainer.max_epochs:
            return True
        first, latest = evaluations[0][0], evaluations[-1][0]
        # Asked less often (check_val_every_n_epoch), it makes up for those that it has missed.
        return (epoch - first + 1) // self.every_n_epochs > (latest - first + 1) // self.every_n_epochs

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, episodes: int, seed: int) -> list[EpisodeResult]:
        if not pl_module.can_act:
            raise ConfigError(
                f"{type(pl_module).__name__} cannot act yet: the checkpoint was saved before the phase that trains "
                "what acts; continue with 'fit --ckpt_path last'"
            )
        max_steps = self.max_steps
        if _rehearsing(trainer):
            episodes, max_steps = min(episodes, REHEARSAL["episodes"]), REHEARSAL["max_steps"]
        with constant_weights(trainer) if self.mixed else prepared_once(long=True):
            own = run_episodes(
                _spec(pl_module),
                pl_module,  # type: ignore[arg-type]
                episodes=range(trainer.global_rank, episodes, trainer.world_size),
                num_envs=self.num_envs,
                seed=seed,
                max_steps=max_steps,
                record=draw.PANELS if self.gallery.plans else 0,
                render=self.gallery.video and not _rehearsing(trainer),
            )
        if trainer.world_size == 1:
            return own
        parts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(parts, own)
        return sorted((r for part in parts for r in part), key=lambda r: r.seed)

    @staticmethod
    def _metrics(results: Sequence[EpisodeResult]) -> dict[str, float]:
        summary = summarize(results)
        metrics = {
            "eval/return": summary["return"]["mean"],
            "eval/length": summary["length"]["mean"],
            "eval/action_ms": summary["action_ms"],
        }
        if summary["score"] is not None:
            metrics["eval/score"] = summary["score"]["mean"]
        return metrics

    @staticmethod
    def _log(pl_module: LightningModule, metrics: dict[str, float]) -> None:
        shown = "eval/score" if "eval/score" in metrics else "eval/return"
        for name, value in metrics.items():
            # Every process has the same number; sync_dist leaves it and keeps Lightning from warning.
            pl_module.log(name, value, prog_bar=name == shown, on_epoch=True, sync_dist=True)

    # ---------------------------------------------------------------- showing

    def _show(self, trainer: Trainer, pl_module: LightningModule, results: Sequence[EpisodeResult], name: str) -> None:
        folder = _run_folder(trainer) / "pictures"  # asks all processes
        fitting = trainer.state.fn == TrainerFn.FITTING
        nowhere = not trainer.loggers and (fitting or trainer.ckpt_path is None)
        if nowhere or not trainer.is_global_zero or _rehearsing(trainer):
            return
        boards = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        title = f"{type(pl_module).__name__} · {'+'.join(_spec(pl_module).dataset_ids)} · {name}"
        # The axis of self.log: batches, where trainer.global_step would count every optimizer's steps.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.gallery.hang(_spec(pl_module), results, title, folder / name, boards, step)

    def _closing_rows(self, trainer: Trainer, pl_module: LightningModule) -> list[tuple[str, str]]:
        running, unit = (self.scores, "score") if self.scores.history else (self.returns, "return")
        rows = [
            ("method", type(pl_module).__name__),
            ("dataset", "+".join(_spec(pl_module).dataset_ids)),
            ("epochs", str(trainer.current_epoch)),
            *running.rows(unit),
            *self.offline.rows(unit, running),
        ]
        if unit == "score":
            rows.append(("return, last", f"{self.returns.last:.2f}"))
        rows += [
            ("evaluation", f"{self.episodes} episodes, seeds {self.seed} to {self.seed + self.episodes - 1}"),
            ("time", duration(self._earlier_seconds + self._elapsed())),
        ]
        return rows


def _spec(pl_module: LightningModule) -> DatasetSpec:
    return cast(DatasetSpec, pl_module.spec)


def _rehearsing(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _checkpoint_name(trainer: Trainer) -> str:
    return Path(trainer.ckpt_path).stem if trainer.ckpt_path else "unsaved"


def _run_folder(trainer: Trainer) -> Path:
    """Folder of the run: the one that holds the checkpoint's folder, or where this run logs."""
    if trainer.state.fn != TrainerFn.FITTING and trainer.ckpt_path:
        folder = Path(trainer.ckpt_path).absolute().parent
        return folder.parent if folder.name == "checkpoints" else folder
    return Path(trainer.log_dir or trainer.default_root_dir)
