"""Which number formats a run may compute in."""

from __future__ import annotations

from lit_diffrl.errors import ConfigError

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
