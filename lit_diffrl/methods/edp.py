"""EDP: diffusion policies trained at the cost of one network call, by TD3's, CRR's or IQL's improvement.

Source: Kang, Ma, Du, Pang and Yan, "Efficient Diffusion Policies for Offline Reinforcement Learning", 2023, and the
authors' code.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.errors import ConfigError, check_range
from lit_diffrl.methods.advantage import AdvantageWeighted
from lit_diffrl.methods.edp_learner import SimultaneousEDP, WeightedEDP
from lit_diffrl.methods.losses import expectile_loss, exponential_weights, normalized_q_loss, td_loss, td_target
from lit_diffrl.nets.critics import ValueNet


class EDPTD3(SimultaneousEDP):
    """EDP with TD3+BC's improvement: ``L_diff - w alpha mean Q_i(s, a_hat) / mean |Q_i(s, a_hat)|`` (section 4.1).

    A coin per update decides which critic is i. Critics learn from actions of the averaged policy (Eq. 8's target).

    Departures from the paper, as its code: Eq. 9's action is clipped to the box; the DDPM chain has the posterior's
    variance and clips its clean prediction; the average starts at update 1005, every fifth, from the initial policy.
    The paper's: ``clip_approximation false``, ``sampler.variance beta``, ``sampler.clip false``.

    Logged: ``loss/critic``, ``loss/diffusion``, ``loss/q`` (-alpha while all values are positive), ``clipped`` (share
    of a_hat's entries at the edge of the box, which pass no gradient), ``q/mean``, ``q/target``, ``grad_norm/…``.

    Args:
        alpha: TD3+BC's alpha: 2.0 in the code, 1.0 in a reading of the paper.
        **kwargs: As :class:`~lit_diffrl.methods.edp_learner.EDP`.
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
        return {"total": self.total_loss(diffusion, improvement), "diffusion": diffusion, "q": improvement}


class EDPCRR(WeightedEDP, SimultaneousEDP, AdvantageWeighted):
    """EDP with CRR's improvement: clone the actions that are better than the policy's own (Eqs. 10 to 13).

    The advantage of the data's action is measured against the mean (or the max) of ``candidates`` actions around Eq.
    9's (without it: drawn from the policy); its weight ``min(exp(A / beta), bound)`` multiplies the likelihood of Eq.
    13, or the diffusion loss itself (Eq. 12).

    Logged: as :class:`EDPTD3`, with ``loss/guide`` for ``loss/q``, ``weight`` (mean) and ``weight_bound`` (share at the
    bound); ``clipped`` only while Eq. 13 asks for Eq. 9's action.

    Args:
        weighting: ``exp`` of the advantage, its ``indicator``, or ``softmax`` over the batch: the code's ``adv_norm``,
            unbounded, and smaller than ``exp`` by about the size of the batch unless ``normalize_weights``.
        advantage: Compare with the ``mean`` or the ``max`` over the candidates (the code's ``crr_avg_fn``).
        candidates: Actions a value is taken over.
        candidate_std: Their standard deviation around Eq. 9's action; 1 in the code, wider than the box.
        beta: Temperature of ``exp`` and ``softmax``.
        bound: Largest weight of ``exp``.
        **kwargs: As :class:`WeightedEDP`.
    """

    def __init__(
        self,
        weighting: Literal["exp", "indicator", "softmax"] = "exp",
        advantage: Literal["mean", "max"] = "mean",
        candidates: int = 10,
        candidate_std: float = 1.0,
        beta: float = 1.0,
        bound: float = 20.0,
        **kwargs: Any,
    ) -> None:
        self.keep_weighting(weighting, advantage, candidates, beta, bound)
        check_range("model.candidate_std", candidate_std, 0, high_open=True)
        self.candidate_std = candidate_std
        super().__init__(**kwargs)
        if not self.action_approximation and candidate_std != 1:
            raise ConfigError(
                f"model.candidate_std {candidate_std} is for candidates around the action of Eq. 9, but "
                "model.action_approximation false draws them from the policy; leave one of them out"
            )

    @torch.no_grad()
    def weights(self, batch: PolicyBatch, a_hat: Tensor) -> Tensor:
        """CRR's weight of each data action ``(B,)``; ``a_hat (B, A)`` is Eq. 9's."""
        noise = self.draws.randn_like(a_hat[:, None].expand(-1, self.candidates, -1))
        if self.action_approximation:
            own = a_hat[:, None] + self.candidate_std * noise
        else:
            own = self.policy.sample(batch.obs, noise, self.sampler, self.draws.randn_like)
        advantage = self.least_q(batch.obs, batch.action) - self.baseline(self.least_q(batch.obs, own))
        return self.settle(self.weigh(advantage))

    def policy_loss(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """Diffusion loss and weighted likelihood."""
        noised = self.policy.noised(batch.action, batch.obs, self.draws)
        weights = self.weights(batch, self.policy.approximate(noised, clip=self.clip_approximation).detach())
        guide = self.guide_loss(weights, noised, batch)
        diffusion = noised.error.mean()
        return {"total": self.total_loss(diffusion, guide), "diffusion": diffusion, "guide": guide}


class EDPIQL(WeightedEDP):
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
        **kwargs: As :class:`WeightedEDP`.
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
        self.value = ValueNet(spec.obs_dim, o.hidden, o.layers, o.activation, o.layer_norm, o.first_tanh, o.orthogonal)

    def configure_optimizers(self) -> list[Optimizer]:
        """Adam for the critics, the policy and the value."""
        return [*super().configure_optimizers(), self.critic_optimizer(self.value)]

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> dict[str, Tensor]:
        """One update: value, policy, critics, averages; returns the diffusion loss."""
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
        total = self.total_loss(diffusion, guide)
        policy_norm = self.descend(policy_optimizer, total, "policy", batch, self.grad_clip)

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
        return {"loss/diffusion": diffusion.detach()}
