"""What synthetic experience costs, in Hopper's sizes: an update of each part, and a refresh of DyDiff's rollouts.

python -m pytest benchmarks/test_synthesis.py
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lit_diffrl.data import TrajectoryData
from lit_diffrl.methods import DyDiffCQL, DyDiffDQL, DyDiffTD3BC, SynthERTD3BC, synthesis
from lit_diffrl.seeding import Place

SMALL = {"dim": 64, "mults": [1, 2, 4]}  # 4.0 M parameters; the paper's 128 x (1, 4, 8) has 58.8 M
MIDDLE = {"solver": "multistep", "steps": 15}
FAST = {"solver": "multistep", "steps": 2}  # of conf/short
PAPER = {"solver": "heun", "steps": 34}  # with churn: 67 calls
STARTS = 256


@pytest.fixture(scope="session")
def hopper(hopper_file: str) -> TrajectoryData:
    data = TrajectoryData(dataset=hopper_file, horizon=100, window_batch_size=64, updates_per_epoch=1)
    data.setup("fit")
    return data


def run(data: TrajectoryData, kind: type[Any], **options: Any) -> None:
    method = kind(policy_epochs=1, **options)
    trainer = Trainer(
        max_epochs=method.total_epochs, accelerator="cpu", logger=False, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(method, datamodule=data)


UPDATES = {
    "DyDiff, world_model": (DyDiffTD3BC, "world_model"),
    "DyDiff, diffusion: 64 windows of 100, 4.0 M": (DyDiffTD3BC, "diffusion"),
    "DyDiff-TD3BC, policy, mixed": (DyDiffTD3BC, "policy"),
    "DyDiff-CQL, policy, mixed": (DyDiffCQL, "policy"),
    "DyDiff-DQL, policy, mixed": (DyDiffDQL, "policy"),
    "SynthER, diffusion: 256 rows, 6.5 M": (SynthERTD3BC, "diffusion"),
}


@pytest.mark.usefixtures("unlogged")
@pytest.mark.parametrize("label", UPDATES)
def test_update(benchmark: Any, hopper: TrajectoryData, label: str) -> None:
    kind, phase = UPDATES[label]
    benchmark.extra_info.update(label=f"{label}: update")

    class Timed(kind):  # type: ignore[valid-type, misc]
        def training_step(self, batch: Any, batch_idx: int) -> None:
            step = partial(super().training_step, batch, batch_idx)
            if self.phase.name == phase:
                benchmark(step)
            else:
                step()

    options: dict[str, Any] = {"diffusion_epochs": 1}
    if kind is not SynthERTD3BC:
        options |= {"world_model_epochs": 1, "denoiser": SMALL, "edm_sampler": {"steps": 2}, "rollouts": {"starts": 8}}
    else:
        options |= {"samples": {"count": 256}, "edm_sampler": {"steps": 2}}
    run(hopper, Timed, **options)


def built(data: TrajectoryData, kind: type[Any], **options: Any) -> Any:
    torch.manual_seed(0)
    method = kind(policy_epochs=1, **options)
    method.build(data.spec)
    if kind is DyDiffTD3BC:
        method.window_low.copy_(data.limits.low)
        method.window_high.copy_(data.limits.high)
    else:
        method.row_std.fill_(1)
    method.draws.begin(Place(0, 0), torch.device("cpu"))
    return method.eval()


REFRESHES = {
    "paper's sampler, 67 calls": (PAPER, {}),
    "multistep, 15 calls": (MIDDLE, {}),
    "multistep, 15 calls, second round warm from level 7": (MIDDLE, {"warm_start": 7}),
    "fast preset, multistep, 2 calls": (FAST, {}),
    "single-step model alone": (FAST, {"corrections": 0}),
}


@pytest.mark.parametrize("label", REFRESHES)
def test_refresh(benchmark: Any, hopper: TrajectoryData, label: str) -> None:
    sampler, rollouts = REFRESHES[label]
    benchmark.extra_info["label"] = f"DyDiff refresh, {STARTS} starts, H 100, M 2, 4.0 M, {label}"
    method = built(hopper, DyDiffTD3BC, denoiser=SMALL, edm_sampler=sampler, rollouts=rollouts)
    start = hopper.transitions(torch.arange(STARTS)).obs
    with torch.no_grad():
        benchmark.pedantic(method.roll_out, (start, 100), rounds=1)


@pytest.mark.parametrize("dim", [64, 128])
def test_denoiser_call(benchmark: Any, hopper: TrajectoryData, dim: int) -> None:
    shape = SMALL if dim == 64 else {"dim": 128, "mults": [1, 4, 8]}
    size, published = ("4.0 M", "") if dim == 64 else ("58.8 M", "1.7 s")
    benchmark.extra_info.update(label=f"DyDiff: one call on 64 windows of 100, {size}", published=published)
    method = built(hopper, DyDiffTD3BC, denoiser=shape)
    x = torch.randn(64, 100, 14)
    with torch.no_grad():
        benchmark.pedantic(method.denoiser_ema.net, (x, torch.zeros(1)), rounds=3, warmup_rounds=1)


def test_filter_and_store(benchmark: Any, hopper: TrajectoryData) -> None:
    benchmark.extra_info["label"] = f"DyDiff refresh, {STARTS} starts, H 100: judge, filter and store"
    method = built(hopper, DyDiffTD3BC, denoiser=SMALL, rollouts={"starts": STARTS})
    states, actions = torch.randn(STARTS, 100, 11), 2 * torch.rand(STARTS, 100, 3) - 1
    draws = synthesis.gumbel_noise(torch.randn(STARTS))

    def judge_filter_and_store() -> None:
        done = method.rule(method.obs_normalizer.unnormalize(states[:, 1:]))
        reward, _ = method._judge(states, actions)
        kept = method.keep(synthesis.trajectory_returns(reward, done), draws)
        method.buffer.insert(*synthesis.cut_transitions(states[kept], actions[kept], reward[kept], done[kept]), epoch=0)

    with torch.no_grad():
        benchmark(judge_filter_and_store)


def test_sample_rows(benchmark: Any, hopper: TrajectoryData) -> None:
    benchmark.extra_info.update(label="SynthER: draw 1,024 transitions, 255 calls, 6.5 M", published="60 s")
    method = built(hopper, SynthERTD3BC)
    with torch.no_grad():
        benchmark.pedantic(method.draw_rows, (1024,), rounds=1)
