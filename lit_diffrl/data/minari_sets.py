"""Minari datasets as :class:`Episodes`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_diffrl.data.episodes import Episodes
from lit_diffrl.data.spec import SourceInfo, constant_goal
from lit_diffrl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from minari import MinariDataset

REINSTALL = "remove that folder and get the dataset again"


def load_minari(dataset_id: str, folder: Path, obs_keys: list[str] | None) -> tuple[Episodes, SourceInfo]:
    """Read a local dataset; float64 becomes float32 here, once.

    An episode whose last step carries no flag was cut there and counts as truncated.

    Args:
        dataset_id: Its id.
        folder: Where it lies, for messages.
        obs_keys: Dict observations: the keys of the state in order, None for ``observation``.

    Returns:
        The episodes and their description: the evaluation environment is the dataset's own for evaluation, else the
        one that recorded it; reference returns are those of its metadata.

    Raises:
        ConfigError: When ``obs_keys`` are given for plain observations.
        DataError: When the dataset is damaged, of a kind that is not supported, or fails the checks of
            :meth:`Episodes.from_numpy`.
    """
    from minari import load_dataset

    try:
        dataset = load_dataset(dataset_id, download=False)
        metadata = dataset.storage.metadata
    except Exception as error:  # JSON, HDF5, spaces and versions fail in their own ways
        raise DataError(
            f"{dataset_id}: {folder} cannot be opened ({type(error).__name__}: {error}); {REINSTALL}"
        ) from error
    low, high = _action_bounds(dataset_id, dataset.action_space)
    keys, goal_key = _observation_keys(dataset_id, dataset.observation_space, obs_keys)

    found: dict[str, list[np.ndarray]] = {}
    for index, episode in enumerate(_read_episodes(dataset, folder)):
        for name, rows in _episode_rows(f"{dataset_id}: episode {index}", episode, keys, goal_key).items():
            found.setdefault(name, []).append(rows)
            if rows.shape[1:] != found[name][0].shape[1:]:
                raise DataError(
                    f"{dataset_id}: {name} has rows of shape {found[name][0].shape[1:]} in episode 0 and "
                    f"{rows.shape[1:]} in episode {index}; all episodes need the same"
                )
    if not found:
        raise DataError(f"{dataset_id}: holds no episodes; {REINSTALL} ({folder})")
    starts = np.cumsum([0] + [len(reward) for reward in found["reward"][:-1]])
    arrays = {name: np.concatenate(parts) for name, parts in found.items()}

    env_spec = _evaluation_env(metadata)
    ref_min, ref_max = _reference_returns(dataset_id, metadata)
    info = SourceInfo(
        env_spec=None if env_spec is None else json.dumps(env_spec),
        ref_min=ref_min,
        ref_max=ref_max,
        max_episode_steps=None if env_spec is None else env_spec.get("max_episode_steps"),
        obs_keys=keys,
        goal_key=goal_key,
        goal=constant_goal(arrays.pop("goal", None)),
        action_low=low,
        action_high=high,
        dataset_ids=[dataset_id],
    )
    return Episodes.from_numpy(dataset_id, **arrays, starts=starts, action_low=low, action_high=high), info


def _episode_rows(place: str, episode: Any, keys: list[str] | None, goal_key: str | None) -> dict[str, np.ndarray]:
    """Arrays of one episode by the names of :class:`Episodes`, and ``goal`` (length + 1 rows) if there is one."""
    steps = len(episode.rewards)

    def rows(name: str, value: Any, count: int, ndim: int | None = None) -> np.ndarray:
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise DataError(
                f"{place}: {name} is of type {array.dtype}, expected plain numbers; other objects are not read, since "
                "they may hide code: record that episode again"
            )
        if array.ndim == 0 or len(array) != count or ndim not in (None, array.ndim):
            raise DataError(
                f"{place}: {name} has shape {array.shape}, expected {count} rows{' of vectors' if ndim == 2 else ''} "
                f"for {steps} rewards (observations have one row more); record that episode again"
            )
        return array

    def shown(key: str) -> np.ndarray:
        if key not in episode.observations:
            raise DataError(
                f"{place}: observations lack {key!r}, hold {', '.join(episode.observations)}; record it again"
            )
        return rows(key, episode.observations[key], steps + 1, 2)

    if keys is None:
        obs = rows("observations", episode.observations, steps + 1, 2)
    else:
        obs = np.concatenate([shown(key) for key in keys], axis=1)
    terminated = rows("terminations", episode.terminations, steps)
    truncated = rows("truncations", episode.truncations, steps).copy()
    if steps and not terminated[-1]:
        truncated[-1] = True
    found = {
        "obs": obs[:-1],
        "action": rows("actions", episode.actions, steps),
        "reward": rows("rewards", episode.rewards, steps),
        "terminated": terminated,
        "truncated": truncated,
        "next_obs": obs[1:],
    }
    return found if goal_key is None else {**found, "goal": shown(goal_key)}


def _read_episodes(dataset: MinariDataset, folder: Path) -> Iterator[Any]:
    episodes = iter(dataset.iterate_episodes())
    index = 0
    while True:
        try:
            episode = next(episodes)
        except StopIteration:
            return
        except Exception as error:  # truncated and damaged files fail anywhere below
            raise DataError(
                f"{dataset.id}: episode {index} cannot be read from {folder} ({type(error).__name__}: {error}); "
                f"{REINSTALL}"
            ) from error
        yield episode
        index += 1


def _action_bounds(dataset_id: str, space: Any) -> tuple[list[float], list[float]]:
    from gymnasium.spaces import Box

    if not isinstance(space, Box) or len(space.shape) != 1 or space.dtype.kind != "f":
        raise DataError(f"{dataset_id}: actions are {space}; methods here need vectors of real numbers, Box(dim,)")
    return space.low.astype(float).tolist(), space.high.astype(float).tolist()


def _observation_keys(dataset_id: str, space: Any, obs_keys: list[str] | None) -> tuple[list[str] | None, str | None]:
    """Keys of the state and of the goal; (None, None) for plain observations."""
    from gymnasium.spaces import Box, Dict

    if not isinstance(space, Dict):
        if not isinstance(space, Box):
            raise DataError(f"{dataset_id}: observations are {space}; accepted: vectors, Box(dim,), or a Dict of them")
        if obs_keys is not None:
            raise ConfigError(f"data.obs_keys {obs_keys}: observations of {dataset_id} are no dicts; leave it out")
        return None, None
    present = list(space.spaces)
    keys = ["observation"] if obs_keys is None else list(obs_keys)
    missing = [key for key in keys if key not in present]
    if missing or not keys:
        raise DataError(
            f"{dataset_id}: observations have the keys {', '.join(present)}, not {', '.join(missing) or '[]'}; "
            "choose those of the state with --data.obs_keys"
        )
    for key in keys:
        if not isinstance(space[key], Box):
            raise DataError(f"{dataset_id}: observations[{key!r}] are {space[key]}; a state needs vectors, Box(dim,)")
    return keys, "desired_goal" if isinstance(space.spaces.get("desired_goal"), Box) else None


def _reference_returns(dataset_id: str, metadata: Mapping[str, Any]) -> tuple[float, float] | tuple[None, None]:
    """Returns that score 0 and 100; none when the metadata lacks one, or both are the same."""
    found = [metadata.get(key) for key in ("ref_min_score", "ref_max_score")]
    if None in found:
        return None, None
    low, high = (float(x) if isinstance(x, int | float) and math.isfinite(x) else None for x in found)
    if low is None or high is None or low > high:
        raise DataError(
            f"{dataset_id}: ref_min_score is {found[0]!r} and ref_max_score {found[1]!r}; they must be finite numbers, "
            "the returns of a random and of a reference policy: correct them in data/metadata.json, or remove them"
        )
    return (low, high) if low < high else (None, None)


def _evaluation_env(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """EnvSpec of the evaluation environment as a dict, in the terms of the installed Gymnasium."""
    from gymnasium.envs.registration import EnvSpec

    text = metadata.get("eval_env_spec") or metadata.get("env_spec")
    if text is None:
        return None
    # Older versions of Gymnasium wrote fields that no longer exist.
    known = {field.name for field in dataclasses.fields(EnvSpec) if field.init}
    return {name: value for name, value in json.loads(text).items() if name in known}
