"""Reads the .csv files that evaluations write."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows, numbers as numbers, empty cells as None."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: _parsed(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _parsed(text: str) -> Any:
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
