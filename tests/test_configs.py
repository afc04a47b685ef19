"""Every file of conf/ trains, saves and acts: a few batches of each phase, on small data by the names it asks for."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
import yaml
from gymnasium.envs.registration import EnvSpec
from lightning.pytorch import LightningDataModule
from omegaconf import OmegaConf
from short_runs import smaller

import lit_diffrl
from lit_diffrl.__main__ import main
from lit_diffrl.data import pointmaze
from lit_diffrl.data.d4rl import TASKS, task_name
from lit_diffrl.methods import Method
from lit_diffrl.typos import find_class, parameters

CONF = Path(__file__).parents[1] / "conf"
MAIN = [*sorted(CONF.glob("*.yaml")), *sorted(CONF.glob("paper/*/*.yaml"))]
OVERLAYS = sorted(CONF.glob("data/*.yaml"))
SHORT = sorted(CONF.glob("short/*.yaml"))
SMALL = [
    "--data.updates_per_epoch=2",
    "--rollout.episodes=1",
    "--rollout.num_envs=1",
    "--rollout.max_steps=2",
    "--model_check.starts=0",
    "--energy_check.states=0",
    "--trainer.accelerator=cpu",
    "--trainer.enable_model_summary=false",
]
WALK = {"umaze": 2_000, "medium": 4_000, "large": 12_000}
ROBOTS = {"hopper": "Hopper-v5", "walker2d": "Walker2d-v5", "halfcheetah": "HalfCheetah-v5"}


def name(path: Path) -> str:
    return path.relative_to(CONF).with_suffix("").as_posix()


# ---------------------------------------------------------------- data by the names that the configs ask for


def record(env_id: str, steps: int = 260) -> list[dict[str, np.ndarray]]:
    """Episodes of random actions, cut after 100 steps."""
    env = gym.make(env_id, max_episode_steps=100)
    env.action_space.seed(0)
    episodes: list[dict[str, np.ndarray]] = []
    while sum(len(e["rewards"]) for e in episodes) < steps:
        obs, actions, rewards, ended = [env.reset(seed=len(episodes))[0]], [], [], (False, False)
        while not any(ended):
            actions.append(env.action_space.sample())
            step_obs, reward, *ended, _ = env.step(actions[-1])  # type: ignore[assignment]
            obs.append(step_obs)
            rewards.append(float(reward))
        last = np.arange(len(rewards)) == len(rewards) - 1
        episodes.append(
            {
                "observations": np.array(obs),
                "actions": np.array(actions),
                "rewards": np.array(rewards),
                "terminations": last & ended[0],
                "truncations": last & (not ended[0]),
            }
        )
    env.close()
    return episodes


def write_minari(dataset_id: str, env_id: str, episodes: list[dict[str, Any]]) -> None:
    import minari
    from minari.data_collector import EpisodeBuffer

    buffers = [EpisodeBuffer(**e, infos={}) for e in episodes]
    minari.create_dataset_from_buffers(dataset_id, buffers, env_id, ref_min_score=0.0, ref_max_score=100.0)


def invented(task: str, steps: int = 60) -> list[dict[str, np.ndarray]]:
    """Two episodes of random numbers of a task's sizes, for tasks without an environment; rewards are 0 or 1."""
    rng, sizes = np.random.default_rng(0), TASKS[task]
    last = np.arange(steps) == steps - 1
    return [
        {
            "observations": rng.normal(size=(steps + 1, sizes.obs_dim)),
            "actions": rng.uniform(-1, 1, size=(steps, sizes.action_dim)),
            "rewards": (rng.random(steps) < 0.2).astype(float),
            "terminations": last,
            "truncations": ~last & last,
        }
        for _ in range(2)
    ]


def write_d4rl(path: Path, episodes: list[dict[str, np.ndarray]]) -> None:
    with h5py.File(path, "w") as file:
        file["observations"] = np.concatenate([e["observations"][:-1] for e in episodes]).astype(np.float32)
        for key, source in (
            ("actions", "actions"),
            ("rewards", "rewards"),
            ("terminals", "terminations"),
            ("timeouts", "truncations"),
        ):
            file[key] = np.concatenate([e[source] for e in episodes])


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with D4RL files and ``minari``: robots by random actions; mazes are collected there, but shorter."""
    root = tmp_path_factory.mktemp("stock")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root / "minari"))
        patch.setattr(pointmaze, "STEPS", WALK)
        patch.setattr(pointmaze, "REFERENCE_EPISODES", 1)
        recorded = {robot: record(env_id) for robot, env_id in ROBOTS.items()}
        for robot, env_id in ROBOTS.items():
            for level in ("medium", "expert"):
                write_minari(f"mujoco/{robot}/{level}-v0", env_id, recorded[robot])
        for file in {str(merged([path])["data"]["init_args"]["dataset"]) for path in MAIN}:
            task = task_name(Path(file).stem) if file.endswith(".hdf5") else None
            if task is not None:
                write_d4rl(root / file, recorded.get(task) or invented(task))
        yield root


@pytest.fixture(autouse=True)
def folder(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work beside the D4RL files, in a folder without runs."""
    for path in stock.glob("*.hdf5"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "conf").symlink_to(CONF)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- a short run and what must come of it


def merged(paths: Iterable[str | Path]) -> dict[str, Any]:
    """What config files say together."""
    return OmegaConf.to_container(OmegaConf.merge(*(OmegaConf.load(path) for path in paths)))  # type: ignore[return-value]


def shortened(paths: list[str]) -> list[str]:
    """Options that leave two updates of each phase that a config has, and a few network calls per plan or action."""
    content = merged(paths)
    given = content["model"]["init_args"]
    accepted = parameters(find_class("model", content["model"]["class_path"], Method))
    options = [f"--model.{phase}=1" for phase, epochs in given.items() if phase.endswith("_epochs") and epochs]
    if (given.get("plan") or {}).get("candidates", 1) > 1:
        options.append("--model.plan.candidates=2")
    options += ["--model.sampler.steps=2"] if "sampler" in accepted else []
    options += ["--model.ema.every=1", "--model.ema.start=1"] if "ema" in accepted else []
    options += ["--model.posterior.samples=64"] if "posterior" in accepted else []
    options += smaller(find_class("model", content["model"]["class_path"], Method))
    if content["data"]["init_args"].get("reward") == "return_range_1000":
        options.append("--data.reward=none")  # the mazes of the tests are shorter than a stretch of 1,000 steps
    batches = parameters(find_class("data", content["data"]["class_path"], LightningDataModule))
    sizes = {"batch_size": 2, "window_batch_size": 2, "transition_batch_size": 8}
    return [*SMALL, *options, *(f"--data.{name}={size}" for name, size in sizes.items() if name in batches)]


def fit(paths: list[str], *more: str) -> dict[str, Any]:
    """Train, and check the run that is left; returns its checkpoint."""
    configs = [argument for path in paths for argument in ("--config", path)]
    assert main(["fit", *configs, *shortened(paths), "--run", "short", *more]) == 0
    (last,) = Path("tb_logs").glob("*/*/short/checkpoints/last.ckpt")
    checkpoint: dict[str, Any] = torch.load(last, weights_only=True)

    options, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    if "horizon" in options:
        assert options["horizon"] == checkpoint["datamodule_hyper_parameters"]["horizon"]
    epochs = sum(options[name] for name in options if name.endswith("_epochs"))
    assert checkpoint["epoch"] + 1 == epochs
    assert int(state.get("updates", checkpoint["global_step"])) == 2 * options.get("policy_epochs", epochs)
    assert all(bool(value.isfinite().all()) for key, value in state.items() if "best" not in key)
    assert (last.parents[1] / "config.yaml").exists()

    agent = lit_diffrl.load(last)
    assert agent.spec is not None
    if agent.spec.env_spec is None:
        assert task_name(agent.spec.dataset_ids[0]) not in ROBOTS
        assert np.abs(agent.act(np.zeros(agent.spec.obs_dim, dtype=np.float32))).max() <= 1
        return checkpoint
    assert last.with_name("best.ckpt").exists()
    env = gym.make(EnvSpec.from_json(agent.spec.env_spec))
    obs, _ = env.reset(seed=0)
    assert env.action_space.contains(agent.act(obs))
    env.close()
    return checkpoint


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize("path", MAIN, ids=name)
def test_a_config_trains_and_acts(path: Path) -> None:
    fit([f"conf/{name(path)}.yaml"])


def shown(path: Path) -> list[str]:
    """The config files of the command that an overlay says it is used by, itself last."""
    command = re.search(r"^# +(python -m lit_diffrl fit .*)$", path.read_text(), re.MULTILINE)
    assert command, f"{name(path)} does not say how it is used"
    paths = [word for word in shlex.split(command[1]) if word.endswith(".yaml")]
    assert paths[-1] == f"conf/{name(path)}.yaml"
    return paths


@pytest.mark.parametrize("path", OVERLAYS, ids=name)
def test_a_data_file_trains_by_the_command_it_shows(path: Path) -> None:
    paths = shown(path)
    dataset = yaml.safe_load(path.read_text())["data"]["init_args"]["dataset"]
    checkpoint = fit(paths, "--model.dim=8", "--rollout.video=false")
    assert checkpoint["datamodule_hyper_parameters"]["dataset"] == dataset


@pytest.mark.parametrize("path", SHORT, ids=name)
def test_a_short_file_trains_by_the_command_it_shows(path: Path) -> None:
    paths = shown(path)
    given, papers = (merged([file])["model"]["init_args"] for file in (path, paths[0]))
    options = fit(paths)["hyper_parameters"]
    assert {key: options["critic"][key] for key in given["critic"]} == given["critic"]
    short, long = (sum(v for key, v in said.items() if key.endswith("_epochs")) for said in (given, papers))
    assert 10 < short <= 30 and short * 20 < long


@pytest.mark.parametrize("name", ["edp_crr", "edp_iql"])
def test_the_short_file_of_edp_serves_its_other_learners(name: str) -> None:
    paths = [f"conf/paper/{name}/locomotion.yaml", "conf/short/edp.yaml"]
    options = fit(paths, "--model.objective", "elbo")["hyper_parameters"]
    assert (options["n_diffusion_steps"], options["objective"]) == (5, "elbo")


@pytest.mark.parametrize("task", ["hopper-medium-v2", "antmaze-umaze-v0"])
def test_a_file_of_a_task_of_edps_code_trains_by_the_command_it_shows(task: str) -> None:
    path = CONF / f"edp_code/{task}.yaml"
    limit = yaml.safe_load(path.read_text())["model"]["init_args"]["grad_clip"]
    options = fit(shown(path))["hyper_parameters"]
    assert options["grad_clip"] == options["critic"]["grad_clip"] == limit


@pytest.mark.parametrize("path", [p for p in OVERLAYS if "-multi" not in p.name], ids=name)
def test_a_data_file_names_a_dataset_and_no_more_so_that_it_fits_every_method(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert content == {"data": {"init_args": {"dataset": content["data"]["init_args"]["dataset"]}}}


def test_two_processes_train_by_conf_trainer_ddp() -> None:
    options = shortened(["conf/dmemm.yaml"])
    driver = (
        "import sys; from lit_diffrl.data import pointmaze; from lit_diffrl.__main__ import main; "
        f"pointmaze.STEPS = {WALK}; pointmaze.REFERENCE_EPISODES = 1; sys.exit(main())"
    )
    Path("driver.py").write_text(f"import sys; sys.path.insert(0, {str(CONF.parent)!r}); {driver}")
    command = [sys.executable, "driver.py", "fit", "--config", "conf/dmemm.yaml", "--config", "conf/trainer/ddp.yaml"]
    done = subprocess.run([*command, *options, "--run", "short"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (last,) = Path("tb_logs").glob("*/*/short/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_by_conf_trainer_gpu() -> None:
    fit(["conf/dmemm.yaml"], "--config", "conf/trainer/gpu.yaml", "--trainer.accelerator", "gpu")


# ---------------------------------------------------------------- what the files say in their comments


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("paper/dmemm/hopper", "--data.horizon 32 --model.n_diffusion_steps 20"),
        ("paper/dmemm/hopper", "--model.guide.at x0 --model.plan.candidates 4 --model.plan.rank_by model"),
        ("paper/dmemm/maze2d-umaze", "--model.x0_estimate chain_paper --model.chain.compute monte_carlo"),
        (
            "paper/dmemm/maze2d-umaze",
            "--data.dataset lit_diffrl/pointmaze/umaze-multi-v0 --model.lambda_rd 0 --model.weighting.mode none",
        ),
        ("paper/diffuser/hopper", "--model.guide.scale 1e-4 --model.guide.t_stopgrad 4"),
        ("bc", "--data.top_fraction 0.1"),
        ("paper/crr/locomotion", "--model.weighting indicator"),
        ("paper/crr/locomotion", "--model.candidates 1 --model.bound 100"),
        ("paper/iql/adroit", "--model.expectile 0.8 --model.beta 3"),
        ("paper/td3bc/locomotion", "--data.dataset mujoco/hopper/medium-v0"),
        ("paper/aepo/locomotion", "--model.schedule joint --model.behaviour_epochs 0 --model.critic_epochs 0"),
        ("paper/aepo/locomotion", "--model.posterior.kind 2 --model.q_training isql --model.rescale false"),
        (
            "paper/aepo/locomotion",
            "--model.q_training cql --model.posterior.clip false --model.posterior.clamp false"
            " --model.posterior.isotonic false",
        ),
        ("aepo", "--model.target.curvature full --model.target.covariance trace --model.target.a_bar posterior_mean"),
        ("aepo", "--model.target.curvature hvp --model.target.covariance jvp --model.target.grad_at a_bar"),
        ("aepo", "--model.target.curvature full --model.target.covariance full --model.guidance closed_form"),
        ("aepo", "--model.target.covariance exact_trace --model.q_training cql --model.cql_backup support"),
        ("aepo", "--model.target.form support --model.target.baseline false"),
        ("aepo", "--model.target.covariance batch --model.behaviour.predict v"),
        ("qgpo", "--model.self_normalise false --model.support.beta_q 1"),
    ],
)
def test_the_alternatives_in_comments_train_too(config: str, more: str) -> None:
    narrow = ["--model.dim=8", "--rollout.video=false"] if re.search("dmemm|diffuser", config) else []
    fit([f"conf/{config}.yaml"], *more.split(), *narrow)


@pytest.mark.parametrize(
    "more",
    [
        "--model.weighting.mode none",
        "--model.lambda_tr 0",
        "--model.lambda_rd 0",
        "--model.guide.lambda_transition 0",
        "--model.x0_estimate chain_bridge --model.chain.compute exact_two_pass",
        "--model.x0_estimate chain_ddim --model.chain.compute checkpointed --data.horizon [8,12]",
    ],
)
def test_ablations_and_estimators_train_by_one_option(more: str) -> None:
    fit(["conf/dmemm.yaml"], *more.split(), "--model.n_diffusion_steps=8", "--model.dim=8")
