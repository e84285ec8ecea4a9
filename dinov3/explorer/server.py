"""The explorer's service: the page, the images by number, and what the page's views ask for (`table`, `patches`).

It listens on loopback, checks the Host header and where a request comes from, takes no name of a file from anybody, and
sends a Content-Security-Policy that lets the page load nothing from elsewhere.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image

import dinov3
from dinov3.explorer import patches, table
from dinov3.explorer.source import FrozenModel, Source
from dinov3.web import LIMITS, LOOPBACK, Limits, guard, refuse_other_sites
from dinov3.weights.identity import name_of

PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
FIRST = 100  # names in /api/info
MOST_ROWS = 1000  # a request


def application(
    source: Source, model: FrozenModel, *, hosts: tuple[str, ...] = LOOPBACK, limits: Limits = LIMITS
) -> FastAPI:
    """The service over one source; a store's model must be the one that filled it."""
    app = FastAPI(title="dinov3 explorer", version=dinov3.__version__, docs_url=None, redoc_url=None, openapi_url=None)
    refuse_other_sites(app)
    guard(app, hosts)

    @app.middleware("http")
    async def headers(request: Request, go: Any) -> Response:
        response = await go(request)
        response.headers.update(HEADERS)
        return response

    @app.get("/api/info")
    def info() -> dict[str, Any]:
        return about(source, model)

    @app.get("/api/images")
    def images(
        offset: int = Query(0, ge=0), limit: int = Query(100, ge=1, le=MOST_ROWS), where: str = "", sort: str = ""
    ) -> Response:
        found = source.numbers(where, sort)
        rows = [source.row(int(i)) for i in found[offset : offset + limit]]
        return JSONResponse(rows, headers={"X-Total": str(len(found))})

    add_images(app, source, limits)
    app.include_router(table.routes(source, model, limits))
    cache = patches.FeatureCache(source, model, max_pixels=limits.pixels)
    app.include_router(patches.routes(source, cache, limits))
    add_page(app)
    return app


def about(source: Source, model: FrozenModel) -> dict[str, Any]:
    """What the page shows before any request: model, images, what it can do."""
    net: Any = model.net
    store = source.store
    return {
        "kind": source.kind,
        "uri": source.uri,
        "root": source.root,
        "count": len(source),
        "model": name_of(net),
        "random": bool(net.origin.random),
        "width": store.facts.dim if store is not None else net.embed_dim,
        "patch": net.patch_size,
        "layers": net.n_blocks,
        "debias": patches.MOST_DIRECTIONS,
        "size": model.preprocessing.size,
        "preprocessing": str(model.preprocessing),
        "has_text": model.words is not None,
        "has_umap": importlib.util.find_spec("umap") is not None,
        "columns": source.columns,
        "names": [source.name(i) for i in range(min(len(source), FIRST))],
    }


def add_images(app: FastAPI, source: Source, limits: Limits) -> None:
    """/api/thumb and /api/image: JPEGs of a largest side, upright."""
    decoders = threading.BoundedSemaphore(os.cpu_count() or 1)

    @lru_cache(maxsize=4096)  # thumbnails, some kB each
    def thumbnail(number: int, side: int, stamp: str) -> bytes:
        return encoded(number, side)

    def encoded(number: int, side: int) -> bytes:
        with decoders:
            image = source.image(number, side, limits.pixels).image
            image.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
            with io.BytesIO() as file:
                image.save(file, "JPEG", quality=86)
                return file.getvalue()

    def jpeg(request: Request, number: int, side: int, small: bool) -> Response:
        stamp = source.stamp(number)
        tag = hashlib.blake2b(f"{source.paths[number]}\0{stamp}\0{side}".encode(), digest_size=12).hexdigest()
        headers = {"ETag": f'"{tag}"', "Cache-Control": "private, no-cache"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        data = thumbnail(number, side, stamp) if small else encoded(number, side)
        return Response(data, media_type="image/jpeg", headers=headers)

    @app.get("/api/thumb/{number}")
    def thumb(request: Request, number: int, side: int = Query(128, ge=16, le=512)) -> Response:
        return jpeg(request, number, side, True)

    @app.get("/api/image/{number}")
    def image(request: Request, number: int, side: int = Query(1024, ge=16, le=4096)) -> Response:
        return jpeg(request, number, side, False)


def add_page(app: FastAPI) -> None:
    """The files of the page, by name from a list: no other file can be requested."""
    files = {path.name: path for path in PAGE.iterdir() if path.suffix in TYPES and path.is_file()}

    def sent(path: Path) -> Response:
        data = path.read_bytes()
        return Response(data, media_type=TYPES[path.suffix], headers={"Cache-Control": "no-cache"})

    @app.get("/")
    def index() -> Response:
        return sent(files["index.html"])

    @app.get("/{name}")
    def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, f"this page has no file {name!r:.100}")
        return sent(files[name])
