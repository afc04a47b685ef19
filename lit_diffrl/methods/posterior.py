"""The behaviour's posterior of clean actions over time: variance and calibrated mean (AEPO, Eqs. 18-24 and 43).

An error of the noise network is multiplied by ``sigma / alpha`` in the mean, and by its square in the variance: 23,155
at t = 1. Both are therefore estimated at one time after the other from many samples, and held where they must lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_diffrl.diffusion.vp_sde import T_MIN, VPSDE, over_rows
from lit_diffrl.errors import ConfigError, check_choice, check_range
from lit_diffrl.methods.covariance import variance_of_noise
from lit_diffrl.seeding import Draws, mix_seed

Estimator = Literal["mixed", "raw", "paired", "nll"]
ESTIMATORS = ("mixed", "raw", "paired", "nll")
Mean = Literal["calibrated", "eps"]
CHUNK = 1024  # rows per network call: more do not fit the caches of a CPU
RAW_BELOW = 0.5  # sigma^2 / alpha^2 up to which "mixed" takes the raw estimate


class Moments(NamedTuple):
    """Means over samples at one time of the grid each, squares also over the action's entries.

    Args:
        predicted: ``(G,)`` of ``eps_hat^2``.
        drawn: ``(G,)`` of ``eps^2``.
        error: ``(G,)`` of ``(a_0 - mu)^2``, mu the mean that the network implies.
        action_sq: ``(G,)`` of ``a_0^2``.
        mu_sq: ``(G,)`` of ``mu^2``.
        action: ``(G, A)`` of ``a_0``.
        mu: ``(G, A)`` of ``mu``.
    """

    predicted: Tensor
    drawn: Tensor
    error: Tensor
    action_sq: Tensor
    mu_sq: Tensor
    action: Tensor
    mu: Tensor


class PosteriorTable(nn.Module):
    """Variance, shrinkage and mean on a grid of times, evenly spaced in ``lambda``; linear in time in between.

    Three estimates of the variance at one time, equal for an ideal network, d the action's size:

    - ``raw``: ``sigma^2 / alpha^2 (1 - E|eps_hat|^2 / d)`` (Eq. 22), the paper's, best at small t, useless at large;
    - ``paired``: the same with ``|eps|^2`` of the samples in place of its mean d;
    - ``nll``: ``E|a_0 - mu|^2 / d`` (Eq. 43), which cannot cancel, and counts the mean's error as variance;
    - ``mixed``: raw while ``sigma^2 / alpha^2`` is below 0.5 (t < 0.2), nll from there.

    The mean that the network implies (Eq. 18) is clipped to the box. ``calibrated`` shrinks it towards the mean action:
    ``a_mean + rho(t) (mu - m_hat(t))``, where m_hat is its own mean, and rho, in [0, 1], the slope of the regression of
    the action on it. An ideal network has rho = 1 and the formula is Eq. 18; where mu is noise, rho is 0.

    Attributes:
        variance_at: ``(G,)`` variance at the grid's times.
        rho_at: ``(G,)`` shrinkage.
        mu_at: ``(G, A)`` mean of the network's means, m_hat.
        action_mean: ``(A,)`` mean of the dataset's actions.
        v_bar: Their variance, mean over entries, which the posterior's cannot exceed.
        fitted: Whether the table holds anything yet.
    """

    time: Tensor
    variance_at: Tensor
    rho_at: Tensor
    mu_at: Tensor
    action_mean: Tensor
    v_bar: Tensor
    fitted: Tensor

    def __init__(
        self,
        action_dim: int,
        sde: VPSDE,
        *,
        posterior: Literal[1, 2] = 1,
        estimator: Estimator = "mixed",
        mean_estimator: Mean = "calibrated",
        grid: int = 64,
        clamp: bool = True,
        isotonic: bool = True,
        bound: float | None = 1.0,
        decay: float = 0.999,
    ) -> None:
        """Create an empty table.

        Args:
            action_dim: Size of the action.
            sde: The schedule.
            posterior: 1 estimates the variance from the noise as above; 2 is the data's variance less that of the means
                (Eq. 24), without a choice of the estimate.
            estimator: ``mixed``, ``raw`` (the paper), ``paired`` or ``nll``.
            mean_estimator: ``calibrated``, or the paper's ``eps``.
            grid: Number of times.
            clamp: Hold the variance between 0 and the data's.
            isotonic: Let it not fall with time: the non-decreasing sequence nearest to the estimates.
            bound: The mean is clipped to ``[-bound, bound]``; None: not clipped.
            decay: What :meth:`track` keeps of a time's averages at an update that adds to them.

        Raises:
            ConfigError: For an unknown option or a number out of range.
        """
        super().__init__()
        if posterior not in (1, 2):
            raise ConfigError(f"posterior must be 1 or 2, got {posterior!r}")
        check_choice("variance estimator", estimator, ESTIMATORS)
        check_choice("mean estimator", mean_estimator, ("calibrated", "eps"))
        check_range("posterior grid", grid, 2)
        check_range("decay of the table", decay, 0, 1, high_open=True)
        self.sde, self.posterior, self.estimator, self.mean_estimator = sde, posterior, estimator, mean_estimator
        self.clamp, self.isotonic, self.bound, self.decay = clamp, isotonic, bound, decay
        ends = sde.lambda_(T_MIN), sde.lambda_(1.0)
        time = sde.inverse_lambda(torch.linspace(*ends, grid, dtype=torch.float64))
        self.register_buffer("time", time.float(), persistent=False)
        self.register_buffer("variance_at", torch.zeros(grid))
        self.register_buffer("rho_at", torch.ones(grid))
        self.register_buffer("mu_at", torch.zeros(grid, action_dim))
        self.register_buffer("action_mean", torch.zeros(action_dim))
        self.register_buffer("v_bar", torch.ones(()))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        # running averages of track(): the moments' columns, then the weight behind them
        self.register_buffer("running", torch.zeros(grid, 5 + 2 * action_dim))
        self.register_buffer("weight", torch.zeros(grid))

    running: Tensor
    weight: Tensor

    # ---------------------------------------------------------------- reading

    def variance(self, t: Tensor) -> Tensor:
        """Variance of the posterior ``(B,)`` at times ``(B,)``."""
        return self._at(self.variance_at, t)

    def mean(self, a_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Mean of the posterior ``(B, A)``.

        Args:
            a_t: ``(B, A)`` noisy actions.
            t: ``(B,)`` their times.
            eps: ``(B, A)`` the network's noise.
        """
        mu = self.implied_mean(a_t, t, eps)
        if self.mean_estimator == "eps":
            return mu
        return self.action_mean + self._at(self.rho_at, t)[:, None] * (mu - self._at(self.mu_at, t))

    def implied_mean(self, a_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Eq. 18, clipped to the box; arguments as for :meth:`mean`."""
        mu = self.sde.x0_from_eps(a_t, t, eps.to(a_t.dtype))
        return mu if self.bound is None else mu.clamp(-self.bound, self.bound)

    def _at(self, table: Tensor, t: Tensor) -> Tensor:
        """A table ``(G, ...)`` at times ``(B,)``, linear between those of the grid."""
        right = torch.searchsorted(self.time, t.to(self.time.dtype).contiguous()).clamp(1, len(self.time) - 1)
        start, end = self.time[right - 1], self.time[right]
        share = over_rows(((t - start) / (end - start)).clamp(0, 1), table)
        return torch.lerp(table[right - 1].to(share.dtype), table[right].to(share.dtype), share)

    # ---------------------------------------------------------------- estimating

    @torch.no_grad()
    def describe(self, action: Tensor) -> None:
        """Take mean and variance of the dataset's actions ``(N, A)``."""
        exact = action.double()
        self.action_mean.copy_(exact.mean(0))
        self.v_bar.copy_(exact.var(0, unbiased=False).mean())

    @torch.no_grad()
    def fit(
        self,
        eps_model: Callable[[Tensor, Tensor, Tensor], Tensor],
        obs: Tensor,
        action: Tensor,
        draws: Draws,
        *,
        samples: int = 65_536,
    ) -> None:
        """Fill the table by simulation: at each time of the grid, actions of the dataset are noised and predicted.

        Grid times samples rows pass the network: with the defaults and the published network 1 to 2 minutes on one CPU
        core. Every process computes the same table.

        Args:
            eps_model: ``(a_t (B, A), t (1,), obs (B, S)) -> eps``.
            obs: ``(N, S)`` states of the dataset.
            action: ``(N, A)`` its actions.
            draws: Its place in the run seeds the samples.
            samples: Samples for each time, drawn with replacement.
        """
        check_range("posterior samples", samples, 2)
        self.describe(action)
        generator = torch.Generator(action.device).manual_seed(mix_seed(draws.place.seed(), samples))
        columns = [self._columns_at(t, eps_model, obs, action, generator, samples) for t in self.time]
        self._derive(torch.stack(columns))

    def _columns_at(
        self,
        t: Tensor,
        eps_model: Callable[[Tensor, Tensor, Tensor], Tensor],
        obs: Tensor,
        action: Tensor,
        generator: torch.Generator,
        samples: int,
    ) -> Tensor:
        """Means of all columns of the moments over samples at one time."""
        total, t = torch.zeros((), dtype=torch.float64, device=action.device), t[None]
        for start in range(0, samples, CHUNK):
            size = min(CHUNK, samples - start)
            rows = torch.randint(len(action), (size,), generator=generator, device=action.device)
            a_0 = action[rows]
            # the same numbers in every precision
            eps = torch.randn(a_0.shape, generator=generator, device=action.device, dtype=torch.float32).to(a_0.dtype)
            a_t = self.sde.q_sample(a_0, t, eps)
            eps_hat = eps_model(a_t, t, obs[rows]).to(a_t.dtype)
            total = total + self._columns(a_t, t, eps_hat, eps, a_0).sum(0, dtype=torch.float64)
        return total / samples

    @torch.no_grad()
    def track(
        self,
        t: Tensor,
        eps_hat: Tensor,
        eps: Tensor,
        action: Tensor,
        reduce: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        """Add one batch of training to decayed averages, and read the table off these.

        Each sample counts for the time of the grid that is nearest in ``lambda``. :meth:`describe` the dataset first.

        Args:
            t: ``(B,)`` times.
            eps_hat: ``(B, A)`` predicted noise.
            eps: ``(B, A)`` drawn noise.
            action: ``(B, A)`` clean actions.
            reduce: Mean of a tensor over processes.
        """
        lam = self.sde.lambda_(self.time)
        step = lam[1] - lam[0]
        index = ((self.sde.lambda_(t) - lam[0]) / step).round().long().clamp(0, len(lam) - 1)
        columns = self._columns(self.sde.q_sample(action, t, eps), t, eps_hat.to(action.dtype), eps, action)
        columns = torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1)
        sums = torch.zeros(len(lam), columns.shape[1], dtype=columns.dtype, device=columns.device)
        sums = reduce(sums.index_add_(0, index, columns))
        count = sums[:, -1]
        rate = torch.where(count > 0, 1 - self.decay, 0.0)
        means = sums[:, :-1] / count.clamp_min(1e-12)[:, None]
        self.running.lerp_(means.to(self.running.dtype), rate[:, None].to(self.running.dtype))
        self.weight.lerp_(torch.ones_like(self.weight), rate.to(self.weight.dtype))
        self._derive((self.running / self.weight.clamp_min(1e-12)[:, None]).double(), self.weight > 0)

    def _columns(self, a_t: Tensor, t: Tensor, eps_hat: Tensor, eps: Tensor, action: Tensor) -> Tensor:
        """What the moments are means of, ``(B, 5 + 2 A)``."""
        mu = self.implied_mean(a_t, t, eps_hat)
        squares = [eps_hat, eps, action - mu, action, mu]
        return torch.cat([torch.stack([x.square().mean(-1) for x in squares], dim=-1), action, mu], dim=-1)

    def _derive(self, columns: Tensor, seen: Tensor | None = None) -> None:
        """Fill the table from the moments' columns ``(G, 5 + 2 A)``; times not seen yet trust the network."""
        size = len(self.action_mean)
        m = Moments(*columns[:, :5].unbind(1), *columns[:, 5:].split(size, dim=1))
        ratio = self.sde.noise_to_signal(self.time.double())
        v = (m.action_sq - m.action.square().mean(-1)).clamp_min(0)  # of the samples' actions
        w = (m.mu_sq - m.mu.square().mean(-1)).clamp_min(0)  # of their means
        e = (m.error - (m.action - m.mu).square().mean(-1)).clamp_min(0)  # of the difference
        varies = w > 1e-7 * m.mu_sq  # beyond rounding, as one sample alone does not
        mu = m.mu
        if seen is not None:
            varies &= seen
            mu = torch.where(varies[:, None], mu, self.action_mean.to(mu.dtype))
        rho = torch.where(varies, (0.5 * (v + w - e) / w).clamp(0, 1), 1.0)

        calibrated = self.mean_estimator == "calibrated"
        if self.posterior == 2:
            spread = (m.mu - self.action_mean).square().mean(-1) + w
            variance = self.v_bar - (rho.square() * w if calibrated else spread)
        else:
            raw = variance_of_noise(m.predicted, self.time.double(), self.sde)
            # without calibration rho is 1, and this is the error itself but for the samples' mean
            nll = (1 - rho) * v + rho * e - rho * (1 - rho) * w if calibrated else m.error
            variance = {
                "raw": raw,
                "paired": ratio * (m.drawn - m.predicted),
                "nll": nll,
                "mixed": torch.where(ratio < RAW_BELOW, raw, nll),
            }[self.estimator]
        if self.clamp:
            variance = variance.clamp(min=0).minimum(self.v_bar.to(variance.dtype))
        self.variance_at.copy_(non_decreasing(variance) if self.isotonic else variance)
        self.rho_at.copy_(rho)
        self.mu_at.copy_(mu)
        self.fitted.fill_(True)


def non_decreasing(y: Tensor) -> Tensor:
    """The non-decreasing sequence nearest to ``y (G,)`` in squares (isotonic regression).

    Its entry i is the largest over starts j <= i of the smallest over ends k >= i of the mean of y from j to k. A
    running maximum would keep every error upwards.
    """
    size = len(y)
    index = torch.arange(size, device=y.device)
    total = torch.cat([y.new_zeros(1), y.cumsum(0)])
    length = index[None, :] - index[:, None] + 1  # (start, end)
    mean = (total[None, 1:] - total[:-1, None]) / length.clamp_min(1)
    mean = mean.masked_fill(length < 1, float("inf"))
    least = mean.flip(1).cummin(dim=1).values.flip(1)  # over ends from i on, (start, i)
    return least.masked_fill(index[:, None] > index[None, :], float("-inf")).amax(0)
