"""Where AEPO expands Q, and what it takes of Q there (Eqs. 15 and 46)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_diffrl.methods.energy import curvature_of, expansion_point, hessian_of
from lit_diffrl.methods.energy_options import TargetOptions


class Expansion(NamedTuple):
    """Q around a point.

    Args:
        q_bar: ``(B,)`` its value there.
        grad: ``(B, A)`` its gradient, of there or (Eq. 46's reuse) of the data's action.
        a_bar: ``(B, A)`` the point.
        second: Its second derivative where the gradient is: ``(B,)`` along it (``hvp``), ``(B, A, A)`` (``full``), or
            an empty tensor.
    """

    q_bar: Tensor
    grad: Tensor
    a_bar: Tensor
    second: Tensor


def expand(
    q: Callable[[Tensor], Tensor], action: Tensor, mu: Tensor, fixed: Tensor, options: TargetOptions
) -> Expansion:
    """Expand Q as the options say; nothing carries a gradient.

    Args:
        q: ``(B, A) -> (B,)``, Q in the states of the batch.
        action: ``(B, A)`` actions of the data.
        mu: ``(B, A)`` posterior means.
        fixed: ``(A,)`` the point of ``a_bar: fixed``.
        options: Where and how far.
    """
    derive = {"none": gradient_of, "hvp": curvature_of, "full": hessian_of}[options.curvature]
    a_bar = action
    if options.form == "aepo" and options.a_bar == "data_grad_step":
        derived = derive(q, action)
        a_bar = expansion_point(action, derived[1], options.eta, normalized=options.eta_normalized)
        if options.grad_at == "a0":
            return Expansion(q(a_bar).detach(), derived[1], a_bar, _second(derived))
    elif options.form == "aepo":
        a_bar = {"data": action, "posterior_mean": mu, "fixed": fixed.expand_as(action)}[options.a_bar]
    derived = derive(q, a_bar)
    return Expansion(derived[0], derived[1], a_bar, _second(derived))


def gradient_of(q: Callable[[Tensor], Tensor], action: Tensor) -> tuple[Tensor, Tensor]:
    """Value ``(B,)`` and gradient ``(B, A)`` of ``q`` at actions ``(B, A)``, as constants."""
    with torch.enable_grad():
        action = action.detach().requires_grad_()
        value = q(action)
        (grad,) = torch.autograd.grad(value.sum(), action)
    return value.detach(), grad


def _second(derived: tuple[Tensor, ...]) -> Tensor:
    return derived[2] if len(derived) == 3 else derived[0].new_empty(0)
