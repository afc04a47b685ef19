"""Environments that files name: known code only, nothing imported before that is known, and sizes that fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import gymnasium_robotics  # noqa: F401  its environments are looked at below
import pytest
from gymnasium.envs.registration import EnvSpec

from lit_diffrl.data import pointmaze
from lit_diffrl.data.d4rl import TASKS, _evaluation
from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.errors import ConfigError
from lit_diffrl.rollout.environments import check_env, make_env, rehearse

HALF_CHEETAH = "HalfCheetah-v5"
HOPPER = "gymnasium.envs.mujoco.hopper_v5:HopperEnv"
Describe = Callable[..., DatasetSpec]


def spec_json(env_id: str = "Hopper-v5", entry_point: Any = HOPPER, wrapper: Any = None, **changes: Any) -> str:
    spec = json.loads(gym.spec("Hopper-v5").to_json())
    wrappers = [] if wrapper is None else [{"name": "W", "entry_point": wrapper, "kwargs": {}}]
    return json.dumps({**spec, "id": env_id, "entry_point": entry_point, "additional_wrappers": wrappers, **changes})


def refused(env_spec: str) -> str:
    """The one line that a description gets, from both functions."""
    lines = []
    for function in (check_env, make_env):
        with pytest.raises(ConfigError) as caught:
            function(env_spec)
        lines.append(str(caught.value))
    assert lines[0] == lines[1] and "\n" not in lines[0]
    return lines[0]


# ---------------------------------------------------------------- what is built


def test_environments_of_known_packages_are_built() -> None:
    for env_spec in (
        gym.make("HalfCheetah-v5").spec.to_json(),  # type: ignore[union-attr]
        pointmaze.env_spec("umaze").to_json(),
        gym.spec("PointMaze_UMaze-v3").to_json(),
        spec_json(wrapper="gymnasium.wrappers:ClipAction"),
    ):
        make_env(env_spec).close()


def test_what_mujoco_finds_outdated_in_the_models_is_not_said(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = gym.spec(HALF_CHEETAH).to_json()
    gym.make(HALF_CHEETAH).close()
    assert "deprecated" in capfd.readouterr().err  # what Gymnasium's own call says of this model
    make_env(spec).close()
    assert capfd.readouterr().err == ""


def test_other_warnings_of_mujoco_are_passed_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mujoco

    def build(*_: Any, **__: Any) -> Any:
        model = mujoco.MjModel.from_xml_string(
            '<mujoco><worldbody><body><freejoint/><geom size="1"/></body></worldbody></mujoco>'
        )
        data = mujoco.MjData(model)
        data.qvel[0] = float("nan")
        mujoco.mj_step(model, data)
        return made(HALF_CHEETAH)

    made = gym.make
    monkeypatch.setattr(gym, "make", build)
    with caplog.at_level("WARNING"):
        make_env(gym.spec(HALF_CHEETAH).to_json()).close()
    assert [record.message.startswith("Nan, Inf or huge value") for record in caplog.records] == [True]


@pytest.mark.parametrize("task", [name for name in TASKS if _evaluation(name)[0]])
def test_every_environment_of_d4rl_is_known(task: str) -> None:
    env_spec = _evaluation(task)[0]
    assert env_spec is not None and check_env(env_spec) == EnvSpec.from_json(env_spec)


def test_every_environment_that_is_registered_is_accepted_or_not_installed() -> None:
    for registered in list(gym.registry.values()):
        if isinstance(registered.entry_point, str):
            try:
                check_env(registered.to_json())
            except ConfigError as error:
                assert "is not installed" in str(error)


# ---------------------------------------------------------------- code of strangers


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that leaves a trace when it is imported, and one more when its function is called."""
    (tmp_path / "stranger").mkdir()
    trace = tmp_path / "trace"
    (tmp_path / "stranger" / "__init__.py").write_text(
        f"from pathlib import Path\nimport gymnasium\nPath({str(trace)!r}).touch()\n"
        f"def make(**kwargs):\n    Path({str(tmp_path / 'called')!r}).touch()\n"
        "class Env(gymnasium.envs.mujoco.hopper_v5.HopperEnv): pass\n"
        "class Wrapper(gymnasium.Wrapper): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    return trace


@pytest.mark.parametrize(
    "options",
    [
        {"entry_point": "os:system", "kwargs": {"command": "true"}},
        {"entry_point": "stranger:make"},
        {"entry_point": "stranger:Env"},
        {"wrapper": "stranger:Wrapper"},
        {"entry_point": "gymnasium_stranger:Env"},
        {"env_id": "stranger:Hopper-v5", "entry_point": "stranger:Env"},
    ],
    ids=str,
)
def test_code_of_strangers_is_neither_imported_nor_called(stranger: Path, options: dict[str, Any]) -> None:
    line = refused(spec_json(**options))
    name = next(v for k, v in reversed(options.items()) if isinstance(v, str))
    assert "not an EnvSpec" in line or (name in line and f"LIT_DIFFRL_ENV_PACKAGES={name.split(':')[0]}" in line)
    assert "stranger" not in sys.modules and not stranger.exists()
    if options == {"entry_point": "stranger:make"}:
        with pytest.raises(TypeError):
            gym.make(EnvSpec.from_json(spec_json(**options)))
        assert stranger.exists() and stranger.with_name("called").exists(), "Gymnasium itself would have done both"


@pytest.mark.parametrize(
    "options",
    [
        {"entry_point": "gymnasium.envs.registration:load_env_creator", "kwargs": {"name": "stranger:make"}},
        {"entry_point": "gymnasium:make", "kwargs": {"id": "stranger:Hopper-v5"}},
        {"entry_point": "minari:delete_dataset", "kwargs": {"dataset_id": "test/point-v0"}},
        {"entry_point": "lit_diffrl.__main__:main", "kwargs": {"args": ["fit"]}},
        {"wrapper": "gymnasium.envs.registration:load_env_creator"},
        {"wrapper": HOPPER},
    ],
    ids=str,
)
def test_a_known_package_lends_its_environments_only(stranger: Path, options: dict[str, Any]) -> None:
    assert "is no subclass of gymnasium." in refused(spec_json(**options))
    assert "stranger" not in sys.modules and not stranger.exists()


def test_the_entry_point_of_vector_environments_is_left_out(stranger: Path) -> None:
    env = make_env(spec_json(vector_entry_point="stranger:make"))
    assert env.spec is not None and env.spec.vector_entry_point is None and not stranger.exists()
    env.close()


def test_packages_of_ones_own_are_built_once_they_are_trusted_or_registered(
    stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env_spec = spec_json("Mine-v0", "stranger:Env")
    assert "LIT_DIFFRL_ENV_PACKAGES=stranger" in refused(env_spec)
    monkeypatch.setenv("LIT_DIFFRL_ENV_PACKAGES", "other, stranger")
    make_env(env_spec).close()
    assert "is no subclass" in refused(spec_json("Mine-v0", "stranger:make"))
    monkeypatch.delenv("LIT_DIFFRL_ENV_PACKAGES")
    monkeypatch.setitem(gym.registry, "Mine-v0", EnvSpec("Mine-v0", "stranger:Env"))
    make_env(env_spec).close()
    assert "stranger:make" in refused(spec_json("Mine-v0", "stranger:make")), "another entry point under that id"
    assert "stranger:Env" in refused(spec_json("Mine-v1", "stranger:Env")), "another id"


# ---------------------------------------------------------------- what cannot be built


@pytest.mark.parametrize(
    ("env_spec", "words"),
    [
        (
            spec_json("Hoper-v5", "gymnasium.envs.nowhere:Hopper"),
            ["'Hoper-v5' is not installed", "No module named 'gymnasium.envs.nowhere'", "'Hopper-v5'"],
        ),
        (spec_json("Hopper-v9", HOPPER.replace("pperE", "perE")), ["'Hopper-v9'", "has no 'HoperEnv'", "'Hopper-v5'"]),
        (spec_json("PointMaze_UMaze-v9", None), ["names no class", "'PointMaze_UMaze-v3'"]),
        (spec_json(entry_point=["os", "system"]), ["names no class"]),
        (spec_json(wrapper="gymnasium.wrappers:Nothing"), ["has no 'Nothing'"]),
        (spec_json(wrapper=3), ["names no class"]),
        ("{", ["not an EnvSpec"]),
        ('{"id": 3}', ["not an EnvSpec"]),
        ("[]", ["not an EnvSpec"]),
        (spec_json("no id at all:"), ["not an EnvSpec"]),
    ],
)
def test_environments_that_are_not_installed_are_refused(env_spec: str, words: list[str]) -> None:
    line = refused(env_spec)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("changes", [{"kwargs": {"no_such_argument": 1}}, {"kwargs": [1]}, {"max_episode_steps": "x"}])
def test_environments_that_cannot_be_built_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot build the evaluation environment .*Hopper-v5"):
        make_env(spec_json(**changes))


def test_an_environment_is_tried_before_training(toy_spec: Describe) -> None:
    rehearse(toy_spec(), None)
    with pytest.raises(ConfigError, match=r"Countdown-v0, which .* does not fit it: observation has shape obs \(2,\)"):
        rehearse(toy_spec(obs_dim=3), None)
    with pytest.raises(ConfigError, match=r"does not fit it: the environment takes actions of shape \(1,\)"):
        rehearse(toy_spec(action_dim=2), None)
    endless = toy_spec(env_spec=EnvSpec("Countdown-v0", entry_point="lit_diffrl_toy_env:Countdown").to_json())
    with pytest.raises(ConfigError, match=r"no time limit.*--rollout.max_steps"):
        rehearse(endless, None)
    rehearse(endless, 10)
