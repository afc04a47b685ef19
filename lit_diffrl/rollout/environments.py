"""Environments that files name: whether they may be built, whether they can be, and whether they fit the data.

A dataset and a checkpoint describe their environment by Gymnasium's EnvSpec. Its entry points may be anything of any
module, which Gymnasium imports and calls with the file's own arguments: whoever writes the file chooses what runs here.
So the code must be an environment or a wrapper of a known package, or what this program has registered itself.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lit_diffrl.errors import ConfigError, nearest

if TYPE_CHECKING:
    import gymnasium as gym
    from gymnasium.envs.registration import EnvSpec

    from lit_diffrl.data.spec import DatasetSpec

log = logging.getLogger(__name__)

KNOWN = ("gymnasium", "gymnasium_robotics", "lit_diffrl", "minari")
TRUST = "LIT_DIFFRL_ENV_PACKAGES"  # environment variable: further packages, separated by commas


def check_env(env_spec: str) -> EnvSpec:
    """Read an environment's description, and refuse code that may not run here or is not installed.

    Nothing that the description names is imported before it is known that it may be.

    Args:
        env_spec: Gymnasium's EnvSpec as JSON.

    Raises:
        ConfigError: With the environment's id, what is wrong and the next step.
    """
    from gymnasium.envs.registration import EnvSpec

    try:
        spec = EnvSpec.from_json(env_spec)
    except Exception as error:  # JSON, names and fields fail in their own ways
        raise ConfigError(
            f"the dataset's environment {env_spec[:80]!r} is not an EnvSpec of Gymnasium ({error}); record the "
            "dataset with a registered environment"
        ) from error
    spec.vector_entry_point = None  # of no use here, and one door less
    for entry_point, base in _named_code(spec):
        if base is not None and isinstance(entry_point, str) and _package(entry_point) not in _known_packages():
            raise ConfigError(
                f"the dataset's environment {spec.id!r} asks to run {entry_point!r}, which is neither of a known "
                f"package ({', '.join(_known_packages())}) nor registered in this program under that id. If you trust "
                f"it, set the environment variable {TRUST}={_package(entry_point)}, or register it from Python first: "
                "gymnasium.register"
            )
    for entry_point, base in _named_code(spec):
        found, missing = _imported(entry_point)
        if missing:
            raise ConfigError(
                f"the dataset's environment {spec.id!r} is not installed ({missing}): install the package that "
                "provides it, or use a dataset of an environment that is installed; " + _nearest_id(spec.id)
            )
        if base is not None and not (isinstance(found, type) and issubclass(found, base)):
            raise ConfigError(
                f"the dataset's environment {spec.id!r} asks to run {entry_point!r}, which is no subclass of "
                f"gymnasium.{base.__name__}; record the dataset with a registered environment"
            )
    return spec


def _known_packages() -> list[str]:
    return [*KNOWN, *(name.strip() for name in os.environ.get(TRUST, "").split(",") if name.strip())]


def _package(entry_point: str) -> str:
    return entry_point.partition(":")[0].partition(".")[0]


def _named_code(spec: EnvSpec) -> Iterator[tuple[Any, type | None]]:
    """Every entry point of a description, and the class it must be one of: None for what is registered here."""
    import gymnasium as gym

    registered = gym.registry.get(spec.id)
    own = registered is not None and spec.entry_point == registered.entry_point
    yield spec.entry_point, None if own else gym.Env
    for wrapper in spec.additional_wrappers:
        yield wrapper.entry_point, gym.Wrapper


def _imported(entry_point: Any) -> tuple[Any, str]:
    """What ``module:name`` stands for, and, if it cannot be imported, why."""
    if not isinstance(entry_point, str):
        return None, "its description names no class"
    module, _, name = entry_point.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # a package's import may fail in any way
        return None, f"{type(error).__name__}: {error}"
    return found, "" if found is not None else f"{module} has no {name!r}"


def _nearest_id(env_id: str) -> str:
    import gymnasium as gym
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    return nearest(env_id, gym.registry) or "gymnasium.pprint_registry() lists them"


@contextlib.contextmanager
def _quiet_models() -> Iterator[None]:
    """Leave out what MuJoCo finds outdated in Gymnasium's own model files.

    It would print it, and append it to a file in the working folder, for each environment of each evaluation. Other
    warnings go to the program's log.
    """
    import mujoco

    def warn(message: str) -> None:
        if "deprecated" not in message:
            log.warning(message)

    mujoco.set_mju_user_warning(warn)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(None)


def make_env(env_spec: str, *, render: bool = False) -> gym.Env:
    """Build an environment from its saved description.

    Args:
        env_spec: Gymnasium's EnvSpec as JSON.
        render: Make it able to draw pictures of itself.

    Raises:
        ConfigError: As :func:`check_env`; when this installation cannot build it, or its actions are not a box of
            numbers.
    """
    import gymnasium as gym

    options: dict[str, Any] = {"render_mode": "rgb_array"} if render else {}
    if render and sys.platform == "linux" and not ({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        os.environ.setdefault("MUJOCO_GL", "egl")  # the default needs a display
    spec = check_env(env_spec)
    try:
        with _quiet_models():
            env = gym.make(spec, disable_env_checker=True, **options)
    except Exception as error:  # packages fail in their own ways when a simulator or an asset is missing
        raise ConfigError(
            f"cannot build the evaluation environment {env_spec[:120]} ({type(error).__name__}: {error}); install "
            "the package that provides it, or train without evaluation by a dataset that names no environment"
        ) from error
    if not isinstance(env.action_space, gym.spaces.Box):
        raise ConfigError(f"{spec.id} has actions {env.action_space}; rollouts need a Box of continuous actions")
    return env


def step_limit(spec: DatasetSpec, env: gym.Env, max_steps: int | None) -> int:
    """Steps after which an episode ends at the latest: the least of the limits that are known.

    Raises:
        ConfigError: When none is.
    """
    own = None if env.spec is None else env.spec.max_episode_steps
    limits = [limit for limit in (max_steps, spec.max_episode_steps, own) if limit is not None]
    if not limits:
        raise ConfigError("the environment has no time limit: say how long episodes last, --rollout.max_steps 1000")
    return min(limits)


def rehearse(spec: DatasetSpec, max_steps: int | None) -> None:
    """Refuse, before time is spent on training, an environment in which the agent could not be evaluated.

    Args:
        spec: Names the environment and describes the data.
        max_steps: As for :func:`~lit_diffrl.rollout.episodes.run_episodes`.

    Raises:
        ConfigError: With what differs from the data, or as :func:`make_env` and :func:`step_limit`.
    """
    assert spec.env_spec is not None
    env = make_env(spec.env_spec)
    try:
        step_limit(spec, env, max_steps)
        obs, _ = env.reset(seed=0)
    finally:
        env.close()
    name = env.spec.id if env.spec is not None else "environment"
    try:
        spec.split_obs(obs)
        if env.action_space.shape != (spec.action_dim,):
            raise ConfigError(
                f"the environment takes actions of shape {env.action_space.shape}, those of "
                f"{'+'.join(spec.dataset_ids)} have {(spec.action_dim,)}; correct the dataset's env_spec"
            )
    except ConfigError as error:
        raise ConfigError(f"{name}, which the dataset names for evaluation, does not fit it: {error}") from error
