"""Groups of typed arguments of the policies: the command line's ``--model.<group>.<field>``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lit_diffrl.errors import ConfigError, check_choice, check_range


@dataclass(frozen=True)
class ActionSamplerOptions:
    """How a diffusion policy draws an action; may differ from run to run of one checkpoint.

    Args:
        name: ``ddpm`` (ancestral), ``ddim`` (deterministic) or ``dpm`` (DPM-Solver in continuous time).
        steps: Network calls; null for all diffusion steps (15 for ``dpm``).
        order: Order of ``dpm``, 1 to 3.
        method: Form of ``dpm``: ``singlestep`` (EDP) or ``multistep``.
        grid: Times of ``dpm``: evenly spaced in time, ``time_uniform`` (EDP), or in the log of the signal-to-noise
            ratio, ``logsnr``.
        variant: Polynomials of ``dpm`` in a step: ``plain`` (EDP) or the ``taylor`` expansion.
        final_denoise: Have ``dpm`` return the clean action predicted at its last time, by one more call.
        variance: Of ``ddpm``'s noise: that of the ``posterior`` (the codes), or the forward step's ``beta`` (EDP's
            paper).
        clip: Keep the implied clean action within [-1, 1] at every call.
        noise_scale: Scale of the initial noise; 0 starts at its mean (EDP, section 4.5).
        eps_scale: Factor of the predicted noise, EDP's policy scaling; no true temperature.
    """

    name: Literal["ddpm", "ddim", "dpm"] = "ddpm"
    steps: int | None = None
    order: int = 3
    method: Literal["singlestep", "multistep"] = "singlestep"
    grid: Literal["time_uniform", "logsnr"] = "time_uniform"
    variant: Literal["plain", "taylor"] = "plain"
    final_denoise: bool = False
    variance: Literal["posterior", "beta"] = "posterior"
    clip: bool = True
    noise_scale: float = 1.0
    eps_scale: float = 1.0

    def __post_init__(self) -> None:
        check_choice("sampler.name", self.name, ("ddpm", "ddim", "dpm"))
        check_choice("sampler.method", self.method, ("singlestep", "multistep"))
        check_choice("sampler.grid", self.grid, ("time_uniform", "logsnr"))
        check_choice("sampler.variant", self.variant, ("plain", "taylor"))
        check_choice("sampler.variance", self.variance, ("posterior", "beta"))
        check_range("sampler.order", self.order, 1, 3)
        check_range("sampler.noise_scale", self.noise_scale, 0, high_open=True)
        check_range("sampler.eps_scale", self.eps_scale, 0, low_open=True, high_open=True)
        if self.steps is not None:
            check_range("sampler.steps", self.steps, 1)
        owners = {name: "dpm" for name in ("order", "method", "grid", "variant", "final_denoise")} | {
            "variance": "ddpm"
        }
        for name, owner in owners.items():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if self.name != owner and value != default:
                raise ConfigError(
                    f"sampler.{name} {value!r} is for sampler.name {owner!r}, but that is {self.name!r}; use {owner}, "
                    f"or leave sampler.{name} at {default!r}"
                )

    def calls(self, num_steps: int) -> int:
        """Network calls of one action, for a schedule of ``num_steps`` steps."""
        return self.steps or (15 if self.name == "dpm" else num_steps)


@dataclass(frozen=True)
class SamplerChanges:
    """What is different about the sampler when the policy acts; null is as in the method's ``sampler``.

    With another ``name``, ``steps`` and the options of ``dpm`` are that sampler's defaults unless they are given too.

    Args:
        name: See :class:`ActionSamplerOptions`, as all.
        steps: Network calls.
        order: Order of ``dpm``.
        method: Form of ``dpm``.
        grid: Times of ``dpm``.
        variant: Polynomials of ``dpm``.
        final_denoise: One more call of ``dpm``.
        variance: Of ``ddpm``'s noise.
        clip: Keep the implied clean action within [-1, 1].
        noise_scale: Scale of the initial noise.
        eps_scale: Factor of the predicted noise.
    """

    name: Literal["ddpm", "ddim", "dpm"] | None = None
    steps: int | None = None
    order: int | None = None
    method: Literal["singlestep", "multistep"] | None = None
    grid: Literal["time_uniform", "logsnr"] | None = None
    variant: Literal["plain", "taylor"] | None = None
    final_denoise: bool | None = None
    variance: Literal["posterior", "beta"] | None = None
    clip: bool | None = None
    noise_scale: float | None = None
    eps_scale: float | None = None

    def __post_init__(self) -> None:
        self.of(ActionSamplerOptions(name="ddpm" if self.variance else "dpm"))  # which refuses what no sampler takes

    def of(self, sampler: ActionSamplerOptions) -> ActionSamplerOptions:
        """The sampler of training with these changes."""
        if self.name not in (None, sampler.name):
            common = {"clip": sampler.clip, "noise_scale": sampler.noise_scale, "eps_scale": sampler.eps_scale}
            sampler = ActionSamplerOptions(**common)  # type: ignore[arg-type]
        return replace(sampler, **{name: value for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True)
class SelectionOptions:
    """Energy-based selection of an action among candidates at evaluation (EDP, section 4.5; Diffusion-QL's code).

    Logged at evaluation: ``eval/indecision``, the entropy of the choice: 1 where all candidates are as likely (values
    differ by much less than the temperature, and a choice is none) and 0 where the best is always taken.

    Args:
        candidates: Actions drawn for each state; 1 takes the policy's own.
        temperature: Of the softmax over the least of the critics; 0 takes the best.
        critic: ``online`` critics (EDP) or their ``target`` (Diffusion-QL).
    """

    candidates: int = 10
    temperature: float = 1.0
    critic: Literal["online", "target"] = "online"

    def __post_init__(self) -> None:
        check_range("selection.candidates", self.candidates, 1)
        check_range("selection.temperature", self.temperature, 0, high_open=True)
        check_choice("selection.critic", self.critic, ("online", "target"))


@dataclass(frozen=True)
class NoiseNetOptions:
    """The noise network of a diffusion policy.

    Args:
        hidden: Width of its layers.
        layers: Hidden layers.
        time_dim: Size of the diffusion step's embedding.
        embedding: Its frequencies and order: Diffusion-QL's (``dql``), EDP's (``edp``) or ``cleandiffuser``'s (whose
            ``time_dim`` is 64). It matters for weights that come from there.
        layer_norm: Normalise hidden layers.
        init: ``torch``'s initial weights, or ``lecun`` normal ones with zero biases (EDP).
    """

    hidden: int = 256
    layers: int = 3
    time_dim: int = 16
    embedding: Literal["dql", "edp", "cleandiffuser"] = "dql"
    layer_norm: bool = False
    init: Literal["torch", "lecun"] = "torch"

    def __post_init__(self) -> None:
        check_range("net.hidden", self.hidden, 1)
        check_range("net.layers", self.layers, 1)
        check_range("net.time_dim", self.time_dim, 4)
        if self.time_dim % 2:
            raise ConfigError(
                f"net.time_dim is {self.time_dim}, but half of the step's embedding are sines and half cosines: use an "
                f"even size, e.g. {self.time_dim + 1}"
            )
        check_choice("net.embedding", self.embedding, ("dql", "edp", "cleandiffuser"))
        check_choice("net.init", self.init, ("torch", "lecun"))


@dataclass(frozen=True)
class CriticOptions:
    """Twin critics and what they learn from.

    Args:
        hidden: Width of their layers.
        layers: Hidden layers.
        activation: ``mish``, ``relu`` or ``silu``.
        layer_norm: Normalise hidden layers: a stability aid the originals lack.
        first_tanh: Tanh after the first hidden layer; with ``layer_norm`` these are CleanDiffuser's critics.
        orthogonal: Orthogonal initial weights (CQL, IQL) instead of torch's, of IQL's state value too.
        lr: Learning rate of AdamW.
        weight_decay: Its decay of the weights (0 in EDP's code and all others: Adam).
        grad_clip: Largest norm of the gradient; null for no limit.
        clip_each: Clip each critic by itself (EDP) rather than both together (Diffusion-QL).
        tau: Weight of the critics in each step of their targets.
        target_every: Updates of the critics between two steps of their targets (CleanDiffuser 5; CRR 100, ``tau`` 1).
        backup_candidates: Actions at the next state over which each critic takes its best (max-Q backup); 1 for none.
        backup_top_k: Take the so-manyth best of them.
    """

    hidden: int = 256
    layers: int = 3
    activation: Literal["mish", "relu", "silu"] = "mish"
    layer_norm: bool = False
    first_tanh: bool = False
    orthogonal: bool = False
    lr: float = 3e-4
    weight_decay: float = 0.0
    grad_clip: float | None = None
    clip_each: bool = False
    tau: float = 0.005
    target_every: int = 1
    backup_candidates: int = 1
    backup_top_k: int = 1

    def __post_init__(self) -> None:
        check_range("critic.hidden", self.hidden, 1)
        check_range("critic.layers", self.layers, 1)
        check_choice("critic.activation", self.activation, ("mish", "relu", "silu"))
        check_range("critic.lr", self.lr, 0, low_open=True, high_open=True)
        check_range("critic.weight_decay", self.weight_decay, 0, high_open=True)
        check_range("critic.tau", self.tau, 0, 1, low_open=True)
        check_range("critic.target_every", self.target_every, 1)
        check_range("critic.backup_candidates", self.backup_candidates, 1)
        check_range("critic.backup_top_k", self.backup_top_k, 1, self.backup_candidates)
        if self.grad_clip is not None:
            check_range("critic.grad_clip", self.grad_clip, 0, low_open=True, high_open=True)


@dataclass(frozen=True)
class ActorOptions:
    """The network of a feed-forward policy.

    Args:
        hidden: Width of its layers.
        layers: Hidden layers.
        activation: ``relu``, ``mish`` or ``silu``.
        dropout: Share of the hidden units that are left out in training (IQL on Adroit and the kitchen: 0.1).
    """

    hidden: int = 256
    layers: int = 2
    activation: Literal["relu", "mish", "silu"] = "relu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_range("actor.hidden", self.hidden, 1)
        check_range("actor.layers", self.layers, 1)
        check_choice("actor.activation", self.activation, ("relu", "mish", "silu"))
        check_range("actor.dropout", self.dropout, 0, 1, high_open=True)
