"""Both matrix products give the same map and the same derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffrl.nets import linear as module
from lit_diffrl.nets.energy import BehaviourNet, EnergyNet
from lit_diffrl.nets.linear import Linear, batched_linear, fixed, linear, unrounded
from lit_diffrl.nets.noise_net import NoiseNet
from lit_diffrl.nets.prepared import prepared_once

needs_onednn = pytest.mark.skipif(module.ONEDNN is None, reason="torch has one product here")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every product of oneDNN, whatever the processor prefers."""
    seen: list[int] = []
    product = module.ONEDNN

    def counted(*args: object) -> Tensor:
        seen.append(1)
        return product(*args)

    monkeypatch.setattr(module, "ONEDNN", counted)
    monkeypatch.setattr(module, "FASTER", True)
    return seen


def twice(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Value, first derivatives and derivatives of their norm."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    value = function(*inputs)
    first = torch.autograd.grad(value.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    return [value, *first, *second]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-5 * float(b.abs().max()))


@needs_onednn
@pytest.mark.parametrize("shape", [(256, 96), (4, 64, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_that_of_torch_in_two_derivatives(shape: tuple[int, ...], bias: bool, calls: list[int]) -> None:
    x, weight = torch.randn(shape), torch.randn(80, 96)
    inputs = (x, weight, torch.randn(80)) if bias else (x, weight)
    found = twice(linear, *inputs)
    assert len(calls) > 3
    assert_same(found, twice(F.linear, *(t.double() for t in inputs)))
    with torch.no_grad():
        torch.testing.assert_close(linear(*inputs), found[0])


@needs_onednn
@pytest.mark.parametrize(("rows", "width_out"), [(512, 48), (64, 1)])
@pytest.mark.parametrize("shared", [True, False])
def test_batched_linear_is_that_of_torch_in_two_derivatives(
    rows: int, width_out: int, shared: bool, calls: list[int]
) -> None:
    x = torch.randn(rows, 64) if shared else torch.randn(3, rows, 64)
    inputs = (x, torch.randn(3, 64, width_out), torch.randn(3, 1, width_out))

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x @ weight + bias

    assert_same(twice(batched_linear, *inputs), twice(plain, *(t.double() for t in inputs)))
    assert_same(twice(batched_linear, *inputs[:2]), twice(torch.matmul, *(t.double() for t in inputs[:2])))
    assert bool(calls) == (width_out > 1)
    with torch.no_grad():
        torch.testing.assert_close(batched_linear(*inputs), plain(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("faster", [True, False])
def test_constants_get_no_gradient(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FASTER", faster and module.ONEDNN is not None)
    x, weight = torch.randn(256, 96, requires_grad=True), torch.randn(80, 96)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(256, -1), rtol=1e-4, atol=1e-4)
    bias = torch.zeros(80, requires_grad=True)
    assert torch.equal(torch.autograd.grad(linear(x.detach(), weight, bias).sum(), bias)[0], torch.full((80,), 256.0))
    weight = weight.t().expand(2, -1, -1).clone()
    (grad,) = torch.autograd.grad(batched_linear(x, weight).sum(), x)
    torch.testing.assert_close(grad, weight.sum((0, 2)).expand(256, -1), rtol=1e-4, atol=1e-4)


@needs_onednn
def test_other_precisions_small_products_and_parts_of_a_matrix_are_left_to_torch(calls: list[int]) -> None:
    x, weight = torch.randn(256, 96), torch.randn(80, 96)
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    assert torch.equal(linear(x[:4], weight), F.linear(x[:4], weight))
    wide = torch.randn(80, 200)
    assert torch.equal(linear(x, wide[:, 50:146]), F.linear(x, wide[:, 50:146]))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
        assert batched_linear(x, weight.t().expand(2, -1, -1)).dtype == torch.bfloat16
    assert linear(x[:0], weight).shape == (0, 80)
    assert not calls


@needs_onednn
def test_layers_keep_to_the_product_of_the_processor(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(512, 96), torch.randn(80, 96)
    for faster in (True, False):
        monkeypatch.setattr(module, "FASTER", faster)
        calls.clear()
        linear(x, weight)
        batched_linear(x, weight.t().expand(2, -1, -1))
        assert len(calls) == (3 if faster else 0)


@pytest.mark.parametrize(("name", "intel"), [("Intel Xeon", True), ("AMD EPYC", False), (None, False)])
def test_the_processor_is_known_by_its_name(name: str | None, intel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    if name is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert module._intel() == intel


def test_layer_has_the_weights_of_torch() -> None:
    torch.manual_seed(1)
    ours = Linear(96, 80)
    torch.manual_seed(1)
    theirs = nn.Linear(96, 80)
    assert torch.equal(ours.weight, theirs.weight) and ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(256, 96)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_a_last_layer_is_in_float32_under_autocast_whatever_it_is_given(given: torch.dtype) -> None:
    """Layer normalisation gives float32 under autocast on a GPU."""
    layer, x = nn.Linear(32, 1), torch.randn(64, 32).to(given)
    with torch.autocast("cpu", torch.bfloat16):
        found = unrounded(layer, x)
    assert torch.equal(found, layer(x.float()))
    (grad,) = torch.autograd.grad(found.sum(), layer.weight)
    torch.testing.assert_close(grad[0], x.float().sum(0))


VIEWS: dict[str, tuple[int, Callable[[Tensor], Tensor] | None]] = {
    "whole": (96, None),
    "columns": (40, lambda w: w[:, :40]),
    "transposed": (80, torch.t),
}


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the inputs for which it was settled how to compute a map."""
    seen, settle = list[torch.Size](), module._computation

    def counted(x: Tensor, *others: Tensor) -> Callable[[Tensor], Tensor]:
        seen.append(x.shape)
        return settle(x, *others)

    monkeypatch.setattr(module, "_computation", counted)
    return seen


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("long", [None, False, True])
@pytest.mark.parametrize("faster", [True, False])
def test_a_fixed_map_is_linear_and_is_settled_once(
    view: str, long: bool | None, faster: bool, settled: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FASTER", faster and module.ONEDNN is not None)
    (width, seen), layer = VIEWS[view], Linear(96, 80, bias=view != "transposed")
    weight = layer.weight if seen is None else seen(layer.weight)
    rows = torch.randn(256, width)
    inputs = [rows, rows[:7], rows[::2], rows.unflatten(0, (4, 64)), torch.randn(width, 60).t(), rows]
    with torch.inference_mode(), nullcontext() if long is None else prepared_once(long=long):
        found = fixed(layer.weight, layer.bias, seen)
        for x in inputs:
            torch.testing.assert_close(found(x), F.linear(x, weight, layer.bias), rtol=1e-4, atol=1e-5)
        assert len(settled) == 1
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            for x in inputs:
                assert found(x).dtype == torch.bfloat16
                expected = F.linear(x, weight, layer.bias).float()
                torch.testing.assert_close(found(x).float(), expected, rtol=0.05, atol=0.05)
        torch.testing.assert_close(found(rows), F.linear(rows, weight, layer.bias), rtol=1e-4, atol=1e-5)
        assert len(settled) == 3, "once for each side of autocast"


@pytest.mark.parametrize("bf16", [True, False])
def test_a_fixed_map_passes_gradients_where_they_are_recorded_also_after_it_was_settled(bf16: bool) -> None:
    layer, x = Linear(96, 80), torch.randn(64, 96, requires_grad=True)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False)  # as Lightning's
    with torch.no_grad(), prepared_once(long=True), mixed:
        found = layer.fixed()
        found(x)
        with torch.enable_grad():
            for _ in range(2):  # which follow the weight, too
                inputs = (x, *layer.parameters())
                given = torch.autograd.grad(found(x).float().square().sum(), inputs)
                with torch.autocast("cpu", enabled=False):
                    expected = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).square().sum(), inputs)
                for a, b in zip(given, expected):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=(0.02 if bf16 else 1e-5) * float(b.abs().max()))
                layer.weight.data.mul_(2)


@pytest.mark.parametrize("name", ["noise", "behaviour", "energy"])
def test_networks_settle_each_layer_once_for_a_chain(name: str, settled: list[torch.Size]) -> None:
    obs, x, at = torch.randn(7, 5), torch.randn(7, 3), [torch.tensor([t]) for t in (0.25, 0.5, 0.75)]
    times = [float(t) for t in at]
    networks: dict[str, tuple[int, Callable[[], Callable[[Tensor, Tensor], Tensor]]]] = {
        "noise": (3, lambda: NoiseNet(5, 3, hidden=32, layers=3).given(obs, times)),
        "behaviour": (13, lambda: BehaviourNet(5, 3, width=32).given(obs, times)),
        "energy": (6, lambda: EnergyNet(5, 3, hidden=32, layers=3).gradient(obs, times)),
    }
    layers, make = networks[name]
    with torch.inference_mode():
        chain = make()
        before = len(settled)
        for t in at:
            chain(x, t)
    assert len(settled) - before == layers
