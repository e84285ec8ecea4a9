"""The upkeep of a store, one function for each `dinov3 store` verb.

Names: describe (info), prune, remove, export, duplicates, clusters, outliers, merge, compact, verify. Paths are absolute in
and out. Functions over all pairs of images (duplicates, outliers) cost N² · D: 100,000 images of D = 384 take minutes on a
CPU. `on_progress` is called with the number of images that are done.

Shapes: N rows, D width of the vector.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov3 import neighbours
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.embedding import flat
from dinov3.embedding.pipeline import away, is_gone
from dinov3.embedding.place import place_of
from dinov3.embedding.schema import arrow_schema, as_matrix, checksums
from dinov3.embedding.store import EmbeddingStore
from dinov3.errors import StoreError, UnknownName, did_you_mean, one_of, require
from dinov3.files import atomically, check_free

ROWS_AT_ONCE = 4096
Done = Callable[[int], object]


def _quiet(done: int) -> None:
    """No progress."""


# ---- what it holds --------------------------------------------------------------------------------------------------


def describe(store: EmbeddingStore, failed: bool = False) -> dict[str, Any]:
    """What a store holds: counts, root, sources, metadata, columns; with `failed` the unreadable images and why.

    `input` says in words what `preprocessing_json` rebuilds.
    """
    failures = store.failures()
    facts = {"kind": "embedding store", "images": len(store), "unreadable": len(failures), "root": store.root}
    facts["sources"] = store.sources
    facts["input"] = str(Preprocessing.from_json(store.facts.preprocessing_json))
    facts |= dataclasses.asdict(store.facts) | {"columns": ", ".join(store.columns), "bytes": size_of(store)}
    if failed:
        facts["failed"] = [f"{f.path}: {f.reason}" for f in failures]
    return facts


def size_of(store: EmbeddingStore) -> int:
    """Bytes: of the folder, or on object storage of the latest version."""
    folder = place_of(store.uri)[1]
    if folder is None:
        return int(store.table.stats()["total_bytes"])
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---- fewer and more rows --------------------------------------------------------------------------------------------


def prune(
    store: EmbeddingStore, *, missing_sources: bool = False, dry_run: bool = False, on_progress: Done = _quiet
) -> tuple[list[str], dict[str, int]]:
    """Removes images whose files no longer exist; their paths, and {folder: number of its images that were kept}.

    Kept are the images of source folders that do not exist or are empty: a disk may not be mounted, or the folder has moved.
    With `missing_sources` they are removed too. `dry_run` only lists.
    """
    gone = []
    for done, path in enumerate(store.known(), 1):
        if is_gone(path):
            gone.append(path)
        on_progress(done)
    kept = {} if missing_sources else away(store, gone)
    gone = [path for path in gone if path not in kept]
    if gone and not dry_run:
        store.remove(gone)
    return gone, dict(Counter(kept.values()))


def remove(store: EmbeddingStore, paths: Iterable[str] = (), where: str | None = None) -> int:
    """Removes images by path or by an SQL filter; how many there were. A path that is not in the store removes none of
    them: `UnknownName`, with the nearest."""
    chosen = [os.path.abspath(path) if store.root else path for path in paths]
    known = store.known() if chosen else {}
    for path in chosen:
        if path not in known:
            folder, name = os.path.split(path)  # the likely mistakes: comparing with a million paths takes a minute
            near = [p for p in known if os.path.dirname(p) == folder or os.path.basename(p) == name]
            raise UnknownName(f"the store at {store.uri} holds no image {path!r}{did_you_mean(path, near)}")
    if where is not None:
        chosen += store.rows(["path"], where)["path"].to_pylist()
    return store.remove(chosen) if chosen else 0


def merge(target: EmbeddingStore, other: EmbeddingStore, on_progress: Done = _quiet) -> int:
    """Adds the images of another store whose paths are new, with its columns and failures; how many were added.

    Raises `StoreError` where the stores hold different features, or where rows of the other one are damaged.
    """
    target.check_same(other.facts)
    target.add_sources(other.sources)
    own = arrow_schema(other.facts).names
    extra = [name for name in other.columns if name not in own]
    there, added, done = set(target.known()), 0, 0
    values: dict[str, dict[str, Any]] = {}
    for table in _batches(other, [*own, *extra]):
        done += len(table)
        if list(checksums(table, other.facts)) != table["checksum"].to_pylist():
            raise StoreError(
                f"rows of the store at {other.uri} are damaged: `dinov3 store verify {other.uri} --repair` first"
            )
        rows = [row | {"path": other.full(row["path"])} for row in table.to_pylist()]
        rows = [row for row in rows if row["path"] not in there]
        target.append_stored([{name: row[name] for name in own} for row in rows])
        values |= {row["path"]: {name: row[name] for name in extra} for row in rows} if extra else {}
        added += len(rows)
        on_progress(done)
    for name in extra:
        column = {path: row[name] for path, row in values.items() if row[name] is not None}
        if column and name in target.columns:
            target.set_metadata({path: {name: value} for path, value in column.items()})
        elif column:
            target.add_column(name, column)
    known = target.known_failed()
    target.record_failures([f for f in other.failures() if f.path not in known and f.path not in there])
    return added


def compact(store: EmbeddingStore, flat_index: bool = False) -> tuple[int, int]:
    """Merges small files and deletes older versions; bytes before and after. A flat index is brought up to date, and made
    with `flat_index`."""
    before = size_of(store)
    store.compact()
    if flat_index:
        flat.write(store)
    else:
        flat.refresh(store)
    return before, size_of(store)


# ---- is it whole ----------------------------------------------------------------------------------------------------


@dataclass
class Verification:
    """`rows` were checked; `damaged` are paths whose features are not what was written; `problems` are sentences."""

    rows: int = 0
    damaged: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.damaged and not self.problems


def verify(store: EmbeddingStore, *, repair: bool = False, on_progress: Done = _quiet) -> Verification:
    """Reads every row and compares its checksum, which was committed with it; added columns have none.

    `repair` removes damaged rows and makes a new table of failures in the place of a lost one: the next `embed` does those
    images again. What cannot be read at all is a problem that only a backup or a new store mends.
    """
    found = Verification()
    names = arrow_schema(store.facts).names
    try:
        for table in _batches(store, names):
            found.rows += len(table)
            same = zip(table["path"].to_pylist(), checksums(table, store.facts), table["checksum"].to_pylist())
            found.damaged += [path for path, now, then in same if now != then]
            on_progress(found.rows)
        missing = store.count() - found.rows
        if missing:
            found.problems.append(f"{missing} rows of {store.uri} cannot be read")
        twice = found.rows - len(set(store.known()))
        if twice:
            found.problems.append(f"{twice} paths of {store.uri} are there more than once")
    except StoreError as error:
        found.problems.append(str(error))
    try:
        store.failures()
    except StoreError as error:
        found.problems.append(str(error))
        if repair:
            store.repair_failures()
    if repair and found.damaged:
        store.remove_stored(found.damaged)
    found.damaged = [store.full(path) for path in found.damaged]
    return found


def _batches(store: EmbeddingStore, columns: Sequence[str]) -> Iterator[Any]:
    """The rows as Arrow tables of some thousand, with paths as they are stored."""
    import pyarrow as pa

    with store.reading():
        for batch in store.table.search().select(list(columns)).to_batches(ROWS_AT_ONCE):
            yield pa.Table.from_batches([batch])


# ---- what is in it --------------------------------------------------------------------------------------------------


def duplicates(
    store: EmbeddingStore, threshold: float = 0.97, *, where: str | None = None, on_progress: Done = _quiet
) -> list[list[str]]:
    """Groups of two and more images that are linked by cosines ≥ `threshold`, largest group first; 1 finds exact copies."""
    if not 0 < threshold <= 1:
        raise StoreError(f"a threshold of {threshold} is no cosine of similar images: give one above 0, up to 1")
    paths, vectors = store.vectors(where)
    labels = neighbours.components(vectors, min(threshold, 1 - 1e-6), on_progress).tolist()
    groups: dict[int, list[str]] = {}
    for path, label in zip(paths, labels):
        groups.setdefault(label, []).append(path)
    found = [sorted(group) for group in groups.values() if len(group) > 1]
    return sorted(found, key=lambda group: (-len(group), group[0]))


def clusters(
    store: EmbeddingStore, k: int, *, seed: int = 0, where: str | None = None, on_progress: Done = _quiet
) -> dict[str, int]:
    """Spherical k-means: {path: cluster}, clusters numbered from 0 by falling size, the paths nearest the centre first."""
    paths, vectors = store.vectors(where)
    if not 1 <= k <= len(paths):
        raise StoreError(f"{k} clusters of {len(paths)} images: give a number from 1 to {len(paths)}")
    labels, cosines = neighbours.k_means(vectors, k, seed=seed, on_progress=on_progress)
    sizes = np.bincount(labels, minlength=k)
    rank = np.empty(k, dtype=int)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(k)
    order = sorted(range(len(paths)), key=lambda n: (rank[labels[n]], -cosines[n], paths[n]))
    return {paths[n]: int(rank[labels[n]]) for n in order}


def outliers(
    store: EmbeddingStore, top: int = 20, *, k: int = 5, where: str | None = None, on_progress: Done = _quiet
) -> list[tuple[str, float]]:
    """The `top` images least like any other: (path, mean cosine of its `k` nearest images), lowest first."""
    paths, vectors = store.vectors(where)
    if len(paths) < 2:
        raise StoreError(f"{store.uri} holds {len(paths)} images: an outlier needs others to differ from")
    k = min(k, len(paths) - 1)
    means = []
    for start in range(0, len(paths), ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, len(paths)))
        cosines, where_found = neighbours.nearest(vectors[rows], vectors, k + 1)
        itself = where_found == torch.as_tensor(rows)[:, None]
        itself[~itself.any(1), -1] = True  # among many copies an image may miss itself: then the last one is left out
        means += cosines.masked_fill(itself, 0).sum(1).div(k).tolist()
        on_progress(len(means))
    order = sorted(range(len(paths)), key=lambda n: (means[n], paths[n]))[:top]
    return [(paths[n], means[n]) for n in order]


# ---- out of it ------------------------------------------------------------------------------------------------------


def export(
    store: EmbeddingStore,
    out: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    where: str | None = None,
    overwrite: bool = False,
    on_progress: Done = _quiet,
) -> int:
    """Writes vectors and columns to a file by its ending; the number of rows.

    .parquet: columns and `vector`. .csv: columns and v0 … v{D-1}; a text that a spreadsheet would take for a formula begins
    with an apostrophe. .npy: vectors [N, D], the columns beside it as .csv. .safetensors: `vectors`, numeric columns as
    tensors, others as JSON in uint8. `columns`: default all but ids, checksums and patches.
    """
    out = Path(out)
    kind = one_of("the ending of an export", out.suffix, (".parquet", ".csv", ".npy", ".safetensors"))
    beside = out.with_suffix(".csv") if kind == ".npy" else None
    check_free(out, overwrite)
    if beside is not None:
        check_free(beside, overwrite, f", where the columns of {out.name} would be written,")
    names = (
        [c for c in store.columns if c not in ("id", "checksum", "vector", "patches")]
        if columns is None
        else list(columns)
    )
    table = store.rows([*names, "vector"], where)
    vectors = as_matrix(table["vector"], store.facts.dim)
    plain = table.select(names)
    with atomically(out) as temporary:
        if kind == ".parquet":
            require("pyarrow.parquet", "search", "an export to Parquet").write_table(table, temporary)
        elif kind == ".csv":
            _write_csv(temporary, plain, vectors, on_progress)
        elif kind == ".npy":
            np.save(temporary, vectors)
        else:
            from safetensors.numpy import save_file

            save_file(
                {"vectors": vectors} | _columns_as_arrays(plain), temporary, {"dinov3": json.dumps(store.facts.model)}
            )
    if beside is not None:
        with atomically(beside) as temporary:
            _write_csv(temporary, plain, None, on_progress)
    return len(table)


def _columns_as_arrays(table: Any) -> dict[str, np.ndarray]:
    arrays = {}
    for name in table.column_names:
        values = table[name].to_pylist()
        array = np.asarray(values)
        if array.dtype.kind not in "iufb":  # text, or nulls
            array = np.frombuffer(json.dumps(values, default=str).encode(), np.uint8)
        arrays[name] = array
    return arrays


def _write_csv(path: Path, table: Any, vectors: np.ndarray | None, on_progress: Done) -> None:
    names = table.column_names + [f"v{i}" for i in range(vectors.shape[1] if vectors is not None else 0)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for n, row in enumerate(table.to_pylist()):
            numbers = [f"{v:.9g}" for v in vectors[n]] if vectors is not None else []
            writer.writerow([csv_cell(value) for value in row.values()] + numbers)
            on_progress(n + 1)


def csv_cell(value: Any) -> Any:
    """A text that no spreadsheet takes for a formula."""
    return "'" + value if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
