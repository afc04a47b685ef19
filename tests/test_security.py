"""Files of strangers: what is in a checkpoint or a dataset is data, and is never executed."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

import lit_diffrl
from lit_diffrl.__main__ import main
from lit_diffrl.checkpoint_io import AtomicCheckpointIO
from lit_diffrl.data import WindowData
from lit_diffrl.errors import ConfigError, DataError
from lit_diffrl.methods import DMEMM, Diffuser, Method
from lit_diffrl.methods.base import CHECKPOINT_KEY
from lit_diffrl.rollout import run_episodes

ROOT = Path(__file__).parents[1]
CONFIG = """
model:
  class_path: DMEMM
  init_args:
    horizon: ${data.init_args.horizon}
    n_diffusion_steps: 4
    dim: 8
    dim_mults: [1, 2]
    world_model_epochs: 1
    diffusion_epochs: 1
    ema: {every: 1}
    world_model: {members: 2, elites: 1, hidden: 8, layers: 1, reward_hidden: 8}
data:
  class_path: WindowData
  init_args:
    dataset: lit_diffrl/pointmaze/umaze-v0
    horizon: 8
    batch_size: 2
    updates_per_epoch: 2
rollout: {episodes: 1, max_steps: 2, test_episodes: 1}
trainer: {accelerator: cpu, enable_model_summary: false}
"""
COMMANDS = ("fit", "validate", "test")


@pytest.fixture(scope="module")
def shelf(mazes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run."""
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(mazes))
        patch.chdir(root)
        Path("main.yaml").write_text(CONFIG)
        assert main(["fit", "--config", "main.yaml", "--run", "a"]) == 0
    return root


@pytest.fixture(autouse=True)
def folder(shelf: Path, mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a copy of that folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    shutil.copytree(shelf, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def last() -> Path:
    (path,) = Path("tb_logs").glob("*/*/a/checkpoints/last.ckpt")
    return path


def edit(change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change what is in the checkpoint."""
    content = torch.load(last(), weights_only=True)
    change(content)
    torch.save(content, last())
    return last()


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert main(list(args)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


# ---------------------------------------------------------------- pickles in checkpoints


@pytest.mark.parametrize("place", ["beside", "optimizer_states"])
def test_a_pickle_in_a_checkpoint_is_not_executed(
    place: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = folder / "trace"

    def plant(content: dict[str, Any]) -> None:
        part = content if place == "beside" else content[place]
        if isinstance(part, list):
            part.append(Payload(trace))
        else:
            part["payload"] = Payload(trace)

    path = str(edit(plant))
    # torch's own switch for who trusts all files does not reach us: what is given explicitly comes first.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for command in COMMANDS:
        config = () if place == "beside" else ("--config", "main.yaml")  # the run's own
        assert "cannot be read as a checkpoint" in refused(capsys, command, *config, "--ckpt_path", path)
    for load in (lit_diffrl.load, Method.load_from_checkpoint, DMEMM.load_from_checkpoint):
        with pytest.raises(ConfigError, match="cannot be read as a checkpoint"):
            load(path)
    with pytest.raises(ConfigError, match="cannot be read as a checkpoint"):
        WindowData.load_from_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not trace.exists()
    torch.load(path)
    assert trace.exists(), "the payload works, where it is let"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_trainer_of_ones_own_does_not_execute_it_either(command: str, folder: Path) -> None:
    """Lightning leaves it to torch since its 2.6, and torch reads weights only since its own: both are required."""
    trace = folder / "trace"
    path = edit(lambda content: content.update(payload=Payload(trace)))
    method = DMEMM.load_from_checkpoint(_clean(folder))
    data = WindowData("lit_diffrl/pointmaze/umaze-v0", horizon=8, batch_size=2, updates_per_epoch=2)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=2
    )
    with pytest.raises(pickle.UnpicklingError):
        getattr(trainer, command)(method, datamodule=data, ckpt_path=path)
    assert not trace.exists()
    required = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf'"{name}>=2\.([6-9]|\d\d)', required) for name in ("torch", "lightning"))


def _clean(folder: Path) -> Path:
    """A copy of the checkpoint without the payload."""
    shutil.rmtree(folder / "clean", ignore_errors=True)
    (folder / "clean").mkdir()
    target = folder / "clean" / "last.ckpt"
    content = torch.load(last(), weights_only=False)
    del content["payload"]
    (folder / "trace").unlink()
    torch.save(content, target)
    return target


# ---------------------------------------------------------------- names in checkpoints


@pytest.fixture
def stranger(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a trace when it is imported."""
    trace = folder / "trace"
    (folder / "stranger.py").write_text(
        f"from pathlib import Path\nPath({str(trace)!r}).touch()\ndef make(*args, **kwargs): pass\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    return trace


def untouched(trace: Path) -> bool:
    return not trace.exists() and "stranger" not in sys.modules


def test_what_lightning_would_call_is_not_looked_at(stranger: Path) -> None:
    def plant(content: dict[str, Any]) -> None:
        for part in ("hyper_parameters", "datamodule_hyper_parameters"):
            content[part] |= {"_instantiator": "stranger.make", "_class_path": "stranger.make"}
        content["hyper_parameters"]["sampler"] = {"name": "ddim", "eta": 0.5}

    path = edit(plant)
    assert isinstance(lit_diffrl.load(path), DMEMM)
    agent = DMEMM.load_from_checkpoint(path, sampler={"steps": 2})
    assert isinstance(agent, DMEMM) and agent.sampler.steps == 2 and not agent.training
    assert (agent.sampler.name, agent.sampler.eta) == ("ddim", 0.5), "the rest of the group is as it was saved"
    assert DMEMM.load_from_checkpoint(path, sampler={"name": "dpm_solver"}).sampler.eta == 0, "that of ddim"
    data = WindowData.load_from_checkpoint(path, batch_size=4)
    assert isinstance(data, WindowData) and (data.batch_size, data.horizons) == (4, [8])
    assert main(["fit", "--ckpt_path", str(path), "--trainer.max_epochs", "3"]) == 0
    assert untouched(stranger)


def test_a_method_that_a_checkpoint_names_is_not_imported(stranger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = edit(lambda content: content[CHECKPOINT_KEY].update(method="stranger.Method"))
    with pytest.raises(ConfigError, match=r"stranger\.Method, which is not an imported method"):
        lit_diffrl.load(path)
    for command in COMMANDS:
        assert "stranger.Method" in refused(capsys, command, "--config", "main.yaml", "--ckpt_path", str(path))
    assert untouched(stranger)


def test_loading_by_the_wrong_class_is_refused() -> None:
    path = last()
    with pytest.raises(ConfigError, match="is a checkpoint of DMEMM, not of Other"):
        type("Other", (Diffuser,), {}).load_from_checkpoint(path)  # type: ignore[attr-defined]
    assert isinstance(Diffuser.load_from_checkpoint(path), DMEMM), "which is a Diffuser"
    edit(lambda content: content.pop("datamodule_hyper_parameters"))
    with pytest.raises(ConfigError, match="holds no arguments of a data module"):
        WindowData.load_from_checkpoint(path)
    edit(lambda content: content.update(datamodule_hyper_parameters={"rows": 3}))
    with pytest.raises(ConfigError, match="is not of a run with WindowData .*rows"):
        WindowData.load_from_checkpoint(path)


@pytest.mark.parametrize("entry_point", ["stranger:make", "os:system"])
def test_an_environment_that_a_checkpoint_names_is_not_imported(
    entry_point: str, stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's dataset is untouched, so that ``validate`` and ``test`` take its environment, the agent its own."""

    def plant(content: dict[str, Any]) -> None:
        spec = content[CHECKPOINT_KEY]["spec"]
        env_spec = {**json.loads(spec["env_spec"]), "entry_point": entry_point, "kwargs": {"command": "true"}}
        spec["env_spec"] = json.dumps(env_spec)

    path = edit(plant)
    agent = lit_diffrl.load(path)
    assert agent.spec is not None
    with pytest.raises(ConfigError, match=f"asks to run '{entry_point}'"):
        run_episodes(agent.spec, agent, episodes=1)
    assert main(["validate", "--config", "main.yaml", "--ckpt_path", str(path)]) == 0
    assert untouched(stranger)


# ---------------------------------------------------------------- datasets


@pytest.fixture
def own_mazes(mazes: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a maze dataset that may be spoilt: its folder."""
    shutil.copytree(mazes, folder / "mazes")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / "mazes"))
    return folder / "mazes/lit_diffrl/pointmaze/umaze-v0/data"


@pytest.mark.parametrize("field", ["env_spec", "eval_env_spec"])
@pytest.mark.parametrize("where", ["entry_point", "wrapper"])
def test_an_environment_that_a_dataset_names_is_not_imported(
    field: str, where: str, own_mazes: Path, stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = json.loads((own_mazes / "metadata.json").read_text())
    spec = json.loads(metadata[field])
    if where == "entry_point":
        spec["entry_point"] = "stranger:make"
    else:
        spec["additional_wrappers"] = [{"name": "x", "entry_point": "stranger:make", "kwargs": {}}]
    metadata.pop("eval_env_spec")
    (own_mazes / "metadata.json").write_text(json.dumps({**metadata, field: json.dumps(spec)}))
    last().unlink()
    line = refused(capsys, "fit", "--config", "main.yaml", "--run", "b")
    assert "asks to run 'stranger:make'" in line and "LIT_DIFFRL_ENV_PACKAGES=stranger" in line
    assert untouched(stranger) and not list(Path("tb_logs").glob("*/*/b/checkpoints/*"))


@pytest.mark.parametrize("form", ["opaque", "objects", "strings"])
@pytest.mark.parametrize("key", ["rewards", "observations/observation", "terminations"])
def test_a_pickle_in_a_minari_dataset_is_not_executed(form: str, key: str, own_mazes: Path, folder: Path) -> None:
    trace = folder / "trace"
    payload = pickle.dumps(Payload(trace))
    with h5py.File(own_mazes / "main_data.hdf5", "a") as file:
        steps = len(file["episode_0/rewards"]) + key.startswith("observations")
        del file[f"episode_0/{key}"]
        if form == "opaque":
            file[f"episode_0/{key}"] = np.array([np.void(payload)] * steps)
        elif form == "strings":
            file[f"episode_0/{key}"] = [payload.hex()] * steps
        else:
            data = file.create_dataset(f"episode_0/{key}", (steps,), dtype=h5py.vlen_dtype(np.uint8))
            data[0] = np.frombuffer(payload, "u1")
        file["episode_0"].attrs["payload"] = np.void(payload)
    with pytest.raises(DataError, match="lit_diffrl/pointmaze/umaze-v0"):
        WindowData("lit_diffrl/pointmaze/umaze-v0", horizon=8).setup("fit")
    assert not trace.exists()
    pickle.loads(payload)
    assert trace.exists(), "the payload would have shown"


def test_a_dataset_in_the_place_of_an_hdf5_file_is_not_unpickled(own_mazes: Path, folder: Path) -> None:
    (own_mazes / "main_data.hdf5").write_bytes(pickle.dumps(Payload(folder / "trace")))
    with pytest.raises(DataError, match="cannot be"):
        WindowData("lit_diffrl/pointmaze/umaze-v0", horizon=8).setup("fit")
    assert not (folder / "trace").exists()


# ---------------------------------------------------------------- the code itself


def test_nothing_in_the_package_unpickles_or_evaluates() -> None:
    """What could turn a file into code; every reading of a checkpoint says weights only where it stands."""
    for path in (ROOT / "lit_diffrl").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for call in re.findall(r"torch\.load\(.*|load_checkpoint\(path.*", text):
            assert "weights_only=True" in call or call.startswith("load_checkpoint(path:"), (path, call)
        forbidden = (
            r"\bpickle\b|\ballow_pickle|\bmarshal\b|\bdill\b|(?<![.\w])(?:eval|exec)\(|yaml\.(?:load|full_load|unsafe)"
        )
        assert not re.search(forbidden, re.sub(r'""".*?"""|#.*', "", text, flags=re.DOTALL)), path
