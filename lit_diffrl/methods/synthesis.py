"""The equations of synthetic experience as plain functions: DyDiff (Zhao et al. 2024), equations by number.

Trajectories are ``(B, H, obs)`` states beside ``(B, H, action)`` actions: H pairs, hence H - 1 transitions; the last
action is conditioned on and never stored. Joined, states come first: ``(B, H, obs + action)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_diffrl.errors import ConfigError, check_choice, check_range

Policy = Callable[[Tensor], Tensor]
"""``states (..., obs) -> actions (..., action)``."""

Dynamics = Callable[[Tensor, Tensor], Tensor]
"""``(states (B, obs), actions (B, action)) -> next states (B, obs)``."""

PredictStates = Callable[[Tensor, Tensor], Tensor]
"""``(first states (B, obs), actions (B, H, action)) -> states (B, H, obs)``, the first of them as given."""


class Transitions(NamedTuple):
    """Transitions cut out of trajectories.

    Args:
        obs: ``(N, obs)``.
        action: ``(N, action)``.
        reward: ``(N,)``.
        next_obs: ``(N, obs)``.
        done: ``(N,)`` 1.0 where the next state is terminal, else 0.0.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    done: Tensor


# -------------------------------------------------------------------- rollouts


def condition(x: Tensor, first: Tensor, actions: Tensor) -> Tensor:
    """Eq. 3: write the first state and all actions into trajectories; nothing of the arguments is changed.

    Args:
        x: ``(B, H, obs + action)``.
        first: ``(B, obs)``.
        actions: ``(B, H, action)``.
    """
    obs_dim = first.shape[-1]
    written = x.clone()
    written[:, 0, :obs_dim] = first
    written[:, :, obs_dim:] = actions
    return written


def generated(x: Tensor, obs_dim: int) -> Tensor:
    """Entries that the model generates, the mask of Eq. 4: all states but the first, as ``(1, H, obs + action)``."""
    mask = torch.zeros((1, *x.shape[1:]), dtype=torch.bool, device=x.device)
    mask[:, 1:, :obs_dim] = True
    return mask


def single_step_rollout(first: Tensor, policy: Policy, dynamics: Dynamics, horizon: int) -> tuple[Tensor, Tensor]:
    """Eq. 6: the policy acts in a one-step model.

    Args:
        first: ``(B, obs)``.
        policy: Chooses the actions.
        dynamics: The one-step model.
        horizon: Pairs H.

    Returns:
        States ``(B, H, obs)`` and actions ``(B, H, action)``.
    """
    states, actions = [first], [policy(first)]
    for _ in range(horizon - 1):
        states.append(dynamics(states[-1], actions[-1]))
        actions.append(policy(states[-1]))
    return torch.stack(states, dim=1), torch.stack(actions, dim=1)


def correct(old: Tensor, new: Tensor, beta: float) -> Tensor:
    """``(1 - beta) old + beta new``: 1 replaces, as the paper says, 0.5 averages, as its code does."""
    return torch.lerp(old, new, beta)


def iterate_correction(
    states: Tensor, actions: Tensor, predict: PredictStates, policy: Policy, *, rounds: int, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Eqs. 7 to 9: the model predicts the states that the actions lead to, the policy acts in these, and so on.

    With exact dynamics and ``beta`` 1 each round makes one more state exact, but errors may grow on the way; a smaller
    ``beta`` damps that.

    Args:
        states: ``(B, H, obs)``.
        actions: ``(B, H, action)``.
        predict: The trajectory model.
        policy: Chooses the actions in all states at once.
        rounds: Number of rounds M; 0 leaves everything as it is.
        beta: Weight of the new states.

    Returns:
        States, actions, and the actions of the round before, which led to the newest states.
    """
    previous = actions
    for _ in range(rounds):
        states = correct(states, predict(states[:, 0], actions), beta)
        previous, actions = actions, policy(states)
    return states, actions, previous


# -------------------------------------------------------------------- ends, returns, storing


def running(done: Tensor) -> Tensor:
    """Which states ``(B, H)`` of trajectories are neither terminal nor later than a terminal one.

    Args:
        done: ``(B, H - 1)`` bool, whether the state after transition t is terminal.
    """
    return torch.cat([torch.ones_like(done[:, :1]), done.long().cumsum(1) == 0], dim=1)


def trajectory_returns(reward: Tensor, done: Tensor | None) -> Tensor:
    """Eq. 11: sums of rewards ``(B,)``.

    Args:
        reward: ``(B, H)`` of all pairs.
        done: ``(B, H - 1)`` bool; a pair in a terminal state or later counts for nothing. None counts all pairs, as
            DyDiff's code does.
    """
    if done is None:
        return reward.sum(1)
    return torch.where(running(done), reward, 0.0).sum(1)


def cut_transitions(states: Tensor, actions: Tensor, reward: Tensor, done: Tensor) -> Transitions:
    """Transitions of trajectories up to and including the one that ends each; one trajectory after the other.

    Args:
        states: ``(B, H, obs)``.
        actions: ``(B, H, action)``.
        reward: ``(B, H)``.
        done: ``(B, H - 1)`` bool.

    Raises:
        ConfigError: When their lengths do not belong together.
    """
    pairs = states.shape[:2]
    if not (actions.shape[:2] == reward.shape == pairs and done.shape == (pairs[0], pairs[1] - 1)):
        raise ConfigError(
            f"states, actions and reward must be (B, H, …) and done (B, H - 1), got {tuple(states.shape)}, "
            f"{tuple(actions.shape)}, {tuple(reward.shape)} and {tuple(done.shape)}"
        )
    kept = running(done)[:, :-1]
    return Transitions(
        states[:, :-1][kept], actions[:, :-1][kept], reward[:, :-1][kept], states[:, 1:][kept], done[kept].to(reward)
    )


# -------------------------------------------------------------------- filters


def keep_hardmax(returns: Tensor, share: float) -> Tensor:
    """The best trajectories: all whose return reaches the quantile ``1 - share``; ties may add some.

    Args:
        returns: ``(B,)``.
        share: Proportion to keep, eta.

    Returns:
        Indices, ascending.
    """
    check_range("share to keep", share, 0, 1, low_open=True)
    exact = returns.double()
    return (exact >= exact.quantile(1 - share)).nonzero().squeeze(1)


def filter_log_probs(
    returns: Tensor, *, temperature: float = 0.05, floor: float = 1e-6, scale: Literal["zscore", "raw"] = "zscore"
) -> Tensor:
    """Logarithms ``(B,)`` float64 of the probabilities that trajectories are drawn by, good ones with higher ones.

    ``p = (1 - floor) softmax(z / temperature) + floor / B``, z the returns' z-scores: DyDiff's code. The paper's own
    ``softmax(R)`` is ``temperature=1, floor=0, scale="raw"``; sums over a trajectory differ by tens, so that it is
    the maximum in effect.

    Args:
        returns: ``(B,)``.
        temperature: Low ones are greedy; but with ``floor`` only those within ``temperature ln(B / floor)`` of the
            best stand out of it.
        floor: Share of the probability that is spread evenly.
        scale: ``zscore`` of the returns, or ``raw``.
    """
    check_range("temperature", temperature, 0, low_open=True)
    check_range("floor", floor, 0, 1, high_open=True)
    check_choice("scale", scale, ("zscore", "raw"))
    z = returns.double()
    if scale == "zscore":
        z = (z - z.mean()) / (z.std(correction=0) + 1e-6)
    log_p = (z / temperature).log_softmax(0)
    if floor > 0:
        even = torch.full_like(log_p, floor / len(z))
        log_p = torch.logaddexp(log_p + math.log1p(-floor), even.log())
    return log_p


def keep_softmax(log_probs: Tensor, share: float, gumbel: Tensor) -> Tensor:
    """Trajectories drawn without replacement, by Gumbel's trick: exactly as one after the other.

    In float64, where ``torch.multinomial`` in float32 returns impossible ones once probabilities underflow.

    Args:
        log_probs: ``(B,)`` float64, as of :func:`filter_log_probs`.
        share: Proportion to keep, eta: ``int(share B)`` of them.
        gumbel: ``(..., B)`` float64 Gumbel noise, as of :func:`gumbel_noise`.

    Returns:
        Indices ``(..., int(share B))``, ascending.
    """
    check_range("share to keep", share, 0, 1, low_open=True)
    return (log_probs + gumbel).topk(int(share * len(log_probs))).indices.sort().values


def gumbel_noise(normal: Tensor) -> Tensor:
    """Gumbel noise in float64 from standard normal numbers: ``-ln(-ln Phi(n))``."""
    return -(-torch.special.log_ndtr(normal.double())).log()


def overlap_with_best(kept: Tensor, returns: Tensor) -> Tensor:
    """Share of the kept trajectories, by index, that are among as many of the best; a scalar."""
    best = returns.topk(len(kept)).indices
    return torch.isin(kept, best).double().mean()


def kept_by_decile(kept: Tensor, returns: Tensor) -> Tensor:
    """Share kept ``(10,)`` of each tenth of the trajectories, from the best to the worst."""
    chosen = torch.zeros(len(returns), dtype=torch.float64, device=returns.device)
    chosen[kept] = 1.0
    ranked = chosen[returns.argsort(descending=True)]
    return torch.stack([part.mean() for part in ranked.tensor_split(10)])
