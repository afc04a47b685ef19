"""Diffusion models for offline reinforcement learning, as PyTorch Lightning modules.

``agent = lit_diffrl.load("tb_logs/dmemm/…/checkpoints/last.ckpt"); action = agent.act(obs)``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from lit_diffrl.methods.base import Method

__version__ = "0.1.0"


def load(path: str | Path, device: str = "cpu") -> Method:
    """Load a trained agent from a checkpoint alone: neither its dataset nor its config is needed.

    Args:
        path: A ``.ckpt`` file written by ``fit``.
        device: Where to put the networks, e.g. ``cuda``.

    Returns:
        The method, in evaluation mode: ``agent.act(obs)``; ``agent.reset()`` before a new episode; a planner also
        has ``agent.plan(obs)``.

    Raises:
        ConfigError: When the file is missing, is no checkpoint of ours, or is of a class that is not imported.
    """
    from lit_diffrl.methods.loading import load_agent

    return load_agent(path, device)
