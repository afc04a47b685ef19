"""OfflineData: what the data modules share. A dataset is fetched once, read by every process, and kept in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lit_diffrl.checkpoint_io import own_arguments, read_plain
from lit_diffrl.data.episodes import Episodes
from lit_diffrl.data.normalizers import Normalizer
from lit_diffrl.data.sources import SourceInfo, load_source, prepare_source
from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.stream import BatchStream, Blocks
from lit_diffrl.errors import ConfigError
from lit_diffrl.seeding import Place

AnyData = TypeVar("AnyData", bound="OfflineData")


class OfflineData(LightningDataModule):
    """An offline dataset whose batches are drawn by their place in the run.

    Constructors of subclasses save their arguments, ``obs_keys`` and ``env`` among them, and set the attributes here.

    Attributes:
        dataset: What :func:`~lit_diffrl.data.sources.load_source` reads.
        batch_size: Rows per update and process.
        updates_per_epoch: Gradient updates that make an epoch.
        blocks: Indices drawn for many updates at once.
        spec: Description of the data, once it is loaded.
        obs_normalizer: Normaliser of states, likewise.
        action_normalizer: Normaliser of actions, likewise.
    """

    dataset: str | list[str]
    batch_size: int
    updates_per_epoch: int
    blocks: Blocks
    spec: DatasetSpec
    obs_normalizer: Normalizer
    action_normalizer: Normalizer

    def load(self, episodes: Episodes, info: SourceInfo) -> None:
        """Take in episodes: normalise and index them, and describe them in ``spec``."""
        raise NotImplementedError

    def draw(self, phase: Any, place: Place) -> Any:
        """The batch of an update in a phase."""
        raise NotImplementedError

    def to(self, device: Any) -> None:
        """Move what batches are cut from to a device."""
        raise NotImplementedError

    def validation_batch(self) -> Any:
        """A small batch that is always the same, for validation."""
        raise NotImplementedError

    # ---------------------------------------------------------------- loading

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls: type[AnyData], checkpoint_path: str | Path, **kwargs: Any
    ) -> AnyData:
        """The data module of a run, with its arguments; Lightning's own calls what the file names.

        Args:
            checkpoint_path: A file written by ``fit``.
            kwargs: Arguments in place of those saved.

        Raises:
            ConfigError: When the file is no checkpoint, or holds the arguments of another data module.
        """
        content = read_plain(checkpoint_path)
        saved = content.get(cls.CHECKPOINT_HYPER_PARAMS_KEY) if isinstance(content, dict) else None
        if not isinstance(saved, dict):
            raise ConfigError(f"{checkpoint_path} holds no arguments of a data module; give a checkpoint of a run")
        try:
            return cls(**own_arguments(saved) | kwargs)
        except TypeError as error:
            raise ConfigError(f"{checkpoint_path} is not of a run with {cls.__name__} ({error})") from error

    def prepare_data(self) -> None:
        """Download or collect the data once, on the first process."""
        prepare_source(self.dataset, **self._source_options())

    def setup(self, stage: str) -> None:
        """Load the data, once."""
        if not hasattr(self, "spec"):
            self.load(*load_source(self.dataset, **self._source_options()))

    def _source_options(self) -> dict[str, Any]:
        return {"obs_keys": self.hparams["obs_keys"], "env": self.hparams["env"]}

    def _name(self) -> str:
        return "+".join([self.dataset] if isinstance(self.dataset, str) else self.dataset)

    def _describe(self, episodes: Episodes, info: SourceInfo, reward: Tensor, stride: int = 1) -> None:
        self.spec = DatasetSpec(
            **vars(info),
            obs_dim=episodes.obs_dim,
            action_dim=episodes.action_dim,
            obs_normalizer=self.obs_normalizer.state(),
            action_normalizer=self.action_normalizer.state(),
            reward_max=float(reward.max()),
            reward_min=float(reward.min()),
            stride=stride,
        )

    # ---------------------------------------------------------------- batches

    def train_dataloader(self) -> BatchStream:
        """Batches of the current phase's kind, ``updates_per_epoch`` to an epoch."""
        return BatchStream(self)

    def val_dataloader(self) -> DataLoader[Any]:
        """:meth:`validation_batch` as a single batch."""
        batches: Any = [self.validation_batch()]
        return DataLoader(batches, batch_size=None)

    def test_dataloader(self) -> DataLoader[Any]:
        """The same: testing itself happens in the simulator."""
        return self.val_dataloader()
