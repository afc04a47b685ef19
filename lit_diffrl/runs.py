"""Run folders: where a run writes, and which checkpoint an option means.

A run lives in ``<logs>/<method>/<dataset>/<run>/``: event files, ``config.yaml``, ``checkpoints/{last,best}.ckpt`` (and
candidates for the best where it is chosen offline), ``pictures/`` and ``results/``. Nothing here imports torch, so that
a wrong name is answered at once.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from lit_diffrl.errors import ConfigError, causes, nearest

ALIASES = ("last", "best")
# Of a full disk, a used-up quota or file size; a folder of another user or mounted to be read; a file in its place.
UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EEXIST),
)


def dataset_slug(dataset: str | Sequence[str]) -> str:
    """Name a dataset as one folder: ``mujoco/hopper/medium-v0`` becomes ``mujoco-hopper-medium-v0``.

    Args:
        dataset: An id, ids joined by ``+``, a list of them, or the path of an HDF5 file (its stem is used).
    """
    names = dataset.split("+") if isinstance(dataset, str) else dataset
    short = []
    for name in (n.strip() for n in names):
        if name.endswith((".hdf5", ".h5")):
            name = Path(name).stem
        short.append(re.sub(r"[^\w.]+", "-", name.removeprefix("lit_diffrl/")).strip("-."))
    return "+".join(name for name in short if name) or "data"


def run_folder(checkpoint: Path) -> Path:
    """Folder of the run that a checkpoint belongs to; its own folder when it was moved out of a run."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def continues(checkpoint: Path, folder: Path | None = None) -> bool:
    """Whether training from a checkpoint goes on in its own run.

    Only a run's last checkpoint continues it. From any other one a new run branches off, or that run's newer checkpoint
    and curves would be overwritten.

    Args:
        checkpoint: Where training starts from.
        folder: The run folder asked for; None when none was.
    """
    last_of_run = checkpoint.name == "last.ckpt" and checkpoint.parent.name == "checkpoints"
    return last_of_run and (folder is None or folder.resolve() == run_folder(checkpoint).resolve())


def new_run(parent: Path, name: str | None) -> Path:
    """Name the folder of a run that starts, without making it.

    Args:
        parent: ``<logs>/<method>/<dataset>``.
        name: The run's name; None for the time of day.

    Raises:
        ConfigError: If the folder already holds checkpoints, which the new run would overwrite.
    """
    if name is None:
        # To the millisecond: runs of a sweep begin in the same second.
        stamp = name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3]
        twin = 1
        while (parent / name).exists():
            twin += 1
            name = f"{stamp}_{twin}"
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ConfigError(f"--run must be a plain folder name, got {name!r}; the folder above it is --logs")
    folder = parent / name
    if any((folder / "checkpoints").glob("*.ckpt")):
        raise ConfigError(
            f"run {name!r} already has checkpoints in {folder / 'checkpoints'}; continue it with --ckpt_path last, or "
            "choose another --run"
        )
    return folder


def outlast_events(folder: Path) -> None:
    """Wait, for less than a second, until a new event file of a run sorts behind those that are there.

    TensorBoard reads the files of a run in the order of their names, which begin with the second they were made in. Of
    two from one second the later one may come first; what it takes back of the older one's curves is then lost.

    Args:
        folder: The run folder.
    """
    made = {file.name.split(".")[3] for file in folder.glob("events.out.tfevents.*.*")}
    while f"{int(time.time()):010d}" in made:
        time.sleep(0.02)


def find_checkpoint(value: str, logs: Path, pattern: str) -> Path:
    """Find the checkpoint that ``--ckpt_path`` means.

    Args:
        value: A file, or ``last`` or ``best``: the newest of that name among the runs.
        logs: Folder of all runs.
        pattern: The runs to search, below ``logs``: ``method/dataset/run`` with ``*`` for any.

    Raises:
        ConfigError: If there is none; it names the folder searched, or the nearest files.
    """
    if value in ALIASES:
        found = list(logs.glob(f"{pattern}/checkpoints/{value}.ckpt"))
        if found:
            return max(found, key=lambda p: p.stat().st_mtime)
        searched = logs / pattern.rstrip("*/")
        elsewhere = _newest(logs)
        hint = f"; the newest checkpoint elsewhere is {elsewhere[0]}" if elsewhere else ""
        raise ConfigError(
            f"--ckpt_path {value}: no {value}.ckpt below {searched}{hint}; give the file, or begin a "
            "run by fit without --ckpt_path"
        )
    path = Path(value).expanduser()
    if path.is_file():
        return path
    near = sorted({str(p) for folder in (path.parent, run_folder(path)) for p in folder.glob("**/*.ckpt")})[:3]
    near = near or [str(p) for p in _newest(logs)]
    hint = nearest(value, near) or (f"there is {', '.join(near)}" if near else f"{logs} holds no checkpoint yet")
    kind = "is a folder" if path.is_dir() else "does not exist"
    raise ConfigError(f"--ckpt_path {value} {kind}; {hint}")


def _newest(logs: Path, n: int = 3) -> list[Path]:
    return sorted(logs.glob("*/*/*/checkpoints/*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True)[:n]


def refuse_unwritable(error: BaseException, folder: Path) -> None:
    """Say so in one line when an error comes from a full disk or a run folder that may not be written to.

    Args:
        error: What ended the run: often only a consequence, met while closing.
        folder: The run folder.

    Raises:
        ConfigError: The one that was raised for this, or one that names the file or the folder.
    """
    chain = list(causes(error))
    refused = [c for c in chain if isinstance(c, OSError) and c.errno in UNWRITABLE]
    # What fails on a file that is open already does not know its name.
    files = [folder if c.filename is None else Path(os.fsdecode(c.filename)) for c in refused]
    if not any(_concerns(file.absolute(), folder.absolute()) for file in files):
        return
    for cause in chain:
        if isinstance(cause, ConfigError):
            raise cause
    goes_on = "continue with --ckpt_path last" if (folder / "checkpoints/last.ckpt").is_file() else "start again"
    raise ConfigError(
        f"cannot write to {files[0]}: {refused[0].strerror}. Make room or give the right to write there, then {goes_on}"
    ) from error


def _concerns(file: Path, folder: Path) -> bool:
    """Whether a file is in a folder, or is one of the folders above it."""
    return file.is_relative_to(folder) or folder.is_relative_to(file)
