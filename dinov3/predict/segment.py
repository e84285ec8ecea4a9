"""The class of every pixel (paper §6.2): a linear head of your own, or the published Mask2Former head on the 7B."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov3 import drawing
from dinov3.data import names as known_names
from dinov3.errors import DinoError
from dinov3.heads.windows import class_maps
from dinov3.predict.common import (
    best_class,
    chosen_preprocessing,
    colours_of,
    names_of,
    predicted_map,
    result_files,
    see,
)

SIZES = {"linear": 512, "m2f": 896}  # short side and windows of the published protocols; every 2/3 of a window


@dataclass(frozen=True)
class Segmentation:
    """classes [H, W] uint8 (uint16 beyond 256 classes), numbers into `names`; probability [H, W] float32 of that class;
    both in the original image's geometry."""

    classes: np.ndarray
    probability: np.ndarray
    names: tuple[str, ...]
    colours: np.ndarray  # [K, 3] uint8
    image: Image.Image

    def shares(self) -> dict[str, float]:
        """Share of the image's area of every class that occurs, the largest first."""
        numbers, counts = np.unique(self.classes, return_counts=True)
        return {
            self.names[numbers[i]]: float(counts[i] / self.classes.size) for i in np.argsort(-counts, kind="stable")
        }

    def summary(self, most: int = 5) -> str:
        return ", ".join(f"{name} {share:.1%}" for name, share in list(self.shares().items())[:most])

    def drawing(self) -> Image.Image:
        return drawing.classes_over(self.image, self.classes, self.names, self.colours)

    def save(self, folder: str | os.PathLike[str], name: str = "image") -> list[Path]:
        """`NAME_classes.png` (pixel values are class numbers; with a palette up to 256 classes, 16 bits beyond),
        `NAME_classes.json` (what the numbers mean, areas) and `NAME_segments.png`."""
        mask, words, seen = result_files(folder, name, "classes.png", "classes.json", "segments.png")
        if len(self.names) <= 256:
            indexed = Image.fromarray(self.classes.astype(np.uint8))
            indexed.putpalette(self.colours.flatten().tolist())
            indexed.save(mask)
        else:
            Image.fromarray(self.classes.astype(np.uint16)).save(mask)
        facts = {"classes": dict(enumerate(self.names)), "shares": self.shares()}
        words.write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")
        self.drawing().save(seen)
        return [mask, words, seen]


def decoder_type(model: Any) -> str:
    """What a segmentation model's predictions are: "linear" class logits, or "m2f" queries."""
    parts = getattr(model, "segmentation_model", None)
    if parts is None:
        raise DinoError(f"segmentation needs a segmentation head on a backbone, not a {type(model).__name__}")
    return "m2f" if hasattr(parts[1], "predictor") else "linear"


def n_classes_of(model: Any, kind: str) -> int:
    """How many classes a segmentation model tells apart."""
    head = model.segmentation_model[1]
    if kind == "linear":
        return int(head.get_submodule(head.conv_key).out_channels)
    return int(head.predictor.class_embed.out_features) - 1  # the last is no class


@torch.inference_mode()
def predict_segments(
    model: nn.Module,
    image: Any,
    *,
    size: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    whole: bool = False,
    names: Sequence[str] | None = None,
) -> Segmentation:
    """size: the short side at which the model sees the image (default: as a head of your own was trained; else 512 for
    linear heads, 896 for Mask2Former). window, stride: sliding windows (default: the short side and 2/3 of it, as both
    published protocols have it). whole: no windows; the model sees all at once, which costs memory but has no seams.
    names: of the classes, where the model has none (150 are taken for ADE20K's)."""
    kind = decoder_type(model)
    n = n_classes_of(model, kind)
    class_names = names_of(model, n, names, known_names.ade20k())
    preprocessing = chosen_preprocessing(model, size, SIZES[kind])
    if window is None and not whole and preprocessing.shape == "short":
        window = preprocessing.size
    seen = see(model, image, preprocessing)
    segmentor: Any = model

    def maps_of(x: Tensor, size_hw: tuple[int, int]) -> Tensor:
        return class_maps(segmentor.predict(x, rescale_to=size_hw), kind)

    maps = predicted_map(seen.x, maps_of, n, window, stride)
    classes, probability = best_class(maps, seen, softmax if kind == "linear" else shares_of)
    return Segmentation(classes, probability, class_names, colours_of(model, n), seen.image)


def softmax(maps: Tensor) -> Tensor:
    return maps.softmax(1)


def shares_of(maps: Tensor) -> Tensor:
    """A Mask2Former's class maps are sums of probabilities, which need not be 1 together."""
    return maps / maps.sum(1, keepdim=True).clamp_min(1e-12)
