"""The documentation site: `make docs`.

    python tools/site_pages.py            builds it into build/site, strictly, and checks every link and anchor of its pages
    python tools/site_pages.py tables     writes the tables that come from code into docs/models.md and docs/recipes.md

Zensical stops at a link in a page that leads nowhere. Afterwards the built pages are read as a browser reads them: each
`href` and `src` must exist in the site, anchors included, and nothing may be loaded from another host. `llms.txt` (a list of
the pages for language models) and the pages' Markdown, to which it points, are written beside them.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CONFIGS = ROOT / "dinov3" / "configs"
MARKS = "<!-- from code: begin -->", "<!-- from code: end -->"


# ---- tables from code ------------------------------------------------------------------------------------------------


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns of numbers are aligned right."""
    numeric = [all(re.match(r"[\d–]", row[i]) for row in rows) for i in range(len(columns))]
    head = [columns, ["---:" if right else "---" for right in numeric]]
    return "\n".join("| " + " | ".join(row) + " |" for row in [*head, *rows])


def figure(score: str, value: float | None) -> str:
    """A published score as published: per cent with one digit, metres with two or three."""
    digits = {"NYU↓": 3, "Open-Canopy MAE↓": 2}.get(score, 1)
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def model_tables() -> str:
    """The published backbones by family, the heads, with the figures of the catalogue."""
    from dinov3.models.architectures import ConvNeXtConfig
    from dinov3.weights.catalog import HEADS, ROWS

    def family(row: Any) -> str:
        if row.packaged:
            return "Ships with the package"
        if row.dataset == "sat493m":
            return "Satellite images (SAT-493M)"
        if row.known_by_name:
            return f"Of the same form, by others ({'LingBot-Vision' if row.dataset == 'lingbot' else 'EUPE'})"
        return (
            "ConvNeXt, web images (LVD-1689M)"
            if isinstance(row.config, ConvNeXtConfig)
            else "ViT, web images (LVD-1689M)"
        )

    def name_of(row: Any) -> str:
        return f"`{row.id if row.dataset == 'sat493m' or row.known_by_name else row.arch}`"

    parts = []
    for family_name in dict.fromkeys(family(row) for row in sorted(ROWS, key=lambda row: row.packaged is None)):
        rows = [row for row in ROWS if family(row) == family_name]
        facts = []
        for row in rows:
            config: Any = row.config
            convnext = isinstance(config, ConvNeXtConfig)
            facts.append(
                [
                    name_of(row),
                    f"{row.parameters / 1e6:,.1f} M",
                    str(config.dims[-1] if convnext else config.embed_dim),
                    "32 (stride)" if convnext else str(config.patch_size),
                    row.licence.name,
                    "in the package"
                    if row.packaged
                    else f"[{'get' if row.known_by_name else 'request'}](https://huggingface.co/{row.hf})"
                    if row.hf
                    else "not released",
                ]
            )
        parts += [f"## {family_name}", table(["name", "parameters", "width", "patch", "licence", "where"], facts)]
        if scores := list(dict.fromkeys(key for row in rows for key in row.scores)):
            figures = [
                [name_of(row), *(figure(key, row.scores.get(key)) for key in scores)] for row in rows if row.scores
            ]
            parts.append(table(["published", *scores], figures))
    heads = [[f"`{row.name}`", row.task, f"`{row.backbone}`", f"`{row.file.split('/')[-1]}`"] for row in HEADS]
    parts += ["## Published heads", table(["name", "task", "on", "file"], heads)]
    return "\n\n".join(parts)


def recipe(path: Path) -> tuple[str, dict[str, str]] | None:
    """(what it is, {"Hardware": …, "Hours": …, "Expect": …, "Command": …}) of a recipe's header comment."""
    header = re.match(r"(?:#.*\n)+", path.read_text())
    lines = [line.removeprefix("#").removeprefix(" ") for line in header[0].splitlines()] if header else []
    about, fields, key = [], {}, ""
    for line in lines:
        if found := re.match(r"(Hardware|Hours|Expect|Command):\s+(.*)", line):
            key = found[1]
            fields[key] = found[2]
        elif key and line.startswith("   "):
            fields[key] += ("\n" if key == "Command" else " ") + line.strip()
        elif key and line.strip():  # a remark below the fields
            about.append(line)
            key = ""
        else:
            key = ""
            about.append(line)
    return (" ".join(" ".join(about).split()), fields) if "Expect" in fields else None


def recipe_sections() -> str:
    """Every recipe with its hardware, hours and expected numbers."""
    parts = []
    for title, folder in (("Training", "train"), ("Evaluation", "eval")):
        parts.append(f"## {title}")
        for path in sorted((CONFIGS / folder).rglob("*.yaml"), key=lambda p: (not is_ours(p), p.name)):
            if found := recipe(path):
                about, fields = found
                rows = [[key.lower(), fields[key]] for key in ("Hardware", "Hours", "Expect") if key in fields]
                rows = "\n".join(f"- *{key}*: {value}" for key, value in rows)
                command = fields["Command"].replace("\n", "\n    ")
                parts += [f"### {path.stem}", about, rows, f"```sh\n{command}\n```"]
    return "\n\n".join(parts)


def is_ours(path: Path) -> bool:
    return path.read_text().startswith("# Ours")


GENERATED = {DOCS / "models.md": model_tables, DOCS / "recipes.md": recipe_sections}


def with_tables(page: str, text: str) -> str:
    """The page with `text` between its two marks."""
    begin, end = MARKS
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"


# ---- links -----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a built page refers to, what it loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.assets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.anchors |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("canonical", "prev", "next"):
            self.assets.append(found.get("href", ""))
        if "src" in found:
            self.assets.append(found["src"])


def problems(site: Path) -> Iterator[str]:
    """A sentence for each link or asset of the built pages that leads nowhere, and each that another host would serve."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for kind, targets in (("link", page.links), ("asset", page.assets)):
            for target in targets:
                parts = urlsplit(target)
                if parts.scheme or parts.netloc:
                    if kind == "asset" and parts.scheme != "data":
                        yield f"{name} loads {target} from another host"
                    continue
                if name.name == "404.html" and target.startswith("/"):
                    file = (site / unquote(parts.path).lstrip("/")).resolve()
                else:
                    file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                file = file / "index.html" if file.is_dir() else file
                if not file.is_file():
                    yield f"{name}: {kind} {target} leads nowhere"
                elif (
                    parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].anchors | {"__skip"}
                ):
                    yield f"{name}: {target} has no such anchor"
    for style in sorted(site.rglob("*.css")):
        for target in re.findall(r"url\(\s*['\"]?(https?:[^)'\"]+)|@import\s+['\"](https?:[^'\"]+)", style.read_text()):
            yield f"{style.relative_to(site)} loads {''.join(target)} from another host"


# ---- llms.txt --------------------------------------------------------------------------------------------------------


def nav_pages(nav: list[Any], section: str = "") -> Iterator[tuple[str, str, str]]:
    """(section, title, page) of the navigation, in order."""
    for entry in nav:
        for title, target in entry.items():
            if isinstance(target, str):
                yield section or title, title, target
            else:
                yield from nav_pages(target, title)


def first_sentence(page: str) -> str:
    """The first sentence of the first paragraph that is text."""
    for paragraph in re.split(r"\n\s*\n", page):
        if re.match(r"[A-Za-z`*\[]", paragraph) and not paragraph.startswith("```"):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))
            return re.split(r"(?<=[.?])\s", text)[0].rstrip(":")
    return ""


def snippets_expanded(text: str) -> str:
    return re.sub(r'^--8<-- "([^"]+)"$', lambda found: (ROOT / found[1]).read_text(), text, flags=re.MULTILINE)


def write_llms(site: Path, config: Mapping[str, Any]) -> None:
    """`llms.txt`: the pages with a sentence each; and their Markdown beside the HTML."""
    lines = [f"# {config['site_name']}", "", f"> {config['site_description']}", ""]
    section = None
    for name, title, page in nav_pages(config["nav"]):
        text = snippets_expanded((DOCS / page).read_text())
        (site / page).write_text(text)
        if name != section:
            lines += ["", f"## {name}", ""] if section else []  # the first page stands above all sections
            section = name
        lines.append(f"- [{title}]({page}): {first_sentence(text)}".removesuffix(": "))
    (site / "llms.txt").write_text("\n".join(lines) + "\n")


def build(root: Path) -> Path:
    """Builds, checks and completes the site of a checkout. Raises SystemExit with what is wrong."""
    began = time.perf_counter()
    config = yaml.safe_load((root / "mkdocs.yml").read_text())
    site = root / config["site_dir"]
    shutil.rmtree(site, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=root, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    write_llms(site, config)
    found = list(problems(site))
    n_pages = sum(1 for _ in site.rglob("*.html"))
    print(
        f"{site.relative_to(root)}: {n_pages} pages in {time.perf_counter() - began:.1f} s, {len(found)} broken links"
    )
    if found:
        raise SystemExit("\n".join(found))
    return site


def main(arguments: list[str]) -> None:
    if arguments == ["tables"]:
        for path, make in GENERATED.items():
            path.write_text(with_tables(path.read_text(), make()))
    elif not arguments:
        build(ROOT)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1:])
