"""Fast ODE sampling (Lu et al. 2022, "DPM-Solver++: fast solver for guided sampling of diffusion models")."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from lit_diffrl.diffusion.hooks import Denoise, MeanShift, Project, Randn, Shift, rows, unchanged
from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.errors import check_range


def sample_dpm_solver(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    *,
    steps: int | None = None,
    project: Project | None = None,
    shift: Shift | None = None,
    mean_shift: MeanShift | None = None,
    randn: Randn = torch.randn_like,
    order: int = 2,
) -> Tensor:
    """DPM-Solver++(2M), Algorithm 2 of Lu et al. (2022): multistep in ``lambda = log(signal / noise)``.

    The first and the last jump are of order 1. The last leads to ``lambda = inf``, where the order-1 step
    returns the clean prediction itself.

    Args:
        denoise: Clean prediction ``(x_k, k) -> x0_hat``.
        x: Initial noise ``(B, ...)``.
        schedule: Noise schedule.
        steps: Number of network calls, ``1..K`` (None: all K).
        project: Writes the conditions into ``x``.
        shift: Guidance on ``x_k`` before each reverse step; if it takes several, it projects between them.
        mean_shift: Guidance on the result of each reverse step.
        randn: Unused, the solver is deterministic; accepted so that samplers can be exchanged.
        order: 2, or 1 (which is ``sample_ddim``).

    Returns:
        Samples ``x_0``, like ``x``.

    Raises:
        ConfigError: If ``order`` is not 1 or 2 or ``steps`` is out of range.
    """
    check_range("order", order, 1, 2)
    project = project or unchanged
    x = project(x)
    x0_last, h_last = x, math.inf  # an infinite previous step switches the correction off
    for k, k_next in pairwise([*schedule.time_grid(steps), 0]):
        if shift is not None:
            x = project(shift(x, k))
        x0_hat = denoise(x, rows(k, x))
        decay = schedule.value("u", k_next) / schedule.value("u", k)  # exp(-h), h the step in lambda
        h = -math.log(decay) if decay > 0 else math.inf

        # Extrapolate the prediction to the middle of the step
        target = x0_hat
        if order == 2 and math.isfinite(h) and math.isfinite(h_last):
            target = x0_hat + h / (2 * h_last) * (x0_hat - x0_last)

        signal, noise = schedule.value("signal", k_next), schedule.value("noise", k_next)
        mean = signal * (1 - decay) * target + noise / schedule.value("noise", k) * x
        if mean_shift is not None:
            mean = mean_shift(mean, x0_hat, k, schedule.posterior(k, k_next)[2])
        x = project(mean)
        x0_last, h_last = x0_hat, h
    return x
