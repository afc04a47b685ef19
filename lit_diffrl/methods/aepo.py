"""AEPO: a diffusion model of the behaviour, guided by an energy that a Gaussian posterior gives in closed form.

Source: Hu et al., "Analytic Energy-Guided Policy Optimization for Offline Reinforcement Learning", 2025. Equations are
numbered as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.diffusion.energy_guidance import Gradient, gradient_of
from lit_diffrl.errors import ConfigError, check_choice
from lit_diffrl.methods.aepo_critics import AEPOCritics
from lit_diffrl.methods.base import as_options
from lit_diffrl.methods.covariance import (
    posterior_covariance,
    posterior_spread,
    posterior_variance,
    variance_of_noise,
)
from lit_diffrl.methods.energy import monte_carlo_energy
from lit_diffrl.methods.energy_learner import NoisedAction
from lit_diffrl.methods.energy_options import EnergyOptions, PosteriorOptions, TargetOptions
from lit_diffrl.methods.expansion import Value, energy_of, expand, expand_at
from lit_diffrl.methods.posterior import PosteriorTable
from lit_diffrl.precision import constant_weights
from lit_diffrl.seeding import Draws, Place

AEPO_ENERGY = EnergyOptions(layers=3, scaled_input=True)
MEASURED = 4096  # transitions that the scale of the target is measured on


class AEPO(AEPOCritics):
    """Expectile critics, and an energy network that regresses on the closed form of Eq. 25.

    With ``a | a_t ~ N(mu, v I)`` and Q linear around ``a_bar``, the intermediate energy is

        ``E_t = beta Q(a_bar) + beta g.(mu - a_bar) + beta^2 v(t) |g|^2 / 2``,   g Q's gradient (Eq. 25)

    where mu comes from the behaviour model (Eq. 18) and v, a function of time alone, from its mean squared prediction
    (Eq. 22, Posterior 1) or the variance of its mean (Eq. 24, Posterior 2). Phases:

    1. ``behaviour``: the noise loss (Eq. 7).
    2. ``critic``: ``V`` by expectile regression on the least target critic, then the critics on ``r + gamma V(s')``
       (Eq. 27), then their targets. ``q_training`` isql takes the in-support softmax of QGPO instead; cql halves the
       squared error and adds ``cql_weight (logsumexp Q(s, .) - Q(s, a))`` over uniform, support and data actions.
    3. ``energy``: v is tabulated; then the energy network's error to Eq. 25 (Eq. 26).

    With ``schedule`` joint the third phase trains all three (Algorithm 1); with 0 epochs for the first two that is all.

    Departures, each with the argument that undoes it, if there is one:
        - The posterior mean is calibrated, since Eq. 18 multiplies the network's error by 25 at t = 0.8 and by 152 at
          t = 1, and the energy then learns it: ``posterior.mean: eps``.
        - The variance is estimated by the likelihood (Eq. 43) above t = 0.2, where Eq. 22 multiplies an error by up to
          23,000: ``posterior.variance: raw``; it is clamped and smoothed: ``clamp: false``, ``isotonic: false``. The
          mean is clipped to the box of actions: ``clip: false``.
        - ``beta V(s)`` is subtracted from the target, which is divided by its deviation; with a squared error neither
          changes the guidance: ``target: {baseline: false, scale: 1}``.
        - Where critics are steep, Eq. 25 has heavy tails. From its squared error a network learns guidance that in
          noise, where the exact one is next to nothing, is tens to hundreds of times too long. So the error is Huber's,
          whose least is between the target's mean, which Eq. 26 asks for, and its median: ``target: {loss: mse}``; the
          network sees ``alpha_t a_t``, so that its guidance fades: ``energy: {scaled_input: false}``; and ``beta`` is
          at the lower end of the paper's range of 1 to 5.
        - Behaviour model, critics and energy learn one after the other, which has the same fixed point:
          ``schedule: joint``.
        - CQL's actions are not weighted by their densities, which the behaviour model does not tell; the data's action
          is one of them, and there are ``support.actions`` of the behaviour's.
        - Scores are not rescaled (Eq. 45), which would not be exact: ``rescale: true``.

    Logged: ``loss/behaviour``, ``loss/value``, ``loss/critic``, ``loss/energy`` (in units of ``target.scale``, by
    default the target's deviation), ``target/mean`` and ``target/deviation`` (mean absolute one; of the target before
    it is divided), ``target/variance_term`` (mean of its last term; far above the deviation it means that ``beta``
    times the rewards' scale is too large for the expansion), ``q/mean``, ``q/value``, ``q/target``, ``q/gradient``
    (norm of g), ``grad_norm/...``.

    Args:
        beta: Inverse temperature of the policy learnt: how far it goes from the behaviour to better actions.
        schedule: ``sequential``, or ``joint`` in the energy's phase (Algorithm 1).
        guidance: What guides: the energy ``network``, or the ``closed_form`` itself, expanded at the posterior mean and
            differentiated through the behaviour model, with the variance by time alone and the target's ``curvature``.
            A network that learned Eq. 25 at ``target.a_bar`` posterior_mean tends to it; other targets are other
            energies. It costs a backward pass through behaviour and critics. ``monte_carlo`` is as EnergyLearner's.
        posterior: The clean action given the noisy one.
        target: What the energy network learns.
        energy: The energy network.
        rescale: As EnergyLearner.
        kwargs: As AEPOCritics.
    """

    fixed_arguments: ClassVar[tuple[str, ...]] = ("posterior",)
    guidances = ("network", "closed_form", "monte_carlo")
    target_scale: Tensor

    def __init__(
        self,
        beta: float = 1.0,
        schedule: Literal["sequential", "joint"] = "sequential",
        guidance: Literal["network", "closed_form", "monte_carlo"] = "network",
        posterior: PosteriorOptions = PosteriorOptions(),
        target: TargetOptions = TargetOptions(),
        energy: EnergyOptions = AEPO_ENERGY,
        **kwargs: Any,
    ) -> None:
        check_choice("model.schedule", schedule, ("sequential", "joint"))
        self.schedule = schedule
        self.posterior_options = as_options(PosteriorOptions(), posterior)
        self.target_options = as_options(TargetOptions(), target)
        super().__init__(beta=beta, guidance=guidance, energy=as_options(AEPO_ENERGY, energy), **kwargs)
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
        for name, value, free in (("q_training", self.q_training, "iql"), ("target.form", o.form, "aepo")):
            if joint and value in ("isql", "cql", "support"):
                raise ConfigError(
                    f"model.{name} {value!r} needs support actions, which a behaviour model that learns at the same "
                    f"time would make stale; use model.schedule sequential, or {name} {free}"
                )
        p = self.posterior_options
        if p.mean == "sample" and o.form == "aepo" and o.a_bar == "posterior_mean":
            raise ConfigError(
                "model.posterior.mean 'sample' is the data's action, so that model.target.a_bar 'posterior_mean' would "
                "be it, too; use a_bar 'data', or mean calibrated or eps"
            )
        if p.mean == "sample" and self.guidance == "closed_form":
            raise ConfigError(
                "model.guidance 'closed_form' has no data's action to take as the posterior's mean when it acts; got "
                "model.posterior.mean 'sample'; use mean calibrated or eps"
            )
        if joint and o.scale == "auto":
            raise ConfigError(
                "model.target.scale 'auto' is measured on finished critics; with model.schedule joint give a number"
            )

    # ---------------------------------------------------------------- building

    def build(self, spec: DatasetSpec) -> None:
        """Networks as AEPOCritics', and what is tabulated."""
        super().build(spec)
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

    @property
    def guidance_unit(self) -> float:
        """The energy network learns the energy divided by this."""
        return float(self.target_scale)

    def setup(self, stage: str) -> None:
        """As EnergyLearner; a run that begins has a posterior and a scale of its own."""
        super().setup(stage)
        self._tabulated = False
        if stage == "fit" and self.trainer.ckpt_path is None:
            if self.posterior_options.isotonic and not self.posterior_options.clamp:
                raise ConfigError(
                    "model.posterior.isotonic true smooths a variance that model.posterior.clamp false leaves "
                    "unlimited, and spreads its errors at late times over all; give isotonic false as well, or clamp "
                    "true"
                )
            for known in (self.posterior.fitted, self.posterior.running, self.posterior.weight):
                known.zero_()

    @torch.no_grad()
    def prepare(self, phase: str) -> None:
        """Draw support actions where critics need them; tabulate the posterior and measure the target."""
        asks = {"critic": self.q_training != "iql", "energy": self.target_options.form == "support"}
        if asks.get(phase, False):
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
        with constant_weights(self.trainer):
            self.posterior.fit(self.noise_of, obs, action, draws, samples=self.posterior_options.samples)
            if self.target_options.scale == "auto":
                self._measure_scale(data)

    def _measure_scale(self, data: Any) -> None:
        """Take the target's deviation on rows from all over the data."""
        rows = torch.linspace(0, len(data.table) - 1, min(MEASURED, len(data.table))).long()
        sample = PolicyBatch(*(self.to_own(x) for x in data.transitions(rows.to(data.table.device))))
        self.draws.begin(Place(self.current_epoch, 0), self.device)
        noised = self.noised(sample.action)
        support = None
        if self.target_options.form == "support":
            support = self.support[rows.to(self.device)]  # type: ignore[index]
        eps_hat = self.noise_of(noised.a_t, noised.t, sample.obs)
        target = self.energy_target(sample, noised, eps_hat, support)
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

    # ---------------------------------------------------------------- the energy

    def energy_loss(self, batch: PolicyBatch, noised: NoisedAction) -> Tensor:
        """Eq. 26."""
        o, (t, eps, a_t) = self.target_options, noised
        with torch.no_grad():
            eps_hat = self.noise_of(a_t, t, batch.obs)
        if self.schedule == "joint":
            self.posterior.track(t, eps_hat, eps, batch.action, partial(self.trainer.strategy.reduce, reduce_op="mean"))
        support = self.support[self.rows()] if o.form == "support" else None  # type: ignore[index]
        target = self.energy_target(batch, noised, eps_hat, support)
        if self.reporting:
            mean = self.mean_of_all(target)
            self.report({"target/mean": mean, "target/deviation": (target - mean).abs().mean()})
        f, target = self.learnt_energy(a_t, t, batch.obs), target / self.target_scale
        error = F.huber_loss(f, target, reduction="none") if o.loss == "huber" else (f - target).square()
        if o.weight == "alpha2":
            error = error * self.sde.alpha(t).square()
        return error.mean()

    @torch.no_grad()
    def energy_target(
        self, batch: PolicyBatch, noised: NoisedAction, eps_hat: Tensor, support: Tensor | None = None
    ) -> Tensor:
        """Eq. 25, or what the options have in its place; no gradient reaches critics or behaviour model.

        Args:
            batch: B transitions.
            noised: Their noised actions.
            eps_hat: ``(B, A)`` predicted noise.
            support: ``(B, K, A)`` actions of the behaviour in their states, for ``form`` support.

        Returns:
            ``(B,)``.
        """
        o, beta, (t, _, a_t), q = self.target_options, self.beta, noised, self.q_of(batch.obs)
        if support is not None:
            energy, _ = monte_carlo_energy(a_t, t, support, q(support), self.sde, beta)
        else:
            mu = batch.action
            if self.posterior_options.mean != "sample" and o.form == "aepo":
                mu = self.posterior.mean(a_t, t, eps_hat)
            found = expand(q, batch.action, mu, self.posterior.action_mean, o)
            cov = self.covariance(batch, noised, eps_hat, found.grad)
            energy = energy_of(found, mu, cov, beta, o)
            if self.reporting:
                g = found.grad
                along = cov * g.square().sum(-1) if cov.dim() == 1 else torch.einsum("bi,bij,bj->b", g, cov, g)
                self.report({"q/gradient": g.norm(dim=-1).mean(), "target/variance_term": 0.5 * beta**2 * along.mean()})
        return energy - beta * self.value(batch.obs) if o.baseline and self.uses_value else energy

    def covariance(self, batch: PolicyBatch, noised: NoisedAction, eps_hat: Tensor, g: Tensor) -> Tensor:
        """Variance ``(B,)``, for ``jvp`` that along ``g (B, A)``, or covariance ``(B, A, A)`` of the posterior."""
        (t, _, a_t), kind = noised, self.target_options.covariance
        if kind == "isotropic":
            return self.posterior.variance(t)
        v_bar = self.posterior.v_bar if self.posterior.clamp else None
        if kind == "batch":
            return variance_of_noise(self.mean_of_all(eps_hat.square()), t, self.sde, v_bar)

        eps_model = partial(self.noise_of, obs=batch.obs)
        if kind == "full":
            return posterior_covariance(eps_model, a_t, t, self.sde, v_bar)
        if kind == "jvp":  # as if it were the same in all directions
            return posterior_spread(eps_model, a_t, t, g, self.sde, v_bar) / g.square().sum(-1).clamp_min(1e-12)
        signs = self.draws.randn_like(a_t).sign()[None] if kind == "trace" else None
        return posterior_variance(eps_model, a_t, t, self.sde, signs, v_bar)

    def q_of(self, obs: Tensor) -> Value:
        """As EnergyLearner, by the critics that ``target`` names."""
        o = self.target_options
        critic = self.target_critic.net if o.use_target else self.critic

        def q(action: Tensor) -> Tensor:
            both = critic(obs, action, members=slice(None))
            return both.amin(dim=0) if o.q_reduce == "min" else both.mean(dim=0)  # type: ignore[no-any-return]

        return q

    # ---------------------------------------------------------------- acting

    def guidance_of(self, obs: Tensor, asked: Sequence[float]) -> Gradient:
        """As EnergyLearner, or the gradient of the closed form itself."""
        if self.guidance != "closed_form":
            return super().guidance_of(obs, asked)

        def energy(x: Tensor, t: Tensor) -> Tensor:
            states, every = obs.clone(), t.expand(len(x))
            mu = self.posterior.mean(x, every, self.noise_of(x, every, states))
            found = expand_at(self.q_of(states), mu, self.target_options.curvature, graph=True)
            return energy_of(found, mu, self.posterior.variance(every), self.beta, self.target_options)

        return gradient_of(energy)
