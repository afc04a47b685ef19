"""TrajectoryData: transitions for a learner, and beside them what models of the data learn from.

Sources: the data pipelines of DyDiff and SynthER. A *window* is H steps (state, action) of one episode, states first,
in the model scale: every dimension from -1 to 1 over the whole dataset, the states that end its episodes included. An
episode of T steps has ``max(T - H, 0) + 1`` of them; a shorter one is padded. Such windows never show how an episode
ends, so by default those of episodes that end in a terminal state may begin at any of their T steps and go on to it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_diffrl.data.bootstrap import bootstrap, hold_out
from lit_diffrl.data.episodes import Episodes
from lit_diffrl.data.normalizers import LimitsNormalizer
from lit_diffrl.data.rewards import best_episodes, episode_returns
from lit_diffrl.data.segments import keep_steps
from lit_diffrl.data.sources import SourceInfo
from lit_diffrl.data.stream import Blocks
from lit_diffrl.data.transitions import PolicyBatch, TransitionData
from lit_diffrl.errors import ConfigError, DataError, check_choice, check_range
from lit_diffrl.seeding import Place

HELD_OUT = 5000  # transitions at most that stop an ensemble
PADDING = -1.0001  # of padding "constant", in the model scale


class TrajectoryBatch(NamedTuple):
    """A batch of windows.

    Args:
        trajectory: ``(B, H, obs + action)`` in the model scale, states first.
        mask: ``(B, H)`` bool, True for rows to learn from.
    """

    trajectory: Tensor
    mask: Tensor


class TrajectoryData(TransitionData):
    """Transitions, windows of trajectories, and a batch of transitions for each member of an ensemble.

    Args:
        horizon: Steps H of a window; null for methods that need none.
        padding: Windows of other episodes that are shorter than H: ``repeat`` the last state with zero actions, not
            learnt from; ``constant`` -1.0001, learnt from (DyDiff's code). ``drop`` leaves all shorter ones out.
        terminal: Windows go on to an episode's terminal state, which then stays, whatever actions follow: those of
            another place in the data, as zeros would tell the model of the end before it comes. These rows are learnt
            from. False ends all windows with the last state acted in, as the papers'. Without effect where nothing
            terminates, or where the data does not hold terminal states.
        window_batch_size: Windows per update and process.
        transition_batch_size: Transitions per member of an ensemble, update and process; of SynthER's denoiser too.
        holdout: Fraction of the transitions held out to stop the world model early, at most 5,000.
        normalizer: Of states: ``gaussian``, mean 0 and deviation 1 (plus 1e-3), or ``none``. The world model sees them
            like this, too.
        **kwargs: As :class:`TransitionData`.
    """

    def __init__(
        self,
        horizon: int | None = 100,
        padding: Literal["repeat", "constant", "drop"] = "repeat",
        terminal: bool = True,
        window_batch_size: int = 64,
        transition_batch_size: int = 256,
        holdout: float = 0.2,
        normalizer: Literal["none", "gaussian"] = "gaussian",
        **kwargs: Any,
    ) -> None:
        super().__init__(normalizer=normalizer, **kwargs)
        if horizon is not None:
            check_range("data.horizon", horizon, 2)
        check_choice("data.padding", padding, ("repeat", "constant", "drop"))
        check_range("data.window_batch_size", window_batch_size, 1)
        check_range("data.transition_batch_size", transition_batch_size, 1)
        check_range("data.holdout", holdout, 0, 0.5, low_open=True)
        if self.hparams["n_step"] != 1:
            raise ConfigError(
                f"data.n_step is {self.hparams['n_step']}, but models of the data predict single steps; use 1"
            )
        self.horizon, self.padding, self.terminal = horizon, padding, terminal
        self.window_batch_size, self.transition_batch_size = window_batch_size, transition_batch_size

    # ---------------------------------------------------------------- loading

    def load(self, episodes: Episodes, info: SourceInfo) -> None:
        """Take in episodes: transitions as :class:`TransitionData`, and windows of all rows of the same episodes."""
        super().load(episodes, info)
        best = best_episodes(episode_returns(episodes), self.hparams["top_fraction"])[episodes.episode]
        count = min(HELD_OUT, max(1, int(len(self.table) * self.hparams["holdout"])))
        self.held_out, self.usable = hold_out(torch.arange(len(self.table)), count)
        if len(self.usable) == 0:
            raise DataError(f"{self._name()}: a single transition, of which none can be held out; give more data")
        self.bootstraps: dict[int, Tensor] = {}
        self._index_windows(keep_steps(episodes, best), best.nonzero().flatten())

    def _index_windows(self, episodes: Episodes, steps: Tensor) -> None:
        """Rows in the model scale, where each episode ends, and where windows may start."""
        raw = torch.cat([episodes.obs, self.action_normalizer.normalize(episodes.action)], dim=1)
        # A fallen robot's state is nobody's first: clipped to the limits of the others it would stand again, and no
        # predicted state would ever be terminal.
        after = torch.cat([episodes.next_obs, raw[:, episodes.obs_dim :]], dim=1)
        self.limits = LimitsNormalizer.fit(torch.stack([raw, after]))
        self.scaled = self.limits.normalize(raw)
        last = episodes.ends - 1
        # Where the data has no states after the last ones, those stand in their place, and they are not terminal.
        moved = (episodes.next_obs[last] != episodes.obs[last]).any(dim=1)
        self.falls = episodes.terminated[last] & moved & self.terminal
        self.final = self.limits.normalize(after[last])[:, : episodes.obs_dim]
        self.episode, self.ends = episodes.episode, episodes.ends
        self.first_steps = steps
        self.still = self.limits.normalize(torch.zeros(raw.shape[1]))[episodes.obs_dim :]
        if self.horizon is None:
            return
        count = torch.where(self.falls, episodes.lengths, (episodes.lengths - self.horizon).clamp_min(0) + 1)
        if self.padding == "drop":
            count = count * (episodes.lengths >= self.horizon)
        if not bool(count.any()):
            raise DataError(
                f"{self._name()}: no episode has data.horizon {self.horizon} steps (longest "
                f"{int(episodes.lengths.max())}); lower it, or do not drop short ones (data.padding repeat)"
            )
        offset = torch.arange(int(count.sum())) - torch.repeat_interleave(count.cumsum(0) - count, count)
        self.starts = torch.repeat_interleave(episodes.starts, count) + offset

    # ---------------------------------------------------------------- drawing

    def windows(self, start: Tensor, horizon: int) -> TrajectoryBatch:
        """Windows from rows ``(B,)`` on, of ``horizon`` steps."""
        rows = start[:, None] + torch.arange(horizon, device=start.device)
        episode = self.episode[start]
        end, falls = self.ends[episode][:, None], self.falls[episode][:, None]
        inside, width = rows < end, len(self.still)
        state = self.scaled[torch.minimum(rows, end - 1), :-width]
        state = torch.where((inside | ~falls)[..., None], state, self.final[episode][:, None])
        # Half the data away, which is the middle of an episode: how one begins would tell that another has ended.
        other = torch.where(inside, rows, rows + len(self.scaled) // 2) % len(self.scaled)
        mask = inside | falls
        action = torch.where(mask[..., None], self.scaled[other, -width:], self.still)
        trajectory = torch.cat([state, action], dim=-1)
        if self.padding == "constant":
            return TrajectoryBatch(torch.where(mask[..., None], trajectory, PADDING), torch.ones_like(mask))
        return TrajectoryBatch(trajectory, mask)

    def draw(self, phase: Any, place: Place) -> PolicyBatch | TrajectoryBatch:  # type: ignore[override]
        """The batch of an update: windows, transitions for each member, or a learner's transitions."""
        rows = self.rows(phase, place)
        return self.windows(rows, self.require_windows()) if phase.batch == "windows" else self.transitions(rows)

    def indices(self, phase: Any, place: Place) -> tuple[Tensor] | tuple[Tensor, int]:  # type: ignore[override]
        """Steps of the dataset that this process's batch of an update consists of; of windows their first, and H."""
        rows = self.rows(phase, place).cpu()
        if phase.batch == "windows":
            return self.first_steps[rows], self.require_windows()
        return (self.steps[rows],)

    def require_windows(self) -> int:
        """Steps H of a window.

        Raises:
            ConfigError: When there are no windows.
        """
        if self.horizon is None:
            raise ConfigError("data.horizon is null, but this method learns from windows; give their length in steps")
        return self.horizon

    def _draw_block(self, phase: Any, place: Place, generator: torch.Generator) -> list[Tensor]:
        """Rows of a block of updates: drawn for all processes, of which this one has its own."""
        if phase.batch == "transitions":
            return super()._draw_block(phase, place, generator)
        n, device = self.blocks.size, self.table.device
        if phase.batch == "windows":
            width = place.world_size * self.window_batch_size
            self.require_windows()
            drawn = torch.randint(len(self.starts), (n, width), generator=generator)[:, place.share(width)]
            return list(self.starts[drawn.to(device)].unbind())
        width = place.world_size * self.transition_batch_size
        shape = (phase.members, n * width)
        if phase.batch == "rows":
            rows = torch.randint(len(self.table), shape, generator=generator).to(device)
        else:
            position = torch.randint(len(self.usable), shape, generator=generator).to(device)
            rows = self.usable[self._bootstrap(phase.members).gather(1, position).long()]
        return list(rows.view(phase.members, n, width)[..., place.share(width)].unbind(1))

    def _bootstrap(self, members: int) -> Tensor:
        """Each member's own sample of the training transitions, ``(members, n)`` positions in them."""
        if members not in self.bootstraps:
            self.bootstraps[members] = bootstrap(len(self.usable), members).to(self.usable.device)
        return self.bootstraps[members]

    def to(self, device: torch.device) -> None:
        """Move what batches are cut from to a device."""
        if self.table.device == device:
            return
        super().to(device)
        names = ["scaled", "final", "episode", "ends", "falls", "still", "usable", "held_out"]
        for name in names + ["starts"] * (self.horizon is not None):
            setattr(self, name, getattr(self, name).to(device))
        self.bootstraps, self.blocks = {}, Blocks()

    # ---------------------------------------------------------------- for models of the data

    def start_rows(self, kind: Literal["transitions", "non_terminal", "initial"]) -> Tensor:
        """Rows of the table whose states rollouts may start from."""
        if kind == "initial":
            return self.initial
        rows = torch.arange(len(self.table), device=self.table.device)
        return rows if kind == "transitions" else rows[self.transitions(rows).done == 0]

    def spread_states(self, count: int) -> Tensor:
        """Raw states ``(n, obs)`` of transitions that do not terminate, spread evenly over the data."""
        rows = self.start_rows("non_terminal")
        spread = torch.linspace(0, len(rows) - 1, min(count, len(rows))).long().to(rows.device)
        return self.obs_normalizer.unnormalize(self.transitions(rows[spread]).obs)

    def deviations(self) -> Tensor:
        """Standard deviations ``(obs,)`` of the data's raw states, the units of errors; of constant ones 1e-6."""
        states = self.limits.unnormalize(self.scaled)[:, : self.spec.obs_dim]
        return states.double().std(0, correction=0).clamp_min(1e-6)

    def recorded(self, count: int) -> tuple[Tensor, Tensor]:
        """Whole windows spread evenly over the data: states ``(n, H, obs)`` and actions ``(n, H, action)``, raw."""
        whole = self.starts[self.starts + self.require_windows() <= self.ends[self.episode[self.starts]]]
        if len(whole) == 0:
            raise DataError(
                f"{self._name()}: no episode has data.horizon {self.horizon} steps to compare the models with; lower "
                "it, or give --model_check.starts 0"
            )
        spread = torch.linspace(0, len(whole) - 1, min(count, len(whole))).long().to(whole.device)
        rows = self.limits.unnormalize(self.windows(whole[spread], self.require_windows()).trajectory)
        obs, action = rows.split([self.spec.obs_dim, self.spec.action_dim], dim=-1)
        return obs, self.action_normalizer.unnormalize(action)

    def held_out_transitions(self) -> PolicyBatch:
        """The transitions held out, for one member."""
        return self.transitions(self.held_out[None])

    def validation_batch(self) -> PolicyBatch:
        """The held-out transitions."""
        return self.held_out_transitions()
