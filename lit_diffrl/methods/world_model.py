"""World model: an ensemble of Gaussian one-step models and a reward model, used by DMEMM and DyDiff.

The ensemble is that of probabilistic dynamics models (Chua et al. 2018; Janner et al. 2019, MBPO): each
member is a perceptron that predicts mean and log-variance of the state difference ``s' - s``, trained by
maximum likelihood on its own bootstrap of the data and stopped by its held-out error; the best members become
the elites that predict. DMEMM uses the mean in Eq. 9, the reward in Eq. 10 and reward and log-density in Eq.
13; DyDiff uses the mean, or samples, in Eq. 6 and the reward in Eq. 10 of its paper.

Departures from MBPO: the bounds of the log-variance belong to each member, and members stop one by one, so
that each is exactly the network it would be alone. The reward head is bounded softly to the range of the
data's rewards, because a plan that maximises it would otherwise drift to where it extrapolates.

States and actions are normalised by the caller. Differences, much smaller than states, get their own scale
(:meth:`WorldModel.fit_scales`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffrl.errors import ConfigError, check_range
from lit_diffrl.nets.ensemble import BestWeights, EnsembleMLP, GaussianEnsemble

ALL = slice(None)
VALIDATION_ROWS = 4096  # evaluated at once: bounds the memory of a large hold-out
BOUND_SHARPNESS = 10.0  # the reward head bends within about a tenth of its range from either bound


class WorldModel(nn.Module):
    """Ensemble transition model and bounded reward model.

    Order of use: :meth:`fit_scales` once; per update :meth:`transition_loss` and :meth:`reward_loss`; now and
    then :meth:`validate`; at the end :meth:`finish`. Afterwards :meth:`next_mean`, :meth:`log_prob`,
    :meth:`reward`, :meth:`mean_var`, :meth:`sample` and :meth:`disagreement` predict with the elites. These
    treat the weights as
    constants: gradients pass through to states and actions and to whatever made them, and never reach this
        model.

    Attributes:
        delta_mean: Mean of ``s' - s``, ``(obs_dim,)``.
        delta_std: Standard deviation of ``s' - s``, ``(obs_dim,)``.
        elite: Members that predict, int64 ``(elites,)``, best first once :meth:`finish` has chosen them.
    """

    delta_mean: Tensor
    delta_std: Tensor
    elite: Tensor

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        members: int = 7,
        elites: int = 5,
        hidden: int = 200,
        layers: int = 4,
        activation: str = "silu",
        logvar_low: float = -10.0,
        logvar_high: float = 0.5,
        logvar_penalty: float = 0.01,
        variance_floor: float = 1e-3,
        reward_hidden: int = 256,
        reward_layers: int = 2,
        reward_activation: str = "silu",
        reward_members: int = 1,
        reward_pessimism: float = 0.0,
        reward_low: float,
        reward_high: float,
        patience: int = 5,
        improvement: float = 0.01,
    ) -> None:
        """Create the networks.

        Args:
            obs_dim: Dimension of states.
            action_dim: Dimension of actions.
            members: Transition models.
            elites: Members kept for prediction, by held-out error.
            hidden: Width of the transition models.
            layers: Hidden layers of the transition models; 0 makes them linear.
            activation: ``mish``, ``relu`` or ``silu``, of the transition models.
            logvar_low: Initial lower bound of the log-variance of scaled differences; learned.
            logvar_high: Initial upper bound; learned.
            logvar_penalty: Weight of the distance between the bounds in the transition loss.
            variance_floor: Smallest variance of a scaled difference that predictions use (training is not
                affected): it bounds the gradient of the log-density.
            reward_hidden: Width of the reward model.
            reward_layers: Hidden layers of the reward model.
            reward_activation: ``mish``, ``relu`` or ``silu``, of the reward model.
            reward_members: Reward models.
            reward_pessimism: Deviations between the reward models that predictions lie below their mean; a lower
                bound, against plans that exploit one model's errors. Needs several reward models.
            reward_low: Smallest reward the model can predict, in scaled units.
            reward_high: Largest reward the model can predict, in scaled units.
            patience: A model stops after more than this many validations in a row without improvement.
            improvement: Relative decrease of the held-out error that counts as an improvement.

        Raises:
            ConfigError: For a number out of range, more elites than members, bounds in the wrong order or an
            unknown activation.
        """
        super().__init__()
        for name, value in (("obs_dim", obs_dim), ("action_dim", action_dim), ("members", members)):
            check_range(f"world_model.{name}", value, 1)
        check_range("world_model.elites", elites, 1, members)
        for name, value in (("layers", layers), ("reward_layers", reward_layers), ("patience", patience)):
            check_range(f"world_model.{name}", value, 0)
        check_range("world_model.logvar_penalty", logvar_penalty, 0)
        check_range("world_model.variance_floor", variance_floor, 0)
        check_range("world_model.improvement", improvement, 0, 1, high_open=True)
        check_range("world_model.reward_high", reward_high, reward_low)
        check_range("world_model.reward_members", reward_members, 2 if reward_pessimism > 0 else 1)
        check_range("world_model.reward_pessimism", reward_pessimism, 0)
        self.reward_pessimism = reward_pessimism
        self.reward_low, self.reward_high = float(reward_low), float(reward_high)
        self.logvar_penalty, self.variance_floor = logvar_penalty, variance_floor
        width = obs_dim + action_dim
        self.transition = GaussianEnsemble(
            members, [width, *[hidden] * layers, obs_dim], activation, logvar_low, logvar_high
        )
        self.reward_net = EnsembleMLP(reward_members, [width, *[reward_hidden] * reward_layers, 1], reward_activation)
        self.best_transition = BestWeights(self.transition, members, patience, improvement)
        self.best_reward = BestWeights(self.reward_net, reward_members, patience, improvement)
        self.register_buffer("delta_mean", torch.zeros(obs_dim))
        self.register_buffer("delta_std", torch.ones(obs_dim))
        self.register_buffer("elite", torch.arange(elites))

    @property
    def stopped(self) -> Tensor:
        """Transition models that have stopped learning, bool ``(M,)``."""
        return self.best_transition.stopped

    # ---------------------------------------------------------------- training

    @torch.no_grad()
    def fit_scales(self, delta: Tensor) -> None:
        """Set mean and standard deviation of the differences; call once before training.

        Args:
            delta: ``s' - s`` of the training transitions in normalised states, ``(N, obs_dim)``. A dimension
                that never changes keeps scale 1.
        """
        std = delta.double().std(0, correction=0)
        self.delta_mean.copy_(delta.double().mean(0))
        self.delta_std.copy_(torch.where(std < 1e-6, 1.0, std))

    def transition_loss(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """Loss of each transition model on its own batch.

        ``mean[(mu - y)^2 exp(-lv) + lv] + penalty * sum(lv_high - lv_low)``: twice the Gaussian negative
        log-likelihood of the scaled difference y per entry, less its constant, and the penalty of MBPO on the
        bounds. Sum it over the members that have not :attr:`stopped`.

        Args:
            obs: ``(M, B, obs_dim)`` normalised.
            action: ``(M, B, action_dim)`` normalised.
            next_obs: ``(M, B, obs_dim)`` normalised.

        Returns:
            ``(M,)``.
        """
        mean, logvar = self.transition(torch.cat([obs, action], dim=-1))
        error = (mean - self._scaled(obs, next_obs)).square()
        nll = (error * torch.exp(-logvar) + logvar).mean(dim=(1, 2))
        return nll + self.logvar_penalty * self.transition.spread()

    def reward_loss(self, obs: Tensor, action: Tensor, reward: Tensor) -> Tensor:
        """Mean squared error of the predicted reward, summed over the reward models that have not stopped.

        Args:
            obs: ``(B, obs_dim)`` normalised.
            action: ``(B, action_dim)`` normalised.
            reward: ``(B,)`` in scaled units.

        Returns:
            Scalar.
        """
        predicted = self._bounded(self.reward_net(torch.cat([obs, action], dim=-1))[..., 0])
        error = (predicted - reward).square().mean(-1)
        return torch.where(self.best_reward.stopped, 0.0, error).sum()

    @torch.no_grad()
    def validate(self, obs: Tensor, action: Tensor, next_obs: Tensor, reward: Tensor) -> dict[str, Tensor]:
        """Held-out errors: keep the weights of models that improved, stop those that have not for too long.

        Args:
            obs: ``(N, obs_dim)`` normalised, the same rows for all members.
            action: ``(N, action_dim)`` normalised.
            next_obs: ``(N, obs_dim)`` normalised.
            reward: ``(N,)`` in scaled units.

        Returns:
            Scalars to log: ``dynamics_mse`` (scaled differences, mean of members; 1 is a constant
            prediction), ``dynamics_nll`` (nats per dimension of the scaled difference), ``reward_mse``,
            ``stopped`` (number of transition models that have stopped).
        """
        mse, nll, reward_mse = (
            torch.zeros_like(self.best_transition.error),
            obs.new_zeros(()),
            torch.zeros_like(self.best_reward.error),
        )
        for first in range(0, len(obs), VALIDATION_ROWS):
            rows = slice(first, first + VALIDATION_ROWS)
            share = len(obs[rows]) / len(obs)
            x = torch.cat([obs[rows], action[rows]], dim=-1)
            mean, logvar = self.transition(x)
            error = (mean - self._scaled(obs[rows], next_obs[rows])).square()
            mse += share * error.mean(dim=(1, 2))
            nll += share * 0.5 * (error * torch.exp(-logvar) + logvar + math.log(2 * math.pi)).mean()
            predicted = self._bounded(self.reward_net(x)[..., 0])
            reward_mse += share * (predicted - reward[rows]).square().mean(-1)
        self.best_transition.update(self.transition, mse)
        self.best_reward.update(self.reward_net, reward_mse)
        return {
            "dynamics_mse": mse.mean(),
            "dynamics_nll": nll,
            "reward_mse": reward_mse.mean(),
            "stopped": self.stopped.sum().to(mse.dtype),
        }

    def finish(self) -> None:
        """Restore each model's best weights and choose the elites, the members of lowest held-out error.

        Raises:
            ConfigError: If fewer members than elites have ever had a finite held-out error.
        """
        finite = int(self.best_transition.error.isfinite().sum())
        if finite < len(self.elite):
            raise ConfigError(
                f"world model: {finite} of {len(self.stopped)} members have a finite held-out error, but "
                f"{len(self.elite)} elites are asked for; validate at least once before the phase ends, or "
                "lower the learning rate if the losses diverge"
            )
        self.best_transition.restore(self.transition)
        self.best_reward.restore(self.reward_net)
        self.elite.copy_(self.best_transition.error.argsort()[: len(self.elite)])

    # ---------------------------------------------------------------- prediction, weights constant

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

    # ---------------------------------------------------------------- shared by both

    def _scaled(self, obs: Tensor, next_obs: Tensor) -> Tensor:
        return (next_obs - obs - self.delta_mean) / self.delta_std

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
