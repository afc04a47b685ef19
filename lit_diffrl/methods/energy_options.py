"""Groups of typed arguments of the energy-guided policies: the command line's ``--model.<group>.<field>``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lit_diffrl.errors import ConfigError, check_choice, check_range


@dataclass(frozen=True)
class SolverOptions:
    """How the probability-flow ODE is solved; may differ from run to run of one checkpoint.

    Fifteen calls do not reproduce a Gaussian of deviation 0.5 exactly: the defaults, QGPO's, make 0.444 of it,
    ``multistep`` on the ``logsnr`` grid 0.511, ``multistep`` on the ``time_uniform`` grid 0.650.

    Args:
        steps: Network calls.
        order: 1 (which is DDIM) or 2.
        method: ``singlestep`` makes each step from calls within it, ``multistep`` from those of the step before.
        grid: Times evenly spaced in ``time_uniform`` t or in ``logsnr``.
        predict: Polynomials in the predicted ``data`` (DPM-Solver++) or ``noise`` (DPM-Solver).
        lower_order_final: Make the last step of ``multistep`` of order 1.
        t_end: Time at which the solution ends.
        final_denoise: Take the predicted clean action at ``t_end``, one call more.
    """

    steps: int = 15
    order: int = 2
    method: Literal["singlestep", "multistep"] = "singlestep"
    grid: Literal["time_uniform", "logsnr"] = "time_uniform"
    predict: Literal["data", "noise"] = "data"
    lower_order_final: bool = False
    t_end: float = 1e-3
    final_denoise: bool = False

    def __post_init__(self) -> None:
        check_range("sampler.steps", self.steps, 1)
        check_range("sampler.order", self.order, 1, 2)
        check_choice("sampler.method", self.method, ("singlestep", "multistep"))
        check_choice("sampler.grid", self.grid, ("time_uniform", "logsnr"))
        check_choice("sampler.predict", self.predict, ("data", "noise"))
        check_range("sampler.t_end", self.t_end, 0, 1, low_open=True, high_open=True)


@dataclass(frozen=True)
class SolverChanges:
    """What is different about the solver when acting; null is as in the method's ``sampler``.

    Args:
        steps: Network calls.
        order: 1 or 2.
        method: ``singlestep`` or ``multistep``.
        grid: ``time_uniform`` or ``logsnr``.
        predict: ``data`` or ``noise``.
        lower_order_final: Make the last step of ``multistep`` of order 1.
        t_end: Time at which the solution ends.
        final_denoise: One call more at the end.
    """

    steps: int | None = None
    order: int | None = None
    method: Literal["singlestep", "multistep"] | None = None
    grid: Literal["time_uniform", "logsnr"] | None = None
    predict: Literal["data", "noise"] | None = None
    lower_order_final: bool | None = None
    t_end: float | None = None
    final_denoise: bool | None = None

    def __post_init__(self) -> None:
        self.of(SolverOptions())  # which refuses what no sampler takes

    def of(self, solver: SolverOptions) -> SolverOptions:
        """The solver with these changes."""
        return replace(solver, **{name: value for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True)
class BehaviourOptions:
    """The behaviour model and how it learns.

    Args:
        width: Width of its widest layers; the others are a half and a quarter of it.
        lr: Learning rate of Adam.
        batches: Batches of the data module that make one of the behaviour model: 16 times 256 is QGPO's 4096.
        grad_clip: Largest norm of the gradient; null for no limit.
        predict: What its network predicts, and is at a loss for in squares: ``eps``, as published, ``x0``, or ``v``
            (``alpha_t eps - sigma_t a``). From the last two the mean of the clean action follows without the factor
            ``sigma_t / alpha_t`` on errors, which ``x0`` has, turned round, on the noise at small times.
    """

    width: int = 512
    lr: float = 1e-4
    batches: int = 16
    grad_clip: float | None = None
    predict: Literal["eps", "x0", "v"] = "eps"

    def __post_init__(self) -> None:
        check_range("behaviour.width", self.width, 4)
        if self.width % 4:
            raise ConfigError(f"behaviour.width must be a multiple of 4, got {self.width}")
        check_range("behaviour.lr", self.lr, 0, low_open=True, high_open=True)
        check_range("behaviour.batches", self.batches, 1)
        if self.grad_clip is not None:
            check_range("behaviour.grad_clip", self.grad_clip, 0, low_open=True, high_open=True)
        check_choice("behaviour.predict", self.predict, ("eps", "x0", "v"))


@dataclass(frozen=True)
class EnergyOptions:
    """The energy network and how it learns.

    Args:
        hidden: Width of its layers.
        layers: Hidden layers: QGPO has 4, AEPO 3.
        activation: ``silu`` or ``mish``; with ``relu`` the guidance jumps.
        lr: Learning rate of Adam.
        grad_clip: Largest norm of the gradient; null for no limit.
        scaled_input: Show the network ``alpha_t a_t`` in place of ``a_t``. Its guidance then fades with ``alpha_t``
            towards noise, as the exact one does, also where it has learnt nothing of use.
    """

    hidden: int = 256
    layers: int = 4
    activation: Literal["silu", "mish", "relu"] = "silu"
    lr: float = 3e-4
    grad_clip: float | None = None
    scaled_input: bool = False

    def __post_init__(self) -> None:
        check_range("energy.hidden", self.hidden, 1)
        check_range("energy.layers", self.layers, 1)
        check_choice("energy.activation", self.activation, ("silu", "mish", "relu"))
        check_range("energy.lr", self.lr, 0, low_open=True, high_open=True)
        if self.grad_clip is not None:
            check_range("energy.grad_clip", self.grad_clip, 0, low_open=True, high_open=True)


@dataclass(frozen=True)
class SupportOptions:
    """Actions of the behaviour model, drawn once for every state of the data.

    They take ``4 x states x actions x action_dim`` bytes of memory (192 MB for a million states, 16 actions of 3
    entries), and are drawn again, the same, by a run that goes on.

    Args:
        actions: Actions in each state: 16, or 32 on AntMaze.
        beta_q: Inverse temperature of the softmax over their values in the critics' target; 0 for their mean.
        shared: Where the state after a transition is that of the next one, it has the same actions. False draws others
            for it, as QGPO's code does, in twice the time and memory.
    """

    actions: int = 16
    beta_q: float = 1.0
    shared: bool = True

    def __post_init__(self) -> None:
        check_range("support.actions", self.actions, 2)
        check_range("support.beta_q", self.beta_q, 0, high_open=True)


@dataclass(frozen=True)
class PosteriorOptions:
    """What is known of the clean action given the noisy one: its mean and its variance by time.

    Args:
        kind: Posterior 1 (Eq. 22, the paper's) or 2 (Eq. 24, which takes no ``variance`` estimator). Calibrated means
            make both alike; as in the paper they differ with ``mean`` eps and ``variance`` raw.
        variance: Estimator of Posterior 1: ``raw`` Eq. 22, ``paired`` with the noise's own norm beside the
            prediction's, ``nll`` Eq. 43, ``mixed`` raw below t = 0.2 and nll above.
        mean: Posterior mean: ``calibrated`` shrinks Eq. 18 to the data's mean where the network's error would be
            amplified, ``eps`` is Eq. 18, ``sample`` the data's action, whose regression limit is the mean.
        clip: Keep Eq. 18 within the box of actions.
        clamp: Keep the variance within [0, variance of the data's actions].
        isotonic: Smooth the variance to one that does not fall with time; it has to be clamped, or its errors at late
            times would reach all others.
        grid: Times of the table.
        samples: Noised actions at each of them.
        decay: Of the table's averages where it is tracked during training (``schedule`` joint).
    """

    kind: Literal[1, 2] = 1
    variance: Literal["mixed", "raw", "paired", "nll"] = "mixed"
    mean: Literal["calibrated", "eps", "sample"] = "calibrated"
    clip: bool = True
    clamp: bool = True
    isotonic: bool = True
    grid: int = 64
    samples: int = 65_536
    decay: float = 0.999

    def __post_init__(self) -> None:
        check_choice("posterior.kind", str(self.kind), ("1", "2"))
        check_choice("posterior.variance", self.variance, ("mixed", "raw", "paired", "nll"))
        check_choice("posterior.mean", self.mean, ("calibrated", "eps", "sample"))
        check_range("posterior.grid", self.grid, 2)
        check_range("posterior.samples", self.samples, 2)
        check_range("posterior.decay", self.decay, 0, 1, high_open=True)


@dataclass(frozen=True)
class TargetOptions:
    """What the energy network of AEPO regresses on.

    Args:
        form: ``aepo`` Eq. 25; ``two_cumulant``: ``beta Q(a) + beta^2 var(t) |grad Q(a)|^2 / 2`` at the data's
            action, which needs no posterior mean; or ``support``: ``log sum_i w_i exp(beta Q(a_i))`` over the state's
            support actions, w_i the softmax of ``log N(a_t; alpha a_i, sigma^2 I)``, which expands nothing, exact with
            many of them.
        a_bar: Where Q is expanded: ``data_grad_step`` Eq. 46, ``data`` the data's action, ``posterior_mean``, or
            ``fixed``, the mean action of the data.
        grad_at: Where ``data_grad_step`` takes Q's gradient: at the data's action ``a0`` (the paper's reuse) or at
            ``a_bar``, as all others do.
        eta: Step of Eq. 46.
        eta_normalized: Make a step of that length, whatever the gradient's norm.
        q_reduce: ``min`` or ``mean`` of the critics; the mean's gradient does not jump between them.
        use_target: Ask the critics' targets rather than the critics.
        covariance: Of the posterior. ``isotropic`` is a variance by time alone (Eq. 25). ``batch`` takes the mean of
            Eq. 22 over the update's own rows, whatever their times, which is one reading of the paper's appendix, and
            clamps what that makes of it. The others are of every noisy action, from the noise's derivative: ``jvp``
            the variance along Q's gradient, by one product with it; ``trace`` the mean over directions, by one with
            random signs; ``exact_trace`` the same, by one in every direction; ``full`` the whole matrix, by as many.
        curvature: ``none`` (Eq. 25), ``hvp`` one second derivative along Q's gradient, ``full`` all of them, exact for
            quadratic Q and a posterior that is isotropic, or with ``covariance`` full any Gaussian. They are nothing
            for critics with ``relu``.
        baseline: Subtract ``beta V(s)``, which leaves the guidance as it is; ``q_training`` isql learns no V.
        scale: What the target is divided by and the guidance multiplied by; ``auto`` measures its deviation when the
            energy's phase begins. A run that goes on keeps its own.
        loss: ``mse``, or ``huber`` of width 1 in units of ``scale``, which then decides how far errors are squared.
        weight: Of the loss over time: ``uniform``, or ``alpha2``, the squared factor of the signal.
    """

    form: Literal["aepo", "two_cumulant", "support"] = "aepo"
    a_bar: Literal["data_grad_step", "data", "posterior_mean", "fixed"] = "data_grad_step"
    grad_at: Literal["a0", "a_bar"] = "a0"
    eta: float = 1e-3
    eta_normalized: bool = False
    q_reduce: Literal["min", "mean"] = "min"
    use_target: bool = True
    covariance: Literal["isotropic", "batch", "jvp", "trace", "exact_trace", "full"] = "isotropic"
    curvature: Literal["none", "hvp", "full"] = "none"
    baseline: bool = True
    scale: float | Literal["auto"] = "auto"
    loss: Literal["mse", "huber"] = "huber"
    weight: Literal["uniform", "alpha2"] = "uniform"

    def __post_init__(self) -> None:
        choices = {
            "form": ("aepo", "two_cumulant", "support"),
            "a_bar": ("data_grad_step", "data", "posterior_mean", "fixed"),
            "grad_at": ("a0", "a_bar"),
            "q_reduce": ("min", "mean"),
            "covariance": ("isotropic", "batch", "jvp", "trace", "exact_trace", "full"),
            "curvature": ("none", "hvp", "full"),
            "loss": ("mse", "huber"),
            "weight": ("uniform", "alpha2"),
        }
        for name, accepted in choices.items():
            check_choice(f"target.{name}", getattr(self, name), accepted)
        check_range("target.eta", self.eta, 0, high_open=True)
        if isinstance(self.scale, str):
            check_choice("target.scale", self.scale, ("auto",))
        else:
            check_range("target.scale", self.scale, 0, low_open=True, high_open=True)
        self._check()

    def _check(self) -> None:
        """Refuse options that exclude each other."""
        if self.curvature == "full" and self.covariance == "jvp":
            raise ConfigError(
                "model.target.covariance 'jvp' is the covariance along Q's gradient alone, but target.curvature 'full' "
                "needs all directions; use full, isotropic or a trace, or curvature hvp"
            )
        if self.covariance == "full" and self.curvature != "full":
            raise ConfigError(
                f"model.target.covariance 'full' is for curvature 'full', got {self.curvature!r}: in Q's gradient "
                "alone covariance 'jvp' says as much"
            )
        if self.form == "aepo":
            return
        if self.curvature != "none":
            raise ConfigError(
                f"model.target.form {self.form!r} has no second derivatives; got target.curvature {self.curvature!r}"
            )
        if self.a_bar in ("posterior_mean", "fixed"):
            where = "the data's action" if self.form == "two_cumulant" else "support actions"
            raise ConfigError(
                f"model.target.form {self.form!r} asks Q at {where}; got target.a_bar {self.a_bar!r}, which is for "
                "form 'aepo'; use that, or a_bar 'data'"
            )
        if self.form == "support" and self.covariance != "isotropic":
            raise ConfigError(
                f"model.target.form 'support' needs no covariance, got {self.covariance!r}; leave it isotropic"
            )
