"""Cosine maps: where patches point the same way as one patch, a box, or a mask (paper §6.1, Fig. 3).

A query is a unit vector [D] from the features of one image; `cosine_map` compares it with any features of the same kind.
Boxes and pixels are in the original image's coordinates.

Legend: B images, h×w patch grid, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.dense.matching import coverage, unit_maps
from dinov3.errors import DinoError
from dinov3.features import Features


def at_pixel(features: Features, x: float, y: float, image: int = 0) -> Tensor:
    """The query of the patch that sees a pixel: a unit vector [D]. Raises `DinoError` outside the image."""
    row, column = features.patch_of_pixel(x, y, image)
    return F.normalize(features.patches[image, row, column].float(), dim=0)


def in_box(features: Features, box_xyxy: tuple[float, float, float, float], image: int = 0) -> Tensor:
    """The query of a box (x0, y0, x1, y1): the mean direction [D] of its patches, by the share that the box covers."""
    x0, y0, x1, y1 = box_xyxy
    geometry = features.geometry[image]
    if not (x0 < x1 and y0 < y1 and x1 > 0 and y1 > 0 and x0 < geometry.width and y0 < geometry.height):
        raise DinoError(
            f"the box ({x0:g}, {y0:g}, {x1:g}, {y1:g}) has no pixel of the image, which is "
            f"{geometry.width}×{geometry.height}; it is written x0, y0, x1, y1 with x0 < x1 and y0 < y1"
        )
    (h, w), (H, W) = features.grid_hw, geometry.input_hw
    (u0, v0), (u1, v1) = geometry.to_input(x0, y0), geometry.to_input(x1, y1)
    columns, rows = _overlap(u0 * w / W, u1 * w / W, w), _overlap(v0 * h / H, v1 * h / H, h)
    return weighted(features.patches[image], rows[:, None] * columns[None])


def in_mask(features: Features, mask: Tensor, image: int = 0) -> Tensor:
    """The query of a mask [H, W] over the original image (booleans or alpha): the mean direction [D] of its patches."""
    return weighted(features.patches[image], mask_on_grid(features, mask, image))


def weighted(patches: Tensor, weights: Tensor) -> Tensor:
    """The direction [D] of the weighted mean of a map's unit vectors [h, w, D]; weights [h, w]."""
    if not float(weights.sum()) > 0:
        raise DinoError("no patch is selected: the mask is empty, or lies where the input was cropped")
    unit = F.normalize(patches.float(), dim=-1)
    return F.normalize((unit * weights.to(unit)[..., None]).sum((0, 1)), dim=0)


def cosine_map(features: Features | Tensor, query: Tensor) -> Tensor:
    """Cosine [B, h, w] of every patch with a query [D]; with several queries [Q, D] the largest cosine of them."""
    x = unit_maps(features)
    if query.ndim not in (1, 2) or query.shape[-1] != x.shape[-1]:
        raise DinoError(f"these patches have the width {x.shape[-1]}, the query is {list(query.shape)}")
    cosines = x @ F.normalize(query.to(x), dim=-1).T if query.ndim == 2 else (x @ F.normalize(query.to(x), dim=0))
    return cosines.amax(-1) if query.ndim == 2 else cosines


def mask_on_grid(features: Features, mask: Tensor, image: int = 0) -> Tensor:
    """Share [h, w] of every patch that a mask [H, W] over the original image covers; padding counts as uncovered."""
    geometry = features.geometry[image]
    mask = torch.as_tensor(mask)
    if mask.shape != (geometry.height, geometry.width):
        raise DinoError(
            f"a mask of this image is {geometry.height}×{geometry.width} (height × width), not {list(mask.shape)}"
        )
    if geometry.lost:
        raise DinoError(f"a part of the image was cropped ({geometry}), so the mask has no place: use fit='resize'")
    (h, w), (H, W), (vh, vw) = features.grid_hw, geometry.input_hw, geometry.valid_hw
    if (vh, vw) == (H, W):
        return coverage(mask, (h, w))
    small = F.adaptive_avg_pool2d(mask[None, None].float(), (vh, vw))
    return coverage(F.pad(small, (0, W - vw, 0, H - vh))[0, 0], (h, w))


def _overlap(low: float, high: float, n: int) -> Tensor:
    """How much of each of the n cells [i, i + 1] lies between low and high, in [0, 1]."""
    cells = torch.arange(n, dtype=torch.float32)
    return ((cells + 1).clamp(max=high) - cells.clamp(min=low)).clamp(min=0)
