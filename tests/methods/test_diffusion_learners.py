"""EDP's three learners and Diffusion-QL: what an update computes, in which order, and where it leads on a bandit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lit_diffrl.data import PolicyBatch, TransitionData
from lit_diffrl.data.episodes import Episodes
from lit_diffrl.data.sources import SourceInfo
from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods.diffusion_learner import DiffusionLearner
from lit_diffrl.methods.diffusion_policy import DiffusionPolicy, Noised
from lit_diffrl.methods.dql import DiffusionQL
from lit_diffrl.methods.edp import EDPCRR, EDPIQL, EDPTD3
from lit_diffrl.methods.energy_options import SolverOptions
from lit_diffrl.methods.policy_options import ActionSamplerOptions, CriticOptions, NoiseNetOptions, SelectionOptions
from lit_diffrl.methods.qgpo import QGPO

LEARNERS: list[type[DiffusionLearner]] = [EDPTD3, EDPCRR, EDPIQL, DiffusionQL]
SMALL: dict[str, Any] = {
    "policy_epochs": 1,
    "n_diffusion_steps": 25,
    "net": {"hidden": 32},
    "critic": {"hidden": 32},
    "ema": {"every": 5, "start": 1},
}


def bandit(n: int = 4000) -> TransitionData:
    """One state, actions near -0.5 and +0.5, reward 1 for the right half; every step ends its episode."""
    generator = torch.Generator().manual_seed(0)
    action = 0.5 * torch.randn(n, 1, generator=generator).sign() + 0.05 * torch.randn(n, 1, generator=generator)
    ends = torch.ones(n, dtype=torch.bool)
    zeros = torch.zeros(n, 2)
    episodes = Episodes(zeros, action, (action[:, 0] > 0).float(), ends, ~ends, zeros, torch.arange(n))
    info = SourceInfo(None, None, None, None, None, None, None, [-1.0], [1.0], ["test/bandit-v0"])
    data = TransitionData("test/bandit-v0", batch_size=64)
    data.load(episodes, info)
    data.prepare_data = lambda: None  # type: ignore[method-assign]
    return data


def fit(method: DiffusionLearner, updates: int) -> DiffusionLearner:
    data = bandit()
    data.updates_per_epoch = updates
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(method, datamodule=data)
    return method


def built(kind: type[DiffusionLearner], **options: Any) -> Any:
    torch.manual_seed(0)
    method = kind(**{**SMALL, **options})
    method.build(bandit().spec)
    return method


def batch(n: int = 16) -> PolicyBatch:
    generator = torch.Generator().manual_seed(1)
    action = torch.rand(n, 1, generator=generator) * 1.8 - 0.9
    zeros = torch.zeros(n)
    return PolicyBatch(torch.zeros(n, 2), action, action[:, 0], torch.zeros(n, 2), zeros + 1, zeros + 0.99)


# ---------------------------------------------------------------- the policy


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-4)])
def test_the_true_noise_gives_the_action_back_at_every_step(dtype: torch.dtype, tolerance: float) -> None:
    """Oracle 7: Eq. 9 is exact for a perfect network."""
    torch.manual_seed(0)
    policy = DiffusionPolicy(2, 3, Schedule("linear", 1000), NoiseNetOptions(hidden=8)).to(dtype)
    k = torch.arange(1, 1001)
    action = torch.rand(1000, 3, dtype=dtype) * 1.8 - 0.9
    eps = torch.randn(1000, 3, dtype=dtype)
    noised = Noised(k, policy.schedule.q_sample(action, k, eps), eps, torch.zeros(1000))
    assert float((policy.approximate(noised) - action).abs().max()) < tolerance


def test_clipped_entries_of_the_approximation_pass_no_gradient() -> None:
    policy = DiffusionPolicy(2, 1, Schedule("linear", 1000), NoiseNetOptions(hidden=8))
    eps_hat = torch.zeros(2, 1, requires_grad=True)
    noised = Noised(torch.tensor([1000, 1]), torch.tensor([[1.0], [0.2]]), eps_hat, torch.zeros(2))
    a_hat = policy.approximate(noised)
    a_hat.sum().backward()
    assert a_hat.flatten().tolist()[0] == 1.0 and eps_hat.grad is not None
    assert eps_hat.grad[0] == 0 and eps_hat.grad[1] != 0


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm"])
def test_actions_are_in_the_box_and_candidates_are_drawn_like_rows(name: str) -> None:
    torch.manual_seed(0)
    policy = DiffusionPolicy(2, 3, Schedule("vp", 10), NoiseNetOptions(hidden=16)).double()
    options = ActionSamplerOptions(name=name, steps=6)  # type: ignore[arg-type]
    obs, noise = torch.randn(4, 2).double(), torch.randn(4, 5, 3).double()
    together = policy.sample(obs, noise, options, torch.zeros_like)
    rows = policy.sample(obs.repeat_interleave(5, 0), noise.flatten(0, 1), options, torch.zeros_like)
    torch.testing.assert_close(together.flatten(0, 1), rows)
    assert float(together.abs().max()) <= 1
    still = ActionSamplerOptions(name=name, steps=6, noise_scale=0)  # type: ignore[arg-type]
    assert torch.equal(policy.sample(obs, noise, still, torch.zeros_like)[:, 0],
                       policy.sample(obs, 2 * noise, still, torch.zeros_like)[:, 1])  # fmt: skip


# ---------------------------------------------------------------- one update


@pytest.mark.parametrize("kind", [EDPTD3, EDPCRR, DiffusionQL])
def test_a_policy_loss_leaves_no_gradient_on_the_critics(kind: type[DiffusionLearner]) -> None:
    method = built(kind)
    method.policy_loss(batch())["total"].backward()
    assert all(p.grad is None for p in method.critic.parameters())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in method.policy.net.parameters())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_guidance_of_td3_is_alpha_whatever_the_values(sign: float) -> None:
    method = built(EDPTD3, alpha=2.0)
    with torch.no_grad():
        method.critic.head.bias.fill_(100 * sign)
    assert float(method.policy_loss(batch())["q"]) == pytest.approx(-2.0 * sign, rel=1e-5)


def test_without_its_guidance_a_learner_is_cloning() -> None:
    for method in (built(EDPTD3, guide_weight=0.0), built(EDPCRR, guide_weight=0.0), built(DiffusionQL, eta=0.0)):
        losses = method.policy_loss(batch())
        assert float(losses["total"]) == float(losses["diffusion"])


def test_the_likelihoods_of_crr() -> None:
    """Eq. 13 with weight f has the gradient of f |a - a_hat|^2 / 2."""
    method = built(EDPCRR, weighting="indicator")
    method.draws.begin(method.draws.place, torch.device("cpu"))
    data, noised = batch(), method.policy.noised(batch().action, batch().obs, method.draws)
    a_hat = method.policy.approximate(noised)
    weights = torch.linspace(0, 2, 16)
    expected = (weights * 0.5 * (data.action - a_hat).square().sum(-1)).mean() + weights.mean() * 0.9189385
    assert float(method.guide_loss(weights, noised, data)) == pytest.approx(float(expected), rel=1e-5)


def seen_by_the_policy(kind: type[Any]) -> tuple[list[float], list[float], list[float]]:
    """First weights of the critic before an update, when the policy takes its gradient, and after it."""
    marks: list[list[float]] = []

    class Watched(kind):  # type: ignore[misc, valid-type]
        def mark(self) -> None:
            marks.append(self.critic.head.weight.flatten()[:3].tolist())

        def training_step(self, batch: PolicyBatch, batch_idx: int) -> None:
            self.mark()
            super().training_step(batch, batch_idx)
            self.mark()

        def policy_loss(self, batch: PolicyBatch) -> dict[str, torch.Tensor]:
            self.mark()
            return super().policy_loss(batch)  # type: ignore[no-any-return]

    fit(Watched(**{**SMALL, "critic": {"hidden": 8, "lr": 0.1}}), 1)
    before, during, after = marks
    return before, during, after


def test_edp_improves_under_the_old_critic_and_diffusion_ql_under_the_new() -> None:
    """Oracle 21."""
    before, during, after = seen_by_the_policy(EDPTD3)
    assert before == during != after
    before, during, after = seen_by_the_policy(DiffusionQL)
    assert before != during == after


@pytest.mark.parametrize(("kind", "first"), [(EDPTD3, 1005), (DiffusionQL, 1001)])
def test_the_average_starts_where_the_code_starts_it(kind: type[DiffusionLearner], first: int) -> None:
    """Oracle 16: until then it is the initial policy; afterwards every fifth update."""
    method = kind(**{k: v for k, v in SMALL.items() if k != "ema"})
    method.build(bandit().spec)
    initial = method.policy_ema.net.net.net[0].weight.clone()  # type: ignore[union-attr, index]
    with torch.no_grad():
        method.policy.net.net[0].weight.add_(1.0)  # type: ignore[operator, union-attr]
    moved, last = [], initial
    for update in range(1, 2001):
        method.policy_ema.update(method.policy)
        now = method.policy_ema.net.net.net[0].weight  # type: ignore[union-attr, index]
        if not torch.equal(now, last):
            moved.append(update)
            last = now.clone()
    assert moved[0] == first and set(torch.tensor(moved).diff().tolist()) == {5} and len(moved) == 200


def test_each_critic_is_clipped_by_itself_or_both_together() -> None:
    for each in (True, False):
        method = built(EDPTD3, critic=CriticOptions(hidden=8, grad_clip=1.0, clip_each=each))
        for p in method.critic.parameters():
            p.grad = torch.ones_like(p)
            p.grad[1] *= 1e-6
        before = torch.nn.utils.get_total_norm([p.grad for p in method.critic.parameters()])
        assert float(method.clip_critics(torch.optim.SGD(method.critic.parameters()))) == pytest.approx(float(before))
        norms = [torch.cat([p.grad[i].flatten() for p in method.critic.parameters()]).norm() for i in (0, 1)]
        assert float(norms[0]) == pytest.approx(1.0, rel=1e-3)
        assert (float(norms[1]) > 1e-5) == each


def test_few_steps_are_refused_to_the_linear_schedule() -> None:
    for kind in (EDPTD3, DiffusionQL):
        with pytest.raises(
            ConfigError, match=r"'linear' needs model.n_diffusion_steps above 20, got 20.*use schedule 'vp'"
        ):
            kind(n_diffusion_steps=20, schedule="linear")
        kind(n_diffusion_steps=21, schedule="linear")


def test_the_ablation_of_eq_9_needs_a_loss_that_asks_for_an_action() -> None:
    with pytest.raises(ConfigError, match="action_approximation false.*objective 'mle'"):
        EDPIQL(action_approximation=False, objective="elbo")


def test_an_action_that_is_not_clipped_is_eq_9s() -> None:
    """The paper's, where the code clips."""
    method = built(EDPTD3, clip_approximation=False)
    k, eps = torch.full((4,), 25), torch.zeros(4, 1)
    noised = Noised(k, torch.ones(4, 1), eps, eps[:, 0])
    signal = float(method.schedule.signal[25])
    torch.testing.assert_close(method.improved_action(noised, torch.zeros(4, 2)), torch.full((4, 1), 1 / signal))
    assert float(built(EDPTD3).improved_action(noised, torch.zeros(4, 2)).max()) == 1 < 1 / signal


def test_diffusion_ql_improves_a_drawn_action_or_the_one_that_cloning_implies() -> None:
    for approximate in (False, True):
        method = built(DiffusionQL, action_approximation=approximate)
        calls: list[int] = []
        method.policy.net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        asked: list[torch.Tensor] = []
        critic = method.critic.forward
        method.critic.forward = lambda obs, action, **k: asked.append(action) or critic(obs, action, **k)  # noqa: B023
        given = method.policy.net.given
        method.policy.net.given = lambda *args: calls.append(10) or given(*args)  # noqa: B023
        method.draws.begin(method.draws.place, torch.device("cpu"))
        data = batch()
        losses = method.policy_loss(data)
        assert calls == ([1] if approximate else [1, 10]), "one call of the network in all, or a chain as well"
        method.draws.begin(method.draws.place, torch.device("cpu"))
        noised = method.policy.noised(data.action, data.obs, method.draws)
        implied = method.policy.approximate(noised)
        assert torch.equal(asked[0], implied) == approximate and float(asked[0].abs().max()) <= 1
        losses["q"].backward()
        assert any(p.grad is not None and p.grad.any() for p in method.policy.parameters())


def test_max_q_backup_takes_the_best_of_several_actions() -> None:
    one, many = built(DiffusionQL), built(DiffusionQL, critic={"hidden": 32, "backup_candidates": 20})
    obs = torch.zeros(200, 2)
    assert float(many.next_value(obs).mean()) > float(one.next_value(obs).mean())


# ---------------------------------------------------------------- acting


def test_the_best_candidate_is_taken_at_temperature_0_and_the_sampler_can_be_exchanged() -> None:
    method = built(DiffusionQL, selection=SelectionOptions(64, temperature=0.0), eval_sampler={"name": "ddim"})
    method.least_q = lambda obs, actions, target=False: actions[..., 0]
    single = built(DiffusionQL, selection=SelectionOptions(1))
    for agent in (method, single):
        agent.reset(seeds=list(range(50)))
    assert method.act(torch.zeros(50, 2)).mean() > single.act(torch.zeros(50, 2)).mean() + 0.1


@pytest.mark.parametrize("who", ["policy", "average"])
def test_who_acts_is_the_policy_or_its_average(who: str) -> None:
    method = built(EDPIQL, act_with=who)
    other = method.policy_ema if who == "policy" else method.policy

    def actions() -> torch.Tensor:
        method.reset(seeds=list(range(50)))
        found: torch.Tensor = method.act(torch.zeros(50, 2))
        return found

    before = actions()
    for weight in other.parameters():
        weight.data.normal_()
    assert torch.equal(before, actions()), "the other's weights do not matter"
    acting = method.policy if who == "policy" else method.policy_ema
    for weight in acting.parameters():
        weight.data.mul_(0.5)
    assert not torch.equal(before, actions())


def test_what_is_not_changed_at_evaluation_is_as_in_training() -> None:
    edp = EDPTD3(sampler={"steps": 9, "order": 2, "noise_scale": 0.5}, eval_sampler={"steps": 3})
    assert edp.eval_sampler == ActionSamplerOptions("dpm", steps=3, order=2, noise_scale=0.5)
    other = EDPTD3(sampler={"steps": 9, "order": 2, "noise_scale": 0.5}, eval_sampler={"name": "ddim"})
    assert other.eval_sampler == ActionSamplerOptions("ddim", noise_scale=0.5), "no option of a sampler that is gone"
    assert EDPTD3(eval_sampler={"name": "dpm", "clip": False}).eval_sampler == ActionSamplerOptions("dpm", clip=False)
    assert EDPTD3().eval_sampler == EDPTD3().sampler == EDPTD3(eval_sampler={}).eval_sampler
    assert DiffusionQL(eval_sampler={"variance": "beta"}).eval_sampler == ActionSamplerOptions(variance="beta")
    guided = QGPO(sampler={"steps": 8, "method": "multistep"}, eval_sampler={"steps": 4})
    assert guided.eval_sampler == SolverOptions(steps=4, method="multistep") and guided.sampler.steps == 8
    for options in (
        {"steps": 0},
        {"noise_scale": -1.0},
        {"name": "ddim", "order": 2},
        {"method": "half"},
        {"variance": "beta"},
    ):
        with pytest.raises(ConfigError, match="sampler"):
            EDPTD3(eval_sampler=options)
    with pytest.raises(ConfigError, match=r"ActionSamplerOptions.*accepted: SamplerChanges"):
        EDPTD3(eval_sampler=ActionSamplerOptions("ddim"))  # type: ignore[arg-type]


def test_episodes_do_not_depend_on_their_neighbours() -> None:
    method = built(EDPTD3)
    method.reset(seeds=[3, 4])
    pair = method.act(torch.zeros(2, 2))
    method.reset(seeds=[4])
    torch.testing.assert_close(method.act(torch.zeros(1, 2))[0], pair[1])


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (EDPTD3, {"sampler": {"name": "ddpm", "steps": 30}}, "sampler.steps is 30.*n_diffusion_steps 25"),
        (EDPTD3, {"schedule": "vq"}, "schedule must be one of.*'vp'"),
        (EDPIQL, {"expectile": 1.0}, "expectile"),
        (EDPCRR, {"objective": "elba"}, "did you mean 'elbo'"),
        (DiffusionQL, {"critic": {"backup_top_k": 2}}, "backup_top_k"),
        (EDPIQL, {"n_diffusion_steps": 1, "schedule": "vp", "sampler": {"name": "dpm"}}, "sampler.name 'dpm'.* got 1"),
        (EDPTD3, {"act_with": "ema"}, "act_with must be one of.*average"),
        (EDPTD3, {"action_approximation": False, "clip_approximation": False}, "set one of them true"),
        (EDPCRR, {"normalize_elbo": False}, "normalize_elbo false is of model.objective 'elbo', got 'mle'"),
        (DiffusionQL, {"net": {"time_dim": 5}}, "net.time_dim is 5.*e.g. 6"),
    ],
)
def test_what_makes_no_sense_is_refused(kind: type[DiffusionLearner], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        kind(**{**SMALL, **options})


def test_a_checkpoint_of_another_embedding_is_refused() -> None:
    """Its weights have the same shapes, so that they would load and denoise to nonsense."""
    dql, edp = ({"hidden": 32, "embedding": name} for name in ("dql", "edp"))
    method = built(EDPTD3, net=dql)
    checkpoint = {"epoch": 0, "state_dict": method.state_dict(), "hyper_parameters": dict(method.hparams)}
    method.on_save_checkpoint(checkpoint)
    built(EDPTD3, net=dql).on_load_checkpoint(checkpoint)
    with pytest.raises(ConfigError, match="model.net.embedding: checkpoint 'dql', now 'edp'"):
        built(EDPTD3, net=edp).on_load_checkpoint(checkpoint)


# ---------------------------------------------------------------- the bandit


CLONING: dict[Any, dict[str, Any]] = {kind: {"guide_weight": 0.0} for kind in LEARNERS} | {DiffusionQL: {"eta": 0.0}}
IMPROVING: dict[Any, dict[str, Any]] = {
    EDPTD3: {"alpha": 0.5},
    EDPCRR: {"beta": 0.1},
    EDPIQL: {"eta": 10.0, "guide_weight": 3.0},  # at 1 by 0.1 to 0.3, by the seed
    DiffusionQL: {"eta": 0.2},
}


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_learner_moves_to_the_better_mode_and_stays_near_the_data(kind: type[DiffusionLearner]) -> None:
    shares = []
    for options in (CLONING[kind], IMPROVING[kind]):
        seed_everything(0, verbose=False)
        common = {"lr": 3e-3, "critic": {"hidden": 32, "lr": 3e-3}, "selection": {"candidates": 1}, "schedule": "vp"}
        agent = fit(kind(**{**SMALL, **common, "n_diffusion_steps": 8, **options}), 300).eval()
        agent.reset(seeds=list(range(400)))
        action = agent.act(torch.zeros(400, 2))[:, 0]
        near = ((action.abs() - 0.5).abs() < 0.3).float().mean()
        shares.append((float((action > 0).float().mean()), float(near)))
    (cloned, near_cloned), (improved, near_improved) = shares
    assert 0.35 < cloned < 0.65 and improved > cloned + 0.12
    assert near_improved > near_cloned - 0.15
