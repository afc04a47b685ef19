"""Several processes do what one does: the same losses and weights, other rows of the same batches, each thing once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from short_runs import CONFIGS, ROOT, VARIANTS, Config, curves

from lit_diffrl import processes
from lit_diffrl.__main__ import main
from lit_diffrl.checkpoint_io import AtomicCheckpointIO
from lit_diffrl.data import pointmaze
from lit_diffrl.data.stream import BatchStream
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import DMEMM, Method
from lit_diffrl.rollout import callback

# Rounding is far below what Adam makes of it in float64: there, weights tell whether the gradients were the same.
EXACTLY = ["--trainer.precision", "64-true"]
TWO = ["--config", str(ROOT / "conf/trainer/ddp.yaml"), "--trainer.strategy.init_args.start_method", "fork"]
TWO += ["--trainer.strategy.init_args.timeout", "0:02:00"]
EPISODES = 3
CHAINS = "--model.x0_estimate chain_ddim --model.n_diffusion_steps 8 --model.chain.chunk 5 --model.chain.compute"

MEAN_1 = "--model.weighting.unit_mean true --model.weighting.mode minmax"


class Trace(NamedTuple):
    """What a process saw of a run, and what it had in the end."""

    batches: list[tuple[torch.Tensor, ...]]
    episodes: list[int]
    saved: list[str]
    collected: list[str]
    chunks: list[int]
    tensors: dict[str, torch.Tensor]


def watch(patch: pytest.MonkeyPatch, path: str) -> None:
    """Let every process write its trace to ``path`` with its rank in it."""
    seen = Trace([], [], [], [], [], {})

    def wrap(owner: Any, name: str, note: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            note(*args, result=result)
            return result

        patch.setattr(owner, name, call)

    stream = BatchStream.__iter__

    def batches(self: BatchStream) -> Iterator[Any]:
        for batch in stream(self):
            seen.batches.append(tuple(x.clone() for x in batch))
            yield batch

    def close(method: Method, result: None) -> None:
        seen.tensors.update(method.state_dict())
        seen.tensors.update(method.named_buffers())
        for i, optimizer in enumerate(method.trainer.optimizers):
            for j, state in enumerate(optimizer.state.values()):
                seen.tensors.update({f"optimizer {i}/{j}/{k}": torch.as_tensor(v) for k, v in state.items()})
        torch.save(tuple(seen), path.format(method.global_rank))

    patch.setattr(BatchStream, "__iter__", batches)
    wrap(callback, "run_episodes", lambda *_, result: seen.episodes.extend(r.seed for r in result))
    wrap(AtomicCheckpointIO, "save_checkpoint", lambda _, __, p, **___: seen.saved.append(Path(p).name))
    wrap(pointmaze, "collect", lambda name, **_: seen.collected.append(name))
    wrap(DMEMM, "accumulate", lambda *_, result: seen.chunks.append(len(seen.batches)))
    wrap(Method, "on_train_end", close)


def train(config: Config, run: str, *more: str, processes: int = 1) -> list[Trace]:
    """Train in this process, or in several that are forked from it; the trace of each."""
    options = [
        *config.options,
        "--rollout.episodes",
        str(EPISODES),
        "--run",
        run,
        *(TWO if processes > 1 else []),
        *more,
    ]
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, run + "{}.pt")
        try:
            assert main(["fit", *options]) == 0
        finally:
            os.environ.pop("MASTER_PORT", None)  # of the processes that have ended
    return [Trace(*torch.load(f"{run}{rank}.pt", weights_only=True)) for rank in range(processes)]


def furthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest difference between tensors of the same names, and whose it is."""
    assert first.keys() == second.keys() and len(first) > 10
    same = torch.zeros(1, dtype=torch.float64)
    differences = {
        k: torch.where(x == second[k], same, (x.double() - second[k].double()).abs()) for k, x in first.items()
    }
    return max((float(d.max()), k) for k, d in differences.items() if d.numel())


class Pair(NamedTuple):
    one: Trace
    two: list[Trace]
    folder: Path
    config: Config


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def pair(request: pytest.FixtureRequest, mazes: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A config trained by one process, and by two with half the batch each."""
    folder = tmp_path_factory.mktemp("pair")
    config = Config(request.param, epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(mazes))
        patch.chdir(folder)
        (one,) = train(config, "one", *config.batches_of(4), *EXACTLY)
        two = train(config, "two", *EXACTLY, processes=2)
    return Pair(one, two, folder, config)


@pytest.fixture
def folder(mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- every config


def test_two_processes_with_half_the_batch_do_what_one_does_with_the_whole(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pair.folder)
    difference, where = furthest(pair.one.tensors, pair.two[0].tensors)
    assert difference < 1e-9, where
    one, two = curves("one"), curves("two")
    assert one.keys() == two.keys() and any(tag.startswith("loss/") for tag in one)
    for tag, points in one.items():
        assert [step for step, _ in points] == [step for step, _ in two[tag]], tag
        assert [v for _, v in two[tag]] == pytest.approx([v for _, v in points], rel=1e-6, abs=1e-7), tag


def test_processes_stay_in_step_bit_for_bit(pair: Pair) -> None:
    """Averages, best weights and the like are sent by nobody: they must come out alike."""
    first, second = (trace.tensors for trace in pair.two)
    assert first.keys() == second.keys()
    different = [k for k in first if not torch.equal(first[k].nan_to_num(), second[k].nan_to_num())]
    assert not different


def test_each_process_has_its_own_rows_of_the_batch(pair: Pair) -> None:
    for whole, *parts in zip(pair.one.batches, *(trace.batches for trace in pair.two), strict=True):
        assert any(not torch.equal(*own) for own in zip(*parts))
        for x, *own in zip(whole, *parts):
            assert any(torch.equal(torch.cat(own, dim=d), x) for d in range(x.dim()))


def test_episodes_are_shared_and_one_process_writes(pair: Pair) -> None:
    seeds = [trace.episodes for trace in pair.two]
    times = len(pair.one.episodes) // EPISODES  # more than once where the agent can act before its last phase
    assert pair.one.episodes == [1000, 1001, 1002] * times and len(seeds[0]) == 2 * times > 0
    assert sorted(seeds[0] + seeds[1]) == sorted(pair.one.episodes)
    assert {"last.ckpt", "best.ckpt"} <= set(pair.two[0].saved) and not pair.two[1].saved
    (run,) = pair.folder.glob("tb_logs/*/*/two")
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert {p.name for p in run.parent.iterdir()} == {"one", "two"}


def test_a_run_may_go_on_with_another_number_of_processes(
    pair: Pair, mazes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(pair.folder)
    train(pair.config, "mixed", "--trainer.max_epochs", "1", *EXACTLY, processes=2)
    (mixed,) = train(pair.config, "mixed", "--ckpt_path", "last", *pair.config.batches_of(4), *EXACTLY)
    difference, where = furthest(pair.one.tensors, mixed.tensors)
    assert difference < 1e-9, where


# ---------------------------------------------------------------- options that look at more than one row


def short(name: str) -> Config:
    return Config(ROOT / f"conf/{name}.yaml", epochs=1)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        pytest.param("dmemm", f"{MEAN_1} {CHAINS} exact_two_pass", id="mean weight 1, exact_two_pass"),
        pytest.param(
            "diffuser",
            "--data.horizon 8 --model.value_epochs 1 --model.world_model_epochs 0 --model.guide.kind value "
            "--model.plan.rank_by value --model.dim 32 --config once.yaml",
            id="return regressor",
        ),
        *(pytest.param(*variant, id=label) for label, variant in VARIANTS.items()),
        pytest.param("dmemm", MEAN_1, id="mean weight 1", marks=pytest.mark.slow),
        pytest.param("dmemm", f"{CHAINS} checkpointed", id="checkpointed", marks=pytest.mark.slow),
        pytest.param("dmemm", f"{CHAINS} exact_batched", id="exact_batched", marks=pytest.mark.slow),
    ],
)
def test_the_whole_batch_decides(name: str, more: str, folder: Path) -> None:
    Path("once.yaml").write_text("model: {init_args: {plan: {replan_every: null, rank_quantile: null}}}")
    config = short(name)
    (one,) = train(config, "one", *more.split(), *config.batches_of(6), *EXACTLY)
    two = train(config, "two", *more.split(), *config.batches_of(3), *EXACTLY, processes=2)
    difference, where = furthest(one.tensors, two[0].tensors)
    assert difference < 1e-9, where
    if "two_pass" in more:
        counts = [len(trace.chunks) for trace in two]
        assert counts[0] != counts[1], "gradients come in different numbers of chunks, or the test says nothing"


@pytest.mark.parametrize("compute", ["two_pass_mc", pytest.param("monte_carlo", marks=pytest.mark.slow)])
def test_sampled_chains_keep_processes_in_step(compute: str, folder: Path) -> None:
    """Each process draws its own terms, and its own number of them."""
    two = train(short("dmemm"), "two", *CHAINS.split(), compute, *short("dmemm").batches_of(3), processes=2)
    assert furthest(two[0].tensors, two[1].tensors)[0] == 0


# ---------------------------------------------------------------- once, or not at all


@pytest.mark.parametrize(
    ("name", "more", "picture"),
    [("aepo", "--energy_check.states=3", "energy"), ("dydiff_td3bc", "--model_check.starts=3", "models-epoch=*")],
)
def test_what_one_process_measures_does_not_part_it_from_the_others(
    name: str, more: str, picture: str, folder: Path
) -> None:
    """Both reach the end, and the weights are the same."""
    two = train(short(name), "two", more, *short(name).batches_of(3), processes=2)
    assert furthest(two[0].tensors, two[1].tensors)[0] == 0
    assert len(list(folder.glob(f"tb_logs/*/*/two/pictures/{picture}.png"))) == 1


def test_data_is_collected_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(pointmaze, "STEPS", {"umaze": 2_000})
    monkeypatch.setattr(pointmaze, "REFERENCE_EPISODES", 1)
    two = train(short("dmemm"), "two", processes=2)
    assert [trace.collected for trace in two] == [["lit_diffrl/pointmaze/umaze-v0"], []]


def test_a_strategy_that_would_fail_at_the_second_update_is_refused(folder: Path) -> None:
    more = ["--trainer.devices", "2", "--trainer.strategy", "ddp_fork"]
    with pytest.raises(Exception, match=r"find_unused_parameters.*conf/trainer/ddp.yaml"):
        train(short("dmemm"), "two", *more)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_run_with_its_own_words(folder: Path) -> None:
    Path("driver.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from lit_diffrl.__main__ import main
from lit_diffrl.methods import DMEMM
step = DMEMM.training_step
def failing(method, batch, index):
    if (method.global_rank, index) == (1, 1):
        raise OSError("the memory of process 1 is full")
    step(method, batch, index)
DMEMM.training_step = failing
sys.exit(main())
""")
    options = [*short("dmemm").options, "--config", str(ROOT / "conf/trainer/ddp.yaml"), "--run", "two"]
    done = subprocess.run(
        [sys.executable, "driver.py", "fit", *options],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    # The Trainer, too, looks after the processes it has started, and may come first.
    assert done.returncode in (2, -signal.SIGKILL), done.stderr
    assert "the memory of process 1 is full" in done.stderr and "Connection closed by peer" not in done.stderr


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that will not end by itself soon."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def launcher_of(*started: subprocess.Popen[bytes]) -> _SubprocessScriptLauncher:
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), 1 + len(started), 1)
    launcher.procs = list(started)
    return launcher


@pytest.mark.parametrize("error", [ConfigError("this one's"), RuntimeError("a lost connection, or so")])
def test_who_fails_leaves_no_process_behind(
    error: Exception, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.05)
    processes.end_others(launcher_of(sleeper), error)
    assert sleeper.wait(10) == -signal.SIGKILL
    processes.end_others(None, error)


def test_a_lost_connection_to_a_process_that_has_failed_is_told_as_that(sleeper: subprocess.Popen[bytes]) -> None:
    failed = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
    with pytest.raises(ConfigError, match="another process of this run has failed"):
        processes.end_others(launcher_of(failed, sleeper), RuntimeError("Connection closed by peer"))
    assert failed.returncode == 2 and sleeper.wait(10) == -signal.SIGKILL
