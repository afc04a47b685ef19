"""TD3+BC: TD3 with one term more, which holds the policy to the data.

Source: Fujimoto and Gu, "A Minimalist Approach to Offline Reinforcement Learning", 2021, and the authors' code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.errors import check_choice, check_range
from lit_diffrl.methods.base import as_options
from lit_diffrl.methods.losses import normalized_q_loss, td_loss, td_target
from lit_diffrl.methods.offline_learner import OfflineLearner
from lit_diffrl.methods.policy_options import ActorOptions, CriticOptions
from lit_diffrl.nets.actors import DeterministicActor, SquashedGaussianActor, squash
from lit_diffrl.nets.ema import EMA

TD3_CRITIC = CriticOptions(layers=2, activation="relu")


class TD3BC(OfflineLearner):
    """A deterministic policy that maximises ``lambda Q_1(s, pi(s)) - (pi(s) - a)^2`` (Eqs. 3 and 5).

    An update:

    1. Critics: squared error to ``r + gamma (1 - d) min_i Q'_i(s', a')`` at the target policy's action with noise,
       ``a' = clip(pi'(s') + clip(sigma z, -c, c), -1, 1)``.
    2. At every ``policy_freq``-th update, policy: ``-lambda mean Q_1(s, pi(s)) + mean (pi(s) - a)^2``, where
       ``lambda = alpha / mean |Q_1(s, pi(s))|``; then all targets move. In between they stand still.

    States should be normalised (``data.normalizer: gaussian``). With ``policy: gaussian``, which is the learner inside
    DyDiff's code, ``pi(s)`` and ``a'`` are draws of a squashed Gaussian without further noise; its mean acts.

    Departures: none from the code; the second mean is over batch and action entries, which the paper leaves open.

    Logged: ``loss/critic``; ``loss/q`` (-alpha while all values are positive), ``loss/bc`` (falls, and stays above that
    of cloning alone), ``q/mean``, ``q/target``, ``grad_norm/critic``, ``grad_norm/actor``. Values that grow past the
    largest reward over ``1 - gamma`` mean that the critics believe actions that no data supports: lower ``alpha``.

    Args:
        policy_epochs: Length of training in epochs.
        alpha: Weight of the critic against cloning.
        policy: ``deterministic``, or ``gaussian``, squashed by tanh.
        policy_freq: Updates of the critics for each of the policy and the targets.
        policy_noise: Standard deviation sigma of the noise on a deterministic policy's target actions.
        noise_clip: Its largest size c.
        actor: The policy's network.
        critic: The critics and their targets (``target_every`` is of the policy's updates); ``tau`` is the actor's too.
        lr: Learning rate of the policy.
    """

    def __init__(
        self,
        policy_epochs: int = 1000,
        alpha: float = 2.5,
        policy: Literal["deterministic", "gaussian"] = "deterministic",
        policy_freq: int = 2,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        actor: ActorOptions = ActorOptions(),
        critic: CriticOptions = TD3_CRITIC,
        lr: float = 3e-4,
    ) -> None:
        super().__init__()
        check_range("model.policy_epochs", policy_epochs, 1)
        check_range("model.alpha", alpha, 0, high_open=True)
        check_choice("model.policy", policy, ("deterministic", "gaussian"))
        check_range("model.policy_freq", policy_freq, 1)
        check_range("model.policy_noise", policy_noise, 0, high_open=True)
        check_range("model.noise_clip", noise_clip, 0, high_open=True)
        check_range("model.lr", lr, 0, low_open=True, high_open=True)
        self.save_hyperparameters(logger=False)
        self.policy_epochs, self.alpha, self.policy_freq, self.lr = policy_epochs, alpha, policy_freq, lr
        self.policy, self.policy_noise, self.noise_clip = policy, policy_noise, noise_clip
        self.actor_options = as_options(ActorOptions(), actor)
        self.critic_options = as_options(TD3_CRITIC, critic)
        self.refuse_max_backup()

    def build(self, spec: DatasetSpec) -> None:
        """Policy and critics with their targets."""
        super().build(spec)
        o = self.actor_options
        kind = DeterministicActor if self.policy == "deterministic" else SquashedGaussianActor
        self.actor = kind(spec.obs_dim, spec.action_dim, o.hidden, o.layers, o.activation, o.dropout)
        self.target_actor = EMA(self.actor, 1 - self.critic_options.tau, every=self.policy_freq, start=0)
        self.build_critics(spec, every=self.policy_freq)

    def configure_optimizers(self) -> list[Optimizer]:
        """Adam for the critics and for the policy."""
        return [self.critic_optimizer(), Adam(self.actor.parameters(), lr=self.lr, fused=True)]

    @torch.no_grad()
    def target_q(self, batch: PolicyBatch) -> Tensor:
        """``r + gamma (1 - d) min_i Q'_i(s', a')``, shape ``(B,)``, at the target policy's action with noise."""
        action = self._draw(self.target_actor.net, batch.next_obs)
        if self.policy == "deterministic":
            noise = self.policy_noise * self.draws.randn_like(action)
            action = (action + noise.clamp(-self.noise_clip, self.noise_clip)).clamp(-1, 1)
        next_value = self.least_q(batch.next_obs, action, target=True)
        return td_target(batch.reward, batch.done, batch.discount, next_value)

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> None:
        """One update: critics, and at times policy and targets."""
        critic_optimizer, actor_optimizer = self.optimizers()  # type: ignore[attr-defined, misc]

        y = self.target_q(batch)
        q = self.critic(batch.obs, batch.action)
        critic_loss = td_loss(q, y)
        critic_norm = self.descend(critic_optimizer, critic_loss, "critic", batch)

        if self.target_actor.due:
            action = self._draw(self.actor, batch.obs)
            own_q = self.critic(batch.obs, action, members=slice(1))[0]
            improvement = self.alpha * normalized_q_loss(own_q, self.mean_of_all(own_q.abs()))
            cloning = F.mse_loss(action, batch.action)
            actor_norm = self.descend(actor_optimizer, improvement + cloning, "actor", batch)
            self.report({"loss/q": improvement, "loss/bc": cloning, "grad_norm/actor": actor_norm})
        self.target_actor.update(self.actor)
        self.target_critic.update(self.critic)
        self.updates += 1

        if self.reporting:
            self.report({"loss/critic": critic_loss, "q/mean": q.mean()}, prog_bar=True)
            self.report({"q/target": y.mean(), "grad_norm/critic": critic_norm})

    def _draw(self, actor: nn.Module, obs: Tensor) -> Tensor:
        """An action of ``actor`` in each state, drawn if it is Gaussian."""
        if self.policy == "deterministic":
            return actor(obs)  # type: ignore[no-any-return]
        mean, log_std = actor(obs)
        return squash(mean, log_std, self.draws.randn_like(mean))[0]

    def draw_action(self, obs: Tensor) -> Tensor:
        """The policy's action, drawn if it is Gaussian."""
        return self._draw(self.actor, obs)

    def decide(self, obs: Tensor, rows: list[int]) -> Tensor:
        """The policy's action, or that of its mean."""
        action: Tensor = self.actor(obs) if self.policy == "deterministic" else self.actor(obs)[0].tanh()
        return action
