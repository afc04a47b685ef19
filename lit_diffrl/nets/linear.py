"""Affine maps by the faster of the two matrix products that torch carries for the CPU.

``F.linear`` calls MKL, which keeps its widest instructions for Intel's processors; oneDNN, in the same wheel, uses them
on any: a product of 256 rows with a 256 x 256 weight takes 0.16 ms instead of 0.34 on an AMD EPYC. On Intel's own both
take 0.2 ms, and MKL less for narrow layers (23 to 256: 0.03 instead of 0.04) and for gradients of weights (0.20 instead
of 0.25); so there layers keep to it, but for :mod:`~lit_diffrl.nets.relu_blocks` and for weights in bfloat16 that were
laid out once (:mod:`~lit_diffrl.nets.prepared`). The arithmetic is the same in both, summed in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffrl.nets.prepared import in_long_region, once, rounded

Map = Callable[[Tensor], Tensor]
WORTH = 2**19  # multiplications from which on oneDNN's product is the faster one, where it ever is


def _onednn() -> Any:
    """The product ``x w^T + b`` of oneDNN, or None where torch has none or the processor no wide instructions."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        product = torch.ops.mkldnn._linear_pointwise.default
        two = product(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), "none", [], "")
    except (AttributeError, RuntimeError, TypeError):  # not in this build, or with other arguments
        return None
    return product if two.item() == 2 else None


def _packed_types() -> tuple[torch.dtype, ...]:
    """Types in which oneDNN takes weights that were laid out for it before."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.ones(1, 1))
        half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError, TypeError):  # not in this build, or with other arguments
        return ()
    return (torch.float32, torch.bfloat16) if half else (torch.float32,)


def _intel() -> bool:
    """Whether the processor is one of those that MKL is made for; older versions of torch do not tell."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "Intel" in str(capabilities.get("cpu_name", ""))


ONEDNN = _onednn()
FASTER = ONEDNN is not None and not _intel()  # than F.linear, layer by layer
PACKED = _packed_types() if ONEDNN is not None else ()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``, as ``F.linear``, differentiable twice.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``.
        bias: ``(out,)`` or None.

    Returns:
        ``(..., out)``.
    """
    return _computation(x, weight, bias)(x)


def fixed(weight: Tensor, bias: Tensor | None = None, view: Map | None = None) -> Map:
    """:func:`linear` as a function of ``x`` alone, for the calls of a chain, in which weight and bias stay as they are.

    How to compute it is settled, and the weight looked up, at the first call, and anew where autocast is switched on or
    off: at every call it would take a third to a half of the time that the product of 50 rows takes in bfloat16. Inputs
    are of one type and about the same number of rows. Where gradients are recorded it is :func:`linear` at every call.

    Args:
        weight: ``(out, in)``, after ``view`` if there is one.
        bias: ``(out,)`` or None.
        view: Takes columns of the weight or transposes it. It is given the rounded weight, which is so rounded once.
    """
    settled: Map | None = None
    device, mixed = weight.device.type, False

    def settle(x: Tensor) -> Map:
        return _computation(x, weight if view is None else view(rounded(weight)), bias)

    def apply(x: Tensor) -> Tensor:
        nonlocal settled, mixed
        if torch.is_grad_enabled():
            return settle(x)(x)
        if settled is None or torch.is_autocast_enabled(device) != mixed:
            settled, mixed = settle(x), torch.is_autocast_enabled(device)
        return settled(x)

    return apply


def batched_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One affine map for each member of an ensemble.

    Args:
        x: ``(M, B, in)``, or ``(B, in)`` for one input to all.
        weight: ``(M, in, out)``.
        bias: ``(M, 1, out)`` or None.

    Returns:
        ``(M, B, out)``.
    """
    rows, (_, width_in, width_out) = x.shape[-2], weight.shape
    worth = rows * width_in * width_out > 2 * WORTH or (width_out == 1 and rows > 32)
    if not (worth and _faster(x, weight[0])):
        x, weight = x.expand(len(weight), -1, -1), rounded(weight)
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(rounded(bias), x, weight)
    if learns(x, weight, bias):
        out: Tensor = _BatchedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return _batched_product(x, weight, bias)


def unrounded(layer: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """Apply the last layer of a value or an energy in float32 under autocast; float32 or better always.

    What matters are the differences between actions, and they are small beside the values: bfloat16 knows none but
    every second number from 256 on, and next to 75 steps of 0.5.

    Args:
        layer: Called with ``x`` and ``args``.
        x: The last hidden layer.
        args: Passed on.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return layer(x.to(torch.promote_types(x.dtype, torch.float32)), *args)
    out = layer(x, *args)
    return out.to(torch.promote_types(out.dtype, torch.float32))


def value_by(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Apply layers one after the other, the last by :func:`unrounded`; a last axis of 1 is left out."""
    *hidden, head = layers
    for layer in hidden:
        x = layer(x)
    return unrounded(head, x).squeeze(-1)


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map to ``x (..., in)``."""
        return linear(x, self.weight, self.bias)

    def fixed(self) -> Map:
        """The layer for a chain, as :func:`fixed`."""
        return fixed(self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        # linear once more: where a second derivative is wanted, it records itself
        grad_x = linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = linear(grad.t(), x.t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None


class _BatchedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _batched_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = batched_linear(grad, weight.mT)
            grad_x = grad_x if x.dim() == 3 else grad_x.sum(0)
        if ctx.needs_input_grad[1]:
            grad_weight = batched_linear(x.mT, grad)
        return grad_x, grad_weight, grad.sum(1, keepdim=True) if ctx.needs_input_grad[2] else None


def rounds(x: Tensor, weight: Tensor) -> bool:
    """Whether autocast makes bfloat16 of these, and oneDNN's product is there for that."""
    return torch.bfloat16 in PACKED and x.dtype == torch.float32 and _product_type(x, weight) == torch.bfloat16


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's product is there for these."""
    return ONEDNN is not None and x.dtype == torch.float32 and _product_type(x, weight) == torch.float32


def _product_type(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """What a product on the CPU with a float32 weight computes in: float32, or autocast's type; None elsewhere."""
    if x.device.type != "cpu" or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    if torch.compiler.is_compiling():
        return None
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def learns(*tensors: Tensor | None) -> bool:
    """Whether a gradient is to reach any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _faster(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's is the product to take for a layer of these."""
    return FASTER and fits(x, weight) and _dense(x) and _dense(weight)


def _packed(x: Tensor, weight: Tensor) -> Tensor | None:
    """A parameter as autocast rounds it, laid out for oneDNN, once; None where that is not to be, or saves nothing."""
    if not in_long_region():
        return None
    dtype = _product_type(x, weight)
    if dtype not in PACKED:
        return None
    if dtype == torch.float32 and not (FASTER and x.dtype == dtype and x.numel() * weight.shape[0] > WORTH):
        return None
    return once(weight, "packed", dtype, lambda w: torch.ops.mkldnn._reorder_linear_weight(w.detach().to(dtype)))


def _computation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Map:
    """What computes :func:`linear` for inputs of the type and size of ``x``."""
    packed = _packed(x, weight)
    if packed is not None:
        return partial(_packed_product, weight=packed, bias=bias if bias is None else rounded(bias).to(packed.dtype))
    if not (x.numel() * weight.shape[0] > WORTH and _faster(x, weight)):
        return partial(F.linear, weight=rounded(weight), bias=bias if bias is None else rounded(bias))
    return partial(_product_of_rows, weight=weight, bias=bias)


def _packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x if x.dtype == weight.dtype else x.to(weight.dtype), weight, bias)


def _product_of_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out = _Linear.apply(rows, weight, bias) if learns(x, weight, bias) else _product(rows, weight, bias)  # type: ignore[no-untyped-call]
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], weight.shape[0])


def _dense(x: Tensor) -> bool:
    """Whether a matrix fills its memory by rows or by columns; oneDNN is slow on part of one."""
    return x.is_contiguous() or x.mT.is_contiguous()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = ONEDNN(x, weight, bias, "none", [], "")
    return out


def _batched_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    members = len(weight)
    inputs = x.unbind(0) if x.dim() == 3 else [x] * members
    biases = [None] * members if bias is None else bias.squeeze(1).unbind(0)
    product = F.linear if weight.shape[2] == 1 else _product  # a single column is faster one by one, but not by oneDNN
    return torch.stack([product(rows, w.t(), b) for rows, w, b in zip(inputs, weight.unbind(0), biases)])
