"""What stops a run whose numbers are no longer finite, and what it leaves behind to find out why."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_diffrl.errors import ConfigError
from lit_diffrl.seeding import Place

if TYPE_CHECKING:
    from lit_diffrl.methods.base import Method, Phase

REPORT = "not_finite.json"


@dataclass
class Checked:
    """The watched numbers of one update, on their way from the device.

    Args:
        place: The update.
        phase: Its phase.
        batch: What the numbers were computed from.
        names: Log names.
        values: ``(processes, names)``.
        arrived: When they have arrived, on a GPU; None where they are read at once.
    """

    place: Place
    phase: Phase
    batch: Any
    names: list[str]
    values: Tensor
    arrived: Any

    def numbers(self, rank: int) -> dict[str, float]:
        """A process's numbers by name."""
        return dict(zip(self.names, self.values[rank].tolist()))


class Guard:
    """Watches the losses and gradient norms of every update.

    On the CPU an update is checked before its optimizer steps. On a GPU the numbers are copied while it works on,
    and checked one update later: waiting for them would cost more than the update that is lost. Several processes
    tell each other, so that all stop at the same update: one that went on alone would wait for the others for ever.
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
        dtype = torch.promote_types(next(iter(values.values())).dtype, torch.float32)
        stacked = torch.stack([v.detach().to(dtype) for v in values.values()])
        on_host, arrived = send_to_host(gather(stacked, place.world_size))
        earlier, self._pending = self._pending, Checked(place, method.phase, batch, list(values), on_host, arrived)
        if earlier is not None:
            self._judge(method, earlier, late=True)
        if arrived is None:
            self.settle(method)

    def settle(self, method: Method) -> None:
        """Wait for the numbers that are still on their way: before a checkpoint is written, or the agent acts.

        Raises:
            ConfigError: If they are not finite.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._judge(method, pending, late=pending.arrived is not None)

    def check_weights(self, method: Method) -> None:
        """Refuse weights that no run could go on from: an update of finite numbers may still have been too large.

        Raises:
            ConfigError: With the networks they belong to.
        """
        self.settle(method)
        bad = {name.partition(".")[0] for name, p in method.named_parameters() if not bool(p.isfinite().all())}
        if bad:
            raise ConfigError(
                f"{type(method).__name__}, phase {method.phase.name}: weights of {', '.join(sorted(bad))} are not "
                f"finite, so they are not saved; checkpoints of before are intact. {advice(method, None)}"
            )

    def _judge(self, method: Method, checked: Checked, late: bool) -> None:
        if checked.arrived is not None:
            checked.arrived.synchronize()
        bad = ~checked.values.isfinite()
        if not bool(bad.any()):
            return
        self._pending = None
        place, trainer = checked.place, method._trainer
        failed: list[int] = bad.any(dim=1).nonzero().flatten().tolist()
        report = describe(method, checked, late) if place.rank in failed else {}
        details = ""
        if trainer is not None:
            folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes
            unwritten = _write(folder / _file_name(place.rank), report) if report else ""
            trainer.strategy.barrier("not_finite")  # the first process ends the others
            details = f"; details in {' and '.join(str(folder / _file_name(rank)) for rank in failed)}{unwritten}"
        first = failed[0]
        names = ", ".join(name for name, wrong in zip(checked.names, bad[first].tolist()) if wrong)
        numbers = checked.numbers(first) | (report["diagnosis"] if first == place.rank else {})
        shown = ", ".join(f"{name} = {value:.4g}" for name, value in numbers.items())
        raise ConfigError(
            f"{type(method).__name__}, phase {checked.phase.name}, epoch {place.epoch}, update {place.index} (counted "
            f"from 0{f', process {first}' if place.world_size > 1 else ''}): {names} is not finite ({shown}); "
            f"checkpoints of before are intact{details}. {advice(method, report.get('batch'))}"
        )


def gather(values: Tensor, processes: int) -> Tensor:
    """The numbers of all processes, ``(processes, n)``."""
    if processes == 1:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(processes)]
    torch.distributed.all_gather(parts, values)
    return torch.stack(parts)


def send_to_host(values: Tensor) -> tuple[Tensor, Any]:
    """Begin to copy numbers to the CPU.

    Returns:
        The numbers, and on a GPU the event after which they may be read.
    """
    if values.device.type != "cuda":
        return values, None
    on_host = values.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return on_host, arrived


def advice(method: Method, batch: Mapping[str, Mapping[str, float]] | None) -> str:
    """What to try next.

    Args:
        method: Whose arguments to name.
        batch: Extent of each part of the batch, if known.
    """
    broken = [name for name, extent in (batch or {}).items() if extent["not_finite"]]
    if broken:
        return f"The batch itself is not finite ({', '.join(broken)}): look at these steps of the dataset"
    names = [f"--model.{name}" for name in _argument_names(method.hparams)]
    rates = [name for name in names if name.endswith("lr")]
    clips = [name for name in names if name.endswith("grad_clip")]
    ways = [f"a smaller learning rate ({', '.join(rates)})"] if rates else ["a smaller learning rate"]
    ways += [f"gradient clipping ({' 1.0, '.join(clips)} 1.0)"] if clips else []
    return f"Try {' or '.join(ways)}"


def _argument_names(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in arguments.items():
        inner = getattr(value, "__dict__", value)  # groups of options
        if isinstance(inner, Mapping):
            yield from _argument_names(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def describe(method: Method, checked: Checked, late: bool) -> dict[str, Any]:
    """What is known about an update that went wrong, in plain types.

    Args:
        method: Whose update it was.
        checked: The update.
        late: Whether the networks have been updated once more since.
    """
    report: dict[str, Any] = {
        "method": type(method).__name__,
        "phase": checked.phase.name,
        "epoch": checked.place.epoch,
        "update": checked.place.index,
        "process": checked.place.rank,
        "processes": checked.place.world_size,
        "values": checked.numbers(checked.place.rank),
        "diagnosis": dict(method.diagnose(checked.batch)),
        "batch": {name: _extent(x) for name, x in _parts(checked.batch).items()},
    }
    data = getattr(method._trainer, "datamodule", None)
    if data is not None and hasattr(data, "indices"):
        steps, *horizon = data.indices(checked.phase, checked.place)
        recorded = method.recorded_steps(steps)
        report["datasets"] = method.spec.dataset_ids if method.spec is not None else []
        report["indices"] = {"steps": recorded.tolist(), **({"horizon": horizon[0]} if horizon else {})}
        if len(recorded) < len(steps):
            report["synthetic_rows"] = len(steps) - len(recorded)
    report["networks_seen"] = "after this update and before the next" if late else "before this update"
    report["networks"] = {name: _sizes(child) for name, child in method.named_children()}
    return report


def _parts(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch by name."""
    if hasattr(batch, "_asdict"):
        batch = batch._asdict()
    elif isinstance(batch, list | tuple):
        batch = dict(enumerate(batch))
    named = batch if isinstance(batch, Mapping) else {"batch": batch}
    return {str(name): x for name, x in named.items() if isinstance(x, Tensor)}


def _extent(x: Tensor) -> dict[str, float]:
    """Smallest and largest finite entry, and how many are not finite."""
    finite = x.detach()[x.isfinite()].double()
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    return {"min": low, "max": high, "not_finite": int(x.numel() - finite.numel())}


def _sizes(module: nn.Module) -> dict[str, dict[str, float] | None]:
    """Largest absolute weight and gradient of a network, and how many are not finite."""

    def largest(parts: list[Tensor]) -> dict[str, float] | None:
        if not parts:
            return None
        extent = _extent(torch.cat([p.detach().flatten() for p in parts]))
        return {"max_abs": max(abs(extent["min"]), abs(extent["max"])), "not_finite": extent["not_finite"]}

    parameters: list[Tensor] = list(module.parameters())
    return {"weights": largest(parameters), "gradients": largest([p.grad for p in parameters if p.grad is not None])}


def _file_name(rank: int) -> str:
    return REPORT if rank == 0 else REPORT.replace(".", f"_process{rank}.")


def _write(path: Path, report: Mapping[str, Any]) -> str:
    """Write a report; a disk that is full must not hide what stopped the run.

    Returns:
        Why it could not be written, or an empty string.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        # JSON has neither NaN nor infinity.
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plain(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        return f", which could not be written ({error.strerror or error})"
    return ""
