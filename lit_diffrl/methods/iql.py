"""IQL: values by expectile regression, a policy by weighted cloning; no action outside of the data is ever judged.

Source: Kostrikov, Nair and Levine, "Offline Reinforcement Learning with Implicit Q-Learning", 2022, and the authors'
code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.errors import check_choice, check_range
from lit_diffrl.methods.base import as_options
from lit_diffrl.methods.losses import expectile_loss, exponential_weights, td_loss, td_target
from lit_diffrl.methods.offline_learner import OfflineLearner
from lit_diffrl.methods.policy_options import ActorOptions, CriticOptions
from lit_diffrl.nets.actors import DeterministicActor, GaussianActor, gaussian_log_prob
from lit_diffrl.nets.critics import ValueNet

IQL_CRITIC = CriticOptions(layers=2, activation="relu")


class IQL(OfflineLearner):
    """A policy that clones the actions whose value is above the state's.

    An update, in the order of the authors' code, each step with what the one before has changed:

    1. Value: ``mean |tau - 1[u < 0]| u^2`` with ``u = min_i Q'_i(s, a) - V(s)`` (Eq. 5): V is an expectile of Q over
       the data's actions, close to their best for tau close to 1.
    2. Policy: ``-mean w log pi(a | s)`` with ``w = min(exp(beta (min_i Q'_i(s, a) - V(s))), bound)`` (Eq. 7).
    3. Critics: squared error to ``r + gamma (1 - d) V(s')`` (Eq. 6).
    4. Targets of the critics.

    The policy is ``N(tanh(f(s)), sigma^2)`` with one sigma for all states; at evaluation it takes its mean. With
    ``policy: deterministic`` (CORL on hopper-medium and -medium-replay) it is ``tanh(f(s))``, and the sum of squared
    errors over the action's entries stands for ``-log pi``.

    Departures from the authors' code: layers begin as torch's do, not with orthogonal weights of gain sqrt(2)
    (``critic.orthogonal``, for critics and value, is CQL's: 0.01 in the last layer); each process draws dropout's
    masks for itself.

    Logged: ``loss/value``, ``loss/actor`` (minus a log-density: falls, also below 0), ``loss/critic``, ``weight``
    (mean, 1 to 3 in the course of training), ``weight_bound`` (share at the bound; near 1 means that rewards or
    ``beta`` are too large and the policy clones everything), ``q/mean``, ``q/value``, ``q/target``, ``std`` (the
    Gaussian policy's), ``grad_norm/value``, ``grad_norm/actor``, ``grad_norm/critic``.

    Args:
        policy_epochs: Length of training in epochs.
        expectile: tau: 0.7, or 0.9 on AntMaze.
        beta: Inverse temperature: 3, 10 on AntMaze, 0.5 on Adroit and the kitchen.
        bound: Largest weight.
        policy: ``gaussian`` or ``deterministic``.
        actor: The policy's network.
        critic: The critics and their targets; the value's network is like one of them.
        lr: Learning rate of the policy.
        lr_decay: ``cosine`` to 0 over the run, for the policy alone, or ``none``.
    """

    def __init__(
        self,
        policy_epochs: int = 1000,
        expectile: float = 0.7,
        beta: float = 3.0,
        bound: float = 100.0,
        policy: Literal["gaussian", "deterministic"] = "gaussian",
        actor: ActorOptions = ActorOptions(),
        critic: CriticOptions = IQL_CRITIC,
        lr: float = 3e-4,
        lr_decay: Literal["cosine", "none"] = "cosine",
    ) -> None:
        super().__init__()
        check_range("model.policy_epochs", policy_epochs, 1)
        check_range("model.expectile", expectile, 0, 1, low_open=True, high_open=True)
        check_range("model.beta", beta, 0, high_open=True)
        check_range("model.bound", bound, 0, low_open=True, high_open=True)
        check_choice("model.policy", policy, ("gaussian", "deterministic"))
        check_range("model.lr", lr, 0, low_open=True, high_open=True)
        check_choice("model.lr_decay", lr_decay, ("cosine", "none"))
        self.save_hyperparameters(logger=False)
        self.policy_epochs, self.expectile, self.beta, self.bound = policy_epochs, expectile, beta, bound
        self.policy, self.lr, self.lr_decay = policy, lr, lr_decay
        self.actor_options = as_options(ActorOptions(), actor)
        self.critic_options = as_options(IQL_CRITIC, critic)
        self.refuse_max_backup()

    def build(self, spec: DatasetSpec) -> None:
        """Policy, value, and critics with their targets."""
        super().build(spec)
        o, c = self.actor_options, self.critic_options
        sizes = (spec.obs_dim, spec.action_dim, o.hidden, o.layers, o.activation, o.dropout)
        self.actor: DeterministicActor | GaussianActor = (
            DeterministicActor(*sizes) if self.policy == "deterministic" else GaussianActor(*sizes, shared_std=True)
        )
        self.value = ValueNet(spec.obs_dim, c.hidden, c.layers, c.activation, c.layer_norm, c.first_tanh, c.orthogonal)
        self.build_critics(spec)

    def configure_optimizers(self) -> list[Optimizer]:
        """Adam for the value, the policy and the critics."""
        policy = Adam(self.actor.parameters(), lr=self.lr, fused=True)
        return [self.critic_optimizer(self.value), policy, self.critic_optimizer()]

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> None:
        """One update: value, policy, critics, targets."""
        value_optimizer, actor_optimizer, critic_optimizer = self.optimizers()  # type: ignore[attr-defined, misc]
        if self.lr_decay == "cosine":
            self.set_cosine_lr(actor_optimizer, self.lr)
        least = self.least_q(batch.obs, batch.action, target=True)

        value = self.value(batch.obs)
        value_loss = expectile_loss(least - value, self.expectile)
        value_norm = self.descend(value_optimizer, value_loss, "value", batch, self.critic_options.grad_clip)

        with torch.no_grad():
            now, ahead = self.value(torch.cat([batch.obs, batch.next_obs])).chunk(2)
        weights = exponential_weights(least - now, self.beta, self.bound)
        if self.policy == "deterministic":
            error = (self.actor(batch.obs) - batch.action).square().sum(dim=-1)
        else:
            mean, log_std = self.actor(batch.obs)
            error = -gaussian_log_prob(batch.action, mean, log_std)
            if self.reporting:
                self.report({"std": log_std.exp().mean()})
        actor_loss = (weights * error).mean()
        actor_norm = self.descend(actor_optimizer, actor_loss, "actor", batch)

        y = td_target(batch.reward, batch.done, batch.discount, ahead)
        q = self.critic(batch.obs, batch.action)
        critic_loss = td_loss(q, y)
        critic_norm = self.descend(critic_optimizer, critic_loss, "critic", batch)

        self.target_critic.update(self.critic)
        self.updates += 1

        if self.reporting:
            losses = {"loss/value": value_loss, "loss/actor": actor_loss, "loss/critic": critic_loss}
            self.report({**losses, "q/mean": q.mean()}, prog_bar=True)
            norms = {"grad_norm/value": value_norm, "grad_norm/actor": actor_norm, "grad_norm/critic": critic_norm}
            shares = {"weight": weights.mean(), "weight_bound": (weights >= 0.999 * self.bound).float().mean()}
            self.report({**norms, **shares, "q/value": value.mean(), "q/target": y.mean()})

    def draw_action(self, obs: Tensor) -> Tensor:
        """A draw of the policy, within the box, if it is Gaussian."""
        if self.policy == "deterministic":
            return self.decide(obs, [])
        mean, log_std = self.actor(obs)
        return (mean + log_std.exp() * self.draws.randn_like(mean)).clamp(-1, 1)

    def decide(self, obs: Tensor, rows: list[int]) -> Tensor:
        """The policy's action, or its mean."""
        action: Tensor = self.actor(obs) if self.policy == "deterministic" else self.actor(obs)[0]
        return action
