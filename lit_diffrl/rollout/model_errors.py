"""How far models of the dynamics can be trusted: their error against the simulator, by horizon (DyDiff, Fig. 3).

With the data's own actions (open loop), or with those that a policy chooses in the states it comes to (closed loop).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lit_diffrl.errors import ConfigError
from lit_diffrl.rollout.pictures import INK
from lit_diffrl.rollout.replay import Replay, Simulator, replay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Predict = Callable[[Tensor, Tensor], Tensor]
"""``(first states (n, obs), actions (n, H, action)) -> states (n, H, obs)``, all raw float32, the first as given."""

Policy = Callable[[Tensor], Tensor]
"""``observations (n, obs) -> actions (n, action)``, both raw."""

RollOut = Callable[[Tensor], Mapping[str, Tensor]]
"""``first states (n, obs) -> states (n, H, obs)`` by name, all raw."""

DATASET, START = "recorded states", "first state"
HORIZONS = (1, 5, 10, 20, 50, 99)
FLOOR = 1e-6  # of the figure


@dataclass(frozen=True)
class ModelErrors:
    """Mean squared errors of predicted states, in units of the states' deviations.

    Args:
        mean: ``(H,)`` by name: mean over rows at each horizon, 0 first.
        median: ``(H,)`` by name, likewise.
        rows: ``(H,)`` rows that had not ended before.
    """

    mean: dict[str, np.ndarray]
    median: dict[str, np.ndarray]
    rows: np.ndarray

    def at(self, horizons: Sequence[int] = HORIZONS) -> dict[str, float]:
        """Means to log, ``<name>_<horizon>``: those horizons that were reached, names with ``_`` for spaces."""
        reached = [t for t in horizons if t < len(self.rows) and self.rows[t] > 0]
        return {
            f"{name.replace(' ', '_')}_{t}": float(errors[t]) for name, errors in self.mean.items() for t in reached
        }


def model_errors(
    simulator: Simulator, obs: Tensor, actions: Tensor, scale: Tensor, models: Mapping[str, Predict]
) -> ModelErrors:
    """Compare models with the simulator on the data's own actions.

    The truth is the simulator, set to each first state and given the actions. Two curves stand beside the models': the
    first state itself, as if nothing moved, and the states that the data recorded, whose distance is the simulator's
    own: first states are known to float32, and a falling robot multiplies such an error. No model can be told from
    the truth below it. States after the true end of a row do not count, nor do rows whose first state is not wholly
    observed.

    Args:
        simulator: Of the dataset.
        obs: ``(n, H, obs)`` raw recorded states of windows within an episode.
        actions: ``(n, H, action)`` raw recorded actions.
        scale: ``(obs,)`` deviations of the states.
        models: By name.

    Raises:
        ConfigError: When no first state is wholly observed.
    """
    usable = _usable(simulator, obs[:, 0])
    obs, actions = obs.cpu()[usable], actions.cpu()[usable]
    truth = replay(simulator, obs[:, 0].double().numpy(), actions.double().numpy())
    predicted = {name: model(obs[:, 0], actions) for name, model in models.items()}
    return _compare(truth, {**predicted, START: obs[:, :1].expand_as(obs), DATASET: obs}, scale)


def closed_loop_errors(
    simulator: Simulator, first: Tensor, policy: Policy, roll_out: RollOut, scale: Tensor
) -> ModelErrors:
    """Compare rollouts of a policy in models with those in the simulator, from the same states.

    What the rounds of DyDiff's correction should reduce.

    Args:
        simulator: Of the dataset.
        first: ``(n, obs)`` raw first states.
        policy: Acts, in the simulator, without noise of its own.
        roll_out: The same policy's rollouts in models.
        scale: ``(obs,)`` deviations of the states.
    """
    first = first.cpu()[_usable(simulator, first)]
    rollouts = roll_out(first)
    states = [simulator.state_of(row) for row in first.double().numpy()]
    horizon = next(iter(rollouts.values())).shape[1]

    def choose(obs: np.ndarray, t: int) -> np.ndarray:
        return policy(torch.from_numpy(obs).float()).double().cpu().numpy()

    truth = simulator.run(states, choose, horizon)
    return _compare(truth, {**rollouts, START: first[:, None].expand(-1, horizon, -1)}, scale)


def _usable(simulator: Simulator, first: Tensor) -> Tensor:
    """Which first states the simulator can be set to; an error when it is none."""
    usable = torch.from_numpy(simulator.settable(first.double().cpu().numpy()))
    if not usable.any():
        raise ConfigError(
            f"none of {len(first)} first states is wholly observed (a velocity of each is at its clip): take more "
            "windows"
        )
    return usable


def _compare(truth: Replay, predicted: Mapping[str, Tensor], scale: Tensor) -> ModelErrors:
    states, deviations = torch.from_numpy(truth.states), scale.double().cpu()
    mean, median = {}, {}
    for name, guess in predicted.items():
        error = ((guess.cpu().double() - states) / deviations).square().mean(-1).numpy()
        counted = np.ma.masked_array(error, ~truth.counts)
        mean[name] = np.ma.filled(counted.mean(axis=0), np.nan)
        median[name] = np.ma.filled(np.ma.median(counted, axis=0), np.nan)
    return ModelErrors(mean, median, truth.counts.sum(axis=0))


def errors_figure(errors: ModelErrors, title: str) -> Figure:
    """Draw errors against the horizon, means as lines and medians dashed; not registered with pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), facecolor="white", layout="constrained")
    axis = figure.subplots()
    for i, (name, mean) in enumerate(errors.mean.items()):
        style: dict[str, Any] = {"color": {START: "#9aa1ad", DATASET: INK}.get(name, f"C{i}")}
        steps = np.arange(1, len(mean))
        below = " (below)" if np.nanmax(mean) < FLOOR else ""
        axis.plot(steps, mean[1:], label=name + below, **style)
        axis.plot(steps, errors.median[name][1:], linestyle="--", linewidth=0.9, **style)
    axis.set(yscale="log", ylim=(FLOOR, None), xlabel="horizon in steps", ylabel="squared error in deviations²")
    axis.set_title(f"{title} · {errors.rows[0]} starts, mean (line) and median (dashed)", fontsize=9, color=INK)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    return figure
