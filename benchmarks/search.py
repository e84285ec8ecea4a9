"""Search in a store of a million vectors: time, and recall against the exact neighbours, for every number of candidates.

    python benchmarks/search.py STORE [--rows 1000000] [--dim 384] [--queries 50] [--refine 2 5 …] [--cells 0.05 …]

STORE is made if it is not there. Its vectors are clustered as features are: 2,000 centres of many sizes in a space whose
spectrum falls, noise of fewer dimensions around each, a little in all; queries are new draws. Prints a table: wall and CPU
time of a query (medians, the least wall time), recall@10, without and with filters, for the index, and for exact search by a
scan of the table, from memory, and by the flat index. "First" is the first search of a process after it opened the store,
with the files in the cache of the operating system.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.embedding import flat
from dinov3.embedding import search as module
from dinov3.embedding.schema import StoreFacts, arrow_schema
from dinov3.embedding.store import EmbeddingStore

CHUNK = 50_000
FILTERS = (None, *(f"width < {n}" for n in (500, 190, 50, 10, 1)))  # of 1000 widths, all equally many
FIRST = 7  # processes


class Mixture:
    """Draws of vectors [n, dim] around centres of unequal weights."""

    def __init__(self, dim: int, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        spectrum = np.arange(1, dim + 1) ** -0.7
        self.centres = draw.normal(size=(2000, dim)) * spectrum
        self.weights = draw.dirichlet(np.full(2000, 0.5))
        self.inside = draw.normal(size=(24, dim)) * spectrum
        self.turn = np.linalg.qr(draw.normal(size=(dim, dim)))[0].astype(np.float32)

    def __call__(self, n: int, seed: int) -> np.ndarray:
        draw = np.random.default_rng(seed)
        of = draw.choice(len(self.centres), n, p=self.weights)
        noise = draw.normal(size=(n, 24)) @ self.inside * 0.15 + draw.normal(size=(n, len(self.turn))) * 0.01
        return ((self.centres[of] + noise).astype(np.float32)) @ self.turn


def fill(path: Path, rows: int, mixture: Mixture) -> EmbeddingStore:
    import pyarrow as pa

    dim = len(mixture.turn)
    facts = StoreFacts("mixture", dim, "none")
    with EmbeddingStore.create(path, facts) as store:
        for start in range(0, rows, CHUNK):
            n = min(CHUNK, rows - start)
            numbers = np.arange(start, start + n)
            same = {"content_hash": "", "stamp": "", "model": facts.model, "preprocessing": "none"}
            columns: dict[str, Any] = {name: pa.array([value] * n) for name, value in same.items()}
            columns |= {"path": pa.array([f"{i:07}.jpg" for i in numbers]), "id": numbers, "checksum": numbers}
            columns |= {"width": numbers % 1000, "height": numbers % 777}
            flat = pa.array(mixture(n, seed=1 + start).ravel())
            columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, dim)
            table = pa.table({k: columns[k] for k in arrow_schema(facts).names})
            store.write("cannot fill", lambda t, table=table: t.add(table.cast(arrow_schema(facts))))
        store.compact()
        start_s = time.perf_counter(), time.process_time()
        module.build_index(store)
        print(
            f"index: {time.perf_counter() - start_s[0]:.0f} s, {time.process_time() - start_s[1]:.0f} CPU s", flush=True
        )
    return EmbeddingStore.open(path)


def truth(store: EmbeddingStore, queries: np.ndarray, where: str | None) -> list[set[str]]:
    """The paths of the ten nearest, by one product a chunk."""
    paths, vectors = store.vectors(where)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = np.concatenate([vectors[i : i + CHUNK] @ queries.T for i in range(0, len(vectors), CHUNK)])  # [N, Q]
    best = np.argpartition(-scores, 10, axis=0)[:10].T
    return [{paths[i] for i in row} for row in best]


def timed(store: EmbeddingStore, query: np.ndarray, **options: Any) -> dict[str, Any]:
    """A search: ms of the clock and of CPU, and the paths it found."""
    start = time.perf_counter(), time.process_time()
    hits = module.search(store, query, **options)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    return {"ms": 1e3 * wall, "cpu_ms": 1e3 * cpu, "paths": [hit.path for hit in hits]}


def first(folder: Path, query: np.ndarray, **options: Any) -> dict[str, Any]:
    """`timed` of the first search in a new process."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file.name, query)
        command = [sys.executable, __file__, str(folder), "--first", file.name, json.dumps(options)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def row(name: str, where: str | None, results: list[dict[str, Any]], want: list[set[str]]) -> str:
    """A line of the table: median and least of a query's ms, its CPU ms, and recall@10."""
    walls = [result["ms"] for result in results]
    cpu = statistics.median(result["cpu_ms"] for result in results)
    recall = np.mean([len(right & {*result["paths"]}) / len(right) for right, result in zip(want, results)])
    return f"| {where or ''} | {name} | {statistics.median(walls):.1f} | {min(walls):.1f} | {cpu:.1f} | {recall:.3f} |"


def exact_rows(folder: Path, queries: np.ndarray, want: list[set[str]], where: str | None) -> Iterator[str]:
    options: dict[str, Any] = {"where": where, "exact": True}

    def results(store: EmbeddingStore) -> list[dict[str, Any]]:
        timed(store, queries[0], **options)
        return [timed(store, query, **options) for query in queries]

    kept = flat.PAYS_AFTER
    flat.PAYS_AFTER = 1 << 30
    yield row("exact, scan", where, results(EmbeddingStore.open(folder)), want)
    flat.PAYS_AFTER = 0
    yield row("exact, from memory", where, results(EmbeddingStore.open(folder)), want)
    flat.PAYS_AFTER = kept
    yield row("exact, scan, first", where, [first(folder, query, **options) for query in queries], want)
    with EmbeddingStore.open(folder) as store:
        place = flat.write(store)
        yield row("exact, flat index", where, results(store), want)
        yield row("exact, flat index, first", where, [first(folder, query, **options) for query in queries], want)
    shutil.rmtree(place.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--refine", type=int, nargs="*", default=[])
    parser.add_argument("--cells", type=float, nargs="*", default=[])
    parser.add_argument("--exact", type=int, default=7, help="queries for the exact search; 0: without it")
    parser.add_argument("--first", nargs=2, metavar=("QUERY", "OPTIONS"), help="one search in this process, as JSON")
    args = parser.parse_args()
    if args.first:
        store = EmbeddingStore.open(args.store)
        print(json.dumps(timed(store, np.load(args.first[0]), **json.loads(args.first[1]))))
        return
    mixture = Mixture(args.dim)
    store = EmbeddingStore.open(args.store) if args.store.exists() else fill(args.store, args.rows, mixture)
    queries = mixture(args.queries, seed=999_999_999)
    print(f"{len(store)} rows of {args.dim}\n")
    print("| filter | search | ms | least | CPU ms | recall@10 |")
    print("|---|---|---|---|---|---|", flush=True)
    refines, cells = args.refine or [module.REFINE], args.cells or [module.CELLS_SHARE]
    for where in FILTERS:
        want = truth(store, queries, where)
        for module.REFINE, module.CELLS_SHARE in itertools.product(refines, cells):
            for _ in range(2):  # the second reads the vectors that pass a filter
                timed(store, queries[0], where=where)
            name = f"index, ×{module.REFINE}, {module.CELLS_SHARE:.0%} of the cells"
            print(row(name, where, [timed(store, query, where=where) for query in queries], want), flush=True)
        name = "index, first"
        print(row(name, where, [first(args.store, query, where=where) for query in queries[:FIRST]], want), flush=True)
        for line in exact_rows(args.store, queries[: args.exact], want, where) if args.exact else ():
            print(line, flush=True)


if __name__ == "__main__":
    main()
