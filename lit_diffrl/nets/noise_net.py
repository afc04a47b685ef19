"""The network of a diffusion policy: the noise in an action, given the diffusion step and the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_diffrl.errors import check_choice, check_range
from lit_diffrl.nets.blocks import in_blocks
from lit_diffrl.nets.embeddings import SinusoidalEmbedding
from lit_diffrl.nets.linear import Linear, Map, linear
from lit_diffrl.nets.mlp import MLP
from lit_diffrl.nets.prepared import rounded


class Layout(NamedTuple):
    """How a published network lays its input out.

    Args:
        cosines_first: Order in the step's embedding.
        reach_end: Whether the embedding's last frequency is 1e-4.
        columns: Order of the first layer's input.
    """

    cosines_first: bool
    reach_end: bool
    columns: tuple[str, str, str]


LAYOUTS = {
    "dql": Layout(False, True, ("action", "time", "obs")),
    "edp": Layout(True, False, ("obs", "action", "time")),
    "cleandiffuser": Layout(True, False, ("action", "time", "obs")),
}


class NoiseNet(nn.Module):
    """Perceptron on the noisy action, an embedding of the step and the state (Diffusion-QL, appendix B).

    The step is embedded in sines and cosines, which pass two layers; a Mish follows every hidden layer. The first
    layer is linear in each part of its input: where the parts have different leading shapes (one step for all rows,
    several actions in one state), each part is multiplied once by its own columns.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: int = 256,
        layers: int = 3,
        time_dim: int = 16,
        embedding: Literal["dql", "edp", "cleandiffuser"] = "dql",
        layer_norm: bool = False,
        init: Literal["torch", "lecun"] = "torch",
    ) -> None:
        """Create the layers.

        Args:
            obs_dim: Size of the state.
            action_dim: Size of the action.
            hidden: Width of the hidden layers.
            layers: Number of hidden layers.
            time_dim: Size of the step's embedding: even, at least 4. CleanDiffuser has 64.
            embedding: Layout of embedding and input, as in Diffusion-QL's, EDP's or CleanDiffuser's code. It matters
                only for weights that come from there.
            layer_norm: Normalise each hidden layer before its activation.
            init: ``torch``, or EDP's ``lecun``: truncated normal weights of variance ``1 / width_in``, no bias.

        Raises:
            ConfigError: For an unknown layout or initialisation, or a size out of range.
        """
        super().__init__()
        check_choice("embedding", embedding, LAYOUTS)
        check_choice("init", init, ("torch", "lecun"))
        check_range("hidden layers", layers, 1)
        layout = LAYOUTS[embedding]
        self.embedding = SinusoidalEmbedding(time_dim, layout.cosines_first, layout.reach_end)
        self.time = MLP((time_dim, 2 * time_dim, time_dim))
        widths = {"action": action_dim, "time": time_dim, "obs": obs_dim}
        self.columns = _columns(layout.columns, widths)
        self.net = MLP((sum(widths.values()), *[hidden] * layers, action_dim), layer_norm=layer_norm)
        if init == "lecun":
            self.apply(_lecun)

    def forward(self, x: Tensor, k: Tensor, obs: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            x: Noisy actions ``(B, A)``, or ``(B, N, A)`` with N actions in each state.
            k: 0-based diffusion steps, integer or real: ``(B,)``, or ``(1,)`` if all rows are at the same.
            obs: States ``(B, S)``.

        Returns:
            Predicted noise, like ``x``.
        """
        if x.shape[:-1] == k.shape == obs.shape[:-1]:
            parts = {"action": x, "time": self._time(k), "obs": obs}
            out: Tensor = self.net(torch.cat([parts[name] for name in self.columns], dim=-1))
            return out
        return self._joined(x, self._time_part(k), self._part("obs", obs), list(self.net)[1:])

    def given(self, obs: Tensor, steps: Sequence[float] = ()) -> Callable[[Tensor, Tensor], Tensor]:
        """The network in fixed states as ``(x, k) -> eps``, for a sampler.

        Args:
            obs: States ``(B, S)``. What they add to the first layer is computed once.
            steps: 0-based steps that will be asked for, each for all rows. On a CPU they are embedded together, since
                one by one their many small operations cost a tenth of a call.
        """
        of_obs = self._part("obs", obs)
        table: dict[float, Tensor] = {}
        if steps and obs.device.type == "cpu":
            k = torch.tensor(steps, dtype=torch.promote_types(obs.dtype, torch.float32))
            table = dict(zip(k.tolist(), self._time_part(k).split(1)))

        layers = [layer.fixed() if isinstance(layer, Linear) else layer for layer in list(self.net)[1:]]
        joined = partial(self._joined, layers=layers)

        def predict(x: Tensor, k: Tensor) -> Tensor:
            known = table.get(k.item()) if table and len(k) == 1 else None
            of_time = self._time_part(k) if known is None else known
            return in_blocks(joined, x, of_time.expand(len(x), -1), of_obs)

        return predict

    @property
    def _first(self) -> Linear:
        layer = self.net[0]
        assert isinstance(layer, Linear)
        return layer

    def _time(self, k: Tensor) -> Tensor:
        dtype = self._first.weight.dtype
        embedded = self.embedding(k.to(torch.promote_types(dtype, torch.float32)))
        time: Tensor = self.time(embedded.to(dtype))
        return time

    def _part(self, name: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, rounded(self._first.weight)[:, self.columns[name]], bias)

    def _time_part(self, k: Tensor) -> Tensor:
        return self._part("time", self._time(k), self._first.bias)

    def _joined(self, x: Tensor, of_time: Tensor, of_obs: Tensor, layers: Sequence[Map]) -> Tensor:
        """The network from actions and the other parts of the first layer; ``layers`` are those after it."""
        others = like_rows(of_time, x) + like_rows(of_obs, x)
        if x.dim() == 2:
            h = torch.addmm(others, x, rounded(self._first.weight)[:, self.columns["action"]].t())
        else:
            h = self._part("action", x).add_(others)
        for layer in layers:
            h = layer(h)
        return h


def _columns(names: Sequence[str], widths: dict[str, int]) -> dict[str, slice]:
    """Which columns of the first layer belong to which part of its input."""
    columns, start = {}, 0
    for name in names:
        columns[name] = slice(start, start + widths[name])
        start += widths[name]
    return columns


def like_rows(part: Tensor, x: Tensor) -> Tensor:
    """``part (B, H)`` or ``(1, H)`` with as many axes as ``x (B, ..., A)``."""
    return part.reshape(part.shape[0], *[1] * (x.dim() - part.dim()), *part.shape[1:])


def _lecun(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        # 0.8796 is the standard deviation of a standard normal cut at +-2
        std = module.in_features**-0.5 / 0.87962566
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(module.bias)
