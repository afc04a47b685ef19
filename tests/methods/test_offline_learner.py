"""What the feed-forward learners have in common: an update's bookkeeping, gradients that stay apart, a bandit."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from small_learners import ACTION, LEARNERS, OBS, bandit, batch, built, fit, same, small, weights
from torch import nn

from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import BC, CQL, CRR, IQL, TD3BC
from lit_diffrl.nets.ema import EMA

WITH_CRITICS = [kind for kind in LEARNERS if kind is not BC]


def averages(method: Any) -> dict[str, tuple[torch.nn.Module, EMA]]:
    """Networks with a slow copy, by name."""
    names = ("actor", "critic")
    return {n: (getattr(method, n), getattr(method, f"target_{n}")) for n in names if hasattr(method, f"target_{n}")}


@pytest.mark.parametrize("kind", LEARNERS)
def test_two_updates_move_all_that_learns_and_are_counted(kind: type[Any]) -> None:
    method = built(kind)
    before = {name: p.detach().clone() for name, p in method.named_parameters() if p.requires_grad}
    for _ in range(2):
        method.training_step(batch(), 0)
    assert int(method.updates) == 2 and method.can_act
    still = [name for name, p in method.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert still == []


@pytest.mark.parametrize("kind", WITH_CRITICS)
def test_targets_begin_as_copies_and_follow_by_tau(kind: type[Any]) -> None:
    method = built(kind, critic={"tau": 0.25})
    pairs = averages(method)
    assert "critic" in pairs
    for net, average in pairs.values():
        assert same(weights(net), weights(average.net))
        assert not any(p.requires_grad for p in average.net.parameters())
    first = {name: weights(average.net) for name, (_, average) in pairs.items()}
    for _ in range(2 if kind is TD3BC else 1):
        method.training_step(batch(), 0)
    for name, (net, average) in pairs.items():
        for old, new, now in zip(first[name], weights(average.net), weights(net)):
            torch.testing.assert_close(new, old + 0.25 * (now - old))


def test_targets_may_stand_still_between_copies() -> None:
    """With a weight of 1 every third update copies critics and policy, as CRR's paper does every hundredth."""
    method = built(CRR, critic={"tau": 1.0, "target_every": 3})
    pairs = averages(method)
    assert set(pairs) == {"actor", "critic"}
    for update in range(1, 8):
        before = {name: weights(average.net) for name, (_, average) in pairs.items()}
        method.training_step(batch(), 0)
        for name, (net, average) in pairs.items():
            assert same(weights(average.net), weights(net) if update % 3 == 0 else before[name])


@pytest.mark.parametrize(("kind", "updates"), [(IQL, 2), (TD3BC, 4)])
def test_targets_move_at_every_so_manyth_update_that_may_move_them(kind: type[Any], updates: int) -> None:
    method = built(kind, critic={"target_every": 2})
    first = weights(method.target_critic.net)
    for update in range(1, updates + 1):
        method.training_step(batch(), 0)
        assert same(first, weights(method.target_critic.net)) == (update < updates)


@pytest.mark.parametrize("kind", WITH_CRITICS)
def test_values_decay_beside_their_step_and_policies_do_not(kind: type[Any]) -> None:
    """AdamW's decay: the first step with it ends lower by rate times decay times the initial weight."""
    lr, decay = 1e-2, 0.3
    plain, decayed = (built(kind, critic={"lr": lr, "weight_decay": w}) for w in (0.0, decay))
    first = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for method in (plain, decayed):
        method.draws.begin(method.draws.place, torch.device("cpu"))
        method.training_step(batch(), 0)
    values = [name for name in first if name.split(".")[0] in ("critic", "value")]
    assert {name.split(".")[0] for name in values} == ({"critic", "value"} if kind is IQL else {"critic"})
    for name in values:
        with_decay, without = decayed.get_parameter(name), plain.get_parameter(name)
        torch.testing.assert_close(with_decay, without - lr * decay * first[name], atol=1e-6, rtol=1e-4)
        assert not torch.equal(with_decay, without) or not bool(first[name].any())
    if kind in (CRR, CQL):  # whose policy takes its gradient before the values step
        assert same(weights(plain.actor), weights(decayed.actor))


@pytest.mark.parametrize("kind", WITH_CRITICS)
def test_a_policys_step_leaves_gradients_on_the_policy_alone(kind: type[Any]) -> None:
    method = built(kind, **({"policy_freq": 1} if kind is TD3BC else {}))
    method.training_step(batch(), 0)

    def others() -> list[torch.Tensor | None]:
        own = {*method.actor.parameters(), *getattr(method, "entropy_temperature", nn.Module()).parameters()}
        return [None if p.grad is None else p.grad.clone() for p in method.parameters() if p not in own]

    descend, seen = method.descend, []

    def watched(optimizer: Any, loss: torch.Tensor, name: str, *args: Any) -> torch.Tensor:
        before = others()
        norm: torch.Tensor = descend(optimizer, loss, name, *args)
        if name == "actor":
            seen.append(True)
            for old, new in zip(before, others()):
                assert (old is None) == (new is None) and (old is None or torch.equal(old, new))  # type: ignore[arg-type]
        return norm

    method.descend = watched
    method.training_step(batch(), 0)
    assert seen


@pytest.mark.parametrize("kind", WITH_CRITICS)
def test_what_terminates_is_worth_its_reward_and_the_rest_is_discounted(
    kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(kind.__module__)
    seen: list[torch.Tensor] = []
    td_loss = module.td_loss

    def spy(q: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(y)
        loss: torch.Tensor = td_loss(q, y)
        return loss

    monkeypatch.setattr(module, "td_loss", spy)
    method = built(kind, **({"policy_noise": 0.0} if kind is TD3BC else {}))
    plain = batch()
    for done, discount in ((1.0, 0.99), (0.0, 0.0)):
        method.training_step(plain._replace(done=torch.full((16,), done), discount=torch.full((16,), discount)), 0)
        assert torch.equal(seen[-1], plain.reward) and not seen[-1].requires_grad
    method.training_step(plain, 0)
    assert float((seen[-1] - plain.reward).abs().min()) > 0


@pytest.mark.parametrize("kind", LEARNERS)
def test_actions_are_in_the_box_and_the_same_for_the_same_state(kind: type[Any]) -> None:
    method = built(kind).eval()
    with torch.no_grad():
        method.actor.net[-1].bias.fill_(3.0)
    obs = 10 * np.random.default_rng(0).normal(size=(20, OBS)).astype(np.float32)
    action = method.act(obs)
    assert action.shape == (20, ACTION) and np.abs(action).max() <= 1
    np.testing.assert_array_equal(action, method.act(obs))
    np.testing.assert_allclose(action[3], method.act(obs[3]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LEARNERS)
def test_acting_keeps_no_graph_and_hinders_no_later_update(kind: type[Any]) -> None:
    method, other = built(kind), built(kind)
    choose, seen = method.choose_action, []

    def watched(*args: Any) -> torch.Tensor:
        seen.append(choose(*args))
        return seen[-1]

    method.choose_action = watched
    assert not method.act(torch.zeros(3, OBS)).is_inference() and seen[0].is_inference()
    for m in (method, other):
        torch.manual_seed(0)
        m.training_step(batch(), 0)
    assert same(weights(method), weights(other))


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("kind", WITH_CRITICS)
def test_each_critic_is_clipped_by_itself_where_asked(
    kind: type[Any], scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16-mixed scales gradients, of which the limit knows nothing."""
    monkeypatch.setattr(kind, "loss_scale", None if scale is None else torch.tensor(scale))
    method = built(kind, critic={"grad_clip": 1e-3, "clip_each": True})
    norms: list[float] = []
    step = method.guard

    def look(losses: Any, found: Any, data: Any) -> None:
        if "grad_norm/critic" in found:
            gradients = [p.grad for p in method.critic.parameters()]
            norms.extend(torch.cat([g[i].flatten() for g in gradients]).norm().item() for i in range(2))
        step(losses, found, data)

    method.guard = look
    method.manual_backward = lambda loss: ((scale or 1.0) * loss).backward()
    method.training_step(batch(), 0)
    assert norms == pytest.approx([1e-3 * (scale or 1.0)] * 2, rel=1e-2)


@pytest.mark.parametrize("kind", [CQL, CRR])
def test_several_next_actions_are_drawn_for_the_best_of_them(kind: type[Any]) -> None:
    shapes, data = {}, batch()
    for count in (1, 5):
        method = built(kind, critic={"backup_candidates": count})
        backup = method.backup

        def watched(next_obs: torch.Tensor, action: torch.Tensor, backup: Any = backup, count: int = count) -> Any:
            assert torch.equal(next_obs, data.next_obs)
            shapes[count] = tuple(action.shape)
            return backup(next_obs, action)

        method.backup = watched
        method.training_step(data, 0)
    assert shapes == {1: (16, ACTION), 5: (16, 5, ACTION)}


@pytest.mark.parametrize("kind", [TD3BC, IQL])
def test_without_draws_there_is_no_best_of_them(kind: type[Any]) -> None:
    with pytest.raises(ConfigError, match=rf"backup_candidates is 10, but {kind.__name__} draws no actions"):
        kind(critic={"backup_candidates": 10})


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_failed_update_is_diagnosed_by_the_largest_value(kind: type[Any]) -> None:
    method = built(kind)
    if kind is BC:
        assert method.diagnose(batch()) == {}
        return
    with torch.no_grad():
        method.critic.head.bias.fill_(-1e6)
    assert method.diagnose(batch())["max |Q|"] == pytest.approx(1e6, rel=1e-3)


BANDIT: dict[type[Any], dict[str, Any]] = {
    TD3BC: {"lr": 1e-3, "critic": {"lr": 1e-3}, "alpha": 1.0},
    IQL: {"lr": 3e-3, "critic": {"lr": 1e-3}},
    CQL: {"lr": 3e-3, "critic": {"lr": 3e-3}, "alpha": 0.2},
    CRR: {"lr": 3e-3, "critic": {"lr": 1e-3}, "beta": 0.1},
}


@pytest.mark.parametrize("kind", WITH_CRITICS)
def test_the_better_of_two_actions_is_learned(kind: type[Any]) -> None:
    method = fit(kind(**small(kind, **BANDIT[kind])), 500)
    action = float(method.act(np.zeros(2, dtype=np.float32))[0])
    assert 0.3 < action < 0.75
    obs, actions = torch.zeros(1, 2), torch.tensor([[[0.5], [-0.5]]])
    right, left = method.least_q(obs, actions)[0].tolist()
    assert right - left > 0.5


def test_a_data_module_of_windows_is_refused_with_what_to_use() -> None:
    from lit_diffrl.data import WindowData

    method = IQL()
    method._trainer = type("T", (), {"datamodule": WindowData("x", horizon=4)})()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="--data TransitionData, got WindowData"):
        method.setup("fit")


def test_the_bandit_has_two_kinds_of_actions() -> None:
    action = bandit().table[:, 2]
    assert float(action.mean().abs()) < 0.05 and float((action.abs() - 0.5).abs().max()) < 0.25
