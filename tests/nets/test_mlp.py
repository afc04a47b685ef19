from __future__ import annotations

import pytest
import torch

from lit_diffrl.errors import ConfigError
from lit_diffrl.nets.mlp import MLP


def test_mlp_activates_between_layers_and_not_after_the_last() -> None:
    net = MLP((2, 8, 8, 3), activation="relu")
    assert [type(layer).__name__ for layer in net] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert net(torch.randn(4, 5, 2)).shape == (4, 5, 3)
    assert MLP((2, 3))(torch.randn(2)).shape == (3,)


def test_mlp_normalises_before_each_activation() -> None:
    net = MLP((2, 8, 8, 3), layer_norm=True)
    hidden = ["LayerNorm", "Mish", "Linear"]
    assert [type(layer).__name__ for layer in net] == ["Linear", *hidden, *hidden]
    torch.testing.assert_close(
        net[1](net[0](torch.randn(5, 2))).std(-1, correction=0), torch.ones(5), rtol=1e-2, atol=0
    )


def test_mlp_refuses_nonsense() -> None:
    with pytest.raises(ConfigError, match="did you mean 'relu'"):
        MLP((2, 3), activation="rellu")
    for sizes in ((2,), (2, 0, 3)):
        with pytest.raises(ConfigError, match="MLP sizes"):
            MLP(sizes)
