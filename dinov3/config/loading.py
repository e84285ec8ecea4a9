"""Any dataclass of dataclasses from YAML files and dotted overrides: strict, and every mistake reported at once.

Bounds of single fields are in their metadata (`bounds`). Hooks of the class, all optional: `problems()` gives (key,
sentence) for each condition between fields that does not hold, `remarks()` what is worth a note, `implied(written)` defaults
that follow from what was written; RETIRED are keys that are accepted and ignored, SUPERSEDED keys that a section replaces.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import fnmatch
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from dinov3.config.bounds import Problem, alternatives, literals, violations
from dinov3.errors import DinoError, did_you_mean, require, without_secrets
from dinov3.files import atomically

T = TypeVar("T")
ANY = object()  # in RETIRED: whatever its value, it never did anything

RECIPES = Path(__file__).parents[1] / "configs"
TRAINING, EVALUATIONS = RECIPES / "train", RECIPES / "eval"  # a recipe may be named without its folder


def find_file(file: str | os.PathLike[str], *, base_dir: Path | None = None) -> Path:
    """A configuration's path: as given, in `base_dir`, or among the shipped recipes."""
    path = Path(file)
    name = path.as_posix()
    within = re.split("configs/(?:train/|eval/)?", name)[-1]  # also the reference's folders
    shipped = (TRAINING, EVALUATIONS)
    for candidate in (path, *((base_dir / path,) if base_dir else ()), *(folder / within for folder in shipped)):
        if candidate.is_file():
            return candidate
    recipes = sorted(p.relative_to(folder).as_posix() for folder in shipped for p in folder.rglob("*.yaml"))
    hint = did_you_mean(within, recipes) or f"; shipped recipes: {', '.join(recipes)}"
    raise DinoError(f"no configuration file {name}{hint}" if name else f"a configuration file is needed{hint}")


def load(
    cls: type[T],
    file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    overrides: Sequence[str] = (),
    *,
    check: Callable[[T], Iterable[Problem]] | None = None,
) -> tuple[T, list[str]]:
    """Any dataclass of dataclasses from YAML file(s) and dotted overrides; see the top of this file for its hooks.

    check: conditions between fields; default: the class's own `problems()`. Raises one `DinoError` with every mistake.
    """
    files = [] if file is None else [file] if isinstance(file, (str, os.PathLike)) else list(file)
    loader = _Loader(cls)
    sources = [(name, tree) for f in files for name, tree in loader.read(f)]
    sources += [("command line", tree) for text in overrides for tree in loader.parse(text)]
    loader.preset(sources)
    for name, tree in sources:
        loader.merge(tree, name)
    return loader.finish(check)


class _Loader:
    """Collects values, where each came from, and every error; only this class and `dump` use OmegaConf."""

    def __init__(self, cls: type[Any]) -> None:
        self.omega = require("omegaconf", "train", "reading configurations").OmegaConf
        self.cls = cls
        self.values = self.omega.structured(cls)
        self.thaw()
        self.keys = list(keys_of(cls))
        self.retired: Mapping[str, tuple[Any, str]] = getattr(cls, "RETIRED", {})
        self.origin: dict[str, str] = {}
        self.wrong: dict[str, str] = {}  # key → the message
        self.typed: dict[str, str] = {}  # key → the value's text on the command line
        self.notes: list[str] = []

    def thaw(self) -> None:
        """OmegaConf makes the section of a frozen dataclass read-only."""
        sections = [self.values]
        for section in sections:
            self.omega.set_readonly(section, None)
            known = [section[k] for k in section if not self.omega.is_missing(section, k)]
            sections += filter(self.omega.is_dict, known)

    def reject(self, key: str, source: str, sentence: str) -> None:
        self.wrong.setdefault(key, f"{key} ({source}): {sentence}")

    # -- sources

    def read(self, file: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        path = find_file(file)
        try:
            tree = self.omega.to_container(self.omega.load(path), resolve=False)
        except Exception as error:  # YAML's own errors know line and column
            raise DinoError(f"{path} is not YAML that can be read: {error}") from None
        if not isinstance(tree, dict):
            raise DinoError(f"{path} must hold sections with keys, not a {type(tree).__name__}")
        yield path.name, tree

    def parse(self, text: str) -> Iterator[dict[str, Any]]:
        key, equals, typed = text.partition("=")
        if text.startswith("-"):
            self.reject(text, "command line", "is an option, not key=value; it belongs before the first key=value")
        elif not equals or not key.strip():
            hint = did_you_mean(key, self.keys)
            self.reject(text, "command line", f"is not of the form key.sub=value{hint}")
        else:
            self.typed[key] = typed
            try:
                yield self.omega.to_container(self.omega.from_cli([text]), resolve=False)
            except Exception:  # not YAML: then it is text, which only a key for text will take
                tree: Any = typed
                for part in reversed(key.split(".")):
                    tree = {part: tree}
                yield tree

    def preset(self, sources: list[tuple[str, dict[str, Any]]]) -> None:
        """Defaults that what was written implies, before anything of it is merged."""
        written = {key: value for _, tree in sources for key, value, _ in _leaves(tree, self.cls)}
        for key, value in self.cls.implied(written).items() if hasattr(self.cls, "implied") else ():
            self.set(key, value)

    # -- merging

    def merge(self, tree: Mapping[Any, Any], source: str) -> None:
        for key, value, hint in _leaves(tree, self.cls):
            if hint is None:
                self.unknown(key, value, source)
                continue
            section = _section(hint)
            if section is not None and value is None:
                if type(None) in typing.get_args(hint):
                    self.set(key, None)
                continue  # an empty section in a file sets nothing
            if section is not None:
                self.reject(key, source, f"is a section with keys of its own, not {value!r}")
                continue
            if isinstance(value, (dict, list)) and hint in (str, str | None):
                value = self.typed.get(key, value) if source == "command line" else value  # text that parses as YAML
            before = self.omega.select(self.values, key) if key in self.origin else None
            try:
                self.set(key, _member(_floats(value, hint), hint))
            except Exception as error:
                first = str(error).splitlines()[0]
                hint_text = did_you_mean(str(value), map(str, literals(hint)))
                nested = first if "Key '" in first else f"expected {_type_name(hint)}, not {value!r}{hint_text}"
                self.reject(key, source, nested)
                continue
            if self.origin.get(key) not in (None, source, "command line") and source != "command line":
                after = self.omega.select(self.values, key)
                if before != after:
                    self.notes.append(f"{key}: {source} sets {after!r} and wins over {self.origin[key]} ({before!r})")
            self.origin[key] = source
            self.wrong.pop(key, None)

    def set(self, key: str, value: Any) -> None:
        parts, hints = key.split("."), typing.get_type_hints(self.cls)
        for i in range(1, len(parts)):  # an optional section comes into being with its first key
            section = _section(hints[parts[i - 1]])
            here = ".".join(parts[:i])
            if self.omega.select(self.values, here) is None:
                self.omega.update(self.values, here, self.omega.structured(section), merge=False)
            hints = typing.get_type_hints(section)
        self.omega.update(self.values, key, value, merge=True)

    def unknown(self, key: str, value: Any, source: str) -> None:
        for pattern, (neutral, why) in self.retired.items():
            if fnmatch.fnmatchcase(key, pattern):
                if neutral is ANY or value is None or value in (neutral if isinstance(neutral, tuple) else (neutral,)):
                    self.notes.append(f"{key} ({source}): ignored, {why}")
                else:
                    self.reject(key, source, f"{value!r} has no effect, only {neutral!r} is accepted: {why}")
                return
        last = key.rsplit(".", 1)[-1]
        elsewhere = [k for k in self.keys if k.rsplit(".", 1)[-1] == last]
        hint = "; did you mean " + " or ".join(repr(k) for k in elsewhere[:3]) + "?" if elsewhere else ""
        self.reject(key, source, f"unknown key{hint or did_you_mean(key, self.keys) or self.beside(key)}")

    def beside(self, key: str) -> str:
        """The keys of the section that `key` is in, or of the top where there is no such section."""
        section = key.rpartition(".")[0] + "."
        inside = [k.removeprefix(section) for k in self.keys if k.startswith(section)]
        names = dict.fromkeys(k.split(".")[0] for k in inside or self.keys)
        return f" (there are {', '.join(names)})" if 0 < len(names) <= 30 else ""

    # -- the end

    def finish(self, check: Callable[[Any], Iterable[Problem]] | None) -> Any:
        try:
            self.omega.to_container(self.values, resolve=True)
        except Exception as error:  # an interpolation ${…} that leads nowhere
            raise DinoError(report([*self.wrong.values(), " ".join(str(error).split())])) from None
        missing = sorted(self.omega.missing_keys(self.values))
        for key in missing:
            known = [self.origin[k] for k in self.origin if k.startswith(key.rsplit(".", 2)[0])]
            self.reject(key, known[-1] if known else "not set", "must be given")
            with contextlib.suppress(Exception):  # a stand-in, so that the conditions below are still checked
                self.set(key, 0.5)
        lines = list(self.wrong.values())
        instance = None
        if not self.omega.missing_keys(self.values):
            self.superseded()
            lines = list(self.wrong.values())
            instance = self.omega.to_object(self.values)
            found = list(violations(instance))
            try:
                found += check(instance) if check is not None else getattr(instance, "problems", tuple)()
            except Exception:
                if not found:  # conditions between fields may stumble over one that is out of its bounds
                    raise
            for key, sentence in found:
                if not any(known == key or known.startswith(f"{key}.") for known in self.wrong):
                    lines.append(f"{key} ({self.origin.get(key, 'default')}): {sentence}")
            if hasattr(instance, "remarks"):
                self.notes += instance.remarks()
        if lines:
            raise DinoError(report(lines))
        return instance, self.notes

    def superseded(self) -> None:
        """Keys that a section replaces do nothing beside it: from a file that is a note, typed by hand it is a mistake."""
        section, replacements = getattr(self.cls, "SUPERSEDED", ("", {}))
        if not section or self.omega.select(self.values, section) is None:
            return
        for key, replacement in replacements.items():
            if self.omega.select(self.values, key) is None:
                continue
            if self.origin.get(key) == "command line":
                self.reject(key, "command line", f"has no effect beside {section}; set {replacement}")
            elif key in self.origin:
                self.notes.append(f"{key} ({self.origin[key]}): ignored, the {section} section is used")
            self.set(key, None)


def report(lines: list[str]) -> str:
    count = "a mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    return "\n  ".join([f"{count} in the configuration:", *lines])


def _section(hint: Any) -> type[Any] | None:
    """The dataclass behind `Section` or `Section | None`."""
    return next((o for o in alternatives(hint) if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def _hints(cls: type[Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    return {name: hint for name, hint in typing.get_type_hints(cls).items() if name in names}


def keys_of(cls: type[Any], prefix: str = "") -> Iterator[str]:
    """The keys of a configuration, `section.name`."""
    for name, hint in _hints(cls).items():
        section = _section(hint)
        if section is None:
            yield prefix + name
        else:
            yield from keys_of(section, f"{prefix}{name}.")


def _leaves(tree: Mapping[Any, Any], cls: type[Any] | None, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value, type hint) of every value; the hint is None where the dataclasses have no such key."""
    hints = _hints(cls) if cls is not None else {}
    for name, value in tree.items():
        key, hint = f"{prefix}{name}", hints.get(str(name))
        section = None if hint is None else _section(hint)
        if isinstance(value, dict) and value and (section is not None or hint is None):
            yield from _leaves(value, section, f"{key}.")
        elif not (isinstance(value, dict) and not value and section is not None):
            yield key, value, hint


def _floats(value: Any, hint: Any) -> Any:
    """Whole numbers as floats where a union takes floats: OmegaConf converts them elsewhere, but not in unions."""
    options = alternatives(hint)
    if isinstance(value, bool) or int in options:
        return value
    if isinstance(value, int) and float in options:
        return float(value)
    if isinstance(value, list) and list[float] in options:
        return [float(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in value]
    return value


def _member(value: Any, hint: Any) -> Any:
    """A choice whatever its capitals, an enum's member by its name or its value: `SGD`, `sgd`, `FLOAT32`, `float32`."""
    if isinstance(value, (list, tuple)) and typing.get_origin(hint) in (list, tuple):
        inner = typing.get_args(hint)
        return [_member(v, inner[0]) for v in value] if inner else value
    if not isinstance(value, str):
        return value
    options = alternatives(hint)
    for option in options:
        if isinstance(option, type) and issubclass(option, enum.Enum):
            for member in option:
                if value.lower() in (member.name.lower(), str(member.value).lower()):
                    return member
        if typing.get_origin(option) is Literal and value not in typing.get_args(option):
            same = [o for o in typing.get_args(option) if isinstance(o, str) and o.lower() == value.lower()]
            return same[0] if len(same) == 1 else value
    return value


def _type_name(hint: Any) -> str:
    """A type hint as text."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if len(options := alternatives(hint)) > 1:
        return " or ".join([_type_name(o) for o in options if o is not type(None)] + ["null"] * (type(None) in options))
    if origin is Literal:
        return " or ".join(repr(a) for a in args)
    if origin is list:
        return f"a list of {_type_name(args[0]).removeprefix('a ')}s"
    if origin is tuple:
        return f"a list of {len(args)}, each {_type_name(args[0])}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(str(m.value) for m in hint)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def dump(config: Any, path: str | os.PathLike[str]) -> None:
    """Writes a configuration with every value resolved, atomically. `load` reads it back equal, but for secrets in URLs."""
    omega = require("omegaconf", "train", "writing configurations").OmegaConf
    with atomically(path) as temporary:
        text = omega.to_yaml(omega.structured(config), resolve=True)
        temporary.write_text(without_secrets(text), encoding="utf-8")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain dicts, lists and numbers."""
    return dataclasses.asdict(config)
