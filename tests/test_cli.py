"""The command line on a stand-in method and data module: what decides, what is kept, and what an error says."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from tensorboard.summary.writer import event_file_writer

from lit_diffrl.__main__ import main
from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.methods.base import Method, Phase, as_options
from lit_diffrl.rollout.callback import RolloutEvaluation

ROOT = Path(__file__).parents[1]
IDENTITY = {"kind": "identity"}


@dataclass(frozen=True)
class Pull:
    """Stand-in for a group of options."""

    kind: Literal["none", "value"] = "none"
    scale: float = 0.1
    limit: float | None = 1.0


class TinyMethod(Method):
    """Shrinks the outputs of one layer."""

    def __init__(
        self,
        hidden: int = 3,
        lr: float = 0.01,
        epochs: int = 2,
        horizon: int = 1,
        pull: Pull = Pull(),
        pause: float = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.hidden, self.lr, self.epochs, self.pause = hidden, lr, epochs, pause
        self.pull = as_options(Pull(), pull)

    @property
    def phases(self) -> list[Phase]:
        return [Phase("model", 1), Phase("diffusion", self.epochs - 1)]

    def build(self, spec: DatasetSpec) -> None:
        super().build(spec)
        self.net = torch.nn.Linear(spec.obs_dim, self.hidden)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=self.lr)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        time.sleep(self.pause)
        optimizer: Any = self.optimizers()
        loss = self.net(batch + torch.randn_like(batch)).square().mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("loss/diffusion", loss, prog_bar=True)
        if self.phase.name == "model":
            self.log("loss/model", loss, prog_bar=True)
        self.log("lr", optimizer.param_groups[0]["lr"])

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("eval/return", -self.net(batch).square().mean(), sync_dist=True)

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("test/return", -self.net(batch).square().mean())


class OtherMethod(TinyMethod):
    """Another method with an argument of its own."""

    def __init__(self, extra: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class TinyData(LightningDataModule):
    """Forty rows of two numbers."""

    def __init__(self, dataset: str | list[str] = "tiny/rows-v0", horizon: int | list[int] = 8) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.dataset = dataset

    def setup(self, stage: str) -> None:
        ids = [self.dataset] if isinstance(self.dataset, str) else self.dataset
        unknown: dict[str, Any] = dict.fromkeys(
            ("env_spec", "ref_min", "ref_max", "max_episode_steps", "obs_keys", "goal_key", "goal")
        )
        self.spec = DatasetSpec(
            obs_dim=2,
            action_dim=1,
            action_low=[-1.0],
            action_high=[1.0],
            dataset_ids=ids,
            obs_normalizer=IDENTITY,
            action_normalizer=IDENTITY,
            reward_max=1.0,
            reward_min=0.0,
            **unknown,
        )

    def loader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(torch.linspace(-1, 1, 80).view(40, 2), batch_size=4)  # type: ignore[arg-type]

    train_dataloader = val_dataloader = test_dataloader = loader


CONFIG = """
model:
  class_path: TinyMethod
  init_args:
    horizon: ${data.init_args.horizon}
    pull:
      scale: 0.3
data:
  class_path: TinyData
  init_args:
    horizon: 16
trainer:
  accelerator: cpu
  devices: 1
  enable_model_summary: false
  log_every_n_steps: 1
"""
RUNS = Path("tb_logs/tinymethod/tiny-rows-v0")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder that holds one config file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIT_DIFFRL_TRACEBACK", raising=False)
    Path("main.yaml").write_text(CONFIG)
    return tmp_path


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def fit(*args: str) -> int:
    return main(["fit", "--config", "main.yaml", *args])


def shown(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """The configuration that a command line comes to."""
    capsys.readouterr()
    assert main(["fit", *args, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def error(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a wrong command line gets."""
    capsys.readouterr()
    assert main(list(args)) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ") and len(lines[0]) < 600, err
    return lines[0]


def checkpoint(run: str, name: str = "last") -> dict[str, Any]:
    return torch.load(RUNS / run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def saved_config(run: str) -> dict[str, Any]:
    return yaml.safe_load((RUNS / run / "config.yaml").read_text())


def curve(run: str, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(RUNS / run)).Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


# ---------------------------------------------------------------- configuration


def test_interpolations_follow_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--data.horizon", "--data.init_args.horizon"):
        model = shown(capsys, "--config", "main.yaml", option, "20")["model"]
        assert model["init_args"]["horizon"] == 20
    assert shown(capsys, "--config", "main.yaml")["model"]["init_args"]["horizon"] == 16
    assert shown(capsys, "--config", "main.yaml", "--model.horizon", "5")["model"]["init_args"]["horizon"] == 5


def test_interpolations_reach_across_files(capsys: pytest.CaptureFixture[str]) -> None:
    overlay = write("long.yaml", "data:\n  init_args:\n    horizon: 64\n")
    assert shown(capsys, "--config", "main.yaml", "--config", overlay)["model"]["init_args"]["horizon"] == 64
    model = write(
        "model.yaml", "model:\n  class_path: TinyMethod\n  init_args: {horizon: '${data.init_args.horizon}'}\n"
    )
    data = write("data.yaml", "data:\n  class_path: TinyData\n  init_args: {horizon: 7}\n")
    for order in ((model, data), (data, model)):
        args = [a for name in order for a in ("--config", name)]
        assert shown(capsys, *args)["model"]["init_args"]["horizon"] == 7


def test_later_files_override_only_what_they_name(capsys: pytest.CaptureFixture[str]) -> None:
    overlay = write(
        "other.yaml", "data:\n  init_args:\n    dataset: a/b-v1\nmodel:\n  init_args:\n    pull: {kind: value}\n"
    )
    config = shown(capsys, "-c", "main.yaml", "-c", overlay)
    assert config["data"]["init_args"] == {"dataset": "a/b-v1", "horizon": 16}
    assert config["model"]["init_args"]["pull"] == {"kind": "value", "scale": 0.3, "limit": 1.0}


@pytest.mark.parametrize(
    "form", ["--model.pull.limit null", "--model.pull.limit=~", "--model.init_args.pull.limit null"]
)
def test_options_of_a_group_can_be_set_to_null(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = shown(capsys, "--config", "main.yaml", *form.split(), "--model.lr", "0.5", "--run", "null")
    assert config["model"]["init_args"]["pull"] == {"kind": "none", "scale": 0.3, "limit": None}
    assert config["model"]["init_args"]["lr"] == 0.5 and config["run"] is None
    config = shown(capsys, "--config", "main.yaml", *form.split(), "--model.pull.limit=3", "--model.pull.scale", "2")
    assert config["model"]["init_args"]["pull"] == {"kind": "none", "scale": 2.0, "limit": 3.0}


def test_shipped_files_are_found_from_any_folder(capsys: pytest.CaptureFixture[str]) -> None:
    main_file = ("--config", "main.yaml")
    for args in (
        ("--config", "conf/data/medium.yaml"),
        ("--config=conf/data/medium.yaml",),
        ("-c", "conf/data/medium.yaml"),
    ):
        init_args = shown(capsys, *main_file, *args)["data"]["init_args"]
        assert init_args["dataset"] == "lit_diffrl/pointmaze/medium-v0"
    Path("conf/data").mkdir(parents=True)
    write("conf/data/medium.yaml", "data: {init_args: {dataset: mine/own-v0}}")
    config = shown(capsys, *main_file, "--config", "conf/data/medium.yaml")
    assert config["data"]["init_args"]["dataset"] == "mine/own-v0"


def test_short_names_choose_classes(capsys: pytest.CaptureFixture[str]) -> None:
    config = shown(capsys, "--model", "OtherMethod", "--data=TinyData", "--model.hidden", "7", "--model.pull.scale=2")
    assert config["model"]["class_path"].endswith(".OtherMethod")
    assert (config["model"]["init_args"]["hidden"], config["model"]["init_args"]["pull"]["scale"]) == (7, 2.0)


def test_changing_the_class_says_what_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert fit("--model", "OtherMethod", "--print_config") == 0
    assert capsys.readouterr().err == "note: model OtherMethod in place of TinyMethod: dropped horizon\n"


def holds(content: Any, part: Any) -> bool:
    """Whether nested mappings have all the values of a part."""
    if not isinstance(part, dict):
        return bool(content == part)
    return all(key in content and holds(content[key], value) for key, value in part.items())


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "trainer").glob("*.yaml")), ids=lambda p: p.stem)
def test_trainer_files_lie_over_any_config(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = shown(capsys, "--config", "main.yaml", "--config", str(path))
    assert holds(config["trainer"], yaml.safe_load(path.read_text())["trainer"])
    assert config["trainer"]["log_every_n_steps"] == 1


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "data").glob("*.yaml")), ids=lambda p: p.stem)
def test_data_files_change_the_dataset(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = yaml.safe_load(path.read_text())
    if "model" in overlay:  # options that go with these data: theirs is the real method's config
        config = shown(capsys, "--config", str(ROOT / "conf" / "dmemm.yaml"), "--config", str(path))
        assert config["model"]["init_args"]["plan"]["rank_by"] == "arrival"
        assert config["model"]["init_args"]["plan"]["candidates"] == 2
        assert config["data"]["init_args"]["dataset"] == overlay["data"]["init_args"]["dataset"]
        return
    config = shown(capsys, "--config", "main.yaml", "--config", str(path))
    assert config["data"]["init_args"] == {**overlay["data"]["init_args"], "horizon": 16}


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--model.lr", "-1"), "model.lr must be in"),
        (("--model.guide.scale", "-1"), "guide.scale must be in"),
        (("--model.plan.rank_by", "none"), "plan.candidates is 2"),
    ],
)
def test_an_argument_that_a_method_refuses_costs_one_line(
    option: tuple[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", str(ROOT / "conf" / "dmemm.yaml"), *option]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1


# ---------------------------------------------------------------- a run and its folder


def test_a_run_keeps_everything_in_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--run", "first") == 0
    names = {p.name.partition(".tfevents")[0] for p in (RUNS / "first").iterdir()}
    assert names >= {"config.yaml", "checkpoints", "events.out"}
    assert {p.name for p in (RUNS / "first" / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    out = capsys.readouterr().out
    first, second = re.findall(r"^(?:model, epoch 1|diffusion, epoch 2)/2: .*", out, re.MULTILINE)
    assert "loss/diffusion=" in first and "loss/model=" in first and "left=" in first
    assert "loss/diffusion=" in second and "loss/model=" not in second
    assert "tensorboard --logdir tb_logs" in out and f"test --ckpt_path {RUNS}/first/checkpoints/best.ckpt" in out


def test_the_default_name_is_the_time_and_never_taken_twice() -> None:
    assert fit() == 0 and fit() == 0
    names = [p.name for p in RUNS.iterdir()]
    assert len(names) == 2 and all(re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{3}(_2)?", n) for n in names)


def test_epochs_follow_the_phases_unless_given() -> None:
    assert fit("--run", "a", "--model.epochs", "3") == 0
    assert checkpoint("a")["epoch"] == 2
    assert fit("--run", "b", "--model.epochs", "3", "--trainer.max_epochs", "1") == 0
    assert checkpoint("b")["epoch"] == 0


def test_fast_dev_run_leaves_nothing() -> None:
    assert fit("--trainer.fast_dev_run", "true") == 0
    assert not Path("tb_logs").exists()


def test_the_trainers_own_switches_are_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--run", "a", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false") == 0
    assert "epoch 1/2" not in capsys.readouterr().out
    assert {p.name for p in (RUNS / "a").iterdir()} == {"config.yaml", "checkpoints"}
    assert fit("--run", "b", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "csv") == 0
    assert {p.name for p in (RUNS / "b").iterdir()} == {"config.yaml", "checkpoints"} and Path("csv").exists()
    assert fit("--run", "c", "--trainer.enable_checkpointing", "false") == 0
    assert not (RUNS / "c" / "checkpoints").exists()
    assert fit("--run", "d", "--trainer.callbacks+=TQDMProgressBar", "--trainer.limit_train_batches", "3") == 0
    assert checkpoint("d")["global_step"] == 6


def test_a_fresh_run_never_writes_over_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--run", "a") == 0
    before = checkpoint("a")["state_dict"]["net.weight"]
    line = error(capsys, "fit", "--config", "main.yaml", "--run", "a", "--seed_everything", "5")
    assert "already has checkpoints" in line and "--ckpt_path last" in line
    assert torch.equal(checkpoint("a")["state_dict"]["net.weight"], before)


def test_checkpoints_hold_plain_hyperparameters() -> None:
    assert fit("--run", "a", "--data.dataset", "tiny/rows-v0") == 0
    for name in ("last", "best"):
        content = checkpoint("a", name)
        assert content["hyper_parameters"]["pull"] == {"kind": "none", "scale": 0.3, "limit": 1.0}
        assert content["hyper_parameters"]["horizon"] == 16
        assert content["datamodule_hyper_parameters"]["horizon"] == 16


# ---------------------------------------------------------------- resuming


def test_a_resumed_run_equals_an_uninterrupted_one_in_the_same_folder() -> None:
    assert fit("--run", "whole", "--trainer.max_epochs", "4") == 0
    assert fit("--run", "parts") == 0
    assert fit("--ckpt_path", "last", "--run", "parts", "--trainer.max_epochs", "4") == 0
    whole, parts = checkpoint("whole"), checkpoint("parts")
    assert parts["epoch"] == 3 and parts["global_step"] == whole["global_step"]
    for key, value in whole["state_dict"].items():
        torch.testing.assert_close(parts["state_dict"][key], value, rtol=0, atol=0)
    assert curve("parts", "loss/diffusion") == curve("whole", "loss/diffusion")
    assert sorted(p.name for p in RUNS.iterdir()) == ["parts", "whole"]


def test_last_is_the_newest_run_of_this_method_and_dataset() -> None:
    assert fit("--run", "old") == 0
    assert fit("--run", "new") == 0
    assert fit("--run", "foreign", "--data.dataset", "tiny/other-v0") == 0
    assert fit("--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    assert (checkpoint("old")["epoch"], checkpoint("new")["epoch"]) == (1, 2)


def test_no_last_checkpoint_is_an_error_that_names_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    line = error(capsys, "fit", "--config", "main.yaml", "--ckpt_path", "last")
    assert str(RUNS) in line and "begin a run by fit without --ckpt_path" in line
    assert str(RUNS / "x") in error(capsys, "fit", "--config", "main.yaml", "--ckpt_path", "last", "--run", "x")
    assert not Path("tb_logs").exists()


def test_a_given_checkpoint_leaves_the_options_in_force() -> None:
    assert fit("--run", "a") == 0
    path = str(RUNS / "a" / "checkpoints" / "last.ckpt")
    args = ("--ckpt_path", path, "--model.lr", "0.5", "--model.pull.scale", "7", "--trainer.max_epochs", "3")
    assert fit(*args) == 0
    assert saved_config("a")["model"]["init_args"]["lr"] == 0.5
    content = checkpoint("a")
    assert content["hyper_parameters"]["lr"] == 0.5 and content["hyper_parameters"]["pull"]["scale"] == 7
    assert content["optimizer_states"][0]["param_groups"][0]["lr"] == 0.5
    assert [v for _, v in curve("a", "lr")][-1] == 0.5 and content["epoch"] == 2


def test_curves_of_a_killed_run_are_not_drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    # Event files of one second and one process sort by this counter, as text: 10 before 8.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(8))
    assert fit("--run", "a", "--trainer.max_epochs", "1") == 0
    last = RUNS / "a" / "checkpoints" / "last.ckpt"
    early = last.read_bytes()
    assert fit("--run", "a", "--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    last.write_bytes(early)  # as if the process had been killed before it saved its second epoch
    assert fit("--run", "a", "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    for tag, count in (("loss/diffusion", 30), ("eval/return", 3)):
        steps = [step for step, _ in curve("a", tag)]
        assert steps == sorted(set(steps)) and len(steps) == count


def test_another_checkpoint_than_last_branches_off() -> None:
    assert fit("--run", "a") == 0
    assert fit("--ckpt_path", "best", "--run", "a", "--trainer.max_epochs", "3") == 0
    assert checkpoint("a")["epoch"] == 1
    (branch,) = [p.name for p in RUNS.iterdir() if p.name != "a"]
    assert checkpoint(branch)["epoch"] == 2
    assert fit("--ckpt_path", str(RUNS / "a/checkpoints/last.ckpt"), "--run", "b", "--trainer.max_epochs", "3") == 0
    assert (checkpoint("a")["epoch"], checkpoint("b")["epoch"]) == (1, 2)


def test_a_checkpoint_never_overwrites_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--run", "a") == 0 and fit("--run", "b") == 0
    path = str(RUNS / "a/checkpoints/last.ckpt")
    assert "already has" in error(capsys, "fit", "--config", "main.yaml", "--run", "b", "--ckpt_path", path)


def test_the_checkpoint_of_another_run_kind_is_refused_with_the_difference(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--run", "a") == 0
    path, before = str(RUNS / "a/checkpoints/last.ckpt"), (RUNS / "a/config.yaml").read_text()
    base = ("fit", "--config", "main.yaml", "--ckpt_path", path)
    line = error(capsys, *base, "--model", "OtherMethod")
    assert "TinyMethod" in line and "OtherMethod" in line
    line = error(capsys, *base, "--data.dataset", "tiny/other-v0")
    assert "tiny/rows-v0" in line and "tiny/other-v0" in line
    line = error(capsys, *base, "--model.hidden", "9")
    assert "(3, 2)" in line and "(9, 2)" in line
    assert (RUNS / "a/config.yaml").read_text() == before


def test_a_finished_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--run", "a") == 0
    assert fit("--run", "a", "--ckpt_path", "last") == 0
    assert "nothing is left to train" in capsys.readouterr().out
    assert fit("--run", "a", "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    assert "max_epochs=1" in error(
        capsys, "fit", "--config", "main.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "1"
    )


# ---------------------------------------------------------------- validate and test


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluating_takes_the_runs_own_config_and_leaves_the_run_alone(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RolloutEvaluation, "on_test_epoch_end", lambda *args: None)  # there is no simulator here
    assert fit("--run", "a", "--model.hidden", "5") == 0
    before = {p: p.read_bytes() for p in (RUNS / "a").rglob("*") if p.is_file()}
    assert main([command, "--ckpt_path", str(RUNS / "a/checkpoints/best.ckpt")]) == 0
    assert main([command, "--ckpt_path", "last"]) == 0
    assert main([command, "--ckpt_path", "last", "--run", "a"]) == 0
    assert main([command, "--config", "main.yaml", "--ckpt_path", "best", "--model.hidden", "5"]) == 0
    assert {p: p.read_bytes() for p in (RUNS / "a").rglob("*") if p.is_file()} == before


def test_validate_repeats_the_logged_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--run", "a") == 0
    capsys.readouterr()
    assert main(["validate", "--ckpt_path", "last"]) == 0
    assert str(curve("a", "eval/return")[-1][1])[:7] in capsys.readouterr().out


def test_a_run_continues_from_its_checkpoint_alone() -> None:
    assert fit("--run", "a", "--model.hidden", "5") == 0
    assert main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "3"]) == 0
    assert checkpoint("a")["epoch"] == 2 and saved_config("a")["model"]["init_args"]["hidden"] == 5
    assert saved_config("a")["ckpt_path"] is None


def test_evaluating_needs_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("validate", "test"):
        assert "needs --ckpt_path" in error(capsys, command, "--config", "main.yaml")
    assert fit("--run", "a") == 0
    path = str(RUNS / "a/checkpoints")
    assert f"{path}/last.ckpt" in error(capsys, "test", "--ckpt_path", f"{path}/lst.ckpt")
    assert "is a folder" in error(capsys, "test", "--config", "main.yaml", "--ckpt_path", str(RUNS / "a"))
    Path("torn.ckpt").write_bytes((RUNS / "a/checkpoints/last.ckpt").read_bytes()[:2000])
    assert "torn.ckpt cannot be read" in error(capsys, "test", "--config", "main.yaml", "--ckpt_path", "torn.ckpt")
    assert "no " in error(capsys, "test", "--ckpt_path", "torn.ckpt")
    assert "leave out --run" in error(capsys, "test", "--ckpt_path", f"{path}/last.ckpt", "--run", "b")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("args", "name", "nearest"),
    [
        ("--model.hiden 3", "--model.hiden", "'hidden'"),
        ("--model.init_args.hiden=3", "--model.init_args.hiden", "'hidden'"),
        ("--model.pull.scal 3", "--model.pull.scal", "'scale'"),
        ("--model.pull.zzz 3", "'zzz'", "accepted: kind, scale"),
        ("--data.horizn 3", "--data.horizn", "'horizon'"),
        ("--trainer.max_epoch 3", "--trainer.max_epoch", "'trainer.max_epochs'"),
        ("--traner.max_epochs 3", "--traner.max_epochs", "'trainer.max_epochs'"),
        ("--rollout.episode 3", "--rollout.episode", "'rollout.episodes'"),
        ("--ckpt_pth last", "--ckpt_pth", "'ckpt_path'"),
        ("--model TinyMethd", "'TinyMethd'", "'TinyMethod'"),
        ("--model nowhere.TinyMethd", "'nowhere.TinyMethd'", "No module named 'nowhere'"),
        ("--model lightning.pytorch.Trainer", "'lightning.pytorch.Trainer'", "is not a Method"),
        ("--data TinyDta", "'TinyDta'", "'TinyData'"),
        ("--model.lr abc", "model.lr: expected float", "'abc'"),
        ("--model.pull.kind valu", "model.pull.kind: expected one of none, value", "'valu'"),
        ("--data.horizon abc", "data.horizon: expected int, list[int]", "'abc'"),
        ("--trainer.max_epochs abc", "trainer.max_epochs: expected int", "'abc'"),
        ("--trainer.callbacks+=EarlyStoping", "trainer.callbacks", "'EarlyStopping'"),
        ("--trainer.accelerator gpuu", "gpuu", "cpu"),
        ("--model.lr", "--model.lr", "needs a value"),
        ("--config", "--config", "needs a value"),
        ("stray", "stray", "unrecognized"),
        ("--run a/b", "--run", "plain folder name"),
    ],
)
def test_a_mistyped_option_gets_one_line(
    args: str, name: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error(capsys, "fit", "--config", "main.yaml", *args.split())
    assert name in line and nearest in line
    assert not Path("tb_logs").exists()


@pytest.mark.parametrize(
    ("text", "name", "nearest"),
    [
        ("modle:\n  class_path: TinyMethod\n", "modle.class_path", "'model.class_path'"),
        ("trainer:\n  max_epoch: 3\n", "wrong.yaml: trainer.max_epoch", "'trainer.max_epochs'"),
        ("model:\n  class_path: TinyMethd\n", "'TinyMethd'", "'TinyMethod'"),
        ("model:\n  init_args:\n    pull: {scal: 1}\n", "model.init_args.pull.scal", "'scale'"),
        ("model:\n  hidden: 3\n", "model.hidden", "init_args"),
        ("model:\n  init_args:\n    horizon: ${data.init_args.horizn}\n", "${data.init_args.horizn}", "'horizon'"),
        ("model:\n  init_args:\n    lr: [1]\n", "model.lr: expected float", "[1]"),
        ("model:\n  init_args\n    lr: 1\n", "line 3, column 7", "not valid YAML"),
        ("- model\n", "at its top", "list"),
    ],
)
def test_a_mistyped_key_gets_one_line(text: str, name: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = error(capsys, "fit", "--config", "main.yaml", "--config", write("wrong.yaml", text))
    assert name in line and nearest in line


def test_other_beginnings_get_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'fit'" in error(capsys, "fti")
    assert "fit, validate, test" in error(capsys, "zzzzz")
    assert "model" in error(capsys, "fit") and "--config" in error(capsys, "fit")
    assert "'main.yaml'" in error(capsys, "fit", "--config", "mian.yaml")
    assert "'conf/trainer/cpu.yaml'" in error(capsys, "fit", "--config", "conf/trainer/cpx.yaml")
    overlay = write("overlay.yaml", "data:\n  init_args:\n    dataset: x\n")
    assert "no data class is chosen yet" in error(capsys, "fit", "--config", overlay, "--config", "main.yaml")


def test_errors_while_training_get_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_diffrl.errors import DataError

    def prepare_data(self: TinyData) -> None:
        raise DataError("tiny/rows-v0: episode 3,\n  step 7: action is NaN")

    monkeypatch.setattr(TinyData, "prepare_data", prepare_data)
    assert error(capsys, "fit", "--config", "main.yaml").endswith("tiny/rows-v0: episode 3, step 7: action is NaN")
    assert not Path("tb_logs").exists()
    monkeypatch.setenv("LIT_DIFFRL_TRACEBACK", "1")
    with pytest.raises(DataError):
        fit()


# ---------------------------------------------------------------- other processes


def test_help_and_first_mistakes_import_nothing_heavy(folder: Path) -> None:
    code = (
        "import sys; from lit_diffrl.__main__ import main; "
        "codes = [main(a.split()) for a in ('--help', 'fti', 'fit --config no.yaml')]; "
        "assert codes == [0, 2, 2]; assert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m lit_diffrl" in done.stdout


@pytest.fixture
def driver(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.Popen[str]]:
    """Start the command line, with the stand-ins of this file, in a process of its own."""
    lines = [
        "import importlib.util, signal, sys",
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it",
        f"sys.path.insert(0, {str(ROOT)!r})",
        f"spec = importlib.util.spec_from_file_location({__name__!r}, {__file__!r})",
        f"sys.modules[{__name__!r}] = module = importlib.util.module_from_spec(spec)",
        "spec.loader.exec_module(module)",
        "sys.exit(module.main())",
    ]
    Path("driver.py").write_text("\n".join(lines))

    def start(*args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "driver.py", "fit", "--config", "main.yaml", *args]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_can_continue(
    driver: Callable[..., subprocess.Popen[str]], number: signal.Signals, code: int
) -> None:
    process = driver("--run", "a", "--model.pause", "0.05", "--trainer.max_epochs", "100")
    deadline = time.monotonic() + 60
    while not (RUNS / "a/checkpoints/last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == code, out
    assert f"continue with:\n  python -m lit_diffrl fit --ckpt_path {RUNS}/a/checkpoints/last.ckpt" in out
    assert "Traceback" not in out
    done = checkpoint("a")["epoch"]
    assert fit("--ckpt_path", "last", "--trainer.max_epochs", str(done + 2)) == 0
    assert checkpoint("a")["epoch"] == done + 1


def test_two_processes_make_one_run(driver: Callable[..., subprocess.Popen[str]]) -> None:
    ddp = str(ROOT / "conf/trainer/ddp.yaml")
    process = driver("--config", ddp, "--trainer.accelerator", "cpu", "--run", "a")
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0, out
    assert out.count("evaluate  python") == 1 and "2 epochs on 2 cpu" in out
    assert [p.name for p in RUNS.iterdir()] == ["a"]
    assert checkpoint("a")["epoch"] == 1
