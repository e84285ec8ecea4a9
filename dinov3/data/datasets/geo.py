"""GEO-Bench v1.0: satellite and aerial images, one HDF5 file each, with a class, several classes, or a class map.

    <root>/{classification_v1.0,segmentation_v1.0}/<task>/<sample>.hdf5, default_partition.json, band_stats.json

A sample holds an array per band ("04 - Red", perhaps with a date behind it) and, in a pickled attribute, its label; class
maps are an array "label". Only red, green and blue are read. The pickle names classes of the benchmark's own library:
they become empty objects here, nothing of it is imported or run.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.data.datasets.base import DataUnpickler
from dinov3.errors import DinoError, UnknownName, one_of, require

SPLITS = ("train", "valid", "test")
FOLDERS = ("classification_v1.0", "segmentation_v1.0")


@dataclass(frozen=True)
class Task:
    """What a task asks. kind: "classes" (one an image), "labels" (several), "map"."""

    kind: str
    n_classes: int


TASKS: dict[str, Task] = {
    "m-bigearthnet": Task("labels", 43),
    "m-brick-kiln": Task("classes", 2),
    "m-eurosat": Task("classes", 10),
    "m-forestnet": Task("classes", 12),
    "m-pv4ger": Task("classes", 2),
    "m-so2sat": Task("classes", 17),
    "m-cashew-plant": Task("map", 7),
    "m-chesapeake": Task("map", 7),
    "m-NeonTree": Task("map", 2),
    "m-nz-cattle": Task("map", 2),
    "m-pv4ger-seg": Task("map", 2),
    "m-SA-crop-type": Task("map", 10),
}


class _Inert:
    """Stands for any class a pickle names: takes whatever it is given and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self


class _InertUnpickler(DataUnpickler):
    def other(self, module: str, name: str) -> Any:
        return _Inert


def key_of(name: str) -> str:
    """Task and folder names are written with - or _, in any capitals."""
    return name.lower().replace("_", "-")


class GeoBench:
    """One split of one task: `data[i]` → (bands float32 [3, H, W], target), target an int, int64 [K], or int64 [H, W]."""

    def __init__(self, root: str | os.PathLike[str], task: str, split: str, *, partition: str = "default") -> None:
        known = {key_of(name): name for name in TASKS}
        one_of("GEO-Bench's task", key_of(task), known)
        one_of("split", split, SPLITS)
        self.task_name, self.split = known[key_of(task)], split
        self.task = TASKS[self.task_name]
        self.folder = self._folder(Path(root).expanduser(), key_of(task))
        file = self.folder / f"{partition}_partition.json"
        if not file.is_file():
            there = sorted(p.name.removesuffix("_partition.json") for p in self.folder.glob("*_partition.json"))
            raise UnknownName(
                f"{self.folder} has no partition {partition!r}; there: {', '.join(there) or 'none at all'}"
            )
        self.names: list[str] = list(json.loads(file.read_bytes())[split])
        if not self.names:
            raise DinoError(f"{file} has no samples for {split}")
        stats = self.folder / "band_stats.json"
        self.stats: dict[str, Any] = json.loads(stats.read_bytes()) if stats.is_file() else {}

    @staticmethod
    def _folder(root: Path, task: str) -> Path:
        for base in (root, *(root / name for name in FOLDERS)):
            if key_of(base.name) == task and base.is_dir():
                return base
            found = [p for p in base.iterdir() if p.is_dir() and key_of(p.name) == task] if base.is_dir() else []
            if found:
                return found[0]
        raise DinoError(f"there is no folder {task} in {root} (nor in its {' or '.join(FOLDERS)})")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return str(self.folder / f"{self.names[index]}.hdf5")

    def __getitem__(self, index: int) -> tuple[np.ndarray, Any]:
        h5py: Any = require("h5py", "geo", "reading GEO-Bench")
        path = self.name(index)
        try:
            with h5py.File(path, "r") as file:
                bands = np.stack([np.asarray(file[key], np.float32) for key in rgb_keys(list(file), path)])
                if self.task.kind == "map":
                    label: Any = np.asarray(file["label"]) if "label" in file else None
                else:
                    label = self._label(file.attrs["pickle"])
        except (OSError, KeyError) as error:
            raise DinoError(f"{path} is no GEO-Bench sample ({error})") from None
        return np.nan_to_num(bands), self._checked(label, path)

    @staticmethod
    def _label(text: Any) -> Any:
        """From the attribute: the text of a bytes literal that holds a pickle."""
        raw = ast.literal_eval(text) if isinstance(text, str) else bytes(text)
        content = _InertUnpickler(io.BytesIO(raw)).load()
        return content.get("label") if isinstance(content, dict) else None

    def _checked(self, label: Any, path: str) -> Any:
        kind, n = self.task.kind, self.task.n_classes
        shape = {"classes": 0, "labels": 1, "map": 2}[kind]
        target = np.asarray(label).squeeze() if label is not None and not isinstance(label, _Inert) else None
        if target is None or target.ndim != shape or (kind == "labels" and len(target) != n):
            what = {"classes": "a class number", "labels": f"{n} labels of 0 and 1", "map": "a map of classes"}[kind]
            raise DinoError(f"{path} has no label of {self.task_name}, which is {what}")
        if kind == "classes":
            if not 0 <= int(target) < n:
                raise DinoError(f"{path} is of class {int(target)}; {self.task_name} has {n}, from 0")
            return int(target)
        target = target.astype(np.int64)
        return np.where((target < 0) | (target >= n), 255, target) if kind == "map" else (target > 0).astype(np.int64)

    def band_stats(self) -> tuple[np.ndarray, np.ndarray]:
        """(means, standard deviations) [3] of red, green, blue over the training images."""
        if not self.stats:
            raise DinoError(f"{self.folder} has no band_stats.json; use scaling=eight_bit for 8-bit images")
        rows = [self.stats[key] for key in rgb_keys(list(self.stats), str(self.folder / "band_stats.json"))]
        return np.array([r["mean"] for r in rows], np.float32), np.array([r["std"] for r in rows], np.float32)


def rgb_keys(names: list[str], where: str) -> list[str]:
    """The names of the red, green and blue band; of several dates the first."""
    keys = []
    for colour in ("Red", "Green", "Blue"):
        found = sorted(n for n in names if re.fullmatch(rf"(?:\w+ - )?{colour}(?:_.*)?", n))
        if not found:
            raise DinoError(f"{where} has no {colour.lower()} band; it has {', '.join(sorted(names))}")
        keys.append(found[0])
    return keys
