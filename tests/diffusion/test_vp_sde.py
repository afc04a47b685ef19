"""The schedule against its printed values, in double and in single precision."""

from __future__ import annotations

import math

import pytest
import torch
from closed_forms import F64, GAUSSIAN, SDE, gauss, printed, time

from lit_diffrl.diffusion.vp_sde import T_MIN, VPSDE
from lit_diffrl.errors import ConfigError

# t, alpha, sigma, sigma^2 / alpha^2, lambda
TABLE = [
    (0.001, 0.9999450265, 0.0104854163, 1.099560e-04, 4.557715),
    (0.01, 0.9990029973, 0.0446431552, 1.996991e-03, 3.108057),
    (0.05, 0.9851735110, 0.1715609314, 3.032574e-02, 1.747879),
    (0.1, 0.9467217988, 0.3220525355, 1.157201e-01, 1.078291),
    (0.2, 0.8113952356, 0.5844978799, 5.189207e-01, 0.328002),
    (0.3, 0.6295500003, 0.7769599713, 1.523130e00, -0.210384),
    (0.5, 0.2811828808, 0.9596542021, 1.164801e01, -1.227568),
    (0.8, 0.0397955572, 0.9992078431, 6.304382e02, -3.223208),
    (1.0, 0.0065715865, 0.9999784069, 2.315479e04, -5.024978),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"t={row[0]}")
def test_values_are_the_printed_ones(row: tuple[float, ...]) -> None:
    t, alpha, sigma, ratio, lam = row
    assert SDE.alpha(t) == pytest.approx(alpha, abs=6e-11)
    assert SDE.sigma(t) == pytest.approx(sigma, abs=6e-11)
    assert SDE.noise_to_signal(t) == pytest.approx(ratio, rel=5e-7)
    assert SDE.lambda_(t) == pytest.approx(lam, abs=6e-7)
    assert SDE.alpha(t) ** 2 + SDE.sigma(t) ** 2 == pytest.approx(1, abs=1e-15)


def test_what_the_first_time_leaves_of_a_guided_gaussian_is_the_printed_law() -> None:
    """Section 9.6: of N(0.2, 0.25), tilted by Q = 1.5 a to a mean of 0.2 + 1.5 * 0.25."""
    alpha, sigma = SDE.alpha(T_MIN), SDE.sigma(T_MIN)
    assert (alpha * 0.575, math.hypot(0.5 * alpha, sigma)) == (printed("0.574968"), printed("0.500082"))


def test_lambda_and_its_inverse_cancel() -> None:
    t = torch.linspace(T_MIN, 1, 200, dtype=torch.float64)
    assert (SDE.inverse_lambda(SDE.lambda_(t)) - t).abs().max() < 1e-12
    assert max(abs(SDE.inverse_lambda(SDE.lambda_(x)) - x) for x in t.tolist()) < 1e-12
    other = VPSDE(0.5, 3.0)
    assert other.inverse_lambda(other.lambda_(0.37)) == pytest.approx(0.37, abs=1e-12)


def test_drift_and_diffusion_are_derivatives_of_the_schedule() -> None:
    assert SDE.f(0.5) == pytest.approx(-5.025) and SDE.g2(0.5) == pytest.approx(10.05)
    t = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(SDE.log_alpha(t), t)
    assert SDE.f(0.37) == pytest.approx(slope.item(), rel=1e-12)
    (variance,) = torch.autograd.grad(SDE.sigma(t) ** 2, t)
    assert SDE.g2(0.37) == pytest.approx((variance - 2 * SDE.f(t) * SDE.sigma(t) ** 2).item(), rel=1e-12)


@pytest.mark.parametrize("name", ["alpha", "sigma", "lambda_", "noise_to_signal"])
def test_single_precision_holds_from_the_first_time_on(name: str) -> None:
    t = torch.tensor([row[0] for row in TABLE], dtype=torch.float32)
    exact = torch.tensor([getattr(SDE, name)(x) for x in t.double().tolist()], dtype=torch.float64)
    torch.testing.assert_close(getattr(SDE, name)(t).double(), exact, rtol=3e-6, atol=1e-6)


def test_noising_takes_one_time_for_each_row_or_one_for_all() -> None:
    x0, eps, t = torch.randn(5, 4, 3), torch.randn(5, 4, 3), torch.rand(5) * 0.9 + 0.05
    x_t = SDE.q_sample(x0, t, eps)
    for i in range(5):
        torch.testing.assert_close(x_t[i], SDE.q_sample(x0[i : i + 1], t[i : i + 1], eps[i : i + 1])[0])
    torch.testing.assert_close(SDE.q_sample(x0, t[:1], eps), SDE.q_sample(x0, t[:1].expand(5), eps))
    torch.testing.assert_close(SDE.x0_from_eps(x_t, t, eps), x0, rtol=1e-3, atol=1e-3)
    half = SDE.q_sample(x0.half(), t, eps.half())  # schedules stay in float32
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), x_t, rtol=2e-3, atol=2e-3)


def test_noise_follows_from_whatever_is_predicted_and_errors_by_their_scale() -> None:
    """``alpha eps - sigma x_0`` is what v means; a squared error of it is ``error_scale`` times that of the noise."""
    x0, eps, wrong = torch.randn(3, 6, 4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1e-3, 0.05, 0.2, 0.5, 0.8, 1.0], dtype=F64)
    x_t, (alpha, sigma) = SDE.q_sample(x0, t, eps), (f(t)[:, None, None] for f in (SDE.alpha, SDE.sigma))
    for predicted, out in {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}.items():
        torch.testing.assert_close(SDE.eps_from(predicted, out, x_t, t), eps)
        error = (SDE.eps_from(predicted, out + wrong, x_t, t) - eps).square()
        torch.testing.assert_close(SDE.error_scale(predicted, t)[:, None, None] * error, wrong.square())
    # ... and the clean data of v have no factor on an error of it, nor has the noise
    found = SDE.x0_from_eps(x_t, t, SDE.eps_from("v", alpha * eps - sigma * x0 + wrong, x_t, t))
    torch.testing.assert_close(found, x0 - sigma * wrong, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("t", [0.05, 0.3, 0.8])
def test_exact_noise_of_gaussian_data_has_the_known_size_and_leaves_the_least_error(t: float) -> None:
    """The second of the oracles: ``E eps^2 = sigma^2 / (alpha^2 v + sigma^2)``, and no affine change does better."""
    (a0, wa), (e, we) = GAUSSIAN.nodes(40), gauss(40)
    weight = (wa[:, None] * we).flatten()
    x_t = (SDE.alpha(t) * a0[:, None] + SDE.sigma(t) * e).flatten()[:, None]
    eps, found = e.expand(len(a0), -1).flatten(), GAUSSIAN.eps(x_t, time(t))[:, 0]
    total = SDE.alpha(t) ** 2 * 0.25 + SDE.sigma(t) ** 2
    assert (weight * found**2).sum().item() == pytest.approx(SDE.sigma(t) ** 2 / total, abs=1e-12)
    for feature in (torch.ones_like(eps), x_t[:, 0], x_t[:, 0] ** 3):  # the residual is orthogonal to functions of x_t
        assert (weight * (eps - found) * feature).sum().item() == pytest.approx(0, abs=1e-11)


@pytest.mark.parametrize("rates", [(-0.1, 20.0), (0.1, 0.1), (0.1, math.inf)])
def test_rates_that_make_no_schedule_are_refused(rates: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="beta_m"):
        VPSDE(*rates)
