"""What every method shares: phases, the update counter, seeding, and checkpoints that act."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods.agent import Agent
from lit_diffrl.methods.agreement import (
    meanings,
    refuse_other_arguments,
    refuse_other_data,
    refuse_other_method,
    refuse_other_past,
    refuse_other_shapes,
)
from lit_diffrl.methods.guard import Guard
from lit_diffrl.precision import check_precision
from lit_diffrl.seeding import Draws, Place, global_seed

CHECKPOINT_KEY = "lit_diffrl"
Options = TypeVar("Options")
AnyMethod = TypeVar("AnyMethod", bound="Method")


@dataclass(frozen=True)
class Phase:
    """A stretch of training in which one set of networks learns.

    Args:
        name: What the progress bar shows, e.g. ``diffusion``.
        epochs: Length in epochs of ``updates_per_epoch`` gradient updates.
        batch: What the data module draws in this phase. Of trajectory data, ``bootstraps`` are transitions for each
            member of an ensemble, and ``rows`` transitions without regard to what is held out.
        members: Number of independent batches drawn at once (an ensemble's bootstrap), for transitions.
        batches: Number of batches of transitions that are drawn as one large batch.
    """

    name: str
    epochs: int
    batch: Literal["windows", "transitions", "bootstraps", "rows"] = "windows"
    members: int = 1
    batches: int = 1


def as_options(default: Options, value: Options | Mapping[str, Any]) -> Options:
    """Turn the plain dict of a checkpoint or a notebook into options; what it leaves out is ``default``'s."""
    if isinstance(value, Mapping):
        return dataclasses.replace(default, **value)  # type: ignore[type-var]
    if not isinstance(value, type(default)):
        raise ConfigError(f"options are {value!r}; accepted: {type(default).__name__}(...) or a dict of its fields")
    return value


def plain(value: Any) -> Any:
    """Reduce a hyperparameter to types that ``torch.load(weights_only=True)`` reads back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "as_dict"):  # jsonargparse's Namespace
        return plain(value.as_dict())
    return value


class Method(Agent):
    """Base of all methods: a LightningModule that is also an agent.

    Networks are made in :meth:`build`, once the dataset's dimensions are known: by ``setup`` before training, or
    from the spec that every checkpoint carries. Optimization is manual, so each optimizer step stands in
    ``training_step``. Random numbers of an update are a pure function of (seed, rank, epoch, batch), which is what
    lets a resumed run repeat an uninterrupted one.
    """

    # Arguments that give the weights their meaning without showing in their shapes.
    fixed_arguments: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.draws = Draws()
        self._guard = Guard()
        self._clock: tuple[float, int] | None = None

    # ---------------------------------------------------------------- phases

    @property
    def phases(self) -> list[Phase]:
        """The phases in order; those of zero epochs are left out by :attr:`phase`."""
        raise NotImplementedError

    @property
    def total_epochs(self) -> int:
        """Epochs of all phases: what ``trainer.max_epochs`` is set to."""
        return sum(p.epochs for p in self.phases)

    @property
    def phase(self) -> Phase:
        """The phase of the current epoch (the last one beyond the end)."""
        epoch = self.current_epoch if self._trainer is not None else 0
        active = [p for p in self.phases if p.epochs > 0]
        for phase in active:
            if epoch < phase.epochs:
                return phase
            epoch -= phase.epochs
        return active[-1]

    @property
    def free_data_arguments(self) -> tuple[str, ...]:
        """Arguments of the data module that may change when a run goes on; all others decide what is learnt."""
        return ("dataset", "obs_keys", "env", "batch_size", "updates_per_epoch")  # the first three: see the spec

    # ---------------------------------------------------------------- building

    def build(self, spec: DatasetSpec) -> None:
        """Make the networks for a dataset's dimensions; subclasses extend it and set ``self.spec``."""
        self.spec = spec

    def setup(self, stage: str) -> None:
        """Build the networks from the data module's spec, or check that a built method fits it."""
        check_precision(self.trainer.precision)
        spec: DatasetSpec = self.trainer.datamodule.spec  # type: ignore[attr-defined]
        if self.spec is None:
            self.build(spec)
        else:
            refuse_other_data(self.spec, spec)
            self.spec = spec
        # The Trainer does so after it has loaded a checkpoint, whose float64 would be rounded on the way.
        self.trainer.precision_plugin.convert_module(self)

    def on_fit_start(self) -> None:
        """Refuse processes that would end at their second update: each phase trains some of the networks only."""
        wrapped = self.trainer.model
        if isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters:
            raise ConfigError(
                "--trainer.strategy must look for networks that a phase does not train (find_unused_parameters); add "
                "--config conf/trainer/ddp.yaml, or --trainer.strategy ddp_find_unused_parameters_true"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Give this update its randomness: ``self.draws``, and every other generator a seed of its own."""
        place = Place(self.current_epoch, batch_idx, self.global_rank, self.trainer.world_size)
        self.draws.begin(place, self.device)
        if self._clock is None or batch_idx == 0:
            self._clock = (time.perf_counter(), batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the number of the phase and the speed of its updates, loop and data included, rollouts not."""
        if not self.reporting:
            return
        self.log("phase", float([p.name for p in self.phases].index(self.phase.name)))
        assert self._clock is not None
        begun, first = self._clock
        self.log("time/updates_per_s", (batch_idx + 1 - first) / (time.perf_counter() - begun))

    def on_validation_start(self) -> None:
        """Make sure of the last update before the agent acts."""
        self._guard.settle(self)

    def on_train_end(self) -> None:
        """Make sure of the last update."""
        self._guard.settle(self)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Held-out losses; a method without any has its rollouts alone."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: testing happens in the simulator (:class:`~lit_diffrl.rollout.callback.RolloutEvaluation`)."""

    # ---------------------------------------------------------------- one update

    @property
    def loss_scale(self) -> Tensor | None:
        """What 16-mixed multiplies losses by before their backward pass; None in other precisions."""
        scaler = None if self._trainer is None else getattr(self.trainer.precision_plugin, "scaler", None)
        return None if scaler is None else scaler.scale(torch.ones((), device=self.device))

    def set_cosine_lr(self, optimizer: LightningOptimizer, lr: float) -> None:
        """Set the learning rate that a cosine from ``lr`` to 0 has at this place in the phase.

        A pure function of the place, so that nothing needs saving.
        """
        phases = [p for p in self.phases if p.epochs > 0]
        now = self.phase
        first = sum(p.epochs for p in phases[: phases.index(now)])
        batches = max(1, int(self.trainer.num_training_batches))
        done = self.current_epoch - first + self.trainer.fit_loop.epoch_loop.batch_idx / batches
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done / now.epochs)))

    def clip_gradients_of(self, optimizer: LightningOptimizer, limit: float | None = None) -> Tensor:
        """Measure the norm of an optimizer's gradients, and shorten them to ``limit``.

        Norm and limit know nothing of the loss scale of 16-mixed, which the gradients keep until the optimizer's step
        divides them by it. The step may also change it: with several optimizers, call backward, this and step for one
        after the other.

        Args:
            optimizer: Whose parameters' gradients.
            limit: Largest norm left; None measures only.

        Returns:
            The norm before clipping, a scalar.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
        scale = self.loss_scale
        if scale is not None:
            norm = norm / scale
        if limit is not None:
            # Gradients without a finite norm stay as they are: the guard has yet to describe them.
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm.nan_to_num(nan=0.0, posinf=0.0))
        return norm

    def guard(self, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor], batch: Any) -> None:
        """Stop the run when a loss or a gradient is not finite, before the optimizer can spoil the weights.

        Args:
            losses: Scalars by log name.
            norms: Norms of gradients by log name.
            batch: What they were computed from.

        Raises:
            ConfigError: With method, phase, update and every number; the rest is in the run folder's
                ``not_finite.json``.
        """
        scale = self.loss_scale
        if scale is not None:
            # 16-mixed meets infinite gradients by design: its scaler skips the step and halves its scale, in vain when
            # they are infinite at any scale.
            norms = {"1 / loss scale": scale.double().reciprocal()}
        self._guard.check(self, {**losses, **norms}, batch, self.draws.place)

    def mean_of_all(self, x: Tensor) -> Tensor:
        """Mean over the rows of all processes, without gradient: what a batch is normalised by is the whole batch's."""
        mean = x.detach().mean()
        return mean if self._trainer is None else self.trainer.strategy.reduce(mean, reduce_op="mean")  # type: ignore[return-value]

    def diagnose(self, batch: Any) -> dict[str, float]:
        """What else tells why an update of this batch failed, e.g. ``{"max |Q|": 1e9}``; called when one has."""
        return {}

    def recorded_steps(self, steps: Tensor) -> Tensor:
        """Those of a batch's steps of the dataset that it was learnt from; all, but where rows were replaced."""
        return steps

    @property
    def reporting(self) -> bool:
        """Whether this update is shown: every ``log_every_n_steps``-th in the curves, an epoch's first in the bar only.

        What is logged at other updates goes nowhere but costs as much; so compute and log it only here.
        """
        if self._trainer is None:
            return False
        loop, every = self.trainer.fit_loop.epoch_loop, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (loop.batch_idx == 0 or (loop.total_batch_idx + 1) % every == 0)

    def report(self, values: Mapping[str, Tensor], *, prog_bar: bool = False) -> None:
        """Log scalars by name if this update is a :attr:`reporting` one, averaged over processes."""
        if self.reporting:
            detached = {name: value.detach() for name, value in values.items()}
            self.log_dict(detached, prog_bar=prog_bar, sync_dist=self.trainer.world_size > 1)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the spec and the class, in plain types, so that the file alone can act."""
        assert self.spec is not None
        self._guard.check_weights(self)
        checkpoint[CHECKPOINT_KEY] = {
            "method": f"{type(self).__module__}.{type(self).__qualname__}",
            "spec": self.spec.to_dict(),
            "phases": [[p.name, p.epochs] for p in self.phases],
            "seed": global_seed(),
        }
        if "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"] = plain(checkpoint["hyper_parameters"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the networks from the saved spec, or refuse a checkpoint of other data."""
        own = checkpoint.get(CHECKPOINT_KEY)
        if own is None:
            raise ConfigError("the checkpoint was not written by lit_diffrl: it has no dataset spec")
        refuse_other_method(own["method"], type(self))
        saved = DatasetSpec.from_dict(own["spec"])
        if self.spec is None:
            self.build(saved)
        else:
            refuse_other_data(saved, self.spec)
        refuse_other_shapes(checkpoint["state_dict"], self.state_dict())
        saved_arguments, arguments = checkpoint.get("hyper_parameters", {}), plain(self.hparams)
        refuse_other_arguments("model", self.fixed_arguments, saved_arguments, arguments)
        before, now = meanings(saved_arguments), meanings(arguments)
        refuse_other_arguments("model", [name for name in before if name in now], before, now)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            phases = [(p.name, p.epochs) for p in self.phases]
            refuse_other_past(own.get("phases", []), phases, checkpoint["epoch"] + 1)
            before = checkpoint.get("datamodule_hyper_parameters", {})
            now = self.trainer.datamodule.hparams  # type: ignore[attr-defined]
            fixed = [name for name in before if name[0] != "_" and name not in self.free_data_arguments]
            refuse_other_arguments("data", fixed, before, now)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls: type[AnyMethod], checkpoint_path: str | Path, map_location: Any = "cpu", **kwargs: Any
    ) -> AnyMethod:
        """As :func:`lit_diffrl.load`; Lightning's own calls what the file names, and imports it before.

        Args:
            checkpoint_path: A file written by ``fit``.
            map_location: Where to put the networks.
            kwargs: Arguments of the method in place of those saved.

        Raises:
            ConfigError: As :func:`lit_diffrl.load`, or when the checkpoint is of another method.
        """
        from lit_diffrl.methods.loading import load_agent

        agent = load_agent(checkpoint_path, map_location or "cpu", **kwargs)
        if not isinstance(agent, cls):
            raise ConfigError(f"{checkpoint_path} is a checkpoint of {type(agent).__name__}, not of {cls.__name__}")
        return agent
