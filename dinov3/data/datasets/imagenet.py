"""ImageNet-1k as its archives unpack, and ImageNet-22k as one tar per class, each with a small index beside it.

ImageNet:    <root>/train/<wnid>/<wnid>_<n>.JPEG     <root>/val/<wnid>/ILSVRC2012_val_<n:08d>.JPEG
             <root>/test/ILSVRC2012_test_<n:08d>.JPEG    <root>/labels.txt (lines "wnid,class name")
             <extra>/entries-<SPLIT>.npy, class-ids-<SPLIT>.npy, class-names-<SPLIT>.npy
ImageNet22k: <root>/<wnid>.tar    <extra>/entries.npy, class-ids.npy

The index files are the reference's (structured NumPy arrays, memory-mapped), and are written once by `dump_extra()`. Any
number of images is fine: a subset of classes, a tenth of the images. Without `extra` ImageNet is listed when it is
opened, which takes a minute for the whole of it and seconds for a subset.

Differences from the reference: TEST can be indexed with NumPy 2; ImageNet22k can be read at all, needs no block listings
to be indexed, and recognises the few gzip-wrapped members by content instead of by a list of numbers.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Sequence
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dinov3.data.datasets.base import FileDataset, ImageDataset
from dinov3.data.images import check_size, image_suffix, most_bytes, open_image, os_reason, read_file
from dinov3.errors import DinoError, ImageError, UnknownName, did_you_mean, one_of
from dinov3.files import atomically

NO_CLASS = 2**32 - 1  # of the test split, in unsigned 32 bits
HEADER = 512  # bytes of a tar member before its content


class ImageNetSplit(Enum):
    TRAIN = "train"
    VAL = "val"
    TEST = "test"

    @classmethod
    def parse(cls, text: str) -> ImageNetSplit:
        """By member name, in capitals as in `ImageNet:split=TRAIN`."""
        return cls[one_of("the split", text, cls.__members__)]

    def relative_path(self, class_id: str, number: int) -> str:
        """Where image `number` of a class lies below the root."""
        if self is ImageNetSplit.TRAIN:
            return f"train/{class_id}/{class_id}_{number}.JPEG"
        if self is ImageNetSplit.VAL:
            return f"val/{class_id}/ILSVRC2012_val_{number:08d}.JPEG"
        return f"test/ILSVRC2012_test_{number:08d}.JPEG"


class ImageNet(ImageDataset):
    """ImageNet-1k, or any part of it in the same layout."""

    Split = ImageNetSplit
    PARSED: ClassVar = {"split": ImageNetSplit.parse}

    def __init__(
        self,
        *,
        split: ImageNetSplit,
        root: str | os.PathLike[str],
        extra: str | os.PathLike[str] | None = None,
        transform: Any = None,
        target_transform: Any = None,
    ):
        self.split, self.root = split, Path(root)
        self.extra = None if extra is None else Path(extra)
        self.transform, self.target_transform = transform, target_transform
        self._entries: np.ndarray | None = None

    @property
    def entries(self) -> np.ndarray:
        """Structured [N]: actual_index, class_index, class_id, class_name."""
        if self._entries is None:
            if self.extra is None:
                self._entries = self._listed()
            else:
                path = self.extra / f"entries-{self.split.name}.npy"
                command = (
                    f"ImageNet(split=ImageNet.Split.{self.split.name}, root={str(self.root)!r}, "
                    f"extra={str(self.extra)!r}).dump_extra()"
                )
                self._entries = _mapped(path, ("actual_index", "class_index", "class_id"), command)
        return self._entries

    def __getstate__(self) -> dict[str, Any]:
        keep = self.extra is None  # an index on disk is mapped again where it is needed
        return self.__dict__ | ({} if keep else {"_entries": None})

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        entry = self.entries[index]
        return self.split.relative_path(str(entry["class_id"]), int(entry["actual_index"]))

    def read(self, index: int) -> bytes:
        return read_file(self.root / self.name(index))

    def label(self, index: int) -> int | None:
        number = int(self.entries[index]["class_index"])
        return None if number == NO_CLASS else number

    def get_targets(self) -> np.ndarray | None:
        """[N] class numbers; None for the test split."""
        return None if self.split is ImageNetSplit.TEST else self.entries["class_index"]

    def find_class_id(self, class_index: int) -> str:
        return str(self._classes("ids")[class_index])

    def find_class_name(self, class_index: int) -> str:
        return str(self._classes("names")[class_index])

    def _classes(self, what: str) -> np.ndarray:
        if self.split is ImageNetSplit.TEST:
            raise DinoError("the test split has no classes")
        if self.extra is not None and (path := self.extra / f"class-{what}-{self.split.name}.npy").exists():
            return np.load(path, mmap_mode="r")
        return _classes(self.entries, {"ids": "class_id", "names": "class_name"}[what])

    def dump_extra(self) -> None:
        """Lists the images below the root and writes the index files, each in one move."""
        if self.extra is None:
            raise DinoError("dump_extra() writes index files: give the folder for them, extra=…")
        entries = self._listed()
        self.extra.mkdir(parents=True, exist_ok=True)
        _save(self.extra / f"entries-{self.split.name}.npy", entries)
        if self.split is not ImageNetSplit.TEST:
            _save(self.extra / f"class-ids-{self.split.name}.npy", _classes(entries, "class_id"))
            _save(self.extra / f"class-names-{self.split.name}.npy", _classes(entries, "class_name"))
        self._entries = None

    def _listed(self) -> np.ndarray:
        folder = self.root / self.split.value
        if not folder.is_dir():
            raise DinoError(f"no folder {folder}: ImageNet's {self.split.name} images are expected there")
        rows: list[tuple[int, int, str, str]] = []
        if self.split is ImageNetSplit.TEST:
            rows += [(number, NO_CLASS, "", "") for number in _numbers(folder, r"ILSVRC2012_test_(\d{8})\.JPEG")]
        else:
            names = self._class_names()
            with os.scandir(folder) as found:
                class_ids = sorted(e.name for e in found if e.is_dir() and not e.name.startswith("."))
            for index, class_id in enumerate(class_ids):
                start = (
                    re.escape(class_id) + r"_(\d+)" if self.split is ImageNetSplit.TRAIN else r"ILSVRC2012_val_(\d{8})"
                )
                numbers = _numbers(folder / class_id, start + r"\.JPEG")
                rows += [(number, index, class_id, names.get(class_id, "")) for number in numbers]
        if not rows:
            raise DinoError(f"no images in {folder} that are named as ImageNet's {self.split.name} images are")
        widths = [max(1, max(map(len, column))) for column in ([r[2] for r in rows], [r[3] for r in rows])]
        return np.array(
            rows,
            [
                ("actual_index", "<u4"),
                ("class_index", "<u4"),
                ("class_id", f"<U{widths[0]}"),
                ("class_name", f"<U{widths[1]}"),
            ],
        )

    def _class_names(self) -> dict[str, str]:
        path = self.root / "labels.txt"
        if not path.exists():
            return {}
        with open(path, newline="", encoding="utf-8") as file:
            return {row[0]: row[1].strip() for row in csv.reader(file) if len(row) > 1}


class ImageNet22k(ImageDataset):
    """One tar per class; the index says where in it each image is."""

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        extra: str | os.PathLike[str],
        transform: Any = None,
        target_transform: Any = None,
    ):
        self.root, self.extra = Path(root), Path(extra)
        self.transform, self.target_transform = transform, target_transform
        self._entries: np.ndarray | None = None

    @property
    def entries(self) -> np.ndarray:
        """Structured [N]: class_index, class_id, start_offset (of the header), end_offset (of the content), filename."""
        if self._entries is None:
            command = f"ImageNet22k(root={str(self.root)!r}, extra={str(self.extra)!r}).dump_extra()"
            fields = ("class_index", "class_id", "start_offset", "end_offset", "filename")
            self._entries = _mapped(self.extra / "entries.npy", fields, command)
        return self._entries

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_entries": None}

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        entry = self.entries[index]
        return f"{entry['class_id']}.tar#{entry['filename']}"

    def label(self, index: int) -> int | None:
        return int(self.entries[index]["class_index"])

    def get_targets(self) -> np.ndarray:
        return self.entries["class_index"]

    def find_class_id(self, class_index: int) -> str:
        return str(np.load(self.extra / "class-ids.npy", mmap_mode="r")[class_index])

    def read(self, index: int) -> bytes:
        entry = self.entries[index]
        path = self.root / f"{entry['class_id']}.tar"
        start, end = int(entry["start_offset"]) + HEADER, int(entry["end_offset"])
        try:
            with open(path, "rb") as file:
                file.seek(start)
                data = file.read(end - start)
        except OSError as error:
            raise ImageError(os_reason(error, path)) from None
        if len(data) < end - start:
            raise ImageError(f"truncated tar: {path.name} ends inside of this member")
        if data[:2] == b"\x1f\x8b":
            try:
                with gzip.open(io.BytesIO(data)) as stream:
                    data = stream.read(most_bytes() + 1)
            except (OSError, EOFError, zlib.error) as error:
                raise ImageError(f"damaged gzip inside of {path.name}: {error}") from None
        check_size(len(data))
        return data

    def dump_extra(self) -> None:
        """Walks the headers of all tars and writes the index files, each in one move."""
        tars = sorted(self.root.glob("*.tar"))
        if not tars:
            raise DinoError(f"no <class>.tar in {self.root}: ImageNet-22k is one tar per class")
        rows: list[tuple[int, str, int, int, str]] = []
        for index, path in enumerate(tars):
            try:
                with tarfile.open(path, "r:") as archive:
                    for member in archive:
                        if member.isreg():
                            start = member.offset_data - HEADER
                            rows.append((index, path.stem, start, member.offset_data + member.size, member.name))
            except (tarfile.TarError, OSError) as error:
                raise DinoError(f"{path} cannot be indexed: {error}") from None
        if not rows:
            raise DinoError(f"the tars in {self.root} hold no files")
        offset = "<u4" if max(row[3] for row in rows) < 2**32 else "<u8"
        widths = [max(map(len, column)) for column in ([r[1] for r in rows], [r[4] for r in rows])]
        entries = np.array(
            rows,
            [
                ("class_index", "<u4"),
                ("class_id", f"<U{widths[0]}"),
                ("start_offset", offset),
                ("end_offset", offset),
                ("filename", f"<U{widths[1]}"),
            ],
        )
        self.extra.mkdir(parents=True, exist_ok=True)
        _save(self.extra / "entries.npy", entries)
        _save(self.extra / "class-ids.npy", np.array([path.stem for path in tars]))
        self._entries = None


def _numbers(folder: Path, pattern: str) -> list[int]:
    """The numbers in the names of a folder's images, in the order of the names."""
    with os.scandir(folder) as found:
        matches = [re.fullmatch(pattern, name) for name in sorted(e.name for e in found)]
    return [int(m[1]) for m in matches if m]


def _classes(entries: np.ndarray, column: str) -> np.ndarray:
    """One value per class, in the order of the classes; empty where a class has no image."""
    numbers, firsts = np.unique(entries["class_index"], return_index=True)
    values = np.zeros(int(numbers[-1]) + 1, entries.dtype[column])
    values[numbers] = entries[column][firsts]
    return values


def _mapped(path: Path, fields: tuple[str, ...], command: str) -> np.ndarray:
    try:
        entries = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DinoError(f"the index {path} does not exist; write it once, in Python: {command}") from None
    except (OSError, ValueError) as error:
        raise DinoError(f"the index {path} cannot be read ({error}); write it again, in Python: {command}") from None
    missing = [f for f in fields if f not in (entries.dtype.names or ())]
    if missing:
        raise DinoError(f"the index {path} has no column {missing[0]}; write it again, in Python: {command}")
    return entries


def _save(path: Path, array: np.ndarray) -> None:
    with atomically(path) as temporary:
        np.save(temporary, array)


# ---- variants --------------------------------------------------------------------------------------------------------
# Test sets around ImageNet-1k that its linear classifiers are measured on (paper Tab. 7, 14, 15).
#
#     ImageNetV2:root=/data/imagenetv2-matched-frequency-format-val      <root>/<0 … 999>/*.jpeg
#     ImageNetReaL:root=/data/imagenet:labels=/data/real.json            ImageNet's VAL with sets of labels
#     ImageNetA:root=/data/imagenet-a   ImageNetR:root=/data/imagenet-r  <root>/<wnid>/*.jpg, 200 classes
#     ImageNetSketch:root=/data/sketch                                   <root>/<wnid>/*.JPEG, 1000 classes
#     ImageNetC:root=/data/imagenet-c                                    <root>[/<group>]/<corruption>/<1 … 5>/<wnid>/*.JPEG
#     ObjectNet:root=/data/objectnet-1.0                                 <root>/images/<folder>/*.png, <root>/mappings/*
#
# Classes are ImageNet-1k's numbers, the sorted WordNet ids. A set with some of them only counts its own: `get_targets` then
# numbers those, and `get_imagenet_class_mapping` gives the classifier's columns that mean each of them. `metric` is what a
# set is measured by by default. Any number of images is fine, so small copies of a layout work.


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
