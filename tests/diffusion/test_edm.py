from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from printed import digits, printed
from torch import Tensor

from lit_diffrl.diffusion.edm import EDM, Churn, sample_edm_multistep, sample_heun
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods.synthesis import condition, generated

DYDIFF = Churn(60.0, 0.3699492132558657, 52.241950650433864, 1.002)
SYNTHER = Churn(80.0, 0.05, 50.0, 1.003)
ONE = torch.ones(1, 1, dtype=torch.float64)


class NoiseBasis:
    """Noise as unit vectors: what a linear sampler returns are then the weights of each independent draw."""

    def __init__(self, draws: int, width: int) -> None:
        self.units = torch.eye(draws * width, dtype=torch.float64).view(draws * width, draws, width)
        self.drawn = 0

    def __call__(self, x: Tensor | None = None) -> Tensor:
        self.drawn += 1
        # Row 0 carries the mean alone.
        return torch.cat([torch.zeros_like(self.units[:1, 0]), self.units[:, self.drawn - 1]])


def gaussian(std: float, mean: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """E[y | x] of data N(mean, std^2)."""
    return lambda x, sigma: mean + std**2 / (std**2 + sigma**2) * (x - mean)


def spread(sampler: Callable[..., Tensor], std: float, steps: int, **options: object) -> float:
    """Deviation of a sampler's output over that of its Gaussian data, exactly."""
    basis = NoiseBasis(steps + 1, 1)
    x = sampler(gaussian(std), basis(), EDM(), steps=steps, **options)
    return x[1:].square().sum().sqrt().item() / std


def churned_spread(std: float, churn: Churn, steps: int = 34) -> float:
    """The same of Heun's sampler with churn."""
    basis = NoiseBasis(steps + 1, 1)
    x = sample_heun(gaussian(std), basis(), EDM(), steps=steps, churn=churn, randn=basis)
    return x[1:].square().sum().sqrt().item() / std


# ------------------------------------------------------------------ levels and preconditioning


def test_the_grid_has_the_published_levels() -> None:
    grid = EDM().grid(34)
    assert len(grid) == 35 and grid[-1] == 0
    known = "80 67.6671 57.0012 47.8100 12.1166 2.87675 0.469979 0.330063 0.227485 0.002 0"
    assert [grid[i] for i in (0, 1, 2, 3, 10, 16, 22, 23, 24, 33, 34)] == printed(known)
    eighteen = (
        "80 57.58598 40.78557 28.37458 19.35245 12.91008 8.40094 5.31519 3.25682 1.92334 1.08817 0.58535 0.29644 "
        "0.13952 0.05995 0.02293 0.00753 0.002 0"
    )
    assert EDM().grid(18) == printed(eighteen)


def test_preconditioning_has_the_published_values_and_identities() -> None:
    edm, half = EDM(), torch.tensor(0.5, dtype=torch.float64)
    values = [f(half).item() for f in (edm.c_skip, edm.c_out, edm.c_in, edm.c_noise, edm.weight)]
    assert values == [*printed("0.5 0.353553 1.414214 -0.173287"), pytest.approx(8)]
    sigma = torch.logspace(-4, 3, 50, dtype=torch.float64)
    one = torch.ones_like(sigma)
    for edm in (EDM(), EDM(sigma_data=1.0)):
        torch.testing.assert_close(edm.weight(sigma) * edm.c_out(sigma).square(), one)
        torch.testing.assert_close(edm.c_in(sigma).square() * (sigma.square() + edm.sigma_data**2), one)
        torch.testing.assert_close(edm.c_out(sigma).square(), sigma.square() * edm.c_skip(sigma))
        torch.testing.assert_close(edm.c_out(sigma), sigma * edm.sigma_data * edm.c_in(sigma))


def test_the_denoiser_is_the_network_between_skip_and_scales_and_leaves_clean_data_alone() -> None:
    edm, x = EDM(), torch.randn(4, 3, 2)
    seen: list[Tensor] = []

    def net(x: Tensor, c_noise: Tensor) -> Tensor:
        seen[:] = [x, c_noise]
        return (x + 1).bfloat16()

    sigma = torch.tensor([0.01, 0.5, 3.0, 80.0])
    out = edm.denoise(net, x, sigma)
    assert out.dtype == x.dtype and seen[1].shape == (4,)
    torch.testing.assert_close(seen[0][1], x[1] * 2**0.5)
    torch.testing.assert_close(out[1], 0.5 * x[1] + 0.353553 * (x[1] * 2**0.5 + 1), atol=2e-2, rtol=0)
    torch.testing.assert_close(edm.denoise(net, x, torch.tensor([1e-7])), x)
    assert torch.equal(edm.denoise(net, x, sigma)[2:3], edm.denoise(net, x[2:3], sigma[2:3])), "rows interact"


def test_the_network_sees_conditions_at_full_size_where_they_are_written_into_its_input() -> None:
    torch.manual_seed(0)
    edm, first, actions = EDM(), torch.randn(2, 3), torch.randn(2, 4, 2)
    seen: list[Tensor] = []

    def net(x: Tensor, c_noise: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    def project(x: Tensor) -> Tensor:
        return condition(x, first, actions)

    x, sigma = project(80 * torch.randn(2, 4, 5)), torch.tensor([80.0])
    plain, written = edm.denoise(net, x, sigma), edm.denoise(net, x, sigma, project)
    assert torch.equal(plain, written), "more than the network's input has changed"
    torch.testing.assert_close(seen[0], x / 6400.25**0.5)
    assert torch.equal(seen[1], project(seen[0])) and not torch.equal(seen[0], seen[1])


def test_training_levels_are_log_normal() -> None:
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    sigma = EDM().draw_sigma(normal)
    assert torch.quantile(sigma, torch.tensor([0.05, 0.5, 0.95])).tolist() == pytest.approx(
        [0.042, 0.301, 2.17], rel=0.02
    )
    assert (sigma > 0.37).float().mean().item() == pytest.approx(0.432, abs=0.005)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 3.0, 80.0])
def test_a_silent_network_costs_1_at_every_level_on_data_of_the_assumed_deviation(sigma: float) -> None:
    # Two points at one deviation have the moments of the Gaussian, so that the mean is exact.
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    clean, level = 0.5 * signs[:, :1], torch.full((4,), sigma, dtype=torch.float64)
    edm = EDM()
    prediction = edm.denoise(lambda x, c: torch.zeros_like(x), clean + sigma * signs[:, 1:], level)
    assert edm.loss(prediction, clean, level).item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(("std", "expected"), [(0.25, 0.726), (0.5, 0.9975), (1.0, 2.095)])
def test_the_loss_of_a_silent_network_averaged_over_training_levels(std: float, expected: float) -> None:
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    edm, total = EDM(), 0.0
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    for node, weight in zip(nodes, weights / weights.sum()):
        sigma = edm.draw_sigma(torch.full((4,), node, dtype=torch.float64))
        clean = std * signs[:, :1]
        x = clean + sigma[:, None] * signs[:, 1:]
        total += weight * edm.loss(edm.denoise(lambda x, c: torch.zeros_like(x), x, sigma), clean, sigma).item()
    # Exactly: 1 where the data are as assumed, and else by how much of them is left to the network.
    level = edm.draw_sigma(torch.from_numpy(nodes))
    left = (weights / weights.sum() * (1 - edm.c_skip(level)).numpy()).sum()
    assert total == pytest.approx(1 + (std**2 / 0.25 - 1) * left)
    # The printed numbers are of 4e5 draws of level, noise and data.
    square = 3 * (weights / weights.sum() * (1 + (std**2 / 0.25 - 1) * (1 - edm.c_skip(level)).numpy()) ** 2).sum()
    assert abs(expected - total) < 3 * ((square - total**2) / 4e5) ** 0.5


def test_only_generated_states_are_learnt_where_the_mask_says_so() -> None:
    torch.manual_seed(0)
    clean, sigma = torch.randn(3, 5, 4), torch.tensor([0.1, 1.0, 10.0])
    for mask in (None, generated(clean, 3)):
        out = torch.randn_like(clean, requires_grad=True)
        edm = EDM()
        edm.loss(
            edm.denoise(lambda x, c, out=out: out, clean + torch.randn_like(clean), sigma), clean, sigma, mask
        ).backward()
        assert out.grad is not None
        given = torch.cat([out.grad[:, 0].flatten(), out.grad[:, :, 3].flatten()])
        assert out.grad[:, 1:, :3].all(), "a generated state passes no gradient"
        assert given.all() if mask is None else not given.any()


# ------------------------------------------------------------------ Heun's sampler


@pytest.mark.parametrize(
    ("std", "expected"),
    [
        (0.5, "2.51577 1.39399 1.21960 1.14064 1.07216 1.05525 1.04365 1.02920 1.01568 1.01377 1.00364 1.00086"),
        (1.0, "1.90726 1.29956 1.17543 1.11376 1.05835 1.04473 1.03536 1.02368 1.01272 1.01117 1.00292 1.00065"),
    ],
)
def test_heun_over_disperses_gaussian_data_by_the_known_factors(std: float, expected: str) -> None:
    """Oracle 4."""
    steps = (5, 8, 10, 12, 16, 18, 20, 24, 32, 34, 64, 128)
    assert [spread(sample_heun, std, n) for n in steps] == printed(expected)


@pytest.mark.parametrize(
    ("std", "expected"), [(0.1, "1.0902 1.0220"), (0.05, "1.1109 1.0265"), (0.02, "1.1426 1.0308")]
)
def test_heun_on_narrow_data(std: float, expected: str) -> None:
    """Oracle 4."""
    assert [spread(sample_heun, std, n) for n in (18, 34)] == printed(expected)


def test_starting_at_zero_mean_shifts_the_mean_by_the_output_s_deviation_over_80() -> None:
    """Oracle 4: 0.9934 expected; 0.9928 and 0.5278 printed of 2e5 draws, which are within their own error of it."""
    basis = NoiseBasis(1, 1)
    mean, unit = sample_heun(gaussian(0.5, mean=1.0), basis(), EDM(), steps=18)[:, 0].tolist()
    std = unit - mean
    assert (
        mean == digits("0.9934") and mean == pytest.approx(1 - std / 80) and std == pytest.approx(0.5 * 1.05525, 1e-5)
    )
    draws = 200_000
    noise = torch.randn(draws, 1, generator=torch.Generator().manual_seed(0))
    x = sample_heun(gaussian(0.5, mean=1.0), noise, EDM(), steps=18)
    assert x.dtype == torch.float32
    for of_mean, of_std in ((x.mean().item(), x.std().item()), (0.9928, 0.5278)):
        assert abs(of_mean - mean) < 3 * std / draws**0.5 and abs(of_std - std) < 3 * std / (2 * draws) ** 0.5


def test_without_the_correction_it_is_eulers_method_and_under_disperses() -> None:
    """Oracle 5."""
    found = [spread(sample_heun, 0.5, n, heun=False) for n in (8, 18, 34, 128)]
    assert found == printed("0.6656 0.8461 0.9175 0.9778")


@pytest.mark.parametrize(
    ("churn", "steps", "churned", "expected"),
    [
        (DYDIFF, 34, range(3, 23), "1.06004 1.04834 1.05902 1.03490"),
        (Churn(60.0, 0.37, 52.212), 34, range(3, 23), "1.05792 1.04625 1.05691 1.03283"),
        (SYNTHER, 128, range(11, 107), "1.01263 1.01148"),
    ],
    ids=["DyDiff", "DyDiff, S_noise 1", "SynthER"],
)
def test_churn_takes_place_where_it_should_and_widens_by_the_known_factors(
    churn: Churn, steps: int, churned: range, expected: str
) -> None:
    """Oracle 6."""
    gammas = [churn.gamma(sigma, steps) for sigma in EDM().grid(steps)[:-1]]
    assert [i for i, gamma in enumerate(gammas) if gamma > 0] == list(churned)
    assert [gammas[i] for i in churned] == [digits("0.414214")] * len(churned)
    for std, ratio in zip((0.5, 1.0, 0.3, 0.1), printed(expected)):
        basis = NoiseBasis(1 + len(churned), 1)
        calls: list[float] = []

        def denoise(x: Tensor, sigma: Tensor, std: float = std, calls: list[float] = calls) -> Tensor:
            calls.append(sigma.item())
            return gaussian(std)(x, sigma)

        x = sample_heun(denoise, basis(), EDM(), steps=steps, churn=churn, randn=basis)
        assert x[1:].square().sum().sqrt().item() / std == ratio
        assert len(calls) == {34: 67, 128: 255}[steps]
        assert basis.drawn == 1 + len(churned), "noise is drawn where nothing is added"
        first = churned[0]
        assert calls[2 * first] == pytest.approx(EDM().grid(steps)[first] * 2**0.5), "evaluated at the unchurned level"


# ------------------------------------------------------------------ conditions

CHURNED = pytest.mark.parametrize("recondition", [True, False])


@CHURNED
@pytest.mark.parametrize("churn", [Churn(), DYDIFF], ids=["calm", "churned"])
def test_conditions_come_out_bit_for_bit_whatever_the_network(churn: Churn, recondition: bool) -> None:
    torch.manual_seed(0)
    first, actions, noise = torch.randn(5, 3), torch.randn(5, 7, 2), torch.randn(5, 7, 5)
    kept = first.clone(), actions.clone()
    x = sample_heun(
        lambda x, sigma: torch.randn_like(x), noise, EDM(), steps=10, churn=churn,
        project=lambda x: condition(x, first, actions), recondition_after_churn=recondition,
    )  # fmt: skip
    assert torch.equal(x[:, 0, :3], first) and torch.equal(x[..., 3:], actions) and x.isfinite().all()
    assert torch.equal(first, kept[0]) and torch.equal(actions, kept[1])
    other = torch.cat([noise[..., :3], torch.randn(5, 7, 2)], dim=-1)
    other[:, 0] = torch.randn(5, 5)

    def apart(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x)  # each entry by itself

    samples = [
        sample_heun(apart, eps, EDM(), steps=10, project=lambda x: condition(x, first, actions))
        for eps in (noise, other)
    ]
    assert torch.equal(*samples), "noise of conditioned entries reaches the others"


def test_conditions_are_written_at_exactly_the_published_moments() -> None:
    """After the first draw, after the churn if asked for, after every Euler and every Heun step."""
    for recondition in (True, False):
        clean: list[bool] = []
        writes: list[int] = []

        def denoise(x: Tensor, sigma: Tensor, clean: list[bool] = clean) -> Tensor:
            clean.append(bool((x == 7).all()))
            return torch.zeros_like(x)

        def project(x: Tensor, writes: list[int] = writes) -> Tensor:
            writes.append(1)
            return torch.full_like(x, 7)

        x = sample_heun(
            denoise, torch.zeros(1, 1), EDM(), steps=34, churn=DYDIFF, project=project,
            recondition_after_churn=recondition,
        )  # fmt: skip
        assert x.item() == 7
        assert len(writes) == 1 + 34 + 33 + (20 if recondition else 0)
        dirty = [i for i, c in enumerate(clean) if not c]
        assert dirty == ([] if recondition else [2 * i for i in range(3, 23)])


@pytest.mark.parametrize(
    ("tau", "calm", "churned", "official", "noisy"),
    [
        (0.5, (0.555, 0.506), (0.560, 0.532), (0.560, 0.535), (0.268, 0.683)),
        (0.2, (0.558, 0.203), (0.560, 0.210), (0.560, 0.211), (0.377, 0.365)),
        (0.05, (0.560, 0.051), (0.560, 0.052), (0.560, 0.052), (0.479, 0.152)),
    ],
)
def test_a_model_of_clean_conditions_is_unbiased_and_one_of_noisy_conditions_is_not(
    tau: float, calm: tuple[float, ...], churned: tuple[float, ...], official: tuple[float, ...], noisy: tuple
) -> None:
    """Oracle 9: s | a ~ N(0.8 a, tau^2) at a = 0.7: the true mean is 0.56. Entries of x are (s, a)."""
    joint = torch.tensor([[0.64 + tau**2, 0.8], [0.8, 1.0]], dtype=torch.float64)  # a ~ N(0, 1)

    def of_clean(x: Tensor, sigma: Tensor) -> Tensor:
        mean = 0.8 * x[:, 1:]
        return torch.cat([mean + tau**2 / (tau**2 + sigma**2) * (x[:, :1] - mean), x[:, 1:]], dim=1)

    def of_noisy(x: Tensor, sigma: Tensor) -> Tensor:
        noise = sigma.square() * torch.eye(2, dtype=torch.float64)
        return x @ torch.linalg.solve(joint + noise, joint)

    def project(x: Tensor) -> Tensor:
        written = x.clone()
        written[:, 1] = 0.0
        written[0, 1] = 0.7
        return written

    def moments(denoise: Callable[..., Tensor], **options: object) -> tuple[float, float]:
        basis = NoiseBasis(21, 2)
        x = sample_heun(denoise, basis(), EDM(), steps=34, project=project, randn=basis, **options)[:, 0]  # type: ignore[arg-type]
        return x[0].item(), x[1:].square().sum().sqrt().item()

    def near(exact: tuple[float, float], mean: float, std: float) -> bool:
        """Whether 1e5 draws may have had the printed moments, in three digits."""
        errors = 3 * exact[1] / 1e5**0.5, 3 * exact[1] / 2e5**0.5
        return abs(exact[0] - mean) < 5e-4 + errors[0] and abs(exact[1] - std) < 5e-4 + errors[1]

    assert near(moments(of_clean), *calm)
    assert near(moments(of_clean, churn=DYDIFF), *churned)
    assert near(moments(of_clean, churn=DYDIFF, recondition_after_churn=False), *official)
    assert near(moments(of_noisy), *noisy)
    for recondition in (True, False):
        found = moments(of_clean, churn=DYDIFF, recondition_after_churn=recondition)
        assert found[0] == digits("0.560"), "churn forgets that sampling began at zero mean"


@pytest.mark.parametrize(
    ("churn", "mean_error", "ratio"),
    [(Churn(), (-0.003, -0.004, -0.003), (1.018, 1.019, 1.019)), (DYDIFF, (0, 0, 0), (1.030, 1.055, 1.057))],
    ids=["calm", "churned"],
)
def test_a_linear_gaussian_trajectory_is_sampled_as_known(
    churn: Churn, mean_error: tuple[float, ...], ratio: tuple[float, ...]
) -> None:
    """Oracle 10: s' = 0.9 s + 0.5 a + 0.1 eps from s_0 = 1 under a = 0, with the exact denoiser."""
    t = torch.arange(1, 10, dtype=torch.float64)
    lower = torch.tril(0.1 * 0.9 ** (t[:, None] - t[None]))
    mean, cov = 0.9**t, lower @ lower.T
    std = cov.diagonal().sqrt()
    assert std[[0, 1, 8]].tolist() == printed("0.1 0.13454 0.21150")

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        # Row 0 carries the mean, the others the responses to unit noise.
        offset = torch.cat([mean[None], torch.zeros(len(x) - 1, 9, dtype=torch.float64)])
        gain = torch.linalg.solve(cov + sigma.square() * torch.eye(9, dtype=torch.float64), cov)
        return offset + (x - offset) @ gain

    basis = NoiseBasis(21, 9)
    x = sample_heun(denoise, basis(), EDM(), steps=34, churn=churn, randn=basis)
    chosen = torch.tensor([0, 4, 8])
    error = (x[0] - mean)[chosen]
    if churn.s_churn:
        assert float((x[0] - mean).abs().max()) < 1e-5, "printed of 4e4 draws: within 0.001"
    else:
        # Printed of 4e4 draws, in three digits.
        assert bool(((error - error.new_tensor(mean_error)).abs() < 5e-4 + 3 * std[chosen] / 200).all())
    # The printed ratios have a deviation of 0.0036 each; the farthest, 1.030 of the churned, is 3.3 of them off.
    assert (x[1:].square().sum(0).sqrt() / std)[chosen].tolist() == pytest.approx(ratio, abs=0.0125)
    # Exactly: the sampler works on each principal axis by itself.
    variance, axes = torch.linalg.eigh(cov)
    widened = [v * churned_spread(v**0.5, churn) ** 2 for v in variance.tolist()]
    exact = axes.square() @ torch.tensor(widened, dtype=torch.float64)
    torch.testing.assert_close(x[1:].square().sum(0), exact)


# ------------------------------------------------------------------ fewer steps


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, 0.5, 1.0])
def test_the_multistep_solver_is_as_exact_as_heun_at_half_the_calls(std: float) -> None:
    calls: list[int] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(1)
        return gaussian(std)(x, sigma)

    sample_edm_multistep(denoise, ONE, EDM(), steps=16)
    assert len(calls) == 16
    assert abs(spread(sample_edm_multistep, std, 16) - 1) < 0.1 < abs(spread(sample_heun, std, 8) - 1)  # 15 calls


@pytest.mark.parametrize("std", [0.5, 1.0])
def test_the_multistep_solver_is_of_second_order(std: float) -> None:
    errors = [abs(spread(sample_edm_multistep, std, n) - 1) for n in (64, 128, 256)]
    assert errors[2] < errors[1] / 3 < errors[0] / 9


def test_the_multistep_solver_keeps_conditions_and_hits_a_point_mass() -> None:
    torch.manual_seed(0)
    first, actions, point = torch.randn(4, 3), torch.randn(4, 6, 2), torch.randn(4, 6, 5)
    x = sample_edm_multistep(
        lambda x, sigma: point, torch.randn(4, 6, 5), EDM(), steps=5, project=lambda x: condition(x, first, actions)
    )
    assert torch.equal(x, condition(point, first, actions))


SAMPLERS = pytest.mark.parametrize("sampler", [sample_heun, sample_edm_multistep])


@SAMPLERS
def test_a_warm_start_begins_at_its_level_with_its_data(sampler: Callable[..., Tensor]) -> None:
    seen: list[tuple[float, Tensor]] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((sigma.item(), x))
        return gaussian(0.5)(x, sigma)

    clean, noise = torch.tensor([[0.3]]), torch.tensor([[-1.2]])
    sampler(denoise, noise, EDM(), steps=34, start=(clean, 16))
    assert seen[0][0] == pytest.approx(2.87675, rel=1e-6)
    torch.testing.assert_close(seen[0][1], clean + 2.87675 * noise)
    assert len(seen) == (35 if sampler is sample_heun else 18)
    with pytest.raises(ConfigError, match="first level.*34"):
        sampler(denoise, noise, EDM(), steps=34, start=(clean, 34))


@SAMPLERS
def test_samples_have_the_type_of_the_noise_and_the_state_is_not_rounded_to_it(sampler: Callable[..., Tensor]) -> None:
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    exact = sampler(gaussian(0.5), noise.double(), EDM(), steps=20)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        rounded = noise.to(dtype)
        x = sampler(gaussian(0.5), rounded, EDM(), steps=20)
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EDM(sigma_data=0.0), "edm.sigma_data"),
        (lambda: EDM(sigma_max=0.001), "edm.sigma_max"),
        (lambda: EDM(p_std=math.nan), "edm.p_std"),
        (lambda: Churn(s_tmin=1.0, s_tmax=0.5), "churn.s_tmax"),
        (lambda: Churn(s_churn=-1.0), "churn.s_churn"),
        (lambda: EDM().grid(1), "sampler steps"),
    ],
)
def test_options_that_cannot_work_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
