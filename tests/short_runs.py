"""The main configs, each with every phase that it has, cut to a few updates of small networks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule

from lit_diffrl.methods import Method
from lit_diffrl.typos import find_class, parameters

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "conf").glob("*.yaml"))
UPDATES = 3
SMALL = (
    f"--data.updates_per_epoch={UPDATES} --rollout.every_n_epochs=100 --rollout.episodes=1 --rollout.num_envs=1 "
    "--rollout.max_steps=2 --rollout.pictures=false --trainer.accelerator=cpu --trainer.enable_model_summary=false "
    "--trainer.log_every_n_steps=1"
).split()


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
                self.options.append("--model.ema.every=1")
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
