"""Where experience comes from: Minari datasets, D4RL files, mazes collected here, and unions of them.

Every source gives :class:`Episodes` and a :class:`SourceInfo`. Data is fetched once, by :func:`prepare_source`;
:func:`load_source` only reads what is there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

from lit_diffrl.data.d4rl import load_d4rl
from lit_diffrl.data.episodes import Episodes
from lit_diffrl.data.minari_sets import load_minari
from lit_diffrl.data.spec import SourceInfo
from lit_diffrl.errors import ConfigError, DataError, nearest

COLLECTED = "lit_diffrl/"

__all__ = ["SourceInfo", "load_source", "prepare_source"]


def load_source(
    dataset: str | list[str], *, obs_keys: list[str] | None = None, env: str | None = None
) -> tuple[Episodes, SourceInfo]:
    """Read a dataset, or the union of several.

    Args:
        dataset: A Minari id, the path of a D4RL file (``.hdf5``, ``.h5``), an id of :mod:`lit_diffrl.data.pointmaze`;
            or several of these, as a list or joined by ``+``.
        obs_keys: For dict observations of Minari: the keys that make up the state, in order. By default
            ``observation``.
        env: For D4RL files: the task's name, where the file's name does not tell.

    Returns:
        Episodes and their description. A union's environment, reference returns and goal key are those of its first
        part.

    Raises:
        ConfigError: For an unknown dataset (with the nearest names), or options that do not apply to it.
        DataError: For data that cannot be used, or parts that do not belong together.
    """
    parts = []
    for name in _names(dataset, obs_keys, env):
        if _is_file(name):
            parts.append(load_d4rl(_existing_file(name), env=env))
        elif (_folder(name) / "data").exists():
            parts.append(load_minari(name, _folder(name), obs_keys))
        else:
            raise _unknown(name, f"not stored in {_folder('')}")
    return parts[0] if len(parts) == 1 else _union(parts)


def prepare_source(dataset: str | list[str], *, obs_keys: list[str] | None = None, env: str | None = None) -> None:
    """Download or collect what is not there yet; arguments and errors as for :func:`load_source`."""
    for name in _names(dataset, obs_keys, env):
        if _is_file(name):
            _existing_file(name)
        elif not (_folder(name) / "data").exists():
            _fetch(name)


def _names(dataset: str | list[str], obs_keys: list[str] | None, env: str | None) -> list[str]:
    """Split a union into its parts and check that the options apply to them."""
    if isinstance(dataset, str):
        names = [dataset] if _is_file(dataset) and Path(dataset).is_file() else dataset.split("+")
    else:
        names = list(dataset)
    names = [name.strip() for name in names]
    if not names or not all(names):
        raise ConfigError(f"dataset {dataset!r} has an empty part; give a dataset id, or several joined by '+'")
    if env is not None and not any(_is_file(name) for name in names):
        raise ConfigError(f"data.env {env!r} applies to D4RL files (.hdf5) only, dataset is {'+'.join(names)}")
    if obs_keys is not None and all(_is_file(name) for name in names):
        raise ConfigError(f"data.obs_keys {obs_keys} apply to Minari datasets only, dataset is {'+'.join(names)}")
    return names


def _is_file(name: str) -> bool:
    return name.lower().endswith((".hdf5", ".h5"))


def _existing_file(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        raise ConfigError(f"dataset file {name} is a folder; give the path of a D4RL file")
    if not path.is_file():
        siblings = [str(p) for pattern in ("*.hdf5", "*.h5") for p in path.parent.glob(pattern)]
        hint = nearest(str(path), siblings) or "give the path of a D4RL file"
        raise ConfigError(f"dataset file {name} does not exist (looked in {path.parent.absolute()}); {hint}")
    return str(path)


def _folder(dataset_id: str) -> Path:
    from minari.storage import get_dataset_path

    try:
        return get_dataset_path(dataset_id)  # makes the root
    except OSError as error:
        raise ConfigError(_unusable("used", error)) from error


def _unusable(what: str, error: OSError) -> str:
    return (
        f"the folder of Minari datasets cannot be {what} ({error.strerror or error}: {error.filename}); set the "
        "environment variable MINARI_DATASETS_PATH to a folder with room that may be written to"
    )


def _unknown(dataset_id: str, reason: str) -> ConfigError:
    from lit_diffrl.data import pointmaze

    root = _folder("")
    local = {p.parent.parent.relative_to(root).as_posix() for p in root.glob("**/data/metadata.json")}
    valid = [*sorted(name for name in local if "/." not in f"/{name}"), *pointmaze.DATASETS]
    hint = nearest(dataset_id, dict.fromkeys(valid)) or f"local ones are in {root}"
    return ConfigError(f"unknown dataset {dataset_id!r} ({' '.join(reason.split())}); {hint}")


def _fetch(dataset_id: str) -> None:
    from minari import load_dataset
    from minari.dataset.minari_dataset import parse_dataset_id

    from lit_diffrl.data import pointmaze

    if dataset_id in pointmaze.DATASETS:
        try:
            pointmaze.collect(dataset_id)
        except OSError as error:
            raise DataError(f"{dataset_id} is not collected: {_unusable('written to', error)}") from error
        return
    if dataset_id.startswith(COLLECTED):
        raise _unknown(dataset_id, "not one of those collected here")
    try:
        if parse_dataset_id(dataset_id)[2] is None:
            raise ValueError("no version")
    except (ValueError, TypeError):
        raise _unknown(dataset_id, "an id is namespace/name-v0, a file ends in .hdf5") from None
    if not _server_has_name():
        raise _unknown(dataset_id, "not stored here, and Minari's server cannot be reached")
    try:
        load_dataset(dataset_id, download=True)
    except Exception as error:  # every layer below (HTTP, hub, storage) fails in its own way
        raise _unknown(dataset_id, f"not stored here, and not downloaded: {type(error).__name__}: {error}") from error


def _server_has_name() -> bool:
    """Whether Minari's default server can be looked up: without, its client retries for half a minute."""
    if getproxies() or "MINARI_REMOTE" in os.environ:
        return True
    try:
        socket.getaddrinfo(urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname, 443)
    except OSError:
        return False
    return True


def _union(parts: list[tuple[Episodes, SourceInfo]]) -> tuple[Episodes, SourceInfo]:
    infos = [info for _, info in parts]
    ids = [dataset_id for info in infos for dataset_id in info.dataset_ids]

    def traits(episodes: Episodes, info: SourceInfo) -> dict[str, Any]:
        env = {} if info.env_spec is None else json.loads(info.env_spec)
        return {
            "observation size": episodes.obs_dim,
            "action size": episodes.action_dim,
            "least action": info.action_low,
            "greatest action": info.action_high,
            "observation keys": info.obs_keys,
            "environment": (env.get("id"), env.get("kwargs")),
        }

    first = traits(*parts[0])
    for part in parts[1:]:
        for what, value in traits(*part).items():
            if value != first[what]:
                raise DataError(
                    f"{ids[0]} and {part[1].dataset_ids[0]} cannot be joined: {what} {first[what]} and {value}; "
                    "a union needs data of one environment"
                )
    goal = infos[0].goal if all(info.goal == infos[0].goal for info in infos) else None
    return Episodes.concat([episodes for episodes, _ in parts]), dataclasses.replace(
        infos[0], dataset_ids=ids, goal=goal
    )
