"""What stops a run whose numbers are no longer finite, and what it leaves behind to find out why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_diffrl.errors import ConfigError
from lit_diffrl.seeding import Place

if TYPE_CHECKING:
    from lit_diffrl.methods.base import Method

REPORT = "not_finite.json"


@dataclass
class Checked:
    """The watched numbers of one update, on their way from the device."""

    place: Place
    phase: str
    names: list[str]
    values: Tensor
    arrived: Any


class Guard:
    """Watches the losses and gradient norms of every update.

    On the CPU an update is checked before its optimizer steps. On a GPU the numbers are copied while it works on,
    and checked one update later: waiting for them would cost more than the update that is lost.
    """

    def __init__(self) -> None:
        self._pending: Checked | None = None

    def check(self, method: Method, values: Mapping[str, Tensor], batch: Any, place: Place) -> None:
        """Take in the numbers of an update.

        Args:
            method: Whose update it is.
            values: Scalars by log name.
            batch: What they were computed from.
            place: The update.

        Raises:
            ConfigError: If these, or those still on their way, are not finite.
        """
        stacked = torch.stack([v.detach().float() for v in values.values()])
        checked = Checked(place, method.phase.name, list(values), stacked, None)
        if stacked.device.type != "cuda":
            self._judge(method, checked, batch)
            return
        checked.values = stacked.to("cpu", non_blocking=True)
        checked.arrived = torch.cuda.Event()
        checked.arrived.record()
        earlier, self._pending = self._pending, checked
        if earlier is not None:
            self._judge(method, earlier, None)

    def flush(self, method: Method) -> None:
        """Wait for the numbers that are still on their way: to be called before a checkpoint is written.

        Raises:
            ConfigError: If they are not finite.
        """
        earlier, self._pending = self._pending, None
        if earlier is not None:
            self._judge(method, earlier, None)

    @staticmethod
    def _judge(method: Method, checked: Checked, batch: Any) -> None:
        if checked.arrived is not None:
            checked.arrived.synchronize()
        if bool(checked.values.isfinite().all()):
            return
        numbers = dict(zip(checked.names, checked.values.tolist()))
        report = describe(method, checked, numbers, batch)
        where = f"; details in {_write(method, report)}" if method._trainer is not None else ""
        bad = ", ".join(name for name, value in numbers.items() if value != value or abs(value) == float("inf"))
        shown = ", ".join(f"{name} = {value:.4g}" for name, value in {**numbers, **report["diagnosis"]}.items())
        raise ConfigError(
            f"{type(method).__name__}, phase {checked.phase}, epoch {checked.place.epoch}, update "
            f"{checked.place.index}: {bad} is not finite ({shown}); the last checkpoint is intact{where}. Try a "
            "smaller learning rate (--model.lr) or gradient clipping (--model.grad_clip 1.0)"
        )


def describe(method: Method, checked: Checked, numbers: Mapping[str, float], batch: Any) -> dict[str, Any]:
    """What is known about an update that went wrong, in plain types.

    Args:
        method: Whose update it was.
        checked: The update.
        numbers: Its losses and gradient norms.
        batch: What they were computed from; None when it has gone.
    """
    report: dict[str, Any] = {
        "method": type(method).__name__,
        "phase": checked.phase,
        "epoch": checked.place.epoch,
        "update": checked.place.index,
        "rank": checked.place.rank,
        "values": dict(numbers),
        "diagnosis": {} if batch is None else dict(method.diagnose(batch)),
        "networks": {name: _network(child) for name, child in method.named_children()},
        "batch": {} if batch is None else {name: _extent(value) for name, value in batch._asdict().items()},
    }
    data = getattr(method._trainer, "datamodule", None)
    if data is not None and hasattr(data, "indices"):
        step, *rest = data.indices(method.phase, checked.place)
        report["indices"] = {"step": step.tolist(), "rest": rest}
    return report


def _extent(x: Tensor) -> dict[str, float]:
    """Smallest and largest finite entry, and how many are not finite."""
    finite = x.detach()[x.isfinite()].double()
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    return {"min": low, "max": high, "not_finite": int(x.numel() - finite.numel())}


def _network(module: nn.Module) -> dict[str, Any]:
    weights = [p.detach().flatten() for p in module.parameters()]
    gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return {
        name: _extent(torch.cat(parts)) if parts else None
        for name, parts in (("weights", weights), ("gradients", gradients))
    }


def _write(method: Method, report: Mapping[str, Any]) -> Path:
    trainer = method.trainer
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rank = report["rank"]
    path = folder / (REPORT if rank == 0 else REPORT.replace(".", f"_rank{rank}."))
    path.write_text(json.dumps(report, indent=1, allow_nan=True) + "\n")
    return path
