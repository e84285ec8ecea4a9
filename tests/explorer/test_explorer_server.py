"""The explorer's service: what it sends, and the list of what is tried and refused."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from dinov3.errors import DinoError
from dinov3.explorer.server import PAGE, application
from dinov3.explorer.source import FrozenModel, Source


def number_of(source: Source, name: str) -> int:
    return next(i for i in range(len(source)) if source.name(i) == name)


def test_the_page_says_what_it_shows(client: TestClient, source: Source) -> None:
    info = client.get("/api/info").json()
    assert (info["kind"], info["count"], info["width"], info["patch"]) == ("store", 17, 192, 16)
    assert info["columns"] == {"path": "string", "width": "int32", "height": "int32", "kind": "string"}
    assert set(info["names"]) == {source.name(i) for i in range(17)}


def test_images_are_upright_jpegs_that_are_sent_once(client: TestClient, source: Source) -> None:
    asked = client.get(f"/api/thumb/{number_of(source, 'coffee/0.jpg')}?side=40")
    assert Image.open(io.BytesIO(asked.content)).size == (40, 30)
    again = client.get(asked.request.url.path + "?side=40", headers={"if-none-match": asked.headers["etag"]})
    assert (asked.headers["content-type"], again.status_code, again.content) == ("image/jpeg", 304, b"")
    whole = client.get(f"/api/image/{number_of(source, 'coffee/1.jpg')}")
    assert Image.open(io.BytesIO(whole.content)).size == (76, 60)


def test_an_image_that_lies_on_its_side_is_turned(tmp_path: Path, model: FrozenModel) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    page = TestClient(application(Source.open(tmp_path / "a.jpg"), model), base_url="http://localhost")
    assert Image.open(io.BytesIO(page.get("/api/image/0").content)).size == (40, 60)
    assert page.get("/api/info").json()["kind"] == "image"


def test_rows_pass_the_filter_in_the_order_asked_for(client: TestClient) -> None:
    asked = client.get("/api/images", params={"where": "kind = 'coffee' AND width < 80", "sort": "-width", "limit": 2})
    assert [(row["name"], row["width"]) for row in asked.json()] == [("coffee/1.jpg", 76), ("coffee/2.jpg", 72)]
    assert asked.headers["x-total"] == "4"
    numbers = client.get("/api/numbers", params={"where": "kind = 'coffee'"}).content
    assert len(np.frombuffer(numbers, "<u4")) == 5
    rows = client.post("/api/rows", json={"ids": [3]}).json()
    assert rows[0] == client.get("/api/images?offset=3&limit=1").json()[0]


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("wdth > 500", "did you mean 'width'?"),
        ("width > ", "cannot be used"),
        ("length(path) > 3", "length is a function"),
        ("1 = 1; DROP TABLE images", "is no part of one"),
    ],
)
def test_a_wrong_filter_is_said_in_a_sentence(client: TestClient, where: str, sentence: str) -> None:
    refused = client.get("/api/numbers", params={"where": where})
    assert refused.status_code == 400
    assert sentence in refused.json()["error"]


def test_a_folder_has_images_and_says_how_to_make_a_store(images: Path, model: FrozenModel) -> None:
    page = TestClient(application(Source.open(images), model), base_url="http://localhost")
    assert (page.get("/api/info").json()["kind"], len(page.get("/api/images").json())) == ("folder", 17)
    assert "dinov3 embed" in page.get("/api/numbers?where=width>3").json()["error"]


# ---- tried and refused -----------------------------------------------------------------------------------------------

OUTSIDE = [
    "/../../../../etc/passwd",
    "/..%2f..%2f..%2fetc%2fpasswd",
    "/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/%2e%2e%5c%2e%2e%5cserver.py",
    "/..%252f..%252fserver.py",
    "//etc/passwd",
    "/%2fetc%2fpasswd",
    "/file:///etc/passwd",
    "/file:%2f%2f%2fetc%2fpasswd",
    "/server.py",
    "/page/index.html",
    "/index.html%00.js",
    "/api/thumb/../../server.py",
    "/api/thumb/%2fetc%2fpasswd",
    "/api/image/file:%2f%2f%2fetc%2fpasswd",
    "/api/thumb/-1",
    "/api/thumb/17",
    "/api/thumb/0?side=100000",
    "/openapi.json",
    "/docs",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_but_the_page_and_its_images_is_sent(client: TestClient, path: str) -> None:
    refused = client.get(path)
    assert refused.status_code in (400, 404)
    assert list(refused.json()) == ["error"]


def test_a_link_out_of_the_folder_is_not_followed(client: TestClient, source: Source) -> None:
    number = number_of(source, "rocket/link.jpg")
    for path in (f"/api/thumb/{number}", f"/api/image/{number}"):
        refused = client.get(path)
        assert refused.status_code == 422
        assert "outside the folders" in refused.json()["error"]


@pytest.mark.parametrize("planted", ["../outside/secret.jpg", "file:///etc/hostname", "https://example.org/a.jpg"])
def test_a_row_that_leads_out_of_the_root_is_not_read(tmp_path: Path, planted: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "root").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "outside" / "secret.jpg")
    root = str(tmp_path / "root")
    path = planted if "://" in planted else f"{root}/{planted}"
    with pytest.raises(DinoError, match=r"outside the folders|behind an address|no longer there"):
        Source("store", "store", root, [path], [root]).read(0)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "evil.example:8010"}, 421),
        ({"host": "127.0.0.1.evil.example"}, 421),
        ({"host": ""}, 421),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:9999"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": "http://localhost", "sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_other_sites_cannot_use_the_service(client: TestClient, headers: dict[str, str], status: int) -> None:
    asked = client.post("/api/rows", json={"ids": [0]}, headers=headers)
    assert asked.status_code == status
    assert client.get("/api/thumb/0", headers=headers).status_code == status


def test_a_link_from_another_site_opens_the_page(client: TestClient) -> None:
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"x" * ((1 << 20) + 1), 413, "more than the 1 MB"),
        (b"", 400, "has no body"),
        (b"[1", 400, "no JSON object"),
        (b'{"ids": ["../a"]}', 400, "list of image numbers"),
        (b'{"ids": [99]}', 400, "there is no image 99"),
    ],
)
def test_wrong_bodies_are_refused_in_a_sentence(client: TestClient, body: bytes, status: int, sentence: str) -> None:
    refused = client.post("/api/rows", content=body)
    assert (refused.status_code, sentence in refused.json()["error"]) == (status, True)


# ---- the page's files ------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_from_elsewhere_and_is_small(client: TestClient) -> None:
    files = [path for path in PAGE.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1 << 20
    for path in files:
        text = path.read_text()
        assert re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text.replace("http://www.w3.org/2000/svg", "")) == [], path
        sent = client.get(f"/{path.name}")
        assert sent.text == text
        assert "default-src 'none'" in sent.headers["content-security-policy"]
        assert sent.headers["x-content-type-options"] == "nosniff"
    assert client.get("/").text == (PAGE / "index.html").read_text()


def test_the_verb_says_in_a_sentence_what_it_cannot_open(tmp_path: Path, monkeypatch, capsys) -> None:
    from dinov3 import cli

    monkeypatch.setattr(sys, "argv", ["dinov3", "explore", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert "error: no images in" in capsys.readouterr().err
