"""How far models of the dynamics can be trusted: their error against the simulator, by horizon (DyDiff, Fig. 3).

With the data's own actions (open loop), or with those that a policy chooses in the states it comes to (closed loop);
and whether each predicted step is one that the simulator would take, wherever the steps before have led.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lit_diffrl.errors import ConfigError
from lit_diffrl.rollout.pictures import INK
from lit_diffrl.rollout.replay import Simulator, replay, up_to_end, with_first

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Predict = Callable[[Tensor, Tensor], Tensor]
"""``(first states (n, obs), actions (n, H, action)) -> states (n, H, obs)``, all raw float32, the first as given."""

Policy = Callable[[Tensor], Tensor]
"""``observations (n, obs) -> actions (n, action)``, both raw."""

Reward = Callable[[Tensor, Tensor], Tensor]
"""``(states (n, H, obs), actions (n, H, action)) -> rewards (n, H)``, all raw."""

Terminal = Callable[[Tensor], Tensor]
"""``states (..., obs) raw -> (...) bool``."""

DATASET, START, JUDGED = "recorded states", "first state", "simulator, predicted rewards"
HORIZONS = (1, 5, 10, 20, 50, 99)
FLOOR = 1e-6  # of the figure: errors that are none
SHOWN = 1e-3  # how far below a model's typical error the figure goes on


@dataclass(frozen=True)
class ModelErrors:
    """Mean squared errors of predicted states, in units of the states' deviations; of rollouts, their ends and returns.

    Args:
        mean: ``(H,)`` by name: mean over rows at each horizon, 0 first.
        median: ``(H,)`` by name, likewise.
        rows: ``(H,)`` rows that count: they had not ended before. Of several numbers the least.
        ended: Which rows come to an end within their ``H - 1`` steps, by name of the model: the share of all, of those
            that end in the simulator and of the others (None where there are none). ``simulator`` is the truth.
        returns: Mean sum of rewards of the ``H - 1`` steps, up to the first that ends. ``simulator`` is the truth,
            ``simulator, predicted rewards`` what the reward model makes of the true states, the others what it makes
            of a model's: the difference of these is the states' error.
    """

    mean: dict[str, np.ndarray]
    median: dict[str, np.ndarray]
    rows: np.ndarray
    ended: dict[str, dict[str, float | None]] = field(default_factory=dict)
    returns: dict[str, float] = field(default_factory=dict)

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
    usable = wholly_observed(simulator, obs[:, 0])
    obs, actions = obs.cpu()[usable], actions.cpu()[usable]
    truth = replay(simulator, obs[:, 0].double().numpy(), actions.double().numpy())
    predicted = {name: model(obs[:, 0], actions) for name, model in models.items()}
    predicted |= {START: obs[:, :1].expand_as(obs), DATASET: obs}
    return _summary({k: (_squares(x, truth.states, scale), truth.counts) for k, x in predicted.items()})


def closed_loop_errors(
    simulator: Simulator,
    rollouts: Mapping[str, tuple[Tensor, Tensor]],
    policy: Policy,
    scale: Tensor,
    terminal: Terminal,
    reward: Reward | None = None,
) -> ModelErrors:
    """Compare rollouts of a policy in models with those in the simulator, from the same states.

    The errors are what the rounds of DyDiff's correction should reduce. How many rollouts end tells whether models
    know of falls, which squared errors hardly show, and returns whether they flatter the policy.

    Args:
        simulator: Of the dataset.
        rollouts: The policy's states in models ``(n, H, obs)`` by name, raw, from the same first states, and its
            actions ``(n, H, action)``.
        policy: Acts in the simulator; one that draws, as a diffusion policy, makes errors that no model could avoid.
        scale: ``(obs,)`` deviations of the states.
        terminal: Which states end an episode.
        reward: Predicts the simulator's rewards; None compares no returns.
    """
    imagined = next(iter(rollouts.values()))[0].cpu()
    states = [simulator.state_of(row) for row in imagined[:, 0].double().numpy()]
    horizon, taken = imagined.shape[1], list[Tensor]()

    def choose(obs: np.ndarray, t: int) -> np.ndarray:
        taken.append(policy(torch.from_numpy(obs).float()).cpu())
        return taken[-1].double().numpy()

    truth = simulator.run(states, choose, horizon)
    predicted = {name: x for name, (x, _) in rollouts.items()} | {START: imagined[:, :1].expand_as(imagined)}
    errors = _summary({k: (_squares(x, truth.states, scale), truth.counts) for k, x in predicted.items()})
    ends = {name: terminal(x[:, 1:]).cpu().numpy() for name, (x, _) in rollouts.items()}
    fell = np.any(truth.terminated, axis=1)
    ended = {"simulator": _shares(fell, fell)} | {k: _shares(np.any(x, axis=1), fell) for k, x in ends.items()}
    if reward is None:
        return replace(errors, ended=ended)
    true = torch.from_numpy(truth.states).float(), torch.stack(taken, dim=1)
    ends[JUDGED] = truth.terminated
    returns = {"simulator": _mean_return(truth.rewards, truth.terminated)}
    for name, (x, actions) in {JUDGED: true, **rollouts}.items():
        rewards = reward(x[:, :-1], actions[:, : horizon - 1]).double().cpu().numpy()
        returns[name] = _mean_return(rewards, ends[name])
    return replace(errors, ended=ended, returns=returns)


def _mean_return(rewards: np.ndarray, ends: np.ndarray) -> float:
    """Of steps ``(n, H - 1)`` up to the first that ends, with it; what comes after it may be anything."""
    return float(np.where(up_to_end(ends), rewards, 0.0).sum(axis=1).mean())


def _shares(found: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """Of rows ``(n,)`` the share that was found to end: of all, of those that truly do, of the others."""
    parts = {"all": np.ones_like(truth), "of those that end": truth, "of the others": ~truth}
    return {name: float(found[part].mean()) if part.any() else None for name, part in parts.items()}


def one_step_errors(
    simulator: Simulator, rollouts: Mapping[str, tuple[Tensor, Tensor]], scale: Tensor, terminal: Terminal
) -> ModelErrors:
    """Compare each step of rollouts with the simulator's from the same predicted state: their consistency.

    A rollout far from the policy's true one may still be made of possible steps, and a learner can use it. At horizon
    t it is the step into state t that is judged. Steps after a predicted state that is terminal do not count, since no
    learner is given them, nor do those from states that the simulator cannot be set to (a velocity at its clip).

    Args:
        simulator: Of the dataset.
        rollouts: States ``(n, H, obs)`` and the actions taken in them ``(n, H, action)`` by name, raw.
        scale: ``(obs,)`` deviations of the states.
        terminal: Which states end an episode.
    """
    found = {}
    for name, (states, actions) in rollouts.items():
        before, after = states[:, :-1].cpu().double().numpy(), states[:, 1:].cpu()
        shape = before.shape[:2]
        flat = before.reshape(-1, before.shape[2])
        action = actions[:, :-1].cpu().double().numpy().reshape(len(flat), -1)
        truth = replay(simulator, flat, np.stack([action, action], axis=1))
        ends = terminal(after).numpy()
        counts = simulator.settable(flat).reshape(shape) & up_to_end(ends)
        error = _squares(after, truth.states[:, 1].reshape(*shape, -1), scale)
        found[name] = with_first(error, 0.0), with_first(counts, True)
    return _summary(found)


def replayed_errors(
    simulator: Simulator, rollouts: Mapping[str, tuple[Tensor, Tensor]], scale: Tensor, terminal: Terminal
) -> ModelErrors:
    """Compare rollouts with what the simulator makes of their own actions, from the same first states.

    As :func:`model_errors`, on actions that a policy chose in the models: whether the states that are kept belong to
    the actions that are kept beside them. States after a predicted terminal one do not count, since none is kept.

    Args:
        simulator: Of the dataset.
        rollouts: States ``(n, H, obs)`` and the actions taken in them ``(n, H, action)`` by name, raw.
        scale: ``(obs,)`` deviations of the states.
        terminal: Which states end an episode.
    """
    found = {}
    for name, (states, actions) in rollouts.items():
        truth = replay(simulator, states[:, 0].cpu().double().numpy(), actions.cpu().double().numpy())
        kept = with_first(up_to_end(terminal(states[:, 1:]).cpu().numpy()), True)
        found[name] = _squares(states, truth.states, scale), truth.counts & kept
    return _summary(found)


def wholly_observed(simulator: Simulator, first: Tensor) -> Tensor:
    """Which first states ``(n, obs)`` the simulator can be set to, ``(n,)`` bool.

    Raises:
        ConfigError: When it is none.
    """
    usable = torch.from_numpy(simulator.settable(first.double().cpu().numpy()))
    if not usable.any():
        raise ConfigError(
            f"none of {len(first)} first states is wholly observed (a velocity of each is at its clip): take more "
            "windows"
        )
    return usable


def _squares(guess: Tensor, truth: np.ndarray, scale: Tensor) -> np.ndarray:
    """Mean squares ``(n, H)`` of the differences of states ``(n, H, obs)`` in their deviations."""
    error = (guess.cpu().double() - torch.from_numpy(truth)) / scale.double().cpu()
    return error.square().mean(-1).numpy()


def _summary(found: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> ModelErrors:
    """Means and medians over those errors ``(n, H)`` that count ``(n, H)``, by name."""
    mean, median = {}, {}
    for name, (error, counts) in found.items():
        counted = np.ma.masked_array(error, ~counts)
        mean[name] = np.ma.filled(counted.mean(axis=0), np.nan)
        median[name] = np.ma.filled(np.ma.median(counted, axis=0), np.nan)
    return ModelErrors(mean, median, np.min([counts.sum(axis=0) for _, counts in found.values()], axis=0))


def errors_figure(errors: ModelErrors, title: str) -> Figure:
    """Draw errors against the horizon, means as lines and medians dashed; not registered with pyplot."""
    from matplotlib.figure import Figure

    floor = figure_floor(errors)
    figure = Figure(figsize=(6.4, 4.2), facecolor="white", layout="constrained")
    axis = figure.subplots()
    for i, (name, mean) in enumerate(errors.mean.items()):
        style: dict[str, Any] = {"color": {START: "#9aa1ad", DATASET: INK}.get(name, f"C{i}")}
        steps = np.arange(1, len(mean))
        below = " (below)" if np.nanmax(mean[1:]) < floor else ""
        axis.plot(steps, mean[1:], label=name + below, **style)
        axis.plot(steps, errors.median[name][1:], linestyle="--", linewidth=0.9, **style)
    axis.set(yscale="log", ylim=(floor, None), xlabel="horizon in steps", ylabel="squared error in deviations²")
    axis.set_title(f"{title} · {errors.rows[0]} starts, mean (line) and median (dashed)", fontsize=9, color=INK)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    return figure


def figure_floor(errors: ModelErrors) -> float:
    """Where the figure's axis begins: at the least error, but not where one that is next to none flattens the rest.

    A model's first step may be all but exact, and the recorded states are, wherever the simulator repeats its data.
    """
    typical = [np.nanmedian(mean[1:]) for name, mean in errors.mean.items() if name != DATASET]
    lowest = max(FLOOR, SHOWN * min((x for x in typical if x > FLOOR), default=FLOOR))
    drawn = np.concatenate([curve[1:] for curves in (errors.mean, errors.median) for curve in curves.values()])
    return float(0.8 * np.min(drawn[drawn > lowest], initial=np.inf)) if (drawn > lowest).any() else FLOOR
