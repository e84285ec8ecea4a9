"""Data sets by a line of text, `Name:key=value:key=value…`, as configurations and commands write them.

    ImageNet:split=TRAIN:root=/data/imagenet:extra=/data/imagenet-index
    ImageNet22k:root=/data/imagenet22k:extra=/data/imagenet22k-index
    Folder:root=/data/photos            or simply /data/photos: folder, list file, tar shards, Parquet, glob
    /data/web:0.9+ImageNet:split=TRAIN:root=/data/imagenet:0.1          for training: every tenth batch from ImageNet alone

A value may hold ":" and "=" (C:\\images, a=b/c): it ends only where ":key=" of a key follows. A data set offers

    len(data), data[i] → (PIL image, target), data.read(i) → encoded bytes, data.name(i), data.label(i)

Adding one: a class whose arguments are the keys in a file here, and one row in `KNOWN`.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from dinov3.errors import DinoError, did_you_mean, one_of, only_known

if TYPE_CHECKING:
    from dinov3.data.datasets.base import Folder, ImageDataset
    from dinov3.data.datasets.imagenet import ImageNet, ImageNet22k

__all__ = ["KNOWN", "Folder", "ImageNet", "ImageNet22k", "make_dataset", "parse_dataset"]

# name → (module below this package, how a spec of it is written: what stands in brackets may be left out)
KNOWN: dict[str, tuple[str, str]] = {
    "ImageNet": ("imagenet", "split=TRAIN:root=…[:extra=…]"),
    "ImageNet22k": ("imagenet", "root=…:extra=…"),
    "ImageNetV2": ("imagenet", "root=…"),
    "ImageNetReaL": ("imagenet", "root=…:labels=real.json[:extra=…]"),
    "ImageNetA": ("imagenet", "root=…"),
    "ImageNetR": ("imagenet", "root=…"),
    "ImageNetSketch": ("imagenet", "root=…"),
    "ImageNetC": ("imagenet", "root=…"),
    "ObjectNet": ("imagenet", "root=…"),
    "Folder": ("base", "root=…[:column=…]"),
    "FolderSplit": ("base", "root=…:split=train[:train_per_class=30:test_per_class=50:exclude=…:column=…]"),
    "CocoCaptions": ("captions", "root=…[:split=TRAIN]"),
    "Captions": ("captions", "root=…[:captions=…]"),
    "ADE20K": ("dense", "root=…:split=TRAIN|VAL"),
    "NYU": ("dense", "root=…:split=TRAIN|VAL|TEST"),
    "DepthList": ("dense", "root=…:list=…[:unit=1000]"),
    "VOC2012": ("dense", "root=…:split=TRAIN|VAL|TRAINVAL"),
    "Cityscapes": ("dense", "root=…:split=TRAIN|VAL"),
    "DenseFolder": ("dense", "root=…[:split=…:targets=…:kind=…:unit=…:select=…:ignore=…:classes=…]"),
    "CocoDetection": ("detection", "root=…[:split=val2017:annotations=…]"),
    "VocDetection": ("detection", "root=…[:split=…]"),
}


WEIGHT = r"\d*\.?\d+"


def __getattr__(name: str) -> Any:
    if name in KNOWN:
        return getattr(importlib.import_module(f"{__name__}.{KNOWN[name][0]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def make_dataset(
    text: str, *, transform: Callable[[Any], Any] | None = None, target_transform: Callable[[Any], Any] | None = None
) -> ImageDataset:
    """The data set that a line of text names. Raises `DinoError` with a sentence for every mistake in it."""
    if re.fullmatch(rf"(?:.+?:{WEIGHT}\+)+.+?:{WEIGHT}", text):
        return _mixture(re.findall(rf"(.+?):({WEIGHT})(?:\+|$)", text))
    name, options = parse_dataset(text)
    module = importlib.import_module(f"{__name__}.{KNOWN[name][0]}")
    dataset: ImageDataset = getattr(module, name).from_options(**options)
    dataset.transform, dataset.target_transform = transform, target_transform
    return dataset


def _mixture(parts: list[tuple[str, str]]) -> ImageDataset:
    from dinov3.data.datasets.base import Mixture

    for spec, weight in parts:
        if not float(weight):
            raise DinoError(f"the weight of {spec} in a mixture is 0: leave it out, or give it a share above 0")
    return Mixture([make_dataset(spec) for spec, _ in parts], [Fraction(weight) for _, weight in parts])


def parse_dataset(text: str) -> tuple[str, dict[str, str]]:
    """(name, options) of a dataset spec; a plain path is a `Folder`."""
    name, colon, rest = text.partition(":")
    if name not in KNOWN:
        looks_like_path = os.sep in text or "/" in text.split(":")[0] or os.path.exists(os.path.expanduser(text))
        if looks_like_path and not re.match(r"\w+:\w+=", text):
            return "Folder", {"root": text}
        if not colon:
            near = did_you_mean(text, [*KNOWN, *os.listdir()])
            raise DinoError(f"there is no folder, list, tar or table {text!r}, and no data set of that name{near}")
        one_of("the data set", name, KNOWN)
    form = KNOWN[name][1]
    keys, example = re.findall(r"(\w+)=", form), f"{name}:{form}"
    options: dict[str, str] = {}
    for part in re.split(r":(?=[A-Za-z_]+=)", rest) if colon else []:
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise DinoError(f"{part!r} in {text!r} is no key=value; write {example}")
        only_known(f"{name} has no key", [key], keys)
        if key in options:
            raise DinoError(f"{key} is given twice in {text!r}")
        options[key] = value
    for key in re.findall(r"(\w+)=", form.partition("[")[0]):
        if key not in options:
            raise DinoError(f"{name} needs {key}=…: write {example}")
    return name, options
