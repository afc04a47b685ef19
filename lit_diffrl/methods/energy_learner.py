"""What QGPO and AEPO share: a behaviour model, an energy whose gradient guides it, phases, and acting.

Sources: QGPO (Lu et al. 2023, "Contrastive Energy Prediction for Exact Energy-Guided Diffusion Sampling in Offline
Reinforcement Learning") and AEPO (Hu et al. 2025, "Analytic Energy-Guided Policy Optimization for Offline Reinforcement
Learning"); equations by AEPO's numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Adam, Optimizer

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.diffusion.dpm_ode import EpsModel
from lit_diffrl.diffusion.dpm_vp import sample_dpm_vp, times
from lit_diffrl.diffusion.energy_guidance import Gradient, guide
from lit_diffrl.diffusion.vp_sde import T_MIN, VPSDE, at_time, over_rows
from lit_diffrl.errors import ConfigError, check_choice, check_each, check_range
from lit_diffrl.methods.agent import Variant
from lit_diffrl.methods.agreement import refuse_other_data, refuse_other_method, refuse_other_shapes
from lit_diffrl.methods.base import CHECKPOINT_KEY, Phase, as_options
from lit_diffrl.methods.energy_options import (
    BehaviourOptions,
    EnergyOptions,
    SolverChanges,
    SolverOptions,
    SupportOptions,
)
from lit_diffrl.methods.exact_guidance import GuidanceCheck, check_guidance, monte_carlo_guidance
from lit_diffrl.methods.expansion import Value
from lit_diffrl.methods.loading import read_checkpoint
from lit_diffrl.methods.policy_options import CriticOptions
from lit_diffrl.methods.support_learner import SupportLearner
from lit_diffrl.nets.energy import BehaviourNet, EnergyNet
from lit_diffrl.nets.prepared import prepared_once

RELU_CRITIC = CriticOptions(activation="relu")


class NoisedAction(NamedTuple):
    """Actions at random times.

    Args:
        t: ``(B,)`` times.
        eps: Noise, like the actions.
        a_t: Noised actions.
    """

    t: Tensor
    eps: Tensor
    a_t: Tensor


class EnergyLearner(SupportLearner):
    """The phases ``behaviour``, ``critic`` and ``energy``, and actions by guided denoising (Eqs. 8, 14, 45).

    The best policy under a divergence limit is ``mu(a|s) exp(beta Q(s, a)) / Z(s)``, mu the behaviour. Its score at
    every noise level is that of mu plus the gradient of an energy ``E_t(s, a_t) = log E[exp(beta Q(s, a)) | a_t]``
    (Eqs. 12, 13), so actions come from the behaviour model's noise minus ``guidance_scale sigma_t grad E_t``.

    Attributes:
        behaviour: Noise network of the behaviour model.
        energy: Energy network, larger where actions are better.
        acting: Guidance degree, and whether the guided score keeps the norm of the unguided one.

    Args:
        behaviour_epochs: Length of the behaviour model's phase in epochs.
        critic_epochs: Length of the critics' phase.
        energy_epochs: Length of the energy's own phase.
        behaviour_ckpt: Checkpoint whose behaviour model is taken instead of training one; its phase is left out.
        beta: Inverse temperature of the policy learnt: how far it goes from the behaviour to better actions.
        guidance_scale: Degree of guidance when acting: 1 for the policy of ``beta``, 0 for the behaviour model alone.
            Of several the first acts, and ``test`` compares all on the same episodes.
        rescale: Keep the norm of the unguided score (Eq. 45), which keeps actions near the data at large degrees but
            is not exact; ``[true, false]`` acts with it and compares both in ``test``.
        rescale_norm: Norms of Eq. 45: of each ``sample``, of the whole ``batch``, or of the guidance ``term`` alone.
            With ``batch`` an episode depends on those that are played beside it.
        guidance_t_max: Time above which there is no guidance; 1 for guidance throughout.
        guidance: What guides: the energy ``network``, or an estimate of the exact energy of the same critics and
            behaviour model, ``monte_carlo`` over ``guidance_actions`` of the latter, at the cost of as many draws for
            each action. A run may be tested with either.
        guidance_actions: Actions that ``monte_carlo`` draws in each state; many dimensions and small times need many.
        sampler: How support actions are drawn, and actions unless ``eval_sampler`` says otherwise.
        eval_sampler: What is different about drawing actions to act with; null as ``sampler``.
        behaviour: The behaviour model.
        energy: The energy network.
        critic: The critics and their targets.
        support: Actions of the behaviour model in every state of the data.
    """

    # Phases in which the energy learns.
    energy_phases: ClassVar[tuple[str, ...]] = ("energy",)
    # What may guide.
    guidances: ClassVar[tuple[str, ...]] = ("network", "monte_carlo")
    energy_updates: Tensor

    def __init__(
        self,
        behaviour_epochs: int = 600,
        critic_epochs: int = 500,
        energy_epochs: int = 500,
        behaviour_ckpt: str | None = None,
        beta: float = 3.0,
        guidance_scale: float | list[float] = 1.0,
        rescale: bool | list[bool] = False,
        rescale_norm: Literal["sample", "batch", "term"] = "sample",
        guidance_t_max: float = 1.0,
        guidance: Literal["network", "monte_carlo"] = "network",
        guidance_actions: int = 256,
        sampler: SolverOptions = SolverOptions(),
        eval_sampler: SolverChanges | None = None,
        behaviour: BehaviourOptions = BehaviourOptions(),
        energy: EnergyOptions = EnergyOptions(),
        critic: CriticOptions = RELU_CRITIC,
        support: SupportOptions = SupportOptions(),
    ) -> None:
        super().__init__()
        epochs = {"behaviour": behaviour_epochs, "critic": critic_epochs, "energy": energy_epochs}
        for name, count in epochs.items():
            check_range(f"model.{name}_epochs", count, 0)
        check_range("model.beta", beta, 0, low_open=True, high_open=True)
        self.degrees = [guidance_scale] if isinstance(guidance_scale, int | float) else list(guidance_scale)
        check_each("model.guidance_scale", self.degrees)
        self.rescalings = [rescale] if isinstance(rescale, bool) else list(rescale)
        check_each("model.rescale", self.rescalings)
        check_choice("model.rescale_norm", rescale_norm, ("sample", "batch", "term"))
        check_range("model.guidance_t_max", guidance_t_max, T_MIN, 1)
        check_choice("model.guidance", guidance, self.guidances)
        check_range("model.guidance_actions", guidance_actions, 2)
        self.save_hyperparameters(logger=False)
        self.epochs = {**epochs, "behaviour": 0} if behaviour_ckpt else epochs
        if not any(self.epochs.values()):
            raise ConfigError("all phases of the model have 0 epochs; give --model.energy_epochs, say")
        if guidance != "network" and not any(self.epochs[name] for name in self.energy_phases):
            idle = " and ".join(f"model.{name}_epochs" for name in self.energy_phases)
            raise ConfigError(
                f"model.guidance {guidance!r} begins where the energy has learnt, and with {idle} 0 nothing would "
                "guide; train with 1 or more"
            )
        self.behaviour_ckpt, self.beta = behaviour_ckpt, beta
        self.rescale_norm, self.guidance_t_max = rescale_norm, guidance_t_max
        self.guidance, self.guidance_actions = guidance, guidance_actions
        self.acting: tuple[float, bool] = (self.degrees[0], self.rescalings[0])
        self.sampler = as_options(SolverOptions(), sampler)
        self.eval_sampler = as_options(SolverChanges(), eval_sampler or SolverChanges()).of(self.sampler)
        self.behaviour_options = as_options(BehaviourOptions(), behaviour)
        self.energy_options = as_options(EnergyOptions(), energy)
        self.critic_options = as_options(RELU_CRITIC, critic)
        self.support_options = as_options(SupportOptions(), support)
        self.refuse_max_backup()
        self.sde = VPSDE()

    @property
    def phases(self) -> list[Phase]:
        """Behaviour model, critics, energy."""
        batches = {"behaviour": self.behaviour_options.batches}
        return [Phase(name, n, "transitions", batches=batches.get(name, 1)) for name, n in self.epochs.items()]

    # ---------------------------------------------------------------- building

    def build(self, spec: DatasetSpec) -> None:
        """Behaviour model, critics with their targets, energy."""
        super().build(spec)
        b, e = self.behaviour_options, self.energy_options
        self.behaviour = BehaviourNet(spec.obs_dim, spec.action_dim, width=b.width)
        if b.predict != "eps":  # a mark on the weights: the same shapes mean something else
            self.behaviour.register_buffer(f"predicts_{b.predict}", torch.ones(()))
        self.build_critics(spec)
        self.energy = EnergyNet(
            spec.obs_dim, spec.action_dim, hidden=e.hidden, layers=e.layers, activation=e.activation
        )
        if e.scaled_input:  # a mark, as above
            self.energy.register_buffer("sees_scaled", torch.ones(()))
        self.register_buffer("energy_updates", torch.zeros((), dtype=torch.int64))

    def setup(self, stage: str) -> None:
        """Build the networks; a run that begins takes a trained behaviour model over, and draws its own actions."""
        super().setup(stage)
        if stage == "fit" and self.behaviour_ckpt is not None and self.trainer.ckpt_path is None:
            self.take_behaviour(self.behaviour_ckpt)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As Method; and refuse an energy network of another input, which its shapes do not tell."""
        if CHECKPOINT_KEY in checkpoint:
            refuse_other_method(checkpoint[CHECKPOINT_KEY]["method"], type(self))
            scaled = "energy.sees_scaled" in checkpoint["state_dict"]
            if scaled != self.energy_options.scaled_input:
                raise ConfigError(
                    f"the checkpoint's energy network sees {'alpha_t a_t' if scaled else 'a_t'}, but "
                    f"energy.scaled_input is {str(not scaled).lower()}; give --model.energy.scaled_input "
                    f"{str(scaled).lower()}, in Python energy={{'scaled_input': {scaled}}}"
                )
        super().on_load_checkpoint(checkpoint)

    def take_behaviour(self, path: str) -> None:
        """Take the behaviour model of a checkpoint, of QGPO or AEPO alike.

        Raises:
            ConfigError: When it holds none, or one of other data or sizes.
        """
        assert self.spec is not None
        checkpoint = read_checkpoint(path)
        own, prefix = checkpoint[CHECKPOINT_KEY], "behaviour."
        weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
        if not weights:
            raise ConfigError(
                f"--model.behaviour_ckpt {path} is of {own['method']}, which has no behaviour model; give a checkpoint "
                "of QGPO or AEPO"
            )
        # Rewards may be tuned otherwise: the behaviour model knows nothing of them.
        spec = DatasetSpec.from_dict(own["spec"])
        spec = replace(spec, reward_min=self.spec.reward_min, reward_max=self.spec.reward_max)
        refuse_other_data(spec, self.spec)
        refuse_other_shapes(weights, self.behaviour.state_dict())
        self.behaviour.load_state_dict(weights)

    def configure_optimizers(self) -> list[Optimizer]:
        """Adam for the behaviour model, the critics and the energy."""
        return [
            Adam(self.behaviour.parameters(), lr=self.behaviour_options.lr, fused=True),
            self.critic_optimizer(),
            Adam(self.energy.parameters(), lr=self.energy_options.lr, fused=True),
        ]

    @property
    def guided(self) -> bool:
        """Whether the energy has learnt anything; before that it must not guide."""
        return int(self.energy_updates) > 0

    @property
    def can_act(self) -> bool:
        """Whether the energy has learnt, or the behaviour model where no phase is for the energy."""
        if self.spec is None:
            return False
        return self.guided or (super().can_act and not any(self.epochs[name] for name in self.energy_phases))

    # ---------------------------------------------------------------- what phases share

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make what the phase needs, if it begins or goes on, and give the update its randomness."""
        self.prepare(self.phase.name)
        super().on_train_batch_start(batch, batch_idx)

    def prepare(self, phase: str) -> None:
        """Make what a phase needs and no checkpoint holds; called before every update."""

    def noised(self, action: Tensor) -> NoisedAction:
        """Noise actions ``(B, A)``, or ``(B, N, A)``, whose N share a time, to times uniform in [1e-3, 1]."""
        t = T_MIN + (1 - T_MIN) * torch.special.ndtr(self.draws.randn_like(action.flatten(1)[:, 0]))
        eps = self.draws.randn_like(action)
        return NoisedAction(t, eps, self.sde.q_sample(action, t, eps))

    def noise_of(self, a_t: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        """Noise that the behaviour model sees in ``a_t (B, A)`` at times ``(B,)`` or ``(1,)``, in states ``(B, S)``."""
        out = self.behaviour(a_t, t, obs).to(a_t.dtype)
        return self.sde.eps_from(self.behaviour_options.predict, out, a_t, t)

    def update_behaviour(self, optimizer: LightningOptimizer, batch: PolicyBatch, noised: NoisedAction) -> None:
        """One step down Eq. 7: the squared error of the noise, or of what is predicted, summed over the action."""
        t, eps, a_t = noised
        error = (self.noise_of(a_t, t, batch.obs) - eps).square().sum(-1)
        loss = (error * self.sde.error_scale(self.behaviour_options.predict, t)).mean()
        norm = self.descend(optimizer, loss, "behaviour", batch, self.behaviour_options.grad_clip)
        if self.reporting:
            self.report({"loss/behaviour": loss}, prog_bar=True)
            self.report({"grad_norm/behaviour": norm})

    def learnt_energy(self, a_t: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        """What the energy network says of noisy actions, in units of ``guidance_unit``; arguments as EnergyNet."""
        seen = over_rows(self.sde.alpha(t), a_t) * a_t if self.energy_options.scaled_input else a_t
        energy: Tensor = self.energy(seen, t, obs)
        return energy

    def update_energy(self, optimizer: LightningOptimizer, loss: Tensor, batch: PolicyBatch) -> None:
        """One step of the energy."""
        norm = self.descend(optimizer, loss, "energy", batch, self.energy_options.grad_clip)
        self.energy_updates += 1
        if self.reporting:
            self.report({"loss/energy": loss}, prog_bar=True)
            self.report({"grad_norm/energy": norm})

    # ---------------------------------------------------------------- acting

    @property
    def guidance_unit(self) -> float:
        """What the gradient of the energy network is multiplied by to be that of the energy."""
        return 1.0

    def guidance_of(self, obs: Tensor, asked: Sequence[float]) -> Gradient:
        """The gradient of the energy in states ``(B, S)``, at times that will be asked for."""
        if self.guidance == "monte_carlo":
            return monte_carlo_guidance(self, obs, self.guidance_actions)
        return self.network_guidance(obs, asked)

    def network_guidance(self, obs: Tensor, asked: Sequence[float]) -> Gradient:
        """The gradient of the energy network; arguments as ``guidance_of``."""
        gradient, unit = self.energy.gradient(obs, asked), self.guidance_unit
        if not self.energy_options.scaled_input:
            return gradient if unit == 1 else lambda x, t: unit * gradient(x, t)

        def fading(x: Tensor, t: Tensor) -> Tensor:
            alpha = at_time(self.sde.alpha, t)
            return unit * alpha * gradient(alpha * x, t)

        return fading

    def q_of(self, obs: Tensor) -> Value:
        """Q that the energy is of, in states ``(B, S)``, as ``(B, A) -> (B,)`` or ``(B, N, A) -> (B, N)``."""
        return partial(self.least_q, obs, target=True)

    def check_guidance(self, obs: Tensor, times: list[float], actions: int) -> list[GuidanceCheck]:
        """Guidance beside the exact one of the same critics; arguments as :func:`exact_guidance.check_guidance`."""
        return check_guidance(self, obs, times, actions)

    @prepared_once()
    def draw_actions(self, obs: Tensor, noise: Tensor, options: SolverOptions, acting: tuple[float, bool]) -> Tensor:
        """Denoise actions, under guidance if its degree is not 0.

        Args:
            obs: ``(B, S)`` normalised.
            noise: Standard normal ``(B, A)``, or ``(B, N, A)`` for N actions in each state.
            options: The solver.
            acting: Guidance degree, and whether to rescale.

        Returns:
            Actions like ``noise``; the solver does not keep them within the box.
        """
        degree, rescale = acting
        solver = {name: getattr(options, name) for name in SolverOptions.__dataclass_fields__}
        asked = times(self.sde, **solver)
        given, predict = self.behaviour.given(obs, asked), self.behaviour_options.predict

        def eps_model(x: Tensor, t: Tensor) -> Tensor:
            return self.sde.eps_from(predict, given(x, t), x, t)

        guided: EpsModel = eps_model
        if degree != 0:
            mode = self.rescale_norm if rescale else False
            gradient = self.guidance_of(obs, asked)
            guided = guide(eps_model, gradient, self.sde, degree, mode, t_max=self.guidance_t_max)
        return sample_dpm_vp(guided, noise, self.sde, **solver)

    def decide(self, obs: Tensor, rows: list[int]) -> Tensor:
        """Draw one action in each state."""
        assert self.spec is not None
        noise = self.row_noise(rows, (self.spec.action_dim,))
        acting = self.acting if self.guided else (0.0, False)
        return self.draw_actions(obs, noise, self.eval_sampler, acting).clamp(-1, 1)

    def variants(self) -> list[Variant]:
        """All degrees of guidance, with and without rescaling as asked for."""
        curves = {True: "rescaled", False: "not rescaled"}
        return [
            Variant("guidance scale", degree, curves[rescale], partial(self.acting_as, degree, rescale))
            for rescale in self.rescalings
            for degree in self.degrees
        ]

    @contextmanager
    def acting_as(self, degree: float, rescale: bool) -> Iterator[None]:
        """Act under another guidance for a while."""
        before, self.acting = self.acting, (degree, rescale)
        try:
            yield
        finally:
            self.acting = before
