"""CQL: critics that are pushed down where the data does not support them, under a soft actor-critic.

Source: Kumar, Zhou, Tucker and Levine, "Conservative Q-Learning for Offline Reinforcement Learning", 2020; constants
and order as CORL has them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.errors import ConfigError, check_range
from lit_diffrl.methods.base import as_options
from lit_diffrl.methods.losses import td_loss, td_target
from lit_diffrl.methods.offline_learner import OfflineLearner
from lit_diffrl.methods.policy_options import ActorOptions, CriticOptions
from lit_diffrl.nets.actors import SquashedGaussianActor, squash, squashed_log_prob

CQL_CRITIC = CriticOptions(activation="relu", orthogonal=True)
CQL_ACTOR = ActorOptions(layers=3)
NEGLIGIBLE = 50.0  # e^-50 of the largest term is below a double's rounding


class Positive(nn.Module):
    """A positive number that learns: ``exp`` of the parameter ``log``."""

    def __init__(self, log: float, low: float | None = None, high: float | None = None) -> None:
        """Begin with ``exp(log)``; :meth:`keep` holds the logarithm between ``low`` and ``high``, where they are."""
        super().__init__()
        self.log, self.low, self.high = nn.Parameter(torch.tensor(log)), low, high

    def forward(self) -> Tensor:
        """The number, a scalar."""
        return self.log.exp()

    @torch.no_grad()
    def keep(self) -> None:
        """After a step: back to the limits. Limits in :meth:`forward` would leave no gradient to come back by."""
        if self.low is not None or self.high is not None:
            self.log.clamp_(self.low, self.high)


class CQL(OfflineLearner):
    """CQL(H): the critics' usual loss plus ``alpha (log sum_a exp Q(s, a) - Q(s, a_data))`` for each (Eq. 4).

    An update takes all gradients at the same, old parameters and then steps; with ``policy_first`` the critics learn
    from actions of the policy that has just stepped:

    1. Critics' target: ``r + gamma (1 - d) min_i Q'_i(s', a')``, a' drawn from the policy; with
       ``critic.backup_candidates`` above 1 the best of that many for each critic. No entropy in it.
    2. Policy: ``mean(temperature log pi(a | s) - min_i Q_i(s, a))``, and the temperature, which holds the policy's
       entropy at ``target_entropy``. In the first ``clone_epochs`` the data's action is learned in place of the
       critics' slope: ``mean(temperature log pi(a | s) - log pi(a_data | s))``.
    3. Critics: squared error, and the conservative term. The sum over actions is estimated at ``n_actions`` uniform
       ones, as many of the policy at s, and as many of it at s', all judged at s and weighed by their densities.
       With ``target_gap`` a multiplier holds the term there (Lagrange; Eq. 30).
    4. Targets of the critics.

    The learner inside DyDiff's code has ``policy_first``, ``entropy_log_low`` -10, ``entropy_log_high`` 0.5, networks
    of two layers and torch's initial weights.

    Departures from the authors' scripts: no cloning first, where they clone for 40,000 updates (``clone_epochs`` 40).
    From CORL, which clones for none by default: the logarithm of the standard deviation is the output less 1, without
    learned scale and offset; the max-target backup takes each critic's best action before the least critic, as the
    authors do; cloning raises the density of the data's action, CORL's that of one of the policy's own.

    Logged: ``loss/critic`` (the squared errors), ``loss/conservative``, ``loss/actor`` (jumps where cloning ends: minus
    a log-density becomes minus a value), ``q/mean`` (at the data's actions), ``q/uniform`` and ``q/policy`` (at others,
    at s: below ``q/mean``, or ``alpha`` is too small), ``q/target``, ``entropy`` (ends near ``target_entropy``),
    ``temperature``, ``multiplier`` (with ``target_gap``; one that grows without end asks for a larger gap),
    ``grad_norm/critic``, ``grad_norm/actor``. A ``q/mean`` that falls on and on means that ``alpha`` is too large for
    the rewards' scale.

    Args:
        policy_epochs: Length of training in epochs.
        alpha: Weight of the conservative term: 10 on locomotion, 5 on AntMaze, 1 on Adroit's pen.
        target_gap: What the term is held at by a multiplier of ``alpha`` (AntMaze: 0.8); null for a fixed weight.
        n_actions: Actions from each of the three sources.
        temperature: Of the logarithm of the sum.
        importance_sampling: Weigh the actions by their densities; false adds the data's action and weighs all alike.
        diff_clip: Least value of the term for a state (AntMaze: -200); null for none.
        target_entropy: What the policy's entropy is held at; null for minus the number of action entries.
        entropy_log_low: Least logarithm of the entropy's temperature; null for none.
        entropy_log_high: Its greatest; null for none.
        clone_epochs: First epochs, in which the policy clones the data while the critics learn; fewer than
            ``policy_epochs``.
        policy_first: Draw the actions of the critics' losses from the policy after its step, not before.
        actor: The policy's network.
        critic: The critics and their targets.
        lr: Learning rate of the policy and the temperature: 3e-5, or 1e-4 on AntMaze and the pen.
    """

    def __init__(
        self,
        policy_epochs: int = 1000,
        alpha: float = 10.0,
        target_gap: float | None = None,
        n_actions: int = 10,
        temperature: float = 1.0,
        importance_sampling: bool = True,
        diff_clip: float | None = None,
        target_entropy: float | None = None,
        entropy_log_low: float | None = None,
        entropy_log_high: float | None = None,
        clone_epochs: int = 0,
        policy_first: bool = False,
        actor: ActorOptions = CQL_ACTOR,
        critic: CriticOptions = CQL_CRITIC,
        lr: float = 3e-5,
    ) -> None:
        super().__init__()
        check_range("model.policy_epochs", policy_epochs, 1)
        check_range("model.alpha", alpha, 0, high_open=True)
        check_range("model.n_actions", n_actions, 1)
        check_range("model.clone_epochs", clone_epochs, 0)
        if clone_epochs >= policy_epochs:
            raise ConfigError(
                f"model.clone_epochs {clone_epochs} leaves none of model.policy_epochs {policy_epochs} in which "
                "the policy follows the critics; give fewer, or take BC"
            )
        check_range("model.temperature", temperature, 0, low_open=True, high_open=True)
        check_range("model.lr", lr, 0, low_open=True, high_open=True)
        free = {"target_gap": target_gap, "diff_clip": diff_clip, "target_entropy": target_entropy}
        for name, value in (free | {"entropy_log_low": entropy_log_low, "entropy_log_high": entropy_log_high}).items():
            if value is not None:
                check_range(f"model.{name}", value)
        if entropy_log_low is not None and entropy_log_high is not None:
            check_range("model.entropy_log_high", entropy_log_high, entropy_log_low)
        self.save_hyperparameters(logger=False)
        self.policy_epochs, self.alpha, self.target_gap, self.lr = policy_epochs, alpha, target_gap, lr
        self.n_actions, self.temperature, self.importance_sampling = n_actions, temperature, importance_sampling
        self.diff_clip, self.target_entropy, self.policy_first = diff_clip, target_entropy, policy_first
        self.clone_epochs = clone_epochs
        self.entropy_log = entropy_log_low, entropy_log_high
        self.actor_options = as_options(CQL_ACTOR, actor)
        self.critic_options = as_options(CQL_CRITIC, critic)

    def build(self, spec: DatasetSpec) -> None:
        """Policy, its temperature, critics with their targets, and the multiplier."""
        super().build(spec)
        o = self.actor_options
        self.actor = SquashedGaussianActor(spec.obs_dim, spec.action_dim, o.hidden, o.layers, o.activation, o.dropout)
        self.entropy_temperature = Positive(0.0, *self.entropy_log)
        self.build_critics(spec)
        if self.target_gap is not None:
            self.multiplier = Positive(1.0)
        self.entropy = float(-spec.action_dim) if self.target_entropy is None else self.target_entropy

    def configure_optimizers(self) -> list[Optimizer]:
        """Adam for the critics, the policy with its temperature, and the multiplier."""
        optimizers: list[Optimizer] = [
            self.critic_optimizer(),
            Adam([*self.actor.parameters(), self.entropy_temperature.log], lr=self.lr, fused=True),
        ]
        if self.target_gap is not None:
            optimizers.append(Adam(self.multiplier.parameters(), lr=self.critic_options.lr, fused=True))
        return optimizers

    def conservative(self, q: Tensor, log_density: Tensor) -> Tensor:
        """Soft maximum over other actions less the value of the data's, one for each critic.

        Args:
            q: ``(critics, B, 1 + N)`` values of the data's action and of the N others.
            log_density: ``(B, N)`` logarithms of the densities that the others were drawn from.

        Returns:
            ``(critics,)`` means over the batch.
        """
        weighed = (q[..., 1:] - log_density if self.importance_sampling else q) / self.temperature
        # Actions so far below the best are lost in the sum's rounding. Their gradients, not quite 0 in float32, would
        # make the products of the critics' backward ten times as slow on Intel's processors.
        weighed = weighed.clamp(min=weighed.detach().amax(dim=-1, keepdim=True) - NEGLIGIBLE)
        soft_max = self.temperature * weighed.logsumexp(dim=-1)
        gap = soft_max - q[..., 0]
        return (gap if self.diff_clip is None else gap.clamp_min(self.diff_clip)).mean(dim=1)

    @torch.no_grad()
    def lessons(
        self, batch: PolicyBatch, policy: tuple[Tensor, Tensor], noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the critics learn from.

        Args:
            batch: Transitions.
            policy: Mean and logarithm of the deviation, each ``(B, A)``, of the policy in the states.
            noise: Standard normal ``(B, 3 n + m, A)``: for n actions of each source, and m of the target.

        Returns:
            Targets ``(B,)``; the data's actions and the others ``(B, 1 + 3 n, A)``; logarithms ``(B, 3 n)`` of the
            densities of the others.
        """
        (rows, width), n, m = batch.action.shape, self.n_actions, self.critic_options.backup_candidates
        for_uniform, for_now, for_next, for_target = noise.split((n, n, n, m), dim=1)
        next_policy: tuple[Tensor, Tensor] = self.actor(batch.next_obs)
        uniform = 2 * torch.special.ndtr(for_uniform) - 1
        now, now_log_prob = squash(*policy, for_now)
        ahead, ahead_log_prob = squash(*next_policy, for_next)
        next_action = squash(*next_policy, for_target if m > 1 else for_target[:, 0])[0]
        y = td_target(batch.reward, batch.done, batch.discount, self.backup(batch.next_obs, next_action))
        actions = torch.cat([batch.action[:, None], uniform, now, ahead], dim=1)
        evenly = now_log_prob.new_full((rows, n), -width * math.log(2))
        return y, actions, torch.cat([evenly, now_log_prob, ahead_log_prob], dim=1)

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> None:
        """One update: policy and temperature, multiplier, critics, targets."""
        critic_optimizer, actor_optimizer, *multiplier_optimizer = self.optimizers()  # type: ignore[attr-defined, misc]
        n = self.n_actions
        count = 3 * n + self.critic_options.backup_candidates
        noise = self.draws.randn_like(batch.action[:, None].expand(-1, count + 1, -1))
        for_critics, for_policy = noise.split((count, 1), dim=1)

        policy: tuple[Tensor, Tensor] = self.actor(batch.obs)
        lessons = None if self.policy_first else self.lessons(batch, policy, for_critics)
        action, log_prob = squash(*policy, for_policy[:, 0])
        temperature = self.entropy_temperature().detach()
        if self.clone_epochs and self.policy_epoch < self.clone_epochs:
            merit = squashed_log_prob(batch.action, *policy)
        else:
            merit = self.critic(batch.obs, action, members=slice(None)).amin(dim=0)
        actor_loss = (temperature * log_prob - merit).mean()
        temperature_loss = -self.entropy_temperature.log * (log_prob.detach().mean() + self.entropy)
        actor_norm = self.descend(actor_optimizer, actor_loss + temperature_loss, "actor", batch)
        self.entropy_temperature.keep()

        y, actions, log_density = lessons or self.lessons(batch, self.actor(batch.obs), for_critics)
        q = self.critic(batch.obs, actions)
        gap = self.conservative(q, log_density)
        conservative_loss = self.alpha * gap.sum()
        if self.target_gap is not None:
            multiplier = self.multiplier().clamp_max(1e6)
            conservative_loss = multiplier.detach() * self.alpha * (gap - self.target_gap).sum()
            multiplier_loss = -multiplier * self.alpha * (gap.detach() - self.target_gap).mean()
            self.descend(multiplier_optimizer[0], multiplier_loss, "multiplier", batch)
            self.report({"multiplier": multiplier})
        q_data = q[..., 0]
        td = td_loss(q_data, y)
        critic_norm = self.descend(critic_optimizer, td + conservative_loss, "critic", batch)

        self.target_critic.update(self.critic)
        self.updates += 1

        if self.reporting:
            self.report(
                {"loss/critic": td, "loss/conservative": conservative_loss, "q/mean": q_data.mean()}, prog_bar=True
            )
            self.report({"loss/actor": actor_loss, "entropy": -log_prob.mean(), "temperature": temperature})
            means = {"q/uniform": q[..., 1 : n + 1].mean(), "q/policy": q[..., n + 1 : 2 * n + 1].mean()}
            self.report({**means, "q/target": y.mean(), "grad_norm/critic": critic_norm, "grad_norm/actor": actor_norm})

    def draw_action(self, obs: Tensor) -> Tensor:
        """A draw of the policy."""
        mean, log_std = self.actor(obs)
        return squash(mean, log_std, self.draws.randn_like(mean))[0]

    def decide(self, obs: Tensor, rows: list[int]) -> Tensor:
        """The mean of the policy, squashed."""
        mean: Tensor = self.actor(obs)[0]
        return mean.tanh()
