"""Normalisers: oracle 29 of the planners' specification."""

from __future__ import annotations

import math

import pytest
import torch

from lit_diffrl.data.normalizers import (
    GaussianNormalizer,
    IdentityNormalizer,
    LimitsNormalizer,
    fit_normalizer,
    normalizer_from_state,
)
from lit_diffrl.errors import ConfigError


@pytest.fixture
def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(500, 4, generator=generator) * torch.tensor([1.0, 20.0, 0.01, 3.0]) + torch.tensor(
        [0.0, 5.0, -0.3, 100.0]
    )


@pytest.mark.parametrize("kind", ["gaussian", "limits", "none"])
@pytest.mark.parametrize("shape", [(4,), (500, 4), (5, 100, 4), (5, 10, 10, 4)])
def test_round_trip(kind, shape, rows):
    normalizer = fit_normalizer(kind, rows)
    x = rows[: math.prod(shape[:-1])].reshape(shape)
    back = normalizer.unnormalize(normalizer.normalize(x))
    assert back.shape == x.shape
    # 1e-5 of the normalised scale: a deviation, or half a range
    assert torch.allclose(normalizer.normalize(back), normalizer.normalize(x), atol=1e-5)
    assert torch.allclose(back, x, rtol=1e-5, atol=1e-5)


def test_gaussian_has_mean_0_and_population_deviation_1(rows):
    x = fit_normalizer("gaussian", rows).normalize(rows)
    assert torch.allclose(x.mean(0), torch.zeros(4), atol=1e-4)
    assert torch.allclose(x.std(0, correction=0), torch.ones(4), atol=1e-4)
    assert GaussianNormalizer.fit(torch.tensor([[0.0], [2.0]])).std.item() == 1.0


def test_gaussian_does_not_clip(rows):
    normalizer = fit_normalizer("gaussian", rows)
    far = torch.full((4,), 50.0)
    assert torch.allclose(normalizer.normalize(normalizer.unnormalize(far)), far, rtol=1e-4)


def test_limits_map_least_and_greatest_values_to_the_ends(rows):
    normalizer = fit_normalizer("limits", rows)
    x = normalizer.normalize(rows)
    assert torch.allclose(x.amin(0), -torch.ones(4)) and torch.allclose(x.amax(0), torch.ones(4))
    assert (normalizer.normalize(rows * 3).abs() > 1).any(), "values beyond the data are not clipped on the way in"


def test_limits_clip_plans_on_the_way_back_row_by_row(rows):
    normalizer = fit_normalizer("limits", rows)
    plan = torch.tensor([[1.7, -9.0, 0.5, 1.00005], [0.1, 0.2, 0.3, 0.4]])
    raw = normalizer.unnormalize(plan)
    assert torch.equal(raw[0, :2], torch.stack([rows[:, 0].max(), rows[:, 1].min()]))
    assert bool(((raw >= rows.amin(0)) & (raw <= rows.amax(0))).all())
    assert torch.equal(raw[1], normalizer.unnormalize(plan[1])), "a row depends on its neighbours"


def test_none_leaves_values_as_they_are_and_its_state_is_its_name(rows):
    normalizer = fit_normalizer("none", rows)
    assert torch.equal(normalizer.normalize(rows), rows) and torch.equal(normalizer.unnormalize(rows * 50), rows * 50)
    assert normalizer.state() == {"kind": "none"}


@pytest.mark.parametrize("kind", ["gaussian", "limits"])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_constant_dimensions_stay_finite_and_come_back(kind, constant):
    x = torch.stack([torch.linspace(0, 1, 1001), torch.full((1001,), constant)], dim=1)
    normalizer = fit_normalizer(kind, x)
    y = normalizer.normalize(x)
    assert torch.isfinite(y).all() and y[:, 1].unique().numel() == 1
    assert torch.equal(normalizer.unnormalize(y)[:, 1], x[:, 1])
    assert normalizer.normalize(x + torch.tensor([0.0, 1.0]))[0, 1] - y[0, 1] in (1, 2), "divided by a rounding error"


@pytest.mark.parametrize("cls", [GaussianNormalizer, LimitsNormalizer, IdentityNormalizer])
def test_state_is_plain_and_rebuilds_the_same(cls, rows, tmp_path):
    normalizer = cls.fit(rows)
    torch.save(normalizer.state(), tmp_path / "state.pt")
    again = normalizer_from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert type(again) is cls and torch.equal(again.normalize(rows), normalizer.normalize(rows))
    assert all(isinstance(v, str | list) for v in normalizer.state().values())


def test_unknown_kinds_and_damaged_states_are_refused(rows):
    with pytest.raises(ConfigError, match="gausian.*did you mean 'gaussian'"):
        fit_normalizer("gausian", rows)
    damaged = ({"kind": "limits", "low": [0.0]}, {"kind": "limits", "low": "x"}, {"kind": "none", "low": [0.0]})
    for state in ({}, {"kind": "cdf", "low": [0.0]}, *damaged):
        with pytest.raises(ConfigError, match="saved normaliser"):
            normalizer_from_state(state)


@pytest.mark.parametrize("kind", ["gaussian", "limits", "none"])
def test_statistics_follow_the_tensors_to_their_device(kind, rows):
    # The meta device stands for an accelerator: mixing it with tensors of the CPU fails in the same way.
    assert fit_normalizer(kind, rows).normalize(rows.to("meta")).is_meta
    assert fit_normalizer(kind, rows).unnormalize(rows.to("meta")).is_meta


@pytest.mark.parametrize("kind", ["gaussian", "limits"])
def test_statistics_that_moved_while_acting_can_be_differentiated_later(kind: str, rows: torch.Tensor) -> None:
    normalizer = fit_normalizer(kind, rows)
    with torch.inference_mode():
        normalizer.normalize(torch.zeros(1, 4, device="meta"))
    moved = [x for x in vars(normalizer).values() if isinstance(x, torch.Tensor)]
    assert moved and all(x.device.type == "meta" and not x.is_inference() for x in moved)
