"""Weights that are prepared once give what weights give that are not, and follow every change."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from energy_learners import built
from torch import Tensor, nn

from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.methods import QGPO
from lit_diffrl.methods.diffusion_policy import DiffusionPolicy
from lit_diffrl.methods.policy_options import ActionSamplerOptions, NoiseNetOptions
from lit_diffrl.nets import linear as products
from lit_diffrl.nets.critics import TwinQ
from lit_diffrl.nets.energy import BehaviourNet, EnergyNet
from lit_diffrl.nets.linear import Linear, linear
from lit_diffrl.nets.noise_net import NoiseNet
from lit_diffrl.nets.prepared import in_long_region, once, prepared_once, rounded

OBS, ACTION, ROWS = 5, 3, 40


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def network(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    x, k, obs = torch.randn(ROWS, ACTION), torch.full((1,), 2.0), torch.randn(ROWS, OBS)
    net: nn.Module
    if name == "noise":
        net = NoiseNet(OBS, ACTION, hidden=64)
        return net, lambda: net.given(obs, [2.0])(x, k)
    if name == "behaviour":
        net = BehaviourNet(OBS, ACTION, width=64)
        return net, lambda: net.given(obs, [0.5])(x, k / 4)
    if name == "energy":
        net = EnergyNet(OBS, ACTION, hidden=64)
        return net, lambda: net.gradient(obs, [0.5])(x, k / 4)
    net = TwinQ(OBS, ACTION, hidden=64)
    return net, lambda: net(obs, x[:, None].expand(-1, 4, -1))


NETS = ("noise", "behaviour", "energy", "critics")


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[torch.layout]:
    """How the weights of oneDNN's products are laid out, product by product."""
    seen: list[torch.layout] = []
    product = products.ONEDNN

    def watched(x: Tensor, weight: Tensor, *others: object) -> Tensor:
        seen.append(weight.layout)
        return product(x, weight, *others)

    monkeypatch.setattr(products, "ONEDNN", watched)
    return seen


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_rounding_once_is_what_autocast_does_to_the_last_bit(name: str, mode: type) -> None:
    net, call = network(name)
    with bf16(), mode():
        plain = call()
        with prepared_once():
            assert torch.equal(call(), plain)
            assert torch.equal(call(), plain)
            with torch.no_grad():
                for weight in net.parameters():
                    weight.mul_(1.5)
            changed = call()
    with bf16(), mode():
        assert torch.equal(changed, call())
    assert not torch.equal(changed, plain)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.skipif(torch.bfloat16 not in products.PACKED, reason="this processor has no products in bfloat16")
def test_laid_out_weights_differ_by_the_order_of_sums_alone(name: str, layouts: list[torch.layout]) -> None:
    net, call = network(name)
    with torch.no_grad():
        exact = call()
        with bf16():
            plain = call()
            assert not layouts
            with prepared_once(long=True):
                found, again = call(), call()
                assert bool(layouts) == (name != "critics"), "whose layers are batched"
                assert all(layout == torch._mkldnn for layout in layouts)  # type: ignore[attr-defined]
                for weight in net.parameters():
                    weight.mul_(1.5)
                changed = call()
            fresh = call()
    assert torch.equal(found, again)
    error = float((plain - exact).abs().max())
    assert float((found - exact).abs().max()) < 2 * error
    assert float((changed - fresh).abs().max()) < 4 * error < float((changed - plain).abs().max())


@pytest.mark.skipif(torch.float32 not in products.PACKED, reason="torch has no such layout")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(512, 96), (4, 128, 96)])
def test_layouts_in_float32(
    bias: bool, shape: tuple[int, ...], layouts: list[torch.layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "FASTER", True)
    x, weight, shift = torch.randn(shape), parameter(80, 96), parameter(80) if bias else None
    expected = nn.functional.linear(x, weight, shift)
    with torch.inference_mode(), prepared_once(long=True):
        for _ in range(2):
            torch.testing.assert_close(linear(x, weight, shift), expected, rtol=1e-4, atol=1e-4)
    assert layouts == [torch._mkldnn] * 2  # type: ignore[attr-defined]


def test_made_once_in_a_region_and_again_after_a_change() -> None:
    weight, made = parameter(4, 4), list[Tensor]()

    def make(w: Tensor) -> Tensor:
        made.append(w)
        return w.bfloat16()

    def ask() -> Tensor | None:
        return once(weight, "rounded", torch.bfloat16, make)

    with torch.no_grad():
        assert ask() is None
        with prepared_once():
            first = ask()
            with prepared_once(long=True):
                assert ask() is first and in_long_region()
            assert ask() is first and not in_long_region()
            assert len(made) == 1
            weight.add_(1)
            assert torch.equal(ask(), weight.bfloat16())  # type: ignore[arg-type]
            assert len(made) == 2
        assert ask() is None
        with pytest.raises(RuntimeError, match="in between"), prepared_once():
            raise RuntimeError("in between")
        assert ask() is None


def test_where_gradients_are_recorded_nothing_is_prepared() -> None:
    layer, x = Linear(6, 6), torch.randn(4, 6)
    with bf16(), prepared_once(long=True):
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert float(layer.weight.grad.abs().sum()) > 0


def roundings(draw: Callable[[], object], width: int) -> int:
    """How many weights ``(width, width)`` are rounded."""
    with torch.inference_mode(), bf16(), torch.profiler.profile(record_shapes=True) as profile:
        draw()
    events = profile.key_averages(group_by_input_shape=True)
    return sum(e.count for e in events if e.key == "aten::_to_copy" and e.input_shapes[0] == [width, width])


@pytest.mark.parametrize("name", ["dpm", "ddim", "ddpm"])
@pytest.mark.parametrize("long", [False, True])
def test_a_chain_rounds_each_weight_once_and_an_evaluation_once_for_all(name: str, long: bool) -> None:
    options = NoiseNetOptions(hidden=64, layers=3)
    policy = DiffusionPolicy(OBS, ACTION, Schedule("linear", 20), options).requires_grad_(False)  # as an average
    obs, noise, sampler = torch.randn(7, OBS), torch.randn(7, ACTION), ActionSamplerOptions(name=name, steps=6)  # type: ignore[arg-type]

    def draw() -> None:
        policy.sample(obs, noise, sampler)

    assert roundings(draw, 64) == 2
    with prepared_once(long=long):
        assert roundings(draw, 64) == 2
        assert roundings(draw, 64) == 0


def test_critics_round_each_weight_once() -> None:
    net, call = network("critics")

    def rounded_weights() -> int:
        with torch.no_grad(), bf16(), torch.profiler.profile(record_shapes=True) as profile:
            call()
        shapes = {str(list(w.shape)) for w in net.layers.parameters()}  # type: ignore[union-attr, operator]
        events = profile.key_averages(group_by_input_shape=True)
        return sum(e.count for e in events if e.key == "aten::_to_copy" and str(e.input_shapes[0]) in shapes)

    with prepared_once():
        assert rounded_weights() == 2 * 3, "weights and biases of three layers; the head keeps float32"
        assert rounded_weights() == 0


def test_a_guided_chain_rounds_each_weight_once() -> None:
    agent = built(QGPO, behaviour={"width": 128}, energy={"hidden": 48, "layers": 3})
    obs, noise = torch.randn(7, agent.spec.obs_dim), torch.randn(7, agent.spec.action_dim)

    def draw() -> None:
        agent.draw_actions(obs, noise, agent.sampler, (1.0, False))

    for net, width in ((agent.behaviour, 128), (agent.energy, 48)):
        weights = [w for w in net.parameters() if w.shape == (width, width)]
        assert roundings(draw, width) == len(weights) > 1


def test_only_parameters_are_prepared_and_only_under_autocast() -> None:
    weight = parameter(4, 4)
    with torch.inference_mode():
        fresh = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        with prepared_once():
            assert rounded(weight) is weight
            with bf16():
                assert rounded(weight).dtype == torch.bfloat16
                assert rounded(weight.t()).dtype == torch.float32
                assert rounded(fresh) is fresh  # made in inference mode: its changes are not counted
                assert rounded(weight.double()).dtype == torch.float64


def test_nothing_is_kept_after_a_region() -> None:
    weight = parameter(4, 4)
    gone = weakref.ref(weight)
    with torch.no_grad(), bf16(), prepared_once():
        rounded(weight)
        del weight
        gc.collect()
        assert gone() is not None  # within it, so that no other tensor is taken for it
    gc.collect()
    assert gone() is None


def test_a_gradient_made_in_a_region_holds_outside_of_it() -> None:
    net, x, t = EnergyNet(OBS, ACTION, hidden=32), torch.randn(ROWS, ACTION), torch.full((1,), 0.5)
    with torch.no_grad(), bf16(), prepared_once():
        gradient = net.gradient(torch.randn(ROWS, OBS))
        inside = gradient(x, t)
    outside = gradient(x, t)
    assert outside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=0.1, atol=0.1 * float(outside.abs().max()))
