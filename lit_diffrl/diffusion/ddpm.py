"""Ancestral sampling (Ho, Jain and Abbeel 2020, "Denoising diffusion probabilistic models")."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lit_diffrl.diffusion.hooks import Denoise, MeanShift, Project, Randn, Shift, rows, unchanged
from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.errors import check_choice


def sample_ddpm(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    *,
    steps: int | None = None,
    project: Project | None = None,
    shift: Shift | None = None,
    mean_shift: MeanShift | None = None,
    randn: Randn = torch.randn_like,
    variance: Literal["posterior", "beta"] = "posterior",
    final_noise: bool = False,
) -> Tensor:
    """Algorithm 2 of Ho et al. (2020), over all or fewer steps.

    Args:
        denoise: Clean prediction ``(x_k, k) -> x0_hat``.
        x: Initial noise ``(B, ...)``.
        schedule: Noise schedule.
        steps: Number of network calls, ``1..K`` (None: all K). Fewer steps sample the posterior of each jump.
        project: Writes the conditions into ``x``.
        shift: Guidance on ``x_k`` before each reverse step; if it takes several, it projects between them.
        mean_shift: Guidance on the mean of each reverse step.
        randn: Source of the noise of each reverse step, drawn for the whole batch.
        variance: Of the noise: that of the ``posterior``, or the forward step's ``beta`` (their section 3.2).
        final_noise: Also add noise, of variance ``beta``, at the last step, where the posterior has none.

    Returns:
        Samples ``x_0``, like ``x``.

    Raises:
        ConfigError: For an unknown ``variance``, or ``steps`` out of range.
    """
    check_choice("variance", variance, ("posterior", "beta"))
    project = project or unchanged
    x = project(x)
    for k, k_next in pairwise([*schedule.time_grid(steps), 0]):
        if shift is not None:
            x = project(shift(x, k))

        # Mean of q(x_next | x_k, x0_hat)
        x0_hat = denoise(x, rows(k, x))
        c1, c2, var = schedule.posterior(k, k_next)
        if variance == "beta" and k_next > 0:
            var = schedule.jump_beta(k, k_next)
        mean = c1 * x0_hat + c2 * x
        if mean_shift is not None:
            mean = mean_shift(mean, x0_hat, k, var)

        if k_next == 0 and final_noise:
            var = schedule.jump_beta(k, k_next)
        x = project(mean + math.sqrt(var) * randn(x) if var > 0 else mean)
    return x
