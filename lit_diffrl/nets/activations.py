"""Activations by name, with a Mish that costs a third of torch's on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXACT = (torch.float32, torch.float64)
PIECE = 2**17  # entries worked on at once: what lies in between stays in the cache


def mish(x: Tensor) -> Tensor:
    """``x tanh(softplus(x))``.

    torch computes it by an exponential, a logarithm and a tanh, of which only the first is fast on a CPU: an actor's
    network then spends two thirds of its time here. With s = sigmoid(x) and p = s (2 - s), tanh(softplus(x)) is
    p / (2 - p): the same function to a few units in the last place. On other devices, and in half precision, where each
    step would round, torch's own kernel runs.

    Args:
        x: Any shape, floating point.
    """
    if x.device.type != "cpu" or x.dtype not in EXACT or torch.compiler.is_compiling():
        return F.mish(x)
    if x.requires_grad and torch.is_grad_enabled():
        found: Tensor = _Mish.apply(x)  # type: ignore[no-untyped-call]
        return found
    return _in_pieces(_value, x)


class Mish(nn.Module):
    """:func:`mish` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to ``x`` of any shape."""
        return mish(x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"mish": Mish, "relu": nn.ReLU, "silu": nn.SiLU}


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _in_pieces(_value, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: the plain formula, which can be differentiated
            s = torch.sigmoid(x)
            r = (1 - s).square()
            return grad * (1 - r + 4 * x * s * r / (1 + r)) / (1 + r)
        return _in_pieces(_slope, x, grad)


def _value(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    p = s.mul_(2 - s)
    return p.mul(x).div_(p.neg_().add_(2))


def _slope(x: Tensor, grad: Tensor) -> Tensor:
    """The derivative times ``grad``: with r = (1 - s)^2, (1 - r + 4 x s r / (1 + r)) / (1 + r)."""
    s = torch.sigmoid(x)
    r = (1 - s).square_()
    d = r + 1
    s.mul_(x).mul_(r).div_(d)
    return r.neg_().add_(s, alpha=4).add_(1).div_(d).mul_(grad)


def _in_pieces(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Apply an elementwise function piece by piece."""
    first = inputs[0]
    if first.numel() <= PIECE:
        return function(*inputs)
    out = torch.empty_like(first, memory_format=torch.contiguous_format)
    pieces = zip(out.view(-1).split(PIECE), *(x.reshape(-1).split(PIECE) for x in inputs))
    for target, *parts in pieces:
        target.copy_(function(*parts))
    return out
