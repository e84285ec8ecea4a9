"""How fast the explorer's page is with many images, measured in headless Chromium (software rendering).

    python benchmarks/explorer.py --images 100000 --work /tmp/explorer-bench

Makes a store of that many rows once (vectors of D = 384 in clusters; hard links to a few hundred small images), serves it,
and prints a table: first grid, filter, search, first map, and the time of a frame while the map is panned and zoomed, by
both renderers. Needs Playwright and a Chromium (DINOV3_CHROMIUM, or on the path).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "explorer"))
from browser import chromium, serving

import dinov3
from dinov3.embedding.pipeline import Embedder
from dinov3.embedding.schema import Row
from dinov3.embedding.store import EmbeddingStore
from dinov3.explorer.server import application
from dinov3.explorer.source import FrozenModel, Source
from dinov3.features import default_preprocessing

CLUSTERS, FILES = 60, 240
FRAMES = """async () => {
  const box = document.querySelector('.map'), times = [];
  const at = (type, x, y) => box.dispatchEvent(new PointerEvent(type, {pointerId: 1, bubbles: true, clientX: x, clientY: y}));
  const place = {clientX: 700, clientY: 450, bubbles: true, cancelable: true};
  const wheel = (deltaY) => box.dispatchEvent(new WheelEvent('wheel', {deltaY, ...place}));
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  box.setPointerCapture = () => {};
  at('pointerdown', 700, 450);
  await frame();
  for (let i = 0; i < 120; i++) {
    const start = performance.now();
    at('pointermove', 700 + 60 * Math.sin(i / 6), 450 + 40 * Math.cos(i / 6));
    if (i % 3 === 0) wheel(i < 60 ? -40 : 40);
    await frame();
    times.push(performance.now() - start);
  }
  at('pointerup', 700, 450);
  return times;
}"""


def make_store(work: Path, count: int, model: Any) -> Path:
    """The synthetic store, made if it is not there."""
    uri = work / "store"
    if (uri / "images.lance").is_dir():
        return uri
    images, draw = work / "images", np.random.default_rng(0)
    images.mkdir(parents=True)
    for i in range(FILES):
        coarse = draw.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((160, 160), Image.Resampling.BICUBIC).save(work / f"{i}.jpg")
    facts = Embedder(model, default_preprocessing(model), "cls", "none").facts()
    centres = draw.normal(size=(CLUSTERS, facts.dim)).astype(np.float32)
    with EmbeddingStore.create(uri, facts, str(images)) as store:
        for first in range(0, count, 5000):
            rows = []
            for i in range(first, min(first + 5000, count)):
                path = images / f"{i:06d}.jpg"
                os.link(work / f"{i % FILES}.jpg", path)
                vector = centres[i % CLUSTERS] + draw.normal(size=facts.dim).astype(np.float32)
                rows.append(Row(str(path), f"{i:064x}", "1", 100 + i % 900, 160, vector))
            store.append(rows)
    return uri


def measure(address: str, renderer: str) -> dict[str, float]:
    """Milliseconds of each step in a fresh page."""
    found: dict[str, float] = {}
    with chromium() as browser:
        page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()

        def timed(name: str, act: Any, until: str) -> None:
            start = time.perf_counter()
            act()
            page.wait_for_selector(until, timeout=300_000)
            found[name] = 1000 * (time.perf_counter() - start)

        timed("first grid", lambda: page.goto(f"{address}/#renderer={renderer}"), ".tile img")
        field = page.get_by_label("Filter", exact=True)
        timed("filter (with 350 ms of waiting for the typist)", lambda: field.fill("width > 500"), "text=/ of /")
        field.fill("")
        page.wait_for_selector("text=/^[0-9,]+ images$/")
        for name in ("first search", "search"):
            page.locator(".tile").nth(5).click()
            similar = page.get_by_role("button", name="Find similar")
            page.evaluate("document.querySelector('.count').textContent = ''")
            timed(name, similar.click, "text=most similar")
        page.get_by_role("button", name="Clear the search").click()
        timed("first map", lambda: page.get_by_role("button", name="Map", exact=True).click(), ".map[data-drawn]")
        assert page.locator(".map").get_attribute("data-renderer") == renderer
        page.wait_for_timeout(1500)
        cdp = page.context.new_cdp_session(page)
        cdp.send("Performance.enable", {"timeDomain": "threadTicks"})
        busy = [0.0, 0.0]
        for i in range(2):
            frames = sorted(page.evaluate(FRAMES)) if i else []
            metrics = {m["name"]: m["value"] for m in cdp.send("Performance.getMetrics")["metrics"]}
            busy[i] = 1000 * metrics["TaskDuration"]
        found["frame, CPU time of the page's thread"] = (busy[1] - busy[0]) / len(frames)
        found["frame, median"] = statistics.median(frames)
        found["frame, 95 %"] = frames[int(0.95 * len(frames))]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    net = dinov3.load()
    source = Source.open(make_store(given.work, given.images, net))
    model = FrozenModel(net, default_preprocessing(net))
    with serving(application(source, model)) as address:
        columns = {renderer: measure(address, renderer) for renderer in ("canvas", "webgl2")}
    print(f"{len(source):,} images; ms | " + " | ".join(columns))
    for name in columns["canvas"]:
        print(f"{name} | " + " | ".join(f"{column[name]:.1f}" for column in columns.values()))


if __name__ == "__main__":
    main()
