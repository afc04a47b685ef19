"""Several processes of one run: which of them speaks, and the end of all when one has failed."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from lit_diffrl.errors import ConfigError

PATIENCE = 5.0  # seconds between the end of a process's connections and the end of the process


def first_process() -> bool:
    """Whether this is the only process of the run, or the one that speaks for all."""
    return getattr(rank_zero_only, "rank", 0) == 0


@rank_zero_only
def say(line: str, *, error: bool = False) -> None:
    """Print on the first process only."""
    print(line, file=sys.stderr if error else sys.stdout, flush=True)


def end_others(launcher: Any, error: BaseException) -> None:
    """End the processes that this one started: they would wait for it, on GPUs for half an hour.

    Args:
        launcher: The strategy's; None where there is a single process.
        error: What ends this one.

    Raises:
        ConfigError: In place of ``error``, when it only tells that another process has failed before.
    """
    started = getattr(launcher, "procs", [])
    failed = isinstance(error, RuntimeError) and _one_failed(started)
    if started:
        launcher.kill(signal.SIGKILL)
    if failed:
        raise ConfigError("another process of this run has failed; what it said stands above") from error


def _one_failed(processes: list[Any]) -> bool:
    """Wait a moment for one of several processes to end with an error."""
    deadline = time.monotonic() + PATIENCE
    while processes and time.monotonic() < deadline:
        if any(process.poll() for process in processes):
            return True
        time.sleep(0.02)
    return False
