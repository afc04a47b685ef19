"""A policy that draws actions by denoising them: what EDP and Diffusion-QL train, each with its own improvement.

Sources: Diffusion-QL (Wang et al. 2023, section 3); EDP (Kang et al. 2023, Eqs. 5 and 9, section 3.3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_diffrl.diffusion import sample_ddim, sample_ddpm
from lit_diffrl.diffusion.dpm_ode import clip_eps, plan, sample_dpm_ode
from lit_diffrl.diffusion.hooks import Randn
from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.methods.policy_options import ActionSamplerOptions, NoiseNetOptions
from lit_diffrl.nets.noise_net import NoiseNet
from lit_diffrl.nets.prepared import prepared_once
from lit_diffrl.seeding import Draws


class Noised(NamedTuple):
    """Actions at random diffusion steps and the network's answer, from which all losses of an update are made.

    Args:
        k: ``(B,)`` diffusion steps, 1..K.
        a_k: ``(B, A)`` noised actions.
        eps_hat: ``(B, A)`` predicted noise.
        error: ``(B,)`` squared error of the noise, mean over the action's entries (Eq. 5).
    """

    k: Tensor
    a_k: Tensor
    eps_hat: Tensor
    error: Tensor


class DiffusionPolicy(nn.Module):
    """A noise network over actions in [-1, 1], given the state.

    The network is fed the index of the code, ``k - 1``, 0 for the least noise.
    """

    def __init__(self, obs_dim: int, action_dim: int, schedule: Schedule, options: NoiseNetOptions) -> None:
        """Create the network.

        Args:
            obs_dim: Size of the state.
            action_dim: Size of the action.
            schedule: Noise schedule.
            options: The network's.
        """
        super().__init__()
        self.schedule = schedule
        self.net = NoiseNet(
            obs_dim,
            action_dim,
            hidden=options.hidden,
            layers=options.layers,
            time_dim=options.time_dim,
            embedding=options.embedding,
            layer_norm=options.layer_norm,
            init=options.init,
        )

    def noised(self, action: Tensor, obs: Tensor, draws: Draws) -> Noised:
        """Noise actions to random steps and predict the noise (Eq. 5): one network call.

        Args:
            action: ``(B, A)`` in [-1, 1].
            obs: ``(B, S)``.
            draws: Source of the steps and of the noise.
        """
        k = draws.randint(1, self.schedule.num_steps + 1, action)
        eps = draws.randn_like(action)
        a_k = self.schedule.q_sample(action, k, eps)
        eps_hat = self.net(a_k, k - 1, obs)
        return Noised(k, a_k, eps_hat, (eps - eps_hat).float().square().mean(-1))

    def approximate(self, noised: Noised, *, clip: bool = True) -> Tensor:
        """EDP's Eq. 9: the clean action ``(B, A)`` that the prediction implies, clipped to the box.

        The clip is the code's; without it the critic is asked far outside of the box at large k. Entries that it
        touches pass no gradient.
        """
        a_hat = self.schedule.x0_from_eps(noised.a_k, noised.k, noised.eps_hat)
        return a_hat.clamp(-1, 1) if clip else a_hat

    @prepared_once()
    def sample(
        self, obs: Tensor, noise: Tensor, options: ActionSamplerOptions, randn: Randn = torch.randn_like
    ) -> Tensor:
        """Draw actions; gradients pass through every network call.

        Args:
            obs: ``(B, S)``.
            noise: Standard normal, ``(B, A)`` or, for N candidates of each state, ``(B, N, A)``.
            options: The sampler.
            randn: Source of the noise of ``ddpm``'s reverse steps.

        Returns:
            Actions like ``noise``, in [-1, 1].
        """
        schedule, scale = self.schedule, options.eps_scale
        x = options.noise_scale * noise
        if options.name == "dpm":
            steps = options.calls(schedule.num_steps)
            o = options
            calls = plan(schedule.kind, schedule.num_steps, steps, o.order, o.method, o.grid, variant=o.variant)
            net = self.net.given(obs, [*(call.k for call in calls), *([0.0] if o.final_denoise else [])])

            def eps_model(x: Tensor, k: Tensor) -> Tensor:
                eps = scale * net(x, k).to(x.dtype)
                return clip_eps(x, eps, schedule, k) if options.clip else eps

            x = sample_dpm_ode(
                eps_model, x, schedule, steps=steps, order=o.order, method=o.method, grid=o.grid, variant=o.variant
            )
            if o.final_denoise:
                last = torch.ones(1, dtype=torch.int64, device=x.device)  # t_end = 1/K
                x = schedule.x0_from_eps(x, last, eps_model(x, torch.zeros_like(last, dtype=x.dtype)))
            return x.clamp(-1, 1)

        net = self.net.given(obs, [k - 1 for k in schedule.time_grid(options.steps)])

        def denoise(x: Tensor, k: Tensor) -> Tensor:
            one = k[:1]  # all rows are at this step, whose embedding is computed once
            x0_hat = schedule.x0_from_eps(x, one, scale * net(x, one - 1).to(x.dtype))
            return x0_hat.clamp(-1, 1) if options.clip else x0_hat

        if options.name == "ddim":
            return sample_ddim(denoise, x, schedule, steps=options.steps, randn=randn).clamp(-1, 1)
        x = sample_ddpm(denoise, x, schedule, steps=options.steps, randn=randn, variance=options.variance)
        return x.clamp(-1, 1)
