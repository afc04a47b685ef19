"""Oracles 10 to 13, 17 and 18 of the policies: expectiles, weights, normalisation, selection, backups."""

from __future__ import annotations

import math

import pytest
import torch
from printed import digits, printed

from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import losses


def expectile(samples: torch.Tensor, tau: float, density: torch.Tensor | None = None) -> float:
    """Minimum of the loss, by Newton's method; samples that count differently scale their errors and its slope."""
    scale = torch.ones_like(samples) if density is None else density.sqrt()
    v = (scale**2 * samples).mean() / (scale**2).mean()
    for _ in range(50):
        v = v.detach().requires_grad_()
        loss = losses.expectile_loss(scale * (samples - v), tau)
        (slope,) = torch.autograd.grad(loss, v)
        weights = torch.where(samples < v, 1 - tau, tau) * scale**2
        v = v - slope / (2 * weights.mean())
    return float(v)


@pytest.mark.parametrize(
    ("tau", "uniform", "normal"),
    [(0.7, "0.604356", "0.337120"), (0.8, "0.666667", "0.549156"), (0.9, "0.750000", "0.861592")],
)
def test_expectiles(tau: float, uniform: str, normal: str) -> None:
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    assert expectile(grid, tau) == digits(uniform)
    assert expectile(grid, 0.5) == pytest.approx(0.5, abs=1e-9)
    # The rare ends of the Gaussian weigh more than points even in probability can tell: points even in x, by density.
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    assert expectile(x, tau, (-x.square() / 2).exp()) == digits(normal)


def test_the_expectile_of_a_coin_and_its_loss() -> None:
    coin = torch.tensor([1.0] + [0.0] * 9, dtype=torch.float64)
    assert expectile(coin, 0.9) == pytest.approx(0.5)
    for u, value in ((1.0, 0.9), (-1.0, 0.1)):
        assert float(losses.expectile_loss(torch.tensor([u]), 0.9)) == pytest.approx(value)


def test_weights_are_bounded_and_carry_no_gradient() -> None:
    advantage = torch.tensor([-1e4, 0.0, 2.995732, 3.0, 1e4], requires_grad=True)
    weights = losses.exponential_weights(advantage, 1.0, 20.0)
    assert not weights.requires_grad
    assert weights.tolist() == pytest.approx([0.0, 1.0, 20.0, 20.0, 20.0], rel=1e-5)
    below, above = losses.exponential_weights(torch.tensor([1.535056, 1.535058]), 3.0, 100.0).tolist()
    assert below < 100 and above == pytest.approx(100)


def test_the_gaussian_surrogate() -> None:
    action = torch.zeros(1, 3, dtype=torch.float64)
    a_hat = torch.tensor([[0.1, -0.2, 0.3]], dtype=torch.float64, requires_grad=True)
    assert float(losses.surrogate_log_prob(action, action)) == digits("-2.756816")
    (-2.0 * losses.surrogate_log_prob(action, a_hat)).sum().backward()
    assert torch.allclose(a_hat.grad, 2.0 * (a_hat - action))  # type: ignore[arg-type]


def test_evidence_weights() -> None:
    linear = losses.elbo_weights(Schedule("linear", 1000), normalize=False)
    assert linear[[0, 1, 2, 999]].tolist() == printed("0.50005 0.272692 0.194402 0.0102045")
    scaled = losses.elbo_weights(Schedule("linear", 1000))
    assert scaled[[0, 1, 2, 999]].tolist() == printed("50.7096 27.6535 19.7141 1.03483")
    vp = losses.elbo_weights(Schedule("vp", 5))
    assert vp[[0, 1, 2, 4]].tolist() == printed("0.474018 0.572143 0.790697 1.941838")
    for kind in ("linear", "linear_unscaled", "vp", "cosine"):
        assert float(losses.elbo_weights(Schedule(kind, 50)).mean()) == pytest.approx(1)
    last = losses.elbo_weights(Schedule("cosine", 50))[-1] / 50
    assert float(last) > 0.9


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_normalised_policy_loss_does_not_know_the_scale_of_the_critic(sign: float) -> None:
    q = (sign * torch.tensor([1.0, 2.0, 5.0])).requires_grad_()
    loss = 2.5 * losses.normalized_q_loss(q)
    assert float(loss) == pytest.approx(-2.5 * sign)
    (gradient,) = torch.autograd.grad(loss, q)
    assert gradient.tolist() == pytest.approx([-2.5 / (3 * 8 / 3)] * 3)
    assert float(2.5 * losses.normalized_q_loss(7 * q)) == pytest.approx(float(loss))
    other = torch.tensor([3.0, 3.0, 3.0])
    assert float(losses.normalized_q_loss(7 * q, 7 * other)) == pytest.approx(float(losses.normalized_q_loss(q, other)))
    assert float(losses.normalized_q_loss(7 * q, other)) == pytest.approx(7 * float(losses.normalized_q_loss(q, other)))


def test_the_best_of_each_critic_comes_before_the_least_of_critics() -> None:
    q = torch.tensor([[[1.0, 5.0]], [[4.0, 2.0]]])
    assert losses.max_backup(q).tolist() == [4.0]
    assert losses.max_backup(q, top_k=2).tolist() == [1.0]


def test_targets_stop_at_terminal_steps_and_shapes_may_not_broadcast() -> None:
    reward, done = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0])
    assert losses.td_target(reward, done, 0.99, torch.tensor([10.0, 10.0])).tolist() == pytest.approx([10.9, 1.0])
    with pytest.raises(ConfigError, match=r"\(2,\), \(2,\) and \(2, 1\)"):
        losses.td_target(reward, done, 0.99, torch.zeros(2, 1))
    with pytest.raises(ConfigError, match="critics, B"):
        losses.td_loss(torch.zeros(2, 4), torch.zeros(2))
    assert float(losses.td_loss(torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.ones(2))) == pytest.approx(1.0)


@pytest.mark.parametrize("reward", [-2.0, -1.0])
def test_a_reward_that_never_ends_is_worth_a_hundred_of_it(reward: float) -> None:
    q = torch.zeros(1, dtype=torch.float64)
    for _ in range(3000):
        q = losses.td_target(torch.full_like(q, reward), torch.zeros_like(q), 0.99, q)
    assert float(q) == pytest.approx(100 * reward)


def test_selection_without_preference_is_uniform_and_at_temperature_0_greedy() -> None:
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    counts = losses.choose_candidates(torch.full((100_000, 8), 3.0), 1.0, uniform).bincount(minlength=8)
    assert float(((counts - 12_500) ** 2 / 12_500).sum()) < 24.3, "chi-squared, 7 degrees of freedom, 0.1 %"
    q = torch.tensor([[0.0, 2.0, 1.0], [1e30, -1e30, 0.0]])
    assert losses.choose_candidates(q, 0.0, torch.zeros(2)).tolist() == [1, 0]
    assert losses.choose_candidates(q, 1.0, torch.tensor([0.999999, 0.999999])).tolist()[1] == 0
    assert int(losses.choose_candidates(torch.zeros(1, 4), 1.0, torch.tensor([1 - 2**-24]))) == 3


def test_indecision_runs_from_the_best_to_chance() -> None:
    alike, apart = torch.full((3, 8), 5.0), torch.tensor([[0.0, 1e4]])
    assert losses.indecision(alike, 1.0).tolist() == pytest.approx([3.0, 3.0])
    assert losses.indecision(apart, 1.0).tolist() == pytest.approx([0.0, 1.0])
    assert losses.indecision(alike, 0.0).tolist() == [0.0, 3.0]
    quarter = torch.tensor([[0.0, math.log(3.0)]])
    assert losses.indecision(2 * quarter, 2.0).tolist() == pytest.approx(
        [-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2), 1.0]
    )
