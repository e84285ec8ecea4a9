"""The store view's requests: search, map, what is odd, the file of a selection."""

from __future__ import annotations

import csv
import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from dinov3.errors import DinoError
from dinov3.explorer import table
from dinov3.explorer.jobs import Jobs
from dinov3.explorer.source import Source
from dinov3.explorer.table import colours, principal, scaled


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request waits for its job's result, however busy the machine is."""
    monkeypatch.setattr(table, "AT_ONCE", 60.0)


def number_of(source: Source, name: str) -> int:
    return next(i for i in range(len(source)) if source.name(i) == name)


def names(source: Source, ids: list[int]) -> list[str]:
    return [source.name(i) for i in ids]


def test_search_finds_the_planted_copy_by_number_upload_and_crop(
    client: TestClient, source: Source, images: Path
) -> None:
    first = number_of(source, "chelsea/0.jpg")
    by_number = client.post("/api/search", params={"near": first, "top": 5}).json()
    assert {*names(source, by_number["ids"][:2])} == {"chelsea/0.jpg", "chelsea/copy.jpg"}
    assert by_number["scores"][1] > 0.9999
    upload = (images / "chelsea" / "0.jpg").read_bytes()
    by_upload = client.post("/api/search", params={"top": 5}, content=upload).json()
    assert by_upload["ids"] == by_number["ids"]
    np.testing.assert_allclose(by_upload["scores"], by_number["scores"], atol=1e-3)
    crop = client.post("/api/search", params={"near": first, "box": "0.1,0.1,0.9,0.9", "top": 5}).json()
    assert {name.split("/")[0] for name in names(source, crop["ids"])} == {"chelsea"}
    assert crop["scores"][0] < 0.999
    whole = client.post("/api/search", params={"near": first, "box": "0,0,1,1", "top": 2}).json()
    assert whole["ids"] == by_number["ids"][:2]


def test_search_keeps_to_the_filter(client: TestClient, source: Source) -> None:
    first = number_of(source, "chelsea/0.jpg")
    found = client.post("/api/search", params={"near": first, "where": "kind = 'rocket'"}).json()
    assert {name.split("/")[0] for name in names(source, found["ids"])} == {"rocket"}


@pytest.mark.parametrize(
    ("params", "body", "status", "sentence"),
    [
        ({"near": 99}, b"", 400, "there is no image 99"),
        ({"near": 0, "box": "1,2"}, b"", 400, "a box is"),
        ({"near": 0, "box": "0.5,0.5,0.2,0.6"}, b"", 400, "is empty: draw a rectangle"),
        ({"text": "a cat"}, b"", 400, "has no text tower"),
        ({"near": 0, "where": "knd = 'a'"}, b"", 400, "did you mean 'kind'"),
        ({"near": 0, "top": 0}, b"", 400, "top"),
        ({}, b"nonsense", 422, "not an image"),
        ({}, b"", 400, "has no body"),
        ({}, b"x" * ((1 << 20) + 1), 413, "more than the 1 MB"),
        ({}, b"P6 1100 1000 255\n", 413, "1100x1000"),
    ],
)
def test_wrong_searches_are_refused_in_a_sentence(
    client: TestClient, params: dict[str, Any], body: bytes, status: int, sentence: str
) -> None:
    refused = client.post("/api/search", params=params, content=body)
    assert (refused.status_code, sentence in refused.json()["error"]) == (status, True), refused.json()


def test_words_search_where_there_is_a_text_tower(source: Source, model, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinov3.explorer.server import application

    vector = source.vectors[number_of(source, "coffee/3.jpg")]
    monkeypatch.setattr(model, "words", lambda text: {"a cup": vector}[text])
    page = TestClient(application(source, model), base_url="http://localhost")
    assert page.get("/api/info").json()["has_text"] is True
    assert names(source, page.post("/api/search?text=a cup&top=1").json()["ids"]) == ["coffee/3.jpg"]


def test_principal_components_are_those_of_the_plain_decomposition() -> None:
    x = np.random.default_rng(0).normal(size=(50, 6)) * [5, 3, 1, 1, 1, 1]
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    centred = units - units.mean(0)
    want = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    found = principal(x.astype(np.float32))
    np.testing.assert_allclose(np.abs(found), np.abs(want), atol=1e-4)
    np.testing.assert_array_equal(found, principal(x.astype(np.float32)))
    assert np.abs(scaled(found)).max() == pytest.approx(1)
    assert principal(np.ones((1, 4), np.float32)).tolist() == [[0, 0]]


def test_the_map_has_a_place_for_every_image_and_copies_share_one(client: TestClient, source: Source) -> None:
    xy = np.frombuffer(client.get("/api/map").content, "<f4").reshape(-1, 2)
    a, b = number_of(source, "chelsea/0.jpg"), number_of(source, "chelsea/copy.jpg")
    assert xy.shape == (17, 2)
    np.testing.assert_allclose(xy[a], xy[b], atol=1e-3)
    assert "one of pca, umap" in client.get("/api/map?method=tsne").json()["error"]


def test_duplicates_clusters_and_outliers_are_those_of_manage(client: TestClient, source: Source) -> None:
    groups = client.get("/api/find/duplicates?threshold=0.9999").json()["groups"]
    assert [sorted(names(source, group)) for group in groups] == [["chelsea/0.jpg", "chelsea/copy.jpg"]]
    clusters = client.get("/api/find/clusters?k=3").json()["groups"]
    assert sorted(i for cluster in clusters for i in cluster) == list(range(17))
    odd = client.get("/api/find/outliers?top=1").json()
    assert names(source, odd["ids"]) == ["rocket/link.jpg"]  # one grey among photographs
    some = client.get("/api/find/clusters", params={"k": 1, "where": "kind = 'coffee'"}).json()["groups"]
    assert len(some[0]) == 5
    assert "clusters of 17 images" in client.get("/api/find/clusters?k=18").json()["error"]


def test_a_newer_computation_stops_the_older_one_and_failures_are_tried_again() -> None:
    jobs, started, stopped = Jobs(), threading.Event(), threading.Event()

    def endless(progress) -> None:
        started.set()
        try:
            while True:
                progress(1)
        finally:
            stopped.set()

    first = jobs.start("find", 1, 10, endless)
    assert started.wait(5)
    assert jobs.start("find", 1, 10, endless) is first
    second = jobs.start("find", 2, 10, lambda progress: "done")
    assert second.result(5) == "done"
    assert stopped.wait(5)
    assert first.result(5) is None

    def fails(progress) -> None:
        raise DinoError("no")

    with pytest.raises(DinoError, match="no"):
        jobs.start("find", 3, 10, fails).result(5)
    assert jobs.start("find", 3, 10, lambda progress: 4).result(5) == 4


def test_columns_colour_by_their_most_frequent_values_or_as_numbers(client: TestClient, source: Source) -> None:
    kinds = client.get("/api/column/kind").json()
    assert {n["name"]: n["count"] for n in kinds["names"]} == {"chelsea": 6, "rocket": 6, "coffee": 5}
    assert all(kinds["names"][code]["name"] in source.name(i) for i, code in enumerate(kinds["codes"]))
    assert client.get("/api/column/width").json()["kind"] == "number"
    assert colours([1, None, float("inf")])["values"] == [1.0, None, None]
    many = colours([str(i) for i in range(20)])
    assert (many["names"][-1], max(many["codes"])) == ({"name": "others", "count": 8}, 12)
    assert "did you mean 'kind'" in client.get("/api/column/knd").json()["error"]


def test_a_selection_is_saved_with_its_places_and_vectors(client: TestClient, source: Source) -> None:
    ids = [number_of(source, "coffee/1.jpg"), number_of(source, "rocket/2.jpg")]
    xy = np.frombuffer(client.get("/api/map").content, "<f4").reshape(-1, 2)[ids]

    def saved(form: str) -> bytes:
        sent = client.post("/api/export", json={"ids": ids, "format": form})
        assert sent.headers["content-disposition"] == f'attachment; filename="selection.{form}"'
        return sent.content

    table = pq.read_table(io.BytesIO(saved("parquet")))
    assert table.column_names == ["id", "name", "path", "width", "height", "kind", "x", "y", "vector"]
    np.testing.assert_allclose(np.stack(table["vector"].to_numpy()), source.vectors[ids])
    np.testing.assert_allclose(np.c_[table["x"], table["y"]], xy)
    assert table["name"].to_pylist() == ["coffee/1.jpg", "rocket/2.jpg"]
    rows = json.loads(saved("json"))
    assert [row["kind"] for row in rows] == ["coffee", "rocket"]
    np.testing.assert_allclose([row["vector"] for row in rows], source.vectors[ids], rtol=1e-6)
    lines = list(csv.DictReader(io.StringIO(saved("csv").decode())))
    assert [line["name"] for line in lines] == ["coffee/1.jpg", "rocket/2.jpg"]
    assert float(lines[0]["x"]) == pytest.approx(xy[0, 0])
    for wrong, sentence in (
        ({"ids": []}, "no image is selected"),
        ({"ids": ids, "format": "xls"}, "csv, json, parquet"),
    ):
        assert sentence in client.post("/api/export", json=wrong).json()["error"]
