"""What the HTTP services share: names that a request may call them by, limits of bodies, refusals in one sentence.

Every refusal is {"error": one sentence} with a status: 400 a wrong request, 403 a request of another site's page, 404
nothing of that name, 405 not by this method, 408 a body that does not arrive, 413 too large, 421 a foreign Host header, 422
no readable image.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from dinov3.errors import DinoError, ImageError, TooLarge

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
BODY_SECONDS = 60.0  # within which a request's body arrives


@dataclass(frozen=True)
class Limits:
    """What one request may bring."""

    megabytes: int = 32
    megapixels: int = 50
    images: int = 64
    top: int = 1000
    waiting: int = 256  # images of all requests that are not embedded yet

    @property
    def pixels(self) -> int:
        return self.megapixels * 1_000_000


LIMITS = Limits()


def guard(app: FastAPI, hosts: tuple[str, ...]) -> None:
    """Refuses foreign Host headers and says every error in a sentence.

    hosts: names that a request's Host header may have ("*": any), so that a page of another site cannot reach a service
    on the user's own machine under a name of its own (DNS rebinding).
    """

    @app.middleware("http")
    async def check_host(request: Request, go: Any) -> Response:
        host = _name(request.headers.get("host", ""))
        if "*" not in hosts and host not in hosts:
            text = f"this service is not {host!r:.100}: start it with --allow-host NAME to be called so"
            return JSONResponse({"error": text}, 421)
        return await go(request)

    @app.exception_handler(DinoError)
    async def wrong(request: Request, error: DinoError) -> Response:
        status = 413 if isinstance(error, TooLarge) else 422 if isinstance(error, ImageError) else 400
        return JSONResponse({"error": str(error)}, status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 400)

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> Response:
        if error.detail in ("Not Found", "Method Not Allowed"):  # the router's own
            ways = ", ".join(
                f"{' '.join(sorted(route.methods or ()))} {route.path}"
                for route in app.routes
                if isinstance(route, APIRoute)
            )
            error.detail = f"there is no {request.method} {request.url.path!r:.100}: there are {ways}"
        return JSONResponse({"error": error.detail}, error.status_code)


def refuse_other_sites(app: FastAPI) -> None:
    """Refuses what a page of another site requests: its Origin is not ours, or the browser calls it another site's."""

    @app.middleware("http")
    async def check_origin(request: Request, go: Any) -> Response:
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "none")
        foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host", "")
        opened = request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"  # a link was followed
        if foreign or (site not in ("none", "same-origin") and not opened):
            return JSONResponse({"error": "a page of another site cannot use this service: open its own page"}, 403)
        return await go(request)


def run(app: FastAPI, host: str, port: int, log: Callable[[str], None], *, open_page: bool = False) -> None:
    """Logs the address and serves until SIGINT or SIGTERM; requests that are being worked on are finished, for at most half
    a minute."""
    import uvicorn

    check_port(host, port)
    log(f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port} (Ctrl-C ends it)")
    if open_page:
        threading.Timer(1.0, webbrowser.open, [f"http://{host}:{port}/"]).start()
    uvicorn.run(app, host=host, port=port, log_level="warning", limit_concurrency=256, timeout_graceful_shutdown=30)


def check_port(host: str, port: int) -> None:
    """Raises where nobody can listen: the port is taken, or the address is none of this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise DinoError(f"cannot listen at {host}:{port} ({error.strerror}): give another --port or --host") from None


# ---- requests --------------------------------------------------------------------------------------------------------


def _name(host: str) -> str:
    """The Host header without its port."""
    return host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host


def content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_body(request: Request, limits: Limits) -> bytes:
    """The request's body, refused as soon as it is known to be too large."""
    most = limits.megabytes << 20
    too_large = HTTPException(413, f"the request has more than the {limits.megabytes} MB that one may have")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise HTTPException(408, f"the request's body did not arrive within {BODY_SECONDS:.0f} s") from None
    if not size:
        raise HTTPException(400, "the request has no body: send an image, or images as multipart/form-data")
    return b"".join(parts)


async def read_images(request: Request, limits: Limits) -> list[bytes]:
    """The image of a body, or the files of a multipart one in their order."""
    body = await read_body(request, limits)
    if content_type(request) != "multipart/form-data":
        return [body]
    try:
        found = await _files(request.headers, body, limits.images)
    except MultiPartException as error:
        many = "Too many files" in error.message
        text = f"more than {limits.images} images in one request" if many else f"the multipart body: {error.message}"
        raise HTTPException(413 if many else 400, text) from None
    except (KeyError, ValueError) as error:  # no boundary, or one that is no text
        raise HTTPException(400, f"the multipart body cannot be read: {error}") from None
    if not found:
        raise HTTPException(400, "no file among the parts of the request: curl -F 'image=@a.jpg' sends one")
    return found


async def _files(headers: Headers, body: bytes, most: int) -> list[bytes]:
    async def stream() -> AsyncIterator[bytes]:
        yield body

    form = await MultiPartParser(headers, stream(), max_files=most).parse()  # type: ignore[arg-type]
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    try:
        return [await file.read() for file in files]
    finally:
        await form.close()


def json_object(body: bytes, example: str) -> dict[str, Any]:
    """The JSON object of a body. Raises with an example of one."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise HTTPException(400, f"the body is no JSON object such as {example}")
    return value
