"""Multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from lit_diffrl.errors import ConfigError, check_choice
from lit_diffrl.nets.activations import ACTIVATIONS
from lit_diffrl.nets.linear import Linear


class MLP(nn.Sequential):
    """Linear layers with an activation between them (none after the last)."""

    def __init__(
        self, sizes: Sequence[int], activation: str = "mish", dropout: float = 0.0, layer_norm: bool = False
    ) -> None:
        """Create the layers.

        Args:
            sizes: Widths from input to output, e.g. ``(17, 256, 256, 6)``: two hidden layers.
            activation: ``mish``, ``relu`` or ``silu``.
            dropout: Share of the hidden units that are left out in training.
            layer_norm: Normalise each hidden layer before its activation.

        Raises:
            ConfigError: For fewer than two sizes, a size below 1 or an unknown activation.
        """
        check_choice("activation", activation, ACTIVATIONS)
        if len(sizes) < 2 or min(sizes) < 1:
            raise ConfigError(f"MLP sizes must be at least two positive widths, got {list(sizes)}")
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(sizes):
            if layers:
                layers += [nn.LayerNorm(width_in)] if layer_norm else []
                layers.append(ACTIVATIONS[activation]())
                layers += [nn.Dropout(dropout)] if dropout else []
            layers.append(Linear(width_in, width_out))
        super().__init__(*layers)
