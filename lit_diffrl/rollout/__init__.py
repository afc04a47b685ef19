"""Environments, episodes, scores and pictures: everything that happens in the simulator."""

from lit_diffrl.rollout.callback import RolloutEvaluation
from lit_diffrl.rollout.checkpoints import BestCheckpoint
from lit_diffrl.rollout.episodes import EpisodeResult, run_episodes, summarize
from lit_diffrl.rollout.scores import RunningScores

__all__ = ["BestCheckpoint", "EpisodeResult", "RolloutEvaluation", "RunningScores", "run_episodes", "summarize"]
