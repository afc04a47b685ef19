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
from torch import Tensor

from lit_diffrl.errors import ConfigError, check_range
from lit_diffrl.methods.world_model_predictions import Predictions
from lit_diffrl.nets.ensemble import BestWeights, EnsembleMLP, GaussianEnsemble

VALIDATION_ROWS = 4096  # evaluated at once: bounds the memory of a large hold-out


class WorldModel(Predictions):
    """Ensemble transition model and bounded reward model.

    Order of use: :meth:`fit_scales` once; per update :meth:`transition_loss` and :meth:`reward_loss`; now and
    then :meth:`validate`; at the end :meth:`finish`. Afterwards the methods of
    :class:`~lit_diffrl.methods.world_model_predictions.Predictions` predict with the elites.
    """

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

    def _scaled(self, obs: Tensor, next_obs: Tensor) -> Tensor:
        return (next_obs - obs - self.delta_mean) / self.delta_std
