from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from printed import digits, printed
from torch import Tensor

from lit_diffrl.data.normalizers import fit_normalizer
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import synthesis as syn
from lit_diffrl.methods.world_model import WorldModel

B, ETA = 2048, 0.6


def gumbel(*shape: int, seed: int = 0) -> Tensor:
    normal = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return syn.gumbel_noise(normal)


# ------------------------------------------------------------------ correction


def picard(a: float, b: float, gain: float, beta: float, rounds: int, horizon: int = 10) -> list[float]:
    """Greatest state error after 0..rounds corrections of a biased model's rollout, with an exact trajectory model."""

    def policy(states: Tensor) -> Tensor:
        return gain * states

    def predict(first: Tensor, actions: Tensor) -> Tensor:
        states = [first]
        for t in range(actions.shape[1] - 1):
            states.append(a * states[-1] + b * actions[:, t])
        return torch.stack(states, dim=1)

    first = torch.ones(1, 1, dtype=torch.float64)
    states, actions = syn.single_step_rollout(first, policy, lambda s, u: (a + 0.05) * s + b * u, horizon)
    truth, _ = syn.single_step_rollout(first, policy, lambda s, u: a * s + b * u, horizon)
    found = []
    for k in range(rounds + 1):
        s, u, _ = syn.iterate_correction(states, actions, predict, policy, rounds=k, beta=beta)
        assert torch.equal(u, policy(s)), "actions are not the policy's"
        found.append((s - truth).abs().max().item())
        if beta == 1:
            assert torch.equal(s[:, : k + 1], truth[:, : k + 1]), "k rounds make k + 1 states exact"
    return found


@pytest.mark.parametrize(
    ("system", "beta", "numbers"),
    [
        ((0.9, 0.5, -0.6), 1.0, "0.0625 0.0648 0.0817 0.0549 0.0223 0.0057 0.00091"),
        ((0.9, 0.5, -0.6), 0.5, "0.0625 0.0260 0.0139 0.0072 0.0038 0.0022"),
        ((1.1, 1.0, -0.9), 1.0, "0.05 0.139 0.736 1.68 2.14 1.64 0.758 0.195 0.0215 0"),
        ((1.1, 1.0, -0.9), 0.5, "0.05 0.069 0.115 0.037 0.045 0.034 0.0146 0.0096"),
    ],
)
def test_correction_with_exact_dynamics_is_a_picard_iteration(
    system: tuple[float, float, float], beta: float, numbers: str
) -> None:
    """Oracle 11."""
    assert picard(*system, beta, len(numbers.split()) - 1) == printed(numbers)
    if beta == 1:
        assert max(picard(*system, beta, 12)[9:]) < 1e-16, "H - 1 rounds do not make all states exact"


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_averaging_weighs_the_rounds_by_powers_of_two(rounds: int) -> None:
    predictions = iter(torch.eye(rounds + 1)[1:])
    start = torch.eye(rounds + 1)[:1, None]  # one trajectory of one state, whose entries name where it came from
    states, _, _ = syn.iterate_correction(
        start, start, lambda first, actions: next(predictions)[None, None], lambda s: s, rounds=rounds, beta=0.5
    )
    expected = [2.0**-rounds, *(2.0 ** -(rounds - k) for k in range(rounds))]
    assert states.flatten().tolist() == expected
    if rounds == 2:
        assert expected == [0.25, 0.25, 0.5]


def test_a_correction_of_weight_1_replaces_and_of_weight_0_keeps_to_the_bit() -> None:
    old, new = torch.randn(100), torch.randn(100)
    assert torch.equal(syn.correct(old, new, 1.0), new) and torch.equal(syn.correct(old, new, 0.0), old)
    assert torch.equal(syn.correct(new, new, 0.5), new)


def test_the_actions_of_the_round_before_are_those_that_the_last_states_followed() -> None:
    asked: list[Tensor] = []

    def predict(first: Tensor, actions: Tensor) -> Tensor:
        asked.append(actions)
        return torch.randn(2, 4, 3)

    states, actions = torch.randn(2, 4, 3), torch.randn(2, 4, 1)
    _, _, previous = syn.iterate_correction(states, actions, predict, lambda s: s[..., :1], rounds=3, beta=0.5)
    assert len(asked) == 3 and torch.equal(asked[0], actions) and torch.equal(asked[-1], previous)


def test_conditions_are_written_into_a_copy() -> None:
    x, first, actions = torch.randn(2, 4, 5), torch.randn(2, 3), torch.randn(2, 4, 2)
    before = x.clone()
    written = syn.condition(x, first, actions)
    assert torch.equal(x, before)
    assert torch.equal(written[:, 0, :3], first) and torch.equal(written[..., 3:], actions)
    assert torch.equal(written[:, 1:, :3], x[:, 1:, :3])
    written.zero_()
    assert first.any() and actions.any()


# ------------------------------------------------------------------ filters


def test_the_softmax_filter_includes_with_the_probabilities_of_drawing_without_replacement() -> None:
    """Oracle 13. Two of three are kept with the first's probability, and as the second after each other one."""
    returns = torch.tensor([0.0, 1.0, 2.0])
    log_p = {t: syn.filter_log_probs(returns, temperature=t, floor=0.0) for t in (1.0, 0.5)}
    p, sharp = (log_p[t].exp() for t in (1.0, 0.5))
    assert p.dtype == torch.float64 and p.tolist() == printed("0.062556 0.212896 0.724548")
    assert (log_p[1.0] - log_p[1.0][1]).tolist() == printed("-1.224743 0 1.224743"), "the z-scores"
    assert sharp.tolist() == printed("0.006815 0.078934 0.914251")
    included = p + p * (p / (1 - p)).sum() - p * p / (1 - p)
    assert included.tolist() == printed("0.244023 0.787104 0.968873") and float(included.sum()) == pytest.approx(2)

    draws = 400_000
    noise = gumbel(draws, 3)
    first = syn.keep_softmax(log_p[0.5], 1.1 / 3, noise).flatten().bincount(minlength=3) / draws
    kept = syn.keep_softmax(log_p[1.0], 2.1 / 3, noise)
    assert kept.shape == (draws, 2) and bool((kept[:, 0] < kept[:, 1]).all())
    frequencies = kept.flatten().bincount(minlength=3) / draws
    # Three deviations of a proportion p of n draws are 3 sqrt(p (1 - p) / n); the printed draws, of another seed, keep
    # within them too.
    for found, exact in ((first, sharp), (frequencies, included), (torch.tensor([0.2442, 0.7873, 0.9684]), included)):
        assert bool(((found - exact).abs() < 3 * (exact * (1 - exact) / draws).sqrt()).all())


def shapes() -> dict[str, Tensor]:
    """Returns at evenly spaced quantiles, so that a batch is typical."""
    share = (torch.arange(B, dtype=torch.float64) + 0.5) / B
    exponential = -torch.log1p(-share)
    # What stands out of the floor depends on the best: 3.1 deviations above the mean in the printed batch, where 2 %
    # are less than 1.07 below it.
    normal = torch.special.ndtri(share * torch.special.ndtr(torch.tensor(3.1, dtype=torch.float64)))
    return {"normal": normal, "left": 5 - exponential, "right": exponential}


@pytest.mark.parametrize(
    ("shape", "temperature", "deciles", "overlap"),
    [
        ("normal", 0.05, [0.68, 0.60, 0.59, 0.59, 0.59, 0.60, 0.59, 0.59, 0.59, 0.59], 0.61),
        ("normal", 0.2, [1, 1, 1, 1, 0.96, 0.65, 0.27, 0.08, 0.03, 0.02], None),
        ("normal", 1.0, [0.99, 0.93, 0.84, 0.74, 0.67, 0.57, 0.47, 0.37, 0.28, 0.16], None),
        ("left", 0.05, [1, 1, 1, 1, 1.00, 0.46, 0.14, 0.13, 0.13, 0.14], 0.91),
        ("right", 0.05, [0.6] * 10, 0.60),
    ],
)
def test_what_the_softmax_filter_keeps_depends_on_the_shape_of_the_returns(
    shape: str, temperature: float, deciles: list[float], overlap: float | None
) -> None:
    """Oracle 13. The printed batch is random and of an unknown seed: each of its deciles is off by about 0.01."""
    returns, draws = shapes()[shape][torch.randperm(B, generator=torch.Generator().manual_seed(0))], 400
    log_p = syn.filter_log_probs(returns, temperature=temperature)
    kept = syn.keep_softmax(log_p, ETA, gumbel(draws, B))
    assert kept.shape == (draws, 1228) and bool((kept.diff() > 0).all()), "none is drawn twice"
    found = torch.stack([syn.kept_by_decile(row, returns) for row in kept]).mean(0)
    assert found.tolist() == pytest.approx(deciles, abs=0.02)
    shared = torch.stack([syn.overlap_with_best(row, returns) for row in kept]).mean()
    assert overlap is None or float(shared) == pytest.approx(overlap, abs=0.01)


def test_only_the_best_of_normal_returns_stand_out_of_the_floor() -> None:
    """Oracle 13: those less than 1.07 deviations below the best, 2 % of a batch; the rest are all but equal."""
    returns = shapes()["normal"]
    reach = 0.05 * math.log(B / 1e-6)
    assert reach == digits("1.07")
    z = (returns - returns.mean()) / (returns.std(correction=0) + 1e-6)
    near = z > z.max() - reach
    p = syn.filter_log_probs(returns).exp()
    floor = 1e-6 / B
    assert near.double().mean().item() == digits("0.02")
    # Where the softmax itself is as large as the floor; its sum, 2.6 times its best term, is what 1.07 leaves out.
    above = p > 2 * floor
    assert bool((near | ~above).all()) and above.double().mean().item() == pytest.approx(0.02, abs=0.005)
    assert float(p[z < z.max() - 1.5].max()) == pytest.approx(floor, rel=2e-4)
    assert float(p.sum()) == pytest.approx(1)


def test_hardmax_keeps_all_that_reach_the_quantile() -> None:
    returns = shapes()["normal"]
    kept = syn.keep_hardmax(returns, ETA)
    assert len(kept) == 1229 and torch.equal(kept, kept.sort().values)
    assert returns[kept].min() > returns[torch.isin(torch.arange(B), kept, invert=True)].max()
    assert syn.overlap_with_best(kept, returns) == 1
    assert syn.kept_by_decile(kept, returns).tolist() == pytest.approx([1] * 6 + [0] * 4, abs=0.01)
    assert len(syn.keep_hardmax(torch.zeros(10), 0.1)) == 10, "ties are all kept"
    assert len(syn.keep_hardmax(returns, 1.0)) == B


def test_raw_sums_are_the_maximum_in_effect_and_impossible_ones_are_not_drawn() -> None:
    """In float32, and with torch.multinomial, the second of two draws of [1, 1e-50, 1e-60] is any of the two."""
    returns = torch.tensor([0.0, -115.13, -138.16, -1e4])
    log_p = syn.filter_log_probs(returns, temperature=1.0, floor=0.0, scale="raw")
    assert log_p.exp().tolist()[:3] == pytest.approx([1, 1e-50, 1e-60], rel=0.01)
    assert (syn.keep_softmax(log_p, 0.5, gumbel(200, 4)) == torch.tensor([0, 1])).all()
    log_p = syn.filter_log_probs(returns, floor=0.9999, scale="raw")
    even = syn.keep_softmax(log_p, 0.25, gumbel(2000, 4))
    assert (even.flatten().bincount(minlength=4) / 2000).tolist() == pytest.approx([0.25] * 4, abs=0.03)


def test_equal_returns_are_kept_evenly_and_gumbel_noise_has_its_moments() -> None:
    log_p = syn.filter_log_probs(torch.ones(100))
    assert log_p.exp().tolist() == pytest.approx([0.01] * 100)
    assert syn.keep_softmax(log_p, ETA, gumbel(5, 100)).shape == (5, 60)
    noise = gumbel(200_000)
    assert noise.dtype == torch.float64
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.std().item() == pytest.approx(math.pi / 6**0.5, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": 0.0}, "temperature"), ({"floor": 1.0}, "floor"), ({"scale": "log"}, "scale")],
)
def test_filters_refuse_what_makes_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        syn.filter_log_probs(torch.zeros(4), **options)
    with pytest.raises(ConfigError, match="share to keep"):
        syn.keep_softmax(torch.zeros(4), 0.0, gumbel(4))


# ------------------------------------------------------------------ ends, returns, storing


def test_termination_at_state_j_leaves_j_transitions_of_which_the_last_is_done() -> None:
    h = 100
    done = torch.zeros(h, h - 1, dtype=torch.bool)
    for j in range(1, h):
        done[j, j - 1] = True  # trajectory j ends in state j, trajectory 0 does not end
        done[j, j:] = torch.rand(h - 1 - j) < 0.5  # what a model says of later states means nothing
    index = torch.arange(h, dtype=torch.float32)
    states = (1000 * index[:, None] + index)[..., None]
    cut = syn.cut_transitions(states, states + 0.25, states[..., 0] + 0.5, done)
    trajectory, step = cut.obs[:, 0].div(1000, rounding_mode="floor"), cut.obs[:, 0] % 1000
    assert trajectory.long().bincount().tolist() == [h - 1, *range(1, h)]
    assert torch.equal(cut.next_obs, cut.obs + 1) and torch.equal(cut.action, cut.obs + 0.25)
    assert torch.equal(cut.reward, cut.obs[:, 0] + 0.5)
    assert torch.equal(cut.done == 1, (trajectory > 0) & (step == trajectory - 1))


def test_a_refresh_of_published_size_stores_121572_transitions() -> None:
    h = 100
    returns = shapes()["normal"]
    kept = syn.keep_softmax(syn.filter_log_probs(returns), ETA, gumbel(B))
    states = torch.zeros(B, h, 2)[kept]
    cut = syn.cut_transitions(states, states[..., :1], states[..., 0], torch.zeros(len(kept), h - 1, dtype=torch.bool))
    assert {len(part) for part in cut} == {121_572}


def test_returns_count_no_reward_in_a_terminal_state_or_later() -> None:
    reward = torch.tensor([[1.0, 2, 4, 8], [1, 2, 4, 8], [1, 2, 4, 8], [1, 2, math.nan, 8]])
    done = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 1], [0, 1, 1]]).bool()
    assert syn.trajectory_returns(reward, done).tolist() == [15, 3, 1, 3]
    assert syn.trajectory_returns(reward[:3], None).tolist() == [15, 15, 15]


def test_parts_of_different_lengths_are_refused() -> None:
    x = torch.zeros(2, 5, 3)
    with pytest.raises(ConfigError, match=r"done \(B, H - 1\)"):
        syn.cut_transitions(x, x, x[..., 0], torch.zeros(2, 5, dtype=torch.bool))


# ------------------------------------------------------------------ scales and models that synthesis stands on


def test_scales_come_back_and_the_model_s_ends_at_the_data() -> None:
    torch.manual_seed(0)
    rows = 5 * torch.randn(1000, 4) + 3
    limits, zscores = fit_normalizer("limits", rows), fit_normalizer("gaussian", rows)
    for normalizer in (limits, zscores):
        back = normalizer.unnormalize(normalizer.normalize(rows))
        assert ((back - rows).abs() / rows.abs().amax(0)).max() < 1e-6
    scaled = limits.normalize(rows)
    assert torch.equal(scaled.amin(0), -torch.ones(4)) and torch.equal(scaled.amax(0), torch.ones(4))
    assert torch.equal(limits.unnormalize(torch.full((4,), 1.5)), limits.unnormalize(torch.ones(4)))
    torch.testing.assert_close(limits.unnormalize(torch.full((4,), 1.5)), rows.amax(0), rtol=2e-7, atol=0)
    z = zscores.normalize(rows)
    assert z.mean(0).abs().max() < 1e-6 and (z.std(0, correction=0) - 1).abs().max() < 1e-6


def test_two_members_with_means_0_and_2_and_variances_1_and_3_have_variance_3() -> None:
    model = WorldModel(1, 1, members=2, elites=2, layers=0, reward_low=0.0, reward_high=1.0).double()
    torch.nn.init.constant_(model.transition.logvar_low, -60.0)
    torch.nn.init.constant_(model.transition.logvar_high, 60.0)
    layer = model.transition.net.layers[0]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias[:, 0] = torch.tensor([[0.0, math.log(1)], [2.0, math.log(3)]])
    mean, var = model.mean_var(torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))
    assert mean.flatten().tolist() == pytest.approx([1] * 3) and var.flatten().tolist() == pytest.approx([3] * 3)


@pytest.mark.parametrize(
    ("error", "logvar", "true"),
    [(1.0, 0.0, "1.418939"), (1.0, math.log(2), "1.515512"), (0.1, -2.0, "-0.044116"), (0.0, 0.0, "0.918939")],
)
def test_the_model_s_log_density_is_the_gaussian_one(error: float, logvar: float, true: str) -> None:
    """Oracle 15."""
    model = WorldModel(1, 1, members=1, elites=1, layers=0, variance_floor=0.0, reward_low=0.0, reward_high=1.0)
    model = model.double()
    torch.nn.init.constant_(model.transition.logvar_low, -60.0)
    torch.nn.init.constant_(model.transition.logvar_high, 60.0)
    layer = model.transition.net.layers[0]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias[:, 0] = torch.tensor([[0.0, logvar]])
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert -model.log_prob(zero, zero, zero + error).item() == digits(true)
    # For a fixed error e the loss is least where the variance is e^2.
    if error > 0:
        model.logvar_penalty, losses = 0.0, []
        for shift in (-0.01, 0.0, 0.01):
            with torch.no_grad():
                layer.bias[:, 0, 1] = math.log(error**2) + shift
            losses.append(model.transition_loss(zero[None], zero[None], zero[None] + error).item())
        assert losses[1] == pytest.approx(1 + math.log(error**2)) and losses[1] < min(losses[0], losses[2])


# ------------------------------------------------------------------ theory


@pytest.mark.parametrize("seed", range(10))
def test_the_bounds_hold_on_random_decision_processes(seed: int) -> None:
    """Oracle 19, Lemmas 1 and 2 and Theorem 1: 6 states, 2 actions, a model that is nine tenths right.

    The seed of the printed process is unknown; any must satisfy the inequalities.
    """
    g = torch.Generator().manual_seed(seed)
    n, m, gamma = 6, 2, 0.9

    def distributions(*shape: int) -> Tensor:
        x = torch.rand(*shape, generator=g, dtype=torch.float64)
        return x / x.sum(-1, keepdim=True)

    real, policy = distributions(n, m, n), distributions(n, m)
    model = 0.9 * real + 0.1 * distributions(n, m, n)
    reward = 2 * torch.rand(n, m, generator=g, dtype=torch.float64) - 1
    r_max = reward.abs().max().item()
    p = p_model = start = distributions(n)
    step_error = 0.5 * (real - model).abs().sum(-1)  # D_TV for each state and action
    eps_m, distances = 0.0, []
    for _ in range(400):
        distances.append(0.5 * (p - p_model).abs().sum().item())
        eps_m = max(eps_m, torch.einsum("s,sa,sa->", p, policy, step_error).item())
        p = torch.einsum("s,sa,sax->x", p, policy, real)
        p_model = torch.einsum("s,sa,sax->x", p_model, policy, model)
    assert distances[0] == 0 and 0 < distances[1] <= eps_m
    assert all(d <= t * eps_m for t, d in enumerate(distances)), "Lemma 2"

    def value(dynamics: Tensor) -> Tensor:
        """The return, exactly: r (1 - gamma P)^-1 from the start."""
        chain, pay = torch.einsum("sa,sax->sx", policy, dynamics), (policy * reward).sum(1)
        return start @ torch.linalg.solve(torch.eye(n, dtype=torch.float64) - gamma * chain, pay)

    eps_d = max(distances)
    gap = (value(real) - value(model)).abs().item()
    lemma, theorem = bounds(eps_m, eps_d, r_max, gamma)
    # The states at t = 0 are exact, so that the theorem holds with a factor gamma too.
    assert 0 < gap <= gamma * theorem < theorem <= lemma


def bounds(eps_m: float, eps_d: float, r_max: float, gamma: float) -> tuple[float, float]:
    """Lemma 1 and Theorem 1: how far returns in a model may be off."""
    return 2 * gamma * r_max * eps_m / (1 - gamma) ** 2, 2 * r_max * eps_d / (1 - gamma)


def test_the_printed_bounds_are_those_of_the_printed_errors() -> None:
    """Oracle 19: 11.6 of eps_m 0.0711 and 0.386 of eps_d 0.0212, by one largest reward; the theorem's t = 0 counts."""

    def rewards(bound: float, unit: float, error: float, share: float) -> tuple[float, float]:
        """Least and greatest largest reward, by the rounding of bound and error and what a reward of 1 gives."""
        return (bound - unit / 2) / (share * (error + 5e-5)), (bound + unit / 2) / (share * (error - 5e-5))

    lemma, theorem = bounds(1.0, 1.0, 1.0, 0.9)
    by_lemma = rewards(11.6, 0.1, 0.0711, lemma)
    by_theorem = rewards(0.386, 0.001, 0.0212, theorem)
    assert max(by_lemma[0], by_theorem[0]) < min(by_lemma[1], by_theorem[1])
    assert rewards(0.386, 0.001, 0.0212, 0.9 * theorem)[0] > 1 > by_lemma[1], "not without it"
    assert lemma / theorem == pytest.approx(9)
    assert bounds(1.0, 1.0, 1.0, 0.99)[0] / bounds(1.0, 1.0, 1.0, 0.99)[1] == pytest.approx(99)


@pytest.mark.parametrize(
    ("contraction", "beta", "errors", "limit"),
    [
        (0.5, 1.0, "10 6 4 3 2.5 2.25", 2.0),
        (0.5, 0.5, "10 8 6.5 5.375 4.531 3.898", 2.0),
        (0.8, 1.0, "10 9 8.2 7.56 7.048", 5.0),
    ],
)
def test_errors_of_correction_rounds_fall_to_the_known_limit(
    contraction: float, beta: float, errors: str, limit: float
) -> None:
    """Oracle 19, Eq. 17: from H eps_m = 10 with eps_d = 1."""
    e, found = torch.tensor([10.0], dtype=torch.float64), []
    for _ in range(200):
        found.append(e.item())
        e = syn.correct(e, 1 + contraction * e, beta)
    assert found[: len(errors.split())] == printed(errors)
    assert found[-1] == pytest.approx(limit)
    if beta == 1:
        closed = [(1 - contraction**m) / (1 - contraction) + contraction**m * 10 for m in range(200)]
        assert found == pytest.approx(closed)
    else:
        rates = [(b - limit) / (a - limit) for a, b in pairwise(found[:20])]
        assert rates == pytest.approx([1 - beta * (1 - contraction)] * 19)
