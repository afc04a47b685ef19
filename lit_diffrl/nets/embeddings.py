"""Embedding of the diffusion step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lit_diffrl.errors import ConfigError


class SinusoidalEmbedding(nn.Module):
    """Sines, then cosines, of a number at geometrically spaced frequencies from 1 to 1e-4.

    The positional encoding of Vaswani et al. (2017, section 3.5) in the layout of DDPM: frequency ``i`` of
    ``n = dim / 2`` is ``10000^(-i / (n - 1))``.
    """

    def __init__(self, dim: int) -> None:
        """Create the embedding.

        Args:
            dim: Size of the embedding: even, at least 4.

        Raises:
            ConfigError: For any other ``dim``.
        """
        super().__init__()
        if dim < 4 or dim % 2:
            raise ConfigError(f"embedding size must be an even number >= 4 (sines and cosines), got {dim}")
        self.dim = dim

    def forward(self, j: Tensor) -> Tensor:
        """Embed numbers ``j (B,)``, integer or real, as float32 ``(B, dim)``."""
        # Computed, not stored: a buffer would be rounded when the network is cast to half precision
        index = torch.arange(self.dim // 2, device=j.device, dtype=torch.float32)
        angle = j.float()[:, None] * torch.exp(index * (-math.log(10000) / (self.dim // 2 - 1)))
        return torch.cat([angle.sin(), angle.cos()], dim=-1)
