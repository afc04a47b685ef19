"""Episodes: the one in-memory form of experience, checked once so that everything after can trust it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_diffrl.errors import DataError

ACTION_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Episodes:
    """Steps of all episodes in order, as CPU tensors.

    Args:
        obs: ``(N, obs_dim)`` float32, before each step.
        action: ``(N, action_dim)`` float32.
        reward: ``(N,)`` float32.
        terminated: ``(N,)`` bool, only on the last step of an episode: it ended in a terminal state.
        truncated: ``(N,)`` bool, only on the last step of an episode: it was cut (a time limit, the end of a log).
        next_obs: ``(N, obs_dim)`` float32, after each step.
        starts: ``(E,)`` int64, first step of each episode, ascending from 0.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    next_obs: Tensor
    starts: Tensor

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.obs)

    @property
    def num_episodes(self) -> int:
        """E."""
        return len(self.starts)

    @property
    def obs_dim(self) -> int:
        """Numbers in an observation."""
        return self.obs.shape[1]

    @property
    def action_dim(self) -> int:
        """Numbers in an action."""
        return self.action.shape[1]

    @property
    def ends(self) -> Tensor:
        """``(E,)`` int64, one past the last step of each episode."""
        return torch.cat([self.starts[1:], self.starts.new_tensor([self.num_steps])])

    @property
    def lengths(self) -> Tensor:
        """``(E,)`` int64, steps of each episode."""
        return self.ends - self.starts

    @property
    def episode(self) -> Tensor:
        """``(N,)`` int64, episode of each step."""
        return torch.repeat_interleave(torch.arange(self.num_episodes), self.lengths)

    @classmethod
    def from_numpy(
        cls,
        source: str,
        *,
        obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        next_obs: np.ndarray,
        starts: np.ndarray | Sequence[int],
        action_low: Sequence[float] | None = None,
        action_high: Sequence[float] | None = None,
    ) -> Episodes:
        """Check flat arrays and take them in as float32.

        Args:
            source: Name of the dataset, for messages.
            obs: ``(N, obs_dim)`` numbers.
            action: ``(N, action_dim)`` numbers.
            reward: ``(N,)`` numbers.
            terminated: ``(N,)`` bool, or numbers 0 and 1.
            truncated: As ``terminated``; a step that is both counts as terminated.
            next_obs: ``(N, obs_dim)`` numbers.
            starts: ``(E,)`` first step of each episode.
            action_low: ``(action_dim,)`` least action, may be infinite; None does not check.
            action_high: ``(action_dim,)`` greatest action, likewise.

        Raises:
            DataError: For wrong shapes or kinds of numbers, empty episodes, misplaced flags, values that are not
                finite and actions out of range (by more than 1e-4), with the place and what to do.
        """
        check = _Check(source, np.asarray(starts), len(np.asarray(obs)) if np.ndim(obs) else 0)
        obs = check.numbers("obs", obs, (None,))
        action = check.numbers("action", action, (None,))
        reward = check.numbers("reward", reward, ())
        next_obs = check.numbers("next_obs", next_obs, obs.shape[1:])
        terminated = check.flags("terminated", terminated)
        truncated = check.flags("truncated", truncated) & ~terminated
        check.boundaries(terminated, truncated)
        check.action_range(action, action_low, action_high)
        return cls(
            obs=torch.from_numpy(obs),
            action=torch.from_numpy(action),
            reward=torch.from_numpy(reward),
            terminated=torch.from_numpy(terminated),
            truncated=torch.from_numpy(truncated),
            next_obs=torch.from_numpy(next_obs),
            starts=torch.from_numpy(check.starts),
        )

    @classmethod
    def concat(cls, parts: Sequence[Episodes]) -> Episodes:
        """Join the episodes of several datasets of the same dimensions, in order."""
        offsets = np.cumsum([0] + [part.num_steps for part in parts[:-1]]).tolist()
        fields = ("obs", "action", "reward", "terminated", "truncated", "next_obs")
        return cls(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in fields},
            starts=torch.cat([part.starts + offset for part, offset in zip(parts, offsets)]),
        )


class _Check:
    """The checks of one dataset and the words in which they fail."""

    def __init__(self, source: str, starts: np.ndarray, steps: int) -> None:
        self.source, self.steps = source, steps
        if steps == 0:
            raise DataError(f"{source}: obs holds no steps; record at least one episode")
        if starts.ndim != 1 or starts.dtype.kind not in "iu" or len(starts) == 0:
            raise DataError(
                f"{source}: starts must be a list of step numbers, one per episode, got {starts.dtype} of shape "
                f"{starts.shape}"
            )
        self.starts = starts.astype(np.int64)
        if self.starts[0] != 0:
            raise DataError(
                f"{source}: episode 0 starts at row {self.starts[0]}, the first must start at row 0; drop the rows "
                "before it or name the episode they belong to"
            )
        self.ends = np.append(self.starts[1:], steps)
        wrong = np.flatnonzero(self.ends <= self.starts)
        if len(wrong):
            e = int(wrong[0])
            what = "is empty" if self.ends[e] == self.starts[e] else "ends before it starts"
            raise DataError(
                f"{source}: episode {e} {what} (starts at row {self.starts[e]}, the next at row {self.ends[e]} of "
                f"{steps}); starts must ascend and every episode needs a step: remove that episode"
            )

    def place(self, row: int) -> str:
        """Say where a row lies."""
        episode = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"{self.source}: episode {episode}, step {row - self.starts[episode]}"

    def _shape(self, name: str, array: Any, tail: tuple[int | None, ...]) -> np.ndarray:
        array = np.asarray(array)
        fits = array.ndim == 1 + len(tail) and len(array) == self.steps
        if not fits or any(want not in (None, got) for want, got in zip(tail, array.shape[1:])) or 0 in array.shape:
            wanted = ", ".join([str(self.steps), *(f"{name}_dim" if n is None else str(n) for n in tail)])
            raise DataError(
                f"{self.source}: {name} has shape {array.shape}, expected ({wanted}{'' if tail else ','}): one row "
                "for each row of obs"
            )
        return array

    def numbers(self, name: str, array: Any, tail: tuple[int | None, ...]) -> np.ndarray:
        """Check shape, kind and finiteness; return contiguous float32."""
        raw = self._shape(name, array, tail)
        if raw.dtype.kind not in "fiu":
            raise DataError(f"{self.source}: {name} has dtype {raw.dtype}, expected real numbers; store it as float32")
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(raw, dtype=np.float32)
        bad = ~np.isfinite(cast)
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            value = raw[where]
            found = f"{value}, too large for float32" if np.isfinite(value) else str(value)
            column = "".join(f"[{i}]" for i in where[1:])
            others = f" (and {bad.sum() - 1} more such values)" if bad.sum() > 1 else ""
            raise DataError(
                f"{self.place(where[0])}: {name}{column} is {found}{others}; all values must be finite: repair or "
                "remove that episode"
            )
        # A copy where nothing was cast: the tensors must not change when the caller's arrays do.
        return cast.copy() if np.shares_memory(cast, raw) else cast

    def flags(self, name: str, array: Any) -> np.ndarray:
        """Check shape and values; return bool."""
        raw = self._shape(name, array, ())
        if raw.dtype.kind == "b":
            return raw.copy()
        if raw.dtype.kind not in "fiu":
            raise DataError(f"{self.source}: {name} has dtype {raw.dtype}, expected bool; store it as bool")
        wrong = np.flatnonzero((raw != 0) & (raw != 1))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(f"{self.place(row)}: {name} is {raw[row]}, expected 0 or 1; store it as bool")
        return raw.astype(bool)

    def boundaries(self, terminated: np.ndarray, truncated: np.ndarray) -> None:
        """Check that flags sit on the last step of every episode and nowhere else."""
        last = np.zeros(self.steps, dtype=bool)
        last[self.ends - 1] = True
        wrong = np.flatnonzero((terminated | truncated) != last)
        if len(wrong) == 0:
            return
        row = int(wrong[0])
        length = int(self.ends[np.searchsorted(self.starts, row, side="right") - 1] - row)
        if last[row]:
            raise DataError(
                f"{self.place(row)}: the episode's last step is neither terminated nor truncated; mark it truncated "
                "if the recording was cut there"
            )
        name = "terminated" if terminated[row] else "truncated"
        raise DataError(
            f"{self.place(row)}: {name} is set, but the episode goes on for {length - 1} steps; split it there"
        )

    def action_range(self, action: np.ndarray, low: Sequence[float] | None, high: Sequence[float] | None) -> None:
        """Check actions against the bounds, within :data:`ACTION_TOLERANCE`."""
        bounds = []
        for name, bound, default in (("action_low", low, -np.inf), ("action_high", high, np.inf)):
            values = np.asarray([default] * action.shape[1] if bound is None else bound, dtype=np.float64)
            if values.shape != action.shape[1:] or np.isnan(values).any():
                raise DataError(
                    f"{self.source}: {name} is {values.tolist()}, expected {action.shape[1]} numbers, one for each "
                    "dimension of the actions"
                )
            bounds.append(values)
        least, most = bounds
        bad = np.argwhere((action < least - ACTION_TOLERANCE) | (action > most + ACTION_TOLERANCE))
        if len(bad):
            row, column = (int(i) for i in bad[0])
            raise DataError(
                f"{self.place(row)}: action[{column}] is {action[row, column]:.6g}, outside "
                f"[{least[column]:g}, {most[column]:g}] ({len(bad)} such values); clip the recorded actions to what "
                "the environment executed, or fix the bounds of the action space stored with the data"
            )
