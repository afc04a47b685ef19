"""Training of the real methods through the command line: resuming, phases, evaluation and logs."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lit_diffrl
from lit_diffrl.__main__ import main

ROOT = Path(__file__).parents[1]
RUNS = Path("tb_logs/dmemm/pointmaze-umaze-dense-v0")

# Two phases and plans of several lengths; three phases; all networks and the number of plans are small.
COMMON = """
seed_everything: 1
model:
  class_path: DMEMM
  init_args:
    horizon: ${data.init_args.horizon}
    goal_conditioned: true
    n_diffusion_steps: 8
    dim: 8
    dim_mults: [1, 4]
    lr_decay: cosine
    world_model_epochs: 2
    diffusion_epochs: 3
    ema: {every: 1, start: 3}
    world_model: {members: 3, elites: 2, hidden: 16, layers: 2, reward_hidden: 16}
    plan: {mode: waypoints, rank_by: model, rank_quantile: 0.1}
data:
  class_path: WindowData
  init_args:
    dataset: lit_diffrl/pointmaze/umaze-dense-v0
    horizon: [8, 12]
    stride: 2
    batch_size: 4
    transition_batch_size: 16
    updates_per_epoch: 5
rollout: {episodes: 2, num_envs: 2, max_steps: 20, test_episodes: 3}
trainer: {accelerator: cpu, enable_model_summary: false, log_every_n_steps: 5}
"""
THREE = """
model:
  init_args:
    value_epochs: 2
    plan: {rank_by: value, candidates: 2, rank_quantile: null}
data:
  init_args: {horizon: 8}
"""


@pytest.fixture(autouse=True)
def folder(mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder with two config files."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text(COMMON)
    Path("three.yaml").write_text(THREE)
    return tmp_path


def fit(run: str, *more: str, three: bool = False) -> Path:
    """Train and give the run's folder."""
    configs = ["--config", "two.yaml", *(["--config", "three.yaml"] if three else [])]
    assert main(["fit", *configs, "--run", run, *more]) == 0
    return RUNS / run


@pytest.fixture(scope="module")
def shelf(mazes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, ``begun`` (one epoch) and ``done``, for tests that only look at them."""
    folder = tmp_path_factory.mktemp("shelf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(mazes))
        patch.chdir(folder)
        Path("two.yaml").write_text(COMMON)
        fit("begun", "--trainer.max_epochs", "1")
        fit("done")
    return folder


@pytest.fixture
def begun(shelf: Path, folder: Path) -> Path:
    """A copy of the run that has one epoch."""
    return Path(shutil.copytree(shelf / RUNS / "begun", RUNS / "a"))


@pytest.fixture
def done(shelf: Path, folder: Path) -> Path:
    """A copy of the run that has come to its end."""
    return Path(shutil.copytree(shelf / RUNS / "done", RUNS / "a"))


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def tensors(content: Any, place: str = "") -> dict[str, torch.Tensor]:
    """All tensors and numbers in nested dicts and lists, by their place."""
    if isinstance(content, dict):
        content = [(str(k), v) for k, v in content.items()]
    elif isinstance(content, list | tuple):
        content = [(str(i), v) for i, v in enumerate(content)]
    else:
        return {place: torch.as_tensor(content)} if isinstance(content, torch.Tensor | bool | int | float) else {}
    return {k: v for key, value in content for k, v in tensors(value, f"{place}/{key}").items()}


def assert_same_training(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Weights, averages, counters and optimizers, bit for bit."""
    for part in ("state_dict", "optimizer_states"):
        a, b = (tensors(run[part]) for run in (first, second))
        assert a.keys() == b.keys() and len(a) > 10
        different = [k for k in a if not torch.equal(a[k], b[k])]
        assert not different, different[:5]
    assert (first["epoch"], first["global_step"]) == (second["epoch"], second["global_step"])


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """First parts of the names of the tensors that differ."""
    a, b = before["state_dict"], after["state_dict"]
    return {key.partition(".")[0] for key in a if not torch.equal(a[key], b[key])}


def curves(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run)).Reload()


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    return [(e.step, e.value) for e in curves(run).Scalars(tag)]


def shown(out: str, metric: str) -> float:
    """A value in the table that Lightning prints after validate and test."""
    found = re.search(rf"{metric}[^\w.-]*(-?[\d.]+(?:e-?\d+)?)", out)
    assert found, out
    return float(found[1])


def error(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that is the answer to a command line that cannot be followed."""
    capsys.readouterr()
    assert main(list(args)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---------------------------------------------------------------- the same run, bit for bit


@pytest.mark.parametrize(("three", "stops"), [(False, (1, 3)), (False, (2,)), (True, (1, 3, 5)), (True, (4,))])
def test_a_resumed_run_equals_an_uninterrupted_one(three: bool, stops: tuple[int, ...]) -> None:
    """Stops within the phases of the world model, the return regressor and the diffusion model, and between them."""
    whole = fit("whole", three=three)
    fit("parts", "--trainer.max_epochs", str(stops[0]), three=three)
    for stop in stops[1:]:
        fit("parts", "--ckpt_path", "last", "--trainer.max_epochs", str(stop), three=three)
    parts = fit("parts", "--ckpt_path", "last", three=three)
    assert_same_training(checkpoint(whole), checkpoint(parts))
    for tag in ("loss/wdiff", "eval/return"):
        ends = (curve(whole, tag)[-1], curve(parts, tag)[-1])
        assert ends[0] == ends[1]


def test_a_branch_from_the_best_checkpoint_repeats_the_rest_of_the_run() -> None:
    whole = fit("whole")
    best = checkpoint(whole, "best")
    assert best["epoch"] >= 2
    # As if the run had gone on being worse: the best evaluation is that of the first epoch of its phase.
    first = fit("first", "--trainer.max_epochs", "3")
    branch = fit("branch", "--ckpt_path", str(first / "checkpoints/best.ckpt"))
    assert checkpoint(first)["epoch"] == checkpoint(first, "best")["epoch"] == 2
    assert_same_training(checkpoint(whole), checkpoint(branch))


def test_a_seed_decides_the_run_and_evaluations_do_not() -> None:
    run = checkpoint(fit("a"))
    assert_same_training(run, checkpoint(fit("b")))
    assert_same_training(run, checkpoint(fit("rarely", "--rollout.every_n_epochs", "3", "--rollout.seed", "77")))
    assert_same_training(run, checkpoint(fit("plain", "--rollout.pictures", "false", "--trainer.logger", "false")))
    other = checkpoint(fit("other", "--seed_everything", "2"))
    assert {"net", "ema", "world_model"} <= changed(run, other)


# ---------------------------------------------------------------- phases


def test_each_phase_trains_its_own_networks_only() -> None:
    names, runs = ("world_model", "value", "diffusion"), []
    for epochs in range(1, 7):
        more = () if epochs == 1 else ("--ckpt_path", "last")
        runs.append(checkpoint(fit("a", *more, "--trainer.max_epochs", str(epochs), three=True)))
    begun = [changed(before, after) for before, after in itertools.pairwise(runs)]
    assert begun[0] == {"world_model"}
    assert begun[1] <= {"world_model", "value", "value_ema"}, "the world model may go back to its best weights"
    assert begun[2] == {"value", "value_ema"}
    assert begun[3] == begun[4] == {"net", "ema"}

    def steps(content: dict[str, Any]) -> list[float]:
        states = [list(optimizer["state"].values()) for optimizer in content["optimizer_states"]]
        return [float(state[0]["step"]) if state else 0.0 for state in states]

    assert [steps(run) for run in runs] == [[5, 0, 0], [10, 0, 0], [10, 5, 0], [10, 10, 0], [10, 10, 5], [10, 10, 10]]
    assert [int(run["state_dict"]["ema.count"]) for run in runs] == [0, 0, 0, 0, 5, 10]
    assert [v for _, v in curve(RUNS / "a", "phase")] == [0, 0, 1, 1, 2, 2]
    trained = {name: [step for step, _ in curve(RUNS / "a", f"grad_norm/{name}")] for name in names}
    assert trained == {"world_model": [4, 9], "value": [14, 19], "diffusion": [24, 29]}
    assert [step for step, _ in curve(RUNS / "a", "eval/return")] == [24, 29], "no rollouts before there is a planner"


def test_the_world_model_that_guides_is_the_best_one_seen(done: Path) -> None:
    content = checkpoint(done)["state_dict"]
    elite = content["world_model.elite"]
    assert len(elite.unique()) == 2
    errors = content["world_model.best_transition.error"]
    assert set(elite.tolist()) == set(errors.argsort()[:2].tolist())
    assert float(content["likelihood_floor"]) != 0


# ---------------------------------------------------------------- evaluating a checkpoint


def test_validate_repeats_the_logged_score(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged = [dict(curve(done, f"eval/{k}")) for k in ("score", "return")]
    assert len({*logged[0].values()}) > 1, "each epoch another score, or the test says nothing"
    for name, step in (("last", 24), ("best", max(logged[1], key=logged[1].__getitem__))):
        capsys.readouterr()
        assert main(["validate", "--ckpt_path", name]) == 0
        out = capsys.readouterr().out
        assert shown(out, "eval/score") == pytest.approx(logged[0][step], rel=1e-6)
        assert shown(out, "eval/return") == pytest.approx(logged[1][step], rel=1e-6)
    # Whatever the number of environments side by side; rounding depends on it, the episodes do not.
    assert main(["validate", "--ckpt_path", "last", "--rollout.num_envs", "1"]) == 0
    assert shown(capsys.readouterr().out, "eval/return") == pytest.approx(logged[1][24], rel=1e-3)


def newest_result(run: Path, checkpoint: str) -> dict[str, Any]:
    """What the latest test of a checkpoint wrote; earlier ones stay beside it."""
    files = (run / "results").glob(f"{checkpoint}-test*.json")
    result: dict[str, Any] = json.loads(max(files, key=lambda p: p.stat().st_mtime_ns).read_text())
    return result


def test_test_on_the_seeds_of_fit_repeats_the_score_and_writes_every_episode(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ("--rollout.test_seed", "1000", "--rollout.test_episodes", "2", "--rollout.seed", "5")
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["test", "--ckpt_path", "last", *same]) == 0
    assert not [str(w.message) for w in caught if "callbacks used to create the checkpoint" in str(w.message)]
    printed = shown(capsys.readouterr().out, "eval/score")
    result = newest_result(done, "last")
    assert printed == pytest.approx(curve(done, "eval/score")[-1][1], rel=1e-6)
    assert result["summary"]["score"]["mean"] == pytest.approx(printed, rel=1e-6)
    assert [e["seed"] for e in result["episodes"]] == [1000, 1001]
    assert all(e["length"] == 20 and e["return"] > 0 for e in result["episodes"])

    assert main(["test", "--ckpt_path", "best"]) == 0
    unseen = newest_result(done, "best")
    assert [e["seed"] for e in unseen["episodes"]] == [10_000, 10_001, 10_002]
    assert unseen["checkpoint"] == str(done / "checkpoints/best.ckpt") and unseen["method"] == "DMEMM"


def test_the_command_line_decides_how_a_checkpoint_is_sampled(done: Path) -> None:
    last = str(done / "checkpoints/last.ckpt")
    seen = {}
    for steps in (1, 2, 8):
        assert main(["test", "--ckpt_path", last, "--model.sampler.steps", str(steps)]) == 0
        result = newest_result(done, "last")
        assert result["options"]["sampler"]["steps"] == steps
        seen[steps] = [e["return"] for e in result["episodes"]]
    assert main(["test", "--ckpt_path", last]) == 0
    result = newest_result(done, "last")
    assert result["options"]["sampler"]["steps"] is None, "the run's own"
    assert [e["return"] for e in result["episodes"]] == seen[8] and len({tuple(r) for r in seen.values()}) == 3
    assert len(list((done / "results").glob("last-test*.json"))) >= 4, "no test overwrites another"


def test_a_planner_loads_from_the_file_alone(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", "nowhere")
    agent = lit_diffrl.load(done / "checkpoints/last.ckpt")
    plan = agent.plan(np.zeros(4, dtype=np.float32))  # type: ignore[operator]
    assert plan.obs.shape in ((8, 4), (12, 4)) and plan.action.shape[1] == 2
    assert agent.spec is not None and agent.spec.goal is not None
    np.testing.assert_allclose(plan.obs[-1, :2], agent.spec.goal, atol=1e-5)


# ---------------------------------------------------------------- what does not belong together


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--data.dataset lit_diffrl/pointmaze/umaze-v0", ["dataset_ids", "umaze-dense-v0", "umaze-v0"]),
        ("--data.stride 1", ["stride: checkpoint 2, now 1"]),
        ("--data.obs_keys [observation,achieved_goal] --model.plan.mode receding", ["obs_dim: checkpoint 4, now 6"]),
        ("--data.normalizer gaussian", ["obs_normalizer", "limits", "gaussian"]),
        ("--model.dim 16", ["net.", "(8,", "(16,"]),
        ("--model.world_model.hidden 8", ["world_model.", "16", "8"]),
        ("--model.lambda_tr 0 --model.lambda_rd 0 --model.guide.kind none --model.plan.rank_by none "
         "--model.plan.horizons [8] --model.world_model_epochs 0", ["only on one side", "world_model."]),
        ("--model.n_diffusion_steps 16", ["n_diffusion_steps", "8", "16"]),
        ("--model.predict eps", ["predict", "x0", "eps"]),
        ("--model Diffuser", ["methods.dmemm.DMEMM", "methods.diffuser.Diffuser"]),
    ],
)  # fmt: skip
def test_a_checkpoint_of_something_else_is_refused(
    begun: Path, more: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    last = begun / "checkpoints/last.ckpt"
    before = last.read_bytes()
    for command in ("fit", "validate"):
        line = error(capsys, command, "--config", "two.yaml", "--ckpt_path", str(last), *more.split())
        assert all(word in line for word in words), line
    assert last.read_bytes() == before and [p.name for p in RUNS.iterdir()] == ["a"]


def test_phases_that_have_ended_stay_as_long_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    run = fit("a", "--trainer.max_epochs", "3")
    for epochs in ("1", "3"):
        again = ("--config", "two.yaml", "--run", "a", "--ckpt_path", "last", "--model.world_model_epochs", epochs)
        line = error(capsys, "fit", *again)
        assert "has 3 epochs" in line and f"world_model ended after 2, now it would after {epochs}" in line
        assert main(["validate", *again]) == 0
    fit("a", "--ckpt_path", "last", "--model.diffusion_epochs", "2")
    assert checkpoint(run)["epoch"] == 3
    # A phase that is under way may end earlier, or later.
    fit("b", "--trainer.max_epochs", "1")
    fit("b", "--ckpt_path", "last", "--model.world_model_epochs", "1")
    assert checkpoint(RUNS / "b")["epoch"] == 3


def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    line = error(capsys, "fit", "--config", "two.yaml", "--run", "a", "--model.lr", "1e30")
    assert "phase diffusion" in line and "is not finite" in line and "--model.lr" in line
    content = checkpoint(RUNS / "a")
    assert content["epoch"] == 1 and all(bool(v.isfinite().all()) for v in content["state_dict"].values())


def test_before_its_last_phase_a_checkpoint_is_not_evaluated(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("validate", "test"):
        assert "DMEMM cannot act yet" in error(capsys, command, "--ckpt_path", "last")


@pytest.mark.parametrize("more", ["--trainer.limit_val_batches 0", "--trainer.check_val_every_n_epoch 3"])
def test_a_world_model_that_would_never_be_validated_is_refused_at_once(
    more: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error(capsys, "fit", "--config", "two.yaml", *more.split())
    assert "world model" in line and "limit_val_batches" in line and "check_val_every_n_epoch" in line
    assert not list(Path().glob("**/*.ckpt"))


# ---------------------------------------------------------------- what is logged


def test_curves_and_pictures_are_those_documented() -> None:
    more = ("--data.updates_per_epoch", "25", "--rollout.every_n_epochs", "2", "--trainer.log_every_n_steps", "20")
    run = fit("a", *more, three=True)
    tags = curves(run).Tags()
    losses = {f"loss/{name}" for name in ("dynamics", "reward", "value", "wdiff", "tr", "rd")}
    norms = {f"grad_norm/{name}" for name in ("world_model", "value", "diffusion")}
    evals = {f"eval/{name}" for name in ("return", "score", "length", "action_ms", "score_rat", "score_oms")}
    assert set(tags["scalars"]) >= losses | norms | evals | {"val/dynamics_mse", "weight", "reward_gap", "phase"}
    assert tags["images"] == ["eval/plans"]
    # After the first epoch that can act, then every second, and the last: epochs 4, 5 and 6 of 0 to 6.
    assert [step for step, _ in curve(run, "eval/score")] == [124, 149, 174]
    assert sorted(p.name for p in (run / "pictures").iterdir()) == [f"epoch={i}.png" for i in (4, 5, 6)]
    assert all((run / "pictures" / f"epoch={i}.png").read_bytes()[:4] == b"\x89PNG" for i in (4, 5, 6))
    assert all(np.isfinite(v) for tag in tags["scalars"] for _, v in curve(run, tag))
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
