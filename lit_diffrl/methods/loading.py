"""From a checkpoint file to an agent that acts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_diffrl.checkpoint_io import own_arguments, read_plain
from lit_diffrl.errors import ConfigError, nearest
from lit_diffrl.methods.base import CHECKPOINT_KEY, Method


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint as data only: nothing in the file is executed.

    Raises:
        ConfigError: When there is no such file, or it is not a readable checkpoint of ours.
    """
    checkpoint = read_plain(path)
    found = checkpoint if isinstance(checkpoint, dict) else {}
    own, weights = found.get(CHECKPOINT_KEY), found.get("state_dict")
    parts = (own.get("method"), own.get("spec")) if isinstance(own, dict) else ()
    if not parts or not isinstance(parts[0], str) or not isinstance(parts[1], dict) or not isinstance(weights, dict):
        raise ConfigError(f"{path} was not written by lit_diffrl's fit; give a file from a run's checkpoints folder")
    return found


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


def load_agent(path: str | Path, device: Any, **arguments: Any) -> Method:
    """Build the checkpoint's method, load its weights and put it in evaluation mode; see :func:`lit_diffrl.load`.

    Args:
        path: The checkpoint.
        device: Where to put the networks.
        arguments: Of the method, in place of those saved. A dict replaces the fields of a group that it has, unless it
            chooses another kind by ``name``, whose fields the saved ones are not.
    """
    checkpoint = read_checkpoint(path)
    kind = method_class(checkpoint[CHECKPOINT_KEY]["method"])
    saved = own_arguments(checkpoint.get("hyper_parameters", {}))
    for name, value in arguments.items():
        saved[name] = _merged(saved.get(name), value)
    try:
        agent = kind(**saved)
    except TypeError as error:
        raise ConfigError(
            f"{path} was written by another version of {kind.__name__} ({error}); use that version, or train again"
        ) from error
    agent.on_load_checkpoint(checkpoint)
    agent.load_state_dict(checkpoint["state_dict"])
    return agent.to(device).eval()


def _merged(saved: Any, given: Any) -> Any:
    """A group of options with the fields that are given in place of those saved; any other value as given."""
    if not (isinstance(given, Mapping) and isinstance(saved, Mapping)):
        return given
    return {**saved, **given} if given.get("name", saved.get("name")) == saved.get("name") else given
