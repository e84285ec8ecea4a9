"""Test sets around ImageNet-1k that its linear classifiers are measured on (paper Tab. 7, 14, 15).

    ImageNetV2:root=/data/imagenetv2-matched-frequency-format-val      <root>/<0 … 999>/*.jpeg
    ImageNetReaL:root=/data/imagenet:labels=/data/real.json            ImageNet's VAL with sets of labels
    ImageNetA:root=/data/imagenet-a   ImageNetR:root=/data/imagenet-r  <root>/<wnid>/*.jpg, 200 classes
    ImageNetSketch:root=/data/sketch                                   <root>/<wnid>/*.JPEG, 1000 classes
    ImageNetC:root=/data/imagenet-c                                    <root>[/<group>]/<corruption>/<1 … 5>/<wnid>/*.JPEG
    ObjectNet:root=/data/objectnet-1.0                                 <root>/images/<folder>/*.png, <root>/mappings/*

Classes are ImageNet-1k's numbers, the sorted WordNet ids. A set with some of them only counts its own: `get_targets` then
numbers those, and `get_imagenet_class_mapping` gives the classifier's columns that mean each of them. `metric` is what a
set is measured by by default. Any number of images is fine, so small copies of a layout work.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dinov3.data.datasets.base import FileDataset
from dinov3.data.datasets.imagenet import ImageNet, ImageNetSplit
from dinov3.data.images import image_suffix, open_image, read_file
from dinov3.errors import DinoError, UnknownName, did_you_mean

WNIDS = Path(__file__).parents[1] / "names" / "imagenet_wnids.txt"
CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip


@lru_cache(maxsize=1)
def class_numbers() -> dict[str, int]:
    """{WordNet id: class number} of ImageNet-1k."""
    return {wnid: i for i, wnid in enumerate(WNIDS.read_text().split())}


class Listed(FileDataset):
    """Images below a folder with a class for each; `columns` where only some of ImageNet's classes occur."""

    metric: ClassVar[str] = "mean_accuracy"
    line: ClassVar[str] = "root=…"

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise DinoError(f"no folder {self.root}: {type(self).__name__}:{self.line} expects its images there")
        self.paths: list[str] = []  # relative to root
        self.numbers: list[int] = []
        self.find()
        if not self.paths:
            raise DinoError(f"no images of {type(self).__name__} in {self.root}; its layout: {self.line}")

    def find(self) -> None:
        raise NotImplementedError

    def add(self, folder: Path, number: int) -> None:
        for name in sorted(os.listdir(folder)):
            if image_suffix(name):
                self.paths.append(str((folder / name).relative_to(self.root)))
                self.numbers.append(number)

    def read(self, index: int) -> bytes:
        return read_file(self.root / self.paths[index])

    def label(self, index: int) -> int | None:
        return self.numbers[index]

    def get_targets(self) -> np.ndarray:
        return np.array(self.numbers, np.int64)


def wnid_folders(root: Path) -> list[tuple[int, Path]]:
    """(class number, folder) for the WordNet ids in a folder, in their order. Raises where a name is none of the 1000."""
    known = class_numbers()
    found = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    for name in found:
        if name not in known and name.startswith("n") and name[1:].isdecimal():
            raise DinoError(f"{root / name} is none of ImageNet-1k's 1000 classes")
    return [(known[name], root / name) for name in found if name in known]


class ImageNetV2(Listed):
    """Recht et al. 2019: folders are class numbers, so "10" comes after "9", not after "1"."""

    line = "<root>/<0 … 999>/*.jpeg"

    def find(self) -> None:
        names = [e.name for e in os.scandir(self.root) if e.is_dir() and e.name.isdecimal()]
        for name in sorted(names, key=int):
            if int(name) > 999:
                raise DinoError(f"{self.root / name}: ImageNet-V2's folders are class numbers 0 to 999")
            self.add(self.root / name, int(name))


class ImageNetSketch(Listed):
    line = "<root>/<wnid>/*.JPEG"

    def find(self) -> None:
        for number, folder in wnid_folders(self.root):
            self.add(folder, number)


class Subset(Listed):
    """Some of ImageNet's classes, and only those count: labels are 0 … n − 1, `columns` the classifier's."""

    line = "<root>/<wnid>/*.jpg"

    def find(self) -> None:
        self.columns: list[list[int]] = []
        for number, folder in wnid_folders(self.root):
            self.add(folder, len(self.columns))
            self.columns.append([number])

    def get_imagenet_class_mapping(self) -> Sequence[Sequence[int]]:
        return self.columns


class ImageNetA(Subset):
    """Hendrycks et al. 2021: 7,500 images that a ResNet-50 gets wrong, 200 classes."""


class ImageNetR(Subset):
    """Hendrycks et al. 2021: 30,000 paintings, toys, tattoos …, 200 classes."""


class ImageNetReaL(ImageNet):
    """Beyer et al. 2020: ImageNet's VAL with every label that fits; images without one are not counted.

    real.json is a list indexed by the number in the image's name − 1.
    """

    metric: ClassVar[str] = "any_match_accuracy"

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        labels: str | os.PathLike[str],
        extra: str | os.PathLike[str] | None = None,
    ):
        super().__init__(split=ImageNetSplit.VAL, root=root, extra=extra)
        try:
            self.sets: list[list[int]] = json.loads(Path(labels).expanduser().read_text())
        except (OSError, ValueError) as error:
            raise DinoError(f"labels={labels} is not ReaL's real.json: {error}") from None

    def get_targets(self) -> np.ndarray:
        """int64 [N, L], each row a set of labels padded with −1."""
        numbers = self.entries["actual_index"].astype(int)
        if numbers.max() > len(self.sets):
            raise DinoError(f"real.json has {len(self.sets)} sets, but there is an image number {numbers.max()}")
        sets = [self.sets[n - 1] for n in numbers]
        padded = np.full((len(sets), max(1, *map(len, sets))), -1, np.int64)
        for row, labels in zip(padded, sets):
            row[: len(labels)] = labels
        return padded


class ImageNetC(Listed):
    """Hendrycks & Dietterich 2019: 15 corruptions × 5 severities, as the published archives unpack (blur/fog/… or flat).

    The four extra corruptions are left out: they would change mCE.
    """

    metric: ClassVar[str] = "imagenet_c_metric"
    line = "<root>[/<group>]/<corruption>/<severity 1 … 5>/<wnid>/*.JPEG"

    def find(self) -> None:
        self.groups: list[str] = []
        folders = [Path(e.path) for e in sorted(os.scandir(self.root), key=lambda e: e.name) if e.is_dir()]
        folders += [
            Path(e.path) for f in list(folders) if f.name not in CORRUPTIONS for e in os.scandir(f) if e.is_dir()
        ]
        known = {f.name: f for f in folders if f.name in CORRUPTIONS}
        for corruption in CORRUPTIONS:
            for severity in range(1, 6):
                level = known.get(corruption, self.root / "absent") / str(severity)
                if not level.is_dir():
                    continue
                before = len(self.paths)
                for number, folder in wnid_folders(level):
                    self.add(folder, number)
                self.groups += [f"{corruption}/{severity}"] * (len(self.paths) - before)

    def get_groupby_labels(self) -> np.ndarray:
        return np.array(self.groups)


class ObjectNet(Listed):
    """Barbu et al. 2019: objects at home; the 113 of 313 classes that ImageNet has, without the red frame.

    A class may be several of ImageNet's: any of its columns is right. Its own four files in <root>/mappings say which.
    """

    line = "<root>/images/<folder>/*.png with <root>/mappings/{folder_to_objectnet_label,objectnet_to_imagenet_1k,…}"
    FRAME = 2  # pixels of red on each side

    def find(self) -> None:
        self.columns: list[list[int]] = []
        images = self.root / "images"
        if not images.is_dir():
            raise DinoError(f"no folder {images}; ObjectNet's layout: {self.line}")
        mapping = self._mapping()
        for folder in sorted(e.name for e in os.scandir(images) if e.is_dir()):
            if folder in mapping:
                self.add(images / folder, len(self.columns))
                self.columns.append(mapping[folder])

    def _mapping(self) -> dict[str, list[int]]:
        """{folder: ImageNet's class numbers}."""
        labels = self._file("folder_to_objectnet_label.json")
        meanings = self._file("objectnet_to_imagenet_1k.json")  # "Alarm clock": "analog clock; digital clock"
        order = {int(v): int(k) for k, v in self._file("pytorch_to_imagenet_2012_id.json").items()}
        lines = [text.strip() for text in self._file("imagenet_to_label_2012_v2")]
        number = {text: order[i] for i, text in enumerate(lines) if i in order}
        mapping: dict[str, list[int]] = {}
        for folder, label in labels.items():
            if label in meanings:
                names = meanings[label].split("; ")
                unknown = [n for n in names if n not in number]
                if unknown:
                    raise UnknownName(
                        f"ObjectNet's mappings name {unknown[0]!r}, which no line lists{did_you_mean(unknown[0], number)}"
                    )
                mapping[folder] = sorted(number[n] for n in names)
        return mapping

    def _file(self, name: str) -> Any:
        path = self.root / "mappings" / name
        try:
            text = path.read_text(encoding="utf-8")
            return json.loads(text) if path.suffix == ".json" else text.splitlines()
        except (OSError, ValueError) as error:
            raise DinoError(f"ObjectNet's {path} cannot be read: {error}") from None

    def get_imagenet_class_mapping(self) -> Sequence[Sequence[int]]:
        return self.columns

    def read(self, index: int) -> bytes:
        image = open_image(super().read(index)).image
        w, h = image.size
        out = io.BytesIO()
        f = self.FRAME
        image.crop((f, f, w - f, h - f)).save(out, "PNG", compress_level=1)
        return out.getvalue()
