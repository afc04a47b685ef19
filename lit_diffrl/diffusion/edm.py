"""Diffusion in the noise level itself: EDM (Karras et al. 2022, "Elucidating the design space of diffusion models").

Noisy data are ``x = y + n``, ``n ~ N(0, sigma^2)`` with sigma from 80 down to 0: the signal is never scaled down. The
network F is wrapped so that its input and its target have unit variance at every level (their Eq. 7, Table 1),

    D(x; sigma) = c_skip x + c_out F(c_in x, c_noise),

and the probability-flow ODE ``dx / d sigma = (x - D(x; sigma)) / sigma`` is solved on their grid of levels (Eq. 5) by
Heun's method with optional churn (Algorithm 2). SynthER and DyDiff are trained and sampled this way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lit_diffrl.diffusion.hooks import Project, Randn, unchanged
from lit_diffrl.errors import check_range

DenoiseLevel = Callable[[Tensor, Tensor], Tensor]
"""``(x (B, ...), sigma (1,)) -> D(x; sigma) (B, ...)``: clean prediction at a noise level that all rows share."""

Network = Callable[[Tensor, Tensor], Tensor]
"""``(c_in x (B, ...), c_noise (B,) or (1,)) -> F (B, ...)``: the raw network."""


@dataclass(frozen=True)
class EDM:
    """Noise levels and preconditioning.

    Args:
        sigma_data: Standard deviation of the data: 0.5 for data scaled to [-1, 1], 1 for z-scored data.
        sigma_min: Last noise level before 0.
        sigma_max: First noise level.
        rho: Exponent of the grid; larger ones put more levels at its low end.
        p_mean: Mean of ln sigma in training.
        p_std: Deviation of ln sigma in training.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    p_mean: float = -1.2
    p_std: float = 1.2

    def __post_init__(self) -> None:
        for name in ("sigma_data", "sigma_min", "rho"):
            check_range(f"edm.{name}", getattr(self, name), 0, low_open=True)
        check_range("edm.sigma_max", self.sigma_max, self.sigma_min, low_open=True)
        check_range("edm.p_mean", self.p_mean)
        check_range("edm.p_std", self.p_std, 0)

    # ---------------------------------------------------------------- preconditioning

    def c_skip(self, sigma: Tensor) -> Tensor:
        """Share of the noisy data that is kept."""
        return self.sigma_data**2 / (sigma.square() + self.sigma_data**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        """Scale of the network's output."""
        return sigma * self.sigma_data * self.c_in(sigma)

    def c_in(self, sigma: Tensor) -> Tensor:
        """Scale of the network's input."""
        return (sigma.square() + self.sigma_data**2).rsqrt()

    def c_noise(self, sigma: Tensor) -> Tensor:
        """What the network is told of the level."""
        return sigma.log() / 4

    def weight(self, sigma: Tensor) -> Tensor:
        """Weight of the squared error at a level, lambda: the network's own error then counts alike at all."""
        return self.c_out(sigma).square().reciprocal()

    def denoise(self, net: Network, x: Tensor, sigma: Tensor, project: Project | None = None) -> Tensor:
        """``D(x; sigma)``.

        Args:
            net: The raw network.
            x: Noisy data ``(B, ...)``.
            sigma: Levels ``(B,)``, or ``(1,)`` if all rows have the same.
            project: Writes conditions into the network's scaled input, so that it sees them at full size. Scaled with
                the rest, as without, conditions of size 1 are 0.0125 at level 80, and hardly read there.

        Returns:
            Clean prediction, like ``x``.
        """
        level = _like_rows(sigma, x)
        scaled = self.c_in(level) * x
        out = net(scaled if project is None else project(scaled), self.c_noise(sigma))
        return self.c_skip(level) * x + self.c_out(level) * out.to(x.dtype)

    # ---------------------------------------------------------------- training

    def draw_sigma(self, normal: Tensor) -> Tensor:
        """Training levels ``(B,)``, log-normal, from standard normal numbers ``(B,)``."""
        return (self.p_mean + self.p_std * normal).exp()

    def loss(self, prediction: Tensor, clean: Tensor, sigma: Tensor, mask: Tensor | None = None) -> Tensor:
        """``lambda(sigma) (D - y)^2``, averaged over all entries.

        Data that are normal with deviation ``sigma_data`` and independent entries cost 1 at every level, whatever the
        network; less is structure that it has found.

        Args:
            prediction: ``D(y + n; sigma)``, ``(B, ...)``.
            clean: The data y, likewise.
            sigma: Levels ``(B,)``.
            mask: Entries that count, broadcast to ``clean``; the others add 0 and stay in the number averaged over,
                so that processes agree. Divide by the mask's mean to have it per entry that counts.

        Returns:
            Scalar.
        """
        error = _like_rows(self.weight(sigma), clean) * (prediction - clean).square()
        return (error if mask is None else error * mask).mean()

    # ---------------------------------------------------------------- sampling

    def grid(self, steps: int) -> list[float]:
        """Levels of a sampler (Eq. 5): ``steps`` of them from ``sigma_max`` to ``sigma_min``, then 0."""
        check_range("sampler steps", steps, 2)
        first, last = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return [*((first + i / (steps - 1) * (last - first)) ** self.rho for i in range(steps)), 0.0]


@dataclass(frozen=True)
class Churn:
    """Noise that Heun's sampler adds at every step, to forget errors of the steps before (Algorithm 2).

    Args:
        s_churn: Total amount, shared out over the steps; a step takes at most ``sqrt(2) - 1``, which doubles the
            variance. 0 samples without.
        s_tmin: Least level with churn.
        s_tmax: Greatest level with churn.
        s_noise: Factor of the added noise.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = 1e9
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_tmin", "s_noise"):
            check_range(f"churn.{name}", getattr(self, name), 0)
        check_range("churn.s_tmax", self.s_tmax, self.s_tmin)

    def gamma(self, sigma: float, steps: int) -> float:
        """Relative rise of the level at the start of a step."""
        return min(self.s_churn / steps, math.sqrt(2) - 1) if self.s_tmin <= sigma <= self.s_tmax else 0.0


def sample_heun(
    denoise: DenoiseLevel,
    noise: Tensor,
    edm: EDM,
    *,
    steps: int,
    churn: Churn = Churn(),
    project: Project | None = None,
    recondition_after_churn: bool = True,
    heun: bool = True,
    start: tuple[Tensor, int] | None = None,
    randn: Randn = torch.randn_like,
) -> Tensor:
    """Algorithm 2 of Karras et al. (2022), with conditions written in after the first draw and after every step.

    The state is kept in float64: from level 80 to 0.002 its increments would drown in 16 bits.

    Args:
        denoise: ``D(x; sigma)``; is called ``2 steps - 1`` times, with the type of ``noise``.
        noise: Standard normal ``(B, ...)``.
        edm: The levels.
        steps: Levels of the grid, at least 2.
        churn: Noise added on the way.
        project: Writes the conditions into ``x``: after the first draw, after every Euler step (so that the second
            prediction sees them) and after every Heun step.
        recondition_after_churn: Write them also after the churn. Without, as in DyDiff's code, the first prediction
            of a churned step sees noisy conditions.
        heun: Correct every Euler step by a second prediction at its end.
        start: Clean data ``(B, ...)`` and the index of the level to which they are noised, to begin there.
        randn: Source of the churn's noise, drawn like ``noise``.

    Returns:
        Samples, like ``noise``.

    Raises:
        ConfigError: For a number of steps or an index out of range.
    """
    project = project or unchanged
    x, levels = _begin(edm, noise, steps, start)
    x = project(x)
    for sigma, sigma_next in pairwise(levels):
        gamma = churn.gamma(sigma, steps)
        sigma_hat = sigma * (1 + gamma)
        x_hat = x
        if gamma > 0:
            added = churn.s_noise * math.sqrt(sigma_hat**2 - sigma**2)
            x_hat = x + added * randn(noise).to(x.dtype)
            x_hat = project(x_hat) if recondition_after_churn else x_hat

        slope = (x_hat - _predict(denoise, x_hat, sigma_hat, noise)) / sigma_hat
        x = project(x_hat + (sigma_next - sigma_hat) * slope)
        if heun and sigma_next > 0:
            slope_next = (x - _predict(denoise, x, sigma_next, noise)) / sigma_next
            x = project(x_hat + (sigma_next - sigma_hat) * 0.5 * (slope + slope_next))
    return x.to(noise.dtype)


def sample_edm_multistep(
    denoise: DenoiseLevel,
    noise: Tensor,
    edm: EDM,
    *,
    steps: int,
    project: Project | None = None,
    start: tuple[Tensor, int] | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2) in the noise level: one call a step, of second order.

    The prediction is extrapolated to the middle of the step in ``-ln sigma`` from that of the step before. First and
    last step are of order 1; the last returns the prediction itself. Arguments as :func:`sample_heun`; ``denoise`` is
    called ``steps`` times. With two steps it is the mean given the conditions, polished at ``sigma_min``: where these
    decide the outcome, as in a simulator, nearer to it than samples of a network that is not perfect.
    """
    project = project or unchanged
    x, levels = _begin(edm, noise, steps, start)
    x = project(x)
    clean_last, h_last = x, math.inf  # an infinite previous step switches the correction off
    for sigma, sigma_next in pairwise(levels):
        clean = _predict(denoise, x, sigma, noise)
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        target = clean
        if math.isfinite(h) and math.isfinite(h_last):
            target = clean + h / (2 * h_last) * (clean - clean_last)
        x = project(target + sigma_next / sigma * (x - target))
        clean_last, h_last = clean, h
    return x.to(noise.dtype)


def _begin(edm: EDM, noise: Tensor, steps: int, start: tuple[Tensor, int] | None) -> tuple[Tensor, list[float]]:
    """The first state in float64 and the levels from there on."""
    levels = edm.grid(steps)
    if start is None:
        return levels[0] * noise.double(), levels
    clean, index = start
    check_range("index of the first level", index, 0, steps - 1)
    return clean.double() + levels[index] * noise.double(), levels[index:]


def _predict(denoise: DenoiseLevel, x: Tensor, sigma: float, like: Tensor) -> Tensor:
    """The clean prediction in the type of ``x``, made in that of ``like``."""
    return denoise(x.to(like.dtype), torch.full((1,), sigma, dtype=like.dtype, device=x.device)).to(x.dtype)


def _like_rows(level: Tensor, x: Tensor) -> Tensor:
    """Numbers ``(B,)`` or ``(1,)`` with as many axes as ``x (B, ...)``."""
    return level.reshape(-1, *[1] * (x.dim() - 1))
