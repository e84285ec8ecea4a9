"""Patch maps as float32 or as unit vectors: the input of all dense methods.

Legend: B images, h×w patch grid, D width. Every method here takes `Features` or a plain map [h, w, D] / [B, h, w, D].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dinov3.errors import DinoError
from dinov3.features import Features


def maps(features: Features | Tensor) -> Tensor:
    """Patch maps [B, h, w, D] in float32; a single map [h, w, D] becomes a batch of one."""
    patches = features.patches if isinstance(features, Features) else features
    if patches.ndim == 3:
        patches = patches[None]
    if patches.ndim != 4:
        raise DinoError(f"expected Features or a map of patches [h, w, D] or [B, h, w, D], got {list(patches.shape)}")
    return patches.float()


def unit_maps(features: Features | Tensor) -> Tensor:
    """Patch maps [B, h, w, D] of unit vectors, so that a dot product is a cosine."""
    return F.normalize(maps(features), dim=-1)


def unit_map(features: Features | Tensor) -> Tensor:
    """The patch map [h, w, D] of one image, as unit vectors."""
    every = unit_maps(features)
    if len(every) != 1:
        raise DinoError(f"this takes the features of one image, got {len(every)}: pass features[i]")
    return every[0]
