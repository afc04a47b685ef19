"""From a checkpoint file to an agent that acts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lit_diffrl.errors import ConfigError, nearest
from lit_diffrl.methods.base import CHECKPOINT_KEY, Method


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint as data only: nothing in the file is executed.

    Raises:
        ConfigError: When there is no such file, or it is not a readable checkpoint of ours.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.ckpt"))
        hint = nearest(path.name, there) or (f"the folder has {', '.join(there)}" if there else "")
        raise ConfigError(f"no checkpoint at {path}" + (f"; {hint}" if hint else "; train one with 'fit' first"))
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for torn, foreign and unsafe files
        reason = str(error).partition("\n")[0] or "it ends too early"
        others = sorted(str(p) for p in path.parent.glob("*.ckpt") if p.name != path.name)
        advice = f"there is also {others[0]}" if others else "there is no other one beside it: train again"
        raise ConfigError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason}); it may be "
            f"torn or hold more than tensors and plain values; {advice}"
        ) from error
    own = checkpoint.get(CHECKPOINT_KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(own, dict) or not {"method", "spec"} <= own.keys() or "state_dict" not in checkpoint:
        raise ConfigError(f"{path} was not written by lit_diffrl's fit; give a file from a run's checkpoints folder")
    return checkpoint


def method_class(class_path: str) -> type[Method]:
    """Find an imported method by its path.

    Raises:
        ConfigError: When no imported subclass of Method has that path.
    """
    import lit_diffrl.methods  # noqa: F401  (our own methods register as subclasses by being imported)

    known: dict[str, type[Method]] = {}
    queue: list[type[Method]] = [Method]
    while queue:
        kind = queue.pop()
        known[f"{kind.__module__}.{kind.__qualname__}"] = kind
        queue.extend(kind.__subclasses__())
    if class_path not in known:
        raise ConfigError(
            f"the checkpoint is of {class_path}, which is not an imported method; import the module that defines it "
            f"before loading {nearest(class_path, known)}".rstrip()
        )
    return known[class_path]


def load_agent(path: str | Path, device: str) -> Method:
    """Build the checkpoint's method, load its weights and put it in evaluation mode; see :func:`lit_diffrl.load`."""
    checkpoint = read_checkpoint(path)
    kind = method_class(checkpoint[CHECKPOINT_KEY]["method"])
    arguments = {k: v for k, v in checkpoint.get("hyper_parameters", {}).items() if not k.startswith("_")}
    try:
        agent = kind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"{path} was written by another version of {kind.__name__} ({error}); use that version, or train again"
        ) from error
    agent.on_load_checkpoint(checkpoint)
    agent.load_state_dict(checkpoint["state_dict"])
    return agent.to(device).eval()
