"""Names of classes and sentences around them, as published models count them: plain text files, read at need.

`imagenet1k.txt` and `templates.txt` are the class names and the 80 prompt templates that came with CLIP (MIT, see
NOTICE); `imagenet_wnids.txt` the 1000 WordNet ids in the order of the classes; `ade20k.txt` the 150 short names of
the scene parsing benchmark; `coco.txt` the 80 categories with their ids (1 to 90).
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from dinov3.errors import DinoError

HERE = Path(__file__).parent


@cache
def imagenet1k() -> tuple[str, ...]:
    """1000 class names in the order of the sorted synsets; two pairs of classes share a name (crane, maillot)."""
    return tuple((HERE / "imagenet1k.txt").read_text().splitlines())


@cache
def ade20k() -> tuple[str, ...]:
    """150 class names in the order of model outputs (the mask's value minus one)."""
    return tuple((HERE / "ade20k.txt").read_text().splitlines())


@cache
def coco() -> tuple[str, ...]:
    """91 names by category id; "" where an id has no category."""
    names = [""] * 91
    for line in (HERE / "coco.txt").read_text().splitlines():
        number, _, name = line.partition(" ")
        names[int(number)] = name
    return tuple(names)


@cache
def templates() -> tuple[str, ...]:
    """The 80 sentences of CLIP's zero-shot evaluation, with {} for the class."""
    return tuple((HERE / "templates.txt").read_text().splitlines())


def read_names(path: str | os.PathLike[str], what: str = "class names") -> tuple[str, ...]:
    """Lines of a text file, blank ones and `# …` left out."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DinoError(f"{what} cannot be read from {path}: {getattr(error, 'strerror', None) or error}") from None
    names = tuple(line for line in lines if line and not line.startswith("# "))
    if not names:
        raise DinoError(f"{path} holds no {what}: one a line is expected")
    return names
