"""What a run that goes on must have in common with its checkpoint, and what it may change."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from lit_diffrl.__main__ import main
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import DMEMM, Diffuser

# Windows of two lengths and a calibrated world model; the second file adds a return regressor, which has one length.
MODELS = """
model:
  class_path: DMEMM
  init_args:
    horizon: ${data.init_args.horizon}
    n_diffusion_steps: 4
    dim: 8
    dim_mults: [1, 4]
    world_model_epochs: 1
    diffusion_epochs: 1
    lr: 1e-3
    ema: {every: 1}
    world_model: {members: 2, elites: 1, hidden: 8, layers: 1, reward_hidden: 8}
    plan: {rank_by: model, rank_quantile: 0.1}
data:
  class_path: WindowData
  init_args:
    dataset: lit_diffrl/pointmaze/umaze-v0
    horizon: [8, 12]
    batch_size: 2
    transition_batch_size: 2
    updates_per_epoch: 3
rollout: {episodes: 1, num_envs: 1, max_steps: 2, every_n_epochs: 100}
trainer: {accelerator: cpu, enable_model_summary: false}
"""
VALUE = """
model: {init_args: {value_epochs: 1, plan: {rank_by: value, rank_quantile: null}}}
data: {init_args: {horizon: 8}}
"""
MODEL = ["--config", "model.yaml"]
BOTH = [*MODEL, "--config", "value.yaml"]


@pytest.fixture(scope="module")
def shelf(mazes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs ``model`` and ``both``, one epoch each."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(mazes))
        patch.chdir(root)
        Path("model.yaml").write_text(MODELS)
        Path("value.yaml").write_text(VALUE)
        for name, configs in (("model", MODEL), ("both", BOTH)):
            assert main(["fit", *configs, "--run", name, "--trainer.max_epochs", "1"]) == 0
    return root


@pytest.fixture(autouse=True)
def folder(shelf: Path, mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a copy of that folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    shutil.copytree(shelf, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path


def last(run: str) -> Path:
    (path,) = Path("tb_logs").glob(f"*/*/{run}/checkpoints/last.ckpt")
    return path


def go_on(configs: list[str], *more: str, command: str = "fit") -> int:
    run = "both" if configs is BOTH else "model"
    return main([command, *configs, "--ckpt_path", str(last(run)), *more])


def refused(capsys: pytest.CaptureFixture[str], configs: list[str], *more: str, command: str = "fit") -> str:
    """The one line of a run that may not go on; its checkpoint stays as it was."""
    capsys.readouterr()
    before = {path: path.read_bytes() for path in Path("tb_logs").glob("**/*.ckpt")}
    assert go_on(configs, *more, command=command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert {path: path.read_bytes() for path in Path("tb_logs").glob("**/*.ckpt")} == before
    return lines[0]


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("configs", "more", "words"),
    [
        (MODEL, "--data.horizon [8,16]", "data.horizon: checkpoint [8, 12], now [8, 16]"),
        (MODEL, "--data.horizon 8", "data.horizon: checkpoint [8, 12], now 8"),
        (MODEL, "--data.use_padding true", "data.use_padding: checkpoint False, now True"),
        (MODEL, "--data.max_path_length 5000", "data.max_path_length: checkpoint None, now 5000"),
        (MODEL, "--data.compat_windows true", "data.compat_windows: checkpoint False, now True"),
        (MODEL, "--data.holdout 0.2", "data.holdout: checkpoint 0.1, now 0.2"),
        (BOTH, "--data.discount 0.9", "data.discount: checkpoint 0.997, now 0.9"),
        (BOTH, "--data.termination_penalty -100", "data.termination_penalty: checkpoint None, now -100.0"),
    ],
)
def test_a_run_goes_on_with_its_own_windows_and_targets(
    configs: list[str], more: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, configs, *more.split())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--model.schedule linear", "model.schedule: checkpoint 'cosine', now 'linear'"),
        ("--model.attention true", "only on one side"),
        (
            "--model.world_model.reward_activation relu",
            "model.world_model.reward_activation: checkpoint 'silu', now 'relu'",
        ),
        ("--model.world_model.elites 2", "world_model.elite: checkpoint (1,), now (2,)"),
        (
            "--model.plan.rank_quantile 0.2",
            "plan.rank_quantile is 0.2, but the checkpoint's world model was calibrated",
        ),
        ("--model.world_model.variance_floor 1e-2", "world_model.variance_floor is 0.01, but the checkpoint's world"),
    ],
)
def test_what_gives_the_weights_their_meaning_stays(more: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside what tests/test_training.py lists."""
    for command in ("fit", "validate"):
        assert words in refused(capsys, MODEL, *more.split(), command=command)


@pytest.mark.parametrize(
    ("name", "factor", "words"),
    [("rewards", 10.0, "reward_max: checkpoint"), ("observations/observation", 1.01, "obs_normalizer: its low and")],
)
def test_a_dataset_whose_numbers_have_changed_is_another(
    name: str,
    factor: float,
    words: str,
    mazes: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(mazes, folder / "edited")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / "edited"))
    with h5py.File(folder / "edited/lit_diffrl/pointmaze/umaze-v0/data/main_data.hdf5", "a") as file:
        for episode in file.values():
            episode[name][...] = factor * episode[name][...] + (0.5 if name == "rewards" else 0)
    assert words in refused(capsys, MODEL)


def test_another_method_is_refused_even_if_its_networks_fit() -> None:
    content = torch.load(last("model"), weights_only=True)
    arguments = {k: v for k, v in content["hyper_parameters"].items() if not k.startswith("_")}
    own = {k: v for k, v in arguments.items() if k in Diffuser.__init__.__annotations__ and k != "guide"}
    other = Diffuser(**own)
    with pytest.raises(ConfigError, match=r"of lit_diffrl.methods.dmemm.DMEMM, this is .*diffuser.Diffuser"):
        other.on_load_checkpoint(content)
    DMEMM(**arguments).on_load_checkpoint(content)


# ---------------------------------------------------------------- allowed


@pytest.mark.parametrize(
    "more",
    [
        "--model.lr 1e-4 --model.grad_clip 1 --model.ema.decay 0.9 --model.lambda_tr 0.2 --model.weighting.mode none",
        "--data.batch_size 4 --data.transition_batch_size 4 --data.discount 0.9 --data.termination_penalty -1",
        "--model.sampler.steps 2 --model.guide.scale 0.1 --model.plan.candidates 2 --model.plan.rank_quantile null "
        "--model.world_model.reward_pessimism 0 --model.world_model.variance_floor 1e-2 --rollout.episodes 2",
    ],
)
def test_what_only_says_how_to_train_or_to_act_may_change(more: str) -> None:
    assert go_on(MODEL, *more.split()) == 0
    content: dict[str, Any] = torch.load(last("model"), weights_only=True)
    assert content["epoch"] == 1
    if "model.lr" in more:
        assert content["optimizer_states"][1]["param_groups"][0]["lr"] == 1e-4


def test_other_windows_may_be_evaluated() -> None:
    assert go_on(MODEL) == 0
    for more in ("--data.use_padding true", "--data.holdout 0.2", "--data.max_path_length 5000"):
        assert go_on(MODEL, *more.split(), command="validate") == 0
