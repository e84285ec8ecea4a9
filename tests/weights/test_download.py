"""Downloads against a local server that cuts connections, changes its mind, and knows or ignores ranges."""

from __future__ import annotations

import base64
import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from paths import ROOT

from dinov3.errors import WeightsError
from dinov3.weights import download as cache

BODY = bytes(range(256)) * 8192  # 2 MiB
OTHER = BODY[::-1]


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path → body); what it does wrong is set by attributes, what it was asked is kept in `log`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.log: list[dict[str, str]] = []
        self.codes: list[int] = []
        self.cut_after: list[int] = []  # per request: how many bytes to send before closing; empty: all of them
        self.ranges = self.validators = True
        self.content_type = "application/octet-stream"
        self.refuse = 0
        self.redirect = self.length = ""
        self.slow_s = 0.0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.log.append(dict(self.headers))
        body = server.files.get(self.path.split("?")[0].lstrip("/"))
        if server.redirect and body is None:
            return self._reply(302, b"", Location=server.redirect)
        if server.refuse or body is None:
            return self._reply(server.refuse or 404, b"no")
        etag = '"' + hashlib.md5(body).hexdigest() + '"'
        validators = {"ETag": etag, "Last-Modified": "Wed, 13 Aug 2025 00:00:00 GMT"} if server.validators else {}
        if server.validators and self.headers.get("If-None-Match") == etag:
            return self._reply(304, b"", **validators)
        start = 0
        asked = self.headers.get("Range")
        if asked and server.ranges and self.headers.get("If-Range") in (None, etag):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            validators["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self._reply(206 if start else 200, body[start:], **validators)

    def _reply(self, code: int, body: bytes, **headers: str) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.codes.append(code)
        self.send_response(code)
        headers |= {"Content-Type": server.content_type, "Content-Length": server.length or str(len(body))}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if server.cut_after and code in (200, 206):
            body = body[: server.cut_after.pop(0)]
            self.close_connection = True
        for i in range(0, len(body), 1 << 17):
            self.wfile.write(body[i : i + (1 << 17)])
            time.sleep(server.slow_s)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("DINOV3_CACHE", str(tmp_path / "cache"))
    with Server() as server:
        yield server
        server.shutdown()


def sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def test_a_file_is_fetched_once_and_then_revalidated(server):
    server.files["w.pth"] = BODY
    seen = []
    first = cache.fetch(server.url("w.pth"), progress=lambda done, total: seen.append((done, total)))
    assert first.read_bytes() == BODY
    assert first.name == sha(BODY)
    assert seen[-1] == (len(BODY), len(BODY))
    assert cache.fetch(server.url("w.pth")) == first
    assert server.codes == [200, 304]


def test_a_changed_file_is_fetched_again(server):
    server.files["w.pth"] = BODY
    cache.fetch(server.url("w.pth"))
    server.files["w.pth"] = OTHER
    assert cache.fetch(server.url("w.pth")).read_bytes() == OTHER


def test_offline_the_copy_is_used(server):
    server.files["w.pth"] = BODY
    url = server.url("w.pth")
    first = cache.fetch(url)
    server.shutdown()
    server.server_close()
    assert cache.fetch(url) == first
    with pytest.raises(WeightsError, match="cannot fetch"):
        cache.fetch(url + "2")


def test_an_expired_signature_does_not_take_the_copy_away(server):
    server.files["w.pth"] = BODY
    url = server.url("w.pth?Signature=secret")
    first = cache.fetch(url)
    server.refuse = 403
    assert cache.fetch(url) == first
    assert not any(b"secret" in p.read_bytes() for p in cache.root().rglob("*.json"))


def test_two_files_of_one_name_never_mix(server):
    server.files |= {"a/model.pth": BODY, "b/model.pth": OTHER}
    one, two = cache.fetch(server.url("a/model.pth")), cache.fetch(server.url("b/model.pth"))
    assert (one.read_bytes(), two.read_bytes()) == (BODY, OTHER)


def test_a_file_with_a_hash_in_its_name_is_fetched_once_whatever_the_signature(server):
    name = f"m-{sha(BODY)[:8]}.pth"
    server.files[f"a/{name}"] = BODY
    first = cache.fetch(server.url(f"a/{name}?Signature=one"))
    assert cache.fetch(server.url(f"a/{name}?Signature=two"), check_hash=True) == first
    assert len(server.codes) == 1


def test_eight_digits_in_a_name_do_not_serve_the_file_of_another_url(server):
    name = f"m-{sha(BODY)[:8]}.pth"
    server.files[f"a/{name}"] = BODY
    cache.fetch(server.url(f"a/{name}"))
    with pytest.raises(WeightsError, match="there is no"):
        cache.fetch(server.url(f"b/{name}"))
    assert cache.fetch(server.url(f"b/{name}"), sha256=sha(BODY)).read_bytes() == BODY  # the whole hash does


def test_other_bytes_than_the_name_promises_are_refused_without_being_requested_to_check(server):
    server.files["m-0123abcd.pth"] = BODY
    with pytest.raises(WeightsError, match=f"{sha(BODY)[:8]}.*0123abcd promised by its name"):
        cache.fetch(server.url("m-0123abcd.pth"))
    assert not list((cache.root() / "blobs").glob("*"))


def test_a_redirect_to_another_scheme_is_not_followed(server):
    server.redirect = "ftp://127.0.0.1/w.pth"
    with pytest.raises(WeightsError, match=r"redirects to ftp:.*, which is no http or https URL"):
        cache.fetch(server.url("w.pth"))
    server.redirect = server.url("w.pth")
    server.files["w.pth"] = BODY
    assert cache.fetch(server.url("old.pth")).read_bytes() == BODY


def test_a_length_that_is_no_number_is_ignored(server):
    server.files["w.pth"], server.length = BODY, "abc"
    assert cache.fetch(server.url("w.pth")).read_bytes() == BODY


def test_signatures_and_passwords_are_sent_and_neither_stored_nor_shown(server, capfd):
    server.files["w.pth"] = BODY
    url = server.url("w.pth?Signature=s3cret").replace("http://", "http://me:p%40ss@")
    cache.fetch(url)
    assert server.log[0]["Authorization"] == "Basic " + base64.b64encode(b"me:p@ss").decode()
    stored = [p.read_text() for p in cache.root().rglob("*.json")]
    assert len(stored) == 1
    server.refuse = 500
    with pytest.raises(WeightsError) as caught:
        cache.fetch(url.replace("w.pth", "v.pth"))
    for text in (*stored, str(caught.value), str(capfd.readouterr())):
        assert not {"s3cret", "p%40ss", "p@ss"} & set(re.findall(r"[\w@%]+", text)), text


def test_a_blob_that_the_disk_damaged_is_fetched_again_when_hashes_are_checked(server):
    name = f"m-{sha(BODY)[:8]}.pth"
    server.files[name] = BODY
    cache.fetch(server.url(name)).write_bytes(b"damaged")
    assert cache.fetch(server.url(name), check_hash=True).read_bytes() == BODY


def test_a_cut_connection_is_resumed_where_it_ended(server):
    server.files["w.pth"] = BODY
    server.cut_after = [500_000]
    assert cache.fetch(server.url("w.pth")).read_bytes() == BODY
    assert server.codes == [200, 206]
    assert server.log[1]["Range"] == "bytes=500000-"


def test_after_too_many_cuts_the_next_call_resumes(server):
    server.files["w.pth"] = BODY
    server.cut_after = [100_000] * 3
    with pytest.raises(WeightsError, match=f"after 300000 of {len(BODY)} bytes"):
        cache.fetch(server.url("w.pth"))
    assert not list((cache.root() / "blobs").glob("*"))
    assert cache.fetch(server.url("w.pth")).read_bytes() == BODY
    assert server.log[3]["Range"] == "bytes=300000-"


def test_a_file_that_changed_between_the_halves_is_restarted(server):
    server.files["w.pth"] = BODY
    server.cut_after = [100_000] * 3
    with pytest.raises(WeightsError):
        cache.fetch(server.url("w.pth"))
    server.files["w.pth"] = OTHER
    assert cache.fetch(server.url("w.pth")).read_bytes() == OTHER


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("validators", [True, False])
def test_servers_without_ranges_or_validators_give_whole_files(server, ranges, validators):
    server.ranges, server.validators = ranges, validators
    server.files["w.pth"] = BODY
    server.cut_after = [100_000]
    assert cache.fetch(server.url("w.pth")).read_bytes() == BODY
    server.files["w.pth"] = OTHER
    assert cache.fetch(server.url("w.pth")).read_bytes() == OTHER


def test_a_process_killed_in_the_middle_leaves_nothing_half(server):
    server.files["w.pth"] = BODY
    server.slow_s = 0.05
    code = f"from dinov3.weights import download; download.fetch({server.url('w.pth')!r})"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ))
    partial = cache.root() / "partial"
    deadline = time.monotonic() + 60

    def begun() -> bool:
        return any(p.stat().st_size for p in partial.glob("*") if not p.suffix and p.is_file())

    while not begun() and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.01)
    assert begun()
    child.kill()
    assert child.wait() != 0
    assert not list((cache.root() / "blobs").glob("*"))
    server.slow_s = 0.0
    assert cache.fetch(server.url("w.pth")).read_bytes() == BODY


def test_two_at_once_fetch_once(server):
    server.files["w.pth"] = BODY
    server.slow_s = 0.005
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(cache.fetch(server.url("w.pth")))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 4
    assert set(results) == {results[0]}
    assert server.codes.count(200) == 1


def test_a_wrong_hash_names_both_and_keeps_nothing(server):
    server.files["m-0123abcd.pth"] = BODY
    with pytest.raises(WeightsError, match=f"{sha(BODY)[:8]}.*0123abcd"):
        cache.fetch(server.url("m-0123abcd.pth"), check_hash=True)
    assert not list((cache.root() / "blobs").glob("*"))
    with pytest.raises(WeightsError, match="feedbeef"):
        cache.fetch(server.url("m-0123abcd.pth"), sha256="feedbeef" * 8)
    assert cache.fetch(server.url("m-0123abcd.pth"), sha256=sha(BODY)).read_bytes() == BODY


def test_a_name_without_a_hash_cannot_be_checked_and_says_so(server):
    server.files["w.pth"] = BODY
    with pytest.raises(WeightsError, match="holds no hash"):
        cache.fetch(server.url("w.pth"), check_hash=True)
    assert not server.codes


@pytest.mark.parametrize(("code", "words"), [(403, "request access"), (404, "there is no"), (500, "HTTP 500")])
def test_refusals_are_one_sentence_with_the_way_out(server, code, words):
    server.refuse = code
    with pytest.raises(WeightsError, match=words) as caught:
        cache.fetch(server.url("dinov3_vits16/dinov3_vits16_pretrain_lvd1689m-08c60483.pth?Policy=secret"))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_network_the_way_to_metas_files_is_one_sentence(monkeypatch):
    monkeypatch.setattr(cache, "ATTEMPTS", 1)
    address = "http://127.0.0.1:9/dinov3_vits16/dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    with pytest.raises(
        WeightsError, match=r"call again to resume\. Meta's files are gated: request access at https"
    ) as caught:
        cache.fetch(address)
    assert "as weights" in str(caught.value)
    assert "a folder of transformers or timm" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match=r"or pass a file's path$"):  # CLIP's vocabulary on the same host is open
        cache.fetch("http://127.0.0.1:9/thirdparty/bpe_simple_vocab_16e6.txt.gz")


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_web_page_is_not_accepted_as_weights(server, content_type):
    server.content_type = content_type
    server.files["w.pth"] = b"<!DOCTYPE html><html>log in</html>"
    with pytest.raises(WeightsError, match="web page"):
        cache.fetch(server.url("w.pth"))
    assert not list((cache.root() / "blobs").glob("*"))


def test_file_urls_are_used_where_they_lie(tmp_path):
    path = tmp_path / "a file.pth"
    path.write_bytes(BODY)
    assert cache.fetch(path.as_uri()) == path
    with pytest.raises(WeightsError, match="no file at"):
        cache.fetch((tmp_path / "none.pth").as_uri())


def test_the_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("DINOV3_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.root() == tmp_path / "dinov3"
    monkeypatch.setenv("DINOV3_CACHE", str(tmp_path / "own"))
    assert cache.root() == tmp_path / "own"
