"""BC: behaviour cloning, the yardstick of every offline learner.

Sources: CORL's settings; Pomerleau 1991. Of the best tenth of the data (``data.top_fraction: 0.1``) it is "10 % BC" of
Chen et al. 2021.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.errors import check_choice, check_range
from lit_diffrl.methods.base import as_options
from lit_diffrl.methods.offline_learner import OfflineLearner
from lit_diffrl.methods.policy_options import ActorOptions
from lit_diffrl.nets.actors import DeterministicActor, GaussianActor, gaussian_log_prob


class BC(OfflineLearner):
    """A policy that predicts the data's action: by the least squared error, or the greatest Gaussian likelihood.

    Neither can choose between two ways to act in a state: it takes their mean. That is what diffusion policies are for.

    Departures: none; rewards are not used at all.

    Logged: ``loss/actor`` (falls to the variance of the data's actions in a state; with ``gaussian`` it is minus a
    log-density, which may become negative), ``grad_norm/actor``.

    Args:
        policy_epochs: Length of training in epochs.
        policy: ``deterministic``, ``tanh(f(s))`` by squared error, or ``gaussian``, ``N(tanh(f(s)), sigma(s)^2)`` by
            likelihood; at evaluation it takes its mean.
        actor: The policy's network.
        lr: Learning rate of Adam.
    """

    def __init__(
        self,
        policy_epochs: int = 1000,
        policy: Literal["deterministic", "gaussian"] = "deterministic",
        actor: ActorOptions = ActorOptions(),
        lr: float = 3e-4,
    ) -> None:
        super().__init__()
        check_range("model.policy_epochs", policy_epochs, 1)
        check_choice("model.policy", policy, ("deterministic", "gaussian"))
        check_range("model.lr", lr, 0, low_open=True, high_open=True)
        self.save_hyperparameters(logger=False)
        self.policy_epochs, self.policy, self.lr = policy_epochs, policy, lr
        self.actor_options = as_options(ActorOptions(), actor)

    def build(self, spec: DatasetSpec) -> None:
        """The policy."""
        super().build(spec)
        o = self.actor_options
        kind = DeterministicActor if self.policy == "deterministic" else GaussianActor
        self.actor = kind(spec.obs_dim, spec.action_dim, o.hidden, o.layers, o.activation, o.dropout)

    def configure_optimizers(self) -> Optimizer:
        """Adam."""
        return Adam(self.actor.parameters(), lr=self.lr, fused=True)

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> None:
        """One update."""
        optimizer = self.optimizers()
        if self.policy == "deterministic":
            loss = F.mse_loss(self.actor(batch.obs), batch.action)
        else:
            loss = -gaussian_log_prob(batch.action, *self.actor(batch.obs)).mean()
        norm = self.descend(optimizer, loss, "actor", batch)  # type: ignore[arg-type]
        self.updates += 1
        self.report({"loss/actor": loss}, prog_bar=True)
        self.report({"grad_norm/actor": norm})

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
