"""The notebooks run offline from their sources, and their pages on the site are those of the sources."""

from __future__ import annotations

import subprocess
import sys

import pytest
from paths import ROOT

SOURCES = sorted((ROOT / "notebooks").glob("*.py"))


def cells(text: str) -> list[str]:
    """Code cells of a percent script."""
    parts = text.split("# %%")[1:]
    return [part.partition("\n")[2].strip() for part in parts if not part.startswith(" [markdown]")]


def test_pages_show_the_sources_code_and_figures_that_exist() -> None:
    assert len(SOURCES) == 7
    for source in SOURCES:
        page = (ROOT / "docs" / "notebooks" / f"{source.stem}.md").read_text()
        for cell in cells(source.read_text()):
            assert f"```python\n{cell}\n```" in page, f"run `make notebooks`: {source.stem} was changed"
    pages = "".join((ROOT / "docs" / "notebooks" / f"{s.stem}.md").read_text() for s in SOURCES)
    figures = list((ROOT / "docs" / "notebooks").glob("*.jpg"))
    assert len(figures) >= 10
    assert all(f"]({figure.name})" in pages for figure in figures)
    assert sum(figure.stat().st_size for figure in figures) < 2_000_000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_notebook_runs() -> None:
    pytest.importorskip("jupytext")
    pytest.importorskip("nbclient")
    done = subprocess.run([sys.executable, ROOT / "tools" / "notebooks.py"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "7 notebooks" in done.stdout
