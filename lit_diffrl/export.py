"""``python -m lit_diffrl export``: the synthetic transitions of a checkpoint as a Minari dataset, for any tool."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lit_diffrl.arguments import options
from lit_diffrl.checkpoint_io import own_arguments
from lit_diffrl.data.normalizers import normalizer_from_state
from lit_diffrl.data.pointmaze import minari_root
from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.errors import ConfigError, check_range, nearest
from lit_diffrl.methods.base import CHECKPOINT_KEY
from lit_diffrl.methods.loading import read_checkpoint
from lit_diffrl.methods.synthetic_learner import SYNTHETIC
from lit_diffrl.rollout.environments import make_env
from lit_diffrl.rollout.results import jsonable
from lit_diffrl.runs import dataset_slug, find_checkpoint

if TYPE_CHECKING:
    from gymnasium.spaces import Space

ARGUMENTS = ("ckpt_path", "name", "rows", "logs")


def main(args: list[str]) -> int:
    """Follow a command line; its arguments are those of :func:`export`, and ``--logs`` as of ``fit``.

    Raises:
        ConfigError: For an unknown option, or as :func:`export`.
    """
    given = dict(options(args))
    for key, value in given.items():
        if key not in ARGUMENTS or value is None:
            hint = nearest(key, ARGUMENTS) if key not in ARGUMENTS else "it needs a value"
            raise ConfigError(f"--{key}: export takes {', '.join('--' + a for a in ARGUMENTS)}; {hint}")
    if given.get("ckpt_path") is None:
        raise ConfigError("export needs --ckpt_path: a file, or 'last' or 'best' for the newest of these")
    rows = given.get("rows")
    if rows is not None and not rows.replace("_", "").isdigit():
        raise ConfigError(f"--rows must be a number of transitions, got {rows!r}")
    logs = Path(given.get("logs") or "tb_logs").expanduser()
    checkpoint = find_checkpoint(str(given["ckpt_path"]), logs, "*/*/*")
    name = export(checkpoint, given.get("name"), None if rows is None else int(rows))
    print(f"exported to {name}; train on it with --data.dataset {name}", flush=True)
    return 0


def export(checkpoint: str | Path, name: str | None = None, rows: int | None = None) -> str:
    """Store the synthetic transitions of a checkpoint below Minari's root (``MINARI_DATASETS_PATH``).

    Transitions that follow each other form an episode, which is cut, unless it terminates; SynthER's have one step
    each, and Minari's layout takes 14 kB and 2.6 ms for every episode: 100,000 of them are 1.4 GB and 4 minutes.
    States and actions are in raw units; rewards are as the learner saw them. The metadata holds environment and
    reference returns of the real data, and where the transitions come from: ``synthetic_from``, ``method``,
    ``checkpoint``, ``epoch``, ``seed`` and all ``options``.

    Args:
        checkpoint: Of a method with synthetic transitions.
        name: The dataset's id; by default ``lit_diffrl/synthetic/<method>-<dataset>-v0``.
        rows: The newest so many transitions; None for all.

    Returns:
        The dataset's id.

    Raises:
        ConfigError: When the checkpoint has no synthetic transitions, the name is no id, or there is a dataset of that
            name already.
    """
    import minari
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage import get_dataset_path

    content = read_checkpoint(checkpoint)
    own, held = content[CHECKPOINT_KEY], content.get(SYNTHETIC)
    if held is None or len(held["rows"]) == 0:
        raise ConfigError(
            f"{checkpoint} ({own['method']}) holds no synthetic transitions; give one of SynthER or DyDiff"
        )
    if rows is not None:
        check_range("--rows", rows, 1)
    spec, method = DatasetSpec.from_dict(own["spec"]), own["method"].rpartition(".")[2]
    slug = dataset_slug(spec.dataset_ids).removesuffix("-v0").replace("+", "-and-").replace(".", "-")
    name = name or f"lit_diffrl/synthetic/{method.lower()}-{slug}-v0"
    try:
        parse_dataset_id(name)
    except (ValueError, TypeError) as error:  # the latter where there is no version
        raise ConfigError(
            f"--name {name!r} is no id that Minari takes; give letters, digits, - and _, folders with /, and a version "
            "at the end, as in lit_diffrl/synthetic/mine-v0"
        ) from error
    folder = get_dataset_path(name)
    if folder.exists():
        raise ConfigError(f"there is a dataset {name} in {folder} already; remove it, or choose another --name")

    obs_space, split = _observations(spec)
    kept = held["rows"][-rows if rows else None :].float()
    buffers = (_episode(part, spec, held["widths"], split) for part in _trajectories(kept, held["widths"]))
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        with minari_root(partial), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Minari asks for an environment, which the metadata name afterwards
            dataset = minari.create_dataset_from_buffers(
                name,
                buffers,  # type: ignore[arg-type]  # it goes through them once
                observation_space=obs_space,
                action_space=_box(spec.action_low, spec.action_high),
                algorithm_name=f"{method} (synthetic)",
                author="lit_diffrl",
                description=f"{len(kept)} transitions that {method} has made of {'+'.join(spec.dataset_ids)}.",
            )
            dataset.storage.update_metadata(_provenance(checkpoint, content, spec))
        os.replace(partial / name, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return name


def _provenance(checkpoint: str | Path, content: dict[str, Any], spec: DatasetSpec) -> dict[str, Any]:
    """What the dataset's metadata say of its origin, in values that it can store."""
    own = content[CHECKPOINT_KEY]
    chosen = {
        "model": own_arguments(content.get("hyper_parameters", {})),
        "data": own_arguments(content.get("datamodule_hyper_parameters", {})),
    }
    known = {
        "env_spec": spec.env_spec,
        "eval_env_spec": spec.env_spec,
        "ref_min_score": spec.ref_min,
        "ref_max_score": spec.ref_max,
    }
    return {k: v for k, v in known.items() if v is not None} | {
        "synthetic_from": "+".join(spec.dataset_ids),
        "method": own["method"],
        "checkpoint": str(Path(checkpoint).absolute()),
        "epoch": content["epoch"] + 1,
        "seed": own["seed"],
        "options": json.dumps(jsonable(chosen)),
    }


def _trajectories(rows: Tensor, widths: list[int]) -> Iterator[Tensor]:
    """Split rows, oldest first, where one does not lead to the next."""
    obs, _, _, next_obs, done = rows.split(widths, dim=1)
    follows = (next_obs[:-1] == obs[1:]).all(1) & (done[:-1, 0] == 0)
    lengths = torch.diff(torch.cat([torch.tensor([-1]), (~follows).nonzero()[:, 0], torch.tensor([len(rows) - 1])]))
    yield from rows.split(lengths.tolist())


def _episode(rows: Tensor, spec: DatasetSpec, widths: list[int], split: dict[str, int] | None) -> Any:
    """Rows that follow each other, as Minari takes them in."""
    from minari.data_collector import EpisodeBuffer

    obs, action, reward, next_obs, done = rows.split(widths, dim=1)
    states = normalizer_from_state(spec.obs_normalizer).unnormalize(torch.cat([obs, next_obs[-1:]])).numpy()
    actions = normalizer_from_state(spec.action_normalizer).unnormalize(action).numpy()
    observations: Any = states
    if split is not None:
        parts = np.split(states, np.cumsum(list(split.values()))[:-1], axis=1)
        observations = dict(zip(split, parts))
        if spec.goal_key is not None and spec.goal_key not in split and spec.goal is not None:
            observations[spec.goal_key] = np.tile(np.asarray(spec.goal, dtype=np.float32), (len(states), 1))
    ends = np.arange(len(rows)) == len(rows) - 1
    terminated = ends & bool(done[-1, 0] > 0)
    return EpisodeBuffer(
        observations=observations,
        actions=np.clip(actions, spec.action_low, spec.action_high).astype(np.float32),  # type: ignore[arg-type]
        rewards=reward[:, 0].double().numpy(),  # type: ignore[arg-type]
        terminations=terminated,  # type: ignore[arg-type]
        truncations=ends & ~terminated,  # type: ignore[arg-type]
        infos={},
    )


def _observations(spec: DatasetSpec) -> tuple[Space[Any], dict[str, int] | None]:
    """The space of observations, and the sizes of a dict's parts."""
    from gymnasium.spaces import Dict

    if spec.obs_keys is None:
        return _free(spec.obs_dim), None
    assert spec.env_spec is not None
    env: Any = make_env(spec.env_spec)
    try:
        sizes = {key: int(env.observation_space[key].shape[0]) for key in spec.obs_keys}
    finally:
        env.close()
    spaces = {key: _free(size) for key, size in sizes.items()}
    if spec.goal_key is not None and spec.goal is not None:
        spaces.setdefault(spec.goal_key, _free(len(spec.goal)))
    return Dict(spaces), sizes


def _free(size: int) -> Space[Any]:
    return _box([-np.inf] * size, [np.inf] * size)


def _box(low: list[float], high: list[float]) -> Space[Any]:
    from gymnasium.spaces import Box

    return Box(np.asarray(low, dtype=np.float32), np.asarray(high, dtype=np.float32), dtype=np.float32)
