"""Behaviour and energy networks: published sizes, fast paths equal to plain ones, the written-out gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffrl.errors import ConfigError
from lit_diffrl.nets.energy import BehaviourNet, EnergyNet, FourierTime

ROWS, STATES, ACTIONS = 6, 5, 3


def inputs(dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, 4, ACTIONS, dtype=dtype), torch.randn(rows, STATES, dtype=dtype)


def close(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-11}


def published_noise(net: BehaviourNet, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
    """The network as the paper's code lays it out: each block with its own maps, one row after the other."""

    def part(layer: nn.Module, rows: slice) -> Any:
        return lambda h: h @ layer.weight[rows].t() + layer.bias[rows]

    embedded = torch.cat([net.time(t), F.silu(net.obs(obs))], dim=-1)
    e = F.silu(net.embed(embedded))
    conditions = dict(zip(net.blocks, (e @ net.condition.weight.t() + net.condition.bias).split(net.widths, dim=-1)))

    def block(module: Any, h: Tensor) -> Tensor:
        width = module.outer.out_features
        first, skip = part(module.inner, slice(0, width)), part(module.inner, slice(width, None))
        h1 = F.silu(first(h)) + conditions[module]
        h2 = F.silu(module.outer(h1))
        return h2 + (h if module.same else skip(h))

    down1, down2, down3, middle, up2, up1 = net.blocks
    d1 = block(down1, x)
    d2 = block(down2, d1)
    d3 = block(down3, d2)
    u2 = block(up2, torch.cat([d3, block(middle, d3)], dim=-1))
    u1 = block(up1, torch.cat([d2, u2], dim=-1))
    return net.head(torch.cat([d1, u1], dim=-1))  # type: ignore[no-any-return]


def test_blocks_are_those_of_the_published_network() -> None:
    net = BehaviourNet(STATES, ACTIONS, width=16).double()
    x, obs = inputs(torch.float64)
    t = torch.rand(ROWS, dtype=torch.float64)
    torch.testing.assert_close(net(x[:, 0], t, obs), published_noise(net, x[:, 0], t, obs))


def test_sizes_are_the_published_ones() -> None:
    net = BehaviourNet(17, 6)
    assert net.widths == [512, 256, 128, 128, 256, 512]
    # by hand: three blocks down, the middle, two up, the conditions, the embeddings and the head
    blocks = [(6, 512), (512, 256), (256, 128), (128, 128), (256, 256), (512, 512)]
    expected = sum((i + 1) * o + (o + 1) * o + ((i + 1) * o if i != o else 0) + (128 + 1) * o for i, o in blocks)
    expected += (32 + 1) * 32 + (17 + 1) * 32 + (64 + 1) * 128 + (128 + 1) * 128 + (1024 + 1) * 6
    assert sum(p.numel() for p in net.parameters()) == expected
    energy = EnergyNet(17, 6, layers=4)
    assert sum(p.numel() for p in energy.parameters()) == 33 * 32 + 56 * 256 + 3 * 257 * 256 + 257


def test_time_is_embedded_by_fixed_frequencies_that_are_saved() -> None:
    torch.manual_seed(0)
    time = FourierTime()
    assert {name for name, _ in time.named_parameters()} == {"linear.weight", "linear.bias"}
    assert "frequencies" in time.state_dict() and time.frequencies.shape == (16,)
    many = FourierTime(4096)
    assert many.frequencies.std().item() == pytest.approx(30, rel=0.05)
    t = torch.tensor([0.0, 0.25])
    angle = 2 * math.pi * t[:, None] * time.frequencies
    torch.testing.assert_close(time(t), time.linear(torch.cat([angle.sin(), angle.cos()], dim=-1)))

    copy = BehaviourNet(STATES, ACTIONS, width=8)  # drawn anew
    net = BehaviourNet(STATES, ACTIONS, width=8)
    copy.load_state_dict(net.state_dict())
    x, obs = inputs(torch.float32)
    torch.testing.assert_close(copy(x, t[1:], obs), net(x, t[1:], obs), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("width", "rows"), [(16, ROWS), (512, 80), (64, 300)])  # the last in blocks
def test_noise_of_shared_times_and_states_is_that_of_each_row(dtype: torch.dtype, width: int, rows: int) -> None:
    x, obs = inputs(dtype, rows)
    net, t = BehaviourNet(STATES, ACTIONS, width).to(dtype), torch.tensor([0.37], dtype=dtype)
    plain = torch.stack([net(x[:, i], t.expand(rows), obs) for i in range(4)], dim=1)
    torch.testing.assert_close(net(x, t, obs), plain, **close(dtype))
    torch.testing.assert_close(net(x, t.expand(rows), obs), plain, **close(dtype))
    for times in ((), (1.0, 0.37), (0.5,)):
        torch.testing.assert_close(net.given(obs, times)(x, t), plain, **close(dtype))
    torch.testing.assert_close(net.given(obs, [0.37])(x[:, 0], t), plain[:, 0], **close(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["silu", "mish", "relu"])
@pytest.mark.parametrize(("hidden", "layers", "rows"), [(16, 1, ROWS), (16, 3, ROWS), (256, 4, 80)])
def test_the_written_out_gradient_is_autograds(
    dtype: torch.dtype, activation: str, hidden: int, layers: int, rows: int
) -> None:
    x, obs = inputs(dtype, rows)
    net, t = EnergyNet(STATES, ACTIONS, hidden, layers, activation).to(dtype), torch.tensor([0.37], dtype=dtype)
    x.requires_grad_()
    energy = net(x, t, obs)
    assert energy.shape == (rows, 4)
    torch.testing.assert_close(energy[:, 2], net(x[:, 2], t.expand(rows), obs), **close(dtype))
    (exact,) = torch.autograd.grad(energy.sum(), x)
    for times in ((), (1.0, 0.37)):
        found = net.gradient(obs, times)(x, t)
        assert found.dtype == dtype and not found.requires_grad
        torch.testing.assert_close(found, exact, **close(dtype))
    torch.testing.assert_close(net.gradient(obs)(x[:, 1], t), exact[:, 1], **close(dtype))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_gradient_works_in_every_mode_and_touches_no_weight(mode: Any) -> None:
    net = EnergyNet(STATES, ACTIONS, hidden=16)
    x, obs = inputs(torch.float32)
    t = torch.tensor([0.37])
    expected = net.gradient(obs)(x, t)
    with mode():
        torch.testing.assert_close(net.gradient(obs.clone(), [0.37])(x.clone(), t.clone()), expected)
    assert all(p.grad is None for p in net.parameters())


def test_the_gradient_follows_weights_that_change() -> None:
    """What is prepared for a state is prepared anew at each decision, not kept with the network."""
    net = EnergyNet(STATES, ACTIONS, hidden=16)
    x, obs = inputs(torch.float32)
    t = torch.tensor([0.37])
    before = net.gradient(obs, [0.37])(x, t)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    assert not torch.allclose(net.gradient(obs, [0.37])(x, t), before, rtol=0.05)


def test_one_state_and_one_action_keep_their_axes() -> None:
    energy, noise = EnergyNet(STATES, 1, hidden=8), BehaviourNet(STATES, 1, width=8)
    x, t, obs = torch.randn(1, 1, 1), torch.rand(1), torch.randn(1, STATES)
    assert energy(x, t, obs).shape == (1, 1) and energy(x[:, 0], t, obs).shape == (1,)
    assert noise(x, t, obs).shape == (1, 1, 1) and noise(x[:, 0], t, obs).shape == (1, 1)
    assert energy.gradient(obs)(x, t).shape == (1, 1, 1)


def test_energies_are_single_precision_under_autocast() -> None:
    net = EnergyNet(STATES, ACTIONS, hidden=16)
    x, obs = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        energy = net(x, torch.rand(ROWS), obs)
    assert energy.dtype == torch.float32 and energy.isfinite().all()


def test_large_energies_keep_the_differences_between_them_under_autocast() -> None:
    torch.manual_seed(0)
    net = EnergyNet(STATES, ACTIONS, hidden=32)
    with torch.no_grad():
        net.net[-1].bias.fill_(300.0)
    x, obs, t = torch.randn(64, ACTIONS), torch.randn(64, STATES), torch.rand(64)
    plain = net(x, t, obs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(x, t, obs)
    assert 0 < float((mixed - plain).abs().max()) < 0.05 * float(plain.std())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: BehaviourNet(STATES, ACTIONS, width=10), "width"),
        (lambda: EnergyNet(STATES, ACTIONS, activation="selu"), "activation"),
        (lambda: EnergyNet(STATES, ACTIONS, layers=0), "hidden layers"),
        (lambda: EnergyNet(STATES, ACTIONS, time_dim=7), "embedding size"),
        (lambda: FourierTime(8, scale=0.0), "scale"),
    ],
)
def test_sizes_out_of_range_are_named(make: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()
