"""What learners with a diffusion policy share: its networks, the critics' target, selection among candidates."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Adam, Optimizer

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.errors import ConfigError, check_choice, check_range
from lit_diffrl.methods.base import as_options
from lit_diffrl.methods.diffusion_policy import DiffusionPolicy, Noised
from lit_diffrl.methods.losses import td_target
from lit_diffrl.methods.offline_learner import OfflineLearner
from lit_diffrl.methods.options import EMAOptions
from lit_diffrl.methods.policy_options import (
    ActionSamplerOptions,
    CriticOptions,
    NoiseNetOptions,
    SamplerChanges,
    SelectionOptions,
)
from lit_diffrl.nets.ema import EMA

SCHEDULES = ("vp", "linear", "linear_unscaled", "cosine")
POLICY_EMA = EMAOptions(every=5, start=1001)


class DiffusionLearner(OfflineLearner):
    """A diffusion policy, its average, and twin critics.

    Attributes:
        policy: The policy that learns.
        policy_ema: Its average, which draws the actions of the critics' targets.
        action_approximation: Whether the critic judges the action of EDP's Eq. 9.
        clip_approximation: Whether that is kept within the box.
        act_with: Who acts: the ``policy`` that learns, or its ``average``.
    """

    action_approximation: bool
    clip_approximation = True
    act_with: Literal["policy", "average"] = "policy"

    fixed_arguments = ("schedule", "n_diffusion_steps")
    offline_loss = "loss/diffusion"
    ema_offset = 0

    def _keep(
        self,
        policy_epochs: int,
        n_diffusion_steps: int,
        schedule: str,
        sampler: ActionSamplerOptions,
        eval_sampler: SamplerChanges | None,
        selection: SelectionOptions,
        net: NoiseNetOptions,
        critic: CriticOptions,
        ema: EMAOptions,
        lr: float,
        lr_decay: Literal["none", "cosine"],
        grad_clip: float | None,
    ) -> None:
        """Check and keep the arguments that all of them have."""
        check_choice("model.schedule", schedule, SCHEDULES)
        check_choice("model.lr_decay", lr_decay, ("none", "cosine"))
        check_range("model.n_diffusion_steps", n_diffusion_steps, 1)
        check_range("model.lr", lr, 0, low_open=True, high_open=True)
        if grad_clip is not None:
            check_range("model.grad_clip", grad_clip, 0, low_open=True, high_open=True)
        check_range("model.policy_epochs", policy_epochs, 1)
        self.policy_epochs = policy_epochs
        self.lr, self.lr_decay, self.grad_clip = lr, lr_decay, grad_clip
        self.sampler, self.selection, self.critic_options = sampler, selection, critic
        self.eval_sampler = as_options(SamplerChanges(), eval_sampler or SamplerChanges()).of(sampler)
        self.net_options = as_options(NoiseNetOptions(), net)
        self.ema_options = as_options(POLICY_EMA, ema)
        for name, options in (("sampler", self.sampler), ("eval_sampler", self.eval_sampler)):
            if options.name != "dpm" and options.calls(n_diffusion_steps) > n_diffusion_steps:
                raise ConfigError(
                    f"model.{name}.steps is {options.steps}, but the policy has model.n_diffusion_steps "
                    f"{n_diffusion_steps}; give at most these, or null"
                )
        for name, options in (("sampler", self.sampler), ("eval_sampler", self.eval_sampler)):
            if options.name == "dpm" and n_diffusion_steps < 2:
                raise ConfigError(
                    f"model.{name}.name 'dpm' interpolates between model.n_diffusion_steps of at least 2, got "
                    f"{n_diffusion_steps}; use more steps, or the sampler ddpm or ddim"
                )
        if schedule == "linear" and n_diffusion_steps <= 20:
            raise ConfigError(
                f"model.schedule 'linear' needs model.n_diffusion_steps above 20, got {n_diffusion_steps}: its last "
                "steps would add a variance of 1 or more; use schedule 'vp' for few steps"
            )
        self.schedule = Schedule(schedule, n_diffusion_steps)

    def build(self, spec: DatasetSpec) -> None:
        """Policy and critics with their averages."""
        super().build(spec)
        self.policy = DiffusionPolicy(spec.obs_dim, spec.action_dim, self.schedule, self.net_options)
        o = self.ema_options
        self.policy_ema = EMA(self.policy, o.decay, o.every, o.start, offset=self.ema_offset % o.every, hold=True)
        self.build_critics(spec)

    def configure_optimizers(self) -> list[Optimizer]:
        """Adam for the critics and for the policy."""
        return [self.critic_optimizer(), Adam(self.policy.parameters(), lr=self.lr, fused=True)]

    def anneal(self, optimizer: LightningOptimizer) -> None:
        """Set the policy's learning rate for this place in the run."""
        if self.lr_decay == "cosine":
            self.set_cosine_lr(optimizer, self.lr)

    def improved_action(self, noised: Noised, obs: Tensor) -> Tensor:
        """The action ``(B, A)`` that the critic judges: that of EDP's Eq. 9, or one drawn with gradient."""
        if self.action_approximation:
            a_hat = self.policy.approximate(noised, clip=self.clip_approximation)
            if self.reporting:
                self.report({"clipped": (a_hat.detach().abs() >= 1).float().mean()})
            return a_hat
        return self.policy.sample(obs, self.draws.randn_like(noised.a_k), self.sampler, self.draws.randn_like)

    # ---------------------------------------------------------------- the critics' target

    @torch.no_grad()
    def next_value(self, next_obs: Tensor) -> Tensor:
        """Value ``(B,)`` of next states: the least target critic at an action of the averaged policy.

        With ``critic.backup_candidates`` M > 1, each critic takes its best of M actions first (max-Q backup).
        """
        assert self.spec is not None
        count = self.critic_options.backup_candidates
        shape = (len(next_obs), *([count] if count > 1 else []), self.spec.action_dim)
        noise = self.draws.randn_like(next_obs.new_empty(shape))
        action = self.policy_ema.net.sample(next_obs, noise, self.sampler, self.draws.randn_like)  # type: ignore[operator]
        return self.backup(next_obs, action)

    def target_q(self, batch: PolicyBatch) -> Tensor:
        """``r + gamma (1 - d) V(s')``, shape ``(B,)``, without gradient."""
        return td_target(batch.reward, batch.done, batch.discount, self.next_value(batch.next_obs))

    # ---------------------------------------------------------------- acting

    @property
    def actor(self) -> DiffusionPolicy:
        """The policy that acts."""
        return self.policy if self.act_with == "policy" else self.policy_ema.net  # type: ignore[return-value]

    def propose(self, obs: Tensor) -> Tensor:
        """One draw of the policy that acts, not chosen among others."""
        assert self.spec is not None
        noise = self.draws.randn_like(obs.new_empty(len(obs), self.spec.action_dim))
        return self.actor.sample(obs, noise, self.eval_sampler, self.draws.randn_like)

    def decide(self, obs: Tensor, rows: list[int]) -> Tensor:
        """Draw candidates from the policy that acts and choose among them by the critics (EDP, section 4.5)."""
        assert self.spec is not None
        n = self.selection.candidates

        def draw(x: Tensor) -> Tensor:
            return self.row_noise(rows, x.shape[1:])

        noise = self.row_noise(rows, (n, self.spec.action_dim))
        actions = self.actor.sample(obs, noise, self.eval_sampler, draw)
        if n == 1:
            return actions[:, 0]
        return self.select(obs, actions, rows, self.selection)
