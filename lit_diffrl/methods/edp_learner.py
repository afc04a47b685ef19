"""What EDP's three learners share: the diffusion policy, its improvement, and the two orders of an update.

Source: Kang, Ma, Du, Pang and Yan, "Efficient Diffusion Policies for Offline Reinforcement Learning", 2023, and the
authors' code. The policy never samples its own action to improve it: Eq. 9 reads the clean action off the prediction
that the diffusion loss makes anyway.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.errors import ConfigError, check_choice, check_range
from lit_diffrl.methods.base import as_options
from lit_diffrl.methods.diffusion_learner import POLICY_EMA, DiffusionLearner
from lit_diffrl.methods.diffusion_policy import Noised
from lit_diffrl.methods.losses import elbo_weights, surrogate_log_prob, td_loss
from lit_diffrl.methods.options import EMAOptions
from lit_diffrl.methods.policy_options import (
    ActionSamplerOptions,
    CriticOptions,
    NoiseNetOptions,
    SamplerChanges,
    SelectionOptions,
)

DPM = ActionSamplerOptions(name="dpm")
EDP_CRITIC = CriticOptions(grad_clip=5.0, clip_each=True)


class EDP(DiffusionLearner):
    """What the three learners share: the diffusion policy (Eqs. 5, 9) and its options.

    Args:
        policy_epochs: Length of training in epochs.
        guide_weight: Weight of the improvement beside the diffusion loss: Table 3's 1, 1, 0.1 and 0.005.
        diffusion_weight: Weight of the diffusion loss (the code's ``diff_coef``); 0 improves without cloning.
        action_approximation: Improve the action of Eq. 9; false draws it through the sampler with gradient instead.
        clip_approximation: Keep the action of Eq. 9 within the box, as the code.
        n_diffusion_steps: Diffusion steps K.
        schedule: ``linear`` (the code's), ``vp``, ``cosine`` or ``linear_unscaled``.
        sampler: How actions of the critics' targets are drawn.
        eval_sampler: What is different about drawing actions to act with; null as ``sampler``.
        selection: Choice among candidates at evaluation.
        net: The noise network.
        critic: The critics and their targets.
        ema: Average of the policy; until ``start`` it stays the initial one. It draws the actions of the critics'
            targets (EDP-IQL's have none), and those to act with if ``act_with`` says so.
        act_with: Who acts: the ``policy`` that learns, as in EDP and Diffusion-QL, or its ``average``, as in IDQL. The
            average begins as the untrained policy: a run wants several times ``1 / (1 - ema.decay)`` updates then.
        lr: Learning rate of the policy; the critics' is ``critic.lr``, which is IQL's value's too.
        lr_decay: ``cosine`` to 0 over the run, or ``none``.
        grad_clip: Largest norm of the policy's gradient; null for no limit.
    """

    def __init__(
        self,
        policy_epochs: int = 2000,
        guide_weight: float = 1.0,
        diffusion_weight: float = 1.0,
        action_approximation: bool = True,
        clip_approximation: bool = True,
        n_diffusion_steps: int = 1000,
        schedule: Literal["vp", "linear", "linear_unscaled", "cosine"] = "linear",
        sampler: ActionSamplerOptions = DPM,
        eval_sampler: SamplerChanges | None = None,
        selection: SelectionOptions = SelectionOptions(),
        net: NoiseNetOptions = NoiseNetOptions(),
        critic: CriticOptions = EDP_CRITIC,
        ema: EMAOptions = POLICY_EMA,
        act_with: Literal["policy", "average"] = "policy",
        lr: float = 3e-4,
        lr_decay: Literal["none", "cosine"] = "none",
        grad_clip: float | None = 5.0,
    ) -> None:
        super().__init__()
        check_range("model.guide_weight", guide_weight, 0, high_open=True)
        check_range("model.diffusion_weight", diffusion_weight, 0, high_open=True)
        if guide_weight == diffusion_weight == 0:
            raise ConfigError(
                "model.guide_weight and model.diffusion_weight are both 0: the policy would learn nothing; give one of "
                "them a weight"
            )
        if not (action_approximation or clip_approximation):
            raise ConfigError(
                "model.clip_approximation false is of the action of Eq. 9, which model.action_approximation false does "
                "not take; set one of them true"
            )
        check_choice("model.act_with", act_with, ("policy", "average"))
        self.save_hyperparameters(logger=False)
        self.act_with = act_with
        self.guide_weight, self.diffusion_weight = guide_weight, diffusion_weight
        self.action_approximation, self.clip_approximation = action_approximation, clip_approximation
        self._keep(
            policy_epochs, n_diffusion_steps, schedule, as_options(DPM, sampler), eval_sampler,
            as_options(SelectionOptions(), selection), net, as_options(EDP_CRITIC, critic), ema, lr, lr_decay,
            grad_clip,
        )  # fmt: skip

    def total_loss(self, diffusion: Tensor, improvement: Tensor) -> Tensor:
        """What the policy descends: Algorithm 1's sum of cloning and improvement, each by its weight."""
        return self.diffusion_weight * diffusion + self.guide_weight * improvement

    def finish(self) -> None:
        """After the steps of an update: averages and the counter."""
        self.policy_ema.update(self.policy)
        self.target_critic.update(self.critic)
        self.updates += 1


class SimultaneousEDP(EDP):
    """Learners whose critics and policy take their gradients at the same, old parameters.

    The critics' loss does not look at the policy that learns, only at its average: with the policy's step first, both
    gradients are those of the old parameters.
    """

    def policy_loss(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """Losses of the policy under the names they are logged by; ``total`` is descended."""
        raise NotImplementedError

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> dict[str, Tensor]:
        """One update: policy under the old critics, critics, averages; returns the diffusion loss."""
        critic_optimizer, policy_optimizer = self.optimizers()  # type: ignore[attr-defined, misc]
        self.anneal(policy_optimizer)

        losses = self.policy_loss(batch)
        policy_norm = self.descend(policy_optimizer, losses["total"], "policy", batch, self.grad_clip)

        y = self.target_q(batch)
        q = self.critic(batch.obs, batch.action)
        critic_loss = td_loss(q, y)
        critic_norm = self.descend(critic_optimizer, critic_loss, "critic", batch)
        self.finish()

        if self.reporting:
            shown = {f"loss/{name}": loss for name, loss in losses.items() if name != "total"}
            self.report({**shown, "loss/critic": critic_loss, "q/mean": q.mean()}, prog_bar=True)
            self.report({"q/target": y.mean(), "grad_norm/critic": critic_norm, "grad_norm/policy": policy_norm})
        return {"loss/diffusion": losses["diffusion"].detach()}


class WeightedEDP(EDP):
    """Learners that improve the policy by a weighted likelihood of the data's actions.

    Eq. 13 squares the error of a_hat, which is that of the noise times the noise-to-signal ratio (0.3 at k = 100, 17 at
    k = 750 of 1000): its gradient comes from the noisy steps and is many times that of the diffusion loss, which alone
    teaches the last ones (Eq. 12 leans the other way, on the first step). Signs are a ``loss/diffusion`` that stays
    above cloning's and a ``clipped`` that grows. Table 3's ``guide_weight`` of 1 belongs to the authors' 2 million
    updates; a run of some thousands wants 0.02 to 0.1.

    Args:
        objective: What stands for the likelihood: ``mle``, Eq. 13; ``elbo``, Eq. 12 (not with a cosine schedule); or
            ``mse``, the code's third way: minus the mean squared error of one draw from Eq. 13's Gaussian, whose
            gradient is Eq. 13's times ``2 / A`` in the mean, with noise.
        normalize_elbo: Scale Eq. 12's weights of the diffusion steps to a mean of 1, as the code.
        normalize_weights: Divide the actions' weights by their mean over the batch.
        **kwargs: As :class:`EDP`.
    """

    bound: float

    def __init__(
        self,
        objective: Literal["mle", "elbo", "mse"] = "mle",
        normalize_elbo: bool = True,
        normalize_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        check_choice("model.objective", objective, ("mle", "elbo", "mse"))
        self.objective, self.normalize_elbo, self.normalize_weights = objective, normalize_elbo, normalize_weights
        super().__init__(**kwargs)
        if objective != "elbo" and not normalize_elbo:
            raise ConfigError(
                f"model.normalize_elbo false is of model.objective 'elbo', got {objective!r}; use that, or leave it out"
            )
        if objective == "elbo" and self.schedule.kind == "cosine":
            raise ConfigError(
                "model.objective 'elbo' (Eq. 12) gives nearly all weight to the last step of model.schedule 'cosine'; "
                "use schedule 'linear' or 'vp', or objective 'mle'"
            )

    def build(self, spec: DatasetSpec) -> None:
        """Networks as EDP's, and Eq. 12's weights."""
        super().build(spec)
        weights = elbo_weights(self.schedule, normalize=self.normalize_elbo)
        self.register_buffer("omega", weights.float(), persistent=False)

    def settle(self, weights: Tensor) -> Tensor:
        """Report the actions' weights and, if so asked, scale them to a mean of 1 over the batch of all processes."""
        if self.reporting:
            self.report({"weight": weights.mean(), "weight_bound": (weights >= 0.999 * self.bound).float().mean()})
        return weights / self.mean_of_all(weights).clamp_min(1e-8) if self.normalize_weights else weights

    def guide_loss(self, weights: Tensor, noised: Noised, batch: PolicyBatch) -> Tensor:
        """Minus the weighted likelihood of the data's actions: under N(a_hat, I) (Eq. 13), or what stands for it."""
        if self.objective == "elbo":
            omega: Tensor = self.omega  # type: ignore[assignment]
            return (weights * omega[noised.k - 1] * noised.error).mean()
        a_hat = self.improved_action(noised, batch.obs)
        if self.objective == "mse":
            drawn = a_hat + self.draws.randn_like(a_hat)
            return (weights * (drawn - batch.action).square().mean(dim=-1)).mean()
        return -(weights * surrogate_log_prob(batch.action, a_hat)).mean()
