"""Which stored images are most like this one: cosine similarity over an `EmbeddingStore`.

Exact up to `EXACT_LIMIT` rows; above it through an approximate index (IVF with RabitQ codes, the candidates re-ranked by
their full vectors), if `build_index` was called. Without an index the result is still exact, only slow. Rows added after the
index was built are scanned, so they are found; `index_status` counts them, and `EmbeddingStore.compact` takes them into the
index.

A filter that few rows pass has them all compared: their vectors are cached with it (`flat.passing_vectors`). Of others the
index gives candidates, of which the filter leaves those that pass: there are more of them the fewer pass, and their vectors
are read last. Where even so too few would pass, LanceDB finds the rows that pass first. IVF looks into the cells nearest to
the query, and there a tight filter leaves little (keeping 1 % of 60,000 rows, 40 of 245 cells found 0.60 of the ten true
neighbours), so the number of cells grows as the filter tightens, up to all.

Exact search is one matrix product where the store has a flat index (`flat`): in memory after some searches of an open store,
or in a file beside the table. Otherwise it scans the table. docs/embedding.md has the times.

`sheet` draws a result as one image. Left out: embedding the query (the pipeline does), full-text search.

Shapes: Q queries, D width, N rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dinov3.data.images import open_image
from dinov3.data.sources import read_stored
from dinov3.drawing import TILE, contact_sheet
from dinov3.embedding.flat import Flat, Passing, flat_of, passing, passing_vectors
from dinov3.embedding.schema import as_matrix
from dinov3.embedding.store import EmbeddingStore
from dinov3.errors import StoreError
from dinov3.files import check_free

EXACT_LIMIT = 200_000  # rows of the store; about 0.2 s for one query of D = 384
QUERIES_AT_ONCE = 64
ROWS_PER_CELL = 4096
FEWEST_INDEXED = 256  # rows; what one cell's k-means is trained on
FEWEST_CELLS, CELLS_SHARE = 16, 0.15  # how many cells of the index a query looks into
REFINE = 5  # candidates re-ranked by full vectors, as a multiple of `top` and its slack
SPARE = 1.2  # candidates before a filter, times as many as should leave enough
FEWEST_REFINED = 2  # that have to be left, as a multiple again; or the filter comes first
MOST_CANDIDATES = 20_000  # before a filter; a thousand take 0.5 to 0.8 ms
LOOSE = 0.04  # share of rows that pass, from which on candidates come from no more cells than without a filter
SCORES_AT_ONCE = 1 << 27  # numbers: half a gigabyte
SLACK = 10  # more candidates than requested: LanceDB's float32 distances may swap what float64 tells apart
SHEET = "dinov3 contact sheet"  # what a PNG of ours says of itself
TIE = 1e-6  # distances closer than this may be a tie, which paths decide


@dataclass(frozen=True)
class Hit:
    """One neighbour. `score` is the cosine similarity, 1 for the same direction; `extra` holds the requested columns."""

    rank: int  # from 1
    path: str
    score: float
    width: int
    height: int
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class IndexStatus:
    """How much of the store the approximate index covers; rows outside it are scanned."""

    indexed: int
    unindexed: int

    @property
    def stale(self) -> bool:
        return self.unindexed > 0


def search(
    store: EmbeddingStore,
    vectors: np.ndarray,
    top: int = 10,
    *,
    where: str | None = None,
    columns: Sequence[str] | None = None,
    exact: bool | None = None,
) -> Any:
    """The `top` nearest images to each query, best first, equal scores by path: a list of `Hit`, or a list of such lists.

    `vectors` is [D], one query and one list, or [Q, D], a list of lists. `where` is an SQL filter on the store's columns,
    applied before ranking, e.g. `"width > 640 AND label = 'cat'"`. `exact=True` scans whatever the size, `exact=False`
    insists on the index, None decides by the number of rows. A wrong query, filter or column is a `DinoError`.
    """
    queries = _checked(store, vectors)
    if top < 1:
        raise StoreError(f"top is {top}; ask for at least one neighbour")
    wanted = list(dict.fromkeys(columns or ()))
    store.check_columns(wanted)
    status = None if exact else index_status(store)
    filtered = passing(store, where) if where and status is not None else None
    rows = store.count(where) if filtered is None else len(filtered.ids)
    if rows == 0:
        return [] if np.ndim(vectors) == 1 else [[] for _ in queries]
    if exact is False and status is None:
        raise StoreError(f"the store at {store.uri} has no index; build it with build_index, or search exactly")
    total = 0 if status is None else status.indexed + status.unindexed
    few = rows <= REFINE * (top + SLACK) and filtered is None  # than are re-ranked: a scan finds all
    index = status if exact is False or (exact is None and total > EXACT_LIMIT and not few) else None
    results: list[list[Hit]] = []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        some = queries[start : start + QUERIES_AT_ONCE]
        results += _search_some(store, some, top, where, wanted, rows, index, filtered)
    return results[0] if np.ndim(vectors) == 1 else results


def build_index(store: EmbeddingStore) -> IndexStatus:
    """Builds (or rebuilds) the approximate index over all rows; a write, so it takes the store's lock."""
    rows = len(store)
    if rows < FEWEST_INDEXED:
        raise StoreError(f"{rows} images are too few for an index (it needs {FEWEST_INDEXED}); exact search is instant")
    from lancedb.index import IvfRq

    config = IvfRq(distance_type="cosine", num_partitions=_cells(rows))
    store.write(
        f"cannot build the index of {store.uri}",
        lambda table: table.create_index("vector", config=config, replace=True),
    )
    status = index_status(store)
    assert status is not None
    return status


def index_status(store: EmbeddingStore) -> IndexStatus | None:
    """What the index covers; None where there is none."""
    return store.read(_index_status)


def _index_status(table: Any) -> IndexStatus | None:
    for index in table.list_indices():
        if list(index.columns) == ["vector"]:
            statistics = table.index_stats(index.name)
            return IndexStatus(statistics.num_indexed_rows, statistics.num_unindexed_rows)
    return None


def _cells(rows: int) -> int:
    return max(1, rows // ROWS_PER_CELL)


def _cells_to_look_into(indexed: int, kept: float) -> int:
    """`kept` is the share of rows that pass the filter: half of them, twice the cells."""
    return min(_cells(indexed), math.ceil(max(FEWEST_CELLS, CELLS_SHARE * _cells(indexed)) / kept))


def _checked(store: EmbeddingStore, vectors: np.ndarray) -> np.ndarray:
    """Queries as float32 [Q, D], finite and not zero."""
    queries = np.asarray(vectors, dtype=np.float32)
    if queries.ndim == 1:
        queries = queries[None]
    dim = store.facts.dim
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise StoreError(
            f"queries have shape {np.shape(vectors)}, expected (Q, {dim}) or ({dim},) for {store.facts.model}"
        )
    bad = ~np.isfinite(queries).all(axis=1) | ~queries.any(axis=1)
    if bad.any():
        raise StoreError(f"query {int(bad.argmax())} is zero, infinite or not a number: it has no direction to compare")
    return queries


def _nearest_in(
    flat: Flat, store: EmbeddingStore, queries: np.ndarray, top: int, where: str | None, columns: list[str]
) -> list[Any]:
    """As `_nearest`, by a flat index: the `top` nearest rows to each query and all that tie with the last."""
    places = flat.places(store, where) if where else None
    row_ids = flat.row_ids if places is None else flat.row_ids[places]
    found = []
    at_once = max(1, SCORES_AT_ONCE // len(flat.row_ids))
    for start in range(0, len(queries), at_once):
        for column in flat.cosines(queries[start : start + at_once], places).T:
            last = np.partition(column, -top)[-top] if top < len(column) else -2
            chosen = row_ids[np.flatnonzero(column >= last - 2 * TIE)].tolist()

            def take(table: Any, chosen: list[int] = chosen) -> Any:
                return table.take_row_ids(chosen).select(_names(columns)).to_arrow()

            found.append(store.read(take))
    return found


def _names(columns: list[str]) -> list[str]:
    return list(dict.fromkeys(["path", "width", "height", "vector", *columns]))


def _search_some(
    store: EmbeddingStore,
    queries: np.ndarray,
    top: int,
    where: str | None,
    columns: list[str],
    rows: int,
    index: IndexStatus | None,
    filtered: Passing | None,
) -> list[list[Hit]]:
    """`search` for a few queries; `rows` pass the filter. `index` None: exactly."""
    flat = None
    if index is None:
        flat = flat_of(store)
    elif filtered is not None:
        flat = passing_vectors(store, filtered)  # of the rows that pass alone
    if flat is not None:
        found = _nearest_in(flat, store, queries, top, where if index is None else None, columns)
        return [_ranked(store, query, rows_, top, columns) for query, rows_ in zip(queries, found)]
    limit = min(rows, top + SLACK)
    results = []
    if index is not None:
        tables = _approximately(store, queries, limit, where, columns, index, filtered)
    else:
        tables = _nearest(store, queries, limit, where, columns, None)
    for query, found in zip(queries, tables):
        requested = limit
        # Rows that tie with the last place may lie beyond what was fetched (a folder of copies): fetch until they do not.
        while index is None and requested < rows and _tie_at_the_end(found, top):
            requested = min(rows, requested * 8)
            (found,) = _nearest(store, query[None], requested, where, columns, None)
        results.append(_ranked(store, query, found, top, columns))
    return results


def _approximately(
    store: EmbeddingStore,
    queries: np.ndarray,
    limit: int,
    where: str | None,
    columns: list[str],
    index: IndexStatus,
    filtered: Passing | None,
) -> list[Any]:
    """As `_nearest`, by the approximate index and not in order."""
    if filtered is None:
        return _nearest(store, queries, limit, where, columns, _cells_to_look_into(index.indexed, 1.0))
    kept = len(filtered.ids) / (index.indexed + index.unindexed)
    cells = _cells_to_look_into(index.indexed, kept if kept < LOOSE else 1.0)
    count = math.ceil(SPARE * REFINE * limit / kept)

    def taken(table: Any, candidates: list[np.ndarray]) -> list[Any]:
        tables = [table.take_row_ids(ids.tolist()).select(_names(columns)).to_arrow() for ids in candidates]
        return tables if int(table.version) == filtered.version else [None] * len(queries)  # ids of another version

    def ask(table: Any) -> list[Any]:
        question = table.search(list(queries) if len(queries) > 1 else queries[0], vector_column_name="vector")
        question = question.distance_type("cosine").limit(count).nprobes(cells).select(["_distance"])
        found = question.with_row_id(True).to_arrow().sort_by("_distance")
        ids = found["_rowid"].to_numpy().astype(np.int64)
        place = np.searchsorted(filtered.ids, ids)  # a thousandth of the time of np.isin for few ids among many
        passes = filtered.ids[np.minimum(place, len(filtered.ids) - 1)] == ids
        of = found["query_index"].to_numpy() if len(queries) > 1 else np.zeros(len(ids), np.int64)
        return taken(table, [ids[passes & (of == i)][: REFINE * limit] for i in range(len(queries))])

    tables = store.read(ask) if count <= MOST_CANDIDATES else [None] * len(queries)
    for i, found in enumerate(tables):
        if found is None or len(found) < min(FEWEST_REFINED * limit, len(filtered.ids)):
            # too many candidates would be needed, or the filter and the query have to do with each other
            cells = _cells_to_look_into(index.indexed, kept)
            (tables[i],) = _nearest(store, queries[i : i + 1], limit, where, columns, cells)
    return tables


def _nearest(
    store: EmbeddingStore, queries: np.ndarray, limit: int, where: str | None, columns: list[str], cells: int | None
) -> list[Any]:
    """LanceDB's `limit` nearest rows to each query, as Arrow tables with `_distance` ascending: by the index, looking into
    so many of its cells, or exactly (None). The filter comes first."""

    def ask(table: Any) -> Any:
        question = table.search(list(queries) if len(queries) > 1 else queries[0], vector_column_name="vector")
        question = question.distance_type("cosine").limit(limit).select([*_names(columns), "_distance"])
        if where:
            question = question.where(where, prefilter=True)
        if cells is None:
            question = question.bypass_vector_index()
        else:
            question = question.nprobes(cells).refine_factor(REFINE)
        return question.to_arrow()

    found = store.read(ask, where)
    if len(queries) == 1:
        return [found.sort_by("_distance")]
    of = found["query_index"].to_numpy()
    return [found.filter(of == index).sort_by("_distance") for index in range(len(queries))]


def _tie_at_the_end(found: Any, top: int) -> bool:
    distance = found["_distance"].to_numpy()
    return len(distance) > top - 1 and bool(distance[-1] - distance[top - 1] <= TIE)


def _ranked(store: EmbeddingStore, query: np.ndarray, found: Any, top: int, columns: list[str]) -> list[Hit]:
    vectors = as_matrix(found["vector"], store.facts.dim).astype(np.float64)  # [n, D]
    wanted = query.astype(np.float64)
    # einsum adds each row in the same order, so equal vectors get equal scores; a matmul may not.
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors) * (wanted @ wanted))
    scores = np.einsum("nd,d->n", vectors, wanted) / norms
    others = found.drop_columns(["vector"]).to_pylist()
    for row in others:
        row["path"] = store.full(row["path"])
    order = sorted(range(len(others)), key=lambda n: (-scores[n], others[n]["path"]))[:top]
    return [
        Hit(
            rank,
            others[n]["path"],
            float(scores[n]),
            others[n]["width"],
            others[n]["height"],
            {name: others[n][name] for name in columns},
        )
        for rank, n in enumerate(order, start=1)
    ]


# -------------------------------------------------------------------------------------------------- the contact sheet


def sheet(
    query_image: str | os.PathLike[str] | Image.Image,
    hits: Sequence[Hit],
    out_png: str | os.PathLike[str],
    root: str | os.PathLike[str] = "",
    *,
    overwrite: bool = False,
) -> None:
    """Writes `drawing.contact_sheet` of the query and its neighbours as a PNG; paths of hits are relative to `root`.

    An earlier sheet is replaced, another file only with `overwrite`.
    """
    check_sheet(out_png, overwrite)
    about = PngInfo()
    about.add_text("Software", SHEET)
    try:
        page = contact_sheet(query_image, hits, root, _opened)
        page.save(out_png, format="PNG", pnginfo=about)
    except OSError as error:
        raise StoreError(f"cannot write the contact sheet {os.fspath(out_png)}: {error.strerror or error}") from error


def _opened(path: str | os.PathLike[str]) -> Image.Image:
    return open_image(read_stored(path), target_short_side=2 * TILE).image


def check_sheet(out_png: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raises where a sheet would replace a file that is no sheet of ours, unless `overwrite`."""
    try:
        with Image.open(out_png, formats=["PNG"]) as image:
            ours = image.info.get("Software") == SHEET
    except (OSError, ValueError, SyntaxError):
        ours = False
    check_free(out_png, overwrite or ours)
