"""Runs the command line in processes that begin at once: what takes seconds to import is imported here, before a fork.

Each line read is an order in JSON. ``{"args": …, "folder": …, "log": …}`` starts a run and is answered by its process
id, ``{"poll": id}`` by how it ended: null while it runs, the exit code, or minus the signal that killed it.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot  # noqa: F401
import minari  # noqa: F401
import mujoco  # noqa: F401
import torch
import torch.utils.tensorboard

import lit_diffrl.cli  # noqa: F401
from lit_diffrl.__main__ import main


def start(args: list[str], folder: str, log: str, env: dict[str, str], file_size: int | None, dies: int | None) -> int:
    """Fork a process that runs a command line in a folder.

    Args:
        args: The command line.
        folder: Where it runs.
        log: Where its output goes.
        env: Added to the environment.
        file_size: Bytes that a file may have; None for any number.
        dies: It kills itself instead of forcing a file to the disk, or of renaming one, for this many-th time.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(env)
        os.chdir(folder)
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        if dies is not None:
            die_at(dies)
        code = main(args)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def die_at(count: int) -> None:
    """Count the calls of ``os.fsync`` and ``os.replace`` and die in the place of one of them."""
    calls = itertools.count(1)

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            function(*args)

        return call

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)


def poll(pid: int) -> int | None:
    """How a process ended; None while it runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(poll(order["poll"]) if "poll" in order else start(**order)), flush=True)
