"""TD3+BC: the policy loss (oracle 13), delayed steps, smoothed targets, sizes (oracle 9)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_learners import at_each_step, batch, built, same, weights
from torch import Tensor, nn

from lit_diffrl.methods import TD3BC
from lit_diffrl.nets.critics import TwinQ


def policy_step(method: Any, **fields: Tensor) -> tuple[float, list[Tensor]]:
    """Loss and gradient of the policy in one update."""
    losses: list[float] = []
    at_each_step(method, lambda name, loss: losses.append(float(loss)) if name == "actor" else None)
    method.training_step(batch(**fields), 0)
    (loss,) = losses
    return loss, [p.grad for p in method.actor.parameters()]


def cloning(method: Any) -> float:
    data = batch()
    return float((method.actor(data.obs) - data.action).square().mean())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_critics_part_of_the_loss_is_alpha_while_values_have_one_sign(sign: float) -> None:
    method = built(TD3BC, policy_freq=1, alpha=2.5, critic={"lr": 1e-30})
    with torch.no_grad():
        method.critic.head.bias.fill_(50 * sign)
    bc = cloning(method)
    loss, _ = policy_step(method)
    assert loss == pytest.approx(-2.5 * sign + bc, rel=1e-5)


def test_the_scale_of_the_critic_does_not_matter() -> None:
    found = []
    for scale in (1.0, 7.0):
        method = built(TD3BC, policy_freq=1, critic={"lr": 1e-30})
        with torch.no_grad():
            method.critic.head.weight.mul_(scale)
            method.critic.head.bias.mul_(scale)
        found.append(policy_step(method))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for a, b in zip(found[0][1], found[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_alpha_0_is_cloning() -> None:
    method = built(TD3BC, policy_freq=1, alpha=0.0)
    assert cloning(method) == pytest.approx(policy_step(method)[0])


def test_the_policy_asks_the_first_critic_after_its_step() -> None:
    method = built(TD3BC, policy_freq=1, critic={"lr": 0.1})
    expected = []

    def look(name: str, loss: Tensor) -> None:
        if name == "actor":
            data = batch()
            action = method.actor(data.obs)
            q = method.critic(data.obs, action)[0]
            expected.append(float(-2.5 * q.mean() / q.abs().mean() + (action - data.action).square().mean()))
            assert float(loss) == pytest.approx(expected[0], rel=1e-5)

    at_each_step(method, look)
    method.training_step(batch(), 0)
    assert expected


@pytest.mark.parametrize("freq", [1, 2, 3])
def test_policy_and_targets_move_together_and_critics_at_every_update(freq: int) -> None:
    method = built(TD3BC, policy_freq=freq)
    slow = (method.actor, method.target_actor.net, method.target_critic.net)
    moved = []
    for _ in range(6):
        before, critic = [weights(net) for net in slow], weights(method.critic)
        method.training_step(batch(), 0)
        changed = {not same(old, weights(net)) for old, net in zip(before, slow)}
        assert len(changed) == 1 and not same(critic, weights(method.critic))
        moved.append(changed.pop())
    assert moved == [i % freq == 0 for i in range(1, 7)]


def test_a_resumed_learner_keeps_the_rhythm() -> None:
    first = built(TD3BC, policy_freq=2)
    first.training_step(batch(), 0)
    second = built(TD3BC, policy_freq=2)
    second.load_state_dict(first.state_dict())
    before = weights(second.actor)
    second.training_step(batch(), 0)
    assert not same(before, weights(second.actor))


class Sum(nn.Module):
    """Critics whose value is the sum of the action's entries; it keeps what it was asked."""

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        self.asked = action
        return action.sum(-1).expand(2, -1)


@pytest.mark.parametrize(("noise", "clip"), [(0.0, 0.5), (0.2, 0.5), (100.0, 0.3)])
def test_target_actions_are_the_target_policys_with_clipped_noise(noise: float, clip: float) -> None:
    method = built(TD3BC, policy_noise=noise, noise_clip=clip)
    method.target_critic.net = Sum()
    data = batch(4000)
    with torch.no_grad():
        method.actor.net[-1].bias.fill_(5.0)  # the policy itself is not asked
        own = method.target_actor.net(data.next_obs)
    y = method.target_q(data)
    asked = method.target_critic.net.asked
    torch.testing.assert_close(y, data.reward + 0.99 * asked.sum(-1))
    shift = asked - own
    assert float(shift.abs().max()) <= clip + 1e-6 and float(asked.abs().max()) <= 1
    if noise == 0.2:
        assert float(shift.std()) == pytest.approx(0.2, rel=0.05)
    elif noise == 100:
        assert float((shift.abs() > clip - 1e-4).float().mean()) > 0.9


def test_a_gaussian_policy_is_drawn_for_targets_and_loss_and_acts_by_its_mean() -> None:
    method = built(TD3BC, policy="gaussian", policy_noise=1e9, policy_freq=1, alpha=0.0)
    method.target_critic.net = Sum()
    data = batch(4000)
    with torch.no_grad():
        for actor in (method.actor, method.target_actor.net):
            actor.net[-1].weight.zero_()
            actor.net[-1].bias.copy_(torch.tensor([0.5, -0.5, 0.0, 0.0]))  # u ~ N((0.5, -0.5), e^-2)
    method.target_q(data)
    u = method.target_critic.net.asked.atanh()
    torch.testing.assert_close(u.mean(0), torch.tensor([0.5, -0.5]), atol=0.03, rtol=0)
    torch.testing.assert_close(u.std(0), torch.full((2,), math.exp(-1)), atol=0.03, rtol=0)
    mean = torch.tensor([0.5, -0.5]).tanh().expand(4000, 2)
    torch.testing.assert_close(method.decide(data.obs, []), mean)
    drawn = method.draw_action(data.obs)
    spread = float((drawn - mean).square().mean())
    assert spread > 0.05, "draws differ"
    losses: list[float] = []
    at_each_step(method, lambda name, loss: losses.append(float(loss)) if name == "actor" else None)
    method.target_critic.net = built(TD3BC).target_critic.net
    method.training_step(data._replace(action=mean), 0)
    assert losses == [pytest.approx(spread, rel=0.1)], "cloning of a draw, not of the mean"


@pytest.mark.parametrize(
    ("obs", "action", "size"), [(17, 6, 72193), (11, 3, 69889), (29, 8, 75777)], ids=["halfcheetah", "hopper", "ant"]
)
def test_a_critic_has_the_size_of_the_papers(obs: int, action: int, size: int) -> None:
    o = TD3BC().critic_options
    critic = TwinQ(obs, action, hidden=o.hidden, layers=o.layers, activation=o.activation)
    assert sum(p.numel() for p in critic.parameters()) == 2 * size
