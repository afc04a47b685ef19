"""The phase in which a method fits its world model: what DMEMM, and every method that ranks by a model, does first."""

from __future__ import annotations

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.windows import TransitionBatch
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods.base import Method
from lit_diffrl.methods.options import WorldModelOptions
from lit_diffrl.methods.world_model import WorldModel

SCALE_SAMPLE = 100_000  # transitions that the scales of the targets are measured on


class WorldModelPhase(Method):
    """A method with a world model that is fitted in the phase ``world_model`` and frozen afterwards.

    Attributes:
        world_model: The networks, present where :attr:`uses_world_model`.
        epochs: Epochs by phase name.
        reward_scale: What raw rewards are divided by.
    """

    world_model: WorldModel
    world_model_options: WorldModelOptions
    epochs: dict[str, int]
    reward_scale: float

    @property
    def uses_world_model(self) -> bool:
        """Whether anything needs the reward and transition models."""
        raise NotImplementedError

    def build_world_model(self, spec: DatasetSpec) -> None:
        """Make the networks, with rewards bounded by the data's."""
        o = self.world_model_options
        self.world_model = WorldModel(
            spec.obs_dim,
            spec.action_dim,
            members=o.members,
            elites=o.elites,
            hidden=o.hidden,
            layers=o.layers,
            reward_hidden=o.reward_hidden,
            reward_layers=o.reward_layers,
            reward_activation=o.reward_activation,
            reward_members=o.reward_members,
            reward_pessimism=o.reward_pessimism,
            variance_floor=o.variance_floor,
            patience=o.patience,
            improvement=o.improvement,
            reward_low=spec.reward_min / self.reward_scale,
            reward_high=spec.reward_max / self.reward_scale,
        )

    def world_model_loss(self, batch: TransitionBatch) -> dict[str, Tensor]:
        """Likelihood of the transitions under every member that has not stopped, squared error of the reward."""
        model = self.world_model
        nll = model.transition_loss(batch.obs, batch.action, batch.next_obs)
        reward = model.reward_loss(batch.obs[0], batch.action[0], batch.reward[0] / self.reward_scale)
        return {"total": torch.where(model.stopped, 0.0, nll).sum() + reward, "dynamics": nll.mean(), "reward": reward}

    def on_fit_start(self) -> None:
        """Refuse a run whose world model would never be validated: its best weights could not be told."""
        super().on_fit_start()
        epochs, every = self.epochs["world_model"], self.trainer.check_val_every_n_epoch or 1
        if epochs and (self.trainer.limit_val_batches == 0 or every > epochs):
            raise ConfigError(
                f"the world model needs a validation within its {epochs} epochs, got --trainer.limit_val_batches "
                f"{self.trainer.limit_val_batches} and --trainer.check_val_every_n_epoch {every}; how often to roll "
                "out is set by --rollout.every_n_epochs"
            )

    def on_train_epoch_start(self) -> None:
        """Open the world model's phase (scales of its targets) and close it (best weights, elites)."""
        if not self.uses_world_model:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.current_epoch == 0:
            sample = data.transitions(data.usable[:SCALE_SAMPLE])
            self.world_model.fit_scales(self.to_own(sample.next_obs - sample.obs))
        elif self.current_epoch == self.epochs["world_model"]:
            self.world_model.finish()
            held_out = [self.to_own(x[0]) for x in data.held_out_transitions()]
            self.calibrate(held_out[0], held_out[1], held_out[3])

    def calibrate(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> None:
        """Measure what a method needs of the finished world model.

        Args:
            obs: ``(N, obs_dim)`` held-out states, normalised.
            action: ``(N, action_dim)`` normalised.
            next_obs: ``(N, obs_dim)`` normalised.
        """

    def validation_step(self, batch: TransitionBatch, batch_idx: int) -> None:
        """Held-out loss of the world model, which decides when its members stop."""
        fitting = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if fitting and self.phase.name == "world_model":
            reward = batch.reward[0] / self.reward_scale
            logs = self.world_model.validate(batch.obs[0], batch.action[0], batch.next_obs[0], reward)
            # All processes have the same numbers; sync_dist leaves them and keeps Lightning from warning.
            self.log_dict({f"val/{k}": v for k, v in logs.items()}, sync_dist=self.trainer.world_size > 1)
