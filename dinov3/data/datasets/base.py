"""What all image data sets share, from encoded bytes to (image, target); folders of images as data sets."""

from __future__ import annotations

import os
import pickle
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from dinov3.data.images import open_image, read_file
from dinov3.data.sources import open_source
from dinov3.data.sources.items import Runs
from dinov3.errors import DinoError, ImageError, UnsafeFile, one_of, only_known


class ImageDataset:
    """A map from a number to an encoded image; decoding and targets on top. Picklable, so workers can have it."""

    transform: Callable[[Any], Any] | None = None
    target_transform: Callable[[Any], Any] | None = None

    # arguments that are no texts: how a spec's text becomes one
    PARSED: ClassVar[Mapping[str, Callable[[str], Any]]] = {}

    @classmethod
    def from_options(cls, **options: str) -> Self:
        """From the keys of a dataset spec (`make_dataset`)."""
        return cls(**{key: cls.PARSED.get(key, str)(text) for key, text in options.items()})

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        """The encoded image. Raises `ImageError` with the reason if it cannot be had."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where the image is, for messages."""
        raise NotImplementedError

    def stamp(self, index: int) -> str | None:
        """What changes with the image's file, as it is now; None where that is not known."""
        return None

    def label(self, index: int) -> int | None:
        """The number of the image's class; None where there are no classes."""
        return None

    def target_of(self, index: int, image: Any) -> Any:
        """What an image is paired with, once it is decoded."""
        return self.label(index)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """(upright RGB image, target), each through its transform."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        try:
            image: Any = open_image(self.read(index)).image
        except ImageError as error:
            raise ImageError(f"{self.name(index)}: {error}") from None
        target = self.target_of(index, image)
        if self.transform is not None:
            image = self.transform(image)
        return image, target if self.target_transform is None else self.target_transform(target)


class FileDataset(ImageDataset):
    """Images that are files: `paths`."""

    paths: Sequence[str | Path]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        return read_file(self.paths[index])

    def name(self, index: int) -> str:
        return str(self.paths[index])


class Mixture(ImageDataset):
    """Several data sets, one after the other, with a weight each: which share of the batches is drawn from it."""

    def __init__(self, parts: Sequence[ImageDataset], weights: Sequence[Fraction]) -> None:
        self.parts, self.weights = list(parts), list(weights)
        self.starts = list(accumulate(map(len, self.parts), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def _part(self, index: int) -> tuple[ImageDataset, int]:
        k = bisect_right(self.starts, index) - 1
        return self.parts[k], index - self.starts[k]

    def read(self, index: int) -> bytes:
        part, at = self._part(index)
        return part.read(at)

    def name(self, index: int) -> str:
        part, at = self._part(index)
        return part.name(at)

    def stamp(self, index: int) -> str | None:
        part, at = self._part(index)
        return part.stamp(at)


class DataUnpickler(pickle.Unpickler):
    """Reads pickled containers, texts, numbers and arrays. Raises `UnsafeFile` for everything else."""

    ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype")}
        | {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
        | {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how old pickles write an array's bytes
            return lambda text, encoding: text.encode("latin1")
        if (module, name) in self.ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        return self.other(module, name)

    def other(self, module: str, name: str) -> Any:
        raise UnsafeFile(f"this pickle wants to run {module}.{name}; a ground truth holds lists and numbers only")


# ---- folders ---------------------------------------------------------------------------------------------------------
# Your own images: anything that `dinov3.data.sources` lists (folder, list file, tar shards, Parquet, glob).
#
# Classes are the first sub-folders, numbered in sorted order, as in `cats/a.jpg`, `dogs/x/b.jpg`; in a tar, the first folder
# of the member's name. Images that lie beside the sub-folders have no class. Without sub-folders there are no classes.


class Folder(ImageDataset):
    """Images of a source, labelled by their first sub-folder where there is one."""

    def __init__(self, root: str | os.PathLike[str], *, column: str | None = None):
        self.source = open_source(root, column=column)
        met: dict[str | None, int] = {}  # first folders, in the order they are met
        paths = map(self.source.path_of, range(len(self.source)))
        numbers = np.fromiter((met.setdefault(_first_folder(path), len(met)) for path in paths), np.int32)
        self.class_names: list[str] = sorted(name for name in met if name is not None)
        label = {name: i for i, name in enumerate(self.class_names)}
        self.labels = np.array([-1 if name is None else label[name] for name in met], np.int32)[numbers]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def runs(self) -> Runs | None:
        return self.source.runs

    def read(self, index: int) -> bytes:
        return self.source.place_of(index).read()

    def name(self, index: int) -> str:
        return self.source.path_of(index)

    def stamp(self, index: int) -> str:
        return self.source.stamp_of(index)

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


def _count(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise DinoError(f"{key} is a number of images, not {text!r}")
    return int(text)


class FolderSplit(Folder):
    """A fixed division of one labelled folder into training and test images, where its makers gave none (Caltech-101).

        FolderSplit:root=/data/caltech101:split=train:train_per_class=30
        FolderSplit:root=/data/caltech101:split=test:train_per_class=30:test_per_class=50

    Each class's images are put in an order drawn from the class's name (so that a class keeps its division whatever else
    lies beside it): the first `train_per_class` train, of the rest at most `test_per_class` test. `exclude` leaves
    classes out (several with commas). Classes are numbered in sorted order, the same in both parts.
    """

    PARSED: ClassVar = {
        "train_per_class": partial(_count, "train_per_class"),
        "test_per_class": partial(_count, "test_per_class"),
        "exclude": lambda text: tuple(filter(None, text.split(","))),
    }

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
        one_of("split", split, ("train", "test"))
        if not self.class_names:
            raise DinoError(f"{root} has no classes to divide: one sub-folder for each class is needed")
        only_known("exclude: there is no class", exclude, self.class_names)
        chosen = [name for name in self.class_names if name not in exclude]
        rows: list[int] = []
        labels: list[int] = []
        for number, name in enumerate(chosen):
            members = np.flatnonzero(self.labels == self.class_names.index(name))
            order = np.random.default_rng(zlib.crc32(name.encode())).permutation(len(members))
            if split == "train":
                rows_of_class = order[:train_per_class]
            else:
                end = None if test_per_class is None else train_per_class + test_per_class
                rows_of_class = order[train_per_class:end]
            if len(rows_of_class) == 0:
                raise DinoError(f"class {name} has {len(members)} images: none is left for split={split}")
            rows += sorted(members[rows_of_class].tolist())
            labels += [number] * len(rows_of_class)
        self.rows = np.array(rows, np.int64)
        self.labels = np.array(labels, np.int32)
        self.class_names = chosen

    def read(self, index: int) -> bytes:
        return super().read(int(self.rows[index]))

    def name(self, index: int) -> str:
        return super().name(int(self.rows[index]))

    def stamp(self, index: int) -> str:
        return super().stamp(int(self.rows[index]))

    @property
    def runs(self) -> None:
        return None
