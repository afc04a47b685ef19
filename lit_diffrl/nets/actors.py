"""Feed-forward policies: a deterministic one and three kinds of Gaussian; they give float32 in every precision."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffrl.errors import check_range
from lit_diffrl.nets.mlp import MLP

LOG_2PI = math.log(2 * math.pi)


class _Actor(nn.Module):
    """A perceptron whose output is promoted to float32: squashing and densities need its precision."""

    def __init__(
        self,
        obs_dim: int,
        width: int,
        hidden: int = 256,
        layers: int = 2,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.net = MLP((obs_dim, *[hidden] * layers, width), activation, dropout)

    def _out(self, obs: Tensor) -> Tensor:
        out: Tensor = self.net(obs)
        return out.to(torch.promote_types(out.dtype, torch.float32))


class DeterministicActor(_Actor):
    """``a = tanh(f(s))``, within [-1, 1] (TD3+BC, BC)."""

    def forward(self, obs: Tensor) -> Tensor:
        """Actions ``(B, A)`` for states ``(B, S)``."""
        return self._out(obs).tanh()


class GaussianActor(_Actor):
    """``N(tanh(f(s)), sigma^2)``: its mean lies within [-1, 1], its samples need not (IQL, CRR, BC)."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: int = 256,
        layers: int = 2,
        activation: str = "relu",
        dropout: float = 0.0,
        *,
        shared_std: bool = False,
        log_std_low: float = -5.0,
        log_std_high: float = 2.0,
    ) -> None:
        """Create the network.

        Args:
            obs_dim: Size of the state.
            action_dim: Size of the action.
            hidden: Width of its layers.
            layers: Hidden layers.
            activation: ``mish``, ``relu`` or ``silu``.
            dropout: Share of the hidden units that are left out in training.
            shared_std: One standard deviation for all states, from 1 on, instead of an output of the network.
            log_std_low: Least logarithm of the standard deviation.
            log_std_high: Greatest logarithm of the standard deviation.
        """
        super().__init__(obs_dim, action_dim * (1 if shared_std else 2), hidden, layers, activation, dropout)
        check_range("log_std_high", log_std_high, log_std_low, low_open=True)
        self.log_std = nn.Parameter(torch.zeros(action_dim)) if shared_std else None
        self.log_std_low, self.log_std_high = log_std_low, log_std_high

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation, both ``(B, A)``, for states ``(B, S)``."""
        out = self._out(obs)
        if self.log_std is None:
            mean, log_std = out.chunk(2, dim=-1)
        else:
            mean, log_std = out, self.log_std.expand_as(out)
        return mean.tanh(), log_std.clamp(self.log_std_low, self.log_std_high)


class SquashedGaussianActor(_Actor):
    """``a = tanh(u)``, ``u ~ N(f(s), sigma(s)^2)`` (SAC, CQL).

    The logarithm of the standard deviation is the network's output minus 1, within [-20, 2]; the last layer begins
    with small weights (Xavier, gain 0.01), so that the first actions are alike in all states.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: int = 256,
        layers: int = 3,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        """Create the network.

        Args:
            obs_dim: Size of the state.
            action_dim: Size of the action.
            hidden: Width of its layers.
            layers: Hidden layers.
            activation: ``mish``, ``relu`` or ``silu``.
            dropout: Share of the hidden units that are left out in training.
        """
        super().__init__(obs_dim, 2 * action_dim, hidden, layers, activation, dropout)
        head: nn.Linear = self.net[-1]  # type: ignore[assignment]
        nn.init.xavier_uniform_(head.weight, gain=0.01)
        nn.init.zeros_(head.bias)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation of u, both ``(B, A)``, for states ``(B, S)``."""
        mean, raw = self._out(obs).chunk(2, dim=-1)
        return mean, (raw - 1).clamp(-20, 2)


def gaussian_log_prob(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density ``(...)`` of ``x (..., A)`` under independent Gaussians; all three broadcast."""
    z = (x - mean) * (-log_std).exp()
    return -(0.5 * z.square() + log_std).sum(-1) - 0.5 * x.shape[-1] * LOG_2PI


def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from a squashed Gaussian.

    Args:
        mean: ``(B, A)``.
        log_std: ``(B, A)``.
        noise: Standard normal, ``(B, A)`` or ``(B, N, A)`` for N actions of each state.

    Returns:
        Actions like ``noise``, within [-1, 1], and their log-density without the last dimension: that of
        ``u = mean + sigma noise`` less the logarithm of the slope of tanh, ``1 - tanh(u)^2``.
    """
    if noise.dim() == 3:
        mean, log_std = mean[:, None], log_std[:, None]
    u = mean + log_std.exp() * noise
    log_prob = -(0.5 * noise.square() + log_std + _log_slope(u)).sum(-1) - 0.5 * u.shape[-1] * LOG_2PI
    return u.tanh(), log_prob


def squashed_log_prob(action: Tensor, mean: Tensor, log_std: Tensor, edge: float = 1e-6) -> Tensor:
    """Log-density ``(B,)`` of given actions ``(B, A)`` under squashed Gaussians.

    Actions nearer to -1 or 1 than ``edge``, where the density has no value, count as if they were that near (u = 7.3).
    """
    u = action.clamp(-1 + edge, 1 - edge).atanh()
    return gaussian_log_prob(u, mean, log_std) - _log_slope(u).sum(-1)


def _log_slope(u: Tensor) -> Tensor:
    """``log(1 - tanh(u)^2)`` without the difference, which is 0 in float32 from a distance of 9 on."""
    return 2 * (math.log(2) - u - F.softplus(-2 * u))
