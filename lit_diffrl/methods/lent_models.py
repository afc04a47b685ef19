"""Models of the data that one run lends to others, whatever their learners are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.trajectories import TrajectoryData
from lit_diffrl.diffusion.edm import EDM
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods.agreement import refuse_other_arguments, refuse_other_data, refuse_other_shapes
from lit_diffrl.methods.base import CHECKPOINT_KEY, as_options
from lit_diffrl.methods.loading import read_checkpoint
from lit_diffrl.methods.offline_learner import OfflineLearner


class LentModels(OfflineLearner):
    """A learner beside models of the data, which it can take from another run.

    Attributes:
        models: Names of the modules and buffers that belong to the models.
        models_data: Arguments of the data module that they cannot be lent across.
        edm: Their noise levels.
        default_edm: These, where an argument leaves fields out.
    """

    models: tuple[str, ...]
    models_data: tuple[str, ...] = ()
    edm: EDM
    default_edm = EDM()

    @property
    def data(self) -> TrajectoryData:
        """The data module."""
        found: TrajectoryData = self.trainer.datamodule  # type: ignore[attr-defined]
        return found

    def load_models(self, path: str | Path) -> None:
        """Take the models of another run, of whatever learner.

        Args:
            path: Its checkpoint, of the learner's phase.

        Raises:
            ConfigError: When it has no such models, or they belong to other data or options.
        """
        content = read_checkpoint(path)
        own = content[CHECKPOINT_KEY]
        state = {k: v for k, v in content["state_dict"].items() if k.partition(".")[0] in self.models}
        wanted = {k: v for k, v in self.state_dict().items() if k.partition(".")[0] in self.models}
        if not state:
            raise ConfigError(f"model.models_ckpt {path} is of {own['method']}, which has none of {self.models}")
        try:
            self._refuse_other_models(content, state, wanted)
        except ConfigError as error:
            raise ConfigError(f"model.models_ckpt {path}: {error}") from error
        done = content.get("epoch", -1) + 1
        needed = sum(epochs for name, epochs in own["phases"] if name != "policy")
        if done <= needed:
            raise ConfigError(
                f"model.models_ckpt {path} has {done} epochs, and its models learn until epoch {needed}; give a "
                "checkpoint of its policy's phase"
            )
        self.load_state_dict(state, strict=False)

    def _refuse_other_models(
        self, content: Mapping[str, Any], state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
    ) -> None:
        assert self.spec is not None
        refuse_other_data(DatasetSpec.from_dict(content[CHECKPOINT_KEY]["spec"]), self.spec)
        refuse_other_shapes(state, wanted)
        self._refuse_other_levels(content["hyper_parameters"])
        saved = content.get("datamodule_hyper_parameters", {})
        refuse_other_arguments("data", self.models_data, saved, self.data.hparams)

    def _refuse_other_levels(self, arguments: Mapping[str, Any]) -> None:
        saved = as_options(self.default_edm, arguments.get("edm", {}))
        refuse_other_arguments(
            "model", ("edm.sigma_data",), {"edm.sigma_data": saved.sigma_data}, {"edm.sigma_data": self.edm.sigma_data}
        )
