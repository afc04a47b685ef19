"""Diffusion-QL: a diffusion policy improved by a critic, with the gradient carried through the whole chain.

Source: Wang, Hunt and Zhou, "Diffusion Policies as an Expressive Policy Class for Offline Reinforcement Learning",
2023, and the authors' code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.errors import check_range
from lit_diffrl.methods.base import as_options
from lit_diffrl.methods.diffusion_learner import POLICY_EMA, DiffusionLearner
from lit_diffrl.methods.losses import normalized_q_loss, td_loss
from lit_diffrl.methods.options import EMAOptions
from lit_diffrl.methods.policy_options import (
    ActionSamplerOptions,
    CriticOptions,
    NoiseNetOptions,
    SamplerChanges,
    SelectionOptions,
)

DDPM = ActionSamplerOptions()
TARGET_OF_50 = SelectionOptions(candidates=50, critic="target")


class DiffusionQL(DiffusionLearner):
    """Behaviour cloning by diffusion plus ``-eta Q`` of the actions drawn (Algorithm 1).

    An update, in the order of the code:

    1. Critics: squared error to ``r + gamma (1 - d) min_i Q'_i(s', a')``, a' from the averaged policy; one norm limit
       for both.
    2. Policy, with the critics just updated: noise error (their Eq. 2) plus ``eta`` times ``-mean Q_i / mean |Q_j|`` at
       actions drawn through all diffusion steps with gradient (their Eqs. 3 and 4). A coin decides which critic is i;
       the normaliser is the other one.
    3. The policy's average (decay 0.995, every fifth update, the first at update 1001; until then it is the initial
       policy) and the critics' targets.

    Which checkpoint counts is chosen by the diffusion loss (``rollout.select offline`` with the ``rollout.select_rank``
    of ``conf/paper/dql``) or by the simulator; ``rollout.early_stop`` is the code's third way.

    Departures from the code: selection at evaluation takes place per state, also with several environments; the
    learning rate is constant, which is what the code's own decay comes to (its schedule advances once in 50 epochs).

    Logged: ``loss/critic``, ``loss/diffusion`` (falls quickly to a plateau well below 1), ``loss/q`` (-1 where all
    values are positive and the two critics agree), ``q/mean``, ``q/target``, ``grad_norm/critic``,
    ``grad_norm/policy``, and with ``action_approximation`` ``clipped``, as EDP-TD3. Values that grow without end, past
    the largest reward over ``1 - discount``, are the method's known failure: lower ``eta``.

    Args:
        policy_epochs: Length of training in epochs.
        eta: Weight of the critic against cloning; small for good data, larger for mediocre data.
        action_approximation: Improve the action that one network call implies (Eq. 9 of EDP, clipped to the box), which
            the cloning makes anyway, instead of one drawn through all steps: the learner inside DyDiff's code.
        n_diffusion_steps: Diffusion steps K.
        schedule: ``vp`` (the code's), ``linear``, ``linear_unscaled`` or ``cosine``.
        sampler: How actions of the critics' targets and of the policy loss are drawn.
        eval_sampler: What is different about drawing actions to act with; null as ``sampler``.
        selection: Choice among candidates at evaluation.
        net: The noise network.
        critic: The critics and their targets.
        ema: Average of the policy.
        lr: Learning rate of the policy.
        lr_decay: ``cosine`` to 0 over the run, or ``none``.
        grad_clip: Largest norm of the policy's gradient; null for no limit.
    """

    ema_offset = 1

    def __init__(
        self,
        policy_epochs: int = 2000,
        eta: float = 1.0,
        action_approximation: bool = False,
        n_diffusion_steps: int = 5,
        schedule: Literal["vp", "linear", "linear_unscaled", "cosine"] = "vp",
        sampler: ActionSamplerOptions = DDPM,
        eval_sampler: SamplerChanges | None = None,
        selection: SelectionOptions = TARGET_OF_50,
        net: NoiseNetOptions = NoiseNetOptions(),
        critic: CriticOptions = CriticOptions(),
        ema: EMAOptions = POLICY_EMA,
        lr: float = 3e-4,
        lr_decay: Literal["none", "cosine"] = "none",
        grad_clip: float | None = None,
    ) -> None:
        super().__init__()
        check_range("model.eta", eta, 0, high_open=True)
        self.save_hyperparameters(logger=False)
        self.eta, self.action_approximation = eta, action_approximation
        self._keep(
            policy_epochs, n_diffusion_steps, schedule, as_options(DDPM, sampler), eval_sampler,
            as_options(TARGET_OF_50, selection), net, as_options(CriticOptions(), critic), ema, lr, lr_decay, grad_clip,
        )  # fmt: skip

    def policy_loss(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """Cloning and improvement (their Eqs. 2 to 4) under the names they are logged by; ``total`` is descended."""
        noised = self.policy.noised(batch.action, batch.obs, self.draws)
        diffusion = noised.error.mean()
        if self.eta == 0:
            return {"total": diffusion, "diffusion": diffusion}
        action = self.improved_action(noised, batch.obs)
        i = self.draws.coin()
        q = self.critic(batch.obs, action, members=slice(i, i + 1))
        with torch.no_grad():
            other = self.critic(batch.obs, action, members=slice(1 - i, 2 - i))
        improvement = normalized_q_loss(q, self.mean_of_all(other.abs()))
        return {"total": diffusion + self.eta * improvement, "diffusion": diffusion, "q": improvement}

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> dict[str, Tensor]:
        """One update: critics, policy, averages; returns the loss that checkpoints are chosen by offline."""
        critic_optimizer, policy_optimizer = self.optimizers()  # type: ignore[attr-defined, misc]
        self.anneal(policy_optimizer)

        y = self.target_q(batch)
        q = self.critic(batch.obs, batch.action)
        critic_loss = td_loss(q, y)
        critic_norm = self.descend(critic_optimizer, critic_loss, "critic", batch)

        losses = self.policy_loss(batch)
        policy_norm = self.descend(policy_optimizer, losses["total"], "policy", batch, self.grad_clip)

        self.policy_ema.update(self.policy)
        self.target_critic.update(self.critic)
        self.updates += 1

        if self.reporting:
            shown = {f"loss/{name}": loss for name, loss in losses.items() if name != "total"}
            self.report({**shown, "loss/critic": critic_loss, "q/mean": q.mean()}, prog_bar=True)
            self.report({"q/target": y.mean(), "grad_norm/critic": critic_norm, "grad_norm/policy": policy_norm})
        return {"loss/diffusion": losses["diffusion"].detach()}
