"""The house as docs/architecture.md draws it is the house that stands, and no function outgrows its room."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "dinov3"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
LONGEST, MOST_PARAMETERS = 80, 12


def rooms() -> dict[str, set[str]]:
    """Room → its files, as the page lists them: a folder, then its files, on as many lines as they need."""
    (block,) = re.findall(r"The files:\n\n```\n(.*?)```", PAGE, re.DOTALL)
    found: dict[str, set[str]] = {}
    for word in block.split():
        if word.endswith("/"):
            found[room := word] = set()
        else:
            found[room].add(word)
    return found


def python_files(folder: Path) -> set[str]:
    """The folder's own Python files; an __init__ that holds nothing but a docstring and imports is no file to list."""
    return {p.name for p in folder.glob("*.py") if p.name != "__init__.py" or defines_something(p)}


def defines_something(path: Path) -> bool:
    nodes = ast.parse(path.read_text()).body
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in nodes)


def test_the_page_lists_every_file_of_the_package() -> None:
    folders = {p.parent for p in PACKAGE.rglob("*.py")}
    there = {f"{f.relative_to(ROOT)}/": python_files(f) for f in folders}
    assert rooms() == {room: files for room, files in there.items() if files}


def test_every_room_of_the_table_exists_and_no_line_is_too_long() -> None:
    named = re.findall(r"^\| `(dinov3/[\w/]*)` \|", PAGE, re.MULTILINE)
    assert len(named) > 15
    assert all((ROOT / room).is_dir() for room in named)
    assert max(map(len, PAGE.splitlines())) <= 140


def test_the_drawing_has_the_rows_that_the_import_contract_enforces() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    rows = re.findall(r"^(\d) \w+ +(.*?)(?:   +.*)?$", PAGE, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(len(layers)))[::-1]
    for (_, drawn), layer in zip(rows, layers):
        assert set(re.findall(r"\w+", drawn.replace(".py", ""))) == set(re.findall(r"\w+", layer)), drawn


def imported_modules() -> Iterator[tuple[str, str, str]]:
    """(file, module, name) of every import from the package, wherever in a file it stands."""
    for path in (
        p for folder in ("dinov3", "tests", "projects", "examples", "benchmarks") for p in (ROOT / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dinov3":
                yield from ((str(path.relative_to(ROOT)), node.module or "", alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from (
                    (str(path.relative_to(ROOT)), a.name, "") for a in node.names if a.name.split(".")[0] == "dinov3"
                )


def test_every_import_names_a_module_that_exists() -> None:  # also those inside of functions, which no import has tried
    imports = set(imported_modules())
    assert len(imports) > 1000
    places = {module: ROOT / module.replace(".", "/") for _, module, _ in imports}
    single = {module for module, place in places.items() if place.with_suffix(".py").is_file()}
    empty = {m for m in places.keys() - single if not ast.parse((places[m] / "__init__.py").read_text()).body[1:]}
    assert len(single) > 100
    assert len(empty) > 10
    # what is imported from a package that defines nothing is a module
    inside = {
        (m, p.stem) for m in empty for p in places[m].iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()
    }
    assert sorted(row for row in imports if row[1] in empty and row[2] and row[1:] not in inside) == []


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize("measure, most", [(length, LONGEST), (parameters, MOST_PARAMETERS)])
def test_no_function_is_longer_or_takes_more_than_a_reader_can_hold(measure, most) -> None:
    measured = [(measure(node), name) for name, node in functions()]
    assert len(measured) > 1000
    assert [row for row in sorted(measured, reverse=True) if row[0] > most] == []
