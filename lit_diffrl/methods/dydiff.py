"""DyDiff: long rollouts of the current policy, made by a trajectory diffusion model, for any offline learner.

Source: Zhao et al., "Long-Horizon Rollout via Dynamics Diffusion for Offline Reinforcement Learning", 2024, with
equations by number, and the authors' code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from lit_diffrl.data.normalizers import LimitsNormalizer
from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.trajectories import TrajectoryBatch
from lit_diffrl.diffusion.edm import EDM, Churn, Network
from lit_diffrl.diffusion.hooks import Project
from lit_diffrl.errors import check_choice, check_range
from lit_diffrl.methods import synthesis
from lit_diffrl.methods.agreement import refuse_other_arguments
from lit_diffrl.methods.base import Phase, as_options
from lit_diffrl.methods.cql import CQL
from lit_diffrl.methods.dql import DiffusionQL
from lit_diffrl.methods.edp import EDPCRR, EDPIQL, EDPTD3
from lit_diffrl.methods.iql import IQL
from lit_diffrl.methods.options import WorldModelOptions
from lit_diffrl.methods.synthesis_options import EDMSamplerOptions, RolloutOptions, TrajectoryDenoiserOptions
from lit_diffrl.methods.synthetic_learner import AFTER_UPDATES, Predict, Synthesis
from lit_diffrl.methods.td3bc import TD3BC
from lit_diffrl.methods.termination import TERMINATIONS, Termination, termination_rule
from lit_diffrl.methods.world_model_phase import WorldModelPhase
from lit_diffrl.nets.ema import EMA, half_life_decay
from lit_diffrl.nets.unet import TemporalUNet
from lit_diffrl.seeding import Place

RAMP = 10_000_000  # windows after which the learning rate of lr_decay "ramp" is reached
SINGLE_STEP = WorldModelOptions(patience=7)
TRAJECTORY_CHURN = Churn(s_churn=60.0, s_tmin=0.3699492132558657, s_tmax=52.241950650433864, s_noise=1.002)


class Rollouts(NamedTuple):
    """Trajectories of a refresh and what tells of their quality.

    Args:
        states: ``(B, H, obs)`` normalised.
        actions: ``(B, H, action)`` in [-1, 1].
        gap: ``(B,)`` mean size of the last correction of the actions: what the last states do not know of yet.
        outside: ``(B,)`` share of the states' entries that lay beyond the data's limits, before they were clipped.
    """

    states: Tensor
    actions: Tensor
    gap: Tensor
    outside: Tensor


class DyDiff(Synthesis, WorldModelPhase):
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
    after churn too; the loss leaves them and padding out; the limits of states hold those that end episodes, without
    which no predicted state would be terminal; a fallen robot's rewards do not count; the ensemble is trained and
    stopped as this package's world model is; learners are as published.

    Logged, beside the learner's: ``loss/dynamics``, ``loss/reward``, ``val/dynamics_mse`` (as in DMEMM),
    ``loss/diffusion`` (falls quickly below 0.2, then slowly). At each refresh: ``synthetic/return_…`` (mean, std, min,
    max, skewness of the predicted returns; ``kept_return_mean``), ``synthetic/kept``, ``synthetic/overlap`` (share of
    those kept that are among the best; near ``keep`` the filter is as good as none), ``synthetic/decile_…``,
    ``synthetic/length``, ``synthetic/done``, ``synthetic/stored``, ``synthetic/rows``, ``synthetic/age`` (epochs),
    ``synthetic/gap`` (small: states belong to the actions), ``synthetic/outside``, ``synthetic/disagreement`` (of the
    ensemble along the rollouts), and times. In mixed batches ``q/real``, ``q/synthetic`` and ``td_error/…``: synthetic
    values far above the real ones mean that the learner exploits the models.

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

    window_low: Tensor
    window_high: Tensor
    window_std: Tensor
    models = ("world_model", "denoiser", "denoiser_ema", "window_low", "window_high", "window_std")
    models_data = ("horizon",)

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
        self.edm, self.churn = as_options(EDM(), edm), as_options(TRAJECTORY_CHURN, churn)
        self.edm_sampler = as_options(EDMSamplerOptions(), edm_sampler)
        self._keep_synthesis(real_ratio, models_ckpt)
        self.rollouts = as_options(RolloutOptions(), rollouts)
        check_range("model.world_model_epochs", world_model_epochs, 1)
        check_choice("model.termination", termination, TERMINATIONS)
        check_range("model.diffusion_epochs", diffusion_epochs, 1 if self.rollouts.corrections else 0)
        if self.rollouts.warm_start is not None:
            check_range("rollouts.warm_start", self.rollouts.warm_start, 1, self.edm_sampler.steps - 1)
        self.denoiser_options = as_options(TrajectoryDenoiserOptions(), denoiser)
        self.world_model_options = as_options(SINGLE_STEP, world_model)
        self.termination, self.reward_scale = termination, 1.0
        epochs = {"world_model": world_model_epochs, "diffusion": diffusion_epochs}
        self.epochs = dict.fromkeys(epochs, 0) if models_ckpt else epochs

    @property
    def model_phases(self) -> list[Phase]:
        """The single-step model's and the trajectory model's."""
        members = self.world_model_options.members
        return [
            Phase("world_model", self.epochs["world_model"], "bootstraps", members),
            Phase("diffusion", self.epochs["diffusion"], "windows"),
        ]

    @property
    def uses_world_model(self) -> bool:
        """Whether it learns in this run."""
        return self.epochs["world_model"] > 0

    # ---------------------------------------------------------------- networks

    def build(self, spec: DatasetSpec) -> None:
        """The learner's networks, the two models, and the limits of the windows."""
        super().build(spec)
        o, width = self.denoiser_options, spec.obs_dim + spec.action_dim
        self.build_world_model(spec)
        self.denoiser = TemporalUNet(width, dim=o.dim, mults=o.mults, kernel=o.kernel)
        self.denoiser_ema = EMA(self.denoiser, every=1, start=0)
        for name, size in (("window_low", width), ("window_high", width), ("window_std", 1)):
            self.register_buffer(name, torch.zeros(size))
        self.build_buffer(spec, self.rollouts.capacity)
        self.rule: Termination = termination_rule(self.termination, spec.env_spec)

    def setup(self, stage: str) -> None:
        """Take over the limits of the windows."""
        super().setup(stage)
        if self.models_ckpt is None:
            self.window_low.copy_(self.data.limits.low)
            self.window_high.copy_(self.data.limits.high)
            self.window_std.copy_(self.data.scaled.std())

    @cached_property
    def levels(self) -> EDM:
        """The noise levels, with the deviation of the windows if that is asked for."""
        if not self.denoiser_options.measure_sigma_data:
            return self.edm
        return replace(self.edm, sigma_data=float(self.window_std))

    @property
    def limits(self) -> LimitsNormalizer:
        """Between raw states beside actions, and the model scale."""
        return LimitsNormalizer(self.window_low, self.window_high)

    @property
    def state_limits(self) -> LimitsNormalizer:
        """The same for states alone."""
        assert self.spec is not None
        limits, n = self.limits, self.spec.obs_dim
        return LimitsNormalizer(limits.low[:n], limits.high[:n])

    def scaled_actions(self, actions: Tensor) -> Tensor:
        """Actions in the model scale."""
        assert self.spec is not None
        limits, n = self.limits, self.spec.obs_dim
        return LimitsNormalizer(limits.low[n:], limits.high[n:]).normalize(actions)

    def on_fit_start(self) -> None:
        """Refuse data without windows before any time is spent."""
        super().on_fit_start()
        self.data.require_windows()

    @property
    def drawn_for_all(self) -> tuple[str, int]:
        """Start states of a refresh."""
        return "rollouts.starts", self.rollouts.starts

    @property
    def kept_option(self) -> str:
        """The buffer's size."""
        return "rollouts.capacity"

    # ---------------------------------------------------------------- training of the models

    def model_optimizers(self) -> list[Optimizer]:
        """AdamW for the single-step and reward models, Adam for the trajectory model."""
        o, d = self.world_model_options, self.denoiser_options
        return [
            AdamW(self.world_model.parameters(), lr=o.lr, weight_decay=o.weight_decay, fused=True),
            Adam(self.denoiser.parameters(), lr=d.lr, fused=True),
        ]

    def model_step(self, phase: str, optimizer: LightningOptimizer, batch: Any) -> None:
        """An update of either model."""
        if phase == "world_model":
            losses = self.world_model_loss(batch)
            norm = self.descend(optimizer, losses["total"], phase, batch)
        else:
            losses = {"total": self.diffusion_loss(batch)}
            losses["diffusion"] = losses["total"]
            self._set_rate(optimizer)
            norm = self.descend(optimizer, losses["total"], phase, batch, self.denoiser_options.grad_clip)
            o, rows = self.denoiser_options, self._windows_per_update()
            seen = (self.denoiser_ema._steps + 1) * rows
            self.denoiser_ema.update(self.denoiser, half_life_decay(seen, rows, o.half_life, o.half_life_ramp))
        self.report({f"loss/{name}": loss for name, loss in losses.items() if name != "total"}, prog_bar=True)
        self.report({f"grad_norm/{phase}": norm})

    def _windows_per_update(self) -> int:
        return self.data.window_batch_size * self.trainer.world_size

    def _set_rate(self, optimizer: LightningOptimizer) -> None:
        """The learning rate of this place in the run."""
        o = self.denoiser_options
        if o.lr_decay == "cosine":
            self.set_cosine_lr(optimizer, o.lr)
        elif o.lr_decay == "ramp":
            seen = (self.denoiser_ema._steps + 1) * self._windows_per_update()
            for group in optimizer.param_groups:
                group["lr"] = o.lr * min(seen / RAMP, 1.0)

    def diffusion_loss(self, batch: TrajectoryBatch) -> Tensor:
        """Eq. 4: weighted error of the states, where first state and actions enter clean at every noise level."""
        assert self.spec is not None
        y, n = batch.trajectory, self.spec.obs_dim
        sigma = self.levels.draw_sigma(self.draws.randn_like(y[:, 0, 0]))
        noisy = y + sigma[:, None, None] * self.draws.randn_like(y)

        def project(x: Tensor) -> Tensor:
            return synthesis.condition(x, y[:, 0, :n], y[..., n:])

        counts = batch.mask[..., None].to(y.dtype).expand_as(y)
        if self.denoiser_options.loss == "states":
            counts = counts * synthesis.generated(y, n)
        prediction = self.denoise(self.denoiser, project(noisy), sigma, project)
        return self.levels.loss(prediction, y, sigma, counts) / self.mean_of_all(counts)

    def denoise(self, net: Network, x: Tensor, sigma: Tensor, project: Project) -> Tensor:
        """Clean prediction; the network reads the conditions that ``project`` writes as they are, or scaled."""
        return self.levels.denoise(net, x, sigma, None if self.denoiser_options.scale_conditions else project)

    def _refuse_other_levels(self, arguments: Mapping[str, Any]) -> None:
        super()._refuse_other_levels(arguments)
        saved = as_options(TrajectoryDenoiserOptions(), arguments.get("denoiser", {}))
        names = ("scale_conditions", "measure_sigma_data")
        before, now = (
            {f"denoiser.{name}": getattr(options, name) for name in names} for options in (saved, self.denoiser_options)
        )
        refuse_other_arguments("model", tuple(before), before, now)

    # ---------------------------------------------------------------- rollouts, in the model scale

    def to_learner(self, x: Tensor) -> Tensor:
        """States ``(..., obs)`` of the model scale, clipped to the data's limits, as the learner sees them."""
        return self.obs_normalizer.normalize(self.state_limits.unnormalize(x))

    def to_model(self, obs: Tensor) -> Tensor:
        """The learner's states ``(..., obs)`` in the model scale."""
        return self.state_limits.normalize(self.obs_normalizer.unnormalize(obs))

    def act_in(self, x: Tensor) -> Tensor:
        """The policy's actions ``(..., action)`` in states ``(..., obs)`` of the model scale."""
        obs = self.to_learner(x)
        return self.choose(obs.flatten(0, -2)).view(*x.shape[:-1], -1)

    def choose(self, obs: Tensor) -> Tensor:
        """The policy's actions ``(n, action)`` for rollouts, in the learner's states ``(n, obs)``."""
        return self.draw_action(obs) if self.rollouts.sample_policy else self.propose(obs)

    def step_model(self, x: Tensor, action: Tensor) -> Tensor:
        """One step ``(B, obs)`` of the single-step model from states of the model scale, by an elite drawn for each."""
        drawn = self.draws.randint(0, len(self.world_model.elite), x)
        normal = self.draws.randn_like(x) if self.rollouts.sample_model else None
        return self.to_model(self.world_model.step(self.to_learner(x), action, drawn, normal))

    def sample_states(self, first: Tensor, actions: Tensor, start: tuple[Tensor, int] | None = None) -> Tensor:
        """Eq. 7: states of the model scale ``(B, H, obs)`` by the trajectory model.

        Args:
            first: ``(B, obs)`` in the model scale.
            actions: ``(B, H, action)`` in [-1, 1].
            start: States to begin with in place of noise, and the index of the level they are noised to.
        """
        n, scaled = first.shape[-1], self.scaled_actions(actions)

        def project(x: Tensor) -> Tensor:
            return synthesis.condition(x, first.to(x.dtype), scaled.to(x.dtype))

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return self.denoise(self.denoiser_ema.net, x, sigma, project)

        noise = self.draws.randn_like(first.new_empty(*actions.shape[:2], n + actions.shape[-1]))
        begin = None if start is None else (torch.cat([start[0], scaled], dim=-1), start[1])
        return self.sample(denoise, noise, project, begin, self.levels)[..., :n]

    def rounds(self) -> tuple[synthesis.PredictStates, list[Tensor]]:
        """The trajectory model as the rounds of one correction ask it, and the list of the samples it has given."""
        samples, index = list[Tensor](), self.rollouts.warm_start

        def predict(first: Tensor, actions: Tensor) -> Tensor:
            warm = (samples[-1], index) if samples and index is not None else None
            samples.append(self.sample_states(first, actions, warm))
            return samples[-1]

        return predict, samples

    def roll_out(self, start: Tensor, horizon: int) -> Rollouts:
        """Trajectories of the current policy (Eqs. 6 to 9).

        Args:
            start: ``(B, obs)`` start states, normalised.
            horizon: Steps H.
        """
        o, (predict, samples) = self.rollouts, self.rounds()
        x, actions = synthesis.single_step_rollout(self.to_model(start), self.act_in, self.step_model, horizon)
        x, actions, previous = synthesis.iterate_correction(
            x, actions, predict, self.act_in, rounds=o.corrections, beta=o.damping
        )
        gap = (actions - previous).abs().mean((1, 2))
        if o.emit == "dynamics":
            x, actions = samples[-1], previous
        return Rollouts(self.to_learner(x), actions, gap, (x.abs() > 1 + 1e-4).to(gap).mean((1, 2)))

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

        pairs = min(horizon, horizon if o.length is None else o.length + 1)
        states, actions = rollouts.states[:, :pairs], rollouts.actions[:, :pairs]
        done = self.rule(self.obs_normalizer.unnormalize(states[:, 1:]))
        reward, disagreement = self._judge(states, actions)
        returns = synthesis.trajectory_returns(reward, done if o.returns == "until_done" else None)
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
        return synthesis.keep_softmax(returns, o.keep, gumbel, temperature=o.temperature, floor=o.floor, scale=scale)

    # ---------------------------------------------------------------- diagnosis

    @property
    def predictors(self) -> dict[str, Predict]:
        """The single-step model, and the trajectory model if there is one."""
        found = {"single-step model": self.seeded(self.predict_by_steps)}
        return found | ({"trajectory model": self.seeded(self.predict_at_once)} if self.rollouts.corrections else {})

    def closed_loop(self, horizon: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], dict[str, Tensor]]]:
        """The policy, and its rollouts in the models, for comparison with the simulator; all in raw units.

        Args:
            horizon: States H of a rollout.

        Returns:
            ``obs (n, obs) -> actions (n, action)`` and ``first states (n, obs) -> states (n, H, obs)``, by name: after
            the single-step model, and after each round of correction.
        """
        place = Place(self.current_epoch, AFTER_UPDATES + 2)

        @torch.no_grad()
        def policy(obs: Tensor) -> Tensor:
            chosen = self.choose(self.obs_normalizer.normalize(self.to_own(obs)))
            return self.action_normalizer.unnormalize(chosen).float()

        @torch.no_grad()
        def roll_out(first: Tensor) -> dict[str, Tensor]:
            self.draws.begin(place, self.device)
            x = self.state_limits.normalize(self.to_own(first))
            x, actions = synthesis.single_step_rollout(x, self.act_in, self.step_model, horizon)
            found, (predict, _) = {"single-step rollout": x}, self.rounds()
            for k in range(1, self.rollouts.corrections + 1):
                x, actions, _ = synthesis.iterate_correction(
                    x, actions, predict, self.act_in, rounds=1, beta=self.rollouts.damping
                )
                found[f"correction {k}"] = x
            return {name: self.state_limits.unnormalize(x).float() for name, x in found.items()}

        return policy, roll_out

    def predict_by_steps(self, first: Tensor, actions: Tensor) -> Tensor:
        """States ``(n, H, obs)`` that the single-step model makes of given actions; all in raw units."""
        units = self.action_normalizer.normalize(actions)
        states = [self.state_limits.normalize(first)]
        for t in range(actions.shape[1] - 1):
            states.append(self.step_model(states[-1], units[:, t]))
        return self.state_limits.unnormalize(torch.stack(states, dim=1))

    def predict_at_once(self, first: Tensor, actions: Tensor) -> Tensor:
        """States ``(n, H, obs)`` that the trajectory model makes of given actions; all in raw units."""
        units = self.action_normalizer.normalize(actions)
        return self.state_limits.unnormalize(self.sample_states(self.state_limits.normalize(first), units))


class DyDiffTD3BC(DyDiff, TD3BC):
    """DyDiff with TD3+BC."""


class DyDiffCQL(DyDiff, CQL):
    """DyDiff with CQL."""


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
