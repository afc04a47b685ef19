"""CRR: weights and losses against direct formulas, the order of an update, the critic-weighted policy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from small_learners import OBS, at_each_step, batch, built
from torch import Tensor, nn
from torch.distributions import Normal

from lit_diffrl.methods import BC, CRR
from lit_diffrl.methods.losses import crr_weights


def test_the_weights_of_the_paper() -> None:
    advantage = torch.tensor([-1.0, 0.0, 0.5, math.log(20) + 1e-4, 100.0], requires_grad=True)
    exp = crr_weights(advantage, "exp", 1.0, 20.0)
    assert exp.tolist() == pytest.approx([math.exp(-1), 1.0, math.exp(0.5), 20.0, 20.0])
    assert crr_weights(advantage, "exp", 0.5, 20.0)[2].item() == pytest.approx(math.e)
    indicator = crr_weights(advantage, "indicator", 1.0, 20.0)
    assert indicator.tolist() == [0, 0, 1, 1, 1]
    assert not exp.requires_grad and not indicator.requires_grad


class Square(nn.Module):
    """Two critics: minus the squared length of the action, and one less."""

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        self.asked = action
        q = -action.square().sum(-1)
        return torch.stack([q, q - 1])


@pytest.mark.parametrize("over", ["mean", "max"])
def test_the_value_is_that_of_the_policys_own_actions_in_the_box(over: str) -> None:
    method = built(CRR, advantage=over, candidates=200)
    method.critic = Square()
    obs = batch(4).obs
    mean, log_std = torch.full((4, 2), 0.5), torch.full((4, 2), math.log(0.4))
    value = method.value(obs, mean, log_std)
    assert method.critic.asked.shape == (4, 200, 2) and float(method.critic.asked.abs().max()) == 1
    if over == "max":
        assert bool((value <= -1).all()) and float(value.min()) > -1.05
    else:
        unclipped = -1 - 2 * (0.5**2 + 0.4**2)
        assert value.tolist() == pytest.approx([unclipped] * 4, abs=0.15)


def test_the_softmax_of_the_advantages_is_that_of_the_whole_batch_also_of_several_processes() -> None:
    """Unbounded, and without gradient; what two processes weigh is what one of both their rows would."""
    method = built(CRR, weighting="softmax", beta=0.5, bound=1e-3)
    advantage = torch.tensor([-1.0, 0.0, 2.0, 300.0, 300.5, 301.0], requires_grad=True)
    expected = (advantage.detach() / 0.5).softmax(dim=0)
    found = method.weigh(advantage)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad and float(found.sum()) == pytest.approx(1.0, rel=1e-4)

    rows = (advantage.detach() / 0.5).view(2, 3)
    strategy = type("Two", (), {"all_gather": staticmethod(lambda own: rows)})
    method._trainer = type("T", (), {"strategy": strategy})
    both = [method.weigh(part) for part in advantage.view(2, 3)]
    torch.testing.assert_close(torch.cat(both), expected)


@pytest.mark.parametrize(("weighting", "over"), [("exp", "mean"), ("indicator", "mean"), ("softmax", "max")])
def test_an_update_takes_all_gradients_at_the_old_networks(weighting: str, over: str) -> None:
    """Policy first, then critics; both losses are those of the networks before either step."""
    options = {"lr": 0.1, "critic": {"lr": 0.1}, "weighting": weighting, "advantage": over}
    method, old = built(CRR, **options), built(CRR, **options)
    for learner in (method, old):
        learner.draws.begin(learner.draws.place, torch.device("cpu"))
    data, order = batch(), []

    y = old.target_q(data)
    mean, log_std = old.actor(data.obs)
    advantage = old.least_q(data.obs, data.action) - old.value(data.obs, mean, log_std)
    log_prob = Normal(mean, log_std.exp()).log_prob(data.action).sum(-1)
    f = {"exp": advantage.exp().clamp(max=20), "indicator": (advantage > 0).float(), "softmax": advantage.softmax(0)}
    expected = {
        "actor": -(f[weighting] * log_prob).mean(),
        "critic": (old.critic(data.obs, data.action) - y).square().mean(dim=1).sum(),
    }

    def look(name: str, loss: Tensor) -> None:
        order.append(name)
        assert float(loss) == pytest.approx(float(expected[name]), rel=1e-5)

    at_each_step(method, look)
    method.training_step(data, 0)
    assert order == ["actor", "critic"]


def test_target_actions_are_draws_of_the_target_policy() -> None:
    method = built(CRR)
    method.target_critic.net = Square()
    data = batch(4000, next_obs=torch.zeros(4000, OBS))
    with torch.no_grad():
        method.actor.net[-1].bias.fill_(3.0)  # the policy itself is not asked
        mean, log_std = method.target_actor.net(data.next_obs[:1])
    method.target_q(data)
    asked = method.target_critic.net.asked
    inside = Normal(mean, log_std.exp())
    for bound in (-0.5, 0.5):
        share = (asked < bound).float().mean(0)
        torch.testing.assert_close(share, inside.cdf(torch.tensor(bound))[0], atol=0.03, rtol=0)


def test_the_mean_acts_or_the_best_of_the_policys_draws() -> None:
    obs = np.zeros((3, OBS), dtype=np.float32)
    actions = {}
    for candidates in (1, 100):
        method = built(CRR, selection={"candidates": candidates, "temperature": 0.0}).eval()
        with torch.no_grad():
            method.actor.net[-1].weight.zero_()
            method.actor.net[-1].bias.copy_(torch.tensor([0.5, 0.5, -1.0, -1.0]))
        method.critic = Square()
        method.reset(seeds=[0, 1, 2])
        actions[candidates] = method.act(obs)
    np.testing.assert_allclose(actions[1], math.tanh(0.5), rtol=1e-5)
    lengths = np.linalg.norm(actions[100], axis=1)
    assert lengths.max() < 0.3 and len({float(x) for x in lengths}) == 3, "each row has draws of its own"


@pytest.mark.parametrize(("kind", "options"), [(CRR, {}), (BC, {"policy": "gaussian"})])
def test_a_draw_is_one_of_the_policys_own_in_the_box(kind: Any, options: dict[str, Any]) -> None:
    method, obs = built(kind, **options), batch(4000).obs
    with torch.no_grad():
        mean, log_std = method.actor(obs)
        drawn = method.draw_action(obs)
    assert float(drawn.abs().max()) <= 1
    u = ((drawn - mean) / log_std.exp())[drawn.abs() < 1]
    inside = Normal(0.0, 1.0)
    low, high = ((edge - mean) / log_std.exp() for edge in (-1.0, 1.0))
    expected = (inside.cdf(high) - inside.cdf(low)).mean()
    assert float((drawn.abs() < 1).double().mean()) == pytest.approx(float(expected), abs=0.02)
    assert float(u.std()) > 0.3


def test_a_choice_depends_on_an_episodes_seed_alone() -> None:
    method: Any = built(CRR, selection={"candidates": 5}).eval()
    obs = np.random.default_rng(0).normal(size=(3, OBS)).astype(np.float32)
    method.reset(seeds=[0, 1, 2])
    together = method.act(obs)
    method.reset(seeds=[2])
    np.testing.assert_allclose(method.act(obs[2:]), together[2:], rtol=1e-5, atol=1e-6)
