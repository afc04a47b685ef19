"""What acts: observations in, actions out, with a stream of noise for each episode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.errors import ConfigError


@dataclass(frozen=True)
class Variant:
    """A way to act that ``test`` compares with others on the same episodes.

    Args:
        axis: What is varied, e.g. ``guidance scale``.
        value: Its value.
        curve: Which curve over the values this is a point of.
        enter: Gives a context in which the agent acts like this.
    """

    axis: str
    value: float
    curve: str
    enter: Callable[[], AbstractContextManager[None]]


class Agent(LightningModule):
    """The side of a method that the simulator sees: ``reset`` and ``act``.

    Attributes:
        spec: The dataset's description, with the bounds and normalisers that acting needs; None before networks exist.
        offline_loss: Loss by which its checkpoints can be chosen without a simulator (``rollout.select offline``):
            under this name ``training_step`` returns it; None where there is none.
    """

    offline_loss: ClassVar[str | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.spec: DatasetSpec | None = None
        self._generators: list[torch.Generator] = []

    @property
    def can_act(self) -> bool:
        """Whether the acting networks have been trained at all; before that no rollout is worth its time."""
        return self.spec is not None

    @property
    def acts_by_gradient(self) -> bool:
        """Whether choosing an action asks autograd; what does not acts in inference mode.

        That takes a twelfth off Diffusion-QL's decision.
        """
        return True

    def variants(self) -> list[Variant]:
        """Ways to act that ``test`` shall compare, the first of them the usual one; none where there is only that."""
        return []

    def reset(self, mask: Sequence[bool] | np.ndarray | None = None, seeds: Sequence[int] | None = None) -> None:
        """Begin new episodes: forget what is remembered between steps and reseed the sampling noise.

        Args:
            mask: ``(n,)`` rows that begin a new episode; None for all rows (of any later number).
            seeds: One seed per row of ``mask`` (or, without a mask, per row); None draws fresh ones.
        """
        if mask is None:
            self._generators = [] if seeds is None else [torch.Generator().manual_seed(int(s)) for s in seeds]
            return
        rows = np.asarray(mask, dtype=bool)
        self._ensure_generators(len(rows))
        for i in np.flatnonzero(rows).tolist():
            self._generators[i] = torch.Generator()
            if seeds is None:
                self._generators[i].seed()
            else:
                self._generators[i].manual_seed(int(seeds[i]))

    def _ensure_generators(self, n: int) -> None:
        while len(self._generators) < n:
            generator = torch.Generator()
            generator.seed()
            self._generators.append(generator)

    def row_noise(self, rows: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Standard normal noise ``(len(rows), *shape)``, each row from its own episode's stream.

        Drawn on the CPU, so that an episode's noise depends neither on the device nor on its neighbours.
        """
        self._ensure_generators(max(rows) + 1)
        size = tuple(shape)
        noise = [torch.randn(size, generator=self._generators[r], dtype=torch.float32) for r in rows]
        return self.to_own(torch.stack(noise))

    def act(self, obs: Any, active: Sequence[bool] | np.ndarray | None = None) -> Any:
        """Choose actions.

        Args:
            obs: One observation ``(obs_dim,)``, a batch ``(n, obs_dim)``, or the environment's own dict of such
                arrays (needed when the goal changes between episodes); numpy or torch, raw units.
            active: ``(n,)`` rows to act on; the others get zeros. None for all.

        Returns:
            Actions in raw units within the action bounds, of the kind and batch form of ``obs``: ``(action_dim,)``
            or ``(n, action_dim)``, float32.
        """
        if self.spec is None:
            raise ConfigError(f"{type(self).__name__} has no networks yet: load a checkpoint or fit first")
        state, goal = self.spec.split_obs(obs)
        rows = np.arange(len(state)) if active is None else np.flatnonzero(np.asarray(active, dtype=bool))
        action = np.zeros((len(state), self.spec.action_dim), dtype=np.float32)
        if len(rows):
            with torch.inference_mode(not self.acts_by_gradient), torch.no_grad():
                chosen = self.choose_action(
                    self.to_own(state[rows]), None if goal is None else self.to_own(goal[rows]), rows.tolist()
                )
            action[rows] = chosen.float().cpu().numpy()
        action = np.clip(action, self.spec.action_low, self.spec.action_high).astype(np.float32)
        sample = next(iter(obs.values())) if isinstance(obs, Mapping) else obs
        if self.spec.is_single(obs):
            action = action[0]
        return torch.as_tensor(action, device=sample.device) if isinstance(sample, Tensor) else action

    def to_own(self, numbers: np.ndarray | Tensor) -> Tensor:
        """A copy on the networks' device, in their precision."""
        dtype = cast(torch.dtype, self.dtype)
        return torch.as_tensor(numbers).to(self.device, dtype, copy=True)

    def choose_action(self, state: Tensor, goal: Tensor | None, rows: list[int]) -> Tensor:
        """Choose actions for some rows of the batch of environments.

        Args:
            state: ``(len(rows), obs_dim)`` raw observations.
            goal: ``(len(rows), goal_dim)`` raw goals, or None.
            rows: Index of each row among the environments: what state between steps is kept under.

        Returns:
            ``(len(rows), action_dim)`` actions in raw units.
        """
        raise NotImplementedError
