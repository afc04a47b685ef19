"""Activations by name, with a Mish that costs a fifth of torch's on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXACT = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)
PIECE = 2**20  # entries worked on at once; of 2**17 to 2**21 the fastest where no gradient is wanted, and never slow
ONE = {dtype: torch.ones((), dtype=dtype) for dtype in EXACT}


def mish(x: Tensor) -> Tensor:
    """``x tanh(softplus(x))``.

    torch computes it by an exponential, a logarithm and a tanh, of which only the first is fast on a CPU: an actor's
    network then spends half of its time here. With e = exp(x) and h = e + e^2 / 2, tanh(softplus(x)) is 1 / (1 + 1/h):
    the same function to a few units in the last place in a fifth of the time, also where e or h overflows. The
    derivative costs little beside the value, so that it is computed with it and kept. Half precision is worked on in
    float32 and rounded once, at the end. On other devices torch's own kernel runs.

    Args:
        x: Any shape, floating point.
    """
    if _left_to_torch(x):
        return F.mish(x)
    if x.requires_grad and torch.is_grad_enabled():
        found: Tensor = _Mish.apply(x)  # type: ignore[no-untyped-call]
        return found
    if x.numel() <= PIECE and x.dtype in EXACT:
        return _value(x)
    return _in_pieces(_value, x)[0]


def mish_backward(grad: Tensor, x: Tensor) -> Tensor:
    """``grad`` times the slope of :func:`mish` at ``x``, which it is like; by torch's own kernel on other devices."""
    if _left_to_torch(x):
        return torch.ops.aten.mish_backward(grad, x)  # type: ignore[no-any-return, no-untyped-call]
    slope = _in_pieces(_value_and_slope, x, outputs=2)[1]
    return (grad * slope).to(grad.dtype)


class Mish(nn.Module):
    """:func:`mish` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to ``x`` of any shape."""
        return mish(x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"mish": Mish, "relu": nn.ReLU, "silu": nn.SiLU}


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        value, slope = _in_pieces(_value_and_slope, x, outputs=2)
        ctx.save_for_backward(x, slope)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        x, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: the plain formula, which can be differentiated
            exact = x.float() if x.dtype in HALF else x
            s = torch.sigmoid(exact)
            r = (1 - s).square()
            return grad * ((1 - r + 4 * exact * s * r / (1 + r)) / (1 + r)).to(x.dtype)
        return (grad * slope).to(grad.dtype)


def _left_to_torch(x: Tensor) -> bool:
    return x.device.type != "cpu" or x.dtype not in (*EXACT, *HALF) or torch.compiler.is_compiling()


def _value(x: Tensor, out: Tensor | None = None) -> Tensor:
    e = torch.exp(x)
    # Not in place on e itself: forward-mode differentiation would take it for the result already.
    h = torch.addcmul(e, e, e, value=0.5, out=out)
    return h.reciprocal_().add_(1).reciprocal_().mul_(x)


def _value_and_slope(x: Tensor, out: Tensor, slope: Tensor) -> Tensor:
    """With s = sigmoid(x), q = 1 - s and d = 1 + q^2, tanh(softplus(x)) is t = s (1 + q) / d.

    The slope is t + 4 x s (q / d)^2; computed by h of :func:`_value`, it would lose its last digits at large x.
    """
    s = torch.sigmoid(x)
    q = torch.rsub(s, 1)
    t = torch.addcmul(s, s, q, out=out)
    d = torch.addcmul(ONE[x.dtype], q, q, out=slope)
    t.div_(d)
    q.div_(d).square_()
    torch.addcmul(t, s.mul_(x), q, value=4, out=slope)
    return t.mul_(x)


def _in_float(function: Callable[..., object], x: Tensor, *outputs: Tensor) -> None:
    """Call an elementwise function on numbers of half precision in float32, and round its first output, the value."""
    exact, value = x.float(), outputs[0]
    found = torch.empty_like(exact)
    function(exact, found, *outputs[1:])
    value.copy_(found)


def _in_pieces(function: Callable[..., object], x: Tensor, outputs: int = 1) -> list[Tensor]:
    """Fill ``outputs`` tensors like x, those after the first in float32 or better, by an elementwise function."""
    dtypes = [x.dtype, *[torch.promote_types(x.dtype, torch.float32)] * (outputs - 1)]
    if x.dtype in HALF:
        function = partial(_in_float, function)
    if x.numel() <= PIECE:
        filled = [torch.empty_like(x, dtype=dtype) for dtype in dtypes]
        function(x, *filled)
        return filled
    filled = [torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format) for dtype in dtypes]
    for piece, *targets in zip(x.reshape(-1).split(PIECE), *(out.view(-1).split(PIECE) for out in filled)):
        function(piece, *targets)
    return filled
