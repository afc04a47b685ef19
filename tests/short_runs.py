"""The main configs, each with every phase that it has, cut to a few updates of small networks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lit_diffrl.__main__ import main
from lit_diffrl.methods import Method
from lit_diffrl.typos import find_class, parameters

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "conf").glob("*.yaml"))
UPDATES = 3
SMALL = (
    f"--data.updates_per_epoch={UPDATES} --rollout.every_n_epochs=100 --rollout.episodes=1 --rollout.num_envs=1 "
    "--rollout.max_steps=2 --rollout.pictures=false --model_check.starts=0 --energy_check.states=0 "
    "--trainer.accelerator=cpu --trainer.enable_model_summary=false --trainer.log_every_n_steps=1"
).split()
# Groups of options with such fields become as small as this.
SMALLER = {
    "denoiser": {"dim": 8, "width": 16, "depth": 2},
    "edm_sampler": {"steps": 4},
    "rollouts": {"starts": 4, "chunk": 2, "warmup_epochs": 0},
    "samples": {"count": 64},
}
# Options with state of their own, or that look at more than one row, which conf/ leaves out: (config, options).
VARIANTS = {
    "AEPO, Algorithm 1": (
        "aepo",
        "--model.schedule joint --model.behaviour_epochs 0 --model.critic_epochs 0 --model.target.scale 1",
    ),
    "AEPO by support actions": (
        "aepo",
        "--model.q_training isql --model.target.form support --model.support.actions 2",
    ),
    "CQL with a multiplier": ("cql", "--model.target_gap 0.8 --model.critic.backup_candidates 2"),
    "CQL that clones first": ("cql", "--model.policy_epochs 2 --model.clone_epochs 1"),
    "EDP-CRR, weights of the batch": (
        "edp_crr",
        "--model.weighting softmax --model.normalize_weights true --model.critic.backup_candidates 2",
    ),
}
# On a CPU the Trainer has no float16; torch has, and the same code scales its losses.
FLOAT16 = """
trainer:
  plugins:
    class_path: lightning.pytorch.plugins.MixedPrecision
    init_args: {precision: 16-mixed, device: cpu, scaler: {class_path: torch.amp.GradScaler, init_args: {%s}}}
"""


def in_precision(name: str, scaler: str = "device: cpu, init_scale: 1024.0") -> list[str]:
    """Options for a precision on the CPU; those of 16-mixed stand in a file that this writes."""
    if name != "16-mixed":
        return ["--trainer.precision", name]
    Path("float16.yaml").write_text(FLOAT16 % scaler)
    return ["--config", "float16.yaml"]


def curves(run: str, prefixes: tuple[str, ...] = ("",)) -> dict[str, list[tuple[int, float]]]:
    """What a run has logged, times left out: ``(step, value)`` by name; there must be one event file."""
    (file,) = Path("tb_logs").glob(f"*/*/{run}/events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(prefixes)]
    times = [tag for tag in tags if tag.startswith("time/") or tag.endswith("_ms")]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags if tag not in times}


def floats(content: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """All floating point tensors in nested dicts and lists, by their place."""
    if isinstance(content, Tensor):
        yield from [(place, content)] if content.is_floating_point() else []
    elif isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from floats(value, f"{place}/{key}")


def smaller(method: type) -> list[str]:
    """Options that make a method's groups small."""
    fields = {name: getattr(kind, "__dataclass_fields__", {}) for name, kind in parameters(method).items()}
    return [
        f"--model.{group}.{field}={value}"
        for group, values in SMALLER.items()
        for field, value in values.items()
        if field in fields.get(group, {})
    ]


class Config:
    """A config of conf/, with options that make it small.

    Args:
        path: The file.
        epochs: Length of every phase that it has.
        batch: Rows of a batch, in each process.
    """

    def __init__(self, path: Path, epochs: int = 2, batch: int = 2) -> None:
        content = yaml.safe_load(path.read_text())
        self.path = path
        self.method = find_class("model", content["model"]["class_path"], Method)
        data = find_class("data", content["data"]["class_path"], LightningDataModule)
        given = content["model"]["init_args"]
        self.options = ["--config", str(path), *SMALL]
        for name, value in self._arguments(self.method):
            if name.endswith("_epochs") and given.get(name, value):
                self.options.append(f"--model.{name}={epochs}")
            elif name == "dim":
                self.options.append("--model.dim=8")
            elif name == "sampler":
                self.options.append("--model.sampler.steps=2")
            elif name == "ema":
                self.options += ["--model.ema.every=1", "--model.ema.start=1"]  # or averages would not move
            elif name == "real_ratio":
                self.options.append("--model.real_ratio=0.5")
            elif name == "posterior":
                self.options.append("--model.posterior.samples=64")
        self.options += smaller(self.method)
        self.batch_options = [f"--data.{n}" for n, _ in self._arguments(data) if n.endswith("batch_size")]
        self.options += [f"{name}={batch}" for name in self.batch_options]

    @staticmethod
    def _arguments(cls: type) -> Iterator[tuple[str, Any]]:
        for parent in cls.__mro__:
            init = parent.__dict__.get("__init__")
            if init is not None and parent.__module__.startswith("lit_diffrl."):
                yield from ((n, p.default) for n, p in inspect.signature(init).parameters.items() if n != "self")

    def batches_of(self, size: int) -> list[str]:
        """Options for batches of another size."""
        return [f"{name}={size}" for name in self.batch_options]

    def rates(self, lr: float) -> list[str]:
        """Options that set every learning rate."""
        found = []
        for name, kind in parameters(self.method).items():
            nested = [f"{name}.{field}" for field in getattr(kind, "__dataclass_fields__", {})]
            found += [n for n in (name, *nested) if n.rpartition(".")[2].endswith("lr")]
        return [f"--model.{name}={lr}" for name in found]

    def fit(self, run: str, *more: str) -> dict[str, Any]:
        """Train in the folder one is in; the last checkpoint."""
        assert main(["fit", *self.options, "--run", run, *more]) == 0
        (last,) = Path("tb_logs").glob(f"*/*/{run}/checkpoints/last.ckpt")
        content: dict[str, Any] = torch.load(last, weights_only=True)
        return content
