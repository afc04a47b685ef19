"""Every config trains, acts and resumes in every precision that is accepted; what needs 32 bits has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from short_runs import CONFIGS, ROOT, Config, curves, floats, in_precision
from torch import Tensor
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

import lit_diffrl
from lit_diffrl.__main__ import main
from lit_diffrl.data import WindowData
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import Diffuser, Method
from lit_diffrl.methods.posterior import PosteriorTable
from lit_diffrl.methods.world_model import WorldModel
from lit_diffrl.nets.ensemble import EnsembleMLP
from lit_diffrl.nets.linear import Linear
from lit_diffrl.nets.noise_net import NoiseNet
from lit_diffrl.nets.prepared import in_long_region
from lit_diffrl.precision import constant_weights
from lit_diffrl.typos import parameters

HALF = (torch.bfloat16, torch.float16)
PRECISIONS = ["bf16-mixed", "16-mixed", "64-true"]


@pytest.fixture(autouse=True)
def folder(mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dmemm() -> Config:
    return Config(ROOT / "conf/dmemm.yaml", epochs=1)


def losses(run: str) -> dict[str, list[float]]:
    """Losses and norms of gradients, update by update."""
    return {tag: [value for _, value in points] for tag, points in curves(run, ("loss/", "grad_norm/")).items()}


# ---------------------------------------------------------------- who computes in what


class Watch(TorchFunctionMode):
    """Notes the types of what networks give out in training, and which operations outside of them give 16 bits."""

    shapes = (
        "squeeze",
        "unsqueeze",
        "transpose",
        "reshape",
        "view",
        "flatten",
        "split",
        "chunk",
        "__getitem__",
        "expand",
    )

    def __init__(self, method: type[Method], patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.depth = 0
        self.networks: set[torch.dtype] = set()
        self.losses: set[torch.dtype] = set()
        self.rounded: set[str] = set()
        guard = Method.guard

        def guarded(method: Method, losses: Any, norms: Any, batch: Any) -> None:
            self.losses |= {x.dtype for x in (*losses.values(), *norms.values())}
            guard(method, losses, norms, batch)

        patch.setattr(Method, "guard", guarded)
        patch.setattr(method, "training_step", self._watched(method.training_step))
        for name in ("_part", "_time_part", "_joined"):  # a network's own work, outside of its forward
            patch.setattr(NoiseNet, name, self._inside(getattr(NoiseNet, name)))

    def _inside(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inside(*args: Any, **kwargs: Any) -> Tensor:
            self.depth += 1
            out = function(*args, **kwargs)
            self.depth -= 1
            self.networks.add(out.dtype)
            return out

        return inside

    def _watched(self, step: Callable[..., None]) -> Callable[..., None]:
        def watched(*args: Any) -> None:
            enter = hooks.register_module_forward_pre_hook(self._enter)
            leave = hooks.register_module_forward_hook(self._leave, always_call=True)
            with self, enter, leave:
                step(*args)

        return watched

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        self.depth += 1

    def _leave(self, module: torch.nn.Module, args: Any, out: Any) -> None:
        self.depth -= 1
        if isinstance(out, Tensor):
            self.networks.add(out.dtype)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if self.depth == 0 and isinstance(out, Tensor) and out.dtype in HALF and name not in self.shapes:
            self.rounded.add(name)
        return out


class Runs:
    """Short runs of a config, one in each precision, in a folder of their own."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.watches: dict[str, Watch] = {}
        self.checkpoints: dict[str, dict[str, Any]] = {}
        options = [*config.batches_of(8), "--data.updates_per_epoch=5"]
        options += ["--model.dim=16"] if "dim" in parameters(config.method) else []
        for precision in ("32-true", *PRECISIONS):
            with pytest.MonkeyPatch.context() as patch:
                self.watches[precision] = Watch(config.method, patch)
                self.checkpoints[precision] = config.fit(precision, *options, *in_precision(precision))


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda path: path.stem)
def runs(request: pytest.FixtureRequest, mazes: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(mazes))
        patch.chdir(folder)
        return Runs(Config(request.param, epochs=1), folder)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_networks_alone_compute_in_16_bits_and_nothing_rounds_to_32_in_64(runs: Runs, precision: str) -> None:
    watch, content = runs.watches[precision], runs.checkpoints[precision]
    exact = torch.float64 if precision == "64-true" else torch.float32
    low = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "64-true": torch.float64}[precision]
    assert low in watch.networks, "or the run was in another precision"
    assert watch.losses == {exact} and not watch.rounded
    state = dict(floats([content["state_dict"], content["optimizer_states"]]))
    assert len(state) > 20
    assert {x.dtype for name, x in state.items() if not name.endswith("/step")} == {exact}
    assert all(bool(x.isfinite().all()) for name, x in state.items() if "best" not in name)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_was_trained_in_a_precision_is_evaluated_in_it_and_acts(
    runs: Runs, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs.folder)
    (last,) = Path("tb_logs").glob(f"*/*/{precision}/checkpoints/last.ckpt")
    assert main(["validate", "--ckpt_path", str(last)]) == 0
    agent = lit_diffrl.load(last)
    assert {p.dtype for p in agent.parameters()} == {torch.float32}
    assert agent.spec is not None
    action = agent.act(np.zeros(agent.spec.obs_dim, dtype=np.float32))
    assert action.dtype == np.float32 and np.isfinite(action).all()


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-5), ("bf16-mixed", 6e-3), ("16-mixed", 3e-3)])
def test_first_losses_are_those_of_float32(
    runs: Runs, precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise and batches are the same. Measured: 6e-7, 3e-3 and 1e-3 of a curve's largest value."""
    monkeypatch.chdir(runs.folder)
    exact, other = losses("32-true"), losses(precision)
    if "real_ratio" in parameters(runs.config.method):
        tolerance *= 5  # a half of each batch is made by models that were trained in that precision
    # A delayed policy (TD3+BC) has two points of five, what learns in two phases (QGPO's energy) ten.
    assert exact.keys() == other.keys() and all(2 <= len(curve) <= 10 for curve in exact.values())
    for tag, curve in exact.items():
        allowed = tolerance * (5 if tag.startswith("grad_norm/") else 1) * max(abs(value) for value in curve)
        # Of a later phase too. AEPO's energy learns in units of a deviation: that of a target which nearly constant
        # critics, trained in that precision, have given.
        units = 3 if tag == "loss/energy" and "target" in parameters(runs.config.method) else 1
        assert other[tag][0] == pytest.approx(curve[0], rel=0, abs=units * allowed), tag
        # Of other weights: Adam's first steps are as long for a rounded gradient of zero as for any other.
        assert other[tag] == pytest.approx(curve, rel=0, abs=5 * allowed), tag
    # A curve is kept in float32, so one or the other may come out the same.
    assert sum(other[tag] != curve for tag, curve in exact.items()) > len(exact) / 2


def test_the_return_regressor_learns_the_same_in_bfloat16() -> None:
    """Its last layers see a single row; its targets are raw returns."""
    Path("value.yaml").write_text("""
model:
  init_args: {world_model_epochs: 0, value_epochs: 1, dim: 32, guide: {kind: value},
              plan: {rank_by: value, rank_quantile: null, replan_every: null}}
data: {init_args: {horizon: 8}}
""")
    config = Config(ROOT / "conf/diffuser.yaml", epochs=1)
    for precision in ("32-true", "bf16-mixed"):
        config.fit(precision, *config.batches_of(8), "--config", "value.yaml", *in_precision(precision))
    exact, other = losses("32-true"), losses("bf16-mixed")
    assert exact["loss/value"] != other["loss/value"] == pytest.approx(exact["loss/value"], rel=6e-3)
    # Of the same weights: later on, errors of opposite signs nearly cancel in some updates.
    assert other["grad_norm/value"][0] == pytest.approx(exact["grad_norm/value"][0], rel=0.1)


@pytest.mark.parametrize("low", HALF)
def test_densities_losses_and_rewards_are_those_of_32_bits_whatever_the_networks_give(
    low: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The networks' outputs are fixed numbers that 16 bits can hold: all the rest must then be the same to the bit."""
    torch.manual_seed(0)
    model = WorldModel(4, 2, members=3, elites=2, hidden=8, layers=1, reward_low=-3.0, reward_high=7.0)
    outputs = {
        id(model.transition.net): torch.randn(3, 16, 8).to(low),
        id(model.reward_net): torch.randn(1, 16, 1).to(low),
    }
    delta = 0.01 * torch.randn(2, 16, 4)
    obs, action = torch.randn(16, 4), torch.randn(16, 2)
    batch = (obs.expand(3, -1, -1), action.expand(3, -1, -1), (obs + delta[0]).expand(3, -1, -1))
    model.fit_scales(delta[1])

    def computed(dtype: torch.dtype) -> dict[str, Tensor]:
        def forward(net: EnsembleMLP, x: Tensor, members: Any = slice(None)) -> Tensor:
            return outputs[id(net)][slice(None) if members is None else members].to(dtype)

        monkeypatch.setattr(EnsembleMLP, "forward", forward)
        with torch.autocast("cpu", low, enabled=dtype == low):
            mean, var = model.mean_var(obs, action)
            return {
                "mean": mean,
                "var": var,
                "log_prob": model.log_prob(obs, action, obs + delta[0]),
                "mixture": model.log_prob(obs, action, obs + delta[0], mixture=True),
                "reward": model.reward(obs, action),
                "disagreement": model.disagreement(obs, action),
                "transition_loss": model.transition_loss(*batch),
                "reward_loss": model.reward_loss(obs, action, torch.zeros(16)),
            }

    exact, mixed = computed(torch.float32), computed(low)
    for name, values in exact.items():
        assert mixed[name].dtype == torch.float32 and torch.equal(mixed[name], values), name


# ---------------------------------------------------------------- what is not accepted


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "transformer-engine", "bf16-tru"])
def test_other_precisions_are_refused_before_anything_is_read(
    precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", "nowhere")
    assert main(["fit", *dmemm().options, "--trainer.precision", precision]) == 2
    line = capsys.readouterr().err
    assert "precision" in line and precision in line and "bf16-mixed" in line and "64-true" in line
    assert not Path("tb_logs").exists() and not Path("nowhere").exists()


def test_other_precisions_are_refused_without_the_command_line_too() -> None:
    data = WindowData("lit_diffrl/pointmaze/umaze-v0", horizon=8)
    trainer = Trainer(precision="bf16-true", accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match=r"precision bf16-true does not train.*Accepted: 32-true"):
        trainer.fit(Diffuser(horizon=8, diffusion_epochs=1), datamodule=data)


# ---------------------------------------------------------------- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["32-true", *PRECISIONS])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_gpu_trains_in_every_precision(path: Path, precision: str) -> None:
    config = Config(path, epochs=1)
    content = config.fit("a", "--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.precision", precision)
    assert ("MixedPrecision" in content) == (precision == "16-mixed")
    (last,) = Path("tb_logs").glob("*/*/a/checkpoints/last.ckpt")
    agent = lit_diffrl.load(last)
    assert agent.spec is not None
    assert np.isfinite(agent.act(np.zeros(agent.spec.obs_dim, dtype=np.float32))).all()


@pytest.mark.parametrize(("precision", "rounds"), [("bf16-mixed", True), ("32-true", False)])
def test_aepo_tabulates_the_network_that_it_uses(precision: str, rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    columns = PosteriorTable._columns_at

    def watched(self: PosteriorTable, *args: Any) -> Tensor:
        seen.add(torch.is_autocast_enabled("cpu"))
        return columns(self, *args)

    monkeypatch.setattr(PosteriorTable, "_columns_at", watched)
    Config(ROOT / "conf/aepo.yaml", epochs=1).fit("a", "--trainer.precision", precision)
    assert seen == {rounds}


@pytest.mark.parametrize(("precision", "roundings"), [("bf16-mixed", 1), ("32-true", 0)])
@pytest.mark.parametrize("kind", ["convolution", "average that acts"])
def test_weights_that_stay_as_they_are_are_rounded_once_and_anew_the_next_time(
    precision: Any, roundings: int, kind: str
) -> None:
    trainer = Trainer(precision=precision, accelerator="cpu", logger=False, enable_checkpointing=False)
    averaged = kind != "convolution"
    layer = Linear(4, 4).requires_grad_(False) if averaged else torch.nn.Conv1d(4, 4, 1)
    x = torch.randn(2, 4) if averaged else torch.randn(2, 4, 4)
    mode = torch.inference_mode if averaged else torch.no_grad

    def calls() -> tuple[Tensor, int]:
        with mode(), constant_weights(trainer), torch.profiler.profile() as profile:
            assert in_long_region()
            out = [layer(x) for _ in range(3)][-1]
        copies = next((e.count for e in profile.key_averages() if e.key == "aten::_to_copy"), 0)
        return out, copies

    before, copies = calls()
    assert copies == roundings * (2 + 3), "weight and bias once, the input at each call"
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
    after, _ = calls()
    assert bool(before.any()) and not after.any(), "or the rounded weights outlived their context"
    assert not torch.is_autocast_enabled("cpu")
