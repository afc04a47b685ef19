"""The networks of energy-guided diffusion (CEP, Lu et al. 2023): behaviour noise and intermediate energy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffrl.errors import ConfigError, check_choice, check_range
from lit_diffrl.nets.activations import ACTIVATIONS, mish_backward
from lit_diffrl.nets.blocks import in_blocks
from lit_diffrl.nets.linear import Linear, Map, fixed, linear, value_by
from lit_diffrl.nets.mlp import MLP
from lit_diffrl.nets.noise_net import like_rows
from lit_diffrl.nets.prepared import rounded

PART = 32  # size of the embeddings of time and state in the behaviour network
TOGETHER = 1024  # pairs of time and state up to which the conditions of all fit the cache
ResidualMap = Callable[[Tensor, Tensor], Tensor]


class FourierTime(nn.Module):
    """Sines and cosines of the time at random frequencies, and a linear map of them.

    The frequencies do not learn. They are part of the network, saved with it: with others, it is another function.
    """

    frequencies: Tensor

    def __init__(self, dim: int = 32, scale: float = 30.0) -> None:
        """Draw the frequencies.

        Args:
            dim: Size of the embedding: even.
            scale: Standard deviation of the frequencies.

        Raises:
            ConfigError: For another ``dim``, or a scale that is not positive.
        """
        super().__init__()
        if dim < 2 or dim % 2:
            raise ConfigError(f"embedding size must be an even number >= 2 (sines and cosines), got {dim}")
        check_range("scale of the frequencies", scale, 0, low_open=True)
        self.register_buffer("frequencies", scale * torch.randn(dim // 2))
        self.linear = Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """Embed times ``t (B,)`` as ``(B, dim)``."""
        angle = 2 * math.pi * t.to(self.frequencies.dtype)[:, None] * self.frequencies
        embedded: Tensor = self.linear(torch.cat([angle.sin(), angle.cos()], dim=-1))
        return embedded


class Residual(nn.Module):
    """Two layers beside a shortcut, the condition added between them: ``SiLU(B(SiLU(A x) + c)) + S x``.

    The shortcut S is the identity where the widths agree; elsewhere A and S are one product.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.same = width_in == width_out
        self.inner = Linear(width_in, width_out if self.same else 2 * width_out)
        self.outer = Linear(width_out, width_out)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map ``x (..., in)`` to ``(..., out)`` under a condition that broadcasts to the output."""
        return self._through(self.inner, self.outer, x, condition)

    def given(self) -> ResidualMap:
        """The block as it is now, for a chain."""
        return partial(self._through, self.inner.fixed(), self.outer.fixed())

    def _through(self, inner: Map, outer: Map, x: Tensor, condition: Tensor) -> Tensor:
        h = inner(x)
        h, shortcut = (h, x) if self.same else h.chunk(2, dim=-1)
        # in place on results of SiLU, whose derivative needs its input alone
        return F.silu(outer(F.silu(h).add_(condition))).add_(shortcut)


class BehaviourNet(nn.Module):
    """Noise in an action, given time and state: residual blocks down and up again, with connections across.

    With width 512 the sizes are the published ones: 512, 256, 128, 128, 256, 512. State and time are embedded in 32
    numbers each and reach the trunk only through what they make of them together, one condition for each block.
    The conditions of all blocks are one product, and so are the two maps of a block with a shortcut.
    """

    def __init__(self, obs_dim: int, action_dim: int, width: int = 512) -> None:
        """Create the layers.

        Args:
            obs_dim: Size of the state.
            action_dim: Size of the action.
            width: Width of the outermost blocks; a multiple of 4. The inner ones have half and a quarter.

        Raises:
            ConfigError: For another width.
        """
        super().__init__()
        check_range("width", width, 4)
        if width % 4:
            raise ConfigError(f"width must be a multiple of 4 (the inner blocks have a quarter of it), got {width}")
        half, quarter = width // 2, width // 4
        self.time = FourierTime(PART)
        self.obs = Linear(obs_dim, PART)
        self.embed = MLP((2 * PART, quarter, quarter), "silu")
        sizes = [(action_dim, width), (width, half), (half, quarter), (quarter, quarter)]
        sizes += [(2 * quarter, half), (2 * half, width)]
        self.blocks = nn.ModuleList(Residual(i, o) for i, o in sizes)
        self.widths = [o for _, o in sizes]
        self.condition = Linear(quarter, sum(self.widths))
        self.head = Linear(2 * width, action_dim)

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            x: Noisy actions ``(B, A)``, or ``(B, N, A)`` with N actions in each state.
            t: Times ``(B,)``, or ``(1,)`` if all rows are at the same.
            obs: States ``(B, S)``.

        Returns:
            Predicted noise, like ``x``.
        """
        conditions = self._conditions(self.time(t).expand(len(obs), -1), F.silu(self.obs(obs)))
        return self._trunk(x, conditions, self.blocks, self.head)

    def given(self, obs: Tensor, times: Sequence[float] = ()) -> Callable[[Tensor, Tensor], Tensor]:
        """The network in fixed states as ``(x, t (1,)) -> eps``, for a sampler.

        Args:
            obs: States ``(B, S)``, embedded once.
            times: Times that will be asked for, each for all rows. On a CPU, few states have all conditions computed
                together, many their times' embeddings.
        """
        of_obs = F.silu(self.obs(obs))
        few = len(times) * len(obs) <= TOGETHER

        def prepare(t: Tensor) -> Tensor:
            """What is known of times before ``x``, ``(len(t), ...)``."""
            if not few:
                return self.time(t)  # type: ignore[no-any-return]
            pairs = self.time(t).repeat_interleave(len(obs), 0), of_obs.repeat(len(t), 1)
            return self._conditions(*pairs).unflatten(0, (len(t), -1))

        table = _by_time(prepare, times, obs)
        blocks = [block.given() for block in self.blocks]  # type: ignore[operator]
        trunk = partial(self._trunk, blocks=blocks, head=self.head.fixed())

        def predict(x: Tensor, t: Tensor) -> Tensor:
            known = _looked_up(table, prepare, t)
            conditions = known[0] if few else self._conditions(known.expand(len(of_obs), -1), of_obs)
            return in_blocks(trunk, x, conditions)

        return predict

    def _conditions(self, of_time: Tensor, of_obs: Tensor) -> Tensor:
        """What is added in the blocks, side by side, for rows of embedded times and states."""
        conditions: Tensor = self.condition(F.silu(self.embed(torch.cat([of_time, of_obs], dim=-1))))
        return conditions

    def _trunk(self, x: Tensor, conditions: Tensor, blocks: Iterable[ResidualMap], head: Map) -> Tensor:
        down1, down2, down3, middle, up2, up1 = blocks
        c1, c2, c3, c4, c5, c6 = like_rows(conditions, x).split(self.widths, dim=-1)
        d1 = down1(x, c1)
        d2 = down2(d1, c2)
        d3 = down3(d2, c3)
        u2 = up2(torch.cat([d3, middle(d3, c4)], dim=-1), c5)
        u1 = up1(torch.cat([d2, u2], dim=-1), c6)
        return head(torch.cat([d1, u1], dim=-1))


class EnergyNet(nn.Module):
    """Energy of a noisy action, given time and state: a perceptron (``E_phi`` of AEPO, ``f_phi`` of CEP)."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: int = 256,
        layers: int = 3,
        activation: str = "silu",
        time_dim: int = 32,
    ) -> None:
        """Create the layers.

        Args:
            obs_dim: Size of the state.
            action_dim: Size of the action.
            hidden: Width of the hidden layers.
            layers: Number of hidden layers.
            activation: ``silu``, ``mish`` or ``relu``.
            time_dim: Size of the time's embedding: even.

        Raises:
            ConfigError: For an unknown activation or a size out of range.
        """
        super().__init__()
        check_range("hidden layers", layers, 1)
        check_choice("activation", activation, ACTIVATIONS)
        self.activation = activation
        self.time = FourierTime(time_dim)
        self.net = MLP((action_dim + time_dim + obs_dim, *[hidden] * layers, 1), activation)
        self.columns = [action_dim, time_dim, obs_dim]

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        """Energies, larger where the guided policy is denser than the behaviour.

        Args:
            x: Noisy actions ``(B, A)``, or ``(B, N, A)`` with N actions in each state.
            t: Times ``(B,)``, or ``(1,)`` if all rows are at the same.
            obs: States ``(B, S)``.

        Returns:
            ``(B,)`` or ``(B, N)``, float32 or better.
        """
        of_action, _, of_obs = self._first()
        h = linear(x, of_action) + like_rows(self._time_part(t) + linear(obs, of_obs), x)
        _, *layers = self.net
        return value_by(layers, h)

    def gradient(self, obs: Tensor, times: Sequence[float] = ()) -> Callable[[Tensor, Tensor], Tensor]:
        """The gradient with respect to the action in fixed states, as ``(x, t (1,)) -> grad like x``, for a sampler.

        Written out, layer by layer: it needs no autograd, so it works in inference mode, and the weights' ``.grad``
        stay as they are. It costs one pass forwards and one back.

        Args:
            obs: States ``(B, S)``. What they add to the first layer is computed once.
            times: Times that will be asked for, each for all rows. On a CPU they are embedded together.
        """
        first, *middle, last = self._layers()
        actions = slice(self.columns[0])
        with torch.no_grad():
            table = _by_time(self._time_part, times, obs)
            of_obs = linear(obs, self._first()[2])
            of_action = fixed(first.weight, view=lambda w: w[:, actions])
            to_action = fixed(first.weight, view=lambda w: w[:, actions].t())
            onwards = [layer.fixed() for layer in middle]
            backwards = [fixed(layer.weight, view=torch.t) for layer in reversed(middle)]
            value, back = ACTIVATIONS[self.activation](), SLOPES[self.activation]

        @torch.no_grad()
        def gradient(x: Tensor, t: Tensor) -> Tensor:
            z = of_action(x) + like_rows(_looked_up(table, self._time_part, t) + of_obs, x)
            inputs = []  # of the activations
            for layer in onwards:
                inputs.append(z)
                z = layer(value(z))
            grad = back(last.weight.to(z.dtype)[0].expand_as(z), z)
            for layer, z in zip(backwards, reversed(inputs)):
                grad = back(layer(grad), z)
            return to_action(grad).to(x.dtype)

        return gradient

    def _layers(self) -> list[Linear]:
        return [layer for layer in self.net if isinstance(layer, Linear)]

    def _first(self) -> Sequence[Tensor]:
        """The first layer's columns for action, time and state."""
        return rounded(self._layers()[0].weight).split(self.columns, dim=1)

    def _time_part(self, t: Tensor) -> Tensor:
        """What times add to the first layer, with its bias."""
        return linear(self.time(t), self._first()[1], self._layers()[0].bias)


def _by_time(embed: Callable[[Tensor], Tensor], times: Sequence[float], like: Tensor) -> dict[float, Tensor]:
    """What becomes of each time, computed together; nothing on a GPU, where looking a time up would wait for it."""
    if not times or like.device.type != "cpu":
        return {}
    t = torch.tensor(times, dtype=torch.promote_types(like.dtype, torch.float32))
    return dict(zip(t.tolist(), embed(t).split(1)))


def _looked_up(table: dict[float, Tensor], embed: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    known = table.get(t.item()) if table and len(t) == 1 else None
    return embed(t) if known is None else known


SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "mish": mish_backward,
    "relu": lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0),  # type: ignore[no-untyped-call]
}
"""``(gradient of an activation's value, what it was applied to) -> gradient of the latter``."""
