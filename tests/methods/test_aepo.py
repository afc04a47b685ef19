"""AEPO: its target under all options, what learns from what, and where it leads on a bandit with a known policy."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from closed_forms import GAUSSIAN, column, printed
from energy_learners import MEAN, SLOPE, STD, act, built, chain, fit, linear_bandit, small
from small_learners import same, transitions, weights
from torch import Tensor

from lit_diffrl.data import PolicyBatch
from lit_diffrl.diffusion.vp_sde import VPSDE
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import AEPO, aepo_critics
from lit_diffrl.methods.energy_learner import NoisedAction
from lit_diffrl.methods.energy_options import TargetOptions
from lit_diffrl.methods.expansion import expand
from lit_diffrl.methods.losses import expectile_loss

BETA = 3.0
LINEAR = torch.tensor([1.0, -2.0], dtype=torch.float64)
HESSIAN = torch.tensor([[-2.0, 0.5], [0.5, -1.0]], dtype=torch.float64)


# ---------------------------------------------------------------- the target


def ready(**target: Any) -> tuple[Any, PolicyBatch, NoisedAction, Tensor]:
    """A learner of two-dimensional actions in float64 with a filled table, a batch, its noised actions and noise."""
    options = {"baseline": False, "scale": 1.0, "q_reduce": "mean", **target}
    n = 64
    torch.manual_seed(0)
    data = transitions(torch.randn(n, 2), torch.rand(n, 2) - 0.5, torch.zeros(n))
    posterior = options.pop("posterior", {})
    method = built(AEPO, data, beta=BETA, target=options, posterior=posterior).double()
    drawn = [x.double() for x in data.transitions(torch.arange(n))]
    batch = PolicyBatch(*drawn)
    method.posterior.fit(method.behaviour, batch.obs, batch.action, method.draws, samples=256)
    method.draws.begin(method.draws.place, torch.device("cpu"))
    noised = method.noised(batch.action)
    return method, batch, noised, method.behaviour(noised.a_t, noised.t, batch.obs).detach()


def with_q(method: Any, q: Any) -> Any:
    method.q_of = lambda obs: q
    return method


def linear_q(action: Tensor) -> Tensor:
    return 0.7 + action @ LINEAR


def quadratic_q(action: Tensor) -> Tensor:
    return linear_q(action) + 0.5 * ((action @ HESSIAN) * action).sum(-1)


@pytest.mark.parametrize("a_bar", ["data_grad_step", "data", "posterior_mean", "fixed"])
@pytest.mark.parametrize("curvature", ["none", "hvp", "full"])
def test_for_a_linear_q_the_target_is_one_and_the_same(a_bar: str, curvature: str) -> None:
    """Wherever Q is expanded: beta Q(mu) + beta^2 v |g|^2 / 2 (oracle 3)."""
    method, batch, noised, eps_hat = ready(a_bar=a_bar, curvature=curvature)
    mu, v = method.posterior.mean(noised.a_t, noised.t, eps_hat), method.posterior.variance(noised.t)
    expected = BETA * linear_q(mu) + 0.5 * BETA**2 * v * 5.0
    torch.testing.assert_close(with_q(method, linear_q).energy_target(batch, noised, eps_hat), expected)


def test_the_papers_expansion_reuses_the_gradient_at_the_datas_action() -> None:
    """Eq. 46; the other reading differs by beta eta^2 g H g / 2 and more where mu is far."""
    targets = {}
    for grad_at in ("a0", "a_bar"):
        method, batch, noised, eps_hat = ready(grad_at=grad_at, eta=0.1)
        mu, v = method.posterior.mean(noised.a_t, noised.t, eps_hat), method.posterior.variance(noised.t)
        targets[grad_at] = with_q(method, quadratic_q).energy_target(batch, noised, eps_hat)
    g_0 = LINEAR + batch.action @ HESSIAN
    a_bar = batch.action + 0.1 * g_0
    for grad_at, g in (("a0", g_0), ("a_bar", LINEAR + a_bar @ HESSIAN)):
        expected = BETA * (quadratic_q(a_bar) + (g * (mu - a_bar)).sum(-1)) + 0.5 * BETA**2 * v * g.square().sum(-1)
        torch.testing.assert_close(targets[grad_at], expected)


def test_a_normalized_step_has_length_eta() -> None:
    action = torch.rand(64, 2, dtype=torch.float64)
    found = expand(quadratic_q, action, action, action[0], TargetOptions(eta=0.1, eta_normalized=True))
    torch.testing.assert_close((found.a_bar - action).norm(dim=-1), torch.full((64,), 0.1, dtype=torch.float64))


def test_second_order_is_the_same_wherever_a_quadratic_q_is_expanded() -> None:
    targets = []
    for a_bar in ("data", "posterior_mean", "fixed"):
        method, batch, noised, eps_hat = ready(a_bar=a_bar, curvature="full")
        targets.append(with_q(method, quadratic_q).energy_target(batch, noised, eps_hat))
    torch.testing.assert_close(targets[0], targets[1])
    torch.testing.assert_close(targets[0], targets[2])


def test_two_cumulants_ask_no_posterior_mean() -> None:
    method, batch, noised, eps_hat = ready(form="two_cumulant")
    target = with_q(method, quadratic_q).energy_target(batch, noised, eps_hat)
    g, v = LINEAR + batch.action @ HESSIAN, method.posterior.variance(noised.t)
    torch.testing.assert_close(target, BETA * quadratic_q(batch.action) + 0.5 * BETA**2 * v * g.square().sum(-1))
    torch.testing.assert_close(target, method.energy_target(batch, noised, 100 * eps_hat))


def test_the_sampled_mean_is_the_datas_action() -> None:
    method, batch, noised, eps_hat = ready(posterior={"mean": "sample"})
    target = with_q(method, linear_q).energy_target(batch, noised, eps_hat)
    v = method.posterior.variance(noised.t)
    torch.testing.assert_close(target, BETA * linear_q(batch.action) + 0.5 * BETA**2 * v * 5.0)


class HalfTheNoise(torch.nn.Module):
    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        return x * VPSDE().sigma(t)[:, None] / 2


def test_covariances_from_the_noise_lie_within_the_datas_and_agree_for_a_linear_network() -> None:
    """``eps = sigma a_t / 2`` has the isotropic covariance ``sigma^2 / alpha^2 (1 - sigma^2 / 2)``."""
    for covariance in ("jvp", "trace", "exact_trace", "full"):
        curvature = "full" if covariance == "full" else "none"
        method, batch, noised, eps_hat = ready(covariance=covariance, curvature=curvature)
        method.posterior.v_bar.fill_(1e6)
        method.behaviour = HalfTheNoise()
        plain = with_q(method, linear_q).energy_target(batch, noised, eps_hat)
        t = noised.t
        var = method.sde.noise_to_signal(t) * (1 - method.sde.sigma(t).square() / 2)
        mu = method.posterior.mean(noised.a_t, t, eps_hat)
        expected = BETA * linear_q(mu) + 0.5 * BETA**2 * var * 5.0
        torch.testing.assert_close(plain, expected)
        method.posterior.v_bar.fill_(1e-9)
        torch.testing.assert_close(method.energy_target(batch, noised, eps_hat), BETA * linear_q(mu), atol=1e-6, rtol=0)


def test_variances_of_one_network_are_parts_of_its_covariance() -> None:
    """Along a direction, in the mean, and by random signs in the mean over them (there are two pairs of those)."""
    free = {"posterior": {"clamp": False, "isotonic": False}}
    method, batch, noised, eps_hat = ready(covariance="full", curvature="full", **free)
    g = LINEAR.expand(64, 2)

    def covariance(kind: str) -> Tensor:
        curvature = "full" if kind == "full" else "none"
        method.target_options = dataclasses.replace(method.target_options, covariance=kind, curvature=curvature)
        return method.covariance(batch, noised, eps_hat, g).detach()

    whole = covariance("full")
    torch.testing.assert_close(covariance("jvp"), torch.einsum("bi,bij,bj->b", g, whole, g) / 5)
    trace = whole.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(covariance("exact_trace"), trace.mean(-1))
    estimates = torch.stack([trace.mean(-1) + whole[:, 0, 1], trace.mean(-1) - whole[:, 0, 1]])
    found = [covariance("trace") for _ in range(2)]
    for estimate in found:
        torch.testing.assert_close((estimate - estimates).abs().amin(0), torch.zeros_like(estimate))
    assert not torch.equal(*found)


def test_the_covariance_of_all_directions_takes_a_quadratic_q_exactly() -> None:
    """Where the posterior is no sphere: the energy of its own mean and covariance, whatever Q is expanded around."""
    for a_bar in ("data", "posterior_mean"):
        method, batch, noised, eps_hat = ready(covariance="full", curvature="full", a_bar=a_bar)
        target = with_q(method, quadratic_q).energy_target(batch, noised, eps_hat)
        mu = method.posterior.mean(noised.a_t, noised.t, eps_hat)
        cov = method.covariance(batch, noised, eps_hat, mu)
        assert (cov[:, 0, 1].abs() > 1e-4).any()
        g = LINEAR + mu @ HESSIAN
        identity = torch.eye(2, dtype=torch.float64)
        rest = identity - BETA * cov @ HESSIAN
        gain = torch.linalg.solve(rest, cov)
        known = BETA * quadratic_q(mu) + 0.5 * BETA**2 * torch.einsum("bi,bij,bj->b", g, gain, g)
        torch.testing.assert_close(target, known - 0.5 * torch.logdet(rest))


@pytest.mark.parametrize("clamp", [True, False])
def test_one_mean_over_the_batch_makes_a_variance_of_every_time(clamp: bool) -> None:
    """The other reading of Eq. 22, which the noise-to-signal ratio carries beyond the data's variance."""
    method, batch, noised, eps_hat = ready(covariance="batch", posterior={"clamp": clamp, "isotonic": clamp})
    mu, ratio = method.posterior.mean(noised.a_t, noised.t, eps_hat), method.sde.noise_to_signal(noised.t)
    var = ratio * (1 - eps_hat.square().mean())
    assert (var > method.posterior.v_bar).any()
    var = var.clamp(max=float(method.posterior.v_bar)) if clamp else var
    target = with_q(method, linear_q).energy_target(batch, noised, eps_hat)
    torch.testing.assert_close(target, BETA * linear_q(mu) + 0.5 * BETA**2 * var * 5.0)


def test_the_target_of_support_actions_is_the_energy_itself() -> None:
    """4096 actions of N((0.1, -0.2), 0.04), for which the energy of a linear Q is known; all else is unused."""
    method, batch, noised, eps_hat = ready(form="support")
    draw = torch.Generator().manual_seed(0)
    mean, v = torch.tensor([0.1, -0.2], dtype=torch.float64), 0.04
    support = mean + v**0.5 * torch.randn(64, 4096, 2, generator=draw, dtype=torch.float64)
    t = 0.2 + 0.8 * noised.t  # at small times few of them count
    alpha, sigma = method.sde.alpha(t)[:, None], method.sde.sigma(t)[:, None]
    origin, eps = torch.randn(2, 64, 2, generator=draw, dtype=torch.float64)
    a_t = alpha * (mean + v**0.5 * origin) + sigma * eps
    noised = NoisedAction(t, eps, a_t)
    found = with_q(method, linear_q).energy_target(batch, noised, 100 * eps_hat, support)
    total = alpha**2 * v + sigma**2
    mu, var = mean + alpha * v / total * (a_t - alpha * mean), (v * sigma**2 / total)[:, 0]
    exact = BETA * linear_q(mu) + 0.5 * BETA**2 * var * 5.0
    assert (found - exact).abs().max() < 0.3 and (found - exact).mean().abs() < 0.02


def test_the_target_asks_the_least_target_critic_and_carries_no_gradient() -> None:
    """Oracle 22."""
    whole = {"curvature": "full", "covariance": "full"}
    for o in ({}, {"q_reduce": "min"}, {"use_target": False}, {"curvature": "full"}, {"covariance": "jvp"}, whole):
        method, batch, noised, eps_hat = ready(**o)
        target = method.energy_target(batch, noised, eps_hat)
        assert not target.requires_grad
        with torch.no_grad():
            method.critic.head.bias.add_(1.0)
        moved = method.energy_target(batch, noised, eps_hat) - target
        torch.testing.assert_close(moved, torch.full_like(moved, 0.0 if o.get("use_target", True) else BETA))
        method.energy_loss(batch, noised).backward()
        others = [p for name in ("behaviour", "critic", "value") for p in getattr(method, name).parameters()]
        assert all(p.grad is None for p in others)


def test_baseline_and_scale_leave_the_guidance_as_it_is() -> None:
    """Oracle 24: what is subtracted knows nothing of the action, what is divided is multiplied again."""
    plain, batch, noised, eps_hat = ready()
    other, *_ = ready(baseline=True, scale=7.0)
    energy = other.energy_target(batch, noised, eps_hat) + BETA * other.value(batch.obs).detach()
    torch.testing.assert_close(energy, plain.energy_target(batch, noised, eps_hat))
    with torch.no_grad():
        head = list(other.energy.net)[-1]
        for p, q in zip(other.energy.parameters(), plain.energy.parameters()):
            p.copy_(q)
        head.weight.div_(7.0)
    for method in (plain, other):
        method.energy_updates += 1
        method.float()
    for norm in (None, "sample", "batch", "term"):
        actions = []
        for method in (other, plain):
            method.rescale_norm = norm
            with method.acting_as(1.5, norm is not None):
                actions.append(act(method, 6))
        torch.testing.assert_close(*actions, msg=f"rescaled: {norm}")


# ---------------------------------------------------------------- guidance without the energy network


class ExactNoise(torch.nn.Module):
    """Of the behaviour N(0.2, 0.25)."""

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        return GAUSSIAN.eps(x, t)


# curvature of the target, h of Q = a + h a^2 / 2, beta, t; slope of the energy at a_t = 0.5
CLOSED = [
    ("none", -1, 1, 0.1, "0.382797"), ("none", -1, 3, 0.3, "0.171189"), ("none", -4, 3, 0.2, "0.420388"),
    ("hvp", -1, 1, 0.1, "0.385207"), ("hvp", -1, 3, 0.3, "0.292663"), ("hvp", -4, 3, 0.2, "-0.135651"),
    ("full", -1, 1, 0.1, "0.385207"), ("full", -1, 3, 0.3, "0.292663"), ("full", -4, 3, 0.2, "-0.135651"),
]  # fmt: skip


@pytest.mark.parametrize(("curvature", "h", "beta", "t", "slope"), CLOSED)
def test_the_closed_form_guides_by_its_own_gradient(
    curvature: str, h: float, beta: float, t: float, slope: str
) -> None:
    """Through noise, posterior mean and critic: of first order what AEPO's energy has, of second the exact one."""
    options = {"curvature": curvature, "baseline": False}
    method = built(AEPO, guidance="closed_form", beta=float(beta), target=options, posterior={"clip": False}).double()
    method.behaviour = ExactNoise()
    method.posterior.action_mean.fill_(0.2)
    method.posterior.mu_at.fill_(0.2)
    method.posterior.variance = lambda t: GAUSSIAN.variance(column(0.0), t)[:, 0]
    with_q(method, lambda a: (a + 0.5 * h * a**2)[:, 0])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            gradient = method.guidance_of(torch.zeros(1, 2, dtype=torch.float64), [t])
            found = gradient(column(0.5), torch.tensor([t], dtype=torch.float64))
        assert float(found) == printed(slope)
        assert not found.requires_grad


def test_a_trained_run_can_be_guided_by_either() -> None:
    """Critics of ReLUs too, which have no second derivative; gradients of weights are left alone."""
    obs, noise = torch.zeros(4, 2), torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
    for activation, curvature in (("relu", "full"), ("silu", "full"), ("silu", "hvp"), ("relu", "none")):
        posterior = {"mean": "eps", "clip": False}  # so few updates leave nothing of a calibrated mean
        options = {"critic": {"activation": activation}, "target": {"curvature": curvature}, "posterior": posterior}
        method = fit(small(AEPO, **options), 3)
        grads = [p.grad for p in method.parameters()]
        found = []
        for guidance, degree in (("network", 1.0), ("closed_form", 1.0), ("closed_form", 0.0)):
            method.guidance = guidance
            with torch.inference_mode():
                found.append(method.draw_actions(obs, noise, method.sampler, (degree, False)))
            method.reset(seeds=range(4))
            with method.acting_as(degree, False):
                assert np.isfinite(method.act(obs.numpy())).all()
        assert all(x.isfinite().all() for x in found)
        assert not any(torch.equal(x, y) for x, y in itertools.combinations(found, 2)), (activation, curvature)
        assert all(p.grad is grad for p, grad in zip(method.parameters(), grads, strict=True))


# ---------------------------------------------------------------- training


def test_the_scale_is_the_deviation_of_the_target() -> None:
    data = linear_bandit()
    method = fit(small(AEPO, critic={"activation": "silu"}), 20, data)
    batch = data.transitions(torch.arange(len(data.table)))
    noised = method.noised(batch.action)
    target = method.energy_target(batch, noised, method.behaviour(noised.a_t, noised.t, batch.obs).detach())
    assert method.guidance_unit == pytest.approx(float(target.std()), rel=0.15)
    fixed = fit(small(AEPO, target={"scale": 2.5}), 2)
    assert fixed.guidance_unit == 2.5


def test_tau_one_half_is_half_the_squared_error() -> None:
    """Oracle 17; the expectiles themselves are tested with the losses."""
    u = torch.linspace(-2, 3, 7, dtype=torch.float64)
    assert float(expectile_loss(u, 0.5)) == pytest.approx(float(u.square().mean()) / 2)


def test_the_value_becomes_the_expectile_of_the_critics() -> None:
    """Rewards uniform in [0, 1] whatever the action: 0.75 for tau = 0.9."""
    generator = torch.Generator().manual_seed(0)
    n = 2000
    reward = torch.rand(n, generator=generator)
    data = transitions(torch.zeros(n, 2), 2 * reward[:, None] - 1, reward)
    method = fit(small(AEPO, expectile=0.9, energy_epochs=0, critic={"lr": 1e-2}), 250, data)
    assert float(method.value(torch.zeros(1, 2))) == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("q_training", ["iql", "isql", "cql"])
def test_every_way_to_train_critics_learns_the_slope(q_training: str) -> None:
    """And cql holds values of actions outside of the data down."""
    options = {"q_training": q_training, "cql_weight": 0.5, "energy_epochs": 0}
    method = fit(small(AEPO, **options), 200, linear_bandit(1000))
    obs, action = torch.zeros(3, 2), torch.tensor([[-0.15], [0.35], [-1.0]])
    low, high, outside = method.least_q(obs, action).tolist()
    if q_training != "cql":
        assert high - low == pytest.approx(0.5 * SLOPE, abs=0.15)
    else:
        assert high > low and outside < low - 0.75 * SLOPE


def test_the_conservative_term_takes_as_many_uniform_actions_as_it_is_told() -> None:
    asked: list[int] = []
    for count in (1, 10):
        method = small(AEPO, q_training="cql", cql_actions=count, cql_backup="support", energy_epochs=0)
        conservative = method.conservative

        def watched(q: Tensor, batch: PolicyBatch, method: Any = method, inner: Any = conservative) -> Tensor:
            forward = method.critic.forward

            def counted(obs: Tensor, action: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                asked.append(action.shape[1])
                return forward(obs, action, *args, **kwargs)

            method.critic.forward = counted
            try:
                return inner(q, batch)
            finally:
                method.critic.forward = forward

        method.conservative = watched
        fit(method, 1, linear_bandit(64))
        assert not hasattr(method, "value"), "the softmax over support actions is the value"
    assert asked == [8 + 1, 8 + 10]


def test_joint_training_moves_all_networks_in_every_update() -> None:
    """Algorithm 1: one phase, its table tracked."""
    nets = ("behaviour", "value", "critic", "energy")
    options = {"behaviour_epochs": 0, "critic_epochs": 0, "schedule": "joint", "target": {"scale": 1.0}}
    method = small(AEPO, **options)
    seen: list[dict[str, Any]] = []
    method.on_train_batch_end = lambda *args: seen.append({n: weights(getattr(method, n)) for n in nets})
    fit(method, 4, linear_bandit())
    for before, after in itertools.pairwise(seen):
        assert not any(same(before[n], after[n]) for n in nets)
    assert bool(method.posterior.fitted) and float(method.posterior.v_bar) == pytest.approx(STD**2, rel=0.1)
    assert method.can_act


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance": "closed_form", "energy_epochs": 0}, "nothing would guide; train with 1"),
        (
            {"posterior": {"mean": "sample"}, "target": {"a_bar": "posterior_mean"}},
            "would be it, too; use a_bar 'data'",
        ),
        ({"posterior": {"mean": "sample"}, "guidance": "closed_form"}, "no data's action to take"),
        ({"cql_backup": "support"}, "cql_backup 'support' is for model.q_training cql, got 'iql'"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AEPO(**options)


def test_a_variance_that_is_not_held_is_not_smoothed_either() -> None:
    """Refused where a run begins: the table of a finished one is made."""
    method = small(AEPO, posterior={"clamp": False})
    with pytest.raises(ConfigError, match="isotonic true smooths a variance that model.posterior.clamp false leaves"):
        fit(method)


def test_a_second_run_of_one_object_has_averages_of_its_own() -> None:
    method = small(AEPO, behaviour_epochs=0, critic_epochs=0, schedule="joint", target={"scale": 1.0})
    weights = []
    for _ in range(2):
        fit(method, 4, linear_bandit())
        weights.append(float(method.posterior.weight.max()))
    assert weights[0] > 0 and weights[1] == pytest.approx(weights[0], rel=0.5)


def test_guidance_moves_the_policy_as_far_as_it_should() -> None:
    """beta 2 moves the data's N(0.1, 0.0625) by beta Q' var = 0.1875 and leaves its deviation; all networks trained.

    In seconds, so roughly: the specification's tolerances are for the longer training of test_energy_bandits.py.
    """
    data = linear_bandit(1000)
    data.batch_size = 256
    options = {"behaviour_epochs": 3, "critic_epochs": 1, "energy_epochs": 3, "sampler": {"steps": 15}}
    rates = {"behaviour": {"lr": 1e-3}, "energy": {"lr": 2e-3}}
    method = fit(small(AEPO, beta=2.0, critic={"activation": "silu"}, **options, **rates), 300, data)
    means = []
    for degree in (0.0, 1.0):
        with method.acting_as(degree, False):
            action = act(method, 2000)
        means.append(float(action.mean()))
        assert float(action.std()) == pytest.approx(STD, rel=0.35)
    assert means[0] == pytest.approx(MEAN, abs=0.08)
    assert 0.5 < (means[1] - means[0]) / (2 * SLOPE * STD**2) < 1.5


@pytest.mark.parametrize("q_training", ["iql", "isql", "cql", "cql by support"])
def test_what_terminates_is_worth_its_reward_and_a_time_limit_ends_nothing(
    q_training: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle 19."""
    seen: list[tuple[Tensor, PolicyBatch]] = []
    td_loss = aepo_critics.td_loss

    class Watched(AEPO):
        def update_critics(self, first: Any, second: Any, batch: PolicyBatch) -> None:
            def watched(q: Tensor, y: Tensor) -> Tensor:
                seen.append((y, batch))
                return td_loss(q, y)

            monkeypatch.setattr(aepo_critics, "td_loss", watched)
            super().update_critics(first, second, batch)

    obs = torch.arange(6.0)[:, None].expand(-1, 2)
    options: dict[str, Any] = {"q_training": q_training.partition(" ")[0], "energy_epochs": 0}
    if q_training == "cql by support":
        options["cql_backup"] = "support"
    fit(small(Watched, **options), 1, transitions(obs, torch.zeros(6, 1), torch.ones(6)))
    ((y, batch),) = seen
    assert bool((batch.done == 1).all()) and torch.equal(y, batch.reward)
    fit(small(Watched, **options), 1, chain())
    y, batch = seen[-1]
    ended = batch.done == 1
    assert bool(ended.any()) and torch.equal(y[ended], batch.reward[ended])
    cut = batch.obs[:, 0] == 2
    assert bool(cut.any()) and not bool((batch.done[cut] == 1).any())
    assert float((y[~ended] - batch.reward[~ended]).abs().min()) > 0


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("weight", ["uniform", "alpha2"])
def test_the_loss_is_of_errors_in_units_of_the_scale_weighted_by_time(loss: str, weight: str) -> None:
    """Eq. 26 and its options."""
    method, batch, noised, eps_hat = ready(loss=loss, weight=weight, scale=0.05)
    error = method.learnt_energy(noised.a_t, noised.t, batch.obs) - method.energy_target(batch, noised, eps_hat) / 0.05
    far = error.abs() > 1
    assert bool(far.any() and (~far).any()), "both parts of the Huber loss are met"
    each = error.square() if loss == "mse" else torch.where(far, error.abs() - 0.5, 0.5 * error.square())
    weights_ = method.sde.alpha(noised.t) ** 2 if weight == "alpha2" else torch.ones(())
    torch.testing.assert_close(method.energy_loss(batch, noised), (weights_ * each).mean())
