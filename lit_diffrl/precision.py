"""Which number formats a run may compute in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer

from lit_diffrl.errors import ConfigError
from lit_diffrl.nets.prepared import prepared_once

ACCEPTED = {
    "32-true": "everything in float32",
    "64-true": "everything in float64",
    "bf16-mixed": "networks in bfloat16, the rest in float32",
    "16-mixed": "networks in float16, the rest in float32; on GPUs",
}
SHORT = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # Lightning's own


def check_precision(precision: int | str) -> None:
    """Refuse precisions that round weights or schedules to 16 bits: updates would vanish, densities overflow.

    Args:
        precision: The Trainer's, as the user writes it.

    Raises:
        ConfigError: For any but the :data:`ACCEPTED`.
    """
    name = SHORT.get(str(precision), str(precision))
    if name not in ACCEPTED:
        meanings = "; ".join(f"{key} ({meaning})" for key, meaning in ACCEPTED.items())
        raise ConfigError(
            f"--trainer.precision {precision} does not train: weights, schedules and densities need 32 bits. Accepted: "
            f"{meanings}"
        )


@contextmanager
def constant_weights(trainer: Trainer) -> Iterator[None]:
    """The precision of the updates, for what calls networks many times while nobody changes them.

    Lightning has every call of an update round the weights anew, which for solvers of 15 calls was a tenth of the time
    and more. Here each is prepared once and kept until the end: of linear layers by
    :func:`~lit_diffrl.nets.prepared.prepared_once`, of convolutions by autocast's own cache, where that keeps them.

    Args:
        trainer: Whose precision.
    """
    with trainer.precision_plugin.forward_context():
        device = trainer.strategy.root_device.type
        enabled = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if enabled else None
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=True), prepared_once(long=True):
            yield
