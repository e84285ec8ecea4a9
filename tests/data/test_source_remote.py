"""Shards behind an address: fsspec's file system in memory, and a server on this machine that sometimes fails."""

from __future__ import annotations

import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov3.data.crops import CropConfig
from dinov3.data.datasets import make_dataset
from dinov3.data.loading import CropLoader
from dinov3.data.sources import items, open_source, open_sources
from dinov3.data.sources.items import FORWARD
from dinov3.errors import DinoError, ImageError

fsspec = pytest.importorskip("fsspec")


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (30, 40, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def shards() -> dict[str, bytes]:
    """Two tars, a compressed one and a Parquet file of eight images each."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = {}
    for number, name in enumerate(("a-0.tar", "a-1.tar", "b.tar.gz")):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz" if name.endswith("gz") else "w") as archive:
            for i in range(8):
                member = tarfile.TarInfo(f"{'cat' if i % 2 else 'dog'}/{i}.png")
                data = png(10 * number + i)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        files[name] = stream.getvalue()
    stream = io.BytesIO()
    pq.write_table(pa.table({"image": [png(30 + i) for i in range(8)]}), stream, row_group_size=3)
    return files | {"c.parquet": stream.getvalue()}


@pytest.fixture
def memory() -> Iterator[str]:
    system = fsspec.filesystem("memory")
    for name, data in shards().items():
        system.pipe(f"/shards/{name}", data)
    yield "memory://shards"
    system.rm("/shards", recursive=True)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    files: dict[str, bytes]
    failures = 0  # how many requests fail from now on
    ranges = True


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server: Any = self.server
        body, code = server.files.get(self.path.split("?")[0].lstrip("/")), 200
        if server.failures:
            server.failures -= 1
            body, code = b"later", 503
        elif body is None:
            body, code = b"no", 404
        elif server.ranges and (asked := self.headers.get("Range")):
            first, last = asked.removeprefix("bytes=").split("-")
            body, code, whole = body[int(first) : int(last) + 1], 206, len(body)
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("Accept-Ranges", "bytes")
        if code == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(items, "WAITS", (0.0, 0.0, 0.0))
    made = Server(("127.0.0.1", 0), Handler)
    made.files = shards()
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def url(server: Server, name: str) -> str:
    return f"http://127.0.0.1:{server.server_port}/{name}"


def here(tmp_path: Path) -> Path:
    for name, data in shards().items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("spec", ["", "/", "/*", "/a-{0..1}.tar", "/a-*.tar", "/b.tar.gz", "/c.parquet"])
def test_names_and_bytes_are_those_of_the_same_files_here(memory: str, tmp_path: Path, spec: str) -> None:
    local = list(open_source(f"{here(tmp_path)}{spec}"))
    found = list(open_source(memory + spec))
    assert [item.path for item in found] == [item.path for item in local]
    assert [item.read() for item in found] == [item.read() for item in local]
    assert len({item.stamp for item in found}) == len(found)


def test_classes_and_single_images_of_a_folder(memory: str) -> None:
    system = fsspec.filesystem("memory")
    for name in ("cat/1.png", "dog/2.png", "dog/readme.txt"):
        system.pipe(f"/shards/alone/{name}", png(1))
    data = make_dataset(f"{memory}/alone")
    assert [(data.name(i), data.label(i)) for i in range(len(data))] == [("cat/1.png", 0), ("dog/2.png", 1)]
    assert data.read(1) == png(1)
    assert make_dataset(f"Folder:root={memory}/a-0.tar").class_names == ["cat", "dog"]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_resumes_exactly_in_shards_of_a_server(
    server: Server, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FORWARD, "CACHED", 4096)  # so that packed ones are read forwards
    spec = "{a-0.tar,a-1.tar,b.tar.gz,c.parquet}"

    def batches(place: str, consumed: int = 0) -> list[tuple[int, ...]]:
        images = make_dataset(f"{place}{spec}")
        assert images.runs is not None
        loader = CropLoader(images, CropConfig(16, 8, 1), patch=8, batch_size=5, workers=workers)
        loader.load_state_dict({"consumed": consumed})
        return [(*b.indices, int(b.global_crops.sum())) for b in islice(loader, 14)]

    whole = batches(url(server, ""))
    assert whole == batches(f"{here(tmp_path)}/")
    assert batches(url(server, ""), consumed=20)[:10] == whole[4:]


def test_requests_are_tried_again_and_the_error_says_how_often(server: Server) -> None:
    source = open_source(url(server, "a-0.tar?token=secret"))
    server.failures = 3
    assert source.place_of(0).read() == png(0)
    server.failures = 4
    with pytest.raises(ImageError, match=r"reading http://.*/a-0.tar failed after 4 attempts: 503") as error:
        source.place_of(0).read()
    assert "secret" not in str(error.value)
    with pytest.raises(DinoError, match=r"there is no http://.*/a-9.tar"):
        open_source(url(server, "a-9.tar"))
    server.ranges = False
    with pytest.raises(DinoError, match="sends whole files only"):
        open_source(url(server, "a-1.tar"))


def test_what_cannot_be_read_is_said(memory: str) -> None:
    with pytest.raises(DinoError, match="nothing matches memory://shards/z"):
        open_source(f"{memory}/z*.tar")
    with pytest.raises(DinoError, match=r"there is no memory://shards/z.tar"):
        open_source(f"{memory}/z.tar")
    with pytest.raises(DinoError, match=r"noprotocol://x.tar failed: Protocol not known"):
        open_source("noprotocol://x.tar")
    with pytest.raises(DinoError, match=r"for training and evaluation; here they are not read \(memory://"):
        open_sources([memory])
