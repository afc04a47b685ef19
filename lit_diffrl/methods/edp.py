"""EDP: diffusion policies trained at the cost of one network call, with three offline learners.

Source: Kang, Ma, Du, Pang and Yan, "Efficient Diffusion Policies for Offline Reinforcement Learning", 2023, and the
authors' code. The policy never samples its own action to improve it: Eq. 9 reads the clean action off the prediction
that the diffusion loss makes anyway.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.errors import ConfigError, check_choice, check_range
from lit_diffrl.methods.base import as_options
from lit_diffrl.methods.diffusion_learner import POLICY_EMA, DiffusionLearner
from lit_diffrl.methods.diffusion_policy import Noised
from lit_diffrl.methods.losses import (
    crr_weights,
    elbo_weights,
    expectile_loss,
    exponential_weights,
    normalized_q_loss,
    surrogate_log_prob,
    td_loss,
    td_target,
)
from lit_diffrl.methods.options import EMAOptions
from lit_diffrl.methods.policy_options import (
    ActionSamplerOptions,
    CriticOptions,
    NoiseNetOptions,
    SamplerChanges,
    SelectionOptions,
)
from lit_diffrl.nets.critics import ValueNet

DPM = ActionSamplerOptions(name="dpm")
EDP_CRITIC = CriticOptions(grad_clip=5.0, clip_each=True)


class EDP(DiffusionLearner):
    """What the three learners share: the diffusion policy (Eqs. 5, 9) and its options.

    Args:
        policy_epochs: Length of training in epochs.
        guide_weight: Weight of the improvement beside the diffusion loss: Table 3's 1, 1, 0.1 and 0.005.
        action_approximation: Improve the action of Eq. 9; false draws it through the sampler with gradient instead.
        clip_approximation: Keep the action of Eq. 9 within the box, as the code.
        n_diffusion_steps: Diffusion steps K.
        schedule: ``linear`` (the code's), ``vp``, ``cosine`` or ``linear_unscaled``.
        sampler: How actions of the critics' targets are drawn.
        eval_sampler: What is different about drawing actions to act with; null as ``sampler``.
        selection: Choice among candidates at evaluation.
        net: The noise network.
        critic: The critics and their targets.
        ema: Average of the policy; until ``start`` it stays the initial one.
        lr: Learning rate of the policy; the critics' is ``critic.lr``, which is IQL's value's too.
        lr_decay: ``cosine`` to 0 over the run, or ``none``.
        grad_clip: Largest norm of the policy's gradient; null for no limit.
    """

    def __init__(
        self,
        policy_epochs: int = 2000,
        guide_weight: float = 1.0,
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
        lr: float = 3e-4,
        lr_decay: Literal["none", "cosine"] = "none",
        grad_clip: float | None = 5.0,
    ) -> None:
        super().__init__()
        check_range("model.guide_weight", guide_weight, 0, high_open=True)
        self.save_hyperparameters(logger=False)
        self.guide_weight, self.action_approximation = guide_weight, action_approximation
        self.clip_approximation = clip_approximation
        self._keep(
            policy_epochs, n_diffusion_steps, schedule, as_options(DPM, sampler), eval_sampler,
            as_options(SelectionOptions(), selection), net, as_options(EDP_CRITIC, critic), ema, lr, lr_decay,
            grad_clip,
        )  # fmt: skip

    def finish(self) -> None:
        """After the steps of an update: averages and the counter."""
        self.policy_ema.update(self.policy)
        self.target_critic.update(self.critic)
        self.updates += 1


class _Simultaneous(EDP):
    """Learners whose critics and policy take their gradients at the same, old parameters.

    The critics' loss does not look at the policy that learns, only at its average: with the policy's step first, both
    gradients are those of the old parameters.
    """

    def policy_loss(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """Losses of the policy under the names they are logged by; ``total`` is descended."""
        raise NotImplementedError

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> None:
        """One update: policy under the old critics, critics, averages."""
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


class _Weighted(EDP):
    """Learners that improve the policy by a weighted likelihood of the data's actions.

    Eq. 13 squares the error of a_hat, which is that of the noise times the noise-to-signal ratio (0.3 at k = 100, 17 at
    k = 750 of 1000): its gradient comes from the noisy steps and is many times that of the diffusion loss, which alone
    teaches the last ones (Eq. 12 leans the other way, on the first step). Signs are a ``loss/diffusion`` that stays
    above cloning's and a ``clipped`` that grows. Table 3's ``guide_weight`` of 1 belongs to the authors' 2 million
    updates; a run of some thousands wants one of about 0.02.

    Args:
        objective: What stands for the likelihood: ``mle``, Eq. 13, or ``elbo``, Eq. 12 (not with a cosine schedule).
        normalize_elbo: Scale Eq. 12's weights of the diffusion steps to a mean of 1, as the code.
        normalize_weights: Divide the actions' weights by their mean over the batch. The code's ``adv_norm``, off there
            too, is a softmax: without the bound, and smaller by the size of the batch.
        **kwargs: As :class:`EDP`.
    """

    bound: float

    def __init__(
        self,
        objective: Literal["mle", "elbo"] = "mle",
        normalize_elbo: bool = True,
        normalize_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        check_choice("model.objective", objective, ("mle", "elbo"))
        self.objective, self.normalize_elbo, self.normalize_weights = objective, normalize_elbo, normalize_weights
        super().__init__(**kwargs)
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
        """Minus the weighted likelihood of the data's actions: under N(a_hat, I) (Eq. 13), or its bound (Eq. 12)."""
        if self.objective == "elbo":
            omega: Tensor = self.omega  # type: ignore[assignment]
            return (weights * omega[noised.k - 1] * noised.error).mean()
        return -(weights * surrogate_log_prob(batch.action, self.improved_action(noised, batch.obs))).mean()


class EDPTD3(_Simultaneous):
    """EDP with TD3+BC's improvement: ``L_diff - w alpha mean Q_i(s, a_hat) / mean |Q_i(s, a_hat)|`` (section 4.1).

    A coin per update decides which critic is i. Critics learn from actions of the averaged policy (Eq. 8's target).

    Departures from the paper, as its code: Eq. 9's action is clipped to the box; the DDPM chain has the posterior's
    variance and clips its clean prediction; the average starts at update 1005, every fifth, from the initial policy.
    The paper's: ``clip_approximation false``, ``sampler.variance beta``, ``sampler.clip false``.

    Logged: ``loss/critic``, ``loss/diffusion``, ``loss/q`` (-alpha while all values are positive), ``clipped`` (share
    of a_hat's entries at the edge of the box, which pass no gradient), ``q/mean``, ``q/target``, ``grad_norm/…``.

    Args:
        alpha: TD3+BC's alpha: 2.0 in the code, 1.0 in a reading of the paper.
        **kwargs: As :class:`EDP`.
    """

    def __init__(self, alpha: float = 2.0, **kwargs: Any) -> None:
        check_range("model.alpha", alpha, 0, high_open=True)
        self.alpha = alpha
        super().__init__(**kwargs)

    def policy_loss(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """Diffusion loss and improvement."""
        noised = self.policy.noised(batch.action, batch.obs, self.draws)
        a_hat = self.improved_action(noised, batch.obs)
        i = self.draws.coin()
        q = self.critic(batch.obs, a_hat, members=slice(i, i + 1))[0]
        improvement = self.alpha * normalized_q_loss(q, self.mean_of_all(q.abs()))
        diffusion = noised.error.mean()
        return {"total": diffusion + self.guide_weight * improvement, "diffusion": diffusion, "q": improvement}


class EDPCRR(_Weighted, _Simultaneous):
    """EDP with CRR's improvement: clone the actions that are better than the policy's own (Eqs. 10 to 13).

    The advantage of the data's action is measured against the mean of ``candidates`` actions around Eq. 9's (without
    it: drawn from the policy); its weight ``min(exp(A / beta), bound)`` multiplies the likelihood of Eq. 13, or the
    diffusion loss itself (Eq. 12).

    Logged: as :class:`EDPTD3`, with ``loss/guide`` for ``loss/q``, ``weight`` (mean) and ``weight_bound`` (share at the
    bound); ``clipped`` only while Eq. 13 asks for Eq. 9's action.

    Args:
        weighting: ``exp`` of the advantage, or its ``indicator``.
        beta: Temperature of ``exp``.
        bound: Largest weight.
        candidates: Actions a value is averaged over.
        **kwargs: As :class:`EDP`.
    """

    def __init__(
        self,
        weighting: Literal["exp", "indicator"] = "exp",
        beta: float = 1.0,
        bound: float = 20.0,
        candidates: int = 10,
        **kwargs: Any,
    ) -> None:
        check_choice("model.weighting", weighting, ("exp", "indicator"))
        check_range("model.beta", beta, 0, low_open=True, high_open=True)
        check_range("model.bound", bound, 0, low_open=True, high_open=True)
        check_range("model.candidates", candidates, 1)
        self.weighting, self.beta, self.bound, self.candidates = weighting, beta, bound, candidates
        super().__init__(**kwargs)

    @torch.no_grad()
    def weights(self, batch: PolicyBatch, a_hat: Tensor) -> Tensor:
        """CRR's weight of each data action ``(B,)``."""
        noise = self.draws.randn_like(a_hat[:, None].expand(-1, self.candidates, -1))
        if self.action_approximation:
            own = a_hat[:, None] + noise
        else:
            own = self.policy.sample(batch.obs, noise, self.sampler, self.draws.randn_like)
        advantage = self.least_q(batch.obs, batch.action) - self.least_q(batch.obs, own).mean(dim=1)
        return self.settle(crr_weights(advantage, self.weighting, self.beta, self.bound))

    def policy_loss(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """Diffusion loss and weighted likelihood."""
        noised = self.policy.noised(batch.action, batch.obs, self.draws)
        weights = self.weights(batch, self.policy.approximate(noised, clip=self.clip_approximation).detach())
        guide = self.guide_loss(weights, noised, batch)
        diffusion = noised.error.mean()
        return {"total": diffusion + self.guide_weight * guide, "diffusion": diffusion, "guide": guide}


class EDPIQL(_Weighted):
    """EDP with IQL's improvement: no action is drawn in training (but by the ablation), the fastest of the three.

    An update, in the order of the code, each step with what the one before has changed: value (expectile regression
    on the target critics), policy (Eq. 13 or 12 weighted by ``min(exp(eta (Q - V)), bound)``), critics (target
    ``r + gamma (1 - d) V(s')``), targets. The bound is met at an advantage of ``ln(bound) / eta``, 1.5 at eta = 3, so
    rewards have to be of the size that eta is meant for (``data.reward: return_range`` on locomotion).

    Logged: as :class:`EDPCRR`, with ``loss/value`` and ``q/value``.

    Args:
        expectile: 0.7; 0.9 on AntMaze.
        eta: Inverse temperature: 1 in the paper, 3 in the code.
        bound: Largest weight.
        **kwargs: As :class:`EDPCRR`, but for ``weighting``, ``beta`` and ``candidates``.
    """

    def __init__(self, expectile: float = 0.7, eta: float = 1.0, bound: float = 100.0, **kwargs: Any) -> None:
        check_range("model.expectile", expectile, 0, 1, low_open=True, high_open=True)
        check_range("model.eta", eta, 0, high_open=True)
        check_range("model.bound", bound, 0, low_open=True, high_open=True)
        self.expectile, self.eta, self.bound = expectile, eta, bound
        super().__init__(**kwargs)
        self.refuse_max_backup()
        if self.objective == "elbo" and not self.action_approximation:
            raise ConfigError(
                "model.action_approximation false draws the action that model.objective 'mle' (Eq. 13) improves, but "
                "'elbo' (Eq. 12) improves none; set one of them back"
            )

    def build(self, spec: DatasetSpec) -> None:
        """Networks as EDP's, and the value's."""
        super().build(spec)
        o = self.critic_options
        self.value = ValueNet(spec.obs_dim, o.hidden, o.layers, o.activation, o.layer_norm)

    def configure_optimizers(self) -> list[Optimizer]:
        """Adam for the critics, the policy and the value."""
        value = Adam(self.value.parameters(), lr=self.critic_options.lr, fused=True)
        return [*super().configure_optimizers(), value]

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> None:
        """One update: value, policy, critics, averages."""
        critic_optimizer, policy_optimizer, value_optimizer = self.optimizers()  # type: ignore[attr-defined, misc]
        self.anneal(policy_optimizer)
        least = self.least_q(batch.obs, batch.action, target=True)

        value = self.value(batch.obs)
        value_loss = expectile_loss(least - value, self.expectile)
        value_norm = self.descend(value_optimizer, value_loss, "value", batch, self.critic_options.grad_clip)

        with torch.no_grad():
            advantage = least - self.value(batch.obs)
        weights = self.settle(exponential_weights(advantage, self.eta, self.bound))
        noised = self.policy.noised(batch.action, batch.obs, self.draws)
        diffusion, guide = noised.error.mean(), self.guide_loss(weights, noised, batch)
        policy_loss = diffusion + self.guide_weight * guide
        policy_norm = self.descend(policy_optimizer, policy_loss, "policy", batch, self.grad_clip)

        with torch.no_grad():
            y = td_target(batch.reward, batch.done, batch.discount, self.value(batch.next_obs))
        q = self.critic(batch.obs, batch.action)
        critic_loss = td_loss(q, y)
        critic_norm = self.descend(critic_optimizer, critic_loss, "critic", batch)
        self.finish()

        if self.reporting:
            losses = {"loss/critic": critic_loss, "loss/diffusion": diffusion, "loss/guide": guide}
            self.report({**losses, "loss/value": value_loss, "q/mean": q.mean()}, prog_bar=True)
            norms = {"grad_norm/value": value_norm, "grad_norm/policy": policy_norm, "grad_norm/critic": critic_norm}
            self.report({**norms, "q/target": y.mean(), "q/value": value.mean()})
