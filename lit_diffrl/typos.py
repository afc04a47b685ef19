"""Names on the command line and in config files, checked before anything else so that a typo costs one line.

jsonargparse reports a wrong name as a page about unions of types, and takes an abbreviation for the real thing.
Here every key is followed through the parser's options, the chosen class and its groups of options; what is left
to jsonargparse are the values, and :func:`shorten` keeps the useful part of what it says about them.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lit_diffrl.arguments import options, read_config
from lit_diffrl.errors import ConfigError, nearest


def _subclasses(base: type) -> dict[str, type]:
    found: dict[str, type] = {}
    children: list[type] = base.__subclasses__()
    for cls in children:
        found[cls.__name__] = cls
        found.update(_subclasses(cls))
    return found


def find_class(group: str, name: str, base: type) -> type:
    """Resolve ``DMEMM`` or ``package.module.DMEMM``.

    Raises:
        ConfigError: If there is no such class, with the nearest known ones.
    """
    known = _subclasses(base)
    module, _, last = name.rpartition(".")
    if not module and last in known:
        return known[last]
    found: Any = None
    reason = ""
    if module:
        try:
            found = getattr(importlib.import_module(module), last, None)
        except ImportError as error:
            reason = f" ({error})"
    if isinstance(found, type) and issubclass(found, base):
        return found
    # A parent without a constructor is a shelf for its children, not a choice.
    ours = [
        n
        for n, cls in known.items()
        if not cls.__module__.startswith("lightning.") and ("__init__" in cls.__dict__ or not cls.__subclasses__())
    ]
    hint = nearest(last, ours) or f"known: {', '.join(sorted(ours))}, or a dotted path"
    kind = f"is not a {base.__name__}" if found is not None else "is not known" + reason
    raise ConfigError(f"{group} class {name!r} {kind}; {hint}")


def parameters(cls: type) -> dict[str, Any]:
    """Arguments of a class with their types; ``**kwargs`` stands for those of the parent's ``__init__``."""
    found: dict[str, Any] = {}
    for parent in cls.__mro__:
        init = parent.__dict__.get("__init__")
        if init is None:
            continue
        try:
            types = typing.get_type_hints(init)
        except (NameError, TypeError):
            types = {}
        signature = inspect.signature(init).parameters.values()
        for p in list(signature)[1:]:
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                found.setdefault(p.name, types.get(p.name, Any))
        if not any(p.kind == p.VAR_KEYWORD for p in signature):
            break
    return found


def _dataclass_in(annotation: Any) -> type | None:
    candidates = (annotation, *typing.get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


class Names:
    """The names a subcommand knows.

    Args:
        top: Option names of its parser, dotted: ``trainer.max_epochs``, ``rollout.episodes``, ``ckpt_path``.
        bases: Base class of each group whose class is chosen: ``model`` and ``data``.
    """

    def __init__(self, top: Iterable[str], bases: dict[str, type]) -> None:
        self.top = set(top)
        self.bases = bases
        self.chosen: dict[str, type] = {}
        self.notes: list[str] = []
        self._set: dict[str, dict[str, Any]] = {group: {} for group in bases}

    def check(self, args: list[str]) -> None:
        """Follow every key of the command line and its config files, in order.

        Raises:
            ConfigError: For the first key that names nothing, with the nearest names; or if no class is chosen.
        """
        for key, value in options(args):
            if value is None and key.rpartition(".")[2] not in ("help", "print_config"):
                raise ConfigError(f"--{key} needs a value")
            if key == "config":
                self._check_config(str(value))
            elif key.partition(".")[0] in self.bases:
                self._check_class_option(key, value)
            else:
                self._check_top(key.removesuffix("+"), f"--{key}")
        missing = [group for group in self.bases if group not in self.chosen]
        if missing and not any(key.rpartition(".")[2] == "help" for key, _ in options(args)) and "-h" not in args:
            raise ConfigError(
                f"nothing says which {' and '.join(missing)} to use; give --config FILE, for example conf/dmemm.yaml"
            )

    def _check_config(self, path: str) -> None:
        for group, content in read_config(path).items():
            if group not in self.bases:
                for key in _flatten({group: content}):
                    self._check_top(key, f"{path}: {key}")
                continue
            if isinstance(content, str):
                self._choose(group, content)
            elif isinstance(content, Mapping):
                if isinstance(content.get("class_path"), str):
                    self._choose(group, content["class_path"])
                unknown = [k for k in content if k not in ("class_path", "init_args", "dict_kwargs")]
                if unknown:
                    raise ConfigError(
                        f"{path}: {group}.{unknown[0]} is not accepted: a config file says `{group}: class_path:` and "
                        f"puts the options below `{group}: init_args:`"
                    )
                init_args = content.get("init_args") or {}
                for key in _flatten(init_args):
                    self._check_argument(group, key, f"{path}: {group}.init_args.{key}")
                self._set[group].update(init_args)

    def _check_class_option(self, key: str, value: str | None) -> None:
        group, _, rest = key.partition(".")
        rest = rest.removeprefix("init_args.")
        if rest in ("", "class_path"):
            if value and not value.endswith((".yaml", ".yml", ".json")) and not value.startswith("{"):
                self._choose(group, value)
        elif not rest.endswith("help") and not rest.startswith("dict_kwargs"):
            self._check_argument(group, rest.removesuffix("+"), f"--{key}")

    def explain_interpolation(self, message: str) -> str:
        """Say which ``${...}`` names nothing, from OmegaConf's report."""
        wanted = re.search(r"resolved to '\w+\.([^']+)'", message) or re.search(r"key '\.*([^']+)'", message)
        place = re.search(r"full_key: \w+\.(\S+)", message)
        if wanted is None:
            return message.splitlines()[0]
        group, _, name = wanted[1].partition(".init_args.")
        hint = nearest(name, parameters(self.chosen[group])) if group in self.chosen else ""
        hint = hint or "it is written as a full path: ${data.init_args.horizon}"
        return f"{place[1] + ': ' if place else ''}${{{wanted[1]}}} names nothing; {hint}"

    def _choose(self, group: str, name: str) -> None:
        cls = find_class(group, name, self.bases[group])
        before = self.chosen.get(group)
        if before is not None and before is not cls:
            # jsonargparse keeps what the new class accepts as well, but no interpolation, and says nothing.
            accepted = parameters(cls)
            lost = [k for k, v in self._set[group].items() if k not in accepted or "${" in str(v)]
            if lost:
                self.notes.append(f"{group} {cls.__name__} in place of {before.__name__}: dropped {', '.join(lost)}")
            self._set[group] = {k: v for k, v in self._set[group].items() if k not in lost}
        self.chosen[group] = cls

    def _check_argument(self, group: str, key: str, where: str) -> None:
        cls: type | None = self.chosen.get(group)
        if cls is None:
            raise ConfigError(
                f"{where}: no {group} class is chosen yet; give the config that says `{group}: class_path:` first, or "
                f"--{group} CLASS"
            )
        owner = cls.__name__
        for part in key.split("."):
            accepted = parameters(cls)
            if part not in accepted:
                hint = nearest(part, accepted)
                if not hint and owner != cls.__name__:
                    hint = f"accepted: {', '.join(accepted)}"
                hint = hint or f"see: python -m lit_diffrl fit --{group}.help {self.chosen[group].__name__}"
                raise ConfigError(f"{where}: {owner} has no option {part!r}; {hint}")
            inner = _dataclass_in(accepted[part])
            if inner is None:
                return
            cls, owner = inner, f"{owner}.{part}" if "." in owner else f"{self.chosen[group].__name__}.{part}"

    def _check_top(self, key: str, where: str) -> None:
        if key in self.top or key in ("help", "print_config"):
            return
        groups = {name.rpartition(".")[0] for name in self.top if not name.endswith(".help")}
        parts = key.split(".")
        above = (".".join(parts[:n]) for n in range(1, len(parts)))
        if any(name in self.top and name not in groups for name in above):
            return
        group = parts[0] if parts[0] in groups else ""
        valid = [n for n in self.top if n.rpartition(".")[0] == group] + ([] if group else list(self.bases))
        hint = nearest(key, valid) or "see: python -m lit_diffrl fit --help"
        close = difflib.get_close_matches(parts[0], [*groups, *self.bases], n=1, cutoff=0.6)
        if not group and close:
            hint = f"did you mean {'.'.join([close[0], *parts[1:]])!r}?"
        raise ConfigError(f"{where}: unknown option; {hint}")


def _plain_types(text: str) -> str:
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    text = re.sub(r"(?:\w+\.)+(\w+)", r"\1", text.replace("NoneType", "null"))
    return re.sub(r"Literal\[(.*?)\]", lambda m: "one of " + m[1].replace("'", ""), text)


def shorten(message: str, classes: Mapping[str, type]) -> str:
    """Reduce jsonargparse's report about a value to one line: the option, what is accepted, what was given.

    Args:
        message: The report.
        classes: Base class of the options that take a class, for suggestions.
    """
    # The report is a tree: the innermost "Parser key" is the option that is wrong, the outer ones lead to it.
    keys = [m for m in re.finditer(r'Parser key "([^"]+)":?', message) if m[1] != "config"]
    option = ".".join(dict.fromkeys(m[1] for m in keys))
    tail = message[keys[-1].end() :] if keys else message
    single = re.search(r"Expected (?:an? )?([^\n]*?)\.? Got value: ([^\n]*)", tail)
    union = re.search(r"Subtypes: \[(.*)\]", tail)
    given = re.search(r"Given value: ([^\n]*)", tail)
    if option and single:
        return f"{option}: expected {_plain_types(single[1])}, got {single[2]!r}"
    refused = re.search(r"(?:Option|Group|Subcommand) [^\n]*not accept[^\n]*", tail)
    if refused:
        return f"{option}: {refused[0]}" if option else refused[0]
    if option and union and given and "Problem with given class_path" not in tail:
        typed = re.search(r"Expected a dot import path string: (\S+)", tail)
        hint = nearest(typed[1], _subclasses(classes[option])) if typed and option in classes else ""
        return f"{option}: expected {_plain_types(union[1])}, got {given[1]!r}{'; ' + hint if hint else ''}"
    line = " ".join(re.split(r"- Expected a <class 'NoneType'>", tail)[0].split()).removesuffix(" -")
    line = f"{option}: {line}" if option else line
    return line if len(line) <= 300 else line[:297] + "..."
