"""Perceptrons in blocks of rows: what they compute is what layer after layer computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_diffrl.nets import relu_blocks
from lit_diffrl.nets.critics import TwinQ
from lit_diffrl.nets.linear import ONEDNN, PACKED
from lit_diffrl.nets.prepared import prepared_once
from lit_diffrl.nets.relu_blocks import WORTH, relu_perceptrons, worth_blocks

pytestmark = pytest.mark.skipif(ONEDNN is None, reason="this processor or build keeps to the other product")


def layers_of(critic: TwinQ) -> list[tuple[Tensor, Tensor]]:
    return [layer.parameters_of() for layer in (*critic.layers, critic.head)]  # type: ignore[union-attr, operator]


def gradients(critic: TwinQ, values: Tensor) -> list[Tensor]:
    (values * torch.linspace(-1, 2, values.numel()).view(values.shape)).sum().backward()
    found = [p.grad for p in critic.parameters() if p.grad is not None]
    critic.zero_grad()
    return found


@pytest.mark.parametrize("rows", [1, 700, 1024, 2500])
@pytest.mark.parametrize("layers", [1, 3])
def test_values_and_gradients_are_those_of_layer_after_layer(rows: int, layers: int) -> None:
    torch.manual_seed(0)
    critic = TwinQ(4, 2, hidden=24, layers=layers, activation="relu")
    obs, action = torch.randn(rows, 4), torch.randn(rows, 2)
    plain = critic(obs, action)
    blocks = relu_perceptrons(torch.cat([obs, action], dim=1), layers_of(critic))
    torch.testing.assert_close(blocks, plain, rtol=1e-5, atol=1e-6)
    expected, found = gradients(critic, plain), gradients(critic, blocks)
    assert len(expected) == len(found) == 2 * (layers + 1)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of each call that a critic makes."""
    from lit_diffrl.nets import critics

    seen: list[int] = []

    def watched(x: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
        seen.append(len(x))
        return relu_blocks.relu_perceptrons(x, layers)

    monkeypatch.setattr(critics, "relu_perceptrons", watched)
    yield seen


def test_critics_of_many_actions_work_in_blocks(calls: list[int]) -> None:
    torch.manual_seed(0)
    critic, n = TwinQ(4, 2, hidden=16, layers=2, activation="relu"), WORTH // 100 + 1
    obs, action = torch.randn(100, 4), torch.randn(100, n, 2)
    values = critic(obs, action)
    assert calls == [100 * n] and values.shape == (2, 100, n)
    with torch.no_grad():
        torch.testing.assert_close(critic(obs, action), values, rtol=1e-5, atol=1e-6)
    assert len(calls) == 2
    each = critic(obs.repeat_interleave(n, 0), action.flatten(0, 1)).view(2, 100, n)
    torch.testing.assert_close(values, each, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.bfloat16 not in PACKED, reason="this processor has no products in bfloat16")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_bfloat16_blocks_round_as_layer_after_layer_does(mode: type, calls: list[int]) -> None:
    torch.manual_seed(0)
    critic, n = TwinQ(4, 2, hidden=32, layers=3, activation="relu"), WORTH // 100 + 1
    obs, action = torch.randn(100, 4), torch.randn(100, n, 2)
    with mode():
        exact = critic(obs, action)
        with torch.autocast("cpu", torch.bfloat16):
            blocks = critic(obs, action)
            each = critic(obs.repeat_interleave(n, 0), action.flatten(0, 1)).view(2, 100, n)
    assert calls == [100 * n] * 2 and blocks.dtype == torch.float32
    error = (each - exact).abs().max()
    assert 0 < (blocks - exact).abs().max() < 1.5 * error
    # the last layer is in float32: values that differ, do; in bfloat16 few would
    assert len(blocks.unique()) > blocks.numel() / 2


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_not_a_number_stays_so(autocast: bool, grad: bool, calls: list[int]) -> None:
    critic, obs, action = TwinQ(4, 2, hidden=8, activation="relu"), torch.randn(WORTH, 4), torch.randn(WORTH, 1, 2)
    obs[7, 0] = torch.nan
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        values = critic(obs, action)
    assert values.isnan().nonzero().tolist() == [[0, 7, 0], [1, 7, 0]]
    assert calls == ([] if autocast and (grad or torch.bfloat16 not in PACKED) else [WORTH])


def test_weights_are_turned_once_where_they_stay() -> None:
    critic, obs, action = TwinQ(4, 2, hidden=8, activation="relu"), torch.randn(WORTH, 4), torch.randn(WORTH, 1, 2)
    with torch.no_grad():
        expected = critic(obs, action)
        with prepared_once():
            assert torch.equal(critic(obs, action), expected)
            turned = relu_blocks._transposed(critic.layers[1].weight, torch.float32)  # type: ignore[arg-type]
            assert turned is relu_blocks._transposed(critic.layers[1].weight, torch.float32)  # type: ignore[arg-type]
            for weight in critic.parameters():
                weight.mul_(1.5)
            changed = critic(obs, action)
        assert torch.equal(changed, critic(obs, action)) and not torch.equal(changed, expected)


def test_in_bfloat16_a_critic_that_learns_in_part_goes_layer_by_layer(calls: list[int]) -> None:
    critic = TwinQ(4, 2, hidden=8, activation="relu")
    critic.head.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        critic(torch.randn(WORTH, 4), torch.randn(WORTH, 1, 2)).sum().backward()
    assert calls == []
    assert all(layer.weight.grad.abs().sum() > 0 for layer in critic.layers)  # type: ignore[union-attr]


def test_others_go_layer_by_layer(calls: list[int]) -> None:
    many, few = torch.randn(100, WORTH // 100 + 1, 2), torch.randn(100, 3, 2)
    obs = torch.randn(100, 4)
    relu, mish = TwinQ(4, 2, hidden=8, activation="relu"), TwinQ(4, 2, hidden=8)
    normed = TwinQ(4, 2, hidden=8, activation="relu", layer_norm=True)
    relu(obs, few), mish(obs, many), normed(obs, many), relu(obs, many, members=slice(None))
    relu.double()(obs.double(), many.double())
    relu.float()(obs, many.clone().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        relu(obs, many)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        relu(obs, many)
    assert calls == []


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    critic = TwinQ(1, 1, hidden=8, activation="relu")
    x = torch.randn(4, 2)
    assert not worth_blocks(x, layers_of(critic)), "too few rows"
    values = relu_perceptrons(x, layers_of(critic))
    (slope,) = torch.autograd.grad(values.square().sum(), critic.head.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|differentiate twice"):
        slope.sum().backward()
