"""The covariance of the behaviour's posterior at one noisy action, from the derivative of its noise.

With the ideal network ``Sigma(a_t) = sigma^2 / alpha^2 (I - sigma d eps / d a_t)`` (second-order Tweedie), whatever the
behaviour is. A trained network's derivative need not be symmetric, nor the result positive: it is held where the
data's variance lets it be.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_diffrl.diffusion.vp_sde import VPSDE

EpsModel = Callable[[Tensor, Tensor], Tensor]
"""``(a_t (B, A), t (B,)) -> eps (B, A)``, each row by itself."""


def posterior_spread(
    eps_model: EpsModel, a_t: Tensor, t: Tensor, g: Tensor, sde: VPSDE, v_bar: Tensor | float | None = None
) -> Tensor:
    """``g^T Sigma g`` by one derivative of the noise.

    Args:
        eps_model: Noise of the behaviour.
        a_t: ``(B, A)`` noisy actions.
        t: ``(B,)`` their times.
        g: ``(B, A)`` the direction.
        sde: The schedule.
        v_bar: Variance of the data: the result is held between 0 and ``|g|^2`` times it; None: not held.

    Returns:
        ``(B,)`` without gradient.
    """
    slope = _slopes(eps_model, a_t, t, g.unsqueeze(0))[0]
    square = g.square().sum(-1)
    spread = sde.noise_to_signal(t) * (square - sde.sigma(t) * slope)
    return spread if v_bar is None else torch.minimum(spread.clamp_min(0), square * v_bar)


def variance_of_noise(square: Tensor, t: Tensor, sde: VPSDE, v_bar: Tensor | float | None = None) -> Tensor:
    """``sigma^2 / alpha^2 (1 - E|eps|^2 / A)``, the posterior's variance at one time (AEPO, Eq. 22).

    Args:
        square: Mean over noised actions and entries of the squared noise that the network predicts.
        t: ``(B,)`` times.
        sde: The schedule.
        v_bar: Variance of the data: the result is held between 0 and it; None: not held.
    """
    return _held(sde.noise_to_signal(t) * (1 - square), v_bar)


def posterior_variance(
    eps_model: EpsModel,
    a_t: Tensor,
    t: Tensor,
    sde: VPSDE,
    probes: Tensor | None = None,
    v_bar: Tensor | float | None = None,
) -> Tensor:
    """The posterior's variance, mean over directions, from the trace of the noise's derivative.

    Args:
        eps_model: Noise of the behaviour.
        a_t: ``(B, A)`` noisy actions.
        t: ``(B,)`` their times.
        sde: The schedule.
        probes: ``(P, B, A)`` random signs for an estimate of the trace; None for the trace itself, from A derivatives.
        v_bar: Variance of the data: the result is held between 0 and it; None: not held.

    Returns:
        ``(B,)`` without gradient.
    """
    if probes is None:
        trace = _slopes(eps_model, a_t, t, _units(a_t)).sum(0)
    else:
        trace = _slopes(eps_model, a_t, t, probes).mean(0)
    variance = sde.noise_to_signal(t) * (1 - sde.sigma(t) * trace / a_t.shape[-1])
    return _held(variance, v_bar)


def posterior_covariance(
    eps_model: EpsModel, a_t: Tensor, t: Tensor, sde: VPSDE, v_bar: Tensor | float | None = None
) -> Tensor:
    """All of Sigma, from A derivatives of the noise, of which the symmetric part counts.

    Args:
        eps_model: Noise of the behaviour.
        a_t: ``(B, A)`` noisy actions.
        t: ``(B,)`` their times.
        sde: The schedule.
        v_bar: Variance of the data, mean over directions: no direction's variance is let below 0, and where their mean
            exceeds the data's, all shrink by one factor (single directions of correlated data may well exceed it);
            None: not held.

    Returns:
        ``(B, A, A)`` symmetric, without gradient.
    """
    jacobian = _products(eps_model, a_t, t, _units(a_t)).movedim(0, 1)
    identity = torch.eye(a_t.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
    scale, sigma = (x[:, None, None] for x in (sde.noise_to_signal(t), sde.sigma(t)))
    covariance = scale * (identity - 0.5 * sigma * (jacobian + jacobian.mT))
    if v_bar is None:
        return covariance
    variances, basis = torch.linalg.eigh(covariance)
    variances = variances.clamp_min(0)
    mean = variances.mean(-1, keepdim=True)
    variances = variances * torch.where(mean > v_bar, v_bar / mean, 1.0)
    with torch.autocast(a_t.device.type, enabled=False):
        return basis * variances.unsqueeze(-2) @ basis.mT


def _held(variance: Tensor, v_bar: Tensor | float | None) -> Tensor:
    return variance if v_bar is None else variance.clamp_min(0).clamp_max(v_bar)


def _units(a_t: Tensor) -> Tensor:
    """The axes of the action as directions ``(A, B, A)``."""
    size = a_t.shape[-1]
    return torch.eye(size, dtype=a_t.dtype, device=a_t.device)[:, None].expand(-1, len(a_t), -1)


def _slopes(eps_model: EpsModel, a_t: Tensor, t: Tensor, directions: Tensor) -> Tensor:
    """``v^T (d eps / d a_t) v`` for directions ``v (P, B, A)``, as ``(P, B)``."""
    return (_products(eps_model, a_t, t, directions) * directions).sum(-1)


def _products(eps_model: EpsModel, a_t: Tensor, t: Tensor, directions: Tensor) -> Tensor:
    """``v^T d eps / d a_t`` for directions ``v (P, B, A)``, as ``(P, B, A)``."""
    with torch.enable_grad():
        x = a_t.detach().requires_grad_()
        eps = eps_model(x, t)
        return torch.stack([torch.autograd.grad((eps * v).sum(), x, retain_graph=True)[0] for v in directions])
