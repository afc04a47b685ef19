"""Groups of typed arguments that the planners share: the command line's ``--model.<group>.<field>``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_diffrl.errors import ConfigError, check_choice, check_each, check_range


@dataclass(frozen=True)
class EMAOptions:
    """Moving average of the weights that plan, or of a diffusion policy.

    Args:
        decay: Weight of the old average at each averaging.
        every: Optimizer steps between two averagings.
        start: Until this optimizer step the average is the raw weights, or, of a diffusion policy, the initial ones.
    """

    decay: float = 0.995
    every: int = 10
    start: int = 2000

    def __post_init__(self) -> None:
        check_range("ema.decay", self.decay, 0, 1, high_open=True)
        check_range("ema.every", self.every, 1)
        check_range("ema.start", self.start, 0)


@dataclass(frozen=True)
class SamplerOptions:
    """How plans are denoised; may differ from run to run of one checkpoint.

    Args:
        name: ``ddpm`` (ancestral), ``ddim`` (deterministic at eta 0) or ``dpm_solver`` (DPM-Solver++ multistep).
        steps: Network calls per plan, at most the training's diffusion steps; null for all of them.
        eta: Noise of ``ddim``: 0 none, 1 that of the ancestral sampler.
        order: Order of ``dpm_solver``, 1 or 2.
        variance: Noise of ``ddpm``: the ``posterior`` variance or ``beta`` (DMEMM leaves it open).
        final_noise: Add noise at the last ``ddpm`` step too.
        temperature: Scale of the initial noise.
    """

    name: Literal["ddpm", "ddim", "dpm_solver"] = "ddpm"
    steps: int | None = None
    eta: float = 0.0
    order: int = 2
    variance: Literal["posterior", "beta"] = "posterior"
    final_noise: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_choice("sampler.name", self.name, ("ddpm", "ddim", "dpm_solver"))
        check_choice("sampler.variance", self.variance, ("posterior", "beta"))
        if self.steps is not None:
            check_range("sampler.steps", self.steps, 1)
        check_range("sampler.eta", self.eta, 0, 1)
        check_range("sampler.order", self.order, 1, 2)
        check_range("sampler.temperature", self.temperature, 0)
        if self.eta > 0 and self.name != "ddim":
            raise ConfigError(f"sampler.eta is {self.eta}, which only 'ddim' uses; sampler.name is {self.name!r}")
        if (self.final_noise or self.variance == "beta") and self.name != "ddpm":
            raise ConfigError(
                f"sampler.variance and sampler.final_noise are for 'ddpm', but sampler.name is {self.name!r}"
            )


@dataclass(frozen=True)
class GuideOptions:
    """What pulls a plan while it denoises.

    Args:
        kind: ``none``; ``value``, Diffuser's return regressor; ``dual``, DMEMM's reward and transition models (Eq. 13).
        at: Where the gradient is taken: ``xt`` on the noisy plan before the reverse step (Diffuser's code), ``mean`` on
            the mean of the reverse step (both papers), ``x0`` on the predicted clean plan, ``x0_through`` the same with
            the gradient carried through the network to the noisy plan.
        scale: Guidance scale (DMEMM's alpha).
        scale_by_variance: Multiply the step by the variance of the reverse step.
        n_steps: Guide steps per reverse step, for ``xt`` and ``x0_through``.
        t_stopgrad: No guidance in the last so many diffusion steps.
        max_step: Cap on the shift of any entry per guide step, in normalised units; null for none.
        lambda_reward: Weight of the predicted rewards in Eq. 13 (1 in the paper); 0 where the reward model knows
            another goal than the plan.
        lambda_transition: DMEMM's lambda of Eq. 13; 0 is the ablation without transition guidance.
        next_obs_gradient: Differentiate log T(s'|s,a) with respect to s' too; false is Eq. 13 as printed.
        mixture: Use the log-density of the ensemble's mixture instead of the mean of the log-densities.
    """

    kind: Literal["none", "value", "dual"] = "none"
    at: Literal["xt", "mean", "x0", "x0_through"] = "xt"
    scale: float = 0.1
    scale_by_variance: bool = True
    n_steps: int = 1
    t_stopgrad: int = 0
    max_step: float | None = None
    lambda_reward: float = 1.0
    lambda_transition: float = 1.0
    next_obs_gradient: bool = True
    mixture: bool = False

    def __post_init__(self) -> None:
        check_choice("guide.kind", self.kind, ("none", "value", "dual"))
        check_choice("guide.at", self.at, ("xt", "mean", "x0", "x0_through"))
        check_range("guide.scale", self.scale, 0)
        check_range("guide.n_steps", self.n_steps, 1)
        check_range("guide.t_stopgrad", self.t_stopgrad, 0)
        check_range("guide.lambda_reward", self.lambda_reward, 0)
        check_range("guide.lambda_transition", self.lambda_transition, 0)
        if self.n_steps > 1 and self.at in ("mean", "x0"):
            raise ConfigError(
                f"guide.n_steps is {self.n_steps}, but at '{self.at}' there is one guide step per reverse step; "
                "use 'xt' or 'x0_through', or 1"
            )
        if self.max_step is not None:
            check_range("guide.max_step", self.max_step, 0, low_open=True)


@dataclass(frozen=True)
class PlanOptions:
    """How plans become actions.

    Args:
        mode: ``receding`` replans at every step and executes the first action of the best plan (locomotion);
            ``waypoints`` plans to the goal and tracks the planned states with the maze controller of Diffuser.
        candidates: Plans drawn per decision and horizon.
        rank_by: Which candidate wins: ``none`` the first, ``value`` the return regressor on the final plan, ``model``
            the reward and transition models: sum of predicted rewards plus ``rank_lambda`` times the plan's likelihood,
            ``arrival`` the same with the rows left after the plan's end for reward: the first to arrive, whatever the
            goal.
        horizons: Plan lengths to try, in rows; null for the training's. Several need ``model`` or ``arrival``.
        replan_every: For ``waypoints``: simulator steps between plans; null plans once per episode.
        rank_lambda: Weight of the likelihood in ``rank_by: model`` and ``arrival``.
        rank_quantile: Quantile of the held-out transitions' log-density that counts as feasible: only the shortfall of
            a planned transition below it is charged. Null charges the mean log-density of the plan itself.
        position_gain: Gain of the controller on position errors.
        velocity_gain: Gain of the controller on velocity errors.
    """

    mode: Literal["receding", "waypoints"] = "receding"
    candidates: int = 1
    rank_by: Literal["none", "value", "model", "arrival"] = "none"
    horizons: list[int] | None = None
    replan_every: int | None = None
    rank_lambda: float = 1.0
    rank_quantile: float | None = None
    position_gain: float = 1.0
    velocity_gain: float = 1.0

    def __post_init__(self) -> None:
        check_choice("plan.mode", self.mode, ("receding", "waypoints"))
        check_choice("plan.rank_by", self.rank_by, ("none", "value", "model", "arrival"))
        check_range("plan.candidates", self.candidates, 1)
        check_range("plan.rank_lambda", self.rank_lambda, 0)
        if self.replan_every is not None:
            check_range("plan.replan_every", self.replan_every, 1)
        if self.rank_quantile is not None:
            check_range("plan.rank_quantile", self.rank_quantile, 0, 1)
        if self.horizons is not None:
            check_each("plan.horizons", self.horizons, 2)
        check_range("plan.position_gain", self.position_gain, 0)
        check_range("plan.velocity_gain", self.velocity_gain, 0)
        if self.mode == "receding" and self.replan_every is not None:
            raise ConfigError(
                f"plan.replan_every is {self.replan_every}, but plan.mode 'receding' replans at every step"
            )
        if self.candidates > 1 and self.rank_by == "none":
            raise ConfigError(
                f"plan.candidates is {self.candidates} but plan.rank_by is 'none': the others would never be used; "
                "choose 'value' or 'model', or one candidate"
            )


@dataclass(frozen=True)
class WorldModelOptions:
    """Ensemble dynamics and reward model (planners' specification; DMEMM leaves sizes and training open).

    Args:
        members: Dynamics networks.
        elites: Members kept, by held-out loss.
        hidden: Width of the dynamics networks.
        layers: Hidden layers of the dynamics networks.
        reward_hidden: Width of the reward network.
        reward_layers: Hidden layers of the reward network.
        reward_activation: ``silu``, ``mish`` or ``relu`` (DyDiff's code), of the reward network.
        reward_members: Reward networks.
        reward_pessimism: Standard deviations between the reward networks that predicted rewards lie below their mean.
        variance_floor: Smallest variance, in units of the data's one-step differences: bounds the gradient.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        patience: Epochs without a better held-out loss that a member is allowed; it stops at the next.
        improvement: Relative decrease of the held-out loss that counts as better; 0 for any.
    """

    members: int = 7
    elites: int = 5
    hidden: int = 200
    layers: int = 4
    reward_hidden: int = 256
    reward_layers: int = 2
    reward_activation: Literal["silu", "mish", "relu"] = "silu"
    reward_members: int = 1
    reward_pessimism: float = 0.0
    variance_floor: float = 1e-3
    lr: float = 1e-3
    weight_decay: float = 1e-4
    patience: int = 5
    improvement: float = 0.01

    def __post_init__(self) -> None:
        check_range("world_model.improvement", self.improvement, 0, 1, high_open=True)
        check_range("world_model.members", self.members, 1)
        check_range("world_model.elites", self.elites, 1, self.members)
        for name in ("hidden", "layers", "reward_hidden", "reward_layers", "reward_members", "patience"):
            check_range(f"world_model.{name}", getattr(self, name), 1)
        check_choice("world_model.reward_activation", self.reward_activation, ("silu", "mish", "relu"))
        check_range("world_model.variance_floor", self.variance_floor, 0, low_open=True)
        check_range("world_model.lr", self.lr, 0, low_open=True)
        check_range("world_model.reward_pessimism", self.reward_pessimism, 0)
        if self.reward_pessimism > 0 and self.reward_members == 1:
            raise ConfigError("world_model.reward_pessimism needs world_model.reward_members of at least 2, got 1")
        check_range("world_model.weight_decay", self.weight_decay, 0)


@dataclass(frozen=True)
class WeightingOptions:
    """DMEMM's reward weight of a window's diffusion loss (Eq. 11).

    Args:
        mode: ``clamp`` to [floor, 1]; ``minmax`` between the least and the greatest possible sum; ``raw`` as printed;
            ``none`` weights every window by 1 (the ablation without weighting).
        floor: Least weight of ``clamp``. A negative weight would maximise the error.
        source: Rewards summed over the ``window`` or over its whole ``episode``.
        t_max: Steps that the sum is divided by: ``horizon``, ``episode`` (the environment's limit) or a number of rows.
        r_max: Largest reward of a row: ``auto`` from the data, or a number.
        predicted: Sum the reward model's predictions instead of the data's rewards.
        unit_mean: Divide the weights of a batch by their mean.
    """

    mode: Literal["clamp", "minmax", "raw", "none"] = "clamp"
    floor: float = 0.05
    source: Literal["window", "episode"] = "window"
    t_max: Literal["horizon", "episode"] | float = "horizon"
    r_max: Literal["auto"] | float = "auto"
    predicted: bool = False
    unit_mean: bool = False

    def __post_init__(self) -> None:
        check_choice("weighting.mode", self.mode, ("clamp", "minmax", "raw", "none"))
        check_choice("weighting.source", self.source, ("window", "episode"))
        check_range("weighting.floor", self.floor, 0, 1)
        for name, value, words in (("t_max", self.t_max, ("horizon", "episode")), ("r_max", self.r_max, ("auto",))):
            if not isinstance(value, str):
                check_range(f"weighting.{name}", value, 0, low_open=True)
            elif value not in words:
                raise ConfigError(f"weighting.{name} must be one of {', '.join(words)} or a number, got {value!r}")
        if self.source == "episode" and self.t_max == "horizon":
            raise ConfigError(
                "weighting.source 'episode' sums a whole episode, which weighting.t_max 'horizon' would divide by a "
                "window's length; set weighting.t_max to 'episode' or a number of rows"
            )
        if self.predicted and self.source == "episode":
            raise ConfigError("weighting.predicted sums over the window; set weighting.source to 'window'")


@dataclass(frozen=True)
class ChainOptions:
    """How the sums of the chain estimators (Eq. 8 and its repairs) are computed.

    Args:
        compute: ``exact_batched`` one call over all rows; ``checkpointed`` the same, recomputed in the backward pass;
            ``exact_two_pass`` exact with the memory of one chunk; ``two_pass_mc`` exact value, sampled gradient;
            ``monte_carlo`` both sampled.
        m: Sampled terms per window.
        chunk: Rows evaluated at once in ``checkpointed`` and the two-pass forms.
    """

    compute: Literal["exact_batched", "checkpointed", "exact_two_pass", "two_pass_mc", "monte_carlo"] = "exact_batched"
    m: int = 4
    chunk: int = 256

    def __post_init__(self) -> None:
        valid = ("exact_batched", "checkpointed", "exact_two_pass", "two_pass_mc", "monte_carlo")
        check_choice("chain.compute", self.compute, valid)
        check_range("chain.m", self.m, 1)
        check_range("chain.chunk", self.chunk, 1)
