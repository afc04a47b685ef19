"""Replaying in the simulator: what really follows from an observed state.

A dynamics model is judged by setting the simulator to a state of the data and applying the actions that the model was
given. Robots leave their place in the world out of what they observe; it is set to 0, which nothing depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, cast

import numpy as np

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.waypoints import observed_frame
from lit_diffrl.errors import ConfigError
from lit_diffrl.rollout.environments import make_env

CLIP = 10.0  # of the velocities that some robots observe

Choose = Callable[[np.ndarray, int], Any]
"""``(observations (n, obs) raw float64, step t) -> actions (n, action)``."""


def up_to_end(ends: np.ndarray) -> np.ndarray:
    """Which steps ``(n, T)`` of rows count: those up to the first that ends its row ``(n, T)`` bool, with it."""
    counts: np.ndarray = np.cumsum(ends, axis=1) - ends == 0
    return counts


def with_first(steps: np.ndarray, first: float) -> np.ndarray:
    """Values of steps ``(n, H - 1)`` as those of the states they lead to ``(n, H)``; no step leads to the first."""
    return np.pad(steps, ((0, 0), (1, 0)), constant_values=first)


class Replay(NamedTuple):
    """What happened.

    Args:
        states: ``(n, H, obs)`` float64 raw; the first as the simulator observes what it was set to.
        terminated: ``(n, H - 1)`` bool, whether the state after step t is terminal. Rows go on all the same.
        rewards: ``(n, H - 1)`` of the steps; see :attr:`Simulator.knows_rewards`.
    """

    states: np.ndarray
    terminated: np.ndarray
    rewards: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """States ``(n, H)`` that are no later than the first terminal one of their row."""
        return with_first(up_to_end(self.terminated), True)


class Simulator:
    """The environment of a dataset, which can be set to observed states; to be used in a ``with`` statement.

    Args:
        spec: Names the environment and describes its observations.

    Attributes:
        knows_rewards: Rewards are those of the data. In a maze they depend on a goal, which data of several goals do
            not tell.

    Raises:
        ConfigError: When the dataset names no environment, or one whose state does not follow from an observation.
    """

    def __init__(self, spec: DatasetSpec) -> None:
        self._name = "+".join(spec.dataset_ids)
        if spec.env_spec is None:
            raise ConfigError(f"{self._name} names no environment (no env_spec): nothing can be replayed")
        self._env = cast(Any, make_env(spec.env_spec).unwrapped)
        self._maze = hasattr(self._env, "point_env")
        self._obs_dim = spec.obs_dim
        try:
            # The one that holds the physics; a maze wraps it.
            self._physics = self._env.point_env if self._maze else self._env
            if not hasattr(self._physics, "set_state") or (self._maze and spec.obs_keys != ["observation"]):
                raise self._cannot("it is no MuJoCo robot or point maze observed alone")
            obs = self._observation(self._env.reset(seed=0)[0])
            self.knows_rewards = not self._maze or spec.goal is not None
            if self._maze and spec.goal is not None:  # its own may be drawn, and move when it is reached
                self._env.goal, self._env.reset_target = np.array(spec.goal), False
            self._hidden = self._physics.model.nq + self._physics.model.nv - len(obs)
            if not 0 <= self._hidden <= 2 or len(obs) != self._obs_dim:
                raise self._cannot(f"{len(obs)} numbers are observed of its positions and velocities")
            action = np.zeros(spec.action_dim)
            again = self.run([self.state_of(obs)], lambda obs, t: action[None], 2).states[0, 0]
            if not np.allclose(again, obs, rtol=0, atol=1e-9):
                raise self._cannot("set to one, it observes another")
            model = self._physics.model
            fast = self._look(self.state_at(np.zeros(model.nq), np.full(model.nv, 2 * CLIP)))
            self._clips = not self._maze and fast[-1] < 2 * CLIP
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Simulator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()

    def settable(self, obs: np.ndarray) -> np.ndarray:
        """Which observations ``(n, obs)`` tell the whole state: no velocity of theirs was clipped; ``(n,)`` bool."""
        velocity = obs[:, self._physics.model.nq - self._hidden :]
        return np.all((np.abs(velocity) < CLIP) | (not self._clips), axis=1)

    def state_of(self, obs: np.ndarray) -> np.ndarray:
        """The simulator's state for an observation ``(obs,)``."""
        seen = np.asarray(obs, dtype=np.float64)
        if self._maze:
            rotation, translation = observed_frame(self._env)
            return self.state_at(rotation.T @ (seen[:2] - translation), rotation.T @ seen[2:])
        positions = self._physics.model.nq - self._hidden
        return self.state_at(np.concatenate([np.zeros(self._hidden), seen[:positions]]), seen[positions:])

    def state_at(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """The simulator's state for recorded positions and velocities."""
        import mujoco

        mujoco.mj_resetData(self._physics.model, self._physics.data)
        self._physics.set_state(np.asarray(qpos, dtype=np.float64), np.asarray(qvel, dtype=np.float64))
        return self._state()

    def run(self, states: Sequence[np.ndarray], choose: Choose, horizon: int) -> Replay:
        """Act from given states on, all rows side by side.

        Args:
            states: n of them, by :meth:`state_of` or :meth:`state_at`.
            choose: Gives the actions of each step; they are clipped to the action space.
            horizon: States H of each row, the first included: ``H - 1`` steps.
        """
        space = self._env.action_space
        now = list(states)
        seen = [np.stack([self._look(state) for state in now])]
        rewards = np.zeros((horizon - 1, len(now)))
        terminated = np.zeros_like(rewards, dtype=bool)
        for t in range(horizon - 1):
            actions = np.clip(np.asarray(choose(seen[-1], t)), space.low, space.high).astype(np.float64)
            rows = []
            for i, action in enumerate(actions):
                self._restore(now[i])
                obs, rewards[t, i], terminated[t, i], _, _ = self._env.step(action)
                rows.append(self._observation(obs))
                now[i] = self._state()
            seen.append(np.stack(rows))
        return Replay(np.stack(seen, axis=1), terminated.T, rewards.T)

    def _look(self, state: np.ndarray) -> np.ndarray:
        self._restore(state)
        obs = self._physics._get_obs()
        return self._observation(self._env._get_obs(obs[0]) if self._maze else obs)

    def _observation(self, obs: Any) -> np.ndarray:
        return np.asarray(obs["observation"] if self._maze else obs, dtype=np.float64).copy()

    def _state(self) -> np.ndarray:
        """All that the next step depends on, the solver's warm start included."""
        import mujoco

        model, kind = self._physics.model, mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(model, kind))
        mujoco.mj_getState(model, self._physics.data, state, kind)
        return state

    def _restore(self, state: np.ndarray) -> None:
        import mujoco

        mujoco.mj_setState(self._physics.model, self._physics.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)

    def _cannot(self, reason: str) -> ConfigError:
        name = self._env.spec.id if self._env.spec is not None else type(self._env).__name__
        return ConfigError(
            f"{name}, the environment of {self._name}, cannot be set to an observed state ({reason}); replays are for "
            "Hopper, Walker2d, HalfCheetah, Swimmer and point mazes whose state is 'observation' alone"
        )


def replay(simulator: Simulator, obs: np.ndarray, actions: np.ndarray) -> Replay:
    """Apply fixed actions.

    Args:
        simulator: Of the dataset.
        obs: ``(n, obs)`` raw, the first states.
        actions: ``(n, H, action)`` raw; the last one leads out of the H states and is not used.
    """
    return simulator.run([simulator.state_of(row) for row in obs], lambda _, t: actions[:, t], actions.shape[1])
