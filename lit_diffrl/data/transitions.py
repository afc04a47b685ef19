"""TransitionData: single transitions for policies and critics.

Sources: the data pipelines of D4RL, Diffusion-QL, EDP, TD3+BC and IQL.

A transition is (obs, action, reward, next_obs, done), drawn uniformly with replacement. Rewards are tuned, states
normalised if asked for, actions are in [-1, 1]. Only true terminations end a return (``done``); a time limit does not,
since the episode would have gone on.

What follows the last step of an episode: Minari and D4RL files with ``next_observations`` recorded it, so a step at
which an episode was cut is a transition like all others. D4RL's own pipeline drops such steps; here only those are
dropped whose successor is not recorded (files without ``next_observations``, known by a successor equal to the state
itself). A terminal step's successor has no weight, so it stays in any case.
"""

from __future__ import annotations

import json
import logging
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_diffrl.data.episodes import ACTION_TOLERANCE, Episodes
from lit_diffrl.data.module import OfflineData
from lit_diffrl.data.normalizers import (
    GaussianNormalizer,
    IdentityNormalizer,
    LimitsNormalizer,
    Normalizer,
    fit_normalizer,
)
from lit_diffrl.data.rewards import (
    TUNINGS,
    Tuning,
    best_episodes,
    episode_returns,
    look_ahead,
    stretch_returns,
    tune_rewards,
)
from lit_diffrl.data.segments import keep_steps
from lit_diffrl.data.sources import SourceInfo
from lit_diffrl.data.stream import Blocks
from lit_diffrl.errors import ConfigError, DataError, check_choice, check_range
from lit_diffrl.seeding import Place

# Added to the deviations that states are divided by, as TD3+BC and its descendants do.
STD_OFFSET = 1e-3

_log = logging.getLogger(__name__)


class PolicyBatch(NamedTuple):
    """A batch of transitions.

    Args:
        obs: ``(B, obs)`` normalised.
        action: ``(B, action)`` in [-1, 1].
        reward: ``(B,)`` tuned; of several steps, their discounted sum.
        next_obs: ``(B, obs)`` normalised.
        done: ``(B,)`` 1.0 where the episode terminated, else 0.0.
        discount: ``(B,)`` worth of the next state's value: a target is ``reward + discount * (1 - done) * value``.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    done: Tensor
    discount: Tensor


class TransitionData(OfflineData):
    """Transitions of an offline dataset, drawn by index.

    Args:
        dataset: A Minari id, several joined by ``+`` (a union), a D4RL file ``….hdf5``, or a maze collected here
            at first use, ``lit_diffrl/pointmaze/{umaze,medium,large}[-dense|-multi]-v0``.
        batch_size: Transitions per update and process.
        updates_per_epoch: Gradient updates that make an epoch.
        normalizer: Of states: ``none`` or ``gaussian``, mean 0 and deviation 1 (plus 1e-3) in every dimension.
        reward: How rewards are tuned: ``none``; ``cql_antmaze`` 4 (r - 0.5), ``iql_antmaze`` r - 1, ``antmaze``
            2 (r - 0.25), for rewards 0 and 1; ``standardise`` mean 0 and deviation 1; ``minmax`` from -1 to 1;
            ``return_range`` 1000 r / (greatest - least return of an episode); ``return_range_1000`` the same as CORL's
            and QGPO's codes measure it, in stretches of 1000 steps without regard to time limits; ``affine`` scale r +
            shift.
        reward_scale: Scale of ``affine``.
        reward_shift: Shift of ``affine``.
        top_fraction: Fraction of the episodes kept, those of highest return (0.1 for 10 % BC); everything else is
            computed from these.
        action_clip: Largest action learned from, in units of the action space's [-1, 1] (EDP: 0.999); null for 1.
        n_step: Steps whose rewards are summed; fewer where an episode ends before.
        discount: Discount per step.
        obs_keys: For dict observations: the keys that form the state, in order. Where the goal changes it must be one
            of them: ``[observation, desired_goal]``.
        env: For a D4RL file whose name does not tell: the environment's D4RL name.
    """

    def __init__(
        self,
        dataset: str | list[str] = "lit_diffrl/pointmaze/umaze-dense-v0",
        batch_size: int = 256,
        updates_per_epoch: int = 1000,
        normalizer: Literal["none", "gaussian"] = "none",
        reward: Tuning = "none",
        reward_scale: float = 10.0,
        reward_shift: float = -5.0,
        top_fraction: float = 1.0,
        action_clip: float | None = None,
        n_step: int = 1,
        discount: float = 0.99,
        obs_keys: list[str] | None = None,
        env: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("updates_per_epoch", updates_per_epoch), ("n_step", n_step)):
            check_range(f"data.{name}", value, 1)
        check_choice("data.normalizer", normalizer, ("none", "gaussian"))
        check_choice("data.reward", reward, TUNINGS)
        check_range("data.reward_scale", reward_scale, 0, low_open=True)
        check_range("data.reward_shift", reward_shift)
        if reward != "affine" and (reward_scale, reward_shift) != (10.0, -5.0):
            raise ConfigError(
                f"data.reward_scale {reward_scale:g} and reward_shift {reward_shift:g} are of data.reward 'affine', "
                f"got {reward!r}; use that, or leave them out"
            )
        check_range("data.top_fraction", top_fraction, 0, 1, low_open=True)
        if action_clip is not None:
            check_range("data.action_clip", action_clip, 0, 1, low_open=True)
        check_range("data.discount", discount, 0, 1)
        self.save_hyperparameters(logger=False)
        self.dataset, self.batch_size, self.updates_per_epoch = dataset, batch_size, updates_per_epoch
        self.blocks = Blocks()

    # ---------------------------------------------------------------- loading

    def load(self, episodes: Episodes, info: SourceInfo) -> None:
        """Take in episodes: select, tune, normalise and pack them, and describe them in ``spec``."""
        self._warn_of_goals(info)
        returns = episode_returns(episodes)
        best = best_episodes(returns, self.hparams["top_fraction"])
        recorded = ~episodes.truncated | (episodes.next_obs != episodes.obs).any(dim=1)
        self.steps = (best[episodes.episode] & recorded).nonzero().flatten()
        if len(self.steps) == 0:
            raise DataError(
                f"{self._name()}: no transition is left, since no state's successor is recorded; store "
                "`next_observations`, or longer episodes"
            )
        self.initial = torch.isin(self.steps, episodes.starts).nonzero().flatten()  # rows in which episodes begin
        kept = keep_steps(episodes, best[episodes.episode] & recorded)
        in_stretches = self.hparams["reward"] == "return_range_1000"
        reward = tune_rewards(
            self.hparams["reward"],
            kept.reward,
            stretch_returns(keep_steps(episodes, best[episodes.episode])) if in_stretches else returns[best],
            source=self._name(),
            scale=self.hparams["reward_scale"],
            shift=self.hparams["reward_shift"],
        )
        fitted = fit_normalizer(self.hparams["normalizer"], kept.obs)
        if isinstance(fitted, GaussianNormalizer):
            fitted = GaussianNormalizer(fitted.mean, fitted.std + STD_OFFSET)
        self.obs_normalizer = fitted
        self.action_normalizer = self._to_unit_actions(kept, info)
        self._pack(kept, reward)
        self._describe(kept, info, reward)

    def _warn_of_goals(self, info: SourceInfo) -> None:
        if info.goal is None:
            if info.goal_key is not None and info.goal_key not in (info.obs_keys or []):
                _log.warning(
                    "%s: its goals differ, but states have %s alone, so a policy cannot know where to go; add "
                    "--data.obs_keys '[%s]'",
                    self._name(), info.obs_keys, ",".join([*(info.obs_keys or []), info.goal_key]),
                )  # fmt: skip
        elif info.env_spec is not None and json.loads(info.env_spec).get("kwargs", {}).get("goal") == "random":
            _log.warning(
                "%s: its rewards are those of the goal %s, but it is evaluated on others: a policy learns of that "
                "goal alone; use the set without -multi, or a planner",
                self._name(), [round(x, 3) for x in info.goal],
            )  # fmt: skip

    def _to_unit_actions(self, episodes: Episodes, info: SourceInfo) -> Normalizer:
        """What maps the environment's actions to [-1, 1]; unbounded ones must lie there by themselves."""
        low, high = torch.tensor([info.action_low, info.action_high])
        unbounded = low.isinf() | high.isinf()
        if bool((episodes.action[:, unbounded].abs() > 1 + ACTION_TOLERANCE).any()):
            raise DataError(
                f"{self._name()}: actions have no bounds ({low.tolist()} to {high.tolist()}) and leave [-1, 1] (least "
                f"{episodes.action.min():g}, greatest {episodes.action.max():g}); store their bounds as the data's "
                "action space, or scale them to [-1, 1]"
            )
        low, high = low.masked_fill(unbounded, -1.0), high.masked_fill(unbounded, 1.0)
        plain = bool((low == -1).all() and (high == 1).all())
        return IdentityNormalizer() if plain else LimitsNormalizer(low, high)

    def _pack(self, episodes: Episodes, reward: Tensor) -> None:
        """One row for each transition: a draw then reads one place in memory for each, not six."""
        ahead = look_ahead(episodes, reward, self.hparams["n_step"], self.hparams["discount"])
        clip = self.hparams["action_clip"] or 1.0
        columns = PolicyBatch(
            obs=self.obs_normalizer.normalize(episodes.obs),
            action=self.action_normalizer.normalize(episodes.action).clamp(-clip, clip),
            reward=ahead.reward[:, None],
            next_obs=self.obs_normalizer.normalize(episodes.next_obs[ahead.last]),
            done=episodes.terminated[ahead.last, None].float(),
            discount=ahead.discount[:, None],
        )
        self.widths = [column.shape[1] for column in columns]
        self.table = torch.cat(columns, dim=1)

    # ---------------------------------------------------------------- drawing

    def transitions(self, rows: Tensor) -> PolicyBatch:
        """Rows ``(B,)`` of the packed table; those ``(M, B)`` of an ensemble give a batch for each member."""
        packed = self.table.index_select(0, rows.flatten()).view(*rows.shape, -1)
        obs, action, reward, next_obs, done, discount = packed.split(self.widths, dim=-1)
        return PolicyBatch(obs, action, reward.squeeze(-1), next_obs, done.squeeze(-1), discount.squeeze(-1))

    def draw(self, phase: Any, place: Place) -> PolicyBatch:
        """The batch of an update: uniform, with replacement."""
        return self.transitions(self.rows(phase, place))

    def rows(self, phase: Any, place: Place) -> Tensor:
        """Rows ``(B,)`` of the packed table that this process's batch of an update consists of."""
        found: Tensor = self.blocks.row(phase, place, self._draw_block)
        return found

    def indices(self, phase: Any, place: Place) -> tuple[Tensor]:
        """Steps of the dataset ``(B,)`` that this process's batch of an update consists of."""
        return (self.steps[self.rows(phase, place).cpu()],)

    def _draw_block(self, phase: Any, place: Place, generator: torch.Generator) -> list[Tensor]:
        """Rows of a block of updates: drawn for all processes, of which this one has its own."""
        width = place.world_size * self.batch_size * phase.batches
        rows = torch.randint(len(self.table), (self.blocks.size, width), generator=generator)[:, place.share(width)]
        return list(rows.to(self.table.device).unbind())

    def to(self, device: torch.device) -> None:
        """Move the packed table to a device."""
        if self.table.device != device:
            self.table, self.initial, self.blocks = self.table.to(device), self.initial.to(device), Blocks()

    def validation_batch(self) -> PolicyBatch:
        """At most 256 transitions, spread evenly over the data."""
        rows = torch.linspace(0, len(self.table) - 1, min(256, len(self.table))).long()
        return self.transitions(rows.to(self.table.device))
