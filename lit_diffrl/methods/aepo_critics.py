"""How AEPO's critics learn: expectile regression, or what its appendix H compares that with.

Source: as :mod:`lit_diffrl.methods.aepo`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.errors import ConfigError, check_choice, check_range
from lit_diffrl.methods.energy_learner import EnergyLearner
from lit_diffrl.methods.losses import expectile_loss, td_loss, td_target
from lit_diffrl.nets.critics import ValueNet


class AEPOCritics(EnergyLearner):
    """Critics and, unless the softmax over support actions stands in for it, the value of states.

    Args:
        q_training: How critics learn: ``iql``, ``isql`` or ``cql``.
        expectile: tau of the values (Eq. 27): 0.5 to 0.8.
        cql_weight: Weight of the conservative term of ``cql``.
        cql_actions: Uniform actions in that term, beside the support actions.
        cql_backup: Value of next states with ``cql``: ``value`` of the expectile, or ``support``, the softmax of isql.
        kwargs: As EnergyLearner; of ``critic``, ``layer_norm`` and ``first_tanh`` are for the Q networks alone.
    """

    def __init__(
        self,
        q_training: Literal["iql", "isql", "cql"] = "iql",
        expectile: float = 0.7,
        cql_weight: float = 5.0,
        cql_actions: int = 10,
        cql_backup: Literal["value", "support"] = "value",
        **kwargs: Any,
    ) -> None:
        check_choice("model.q_training", q_training, ("iql", "isql", "cql"))
        check_range("model.expectile", expectile, 0, 1, low_open=True, high_open=True)
        check_range("model.cql_weight", cql_weight, 0, high_open=True)
        check_range("model.cql_actions", cql_actions, 1)
        check_choice("model.cql_backup", cql_backup, ("value", "support"))
        if q_training != "cql" and cql_backup != "value":
            raise ConfigError(
                f"model.cql_backup {cql_backup!r} is for model.q_training cql, got {q_training!r}; leave it out, or "
                "set q_training cql"
            )
        self.q_training, self.expectile = q_training, expectile
        self.cql_weight, self.cql_actions, self.cql_backup = cql_weight, cql_actions, cql_backup
        super().__init__(**kwargs)

    @property
    def uses_value(self) -> bool:
        """Whether there is a value of states."""
        return self.q_training == "iql" or (self.q_training == "cql" and self.cql_backup == "value")

    def build(self, spec: DatasetSpec) -> None:
        """Networks as EnergyLearner's, and values."""
        super().build(spec)
        c = self.critic_options
        if self.uses_value:
            self.value = ValueNet(spec.obs_dim, hidden=c.hidden, layers=c.layers, activation=c.activation)

    def configure_optimizers(self) -> list[Optimizer]:
        """As the others, and one for the values."""
        optimizers = super().configure_optimizers()
        if self.uses_value:
            optimizers.append(self.critic_optimizer(self.value))
        return optimizers

    def update_critics(
        self, critic_optimizer: LightningOptimizer, value_optimizer: list[LightningOptimizer], batch: PolicyBatch
    ) -> None:
        """Values, critics, targets (Eq. 27)."""
        if self.uses_value:
            least = self.least_q(batch.obs, batch.action, target=True)
            with torch.no_grad():
                ahead = self.value(batch.next_obs)
            value = self.value(batch.obs)
            value_loss = expectile_loss(least - value, self.expectile)
            value_norm = self.descend(value_optimizer[0], value_loss, "value", batch)
            if self.reporting:
                self.report({"loss/value": value_loss, "q/value": value.mean(), "grad_norm/value": value_norm})
        else:
            assert self.states is not None and self.support is not None
            ahead = self.next_value(batch.next_obs, self.support[self.states.after[self.rows()]])
        y = td_target(batch.reward, batch.done, batch.discount, ahead)

        q = self.critic(batch.obs, batch.action)
        td = td_loss(q, y)
        loss = td if self.q_training != "cql" else 0.5 * td + self.cql_weight * self.conservative(q, batch)
        critic_norm = self.descend(critic_optimizer, loss, "critic", batch)
        self.target_critic.update(self.critic)
        if self.reporting:
            self.report({"loss/critic": td, "q/mean": q.mean()}, prog_bar=True)
            self.report({"q/target": y.mean(), "grad_norm/critic": critic_norm})

    def conservative(self, q: Tensor, batch: PolicyBatch) -> Tensor:
        """CQL's term: soft maximum over uniform, support and data actions less the data's value, summed over critics.

        A diffusion model's density is not known, so actions are not weighed by theirs.
        """
        assert self.support is not None
        noise = self.draws.randn_like(batch.action[:, None].expand(-1, self.cql_actions, -1))
        others = torch.cat([2 * torch.special.ndtr(noise) - 1, self.support[self.rows()]], dim=1)
        every = torch.cat([q.unsqueeze(-1), self.critic(batch.obs, others)], dim=-1)
        gap: Tensor = (every.logsumexp(dim=-1) - q).mean(dim=1).sum()
        return gap
