"""Files that hold many images: tar shards, Parquet and Arrow tables, videos. One form of `items.Part` each."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
import tarfile
import threading
import zlib
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from dinov3.data.images import HEAD, check_size, image_suffix, is_image_header, most_bytes, os_reason, read_file
from dinov3.data.sources.items import (
    COMPANIONS,
    FORWARD,
    PATH_NAMES,
    Names,
    NoImageColumn,
    Part,
    Place,
    Unreadable,
    first_bytes,
    is_remote,
    opened,
    read_range,
    size_of,
    storable,
)
from dinov3.errors import DinoError, ImageError, only_known, require

# ---- tar shards ------------------------------------------------------------------------------------------------------
# Tar shards, plain and compressed: headers are walked once, members are read at their offset.


TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
MOST_HEADER = 1 << 20  # bytes of a long name or of the extended attributes of a member


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes inside a plain tar."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        if is_remote(self.path):
            return self._whole(read_range(self.path, self.offset, self.size))
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
            raise ImageError(os_reason(error, self.path)) from None
        return self._whole(data)

    def _whole(self, data: bytes) -> bytes:
        if len(data) < self.size:
            raise ImageError(f"truncated tar: {os.path.basename(self.path)} ends inside of this member")
        return data


PACKED_BLOCK = 1 << 20  # bytes of what a .tar.gz decompresses to


def _unpacked(path: str) -> Iterator[tuple[bytes, int]]:
    """Blocks of what a .tar.gz decompresses to, the last one shorter; what comes before damage is in the last."""
    with opened(path) as file, gzip.GzipFile(fileobj=file) as stream:
        while True:
            block = bytearray()
            try:
                while len(block) < PACKED_BLOCK and (more := stream.read1(PACKED_BLOCK - len(block))):
                    block += more
            except (OSError, EOFError, zlib.error):
                yield bytes(block), len(block)
                raise
            yield bytes(block), len(block)
            if len(block) < PACKED_BLOCK:
                return


@dataclass(frozen=True, slots=True)
class _PackedSpan:
    """Bytes inside what a .tar.gz decompresses to."""

    path: str
    offset: int
    size: int
    stamp: str

    def read(self) -> bytes:
        data, number, start = b"", self.offset // PACKED_BLOCK, self.offset % PACKED_BLOCK
        try:
            while len(data) < self.size:
                block = FORWARD.block((self.path, self.stamp), number, lambda: _unpacked(self.path))
                data += block[start : start + self.size - len(data)]
                number, start = number + 1, 0
        except StopIteration:
            pass
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise ImageError(os_reason(error, self.path)) from None
            raise ImageError(f"truncated or damaged tar.gz: {error}") from None
        if len(data) < self.size:
            raise ImageError(f"truncated tar: {os.path.basename(self.path)} ends inside of this member")
        return data


class _EndAware(tarfile.TarInfo):
    """A member that notes whether the tar ended with its end mark; `tarfile` is silent where it does not."""

    HEADERS = (
        tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
    )  # fmt: skip

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _EndAware:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.ended = True  # type: ignore[attr-defined]
            raise

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in self.HEADERS and self.size > MOST_HEADER:  # `tarfile` would read it as a whole
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


@dataclass
class Tar(Part):
    """The images of one shard: the headers are walked once, for names and offsets."""

    path: str
    name: str
    stamp: str
    packed: bool
    members: Names = field(default_factory=Names)
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("Q"))
    skipped: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)
    kind: str = "tar"

    @classmethod
    def open(cls, path: Path | str, name: str, stamp: str) -> Tar:
        packed = first_bytes(path, 2) == b"\x1f\x8b"
        tar = cls(str(path), name, stamp, packed)
        try:
            with (
                opened(path) as file,
                gzip.GzipFile(fileobj=file) if packed else file as stream,
                tarfile.open(fileobj=stream, mode="r:", tarinfo=_EndAware) as archive,
            ):
                tar._index(archive, None if packed else size_of(path))
        except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, OverflowError, RecursionError) as error:
            tar._cut(str(error) or type(error).__name__)
        return tar

    def _index(self, archive: tarfile.TarFile, length: int | None) -> None:
        seen: dict[str, int] = {}
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would hold them all
            base = PurePosixPath(member.name).name
            if self.packed and member.size > most_bytes():  # what follows would be found by decompressing all of it
                self._cut(f"{base} has {member.size >> 20:,} MB; unpack the archive", storable(member.name))
                return
            if member.isdir() or base.startswith("."):
                continue
            is_image = image_suffix(base)
            if not is_image and member.isreg() and PurePosixPath(base).suffix.lower() not in COMPANIONS:
                stream: Any = archive.fileobj
                stream.seek(member.offset_data)
                is_image = is_image_header(stream.read(min(HEAD, member.size)))
            if not is_image:
                self.skipped += 1
                continue
            name = storable(member.name.removeprefix("./"))
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > 1:
                name += f"~{seen[name]}"  # a tar may hold a name twice
            try:
                check_size(member.size)
            except ImageError as error:
                self.broken.append((name, str(error)))
                continue
            if not member.isreg() or member.issparse():
                self.broken.append((name, "a link or a sparse file inside a tar; only plain members are read"))
            elif length is not None and member.offset_data + member.size > length:
                self._cut("ends inside of this member", name)
                return
            else:
                self.members.append(name)
                self.offsets.append(member.offset_data)
                self.sizes.append(member.size)
        if not getattr(archive, "ended", False):
            self._cut("there is no end mark; members may be missing")

    def _cut(self, reason: str, name: str = "end") -> None:
        """Notes that the shard is not whole. Of a compressed one, the last member may be a half: that is tried."""
        if self.packed and self.members:
            try:
                self.place_of(len(self.members) - 1).read()
            except ImageError:
                name = self.members.pop()
                self.offsets.pop()
                self.sizes.pop()
        self.broken.append((name, f"truncated or damaged tar, after {len(self.members)} images: {reason}"))

    def __len__(self) -> int:
        return len(self.members) + len(self.broken)

    def forward_runs(self) -> list[tuple[int, int]]:
        return [(len(self), sum(self.sizes))] if self.packed else []

    def path_of(self, i: int) -> str:
        n = len(self.members)
        return f"{self.name}#{self.members[i] if i < n else self.broken[i - n][0]}"

    def stamp_of(self, i: int) -> str:
        return f"{self.stamp}@{self.offsets[i]}" if i < len(self.members) else self.stamp

    def place_of(self, i: int) -> Place:
        n = len(self.members)
        if i >= n:
            return Unreadable(self.broken[i - n][1])
        if self.packed:
            return _PackedSpan(self.path, self.offsets[i], self.sizes[i], self.stamp)
        return _Span(self.path, self.offsets[i], self.sizes[i])


def is_tar(path: Path, head: bytes) -> bool:
    if head[:2] == b"\x1f\x8b":
        return True
    if head[:3] == b"BZh" or head[:6] == b"\xfd7zXZ\0":
        raise ImageError("compressed with bzip2 or xz: only plain and gzip tars are read")
    try:
        return tarfile.is_tarfile(path)  # those of before 1988 have no signature
    except OSError:
        return False


# ---- Parquet and Arrow -----------------------------------------------------------------------------------------------
# Tables with a column of images: Parquet, and Arrow as `datasets` saves it. Rows are decoded at need.


# A table's column is found by its type; where several would do, one with the likeliest name.
# fmt: off
_IMAGE_NAMES = (
    "image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "pixels", "content",
)
# fmt: on


def _pyarrow(name: str) -> Any:
    return require(name, "search", "reading Parquet and Arrow tables")


def _image_column(path: Path | str, schema: Any, wanted: str | None) -> str:
    """The column that holds images: a struct with `bytes` (as `datasets` writes it), binary, or paths in a text column."""
    types = _pyarrow("pyarrow").types
    if wanted is not None:
        only_known(f"{path} has no column", [wanted], schema.names)

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
            raise DinoError(f"column {wanted!r} of {path} is {schema.field(wanted).type}: neither images nor paths")
        return wanted
    for candidates, names in ((structs, _IMAGE_NAMES), (blobs, _IMAGE_NAMES), (texts, PATH_NAMES)):
        lowered = {c.lower(): c for c in candidates}
        for name in names:
            if name in lowered:
                return lowered[name]
        if len(candidates) == 1 and candidates is not texts:
            return candidates[0]
        if candidates and candidates is not texts:
            raise DinoError(f"several columns of {path} may hold images ({', '.join(candidates)}); choose with column=")
    raise NoImageColumn(path, schema.names)


def _cell_bytes(value: Any, table: str) -> bytes:
    """A cell's image: its bytes, or the file that it names, relative to the table's folder."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        check_size(len(value))
        return value
    if not isinstance(value, str) or not value:
        raise ImageError("empty cell (null)")
    if "://" in value:
        raise ImageError(f"a remote address ({value}); only files are read")
    return read_file(os.path.join(os.path.dirname(table), value))


class _Cache:
    """The most recently opened files; shared by threads, emptied in forked children."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.opened: OrderedDict[Any, Any] = OrderedDict()
        self.lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self.opened = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        with self.lock:
            if key not in self.opened:
                self.opened[key] = make()
                while len(self.opened) > self.most:
                    self.opened.popitem(last=False)
            self.opened.move_to_end(key)
            return self.opened[key]


_arrow_tables = _Cache(16)


BATCH, MOST_BATCH = 64, 128 << 20  # rows and bytes that are decoded at once


def _column_bytes(group: Any, column: str) -> tuple[int, int]:
    """Bytes of a column of a row group, decompressed and in the file."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]
    return sum(c.total_uncompressed_size for c in chunks), sum(c.total_compressed_size for c in chunks)


def _for_arrow(path: str | Path) -> Any:
    return opened(path) if is_remote(path) else path  # what it opens itself it reads without the interpreter


def _rows_at_once(size: int) -> int:
    """Rows of a block of a row group whose column has `size` bytes: a batch is laid out whole, and a dictionary may repeat
    one large value in every row."""
    return max(1, min(BATCH, MOST_BATCH // max(1, size)))


def _row_blocks(path: str, group: int, column: str) -> Iterator[tuple[Any, int]]:
    """The column of a row group in blocks of rows: a writer may have put a whole file into one group, so it is never
    decoded at once. Raises `ImageError` where its cells must be larger than is read, or hardly anything of it is in the
    file: encoded images do not compress."""
    file = _pyarrow("pyarrow.parquet").ParquetFile(_for_arrow(path), pre_buffer=False, buffer_size=1 << 20)
    facts = file.metadata.row_group(group)
    size, packed = _column_bytes(facts, column)
    check_size(size // max(1, facts.num_rows))
    if size > most_bytes() and size > 10 * packed:
        raise ImageError(f"{packed:,} bytes decompress to {size >> 20:,} MB: these are no images")
    for batch in file.iter_batches(_rows_at_once(size), row_groups=[group], columns=[column], use_threads=False):
        yield batch.column(0), batch.column(0).nbytes


@dataclass(frozen=True, slots=True)
class _ParquetCell:
    path: str
    stamp: str
    column: str
    group: int
    row: int  # in its group
    at_once: int  # rows of a block

    def read(self) -> bytes:
        key = (self.path, self.stamp, self.column, self.group)
        number, row = divmod(self.row, self.at_once)
        try:
            values = FORWARD.block(key, number, lambda: _row_blocks(self.path, self.group, self.column))
            value = values[row].as_py()
        except ImageError:
            raise
        except Exception as error:  # pyarrow raises as many kinds as decoders do
            raise ImageError(_table_reason(error, self.path)) from None
        return _cell_bytes(value, self.path)


@dataclass
class _Table(Part):
    path: str
    name: str
    stamp: str
    column: str
    rows: list[int]  # of each row group or record batch

    def __post_init__(self) -> None:
        self.starts = list(accumulate(self.rows, initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def path_of(self, i: int) -> str:
        return f"{self.name}#{i}"

    def stamp_of(self, i: int) -> str:
        return f"{self.stamp}@{i}"

    def _group(self, i: int) -> tuple[int, int]:
        """(number of the group, row in it)"""
        group = bisect_right(self.starts, i) - 1
        return group, i - self.starts[group]


@dataclass
class Parquet(_Table):
    sizes: list[int]  # bytes of the column in each row group
    kind: str = "parquet"

    @classmethod
    def open(cls, path: Path | str, name: str, stamp: str, wanted: str | None) -> Parquet:
        parquet = _pyarrow("pyarrow.parquet")
        try:
            with parquet.ParquetFile(_for_arrow(path)) as file:
                schema, facts = file.schema_arrow, file.metadata
                groups = [facts.row_group(g).num_rows for g in range(facts.num_row_groups)]
                if min(groups, default=0) < 0 or sum(groups) > size_of(path):
                    raise ValueError(f"{sum(groups):,} rows in {size_of(path):,} bytes")
                image_column = _image_column(path, schema, wanted)
                sizes = [_column_bytes(facts.row_group(g), image_column)[0] for g in range(facts.num_row_groups)]
        except DinoError:
            raise
        except Exception as error:
            raise ImageError(_table_reason(error, path)) from None
        return cls(str(path), name, stamp, image_column, groups, sizes)

    def place_of(self, i: int) -> Place:
        group, row = self._group(i)
        return _ParquetCell(self.path, self.stamp, self.column, group, row, _rows_at_once(self.sizes[group]))

    def forward_runs(self) -> list[tuple[int, int]]:
        return list(zip(self.rows, self.sizes))


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


def arrow_damage(paths: Sequence[str]) -> dict[str, str]:
    """{path: reason} of the Arrow files that do not hold what they describe. A damaged one may end the process that reads
    it, so a child process reads them first, with a bound on memory; files that pass are read here."""
    _pyarrow("pyarrow")
    damage: dict[str, str] = {}
    rest = list(paths)
    code = "import sys; from dinov3.data.sources.containers import _validate; _validate(sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    while rest:
        command = [sys.executable, "-P", "-c", code, *rest[:500]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        damage |= {path: json.loads(line) for path, line in zip(rest, lines) if line != "null"}
        rest = rest[len(lines) :]
        if done.returncode < 0:
            path = rest.pop(0)
            damage[path] = f"{os.path.basename(path)} cannot be read: it is damaged, a process that read it crashed"
        elif done.returncode:
            raise DinoError(f"Arrow files cannot be checked: {done.stderr[-300:]}")
    return damage


def _validate(paths: Sequence[str]) -> None:
    """In a child process: a line for each file, null or what is wrong with it."""
    for path in paths:
        try:
            import resource

            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            most = used + 4 * most_bytes() + 2 * os.path.getsize(path)  # its mapping, and what decompresses from it
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
        except (ImportError, OSError, ValueError):
            pass  # no such limits on this system
        reason = None
        try:
            for batch in _arrow_batches(path)[0]:
                batch.validate(full=True)
        except Exception as error:
            reason = _table_reason(error, path)
        print(json.dumps(reason), flush=True)


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
            raise ImageError(_table_reason(error, self.path)) from None
        return _cell_bytes(value, self.path)


@dataclass
class Arrow(_Table):
    """One Arrow file, as `datasets.save_to_disk` writes them (a stream) or as Feather does (a file)."""

    broken: str  # why it ends early, if it does: one more item
    kind: str = "datasets"

    @classmethod
    def open(cls, path: Path, name: str, stamp: str, wanted: str | None) -> Arrow:
        _pyarrow("pyarrow")
        try:
            batches, schema, broken = _arrow_batches(str(path))
            column = _image_column(path, schema, wanted)
        except DinoError:
            raise
        except Exception as error:
            raise ImageError(_table_reason(error, path)) from None
        return cls(str(path), name, stamp, column, [b.num_rows for b in batches], broken)

    def __len__(self) -> int:
        return super().__len__() + bool(self.broken)

    def path_of(self, i: int) -> str:
        return super().path_of(i) if i < self.starts[-1] else f"{self.name}#end"

    def stamp_of(self, i: int) -> str:
        return super().stamp_of(i) if i < self.starts[-1] else self.stamp

    def place_of(self, i: int) -> Place:
        if i < self.starts[-1]:
            return _ArrowCell(self.path, self.stamp, self.column, *self._group(i))
        return Unreadable(f"truncated after {i} rows: {self.broken}")


def _table_reason(error: Exception, path: str | os.PathLike[str]) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return os_reason(error, path)
    if isinstance(error, (StopIteration, IndexError)):
        return f"{os.path.basename(path)} has changed: this row is gone"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{os.path.basename(path)} cannot be read: {text[:160]}"


# ---- videos ----------------------------------------------------------------------------------------------------------
# Frames of a video file at a rate, as items of a source: `clip.mp4#12.500s`. Decoded by PyAV (extra `video`).


VIDEOS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg")
KEPT = 128 << 20  # bytes of frames that threads may still ask for


class _Reader:
    """Goes forwards through one video; the last frames wait, because threads come in any order."""

    def __init__(self, path: str, fps: float) -> None:
        self.path, self.fps, self.lock = path, fps, threading.Lock()
        self._restart()

    def _restart(self) -> None:
        container = require("av", "video", "reading video files").open(self.path)
        stream = container.streams.video[0]
        self.frames = container.decode(stream)
        self.rate, self.start = float(stream.average_rate or 25), _start(stream)
        self.next = self.number = self.size = 0
        self.waiting: OrderedDict[int, bytes] = OrderedDict()
        self.last: Any = None

    def frame(self, k: int) -> bytes:
        """The first frame at or after k / fps seconds as a PPM; the last one while it is shown, and a second longer."""
        with self.lock:
            if k < self.next and k not in self.waiting:
                self._restart()
            while k >= self.next:
                frame = next(self.frames, None)
                if frame is None:
                    break
                time = self.number / self.rate if frame.time is None else frame.time - self.start
                self.number += 1
                self.last = (frame, time + max(1 / self.rate, float((frame.duration or 0) * (frame.time_base or 0))))
                if time < self.next / self.fps - 1e-6:
                    continue
                ppm = _ppm(frame)
                while time >= self.next / self.fps - 1e-6:  # one frame may serve several instants
                    self._keep(ppm)
            if k >= self.next:
                if self.last is None or self.last[1] + 1 < k / self.fps:
                    raise ImageError(f"truncated video: it ends before {k / self.fps:.3f} s")
                return _ppm(self.last[0])
            return self.waiting[k]

    def _keep(self, ppm: bytes) -> None:
        self.waiting[self.next] = ppm
        self.next += 1
        self.size += len(ppm)
        while self.size > KEPT and len(self.waiting) > 1:
            self.size -= len(self.waiting.popitem(last=False)[1])


def _start(stream: Any) -> float:
    """Seconds on the file's clock at which a video begins: zero in most, any number in recordings and cut pieces."""
    return float((stream.start_time or 0) * stream.time_base)


def _ppm(frame: Any) -> bytes:
    image = frame.to_image()
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


_reader = threading.Lock()
_open: OrderedDict[tuple[str, str, float], _Reader] = OrderedDict()  # the two videos that were read last


@dataclass(frozen=True, slots=True)
class _Frame:
    path: str
    stamp: str
    fps: float
    k: int

    def read(self) -> bytes:
        try:
            with _reader:
                key = (self.path, self.stamp, self.fps)
                reader = _open.pop(key, None) or _Reader(self.path, self.fps)
                _open[key] = reader
                while len(_open) > 2:
                    _open.popitem(last=False)
            return reader.frame(self.k)
        except DinoError:
            raise
        except Exception as error:  # a decoder raises anything
            raise _broken(error) from None


def frame_at(path: str, seconds: float) -> bytes:
    """The frame that `Video` names `{path}#{seconds}s`, as a PPM: the first at or after that time. Raises `ImageError`."""
    after = max(0.0, seconds - 0.0005 + 1e-9)  # names are rounded to milliseconds
    try:
        with require("av", "video", "reading video files").open(path) as container:
            stream = container.streams.video[0]
            start = _start(stream)
            container.seek(int((start + after) / stream.time_base), stream=stream)  # the key frame before
            for number, frame in enumerate(container.decode(stream)):
                if frame.time is None or (number == 0 and frame.time - start > seconds + 0.0005):
                    break  # no times, or not before: from the beginning
                if frame.time - start >= after - 1e-6:
                    return _ppm(frame)
        return _Reader(path, 1 / after if after else 1.0).frame(int(after > 0))
    except DinoError:
        raise
    except Exception as error:
        raise _broken(error) from None


def _broken(error: Exception) -> ImageError:
    reason = "it holds no video" if isinstance(error, IndexError) else " ".join(str(error).split())[:160]
    return ImageError(f"broken video: {reason}")


@dataclass
class Video(Part):
    """One video file; `frames` of it are taken, `fps` a second."""

    path: str
    name: str
    stamp: str
    fps: float
    frames: int
    kind: str = "video"

    @classmethod
    def open(cls, path: Path, name: str, stamp: str, fps: float) -> Video:
        av = require("av", "video", "reading video files")
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                if stream.duration:
                    seconds = float(stream.duration * stream.time_base)
                elif container.duration:  # Matroska's is the time of the end
                    seconds = container.duration / 1e6 - _start(stream) * ("matroska" in container.format.name)
                else:
                    seconds = stream.frames / float(stream.average_rate or 25)
        except Exception as error:
            raise _broken(error) from None
        return cls(str(path), name, stamp, fps, max(1, math.ceil(seconds * fps - 1e-6)))

    def __len__(self) -> int:
        return self.frames

    def path_of(self, i: int) -> str:
        return f"{self.name}#{i / self.fps:.3f}s"

    def stamp_of(self, i: int) -> str:
        return f"{self.stamp}@{i / self.fps:.3f}"

    def place_of(self, i: int) -> Place:
        return _Frame(self.path, self.stamp, self.fps, i)
