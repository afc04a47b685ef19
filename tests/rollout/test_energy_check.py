"""EnergyCheck: the table at the end of a run and in a test, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from short_runs import ROOT, Config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_diffrl.__main__ import main
from lit_diffrl.errors import ConfigError
from lit_diffrl.rollout.energy_check import DATA, STARTS, EnergyCheck

CHECK = ("--energy_check.states=5", "--energy_check.actions=16", "--energy_check.times=[0.1,0.7]")
TEST = ["test", "--ckpt_path", "last", "--rollout.test_episodes=1", "--rollout.max_steps=2", "--model.rescale=false"]


@pytest.mark.parametrize("name", ["aepo", "qgpo"])
def test_guidance_is_checked_when_it_has_learnt_and_by_test(
    name: str, mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(tmp_path)
    Config(ROOT / f"conf/{name}.yaml").fit("a", *CHECK)
    out = capsys.readouterr().out
    assert STARTS in out and DATA in out and "cosine" in out
    (run,) = Path("tb_logs").glob("*/*/a")
    assert (run / "pictures/energy.png").stat().st_size > 5_000
    assert EventAccumulator(str(run)).Reload().Tags()["images"] == ["energy/check"]

    assert main([*TEST, *CHECK]) == 0
    result = json.loads((run / "results/last-energy.json").read_text())
    assert (result["states"], result["support"]) == (5, 16)
    for where in (STARTS, DATA):
        assert [row["t"] for row in result[where]] == [0.1, 0.7]
        assert all(row["exact"] > 0 and row["learnt"] > 0 and -1 <= row["cosine"] <= 1 for row in result[where])
        assert all(1 <= row["actions"] <= 16 for row in result[where])
    assert (run / "pictures/last-energy.png").exists()
    assert capsys.readouterr().out.count(STARTS) == 1

    assert main([*TEST, "--energy_check.states=0"]) == 0
    assert len(list((run / "results").glob("*-energy*"))) == 1


def test_an_energy_that_has_not_learnt_is_not_compared(
    mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(tmp_path)
    Config(ROOT / "conf/aepo.yaml").fit("a", "--model.critic_epochs=0", "--model.energy_epochs=0", *CHECK)
    assert caplog.text.count("has not learnt yet") == 1
    assert main([*TEST, *CHECK]) == 0
    assert caplog.text.count("has not learnt yet") == 2
    assert not [*Path("tb_logs").glob("*/*/a/results/*-energy*"), *Path("tb_logs").glob("*/*/a/pictures/*energy*")]


def test_a_method_without_an_energy_is_refused_before_it_learns(
    mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--config", str(ROOT / "conf/td3bc.yaml"), "--run=a", *CHECK]
    assert main([*command, "--data.updates_per_epoch=2", "--rollout.episodes=1", "--trainer.accelerator=cpu"]) == 2
    assert "TD3BC has no energy" in capsys.readouterr().err
    assert not list(Path("tb_logs").glob("*/*/a/checkpoints/*"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"states": -1}, "energy_check.states"),
        ({"actions": 1}, "energy_check.actions"),
        ({"times": []}, "energy_check.times"),
        ({"times": [0.5, 1.5]}, "energy_check.times"),
        ({"times": [0.0]}, "energy_check.times"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        EnergyCheck(**options)  # type: ignore[arg-type]
