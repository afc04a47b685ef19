"""When a signal stops a run, what is saved by then, and what happens to signals that mean nothing to it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lit_diffrl.errors import ConfigError
from lit_diffrl.rollout.checkpoints import LastCheckpoint
from lit_diffrl.stopping import StopAfterUpdate, requeue

UPDATES = 6
Place = tuple[str, int, int]


class Learner(LightningModule):
    """Counts its updates in a weight, and sends this process signals from given places in the run.

    Args:
        signals: By hook, epoch and update.
    """

    def __init__(self, signals: dict[Place, list[int]] | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.updates = torch.nn.Parameter(torch.zeros(()))
        self.signals = signals or {}
        self.done: list[Place] = []

    def _at(self, hook: str, batch_idx: int = 0) -> None:
        place = (hook, self.current_epoch, batch_idx)
        for number in self.signals.get(place, []):
            os.kill(os.getpid(), number)
        self.done.append(place)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.updates], lr=1.0)

    def on_train_epoch_start(self) -> None:
        self._at("epoch")

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(-self.updates)
        self._at("update", batch_idx)
        optimizer.step()
        # Not self.log, after which the Trainer lets the logger write at once.
        update = self.current_epoch * UPDATES + batch_idx
        self.logger.experiment.log_metrics({"updates": self.updates.detach()}, update)  # type: ignore[union-attr]

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self._at("evaluation")

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self._at("test")

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(list(torch.zeros(UPDATES)), batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader([torch.zeros(())], batch_size=None)  # type: ignore[list-item, arg-type]

    test_dataloader = val_dataloader


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Ctrl-C is listened to, whatever this suite was started by; no run leaves its handlers behind."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(n) for n in numbers]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    left = [signal.getsignal(n) for n in numbers]  # the Trainer's own for SIGTERM stays after a fit without incident
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert not [handler for handler in left if "StopAfterUpdate" in repr(handler)]


def trainer(folder: Path, *more: Callback) -> Trainer:
    path = folder / "checkpoints" / "last.ckpt"
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[StopAfterUpdate(path), *more, LastCheckpoint(str(path.parent))],
        max_epochs=3,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def stopped(folder: Path, *signals: int, at: Place) -> Learner:
    """Train until stopped by signals sent from a place."""
    learner = Learner({at: list(signals)})
    with pytest.raises(SystemExit):
        trainer(folder).fit(learner)
    return learner


def saved(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return content


def saved_updates(folder: Path) -> float | None:
    there = (folder / "checkpoints" / "last.ckpt").exists()
    return float(saved(folder)["state_dict"]["updates"]) if there else None


# ---------------------------------------------------------------- when


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    ("at", "last", "updates"),
    [
        (("epoch", 0, 0), ("epoch", 0, 0), None),
        (("update", 0, 0), ("update", 0, 0), 1),
        (("update", 1, 3), ("update", 1, 3), UPDATES + 4),
        (("update", 1, UPDATES - 2), ("update", 1, UPDATES - 2), 2 * UPDATES - 1),
        (("update", 1, UPDATES - 1), ("epoch", 2, 0), 2 * UPDATES),
        (("evaluation", 0, 0), ("epoch", 1, 0), UPDATES),
        (("epoch", 1, 0), ("epoch", 1, 0), UPDATES),
    ],
)
def test_the_update_under_way_is_finished_and_saved_and_an_evaluation_too(
    tmp_path: Path, number: int, at: Place, last: Place, updates: int | None
) -> None:
    learner = stopped(tmp_path, number, at=at)
    assert learner.done[-1] == last
    assert saved_updates(tmp_path) == updates
    if updates is not None:
        progress = saved(tmp_path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        assert set(progress["total"].values()) == {updates}
        assert progress["is_last_batch"] == (updates % UPDATES == 0)


def test_what_is_drawn_is_written_before_the_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed once it has saved would lose it otherwise."""
    seen: list[str] = []
    save = Trainer.save_checkpoint

    def spy(self: Trainer, *args: Any, **kwargs: Any) -> None:
        seen.append((tmp_path / "metrics.csv").read_text())
        save(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", spy)
    stopped(tmp_path, signal.SIGTERM, at=("update", 1, 2))
    steps = [[int(line.split(",")[0]) for line in text.splitlines()[1:]] for text in seen]
    assert steps == [list(range(UPDATES)), list(range(UPDATES + 3))]


def test_a_second_ctrl_c_stops_at_once_and_keeps_what_was_saved(tmp_path: Path) -> None:
    learner = stopped(tmp_path, signal.SIGINT, signal.SIGINT, at=("update", 1, 3))
    assert learner.done[-1] == ("update", 1, 2)
    assert saved_updates(tmp_path) == UPDATES


def test_what_was_asked_once_is_not_hurried_by_asking_again(tmp_path: Path) -> None:
    stopped(tmp_path, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, at=("update", 1, 3))
    assert saved_updates(tmp_path) == UPDATES + 4


def test_a_signal_during_the_last_evaluation_leaves_a_finished_run(tmp_path: Path) -> None:
    trainer(tmp_path).fit(Learner({("evaluation", 2, 0): [signal.SIGTERM]}))
    assert saved_updates(tmp_path) == 3 * UPDATES


def test_a_run_that_ignores_ctrl_c_from_the_outset_goes_on(tmp_path: Path) -> None:
    """A script's jobs in the background do, so that Ctrl-C ends what is in the foreground alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer(tmp_path).fit(Learner({("update", 1, 3): [signal.SIGINT]}))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert saved_updates(tmp_path) == 3 * UPDATES


def test_a_signal_while_the_run_starts_is_not_lost(tmp_path: Path) -> None:
    class Early(Callback):
        """Called before StopAfterUpdate listens, after the Trainer does."""

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    learner, run = Learner(), trainer(tmp_path)
    run.callbacks.insert(0, Early())  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        run.fit(learner)
    assert learner.done == [("epoch", 0, 0)]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_an_evaluation_alone_ends_at_once(tmp_path: Path, command: str) -> None:
    hook = "evaluation" if command == "validate" else command
    learner = Learner({(hook, 0, 0): [signal.SIGTERM]})
    with pytest.raises(SystemExit):
        getattr(trainer(tmp_path), command)(learner)
    assert not learner.done


# ---------------------------------------------------------------- SLURM


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a script in the place of SLURM's scontrol; gives the file that it may write to."""

    def put(script: str) -> Path:
        calls = tmp_path / "calls"
        program = tmp_path / "bin" / "scontrol"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("CALLS", str(calls))
        return calls

    return put


SLURM = {
    **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"},
}


def test_a_job_is_queued_again_once_after_saving(
    tmp_path: Path, scontrol: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Lightning would do so by itself, in the midst of an update."""
    calls = scontrol(f'echo "$@" >> "$CALLS"; cp {tmp_path}/checkpoints/last.ckpt {tmp_path}/then.ckpt')
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    stopped(tmp_path, signal.SIGUSR1, at=("update", 1, 3))
    assert calls.read_text() == "requeue 7\n"
    assert (tmp_path / "then.ckpt").read_bytes() == (tmp_path / "checkpoints/last.ckpt").read_bytes()
    assert saved_updates(tmp_path) == UPDATES + 4
    assert not list(tmp_path.glob("hpc_ckpt*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_other_stops_queue_nothing(tmp_path: Path, scontrol: Callable[[str], Path], number: int) -> None:
    """SIGTERM, as from scancel, and what is sent outside of a job."""
    calls = scontrol('echo "$@" >> "$CALLS"')
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SLURM_JOB_ID", raising=False)
        if number == signal.SIGTERM:
            patch.setenv("SLURM_JOB_ID", "7")
        stopped(tmp_path, number, at=("update", 0, 1))
    assert not calls.exists()


@pytest.mark.parametrize(
    ("script", "words"),
    [("echo invalid job >&2; exit 1", "invalid job"), ("exit 3", "ended with 3"), (None, "No such")],
)
def test_a_job_that_cannot_be_queued_again_says_why(
    scontrol: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, script: str | None, words: str
) -> None:
    if script is None:
        monkeypatch.setenv("PATH", "")
    else:
        scontrol(script)
    with pytest.raises(ConfigError, match=f"the run is saved.*scontrol requeue 7: .*{words}"):
        requeue("7")
