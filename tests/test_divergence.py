"""Numbers that are not finite: every config stops, says where and why, and leaves a checkpoint to go on from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from short_runs import CONFIGS, ROOT, UPDATES, Config

from lit_diffrl.__main__ import main
from lit_diffrl.data import TrajectoryData, TransitionData, WindowData
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import DMEMM, Method, guard
from lit_diffrl.methods.base import Phase
from lit_diffrl.methods.guard import Guard
from lit_diffrl.methods.synthetic_learner import Synthesis
from lit_diffrl.seeding import Place

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def folder(mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.delenv("LIT_DIFFRL_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> Config:
    return Config(request.param)


def fit(config: Config, *more: str) -> int:
    return main(["fit", *config.options, "--run", "a", *more])


def last() -> Path:
    (path,) = Path("tb_logs").glob("*/*/a/checkpoints/last.ckpt")
    return path


def last_epoch() -> int:
    """Epoch of the last checkpoint, counted from 0; -1 where there is none."""
    found = list(Path("tb_logs").glob("*/*/a/checkpoints/last.ckpt"))
    return int(torch.load(found[0], weights_only=True)["epoch"]) if found else -1


def stopped(capsys: pytest.CaptureFixture[str], config: Config, *more: str) -> str:
    """The one line that a run ends with."""
    capsys.readouterr()
    assert fit(config, *more) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def report(name: str = "not_finite.json") -> dict[str, Any]:
    """What the run has left; read as strictly as JSON is defined."""
    (path,) = Path("tb_logs").glob(f"*/*/a/{name}")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    content: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    return content


def assert_same(first: Any, second: Any) -> None:
    """Weights and optimizer states, bit for bit."""
    a, b = ({**dict(tensors(c["state_dict"])), **dict(tensors(c["optimizer_states"]))} for c in (first, second))
    assert a.keys() == b.keys() and len(a) > 10
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def tensors(content: Any, place: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(content, torch.Tensor):
        yield place, content
    elif isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from tensors(value, f"{place}/{key}")


# ---------------------------------------------------------------- injected, in every phase of every config


class Fault:
    """What goes wrong at one update: a NaN in every part of its batch, or an infinite gradient behind a finite loss."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.batch_at: Place | None = None
        self.gradient_at: Place | None = None
        self.batch: Any = None
        self.data: Any = None
        for kind in (WindowData, TransitionData, TrajectoryData):
            patch.setattr(kind, "draw", self._draw(kind.draw))  # type: ignore[attr-defined]
        patch.setattr(Method, "manual_backward", self._backward(Method.manual_backward))

    def _draw(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        def broken(data: Any, phase: Phase, place: Place) -> Any:
            batch = draw(data, phase, place)
            if place != self.batch_at:
                return batch
            self.batch, self.data = batch, data
            spoiled = {k: v.clone() for k, v in batch._asdict().items() if v.is_floating_point()}
            for x in spoiled.values():
                x.view(-1)[0] = NAN
            return batch._replace(**spoiled)

        return broken

    def _backward(self, backward: Callable[..., None]) -> Callable[..., None]:
        def broken(method: Method, loss: torch.Tensor) -> None:
            backward(method, loss)
            if method.draws.place == self.gradient_at:
                spoiled = next(p.grad for p in method.parameters() if p.grad is not None)
                spoiled.view(-1)[0] = INF

        return broken

    def redrawn(self, indices: dict[str, Any]) -> Any:
        """The batch that a report's indices stand for."""
        steps, *horizon = indices.values()
        rows = torch.tensor(steps)
        if isinstance(self.data, TransitionData) and not horizon:  # some steps are left out of its table
            rows = torch.searchsorted(self.data.steps, rows)
        return (self.data.windows if horizon else self.data.transitions)(rows, *horizon)


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    return Fault(monkeypatch)


def phases(config: Config) -> list[str]:
    """Names of the config's phases, of two epochs each."""
    from lit_diffrl.cli import DiffRLCLI

    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            DiffRLCLI, "_run_subcommand", lambda cli, _: names.extend(p.name for p in cli.model.phases if p.epochs)
        )
        assert main(["fit", *config.options, "--run", "unused"]) == 0
    return names


def test_a_fault_stops_every_phase_of_every_config(
    config: Config, fault: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, phase in enumerate(phases(config)):
        # A NaN in the loss, in the first epoch of the phase.
        place = fault.batch_at = Place(2 * number, 1)
        more = ("--ckpt_path", "last") if number else ()
        line, before = stopped(capsys, config, *more), last_epoch()
        assert f"error: {config.method.__name__}, phase {phase}, epoch {place.epoch}, update 1 (" in line
        assert "loss/" in line and " = nan" in line and "look at these steps of the dataset" in line
        assert before == place.epoch - 1, "the last checkpoint is that of the epoch before"
        content = report()
        assert (content["phase"], content["epoch"], content["update"]) == (phase, place.epoch, 1)
        assert "nan" in [v for k, v in content["values"].items() if k.startswith("loss/")]
        spoiled = {k: int(v.is_floating_point()) for k, v in fault.batch._asdict().items()}
        assert {k: v["not_finite"] for k, v in content["batch"].items()} == spoiled
        redrawn, synthetic = fault.redrawn(content["indices"]), content.get("synthetic_rows", 0)
        assert (synthetic > 0) is (phase == "policy" and issubclass(config.method, Synthesis))
        real = [x[: len(x) - synthetic] for x in fault.batch]  # a mixed batch begins with them
        assert all(torch.equal(x, y) for x, y in zip(redrawn, real, strict=True))

        # From there, an infinite gradient in the second.
        fault.batch_at, place = None, Place(2 * number + 1, 2)
        fault.gradient_at = place
        line = stopped(capsys, config, *more)
        assert f"phase {phase}, epoch {place.epoch}, update 2 (" in line and "smaller learning rate (--model." in line
        assert "grad_norm/" in line.partition(" is not finite")[0] and "loss/" not in line.partition(" is not")[0]
        assert last_epoch() == place.epoch - 1
        content = report()
        assert all(isinstance(v, float) for k, v in content["values"].items() if k.startswith("loss/"))
        weights, gradients = (
            [n[kind] for n in content["networks"].values() if n[kind]] for kind in ("weights", "gradients")
        )
        assert sum(g["not_finite"] for g in gradients) == 1 and max(g["max_abs"] for g in gradients) > 0
        assert sum(w["not_finite"] for w in weights) == 0 and max(w["max_abs"] for w in weights) > 0
        fault.gradient_at = None


def test_a_learning_rate_that_diverges_costs_the_epoch_only(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(config, "--trainer.max_epochs", "1") == 0
    for epochs in (2 * len(phases(config)) - 1, 2 * len(phases(config))):
        before = last().read_bytes()
        line = stopped(capsys, config, "--ckpt_path", "last", *config.rates(1e30))
        assert "is not finite" in line and last().read_bytes() == before
        largest = [n["weights"]["max_abs"] for n in report()["networks"].values() if n["weights"]]
        assert max(largest) > 1e20, "why it diverged"
        assert fit(config, "--ckpt_path", "last", "--trainer.max_epochs", str(epochs)) == 0
    after = torch.load(last(), weights_only=True)
    assert main(["fit", *config.options, "--run", "whole"]) == 0
    (whole,) = Path("tb_logs").glob("*/*/whole/checkpoints/last.ckpt")
    assert_same(after, torch.load(whole, weights_only=True))


def test_weights_that_are_not_finite_are_never_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(ROOT / "conf/dmemm.yaml")
    assert fit(config, "--trainer.max_epochs", "1") == 0
    before = last().read_bytes()

    def spoil(method: Method) -> None:
        next(method.world_model.parameters()).data.view(-1)[0] = INF  # type: ignore[union-attr, operator]

    monkeypatch.setattr(Method, "on_validation_start", spoil)  # after the last update of the epoch
    line = stopped(capsys, config, "--ckpt_path", "last")
    assert "DMEMM, phase world_model: weights of world_model are not finite, so they are not saved" in line
    assert last().read_bytes() == before


# ---------------------------------------------------------------- on a GPU: one update late


class Copy:
    """Numbers on their way from a GPU: not there before they have been waited for."""

    waiting: ClassVar[list[Copy]] = []

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.on_host = values, torch.zeros_like(values)
        self.waiting.append(self)

    def synchronize(self) -> None:
        self.on_host.copy_(self.values)
        self.waiting.remove(self)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> type[Copy]:
    """As on a GPU, where numbers arrive later than they are asked for."""

    def send(values: torch.Tensor) -> tuple[torch.Tensor, Copy]:
        copy = Copy(values.clone())
        return copy.on_host, copy

    Copy.waiting.clear()
    monkeypatch.setattr(guard, "send_to_host", send)
    return Copy


def test_numbers_that_arrive_late_are_judged_before_the_next_but_one_update(late: type[Copy]) -> None:
    watch, method = Guard(), torch.nn.Linear(1, 1)
    method.phase, method.hparams, method._trainer = Phase("only", 1), {}, None  # type: ignore[assignment]
    method.diagnose = lambda batch: {"first": float(batch[0])}  # type: ignore[assignment, operator]
    watch.check(method, {"loss/a": torch.tensor(1.0)}, torch.ones(2), Place(0, 0))  # type: ignore[arg-type]
    assert len(late.waiting) == 1, "the device is not waited for"
    watch.check(method, {"loss/a": torch.tensor(NAN)}, torch.full((2,), 2.0), Place(0, 1))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"epoch 0, update 1 .*loss/a is not finite \(loss/a = nan, first = 2\)"):
        watch.check(method, {"loss/a": torch.tensor(1.0)}, torch.ones(2), Place(0, 2))  # type: ignore[arg-type]
    # A run that is begun anew with the same object is not blamed for it.
    late.waiting.clear()
    watch.check(method, {"loss/a": torch.tensor(1.0)}, torch.ones(2), Place(0, 0))  # type: ignore[arg-type]
    watch.settle(method)  # type: ignore[arg-type]
    assert not late.waiting


@pytest.mark.parametrize("update", [0, UPDATES - 1])
def test_what_arrives_late_is_reported_as_what_it_was(
    update: int, late: type[Copy], fault: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the midst of an epoch, and at its last update: its checkpoint is then not written."""
    config = Config(ROOT / "conf/diffuser.yaml")
    names = phases(config)
    for epoch in (1, 2 * len(names) - 1):
        fault.batch_at = Place(epoch, update)
        line = stopped(capsys, config, *(("--ckpt_path", "last") if epoch > 1 else ()))
        assert f"phase {names[epoch // 2]}, epoch {epoch}, update {update} (" in line and last_epoch() == epoch - 1
        content = report()
        assert (content["epoch"], content["update"]) == (epoch, update) and "before the next" in content[
            "networks_seen"
        ]
        assert max(v["not_finite"] for v in content["batch"].values()) == 1
        redrawn = fault.redrawn(content["indices"])
        assert all(torch.equal(x, y) for x, y in zip(redrawn, fault.batch, strict=True))


# ---------------------------------------------------------------- two processes


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_alone_meets_a_nan_takes_the_others_with_it(rank: int, folder: Path) -> None:
    """Not in the gradients, which the processes share, but in a number that is only watched."""
    config = Config(ROOT / "conf/diffuser.yaml")
    driver = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from lit_diffrl.__main__ import main
from lit_diffrl.methods import Method
guard = Method.guard
def watched(method, losses, norms, batch):
    place = method.draws.place
    odd = place.epoch == 0 and place.index == 1 and place.rank == {rank}
    guard(method, {{**losses, "loss/odd": torch.tensor(float("nan") if odd else 1.0)}}, norms, batch)
Method.guard = watched
sys.exit(main())
"""
    Path("driver.py").write_text(driver)
    command = [sys.executable, "driver.py", "fit", *config.options, "--config", str(ROOT / "conf/trainer/ddp.yaml")]
    begun = time.monotonic()
    done = subprocess.run(
        [*command, "--run", "a", "--trainer.max_epochs", "1"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - begun < 100, "nobody has waited for a process that is gone"
    (line, *_) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    name = "not_finite.json" if rank == 0 else "not_finite_process1.json"
    assert f"update 1 (counted from 0, process {rank}): loss/odd is not finite" in line and name in line
    content = report(name)
    assert content["process"] == rank and content["processes"] == 2 and content["values"]["loss/odd"] == "nan"
    assert len(list(Path("tb_logs").glob("*/*/a/not_finite*.json"))) == 1


# ---------------------------------------------------------------- advice


def test_a_report_that_cannot_be_written_does_not_hide_what_stopped_the_run(
    fault: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(ROOT / "conf/diffuser.yaml")
    assert fit(config, "--trainer.max_epochs", "1") == 0
    (last().parents[1] / "not_finite.json").mkdir()
    fault.batch_at = Place(1, 0)
    line = stopped(capsys, config, "--ckpt_path", "last")
    assert "loss/total" in line and "not_finite.json, which could not be written (Is a directory)" in line


def test_the_advice_names_the_options_that_there_are() -> None:
    method = torch.nn.Linear(1, 1)
    method.hparams = {"lr": 1.0, "lr_decay": "none", "world_model": {"lr": 1.0}, "grad_clip": None}  # type: ignore[assignment]
    assert guard.advice(method, None) == (  # type: ignore[arg-type]
        "Try a smaller learning rate (--model.lr, --model.world_model.lr) or gradient clipping (--model.grad_clip 1.0)"
    )
    method.hparams = {"hidden": 3}  # type: ignore[assignment]
    assert guard.advice(method, {}) == "Try a smaller learning rate"  # type: ignore[arg-type]


def test_a_loss_scale_that_falls_to_nothing_is_seen() -> None:
    """Under 16-mixed infinite gradients are skipped over; those that are infinite at any scale would be for ever."""
    method = DMEMM(world_model_epochs=1)
    scaler = SimpleNamespace(scale=lambda x: x * 2.0**-10)
    method._trainer = SimpleNamespace(  # type: ignore[assignment]
        precision_plugin=SimpleNamespace(scaler=scaler), current_epoch=0, log_dir=".", datamodule=None,
        strategy=SimpleNamespace(barrier=lambda name: None),
    )  # fmt: skip
    losses, norms = {"loss/a": torch.tensor(1.0)}, {"grad_norm/a": torch.tensor(INF)}
    method.guard(losses, norms, torch.ones(1))
    scaler.scale = torch.zeros_like
    with pytest.raises(ConfigError, match="1 / loss scale is not finite"):
        method.guard(losses, norms, torch.ones(1))
