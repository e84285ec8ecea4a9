"""An image and its boxes, changed together: training and evaluation of detectors (paper App. D.1).

What is drawn is a function of (seed, epoch, index), as for dense targets: `rule(image, target, generator(…))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov3.config.bounds import check, setting
from dinov3.data.transforms.dense import MEAN_255, STD_255, Random, generator
from dinov3.data.transforms.pixels import resized, standardised, to_bytes

__all__ = ["DetectionTransform", "generator"]

Target = dict[str, Tensor]


@dataclass(frozen=True)
class DetectionTransform:
    """(image, target) → (normalised float32 [3, h, w], target in its pixels); targets as `data.datasets.detection`.

    Without a generator: the short side becomes `short`, the aspect stays. With one: a flip; then, by a coin, either a
    short side drawn from `short_range` or first a crop of `crop_share` of the area. Crowds are left out, boxes are cut to
    the crop, and those of which less than a pixel is left go. Both sides are rounded up to `multiple`, so that no
    pixel gets lost; `long_at_most` bounds the long side of very elongated images (None: nothing does).
    """

    short: int = setting(2048, at_least=1)
    short_range: tuple[int, int] = setting((1228, 2048), at_least=1, rising=True)
    crop_share: tuple[float, float] = setting((0.6, 1.0), above=0, at_most=1, rising=True)
    flip_prob: float = 0.5
    crop_prob: float = 0.5
    multiple: int = setting(16, at_least=1)
    long_at_most: int | None = None
    mean: tuple[float, ...] = MEAN_255
    std: tuple[float, ...] = STD_255

    def __post_init__(self) -> None:
        check(self, "transform")

    def size_hw(self, size_hw: tuple[int, int], short: int | None = None) -> tuple[int, int]:
        """The input's size for an image of that size."""
        h, w = size_hw
        factor = (short or self.short) / min(h, w)
        if self.long_at_most is not None:
            factor = min(factor, self.long_at_most / max(h, w))
        height, width = (max(1, -(-round(side * factor) // self.multiple)) * self.multiple for side in (h, w))
        return height, width

    def image(self, image: Any) -> tuple[Tensor, tuple[int, int]]:
        """(the input, the image's own height and width): for detection, where no target is."""
        x = to_bytes(image)
        original = (x.shape[-2], x.shape[-1])
        return standardised(resized(x, self.size_hw(original)), self.mean, self.std).contiguous(), original

    def __call__(self, image: Any, target: Target, rng: Random | None = None) -> tuple[Tensor, Target]:
        if rng is None:
            x, original = self.image(image)
            return x, scaled(target, original, (x.shape[-2], x.shape[-1]))
        x = to_bytes(image)
        target = chosen(target, ~target["crowd"]) if "crowd" in target else dict(target)
        if rng.random() < self.flip_prob:
            x, target = x.flip(-1), flipped(target, x.shape[-1])
        if rng.random() < self.crop_prob:
            top, left, bottom, right = self.crop_box((x.shape[-2], x.shape[-1]), rng)
            x, target = x[:, top:bottom, left:right], cropped(target, (top, left, bottom, right))
        low, high = self.short_range
        before = (x.shape[-2], x.shape[-1])
        after = self.size_hw(before, rng.randint(low, high))
        x = standardised(resized(x, after), self.mean, self.std)
        return x.contiguous(), scaled(target, before, after)

    def crop_box(self, size_hw: tuple[int, int], rng: Random) -> tuple[int, int, int, int]:
        """(top, left, bottom, right): a share of the area, its sides shared out by chance, nowhere beyond the image."""
        low, high = self.crop_share
        share = low + (high - low) * rng.random()
        of_height = share ** rng.random()  # from the full width (share) to the full height (1)
        h, w = max(1, round(size_hw[0] * of_height)), max(1, round(size_hw[1] * share / of_height))
        top, left = rng.randint(0, size_hw[0] - h), rng.randint(0, size_hw[1] - w)
        return top, left, top + h, left + w


def chosen(target: Target, rows: Tensor) -> Target:
    """The boxes that `rows` (boolean or indices) names."""
    return {name: value[rows] for name, value in target.items()}


def scaled(target: Target, before_hw: Sequence[int], after_hw: Sequence[int]) -> Target:
    """Boxes of an image that was resized."""
    y, x = after_hw[0] / before_hw[0], after_hw[1] / before_hw[1]
    result = target | {"boxes_xyxy_px": target["boxes_xyxy_px"] * torch.tensor([x, y, x, y])}
    if "area_px2" in target:
        result["area_px2"] = target["area_px2"] * (x * y)
    return result


def flipped(target: Target, width: int) -> Target:
    """Boxes of an image that was mirrored left to right."""
    x1, y1, x2, y2 = target["boxes_xyxy_px"].unbind(-1)
    return target | {"boxes_xyxy_px": torch.stack([width - x2, y1, width - x1, y2], dim=-1)}


def cropped(target: Target, box: tuple[int, int, int, int]) -> Target:
    """Boxes of an image of which only (top, left, bottom, right) is left."""
    top, left, bottom, right = box
    before = target["boxes_xyxy_px"]
    after = before - torch.tensor([left, top, left, top], dtype=before.dtype)
    after = after.clamp_min(0).minimum(torch.tensor([right - left, bottom - top] * 2, dtype=before.dtype))
    sides, whole = after[:, 2:] - after[:, :2], before[:, 2:] - before[:, :2]
    result = target | {"boxes_xyxy_px": after}
    if "area_px2" in target:
        result["area_px2"] = target["area_px2"] * (sides.prod(-1) / whole.prod(-1))
    return chosen(result, (sides >= 1).all(-1))
