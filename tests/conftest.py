"""Fixtures that all tests share: tiny Minari datasets in a folder of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mazes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root of Minari datasets with short walks, ``umaze-v0`` and ``umaze-dense-v0``; to be read only."""
    from lit_diffrl.data import pointmaze

    root = tmp_path_factory.mktemp("mazes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        patch.setattr(pointmaze, "REFERENCE_EPISODES", 1)
        for variant in ("umaze", "umaze-dense"):
            pointmaze.collect(f"lit_diffrl/pointmaze/{variant}-v0", steps=3_000, progress=False)
    return root


@pytest.fixture
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty root of Minari datasets, for this test only."""
    root = tmp_path / "minari"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


@pytest.fixture
def make_minari(minari_root: Path) -> Callable[..., str]:
    """Factory of small random Minari datasets.

    ``make_minari(dataset_id, n_episodes, length, obs_dim, action_dim, env=..., edit=..., **overrides)`` returns the id.
    ``env`` is an id or EnvSpec; ``edit(episode, index)`` changes the dict of arrays of an episode before it is stored;
    with ``dict_obs`` observations are those of a point maze, with that constant ``goal``; the rest goes to
    ``minari.create_dataset_from_buffers``.
    """

    def make(
        dataset_id: str = "test/point-v0",
        n_episodes: int = 3,
        length: int = 20,
        obs_dim: int = 4,
        action_dim: int = 2,
        *,
        env: Any = None,
        dict_obs: bool = False,
        goal: tuple[float, float] = (1.0, -1.0),
        edit: Callable[[dict[str, Any], int], None] | None = None,
        **overrides: Any,
    ) -> str:
        import minari
        from gymnasium.spaces import Box, Dict
        from minari.data_collector import EpisodeBuffer

        def box(size: int) -> Box:
            return Box(-np.inf, np.inf, (size,), np.float64)

        rng = np.random.default_rng(0)
        buffers = []
        for index in range(n_episodes):
            obs: Any = rng.normal(size=(length + 1, obs_dim))
            if dict_obs:
                goals = np.tile(np.asarray(goal, dtype=np.float64), (length + 1, 1))
                obs = {"observation": obs, "achieved_goal": obs[:, :2], "desired_goal": goals}
            episode = {
                "observations": obs,
                "actions": rng.uniform(-1, 1, size=(length, action_dim)).astype(np.float32),
                "rewards": rng.normal(size=length),
                "terminations": np.zeros(length, dtype=bool),
                "truncations": np.arange(length) == length - 1,
                "infos": {},
            }
            if edit is not None:
                edit(episode, index)
            buffers.append(EpisodeBuffer(**episode))
        plain = box(obs_dim)
        spaces = {
            "observation_space": Dict({"observation": plain, "achieved_goal": box(2), "desired_goal": box(2)})
            if dict_obs
            else plain,
            "action_space": Box(-1, 1, (action_dim,), np.float32),
        }
        # Minari stores these only with an environment, which most of our tests do without.
        scores = {key: overrides.pop(key) for key in ("ref_min_score", "ref_max_score") if key in overrides}
        dataset = minari.create_dataset_from_buffers(dataset_id, buffers, env, **{**spaces, **overrides})
        dataset.storage.update_metadata(scores)
        return dataset_id

    return make
