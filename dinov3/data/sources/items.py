"""One image of a source, and what all kinds of sources share."""

from __future__ import annotations

import os
import re
import stat
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dinov3.data.images import HEAD
from dinov3.data.sources import remote
from dinov3.errors import DinoError, ImageError

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
    if remote.is_remote(path):
        return remote.read_range(str(path), 0, size)
    try:
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode) or not facts.st_size:  # reading a pipe or the kernel's log would wait
            return b""
        with open(path, "rb") as file:
            return file.read(size)
    except OSError:
        return b""


def stamp_of(path: str | os.PathLike[str]) -> str:
    if remote.is_remote(path):
        return remote.stamp_of(os.fspath(path))
    try:
        facts = os.stat(path)
    except OSError:
        return "missing"
    return f"{facts.st_size}-{facts.st_mtime_ns}"


def storable(text: str) -> str:
    """A name as UTF-8, whatever bytes a file system or an archive holds: other bytes become `\\xff`, and a name that
    spells such an escape has its backslash escaped (`\\x5cxff`), so that two names never become one."""
    escaped = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", text)
    return escaped.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def spellings(path: str) -> list[bytes]:
    """The names that a stored path may stand for: itself, and with the escapes of `storable` undone."""
    name = os.fsencode(path)
    return list(dict.fromkeys([name, re.sub(rb"\\x([0-9a-f]{2})", lambda m: bytes.fromhex(m[1].decode()), name)]))
