"""How checkpoints reach the disk: whole or not at all, and as data that nothing in them can turn into code."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lit_diffrl.errors import ConfigError, nearest


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its name, forces it to the disk and renames it; reads with ``weights_only=True``.

    A process killed while it saves, or a full disk, leaves the file of before. Lightning's own class writes to the
    system's temporary folder first: where that is another file system, the last step copies, and can be torn.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: Tensors and plain values.
            path: The file to replace.
            storage_options: Unused; Lightning's interface has it.

        Raises:
            ConfigError: If it cannot be written; a file of that name is then as it was.
        """
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        beside = path.with_name(f".{path.name}.saving")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError as error:
            kept = f"; the {path.name} of before is intact" if path.is_file() else ""
            advice = ", then continue with --ckpt_path last" if path.with_name("last.ckpt").is_file() else ""
            raise ConfigError(
                f"cannot save {path}: {error.strerror or error} ({content.tell() / 2**20:.1f} MiB are needed)"
                f"{kept}. Make room or give the right to write there{advice}"
            ) from error
        finally:
            # Still there only if something went wrong, a second Ctrl-C included.
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
        _sync_folder(path.parent)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint as data; ``weights_only`` is always true."""
        return super().load_checkpoint(path, map_location, weights_only=True)


def read_plain(path: str | Path) -> Any:
    """Read what torch saved as data only, tensors and plain values: nothing in the file is executed.

    Raises:
        ConfigError: When there is no such file, or it is torn or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.ckpt"))
        hint = nearest(path.name, there) or (f"the folder has {', '.join(there)}" if there else "")
        raise ConfigError(f"no checkpoint at {path}" + (f"; {hint}" if hint else "; train one with 'fit' first"))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for torn, foreign and unsafe files
        reason = str(error).partition("\n")[0].partition(". ")[0] or "it ends too early"
        others = sorted(str(p) for p in path.parent.glob("*.ckpt") if p.name != path.name)
        advice = f"there is also {others[0]}" if others else "there is no other one beside it: train again"
        raise ConfigError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {reason}); it may be "
            f"torn or hold more than tensors and plain values; {advice}"
        ) from error


def own_arguments(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments among saved hyperparameters, without those in which Lightning names classes and functions."""
    return {k: v for k, v in saved.items() if not k.startswith("_")}


def _sync_folder(folder: Path) -> None:
    """Force a folder's new names to the disk, where the system can; the file itself is there already."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
