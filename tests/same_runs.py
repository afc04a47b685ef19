"""Whether two runs, each the only one of its folder, came to the same end: bit for bit, but for clocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CLOCKS = ("time/", "eval/action_ms", "/seconds")


def run_of(folder: Path) -> Path:
    """The run's own folder, below the one in which the command line was used."""
    (run,) = folder.glob("tb_logs/*/*/*")
    return run


def parts(content: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """All that a checkpoint holds, down to the bytes of its tensors."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from parts(value, f"{place}/{key}")
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from parts(value, f"{place}/{index}")
    elif isinstance(content, torch.Tensor):
        yield place, (content.dtype, content.shape, content.flatten().view(torch.uint8).numpy().tobytes())
    else:
        yield place, repr(content)


def of_checkpoint(folder: Path, name: str) -> dict[str, Any]:
    content = parts(torch.load(run_of(folder) / "checkpoints" / name, weights_only=True))
    own = str(folder)  # checkpoints name each other by their full paths
    return {k.replace(own, ""): v.replace(own, "") if isinstance(v, str) else v for k, v in content}


def of_curves(folder: Path) -> dict[str, Any]:
    """Steps and values of all curves, steps and files of all pictures."""
    events = EventAccumulator(str(run_of(folder)), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    curves: dict[str, Any] = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    return curves | {tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in tags["images"]}


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys() and len(first) > 10
    different = [k for k in first if not any(clock in k for clock in CLOCKS) and first[k] != second[k]]
    assert not different, {k: (str(first[k])[-200:], str(second[k])[-200:]) for k in different[:5]}


def assert_same_runs(folder: Path, whole: Path) -> None:
    """Compare checkpoints, curves and pictures; nothing is left beside the two checkpoints."""
    for name in ("last.ckpt", "best.ckpt"):
        assert_same(of_checkpoint(folder, name), of_checkpoint(whole, name))
    assert_same(of_curves(folder), of_curves(whole))
    files = [sorted(p.name for p in (run_of(f) / "checkpoints").iterdir()) for f in (folder, whole)]
    assert files[0] == files[1] == ["best.ckpt", "last.ckpt"]
