"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lit_diffrl.errors import check_range


class EMA(nn.Module):
    """A slowly following copy of a network, to be used wherever the network is evaluated.

    The copy is touched at every ``every``-th optimiser step. Before step ``start`` it is overwritten by the
    weights (or stays as it is made: ``hold``); from then on ``ema <- ema + (1 - decay)(weights - ema)``. The
    defaults are Diffuser's and average over about ``every / (1 - decay) = 2000`` steps; ``every=1, start=0`` is the
    plain moving average.

    Attributes:
        net: The copy: in evaluation mode, without gradients.
        count: Optimiser steps seen, int64 scalar.
    """

    count: Tensor

    def __init__(
        self,
        net: nn.Module,
        decay: float = 0.995,
        every: int = 10,
        start: int = 2000,
        *,
        offset: int = 0,
        hold: bool = False,
    ) -> None:
        """Copy the network.

        Args:
            net: Network to follow.
            decay: Share of the old average kept by an update, in ``[0, 1)``.
            every: Optimiser steps between updates.
            start: Optimiser step from which updates average instead of overwriting.
            offset: Step, below ``every``, from which ``every`` counts.
            hold: Leave the initial copy alone until ``start``, as Diffusion-QL's and EDP's policies do.

        Raises:
            ConfigError: For a number out of range.
        """
        super().__init__()
        check_range("EMA decay", decay, 0, 1, high_open=True)
        check_range("EMA every", every, 1)
        check_range("EMA start", start, 0)
        check_range("EMA offset", offset, 0, every - 1)
        self.decay, self.every, self.start, self.offset, self.hold = decay, every, start, offset, hold
        self.net = copy.deepcopy(net).requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._steps = 0  # the same number on the host: reading the buffer would wait for the device
        self.register_load_state_dict_post_hook(_read_count)
        self.eval()

    def train(self, mode: bool = True) -> EMA:
        """Stay in evaluation mode."""
        return super().train(False)

    @property
    def due(self) -> bool:
        """Whether the next update touches the copy; known on the host."""
        step = self._steps + 1
        return step % self.every == self.offset and not (self.hold and step < self.start)

    @torch.no_grad()
    def update(self, net: nn.Module, decay: float | None = None) -> None:
        """Follow the network; to be called after each of its optimiser steps.

        Args:
            net: The network this is a copy of.
            decay: In place of the one that the average was made with, for one that changes from step to step.
        """
        due = self.due
        self._steps += 1
        self.count += 1
        if not due:
            return
        average: list[Tensor] = list(self.net.parameters())
        weights: list[Tensor] = list(net.parameters())
        if self._steps < self.start:
            torch._foreach_copy_(average, weights)
        else:
            torch._foreach_lerp_(average, weights, 1 - (self.decay if decay is None else decay))
        for mine, theirs in zip(self.net.buffers(), net.buffers(), strict=True):
            mine.copy_(theirs)


def half_life_decay(seen: int, batch: int, half_life: float = 500_000, ramp: float = 0.05) -> float:
    """Decay of an average that forgets half in a number of samples, which rises with those seen (EDM's training).

    Args:
        seen: Samples seen so far.
        batch: Samples of this step.
        half_life: Samples in which the weight of the past falls to a half.
        ramp: Greatest half-life as a share of the samples seen; in the beginning the average follows closely.

    Returns:
        ``0.5^(batch / min(half_life, ramp * seen))``, 0 before the first sample.
    """
    now = min(half_life, ramp * seen)
    return float(0.5 ** (batch / now)) if now > 0 else 0.0


def _read_count(module: nn.Module, incompatible_keys: Any) -> None:
    """Resume the host's counter after ``load_state_dict``."""
    assert isinstance(module, EMA)
    module._steps = int(module.count)
