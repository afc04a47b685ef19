"""The table of the behaviour's posterior: estimators against closed forms, bounds, calibration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from closed_forms import F64, GAUSSIAN, SDE, TWO_MODES, Mixture, column, even, gauss, printed, time
from torch import Tensor

from lit_diffrl.diffusion.vp_sde import T_MIN
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import covariance as co
from lit_diffrl.methods.posterior import PosteriorTable, non_decreasing
from lit_diffrl.seeding import Draws

ESTIMATORS = ["raw", "paired", "nll", "mixed"]
KEEP: dict[str, Any] = {"clamp": False, "isotonic": False, "bound": None}  # the bare formulas


def table_at(t: float, eps_model: Any, data: Mixture = GAUSSIAN, mean: float | None = None, **options: Any) -> float:
    """The variance at one time, all expectations by quadrature: one batch of all nodes with equal weights' copies."""
    table = PosteriorTable(1, SDE, grid=2, **(KEEP | options)).double()
    table.time.fill_(t)  # both times of the grid
    a_0, eps, weight = joint(data)
    middle = (weight * a_0).sum()
    table.action_mean.fill_(middle if mean is None else mean)
    variance = (weight * (a_0 - middle) ** 2).sum()
    table.v_bar.fill_(variance if mean is None else variance + (middle - mean) ** 2)
    a_t = SDE.q_sample(a_0, time(t), eps)
    columns = table._columns(a_t, time(t), eps_model(a_t, time(t)), eps, a_0)
    table._derive((weight * columns).sum(0).expand(2, -1))
    return table.variance_at[0].item()


def joint(data: Mixture) -> tuple[Tensor, Tensor, Tensor]:
    """Clean actions, noise and weights ``(n, 1)`` for expectations over both."""
    (a, wa), (e, we) = data.nodes(160, even), even(160)
    pairs = a[:, None].expand(-1, 160), e.expand(len(a), -1), wa[:, None] * we
    a_0, eps, weight = (x.reshape(-1, 1) for x in pairs)
    return a_0, eps, weight


# t; variance and E eps^2 of the Gaussian; variance, E eps^2 and variance at a_t = 0 of two modes
TABLE = [
    (0.01, ("0.00198117", "0.0079246634"), ("0.00185819", "0.0695049654"), "0.003037"),
    (0.05, ("0.02704509", "0.1081803466"), ("0.01686515", "0.4438668009"), "0.067386"),
    (0.1, ("0.07910427", "0.3164170636"), ("0.05951523", "0.4856965961"), "0.157342"),
    (0.2, ("0.16871723", "0.6748689321"), ("0.17392245", "0.6648380884"), "0.241441"),
    (0.3, ("0.21475159", "0.8590063508"), ("0.23587086", "0.8451406434"), "0.266885"),
    (0.5, ("0.24474702", "0.9789880853"), ("0.27513909", "0.9763788786"), "0.279816"),
    (0.8, ("0.24990090", "0.9996036076"), ("0.28172403", "0.9995531298"), "0.281812"),
    (1.0, ("0.24999730", "0.9999892032"), ("0.28184657", "0.9999878277"), "0.281849"),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"t={row[0]}")
@pytest.mark.parametrize("modes", [1, 2])
def test_all_estimators_find_the_mean_variance_with_the_exact_noise(row: tuple[Any, ...], modes: int) -> None:
    t = row[0]
    data, (variance, square) = (GAUSSIAN, TWO_MODES)[modes - 1], row[modes]
    a_0, eps, weight = joint(data)
    x = SDE.q_sample(a_0, time(t), eps)
    assert (weight * data.eps(x, t) ** 2).sum().item() == printed(square)
    for estimator in ESTIMATORS:
        for mean_estimator in ("eps", "calibrated"):
            found = table_at(t, data.eps, data, estimator=estimator, mean_estimator=mean_estimator)
            assert found == printed(variance), (estimator, mean_estimator)
    for constant in (None, -3.0, 0.0, 1.0):  # the second posterior does not depend on the vector it is taken around
        assert table_at(t, data.eps, data, constant, posterior=2, mean_estimator="eps") == printed(variance)
    # ... and the trace of the noise's derivative, averaged over a_t
    pointwise = co.posterior_variance(data.eps, x, torch.full((len(x),), t, dtype=F64), SDE)
    assert (weight[:, 0] * pointwise).sum().item() == printed(variance)
    if modes == 2:
        assert data.variance(column(0.0), t).item() == printed(row[3])


@pytest.mark.parametrize(
    ("t", "known"),
    [
        (0.05, ("0.0209197", "0.06738567", "0.01524733")),
        (0.1, ("0.1657732", "0.1573422", "0.06092893")),
        (0.3, ("0.30030368", "0.26688522", "0.24115287")),
    ],
)
def test_the_variance_at_an_action_is_that_of_the_noises_slope(t: float, known: tuple[str, ...]) -> None:
    x = column(-0.3, 0.0, 0.2)
    found = co.posterior_variance(TWO_MODES.eps, x, time(t), SDE)
    torch.testing.assert_close(found, TWO_MODES.variance(x, t)[:, 0], rtol=0, atol=1e-8)
    for value, digits in zip(found.tolist(), known, strict=True):
        assert value == printed(digits)


# t, with the noise 1 % too large and too small: first posterior, second, likelihood
WRONG = [
    (0.1, ("0.0784", "0.0798"), ("0.0807", "0.0775"), ("0.0791", "0.0791")),
    (0.3, ("0.1885", "0.2408"), ("0.2189", "0.2103"), ("0.2149", "0.2149")),
    (0.5, ("0.0155", "0.4717"), ("0.2485", "0.2387"), ("0.2459", "0.2459")),
    (0.8, ("-12.4", "12.8"), ("0.1919", "0.1819"), ("0.3129", "0.3129")),
    (1.0, ("-465", "461"), ("-2.06", "-2.07"), ("2.57", "2.57")),
]


@pytest.mark.parametrize("row", WRONG, ids=lambda row: f"t={row[0]}")
@pytest.mark.parametrize("sign", [0, 1])
def test_one_percent_of_the_noise_ruins_the_first_posterior_at_large_times(row: tuple[Any, ...], sign: int) -> None:
    t, first, second, likelihood = row

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return (0.99 if sign else 1.01) * GAUSSIAN.eps(x, t)

    options = {"mean_estimator": "eps"}
    found = table_at(t, eps, estimator="raw", **options)
    assert found == printed(first[sign])
    assert table_at(t, eps, posterior=2, **options) == printed(second[sign])
    assert table_at(t, eps, estimator="nll", **options) == printed(likelihood[sign])
    assert table_at(t, eps, estimator="raw", clamp=True) == pytest.approx(min(max(found, 0), 0.25))


# t: spread of estimates from 4096 samples each with the exact noise
SPREAD = [
    (0.1, 0.0008, 0.0024, 0.0042, 0.0017),
    (0.3, 0.0285, 0.0163, 0.0050, 0.0045),
    (0.5, 0.238, 0.050, 0.0054, 0.0053),
    (0.8, 15.3, 0.375, 0.0058, 0.0058),
    (1.0, 521, 2.44, 0.0052, 0.0052),
]


def estimates(t: float, samples: int, repeats: int, **options: Any) -> Tensor:
    """The variance at one time ``(repeats,)``, from that many samples each with the exact noise."""
    generator = torch.Generator().manual_seed(0)
    a_0, eps = torch.randn(2, repeats * samples, 1, generator=generator, dtype=F64)
    a_0 = 0.2 + 0.5 * a_0
    a_t = SDE.q_sample(a_0, time(t), eps)
    table = PosteriorTable(1, SDE, grid=repeats, mean_estimator="eps", **KEEP, **options).double()
    table.time.fill_(t)
    table.action_mean.fill_(0.2)
    table.v_bar.fill_(0.25)
    columns = table._columns(a_t, time(t), GAUSSIAN.eps(a_t, time(t)), eps, a_0)
    table._derive(columns.view(repeats, samples, -1).mean(1))
    if options.get("posterior") == 2:  # the table knows the dataset's variance; the samples' scatters with its own
        return table.variance_at - 0.25 + (a_0 - 0.2).square().view(repeats, samples).mean(1)
    return table.variance_at


@pytest.mark.parametrize("row", SPREAD, ids=lambda row: f"t={row[0]}")
def test_estimates_scatter_as_tabulated(row: tuple[float, ...]) -> None:
    """To a fifth: the table's own spreads are of a few hundred estimates, and so are these."""
    kinds = [{"estimator": "raw"}, {"estimator": "paired"}, {"posterior": 2}, {"estimator": "nll"}]
    for options, spread in zip(kinds, row[1:], strict=True):
        assert estimates(row[0], 4096, 300, **options).std().item() == pytest.approx(spread, rel=0.2), options


@pytest.mark.parametrize(
    ("samples", "repeats", "known"),
    [
        (256, 2000, {0.3: "0.11", 0.5: "0.97", 1.0: "1822"}),
        (4096, 300, {0.1: "0.0008", 0.3: "0.0285", 0.5: "0.238", 0.8: "15.3", 1.0: "521"}),
        (100_000, 30, {0.3: "0.006", 0.5: "0.054", 1.0: "110"}),
    ],
)
def test_the_spread_of_the_papers_estimate_is_known(samples: int, repeats: int, known: dict[float, str]) -> None:
    """The predicted noise is normal, so its mean square scatters with ``E eps^2 sqrt(2 / N)``; the table sampled it."""
    for t, spread in known.items():
        noise_to_signal = SDE.noise_to_signal(t)
        exact = noise_to_signal * (1 - 0.25 / (0.25 + noise_to_signal)) * math.sqrt(2 / samples)
        unit = 10.0 ** -len(spread.partition(".")[2])
        assert exact == pytest.approx(float(spread), rel=0.13, abs=0.5 * unit if unit < 1 else 0), t
        found = estimates(t, samples, repeats, estimator="raw").std().item()
        assert found == pytest.approx(exact, rel=3 / math.sqrt(2 * repeats)), t


# ---------------------------------------------------------------- fitting by simulation


def dataset(rows: int = 20_000, size: int = 1) -> tuple[Tensor, Tensor]:
    share = (torch.arange(rows, dtype=F64) + 0.5) / rows
    action = 0.2 + 0.5 * torch.special.ndtri(share)[torch.randperm(rows, generator=torch.Generator().manual_seed(0))]
    return torch.zeros(rows, 1, dtype=F64), action[:, None].expand(-1, size).contiguous()


def exact_net(x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
    return GAUSSIAN.eps(x, t)


def fitted(net: Any = exact_net, samples: int = 16_384, **options: Any) -> PosteriorTable:
    table = PosteriorTable(1, SDE, **({"bound": None, "grid": 24} | options)).double()
    table.fit(net, *dataset(), Draws(), samples=samples)
    return table


def truth(t: Tensor) -> Tensor:
    return 0.25 * SDE.sigma(t) ** 2 / (0.25 * SDE.alpha(t) ** 2 + SDE.sigma(t) ** 2)


T = torch.linspace(T_MIN, 1, 300, dtype=F64)


@pytest.mark.parametrize("options", [{"estimator": e} for e in ESTIMATORS] + [{"posterior": 2}], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1.05, 0.9])
def test_the_fitted_variance_is_bounded_and_does_not_fall(options: dict[str, Any], factor: float) -> None:
    def net(x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        return factor * GAUSSIAN.eps(x, t)

    table = fitted(net, **options)
    found = table.variance(T)
    assert found.isfinite().all() and (found >= 0).all() and (found <= table.v_bar + 1e-12).all()
    assert (found.diff() >= -1e-12).all()
    if factor == 1:
        assert found[0] < 2e-3
        # the cancelling estimates know little at t = 1: there they are noise, held between 0 and 0.25
        cancels = options.get("estimator") in ("raw", "paired")
        assert found[-1] == pytest.approx(0.25, abs=0.15 if cancels else 0.01)
    if options.get("estimator") == "mixed" and factor == 1:
        torch.testing.assert_close(found, truth(T), rtol=0.05, atol=0.006)


def test_fitting_is_a_function_of_the_place_in_the_run() -> None:
    torch.manual_seed(0)
    obs, action = dataset()
    tables = [PosteriorTable(1, SDE, grid=4).double() for _ in range(2)]
    for table in tables:
        torch.randn(7)  # whatever else was drawn
        table.fit(exact_net, obs, action, Draws(), samples=1000)
    for name, value in tables[0].state_dict().items():
        assert torch.equal(value, tables[1].state_dict()[name]), name
    assert bool(tables[0].fitted)


def test_a_table_is_carried_by_its_state() -> None:
    table, copy = fitted(samples=1000), PosteriorTable(1, SDE, grid=24, bound=None).double()
    copy.load_state_dict(table.state_dict())
    x, eps = torch.randn(300, 1, dtype=F64), torch.randn(300, 1, dtype=F64)
    assert torch.equal(copy.variance(T), table.variance(T))
    assert torch.equal(copy.mean(x, T, eps), table.mean(x, T, eps))


# ---------------------------------------------------------------- the calibrated mean


@pytest.mark.parametrize("t", [0.001, 0.05, 0.2, 0.5, 0.8, 1.0])
def test_the_exact_noise_needs_no_shrinkage(t: float) -> None:
    """By quadrature: at t = 1 the mean moves by so little that a billion samples would be needed."""
    table = PosteriorTable(1, SDE, grid=2, **KEEP).double()
    table.time.fill_(t)
    (a, wa), (e, we) = GAUSSIAN.nodes(40), gauss(40)
    a_0, eps, weight = (x.reshape(-1, 1) for x in (a[:, None].expand(-1, 40), e.expand(40, -1), wa[:, None] * we))
    a_t = SDE.q_sample(a_0, time(t), eps)
    columns = table._columns(a_t, time(t), GAUSSIAN.eps(a_t, t), eps, a_0)
    table.action_mean.fill_(0.2)
    table._derive((weight * columns).sum(0).expand(2, -1))
    assert table.rho_at[0].item() == pytest.approx(1, abs=0.02)
    table.time.copy_(torch.tensor([t - 0.1, t + 0.1]))
    x = column(-0.4, 0.7)
    torch.testing.assert_close(
        table.mean(x, time(t).expand(2), GAUSSIAN.eps(x, t)), GAUSSIAN.mean(x, t), rtol=0.02, atol=1e-3
    )


def test_a_wrong_network_is_shrunk_where_its_mean_is_noise() -> None:
    generator = torch.Generator().manual_seed(3)

    def net(x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        return GAUSSIAN.eps(x, t) + 0.02 * torch.randn(x.shape, generator=generator, dtype=F64)

    table = fitted(net)
    assert table.rho_at[-1] < 0.2  # t = 1
    assert table.rho_at[:8].min() > 0.95
    x, eps = 3 * torch.randn(100, 1, dtype=F64), torch.randn(100, 1, dtype=F64)
    shrunk = table.mean(x, torch.ones(100, dtype=F64), eps)
    bare = table.implied_mean(x, torch.ones(100, dtype=F64), eps)
    assert (shrunk - 0.2).abs().max() < 0.2 * (bare - 0.2).abs().max()
    # ... and the variance counts what the shrunk mean misses, not what the bare one would
    assert table.variance_at[-1] == pytest.approx(0.25, rel=0.05)


def test_the_papers_mean_is_that_of_the_network_in_the_box() -> None:
    x, eps, t = torch.randn(50, 2), torch.randn(50, 2), torch.rand(50)
    implied = SDE.x0_from_eps(x, t, eps)
    for bound, known in ((1.0, implied.clamp(-1, 1)), (None, implied)):
        table = PosteriorTable(2, SDE, mean_estimator="eps", bound=bound)
        torch.testing.assert_close(table.mean(x, t, eps), known)


# ---------------------------------------------------------------- the table of joint training


def test_tracking_batches_finds_what_fitting_does() -> None:
    torch.manual_seed(0)
    table = PosteriorTable(1, SDE, grid=24, bound=None, decay=0.99).double()
    _, action = dataset()
    table.describe(action)
    assert not bool(table.fitted)
    for _ in range(400):
        a_0 = action[torch.randint(len(action), (512,))]
        t, eps = T_MIN + (1 - T_MIN) * torch.rand(512, dtype=F64), torch.randn(512, 1, dtype=F64)
        a_t = SDE.q_sample(a_0, t, eps)
        table.track(t, GAUSSIAN.eps(a_t, t), eps, a_0)
    assert bool(table.fitted)
    seen = table.weight > 0.5
    assert seen.sum() > 12
    t = table.time[seen]
    torch.testing.assert_close(table.variance_at[seen], truth(t), rtol=0.15, atol=0.012)
    assert (table.rho_at[seen & (table.time < 0.5)] - 1).abs().max() < 0.1


def test_times_without_samples_yet_trust_the_network() -> None:
    torch.manual_seed(0)
    table = PosteriorTable(1, SDE, grid=24, bound=None).double()
    _, action = dataset()
    action = action + 0.7
    table.describe(action)
    a_0, t, eps = action[:512], torch.full((512,), 0.1, dtype=F64), torch.randn(512, 1, dtype=F64)
    table.track(t, 0.5 * eps, eps, a_0)
    a_t, late = SDE.q_sample(a_0, t + 0.7, eps), t + 0.7
    assert table.weight[table.time > 0.7].max() == 0
    torch.testing.assert_close(table.mean(a_t, late, eps), table.implied_mean(a_t, late, eps))
    here = SDE.q_sample(a_0, t, eps)
    assert (table.mean(here, t, 0.5 * eps) - table.implied_mean(here, t, 0.5 * eps)).abs().max() > 0.001, "calibrated"


def test_processes_track_what_one_does_with_all_rows() -> None:
    torch.manual_seed(0)
    _, action = dataset(64)
    t, eps = torch.rand(64, dtype=F64), torch.randn(64, 1, dtype=F64)
    eps_hat = eps + 0.1 * torch.randn(64, 1, dtype=F64)
    whole, parts = (PosteriorTable(1, SDE, grid=8).double() for _ in range(2))
    whole.track(t, eps_hat, eps, action)

    sums: list[Tensor] = []
    for half in (slice(0, 32), slice(32, 64)):
        PosteriorTable(1, SDE, grid=8).double().track(
            t[half], eps_hat[half], eps[half], action[half], lambda x: sums.append(x) or x
        )
    parts.track(t[:32], eps_hat[:32], eps[:32], action[:32], lambda x: torch.stack(sums).mean(0))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value)


# ---------------------------------------------------------------- isotonic regression


def test_the_nearest_sequence_that_does_not_fall_pools_neighbours() -> None:
    y = torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, 4.0], dtype=F64)
    known = [1.0, 7 / 3, 7 / 3, 7 / 3, 4.5, 4.5]
    assert non_decreasing(y).tolist() == pytest.approx(known)
    y = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = non_decreasing(y)
    assert (found.diff() >= -1e-12).all()
    for _ in range(50):  # no other one is nearer
        other = (found + 0.1 * torch.randn(64, dtype=F64)).sort().values
        assert (other - y).square().sum() >= (found - y).square().sum()
    assert found.mean().item() == pytest.approx(y.mean().item())  # a running maximum is not
    torch.testing.assert_close(non_decreasing(found), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"posterior": 3}, "posterior must be 1 or 2"),
        ({"estimator": "row"}, "did you mean 'raw'"),
        ({"mean_estimator": "sample"}, "mean estimator"),
        ({"grid": 1}, "posterior grid"),
        ({"decay": 1.0}, "decay"),
    ],
)
def test_unknown_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        PosteriorTable(2, SDE, **options)
