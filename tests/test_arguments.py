"""Every argument of every method, data module, group of options and of the evaluation is checked where it is declared.

The arguments are found by their annotations, so that those of later classes are covered too: no float takes NaN or
infinity, no int -1 or 0, no word one that is not listed. What is meant to be accepted stands in ACCEPTED.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule

import lit_diffrl.data
import lit_diffrl.methods
from lit_diffrl.__main__ import main
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import Method, options
from lit_diffrl.rollout import RolloutEvaluation
from lit_diffrl.typos import parameters

NAN, INF = float("nan"), float("inf")


def exported(module: Any, base: type) -> list[type]:
    """Classes that a user may choose, without the base itself."""
    found = (getattr(module, name) for name in module.__all__)
    return [c for c in found if isinstance(c, type) and issubclass(c, base) and c is not Method]


METHODS, DATA = exported(lit_diffrl.methods, Method), exported(lit_diffrl.data, LightningDataModule)
CHOSEN: list[type] = [*METHODS, *DATA, RolloutEvaluation]  # type: ignore[list-item]
GROUPS = list(
    dict.fromkeys(
        kind
        for cls in CHOSEN
        for annotation in parameters(cls).values()
        for kind in (annotation, *typing.get_args(annotation))
        if dataclasses.is_dataclass(kind)
    )
)
CLASSES: list[type] = [*CHOSEN, *GROUPS]  # type: ignore[list-item]

# What a class needs besides the argument in question.
NEEDED: dict[str, dict[str, Any]] = {"DMEMM": {"world_model_epochs": 1}}

# Whose world model is always used.
WORLD_MODEL = ("DMEMM", "DyDiff")

# (argument, value) -> why it is right. An argument of this name means the same in every class.
ACCEPTED: dict[tuple[str, Any], str] = {
    ("value_epochs", 0): "a phase that nothing uses is left out",
    ("world_model_epochs", 0): "a phase that nothing uses is left out",
    ("energy_epochs", 0): "the behaviour model alone, or QGPO's energy beside its critics",
    ("warmup_epochs", 0): "rollouts before the first update",
    ("clone_epochs", 0): "the policy climbs the critics from the first update on",
    ("corrections", 0): "the single-step model's rollouts alone",
    ("start", 0): "the average begins at the first step",
    ("t_stopgrad", 0): "guidance acts in all steps",
    ("seed", 0): "a seed like any other",
    ("test_seed", 0): "a seed like any other",
    ("select_rank", 0): "the evaluation of least loss",
}


def wrong_values(annotation: Any) -> Iterator[Any]:
    """Values that an argument of this type should refuse."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for part in arguments:
            # A word among the alternatives has to be one that is listed, whatever the others are.
            yield from wrong_values(part)
    elif origin is typing.Literal:
        yield "nonsense"
    elif annotation is float:
        yield from (NAN, INF, -INF)
    elif annotation is int:
        yield from (-1, 0)
    elif origin in (list, tuple) and arguments[0] in (int, float):
        yield []
        yield from ([value] for value in wrong_values(arguments[0]))


CASES = [
    pytest.param(cls, name, value, id=f"{cls.__name__}-{name}-{value}")
    for cls in CLASSES
    for name, annotation in parameters(cls).items()
    for value in wrong_values(annotation)
]


def build(cls: Callable[..., Any], **arguments: Any) -> Any:
    return cls(**{**NEEDED.get(cls.__name__, {}), **arguments})


@pytest.mark.parametrize(("cls", "name", "value"), CASES)
def test_an_argument_refuses_what_makes_no_sense(cls: type, name: str, value: Any) -> None:
    if not isinstance(value, list) and (name, value) in ACCEPTED:
        return
    with pytest.raises(ConfigError) as caught:
        build(cls, **{name: value})
    message = str(caught.value)
    assert re.search(rf"\b{name}\b", message) and "\n" not in message, message
    assert re.search(r"must be (in|one of) |needs ", message), f"says what is accepted: {message}"
    assert str(value[0] if value and isinstance(value, list) else value) in message


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_listed_as_accepted_is(cls: type) -> None:
    for (name, value), reason in ACCEPTED.items():
        if name in parameters(cls) and not (name == "world_model_epochs" and cls.__name__.startswith(WORLD_MODEL)):
            build(cls, **{name: value})
            assert reason


def test_the_walk_finds_the_arguments() -> None:
    """Or it would show nothing: every argument that is neither a switch, a text nor a group has a wrong value."""
    assert {c.__name__ for c in CLASSES} >= {"DMEMM", "Diffuser", "WindowData", "RolloutEvaluation", "GuideOptions"}
    assert {c for c in vars(options).values() if dataclasses.is_dataclass(c)} <= {*GROUPS}
    without = {
        (cls.__name__, name): annotation
        for cls in CLASSES
        for name, annotation in parameters(cls).items()
        if not list(wrong_values(annotation))
        and annotation not in (bool, bool | None)
        and not {annotation, *typing.get_args(annotation)} & {*GROUPS}  # also a group or null
    }
    texts = {"dataset", "obs_keys", "env", "behaviour_ckpt", "models_ckpt"}
    switches = {"rescale"}  # one or several
    assert {name for _, name in without} <= texts | switches, without
    walked = {base for cls in CLASSES for base in cls.__mro__}  # a base's arguments are those of its subclasses
    assert all(cls in walked or not cls.__dict__.get("__init__") for cls in subclasses(Method))
    assert {name for name, _ in ACCEPTED} <= {name for cls in CLASSES for name in parameters(cls)}
    for cls in CLASSES:
        assert inspect.getdoc(cls), cls


def subclasses(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        if cls.__module__.startswith("lit_diffrl."):
            yield cls
            yield from subclasses(cls)


# ---------------------------------------------------------------- on the command line

CONFIG = ("--config", "conf/dmemm.yaml")


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a command line gets."""
    capsys.readouterr()
    assert main(["fit", *CONFIG, *args]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and not Path("tb_logs").exists(), lines
    return lines[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mazes: Path) -> Path:
    """Work in an empty folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.lr=.nan", ["model.lr", "(0, inf)", "nan"]),
        ("--model.lr=nan", ["model.lr", "float", "nan"]),
        ("--model.guide.scale=.inf", ["guide.scale", "[0, inf)", "inf"]),
        ("--model.predict=noise", ["model.predict", "x0", "eps", "noise"]),
        ("--data.batch_size=0", ["data.batch_size", "[1, inf)", "got 0"]),
        ("--rollout.episodes=-1", ["rollout.episodes", "[1, inf)", "got -1"]),
        ("--model.weighting.t_max=week", ["t_max", "horizon", "episode", "week"]),
        ("--seed_everything=-5", ["seed_everything", "[0, 4294967295]", "-5"]),
        ("--seed_everything=99999999999", ["seed_everything", "[0, 4294967295]"]),
        ("--logs=file", ["--logs file is a file"]),
    ],
)
def test_a_wrong_value_costs_one_line(
    folder: Path, option: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    line = refused(capsys, option)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("--trainer.gradient_clip_val=1.0", "--model.grad_clip"),
        ("--trainer.gradient_clip_algorithm=norm", "--model.grad_clip"),
        ("--trainer.accumulate_grad_batches=2", "--data.batch_size"),
        ("--trainer.max_steps=7", "--trainer.max_epochs"),
        ("--trainer.max_time=00:01:00:00", "timeout --signal=TERM"),
        ("--trainer.val_check_interval=0.5", "--rollout.every_n_epochs"),
        ("--trainer.val_check_interval=1", "--rollout.every_n_epochs"),
        ("--trainer.overfit_batches=1", "a small dataset"),
        ("--trainer.limit_train_batches=0", "leave it out"),
        ("--trainer.barebones=true", "--trainer.fast_dev_run"),
    ],
)
def test_what_the_trainer_would_not_do_here_is_refused_with_what_does(
    folder: Path, option: str, instead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, option)
    assert f"{option.partition('=')[0]} must" in line and instead in line


def test_the_trainers_defaults_are_not_refused(folder: Path) -> None:
    from lightning.pytorch import Trainer

    from lit_diffrl.trainer_options import INSTEAD, check_trainer_options

    defaults = {n: p.default for n, p in inspect.signature(Trainer.__init__).parameters.items()}
    check_trainer_options(defaults)
    for name, (unused, _) in INSTEAD.items():
        assert name in defaults
        for value in unused:
            check_trainer_options({**defaults, name: value})
    for name in ("limit_train_batches", "val_check_interval"):
        check_trainer_options({**defaults, name: 1.0})


def test_switches_of_the_trainer_do_what_they_say(folder: Path) -> None:
    """No curves, and a rehearsal of the evaluation: neither ends the run later."""
    small = """
        --model.world_model_epochs=1 --model.diffusion_epochs=1 --model.dim=8 --data.updates_per_epoch=3
        --data.batch_size=2 --data.transition_batch_size=2 --rollout.episodes=1 --rollout.max_steps=2
        --trainer.accelerator=cpu --trainer.log_every_n_steps=0 --trainer.num_sanity_val_steps=2
    """
    assert main(["fit", *CONFIG, *small.split()]) == 0
    assert len(list(Path("tb_logs").glob("**/last.ckpt"))) == 1
