"""Our Mish is torch's, in value and in derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from lit_diffrl.nets.activations import EXACT, HALF, PIECE, mish


@pytest.mark.parametrize("dtype", [*EXACT, torch.bfloat16, torch.float16])
def test_values_are_those_of_torch_from_one_end_of_the_range_to_the_other(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-80, 80, 20_001), torch.tensor([-1e4, -300.0, 300.0, 1e4])]).to(dtype)
    exact = F.mish(x.double())
    error = (mish(x).double() - exact).abs() / exact.abs().clamp_min(torch.finfo(dtype).tiny)
    assert mish(x).dtype == dtype
    assert float(error.max()) < 4 * torch.finfo(dtype).eps
    assert mish(torch.tensor([float("nan")])).isnan().all()


def test_gradients_are_as_exact_as_those_of_torch() -> None:
    points = torch.linspace(-90, 90, 20_001)

    def gradient(function: object, x: torch.Tensor) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(function(leaf).sum(), leaf)[0].double()  # type: ignore[operator]

    exact = gradient(F.mish, points.double())
    ours, theirs = (float((gradient(f, points) - exact).abs().max()) for f in (mish, F.mish))
    assert ours < max(theirs, 3e-7)


def test_first_and_second_derivatives_agree_with_differences() -> None:
    x = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    assert gradcheck(mish, (x,)) and gradgradcheck(mish, (x,))


def test_functional_transforms_go_through_it() -> None:
    x = torch.linspace(-6, 6, 25, dtype=torch.float64)
    value, slope = torch.func.jvp(mish, (x,), (torch.ones_like(x),))
    expected = torch.func.jvp(F.mish, (x,), (torch.ones_like(x),))
    torch.testing.assert_close((value, slope), expected)
    torch.testing.assert_close(torch.func.vmap(mish)(x.view(5, 5)), F.mish(x.view(5, 5)))


@pytest.mark.parametrize("shape", [(0,), (), (3, PIECE // 2 + 1), (PIECE + 7,)])
def test_pieces_do_not_show(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for view in (x, x.t() if len(shape) == 2 else x):
        grad = torch.randn_like(view)
        torch.testing.assert_close(mish(view), F.mish(view), rtol=1e-12, atol=1e-12)
        found, expected = (torch.autograd.grad(f(view), x, grad)[0] for f in (mish, F.mish))
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(mish(x), F.mish(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 40), (PIECE + 7,)])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_rounded_once_in_values_and_derivatives(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    allowed = torch.finfo(dtype).eps / 2 * 1.01 * 1.1  # slopes reach 1.09
    for again in (False, True):
        value, expected = mish(x), F.mish(exact)
        (slope,) = torch.autograd.grad(value, x, torch.ones_like(value), create_graph=again)
        (known,) = torch.autograd.grad(expected, exact, torch.ones_like(expected))
        assert value.dtype == slope.dtype == dtype
        assert float(((value - expected).abs() - allowed * expected.abs()).max()) < 1e-6
        assert float((slope - known).abs().max()) < allowed
