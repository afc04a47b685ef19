"""The variance-preserving diffusion in continuous time, with a linear rate (Song et al. 2021; CEP, Lu et al. 2023).

``x_t = alpha_t x_0 + sigma_t eps`` with ``log alpha_t = -t^2 (b_1 - b_0) / 4 - t b_0 / 2``, from t = 0, the data, to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lit_diffrl.errors import check_range

T_MIN = 1e-3
"""Least time of training and end of sampling: below, the noise is lost in rounding."""

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class VPSDE:
    """The schedule and what follows from it; every function of time takes a float or a tensor and returns the same.

    A float is computed in double precision, a tensor in its own type: ``1 - alpha^2`` is never formed, so that float32
    holds for all times from :data:`T_MIN` on.

    Args:
        beta_min: Rate at t = 0.
        beta_max: Rate at t = 1.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        check_range("beta_min", self.beta_min, 0)
        check_range("beta_max", self.beta_max, self.beta_min, low_open=True)

    def log_alpha(self, t: Number) -> Number:
        """Log of the signal's factor."""
        return -0.25 * (self.beta_max - self.beta_min) * t * t - 0.5 * self.beta_min * t

    def alpha(self, t: Number) -> Number:
        """Factor of the signal."""
        return _of("exp", self.log_alpha(t))

    def sigma(self, t: Number) -> Number:
        """Factor of the noise, ``sqrt(1 - alpha^2)``."""
        return _of("sqrt", -_of("expm1", 2 * self.log_alpha(t)))

    def lambda_(self, t: Number) -> Number:
        """Half the log of the signal-to-noise ratio, falling with t."""
        return self.log_alpha(t) - _of("log", self.sigma(t))

    def inverse_lambda(self, value: Number) -> Number:
        """The time at which :meth:`lambda_` has a value."""
        # log(1 + sigma^2 / alpha^2) = -2 log alpha is quadratic in t; this form of its root does not cancel
        rise = self.beta_max - self.beta_min
        x = 2 * rise * _softplus(-2 * value)
        return x / ((_of("sqrt", self.beta_min**2 + x) + self.beta_min) * rise)

    def noise_to_signal(self, t: Number) -> Number:
        """``sigma^2 / alpha^2``: by what an error of the noise is multiplied, squared, in the clean data."""
        return _of("expm1", -2 * self.log_alpha(t))

    def f(self, t: Number) -> Number:
        """Drift ``d log alpha / dt`` of the forward process ``dx = f x dt + g dw``."""
        return -0.5 * self.g2(t)

    def g2(self, t: Number) -> Number:
        """Square of its diffusion coefficient: the rate itself."""
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def net_input(self, t: float) -> float:
        """What a network is fed for time t: the time."""
        return t

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Noise clean data to time t: ``alpha_t x_0 + sigma_t eps``.

        Args:
            x0: Clean data ``(B, ...)``.
            t: Times ``(B,)``, or ``(1,)`` for all rows.
            eps: Standard normal noise like ``x0``.

        Returns:
            ``x_t``, like ``x0``.
        """
        t = over_rows(t, x0)
        return (self.alpha(t) * x0 + self.sigma(t) * eps).to(x0.dtype)

    def x0_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The clean data from which ``eps`` leads to ``x_t``: ``(x_t - sigma_t eps) / alpha_t`` (AEPO, Eq. 18).

        An error of ``eps`` is multiplied by ``sigma / alpha``: 3.4 at t = 0.5, 25 at 0.8, 152 at 1.

        Args:
            x_t: Noisy data ``(B, ...)``.
            t: Times ``(B,)``, or ``(1,)`` for all rows.
            eps: Predicted noise like ``x_t``.

        Returns:
            The clean data, like ``x_t``.
        """
        t = over_rows(t, x_t)
        return ((x_t - self.sigma(t) * eps) / self.alpha(t)).to(x_t.dtype)

    def eps_from(self, predicted: str, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a network's answer stands for.

        Args:
            predicted: What the network predicts: ``eps``, ``x0``, or ``v``, which is ``alpha_t eps - sigma_t x_0``.
            out: Its answer, like ``x_t``.
            x_t: Noisy data ``(B, ...)``.
            t: Times ``(B,)``, or ``(1,)`` for all rows.

        Returns:
            Noise like ``x_t``. Of ``v`` it is ``sigma_t x_t + alpha_t v``, and the clean data are ``alpha_t x_t -
            sigma_t v``: neither multiplies an error.
        """
        if predicted == "eps":
            return out
        t = over_rows(t, x_t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        return (sigma * x_t + alpha * out if predicted == "v" else (x_t - alpha * out) / sigma).to(x_t.dtype)

    def error_scale(self, predicted: str, t: Tensor) -> Tensor:
        """Squared error of what is predicted, over that of the noise it stands for, at times ``(B,)``."""
        ratio = self.noise_to_signal(t)
        return {"eps": torch.ones_like(t), "x0": ratio, "v": 1 + ratio}[predicted]


def over_rows(value: Tensor, x: Tensor) -> Tensor:
    """``value (B,)`` or ``(1,)``, in float32 or better, with as many axes as ``x (B, ...)``."""
    return value.to(torch.promote_types(value.dtype, torch.float32)).reshape(-1, *[1] * (x.dim() - 1))


def at_time(function: Callable[[Any], Any], t: Tensor) -> Tensor | float:
    """A function of the time at ``t``; a number for ``t (1,)`` on a CPU, where a tensor of one costs more.

    On a GPU a number would have to be waited for.
    """
    value: Tensor | float = function(t.item() if t.device.type == "cpu" and len(t) == 1 else t)
    return value


def _of(name: str, x: Number) -> Number:
    """A function by the name that it has in both math and torch."""
    value: Number = getattr(torch if isinstance(x, Tensor) else math, name)(x)
    return value


def _softplus(x: Number) -> Number:
    """``log(1 + e^x)``, exact in both tails."""
    if isinstance(x, Tensor):
        return torch.logaddexp(x, torch.zeros_like(x))
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
