"""What a path is, and the list of images it holds: `open_source`."""

from __future__ import annotations

import csv
import glob
import io
import itertools
import json
import os
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from dinov3.data.images import IMAGE_SUFFIXES, check_size, image_suffix, is_image_header, os_reason, read_file
from dinov3.data.sources.containers import (
    TAR_SUFFIXES,
    VIDEOS,
    Arrow,
    Parquet,
    Tar,
    Video,
    arrow_damage,
    frame_at,
    is_tar,
)
from dinov3.data.sources.items import (
    COMPANIONS,
    FORWARD,
    MAGIC,
    PATH_NAMES,
    Item,
    Names,
    NoImageColumn,
    Part,
    Place,
    Runs,
    Unreadable,
    first_bytes,
    fixed,
    is_remote,
    listed,
    read_range,
    size_of,
    spellings,
    stamp_of,
    storable,
)
from dinov3.errors import DinoError, ImageError, only_known
from dinov3.files import nonexistent

LIST_SUFFIXES = (".txt", ".lst", ".list", ".csv", ".tsv")


class Source(Protocol):
    """What `open_source` returns: `kind` is folder, image, list, tar, parquet, datasets, mixed, or broken."""

    name: str
    kind: str
    skipped: int  # files and members that are no images
    videos: list[str]  # patterns of the videos in folders, which are among them
    root: str  # absolute folder that items' paths are relative to, `storable` as they are

    @property
    def folders(self) -> list[str]:
        """The absolute folders that were listed; none for files that were named."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


class Indexed(Source, Protocol):
    """What `open_source` returns: also by number, without an object for each image."""

    def path_of(self, i: int) -> str: ...

    def stamp_of(self, i: int) -> str: ...

    def place_of(self, i: int) -> Place: ...

    @property
    def runs(self) -> Runs | None: ...


def open_source(
    spec: str | os.PathLike[str], *, column: str | None = None, recursive: bool = True, fps: float = 1.0
) -> Indexed:
    """List the images of a folder, image, list file (.txt, .csv, .tsv), tar, Parquet file, or saved `datasets` folder.

    A text may also be a glob ("shards/*.tar") or hold braces ("shard-{000..010}.tar", "{train,val}.parquet").
    `column` names the column of a table that holds images or their paths; found by type and name otherwise.
    Tars, Parquet files and images also by address (s3://, hf://, https://, …), with globs and folders where the server lists.
    A video file that is named gives `fps` frames a second; those in a folder are skipped.
    """
    text = os.path.expanduser(os.fspath(spec))
    if is_remote(text):
        return _open_remote(text, column)
    if not 0 < fps <= 1000:
        raise DinoError(f"{fps} frames a second cannot be taken of a video: give a rate above 0, up to 1000")
    if os.path.lexists(text):
        path = Path(os.path.abspath(text))  # items are read by processes that may stand elsewhere
        listing = _Listing(str(path if path.is_dir() else path.parent), column, recursive, fps)
        if path.is_dir():
            listing.folder()
        else:
            listing.named(path, path.name)
    elif MAGIC.search(text):
        base = Path(MAGIC.split(os.path.abspath(text))[0] + "x").parent  # the folders above the first of its signs
        listing = _Listing(str(base), column, recursive, fps)
        for found in _expand(os.path.abspath(text)):
            if found.is_dir():
                listing.folder(prefix=_relative(found, base) + "/")
            else:
                listing.named(found, _relative(found, base))
    else:
        raise DinoError(nonexistent(text))
    return listing.close(text)


def open_sources(specs: Sequence[str | os.PathLike[str]], **options: Any) -> Source:
    """Several sources as one, with absolute paths; its root is the folder that holds them all. Options: `open_source`'s."""
    for spec in filter(is_remote, specs):  # a store looks whether files are still there
        raise DinoError(f"remote addresses are for training and evaluation; here they are not read ({spec}): copy it")
    sources = [open_source(spec, **options) for spec in specs]
    if len(sources) == 1:
        return sources[0]
    try:
        root = os.path.commonpath([source.root for source in sources])
    except ValueError:  # none at all, or two drives
        raise DinoError("give at least one source, and all of them on one drive") from None
    skipped, videos = sum(source.skipped for source in sources), [v for source in sources for v in source.videos]
    return _Several(f"{len(sources)} sources", "mixed", skipped, videos, root, sources)


def videos_left_out(patterns: Sequence[str]) -> str:
    """What to say of a source's `videos`."""
    return f"videos are taken where they are named: {' '.join(map(quote, patterns[:3]))}"


def _open_remote(text: str, column: str | None) -> Indexed:
    urls = [url for name in _braces(text) for url in listed(name)]
    folder = urls != [text] and not MAGIC.search(text)
    base = text.rstrip("/") if folder else fixed(text)  # names are relative to it
    listing = _Listing(base, column, True, 1.0)
    for url in urls:
        listing.remote(url, url.removeprefix(base + "/"))
    return listing.close(text)


def files_below(
    root: str | os.PathLike[str],
    prefix: str = "",
    *,
    recursive: bool = True,
    unlisted: Callable[[str, str], object] | None = None,
) -> Iterator[str]:
    """Names, relative to the root, of the files below a folder of it (`prefix`, "" or ending in a slash), in the order of
    the names, each real folder once: links to folders are followed after all that lies below the folder itself, and only
    to folders that were not visited. Hidden files and folders are left alone.

    `unlisted(name, reason)` is called for a folder that cannot be listed; without it that is a `DinoError`.
    """
    visited: set[tuple[int, int]] = set()
    ahead, links = [prefix], deque[str]()  # folders end in a slash
    while ahead or links:
        name = ahead.pop() if ahead else links.popleft()
        if name != prefix and not name.endswith("/"):
            yield name
            continue
        folder = os.path.join(root, name.rstrip("/"))
        found: list[str] = []
        linked: list[str] = []
        try:
            facts = os.stat(folder)
            if (facts.st_dev, facts.st_ino) in visited:
                continue
            visited.add((facts.st_dev, facts.st_ino))
            with os.scandir(folder) as scan:
                for entry in scan:
                    if not entry.name.startswith("."):
                        end, link = ("/", entry.is_symlink()) if _is_folder(entry) else ("", False)
                        (linked if link else found).append(name + entry.name + end)
        except OSError as error:
            reason = f"this folder cannot be listed: {os_reason(error, folder)}"
            if unlisted is None:
                raise DinoError(f"{folder}: {reason}") from None
            unlisted(name or ".", reason)
            continue
        found.sort(reverse=True)
        ahead += found if recursive else (n for n in found if not n.endswith("/"))
        links += sorted(linked) if recursive else ()


def read_stored(path: str | os.PathLike[str]) -> bytes:
    """The encoded image of a path as stores have them: a file, a member or row (`a.tar#1.jpg`, `b.parquet#17`), or a video's
    frame (`clip.mp4#12.500s`).

    Raises `ImageError` where it cannot be read, `DinoError` where there is nothing of that name.
    """
    text = os.fspath(path)
    if text.lower().endswith((*VIDEOS, *TAR_SUFFIXES, ".parquet", ".arrow")) and os.path.isfile(text):
        part = "#12.500s, a time" if text.lower().endswith(VIDEOS) else "#NAME, a member, or #ROW"
        raise ImageError(f"it holds many images: name one of them by adding {part}")
    for end in [len(text), *(at for at, letter in enumerate(text) if letter == "#")]:
        for name in map(os.fsdecode, spellings(text[:end])):
            if end == len(text) and os.path.lexists(name):
                return read_file(name)
            if end < len(text) and os.path.isfile(name):
                return _read_member(name, text[end + 1 :])
    raise DinoError(nonexistent(text))


def _read_member(container: str, member: str) -> bytes:
    if container.lower().endswith(VIDEOS) and re.fullmatch(r"\d+(\.\d+)?s", member):
        return frame_at(container, float(member[:-1]))
    name = f"{storable(os.path.basename(container))}#{member}"
    source = _container(container, stamp_of(container))
    for i in range(len(source)):
        if source.path_of(i) == name:
            return source.place_of(i).read()
    raise ImageError(f"{container} holds no image {member!r}")


@lru_cache(maxsize=1)
def _container(path: str, stamp: str) -> Indexed:
    """The images of a tar or a table; the last one is kept, for a sheet of many of its images."""
    return open_source(path)


@dataclass
class _Several:
    """Sources, one after the other."""

    name: str
    kind: str
    skipped: int
    videos: list[str]
    root: str
    sources: Sequence[Source]

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
    """The one implementation of `Indexed`: parts, one after the other."""

    name: str
    kind: str
    skipped: int
    videos: list[str]
    root: str
    parts: list[Part]
    folders: list[str]

    def __post_init__(self) -> None:
        self.starts = list(itertools.accumulate(map(len, self.parts), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def __iter__(self) -> Iterator[Item]:
        return itertools.chain.from_iterable(self.parts)

    def _part(self, i: int) -> tuple[Part, int]:
        k = bisect_right(self.starts, i) - 1
        return self.parts[k], i - self.starts[k]

    @property
    def runs(self) -> Runs | None:
        """What can only be read forwards, in runs; None where all of it is cached, or any image is one read."""
        forward = [part.forward_runs() for part in self.parts]
        images, size = (sum(run[n] for runs in forward for run in runs) for n in (0, 1))
        if size <= FORWARD.CACHED:
            return None
        lengths = [n for part, runs in zip(self.parts, forward) for n in ([n for n, _ in runs] or _cut(len(part)))]
        # each lane begins somewhere in a run, which is read up to there: not many more lanes than runs; a power of two, so
        # that each of so many ranks reads its own
        lanes = min(32, max(8, 1 << len(lengths).bit_length() - 1))
        return Runs(np.array(lengths, np.int64), lanes, max(1, FORWARD.window * images // size))

    def path_of(self, i: int) -> str:
        part, at = self._part(i)
        return part.path_of(at)

    def stamp_of(self, i: int) -> str:
        part, at = self._part(i)
        return part.stamp_of(at)

    def place_of(self, i: int) -> Place:
        part, at = self._part(i)
        return part.place_of(at)


def _cut(length: int, most: int = 1000) -> list[int]:
    return [min(most, length - start) for start in range(0, length, most)]


@dataclass
class _Listing:
    """Gathers parts while paths are listed."""

    root: str
    column: str | None
    recursive: bool
    fps: float
    skipped: int = 0
    files: Names = field(default_factory=Names)  # relative to the root
    in_order: bool = True
    videos: list[str] = field(default_factory=list)
    containers: list[Part] = field(default_factory=list)
    used_column: bool = False
    hints: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    damage: dict[str, str] = field(default_factory=dict)  # of Arrow files

    def file(self, name: str) -> None:
        self.in_order = self.in_order and (not len(self.files) or self.files[len(self.files) - 1] <= name)
        self.files.append(name)

    def close(self, name: str) -> Indexed:
        kinds = [] if not self.files else ["folder" if self.folders or len(self.files) > 1 else "image"]
        files = self.files if self.in_order else Names(sorted(self.files))
        parts: list[Part] = [_Files(self.root, files)] if self.files else []
        parts += self.containers
        kinds += dict.fromkeys(p.kind for p in self.containers)
        whole = [k for k in kinds if k != "broken"] or kinds
        kind, root = whole[0] if len(whole) == 1 else "mixed", storable(self.root)
        source = _Listed(name, kind, self.skipped, self.videos, root, parts, self.folders)
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
        return "; ".join([sentence, *([videos_left_out(self.videos)] if self.videos else []), *self.hints[:3]])

    def folder(self, prefix: str = "") -> None:
        """The folder `prefix` ("" or ending in a slash) of the root."""
        self.folders.append(storable(os.path.normpath(os.path.join(self.root, prefix))))
        containers: list[tuple[str, Path]] = []

        def unlisted(folder: str, reason: str) -> None:
            self.containers.append(_Broken(storable(folder), reason))

        for relative in files_below(self.root, prefix, recursive=self.recursive, unlisted=unlisted):
            lower = os.path.basename(relative).lower()
            suffix = os.path.splitext(lower)[1]
            if suffix in IMAGE_SUFFIXES:
                self.file(relative)
                continue
            path = os.path.join(self.root, relative)
            if lower.endswith((*TAR_SUFFIXES, ".parquet")) or (suffix == ".arrow" and not lower.startswith("cache-")):
                containers.append((relative, Path(path)))
            elif suffix not in COMPANIONS and is_image_header(first_bytes(path)):
                self.file(relative)
            else:
                self.skipped += 1
                if lower.endswith(LIST_SUFFIXES) and len(self.hints) < 3:
                    self.hints.append(f"if {path} is a list of images, name that file")
                elif lower.endswith(VIDEOS) and (pattern := f"{os.path.dirname(path)}/*{suffix}") not in self.videos:
                    self.videos.append(pattern)
        if arrow := [str(path) for _, path in containers if path.suffix.lower() == ".arrow"]:
            self.damage |= arrow_damage(arrow)
        for relative, container in sorted(containers, key=lambda c: _dataset_order(*c)):
            self.named(container, relative, on_its_own=False)

    def named(self, path: Path, name: str, *, on_its_own: bool = True) -> None:
        """One file that was named, or a container met in a folder. Its content decides what it is."""
        raw, name = name, storable(name)
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
                self.file(raw)
            elif lower.endswith(LIST_SUFFIXES):
                self.used_column |= lower.endswith((".csv", ".tsv"))
                self.containers.append(_read_list(path, self.column))
            else:
                self.skipped += 1
        except ImageError as error:
            self.containers.append(_Broken(name, str(error), stamp))

    def remote(self, url: str, name: str) -> None:
        """One remote file. What cannot be opened is an error: a shard that is out of reach should not go unnoticed."""
        lower = urlsplit(name).path.lower()
        if lower.endswith(".parquet"):
            self._table(url, lambda: Parquet.open(url, name, stamp_of(url), self.column), True)
        elif lower.endswith(TAR_SUFFIXES):
            tar = Tar.open(url, name, stamp_of(url))
            self.skipped += tar.skipped
            self.containers.append(tar)
        elif image_suffix(lower):
            self.file(name)
        else:
            self.skipped += 1

    def _table(self, path: Path | str, opened: Callable[[], Part], on_its_own: bool) -> None:
        self.used_column = True
        try:
            self.containers.append(opened())
        except NoImageColumn as error:
            if on_its_own:
                raise
            self.skipped += 1  # a table beside images: labels, most likely
            self.hints.append(str(error))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


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
        if is_remote(self.path):
            size = size_of(self.path)
            check_size(size)
            return read_range(self.path, 0, size)
        return read_file(self.path)


@dataclass
class _Files(Part):
    """Names relative to a folder; a file's stamp is taken when its item is made, so listing a million files stays cheap."""

    root: str
    names: Names
    kind: str = "folder"

    def __len__(self) -> int:
        return len(self.names)

    def path_of(self, i: int) -> str:
        return storable(self.names[i])

    def stamp_of(self, i: int) -> str:
        return stamp_of(os.path.join(self.root, self.names[i]))

    def place_of(self, i: int) -> Place:
        name = self.names[i]
        if is_remote(name):
            return Unreadable("a remote address; only files are read")
        return _File(os.path.join(self.root, name))


@dataclass
class _Broken(Part):
    """Something that cannot be opened at all: one item that fails."""

    name: str
    reason: str
    stamp: str = "missing"
    kind: str = "broken"

    def __len__(self) -> int:
        return 1

    def path_of(self, i: int) -> str:
        return self.name

    def stamp_of(self, i: int) -> str:
        return self.stamp

    def place_of(self, i: int) -> Place:
        return Unreadable(self.reason)


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
    if names and not any(
        image_suffix(n) or "://" in n or os.path.exists(path.parent / n) for n in itertools.islice(names, 1000)
    ):
        raise DinoError(
            f"{path} is read as a list, an image's path a line, and none of its lines is one ({next(iter(names))!r:.60}): "
            "name images, a folder or such a list"
        )
    return _Files(str(path.parent), Names(names), "list")


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
