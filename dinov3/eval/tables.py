"""Rows of named cells: written, read back, shown to people."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.errors import DinoError
from dinov3.files import atomically


def _cell(value: Any) -> Any:
    """64-bit int, 64-bit float or text; booleans are text, None is empty."""
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    return value if value is None else str(value)


def write_table(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows of named cells; the form follows the ending: .csv, .jsonl, .yaml. Appears whole or not at all."""
    path = Path(path)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [{c: _cell(row.get(c)) for c in columns} for row in rows]
    with atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in cells)
        elif path.suffix == ".jsonl":
            file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in cells)
        elif path.suffix == ".yaml":
            for i, row in enumerate(cells):  # JSON scalars are YAML
                file.write(f"{i}:\n" + "".join(f"  {json.dumps(k)}: {json.dumps(v)}\n" for k, v in row.items()))
        else:
            raise DinoError(f"a table is written as .csv, .jsonl or .yaml, not as {path.name}")
    return path


def read_table(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows that `write_table` wrote (.csv, .jsonl), numbers as numbers, empty cells as None."""
    path = Path(path)
    with open(path, newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file]
        return [{k: _parsed(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _parsed(text: str) -> Any:
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table for people."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[shown(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    lines = [columns, ["-" * w for w in widths], *cells]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
