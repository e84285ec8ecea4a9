"""Items of a source, and the bytes behind them: files here, or behind an address."""

from __future__ import annotations

import io
import os
import re
import stat
import threading
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np

from dinov3.data.images import HEAD
from dinov3.errors import DinoError, ImageError, MissingExtra, install, require, without_secrets

# ---- files behind an address -----------------------------------------------------------------------------------------
# Files behind an address (`s3://`, `hf://`, `https://`, …) as files that can be sought, through fsspec (extra `remote`).
#
# Every read is a request for a range of bytes, tried again where it fails. File systems are fsspec's own instances, asked for
# at every read: it makes new ones in forked workers.


T = TypeVar("T")
WAITS = (0.5, 2.0, 8.0)  # seconds before a request is tried again
BUFFER = 1 << 20  # bytes of a request where a file is read forwards
FINAL = (FileNotFoundError, PermissionError, NotImplementedError, ValueError)  # trying again does not help


def is_remote(path: str | os.PathLike[str]) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", os.fspath(path)) is not None


def _tried(what: str, url: str, request: Callable[[Any, str], T]) -> T:
    """`request(file system, path)`, several times where it fails. Raises `ImageError`."""
    fsspec = require("fsspec", "remote", f"reading {without_secrets(url)}")
    for wait in (*WAITS, None):
        try:
            return request(*fsspec.core.url_to_fs(url))
        except ImportError as error:  # of the library for this kind of address
            raise MissingExtra(
                f"{without_secrets(url)} needs one more library ({error}): {install('remote')}"
            ) from None
        except Exception as error:  # each kind of file system has its own
            if isinstance(error, FileNotFoundError):
                raise ImageError(f"there is no {url}") from None
            if wait is None or isinstance(error, FINAL):
                tries = "" if isinstance(error, FINAL) else f" after {len(WAITS) + 1} attempts"
                reason = " ".join(str(error).split())[:160] or type(error).__name__
                raise ImageError(f"{what} {url} failed{tries}: {reason}") from None
            time.sleep(wait)
    raise AssertionError


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes of a remote file from `offset` on; fewer where it ends."""

    def request(system: Any, path: str) -> bytes:
        data: bytes = system.cat_file(path, start=offset, end=offset + size)
        if len(data) > size:
            raise NotImplementedError("the server sends whole files only (no ranges of bytes): copy it here")
        return data

    return _tried("reading", url, request) if size else b""


def _facts(url: str) -> dict[str, Any]:
    return _tried("reading", url, lambda system, path: system.info(path))


def size_of(path: str | os.PathLike[str]) -> int:
    """Bytes of a file, here or remote."""
    if not is_remote(path):
        return os.path.getsize(path)
    size = _facts(os.fspath(path)).get("size")
    if size is None:
        raise ImageError(f"the server does not say how large {os.fspath(path)} is: copy it here")
    return int(size)


class _Remote(io.RawIOBase):
    def __init__(self, url: str) -> None:
        self.url, self.position, self.size = url, 0, size_of(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = read_range(self.url, self.position, max(0, min(len(buffer), self.size - self.position)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """A file, here or remote, to be read and sought."""
    return io.BufferedReader(_Remote(os.fspath(path)), BUFFER) if is_remote(path) else open(path, "rb")


def listed(text: str) -> list[str]:
    """The addresses that a glob or a folder holds, in order of the names; or the address itself, of a file."""

    def request(system: Any, path: str) -> list[str]:
        if MAGIC.search(path):
            top, base, found = fixed(text), fixed(path), system.glob(path)
        elif system.isdir(path):
            top, base, found = text.rstrip("/"), path.rstrip("/"), system.find(path)
        else:
            return [text]
        return [top + name.removeprefix(base) for name in sorted(found)]

    if text.startswith(("http://", "https://")):  # servers do not list, and `?` begins a query
        return [text]
    found = _tried("listing", text, request)
    if not found:
        raise DinoError(f"nothing matches {text}")
    return found


MAGIC = re.compile(r"[*?\[{]")


def fixed(text: str) -> str:
    """The folder before the first pattern, without its slash."""
    return MAGIC.split(text)[0].rpartition("/")[0]


# ---- items -----------------------------------------------------------------------------------------------------------
# One image of a source, and what all kinds of sources share.


# Companions of images that are never one themselves: not worth opening a million of them to read their first bytes.
# fmt: off
COMPANIONS = frozenset([
    ".txt", ".json", ".jsonl", ".cls", ".csv", ".tsv", ".xml", ".yaml", ".md", ".npy", ".npz", ".pt",
])
# A column of paths is found by its name.
PATH_NAMES = (
    "path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "image_file", "img_path",
    "image", "img", "picture", "photo",
)
# fmt: on


class Place(Protocol):
    """Where an item's bytes are. Small and picklable."""

    def read(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source: `path` is its name there (unique, stable), `stamp` changes when the file behind it does."""

    path: str
    stamp: str
    place: Place

    def read(self) -> bytes:
        """The encoded image. Raises `ImageError` with the reason if it cannot be had."""
        return self.place.read()


class Part:
    """The images of one container by number. Items are made at need: an image costs the numbers that find it."""

    kind: str

    def __len__(self) -> int:
        raise NotImplementedError

    def path_of(self, i: int) -> str:
        """`Item.path`."""
        raise NotImplementedError

    def stamp_of(self, i: int) -> str:
        """`Item.stamp`, as it is now."""
        raise NotImplementedError

    def place_of(self, i: int) -> Place:
        raise NotImplementedError

    def forward_runs(self) -> list[tuple[int, int]]:
        """(images, bytes) of the runs, in order, that can only be read forwards; none where any image is one read."""
        return []

    def __iter__(self) -> Iterator[Item]:
        for i in range(len(self)):
            yield Item(self.path_of(i), self.stamp_of(i), self.place_of(i))


class Names:
    """A list of file names in little memory: their last parts in one buffer, each folder once (a string costs 50 bytes
    beside its text)."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.folders: list[str] = []
        self.numbers: dict[str, int] = {}
        self.folder, self.end, self.text = array("I"), array("Q", [0]), bytearray()
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        folder, slash, last = name.rpartition("/")
        number = self.numbers.setdefault(folder + slash, len(self.folders))
        if number == len(self.folders):
            self.folders.append(folder + slash)
        self.folder.append(number)
        self.text += last.encode("utf-8", "surrogateescape")
        self.end.append(len(self.text))

    def pop(self) -> str:
        last = self[len(self) - 1]
        self.folder.pop()
        self.end.pop()
        del self.text[self.end[-1] :]
        return last

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, i: int) -> str:
        last = self.text[self.end[i] : self.end[i + 1]].decode("utf-8", "surrogateescape")
        return self.folders[self.folder[i]] + last

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True, eq=False)
class Runs:
    """Images that should be read forwards: how many lie in each run, in how many places they are read in turn, and among how
    many neighbours the order is free there."""

    lengths: np.ndarray  # int64, their sum is the number of images
    lanes: int
    window: int


@dataclass
class _Reader:
    key: Any
    blocks: Iterator[tuple[Any, int]]
    next: int = 0
    failed: Exception | None = None


class Forward:
    """Containers that are read forwards only, in blocks: the last ones are cached, and readers wait where they stopped.

    A block that is not cached is fetched by the reader that is nearest before it. So several places of a file can be read
    in turn, as the order of training does, and threads that read forwards find each other's blocks. Shared by threads;
    emptied in forked children, which would move their parent's files.
    """

    CACHED, READERS = 256 << 20, 64  # bytes of blocks

    def __init__(self) -> None:
        self.forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    @property
    def window(self) -> int:
        """Bytes around a place that stay cached while dozens of places are read in turn."""
        return self.CACHED // 64

    def forget(self) -> None:
        self.lock = threading.Lock()
        self.cached: OrderedDict[tuple[Any, int], tuple[Any, int]] = OrderedDict()  # value, bytes
        self.readers: list[_Reader] = []  # the one that was used last at the end
        self.size = 0

    def block(self, key: Any, number: int, read: Callable[[], Iterator[tuple[Any, int]]]) -> Any:
        """Block `number` of the container `key`, whose blocks and their bytes `read()` yields from the first on; what it
        raises is raised for that block and all later ones. `StopIteration` after the last."""
        with self.lock:
            if (key, number) not in self.cached:
                self._fetch(key, number, read)
            self.cached.move_to_end((key, number))
            return self.cached[key, number][0]

    def _fetch(self, key: Any, number: int, read: Callable[[], Iterator[tuple[Any, int]]]) -> None:
        before = [r for r in self.readers if r.key == key and r.next <= number]
        reader = max(before, key=lambda r: r.next) if before else _Reader(key, read())
        self.readers = [*(r for r in self.readers if r is not reader), reader][-self.READERS :]
        passed, size = deque[tuple[int, int]](), 0  # a long way to the block must not evict what other places need
        while reader.next <= number:
            if reader.failed is not None:
                raise reader.failed
            try:
                block = next(reader.blocks)
            except Exception as error:
                reader.failed = error
                raise
            self.size += block[1] - self.cached.pop((key, reader.next), (None, 0))[1]
            self.cached[key, reader.next] = block
            passed.append((reader.next, block[1]))
            size += block[1]
            while size > self.window and len(passed) > 1:
                far, bytes_of = passed.popleft()
                size -= bytes_of
                if (key, far) in self.cached:
                    self.cached.move_to_end((key, far), last=False)
            reader.next += 1
            while self.size > self.CACHED and len(self.cached) > 1:
                self.size -= self.cached.popitem(last=False)[1][1]


FORWARD = Forward()


@dataclass(frozen=True, slots=True)
class Unreadable:
    """The place of an item that cannot be read: `read` raises the reason."""

    reason: str

    def read(self) -> bytes:
        raise ImageError(self.reason)


class NoImageColumn(DinoError):
    def __init__(self, path: Path | str, columns: Iterable[str]) -> None:
        super().__init__(
            f"no column of {path} holds images or paths (it has {', '.join(columns)}); choose with column="
        )


def first_bytes(path: str | Path, size: int = HEAD) -> bytes:
    if is_remote(path):
        return read_range(str(path), 0, size)
    try:
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode) or not facts.st_size:  # reading a pipe or the kernel's log would wait
            return b""
        with open(path, "rb") as file:
            return file.read(size)
    except OSError:
        return b""


def stamp_of(path: str | os.PathLike[str]) -> str:
    """What changes with the file."""
    if is_remote(path):
        facts = _facts(os.fspath(path))
        marks = ("ETag", "etag", "blob_id", "LastModified", "mtime", "created")
        return f"{facts.get('size')}-{next((facts[k] for k in marks if facts.get(k)), '')}"
    try:
        status = os.stat(path)
    except OSError:
        return "missing"
    return f"{status.st_size}-{status.st_mtime_ns}"


def storable(text: str) -> str:
    """A name as UTF-8, whatever bytes a file system or an archive holds: other bytes become `\\xff`, and a name that
    spells such an escape has its backslash escaped (`\\x5cxff`), so that two names never become one."""
    escaped = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", text)
    return escaped.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def spellings(path: str) -> list[bytes]:
    """The names that a stored path may stand for: itself, and with the escapes of `storable` undone."""
    name = os.fsencode(path)
    return list(dict.fromkeys([name, re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes.fromhex(m[1].decode()), name)]))
