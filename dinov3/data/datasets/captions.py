"""Images with sentences: COCO Captions in its published layout, and your own.

    CocoCaptions:root=/data/coco:split=TRAIN             annotations_trainval2014/, train2014/train2014/; 2017 for VAL
    Captions:root=/data/photos                           beside every image a .txt of the same name, a caption a line
    Captions:root=/data/photos:captions=captions.csv     a table: image, caption; .csv, .tsv (with a header) or .jsonl

`data[i]` gives (image, one of its captions): which one is a function of (seed, epoch, index) in `caption`,
else the first. (The reference draws with Python's global random state, and reads VAL's captions from
TRAIN's file, which knows none of its images.)
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.data.datasets.base import FileDataset
from dinov3.data.images import read_file
from dinov3.data.sources import open_source
from dinov3.errors import DinoError, one_of

COCO_PLACES = {  # split → (captions, images)
    "TRAIN": ("annotations_trainval2014/annotations/captions_train2014.json", "train2014/train2014"),
    "VAL": ("annotations_trainval2017/annotations/captions_val2017.json", "val2017/val2017"),
}
IMAGE_COLUMNS, CAPTION_COLUMNS = ("picture", "image", "path", "file", "file_name"), ("caption", "text", "sentence")


class Captioned(FileDataset):
    """Files below `root`, each with at least one caption. `images`: relative path → captions, in their order."""

    def __init__(self, root: str | os.PathLike[str], images: Mapping[str, list[str]], where: str) -> None:
        self.root = Path(root).expanduser()
        self.paths = list(images)
        self.captions = list(images.values())
        if not self.paths:
            raise DinoError(f"{where} gives no image a caption: there is nothing to learn or to measure")

    def read(self, index: int) -> bytes:
        return read_file(self.root / self.paths[index])

    def caption(self, index: int, *, seed: int = 0, epoch: int = 0) -> str:
        """One of the image's captions: the same for the same three numbers, on every machine."""
        own = self.captions[index]
        if len(own) == 1:
            return own[0]
        drawn = np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0]
        return own[int(drawn) % len(own)]

    def label(self, index: int) -> Any:
        """The first caption: what `data[i]` pairs the image with."""
        return self.captions[index][0]


class CocoCaptions(Captioned):
    """COCO Captions: TRAIN is 2014's, VAL 2017's; five captions an image or a few more."""

    class Split:
        TRAIN, VAL = "TRAIN", "VAL"

    def __init__(self, root: str | os.PathLike[str], split: str = "TRAIN") -> None:
        self.split = one_of("the split of CocoCaptions", split.upper(), COCO_PLACES)
        file, images = (Path(root).expanduser() / place for place in COCO_PLACES[self.split])
        super().__init__(images, coco_captions(file), str(file))


class Captions(Captioned):
    """Your own images: a table of captions, or a text file beside each image."""

    def __init__(self, root: str | os.PathLike[str], captions: str | os.PathLike[str] | None = None) -> None:
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise DinoError(f"{root} is no folder; captions come from a folder of images")
        if captions is None:
            super().__init__(folder, text_files(folder), f"no image in {root} has a .txt file beside it, so {root}")
            return
        table = Path(captions).expanduser()
        table = table if table.is_file() else folder / table
        images = coco_captions(table) if table.suffix == ".json" else read_table(table)
        lost = [p for p in images if not (folder / p).is_file()]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise DinoError(f"{table.name} names {lost[0]}{more}, which {root} does not have: paths are relative to it")
        super().__init__(folder, images, str(table))


def text_files(folder: Path) -> dict[str, list[str]]:
    """{image: the lines of the text file of the same name}; images without one are left out."""
    found = {}
    for item in open_source(folder):
        beside = (folder / item.path).with_suffix(".txt")
        if beside.is_file() and (lines := _lines(beside.read_text(encoding="utf-8").splitlines())):
            found[item.path] = lines
    return found


def read_table(file: Path) -> dict[str, list[str]]:
    """{image: captions} of a .csv, .tsv or .jsonl; an image may have several rows, and in .jsonl a list of captions."""
    found: dict[str, list[str]] = {}
    for number, row in _rows(file):
        image = next((row[c] for c in IMAGE_COLUMNS if row.get(c)), None)
        caption = next((row[c] for c in CAPTION_COLUMNS if row.get(c)), None)
        if image is None or caption is None:
            raise DinoError(
                f"{file}, row {number}: expected an image ({', '.join(IMAGE_COLUMNS)}) and a caption "
                f"({', '.join(CAPTION_COLUMNS)}), got {', '.join(map(str, row))}"
            )
        found.setdefault(image, []).extend(_lines(caption if isinstance(caption, list) else [caption]))
    return {image: captions for image, captions in found.items() if captions}


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if file.suffix not in (".csv", ".tsv", ".jsonl"):
        raise DinoError(f"captions are read from .csv, .tsv, .jsonl or COCO's .json, not from {file.name}")
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            if file.suffix == ".jsonl":
                yield from ((i, json.loads(line)) for i, line in enumerate(stream, 1) if line.strip())
            else:
                yield from enumerate(csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ","), 2)
    except OSError as error:
        raise DinoError(f"the captions {file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DinoError(f"the captions {file} are not {file.suffix[1:].upper()}: {error}") from None


def coco_captions(file: Path) -> dict[str, list[str]]:
    """{file name: captions} of COCO's JSON, in the order of its images; those without captions are left out."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        found: dict[str, list[str]] = {name: [] for name in names.values()}
        for row in content["annotations"]:
            found[names[row["image_id"]]].extend(_lines([row["caption"]]))
    except OSError as error:
        raise DinoError(f"the captions {file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DinoError(
            f"{file} is not COCO's caption JSON ({type(error).__name__}: {error}): it needs images with id and "
            "file_name, and annotations with image_id and caption"
        ) from None
    return {name: captions for name, captions in found.items() if captions}


def _lines(texts: list[str]) -> list[str]:
    return [" ".join(text.split()) for text in texts if text.strip()]
