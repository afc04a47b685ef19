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
    dim = method.spec.action_dim  # type: ignore[union-attr]
    noise = normal(torch.Generator().manual_seed(1), obs, 1, actions, dim)
    found = [judged(method, part, noise.expand(len(part), -1, -1)) for part in obs.split(CHUNK)]
    support, q = (torch.cat(tensors) for tensors in zip(*found))

    @torch.no_grad()
    def gradient(x: Tensor, t: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        of_row = torch.arange(len(obs), device=obs.device).repeat_interleave(len(rows) // len(obs))
        every = t.expand(len(rows))
        _, found = monte_carlo_energy(rows, every, support[of_row], q[of_row], method.sde, method.beta)
        return found.view_as(x)

    return gradient


def normal(generator: torch.Generator, like: Tensor, *shape: int) -> Tensor:
    """Standard normal, with device and type of ``like``; the same on any device and under any default precision."""
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(like)


def judged(method: EnergyLearner, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Actions ``(B, M, A)`` of the behaviour model in states ``(B, S)``, from noise like them, and their Q."""
    support = method.draw_actions(obs, noise, method.sampler, (0.0, False)).clamp(-1, 1)
    return support, method.q_of(obs)(support)


@torch.no_grad()
def check_guidance(method: EnergyLearner, obs: Tensor, times: list[float], actions: int) -> list[GuidanceCheck]:
    """Compare on actions that the behaviour model draws and noise that is added to them.

    What is compared is what guides, or the energy network where that is Monte Carlo itself.

    Args:
        method: A policy whose energy has learnt.
        obs: ``(B, S)`` states, normalised, on the method's device.
        times: Times in [1e-3, 1].
        actions: M, actions drawn in each state.

    Returns:
        One for each time.
    """
    generator, dim = torch.Generator().manual_seed(0), method.spec.action_dim  # type: ignore[union-attr]
    learnt_guidance = method.network_guidance if method.guidance == "monte_carlo" else method.guidance_of
    found = []
    for part in obs.split(CHUNK):
        n = len(part)
        drawn, q = judged(method, part, normal(generator, part, n, actions + 1, dim))
        action, support, q = drawn[:, 0], drawn[:, 1:], q[:, 1:]
        gradient = learnt_guidance(part, times)
        for time in times:
            t = part.new_tensor([time])
            every = t.expand(n)
            a_t = method.sde.q_sample(action, every, normal(generator, part, n, dim))
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
