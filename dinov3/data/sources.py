"""Where pictures come from: a folder, a file, a list, tar shards, Parquet, a saved `datasets` folder; one by one, by name.

`open_source` looks at what a path is and lists what it holds; nothing is decoded and no container is read as a whole. The
list is deterministic, and every `Item` in it is small, picklable and readable on its own, in any thread or process:

    for item in open_source("photos/"):
        data = item.read()          # bytes, or PictureError with the reason

Nothing disappears in silence. What looks like a picture and cannot be read (a dangling link, the rest of a truncated
shard, an empty cell) is an item whose `read` fails with the reason, so that it ends in somebody's list of failures; what
is no picture is counted in `source.skipped`. Hidden files and folders (".name") are left alone, as `ls` does.

What random access costs: a file or a member of a plain tar is one read at an offset. A member of a .tar.gz is found by
decompressing up to it, so each reading thread decompresses the shard once when it moves forwards; many threads want plain
tars. A Parquet row is found by decoding its row group up to it; the last 128 MB of two row groups are kept per process.

Left out: remote addresses (mount or copy first), zip and other archives, and what accompanies a picture (captions, labels).
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import itertools
import json
import os
import re
import tarfile
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from dinov3.data.pictures import HEAD, PICTURE_SUFFIXES, is_picture_header, os_reason, picture_suffix, read_file
from dinov3.errors import DinoError, PictureError, UnknownName, did_you_mean, require

LIST_SUFFIXES = (".txt", ".lst", ".list", ".csv", ".tsv")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
# Companions of pictures that are never one themselves: not worth opening a million of them to look at their first bytes.
# fmt: off
_COMPANIONS = frozenset([
    ".txt", ".json", ".jsonl", ".cls", ".csv", ".tsv", ".xml", ".yaml", ".md", ".npy", ".npz", ".pt",
])
# A table's column is found by its type; where several would do, one with the likeliest name.
_IMAGE_NAMES = (
    "image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "pixels", "content",
)
_PATH_NAMES = (
    "path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "image_file", "img_path",
    "image", "img", "picture", "photo",
)
# fmt: on


class Place(Protocol):
    """Where an item's bytes are. Small and picklable."""

    def read(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Item:
    """One picture of a source: `path` is its name there (unique, stable), `stamp` changes when the file behind it does."""

    path: str
    stamp: str
    place: Place

    def read(self) -> bytes:
        """The encoded picture. Raises `PictureError` with the reason if it cannot be had."""
        return self.place.read()


class Source(Protocol):
    """What `open_source` returns: `kind` is folder, picture, list, tar, parquet, datasets, mixed, or broken."""

    name: str
    kind: str
    skipped: int  # files and members that are no pictures
    root: str  # absolute folder that items' paths are relative to

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


def open_source(spec: str | os.PathLike[str], *, column: str | None = None, recursive: bool = True) -> Source:
    """List the pictures of a folder, picture, list file (.txt, .csv, .tsv), tar, Parquet file, or saved `datasets` folder.

    A text may also be a glob ("shards/*.tar") or hold braces ("shard-{000..010}.tar", "{train,val}.parquet").
    `column` names the column of a table that holds pictures or their paths; found by type and name otherwise.
    """
    text = os.path.expanduser(os.fspath(spec))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise DinoError(f"remote addresses are not read ({text}): mount it or copy it here, and give the path")
    listing = _Listing(column, recursive)
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
        raise DinoError(_nonexistent(Path(text)))
    return listing.close(text, str(root))


@dataclass
class _Listed:
    """The one implementation of `Source`: parts, one after the other."""

    name: str
    kind: str
    skipped: int
    root: str
    parts: list[_Part]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Item]:
        return itertools.chain.from_iterable(self.parts)


# ---------------------------------------------------------------------------------------------------------------------
# Looking around


@dataclass
class _Listing:
    """Gathers parts while paths are looked at."""

    column: str | None
    recursive: bool
    skipped: int = 0
    files: list[tuple[str, str]] = field(default_factory=list)  # (id, real path)
    containers: list[_Part] = field(default_factory=list)
    used_column: bool = False
    hints: list[str] = field(default_factory=list)
    whole_folder: bool = False

    def close(self, name: str, root: str) -> Source:
        kinds = [] if not self.files else ["folder" if self.whole_folder or len(self.files) > 1 else "picture"]
        parts: list[_Part] = [_Files(sorted(self.files))] if self.files else []
        parts += self.containers
        kinds += dict.fromkeys(p.kind for p in self.containers)
        whole = [k for k in kinds if k != "broken"] or kinds
        source = _Listed(name, whole[0] if len(whole) == 1 else "mixed", self.skipped, root, parts)
        if len(source) == 0:
            raise DinoError(self._emptiness(name))
        if self.column is not None and not self.used_column:
            raise DinoError(f"column {self.column!r} was given, but {name} holds no table")
        if source.kind == "mixed":
            counts = [f"{len(self.files)} pictures"] if self.files else []
            for kind in dict.fromkeys(p.kind for p in self.containers):
                counts.append(f"{sum(p.kind == kind for p in self.containers)} {kind}")
            source.name = f"{name} ({', '.join(counts)})"
        return source

    def _emptiness(self, name: str) -> str:
        known = " ".join(sorted(s.lstrip(".") for s in PICTURE_SUFFIXES))
        where = "there and in all folders below" if self.recursive else "there, not in folders below"
        sentence = (
            f"no pictures in {name}: looked {where} for picture files ({known}, or by their first bytes), tar shards, "
            f"Parquet and Arrow tables; {self.skipped} other files were skipped"
        )
        return "; ".join([sentence, *self.hints[:3]])

    def folder(self, root: Path, prefix: str = "") -> None:
        self.whole_folder = True
        containers: list[tuple[str, Path]] = []
        for path, relative in self._walk(str(root), prefix, frozenset()):
            lower = os.path.basename(path).lower()
            suffix = os.path.splitext(lower)[1]
            if suffix in PICTURE_SUFFIXES:
                self.files.append((relative, path))
            elif lower.endswith((*TAR_SUFFIXES, ".parquet")) or (suffix == ".arrow" and not lower.startswith("cache-")):
                containers.append((relative, Path(path)))
            elif suffix not in _COMPANIONS and is_picture_header(_head(path)):
                self.files.append((relative, path))
            else:
                self.skipped += 1
                if lower.endswith(LIST_SUFFIXES) and len(self.hints) < 3:
                    self.hints.append(f"if {path} is a list of pictures, name that file")
        for relative, container in sorted(containers, key=lambda c: _dataset_order(*c)):
            self.named(container, relative, on_its_own=False)

    def _walk(self, folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, str]]:
        """Files below a folder. Links to folders are followed, except to a folder that we are inside of."""
        try:
            facts = os.stat(folder)
            inside = above | {(facts.st_dev, facts.st_ino)}
            if len(inside) == len(above):
                return
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda e: e.name)
        except OSError as error:
            reason = f"this folder cannot be listed: {os_reason(error, folder)}"
            self.containers.append(_Broken(_name(prefix or "."), reason))
            return
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
                yield from self._walk(entry.path, f"{prefix}{entry.name}/", inside)

    def named(self, path: Path, name: str, *, on_its_own: bool = True) -> None:
        """One file that was asked for, or a container met in a folder. Its content decides what it is."""
        name = _name(name)
        head = _head(path, 512)
        lower = path.name.lower()
        stamp = _stamp(path)
        try:
            if head[:4] == b"PAR1":
                self._table(path, lambda: _Parquet.open(path, name, stamp, self.column), on_its_own)
            elif head[:6] == b"ARROW1" or (head[:4] == b"\xff\xff\xff\xff" and lower.endswith(".arrow")):
                self._table(path, lambda: _Arrow.open(path, name, stamp, self.column), on_its_own)
            elif head[257:262] == b"ustar" or (head and lower.endswith(TAR_SUFFIXES) and _is_tar(path, head)):
                tar = _Tar.open(path, name, stamp)
                self.skipped += tar.skipped
                self.containers.append(tar)
            elif lower.endswith((*TAR_SUFFIXES, ".parquet", ".arrow")):
                if not head:
                    raise PictureError("empty file (0 bytes)" if not read_file(path) else "unreadable")
                kind = "Parquet" if lower.endswith(".parquet") else "Arrow" if lower.endswith(".arrow") else "tar"
                raise PictureError(
                    f"not a{'n' * (kind == 'Arrow')} {kind} file (begins with bytes {head[:6].hex(' ')})"
                )
            elif is_picture_header(head) or picture_suffix(lower):
                self.files.append((name, str(path)))
            elif lower.endswith(LIST_SUFFIXES):
                self.used_column |= lower.endswith((".csv", ".tsv"))
                self.containers.append(_read_list(path, self.column))
            else:
                self.skipped += 1
        except PictureError as error:
            self.containers.append(_Broken(name, str(error), stamp))

    def _table(self, path: Path, opened: Callable[[], _Part], on_its_own: bool) -> None:
        self.used_column = True
        try:
            self.containers.append(opened())
        except _NoPictureColumn as error:
            if on_its_own:
                raise
            self.skipped += 1  # a table beside pictures: labels, most likely
            self.hints.append(str(error))


def _is_tar(path: Path, head: bytes) -> bool:
    if head[:2] == b"\x1f\x8b":
        return True
    if head[:3] == b"BZh" or head[:6] == b"\xfd7zXZ\0":
        raise PictureError("compressed with bzip2 or xz: only plain and gzip tars are read")
    try:
        return tarfile.is_tarfile(path)  # those of before 1988 have no signature
    except OSError:
        return False


def _head(path: str | Path, size: int = HEAD) -> bytes:
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            return b""
        with open(path, "rb") as file:
            return file.read(size)
    except OSError:
        return b""


def _stamp(path: str | os.PathLike[str]) -> str:
    try:
        facts = os.stat(path)
    except OSError:
        return "missing"
    return f"{facts.st_size}-{facts.st_mtime_ns}"


def _name(text: str) -> str:
    """A name that can be stored as UTF-8, whatever bytes a file system or an archive holds."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _nonexistent(path: Path) -> str:
    existing = path.absolute()
    while not os.path.lexists(existing.parent):
        existing = existing.parent
    try:
        near = did_you_mean(existing.name, os.listdir(existing.parent))
    except OSError:
        near = ""
    missing = "" if existing == path.absolute() else f" (there is no {existing})"
    return f"no such file or folder: {path}{missing}{near}"


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
    """By name; but a saved dataset says itself in which order its files come."""
    position = 0
    if path.suffix == ".arrow":
        try:
            state = json.loads((path.parent / "state.json").read_text("utf-8"))
            position = [f["filename"] for f in state["_data_files"]].index(path.name)
        except (OSError, ValueError, KeyError, TypeError):
            position = 0
    return str(PurePosixPath(relative).parent), position, relative


# ---------------------------------------------------------------------------------------------------------------------
# Files and lists of files


class _Part(Protocol):
    @property
    def kind(self) -> str: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


@dataclass(frozen=True, slots=True)
class _File:
    path: str

    def read(self) -> bytes:
        return read_file(self.path)


@dataclass(frozen=True, slots=True)
class _Nowhere:
    reason: str

    def read(self) -> bytes:
        raise PictureError(self.reason)


@dataclass
class _Files:
    """Names and paths; each file's stamp is taken when its item is made, so listing a million files stays cheap."""

    files: list[tuple[str, str]]
    kind: str = "folder"

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Item]:
        for name, path in self.files:
            yield Item(_name(name), _stamp(path), _place(path))


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
        yield Item(self.name, self.stamp, _Nowhere(self.reason))


def _place(path: str) -> Place:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
        return _Nowhere("a remote address; only files are read")
    return _File(path)


def _read_list(path: Path, column: str | None) -> _Part:
    """Paths in a text file, relative to its folder. A path that is listed twice is one item."""
    try:
        text = path.read_text("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise PictureError(os_reason(error, path)) from None
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
        likely = [lowered[n] for n in _PATH_NAMES if n in lowered]
        likely += [n for n in names if listed and picture_suffix(listed[0].get(n) or "")]
        if not likely:
            raise _NoPictureColumn(path, names)
        column = likely[0]
    elif column not in names:
        raise UnknownName(f"{path} has no column {column!r} (it has {', '.join(names)}){did_you_mean(column, names)}")
    return (row.get(column) or "" for row in listed)


# ---------------------------------------------------------------------------------------------------------------------
# Tar shards


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes inside a plain tar."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                data = os.pread(file, self.size, self.offset)
                while len(data) < self.size and (
                    more := os.pread(file, self.size - len(data), self.offset + len(data))
                ):
                    data += more  # one call reads 2 GB at most
            finally:
                os.close(file)
        except OSError as error:
            raise PictureError(os_reason(error, self.path)) from None
        if len(data) < self.size:
            raise PictureError(f"truncated tar: {os.path.basename(self.path)} ends inside of this member")
        return data


_here = threading.local()  # the compressed tar that this thread is reading


@dataclass(frozen=True, slots=True)
class _PackedSpan:
    """Bytes inside what a .tar.gz decompresses to. The thread's stream is kept, so going forwards decompresses once."""

    path: str
    offset: int
    size: int
    stamp: str

    def read(self) -> bytes:
        key = (os.getpid(), self.path, self.stamp)  # a forked child shares the file's position: it must open its own
        try:
            if getattr(_here, "key", None) != key:
                _here.key, _here.stream = None, None
                _here.stream = gzip.open(self.path, "rb")  # noqa: SIM115  (kept open between calls)
                _here.key = key
            _here.stream.seek(self.offset)
            data = _here.stream.read(self.size)
        except (OSError, EOFError, zlib.error) as error:
            _here.key = None
            if isinstance(error, OSError) and error.errno is not None:
                raise PictureError(os_reason(error, self.path)) from None
            raise PictureError(f"truncated or damaged tar.gz: {error}") from None
        if len(data) < self.size:
            raise PictureError(f"truncated tar: {os.path.basename(self.path)} ends inside of this member")
        return data


class _Marked(tarfile.TarInfo):
    """Tells a tar that ends with its end mark from one that just stops, which `tarfile` passes over in silence."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Marked:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.ended = True  # type: ignore[attr-defined]
            raise


@dataclass
class _Tar:
    """The pictures of one shard: the headers are walked once, for names and offsets."""

    path: str
    name: str
    stamp: str
    packed: bool
    members: list[tuple[str, int, int]] = field(default_factory=list)
    skipped: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)
    kind: str = "tar"

    @classmethod
    def open(cls, path: Path, name: str, stamp: str) -> _Tar:
        packed = _head(path, 2) == b"\x1f\x8b"
        tar = cls(str(path), name, stamp, packed)
        try:
            with (
                gzip.open(path, "rb") if packed else open(path, "rb") as stream,
                tarfile.open(fileobj=stream, mode="r:", tarinfo=_Marked) as archive,
            ):
                tar._index(archive, None if packed else os.path.getsize(path))
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            tar._cut(str(error) or type(error).__name__)
        return tar

    def _index(self, archive: tarfile.TarFile, length: int | None) -> None:
        seen: dict[str, int] = {}
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would remember them all
            base = PurePosixPath(member.name).name
            if member.isdir() or base.startswith("."):
                continue
            is_picture = picture_suffix(base)
            if not is_picture and member.isreg() and PurePosixPath(base).suffix.lower() not in _COMPANIONS:
                stream: Any = archive.fileobj
                stream.seek(member.offset_data)
                is_picture = is_picture_header(stream.read(min(HEAD, member.size)))
            if not is_picture:
                self.skipped += 1
                continue
            name = _name(member.name.removeprefix("./"))
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > 1:
                name += f"~{seen[name]}"  # a tar may hold a name twice
            if not member.isreg() or member.issparse():
                self.broken.append((name, "a link or a sparse file inside a tar; only plain members are read"))
            elif length is not None and member.offset_data + member.size > length:
                self._cut("ends inside of this member", name)
                return
            else:
                self.members.append((name, member.offset_data, member.size))
        if not getattr(archive, "ended", False):
            self._cut("there is no end mark; members may be missing")

    def _cut(self, reason: str, name: str = "end") -> None:
        """Notes that the shard is not whole. Of a compressed one, the last member may be a half: that is tried."""
        if self.packed and self.members:
            last, offset, size = self.members[-1]
            try:
                _PackedSpan(self.path, offset, size, self.stamp).read()
            except PictureError:
                self.members.pop()
                name = last
        self.broken.append((name, f"truncated or damaged tar, after {len(self.members)} pictures: {reason}"))

    def __len__(self) -> int:
        return len(self.members) + len(self.broken)

    def __iter__(self) -> Iterator[Item]:
        for name, offset, size in self.members:
            place = _PackedSpan(self.path, offset, size, self.stamp) if self.packed else _Span(self.path, offset, size)
            yield Item(f"{self.name}#{name}", f"{self.stamp}@{offset}", place)
        for name, reason in self.broken:
            yield Item(f"{self.name}#{name}", self.stamp, _Nowhere(reason))


# ---------------------------------------------------------------------------------------------------------------------
# Tables: Parquet and Arrow


class _NoPictureColumn(DinoError):
    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        super().__init__(
            f"no column of {path} holds pictures or paths (it has {', '.join(columns)}); choose with column="
        )


def _pyarrow(name: str) -> Any:
    return require(name, "search", "reading Parquet and Arrow tables")


def _picture_column(path: Path, schema: Any, wanted: str | None) -> str:
    """The column that holds pictures: a struct with `bytes` (as `datasets` writes it), binary, or paths in a text column."""
    types = _pyarrow("pyarrow").types
    if wanted is not None and wanted not in schema.names:
        raise UnknownName(
            f"{path} has no column {wanted!r} (it has {', '.join(schema.names)}){did_you_mean(wanted, schema.names)}"
        )

    def binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    def fields(kind: Any) -> list[Any]:
        return [kind.field(i) for i in range(kind.num_fields)]

    structs, blobs, texts = [], [], []
    for column in schema:
        kind = getattr(column.type, "storage_type", column.type)
        if types.is_struct(kind) and any(
            f.name == "bytes" and (binary(f.type) or types.is_null(f.type)) for f in fields(kind)
        ):
            structs.append(column.name)
        elif binary(kind):
            blobs.append(column.name)
        elif types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
            texts.append(column.name)
    if wanted is not None:
        if wanted not in structs + blobs + texts:
            raise DinoError(f"column {wanted!r} of {path} is {schema.field(wanted).type}: neither pictures nor paths")
        return wanted
    for candidates, names in ((structs, _IMAGE_NAMES), (blobs, _IMAGE_NAMES), (texts, _PATH_NAMES)):
        lowered = {c.lower(): c for c in candidates}
        for name in names:
            if name in lowered:
                return lowered[name]
        if len(candidates) == 1 and candidates is not texts:
            return candidates[0]
        if candidates and candidates is not texts:
            raise DinoError(
                f"several columns of {path} may hold pictures ({', '.join(candidates)}); choose with column="
            )
    raise _NoPictureColumn(path, schema.names)


def _cell_bytes(value: Any, table: str) -> bytes:
    """A cell's picture: its bytes, or the file that it names, relative to the table's folder."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise PictureError("empty cell (null)")
    if "://" in value:
        raise PictureError(f"a remote address ({value}); only files are read")
    return read_file(os.path.join(os.path.dirname(table), value))


class _Kept:
    """A few opened things, the most recently used ones; threads share them, forked children start anew."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.things: OrderedDict[Any, Any] = OrderedDict()
        self.lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self.things = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        with self.lock:
            if key not in self.things:
                self.things[key] = make()
                while len(self.things) > self.most:
                    self.things.popitem(last=False)
            self.things.move_to_end(key)
            return self.things[key]


_row_groups = _Kept(2)
_arrow_tables = _Kept(16)


class _RowGroup:
    """A window on one column of one row group: batches are decoded forwards and the last 128 MB of them kept.

    A writer may have put a whole file into one row group, so it is never decoded at once; readers that go forwards,
    several threads among them, find their rows in the window, and one that goes far back starts the group again.
    """

    BATCH, KEPT = 64, 128 << 20  # rows, bytes

    def __init__(self, path: str, group: int, column: str) -> None:
        parquet = _pyarrow("pyarrow.parquet")
        self.file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        self.group, self.column = group, column
        self.lock = threading.Lock()
        self._restart()

    def _restart(self) -> None:
        self.window: deque[tuple[int, Any]] = deque()  # (first row, values)
        self.size = self.next = 0
        self.failed: Exception | None = None
        self.batches = self.file.iter_batches(
            self.BATCH, row_groups=[self.group], columns=[self.column], use_threads=False
        )

    def value(self, row: int) -> Any:
        with self.lock:
            if self.window and row < self.window[0][0]:
                self._restart()
            while row >= self.next:
                if self.failed is not None:
                    raise self.failed
                try:
                    values = next(self.batches).column(0)
                except Exception as error:
                    self.failed = error  # and every later row with it
                    raise
                self.window.append((self.next, values))
                self.next += len(values)
                self.size += values.nbytes
                while self.size > self.KEPT and len(self.window) > 1:
                    self.size -= self.window.popleft()[1].nbytes
            values_at = next((first, values) for first, values in reversed(self.window) if first <= row)
        return values_at[1][row - values_at[0]].as_py()


@dataclass(frozen=True, slots=True)
class _ParquetCell:
    path: str
    stamp: str
    column: str
    group: int
    row: int  # in its group

    def read(self) -> bytes:
        key = (self.path, self.stamp, self.column, self.group)
        try:
            group = _row_groups.get(key, lambda: _RowGroup(self.path, self.group, self.column))
            value = group.value(self.row)
        except Exception as error:  # pyarrow raises as many kinds as decoders do
            raise PictureError(_table_reason(error, self.path)) from None
        return _cell_bytes(value, self.path)


@dataclass
class _Parquet:
    path: str
    name: str
    stamp: str
    column: str
    groups: list[int]  # rows in each
    kind: str = "parquet"

    @classmethod
    def open(cls, path: Path, name: str, stamp: str, wanted: str | None) -> _Parquet:
        parquet = _pyarrow("pyarrow.parquet")
        try:
            with parquet.ParquetFile(path) as file:
                schema, facts = file.schema_arrow, file.metadata
                groups = [facts.row_group(g).num_rows for g in range(facts.num_row_groups)]
        except Exception as error:
            raise PictureError(_table_reason(error, path)) from None
        return cls(str(path), name, stamp, _picture_column(path, schema, wanted), groups)

    def __len__(self) -> int:
        return sum(self.groups)

    def __iter__(self) -> Iterator[Item]:
        number = 0
        for group, rows in enumerate(self.groups):
            for row in range(rows):
                place = _ParquetCell(self.path, self.stamp, self.column, group, row)
                yield Item(f"{self.name}#{number}", f"{self.stamp}@{number}", place)
                number += 1


def _arrow_batches(path: str) -> tuple[list[Any], Any, str]:
    """The record batches of an Arrow file, mapped and not read; its schema; and why it ends early, if it does."""
    arrow, ipc = _pyarrow("pyarrow"), _pyarrow("pyarrow.ipc")
    mapped = arrow.memory_map(path)
    batches: list[Any] = []
    if mapped.read(6) == b"ARROW1":
        reader = ipc.open_file(mapped)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)], reader.schema, ""
    mapped.seek(0)
    stream = ipc.open_stream(mapped)
    try:
        batches.extend(stream)
    except Exception as error:
        return batches, stream.schema, _table_reason(error, path)
    return batches, stream.schema, ""


@dataclass(frozen=True, slots=True)
class _ArrowCell:
    path: str
    stamp: str
    column: str
    batch: int
    row: int  # in its batch

    def read(self) -> bytes:
        try:
            batches = _arrow_tables.get((self.path, self.stamp), lambda: _arrow_batches(self.path)[0])
            value = batches[self.batch].column(self.column)[self.row].as_py()
        except Exception as error:
            raise PictureError(_table_reason(error, self.path)) from None
        return _cell_bytes(value, self.path)


@dataclass
class _Arrow:
    """One Arrow file, as `datasets.save_to_disk` writes them (a stream) or as Feather does (a file)."""

    path: str
    name: str
    stamp: str
    column: str
    batches: list[int]  # rows in each
    broken: str
    kind: str = "datasets"

    @classmethod
    def open(cls, path: Path, name: str, stamp: str, wanted: str | None) -> _Arrow:
        _pyarrow("pyarrow")
        try:
            batches, schema, broken = _arrow_batches(str(path))
        except Exception as error:
            raise PictureError(_table_reason(error, path)) from None
        column = _picture_column(path, schema, wanted)
        return cls(str(path), name, stamp, column, [b.num_rows for b in batches], broken)

    def __len__(self) -> int:
        return sum(self.batches) + bool(self.broken)

    def __iter__(self) -> Iterator[Item]:
        number = 0
        for batch, rows in enumerate(self.batches):
            for row in range(rows):
                place = _ArrowCell(self.path, self.stamp, self.column, batch, row)
                yield Item(f"{self.name}#{number}", f"{self.stamp}@{number}", place)
                number += 1
        if self.broken:
            yield Item(f"{self.name}#end", self.stamp, _Nowhere(f"truncated after {number} rows: {self.broken}"))


def _table_reason(error: Exception, path: str | os.PathLike[str]) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return os_reason(error, path)
    if isinstance(error, (StopIteration, IndexError)):
        return f"{os.path.basename(path)} has changed: this row is gone"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{os.path.basename(path)} cannot be read: {text[:160]}"
