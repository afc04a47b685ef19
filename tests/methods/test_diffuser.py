"""Diffuser: loss weights, conditioning, phases (oracles 9, 10 of the planners' specification)."""

from __future__ import annotations

import pytest
import torch

from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import Diffuser
from lit_diffrl.methods.diffuser import loss_weights
from lit_diffrl.methods.planner import impose


def test_loss_weights_of_the_worked_example():
    weights = loss_weights(4, 2, 1, 10.0, 1.0)
    assert weights[0].tolist() == [10, 10, 1] and bool((weights[1:] == 1).all())
    unit_errors = torch.ones(4, 3)
    unit_errors[0, 2] = 0  # the known state
    assert (weights * unit_errors).mean().item() == pytest.approx(2.416667, abs=1e-6)


def test_discounted_rows_keep_their_mean():
    weights = loss_weights(5, 1, 2, 1.0, 0.9)
    assert weights[:, -1].mean().item() == pytest.approx(1.0, abs=1e-6)
    assert weights[3, -1] / weights[2, -1] == pytest.approx(0.9, abs=1e-6)


@pytest.mark.parametrize("predict", ["x0", "eps"])
@pytest.mark.parametrize("goal_conditioned", [False, True])
def test_known_states_give_no_loss_and_no_gradient(make_diffuser, make_batch, predict, goal_conditioned):
    planner = make_diffuser(predict=predict, goal_conditioned=goal_conditioned)
    x0 = make_batch().trajectory
    k, _, x_k = planner.noised(x0)
    assert torch.equal(x_k[:, 0, 2:], x0[:, 0, 2:])
    assert torch.equal(x_k[:, -1, 2:], x0[:, -1, 2:]) == goal_conditioned
    prediction = torch.zeros_like(x0).requires_grad_()
    planner.diffusion_error(x0, prediction, k).sum().backward()
    assert bool((prediction.grad[:, 0, 2:] == 0).all()) and bool((prediction.grad[:, 0, :2] != 0).all())
    assert bool((prediction.grad[:, -1, 2:] == 0).all()) == goal_conditioned


def test_eps_error_is_the_x0_error_over_u(make_diffuser, make_batch):
    batch = make_batch().trajectory
    one, other = make_diffuser(predict="x0"), make_diffuser(predict="eps")
    k, _, _ = one.noised(batch)
    x0_hat = batch + 0.1
    u = one.schedule.at("u", k, batch).flatten()
    ratio = one.diffusion_error(batch, x0_hat, k) / other.diffusion_error(batch, x0_hat, k)
    assert torch.allclose(ratio, u.square(), rtol=1e-4)


def test_impose_writes_states_only():
    x = torch.randn(3, 5, 6)
    state = torch.randn(3, 4)
    y = impose(x, {0: state, -1: 2 * state}, 2)
    assert torch.equal(y[:, 0, 2:], state) and torch.equal(y[:, -1, 2:], 2 * state)
    assert torch.equal(y[..., :2], x[..., :2]) and torch.equal(y[:, 1:-1], x[:, 1:-1])


def test_a_network_learns_a_point_mass(make_diffuser, make_batch):
    planner = make_diffuser()
    batch = make_batch(size=64)
    batch = batch._replace(trajectory=torch.full_like(batch.trajectory, 0.3))
    optimizer = torch.optim.Adam(planner.net.parameters(), lr=3e-3)
    first = planner.diffusion_loss(batch)["total"].item()
    for _ in range(150):
        loss = planner.diffusion_loss(batch)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02 * first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"value_epochs": 3}, "does not use its value"),
        ({"guide": {"kind": "value"}}, "uses its value"),
        ({"plan": {"rank_by": "model"}}, "uses its world_model"),
        ({"guide": {"kind": "value"}, "value_epochs": 1, "horizon": [8, 16]}, "one horizon"),
        ({"plan": {"candidates": 4}}, "never be used"),
        ({"plan": {"horizons": [8, 16]}}, "different lengths"),
        ({"horizon": [8, 16]}, "different lengths"),
        ({"plan": {"horizons": [1]}}, "plan.horizons"),
        ({"plan": {"horizons": []}}, "plan.horizons"),
        ({"plan": {"replan_every": 5}}, "receding"),
        ({"plan": {"rank_by": "arrival"}, "world_model_epochs": 1}, "goal_conditioned"),
        ({"goal_conditioned": True}, "for ever"),
        ({"goal_conditioned": True, "plan": {"mode": "waypoints", "replan_every": 9}}, "for ever"),
        ({"guide": {"kind": "dual"}, "world_model_epochs": 1}, "not one of Diffuser's"),
        ({"guide": {"kind": "value", "at": "x0", "n_steps": 2}, "value_epochs": 1}, "one guide step"),
        ({"guide": {"kind": "value"}, "value_epochs": 1, "plan": {"horizons": [16]}}, "one horizon"),
        ({"sampler": {"eta": 0.5}}, "sampler.eta"),
        ({"sampler": {"name": "ddim", "final_noise": True}}, "final_noise"),
        ({"sampler": {"steps": 21}}, "sampler.steps"),
        ({"n_diffusion_steps": 0}, "n_diffusion_steps"),
        ({"lr": -1.0}, "model.lr"),
        ({"predict": "x1"}, "did you mean 'x0'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Diffuser(**{"diffusion_epochs": 1, **options})


def test_phases_follow_from_the_options():
    planner = Diffuser(guide={"kind": "value"}, value_epochs=2, diffusion_epochs=3)
    assert [(p.name, p.epochs) for p in planner.phases] == [("world_model", 0), ("value", 2), ("diffusion", 3)]
    assert planner.total_epochs == 5 and planner.phase.name == "value"


def test_the_value_loss_is_the_squared_error_of_the_return(make_diffuser, make_batch):
    planner = make_diffuser(guide={"kind": "value"}, value_epochs=1, dim=16)
    for parameter in planner.value.parameters():
        torch.nn.init.zeros_(parameter)
    assert planner.value_loss(make_batch(reward=2.0)).item() == pytest.approx(256.0)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_name(make_diffuser):
    planner = make_diffuser()
    planner.guard({"loss/diffusion": torch.tensor(1.0)}, {}, None)
    with pytest.raises(ConfigError, match="Diffuser, phase diffusion.*loss/diffusion = nan.*--model.lr"):
        planner.guard({"loss/diffusion": torch.tensor(float("nan"))}, {}, None)
