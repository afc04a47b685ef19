"""Episodes in the simulator: seeded one by one, played side by side, counted fairly.

Episode k is reset with seed ``base + k`` and so are the agent's random numbers, hence its result does not depend on
how many environments run at once. A fixed set of episodes is played, each to its end: counting the first ones to
finish would favour the short ones.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from lit_diffrl.errors import ConfigError, check_range
from lit_diffrl.rollout.environments import make_env, step_limit

if TYPE_CHECKING:
    import gymnasium as gym

    from lit_diffrl.data.spec import DatasetSpec

log = logging.getLogger(__name__)

Observation = Any  # an array, or a dict of arrays: whatever the environment gives
VIDEO_FRAMES = 120  # at most, spread evenly over the longest possible episode
PLANS_DRAWN = 4  # at most, likewise
_drawing_failed = False  # MuJoCo ends the process when it is asked to draw again after it could not


class Agent(Protocol):
    """All that a rollout knows of a method."""

    def act(self, obs: Observation, active: np.ndarray | None = None) -> Any:
        """Return ``(n, action_dim)`` actions for a batch of observations; rows not ``active`` are ignored."""

    def reset(self, mask: np.ndarray | None = None, seeds: Sequence[int] | None = None) -> None:
        """Begin new episodes, each with its own seed."""


@dataclass(frozen=True)
class EpisodeResult:
    """What came of one episode.

    Args:
        seed: Seed of the environment and of the agent's random numbers.
        return_: Sum of rewards, undiscounted.
        score: Return on the scale 0 = random, 100 = reference; None when the dataset names no reference returns.
        length: Environment steps.
        terminated: Ended in a terminal state rather than at the time limit.
        action_ms: Mean time per environment step to choose an action, a call's time being shared by its rows [ms].
        call_ms: Mean time of a call of ``agent.act`` that this episode took part in [ms].
        path: ``(length + 1, obs_dim)`` observations, if recorded.
        position: ``(length + 1, 2)`` achieved goals of a goal-directed environment, if recorded.
        goal: ``(2,)`` its desired goal, if recorded.
        plans: ``(step, (h, obs_dim))`` plans in raw units that the agent was following at some steps, if recorded.
        frames: ``(height, width, 3)`` uint8 pictures, if rendered.
    """

    seed: int
    return_: float
    score: float | None
    length: int
    terminated: bool
    action_ms: float
    call_ms: float
    path: np.ndarray | None = field(default=None, repr=False)
    position: np.ndarray | None = field(default=None, repr=False)
    goal: np.ndarray | None = field(default=None, repr=False)
    plans: list[tuple[int, np.ndarray]] = field(default_factory=list, repr=False)
    frames: list[np.ndarray] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, without the recordings, in plain types."""
        names = ("seed", "score", "length", "terminated", "action_ms", "call_ms")
        return {"return": self.return_, **{name: getattr(self, name) for name in names}}


def summarize(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Summarise episodes.

    Args:
        results: At least one episode.

    Returns:
        ``episodes``, ``terminated`` (fraction), ``action_ms`` and ``call_ms`` (means over steps), and ``return``,
        ``length`` and ``score``, each with ``mean``, ``std`` (population), ``min`` and ``max``; ``score`` is None
        without reference returns. Plain types.
    """

    def spread(values: Sequence[float]) -> dict[str, float]:
        x = np.asarray(values, dtype=np.float64)
        return {"mean": float(x.mean()), "std": float(x.std()), "min": float(x.min()), "max": float(x.max())}

    lengths = [r.length for r in results]
    scores = [r.score for r in results if r.score is not None]
    return {
        "episodes": len(results),
        "return": spread([r.return_ for r in results]),
        "score": spread(scores) if scores else None,
        "length": spread(lengths),
        "terminated": float(np.mean([r.terminated for r in results])),
        "action_ms": float(np.average([r.action_ms for r in results], weights=lengths)),
        "call_ms": float(np.average([r.call_ms for r in results], weights=lengths)),
    }


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Give back the global random states (torch, its CUDA devices, numpy, python) as they were."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def run_episodes(
    spec: DatasetSpec,
    agent: Agent,
    *,
    episodes: int | Sequence[int] = 10,
    num_envs: int = 10,
    seed: int = 1_000,
    max_steps: int | None = None,
    record: int = 0,
    render: bool = False,
) -> list[EpisodeResult]:
    """Let an agent act, and leave the program's random numbers and the agent's episodes as if it had not.

    Args:
        spec: Names the environment (``env_spec``), its step limit and the reference returns; reads observations.
        agent: Chooses the actions; they are clipped to the action space here, once.
        episodes: How many, or which: episode k has seed ``seed + k``.
        num_envs: Environments that step side by side, so that the agent acts on a batch.
        seed: Seed of episode 0.
        max_steps: Stop episodes here, if before the environment's own limit.
        record: Keep observations and plans of the episodes k < record.
        render: Keep pictures of episode 0.

    Returns:
        One result per episode, in order.

    Raises:
        ConfigError: When the dataset names no environment or it cannot be built, when nothing limits its episodes,
            or when an action has the wrong shape or is not finite.
    """
    check_range("num_envs", num_envs, 1)
    if spec.env_spec is None:
        raise ConfigError(f"{'+'.join(spec.dataset_ids)} names no environment (no env_spec): it cannot be evaluated")
    indices = list(range(episodes)) if isinstance(episodes, int) else list(episodes)
    if not indices:  # a process beyond the last episode
        return []
    results: list[EpisodeResult] = []
    envs: list[gym.Env] = []
    render = render and not _drawing_failed
    try:
        for k in indices[:num_envs]:
            envs.append(make_env(spec.env_spec, render=render and k == 0))
        limit = step_limit(spec, envs[0], max_steps)
        with preserved_rng():
            for first in range(0, len(indices), num_envs):
                batch = [
                    _Episode(env, k, seed + k, k < record, render and k == 0)
                    for env, k in zip(envs, indices[first : first + num_envs])
                ]
                _play(batch, agent, spec, limit)
                results += [episode.result(spec) for episode in batch]
    finally:
        for env in envs:
            env.close()
        agent.reset()
    return results


@dataclass
class _Episode:
    """An episode under way."""

    env: gym.Env
    index: int
    seed: int
    recorded: bool
    rendered: bool
    obs: Observation = None
    return_: float = 0.0
    length: int = 0
    terminated: bool = False
    action_ms: float = 0.0
    call_ms: float = 0.0
    path: list[Observation] = field(default_factory=list)
    plans: list[tuple[int, np.ndarray]] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)

    def begin(self) -> None:
        self.obs, _ = self.env.reset(seed=self.seed)
        self.keep()

    def keep(self) -> None:
        if self.recorded:
            self.path.append(self.obs)

    def step(self, action: np.ndarray, agent: Agent, limit: int) -> bool:
        """Apply an action; return whether the episode goes on."""
        space = self.env.action_space
        low, high = space.low, space.high  # type: ignore[attr-defined]
        if action.shape != space.shape or not np.isfinite(action).all():
            raise ConfigError(
                f"episode of seed {self.seed}, step {self.length}: {type(agent).__name__} chose {action.tolist()}; the "
                f"environment takes finite actions of shape {space.shape}: check that the checkpoint and its dataset "
                "belong together and that training did not diverge"
            )
        if self.rendered and self.length % -(-limit // VIDEO_FRAMES) == 0:
            self.draw()
        self.obs, reward, terminated, truncated, _ = self.env.step(np.clip(action, low, high).astype(space.dtype))
        self.return_ += float(reward)
        self.length += 1
        self.terminated = bool(terminated)
        self.keep()
        return not (terminated or truncated or self.length >= limit)

    def draw(self) -> None:
        global _drawing_failed
        try:
            self.frames.append(np.asarray(self.env.render()))
        except Exception as error:  # every OpenGL platform fails in its own way
            self.rendered, _drawing_failed = False, True
            log.warning(
                "cannot draw the simulator (%s: %s), going on without video; on a machine without display try the "
                "environment variable MUJOCO_GL=egl or MUJOCO_GL=osmesa", type(error).__name__, error,
            )  # fmt: skip

    def note_plan(self, plan: np.ndarray | None) -> None:
        new = plan is not None and not (self.plans and np.array_equal(self.plans[-1][1], plan))
        if self.recorded and new:
            self.plans.append((self.length, np.array(plan, dtype=np.float32)))

    def result(self, spec: DatasetSpec) -> EpisodeResult:
        score = spec.score(self.return_)
        path = position = goal = None
        if self.recorded:
            stacked = stack_observations(self.path)
            path = np.asarray(spec.split_obs(stacked)[0], dtype=np.float32)
            if isinstance(stacked, Mapping) and {"achieved_goal", "desired_goal"} <= stacked.keys():
                position, goal = stacked["achieved_goal"], stacked["desired_goal"][0]
        return EpisodeResult(
            seed=self.seed,
            return_=self.return_,
            score=None if score is None else float(score),
            length=self.length,
            terminated=self.terminated,
            action_ms=self.action_ms / self.length,
            call_ms=self.call_ms / self.length,
            path=path,
            position=position,
            goal=goal,
            plans=self.plans,
            frames=self.frames,
        )


def stack_observations(observations: Sequence[Observation]) -> Observation:
    """Stack observations of single environments into a batch, key by key for dicts."""
    if isinstance(observations[0], Mapping):
        return {key: np.stack([obs[key] for obs in observations]) for key in observations[0]}
    return np.stack(observations)


def _play(batch: Sequence[_Episode], agent: Agent, spec: DatasetSpec, limit: int) -> None:
    # A plain list of environments, not a vector environment: that one can step only all rows together, so every
    # episode that has ended would have to be reset and stepped idly until the last one ends.
    for episode in batch:
        episode.begin()
    agent.reset(seeds=[episode.seed for episode in batch])
    active = np.ones(len(batch), dtype=bool)
    trace = getattr(agent, "plan_trace", None)
    draw_every = -(-limit // PLANS_DRAWN)
    step = 0
    while active.any():
        start = time.perf_counter()
        actions = np.asarray(agent.act(stack_observations([e.obs for e in batch]), active=active.copy()))
        spent = 1000 * (time.perf_counter() - start)
        plans = trace() if trace is not None and step % draw_every == 0 else None
        rows = np.flatnonzero(active).tolist()
        for row in rows:
            episode = batch[row]
            episode.action_ms += spent / len(rows)
            episode.call_ms += spent
            if plans is not None and row < len(plans):
                episode.note_plan(plans[row])
            active[row] = episode.step(actions[row], agent, limit)
        step += 1
