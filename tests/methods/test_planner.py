"""Planning: conditions, guidance hooks, ranking, noise streams, the controller (oracles 9, 30, 32)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_diffrl.errors import ConfigError
from lit_diffrl.methods.planner import Plan, waypoint

MODEL = {"plan": {"candidates": 5, "rank_by": "model", "rank_quantile": 0.01}, "world_model_epochs": 1}


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver"])
@pytest.mark.parametrize("at", ["xt", "mean", "x0", "x0_through"])
def test_conditions_hold_bit_for_bit_under_every_guide(make_dmemm, name, at):
    planner = make_dmemm(
        goal_conditioned=True,
        plan={"mode": "waypoints"},
        sampler={"name": name},
        guide={"at": at, "scale": 0.5, "n_steps": 1 if at in ("mean", "x0") else 2},
    )
    conditions = {0: torch.randn(6, 4), -1: torch.randn(6, 4)}
    with torch.no_grad():
        plans = planner.sample_plans(conditions, torch.randn(6, 8, 6))
    assert torch.equal(plans[:, 0, 2:], conditions[0]) and torch.equal(plans[:, -1, 2:], conditions[-1])
    assert not torch.equal(plans[0, 0, :2], plans[1, 0, :2])


@pytest.mark.parametrize("at", ["xt", "mean", "x0", "x0_through"])
def test_guidance_changes_plans_and_works_in_inference_mode(make_dmemm, at):
    state = torch.zeros(1, 4).numpy()
    plans = []
    for scale in (0.0, 5.0):
        planner = make_dmemm(guide={"kind": "dual", "at": at, "scale": scale, "max_step": 0.1})
        planner.reset(seeds=[3])
        with torch.inference_mode():
            plans.append(planner.plan(state)[0].obs)
    assert np.isfinite(plans[1]).all() and not np.allclose(*plans)


def test_the_cap_bounds_every_shift(make_dmemm):
    planner = make_dmemm(guide={"kind": "dual", "at": "xt", "scale": 1e6, "max_step": 0.1})
    x = torch.randn(2, 8, 6)
    step = planner._guide_step(x, lambda y: y, 5, 5, 1.0)
    assert step.abs().max().item() == pytest.approx(0.1) and planner.guide.t_stopgrad == 0


def test_no_guidance_in_the_last_steps(make_dmemm):
    planner = make_dmemm(guide={"kind": "dual", "at": "xt", "scale": 1.0, "t_stopgrad": 3})
    x = torch.randn(2, 8, 6)
    assert bool((planner._guide_step(x, lambda y: y, 3, 3, 1.0) == 0).all())
    assert bool((planner._guide_step(x, lambda y: y, 4, 4, 1.0) != 0).any())


def test_same_seed_same_plan_and_each_candidate_its_own_noise(make_diffuser):
    planner = make_diffuser(**MODEL)
    obs = np.zeros((2, 4), dtype=np.float32)
    planner.reset(seeds=[5, 6])
    first = planner.plan(obs)
    planner.reset(seeds=[5, 6])
    again = planner.plan(obs)
    assert np.array_equal(first[0].candidates, again[0].candidates)
    assert not np.array_equal(first[0].obs, first[1].obs)
    assert len(np.unique(first[0].candidates[:, 3, 0])) == 5


def test_an_episodes_noise_does_not_depend_on_its_neighbours(make_diffuser):
    planner = make_diffuser()
    planner.reset(seeds=[5, 6, 7])
    batch = planner.plan(np.zeros((3, 4), dtype=np.float32))
    planner.reset(seeds=[7])
    alone = planner.plan(np.zeros(4, dtype=np.float32))
    # Equal but for rounding, which depends on the number of rows in a matrix product.
    assert np.allclose(batch[2].obs, alone.obs, atol=1e-3)


def test_plans_that_blow_up_are_an_error_not_an_action(make_dmemm):
    planner = make_dmemm(guide={"kind": "dual", "at": "xt", "scale": 1e30, "max_step": None})
    with pytest.raises(ConfigError, match="guide.max_step"):
        planner.act(np.zeros(4, dtype=np.float32))


def test_the_executed_plan_is_the_best_candidate(make_diffuser):
    planner = make_diffuser(**MODEL)
    planner.rank = lambda plans: plans[:, 3, 2]  # the first coordinate of row 3
    planner.reset(seeds=[1])
    plan = planner.plan(np.zeros(4, dtype=np.float32))
    assert plan.obs[3, 0] == plan.candidates[:, 3, 0].max()


def test_plans_of_several_lengths_compete(make_diffuser):
    planner = make_diffuser(**{**MODEL, "horizon": [8, 12, 16]})
    planner.rank = lambda plans: torch.full((len(plans),), -abs(plans.shape[1] - 12.0))
    assert len(planner.plan(np.zeros(4, dtype=np.float32)).obs) == 12


def test_ranking_charges_only_the_shortfall_of_unlikely_transitions(make_diffuser):
    planner = make_diffuser(**MODEL)
    plans = torch.randn(3, 8, 6) * 0.1
    planner.likelihood_floor.fill_(-1e9)
    free = planner.rank(plans)
    planner.likelihood_floor.fill_(1e9)
    assert bool((planner.rank(plans) < free - 1e6).all())


def test_waiting_at_the_goal_counts_for_goal_plans(make_diffuser):
    planner = make_diffuser(**{**MODEL, "goal_conditioned": True, "plan": {**MODEL["plan"], "mode": "waypoints"}})
    planner.likelihood_floor.fill_(-1e9)
    planner.world_model.reward = lambda obs, action: torch.ones(obs.shape[:-1])
    assert planner.rank(torch.zeros(1, 8, 6)).item() == pytest.approx(40.0)  # 8 rows and the 32 that remain
    assert planner.rank(torch.zeros(1, 16, 6)).item() == pytest.approx(40.0)


def test_controller_of_the_worked_example(make_diffuser):
    planner = make_diffuser(plan={"mode": "waypoints"}, goal_conditioned=True)
    target = np.array([[0, 0, 0.5, 0], [1, 2, 0.5, -1]], dtype=np.float32)
    plan = Plan(target, np.zeros((2, 2)), 0.0, target[None])
    assert planner._execute(plan, np.array([0, 0, 0.5, 0])).tolist() == [1, 1]
    assert waypoint(target, 5.0).tolist() == [1, 2, 0, 0], "after the end the velocity target is 0"
    assert waypoint(target, 0.5).tolist() == [0.5, 1, 0.5, -0.5]


def test_a_waypoint_planner_plans_once_and_forgets_on_reset(make_diffuser):
    planner = make_diffuser(plan={"mode": "waypoints"}, goal_conditioned=True)
    planner.reset(seeds=[1, 2])
    obs = np.zeros((2, 4), dtype=np.float32)
    planner.act(obs)
    kept = planner.plan_trace()
    planner.act(obs + 0.1)
    assert planner.plan_trace()[0] is kept[0]
    planner.reset(mask=[True, False], seeds=[9, 9])
    planner.act(obs)
    assert planner.plan_trace()[0] is not kept[0] and planner.plan_trace()[1] is kept[1]


def test_replanning_follows_its_period(make_diffuser):
    plan = {"mode": "waypoints", "replan_every": 3, "rank_by": "arrival"}
    planner = make_diffuser(plan=plan, goal_conditioned=True, horizon=[8, 12], world_model_epochs=1)
    obs = np.zeros((1, 4), dtype=np.float32)
    plans = []
    for _ in range(7):
        planner.act(obs)
        plans.append(id(planner.plan_trace()[0]))
    assert plans[0] == plans[1] == plans[2] != plans[3] == plans[5] != plans[6]


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_act_returns_what_it_was_given(make_diffuser, form):
    planner = make_diffuser()
    one = np.zeros(4, dtype=np.float32) if form == "numpy" else torch.zeros(4)
    batch = np.zeros((3, 4)) if form == "numpy" else torch.zeros(3, 4)
    assert type(planner.act(one)) is type(one) and planner.act(one).shape == (2,)
    actions = planner.act(batch, active=[True, False, True])
    assert actions.shape == (3, 2) and float(abs(actions[1]).sum()) == 0
    assert bool((abs(actions) <= 1).all())


def test_a_goal_planner_without_goal_says_what_it_needs(make_diffuser, spec):
    import dataclasses

    planner = make_diffuser(
        goal_conditioned=True,
        plan={"mode": "waypoints"},
        spec=dataclasses.replace(spec, goal=None, goal_key="desired_goal"),
    )
    with pytest.raises(ConfigError, match="desired_goal"):
        planner.act(np.zeros(4, dtype=np.float32))


def test_waypoints_need_positions_and_velocities(make_diffuser, spec):
    import dataclasses

    with pytest.raises(ConfigError, match="twice action_dim"):
        make_diffuser(plan={"mode": "waypoints"}, spec=dataclasses.replace(spec, obs_dim=5))


def test_guidance_on_the_mean_is_told_the_level_of_the_mean(make_dmemm):
    planner = make_dmemm(guide={"at": "mean"}, sampler={"name": "ddim", "steps": 5})
    levels: list[int] = []
    planner.guide_objective = lambda x, level: levels.append(level) or x.sum(dim=(1, 2))
    with torch.no_grad():
        planner.sample_plans({0: torch.zeros(1, 4)}, torch.randn(1, 8, 6))
    assert levels == [8, 6, 4, 2, 0]


def test_arrival_prefers_the_shorter_of_feasible_plans_whatever_the_reward(make_diffuser):
    plan = {"mode": "waypoints", "rank_by": "arrival", "rank_quantile": 0.01}
    planner = make_diffuser(plan=plan, goal_conditioned=True, horizon=[8, 12], world_model_epochs=1)
    planner.likelihood_floor.fill_(-1e9)
    assert planner.rank(torch.randn(1, 8, 6)).item() - planner.rank(torch.randn(1, 12, 6)).item() == pytest.approx(4)
