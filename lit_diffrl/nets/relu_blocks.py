"""Perceptrons with ReLU on many rows at once on a CPU: CQL's critics at 31 actions in each of 256 states, QGPO's at 16.

The arithmetic is that of one layer after the other; what differs is the order of the work. Rows are taken in blocks
whose activations stay in the cache. Where weights learn, activations are held transposed, a row's in one column, in
which form oneDNN runs all three products of a layer (forward, gradient of the input, gradient of the weight) at full
speed. Where they do not, rows stay rows, and the product adds the bias and cuts at 0 itself: in bfloat16, where
activations are the larger part, 4,096 rows then take a third of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_diffrl.nets.linear import ONEDNN, fits, learns, rounds, unrounded
from lit_diffrl.nets.prepared import once

BLOCK = 1024  # rows
WORTH = 4 * BLOCK  # rows from which on it saves more than it costs
SLOPE = 1e-20  # below 0, where the product itself cuts: it adds nothing to a sum, and at 0 oneDNN makes 0 of NaN


def worth_blocks(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether :func:`relu_perceptrons` applies to rows ``x (R, in)`` and these layers, and saves time."""
    if len(x) < WORTH or learns(x):
        return False
    weight = layers[0][0]
    return fits(x, weight) or (rounds(x, weight) and not learns(*(tensor for layer in layers for tensor in layer)))


def relu_perceptrons(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Evaluate M perceptrons of one output on the same rows; gradients reach the weights, once, and not ``x``.

    Args:
        x: ``(R, in)`` float32 on the CPU. Under autocast to bfloat16 no weight may learn.
        layers: Weight ``(M, in, out)`` and bias ``(M, 1, out)`` of at least two layers, the last with one output.

    Returns:
        ``(M, R)``.
    """
    parameters = [tensor for layer in layers for tensor in layer]
    if not learns(*parameters):
        return _constant(x, layers)
    out: Tensor = _Perceptrons.apply(x, *parameters)  # type: ignore[no-untyped-call]
    return out


def _constant(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The values of perceptrons that do not learn; under autocast as it would round them, but for the last layer."""
    *hidden, (head, shift) = layers
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
    maps = [(_transposed(weight, dtype), bias.squeeze(1).to(dtype)) for weight, bias in hidden]
    values = []
    for m in range(len(head)):
        for h in x.to(dtype).split(BLOCK):
            for weight, bias in maps:
                h = ONEDNN(h, weight[m], bias[m], "leaky_relu", [SLOPE], "")
            values.append(unrounded(F.linear, h, head[m].t(), shift[m, 0])[:, 0])
    return torch.cat(values).view(len(head), -1)


def _transposed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight ``(M, in, out)`` as ``(M, out, in)``, which is how oneDNN takes it."""

    def make(w: Tensor) -> Tensor:
        return w.detach().mT.to(dtype).contiguous()

    kept = once(weight, "transposed", dtype, make)
    return make(weight) if kept is None else kept


def _values(x: Tensor, parameters: Sequence[Tensor], activations: list[Tensor]) -> Tensor:
    """The values of perceptrons that learn; the activations of each block are added to the list."""
    weights, biases = parameters[::2], parameters[1::2]
    values = []
    for m in range(len(weights[0])):
        transposed = [weight[m].t().contiguous() for weight in weights]
        for rows in x.split(BLOCK):
            h = rows.t()
            for weight, bias in zip(transposed[:-1], biases):
                h = _product(weight, h.t()).add_(bias[m].t()).relu_()
                activations.append(h)
            values.append((transposed[-1] @ h)[0] + biases[-1][m, 0])
    return torch.cat(values).view(len(weights[0]), -1)


class _Perceptrons(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        activations: list[Tensor] = []
        values = _values(x, parameters, activations)
        ctx.save_for_backward(x, *parameters[::2], *activations)
        ctx.layers = len(parameters) // 2
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *saved = ctx.saved_tensors
        weights, activations = saved[: ctx.layers], iter(saved[ctx.layers :])
        of_weights = [torch.zeros_like(weight) for weight in weights]
        of_biases = [weight.new_zeros(len(weight), 1, weight.shape[2]) for weight in weights]
        for m in range(len(grad)):
            for rows, g in zip(x.split(BLOCK), grad[m].split(BLOCK)):
                *inputs, last = [rows.t(), *(next(activations) for _ in weights[1:])]
                of_weights[-1][m, :, 0] += last @ g
                of_biases[-1][m] += g.sum()
                d = weights[-1][m] * g
                for i in reversed(range(len(inputs))):
                    d = torch.ops.aten.threshold_backward(d, last, 0)  # type: ignore[no-untyped-call]
                    of_weights[i][m] += _product(inputs[i], d)
                    of_biases[i][m, 0] += d.sum(1)
                    if i:
                        d, last = _product(weights[i][m], d.t()), inputs[i]
        return None, *(tensor for layer in zip(of_weights, of_biases) for tensor in layer)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``x y^T``."""
    out: Tensor = ONEDNN(x, y, None, "none", [], "")
    return out
