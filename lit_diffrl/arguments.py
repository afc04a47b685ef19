"""The command line as it was typed: subcommand, options, and the config files it names; nothing heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lit_diffrl.errors import ConfigError, nearest

SUBCOMMANDS = ("fit", "validate", "test", "export")
NULLS = ("null", "~")


def options(args: list[str]) -> Iterator[tuple[str, str | None]]:
    """Read ``--key value``, ``--key=value`` and ``-c value``, in order; the value is None for a bare flag."""
    i = 0
    while i < len(args):
        token, i = args[i], i + 1
        if token != "-c" and not token.startswith("--"):
            continue
        key, equals, value = token.partition("=")
        if not equals and i < len(args) and not re.match(r"--[A-Za-z]|-c$", args[i]):
            value, equals, i = args[i], "=", i + 1
        yield ("config" if key == "-c" else key[2:]), (value if equals else None)


def last_option(args: list[str], key: str) -> str | None:
    """Value of an option on the command line, the last one if repeated."""
    return next((value for k, value in reversed(list(options(args))) if k == key), None)


def nest_nulls(args: list[str], groups: Iterable[str]) -> list[str]:
    """Write ``--model.plan.replan_every null`` as ``--model.plan {"replan_every": null}``.

    jsonargparse merges the second with what is set already; of the first it makes the word "None" (4.53).

    Args:
        args: The command line.
        groups: Options whose class is chosen, ``model`` and ``data``.
    """
    found: list[str] = []
    for token in args:
        key, equals, value = token.partition("=")
        if not equals and found and token in NULLS and found[-1].startswith("--"):
            key, value = found.pop(), token
        parts = [part for part in key.removeprefix("--").split(".") if part != "init_args"]
        if key.startswith("--") and value in NULLS and parts[0] in groups and len(parts) > 2:
            for part in reversed(parts[2:]):
                value = f'{{"{part}": {value}}}'
            found.append(f"--{parts[0]}.{parts[1]}={value}")
        elif value == token:
            found += [key, token]
        else:
            found.append(token)
    return found


def check_subcommand(args: list[str]) -> None:
    """Refuse a command line that does not begin with a subcommand."""
    if args[0] not in SUBCOMMANDS:
        hint = nearest(args[0], SUBCOMMANDS)
        raise ConfigError(f"unknown command {args[0]!r}; {hint or 'use one of ' + ', '.join(SUBCOMMANDS)}")


def shipped_configs() -> Path:
    """Folder of the configs that come with the package: inside it when installed, beside it in a checkout."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def find_configs(args: list[str]) -> list[str]:
    """Replace ``--config conf/X.yaml`` by the file that ships with the package, where this folder has none of its own.

    Raises:
        ConfigError: If a config file is nowhere, is not YAML or not a mapping.
    """
    found = list(args)
    for i, token in enumerate(args):
        key, equals, path = token.partition("=")
        if key not in ("-c", "--config") or (not equals and i + 1 == len(args)):
            continue
        path = path if equals else args[i + 1]
        shipped = shipped_configs() / path.removeprefix("conf/")
        if not Path(path).expanduser().is_file() and path.startswith("conf/") and shipped.is_file():
            found[i if equals else i + 1] = f"{key}={shipped}" if equals else str(shipped)
            path = str(shipped)
        read_config(path)
    return found


def read_config(path: str) -> dict[str, Any]:
    """Read a YAML config file.

    Raises:
        ConfigError: If it is missing (with its nearest neighbours), not YAML (with the line) or not a mapping.
    """
    import yaml

    file = Path(path).expanduser()
    if not file.is_file():
        here = {str(p) for p in file.parent.glob("*.yaml")}
        ours = {f"conf/{p.relative_to(shipped_configs())}" for p in shipped_configs().glob("**/*.yaml")}
        listed = ", ".join(sorted(here) or sorted(name for name in ours if name.count("/") == 1))
        hint = nearest(str(file), here) or nearest(str(file), ours) or f"there is {listed}"
        raise ConfigError(f"config file {path} does not exist; {hint}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not a text file in UTF-8"
        raise ConfigError(f"config file {path}{place}: not valid YAML ({problem})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path} must hold `model:`, `data:`, … at its top, got {type(content).__name__}")
    return content
