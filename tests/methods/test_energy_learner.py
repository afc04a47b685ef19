"""What QGPO and AEPO share: phases, who learns when, support actions, taking a behaviour model over, acting."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from energy_learners import LEARNERS, SMALL, act, built, chain, fit, linear_bandit, small
from lightning.pytorch import Callback, Trainer
from short_runs import ROOT, Config
from small_learners import same, transitions, weights

from lit_diffrl.__main__ import main
from lit_diffrl.data import PolicyBatch
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import AEPO, QGPO, TD3BC
from lit_diffrl.methods.loading import load_agent
from lit_diffrl.methods.support import chunk_noise, in_chunks, states_of
from lit_diffrl.seeding import Place

NETWORKS = ("behaviour", "critic", "target_critic", "energy")


# ---------------------------------------------------------------- phases


@pytest.mark.parametrize(
    ("kind", "learn"),
    [
        (QGPO, [{"behaviour"}, {"critic", "target_critic", "energy"}, {"energy"}]),
        (AEPO, [{"behaviour"}, {"critic", "target_critic"}, {"energy"}]),
    ],
)
def test_each_phase_trains_its_networks_and_leaves_the_others_to_the_bit(
    kind: type[Any], learn: list[set[str]]
) -> None:
    """Oracle 22 among others: the energy's phase changes neither behaviour model nor critics."""
    seen: list[dict[str, Any]] = []

    class Watched(kind):  # type: ignore[misc, valid-type]
        def on_train_epoch_start(self) -> None:
            seen.append({name: weights(getattr(self, name)) for name in NETWORKS})

    method = fit(small(Watched))
    seen.append({name: weights(getattr(method, name)) for name in NETWORKS})
    for (before, after), expected in zip(pairwise(seen), learn, strict=True):
        assert {name for name in NETWORKS if not same(before[name], after[name])} == expected
    assert int(method.updates) == 9


@pytest.mark.parametrize("kind", LEARNERS)
def test_it_acts_once_the_energy_has_learnt_or_where_nothing_shall(kind: type[Any]) -> None:
    method = built(kind)
    method.updates += 1
    assert not method.can_act and not method.guided
    method.energy_updates += 1
    assert method.can_act and method.guided
    alone = built(kind, critic_epochs=0, energy_epochs=0)
    assert not alone.can_act
    alone.updates += 1
    assert alone.can_act and not alone.guided


@pytest.mark.parametrize("kind", LEARNERS)
def test_the_behaviour_model_learns_from_several_batches_at_once(kind: type[Any]) -> None:
    sizes: list[int] = []

    class Watched(kind):  # type: ignore[misc, valid-type]
        def training_step(self, batch: PolicyBatch, batch_idx: int) -> None:
            sizes.append(len(batch.obs))
            super().training_step(batch, batch_idx)

    fit(small(Watched, behaviour={"batches": 3}), updates=1)
    assert sizes == [3 * 64, 64, 64]


@pytest.mark.parametrize("kind", LEARNERS)
def test_targets_follow_the_critics_by_tau_at_each_of_their_steps_and_no_optimizer_has_them(kind: type[Any]) -> None:
    """Oracle 18: with constant critics p and targets that begin at q, ``p + (q - p) (1 - tau)^n`` after n steps."""
    method = small(kind, critic={"tau": 0.005, "lr": 1e-30})

    class Apart(kind):  # type: ignore[misc, valid-type]
        def on_train_start(self) -> None:
            with torch.no_grad():
                for p in self.target_critic.net.parameters():
                    p.add_(1.0)

    method.__class__ = Apart
    fit(method, 7)
    for p, q in zip(method.critic.parameters(), method.target_critic.net.parameters(), strict=True):
        torch.testing.assert_close(q, p + 0.995**7, rtol=0, atol=1e-5)
    targets = {id(p) for p in method.target_critic.parameters()}
    optimised = {id(p) for o in method.configure_optimizers() for group in o.param_groups for p in group["params"]}
    assert targets and not targets & optimised and not any(p.requires_grad for p in method.target_critic.parameters())
    assert optimised == {id(p) for p in method.parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_second_run_keeps_nothing_that_was_made_with_the_networks_of_the_first(kind: type[Any]) -> None:
    method = small(kind)
    made: list[dict[str, torch.Tensor]] = []
    for _ in range(2):
        fit(method, 5)
        tables = {"variance": method.posterior.variance_at} if kind is AEPO else {"labels": method.labels}
        made.append({k: v.clone() for k, v in ({"support": method.support} | tables).items() if v is not None})
    assert made[0] and not any(torch.equal(first, made[1][name]) for name, first in made[0].items())


# ---------------------------------------------------------------- support actions


def walk() -> PolicyBatch:
    """Three transitions of one episode, which is cut, then two of another, which ends."""
    obs = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0])[:, None]
    next_obs = torch.tensor([1.0, 2.0, 3.0, 11.0, 12.0])[:, None]
    done = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    return PolicyBatch(obs, obs, done, next_obs, done, done)


def test_next_states_share_the_actions_of_the_transition_that_follows() -> None:
    states = states_of(walk())
    assert states.obs.flatten().tolist() == [0, 1, 2, 10, 11, 3]
    after = states.obs[states.after].flatten().tolist()
    assert after[:4] == [1, 2, 3, 11], "each next state is found, also that at which an episode was cut"
    assert after[4] == 11, "what terminates has no next state"


def test_next_states_have_actions_of_their_own_if_so_asked() -> None:
    states = states_of(walk(), shared=False)
    assert states.obs.flatten().tolist() == [0, 1, 2, 10, 11, 1, 2, 3, 11]
    assert states.after.tolist() == [5, 6, 7, 8, 4]
    sizes = {}
    for shared in (True, False):
        method = fit(small(QGPO, support={"shared": shared}), 1, chain())
        sizes[shared] = method.support.shape[0]
    assert sizes == {True: 6, False: 11}, "six states, among which the next ones are, or five more"


@pytest.mark.parametrize("processes", [2, 3, 50])
def test_the_table_does_not_depend_on_the_number_of_processes(processes: int) -> None:
    states = torch.arange(5000.0)[:, None]

    def compute(number: int, rows: slice) -> torch.Tensor:
        return states[rows, :, None] + chunk_noise(number, rows, (4, 2))

    whole = in_chunks(states, (4, 2), Place(0, 0), compute, "drawing")
    parts = [in_chunks(states, (4, 2), Place(0, 0, rank, processes), compute, "drawing") for rank in range(processes)]
    assert torch.equal(sum(parts), whole) and float(whole.abs().min()) > 0
    assert float((whole - states[:, :, None]).std()) == pytest.approx(1, abs=0.02)


def test_support_actions_are_drawn_at_their_own_states_without_guidance() -> None:
    asked: list[tuple[float, bool]] = []

    class Watched(QGPO):
        def draw_actions(self, obs: Any, noise: Any, options: Any, acting: tuple[float, bool]) -> Any:
            asked.append(acting)
            return obs[:, None, :1] + 0 * noise

    n = 2000
    obs = torch.arange(n * 2.0).view(n, 2)
    method = fit(small(Watched), 1, transitions(obs, torch.zeros(n, 1), torch.zeros(n)))
    assert torch.equal(method.support[:n], obs[:, None, :1].expand(-1, 8, -1))
    assert len(asked) == -(-n // 512) and set(asked) == {(0.0, False)}


# ---------------------------------------------------------------- taking a behaviour model over


def saved(method: Any, path: Path) -> str:
    trainer: Trainer = method.trainer
    trainer.save_checkpoint(path)
    return str(path)


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_behaviour_model_is_taken_over_and_its_phase_left_out(kind: type[Any], tmp_path: Path) -> None:
    first = fit(small(QGPO, critic_epochs=0, energy_epochs=0), 5)
    path = saved(first, tmp_path / "behaviour.ckpt")
    second = fit(small(kind, behaviour_ckpt=path), 2)
    assert same(weights(second.behaviour), weights(first.behaviour))
    assert torch.equal(second.behaviour.time.frequencies, first.behaviour.time.frequencies)
    assert second.total_epochs == 2 and int(second.updates) == 4


def test_a_behaviour_model_of_other_sizes_data_or_methods_is_refused(tmp_path: Path) -> None:
    path = saved(fit(small(QGPO, critic_epochs=0, energy_epochs=0), 1), tmp_path / "behaviour.ckpt")
    with pytest.raises(ConfigError, match="networks differ"):
        fit(small(AEPO, behaviour_ckpt=path, behaviour={"width": 32}))
    with pytest.raises(ConfigError, match="only on one side: predicts_v"):  # its noise would mean something else
        fit(small(AEPO, behaviour_ckpt=path, behaviour={"predict": "v"}))
    method = built(AEPO, behaviour_ckpt=path)
    method.spec = linear_bandit(64).spec.__class__(**{**vars(method.spec), "dataset_ids": ["test/other-v0"]})
    with pytest.raises(ConfigError, match="other data"):
        method.take_behaviour(path)
    other = fit(TD3BC(policy_epochs=1), 2)
    with pytest.raises(ConfigError, match="has no behaviour model; give a checkpoint of QGPO or AEPO"):
        method.take_behaviour(saved(other, tmp_path / "td3bc.ckpt"))


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_the_behaviours_loss_is_of_what_its_network_predicts(predict: str) -> None:
    losses: list[torch.Tensor] = []
    method = built(QGPO, behaviour={"predict": predict})
    method.descend = lambda optimizer, loss, *rest: losses.append(loss) or loss
    action, obs = torch.rand(256, 1) - 0.5, torch.randn(256, 2)
    batch = PolicyBatch(obs, action, *torch.zeros(4, 256, 1).unbind(0))
    noised = method.noised(action)
    method.update_behaviour(None, batch, noised)
    t, eps, a_t = noised
    alpha, sigma = method.sde.alpha(t)[:, None], method.sde.sigma(t)[:, None]
    known = {"eps": eps, "x0": action, "v": alpha * eps - sigma * action}[predict]
    expected = (method.behaviour(a_t, t, obs) - known).square().sum(-1).mean()
    torch.testing.assert_close(losses[0], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("predict", ["x0", "v"])
@pytest.mark.parametrize("kind", LEARNERS)
def test_other_predictions_train_act_and_are_saved(kind: type[Any], predict: str, tmp_path: Path) -> None:
    method = fit(small(kind, behaviour={"predict": predict}), 60, linear_bandit())
    obs, x, t = torch.zeros(5, 2), torch.randn(5, 1), torch.tensor([0.4])
    eps = method.noise_of(x, t, obs)
    torch.testing.assert_close(eps, method.sde.eps_from(predict, method.behaviour(x, t, obs), x, t))
    assert not torch.equal(eps, method.behaviour(x, t, obs))
    path = saved(method, tmp_path / "run.ckpt")
    copy = load_agent(path, "cpu")
    torch.testing.assert_close(act(copy, 5), act(method, 5))
    with pytest.raises(ConfigError, match=f"only on one side: behaviour.predicts_{predict}"):
        load_agent(path, "cpu", behaviour={**SMALL["behaviour"], "predict": "eps"})


@pytest.mark.parametrize("kind", LEARNERS)
def test_guidance_is_the_gradient_of_what_the_energy_network_says_of_scaled_actions(kind: type[Any]) -> None:
    """By the chain rule it has a factor ``alpha_t``, which fades towards noise whatever the network has learnt."""
    method = fit(small(kind, energy={"scaled_input": True}))
    obs = torch.randn(4, 2)
    for shape in ((4, 1), (4, 3, 1)):
        x = torch.randn(shape)
        for time in (0.1, 0.7, 1.0):
            t = torch.tensor([time])
            leaf = x.clone().requires_grad_()
            energy = method.guidance_unit * method.learnt_energy(leaf, t.expand(4), obs)
            (slope,) = torch.autograd.grad(energy.sum(), leaf)
            for asked in ([time], []):
                torch.testing.assert_close(method.guidance_of(obs, asked)(x, t), slope, rtol=1e-4, atol=1e-6)
            plain = method.guidance_unit * method.energy.gradient(obs)(method.sde.alpha(time) * x, t)
            torch.testing.assert_close(slope, method.sde.alpha(time) * plain, rtol=1e-4, atol=1e-6)
            assert slope.abs().max() > 0


@pytest.mark.parametrize(("kind", "options"), [(AEPO, {}), (QGPO, {}), (QGPO, {"objective": "mse"})])
def test_an_energy_of_scaled_actions_learns_of_them_alone(kind: type[Any], options: dict[str, Any]) -> None:
    calls = {"network": 0, "learner": 0}

    class Counted(kind):  # type: ignore[misc, valid-type]
        def build(self, spec: Any) -> None:
            super().build(spec)
            self.energy.register_forward_pre_hook(lambda *_: calls.update(network=calls["network"] + 1))

        def learnt_energy(self, *args: Any) -> torch.Tensor:
            calls["learner"] += 1
            return super().learnt_energy(*args)  # type: ignore[no-any-return]

    fit(small(Counted, energy={"scaled_input": True}, **options))
    assert calls["network"] == calls["learner"] > 0


@pytest.mark.parametrize("kind", LEARNERS)
def test_an_energy_of_scaled_actions_is_not_taken_for_one_of_plain_actions(kind: type[Any], tmp_path: Path) -> None:
    method = fit(small(kind, energy={"scaled_input": True}))
    path = saved(method, tmp_path / "run.ckpt")
    torch.testing.assert_close(act(load_agent(path, "cpu"), 5), act(method, 5))
    with pytest.raises(ConfigError, match="give --model.energy.scaled_input true"):
        load_agent(path, "cpu", energy={**SMALL["energy"], "scaled_input": False})


# ---------------------------------------------------------------- acting


Ready = Callable[..., Any]


@pytest.fixture(scope="module", params=LEARNERS)
def ready(request: pytest.FixtureRequest) -> Ready:
    """Learners of one kind with the same trained networks and other options."""
    kind = request.param
    trained = fit(small(kind), 100, linear_bandit()).state_dict()

    def make(**options: Any) -> Any:
        method = built(kind, **options).eval()
        method.load_state_dict(trained)
        return method

    return make


def test_without_guidance_it_acts_as_the_behaviour_model_alone(ready: Ready) -> None:
    unguided, guided = act(ready(guidance_scale=0.0), 20), ready(guidance_scale=3.0)
    assert not torch.equal(act(guided, 20), unguided)
    guided.energy_updates.zero_()
    assert torch.equal(act(guided, 20), unguided), "an energy that has learnt nothing does not guide"


def test_a_sweep_acts_as_each_degree_would_alone_and_leaves_no_trace(ready: Ready) -> None:
    many = ready(guidance_scale=[1.0, 0.0, 4.0], rescale=[True, False], rescale_norm="term")
    before = act(many, 6)
    variants = many.variants()
    assert [(v.value, v.curve) for v in variants[:4]] == [
        (1.0, "rescaled"), (0.0, "rescaled"), (4.0, "rescaled"), (1.0, "not rescaled"),
    ]  # fmt: skip
    actions = []
    for variant, (scale, rescale) in zip(variants, [(s, r) for r in (True, False) for s in (1.0, 0.0, 4.0)]):
        with variant.enter():
            actions.append(act(many, 6))
        alone = ready(guidance_scale=scale, rescale=rescale, rescale_norm="term")
        assert torch.equal(actions[-1], act(alone, 6))
    assert torch.equal(actions[1], actions[4]) and not torch.equal(actions[0], actions[3])
    assert torch.equal(act(many, 6), before) and torch.equal(before, actions[0])


def test_actions_are_in_the_box_each_of_its_episode_and_drawn_without_traces(ready: Ready) -> None:
    method = ready(guidance_scale=50.0)
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        pair = act(method, 2, seed=3)
        alone = act(method, 1, seed=4)
    torch.testing.assert_close(pair[1:], alone)
    assert float(pair.abs().max()) <= 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in method.parameters())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (QGPO, {}),
        (AEPO, {}),
        (AEPO, {"guidance": "closed_form"}),
        *((kind, {"guidance": "monte_carlo", "guidance_actions": 32}) for kind in (QGPO, AEPO)),
    ],
    ids=["qgpo", "aepo", "closed form", "qgpo by monte carlo", "aepo by monte carlo"],
)
def test_it_acts_in_the_inference_mode_that_lightning_tests_in_by_default(
    kind: type[Any], options: dict[str, Any]
) -> None:
    data, seen = linear_bandit(), list[torch.Tensor]()
    method = fit(small(kind, **options), 100, data)

    class Acting(Callback):
        def on_test_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            assert torch.is_inference_mode_enabled()
            seen.append(act(pl_module, 5))

    Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Acting()]
    ).test(method, datamodule=data)
    assert torch.equal(seen[0], act(method, 5))
    method.acting = (0.0, False)
    assert not torch.equal(seen[0], act(method, 5))


def test_there_is_no_guidance_above_the_time_it_shall_begin_at(ready: Ready) -> None:
    early, late = ready(guidance_scale=20.0, guidance_t_max=2e-3), ready(guidance_scale=20.0)
    unguided = act(ready(guidance_scale=0.0), 10)
    torch.testing.assert_close(act(early, 10), unguided)
    assert float((act(late, 10) - unguided).abs().max()) > 1e-2


# ---------------------------------------------------------------- by command


def test_one_command_lends_the_behaviour_model_and_one_compares_degrees(
    mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(tmp_path)
    first = Config(ROOT / "conf/qgpo.yaml", epochs=1).fit("a")
    (lender,) = Path("tb_logs").glob("*/*/a/checkpoints/last.ckpt")
    second = Config(ROOT / "conf/aepo.yaml", epochs=1).fit("b", "--model.behaviour_ckpt", str(lender))
    behaviours = [
        {k: v for k, v in content["state_dict"].items() if k.startswith("behaviour.")} for content in (first, second)
    ]
    assert behaviours[0] and all(torch.equal(x, behaviours[1][name]) for name, x in behaviours[0].items())

    (last,) = Path("tb_logs").glob("*/*/b/checkpoints/last.ckpt")
    capsys.readouterr()
    played = ["--rollout.test_episodes=1", "--rollout.num_envs=1", "--rollout.max_steps=3"]
    ways = ["--model.guidance_scale", "[0,0.5]", "--model.rescale", "[false,true]"]
    assert main(["test", "--ckpt_path", str(last), *played, *ways]) == 0
    out = capsys.readouterr().out
    assert all(words in out for words in ("guidance scale", "score, not rescaled", "score, rescaled")), out
    (results,) = Path("tb_logs").glob("*/*/b/results/last-test.json")
    points = json.loads(results.read_text())["comparison"]
    assert [(point["guidance scale"], point["curve"]) for point in points] == [
        (0, "not rescaled"), (0.5, "not rescaled"), (0, "rescaled"), (0.5, "rescaled")
    ]  # fmt: skip
    for number, guidance in ((2, "closed_form"), (3, "monte_carlo")):
        assert main(["test", "--ckpt_path", str(last), *played, "--model.guidance", guidance]) == 0
        played_so = json.loads(results.with_name(f"last-test-{number}.json").read_text())
        assert played_so["options"]["guidance"] == guidance


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (QGPO, {"guidance_scale": []}, "guidance_scale needs at least one"),
        (QGPO, {"rescale_norm": "samples"}, "did you mean 'sample'"),
        (QGPO, {"guidance_t_max": 0.0}, "guidance_t_max"),
        (QGPO, {"guidance": "closed_form"}, "guidance must be one of"),
        (QGPO, {"guidance": "monte_carlo", "guidance_actions": 1}, "guidance_actions"),
        (QGPO, {"guidance": "monte_carlo", "critic_epochs": 0, "energy_epochs": 0}, "nothing would guide"),
        (QGPO, {"beta": 0.0}, "beta"),
        (QGPO, {"behaviour_epochs": 0}, "behaviour_epochs is 0.*behaviour_ckpt"),
        (QGPO, {"critic_epochs": 0}, "critic_epochs is 0"),
        (QGPO, {"behaviour_epochs": 0, "critic_epochs": 0, "energy_epochs": 0}, "all phases.*0 epochs"),
        (QGPO, {"objective": "cpe"}, "did you mean 'cep'"),
        (QGPO, {"critic": {"backup_candidates": 4}}, "draws no actions for its target"),
        (QGPO, {"sampler": {"grid": "snr"}}, "did you mean 'logsnr'"),
        (QGPO, {"behaviour": {"width": 30}}, "multiple of 4"),
        (AEPO, {"behaviour_epochs": 0}, "--model.schedule joint"),
        (AEPO, {"critic_epochs": 0}, "--model.schedule joint"),
        (AEPO, {"behaviour_epochs": 0, "energy_epochs": 0, "q_training": "isql"}, "behaviour_epochs is 0"),
        (AEPO, {"energy_epochs": 0, "schedule": "joint", "target": {"scale": 1.0}}, "energy_epochs is 0.*joint"),
        (AEPO, {"target": {"a_bar": "fixed", "form": "two_cumulant"}}, "at the data's action"),
        (AEPO, {"q_training": "sql"}, "did you mean 'isql'"),
        (AEPO, {"schedule": "joint"}, "'auto' is measured on finished critics"),
        (AEPO, {"schedule": "joint", "q_training": "cql"}, "stale"),
        (AEPO, {"posterior": {"kind": 3}}, "posterior.kind must be one of 1, 2"),
        (AEPO, {"target": {"curvature": "full", "covariance": "jvp"}}, "all directions"),
        (AEPO, {"target": {"curvature": "hvp", "form": "two_cumulant"}}, "no second derivatives"),
        (AEPO, {"target": {"curvature": "none", "covariance": "full"}}, "'jvp' says as much"),
        (AEPO, {"target": {"curvature": "full", "form": "support"}}, "'support' has no second derivatives"),
        (AEPO, {"target": {"a_bar": "posterior_mean", "form": "support"}}, "asks Q at support actions"),
        (AEPO, {"target": {"covariance": "trace", "form": "support"}}, "needs no covariance"),
        (
            AEPO,
            {"schedule": "joint", "target": {"form": "support", "scale": 1.0}},
            "form 'support' needs.*stale",
        ),
        (AEPO, {"guidance": "networks"}, "did you mean 'network'"),
        (AEPO, {"q_training": "cql", "cql_backup": "values"}, "did you mean 'value'"),
    ],
)
def test_what_makes_no_sense_is_refused(kind: type[Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small(kind, **options)


def test_actions_of_single_observations_have_their_form() -> None:
    method = built(AEPO)
    action = method.act(np.zeros(2, dtype=np.float32))
    assert isinstance(action, np.ndarray) and action.shape == (1,)
