"""DyDiff's two models of the dynamics: the single-step ensemble and the trajectory diffusion model.

Source: Zhao et al., "Long-Horizon Rollout via Dynamics Diffusion for Offline Reinforcement Learning", 2024, and the
authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from lit_diffrl.data.normalizers import LimitsNormalizer
from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.trajectories import TrajectoryBatch
from lit_diffrl.diffusion.edm import EDM, Network
from lit_diffrl.diffusion.hooks import Project
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import synthesis
from lit_diffrl.methods.agreement import refuse_other_arguments
from lit_diffrl.methods.base import Phase, as_options
from lit_diffrl.methods.options import WorldModelOptions
from lit_diffrl.methods.synthesis_options import RolloutOptions, TrajectoryDenoiserOptions
from lit_diffrl.methods.synthetic_learner import Predict, Synthesis
from lit_diffrl.methods.world_model_phase import WorldModelPhase
from lit_diffrl.nets.ema import EMA, half_life_decay
from lit_diffrl.nets.ensemble import RowShares
from lit_diffrl.nets.unet import TemporalUNet

RAMP = 10_000_000  # windows after which the learning rate of lr_decay "ramp" is reached


class DynamicsModels(Synthesis, WorldModelPhase):
    """The phases ``world_model`` and ``diffusion`` of a learner, and what the models predict afterwards.

    Attributes:
        denoiser: The trajectory model, or several, and ``denoiser_ema`` the average, which is what predicts.
        window_low: Limits of states and actions that make the model scale, with ``window_high``.
        window_std: Deviation of the windows in the model scale.
    """

    denoiser_options: TrajectoryDenoiserOptions
    rollouts: RolloutOptions
    edm: EDM
    window_low: Tensor
    window_high: Tensor
    window_std: Tensor
    models = ("world_model", "denoiser", "denoiser_ema", "window_low", "window_high", "window_std")
    models_data = ("horizon", "terminal")

    @property
    def model_phases(self) -> list[Phase]:
        """The single-step model's and the trajectory model's."""
        members = self.world_model_options.members
        return [
            Phase("world_model", self.epochs["world_model"], "bootstraps", members),
            Phase("diffusion", self.epochs["diffusion"], "windows"),
        ]

    @property
    def uses_world_model(self) -> bool:
        """Whether it learns in this run."""
        return self.epochs["world_model"] > 0

    # ---------------------------------------------------------------- networks

    def build(self, spec: DatasetSpec) -> None:
        """The learner's networks, the two models, and the limits of the windows."""
        super().build(spec)
        o, width = self.denoiser_options, spec.obs_dim + spec.action_dim
        self.build_world_model(spec)
        nets = [TemporalUNet(width, dim=o.dim, mults=o.mults, kernel=o.kernel) for _ in range(o.members)]
        self.denoiser = nets[0] if o.members == 1 else RowShares(nets)
        self.denoiser_ema = EMA(self.denoiser, every=1, start=0)
        for name, size in (("window_low", width), ("window_high", width), ("window_std", 1)):
            self.register_buffer(name, torch.zeros(size))

    def setup(self, stage: str) -> None:
        """Take over the limits of the windows."""
        super().setup(stage)
        if self.models_ckpt is None:
            self.window_low.copy_(self.data.limits.low)
            self.window_high.copy_(self.data.limits.high)
            self.window_std.copy_(self.data.scaled.std())

    @cached_property
    def levels(self) -> EDM:
        """The noise levels, with the deviation of the windows if that is asked for."""
        if not self.denoiser_options.measure_sigma_data:
            return self.edm
        return replace(self.edm, sigma_data=float(self.window_std))

    @property
    def limits(self) -> LimitsNormalizer:
        """Between raw states beside actions, and the model scale."""
        return LimitsNormalizer(self.window_low, self.window_high)

    @property
    def state_limits(self) -> LimitsNormalizer:
        """The same for states alone."""
        assert self.spec is not None
        limits, n = self.limits, self.spec.obs_dim
        return LimitsNormalizer(limits.low[:n], limits.high[:n])

    def scaled_actions(self, actions: Tensor) -> Tensor:
        """Actions in the model scale."""
        assert self.spec is not None
        limits, n = self.limits, self.spec.obs_dim
        return LimitsNormalizer(limits.low[n:], limits.high[n:]).normalize(actions)

    def on_fit_start(self) -> None:
        """Refuse data without windows, or too few of them for each model, before any time is spent."""
        super().on_fit_start()
        self.data.require_windows()
        members, rows = self.denoiser_options.members, self.data.window_batch_size
        if self.epochs["diffusion"] and rows % members:
            raise ConfigError(
                f"data.window_batch_size {rows} cannot be shared by model.denoiser.members {members}; give a multiple"
            )

    # ---------------------------------------------------------------- training of the models

    def model_optimizers(self) -> list[Optimizer]:
        """AdamW for the single-step and reward models, Adam for the trajectory model."""
        o, d = self.world_model_options, self.denoiser_options
        return [
            AdamW(self.world_model.parameters(), lr=o.lr, weight_decay=o.weight_decay, fused=True),
            Adam(self.denoiser.parameters(), lr=d.lr, fused=True),
        ]

    def model_step(self, phase: str, optimizer: LightningOptimizer, batch: Any) -> None:
        """An update of either model."""
        if phase == "world_model":
            name, losses = "world_model", self.world_model_loss(batch)
            norm = self.descend(optimizer, losses["total"], name, batch)
        else:
            name, losses = "denoiser", {"denoiser": self.diffusion_loss(batch)}
            self._set_rate(optimizer)
            norm = self.descend(optimizer, losses[name], name, batch, self.denoiser_options.grad_clip)
            o, rows = self.denoiser_options, self._windows_per_update()
            seen = (self.denoiser_ema._steps + 1) * rows
            self.denoiser_ema.update(self.denoiser, half_life_decay(seen, rows, o.half_life, o.half_life_ramp))
        self.report({f"loss/{part}": loss for part, loss in losses.items() if part != "total"}, prog_bar=True)
        self.report({f"grad_norm/{name}": norm})

    def _windows_per_update(self) -> int:
        """Of each trajectory model."""
        return self.data.window_batch_size * self.trainer.world_size // self.denoiser_options.members

    def _set_rate(self, optimizer: LightningOptimizer) -> None:
        """The learning rate of this place in the run."""
        o = self.denoiser_options
        if o.lr_decay == "cosine":
            self.set_cosine_lr(optimizer, o.lr)
        elif o.lr_decay == "ramp":
            seen = (self.denoiser_ema._steps + 1) * self._windows_per_update()
            for group in optimizer.param_groups:
                group["lr"] = o.lr * min(seen / RAMP, 1.0)

    def diffusion_loss(self, batch: TrajectoryBatch) -> Tensor:
        """Eq. 4: weighted error of the states, where first state and actions enter clean at every noise level."""
        assert self.spec is not None
        y, n = batch.trajectory, self.spec.obs_dim
        sigma = self.levels.draw_sigma(self.draws.randn_like(y[:, 0, 0]))
        noisy = y + sigma[:, None, None] * self.draws.randn_like(y)

        def project(x: Tensor) -> Tensor:
            return synthesis.condition(x, y[:, 0, :n], y[..., n:])

        counts = batch.mask[..., None].to(y.dtype).expand_as(y)
        if self.denoiser_options.loss == "states":
            counts = counts * synthesis.generated(y, n)
        prediction = self.denoise(self.denoiser, project(noisy), sigma, project)
        return self.levels.loss(prediction, y, sigma, counts) / self.mean_of_all(counts)

    def denoise(self, net: Network, x: Tensor, sigma: Tensor, project: Project) -> Tensor:
        """Clean prediction; the network reads the conditions that ``project`` writes as they are, or scaled."""
        return self.levels.denoise(net, x, sigma, None if self.denoiser_options.scale_conditions else project)

    def _refuse_other_levels(self, arguments: Mapping[str, Any]) -> None:
        super()._refuse_other_levels(arguments)
        saved = as_options(TrajectoryDenoiserOptions(), arguments.get("denoiser", {}))
        names = ("scale_conditions", "measure_sigma_data")
        before, now = (
            {f"denoiser.{name}": getattr(options, name) for name in names} for options in (saved, self.denoiser_options)
        )
        world_model = as_options(WorldModelOptions(), arguments.get("world_model", {}))
        before["world_model.reward_activation"] = world_model.reward_activation
        now["world_model.reward_activation"] = self.world_model_options.reward_activation
        refuse_other_arguments("model", tuple(before), before, now)

    # ---------------------------------------------------------------- predictions

    def to_learner(self, x: Tensor) -> Tensor:
        """States ``(..., obs)`` of the model scale, clipped to the data's limits, as the learner sees them."""
        return self.obs_normalizer.normalize(self.state_limits.unnormalize(x))

    def to_model(self, obs: Tensor) -> Tensor:
        """The learner's states ``(..., obs)`` in the model scale."""
        return self.state_limits.normalize(self.obs_normalizer.unnormalize(obs))

    def step_model(self, first: Tensor) -> synthesis.Dynamics:
        """The single-step model in the model scale, for rollouts from ``(B, obs)``: the elites as asked for."""
        o, elites = self.rollouts, len(self.world_model.elite)
        of_rollout = self.draws.randint(0, elites, first) if o.elite == "rollout" else None

        def step(x: Tensor, action: Tensor) -> Tensor:
            drawn = self.draws.randint(0, elites, x) if o.elite == "step" else of_rollout
            normal = self.draws.randn_like(x) if o.sample_model else None
            return self.to_model(self.world_model.step(self.to_learner(x), action, drawn, normal))

        return step

    def sample_states(self, first: Tensor, actions: Tensor, start: tuple[Tensor, int] | None = None) -> Tensor:
        """Eq. 7: states of the model scale ``(B, H, obs)`` by the trajectory model.

        Args:
            first: ``(B, obs)`` in the model scale.
            actions: ``(B, H, action)`` in [-1, 1].
            start: States to begin with in place of noise, and the index of the level they are noised to.
        """
        n, scaled = first.shape[-1], self.scaled_actions(actions)

        def project(x: Tensor) -> Tensor:
            return synthesis.condition(x, first.to(x.dtype), scaled.to(x.dtype))

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return self.denoise(self.denoiser_ema.net, x, sigma, project)

        noise = self.draws.randn_like(first.new_empty(*actions.shape[:2], n + actions.shape[-1]))
        begin = None if start is None else (torch.cat([start[0], scaled], dim=-1), start[1])
        return self.sample(denoise, noise, project, begin, self.levels)[..., :n]

    @property
    def predictors(self) -> dict[str, Predict]:
        """The single-step model, and the trajectory model if there is one."""
        found = {"single-step model": self.seeded(self.predict_by_steps)}
        return found | ({"trajectory model": self.seeded(self.predict_at_once)} if self.rollouts.corrections else {})

    def predict_by_steps(self, first: Tensor, actions: Tensor) -> Tensor:
        """States ``(n, H, obs)`` that the single-step model makes of given actions; all in raw units."""
        units = self.action_normalizer.normalize(actions)
        states = [self.state_limits.normalize(first)]
        step = self.step_model(states[0])
        for t in range(actions.shape[1] - 1):
            states.append(step(states[-1], units[:, t]))
        return self.state_limits.unnormalize(torch.stack(states, dim=1))

    def predict_at_once(self, first: Tensor, actions: Tensor) -> Tensor:
        """States ``(n, H, obs)`` that the trajectory model makes of given actions; all in raw units."""
        units = self.action_normalizer.normalize(actions)
        return self.state_limits.unnormalize(self.sample_states(self.state_limits.normalize(first), units))
