"""SynthER: an offline learner on transitions that a diffusion model draws.

Source: Lu, Ball, Teh and Parker-Holder, "Synthetic Experience Replay", 2023, and the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.transitions import PolicyBatch
from lit_diffrl.diffusion.edm import EDM, Churn
from lit_diffrl.errors import check_range
from lit_diffrl.methods.agreement import refuse_other_arguments
from lit_diffrl.methods.base import Phase, as_options
from lit_diffrl.methods.cql import CQL
from lit_diffrl.methods.crr import CRR
from lit_diffrl.methods.dql import DiffusionQL
from lit_diffrl.methods.edp import EDPCRR, EDPIQL, EDPTD3
from lit_diffrl.methods.iql import IQL
from lit_diffrl.methods.synthesis_options import EDMSamplerOptions, SampleOptions, TransitionDenoiserOptions
from lit_diffrl.methods.synthetic_learner import Synthesis
from lit_diffrl.methods.td3bc import TD3BC
from lit_diffrl.nets.ema import EMA
from lit_diffrl.nets.residual_mlp import ResidualDenoiser

STD_OFFSET = 1e-5
ROW_LEVELS = EDM(sigma_data=1.0)
ROW_CHURN = Churn(s_churn=80.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003)
ROW_SAMPLER = EDMSamplerOptions(steps=128)


class SynthER(Synthesis):
    """Unconditional diffusion over rows (s, a, r, s', done); a learner then sees draws of it.

    1. Phase ``diffusion``: EDM's loss on standardised rows (``denoiser.scale``; ``done`` stays 0 or 1), AdamW with a
       cosine to 0.
    2. Before the first update of phase ``policy``: ``samples.count`` rows are drawn, ``done`` being a sampled value
       above 0.5. They are kept in checkpoints: a resumed run draws none.
    3. Phase ``policy``: the learner, on ``real_ratio`` real rows (none in the paper) and synthetic ones else.

    States are normalised, and rewards tuned, by the real data's, for both kinds of rows alike.

    Departures: ``samples.clip_actions``, since actions beyond the box never happen; the average of the weights begins
    after 100 updates without its library's slow start.

    Logged, beside the learner's: ``loss/denoiser`` (below 1 from the beginning of learning, falls slowly),
    ``grad_norm/denoiser``; once ``synthetic/done`` and ``synthetic/done_data`` (share of terminal rows, should
    agree), ``synthetic/reward_mean``, ``synthetic/outside`` (share of entries beyond the data's limits),
    ``synthetic/rows``, ``time/synthesis_s``; ``q/real``, ``q/synthetic``, ``td_error/…`` in mixed batches.

    Args:
        diffusion_epochs: Epochs in which the denoiser learns.
        denoiser: Its network and training.
        edm: Noise levels; ``sigma_data`` 1 belongs to standardised rows, 0.5 to ``denoiser.scale`` limits.
        churn: Noise added in sampling.
        edm_sampler: How rows are sampled.
        samples: How many, and what is kept within bounds.
        real_ratio: Share of real rows in the learner's batches.
        models_ckpt: Checkpoint of another run, of whatever learner, whose denoiser is used; it then learns no more.
        **kwargs: As the learner.
    """

    row_mean: Tensor
    row_std: Tensor
    row_low: Tensor
    row_high: Tensor
    default_edm = ROW_LEVELS
    models = ("denoiser", "denoiser_ema", "row_mean", "row_std", "row_low", "row_high")

    def __init__(
        self,
        diffusion_epochs: int = 100,
        denoiser: TransitionDenoiserOptions = TransitionDenoiserOptions(),
        edm: EDM = ROW_LEVELS,
        churn: Churn = ROW_CHURN,
        edm_sampler: EDMSamplerOptions = ROW_SAMPLER,
        samples: SampleOptions = SampleOptions(),
        real_ratio: float = 0.0,
        models_ckpt: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_range("model.diffusion_epochs", diffusion_epochs, 1)
        self.edm, self.churn = as_options(self.default_edm, edm), as_options(ROW_CHURN, churn)
        self.edm_sampler = as_options(ROW_SAMPLER, edm_sampler)
        self._keep_synthesis(real_ratio, models_ckpt)
        self.denoiser_options = as_options(TransitionDenoiserOptions(), denoiser)
        self.samples = as_options(SampleOptions(), samples)
        self.epochs = {"diffusion": 0 if models_ckpt else diffusion_epochs}

    @property
    def model_phases(self) -> list[Phase]:
        """The denoiser's."""
        return [Phase("diffusion", self.epochs["diffusion"], "rows")]

    @property
    def drawn_for_all(self) -> tuple[str, int]:
        """All rows."""
        return "samples.count", self.samples.count

    @property
    def kept_option(self) -> str:
        """All rows are kept."""
        return "samples.count"

    def build(self, spec: DatasetSpec) -> None:
        """The learner's networks, the denoiser and its average, and the scale of rows."""
        super().build(spec)
        o, width = self.denoiser_options, 2 * spec.obs_dim + spec.action_dim + 2
        self.denoiser = ResidualDenoiser(width, o.width, o.depth, o.embed)
        self.denoiser_ema = EMA(self.denoiser, o.ema_decay, o.ema_every, start=100)
        for name in ("row_mean", "row_std", "row_low", "row_high"):
            self.register_buffer(name, torch.zeros(width))
        self.build_buffer(spec, self.samples.count)

    def setup(self, stage: str) -> None:
        """Measure the scale of rows."""
        super().setup(stage)
        if self.models_ckpt is not None:
            return
        every = torch.arange(len(self.data.table), device=self.data.table.device)
        table = torch.cat(self.columns(self.data.transitions(every)), dim=1).double()
        low, high = torch.aminmax(table, dim=0)
        std, mean = torch.std_mean(table, dim=0, correction=0)
        if self.denoiser_options.scale == "limits":
            mean, std = (low + high) / 2, (high - low) / 2
        mean[-1], std[-1] = 0.0, 1.0 - STD_OFFSET  # done is its own scale
        found = {"row_mean": mean, "row_std": std + STD_OFFSET, "row_low": low, "row_high": high}
        for name, value in found.items():
            self.get_buffer(name).copy_(value)

    @staticmethod
    def columns(batch: PolicyBatch) -> list[Tensor]:
        """The parts of rows, each ``(B, n)``: s, a, r, s', done."""
        return [batch.obs, batch.action, batch.reward[:, None], batch.next_obs, batch.done[:, None]]

    def model_optimizers(self) -> list[Optimizer]:
        """AdamW for the denoiser."""
        return [AdamW(self.denoiser.parameters(), self.denoiser_options.lr, (0.9, 0.99), weight_decay=0.0, fused=True)]

    def model_step(self, phase: str, optimizer: LightningOptimizer, batch: PolicyBatch) -> None:
        """An update of the denoiser: noise rows to random levels and predict the clean ones."""
        o = self.denoiser_options
        self.set_cosine_lr(optimizer, o.lr)
        rows = torch.cat(self.columns(PolicyBatch(*(x[0] for x in batch))), dim=1)
        y = (rows - self.row_mean) / self.row_std
        sigma = self.edm.draw_sigma(self.draws.randn_like(y[:, 0]))
        x = y + sigma[:, None] * self.draws.randn_like(y)
        loss = self.edm.loss(self.edm.denoise(self.denoiser, x, sigma), y, sigma)
        norm = self.descend(optimizer, loss, "denoiser", batch, o.grad_clip)
        self.denoiser_ema.update(self.denoiser)
        self.report({"loss/denoiser": loss}, prog_bar=True)
        self.report({"grad_norm/denoiser": norm})

    def _refuse_other_levels(self, arguments: Mapping[str, Any]) -> None:
        super()._refuse_other_levels(arguments)
        saved = as_options(TransitionDenoiserOptions(), arguments.get("denoiser", {}))
        name, now = "denoiser.scale", self.denoiser_options.scale
        refuse_other_arguments("model", (name,), {name: saved.scale}, {name: now})

    # ---------------------------------------------------------------- sampling

    def synthesizes(self, epoch: int) -> bool:
        """Once, in the beginning."""
        return epoch == 0

    def synthesize(self) -> dict[str, float]:
        """Draw all rows."""
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        for chunk in self.chunks(self.samples.count, self.samples.chunk):
            rows = self.gathered(self.draw_rows(len(chunk)))
            outside = ((rows < self.row_low) | (rows > self.row_high))[:, :-1].double().mean(1)
            obs, action, reward, next_obs, done = self.bounded(rows).split(self.buffer.widths, dim=1)
            self.buffer.insert(obs, action, reward[:, 0], next_obs, done[:, 0] > 0.5, epoch=0)
            totals += torch.stack([(done[:, 0] > 0.5).double().sum(), reward.double().sum(), outside.sum()])
        done_mean, reward_mean, outside_mean = (totals / self.samples.count).tolist()
        data = self.data.table.split(self.data.widths, dim=1)
        return {
            "synthetic/done": done_mean,
            "synthetic/done_data": float(data[4].mean()),
            "synthetic/reward_mean": reward_mean,
            "synthetic/reward_mean_data": float(data[2].mean()),
            "synthetic/outside": outside_mean,
        }

    def draw_rows(self, count: int) -> Tensor:
        """Rows ``(count, 2 obs + action + 2)`` in the units of the learner's batches."""

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return self.edm.denoise(self.denoiser_ema.net, x, sigma)

        noise = self.draws.randn_like(self.row_mean.expand(count, -1))
        rows = self.sample(denoise, noise)
        # Standardised rows have no limits that a sample could be kept within.
        rows = rows.clamp(-1, 1) if self.denoiser_options.scale == "limits" else rows
        return rows * self.row_std + self.row_mean

    def bounded(self, rows: Tensor) -> Tensor:
        """Rows with what the options keep within bounds."""
        obs, action, reward, next_obs, done = rows.split(self.buffer.widths, dim=1)
        if self.samples.clip_actions:
            action = action.clamp(-1, 1)
        rows = torch.cat([obs, action, reward, next_obs, done], dim=1)
        return rows.clamp(self.row_low, self.row_high) if self.samples.clip_to_data else rows


class SynthERTD3BC(SynthER, TD3BC):
    """SynthER with TD3+BC."""


class SynthERCQL(SynthER, CQL):
    """SynthER with CQL."""


class SynthERCRR(SynthER, CRR):
    """SynthER with CRR."""


class SynthERIQL(SynthER, IQL):
    """SynthER with IQL."""


class SynthERDQL(SynthER, DiffusionQL):
    """SynthER with Diffusion-QL."""


class SynthEREDPTD3(SynthER, EDPTD3):
    """SynthER with EDP-TD3."""


class SynthEREDPCRR(SynthER, EDPCRR):
    """SynthER with EDP-CRR."""


class SynthEREDPIQL(SynthER, EDPIQL):
    """SynthER with EDP-IQL."""
