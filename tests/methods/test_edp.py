"""EDP's learners and Diffusion-QL against direct formulas: weights, likelihoods, normalisers, order (oracles 11 to 21).

What an update computes is read off the losses it descends, at networks whose every state is known.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from printed import digits
from short_runs import ROOT, UPDATES, Config, curves
from small_learners import ACTION, OBS, at_each_step, batch, same, transitions, weights
from torch import Tensor, nn

from lit_diffrl.__main__ import main
from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import EDPCRR, EDPIQL, EDPTD3, DiffusionQL
from lit_diffrl.methods.diffusion_policy import Noised
from lit_diffrl.methods.losses import elbo_weights

SMALL: dict[str, Any] = {"n_diffusion_steps": 25, "net": {"hidden": 16}, "critic": {"hidden": 16, "layers": 2}}


def built(kind: type[Any], **options: Any) -> Any:
    """A small learner that ``training_step`` trains without a Trainer."""
    torch.manual_seed(0)
    given = {k: {**SMALL[k], **v} if isinstance(SMALL.get(k), dict) else v for k, v in options.items()}
    method = kind(**{**SMALL, **given})
    rows = torch.zeros(2, OBS + ACTION)
    method.build(transitions(rows[:, :OBS], rows[:, OBS:], torch.zeros(2)).spec)
    found = method.configure_optimizers()
    method.optimizers = lambda: found
    method.manual_backward = lambda loss: loss.backward()
    method.draws.begin(method.draws.place, torch.device("cpu"))
    return method


def watch_noised(method: Any) -> list[Noised]:
    """The policy's noised batches, as they are made."""
    made: list[Noised] = []
    noised = method.policy.noised

    def watched(*args: Any) -> Noised:
        made.append(noised(*args))
        return made[-1]

    method.policy.noised = watched
    return made


def log_density(action: Tensor, a_hat: Tensor) -> Tensor:
    return torch.distributions.Normal(a_hat, 1.0).log_prob(action).sum(-1)


class Square(nn.Module):
    """Two critics: minus the squared length of the action, and one less; they keep what they were asked."""

    asked: Tensor

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        if action.dim() == 3:
            self.asked = action
        q = -action.square().sum(-1)
        return torch.stack([q, q - 1])


# ---------------------------------------------------------------- EDP-IQL


@pytest.mark.parametrize(("normalize", "objective"), [(False, "mle"), (True, "mle"), (False, "elbo")])
def test_edp_iql_goes_from_value_to_policy_to_critics_each_seeing_the_one_before(
    normalize: bool, objective: str
) -> None:
    """At rates that show, every loss is the formula's at that moment's networks; targets and average move last."""
    method = built(
        EDPIQL, eta=3.0, lr=0.1, guide_weight=0.5, normalize_weights=normalize, objective=objective,
        critic={"lr": 0.1}, ema={"every": 1, "start": 0},
    )  # fmt: skip
    data, made, order = batch(), watch_noised(method), list[str]()
    slow = (method.target_critic.net, method.policy_ema.net)
    before = [weights(net) for net in slow]

    def look(name: str, loss: Tensor) -> None:
        order.append(name)
        assert all(same(old, weights(net)) for old, net in zip(before, slow)), "targets and average move last"
        v, v_next = method.value(data.obs).detach(), method.value(data.next_obs).detach()
        advantage = method.target_critic.net(data.obs, data.action).min(0).values.detach() - v
        if name == "value":
            expected = (torch.where(advantage > 0, 0.7, 0.3) * advantage**2).mean()
        elif name == "policy":
            f = (3 * advantage).exp().clamp(max=100)
            f = f / f.mean() if normalize else f
            log_prob = log_density(data.action, method.policy.approximate(made[-1]))
            if objective == "elbo":
                log_prob = -elbo_weights(Schedule("linear", 25)).float()[made[-1].k - 1] * made[-1].error
            expected = made[-1].error.mean() - 0.5 * (f * log_prob).mean()
        else:
            y = data.reward + 0.99 * v_next
            q = method.critic(data.obs, data.action)
            expected = (q[0] - y).square().mean() + (q[1] - y).square().mean()
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)

    at_each_step(method, look)
    for _ in range(2):
        method.training_step(data, 0)
        assert not any(same(old, weights(net)) for old, net in zip(before, slow))
        before = [weights(net) for net in slow]
    assert order == ["value", "policy", "critic"] * 2


def test_edp_iql_is_bounded_where_the_advantage_is_ln_100_over_eta() -> None:
    """Oracle 11: 1.535057 at eta 3."""
    for over, f in ((1.5350, math.exp(3 * 1.5350)), (1.535057, 100.0), (1.54, 100.0), (50.0, 100.0)):
        method = built(EDPIQL, eta=3.0, critic={"lr": 1e-30}, lr=1e-30)
        with torch.no_grad():
            for net in (method.target_critic.net.head, method.value.net[-1]):
                net.weight.zero_()
                net.bias.zero_()
            method.target_critic.net.head.bias.add_(over)
        made, losses = watch_noised(method), dict[str, float]()
        at_each_step(method, lambda name, loss, losses=losses: losses.update({name: float(loss)}))  # type: ignore[misc]
        data = batch()
        method.training_step(data, 0)
        guide = -f * log_density(data.action, method.policy.approximate(made[0])).mean()
        assert losses["policy"] == pytest.approx(float(made[0].error.mean() + guide), rel=1e-4)


@pytest.mark.parametrize("kind", [EDPTD3, EDPCRR, EDPIQL, DiffusionQL])
def test_the_policys_step_leaves_gradients_on_the_policy_alone(kind: type[Any]) -> None:
    method = built(kind)
    own, seen = {*method.policy.parameters()}, []

    def others() -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in method.parameters() if p not in own]

    method.training_step(batch(), 0)
    descend = method.descend

    def watched(optimizer: Any, loss: Tensor, name: str, *args: Any) -> Tensor:
        before = others()
        norm: Tensor = descend(optimizer, loss, name, *args)
        if name == "policy":
            seen.append(name)
            for old, new in zip(before, others()):
                assert (old is None) == (new is None) and (old is None or torch.equal(old, new))  # type: ignore[arg-type]
        return norm

    method.descend = watched
    method.training_step(batch(), 0)
    assert seen


# ---------------------------------------------------------------- EDP-CRR


def test_the_value_of_edp_crr_is_that_of_actions_around_eq_9_in_no_box() -> None:
    method = built(EDPCRR, candidates=4000, beta=2.0)
    method.critic = Square()
    data, a_hat = batch(), 1.8 * torch.rand(16, ACTION) - 0.9
    found = method.weights(data, a_hat)
    asked = method.critic.asked
    assert asked.shape == (16, 4000, ACTION) and float(asked.abs().max()) > 3
    torch.testing.assert_close(asked.mean(1), a_hat, atol=0.08, rtol=0)
    torch.testing.assert_close(asked.std(1), torch.ones(16, ACTION), atol=0.05, rtol=0)
    value = -1 - (a_hat.square().sum(-1) + ACTION)
    advantage = -1 - data.action.square().sum(-1) - value
    torch.testing.assert_close(found, (advantage / 2).exp().clamp(max=20), rtol=0.1, atol=0)


@pytest.mark.parametrize("std", [0.0, 0.1])
def test_the_value_of_edp_crr_is_the_best_of_its_candidates_or_their_mean(std: float) -> None:
    """Of actions as wide as told around Eq. 9's."""
    data, a_hat, found = batch(), 1.8 * torch.rand(16, ACTION) - 0.9, dict[str, Tensor]()
    for over in ("mean", "max"):
        method = built(EDPCRR, candidates=50, candidate_std=std, advantage=over, weighting="softmax", beta=3.0)
        method.critic = Square()
        found[over] = method.weights(data, a_hat)
        asked = method.critic.asked
        torch.testing.assert_close((asked - a_hat[:, None]).std(1), torch.full((16, ACTION), std), atol=0.05, rtol=0)
        value = -1 - asked.square().sum(-1)
        value = value.mean(1) if over == "mean" else value.max(1).values
        torch.testing.assert_close(found[over], ((-1 - data.action.square().sum(-1) - value) / 3).softmax(0))
    if std == 0:
        torch.testing.assert_close(found["mean"], found["max"])


def test_scaled_to_a_mean_of_1_a_softmax_is_the_exponential_without_its_bound() -> None:
    """EDP's ``adv_norm`` differs from the exponential only in the size of the weights, where no bound is met."""
    advantage = torch.linspace(-3, 2, 16)
    for learner in (built(EDPCRR, weighting=kind, normalize_weights=True) for kind in ("exp", "softmax")):
        torch.testing.assert_close(learner.settle(learner.weigh(advantage)), 16 * advantage.softmax(0))
    over = torch.tensor([0.0, 10.0])
    torch.testing.assert_close(built(EDPCRR, weighting="softmax").weigh(over), over.softmax(0))
    assert built(EDPCRR).weigh(over).tolist() == pytest.approx([1.0, 20.0])


def test_the_width_of_candidates_that_the_policy_draws_is_its_own() -> None:
    with pytest.raises(ConfigError, match="candidate_std 0.5 is for candidates around .* leave one of them out"):
        EDPCRR(candidate_std=0.5, action_approximation=False)


def test_without_eq_9_the_value_of_edp_crr_is_that_of_the_policys_own_actions() -> None:
    method = built(EDPCRR, candidates=3, action_approximation=False)
    method.critic = Square()
    method.weights(batch(), torch.full((16, ACTION), 100.0))
    assert method.critic.asked.shape == (16, 3, ACTION) and float(method.critic.asked.abs().max()) <= 1


@pytest.mark.parametrize("kind", [EDPTD3, EDPCRR, EDPIQL])
def test_cloning_and_improvement_each_count_by_their_weight(kind: type[Any]) -> None:
    """The gradient of the sum is that of its parts; without cloning's weight only the improvement is left."""
    gradients = {}
    for cloning, guide in ((0.7, 0.3), (1.0, 0.0), (0.0, 1.0)):
        method, found = built(kind, diffusion_weight=cloning, guide_weight=guide), list[Tensor]()

        def look(name: str, loss: Tensor, method: Any = method, found: list[Tensor] = found) -> None:
            if name == "policy":
                found += torch.autograd.grad(loss, list(method.policy.parameters()), retain_graph=True)

        at_each_step(method, look)
        method.training_step(batch(), 0)
        gradients[cloning] = found
    for both, clone, improve in zip(gradients[0.7], gradients[1.0], gradients[0.0], strict=True):
        torch.testing.assert_close(both, 0.7 * clone + 0.3 * improve, rtol=1e-4, atol=1e-6)
        assert float(improve.abs().sum()) > 0


@pytest.mark.parametrize("kind", [EDPCRR, EDPIQL])
def test_the_mean_square_of_draws_has_in_the_mean_the_gradient_of_eq_13_times_2_over_a(kind: type[Any]) -> None:
    rows = 200_000
    width = 5
    action, a_hat = torch.zeros(rows, width), torch.full((rows, width), 0.4, requires_grad=True)
    data, f = batch(16), 1.7 * torch.ones(rows)
    gradients = {}
    for objective in ("mle", "mse"):
        method = built(kind, objective=objective)
        method.improved_action = lambda noised, obs: a_hat
        loss = method.guide_loss(f, None, data._replace(action=action))
        (gradient,) = torch.autograd.grad(loss, a_hat)
        gradients[objective] = gradient.sum(0)
        if objective == "mse":
            assert float(loss) == pytest.approx(1.7 * (0.4**2 + 1), rel=0.01)
    torch.testing.assert_close(gradients["mle"], torch.full((width,), 1.7 * 0.4), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradients["mse"], 2 / width * gradients["mle"], rtol=0.02, atol=0)


@pytest.mark.parametrize("objective", ["mle", "elbo"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_loss_of_edp_crr_is_that_of_cloning_and_the_weighted_likelihood(objective: str, normalize: bool) -> None:
    method = built(EDPCRR, objective=objective, guide_weight=0.3, normalize_weights=normalize)
    made, found, settle = watch_noised(method), list[Tensor](), method.settle

    def watched(f: Tensor) -> Tensor:
        found.extend([f, settle(f)])
        return found[-1]

    method.settle = watched
    data = batch()
    losses = method.policy_loss(data)
    f, used = found
    torch.testing.assert_close(used, f / f.mean() if normalize else f)
    (noised,) = made
    if objective == "mle":
        expected = -(used * log_density(data.action, method.policy.approximate(noised))).mean()
    else:
        omega = elbo_weights(Schedule("linear", 25)).float()
        expected = (used * omega[noised.k - 1] * noised.error).mean()
    assert float(losses["guide"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(losses["total"]) == pytest.approx(float(noised.error.mean() + 0.3 * expected), rel=1e-5)


def test_weights_that_are_all_0_stay_so_when_scaled() -> None:
    method = built(EDPCRR, weighting="indicator", normalize_weights=True)
    assert method.settle(torch.zeros(8)).tolist() == [0.0] * 8


def test_eq_12_is_refused_with_a_cosine_schedule_whose_last_step_has_nearly_all_weight() -> None:
    shares = [float(elbo_weights(Schedule("cosine", k))[-1]) / k for k in (50, 100, 1000)]
    assert min(shares) > 0.9 and shares[1] == pytest.approx(0.98, abs=0.005)
    for kind in (EDPCRR, EDPIQL):
        with pytest.raises(ConfigError, match="'elbo'.* schedule 'linear' or 'vp'"):
            kind(objective="elbo", schedule="cosine")
        kind(objective="mle", schedule="cosine")


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.Tanh])
@pytest.mark.parametrize("on", [False, True])
def test_the_value_is_a_network_like_the_critics(kind: type[nn.Module], on: bool) -> None:
    method = built(EDPIQL, critic={"layer_norm" if kind is nn.LayerNorm else "first_tanh": on})
    assert any(isinstance(layer, kind) for layer in method.value.modules()) == on


def test_the_papers_weight_of_eq_12_is_infinite_at_the_first_step() -> None:
    """Oracle 12: what the code's weight replaces."""
    schedule = Schedule("linear", 1000)
    beta, alpha, alpha_bar = (schedule.exact(name) for name in ("beta", "alpha", "alpha_bar"))
    paper = beta[1:] / (2 * alpha[1:] * (1 - alpha_bar[:-1]))
    assert math.isinf(paper[0]) and float(paper[1]) == digits("0.599672")
    assert bool(elbo_weights(schedule).isfinite().all())


# ---------------------------------------------------------------- EDP-TD3 and Diffusion-QL


def improvement(kind: type[Any], factors: tuple[float, float]) -> tuple[float, list[Tensor]]:
    """Loss and policy gradient of an update whose critics are multiplied by these."""
    method = built(kind)
    with torch.no_grad():
        for p in (method.critic.head.weight, method.critic.head.bias):
            p.mul_(torch.tensor(factors).view(2, 1, 1))
    loss = method.policy_loss(batch())["total"]
    loss.backward()
    return float(loss), [p.grad for p in method.policy.parameters()]


@pytest.mark.parametrize("kind", [EDPTD3, DiffusionQL])
def test_the_scale_of_the_critics_does_not_matter_that_of_one_of_two_does_to_diffusion_ql(kind: type[Any]) -> None:
    """Oracle 13: EDP divides by the critic that it follows, Diffusion-QL by the other."""
    plain = improvement(kind, (1.0, 1.0))
    for factors in ((7.0, 7.0), (7.0, 1.0), (1.0, 7.0)):
        scaled = improvement(kind, factors)
        same_loss = scaled[0] == pytest.approx(plain[0], rel=1e-5)
        assert same_loss == (kind is EDPTD3 or factors[0] == factors[1])
        if same_loss:
            for a, b in zip(plain[1], scaled[1]):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_gradient_of_edp_td3_is_that_of_the_critic_before_its_step_and_of_diffusion_ql_after() -> None:
    """Oracle 21."""
    for kind, sees_new in ((EDPTD3, False), (DiffusionQL, True)):
        method = built(kind, critic={"lr": 0.1, "grad_clip": None}, grad_clip=None)
        frozen = built(kind).critic
        frozen.load_state_dict(method.critic.state_dict())
        seen: dict[str, list[Tensor]] = {}
        policy_loss = method.policy_loss

        def with_frozen(
            data: Any, method: Any = method, policy_loss: Any = policy_loss, frozen: Any = frozen, seen: Any = seen
        ) -> dict[str, Tensor]:
            state = method.draws._generator.get_state()
            now, method.critic = method.critic, frozen
            seen["old"] = list(torch.autograd.grad(policy_loss(data)["total"], list(method.policy.parameters())))
            method.critic = now
            method.draws._generator.set_state(state)
            losses: dict[str, Tensor] = policy_loss(data)
            return losses

        method.policy_loss = with_frozen
        method.training_step(batch(), 0)
        assert same([p.grad for p in method.policy.parameters()], seen["old"]) != sees_new


def test_the_rate_of_the_policy_is_half_in_the_middle_of_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle 16: 1.5e-4 at epoch 1000 of 2000."""
    method = built(EDPTD3, lr_decay="cosine", policy_epochs=2000, lr=3e-4)
    (_, optimizer) = method.optimizers()
    loop = type("Loop", (), {"epoch_loop": type("E", (), {"batch_idx": 0})})
    method._trainer = type("T", (), {"num_training_batches": 1000, "fit_loop": loop, "current_epoch": 0})
    for epoch, lr in ((0, 3e-4), (1000, 1.5e-4), (1999, 3e-4 * (1 - math.cos(math.pi / 2000)) / 2)):
        method._trainer.current_epoch = epoch
        method.anneal(optimizer)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-6)


# ---------------------------------------------------------------- offline selection


@pytest.mark.parametrize("kind", [EDPTD3, EDPCRR, EDPIQL, DiffusionQL])
def test_an_update_returns_the_loss_that_selection_goes_by(kind: type[Any]) -> None:
    method = built(kind)
    made = watch_noised(method)
    outputs = method.training_step(batch(), 0)
    torch.testing.assert_close(outputs[method.offline_loss], made[0].error.mean().detach())


@pytest.mark.parametrize("path", ["dql.yaml", "dydiff_dql.yaml"])
def test_a_run_keeps_the_evaluation_of_least_loss(
    path: str, mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss of an evaluation is the mean of what the curve, which here has every update, shows since the last."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(tmp_path)
    options = ("--rollout.every_n_epochs=1", "--model.policy_epochs=4", "--rollout.select=offline")
    Config(ROOT / "conf" / path).fit("run", *options, "--rollout.select_rank=1")
    found = curves("run", ("loss/diffusion", "eval/loss"))
    losses = [value for _, value in found["loss/diffusion"]][-4 * UPDATES :]
    means = [sum(losses[i : i + UPDATES]) / UPDATES for i in range(0, len(losses), UPDATES)]
    assert [value for _, value in found["eval/loss"]] == pytest.approx(means, rel=1e-5)
    (best,) = Path("tb_logs").glob("*/*/run/checkpoints/best.ckpt")
    first = torch.load(best.with_name("last.ckpt"), weights_only=True)["epoch"] - 3
    assert torch.load(best, weights_only=True)["epoch"] - first == means.index(sorted(means)[1])
    assert "offline (rank 1)" in capsys.readouterr().out


# ---------------------------------------------------------------- options of the sampler


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "ddim", "method": "multistep"}, "sampler.method 'multistep' is for sampler.name 'dpm'"),
        ({"name": "ddpm", "final_denoise": True}, "sampler.final_denoise True is for sampler.name 'dpm'"),
        ({"name": "ddpm", "order": 2}, "sampler.order 2 is for .*leave sampler.order at 3"),
        ({"name": "ddpm", "grid": "logsnr"}, "sampler.grid 'logsnr' is for"),
        ({"name": "dpm", "grid": "logSNR"}, "sampler.grid must be one of time_uniform, logsnr"),
        ({"name": "dpm", "variant": "tailor"}, "did you mean 'taylor'"),
    ],
)
def test_a_sampler_is_given_its_own_options_only(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EDPTD3(sampler=options)


def test_a_policy_that_would_learn_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="guide_weight and model.diffusion_weight are both 0"):
        EDPTD3(guide_weight=0, diffusion_weight=0)


def test_what_a_partial_group_leaves_out_is_the_learners_own_default() -> None:
    edp = EDPTD3(sampler={"steps": 10}, critic={"lr": 1e-3}, ema={"decay": 0.9}, selection={"temperature": 2.0})
    assert (edp.sampler.name, edp.sampler.steps, edp.eval_sampler) == ("dpm", 10, edp.sampler)
    assert (edp.critic_options.lr, edp.critic_options.grad_clip, edp.critic_options.clip_each) == (1e-3, 5.0, True)
    assert (edp.ema_options.decay, edp.ema_options.every, edp.ema_options.start) == (0.9, 5, 1001)
    assert EDPTD3().sampler.calls(1000) == 15
    ablation = EDPTD3(sampler={"name": "ddpm"}).sampler
    assert ablation.calls(1000) == 1000, "without the solver every step is taken (Fig. 2)"
    dql = DiffusionQL(selection={"temperature": 2.0}, ema={"decay": 0.9})
    assert (dql.selection.candidates, dql.selection.critic, dql.sampler.name) == (50, "target", "ddpm")
    assert (dql.ema_options.every, dql.ema_options.start) == (5, 1001)


# ---------------------------------------------------------------- what an evaluation says of the choice


def test_an_evaluation_logs_how_undecided_the_choice_among_candidates_was(
    mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(tmp_path)
    config = Config(ROOT / "conf/edp_td3.yaml")
    for temperature, low, high in ((1e6, 0.999, 1.0), (0.0, 0.0, 0.0)):
        run = f"t{temperature:g}"
        config.fit(run, f"--model.selection.temperature={temperature}", "--rollout.every_n_epochs=1")
        found = curves(run, ("eval/indecision",))["eval/indecision"]
        assert len(found) == 2 and all(low <= value <= high for _, value in found)
    config.fit("alone", "--model.selection.candidates=1", "--rollout.every_n_epochs=1")
    assert curves("alone", ("eval/indecision",)) == {}


# ---------------------------------------------------------------- controlled sampling of a trained policy


def test_the_command_line_decides_how_a_trained_policy_is_sampled(
    mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates, solver, steps, policy scaling, initial noise: by ``test`` alone, and each is another way to act."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(tmp_path)
    Config(ROOT / "conf/edp_td3.yaml").fit("run", "--model.n_diffusion_steps=10", "--model.schedule=vp")
    (last,) = Path("tb_logs").glob("*/*/run/checkpoints/last.ckpt")

    def played(*options: str) -> tuple[dict[str, Any], list[float]]:
        before = set(last.parents[1].glob("results/*.json"))
        given = (f"--model.{option}" for option in options)
        assert main(["test", "--ckpt_path", str(last), "--rollout.max_steps=10", *given]) == 0
        (path,) = set(last.parents[1].glob("results/*.json")) - before
        found = json.loads(path.read_text())
        return found["options"], [episode["return"] for episode in found["episodes"]]

    usual, returns = played()
    ways = {
        "selection.candidates=1": ("selection", "candidates", 1),
        "eval_sampler.steps=5": ("eval_sampler", "steps", 5),
        "eval_sampler.name=ddim": ("eval_sampler", "name", "ddim"),
        "eval_sampler.eps_scale=1.5": ("eval_sampler", "eps_scale", 1.5),
        "eval_sampler.noise_scale=0.3": ("eval_sampler", "noise_scale", 0.3),
    }
    seen = [returns]
    for option, (group, name, value) in ways.items():
        options, found = played(option)
        assert options[group][name] == value and options["sampler"] == usual["sampler"]
        assert found not in seen, f"{option} changes nothing"
        seen.append(found)
    assert played()[1] == returns, "the checkpoint is what it was"
