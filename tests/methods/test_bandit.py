"""From data to guided samples on a bandit of one action: behaviour N(0.2, 1/4), Q = 1.5 a, so that the guided law is
N(0.575, 1/4).

Small networks, trained for seconds: what is tested is that the parts fit together, and that no target makes guidance
out of the noise network's errors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from closed_forms import GAUSSIAN
from torch import Tensor, nn

from lit_diffrl.diffusion.dpm_vp import sample_dpm_vp, times
from lit_diffrl.diffusion.energy_guidance import guide
from lit_diffrl.diffusion.vp_sde import T_MIN, VPSDE
from lit_diffrl.methods import energy as en
from lit_diffrl.methods.posterior import PosteriorTable
from lit_diffrl.nets.energy import EnergyNet
from lit_diffrl.nets.mlp import MLP
from lit_diffrl.seeding import Draws

SDE, BATCH, BETA, SLOPE = VPSDE(), 512, 1.0, 1.5
SAMPLER = {"steps": 25, "method": "multistep", "grid": "logsnr"}


class SmallNoise(nn.Module):
    """A noise network of two layers: the published one takes four times as long."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP((3, 64, 64, 1), "silu")

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        at = torch.stack([t, SDE.lambda_(t) / 5], dim=-1).expand(len(x), 2)
        out: Tensor = self.net(torch.cat([x, at], dim=-1))
        return out


class Behaviour(NamedTuple):
    net: SmallNoise
    table: PosteriorTable


class Noisy(NamedTuple):
    """A batch: clean actions ``(B, 1)``, times ``(B,)``, noise and noisy actions."""

    a_0: Tensor
    t: Tensor
    eps: Tensor
    a_t: Tensor


OBS = torch.zeros(BATCH, 1)


def batch(generator: torch.Generator) -> Noisy:
    a_0 = 0.2 + 0.5 * torch.randn(BATCH, 1, generator=generator)
    t = T_MIN + (1 - T_MIN) * torch.rand(BATCH, generator=generator)
    eps = torch.randn(BATCH, 1, generator=generator)
    return Noisy(a_0, t, eps, SDE.q_sample(a_0, t, eps))


def train(net: nn.Module, loss: Callable[[torch.Generator], Tensor], steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(generator).backward()
        optimizer.step()
        decay.step()


@pytest.fixture(scope="module")
def behaviour() -> Behaviour:
    torch.manual_seed(0)
    net = SmallNoise()

    def loss(generator: torch.Generator) -> Tensor:
        b = batch(generator)
        return (net(b.a_t, b.t, OBS) - b.eps).square().sum(-1).mean()

    train(net, loss, 3000, 3e-3)
    table = PosteriorTable(1, SDE, bound=2.0, grid=32)
    actions = 0.2 + 0.5 * torch.randn(20_000, 1)
    table.fit(net, torch.zeros(20_000, 1), actions, Draws(), samples=65_536)
    return Behaviour(net, table)


def targets(kind: str, b: Noisy, behaviour: Behaviour) -> Tensor:
    """AEPO's target of the energy ``(B,)``, around the action that was noised."""
    q, g, var = SLOPE * b.a_0[:, 0], torch.full_like(b.a_0, SLOPE), behaviour.table.variance(b.t)
    if kind == "two_cumulant":
        return en.two_cumulant_energy(q, g, var, BETA)
    with torch.no_grad():
        eps = behaviour.net(b.a_t, b.t, OBS)
    if kind == "calibrated":
        mu = behaviour.table.mean(b.a_t, b.t, eps)
    else:
        mu = behaviour.table.implied_mean(b.a_t, b.t, eps)
    return en.analytic_energy(q, g, mu, b.a_0, var, BETA)


@lru_cache
def learned(kind: str, behaviour: Behaviour) -> EnergyNet:
    torch.manual_seed(1)
    net = EnergyNet(1, 1, hidden=64, layers=2)

    def regression(generator: torch.Generator) -> Tensor:
        b = batch(generator)
        return (net(b.a_t, b.t, OBS) - targets(kind, b, behaviour)).square().mean()

    def contrast(generator: torch.Generator) -> Tensor:
        """16 actions in each of 32 states, at one time in each."""
        b = batch(generator)
        t, eps, a_0 = b.t[:32], b.eps.view(32, 16, 1), b.a_0.view(32, 16, 1)
        return en.cep_loss(net(SDE.q_sample(a_0, t, eps), t, OBS[:32]), SLOPE * a_0[..., 0], BETA)

    train(net, contrast if kind == "contrastive" else regression, 1500, 3e-3)
    return net


def sampled(behaviour: Behaviour, energy: EnergyNet, omega: float) -> tuple[float, float]:
    """Mean and standard deviation of guided samples."""
    noise = torch.special.ndtri((torch.arange(4000) + 0.5) / 4000)[:, None]
    obs, at = torch.zeros(4000, 1), times(SDE, **SAMPLER)  # type: ignore[arg-type]
    model = guide(lambda x, t: behaviour.net(x, t, obs), energy.gradient(obs, at), SDE, omega)
    with torch.no_grad():
        x = sample_dpm_vp(model, noise, SDE, **SAMPLER)  # type: ignore[arg-type]
    return x.mean().item(), x.std().item()


def rank_correlation(x: Tensor, y: Tensor) -> float:
    ranks = torch.stack([v.argsort().argsort().double() for v in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("kind", ["calibrated", "two_cumulant", "contrastive"])
def test_trained_guidance_samples_the_tilted_law(behaviour: Behaviour, kind: str) -> None:
    energy = learned(kind, behaviour)
    _, spread = sampled(behaviour, energy, 0.0)
    mean, std = sampled(behaviour, energy, 1.0)
    assert mean == pytest.approx(0.575, abs=0.08)
    assert std == pytest.approx(0.5, abs=0.10)
    assert std < 1.3 * spread
    if kind != "contrastive":  # whose energies are free up to a function of the time
        b = batch(torch.Generator().manual_seed(7))
        with torch.no_grad():
            found = energy(b.a_t, b.t, OBS)
        exact = GAUSSIAN.energy(b.a_t.double(), b.t.double()[:, None], BETA, SLOPE)
        assert rank_correlation(found, exact) > 0.9


def test_the_papers_mean_makes_guidance_out_of_errors(behaviour: Behaviour) -> None:
    """Eq. 18 literally: at large times an error of the noise reaches the energy 150 times as large."""
    literal, calibrated = (learned(kind, behaviour) for kind in ("eps", "calibrated"))
    t = 0.6 + 0.4 * torch.rand(2000, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(1))
    exact = BETA * SLOPE * SDE.alpha(t) * 0.25 / (SDE.alpha(t) ** 2 * 0.25 + SDE.sigma(t) ** 2)

    def error(net: EnergyNet) -> float:
        points = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(points, t, torch.zeros(2000, 1)).sum(), points)
        return float((grad[:, 0] - exact).square().mean().sqrt())

    assert error(literal) > 2 * error(calibrated)
    assert sampled(behaviour, literal, 2.0)[1] > 1.5 * sampled(behaviour, calibrated, 2.0)[1]
