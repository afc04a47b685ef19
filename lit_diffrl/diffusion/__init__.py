"""The mathematics of noising and denoising; knows nothing of reinforcement learning."""

from collections.abc import Callable

from torch import Tensor

from lit_diffrl.diffusion.ddim import sample_ddim
from lit_diffrl.diffusion.ddpm import sample_ddpm
from lit_diffrl.diffusion.dpm_solver import sample_dpm_solver
from lit_diffrl.diffusion.schedules import Schedule

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "dpm_solver": sample_dpm_solver,
}

__all__ = ["SAMPLERS", "Schedule", "sample_ddim", "sample_ddpm", "sample_dpm_solver"]
