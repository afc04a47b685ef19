"""Sums over the steps of a noising chain that estimate the clean sample it started from.

DMEMM (Eq. 8) unrolls the reverse chain along the forward marginals ``x_i = signal_i x_0 + noise_i eps``,
``i = k..1``. With ``u_i = noise_i / signal_i`` and the clean predictions ``xhat_i = predict(x_i, i)`` every
such sum has the form

    x0_hat = x_0 + r + sum_{i<=k} w_i (xhat_i - x_0)

which, unlike the form in predicted noise, involves no difference of numbers as large as ``u_K`` (about 2000):

* ``chain_paper``, Eq. 8 as printed: ``w_i = 1 - u_{i-1}^2 / u_i^2``, ``r = -S_k eps`` with
  ``S_k = sum_{i<=k} (u_i - u_{i-1}) u_{i-1} / u_i``. It keeps ``r`` even when every prediction is perfect;
* ``chain_ddim``, the deterministic steps: ``w_i = 1 - u_{i-1} / u_i``, ``r = 0``: exact for perfect
  predictions;
* ``chain_bridge``, the paper's weights on a forward chain that ends in ``x_k`` instead of one shared noise:
  ``eps_{i-1} = rho_i eps_i + sqrt(1 - rho_i^2) xi_i``, ``rho_i = u_{i-1} / u_i``. Its residual telescopes to
  ``r = -sum_{2<=i<=k} u_{i-1} sqrt(1 - rho_i^2) xi_i``: zero on average, with the variance of Eq. 20.

The terms of a batch with different ``k`` are laid out as rows ``(window, step)`` without padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.errors import check_choice

CHAINS = ("chain_paper", "chain_ddim", "chain_bridge")


class ChainWeights(NamedTuple):
    """Coefficients of a chain estimate, float64, indexed by the diffusion step (entry 0 is 0).

    Args:
        weight: ``w_i``, factor of ``xhat_i - x_0``, in ``[0, 1]``; shape ``(K + 1,)``.
        residual: ``S_k``, factor of ``-eps`` in the estimate from step k; shape ``(K + 1,)``.
    """

    weight: Tensor
    residual: Tensor


def weights(schedule: Schedule, kind: str) -> ChainWeights:
    """Coefficients of a chain estimate in x0 form.

    In noise form the factor of the predicted noise is ``c_i = u_i w_i``; for the paper's weights that is
    ``(1 - alpha_i) / sqrt((1 - alpha_bar_i) alpha_bar_i)``.

    Args:
        schedule: Noise schedule of K steps.
        kind: ``chain_paper``, ``chain_ddim`` or ``chain_bridge``.

    Returns:
        Weights and residuals in float64 on the CPU, whatever the schedule's device.

    Raises:
        ConfigError: For an unknown kind.
    """
    check_choice("chain estimate", kind, CHAINS)
    u = torch.tensor([schedule.value("u", i) for i in range(schedule.num_steps + 1)], dtype=torch.float64)
    zero = u.new_zeros(1)
    ratio = u[:-1] / u[1:]
    if kind == "chain_ddim":
        return ChainWeights(torch.cat([zero, 1 - ratio]), torch.zeros_like(u))
    weight = torch.cat([zero, 1 - ratio.square()])
    if kind == "chain_bridge":
        return ChainWeights(weight, torch.zeros_like(u))
    return ChainWeights(weight, torch.cat([zero, (u.diff() * ratio).cumsum(0)]))


def bridge(schedule: Schedule, k: Tensor, eps: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draw the noise of every step of a forward chain, given the noise of its end.

    Args:
        schedule: Noise schedule.
        k: Last step of each chain, int64, ``(B,)``.
        eps: Noise at step k, ``(B, ...)``.
        generator: Source of randomness on the device of ``eps``.

    Returns:
        Noise ``(max k, B, ...)``, entry ``i - 1`` belonging to step i (``eps`` itself for ``i >= k``), and
        the residual ``u_k eps - sum_{i<=k} c_i eps_i`` like ``eps``.
    """
    last = int(k.max())
    noise = eps.new_empty(last, *eps.shape)
    residual = torch.zeros_like(eps)
    noise[-1] = eps
    for i in range(last, 1, -1):
        u, u_next = schedule.value("u", i), schedule.value("u", i - 1)
        rho = u_next / u
        spread = (1 - rho**2) ** 0.5
        fresh = torch.randn(eps.shape, generator=generator, dtype=eps.dtype, device=eps.device)
        begun = (k >= i).reshape(-1, *[1] * (eps.dim() - 1))
        noise[i - 2] = torch.where(begun, rho * noise[i - 1] + spread * fresh, eps)
        residual -= torch.where(begun, u_next * spread * fresh, 0)
    return noise, residual


def proposal(factor: Tensor, count: Tensor) -> Tensor:
    """Sampling distribution over each window's steps ``1..n``: half proportional to ``c_i``, half uniform.

    The uniform half bounds the importance weights by ``2 n``; without the other half rare huge ``c_i`` would
    dominate the variance.

    Args:
        factor: ``c_i``, ``(K + 1,)``.
        count: Number of steps n of each window, ``(B,)``.

    Returns:
        Probabilities ``(B, K)`` like ``factor``, zero beyond n; a row of zeros for ``n = 0``.
    """
    steps = torch.arange(1, len(factor), device=factor.device)
    allowed = (steps <= count[:, None]).to(factor.dtype)
    proportional = allowed * factor[1:]
    tiny = torch.finfo(factor.dtype).tiny
    proportional = proportional / proportional.sum(1, keepdim=True).clamp_min(tiny)
    return 0.5 * (proportional + allowed / count[:, None].clamp_min(1))


def systematic(probability: Tensor, m: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw m steps for each window at evenly spaced quantiles with one common random offset (stratified).

    Args:
        probability: Rows ``(B, K)`` that sum to one.
        m: Draws per row.
        generator: Source of randomness on the device of ``probability``.

    Returns:
        Steps in ``1..K``, int64 ``(B, m)``, ascending; step i is drawn ``m * probability_i`` times on
        average.
    """
    cumulative = probability.cumsum(1)
    rows, steps = probability.shape
    dtype, device = probability.dtype, probability.device
    offset = torch.rand(rows, 1, generator=generator, dtype=dtype, device=device)
    points = (torch.arange(m, device=device) + offset) / m
    drawn = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    return drawn.clamp_max(steps - 1) + 1  # a point may round up to 1


class Rows(NamedTuple):
    """Terms of the sums of a batch, one per row.

    Args:
        owner: Window that the term belongs to, int64 ``(R,)``.
        step: Diffusion step i, int64 ``(R,)``.
        weight: Factor of ``xhat_i - x_0``, ``(R, 1, ..., 1)``.
    """

    owner: Tensor
    step: Tensor
    weight: Tensor

    def split(self, size: int) -> Iterator[Rows]:
        """Yield consecutive parts of at most ``size`` rows."""
        for first in range(0, len(self.owner), size):
            yield Rows(*(column[first : first + size] for column in self))


class Chain:
    """A batch of chain sums: everything but the predictions, in float32 or better whatever the autocast."""

    def __init__(
        self,
        kind: str,
        schedule: Schedule,
        x0: Tensor,
        k: Tensor,
        eps: Tensor,
        shared: bool,
        given: Tensor | None,
        generator: torch.Generator | None,
    ) -> None:
        self.schedule, self.k, self.given = schedule, k, given
        self.x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        self.eps = eps.to(self.x0.dtype)
        self.count = k - 1 if shared else k  # terms to be evaluated here
        self.weight, residual = (table.to(k.device, self.x0.dtype) for table in weights(schedule, kind))
        self.noise: Tensor | None = None
        if kind == "chain_bridge":
            self.noise, remainder = bridge(schedule, k, self.eps, generator)
            self.start = self.x0 + remainder
        else:
            self.start = self.x0 - self.broadcast(residual[k]) * self.eps

    def broadcast(self, values: Tensor) -> Tensor:
        """Values of windows or rows ``(R,)`` as ``(R, 1, ..., 1)`` in the type of the sums."""
        return values.to(self.x0.dtype).reshape(-1, *[1] * (self.x0.dim() - 1))

    def all_rows(self) -> Rows:
        """Every term: ``sum_b count_b`` rows."""
        windows = torch.arange(len(self.k), device=self.k.device)
        owner = torch.repeat_interleave(windows, self.count)
        first = self.count.cumsum(0) - self.count
        step = torch.arange(len(owner), device=owner.device) - first[owner] + 1
        return Rows(owner, step, self.broadcast(self.weight[step]))

    def drawn_rows(self, m: int, generator: torch.Generator | None) -> Rows:
        """At most m terms per window, drawn with importance weights; all of them where there are no more."""
        probability = proposal(self.weight * self.schedule.u.to(self.weight.dtype), self.count)
        drawn = systematic(probability, m, generator)
        listed = torch.arange(1, m + 1, device=drawn.device).expand_as(drawn)
        few = (self.count <= m)[:, None]
        step = torch.where(few, listed, drawn)
        keep = step <= self.count[:, None]
        importance = torch.where(few, 1.0, 1 / (m * probability.gather(1, drawn - 1)))
        owner = keep.nonzero()[:, 0]
        step = step[keep]
        return Rows(owner, step, self.broadcast(self.weight[step] * importance[keep]))

    def inputs(self, rows: Rows) -> Tensor:
        """Noisy windows ``x_i`` of the rows, with the given entries clean."""
        x0 = self.x0[rows.owner]
        noise = self.eps[rows.owner] if self.noise is None else self.noise[rows.step - 1, rows.owner]
        x_i = self.schedule.q_sample(x0, rows.step, noise)
        return x_i if self.given is None else torch.where(self.given, x0, x_i)

    def terms(self, rows: Rows, x0_hat: Tensor) -> Tensor:
        """Weighted errors ``(R, ...)`` of the rows' predictions."""
        return rows.weight * (x0_hat.to(self.x0.dtype) - self.x0[rows.owner])

    def shared_term(self, x0_hat_k: Tensor) -> Tensor:
        """The term ``i = k`` of every window, from a prediction made elsewhere."""
        return self.broadcast(self.weight[self.k]) * (x0_hat_k.to(self.x0.dtype) - self.x0)
