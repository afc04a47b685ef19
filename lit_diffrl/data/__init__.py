"""Experience: where it comes from, what it is, and how it is batched."""

from lit_diffrl.data.episodes import Episodes
from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.trajectories import TrajectoryBatch, TrajectoryData
from lit_diffrl.data.transitions import PolicyBatch, TransitionData
from lit_diffrl.data.windows import TransitionBatch, WindowBatch, WindowData

__all__ = [
    "DatasetSpec",
    "Episodes",
    "PolicyBatch",
    "TrajectoryBatch",
    "TrajectoryData",
    "TransitionBatch",
    "TransitionData",
    "WindowBatch",
    "WindowData",
]
