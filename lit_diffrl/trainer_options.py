"""Options of Lightning's Trainer that would not do here what they say: refused before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_diffrl.errors import ConfigError, check_range

CLIPS = "methods clip the gradients of each of their networks: --model.grad_clip"
WITHIN = "it would end the run within an epoch, whose rest would be missing from a run that goes on from there; "

# Option -> the values that mean "not used", and what to use instead.
INSTEAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "gradient_clip_val": ((None,), CLIPS),
    "gradient_clip_algorithm": ((None,), CLIPS),
    "accumulate_grad_batches": ((None, 1), "methods step their optimizers themselves: --data.batch_size"),
    "max_steps": ((-1,), WITHIN + "--trainer.max_epochs counts epochs of --data.updates_per_epoch updates"),
    "max_time": (
        (None,),
        WITHIN + "by the clock a run is stopped, and saved, with: timeout --signal=TERM 8h python -m lit_diffrl fit …",
    ),
    "val_check_interval": (
        (None, 1.0),
        "evaluations come between epochs: --rollout.every_n_epochs, and --data.updates_per_epoch makes epochs shorter",
    ),
    "overfit_batches": ((None, 0, 0.0), "every epoch draws batches anew: give a small dataset instead"),
    "barebones": ((None, False), "it keeps neither curves nor checkpoints: to try a run out, --trainer.fast_dev_run 2"),
}


def check_trainer_options(trainer: Mapping[str, Any]) -> None:
    """Refuse options that the Trainer would ignore, or that would cost work later.

    Args:
        trainer: The Trainer's arguments by name.

    Raises:
        ConfigError: With the option, its value and what to use instead.
    """
    for name, (unused, instead) in INSTEAD.items():
        value = trainer[name]
        # 1 is a number of batches where 1.0 is the whole epoch.
        if not any(value == way and type(value) is type(way) for way in unused):
            raise ConfigError(f"--trainer.{name} must be left out, got {value}; {instead}")
    if trainer["limit_train_batches"] == 0:
        raise ConfigError("--trainer.limit_train_batches must not be 0: nothing would be trained; leave it out")


def check_seed(seed: int | bool | None) -> None:
    """Refuse a seed that numpy does not take, and Lightning's true and false: a run without a number is not repeated.

    Raises:
        ConfigError: With the range.
    """
    if seed is None or isinstance(seed, bool):
        raise ConfigError(f"--seed_everything must be a number, got {str(seed).lower()}; leave it out for 0")
    check_range("--seed_everything", seed, 0, 2**32 - 1)
