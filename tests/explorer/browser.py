"""What the explorer's tests in a browser share: the service in a thread, headless Chromium, the accessibility check.

Chromium is Debian's (`apt-get install chromium`) or what DINOV3_CHROMIUM names. Without it, Playwright or axe the tests are
skipped, and say why. The page's Content-Security-Policy forbids `eval`, so `page.wait_for_function` fails: use `expect`.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# no GPU and no sandbox in a container; nothing that calls home
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
WIDE, NARROW = (1280, 800), (390, 844)


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The address of an application on a free port, served by a thread."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline, "the service did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser. Skips the test where there is none."""
    path = os.environ.get("DINOV3_CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium, or set DINOV3_CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright (no `playwright install`)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Any,
    address: str,
    *,
    size: tuple[int, int] = WIDE,
    dark: bool = False,
    touch: bool = False,
    errors: str | None = None,
) -> Iterator[Any]:
    """A page. Fails on an error of its scripts, and on a request to another address than ours. errors: text of those that
    are part of the test, such as a status."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light", has_touch=touch
    )
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    origin = "/".join(address.split("/")[:3])
    own = (origin, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
    page.goto(address)
    yield page
    context.close()
    assert [text for text in wrong if errors is None or errors not in text] == []


def accessibility(page: Any) -> list[str]:
    """axe-core's serious and critical findings: rule, element."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{rule['id']}: {node['target']} {node.get('failureSummary', '')}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]
