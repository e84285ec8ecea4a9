"""Where embeddings live: one LanceDB database with a table `images`, a row for every image.

The store can be killed at any moment. Every write is one commit that is either wholly there or not at all, and what
was acknowledged (the call returned) stays. What the store holds (model, preprocessing, pooling, …) is written into the
table's Arrow schema metadata: it arrives in the commit that creates the table, so no store exists without its facts,
and it survives appends, upserts, new columns and compaction. `uri` is a folder, or `s3://…`, `gs://…`, `az://…` with
credentials from the usual environment variables.

One writer at a time: `create` and `open_or_create` take the folder's lock, `open` takes it with the first write,
`close` gives it back. It is an `flock`, so a dead process holds nothing. Readers need no lock and see each commit at
once. On object storage, and where there is no `flock` (Windows), nobody checks: two writers may store a path twice.

A store has a root, the folder of its first source. Paths below it are stored relative to it, others absolute; methods
take and return absolute paths, SQL filters see what is stored. A moved folder is one commit (`set_root`). The folders
that were embedded are kept too (`sources`): while one is not there, its images do not count as deleted.

LanceDB runs threads that do not survive `fork`: open the store in the process that uses it, and start workers with
`spawn` or before the store is opened. A store that notices it was carried through a fork raises.

Left out: computing features (`pipeline.py`), searching (`search.py`), upkeep (`manage.py`), several models in one store.

Shapes: D width of the vector, h × w grid of patches, P width of a patch's features, N rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from dinov3.embedding.place import (
    FAILED,
    IMAGES,
    LOCK,
    check_filter,
    connect,
    first_line,
    has_table,
    place_of,
    refuse_damaged,
    saying,
)
from dinov3.embedding.schema import (
    Failure,
    Row,
    StoreFacts,
    arrow_schema,
    as_matrix,
    checksums,
    decode_patches,
    encode_patches,
    facts_of,
    failed_schema,
    new_id,
    patch_columns,
    path_checksum,
    root_metadata,
    root_of,
    sources_metadata,
    sources_of,
)
from dinov3.errors import StoreError, only_known
from dinov3.files import Lock, nonexistent

if TYPE_CHECKING:
    import pyarrow as pa

# Every commit adds a fragment, and every commit rewrites the manifest that lists them all (about 80 bytes each).
# Compacting merges fragments but rewrites the rows. Compacting once F fragments are loose costs as much as the
# manifests in between when F = sqrt(2 · bytes of rows / 80): the point of least writing, about 2,500 for 150,000 rows
# of D = 384.
MANIFEST_BYTES_PER_FRAGMENT = 80
FEWEST_FRAGMENTS = 256
NARROW_ROWS = 1 << 17  # read at a time, of columns without vectors: an eighth of the time of LanceDB's own batches
HIDDEN = ("id", "checksum", "vector", "patches")  # columns that are read only by name
KEEP_OLD_VERSIONS = timedelta(minutes=1)  # during a job: a reader in the middle of a scan still finds its files

# What two runs must share to write into one store, and the option a person would change.
_IDENTITY = {
    "model": "the same --model",
    "preprocessing": "the same --size",
    "pooling": "the same pooling",
    "layer": "the same layer",
    "normed": "the same final norm",
    "dim": "the same --model",
    "vector_dtype": "the same vector precision",
    "patches": "the same patch precision",
}


@dataclasses.dataclass(frozen=True)
class Copy:
    """An image with the content of a stored one: the row's path, the image's path and stamp, and their content."""

    old: str
    new: str
    stamp: str
    content_hash: str


class EmbeddingStore:
    """A table of embedded images, unique by path. Made by `create`, `open` or `open_or_create`; a context manager."""

    def __init__(self, uri: str, database: Any, table: Any, facts: StoreFacts, lock: Lock | None) -> None:
        self.uri, self.facts = uri, facts
        self.root, self._sources = root_of(table.schema, uri), sources_of(table.schema, uri)
        self._database, self._table, self._failed_table, self._lock = database, table, None, lock
        self._pen: Any = None  # the writer's handle on the table, see _claim
        self._pid = os.getpid()
        self._paths: set[str] | None = None  # the writer's: what append must not add again
        self._loose = self._bytes = 0

    # ------------------------------------------------------------------------------------------ opening and closing

    @classmethod
    def create(cls, uri: str | os.PathLike[str], about: StoreFacts, root: str = "") -> EmbeddingStore:
        """A new, empty store, open for writing; raises where there is already one, or other files.

        Paths below the folder `root` are stored relative to it.
        """
        uri, folder = place_of(uri)
        lock = None
        if folder is not None:
            if folder.exists() and not folder.is_dir():
                raise StoreError(f"{uri} is a file; an embedding store needs a folder of its own")
            refuse_damaged(uri, folder)
            if folder.is_dir() and not (folder / f"{IMAGES}.lance").is_dir():
                foreign = sorted(p.name for p in folder.iterdir() if p.name[0] != "." and p.name != f"{FAILED}.lance")
                if foreign:
                    raise StoreError(
                        f"{uri} holds other files ({foreign[0]}, …) and no embedding store; give a new folder"
                    )
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"cannot make the folder {uri}: {error.strerror}") from error
            lock = Lock(folder / LOCK, f"the store at {uri}", StoreError)
        try:
            database = connect(uri)
            if has_table(database, uri):
                raise StoreError(f"{uri} already holds an embedding store; open it, or give another --out")
            with saying(f"cannot create a store at {uri}"):
                if not has_table(database, uri, FAILED):
                    database.create_table(FAILED, schema=failed_schema())
                # The one commit that makes a store. Killed before it: no store. Killed after it: a complete, empty one.
                table = database.create_table(IMAGES, schema=arrow_schema(about, root))
        except BaseException:
            if lock:
                lock.release()
            raise
        return cls(uri, database, table, about, lock)

    @classmethod
    def open(cls, uri: str | os.PathLike[str]) -> EmbeddingStore:
        """An existing store, for reading; its first write takes the lock."""
        uri, folder = place_of(uri)
        if folder is not None:
            if not folder.exists():
                raise StoreError(f"no embedding store (`dinov3 embed` makes one): {nonexistent(uri)}")
            refuse_damaged(uri, folder)
            if not (folder / f"{IMAGES}.lance").is_dir():
                raise StoreError(f"{uri} is not an embedding store (it has no table {IMAGES!r})")
        database = connect(uri)
        if not has_table(database, uri):
            raise StoreError(
                f"there is no embedding store at {uri} (or its creation was interrupted); embed into it first"
            )
        with saying(f"the store at {uri} cannot be opened, it may be damaged"):
            table = database.open_table(IMAGES)
            schema = table.schema
        return cls(uri, database, table, facts_of(schema, uri), None)

    @classmethod
    def open_or_create(cls, uri: str | os.PathLike[str], about: StoreFacts, root: str = "") -> EmbeddingStore:
        """The store at `uri` for more rows like `about`, made if need be (then with `root`), open for writing.

        `StoreError` if it holds embeddings of another kind; one whose creation was cut short is completed.
        """
        uri, folder = place_of(uri)
        if folder is not None and not (folder / f"{IMAGES}.lance").is_dir():
            return cls.create(uri, about, root)
        if folder is not None:
            refuse_damaged(uri, folder)
        if not has_table(connect(uri), uri):
            return cls.create(uri, about, root)
        store = cls.open(uri)
        store.check_same(about)
        store._claim()
        return store

    def check_same(self, about: StoreFacts) -> None:
        """`StoreError` if the store holds another kind of embeddings."""
        for name, way_out in _IDENTITY.items():
            here, given = getattr(self.facts, name), getattr(about, name)
            if here != given:
                raise StoreError(
                    f"the store at {self.uri} holds embeddings with {name.replace('_', ' ')} {here!r}, not {given!r}; "
                    f"give another --out, or {way_out}"
                )

    def close(self) -> None:
        """Gives the writer's lock back; the store can still be read."""
        if self._lock:
            self._lock.release()
        self._lock = self._pen = self._paths = None

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"EmbeddingStore({self.uri!r}, {self.facts.model}, dim={self.facts.dim})"

    # ------------------------------------------------------------------------------------------------------- paths

    def stored(self, path: str) -> str:
        """A path as it is stored: relative to the root if it lies below it."""
        base = self.root.rstrip(os.sep) + os.sep
        return path[len(base) :] if self.root and path.startswith(base) else path

    def full(self, path: str) -> str:
        """A stored path as an absolute one."""
        return os.path.join(self.root, path) if self.root else path

    def set_root(self, root: str) -> None:
        """The folder of the images has moved: relative paths start from `root` now. One commit, no row is rewritten."""
        self._describe_paths(root_metadata(root))
        self.root, self._paths = root, None

    @property
    def sources(self) -> list[str]:
        """The folders that were embedded, absolute; those below the root move with it."""
        return [os.path.normpath(self.full(folder)) for folder in self._sources]

    def add_sources(self, folders: Iterable[str]) -> None:
        """Keeps the names of folders that are embedded; one commit if any is new."""
        stored = ("." if folder == self.root else self.stored(folder) for folder in folders)
        sources = list(dict.fromkeys([*self._sources, *stored]))
        if sources != self._sources:
            self._describe_paths(sources_metadata(sources))
            self._sources = sources

    def _describe_paths(self, metadata: Mapping[bytes, bytes]) -> None:
        pen = self._claim()
        with saying(f"cannot write to the store at {self.uri}"):
            text = {key.decode(): value.decode() for key, value in metadata.items()}
            pen.update_field_metadata({"path": "path", "metadata": text})

    # ----------------------------------------------------------------------------------------------------- reading

    @property
    def table(self) -> Any:
        """The LanceDB table, for what this class does not do."""
        if os.getpid() != self._pid:
            raise StoreError("an embedding store does not survive fork: open it in this process, or use spawn")
        return self._table

    @property
    def columns(self) -> list[str]:
        return list(self.table.schema.names)

    def __len__(self) -> int:
        return self.count()

    def count(self, where: str | None = None) -> int:
        """How many rows there are, or how many pass the SQL filter `where`."""
        return self.read(lambda table: int(table.count_rows(where)), where)

    def known(self) -> dict[str, str]:
        """path → stamp of every embedded image; reads those two columns only."""
        table = self.rows(["path", "stamp"])
        return dict(zip(table["path"].to_pylist(), table["stamp"].to_pylist()))

    def known_failed(self) -> dict[str, str]:
        """path → stamp of every image that could not be embedded."""
        return {failure.path: failure.stamp for failure in self.failures()}

    def failures(self) -> list[Failure]:
        """The images that could not be embedded."""
        failed = self._failed()
        with saying(f"cannot read the failures of {self.uri}"):
            found = [Failure(**row) for row in failed.search().to_arrow().to_pylist()]
        return [dataclasses.replace(failure, path=self.full(failure.path)) for failure in found]

    def rows(self, columns: Sequence[str] | None = None, where: str | None = None) -> pa.Table:
        """Rows as an Arrow table. `columns`: default all but ids, checksums, vectors, patches. `where`: an SQL filter."""
        import pyarrow as pa

        if columns is None:
            columns = [c for c in self.columns if c not in HIDDEN]
        self.check_columns(columns)
        found = self._stored_rows(columns, where)
        if self.root and "path" in columns:
            paths = pa.array([self.full(path) for path in found["path"].to_pylist()], pa.string())
            found = found.set_column(found.schema.get_field_index("path"), "path", paths)
        return found

    def _stored_rows(self, columns: Sequence[str], where: str | None = None) -> pa.Table:
        """`rows` with paths as they are stored."""

        def read(table: Any) -> pa.Table:
            query = table.search()
            query = (query.where(where) if where else query).select(list(columns))
            if {"vector", "patches"} & {*columns}:
                return query.to_arrow()
            return query.to_batches(batch_size=NARROW_ROWS).read_all()

        return self.read(read, where)

    def _rows_of(self, paths: Iterable[str], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
        """{stored path: row} of those of these stored paths that there are; a thousand a query."""
        found: dict[str, dict[str, Any]] = {}
        for some in _chunks(list(paths), 1000):
            table = self._stored_rows(["path", *columns], f"path IN ({_quoted(some)})")
            found |= {row["path"]: row for row in table.to_pylist()}
        return found

    def vectors(self, where: str | None = None) -> tuple[list[str], np.ndarray]:
        """(paths, vectors as float32 [N, D]), in the store's order."""
        table = self.rows(["path", "vector"], where)
        return table["path"].to_pylist(), as_matrix(table["vector"], self.facts.dim)

    def patches(self, paths: Sequence[str]) -> list[np.ndarray]:
        """The patch features of these images as float32 [h, w, P], whatever precision they are stored in."""
        if self.facts.patches == "none":
            raise StoreError(f"the store at {self.uri} keeps no patch features; embed into another --out with patches")
        paths = [self.stored(path) for path in paths]
        found = self._rows_of(paths, patch_columns(self.facts))
        self._refuse_unknown(paths, found)
        return [decode_patches(found[path], self.facts) for path in paths]

    def read(self, ask: Callable[[Any], Any], where: str | None = None) -> Any:
        """`ask(table)`, once more if it fails on files that a compaction deleted meanwhile; errors are sentences."""
        if where is not None:
            check_filter(where, self._names_for_errors)
        what = f"the filter {where!r} cannot be used" if where else f"cannot read the store at {self.uri}"
        with saying(what, self._names_for_errors):
            try:
                return ask(self.table)
            except (RuntimeError, OSError) as error:
                if "not found" not in str(error).lower():
                    raise
                self.table.checkout_latest()
                return ask(self.table)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """For loops over the table: errors as sentences."""
        with saying(f"cannot read the store at {self.uri}"):
            yield

    def check_columns(self, names: Iterable[str]) -> None:
        """`UnknownName` with the columns that exist, if one of `names` does not."""
        only_known(f"the store at {self.uri} has no column", names, self.columns)

    # ----------------------------------------------------------------------------------------------------- writing

    def append(self, rows: Sequence[Row]) -> None:
        """New images, all in one commit. A path that is there already is refused; that is what `replace` is for."""
        if not rows:
            return
        pen = self._claim()
        table = self._arrow(rows)
        self._refuse_stored(table["path"].to_pylist())
        with saying(f"cannot write to the store at {self.uri}"):
            pen.add(table)
        self._added(table)

    def replace(self, rows: Sequence[Row]) -> None:
        """Changed or new images, all in one commit; columns added by `add_column` keep their values."""
        if not rows:
            return
        pen = self._claim()
        table = self._arrow(rows)
        with saying(f"cannot write to the store at {self.uri}"):
            pen.merge_insert("path").when_matched_update_all().when_not_matched_insert_all().execute(table)
        self._added(table)

    def touch(self, stamps: Mapping[str, str]) -> None:
        """New stamps {path: stamp} of images whose files were touched but not changed, one commit."""
        import pyarrow as pa

        self._claim()
        paths = [self.stored(path) for path in stamps]
        with saying(f"cannot write to the store at {self.uri}"):
            self._update(
                pa.table({"path": pa.array(paths, pa.string()), "stamp": pa.array([*stamps.values()], pa.string())})
            )

    def rename(self, copies: Sequence[Copy]) -> list[Copy]:
        """Images that moved: rows keep everything but path and stamp. One commit.

        Returns those that were not renamed because their row is gone or has other content by now.
        """
        import pyarrow as pa

        pen = self._claim()
        found = self._rows_of((self.stored(c.old) for c in copies), ["id", "content_hash", "checksum"])
        names = {c: (self.stored(c.old), self.stored(c.new)) for c in copies}
        done = [c for c in copies if found.get(names[c][0], {}).get("content_hash") == c.content_hash]
        if done:
            self._refuse_stored(names[c][1] for c in done)
            rows = []
            for c in done:
                old, new = names[c]
                checksum = found[old]["checksum"] ^ path_checksum(old) ^ path_checksum(new)
                rows.append({"id": found[old]["id"], "path": new, "stamp": c.stamp, "checksum": checksum})
            schema = arrow_schema(self.facts)
            table = pa.Table.from_pylist(rows, schema=pa.schema([schema.field(name) for name in rows[0]]))
            with saying(f"cannot write to the store at {self.uri}"):
                pen.merge_insert("id").when_matched_update_all().execute(table)
            if self._paths is not None:
                self._paths.difference_update(names[c][0] for c in done)
                self._paths.update(names[c][1] for c in done)
            self._committed(0)
        return [c for c in copies if c not in done]

    def copy(self, copies: Sequence[Copy]) -> list[Copy]:
        """Images with the content of stored ones: rows with the same features, one commit. Returns as `rename` does."""

        self._claim()
        schema = arrow_schema(self.facts)
        found = self._rows_of({self.stored(c.old) for c in copies}, [n for n in schema.names if n != "path"])
        old = {c: found.get(self.stored(c.old), {}) for c in copies}
        done = [c for c in copies if old[c].get("content_hash") == c.content_hash]
        if done:
            self.append_stored([old[c] | {"path": c.new, "stamp": c.stamp} for c in done])
        return [c for c in copies if c not in done]

    def append_stored(self, rows: Sequence[dict[str, Any]]) -> None:
        """New images from rows of a store like this one, {column: value} with all columns but added ones; one commit."""
        import pyarrow as pa

        if not rows:
            return
        pen = self._claim()
        rows = [row | {"id": new_id(), "path": self.stored(row["path"])} for row in rows]
        table = self._summed(pa.Table.from_pylist(rows, schema=arrow_schema(self.facts)))
        self._refuse_stored(table["path"].to_pylist())
        with saying(f"cannot write to the store at {self.uri}"):
            pen.add(table)
        self._added(table)

    def remove(self, paths: Iterable[str]) -> int:
        """Deletes these images (unknown paths are no mistake); the number that were there. One commit per 1,000."""
        return self.remove_stored([self.stored(path) for path in paths])

    def remove_stored(self, paths: list[str]) -> int:
        """As `remove`, for paths as they are stored."""
        pen, removed = self._claim(), 0
        for some in _chunks(paths, 1000):
            with saying(f"cannot remove rows from the store at {self.uri}"):
                removed += int(pen.delete(f"path IN ({_quoted(some)})").num_deleted_rows)
        if self._paths is not None:
            self._paths.difference_update(paths)
        return removed

    def record_failures(self, failures: Sequence[Failure]) -> None:
        """Records images that could not be embedded, one commit; a path recorded before gets the new reason."""
        import pyarrow as pa

        if not failures:
            return
        self._claim()
        latest = {f.path: dataclasses.asdict(f) | {"path": self.stored(f.path)} for f in failures}
        table = pa.Table.from_pylist(list(latest.values()), schema=failed_schema())
        with saying(f"cannot record failures in {self.uri}"):
            self._failed().merge_insert("path").when_matched_update_all().when_not_matched_insert_all().execute(table)

    def clear_failures(self, paths: Iterable[str]) -> None:
        """Removes these failures, e.g. because the images were embedded after all."""
        self._claim()
        for some in _chunks([self.stored(path) for path in paths], 1000):
            with saying(f"cannot clear failures in {self.uri}"):
                self._failed().delete(f"path IN ({_quoted(some)})")

    def add_column(self, name: str, values: Mapping[str, Any] | Callable[[str], Any] | str) -> None:
        """A new column: a mapping or a function from path to value, or an SQL expression (`"width * height"`).

        Paths the mapping lacks get null, as do images appended later. A mapping or function makes two commits:
        killed between them the column is there, all null, and `set_metadata` fills it.
        """
        import pyarrow as pa

        pen = self._claim()
        if not re.fullmatch(r"[a-z_][a-z0-9_]*", name):  # SQL folds unquoted names to lower case
            raise StoreError(f"{name!r} cannot be a column: use lower-case letters, digits and _")
        if name in self.columns:
            raise StoreError(f"the store at {self.uri} has a column {name!r} already; change it with set_metadata")
        if isinstance(values, str):
            with saying(f"cannot compute column {name!r} from {values!r}", self._names_for_errors):
                pen.add_columns({name: values})
                self._let_columns_be_empty(pen)
            return
        paths = self.rows(["path"])["path"].to_pylist()
        if isinstance(values, Mapping):
            self._refuse_unknown(values, paths)
            by_path = dict(values)
        else:
            by_path = {path: values(path) for path in paths}
        with saying(f"the values of column {name!r} do not share a type that can be stored"):
            array = pa.array(list(by_path.values()))
        if pa.types.is_null(array.type):
            raise StoreError(f"column {name!r} would hold no value at all; give at least one")
        with saying(f"cannot add column {name!r} to {self.uri}"):
            pen.add_columns(pa.field(name, array.type))
            self._update(pa.table({"path": pa.array([self.stored(p) for p in by_path], pa.string()), name: array}))

    def set_metadata(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Sets columns made by `add_column`, one commit: {path: {column: value}}; what is not named stays."""
        import pyarrow as pa

        self._claim()
        schema = self.table.schema
        ours = set(arrow_schema(self.facts).names)
        names = list(dict.fromkeys(name for row in values.values() for name in row))
        self.check_columns(names)
        for name in names:
            if name in ours:
                raise StoreError(f"column {name!r} is the store's own and comes with the image; it cannot be set")
        if not names:
            return
        now = self.rows(["path", *names])
        self._refuse_unknown(values, now["path"].to_pylist())
        rows = [row | dict(values[row["path"]]) for row in now.to_pylist() if row["path"] in values]
        rows = [row | {"path": self.stored(row["path"])} for row in rows]
        wanted = pa.schema([schema.field(name) for name in ("path", *names)])
        with saying(f"cannot set {', '.join(names)}: a value does not fit the column's type"):
            self._update(pa.Table.from_pylist(rows, schema=wanted))

    def write(self, what: str, act: Callable[[Any], Any]) -> Any:
        """`act(table)` as the writer, for what this class does not do; `what` begins the sentence if it fails."""
        pen = self._claim()
        with saying(what, self._names_for_errors):
            return act(pen)

    def compact(self) -> None:
        """Merges small fragments, brings the search index up to date, and deletes every older version.

        The end of a job. The table shrinks to its latest version; while merging, it needs its size once more. A reader
        in the middle of a scan starts it again, see `read`. During a job, appends compact by themselves when it pays.
        """
        self._compact(timedelta(0))

    # ------------------------------------------------------------------------------------------------------ inside

    def _names_for_errors(self) -> list[str]:
        return self.columns  # a method: looked up only when something is wrong

    def _claim(self) -> Any:
        """Becomes the writer, if this is not yet so; the table to write to.

        That is a second handle, one that does not look for newer versions: there are none but the writer's own, and
        looking made a commit beside 1,200 others take 13 ms instead of 4.
        """
        self.table  # noqa: B018  # raises in a forked child
        if self._pen is None:
            if self._lock is None and (folder := place_of(self.uri)[1]) is not None:
                self._lock = Lock(folder / LOCK, f"the store at {self.uri}", StoreError)
            with saying(f"cannot read the store at {self.uri}"):
                pen = connect(self.uri, fresh=False).open_table(IMAGES)
                self._let_columns_be_empty(pen)  # mends an add_column that was killed half-way
                stats = pen.stats()
            self._bytes, self._loose = stats["total_bytes"], stats["fragment_stats"]["num_small_fragments"]
            self._pen = pen
        return self._pen

    def _committed(self, new_bytes: int) -> None:
        self._loose += 1
        self._bytes += new_bytes
        if self._loose >= max(FEWEST_FRAGMENTS, math.sqrt(2 * self._bytes / MANIFEST_BYTES_PER_FRAGMENT)):
            self._compact(KEEP_OLD_VERSIONS)

    def _compact(self, keep: timedelta) -> None:
        pen = self._claim()
        with saying(f"cannot compact the store at {self.uri}"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that readers of old versions fail: they try again
            for table in (pen, self._failed()):
                table.optimize(cleanup_older_than=keep)
            self._loose = 0

    def _failed(self) -> Any:
        self.table  # noqa: B018  # raises in a forked child
        if self._failed_table is None:
            if not has_table(self._database, self.uri, FAILED):
                raise StoreError(
                    f"the store at {self.uri} is damaged: its table {FAILED!r} of unreadable images is lost; "
                    f"`dinov3 store verify {self.uri} --repair` makes an empty one"
                )
            with saying(f"cannot read the failures of {self.uri}"):
                self._failed_table = self._database.open_table(FAILED)
        return self._failed_table

    def repair_failures(self) -> None:
        """An empty table of failures in the place of a lost one: those images are tried again."""
        self._claim()
        with saying(f"cannot write to the store at {self.uri}"):
            self._failed_table = self._database.create_table(FAILED, schema=failed_schema(), mode="overwrite")

    def _arrow(self, rows: Sequence[Row]) -> pa.Table:
        """Rows as a table of the store's own columns, after everything that can be wrong with them was looked for."""
        import pyarrow as pa

        facts, schema = self.facts, arrow_schema(self.facts)
        twice = _first_repeated(row.path for row in rows)
        if twice is not None:
            raise StoreError(f"{twice!r} comes twice in one batch; a store holds each path once")
        for row in rows:
            if np.shape(row.vector) != (facts.dim,):
                raise StoreError(f"the vector of {row.path!r} has shape {np.shape(row.vector)}, not ({facts.dim},)")
        with np.errstate(over="ignore"):  # too large for float16 becomes infinite and is refused below
            vectors = np.stack([np.asarray(row.vector) for row in rows]).astype(facts.vector_dtype)  # [N, D]
        bad = ~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1)
        if bad.any():
            raise StoreError(f"the vector of {rows[int(bad.argmax())].path!r} is zero, infinite or not a number")
        columns: dict[str, Any] = {
            name: [getattr(row, name) for row in rows] for name in ("content_hash", "stamp", "width", "height")
        }
        columns["path"] = [self.stored(row.path) for row in rows]
        columns["id"] = [new_id() for _ in rows]
        columns["checksum"] = [0] * len(rows)
        columns["model"] = [facts.model] * len(rows)
        columns["preprocessing"] = [facts.preprocessing] * len(rows)
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), facts.dim)
        encoded = [encode_patches(row, facts) for row in rows]
        columns |= {name: [patches[name] for patches in encoded] for name in patch_columns(facts)}
        try:
            return self._summed(pa.table(columns, schema=schema))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise StoreError(f"these rows do not fit the store at {self.uri}: {first_line(error)}") from error

    def _summed(self, table: pa.Table) -> pa.Table:
        """The table with the checksums of its rows."""
        import pyarrow as pa

        sums = pa.array(checksums(table, self.facts), pa.int64())
        return table.set_column(table.schema.get_field_index("checksum"), table.schema.field("checksum"), sums)

    def _refuse_stored(self, paths: Iterable[str]) -> None:
        """Raises for a stored path that there is already; read once per writer, then nobody else can add one."""
        if self._paths is None:
            self._paths = set(self._stored_rows(["path"])["path"].to_pylist())
        for path in paths:
            if path in self._paths:
                raise StoreError(f"{path!r} is in the store at {self.uri} already; replace it instead of appending")

    def _added(self, table: pa.Table) -> None:
        if self._paths is not None:
            self._paths.update(table["path"].to_pylist())
        self._committed(table.nbytes)

    def _update(self, table: pa.Table) -> None:
        """Overwrites the given columns of the given paths."""
        self._pen.merge_insert("path").when_matched_update_all().execute(table)
        self._committed(table.nbytes)

    def _let_columns_be_empty(self, table: Any) -> None:
        """An SQL expression without nulls makes a NOT NULL column; images without a value could not be added."""
        ours = set(arrow_schema(self.facts).names)
        for field in table.schema:
            if field.name not in ours and not field.nullable:
                table.alter_columns({"path": field.name, "nullable": True})

    def _refuse_unknown(self, paths: Iterable[str], known: Iterable[str]) -> None:
        known = set(known)
        only_known(f"the store at {self.uri} has no image", (p for p in paths if p not in known), known)


def _quoted(values: Iterable[str]) -> str:
    return ", ".join("'" + value.replace("'", "''") + "'" for value in values)


def _chunks(values: list[str], size: int) -> Iterator[list[str]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _first_repeated(values: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
