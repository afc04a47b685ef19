"""The equations of QGPO and AEPO against closed forms and quadrature, with the specification's digits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from closed_forms import (
    COV_2,
    EYE_2,
    F64,
    GAUSSIAN,
    MEAN_2,
    SDE,
    TWO_MODES,
    Mixture,
    column,
    derivative,
    eps_2,
    gain_2,
    gauss,
    posterior_2,
    printed,
    time,
)
from torch import Tensor

from lit_diffrl.diffusion.energy_guidance import guide
from lit_diffrl.diffusion.vp_sde import VPSDE
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import covariance as co
from lit_diffrl.methods import energy as en
from lit_diffrl.methods import expansion as ex
from lit_diffrl.methods.losses import expectile_loss

A_T = column(0.5)


def number(x: Tensor) -> float:
    return float(x.squeeze())


def by_quadrature(x: Tensor, t: float, beta: float, c: float, h: float, data: Mixture, shift: float = 0.0) -> float:
    """``log E[exp(beta Q) | a_t]`` from behaviour times likelihood on a fine grid."""
    a = torch.linspace(-6, 6, 400_001, dtype=F64)
    parts = zip(data.weights, data.means, data.variances)
    prior = sum(w * torch.exp(-0.5 * (a - m) ** 2 / v) / math.sqrt(v) for w, m, v in parts)
    log_w = torch.as_tensor(prior).clamp_min(1e-300).log() - 0.5 * ((number(x) - SDE.alpha(t) * a) / SDE.sigma(t)) ** 2
    q = shift + c * a + 0.5 * h * a**2
    return float((log_w + beta * q).logsumexp(0) - log_w.logsumexp(0))


# ---------------------------------------------------------------- linear Q: the closed form is exact

# t, mu, var, then for beta 1 and 3: energy and slope; energies from 400,000 samples of the posterior at beta 1 and 3
LINEAR = [
    (0.05, 0.47425667, 0.02704509, 1.44181073, 1.35786180, 4.50798652, 4.07358541, 1.4419, 4.5091),
    (0.1, 0.42430971, 0.07910427, 1.42545687, 1.08307890, 4.81032440, 3.24923670, 1.4257, 4.8062),
    (0.3, 0.28378098, 0.21475159, 1.36726700, 0.33593912, 5.55137422, 1.00781736, 1.3693, 5.5145),
    (0.5, 0.23316105, 0.24474702, 1.32508197, 0.11209029, 5.62728831, 0.33627088, 1.3240, 5.6074),
    (0.8, 0.20490108, 0.24990090, 1.28849014, 0.01494108, 5.55230150, 0.04482324, 1.2871, 5.5500),
    (1.0, 0.20081932, 0.24999730, 1.28247594, 0.00246442, 5.53490959, 0.00739327, 1.2821, 5.5422),
]


@pytest.mark.parametrize("row", LINEAR, ids=lambda row: f"t={row[0]}")
@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_energy_of_a_linear_value_is_exact_wherever_it_is_expanded(row: tuple[float, ...], beta: float) -> None:
    t, mu, var, *known = row
    value, slope, sampled = (*known[:2], known[4]) if beta == 1 else (*known[2:4], known[5])
    assert number(GAUSSIAN.mean(A_T, t)) == pytest.approx(mu, abs=6e-9)
    assert number(GAUSSIAN.variance(A_T, t)) == pytest.approx(var, abs=6e-9)

    def energy(x: Tensor, a_bar: Tensor) -> Tensor:
        q, g = (0.7 + 1.5 * a_bar)[:, 0], torch.full_like(x, 1.5)
        return en.analytic_energy(q, g, GAUSSIAN.mean(x, t), a_bar, GAUSSIAN.variance(x, t)[:, 0], beta)

    found = [number(energy(A_T, a)) for a in (column(0.0), GAUSSIAN.mean(A_T, t), column(-0.9), column(0.37))]
    assert found[0] == pytest.approx(value, abs=6e-9)
    assert max(found) - min(found) < 1e-12
    assert found[0] == pytest.approx(by_quadrature(A_T, t, beta, 1.5, 0.0, GAUSSIAN, shift=0.7), abs=1e-8)
    assert number(derivative(lambda x: energy(x, column(0.37)), A_T)) == pytest.approx(slope, abs=6e-9)

    # the mean of exponentials over samples, whose log scatters as that of a log-normal mean does
    samples, share = 400_000, var * (1.5 * beta) ** 2
    spread = math.sqrt(math.expm1(share) / samples)
    z = torch.randn(samples, generator=torch.Generator().manual_seed(0), dtype=F64)
    mean_of_q = 0.7 + 1.5 * mu  # times beta the energy of MSE, and of DPS
    log_mean = number((math.sqrt(share) * z).logsumexp(0)) - math.log(samples) + beta * mean_of_q
    assert log_mean == pytest.approx(found[0], abs=4 * spread)
    assert sampled == pytest.approx(found[0], abs=4 * spread + 5e-5)
    assert beta * mean_of_q + 0.5 * share == pytest.approx(value, abs=6e-8)


# t, mu, energy with the full covariance, isotropic energy, variance, gradient, g^T Sigma g at g = [1, -2]
TWO = [
    (0.05, [0.37135855, -0.19864814], 1.71332733, 1.76293257, 0.02256229, [1.19907178, -2.34625716], 0.08800884),
    (0.1, [0.32056201, -0.21161834], 1.79554541, 2.05829394, 0.05706966, [0.59216041, -1.10937295], 0.15397402),
    (0.3, [0.17292575, -0.27231901], 1.84377370, 2.88559914, 0.14504716, [0.0988147, -0.16367642], 0.20432308),
    (0.5, [0.12426638, -0.29209285], 1.83538186, 3.07896760, 0.16620635, [0.03030035, -0.04873523], 0.20923886),
]
X_2, G_2, ZERO_2 = torch.tensor([[[0.4, -0.2]], [[1.0, -2.0]], [[0.0, 0.0]]], dtype=F64)


@pytest.mark.parametrize("row", TWO, ids=lambda row: f"t={row[0]}")
def test_energy_of_two_actions_needs_the_full_covariance_and_its_gradient_does_not(row: tuple[Any, ...]) -> None:
    t, mu, full, isotropic, variance, gradient, quadratic = row

    def energy(x: Tensor, directions: bool) -> Tensor:
        mean, cov = posterior_2(x, t)
        q = torch.zeros(1, dtype=F64)
        if directions:
            return en.linear_energy(q, G_2, mean, ZERO_2, torch.einsum("bi,bij,bj->b", G_2, cov, G_2), 2.0)
        trace = cov.diagonal(dim1=-2, dim2=-1).mean(-1)
        return en.analytic_energy(q, G_2, mean, ZERO_2, trace, 2.0)

    mean, cov = posterior_2(X_2, t)
    assert mean[0].tolist() == pytest.approx(mu, abs=6e-9)
    assert number(cov.diagonal(dim1=-2, dim2=-1).mean()) == pytest.approx(variance, abs=6e-9)
    assert number(energy(X_2, True)) == pytest.approx(full, abs=6e-9)
    assert number(energy(X_2, False)) == pytest.approx(isotropic, abs=6e-9)
    for directions in (True, False):
        slope = derivative(lambda x, d=directions: energy(x, d), X_2)  # type: ignore[misc]
        assert slope[0].tolist() == pytest.approx(gradient, abs=6e-9)

    # one derivative of the noise gives the covariance along g, and the trace gives the variance (second-order Tweedie)
    at = time(t)
    assert number(co.posterior_spread(eps_2, X_2, at, G_2, SDE)) == pytest.approx(quadratic, abs=6e-9)
    exact = torch.einsum("bi,bij,bj->b", G_2, cov, G_2)
    torch.testing.assert_close(co.posterior_spread(eps_2, X_2, at, G_2, SDE), exact, rtol=1e-12, atol=1e-13)
    assert number(co.posterior_variance(eps_2, X_2, at, SDE)) == pytest.approx(variance, abs=6e-9)
    # ... and one in every direction all of it, which bounds on the mean over directions leave as it is
    for v_bar in (None, 0.17):
        assert cov[0].diagonal().max() > (0.17 if t > 0.2 else 0)
        torch.testing.assert_close(co.posterior_covariance(eps_2, X_2, at, SDE, v_bar), cov, rtol=1e-12, atol=1e-13)


def test_random_signs_find_the_trace_on_average() -> None:
    at = time(0.1)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=F64)[:, None]  # all there are
    exact = co.posterior_variance(eps_2, X_2, at, SDE)
    torch.testing.assert_close(co.posterior_variance(eps_2, X_2, at, SDE, signs), exact)
    single = torch.cat([co.posterior_variance(eps_2, X_2, at, SDE, v[None]) for v in signs])
    assert single.std() > 0.01  # one alone does not


def test_covariances_are_held_in_their_bounds() -> None:
    wrong = guide(GAUSSIAN.eps, lambda x, t: 40 * x, SDE, 1.0)  # a slope far too small, and one too large
    for model, bound in ((wrong, 0.25 * 4), (lambda x, t: 40 * x, 0.0)):
        spread = co.posterior_spread(model, column(0.1, 0.5), time(0.3).expand(2), column(2.0, 2.0), SDE, 0.25)
        assert spread.tolist() == pytest.approx([bound] * 2)
        variance = co.posterior_variance(model, column(0.1, 0.5), time(0.3).expand(2), SDE, v_bar=0.25)
        assert variance.tolist() == pytest.approx([bound / 4] * 2)
        matrix = co.posterior_covariance(model, column(0.1, 0.5), time(0.3).expand(2), SDE, 0.25)
        assert matrix.flatten().tolist() == pytest.approx([bound / 4] * 2)

    def bent(x: Tensor, t: Tensor) -> Tensor:  # with a derivative that is not symmetric, and turns one direction round
        return x @ torch.tensor([[40.0, 3.0], [0.0, -5.0]], dtype=F64)

    x, at = torch.zeros(1, 2, dtype=F64), time(0.3)
    free = co.posterior_covariance(bent, x, at, SDE)
    torch.testing.assert_close(free, free.mT)
    assert torch.linalg.eigvalsh(free).min() < 0
    spread = torch.stack([co.posterior_spread(bent, x, at, g[None], SDE) for g in torch.eye(2, dtype=F64)])
    torch.testing.assert_close(free.diagonal(dim1=-2, dim2=-1)[0], spread[:, 0])
    held = co.posterior_covariance(bent, x, at, SDE, 0.25)
    variances = torch.linalg.eigvalsh(held)[0].tolist()
    assert variances == pytest.approx([0, 0.5]), "no variance below 0, and their mean is the data's"
    torch.testing.assert_close(held, held.mT)


# ---------------------------------------------------------------- quadratic Q: where AEPO errs

# h, beta, t; energies exact, at mu, regressed, at the data's mean; slopes exact, at mu, DPS, at the data's mean
QUADRATIC = [
    (-1, 1, 0.05, 0.352093, 0.365535, 0.379423, 0.408060, 0.463392, 0.463053, 0.475925, 0.724193),
    (-1, 1, 0.1, 0.308372, 0.347399, 0.390080, 0.384761, 0.385207, 0.382797, 0.415679, 0.577642),
    (-1, 1, 0.3, 0.191588, 0.298596, 0.429031, 0.315745, 0.132047, 0.125957, 0.160404, 0.179168),
    (-1, 1, 0.5, 0.154324, 0.277940, 0.430264, 0.284848, 0.046036, 0.043279, 0.057303, 0.059781),
    (-1, 1, 1.0, 0.132953, 0.260490, 0.416738, 0.260655, 0.001050, 0.000985, 0.001313, 0.001314),
    (-1, 3, 0.05, 1.077500, 1.119030, 1.162889, 1.276106, 1.320624, 1.311931, 1.427774, 2.172579),
    (-1, 3, 0.1, 0.991748, 1.120846, 1.267661, 1.306164, 1.007858, 0.951098, 1.247036, 1.732926),
    (-1, 3, 0.2, 0.855235, 1.172734, 1.553904, 1.350690, 0.530502, 0.394593, 0.799016, 0.961695),
    (-1, 3, 0.3, 0.783391, 1.226270, 1.755930, 1.359559, 0.292663, 0.171189, 0.481212, 0.537503),
    (-1, 3, 0.5, 0.716099, 1.265584, 1.902259, 1.324458, 0.099127, 0.045687, 0.171910, 0.179344),
    (-1, 3, 1.0, 0.672744, 1.260484, 1.916723, 1.261959, 0.002251, 0.000985, 0.003939, 0.003943),
    (-4, 1, 0.1, -0.058618, 0.083460, 0.291729, 0.166444, -0.382434, -0.344145, -0.503443, 0.144411),
    (-4, 1, 0.3, -0.186249, 0.124678, 0.923127, 0.141051, -0.016279, -0.004267, -0.030262, 0.044792),
    (-4, 3, 0.05, 0.006655, 0.171183, 0.386117, 0.529422, -1.839185, -1.645470, -2.436077, 0.543145),
    (-4, 3, 0.1, -0.052247, 0.365748, 1.290913, 0.508825, -0.774825, -0.076647, -1.510329, 0.433232),
    (-4, 3, 0.2, -0.192833, 0.419759, 3.481579, 0.471565, -0.135651, 0.420388, -0.410292, 0.240424),
    (-4, 3, 0.3, -0.264179, 0.385798, 4.994821, 0.448924, -0.025381, 0.143173, -0.090787, 0.134376),
]


def parabola(a: Tensor, h: float) -> tuple[Tensor, Tensor]:
    """Value and gradient of ``Q = a + h a^2 / 2`` at one action."""
    return (a + 0.5 * h * a**2)[:, 0], 1 + h * a


@pytest.mark.parametrize("row", QUADRATIC, ids=lambda row: f"h={row[0]},beta={row[1]},t={row[2]}")
def test_energies_of_a_quadratic_value_are_the_tabulated_ones(row: tuple[float, ...]) -> None:
    h, beta, t, exact, at_mu, regressed, fixed, d_exact, d_mu, d_dps, d_fixed = row

    def mean(x: Tensor) -> Tensor:
        return GAUSSIAN.mean(x, t)

    var = GAUSSIAN.variance(A_T, t)[:, 0]

    def analytic(x: Tensor, a_bar: Tensor) -> Tensor:
        q, g = parabola(a_bar, h)
        return en.analytic_energy(q, g, mean(x), a_bar, var, beta)

    def second(x: Tensor, a_bar: Tensor) -> Tensor:
        q, g = parabola(a_bar, h)
        return en.second_order_energy(q, g, torch.full((1, 1, 1), h, dtype=F64), mean(x), a_bar, var, beta)

    def cheap(x: Tensor) -> Tensor:
        q, g = parabola(mean(x), h)
        return en.curved_energy(q, g, mean(x), mean(x), var, h * g[:, 0] ** 2, beta)

    def exactly(x: Tensor) -> Tensor:
        return GAUSSIAN.energy(x, t, beta, 1.0, h)

    m = column(0.2)
    digits = {"abs": 6e-7}
    assert number(exactly(A_T)) == pytest.approx(exact, **digits)
    assert exact == pytest.approx(by_quadrature(A_T, t, beta, 1.0, h, GAUSSIAN), abs=6e-7)
    assert number(analytic(A_T, mean(A_T))) == pytest.approx(at_mu, **digits)
    assert number(analytic(A_T, m)) == pytest.approx(fixed, **digits)
    assert number(derivative(exactly, A_T)) == pytest.approx(d_exact, **digits)
    assert number(derivative(lambda x: analytic(x, mean(x)), A_T)) == pytest.approx(d_mu, **digits)
    assert number(derivative(lambda x: beta * parabola(mean(x), h)[0], A_T)) == pytest.approx(d_dps, **digits)
    assert number(derivative(lambda x: analytic(x, m), A_T)) == pytest.approx(d_fixed, **digits)

    # the second order is exact, wherever it is expanded; along the gradient alone, in one dimension at mu
    for a_bar in (mean(A_T), m, column(-0.7)):
        assert number(second(A_T, a_bar)) == pytest.approx(number(exactly(A_T)), abs=1e-10)
    assert number(cheap(A_T)) == pytest.approx(number(exactly(A_T)), abs=1e-10)
    assert number(derivative(cheap, A_T)) == pytest.approx(number(derivative(exactly, A_T)), abs=1e-10)

    # regressed on a_t, the paper's target becomes its mean over the posterior of a_0 (here by quadrature)
    z, w = gauss(20)
    a_0 = mean(A_T) + var.sqrt() * z[:, None]
    q, g = parabola(a_0, h)
    target = en.analytic_energy(q, g, mean(A_T).expand_as(a_0), a_0, var, beta)
    assert number((w * target).sum()) == pytest.approx(regressed, **digits)
    # ... and so does the mean over samples, expanded after the paper's step (whose size matters only in the 6th digit)
    generator = torch.Generator().manual_seed(0)
    a_0 = mean(A_T) + var.sqrt() * torch.randn(100_000, 1, generator=generator, dtype=F64)
    _, g = parabola(a_0, h)
    a_bar = en.expansion_point(a_0, g, 0.001)
    target = en.analytic_energy(parabola(a_bar, h)[0], g, mean(A_T).expand_as(a_0), a_bar, var, beta)
    error = target.std().item() / math.sqrt(len(target))
    assert target.mean().item() == pytest.approx(regressed, abs=3 * error + 2e-5 * abs(h) ** 3 * beta)


HESSIAN_2 = torch.tensor([[[-2.0, 0.5], [0.5, -1.0]]], dtype=F64)

# t; energy exact, AEPO at mu; gradients exact, second order isotropic, AEPO, DPS
TWO_QUADRATIC = [
    (0.05, 1.1794715, 1.26718, [-0.16703, -1.99474], [-0.20640, -1.98161], [-0.21507, -1.97752], [-0.14779, -2.06399]),
    (0.1, 1.1975122, 1.47932, [-0.23898, -1.04019], [-0.35918, -1.02722], [-0.39770, -1.02116], [-0.27059, -1.11331]),
    (0.3, 1.1729076, 2.11331, [-0.03374, -0.16449], [-0.11843, -0.17190], [-0.19407, -0.18522], [-0.05156, -0.18569]),
    (0.5, 1.1534938, 2.28661, [-0.00523, -0.04763], [-0.03523, -0.05066], [-0.06973, -0.05812], [-0.00746, -0.05301]),
]


@pytest.mark.parametrize("row", TWO_QUADRATIC, ids=lambda row: f"t={row[0]}")
def test_energies_of_two_actions_with_a_quadratic_value_are_the_tabulated_ones(row: tuple[Any, ...]) -> None:
    t, exact, at_mu, d_exact, d_isotropic, d_aepo, d_dps = row
    beta = 2.0

    def q(a: Tensor) -> Tensor:
        return (a * G_2).sum(-1) + 0.5 * torch.einsum("bi,bij,bj->b", a, HESSIAN_2.expand(len(a), 2, 2), a)

    def slope(a: Tensor) -> Tensor:
        return G_2 + a @ HESSIAN_2[0]

    def energy(x: Tensor, form: str) -> Tensor:
        mu, cov = posterior_2(x, t)
        trace = cov.diagonal(dim1=-2, dim2=-1).mean(-1)
        if form == "dps":
            return beta * q(mu)
        if form == "aepo":
            return en.analytic_energy(q(mu), slope(mu), mu, mu, trace, beta)
        return en.second_order_energy(q(mu), slope(mu), HESSIAN_2, mu, mu, cov if form == "full" else trace, beta)

    assert number(energy(X_2, "full")) == pytest.approx(exact, abs=6e-8)
    assert number(energy(X_2, "aepo")) == pytest.approx(at_mu, abs=6e-6)
    for form, known in {"full": d_exact, "isotropic": d_isotropic, "aepo": d_aepo, "dps": d_dps}.items():
        found = derivative(lambda x, f=form: energy(x, f), X_2)  # type: ignore[misc]
        assert found[0].tolist() == pytest.approx(known, abs=6e-6), form

    with torch.autocast("cpu", dtype=torch.bfloat16):  # whose 16 bits must not reach it
        assert number(energy(X_2, "full")) == pytest.approx(exact, abs=6e-8)
        single = [x.float() for x in (q(X_2), slope(X_2), HESSIAN_2, X_2, X_2, posterior_2(X_2, t)[1])]
        assert en.second_order_energy(*single, beta).dtype == torch.float32
        held = co.posterior_covariance(lambda x, t: 0.5 * x, X_2.float(), time(t).float(), SDE, 0.25)
        assert held.dtype == torch.float32

    # the network's noise alone is enough for it
    mu, _ = posterior_2(X_2, t)
    of_noise = co.posterior_covariance(eps_2, X_2, time(t), SDE)
    found = number(en.second_order_energy(q(mu), slope(mu), HESSIAN_2, mu, mu, of_noise, beta))
    assert found == pytest.approx(exact, abs=6e-8)

    # expanded elsewhere, the full form is the same
    a_bar = torch.tensor([[0.9, 0.3]], dtype=F64)
    mu, cov = posterior_2(X_2, t)
    elsewhere = en.second_order_energy(q(a_bar), slope(a_bar), HESSIAN_2, mu, a_bar, cov, beta)
    assert number(elsewhere) == pytest.approx(exact, abs=6e-8)

    # and the exact gradient leads to the tilted law: covariance (Sigma^-1 - beta H)^-1
    tilted = torch.linalg.inv(torch.linalg.inv(COV_2) - beta * HESSIAN_2[0])
    mean = tilted @ (torch.linalg.inv(COV_2) @ MEAN_2 + beta * G_2[0])
    assert mean.tolist() == pytest.approx([0.09334946, -0.45272068], abs=6e-9)
    assert tilted.flatten().tolist() == pytest.approx([0.133011, 0.054414, 0.054414, 0.067715], abs=6e-7)
    alpha, sigma = SDE.alpha(t), SDE.sigma(t)
    total, total_0 = alpha**2 * tilted + sigma**2 * EYE_2, alpha**2 * COV_2 + sigma**2 * EYE_2
    score = -torch.linalg.solve(total, X_2[0] - alpha * mean) + torch.linalg.solve(total_0, X_2[0] - alpha * MEAN_2)
    assert derivative(lambda x: energy(x, "full"), X_2)[0].tolist() == pytest.approx(score.tolist(), abs=1e-10)
    assert gain_2(t).shape == (2, 2)


@pytest.mark.parametrize("curvature", [0.5, 4.0, 1e6])
def test_curvature_beyond_the_limit_is_held(curvature: float) -> None:
    """From ``beta h var = 1`` on the expectation is infinite."""
    one, var = torch.ones(1, 1, dtype=F64), torch.full((1,), 0.25, dtype=F64)
    q = torch.zeros(1, dtype=F64)
    held = en.second_order_energy(q, one, curvature * one[None], one, one, var, 1.0)
    cheap = en.curved_energy(q, one, one, one, var, curvature * one[:, 0], 1.0)
    torch.testing.assert_close(held, cheap)
    rest = 1 - min(curvature * 0.25, 0.9)
    assert number(held) == pytest.approx(0.5 * 0.25 / rest - 0.5 * math.log(rest))


def test_second_order_needs_no_variance_in_every_direction_nor_distinct_curvatures() -> None:
    """Along a direction without variance nothing is gained; slopes are finite where Q is flat or held."""
    g, zero = torch.tensor([[1.0, -2.0]], dtype=F64), torch.zeros(1, 2, dtype=F64)
    q, line = torch.zeros(1, dtype=F64), torch.diag(torch.tensor([0.25, 0.0], dtype=F64))[None]
    found = en.second_order_energy(q, g, HESSIAN_2, zero, zero, line, 2.0)
    rest = 1 - 2.0 * 0.25 * -2.0
    assert number(found) == pytest.approx(0.5 * 4 * 0.25 / rest - 0.5 * math.log(rest))
    for curvature in (0.0, 1.0, 50.0):  # flat, alike in both directions, and beyond the limit
        hessian = (curvature * EYE_2[None]).requires_grad_()
        energy = en.second_order_energy(q, g, hessian, zero, zero, torch.full((1,), 0.25, dtype=F64), 2.0)
        (slope,) = torch.autograd.grad(energy.sum(), hessian)
        held = curvature * 0.5 > 0.9
        rest = 1 - min(curvature * 0.5, 0.9)
        known = 0.5 * (0.5 * g.mT @ g) / rest**2 + 0.5 * 0.5 * EYE_2 / rest
        torch.testing.assert_close(slope[0], torch.zeros(2, 2, dtype=F64) if held else known)


def test_derivatives_of_q_can_be_derived_again() -> None:
    """As functions of the action their own derivatives are those of the formulas."""
    a = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def q(a: Tensor) -> Tensor:
        return a[:, 0] ** 3 + a[:, 0] * a[:, 1] ** 2

    x, y = a.unbind(1)
    g_x, g_y = 3 * x**2 + y**2, 2 * x * y
    bent = 6 * x * g_x**2 + 4 * y * g_x * g_y + 2 * x * g_y**2
    known = [g_x.square() + g_y.square(), bent, 8 * x + 4 * y]
    _, grad = ex.gradient_of(q, a, graph=True)
    _, _, along = ex.curvature_of(q, a, graph=True)
    _, _, hessian = ex.hessian_of(q, a, graph=True)
    for found, formula in zip((grad.square().sum(-1), along, hessian.sum((-2, -1))), known, strict=True):
        torch.testing.assert_close(found, formula)
        torch.testing.assert_close(*(torch.autograd.grad(f.sum(), a, retain_graph=True)[0] for f in (found, formula)))


def test_a_critic_without_curvature_gives_the_first_order() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)).double()
    a, mu, var = torch.randn(5, 2, dtype=F64), torch.randn(5, 2, dtype=F64), torch.rand(5, dtype=F64)
    q, g, h = ex.hessian_of(lambda a: net(a)[:, 0], a)
    assert torch.equal(h, torch.zeros(5, 2, 2, dtype=F64))
    torch.testing.assert_close(
        en.second_order_energy(q, g, h, mu, a, var, 3.0), en.analytic_energy(q, g, mu, a, var, 3.0)
    )


def test_derivatives_of_a_critic_are_exact_and_constants() -> None:
    a = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))

    def q(a: Tensor) -> Tensor:
        return a[:, 0] ** 3 + a[:, 0] * a[:, 1] ** 2

    value, g, h = ex.hessian_of(q, a)
    x, y = a.unbind(1)
    torch.testing.assert_close(g, torch.stack([3 * x**2 + y**2, 2 * x * y], dim=1))
    torch.testing.assert_close(h, torch.stack([6 * x, 2 * y, 2 * y, 2 * x], dim=1).view(4, 2, 2))
    value_2, g_2, curved = ex.curvature_of(q, a)
    assert torch.equal(value, value_2) and torch.equal(g, g_2)
    torch.testing.assert_close(curved, torch.einsum("bi,bij,bj->b", g, h, g))
    assert not any(x.requires_grad for x in (value, g, h, curved))


def test_the_step_of_the_expansion_point_hardly_matters() -> None:
    """Target less that without a step is ``beta eta^2 g^T H g / 2``, with the gradient of the data's action reused."""
    a_0, mu, var = column(0.4), column(0.3), torch.full((1,), 0.1, dtype=F64)

    def target(eta: float) -> float:
        _, g = parabola(a_0, -1)
        a_bar = en.expansion_point(a_0, g, eta)
        return number(en.analytic_energy(parabola(a_bar, -1)[0], g, mu, a_bar, var, 3.0))

    assert target(0.1) - target(0.0) == pytest.approx(-0.0054, abs=1e-12)
    assert target(0.001) - target(0.0) == pytest.approx(-5.4e-7, abs=1e-12)
    g = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=F64)
    step = en.expansion_point(torch.zeros_like(g), g, 0.1, normalized=True)
    assert step.flatten().tolist() == pytest.approx([0.06, 0.08, 0.0, 0.0])


def test_a_baseline_of_the_state_and_a_scale_leave_the_learned_guidance() -> None:
    """Energies of three states, fitted by a line with a level for each, as they are and as ``(E - beta V) / c``."""
    generator = torch.Generator().manual_seed(0)
    t, beta, c = 0.2, 3.0, 7.0
    state = torch.randint(3, (60,), generator=generator)
    x, v = torch.randn(60, 1, generator=generator, dtype=F64), torch.tensor([-5.0, 40.0, 200.0], dtype=F64)[state]
    mu, var = GAUSSIAN.mean(x, t), GAUSSIAN.variance(x, t)[:, 0]
    g = torch.full_like(x, 1.5)
    energy = en.analytic_energy(v + 1.5 * mu[:, 0], g, mu, mu, var, beta)

    def fitted_slope(target: Tensor) -> Tensor:
        features = torch.cat([x, torch.nn.functional.one_hot(state, 3).to(F64)], dim=1)
        return torch.linalg.lstsq(features, target[:, None]).solution[0, 0]

    slope = fitted_slope(energy)
    torch.testing.assert_close(c * fitted_slope((energy - beta * v) / c), slope)
    exact = derivative(lambda x: GAUSSIAN.energy(x, t, beta, 1.5), x)
    torch.testing.assert_close(exact, torch.full_like(x, slope.item()))


def test_the_two_cumulant_target_becomes_the_mean_value_and_its_spread() -> None:
    t, beta, h = 0.3, 1.5, -1.0
    mu, var = GAUSSIAN.mean(A_T, t), GAUSSIAN.variance(A_T, t)[:, 0]
    z, w = gauss(20)
    q, g = parabola(mu + var.sqrt() * z[:, None], h)
    found = (w * en.two_cumulant_energy(q, g, var, beta)).sum()
    mean_q = parabola(mu, h)[0] + 0.5 * h * var
    mean_square = (1 + h * mu[:, 0]) ** 2 + h**2 * var
    assert number(found) == pytest.approx(number(beta * mean_q + 0.5 * beta**2 * var * mean_square), abs=1e-10)


# ---------------------------------------------------------------- the exact energy

# t, a_t: energy, then slopes of the exact energy, of AEPO, and of AEPO with the variance of the action
MODES = [
    (0.1, -0.2, 0.664031, -2.904822, -3.868361, -3.345417),
    (0.1, 0.1, -0.375137, -2.943208, -1.830062, -2.821666),
    (0.3, -0.2, 0.380897, -0.618635, -0.605184, -0.819587),
    (0.3, 0.1, 0.192929, -0.630442, -0.530238, -0.788259),
    (0.5, -0.2, 0.330859, -0.188659, -0.175384, -0.247910),
]


@pytest.mark.parametrize("row", MODES, ids=lambda row: f"t={row[0]},a={row[1]}")
def test_slopes_between_two_modes_are_the_tabulated_ones(row: tuple[float, ...]) -> None:
    t, at, value, exact, aepo, varying = row
    x, c = column(at), -2.0

    def analytic(x: Tensor, var: Tensor) -> Tensor:
        a_bar = torch.zeros_like(x)
        return en.analytic_energy(a_bar[:, 0], torch.full_like(x, c), TWO_MODES.mean(x, t), a_bar, var, 1.0)

    def variance(x: Tensor) -> Tensor:
        return TWO_MODES.variance(x, t)[:, 0]

    assert number(TWO_MODES.energy(x, t, 1.0, c)) == pytest.approx(value, abs=6e-7)
    assert value == pytest.approx(by_quadrature(x, t, 1.0, c, 0.0, TWO_MODES), abs=1e-6)
    assert number(derivative(lambda x: TWO_MODES.energy(x, t, 1.0, c), x)) == pytest.approx(exact, abs=6e-7)
    assert number(derivative(lambda x: analytic(x, torch.zeros(1)), x)) == pytest.approx(aepo, abs=6e-7)
    assert number(derivative(lambda x: analytic(x, variance(x)), x)) == pytest.approx(varying, abs=6e-7)


@pytest.mark.parametrize("data", [GAUSSIAN, TWO_MODES], ids=["gaussian", "two modes"])
def test_the_partition_function_is_the_same_at_all_times(data: Mixture) -> None:
    (a_0, wa), (e, we) = data.nodes(60), gauss(60)
    weight = (wa[:, None] * we).flatten()
    known = (wa * (2 * 0.7 * a_0).exp()).sum()
    for t in (0.01, 0.1, 0.3, 0.6, 1.0):
        x = (SDE.alpha(t) * a_0[:, None] + SDE.sigma(t) * e).reshape(-1, 1)
        assert number((weight * data.energy(x, t, 2.0, 0.7).exp()).sum()) == pytest.approx(number(known), rel=1e-6)


def test_the_energys_gradient_is_the_shift_of_the_posteriors_mean() -> None:
    """``alpha / sigma^2 (tilted mean - mean)``: of a mixture, tilting moves each part's mean and its weight."""
    beta, c = 1.3, -2.0
    w, m, v = (torch.tensor(x, dtype=F64) for x in (TWO_MODES.weights, TWO_MODES.means, TWO_MODES.variances))
    log_w = w.log() + beta * c * m + 0.5 * (beta * c) ** 2 * v
    tilted = Mixture(tuple(log_w.softmax(0).tolist()), tuple((m + beta * c * v).tolist()), TWO_MODES.variances)
    for t in (0.05, 0.2, 0.6):
        x = column(-0.7, 0.0, 0.4)
        shift = SDE.alpha(t) / SDE.sigma(t) ** 2 * (tilted.mean(x, t) - TWO_MODES.mean(x, t))
        slope = derivative(lambda x, t=t: TWO_MODES.energy(x, t, beta, c), x)  # type: ignore[misc]
        torch.testing.assert_close(slope, shift, rtol=1e-9, atol=1e-11)


# t, actions, repetitions: gradient and its spread, energy or None
SUPPORT = [(0.3, 16, 400, 0.3005, 0.1148), (0.3, 256, 100, 0.3352, 0.0334), (0.3, 4096, 20, 0.3357, 0.0083)]
SUPPORT += [(0.5, 4096, 20, 0.1121, 0.0032)]


@pytest.mark.parametrize(("t", "count", "repeats", "slope", "spread"), SUPPORT)
def test_support_actions_estimate_the_energy(t: float, count: int, repeats: int, slope: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    actions = 0.2 + 0.5 * torch.randn(repeats, count, 1, generator=generator, dtype=F64)
    q, x = 0.7 + 1.5 * actions[..., 0], A_T.expand(repeats, 1)
    energy, grad = en.monte_carlo_energy(x, time(t).expand(repeats), actions, q, SDE, 1.0)
    assert grad.mean().item() == pytest.approx(slope, abs=4 * spread / math.sqrt(repeats) + 5e-5)
    assert grad.std().item() == pytest.approx(spread, rel=4 / math.sqrt(2 * repeats))
    if (t, count) == (0.3, 4096):
        assert energy.mean().item() == pytest.approx(1.3658, abs=4 * 0.0123 / math.sqrt(repeats))
    # the gradient is the energy's
    found = derivative(lambda x: en.monte_carlo_energy(x, time(t).expand(repeats), actions, q, SDE, 1.0)[0], x)
    torch.testing.assert_close(found, grad, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------- values and QGPO


@pytest.mark.parametrize(("beta_q", "value"), [(1.0, 1.5752103826), (20.0, 1.9999999979), (0.0, 1.0)])
def test_the_in_support_value_lies_between_mean_and_best(beta_q: float, value: float) -> None:
    q = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0]], dtype=F64)
    assert en.isql_value(q, beta_q).tolist() == pytest.approx([value] * 2, abs=1e-10)
    q = torch.randn(50, 16, dtype=F64)
    found = en.isql_value(q, 2.0)
    assert (found > q.mean(1)).all() and (found < q.amax(1)).all()


def test_contrastive_loss_is_least_at_the_energies_up_to_a_constant() -> None:
    q = torch.tensor([[0.0, 1.0, 2.0]], dtype=F64)
    assert number(en.cep_loss(q + 5, q, 1.0)) == pytest.approx(0.8323955818, abs=1e-10)
    assert number(en.cep_loss(torch.zeros_like(q), q, 1.0)) == pytest.approx(1.0986122887, abs=1e-10)
    f = (3 * q - 1).requires_grad_()  # at beta 3
    (slope,) = torch.autograd.grad(en.cep_loss(f, q, 3.0), f)
    assert slope.abs().max() < 1e-12


def test_contrastive_loss_is_of_differences_within_a_state() -> None:
    f, q = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    loss = en.cep_loss(f, q, 3.0)
    shift = torch.arange(6, dtype=F64)[:, None]
    order = torch.randperm(16)
    for changed in ((f + shift, q), (f, q + shift), (f[:, order], q[:, order])):
        torch.testing.assert_close(en.cep_loss(*changed, 3.0), loss)
    torch.testing.assert_close(
        torch.stack([en.cep_loss(f[i : i + 1], q[i : i + 1], 3.0) for i in range(6)]).mean(), loss
    )
    q = q.requires_grad_()
    assert not en.cep_loss(f, q, 3.0).requires_grad  # labels carry none
    with pytest.raises(ConfigError, match="one shape"):
        en.cep_loss(f, q[:, 0], 3.0)


# t, beta c, exact slope; slopes learned from 2, 4, 16, 32, 64 and 256 actions; from 2 and 16, labels not normalised
CONTRASTIVE = [
    (0.1, 1.5, 1.0831, (1.008, 1.034, 1.067, 1.071, 1.080, 1.083), (1.084, 1.079)),
    (0.1, 4.5, 3.2492, (2.202, 2.394, 2.704, 2.814, 2.893, 3.045), (3.213, 3.277)),
    (0.3, 1.5, 0.3359, (0.273, 0.299, 0.321, 0.332, 0.332, 0.335), (0.342, 0.335)),
    (0.3, 4.5, 1.0078, (0.471, 0.552, 0.702, 0.788, 0.839, 0.922), (1.039, 1.074)),
]
ACTIONS = (2, 4, 16, 32, 64, 256)


def learned_slope(t: float, c: float, count: int, normalised: bool) -> float:
    """Of the linear energy ``f = w a_t`` that contrasts ``count`` actions of N(0, 1/4) best, by Newton's method."""
    generator = torch.Generator().manual_seed(0)
    a, eps = torch.randn(2, 320_000 // count, count, generator=generator, dtype=F64)
    a = 0.5 * a
    x = SDE.alpha(t) * a + SDE.sigma(t) * eps
    w = torch.zeros((), dtype=F64, requires_grad=True)
    for _ in range(8):
        loss = en.cep_loss(w * x, c * a, 1.0, self_normalise=normalised)
        (slope,) = torch.autograd.grad(loss, w, create_graph=True)
        (bend,) = torch.autograd.grad(slope, w)
        w = (w - slope / bend).detach().requires_grad_()
    assert abs(slope.item()) < 1e-6
    return w.item()


@pytest.mark.parametrize("row", CONTRASTIVE, ids=lambda row: f"t={row[0]},c={row[1]}")
@pytest.mark.parametrize("count", ACTIONS)
def test_few_actions_teach_too_little_guidance(row: tuple[Any, ...], count: int) -> None:
    """Labels that are not normalised teach it all, with a larger variance."""
    t, c, exact, biased, unbiased = row
    known = biased[ACTIONS.index(count)]
    found = learned_slope(t, c, count, normalised=True)
    assert found == pytest.approx(known, abs=0.02) and found < exact + 0.01
    assert exact == pytest.approx(c * SDE.alpha(t) * 0.25 / (SDE.alpha(t) ** 2 * 0.25 + SDE.sigma(t) ** 2), abs=6e-5)
    if count in (2, 16):
        found, known = learned_slope(t, c, count, normalised=False), unbiased[(2, 16).index(count)]
        assert found == pytest.approx(known, abs=0.06 * max(1.0, known))
        assert found == pytest.approx(exact, abs=0.06 * max(1.0, exact))


def test_regression_on_values_and_on_their_exponentials_find_other_energies() -> None:
    """Minimised over constants: the mean of ``beta Q``, and the log of the mean of its exponential."""
    q = torch.tensor([-2.0, -0.5, 0.0, 0.0], dtype=F64)
    for loss, known in (
        (en.energy_mse_loss, 1.5 * q.mean()),
        (en.energy_emse_loss, (1.5 * q).exp().mean().log()),
    ):
        f = known.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(f.expand(4), q, 1.5), f)
        assert abs(slope.item()) < 1e-12
    assert en.energy_emse_loss(torch.full((2,), 1e4), torch.full((2,), 1e4), 3.0).item() == 0  # cut off, not infinite


# the expectile of Uniform(0, 1) and of N(0, 1)
EXPECTILES = [
    (0.6, "0.5505102572", "0.161658"),
    (0.7, "0.6043560763", "0.337120"),
    (0.8, "0.6666666667", "0.549156"),
    (0.9, "0.7500000000", "0.861592"),
]


@pytest.mark.parametrize(("tau", "uniform", "normal"), EXPECTILES)
def test_the_expectile_loss_is_least_at_the_expectile(tau: float, uniform: str, normal: str) -> None:
    share = torch.linspace(0, 1, 200_001, dtype=F64)
    middle = 0.5 * (share[1:] + share[:-1])
    # the mean of each of 200,000 equal shares of the normal law
    gaussian = -200_000 * (-0.5 * torch.special.ndtri(share).square()).exp().diff() / math.sqrt(2 * math.pi)
    exact = pytest.approx(tau, abs=1e-9)
    for q, known in ((middle, printed(uniform)), (gaussian, printed(normal)), ((middle > 0.5).double(), exact)):
        low, high = -1.0, 2.0
        for _ in range(50):  # by bisection, where the slope is 0
            v = torch.tensor(0.5 * (low + high), dtype=F64, requires_grad=True)
            (slope,) = torch.autograd.grad(expectile_loss(q - v, tau), v)
            low, high = (v.item(), high) if slope < 0 else (low, v.item())
        assert low == known
    u = torch.randn(100, dtype=F64)
    torch.testing.assert_close(expectile_loss(u, 0.5), 0.5 * u.square().mean())


def test_other_rates_of_the_schedule_reach_the_covariance() -> None:
    sde = VPSDE(0.5, 5.0)
    alpha, sigma = sde.alpha(0.4), sde.sigma(0.4)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return sigma * x / (0.25 * alpha**2 + sigma**2)

    known = 0.25 * sigma**2 / (0.25 * alpha**2 + sigma**2)
    assert number(co.posterior_variance(eps, A_T, time(0.4), sde)) == pytest.approx(known, abs=1e-12)
