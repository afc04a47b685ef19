"""IQL: losses against direct formulas, order of the steps, expectiles of a bandit, the decay of the policy's rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_learners import at_each_step, bandit, batch, built, fit, same, small, weights
from torch import Tensor
from torch.distributions import Normal

from lit_diffrl.methods import IQL


def least(method: Any, critic: Any) -> Tensor:
    found: Tensor = critic(batch().obs, batch().action).min(0).values.detach()
    return found


@pytest.mark.parametrize("policy", ["gaussian", "deterministic"])
def test_each_step_sees_what_the_one_before_has_changed(policy: str) -> None:
    """Value, policy, critics, targets, at rates that show: each loss is the formula's at that moment's networks."""
    method = built(IQL, beta=3.0, lr=0.1, critic={"lr": 0.1}, policy=policy)
    data, order = batch(), []
    targets = weights(method.target_critic.net)

    def look(name: str, loss: Tensor) -> None:
        order.append(name)
        assert same(targets, weights(method.target_critic.net)), "targets move last"
        v, v_next = method.value(data.obs).detach(), method.value(data.next_obs).detach()
        advantage = least(method, method.target_critic.net) - v
        if name == "value":
            expected = (torch.where(advantage > 0, 0.7, 0.3) * advantage**2).mean()
        elif name == "actor":
            if policy == "gaussian":
                mean, log_std = method.actor(data.obs)
                log_prob = Normal(mean, log_std.exp()).log_prob(data.action).sum(-1)
            else:
                log_prob = -(method.actor(data.obs) - data.action).square().sum(-1)
            expected = -((3 * advantage).exp().clamp(max=100) * log_prob).mean()
        else:
            y = data.reward + 0.99 * v_next
            q = method.critic(data.obs, data.action)
            expected = (q[0] - y).square().mean() + (q[1] - y).square().mean()
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)

    at_each_step(method, look)
    for _ in range(2):
        method.training_step(data, 0)
        targets = weights(method.target_critic.net)
    assert order == ["value", "actor", "critic"] * 2


def test_the_policy_is_weighed_by_the_targets_not_by_the_critics() -> None:
    found = []
    for shift in (0.0, 50.0):
        method = built(IQL)
        with torch.no_grad():
            method.critic.head.bias.add_(shift)
        losses: dict[str, float] = {}
        at_each_step(method, lambda name, loss, losses=losses: losses.update({name: float(loss)}))  # type: ignore[misc]
        method.training_step(batch(), 0)
        found.append(losses)
    assert found[0]["value"] == found[1]["value"] and found[0]["actor"] == found[1]["actor"]
    assert found[0]["critic"] != found[1]["critic"]


@pytest.mark.parametrize(("expectile", "value"), [(0.5, 0.5), (0.7, 0.7), (0.9, 0.9)])
def test_the_value_of_a_coin_is_its_expectile(expectile: float, value: float) -> None:
    """Half of the bandit's actions earn 1: the expectile tau of a fair coin is tau."""
    data = bandit()
    data.batch_size = 1000  # a small batch's share of ones wavers, and the value with it
    method: Any = fit(IQL(**small(IQL, expectile=expectile, critic={"lr": 3e-3, "tau": 0.1})), 500, data)
    assert float(method.value(torch.zeros(1, 2))) == pytest.approx(value, abs=0.05)


def test_beta_0_is_cloning() -> None:
    method: Any = fit(IQL(**small(IQL, beta=0.0, lr=3e-3, lr_decay="none")), 500)
    mean, log_std = method.actor(torch.zeros(1, 2))
    assert abs(float(mean)) < 0.1 and float(log_std.exp()) == pytest.approx(0.5, abs=0.05)


def test_the_rate_of_the_policy_alone_falls_to_0() -> None:
    rates: list[tuple[float, ...]] = []

    class Watched(IQL):
        def training_step(self, data: Any, batch_idx: int) -> None:
            super().training_step(data, batch_idx)
            rates.append(tuple(o.param_groups[0]["lr"] for o in self.optimizers()))  # type: ignore[union-attr]

    fit(Watched(**small(IQL, lr=1e-3)), 11, bandit(100))
    value, actor, critic = zip(*rates)
    assert set(value) == set(critic) == {3e-4}
    assert actor[0] == pytest.approx(1e-3) and actor[-1] < 3e-5 and list(actor) == sorted(actor, reverse=True)


def test_the_mean_acts() -> None:
    method = built(IQL).eval()
    with torch.no_grad():
        method.actor.log_std.fill_(1.0)
    obs = batch().obs
    torch.testing.assert_close(method.decide(obs, list(range(16))), method.actor.net(obs).tanh())


def test_a_deterministic_policy_acts_and_draws_what_it_says() -> None:
    method, obs = built(IQL, policy="deterministic").eval(), batch().obs
    expected = method.actor.net(obs).tanh()
    for found in (method.decide(obs, list(range(16))), method.draw_action(obs)):
        torch.testing.assert_close(found, expected)
    assert "actor.log_std" not in method.state_dict()
