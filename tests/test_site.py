"""The documentation site builds without warnings, its links lead somewhere, and what it takes from code is current."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from paths import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import page_images
import site_pages as site

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


@pytest.mark.parametrize("page", site.GENERATED, ids=lambda path: path.name)
def test_tables_from_code_are_current(page: Path) -> None:
    text = page.read_text()
    assert site.with_tables(text, site.GENERATED[page]()) == text, "run: python tools/site_pages.py tables"


def test_the_navigation_holds_every_page() -> None:
    pages = {str(path.relative_to(site.DOCS)) for path in site.DOCS.rglob("*.md")}
    assert {page for _, _, page in site.nav_pages(CONFIG["nav"])} == pages


def test_every_picture_is_drawn_by_a_script_and_shown_on_a_page() -> None:
    scripts = [path for room in ("tools", "tests", "notebooks") for path in (ROOT / room).rglob("*.py")]
    text = "".join(path.read_text() for path in scripts if path != Path(__file__))
    there = {path.name for path in (site.DOCS / "images").iterdir()}
    shown = {name for path in site.DOCS.rglob("*.md") for name in re.findall(r"images/([\w.-]+)\)", path.read_text())}
    assert {name for name in there if f'"{name}"' not in text} == set()
    assert set(page_images.IMAGES) <= there
    assert there <= shown


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of this checkout, built elsewhere. Building raises on a warning or a broken link."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", root / "docs")
    for name in ("mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, root)
    (root / "dinov3").symlink_to(ROOT / "dinov3")
    return site.build(root)


def test_the_site_has_a_page_for_each_entry_and_lists_it_for_language_models(built: Path) -> None:
    listed = re.findall(r"^- \[.+?\]\((.+?)\)", (built / "llms.txt").read_text(), re.MULTILINE)
    assert listed == [page for _, _, page in site.nav_pages(CONFIG["nav"])]
    for page in listed:
        assert (built / page).is_file()
        assert (built / page).with_suffix(".html").stat().st_size > 5_000


def test_the_reference_shows_signatures_and_docstrings(built: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (built / "api" / "index.html").read_text())
    assert "A backbone in evaluation mode, with its weights." in text
    assert re.search(r"embed\(\s*model", text)


def test_broken_links_anchors_and_assets_of_other_hosts_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a id="here" href="b.html#there"></a><a href="#here"></a><a href="https://example.org/">out</a>'
        '<a href="b.html#nowhere"></a><a href="c.html"></a><img src="no.png"><script src="https://cdn.example/x.js"></script>'
    )
    (tmp_path / "b.html").write_text('<p id="there"></p><link rel="stylesheet" href="style.css">')
    (tmp_path / "style.css").write_text("@import 'https://fonts.example/f.css'; p { background: url(./x.png) }")
    assert sorted(site.problems(tmp_path)) == [
        "a.html loads https://cdn.example/x.js from another host",
        "a.html: asset no.png leads nowhere",
        "a.html: b.html#nowhere has no such anchor",
        "a.html: link c.html leads nowhere",
        "style.css loads https://fonts.example/f.css from another host",
    ]


def test_a_recipe_header_becomes_a_section(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "# Ours: a recipe\n# in two lines.\n#\n# Hardware:  a CPU\n# Expect:    a number,\n#            and another\n"
        "# Command:   python x.py \\\n#              --y\n\ntrain: {}\n"
    )
    fields = {"Hardware": "a CPU", "Expect": "a number, and another", "Command": "python x.py \\\n--y"}
    assert site.recipe(path) == ("Ours: a recipe in two lines.", fields)
