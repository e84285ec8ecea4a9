"""The image view's routes: features, foreground, PCA, matches, on two images with the same thing planted in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from planted import squares, write_pair

import dinov3
from dinov3.dense import pca

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

from dinov3.explorer.patches import FeatureCache, View
from dinov3.explorer.server import application
from dinov3.explorer.source import FrozenModel, Source

SIZE = 256
VIEW = View(11, SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("explorer") / "pair")


@pytest.fixture(scope="module")
def client(folder: Path, model: FrozenModel) -> Iterator[TestClient]:
    with TestClient(application(Source.open(folder), model), base_url="http://localhost") as client:
        yield client


def patches(client: TestClient, image: int, **query: Any) -> np.ndarray:
    response = client.get(f"/api/features/{image}", params={"size": SIZE, **query})
    assert response.status_code == 200, response.text
    h, w, D = map(int, response.headers["x-grid"].split(","))
    return np.frombuffer(response.content, "<f2").reshape(h, w, D).astype(np.float32)


def ask(client: TestClient, path: str, **body: Any) -> Any:
    response = client.post(f"/api/{path}", json={"size": SIZE, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_features_are_the_unit_patches_of_embed_on_the_whole_image(client: TestClient, folder: Path) -> None:
    for layer in (-1, 5):
        want = dinov3.embed(dinov3.load(), folder / "b.png", shape="long", size=SIZE, layer=layer)
        got = patches(client, 1, layer=layer)
        assert got.shape == (12, 16, 192)
        np.testing.assert_allclose(got, F.normalize(want.patches[0], dim=-1), atol=1e-3)
    assert client.get(f"/api/features/1?size={SIZE}").headers["x-image"] == "256,192"


def test_a_patch_of_the_square_finds_the_square_of_the_other_image(client: TestClient) -> None:
    first, second = patches(client, 0), patches(client, 1)
    inside, outside = squares((12, 16))
    cosine = second @ first[6, 5]
    assert cosine[inside[1]].min() > cosine[outside[1]].max() + 0.1


def test_three_clicks_separate_the_square_in_both_images(client: TestClient) -> None:
    found = ask(client, "foreground", points=[[0, 6, 5, 1], [0, 1, 14, 0], [0, 10, 10, 0]])
    inside, outside = squares((12, 16))
    for image in (0, 1):
        logit = patches(client, image) @ np.array(found["weight"]) + found["bias"]
        assert (logit[inside[image]] > 0).all()
        assert (logit[outside[image]] < 0).mean() > 0.95


def test_one_click_takes_the_patches_least_like_it_as_background(client: TestClient) -> None:
    found = ask(client, "foreground", points=[[0, 6, 5, 1]])
    inside, outside = squares((12, 16))
    logit = patches(client, 1) @ np.array(found["weight"]) + found["bias"]
    assert logit[inside[1]].min() > logit[outside[1]].max()


def test_pca_is_that_of_all_images_together(client: TestClient, folder: Path, model: FrozenModel) -> None:
    found = ask(client, "pca", images=[0, 1], components=3)
    cache = FeatureCache(Source.open(folder), model)
    features = [cache.get(image, VIEW) for image in (0, 1)]
    want = pca.fit(features, 3)
    projected = patches(client, 1) @ np.array(found["directions"]).T - np.array(found["offset"])
    np.testing.assert_allclose(projected, want(features[1])[0], atol=2e-3)
    np.testing.assert_allclose(found["deviation"], want.deviation, rtol=1e-3)
    assert found["inside"] is None
    # of the square alone: where its classifier is negative there is no colour
    only = ask(client, "pca", images=[0, 1], components=3, points=[[0, 6, 5, 1], [0, 1, 14, 0], [0, 10, 10, 0]])
    inside, outside = squares((12, 16))
    logit = patches(client, 1) @ np.array(only["inside"]["weight"]) + only["inside"]["bias"]
    assert (logit[inside[1]] > 0).all()
    assert (logit[outside[1]] < 0).mean() > 0.95
    assert sum(only["share"]) <= 1
    assert only["directions"] != found["directions"]


def test_an_image_matches_itself_patch_by_patch(client: TestClient) -> None:
    found = ask(client, "match", left=1, right=1)
    assert found["total"] == 12 * 16
    assert all(line[:2] == line[2:4] and line[5] for line in found["lines"])
    two = ask(client, "match", left=0, right=1)
    cosines = [line[4] for line in two["lines"]]
    assert cosines == sorted(cosines, reverse=True)
    assert 0 < two["total"] <= 12 * 16


def test_what_is_painted_in_one_image_is_found_in_the_other(client: TestClient) -> None:
    inside, outside = squares((12, 16))
    square = [row * 16 + column for row in range(2, 8) for column in range(8, 14)]  # of b.png
    with client.stream("POST", "/api/example", json={"size": SIZE, "image": 1, "cells": square}) as response:
        example, other = map(json.loads, response.iter_lines())
    assert (example["image"], example["name"], other["image"], other["grid"]) == (1, "b.png", 0, [12, 16])
    found = np.isin(np.arange(12 * 16), other["cells"]).reshape(12, 16)
    assert found[inside[0]].all()
    assert found[outside[0]].mean() < 0.05
    assert example["score"] > 0.9
    assert other["score"] > 0.8


def test_directions_of_position_are_removed(folder: Path, model: FrozenModel) -> None:
    cache, view = FeatureCache(Source.open(folder), model), View.of({"size": SIZE, "debias": "4"}, model.net)
    removed, bias = cache.get(0, view).patches[0].float(), cache.bias(11)
    np.testing.assert_allclose(removed @ bias.directions[:, :4], 0, atol=2e-3)
    want = bias.remove(cache.get(0, VIEW), 4).patches[0].float()
    np.testing.assert_allclose(removed, F.normalize(want, dim=-1), atol=2e-3)
    assert cache.computed == 1


def test_features_are_computed_once_and_the_oldest_make_room(folder: Path, model: FrozenModel) -> None:
    one = 12 * 16 * 192 * 2  # bytes
    cache = FeatureCache(Source.open(folder), model, max_bytes=2 * one)
    first = cache.get(0, VIEW)
    assert cache.get(0, VIEW) is first
    cache.get(1, VIEW)
    assert (cache.computed, cache.bytes) == (2, 2 * one)
    cache.get(0, VIEW)  # used last, so the other one goes
    cache.get(0, View(3, SIZE))
    assert (cache.computed, cache.bytes) == (3, 2 * one)
    assert cache.get(0, VIEW) is first
    cache.get(1, VIEW)
    assert cache.computed == 4


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("features/2?size=256", None, "no image 2"),
        ("features/0?size=250", None, "multiple of the patch (16)"),
        ("features/0?size=1e9", None, "size is a whole number"),
        ("features/0?size=99999968", None, "between 16 and 2048"),
        ("features/0?layer=12", None, "layer lies between -12 and 11"),
        ("pca", {"images": []}, "1 to 12"),
        ("pca", {"images": [0, 7]}, "images lies between 0 and 1"),
        ("pca", {"images": [0], "components": 99}, "components lies between"),
        ("pca", [1], "no JSON object"),
        ("match", {"left": 0}, "right is a whole number"),
        ("match", {"left": 0, "right": True}, "right is a whole number"),
        ("foreground", {"points": [[0, 6, 5, 0]]}, "a click on the object is needed"),
        ("foreground", {"points": [[0, 60, 5, 1]]}, "12 × 16 patches"),
        ("foreground", {"points": [[0, 6, 5]]}, "a point is"),
        ("foreground", {}, "points is a list of 1"),
        ("features/0?size=256&debias=11", None, "debias lies between 0 and 10"),
        ("example", {"image": 0, "cells": []}, "at least one"),
        ("example", {"image": 0, "cells": [192]}, "cells lies between 0 and 191"),
        ("example", {"image": 0, "cells": list(range(192))}, "something around it"),
    ],
)
def test_what_is_wrong_is_one_sentence(client: TestClient, path: str, body: Any, sentence: str) -> None:
    if isinstance(body, dict):
        body = {"size": SIZE, **body}
    refused = client.get(f"/api/{path}") if body is None else client.post(f"/api/{path}", json=body)
    assert refused.status_code == 400
    assert list(refused.json()) == ["error"]
    assert sentence in refused.json()["error"]


def test_an_image_that_cannot_be_read_is_a_sentence(tmp_path: Path, model: FrozenModel) -> None:
    write_pair(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    with TestClient(application(Source.open(tmp_path), model), base_url="http://localhost") as client:
        refused = client.get("/api/features/2")  # a, b, broken
        assert refused.status_code == 422
        assert refused.json()["error"]
        assert patches(client, 0).shape == (12, 16, 192)
    assert torch.is_grad_enabled()
