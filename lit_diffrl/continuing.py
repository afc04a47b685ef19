"""What a command line with ``--ckpt_path`` goes on with: which file, whose config, and what may not differ."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lit_diffrl import runs
from lit_diffrl.arguments import last_option, options, read_config
from lit_diffrl.errors import ConfigError
from lit_diffrl.processes import first_process

AGREED = "LIT_DIFFRL_CHECKPOINT"  # what `--ckpt_path last` means to all processes of a run


def with_own_config(args: list[str]) -> list[str]:
    """Let a checkpoint bring its run's config.yaml when nothing else on the command line chooses a method."""
    given = last_option(args, "ckpt_path")
    named = any(k == "model" or k == "model.class_path" for k, _ in options(args))
    configs = [read_config(v) for k, v in options(args) if k == "config" and v is not None]
    if given is None or named or any("model" in c for c in configs):
        return args
    logs = Path(last_option(args, "logs") or "tb_logs").expanduser()
    checkpoint = agreed_checkpoint(given, logs, f"*/*/{last_option(args, 'run') or '*'}")
    config = runs.run_folder(checkpoint) / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"--ckpt_path {given} without --config: its run has no {config}; give --config FILE")
    return [args[0], "--config", str(config), *args[1:], "--ckpt_path", str(checkpoint)]


def agreed_checkpoint(given: str, logs: Path, pattern: str) -> Path:
    """Find the checkpoint that an option means.

    Of several processes the first decides, through the environment that the others inherit: while they start, another
    run may save a newer one.
    """
    if not first_process() and given in runs.ALIASES and AGREED in os.environ:
        return Path(os.environ[AGREED])
    found = runs.find_checkpoint(given, logs, pattern)
    if first_process():
        os.environ[AGREED] = str(found.absolute())
    return found


def check_method(checkpoint: Path, saved: str, method: type) -> None:
    """Refuse a checkpoint that another method wrote.

    Raises:
        ConfigError: With both methods.
    """
    ours = f"{method.__module__}.{method.__qualname__}"
    if saved != ours:
        raise ConfigError(
            f"--ckpt_path {checkpoint} is a checkpoint of {saved}, the config says {ours}; give the config of that "
            f"run, {runs.run_folder(checkpoint) / 'config.yaml'}, or start a new run without --ckpt_path"
        )


def refuse_shorter_epochs(data: Any, done: int) -> None:
    """Refuse epochs that would have ended before the place where training goes on.

    Raises:
        ConfigError: With both numbers.
    """
    length = data.get("updates_per_epoch")
    if done and length is not None and length <= done:
        raise ConfigError(
            f"--data.updates_per_epoch {length}: the checkpoint was saved after {done} updates of an epoch, whose end "
            f"and evaluation would be passed over; give at least {done + 1}"
        )


def refuse_other_seed(checkpoint: Path, saved: int, current: Any, fit: bool) -> None:
    """Refuse to continue a run under another seed: it would be neither the one run nor the other.

    Raises:
        ConfigError: With both seeds.
    """
    if fit and int(current) != saved:
        raise ConfigError(
            f"--ckpt_path {checkpoint} continues a run of seed {saved}, got {current}: give --seed_everything {saved}, "
            "or branch off into a run of another name: --run NAME and the checkpoint's file"
        )
