"""Networks evaluated together: the members of an ensemble as one batched matrix product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffrl.errors import ConfigError, check_choice, check_range
from lit_diffrl.nets.activations import ACTIVATIONS
from lit_diffrl.nets.linear import batched_linear

Members = Tensor | slice


class EnsembleLinear(nn.Module):
    """M linear layers side by side: ``weight (M, in, out)``, ``bias (M, 1, out)``."""

    def __init__(self, members: int, width_in: int, width_out: int) -> None:
        """Draw each member's weights and biases from ``U(-1/sqrt(in), 1/sqrt(in))``.

        Args:
            members: Number of members M.
            width_in: Input width.
            width_out: Output width.
        """
        super().__init__()
        # the input width, not the fan-in that a generic rule reads off a 3-D weight (in * out)
        bound = width_in**-0.5
        self.weight = nn.Parameter(torch.empty(members, width_in, width_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, width_out).uniform_(-bound, bound))

    def extra_repr(self) -> str:
        """Sizes for ``print(module)``."""
        members, width_in, width_out = self.weight.shape
        return f"members={members}, width_in={width_in}, width_out={width_out}"

    def forward(self, x: Tensor, members: Members | None = None) -> Tensor:
        """Apply every member to its own input.

        Args:
            x: ``(M, B, in)``, or ``(B, in)`` for one input to all.
            members: Evaluate only these, with their weights as constants: gradients reach ``x`` and nothing
                else.

        Returns:
            ``(M, B, out)``, M the number of members evaluated.
        """
        return batched_linear(x, *self.parameters_of(members))

    def parameters_of(self, members: Members | None = None) -> tuple[Tensor, Tensor]:
        """Weight and bias: the parameters, or those of some members as constants."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if members is not None:
            weight, bias = weight.detach()[members], bias.detach()[members]
        return weight, bias


class EnsembleMLP(nn.Module):
    """M multilayer perceptrons with an activation between their layers."""

    def __init__(self, members: int, sizes: Sequence[int], activation: str = "silu") -> None:
        """Create the layers.

        Args:
            members: Number of members M, at least 1.
            sizes: Widths from input to output, the same for all members.
            activation: ``mish``, ``relu`` or ``silu``.

        Raises:
            ConfigError: For no members, fewer than two sizes, a size below 1 or an unknown activation.
        """
        super().__init__()
        check_range("ensemble members", members, 1)
        check_choice("activation", activation, ACTIVATIONS)
        if len(sizes) < 2 or min(sizes) < 1:
            raise ConfigError(f"ensemble sizes must be at least two positive widths, got {list(sizes)}")
        self.layers = nn.ModuleList(EnsembleLinear(members, *widths) for widths in pairwise(sizes))
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor, members: Members | None = None) -> Tensor:
        """Apply every member to its own input ``(M, B, in)`` or a common ``(B, in)``, as EnsembleLinear does."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x, members))
        return self.layers[-1](x, members)


class GaussianEnsemble(nn.Module):
    """M perceptrons that each predict a diagonal Gaussian with log-variance between learned soft bounds.

    The bounds are each member's own, so that members share nothing and can be stopped and restored one by
    one.
    """

    def __init__(
        self,
        members: int,
        sizes: Sequence[int],
        activation: str = "silu",
        logvar_low: float = -10.0,
        logvar_high: float = 0.5,
    ) -> None:
        """Create the networks.

        Args:
            members: Number of members M.
            sizes: Widths from input to the dimension of the Gaussian.
            activation: ``mish``, ``relu`` or ``silu``.
            logvar_low: Initial lower bound of the log-variance.
            logvar_high: Initial upper bound of the log-variance, above the lower one.

        Raises:
            ConfigError: For bounds in the wrong order, or as EnsembleMLP.
        """
        super().__init__()
        check_range("logvar_high", logvar_high, logvar_low, low_open=True)
        *hidden, width = sizes
        self.net = EnsembleMLP(members, [*hidden, 2 * width], activation)
        self.logvar_low = nn.Parameter(torch.full((members, 1, width), float(logvar_low)))
        self.logvar_high = nn.Parameter(torch.full((members, 1, width), float(logvar_high)))

    def forward(self, x: Tensor, members: Members | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance ``(M, B, out)``, float32 or better; arguments as EnsembleLinear."""
        out = self.net(x, members)
        mean, raw = out.to(torch.promote_types(out.dtype, torch.float32)).chunk(2, dim=-1)
        low: Tensor = self.logvar_low
        high: Tensor = self.logvar_high
        if members is not None:
            low, high = low.detach()[members], high.detach()[members]
        logvar = high - F.softplus(high - raw)
        return mean, low + F.softplus(logvar - low)

    def spread(self) -> Tensor:
        """Distance ``(M,)`` between the bounds, summed over dimensions; penalised, it keeps them tight."""
        return (self.logvar_high - self.logvar_low).sum(dim=(1, 2))


class BestWeights(nn.Module):
    """The best weights of M models trained side by side, and which of them have stopped improving.

    The models are one module whose parameters have M as their first axis. Everything is a buffer, so that a
    checkpoint in the middle of training resumes exactly.

    Attributes:
        error: Lowest held-out error of each model, ``(M,)``, infinite before the first.
        waiting: Validations since then, int64 ``(M,)``.
        stopped: Models that have stopped, bool ``(M,)``.
    """

    error: Tensor
    waiting: Tensor
    stopped: Tensor

    def __init__(self, net: nn.Module, members: int, patience: int, improvement: float) -> None:
        """Copy the initial weights.

        Args:
            net: The models.
            members: Their number M.
            patience: A model stops after more than this many validations in a row without improvement.
            improvement: Relative decrease of the error that counts as one, in ``[0, 1)``.
        """
        super().__init__()
        self.patience, self.improvement = patience, improvement
        self.register_buffer("error", torch.full((members,), math.inf))
        self.register_buffer("waiting", torch.zeros(members, dtype=torch.int64))
        self.register_buffer("stopped", torch.zeros(members, dtype=torch.bool))
        for name, weight in net.named_parameters():
            self.register_buffer(_flat(name), weight.detach().clone())

    @torch.no_grad()
    def update(self, net: nn.Module, error: Tensor) -> None:
        """Take in the held-out errors ``(M,)`` of the current weights; stopped models are left alone."""
        learning = ~self.stopped
        better = learning & (error < self.error * (1 - self.improvement))  # false for NaN
        self.error.copy_(torch.where(better, error.to(self.error.dtype), self.error))
        self.waiting.copy_(torch.where(better, 0, self.waiting + learning))
        self.stopped |= self.waiting > self.patience
        for name, weight in net.named_parameters():
            best = self.get_buffer(_flat(name))
            best.copy_(torch.where(better.reshape(-1, *[1] * (best.dim() - 1)), weight, best))

    @torch.no_grad()
    def restore(self, net: nn.Module) -> None:
        """Put the best weights back; a model that was never validated with a finite error keeps its own."""
        found = self.error.isfinite()
        for name, weight in net.named_parameters():
            best = self.get_buffer(_flat(name))
            weight.copy_(torch.where(found.reshape(-1, *[1] * (best.dim() - 1)), best, weight))


def _flat(name: str) -> str:
    return "best_" + name.replace(".", "_")  # buffer names may not hold dots


class RowShares(nn.ModuleList):
    """Several networks of which each sees its share of a batch's rows, and no others: row i goes to ``i mod M``.

    Rows that are drawn at random are so given to a network at random, and keep it from call to call.
    """

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """What the networks make of their rows.

        Args:
            x: ``(B, ...)``.
            level: ``(B,)``, or ``(1,)`` for all rows.

        Returns:
            Like ``x``.
        """
        nets, m = list(self)[: len(x)], len(self)
        parts = [net(x[i::m], level[i::m] if len(level) > 1 else level) for i, net in enumerate(nets)]
        out = torch.empty_like(x, dtype=parts[0].dtype)
        for i, part in enumerate(parts):
            out[i::m] = part
        return out
