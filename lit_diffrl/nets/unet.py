"""Temporal U-Net of Diffuser and the value network made of its down half (Janner et al. 2022, appendix C).

Trajectories ``(B, H, D)`` are convolved over the horizon H with the D entries of a row as channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lit_diffrl.errors import ConfigError, check_range
from lit_diffrl.nets.activations import Mish, mish
from lit_diffrl.nets.embeddings import SinusoidalEmbedding
from lit_diffrl.nets.linear import value_by
from lit_diffrl.nets.mlp import MLP

GROUPS = 8  # of every group norm


class ConvBlock(nn.Sequential):
    """Convolution, group norm over channels and time, Mish."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int) -> None:
        super().__init__(
            nn.Conv1d(channels_in, channels_out, kernel, padding=kernel // 2),
            nn.GroupNorm(GROUPS, channels_out),
            Mish(),
        )


class ResidualBlock(nn.Module):
    """Two convolution blocks with the time embedding added between them, and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, time_dim: int, kernel: int) -> None:
        super().__init__()
        self.block1 = ConvBlock(channels_in, channels_out, kernel)
        self.block2 = ConvBlock(channels_out, channels_out, kernel)
        self.time = nn.Linear(time_dim, channels_out)
        self.shortcut = nn.Conv1d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map ``x (B, C_in, H)`` and the time embedding ``(B, E)`` to ``(B, C_out, H)``."""
        h = self.block1(x) + self.time(time)[:, :, None]
        return self.block2(h) + self.shortcut(x)


class LinearAttention(nn.Module):
    """Residual linear attention over time (Katharopoulos et al. 2020) behind a layer norm over channels."""

    def __init__(self, channels: int, heads: int = 4, head_dim: int = 32) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * heads * head_dim, 1, bias=False)
        self.out = nn.Conv1d(heads * head_dim, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x (B, C, H)`` to the same shape."""
        normed = self.norm(x.transpose(1, 2)).transpose(1, 2)
        query, key, value = self.qkv(normed).unflatten(1, (3, self.heads, self.head_dim)).unbind(1)
        context = torch.einsum("bhdn,bhen->bhde", key.softmax(dim=-1), value)
        attended = torch.einsum("bhde,bhdn->bhen", context, query * self.head_dim**-0.5)
        return x + self.out(attended.flatten(1, 2))


class Level(nn.Module):
    """Two residual blocks and, optionally, attention: one resolution of the way down or up."""

    def __init__(
        self, channels_in: int, channels_out: int, time_dim: int, kernel: int, attention: bool = False
    ) -> None:
        super().__init__()
        self.block1 = ResidualBlock(channels_in, channels_out, time_dim, kernel)
        self.block2 = ResidualBlock(channels_out, channels_out, time_dim, kernel)
        self.attention = LinearAttention(channels_out) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map ``x (B, C_in, H)`` and the time embedding ``(B, E)`` to ``(B, C_out, H)``."""
        return self.attention(self.block2(self.block1(x, time), time))


class Downsample(nn.Conv1d):
    """Convolution that halves the length; one row stays one row."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x (B, C, H)`` to ``(B, C, ceil(H / 2))``."""
        if x.shape[2] == 1:
            # The outer taps meet padding alone; in bfloat16 on a CPU torch leaves their gradient unset.
            return nn.functional.linear(x[:, :, 0], self.weight[:, :, 1], self.bias)[:, :, None]
        return super().forward(x)


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the step index, refined by a network of one hidden layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.sinusoidal = SinusoidalEmbedding(dim)
        self.mlp = MLP((dim, 4 * dim, dim))

    def forward(self, j: Tensor, like: Tensor) -> Tensor:
        """Embed ``j (B,)`` as ``(B, dim)`` in the type of ``like``."""
        return self.mlp(self.sinusoidal(j).to(like.dtype))


class TemporalUNet(nn.Module):
    """U-Net over the time axis of trajectories, for any horizon.

    The horizon is halved from level to level. One that is not a multiple of the total stride
    ``2^(levels - 1)`` is lengthened inside the network by repeating its last row, and the output cut back.
    """

    def __init__(
        self,
        dim_in: int,
        *,
        dim: int = 32,
        mults: Sequence[int] = (1, 2, 4, 8),
        kernel: int = 5,
        attention: bool = False,
    ) -> None:
        """Create the network.

        Args:
            dim_in: Entries D of a trajectory row.
            dim: Base width, also the size of the time embedding.
            mults: Width of each level in units of ``dim``.
            kernel: Odd size of the convolutions.
            attention: Add linear attention at every level (Diffuser does for HalfCheetah).

        Raises:
            ConfigError: If a width is not a multiple of 8 or the kernel is not odd.
        """
        super().__init__()
        widths = _widths(dim, mults, kernel)
        self.stride = 2 ** (len(widths) - 1)
        self.time = TimeEmbedding(dim)
        self.downs = nn.ModuleList(
            Level(c_in, c_out, dim, kernel, attention) for c_in, c_out in pairwise([dim_in, *widths])
        )
        self.downsamples = nn.ModuleList(Downsample(c) for c in widths[:-1])
        self.middle1 = ResidualBlock(widths[-1], widths[-1], dim, kernel)
        self.middle_attention = LinearAttention(widths[-1]) if attention else nn.Identity()
        self.middle2 = ResidualBlock(widths[-1], widths[-1], dim, kernel)
        rising = list(pairwise(widths[::-1]))
        self.ups = nn.ModuleList(Level(2 * c_in, c_out, dim, kernel, attention) for c_in, c_out in rising)
        self.upsamples = nn.ModuleList(nn.ConvTranspose1d(c_out, c_out, 4, stride=2, padding=1) for _, c_out in rising)
        self.head = nn.Sequential(ConvBlock(widths[0], widths[0], kernel), nn.Conv1d(widths[0], dim_in, 1))

    def forward(self, x: Tensor, j: Tensor) -> Tensor:
        """Predict from noisy trajectories.

        Args:
            x: Trajectories ``(B, H, D)``.
            j: Index of the diffusion step, ``k - 1``, shape ``(B,)``.

        Returns:
            Prediction ``(B, H, D)``.
        """
        horizon = x.shape[1]
        missing = -horizon % self.stride
        h = x.transpose(1, 2)
        if missing:
            h = torch.cat([h, h[:, :, -1:].expand(-1, -1, missing)], dim=2)
        time = mish(self.time(j, x))

        skips = []
        for level, downsample in zip(self.downs, [*self.downsamples, nn.Identity()]):
            h = level(h, time)
            skips.append(h)
            h = downsample(h)
        h = self.middle2(self.middle_attention(self.middle1(h, time)), time)
        for level, upsample in zip(self.ups, self.upsamples):  # the skip of the finest level is not used
            h = upsample(level(torch.cat([h, skips.pop()], dim=1), time))
        return self.head(h)[:, :, :horizon].transpose(1, 2)


class ValueUNet(nn.Module):
    """Down half of the U-Net with a scalar head: the value of a noisy trajectory, for one fixed horizon."""

    def __init__(
        self,
        dim_in: int,
        horizon: int,
        *,
        dim: int = 32,
        mults: Sequence[int] = (1, 2, 4, 8),
        kernel: int = 5,
        out_dim: int = 1,
    ) -> None:
        """Create the network.

        Args:
            dim_in: Entries D of a trajectory row.
            horizon: Rows H of a trajectory, any number.
            dim: Base width, also the size of the time embedding.
            mults: Width of each level in units of ``dim``.
            kernel: Odd size of the convolutions.
            out_dim: Values per trajectory.

        Raises:
            ConfigError: If a width is not a multiple of 8, the last one not of 32, or the kernel is not odd.
        """
        super().__init__()
        check_range("horizon", horizon, 1)
        widths = _widths(dim, mults, kernel)
        last = widths[-1]
        if last % (4 * GROUPS):
            raise ConfigError(
                f"the last width of the value network, dim times the last of its mults, must be a multiple of "
                f"{4 * GROUPS}, got {last}: two more blocks halve it"
            )
        self.horizon = horizon
        self.time = TimeEmbedding(dim)
        self.levels = nn.ModuleList(
            [
                *(Level(c_in, c_out, dim, kernel) for c_in, c_out in pairwise([dim_in, *widths])),
                ResidualBlock(last, last // 2, dim, kernel),
                ResidualBlock(last // 2, last // 4, dim, kernel),
            ]
        )
        self.downsamples = nn.ModuleList(Downsample(c) for c in [*widths, last // 2, last // 4])
        for _ in self.downsamples:
            horizon = (horizon - 1) // 2 + 1
        features = last // 4 * horizon
        self.head = MLP((features + dim, features // 2, out_dim))

    def forward(self, x: Tensor, j: Tensor) -> Tensor:
        """Estimate the value of noisy trajectories.

        Args:
            x: Trajectories ``(B, H, D)``.
            j: Index of the diffusion step, ``k - 1``, shape ``(B,)``.

        Returns:
            Values ``(B,)``, or ``(B, out_dim)`` if there are several per trajectory.

        Raises:
            ConfigError: If H is not the network's horizon.
        """
        if x.shape[1] != self.horizon:
            raise ConfigError(
                f"value network built for horizon {self.horizon} got {x.shape[1]} rows; build and "
                "train one for that horizon"
            )
        embedding = self.time(j, x)
        time = mish(embedding)
        h = x.transpose(1, 2)
        for level, downsample in zip(self.levels, self.downsamples):
            h = downsample(level(h, time))
        return value_by(self.head, torch.cat([h.flatten(1), embedding], dim=1))


def _widths(dim: int, mults: Sequence[int], kernel: int) -> list[int]:
    """Channels of each level, checked."""
    widths = [dim * m for m in mults]
    if not widths or any(w < GROUPS or w % GROUPS for w in widths):
        raise ConfigError(f"U-Net widths (dim x mults) must be multiples of {GROUPS}, got {widths}")
    if kernel < 1 or kernel % 2 == 0:
        raise ConfigError(f"U-Net kernel must be an odd positive number, got {kernel}")
    return widths
