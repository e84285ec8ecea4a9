"""What the store view requests: images that pass a filter, rows, search, the map, what is odd, a selection as a file.

Lists of many images are arrays of little-endian numbers (uint32 image numbers, float32 coordinates), not JSON. What takes
long is 202 with its progress until it is there (`jobs`).

Shapes: N images, D width of a vector, n images of a selection.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from dinov3.data.images import open_image
from dinov3.embedding import manage
from dinov3.embedding.pipeline import query_vector
from dinov3.embedding.search import search
from dinov3.errors import DinoError, one_of
from dinov3.explorer.jobs import AT_ONCE, Job, Jobs
from dinov3.explorer.source import FrozenModel, Source, plain
from dinov3.web import Limits, json_object, read_body, read_images

MOST_ROWS = 1000  # of one request
COLOURS = 12  # categories that a colour of their own shows; the others are one
FORMATS = {"csv": "text/csv", "json": "application/json", "parquet": "application/vnd.apache.parquet"}
METHODS = ("pca", "umap")


def routes(source: Source, model: FrozenModel, limits: Limits) -> APIRouter:
    """The router of the store view."""
    router = APIRouter(prefix="/api")
    jobs = Jobs()

    @router.get("/numbers")
    def numbers(where: str = "", sort: str = "") -> Response:
        return array(source.numbers(where, sort), "<u4")

    @router.post("/rows")
    async def rows(request: Request) -> Response:
        wanted = ids_of(json_object(await read_body(request, limits), '{"ids": [0, 1]}'), source, MOST_ROWS)
        return JSONResponse([source.row(i) for i in wanted])

    @router.post("/search")
    async def nearest(
        request: Request,
        near: int | None = None,
        text: str = "",
        box: str = "",
        where: str = "",
        top: int = Query(200, ge=1, le=limits.top),
    ) -> Response:
        upload = None if near is not None or text else (await read_images(request, limits))[0]
        vector = await run_in_threadpool(query, source, model, limits, near, text, upload, box)
        hits = await run_in_threadpool(partial(search, source.need_store(), vector, top, where=where or None))
        found = [(number, hit.score) for hit in hits if (number := source.number(hit.path)) is not None]
        return JSONResponse({"ids": [number for number, _ in found], "scores": [round(s, 5) for _, s in found]})

    @router.get("/column/{name}")
    def column(name: str) -> Response:
        source.need_store().check_columns([name])
        return JSONResponse(colours(source.table[name].to_pylist()))

    @router.get("/map")
    def layout(method: str = "pca") -> Response:
        source.need_store()
        return later(map_job(jobs, source, method), partial(array, kind="<f4"))

    @router.post("/export")
    async def export(request: Request) -> Response:
        given = json_object(await read_body(request, limits), '{"ids": [0, 1], "format": "csv"}')
        chosen = ids_of(given, source)
        if not chosen:
            raise HTTPException(400, "no image is selected: choose some on the map or in the grid first")
        form = one_of("format", given.get("format", "csv"), FORMATS)
        method = one_of("method", given.get("method", "pca"), METHODS)
        xy = await run_in_threadpool(map_job(jobs, source, method).future.result)
        data = await run_in_threadpool(WRITERS[form], source, chosen, xy[chosen])
        name = {"Content-Disposition": f'attachment; filename="selection.{form}"'}
        return Response(data, media_type=FORMATS[form], headers=name)

    add_finds(router, jobs, source, limits)
    return router


def add_finds(router: APIRouter, jobs: Jobs, source: Source, limits: Limits) -> None:
    """/api/find/…: near-duplicates, clusters and outliers of `embedding.manage`."""

    def find(kind: str, arguments: Any, work: Callable[[Any], Any]) -> Response:
        source.need_store()
        return later(jobs.start(kind, arguments, len(source), work), JSONResponse)

    @router.get("/find/duplicates")
    def duplicates(threshold: float = Query(0.97, gt=0, le=1), where: str = "") -> Response:
        def work(progress: Any) -> dict[str, Any]:
            groups = manage.duplicates(source.need_store(), threshold, where=where or None, on_progress=progress)
            return {"groups": [numbered(source, group) for group in groups]}

        return find("duplicates", (threshold, where), work)

    @router.get("/find/clusters")
    def clusters(k: int = Query(12, ge=1, le=1000), where: str = "") -> Response:
        def work(progress: Any) -> dict[str, Any]:
            found = manage.clusters(source.need_store(), k, where=where or None, on_progress=progress)
            groups: list[list[str]] = [[] for _ in range(k)]
            for path, cluster in found.items():
                groups[cluster].append(path)
            return {"groups": [numbered(source, group) for group in groups if group]}

        return find("clusters", (k, where), work)

    @router.get("/find/outliers")
    def outliers(top: int = Query(100, ge=1, le=limits.top), where: str = "") -> Response:
        def work(progress: Any) -> dict[str, Any]:
            found = manage.outliers(source.need_store(), top, where=where or None, on_progress=progress)
            pairs = [(n, score) for path, score in found if (n := source.number(path)) is not None]
            return {"ids": [n for n, _ in pairs], "scores": [round(score, 5) for _, score in pairs]}

        return find("outliers", (top, where), work)


def map_job(jobs: Jobs, source: Source, method: str) -> Job:
    return jobs.start(f"map {method}", None, len(source), partial(coordinates, source, method))


def later(job: Job, sent: Callable[[Any], Response]) -> Response:
    """What a job has found, or 202 with its progress."""
    found = job.result(AT_ONCE)
    return JSONResponse(job.state, 202) if found is None else sent(found)


# ---- requests --------------------------------------------------------------------------------------------------------


def array(values: np.ndarray, kind: str) -> Response:
    """An array as its bytes."""
    return Response(np.ascontiguousarray(values, kind).tobytes(), media_type="application/octet-stream")


def ids_of(given: dict[str, Any], source: Source, most: int | None = None) -> list[int]:
    """The image numbers of a request. Raises for what is none."""
    ids = given.get("ids")
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise HTTPException(400, '"ids" is a list of image numbers, such as [0, 1]')
    if most is not None and len(ids) > most:
        raise HTTPException(413, f"{len(ids)} images in one request, more than {most}")
    return [source.check(i) for i in ids]


def numbered(source: Source, paths: list[str]) -> list[int]:
    return [number for path in paths if (number := source.number(path)) is not None]


def query(
    source: Source, model: FrozenModel, limits: Limits, near: int | None, text: str, upload: bytes | None, box: str
) -> np.ndarray:
    """The vector [D] of an image of the store, of a text, or of an upload; box: "x0,y0,x1,y1" from 0 to 1, a part of it."""
    store = source.need_store()
    if text:
        if model.words is None:
            raise DinoError(
                f"this store was filled by {store.facts.model_name}, which has no text tower: words need a store made with "
                "`dinov3 embed --model dinov3_vitl16_dinotxt_tet1280d20h24l`"
            )
        with model.busy:
            return model.words(text)
    if near is not None and not box:
        row = source.table["id"][source.check(near)].as_py()
        found = store.rows(["vector"], f"id = {row}")["vector"].to_pylist()
        if not found:
            raise DinoError(f"{source.name(near)} is no longer in the store: load the page again")
        return np.asarray(found[0], np.float32)
    data = source.read(near) if near is not None else upload
    assert data is not None, (near, text)
    image = open_image(data, target_short_side=None if box else 1024, max_pixels=limits.pixels).image
    with model.busy:
        return query_vector(store, cropped(image, box) if box else image, model.net, model.preprocessing)


def cropped(image: Any, box: str) -> Any:
    """The part of an image that "x0,y0,x1,y1", from 0 to 1, names; at least a pixel."""
    try:
        x0, y0, x1, y1 = (min(max(float(number), 0.0), 1.0) for number in box.split(","))
    except ValueError:
        raise DinoError(f'a box is "x0,y0,x1,y1" with numbers from 0 to 1, not {box!r:.60}') from None
    if not (x0 < x1 and y0 < y1):
        raise DinoError(f"the box {box!r:.60} is empty: draw a rectangle")
    (w, h), left, top = image.size, int(x0 * image.width), int(y0 * image.height)
    left, top = min(left, w - 1), min(top, h - 1)
    return image.crop((left, top, max(round(x1 * w), left + 1), max(round(y1 * h), top + 1)))


# ---- the map ---------------------------------------------------------------------------------------------------------


def coordinates(source: Source, method: str, progress: Callable[[int], None]) -> np.ndarray:
    """[N, 2] float32 from −1 to 1, the aspect kept: the first two principal components of unit vectors, or UMAP."""
    if one_of("method", method, METHODS) == "umap":
        return scaled(umap(source.vectors))
    return scaled(principal(source.vectors))


def principal(vectors: np.ndarray) -> np.ndarray:
    """The first two principal components [N, 2] of unit vectors; the largest loading of each is positive."""
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    mean = units.mean(0, dtype=np.float64)
    covariance = (units.T @ units).astype(np.float64) / len(units) - np.outer(mean, mean)
    axes = np.linalg.eigh(covariance)[1][:, :-3:-1]  # [D, 2], the widest first
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), range(axes.shape[1])])
    found = (units - mean.astype(np.float32)) @ axes.astype(np.float32)
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))


def umap(vectors: np.ndarray) -> np.ndarray:
    if importlib.util.find_spec("umap") is None:
        raise DinoError(
            "the map by UMAP needs umap-learn (`pip install umap-learn`); the one by PCA needs nothing more"
        )
    if len(vectors) < 5:
        raise DinoError(f"UMAP needs at least 5 images, not {len(vectors)}: take PCA")
    from umap import UMAP

    return UMAP(n_neighbors=min(15, len(vectors) - 1), metric="cosine", random_state=0, n_jobs=1).fit_transform(vectors)


def scaled(xy: np.ndarray) -> np.ndarray:
    low, high = xy.min(0), xy.max(0)
    return ((xy - (low + high) / 2) / max(float((high - low).max()) / 2, 1e-12)).astype(np.float32)


def colours(values: list[Any]) -> dict[str, Any]:
    """What colours points by a column: its numbers, or its most frequent values and which of them each image has."""
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in known):
        return {
            "kind": "number",
            "values": [plain(value) if value is None else plain(float(value)) for value in values],
        }
    texts = ["" if value is None else str(value)[:80] for value in values]
    counts = Counter(texts).most_common()
    code = {text: i for i, (text, _) in enumerate(counts[:COLOURS])}
    shown = [{"name": text or "(none)", "count": count} for text, count in counts[:COLOURS]]
    if len(counts) > COLOURS:
        shown.append({"name": "others", "count": sum(count for _, count in counts[COLOURS:])})
    return {"kind": "category", "names": shown, "codes": [code.get(text, COLOURS) for text in texts]}


# ---- a selection as a file -------------------------------------------------------------------------------------------


def _rows(source: Source, chosen: list[int], xy: np.ndarray) -> list[dict[str, Any]]:
    rows = [{**source.row(i), "path": source.paths[i]} for i in chosen]
    return [row | {"x": float(x), "y": float(y)} for row, (x, y) in zip(rows, xy)]


def write_csv(source: Source, chosen: list[int], xy: np.ndarray) -> bytes:
    """Every column and the place on the map, without vectors; no text is a formula for a spreadsheet."""
    rows = _rows(source, chosen, xy)
    with io.StringIO(newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        writer.writerows([manage.csv_cell(value) for value in row.values()] for row in rows)
        return file.getvalue().encode()


def write_json(source: Source, chosen: list[int], xy: np.ndarray) -> bytes:
    vectors = source.vectors[chosen].tolist()
    return json.dumps([row | {"vector": v} for row, v in zip(_rows(source, chosen, xy), vectors)]).encode()


def write_parquet(source: Source, chosen: list[int], xy: np.ndarray) -> bytes:
    """id, name, the store's columns, x, y float32 and vector list<float32>: what embedding viewers open."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    D = source.vectors.shape[1]
    table = source.table.take(chosen).drop_columns(["id"])
    table = table.add_column(0, "name", pa.array([source.name(i) for i in chosen], pa.string()))
    table = table.add_column(0, "id", pa.array(chosen, pa.int64()))
    for name, values in (("x", xy[:, 0]), ("y", xy[:, 1])):
        table = table.append_column(name, pa.array(values, pa.float32()))
    flat = pa.array(source.vectors[chosen].ravel(), pa.float32())
    table = table.append_column(
        "vector", pa.ListArray.from_arrays(np.arange(len(chosen) + 1, dtype=np.int32) * D, flat)
    )
    with io.BytesIO() as file:
        pq.write_table(table, file)
        return file.getvalue()


WRITERS = {"csv": write_csv, "json": write_json, "parquet": write_parquet}
