"""Diffusion policies against closed forms: oracles 7, 8, 9, 14 and 19 of their specification, by its printed digits.

For data N(mean, std^2) the best network is affine in x; it takes the place of the policy's own here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from printed import digits, printed
from torch import Tensor, nn

from lit_diffrl.diffusion.continuous import LogSNR
from lit_diffrl.diffusion.dpm_ode import sample_dpm_ode
from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.methods.diffusion_policy import DiffusionPolicy, Noised
from lit_diffrl.methods.losses import choose_candidates
from lit_diffrl.methods.policy_options import ActionSamplerOptions, NoiseNetOptions
from lit_diffrl.nets.activations import mish

STEPS = (0, 99, 249, 499, 749, 999)  # 0-based
Eps = Callable[[Tensor, Tensor], Tensor]


class Exact(nn.Module):
    """E[eps | x] for actions N(mean, std^2), at every step; it stands in for the noise network."""

    def __init__(self, schedule: Schedule, std: float, mean: float = 0.0) -> None:
        super().__init__()
        self.snr, self.std, self.mean = LogSNR(schedule), std, mean

    def forward(self, x: Tensor, k: Tensor, obs: Tensor | None = None) -> Tensor:
        times = [(index + 1) / self.snr.num_steps for index in k.tolist()]
        alpha, sigma = (x.new_tensor([f(t) for t in times])[:, None] for f in (self.snr.alpha, self.snr.sigma))
        return sigma * (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)

    def given(self, obs: Tensor, steps: Any) -> Eps:
        return self


def exact_policy(kind: str, num_steps: int, std: float, mean: float = 0.0) -> DiffusionPolicy:
    policy = DiffusionPolicy(1, 1, Schedule(kind, num_steps, dtype=torch.float64), NoiseNetOptions(hidden=4)).double()
    policy.net = Exact(policy.schedule, std, mean)  # type: ignore[assignment]
    return policy


# ---------------------------------------------------------------- oracle 7: Eq. 9


def test_eq_9_is_the_mean_of_the_actions_given_what_is_seen_of_them() -> None:
    policy = exact_policy("linear", 1000, 0.3)
    k = torch.tensor(STEPS) + 1
    x = torch.full((len(STEPS), 1), 1e-3, dtype=torch.float64)  # too small for the clip; all is linear
    eps = policy.net(x, k - 1)
    slope = policy.approximate(Noised(k, x, eps, x[:, 0]))[:, 0] / 1e-3
    alpha_bar = policy.schedule.exact("alpha_bar")[k]
    std = slope * (alpha_bar * 0.3**2 + 1 - alpha_bar).sqrt()
    assert std.tolist() == printed("0.299833 0.198872 0.090086 0.026184 0.005218 0.000572")


def test_an_error_of_the_network_reaches_eq_9_by_the_noise_to_signal_ratio() -> None:
    policy = exact_policy("linear", 1000, 0.3)
    k, zero = torch.tensor(STEPS) + 1, torch.zeros(len(STEPS), 1, dtype=torch.float64)
    moved = policy.approximate(Noised(k, zero, zero - 1e-3, zero[:, 0]))[:, 0] / 1e-3
    assert moved.tolist() == printed("0.0100005 0.338828 0.952936 3.424137 17.246983 157.407281")


@pytest.mark.parametrize(("error", "share"), [(None, 0.35), (0.1, 0.71)])
def test_the_clip_of_eq_9_leaves_mostly_small_and_medium_steps(error: float | None, share: float) -> None:
    """Share of entries that pass a gradient: with a network of zeros, and with one that errs by 0.1."""
    torch.manual_seed(0)
    policy = DiffusionPolicy(1, 1, Schedule("linear", 1000), NoiseNetOptions(hidden=4))
    k = torch.randint(1, 1001, (100_000,))
    action, eps = 1.8 * torch.rand(100_000, 1) - 0.9, torch.randn(100_000, 1)
    eps_hat = torch.zeros_like(eps) if error is None else eps + error * torch.randn_like(eps)
    a_hat = policy.approximate(Noised(k, policy.schedule.q_sample(action, k, eps), eps_hat, k.float()))
    assert float((a_hat.abs() < 1).float().mean()) == pytest.approx(share, abs=0.01)


# ---------------------------------------------------------------- oracle 8: the least loss


class Corners:
    """Draws at which the mean of a squared linear function of action and noise is its expectation, for every step."""

    def __init__(self, num_steps: int) -> None:
        self.steps = torch.arange(1, num_steps + 1).repeat_interleave(4)

    def randint(self, low: int, high: int, like: Tensor) -> Tensor:
        assert (low, high) == (1, int(self.steps[-1]) + 1)
        return self.steps

    def randn_like(self, x: Tensor) -> Tensor:
        return x.new_tensor([1.0, 1.0, -1.0, -1.0]).repeat(len(x) // 4)[:, None]


@pytest.mark.parametrize(
    ("kind", "num_steps", "least"),
    [
        ("linear", 1000, {0.1: "0.041431", 0.3: "0.115341", 1.0: "0.275513"}),
        ("linear", 100, {0.1: "0.040675", 0.3: "0.113960", 1.0: "0.271212"}),
        ("vp", 5, {0.1: "0.009886", 0.3: "0.071103", 1.0: "0.288613"}),
    ],
)
def test_the_best_network_leaves_the_known_diffusion_loss(kind: str, num_steps: int, least: dict[float, str]) -> None:
    for std, expected in least.items():
        policy = exact_policy(kind, num_steps, std)
        signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(2 * num_steps)[:, None]
        noised = policy.noised(std * signs, signs, Corners(num_steps))  # type: ignore[arg-type]
        assert float(noised.error.mean()) == digits(expected)
        policy.net.forward = lambda x, k, obs: torch.zeros_like(x)  # type: ignore[method-assign]
        nothing = policy.noised(std * signs, signs, Corners(num_steps))  # type: ignore[arg-type]
        assert float(nothing.error.mean()) == pytest.approx(1, abs=1e-6)


# ---------------------------------------------------------------- oracle 9: the activation


def test_mish_has_the_published_values() -> None:
    x = torch.tensor([-1.0, 1.0, 2.0], dtype=torch.float64)
    assert mish(x).tolist() == printed("-0.30340146 0.86509839 1.94395896")


# ---------------------------------------------------------------- oracle 14: controlled sampling


def slope(policy: DiffusionPolicy, **options: Any) -> tuple[float, float]:
    """Slope and intercept of the actions in the initial noise; small enough a noise that nothing is clipped."""
    noise = torch.tensor([[0.0], [1e-3]], dtype=torch.float64)
    sampler = ActionSamplerOptions(name="dpm", clip=False, **options)
    low, high = policy.sample(noise, noise, sampler).flatten().tolist()
    return (high - low) / 1e-3, low


def test_policy_scaling_is_no_temperature() -> None:
    policy = exact_policy("linear", 1000, 0.3)
    found = [abs(slope(policy, eps_scale=scale)[0]) for scale in (0.5, 1.0, 1.5, 2.0)]
    assert found == printed("6.21 0.252 0.011 0.072")


def test_the_clip_hides_what_policy_scaling_does_below_1() -> None:
    """A spread of 6.21 puts 87 % of the actions on the box's edge; with clean actions clipped on the way few are."""
    torch.manual_seed(0)
    policy, noise = exact_policy("linear", 1000, 0.3), torch.randn(5000, 1, dtype=torch.float64)
    bare, held = (
        policy.sample(noise, noise, ActionSamplerOptions(name="dpm", clip=clip, eps_scale=0.5))
        for clip in (False, True)
    )
    edge = math.erfc(1 / (6.21 * math.sqrt(2)))
    assert float((bare.abs() == 1).double().mean()) == pytest.approx(edge, abs=0.015)
    assert float((held.abs() == 1).double().mean()) < edge / 2


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_the_scale_of_the_initial_noise_is_that_of_the_actions(scale: float) -> None:
    found = slope(exact_policy("linear", 1000, 0.3, mean=0.3), noise_scale=scale)
    assert found == (pytest.approx(0.25183 * scale, abs=5e-6 * scale), digits("0.299505"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "0.25183089"),
        ({"order": 1}, "0.22343373"),
        ({"order": 2}, "0.25291653"),
        ({"method": "multistep"}, "0.33718705"),
        ({"method": "multistep", "order": 2}, "0.35563347"),
        ({"grid": "logsnr"}, "0.32256353"),
    ],
)
def test_every_option_of_the_solver_reaches_it(options: dict[str, Any], expected: str) -> None:
    assert slope(exact_policy("linear", 1000, 0.3), **options)[0] == digits(expected)


@pytest.mark.parametrize("std", [0.01, 0.3])
def test_the_last_call_replaces_the_last_action_by_the_mean_of_the_data_given_it(std: float) -> None:
    """At t = 1/K the signal is sqrt(0.9999) and the noise 0.01; the solver itself takes its 15 calls as without."""
    policy = exact_policy("linear", 1000, std, mean=0.3)
    (slope_before, before), (slope_after, after) = (slope(policy, final_denoise=on) for on in (False, True))
    gain = 0.9999**0.5 * std**2 / (0.9999 * std**2 + 1e-4)
    assert slope_after == pytest.approx(gain * slope_before, rel=1e-9)
    assert after == pytest.approx(0.3 + gain * (before - 0.9999**0.5 * 0.3), rel=1e-9)

    asked, net = [], policy.net.forward
    policy.net.forward = lambda x, k: (asked.append(float(k)), net(x, k))[1]  # type: ignore[method-assign]
    slope(policy, final_denoise=True)
    assert len(asked) == 16 and asked[-1] == 0


def test_the_taylor_variant_is_another_solver() -> None:
    policy = exact_policy("linear", 1000, 0.3)
    taylor = slope(policy, variant="taylor")[0]
    expected = sample_dpm_ode(lambda x, k: policy.net(x, k), torch.ones(1, 1, dtype=torch.float64), policy.schedule,
                              variant="taylor")  # fmt: skip
    assert taylor == pytest.approx(float(expected), abs=1e-9) and abs(taylor - 0.25183089) > 1e-4


@pytest.mark.parametrize(
    ("std", "b", "count", "mean", "chosen_std"),
    [(1.0, 1.0, 1, 0.0, 1.0), (1.0, 1.0, 10, 0.806, 0.941), (1.0, 1.0, 50, 0.952, None),
     (1.0, 1.0, 1000, 0.996, None), (0.3, 10.0, 10, 0.414, None), (0.3, 10.0, 50, 0.586, None)],
)  # fmt: skip
def test_selection_moves_a_gaussian_as_far_as_its_candidates_reach(
    std: float, b: float, count: int, mean: float, chosen_std: float | None
) -> None:
    """Policy N(0, std^2) and Q(a) = b a. The choice is averaged over its own chance, the softmax, within each state."""
    generator = torch.Generator().manual_seed(0)
    candidates = std * torch.randn(8_000_000 // count, count, generator=generator)
    weights = (b * candidates).softmax(dim=1)
    first = (weights * candidates).sum(1)
    assert float(first.mean()) == pytest.approx(mean, abs=3e-3)
    if chosen_std is not None:
        second = (weights * candidates.square()).sum(1).mean()
        assert float((second - first.mean() ** 2).sqrt()) == pytest.approx(chosen_std, abs=3e-3)
    q = b * candidates[0]
    grid = (torch.arange(100_000) + 0.5) / 100_000  # all of chance
    share = choose_candidates(q.expand(len(grid), -1), 1.0, grid).bincount(minlength=count) / len(grid)
    torch.testing.assert_close(share, weights[0], atol=2e-5, rtol=0)
    few = candidates[: 1_000_000 // count]
    index = choose_candidates(b * few, 1.0, torch.rand(len(few), generator=generator))
    drawn = few.gather(1, index[:, None]).mean()
    assert float(drawn) == pytest.approx(float(first[: len(few)].mean()), abs=5 * std / len(few) ** 0.5)


def test_selection_among_all_actions_is_the_tilted_gaussian() -> None:
    """The limit of many candidates of N(0, 1) under Q(a) = a: N(1, 1)."""
    generator, states, chosen = torch.Generator().manual_seed(0), 20_000, []
    for _ in range(20):
        candidates = torch.randn(states // 20, 2000, generator=generator)
        index = choose_candidates(candidates, 1.0, torch.rand(len(candidates), generator=generator))
        chosen.append(candidates.gather(1, index[:, None]))
    found = torch.cat(chosen)
    assert float(found.mean()) == pytest.approx(1, abs=4 / states**0.5), "50 candidates: 0.952"
    assert float(found.std()) == pytest.approx(1, abs=4 / (2 * states) ** 0.5)


# ---------------------------------------------------------------- oracle 6, through the policy


@pytest.mark.parametrize(
    ("kind", "num_steps", "std", "variance", "expected"),
    [("vp", 5, 0.1, "posterior", "0.019591"), ("vp", 5, 0.3, "posterior", "0.141459"),
     ("linear", 100, 0.3, "posterior", "0.272254"), ("linear", 1000, 0.3, "beta", "0.300922")],
)  # fmt: skip
def test_the_policys_ancestral_samples_have_the_known_spread(
    kind: str, num_steps: int, std: float, variance: Any, expected: str
) -> None:
    """All is linear: row j follows a small unit of the j-th draw."""
    policy, small = exact_policy(kind, num_steps, std), 1e-3
    units = iter(small * torch.eye(num_steps + 1, dtype=torch.float64)[..., None])
    options = ActionSamplerOptions("ddpm", variance=variance)
    found = policy.sample(torch.zeros(num_steps + 1, 1), next(units), options, lambda x: next(units))
    assert float(found.norm()) / small == digits(expected)


# ---------------------------------------------------------------- oracle 19: two kinds of actions


@pytest.mark.parametrize(("steps", "near"), [(3, 0.07), (6, 0.50), (9, 0.75), (15, 0.93), (30, 0.993)])
def test_two_modes_are_both_sampled_and_met_the_better_the_more_calls(steps: int, near: float) -> None:
    torch.manual_seed(0)
    schedule = Schedule("linear", 1000)
    snr, s = LogSNR(schedule), 0.05

    def eps_model(x: Tensor, k: Tensor) -> Tensor:
        t = (k.item() + 1) / 1000
        alpha, sigma = snr.alpha(t), snr.sigma(t)
        variance = alpha**2 * s**2 + sigma**2
        return sigma * (x - 0.5 * alpha * torch.tanh(0.5 * alpha * x / variance)) / variance

    x = sample_dpm_ode(eps_model, torch.randn(20_000, 1), schedule, steps=steps)
    assert float(((x.abs() - 0.5).abs() < 0.15).float().mean()) == pytest.approx(near, abs=0.012)
    assert float((x > 0).float().mean()) == pytest.approx(0.5, abs=0.01)
