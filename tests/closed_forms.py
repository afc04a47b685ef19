"""Behaviours whose diffusion is known exactly, for tests of energy guidance.

All are in float64. With a Gaussian or a mixture of Gaussians as behaviour, noise, posterior, energy and guided law have
closed forms; where Q is no more than quadratic, so do they after tilting.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_diffrl.diffusion.vp_sde import VPSDE

SDE = VPSDE()
TIMES = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0)
F64 = torch.float64


def printed(number: str) -> Any:
    """What rounds to a number of a table, as it is printed there: half a unit of its last digit either way."""
    digits = len(number.partition(".")[2])
    return pytest.approx(float(number), abs=0.51 * 10.0**-digits)


def column(*values: float) -> Tensor:
    """Numbers as actions of size 1, ``(n, 1)``."""
    return torch.tensor(values, dtype=F64)[:, None]


def time(t: float) -> Tensor:
    """A time as the samplers give it, ``(1,)``."""
    return torch.tensor([t], dtype=F64)


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians of one action."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    variances: tuple[float, ...]

    def components(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Given the noisy action ``(..., 1)``: weights, means and variances of each component's posterior, (..., k)."""
        w, m, v = (torch.tensor(part, dtype=F64) for part in (self.weights, self.means, self.variances))
        alpha, sigma = SDE.alpha(t), SDE.sigma(t)
        total = alpha**2 * v + sigma**2
        log_w = w.log() - 0.5 * total.log() - 0.5 * (x - alpha * m) ** 2 / total
        return log_w.softmax(-1), m + alpha * v / total * (x - alpha * m), (v * sigma**2 / total).expand_as(log_w)

    def eps(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The exact network, ``E[eps | x]``; x ``(..., 1)``, t a number or ``(B,)``."""
        t = t[:, None] if isinstance(t, Tensor) and len(t) > 1 else t
        return (x - SDE.alpha(t) * self.mean(x, t)) / SDE.sigma(t)

    def mean(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Mean of the posterior, like x."""
        w, m, _ = self.components(x, t)
        return (w * m).sum(-1, keepdim=True)

    def variance(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Variance of the posterior, like x."""
        w, m, v = self.components(x, t)
        mean = (w * m).sum(-1, keepdim=True)
        return (w * (v + (m - mean) ** 2)).sum(-1, keepdim=True)

    def energy(self, x: Tensor, t: Tensor | float, beta: Tensor | float, c: float, h: Tensor | float = 0.0) -> Tensor:
        """The exact energy ``(...)`` for ``Q = c a + h a^2 / 2``; beta and h numbers, or ``(..., 1)``."""
        w, m, v = self.components(x, t)
        rest = 1 - beta * h * v
        of_each = beta * (c * m + 0.5 * h * m**2) + 0.5 * (beta * (c + h * m)) ** 2 * v / rest - 0.5 * rest.log()
        return (w.log() + of_each).logsumexp(-1)

    def nodes(self, n: int = 200, rule: Callable[[int], tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, Tensor]:
        """Clean actions ``(n k,)`` and weights for expectations, by quadrature: that of :func:`gauss`, or another."""
        z, w = (rule or gauss)(n)
        points = [m + math.sqrt(v) * z for m, v in zip(self.means, self.variances)]
        return torch.cat(points), torch.cat([share * w for share in self.weights])


def gauss(n: int) -> tuple[Tensor, Tensor]:
    """Points and weights ``(n,)`` of a quadrature for the standard normal law."""
    z, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(z), torch.from_numpy(w / w.sum())


def even(n: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced points and weights ``(n,)`` for the standard normal law.

    Of functions with poles beside the real line, as the noise of two modes has, its error falls with ``exp(-n)`` where
    that of :func:`gauss` hardly falls.
    """
    z = torch.linspace(-8.5, 8.5, n, dtype=F64)
    return z, (-0.5 * z**2).softmax(0)


GAUSSIAN = Mixture((1.0,), (0.2,), (0.25,))
TWO_MODES = Mixture((0.3, 0.7), (-0.6, 0.5), (0.04, 0.0225))


def derivative(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``df/dx`` by autograd, like x ``(B, A)``, of f with a value for each row."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


# Two actions at once: correlated Gaussian data
MEAN_2 = torch.tensor([0.1, -0.3], dtype=F64)
COV_2 = torch.tensor([[0.25, 0.1], [0.1, 0.09]], dtype=F64)
EYE_2 = torch.eye(2, dtype=F64)


def gain_2(t: float) -> Tensor:
    """``d mu / d a_t`` of the two-dimensional data."""
    alpha, sigma = SDE.alpha(t), SDE.sigma(t)
    return alpha * COV_2 @ torch.linalg.inv(alpha**2 * COV_2 + sigma**2 * EYE_2)


def posterior_2(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Mean ``(B, 2)`` and covariance ``(B, 2, 2)`` of its posterior."""
    gain, alpha = gain_2(t), SDE.alpha(t)
    cov = COV_2 - alpha * gain @ COV_2
    return MEAN_2 + (x - alpha * MEAN_2) @ gain.T, (0.5 * (cov + cov.T)).expand(len(x), 2, 2)


def eps_2(x: Tensor, t: Tensor) -> Tensor:
    """The exact network of the two-dimensional data at one time ``(B,)`` or ``(1,)``."""
    at = float(t.flatten()[0])
    return (x - SDE.alpha(at) * posterior_2(x, at)[0]) / SDE.sigma(at)
