"""What a sampler is given: the denoiser and the hooks that steer it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""``(x_k (B, ...), k int64 (B,)) -> x0_hat (B, ...)``; any clamp of the prediction belongs in here."""

Project = Callable[[Tensor], Tensor]
"""``x -> x`` with the conditions written in: after the first draw, each ``shift`` and each reverse step."""

Shift = Callable[[Tensor, int], Tensor]
"""``(x_k, k) -> x_k``: guidance on the noisy input before the reverse step (the order of Diffuser's code)."""

MeanShift = Callable[[Tensor, Tensor, int, float], Tensor]
"""``(mean, x0_hat, k, var) -> mean``: guidance on the mean of the reverse step (the order of the papers).

``var`` is the posterior variance of the jump for every sampler (or ``beta``, if ``sample_ddpm`` is told so):
a guide scale keeps its meaning when the sampler is exchanged. It is 0 for the last jump.
"""

Randn = Callable[[Tensor], Tensor]
"""``x -> standard normal noise like x``, by default ``torch.randn_like``."""


def unchanged(x: Tensor) -> Tensor:
    """The projection of an unconditional sampler."""
    return x


def rows(k: int, x: Tensor) -> Tensor:
    """Step ``k`` for each row of ``x``, int64 of shape ``(B,)`` on its device."""
    return torch.full((x.shape[0],), k, dtype=torch.int64, device=x.device)
