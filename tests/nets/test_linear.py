"""Both matrix products give the same map and the same derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffrl.nets import linear as module
from lit_diffrl.nets.linear import Linear, batched_linear, fixed, linear, unrounded
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


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("rows", [(256,), (4, 64)])
@pytest.mark.parametrize("long", [None, False, True])
@pytest.mark.parametrize("faster", [True, False])
def test_a_fixed_map_is_linear_and_is_settled_once(
    view: str, rows: tuple[int, ...], long: bool | None, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FASTER", faster and module.ONEDNN is not None)
    width, seen = VIEWS[view]
    layer, x, settled = Linear(96, 80, bias=view != "transposed"), torch.randn(*rows, width), list[Tensor]()
    settle = module._map
    monkeypatch.setattr(module, "_map", lambda *args: settled.append(args[0]) or settle(*args))
    expected = F.linear(x, layer.weight if seen is None else seen(layer.weight), layer.bias)
    with torch.inference_mode(), nullcontext() if long is None else prepared_once(long=long):
        found = fixed(layer.weight, layer.bias, seen)
        for _ in range(2):
            torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-5)
        assert len(settled) == 1
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            assert found(x).dtype == torch.bfloat16
            torch.testing.assert_close(found(x).float(), expected, rtol=0.05, atol=0.05)
        torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-5)
        assert len(settled) == 3, "once for each side of autocast"


def test_a_fixed_map_passes_gradients_and_follows_its_weight_where_they_are_recorded() -> None:
    layer, x = Linear(6, 4), torch.randn(3, 6, requires_grad=True)
    found = fixed(layer.weight, layer.bias)
    for _ in range(2):
        given = torch.autograd.grad(found(x).square().sum(), (x, *layer.parameters()))
        expected = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
        for a, b in zip(given, expected):
            torch.testing.assert_close(a, b)
        layer.weight.data.mul_(2)
