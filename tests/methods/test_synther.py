"""SynthER: the denoiser learns rows, draws them in their own units, and the learner sees them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import ROOT, Config, curves
from torch import Tensor

from lit_diffrl.__main__ import main
from lit_diffrl.data import PolicyBatch
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import TD3BC, SynthERTD3BC
from lit_diffrl.methods.synther import SynthER
from lit_diffrl.methods.synthetic_learner import SYNTHETIC


@pytest.fixture
def folder(mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config() -> Config:
    return Config(ROOT / "conf/synther.yaml")


def test_rows_are_drawn_once_and_the_learner_sees_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws, batches = [], []
    synthesize, step = SynthER.synthesize, TD3BC.training_step

    def counted(self: SynthER) -> dict[str, float]:
        draws.append(self.current_epoch)
        return synthesize(self)

    def watched(self: TD3BC, batch: PolicyBatch, batch_idx: int) -> None:
        batches.append(batch)
        step(self, batch, batch_idx)

    monkeypatch.setattr(SynthER, "synthesize", counted)
    monkeypatch.setattr(TD3BC, "training_step", watched)
    content = config().fit("a", "--model.real_ratio=0")
    assert draws == [2], "before the policy's first epoch"
    rows = content[SYNTHETIC]["rows"]
    assert rows.shape == (64, 4 + 2 + 1 + 4 + 1) and bool(rows.isfinite().all())
    logged = {name: points[0][1] for name, points in curves("a", ("synthetic/",)).items()}
    assert logged["synthetic/reward_mean"] == pytest.approx(float(rows[:, 6].mean()), rel=1e-5)
    assert logged["synthetic/done"] == pytest.approx(float(rows[:, -1].mean())) and logged["synthetic/rows"] == 64
    assert 0 < logged["synthetic/outside"] <= 1
    synthetic = {tuple(row) for row in rows[:, :4].tolist()}
    assert len(batches) == 6
    assert all(tuple(row) in synthetic for batch in batches for row in batch.obs.tolist())
    assert set(rows[:, -1].unique().tolist()) <= {0.0, 1.0}


def test_actions_stay_in_the_box_where_asked_and_the_rest_in_the_datas_limits(folder: Path) -> None:
    """An untrained denoiser's draws are far out."""
    more = ["--model.diffusion_epochs=1", "--model.real_ratio=0"]
    limits = {}
    for run, options in {
        "free": ["--model.samples.clip_actions=false"],
        "actions": [],
        "all": ["--model.samples.clip_to_data=true"],
    }.items():
        content = config().fit(run, *more, *options)
        state, rows = content["state_dict"], content[SYNTHETIC]["rows"]
        inside = (rows >= state["row_low"] - 1e-5) & (rows <= state["row_high"] + 1e-5)
        limits[run] = (float(rows[:, 4:6].abs().max()), bool(inside[:, :4].all()))
    assert limits["free"][0] > 1 >= limits["actions"][0] and not limits["actions"][1]
    assert limits["all"][1]


def test_draws_of_a_perfect_denoiser_are_rows_of_the_datas_scale(folder: Path) -> None:
    """The optimal one for standard normal data is c_skip x alone: F = 0."""
    config().fit("a", "--data.updates_per_epoch=1")
    (last,) = Path("tb_logs").glob("*/*/a/checkpoints/last.ckpt")
    method: Any = SynthER.load_from_checkpoint(last)
    method.denoiser_ema.net.forward = lambda x, c_noise: torch.zeros_like(x)
    method.edm_sampler = type(method.edm_sampler)(steps=64)
    method.churn = type(method.churn)()
    torch.manual_seed(0)
    with torch.no_grad():
        rows = method.draw_rows(4000)
    scale = torch.where(method.row_std > 1e-3, method.row_std, 1.0)
    torch.testing.assert_close((rows - method.row_mean).mean(0) / scale, torch.zeros(12), rtol=0, atol=0.06)
    torch.testing.assert_close(rows.std(0) / scale, method.row_std / scale, rtol=0.05, atol=0.02)


def test_the_scale_is_the_rows_own_and_done_keeps_its(folder: Path) -> None:
    content = config().fit("a", "--data.updates_per_epoch=1", "--trainer.max_epochs=1")
    state = content["state_dict"]
    torch.testing.assert_close(state["row_mean"][:4], torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(state["row_std"][:4], torch.ones(4), rtol=0, atol=1e-2)
    assert float(state["row_mean"][-1]) == 0 and float(state["row_std"][-1]) == 1


def test_rows_within_limits_are_scaled_by_them_and_samples_stay_within(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--model.denoiser.scale=limits", "--model.samples.clip_actions=false", "--model.diffusion_epochs=1"]
    content = config().fit("a", *more, "--model.real_ratio=0")
    state, rows = content["state_dict"], content[SYNTHETIC]["rows"]
    for sign, limit in ((-1, "row_low"), (1, "row_high")):
        end = state["row_mean"] + sign * state["row_std"]
        torch.testing.assert_close(end[:-1], state[limit][:-1], rtol=1e-4, atol=1e-4)
    assert float(state["row_mean"][-1]) == 0 and float(state["row_std"][-1]) == 1
    within = (rows >= state["row_low"] - 1e-4) & (rows <= state["row_high"] + 1e-4)
    assert bool(within[:, :-1].all()), "an untrained denoiser's draws are far out"
    (last,) = Path("tb_logs").glob("*/*/a/checkpoints/last.ckpt")
    capsys.readouterr()
    assert main(["fit", *config().options, "--run", "b", "--model.models_ckpt", str(last)]) == 2
    assert "denoiser.scale: checkpoint 'limits', now 'gaussian'" in capsys.readouterr().err


def test_fewer_rows_than_a_batch_takes_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They would never be used, and the learner be the plain one."""
    assert main(["fit", *config().options, "--data.batch_size=200"]) == 2
    assert "take 100 synthetic transitions" in (err := capsys.readouterr().err)
    assert "model.samples.count keeps 64" in err


def test_a_report_of_numbers_that_are_not_finite_names_the_steps_of_real_rows_alone(folder: Path) -> None:
    config().fit("a")
    (last,) = Path("tb_logs").glob("*/*/a/checkpoints/last.ckpt")
    method: Any = SynthER.load_from_checkpoint(last)
    steps = torch.arange(4)
    assert torch.equal(method.recorded_steps(steps), steps), "no batch was mixed"
    method._real = torch.tensor([True, False, False, True])
    assert method.recorded_steps(steps).tolist() == [0, 3]


def test_options_given_in_part_are_completed_alike_when_saved_and_when_loaded(folder: Path) -> None:
    content = config().fit("a")
    method: Any = SynthERTD3BC(edm={"rho": 5.0})
    assert (method.edm.rho, method.edm.sigma_data) == (5.0, 1.0)
    method._refuse_other_levels(content["hyper_parameters"])
    method._refuse_other_levels({"edm": {"rho": 5.0}})
    with pytest.raises(ConfigError, match="edm.sigma_data: checkpoint 0.5, now 1.0"):
        method._refuse_other_levels({"edm": {"sigma_data": 0.5}})


def test_a_denoiser_is_lent_to_another_learner(folder: Path) -> None:
    first = config().fit("a")
    (last,) = Path("tb_logs").glob("*/*/a/checkpoints/last.ckpt")
    lent = ["--model", "SynthERIQL", "--model.models_ckpt", str(last)]
    assert main(["fit", *config().options, *lent, "--run", "b"]) == 0
    (other,) = Path("tb_logs").glob("syntheriql/*/b/checkpoints/last.ckpt")
    second: dict[str, Any] = torch.load(other, weights_only=True)
    mine: dict[str, Tensor] = {k: v for k, v in first["state_dict"].items() if k.partition(".")[0] in SynthER.models}
    assert mine and all(torch.equal(v, second["state_dict"][k]) for k, v in mine.items())
