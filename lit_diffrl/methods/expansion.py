"""Where AEPO expands Q, what it takes of Q there, and the energy that this makes (Eqs. 15, 25 and 46)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_diffrl.methods.energy import (
    analytic_energy,
    curved_energy,
    expansion_point,
    second_order_energy,
    two_cumulant_energy,
)
from lit_diffrl.methods.energy_options import TargetOptions

Value = Callable[[Tensor], Tensor]
"""Q in the states of a batch, ``(B, A) -> (B,)``, each row by itself; for second derivatives differentiable twice."""


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


def expand(q: Value, action: Tensor, mu: Tensor, fixed: Tensor, options: TargetOptions) -> Expansion:
    """Expand Q as the options say; nothing carries a gradient.

    Args:
        q: The value.
        action: ``(B, A)`` actions of the data.
        mu: ``(B, A)`` posterior means.
        fixed: ``(A,)`` the point of ``a_bar: fixed``.
        options: Where and how far.
    """
    a_bar = action
    if options.form == "aepo" and options.a_bar == "data_grad_step":
        there = expand_at(q, action, options.curvature)
        a_bar = expansion_point(action, there.grad, options.eta, normalized=options.eta_normalized)
        if options.grad_at == "a0":
            return there._replace(q_bar=q(a_bar).detach(), a_bar=a_bar)
    elif options.form == "aepo":
        a_bar = {"data": action, "posterior_mean": mu, "fixed": fixed.expand_as(action)}[options.a_bar]
    return expand_at(q, a_bar, options.curvature)


def expand_at(q: Value, a_bar: Tensor, curvature: str, *, graph: bool = False) -> Expansion:
    """Expand Q at points ``(B, A)``, as far as ``curvature`` says; arguments as :func:`gradient_of`."""
    derive = {"none": gradient_of, "hvp": curvature_of, "full": hessian_of}[curvature]
    q_bar, grad, *second = derive(q, a_bar, graph=graph)
    return Expansion(q_bar, grad, a_bar, second[0] if second else q_bar.new_empty(0))


def energy_of(found: Expansion, mu: Tensor, cov: Tensor, beta: float, options: TargetOptions) -> Tensor:
    """The energy that a Gaussian posterior gives to the expanded Q, of the form and order of the options (Eq. 25).

    Args:
        found: The expansion.
        mu: ``(B, A)`` posterior means.
        cov: ``(B,)`` variance of the posterior, or, with ``curvature`` full, its covariance ``(B, A, A)``.
        beta: Inverse temperature.
        options: Form and curvature.

    Returns:
        ``(B,)``.
    """
    q_bar, grad, a_bar, second = found
    if options.form == "two_cumulant":
        return two_cumulant_energy(q_bar, grad, cov, beta)
    if options.curvature == "full":
        return second_order_energy(q_bar, grad, second, mu, a_bar, cov, beta)
    if options.curvature == "hvp":
        return curved_energy(q_bar, grad, mu, a_bar, cov, second, beta)
    return analytic_energy(q_bar, grad, mu, a_bar, cov, beta)


# ---------------------------------------------------------------- derivatives of Q


def gradient_of(q: Value, action: Tensor, *, graph: bool = False) -> tuple[Tensor, ...]:
    """Value ``(B,)`` and gradient ``(B, A)``.

    Args:
        q: The value.
        action: ``(B, A)`` where.
        graph: The results are functions of ``action``, which then requires a gradient; otherwise constants.
    """
    with torch.enable_grad():
        action = action if graph else action.detach().requires_grad_()
        value = q(action)
        (grad,) = torch.autograd.grad(value.sum(), action, create_graph=graph)
    return _results(graph, value, grad)


def hessian_of(q: Value, action: Tensor, *, graph: bool = False) -> tuple[Tensor, ...]:
    """Value ``(B,)``, gradient ``(B, A)`` and second derivative ``(B, A, A)``, for A products with the latter.

    Arguments as :func:`gradient_of`.
    """
    with torch.enable_grad():
        action = action if graph else action.detach().requires_grad_()
        value, grad = gradient_of(q, action, graph=True)
        second = torch.stack([_derivative(grad[:, i], action, graph) for i in range(action.shape[-1])], dim=-1)
    return _results(graph, value, grad, second)


def curvature_of(q: Value, action: Tensor, *, graph: bool = False) -> tuple[Tensor, ...]:
    """Value ``(B,)``, gradient g ``(B, A)`` and ``g^T H g (B,)``, for one product with H.

    Arguments as :func:`gradient_of`.
    """
    with torch.enable_grad():
        action = action if graph else action.detach().requires_grad_()
        value, grad = gradient_of(q, action, graph=True)
        bent = _derivative(0.5 * grad.square().sum(-1), action, graph)  # H g
        along = (bent * grad).sum(-1)
    return _results(graph, value, grad, along)


def _derivative(y: Tensor, x: Tensor, graph: bool) -> Tensor:
    """Derivative of ``y (B,)`` with respect to ``x (B, A)``; 0 where y is linear in x, and torch knows of none."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(y.sum(), x, retain_graph=True, create_graph=graph, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad


def _results(graph: bool, *results: Tensor) -> tuple[Tensor, ...]:
    return results if graph else tuple(x.detach() for x in results)
