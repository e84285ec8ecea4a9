"""The store view in headless Chromium: search, lasso, filters, keyboard, what the URL keeps, and the accessibility check."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import NARROW, accessibility, chromium, opened, serving
from PIL import Image

from dinov3.embedding.schema import Row
from dinov3.embedding.store import EmbeddingStore
from dinov3.explorer.server import application
from dinov3.explorer.source import FrozenModel, Source

pytestmark = pytest.mark.slow
COUNT, FAR = 300, 20  # images; the last of them lie far from the others on the map
READABLE = "where=path NOT LIKE '%link%'"  # the link out of the folder is refused, which the console calls an error


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A store of `COUNT` images of one colour each, whose vectors are chosen: `FAR` of them are another direction."""
    folder = tmp_path_factory.mktemp("planted")
    facts = EmbeddingStore.open(store).facts
    draw = np.random.default_rng(0)
    rows = []
    with EmbeddingStore.create(folder / "store", facts, str(folder)) as made:
        for i in range(COUNT):
            far = i >= COUNT - FAR
            path = folder / f"{'far' if far else 'near'}{i:03d}.png"
            Image.new("RGB", (64, 48), (200 if far else 40, 3 * i % 255, 120)).save(path)
            vector = draw.normal(size=facts.dim) * 0.05
            vector[int(far)] += 1
            rows.append(Row(str(path), f"{i:064x}", "1", 64, 48 + i, vector.astype(np.float32)))
        made.append(rows)
    return folder / "store"


@pytest.fixture(scope="module")
def address(planted: Path, model: FrozenModel) -> Iterator[str]:
    with serving(application(Source.open(planted), model)) as url:
        yield url


@pytest.fixture(scope="module")
def small(store: Path, model: FrozenModel) -> Iterator[str]:
    with serving(application(Source.open(store), model)) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def expect(thing: Any) -> Any:
    from playwright.sync_api import expect as expected

    return expected(thing)


def ready(page: Any) -> None:
    expect(page.locator(".count")).to_contain_text(re.compile(r"\d"), timeout=20_000)


def label(page: Any, place: int) -> Any:
    return page.locator(f"#tile-{place}")


def test_search_shows_the_planted_copy_first_and_back_returns(browser: Any, small: str) -> None:
    with opened(browser, f"{small}/#{READABLE}") as page:
        ready(page)
        page.get_by_role("option", name="chelsea/copy.jpg").click()
        page.get_by_role("button", name="Find similar").click()
        expect(page.locator(".count")).to_have_text("16 most similar that pass the filter")
        for place in (0, 1):
            expect(label(page, place)).to_have_attribute(
                "aria-label", re.compile(r"chelsea/(0|copy)\.jpg, similarity 1\.00")
            )
        page.get_by_role("button", name="Clear the search").click()
        expect(page.locator(".count")).to_have_text("16 of 17 images")
        page.go_back()
        expect(page.locator(".count")).to_have_text("16 most similar that pass the filter")


def test_an_image_of_the_users_own_and_a_part_of_it_are_searched_with(browser: Any, small: str, images: Path) -> None:
    with opened(browser, f"{small}/#{READABLE}") as page:
        ready(page)
        page.set_input_files("input[type=file]", images / "coffee" / "2.jpg")
        expect(label(page, 0)).to_have_attribute("aria-label", re.compile("coffee/2.jpg"))
        page.get_by_role("button", name="Open 2.jpg").click()
        box = page.locator(".crop").bounding_box()
        page.mouse.move(box["x"] + 20, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 20, box["y"] + box["height"] - 20, steps=3)
        page.mouse.up()
        page.get_by_role("button", name="Find similar to this part").click()
        expect(page.locator(".query")).to_contain_text("a part of it")
        expect(label(page, 0)).to_have_attribute("aria-label", re.compile("coffee/"))


@pytest.mark.parametrize("renderer", ["canvas", "webgl2"])
def test_the_lasso_selects_and_saves_the_planted_points(
    browser: Any, address: str, planted: Path, renderer: str
) -> None:
    with opened(browser, f"{address}/#view=map&thumbs=0&renderer={renderer}") as page:
        expect(page.locator(".map")).to_have_attribute("data-renderer", renderer)
        box = page.locator(".map").bounding_box()
        xy = np.frombuffer(page.request.get(f"{address}/api/map").body(), "<f4").reshape(-1, 2)
        scale = min(box["width"], box["height"]) / 2.16
        x = box["x"] + box["width"] / 2 + xy[:, 0] * scale
        y = box["y"] + box["height"] / 2 - xy[:, 1] * scale
        x, y = x[-FAR:], y[-FAR:]
        corners = [(x.min(), y.min()), (x.max(), y.min()), (x.max(), y.max()), (x.min(), y.max())]
        out = [(-8, -8), (8, -8), (8, 8), (-8, 8)]
        page.wait_for_timeout(500)
        page.keyboard.press("l")
        for step, ((px, py), (dx, dy)) in enumerate(zip(corners, out)):
            page.mouse.move(float(px) + dx, float(py) + dy, steps=1 if step == 0 else 5)
            if step == 0:
                page.mouse.down()
        page.mouse.up()
        expect(page.locator(".chosen")).to_contain_text(f"{FAR} selected")
        with page.expect_download() as saving:
            page.get_by_role("button", name="JSON").click()
        rows = json.loads(Path(saving.value.path()).read_text())
        assert [row["name"] for row in rows] == [f"far{i}.png" for i in range(COUNT - FAR, COUNT)]
        np.testing.assert_allclose([row["x"] for row in rows], xy[-FAR:, 0], atol=1e-6)


def test_a_filter_is_applied_and_a_wrong_one_is_said_beside_it(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        ready(page)
        page.get_by_label("Filter", exact=True).fill("height >= 338")
        expect(page.locator(".count")).to_have_text("10 of 300 images")
        assert "where=height" in page.url
    context = browser.new_context()
    page = context.new_page()  # the refused request is an error of the console
    page.goto(address)
    page.get_by_label("Filter", exact=True).fill("heigt > 3")
    expect(page.locator("#where-error")).to_contain_text("did you mean 'height'?")
    expect(page.get_by_label("Filter", exact=True)).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Filter", exact=True).fill("height < 0")
    expect(page.get_by_role("heading", name="Nothing passes the filter")).to_be_visible()
    page.get_by_role("button", name="Clear the filter").click()
    expect(page.locator(".count")).to_have_text("300 images")
    context.close()


def test_the_url_restores_what_was_shown(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        ready(page)
        page.get_by_role("button", name="Clusters").click()
        expect(page.locator(".count")).to_have_text("12 clusters · 300 images")
        page.get_by_label("Clusters", exact=False).last.fill("2")
        page.locator("#k").dispatch_event("change")
        expect(page.locator(".count")).to_have_text("2 clusters · 300 images")
        expect(page.locator(".group").last).to_contain_text("20 images")
        page.locator(".group").last.get_by_role("button", name="Show all").click()
        expect(page.locator(".count")).to_have_text("cluster 2 · 20 images")
        page.get_by_role("button", name="Map").click()
        page.locator(".map").focus()
        page.keyboard.press("+")
        page.wait_for_timeout(600)
        url, place = page.url, page.url.split("at=")[1].split("&")[0]
    with opened(browser, url) as page:
        expect(page.locator(".count")).to_have_text("cluster 2 · 20 images")
        expect(page.get_by_role("button", name="Map")).to_have_attribute("aria-pressed", "true")
        assert page.url.split("at=")[1].split("&")[0] == place


def test_the_keyboard_does_it_all(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        ready(page)
        page.locator(".grid").focus()
        for key in ("ArrowRight", "ArrowRight", "Space", "Shift+ArrowRight"):
            page.keyboard.press(key)
        expect(page.locator(".chosen")).to_contain_text("2 selected")
        expect(label(page, 3)).to_have_attribute("aria-selected", "true")
        page.keyboard.press("End")
        expect(page.locator(".grid")).to_have_attribute("aria-activedescendant", "tile-299")
        expect(label(page, 299)).to_be_visible()
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_contain_text("far299.png")
        page.keyboard.press("ArrowLeft")
        expect(page.get_by_role("dialog")).to_contain_text("far298.png")
        page.keyboard.press("Enter")  # the focused button: find similar
        expect(page.locator(".count")).to_have_text("200 most similar")
        expect(label(page, 0)).to_have_attribute("aria-label", "far298.png, similarity 1.00")
        page.keyboard.press("Escape")
        expect(page.locator(".chosen")).to_be_hidden()
        page.keyboard.press("Escape")
        expect(page.locator(".count")).to_have_text("300 images")
        page.keyboard.press("m")
        expect(page.locator(".map")).to_be_visible()
        page.locator(".map").focus()
        page.keyboard.press("v")
        expect(page.locator(".chosen")).to_contain_text("300 selected")
        page.keyboard.press("?")
        expect(page.get_by_role("dialog")).to_contain_text("lasso on the map")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("state", ["", "view=map&find=clusters&k=2", "find=duplicates&threshold=0.9", "near=3"])
def test_no_serious_finding_of_the_accessibility_check(browser: Any, address: str, state: str, dark: bool) -> None:
    for size in ((1280, 800), NARROW):
        with opened(browser, f"{address}/#{state}", size=size, dark=dark) as page:
            ready(page)
            page.wait_for_timeout(300)
            if size == NARROW:
                page.get_by_role("button", name="Search & filter").click()
            assert accessibility(page) == []
    with opened(browser, f"{address}/#near=3", dark=dark) as page:
        ready(page)
        page.get_by_role("button", name=re.compile("^Open ")).click()
        page.keyboard.press("Escape")
        page.keyboard.press("?")
        assert accessibility(page) == []


def test_a_folder_says_how_to_make_a_store(browser: Any, images: Path, model: FrozenModel) -> None:
    with serving(application(Source.open(images), model)) as url, opened(browser, f"{url}/#tab=store") as page:
        expect(page.get_by_text("dinov3 explore store")).to_be_visible()
        assert accessibility(page) == []
