"""The flat index of a store: all vectors of one version as one matrix, so that exact search is one product.

In memory, where an open store is searched exactly again and again; or mapped from a file beside the table, which `write`
makes on request and every later job keeps up to date. The file is a second copy of the vectors and is used only for the
version of the table that it was made from; what is found is ranked by the table's own vectors. It may be deleted.

Shapes: N rows, D width, Q queries.
"""

from __future__ import annotations

import shutil
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.embedding.place import place_of
from dinov3.embedding.schema import as_matrix
from dinov3.embedding.store import NARROW_ROWS, EmbeddingStore
from dinov3.errors import StoreError
from dinov3.files import atomically

FOLDER = ".flat"  # in the store's, with one folder inside, named by the version of the table
VECTORS, ROW_IDS = "vectors.npy", "row_ids.npy"
CACHED_BYTES = 2 << 30  # of vectors that exact search reads into memory
PAYS_AFTER = 4  # exact searches of an unchanged store: reading all vectors into memory costs as much as that many scans
ROWS_READ = 2048  # at a time: more leave the second cache, and with fewer LanceDB's cost of a batch counts
COPIED_AS = 32  # products: copying a vector from anywhere in the matrix takes as long (mapped 3 µs, in memory 0.5)
FILTERS_CACHED = 4  # 9 bytes a row each at most, and their vectors:
FILTER_BYTES = 16 << 20  # of the vectors that pass a filter: so many are read at its first search, in 30 ms
FILTER_BYTES_AGAIN = 128 << 20  # and so many at its second, in 150 to 400 ms


@dataclass(frozen=True)
class Flat:
    """All vectors of one version of a store."""

    version: int
    row_ids: np.ndarray  # [N], ascending
    vectors: np.ndarray  # [N, D] float32, of length 1

    def cosines(self, queries: np.ndarray, places: np.ndarray | None = None) -> np.ndarray:
        """[N, Q], or of the rows at `places` only. queries: [Q, D], of any length."""
        units = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).T  # [D, Q]
        if places is None:
            return self.vectors @ units
        few = COPIED_AS * len(places) < len(self.vectors)
        return self.vectors[places] @ units if few else (self.vectors @ units)[places]

    def places(self, store: EmbeddingStore, where: str) -> np.ndarray:
        """The rows that pass an SQL filter, as positions."""
        found = passing(store, where)
        if found.version == self.version:
            return np.flatnonzero(found.mask)
        return np.searchsorted(self.row_ids, np.intersect1d(found.ids, self.row_ids, assume_unique=True))  # a newer one


@dataclass
class Passing:
    """The rows of one version of a store that pass a filter: mask [N] in the order of the rows, and their ids, ascending."""

    version: int
    mask: np.ndarray
    ids: np.ndarray
    searches: int = 0  # calls of `passing_vectors`
    flat: Flat | None = None  # their vectors, once they were read


def passing(store: EmbeddingStore, where: str) -> Passing:
    """The rows that pass an SQL filter; those of a store's last filters are cached until it changes."""

    def read(table: Any) -> Passing:
        # as a column: LanceDB takes 7 ms for a million rows so, and 100 to 300 where it returns the rows that pass
        version = int(table.version)
        batches = table.search().select({"passes": where}).with_row_id(True).to_batches(batch_size=NARROW_ROWS)
        found = [(b["_rowid"].to_numpy(), b["passes"].fill_null(False).to_numpy(False)) for b in batches]
        row_ids = np.concatenate([np.empty(0, np.uint64), *(ids for ids, _ in found)]).astype(np.int64)
        mask = np.concatenate([np.empty(0, bool), *(column for _, column in found)])
        return Passing(version if version == int(table.version) else -1, mask, np.sort(row_ids[mask], kind="stable"))

    cached = _PASSING.setdefault(store, {})
    found = cached.pop(where, None)
    if found is None or found.version != store.read(lambda table: int(table.version)):
        found = store.read(read, where)
    cached[where] = found
    for oldest in list(cached)[:-FILTERS_CACHED]:
        cached.pop(oldest, None)
    return found


def passing_vectors(store: EmbeddingStore, rows: Passing) -> Flat | None:
    """The vectors of the rows that pass a filter, cached with it; None where they are too many, or the store has changed."""
    rows.searches += 1
    dim = store.facts.dim

    def read(table: Any) -> Flat | None:
        taken = table.take_row_ids(rows.ids.tolist()).select(["vector"]).with_row_id().to_arrow()
        if int(table.version) != rows.version or len(taken) != len(rows.ids):
            return None
        flat = Flat(rows.version, taken["_rowid"].to_numpy().astype(np.int64), np.empty((len(taken), dim), np.float32))
        _units(as_matrix(taken["vector"], dim), flat.vectors)
        return flat

    limit = FILTER_BYTES if rows.searches == 1 else FILTER_BYTES_AGAIN
    if rows.flat is None and 4 * dim * len(rows.ids) <= limit:
        rows.flat = store.read(read)
    return rows.flat


_PASSING: weakref.WeakKeyDictionary[EmbeddingStore, dict[str, Passing]] = weakref.WeakKeyDictionary()
_IN_MEMORY: weakref.WeakKeyDictionary[EmbeddingStore, Flat] = weakref.WeakKeyDictionary()
_SEARCHES: weakref.WeakKeyDictionary[EmbeddingStore, tuple[int, int]] = weakref.WeakKeyDictionary()  # of a version


def flat_of(store: EmbeddingStore) -> Flat | None:
    """The flat index of the store's present version for one more exact search: the file's if there is one, else in memory
    once enough exact searches were made; None before, or where it would be too large."""
    version = store.read(lambda table: int(table.version))
    if (flat := _IN_MEMORY.get(store)) is not None and flat.version == version:
        return flat
    _IN_MEMORY.pop(store, None)
    rows, dim = len(store), store.facts.dim
    flat = _mapped(store, version, rows)
    if flat is None:
        before, searches = _SEARCHES.get(store, (version, 0))
        _SEARCHES[store] = (version, searches + 1 if before == version else 1)
        if _SEARCHES[store][1] > PAYS_AFTER and 4 * rows * dim <= CACHED_BYTES:
            read = Flat(version, np.empty(rows, np.int64), np.empty((rows, dim), np.float32))
            flat = read if store.read(lambda table: _fill(table, read)) else None
    if flat is not None:
        _IN_MEMORY[store] = flat
    return flat


def is_kept(store: EmbeddingStore) -> bool:
    """Whether the store has a flat index beside its table, of whatever version."""
    folder = place_of(store.uri)[1]
    return folder is not None and any((folder / FOLDER).glob(f"*/{VECTORS}"))


def refresh(store: EmbeddingStore) -> None:
    """Writes the flat index anew where the store has one of another version."""
    if is_kept(store):
        write(store)


def write(store: EmbeddingStore) -> Path:
    """Writes the flat index of the store's present version beside its table, 4 · D bytes an image; its folder.

    It replaces one of another version. A write, so it takes the store's lock. Raises `StoreError` on object storage.
    """
    base = place_of(store.uri)[1]
    if base is None:
        raise StoreError(f"a flat index is mapped from a file of this machine, and {store.uri} is not on it")

    def act(table: Any) -> Path:
        target = base / FOLDER / _folder_name(table)
        if not target.is_dir():
            with atomically(target) as temporary:
                temporary.mkdir()
                flat = _new_files(temporary, int(table.version), int(table.count_rows()), store.facts.dim)
                if not _fill(table, flat):
                    raise StoreError(
                        f"the store at {store.uri} changed while its flat index was written: write it again"
                    )
        for other in target.parent.iterdir():
            if other.name != target.name:  # of an older version, or of a process that was killed
                shutil.rmtree(other, ignore_errors=True)
        return target

    return store.write(f"cannot write the flat index of {store.uri}", act)


def _new_files(folder: Path, version: int, rows: int, dim: int) -> Flat:
    create: Any = np.lib.format.open_memmap
    row_ids = create(folder / ROW_IDS, mode="w+", dtype=np.int64, shape=(rows,))
    return Flat(version, row_ids, create(folder / VECTORS, mode="w+", dtype=np.float32, shape=(rows, dim)))


def _folder_name(table: Any) -> str:
    """Number and time of a table's version: a store that is made anew in the same place begins with version 1 again."""
    version = table.list_versions()[-1]
    return f"{version['version']}-{version['timestamp']:%Y%m%dT%H%M%S.%f}"


def _mapped(store: EmbeddingStore, version: int, rows: int) -> Flat | None:
    """The flat index from its file, if that is of this version and whole."""
    base = place_of(store.uri)[1]
    if base is None or not any((base / FOLDER).glob(f"{version}-*")):  # the time is only looked up where there is one
        return None
    folder = base / FOLDER / store.read(_folder_name)
    with suppress(OSError, ValueError, EOFError):  # cut off, or no such file: then as if there were none
        row_ids, vectors = (np.load(folder / name, mmap_mode="r").view(np.ndarray) for name in (ROW_IDS, VECTORS))
        if row_ids.shape == (rows,) and vectors.shape == (rows, store.facts.dim) and vectors.dtype == np.float32:
            return Flat(version, row_ids, vectors)
    return None


def _fill(table: Any, flat: Flat) -> bool:
    """Reads all vectors of a table into a flat index; False if the table is of another version at the end."""
    rows, dim = flat.vectors.shape
    at = 0
    for batch in table.search().select(["vector"]).with_row_id(True).to_batches(batch_size=ROWS_READ):
        here = slice(at, at := at + len(batch))
        if at > rows:
            return False
        _units(batch["vector"].flatten().to_numpy(zero_copy_only=False).reshape(-1, dim), flat.vectors[here])
        flat.row_ids[here] = batch["_rowid"].to_numpy()
    return at == rows and int(table.version) == flat.version and bool((np.diff(flat.row_ids) > 0).all())


def _units(vectors: np.ndarray, out: np.ndarray) -> None:
    """Rows of length 1 into `out`, float32."""
    vectors = vectors.astype(np.float32, copy=False)
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float32))
    np.divide(vectors, lengths[:, None], out=out)
