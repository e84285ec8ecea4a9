"""An image and its target, a map or boxes, changed together: training and evaluation of heads (paper App. D).

Segmentation follows mmsegmentation's recipe (`SegmentationTransform`): random scale, a crop that no class fills, flip,
colours, padding. Depth follows BTS's recipe for NYUv2 (`DepthTransform`): the inner frame, a small turn, flip, crop, colours.
Boxes: `DetectionTransform` (App. D.1).

What is drawn is a function of (seed, epoch, index): `transform(image, target, generator(seed, epoch, index))` gives the same
numbers in any worker and after any resume. Without a generator a transform does its deterministic part only. Images are uint8
until they are normalised; class maps stay integers, depth maps metres. Values that do not exist are 255 in a class map
and 0 in a depth map.

Legend: h×w of an image, "short" its shorter side in pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.config.bounds import check, setting
from dinov3.data.transforms.inputs import (
    LVD_MEAN,
    LVD_STD,
    Colours,
    coloured,
    resized,
    standardised,
    to_bytes,
    to_pixels,
)
from dinov3.errors import DinoError, one_of
from dinov3.metrics import IGNORED, reduce_zero_label, region_mask

Random = random.Random
MAX_SHARE = 0.75  # of the valid pixels of a crop that one class may cover …
REDRAWS = 10  # … or the crop is drawn again, so many times

# fixed crops: (left, top, right, bottom) of an image of this width and height, scaled to others
FIXED_CROPS: dict[str, tuple[int, int, int, int] | None] = {"FULL": None, "NYU": (43, 45, 608, 472)}
FIXED_CROP_OF = (640, 480)


def generator(seed: int, epoch: int, index: int) -> Random:
    """The one source of chance of an image's transforms."""
    return random.Random(f"dense {seed} {epoch} {index}")  # a text is hashed whole: similar keys give unrelated streams


# ---- sizes ---------------------------------------------------------------------------------------------------------


def short_side(size_hw: tuple[int, int], short: int, *, down: bool = False) -> tuple[int, int]:
    """(height, width) with that short side; the long one is rounded half up (480×640 at 512 → 512×683), or `down`, as
    torchvision does (682)."""
    h, w = size_hw
    long = short * max(h, w) // min(h, w) if down else int(short * (max(h, w) / min(h, w)) + 0.5)
    return (short, long) if h <= w else (long, short)


def tta_short(size: int, ratio: float) -> int:
    """The short side of one copy in test-time augmentation; below 1 it is rounded up to a multiple of 32, as published
    (896: 0.9 → 832, 0.95 → 864, 1 → 896, 1.05 → 940, 1.1 → 985)."""
    scaled = int(size * ratio)
    return -(-scaled // 32) * 32 if ratio < 1 else scaled


def resized_map(target: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """A class or depth map [h, w], nearest neighbour: no new values appear."""
    if tuple(target.shape) == tuple(size_hw):
        return target
    # float64 holds every class number and float32 depth exactly
    return F.interpolate(target[None, None].double(), size=size_hw, mode="nearest")[0, 0].to(target.dtype)


def fixed_box(name: str, size_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a named crop in an image of that size."""
    (h, w), box = size_hw, FIXED_CROPS[one_of("fixed_crop", name, FIXED_CROPS)]
    if box is None:
        return 0, 0, h, w
    x, y = w / FIXED_CROP_OF[0], h / FIXED_CROP_OF[1]
    return int(box[1] * y), int(box[0] * x), int(box[3] * y), int(box[2] * x)


# ---- single steps --------------------------------------------------------------------------------------------------


def varied_box(labels: Tensor, crop_hw: tuple[int, int], rng: Random) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a random crop in which no class covers three quarters of the valid pixels.

    Drawn again up to ten times until so and at least two classes are present; then the last one counts.
    """
    h, w = labels.shape
    ch, cw = min(crop_hw[0], h), min(crop_hw[1], w)
    for _ in range(1 + REDRAWS):
        top, left = int(rng.random() * (h - ch + 1)), int(rng.random() * (w - cw + 1))
        part = labels[top : top + ch, left : left + cw]
        counts = torch.bincount(part[part != IGNORED].flatten().long())
        counts = counts[counts > 0]
        if len(counts) > 1 and counts.max() < MAX_SHARE * counts.sum():
            break
    return top, left, top + ch, left + cw


def photometric(pixels: Tensor, rng: Random) -> Tensor:
    """Brightness, contrast, saturation and hue of a uint8 image, each with probability ½ (SSD's distortion).

    Brightness is a shift by U(−32, 32) levels; contrast (right after it, or last: a coin) a factor U(.5, 1.5) of the levels;
    saturation a factor U(.5, 1.5) of the distance from the pixel's grey; hue a turn by U(−.5, .5) of the circle.
    """

    def maybe(low: float, high: float) -> float | None:
        return low + (high - low) * rng.random() if rng.random() < 0.5 else None

    shift, contrast, early = maybe(-32, 32), maybe(0.5, 1.5), rng.random() < 0.5
    saturation, turn = maybe(0.5, 1.5), maybe(-0.5, 0.5)
    x = pixels.numpy().astype(np.float32, order="C")
    if shift is not None:
        np.floor(np.clip(x + np.float32(shift), 0, 255), out=x)
    if contrast is not None and early:
        coloured(x, Colours(("brightness",), brightness=contrast))
    if saturation is not None:
        coloured(x, Colours(("saturation",), saturation=saturation))
    if turn is not None:
        thirds = round(3 * turn)  # a third of the circle makes red green, green blue, blue red: exactly
        x = np.ascontiguousarray(np.roll(x, thirds, axis=0))
        coloured(x, Colours(("hue",), hue=turn - thirds / 3))
    if contrast is not None and not early:
        coloured(x, Colours(("brightness",), brightness=contrast))
    return torch.from_numpy(x.astype(np.uint8))


def turned(pixels: Tensor, depth: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """Both maps turned counter-clockwise about their centre, in their own frame: black and 0 come in at the corners. The
    image bilinearly, depth by its nearest neighbour."""
    h, w = depth.shape
    angle = math.radians(degrees)
    y = torch.arange(h, dtype=torch.float64) + 0.5 - h / 2
    x = torch.arange(w, dtype=torch.float64) + 0.5 - w / 2
    y, x = torch.meshgrid(y, x, indexing="ij")
    # where a pixel of the result comes from, in the frame of grid_sample (−1 … 1 over the sides)
    from_x = (math.cos(angle) * x - math.sin(angle) * y) * 2 / w
    from_y = (math.sin(angle) * x + math.cos(angle) * y) * 2 / h
    grid = torch.stack([from_x, from_y], dim=-1)[None].float()
    image = F.grid_sample(pixels[None].float(), grid, mode="bilinear", align_corners=False)[0]
    nearest = F.grid_sample(depth[None, None].float(), grid, mode="nearest", align_corners=False)[0, 0]
    return image.round().to(torch.uint8), nearest


def depth_colours(pixels: Tensor, rng: Random, brightness: tuple[float, float]) -> Tensor:
    """Gamma U(.9, 1.1), brightness, a factor U(.9, 1.1) for each channel, on values 0–255, clipped to them; float32.

    (A power of values 0–255 is also a strong brightness; the published recipe does it so.)
    """
    x = pixels.float() ** (0.9 + 0.2 * rng.random())
    x = x * (brightness[0] + (brightness[1] - brightness[0]) * rng.random())
    factors = torch.tensor([0.9 + 0.2 * rng.random() for _ in range(3)])
    return (x * factors[:, None, None]).clamp(0, 255)


# ---- the transforms -----------------------------------------------------------------------------------------------------

MEAN_255, STD_255 = tuple(255 * v for v in LVD_MEAN), tuple(255 * v for v in LVD_STD)


@dataclass(frozen=True)
class SegmentationTransform:
    """(image, class map) → (normalised float32 [3, h, w], class map [h, w]).

    With a generator: short side int(img_size·r), r uniform in ratio_range; zero reduction; `varied_box`; flip; colours;
    normalised; zeros and 255 at the bottom and right up to the crop. Without: short side img_size, zero reduction,
    normalised, and the class map keeps its own size. img_size None: the image's own size; crop_hw None: no crop.
    """

    img_size: int | None = None
    ratio_range: tuple[float, float] | None = None
    crop_hw: tuple[int, int] | None = None
    flip_prob: float = 0.0
    colours: bool = True
    reduce_zero_label: bool = False
    mean: tuple[float, ...] = MEAN_255
    std: tuple[float, ...] = STD_255

    def __call__(self, image: Any, target: np.ndarray | Tensor, rng: Random | None = None) -> tuple[Tensor, Tensor]:
        x, labels = to_pixels(image), torch.as_tensor(np.asarray(target))
        if rng is None:
            if self.img_size is not None:
                x = resized(x, short_side((x.shape[-2], x.shape[-1]), self.img_size))
            return standardised(x, self.mean, self.std), reduce_zero_label(labels) if self.reduce_zero_label else labels
        if self.img_size is not None:
            low, high = self.ratio_range or (1.0, 1.0)
            short = int(self.img_size * (low + (high - low) * rng.random()))
            size_hw = short_side((x.shape[-2], x.shape[-1]), short)
            x, labels = resized(x, size_hw), resized_map(labels, size_hw)
        if self.reduce_zero_label:
            labels = reduce_zero_label(labels)
        if self.crop_hw is not None:
            top, left, bottom, right = varied_box(labels, self.crop_hw, rng)
            x, labels = x[:, top:bottom, left:right], labels[top:bottom, left:right]
        if rng.random() < self.flip_prob:
            x, labels = x.flip(-1), labels.flip(-1)
        if self.colours:
            x = photometric(x.contiguous(), rng)
        x = standardised(x, self.mean, self.std)
        if self.crop_hw is not None:
            below, beside = self.crop_hw[0] - labels.shape[0], self.crop_hw[1] - labels.shape[1]
            x, labels = F.pad(x, (0, beside, 0, below)), F.pad(labels, (0, beside, 0, below), value=IGNORED)
        return x.contiguous(), labels.contiguous()


@dataclass(frozen=True)
class DepthTransform:
    """(image, depth in metres) → (normalised float32 [3, h, w], depth float32 [h, w]; 0 where it does not count).

    Always: depth outside the region is forgotten, the fixed crop is cut, short side img_size. With a generator: a turn
    within ±rotation_angle degrees (p ½), flip (p ½), a random crop, colours (p ½). Without: depth keeps the size that it
    has after the fixed crop, only the image is resized.
    """

    img_size: int | None = None
    fixed_crop: str = "FULL"
    region: str = "FULL"
    random_crop: tuple[int, int] | None = None
    rotation_angle: float = 0.0
    brightness_range: tuple[float, float] = (0.9, 1.1)
    mean: tuple[float, ...] = LVD_MEAN
    std: tuple[float, ...] = LVD_STD

    def __call__(self, image: Any, target: np.ndarray | Tensor, rng: Random | None = None) -> tuple[Tensor, Tensor]:
        x, depth = to_pixels(image), torch.as_tensor(np.asarray(target)).float()
        depth = torch.where(region_mask(self.region, (depth.shape[0], depth.shape[1])), depth, 0.0)
        top, left, bottom, right = fixed_box(self.fixed_crop, (depth.shape[0], depth.shape[1]))
        x, depth = x[:, top:bottom, left:right], depth[top:bottom, left:right]
        if self.img_size is not None:
            size_hw = short_side((x.shape[-2], x.shape[-1]), self.img_size, down=True)
            x = resized(x, size_hw)
            depth = depth if rng is None else resized_map(depth, size_hw)
        coloured_x: Tensor = x
        if rng is not None:
            if self.rotation_angle and rng.random() < 0.5:
                x, depth = turned(x, depth, self.rotation_angle * (2 * rng.random() - 1))
            if rng.random() < 0.5:
                x, depth = x.flip(-1), depth.flip(-1)
            if self.random_crop is not None:
                x, depth = self._cropped(x, depth, self.random_crop, rng)
            coloured_x = depth_colours(x, rng, self.brightness_range) if rng.random() < 0.5 else x
        mean, std = [255 * v for v in self.mean], [255 * v for v in self.std]
        return standardised(coloured_x, mean, std).contiguous(), depth.contiguous()

    def _cropped(self, x: Tensor, depth: Tensor, crop_hw: tuple[int, int], rng: Random) -> tuple[Tensor, Tensor]:
        (h, w), (ch, cw) = depth.shape, crop_hw
        if ch > h or cw > w:
            raise DinoError(f"random_crop {ch}×{cw} is larger than the image ({h}×{w} after the fixed crop and resize)")
        top, left = int(rng.random() * (h - ch + 1)), int(rng.random() * (w - cw + 1))
        return x[:, top : top + ch, left : left + cw], depth[top : top + ch, left : left + cw]


# ---- an image and its boxes -----------------------------------------------------------------------------------------


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
