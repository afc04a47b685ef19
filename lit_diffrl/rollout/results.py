"""Results on disk and on the screen."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, making its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(data)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain values as JSON, whole or not at all."""
    write_bytes(path, (json.dumps(jsonable(content), indent=2) + "\n").encode())


def unused_name(folder: Path, name: str) -> str:
    """``name``, or the first of ``name-2``, ``name-3``, … of which the folder holds no JSON file yet."""
    candidates = (name if i == 1 else f"{name}-{i}" for i in itertools.count(1))
    return next(c for c in candidates if not (folder / f"{c}.json").exists())


def jsonable(value: Any) -> Any:
    """Reduce options (dataclasses, mappings, sequences) to what JSON holds; anything else becomes its text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "as_dict"):  # jsonargparse's Namespace
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items() if not str(k).startswith("_")}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Set names and values in two columns between two rules, for the end of a run."""
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    rule = "─" * max(len(line) + 2 for line in lines)
    return "\n".join([rule, *lines, rule])


def duration(seconds: float) -> str:
    """Write a time as people say it: ``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
