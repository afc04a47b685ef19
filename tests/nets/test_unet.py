from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_diffrl.errors import ConfigError
from lit_diffrl.nets.unet import Downsample, TemporalUNet, ValueUNet


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def small(**options: object) -> TemporalUNet:
    torch.manual_seed(0)
    return TemporalUNet(5, dim=8, mults=(1, 2, 4), **options)  # type: ignore[arg-type]


def inputs(batch: int, horizon: int, dim: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, horizon, dim), torch.randint(0, 20, (batch,))


@pytest.mark.parametrize(
    ("dim_in", "mults", "attention", "count"),
    [
        (14, (1, 2, 4, 8), False, 3_956_302),
        (23, (1, 2, 4, 8), False, 3_958_327),
        (23, (1, 4, 8), True, 4_114_423),
        (6, (1, 4, 8), False, 3_682_118),
    ],
    ids=["hopper", "walker2d", "halfcheetah", "maze2d"],
)
def test_unet_has_as_many_parameters_as_the_published_one(
    dim_in: int, mults: tuple[int, ...], attention: bool, count: int
) -> None:
    assert parameters(TemporalUNet(dim_in, mults=mults, attention=attention)) == count


@pytest.mark.parametrize(
    ("dim_in", "horizon", "mults", "count"),
    [
        (14, 32, (1, 2, 4, 8), 2_294_817),
        (23, 32, (1, 2, 4, 8), 2_296_545),
        (23, 4, (1, 4, 8), 2_180_833),
    ],
    ids=["hopper", "walker2d", "halfcheetah"],
)
def test_value_network_has_as_many_parameters_as_the_published_one(
    dim_in: int, horizon: int, mults: tuple[int, ...], count: int
) -> None:
    assert parameters(ValueUNet(dim_in, horizon, mults=mults)) == count


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("horizon", [1, 2, 4, 7, 32, 100, 265])
def test_output_has_the_shape_of_the_input_for_any_horizon(horizon: int, attention: bool) -> None:
    x, j = inputs(2, horizon)
    assert small(attention=attention)(x, j).shape == x.shape


@pytest.mark.parametrize("horizon", [5, 6, 7, 8])
def test_padding_repeats_the_last_row_and_is_cut_off(horizon: int) -> None:
    net = small()
    x, j = inputs(3, horizon)
    padded = torch.cat([x, x[:, -1:].expand(-1, 8 - horizon, -1)], dim=1)
    assert torch.equal(net(x, j), net(padded, j)[:, :horizon])


@pytest.mark.parametrize("attention", [False, True])
def test_rows_of_a_batch_do_not_interact(attention: bool) -> None:
    net = small(attention=attention).double()
    x, j = inputs(6, 12)
    order = torch.randperm(6)
    torch.testing.assert_close(net(x.double(), j)[order], net(x.double()[order], j[order]), rtol=0, atol=1e-12)
    value = ValueUNet(5, 12, dim=8, mults=(1, 4)).double()
    torch.testing.assert_close(value(x.double(), j)[order], value(x.double()[order], j[order]), rtol=0, atol=1e-12)


def test_step_index_changes_the_output() -> None:
    x, _ = inputs(1, 8)
    x = x.expand(3, -1, -1)
    value = ValueUNet(5, 8, dim=8, mults=(1, 4))
    for net in (small(), value):
        first, second, third = net(x, torch.tensor([0, 1, 1]))
        assert not torch.allclose(first, second)
        torch.testing.assert_close(second, third)


@pytest.mark.parametrize("attention", [False, True])
def test_every_parameter_is_used(attention: bool) -> None:
    x, j = inputs(4, 10)
    for net in (small(attention=attention), ValueUNet(5, 10, dim=8, mults=(1, 4))):
        net(x, j).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("horizon", [1, 4, 32, 100, 104, 128])
def test_value_network_accepts_every_horizon_and_returns_a_scalar_each(horizon: int) -> None:
    x, j = inputs(3, horizon)
    assert ValueUNet(5, horizon, dim=8, mults=(1, 2, 4))(x, j).shape == (3,)
    assert ValueUNet(5, horizon, dim=8, mults=(1, 2, 4), out_dim=2)(x, j).shape == (3, 2)


def test_value_network_refuses_another_horizon() -> None:
    x, j = inputs(3, 12)
    with pytest.raises(ConfigError, match="horizon 8 got 12 rows"):
        ValueUNet(5, 8, dim=8, mults=(1, 4))(x, j)


def test_networks_run_in_bfloat16() -> None:
    x, j = inputs(2, 10)
    for net in (small(attention=True), ValueUNet(5, 10, dim=8, mults=(1, 4))):
        reference = net(x, j)
        half = net.bfloat16()(x.bfloat16(), j)
        assert half.dtype == (torch.float32 if isinstance(net, ValueUNet) else torch.bfloat16)
        torch.testing.assert_close(half.float(), reference, rtol=0.1, atol=0.1)


def test_halving_a_single_row_is_the_convolution_and_its_gradient_defined_in_16_bits() -> None:
    """torch leaves some of the gradient of such a convolution unset in bfloat16: whatever lay in memory."""
    layer, x = Downsample(32), torch.randn(8, 32, 1)
    plain = nn.Conv1d(32, 32, 3, stride=2, padding=1)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x))
    plain(x).square().sum().backward()
    for _ in range(20):
        layer.zero_grad()
        rubbish = [torch.full((layer.weight.numel(),), float("nan")) for _ in range(8)]
        del rubbish
        with torch.autocast("cpu", torch.bfloat16):
            layer(x).float().square().sum().backward()
        for mine, exact in zip(layer.parameters(), plain.parameters()):
            torch.testing.assert_close(mine.grad, exact.grad, rtol=0.05, atol=1.0)


def test_large_values_keep_the_differences_between_them_under_autocast() -> None:
    torch.manual_seed(0)
    net = ValueUNet(5, 8, dim=32, mults=(1, 2))
    with torch.no_grad():
        net.head[-1].weight.mul_(100)
        net.head[-1].bias.fill_(1500.0)  # the returns that it learns are raw
        x, j = torch.randn(16, 8, 5), torch.zeros(16, dtype=torch.long)
        plain = net(x, j)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = net(x, j)
    assert mixed.dtype == torch.float32
    assert 0 < float((mixed - plain).abs().max()) < 0.1 * float(plain.std())


def test_widths_and_kernels_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"multiples of 8, got \[12, 24\]"):
        TemporalUNet(5, dim=12, mults=(1, 2))
    with pytest.raises(ConfigError, match="kernel must be an odd positive number, got 4"):
        TemporalUNet(5, kernel=4)
    with pytest.raises(ConfigError, match="multiple of 32, got 16"):
        ValueUNet(5, 8, dim=8, mults=(1, 2))
    with pytest.raises(ConfigError, match="horizon"):
        ValueUNet(5, 0)
