"""What a path is, and the list of images it holds: `open_source`."""

from __future__ import annotations

import csv
import glob
import io
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from dinov3.data.images import IMAGE_SUFFIXES, image_suffix, is_image_header, os_reason, read_file
from dinov3.data.sources.items import (
    COMPANIONS,
    PATH_NAMES,
    Item,
    NoImageColumn,
    Part,
    Place,
    Unreadable,
    first_bytes,
    stamp_of,
    storable,
)
from dinov3.data.sources.tables import Arrow, Parquet, arrow_damage
from dinov3.data.sources.tar import TAR_SUFFIXES, Tar, is_tar
from dinov3.data.sources.video import VIDEOS, Video
from dinov3.errors import DinoError, ImageError, only_known
from dinov3.files import nonexistent

LIST_SUFFIXES = (".txt", ".lst", ".list", ".csv", ".tsv")


class Source(Protocol):
    """What `open_source` returns: `kind` is folder, image, list, tar, parquet, datasets, mixed, or broken."""

    name: str
    kind: str
    skipped: int  # files and members that are no images
    root: str  # absolute folder that items' paths are relative to

    @property
    def folders(self) -> list[str]:
        """The absolute folders that were listed; none for files that were named."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


def open_source(
    spec: str | os.PathLike[str], *, column: str | None = None, recursive: bool = True, fps: float = 1.0
) -> Source:
    """List the images of a folder, image, list file (.txt, .csv, .tsv), tar, Parquet file, or saved `datasets` folder.

    A text may also be a glob ("shards/*.tar") or hold braces ("shard-{000..010}.tar", "{train,val}.parquet").
    `column` names the column of a table that holds images or their paths; found by type and name otherwise.
    A video file that is named gives `fps` frames a second; those in a folder are skipped.
    """
    text = os.path.expanduser(os.fspath(spec))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise DinoError(f"remote addresses are not read ({text}): mount it or copy it here, and give the path")
    if not 0 < fps <= 1000:
        raise DinoError(f"{fps} frames a second cannot be taken of a video: give a rate above 0, up to 1000")
    listing = _Listing(column, recursive, fps)
    if os.path.lexists(text):
        path = Path(os.path.abspath(text))  # items are read by processes that may stand elsewhere
        root = path if path.is_dir() else path.parent
        if path.is_dir():
            listing.folder(path)
        else:
            listing.named(path, path.name)
    elif re.search(r"[*?\[{]", text):
        root = base = _fixed_part(os.path.abspath(text))
        for found in _expand(os.path.abspath(text)):
            if found.is_dir():
                listing.folder(found, prefix=_relative(found, base) + "/")
            else:
                listing.named(found, _relative(found, base))
    else:
        raise DinoError(nonexistent(text))
    return listing.close(text, str(root))


def open_sources(specs: Sequence[str | os.PathLike[str]], **options: Any) -> Source:
    """Several sources as one, with absolute paths; its root is the folder that holds them all. Options: `open_source`'s."""
    sources = [open_source(spec, **options) for spec in specs]
    if len(sources) == 1:
        return sources[0]
    try:
        root = os.path.commonpath([source.root for source in sources])
    except ValueError:  # none at all, or two drives
        raise DinoError("give at least one source, and all of them on one drive") from None
    return _Several(f"{len(sources)} sources", "mixed", sum(source.skipped for source in sources), root, sources)


@dataclass
class _Several:
    """Sources, one after the other."""

    name: str
    kind: str
    skipped: int
    root: str
    sources: list[Source]

    @property
    def folders(self) -> list[str]:
        return [folder for source in self.sources for folder in source.folders]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __iter__(self) -> Iterator[Item]:
        for source in self.sources:
            for item in source:
                yield replace(item, path=os.path.join(source.root, item.path))


@dataclass
class _Listed:
    """The one implementation of `Source`: parts, one after the other."""

    name: str
    kind: str
    skipped: int
    root: str
    parts: list[Part]
    folders: list[str]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Item]:
        return itertools.chain.from_iterable(self.parts)


@dataclass
class _Listing:
    """Gathers parts while paths are listed."""

    column: str | None
    recursive: bool
    fps: float
    skipped: int = 0
    files: list[tuple[str, str]] = field(default_factory=list)  # (id, real path)
    containers: list[Part] = field(default_factory=list)
    used_column: bool = False
    hints: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    damage: dict[str, str] = field(default_factory=dict)  # of Arrow files

    def close(self, name: str, root: str) -> Source:
        kinds = [] if not self.files else ["folder" if self.folders or len(self.files) > 1 else "image"]
        parts: list[Part] = [_Files(sorted(self.files))] if self.files else []
        parts += self.containers
        kinds += dict.fromkeys(p.kind for p in self.containers)
        whole = [k for k in kinds if k != "broken"] or kinds
        source = _Listed(name, whole[0] if len(whole) == 1 else "mixed", self.skipped, root, parts, self.folders)
        if len(source) == 0:
            raise DinoError(self._emptiness(name))
        if self.column is not None and not self.used_column:
            raise DinoError(f"column {self.column!r} was given, but {name} holds no table")
        if source.kind == "mixed":
            counts = [f"{len(self.files)} images"] if self.files else []
            for kind in dict.fromkeys(p.kind for p in self.containers):
                counts.append(f"{sum(p.kind == kind for p in self.containers)} {kind}")
            source.name = f"{name} ({', '.join(counts)})"
        return source

    def _emptiness(self, name: str) -> str:
        known = " ".join(sorted(s.lstrip(".") for s in IMAGE_SUFFIXES))
        where = "there and in all folders below" if self.recursive else "there, not in folders below"
        sentence = (
            f"no images in {name}: looked {where} for image files ({known}, or by their first bytes), tar shards, "
            f"Parquet and Arrow tables; {self.skipped} other files were skipped"
        )
        return "; ".join([sentence, *self.hints[:3]])

    def folder(self, root: Path, prefix: str = "") -> None:
        self.folders.append(str(root))
        containers: list[tuple[str, Path]] = []
        for path, relative in self._walk(str(root), prefix):
            lower = os.path.basename(path).lower()
            suffix = os.path.splitext(lower)[1]
            if suffix in IMAGE_SUFFIXES:
                self.files.append((relative, path))
            elif lower.endswith((*TAR_SUFFIXES, ".parquet")) or (suffix == ".arrow" and not lower.startswith("cache-")):
                containers.append((relative, Path(path)))
            elif suffix not in COMPANIONS and is_image_header(first_bytes(path)):
                self.files.append((relative, path))
            else:
                self.skipped += 1
                if lower.endswith(LIST_SUFFIXES) and len(self.hints) < 3:
                    self.hints.append(f"if {path} is a list of images, name that file")
        if arrow := [str(path) for _, path in containers if path.suffix.lower() == ".arrow"]:
            self.damage |= arrow_damage(arrow)
        for relative, container in sorted(containers, key=lambda c: _dataset_order(*c)):
            self.named(container, relative, on_its_own=False)

    def _walk(self, root: str, prefix: str) -> Iterator[tuple[str, str]]:
        """Files below a folder, each real folder once: links to folders are followed after all that lies below the root
        itself, and only to folders that were not visited."""
        visited: set[tuple[int, int]] = set()
        folders, links = [(root, prefix)], deque[tuple[str, str]]()
        while folders or links:
            folder, prefix = folders.pop() if folders else links.popleft()
            try:
                facts = os.stat(folder)
                if (facts.st_dev, facts.st_ino) in visited:
                    continue
                visited.add((facts.st_dev, facts.st_ino))
                with os.scandir(folder) as scan:
                    entries = sorted(scan, key=lambda e: e.name)
            except OSError as error:
                reason = f"this folder cannot be listed: {os_reason(error, folder)}"
                self.containers.append(_Broken(storable(prefix or "."), reason))
                continue
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    deeper = entry.is_dir()
                except OSError:  # a link that leads to itself
                    deeper = False
                if not deeper:
                    yield entry.path, prefix + entry.name
                elif self.recursive:
                    (links if entry.is_symlink() else folders).append((entry.path, f"{prefix}{entry.name}/"))

    def named(self, path: Path, name: str, *, on_its_own: bool = True) -> None:
        """One file that was named, or a container met in a folder. Its content decides what it is."""
        name = storable(name)
        head = first_bytes(path, 512)
        lower = path.name.lower()
        stamp = stamp_of(path)
        try:
            if head[:4] == b"PAR1":
                self._table(path, lambda: Parquet.open(path, name, stamp, self.column), on_its_own)
            elif head[:6] == b"ARROW1" or (head[:4] == b"\xff\xff\xff\xff" and lower.endswith(".arrow")):
                if on_its_own:
                    self.damage |= arrow_damage([str(path)])
                if reason := self.damage.get(str(path)):
                    raise ImageError(reason)
                self._table(path, lambda: Arrow.open(path, name, stamp, self.column), on_its_own)
            elif head[257:262] == b"ustar" or (head and lower.endswith(TAR_SUFFIXES) and is_tar(path, head)):
                tar = Tar.open(path, name, stamp)
                self.skipped += tar.skipped
                self.containers.append(tar)
            elif lower.endswith((*TAR_SUFFIXES, ".parquet", ".arrow")):
                if not head:
                    raise ImageError("empty file (0 bytes)" if not read_file(path) else "unreadable")
                kind = "Parquet" if lower.endswith(".parquet") else "Arrow" if lower.endswith(".arrow") else "tar"
                raise ImageError(f"not a{'n' * (kind == 'Arrow')} {kind} file (begins with bytes {head[:6].hex(' ')})")
            elif on_its_own and lower.endswith(VIDEOS):
                self.containers.append(Video.open(path, name, stamp, self.fps))
            elif is_image_header(head) or image_suffix(lower):
                self.files.append((name, str(path)))
            elif lower.endswith(LIST_SUFFIXES):
                self.used_column |= lower.endswith((".csv", ".tsv"))
                self.containers.append(_read_list(path, self.column))
            else:
                self.skipped += 1
        except ImageError as error:
            self.containers.append(_Broken(name, str(error), stamp))

    def _table(self, path: Path, opened: Callable[[], Part], on_its_own: bool) -> None:
        self.used_column = True
        try:
            self.containers.append(opened())
        except NoImageColumn as error:
            if on_its_own:
                raise
            self.skipped += 1  # a table beside images: labels, most likely
            self.hints.append(str(error))


def _fixed_part(text: str) -> Path:
    """The folder before the first pattern: names are relative to it."""
    return Path(re.split(r"[*?\[{]", text)[0] + "x").parent


def _relative(path: Path, base: Path) -> str:
    return Path(os.path.relpath(path, base)).as_posix()


def _expand(text: str) -> list[Path]:
    """Braces, then globs. Of a brace pattern every name must exist: a shard that is missing should not go unnoticed."""
    found: list[Path] = []
    missing = []
    names = _braces(text)
    for name in names:
        if os.path.lexists(name):
            found.append(Path(name))
        elif glob.has_magic(name):
            found += [Path(p) for p in sorted(glob.glob(name, recursive=True))]
        else:
            missing.append(name)
    if missing:
        raise DinoError(f"{len(missing)} of the {len(names)} files of {text} do not exist: {', '.join(missing[:3])}")
    if not found:
        raise DinoError(f"nothing matches {text}")
    return list(dict.fromkeys(found))


def _braces(text: str) -> list[str]:
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if not match:
        return [text]
    first, last, words = match.groups()
    if words is not None:
        choices = words.split(",")
    else:
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [name for c in choices for name in _braces(text[: match.start()] + c + text[match.end() :])]


def _dataset_order(relative: str, path: Path) -> tuple[str, int, str]:
    """By name; but the state of a saved dataset gives the order of its files."""
    position = 0
    if path.suffix == ".arrow":
        try:
            state = json.loads(read_file(path.parent / "state.json"))
            position = [f["filename"] for f in state["_data_files"]].index(path.name)
        except (ImageError, ValueError, KeyError, TypeError, RecursionError):
            position = 0
    return str(PurePosixPath(relative).parent), position, relative


@dataclass(frozen=True, slots=True)
class _File:
    path: str

    def read(self) -> bytes:
        return read_file(self.path)


@dataclass
class _Files:
    """Names and paths; each file's stamp is taken when its item is made, so listing a million files stays cheap."""

    files: list[tuple[str, str]]
    kind: str = "folder"

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Item]:
        for name, path in self.files:
            yield Item(storable(name), stamp_of(path), _place(path))


@dataclass
class _Broken:
    """Something that cannot be opened at all: one item that fails."""

    name: str
    reason: str
    stamp: str = "missing"
    kind: str = "broken"

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Item]:
        yield Item(self.name, self.stamp, Unreadable(self.reason))


def _place(path: str) -> Place:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
        return Unreadable("a remote address; only files are read")
    return _File(path)


def _read_list(path: Path, column: str | None) -> Part:
    """Paths in a text file, relative to its folder. A path that is listed twice is one item."""
    text = read_file(path).decode("utf-8-sig", "surrogateescape")
    if path.suffix.lower() in (".csv", ".tsv"):
        entries: Iterable[str] = _csv_column(path, text, column)
    else:
        entries = (line for line in text.split("\n") if not line.lstrip().startswith("#"))
    names = dict.fromkeys(
        PurePosixPath(e.strip()).as_posix() if "://" not in e else e.strip() for e in entries if e.strip()
    )
    return _Files([(n, n if "://" in n else os.path.join(path.parent, n)) for n in names], "list")


def _csv_column(path: Path, text: str, column: str | None) -> Iterator[str]:
    rows = csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    names = [n.strip() for n in rows.fieldnames or ()]
    rows.fieldnames = names
    listed = list(rows)
    if column is None:
        lowered = {n.lower(): n for n in names}
        likely = [lowered[n] for n in PATH_NAMES if n in lowered]
        likely += [n for n in names if listed and image_suffix(listed[0].get(n) or "")]
        if not likely:
            raise NoImageColumn(path, names)
        column = likely[0]
    only_known(f"{path} has no column", [column], names)
    return (row.get(column) or "" for row in listed)
