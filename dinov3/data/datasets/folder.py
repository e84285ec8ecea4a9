"""Your own images: anything that `dinov3.data.sources` lists (folder, list file, tar shards, Parquet, glob).

Classes are the first sub-folders, numbered in sorted order, as in `cats/a.jpg`, `dogs/x/b.jpg`; in a tar, the first folder
of the member's name. Images that lie beside the sub-folders have no class. Without sub-folders there are no classes.
"""

from __future__ import annotations

import os
from typing import Self

import numpy as np

from dinov3.data.datasets.base import ImageDataset, required
from dinov3.data.sources import Item, open_source


class Folder(ImageDataset):
    """Images of a source, labelled by their first sub-folder where there is one."""

    def __init__(self, root: str | os.PathLike[str], *, column: str | None = None):
        self.source = open_source(root, column=column)
        self.items: list[Item] = list(self.source)
        firsts = [_first_folder(item.path) for item in self.items]
        self.class_names: list[str] = sorted({f for f in firsts if f is not None})
        number = {name: i for i, name in enumerate(self.class_names)}
        self.labels = np.array([-1 if f is None else number[f] for f in firsts], np.int32)

    @classmethod
    def from_options(cls, **options: str) -> Self:
        return cls(required(options, "root", "Folder:root=…"), column=options.get("column"))

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> bytes:
        return self.items[index].read()

    def name(self, index: int) -> str:
        return self.items[index].path

    def label(self, index: int) -> int | None:
        return int(self.labels[index]) if self.labels[index] >= 0 else None

    def get_targets(self) -> np.ndarray:
        """int32 [N], −1 where there is no class."""
        return self.labels


def _first_folder(path: str) -> str | None:
    outside, mark, inside = path.partition("#")  # shard.tar#member
    if mark and outside.lower().endswith((".tar", ".tar.gz", ".tgz", ".parquet", ".arrow")):
        path = inside if "/" in inside else outside
    folder, slash, _ = path.removeprefix("./").partition("/")
    return folder if slash and folder else None
