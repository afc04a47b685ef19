"""Actors: densities against torch.distributions, bounds, sizes (oracle 9)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as D

from lit_diffrl.nets.actors import (
    DeterministicActor,
    GaussianActor,
    SquashedGaussianActor,
    gaussian_log_prob,
    squash,
    squashed_log_prob,
)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("obs", "action", "size"), [(17, 6, 71942), (11, 3, 69635), (29, 8, 75528)], ids=["halfcheetah", "hopper", "ant"]
)
def test_the_deterministic_actor_has_the_size_of_td3bc(obs: int, action: int, size: int) -> None:
    actor = DeterministicActor(obs, action)
    assert count(actor) == size
    out = actor(50 * torch.randn(200, obs))
    assert out.shape == (200, action) and float(out.abs().max()) <= 1


def test_gaussian_densities_are_those_of_torch() -> None:
    torch.manual_seed(0)
    mean, log_std, x = torch.randn(3, 5, 4, dtype=torch.float64)
    expected = D.Independent(D.Normal(mean, log_std.exp()), 1).log_prob(x)
    torch.testing.assert_close(gaussian_log_prob(x, mean, log_std), expected)


@pytest.mark.parametrize("shape", [(5, 4), (5, 7, 4)])
def test_squashed_densities_are_those_of_torch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    mean, log_std = torch.randn(2, 5, 4, dtype=torch.float64)
    noise = torch.randn(shape, dtype=torch.float64)
    action, log_prob = squash(mean, log_std, noise)
    if noise.dim() == 3:
        mean, log_std = mean[:, None], log_std[:, None]
    normal = D.Normal(mean, log_std.exp())
    squashed = D.TransformedDistribution(normal, D.TanhTransform(cache_size=1))
    u = mean + log_std.exp() * noise
    torch.testing.assert_close(action, u.tanh())
    expected = (normal.log_prob(u) - D.TanhTransform().log_abs_det_jacobian(u, u.tanh())).sum(-1)
    torch.testing.assert_close(log_prob, expected)
    inner = u.abs() < 3
    assert bool(inner.any())
    each = squashed.log_prob(action.clamp(-1 + 1e-12, 1 - 1e-12))[inner]
    torch.testing.assert_close(each, (normal.log_prob(u) - torch.log1p(-action.square()))[inner])


def test_squashed_densities_stay_finite_where_tanh_is_flat() -> None:
    mean = torch.tensor([[30.0], [-30.0]], requires_grad=True)
    action, log_prob = squash(mean, torch.zeros(2, 1), torch.zeros(2, 1))
    assert action.flatten().tolist() == [1.0, -1.0]
    # ln(1 - tanh(u)^2) = ln 4 - 2 |u| for large |u|
    assert log_prob.tolist() == pytest.approx([-0.9189385 + 60 - 1.3862944] * 2)
    log_prob.sum().backward()
    assert mean.grad is not None and mean.grad.flatten().tolist() == pytest.approx([2.0, -2.0])


def test_one_deviation_for_all_states_or_one_for_each() -> None:
    torch.manual_seed(0)
    obs = torch.randn(6, 3)
    shared, own = GaussianActor(3, 2, hidden=16, shared_std=True), GaussianActor(3, 2, hidden=16)
    assert bool((shared(obs)[1] == 0).all()), "begins with a deviation of 1"
    assert float(own(obs)[1].std(dim=0).min()) > 0
    for actor in (shared, own):
        mean, log_std = actor(obs)
        assert mean.shape == log_std.shape == (6, 2) and float(mean.abs().max()) < 1


def test_deviations_keep_their_bounds() -> None:
    actor, squashed = (
        GaussianActor(3, 1, hidden=8, log_std_low=-5, log_std_high=2),
        SquashedGaussianActor(3, 1, hidden=8),
    )
    for raw, low, high in ((-100.0, -5, -20), (100.0, 2, 2)):
        for net, bound in ((actor, low), (squashed, high)):
            with torch.no_grad():
                net.net[-1].bias.fill_(raw)
            assert net(torch.zeros(1, 3))[1].item() == bound


def test_a_squashed_actor_begins_alike_in_all_states() -> None:
    mean, log_std = SquashedGaussianActor(3, 2, hidden=32)(torch.randn(50, 3))
    assert float(mean.abs().max()) < 0.1 and float((log_std + 1).abs().max()) < 0.1


def test_units_are_dropped_in_training_only() -> None:
    torch.manual_seed(0)
    actor, obs = DeterministicActor(3, 2, hidden=64, dropout=0.5), torch.randn(4, 3)
    assert not torch.equal(actor(obs), actor(obs))
    actor.eval()
    assert torch.equal(actor(obs), actor(obs))
    assert count(actor) == count(DeterministicActor(3, 2, hidden=64))


def test_outputs_are_float32_where_networks_are_bfloat16() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        obs = torch.randn(4, 3)
        outs = [DeterministicActor(3, 2)(obs), *GaussianActor(3, 2)(obs), *SquashedGaussianActor(3, 2)(obs)]
    assert {out.dtype for out in outs} == {torch.float32}


def test_densities_of_given_actions_are_those_of_the_draws() -> None:
    torch.manual_seed(0)
    mean, log_std, noise = torch.randn(3, 50, 4, dtype=torch.float64)
    action, log_prob = squash(mean, log_std - 1, noise)
    torch.testing.assert_close(squashed_log_prob(action, mean, log_std - 1, edge=1e-15), log_prob)


def test_actions_at_the_edge_have_a_finite_density_and_slope() -> None:
    mean, log_std = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True), torch.zeros(1, 2, dtype=torch.float64)
    log_prob = squashed_log_prob(torch.tensor([[1.0, -1.0]], dtype=torch.float64), mean, log_std)
    # as if 1e-6 from the edge: u = atanh(1 - 1e-6), and a slope of tanh of 1 - (1 - 1e-6)^2
    u = math.atanh(1 - 1e-6)
    one = -(u**2) / 2 - math.log(2 * math.pi) / 2 - math.log(1 - (1 - 1e-6) ** 2)
    assert float(log_prob) == pytest.approx(2 * one, rel=1e-9)
    log_prob.sum().backward()
    assert mean.grad is not None and mean.grad.flatten().tolist() == pytest.approx([u, -u])
    single = squashed_log_prob(torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2), torch.zeros(1, 2))
    assert float(single) == pytest.approx(2 * one, rel=0.02)
