"""An HTTP service over one model and, if given, one store: /embed, /search, /health. `dinov3 serve` runs it.

Images come in request bodies only; no name of a file on the server is ever taken. Images of requests that arrive while the
model works form its next batch (nothing waits for a batch to fill). Refusals are those of `web`, and 503: too many at once.

Left out: vectors of texts, patch features, users and encryption (put a proxy in front), several models.

Shapes: N images of a request, B images of a batch, D width of a vector.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from torch import Tensor, nn

import dinov3
from dinov3.data.images import open_image
from dinov3.data.transforms.inputs import Geometry, Preprocessing
from dinov3.embedding.search import search
from dinov3.embedding.store import EmbeddingStore
from dinov3.errors import DinoError, ImageError, one_of, only_known
from dinov3.features import auto_workers, prepare, vectors_of
from dinov3.web import LIMITS, LOOPBACK, Limits, content_type, guard, json_object, read_body, read_images
from dinov3.weights.identity import name_of

NPY = ("application/x-npy", "application/octet-stream")
OPTIONS = ("top", "where", "exact")  # of a search
Input = tuple[Tensor, Geometry]  # [3, h, w], normalised


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

    async def alone(self, make: Callable[[Any], np.ndarray], given: Any) -> np.ndarray:
        """`make(given)` in the model's thread, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, make, given)

    def _forward(self, inputs: list[Input]) -> np.ndarray:
        self.batches += 1
        batch = torch.stack([x for x, _ in inputs]), [geometry for _, geometry in inputs]
        (found,) = vectors_of(self.model, [batch], preprocessing=self.preprocessing, pooling=self.pooling)
        return found.cpu().numpy()

    def close(self) -> None:
        self._thread.shutdown()
        self._decoders.shutdown(cancel_futures=True)


def application(
    model: nn.Module,
    preprocessing: Preprocessing,
    *,
    pooling: str = "cls",
    store: EmbeddingStore | None = None,
    vector_of: Callable[[str], np.ndarray] | None = None,
    hosts: tuple[str, ...] = LOOPBACK,
    limits: Limits = LIMITS,
    batch_size: int = 16,
) -> FastAPI:
    """The service. `hosts`: as for `web.guard`. A store must have been filled by this model and preprocessing; `vector_of`
    makes a text a vector of its space, where the model has a text tower (`pipeline.both_sides`)."""
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
    guard(app, hosts)

    async def embedded(images: list[bytes]) -> np.ndarray:
        if batches.waiting + len(images) > limits.waiting:
            raise HTTPException(503, f"{batches.waiting} images are waiting already: try again later")
        return await batches.vectors(images, limits.pixels)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        rows = await asyncio.to_thread(len, store) if store is not None else None
        about_text = {"text": vector_of is not None}
        return {
            "status": "ok",
            **about,
            **about_text,
            "rows": rows,
            "waiting": batches.waiting,
            "batches": batches.batches,
        }

    @app.post("/embed")
    async def embed(request: Request) -> Response:
        only_known("/embed has no option", request.query_params, ["format"])
        form = _form(request)
        vectors = await embedded(await read_images(request, limits))
        if form == "npy":
            return Response(_npy(vectors), media_type=NPY[0])
        return JSONResponse({**about, "vectors": vectors.tolist()})

    @app.post("/search")
    async def search_store(request: Request) -> Response:
        if store is None:
            raise HTTPException(404, "this service has no store: start it with --store STORE")
        given: dict[str, Any] = dict(request.query_params)
        only_known("the address of a search has no option", given, OPTIONS)
        if content_type(request) == "application/json":
            given |= json_object(await read_body(request, limits), '{"vector": [0.1, …], "top": 10}')
            only_known("a search has no option", given, ["vector", "text", *OPTIONS])
            if ("text" in given) == ("vector" in given):
                raise HTTPException(400, 'a search takes an image, or JSON with either "vector" or "text"')
            vector = await batches.alone(_text_query(vector_of), given["text"]) if "text" in given else _vector(given)
        else:
            images = await read_images(request, limits)
            if len(images) != 1:
                raise HTTPException(400, f"a search takes one image, not {len(images)}")
            (vector,) = await embedded(images)
        hits = await asyncio.to_thread(partial(search, store, vector, **_options(given, limits)))
        return JSONResponse({"hits": [dataclasses.asdict(hit) for hit in hits]})

    return app


# ---- requests --------------------------------------------------------------------------------------------------------


def _form(request: Request) -> str:
    """json or npy: `?format=`, else the Accept header."""
    if (wanted := request.query_params.get("format")) is not None:
        return one_of("format", wanted, ("json", "npy"))
    return "npy" if any(kind in request.headers.get("accept", "") for kind in NPY) else "json"


def _npy(vectors: np.ndarray) -> bytes:
    with io.BytesIO() as file:
        np.save(file, vectors)
        return file.getvalue()


def _vector(given: dict[str, Any]) -> np.ndarray:
    try:
        vector = np.asarray(given.get("vector"), dtype=np.float32)
    except (TypeError, ValueError):
        vector = np.empty((0, 0), np.float32)
    if vector.ndim != 1:
        raise HTTPException(400, '"vector" must be a list of numbers, or send an image as the body')
    return vector


def _text_query(vector_of: Callable[[str], np.ndarray] | None) -> Callable[[Any], np.ndarray]:
    if vector_of is None:
        raise HTTPException(
            400, "this service's model has no text tower: send an image or a vector, or serve a store of dino.txt"
        )

    def make(text: Any) -> np.ndarray:
        if not isinstance(text, str) or not text.strip():
            raise DinoError('"text" must be a sentence, such as "a dog on a beach"')
        return vector_of(text)

    return make


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
