from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from printed import digits

from lit_diffrl.diffusion import Schedule
from lit_diffrl.errors import ConfigError

TABLES = ["beta", "alpha", "alpha_bar", "signal", "noise", "u", "c1", "c2", "posterior_var"]
KINDS = ["cosine", "linear", "linear_unscaled", "vp"]


def exact(kind: str, num_steps: int) -> Schedule:
    return Schedule(kind, num_steps, dtype=torch.float64)


@pytest.mark.parametrize(
    ("num_steps", "values"),
    [
        (
            20,
            {
                ("beta", 1): 0.007992721,
                ("alpha_bar", 1): 0.992007279,
                ("beta", 10): 0.135922065,
                ("alpha_bar", 10): 0.49384359,
                ("beta", 20): 0.999,
                ("alpha_bar", 20): 6.05964e-6,
                ("u", 20): 406.2,
                ("c1", 10): 0.203012827,
                ("c2", 10): 0.786892679,
                ("posterior_var", 10): 0.115061230,
            },
        ),
        (
            100,
            {
                ("beta", 1): 0.000631282,
                ("beta", 50): 0.030593124,
                ("alpha_bar", 50): 0.49384359,
                ("alpha_bar", 100): 2.42857e-7,
                ("u", 100): 2029.0,
                ("c1", 50): 0.043140061,
                ("c2", 50): 0.954268372,
                ("posterior_var", 50): 0.029651134,
            },
        ),
    ],
)
def test_cosine_schedule_has_the_published_values(num_steps: int, values: dict[tuple[str, int], float]) -> None:
    schedule = exact("cosine", num_steps)
    for (name, k), value in values.items():
        assert schedule.value(name, k) == pytest.approx(value, rel=3e-4 if name == "u" else 2e-6), (name, k)


def test_cosine_schedule_depends_on_the_share_of_steps_only() -> None:
    coarse, fine = exact("cosine", 20), exact("cosine", 100)
    torch.testing.assert_close(coarse.alpha_bar[:20], fine.alpha_bar[:100:5], rtol=1e-10, atol=0)
    assert (fine.beta == 0.999).sum() == 1


@pytest.mark.parametrize(("num_steps", "total"), [(20, 4.475688), (100, 7.789215)])
def test_sum_of_posterior_variances(num_steps: int, total: float) -> None:
    assert exact("cosine", num_steps).posterior_var.sum().item() == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [1, 2, 5, 20, 257])
def test_every_schedule_is_consistent(kind: str, num_steps: int) -> None:
    s = exact(kind, num_steps)
    assert all(getattr(s, name).shape == (num_steps + 1,) for name in TABLES)
    assert all(torch.isfinite(getattr(s, name)).all() for name in TABLES)
    assert (s.alpha_bar.diff() < 0).all()
    assert (s.u.diff() > 0).all()
    assert (s.alpha_bar[0], s.beta[0], s.u[0]) == (1, 0, 0)
    # the first step's posterior returns clean data, to the last bit
    assert (s.c1[1], s.c2[1], s.posterior_var[1]) == (1, 0, 0)
    # the posterior mean of the noise-free path stays on the noise-free path
    torch.testing.assert_close(s.c1[1:] + s.c2[1:] * s.signal[1:], s.signal[:-1], rtol=0, atol=1e-10)
    # two one-step transitions compose to the marginal: variances add, signals multiply
    torch.testing.assert_close(s.alpha[1:] * s.noise[:-1] ** 2 + s.beta[1:], s.noise[1:] ** 2, rtol=1e-10, atol=0)
    torch.testing.assert_close(s.alpha[1:].sqrt() * s.signal[:-1], s.signal[1:], rtol=1e-10, atol=0)


@pytest.mark.parametrize("num_steps", [1, 5, 10, 50, 100, 1000])
def test_vp_destroys_the_same_signal_for_any_number_of_steps(num_steps: int) -> None:
    log_signal = exact("vp", num_steps).alpha_bar[-1].log().item()
    assert log_signal == pytest.approx(-(0.1 + (10 - 0.1) / 2), abs=1e-10)


@pytest.mark.parametrize(
    ("kind", "num_steps", "name", "values"),
    [
        ("vp", 5, "beta", {1: "0.19587456", 2: "0.45881819", 3: "0.63578102", 4: "0.75487819", 5: "0.83503138"}),
        ("vp", 5, "alpha_bar", {1: "0.80412544", 2: "0.43517806", 3: "0.15850011", 4: "0.03885183", 5: "0.00640933"}),
        ("linear", 100, "beta", {1: "1.000000e-3", 100: "0.20000000"}),
        ("linear", 100, "alpha_bar", {100: "2.039009e-5"}),
        ("linear", 1000, "alpha_bar", {1: "0.99990000", 2: "0.99978009", 500: "0.07858724", 1000: "4.0358298e-5"}),
        ("linear_unscaled", 100, "alpha_bar", {100: "0.36356325"}),
        ("linear_unscaled", 5, "alpha_bar", {5: "0.95062987"}),
        ("cosine", 100, "beta", {1: "6.312816e-4", 100: "0.99900000"}),
        ("cosine", 100, "alpha_bar", {51: "0.47826463"}),
        ("cosine", 5, "beta", {1: "0.10129408", 2: "0.27954385", 3: "0.47363535", 4: "0.72405237", 5: "0.99900000"}),
    ],
)
def test_schedules_of_diffusion_policies_have_the_known_values(
    kind: str, num_steps: int, name: str, values: dict[int, str]
) -> None:
    schedule = exact(kind, num_steps)
    for k, value in values.items():
        assert schedule.value(name, k) == digits(value), k


@pytest.mark.parametrize("num_steps", [5, 20])
def test_linear_schedule_of_few_steps_holds_the_variances_that_would_reach_one(num_steps: int) -> None:
    held = exact("linear", num_steps).beta == 0.999
    assert held[-1] and not held[1]
    assert exact("linear", 21).beta.max() < 0.999


def test_linear_schedule_of_1000_steps_is_that_of_ddpm() -> None:
    beta = exact("linear", 1000).beta
    assert beta[1].item() == pytest.approx(1e-4, rel=1e-12)
    assert beta[-1].item() == pytest.approx(0.02, rel=1e-12)
    assert beta.diff()[1:].std() < 1e-15


def test_forward_marginal_is_that_of_the_chain() -> None:
    torch.manual_seed(0)
    s = exact("cosine", 20)
    k = torch.full((200_000,), 7)
    x0 = torch.full((200_000, 1), 1.5, dtype=torch.float64)
    direct = s.q_sample(x0, k, torch.randn_like(x0))
    chain = x0
    for i in range(1, 8):
        chain = s.alpha[i].sqrt() * chain + s.beta[i].sqrt() * torch.randn_like(x0)
    for sample in (direct, chain):
        assert sample.mean().item() == pytest.approx(1.5 * s.signal[7].item(), abs=0.005)
        assert sample.var().item() == pytest.approx(1 - s.alpha_bar[7].item(), abs=0.005)


@pytest.mark.parametrize("num_steps", [20, 100])
def test_noise_and_clean_parameterisations_have_the_same_reverse_mean(num_steps: int) -> None:
    torch.manual_seed(0)
    s = exact("cosine", num_steps)
    k = torch.arange(1, num_steps + 1)
    x_k, x0 = torch.randn(2, num_steps, 4, 3, dtype=torch.float64)
    eps = s.eps_from_x0(x_k, k, x0)
    alpha, alpha_bar = s.at("alpha", k, x_k), s.at("alpha_bar", k, x_k)
    mean = (x_k - (1 - alpha) / (1 - alpha_bar).sqrt() * eps) / alpha.sqrt()
    # beta_K = 0.999 divides by sqrt(0.001): rounding grows with it
    torch.testing.assert_close(s.posterior_mean(x0, x_k, k), mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(s.q_sample(x0, k, eps), x_k, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(s.x0_from_eps(x_k, k, eps), x0, rtol=1e-10, atol=1e-10)


def test_jumps_are_the_tables_for_single_steps_and_compose_for_longer_ones() -> None:
    s = exact("cosine", 20)
    for k in range(1, 21):
        assert s.posterior(k, k - 1) == (s.c1[k].item(), s.c2[k].item(), s.posterior_var[k].item())
        assert s.posterior(k, 0) == (1, 0, 0)
    # law of the jump 15 -> 5 given clean data: the posterior mixed over x_15 gives back the marginal at 5
    c1, c2, var = s.posterior(15, 5)
    assert c1 + c2 * s.value("signal", 15) == pytest.approx(s.value("signal", 5), abs=1e-12)
    assert c2**2 * s.value("noise", 15) ** 2 + var == pytest.approx(s.value("noise", 5) ** 2, abs=1e-12)


@pytest.mark.parametrize("num_steps", [1, 5, 20, 23])
def test_time_grid_is_even_for_every_number_of_steps(num_steps: int) -> None:
    s = Schedule("cosine", num_steps)
    for steps in range(1, num_steps + 1):
        grid = [*s.time_grid(steps), 0]
        gaps = [a - b for a, b in pairwise(grid)]
        assert len(gaps) == steps
        assert grid[0] == num_steps
        assert min(gaps) >= 1
        assert max(gaps) - min(gaps) <= 1
    assert s.time_grid() == list(range(num_steps, 0, -1))


@pytest.mark.parametrize("steps", [0, -1, 21])
def test_time_grid_refuses_a_number_of_steps_out_of_range(steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"sampling steps must be in \[1, 20\], got {steps}"):
        Schedule("cosine", 20).time_grid(steps)


def test_a_wrong_schedule_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        Schedule("cosin", 20)
    with pytest.raises(ConfigError, match="diffusion steps K"):
        Schedule("cosine", 0)


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
def test_casting_a_model_keeps_the_schedule_in_float32(cast: torch.dtype) -> None:
    model = torch.nn.ModuleDict({"net": torch.nn.Linear(2, 2), "schedule": Schedule("cosine", 100)}).to(cast)
    s, reference = model["schedule"], exact("cosine", 100)
    assert isinstance(s, Schedule)
    for name in TABLES:
        assert getattr(s, name).dtype == torch.float32
        torch.testing.assert_close(getattr(s, name), getattr(reference, name).float(), rtol=0, atol=0)
    k = torch.arange(1, 101)
    x0, eps = torch.randn(2, 100, 3).to(cast)
    x_k = s.q_sample(x0, k, eps)
    assert x_k.dtype == cast
    torch.testing.assert_close(x_k, reference.q_sample(x0.double(), k, eps.double()).to(cast), rtol=1e-2, atol=1e-6)


def test_casting_to_double_recovers_full_precision() -> None:
    s = Schedule("cosine", 100).half().double()
    torch.testing.assert_close(s.c2, exact("cosine", 100).c2, rtol=0, atol=0)
    # float64 data are treated in float64 even by float32 tables
    x0 = torch.ones(1, 1, dtype=torch.float64)
    value = Schedule("cosine", 100).q_sample(x0, torch.tensor([50]), torch.zeros_like(x0)).item()
    assert value == s.value("signal", 50)


def test_schedule_is_no_part_of_a_checkpoint_and_can_be_copied() -> None:
    s = Schedule("vp", 5)
    assert s.state_dict() == {}
    torch.testing.assert_close(copy.deepcopy(s).to(torch.float64).u, exact("vp", 5).u, rtol=0, atol=0)
    assert repr(s) == "Schedule('vp', num_steps=5)"
