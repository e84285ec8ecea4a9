"""Boxes: three ways to write them and how they are compared. Pure functions, any leading shape, last dimension 4.

"xyxy": left, top, right, bottom. "cxcywh": centre, width, height. Deltas: a box as seen from another one, free of
scale: (Δcx/w, Δcy/h, ln w'/w, ln h'/h). Frames as in `dinov3.data.transforms.inputs`: x to the right, y down, in pixels.

Everything is computed in float32 or wider: at 2,000 pixels bfloat16 rounds to 8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST_LOG_RATIO = abs(math.log(16 / 1000))  # one refinement changes a side by a factor of 62.5 at most
EPS = 1e-7


def to_xyxy(boxes: Tensor) -> Tensor:
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def to_cxcywh(boxes: Tensor) -> Tensor:
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def clip_xyxy(boxes: Tensor, size_hw: Tensor) -> Tensor:
    """Corners moved into the image. size_hw: [..., 2], broadcast against the boxes' leading shape."""
    limit = size_hw.flip(-1).to(boxes)  # (W, H)
    return torch.minimum(boxes.clamp_min(0), torch.cat([limit, limit], dim=-1))


def refine(boxes: Tensor, deltas: Tensor, size_hw: Tensor) -> Tensor:
    """Boxes (cxcywh) moved by deltas and clipped to an image of size_hw [..., 2]; cxcywh again.

    (50, 40, 20, 10) by (½, −1, ln 2, 10) in an image of 96×64 is (40, 0)–(80, 64), as corners.
    """
    deltas = deltas.to(boxes.dtype)
    centre = boxes[..., :2] + boxes[..., 2:] * deltas[..., :2]
    size = boxes[..., 2:] * deltas[..., 2:].clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    return to_cxcywh(clip_xyxy(to_xyxy(torch.cat([centre, size], dim=-1)), size_hw))


def deltas_between(boxes: Tensor, targets: Tensor) -> Tensor:
    """The deltas that take `boxes` to `targets` (both cxcywh, broadcast), within what one refinement can do."""
    size = boxes[..., 2:].clamp_min(EPS)
    shift = (targets[..., :2] - boxes[..., :2]) / size
    ratio = (targets[..., 2:].clamp_min(EPS) / size).log()
    return torch.cat([shift, ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)], dim=-1)
