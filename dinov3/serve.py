"""An HTTP service over one model and, if given, one store: /embed, /search, /health. `dinov3 serve` runs it.

Images come in request bodies only; no name of a file on the server is ever taken. Images of requests that arrive while the
model works form its next batch (nothing waits for a batch to fill). Every refusal is {"error": one sentence} with a status:
400 a wrong request, 408 a body that does not arrive, 413 too large, 421 a foreign Host header, 422 no readable image,
503 too many at once.

Left out: texts as queries, patch features, users and encryption (put a proxy in front), several models.

Shapes: N images of a request, B images of a batch, D width of a vector.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from torch import Tensor, nn

import dinov3
from dinov3.data.images import open_image
from dinov3.data.transforms.inputs import Geometry, Preprocessing
from dinov3.embedding.search import search
from dinov3.embedding.store import EmbeddingStore
from dinov3.errors import DinoError, ImageError, TooLarge, one_of
from dinov3.features import auto_workers, extract, pool, prepare
from dinov3.weights.identity import name_of

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
NPY = ("application/x-npy", "application/octet-stream")
BODY_SECONDS = 60.0  # within which a request's body arrives
Input = tuple[Tensor, Geometry]  # [3, h, w], normalised


@dataclass(frozen=True)
class Limits:
    """What one request may bring."""

    megabytes: int = 32
    megapixels: int = 50
    images: int = 64
    top: int = 1000
    waiting: int = 256  # images of all requests that are not embedded yet


@dataclass
class Batches:
    """One model in a thread of its own. Images that come while it works are its next batch, one size of input at a time."""

    model: nn.Module
    preprocessing: Preprocessing
    pooling: str
    size: int = 16
    waiting: int = 0
    batches: int = 0
    _queue: asyncio.Queue[tuple[Input, asyncio.Future[np.ndarray]]] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        # The model's thread keeps torch's own number of threads; a resize must not start a pool inside each decoder.
        self._thread = ThreadPoolExecutor(1, "model")
        one_thread = partial(torch.set_num_threads, 1)
        self._decoders = ThreadPoolExecutor(auto_workers(self.model), "decode", initializer=one_thread)

    async def vectors(self, images: list[bytes], max_pixels: int) -> np.ndarray:
        """[N, D] float32. Raises `ImageError` for the first image that cannot be read."""
        self.waiting += len(images)
        try:
            loop = asyncio.get_running_loop()
            decode = partial(self._decode, max_pixels=max_pixels)
            inputs = await asyncio.gather(
                *(loop.run_in_executor(self._decoders, decode, *i) for i in enumerate(images))
            )
            futures = [loop.create_future() for _ in inputs]
            for pair in zip(inputs, futures):
                self._queue.put_nowait(pair)
            return np.stack(await asyncio.gather(*futures))
        finally:
            self.waiting -= len(images)

    def _decode(self, index: int, data: bytes, max_pixels: int) -> Input:
        target = self.preprocessing.target_short_side
        try:
            return prepare(open_image(data, target_short_side=target, max_pixels=max_pixels), self.preprocessing)
        except ImageError as error:
            raise type(error)(f"image {index}: {error}") from None

    async def run(self) -> None:
        """Embeds what is queued, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self.size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            shapes = dict.fromkeys(tuple(x.shape) for (x, _), _ in batch)
            for shape in shapes:
                same = [pair for pair in batch if tuple(pair[0][0].shape) == shape]
                try:
                    vectors = await loop.run_in_executor(self._thread, self._forward, [given for given, _ in same])
                    results: list[Any] = list(vectors)
                except Exception as error:  # the requests' own, not the end of the service
                    results = [error] * len(same)
                for (_, future), result in zip(same, results):
                    if future.done():  # its client has gone
                        continue
                    future.set_exception(result) if isinstance(result, Exception) else future.set_result(result)

    def _forward(self, inputs: list[Input]) -> np.ndarray:
        self.batches += 1
        batch = torch.stack([x for x, _ in inputs]), [geometry for _, geometry in inputs]
        (features,) = extract(self.model, [batch], preprocessing=self.preprocessing)
        return pool(features, self.pooling).float().cpu().numpy()

    def close(self) -> None:
        self._thread.shutdown()
        self._decoders.shutdown(cancel_futures=True)


def application(
    model: nn.Module,
    preprocessing: Preprocessing,
    *,
    pooling: str = "cls",
    store: EmbeddingStore | None = None,
    hosts: tuple[str, ...] = LOOPBACK,
    limits: Limits = Limits(),
    batch_size: int = 16,
) -> FastAPI:
    """The service. `hosts`: names that a request's Host header may have ("*": any), so that a page of another site cannot
    reach a service on the user's own machine. A store must have been filled by this model and preprocessing."""
    batches = Batches(model, preprocessing, pooling, batch_size)
    about = {"model": name_of(model), "preprocessing": preprocessing.id, "pooling": pooling}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batches.run())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        batches.close()

    app = FastAPI(title="dinov3", version=dinov3.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.batches = batches

    @app.middleware("http")
    async def check_host(request: Request, go: Any) -> Response:
        host = _name(request.headers.get("host", ""))
        if "*" not in hosts and host not in hosts:
            text = f"this service is not {host!r:.100}: start it with --allow-host NAME to be called so"
            return JSONResponse({"error": text}, 421)
        return await go(request)

    @app.exception_handler(DinoError)
    async def wrong(request: Request, error: DinoError) -> Response:
        status = 413 if isinstance(error, TooLarge) else 422 if isinstance(error, ImageError) else 400
        return JSONResponse({"error": str(error)}, status)

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code)

    async def embedded(images: list[bytes]) -> np.ndarray:
        if batches.waiting + len(images) > limits.waiting:
            raise HTTPException(503, f"{batches.waiting} images are waiting already: try again later")
        return await batches.vectors(images, limits.megapixels * 1_000_000)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        rows = await asyncio.to_thread(len, store) if store is not None else None
        return {"status": "ok", **about, "rows": rows, "waiting": batches.waiting, "batches": batches.batches}

    @app.post("/embed")
    async def embed(request: Request) -> Response:
        form = _form(request)
        vectors = await embedded(await _images(request, limits))
        if form == "npy":
            return Response(_npy(vectors), media_type=NPY[0])
        return JSONResponse({**about, "vectors": vectors.tolist()})

    @app.post("/search")
    async def search_store(request: Request) -> Response:
        if store is None:
            raise HTTPException(404, "this service has no store: start it with --store STORE")
        given: dict[str, Any] = dict(request.query_params)
        if _kind(request) == "application/json":
            given |= _object(await _body(request, limits))
            vector = _vector(given)
        else:
            images = await _images(request, limits)
            if len(images) != 1:
                raise HTTPException(400, f"a search takes one image, not {len(images)}")
            (vector,) = await embedded(images)
        hits = await asyncio.to_thread(partial(search, store, vector, **_options(given, limits)))
        return JSONResponse({"hits": [dataclasses.asdict(hit) for hit in hits]})

    return app


def run(app: FastAPI, host: str, port: int) -> None:
    """Serves until SIGINT or SIGTERM; requests that are being worked on are finished, for at most half a minute."""
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="warning", limit_concurrency=256, timeout_graceful_shutdown=30)


# ---- requests --------------------------------------------------------------------------------------------------------


def _name(host: str) -> str:
    """The Host header without its port."""
    return host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _form(request: Request) -> str:
    """json or npy: `?format=`, else the Accept header."""
    if (wanted := request.query_params.get("format")) is not None:
        return one_of("format", wanted, ("json", "npy"))
    return "npy" if any(kind in request.headers.get("accept", "") for kind in NPY) else "json"


def _npy(vectors: np.ndarray) -> bytes:
    with io.BytesIO() as file:
        np.save(file, vectors)
        return file.getvalue()


async def _body(request: Request, limits: Limits) -> bytes:
    """The request's body, refused as soon as it is known to be too large."""
    most = limits.megabytes << 20
    too_large = HTTPException(413, f"the request has more than the {limits.megabytes} MB that one may have")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise HTTPException(408, f"the request's body did not arrive within {BODY_SECONDS:.0f} s") from None
    if not size:
        raise HTTPException(400, "the request has no body: send an image, or images as multipart/form-data")
    return b"".join(parts)


async def _images(request: Request, limits: Limits) -> list[bytes]:
    """The image of a body, or the files of a multipart one in their order."""
    body = await _body(request, limits)
    if _kind(request) != "multipart/form-data":
        return [body]
    try:
        found = await _files(request.headers, body, limits.images)
    except MultiPartException as error:
        many = "Too many files" in error.message
        text = f"more than {limits.images} images in one request" if many else f"the multipart body: {error.message}"
        raise HTTPException(413 if many else 400, text) from None
    except (KeyError, ValueError) as error:  # no boundary, or one that is no text
        raise HTTPException(400, f"the multipart body cannot be read: {error}") from None
    if not found:
        raise HTTPException(400, "no file among the parts of the request: curl -F 'image=@a.jpg' sends one")
    return found


async def _files(headers: Headers, body: bytes, most: int) -> list[bytes]:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    form = await MultiPartParser(headers, stream(), max_files=most).parse()  # type: ignore[arg-type]
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    try:
        return [await file.read() for file in files]
    finally:
        await form.close()


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise HTTPException(400, 'the body is no JSON object such as {"vector": [0.1, …], "top": 10}')
    return value


def _vector(given: dict[str, Any]) -> np.ndarray:
    try:
        vector = np.asarray(given.get("vector"), dtype=np.float32)
    except (TypeError, ValueError):
        vector = np.empty((0, 0), np.float32)
    if vector.ndim != 1:
        raise HTTPException(400, '"vector" must be a list of numbers, or send an image as the body')
    return vector


def _options(given: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Arguments of `search` of a request's: top, where, exact."""
    text = str(given.get("top", 10))
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= limits.top:
        raise HTTPException(400, f"top is a whole number from 1 to {limits.top}, not {text!r:.50}")
    where = given.get("where")
    if where is not None and not isinstance(where, str):
        raise HTTPException(400, 'where is a text such as "width > 500"')
    exact = one_of("exact", str(given.get("exact", "false")).lower(), ("true", "false")) == "true"
    return {"top": int(text), "where": where, "exact": True if exact else None}
