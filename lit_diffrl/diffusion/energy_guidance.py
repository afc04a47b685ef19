"""Steering a sampler by the gradient of an intermediate energy (CEP, Lu et al. 2023; AEPO, Hu et al. 2025).

Where ``pi_t = mu_t exp(E_t) / Z``, the scores differ by the energy's gradient, and the noises by ``sigma_t`` times it
(AEPO, Eq. 14):

    eps_pi = eps_mu - omega sigma_t grad E_t

With the exact energy and ``omega = 1`` the samples are the policy's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lit_diffrl.diffusion.dpm_ode import EpsModel
from lit_diffrl.diffusion.vp_sde import VPSDE, at_time, over_rows
from lit_diffrl.errors import ConfigError

Gradient = Callable[[Tensor, Tensor], Tensor]
"""``(x (B, ..., A), t (1,)) -> gradient of the energy, like x``."""

Rescale = bool | Literal["sample", "batch", "term"]
RESCALES = (False, True, "sample", "batch", "term")


def guided_eps(
    eps: Tensor, grad: Tensor, sigma: Tensor | float, scale: Tensor | float = 1.0, rescale: Rescale = False
) -> Tensor:
    """The noise of the guided policy (AEPO, Eqs. 14 and 45).

    Rescaling keeps the length of the score and lets the energy decide only on its direction. The result is no sample of
    the tilted distribution, and in one dimension nothing but a sign; returns hold for larger scales.

    Args:
        eps: Noise that the behaviour's network predicts, ``(B, ..., A)``.
        grad: Gradient of the energy with respect to the noisy action, like ``eps``.
        sigma: Factor of the noise at this time: a number, or one for each row.
        scale: Guidance degree omega: a number, or ``(B,)``, one for each row.
        rescale: ``sample`` (or True) gives each action's score the length that it has without guidance, ``batch`` all
            scores together, ``term`` gives the guidance alone ``scale`` times that length.

    Returns:
        The guided noise, like ``eps``.
    """
    if isinstance(scale, Tensor) and scale.dim() > 0:
        scale = over_rows(scale, eps)
    if isinstance(sigma, Tensor) and sigma.dim() > 0:
        sigma = over_rows(sigma, eps)
    if rescale == "term":
        term = sigma * grad
        guided = eps - scale * term * (_length(eps) / (_length(term) + 1e-8))
        return guided.to(eps.dtype)
    guided = eps - scale * sigma * grad
    if rescale == "batch":
        guided = guided * (eps.norm() / (guided.norm() + 1e-8))
    elif rescale:
        guided = guided * (_length(eps) / (_length(guided) + 1e-8))
    return guided.to(eps.dtype)


def guide(
    eps_model: EpsModel,
    gradient: Gradient,
    sde: VPSDE,
    scale: Tensor | float = 1.0,
    rescale: Rescale = False,
    t_max: float = 1.0,
) -> EpsModel:
    """Wrap a noise model by an energy, for a sampler.

    Args:
        eps_model: Noise of the behaviour, ``(x, t (1,)) -> eps``.
        gradient: Gradient of the energy.
        sde: The schedule.
        scale: Guidance degree, as for :func:`guided_eps`; the number 0 is the behaviour itself and asks no gradient.
        rescale: As for :func:`guided_eps`.
        t_max: No guidance at later times.

    Returns:
        Noise of the guided policy.

    Raises:
        ConfigError: For an unknown ``rescale``.
    """
    if rescale not in RESCALES:
        raise ConfigError(f"rescale must be one of {', '.join(map(str, RESCALES))}; got {rescale!r}")
    if not isinstance(scale, Tensor) and scale == 0:
        return eps_model

    def guided(x: Tensor, t: Tensor) -> Tensor:
        eps = eps_model(x, t).to(x.dtype)
        if t_max < 1 and t.item() > t_max:
            return eps
        return guided_eps(eps, gradient(x, t), at_time(sde.sigma, t), scale, rescale)

    return guided


def gradient_of(energy: Callable[[Tensor, Tensor], Tensor]) -> Gradient:
    """The gradient of any energy ``(x (B, ..., A), t (1,)) -> (B, ...)`` by autograd.

    It works where gradients are switched off, in inference mode too, and leaves the ``.grad`` of weights alone.
    """

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            # clones, made here: autograd takes no tensor that was made in inference mode
            x, t = x.detach().clone().requires_grad_(), t.clone()
            (grad,) = torch.autograd.grad(energy(x, t).sum(), x)
            return grad

    return gradient


def _length(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)
