"""Names of run folders and the checkpoints that belong to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_diffrl.errors import ConfigError
from lit_diffrl.runs import continues, dataset_slug, new_run, run_folder


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
