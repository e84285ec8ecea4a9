"""What all image data sets share: from encoded bytes to (image, target), and a name for every message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from dinov3.data.images import open_image
from dinov3.errors import DinoError, ImageError


class ImageDataset:
    """A map from a number to an encoded image; decoding and targets on top. Picklable, so workers can have it."""

    transform: Callable[[Any], Any] | None = None
    target_transform: Callable[[Any], Any] | None = None

    @classmethod
    def from_options(cls, **options: str) -> Self:
        """From the keys of a dataset spec (`make_dataset`)."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        """The encoded image. Raises `ImageError` with the reason if it cannot be had."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where the image is, for messages."""
        raise NotImplementedError

    def label(self, index: int) -> int | None:
        """The number of the image's class; None where there are no classes."""
        return None

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """(upright RGB image, target), each through its transform."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        try:
            image: Any = open_image(self.read(index)).image
        except ImageError as error:
            raise ImageError(f"{self.name(index)}: {error}") from None
        target: Any = self.label(index)
        if self.transform is not None:
            image = self.transform(image)
        return image, target if self.target_transform is None else self.target_transform(target)


def required(options: dict[str, str], key: str, line: str) -> str:
    """An option that a data set cannot do without."""
    if key not in options:
        raise DinoError(f"{line.split(':')[0]} needs {key}=…: write {line}")
    return options[key]
