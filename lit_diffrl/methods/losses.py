"""The equations that offline learners share: targets, weights and losses as plain functions of tensors.

Sources: EDP (Kang et al. 2023), equations by number; Diffusion-QL (Wang et al. 2023); IQL (Kostrikov et al. 2022); CRR
(Wang et al. 2020); TD3+BC (Fujimoto and Gu 2021). Everything that weighs or normalises carries no gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.errors import ConfigError


def td_target(reward: Tensor, done: Tensor, discount: float | Tensor, next_value: Tensor) -> Tensor:
    """``r + gamma (1 - d) V(s')``.

    Args:
        reward: ``(B,)``.
        done: ``(B,)`` 1 where the episode terminated: nothing follows. A time limit is no end.
        discount: gamma, or gamma^n of n-step rewards.
        next_value: ``(B,)``.

    Raises:
        ConfigError: For other shapes, which would broadcast to ``(B, B)`` without a word.
    """
    if not reward.shape == done.shape == next_value.shape:
        raise ConfigError(
            f"reward, done and next_value must have one shape (B,), got {tuple(reward.shape)}, {tuple(done.shape)} and "
            f"{tuple(next_value.shape)}"
        )
    return reward + discount * (1 - done) * next_value


def td_loss(q: Tensor, y: Tensor) -> Tensor:
    """Sum over critics of the mean squared error to a common target.

    Args:
        q: ``(critics, B)``.
        y: ``(B,)``.
    """
    if q.shape[1:] != y.shape:
        raise ConfigError(f"q must be (critics, B) for a target (B,), got {tuple(q.shape)} and {tuple(y.shape)}")
    return (q - y).square().mean(dim=1).sum()


def max_backup(q: Tensor, top_k: int = 1) -> Tensor:
    """Max-Q backup: each critic's ``top_k``-th best of the candidates, then the least over critics.

    The other order, the least over critics first, is lower: a candidate then counts only where all critics like it.

    Args:
        q: ``(critics, B, candidates)``.
        top_k: 1 for the best.

    Returns:
        ``(B,)``.
    """
    return q.topk(top_k, dim=-1).values[..., -1].min(dim=0).values


def expectile_loss(u: Tensor, expectile: float) -> Tensor:
    """IQL's ``mean |tau - 1[u < 0]| u^2``: its minimum over V of ``u = Q - V`` is the expectile of Q."""
    return ((expectile - (u < 0).to(u.dtype)).abs() * u.square()).mean()


def exponential_weights(advantage: Tensor, inverse_temperature: float, bound: float) -> Tensor:
    """``min(exp(eta A), bound)`` without gradient; the exponent is capped first, so that it never overflows."""
    return (inverse_temperature * advantage.detach()).clamp_max(math.log(bound)).exp()


def crr_weights(advantage: Tensor, weighting: Literal["exp", "indicator"], beta: float, bound: float) -> Tensor:
    """CRR's weight of each data action, without gradient: ``min(exp(A / beta), bound)``, or ``1[A > 0]``."""
    if weighting == "indicator":
        return (advantage.detach() > 0).to(advantage.dtype)
    return exponential_weights(advantage, 1 / beta, bound)


def normalized_q_loss(q: Tensor, normalizer: Tensor | None = None) -> Tensor:
    """``-mean(Q) / mean|Q'|``: a policy loss whose size does not depend on the rewards' scale.

    Args:
        q: ``(B,)`` values of the policy's actions.
        normalizer: The values Q' divided by, or their mean size over all processes; any shape, without gradient.
            None for ``q`` itself. Diffusion-QL takes the other critic's.
    """
    scale = (q if normalizer is None else normalizer).detach().abs().mean()
    return -q.mean() / scale.clamp_min(1e-8)


def surrogate_log_prob(action: Tensor, a_hat: Tensor) -> Tensor:
    """EDP's Eq. 13: log-density ``(B,)`` of N(a_hat, I) at the action, which stands in for the policy's own."""
    constant = 0.5 * action.shape[-1] * math.log(2 * math.pi)
    return -0.5 * (action - a_hat).square().sum(-1) - constant


def elbo_weights(schedule: Schedule, *, normalize: bool = True) -> Tensor:
    """EDP's Eq. 12: weight of each diffusion step's error in the evidence lower bound.

    ``beta_k / (2 alpha_k (1 - alpha_bar_k))``, as the authors' code has it; the paper's ``alpha_bar_{k-1}`` makes the
    first weight infinite. A cosine schedule puts nearly all weight on its last step: use ``linear`` or ``vp``.

    Args:
        schedule: K steps.
        normalize: Divide by the mean over the steps, as the code does.

    Returns:
        ``(K,)`` float64, for k = 1..K.
    """
    beta, alpha, alpha_bar = (schedule.exact(name)[1:] for name in ("beta", "alpha", "alpha_bar"))
    weights = beta / (2 * alpha * (1 - alpha_bar))
    return weights / weights.mean() if normalize else weights


def choose_candidates(q: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """EDP's energy-based selection: draw an index from softmax(Q / temperature) for every state.

    Args:
        q: ``(n, candidates)``.
        temperature: 0 takes the best.
        uniform: ``(n,)`` in [0, 1), the source of chance.

    Returns:
        ``(n,)`` int64.
    """
    if temperature == 0:
        return q.argmax(dim=1)
    cumulative = (q.double() / temperature).softmax(dim=1).cumsum(dim=1)
    return torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:]).squeeze(1)


def indecision(q: Tensor, temperature: float) -> Tensor:
    """How evenly :func:`choose_candidates` chooses: entropy over its greatest value, from 0 (the best) to 1 (any).

    Args:
        q: ``(n, candidates)``, at least two.
        temperature: 0 takes the best.

    Returns:
        ``(2,)`` float64: sum over the n states, and n.
    """
    weights = (q.double() / temperature).softmax(dim=1) if temperature > 0 else q.new_zeros(q.shape)
    total = torch.special.entr(weights).sum() / math.log(q.shape[1])
    return torch.stack([total.double(), total.new_tensor(len(q)).double()])
