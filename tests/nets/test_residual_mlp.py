from __future__ import annotations

import io

import pytest
import torch
from printed import printed
from torch import nn

from lit_diffrl.errors import ConfigError
from lit_diffrl.nets.ema import EMA, half_life_decay
from lit_diffrl.nets.embeddings import FourierEmbedding
from lit_diffrl.nets.residual_mlp import ResidualDenoiser
from lit_diffrl.nets.unet import TemporalUNet


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("dim", "width", "count"),
    [(27, 2048, 25_520_027), (42, 2048, 25_552_682), (27, 1024, 6_479_771), (42, 1024, 6_497_066)],
)
def test_synthers_denoiser_has_as_many_parameters_as_the_published_one(dim: int, width: int, count: int) -> None:
    with torch.device("meta"):
        assert parameters(ResidualDenoiser(dim, width)) == count


@pytest.mark.parametrize(("dim", "count"), [(14, 58_751_246), (23, 58_759_319), (6, 58_744_070)])
def test_dydiffs_denoiser_has_as_many_parameters_as_the_published_one(dim: int, count: int) -> None:
    with torch.device("meta"):
        assert parameters(TemporalUNet(dim, dim=128, mults=(1, 4, 8))) == count


@pytest.mark.parametrize("horizon", [32, 100, 97, 102])
def test_dydiffs_denoiser_takes_noise_levels_of_each_row_or_of_all_and_any_horizon(horizon: int) -> None:
    """The published network takes multiples of 4 only; this one lengthens others inside (test_unet)."""
    torch.manual_seed(0)
    net, x = TemporalUNet(5, dim=8, mults=(1, 4, 8)), torch.randn(3, horizon, 5)
    level = torch.tensor([-0.3])
    assert net(x, level).shape == x.shape
    torch.testing.assert_close(net(x, level), net(x, level.expand(3)))


def test_level_and_data_change_the_output_row_by_row_and_every_parameter_is_used() -> None:
    torch.manual_seed(0)
    net, x = ResidualDenoiser(6, 32, depth=3, embed=16), torch.randn(5, 6)
    level = torch.linspace(-1.5, 1.1, 5)
    out = net(x, level)
    assert out.shape == x.shape
    torch.testing.assert_close(net(x, level[:1]), net(x, level[:1].expand(5)))
    torch.testing.assert_close(net(x[2:3], level[2:3]), out[2:3])
    assert not torch.allclose(net(x, level + 0.1), out) and not torch.allclose(net(x + 0.1, level), out)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_random_frequencies_are_saved_with_the_network() -> None:
    net, file = ResidualDenoiser(6, 32, depth=1), io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other, x, level = ResidualDenoiser(6, 32, depth=1), torch.randn(4, 6), torch.tensor([0.4])
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(net(x, level), other(x, level))
    embedding = FourierEmbedding()
    assert embedding.dim == 17 and embedding(level).shape == (1, 17)
    turned = embedding(level + 1 / embedding.frequencies[3])
    torch.testing.assert_close(turned[:, [4, 12]], embedding(level)[:, [4, 12]], atol=1e-5, rtol=0)


def test_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="denoiser.width"):
        ResidualDenoiser(6, 0)


def test_an_average_with_a_rising_half_life_has_the_published_decays() -> None:
    decays = [half_life_decay(seen, 8) for seen in (100_000, 1_000_000, 4_000_000)]
    assert decays == printed("0.998892 0.999889 0.999972")
    assert half_life_decay(10_000_000, 8) == half_life_decay(40_000_000, 8), "half-life beyond its limit"
    assert half_life_decay(0, 8) == 0


def test_an_average_takes_a_decay_that_changes_from_step_to_step() -> None:
    net = nn.Linear(1, 1, bias=False)
    ema = EMA(net, every=1, start=0)
    expected = float(net.weight)
    for decay in (0.0, 0.5, 0.9):
        nn.init.constant_(net.weight, 1 + decay)
        ema.update(net, decay)
        expected = decay * expected + (1 - decay) * (1 + decay)
        assert float(ema.net.weight) == pytest.approx(expected)
