"""Value functions: independent critics of actions, and of states."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffrl.errors import check_choice, check_range
from lit_diffrl.nets.activations import ACTIVATIONS
from lit_diffrl.nets.blocks import in_blocks
from lit_diffrl.nets.ensemble import EnsembleLinear, Members
from lit_diffrl.nets.linear import batched_linear, unrounded, value_by
from lit_diffrl.nets.mlp import MLP
from lit_diffrl.nets.prepared import rounded
from lit_diffrl.nets.relu_blocks import relu_perceptrons, worth_blocks


class TwinQ(nn.Module):
    """Independent critics ``Q(s, a)``, two unless told otherwise, each a perceptron on state and action.

    The weights of one layer are one parameter with the members first: one product on a GPU, one optimizer entry. On a
    CPU it costs what separate layers cost (forward and backward of two critics of 3 x 256 on 256 rows, one thread: 3.9
    against 3.8 ms; with MKL's products 5.5 either way).
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: int = 256,
        layers: int = 3,
        activation: str = "mish",
        members: int = 2,
        layer_norm: bool = False,
        first_tanh: bool = False,
        orthogonal: bool = False,
    ) -> None:
        """Create the critics, each with the initial weights of ``nn.Linear``.

        Args:
            obs_dim: Size of the state.
            action_dim: Size of the action.
            hidden: Width of the hidden layers.
            layers: Number of hidden layers.
            activation: ``mish``, ``relu`` or ``silu``.
            members: Number of critics.
            layer_norm: Normalise each hidden layer before its activation.
            first_tanh: Tanh after the first hidden layer in place of the activation.
            orthogonal: Orthogonal weights of gain sqrt(2), 0.01 in the last layer, and no bias (CQL's).

        Raises:
            ConfigError: For an unknown activation or a size out of range.
        """
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        check_range("hidden layers", layers, 1)
        check_range("critics", members, 1)
        self.obs_dim = obs_dim
        widths = [obs_dim + action_dim, *[hidden] * layers]
        self.layers = nn.ModuleList(EnsembleLinear(members, i, o) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(EnsembleNorm(members, hidden) for _ in range(layers if layer_norm else 0))
        self.head = EnsembleLinear(members, hidden, 1)
        self.activation = ACTIVATIONS[activation]()
        self.first_activation = nn.Tanh() if first_tanh else self.activation
        if orthogonal:
            for layer in self.layers:
                _orthogonal(layer, math.sqrt(2))
            _orthogonal(self.head, 0.01)

    def forward(self, obs: Tensor, action: Tensor, members: Members | None = None) -> Tensor:
        """Values of actions.

        Args:
            obs: States ``(B, S)``.
            action: Actions ``(B, A)``, or ``(B, N, A)``: N in each state, whose own part is computed once.
            members: Ask only these, e.g. ``slice(None)``, with their weights as constants: gradients reach ``obs`` and
                ``action`` and nothing else.

        Returns:
            ``(M, B)`` or ``(M, B, N)``, M the number of critics asked; float32 or better.
        """
        if action.dim() == 3 and members is None and self._plain_relu:
            rows = torch.cat([obs.unsqueeze(1).expand(-1, action.shape[1], -1), action], dim=-1).flatten(0, 1)
            layers = [layer.parameters_of() for layer in (*self.layers, self.head)]
            if worth_blocks(rows, layers):
                values = relu_perceptrons(rows, layers)
                return values.reshape(len(values), *action.shape[:-1])
        return in_blocks(partial(self._values, members=members), action, obs, axis=1)

    def _values(self, action: Tensor, obs: Tensor, members: Members | None) -> Tensor:
        h = self._first(obs, action.reshape(len(obs), -1, action.shape[-1]), members)
        for i, layer in enumerate(self.layers):
            h = h if i == 0 else layer(h, members)
            h = self.norms[i](h, members) if self.norms else h
            h = self.activation(h) if i else self.first_activation(h)
        q = unrounded(self.head, h, members)
        return q.reshape(len(q), *action.shape[:-1])

    @property
    def _plain_relu(self) -> bool:
        return isinstance(self.activation, nn.ReLU) and self.first_activation is self.activation and not self.norms

    def _first(self, obs: Tensor, action: Tensor, members: Members | None) -> Tensor:
        """The first layer ``(M, B N, H)`` on states ``(B, S)`` and actions ``(B, N, A)``."""
        layer, n = self.layers[0], action.shape[1]
        assert isinstance(layer, EnsembleLinear)
        if n == 1:
            out: Tensor = layer(torch.cat([obs, action[:, 0]], dim=-1), members)
            return out
        weight, bias = map(rounded, layer.parameters_of(members))
        of_obs = batched_linear(obs, weight[:, : self.obs_dim], bias)
        of_action = batched_linear(action.flatten(0, 1), weight[:, self.obs_dim :])
        return (of_action.unflatten(1, (-1, n)) + of_obs.unsqueeze(2)).flatten(1, 2)


class ValueNet(nn.Module):
    """State value ``V(s)``."""

    def __init__(
        self,
        obs_dim: int,
        hidden: int = 256,
        layers: int = 3,
        activation: str = "mish",
        layer_norm: bool = False,
        first_tanh: bool = False,
        orthogonal: bool = False,
    ) -> None:
        """Create the layers; arguments as :class:`TwinQ`."""
        super().__init__()
        check_range("hidden layers", layers, 1)
        self.net = MLP((obs_dim, *[hidden] * layers, 1), activation, layer_norm=layer_norm)
        if first_tanh:
            self.net[2 if layer_norm else 1] = nn.Tanh()
        if orthogonal:
            *hidden_layers, head = [layer for layer in self.net if isinstance(layer, nn.Linear)]
            for layer in hidden_layers:
                _orthogonal(layer, math.sqrt(2))
            _orthogonal(head, 0.01)

    def forward(self, obs: Tensor) -> Tensor:
        """Values ``(B,)`` of states ``(B, S)``, float32 or better."""
        return value_by(self.net, obs)


class EnsembleNorm(nn.Module):
    """Layer normalisation with a scale and a shift for each member: ``weight``, ``bias (M, 1, width)``."""

    def __init__(self, members: int, width: int) -> None:
        """Begin with scale 1 and shift 0."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, 1, width))
        self.bias = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, x: Tensor, members: Members | None = None) -> Tensor:
        """Normalise ``x (M, B, width)``; ``members`` as EnsembleLinear."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if members is not None:
            weight, bias = weight.detach()[members], bias.detach()[members]
        # Member by member, so that torch's kernel scales and shifts too: with operations of its own, float32
        # under bf16-mixed, CQL's critics (31 actions in 256 states) take 102 ms in place of 75, forward and backward.
        parts = zip(x.unbind(0), weight.squeeze(1).unbind(0), bias.squeeze(1).unbind(0))
        return torch.stack([F.layer_norm(rows, rows.shape[-1:], scale, shift) for rows, scale, shift in parts])


@torch.no_grad()
def _orthogonal(layer: nn.Module, gain: float) -> None:
    assert isinstance(layer, EnsembleLinear | nn.Linear)
    for weight in layer.weight if isinstance(layer, EnsembleLinear) else [layer.weight]:
        nn.init.orthogonal_(weight, gain)
    nn.init.zeros_(layer.bias)
