"""What the store view requests: images that pass a filter, rows, search, the map, what is odd, a selection as a file.

What is said of many images are arrays of little-endian numbers (uint32 image numbers, float32 coordinates), not JSON.

Shapes: N images, D width of a vector, n images of an answer.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from dinov3.explorer.source import FrozenModel, Source
from dinov3.web import Limits, json_object, read_body

MOST_ROWS = 1000  # of one request


def routes(source: Source, model: FrozenModel, limits: Limits) -> APIRouter:
    """The router of the store view."""
    router = APIRouter(prefix="/api")

    @router.get("/numbers")
    def numbers(where: str = "", sort: str = "") -> Response:
        return array(source.numbers(where, sort), "<u4")

    @router.post("/rows")
    async def rows(request: Request) -> Response:
        wanted = ids_of(json_object(await read_body(request, limits), '{"ids": [0, 1]}'), source, MOST_ROWS)
        return JSONResponse([source.row(i) for i in wanted])

    return router


def array(values: np.ndarray, kind: str, **headers: Any) -> Response:
    """An array as its bytes; what else is said of it goes into headers as JSON."""
    told = {"X-" + name.replace("_", "-").title(): json.dumps(value) for name, value in headers.items()}
    return Response(np.ascontiguousarray(values, kind).tobytes(), media_type="application/octet-stream", headers=told)


def ids_of(given: dict[str, Any], source: Source, most: int | None = None) -> list[int]:
    """The image numbers of a request. Raises for what is none."""
    ids = given.get("ids")
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise HTTPException(400, '"ids" is a list of image numbers, such as [0, 1]')
    if most is not None and len(ids) > most:
        raise HTTPException(413, f"{len(ids)} images in one request, more than {most}")
    return [source.check(i) for i in ids]
