"""The check of a learnt energy: on a bandit whose exact guidance is known at all times."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from energy_learners import LEARNERS, MEAN, SLOPE, STD, built, chain, fit, linear_bandit, small
from torch import Tensor

from lit_diffrl.methods.exact_guidance import check_guidance, monte_carlo_guidance

TIMES = [0.1, 0.35, 0.7]


def known(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch, learnt: Callable[[Tensor], Tensor] = lambda exact: exact
) -> tuple[Any, Callable[[float, Tensor], Tensor]]:
    """A learner whose actions are N(0.1, 0.25^2) and whose Q is ``slope a`` with a slope by state, and its guidance.

    The exact energy of a Gaussian and a linear Q has the gradient ``beta slope alpha v / (alpha^2 v + sigma^2)``.
    """
    method = built(kind, beta=2.0)

    def gradient(t: float, obs: Tensor) -> Tensor:
        alpha, v = method.sde.alpha(t), STD**2
        return method.beta * obs[:, :1] * alpha * v / (alpha**2 * v + method.sde.sigma(t) ** 2)

    def draw(obs: Tensor, noise: Tensor, options: Any, acting: tuple[float, bool]) -> Tensor:
        assert acting == (0.0, False), "of the behaviour alone"
        return MEAN + STD * noise

    def q(obs: Tensor, action: Tensor) -> Tensor:
        assert action.abs().max() <= 1, "within the box, where the policy acts"
        return obs[:, :1] * action[..., 0]

    monkeypatch.setattr(method, "draw_actions", draw)
    monkeypatch.setattr(method, "q_of", lambda obs: partial(q, obs))
    monkeypatch.setattr(
        method, "guidance_of", lambda obs, asked: lambda x, t: learnt(gradient(t.item(), obs)).expand_as(x)
    )
    return method, gradient


@pytest.mark.parametrize("kind", LEARNERS)
def test_it_measures_the_exact_guidance(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    method, gradient = known(kind, monkeypatch)
    obs = torch.full((33, 2), SLOPE)  # states of three chunks, the last with one
    found = check_guidance(method, obs, TIMES, 4000)
    assert [row.t for row in found] == TIMES
    for row in found:
        expected = method.sde.sigma(row.t) * gradient(row.t, obs[:1]).item()
        assert row.learnt == pytest.approx(expected, rel=1e-5)
        assert row.exact == pytest.approx(expected, rel=0.05) and row.cosine == pytest.approx(1)
    # in noise all actions count but for Q's tilt, whose share of them is exp(-(beta slope deviation)^2)
    (clean,) = check_guidance(method, obs[:1], [0.005], 4000)
    assert clean.actions < 1200
    assert found[-1].actions == pytest.approx(4000 * math.exp(-((method.beta * SLOPE * STD) ** 2)), rel=0.1)


@pytest.mark.parametrize("kind", LEARNERS)
def test_monte_carlo_guides_as_the_exact_energy(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By each state's own Q, from the same actions at every call, and without a trace in the random generator."""
    method, gradient = known(kind, monkeypatch)
    obs, state = torch.linspace(0.5, 2.0, 35)[:, None].expand(-1, 2), torch.get_rng_state()
    guidance = monte_carlo_guidance(method, obs, 4000)
    again = monte_carlo_guidance(method, obs[3:4], 4000)
    for time in TIMES:
        t, x = torch.tensor([time]), torch.full((35, 1), 0.1)
        found = guidance(x, t)
        torch.testing.assert_close(found, gradient(time, obs), rtol=0.1, atol=0)
        torch.testing.assert_close(again(x[3:4], t), found[3:4])
    several = guidance(x[:, None].expand(-1, 3, -1), t)
    torch.testing.assert_close(several, found[:, None].expand(-1, 3, -1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", LEARNERS)
def test_it_tells_a_wrong_length_from_a_wrong_direction(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    method, _ = known(kind, monkeypatch, lambda exact: -10 * exact)
    for row in check_guidance(method, torch.full((16, 2), SLOPE), TIMES, 4000):
        assert row.learnt == pytest.approx(10 * row.exact, rel=0.05) and row.cosine == pytest.approx(-1)


def test_each_state_has_actions_and_values_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median is the middle state's, and no chunk's."""
    method, gradient = known(LEARNERS[0], monkeypatch)
    obs = torch.linspace(0.5, 2.0, 35).square()[:, None].expand(-1, 2)
    for row in check_guidance(method, obs, TIMES, 4000):
        expected = method.sde.sigma(row.t) * gradient(row.t, obs[17:18]).item()
        assert row.learnt == pytest.approx(expected, rel=1e-5) and row.exact == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("kind", LEARNERS)
def test_its_q_is_that_of_the_target_critics(kind: type[Any]) -> None:
    method = fit(small(kind))
    obs, action = torch.randn(7, 2), torch.rand(7, 3, 1)
    found = method.q_of(obs)(action)
    torch.testing.assert_close(found, method.least_q(obs, action, target=True))
    assert not torch.allclose(found, method.least_q(obs, action))


@pytest.mark.parametrize("kind", LEARNERS)
def test_monte_carlo_acts_alike_under_any_default_precision_and_leaves_the_network_to_the_check(
    kind: type[Any],
) -> None:
    method, obs, noise = fit(small(kind, guidance_actions=32)), torch.zeros(5, 2), torch.linspace(-1, 1, 5)[:, None]
    by_network, found = check_guidance(method, obs, TIMES, 32), []
    method.guidance = "monte_carlo"
    assert check_guidance(method, obs, TIMES, 32) == by_network
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found.append(method.draw_actions(obs, noise, method.sampler, (1.0, False)))
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    assert not torch.equal(found[0], method.draw_actions(obs, noise, method.sampler, (0.0, False)))


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_networks_guidance_is_taken_as_it_acts(kind: type[Any]) -> None:
    """The same numbers twice, in inference mode too, and none of them moves a weight or a random generator."""
    method = fit(small(kind))
    method.zero_grad()
    obs, state = torch.zeros(5, 2), torch.get_rng_state()
    found = check_guidance(method, obs, TIMES, 32)
    with torch.inference_mode():
        assert check_guidance(method, obs, TIMES, 32) == found
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in method.parameters())
    assert all(row.learnt > 0 for row in found)


def test_episodes_begin_where_the_data_says() -> None:
    assert chain().initial.tolist() == [0, 3]
    assert linear_bandit(5).initial.tolist() == [0, 1, 2, 3, 4]
