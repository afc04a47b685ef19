"""Learners that know the behaviour by actions which its model draws in every state of the data, once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_diffrl.methods.energy import isql_value
from lit_diffrl.methods.energy_options import SolverOptions, SupportOptions
from lit_diffrl.methods.offline_learner import OfflineLearner
from lit_diffrl.methods.support import States, chunk_noise, in_chunks, states_of
from lit_diffrl.precision import constant_weights
from lit_diffrl.seeding import Place


class SupportLearner(OfflineLearner):
    """A learner whose behaviour model can draw support actions.

    Attributes:
        states: The states that actions are drawn in, or None before.
        support: ``(states, K, A)`` the actions.
    """

    sampler: SolverOptions
    support_options: SupportOptions
    states: States | None = None
    support: Tensor | None = None

    def setup(self, stage: str) -> None:
        """As OfflineLearner; actions of another run are none."""
        super().setup(stage)
        self.states = self.support = None

    def rows(self) -> Tensor:
        """Which transitions of the data the batch of this update consists of, ``(B,)``."""
        found: Tensor = self.trainer.datamodule.rows(self.phase, self.draws.place)  # type: ignore[attr-defined]
        return found

    @torch.no_grad()
    def draw_support(self) -> None:
        """Draw actions of the behaviour model in every state of the data, unless there are some already."""
        if self.support is not None:
            return
        assert self.spec is not None
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        transitions = data.transitions(torch.arange(len(data.table), device=data.table.device))
        found = states_of(transitions, self.support_options.shared)
        self.states = States(self.to_own(found.obs), found.after.to(self.device))
        obs, shape = self.states.obs, (self.support_options.actions, self.spec.action_dim)

        def draw(number: int, rows: slice) -> Tensor:
            noise = self.to_own(chunk_noise(number, rows, shape))
            return self.draw_actions(obs[rows], noise, self.sampler, (0.0, False))

        self.support = self.for_all(obs, shape, draw, f"drawing {shape[0]} support actions")

    def for_all(
        self, obs: Tensor, shape: tuple[int, ...], compute: Callable[[int, slice], Tensor], what: str
    ) -> Tensor:
        """Compute ``(states, *shape)``, each process a part of it, in the precision of the updates.

        Arguments as :func:`in_chunks`.
        """
        share = Place(0, 0, self.global_rank, self.trainer.world_size)
        with constant_weights(self.trainer):
            part = in_chunks(obs, shape, share, compute, what)
        whole: Tensor = self.trainer.strategy.reduce(part, reduce_op="sum")  # type: ignore[assignment]
        return whole

    @torch.no_grad()
    def next_value(self, next_obs: Tensor, support: Tensor) -> Tensor:
        """In-support softmax value ``(B,)`` of next states, of actions ``(B, K, A)``."""
        return isql_value(self.least_q(next_obs, support, target=True), self.support_options.beta_q)

    def draw_actions(self, obs: Tensor, noise: Tensor, options: SolverOptions, acting: tuple[float, bool]) -> Tensor:
        """Denoise actions ``(B, N, A)`` in states ``(B, S)``, at a degree of guidance, rescaled or not."""
        raise NotImplementedError
