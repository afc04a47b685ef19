"""Names of run folders, the checkpoints that belong to them, and what cannot be written there."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from lit_diffrl.errors import ConfigError
from lit_diffrl.runs import continues, dataset_slug, new_run, outlast_events, refuse_unwritable, run_folder


@pytest.mark.parametrize(
    ("dataset", "slug"),
    [
        ("lit_diffrl/pointmaze/umaze-v0", "pointmaze-umaze-v0"),
        ("sb3/hopper/medium-v0", "sb3-hopper-medium-v0"),
        ("a/x-v0+a/y-v0", "a-x-v0+a-y-v0"),
        (["a/x-v0", "a/y-v0"], "a-x-v0+a-y-v0"),
        ("/home/me/d4rl data/hopper_medium-v2.hdf5", "hopper_medium-v2"),
        ("../..", "data"),
    ],
)
def test_a_dataset_is_one_plain_folder(dataset: str | list[str], slug: str) -> None:
    assert dataset_slug(dataset) == slug


def test_a_checkpoint_belongs_to_the_folder_above_checkpoints() -> None:
    assert run_folder(Path("logs/m/d/r/checkpoints/best.ckpt")) == Path("logs/m/d/r")
    assert run_folder(Path("models/best.ckpt")) == Path("models")


def test_only_a_runs_last_checkpoint_continues_it() -> None:
    last = Path("logs/m/d/r/checkpoints/last.ckpt")
    assert continues(last) and continues(last, Path("logs/m/d/r"))
    assert not continues(last, Path("logs/m/d/other"))
    assert not continues(last.with_name("best.ckpt")) and not continues(Path("models/last.ckpt"))


def test_a_run_has_a_plain_name_and_an_empty_folder(tmp_path: Path) -> None:
    assert new_run(tmp_path, "a") == tmp_path / "a"
    for name in ("", "..", "a/b"):
        with pytest.raises(ConfigError, match="plain folder name"):
            new_run(tmp_path, name)
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    assert new_run(tmp_path, "a") == tmp_path / "a"
    (tmp_path / "a" / "checkpoints" / "best.ckpt").touch()
    with pytest.raises(ConfigError, match="already has checkpoints"):
        new_run(tmp_path, "a")


def test_event_files_of_a_run_sort_by_age(tmp_path: Path) -> None:
    made = []
    for counter in ("9", "10"):
        outlast_events(tmp_path)
        made.append(tmp_path / f"events.out.tfevents.{int(time.time()):010d}.host.1.{counter}")
        made[-1].touch()
    assert sorted(tmp_path.iterdir()) == made


def test_a_full_disk_is_told_in_one_line_whichever_error_it_surfaces_as(tmp_path: Path) -> None:
    """TensorBoard's thread keeps it, the logger calls it a bad value, and closing the logger hides what came first."""
    for error, words in (
        (chained(ValueError("you tried to log 1.0"), full()), f"cannot write to {tmp_path}: No space left"),
        (chained(full(), ConfigError("cannot save last.ckpt")), "cannot save last.ckpt"),
        (OSError(errno.EROFS, "Read-only", str(tmp_path / "pictures/a.png")), "pictures/a.png: Read-only"),
        (OSError(errno.EACCES, "Permission denied", os.fsencode(tmp_path.parent)), f"{tmp_path.parent}: Permission"),
    ):
        with pytest.raises(ConfigError) as told:
            refuse_unwritable(error, tmp_path)
        assert words in str(told.value)


def test_errors_of_other_kinds_and_files_are_left_as_they_are(tmp_path: Path) -> None:
    for error in (
        ValueError("a value"),
        OSError(errno.EACCES, "Permission denied", "/data/medium.hdf5"),
        OSError(errno.ENOENT, "No such file", str(tmp_path / "x")),
        chained(ValueError("a value"), ConfigError("handled")),
    ):
        refuse_unwritable(error, tmp_path)


def chained(error: Exception, cause: Exception) -> Exception:
    error.__context__ = cause
    return error


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_first_process_decides_which_checkpoint_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_diffrl import continuing

    monkeypatch.delenv(continuing.AGREED, raising=False)
    older, newer = (tmp_path / f"m/d/{run}/checkpoints/last.ckpt" for run in "ab")
    for path in (older, newer):
        path.parent.mkdir(parents=True)
    older.touch()
    assert continuing.agreed_checkpoint("last", tmp_path, "m/d/*") == older
    newer.touch()
    os.utime(newer, (2**31, 2**31))
    monkeypatch.setattr(continuing, "first_process", lambda: False)
    assert continuing.agreed_checkpoint("last", tmp_path, "m/d/*") == older.absolute(), "saved while the others started"
    assert continuing.agreed_checkpoint(str(newer), tmp_path, "m/d/*") == newer, "a file is a file"
    monkeypatch.setattr(continuing, "first_process", lambda: True)
    assert continuing.agreed_checkpoint("last", tmp_path, "m/d/*") == newer


@pytest.mark.parametrize(("length", "refused"), [(3, True), (9, True), (10, False), (None, False)])
def test_an_epoch_is_not_cut_short_behind_the_place_where_a_run_goes_on(length: int | None, refused: bool) -> None:
    from lit_diffrl.continuing import refuse_shorter_epochs

    refuse_shorter_epochs({"updates_per_epoch": length}, 0)
    if not refused:
        refuse_shorter_epochs({"updates_per_epoch": length}, 9)
        return
    with pytest.raises(ConfigError, match=f"updates_per_epoch {length}.*after 9 updates.*at least 10"):
        refuse_shorter_epochs({"updates_per_epoch": length}, 9)


@pytest.mark.parametrize("seed", [None, True, False])
def test_a_seed_is_a_number(seed: bool | None) -> None:
    from lit_diffrl.trainer_options import check_seed

    with pytest.raises(ConfigError, match="--seed_everything must be a number"):
        check_seed(seed)
