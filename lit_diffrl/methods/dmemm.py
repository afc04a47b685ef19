"""DMEMM: a trajectory diffusion model modulated by learned environment mechanisms.

Paper: "Diffusion Modulation via Environment Mechanism Modeling for Planning" (anonymous submission). The base is
:class:`~lit_diffrl.methods.diffuser.Diffuser`; this file holds what the paper adds, in its order: the estimate of the
denoised plan (Eq. 8), the two modulation losses (Eqs. 9, 10), the reward weight (Eq. 11), the total (Eq. 12) and
the dual guidance (Eq. 13).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.windows import WindowBatch
from lit_diffrl.diffusion.estimators import TWO_PASS_COMPUTES, backward_two_pass, estimate
from lit_diffrl.errors import ConfigError, check_choice, check_each, check_range
from lit_diffrl.methods.base import as_options
from lit_diffrl.methods.diffuser import Diffuser
from lit_diffrl.methods.options import (
    ChainOptions,
    GuideOptions,
    WeightingOptions,
)
from lit_diffrl.methods.planner import impose

DUAL_GUIDE = GuideOptions(kind="dual", at="x0", scale=1e-3, max_step=0.1)


class DMEMM(Diffuser):
    """Diffuser whose training and sampling know the environment's rewards and transitions.

    Training (Algorithm 2): fit the transition model T and the reward model R; then descend
    ``L_wdiff + lambda_tr L_tr + lambda_rd L_rd`` (Eq. 12), where the diffusion loss of a window is weighted by its
    rewards (Eq. 11) and the modulation losses judge the denoised plan by the frozen models (Eqs. 9, 10). Planning
    (Algorithm 1): denoise under the gradient of rewards plus transition log-likelihood (Eq. 13).

    The paper's ablations (Table 3): ``weighting.mode: none``, ``lambda_tr: 0``, ``lambda_rd: 0``,
    ``guide.lambda_transition: 0``.

    Departures, each with the argument that undoes it:
        - The denoised plan is the one-step (Tweedie) estimate. Eq. 8 with one shared noise subtracts that noise twice
          and leaves almost all of it with opposite sign even for a perfect network: ``x0_estimate: chain_paper``.
        - Weights are clamped to [floor, 1], since a negative weight would maximise an error: ``weighting.mode: raw``.
        - All three losses are divided by the window's number of entries, which keeps the paper's ratios of sums:
          ``reduction: mean`` averages each over its own terms.
        - The network predicts the clean window, as the Diffuser implementation the paper adopts: ``predict: eps``.
        - The gradient of Eq. 13 is taken at the predicted clean plan, where the models were trained, and includes the
          one with respect to s': ``guide.at: mean``, ``guide.next_obs_gradient: false``.
        - Several candidates can be ranked by the models; Algorithm 1 draws one: ``plan.candidates: 1``.

    Logs, beside Diffuser's: ``loss/wdiff`` (Eq. 11), ``loss/tr`` (Eq. 9) falls towards the data's own one-step error,
    ``loss/rd`` (Eq. 10) falls slowly; ``weight`` is the mean weight; ``reward_gap``, the mean predicted reward of
    denoised plans minus that of the data, stays near 0: if it grows without end, plans exploit the reward model and
    ``lambda_rd`` is too large.

    Args:
        lambda_tr: Weight of the transition loss (Eq. 12).
        lambda_rd: Weight of the reward loss (Eq. 12).
        x0_estimate: Denoised plan in the modulation losses: ``tweedie`` (one call, shared), ``chain_paper`` (Eq. 8),
            ``chain_ddim`` (its weights corrected), ``chain_bridge`` (its noises corrected).
        chain: How chain estimates are computed.
        weighting: Reward weight of the diffusion loss (Eq. 11).
        reduction: ``entries`` divides all losses by the window's entries, ``mean`` averages each over its own terms.
        snr_cap: Weight the diffusion loss by min(1/u_k^2, cap), which mimics Eq. 5 with clean predictions; null for
            none.
        aux_k_weight: Modulation losses over diffusion steps: ``none`` all alike, ``min1_snr`` weight min(1, 1/u_k^2),
            ``cutoff`` only where u_k <= ``aux_u_max``.
        aux_u_max: Noise-to-signal ratio at which ``cutoff`` cuts.
        detach_transition_input: Stop the gradient of Eq. 9 through the transition model's input.
        transition_weights: Weights per observation dimension in Eq. 9; null for 1.
        reward_units: Rewards in Eqs. 10 and 13: ``scaled`` by the data's largest, or ``raw``.
        condition_estimate: Write known states into the denoised plan before Eqs. 9 and 10.
        guide: What pulls plans while they denoise (Eq. 13).
        kwargs: Everything that Diffuser takes.
    """

    def __init__(
        self,
        lambda_tr: float = 0.1,
        lambda_rd: float = 0.05,
        x0_estimate: Literal["tweedie", "chain_paper", "chain_ddim", "chain_bridge"] = "tweedie",
        chain: ChainOptions = ChainOptions(),
        weighting: WeightingOptions = WeightingOptions(),
        reduction: Literal["entries", "mean"] = "entries",
        snr_cap: float | None = None,
        aux_k_weight: Literal["none", "min1_snr", "cutoff"] = "none",
        aux_u_max: float = 2.0,
        detach_transition_input: bool = False,
        transition_weights: list[float] | None = None,
        reward_units: Literal["scaled", "raw"] = "scaled",
        condition_estimate: bool = True,
        guide: GuideOptions = DUAL_GUIDE,
        **kwargs: Any,
    ) -> None:
        check_range("model.lambda_tr", lambda_tr, 0)
        check_range("model.lambda_rd", lambda_rd, 0)
        check_choice("model.x0_estimate", x0_estimate, ("tweedie", "chain_paper", "chain_ddim", "chain_bridge"))
        check_choice("model.aux_k_weight", aux_k_weight, ("none", "min1_snr", "cutoff"))
        check_choice("model.reduction", reduction, ("entries", "mean"))
        check_choice("model.reward_units", reward_units, ("scaled", "raw"))
        check_range("model.aux_u_max", aux_u_max, 0, low_open=True)
        if transition_weights is not None:
            check_each("model.transition_weights", transition_weights, 0)
        if snr_cap is not None and kwargs.get("predict") == "eps":
            raise ConfigError(
                "model.snr_cap weights clean predictions; with predict 'eps' the loss has that weight already"
            )
        if snr_cap is not None:
            check_range("model.snr_cap", snr_cap, 0, low_open=True)
        self.lambda_tr, self.lambda_rd, self.x0_estimate = lambda_tr, lambda_rd, x0_estimate
        self.chain = as_options(ChainOptions(), chain)
        self.weighting = as_options(WeightingOptions(), weighting)
        self.reduction, self.snr_cap = reduction, snr_cap
        self.aux_k_weight, self.aux_u_max = aux_k_weight, aux_u_max
        self.detach_transition_input, self.transition_weights = detach_transition_input, transition_weights
        self.reward_units, self.condition_estimate = reward_units, condition_estimate
        super().__init__(guide=as_options(DUAL_GUIDE, guide), **kwargs)

    guide_kinds = ("none", "value", "dual")

    def build(self, spec: DatasetSpec) -> None:
        """Networks as Diffuser's, after checking what only the dataset's dimensions can tell."""
        if self.transition_weights is not None and len(self.transition_weights) != spec.obs_dim:
            raise ConfigError(
                f"model.transition_weights needs one number per observation dimension, {spec.obs_dim}; got "
                f"{len(self.transition_weights)}"
            )
        if self.weighting.t_max == "episode" and spec.max_episode_steps is None:
            raise ConfigError(
                "weighting.t_max is 'episode', but the dataset's environment has no time limit; give a number of rows"
            )
        super().build(spec)

    @property
    def uses_world_model(self) -> bool:
        """Whether guidance, ranking or a loss needs the reward and transition models."""
        modulated = self.lambda_tr > 0 or self.lambda_rd > 0 or self.weighting.predicted
        return modulated or super().uses_world_model

    def _split(self, plan: Tensor) -> tuple[Tensor, Tensor]:
        """Actions and observations of a plan."""
        assert self.spec is not None
        action, obs = plan.split([self.spec.action_dim, self.spec.obs_dim], dim=-1)
        return action, obs

    def predicted_reward(self, obs: Tensor, action: Tensor) -> Tensor:
        """R(s, a) in the units chosen."""
        reward = self.world_model.reward(obs, action)
        return reward if self.reward_units == "scaled" else reward * self.reward_scale

    # ---------------------------------------------------------------- Eqs. 9-11

    def transition_loss(self, plan: Tensor, mask: Tensor) -> Tensor:
        """Eq. 9: squared error of each planned transition under T, summed over the real ones of each plan ``(B,)``."""
        action, obs = self._split(plan)
        given = obs[:, :-1].detach() if self.detach_transition_input else obs[:, :-1]
        taken = action[:, :-1].detach() if self.detach_transition_input else action[:, :-1]
        error = (obs[:, 1:] - self.world_model.next_mean(given, taken)).square()
        if self.transition_weights is not None:
            error = error * error.new_tensor(self.transition_weights)
        return (error.sum(-1) * mask[:, 1:]).sum(-1)

    def reward_loss(self, plan: Tensor, mask: Tensor) -> Tensor:
        """Eq. 10: minus the predicted rewards of the real rows of each plan ``(B,)``."""
        action, obs = self._split(plan)
        return -(self.predicted_reward(obs, action) * mask).sum(-1)

    def reward_weights(self, batch: WindowBatch) -> Tensor:
        """Eq. 11: weight of each window's diffusion loss ``(B,)``, by its rewards relative to the greatest possible."""
        assert self.spec is not None
        options, horizon = self.weighting, batch.trajectory.shape[1]
        if options.mode == "none":
            return batch.reward.new_ones(len(batch.reward))
        if options.predicted:
            action, obs = self._split(batch.trajectory)
            with torch.no_grad():
                reward = self.world_model.reward(obs, action) * self.reward_scale * batch.mask
        else:
            reward = batch.reward
        total = reward.sum(-1) if options.source == "window" else batch.episode_return
        r_max = self.spec.reward_max if options.r_max == "auto" else float(options.r_max)
        episode_rows = (self.spec.max_episode_steps or 0) / self.spec.stride
        t_max = {"horizon": float(horizon), "episode": episode_rows}.get(str(options.t_max), options.t_max)
        assert isinstance(t_max, float | int)
        if options.mode == "minmax":
            least = t_max * min(self.spec.reward_min, 0.0)
            weights = (total - least) / max(t_max * r_max - least, 1e-8)
        else:
            # A data set without positive rewards has nothing to prefer.
            weights = total / (t_max * r_max) if r_max > 0 else torch.zeros_like(total)
        if options.mode == "clamp":
            weights = weights.clamp(options.floor, 1.0)
        return weights / self.mean_of_all(weights).clamp_min(1e-8) if options.unit_mean else weights

    # ---------------------------------------------------------------- Eqs. 8 and 12

    def modulation(self, plan: Tensor, batch: WindowBatch, k: Tensor) -> dict[str, Tensor]:
        """The two modulation losses of denoised plans, reduced and weighted over diffusion steps as configured."""
        assert self.spec is not None
        if self.condition_estimate:
            plan = impose(plan, self.conditions_of(batch.trajectory), self.spec.action_dim)
        u = self.schedule.at("u", k, plan).flatten()
        if self.aux_k_weight == "min1_snr":
            over_k = (1 / u.square()).clamp_max(1.0)
        elif self.aux_k_weight == "cutoff":
            over_k = (u <= self.aux_u_max).to(u.dtype)
        else:
            over_k = torch.ones_like(u)
        entries = float(plan.shape[1] * plan.shape[2])
        rows = batch.mask.sum(-1)
        self._report_reward_gap(plan, batch)
        by_entries = self.reduction == "entries"
        losses: dict[str, Tensor] = {}
        if self.lambda_tr > 0:
            tr = self.transition_loss(plan, batch.mask) / (entries if by_entries else (rows - 1).clamp_min(1))
            losses["tr"] = (over_k * tr).mean()
        if self.lambda_rd > 0:
            rd = self.reward_loss(plan, batch.mask) / (entries if by_entries else rows)
            losses["rd"] = (over_k * rd).mean()
        return losses

    def diffusion_loss(self, batch: WindowBatch) -> dict[str, Tensor]:
        """Eq. 12 on one batch."""
        x0 = batch.trajectory
        k, eps, x_k = self.noised(x0)
        x0_hat = self.estimate_x0(self.net, x_k, k)

        # Eq. 11
        error = self.diffusion_error(x0, x0_hat, k)
        if self.snr_cap is not None:
            error = error * (1 / self.schedule.at("u", k, x0).flatten().square()).clamp_max(self.snr_cap)
        weights = self.reward_weights(batch)
        wdiff = (weights * error).mean()
        self.report({"weight": weights.mean()})

        # Eq. 8, then Eqs. 9 and 10; without them DMEMM is a weighted Diffuser
        if self.lambda_tr == 0 and self.lambda_rd == 0:
            return {"total": wdiff, "wdiff": wdiff}
        losses: dict[str, Tensor] = {}

        def modulated(plan: Tensor) -> Tensor:
            losses.update(self.modulation(plan, batch, k))
            weights = {"tr": self.lambda_tr, "rd": self.lambda_rd}
            return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()

        tweedie = self.x0_estimate == "tweedie"
        auxiliary = modulated(x0_hat) if tweedie else self.chained(modulated, x0, k, eps, x0_hat)
        return {"total": wdiff + auxiliary, "wdiff": wdiff, **losses}

    def chained(
        self, loss_of: Callable[[Tensor], Tensor], x0: Tensor, k: Tensor, eps: Tensor, x0_hat: Tensor
    ) -> Tensor:
        """A loss of the plan that Eq. 8 (or a repair of it) denoises; the two-pass forms do its backward pass here."""
        assert self.spec is not None
        given = torch.zeros(x0.shape[1:], dtype=torch.bool, device=x0.device)
        for row in self.conditions_of(x0):
            given[row, self.spec.action_dim :] = True
        predict = partial(self.estimate_x0, self.net)
        options: dict[str, Any] = {
            "compute": self.chain.compute,
            "m": self.chain.m,
            "chunk": self.chain.chunk,
            "x0_hat_k": x0_hat,
            "given": given,
        }
        arguments = (self.x0_estimate, predict, self.schedule, x0, k, eps)
        if self.chain.compute in TWO_PASS_COMPUTES:
            return backward_two_pass(*arguments, loss_of, backward=self.accumulate, scale=self.loss_scale, **options)
        return loss_of(estimate(*arguments, **options))

    def accumulate(self, loss: Tensor) -> None:
        """Add a loss to the gradients without averaging them over processes: the total's backward pass does that.

        The number of chunks depends on each process's diffusion steps; an average per chunk would wait for ever.
        """
        scaled = loss if self._trainer is None else self.trainer.precision_plugin.pre_backward(loss, self)
        scaled.backward()

    @torch.no_grad()
    def _report_reward_gap(self, plan: Tensor, batch: WindowBatch) -> None:
        if self.reporting:
            gap = self.reward_loss(batch.trajectory, batch.mask) - self.reward_loss(plan, batch.mask)
            self.report({"reward_gap": (gap / batch.mask.sum(-1)).mean()})

    # ---------------------------------------------------------------- Eq. 13

    def guide_objective(self, x: Tensor, level: int) -> Tensor:
        """Eq. 13 integrated: predicted rewards plus lambda times the log-likelihood of the planned transitions.

        Args:
            x: ``(B, H, action + obs)`` normalised plan.
            level: Diffusion step of ``x``; only Diffuser's return regressor (``guide.kind: value``) looks at it.

        Returns:
            ``(B,)`` objective.
        """
        if self.guide.kind == "value":
            return super().guide_objective(x, level)
        action, obs = self._split(x)
        objective = self.guide.lambda_reward * self.predicted_reward(obs, action).sum(-1)
        if self.guide.lambda_transition > 0:
            next_obs = obs[:, 1:] if self.guide.next_obs_gradient else obs[:, 1:].detach()
            likelihood = self.world_model.log_prob(obs[:, :-1], action[:, :-1], next_obs, mixture=self.guide.mixture)
            objective = objective + self.guide.lambda_transition * likelihood.sum(-1)
        return objective
