"""Height of trees in metres, for every pixel of an aerial image (CHMv2).

The model wants RGB at about the resolution it was trained on (0.6 m a pixel), 8 bits, straight from above. A GeoTIFF in
gives a GeoTIFF out that lies on the same ground: the image's own tags are written to the result, pixel by pixel the
same grid. Pixels that the image declares empty (alpha 0, or its no-data value in every band) are not-a-number.

Left out: reading a raster in pieces. An image is in memory as a whole, twelve bytes a pixel and more.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torch import nn

from dinov3 import drawing
from dinov3.data.images import DecodedImage
from dinov3.predict.common import preprocessing_of, result_files, see, to_original
from dinov3.predict.depth import depther_of, metres

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
