"""The yardstick u that timings are divided by, measured around every benchmark, and the table of ratios."""

from __future__ import annotations

import pkgutil
import platform
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lit_diffrl.memory import keep_freed_memory
from lit_diffrl.nets.prepared import prepared_once

torch.set_num_threads(1)
keep_freed_memory()  # as the command line does

YARDSTICK_ROUNDS = 10
IN_A_ROW = 10  # one alone may meet a moment of a higher clock, too short for any update
U = pytest.StashKey[float]()
ROWS = pytest.StashKey[list[tuple[str, float, int, str]]]()
PROFILED = 20
PROFILES = pytest.StashKey[list[tuple[str, float, list[tuple[float, int, str]]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--profile", action="store_true", help="also the operators that updates and decisions consist of")
    parser.addoption("--bf16", action="store_true", help="networks in bfloat16, as under bf16-mixed; u stays float32")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[U], config.stash[ROWS], config.stash[PROFILES] = float("inf"), [], []


@pytest.fixture(scope="session")
def yardstick() -> Callable[[], Any]:
    """One eager forward of a perceptron of three hidden layers of 256, Mish, on 256 rows: an actor's work."""
    sizes = [30, 256, 256, 256, 3]
    layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.Mish())]
    net, x = nn.Sequential(*layers[:-1]), torch.randn(256, 30)

    def forward() -> Any:
        with torch.no_grad():
            return net(x)

    return forward


@pytest.fixture
def timer(request: pytest.FixtureRequest) -> Callable[[], float]:
    """The clock that ``--benchmark-timer`` names."""
    found: Callable[[], float] = pkgutil.resolve_name(request.config.getoption("benchmark_timer"))
    return found


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """Add a row that was measured by other means: label and seconds."""
    return lambda label, seconds: request.config.stash[ROWS].append((label, seconds, 1, ""))


@pytest.fixture
def profiled(request: pytest.FixtureRequest) -> Callable[[str, Callable[[], Any]], None]:
    """With ``--profile``: call a function 20 times under torch's profiler and note what its operators take.

    Operators count each of their kind that calls another, and autograd's nodes.
    """

    def profile(label: str, function: Callable[[], Any]) -> None:
        if not request.config.getoption("profile"):
            return
        start = perf_counter()
        for _ in range(PROFILED):
            function()
        whole = perf_counter() - start
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            for _ in range(PROFILED):
                function()
        operators = [(e.self_cpu_time_total * 1e-6, e.count, e.key) for e in found.key_averages()]
        request.config.stash[PROFILES].append((label, whole, sorted(operators, reverse=True)))

    return profile


@pytest.fixture
def unlogged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates that log nothing, which by default are 49 of 50.

    Repeated outside of Lightning's loop, an epoch's first update, which logs, would stand for all of them.
    """
    from lit_diffrl.methods.base import Method

    monkeypatch.setattr(Method, "reporting", False)


@pytest.fixture(scope="session", autouse=True)
def minari_root(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An empty root of Minari datasets; the maze is collected into it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        yield


def write_hopper(path: Path, steps: int) -> str:
    """Random steps of Hopper's dimensions as a file of D4RL's layout, in episodes of 1,000."""
    import h5py

    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(steps, 11)).astype(np.float32)
        file["next_observations"] = rng.normal(size=(steps, 11)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, size=(steps, 3)).astype(np.float32)
        file["rewards"] = rng.uniform(0, 3, size=steps).astype(np.float32)
        file["terminals"] = np.zeros(steps, dtype=bool)
        file["timeouts"] = np.arange(steps) % 1000 == 999
    return str(path)


@pytest.fixture(scope="session")
def hopper_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """100,000 random steps."""
    return write_hopper(tmp_path_factory.mktemp("d4rl") / "hopper_medium-v2.hdf5", 100_000)


@pytest.fixture(scope="session")
def million_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """1,000,000 random steps."""
    return write_hopper(tmp_path_factory.mktemp("million") / "hopper_medium-v2.hdf5", 1_000_000)


@pytest.fixture(autouse=True)
def row(
    request: pytest.FixtureRequest, benchmark: Any, yardstick: Callable[[], Any], timer: Callable[[], float]
) -> Iterator[None]:
    """Measure u before and after a benchmark and note its row of the table; the least times count."""
    stash = request.config.stash

    def measure() -> None:
        for _ in range(YARDSTICK_ROUNDS):
            start = timer()
            for _ in range(IN_A_ROW):
                yardstick()
            stash[U] = min(stash[U], (timer() - start) / IN_A_ROW)

    measure()
    # As in a run, where what acts and draws rounds each weight once.
    bf16, updates = request.config.getoption("bf16"), "update" in request.node.name
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=not updates),
        nullcontext() if updates else prepared_once(long=True),
    ):
        yield
    measure()
    if benchmark.stats is not None:  # None under --benchmark-disable
        label = benchmark.extra_info.get("label", request.node.name)
        count = benchmark.extra_info.get("count", 1)  # such as the environments that a call decides for
        stash[ROWS].append((label, benchmark.stats.stats.min, count, str(benchmark.extra_info.get("published", ""))))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows, u = config.stash[ROWS], config.stash[U]
    if not rows:  # as under --benchmark-disable
        return
    width = max(len(label) for label, *_ in rows)
    write = terminalreporter.write_line
    write(
        f"u = {1000 * u:.3f} ms; torch {torch.__version__}, Python {platform.python_version()}, 1 thread, "
        f"{'bfloat16' if config.getoption('bf16') else 'float32'}; least times"
    )
    write(f"| {'':{width}} | {'ms':>8} | {'u':>7} | {'a second':>8} | published, u |")
    write(f"|{'-' * (width + 2)}|{'-' * 9}:|{'-' * 8}:|{'-' * 9}:|{'-' * 13}:|")
    for label, seconds, count, published in rows:
        rate = f"{count / seconds:8.4g} | {published:>12}"
        write(f"| {label:{width}} | {1000 * seconds:8.2f} | {seconds / u:7.2f} | {rate} |")
    for label, whole, operators in config.stash[PROFILES]:
        inside, calls = sum(seconds for seconds, *_ in operators), sum(count for _, count, _ in operators) // PROFILED
        write(f"{label}: {1000 * whole / PROFILED:.2f} ms; {1000 * inside / PROFILED:.2f} ms in {calls} operators:")
        for seconds, count, name in operators[:10]:
            share, each = 100 * seconds / inside, 1000 * seconds / PROFILED
            write(f"  {share:5.1f} %  {each:8.3f} ms  {count / PROFILED:6.0f} x {name}")
