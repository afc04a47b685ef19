"""CQL: the conservative term against a direct computation, where its actions come from, entropy and multiplier."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_learners import ACTION, at_each_step, bandit, batch, built, fit, same, small, transitions, weights
from torch import Tensor, nn

from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import CQL
from lit_diffrl.nets.actors import squash

N = 10


def direct(q: Tensor, log_density: Tensor, *, temperature: float, importance: bool, clip: float | None) -> list[float]:
    """The term, sum by sum."""
    found = []
    for critic in q.tolist():
        total = 0.0
        for row, densities in zip(critic, log_density.tolist()):
            data, others = row[0], row[1:]
            terms = [x - d for x, d in zip(others, densities)] if importance else row
            soft = temperature * math.log(sum(math.exp(t / temperature) for t in terms))
            total += soft - data if clip is None else max(soft - data, clip)
        found.append(total / len(critic))
    return found


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("importance", [True, False])
@pytest.mark.parametrize("clip", [None, 2.0])
def test_the_conservative_term(temperature: float, importance: bool, clip: float | None) -> None:
    torch.manual_seed(0)
    method = CQL(temperature=temperature, importance_sampling=importance, diff_clip=clip)
    q, log_density = 3 * torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    expected = direct(q, log_density, temperature=temperature, importance=importance, clip=clip)
    assert method.conservative(q, log_density).tolist() == pytest.approx(expected)
    huge = method.conservative(1e4 * q.float(), log_density.float())
    assert bool(huge.isfinite().all())


@pytest.mark.parametrize("gap", [60.0, 90.0, 95.0, 100.0, 300.0])
def test_gradients_of_the_term_are_0_or_normal_numbers(gap: float) -> None:
    """An action far below the others counts for nothing; a gradient of 1e-40 in its place would cost time."""
    q = torch.tensor([[[0.0, 1.0, 2.0, -gap]]], requires_grad=True)
    term = CQL().conservative(q, torch.zeros(1, 3))
    (gradient,) = torch.autograd.grad(term.sum(), q)
    assert gradient[..., -1].item() == 0
    exact = torch.tensor([1.0, 2.0, -gap], dtype=torch.float64).logsumexp(0)
    assert float(term) == pytest.approx(float(exact), rel=1e-7)
    torch.testing.assert_close(gradient[0, 0], torch.tensor([-1.0, 0.2689414, 0.7310586, 0.0]))
    double = torch.tensor([[[0.0, 1.0, 2.0, -gap]]], dtype=torch.float64)
    assert float(CQL().conservative(double, torch.zeros(1, 3))) == float(exact)


def test_the_sum_over_uniform_actions_estimates_an_integral() -> None:
    """log of the mean of exp(Q) / density: for Q = 2 a over [-1, 1], the logarithm of sinh(2)."""
    action = torch.rand(1, 200_000, dtype=torch.float64) * 2 - 1
    q = torch.cat([torch.zeros(1, 1), 2 * action], dim=1)[None]
    log_density = torch.full((1, 200_000), -math.log(2), dtype=torch.float64)
    term = CQL().conservative(q, log_density) - math.log(200_000)
    assert float(term) == pytest.approx(math.log(math.sinh(2)), abs=0.01)


class Watched(nn.Module):
    """Critics that keep what they are asked."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic, self.asked = critic, []

    def forward(self, obs: Tensor, action: Tensor, **kwargs: Any) -> Tensor:
        self.asked.append((obs, action))
        q: Tensor = self.critic(obs, action, **kwargs)
        return q


def candidates(method: Any, data: Any) -> tuple[Tensor, Tensor]:
    """States and actions ``(B, 1 + 3 n, A)`` that the critics learn from in an update."""
    method.critic = Watched(method.critic)
    method.training_step(data, 0)
    ((obs, action),) = ((o, a) for o, a in method.critic.asked if a.dim() == 3)
    return obs, action


def test_actions_come_from_three_sources_and_are_all_judged_at_the_state() -> None:
    method, data = built(CQL), batch(400)
    with torch.no_grad():
        method.actor.net[-1].bias[ACTION:] = -8.0  # almost no noise: an action tells its state
        method.actor.net[-1].weight[:ACTION] *= 100
        now, ahead = (method.actor(x)[0].tanh()[:, None] for x in (data.obs, data.next_obs))
    obs, action = candidates(method, data)
    assert torch.equal(obs, data.obs) and torch.equal(action[:, 0], data.action)
    uniform, of_now, of_ahead = action[:, 1:].split(N, dim=1)
    counts = uniform.flatten().histc(20, -1, 1)
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 43.8, "chi-squared, 19 degrees, 0.1 %"
    torch.testing.assert_close(of_now, now.expand(-1, N, -1), atol=5e-3, rtol=0)
    torch.testing.assert_close(of_ahead, ahead.expand(-1, N, -1), atol=5e-3, rtol=0)
    assert float((now - ahead).abs().max()) > 0.05


def test_densities_are_those_of_the_sources() -> None:
    method, data, seen = built(CQL), batch(400), []
    conservative = method.conservative

    def look(q: Tensor, log_density: Tensor) -> Tensor:
        seen.append(log_density)
        found: Tensor = conservative(q, log_density)
        return found

    method.conservative = look
    with torch.no_grad():
        mean, log_std = method.actor(data.obs)
    _, action = candidates(method, data)
    (log_density,) = seen
    assert not log_density.requires_grad
    assert bool((log_density[:, :N] == -ACTION * math.log(2)).all())
    of_now = action[:, 1 + N : 1 + 2 * N].double().clamp(-1 + 1e-6, 1 - 1e-6)
    normal = torch.distributions.Normal(mean.double()[:, None], log_std.double().exp()[:, None])
    expected = normal.log_prob(of_now.atanh()) - torch.log1p(-of_now.square())
    torch.testing.assert_close(log_density[:, N : 2 * N].double(), expected.sum(-1), atol=1e-3, rtol=1e-3)


def test_the_losses_of_an_update_and_their_order() -> None:
    """Policy, at the old critics, with its temperature; critics. The policy's is pi's log-density less the least Q."""
    method, data = built(CQL, alpha=2.0, lr=0.1, critic={"lr": 0.1}), batch()
    with torch.no_grad():
        method.entropy_temperature.log.fill_(math.log(0.5))
    old, order = built(CQL, alpha=2.0, lr=0.1, critic={"lr": 0.1}), []
    losses: dict[str, float] = {}
    watched = Watched(method.critic)
    method.critic = watched

    def look(name: str, loss: Tensor) -> None:
        order.append(name)
        losses[name] = float(loss)

    at_each_step(method, look)
    method.training_step(data, 0)
    assert order == ["actor", "critic"]
    obs, action = next((o, a) for o, a in watched.asked if a.dim() == 2)
    with torch.no_grad():
        mean, log_std = old.actor(obs)
        u = action.atanh()
        log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - torch.log1p(-action.square())
        expected = (0.5 * log_prob.sum(-1) - old.critic(obs, action).amin(0)).mean()
    of_temperature = -math.log(0.5) * (float(log_prob.sum(-1).mean()) - ACTION)
    assert losses["actor"] == pytest.approx(float(expected) + of_temperature, rel=1e-4)


def test_the_policy_clones_the_data_first_and_climbs_the_critics_afterwards(monkeypatch: Any) -> None:
    """Warm-up: the log-density of the data's actions in place of the least Q of its own; the critics learn as ever."""
    method, data, losses = built(CQL, policy_epochs=2, clone_epochs=1), batch(), []
    with torch.no_grad():
        mean, log_std = method.actor(data.obs)
        density = torch.distributions.Normal(mean, log_std.exp()).log_prob(data.action.atanh())
        cloned = (density - torch.log1p(-data.action.square())).sum(-1).mean()
    watched = method.critic = Watched(method.critic)
    drawn: list[Tensor] = []

    def watched_squash(*args: Tensor) -> tuple[Tensor, Tensor]:
        found = squash(*args)
        drawn.append(found[1])
        return found

    at_each_step(method, lambda name, loss: losses.append((name, float(loss))))
    before = weights(watched)
    monkeypatch.setattr("lit_diffrl.methods.cql.squash", watched_squash)
    method.training_step(data, 0)
    (own,) = (x for x in drawn if x.dim() == 1 and x.requires_grad)
    # the temperature is 1, so that its own loss, a logarithm times a number, is 0
    assert losses[0] == ("actor", pytest.approx(float((own.mean() - cloned).detach()), rel=1e-4))
    assert not [a for _, a in watched.asked if a.dim() == 2], "no critic is climbed"
    assert losses[1][0] == "critic" and not same(weights(watched), before)
    monkeypatch.setattr(CQL, "current_epoch", 1)
    method.training_step(data, 0)
    assert len([a for _, a in watched.asked if a.dim() == 2]) == 1


def test_cloning_finds_the_datas_actions_and_climbing_the_better_ones() -> None:
    """A bandit with three of four actions near -0.5, all worth nothing, and the others near 0.5, worth 1 each."""
    draw = torch.Generator().manual_seed(0)
    side = torch.where(torch.rand(4000, 1, generator=draw) < 0.75, -0.5, 0.5)
    action = side + 0.05 * torch.randn(4000, 1, generator=draw)
    data = transitions(torch.zeros(4000, 2), action, (action[:, 0] > 0).float())
    found = []
    for clone in (1, 0):
        torch.manual_seed(0)
        options = small(CQL, policy_epochs=2, clone_epochs=clone, alpha=0.1, lr=3e-3, critic={"lr": 3e-3})
        method: Any = fit(CQL(**options), 300, data)  # one epoch
        found.append(float(method.decide(torch.zeros(1, 2), [0])))
    assert -0.5 < found[0] < -0.15 and found[1] > 0.3, found


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_run_that_would_only_clone_is_refused(epochs: int) -> None:
    with pytest.raises(ConfigError, match=rf"model.clone_epochs {epochs} leaves none of model.policy_epochs 2"):
        CQL(policy_epochs=2, clone_epochs=epochs)


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_the_critics_descend_squared_error_and_alpha_times_the_term(alpha: float, monkeypatch: Any) -> None:
    method, losses, terms = built(CQL, alpha=alpha), {}, []
    conservative = method.conservative
    method.conservative = lambda *args: terms.append(conservative(*args)) or terms[-1]
    from lit_diffrl.methods import cql

    td = cql.td_loss
    monkeypatch.setattr(cql, "td_loss", lambda q, y: terms.append(td(q, y)) or terms[-1])
    at_each_step(method, lambda name, loss: losses.update({name: float(loss)}))
    method.training_step(batch(), 0)
    gap, squared = terms
    assert losses["critic"] == pytest.approx(float(squared + alpha * gap.sum()), rel=1e-5)


@pytest.mark.parametrize(("target", "grows"), [(-100.0, True), (100.0, False)])
def test_the_multiplier_grows_while_the_term_is_above_its_target(target: float, grows: bool) -> None:
    method = built(CQL, target_gap=target)
    assert len(method.configure_optimizers()) == 3
    before = float(method.multiplier.log)
    method.training_step(batch(), 0)
    assert (float(method.multiplier.log) > before) is grows


def test_the_multiplier_weighs_the_term_without_being_descended_by_it() -> None:
    found = []
    for shift in (0.0, math.log(2)):
        method = built(CQL, target_gap=0.5, alpha=1.0)
        method.draws.begin(method.draws.place, torch.device("cpu"))
        with torch.no_grad():
            method.multiplier.log.add_(shift)
        losses: dict[str, float] = {}
        at_each_step(method, lambda name, loss, losses=losses: losses.update({name: float(loss)}))  # type: ignore[misc]
        method.training_step(batch(), 0)
        found.append(losses)
        assert method.multiplier.log.grad is not None
    one, two = found
    assert two["multiplier"] == pytest.approx(2 * one["multiplier"], rel=1e-5)
    # critic = squared error + multiplier (gap_1 + gap_2 - 2 target), multiplier = -multiplier (gap_1 + gap_2) / 2 + ...
    assert two["critic"] - one["critic"] == pytest.approx(-2 * one["multiplier"], rel=1e-4)


@pytest.mark.parametrize(("target", "rises"), [(100.0, True), (-100.0, False)])
def test_the_temperature_rises_while_the_entropy_is_below_its_target(target: float, rises: bool) -> None:
    method = built(CQL, target_entropy=target)
    method.training_step(batch(), 0)
    assert (float(method.entropy_temperature.log) > 0) is rises


def test_the_entropy_is_held_at_minus_the_number_of_action_entries() -> None:
    assert built(CQL).entropy == -ACTION and built(CQL, target_entropy=-0.5).entropy == -0.5


def test_the_max_backup_takes_the_best_of_each_critic_before_the_least_critic() -> None:
    """Oracle 17."""

    class Table(nn.Module):
        def forward(self, obs: Tensor, action: Tensor) -> Tensor:
            return torch.tensor([[1.0, 5.0], [4.0, 2.0]])[:, None].expand(-1, len(obs), -1)

    method = built(CQL, critic={"backup_candidates": 2})
    method.target_critic.net = Table()
    assert method.backup(torch.zeros(3, 4), torch.zeros(3, 2, ACTION)).tolist() == [4.0, 4.0, 4.0]


@pytest.mark.parametrize(("count", "shape"), [(1, (16, ACTION)), (5, (16, 5, ACTION))])
def test_next_states_are_judged_at_as_many_actions_as_asked_for(count: int, shape: tuple[int, ...]) -> None:
    method, data = built(CQL, critic={"backup_candidates": count}), batch()
    watched = method.target_critic.net = Watched(method.target_critic.net)
    method.training_step(data, 0)
    ((obs, action),) = watched.asked
    assert torch.equal(obs, data.next_obs) and action.shape == shape


def test_actions_without_data_are_worth_less_the_larger_alpha() -> None:
    gaps = []
    for alpha in (0.0, 1.0):
        method: Any = fit(CQL(**small(CQL, alpha=alpha, lr=1e-3, critic={"lr": 3e-3})), 300, bandit())
        q = method.least_q(torch.zeros(1, 2), torch.tensor([[[0.5], [0.0], [-0.95]]]))[0].tolist()
        gaps.append(q[0] - max(q[1:]))
    assert gaps[1] > gaps[0] + 0.3


def test_the_critics_learn_from_the_policy_before_or_after_its_step() -> None:
    for first in (False, True):
        method, data = built(CQL, policy_first=first, lr=0.1), batch()
        old, seen, drawn = [p.clone() for p in method.actor.parameters()], [], []
        at_each_step(method, lambda name, loss, seen=seen: seen.append(name))  # type: ignore[misc]
        lessons = method.lessons

        def watched(batch: Any, policy: Any, noise: Tensor, lessons: Any = lessons, method: Any = method) -> Any:
            stepped = not all(torch.equal(p, q) for p, q in zip(method.actor.parameters(), old))  # noqa: B023
            drawn.append((stepped, torch.equal(policy[0], method.actor(batch.obs)[0])))  # noqa: B023
            return lessons(batch, policy, noise)

        method.lessons = watched
        method.training_step(data, 0)
        assert drawn == [(first, True)] and seen == ["actor", "critic"]


def test_what_the_policy_descends_does_not_depend_on_when_the_critics_draw() -> None:
    losses: list[dict[str, float]] = []
    for first in (False, True):
        method = built(CQL, policy_first=first, lr=0.1)
        losses.append({})
        at_each_step(method, lambda name, loss: losses[-1].update({name: float(loss)}))
        method.training_step(batch(), 0)
    before, after = losses
    assert before["actor"] == after["actor"] and before["critic"] != after["critic"]


@pytest.mark.parametrize(("target", "low", "high"), [(-100.0, -0.02, None), (100.0, None, 0.03), (100.0, -10.0, 0.5)])
def test_the_temperature_stays_within_its_limits_and_comes_back(
    target: float, low: float | None, high: float | None
) -> None:
    method = built(CQL, target_entropy=target, entropy_log_low=low, entropy_log_high=high, lr=0.2)
    limit = low if target < 0 else high
    for _ in range(4):
        method.training_step(batch(), 0)
    log = method.entropy_temperature.log
    assert float(log) == pytest.approx(limit)
    method.entropy = -target
    for _ in range(12):  # Adam's momentum has to turn round first
        method.training_step(batch(), 0)
    assert (float(log) - limit) * target < 0, "it is held at the limit"


def test_limits_of_the_temperature_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.entropy_log_high must be in \[1"):
        CQL(entropy_log_low=1.0, entropy_log_high=0.5)
