"""What the world model predicts once it has learnt: next states, their density, rewards.

Sources: DMEMM (Eqs. 9, 10 and 13) and DyDiff (Eq. 6), with the ensembles of MBPO (Janner et al. 2019).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffrl.nets.ensemble import EnsembleMLP, GaussianEnsemble

ALL = slice(None)
BOUND_SHARPNESS = 10.0  # the reward head bends within about a tenth of its range from either bound


class Predictions(nn.Module):
    """Predictions of an ensemble's elites and of the reward networks.

    They treat the weights as constants: gradients pass through to states and actions and to whatever made them, and
    never reach this model.

    Attributes:
        transition: The ensemble.
        reward_net: The reward networks.
        delta_mean: Mean of ``s' - s``, ``(obs_dim,)``.
        delta_std: Standard deviation of ``s' - s``, ``(obs_dim,)``.
        elite: Members that predict, int64 ``(elites,)``, best first once training has chosen them.
    """

    transition: GaussianEnsemble
    reward_net: EnsembleMLP
    delta_mean: Tensor
    delta_std: Tensor
    elite: Tensor
    reward_low: float
    reward_high: float
    reward_pessimism: float
    variance_floor: float

    def next_mean(self, obs: Tensor, action: Tensor) -> Tensor:
        """Expected next state, the mean of the elites' means: T^ of DMEMM's Eq. 9.

        Args:
            obs: ``(..., obs_dim)`` normalised.
            action: ``(..., action_dim)`` normalised.

        Returns:
            ``(..., obs_dim)`` normalised.
        """
        return self._elite_mean_var(obs, action)[0].mean(0)

    def mean_var(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance ``(..., obs_dim)`` of the mixture of elites; arguments as :meth:`next_mean`."""
        mean, var = self._elite_mean_var(obs, action)
        return mean.mean(0), var.mean(0) + mean.var(0, correction=0)

    def log_prob(self, obs: Tensor, action: Tensor, next_obs: Tensor, mixture: bool = False) -> Tensor:
        """Log-density of a next state: log T^ of DMEMM's Eq. 13.

        Args:
            obs: ``(..., obs_dim)`` normalised.
            action: ``(..., action_dim)`` normalised.
            next_obs: ``(..., obs_dim)`` normalised.
            mixture: The density of the elites' mixture; otherwise the average of their log-densities.

        Returns:
            ``(...,)`` nats.
        """
        mean, var = self._elite_mean_var(obs, action)
        density = -0.5 * ((next_obs - mean).square() / var + var.log() + math.log(2 * math.pi)).sum(-1)
        return density.logsumexp(0) - math.log(len(self.elite)) if mixture else density.mean(0)

    def reward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Predicted reward: R^ of DMEMM's Eqs. 10 and 13, by ``reward_pessimism`` deviations below the members' mean.

        Args:
            obs: ``(..., obs_dim)`` normalised.
            action: ``(..., action_dim)`` normalised.

        Returns:
            ``(...,)`` in scaled units.
        """
        x = torch.cat([obs, action], dim=-1)
        out = self.reward_net(x.flatten(0, -2) if x.dim() > 1 else x[None], ALL)
        members = self._bounded(out.reshape(-1, *x.shape[:-1]))
        mean = members.mean(0)
        # The spread of one member is 0, and its gradient undefined.
        return mean - self.reward_pessimism * members.std(0, correction=0) if self.reward_pessimism > 0 else mean

    @torch.no_grad()
    def sample(
        self, obs: Tensor, action: Tensor, generator: torch.Generator | None = None, *, noise: bool = True
    ) -> tuple[Tensor, Tensor]:
        """One step of a simulated rollout (DyDiff's Eq. 6): each state is advanced by an elite drawn for it.

        Args:
            obs: ``(..., obs_dim)`` normalised.
            action: ``(..., action_dim)`` normalised.
            generator: Source of randomness on the device of ``obs``.
            noise: Draw from the elite's Gaussian; otherwise take its mean.

        Returns:
            Next state ``(..., obs_dim)`` normalised and reward ``(...,)`` in scaled units.
        """
        drawn = torch.randint(len(self.elite), obs.shape[:-1], generator=generator, device=obs.device)
        normal = torch.randn(obs.shape, generator=generator, dtype=obs.dtype, device=obs.device) if noise else None
        return self.step(obs, action, drawn, normal), self.reward(obs, action)

    @torch.no_grad()
    def step(self, obs: Tensor, action: Tensor, drawn: Tensor | None, normal: Tensor | None = None) -> Tensor:
        """Advance each state by one elite, or by the mixture of all.

        Args:
            obs: ``(..., obs_dim)`` normalised.
            action: ``(..., action_dim)`` normalised.
            drawn: ``(...)`` which elite, by its rank; None for the mixture, by its mean and variance.
            normal: Standard normal ``(..., obs_dim)`` to draw from that Gaussian; None takes its mean.

        Returns:
            ``(..., obs_dim)`` normalised.
        """
        if drawn is None:
            mean, var = self.mean_var(obs, action)
        else:
            means, variances = self._elite_mean_var(obs, action)
            index = drawn[None, ..., None].expand(1, *means.shape[1:])
            mean, var = means.gather(0, index)[0], variances.gather(0, index)[0]
        return mean if normal is None else mean + var.sqrt() * normal

    def disagreement(self, obs: Tensor, action: Tensor) -> Tensor:
        """Standard deviation ``(...,)`` of the elites' means, root mean square over dimensions, normalised."""
        mean, _ = self._elite_mean_var(obs, action)
        return mean.var(0, correction=0).mean(-1).sqrt()

    def _elite_mean_var(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and floored variance of the next state from each elite, ``(elites, ..., obs_dim)``."""
        x = torch.cat([obs, action], dim=-1)
        mean, logvar = self.transition(x.flatten(0, -2) if x.dim() > 1 else x[None], self.elite)
        shape = (len(self.elite), *obs.shape)
        delta = self.delta_mean + self.delta_std * mean.reshape(shape)
        var = logvar.reshape(shape).exp().clamp_min(self.variance_floor)
        return obs + delta, self.delta_std.square() * var

    def _bounded(self, raw: Tensor) -> Tensor:
        """Map a raw output softly to the range of rewards: linear inside, 0 at the middle of the range."""
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        inside = F.softplus(raw + 0.5, BOUND_SHARPNESS) - F.softplus(raw - 0.5, BOUND_SHARPNESS)
        return self.reward_low + (self.reward_high - self.reward_low) * inside.clamp(0, 1)
