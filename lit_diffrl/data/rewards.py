"""Rewards as learners take them: tuned, summed over several steps; and which episodes are the best.

Sources: the tunings of Diffusion-QL, EDP, IQL and CQL by the names of their released code. Where those cut their flat
files into trajectories by themselves, the boundaries here are the Episodes' own, but for ``return_range_1000``.
"""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_diffrl.data.episodes import Episodes
from lit_diffrl.errors import DataError, check_choice

_log = logging.getLogger(__name__)

Tuning = Literal[
    "none",
    "cql_antmaze",
    "iql_antmaze",
    "antmaze",
    "standardise",
    "minmax",
    "return_range",
    "return_range_1000",
    "affine",
]
TUNINGS = get_args(Tuning)
# (scale, shift) of rewards 0 and 1.
ANTMAZE = {"cql_antmaze": (4.0, -2.0), "iql_antmaze": (1.0, -1.0), "antmaze": (2.0, -0.5)}


class Ahead(NamedTuple):
    """Several steps in one.

    Args:
        reward: ``(N,)`` discounted sum of the rewards of each step and those after it.
        last: ``(N,)`` the last step of that sum: the next state is the one after it.
        discount: ``(N,)`` what the value of that state is worth: the discount to the power of the steps summed.
    """

    reward: Tensor
    last: Tensor
    discount: Tensor


def episode_returns(episodes: Episodes) -> Tensor:
    """``(E,)`` float64 undiscounted rewards of each episode."""
    totals = torch.zeros(episodes.num_episodes, dtype=torch.float64)
    return totals.index_add(0, episodes.episode, episodes.reward.double())


def stretch_returns(episodes: Episodes, length: int = 1000) -> Tensor:
    """``(W,)`` float64 undiscounted rewards of stretches, as the codes of CORL and QGPO measure returns.

    They know D4RL's transitions without their episodes: a stretch ends where an episode terminates or after ``length``
    steps. The last step of an episode that was cut is not among these transitions, so a full episode has one step less
    than its limit, and stretches begin one step later in each. What is left at the end is no stretch.

    Args:
        episodes: Steps in order.
        length: Longest stretch.
    """
    left = ~episodes.truncated
    reward, terminated = episodes.reward[left].double(), episodes.terminated[left]
    step = torch.arange(len(reward))
    after = torch.where(terminated, step + 1, 0).cummax(0).values  # the first step since the last termination
    begun = torch.cat([after.new_zeros(1), after[:-1]])[: len(reward)]
    place = (step - begun) % length
    number = (place == 0).cumsum(0)
    totals = torch.zeros(int(number[-1]) if len(number) else 0, dtype=torch.float64).index_add(0, number - 1, reward)
    whole = len(reward) == 0 or bool(terminated[-1]) or int(place[-1]) == length - 1
    return totals if whole else totals[:-1]


def best_episodes(returns: Tensor, fraction: float) -> Tensor:
    """Find the episodes of highest return, at least one.

    Args:
        returns: ``(E,)``.
        fraction: Fraction of the episodes.

    Returns:
        ``(E,)`` bool; of equal returns the earlier episode counts as better.
    """
    # 0.29 * 100 is 28.999…, and means 29.
    count = max(1, int(fraction * len(returns) + 1e-9))
    best = torch.zeros(len(returns), dtype=torch.bool)
    best[torch.sort(returns, descending=True, stable=True).indices[:count]] = True
    return best


def tune_rewards(
    tuning: str, reward: Tensor, returns: Tensor, *, source: str, scale: float = 10.0, shift: float = -5.0
) -> Tensor:
    """Rescale rewards.

    - ``none``: r.
    - ``cql_antmaze``: 4 (r - 0.5), rewards 0 and 1 become -2 and 2.
    - ``iql_antmaze``: r - 1, they become -1 and 0.
    - ``antmaze``: 2 (r - 0.25), they become -0.5 and 1.5.
    - ``standardise``: mean 0 and (sample) deviation 1 over all steps.
    - ``minmax``: least -1 and greatest 1.
    - ``return_range``: 1000 r / (greatest - least return of an episode).
    - ``return_range_1000``: the same with the returns of :func:`stretch_returns`.
    - ``affine``: scale r + shift.

    Args:
        tuning: One of these.
        reward: ``(N,)`` float32.
        returns: ``(E,)`` undiscounted returns of the episodes, for ``return_range_1000`` of stretches.
        source: Name of the dataset, for messages.
        scale: Of ``affine``.
        shift: Of ``affine``.

    Returns:
        ``(N,)`` float32, computed in float64.

    Raises:
        ConfigError: For another tuning.
        DataError: When the rewards are not of a kind that it can rescale.
    """
    check_choice("data.reward", tuning, TUNINGS)
    r = reward.double()
    if tuning in ANTMAZE:
        if not bool(((r == 0) | (r == 1)).all()) or not bool((r == 1).any()):
            raise DataError(
                f"{source}: data.reward {tuning!r} is for rewards of 0 and, at the goal, 1; these lie in "
                f"[{r.min():g}, {r.max():g}] and {int((r == 1).sum())} of {len(r)} are 1; use another, e.g. none, or "
                "get the dataset again if it should have such rewards"
            )
        scale, shift = ANTMAZE[tuning]
    elif tuning == "standardise":
        scale = 1 / _positive(source, tuning, "rewards", r.std() if len(r) > 1 else r.new_zeros(()), r)
        shift = -float(r.mean()) * scale
    elif tuning == "minmax":
        scale = 2 / _positive(source, tuning, "rewards", r.max() - r.min(), r)
        shift = -1 - float(r.min()) * scale
    elif tuning in ("return_range", "return_range_1000"):
        of = "episodes'" if tuning == "return_range" else "stretches'"
        if len(returns) == 0:
            raise DataError(f"{source}: data.reward {tuning!r} needs 1000 steps or a termination; use return_range")
        scale, shift = 1000 / _positive(source, tuning, f"{of} returns", returns.max() - returns.min(), returns), 0
        _log.info("%s: data.reward %s multiplies rewards by %.6g", source, tuning, scale)
    elif tuning == "none":
        return reward
    return (r * scale + shift).float()


def _positive(source: str, tuning: str, what: str, spread: Tensor, values: Tensor) -> float:
    if float(spread) > 0:
        return float(spread)
    raise DataError(
        f"{source}: data.reward {tuning!r} divides by the spread of the {what}, but all {len(values)} are "
        f"{float(values[0]):g}; use another, e.g. none"
    )


def look_ahead(episodes: Episodes, reward: Tensor, n: int, discount: float) -> Ahead:
    """Sum the rewards of ``n`` steps from each step on, or of as many as its episode has left.

    Args:
        episodes: Steps in order.
        reward: ``(N,)`` their rewards.
        n: Steps summed.
        discount: Factor per step.
    """
    steps = torch.arange(episodes.num_steps)
    last = torch.minimum(steps + n, episodes.ends[episodes.episode]) - 1
    total = reward.double()
    for ahead in range(1, n):
        index = steps + ahead
        inside = index <= last
        total = total + discount**ahead * reward[index.clamp_max(len(steps) - 1)].double() * inside
    return Ahead(total.float(), last, (discount ** (last - steps + 1).double()).float())
