"""Metadata of images: columns of a CSV or Parquet file, keyed by path, in the order of a data set.

    path,region,year
    a/1.jpg,coast,2019

`path` is the image's name in the data set: for a folder relative to it, for a list or table as that names it. An empty cell,
null or NaN is a missing value.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dinov3.data.loading import Images
from dinov3.errors import DinoError, only_known, require

PATH = "path"
ENDINGS = (".csv", ".tsv", ".parquet")


def metadata_of(
    file: str | os.PathLike[str], columns: Sequence[str], images: Images
) -> tuple[dict[str, list[Any]], list[str]]:
    """({column: a value for each image of the data set, None where it is missing}, notes on what did not match).

    Raises `DinoError` for a file that cannot be read, unknown columns, a path given twice, and where no image matches.
    """
    rows = _read(Path(file).expanduser(), columns)
    names = [_plain(images.name(i)) for i in range(len(images))]
    known = [name in rows for name in names]
    if not any(known):
        raise DinoError(
            f"no image has a row in {file}: its column {PATH!r} holds names such as {next(iter(rows), '(none)')!r}, the "
            f"images are called {names[0]!r}; paths are relative to the folder of the images"
        )
    notes = []
    if without := known.count(False):
        notes.append(f"{file}: {without} of {len(names)} images have no row, such as {names[known.index(False)]}")
    if unused := rows.keys() - set(names):
        notes.append(f"{file}: {len(unused)} of {len(rows)} rows have no image, such as {min(unused)}")
    return {c: [rows[name][c] if name in rows else None for name in names] for c in columns}, notes


def _read(file: Path, columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{path: {column: value}}"""
    if file.suffix.lower() not in ENDINGS:
        raise DinoError(f"{file} is no table of metadata: its name must end in {', '.join(ENDINGS)}")
    if not file.is_file():
        raise DinoError(f"there is no file {file} with metadata")
    if file.suffix.lower() == ".parquet":
        parquet = require("pyarrow.parquet", "search", "reading Parquet")
        try:
            names = parquet.read_schema(file).names
            _check(file, names, columns)
            rows = parquet.read_table(file, columns=[PATH, *columns]).to_pylist()
        except (OSError, ValueError) as error:
            raise DinoError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from None
    else:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
            try:
                _check(file, list(reader.fieldnames or ()), columns)
                rows = list(reader)
            except (csv.Error, UnicodeDecodeError) as error:
                raise DinoError(f"{file} cannot be read as CSV in UTF-8: {error}") from None
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        path = _plain(str(row[PATH]))
        if path in found:
            raise DinoError(f"{file} has two rows of {path}; keep one")
        found[path] = {c: None if _missing(row[c]) else row[c] for c in columns}
    return found


def _check(file: Path, there: list[str], columns: Sequence[str]) -> None:
    only_known(f"{file} has no column", [PATH, *columns], there)


def _missing(value: Any) -> bool:
    return value is None or value == "" or value != value


def _plain(path: str) -> str:
    return str(PurePosixPath(path.replace("\\", "/")))
