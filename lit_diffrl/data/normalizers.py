"""Normalisers, fitted per dimension on real steps only and saved in every checkpoint as plain lists.

Sources: Diffuser's two normalisers. ``gaussian`` (locomotion) is (x - mean) / std with the population's deviation
and no epsilon; ``limits`` (mazes) is 2 (x - min) / (max - min) - 1. Two departures: a constant dimension is divided
by 1, where the released code divides by 0; and ``limits`` always clips to [-1, 1] on the way back, where the
released code clips a whole batch once anything in it is out by 1e-4: here a row does not depend on its neighbours.
``none`` leaves values as they are, for policies that learn from raw states.

Tensors may have any leading shape and be on any device: the statistics follow them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lit_diffrl.errors import ConfigError, check_choice


class GaussianNormalizer:
    """Mean 0 and deviation 1 in every dimension.

    Args:
        mean: ``(dim,)``.
        std: ``(dim,)`` positive.
    """

    kind = "gaussian"

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean, self.std = mean, std

    @classmethod
    def fit(cls, x: Tensor) -> GaussianNormalizer:
        """Fit to rows ``(..., dim)``."""
        rows = x.reshape(-1, x.shape[-1])
        std, mean = torch.std_mean(rows.double(), dim=0, correction=0)
        # Rounding in the mean leaves a constant dimension with a tiny deviation instead of none.
        constant = rows.amin(0) == rows.amax(0)
        return cls(mean.float(), torch.where(constant, 1.0, std).float())

    def normalize(self, x: Tensor) -> Tensor:
        """Raw ``(..., dim)`` to normalised."""
        self._follow(x)
        return (x - self.mean) / self.std

    def unnormalize(self, x: Tensor) -> Tensor:
        """Normalised ``(..., dim)`` to raw, without clipping."""
        self._follow(x)
        return x * self.std + self.mean

    def _follow(self, x: Tensor) -> None:
        if self.mean.device != x.device:
            with torch.inference_mode(False):  # where training may differentiate later
                self.mean, self.std = self.mean.to(x.device), self.std.to(x.device)

    def state(self) -> dict[str, Any]:
        """Plain types, for :func:`normalizer_from_state`."""
        return {"kind": self.kind, "mean": self.mean.tolist(), "std": self.std.tolist()}


class LimitsNormalizer:
    """Least value -1 and greatest value 1 in every dimension; a constant dimension is -1.

    Args:
        low: ``(dim,)`` least values.
        high: ``(dim,)`` greatest values.
    """

    kind = "limits"

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high
        self._range = torch.where(high > low, high - low, torch.ones_like(low))

    @classmethod
    def fit(cls, x: Tensor) -> LimitsNormalizer:
        """Fit to rows ``(..., dim)``."""
        rows = x.reshape(-1, x.shape[-1])
        return cls(rows.amin(0).float(), rows.amax(0).float())

    def normalize(self, x: Tensor) -> Tensor:
        """Raw ``(..., dim)`` to normalised; values beyond the data's are beyond [-1, 1]."""
        self._follow(x)
        return 2 * (x - self.low) / self._range - 1

    def unnormalize(self, x: Tensor) -> Tensor:
        """Normalised ``(..., dim)``, clipped to [-1, 1], to raw: always within the data's limits."""
        self._follow(x)
        # The last clip: a constant dimension's range of 1 is not the data's, and rounding may pass a limit.
        return ((x.clamp(-1, 1) + 1) / 2 * self._range + self.low).clamp(self.low, self.high)

    def _follow(self, x: Tensor) -> None:
        if self.low.device != x.device:
            with torch.inference_mode(False):  # where training may differentiate later
                self.low, self.high, self._range = (t.to(x.device) for t in (self.low, self.high, self._range))

    def state(self) -> dict[str, Any]:
        """Plain types, for :func:`normalizer_from_state`."""
        return {"kind": self.kind, "low": self.low.tolist(), "high": self.high.tolist()}


class IdentityNormalizer:
    """Values as they are."""

    kind = "none"

    @classmethod
    def fit(cls, x: Tensor) -> IdentityNormalizer:
        """Learn nothing from rows ``(..., dim)``."""
        return cls()

    def normalize(self, x: Tensor) -> Tensor:
        """Raw ``(..., dim)``, itself."""
        return x

    def unnormalize(self, x: Tensor) -> Tensor:
        """Raw ``(..., dim)``, itself, without clipping."""
        return x

    def state(self) -> dict[str, Any]:
        """Plain types, for :func:`normalizer_from_state`."""
        return {"kind": self.kind}


Normalizer: TypeAlias = GaussianNormalizer | LimitsNormalizer | IdentityNormalizer
KINDS: dict[str, type[GaussianNormalizer] | type[LimitsNormalizer] | type[IdentityNormalizer]] = {
    cls.kind: cls for cls in (GaussianNormalizer, LimitsNormalizer, IdentityNormalizer)
}


def fit_normalizer(kind: str, x: Tensor) -> Normalizer:
    """Fit a normaliser to real steps.

    Args:
        kind: ``gaussian``, ``limits`` or ``none``.
        x: ``(..., dim)`` raw values.

    Raises:
        ConfigError: For another kind.
    """
    check_choice("normalizer", kind, KINDS)
    return KINDS[kind].fit(x)


def normalizer_from_state(state: Mapping[str, Any]) -> Normalizer:
    """Rebuild a normaliser from its ``state()``.

    Raises:
        ConfigError: When it is not such a state.
    """
    fields = {name: values for name, values in state.items() if name != "kind"}
    try:
        tensors = {name: torch.tensor(values, dtype=torch.float32) for name, values in fields.items()}
        return KINDS[state["kind"]](**tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"a saved normaliser must have kind {' or '.join(KINDS)} and the lists of that kind, got {dict(state)} "
            f"({type(error).__name__}: {error}); the checkpoint is damaged or of another version"
        ) from error
