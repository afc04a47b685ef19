import copy
import io
import math

import pytest
import torch
from printed import digits
from torch import Tensor, nn

from lit_diffrl.errors import ConfigError
from lit_diffrl.methods.world_model import WorldModel
from lit_diffrl.nets.ensemble import BestWeights, EnsembleMLP, GaussianEnsemble, RowShares
from lit_diffrl.nets.mlp import MLP

OBS, ACTION = 3, 2


def model_of(**options) -> WorldModel:
    torch.manual_seed(0)
    defaults = {"members": 3, "elites": 2, "hidden": 16, "layers": 2, "reward_hidden": 16}
    return WorldModel(OBS, ACTION, **{**defaults, "reward_low": -0.5, "reward_high": 1.0, **options})


def transitions(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, d, generator=g) for d in (OBS, ACTION, OBS))  # type: ignore[return-value]


def linear_model(a: Tensor, b: Tensor, std: Tensor | float = 0.1, members: int = 3, elites: int = 2) -> WorldModel:
    """A world model that is exactly s' = A s + B a + N(0, std^2)."""
    model = model_of(members=members, elites=elites, layers=0, variance_floor=0.0).double()
    torch.nn.init.constant_(model.transition.logvar_low, -60.0)
    torch.nn.init.constant_(model.transition.logvar_high, 60.0)
    model.delta_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
    model.delta_std.copy_(torch.tensor([0.5, 1.0, 2.0]))
    layer = model.transition.net.layers[0]
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, :, :OBS] = torch.cat([(a - torch.eye(OBS)).T, b.T]) / model.delta_std
        layer.bias[..., :OBS] = -model.delta_mean / model.delta_std
        layer.bias[..., OBS:] = 2 * (torch.as_tensor(std) / model.delta_std).log()
    return model


A = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.8, -0.2], [0.1, 0.0, 0.7]], dtype=torch.float64)
B = torch.tensor([[0.5, 0.0], [0.1, -0.3], [0.0, 0.4]], dtype=torch.float64)


# ------------------------------------------------------------------ ensembles


def test_batched_members_equal_a_loop_over_single_networks() -> None:
    torch.manual_seed(0)
    net = EnsembleMLP(4, [5, 8, 8, 2], "silu")
    x = torch.randn(4, 6, 5)
    for member in range(4):
        single = MLP([5, 8, 8, 2], "silu")
        for i, layer in enumerate(m for m in single if isinstance(m, nn.Linear)):
            layer.weight.data.copy_(net.layers[i].weight[member].T)
            layer.bias.data.copy_(net.layers[i].bias[member, 0])
        torch.testing.assert_close(net(x)[member], single(x[member]))
        torch.testing.assert_close(net(x[0])[member], single(x[0]))
        torch.testing.assert_close(net(x[0], torch.tensor([member]))[0], single(x[0]))


def spreads(net: EnsembleMLP) -> list[float]:
    """Deviation over inputs of what each layer gives, its activation not yet applied."""
    x, found = torch.randn(512, 14), []
    for layer in net.layers:
        x = layer(x)
        found.append(float(x.std(-2).mean().detach()))
        x = net.activation(x)
    return found


def test_initial_weights_follow_the_input_width() -> None:
    """Oracle 17, and what the fault of the authors' code would do: a fan-in of 40,000, read off the 3-D weight."""
    torch.manual_seed(0)
    net = EnsembleMLP(7, [14, 200, 200, 200, 200, 22])
    for layer in net.layers[1:]:
        bound = float(layer.weight.detach().abs().max())
        assert bound == pytest.approx(200**-0.5, rel=0.01) and bound == digits("0.0707")
    assert min(spreads(net)[:-1]) > 1e-2  # and 0.004 in the head, after four activations that halve it
    for layer in net.layers:
        for weight in layer.parameters():
            weight.detach().div_(layer.weight.shape[2] ** 0.5)
    assert float(net.layers[1].weight.detach().abs().max()) == digits("0.005")
    assert spreads(net) == [pytest.approx(x, rel=0.25) for x in (4e-2, 8e-4, 1.7e-5, 3e-7, 2e-8)]


def test_rows_are_shared_out_between_networks() -> None:
    nets = [nn.Linear(3, 3) for _ in range(3)]
    shares = RowShares([Levelled(net) for net in nets])
    x, level = torch.randn(7, 3), torch.randn(7)
    expected = torch.stack([nets[i % 3](x[i]) + level[i] for i in range(7)])
    torch.testing.assert_close(shares(x, level), expected)
    torch.testing.assert_close(shares(x, level[:1]), shares(x, level[:1].expand(7)))
    assert shares(x[:2], level[:2]).shape == (2, 3), "fewer rows than networks"


class Levelled(nn.Module):
    """A network whose output is moved by the level of each row."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        out: Tensor = self.net(x) + level[:, None]
        return out


def test_members_share_nothing() -> None:
    torch.manual_seed(0)
    net = GaussianEnsemble(3, [5, 8, 2])
    x = torch.randn(3, 6, 5)
    (net(x)[0][1].sum() + net(x)[1][1].sum()).backward()
    for weight in net.parameters():
        assert weight.grad is not None and weight.grad[1].any()
        assert not weight.grad[0].any() and not weight.grad[2].any()
    before = net(x)[0].detach()
    with torch.no_grad():
        net.net.layers[0].weight[0] += 1.0
        net.net.layers[1].weight[2] = net.net.layers[1].weight[1]
    after = net(x)[0].detach()
    assert torch.equal(before[1], after[1]) and not torch.equal(before[0], after[0])
    with torch.no_grad():
        for weight in net.parameters():
            weight[0] = weight[1]
    mean, logvar = net(x[0])
    assert torch.equal(mean[0], mean[1]) and torch.equal(logvar[0], logvar[1])


@pytest.mark.parametrize(
    ("raw", "bounded"), [(0, "-0.474004"), (-5, "-4.997336"), (-20, "-9.999955"), (3, "0.421140"), (50, "0.500028")]
)
def test_log_variance_bounds(raw: float, bounded: str) -> None:
    """Oracle 16."""
    net = GaussianEnsemble(1, [1, 1]).double()
    with torch.no_grad():
        net.net.layers[0].weight.zero_()
        net.net.layers[0].bias.fill_(raw)
    _, logvar = net(torch.zeros(1, 1, dtype=torch.float64))
    assert logvar.item() == digits(bounded)
    logvar.sum().backward()
    assert net.logvar_high.grad is not None and net.logvar_low.grad is not None
    assert float(net.logvar_low.grad) > 0
    assert raw == -20 or float(net.logvar_high.grad) > 0, "far below, torch's softplus is a line"


# ------------------------------------------------------------------ training


@pytest.mark.parametrize(
    ("error", "logvar", "loss"),
    [(1.0, 0.0, "1.000000"), (1.0, math.log(2), "1.193147"), (0.1, -2.0, "-1.926109"), (0.0, 0.0, "0.000000")],
)
def test_transition_loss_values(error: float, logvar: float, loss: str) -> None:
    """Oracle 15."""
    model = linear_model(A, B, std=math.exp(logvar / 2) * torch.tensor([0.5, 1.0, 2.0]))
    model.logvar_penalty = 0.0
    obs, action, _ = (x.double() for x in transitions(3, 8))
    next_obs = obs @ A.T + action @ B.T + error * model.delta_std
    assert model.transition_loss(obs, action, next_obs).tolist() == [digits(loss)] * 3


def test_each_member_sees_its_own_batch() -> None:
    model = model_of()
    obs, action, next_obs = transitions(3, 8)
    loss = model.transition_loss(obs, action, next_obs)
    changed = next_obs.clone()
    changed[1] += 1.0
    other = model.transition_loss(obs, action, changed)
    assert loss.shape == (3,)
    assert torch.equal(loss[[0, 2]], other[[0, 2]]) and loss[1] != other[1]
    loss[1].backward()
    for weight in model.transition.parameters():
        assert weight.grad is not None and not weight.grad[[0, 2]].any()


def test_scales_of_the_differences() -> None:
    model = model_of()
    delta = torch.randn(500, OBS) * torch.tensor([0.01, 1.0, 0.0]) + torch.tensor([1.0, 2.0, 3.0])
    model.fit_scales(delta)
    torch.testing.assert_close(model.delta_mean, delta.mean(0))
    torch.testing.assert_close(model.delta_std, torch.cat([delta[:, :2].std(0, correction=0), torch.ones(1)]))


def test_linear_gaussian_dynamics_are_learned_to_their_entropy() -> None:
    torch.manual_seed(0)
    std = torch.tensor([0.05, 0.1, 0.3])
    obs, action, noise = transitions(6000)
    next_obs = obs @ A.T.float() + action @ B.T.float() + std * noise
    reward = (0.3 * obs[:, 0]).clamp(-0.5, 1.0)
    model = model_of(hidden=32, layers=1, reward_layers=1, variance_floor=1e-6)
    model.fit_scales((next_obs - obs)[:5000])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    held = slice(5000, 6000)
    for step in range(2000):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 2000)
        rows = torch.randint(5000, (3, 128))
        loss = model.transition_loss(obs[rows], action[rows], next_obs[rows]).sum()
        loss = loss + model.reward_loss(obs[rows[0]], action[rows[0]], reward[rows[0]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 199:
            logs = model.validate(obs[held], action[held], next_obs[held], reward[held])
    model.finish()
    entropy = float((0.5 * (2 * math.pi * math.e * std.square()).log()).sum())
    with torch.no_grad():
        log_prob = model.log_prob(obs[held], action[held], next_obs[held])
        assert float(-log_prob.mean()) == pytest.approx(entropy, abs=0.15)
        mean = obs[held] @ A.T.float() + action[held] @ B.T.float()
        assert float((model.next_mean(obs[held], action[held]) - mean).square().mean().sqrt()) < 0.03
        assert float((model.reward(obs[held], action[held]) - reward[held]).square().mean().sqrt()) < 0.05
    scale = float(model.delta_std.log().sum())
    assert float(logs["dynamics_nll"]) * OBS + scale == pytest.approx(entropy, abs=0.15)


def test_validation_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    data = (*transitions(50), torch.rand(50))
    whole = model_of().validate(*data)
    monkeypatch.setattr("lit_diffrl.methods.world_model.VALIDATION_ROWS", 7)
    pieces = model_of().validate(*data)
    assert whole.keys() == pieces.keys() == {"dynamics_mse", "dynamics_nll", "reward_mse", "stopped"}
    for name in whole:
        assert whole[name].shape == ()
        torch.testing.assert_close(whole[name], pieces[name])


# ------------------------------------------------------------------ early stopping, elites, checkpoints


def validate_with(model: WorldModel, errors: list[float]) -> None:
    """One validation whose held-out errors are the given ones; the weights carry the error as a mark."""
    with torch.no_grad():
        for member, error in enumerate(errors):
            for weight in model.transition.parameters():
                weight[member] = error
    model.best_transition.update(model.transition, torch.tensor(errors))


def marks(model: WorldModel) -> list[float]:
    assert all(
        (w == w.flatten(1)[:, :1].reshape(-1, *[1] * (w.dim() - 1))).all() for w in model.transition.parameters()
    )
    return [round(float(x), 4) for x in model.transition.net.layers[0].bias[:, 0, 0].detach()]


def test_members_stop_one_by_one_and_get_their_best_weights_back() -> None:
    model = model_of(patience=1, improvement=0.01)
    validate_with(model, [3.0, 2.0, 1.0])
    validate_with(model, [2.0, 2.5, 0.995])  # member 2 improves by less than 1 %
    assert model.stopped.tolist() == [False, False, False]
    validate_with(model, [2.5, 1.9, 1.2])
    assert model.stopped.tolist() == [False, False, True]
    validate_with(model, [1.5, 2.2, 0.1])  # a stopped member is not taken up again
    validate_with(model, [math.nan, 2.1, 0.1])
    assert model.stopped.tolist() == [False, True, True]
    assert [round(float(x), 4) for x in model.best_transition.error] == [1.5, 1.9, 1.0]
    model.finish()
    assert marks(model) == [1.5, 1.9, 1.0]
    assert model.elite.tolist() == [2, 0]


def test_snapshots_are_copies() -> None:
    net = EnsembleMLP(2, [1, 1])
    best = BestWeights(net, 2, 3, 0.0)
    best.update(net, torch.tensor([1.0, 1.0]))
    saved = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net.layers[0].weight += 1
    best.restore(net)
    assert all(torch.equal(v, saved[k]) for k, v in net.state_dict().items())


def test_elites_predict_and_the_others_do_not() -> None:
    model = model_of(members=4, elites=2)
    model.best_transition.error.copy_(torch.tensor([4.0, 1.0, 3.0, 2.0]))
    model.best_transition.restore(model.transition)
    model.finish()
    assert model.elite.tolist() == [1, 3]
    obs, action, next_obs = transitions(5)
    mean, _ = model.transition(torch.cat([obs, action], -1))
    torch.testing.assert_close(model.next_mean(obs, action), obs + mean[[1, 3]].mean(0))
    before = model.log_prob(obs, action, next_obs)
    with torch.no_grad():
        for weight in model.transition.parameters():
            weight[[0, 2]] = 7.0
    torch.testing.assert_close(model.log_prob(obs, action, next_obs), before)


def test_diverged_members_are_not_elites_and_too_many_are_an_error() -> None:
    model = model_of(members=3, elites=2)
    with pytest.raises(ConfigError, match="0 of 3 members"):
        model.finish()
    validate_with(model, [math.nan, 2.0, math.inf])
    with pytest.raises(ConfigError, match="1 of 3 members"):
        model.finish()
    validate_with(model, [math.nan, 3.0, 1.0])
    model.finish()
    assert model.elite.tolist() == [2, 1]


def test_the_reward_model_stops_too() -> None:
    model = model_of(patience=0)
    obs, action, next_obs = transitions(20)
    reward = torch.rand(20)
    assert model.reward_loss(obs, action, reward) > 0
    model.validate(obs, action, next_obs, reward)
    model.validate(obs, action, next_obs, reward)
    loss = model.reward_loss(obs, action, reward)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(w.grad is not None and not w.grad.any() for w in model.reward_net.parameters())
    best = model.reward(obs, action)
    with torch.no_grad():
        for weight in model.reward_net.parameters():
            weight += 1
    model.finish()
    assert torch.equal(model.reward(obs, action), best)


def test_a_checkpoint_in_the_middle_of_training_resumes_exactly() -> None:
    data = (*transitions(40), torch.rand(40))

    def step(model: WorldModel, optimizer: torch.optim.Optimizer, index: int) -> None:
        obs, action, next_obs = transitions(3, 16, seed=index)
        loss = model.transition_loss(obs, action, next_obs)[~model.stopped].sum()
        optimizer.zero_grad()
        (loss + model.reward_loss(obs[0], action[0], obs[0, :, 0])).backward()
        optimizer.step()
        with torch.inference_mode():  # as in Lightning's validation loop
            model.validate(*data)

    def start() -> tuple[WorldModel, torch.optim.Optimizer]:
        model = model_of(patience=3, improvement=0.01)
        return model, torch.optim.Adam(model.parameters(), lr=0.05)

    model, optimizer = start()
    model.fit_scales(torch.randn(50, OBS))
    for index in range(24):
        step(model, optimizer, index)
        if index == 7:
            waiting = model.best_transition.waiting.clone()
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, other = start()
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for index in range(8, 24):
        step(resumed, other, index)
    assert waiting.any() and model.stopped.any()  # members were waiting when saved, and stopped later
    model.finish()
    resumed.finish()
    for (name, a), b in zip(model.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name


# ------------------------------------------------------------------ prediction


def test_shapes_for_any_leading_dimensions() -> None:
    model = model_of()
    for shape in ((), (4,), (2, 5), (2, 1, 3)):
        obs, action, next_obs = transitions(*shape)
        assert model.next_mean(obs, action).shape == (*shape, OBS)
        for mixture in (False, True):
            assert model.log_prob(obs, action, next_obs, mixture).shape == shape
        assert model.reward(obs, action).shape == shape
        assert model.disagreement(obs, action).shape == shape
        assert [x.shape for x in model.mean_var(obs, action)] == [(*shape, OBS)] * 2
        assert [x.shape for x in model.sample(obs, action)] == [(*shape, OBS), shape]
    obs, action, next_obs = transitions(2, 5)
    torch.testing.assert_close(
        model.log_prob(obs, action, next_obs)[1, 3], model.log_prob(obs[1, 3], action[1, 3], next_obs[1, 3])
    )


def transition_error(model: WorldModel, obs: Tensor, action: Tensor, mask: Tensor) -> Tensor:
    """DMEMM's Eq. 9 on one window; ``mask`` marks its real rows."""
    error = (obs[1:] - model.next_mean(obs[:-1], action[:-1])).square().sum(-1)
    return (error * mask[1:]).sum()


def test_transition_error_of_true_linear_dynamics() -> None:
    model = linear_model(A, B)
    action = transitions(8)[1].double()
    rows = [torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)]
    for t in range(7):
        rows.append(A @ rows[-1] + B @ action[t])
    obs = torch.stack(rows).requires_grad_()
    action.requires_grad_()
    mask = torch.ones(8)
    loss = transition_error(model, obs, action, mask)
    assert float(loss.detach()) < 1e-25
    assert max(float(g.abs().max()) for g in torch.autograd.grad(loss, (obs, action))) < 1e-12

    delta = torch.tensor([0.1, -0.3, 0.2], dtype=torch.float64)
    moved = obs.detach().clone()
    moved[4] += delta
    expected = delta.square().sum() + (A @ delta).square().sum()
    torch.testing.assert_close(transition_error(model, moved, action, mask).detach(), expected)
    mask[4:] = 0  # the window's end is padding from row 4 on
    assert float(transition_error(model, moved, action, mask).detach()) < 1e-25


@pytest.mark.parametrize("mixture", [False, True])
def test_guidance_gradient_of_a_linear_gaussian_model(mixture: bool) -> None:
    std = torch.tensor([0.2, 0.5, 1.5], dtype=torch.float64)
    model = linear_model(A, B, std)
    obs, action, next_obs = (x.double().requires_grad_() for x in transitions(4))
    grads = torch.autograd.grad(model.log_prob(obs, action, next_obs, mixture).sum(), (obs, action, next_obs))
    residual = (next_obs - obs @ A.T - action @ B.T).detach()
    pull = residual / std.square()
    for found, expected in zip(grads, (pull @ A, pull @ B, -pull)):
        torch.testing.assert_close(found, expected)
    density = torch.distributions.Normal(torch.zeros(OBS, dtype=torch.float64), std).log_prob(residual).sum(-1)
    torch.testing.assert_close(model.log_prob(obs, action, next_obs, mixture).detach(), density)


def test_gradients_pass_through_and_leave_the_parameters_alone() -> None:
    model = model_of()
    theta = torch.ones((), requires_grad=True)
    obs, action, next_obs = (x.requires_grad_() for x in transitions(4))
    loss = (
        (next_obs - model.next_mean(theta * obs, action)).square().sum()
        + model.log_prob(obs, theta * action, next_obs).sum()
        + model.reward(theta * obs, action).sum()
        + sum(x.sum() for x in model.mean_var(obs, action))
        + model.disagreement(obs, action).sum()
    )
    loss.backward()
    assert theta.grad is not None and theta.grad != 0
    assert all(x.grad is not None and x.grad.any() for x in (obs, action, next_obs))
    assert all(p.grad is None for p in model.parameters())


def test_average_and_mixture_of_elites() -> None:
    model = linear_model(A, B, std=1.0)
    with torch.no_grad():  # two elites: means 0 and 2, variances 1 and 3, of every dimension
        bias = model.transition.net.layers[0].bias
        bias[1, 0, :OBS] += 2 / model.delta_std
        bias[1, 0, OBS:] += math.log(3)
    zero = (torch.zeros(OBS, dtype=torch.float64), torch.zeros(ACTION, dtype=torch.float64))
    mean, var = model.mean_var(*zero)
    torch.testing.assert_close(mean, torch.ones_like(mean))
    torch.testing.assert_close(var, torch.full_like(var, 3.0))
    assert float(model.disagreement(*zero).detach()) == pytest.approx(1.0)
    point = torch.full_like(mean, 0.5)
    normal = torch.distributions.Normal
    each = torch.stack([normal(m, v**0.5).log_prob(point).sum() for m, v in ((0.0, 1.0), (2.0, 3.0))])
    torch.testing.assert_close(model.log_prob(*zero, point).detach(), each.mean())
    torch.testing.assert_close(model.log_prob(*zero, point, mixture=True).detach(), each.logsumexp(0) - math.log(2))


def test_variance_is_floored_in_units_of_the_differences() -> None:
    model = linear_model(A, B, std=1e-6)
    model.variance_floor = 0.01
    obs, action, _ = (x.double() for x in transitions(6))
    _, var = model.mean_var(obs, action)
    torch.testing.assert_close(var, (0.01 * model.delta_std.square()).expand_as(var))
    next_obs = (model.next_mean(obs, action) + model.delta_std).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_prob(obs, action, next_obs).sum(), next_obs)
    torch.testing.assert_close(gradient * model.delta_std, torch.full_like(gradient, -100.0))


def test_samples_come_from_random_elites() -> None:
    model = linear_model(A, B, std=0.3)
    with torch.no_grad():
        model.transition.net.layers[0].bias[1, 0, :OBS] += 4 / model.delta_std
    obs, action = (torch.zeros(8000, d, dtype=torch.float64) for d in (OBS, ACTION))

    def sample(noise: bool) -> tuple[Tensor, Tensor]:
        return model.sample(obs, action, torch.Generator().manual_seed(0), noise=noise)

    mean, reward = sample(noise=False)
    assert mean.unique(dim=0).shape[0] == 2
    assert float((mean[:, 0] > 2).double().mean()) == pytest.approx(0.5, abs=0.03)
    drawn, _ = sample(noise=True)
    assert torch.equal(drawn, sample(noise=True)[0])
    torch.testing.assert_close((drawn - mean).std(0), torch.full((OBS,), 0.3, dtype=torch.float64), atol=0.01, rtol=0)
    torch.testing.assert_close(reward, model.reward(obs, action))
    assert not drawn.requires_grad


@pytest.mark.parametrize("activation", ["silu", "mish", "relu"])
def test_the_reward_model_has_the_activation_it_is_given(activation: str) -> None:
    model = model_of(reward_activation=activation)
    x, layers = torch.randn(5, OBS + ACTION), model.reward_net.layers
    hidden = {"silu": nn.functional.silu, "mish": nn.functional.mish, "relu": nn.functional.relu}[activation]
    raw = layers[2](hidden(layers[1](hidden(layers[0](x)))))[0, :, 0]
    torch.testing.assert_close(model.reward(x[:, :OBS], x[:, OBS:]), model._bounded(raw))


@pytest.mark.parametrize(("low", "high"), [(-0.5, 1.0), (0.0, 1.0), (0.98, 0.99), (0.7, 0.7)])
def test_reward_is_bounded_softly(low: float, high: float) -> None:
    model = model_of(reward_low=low, reward_high=high, reward_layers=0)
    obs, action, _ = transitions(1000)
    far = model.reward(1e4 * obs, 1e4 * action)
    assert far.isfinite().all()
    assert low - 1e-6 <= float(far.min()) and float(far.max()) <= high + 1e-6
    raw = torch.linspace(-2, 2, 401, requires_grad=True)
    bounded = model._bounded(raw)
    span = high - low
    assert float(bounded[200].detach()) == pytest.approx((low + high) / 2)
    (slope,) = torch.autograd.grad(bounded.sum(), raw)
    assert (slope >= 0).all()
    torch.testing.assert_close(slope[180:221], torch.full((41,), span), rtol=0.05, atol=1e-6)  # linear inside
    # the ends of the range can be learned
    assert float(bounded[0].detach()) == pytest.approx(low, abs=1e-5 + 1e-4 * span)
    assert float(bounded[-1].detach()) == pytest.approx(high, abs=1e-5 + 1e-4 * span)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 3, "elites": 4}, r"elites must be in \[1, 3\], got 4"),
        ({"members": 0}, "members"),
        ({"reward_low": 1.0, "reward_high": 0.0}, "reward_high"),
        ({"variance_floor": -1.0}, "variance_floor"),
        ({"logvar_low": 1.0}, "logvar_high"),
        ({"activation": "tanh"}, "activation"),
        ({"hidden": 0}, "positive widths"),
        ({"patience": -1}, "patience"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of(**options)


def test_a_pessimistic_reward_lies_below_the_mean_of_its_members() -> None:
    obs, action = torch.randn(6, 7, OBS), torch.randn(6, 7, ACTION)
    plain, careful = model_of(reward_members=4), model_of(reward_members=4, reward_pessimism=1.5)
    careful.load_state_dict(plain.state_dict())
    members = plain._bounded(plain.reward_net(torch.cat([obs, action], -1).flatten(0, -2))[..., 0]).view(4, 6, 7)
    assert torch.allclose(plain.reward(obs, action), members.mean(0), atol=1e-6)
    expected = members.mean(0) - 1.5 * members.std(0, correction=0)
    assert torch.allclose(careful.reward(obs, action), expected, atol=1e-5)
    with pytest.raises(ConfigError, match="reward_members"):
        model_of(reward_members=1, reward_pessimism=1.0)
