"""Screenshots of `dinov3 explore` and a short recording, by headless Chromium: what tools/page_images.py draws.

The images are crops of the photographs that `examples/demo.py` takes from installed packages; the model is the one that
ships. Needs Playwright and a Chromium (DINOV3_CHROMIUM, or on the path).
"""

from __future__ import annotations

import io
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

ROOT = Path(__file__).resolve().parents[1]
CROPS = 10  # of each photograph
SIZE, SMALL, RECORDED = (1280, 800), (390, 844), (900, 563)
SCREENSHOTS = {
    "explorer-search.webp": ("near={coffee}&box=0.1,0.1,0.9,0.9", SIZE, False),
    "explorer-map.webp": ("view=map&colour=photograph&projection={layout}", SIZE, True),
    "explorer-clusters.webp": ("find=clusters&k=17", SIZE, False),
    "explorer-small.webp": ("view=map&find=clusters&k=17", SMALL, True),
}
NAMES = (*SCREENSHOTS, "explorer-store.webp")


def images(folder: Path) -> None:
    """Crops of the demo's photographs as NUMBER/PHOTOGRAPH.jpg: neighbours in the list are of different ones."""
    from demo import PHOTOGRAPHS, photographs

    photographs(folder / "whole")
    draw = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        whole = folder / "whole" / f"{Path(name).stem}.jpg"
        if not whole.is_file():
            continue
        image = Image.open(whole)
        for i in range(CROPS):
            side = draw.uniform(0.45, 1)
            w, h = round(image.width * side), round(image.height * side)
            left, top = draw.integers(0, image.width - w + 1), draw.integers(0, image.height - h + 1)
            crop = image.crop((left, top, left + w, top + h))
            crop.thumbnail((420, 420))
            place = folder / "crops" / f"{i:02d}" / f"{whole.stem}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            (ImageOps.mirror(crop) if i % 3 == 2 else crop).save(place, quality=90)


@cache
def drawn(work: Path) -> dict[str, Path]:
    """Name → the image's file."""
    sys.path += [str(ROOT / "tests" / "explorer"), str(ROOT / "examples")]
    from browser import chromium, serving

    import dinov3
    from dinov3.data.sources import open_source
    from dinov3.embedding.pipeline import embed_source
    from dinov3.embedding.store import EmbeddingStore
    from dinov3.explorer.server import application
    from dinov3.explorer.source import FrozenModel, Source
    from dinov3.features import default_preprocessing

    work = work / "explorer"
    images(work)
    net = dinov3.load(fast="fp32")
    preprocessing = default_preprocessing(net, size=256)
    embed_source(net, open_source(work / "crops"), work / "store", preprocessing=preprocessing)
    with EmbeddingStore.open(work / "store") as store:
        store.add_column("photograph", {path: Path(path).stem for path in store.known()})
    source = Source.open(work / "store")
    numbers = {source.name(i): i for i in range(len(source))}
    found: dict[str, Path] = {}
    with serving(application(source, FrozenModel(net, preprocessing))) as address, chromium() as browser:
        for name, (state, (w, h), dark) in SCREENSHOTS.items():
            scheme = "dark" if dark else "light"
            context = browser.new_context(
                viewport={"width": w, "height": h}, color_scheme=scheme, device_scale_factor=1
            )
            page = context.new_page()
            page.goto(f"{address}/#{state.format(coffee=numbers['00/coffee.jpg'], layout='')}")
            page.wait_for_timeout(6000)
            found[name] = work / name
            Image.open(io.BytesIO(page.screenshot())).save(found[name], quality=82, method=6)
            context.close()
        found["explorer-store.webp"] = record(browser, address, numbers, work / "explorer-store.webp")
    return found


class Recorder:
    """Frames of a page with a pointer, as an animated WebP."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.frames: list[Image.Image] = []
        self.times: list[int] = []
        self.place = (RECORDED[0] / 2, RECORDED[1] / 2)

    def move(self, x: float, y: float) -> None:
        self.page.mouse.move(x, y)
        self.place = (x, y)

    def frame(self, ms: int, pointer: bool = True) -> None:
        image = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        if pointer:
            x, y = self.place
            arrow = [(0, 0), (0, 19), (5, 15), (8, 22), (11, 21), (8, 14), (14, 14)]
            ImageDraw.Draw(image).polygon([(x + dx, y + dy) for dx, dy in arrow], "black", "white")
        self.frames.append(image)
        self.times.append(ms)

    def middle(self, locator: Any) -> tuple[float, float]:
        box = locator.bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def click(self, locator: Any, ms: int = 500) -> None:
        self.move(*self.middle(locator))
        self.frame(ms)
        locator.click()

    def save(self, path: Path) -> Path:
        self.frames[0].save(
            path, save_all=True, append_images=self.frames[1:], duration=self.times, loop=0, quality=55, method=6
        )
        return path


def record(browser: Any, address: str, numbers: dict[str, int], path: Path) -> Path:
    """Search with a part of an image; the map, coloured by a column; a lasso."""
    context = browser.new_context(viewport={"width": RECORDED[0], "height": RECORDED[1]}, color_scheme="light")
    page = context.new_page()
    page.goto(f"{address}/")
    page.wait_for_timeout(4000)
    tape = Recorder(page)
    tape.frame(900, pointer=False)
    tape.click(page.get_by_role("option", name="00/chelsea.jpg"))
    page.wait_for_timeout(1500)
    box = page.locator(".crop").bounding_box()
    at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])  # noqa: E731
    tape.move(*at(0.25, 0.15))
    page.mouse.down()
    for t in (0.4, 0.8, 1):
        tape.move(*at(0.25 + 0.5 * t, 0.15 + 0.6 * t))
        tape.frame(120)
    page.mouse.up()
    tape.click(page.get_by_role("button", name="Find similar to this part"), 700)
    page.wait_for_timeout(2500)
    tape.frame(1400)
    page.get_by_role("button", name="Clear the search").click()
    page.wait_for_timeout(800)
    tape.click(page.get_by_role("button", name="Map", exact=True))
    page.wait_for_timeout(1500)
    page.locator("#colour").select_option("photograph")
    page.wait_for_timeout(2500)
    tape.frame(1000)
    page.keyboard.press("l")
    area = page.locator(".map").bounding_box()
    xy = np.frombuffer(page.request.get(f"{address}/api/map").body(), "<f4").reshape(-1, 2)
    group = xy[[i for name, i in numbers.items() if Path(name).stem in ("chelsea", "coffee", "flower")]]
    scale = min(area["width"], area["height"]) / 2.16
    middle, reach = (group.min(0) + group.max(0)) / 2, (group.max(0) - group.min(0)) / 2 * scale * 1.2 + 24
    x, y = area["x"] + area["width"] / 2 + middle[0] * scale, area["y"] + area["height"] / 2 - middle[1] * scale
    for i in range(13):
        angle = 2 * np.pi * i / 12
        tape.move(float(x + reach[0] * np.cos(angle)), float(y + reach[1] * np.sin(angle)))
        if i == 0:
            page.mouse.down()
        elif i % 2 == 0:
            tape.frame(110)
    page.mouse.up()
    page.wait_for_timeout(700)
    tape.frame(1300)
    page.keyboard.press("l")
    for _ in range(5):
        tape.move(float(x), float(min(y, area["y"] + area["height"] - 60)))
        page.mouse.wheel(0, -160)
        page.wait_for_timeout(700)
        tape.frame(170)
    tape.times[-1] = 1200
    context.close()
    return tape.save(path)


if __name__ == "__main__":
    for name, file in drawn(Path(sys.argv[1])).items():
        print(name, file, f"{file.stat().st_size / 1000:.0f} kB")
