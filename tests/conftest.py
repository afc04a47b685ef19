"""Fixtures that tests share: tiny Minari datasets in a folder of their own, and runs in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive() -> None:
    """A suite started in the background inherits SIGINT ignored; runs in its process must be stopped by it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def mazes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root of Minari datasets with short walks, ``umaze-v0`` and ``umaze-dense-v0``; to be read only."""
    from lit_diffrl.data import pointmaze

    root = tmp_path_factory.mktemp("mazes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        patch.setattr(pointmaze, "REFERENCE_EPISODES", 1)
        for variant in ("umaze", "umaze-dense"):
            pointmaze.collect(f"lit_diffrl/pointmaze/{variant}-v0", steps=3_000, progress=False)
    return root


class Process:
    """A command line that runs in a process of its own."""

    def __init__(self, pid: int, log: Path, ask: Callable[[dict[str, Any]], Any]) -> None:
        self.pid, self.log, self._ask = pid, log, ask
        self.code: int | None = None

    @property
    def out(self) -> str:
        """What it has printed so far, errors included."""
        return self.log.read_text()

    def running(self) -> bool:
        if self.code is None:
            self.code = self._ask({"poll": self.pid})
        return self.code is None

    def send(self, number: int) -> None:
        """Send a signal; to a process that has ended, nothing happens."""
        if self.running():
            os.kill(self.pid, number)

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        """Wait until something is the case; fail if the process ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.running() and time.monotonic() < deadline, self.out
            time.sleep(0.005)

    def wait(self, seconds: float = 120) -> int:
        """Wait for its end: the exit code, or minus the signal that killed it."""
        deadline = time.monotonic() + seconds
        while self.running():
            assert time.monotonic() < deadline, self.out
            time.sleep(0.01)
        assert self.code is not None
        return self.code


Launch = Callable[..., Process]


@pytest.fixture(scope="session")
def launch(mazes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Start command lines in processes of their own: ``launch(*args, folder=..., env=..., file_size=..., dies=...)``.

    Such a process begins within milliseconds, since it is forked from one that has imported everything.
    """
    root = Path(__file__).parents[1]
    logs = tmp_path_factory.mktemp("logs")
    path = f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MINARI_DATASETS_PATH": str(mazes)}
    command = [sys.executable, str(root / "tests/fork_server.py")]
    pipe = subprocess.PIPE
    with (
        (logs / "server.txt").open("w") as errors,
        subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=errors, text=True) as server,
    ):
        assert server.stdin is not None and server.stdout is not None
        stdin, stdout = server.stdin, server.stdout

        def ask(order: dict[str, Any]) -> Any:
            print(json.dumps(order), file=stdin, flush=True)
            return json.loads(stdout.readline())

        def start(
            *args: str,
            folder: Path = Path(),
            env: dict[str, str] | None = None,
            file_size: int | None = None,
            dies: int | None = None,
        ) -> Process:
            # Event files are read in the order of their names, which begin with a second: no two runs in the same.
            begun = [int(p.name.split(".")[3]) for p in folder.glob("**/events.out.tfevents.*")]
            while begun and time.time() < max(begun) + 1:
                time.sleep(0.01)
            log = logs / f"{len(list(logs.iterdir()))}.txt"
            order = {"args": args, "folder": str(folder.absolute()), "log": str(log)}
            return Process(ask({**order, "env": env or {}, "file_size": file_size, "dies": dies}), log, ask)

        yield start
        stdin.close()


@pytest.fixture
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty root of Minari datasets, for this test only."""
    root = tmp_path / "minari"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


@pytest.fixture
def make_minari(minari_root: Path) -> Callable[..., str]:
    """Factory of small random Minari datasets.

    ``make_minari(dataset_id, n_episodes, length, obs_dim, action_dim, env=..., edit=..., **overrides)`` returns the id.
    ``env`` is an id or EnvSpec; ``edit(episode, index)`` changes the dict of arrays of an episode before it is stored;
    with ``dict_obs`` observations are those of a point maze, with that constant ``goal``; the rest goes to
    ``minari.create_dataset_from_buffers``.
    """

    def make(
        dataset_id: str = "test/point-v0",
        n_episodes: int = 3,
        length: int = 20,
        obs_dim: int = 4,
        action_dim: int = 2,
        *,
        env: Any = None,
        dict_obs: bool = False,
        goal: tuple[float, float] = (1.0, -1.0),
        edit: Callable[[dict[str, Any], int], None] | None = None,
        **overrides: Any,
    ) -> str:
        import minari
        from gymnasium.spaces import Box, Dict
        from minari.data_collector import EpisodeBuffer

        def box(size: int) -> Box:
            return Box(-np.inf, np.inf, (size,), np.float64)

        rng = np.random.default_rng(0)
        buffers = []
        for index in range(n_episodes):
            obs: Any = rng.normal(size=(length + 1, obs_dim))
            if dict_obs:
                goals = np.tile(np.asarray(goal, dtype=np.float64), (length + 1, 1))
                obs = {"observation": obs, "achieved_goal": obs[:, :2], "desired_goal": goals}
            episode = {
                "observations": obs,
                "actions": rng.uniform(-1, 1, size=(length, action_dim)).astype(np.float32),
                "rewards": rng.normal(size=length),
                "terminations": np.zeros(length, dtype=bool),
                "truncations": np.arange(length) == length - 1,
                "infos": {},
            }
            if edit is not None:
                edit(episode, index)
            buffers.append(EpisodeBuffer(**episode))
        plain = box(obs_dim)
        spaces = {
            "observation_space": Dict({"observation": plain, "achieved_goal": box(2), "desired_goal": box(2)})
            if dict_obs
            else plain,
            "action_space": Box(-1, 1, (action_dim,), np.float32),
        }
        # Minari stores these only with an environment, which most of our tests do without.
        scores = {key: overrides.pop(key) for key in ("ref_min_score", "ref_max_score") if key in overrides}
        dataset = minari.create_dataset_from_buffers(dataset_id, buffers, env, **{**spaces, **overrides})
        dataset.storage.update_metadata(scores)
        return dataset_id

    return make
