"""Critics: published sizes, independence, candidates in one state, frozen members."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_diffrl.errors import ConfigError
from lit_diffrl.nets.activations import mish
from lit_diffrl.nets.critics import EnsembleNorm, TwinQ, ValueNet

B, S, A = 6, 5, 3


def size(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("obs_dim", "action_dim", "critic", "value"),
    [
        (17, 6, 137985, 136449),
        (11, 3, 135681, 134913),
        (29, 8, 141569, 139521),
        (45, 24, 149761, 143617),
        (60, 9, 149761, 147457),
    ],
)
def test_networks_have_the_published_number_of_parameters(
    obs_dim: int, action_dim: int, critic: int, value: int
) -> None:
    assert size(TwinQ(obs_dim, action_dim)) == 2 * critic
    assert size(TwinQ(obs_dim, action_dim, members=5)) == 5 * critic
    assert size(ValueNet(obs_dim)) == value


@pytest.mark.parametrize(("obs_dim", "action_dim", "parameters"), [(17, 6, 72193), (11, 3, 69889), (29, 8, 75777)])
def test_smaller_critics_are_those_of_td3_bc(obs_dim: int, action_dim: int, parameters: int) -> None:
    assert size(TwinQ(obs_dim, action_dim, layers=2, activation="relu")) == 2 * parameters


def plain(net: TwinQ, member: int, obs: Tensor, action: Tensor) -> Tensor:
    """One critic, written out."""
    h = torch.cat([obs, action], dim=-1)
    for layer in net.layers:
        h = mish(h @ layer.weight[member] + layer.bias[member])
    return (h @ net.head.weight[member] + net.head.bias[member]).squeeze(-1)


@pytest.mark.parametrize("hidden", [8, 256])
def test_members_are_independent_perceptrons_on_state_and_action(hidden: int) -> None:
    torch.manual_seed(0)
    rows = 6 if hidden == 8 else 100
    net = TwinQ(S, A, hidden=hidden, members=3)
    obs, action = torch.randn(rows, S), torch.randn(rows, A)
    q = net(obs, action)
    assert q.shape == (3, rows)
    for member in range(3):
        torch.testing.assert_close(q[member], plain(net, member, obs, action), rtol=1e-4, atol=1e-5)
    q[1].sum().backward()
    for p in net.parameters():
        assert p.grad is not None
        assert p.grad[1].any() and not p.grad[0].any() and not p.grad[2].any()


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("hidden", [8, 256])
def test_candidates_of_a_state_are_valued_as_if_the_state_were_repeated(hidden: int, layer_norm: bool) -> None:
    torch.manual_seed(0)
    net = TwinQ(S, A, hidden=hidden, layer_norm=layer_norm)
    obs, action = torch.randn(B, S), torch.randn(B, 20, A, requires_grad=True)
    q = net(obs, action)
    repeated = net(obs.repeat_interleave(20, 0), action.flatten(0, 1)).unflatten(1, (B, 20))
    assert q.shape == (2, B, 20)
    torch.testing.assert_close(q, repeated, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(v.square().sum(), [action, *net.parameters()]) for v in (q, repeated)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    single = net(obs, action[:, :1])
    assert single.shape == (2, B, 1)
    torch.testing.assert_close(single[..., 0], net(obs, action[:, 0]))


@pytest.mark.parametrize("candidates", [(), (4,)])
def test_asked_members_are_constants_through_which_gradients_reach_the_action(candidates: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = TwinQ(S, A, hidden=8, layer_norm=True)
    obs, action = torch.randn(B, S), torch.randn(B, *candidates, A, requires_grad=True)
    both = net(obs, action)
    for members in (slice(None), slice(1, 2), torch.tensor([0])):
        q = net(obs, action, members)
        torch.testing.assert_close(q, both[members])
        found = torch.autograd.grad(q.sum(), action)[0]
        torch.testing.assert_close(found, torch.autograd.grad(both[members].sum(), action, retain_graph=True)[0])
    assert all(p.grad is None for p in net.parameters())
    assert not net(obs, action.detach(), slice(None)).requires_grad


def test_initial_weights_are_those_of_separate_layers() -> None:
    torch.manual_seed(0)
    net = TwinQ(44, 20, members=4)
    for layer in [*net.layers, net.head]:
        bound = layer.weight.shape[1] ** -0.5
        for tensor in (layer.weight, layer.bias):
            assert tensor.abs().max() <= bound
        assert layer.weight.abs().max() > 0.9 * bound
        assert not torch.equal(layer.weight[0], layer.weight[1])


def test_orthogonal_critics_are_orthogonal_each() -> None:
    net = TwinQ(S, A, hidden=16, layers=3, orthogonal=True)
    for member in range(2):
        square = net.layers[1].weight[member]
        torch.testing.assert_close(square @ square.t(), 2 * torch.eye(16), rtol=0, atol=1e-5)
        wide = net.layers[0].weight[member]
        torch.testing.assert_close(wide @ wide.t(), 2 * torch.eye(S + A), rtol=0, atol=1e-5)
        assert net.head.weight[member].norm().item() == pytest.approx(0.01, rel=1e-5)
    assert not any(layer.bias.any() for layer in [*net.layers, net.head])
    assert not torch.equal(net.layers[0].weight[0], net.layers[0].weight[1])


@pytest.mark.parametrize("layer_norm", [False, True])
def test_orthogonal_values_are_too(layer_norm: bool) -> None:
    first, second, head = [
        layer for layer in ValueNet(S, hidden=16, layers=2, layer_norm=layer_norm, orthogonal=True).net
        if isinstance(layer, torch.nn.Linear)
    ]  # fmt: skip
    torch.testing.assert_close(first.weight.t() @ first.weight, 2 * torch.eye(S), rtol=0, atol=1e-5)
    torch.testing.assert_close(second.weight @ second.weight.t(), 2 * torch.eye(16), rtol=0, atol=1e-5)
    assert head.weight.norm().item() == pytest.approx(0.01, rel=1e-5)
    assert not any(layer.bias.any() for layer in (first, second, head))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_are_single_precision_or_better(dtype: torch.dtype) -> None:
    net, value = TwinQ(S, A, hidden=8).to(dtype), ValueNet(S, hidden=8).to(dtype)
    obs, action = torch.randn(B, S, dtype=dtype), torch.randn(B, A, dtype=dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert (net(obs, action).dtype, value(obs).dtype) == (expected, expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = TwinQ(S, A, hidden=8)(obs.float(), action.float()), ValueNet(S, hidden=8)(obs.float())
    assert all(v.dtype == torch.float32 for v in found)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_values_and_gradients_are_those_of_single_precision(
    dtype: torch.dtype, layer_norm: bool
) -> None:
    torch.manual_seed(0)
    net = TwinQ(S, A, hidden=32, activation="relu", layer_norm=layer_norm)
    obs, action = torch.randn(64, S), torch.randn(64, 4, A)
    plain = net(obs, action)
    with torch.autocast("cpu", dtype):
        mixed = net(obs, action)
    torch.testing.assert_close(mixed, plain, rtol=0, atol=0.05)
    parameters = list(net.parameters())
    for a, b in zip(*(torch.autograd.grad(q.square().mean(), parameters) for q in (mixed, plain))):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.05 * float(b.abs().max()) + 1e-3)


@pytest.mark.parametrize("activation", ["relu", "mish"])
def test_large_values_keep_the_differences_between_them_under_autocast(activation: str) -> None:
    """Rounded to bfloat16 all of them would be one number: the next to 300 is 302."""
    torch.manual_seed(0)
    net, value = TwinQ(S, A, hidden=32, activation=activation), ValueNet(S, hidden=32, activation=activation)
    with torch.no_grad():
        net.head.bias.fill_(300.0)
        value.net[-1].bias.fill_(300.0)
    obs, action = torch.randn(64, S), torch.randn(64, 4, A)
    plain = net(obs, action), value(obs)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(obs, action), value(obs)
    for a, b in zip(mixed, plain):
        assert 0 < float((a - b).abs().max()) < 0.05 * float(b.std())


@pytest.mark.parametrize("members", [None, slice(1, 3)])
def test_each_member_is_normalised_with_its_own_scale_and_shift(members: slice | None) -> None:
    torch.manual_seed(0)
    norm = EnsembleNorm(3, 8).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    rows, weight, bias = (t if members is None else t[members] for t in (x, norm.weight, norm.bias))
    centred = rows - rows.mean(dim=-1, keepdim=True)
    expected = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    found = norm(rows, members)
    torch.testing.assert_close(found, expected)
    at = x if members else [x, norm.weight, norm.bias]
    for a, b in zip(*(torch.autograd.grad(v.pow(3).sum(), at, retain_graph=True) for v in (found, expected))):
        torch.testing.assert_close(a, b)


def test_state_values_have_one_number_a_row() -> None:
    net = ValueNet(S, hidden=8, layers=2, activation="relu", layer_norm=True)
    assert net(torch.randn(B, S)).shape == (B,)
    assert [type(layer).__name__ for layer in net.net].count("LayerNorm") == 2


@pytest.mark.parametrize("activation", ["mish", "relu"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_first_layer_may_have_tanh_and_the_others_theirs(activation: str, layer_norm: bool) -> None:
    """CleanDiffuser's critics, written out; of many candidates too, and the state's value likewise."""
    torch.manual_seed(0)
    net = TwinQ(S, A, hidden=16, activation=activation, layer_norm=layer_norm, first_tanh=True)
    obs, action = torch.randn(40, S), torch.randn(40, 50, A)
    act = mish if activation == "mish" else torch.relu
    h = torch.cat([obs[:, None].expand(-1, 50, -1), action], dim=-1).expand(2, -1, -1, -1)
    for i, layer in enumerate(net.layers):
        h = h @ layer.weight[:, None] + layer.bias[:, None]
        h = torch.nn.functional.layer_norm(h, (16,)) if layer_norm else h
        h = h.tanh() if i == 0 else act(h)
    expected = (h @ net.head.weight[:, None] + net.head.bias[:, None]).squeeze(-1)
    torch.testing.assert_close(net(obs, action), expected, rtol=1e-4, atol=1e-5)
    plain_net = TwinQ(S, A, hidden=16, activation=activation, layer_norm=layer_norm)
    assert plain_net.state_dict().keys() == net.state_dict().keys()

    value = ValueNet(S, hidden=16, activation=activation, layer_norm=layer_norm, first_tanh=True)
    kinds = [type(layer).__name__ for layer in value.net if type(layer).__name__ not in ("Linear", "LayerNorm")]
    assert kinds == ["Tanh", *[{"mish": "Mish", "relu": "ReLU"}[activation]] * 2]


def test_options_that_make_no_sense_are_refused() -> None:
    for options, message in (
        ({"activation": "misch"}, "did you mean 'mish'"),
        ({"layers": 0}, "hidden layers"),
        ({"members": 0}, "critics must be in"),
    ):
        with pytest.raises(ConfigError, match=message):
            TwinQ(S, A, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="hidden layers"):
        ValueNet(S, layers=0)
