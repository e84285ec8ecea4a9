"""The image view's routes: features of an image for the page, and what is fitted or searched with those of several.

The page computes cosine maps itself, from float16 unit vectors. The server computes features, each once (`FeatureCache`),
fits (PCA, foreground) and gives the page the few numbers that it applies to features it has, and finds matches.

Frames: an image keeps its aspect, its long side becomes `size` and nothing is cropped, so the patch grid covers the whole
image: patch (row, column) of h × w has its centre at ((column + 0.5)/w, (row + 0.5)/h) of the image's sides.

Legend: h×w patch grid, D width, K components.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask
from torch import Tensor

from dinov3.data.transforms.inputs import Geometry
from dinov3.dense import debias, example, foreground, matching, pca
from dinov3.dense.debias import PositionBias
from dinov3.errors import DinoError, ImageError
from dinov3.explorer.source import FrozenModel, Source
from dinov3.features import Features, default_preprocessing, extract, prepare
from dinov3.web import LIMITS, Limits, json_object, read_body

LARGEST, MOST_IMAGES, MOST_POINTS, MOST_COMPONENTS = 2048, 12, 4096, 12  # px, and what one request may name
STRENGTH = 100.0  # C of the foreground's regression on unit vectors: a click alone decides its surroundings
MOST_DIRECTIONS = 10  # of position
LINES = 400  # matches that one response has


@dataclass(frozen=True)
class View:
    """Which features of an image: 0-based layer, long side in pixels, how many directions of position are removed."""

    layer: int
    size: int
    debias: int = 0

    @classmethod
    def of(cls, given: Mapping[str, Any], model: Any) -> View:
        layer = whole("layer", given.get("layer", -1), -model.n_blocks, model.n_blocks - 1)
        size = whole("size", given.get("size", 512), model.stride, LARGEST)
        if size % model.stride:
            raise DinoError(f"size={size} is no multiple of the patch ({model.stride})")
        return cls(range(model.n_blocks)[layer], size, whole("debias", given.get("debias", 0), 0, MOST_DIRECTIONS))


class FeatureCache:
    """Features of single images, computed once; those used longest ago make room (`max_bytes`).

    Patches are unit vectors in float16. One image at a time goes through the model, whoever asks.
    """

    def __init__(
        self, source: Source, model: FrozenModel, *, max_bytes: int = 1 << 30, max_pixels: int = LIMITS.pixels
    ) -> None:
        self.source, self.model, self.max_bytes, self.max_pixels = source, model, max_bytes, max_pixels
        self.preprocessing = default_preprocessing(model.net, shape="long")
        self.bytes = self.computed = 0
        self._found: OrderedDict[tuple[int, View], Features] = OrderedDict()
        self._bias: dict[int, PositionBias] = {}  # of a layer
        self._lock = Lock()

    def get(self, image: int, view: View) -> Features:
        """Raises `ImageError` for an image that cannot be read."""
        if (found := self.peek(image, view)) is not None:
            return found
        if view.debias:
            plain = self.get(image, replace(view, debias=0))
            features = self.bias(view.layer).remove(plain, view.debias)
            found = replace(features, patches=matching.unit_maps(features).half())
            self._add(image, view, found)
            return found
        preprocessing = self.preprocessing.with_(size=view.size)
        decoded = self.source.image(image, preprocessing.target_short_side, self.max_pixels)
        x, geometry = prepare(decoded, preprocessing)
        with self.model.busy:
            if (found := self.peek(image, view)) is not None:  # computed while this one waited
                return found
            batch = x[None], [geometry]
            (features,) = extract(self.model.net, [batch], preprocessing=preprocessing, layer=view.layer)
            self.computed += 1
            found = replace(features, patches=matching.unit_maps(features).half().cpu())
            self._add(image, view, found)
        return found

    def bias(self, layer: int) -> PositionBias:
        """The directions of position of a layer, measured once, at the probe's size: other sizes keep a small part."""
        with self.model.busy:
            if layer not in self._bias:
                self._bias[layer] = debias.measure(self.model.net, layer=layer, count=MOST_DIRECTIONS)
        return self._bias[layer]

    def peek(self, image: int, view: View) -> Features | None:
        """The features if they were computed already."""
        with self._lock:
            if (image, view) not in self._found:
                return None
            self._found.move_to_end((image, view))
            return self._found[image, view]

    def _add(self, image: int, view: View, features: Features) -> None:
        with self._lock:
            if (image, view) not in self._found:
                self.bytes += features.patches.nbytes
            self._found[image, view] = features
            while self.bytes > self.max_bytes and len(self._found) > 1:
                _, old = self._found.popitem(last=False)
                self.bytes -= old.patches.nbytes


def routes(source: Source, cache: FeatureCache, limits: Limits = LIMITS) -> APIRouter:
    router = APIRouter(prefix="/api")
    turn = asyncio.Lock()  # images in the order of the requests
    warm = itertools.count()

    async def body(request: Request) -> tuple[dict[str, Any], View]:
        given = json_object(await read_body(request, limits), '{"images": [0, 1], "layer": -1, "size": 512}')
        return given, View.of(given, cache.model.net)

    @router.get("/features/{image}")
    async def features(request: Request, image: int) -> Response:
        """float16, little-endian, [h, w, D], unit vectors; X-Grid: h,w,D; X-Image: width,height of the original."""
        view = View.of(request.query_params, cache.model.net)
        source.check(image)
        if (found := cache.peek(image, view)) is None:
            async with turn:
                if await request.is_disconnected():  # a slider has moved on: nobody waits for these
                    return Response(status_code=499)
                found = await run_in_threadpool(cache.get, image, view)
        (h, w), geometry = found.grid_hw, found.geometry[0]
        headers = {
            "X-Grid": f"{h},{w},{found.patches.shape[-1]}",
            "X-Image": f"{geometry.width},{geometry.height}",
            "Cache-Control": "no-store",
        }
        data = found.patches[0].contiguous().numpy().astype("<f2", copy=False).tobytes()
        first = BackgroundTask(warm_up) if next(warm) == 0 else None
        return Response(data, media_type="application/octet-stream", headers=headers, background=first)

    @router.post("/foreground")
    async def separate(request: Request) -> dict[str, Any]:
        """{points: [[image, row, column, 1 object | 0 background], …]} → weight [D], bias of P(object) = σ(w·x + b)."""
        given, view = await body(request)
        found = await run_in_threadpool(classifier, cache, view, points_of(given))
        return {"weight": rounded(found.weight), "bias": float(found.bias)}

    @router.post("/pca")
    async def directions(request: Request) -> dict[str, Any]:
        """{images, components, points?} → directions [K][D] of all images together, `offset` (the mean's coordinates),
        `deviation` and `share` of the variance [K]; with points of the object's patches only: `inside` {weight, bias}."""
        given, view = await body(request)
        images, points = images_of(given, source), points_of(given, least=0)
        components = whole("components", given.get("components", 3), 1, MOST_COMPONENTS)

        def fitted() -> dict[str, Any]:
            features = [cache.get(image, view) for image in images]
            inside = classifier(cache, view, points) if points else None
            masks = [inside(f) > 0.5 for f in features] if inside is not None else None
            found = pca.fit(features, components, masks)
            return {
                "directions": rounded(found.directions.T),
                "offset": rounded(found.mean @ found.directions),
                "deviation": rounded(found.deviation),
                "share": rounded(found.variance_share),
                "inside": {"weight": rounded(inside.weight), "bias": float(inside.bias)}
                if inside is not None
                else None,
            }

        return await run_in_threadpool(fitted)

    @router.post("/match")
    async def match(request: Request) -> dict[str, Any]:
        """{left, right} → lines [[row, column, row, column, cosine, 1 where it agrees with one plane], …], best first."""
        given, view = await body(request)
        pair = [source.check(whole(name, given.get(name), 0, len(source) - 1)) for name in ("left", "right")]
        return await run_in_threadpool(matches, *(cache.get(image, view) for image in pair))

    @router.post("/example")
    async def find(request: Request) -> Response:
        """{image, cells: painted patches, row · w + column} → a line of JSON for each image, the example first:
        {image, name, grid, cells: where the same thing is, score} or {image, name, error}."""
        given, view = await body(request)
        image = source.check(whole("image", given.get("image"), 0, len(source) - 1))
        learned = await run_in_threadpool(painted, cache.get, image, view, given.get("cells"))
        order = [image, *(number for number in range(len(source)) if number != image)]
        lines = (json.dumps(found_in(cache, learned, number, view)) + "\n" for number in order)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers={"Cache-Control": "no-store"})

    return router


def painted(get: Callable[[int, View], Features], image: int, view: View, cells: Any) -> example.Example:
    """The `Example` of painted patches of an image."""
    features = get(image, view)
    (h, w), (H, W) = features.grid_hw, features.geometry[0].input_hw
    if not isinstance(cells, list) or not cells or len(cells) > h * w:
        raise DinoError("cells is a list of the painted patches, at least one")
    mask = torch.zeros(h * w)
    mask[[whole("cells", cell, 0, h * w - 1) for cell in cells]] = 1
    # the grid covers the whole image, so the mask is painted at the input's size, as if that were the original's
    at_input = Geometry(W, H, 1.0, 1.0, 0.0, 0.0, (H, W), (H, W), False)
    large = F.interpolate(mask.view(1, 1, h, w), (H, W), mode="nearest")[0, 0]
    return example.learn(replace(features, geometry=(at_input,)), large)


def found_in(cache: FeatureCache, learned: example.Example, image: int, view: View) -> dict[str, Any]:
    """Where one image has the thing; score: mean cosine of those patches with what they are most like of it."""
    about: dict[str, Any] = {"image": image, "name": cache.source.name(image)}
    try:
        features = cache.get(image, view)
    except ImageError as error:
        return about | {"error": str(error)}
    cells = (learned(features)[0] > 0.5).flatten().nonzero().flatten()
    alike = (features.patches[0].float().flatten(0, 1)[cells] @ learned.inside.T).amax(-1) if len(cells) else None
    score = round(float(alike.mean()), 4) if alike is not None else 0.0
    return about | {"grid": list(features.grid_hw), "cells": cells.tolist(), "score": score}


def warm_up() -> None:
    """The first optimiser of a process imports for seconds: while the user looks at the page, not at the first click."""
    foreground.logistic(torch.eye(2), torch.tensor([0, 1]), STRENGTH)


def classifier(cache: FeatureCache, view: View, points: Sequence[tuple[int, int, int, int]]) -> foreground.Foreground:
    """A logistic regression on clicked patches (image, row, column, label) of several images.

    Without a patch of the background, those least like the clicked ones count as background (`foreground.click_labels`).
    """
    clicked: dict[int, list[tuple[int, int, int]]] = {}
    for image, row, column, label in points:
        clicked.setdefault(image, []).append((row, column, label))
    features = {image: cache.get(image, view) for image in clicked}
    only_inside = all(label for *_, label in points)
    labels = []
    for image, places in clicked.items():
        h, w = features[image].grid_hw
        for row, column, _ in places:
            if not (row < h and column < w):
                raise DinoError(f"image {image} has {h} × {w} patches at this size, none at ({row}, {column})")
        if only_inside:
            inside = [features[image].pixel_of_patch(row, column) for row, column, _ in places]
            labels.append(foreground.click_labels(features[image], inside))
            continue
        labels.append(torch.full((h, w), foreground.MIXED))
        for row, column, label in places:
            labels[-1][row, column] = label
    found, _ = foreground.fit(list(features.values()), labels, C=STRENGTH)
    return found


def matches(left: Features, right: Features) -> dict[str, Any]:
    """Mutual nearest neighbours of two images, the most similar first, and which agree with one plane (a homography)."""
    found = matching.match(left, right, mutual=True)
    total = len(found)
    found = found[found.similarity.argsort(descending=True)[:LINES]]
    agree = torch.zeros(len(found), dtype=torch.bool)
    if len(found) >= 8:  # four always agree
        patch_px = right.geometry[0].width / right.grid_hw[1]
        with suppress(DinoError):  # no plane
            points = matching.pixels(left, found.left), matching.pixels(right, found.right)
            _, agree = matching.homography(*points, tolerance=patch_px)
    lines = [
        [a // left.grid_hw[1], a % left.grid_hw[1], b // right.grid_hw[1], b % right.grid_hw[1], round(cosine, 4), same]
        for a, b, cosine, same in zip(
            found.left.tolist(), found.right.tolist(), found.similarity.tolist(), agree.int().tolist()
        )
    ]
    return {"lines": lines, "total": total, "agree": int(agree.sum())}


# ---- requests --------------------------------------------------------------------------------------------------------


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number of a request, from a query string or JSON."""
    text = str(value)
    if isinstance(value, (bool, float)) or not text.removeprefix("-").isdecimal() or len(text) > 12:
        raise DinoError(f"{name} is a whole number, not {text!r:.50}")
    if not low <= int(text) <= high:
        raise DinoError(f"{name} lies between {low} and {high}, {int(text)} does not")
    return int(text)


def images_of(given: Mapping[str, Any], source: Source) -> list[int]:
    """The numbers of a request's images, at most `MOST_IMAGES`."""
    listed = given.get("images")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MOST_IMAGES:
        raise DinoError(f"images is a list of 1 to {MOST_IMAGES} numbers of images")
    return [source.check(whole("images", image, 0, len(source) - 1)) for image in listed]


def points_of(given: Mapping[str, Any], least: int = 1) -> list[tuple[int, int, int, int]]:
    """(image, row, column, label) of every clicked patch of a request."""
    listed = given.get("points", [])
    if not isinstance(listed, list) or not least <= len(listed) <= MOST_POINTS:
        raise DinoError(f"points is a list of {least} to {MOST_POINTS} entries [image, row, column, 1 or 0]")
    points = []
    for point in listed:
        if not isinstance(point, list) or len(point) != 4:
            raise DinoError("a point is [image, row, column, 1 for the object or 0 for the background]")
        image, row, column = (whole(name, v, 0, 1 << 31) for name, v in zip(("image", "row", "column"), point))
        points.append((image, row, column, whole("label", point[3], 0, 1)))
    if points and not any(label for *_, label in points):
        raise DinoError("a click on the object is needed")
    return points


def rounded(values: Tensor) -> Any:
    """Numbers for JSON."""
    return np.round(values.double().cpu().numpy(), 6).tolist()
