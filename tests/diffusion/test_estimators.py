import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from lit_diffrl.diffusion.chains import CHAINS, Chain, bridge, proposal, systematic, weights
from lit_diffrl.diffusion.estimators import backward_two_pass, estimate
from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.errors import ConfigError

HORIZON, WIDTH = 3, 4


def schedule_of(steps: int) -> Schedule:
    return Schedule("cosine", steps, dtype=torch.float64)


class Denoiser(nn.Module):
    """A small network on (x, k), which counts its calls and the rows it has seen."""

    def __init__(self, steps: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.time = nn.Embedding(steps + 1, 8)
        self.net = nn.Sequential(nn.Linear(WIDTH + 8, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.rows: list[int] = []
        self.double()

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        self.rows.append(len(x))
        time = self.time(k)[:, None].expand(-1, x.shape[1], -1)
        return self.net(torch.cat([x, time], dim=-1))

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() if p.grad is not None else p.flatten() * 0 for p in self.parameters()])


def batch(k: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (len(k), HORIZON, WIDTH)
    x0 = torch.randn(shape, generator=g, dtype=torch.float64)
    return x0, torch.tensor(k), torch.randn(shape, generator=g, dtype=torch.float64)


def loop(kind: str, predict, schedule: Schedule, x0: Tensor, k: Tensor, eps: Tensor, seed: int = 0) -> Tensor:
    """The chains in predicted noise, term by term: tau_k / signal_k - sum c_i eps_theta(tau_i, i)."""
    noise, _ = bridge(schedule, k, eps, torch.Generator().manual_seed(seed))
    u = schedule.u
    out = []
    for b in range(len(x0)):
        last = int(k[b])
        total = x0[b] + u[last] * eps[b]
        for i in range(1, last + 1):
            step = torch.tensor([i])
            eps_i = noise[i - 1, b] if kind == "chain_bridge" else eps[b]
            x_i = schedule.q_sample(x0[b : b + 1], step, eps_i[None])
            eps_theta = schedule.eps_from_x0(x_i, step, predict(x_i, step))[0]
            c = u[i] - u[i - 1]
            if kind != "chain_ddim":
                c = (1 - schedule.alpha[i]) / ((1 - schedule.alpha_bar[i]) * schedule.alpha_bar[i]).sqrt()
            total = total - c * eps_theta
        out.append(total)
    return torch.stack(out)


def quadratic(target: Tensor):
    return lambda x: ((x - target).square() * torch.linspace(0.1, 1, WIDTH, dtype=x.dtype)).mean() + x.sin().sum()


# ------------------------------------------------------------------ coefficients


@pytest.mark.parametrize("steps", [20, 100])
def test_coefficient_identities(steps: int) -> None:
    schedule = schedule_of(steps)
    u = schedule.u
    c = u * weights(schedule, "chain_paper").weight
    direct = (1 - schedule.alpha[1:]) / ((1 - schedule.alpha_bar[1:]) * schedule.alpha_bar[1:]).sqrt()
    torch.testing.assert_close(c[1:], direct, rtol=1e-10, atol=0)
    torch.testing.assert_close((u * weights(schedule, "chain_ddim").weight).cumsum(0), u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((c * u).cumsum(0), u.square(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(u - c.cumsum(0), -weights(schedule, "chain_paper").residual, rtol=1e-9, atol=1e-9)
    assert not weights(schedule, "chain_ddim").residual.any()


def test_values_of_coefficients() -> None:
    c = {n: (schedule_of(n).u * weights(schedule_of(n), "chain_paper").weight).cumsum(0) for n in (20, 100)}
    assert c[20][20] == pytest.approx(426.51, abs=5e-3)
    assert c[100][100] == pytest.approx(2132.6, abs=5e-2)
    assert c[100][50] == pytest.approx(1.938, abs=5e-4)
    paper, ddim = (weights(schedule_of(100), kind).weight.cumsum(0) for kind in ("chain_paper", "chain_ddim"))
    assert [round(float(x), 1) for x in (paper[50], ddim[50], paper[100], ddim[100])] == [7.3, 4.4, 15.2, 9.1]
    paper, ddim = (weights(schedule_of(20), kind).weight.cumsum(0) for kind in ("chain_paper", "chain_ddim"))
    assert [round(float(x), 1) for x in (paper[10], ddim[10], paper[20], ddim[20])] == [4.5, 3.1, 9.2, 6.1]


S_TABLE = {  # residual of Eq. 8 with a perfect predictor
    20: {2: 0.042, 10: 0.7261, 15: 1.91, 20: 20.3},
    100: {2: 0.0100, 25: 0.358, 50: 0.92556, 75: 2.298, 99: 41.2, 100: 103.4},
}


@pytest.mark.parametrize("steps", [20, 100])
def test_perfect_predictor_leaves_the_residual_of_the_paper_only(steps: int) -> None:
    schedule = schedule_of(steps)
    x0, k, eps = batch([1, *S_TABLE[steps]])
    clean = x0[0]  # point-mass data: the perfect prediction is the same for every row
    x0 = clean.expand_as(x0)

    def perfect(x: Tensor, k: Tensor) -> Tensor:
        return clean.expand_as(x)

    for kind in ("tweedie", "chain_ddim"):
        torch.testing.assert_close(estimate(kind, perfect, schedule, x0, k, eps), x0, rtol=0, atol=1e-12)
    left = x0 - estimate("chain_paper", perfect, schedule, x0, k, eps)
    torch.testing.assert_close(left[0], torch.zeros_like(clean), rtol=0, atol=1e-12)
    for row, (_, s) in zip(left[1:], S_TABLE[steps].items()):
        scale = row / eps[(left == row).flatten(1).all(1)][0]
        torch.testing.assert_close(scale, scale.mean().expand_as(scale))
        assert float(scale.mean()) == pytest.approx(s, rel=1.3e-2 if s < 0.1 else 2e-3)
    residual = weights(schedule, "chain_paper").residual[1:]
    assert float(residual.mean()) == pytest.approx({20: 2.4, 100: 3.6}[steps], abs=0.05)
    assert float(residual.quantile(0.5)) == pytest.approx({20: 0.80, 100: 0.94}[steps], abs=0.005)


# ------------------------------------------------------------------ the reverse chain and the bridge


@pytest.mark.parametrize("sigma", [0.0, 1.7])
def test_unrolled_reverse_chain_equals_eq_18_with_visited_states(sigma: float) -> None:
    schedule, net = schedule_of(20), Denoiser(20)
    x, _, _ = batch([20])
    c = schedule.u * weights(schedule, "chain_paper").weight
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        closed = x / schedule.signal[20]
        for i in range(20, 0, -1):
            k = torch.tensor([i])
            eps_theta = schedule.eps_from_x0(x, k, net(x, k))
            drift = (1 - schedule.alpha[i]) / (1 - schedule.alpha_bar[i]).sqrt()
            noise = sigma * torch.randn(x.shape, generator=g, dtype=x.dtype)
            closed = closed - c[i] * eps_theta + noise / schedule.signal[i - 1]
            x = (x - drift * eps_theta) / schedule.alpha[i].sqrt() + noise
    assert float((x - closed).norm() / x.norm()) < 1e-10


def test_bridge_noise_has_the_law_of_a_forward_chain_with_a_given_end() -> None:
    schedule, draws = schedule_of(20), 40_000
    end = torch.randn(draws, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise, residual = bridge(schedule, torch.full((draws,), 15), end, torch.Generator().manual_seed(1))
    u = schedule.u
    assert torch.equal(noise[14], end)
    torch.testing.assert_close(noise.std(1), torch.ones_like(noise[:, 0]), atol=0.02, rtol=0)
    for i in (3, 8, 14):
        assert float((noise[i - 1] * end).mean()) == pytest.approx(float(u[i] / u[15]), abs=0.02)
    c = u * weights(schedule, "chain_bridge").weight
    direct = u[15] * end - (c[1:16, None, None] * noise).sum(0)
    torch.testing.assert_close(residual, direct)
    eq_20 = sum(schedule.posterior_var[i] / schedule.alpha_bar[i - 1] for i in range(2, 16))
    assert float(residual.var()) == pytest.approx(float(eq_20), rel=0.03)
    assert abs(float(residual.mean())) < 0.03


@pytest.mark.parametrize(("k", "std"), [(50, 0.97), (75, 2.3), (99, 36)])
def test_residual_of_the_bridge_is_as_wide_as_eq_20_says(k: int, std: float) -> None:
    draws = 20_000
    end = torch.randn(draws, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, residual = bridge(schedule_of(100), torch.full((draws,), k), end, torch.Generator().manual_seed(2))
    assert float(residual.std()) == pytest.approx(std, rel=0.02)


def test_bridge_of_mixed_lengths_leaves_short_chains_alone() -> None:
    schedule = schedule_of(20)
    _, k, eps = batch([1, 20, 7])
    noise, residual = bridge(schedule, k, eps, torch.Generator().manual_seed(0))
    assert torch.equal(noise[:, 0], eps[0].expand_as(noise[:, 0]))
    assert not residual[0].any()
    assert torch.equal(noise[6:, 2], eps[2].expand_as(noise[6:, 2]))
    assert not torch.equal(noise[5, 2], eps[2])


# ------------------------------------------------------------------ ways to compute the sums


@pytest.mark.parametrize(("kind", "steps"), list(product(CHAINS, [20, 100])))
def test_x0_form_equals_noise_form(kind: str, steps: int) -> None:
    schedule, net = schedule_of(steps), Denoiser(steps)
    x0, k, eps = batch([1, steps, 2, steps // 2, steps - 1])
    expected = loop(kind, net, schedule, x0, k, eps)
    found = estimate(kind, net, schedule, x0, k, eps, generator=torch.Generator().manual_seed(0))
    # the noise form cancels numbers as large as u_K
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(schedule.u[-1]) + 1e-12)


@pytest.mark.parametrize(("kind", "shared"), list(product(CHAINS, [False, True])))
def test_all_exact_forms_agree_in_value_and_gradient(kind: str, shared: bool) -> None:
    schedule, net = schedule_of(20), Denoiser(20)
    x0, k, eps = batch([1, 20, 2, 7, 13, 1])
    loss_fn = quadratic(x0 + 0.3)

    def x0_hat_k() -> Tensor | None:
        return net(schedule.q_sample(x0, k, eps), k) if shared else None

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    reference = loss_fn(loop(kind, net, schedule, x0, k, eps))
    reference.backward()
    gradient = net.gradient()
    for compute in ("exact_batched", "checkpointed"):
        net.zero_grad()
        found = estimate(
            kind, net, schedule, x0, k, eps, compute=compute, chunk=5, generator=generator(), x0_hat_k=x0_hat_k()
        )
        loss = loss_fn(found)
        loss.backward()
        torch.testing.assert_close(loss, reference, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(net.gradient(), gradient, rtol=1e-8, atol=1e-9)
    for compute, m in (("exact_two_pass", 1), ("two_pass_mc", 20)):  # 20 draws list every term
        net.zero_grad()
        loss = backward_two_pass(
            kind, net, schedule, x0, k, eps, loss_fn, backward=torch.Tensor.backward,
            compute=compute, m=m, chunk=5, generator=generator(), x0_hat_k=x0_hat_k(),
        )  # fmt: skip
        if shared:
            loss.backward()  # through x0_hat_k
        assert loss.requires_grad == shared
        torch.testing.assert_close(loss.detach(), reference.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(net.gradient(), gradient, rtol=1e-8, atol=1e-9)


def test_rows_evaluated() -> None:
    schedule, net = schedule_of(20), Denoiser(20)
    x0, k, eps = batch([1, 20, 2, 7])
    x_k = schedule.q_sample(x0, k, eps)

    def rows(kind: str, **options) -> list[int]:
        net.rows.clear()
        estimate(kind, net, schedule, x0, k, eps, **options)
        return list(net.rows)

    assert rows("tweedie") == [4]
    assert rows("tweedie", x0_hat_k=x0) == []  # the diffusion loss has made the only call
    assert rows("chain_paper") == [30]
    assert rows("chain_paper", x0_hat_k=x0) == [26]
    assert rows("chain_paper", compute="checkpointed", chunk=8) == [8, 8, 8, 6]
    assert rows("chain_paper", compute="monte_carlo", m=4) == [1 + 4 + 2 + 4]
    one = torch.ones(4, dtype=torch.int64)
    net.rows.clear()
    shared = net(x_k, one)
    torch.testing.assert_close(estimate("chain_paper", net, schedule, x0, one, eps, x0_hat_k=shared), shared)
    assert net.rows == [4]  # k = 1 everywhere: nothing is left to evaluate


def test_given_entries_are_fed_clean() -> None:
    schedule = schedule_of(20)
    x0, k, eps = batch([1, 20, 7])
    given = torch.zeros(HORIZON, WIDTH, dtype=torch.bool)
    given[0, 2:] = True
    seen: list[Tensor] = []

    def predict(x: Tensor, k: Tensor) -> Tensor:
        seen.append(x)
        return x

    for kind in ("tweedie", *CHAINS):
        seen.clear()
        estimate(kind, predict, schedule, x0, k, eps, given=given)
        owner = torch.arange(3) if kind == "tweedie" else torch.arange(3).repeat_interleave(k)
        assert torch.equal(seen[0][:, given], x0[owner][:, given])
        assert not torch.isclose(seen[0][:, ~given], x0[owner][:, ~given]).all(1).any()


def test_sums_stay_in_float32_under_autocast() -> None:
    schedule = Schedule("cosine", 100)
    x0, k, eps = (x.float() if x.is_floating_point() else x for x in batch([100, 50]))
    layer = nn.Linear(WIDTH, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = estimate("chain_paper", lambda x, k: layer(x), schedule, x0, k, eps)
    assert found.dtype == torch.float32
    halves = estimate("chain_ddim", lambda x, k: x, schedule, x0.bfloat16(), k, eps.bfloat16())
    assert halves.dtype == torch.float32
    exact = x0 - weights(schedule, "chain_paper").residual[k][:, None, None] * eps
    zero_net = estimate("chain_paper", lambda x, k: torch.zeros_like(x).bfloat16(), schedule, x0, k, eps)
    sums = weights(schedule, "chain_paper").weight.cumsum(0)[k].float()[:, None, None]
    torch.testing.assert_close(zero_net, (exact - sums * x0).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("compute", ["exact_two_pass", "loop", "nothing"])
def test_unknown_ways_are_refused(compute: str) -> None:
    x0, k, eps = batch([1])
    with pytest.raises(ConfigError, match=r"chain\.compute"):
        estimate("chain_paper", Denoiser(20), schedule_of(20), x0, k, eps, compute=compute)
    with pytest.raises(ConfigError, match="tweedie"):
        backward_two_pass(
            "tweedie", Denoiser(20), schedule_of(20), x0, k, eps, torch.sum, backward=torch.Tensor.backward
        )


# ------------------------------------------------------------------ Monte Carlo


def test_systematic_draws_have_the_right_frequencies() -> None:
    q = torch.tensor([[0.05, 0.6, 0.0, 0.35]], dtype=torch.float64)
    drawn = systematic(q.expand(30_000, 4), 3, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn.flatten(), minlength=5)[1:] / 30_000
    torch.testing.assert_close(counts.double(), 3 * q[0], atol=0.02, rtol=0)
    # no step is drawn fewer times than floor(m q) or more than ceil(m q)
    per_row = torch.stack([(drawn == i).sum(1) for i in range(1, 5)], 1)
    assert (per_row >= (3 * q).floor()).all() and (per_row <= (3 * q).ceil()).all()


def test_systematic_draws_of_a_uniform_distribution_list_every_step() -> None:
    for n in (1, 2, 7, 20):
        drawn = systematic(torch.full((50, n), 1 / n, dtype=torch.float64), n, torch.Generator().manual_seed(n))
        assert torch.equal(drawn, torch.arange(1, n + 1).expand(50, n))


@pytest.mark.parametrize("kind", CHAINS)
def test_proposal_covers_every_term_and_nothing_else(kind: str) -> None:
    schedule = schedule_of(20)
    count = torch.tensor([0, 1, 5, 20])
    c = schedule.u * weights(schedule, kind).weight
    q = proposal(c, count)
    torch.testing.assert_close(q.sum(1), torch.tensor([0.0, 1, 1, 1], dtype=torch.float64))
    for row, n in zip(q, count.tolist()):
        assert (row[:n] >= 0.5 / max(n, 1) - 1e-12).all() and not row[n:].any()
    # enumerated with its weights 1 / q, the sum is the exact one
    term = torch.randn(20, dtype=torch.float64)
    torch.testing.assert_close((q[3] * (c[1:] * term / q[3])).sum(), (c[1:] * term).sum())


@pytest.mark.parametrize(("kind", "shared"), [("chain_paper", False), ("chain_ddim", True), ("chain_bridge", False)])
def test_monte_carlo_estimate_is_unbiased(kind: str, shared: bool) -> None:
    schedule, net = schedule_of(20), Denoiser(20)
    k = [9, 20, 3]
    x0, k_, eps = batch(k)
    repeats = 4000
    if kind == "chain_bridge":  # its own noise is random: compare sums over one and the same noise
        chain = Chain(kind, schedule, x0, k_, eps, False, None, torch.Generator().manual_seed(0))
        rows, g = chain.all_rows(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            terms = chain.terms(rows, net(chain.inputs(rows), rows.step)) / rows.weight
        first = k_.cumsum(0) - k_
        exact = torch.zeros_like(x0).index_add(0, rows.owner, rows.weight * terms)
        mean = torch.zeros_like(x0)
        for _ in range(repeats):
            d = chain.drawn_rows(4, g)
            mean.index_add_(0, d.owner, d.weight * terms[first[d.owner] + d.step - 1] / repeats)
        torch.testing.assert_close(mean, exact, atol=0.06, rtol=0)
        return
    with torch.no_grad():
        x0_hat_k = net(schedule.q_sample(x0, k_, eps), k_) if shared else None
        exact = estimate(kind, net, schedule, x0, k_, eps)
        many = [x.repeat_interleave(repeats, 0) for x in (x0, k_, eps)]
        drawn = estimate(
            kind, net, schedule, *many, compute="monte_carlo", m=4, generator=torch.Generator().manual_seed(0),
            x0_hat_k=None if x0_hat_k is None else x0_hat_k.repeat_interleave(repeats, 0),
        ).reshape(3, repeats, HORIZON, WIDTH)  # fmt: skip
    error = (drawn.mean(1) - exact).abs()
    assert (error <= 4.5 * drawn.std(1) / math.sqrt(repeats) + 1e-9).all()
    assert drawn[:2].std(1).min() > 1e-3
    torch.testing.assert_close(drawn[2, 0], exact[2])  # 3 terms, 4 draws: exact


def test_sampled_gradient_averages_to_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, net = schedule_of(20), Denoiser(20)
    x0, k, eps = batch([1, 20, 12])
    exact_loss = estimate("chain_paper", net, schedule, x0, k, eps).square().sum()
    exact_loss.backward()
    exact = net.gradient()
    repeats = 3000
    # the draws of a window are a function of one uniform number: put it on a grid instead of drawing it
    grid = ((torch.arange(repeats) + 0.5) / repeats).repeat_interleave(3)[:, None]
    monkeypatch.setattr(torch, "rand", lambda *size, **options: grid)
    net.zero_grad()
    many = (x0.repeat(repeats, 1, 1), k.repeat(repeats), eps.repeat(repeats, 1, 1))
    loss = backward_two_pass(
        "chain_paper",
        net,
        schedule,
        *many,
        lambda x: x.square().sum() / repeats,
        backward=torch.Tensor.backward,
        compute="two_pass_mc",
        m=2,
        chunk=20_000,
    )
    torch.testing.assert_close(loss, exact_loss.detach())
    assert float((net.gradient() - exact).norm() / exact.norm()) < 3e-3


def gaussian_predictor(schedule: Schedule, s: float):
    def predict(x: Tensor, k: Tensor) -> Tensor:
        a = schedule.alpha_bar[k][:, None]
        return s**2 * a.sqrt() * x / (a * s**2 + 1 - a)

    return predict


RMSE = {  # optimal predictor, data N(0, s^2), K = 100: (s, k) -> Eq. 8, ddim, bridge, tweedie
    (1.0, 25): (0.412, 0.409, 0.423, 0.391),
    (1.0, 50): (0.900, 0.862, 1.000, 0.711),
    (1.0, 75): (1.90, 1.51, 2.37, 0.925),
    (1.0, 99): (39.1, 4.06, 36.4, 1.00),
    (0.5, 50): (0.805, 0.680, 0.988, 0.446),
    (0.5, 99): (40.0, 2.36, 36.5, 0.500),
}


@pytest.mark.parametrize(("s", "k"), list(RMSE))
def test_error_with_the_optimal_predictor(s: float, k: int) -> None:
    schedule, samples = schedule_of(100), 20_000
    g = torch.Generator().manual_seed(0)
    x0 = s * torch.randn(samples, 1, generator=g, dtype=torch.float64)
    eps = torch.randn(samples, 1, generator=g, dtype=torch.float64)
    steps = torch.full((samples,), k)
    for kind, expected in zip((*CHAINS, "tweedie"), RMSE[s, k]):
        found = estimate(kind, gaussian_predictor(schedule, s), schedule, x0, steps, eps, generator=g)
        assert float((found - x0).square().mean().sqrt()) == pytest.approx(expected, rel=0.025)


@pytest.mark.parametrize(("k", "expected"), [(25, 0.02), (50, 0.09), (75, 0.22), (99, 0.54)])
def test_error_of_four_sampled_terms(k: int, expected: float) -> None:
    schedule, samples = schedule_of(100), 20_000
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(samples, 1, generator=g, dtype=torch.float64) for _ in range(2))
    args = (gaussian_predictor(schedule, 1.0), schedule, x0, torch.full((samples,), k), eps)
    exact = estimate("chain_paper", *args)
    drawn = estimate("chain_paper", *args, compute="monte_carlo", m=4, generator=g)
    assert float((drawn - exact).square().mean().sqrt()) == pytest.approx(expected, rel=0.25)
