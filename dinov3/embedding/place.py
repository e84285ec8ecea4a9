"""Where a store lies: its database, and LanceDB's errors in sentences of ours."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from dinov3.errors import StoreError, importing, only_known, require

IMAGES, FAILED, LOCK = "images", "failed", ".writer.lock"


def place_of(uri: str | os.PathLike[str]) -> tuple[str, Path | None]:
    """(uri, folder), the folder None on object storage."""
    text = os.fspath(uri)
    if text.startswith("file://"):
        text = text[len("file://") :]
    return text, (None if "://" in text else Path(text))


TOO_OLD = "made by an older dinov3: embed its images again into a new folder (`dinov3 embed SOURCE… --out NEW`)"


def refuse_damaged(uri: str, folder: Path) -> None:
    """Raises for a folder that holds a store of version 1 (another table), or a table without versions.

    Data without any version is a table that lost its manifests: LanceDB calls it absent and would write over it.

    A store whose creation was cut short has no data, for it is created empty; its remains are left to LanceDB.
    """
    table = folder / f"{IMAGES}.lance"
    if (folder / "pictures.lance").is_dir():
        raise StoreError(f"the store at {uri} has another form, {TOO_OLD}")
    if not any((table / "_versions").glob("*.manifest")) and any((table / "data").glob("*")):
        raise StoreError(
            f"the store at {uri} is damaged: it has data but no version of its table; restore it or delete it"
        )


def connect(uri: str, fresh: bool = True) -> Any:
    require("pyarrow", "search", "an embedding store")
    lancedb = _lancedb()
    with saying(f"cannot open {uri}"):
        # Fresh: looks for a newer version before each question, and so sees every commit of the writer at once.
        return lancedb.connect(uri, read_consistency_interval=timedelta(0) if fresh else None)


def _lancedb() -> Any:
    """LanceDB without the REST client of its name service: building that client's calls is half of the import, 0.5 s.

    Only the client's package module is left empty, and only during this import; its classes are imported as ever.
    """
    client = "lance_namespace_urllib3_client"
    if "lancedb" not in sys.modules and client not in sys.modules and (spec := importlib.util.find_spec(client)):
        sys.modules[client] = importlib.util.module_from_spec(spec)
        try:
            with importing(), contextlib.suppress(ImportError):  # of a version that wants more of it
                return require("lancedb", "search", "an embedding store")
        finally:
            del sys.modules[client]
        for name in [n for n in sys.modules if n.partition(".")[0] in ("lancedb", "lance_namespace", client)]:
            del sys.modules[name]
    return require("lancedb", "search", "an embedding store")


def has_table(database: Any, uri: str, name: str = IMAGES) -> bool:
    """A table is there once it has a version; LanceDB also lists a folder whose creation was cut short."""
    folder = place_of(uri)[1]
    if folder is not None:
        return any((folder / f"{name}.lance" / "_versions").glob("*.manifest"))
    with saying(f"cannot open {uri}"):
        return name in database.list_tables(limit=1000).tables


@contextlib.contextmanager
def saying(what: str, columns: Callable[[], Sequence[str]] = tuple) -> Iterator[None]:
    """LanceDB's errors, which are plain ValueErrors and RuntimeErrors of several lines, as one sentence of ours."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OSError, NotImplementedError) as error:
        unknown = re.search(r"No field named ([^\s.]+)\.", str(error))
        if unknown:
            only_known(f"{what}: there is no column", [unknown[1].strip("`\"'")], columns())
        raise StoreError(f"{what}: {first_line(error)}") from error
    except BaseException as error:
        if type(error).__name__ not in ("PanicException", "RustPanic"):  # for some damaged files
            raise
        raise StoreError(f"{what}, it may be damaged: {first_line(error)}") from None


_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^']|'')*')|(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    |(?P<name>[A-Za-z_]\w*|`[^`]*`|"[^"]*")|(?P<sign><>|<=|>=|!=|=+|<|>|,|[+*%]|-(?!-)|/(?!\*))|(?P<open>\()|(?P<close>\)))\s*""",
    re.VERBOSE,
)
_WORDS = frozenset(["and", "or", "not", "in", "like", "ilike", "is", "null", "between", "true", "false", "escape"])
DEEPEST = 50  # brackets within brackets


def check_filter(where: str, columns: Callable[[], Sequence[str]]) -> None:
    """Raises unless an SQL filter is one expression of columns, values and comparisons: no function, no second statement."""

    def refuse(reason: str) -> StoreError:
        return StoreError(
            f"the filter {where[:200]!r} cannot be used: {reason}; it compares columns with values by =, <, >, IN, LIKE, "
            "BETWEEN and IS NULL, joined by AND, OR, NOT, as in \"width > 500 AND label = 'cat'\""
        )

    at = depth = 0
    known: list[str] | None = None
    token = None
    while at < len(where):
        token = _TOKEN.match(where, at)
        if token is None:
            raise refuse(f"{where[at : at + 20].strip()!r} is no part of one")
        at = token.end()
        depth += (token["open"] is not None) - (token["close"] is not None)
        if not 0 <= depth <= DEEPEST:
            raise refuse(
                "its brackets do not match" if depth < 0 else f"more than {DEEPEST} brackets within each other"
            )
        name = token["name"]
        if name is not None and name.lower() not in _WORDS:
            if where[at : at + 1] == "(":
                raise refuse(f"{name} is a function")
            known = known if known is not None else [*columns()]
            plain = name.strip('`"')
            if plain not in known and plain.lower() not in known:
                only_known(f"the filter {where[:200]!r} cannot be used: there is no column", [plain], known)
    if depth:
        raise refuse("its brackets do not match")
    if token is not None and token["sign"]:
        raise refuse(f"nothing follows its last {token['sign']!r}")


def first_line(error: BaseException) -> str:
    """The part of a LanceDB message that says something: no source locations, no second line."""
    text = str(error).split("\n")[0]
    text = re.sub(r",? ?(location: )?/\S+\.rs:\d+:\d+.*$", "", text)
    return re.sub(r"^(lance error: |Invalid input, |LanceError\(IO\): )+", "", text).strip() or type(error).__name__
