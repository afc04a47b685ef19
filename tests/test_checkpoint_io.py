"""A checkpoint is on the disk whole or not at all, whatever goes wrong, and says what to do when it cannot be used."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lit_diffrl.checkpoint_io import AtomicCheckpointIO
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods.loading import read_checkpoint
from lit_diffrl.rollout.checkpoints import BestCheckpoint


def content(value: float) -> dict[str, Any]:
    return {"state_dict": {"x": torch.full((1000,), value)}, "epoch": int(value)}


def fails(number: int) -> Callable[..., None]:
    def call(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    return call


def interrupted(*args: Any) -> None:
    raise KeyboardInterrupt


# ---------------------------------------------------------------- writing


def test_what_is_saved_is_loaded_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    for value in (1.0, 2.0):
        AtomicCheckpointIO().save_checkpoint(content(value), path)
        assert torch.equal(
            AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["x"], content(value)["state_dict"]["x"]
        )
    assert os.listdir(path.parent) == ["last.ckpt"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("there", [True, False])
def test_a_failed_save_leaves_the_file_of_before_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int, there: bool
) -> None:
    path = tmp_path / "last.ckpt"
    if there:
        AtomicCheckpointIO().save_checkpoint(content(1.0), path)
    monkeypatch.setattr(os, function, fails(number))
    with pytest.raises(ConfigError) as error:
        AtomicCheckpointIO().save_checkpoint(content(2.0), path)
    line = str(error.value)
    assert str(path) in line and os.strerror(number) in line and "MiB" in line and "Make room" in line
    assert ("of before is intact" in line) == ("--ckpt_path last" in line) == there
    assert os.listdir(tmp_path) == ["last.ckpt"] * there
    assert not there or AtomicCheckpointIO().load_checkpoint(path)["epoch"] == 1


def test_a_save_that_is_interrupted_leaves_nothing_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint(content(1.0), tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_beside_is_used_up_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.saving").write_bytes(b"torn")
    AtomicCheckpointIO().save_checkpoint(content(1.0), tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ConfigError, match=r"cannot save .*checkpoints/last\.ckpt: "):
        AtomicCheckpointIO().save_checkpoint(content(1.0), tmp_path / "checkpoints" / "last.ckpt")


def test_a_folder_that_cannot_be_forced_to_the_disk_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems refuse it; the file itself has been forced by then."""
    monkeypatch.setattr("lit_diffrl.checkpoint_io.os.open", fails(errno.EINVAL))
    AtomicCheckpointIO().save_checkpoint(content(1.0), tmp_path / "last.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["epoch"] == 1


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("others", [["best.ckpt"], []])
def test_a_torn_checkpoint_is_refused_with_the_name_of_another(tmp_path: Path, keep: float, others: list[str]) -> None:
    path = tmp_path / "last.ckpt"
    for name in ("last.ckpt", *others):
        AtomicCheckpointIO().save_checkpoint(content(1.0), tmp_path / name)
    os.truncate(path, int(keep * path.stat().st_size))
    with pytest.raises(ConfigError) as error:
        read_checkpoint(path)
    advice = [str(tmp_path / name) for name in others] or ["train again"]
    assert str(path) in str(error.value) and "torn" in str(error.value) and advice[0] in str(error.value)


# ---------------------------------------------------------------- the best one


def best(folder: Path) -> BestCheckpoint:
    callback = BestCheckpoint(str(folder))
    callback.setup(Trainer(accelerator="cpu", logger=False), None, "fit")  # type: ignore[arg-type]
    return callback


def with_best(folder: Path) -> dict[str, Any]:
    """State of a run whose best evaluation gave 5."""
    folder.mkdir()
    (folder / "best.ckpt").write_bytes(b"")
    callback = best(folder)
    callback.best_model_score = callback.current_score = callback.kth_value = torch.tensor(5.0)
    callback.best_model_path = callback.kth_best_model_path = str(folder / "best.ckpt")
    callback.best_k_models = {str(folder / "best.ckpt"): torch.tensor(5.0)}
    return callback.state_dict()


def test_a_run_goes_on_with_its_best_evaluation_also_where_it_was_moved_to(tmp_path: Path) -> None:
    state = with_best(tmp_path / "before")
    for folder in ("before", "after"):
        if folder == "after":
            (tmp_path / "before").rename(tmp_path / "after")
        callback = best(tmp_path / folder)
        callback.load_state_dict(state)
        trainer = Trainer(accelerator="cpu", logger=False)
        assert not callback.check_monitor_top_k(trainer, torch.tensor(4.0))
        assert callback.check_monitor_top_k(trainer, torch.tensor(6.0))
        assert callback.best_model_path == str(tmp_path / folder / "best.ckpt")
        assert callback.current_score == 5


def test_a_branch_has_no_best_evaluation_yet(tmp_path: Path) -> None:
    state = with_best(tmp_path / "before")
    callback = best(tmp_path / "branch")
    callback.load_state_dict(state)
    trainer = Trainer(accelerator="cpu", logger=False)
    assert callback.check_monitor_top_k(trainer, torch.tensor(1.0)) and not callback.best_model_path
