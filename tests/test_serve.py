"""The HTTP service: the page's commands as printed, limits, batches."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

import dinov3
from dinov3.data.sources import open_source
from dinov3.embedding.pipeline import embed_source
from dinov3.embedding.store import EmbeddingStore
from dinov3.features import default_preprocessing

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

from dinov3 import serve, web

BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "serve.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    model = dinov3.load()
    app = serve.application(
        model, default_preprocessing(model, size=32), limits=web.Limits(1, 1, 3, waiting=8), batch_size=4
    )
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def png(seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_vectors_are_those_of_encode_in_json_and_npy(client: TestClient) -> None:
    images = [png(0), png(1), png(2)]
    want = dinov3.encode(dinov3.load(), images, size=32)
    files = [("image", data) for data in images]
    asked = client.post("/embed?format=npy", files=files)
    np.testing.assert_allclose(np.load(io.BytesIO(asked.content)), want, atol=2e-4)
    one = client.post("/embed", content=images[1]).json()
    np.testing.assert_allclose(one["vectors"], want[1:2], atol=2e-4)
    assert client.post("/embed", content=images[1], headers={"accept": "application/x-npy"}).content[:6] == b"\x93NUMPY"


@pytest.mark.parametrize(
    ("request_", "status", "sentence"),
    [
        ({"content": b"nonsense"}, 422, "image 0: not an image"),
        ({"content": b""}, 400, "has no body"),
        ({"content": b"x" * (1 << 20) + b"x"}, 413, "more than the 1 MB"),
        ({"content": png(0, (1100, 1000))[:1000]}, 413, "1100x1000"),
        ({"files": [("image", b"x")] * 4}, 413, "more than 3 images in one request"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
        ({"content": b"x", "headers": {"host": "evil.example:8000"}}, 421, "'evil.example'"),
        ({"content": png(), "params": {"format": "csv"}}, 400, "json, npy"),
        ({"content": png(), "params": {"fromat": "npy"}}, 400, "no option 'fromat'; did you mean 'format'?"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_a_status(client: TestClient, request_, status, sentence) -> None:
    refused = client.post("/embed", **request_)
    assert (refused.status_code, list(refused.json())) == (status, ["error"])
    assert sentence in refused.json()["error"]
    assert client.get("/health").json()["waiting"] == 0


def test_a_search_without_a_store_says_how_to_give_one(client: TestClient) -> None:
    refused = client.post("/search", content=png())
    assert (refused.status_code, "--store" in refused.json()["error"]) == (404, True)


@pytest.mark.parametrize("method, path, status", [("GET", "/embed", 405), ("GET", "/", 404), ("POST", "/serach", 404)])
def test_a_path_or_method_that_is_not_there_names_those_that_are(client: TestClient, method, path, status) -> None:
    refused = client.request(method, path)
    assert refused.status_code == status
    assert refused.json()["error"] == (
        f"there is no {method} {path!r}: there are GET /health, POST /embed, POST /search"
    )


def test_an_unknown_option_of_a_search_is_refused(tmp_path: Path) -> None:
    model = dinov3.load()
    preprocessing = default_preprocessing(model, size=32)
    (tmp_path / "a.png").write_bytes(png())
    embed_source(model, open_source(tmp_path / "a.png"), tmp_path / "store", preprocessing=preprocessing)
    app = serve.application(model, preprocessing, store=EmbeddingStore.open(tmp_path / "store"))
    with TestClient(app, base_url="http://localhost") as client:
        for request in ({"params": {"tpo": 3}, "content": png()}, {"json": {"vector": [1.0] * 192, "tpo": 3}}):
            refused = client.post("/search", **request)
            assert refused.status_code == 400
            assert "no option 'tpo'; did you mean 'top'?" in refused.json()["error"]


def test_images_that_arrive_while_the_model_works_are_its_next_batches_of_one_size(client: TestClient) -> None:
    import asyncio

    batches = client.app.state.batches  # type: ignore[attr-defined]
    before, images = batches.batches, [png(i) for i in range(9)]

    async def together() -> list[np.ndarray]:
        own = serve.Batches(batches.model, batches.preprocessing, "cls", 4)
        task = asyncio.create_task(own.run())
        found = await asyncio.gather(*(own.vectors([image], 10**6) for image in images))
        task.cancel()
        own.close()
        assert own.batches < len(images)
        return found

    found = np.concatenate(asyncio.run(together()))
    np.testing.assert_allclose(found, dinov3.encode(batches.model, images, size=32), atol=2e-4)
    assert batches.batches == before


@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here")
def test_the_commands_of_the_page_run_as_printed(tmp_path: Path, skimage_images: Path) -> None:
    images = tmp_path / "demo-out" / "images"  # as `make demo` leaves them
    images.mkdir(parents=True)
    for name in ("chelsea.png", "coffee.png"):
        Image.open(skimage_images / name).save(images / f"{Path(name).stem}.jpg")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (embed, start), curls = (block.strip().replace("8000", str(port)).splitlines() for block in BLOCKS)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    verb = f"{sys.executable} -m dinov3"
    done = subprocess.run(embed.replace("dinov3", verb, 1), shell=True, cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    command = start.replace("dinov3", verb, 1).split()
    service = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while subprocess.run(["curl", "-sf", f"http://127.0.0.1:{port}/health"], capture_output=True).returncode:
            assert service.poll() is None, service.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        shown = [
            subprocess.run(curl, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
            for curl in curls
        ]
    finally:
        service.send_signal(signal.SIGTERM)
    assert service.wait(60) in (0, -signal.SIGTERM)
    assert f"2 images of store: http://127.0.0.1:{port} (Ctrl-C ends it)" in service.communicate()[1]
    assert json.loads(shown[0])["rows"] == 2
    vectors = np.load(tmp_path / "vectors.npy")
    np.testing.assert_allclose(json.loads(shown[1])["vectors"], vectors[:1], atol=2e-4)
    hits = json.loads(shown[3])["hits"]
    assert [Path(hit["path"]).name for hit in hits] == ["chelsea.jpg", "coffee.jpg"]
    stored = EmbeddingStore.open(tmp_path / "store").vectors()
    np.testing.assert_allclose(
        vectors[0], dict(zip(map(os.path.basename, stored[0]), stored[1]))["chelsea.jpg"], atol=2e-4
    )
