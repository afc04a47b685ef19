"""AEPO: a diffusion model of the behaviour, guided by an energy that a Gaussian posterior gives in closed form.

Source: Hu et al., "Analytic Energy-Guided Policy Optimization for Offline Reinforcement Learning", 2025. Equations are
numbered as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.errors import ConfigError, check_choice, check_range
from lit_diffrl.methods.base import as_options
from lit_diffrl.methods.energy import (
    analytic_energy,
    curved_energy,
    isql_value,
    posterior_spread,
    posterior_variance,
    second_order_energy,
    two_cumulant_energy,
)
from lit_diffrl.methods.energy_learner import EnergyLearner, NoisedAction
from lit_diffrl.methods.energy_options import EnergyOptions, PosteriorOptions, TargetOptions
from lit_diffrl.methods.expansion import expand
from lit_diffrl.methods.losses import expectile_loss, td_loss, td_target
from lit_diffrl.methods.posterior import PosteriorTable
from lit_diffrl.nets.critics import ValueNet
from lit_diffrl.seeding import Draws, Place

AEPO_ENERGY = EnergyOptions(layers=3)
MEASURED = 4096  # transitions that the scale of the target is measured on
UNIFORM = 10  # actions that CQL adds to the support actions


class AEPO(EnergyLearner):
    """Expectile critics, and an energy network that regresses on the closed form of Eq. 25.

    With ``a | a_t ~ N(mu, v I)`` and Q linear around ``a_bar``, the intermediate energy is

        ``E_t = beta Q(a_bar) + beta g.(mu - a_bar) + beta^2 v(t) |g|^2 / 2``,   g Q's gradient (Eq. 25)

    where mu comes from the behaviour model (Eq. 18) and v, a function of time alone, from its mean squared prediction
    (Eq. 22, Posterior 1) or the variance of its mean (Eq. 24, Posterior 2). Phases:

    1. ``behaviour``: the noise loss (Eq. 7).
    2. ``critic``: ``V`` by expectile regression on the least target critic, then the critics on ``r + gamma V(s')``
       (Eq. 27), then their targets. ``q_training`` isql takes the in-support softmax of QGPO instead; cql halves the
       squared error and adds ``cql_weight (logsumexp Q(s, .) - Q(s, a))`` over uniform, support and data actions.
    3. ``energy``: v is tabulated; then squared error of the energy network to Eq. 25 (Eq. 26).

    With ``schedule`` joint the third phase trains all three (Algorithm 1); with 0 epochs for the first two that is all.

    Departures, each with the argument that undoes it, if there is one:
        - The posterior mean is calibrated, since Eq. 18 multiplies the network's error by 25 at t = 0.8 and by 152 at
          t = 1, and the energy then learns it: ``posterior.mean: eps``.
        - The variance is estimated by the likelihood (Eq. 43) above t = 0.2, where Eq. 22 multiplies an error by up to
          23,000: ``posterior.variance: raw``; it is clamped and smoothed: ``clamp: false``, ``isotonic: false``.
        - ``beta V(s)`` is subtracted from the target, which is divided by its deviation; neither changes the guidance:
          ``target: {baseline: false, scale: 1}``.
        - Behaviour model, critics and energy learn one after the other, which has the same fixed point:
          ``schedule: joint``.
        - CQL's actions are not weighted by their densities, which the behaviour model does not tell.
        - Scores are not rescaled (Eq. 45), which would not be exact: ``rescale: true``.

    Logged: ``loss/behaviour``, ``loss/value``, ``loss/critic``, ``loss/energy`` (in units of ``target.scale``, by
    default the target's deviation: below 1, and down to the share that the noised action does not tell),
    ``target/mean`` and ``target/deviation`` (mean absolute one; of the target before it is divided),
    ``target/variance_term`` (mean of its last term; far above the deviation it means that ``beta`` times the rewards'
    scale is too large for the expansion), ``q/mean``, ``q/value``, ``q/target``, ``q/gradient`` (norm of g),
    ``grad_norm/...``.

    Args:
        q_training: How critics learn: ``iql``, ``isql`` or ``cql``.
        expectile: tau of the values (Eq. 27): 0.5 to 0.8.
        cql_weight: Weight of the conservative term of ``cql``.
        schedule: ``sequential``, or ``joint`` in the energy's phase (Algorithm 1).
        posterior: The clean action given the noisy one.
        target: What the energy network learns.
        energy: The energy network.
        rescale: As EnergyLearner.
        kwargs: As EnergyLearner.
    """

    fixed_arguments: ClassVar[tuple[str, ...]] = ("posterior",)
    target_scale: Tensor

    def __init__(
        self,
        q_training: Literal["iql", "isql", "cql"] = "iql",
        expectile: float = 0.7,
        cql_weight: float = 5.0,
        schedule: Literal["sequential", "joint"] = "sequential",
        posterior: PosteriorOptions = PosteriorOptions(),
        target: TargetOptions = TargetOptions(),
        energy: EnergyOptions = AEPO_ENERGY,
        **kwargs: Any,
    ) -> None:
        check_choice("model.q_training", q_training, ("iql", "isql", "cql"))
        check_choice("model.schedule", schedule, ("sequential", "joint"))
        check_range("model.expectile", expectile, 0, 1, low_open=True, high_open=True)
        check_range("model.cql_weight", cql_weight, 0, high_open=True)
        self.q_training, self.expectile, self.cql_weight, self.schedule = q_training, expectile, cql_weight, schedule
        self.posterior_options = as_options(PosteriorOptions(), posterior)
        self.target_options = as_options(TargetOptions(), target)
        super().__init__(energy=as_options(AEPO_ENERGY, energy), **kwargs)
        self._check()

    def _check(self) -> None:
        """Refuse options that exclude each other."""
        o, joint = self.target_options, self.schedule == "joint"
        if not joint and not (self.epochs["behaviour"] or self.behaviour_ckpt):
            raise ConfigError(
                "model.behaviour_epochs is 0, but what follows needs a behaviour model; give some epochs, "
                "--model.behaviour_ckpt FILE, or --model.schedule joint"
            )
        if not joint and self.epochs["energy"] and not self.epochs["critic"]:
            raise ConfigError(
                "model.critic_epochs is 0, but the energy needs critics to learn from; give some epochs, or "
                "--model.schedule joint"
            )
        if joint and not self.epochs["energy"]:
            raise ConfigError(
                "model.energy_epochs is 0, but with model.schedule joint it needs some: all networks learn in them; "
                "give some epochs, or --model.schedule sequential"
            )
        if joint and self.q_training != "iql":
            raise ConfigError(
                f"model.q_training {self.q_training!r} needs support actions, which a behaviour model that learns at "
                "the same time would make stale; use model.schedule sequential, or q_training iql"
            )
        if joint and o.scale == "auto":
            raise ConfigError(
                "model.target.scale 'auto' is measured on finished critics; with model.schedule joint give a number"
            )
        if o.curvature == "full" and o.covariance == "jvp":
            raise ConfigError(
                "model.target.covariance 'jvp' is the covariance along Q's gradient alone, but target.curvature 'full' "
                "needs all directions; use isotropic or trace, or curvature hvp"
            )
        if o.form == "two_cumulant" and o.curvature != "none":
            raise ConfigError(
                f"model.target.form 'two_cumulant' has no second derivatives; got target.curvature {o.curvature!r}"
            )
        if o.form == "two_cumulant" and o.a_bar in ("posterior_mean", "fixed"):
            raise ConfigError(
                f"model.target.form 'two_cumulant' asks Q at the data's action; got target.a_bar {o.a_bar!r}, which is "
                "for form 'aepo'; use that, or a_bar 'data'"
            )

    # ---------------------------------------------------------------- building

    @property
    def uses_value(self) -> bool:
        """Whether there is a value of states."""
        return self.q_training != "isql"

    def build(self, spec: DatasetSpec) -> None:
        """Networks as EnergyLearner's, values, and what is tabulated."""
        super().build(spec)
        c = self.critic_options
        if self.uses_value:
            self.value = ValueNet(spec.obs_dim, hidden=c.hidden, layers=c.layers, activation=c.activation)
        p = self.posterior_options
        self.posterior = PosteriorTable(
            spec.action_dim,
            self.sde,
            posterior=p.kind,
            estimator=p.variance,
            mean_estimator="eps" if p.mean == "eps" else "calibrated",
            grid=p.grid,
            clamp=p.clamp,
            isotonic=p.isotonic,
            bound=1.0 if p.clip else None,
            decay=p.decay,
        )
        scale = self.target_options.scale
        self._tabulated = False  # whether posterior and scale are known: on the host, for no update to wait for
        # nan until it is measured
        self.register_buffer("target_scale", torch.tensor(math.nan if scale == "auto" else float(scale)))

    def configure_optimizers(self) -> list[Optimizer]:
        """As the others, and one for the values."""
        optimizers = super().configure_optimizers()
        if self.uses_value:
            optimizers.append(self.critic_optimizer(self.value))
        return optimizers

    @property
    def guidance_unit(self) -> float:
        """The energy network learns the energy divided by this."""
        return float(self.target_scale)

    def setup(self, stage: str) -> None:
        """As EnergyLearner; a run that begins has a posterior and a scale of its own."""
        super().setup(stage)
        self._tabulated = False
        if stage == "fit" and self.trainer.ckpt_path is None:
            self.posterior.fitted.fill_(False)

    @torch.no_grad()
    def prepare(self, phase: str) -> None:
        """Draw support actions where critics need them; tabulate the posterior and measure the target."""
        if phase == "critic" and self.q_training != "iql":
            self.draw_support()
        if phase != "energy" or self._tabulated:
            return
        self._tabulated = True
        if bool(self.posterior.fitted):  # by the run that goes on
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        every = data.transitions(torch.arange(len(data.table), device=data.table.device))
        if self.schedule == "joint":
            self.posterior.describe(self.to_own(every.action))
            return
        draws = Draws()
        draws.begin(Place(self.current_epoch, 0), self.device)  # the same in all processes
        obs, action = self.to_own(every.obs), self.to_own(every.action)
        self.posterior.fit(self.behaviour, obs, action, draws, samples=self.posterior_options.samples)
        if self.target_options.scale == "auto":
            rows = torch.linspace(0, len(data.table) - 1, min(MEASURED, len(data.table))).long()
            sample = PolicyBatch(*(self.to_own(x) for x in data.transitions(rows.to(data.table.device))))
            self.draws.begin(Place(self.current_epoch, 0), self.device)
            noised = self.noised(sample.action)
            target = self.energy_target(sample, noised, self.behaviour(noised.a_t, noised.t, sample.obs))
            self.target_scale.copy_(target.std().clamp_min(1e-6))

    # ---------------------------------------------------------------- one update

    def training_step(self, batch: PolicyBatch, batch_idx: int) -> None:
        """One update of the phase, or of all networks (Algorithm 1)."""
        behaviour_optimizer, critic_optimizer, energy_optimizer, *value_optimizer = self.optimizers()  # type: ignore[attr-defined, misc]
        phase = self.phase.name
        together = self.schedule == "joint" and phase == "energy"
        if phase == "critic" or together:
            self.update_critics(critic_optimizer, value_optimizer, batch)
        if phase != "critic":
            noised = self.noised(batch.action)
            if phase == "behaviour" or together:
                self.update_behaviour(behaviour_optimizer, batch, noised)
            if phase == "energy":
                self.update_energy(energy_optimizer, self.energy_loss(batch, noised), batch)
        self.updates += 1

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
            ahead = self.in_support_value(batch.next_obs)
        y = td_target(batch.reward, batch.done, batch.discount, ahead)

        q = self.critic(batch.obs, batch.action)
        td = td_loss(q, y)
        loss = td if self.q_training != "cql" else 0.5 * td + self.cql_weight * self.conservative(q, batch)
        critic_norm = self.descend(critic_optimizer, loss, "critic", batch)
        self.target_critic.update(self.critic)
        if self.reporting:
            self.report({"loss/critic": td, "q/mean": q.mean()}, prog_bar=True)
            self.report({"q/target": y.mean(), "grad_norm/critic": critic_norm})

    @torch.no_grad()
    def in_support_value(self, next_obs: Tensor) -> Tensor:
        """QGPO's softmax value ``(B,)`` of the next states of this update's batch."""
        assert self.states is not None and self.support is not None
        actions = self.support[self.states.after[self.rows()]]
        return isql_value(self.least_q(next_obs, actions, target=True), self.support_options.beta_q)

    def conservative(self, q: Tensor, batch: PolicyBatch) -> Tensor:
        """CQL's term: soft maximum over uniform, support and data actions less the data's value, summed over critics.

        A diffusion model's density is not known, so actions are not weighed by theirs.
        """
        assert self.support is not None
        noise = self.draws.randn_like(batch.action[:, None].expand(-1, UNIFORM, -1))
        others = torch.cat([2 * torch.special.ndtr(noise) - 1, self.support[self.rows()]], dim=1)
        every = torch.cat([q.unsqueeze(-1), self.critic(batch.obs, others)], dim=-1)
        gap: Tensor = (every.logsumexp(dim=-1) - q).mean(dim=1).sum()
        return gap

    # ---------------------------------------------------------------- the energy

    def energy_loss(self, batch: PolicyBatch, noised: NoisedAction) -> Tensor:
        """Eq. 26."""
        o, (t, eps, a_t) = self.target_options, noised
        with torch.no_grad():
            eps_hat = self.behaviour(a_t, t, batch.obs).to(eps.dtype)
        if self.schedule == "joint":
            self.posterior.track(t, eps_hat, eps, batch.action, partial(self.trainer.strategy.reduce, reduce_op="mean"))
        target = self.energy_target(batch, noised, eps_hat)
        if self.reporting:
            mean = self.mean_of_all(target)
            self.report({"target/mean": mean, "target/deviation": (target - mean).abs().mean()})
        f, target = self.energy(a_t, t, batch.obs), target / self.target_scale
        error = F.huber_loss(f, target, reduction="none") if o.loss == "huber" else (f - target).square()
        if o.weight == "alpha2":
            error = error * self.sde.alpha(t).square()
        return error.mean()

    @torch.no_grad()
    def energy_target(self, batch: PolicyBatch, noised: NoisedAction, eps_hat: Tensor) -> Tensor:
        """Eq. 25, or what the options have in its place; no gradient reaches critics or behaviour model.

        Args:
            batch: B transitions.
            noised: Their noised actions.
            eps_hat: ``(B, A)`` predicted noise.

        Returns:
            ``(B,)``.
        """
        o, beta, v_bar = self.target_options, self.beta, self.posterior.v_bar if self.posterior.clamp else None
        (t, _, a_t), q = noised, self.q_of(batch.obs)
        mu = batch.action
        if self.posterior_options.mean != "sample" and o.form == "aepo":
            mu = self.posterior.mean(a_t, t, eps_hat)
        q_bar, g, a_bar, second = expand(q, batch.action, mu, self.posterior.action_mean, o)

        def behaviour(x: Tensor, t: Tensor) -> Tensor:
            return self.behaviour(x, t, batch.obs).to(x.dtype)  # type: ignore[no-any-return]

        square = g.square().sum(-1)
        if o.covariance == "jvp":
            # along g, as if it were the same in all directions
            var = posterior_spread(behaviour, a_t, t, g, self.sde, v_bar) / square.clamp_min(1e-12)
        elif o.covariance == "trace":
            var = posterior_variance(behaviour, a_t, t, self.sde, self.draws.randn_like(a_t).sign()[None], v_bar)
        else:
            var = self.posterior.variance(t)
        if self.reporting:
            self.report(
                {"q/gradient": square.sqrt().mean(), "target/variance_term": (0.5 * beta**2 * var * square).mean()}
            )

        if o.form == "two_cumulant":
            energy = two_cumulant_energy(q_bar, g, var, beta)
        elif o.curvature == "full":
            energy = second_order_energy(q_bar, g, second, mu, a_bar, var, beta)
        elif o.curvature == "hvp":
            energy = curved_energy(q_bar, g, mu, a_bar, var, second, beta)
        else:
            energy = analytic_energy(q_bar, g, mu, a_bar, var, beta)
        return energy - beta * self.value(batch.obs) if o.baseline and self.uses_value else energy

    def q_of(self, obs: Tensor) -> Callable[[Tensor], Tensor]:
        """Q in states ``(B, S)``, as ``(B, A) -> (B,)``, with weights as constants."""
        o = self.target_options
        critic = self.target_critic.net if o.use_target else self.critic

        def q(action: Tensor) -> Tensor:
            both = critic(obs, action, members=slice(None))
            return both.amin(dim=0) if o.q_reduce == "min" else both.mean(dim=0)  # type: ignore[no-any-return]

        return q
