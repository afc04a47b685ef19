"""Where windows may begin, where a maze walk is cut, and what a step is worth: pure functions over episodes.

Source: Diffuser (Janner et al. 2022) and its released data pipeline.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffrl.data.episodes import Episodes
from lit_diffrl.errors import DataError


def window_starts(
    lengths: Tensor, span: int, *, use_padding: bool, max_path_length: int | None, compat: bool
) -> Tensor:
    """Number of window starts in each episode.

    Args:
        lengths: ``(E,)`` episode lengths.
        span: Steps that a window covers (its horizon, when the stride is 1).
        use_padding: Windows may run past the end of the episode.
        max_path_length: Length of the stored array in the released code, which bounds the starts.
        compat: Lose the last start, as the released code does (its upper bound is exclusive).

    Returns:
        ``(E,)`` counts; the starts of an episode are ``0 .. count - 1``.
    """
    last = lengths - 1
    if max_path_length is not None:
        last = torch.minimum(last, torch.full_like(last, max_path_length - span))
    if not use_padding:
        last = torch.minimum(last, lengths - span)
    return (last if compat else last + 1).clamp_min(0)


def keep_steps(episodes: Episodes, keep: Tensor) -> Episodes:
    """Leave out steps: whole episodes, or the last steps of some, which then count as cut.

    Args:
        episodes: Steps in order.
        keep: ``(N,)`` bool; in every episode no step that is left out comes before one that is kept.
    """
    lengths = torch.zeros_like(episodes.starts).index_add(0, episodes.episode, keep.long())
    lengths = lengths[lengths > 0]
    ends = lengths.cumsum(0)
    terminated = episodes.terminated[keep]
    truncated = torch.zeros_like(terminated)
    truncated[ends - 1] = ~terminated[ends - 1]
    return Episodes(
        obs=episodes.obs[keep],
        action=episodes.action[keep],
        reward=episodes.reward[keep],
        terminated=terminated,
        truncated=truncated,
        next_obs=episodes.next_obs[keep],
        starts=ends - lengths,
    )


def goal_departures(episodes: Episodes, goal: list[float], radius: float = 0.5) -> Episodes:
    """Cut a maze walk as Diffuser does: an episode runs from one departure from the goal to the next.

    The data's own flags are discarded; a step within ``radius`` of the goal that is followed by one outside ends
    an episode. The last step of each episode and everything after the last departure are dropped.

    Raises:
        DataError: When the walk never leaves the goal.
    """
    target = torch.tensor(goal, dtype=episodes.obs.dtype)
    near = (episodes.obs[:, : len(goal)] - target).norm(dim=-1) <= radius
    ends = torch.nonzero(near[:-1] & ~near[1:]).flatten() + 1
    if len(ends) == 0:
        raise DataError(
            f"segmentation 'goal' needs data that leaves the goal {goal}: no step within {radius} of it is followed "
            "by one outside; use --data.segmentation episodes"
        )
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    keep = torch.cat([torch.arange(int(s), int(e) - 1) for s, e in zip(starts, ends)])
    lengths = (ends - starts - 1)[ends - starts > 1]
    truncated = torch.zeros(len(keep), dtype=torch.bool)
    truncated[lengths.cumsum(0) - 1] = True
    return Episodes(
        obs=episodes.obs[keep],
        action=episodes.action[keep],
        reward=episodes.reward[keep],
        terminated=torch.zeros(len(keep), dtype=torch.bool),
        truncated=truncated,
        next_obs=episodes.next_obs[keep],
        starts=lengths.cumsum(0) - lengths,
    )


def discounted_returns(episodes: Episodes, discount: float, termination_penalty: float | None) -> Tensor:
    """Discounted return from every step to the end of its stored episode (time limits count as the end).

    Args:
        episodes: Steps in order.
        discount: Factor per step.
        termination_penalty: Added to the last reward of an episode that ends in a terminal state; None adds nothing.

    Returns:
        ``(N,)`` float32 returns.
    """
    reward = episodes.reward.double().clone()
    if termination_penalty is not None:
        reward[episodes.terminated] += termination_penalty
    # Episodes side by side, padded at the end: one reverse sweep over time instead of a loop over all steps.
    lengths, longest = episodes.lengths, int(episodes.lengths.max())
    inside = torch.arange(longest) < lengths[:, None]
    table = torch.zeros(inside.shape, dtype=torch.float64)
    table[inside] = reward
    for t in range(longest - 2, -1, -1):
        table[:, t] += discount * table[:, t + 1]
    return table[inside].float()
