"""Rows in blocks are the rows at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_diffrl.nets import blocks
from lit_diffrl.nets.blocks import in_blocks
from lit_diffrl.nets.critics import TwinQ
from lit_diffrl.nets.energy import BehaviourNet
from lit_diffrl.nets.noise_net import NoiseNet


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((11, 3), [4, 4, 3]), ((11, 2, 3), [2, 2, 2, 2, 2, 1]), ((3, 9, 3), [1, 1, 1]), ((4, 3), [4]), ((0, 3), [0])],
    ids=["rows", "rows in groups", "groups above a block", "one block", "nothing"],
)
def test_which_rows_go_together(shape: tuple[int, ...], sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4)
    x, other = torch.randn(shape), torch.arange(shape[0])
    seen = []

    def net(x: Tensor, other: Tensor) -> Tensor:
        seen.append(len(x))
        return 2 * x + other.view(-1, *[1] * (x.dim() - 1))

    with torch.no_grad():
        out = in_blocks(net, x, other)
    assert seen == sizes
    torch.testing.assert_close(out, net(x, other), rtol=0, atol=0)


def test_a_gradient_passes_all_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4)
    seen = []
    in_blocks(lambda x: seen.append(len(x)) or x, torch.randn(11, 3, requires_grad=True))  # type: ignore[func-returns-value]
    assert seen == [11]


@pytest.mark.parametrize("shape", [(9, 3), (9, 4, 3)], ids=["one action", "four actions"])
@pytest.mark.parametrize("kind", ["critics", "normalised critics", "all critics", "noise", "behaviour"])
def test_networks_give_the_same_in_blocks(kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    obs, action, t = torch.randn(9, 5), torch.randn(shape), torch.tensor([0.3])
    calls: dict[str, tuple[nn.Module, str, Callable[[Any], Tensor]]] = {
        "critics": (TwinQ(5, 3, 32), "_values", lambda net: net(obs, action)),
        "normalised critics": (TwinQ(5, 3, 32, layer_norm=True), "_values", lambda net: net(obs, action)),
        "all critics": (TwinQ(5, 3, 32), "_values", lambda net: net(obs, action, slice(None))),
        "noise": (NoiseNet(5, 3, 32), "_joined", lambda net: net.given(obs, [0.3])(action, t)),
        "behaviour": (BehaviourNet(5, 3, 32), "_trunk", lambda net: net.given(obs, [0.3])(action, t)),
    }
    net, name, call = calls[kind]
    whole, inner, seen = call(net), getattr(net, name), []

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(len(x))
        out: Tensor = inner(x, *args, **kwargs)
        return out

    monkeypatch.setattr(blocks, "BLOCK", 8)
    monkeypatch.setattr(net, name, counted, raising=False)
    with torch.inference_mode():
        torch.testing.assert_close(call(net), whole, rtol=1e-5, atol=1e-6)
    assert seen == ([8, 1] if len(shape) == 2 else [2, 2, 2, 2, 1])
