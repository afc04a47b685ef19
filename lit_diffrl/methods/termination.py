"""Which states end an episode: the rules of MuJoCo's robots, evaluated on states that a model predicted.

A model that goes on after a fall collects rewards that do not exist. The rules are those of Gymnasium's environments,
with the limits that the dataset's environment was made with; a time limit is no end.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_diffrl.errors import ConfigError, check_choice

Interval = tuple[float, float]


@dataclass(frozen=True)
class Termination:
    """An episode goes on while entries of the next state, in raw units, are within limits and all are finite.

    Args:
        name: Of the robot, or ``never``.
        height: Limits of entry 0.
        angle: Limits of entry 1, or None.
        entries: Limits of every entry but 0, or None.
        closed: Whether the limits themselves are allowed.
    """

    name: str
    height: Interval | None = None
    angle: Interval | None = None
    entries: Interval | None = None
    closed: bool = False

    def __call__(self, next_obs: Tensor) -> Tensor:
        """Whether states are terminal.

        Args:
            next_obs: ``(..., obs)`` raw.

        Returns:
            ``(...,)`` bool.
        """
        if self.height is None:
            return torch.zeros(next_obs.shape[:-1], dtype=torch.bool, device=next_obs.device)
        alive = next_obs.isfinite().all(-1) & self._within(next_obs[..., 0], self.height)
        if self.angle is not None:
            alive &= self._within(next_obs[..., 1], self.angle)
        if self.entries is not None:
            alive &= self._within(next_obs[..., 1:], self.entries).all(-1)
        return ~alive

    def _within(self, x: Tensor, limits: Interval) -> Tensor:
        low, high = limits
        return (low <= x) & (x <= high) if self.closed else (low < x) & (x < high)


INFINITE = float("inf")
RULES = {
    rule.name: rule
    for rule in (
        Termination("hopper", height=(0.7, INFINITE), angle=(-0.2, 0.2), entries=(-100.0, 100.0)),
        Termination("walker2d", height=(0.8, 2.0), angle=(-1.0, 1.0)),
        Termination("ant", height=(0.2, 1.0), closed=True),
        Termination("never"),
    )
}
TERMINATIONS = ("auto", *RULES)
ENDLESS = ("halfcheetah", "swimmer", "pointmaze", "maze2d")
LIMITS = {"healthy_z_range": "height", "healthy_angle_range": "angle", "healthy_state_range": "entries"}


def termination_rule(name: str, env_spec: str | None) -> Termination:
    """Find the rule of a dataset's environment.

    Args:
        name: ``auto`` goes by the environment; ``hopper``, ``walker2d``, ``ant`` and ``never`` do not look at it.
        env_spec: Gymnasium's EnvSpec as JSON, which is only read, or None when the dataset names no environment.

    Raises:
        ConfigError: For another name, or where ``auto`` does not know the environment.
    """
    check_choice("model.termination", name, TERMINATIONS)
    if name != "auto":
        return RULES[name]
    if env_spec is None:
        raise ConfigError(_ask("the dataset names no environment"))
    described = json.loads(env_spec)
    env_id, options = str(described["id"]), described.get("kwargs") or {}
    robot = env_id.rpartition("/")[2].partition("-")[0].lower()
    if robot.startswith(ENDLESS) and options.get("continuing_task", True):
        return RULES["never"]
    if robot not in RULES:
        raise ConfigError(_ask(f"no rule is known for {env_id} with the options {options}"))
    return _with_limits(RULES[robot], env_id, options)


def _with_limits(rule: Termination, env_id: str, options: Mapping[str, Any]) -> Termination:
    """The rule with the limits that an environment was made with."""
    if not options.get("terminate_when_unhealthy", True):
        return RULES["never"]
    if not options.get("exclude_current_positions_from_observation", True):
        raise ConfigError(_ask(f"states of this {env_id} begin with its position, which the rule does not expect"))
    changed: dict[str, Any] = {field: tuple(options[key]) for key, field in LIMITS.items() if key in options}
    return dataclasses.replace(rule, **changed)


def _ask(reason: str) -> str:
    return (
        f"{reason}, so when an episode ends cannot be told from its states: choose --model.termination "
        f"{', '.join(RULES)}"
    )
