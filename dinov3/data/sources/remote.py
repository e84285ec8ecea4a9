"""Files behind an address (`s3://`, `hf://`, `https://`, …) as files that can be sought, through fsspec (extra `remote`).

Every read is a request for a range of bytes, tried again where it fails. File systems are fsspec's own instances, asked for
at every read: it makes new ones in forked workers.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

from dinov3.errors import DinoError, ImageError, MissingExtra, install, require, without_secrets

T = TypeVar("T")
WAITS = (0.5, 2.0, 8.0)  # seconds before a request is tried again
BUFFER = 1 << 20  # bytes of a request where a file is read forwards
FINAL = (FileNotFoundError, PermissionError, NotImplementedError, ValueError)  # trying again does not help


def is_remote(path: str | os.PathLike[str]) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", os.fspath(path)) is not None


def _tried(what: str, url: str, request: Callable[[Any, str], T]) -> T:
    """`request(file system, path)`, several times where it fails. Raises `ImageError`."""
    fsspec = require("fsspec", "remote", f"reading {without_secrets(url)}")
    for wait in (*WAITS, None):
        try:
            return request(*fsspec.core.url_to_fs(url))
        except ImportError as error:  # of the library for this kind of address
            raise MissingExtra(
                f"{without_secrets(url)} needs one more library ({error}): {install('remote')}"
            ) from None
        except Exception as error:  # each kind of file system has its own
            if isinstance(error, FileNotFoundError):
                raise ImageError(f"there is no {url}") from None
            if wait is None or isinstance(error, FINAL):
                tries = "" if isinstance(error, FINAL) else f" after {len(WAITS) + 1} attempts"
                reason = " ".join(str(error).split())[:160] or type(error).__name__
                raise ImageError(f"{what} {url} failed{tries}: {reason}") from None
            time.sleep(wait)
    raise AssertionError


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes of a remote file from `offset` on; fewer where it ends."""

    def request(system: Any, path: str) -> bytes:
        data: bytes = system.cat_file(path, start=offset, end=offset + size)
        if len(data) > size:
            raise NotImplementedError("the server sends whole files only (no ranges of bytes): copy it here")
        return data

    return _tried("reading", url, request) if size else b""


def _facts(url: str) -> dict[str, Any]:
    return _tried("reading", url, lambda system, path: system.info(path))


def stamp_of(url: str) -> str:
    """What changes with the file."""
    facts = _facts(url)
    mark = next((facts[k] for k in ("ETag", "etag", "blob_id", "LastModified", "mtime", "created") if facts.get(k)), "")
    return f"{facts.get('size')}-{mark}"


def size_of(path: str | os.PathLike[str]) -> int:
    """Bytes of a file, here or remote."""
    if not is_remote(path):
        return os.path.getsize(path)
    size = _facts(os.fspath(path)).get("size")
    if size is None:
        raise ImageError(f"the server does not say how large {os.fspath(path)} is: copy it here")
    return int(size)


class _Remote(io.RawIOBase):
    def __init__(self, url: str) -> None:
        self.url, self.position, self.size = url, 0, size_of(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = read_range(self.url, self.position, max(0, min(len(buffer), self.size - self.position)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """A file, here or remote, to be read and sought."""
    return io.BufferedReader(_Remote(os.fspath(path)), BUFFER) if is_remote(path) else open(path, "rb")


def listed(text: str) -> list[str]:
    """The addresses that a glob or a folder holds, in order of the names; or the address itself, of a file."""

    def request(system: Any, path: str) -> list[str]:
        if MAGIC.search(path):
            top, base, found = fixed(text), fixed(path), system.glob(path)
        elif system.isdir(path):
            top, base, found = text.rstrip("/"), path.rstrip("/"), system.find(path)
        else:
            return [text]
        return [top + name.removeprefix(base) for name in sorted(found)]

    if text.startswith(("http://", "https://")):  # servers do not list, and `?` begins a query
        return [text]
    found = _tried("listing", text, request)
    if not found:
        raise DinoError(f"nothing matches {text}")
    return found


MAGIC = re.compile(r"[*?\[{]")


def fixed(text: str) -> str:
    """The folder before the first pattern, without its slash."""
    return MAGIC.split(text)[0].rpartition("/")[0]
