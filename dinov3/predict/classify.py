"""Image classification with probabilities: a linear head on [CLS ; mean patch] (paper §6.1)."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from dinov3 import drawing
from dinov3.data import names as known_names
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.errors import DinoError
from dinov3.predict.common import names_of, result_files, see, statistics

SIZE = 224  # the centre crop; the short side is 256/224 of it


@dataclass(frozen=True)
class Classification:
    """probabilities [K] float32 that sum to 1; names of the K classes."""

    probabilities: np.ndarray
    names: tuple[str, ...]
    image: Image.Image

    FILE: ClassVar[str] = "classes"  # a table's name
    DRAWN: ClassVar[str] = "probabilities"  # a drawing's; NAME_classes.png is the mask of a segmentation
    COLUMNS: ClassVar[tuple[str, ...]] = ("rank", "class", "name", "probability")
    LISTED: ClassVar[int | None] = 100  # in a saved table

    def scores(self) -> np.ndarray:
        """[K]: what classes are ranked by."""
        return self.probabilities

    def best(self, top: int | None = 5) -> list[tuple[int, str, float]]:
        """(class number, name, probability), the likeliest first."""
        order = np.argsort(-self.scores(), kind="stable")[:top]
        return [(int(i), self.names[i], float(self.probabilities[i])) for i in order]

    def rows(self, top: int | None = None) -> list[tuple[Any, ...]]:
        """The likeliest classes as rows of a table with `COLUMNS`."""
        return [(rank, number, name, f"{p:.6g}") for rank, (number, name, p) in enumerate(self.best(top), 1)]

    def summary(self, top: int = 5) -> str:
        return ", ".join(f"{name} {p:.1%}" for _, name, p in self.best(top))

    def drawing(self) -> Image.Image:
        return drawing.shares_beside(self.image, [(name, p) for _, name, p in self.best()])

    def save(self, folder: str | os.PathLike[str], name: str = "image") -> list[Path]:
        """`NAME_classes.csv` (rank, class, name, probability; the likeliest 100) and `NAME_probabilities.png`."""
        data, seen = result_files(folder, name, f"{self.FILE}.csv", f"{self.DRAWN}.png")
        with data.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.COLUMNS, *self.rows(self.LISTED)])
        self.drawing().save(seen)
        return [data, seen]


def classification_preprocessing(model: nn.Module, size: int) -> Preprocessing:
    """Short side to 256/224 of the size (bicubic), centre crop: how the published accuracies are measured."""
    multiple = 32 if type(getattr(model, "backbone", None)).__name__ == "ConvNeXt" else 16
    size = max(multiple, round(size / multiple) * multiple)
    changes = {"size": round(size * 256 / 224), "center_crop": size, "multiple": multiple} | statistics(model)
    return Preprocessing.named("classification", **changes)


@torch.inference_mode()
def predict_classes(
    model: nn.Module, image: Any, *, size: int | None = None, names: Sequence[str] | None = None
) -> Classification:
    """size: the side of the square that the model sees, cut from the middle (default: as a head of your own was trained;
    else 224, as published). names: of the classes; default the model's own, ImageNet-1k's where there are 1000."""
    info = getattr(model, "head_info", None)
    preprocessing = (
        info.preprocessing if info is not None and size is None else classification_preprocessing(model, size or SIZE)
    )
    seen = see(model, image, preprocessing)
    logits = model(seen.x.to(next(model.parameters()).dtype))
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise DinoError(f"classification needs a classifier on a backbone, not a {type(model).__name__}")
    K = logits.shape[1]
    class_names = names_of(model, K, names, known_names.imagenet1k())
    return Classification(logits[0].float().softmax(-1).cpu().numpy(), class_names, seen.image)
