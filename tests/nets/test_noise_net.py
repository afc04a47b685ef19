"""The noise network: published sizes and layouts, and fast paths equal to the plain one."""

from __future__ import annotations

import pytest
import torch
from printed import digits
from torch import nn

from lit_diffrl.errors import ConfigError
from lit_diffrl.nets.noise_net import LAYOUTS, NoiseNet

ROWS, STATES, ACTIONS = 6, 5, 3


@pytest.mark.parametrize(
    ("obs_dim", "action_dim", "parameters"),
    [(17, 6, 144438), (11, 3, 141363), (29, 8, 148536), (45, 24, 160840), (60, 9, 156985)],
)
@pytest.mark.parametrize("embedding", ["dql", "edp"])
def test_networks_have_the_published_number_of_parameters(
    obs_dim: int, action_dim: int, parameters: int, embedding: str
) -> None:
    net = NoiseNet(obs_dim, action_dim, embedding=embedding)  # type: ignore[arg-type]
    assert sum(p.numel() for p in net.parameters()) == parameters
    # the first layer is one matrix
    assert net.state_dict()["net.0.weight"].shape == (256, obs_dim + action_dim + 16)


def test_steps_are_embedded_as_published() -> None:
    zero, one = torch.zeros(1), torch.ones(1)
    dql, edp = (NoiseNet(2, 2, embedding=e).embedding for e in ("dql", "edp"))  # type: ignore[arg-type]
    assert torch.equal(dql(zero)[0], torch.tensor([0.0] * 8 + [1.0] * 8))
    assert torch.equal(edp(zero)[0], torch.tensor([1.0] * 8 + [0.0] * 8))
    assert dql(one)[0, 7].item() == pytest.approx(1e-4, rel=1e-4)
    assert edp(one)[0, 15].item() == digits("3.1623e-4")


@pytest.mark.parametrize(
    ("embedding", "columns"),
    [("dql", "action time obs"), ("edp", "obs action time"), ("cleandiffuser", "action time obs")],
)
def test_input_is_laid_out_as_in_the_named_code(embedding: str, columns: str) -> None:
    torch.manual_seed(0)
    net = NoiseNet(STATES, ACTIONS, hidden=8, embedding=embedding)  # type: ignore[arg-type]
    parts = {"action": torch.randn(ROWS, ACTIONS), "obs": torch.randn(ROWS, STATES)}
    k = torch.arange(ROWS)
    parts["time"] = net.time(net.embedding(k))
    plain = net.net(torch.cat([parts[name] for name in columns.split()], dim=-1))
    torch.testing.assert_close(net(parts["action"], k, parts["obs"]), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("embedding", LAYOUTS)
@pytest.mark.parametrize("hidden", [8, 256])
def test_shared_steps_and_states_change_nothing(dtype: torch.dtype, embedding: str, hidden: int) -> None:
    torch.manual_seed(0)
    rows = 6 if hidden == 8 else 100  # the other matrix product needs some size
    net = NoiseNet(STATES, ACTIONS, hidden=hidden, embedding=embedding, layer_norm=hidden == 8).to(dtype)  # type: ignore[arg-type]
    x, obs = torch.randn(rows, 4, ACTIONS, dtype=dtype), torch.randn(rows, STATES, dtype=dtype)
    exact = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-11}
    each = torch.linspace(0, 999, rows, dtype=dtype)
    for k in (each, torch.tensor([865.8], dtype=dtype), torch.tensor([3])):
        plain = net(
            x.flatten(0, 1), k.expand(rows).repeat_interleave(4).contiguous(), obs.repeat_interleave(4, dim=0)
        ).unflatten(0, (rows, 4))
        assert plain.dtype == dtype
        torch.testing.assert_close(net(x, k, obs), plain, **exact)
        torch.testing.assert_close(net(x[:, 0], k, obs), plain[:, 0], **exact)
        for steps in ((), (7, 865.8, 3)):
            given = net.given(obs, steps)
            torch.testing.assert_close(given(x, k), plain, **exact)
            torch.testing.assert_close(given(x[:, 0], k), plain[:, 0], **exact)


def test_steps_known_beforehand_are_not_embedded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = NoiseNet(STATES, ACTIONS, hidden=8)
    steps = [932.4, 865.8, 0]
    given = net.given(torch.randn(ROWS, STATES), steps)
    monkeypatch.setattr(net, "embedding", None)
    for k in steps:
        given(torch.randn(ROWS, ACTIONS), torch.tensor([k], dtype=torch.float32))
    with pytest.raises(TypeError):
        given(torch.randn(ROWS, ACTIONS), torch.tensor([5.0]))


def test_gradients_do_not_depend_on_the_path() -> None:
    torch.manual_seed(0)
    net = NoiseNet(STATES, ACTIONS, hidden=8).double()
    x, obs = torch.randn(ROWS, ACTIONS).double(), torch.randn(ROWS, STATES).double()
    k = torch.full((ROWS,), 4)
    names = [name for name, _ in net.named_parameters()]
    outputs = [net(x, k, obs), net(x, k[:1], obs), net.given(obs, [4])(x, k[:1])]
    plain, *fast = (torch.autograd.grad(out.square().sum(), list(net.parameters())) for out in outputs)
    for grads in fast:
        for name, a, b in zip(names, grads, plain):
            torch.testing.assert_close(a, b, msg=name)


def test_lower_precisions_keep_the_steps_apart() -> None:
    torch.manual_seed(0)
    net = NoiseNet(STATES, ACTIONS, hidden=8)
    x, obs, k = torch.randn(ROWS, ACTIONS), torch.randn(ROWS, STATES), torch.full((1,), 998)
    full = net(x, k, obs)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(x, k, obs).float(), full, rtol=0.05, atol=0.05)
    half = net.to(torch.bfloat16)
    close = half(x.bfloat16(), k, obs.bfloat16())
    torch.testing.assert_close(close.float(), full, rtol=0.1, atol=0.1)
    assert not torch.equal(half(x.bfloat16(), k + 1, obs.bfloat16()), close)


def test_lecun_weights_have_the_variance_of_their_width_and_no_bias() -> None:
    torch.manual_seed(0)
    net = NoiseNet(40, 8, init="lecun", layer_norm=True)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            assert not layer.bias.any()
            assert layer.weight.abs().max() <= 2 / 0.8796 * layer.in_features**-0.5
            if layer.weight.numel() > 10_000:
                assert layer.weight.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.02)


def test_options_that_make_no_sense_are_refused() -> None:
    for options, message in (
        ({"embedding": "dsql"}, "did you mean 'dql'"),
        ({"init": "lecum"}, "did you mean 'lecun'"),
        ({"layers": 0}, "hidden layers"),
        ({"time_dim": 5}, "embedding size"),
        ({"hidden": 0}, "MLP sizes"),
    ):
        with pytest.raises(ConfigError, match=message):
            NoiseNet(STATES, ACTIONS, **options)  # type: ignore[arg-type]
