"""Every file of conf/ trains, saves and acts: a few batches of each phase, on small data by the names it asks for."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
import yaml
from gymnasium.envs.registration import EnvSpec

import lit_diffrl
from lit_diffrl.__main__ import main
from lit_diffrl.data import pointmaze

CONF = Path(__file__).parents[1] / "conf"
MAIN = [*sorted(CONF.glob("*.yaml")), *sorted(CONF.glob("paper/*/*.yaml"))]
OVERLAYS = sorted(CONF.glob("data/*.yaml"))
PHASES = ("world_model_epochs", "value_epochs", "diffusion_epochs")
SMALL = [
    "--data.updates_per_epoch=2",
    "--data.batch_size=2",
    "--data.transition_batch_size=8",
    "--rollout.episodes=1",
    "--rollout.num_envs=1",
    "--rollout.max_steps=2",
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
        for robot, env_id in ROBOTS.items():
            episodes = record(env_id)
            write_d4rl(root / f"{robot}_medium-v2.hdf5", episodes)
            for level in ("medium", "expert"):
                write_minari(f"mujoco/{robot}/{level}-v0", env_id, episodes)
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


def shortened(paths: list[str]) -> list[str]:
    """Options that leave one epoch of each phase that a config has, and a few network calls per plan."""
    model: dict[str, Any] = {}
    for path in paths:
        model |= (yaml.safe_load(Path(path).read_text()).get("model") or {}).get("init_args", {})
    options = [f"--model.{phase}=1" for phase in PHASES if model.get(phase)]
    if (model.get("plan") or {}).get("candidates", 1) > 1:
        options.append("--model.plan.candidates=2")
    return [*SMALL, *options, "--model.sampler.steps=2", "--model.ema.every=1"]


def fit(paths: list[str], *more: str) -> dict[str, Any]:
    """Train, and check the run that is left; returns its checkpoint."""
    configs = [argument for path in paths for argument in ("--config", path)]
    assert main(["fit", *configs, *shortened(paths), "--run", "short", *more]) == 0
    (last,) = Path("tb_logs").glob("*/*/short/checkpoints/last.ckpt")
    checkpoint = torch.load(last, weights_only=True)

    options, data = checkpoint["hyper_parameters"], checkpoint["datamodule_hyper_parameters"]
    assert options["horizon"] == data["horizon"]
    assert checkpoint["epoch"] + 1 == sum(options[phase] for phase in PHASES)
    assert checkpoint["global_step"] == 2 * (checkpoint["epoch"] + 1)
    assert all(bool(value.isfinite().all()) for key, value in checkpoint["state_dict"].items() if "best" not in key)
    assert last.with_name("best.ckpt").exists() and (last.parents[1] / "config.yaml").exists()

    agent = lit_diffrl.load(last)
    assert agent.spec is not None and agent.spec.env_spec is not None
    env = gym.make(EnvSpec.from_json(agent.spec.env_spec))
    obs, _ = env.reset(seed=0)
    assert env.action_space.contains(agent.act(obs))
    env.close()
    return checkpoint


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize("path", MAIN, ids=name)
def test_a_config_trains_and_acts(path: Path) -> None:
    fit([f"conf/{name(path)}.yaml"])


@pytest.mark.parametrize("path", OVERLAYS, ids=name)
def test_a_data_file_trains_by_the_command_it_shows(path: Path) -> None:
    command = re.search(r"^# +(python -m lit_diffrl fit .*)$", path.read_text(), re.MULTILINE)
    assert command, f"{name(path)} does not say how it is used"
    paths = [word for word in shlex.split(command[1]) if word.endswith(".yaml")]
    assert paths[-1] == f"conf/{name(path)}.yaml"
    dataset = yaml.safe_load(path.read_text())["data"]["init_args"]["dataset"]
    checkpoint = fit(paths, "--model.dim=8", "--rollout.video=false")
    assert checkpoint["datamodule_hyper_parameters"]["dataset"] == dataset


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
    ],
)
def test_the_alternatives_in_comments_train_too(config: str, more: str) -> None:
    fit([f"conf/{config}.yaml"], *more.split(), "--model.dim=8", "--rollout.video=false")


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
