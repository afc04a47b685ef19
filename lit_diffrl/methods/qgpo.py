"""QGPO: a diffusion model of the behaviour, guided by an energy that is learnt by contrasting its own actions.

Source: Lu, Chen, Chen, Su, Li and Zhu, "Contrastive Energy Prediction for Exact Energy-Guided Diffusion Sampling in
Offline Reinforcement Learning", 2023, and the authors' code.
"""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.errors import ConfigError, check_choice
from lit_diffrl.methods.energy import cep_loss, energy_emse_loss, energy_mse_loss
from lit_diffrl.methods.energy_learner import EnergyLearner
from lit_diffrl.methods.losses import td_loss, td_target

MAX_EXPONENT = 4.5  # of labels that are not normalised, as in the code


class QGPO(EnergyLearner):
    """In-support softmax Q-learning and contrastive energy prediction (CEP) on actions of a behaviour model.

    Phases, in the order of the code:

    1. ``behaviour``: the noise loss ``mean sum_A (eps_theta(s, a_t, t) - eps)^2``, t uniform in [1e-3, 1]. Then K
       support actions are drawn from it in every state of the data, once, unguided and unclipped.
    2. ``critic``: the critics' squared error to ``r + gamma (1 - d) sum_i p_i min_j Q'_j(s', a^i)`` with
       ``p = softmax_i(beta_q min_j Q'_j(s', a^i))``, their targets, and a step of the energy as below, on targets that
       still move.
    3. ``energy``: the energy alone. The K support actions of a state are noised to one time, each by noise of its own,
       and ``-sum_i softmax_i(beta min_j Q'_j(s, a^i)) log softmax_i(f(s, a_t^i, t))`` is descended.

    The labels' softmax stands in for ``exp(beta Q) / Z(s)``: with few actions and a large ``beta`` times spread of Q
    the guidance comes out too weak (K 16, beta 3, Q of slope 1.5 on N(0, 0.25), t 0.3: 0.70 of 1.01), which a larger
    ``guidance_scale`` partly makes up for; ``self_normalise: false`` is unbiased and noisier.

    Departures from the code: the next state of a transition shares its support actions with the transition that
    follows, whose state it is (``support.shared: false`` draws others). Without an effect, and so without an argument:
    labels of the last phase are computed once, since nothing in them changes; the loss of both critics is a sum, not a
    mean, which Adam does not notice.

    Logged: ``loss/behaviour`` (falls quickly to a plateau below the number of action entries), ``loss/critic``,
    ``loss/energy`` (between the labels' entropy and log K; it ends little below log K, since at most times a noised
    action says little about its origin), ``actions`` (effective number of actions in the labels, ``exp`` of their
    entropy: near K, ``beta`` times the spread of values is too small to guide, near 1 a single action decides),
    ``q/mean``, ``q/target``, ``grad_norm/...``.

    Args:
        objective: What the energy learns: ``cep``, or for comparison, at the noised action of the data, ``mse``, the
            mean of ``beta Q``, or ``emse``, that of ``exp(beta (Q - max Q))``, the maximum over the support actions.
        self_normalise: Labels are a softmax over the K actions; false takes ``exp(beta (Q(s, a^i) - Q(s, a)))``, a the
            action of the data, at most 90.
        kwargs: As EnergyLearner.
    """

    energy_phases = ("critic", "energy")

    def __init__(
        self, objective: Literal["cep", "mse", "emse"] = "cep", self_normalise: bool = True, **kwargs: Any
    ) -> None:
        check_choice("model.objective", objective, ("cep", "mse", "emse"))
        self.objective, self.self_normalise = objective, self_normalise
        super().__init__(**kwargs)
        later = self.epochs["critic"] + self.epochs["energy"]
        if later and not (self.epochs["behaviour"] or self.behaviour_ckpt):
            raise ConfigError(
                "model.behaviour_epochs is 0, but what follows needs a behaviour model; give some epochs, or "
                "--model.behaviour_ckpt FILE"
            )
        if self.epochs["energy"] and not self.epochs["critic"]:
            raise ConfigError("model.critic_epochs is 0, but the energy needs critics to learn from; give some epochs")
        self.labels: Tensor | None = None

    def setup(self, stage: str) -> None:
        """As EnergyLearner; labels of earlier critics are none."""
        super().setup(stage)
        self.labels = None

    def prepare(self, phase: str) -> None:
        """Draw the support actions; compute the labels of the last phase."""
        if phase != "behaviour":
            self.draw_support()
        if phase == "energy" and self.labels is None:
            assert self.states is not None and self.support is not None
            obs, support = self.states.obs[: len(self.states.after)], self.support  # of the transitions
            self.labels = self.for_all(
                obs,
                support.shape[1:2],
                lambda number, rows: self.least_q(obs[rows], support[rows], target=True),
                "judging support actions",
            )

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> None:
        """One update of the phase."""
        behaviour_optimizer, critic_optimizer, energy_optimizer = self.optimizers()  # type: ignore[attr-defined, misc]
        if self.phase.name == "behaviour":
            self.update_behaviour(behaviour_optimizer, batch, self.noised(batch.action))
        else:
            rows = self.rows()
            if self.phase.name == "critic":
                self.update_critics(critic_optimizer, batch, rows)
            self.update_energy(energy_optimizer, self.energy_loss(batch, rows), batch)
        self.updates += 1

    def update_critics(self, optimizer: LightningOptimizer, batch: PolicyBatch, rows: Tensor) -> None:
        """Critics and their targets, on a batch whose transitions are ``rows (B,)`` of the data."""
        assert self.states is not None and self.support is not None
        ahead = self.next_value(batch.next_obs, self.support[self.states.after[rows]])
        y = td_target(batch.reward, batch.done, batch.discount, ahead)
        q = self.critic(batch.obs, batch.action)
        loss = td_loss(q, y)
        norm = self.descend(optimizer, loss, "critic", batch)
        self.target_critic.update(self.critic)
        if self.reporting:
            self.report({"loss/critic": loss, "q/mean": q.mean()}, prog_bar=True)
            self.report({"q/target": y.mean(), "grad_norm/critic": norm})

    def energy_loss(self, batch: PolicyBatch, rows: Tensor) -> Tensor:
        """The objective of the energy on a batch whose transitions are ``rows (B,)`` of the data."""
        assert self.support is not None
        support = self.support[rows]
        q = self.least_q(batch.obs, support, target=True) if self.labels is None else self.labels[rows]
        if self.reporting:
            log_p = (self.beta * q).log_softmax(dim=1)
            self.report({"actions": (-(log_p.exp() * log_p).sum(1)).exp().mean()})
        # A state's own constant, independent of its support actions
        q_data = None
        if self.objective != "cep" or not self.self_normalise:
            q_data = self.least_q(batch.obs, batch.action, target=True)
        if self.objective == "cep":
            t, _, a_t = self.noised(support)
            if q_data is not None:
                q = (q - q_data[:, None]).clamp_max(MAX_EXPONENT / self.beta)
            return cep_loss(self.learnt_energy(a_t, t, batch.obs), q, self.beta, self_normalise=self.self_normalise)
        assert q_data is not None
        t, _, a_t = self.noised(batch.action)
        f = self.learnt_energy(a_t, t, batch.obs)
        if self.objective == "mse":
            return energy_mse_loss(f, q_data, self.beta)
        return energy_emse_loss(f, q_data - q.amax(dim=1), self.beta)
