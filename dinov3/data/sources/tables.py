"""Tables with a column of images: Parquet, and Arrow as `datasets` saves it. Rows are decoded at need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from dinov3.data.images import check_size, most_bytes, os_reason, read_file
from dinov3.data.sources.items import FORWARD, PATH_NAMES, NoImageColumn, Part, Place, Unreadable
from dinov3.data.sources.remote import is_remote, opened, size_of
from dinov3.errors import DinoError, ImageError, only_known, require

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
    code = "import sys; from dinov3.data.sources.tables import _validate; _validate(sys.argv[1:])"
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
