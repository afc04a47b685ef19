"""Small energy-guided learners, and a bandit whose guided policy is known."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from small_learners import transitions

from lit_diffrl.data import TransitionData
from lit_diffrl.data.episodes import Episodes
from lit_diffrl.data.sources import SourceInfo
from lit_diffrl.methods import AEPO, QGPO
from lit_diffrl.methods.energy_learner import EnergyLearner

LEARNERS: list[type[EnergyLearner]] = [QGPO, AEPO]
MEAN, STD, SLOPE = 0.1, 0.25, 1.5  # of the bandit's actions, and of its reward

SMALL: dict[str, Any] = {
    "behaviour_epochs": 1,
    "critic_epochs": 1,
    "energy_epochs": 1,
    "behaviour": {"width": 64, "lr": 2e-3, "batches": 1},
    "energy": {"hidden": 32, "layers": 2, "lr": 3e-3},
    "critic": {"hidden": 32, "layers": 2, "lr": 3e-3, "tau": 0.05},
    "support": {"actions": 8},
    "sampler": {"steps": 6, "method": "multistep", "grid": "logsnr"},
}
POSTERIOR = {"samples": 512, "grid": 32}


def small(kind: type[Any], **options: Any) -> Any:
    """A small learner without networks yet; groups of options are laid over the small ones."""
    given = {**SMALL, **({"posterior": POSTERIOR} if issubclass(kind, AEPO) else {})}
    for name, value in options.items():
        given[name] = {**given.get(name, {}), **value} if isinstance(value, dict) else value
    torch.manual_seed(0)
    return kind(**given)


def linear_bandit(n: int = 4000) -> TransitionData:
    """One state, actions of N(0.1, 0.0625), reward 1.5 a: the policy of beta is N(0.1 + 0.09375 beta, 0.0625)."""
    generator = torch.Generator().manual_seed(0)
    action = (MEAN + STD * torch.randn(n, 1, generator=generator)).clamp(-1, 1)
    return transitions(torch.zeros(n, 2), action, SLOPE * action[:, 0])


def chain() -> TransitionData:
    """Two episodes of three steps; the first ends at a time limit, the second terminates."""
    obs = torch.arange(6.0)[:, None].expand(-1, 2)
    next_obs = obs + 1
    ends = torch.tensor([False, False, True] * 2)
    terminated = ends & (torch.arange(6) == 5)
    reward = torch.ones(6)
    episodes = Episodes(obs, torch.zeros(6, 1), reward, terminated, ends & ~terminated, next_obs, torch.tensor([0, 3]))
    info = SourceInfo(None, None, None, None, None, None, None, [-1.0], [1.0], ["test/chain-v0"])
    data = TransitionData("test/chain-v0", batch_size=64)
    data.load(episodes, info)
    data.prepare_data = lambda: None  # type: ignore[method-assign]
    return data


def built(kind: type[Any], data: TransitionData | None = None, **options: Any) -> Any:
    """A small learner with its networks."""
    method = small(kind, **options)
    method.build((data or linear_bandit(64)).spec)
    return method


def fit(method: Any, updates: int = 3, data: TransitionData | None = None, **options: Any) -> Any:
    """Train all phases, ``updates`` an epoch."""
    data = data or linear_bandit(64)
    data.updates_per_epoch = updates
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=method.total_epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, **options,
    )  # fmt: skip
    trainer.fit(method, datamodule=data)
    return method.eval()


def act(method: Any, rows: int, seed: int = 0) -> torch.Tensor:
    """Actions in state 0, each of an episode of its own."""
    method.reset(seeds=list(range(seed, seed + rows)))
    actions: torch.Tensor = method.act(torch.zeros(rows, method.spec.obs_dim))
    return actions
