"""What SynthER and DyDiff share: models of the data learn first, then any learner on real and synthetic transitions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_diffrl.data.replay_buffer import ReplayBuffer
from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.trajectories import TrajectoryData
from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.diffusion.edm import EDM, Churn, DenoiseLevel, sample_edm_multistep, sample_heun
from lit_diffrl.diffusion.hooks import Project
from lit_diffrl.errors import ConfigError, check_range
from lit_diffrl.methods.base import Phase
from lit_diffrl.methods.lent_models import LentModels
from lit_diffrl.methods.losses import td_target
from lit_diffrl.methods.synthesis_options import EDMSamplerOptions
from lit_diffrl.precision import constant_weights
from lit_diffrl.seeding import Place

AFTER_UPDATES = 2**31  # a place in an epoch that no update has
Predict = Callable[[Tensor, Tensor], Tensor]
SYNTHETIC = "lit_diffrl_synthetic"  # where a checkpoint holds the synthetic transitions


class Synthesis(LentModels):
    """Comes before a learner among the bases of a class, and leaves the learner's own code as it is.

    The phases of the models come first. In the learner's phase ``policy`` each batch is mixed: its first
    ``int(real_ratio * rows)`` rows, over all processes, stay the data's; the others are drawn from the synthetic ones.

    Attributes:
        buffer: The synthetic transitions.
    """

    churn: Churn
    edm_sampler: EDMSamplerOptions
    real_ratio: float
    models_ckpt: str | None
    epochs: dict[str, int]

    def _keep_synthesis(self, real_ratio: float, models_ckpt: str | None) -> None:
        """Check and keep what both have."""
        check_range("model.real_ratio", real_ratio, 0, 1)
        names = [phase.name for phase in super().phases]
        if names != ["policy"]:
            raise ConfigError(
                f"{type(self).__name__} would train a learner with phases {', '.join(names)}, of which only one named "
                "policy can learn from synthetic transitions; combine it with a learner of one phase, e.g. TD3BC"
            )
        self.real_ratio, self.models_ckpt = real_ratio, models_ckpt
        self._real: Tensor | None = None

    # ---------------------------------------------------------------- phases and optimizers

    @property
    def model_phases(self) -> list[Phase]:
        """Phases of the models."""
        raise NotImplementedError

    def model_optimizers(self) -> list[Optimizer]:
        """One for each of :attr:`model_phases`, in their order."""
        raise NotImplementedError

    def model_step(self, phase: str, optimizer: LightningOptimizer, batch: Any) -> None:
        """An update of a model."""
        raise NotImplementedError

    def synthesize(self) -> dict[str, float]:
        """Fill the buffer with what the models and the current policy give; what there is to log of it."""
        raise NotImplementedError

    def synthesizes(self, epoch: int) -> bool:
        """Whether the learner's ``epoch``-th epoch begins with new synthetic transitions."""
        raise NotImplementedError

    @property
    def drawn_for_all(self) -> tuple[str, int]:
        """The option that says how many rows all processes draw together, and its value."""
        raise NotImplementedError

    @property
    def kept_option(self) -> str:
        """The option that says how many synthetic transitions are kept."""
        raise NotImplementedError

    @property
    def phases(self) -> list[Phase]:
        """The models', then the learner's; with ``models_ckpt`` the models' are over."""
        return [*self.model_phases, *super().phases]

    @property
    def free_data_arguments(self) -> tuple[str, ...]:
        """As others', and the numbers of rows that the models learn from."""
        return (*super().free_data_arguments, "window_batch_size", "transition_batch_size")

    def configure_optimizers(self) -> list[Optimizer]:
        """The learner's, then those of the models."""
        own = super().configure_optimizers()
        return [*(own if isinstance(own, list) else [own]), *self.model_optimizers()]  # type: ignore[list-item]

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Those of the learner, who knows of no others."""
        found: list[Any] = super().optimizers(use_pl_optimizer)  # type: ignore[assignment]
        own = found[: -len(self.model_phases)]
        return own[0] if len(own) == 1 else own

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One update of the current phase's networks; returns what the learner's does."""
        phase = self.phase.name
        if phase != "policy":
            models: list[Any] = super().optimizers()[-len(self.model_phases) :]  # type: ignore[index]
            index = [p.name for p in self.model_phases].index(phase)
            self.model_step(phase, models[index], batch)
            return None
        mixed, self._real = self.mix(batch)
        outputs = super().training_step(mixed, batch_idx)  # type: ignore[misc]
        if self.reporting and self._real is not None and hasattr(self, "critic"):
            self._compare(mixed, self._real)
        return outputs

    def recorded_steps(self, steps: Tensor) -> Tensor:
        """Steps of the batch's real rows."""
        return steps if self._real is None else steps[self._real.to(steps.device)]

    def diagnose(self, batch: Any) -> dict[str, float]:
        """The learner's diagnosis, of its own batches."""
        return super().diagnose(batch) if self.phase.name == "policy" else {}

    # ---------------------------------------------------------------- mixed batches

    def mix(self, batch: PolicyBatch) -> tuple[PolicyBatch, Tensor | None]:
        """Replace the share of a batch that is not real.

        Args:
            batch: Real transitions.

        Returns:
            The batch with synthetic rows, and ``(B,)`` bool which rows are real; the batch as it is, and None, as long
            as the buffer holds less than a batch needs.
        """
        place = self.draws.place
        rows = len(batch.obs) * place.world_size
        count = int(rows * self.real_ratio)
        if count == rows or len(self.buffer) < rows - count:
            return batch, None
        real = (torch.arange(rows, device=batch.obs.device) < count)[place.share(rows)]
        drawn = self.buffer.transitions(self.draws.randint(0, len(self.buffer), batch.obs), batch.discount)
        mixed = [torch.where(real.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(batch, drawn)]
        return PolicyBatch(*mixed), real

    @torch.no_grad()
    def _compare(self, batch: PolicyBatch, real: Tensor) -> None:
        """Values and absolute errors of the critics on real and on synthetic rows, where there are any."""
        q = self.critic(batch.obs, batch.action).mean(0)
        next_value = self.least_q(batch.next_obs, self.propose(batch.next_obs), target=True)
        error = (q - td_target(batch.reward, batch.done, batch.discount, next_value)).abs()
        sides = {"real": real.float(), "synthetic": 1 - real.float()}
        for name, weight in sides.items():
            # Of several processes one may have no row of a kind; so means are of sums.
            count = self.mean_of_all(weight)
            if float(count):
                self.report({f"q/{name}": self.mean_of_all(q * weight) / count})
                self.report({f"td_error/{name}": self.mean_of_all(error * weight) / count})

    # ---------------------------------------------------------------- synthesis

    @property
    def needed(self) -> int:
        """Synthetic rows of a batch, over all processes."""
        rows = self.data.batch_size * self.trainer.world_size
        return rows - int(rows * self.real_ratio)

    def on_fit_start(self) -> None:
        """Refuse rows that the processes could not share evenly, and too few; take the models that are lent."""
        super().on_fit_start()
        (name, count), world = self.drawn_for_all, self.trainer.world_size
        if count % world:
            raise ConfigError(f"model.{name} {count} cannot be shared by {world} processes; give a multiple of {world}")
        if self.buffer.capacity < self.needed:
            raise ConfigError(
                f"the learner's batches take {self.needed} synthetic transitions (data.batch_size, model.real_ratio), "
                f"but model.{self.kept_option} keeps {self.buffer.capacity}, so none would ever be used; keep more"
            )
        self.buffer.to(self.device)  # a checkpoint is taken up before the Trainer moves the networks
        if self.models_ckpt is not None and self.trainer.ckpt_path is None:
            self.load_models(self.models_ckpt)

    def on_train_epoch_start(self) -> None:
        """Refresh the synthetic transitions where it is time to; nothing of the policy changes."""
        super().on_train_epoch_start()
        epoch = self.policy_epoch
        if epoch < 0 or self.real_ratio == 1 or not self.synthesizes(epoch):
            return
        begun, world = time.perf_counter(), self.trainer.world_size
        # Noise of its own, beside the updates'.
        place = Place(self.current_epoch, AFTER_UPDATES, self.global_rank, world)
        self.draws.begin(place, self.device)
        self.data.to(self.device)
        training = self.training
        self.eval()
        # Nearly all of the cost is calls of the denoiser, made in the precision of the updates.
        with torch.no_grad(), constant_weights(self.trainer):
            logs = self.synthesize()
        self.train(training)
        if len(self.buffer) < self.needed:
            rank_zero_warn(
                f"{len(self.buffer)} synthetic transitions, fewer than the {self.needed} of a batch: batches stay real "
                "until there are more; give more starts, steps or a larger share kept"
            )
        logs |= {"time/synthesis_s": time.perf_counter() - begun}
        self.log_now({**logs, "synthetic/rows": float(len(self.buffer)), "synthetic/age": self.buffer.age(epoch)})

    def log_now(self, values: Mapping[str, float]) -> None:
        """Draw points of curves at once, at the updates done so far.

        An epoch's averages, which ``log`` would keep until its end, are lost when the run stops within it.
        """
        for logger in self.loggers:
            logger.log_metrics(dict(values), step=self.trainer.fit_loop.epoch_loop._batches_that_stepped)

    def chunks(self, count: int, chunk: int) -> list[Tensor]:
        """Split rows that are drawn for all processes into parts; of each, one entry for every own row."""
        world = self.draws.place.world_size
        whole = torch.empty(count // world, device=self.device, dtype=self.dtype)  # type: ignore[arg-type]
        return list(whole.split(max(1, chunk // world)))

    def gathered(self, own: Tensor) -> Tensor:
        """Rows of all processes, in the order in which one process would have drawn them."""
        if self.trainer.world_size == 1:
            return own
        found: Tensor = self.all_gather(own)  # type: ignore[assignment]
        return found.flatten(0, 1)

    def sample(
        self,
        denoise: DenoiseLevel,
        noise: Tensor,
        project: Project | None = None,
        start: tuple[Tensor, int] | None = None,
        edm: EDM | None = None,
    ) -> Tensor:
        """Denoise by the sampler that the options name; arguments as :func:`~lit_diffrl.diffusion.edm.sample_heun`."""
        o = self.edm_sampler
        common: dict[str, Any] = {"steps": o.steps, "project": project, "start": start}
        if o.solver == "multistep":
            return sample_edm_multistep(denoise, noise, edm or self.edm, **common)
        return sample_heun(
            denoise,
            noise,
            edm or self.edm,
            **common,
            churn=self.churn,
            recondition_after_churn=o.recondition_after_churn,
            heun=o.solver == "heun",
            randn=self.draws.randn_like,
        )

    # ---------------------------------------------------------------- building, checkpoints

    def build_buffer(self, spec: DatasetSpec, capacity: int) -> None:
        """An empty buffer, which takes memory from its first rows on."""
        self.buffer = ReplayBuffer(spec.obs_dim, spec.action_dim, capacity)

    def setup(self, stage: str) -> None:
        """Build the networks, and refuse a data module without what the models learn from."""
        if not isinstance(self.trainer.datamodule, TrajectoryData):  # type: ignore[attr-defined]
            kind = type(self.trainer.datamodule).__name__  # type: ignore[attr-defined]
            raise ConfigError(f"{type(self).__name__} needs --data TrajectoryData, got {kind}")
        super().setup(stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the synthetic transitions too: they come from policies that are no more."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[SYNTHETIC] = self.buffer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up where training goes on; acting needs none."""
        super().on_load_checkpoint(checkpoint)
        self._refuse_other_levels(checkpoint["hyper_parameters"])
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.buffer.load_state_dict(checkpoint[SYNTHETIC], self.dtype)  # type: ignore[arg-type]

    # ---------------------------------------------------------------- diagnosis

    @property
    def predictors(self) -> dict[str, Predict]:
        """Models of trajectories by name, for comparison with the simulator; none where there are none.

        ``(first states (n, obs), actions (n, H, action)) -> states (n, H, obs)``, all in raw units.
        """
        return {}

    def seeded(self, predict: Predict) -> Predict:
        """A prediction whose noise depends on the epoch alone, made on the networks' device and in their precision."""

        @torch.no_grad()
        def call(first: Tensor, actions: Tensor) -> Tensor:
            self.draws.begin(Place(self.current_epoch, AFTER_UPDATES + 1), self.device)
            return predict(self.to_own(first), self.to_own(actions)).float()

        return call
