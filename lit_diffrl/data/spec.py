"""What a dataset is besides its steps: its source's description, and the DatasetSpec that checkpoints carry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from lit_diffrl.errors import ConfigError

Returns = TypeVar("Returns", float, np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class SourceInfo:
    """What a source tells about its episodes.

    Args:
        env_spec: Gymnasium's EnvSpec of the evaluation environment as JSON; None when the data names none.
        ref_min: Return of a random policy: score 0.
        ref_max: Return of the reference policy: score 100.
        max_episode_steps: The environment's time limit, in steps.
        obs_keys: Dict observations: the keys that make up the state, concatenated in this order; else None.
        goal_key: Dict observations: the key of the goal, if there is one.
        goal: The goal, when it is the same throughout the data; else None.
        action_low: ``(action_dim,)`` least action, may be infinite.
        action_high: ``(action_dim,)`` greatest action, likewise.
        dataset_ids: Where the episodes come from, in order.
    """

    env_spec: str | None
    ref_min: float | None
    ref_max: float | None
    max_episode_steps: int | None
    obs_keys: list[str] | None
    goal_key: str | None
    goal: list[float] | None
    action_low: list[float]
    action_high: list[float]
    dataset_ids: list[str]


def constant_goal(goals: np.ndarray | None) -> list[float] | None:
    """The goal ``(dim,)`` of rows ``(n, dim)``, if it is finite and the same (to 1e-6) in all of them."""
    if goals is None or not np.isfinite(goals).all() or np.ptp(goals, axis=0).max(initial=0.0) > 1e-6:
        return None
    return [float(value) for value in goals[0]]


@dataclass(frozen=True)
class DatasetSpec:
    """All that an agent must know of its dataset, in plain types: a checkpoint acts without the data.

    Args:
        obs_dim: Numbers in a state.
        action_dim: Numbers in an action.
        action_low: ``(action_dim,)`` least action, may be infinite.
        action_high: ``(action_dim,)`` greatest action, likewise.
        dataset_ids: Where the episodes came from.
        env_spec: Gymnasium's EnvSpec of the evaluation environment as JSON, or None.
        ref_min: Return that scores 0, or None.
        ref_max: Return that scores 100, or None.
        max_episode_steps: The environment's time limit in steps, or None.
        obs_keys: Dict observations: the keys that make up the state, in order; else None.
        goal_key: Dict observations: the key of the goal, or None.
        goal: The constant goal of the data, or None.
        obs_normalizer: State of the normaliser of states.
        action_normalizer: State of the normaliser of actions.
        reward_max: Greatest reward of a row of a window, that is, summed over ``stride`` steps; of a transition, tuned.
        reward_min: Least reward of a row, likewise.
        stride: Simulator steps per row of a window; 1 for transitions.
    """

    obs_dim: int
    action_dim: int
    action_low: list[float]
    action_high: list[float]
    dataset_ids: list[str]
    env_spec: str | None
    ref_min: float | None
    ref_max: float | None
    max_episode_steps: int | None
    obs_keys: list[str] | None
    goal_key: str | None
    goal: list[float] | None
    obs_normalizer: dict[str, Any]
    action_normalizer: dict[str, Any]
    reward_max: float
    reward_min: float
    stride: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain types, which ``torch.load(weights_only=True)`` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DatasetSpec:
        """Rebuild a spec from :meth:`to_dict`.

        Raises:
            ConfigError: When a field is missing or unknown: the checkpoint is of another version.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = sorted(names - {"stride"} - set(fields)), sorted(set(fields) - names)
        if missing or unknown:
            raise ConfigError(
                f"the saved dataset spec lacks {missing or 'nothing'} and has unknown {unknown or 'nothing'}; the "
                "checkpoint was written by another version: train again, or use that version"
            )
        return cls(**fields)

    def score(self, returns: Returns) -> Returns | None:
        """Normalise undiscounted returns to 0 = random, 100 = reference (D4RL's scale, times 100).

        Args:
            returns: A number, array or tensor.

        Returns:
            Scores of the same kind; None when the dataset has no reference returns.
        """
        if self.ref_min is None or self.ref_max is None:
            return None
        return 100 * (returns - self.ref_min) / (self.ref_max - self.ref_min)

    def is_single(self, obs: Any) -> bool:
        """Whether an observation is one, rather than a batch; arguments and errors as :meth:`split_obs`."""
        return all(part.ndim == 1 for part in self._state_parts(obs).values())

    def split_obs(self, obs: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Split observations, as the environment gives them, into states and goals.

        Args:
            obs: ``(obs_dim,)`` or ``(n, obs_dim)``, numpy or torch; or a dict of such arrays with the keys
                ``obs_keys`` and, if the goal is not the data's constant one, ``goal_key``.

        Returns:
            States ``(n, obs_dim)`` and goals ``(n, goal_dim)``, float32; n is 1 for a single observation. Goals are
            the observation's own, else the data's constant goal, else None.

        Raises:
            ConfigError: When the observation is of another kind or size than the data's, or not finite.
        """
        rows = {name: _rows(name, part) for name, part in self._state_parts(obs).items()}
        if len({len(part) for part in rows.values()}) > 1:
            raise ConfigError(
                f"parts of an observation must have as many rows, got { {k: len(v) for k, v in rows.items()} }"
            )
        state = np.concatenate(list(rows.values()), axis=1)
        if state.shape[1] != self.obs_dim:
            given = {name: np.shape(part) for name, part in self._state_parts(obs).items()}
            raise ConfigError(
                f"observation has shape {', '.join(f'{k} {v}' for k, v in given.items())}; this agent was trained on "
                f"{'+'.join(self.dataset_ids)} and takes ({self.obs_dim},) or (n, {self.obs_dim})"
                + (f" in all of {self.obs_keys}" if self.obs_keys else "")
            )
        return state, self._goals(obs, len(state))

    def _state_parts(self, obs: Any) -> dict[str, np.ndarray]:
        if not isinstance(obs, Mapping):
            return {"obs": _array("obs", obs)}
        if self.obs_keys is None:
            raise ConfigError(
                f"observation is a dict with the keys {sorted(obs)}; this agent was trained on "
                f"{'+'.join(self.dataset_ids)} and takes arrays ({self.obs_dim},) or (n, {self.obs_dim})"
            )
        missing = [key for key in self.obs_keys if key not in obs]
        if missing:
            raise ConfigError(f"observation lacks {missing}: this agent takes {self.obs_keys}, got {sorted(obs)}")
        return {key: _array(key, obs[key]) for key in self.obs_keys}

    def _goals(self, obs: Any, n: int) -> np.ndarray | None:
        if isinstance(obs, Mapping) and self.goal_key is not None and self.goal_key in obs:
            goal = _rows(self.goal_key, _array(self.goal_key, obs[self.goal_key]))
            if len(goal) != n or (self.goal is not None and goal.shape[1] != len(self.goal)):
                wanted = "goal_dim" if self.goal is None else len(self.goal)
                raise ConfigError(f"{self.goal_key} has shape {goal.shape}, expected ({n}, {wanted})")
            return goal
        return None if self.goal is None else np.tile(np.asarray(self.goal, dtype=np.float32), (n, 1))


def _array(name: str, value: Any) -> np.ndarray:
    array = value.detach().cpu().float().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.dtype.kind not in "fiu" or array.ndim not in (1, 2):
        raise ConfigError(
            f"{name} must be numbers of shape (dim,) or (n, dim), got {array.dtype} of shape {array.shape}"
        )
    return array


def _rows(name: str, array: np.ndarray) -> np.ndarray:
    """``(n, dim)`` float32, finite."""
    rows = np.atleast_2d(array).astype(np.float32)
    if not np.isfinite(rows).all():
        row, column = np.argwhere(~np.isfinite(rows))[0].tolist()
        raise ConfigError(f"{name} is {rows[row, column]} in row {row}, column {column}; observations must be finite")
    return rows
