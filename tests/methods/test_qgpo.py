"""QGPO: what its critics and its energy are given, and where it leads on a bandit with a known policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from energy_learners import MEAN, SLOPE, STD, act, built, chain, fit, linear_bandit, small
from small_learners import transitions

from lit_diffrl.data import PolicyBatch
from lit_diffrl.methods import QGPO, qgpo
from lit_diffrl.methods.support import States


def test_what_terminates_is_worth_its_reward_and_a_time_limit_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle 19."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    td_loss = qgpo.td_loss

    def watched(q: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append((q, y))
        return td_loss(q, y)

    class Fixed(QGPO):
        def next_value(self, next_obs: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
            return 10 * next_obs[:, 0]

        def training_step(self, batch: PolicyBatch, batch_idx: int) -> None:
            self.batch = batch
            super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 1:
                self.judged = self.batch

    monkeypatch.setattr(qgpo, "td_loss", watched)
    method = fit(small(Fixed), 1, chain())
    state = method.judged.obs[:, 0]
    ((_, y),) = seen
    expected = torch.where(state == 5, 1.0, 1 + 0.99 * 10 * (state + 1))
    torch.testing.assert_close(y, expected)
    assert bool((state == 5).any() and (state == 2).any())


def test_the_value_of_a_state_is_the_softmax_of_the_least_target_critic_over_its_support() -> None:
    method = built(QGPO, support={"beta_q": 2.0})
    with torch.no_grad():
        for p in method.critic.parameters():
            p.add_(1.0)  # the online critics are not asked
    obs, support = torch.randn(5, 2), torch.rand(5, 8, 1) * 2 - 1
    rows = obs[:, None].expand(-1, 8, -1).flatten(0, 1)
    q = method.target_critic.net(rows, support.flatten(0, 1)).amin(0).view(5, 8)
    weights = (2 * q).exp() / (2 * q).exp().sum(1, keepdim=True)
    torch.testing.assert_close(method.next_value(obs, support), (weights * q).sum(1))


def test_labels_computed_once_are_those_of_every_update() -> None:
    seen: list[torch.Tensor] = []

    class Watched(QGPO):
        def energy_loss(self, batch: PolicyBatch, rows: torch.Tensor) -> torch.Tensor:
            if self.phase.name == "energy":
                assert self.labels is not None and self.support is not None
                now = self.least_q(batch.obs, self.support[rows], target=True)
                seen.append((now - self.labels[rows]).abs().max())
            return super().energy_loss(batch, rows)

    fit(small(Watched))
    assert len(seen) == 3 and max(map(float, seen)) < 1e-5


def test_support_actions_are_drawn_and_judged_in_the_precision_of_the_updates() -> None:
    seen: set[tuple[str, bool]] = set()

    class Watched(QGPO):
        def draw_actions(self, *args: Any) -> torch.Tensor:
            seen.add(("draw", torch.is_autocast_enabled("cpu")))
            return super().draw_actions(*args)

        def least_q(self, *args: Any, **options: Any) -> torch.Tensor:
            seen.add(("judge", torch.is_autocast_enabled("cpu")))
            return super().least_q(*args, **options)

    found = []
    for precision, mixed in (("32-true", False), ("bf16-mixed", True)):
        found.append(fit(small(Watched), precision=precision).support)
        assert seen == {("draw", mixed), ("judge", mixed)}
        seen.clear()
    exact, rounded = found
    assert exact.dtype == rounded.dtype == torch.float32
    assert 0 < float((exact - rounded).abs().max()) < 0.03 * float(exact.abs().max())


def prepared(**options: Any) -> tuple[Any, PolicyBatch, torch.Tensor]:
    """A learner with support actions, and a batch of states of its own."""
    method = built(QGPO, **options)
    batch = PolicyBatch(torch.randn(16, 2), torch.rand(16, 1), *torch.zeros(4, 16).unsqueeze(-1).unbind(0))
    batch = batch._replace(reward=torch.zeros(16), done=torch.zeros(16), discount=torch.ones(16))
    method.support = 2 * torch.rand(16, 8, 1) - 1
    method.states = States(batch.obs, torch.arange(16))
    return method, batch, torch.arange(16)


@pytest.mark.parametrize("objective", ["cep", "mse", "emse"])
def test_an_energy_s_gradient_reaches_the_energy_alone(objective: str) -> None:
    method, batch, rows = prepared(objective=objective)
    method.energy_loss(batch, rows).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in method.energy.parameters())
    others = [p for name in ("behaviour", "critic") for p in getattr(method, name).parameters()]
    assert all(p.grad is None for p in others)


@pytest.mark.parametrize("objective", ["mse", "emse"])
def test_objectives_for_comparison_are_of_the_datas_action(objective: str) -> None:
    """``beta Q`` or its exponential, relative to the best support action, at the noised action of the data."""
    method, batch, rows = prepared(objective=objective)
    method.draws.begin(method.draws.place, torch.device("cpu"))
    loss = method.energy_loss(batch, rows)
    method.draws.begin(method.draws.place, torch.device("cpu"))
    t, _, a_t = method.noised(batch.action)
    f = method.energy(a_t, t, batch.obs)
    q = method.target_critic.net(batch.obs, batch.action).amin(0)
    if objective == "mse":
        expected = (f - method.beta * q).square().mean()
    else:
        best = method.target_critic.net(batch.obs, method.support).amin(0).amax(1)
        expected = (f.exp() - (method.beta * (q - best)).exp()).square().mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("normalise", [True, False])
def test_labels_know_nothing_of_a_state_s_own_value(normalise: bool) -> None:
    """The same constant on all values of a state leaves the loss as it is."""
    method, batch, rows = prepared(self_normalise=normalise)
    losses = []
    for constant in (0.0, 30.0):
        for net in (method.critic, method.target_critic.net):
            with torch.no_grad():
                net.head.bias.fill_(constant)
        method.draws.begin(method.draws.place, torch.device("cpu"))
        losses.append(float(method.energy_loss(batch, rows)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_single_state_and_a_single_action_entry_keep_their_axes() -> None:
    data = transitions(torch.zeros(1, 2), torch.zeros(1, 1), torch.ones(1))
    data.batch_size = 1
    assert fit(small(QGPO), 1, data).can_act


def test_guidance_moves_the_policy_as_far_as_it_should() -> None:
    """beta 2 moves the data's N(0.1, 0.0625) by beta Q' var = 0.1875 and leaves its deviation; all networks trained.

    In seconds, so roughly: the specification's tolerances are for the longer training of test_energy_bandits.py.
    """
    data = linear_bandit(1000)
    data.batch_size = 256
    options = {"behaviour_epochs": 3, "critic_epochs": 2, "energy_epochs": 1, "sampler": {"steps": 15}}
    rates = {"behaviour": {"lr": 1e-3}, "energy": {"lr": 2e-3}}
    method = fit(small(QGPO, beta=2.0, support={"actions": 32}, **options, **rates), 300, data)
    means = []
    for degree in (0.0, 1.0):
        with method.acting_as(degree, False):
            action = act(method, 2000)
        means.append(float(action.mean()))
        assert float(action.std()) == pytest.approx(STD, rel=0.35)
    assert means[0] == pytest.approx(MEAN, abs=0.08)
    assert 0.5 < (means[1] - means[0]) / (2 * SLOPE * STD**2) < 1.5
