"""Energies learnt from a learnt behaviour model, by small networks on a bandit whose policy is known (oracle 26)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from closed_forms import GAUSSIAN, SDE
from torch import Tensor, nn

from lit_diffrl.diffusion.dpm_vp import sample_dpm_vp
from lit_diffrl.diffusion.energy_guidance import gradient_of, guide
from lit_diffrl.diffusion.vp_sde import T_MIN
from lit_diffrl.methods.energy import analytic_energy
from lit_diffrl.methods.posterior import PosteriorTable
from lit_diffrl.seeding import Draws

SLOPE = 1.5  # of Q; behaviour N(0.2, 0.25), so that beta 1 asks for N(0.575, 0.25)


class Net(nn.Module):
    """A number for a noisy action ``(B, 1)`` and its time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor, t: Tensor, obs: Tensor | None = None) -> Tensor:
        t = t.expand(len(x))[:, None]
        out: Tensor = self.net(torch.cat([x, t, SDE.alpha(t), SDE.sigma(t)], dim=1))
        return out


def train(
    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], updates: int, lr: float, alpha2: bool = False
) -> Net:
    """Adam on the squared error to ``target(a_0, a_t, t, eps)``, actions drawn afresh; weighed by time or not."""
    torch.manual_seed(1)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        a_0, eps = 0.2 + 0.5 * torch.randn(256, 1), torch.randn(256, 1)
        t = T_MIN + (1 - T_MIN) * torch.rand(256)
        a_t = SDE.q_sample(a_0, t, eps)
        optimizer.zero_grad()
        error = (net(a_t, t) - target(a_0, a_t, t, eps)).square()
        (error * SDE.alpha(t)[:, None].square() if alpha2 else error).mean().backward()
        optimizer.step()
        decay.step()
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def behaviour() -> Net:
    return train(lambda a_0, a_t, t, eps: eps, 2500, 5e-3)


def energy(behaviour: Net, mean: str, alpha2: bool = False) -> Net:
    """AEPO's, for a Q that is known."""
    action = 0.2 + 0.5 * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    table = PosteriorTable(1, SDE, mean_estimator="eps" if mean == "eps" else "calibrated", bound=3.0, grid=32)
    table.fit(behaviour, torch.zeros_like(action), action, Draws(), samples=8192)

    def target(a_0: Tensor, a_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        mu = a_0 if mean == "sample" else table.mean(a_t, t, behaviour(a_t, t))
        q, g = SLOPE * a_0[:, 0], torch.full_like(a_0, SLOPE)
        return analytic_energy(q, g, mu, a_0, table.variance(t), 1.0)[:, None]

    return train(target, 2000, 2e-3, alpha2)


@pytest.fixture(scope="module")
def literal(behaviour: Net) -> Net:
    return energy(behaviour, "eps")


def law(behaviour: Net, net: Net, omega: float, t_max: float = 1.0) -> tuple[float, float]:
    """Mean and standard deviation of what is sampled, from an even cover of the noise."""
    noise = torch.special.ndtri((torch.arange(4000) + 0.5) / 4000)[:, None]
    model = guide(behaviour, gradient_of(lambda x, t: net(x, t)[:, 0]), SDE, omega, t_max=t_max)
    x = sample_dpm_vp(model, noise, SDE, steps=25, method="multistep", grid="logsnr")
    return float(x.mean()), float(x.std())


def rank_correlation(net: Net) -> float:
    """Spearman's, of the energy with the exact one at noised actions of all times."""
    generator = torch.Generator().manual_seed(2)
    a_0, eps = torch.randn(2, 512, 1, generator=generator)
    t = T_MIN + (1 - T_MIN) * torch.rand(512, generator=generator)
    a_t = SDE.q_sample(0.2 + 0.5 * a_0, t, eps)
    exact = torch.stack([GAUSSIAN.energy(x[None].double(), float(s), 1.0, SLOPE).squeeze() for x, s in zip(a_t, t)])
    ranks = [x.flatten().argsort().argsort().double() for x in (net(a_t, t), exact)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def gradient_error(net: Net, low: float, high: float) -> float:
    """Root mean squared error of the energy's slope at noised actions of times between two."""
    generator = torch.Generator().manual_seed(3)
    a_0, eps = torch.randn(2, 2048, 1, generator=generator)
    t = low + (high - low) * torch.rand(2048, generator=generator)
    a_t = SDE.q_sample(0.2 + 0.5 * a_0, t, eps)
    alpha, sigma = SDE.alpha(t)[:, None], SDE.sigma(t)[:, None]
    exact = SLOPE * 0.25 * alpha / (0.25 * alpha**2 + sigma**2)
    found = gradient_of(lambda x, t: net(x, t)[:, 0])(a_t, t)
    return float((found - exact).square().mean().sqrt())


@pytest.mark.parametrize("mean", ["calibrated", "sample"])
def test_a_learnt_energy_leads_to_the_guided_policy(behaviour: Net, mean: str) -> None:
    net = energy(behaviour, mean)
    unguided, guided = law(behaviour, net, 0.0), law(behaviour, net, 1.0)
    assert unguided == pytest.approx((0.2, 0.5), abs=0.03)
    assert guided == (pytest.approx(0.575, abs=0.08), pytest.approx(0.5, abs=0.1))
    assert guided[1] < 1.3 * unguided[1]
    assert rank_correlation(net) > 0.9
    assert gradient_error(net, 0, 0.4) < 0.1 and gradient_error(net, 0.6, 1) < 0.03
    assert law(behaviour, net, 2.0) == (pytest.approx(0.95, abs=0.16), pytest.approx(0.5, abs=0.16))


def test_the_papers_mean_hands_errors_of_the_noise_on_to_the_energy(behaviour: Net, literal: Net) -> None:
    """Why the mean is calibrated: guidance by the literal one widens the policy, and ranks actions worse."""
    assert law(behaviour, literal, 1.0)[1] > 1.3 * law(behaviour, literal, 0.0)[1]
    assert rank_correlation(literal) < 0.9
    assert gradient_error(literal, 0.6, 1) > 10 * 0.03
    assert law(behaviour, literal, 2.0)[1] > 1.5


def test_no_guidance_at_high_noise_and_less_weight_there_repair_the_papers_mean(behaviour: Net, literal: Net) -> None:
    late, weighed = law(behaviour, literal, 1.0, t_max=0.6), energy(behaviour, "eps", alpha2=True)
    assert late == (pytest.approx(0.575, abs=0.08), pytest.approx(0.5, abs=0.15))
    assert law(behaviour, literal, 2.0, t_max=0.6) == (pytest.approx(0.95, abs=0.2), pytest.approx(0.65, abs=0.2))
    assert gradient_error(weighed, 0.6, 1) < 0.5 * gradient_error(literal, 0.6, 1)
    assert rank_correlation(literal) < rank_correlation(weighed)
    for omega in (1.0, 2.0):
        assert law(behaviour, weighed, omega)[1] < 0.7 * law(behaviour, literal, omega)[1]
