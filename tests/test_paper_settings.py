"""The files of conf/paper/ say what papers and their code say: policies, energy guidance, baselines, synthetic data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lit_diffrl.data import TrajectoryData
from lit_diffrl.methods import (
    AEPO,
    BC,
    CQL,
    CRR,
    EDPCRR,
    EDPIQL,
    EDPTD3,
    IQL,
    QGPO,
    TD3BC,
    DiffusionQL,
    DyDiffCQL,
    DyDiffDQL,
    DyDiffTD3BC,
    SynthERCQL,
    SynthERDQL,
    SynthERIQL,
    SynthERTD3BC,
)

PAPER = Path(__file__).parents[1] / "conf" / "paper"
SYNTHESIS = (DyDiffCQL, DyDiffDQL, DyDiffTD3BC, SynthERCQL, SynthERDQL, SynthERIQL, SynthERTD3BC)
LEARNERS = (EDPTD3, EDPCRR, EDPIQL, DiffusionQL, TD3BC, CRR, IQL, CQL, BC)
METHODS: dict[str, Any] = {kind.__name__: kind for kind in (*LEARNERS, *SYNTHESIS, QGPO, AEPO)}

# task: learning rate, eta, max-Q backup, rewards, epochs, norm limit, rank of the offline selection
DQL: dict[str, tuple[float, float, bool, str, int, float, int]] = {
    "halfcheetah-medium-v2": (3e-4, 1.0, False, "none", 2000, 9, 1),
    "hopper-medium-v2": (3e-4, 1.0, False, "none", 2000, 9, 2),
    "walker2d-medium-v2": (3e-4, 1.0, False, "none", 2000, 1, 1),
    "halfcheetah-medium-replay-v2": (3e-4, 1.0, False, "none", 2000, 2, 0),
    "hopper-medium-replay-v2": (3e-4, 1.0, False, "none", 2000, 4, 2),
    "walker2d-medium-replay-v2": (3e-4, 1.0, False, "none", 2000, 4, 1),
    "halfcheetah-medium-expert-v2": (3e-4, 1.0, False, "none", 2000, 7, 0),
    "hopper-medium-expert-v2": (3e-4, 1.0, False, "none", 2000, 5, 2),
    "walker2d-medium-expert-v2": (3e-4, 1.0, False, "none", 2000, 5, 1),
    "antmaze-umaze-v0": (3e-4, 0.5, False, "cql_antmaze", 1000, 2, 2),
    "antmaze-umaze-diverse-v0": (3e-4, 2.0, True, "cql_antmaze", 1000, 3, 2),
    "antmaze-medium-play-v0": (1e-3, 2.0, True, "cql_antmaze", 1000, 2, 1),
    "antmaze-medium-diverse-v0": (3e-4, 3.0, True, "cql_antmaze", 1000, 1, 1),
    "antmaze-large-play-v0": (3e-4, 4.5, True, "cql_antmaze", 1000, 10, 2),
    "antmaze-large-diverse-v0": (3e-4, 3.5, True, "cql_antmaze", 1000, 7, 1),
    "pen-human-v1": (3e-5, 0.15, False, "standardise", 1000, 7, 2),
    "pen-cloned-v1": (3e-5, 0.1, False, "standardise", 1000, 8, 2),
    "kitchen-complete-v0": (3e-4, 0.005, False, "none", 250, 9, 2),
    "kitchen-partial-v0": (3e-4, 0.005, False, "none", 1000, 10, 2),
    "kitchen-mixed-v0": (3e-4, 0.005, False, "none", 1000, 10, 0),
}
# domain: learning rate, weight of the improvement, epochs, expectile of IQL
EDP = {
    "locomotion": (3e-4, 1.0, 2000, 0.7),
    "antmaze": (3e-4, 1.0, 1000, 0.9),
    "adroit": (3e-5, 0.1, 1000, 0.7),
    "kitchen": (3e-4, 0.005, 1000, 0.7),
}
EDP_REWARDS = {
    "edp_td3": {"locomotion": "none", "antmaze": "cql_antmaze", "adroit": "minmax", "kitchen": "minmax"},
    "edp_crr": {"locomotion": "none", "antmaze": "cql_antmaze", "adroit": "minmax", "kitchen": "minmax"},
    "edp_iql": {"locomotion": "return_range", "antmaze": "iql_antmaze", "adroit": "minmax", "kitchen": "minmax"},
}


def settings(path: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The learner that a file makes, defaults included; its data's arguments, and how it is evaluated."""
    content: Any = OmegaConf.to_container(OmegaConf.load(PAPER / path))
    model = content["model"]
    method = METHODS[model["class_path"].rpartition(".")[2]](**model["init_args"])
    return method, content["data"]["init_args"], content.get("rollout", {})


def test_the_table_has_the_20_tasks_of_the_folder() -> None:
    assert {path.stem for path in (PAPER / "dql").glob("*.yaml")} == set(DQL) and len(DQL) == 20


@pytest.mark.parametrize("task", DQL)
def test_diffusion_ql_has_its_official_table(task: str) -> None:
    lr, eta, backup, rewards, epochs, limit, rank = DQL[task]
    method, data, rollout = settings(f"dql/{task}.yaml")
    critic = method.critic_options
    assert (method.lr, method.eta, method.policy_epochs, method.grad_clip) == (lr, eta, epochs, limit)
    assert (critic.lr, critic.grad_clip, critic.clip_each, critic.tau) == (3e-4, limit, False, 0.005)
    assert critic.backup_candidates == (10 if backup else 1)
    assert (data.get("reward", "none"), data.get("action_clip"), data.get("normalizer")) == (rewards, None, None)
    assert (method.schedule.kind, method.schedule.num_steps, method.sampler.name) == ("vp", 5, "ddpm")
    assert (method.ema_options.decay, method.ema_options.every, method.ema_options.start) == (0.995, 5, 1001)
    assert (method.selection.candidates, method.selection.temperature, method.selection.critic) == (50, 1.0, "target")
    assert rollout["every_n_epochs"] == 50 and rollout["episodes"] == (10 if task.endswith("v2") else 100)
    assert method.lr_decay == "none", "the official decay comes to a constant rate"
    assert (rollout["select"], rollout["select_rank"], rollout.get("early_stop", False)) == ("offline", rank, False)


@pytest.mark.parametrize("learner", EDP_REWARDS)
@pytest.mark.parametrize("domain", EDP)
def test_edp_has_its_table_3(learner: str, domain: str) -> None:
    lr, weight, epochs, expectile = EDP[domain]
    method, data, rollout = settings(f"{learner}/{domain}.yaml")
    critic = method.critic_options
    assert (method.lr, method.guide_weight, method.policy_epochs, method.grad_clip) == (lr, weight, epochs, 5)
    assert (critic.lr, critic.grad_clip, critic.clip_each, critic.backup_candidates) == (lr, 5, True, 1)
    sampler = (method.sampler.name, method.sampler.calls(1000), method.sampler.order, method.sampler.method)
    assert sampler == ("dpm", 15, 3, "singlestep") and method.eval_sampler == method.sampler
    assert (method.schedule.kind, method.schedule.num_steps) == ("linear", 1000)
    assert (method.selection.candidates, method.selection.critic) == (10, "online")
    assert (data["reward"], data["action_clip"]) == (EDP_REWARDS[learner][domain], 0.999)
    assert (rollout["every_n_epochs"], rollout["episodes"]) == (10, 10)
    if learner == "edp_iql":
        assert (method.expectile, method.eta, method.bound) == (expectile, 1.0, 100.0)
    elif learner == "edp_crr":
        assert (method.beta, method.bound, method.candidates, method.objective) == (1.0, 20.0, 10, "mle")
    else:
        assert method.alpha == 2.0


@pytest.mark.parametrize("learner", EDP_REWARDS)
def test_the_code_of_edp_has_its_own_settings(learner: str) -> None:
    method, data, _ = settings(f"{learner}/code.yaml")
    assert (method.schedule.kind, method.schedule.num_steps) == ("linear", 100)
    assert (method.sampler.name, method.sampler.calls(100), method.selection.candidates) == ("ddpm", 100, 50)
    assert (method.lr, method.guide_weight, method.policy_epochs, method.grad_clip) == (3e-4, 1.0, 2000, 9)
    assert (method.net_options.embedding, method.net_options.init) == ("edp", "lecun")
    if learner == "edp_iql":
        assert (method.expectile, method.eta, data["reward"]) == (0.7, 3.0, "return_range")
    else:
        assert data["reward"] == "none"


@pytest.mark.parametrize("learner", EDP_REWARDS)
@pytest.mark.parametrize("task", DQL)
def test_the_code_of_edp_reads_the_norm_limit_of_a_task_from_diffusion_qls_table(learner: str, task: str) -> None:
    said = (PAPER.parent / f"edp_code/{task}.yaml").read_text()
    content = OmegaConf.merge(OmegaConf.load(PAPER / learner / "code.yaml"), OmegaConf.create(said))
    method, data = (
        METHODS[content.model.class_path.rpartition(".")[2]](**content.model.init_args),
        content.data.init_args,
    )
    limit = DQL[task][5]
    assert (method.grad_clip, method.critic_options.grad_clip) == (limit, limit)
    assert (method.lr, method.guide_weight, method.policy_epochs) == (3e-4, 1.0, 2000), "as without the task"
    assert data.dataset == settings(f"dql/{task}.yaml")[1]["dataset"]
    domain = {"v2": "locomotion", "v1": "adroit"}.get(task[-2:], task.partition("-")[0])
    rewards = EDP_REWARDS[learner][domain]
    if (learner, domain) == ("edp_iql", "antmaze"):
        assert f"EDP-IQL (conf/paper/edp_iql/code.yaml) takes other rewards there: --data.reward {rewards}" in said
    else:
        assert data.reward == rewards


def test_every_task_of_diffusion_ql_has_a_norm_limit_for_edp() -> None:
    assert {path.stem for path in (PAPER.parent / "edp_code").glob("*.yaml")} == set(DQL)


@pytest.mark.parametrize("learner", EDP_REWARDS)
def test_the_sampler_of_a_file_of_edp_is_exchanged_by_its_name(learner: str) -> None:
    """The ablation ``--model.sampler.name ddpm`` takes every step: no number of steps of the solver's stays behind."""
    for path in (*PAPER.glob(f"{learner}/*.yaml"), PAPER.parent / f"{learner}.yaml"):
        assert set(OmegaConf.load(path)["model"]["init_args"]["sampler"]) == {"name"}


@pytest.mark.parametrize(
    ("path", "expected", "data_expected"),
    [
        ("td3bc/locomotion", {"alpha": 2.5, "policy_freq": 2, "policy_noise": 0.2, "noise_clip": 0.5},
         {"normalizer": "gaussian"}),
        ("td3bc/antmaze", {"alpha": 2.5}, {"normalizer": "gaussian", "reward": "iql_antmaze"}),
        ("iql/locomotion", {"expectile": 0.7, "beta": 3, "bound": 100.0, "lr_decay": "cosine"},
         {"reward": "return_range", "action_clip": 0.99999}),
        ("iql/antmaze", {"expectile": 0.9, "beta": 10}, {"reward": "iql_antmaze", "action_clip": 0.99999}),
        ("iql/kitchen", {"expectile": 0.7, "beta": 0.5}, {"action_clip": 0.99999}),
        ("iql/adroit", {"expectile": 0.7, "beta": 0.5}, {"action_clip": 0.99999}),
        ("cql/locomotion", {"alpha": 10, "lr": 3e-5, "target_gap": None}, {"normalizer": "gaussian"}),
        ("cql/adroit", {"alpha": 1, "lr": 1e-4}, {"normalizer": "gaussian"}),
        ("cql/antmaze", {"alpha": 5, "lr": 1e-4, "target_gap": 0.8, "diff_clip": -200},
         {"reward": "affine", "reward_scale": 10, "reward_shift": -5}),
        ("crr/locomotion", {"beta": 1.0, "bound": 20.0, "candidates": 10, "lr": 3e-4}, {"action_clip": 0.999}),
        ("crr/adroit", {"lr": 3e-5}, {"reward": "minmax"}),
        ("crr/antmaze", {"lr": 3e-4}, {"reward": "cql_antmaze"}),
        ("crr/kitchen", {"lr": 3e-4}, {"reward": "minmax"}),
        ("bc/locomotion", {"policy": "deterministic", "lr": 3e-4}, {"normalizer": "gaussian"}),
        ("bc/locomotion-10", {"policy": "deterministic"}, {"normalizer": "gaussian", "top_fraction": 0.1}),
        ("bc/antmaze", {"policy": "deterministic"}, {"normalizer": "gaussian"}),
        ("bc/adroit", {"policy": "deterministic"}, {"normalizer": "gaussian"}),
    ],
)  # fmt: skip
def test_the_baselines_have_theirs(path: str, expected: dict[str, Any], data_expected: dict[str, Any]) -> None:
    method, data, _ = settings(f"{path}.yaml")
    assert {name: getattr(method, name) for name in expected} == expected
    assert {name: data.get(name) for name in data_expected} == data_expected
    if path == "cql/antmaze":
        assert (method.critic_options.layers, method.critic_options.backup_candidates) == (5, 10)
    if path in ("iql/kitchen", "iql/adroit"):
        assert method.actor_options.dropout == 0.1


@pytest.mark.parametrize("domain", ["locomotion", "antmaze", "adroit", "kitchen"])
def test_crr_can_be_compared_with_edp_crr(domain: str) -> None:
    """The same data, rewards, critics, length and, where there is an environment, evaluations."""
    (crr, data, rollout), (edp, edp_data, edp_rollout) = (
        settings(f"{name}/{domain}.yaml") for name in ("crr", "edp_crr")
    )
    stem = {"adroit": "pen"}.get(domain, edp_data["dataset"].partition("_")[0])
    assert data["dataset"].startswith(stem) and data["dataset"][-8:] == edp_data["dataset"][-8:]  # the version too
    for name in ("reward", "action_clip"):
        assert data.get(name, "none") == edp_data[name]
    for name in ("critic_options", "policy_epochs", "candidates", "beta", "bound", "lr", "grad_clip"):
        assert getattr(crr, name) == getattr(edp, name), name
    assert not rollout or rollout["every_n_epochs"] == edp_rollout["every_n_epochs"]


def test_idql_clones_and_chooses() -> None:
    """The reimplementation's table: no weight of the values in training, a sharp softmax of 256 at evaluation."""
    method, data, _ = settings("edp_iql/idql.yaml")
    choice, critic = method.selection, method.critic_options
    assert (method.guide_weight, method.schedule.kind, method.schedule.num_steps) == (0, "cosine", 5)
    assert (choice.candidates, choice.temperature, choice.critic) == (256, 1 / 50, "target")
    assert (method.eval_sampler.name, method.eval_sampler.noise_scale, method.sampler.noise_scale) == ("ddpm", 0.5, 1.0)
    assert (method.ema_options.decay, method.net_options.time_dim, method.lr_decay) == (0.9999, 64, "cosine")
    assert (critic.layers, critic.activation, critic.tau, critic.grad_clip) == (2, "relu", 0.005, None)
    assert (method.expectile, method.act_with) == (0.7, "average")
    assert (data["normalizer"], data["reward"]) == ("gaussian", "return_range")


# ---------------------------------------------------------------- SynthER and DyDiff


def edm_of(method: Any) -> tuple[float, ...]:
    edm, churn = method.edm, method.churn
    levels = (edm.sigma_min, edm.sigma_max, edm.sigma_data, edm.rho, edm.p_mean, edm.p_std)
    return (*levels, churn.s_tmin, churn.s_tmax, churn.s_churn, churn.s_noise, method.edm_sampler.steps)


@pytest.mark.parametrize("path", sorted(path.stem for path in (PAPER / "dydiff").glob("*.yaml")))
def test_dydiff_has_its_table_2_and_the_windows_of_the_authors_snapshot(path: str) -> None:
    method, data, _ = settings(f"dydiff/{path}.yaml")
    rollouts, denoiser, code = method.rollouts, method.denoiser_options, path.endswith("code")
    assert edm_of(method) == pytest.approx((0.002, 80, 0.5, 7, -1.2, 1.2, 0.370, 52.242, 60, 1.002, 34), rel=2e-4)
    assert method.edm_sampler.solver == "heun" and method.edm_sampler.recondition_after_churn == (not code)
    assert (denoiser.dim, tuple(denoiser.mults), denoiser.kernel, denoiser.grad_clip) == (128, (1, 4, 8), 5, None)
    assert (rollouts.starts, rollouts.every_n_epochs, rollouts.warmup_epochs, rollouts.length) == (2048, 1, 0, None)
    assert (rollouts.corrections, rollouts.damping, rollouts.emit, rollouts.start_states) == (
        2,
        0.5,
        "policy",
        "transitions",
    )
    assert (rollouts.filter, rollouts.keep, rollouts.temperature, rollouts.floor) == ("softmax", 0.6, 0.05, 1e-6)
    assert (rollouts.z_score, rollouts.capacity, rollouts.keep_refreshes) == (True, 2_000_000, None)
    assert (rollouts.sample_policy, rollouts.sample_model, rollouts.warm_start) == (False, False, None)
    assert (method.real_ratio, method.world_model_options.patience, method.world_model_options.lr) == (0.6, 7, 1e-4)
    updates = data.get("updates_per_epoch", 1000)
    windows = method.epochs["diffusion"] * updates * data["window_batch_size"]
    assert windows == pytest.approx(3_000_000, rel=0.01) and method.world_model_options.reward_activation == "relu"
    assert method.policy_epochs * updates == (500_000 if path == "dql-code" else 1_000_000)
    assert (data["horizon"], data["batch_size"]) == (100, 256)
    assert (denoiser.loss, data.get("padding"), rollouts.returns) == (
        ("all", "constant", "all") if code else ("states", None, "until_done")
    )
    assert (data["window_batch_size"], denoiser.lr_decay, denoiser.scale_conditions) == (
        (8, "ramp", True) if code else (64, "cosine", False)
    )
    assert isinstance(TrajectoryData(**data), TrajectoryData)


def test_learners_inside_dydiffs_code_are_its_variants() -> None:
    td3bc, cql, dql = (settings(f"dydiff/{name}-code.yaml")[0] for name in ("td3bc", "cql", "dql"))
    for method in (td3bc, cql, dql):
        o = method.critic_options
        assert (o.layers, o.hidden, o.activation, o.lr, o.tau, o.orthogonal) == (2, 256, "relu", 3e-4, 0.005, False)
    assert (td3bc.policy, td3bc.alpha, td3bc.policy_freq, td3bc.actor_options.layers) == ("gaussian", 5, 2, 2)
    assert (cql.lr, cql.alpha, cql.temperature, cql.n_actions, cql.actor_options.layers) == (3e-5, 10, 1, 10, 2)
    assert (cql.importance_sampling, cql.target_gap, cql.target_entropy) == (True, None, None)
    assert (cql.policy_first, cql.entropy_log, cql.critic_options.backup_candidates) == (True, (-10, 0.5), 1)
    assert (dql.action_approximation, dql.clip_approximation, dql.eta, dql.lr, dql.lr_decay) == (
        True, True, 1, 3e-4, "none",
    )  # fmt: skip
    assert (dql.schedule.kind, dql.schedule.num_steps, dql.grad_clip) == ("vp", 5, 5)
    net, ema, selection = dql.net_options, dql.ema_options, dql.selection
    assert (net.hidden, net.layers, net.time_dim, ema.decay, ema.every, ema.start) == (256, 3, 16, 0.995, 5, 1001)
    assert (selection.candidates, selection.temperature, selection.critic) == (50, 1, "target")


@pytest.mark.parametrize("learner", ["qgpo", "aepo"])
@pytest.mark.parametrize("domain", ["locomotion", "maze2d-sparse", "maze2d-dense", "antmaze", "adroit"])
def test_energy_guidance_has_qgpos_code_and_aepos_table_4(learner: str, domain: str) -> None:
    method, data, _ = settings(f"{learner}/{domain}.yaml")
    critic, energy, solver = method.critic_options, method.energy_options, method.sampler
    assert (method.beta, method.behaviour_options.width, method.behaviour_options.lr) == (3, 512, 1e-4)
    assert method.behaviour_options.batches * data["batch_size"] == 4096 and data["batch_size"] == 256
    assert (critic.layers, critic.hidden, critic.activation, critic.lr, critic.tau) == (3, 256, "relu", 3e-4, 0.005)
    assert (energy.layers, energy.hidden, energy.activation) == (4 if learner == "qgpo" else 3, 256, "silu")
    assert energy.lr == 3e-4 and data.get("discount", 0.99) == 0.99 and data.get("normalizer") is None
    assert (solver.steps, solver.order, solver.method, solver.grid) == (15, 2, "singlestep", "time_uniform")
    assert (solver.predict, solver.lower_order_final, solver.t_end, solver.final_denoise) == (
        "data",
        False,
        1e-3,
        False,
    )
    assert method.eval_sampler == solver and method.guidance_t_max == 1 and method.degrees == [1.0]
    rewards = {"antmaze": "iql_antmaze", "locomotion": "return_range", "adroit": "return_range"}
    assert data["reward"] == rewards.get(domain, "return_range_1000")
    # epochs of 1000 updates; QGPO's energy learns in those of its critics too
    assert method.epochs == (
        {"behaviour": 600, "critic": 500, "energy": 500}
        if learner == "qgpo"
        else {"behaviour": 600, "critic": 1000, "energy": 1000}
    )
    if learner == "qgpo":
        support = (32, 3) if domain == "antmaze" else (16, 1)
        assert (method.support_options.actions, method.support_options.beta_q) == support
        assert not method.support_options.shared
        assert (method.objective, method.self_normalise, method.rescalings) == ("cep", True, [False])
        return
    posterior, target = method.posterior_options, method.target_options
    assert (method.q_training, method.expectile, method.rescalings, method.rescale_norm) == (
        "iql",
        0.7,
        [True],
        "sample",
    )
    assert (posterior.kind, posterior.variance, posterior.mean) == (1, "raw", "eps")
    assert (target.form, target.a_bar, target.grad_at, target.eta) == ("aepo", "data_grad_step", "a0", 1e-3)
    assert (target.q_reduce, target.use_target, target.covariance, target.curvature) == (
        "min",
        True,
        "isotropic",
        "none",
    )
    assert (target.baseline, target.scale, target.loss, target.weight) == (False, 1, "mse", "uniform")
    assert not method.energy_options.scaled_input


@pytest.mark.parametrize("path", sorted(path.stem for path in (PAPER / "synther").glob("*.yaml")))
def test_synther_has_its_authors_settings(path: str) -> None:
    method, data, _ = settings(f"synther/{path}.yaml")
    assert edm_of(method) == (0.002, 80, 1.0, 7, -1.2, 1.2, 0.05, 50, 80, 1.003, 128)
    denoiser = method.denoiser_options
    assert (denoiser.width, denoiser.depth, denoiser.embed) == (2048, 6, 128)
    assert (denoiser.lr, denoiser.ema_decay, denoiser.ema_every, denoiser.grad_clip) == (3e-4, 0.995, 10, 1.0)
    assert (method.epochs["diffusion"] * 1000, data["transition_batch_size"]) == (100_000, 1024)
    assert (method.samples.count, method.real_ratio, method.samples.clip_to_data) == (5_000_000, 0, False)
    assert method.policy_epochs == 1000 and data["horizon"] is None
    assert isinstance(TrajectoryData(**data), TrajectoryData)


@pytest.mark.parametrize(
    ("path", "base"),
    [
        *(
            (f"{kind}/{name}-locomotion", f"{name}/locomotion")
            for kind in ("synther", "dydiff")
            for name in ("td3bc", "cql")
        ),
        ("synther/iql-locomotion", "iql/locomotion"),
        ("synther/dql-locomotion", "dql/hopper-medium-v2"),
        ("dydiff/dql-locomotion", "dql/hopper-medium-replay-v2"),
    ],
)
def test_with_synthetic_data_the_learner_is_the_one_without(path: str, base: str) -> None:
    """Numbers of updates apart; else what is compared would be two learners."""
    own, alone = ({**OmegaConf.load(PAPER / f"{name}.yaml")} for name in (path, base))
    for group, free in (("model", {"policy_epochs"}), ("data", {"dataset", "reward"})):
        wanted = {k: v for k, v in alone[group]["init_args"].items() if k not in free}
        assert {k: own[group]["init_args"].get(k) for k in wanted} == wanted
    own_data, data = own["data"]["init_args"], alone["data"]["init_args"]
    assert own_data.get("reward", "none") == data.get("reward", "none")
    assert path.startswith("dydiff") or own_data["dataset"] == data["dataset"]
