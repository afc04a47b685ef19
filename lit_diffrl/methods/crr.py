"""CRR: clone the actions that the critic finds better than the policy's own.

Source: Wang et al., "Critic Regularized Regression", 2020; critics and constants as EDP (Kang et al. 2023) has them, so
that the two differ in the policy alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.errors import check_range
from lit_diffrl.methods.advantage import AdvantageWeighted
from lit_diffrl.methods.base import as_options
from lit_diffrl.methods.losses import td_loss, td_target
from lit_diffrl.methods.policy_options import ActorOptions, CriticOptions, SelectionOptions
from lit_diffrl.nets.actors import GaussianActor, gaussian_log_prob
from lit_diffrl.nets.ema import EMA

CRR_CRITIC = CriticOptions(grad_clip=5.0, clip_each=True)
CRR_ACTOR = ActorOptions(layers=3, activation="mish")
GREEDY = SelectionOptions(candidates=1)


class CRR(AdvantageWeighted):
    """A Gaussian policy by weighted likelihood, ``-mean f log pi(a | s)`` (Eq. 2).

    An update takes all gradients at the same, old parameters and then steps:

    1. Critics' target: ``r + gamma (1 - d) min_i Q'_i(s', a')``, a' drawn from the target policy.
    2. Advantage: ``A = min_i Q_i(s, a) - mean_j min_i Q_i(s, a_j)``, a_j drawn from the policy (Eq. 6), or the max over
       them instead of the mean; weight ``f = min(exp(A / beta), bound)``, or ``1[A > 0]`` (Eqs. 4 and 3), or, as EDP's
       code has it, the softmax of ``A / beta`` over the batch.
    3. Policy, critics, targets of both.

    The policy is ``N(tanh(f(s)), sigma(s)^2)``; actions drawn from it are clipped to the box. At evaluation it takes
    its mean, or, with ``selection.candidates`` above 1, chooses among that many draws by the critics (the paper's
    critic-weighted policy, section 3.3).

    Departures from the paper: twin critics and soft targets in place of a distributional critic and of copies every 100
    updates (the copies: ``critic.tau 1`` and ``critic.target_every 100``), a single Gaussian in place of a mixture, 10
    actions for the advantage in place of 4.

    Logged: ``loss/critic``, ``loss/actor`` (minus a log-density, may become negative), ``weight`` (mean, near 1),
    ``weight_bound`` (share at the bound), ``advantage`` (mean: below 0 where the policy has outgrown the data),
    ``q/mean``, ``q/target``, ``std``, ``grad_norm/critic``, ``grad_norm/actor``.

    Args:
        policy_epochs: Length of training in epochs.
        weighting: ``exp`` of the advantage, its ``indicator``, or ``softmax`` over the batch.
        advantage: Compare with the ``mean`` or the ``max`` over the policy's actions.
        candidates: Number of these.
        beta: Temperature of ``exp`` and ``softmax``.
        bound: Largest weight of ``exp``.
        selection: Choice among the policy's draws at evaluation; one candidate stands for the mean.
        actor: The policy's network.
        critic: The critics and their targets; ``tau`` and ``target_every`` are the policy's too.
        lr: Learning rate of the policy.
        grad_clip: Largest norm of its gradient; null for no limit.
    """

    def __init__(
        self,
        policy_epochs: int = 2000,
        weighting: Literal["exp", "indicator", "softmax"] = "exp",
        advantage: Literal["mean", "max"] = "mean",
        candidates: int = 10,
        beta: float = 1.0,
        bound: float = 20.0,
        selection: SelectionOptions = GREEDY,
        actor: ActorOptions = CRR_ACTOR,
        critic: CriticOptions = CRR_CRITIC,
        lr: float = 3e-4,
        grad_clip: float | None = 5.0,
    ) -> None:
        super().__init__()
        check_range("model.policy_epochs", policy_epochs, 1)
        check_range("model.lr", lr, 0, low_open=True, high_open=True)
        if grad_clip is not None:
            check_range("model.grad_clip", grad_clip, 0, low_open=True, high_open=True)
        self.save_hyperparameters(logger=False)
        self.keep_weighting(weighting, advantage, candidates, beta, bound)
        self.policy_epochs, self.lr, self.grad_clip = policy_epochs, lr, grad_clip
        self.selection = as_options(GREEDY, selection)
        self.actor_options = as_options(CRR_ACTOR, actor)
        self.critic_options = as_options(CRR_CRITIC, critic)

    def build(self, spec: DatasetSpec) -> None:
        """Policy and critics with their targets."""
        super().build(spec)
        o = self.actor_options
        self.actor = GaussianActor(spec.obs_dim, spec.action_dim, o.hidden, o.layers, o.activation, o.dropout)
        c = self.critic_options
        self.target_actor = EMA(self.actor, 1 - c.tau, every=c.target_every, start=0)
        self.build_critics(spec)

    def configure_optimizers(self) -> list[Optimizer]:
        """Adam for the critics and for the policy."""
        return [self.critic_optimizer(), Adam(self.actor.parameters(), lr=self.lr, fused=True)]

    @torch.no_grad()
    def target_q(self, batch: PolicyBatch) -> Tensor:
        """``r + gamma (1 - d) min_i Q'_i(s', a')``, shape ``(B,)``, at an action of the target policy."""
        mean, log_std = self.target_actor.net(batch.next_obs)
        if self.critic_options.backup_candidates > 1:
            mean, log_std = (x[:, None].expand(-1, self.critic_options.backup_candidates, -1) for x in (mean, log_std))
        action = _draw(mean, log_std, self.draws.randn_like(mean))
        return td_target(batch.reward, batch.done, batch.discount, self.backup(batch.next_obs, action))

    @torch.no_grad()
    def value(self, obs: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        """What the policy's own actions are worth, ``(B,)``."""
        noise = self.draws.randn_like(mean[:, None].expand(-1, self.candidates, -1))
        return self.baseline(self.least_q(obs, _draw(mean[:, None], log_std[:, None], noise)))

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> None:
        """One update: both losses, then policy, critics, targets."""
        critic_optimizer, actor_optimizer = self.optimizers()  # type: ignore[attr-defined, misc]

        y = self.target_q(batch)
        q = self.critic(batch.obs, batch.action)
        critic_loss = td_loss(q, y)

        mean, log_std = self.actor(batch.obs)
        advantage = q.detach().amin(dim=0) - self.value(batch.obs, mean, log_std)
        weights = self.weigh(advantage)
        actor_loss = -(weights * gaussian_log_prob(batch.action, mean, log_std)).mean()

        actor_norm = self.descend(actor_optimizer, actor_loss, "actor", batch, self.grad_clip)
        critic_norm = self.descend(critic_optimizer, critic_loss, "critic", batch)
        self.target_actor.update(self.actor)
        self.target_critic.update(self.critic)
        self.updates += 1

        if self.reporting:
            self.report({"loss/critic": critic_loss, "loss/actor": actor_loss, "q/mean": q.mean()}, prog_bar=True)
            norms = {"grad_norm/critic": critic_norm, "grad_norm/actor": actor_norm}
            shares = {"weight": weights.mean(), "weight_bound": (weights >= 0.999 * self.bound).float().mean()}
            means = {"advantage": advantage.mean(), "q/target": y.mean(), "std": log_std.exp().mean()}
            self.report({**norms, **shares, **means})

    def propose(self, obs: Tensor) -> Tensor:
        """The mean of the policy."""
        mean: Tensor = self.actor(obs)[0]
        return mean

    def draw_action(self, obs: Tensor) -> Tensor:
        """A draw of the policy, within the box."""
        mean, log_std = self.actor(obs)
        return _draw(mean, log_std, self.draws.randn_like(mean))

    def decide(self, obs: Tensor, rows: list[int]) -> Tensor:
        """The mean of the policy, or a choice among its draws."""
        mean, log_std = self.actor(obs)
        n = self.selection.candidates
        if n == 1:
            return mean  # type: ignore[no-any-return]
        noise = self.row_noise(rows, (n, mean.shape[1]))
        return self.select(obs, _draw(mean[:, None], log_std[:, None], noise), rows, self.selection)


def _draw(mean: Tensor, log_std: Tensor, noise: Tensor) -> Tensor:
    """Actions of the policy, within the box."""
    return (mean + log_std.exp() * noise).clamp(-1, 1)
