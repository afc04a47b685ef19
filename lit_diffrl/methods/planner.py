"""The planning half of Diffuser and DMEMM: candidates, guidance, ranking, and plans turned into actions.

Sources: Diffuser (Janner et al. 2022), sections 3-5; DMEMM, Algorithm 1. What a plan is trained for stands in
``diffuser.py`` and ``dmemm.py``; here is what both do with a trained network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from lit_diffrl.data.normalizers import normalizer_from_state
from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.diffusion import sample_ddim, sample_ddpm, sample_dpm_solver
from lit_diffrl.diffusion.hooks import rows as at_step
from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods.options import GuideOptions, PlanOptions, SamplerOptions
from lit_diffrl.methods.world_model_phase import WorldModelPhase
from lit_diffrl.nets.ema import EMA

Conditions = dict[int, Tensor]  # row of the plan -> normalised state (B, obs_dim)


@dataclass
class Plan:
    """The plan chosen for one observation, in raw units.

    Args:
        obs: ``(H, obs_dim)`` planned observations; the first is the one planned from.
        action: ``(H, action_dim)`` planned actions.
        score: What the ranking gave it (0 without ranking).
        candidates: ``(N, H, obs_dim)`` all plans of this length it was chosen from.
        step: Simulator steps executed since.
    """

    obs: np.ndarray
    action: np.ndarray
    score: float
    candidates: np.ndarray
    step: int = 0


def impose(x: Tensor, conditions: Mapping[int, Tensor], action_dim: int) -> Tensor:
    """Write known states into their rows; actions and all other rows stay.

    Args:
        x: ``(B, H, action + obs)``.
        conditions: Row -> states ``(B, obs)``; -1 is the last row.
        action_dim: Where the states begin.
    """
    x = x.clone()
    for row, state in conditions.items():
        x[:, row, action_dim:] = state.to(x.dtype)
    return x


def waypoint(plan: np.ndarray, step: float) -> np.ndarray:
    """State of a maze plan at a fractional row, linear in between; after the end the last position at rest.

    Args:
        plan: ``(H, obs_dim)``, positions in the first half of the dimensions, velocities in the second.
        step: Row, ``>= 0``.
    """
    last = len(plan) - 1
    if step > last:
        state = plan[last].copy()
        state[len(state) // 2 :] = 0.0
        return state
    low = int(step)
    fraction = step - low
    return (1 - fraction) * plan[low] + fraction * plan[min(low + 1, last)]


class Planner(WorldModelPhase):
    """What a trained trajectory diffusion model is used for; see the module docstring."""

    horizons: list[int]
    goal_conditioned: bool
    clip_denoised: bool
    predict: str
    guide: GuideOptions
    plan_options: PlanOptions
    sampler: SamplerOptions
    schedule: Schedule
    ema: EMA
    value_ema: EMA
    likelihood_floor: Tensor

    def build(self, spec: DatasetSpec) -> None:
        """Set the normalisers and refuse options that this dataset cannot serve."""
        super().build(spec)
        self.obs_normalizer = normalizer_from_state(spec.obs_normalizer)
        self.action_normalizer = normalizer_from_state(spec.action_normalizer)
        self.reward_scale = max(abs(spec.reward_max), abs(spec.reward_min)) or 1.0
        self._plans: dict[int, Plan] = {}
        if self.plan_options.mode == "waypoints" and spec.obs_dim != 2 * spec.action_dim:
            raise ConfigError(
                "plan.mode 'waypoints' tracks states (positions, velocities) of a point whose actions are forces: "
                f"obs_dim must be twice action_dim, got {spec.obs_dim} and {spec.action_dim}; use 'receding'"
            )

    # ---------------------------------------------------------------- one batch of plans

    def estimate_x0(self, net: torch.nn.Module, x_k: Tensor, k: Tensor) -> Tensor:
        """Clean prediction of a network of either parameterisation (the index fed is j = k - 1)."""
        # Losses and densities are computed from it: in the type of x_k, whatever the network's own under autocast.
        out = net(x_k, k - 1).to(x_k.dtype)
        return out if self.predict == "x0" else self.schedule.x0_from_eps(x_k, k, out)

    def sample_plans(self, conditions: Conditions, noise: Tensor, draw: Any = torch.randn_like) -> Tensor:
        """Denoise plans under conditions and guidance (DMEMM, Algorithm 1).

        Args:
            conditions: Row -> normalised states ``(B, obs)``.
            noise: ``(B, H, action + obs)`` initial noise.
            draw: ``x -> noise like x`` for stochastic samplers.

        Returns:
            ``(B, H, action + obs)`` normalised plans with the conditions exactly in place.
        """
        assert self.spec is not None
        da = self.spec.action_dim

        def project(x: Tensor) -> Tensor:
            return impose(x, conditions, da)

        def denoise(x: Tensor, k: Tensor) -> Tensor:
            x0_hat = self.estimate_x0(self.ema.net, x, k)
            return project(x0_hat.clamp(-1, 1) if self.clip_denoised else x0_hat)

        grid = [*self.schedule.time_grid(self.sampler.steps), 0]
        following = dict(pairwise(grid))

        def shift(x: Tensor, k: int) -> Tensor:
            through = self.guide.at == "x0_through"
            for i in range(self.guide.n_steps):
                x = project(x) if i else x
                point = (lambda y: denoise(y, at_step(k, y))) if through else (lambda y: y)
                x = x + self._guide_step(x, point, 0 if through else k, k, self.schedule.posterior(k, following[k])[2])
            return x

        def mean_shift(mean: Tensor, x0_hat: Tensor, k: int, var: float) -> Tensor:
            at_mean = self.guide.at == "mean"
            point = mean if at_mean else x0_hat
            return mean + self._guide_step(point, lambda y: y, following[k] if at_mean else 0, k, var)

        before = self.guide.kind != "none" and self.guide.at in ("xt", "x0_through")
        after = self.guide.kind != "none" and self.guide.at in ("mean", "x0")
        options: dict[str, Any] = {
            "steps": self.sampler.steps,
            "project": project,
            "shift": shift if before else None,
            "mean_shift": mean_shift if after else None,
        }
        x = self.sampler.temperature * noise
        if self.sampler.name == "ddim":
            return sample_ddim(denoise, x, self.schedule, eta=self.sampler.eta, randn=draw, **options)
        if self.sampler.name == "dpm_solver":
            return sample_dpm_solver(denoise, x, self.schedule, order=self.sampler.order, **options)
        options |= {"variance": self.sampler.variance, "final_noise": self.sampler.final_noise}
        return sample_ddpm(denoise, x, self.schedule, randn=draw, **options)

    def _guide_step(self, x: Tensor, point: Any, level: int, k: int, var: float) -> Tensor:
        """One guidance shift ``scale (sigma^2) grad J``, with J at ``point(x)``, whose noise level is ``level``."""
        if k - 1 < self.guide.t_stopgrad:
            return torch.zeros_like(x)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            gradient = torch.autograd.grad(self.guide_objective(point(leaf), level).sum(), leaf)[0]
        step = self.guide.scale * gradient
        if self.guide.scale_by_variance:
            step = step * max(var, 1e-20)
        return step if self.guide.max_step is None else step.clamp(-self.guide.max_step, self.guide.max_step)

    def guide_objective(self, x: Tensor, level: int) -> Tensor:
        """What guidance climbs: Diffuser's return regressor on a plan at noise level ``level`` (0 is clean).

        Args:
            x: ``(B, H, action + obs)`` normalised plan.
            level: Diffusion step of ``x``.

        Returns:
            ``(B,)`` objective.
        """
        return self.value_ema.net(x, at_step(max(level - 1, 0), x))

    # ---------------------------------------------------------------- ranking

    def rank(self, plans: Tensor) -> Tensor:
        """Score finished plans; the highest wins.

        Args:
            plans: ``(B, H, action + obs)`` normalised.

        Returns:
            ``(B,)`` scores. Plans of different lengths to a goal are comparable: ``model`` lets them earn, for the rest
            of the episode, the reward predicted for staying at their last state; ``arrival`` counts the rest itself.
        """
        assert self.spec is not None
        if self.plan_options.rank_by == "value":
            return self.value_ema.net(plans, at_step(0, plans))
        if self.plan_options.rank_by == "none":
            return plans.new_zeros(len(plans))
        action, obs = plans.split([self.spec.action_dim, self.spec.obs_dim], dim=-1)
        rest = (self.spec.max_episode_steps or 0) / self.spec.stride - plans.shape[1]
        if self.plan_options.rank_by == "arrival":
            score = plans.new_full((len(plans),), rest)
        else:
            reward = self.world_model.reward(obs, action)
            score = reward.sum(-1)
            if self.goal_conditioned:
                score = score + max(rest, 0.0) * reward[:, -1]
        likelihood = self.world_model.log_prob(obs[:, :-1], action[:, :-1], obs[:, 1:])
        if self.plan_options.rank_quantile is None:
            return score + self.plan_options.rank_lambda * likelihood.mean(-1)
        shortfall = (likelihood - self.likelihood_floor).clamp_max(0.0)
        return score + self.plan_options.rank_lambda * shortfall.sum(-1)

    @torch.no_grad()
    def calibrate(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> None:
        """Measure the log-density below which a planned transition counts as infeasible (``plan.rank_quantile``).

        Args:
            obs: ``(N, obs_dim)`` held-out states, normalised.
            action: ``(N, action_dim)`` normalised.
            next_obs: ``(N, obs_dim)`` normalised.
        """
        if self.plan_options.rank_quantile is not None:
            likelihood = self.world_model.log_prob(obs, action, next_obs)
            self.likelihood_floor.copy_(likelihood.quantile(self.plan_options.rank_quantile))

    # ---------------------------------------------------------------- plans for observations

    def make_plans(self, state: Tensor, goal: Tensor | None, rows: list[int]) -> list[Plan]:
        """Draw, rank and un-normalise plans.

        Args:
            state: ``(n, obs_dim)`` raw observations.
            goal: ``(n, goal_dim)`` raw goals (positions; reached at rest), or None.
            rows: ``(n,)`` indices of the noise streams.

        Returns:
            One plan per observation.
        """
        assert self.spec is not None
        n, count, da = len(state), self.plan_options.candidates, self.spec.action_dim
        conditions: Conditions = {0: self.obs_normalizer.normalize(state)}
        if self.goal_conditioned:
            if goal is None:
                raise ConfigError(
                    "this planner needs a goal and its data has no constant one: give act/plan the environment's dict "
                    f"observation, with the keys {self.spec.obs_keys} and {self.spec.goal_key!r}"
                )
            at_rest = torch.zeros(n, self.spec.obs_dim - goal.shape[1], device=goal.device)
            conditions[-1] = self.obs_normalizer.normalize(torch.cat([goal, at_rest], dim=1))
        conditions = {row: repeat(s, "n d -> (n c) d", c=count) for row, s in conditions.items()}

        found: list[tuple[Tensor, Tensor]] = []
        for horizon in self.plan_options.horizons or self.horizons:
            shape = (count, horizon, da + self.spec.obs_dim)

            def draw(x: Tensor, shape: Sequence[int] = shape) -> Tensor:
                return rearrange(self.row_noise(rows, shape), "n c h d -> (n c) h d").to(x.dtype)

            plans = self.sample_plans(conditions, draw(state), draw)
            if not bool(plans.isfinite().all()):
                raise ConfigError(
                    f"a plan is not finite (horizon {horizon}, guide {self.guide.kind} at {self.guide.at}, scale "
                    f"{self.guide.scale}); lower --model.guide.scale or cap its steps: --model.guide.max_step 0.1"
                )
            found.append((rearrange(plans, "(n c) h d -> n c h d", n=n), self.rank(plans).view(n, count)))
        best_scores = torch.stack([score.max(dim=1).values for _, score in found])  # (horizons, n)
        winners = best_scores.argmax(dim=0).tolist()
        return [self._raw_plan(found[winners[i]][0][i], found[winners[i]][1][i]) for i in range(n)]

    def _raw_plan(self, candidates: Tensor, scores: Tensor) -> Plan:
        assert self.spec is not None
        best = int(scores.argmax())
        action, obs = candidates.split([self.spec.action_dim, self.spec.obs_dim], dim=-1)
        raw_obs = self.obs_normalizer.unnormalize(obs).float().cpu().numpy()
        raw_action = self.action_normalizer.unnormalize(action[best]).float().cpu().numpy()
        return Plan(raw_obs[best], raw_action, float(scores[best]), raw_obs)

    def plan(self, obs: Any) -> Plan | list[Plan]:
        """Plan from observations without executing anything.

        Args:
            obs: As for :meth:`act`.

        Returns:
            A :class:`Plan` for one observation, a list for a batch.
        """
        if self.spec is None:
            raise ConfigError(f"{type(self).__name__} has no networks yet: load a checkpoint or fit first")
        state, goal = self.spec.split_obs(obs)
        with torch.inference_mode(False), torch.no_grad():
            to = self.to_own
            plans = self.make_plans(to(state), None if goal is None else to(goal), list(range(len(state))))
        return plans[0] if self.spec.is_single(obs) else plans

    def plan_trace(self) -> list[np.ndarray | None]:
        """Current plans ``(H, obs_dim)`` by environment row, for drawing; None where there is none."""
        return [self._plans[i].obs if i in self._plans else None for i in range(max(self._plans, default=-1) + 1)]

    # ---------------------------------------------------------------- acting

    def reset(self, mask: Sequence[bool] | np.ndarray | None = None, seeds: Sequence[int] | None = None) -> None:
        """Begin new episodes: drop their plans and reseed their noise (arguments as in :class:`Method`)."""
        super().reset(mask, seeds)
        for i in list(self._plans) if mask is None else np.flatnonzero(mask):
            self._plans.pop(int(i), None)

    def choose_action(self, state: Tensor, goal: Tensor | None, rows: list[int]) -> Tensor:
        """Execute the first action of a fresh plan, or track the planned states; see ``plan.mode``."""
        options = self.plan_options
        every = 1 if options.mode == "receding" else options.replan_every
        due = [
            i
            for i, row in enumerate(rows)
            if row not in self._plans or (every is not None and self._plans[row].step >= every)
        ]
        if due:
            new = self.make_plans(state[due], None if goal is None else goal[due], [rows[i] for i in due])
            self._plans.update({rows[i]: plan for i, plan in zip(due, new)})
        actions = [self._execute(self._plans[row], state[i].cpu().numpy()) for i, row in enumerate(rows)]
        return torch.as_tensor(np.stack(actions))

    def _execute(self, plan: Plan, state: np.ndarray) -> np.ndarray:
        assert self.spec is not None
        plan.step += 1
        if self.plan_options.mode == "receding":
            return plan.action[0]
        error = waypoint(plan.obs, plan.step / self.spec.stride) - state
        position, velocity = np.split(error, 2)
        return self.plan_options.position_gain * position + self.plan_options.velocity_gain * velocity
