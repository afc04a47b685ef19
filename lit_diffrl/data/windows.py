"""WindowData: trajectory windows for planners, and the transitions their world models learn from.

Source: Diffuser (Janner et al. 2022) and its released data pipeline; DMEMM uses the same windows.

A window is ``horizon`` rows of (action, obs), actions first, normalised. With ``stride`` s a row stands for s
simulator steps: its observation is the one before them, its action their mean, its reward their sum; s = 1 is the
papers' setting. Batches are drawn by index from tensors on the training's device; a batch is a pure function of its
place in the run (:class:`~lit_diffrl.seeding.Place`): a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_diffrl.data.bootstrap import bootstrap, hold_out
from lit_diffrl.data.episodes import Episodes
from lit_diffrl.data.module import OfflineData
from lit_diffrl.data.normalizers import fit_normalizer
from lit_diffrl.data.rewards import episode_returns
from lit_diffrl.data.segments import discounted_returns, goal_departures, window_starts
from lit_diffrl.data.sources import SourceInfo
from lit_diffrl.data.stream import Blocks
from lit_diffrl.errors import ConfigError, DataError, check_choice, check_each, check_range
from lit_diffrl.seeding import Place


class WindowBatch(NamedTuple):
    """A batch of windows.

    Args:
        trajectory: ``(B, H, action + obs)`` normalised rows; rows beyond the episode are raw zeros, normalised.
        mask: ``(B, H)`` bool, True for rows of the episode.
        reward: ``(B, H)`` raw rewards, 0 beyond the episode, without termination penalty.
        value: ``(B,)`` discounted raw rewards from the window's start to the end of the episode, with penalty.
        episode_return: ``(B,)`` undiscounted raw rewards of the whole episode, without penalty.
    """

    trajectory: Tensor
    mask: Tensor
    reward: Tensor
    value: Tensor
    episode_return: Tensor


class TransitionBatch(NamedTuple):
    """A batch of single transitions, one independent batch per ensemble member.

    Args:
        obs: ``(M, B, obs)`` normalised.
        action: ``(M, B, action)`` normalised.
        reward: ``(M, B)`` raw.
        next_obs: ``(M, B, obs)`` normalised.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor


class WindowData(OfflineData):
    """Windows of an offline dataset, drawn by index.

    Args:
        dataset: A Minari id, several joined by ``+`` (a union), a D4RL file ``….hdf5``, or a maze collected here
            at first use, ``lit_diffrl/pointmaze/{umaze,medium,large}[-dense|-multi]-v0``.
        horizon: Rows of a window. A list draws one of its values for every batch: one network then plans at
            several lengths.
        stride: Simulator steps per row (1 in the papers).
        batch_size: Windows per update and process.
        transition_batch_size: Transitions per member, update and process while a world model is fitted.
        updates_per_epoch: Gradient updates that make an epoch.
        normalizer: ``limits`` maps each dimension to [-1, 1] (mazes), ``gaussian`` to mean 0 and deviation 1.
        use_padding: Let windows run past the end of an episode (locomotion), padded with raw zeros.
        segmentation: ``episodes`` keeps the data's own; ``goal`` cuts a maze walk at departures from its goal.
        max_path_length: Longest episode accepted; windows then also stay inside it, as in the released code.
        termination_penalty: Added to the last reward of an episode that terminates, for the value target only.
        discount: Discount per step of the value target.
        compat_windows: Lose the last window start of each episode, as the released code does.
        holdout: Fraction of the transitions held out to stop the world model early.
        obs_keys: For dict observations: the keys that form the state, in order.
        env: For a D4RL file whose name does not tell: the environment's D4RL name.
    """

    def __init__(
        self,
        dataset: str | list[str] = "lit_diffrl/pointmaze/umaze-v0",
        horizon: int | list[int] = 128,
        stride: int = 1,
        batch_size: int = 64,
        transition_batch_size: int = 256,
        updates_per_epoch: int = 1000,
        normalizer: Literal["gaussian", "limits"] = "limits",
        use_padding: bool = False,
        segmentation: Literal["episodes", "goal"] = "episodes",
        max_path_length: int | None = None,
        termination_penalty: float | None = None,
        discount: float = 0.997,
        compat_windows: bool = False,
        holdout: float = 0.1,
        obs_keys: list[str] | None = None,
        env: str | None = None,
    ) -> None:
        super().__init__()
        self.horizons = [horizon] if isinstance(horizon, int) else list(horizon)
        check_each("data.horizon", self.horizons, 2)
        for name, value in (
            ("stride", stride),
            ("batch_size", batch_size),
            ("transition_batch_size", transition_batch_size),
            ("updates_per_epoch", updates_per_epoch),
        ):
            check_range(f"data.{name}", value, 1)
        if max_path_length is not None:
            check_range("data.max_path_length", max_path_length, 1)
        if termination_penalty is not None:
            check_range("data.termination_penalty", termination_penalty)
        check_range("data.discount", discount, 0, 1)
        check_range("data.holdout", holdout, 0, 0.5, low_open=True)
        check_choice("data.normalizer", normalizer, ("gaussian", "limits"))
        check_choice("data.segmentation", segmentation, ("episodes", "goal"))
        self.save_hyperparameters(logger=False)
        self.dataset, self.stride, self.batch_size = dataset, stride, batch_size
        self.transition_batch_size, self.updates_per_epoch = transition_batch_size, updates_per_epoch
        self.episodes: Episodes | None = None
        self.blocks = Blocks()

    # ---------------------------------------------------------------- loading

    def load(self, episodes: Episodes, info: SourceInfo) -> None:
        """Take in episodes: normalise them, index windows and transitions, and describe them in ``spec``."""
        if self.hparams["segmentation"] == "goal":
            if info.goal is None:
                raise ConfigError(
                    f"data.segmentation is 'goal', but {self._name()} has no constant goal; use 'episodes'"
                )
            episodes = goal_departures(episodes, info.goal)
        limit, longest = self.hparams["max_path_length"], int(episodes.lengths.max())
        if limit is not None and longest > limit:
            raise DataError(
                f"{self._name()}: episode {int(episodes.lengths.argmax())} has {longest} steps, more than "
                f"data.max_path_length {limit}; raise it or set it to null"
            )
        self.episodes = episodes
        self._normalise()
        self._index_windows()
        self._index_transitions()
        self._describe(episodes, info, self.reward, self.stride)

    def _normalise(self) -> None:
        assert self.episodes is not None
        kind = self.hparams["normalizer"]
        self.obs_normalizer = fit_normalizer(kind, self.episodes.obs)
        self.action_normalizer = fit_normalizer(kind, self.episodes.action)
        self.obs = self.obs_normalizer.normalize(self.episodes.obs)
        self.action = self.action_normalizer.normalize(self.episodes.action)
        self.reward = self.episodes.reward
        zero_action, zero_obs = torch.zeros(self.episodes.action_dim), torch.zeros(self.episodes.obs_dim)
        self.padding = torch.cat(
            [self.action_normalizer.normalize(zero_action), self.obs_normalizer.normalize(zero_obs)]
        )
        self.returns = discounted_returns(self.episodes, self.hparams["discount"], self.hparams["termination_penalty"])
        self.episode_returns = episode_returns(self.episodes).float()[self.episodes.episode]
        self.step_end = torch.repeat_interleave(self.episodes.ends, self.episodes.lengths)
        self._join_steps()

    def _join_steps(self) -> None:
        """Actions' means and rewards' sums over the ``stride`` steps from each step on, as far as its episode goes."""
        steps = torch.arange(len(self.reward))
        action, reward, count = self.action.clone(), self.reward.clone(), torch.ones(len(steps))
        for ahead in range(1, self.stride):
            inside = (steps + ahead < self.step_end).float()
            index = (steps + ahead).clamp_max(len(steps) - 1)
            action += self.action[index] * inside[:, None]
            reward += self.reward[index] * inside
            count += inside
        self.action, self.reward = action / count[:, None], reward

    def _index_windows(self) -> None:
        assert self.episodes is not None
        self.starts: dict[int, Tensor] = {}
        for horizon in self.horizons:
            span = (horizon - 1) * self.stride + 1
            count = window_starts(
                self.episodes.lengths,
                span,
                use_padding=self.hparams["use_padding"],
                max_path_length=self.hparams["max_path_length"],
                compat=self.hparams["compat_windows"],
            )
            offset = torch.arange(int(count.sum())) - torch.repeat_interleave(count.cumsum(0) - count, count)
            self.starts[horizon] = torch.repeat_interleave(self.episodes.starts, count) + offset
            if len(self.starts[horizon]) == 0:
                raise DataError(
                    f"{self._name()}: no window of {horizon} rows with stride {self.stride} ({span} steps) fits "
                    f"into its episodes (longest {int(self.episodes.lengths.max())} steps); lower --data.horizon or "
                    "--data.stride, or set --data.use_padding true"
                )

    def _index_transitions(self) -> None:
        # The last step of an episode is left out: what follows it (a terminal state, a cut) is not always recorded.
        assert self.episodes is not None
        steps = torch.arange(self.episodes.num_steps)
        usable = steps[steps + self.stride < self.step_end]
        if len(usable) < 2:
            raise DataError(
                f"{self._name()}: fewer than 2 transitions of {self.stride} steps; the episodes are too short"
            )
        self.held_out, self.usable = hold_out(usable, max(1, int(len(usable) * self.hparams["holdout"])))
        # One row for each transition: a draw then reads one place in memory for each, not four.
        after = self.obs[(steps + self.stride).clamp_max(len(steps) - 1)]
        self.table = torch.cat([self.obs, self.action, self.reward[:, None], after], dim=1)
        self.bootstraps: dict[int, Tensor] = {}

    # ---------------------------------------------------------------- drawing

    def windows(self, start: Tensor, horizon: int) -> WindowBatch:
        """Cut windows out of the data.

        Args:
            start: ``(B,)`` step at which each window begins.
            horizon: Rows of the windows.
        """
        rows = start[:, None] + self.stride * torch.arange(horizon, device=start.device)
        end = self.step_end[start][:, None]
        mask = rows < end
        rows = torch.minimum(rows, end - 1)
        trajectory = torch.cat([self.action[rows], self.obs[rows]], dim=-1)
        trajectory = torch.where(mask[..., None], trajectory, self.padding)
        return WindowBatch(trajectory, mask, self.reward[rows] * mask, self.returns[start], self.episode_returns[start])

    def draw(self, phase: Any, place: Place) -> WindowBatch | TransitionBatch:
        """The batch of an update in a phase."""
        indices = self.indices(phase, place)
        return self.transitions(*indices) if phase.batch == "transitions" else self.windows(*indices)

    def indices(self, phase: Any, place: Place) -> tuple[Tensor] | tuple[Tensor, int]:
        """Steps that this process's batch of an update begins at; uniform, with replacement.

        Transitions: ``(members, B)``. Windows: ``(B,)``, and their horizon, which is the same in all processes.
        """
        found: tuple[Tensor] | tuple[Tensor, int] = self.blocks.row(phase, place, self._draw_block)
        return found

    def _draw_block(self, phase: Any, place: Place, generator: torch.Generator) -> list[Any]:
        """Indices of a block of updates, for all processes, as :meth:`indices` gives each."""
        n, mine = self.blocks.size, place.share
        if phase.batch == "transitions":
            width = place.world_size * self.transition_batch_size
            position = torch.randint(len(self.usable), (phase.members, n * width), generator=generator)
            chosen = self._bootstrap(phase.members).gather(1, position.to(self.usable.device))
            own = self.usable[chosen.long()].view(phase.members, n, width)
            return [(rows[:, mine(width)],) for rows in own.unbind(1)]
        width = place.world_size * self.batch_size
        horizons = [self.horizons[i] for i in torch.randint(len(self.horizons), (n,), generator=generator).tolist()]
        drawn = torch.rand((n, width), generator=generator, dtype=torch.float64)[:, mine(width)]
        starts = [self.starts[horizon] for horizon in horizons]
        return [(start[(u * len(start)).long().to(start.device)], h) for start, u, h in zip(starts, drawn, horizons)]

    def _bootstrap(self, members: int) -> Tensor:
        """Each member's own sample of the training transitions, ``(members, n)`` positions in them."""
        if members not in self.bootstraps:
            self.bootstraps[members] = bootstrap(len(self.usable), members).to(self.usable.device)
        return self.bootstraps[members]

    def to(self, device: torch.device) -> None:
        """Move what batches are cut from to a device."""
        if self.obs.device == device:
            return
        steps = ("obs", "action", "reward", "returns", "episode_returns", "step_end")
        for name in (*steps, "table", "padding", "usable", "held_out"):
            setattr(self, name, getattr(self, name).to(device))
        self.starts = {horizon: start.to(device) for horizon, start in self.starts.items()}
        self.bootstraps = {members: index.to(device) for members, index in self.bootstraps.items()}
        self.blocks = Blocks()

    def transitions(self, start: Tensor) -> TransitionBatch:
        """Transitions from the steps ``start`` ``(M, B)`` to ``stride`` steps later."""
        rows = self.table.index_select(0, start.flatten()).view(*start.shape, -1)
        obs, action, reward, next_obs = rows.split([self.spec.obs_dim, self.spec.action_dim, 1, self.spec.obs_dim], -1)
        return TransitionBatch(obs, action, reward.squeeze(-1), next_obs)

    def held_out_transitions(self) -> TransitionBatch:
        """At most 5,000 of the transitions held out, for one member."""
        return self.transitions(self.held_out[None, :5000])

    def validation_batch(self) -> TransitionBatch:
        """The held-out transitions."""
        return self.held_out_transitions()
