from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_diffrl.diffusion import SAMPLERS, Schedule, sample_ddim, sample_ddpm, sample_dpm_solver
from lit_diffrl.errors import ConfigError

ALL = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
Denoise = Callable[[Tensor, Tensor], Tensor]


def gaussian_denoiser(schedule: Schedule, std: float = 1.0, mean: float = 0.0) -> Denoise:
    """E[x_0 | x_k] for data N(mean, std^2) in every entry."""

    def denoise(x: Tensor, k: Tensor) -> Tensor:
        alpha_bar = schedule.at("alpha_bar", k, x)
        return (std**2 * alpha_bar.sqrt() * x + (1 - alpha_bar) * mean) / (alpha_bar * std**2 + 1 - alpha_bar)

    return denoise


class NoiseBasis:
    """Noise as unit vectors: what a linear sampler returns are then the weights of each independent draw."""

    def __init__(self, draws: int) -> None:
        self.units = torch.eye(draws + 1, dtype=torch.float64)
        self.drawn = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.drawn += 1
        return self.units[self.drawn].expand_as(x)


def final_variance(schedule: Schedule, denoise: Denoise, sampler: Callable[..., Tensor], **options: object) -> float:
    basis = NoiseBasis(schedule.num_steps)
    return sampler(denoise, basis.units[:1], schedule, randn=basis, **options).square().sum().item()


@pytest.mark.parametrize(
    ("num_steps", "std", "variance"),
    [(20, 1.0, 0.811793), (20, 0.5, 0.186885), (100, 1.0, 0.954609), (100, 0.5, 0.232746)],
)
def test_ancestral_sampling_has_the_exact_variance_on_gaussian_data(
    num_steps: int, std: float, variance: float
) -> None:
    s = Schedule("cosine", num_steps, dtype=torch.float64)
    denoise = gaussian_denoiser(s, std)
    assert final_variance(s, denoise, sample_ddpm) == pytest.approx(variance, abs=1e-6)
    # the recursion of the classic chain, written out
    v = 1.0
    for k in range(num_steps, 0, -1):
        weight = std**2 * s.signal[k] / (s.alpha_bar[k] * std**2 + 1 - s.alpha_bar[k])
        v = ((s.c1[k] * weight + s.c2[k]) ** 2 * v + s.posterior_var[k]).item()
    assert final_variance(s, denoise, sample_ddpm) == pytest.approx(v, abs=1e-10)


@pytest.mark.parametrize(
    ("num_steps", "std", "code_order", "paper_order", "two_steps"),
    [
        (20, 1.0, 1.221051, 1.533415, 2.430765),
        (100, 1.0, 1.760519, 1.872552, 3.520231),
        (20, 0.5, 0.454387, 0.583355, 0.898313),
        (100, 0.5, 0.671291, 0.712488, 1.341780),
    ],
)
def test_a_linear_guide_moves_the_mean_by_the_known_amount(
    num_steps: int, std: float, code_order: float, paper_order: float, two_steps: float
) -> None:
    s = Schedule("cosine", num_steps, dtype=torch.float64)
    x = torch.zeros(1, 1, dtype=torch.float64)

    def guide_once(x: Tensor, k: int) -> Tensor:
        return x + s.value("posterior_var", k)

    def guide_twice_but_not_at_the_end(x: Tensor, k: int) -> Tensor:
        return x if k - 1 < 2 else guide_once(guide_once(x, k), k)

    def guide_mean(mean: Tensor, x0_hat: Tensor, k: int, var: float) -> Tensor:
        assert var == s.value("posterior_var", k)
        return mean + var

    def mean_with(**hooks: object) -> float:
        return sample_ddpm(gaussian_denoiser(s, std), x, s, randn=torch.zeros_like, **hooks).item()  # type: ignore[arg-type]

    assert mean_with(shift=guide_once) == pytest.approx(code_order, abs=1e-6)
    assert mean_with(mean_shift=guide_mean) == pytest.approx(paper_order, abs=1e-6)
    assert mean_with(shift=guide_twice_but_not_at_the_end) == pytest.approx(two_steps, abs=1e-6)


@ALL
@pytest.mark.parametrize("kind", ["cosine", "linear", "vp"])
def test_point_mass_is_hit_exactly_with_any_number_of_steps(sampler: Callable[..., Tensor], kind: str) -> None:
    s = Schedule(kind, 20)
    point = torch.randn(6, 3)
    for steps in range(1, 21):
        x = sampler(
            lambda x, k: point.expand_as(x),
            torch.randn(4, 6, 3),
            s,
            steps=steps,
            shift=lambda x, k: x + 3.0,
            mean_shift=lambda mean, x0_hat, k, var: mean + 5.0 * var,
        )
        assert torch.equal(x, point.expand_as(x)), steps


@ALL
def test_every_number_of_steps_calls_the_network_that_often_and_stays_finite(
    sampler: Callable[..., Tensor],
) -> None:
    s = Schedule("cosine", 20)
    denoise = gaussian_denoiser(s)
    for steps in [None, *range(1, 21)]:
        seen: list[Tensor] = []

        def counted(x: Tensor, k: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(k)
            return denoise(x, k)

        x = sampler(counted, torch.randn(3, 4, 2), s, steps=steps)
        assert x.isfinite().all()
        assert [k.tolist() for k in seen] == [[k] * 3 for k in s.time_grid(steps)]
        assert all(k.dtype == torch.int64 for k in seen)
    with pytest.raises(ConfigError, match="sampling steps"):
        sampler(denoise, torch.randn(3, 4, 2), s, steps=21)


def test_ddim_contracts_unit_gaussian_data_by_the_cosines_of_its_angles() -> None:
    s = Schedule("cosine", 20, dtype=torch.float64)
    for steps in (1, 7, 20):
        angles = torch.acos(s.signal[[*s.time_grid(steps), 0]])
        x = sample_ddim(gaussian_denoiser(s), torch.ones(1, 1, dtype=torch.float64), s, steps=steps)
        assert x.item() == pytest.approx(angles.diff().cos().prod().item(), abs=1e-10)


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_ode_samplers_converge_to_the_data_and_the_solver_faster(std: float) -> None:
    def error(sampler: Callable[..., Tensor], num_steps: int) -> float:
        s = Schedule("vp", num_steps, dtype=torch.float64)
        # start on the marginal at K, so that only the sampler errs
        start = torch.full((1, 1), math.sqrt(s.value("alpha_bar", num_steps) * (std**2 - 1) + 1), dtype=torch.float64)
        return abs(sampler(gaussian_denoiser(s, std), start, s).item() - std)

    ddim, solver = ([error(f, n) for n in (20, 80, 320)] for f in (sample_ddim, sample_dpm_solver))
    assert ddim[0] / ddim[1] > 3
    assert ddim[1] / ddim[2] > 3  # first order: a quarter of the step, a quarter of the error
    assert ddim[2] < 1e-2 * std
    assert solver[2] < ddim[2]
    assert solver[0] < ddim[0]


def test_solver_of_order_two_beats_ddim_with_few_steps_and_order_one_is_ddim() -> None:
    s = Schedule("cosine", 100, dtype=torch.float64)
    denoise = gaussian_denoiser(s)
    x = torch.randn(5, 2, dtype=torch.float64)
    for steps in (1, 5, 10, 100):
        ddim = sample_ddim(denoise, x, s, steps=steps)
        torch.testing.assert_close(sample_dpm_solver(denoise, x, s, steps=steps, order=1), ddim, rtol=1e-9, atol=1e-9)
        if steps > 1:
            assert (sample_dpm_solver(denoise, x, s, steps=steps) - x).norm() < (ddim - x).norm()


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_ddim_with_full_noise_is_ancestral_sampling(steps: int) -> None:
    s = Schedule("cosine", 20, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    results = []
    for sampler, options in ((sample_ddpm, {}), (sample_ddim, {"eta": 1.0})):
        torch.manual_seed(1)
        results.append(sampler(gaussian_denoiser(s), x, s, steps=steps, **options))
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-8)


def test_final_noise_has_the_variance_of_the_last_forward_step() -> None:
    s = Schedule("cosine", 20, dtype=torch.float64)
    assert final_variance(s, lambda x, k: 0 * x, sample_ddpm) == 0
    for steps in (20, 5):
        variance = final_variance(s, lambda x, k: 0 * x, sample_ddpm, steps=steps, final_noise=True)
        assert variance == pytest.approx(1 - s.value("alpha_bar", 20 // steps), abs=1e-12)


@pytest.mark.parametrize("sampler", [sample_ddim, sample_dpm_solver])
def test_ode_samplers_draw_no_noise(sampler: Callable[..., Tensor]) -> None:
    s = Schedule("cosine", 20)

    def refuse(x: Tensor) -> Tensor:
        raise AssertionError("noise drawn")

    x = torch.randn(3, 4, 2)
    first, second = (sampler(gaussian_denoiser(s), x, s, randn=refuse) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("option", "value"), [("eta", -0.1), ("eta", 1.1)])
def test_ddim_refuses_an_eta_out_of_range(option: str, value: float) -> None:
    s = Schedule("cosine", 5)
    with pytest.raises(ConfigError, match=rf"eta must be in \[0, 1\], got {value}"):
        sample_ddim(gaussian_denoiser(s), torch.zeros(1, 1), s, eta=value)


def test_solver_refuses_an_order_it_does_not_have() -> None:
    s = Schedule("cosine", 5)
    with pytest.raises(ConfigError, match="order"):
        sample_dpm_solver(gaussian_denoiser(s), torch.zeros(1, 1), s, order=3)


@ALL
@pytest.mark.parametrize("guided", [False, True])
def test_conditions_hold_bit_for_bit_at_every_moment(sampler: Callable[..., Tensor], guided: bool) -> None:
    s = Schedule("cosine", 10)
    current, goal = torch.randn(2, 4, 3)
    events: list[str] = []

    def satisfied(x: Tensor) -> bool:
        return torch.equal(x[:, 0, 2:], current) and torch.equal(x[:, -1, 2:], goal)

    def project(x: Tensor) -> Tensor:
        events.append("project")
        x = x.clone()
        x[:, 0, 2:], x[:, -1, 2:] = current, goal
        return x

    def shift(x: Tensor, k: int) -> Tensor:
        assert satisfied(x)
        events.append("shift")
        return x + 0.1

    def denoise(x: Tensor, k: Tensor) -> Tensor:
        assert satisfied(x)
        events.append("denoise")
        return gaussian_denoiser(s)(x, k)

    x = sampler(denoise, torch.randn(4, 6, 5), s, project=project, shift=shift if guided else None)
    assert satisfied(x)
    step = ["shift", "project", "denoise", "project"] if guided else ["denoise", "project"]
    assert events == ["project", *step * 10]
    # the actions of the conditioned rows are free
    assert x[:, 0, :2].unique().numel() == 8


@ALL
def test_rows_of_a_batch_do_not_interact(sampler: Callable[..., Tensor]) -> None:
    s = Schedule("cosine", 20)
    order = torch.randperm(8)
    x = torch.randn(8, 4, 2)

    def sample(seeds: list[int], x: Tensor) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def randn(x: Tensor) -> Tensor:
            return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])

        return sampler(gaussian_denoiser(s), x, s, randn=randn)

    together = sample(list(range(8)), x)
    assert torch.equal(sample(order.tolist(), x[order]), together[order])
    torch.testing.assert_close(sample([3], x[3:4]), together[3:4])


def test_each_plan_of_a_batch_has_its_own_noise_and_a_seed_repeats_them() -> None:
    s = Schedule("cosine", 20)

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return sample_ddpm(gaussian_denoiser(s), torch.zeros(64, 32, 3), s)

    plans = sample(0)
    assert torch.equal(plans, sample(0))
    assert not torch.equal(plans, sample(1))
    correlation = torch.corrcoef(plans.flatten(1))
    assert (correlation - torch.eye(64)).abs().max() < 0.6
    assert plans.mean(0).std() < 2 * plans.std() / math.sqrt(64)


@ALL
def test_half_precision_samples_are_those_of_float32_rounded(sampler: Callable[..., Tensor]) -> None:
    s = Schedule("cosine", 20).to(torch.bfloat16)
    x = torch.randn(16, 4)

    def sample(x: Tensor) -> Tensor:
        return sampler(lambda x, k: gaussian_denoiser(s)(x, k).to(x.dtype), x, s, randn=torch.zeros_like)

    half = sample(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), sample(x.bfloat16().float()), rtol=0.05, atol=0.05)


def test_forward_variance_overshoots_where_the_posterior_variance_falls_short() -> None:
    s = Schedule("cosine", 20, dtype=torch.float64)
    # point mass: the posterior variance is right for it, and both agree that the last step has no noise
    assert final_variance(s, lambda x, k: 0 * x, sample_ddpm, variance="beta") == 0
    # unit Gaussian data: beta is right for it up to the last step, which only shrinks to E[x_0 | x_1]
    variance = final_variance(s, gaussian_denoiser(s), sample_ddpm, variance="beta")
    assert variance == pytest.approx(s.value("alpha_bar", 1), abs=1e-10)
    variance = final_variance(s, gaussian_denoiser(s), sample_ddpm, variance="beta", final_noise=True)
    assert variance == pytest.approx(1, abs=1e-10)
    with pytest.raises(ConfigError, match="variance must be one of posterior, beta"):
        sample_ddpm(gaussian_denoiser(s), torch.zeros(1, 1), s, variance="learned")  # type: ignore[arg-type]
