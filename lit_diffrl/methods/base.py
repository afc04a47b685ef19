"""What every method shares: phases, the update counter, seeding, checkpoints that act, and the agent interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods.agreement import (
    refuse_other_arguments,
    refuse_other_data,
    refuse_other_past,
    refuse_other_shapes,
)
from lit_diffrl.seeding import global_seed, mix_seed

CHECKPOINT_KEY = "lit_diffrl"
Options = TypeVar("Options")


@dataclass(frozen=True)
class Phase:
    """A stretch of training in which one set of networks learns.

    Args:
        name: What the progress bar shows, e.g. ``diffusion``.
        epochs: Length in epochs of ``updates_per_epoch`` gradient updates.
        batch: What the data module draws in this phase.
        members: Number of independent batches drawn at once (an ensemble's bootstrap), for transitions.
    """

    name: str
    epochs: int
    batch: Literal["windows", "transitions"] = "windows"
    members: int = 1


def as_options(default: Options, value: Options | Mapping[str, Any]) -> Options:
    """Turn the plain dict of a checkpoint or a notebook into options; what it leaves out is ``default``'s."""
    return dataclasses.replace(default, **value) if isinstance(value, Mapping) else value  # type: ignore[type-var]


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


class Method(LightningModule):
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
        self.spec: DatasetSpec | None = None
        self._generators: list[torch.Generator] = []

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
    def can_act(self) -> bool:
        """Whether the acting networks have been trained at all; before that no rollout is worth its time."""
        return self.spec is not None

    # ---------------------------------------------------------------- building

    def build(self, spec: DatasetSpec) -> None:
        """Make the networks for a dataset's dimensions; subclasses extend it and set ``self.spec``."""
        self.spec = spec

    def setup(self, stage: str) -> None:
        """Build the networks from the data module's spec, or check that a built method fits it."""
        spec: DatasetSpec = self.trainer.datamodule.spec  # type: ignore[attr-defined]
        if self.spec is None:
            self.build(spec)
        else:
            refuse_other_data(self.spec, spec)
            self.spec = spec

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed this update's noise from its place in the run."""
        torch.manual_seed(mix_seed(global_seed(), self.global_rank, self.current_epoch, batch_idx))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Held-out losses; a method without any has its rollouts alone."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: testing happens in the simulator (:class:`~lit_diffrl.rollout.callback.RolloutEvaluation`)."""

    # ---------------------------------------------------------------- guard

    def guard(self, losses: Mapping[str, Tensor]) -> None:
        """Stop the run when a loss is not finite, before the optimizer can spoil the weights.

        Args:
            losses: Scalars by log name.

        Raises:
            ConfigError: With method, phase, update and every loss of this update.
        """
        if bool(torch.stack([v.detach().float() for v in losses.values()]).isfinite().all()):
            return
        if self._trainer is not None and getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return  # 16-mixed meets infinities by design: its scaler skips the step and lowers the scale
        values = ", ".join(f"{k} = {v.detach().float().mean().item():.4g}" for k, v in losses.items())
        place = f"epoch {self.current_epoch}" if self._trainer is not None else "outside a run"
        raise ConfigError(
            f"{type(self).__name__}, phase {self.phase.name}, {place}: a loss is not finite ({values}); the last "
            "checkpoint is intact. Try a smaller learning rate (--model.lr) or gradient clipping "
            "(--model.grad_clip 1.0)"
        )

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the spec and the class, in plain types, so that the file alone can act."""
        assert self.spec is not None
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
        saved = DatasetSpec.from_dict(own["spec"])
        if self.spec is None:
            self.build(saved)
        else:
            refuse_other_data(saved, self.spec)
        refuse_other_shapes(checkpoint["state_dict"], self.state_dict())
        refuse_other_arguments(self.fixed_arguments, checkpoint.get("hyper_parameters", {}), self.hparams)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            phases = [(p.name, p.epochs) for p in self.phases]
            refuse_other_past(own.get("phases", []), phases, checkpoint["epoch"] + 1)

    # ---------------------------------------------------------------- agent

    def reset(self, mask: Sequence[bool] | np.ndarray | None = None, seeds: Sequence[int] | None = None) -> None:
        """Begin new episodes: forget what is remembered between steps and reseed the sampling noise.

        Args:
            mask: ``(n,)`` rows that begin a new episode; None for all rows (of any later number).
            seeds: One seed per row of ``mask`` (or, without a mask, per row); None draws fresh ones.
        """
        if mask is None:
            self._generators = [] if seeds is None else [torch.Generator().manual_seed(int(s)) for s in seeds]
            return
        rows = np.asarray(mask, dtype=bool)
        self._ensure_generators(len(rows))
        for i in np.flatnonzero(rows).tolist():
            self._generators[i] = torch.Generator()
            if seeds is None:
                self._generators[i].seed()
            else:
                self._generators[i].manual_seed(int(seeds[i]))

    def _ensure_generators(self, n: int) -> None:
        while len(self._generators) < n:
            generator = torch.Generator()
            generator.seed()
            self._generators.append(generator)

    def row_noise(self, rows: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Standard normal noise ``(len(rows), *shape)``, each row from its own episode's stream.

        Drawn on the CPU, so that an episode's noise depends neither on the device nor on its neighbours.
        """
        self._ensure_generators(max(rows) + 1)
        noise = torch.stack([torch.randn(tuple(shape), generator=self._generators[r]) for r in rows])
        return noise.to(self.device)

    def act(self, obs: Any, active: Sequence[bool] | np.ndarray | None = None) -> Any:
        """Choose actions.

        Args:
            obs: One observation ``(obs_dim,)``, a batch ``(n, obs_dim)``, or the environment's own dict of such
                arrays (needed when the goal changes between episodes); numpy or torch, raw units.
            active: ``(n,)`` rows to act on; the others get zeros. None for all.

        Returns:
            Actions in raw units within the action bounds, of the kind and batch form of ``obs``: ``(action_dim,)``
            or ``(n, action_dim)``, float32.
        """
        if self.spec is None:
            raise ConfigError(f"{type(self).__name__} has no networks yet: load a checkpoint or fit first")
        state, goal = self.spec.split_obs(obs)
        rows = np.arange(len(state)) if active is None else np.flatnonzero(np.asarray(active, dtype=bool))
        action = np.zeros((len(state), self.spec.action_dim), dtype=np.float32)
        if len(rows):
            with torch.inference_mode(False), torch.no_grad():
                chosen = self.choose_action(
                    torch.as_tensor(state[rows], device=self.device).clone(),
                    None if goal is None else torch.as_tensor(goal[rows], device=self.device).clone(),
                    rows.tolist(),
                )
            action[rows] = chosen.float().cpu().numpy()
        action = np.clip(action, self.spec.action_low, self.spec.action_high).astype(np.float32)
        sample = next(iter(obs.values())) if isinstance(obs, Mapping) else obs
        if self.spec.is_single(obs):
            action = action[0]
        return torch.as_tensor(action, device=sample.device) if isinstance(sample, Tensor) else action

    def choose_action(self, state: Tensor, goal: Tensor | None, rows: list[int]) -> Tensor:
        """Choose actions for some rows of the batch of environments.

        Args:
            state: ``(len(rows), obs_dim)`` raw observations.
            goal: ``(len(rows), goal_dim)`` raw goals, or None.
            rows: Index of each row among the environments: what state between steps is kept under.

        Returns:
            ``(len(rows), action_dim)`` actions in raw units.
        """
        raise NotImplementedError
