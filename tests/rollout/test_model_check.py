"""ModelCheck: models against the simulator, once in a run and whenever a checkpoint is tested."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from short_runs import ROOT, Config, curves
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_diffrl.__main__ import main
from lit_diffrl.errors import ConfigError
from lit_diffrl.rollout.model_check import ModelCheck


def test_models_are_compared_once_when_they_are_finished_and_again_by_test(
    mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(tmp_path)
    Config(ROOT / "conf/dydiff_td3bc.yaml").fit("a", "--model_check.starts=5")
    found = curves("a", ("model/",))
    names = ("single-step_model", "trajectory_model", "first_state", "recorded_states")
    assert {f"model/{name}_{t}" for name in names for t in (1, 5, 10, 20)} == found.keys()
    assert all([step for step, _ in points] == [12] for points in found.values()), "before the policy's first update"
    assert all(points[0][1] < 1e-6 for tag, points in found.items() if "recorded" in tag)
    assert found["model/trajectory_model_20"][0][1] > 1e-3, "which has hardly learnt"

    (run,) = Path("tb_logs").glob("*/*/a")
    assert (run / "pictures/models-epoch=4.png").stat().st_size > 5_000
    assert EventAccumulator(str(run)).Reload().Tags()["images"] == ["model/errors"]
    test = ["test", "--ckpt_path", "last", "--rollout.test_episodes=1", "--rollout.max_steps=2"]
    assert main([*test, "--model_check.starts=5"]) == 0
    result = json.loads((run / "results/last-models.json").read_text())
    assert np.shape(result["mean"]["trajectory model"]) == (32,) and result["rows"] == [5] * 32
    assert (run / "pictures/last-models.png").exists()
    rollouts = json.loads((run / "results/last-rollouts.json").read_text())
    closed = rollouts["mean"]
    none = {"all": 0, "of those that end": None, "of the others": 0}
    assert rollouts["ended"] == dict.fromkeys(["simulator", *list(closed)[:-1]], none), "a maze has no falls"
    known = {"simulator", "simulator, predicted rewards", *list(closed)[:-1]}
    assert set(rollouts["returns"]) == known and all(np.isfinite(list(rollouts["returns"].values())))
    assert "ended" not in result and "returns" not in result
    assert list(closed) == ["single-step rollout", "correction 1", "correction 2", "first state"]
    assert all(np.shape(errors) == (32,) and errors[0] < 1e-6 < errors[20] for errors in closed.values())
    assert closed["correction 1"] != closed["correction 2"] and (run / "pictures/last-rollouts.png").exists()
    replayed = json.loads((run / "results/last-replayed.json").read_text())
    assert list(replayed["mean"]) == ["single-step rollout", "correction 1", "correction 2"]
    assert all(errors[0] < 1e-6 < errors[20] for errors in replayed["mean"].values())
    steps = json.loads((run / "results/last-steps.json").read_text())
    assert list(steps["mean"]) == ["single-step rollout", "correction 1", "correction 2"]
    assert steps["rows"] == [5] * 32 and (run / "pictures/last-steps.png").exists()
    assert min(min(errors[1:]) for errors in steps["mean"].values()) > 1e-8, "of models that have hardly learnt"
    assert main([*test, "--model_check.starts=0"]) == 0
    assert len(list((run / "results").glob("*-models*"))) == 1


def test_a_negative_number_of_starts_is_refused() -> None:
    with pytest.raises(ConfigError, match="model_check.starts"):
        ModelCheck(-1)
