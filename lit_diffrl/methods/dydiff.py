"""DyDiff: long rollouts of the current policy, made by a trajectory diffusion model, for any offline learner.

Source: Zhao et al., "Long-Horizon Rollout via Dynamics Diffusion for Offline Reinforcement Learning", 2024, with
equations by number, and the authors' code.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.diffusion.edm import EDM, Churn
from lit_diffrl.errors import DIVERGED, ConfigError, check_choice, check_range
from lit_diffrl.methods import synthesis
from lit_diffrl.methods.base import as_options
from lit_diffrl.methods.cql import CQL
from lit_diffrl.methods.crr import CRR
from lit_diffrl.methods.dql import DiffusionQL
from lit_diffrl.methods.edp import EDPCRR, EDPIQL, EDPTD3
from lit_diffrl.methods.iql import IQL
from lit_diffrl.methods.options import WorldModelOptions
from lit_diffrl.methods.policy_rollouts import PolicyRollouts, Rollouts
from lit_diffrl.methods.synthesis_options import EDMSamplerOptions, RolloutOptions, TrajectoryDenoiserOptions
from lit_diffrl.methods.td3bc import TD3BC
from lit_diffrl.methods.termination import TERMINATIONS, Termination, termination_rule

SINGLE_STEP = WorldModelOptions(patience=7)
TRAJECTORY_CHURN = Churn(s_churn=60.0, s_tmin=0.3699492132558657, s_tmax=52.241950650433864, s_noise=1.002)


class DyDiff(PolicyRollouts):
    """A trajectory model that is given a start and all actions, corrected in turns with the policy (Algorithm 1).

    1. Phase ``world_model``: the single-step ensemble (Eq. 5) and the reward model (Eq. 10).
    2. Phase ``diffusion``: windows are noised but for their first state and their actions, which stay clean (Eq. 3);
       EDM's loss on the states after the first (Eq. 4).
    3. Phase ``policy``: the learner's own updates. Before an epoch that is due, rollouts from real states:
       the single-step model gives the first (Eq. 6); then, ``rollouts.corrections`` times, the trajectory model
       predicts the states anew and the policy acts in them (Eqs. 7 to 9); the rewards' sum (Eq. 11) decides which are
       kept. ``real_ratio`` of each batch stays real.

    States pass between the learner's scale and that of the windows, which clips them to the data's limits.

    Departures from the paper, as its code: ``rollouts.damping`` 0.5 averages old and new states; deterministic policy
    and model means (diffusion policies draw); a softmax filter on z-scores without replacement. From its code: the
    conditions enter the network as they are, not scaled with the noisy states, which leaves nearly nothing of them at
    high noise, where they alone tell where the trajectory goes (``denoiser.scale_conditions``); they are written in
    after churn too; the loss leaves them and padding out, and its gradient is clipped (``denoiser.grad_clip``); windows
    (``data.terminal``) and the limits of states hold the states that end episodes, without which no predicted state
    would be terminal; a fallen robot's rewards do not count; the ensemble is trained and stopped as this package's
    world model is: weight decay is AdamW's, the same for all layers, and ``world_model.patience`` counts epochs of
    this run, its targets have a scale of their own; the reward model has SiLU for ReLU
    (``world_model.reward_activation``), shares the ensemble's optimizer, and is softly bounded to the data's rewards;
    a state's entry that never changes is -1 in the windows' scale; windows may have any length, not multiples of 4
    alone; learners are as published, with the authors' variants as arguments of theirs
    (``conf/paper/dydiff/…-code.yaml``).

    Logged, beside the learner's: ``loss/dynamics``, ``loss/reward``, ``val/dynamics_mse`` (as in DMEMM),
    ``loss/denoiser`` (falls quickly below 0.2, then slowly). At each refresh: ``synthetic/return_…`` (mean, std, min,
    max, skewness of the predicted returns; ``kept_return_mean``), ``synthetic/kept``, ``synthetic/overlap`` (share of
    those kept that are among the best; near ``keep`` the filter is as good as none), ``synthetic/decile_…``,
    ``synthetic/length``, ``synthetic/done``, ``synthetic/stored``, ``synthetic/rows``, ``synthetic/age`` (epochs),
    ``synthetic/gap`` (what the last round moved the actions by, so that with ``emit`` policy their states were drawn
    for others: small as corrections settle, but not where the policy draws its actions, as a diffusion policy does anew
    in every round), ``synthetic/outside``, ``synthetic/disagreement`` (of the ensemble along the rollouts), and times.
    In mixed batches ``q/real``, ``q/synthetic`` and ``td_error/…``: synthetic values far above the real ones can mean
    that the learner exploits the models.

    Args:
        world_model_epochs: Epochs in which the single-step model and the reward model learn.
        diffusion_epochs: Epochs in which the trajectory model learns; 0 without corrections.
        denoiser: Its network and training.
        edm: Noise levels.
        churn: Noise added in sampling.
        edm_sampler: How trajectories are sampled.
        rollouts: Where they start, how they are corrected, which are kept.
        world_model: The single-step model and the reward model.
        termination: Which predicted states end an episode: ``auto`` goes by the environment.
        real_ratio: Share of real rows in the learner's batches; 1 makes no rollouts.
        models_ckpt: Checkpoint of another run, of whatever learner, whose models are used; they then learn no more.
        **kwargs: As the learner.
    """

    def __init__(
        self,
        world_model_epochs: int = 100,
        diffusion_epochs: int = 200,
        denoiser: TrajectoryDenoiserOptions = TrajectoryDenoiserOptions(),
        edm: EDM = EDM(),
        churn: Churn = TRAJECTORY_CHURN,
        edm_sampler: EDMSamplerOptions = EDMSamplerOptions(),
        rollouts: RolloutOptions = RolloutOptions(),
        world_model: WorldModelOptions = SINGLE_STEP,
        termination: Literal["auto", "never", "hopper", "walker2d", "ant"] = "auto",
        real_ratio: float = 0.6,
        models_ckpt: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.edm, self.churn = as_options(self.default_edm, edm), as_options(TRAJECTORY_CHURN, churn)
        self.edm_sampler = as_options(EDMSamplerOptions(), edm_sampler)
        self._keep_synthesis(real_ratio, models_ckpt)
        self.rollouts = as_options(RolloutOptions(), rollouts)
        check_range("model.world_model_epochs", world_model_epochs, 1)
        check_choice("model.termination", termination, TERMINATIONS)
        check_range("model.diffusion_epochs", diffusion_epochs, 1 if self.rollouts.corrections else 0)
        if self.rollouts.warm_start is not None:
            check_range("rollouts.warm_start", self.rollouts.warm_start, 1, self.edm_sampler.steps - 1)
        self.denoiser_options = as_options(TrajectoryDenoiserOptions(), denoiser)
        if not self.denoiser_options.scale_conditions and not self.edm_sampler.recondition_after_churn:
            raise ConfigError(
                "model.edm_sampler.recondition_after_churn false changes nothing while the network sees all conditions "
                "at full size; set model.denoiser.scale_conditions true, or leave it at true"
            )
        self.world_model_options = as_options(SINGLE_STEP, world_model)
        self.termination, self.reward_scale = termination, 1.0
        epochs = {"world_model": world_model_epochs, "diffusion": diffusion_epochs}
        self.epochs = dict.fromkeys(epochs, 0) if models_ckpt else epochs

    def build(self, spec: DatasetSpec) -> None:
        """The learner's networks, the two models, the buffer and the rule of termination."""
        super().build(spec)
        self.build_buffer(spec, self.rollouts.capacity)
        self.rule: Termination = termination_rule(self.termination, spec.env_spec)

    def on_fit_start(self) -> None:
        """Refuse options that would make no rollout, or change nothing in them."""
        super().on_fit_start()
        if self.real_ratio == 1:
            return
        if self.rollouts.warmup_epochs >= self.policy_epochs:
            raise ConfigError(
                f"model.rollouts.warmup_epochs {self.rollouts.warmup_epochs} leaves none of model.policy_epochs "
                f"{self.policy_epochs} with rollouts; give fewer, or real_ratio 1 for the learner alone"
            )
        if self.epochs["diffusion"] and not self.rollouts.corrections and self.trainer.ckpt_path is None:
            raise ConfigError(
                f"model.diffusion_epochs {self.epochs['diffusion']} trains a model that model.rollouts.corrections 0 "
                "never asks; give diffusion_epochs 0, or corrections"
            )
        horizon = self.data.require_windows()
        if self.rollouts.length is not None and self.rollouts.length >= horizon:
            raise ConfigError(
                f"model.rollouts.length {self.rollouts.length} is more than the {horizon - 1} transitions in windows "
                f"of data.horizon {horizon}; give fewer, or null for all"
            )
        if self.rollouts.sample_policy and getattr(self, "policy", None) == "deterministic":
            raise ConfigError(
                "model.rollouts.sample_policy true changes nothing with model.policy deterministic; set one back"
            )

    def _refuse_other_models(
        self, content: Mapping[str, Any], state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
    ) -> None:
        super()._refuse_other_models(content, state, wanted)
        if self.rollouts.corrections and not int(state["denoiser_ema.count"]):
            raise ConfigError(
                "has a diffusion model that never learned, and model.rollouts.corrections asks it; give a checkpoint "
                "of a run with model.diffusion_epochs, or corrections 0"
            )

    @property
    def drawn_for_all(self) -> tuple[str, int]:
        """Start states of a refresh."""
        return "rollouts.starts", self.rollouts.starts

    @property
    def kept_option(self) -> str:
        """The buffer's size."""
        return "rollouts.capacity"

    # ---------------------------------------------------------------- a refresh of the buffer

    def synthesizes(self, epoch: int) -> bool:
        """Every so many epochs of the learner, from the first or after a warm-up."""
        o = self.rollouts
        return epoch >= o.warmup_epochs and (epoch - o.warmup_epochs) % o.every_n_epochs == 0

    def synthesize(self) -> dict[str, float]:
        """Roll out from real states, keep trajectories of high predicted return, store their transitions."""
        o, data, begun = self.rollouts, self.data, time.perf_counter()
        rows, horizon = data.start_rows(o.start_states), data.require_windows()
        parts = []
        for chunk in self.chunks(o.starts, o.chunk):
            start = data.transitions(rows[self.draws.randint(0, len(rows), chunk)]).obs.to(chunk.dtype)
            parts.append([self.gathered(x) for x in self.roll_out(start, horizon)])
        rollouts = Rollouts(*(torch.cat(x) for x in zip(*parts)))
        gumbel = torch.cat([self.gathered(self.draws.randn_like(c)) for c in self.chunks(o.starts, o.chunk)])
        rolled = time.perf_counter()

        pairs = horizon if o.length is None else o.length + 1
        states, actions = rollouts.states[:, :pairs], rollouts.actions[:, :pairs]
        done = self.rule(self.obs_normalizer.unnormalize(states[:, 1:]))
        reward, disagreement = self._judge(states, actions)
        returns = synthesis.trajectory_returns(reward, done if o.returns == "until_done" else None)
        wrong = int((~returns.isfinite()).sum())
        if wrong:  # no order among them tells which to keep
            raise ConfigError(f"{wrong} of {len(returns)} rollouts have returns that are not finite: {DIVERGED}")
        kept = self.keep(returns, synthesis.gumbel_noise(gumbel))
        stored = synthesis.cut_transitions(states[kept], actions[kept], reward[kept], done[kept])
        epoch = self.current_epoch - sum(p.epochs for p in self.model_phases)
        self.buffer.insert(*stored, epoch=epoch)
        if o.keep_refreshes is not None:
            self.buffer.keep_newest(o.keep_refreshes)

        lengths = synthesis.running(done)[:, :-1].double().sum(1)
        z = (returns.double() - returns.double().mean()) / returns.double().std(correction=0).clamp_min(1e-12)
        found = {
            "return_mean": returns.mean(),
            "return_std": returns.std(correction=0),
            "return_min": returns.min(),
            "return_max": returns.max(),
            "return_skewness": z.pow(3).mean(),
            "kept_return_mean": returns[kept].mean(),
            "overlap": synthesis.overlap_with_best(kept, returns),
            "length": lengths.mean(),
            "done": done.any(1).double().mean(),
            "gap": rollouts.gap.mean(),
            "outside": rollouts.outside.mean(),
            "disagreement": disagreement.mean(),
        }
        if len(returns) >= 10:
            found |= {f"decile_{i}": x for i, x in enumerate(synthesis.kept_by_decile(kept, returns), 1)}
        logs = {f"synthetic/{name}": float(x) for name, x in found.items()}
        counts = {"synthetic/kept": len(kept) / len(returns), "synthetic/stored": float(len(stored.done))}
        return logs | counts | {"time/rollouts_s": rolled - begun, "time/filter_s": time.perf_counter() - rolled}

    def _judge(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted rewards and the ensemble's disagreement ``(B, H)``; in parts, as memory would hold."""
        parts = list(zip(states.split(self.rollouts.chunk), actions.split(self.rollouts.chunk)))
        judges = (self.world_model.reward, self.world_model.disagreement)
        reward, disagreement = (torch.cat([judge(s, a) for s, a in parts]) for judge in judges)
        return reward, disagreement

    def keep(self, returns: Tensor, gumbel: Tensor) -> Tensor:
        """Trajectories to keep, ascending indices, by their predicted returns ``(B,)``."""
        o = self.rollouts
        if o.filter == "none":
            return torch.arange(len(returns), device=returns.device)
        if o.filter == "hardmax":
            return synthesis.keep_hardmax(returns, o.keep)
        scale: Literal["zscore", "raw"] = "zscore" if o.z_score else "raw"
        log_probs = synthesis.filter_log_probs(returns, temperature=o.temperature, floor=o.floor, scale=scale)
        return synthesis.keep_softmax(log_probs, o.keep, gumbel)


class DyDiffTD3BC(DyDiff, TD3BC):
    """DyDiff with TD3+BC."""


class DyDiffCQL(DyDiff, CQL):
    """DyDiff with CQL."""


class DyDiffCRR(DyDiff, CRR):
    """DyDiff with CRR."""


class DyDiffIQL(DyDiff, IQL):
    """DyDiff with IQL."""


class DyDiffDQL(DyDiff, DiffusionQL):
    """DyDiff with Diffusion-QL."""


class DyDiffEDPTD3(DyDiff, EDPTD3):
    """DyDiff with EDP-TD3."""


class DyDiffEDPCRR(DyDiff, EDPCRR):
    """DyDiff with EDP-CRR."""


class DyDiffEDPIQL(DyDiff, EDPIQL):
    """DyDiff with EDP-IQL."""
