"""Discrete noise schedules and the Gaussian algebra that follows from them.

A schedule is the sequence ``beta_1..beta_K`` of the forward chain
``q(x_k | x_{k-1}) = N(sqrt(1 - beta_k) x_{k-1}, beta_k I)`` (Ho et al. 2020, eq. 2); index 0 stands for clean
data. With ``alpha_k = 1 - beta_k`` and ``alpha_bar_k = prod_{i<=k} alpha_i`` the chain has the marginals
``x_k = sqrt(alpha_bar_k) x_0 + sqrt(1 - alpha_bar_k) eps`` (eq. 4) and the Gaussian posterior of eqs. 6, 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_diffrl.errors import check_choice, check_range

MAX_BETA = 0.999  # a step may not destroy the signal altogether: alpha_bar_K > 0


def cosine_betas(num_steps: int) -> Tensor:
    """Cosine schedule with offset 0.008 (Nichol and Dhariwal 2021, eq. 17)."""
    offset = 0.008
    time = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    signal = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - signal[1:] / signal[:-1]).clip(0, MAX_BETA)


def linear_betas(num_steps: int) -> Tensor:
    """Linear schedule 1e-4..0.02 of DDPM, times ``1000 / K`` so that any K adds the noise of 1000 steps.

    Meant for ``K > 20``: below, the last steps would add a variance of 1 or more and are held at 0.999.
    """
    return (unscaled_linear_betas(num_steps) * 1000 / num_steps).clip(0, MAX_BETA)


def unscaled_linear_betas(num_steps: int) -> Tensor:
    """Linear schedule 1e-4..0.02 for any K: with a small K little noise is added, and ``x_K`` is not N(0, I).

    What Diffusion-QL's code calls ``linear``; at K = 5 it leaves ``alpha_bar_K = 0.95`` of the signal's variance.
    """
    return torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64)


def vp_betas(num_steps: int) -> Tensor:
    """Variance-preserving SDE with rates 0.1..10, integrated over each of K equal intervals.

    ``alpha_k = exp(-b_min / K - (b_max - b_min)(2k - 1) / (2 K^2))``: the schedule of Diffusion-QL (Wang et
    al. 2023, after Xiao et al. 2022).
    """
    low, high = 0.1, 10.0
    k = torch.arange(1, num_steps + 1, dtype=torch.float64)
    return 1 - torch.exp(-low / num_steps - 0.5 * (high - low) * (2 * k - 1) / num_steps**2)


BETAS: dict[str, Callable[[int], Tensor]] = {
    "cosine": cosine_betas,
    "linear": linear_betas,
    "linear_unscaled": unscaled_linear_betas,
    "vp": vp_betas,
}


class Schedule(nn.Module):
    """Noise schedule: tables indexed by the diffusion step ``k = 0..K`` (0 is clean data).

    Everything is computed in float64. The tables are non-persistent buffers that follow the module between
    devices but are never cast below float32: at half precision ``1 / sqrt(alpha_bar_K)`` overflows and
    ``1 - alpha_bar_1`` vanishes.

    Attributes:
        beta: Variance added by step k, shape ``(K + 1,)`` as all tables; ``beta[0] = 0``.
        alpha: ``1 - beta``.
        alpha_bar: Running product of ``alpha``.
        signal: ``sqrt(alpha_bar)``.
        noise: ``sqrt(1 - alpha_bar)``.
        u: Noise-to-signal ratio ``noise / signal``, increasing from 0.
        c1: Weight of ``x_0`` in the posterior mean; ``c1[1] = 1``.
        c2: Weight of ``x_k`` in the posterior mean; ``c2[1] = 0``.
        posterior_var: Posterior variance of step k (Ho et al. 2020, eq. 7); ``posterior_var[1] = 0``.
    """

    beta: Tensor
    alpha: Tensor
    alpha_bar: Tensor
    signal: Tensor
    noise: Tensor
    u: Tensor
    c1: Tensor
    c2: Tensor
    posterior_var: Tensor

    def __init__(self, kind: str = "cosine", num_steps: int = 20, dtype: torch.dtype = torch.float32) -> None:
        """Build the tables.

        Args:
            kind: ``cosine``, ``linear`` (for more than 20 steps), ``linear_unscaled`` or ``vp``.
            num_steps: Number of diffusion steps K, at least 1.
            dtype: Type of the tables, float32 or float64.

        Raises:
            ConfigError: For an unknown ``kind`` or ``num_steps < 1``.
        """
        super().__init__()
        check_choice("schedule", kind, BETAS)
        check_range("diffusion steps K", num_steps, 1)
        self.kind = kind
        self.num_steps = num_steps

        beta = torch.cat([torch.zeros(1, dtype=torch.float64), BETAS[kind](num_steps)])
        alpha = 1 - beta
        alpha_bar = torch.cumprod(alpha, 0)
        c1, c2, posterior_var = _posterior(alpha_bar[1:], alpha_bar[:-1])
        clean = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)  # c1, c2, variance of "no step"
        self._exact = {
            "beta": beta,
            "alpha": alpha,
            "alpha_bar": alpha_bar,
            "signal": alpha_bar.sqrt(),
            "noise": (1 - alpha_bar).sqrt(),
            "u": ((1 - alpha_bar) / alpha_bar).sqrt(),
            "c1": torch.cat([clean[:1], c1]),
            "c2": torch.cat([clean[1:2], c2]),
            "posterior_var": torch.cat([clean[2:], posterior_var]),
        }
        self._posteriors: dict[tuple[int, int], tuple[float, float, float]] = {}  # those asked for
        for name, table in self._exact.items():
            self.register_buffer(name, table.to(dtype), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Schedule:
        """Follow ``.to(...)`` between devices with values from the float64 tables, in float32 or better."""
        super()._apply(fn, recurse)
        for name, exact in self._exact.items():
            moved = getattr(self, name)
            setattr(self, name, exact.to(moved.device, torch.promote_types(moved.dtype, torch.float32)))
        return self

    def extra_repr(self) -> str:
        """Kind and number of steps for ``print(module)``."""
        return f"{self.kind!r}, num_steps={self.num_steps}"

    def at(self, name: str, k: Tensor, x: Tensor) -> Tensor:
        """Look a table up at the step of each row.

        Args:
            name: A table, e.g. ``"alpha_bar"``.
            k: Steps, int64, shape ``(B,)``.
            x: The tensor ``(B, ...)`` the values will be combined with.

        Returns:
            Values of shape ``(B, 1, ..., 1)``, in float64 if ``x`` is, else in the type of the tables.
        """
        table = self._exact[name].to(k.device) if x.dtype == torch.float64 else getattr(self, name)
        return table[k].reshape(-1, *[1] * (x.dim() - 1))

    def q_sample(self, x0: Tensor, k: Tensor, eps: Tensor) -> Tensor:
        """Noise clean data to step k: ``signal_k x_0 + noise_k eps``.

        Args:
            x0: Clean data ``(B, ...)``.
            k: Steps ``(B,)``, int64.
            eps: Standard normal noise like ``x0``.

        Returns:
            ``x_k``, like ``x0``.
        """
        return (self.at("signal", k, x0) * x0 + self.at("noise", k, x0) * eps).to(x0.dtype)

    def eps_from_x0(self, x_k: Tensor, k: Tensor, x0: Tensor) -> Tensor:
        """The noise that leads from ``x0`` to ``x_k`` (``k >= 1``)."""
        return ((x_k - self.at("signal", k, x_k) * x0) / self.at("noise", k, x_k)).to(x_k.dtype)

    def x0_from_eps(self, x_k: Tensor, k: Tensor, eps: Tensor) -> Tensor:
        """The clean data from which ``eps`` leads to ``x_k``; multiplies an error of ``eps`` by ``u_k``."""
        return ((x_k - self.at("noise", k, x_k) * eps) / self.at("signal", k, x_k)).to(x_k.dtype)

    def posterior_mean(self, x0: Tensor, x_k: Tensor, k: Tensor) -> Tensor:
        """Mean of ``q(x_{k-1} | x_k, x_0)``: ``c1_k x_0 + c2_k x_k``.

        Args:
            x0: Clean data (or its estimate) ``(B, ...)``.
            x_k: Noisy data, like ``x0``.
            k: Steps ``(B,)``, int64, ``k >= 1``.

        Returns:
            The mean, like ``x_k``.
        """
        return (self.at("c1", k, x_k) * x0 + self.at("c2", k, x_k) * x_k).to(x_k.dtype)

    def posterior(self, k: int, k_next: int) -> tuple[float, float, float]:
        """Posterior ``q(x_{k_next} | x_k, x_0)`` of the chain that jumps from k to ``k_next < k``.

        Returns:
            ``(c1, c2, variance)``: the mean is ``c1 x_0 + c2 x_k``. For ``k_next = k - 1`` these are the
            entries of the tables, for ``k_next = 0`` exactly ``(1, 0, 0)``.
        """
        if (k, k_next) not in self._posteriors:
            alpha_bar = self._exact["alpha_bar"]
            c1, c2, variance = _posterior(alpha_bar[k], alpha_bar[k_next])
            self._posteriors[k, k_next] = c1.item(), c2.item(), variance.item()
        return self._posteriors[k, k_next]

    def jump_beta(self, k: int, k_next: int) -> float:
        """Variance of the forward jump from ``k_next`` to ``k``: ``beta_k`` where they are neighbours."""
        return 1 - self.value("alpha_bar", k) / self.value("alpha_bar", k_next)

    def exact(self, name: str) -> Tensor:
        """A table in float64 on the CPU, whatever the module was cast to."""
        return self._exact[name]

    def value(self, name: str, k: int) -> float:
        """One entry of a table as a Python float in full precision, without touching the device."""
        return self._exact[name][k].item()

    def time_grid(self, steps: int | None = None) -> list[int]:
        """Diffusion steps at which a sampler calls the network.

        Args:
            steps: How many, ``1..K``; None means all K.

        Returns:
            Evenly spaced steps, descending from K; the last jump leads from the last of them to 0.

        Raises:
            ConfigError: If ``steps`` is not in ``1..K``.
        """
        steps = self.num_steps if steps is None else steps
        check_range("sampling steps", steps, 1, self.num_steps)
        return [-(-self.num_steps * i // steps) for i in range(steps, 0, -1)]


def _posterior(alpha_bar: Tensor, alpha_bar_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of ``x_0`` and ``x_k`` and variance of the posterior (Ho et al. 2020, eq. 7), for any jump."""
    alpha = alpha_bar / alpha_bar_next
    # (1 - alpha) rather than a stored beta: the weights at k_next = 0 are then 1 and 0 to the last bit
    c1 = (1 - alpha) * alpha_bar_next.sqrt() / (1 - alpha_bar)
    c2 = (1 - alpha_bar_next) * alpha.sqrt() / (1 - alpha_bar)
    return c1, c2, (1 - alpha) * (1 - alpha_bar_next) / (1 - alpha_bar)
