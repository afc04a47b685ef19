"""DMEMM: Eqs. 9 to 13 on closed forms (oracles 17 to 22 of the planners' specification)."""

from __future__ import annotations

import itertools

import pytest
import torch

from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import DMEMM, Diffuser


def linear_world(planner: DMEMM, A: torch.Tensor, B: torch.Tensor, precision: torch.Tensor | None = None) -> None:
    """Replace T by s' ~ N(As + Ba, precision^-1) and R by the sum of the first action and the first state."""
    model = planner.world_model
    model.next_mean = lambda obs, action: obs @ A.T + action @ B.T
    if precision is not None:

        def log_prob(obs, action, next_obs, mixture=False):
            error = next_obs - model.next_mean(obs, action)
            return -0.5 * torch.einsum("...i,ij,...j->...", error, precision, error)

        model.log_prob = log_prob
    model.reward = lambda obs, action: action[..., 0] + obs[..., 0]


@pytest.fixture
def linear():
    generator = torch.Generator().manual_seed(4)
    A = 0.3 * torch.randn(4, 4, generator=generator)
    B = torch.randn(4, 2, generator=generator)
    root = torch.randn(4, 4, generator=generator)
    return A, B, root @ root.T + torch.eye(4)


def rollout(A, B, size=3, horizon=8):
    action = torch.randn(size, horizon, 2)
    obs = [torch.randn(size, 4)]
    for t in range(horizon - 1):
        obs.append(obs[-1] @ A.T + action[:, t] @ B.T)
    return torch.cat([action, torch.stack(obs, dim=1)], dim=-1)


def test_transition_loss_vanishes_on_true_dynamics_with_its_gradient(make_dmemm, linear):
    A, B, _ = linear
    planner = make_dmemm()
    linear_world(planner, A, B)
    plan = rollout(A, B).double().float().requires_grad_()
    loss = planner.transition_loss(plan, torch.ones(3, 8, dtype=torch.bool)).sum()
    loss.backward()
    assert loss.item() < 1e-9 and plan.grad.abs().max().item() < 1e-5


def test_a_perturbed_state_counts_as_target_and_as_input(make_dmemm, linear):
    A, B, _ = linear
    planner = make_dmemm()
    linear_world(planner, A, B)
    plan, delta = rollout(A, B), torch.tensor([0.3, -0.2, 0.5, 0.1])
    plan[:, 4, 2:] += delta
    loss = planner.transition_loss(plan, torch.ones(3, 8, dtype=torch.bool))
    assert torch.allclose(loss, (delta.square().sum() + (A @ delta).square().sum()).expand(3), rtol=1e-4)


def test_padded_rows_count_in_neither_modulation_loss(make_dmemm, linear):
    A, B, _ = linear
    planner = make_dmemm()
    linear_world(planner, A, B)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[:, 5:] = False
    plan = rollout(A, B)
    plan[:, 5:] = 7.0
    plan.requires_grad_()
    transition = planner.transition_loss(plan, mask)
    assert bool((transition < 1e-8).all())
    reward = planner.reward_loss(plan, mask)
    (transition + reward).sum().backward()
    assert bool((plan.grad[:, 5:] == 0).all())


def test_reward_loss_has_gradient_minus_w_at_real_rows_only(make_dmemm, make_batch, linear):
    planner = make_dmemm(goal_conditioned=True)
    linear_world(planner, *linear[:2])
    batch = make_batch(real=6)
    plan = batch.trajectory.clone().requires_grad_()
    losses = planner.modulation(plan, batch, torch.full((4,), 3))
    losses["rd"].backward()
    expected = torch.zeros(8, 6)
    expected[:6, 0] = -1.0
    expected[1:6, 2] = -1.0  # the state of row 0 is known
    assert torch.allclose(plan.grad, expected.expand(4, 8, 6) / (8 * 6) / 4, atol=1e-7)


def test_weights_of_the_specification(make_dmemm, make_batch):
    planner = make_dmemm()
    assert torch.equal(planner.reward_weights(make_batch(reward=2.0)), torch.ones(4))  # r_max everywhere
    assert torch.allclose(planner.reward_weights(make_batch(reward=0.0)), torch.full((4,), 0.05))
    assert torch.allclose(planner.reward_weights(make_batch(reward=-1.0)), torch.full((4,), 0.05))
    assert torch.allclose(planner.reward_weights(make_batch(reward=0.5)), torch.full((4,), 0.25))
    raw = make_dmemm(weighting={"mode": "raw"})
    assert torch.allclose(raw.reward_weights(make_batch(reward=-1.0)), torch.full((4,), -0.5))
    episode = make_dmemm(weighting={"mode": "raw", "source": "episode", "t_max": "episode"})
    assert torch.allclose(episode.reward_weights(make_batch(reward=1.0)), torch.full((4,), 24 / (40 * 2.0)))


def test_weights_do_not_change_when_rewards_and_r_max_scale(make_dmemm, make_batch):
    one = make_dmemm(weighting={"r_max": 2.0}).reward_weights(make_batch(reward=0.7))
    ten = make_dmemm(weighting={"r_max": 20.0}).reward_weights(make_batch(reward=7.0))
    assert torch.allclose(one, ten)


@pytest.mark.parametrize("mode", ["clamp", "minmax", "none"])
@pytest.mark.parametrize("reward", [-3.0, 0.0, 5.0])
def test_weights_are_never_negative_where_they_are_bounded(make_dmemm, make_batch, spec, mode, reward):
    import dataclasses

    planner = make_dmemm(weighting={"mode": mode}, spec=dataclasses.replace(spec, reward_min=-3.0))
    assert bool((planner.reward_weights(make_batch(reward=reward)) >= 0).all())


def test_without_modulation_the_gradient_is_diffusers_times_the_weight(make_diffuser, make_batch):
    batch = make_batch(reward=1.0)  # weight 0.5
    gradients = []
    for kind, options in ((Diffuser, {}), (DMEMM, {"lambda_tr": 0.0, "lambda_rd": 0.0, "guide": {"kind": "none"}})):
        planner = make_diffuser(kind, **options)
        torch.manual_seed(3)
        planner.diffusion_loss(batch)["total"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in planner.net.parameters()]))
    assert torch.allclose(gradients[1], 0.5 * gradients[0], rtol=1e-4, atol=1e-8)


def test_gradients_pass_through_the_frozen_models(make_dmemm, make_batch):
    planner = make_dmemm()
    losses = planner.diffusion_loss(make_batch())
    (losses["tr"] + losses["rd"]).backward()
    assert all(p.grad is None for p in planner.world_model.parameters())
    assert any(p.grad is not None and bool((p.grad != 0).any()) for p in planner.net.parameters())


def test_guidance_is_the_closed_form_of_a_linear_gaussian_world(make_dmemm, linear):
    A, B, precision = linear
    for through_next, weight in itertools.product((True, False), (0.0, 0.7)):
        guide = {"kind": "dual", "lambda_transition": weight, "next_obs_gradient": through_next}
        planner = make_dmemm(guide=guide)
        linear_world(planner, A, B, precision)
        plan = torch.randn(3, 8, 6, requires_grad=True)
        (gradient,) = torch.autograd.grad(planner.guide_objective(plan, 0).sum(), plan)
        action, obs = plan.detach().split([2, 4], dim=-1)
        pull = (obs[:, 1:] - obs[:, :-1] @ A.T - action[:, :-1] @ B.T) @ precision
        expected = torch.zeros(3, 8, 6)
        expected[:, :-1, :2] += weight * pull @ B
        expected[:, :-1, 2:] += weight * pull @ A
        if through_next:
            expected[:, 1:, 2:] -= weight * pull
        expected[..., 0] += 1
        expected[..., 2] += 1
        assert torch.allclose(gradient, expected, atol=1e-4)


class CountingNet(torch.nn.Module):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net, self.rows = net, []

    def forward(self, x: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(x))
        return self.net(x, j)


@pytest.mark.parametrize("kind", ["tweedie", "chain_paper", "chain_ddim", "chain_bridge"])
def test_calls_of_each_estimate(make_dmemm, make_batch, kind):
    planner = make_dmemm(x0_estimate=kind)
    planner.net = CountingNet(planner.net)
    seen = {}
    noised = planner.noised
    planner.noised = lambda x0: seen.setdefault("noised", noised(x0))
    planner.diffusion_loss(make_batch())
    k = seen["noised"][0]
    assert sum(planner.net.rows) == (4 if kind == "tweedie" else int(k.sum())), "the i = k row is shared"
    assert len(planner.net.rows) == (1 if kind == "tweedie" else 2)


@pytest.mark.parametrize("compute", ["checkpointed", "exact_two_pass"])
def test_chain_computations_give_one_gradient(make_dmemm, make_batch, compute):
    gradients = []
    for how in ("exact_batched", compute):
        planner = make_dmemm(x0_estimate="chain_ddim", chain={"compute": how, "chunk": 5}, goal_conditioned=True)
        torch.manual_seed(2)
        planner.diffusion_loss(make_batch())["total"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in planner.net.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "losses"),
    [
        ({"weighting": {"mode": "none"}}, {"wdiff", "tr", "rd"}),
        ({"lambda_tr": 0.0}, {"wdiff", "rd"}),
        ({"lambda_rd": 0.0}, {"wdiff", "tr"}),
        ({"guide": {"kind": "dual", "lambda_transition": 0.0}}, {"wdiff", "tr", "rd"}),
        ({"reduction": "mean", "aux_k_weight": "cutoff", "snr_cap": 5.0}, {"wdiff", "tr", "rd"}),
        ({"aux_k_weight": "min1_snr", "detach_transition_input": True, "reward_units": "raw"}, {"wdiff", "tr", "rd"}),
        ({"weighting": {"predicted": True, "unit_mean": True}}, {"wdiff", "tr", "rd"}),
        ({"predict": "eps", "x0_estimate": "chain_bridge"}, {"wdiff", "tr", "rd"}),
        ({"x0_estimate": "chain_paper", "chain": {"compute": "monte_carlo", "m": 2}}, {"wdiff", "tr", "rd"}),
    ],
)
def test_every_ablation_and_option_trains(make_dmemm, make_batch, options, losses):
    planner = make_dmemm(**options)
    found = planner.diffusion_loss(make_batch())
    assert set(found) - {"total"} == losses
    found["total"].backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in planner.net.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lambda_tr": -0.1}, "lambda_tr"),
        ({"x0_estimate": "twedie"}, "did you mean 'tweedie'"),
        ({"weighting": {"floor": 2.0}}, "weighting.floor"),
        ({"world_model_epochs": 0}, "uses its world_model"),
        ({"weighting": {"source": "episode"}}, "t_max"),
        ({"weighting": {"r_max": -1.0}}, "weighting.r_max"),
        ({"weighting": {"t_max": 0.0}}, "weighting.t_max"),
        ({"snr_cap": 5.0, "predict": "eps"}, "snr_cap"),
    ],
)
def test_bad_arguments_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        DMEMM(**{"diffusion_epochs": 1, "world_model_epochs": 1, **options})


def test_what_a_partial_group_leaves_out_is_the_methods_own_default():
    planner = DMEMM(diffusion_epochs=1, world_model_epochs=1, guide={"lambda_transition": 0.0})
    assert planner.guide.kind == "dual" and planner.guide.max_step == 0.1 and planner.guide.lambda_transition == 0.0


def test_reward_guidance_can_be_left_out(make_dmemm, linear):
    planner = make_dmemm(guide={"lambda_reward": 0.0, "lambda_transition": 0.0})
    linear_world(planner, *linear)
    plan = torch.randn(2, 8, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(planner.guide_objective(plan, 0).sum(), plan)
    assert bool((gradient == 0).all())


def test_weights_per_dimension_must_match_the_dataset(make_dmemm):
    with pytest.raises(ConfigError, match="transition_weights.*4"):
        make_dmemm(transition_weights=[1.0])
