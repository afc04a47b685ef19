"""Rollouts of the current policy in DyDiff's models, corrected in turns with it.

Source: Zhao et al., "Long-Horizon Rollout via Dynamics Diffusion for Offline Reinforcement Learning", 2024, Eqs. 6 to
9, and the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_diffrl.methods import synthesis
from lit_diffrl.methods.dynamics_models import DynamicsModels
from lit_diffrl.methods.synthetic_learner import AFTER_UPDATES
from lit_diffrl.seeding import Place


class Rollouts(NamedTuple):
    """Trajectories of a refresh and what tells of their quality.

    Args:
        states: ``(B, H, obs)`` normalised.
        actions: ``(B, H, action)`` in [-1, 1].
        gap: ``(B,)`` mean size of the last correction of the actions: what the last states do not know of yet.
        outside: ``(B,)`` share of the states' entries that lay beyond the data's limits, before they were clipped.
    """

    states: Tensor
    actions: Tensor
    gap: Tensor
    outside: Tensor


class ClosedLoop(NamedTuple):
    """A policy and its models, for comparison with the simulator; all in raw units.

    Args:
        policy: ``obs (n, obs) -> actions (n, action)``.
        roll_out: ``first states (n, obs) -> (states (n, H, obs), actions (n, H, action))`` by name: after the
            single-step model, and after each round of correction.
        reward: The reward model, ``(states (n, H, obs), actions (n, H, action)) -> (n, H)``.
    """

    policy: Callable[[Tensor], Tensor]
    roll_out: Callable[[Tensor], dict[str, tuple[Tensor, Tensor]]]
    reward: Callable[[Tensor, Tensor], Tensor]


class PolicyRollouts(DynamicsModels):
    """A learner with models of the dynamics, whose policy acts in them."""

    def act_in(self, x: Tensor) -> Tensor:
        """The policy's actions ``(..., action)`` in states ``(..., obs)`` of the model scale."""
        obs = self.to_learner(x)
        return self.choose(obs.flatten(0, -2)).view(*x.shape[:-1], -1)

    def choose(self, obs: Tensor) -> Tensor:
        """The policy's actions ``(n, action)`` for rollouts, in the learner's states ``(n, obs)``."""
        return self.draw_action(obs) if self.rollouts.sample_policy else self.propose(obs)

    def rounds(self) -> tuple[synthesis.PredictStates, list[Tensor]]:
        """The trajectory model as the rounds of one correction ask it, and the list of the samples it has given."""
        samples, index = list[Tensor](), self.rollouts.warm_start

        def predict(first: Tensor, actions: Tensor) -> Tensor:
            warm = (samples[-1], index) if samples and index is not None else None
            samples.append(self.sample_states(first, actions, warm))
            return samples[-1]

        return predict, samples

    def roll_out(self, start: Tensor, horizon: int) -> Rollouts:
        """Trajectories of the current policy (Eqs. 6 to 9).

        Args:
            start: ``(B, obs)`` start states, normalised.
            horizon: Steps H.
        """
        o, (predict, samples) = self.rollouts, self.rounds()
        x = self.to_model(start)
        x, actions = synthesis.single_step_rollout(x, self.act_in, self.step_model(x), horizon)
        x, actions, previous = synthesis.iterate_correction(
            x, actions, predict, self.act_in, rounds=o.corrections, beta=o.damping
        )
        gap = (actions - previous).abs().mean((1, 2))
        if o.emit == "dynamics":
            x, actions = samples[-1], previous
        return Rollouts(self.to_learner(x), actions, gap, (x.abs() > 1 + 1e-4).to(gap).mean((1, 2)))

    # ---------------------------------------------------------------- diagnosis

    def closed_loop(self, horizon: int) -> ClosedLoop:
        """The policy and the models for comparison with the simulator.

        Args:
            horizon: States H of a rollout.
        """
        place = Place(self.current_epoch, AFTER_UPDATES + 2)

        @torch.no_grad()
        def policy(obs: Tensor) -> Tensor:
            chosen = self.choose(self.obs_normalizer.normalize(self.to_own(obs)))
            return self.action_normalizer.unnormalize(chosen).float()

        @torch.no_grad()
        def roll_out(first: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
            self.draws.begin(place, self.device)
            x = self.state_limits.normalize(self.to_own(first))
            x, actions = synthesis.single_step_rollout(x, self.act_in, self.step_model(x), horizon)
            found, (predict, samples) = {"single-step rollout": (x, actions)}, self.rounds()
            for k in range(1, self.rollouts.corrections + 1):
                x, actions, previous = synthesis.iterate_correction(
                    x, actions, predict, self.act_in, rounds=1, beta=self.rollouts.damping
                )
                kept = (samples[-1], previous) if self.rollouts.emit == "dynamics" else (x, actions)
                found[f"correction {k}"] = kept
            raw, units = self.state_limits.unnormalize, self.action_normalizer.unnormalize
            return {name: (raw(x).float(), units(a).float()) for name, (x, a) in found.items()}

        @torch.no_grad()
        def reward(states: Tensor, actions: Tensor) -> Tensor:
            obs = self.obs_normalizer.normalize(self.to_own(states))
            return self.world_model.reward(obs, self.action_normalizer.normalize(self.to_own(actions)))

        return ClosedLoop(policy, roll_out, reward)
