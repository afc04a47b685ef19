"""The solver on Gaussian data, where it is affine: its mean is what it makes of 0, its spread that of 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closed_forms import F64, GAUSSIAN, SDE, TWO_MODES, Mixture, column, printed
from torch import Tensor

from lit_diffrl.diffusion.dpm_vp import plan, sample_dpm_vp, times
from lit_diffrl.diffusion.energy_guidance import Gradient, gradient_of, guide
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods.energy import analytic_energy

C = 1.5  # slope of Q


def linear_gradient(beta: float = 1.0, v: float = 0.25) -> Gradient:
    """Of the exact energy of Gaussian data with variance v and ``Q = 1.5 a``."""

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = SDE.alpha(t), SDE.sigma(t)
        return (beta * C * alpha * v / (alpha**2 * v + sigma**2)).expand_as(x)

    return gradient


def law(
    gradient: Gradient | None = None, omega: float = 1.0, data: Mixture = GAUSSIAN, **options: Any
) -> tuple[float, float]:
    """Mean and standard deviation of what is sampled, the map being affine."""
    model = guide(data.eps, gradient or linear_gradient(), SDE, omega)
    low, high = sample_dpm_vp(model, column(0.0, 1.0), SDE, **options).flatten().tolist()
    return low, abs(high - low)


MULTI, LOGSNR, NOISE = {"method": "multistep"}, {"grid": "logsnr"}, {"predict": "noise"}


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        ({}, 0.573291, 0.443779),
        ({"steps": 10}, 0.573520, 0.383259),
        ({"steps": 16}, 0.573326, 0.434619),
        ({"steps": 5}, 0.573929, 0.275074),
        ({"steps": 100}, 0.573092, 0.496473),
        ({"steps": 1000}, 0.573079, 0.500019),
        ({"order": 1}, 0.573406, 0.413495),
        (MULTI, 0.572511, 0.650249),
        (MULTI | {"lower_order_final": True}, 0.573240, 0.458340),
        (LOGSNR, 0.573222, 0.462137),
        (MULTI | LOGSNR, 0.573039, 0.510626),
        (MULTI | LOGSNR | {"steps": 30}, 0.573070, 0.503150),
        (NOISE, 0.573143, 0.482987),
        (NOISE | MULTI, 0.572784, 0.578070),
        ({"final_denoise": True}, 0.573324, 0.443609),
    ],
    ids=str,
)
def test_few_steps_shrink_or_widen_a_gaussian_as_tabulated(options: dict[str, Any], mean: float, std: float) -> None:
    found = law(**options)
    assert found == pytest.approx((mean, std), abs=1e-5)


@pytest.mark.parametrize(("omega", "mean"), [(0.0, 0.199406), (2.0, 0.947177)])
def test_the_guidance_degree_moves_a_gaussian_and_leaves_its_spread(omega: float, mean: float) -> None:
    assert law(omega=omega) == pytest.approx((mean, 0.443779), abs=1e-6)


@pytest.mark.parametrize("options", [{}, MULTI, NOISE | MULTI, NOISE | {"order": 3}], ids=str)
@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_exact_guidance_samples_the_tilted_gaussian(options: dict[str, Any], beta: float) -> None:
    mean, std = law(linear_gradient(beta), steps=400, **LOGSNR, **options)
    # N(0, 1) at t = 1 in place of its law there moves the mean by 0.0066 of the distance of the means
    assert mean == pytest.approx(0.2 + beta * C * 0.25, abs=0.005)
    assert std == pytest.approx(0.5, abs=0.005)


# h, beta; mean / spread of the true law, then of what is sampled with: the exact energy, AEPO expanded at mu, DPS, AEPO
# expanded at the data's mean, and the value's gradient at the noisy action, which of a convex value diverges
QUADRATIC = """
-1 1  0.36000/0.44721  0.35894/0.44723   0.35412/0.44821  0.38298/0.44127  0.39868/0.50002  0.73465/0.00329
-1 3  0.54286/0.37796  0.54151/0.37798   0.45889/0.39555  0.66847/0.34366  0.79737/0.50002  0.79809/0.00000
-4 1  0.22500/0.35355  0.22448/0.35357   0.21398/0.38942  0.23574/0.30328  0.24918/0.50002  0.26273/0.00000
-4 3  0.23750/0.25000  0.23711/0.25002  -0.05008/1.05856  0.26120/0.11158  0.34885/0.50002  0.25457/0.00000
 1 1  0.60000/0.57735  0.59772/0.57737   0.58280/0.57551  0.52443/0.56659  0.49835/0.50002  diverges
 1 3  3.80000/1.00000  3.77501/1.00000   2.12506/0.83735  1.35741/0.72751  1.09638/0.50002  diverges
"""


COLUMNS = ("exact", "aepo", "dps", "fixed", "noisy")
FINE: dict[str, Any] = {"steps": 2000, "t_end": 1e-4, **MULTI, **LOGSNR}


@pytest.mark.parametrize("kind", COLUMNS)
def test_inexact_energies_of_a_quadratic_value_miss_by_what_is_tabulated(kind: str) -> None:
    rows = [line.split() for line in QUADRATIC.strip().splitlines()]
    h, beta = (column(*(float(row[i]) for row in rows for _ in range(2))) for i in (0, 1))

    def energy(x: Tensor, t: Tensor) -> Tensor:  # of Q = a + h a^2 / 2
        mu, var = GAUSSIAN.mean(x, t), GAUSSIAN.variance(x, t)[:, 0]
        if kind in ("aepo", "fixed"):
            a_bar = mu if kind == "aepo" else torch.full_like(mu, 0.2)
            q = (a_bar + 0.5 * h * a_bar**2)[:, 0]
            return analytic_energy(q, 1 + h * a_bar, mu, a_bar, var, beta[:, 0])
        if kind == "exact":
            return GAUSSIAN.energy(x, t, beta, 1.0, h)
        a = {"dps": mu, "noisy": x}[kind]
        return (beta * (a + 0.5 * h * a**2))[:, 0]

    starts = column(*[0.0, 1.0] * len(rows))
    ends = sample_dpm_vp(guide(GAUSSIAN.eps, gradient_of(energy), SDE), starts, SDE, **FINE).view(-1, 2)
    for row, (low, high) in zip(rows, ends.tolist(), strict=True):
        precision = 4 - float(row[1]) * float(row[0])
        assert ((0.8 + float(row[1])) / precision, precision**-0.5) == tuple(map(printed, row[2].split("/")))
        known = row[3 + COLUMNS.index(kind)]
        spread = abs(high - low)
        assert spread > 50 if known == "diverges" else (low, spread) == tuple(map(printed, known.split("/"))), row


def test_without_guidance_the_fine_solver_samples_the_data() -> None:
    assert law(omega=0.0, **FINE) == (printed("0.19934"), printed("0.50002"))


@pytest.mark.parametrize(
    ("beta", "weight", "mean", "sampled", "aepo", "varying"),
    [
        (0.5, 0.564993, -0.153880, (-0.1507, 0.5624), (-0.1220, 0.5308), (-0.1640, 0.5736)),
        (1, 0.800225, -0.453256, (-0.4521, 0.7995), (-0.3936, 0.7118), (-0.5227, 0.8399)),
        (2, 0.975701, -0.731570, (-0.7318, 0.9766), (-0.7920, 0.9013), (-0.8549, 0.9944)),
    ],
)
def test_of_two_modes_exact_guidance_finds_the_weights_and_aepo_does_not(
    beta: float,
    weight: float,
    mean: float,
    sampled: tuple[float, float],
    aepo: tuple[float, float],
    varying: tuple[float, float],
) -> None:
    c = -2.0
    generator = torch.Generator().manual_seed(0)
    # stratified: a normal number from each of 10,000 equal shares
    share = (torch.arange(10_000, dtype=F64) + torch.rand(10_000, generator=generator, dtype=F64)) / 10_000
    noise = torch.special.ndtri(share)[:, None]
    options: dict[str, Any] = {"steps": 100, **MULTI, **LOGSNR}

    # AEPO's variance depends on t alone and adds nothing to the gradient, which is then that of MSE and DPS as well.
    # The last one takes the variance at each noisy action and overshoots, since the posterior is no Gaussian.
    def closed_form(mu: Tensor, var: Tensor) -> Tensor:
        return analytic_energy(c * mu[:, 0], torch.full_like(mu, c), mu, mu, var, beta)

    energies: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "exact": lambda x, t: TWO_MODES.energy(x, t, beta, c),
        "aepo": lambda x, t: closed_form(TWO_MODES.mean(x, t), torch.full((len(x),), 0.1, dtype=F64)),
        "varying": lambda x, t: closed_form(TWO_MODES.mean(x, t), TWO_MODES.variance(x, t)[:, 0]),
    }
    for name, known in {"exact": sampled, "aepo": aepo, "varying": varying}.items():
        x = sample_dpm_vp(guide(TWO_MODES.eps, gradient_of(energies[name]), SDE), noise, SDE, **options)
        found = x.mean().item(), (x < 0).double().mean().item()
        assert found == pytest.approx(known, abs=0.012), name
        if name == "exact":
            assert found == (pytest.approx(mean, abs=0.01), pytest.approx(weight, abs=0.01))


@pytest.mark.parametrize("options", [{}, {"steps": 16}, MULTI | LOGSNR, {"final_denoise": True}, NOISE], ids=str)
def test_the_network_is_called_at_the_times_that_are_promised(options: dict[str, Any]) -> None:
    called: list[float] = []

    def eps(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (1,)
        called.append(t.item())
        return GAUSSIAN.eps(x, t)

    sample_dpm_vp(eps, column(0.3), SDE, **options)
    assert called == times(SDE, **options)
    assert len(called) == options.get("steps", 15) + options.get("final_denoise", False)
    assert called[0] == 1.0 and called == sorted(called, reverse=True)


def test_fifteen_calls_are_on_an_even_grid() -> None:
    assert times(SDE) == pytest.approx([1 - i * (1 - 1e-3) / 15 for i in range(15)], abs=1e-12)
    ends = [call.ends for call in plan(SDE, 15, 2, "singlestep", "time_uniform", "data", False, 1e-3)]
    assert ends == [False, True] * 7 + [True]


def test_single_precision_samples_what_double_does() -> None:
    x = torch.randn(100, 1)
    low = sample_dpm_vp(lambda x, t: GAUSSIAN.eps(x, t).to(x.dtype), x, SDE)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), sample_dpm_vp(GAUSSIAN.eps, x.double(), SDE), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 0}, "solver steps"),
        ({"order": 3}, "solver order"),
        ({"method": "twostep"}, "method"),
        ({"grid": "even"}, "grid"),
        ({"predict": "x0"}, "predict"),
        ({"t_end": 0.0}, "t_end"),
        ({"t_end": math.nan}, "t_end"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        sample_dpm_vp(GAUSSIAN.eps, column(0.0), SDE, **options)
