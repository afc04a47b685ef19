"""Guidance and its rescaling: signs, lengths, and what rescaling does to a known law."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closed_forms import F64, GAUSSIAN, SDE, column, time
from torch import Tensor, nn

from lit_diffrl.diffusion.dpm_vp import sample_dpm_vp
from lit_diffrl.diffusion.energy_guidance import gradient_of, guide, guided_eps
from lit_diffrl.errors import ConfigError

RESCALED: list[Any] = [True, "sample", "batch", "term"]


def pair(rows: int = 6, size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    eps, grad = torch.randn(2, rows, size, generator=generator, dtype=F64)
    return eps, grad


def test_guidance_subtracts_the_energys_gradient_times_sigma() -> None:
    eps, grad = pair()
    guided = guide(lambda x, t: eps, lambda x, t: grad, SDE, 1.7)(torch.zeros_like(eps), time(0.3))
    torch.testing.assert_close(guided - eps, -1.7 * SDE.sigma(0.3) * grad, rtol=1e-12, atol=1e-12)


def test_guidance_up_a_value_moves_actions_up() -> None:
    means = []
    for omega in (0.0, 0.5, 1.0, 3.0):
        model = guide(GAUSSIAN.eps, gradient_of(lambda x, t: GAUSSIAN.energy(x, t, 1.0, 1.5)), SDE, omega)
        means.append(sample_dpm_vp(model, column(-1.0, 0.0, 1.0), SDE).mean().item())
    assert means == sorted(means) and means[1] - means[0] > 0.1


@pytest.mark.parametrize("rescale", [False, *RESCALED])
def test_a_degree_for_each_row_is_that_of_the_row(rescale: Any) -> None:
    eps, grad = pair(4)
    scale = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=F64)
    rows = guided_eps(eps, grad, 0.7, scale, rescale)
    degrees = enumerate(scale.tolist())
    plain = torch.cat([guided_eps(eps[i : i + 1], grad[i : i + 1], 0.7, omega) for i, omega in degrees])
    if rescale == "batch":  # whose length is that of all rows together
        torch.testing.assert_close(rows, plain * (eps.norm() / plain.norm()))
        return
    for i, omega in enumerate(scale.tolist()):
        torch.testing.assert_close(rows[i : i + 1], guided_eps(eps[i : i + 1], grad[i : i + 1], 0.7, omega, rescale))
    with_actions = guided_eps(eps[:, None].expand(-1, 5, -1), grad[:, None].expand(-1, 5, -1), 0.7, scale, rescale)
    torch.testing.assert_close(with_actions[:, 2], rows)


@pytest.mark.parametrize("omega", [0.3, 5.0])
def test_rescaling_keeps_the_length_and_the_guided_direction(omega: float) -> None:
    eps, grad = pair()
    plain = guided_eps(eps, grad, 0.7, omega)
    for rescale in ("sample", True):
        rescaled = guided_eps(eps, grad, 0.7, omega, rescale)
        torch.testing.assert_close(rescaled.norm(dim=-1), eps.norm(dim=-1), rtol=1e-7, atol=0)
        torch.testing.assert_close(torch.cosine_similarity(rescaled, plain), torch.ones(6, dtype=F64))
    batch = guided_eps(eps, grad, 0.7, omega, "batch")
    torch.testing.assert_close(batch.norm(), eps.norm(), rtol=1e-7, atol=0)
    torch.testing.assert_close(batch / plain, torch.full_like(plain, (batch / plain)[0, 0].item()))
    term = guided_eps(eps, grad, 0.7, omega, "term") - eps
    torch.testing.assert_close(term.norm(dim=-1), omega * eps.norm(dim=-1), rtol=1e-7, atol=0)
    torch.testing.assert_close(torch.cosine_similarity(term, -grad), torch.ones(6, dtype=F64))


@pytest.mark.parametrize("rescale", RESCALED)
def test_degree_zero_changes_nothing(rescale: Any) -> None:
    eps, grad = pair()
    torch.testing.assert_close(guided_eps(eps, grad, 0.7, 0.0, rescale), eps, rtol=1e-7, atol=1e-9)

    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("degree 0 needs no gradient")

    assert torch.equal(guide(lambda x, t: eps, never, SDE, 0.0, rescale)(eps, time(0.5)), eps)


@pytest.mark.parametrize("rescale", RESCALED)
def test_a_score_that_vanishes_makes_no_nan(rescale: Any) -> None:
    eps, grad = pair()
    for a, b in ((eps, eps / 0.7), (torch.zeros_like(eps), grad), (eps, torch.zeros_like(grad))):
        assert guided_eps(a, b, 0.7, 1.0, rescale).isfinite().all()


def test_no_guidance_after_the_last_guided_time() -> None:
    eps, grad = pair()
    model = guide(lambda x, t: eps, lambda x, t: grad, SDE, 1.0, t_max=0.6)
    assert torch.equal(model(eps, time(0.61)), eps)
    assert not torch.equal(model(eps, time(0.6)), eps)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_gradient_works_without_gradients_and_leaves_those_of_weights_alone(mode: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))
    with mode():
        x, t = torch.randn(5, 3), torch.full((1,), 0.5)
        grad = gradient_of(lambda x, t: net(x)[:, 0] * t)(x, t)
    assert grad.shape == x.shape and not x.requires_grad and not grad.requires_grad
    assert all(p.grad is None for p in net.parameters())
    x = x.clone().requires_grad_()
    net(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(grad, 0.5 * x.grad)


# omega: mean of the first action, plain and rescaled; standard deviations of both actions, rescaled
RESCALING = [(0.5, 0.252, 0.130, 0.500, 0.491), (1, 0.501, 0.273, 0.518, 0.484), (2, 1.000, 0.625, 0.609, 0.474)]
RESCALING += [(5, 2.495, 1.924, 1.035, 0.490), (20, 9.970, 8.871, 2.868, 0.625)]


def test_rescaling_preserves_no_distribution() -> None:
    """Data N(0, I / 4) of two actions and ``Q = 2 a_1``: half of the shift is lost, and the spread changes."""

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return SDE.sigma(t) * x / (0.25 * SDE.alpha(t) ** 2 + SDE.sigma(t) ** 2)

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        slope = 0.5 * SDE.alpha(t) / (0.25 * SDE.alpha(t) ** 2 + SDE.sigma(t) ** 2)
        return slope * torch.tensor([1.0, 0.0], dtype=F64).expand_as(x)

    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    for omega, plain, mean, *stds in RESCALING:
        x = sample_dpm_vp(guide(eps, gradient, SDE, omega), noise, SDE, steps=200, order=1)
        assert x[:, 0].mean().item() == pytest.approx(plain, abs=0.02)
        x = sample_dpm_vp(guide(eps, gradient, SDE, omega, True), noise, SDE, steps=200, order=1)
        assert x[:, 0].mean().item() == pytest.approx(mean, abs=0.02)
        assert x.std(0).tolist() == pytest.approx(stds, abs=0.02)


@pytest.mark.parametrize(("omega", "plain", "rescaled", "std"), [(1, 0.774, 0.501, 0.52), (5, 0.9999, 0.503, 1.16)])
def test_with_one_action_rescaling_moves_no_mass_across_the_median(
    omega: float, plain: float, rescaled: float, std: float
) -> None:
    gradient = gradient_of(lambda x, t: GAUSSIAN.energy(x, t, 1.0, 1.5))
    noise = torch.special.ndtri((torch.arange(20_000, dtype=F64) + 0.5) / 20_000)[:, None]
    for rescale, above in ((False, plain), (True, rescaled)):
        x = sample_dpm_vp(guide(GAUSSIAN.eps, gradient, SDE, omega, rescale), noise, SDE, steps=200, order=1)
        assert (x > 0.2).double().mean().item() == pytest.approx(above, abs=0.01)
    assert x.std().item() == pytest.approx(std, abs=0.02)


def test_an_unknown_rescaling_is_refused() -> None:
    with pytest.raises(ConfigError, match="rescale must be one of"):
        guide(GAUSSIAN.eps, lambda x, t: x, SDE, rescale="rows")  # type: ignore[arg-type]
