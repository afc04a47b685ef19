"""Implicit sampling (Song, Meng and Ermon 2021, "Denoising diffusion implicit models")."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from lit_diffrl.diffusion.hooks import Denoise, MeanShift, Project, Randn, Shift, rows, unchanged
from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.errors import check_range


def sample_ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    *,
    steps: int | None = None,
    project: Project | None = None,
    shift: Shift | None = None,
    mean_shift: MeanShift | None = None,
    randn: Randn = torch.randn_like,
    eta: float = 0.0,
) -> Tensor:
    """Equation 12 of Song et al. (2021), written for a clean prediction.

    Args:
        denoise: Clean prediction ``(x_k, k) -> x0_hat``.
        x: Initial noise ``(B, ...)``.
        schedule: Noise schedule.
        steps: Number of network calls, ``1..K`` (None: all K).
        project: Writes the conditions into ``x``.
        shift: Guidance on ``x_k`` before each reverse step; if it takes several, it projects between them.
        mean_shift: Guidance on the mean of each reverse step.
        randn: Source of the noise when ``eta > 0``.
        eta: Noise in units of the posterior standard deviation: 0 is deterministic, 1 is ``sample_ddpm``.

    Returns:
        Samples ``x_0``, like ``x``.

    Raises:
        ConfigError: If ``eta`` is not in ``[0, 1]`` or ``steps`` is out of range.
    """
    check_range("eta", eta, 0, 1)
    project = project or unchanged
    x = project(x)
    for k, k_next in pairwise([*schedule.time_grid(steps), 0]):
        if shift is not None:
            x = project(shift(x, k))
        x0_hat = denoise(x, rows(k, x))
        var = schedule.posterior(k, k_next)[2]
        sigma = eta * math.sqrt(var)

        # signal' x0_hat + direction * eps_hat, with eps_hat = (x - signal x0_hat) / noise
        direction = math.sqrt(max(1 - schedule.value("alpha_bar", k_next) - sigma**2, 0.0))
        c_x = direction / schedule.value("noise", k)
        c_x0 = schedule.value("signal", k_next) - c_x * schedule.value("signal", k)
        mean = c_x0 * x0_hat + c_x * x
        if mean_shift is not None:
            mean = mean_shift(mean, x0_hat, k, var)
        x = project(mean + sigma * randn(x) if sigma > 0 else mean)
    return x
