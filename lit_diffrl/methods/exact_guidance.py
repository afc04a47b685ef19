"""The exact guidance by Monte Carlo, to act with, and beside a learnt one, by time: where an energy goes wrong.

The exact energy ``log E[exp(beta Q(s, a_0)) | a_t]`` (AEPO, Eqs. 12 and 13) is known by Monte Carlo: of many actions
that the behaviour model draws in a state, each has a share in what became ``a_t``. Critics and behaviour model are
taken as they are, so what differs is the energy's own error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_diffrl.diffusion.energy_guidance import Gradient
from lit_diffrl.methods.energy import monte_carlo_energy, support_log_weights

if TYPE_CHECKING:
    from lit_diffrl.methods.energy_learner import EnergyLearner

CHUNK = 16  # states whose actions are drawn at once


class GuidanceCheck(NamedTuple):
    """Guidance at one time at degree 1, medians over states.

    Args:
        t: The time.
        exact: Length of the exact guidance ``sigma_t grad E_t``; that of the noise it is taken from is about
            ``sqrt(A)``.
        learnt: Length of the policy's.
        cosine: Of the angle between the two.
        actions: How many actions the exact one rests on: one over the sum of their squared shares, without or with Q,
            whichever is less. Where it is but a few, as at small times with actions of many dimensions or where Q
            differs by much more than ``1 / beta``, the exact one is not known.
    """

    t: float
    exact: float
    learnt: float
    cosine: float
    actions: float


@torch.no_grad()
def monte_carlo_guidance(method: EnergyLearner, obs: Tensor, actions: int) -> Gradient:
    """The exact guidance in states ``(B, S)``, normalised, as far as ``actions`` of the behaviour model tell.

    They are drawn from the same noise in every state and at every call, so that an action of the policy depends on its
    own state and noise alone.
    """
    noise = torch.randn(1, actions, method.spec.action_dim, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    noise = noise.to(obs)
    drawn = [draw(method, part, noise.expand(len(part), -1, -1)) for part in obs.split(CHUNK)]
    support = torch.cat(drawn)
    q = method.q_of(obs)(support).to(support)

    @torch.no_grad()
    def gradient(x: Tensor, t: Tensor) -> Tensor:
        return monte_carlo_energy(x, t.expand(len(x)), support, q, method.sde, method.beta)[1]

    return gradient


def draw(method: EnergyLearner, obs: Tensor, noise: Tensor) -> Tensor:
    """Actions ``(B, M, A)`` of the behaviour model in states ``(B, S)``, from noise like them."""
    return method.draw_actions(obs, noise, method.sampler, (0.0, False)).clamp(-1, 1)


@torch.no_grad()
def check_guidance(method: EnergyLearner, obs: Tensor, times: list[float], actions: int) -> list[GuidanceCheck]:
    """Compare on actions that the behaviour model draws and noise that is added to them.

    Args:
        method: A policy whose energy has learnt.
        obs: ``(B, S)`` states, normalised, on the method's device.
        times: Times in [1e-3, 1].
        actions: M, actions drawn in each state.

    Returns:
        One for each time.
    """
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same on any device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(obs)

    found = []
    for part in obs.split(CHUNK):
        n, dim = len(part), method.spec.action_dim  # type: ignore[union-attr]
        drawn = draw(method, part, normal(n, actions + 1, dim))
        action, support = drawn[:, 0], drawn[:, 1:]
        q, gradient = method.q_of(part)(support), method.guidance_of(part, times)
        for time in times:
            t = part.new_tensor([time])
            every = t.expand(n)
            a_t = method.sde.q_sample(action, every, normal(n, dim))
            sigma = method.sde.sigma(t)
            exact = sigma * monte_carlo_energy(a_t, every, support, q, method.sde, method.beta)[1]
            learnt = sigma * gradient(a_t, t)
            log_w = support_log_weights(a_t, every, support, method.sde)
            shares = torch.stack([log_w, log_w + method.beta * q]).softmax(-1)
            counted = (1 / shares.square().sum(-1)).amin(0)
            cosine = F.cosine_similarity(exact, learnt, dim=-1)
            found.append(torch.stack([exact.norm(dim=-1), learnt.norm(dim=-1), cosine, counted]))
    by_time = torch.stack([torch.cat(found[i :: len(times)], dim=1) for i in range(len(times))])
    medians = by_time.double().median(dim=-1).values.tolist()
    return [GuidanceCheck(t, *row) for t, row in zip(times, medians)]
