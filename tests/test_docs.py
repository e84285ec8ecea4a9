"""Names of modules and functions, paths and links in docs and docstrings exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from paths import ROOT

import dinov3

PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.stem != "log"),
]
SOURCES = sorted((ROOT / "dinov3").rglob("*.py"))
# Rooms that are no section of a configuration: `train.seed` is a key, `heads.linear` a module.
ROOMS = ("data", "dense", "distill", "embedding", "fit", "heads", "hub", "metrics", "models", "weights", "train_head")
# Keys of the training configuration and files, under the name of a room.
OTHER = {"data.max_unreadable", "data.unreadable", "data.prefetch_factor", "metrics.jsonl"}


def exists(name: str) -> bool:
    """Whether a dotted name below `dinov3` is a module, or an attribute of one."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["dinov3", *parts[:k]]))
        except ModuleNotFoundError:
            continue
        for part in parts[k:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("files", [PAGES, SOURCES], ids=["pages", "docstrings"])
def test_every_module_and_function_that_is_named_exists(files: list[Path]) -> None:
    named = {
        (path.name, name)
        for path in files
        for name in re.findall(r"`(?:dinov3\.)?([a-z_0-9]+(?:\.\w+)+)", path.read_text())
        if name.split(".")[0] in ROOMS and name not in OTHER
    }
    assert len(named) > 10
    assert [(file, name) for file, name in sorted(named) if not exists(name)] == []


def test_every_link_and_path_of_the_pages_leads_somewhere() -> None:
    links = [(p, p.parent / t) for p in PAGES for t in re.findall(r"\]\(([^)#:\s]+)\)", p.read_text())]
    inside = r"`((?:dinov3|tests|benchmarks|examples|docs|projects|tools)/[\w./-]+)`"
    paths = [(p, ROOT / t) for p in PAGES for t in re.findall(inside, p.read_text())]
    assert len(links) > 20
    assert len(paths) > 20
    assert [(page.name, str(target)) for page, target in links + paths if not target.exists()] == []


def test_the_reference_names_what_exists_and_all_that_is_public() -> None:
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    named = {name for path in pages for name in re.findall(r"^::: dinov3\.([\w.]+)$", path.read_text(), re.MULTILINE)}
    assert [name for name in sorted(named) if not exists(name)] == []
    tools = {f"dense.{path.stem}" for path in (ROOT / "dinov3" / "dense").glob("[a-z]*.py")}
    assert tools - named == set()
    assert {name.split(".")[-1] for name in named} >= set(dinov3.__all__)
