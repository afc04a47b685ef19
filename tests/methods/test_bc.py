"""BC: what it can and what it cannot learn, and 10 % BC."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_learners import at_each_step, bandit, batch, built, fit, small, transitions
from torch.distributions import Normal

from lit_diffrl.data import TransitionData
from lit_diffrl.methods import BC


@pytest.mark.parametrize("policy", ["deterministic", "gaussian"])
def test_two_kinds_of_actions_are_cloned_by_their_mean(policy: str) -> None:
    """Oracle 19: neither can do what a diffusion policy can."""
    method: Any = fit(BC(**small(BC, policy=policy, lr=3e-3)), 400)
    zero = torch.zeros(1, 2)
    assert abs(float(method.decide(zero, [0]))) < 0.1
    if policy == "gaussian":
        assert float(method.actor(zero)[1].exp()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("policy", ["deterministic", "gaussian"])
def test_an_action_for_each_state_is_cloned_exactly(policy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    obs = 3 * torch.rand(2000, 2, generator=generator) - 1.5
    action = 0.8 * torch.sin(2 * obs[:, :1])
    method: Any = fit(BC(**small(BC, policy=policy, lr=3e-3)), 800, transitions(obs, action, torch.zeros(2000)))
    assert float((method.decide(obs, [0]) - action).square().mean()) < 5e-3


def test_the_losses_are_the_squared_error_and_the_likelihood() -> None:
    data, seen = batch(), {}
    for policy in ("deterministic", "gaussian"):
        method = built(BC, policy=policy)
        out = method.actor(data.obs)
        if policy == "deterministic":
            expected = (out - data.action).square().mean()
        else:
            expected = -Normal(out[0], out[1].exp()).log_prob(data.action).sum(-1).mean()
        at_each_step(method, lambda name, loss, policy=policy: seen.update({policy: float(loss)}))  # type: ignore[misc]
        method.training_step(data, 0)
        assert seen[policy] == pytest.approx(float(expected), rel=1e-5)


def test_the_best_tenth_holds_the_better_action_only() -> None:
    whole = bandit(1000)
    data = TransitionData("test/bandit-v0", batch_size=64, top_fraction=0.1)
    info = whole.spec
    from lit_diffrl.data.episodes import Episodes
    from lit_diffrl.data.sources import SourceInfo

    ends = torch.ones(1000, dtype=torch.bool)
    obs, action, reward, _, _, _ = whole.transitions(torch.arange(1000))
    source = SourceInfo(None, None, None, None, None, None, None, [-1.0], [1.0], info.dataset_ids)
    data.load(Episodes(obs, action, reward, ends, ~ends, obs, torch.arange(1000)), source)
    data.prepare_data = lambda: None  # type: ignore[method-assign]
    method: Any = fit(BC(**small(BC, lr=3e-3)), 300, data)
    assert float(method.decide(torch.zeros(1, 2), [0])) == pytest.approx(0.5, abs=0.05)
