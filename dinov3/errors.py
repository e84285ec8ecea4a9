"""Error messages: one sentence that says what came, what was expected, what to try.

Every mistake a person can make raises a `DinoError` or one of its few children; the command line prints the message
without a traceback. Our own certainties are asserts, not these.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/@'\"]*@)?([^\s?#'\"]*)(?:[?#][^\s'\")]*)?")


def without_secrets(text: str) -> str:
    """The text with the URLs in it cut to scheme, host and path: a query may be a signature, `user:password@` is one."""
    return _URL.sub(r"\1\2", text) if "://" in text else text


def printable(text: str, *, lines: bool = False) -> str:
    """The text with control and invisible characters escaped (`\\x1b`, `\\n`): file names may hold them, and a terminal would
    obey. `lines`: line breaks and tabs stay, for text that has them on purpose."""
    if text.isprintable():
        return text
    stays = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in stays else c.encode("unicode_escape").decode() for c in text)


class DinoError(Exception):
    """Base of every error that is the message: `str(error)` is meant to be read by a person, and shows no secrets and no
    control characters but line breaks."""

    lines = True

    def __init__(self, *parts: object) -> None:
        shown = (printable(without_secrets(p), lines=self.lines) if isinstance(p, str) else p for p in parts)
        super().__init__(*shown)


class UnknownName(DinoError):
    """A name (model, option, column, …) that does not exist; the message suggests the nearest ones."""


class WeightsError(DinoError):
    """A weights file that cannot be found, opened, trusted or identified."""


class WeightsMismatch(WeightsError):
    """A readable weights file that does not fit the requested model."""


class UnsafeFile(WeightsError):
    """A pickle that would have to run code to be read; never opened."""


class ImageError(DinoError):
    """One image that cannot be decoded; `str(error)` is the reason in a job's `failed` list, one line.

    `features.embed` sets `path` and `index`, the file and its position in the list.
    """

    lines = False
    path: str | None = None
    index: int | None = None


class TooLarge(ImageError):
    """An image of more bytes or pixels than are read."""


class IncompatibleFeatures(DinoError):
    """Features that differ in model, layer, norm or preprocessing and so must not be compared or joined."""


class StoreError(DinoError):
    """An embedding store that is missing, locked, or holds something else than what is being added."""


class MissingExtra(DinoError):
    """An optional dependency is not installed."""


def did_you_mean(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """`"; did you mean 'a' or 'b'?"` for the names nearest to `name`, or an empty string if none is near."""
    lowered = {k.lower(): k for k in known}
    near = [lowered[m] for m in difflib.get_close_matches(name.lower(), lowered, n=most, cutoff=0.6)]
    return "; did you mean " + " or ".join(repr(n) for n in near) + "?" if near else ""


def choices_sentence(value: object, choices: Iterable[object]) -> str:
    """`"is one of a, b, c, not 'x'; did you mean …?"`, the end of a sentence that begins with what the value is for."""
    known = [str(choice) for choice in choices if choice is not None]
    return f"is one of {', '.join(known)}, not {value!r:.100}{did_you_mean(str(value)[:100], known)}"


def one_of(what: str, value: T, choices: Iterable[T]) -> T:
    """The value, if it is among the choices. Raises `UnknownName`, which names them and the nearest ones."""
    choices = tuple(choices)
    if value not in choices:
        raise UnknownName(f"{what} {choices_sentence(value, choices)}")
    return value


def only_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises `UnknownName` for the first given name that is not known. what: `"a detector has no option"`."""
    known = list(known)
    for name in given:
        if name not in known:
            listed = f" (there are {', '.join(known)})" if 0 < len(known) <= 30 else ""
            raise UnknownName(f"{what} {name!r:.100}{did_you_mean(name[:100], known)}{listed}")


def install(extra: str) -> str:
    """The command that installs an extra: from the checkout if the package runs in one, else from the index."""
    checkout = Path(__file__).parents[1]
    if not (checkout / "pyproject.toml").is_file():
        return f"pip install 'dinov3[{extra}]'"
    return f"pip install -e '{'.' if checkout == Path.cwd() else checkout}[{extra}]'"


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For large imports at the start of a command: they make a million objects, and looking for garbage among them takes a
    tenth of their time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional module, or raise `MissingExtra` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise  # the module is there, something inside it is broken: that is another story
        raise MissingExtra(f"{purpose} needs {error.name}; install it with: {install(extra)}") from None
