"""Small feed-forward learners, stepped without a Trainer, and a bandit to train them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from lit_diffrl.data import PolicyBatch, TransitionData
from lit_diffrl.data.episodes import Episodes
from lit_diffrl.data.sources import SourceInfo
from lit_diffrl.methods import BC, CQL, CRR, IQL, TD3BC
from lit_diffrl.methods.offline_learner import OfflineLearner

OBS, ACTION = 4, 2
LEARNERS: list[type[OfflineLearner]] = [TD3BC, IQL, CQL, CRR, BC]


def transitions(obs: Tensor, action: Tensor, reward: Tensor) -> TransitionData:
    """Data of episodes of one step."""
    n = len(obs)
    ends = torch.ones(n, dtype=torch.bool)
    episodes = Episodes(obs, action, reward, ends, ~ends, obs, torch.arange(n))
    width = action.shape[1]
    info = SourceInfo(None, None, None, None, None, None, None, [-1.0] * width, [1.0] * width, ["test/bandit-v0"])
    data = TransitionData("test/bandit-v0", batch_size=64)
    data.load(episodes, info)
    data.prepare_data = lambda: None  # type: ignore[method-assign]
    return data


def bandit(n: int = 4000) -> TransitionData:
    """One state, actions near -0.5 and +0.5, reward 1 for the right half."""
    generator = torch.Generator().manual_seed(0)
    action = 0.5 * torch.randn(n, 1, generator=generator).sign() + 0.05 * torch.randn(n, 1, generator=generator)
    return transitions(torch.zeros(n, 2), action, (action[:, 0] > 0).float())


def fit(method: OfflineLearner, updates: int, data: TransitionData | None = None) -> OfflineLearner:
    """One epoch."""
    data = data or bandit()
    data.updates_per_epoch = updates
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(method, datamodule=data)
    return method.eval()


def small(kind: type[Any], **options: Any) -> dict[str, Any]:
    """Options of a small learner."""
    given: dict[str, Any] = {"policy_epochs": 1, "actor": {"hidden": 32, "layers": 2}}
    if kind is not BC:
        given["critic"] = {"hidden": 32, "layers": 2}
    for name, value in options.items():
        given[name] = {**given.get(name, {}), **value} if isinstance(value, dict) else value
    return given


def built(kind: type[Any], **options: Any) -> Any:
    """A small learner with its networks, which ``training_step`` trains without a Trainer."""
    torch.manual_seed(0)
    if kind is IQL:
        options.setdefault("lr_decay", "none")  # a place in the run is the Trainer's to know
    method = kind(**small(kind, **options))
    rows = torch.zeros(2, OBS + ACTION + 1)
    method.build(transitions(*rows.split([OBS, ACTION, 1], dim=1)[:2], rows[:, 0]).spec)
    found = method.configure_optimizers()
    method.optimizers = lambda: found
    method.manual_backward = lambda loss: loss.backward()
    return method


def batch(n: int = 16, **fields: Tensor) -> PolicyBatch:
    """Random transitions, none of them terminal."""
    draw = torch.Generator().manual_seed(1)
    obs, next_obs = torch.randn(2, n, OBS, generator=draw)
    action = 1.8 * torch.rand(n, ACTION, generator=draw) - 0.9
    reward = torch.rand(n, generator=draw)
    whole = PolicyBatch(obs, action, reward, next_obs, torch.zeros(n), torch.full((n,), 0.99))
    return whole._replace(**fields)


def at_each_step(method: Any, look: Callable[[str, Tensor], None]) -> None:
    """Call ``look(name, loss)`` before each optimizer step."""
    descend = method.descend

    def watched(optimizer: Any, loss: Tensor, name: str, *args: Any) -> Tensor:
        look(name, loss)
        norm: Tensor = descend(optimizer, loss, name, *args)
        return norm

    method.descend = watched


def weights(net: torch.nn.Module) -> list[Tensor]:
    """Copies of a network's parameters."""
    return [p.detach().clone() for p in net.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
