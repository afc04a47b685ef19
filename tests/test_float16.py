"""float16: losses are multiplied by a scale before their backward pass, which nothing but the optimizer may notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import ROOT, UPDATES, Config, curves, floats, in_precision
from torch import Tensor

from lit_diffrl.__main__ import main
from lit_diffrl.data import WindowData
from lit_diffrl.diffusion.estimators import backward_two_pass
from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.methods import Diffuser, Method


@pytest.fixture(autouse=True)
def folder(mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dmemm() -> Config:
    return Config(ROOT / "conf/dmemm.yaml", epochs=1)


def values(run: str, tag: str) -> list[float]:
    return [value for _, value in curves(run)[tag]]


def descend(patch: pytest.MonkeyPatch, fused: bool) -> None:
    """Train by plain gradient descent, whose updates have the length of the gradients."""

    def configure(method: Diffuser) -> list[torch.optim.Optimizer]:
        networks = (method.world_model, method.net)
        return [torch.optim.SGD(network.parameters(), lr=1.0, fused=fused) for network in networks]

    patch.setattr(Diffuser, "configure_optimizers", configure)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_gradients_are_clipped_without_the_scale(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 3 updates of a phase has length 0.01 at most: a scale left in, or taken out twice, would show.

    Half precision's rounding alone makes a difference of up to 0.00102, by the processor.
    """
    descend(monkeypatch, fused)
    options = [*dmemm().batches_of(8), "--model.grad_clip=0.01", "--model.lr_decay=none"]
    exact, other = (dmemm().fit(name, *options, *in_precision(name)) for name in ("32-true", "16-mixed"))
    for network in ("world_model.transition", "net"):
        a, b = (
            torch.cat([x.flatten() for name, x in run["state_dict"].items() if name.startswith(f"{network}.")])
            for run in (exact, other)
        )
        assert 0 < (a - b).norm() < 0.12 * 0.01
    for tag in ("grad_norm/world_model", "grad_norm/diffusion"):
        assert min(values("32-true", tag)) > 0.02
        assert values("16-mixed", tag)[0] == pytest.approx(values("32-true", tag)[0], rel=0.02)  # of the same weights


def steps(content: dict[str, Any]) -> list[int]:
    """Steps that each optimizer has taken."""
    return [int(next(iter(o["state"].values()))["step"]) for o in content["optimizer_states"]]


def test_a_scale_that_is_too_large_costs_updates_but_not_the_run() -> None:
    options = [*dmemm().batches_of(8), "--data.updates_per_epoch=30"]
    content = dmemm().fit("a", *options, *in_precision("16-mixed", "device: cpu, init_scale: 1.0e+12"))
    taken = steps(content)
    assert 1 < taken[0] < 30 and 1 < taken[1] <= 30, "infinite gradients are skipped, finite ones are not"
    assert content["MixedPrecision"]["scale"] == pytest.approx(1e12 / 2 ** (60 - sum(taken)))
    assert all(bool(x.isfinite().all()) for _, x in floats(content["optimizer_states"]))
    curve = values("a", "loss/dynamics")
    assert len(set(curve[: 30 - taken[0]])) > 1 and curve[-1] < curve[0]


def test_a_loss_that_is_not_a_number_ends_the_run_in_float16_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = WindowData.draw

    def spoiled(data: WindowData, phase: Any, place: Any) -> Any:
        batch = draw(data, phase, place)
        return batch if place.epoch == 0 else batch._replace(trajectory=batch.trajectory * float("nan"))

    monkeypatch.setattr(WindowData, "draw", spoiled)
    assert main(["fit", *dmemm().options, "--run", "a", *in_precision("16-mixed")]) == 2
    assert "phase diffusion, epoch 1, update 0" in capsys.readouterr().err


def test_gradients_that_are_infinite_at_any_scale_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backward = Method.manual_backward

    def spoiled(method: Method, loss: Tensor) -> None:
        backward(method, loss)
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(float("inf"))

    monkeypatch.setattr(Method, "manual_backward", spoiled)
    options = [*dmemm().options, "--data.updates_per_epoch=250", "--trainer.log_every_n_steps=250"]
    assert main(["fit", *options, "--run", "a", *in_precision("16-mixed")]) == 2
    assert "loss scale is not finite" in capsys.readouterr().err


def test_a_resumed_run_goes_on_with_its_scale() -> None:
    """Which doubles at every third update that is finite: in a run that began anew it would be another."""
    precision = in_precision("16-mixed", "device: cpu, growth_interval: 3, init_scale: 64.0")
    options = ["--data.updates_per_epoch=4", *precision]
    whole = dmemm().fit("whole", *options)
    dmemm().fit("parts", *options, "--trainer.max_epochs=1")
    parts = dmemm().fit("parts", *options, "--ckpt_path", "last")
    assert whole["MixedPrecision"] == parts["MixedPrecision"] and whole["MixedPrecision"]["scale"] == 64.0 * 4
    for a, b in zip(floats(whole["state_dict"]), floats(parts["state_dict"]), strict=True):
        assert torch.equal(a[1], b[1]), a[0]


def test_small_gradients_survive_the_two_passes_of_a_chain() -> None:
    """The first pass ends at the denoised plan: its backward pass through a frozen network needs the scale, too."""
    schedule, x0 = Schedule("cosine", 4), torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    k, eps = torch.tensor([1, 2, 3, 4] * 2), torch.ones_like(x0)

    def gradient(scale: float | None) -> Tensor:
        parameter = torch.ones((), requires_grad=True)

        def loss(plan: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.float16, enabled=scale is not None):
                return 1e-7 * torch.nn.functional.linear(plan, torch.eye(3)).float().mean()

        factor = None if scale is None else torch.tensor(scale)
        arguments = ("chain_ddim", lambda x, _: parameter * x, schedule, x0, k, eps, loss)
        backward_two_pass(*arguments, backward=Tensor.backward, scale=factor)
        assert parameter.grad is not None
        return parameter.grad

    assert gradient(1.0) == 0 != gradient(None)
    torch.testing.assert_close(gradient(2.0**16), gradient(None), rtol=1e-2, atol=0)


def test_the_two_passes_know_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    scales = []

    def noted(*args: Any, scale: Tensor, **kwargs: Any) -> Tensor:
        scales.append(float(scale))
        return backward_two_pass(*args, scale=scale, **kwargs)

    monkeypatch.setattr("lit_diffrl.methods.dmemm.backward_two_pass", noted)
    options = ["--model.x0_estimate=chain_ddim", "--model.chain.compute=exact_two_pass", "--model.n_diffusion_steps=4"]
    dmemm().fit("a", *options, *in_precision("16-mixed"))
    assert scales == [1024.0] * UPDATES
