"""Metres from the camera, for every pixel of an image (paper §7; the SYNTHMIX head, or a depth head of your own).

The published head's metres are right up to a scale and a shift per image: near and far are, absolute numbers need a
measured distance or two.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov3 import drawing
from dinov3.errors import DinoError
from dinov3.heads.dpt import Depther
from dinov3.heads.encoder import resized
from dinov3.predict.common import chosen_preprocessing, predicted_map, result_files, see, to_original

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
