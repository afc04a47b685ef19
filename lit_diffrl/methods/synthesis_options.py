"""Groups of typed arguments of data synthesis: the command line's ``--model.<group>.<field>``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_diffrl.errors import ConfigError, check_choice, check_each, check_range


@dataclass(frozen=True)
class EDMSamplerOptions:
    """How trajectories or transitions are denoised; may differ from run to run of one checkpoint.

    Args:
        steps: Noise levels N.
        solver: ``heun`` (2 N - 1 network calls, with churn), ``euler`` (N calls, with churn) or ``multistep``, a
            second-order solver without churn (N calls).
        recondition_after_churn: Write the conditions into the sample after churn too, as in training; DyDiff's code
            does not, which matters with its ``scale_conditions`` alone.
    """

    steps: int = 34
    solver: Literal["heun", "euler", "multistep"] = "heun"
    recondition_after_churn: bool = True

    def __post_init__(self) -> None:
        check_range("edm_sampler.steps", self.steps, 2)
        check_choice("edm_sampler.solver", self.solver, ("heun", "euler", "multistep"))


@dataclass(frozen=True)
class TrajectoryDenoiserOptions:
    """DyDiff's trajectory model: a temporal U-Net, and how it is trained.

    Args:
        members: Trajectory models, of which each rollout has one. Each learns from its share of every batch, so that
            ``data.window_batch_size`` should be so many times as large. Which rollout has which follows its place in
            the process's rows, so another number of processes deals them out otherwise.
        dim: Base width; DyDiff's 128.
        mults: Widths of its levels in units of ``dim``; DyDiff's 1, 4, 8.
        kernel: Odd size of the convolutions.
        scale_conditions: Scale first state and actions with the noisy entries (DyDiff's code); otherwise the network
            sees them at full size at every noise level.
        loss: Learn the ``states`` after the first, which are what is sampled, or ``all`` entries (DyDiff's code).
        measure_sigma_data: Take the measured deviation of the windows for ``edm.sigma_data``.
        lr: Learning rate of Adam; for ``ramp`` the one that is reached after 10,000,000 windows.
        lr_decay: ``none``, ``cosine`` to 0 over the phase, or ``ramp``: linear growth (DyDiff's code).
        half_life: Windows in which the average of the weights forgets half.
        half_life_ramp: Its greatest value as a share of the windows seen.
        grad_clip: Largest norm of the gradient; null for no limit.
    """

    members: int = 1
    dim: int = 64
    mults: tuple[int, ...] = (1, 2, 4)
    kernel: int = 5
    scale_conditions: bool = False
    loss: Literal["states", "all"] = "states"
    measure_sigma_data: bool = False
    lr: float = 3e-4
    lr_decay: Literal["none", "cosine", "ramp"] = "cosine"
    half_life: float = 500_000
    half_life_ramp: float = 0.05
    grad_clip: float | None = 1.0

    def __post_init__(self) -> None:
        check_range("denoiser.members", self.members, 1)
        check_range("denoiser.dim", self.dim, 8)
        check_each("denoiser.mults", self.mults, 1)
        check_range("denoiser.kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ConfigError(f"denoiser.kernel must be odd, got {self.kernel}; use {self.kernel + 1}")
        check_choice("denoiser.loss", self.loss, ("states", "all"))
        check_range("denoiser.lr", self.lr, 0, low_open=True, high_open=True)
        check_choice("denoiser.lr_decay", self.lr_decay, ("none", "cosine", "ramp"))
        check_range("denoiser.half_life", self.half_life, 0, low_open=True)
        check_range("denoiser.half_life_ramp", self.half_life_ramp, 0, low_open=True)
        if self.grad_clip is not None:
            check_range("denoiser.grad_clip", self.grad_clip, 0, low_open=True, high_open=True)


@dataclass(frozen=True)
class TransitionDenoiserOptions:
    """SynthER's transition model: a residual perceptron, and how it is trained.

    Args:
        width: Width of the residual blocks; 1024 or 2048 by dataset.
        depth: Residual blocks.
        embed: Width in which data and noise level are added.
        scale: Of the rows but for their end: ``gaussian``, mean 0 and deviation 1, or ``limits``, from -1 to 1 over the
            data, within which samples are kept then.
        lr: Learning rate of AdamW, which falls to 0 over the phase as a cosine.
        ema_decay: Share of the old average that an averaging keeps.
        ema_every: Updates between two averagings.
        grad_clip: Largest norm of the gradient; null for no limit.
    """

    width: int = 1024
    depth: int = 6
    embed: int = 128
    scale: Literal["gaussian", "limits"] = "gaussian"
    lr: float = 3e-4
    ema_decay: float = 0.995
    ema_every: int = 10
    grad_clip: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("width", "depth", "embed", "ema_every"):
            check_range(f"denoiser.{name}", getattr(self, name), 1)
        check_choice("denoiser.scale", self.scale, ("gaussian", "limits"))
        check_range("denoiser.ema_decay", self.ema_decay, 0, 1, high_open=True)
        check_range("denoiser.lr", self.lr, 0, low_open=True, high_open=True)
        if self.grad_clip is not None:
            check_range("denoiser.grad_clip", self.grad_clip, 0, low_open=True, high_open=True)


@dataclass(frozen=True)
class RolloutOptions:
    """DyDiff's rollouts: where they start, how they are corrected, which are kept, and for how long.

    Args:
        starts: Start states of a refresh, over all processes.
        every_n_epochs: Epochs of the learner between refreshes.
        warmup_epochs: Epochs of the learner before the first: an untrained policy's rollouts are poor data.
        start_states: Drawn uniformly from the states of all ``transitions``, of ``non_terminal`` ones, or from the
            ``initial`` states of episodes.
        length: Transitions kept of a rollout; null for all, one less than the windows have steps. The last state or
            two lie at the edge of the U-Net, where its error is several times as large; 98 of windows of 100 leaves the
            last out.
        corrections: Rounds M in which the trajectory model predicts the states anew; 0 leaves the single-step model's.
        damping: Share beta of the new states in a round: 0.5 (DyDiff's code), 1 (its paper).
        emit: ``policy``: the last states and the policy's actions there; ``dynamics``: the trajectory model's last
            sample and the actions that it was given.
        sample_policy: Draw actions from a Gaussian policy, instead of its mean; diffusion policies always draw.
        sample_model: Draw single steps from the model's Gaussian, instead of its mean.
        elite: Which member of the ensemble makes a single step: one drawn for every ``step`` of every rollout, one for
            each whole ``rollout``, or the ``mixture`` of all elites, by its mean and variance.
        warm_start: Noise level, by its index, to which rounds after the first noise the trajectory model's last sample,
            instead of beginning with noise alone; null for none.
        chunk: Start states denoised at once, over all processes.
        filter: Keep trajectories of high predicted return: the best (``hardmax``), by a ``softmax``, or all (``none``).
        keep: Share of the trajectories kept.
        temperature: Of the softmax; 1 with ``floor`` 0 is a plain one.
        floor: Probability that every trajectory shares alike with the others.
        z_score: Standardise returns before the softmax.
        returns: Sum predicted rewards until a predicted termination (``until_done``), or over ``all`` steps (DyDiff's
            code).
        capacity: Synthetic transitions kept, the newest; for the memory see
            :mod:`~lit_diffrl.data.replay_buffer`.
        keep_refreshes: Keep those of so many refreshes only; null for as many as fit.
    """

    starts: int = 2048
    every_n_epochs: int = 1
    warmup_epochs: int = 0
    start_states: Literal["transitions", "non_terminal", "initial"] = "transitions"
    length: int | None = None
    corrections: int = 2
    damping: float = 0.5
    emit: Literal["policy", "dynamics"] = "policy"
    sample_policy: bool = False
    sample_model: bool = False
    elite: Literal["step", "rollout", "mixture"] = "step"
    warm_start: int | None = None
    chunk: int = 256
    filter: Literal["softmax", "hardmax", "none"] = "softmax"
    keep: float = 0.6
    temperature: float = 0.05
    floor: float = 1e-6
    z_score: bool = True
    returns: Literal["until_done", "all"] = "until_done"
    capacity: int = 2_000_000
    keep_refreshes: int | None = None

    def __post_init__(self) -> None:
        for name in ("starts", "every_n_epochs", "chunk", "capacity"):
            check_range(f"rollouts.{name}", getattr(self, name), 1)
        for name in ("warmup_epochs", "corrections"):
            check_range(f"rollouts.{name}", getattr(self, name), 0)
        check_choice("rollouts.start_states", self.start_states, ("transitions", "non_terminal", "initial"))
        check_choice("rollouts.emit", self.emit, ("policy", "dynamics"))
        check_choice("rollouts.elite", self.elite, ("step", "rollout", "mixture"))
        check_choice("rollouts.filter", self.filter, ("softmax", "hardmax", "none"))
        check_choice("rollouts.returns", self.returns, ("until_done", "all"))
        check_range("rollouts.damping", self.damping, 0, 1, low_open=True)
        check_range("rollouts.keep", self.keep, 0, 1, low_open=True)
        check_range("rollouts.temperature", self.temperature, 0, low_open=True, high_open=True)
        check_range("rollouts.floor", self.floor, 0, 1, high_open=True)
        for name in ("length", "warm_start", "keep_refreshes"):
            if getattr(self, name) is not None:
                check_range(f"rollouts.{name}", getattr(self, name), 1)
        if self.filter == "softmax" and int(self.keep * self.starts) == 0:
            raise ConfigError(
                f"rollouts.keep {self.keep} of rollouts.starts {self.starts} are no trajectory at all; raise either"
            )
        if self.emit == "dynamics" and self.corrections == 0:
            raise ConfigError("rollouts.emit 'dynamics' is the trajectory model's sample: give rollouts.corrections")


@dataclass(frozen=True)
class SampleOptions:
    """SynthER's synthetic transitions, drawn once, before the learner's first epoch.

    Args:
        count: How many; for the memory see :mod:`~lit_diffrl.data.replay_buffer`.
        chunk: How many are denoised at once, over all processes.
        clip_actions: Keep actions within [-1, 1], where the environment's are; SynthER does not.
        clip_to_data: Keep all entries within the data's limits.
    """

    count: int = 5_000_000
    chunk: int = 10_000
    clip_actions: bool = True
    clip_to_data: bool = False

    def __post_init__(self) -> None:
        check_range("samples.count", self.count, 1)
        check_range("samples.chunk", self.chunk, 1)
