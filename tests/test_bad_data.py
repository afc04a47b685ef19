"""Bad data on the command line: one line that says what to do, exit code 2, and nothing trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import gymnasium_robotics  # noqa: F401  its first import prints an advertisement: here, not among the errors
import h5py
import numpy as np
import pytest

from lit_diffrl.__main__ import main

CONF = Path(__file__).parents[1] / "conf"
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
  init_args: {horizon: 8, batch_size: 2, updates_per_epoch: 2}
rollout: {episodes: 1, max_steps: 2}
trainer: {accelerator: cpu, enable_model_summary: false}
"""
Edit = Callable[[dict[str, Any], int], None]


@pytest.fixture(autouse=True)
def folder(minari_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with one config file, beside a root of Minari datasets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIT_DIFFRL_TRACEBACK", raising=False)
    Path("main.yaml").write_text(CONFIG)
    monkeypatch.setattr("lit_diffrl.data.sources._server_has_name", lambda: False)
    return tmp_path


def fit(dataset: str, *more: str) -> int:
    return main(["fit", "--config", "main.yaml", "--data.dataset", dataset, *more])


def refused(capsys: pytest.CaptureFixture[str], dataset: str, *more: str) -> str:
    """The one line that a dataset gets."""
    capsys.readouterr()
    assert fit(dataset, *more) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 700, err
    assert "epoch 1/" not in out and not list(Path().glob("tb_logs/**/*.ckpt"))
    assert not list(Path().glob("tb_logs/**/config.yaml")), "nothing has begun"
    return lines[0]


def put(name: str, index: Any, value: Any) -> Edit:
    """An edit that writes one value into an array of episode 1."""

    def edit(arrays: dict[str, Any], i: int) -> None:
        if i == 1:
            arrays[name] = np.array(arrays[name])
            arrays[name][index] = value

    return edit


def cut(name: str, part: Any) -> Edit:
    """An edit that keeps a part of an array of episode 1."""
    return lambda arrays, i: arrays.update({name: arrays[name][part]}) if i == 1 else None


# ---------------------------------------------------------------- Minari


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put("rewards", 3, np.nan), ["episode 1, step 3", "reward is nan"]),
        (put("actions", (4, 1), np.nan), ["episode 1, step 4", "action[1] is nan"]),
        (put("observations", (0, 2), np.inf), ["episode 1, step 0", "obs[2] is inf"]),
        (put("actions", (4, 1), -1.5), ["episode 1, step 4", "action[1] is -1.5", "[-1, 1]"]),
        (put("terminations", 6, True), ["episode 1, step 6", "terminated is set"]),
        (cut("observations", np.s_[:-1]), ["episode 1", "observations has shape (20, 4)", "one row more"]),
        (cut("rewards", np.s_[:-1]), ["episode 1", "19 rewards"]),
        (cut("actions", np.s_[:, :1]), ["episode 1", "action", "(1,)"]),
    ],
    ids=["nan-reward", "nan-action", "inf-obs", "action-range", "flag", "obs-rows", "reward-rows", "action-columns"],
)
@pytest.mark.parametrize("config", ["", "edp_td3"], ids=["windows", "transitions"])
def test_malformed_episodes(
    make_minari: Callable[..., str], edit: Edit, words: list[str], config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if config:
        Path("main.yaml").write_text((CONF / f"{config}.yaml").read_text())
    line = refused(capsys, make_minari(edit=edit))
    assert "test/point-v0" in line and all(word in line for word in words), line


@pytest.mark.parametrize("config", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_method_refuses_data_that_is_not_finite(
    config: str, make_minari: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("main.yaml").write_text((CONF / f"{config}.yaml").read_text())
    line = refused(capsys, make_minari(edit=put("rewards", 3, np.nan)))
    assert "test/point-v0" in line and "reward is nan" in line, line


def test_an_empty_episode(
    make_minari: Callable[..., str], minari_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = make_minari()
    with h5py.File(minari_root / name / "data" / "main_data.hdf5", "a") as file:
        for key, value in list(file["episode_1"].items()):
            if isinstance(value, h5py.Dataset):
                rows = value[:1] if key == "observations" else value[:0]
                del file[f"episode_1/{key}"]
                file[f"episode_1/{key}"] = rows
    assert "episode 1 is empty" in refused(capsys, name)


def test_missing_keys(make_minari: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    name = make_minari(dict_obs=True)
    line = refused(capsys, name, "--data.obs_keys", "[observation,speed]")
    assert "achieved_goal, desired_goal, observation" in line and "speed" in line and "--data.obs_keys" in line


@pytest.mark.parametrize("damage", ["main_data.hdf5", "metadata.json"])
def test_truncated_files(
    make_minari: Callable[..., str], minari_root: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = make_minari(n_episodes=20)
    path = minari_root / name / "data" / damage
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    line = refused(capsys, name)
    assert name in line and "remove that folder and get the dataset again" in line


def test_an_unknown_environment(
    make_minari: Callable[..., str], minari_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = make_minari(obs_dim=11, action_dim=3, env="Hopper-v5")
    path = minari_root / name / "data" / "metadata.json"
    text = path.read_text().replace("Hopper-v5", "Hoper-v5").replace("hopper_v5:", "hoper_v5:")
    path.write_text(text)
    line = refused(capsys, name)
    assert "Hoper-v5" in line and "did you mean" in line and "'Hopper-v5'" in line


@pytest.mark.parametrize(("obs_dim", "action_dim", "words"), [(4, 2, "(11,)"), (11, 2, "(3,)")])
def test_an_environment_of_other_sizes(
    make_minari: Callable[..., str],
    minari_root: Path,
    obs_dim: int,
    action_dim: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = make_minari(obs_dim=obs_dim, action_dim=action_dim)
    metadata = minari_root / name / "data" / "metadata.json"
    content = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({**content, "env_spec": gym.spec("Hopper-v5").to_json()}))
    line = refused(capsys, name)
    assert "Hopper-v5" in line and words in line


def test_an_environment_without_a_time_limit(
    make_minari: Callable[..., str], minari_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before the first phase, not at the first evaluation after it."""
    name = make_minari(obs_dim=11, action_dim=3)
    metadata = minari_root / name / "data" / "metadata.json"
    spec = {**json.loads(gym.spec("Hopper-v5").to_json()), "max_episode_steps": None}
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "env_spec": json.dumps(spec)}))
    assert "no time limit" in refused(capsys, name, "--rollout.max_steps", "null")
    assert fit(name, "--rollout.max_steps", "2") == 0


def test_reference_returns_in_the_wrong_order(
    make_minari: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = make_minari(ref_min_score=10.0, ref_max_score=-10.0)
    assert "ref_min_score is 10.0 and ref_max_score -10.0" in refused(capsys, name)


def test_episodes_shorter_than_a_plan(make_minari: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, make_minari(length=5))
    assert "no window of 8 rows" in line and "longest 5 steps" in line and "--data.horizon" in line


def test_data_that_a_method_cannot_serve(make_minari: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    name = make_minari(obs_dim=5)
    line = refused(capsys, name, "--model.plan.mode", "waypoints")
    assert "obs_dim must be twice action_dim, got 5 and 2" in line
    assert "has no constant goal" in refused(capsys, name, "--data.segmentation", "goal")


@pytest.mark.parametrize("name", ["test/pont-v0", "lit_diffrl/pointmaze/umze-v0", "test/point-v0+nowhere/x-v0"])
def test_unknown_datasets(make_minari: Callable[..., str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_minari()
    line = refused(capsys, name)
    assert name.split("+")[-1] in line and ("did you mean" in line or "local ones are in" in line)


# ---------------------------------------------------------------- D4RL files


def d4rl(path: Path, **changes: Any) -> str:
    """A file of hopper; None leaves an array out."""
    steps = 60
    content: dict[str, Any] = {
        "observations": np.random.default_rng(0).normal(size=(steps, 11)).astype(np.float32),
        "actions": np.zeros((steps, 3), dtype=np.float32),
        "rewards": np.ones(steps, dtype=np.float32),
        "terminals": np.arange(steps) % 20 == 19,
        "timeouts": np.zeros(steps, dtype=bool),
    }
    with h5py.File(path, "w") as file:
        for key, value in {**content, **changes}.items():
            if value is not None:
                file[key] = value
    return str(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards": np.where(np.arange(60) == 25, np.nan, 1)}, ["episode 1, step 5", "reward is nan"]),
        ({"actions": np.full((60, 3), 1.2)}, ["episode 0, step 0", "action[0] is 1.2"]),
        ({"observations": np.zeros((60, 4))}, ["observations have 4 columns", "hopper has 11"]),
        ({"rewards": np.ones(59)}, ["rewards has 59 rows", "observations 60"]),
        ({"actions": None, "terminals": None}, ["lacks actions, terminals"]),
        ({"terminals": np.zeros(60, bool)}, ["no episode ends within its 60 steps"]),
        ({"observations": np.array([b"x"] * 60)}, ["observations is of type", "plain numbers"]),
    ],
    ids=["nan", "action-range", "columns", "rows", "missing", "no-end", "objects"],
)
def test_malformed_d4rl_files(changes: dict[str, Any], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, d4rl(Path("hopper_medium-v2.hdf5"), **changes))
    assert "hopper_medium-v2.hdf5" in line and all(word in line for word in words), line


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.95])
def test_truncated_d4rl_files(kept: float, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(d4rl(Path("hopper_medium-v2.hdf5")))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    line = refused(capsys, str(path))
    assert "not a readable HDF5 file, or damaged" in line and "download or copy it again" in line


def test_a_missing_d4rl_file(capsys: pytest.CaptureFixture[str]) -> None:
    d4rl(Path("hopper_medium-v2.hdf5"))
    line = refused(capsys, "hoper_medium-v2.hdf5")
    assert "hoper_medium-v2.hdf5 does not exist" in line and "did you mean 'hopper_medium-v2.hdf5'" in line


# ---------------------------------------------------------------- and good data is not refused


def test_the_same_options_train_on_good_data(make_minari: Callable[..., str]) -> None:
    assert fit(make_minari(dict_obs=True)) == 0
    assert fit(d4rl(Path("hopper_medium-v2.hdf5"))) == 0
    assert len(list(Path().glob("tb_logs/**/last.ckpt"))) == 2
