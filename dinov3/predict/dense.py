"""Predictions for every pixel: classes (paper §6.2), depth in metres (§6.1.2, App. D), canopy height."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torch import Tensor, nn

from dinov3 import drawing
from dinov3.data import names as known_names
from dinov3.data.images import DecodedImage
from dinov3.errors import DinoError
from dinov3.heads.dpt import Depther
from dinov3.heads.encoder import class_maps, resized
from dinov3.predict.common import (
    best_class,
    chosen_preprocessing,
    colours_of,
    names_of,
    predicted_map,
    preprocessing_of,
    result_files,
    see,
    to_original,
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


# ---- depth -----------------------------------------------------------------------------------------------------------
# Metres from the camera, for every pixel of an image (paper §7; the SYNTHMIX head, or a depth head of your own).
#
# The published head's metres are right up to a scale and a shift per image: near and far are, absolute numbers need a
# measured distance or two.


SIZE = 768  # short side in pixels, as the published head was evaluated


@dataclass(frozen=True)
class DepthMap:
    """depth_m [H, W] float32, metres, in the original image's geometry."""

    depth_m: np.ndarray
    image: Image.Image

    def summary(self) -> str:
        return f"{self.depth_m.min():.2f} to {self.depth_m.max():.2f} m"

    def drawing(self) -> Image.Image:
        low, high = (float(v) for v in np.percentile(self.depth_m, (1, 99)))
        return drawing.side_by_side(self.image, drawing.heights_drawn(self.depth_m, low, high, "m"))

    def save(self, folder: str | os.PathLike[str], name: str = "image") -> list[Path]:
        """`NAME_depth.npy` (float32 metres) and `NAME_depth.png`."""
        data, seen = result_files(folder, name, "depth.npy", "depth.png")
        np.save(data, self.depth_m)
        self.drawing().save(seen)
        return [data, seen]


def depther_of(model: nn.Module, task: str = "depth") -> Depther:
    if not isinstance(model, Depther):
        raise DinoError(f"{task} needs a depth head on a backbone, not a {type(model).__name__}")
    return model


def metres(depther: Depther, x: Tensor, window: int | None, stride: int | None) -> Tensor:
    """Metres [1, 1, h, w] of an input [1, 3, h, w], at once or as the mean over windows."""
    return predicted_map(x, lambda part, size_hw: resized(depther.in_image(part), size_hw), 1, window, stride)


@torch.inference_mode()
def predict_depth(
    model: nn.Module,
    image: Any,
    *,
    size: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    flip: bool = False,
) -> DepthMap:
    """size: the short side at which the model sees the image (default: as a head of your own was trained; else 768).
    window, stride: sliding windows of so
    many pixels of that size, for images beyond what fits at once. flip: mean with the mirrored image's depth."""
    depther = depther_of(model)
    seen = see(depther, image, chosen_preprocessing(depther, size, SIZE))
    depth = metres(depther, seen.x, window, stride)
    if flip:
        depth = (depth + metres(depther, seen.x.flip(-1), window, stride).flip(-1)) / 2
    return DepthMap(to_original(depth, seen)[0, 0].float().cpu().numpy(), seen.image)


# ---- canopy height ---------------------------------------------------------------------------------------------------
# Height of trees in metres, for every pixel of an aerial image (CHMv2).
#
# The model wants RGB at about the resolution it was trained on (0.6 m a pixel), 8 bits, straight from above. A GeoTIFF in
# gives a GeoTIFF out that lies on the same ground: the image's own tags are written to the result, pixel by pixel the
# same grid. Pixels that the image declares empty (alpha 0, or its no-data value in every band) are not-a-number.
#
# Left out: reading a raster in pieces. An image is in memory as a whole, twelve bytes a pixel and more.


WINDOW = 1024  # pixels; larger images are seen through windows
# GeoTIFF's tags and their types: pixel scale, tie points, transformation, keys with their numbers and words
GEO_TAGS = {33550: 12, 33922: 12, 34264: 12, 34735: 3, 34736: 12, 34737: 2}
NO_DATA = 42113  # GDAL's


@dataclass(frozen=True)
class CanopyMap:
    """height_m [H, W] float32, metres above ground, in the original image's geometry; NaN where it has no data."""

    height_m: np.ndarray
    image: Image.Image
    geo: dict[int, Any] = field(default_factory=dict)  # GeoTIFF tags of the image; empty: it lies nowhere

    def summary(self) -> str:
        known = self.height_m[np.isfinite(self.height_m)]
        if not known.size:
            return "no data"
        return f"{known.mean():.1f} m in the mean, {known.max():.1f} m at most, {(known > 2).mean():.0%} above 2 m"

    def drawing(self) -> Image.Image:
        known = self.height_m[np.isfinite(self.height_m)]
        high = max(1.0, float(np.percentile(known, 99))) if known.size else 1.0
        return drawing.side_by_side(self.image, drawing.heights_drawn(self.height_m, 0.0, high, "m"))

    def save(self, folder: str | os.PathLike[str], name: str = "image") -> list[Path]:
        """`NAME_canopy.tif` (float32 metres, on the ground) where the image was a GeoTIFF, else `NAME_canopy.npy`;
        and `NAME_canopy.png`."""
        data, seen = result_files(folder, name, "canopy.npy", "canopy.png")
        if self.geo:
            data = data.with_suffix(".tif")
            write_geotiff(data, self.height_m, self.geo)
        else:
            np.save(data, self.height_m)
        self.drawing().save(seen)
        return [data, seen]


def write_geotiff(path: Path, values: np.ndarray, geo: dict[int, Any]) -> None:
    """[H, W] float32 as a deflated TIFF with an image's place on the ground; NaN is its no-data value."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in geo.items():
        tags.tagtype[tag] = GEO_TAGS[tag]
        tags[tag] = value
    tags.tagtype[NO_DATA] = 2
    tags[NO_DATA] = "nan"
    Image.fromarray(values.astype(np.float32)).save(path, compression="tiff_deflate", tiffinfo=tags)


def ground_of(source: Any) -> tuple[dict[int, Any], np.ndarray | None]:
    """(GeoTIFF tags, empty pixels [H, W] or None) of an image file's path or bytes; ({}, None) for anything else."""
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif not isinstance(source, (str, os.PathLike)):
        return {}, None
    try:
        with Image.open(source) as file:
            if file.format != "TIFF":
                return {}, None
            tags = file.tag_v2  # type: ignore[attr-defined]
            geo = {tag: tags[tag] for tag in GEO_TAGS if tag in tags}
            if not ({33550, 34264} & geo.keys()):
                return {}, None
            if tags.get(274, 1) != 1:  # a turned image's grid is no longer that of its tags
                return {}, None
            return geo, _empty(file, tags.get(NO_DATA))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return {}, None  # whatever is wrong with it, the image's own reader will say


def _empty(file: Image.Image, no_data: Any) -> np.ndarray | None:
    empty = None
    if file.mode in ("RGBA", "LA"):
        empty = np.asarray(file.getchannel("A")) == 0
    if no_data is not None and file.mode in ("RGB", "L"):
        try:
            value = float(str(no_data).strip("\0 "))
        except ValueError:
            return empty
        pixels = np.asarray(file)
        empty = pixels == value if pixels.ndim == 2 else (pixels == value).all(-1)
    return empty if empty is not None and empty.any() else None


@torch.inference_mode()
def predict_canopy(
    model: nn.Module,
    image: Any,
    *,
    size: int | None = None,
    window: int | None = WINDOW,
    stride: int | None = None,
    file: bytes | None = None,
) -> CanopyMap:
    """size: a short side to resize to; None, the default, keeps the image's resolution, which is what heights depend
    on. window, stride: of sliding windows for images larger than a window. file: the bytes of an already opened
    `DecodedImage`, where its place on the ground is read from."""
    depther = depther_of(model, "canopy height")
    geo, empty = ground_of(file if isinstance(image, DecodedImage) else image)
    seen = see(depther, image, preprocessing_of(depther, size))
    height = to_original(metres(depther, seen.x, window, stride), seen)[0, 0].float().cpu().numpy()
    if empty is not None and empty.shape == height.shape:
        height = np.where(empty, np.float32("nan"), height)
    return CanopyMap(height, seen.image, geo)
