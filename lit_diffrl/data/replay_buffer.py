"""ReplayBuffer: synthetic transitions, the newest so many, from which a learner's batches are drawn.

Memory: ``4 (2 obs + action + 2)`` bytes for each transition (8 in 64-true), in every process: 2,000,000 of Hopper's are
216 MB, of HalfCheetah's 336 MB. Checkpoints hold those that are there; writing one takes twice that again for a moment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.errors import DIVERGED, ConfigError, check_range


class ReplayBuffer:
    """First in, first out; the i-th row is the i-th oldest one, whatever its place in memory.

    Args:
        obs_dim: Numbers in a state.
        action_dim: Numbers in an action.
        capacity: Transitions kept.
    """

    def __init__(self, obs_dim: int, action_dim: int, capacity: int) -> None:
        check_range("buffer capacity", capacity, 1)
        self.capacity = capacity
        self.widths = [obs_dim, action_dim, 1, obs_dim, 1]
        self._rows: Tensor | None = None
        self._end = 0  # place of the next row
        self._size = 0
        self.groups: list[tuple[int, int]] = []  # (epoch, rows) of each insertion of which something is left

    def __len__(self) -> int:
        return self._size

    def insert(self, obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, done: Tensor, epoch: int) -> None:
        """Take in transitions; the oldest make room.

        Args:
            obs: ``(n, obs)``, normalised like the data's.
            action: ``(n, action)`` in [-1, 1].
            reward: ``(n,)``.
            next_obs: ``(n, obs)``.
            done: ``(n,)`` bool, or numbers 0 and 1.
            epoch: When they were made.

        Raises:
            ConfigError: When numbers are not finite.
        """
        rows = torch.cat([obs, action, reward[:, None], next_obs, done[:, None].to(obs.dtype)], dim=1)
        wrong = len(rows) - int(rows.isfinite().all(1).sum())
        if wrong:
            raise ConfigError(f"{wrong} of {len(rows)} synthetic transitions are not finite: {DIVERGED}")
        self._append(rows[-self.capacity :])
        self.groups.append((epoch, len(rows)))
        self._forget(self._size)

    def _append(self, rows: Tensor) -> None:
        if self._rows is None:
            self._rows = rows.new_empty(self.capacity, sum(self.widths))
        first = min(len(rows), self.capacity - self._end)
        self._rows[self._end : self._end + first] = rows[:first]
        self._rows[: len(rows) - first] = rows[first:]
        self._end = (self._end + len(rows)) % self.capacity
        self._size = min(self._size + len(rows), self.capacity)

    def keep_newest(self, insertions: int) -> None:
        """Forget all but the newest insertions."""
        self._forget(min(self._size, sum(n for _, n in self.groups[-insertions:])))

    def _forget(self, size: int) -> None:
        """Keep the newest rows, and the groups that these belong to."""
        self._size = size
        groups: list[tuple[int, int]] = []
        for epoch, n in reversed(self.groups):
            if size > 0 and n > 0:
                groups.append((epoch, min(n, size)))
                size -= min(n, size)
        self.groups = groups[::-1]

    def age(self, epoch: int) -> float:
        """Mean age of the rows, in epochs; 0 for an empty buffer."""
        return sum(n * (epoch - made) for made, n in self.groups) / max(1, self._size)

    def transitions(self, index: Tensor, discount: Tensor) -> PolicyBatch:
        """The ``index``-th oldest transitions.

        Args:
            index: ``(B,)`` int64, below the number of rows.
            discount: ``(B,)`` worth of the next state's value.
        """
        assert self._rows is not None
        place = (self._end - self._size + index) % self.capacity
        obs, action, reward, next_obs, done = self._rows[place].split(self.widths, dim=1)
        return PolicyBatch(obs, action, reward.squeeze(1), next_obs, done.squeeze(1), discount)

    def rows(self) -> Tensor:
        """All rows ``(n, width)``, oldest first: state, action, reward, next state, done."""
        if self._rows is None:
            return torch.empty(0, sum(self.widths))
        place = torch.arange(self._end - self._size, self._end, device=self._rows.device) % self.capacity
        return self._rows[place]

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """All that is in it, in plain types."""
        return {"rows": self.rows(), "groups": [list(group) for group in self.groups], "widths": self.widths}

    def to(self, device: torch.device) -> None:
        """Move what is in it to a device; rows that come later must be there too."""
        if self._rows is not None:
            self._rows = self._rows.to(device)

    def load_state_dict(self, state: dict[str, Any], dtype: torch.dtype) -> None:
        """Take up a state; a smaller capacity keeps the newest."""
        self._rows, self._end, self._size = None, 0, 0
        self.groups = [(int(epoch), int(n)) for epoch, n in state["groups"]]
        if len(state["rows"]):
            self._append(state["rows"][-self.capacity :].to(dtype))
        self._forget(self._size)
