"""A fixed division of one labelled folder into training and test images, where its makers gave none (Caltech-101).

    FolderSplit:root=/data/caltech101:split=train:train_per_class=30
    FolderSplit:root=/data/caltech101:split=test:train_per_class=30:test_per_class=50

Each class's images are put in an order drawn from the class's name (so that a class keeps its division whatever else
lies beside it): the first `train_per_class` train, of the rest at most `test_per_class` test. `exclude=BACKGROUND_Google`
leaves classes out (several with commas).
"""

from __future__ import annotations

import zlib
from typing import Self

import numpy as np

from dinov3.data.datasets.base import required
from dinov3.data.datasets.folder import Folder
from dinov3.errors import DinoError, UnknownName, did_you_mean


class FolderSplit(Folder):
    """`Folder` with a part of its images; classes are numbered in sorted order, the same in both parts."""

    def __init__(
        self,
        root: str,
        *,
        split: str,
        train_per_class: int = 30,
        test_per_class: int | None = None,
        exclude: tuple[str, ...] = (),
        column: str | None = None,
    ):
        super().__init__(root, column=column)
        if split not in ("train", "test"):
            raise UnknownName(f"split is train or test, not {split!r}{did_you_mean(split, ('train', 'test'))}")
        if not self.class_names:
            raise DinoError(f"{root} has no classes to divide: one sub-folder for each class is needed")
        for name in exclude:
            if name not in self.class_names:
                raise UnknownName(f"exclude={name}: there is no such class{did_you_mean(name, self.class_names)}")
        chosen = [name for name in self.class_names if name not in exclude]
        rows: list[int] = []
        labels: list[int] = []
        for number, name in enumerate(chosen):
            members = np.flatnonzero(self.labels == self.class_names.index(name))
            order = np.random.default_rng(zlib.crc32(name.encode())).permutation(len(members))
            if split == "train":
                kept = order[:train_per_class]
            else:
                end = None if test_per_class is None else train_per_class + test_per_class
                kept = order[train_per_class:end]
            if len(kept) == 0:
                raise DinoError(f"class {name} has {len(members)} images: none is left for split={split}")
            rows += sorted(members[kept].tolist())
            labels += [number] * len(kept)
        self.items = [self.items[i] for i in rows]
        self.labels = np.array(labels, np.int32)
        self.class_names = chosen

    @classmethod
    def from_options(cls, **options: str) -> Self:
        line = "FolderSplit:root=…:split=train:train_per_class=30:test_per_class=50"
        numbers: dict[str, int] = {}
        for key in ("train_per_class", "test_per_class"):
            if key in options:
                if not options[key].isdecimal() or int(options[key]) < 1:
                    raise DinoError(f"{key} is a number of images, not {options[key]!r}")
                numbers[key] = int(options[key])
        return cls(
            required(options, "root", line),
            split=required(options, "split", line),
            exclude=tuple(filter(None, options.get("exclude", "").split(","))),
            column=options.get("column"),
            **numbers,
        )
