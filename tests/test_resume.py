"""A run that is killed, stopped or out of disk at any moment ends, once continued, like one left alone: bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from same_runs import assert_same_runs
from short_runs import CONFIGS, ROOT, VARIANTS, Config

from lit_diffrl.__main__ import main
from lit_diffrl.methods import DMEMM, Method
from lit_diffrl.methods.synthetic_learner import Synthesis
from lit_diffrl.rollout.callback import RolloutEvaluation

Launch = Callable[..., Any]
RUN = Path("tb_logs/dmemm/pointmaze-umaze-dense-v0/a")
LAST = RUN / "checkpoints/last.ckpt"

# A world model, then a diffusion model; evaluations and pictures of its plans; small, and short to the utmost.
CONFIG = """
seed_everything: 1
run: a
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
    diffusion_epochs: 4
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
    updates_per_epoch: 12
rollout: {episodes: 1, num_envs: 1, max_steps: 10}
trainer: {accelerator: cpu, enable_model_summary: false, log_every_n_steps: 3}
"""
FIT = ("fit", "--config", "config.yaml")


def folder_of_a_run(root: Path, name: str) -> Path:
    """An empty folder with the config file."""
    folder = root / name
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def whole(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nothing happened to."""
    folder = folder_of_a_run(tmp_path_factory.mktemp("whole"), "whole")
    process = launch(*FIT, folder=folder)
    assert process.wait() == 0, process.out
    return folder


def begin(launch: Launch, folder: Path) -> Any:
    """Start the run, or continue it, and wait for the end of its start-up: it has an event file, and loads its data."""

    def events() -> int:
        return len(list((folder / RUN).glob("events.out.tfevents.*")))

    before = events()
    process = launch(*resume_or_begin(folder), folder=folder)
    process.until(lambda: events() > before)
    return process


def resume_or_begin(folder: Path) -> tuple[str, ...]:
    return ("fit", "--ckpt_path", "last") if (folder / LAST).exists() else FIT


# ---------------------------------------------------------------- killed


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)], ids=lambda n: f"{n} times")
def test_a_run_killed_at_random_moments_ends_like_one_left_alone(
    launch: Launch, whole: Path, tmp_path: Path, kills: int
) -> None:
    """From the end of the start-up on: in updates, evaluations, at changes of phase."""
    draw, left, runs = random.Random(kills), kills, 0
    while left or not runs:
        runs += 1
        folder = folder_of_a_run(tmp_path, f"{runs}")
        code: int | None = None
        while code != 0:
            process = begin(launch, folder)
            if left:
                time.sleep(draw.uniform(0, 0.6))
                process.send(signal.SIGKILL)
            code = process.wait()
            assert code in (0, -signal.SIGKILL), process.out
            left -= code != 0
        assert_same_runs(folder, whole)


@pytest.mark.parametrize(
    "moments", [(1, 3, 12), pytest.param(range(1, 21), marks=pytest.mark.slow)], ids=lambda m: f"{len(m)} times"
)
def test_a_run_killed_while_it_saves_ends_like_one_left_alone(
    launch: Launch, whole: Path, tmp_path: Path, moments: Iterable[int]
) -> None:
    """Before anything is saved; with the first checkpoint written, not renamed; with the best saved, not the last."""
    folder = folder_of_a_run(tmp_path, "a")
    for moment in moments:
        process = launch(*resume_or_begin(folder), folder=folder, dies=moment)
        if process.wait() == 0:  # it had less left to save
            break
        assert process.code == -signal.SIGKILL, process.out
    process = launch(*resume_or_begin(folder), folder=folder)
    assert process.wait() == 0, process.out
    assert_same_runs(folder, whole)


# ---------------------------------------------------------------- stopped

STOPS = [
    (signal.SIGTERM, 0, 0),
    (signal.SIGINT, 1, 5),
    (signal.SIGUSR1, 1, 11),
    (signal.SIGTERM, 2, "evaluation"),
    (signal.SIGINT, 3, 10),
    (signal.SIGTERM, 5, 5),
]


def test_a_run_stopped_again_and_again_ends_like_one_left_alone(
    whole: Path, mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the first update, one that is logged, the last of an epoch and a phase, an evaluation, and a last but one."""
    folder = folder_of_a_run(tmp_path, "a")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    train, evaluate = DMEMM.training_step, RolloutEvaluation._evaluate
    stops: dict[tuple[int, Any], int] = {}

    def training_step(self: DMEMM, batch: Any, batch_idx: int) -> None:
        send(stops.pop((self.current_epoch, batch_idx), 0))
        train(self, batch, batch_idx)

    def evaluation(self: RolloutEvaluation, trainer: Any, *args: Any) -> Any:
        send(stops.pop((trainer.current_epoch, "evaluation"), 0))
        return evaluate(self, trainer, *args)

    monkeypatch.setattr(DMEMM, "training_step", training_step)
    monkeypatch.setattr(RolloutEvaluation, "_evaluate", evaluation)
    for number, epoch, place in STOPS:
        stops[epoch, place] = number
        assert main(list(resume_or_begin(folder))) == 128 + number
        assert not stops
        progress = torch.load(LAST, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        updates = 12 if place == "evaluation" else place + 1
        assert progress["total"]["completed"] == 12 * epoch + updates
    assert main(["fit", "--ckpt_path", "last"]) == 0
    assert "warning" not in capsys.readouterr().err.lower()
    assert_same_runs(folder, whole)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *(pytest.param(path.stem, "", id=path.stem) for path in CONFIGS),
        *(pytest.param(*variant, id=label) for label, variant in VARIANTS.items()),
    ],
)
def test_every_config_stopped_in_each_phase_ends_like_one_left_alone(
    mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, more: str
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    config = Config(ROOT / f"conf/{name}.yaml")
    config.options += more.split()
    train = config.method.training_step
    places: set[tuple[int, int]] = set()

    def training_step(self: Method, batch: Any, batch_idx: int) -> Any:
        if (self.current_epoch, batch_idx) in places:
            places.remove((self.current_epoch, batch_idx))
            send(signal.SIGTERM)
        return train(self, batch, batch_idx)

    monkeypatch.setattr(config.method, "training_step", training_step)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    monkeypatch.chdir(whole)
    assert main(["fit", *config.options, "--run", "a"]) == 0
    stopped.mkdir()
    monkeypatch.chdir(stopped)
    places |= {(epoch, 1) for epoch in range(1, 20, 2)}  # the second of the two epochs that each phase has
    if issubclass(config.method, Synthesis):  # and the first, which rollouts or samples precede
        places |= {(epoch, 0) for epoch in range(0, 20, 2)}
    codes = [main(["fit", *config.options, "--run", "a"])]
    while codes[-1] == 128 + signal.SIGTERM:
        codes.append(main(["fit", "--ckpt_path", "last"]))
    assert codes[-1] == 0 and len(codes) > 1
    assert_same_runs(stopped, whole)


def send(number: int) -> None:
    if number:
        os.kill(os.getpid(), number)


DRIVER = """
import subprocess, sys
from lit_diffrl.__main__ import main
begin, begun = subprocess.Popen, []
subprocess.Popen = lambda *a, **k: begun.append(begin(*a, **k)) or begun[-1]
code = main()
others = [process.wait() for process in begun if "driver.py" in str(process.args)]
print("the others ended with", others)
sys.exit(code)
"""


def test_two_processes_stop_together_when_the_first_is_told_to(mazes: Path, tmp_path: Path) -> None:
    folder = folder_of_a_run(tmp_path, "a")
    root = Path(__file__).parents[1]
    (folder / "driver.py").write_text(DRIVER)
    more = ("--data.updates_per_epoch", "10000", "--trainer.accelerator", "cpu")
    command = [sys.executable, "driver.py", *FIT, "--config", str(root / "conf/trainer/ddp.yaml"), *more]
    path = f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MINARI_DATASETS_PATH": str(mazes)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 120
        while not (folder / RUN / "config.yaml").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, out
    assert out.count("SIGTERM: saving and stopping after this update") == 1 and "Traceback" not in out
    assert "the others ended with [0]" in out, "the Trainer kills the first process when another ends with an error"
    progress = torch.load(folder / LAST, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert 0 < progress["total"]["completed"] == progress["total"]["ready"] < 10_000


# ---------------------------------------------------------------- out of disk


def test_a_run_out_of_disk_ends_like_one_left_alone_once_there_is_room(
    launch: Launch, whole: Path, tmp_path: Path
) -> None:
    """With no room for the first checkpoint, then none for those of the second phase, which are larger."""
    folder = folder_of_a_run(tmp_path, "a")
    for size, kept in ((100_000, False), (700_000, True)):
        process = launch(*FIT, folder=folder, file_size=size)
        assert process.wait() == 2
        line = process.out.splitlines()[-1]
        assert line.startswith("error: cannot save ") and "File too large" in line and "Traceback" not in process.out
        assert ("continue with --ckpt_path last" in line) == kept
        assert [p.name for p in (folder / RUN / "checkpoints").iterdir()] == ["last.ckpt"] * kept
    process = launch("fit", "--ckpt_path", "last", folder=folder)
    assert process.wait() == 0, process.out
    assert_same_runs(folder, whole)


# ---------------------------------------------------------------- seeds


def test_a_run_goes_on_with_its_seed_and_a_branch_may_have_another(
    whole: Path, mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole, tmp_path / "a")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    before = LAST.read_bytes()
    assert main(["fit", "--ckpt_path", "last", "--seed_everything", "2"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "continues a run of seed 1, got 2" in line and "--seed_everything 1" in line and "--run NAME" in line
    ends = []
    for name, seed in (("b", 1), ("c", 2)):
        branch = ["--model.diffusion_epochs", "5", "--ckpt_path", str(LAST), "--run", name]
        assert main([*FIT, *branch, "--seed_everything", str(seed)]) == 0
        content = torch.load(RUN.parent / name / "checkpoints/last.ckpt", weights_only=True)
        assert content["epoch"] == 6 and content["lit_diffrl"]["seed"] == seed
        ends.append(torch.cat([x.flatten().double() for x in content["state_dict"].values()]))
    assert not torch.equal(*ends)
    assert LAST.read_bytes() == before
