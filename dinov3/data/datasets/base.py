"""What all image data sets share: from encoded bytes to (image, target), and a name for every message."""

from __future__ import annotations

import pickle
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Self

from dinov3.data.images import open_image, read_file
from dinov3.errors import ImageError, UnsafeFile


class ImageDataset:
    """A map from a number to an encoded image; decoding and targets on top. Picklable, so workers can have it."""

    transform: Callable[[Any], Any] | None = None
    target_transform: Callable[[Any], Any] | None = None

    PARSED: ClassVar[
        Mapping[str, Callable[[str], Any]]
    ] = {}  # arguments that are no texts: how a spec's text becomes one

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
