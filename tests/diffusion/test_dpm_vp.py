"""The solver on Gaussian data, where it is affine: its mean is what it makes of 0, its spread that of 0 and 1."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from closed_forms import F64, GAUSSIAN, SDE, TWO_MODES, Mixture, column
from torch import Tensor

from lit_diffrl.diffusion.dpm_vp import plan, sample_dpm_vp, times
from lit_diffrl.diffusion.energy_guidance import Gradient, gradient_of, guide
from lit_diffrl.errors import ConfigError

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


# h, beta, then mean and spread with: the exact energy, AEPO expanded at mu, DPS, AEPO expanded at the data's mean, and
# the value's gradient at the noisy action
QUADRATIC = [
    (-1, 1, (0.35894, 0.44723), (0.35412, 0.44821), (0.38298, 0.44127), (0.39868, 0.50002), (0.73465, 0.00329)),
    (-1, 3, (0.54151, 0.37798), (0.45889, 0.39555), (0.66847, 0.34366), (0.79737, 0.50002), (0.79809, 0.00000)),
    (-4, 1, (0.22448, 0.35357), (0.21398, 0.38942), (0.23574, 0.30328), (0.24918, 0.50002), (0.26273, 0.00000)),
    (-4, 3, (0.23711, 0.25002), (-0.05008, 1.05856), (0.26120, 0.11158), (0.34885, 0.50002), (0.25457, 0.00000)),
    (1, 1, (0.59772, 0.57737), (0.58280, 0.57551), (0.52443, 0.56659), (0.49835, 0.50002), None),
    (1, 3, (3.77501, 1.00000), (2.12506, 0.83735), (1.35741, 0.72751), (1.09638, 0.50002), None),
]


@pytest.mark.parametrize("row", QUADRATIC, ids=lambda row: f"h={row[0]},beta={row[1]}")
def test_inexact_energies_of_a_quadratic_value_miss_by_what_is_tabulated(row: tuple[Any, ...]) -> None:
    h, beta, exact, aepo, dps, fixed, noisy = row

    def gradient(energy: str) -> Gradient:
        def at(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = SDE.alpha(t), SDE.sigma(t)
            total = alpha**2 * 0.25 + sigma**2
            gain, var = alpha * 0.25 / total, 0.25 * sigma**2 / total
            if energy == "noisy":
                return beta * (1 + h * x)
            g = 1 + h * GAUSSIAN.mean(x, t)
            factor = {"exact": 1 / (1 - beta * h * var), "aepo": 1 + beta * h * var, "dps": 1.0}.get(energy)
            return beta * gain * ((1 + 0.2 * h) * torch.ones_like(x) if factor is None else g * factor)

        return at

    options = {"steps": 400, "method": "multistep", "grid": "logsnr", "t_end": 1e-4}
    for energy, known in {"exact": exact, "aepo": aepo, "dps": dps, "fixed": fixed}.items():
        assert law(gradient(energy), **options) == pytest.approx(known, abs=6e-5), energy
    if noisy is None:
        assert law(gradient("noisy"), **options)[1] > 50  # of a convex value it diverges
    else:
        fine = {"steps": 2000, "order": 1, "t_end": 1e-4}
        assert law(gradient("noisy"), **fine) == pytest.approx(noisy, rel=0.02, abs=2e-3)


@pytest.mark.parametrize(
    ("beta", "weight", "mean", "aepo", "varying"),
    [
        (0.5, 0.564993, -0.153880, (-0.1220, 0.5308), (-0.1640, 0.5736)),
        (1, 0.800225, -0.453256, (-0.3936, 0.7118), (-0.5227, 0.8399)),
        (2, 0.975701, -0.731570, (-0.7920, 0.9013), (-0.8549, 0.9944)),
    ],
)
def test_of_two_modes_exact_guidance_finds_the_weights_and_aepo_does_not(
    beta: float, weight: float, mean: float, aepo: tuple[float, float], varying: tuple[float, float]
) -> None:
    c = -2.0
    generator = torch.Generator().manual_seed(0)
    # stratified: a normal number from each of 10,000 equal shares
    share = (torch.arange(10_000, dtype=F64) + torch.rand(10_000, generator=generator, dtype=F64)) / 10_000
    noise = torch.special.ndtri(share)[:, None]
    options: dict[str, Any] = {"steps": 100, **MULTI, **LOGSNR}

    exact = gradient_of(lambda x, t: TWO_MODES.energy(x, t, beta, c))
    x = sample_dpm_vp(guide(TWO_MODES.eps, exact, SDE), noise, SDE, **options)
    assert (x < 0).double().mean().item() == pytest.approx(weight, abs=0.01)
    assert x.mean().item() == pytest.approx(mean, abs=0.02)

    # AEPO's gradient, and MSE's and DPS's: beta c alpha / sigma^2 Var[a_0 | a_t], as its variance knows only t
    def analytic(x: Tensor, t: Tensor) -> Tensor:
        return beta * c * SDE.alpha(t) / SDE.sigma(t) ** 2 * TWO_MODES.variance(x, t)

    # ... and with the variance of each noisy action, which overshoots: the posterior is no Gaussian
    def energy(x: Tensor, t: Tensor) -> Tensor:
        return (beta * c * TWO_MODES.mean(x, t) + 0.5 * (beta * c) ** 2 * TWO_MODES.variance(x, t))[:, 0]

    for gradient, known in ((analytic, aepo), (gradient_of(energy), varying)):
        x = sample_dpm_vp(guide(TWO_MODES.eps, gradient, SDE), noise, SDE, **options)
        assert (x.mean().item(), (x < 0).double().mean().item()) == pytest.approx(known, abs=0.012)


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
