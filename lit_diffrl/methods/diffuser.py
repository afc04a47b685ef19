"""Diffuser: planning as denoising of whole trajectories.

Paper: Janner, Du, Tenenbaum and Levine, "Planning with Diffusion for Flexible Behavior Synthesis", ICML 2022 (its
second version, whose settings the released code has).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from lit_diffrl.data.spec import DatasetSpec
from lit_diffrl.data.windows import WindowBatch
from lit_diffrl.diffusion.schedules import Schedule
from lit_diffrl.errors import ConfigError, check_choice, check_each, check_range
from lit_diffrl.methods.base import Phase, as_options
from lit_diffrl.methods.options import EMAOptions, GuideOptions, PlanOptions, SamplerOptions, WorldModelOptions
from lit_diffrl.methods.planner import Conditions, Planner, impose
from lit_diffrl.nets.ema import EMA
from lit_diffrl.nets.unet import TemporalUNet, ValueUNet


@lru_cache(maxsize=64)
def loss_weights(
    horizon: int,
    action_dim: int,
    obs_dim: int,
    action_weight: float,
    discount: float,
    device: torch.device | None = None,
) -> Tensor:
    """Weights ``(H, action + obs)`` of the squared error: ``discount^t`` on row t, but on the first action its own.

    The discounts are divided by their mean; the first action's weight is set, not multiplied.
    """
    rows = discount ** torch.arange(horizon, dtype=torch.float32, device=device)
    weights = (rows / rows.mean())[:, None].repeat(1, action_dim + obs_dim)
    weights[0, :action_dim] = action_weight
    return weights


class Diffuser(Planner):
    """Trajectory diffusion with guidance by a return regressor (locomotion) or a goal by inpainting (mazes).

    Training (section 3.1): noise a window to a random diffusion step, predict the clean window, mean squared error;
    known states are written into input and prediction. Planning (Algorithm 1): denoise from noise under the same
    conditions, shifted along the gradient of the return regressor.

    Departures, each an argument: ``sampler`` (DDIM, DPM-Solver++ and fewer steps), ``guide.at`` (the paper's place of
    the gradient, not only the code's), ``horizon`` as a list with ``plan.rank_by: model`` (plans of several lengths
    compared by a reward and a transition model), data of stride > 1, and a candidate's rank computed on the final plan
    rather than on the input of the last denoising step.

    Logs: ``loss/diffusion`` falls quickly, then slowly, and never to 0; ``loss/value`` (raw return units, squared)
    falls below the variance of the data's returns; ``loss/dynamics`` and ``loss/reward`` fall while the world model is
    fitted, ``val/dynamics_mse`` is its held-out error (1 is a constant prediction; each member keeps its least);
    ``grad_norm/diffusion`` is of order 0.1 to 1 and calm; ``phase`` counts the phases from 0.

    Args:
        horizon: Rows of a plan; a list trains one network for several lengths. Must equal ``data.horizon``.
        goal_conditioned: Write the last row's state into the plan too: mazes.
        n_diffusion_steps: Diffusion steps K.
        schedule: Noise schedule: ``cosine`` (paper), ``linear`` or ``vp``.
        predict: Network output: the clean window ``x0`` or the noise ``eps``.
        dim: Base width of the temporal U-Net.
        dim_mults: Widths of its levels in units of ``dim``; each level but the last halves the plan.
        attention: Linear attention in each level (the released halfcheetah models).
        action_weight: Weight of the first action's error.
        loss_discount: Weight ``discount^t`` of row t's error, 1 for none.
        clip_denoised: Clamp clean predictions to [-1, 1]; for data normalised by its limits.
        lr: Learning rate of Adam.
        lr_decay: ``none`` or ``cosine`` to 0 over the phase.
        grad_clip: Largest gradient norm; null for no clipping.
        diffusion_epochs: Epochs of the diffusion phase.
        value_epochs: Epochs of the return regressor's phase; 0 when nothing uses it.
        world_model_epochs: Epochs of the world model's phase; 0 when nothing uses it.
        ema: Averaging of the weights that plan.
        sampler: How plans are denoised.
        guide: What pulls them.
        plan: How they become actions.
        world_model: Sizes and training of the reward and transition models.
    """

    guide_kinds: tuple[str, ...] = ("none", "value")
    fixed_arguments = ("n_diffusion_steps", "schedule", "predict", "goal_conditioned")

    def __init__(
        self,
        horizon: int | list[int] = 128,
        goal_conditioned: bool = False,
        n_diffusion_steps: int = 20,
        schedule: Literal["cosine", "linear", "vp"] = "cosine",
        predict: Literal["x0", "eps"] = "x0",
        dim: int = 32,
        dim_mults: list[int] = [1, 2, 4, 8],  # noqa: B006 (the command line wants a plain default; never mutated)
        attention: bool = False,
        action_weight: float = 10.0,
        loss_discount: float = 1.0,
        clip_denoised: bool = False,
        lr: float = 2e-4,
        lr_decay: Literal["none", "cosine"] = "none",
        grad_clip: float | None = None,
        diffusion_epochs: int = 1000,
        value_epochs: int = 0,
        world_model_epochs: int = 0,
        ema: EMAOptions = EMAOptions(),
        sampler: SamplerOptions = SamplerOptions(),
        guide: GuideOptions = GuideOptions(),
        plan: PlanOptions = PlanOptions(),
        world_model: WorldModelOptions = WorldModelOptions(),
    ) -> None:
        super().__init__()
        self.horizons = [horizon] if isinstance(horizon, int) else list(horizon)
        check_each("model.horizon", self.horizons, 2)
        check_each("model.dim_mults", dim_mults, 1)
        check_choice("model.predict", predict, ("x0", "eps"))
        check_choice("model.lr_decay", lr_decay, ("none", "cosine"))
        check_range("model.n_diffusion_steps", n_diffusion_steps, 1)
        check_range("model.dim", dim, 8)
        check_range("model.action_weight", action_weight, 0)
        check_range("model.loss_discount", loss_discount, 0, 1, low_open=True)
        check_range("model.lr", lr, 0, low_open=True)
        check_range("model.diffusion_epochs", diffusion_epochs, 1)
        check_range("model.value_epochs", value_epochs, 0)
        check_range("model.world_model_epochs", world_model_epochs, 0)
        if grad_clip is not None:
            check_range("model.grad_clip", grad_clip, 0, low_open=True)
        self.save_hyperparameters(logger=False)
        self.goal_conditioned, self.predict, self.clip_denoised = goal_conditioned, predict, clip_denoised
        self.action_weight, self.loss_discount = action_weight, loss_discount
        self.dim, self.dim_mults, self.attention = dim, tuple(dim_mults), attention
        self.lr, self.lr_decay, self.grad_clip = lr, lr_decay, grad_clip
        self.epochs = {"world_model": world_model_epochs, "value": value_epochs, "diffusion": diffusion_epochs}
        self.ema_options = as_options(EMAOptions(), ema)
        self.sampler = as_options(SamplerOptions(), sampler)
        self.guide = as_options(GuideOptions(), guide)
        self.plan_options = as_options(PlanOptions(), plan)
        self.world_model_options = as_options(WorldModelOptions(), world_model)
        self.schedule = Schedule(schedule, n_diffusion_steps)
        if self.sampler.steps is not None:
            check_range("model.sampler.steps", self.sampler.steps, 1, n_diffusion_steps)
        self._check_phases()
        self._check_planning()

    def _check_planning(self) -> None:
        options, horizons = self.plan_options, self.plan_options.horizons or self.horizons
        if self.guide.kind not in self.guide_kinds:
            raise ConfigError(
                f"guide.kind {self.guide.kind!r} is not one of {type(self).__name__}'s: {', '.join(self.guide_kinds)}"
            )
        if len(horizons) > 1 and options.rank_by not in ("model", "arrival"):
            raise ConfigError(
                f"plans of different lengths {horizons} are compared by plan.rank_by 'model' or 'arrival', got "
                f"{options.rank_by!r}; choose one of these, or a single length by --model.plan.horizons"
            )
        if options.rank_by == "arrival" and not self.goal_conditioned:
            raise ConfigError(
                "plan.rank_by 'arrival' needs plans to a goal: set model.goal_conditioned, or use 'model'"
            )
        replans = options.mode == "receding" or options.replan_every is not None
        if self.goal_conditioned and replans and len(horizons) == 1:
            raise ConfigError(
                f"replanning to a goal with the single horizon {horizons[0]} keeps it that many rows away for ever; "
                "plan once (plan.mode waypoints, plan.replan_every null) or train several horizons"
            )

    def _check_phases(self) -> None:
        for name, used in (("value", self.uses_value), ("world_model", self.uses_world_model)):
            if used != (self.epochs[name] > 0):
                state = "uses" if used else "does not use"
                raise ConfigError(
                    f"model.{name}_epochs is {self.epochs[name]}, but this configuration {state} its {name} "
                    "(guide.kind, plan.rank_by and the losses decide); " + ("give it epochs" if used else "set it to 0")
                )
        if self.uses_value and {*self.horizons, *(self.plan_options.horizons or [])} != {self.horizons[0]}:
            raise ConfigError(
                f"the return regressor serves one horizon, model.horizon is {self.horizons} and plan.horizons "
                f"{self.plan_options.horizons}; give a single one"
            )

    @property
    def uses_value(self) -> bool:
        """Whether guidance or ranking needs the return regressor."""
        return self.guide.kind == "value" or self.plan_options.rank_by == "value"

    @property
    def uses_world_model(self) -> bool:
        """Whether guidance, ranking or a loss needs the reward and transition models."""
        return self.guide.kind == "dual" or self.plan_options.rank_by in ("model", "arrival")

    @property
    def free_data_arguments(self) -> tuple[str, ...]:
        """What decides neither which windows there are, nor what the networks in use are to predict of them."""
        value = () if self.uses_value else ("discount", "termination_penalty")
        world_model = ("transition_batch_size",) if self.uses_world_model else ("transition_batch_size", "holdout")
        return (*super().free_data_arguments, *value, *world_model)

    @property
    def phases(self) -> list[Phase]:
        """World model, return regressor, diffusion model."""
        members = self.world_model_options.members
        return [
            Phase("world_model", self.epochs["world_model"], "transitions", members),
            Phase("value", self.epochs["value"]),
            Phase("diffusion", self.epochs["diffusion"]),
        ]

    @property
    def can_act(self) -> bool:
        """Whether the diffusion model has been trained."""
        return self.spec is not None and int(self.ema.count) >= self.ema.every

    # ---------------------------------------------------------------- networks

    def build(self, spec: DatasetSpec) -> None:
        """Temporal U-Net and its average; return regressor and world model where they are used."""
        super().build(spec)
        width = spec.action_dim + spec.obs_dim
        sizes: dict[str, Any] = {"dim": self.dim, "mults": self.dim_mults}
        average = (self.ema_options.decay, self.ema_options.every, self.ema_options.start)
        self.net = TemporalUNet(width, attention=self.attention, **sizes)
        self.ema = EMA(self.net, *average)
        if self.uses_value:
            self.value = ValueUNet(width, self.horizons[0], **sizes)
            self.value_ema = EMA(self.value, *average)
        if self.uses_world_model:
            self.build_world_model(spec)
            self.register_buffer("likelihood_floor", torch.zeros(()))

    def setup(self, stage: str) -> None:
        """Build the networks and check that the data's windows are those that plans are made of."""
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and data.horizons != self.horizons:
            raise ConfigError(
                f"model.horizon {self.horizons} and data.horizon {data.horizons} must be equal; set data.horizon and "
                "let the model follow: horizon: ${data.init_args.horizon}"
            )
        if self.goal_conditioned and data.hparams["use_padding"]:
            raise ConfigError(
                "model.goal_conditioned takes a window's last row for its goal, but data.use_padding puts padding "
                "there; set data.use_padding false"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse other options than those that feasible plans were measured by (see :class:`Method`)."""
        super().on_load_checkpoint(checkpoint)
        if not self.uses_world_model or self.plan_options.rank_quantile is None:
            return
        arguments = checkpoint["hyper_parameters"]
        plan = as_options(PlanOptions(), arguments.get("plan", {}))
        world_model = as_options(WorldModelOptions(), arguments.get("world_model", {}))
        for name, now, saved in (
            ("plan.rank_quantile", self.plan_options.rank_quantile, plan.rank_quantile),
            ("world_model.variance_floor", self.world_model_options.variance_floor, world_model.variance_floor),
        ):
            if now != saved:
                raise ConfigError(
                    f"{name} is {now}, but the checkpoint's world model was calibrated with {saved}; use that, "
                    "plan.rank_quantile null, or train again"
                )

    def configure_optimizers(self) -> list[Optimizer]:
        """Adam for each network, in the order of the phases."""
        optimizers: list[Optimizer] = []
        if self.uses_world_model:
            o = self.world_model_options
            parameters = self.world_model.parameters()
            optimizers.append(torch.optim.AdamW(parameters, lr=o.lr, weight_decay=o.weight_decay, fused=True))
        if self.uses_value:
            optimizers.append(torch.optim.Adam(self.value.parameters(), lr=self.lr, fused=True))
        optimizers.append(torch.optim.Adam(self.net.parameters(), lr=self.lr, fused=True))
        return optimizers

    def optimizer_of(self, phase: str) -> LightningOptimizer:
        """The optimizer of a phase."""
        order = [p for p, used in (("world_model", self.uses_world_model), ("value", self.uses_value)) if used]
        found = self.optimizers()
        return found[[*order, "diffusion"].index(phase)] if isinstance(found, list) else found  # type: ignore[return-value]

    # ---------------------------------------------------------------- losses

    def conditions_of(self, trajectory: Tensor) -> Conditions:
        """The states a plan is given: its first, and its last in a maze."""
        assert self.spec is not None
        obs = trajectory[..., self.spec.action_dim :]
        return {0: obs[:, 0], -1: obs[:, -1]} if self.goal_conditioned else {0: obs[:, 0]}

    def noised(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Diffusion step k uniform on 1..K, noise, and the noisy windows with their conditions."""
        assert self.spec is not None
        k = self.draws.randint(1, self.schedule.num_steps + 1, x0)
        eps = self.draws.randn_like(x0)
        x_k = self.schedule.q_sample(x0, k, eps)
        return k, eps, impose(x_k, self.conditions_of(x0), self.spec.action_dim)

    def diffusion_error(self, x0: Tensor, x0_hat: Tensor, k: Tensor) -> Tensor:
        """Weighted squared error of each window ``(B,)``, mean over its entries; known states count as exact.

        For ``eps`` the error is that of the noise, x0's divided by u_k.
        """
        assert self.spec is not None
        da = self.spec.action_dim
        error = impose(x0_hat - x0, {r: torch.zeros_like(s) for r, s in self.conditions_of(x0).items()}, da)
        if self.predict == "eps":
            error = error / self.schedule.at("u", k, error)
        weights = loss_weights(x0.shape[1], da, self.spec.obs_dim, self.action_weight, self.loss_discount, error.device)
        return (weights * error.square()).mean(dim=(1, 2))

    def diffusion_loss(self, batch: WindowBatch) -> dict[str, Tensor]:
        """The loss of the diffusion phase under the name it is logged by; ``total`` is descended."""
        x0 = batch.trajectory
        k, _, x_k = self.noised(x0)
        error = self.diffusion_error(x0, self.estimate_x0(self.net, x_k, k), k).mean()
        return {"total": error, "diffusion": error}

    def value_loss(self, batch: WindowBatch) -> Tensor:
        """Squared error of the return predicted from a noisy window (section 3.2 and appendix)."""
        k, _, x_k = self.noised(batch.trajectory)
        return (self.value(x_k, k - 1) - batch.value).square().mean()

    # ---------------------------------------------------------------- training

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One gradient update of the current phase's network."""
        phase = self.phase.name
        optimizer = self.optimizer_of(phase)
        self._anneal(optimizer, phase)
        optimizer.zero_grad()

        if phase == "world_model":
            losses = self.world_model_loss(batch)
        elif phase == "value":
            loss = self.value_loss(batch)
            losses = {"total": loss, "value": loss}
        else:
            losses = self.diffusion_loss(batch)

        self.manual_backward(losses["total"])
        norm = self.clip_gradients_of(optimizer, self.grad_clip)
        shown = {f"loss/{name}": loss for name, loss in losses.items()}
        norms = {f"grad_norm/{phase}": norm}
        self.guard(shown, norms, batch)
        optimizer.step()

        if phase == "value":
            self.value_ema.update(self.value)
        elif phase == "diffusion":
            self.ema.update(self.net)

        del shown["loss/total"]
        self.report(shown, prog_bar=True)
        self.report(norms)

    def _anneal(self, optimizer: LightningOptimizer, phase: str) -> None:
        """Set the cosine learning rate of this place in the phase: a pure function, so nothing needs saving."""
        if self.lr_decay == "none" or phase == "world_model":
            return
        self.set_cosine_lr(optimizer, self.lr)
