"""Offline selection: of evaluations with losses made by hand, which checkpoint is the best one, also after a resume."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lit_diffrl.errors import ConfigError
from lit_diffrl.rollout import RolloutEvaluation
from lit_diffrl.rollout.checkpoints import LastCheckpoint
from lit_diffrl.rollout.selection import OfflineCheckpoint
from lit_diffrl.stopping import StopAfterUpdate

UPDATES = 2  # of an epoch
# One loss for each update; the means of the epochs are 5, 3, 4, 1, 6, 2.
LOSSES = [4.0, 6.0, 1.0, 5.0, 4.0, 4.0, 0.0, 2.0, 6.0, 6.0, 1.5, 2.5]


class Scripted(LightningModule):
    """Returns these losses, and acts by the number of its updates."""

    offline_loss: Any = "loss/diffusion"

    def __init__(self, spec: Any, losses: list[float] = LOSSES) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.spec, self.losses = spec, losses
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    can_act = True

    def reset(self, mask=None, seeds=None):
        pass

    def act(self, obs, active=None):
        return np.full((len(obs), 1), 0.01 * int(self.updates))

    def training_step(self, batch, batch_idx):
        loss = self.losses[int(self.updates)] + 0 * self.weight
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.updates += 1
        return {"loss/diffusion": loss.detach()}

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)

    def train_dataloader(self):
        return DataLoader(range(UPDATES))

    def val_dataloader(self):
        return DataLoader(range(1))


class Interrupt(Callback):
    """Asks the run to stop before an update, as Ctrl-C would."""

    def __init__(self, stop: StopAfterUpdate, before: int) -> None:
        self.stop, self.before = stop, before

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if int(pl_module.updates) == self.before:
            self.stop.received = 2
            self.stop.on_train_batch_start(trainer, pl_module, batch, batch_idx)


def fit(
    folder: Path,
    spec: Any,
    epochs: int = 6,
    resume: bool = False,
    interrupt: int | None = None,
    method: type[Scripted] = Scripted,
    devices: int = 1,
    **options: Any,
) -> RolloutEvaluation:
    rollout = RolloutEvaluation(**{"episodes": 2, "select": "offline", **options})
    checkpoints = folder / "checkpoints"
    kept: list[Callback] = [OfflineCheckpoint(str(checkpoints), rollout.offline)] if rollout.offline.chooses else []
    stop = [Interrupt(StopAfterUpdate(checkpoints / "last.ckpt"), interrupt)] if interrupt is not None else []
    trainer = Trainer(
        max_epochs=epochs, callbacks=[*stop, rollout, *kept, LastCheckpoint(str(checkpoints))], accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, devices=devices,
        default_root_dir=str(folder), use_distributed_sampler=False, strategy="ddp_fork" if devices > 1 else "auto",
    )  # fmt: skip
    trainer.fit(method(spec), ckpt_path=str(checkpoints / "last.ckpt") if resume else None)
    return rollout


def epoch_of(folder: Path, name: str = "best") -> int:
    epoch: int = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["epoch"]
    return epoch


@pytest.mark.parametrize(("rank", "epoch"), [(0, 3), (1, 5), (2, 1), (3, 2), (5, 4), (9, 4)])
def test_best_is_the_evaluation_of_that_rank_by_loss_or_the_last_of_fewer(
    toy_spec: Any, tmp_path: Path, rank: int, epoch: int
) -> None:
    """Ranks of the means 5, 3, 4, 1, 6, 2; the authors' code clips the rank to the number of evaluations too."""
    rollout = fit(tmp_path, toy_spec(), select_rank=rank)
    assert [loss for _, loss in rollout.offline.means.history] == [5, 3, 4, 1, 6, 2]
    assert rollout.offline.chosen()[0] == epoch_of(tmp_path) == epoch
    least = sorted(range(6), key=lambda e: [5, 3, 4, 1, 6, 2][e])[: rank + 1]
    names = {"best.ckpt", "last.ckpt", *(f"candidate-{e}.ckpt" for e in least)}
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == names, "no more than are needed"


def test_a_loss_is_the_mean_over_all_updates_since_the_evaluation_before(toy_spec: Any, tmp_path: Path) -> None:
    """Evaluations after epochs 0, 3 and 5; the losses of epochs between them are not lost."""
    rollout = fit(tmp_path, toy_spec(), every_n_epochs=4)
    assert rollout.offline.means.history == [(0, 5.0), (3, (3 + 4 + 1) / 3), (5, (6 + 2) / 2)]
    assert epoch_of(tmp_path) == 3


@pytest.mark.parametrize(("every", "interrupt"), [(1, None), (1, 5), (4, 5), (4, 7)])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_resumed_run_chooses_as_an_uninterrupted_one(
    toy_spec: Any, tmp_path: Path, rank: int, interrupt: int | None, every: int
) -> None:
    """Stopped after epoch 1, or within epoch 2 or 3, between two evaluations; and moved to another folder."""
    common = {"select_rank": rank, "every_n_epochs": every}
    whole = fit(tmp_path / "whole", toy_spec(), **common)
    if interrupt is None:
        fit(tmp_path / "part", toy_spec(), epochs=2, **common)
    else:
        with pytest.raises(SystemExit):
            fit(tmp_path / "part", toy_spec(), interrupt=interrupt, **common)
    (tmp_path / "part").rename(tmp_path / "moved")
    resumed = fit(tmp_path / "moved", toy_spec(), resume=True, **common)
    assert resumed.offline.means.history == whole.offline.means.history
    assert epoch_of(tmp_path / "moved") == epoch_of(tmp_path / "whole") == whole.offline.chosen()[0]
    assert {p.name for p in (tmp_path / "moved/checkpoints").iterdir()} == {
        p.name for p in (tmp_path / "whole/checkpoints").iterdir()
    }


def test_a_run_that_branches_off_chooses_among_its_own_evaluations(
    toy_spec: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the means 5, 3, 4, 1, 6, 2 it has the last three, without the candidates of before."""
    fit(tmp_path / "part", toy_spec(), epochs=3, select_rank=2)
    (tmp_path / "branch/checkpoints").mkdir(parents=True)
    (tmp_path / "part/checkpoints/last.ckpt").rename(tmp_path / "branch/checkpoints/last.ckpt")
    with caplog.at_level(logging.WARNING):
        rollout = fit(tmp_path / "branch", toy_spec(), resume=True, select_rank=2)
    assert "it begins anew" in caplog.text
    assert rollout.offline.means.history == [(3, 1.0), (4, 6.0), (5, 2.0)]
    assert rollout.offline.chosen()[0] == epoch_of(tmp_path / "branch") == 4


def test_processes_choose_by_the_mean_of_their_losses(toy_spec: Any, tmp_path: Path) -> None:
    """The second one's losses are the first one's backwards: 2, 6, 1, 4, 3, 5."""

    class Two(Scripted):
        def on_fit_start(self):
            self.losses = LOSSES[::-1] if self.global_rank else LOSSES

    for rank, epoch in ((0, 2), (1, 3)):
        folder = tmp_path / str(rank)
        fit(folder, toy_spec(), select_rank=rank, method=Two, devices=2)
        assert epoch_of(folder) == epoch
        saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["RolloutEvaluation"]
        assert saved["offline"]["means"]["values"] == [3.5, 4.5, 2.5, 2.5, 4.5, 3.5]


def test_the_run_ends_with_the_choice_and_its_score(
    toy_spec: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollout = fit(tmp_path, toy_spec(), select_rank=2)
    score = dict(rollout.scores.history)[1]
    out = capsys.readouterr().out
    assert f"{score:.2f} (epoch 1, loss 3)" in out and "score, offline (rank 2)" in out and score != rollout.scores.oms


def test_no_environment_is_needed(
    toy_spec: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, toy_spec(env_spec=None), every_n_epochs=2)
    assert epoch_of(tmp_path) == 3
    assert "without evaluation and scores" in caplog.text and "best.ckpt" not in caplog.text
    assert "(epoch 3, loss 2.5)" in capsys.readouterr().out


@pytest.mark.parametrize("select", ["online", "offline"])
def test_early_stop_ends_the_run_at_the_first_rise(toy_spec: Any, tmp_path: Path, select: str) -> None:
    """3, then 4: after epoch 2, whichever evaluation counts."""
    rollout = fit(tmp_path, toy_spec(), early_stop=True, select=select)
    assert [loss for _, loss in rollout.offline.means.history] == [5, 3, 4] and epoch_of(tmp_path, "last") == 2
    if select == "offline":
        assert epoch_of(tmp_path) == 1


def test_a_method_without_such_a_loss_is_refused(
    toy_spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "offline_loss", None)
    for options, words in (({"select": "offline"}, "select 'offline' goes by"), ({"select": "online"}, "early_stop")):
        with pytest.raises(ConfigError, match=f"rollout.{words}.* Scripted has not; use rollout.select 'online'"):
            fit(tmp_path, toy_spec(), early_stop=True, **options)
    rollout = fit(tmp_path, toy_spec(), select="online")
    assert not rollout.offline.means.history
