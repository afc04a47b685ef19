"""Synthetic transitions as a Minari dataset: what is stored is what was learnt from, and it is trained on like any."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from short_runs import ROOT, Config

import lit_diffrl
from lit_diffrl.__main__ import main
from lit_diffrl.data.normalizers import normalizer_from_state
from lit_diffrl.data.sources import load_source
from lit_diffrl.methods.synthetic_learner import SYNTHETIC


@pytest.fixture(scope="module")
def shelf(mazes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short run of each kind, and a run without synthetic data."""
    folder = tmp_path_factory.mktemp("shelf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(mazes))
        patch.chdir(folder)
        for name in ("dydiff_td3bc", "synther", "td3bc"):
            Config(ROOT / f"conf/{name}.yaml").fit(name)
    return folder


@pytest.fixture(autouse=True)
def folder(mazes: Path, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work among the runs, with a root of datasets of one's own."""
    root = tmp_path / "minari"
    shutil.copytree(mazes, root)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    monkeypatch.chdir(shelf)
    return root


def last(method: str) -> Path:
    (path,) = set(Path("tb_logs").glob(f"{method}/*/*/checkpoints/last.ckpt")) - set(
        Path("tb_logs").glob("*/*/synthetic/checkpoints/last.ckpt")
    )
    return path


def export(method: str, *more: str) -> int:
    return main(["export", "--ckpt_path", str(last(method)), *more])


@pytest.mark.parametrize(("method", "length"), [("dydifftd3bc", 31), ("synthertd3bc", 1)])
def test_what_is_stored_is_what_the_learner_saw_in_raw_units(method: str, length: int) -> None:
    assert export(method) == 0
    episodes, info = load_source(f"lit_diffrl/synthetic/{method}-pointmaze-umaze-dense-v0")
    content: dict[str, Any] = torch.load(last(method), weights_only=True)
    held = content[SYNTHETIC]
    obs, action, reward, next_obs, done = held["rows"].split(held["widths"], dim=1)
    raw = normalizer_from_state(content["lit_diffrl"]["spec"]["obs_normalizer"]).unnormalize
    assert episodes.num_steps == len(obs) and set(episodes.lengths.tolist()) == {length}
    torch.testing.assert_close(episodes.obs, raw(obs))
    torch.testing.assert_close(episodes.next_obs, raw(next_obs))
    torch.testing.assert_close(episodes.action, action)
    torch.testing.assert_close(episodes.reward, reward[:, 0])
    assert torch.equal(episodes.terminated, done[:, 0] > 0)
    real = lit_diffrl.load(last(method)).spec
    assert real is not None and (info.ref_min, info.env_spec, info.goal) == (real.ref_min, real.env_spec, real.goal)


def test_the_metadata_say_where_it_comes_from(folder: Path) -> None:
    assert export("dydifftd3bc", "--name", "lit_diffrl/mine/small-v3", "--rows", "40") == 0
    metadata = json.loads((folder / "lit_diffrl/mine/small-v3/data/metadata.json").read_text())
    assert metadata["total_steps"] == 40, "the newest"
    assert metadata["synthetic_from"] == "lit_diffrl/pointmaze/umaze-dense-v0"
    assert metadata["method"].endswith("DyDiffTD3BC") and metadata["checkpoint"].endswith("last.ckpt")
    assert metadata["epoch"] == 6 and metadata["seed"] == 0
    assert json.loads(metadata["options"])["model"]["rollouts"]["starts"] == 4


def test_a_learner_trains_on_it_and_is_evaluated_in_the_simulator() -> None:
    assert export("dydifftd3bc", "--name", "lit_diffrl/mine/again-v0") == 0
    plain = Config(ROOT / "conf/td3bc.yaml")
    content = plain.fit("synthetic", "--data.dataset", "lit_diffrl/mine/again-v0")
    assert content["lit_diffrl"]["spec"]["dataset_ids"] == ["lit_diffrl/mine/again-v0"]
    agent = lit_diffrl.load(next(Path("tb_logs").glob("td3bc/*/synthetic/checkpoints/last.ckpt")))
    assert np.abs(agent.act(np.zeros(4, dtype=np.float32))).max() <= 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rows", "10"], "export needs --ckpt_path"),
        (["--ckpt_path", "{td3bc}"], "holds no synthetic transitions"),
        (["--ckpt_path", "{dydifftd3bc}", "--row", "10"], "did you mean 'rows'"),
        (["--ckpt_path", "{dydifftd3bc}", "--rows", "many"], "must be a number of transitions"),
        (["--ckpt_path", "{dydifftd3bc}", "--name", "lit_diffrl/pointmaze/umaze-v0"], "there is a dataset"),
        (["--ckpt_path", "{dydifftd3bc}", "--name", "mine"], "no id that Minari takes"),
        (["--ckpt_path", "{dydifftd3bc}", "--name", "lit_diffrl/mine/a.b-v0"], "no id that Minari takes"),
        (["--ckpt_path", "{dydifftd3bc}", "--name", "../mine-v0"], "no id that Minari takes"),
        (["--ckpt_path", "nowhere.ckpt"], "does not exist"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    args: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {name: last(name) for name in ("td3bc", "dydifftd3bc")}
    capsys.readouterr()
    assert main(["export", *(a.format(**known) for a in args)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and words in lines[0], lines
    assert not (folder / "mine").exists() and not (folder.parent / "mine-v0").exists()
    assert not list(folder.glob("**/.*.partial"))
