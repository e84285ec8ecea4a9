"""Downloads: a content-addressed cache of files fetched by URL, with the standard library alone.

    <root>/blobs/<sha256>             the files, named by what they hold: two files of one base name never mix
    <root>/urls/<sha256 of URL>.json  what a URL gave last time: blob, size, ETag, Last-Modified
    <root>/partial/…                  interrupted downloads, resumed with Range and If-Range

The root is `$DINOV3_CACHE`, else `$XDG_CACHE_HOME/dinov3`, else `~/.cache/dinov3`; deleting it is always safe. A file
is either whole or not there: a blob appears by an atomic rename after its length, and its hash if one is given,
have been compared. A hash in a file's name is a promise and always compared. Two processes that request one URL wait for
each other (a lock file; where the system has no `fcntl`, each downloads for itself). Signatures and passwords are sent,
and neither stored nor shown.

Why our own: `torch.hub.download_url_to_file` keeps no half files and compares a hash, but does not resume (the largest file
has 27 GB), revalidate, or know a file of another URL by its name from this one; `huggingface_hub` fetches from its own
hub only, and does so here too. Left out: parallel ranges, eviction.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

from dinov3.errors import WeightsError, without_secrets
from dinov3.files import DISK_ERRORS, atomically
from dinov3.weights.catalog import ACCESS

Progress = Callable[[int, int | None], None]  # (bytes so far, bytes in all if known)

TIMEOUT_S = 30.0
ATTEMPTS = 3  # a cut connection is resumed this often before giving up
CHUNK_BYTES = 1 << 20


def root() -> Path:
    """The folder of the cache; not created before something is fetched."""
    if os.environ.get("DINOV3_CACHE"):
        return Path(os.environ["DINOV3_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dinov3"


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's bytes, 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_in_name(name: str) -> str | None:
    """`08c60483` of `dinov3_vits16_pretrain_lvd1689m-08c60483.pth`: the promise that a name makes about its content."""
    match = re.search(r"-([0-9a-f]{8,64})\.[A-Za-z]+$", name)
    return match.group(1) if match else None


def check(digest: str, name: str, *, check_hash: bool, sha256: str | None) -> None:
    """Compares a file's sha256 with `sha256` (a prefix of 8 or more digits), or with the hash in its name if it has one.

    check_hash: a name without a hash is an error. Raises `WeightsError` that shows both hashes.
    """
    promised = (sha256 or hash_in_name(name) or "").lower()
    if not promised and check_hash:
        raise WeightsError(
            f"check_hash: the name {name!r} holds no hash (…-<8 hex digits>.pth) to compare with; pass sha256=…"
        )
    if not digest.startswith(promised):
        raise WeightsError(
            f"{name!r} has sha256 {digest[: max(len(promised), 8)]}…, not the {promised} "
            f"{'expected' if sha256 else 'promised by its name'}: it is damaged or another file; delete it and fetch it again"
        )


def fetch(url: str, *, check_hash: bool = False, sha256: str | None = None, progress: Progress | None = None) -> Path:
    """The local path of a URL's content (http, https, or file, which is returned where it lies).

    A cached copy is revalidated with one conditional request and used as it is when the server cannot be reached. One that
    fits the hash in the URL's file name, or a whole `sha256`, is used without a request. check_hash: also hashes the cached
    copy again. Raises `WeightsError` with one sentence.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":
        path = Path(urllib.request.url2pathname(parts.path))
        if not path.is_file():
            raise WeightsError(f"no file at {path}")
        if check_hash or sha256:
            check(sha256_of(path), path.name, check_hash=check_hash, sha256=sha256)
        return path
    if parts.scheme not in ("http", "https"):
        raise WeightsError(f"cannot fetch {url!r}: only http, https and file URLs")

    name = Path(urllib.parse.unquote(parts.path)).name
    promised = (sha256 or hash_in_name(name) or "").lower()
    if check_hash and not promised:
        check("", name, check_hash=True, sha256=None)  # say so before gigabytes are moved
    # A name with a hash means one content, whatever the signature behind it; elsewhere a query may name another file.
    key = hashlib.sha256((without_secrets(url) if hash_in_name(name) else url).encode()).hexdigest()
    known = (
        sha256.lower() if sha256 and len(sha256) == 64 else _read_json(root() / "urls" / f"{key}.json").get("sha256")
    )
    if promised and known is not None and known.startswith(promised):
        blob = root() / "blobs" / known
        if blob.is_file() and (not (check_hash or sha256) or sha256_of(blob) == known):  # the disk may have changed it
            return blob
        blob.unlink(missing_ok=True)
    with _locked(key) as partial:
        blob = _download(url, name, key, partial, check_hash=check_hash, sha256=sha256, progress=progress)
    check(blob.name, name, check_hash=check_hash, sha256=sha256)
    return blob


@contextlib.contextmanager
def _locked(key: str) -> Iterator[Path]:
    """Where the unfinished download of a URL lies; ours alone inside the block."""
    folder = root() / "partial"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: no resuming across processes, but no mixing either
        with tempfile.TemporaryDirectory(dir=folder) as own:
            yield Path(own) / key
        return
    with (folder / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also when the process dies
        yield folder / key


def _download(
    url: str, name: str, key: str, partial: Path, *, check_hash: bool, sha256: str | None, progress: Progress | None
) -> Path:
    record = _read_json(root() / "urls" / f"{key}.json")
    cached = root() / "blobs" / record["sha256"] if record else None
    if cached is not None and (not cached.is_file() or cached.stat().st_size != record["size"]):
        cached = None

    for attempt in range(1, ATTEMPTS + 1):
        state = _read_json(partial.with_suffix(".json"))  # validator of the unfinished copy
        done = partial.stat().st_size if partial.is_file() else 0
        headers = {"User-Agent": "dinov3", "Accept-Encoding": "identity"}
        if cached is not None:
            if record.get("etag"):
                headers["If-None-Match"] = record["etag"]
            elif record.get("last_modified"):
                headers["If-Modified-Since"] = record["last_modified"]
        elif done and state.get("validator"):
            headers |= {"Range": f"bytes={done}-", "If-Range": state["validator"]}
        try:
            with _opener.open(_request(url, headers), timeout=TIMEOUT_S) as response:
                if cached is not None and _same(response.headers, record):
                    return cached  # the server ignores conditions, but says it is what we have
                _refuse_html(response.headers.get("Content-Type", ""), b"", name, url)
                total = _receive(response, partial, done, name, url, progress)
                seen = {k: response.headers.get(h) for k, h in (("etag", "ETag"), ("last_modified", "Last-Modified"))}
        except urllib.error.HTTPError as error:
            if cached is not None:  # 304: unchanged. Anything else (an expired signature): we had it from here once
                return cached
            if error.code == 416 and done:  # the unfinished copy is longer than the file: begin again
                _forget(partial)
                continue
            raise WeightsError(_refusal(error.code, name, url)) from None
        except (urllib.error.URLError, OSError, HTTPException) as error:
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise WeightsError(f"cannot write the download of {name!r} to {root()}: {error}") from None
            if cached is not None:
                return cached
            if attempt == ATTEMPTS:
                reason = getattr(error, "reason", None) or error
                way_out = (
                    f"call again to resume. {ACCESS}"
                    if _is_meta(url)
                    else "call again to resume, or pass a file's path"
                )
                raise WeightsError(f"cannot fetch {url}: {reason}; {way_out}") from None
            continue
        size = partial.stat().st_size
        if total is not None and size != total:
            if attempt == ATTEMPTS:
                raise WeightsError(
                    f"{name!r}: the connection ended after {size} of {total} bytes; call again to resume"
                )
            continue
        break
    else:
        raise WeightsError(f"cannot fetch {url}: the server and the unfinished copy disagree; call again")

    with partial.open("rb") as file:
        _refuse_html("", file.read(64), name, url, partial)
    digest = sha256_of(partial)
    try:
        check(digest, name, check_hash=check_hash, sha256=sha256)
    except WeightsError:
        _forget(partial)
        raise
    blob = root() / "blobs" / digest
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(blob)
    partial.with_suffix(".json").unlink(missing_ok=True)
    _write_json(
        root() / "urls" / f"{key}.json",
        {"url": without_secrets(url), "name": name, "sha256": digest, "size": size} | seen,
    )
    return blob


class _HttpOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> urllib.request.Request | None:
        target = args[-1]
        if urllib.parse.urlsplit(target).scheme not in ("http", "https"):
            raise WeightsError(f"the server redirects to {target}, which is no http or https URL: not followed")
        return super().redirect_request(*args)


_opener = urllib.request.build_opener(_HttpOnly)


def _request(url: str, headers: dict[str, str]) -> urllib.request.Request:
    """The request; `user:password@` of the URL becomes its Authorization header, which redirects to other hosts don't get."""
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(), headers=headers)
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
    return request


def _receive(response: Any, partial: Path, done: int, name: str, url: str, progress: Progress | None) -> int | None:
    """Writes the body after what is already there (206) or afresh (200); the full length if the server says it."""
    headers = response.headers
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if response.status == 206 and match and int(match[1]) == done:
        total = int(match[2]) if match[2] != "*" else None
    else:  # the server knows no ranges, or the file has changed
        done = 0
        length = headers.get("Content-Length")
        total = int(length) if length is not None and length.isdecimal() else None
        _forget(partial)
        # A weak ETag promises equal meaning, not equal bytes: such a download is not resumed.
        etag = headers.get("ETag", "")
        validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
        _write_json(partial.with_suffix(".json"), {"validator": validator})
    with partial.open("ab") as file:
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)
            done += len(chunk)
            if progress:
                progress(done, total)
    return total


def _same(headers: Any, record: dict[str, Any]) -> bool:
    etag, modified, length = headers.get("ETag"), headers.get("Last-Modified"), headers.get("Content-Length")
    if etag and record.get("etag"):
        return etag == record["etag"]
    return bool(modified) and modified == record.get("last_modified") and length == str(record["size"])


def _refuse_html(content_type: str, start: bytes, name: str, url: str, partial: Path | None = None) -> None:
    if content_type.startswith("text/html") or start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        if partial is not None:
            _forget(partial)
        raise WeightsError(f"{url} gave a web page instead of {name!r}" + (f". {ACCESS}" if _is_meta(url) else ""))


def _is_meta(url: str) -> bool:
    """Whether the file is one of Meta's gated ones; CLIP's vocabulary on the same host is open."""
    parts = urllib.parse.urlsplit(url)
    return (parts.hostname or "").endswith(".meta.com") or "dinov3" in Path(parts.path).name


def _refusal(code: int, name: str, url: str) -> str:
    if code in (401, 403):
        return f"the server refuses {name!r} (HTTP {code})" + (
            f". {ACCESS}" if _is_meta(url) else "; it needs a valid link"
        )
    if code in (404, 410):
        return f"there is no {name!r} at {url} (HTTP {code})" + (f". {ACCESS}" if _is_meta(url) else "")
    return f"cannot fetch {url}: the server answered HTTP {code}; try again later"


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    partial.with_suffix(".json").unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(value))
