"""What a checkpoint must have in common with the run that takes it up: whatever would go wrong silently is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from torch import Tensor

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.errors import ConfigError


def refuse_other_data(saved: DatasetSpec, current: DatasetSpec) -> None:
    """Refuse a dataset of other names, sizes or values.

    Raises:
        ConfigError: With what differs.
    """
    fields = ("obs_dim", "action_dim", "dataset_ids", "stride", "obs_keys", "action_low", "action_high")
    wrong = _differences((name, getattr(saved, name), getattr(current, name)) for name in fields)
    for name in () if wrong else ("obs_normalizer", "action_normalizer"):
        wrong += _normalizer_differences(name, getattr(saved, name), getattr(current, name))
    rewards = ((name, getattr(saved, name), getattr(current, name)) for name in ("reward_min", "reward_max"))
    wrong += _differences(item for item in rewards if not wrong and not _close(*item[1:]))
    if wrong:
        raise ConfigError(
            "the checkpoint was trained on other data (" + "; ".join(wrong) + "); "
            "give the same --data options, or start a new run without --ckpt_path"
        )


def refuse_other_shapes(saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    """Refuse weights of other names or sizes, in one line where torch would print a page.

    Raises:
        ConfigError: With the first few that differ.
    """
    shapes = ((k, tuple(saved[k].shape), tuple(current[k].shape)) for k in saved if k in current)
    wrong = _differences(shapes)[:3]
    missing = sorted(saved.keys() ^ current.keys())[:3]
    if missing:
        wrong.append(f"only on one side: {', '.join(missing)}")
    if wrong:
        raise ConfigError(
            "the checkpoint's networks differ from this configuration's (" + "; ".join(wrong) + "); "
            "use the run's own config.yaml"
        )


def refuse_other_method(saved: str, current: type) -> None:
    """Refuse a checkpoint that another method wrote, even if its networks would fit.

    Raises:
        ConfigError: With both methods.
    """
    ours = f"{current.__module__}.{current.__qualname__}"
    if saved != ours:
        raise ConfigError(f"the checkpoint is of {saved}, this is {ours}; use that method, or start without ckpt_path")


def refuse_other_arguments(
    group: str, names: Sequence[str], saved: Mapping[str, Any], current: Mapping[str, Any]
) -> None:
    """Refuse other values of the arguments that give the weights their meaning without showing in their shapes.

    Args:
        group: Whose arguments: ``model`` or ``data``.
        names: The arguments.
        saved: All arguments as the checkpoint has them.
        current: The same, as now asked for.

    Raises:
        ConfigError: With both values.
    """
    wrong = _differences((f"{group}.{name}", saved[name], current.get(name)) for name in names if name in saved)
    if wrong:
        raise ConfigError(
            "the checkpoint's networks were trained for something else (" + "; ".join(wrong) + "); "
            "use the run's own config.yaml, or start a new run without --ckpt_path"
        )


def meanings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What decides how the networks of a checkpoint compute, from the groups of its arguments, by dotted name."""
    return {
        f"{group}.{name}": value
        for group, fields in arguments.items()
        if isinstance(fields, Mapping)
        for name, value in fields.items()
        if name in ("activation", "reward_activation", "first_tanh", "embedding")
    }


def refuse_other_past(saved: Sequence[tuple[str, int]], current: Sequence[tuple[str, int]], done: int) -> None:
    """Refuse phases that would have ended elsewhere; one that is under way may become longer or shorter.

    Args:
        saved: Name and epochs of each phase, as the checkpoint has them; the last one never ends.
        current: The same, as now asked for.
        done: Epochs trained.

    Raises:
        ConfigError: With both ends of the phase.
    """
    before, now = (accumulate(epochs for _, epochs in phases[:-1]) for phases in (saved, current))
    for (name, _), old, new in zip(saved, before, now):
        if old != new and min(old, new) < done:
            raise ConfigError(
                f"the checkpoint has {done} epochs; its phase {name} ended after {old}, now it would after {new}: "
                "keep the epochs of phases that have ended, or start a new run without --ckpt_path"
            )


def _differences(items: Iterable[tuple[str, Any, Any]]) -> list[str]:
    return [f"{name}: checkpoint {saved!r}, now {current!r}" for name, saved, current in items if saved != current]


def _close(saved: Any, current: Any) -> bool:
    """Whether numbers differ by rounding only."""
    return np.shape(saved) == np.shape(current) and bool(np.allclose(saved, current, rtol=1e-4, atol=1e-6))


def _normalizer_differences(name: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs between the states of two normalisers, if anything does beyond rounding."""
    if saved["kind"] != current["kind"]:
        return _differences([(name, saved["kind"], current["kind"])])
    values = [key for key in saved if key != "kind"]
    if all(_close(saved[key], current[key]) for key in values):
        return []
    return [f"{name}: its {' and '.join(values)} are others, so the steps of the dataset are not the same"]
