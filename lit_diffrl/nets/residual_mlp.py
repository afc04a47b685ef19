"""Residual perceptron that denoises single transitions (SynthER, Lu et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_diffrl.errors import check_range
from lit_diffrl.nets.embeddings import FourierEmbedding
from lit_diffrl.nets.linear import Linear


class ResidualDenoiser(nn.Module):
    """Data and noise level are embedded, added, and pass residual blocks ``h + Linear(relu(h))``; no layer norm."""

    def __init__(self, dim: int, width: int = 1024, depth: int = 6, embed: int = 128) -> None:
        """Create the layers.

        Args:
            dim: Entries of a row of data.
            width: Width of the residual blocks; the authors take 1024 or 2048, by dataset.
            depth: Residual blocks.
            embed: Width in which data and noise level are added.

        Raises:
            ConfigError: For a size below 1.
        """
        super().__init__()
        for name, value in {"dim": dim, "width": width, "depth": depth, "embed": embed}.items():
            check_range(f"denoiser.{name}", value, 1)
        self.data = Linear(dim, embed)
        self.fourier = FourierEmbedding()
        self.level = nn.Sequential(Linear(self.fourier.dim, embed), nn.SiLU(), Linear(embed, embed))
        self.widen = Linear(embed, width)
        self.blocks = nn.ModuleList(Linear(width, width) for _ in range(depth))
        self.head = Linear(width, dim)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Map scaled noisy data ``x (B, dim)`` and noise levels ``(B,)``, or ``(1,)`` for all, to ``(B, dim)``."""
        h = self.widen(self.data(x) + self.level(self.fourier(c_noise).to(x.dtype)))
        for block in self.blocks:
            h = h + block(torch.relu(h))
        out: Tensor = self.head(torch.relu(h))
        return out
