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
import os
import re
import tarfile
import zlib
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dinov3.data.datasets.base import ImageDataset
from dinov3.data.images import check_size, most_bytes, os_reason, read_file
from dinov3.errors import DinoError, ImageError, one_of
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
