"""Embeddings of the diffusion step or the noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lit_diffrl.errors import ConfigError


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of a number at geometrically spaced frequencies from 1 down to 1e-4.

    The positional encoding of Vaswani et al. (2017, section 3.5). Frequency ``i`` of ``n = dim / 2`` is
    ``10000^(-i / (n - 1))`` in the layout of DDPM, sines first.
    """

    def __init__(self, dim: int, cosines_first: bool = False, reach_end: bool = True) -> None:
        """Create the embedding.

        Args:
            dim: Size of the embedding: even, at least 4.
            cosines_first: Put the cosines before the sines.
            reach_end: Let the last frequency be 1e-4; otherwise divide the exponent by ``n``, so that it comes
                next.

        Raises:
            ConfigError: For any other ``dim``.
        """
        super().__init__()
        if dim < 4 or dim % 2:
            raise ConfigError(f"embedding size must be an even number >= 4 (sines and cosines), got {dim}")
        self.dim, self.cosines_first, self.reach_end = dim, cosines_first, reach_end

    def forward(self, j: Tensor) -> Tensor:
        """Embed numbers ``j (B,)``, integer or real, as float32 or better ``(B, dim)``."""
        # Computed, not stored: a buffer would be rounded when the network is cast to half precision
        half = self.dim // 2
        dtype = torch.promote_types(j.dtype, torch.float32)
        index = torch.arange(half, device=j.device, dtype=dtype)
        angle = j.to(dtype)[:, None] * torch.exp(index * (-math.log(10000) / (half - self.reach_end)))
        pair = angle.sin(), angle.cos()
        return torch.cat(pair[::-1] if self.cosines_first else pair, dim=-1)


class FourierEmbedding(nn.Module):
    """A number, and sines and cosines of it at random frequencies, drawn once and saved with the network.

    Attributes:
        frequencies: ``(n,)`` standard normal; in turns per unit.
    """

    frequencies: Tensor

    def __init__(self, frequencies: int = 8) -> None:
        """Draw the frequencies.

        Args:
            frequencies: Number of frequencies n.
        """
        super().__init__()
        self.dim = 2 * frequencies + 1
        self.register_buffer("frequencies", torch.randn(frequencies))

    def forward(self, x: Tensor) -> Tensor:
        """Embed numbers ``x (B,)`` as ``(B, 2 n + 1)``: themselves, sines, cosines."""
        angle = 2 * math.pi * x[:, None] * self.frequencies
        return torch.cat([x[:, None], angle.sin(), angle.cos()], dim=-1)
