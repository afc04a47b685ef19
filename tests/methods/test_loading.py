"""From a file to an agent in two lines, and files that are no agents: nothing in them is executed."""

from __future__ import annotations

import io
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

import lit_diffrl
from lit_diffrl.__main__ import main
from lit_diffrl.data import WindowData
from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import DMEMM
from lit_diffrl.methods.base import CHECKPOINT_KEY, Method, Phase


@pytest.fixture(scope="module")
def trained(mazes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of DMEMM on the umaze, trained from Python, without the command line."""
    method = DMEMM(
        horizon=8,
        goal_conditioned=True,
        n_diffusion_steps=4,
        dim=8,
        dim_mults=[1, 2],
        world_model_epochs=1,
        diffusion_epochs=1,
        world_model={"members": 2, "elites": 1, "hidden": 8, "layers": 1, "reward_hidden": 8},  # type: ignore[arg-type]
        plan={"mode": "waypoints"},  # type: ignore[arg-type]
    )
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(mazes))
        data = WindowData("lit_diffrl/pointmaze/umaze-v0", horizon=8, batch_size=4, updates_per_epoch=2)
        trainer = Trainer(
            max_epochs=method.total_epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(method, data)
    trainer.save_checkpoint(folder / "agent.ckpt")
    return folder / "agent.ckpt"


@pytest.fixture
def edited(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """Factory of copies of the checkpoint whose content has been changed."""

    def edit(change: Callable[[dict[str, Any]], Any]) -> Path:
        content = torch.load(trained, weights_only=True)
        change(content)
        torch.save(content, tmp_path / "edited.ckpt")
        return tmp_path / "edited.ckpt"

    return edit


def refused(path: Path | str) -> str:
    """The one line that a file gets which is no agent."""
    with pytest.raises(ConfigError) as caught:
        lit_diffrl.load(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message, message
    return message


# ---------------------------------------------------------------- acting


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_two_lines_act(trained: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", "nowhere")  # the file is all there is
    agent = lit_diffrl.load(str(trained))
    obs: Any = np.zeros((3, 4), dtype=np.float32) if form == "numpy" else torch.zeros(3, 4)
    for one in (obs[0], obs):
        agent.reset()
        action = agent.act(one)
        assert type(action) is type(one) and action.shape == (*one.shape[:-1], 2)
        assert bool((abs(action) <= 1).all())
    assert not agent.training and isinstance(agent, DMEMM)


def test_a_maze_is_walked_by_its_own_observations(trained: Path) -> None:
    from lit_diffrl.rollout import run_episodes

    agent = lit_diffrl.load(trained)
    assert agent.spec is not None
    (result,) = run_episodes(agent.spec, agent, episodes=1, max_steps=5)
    assert result.length == 5 and result.plans == []
    goal = np.array([-1.0, 1.0], dtype=np.float32)
    obs = {"observation": np.zeros(4), "achieved_goal": np.zeros(2), "desired_goal": goal}
    plan = agent.plan(obs)  # type: ignore[operator]
    np.testing.assert_allclose(plan.obs[[0, -1]], [[0, 0, 0, 0], [-1, 1, 0, 0]], atol=1e-5)


def test_loading_gives_what_was_saved(trained: Path) -> None:
    first, second = lit_diffrl.load(trained), lit_diffrl.load(trained, device="cpu")
    saved = torch.load(trained, weights_only=True)["state_dict"]
    assert first.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in first.state_dict().items())
    actions = []
    for agent in (first, second):
        agent.reset(seeds=[3])
        actions.append(agent.act(np.zeros(4)))
    assert np.array_equal(*actions)


# ---------------------------------------------------------------- files that are no agents


def test_a_missing_file_is_named_with_its_neighbours(trained: Path, tmp_path: Path) -> None:
    assert "did you mean 'agent.ckpt'?" in refused(trained.with_name("agnt.ckpt"))
    assert "train one with 'fit' first" in refused(tmp_path / "last.ckpt")
    assert "no checkpoint at" in refused(tmp_path)


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99, -1])
def test_a_torn_file_is_refused(trained: Path, tmp_path: Path, kept: float) -> None:
    content = trained.read_bytes()
    torn = tmp_path / "torn.ckpt"
    torn.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert "cannot be read as a checkpoint" in refused(torn) and "train again" in refused(torn)
    (tmp_path / "best.ckpt").touch()
    assert f"there is also {tmp_path / 'best.ckpt'}" in refused(torn)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}},
        [1, 2],
        torch.zeros(3),
        {CHECKPOINT_KEY: 3},
        {CHECKPOINT_KEY: {}, "state_dict": {}},
        {CHECKPOINT_KEY: {"method": "lit_diffrl.methods.dmemm.DMEMM", "spec": {}}},
    ],
    ids=str,
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "foreign.ckpt")
    assert "was not written by lit_diffrl" in refused(tmp_path / "foreign.ckpt")


@pytest.mark.parametrize("content", [b"", b"model:\n  class_path: DMEMM\n", b"\x89HDF\r\n\x1a\n" + bytes(100)])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    assert "cannot be read as a checkpoint" in refused(tmp_path / "x.ckpt")


def test_a_spec_of_another_version_is_refused(edited: Callable[..., Path]) -> None:
    path = edited(lambda content: content[CHECKPOINT_KEY]["spec"].pop("goal_key"))
    with pytest.raises(ConfigError, match=r"lacks \['goal_key'\].*another version"):
        lit_diffrl.load(path)


def test_arguments_of_another_version_are_refused(edited: Callable[..., Path]) -> None:
    path = edited(lambda content: content["hyper_parameters"].update(horizn=8))
    assert "another version of DMEMM" in refused(path) and "horizn" in refused(path)


def test_weights_of_another_size_are_refused(edited: Callable[..., Path]) -> None:
    path = edited(lambda content: content["hyper_parameters"].update(dim=16))
    with pytest.raises(ConfigError, match=r"checkpoint \(8.*now \(16"):
        lit_diffrl.load(path)
    path = edited(lambda content: content["state_dict"].popitem())
    with pytest.raises(ConfigError, match="only on one side: "):
        lit_diffrl.load(path)


# ---------------------------------------------------------------- classes


class OwnMethod(Method):
    """A method defined outside the package, without arguments."""

    def __init__(self) -> None:
        super().__init__()

    @property
    def phases(self) -> list[Phase]:
        return [Phase("only", 1)]

    def build(self, spec: DatasetSpec) -> None:
        super().build(spec)
        self.gain = torch.nn.Parameter(torch.tensor(2.0))

    def choose_action(self, state: torch.Tensor, goal: torch.Tensor | None, rows: list[int]) -> torch.Tensor:
        return self.gain * state[:, :2]


def test_a_method_of_ones_own_loads_once_it_is_imported(spec: DatasetSpec, tmp_path: Path) -> None:
    method = OwnMethod()
    method.build(spec)
    checkpoint: dict[str, Any] = {"state_dict": method.state_dict()}
    method.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "own.ckpt")
    action = lit_diffrl.load(tmp_path / "own.ckpt").act(np.full(4, 0.25))
    assert action.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lit_diffrl.methods.dmemm.DMEM", "did you mean 'lit_diffrl.methods.dmemm.DMEMM'"),
        ("my_package.Mine", "import the module that defines it"),
        ("os.system", "not an imported method"),
        ("antigravity.Fly", "not an imported method"),
    ],
)
def test_an_unknown_class_is_neither_guessed_nor_imported(edited: Callable[..., Path], name: str, words: str) -> None:
    path = edited(lambda content: content[CHECKPOINT_KEY].update(method=name))
    with pytest.raises(ConfigError, match=re.escape(name)) as caught:
        lit_diffrl.load(path)
    assert words in str(caught.value) and "antigravity" not in sys.modules


# ---------------------------------------------------------------- payloads


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.write_text, (self.trace, "executed")


def as_pickle(content: dict[str, Any], path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def as_old_format(content: dict[str, Any], path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_archive(content: dict[str, Any], path: Path) -> None:
    """A checkpoint that torch wrote without the payload, the pickle in it replaced by one with it."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for item in source.namelist():
            body = source.read(item)
            target.writestr(item, pickle.dumps(content, protocol=2) if item.endswith("data.pkl") else body)


@pytest.mark.parametrize("write", [torch.save, as_pickle, as_old_format, as_archive])
@pytest.mark.parametrize("place", ["beside", "hyper_parameters", "spec", "weights"])
def test_code_in_a_file_is_not_executed(
    trained: Path, tmp_path: Path, write: Callable[..., None], place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, path = tmp_path / "trace", tmp_path / "last.ckpt"
    content = torch.load(trained, weights_only=True)
    targets = {
        "beside": content,
        "hyper_parameters": content["hyper_parameters"],
        "spec": content[CHECKPOINT_KEY]["spec"],
        "weights": content["state_dict"],
    }
    targets[place]["payload"] = Payload(trace)
    write(content, path)
    with zipfile.ZipFile(path) if zipfile.is_zipfile(path) else path.open("rb") as file:
        names = file.namelist() if isinstance(file, zipfile.ZipFile) else []
        raw = b"".join(file.read(n) for n in names) if isinstance(file, zipfile.ZipFile) else file.read()
    assert b"write_text" in raw, "the payload is in the file"

    assert "cannot be read as a checkpoint" in refused(path)
    for command in ("fit", "validate", "test") if place == "beside" else ():
        assert main([command, "--model", "DMEMM", "--data", "WindowData", "--ckpt_path", str(path)]) == 2
        assert "cannot be read as a checkpoint" in capsys.readouterr().err
    assert not trace.exists()
    torch.load(path, weights_only=False) if write is not as_pickle else pickle.loads(path.read_bytes())
    assert trace.exists(), "the payload works, where it is let"
