"""The crops of a training image, with their augmentation, and the block masks over their patches (paper §3.1, §4.2)."""

from __future__ import annotations

import math
import random
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dinov3.data.transforms.inputs import (
    BLUR_RADIUS,
    LVD_MEAN,
    LVD_STD,
    Colours,
    Pixels,
    blurred,
    coloured,
    cropped,
    normalised,
    resized,
    scratch,
    to_pixels,
)
from dinov3.errors import DinoError, one_of

# ---- masks -----------------------------------------------------------------------------------------------------------
# Which patches of the global crops the student does not see: block masks for the iBOT loss.
#
# Paper: section 3.1, iBOT's masking as in DINOv2 (BEiT's blocks). Half of a batch's global crops are masked; the shares
# of masked patches cover [0.1, 0.5] evenly within each batch, so that every batch costs the same. Each mask is made of
# rectangles until its exact count is reached, and of single patches where no rectangle fits any more.
#
# The generator is handed in: anything with `random.Random`'s uniform, randint, sample and shuffle. `batch_masks` draws
# all from it and keeps no state, so a batch's masks are a function of the seed.
#
# One number differs from the reference: the largest block is half of the grid. The reference computes it as (0.5·g //
# patch)·g // patch from left to right, which is the same on even grids (98 at 224/16, 128 at 256/16) and smaller on odd
# ones (21 instead of 24 at 112/16); `reference_max_block` gives that number to those who need it.
#
# Legend: B images, so 2B global crops; P = rows × columns patches of a crop.


MIN_BLOCK = 4  # patches
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
ATTEMPTS = 10


class MaskRandom(Protocol):
    """What masks need of a generator; `random.Random` has it."""

    def uniform(self, a: float, b: float) -> float: ...

    def randint(self, a: int, b: int) -> int: ...

    def sample(self, population: Sequence[int], k: int) -> Sequence[int]: ...

    def shuffle(self, x: MutableSequence[Any]) -> None: ...


@dataclass(frozen=True)
class MaskConfig:
    """`probability`: share of global crops that are masked. `ratio`: range of the share of their patches."""

    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    scale: float = 1.0  # above 1 the grid is coarser (`teacher_to_student_resolution_scale`)
    circular_shift: bool = False  # roll each mask around both axes, so that borders are masked as often as the middle

    def __post_init__(self) -> None:
        low, high = self.ratio
        if not 0 <= low <= high <= 1:
            raise DinoError(f"the ratio of masked patches is a range within 0 … 1, not {low} … {high}")
        if not 0 <= self.probability <= 1:
            raise DinoError(f"the probability of masking a crop is a number within 0 … 1, not {self.probability}")


@dataclass(frozen=True)
class Masks:
    """The masks of one batch, and what the losses need of them."""

    masks: Tensor  # bool [2B, P]
    indices: Tensor  # int64 [n_masked], positions of true entries in the flattened masks
    weight: Tensor  # float32 [n_masked], 1 / (masked patches of the same crop)


def mask_grid(global_size: int, patch: int, scale: float = 1.0) -> tuple[int, int]:
    """(rows, columns) of patches; raises for sizes whose border would silently be dropped."""
    step = patch * scale
    if global_size % step:
        nearest = max(1, round(global_size / step)) * step
        raise DinoError(f"a global crop of {global_size} px is no multiple of the patch size {step:g}; try {nearest:g}")
    side = round(global_size / step)
    return side, side


def reference_max_block(global_size: int, patch: int) -> float:
    """The largest block of the released code, for a bit-exact comparison on odd grids."""
    return 0.5 * global_size // patch * global_size // patch


def block_mask(count: int, grid: tuple[int, int], rng: MaskRandom, *, max_block: float | None = None) -> np.ndarray:
    """bool [rows, columns] with exactly `count` true patches.

    Until `count` are masked: up to ten rectangles are tried, area uniform between 4 patches and what is still missing (at
    most `max_block`; by default half of the grid), log-aspect uniform; the first that fits and adds between 1 and that many
    patches is taken. When ten fail, the missing patches are drawn one by one.
    """
    rows, columns = grid
    if not 0 <= count <= rows * columns:
        raise DinoError(f"{count} patches cannot be masked on a grid of {rows} × {columns}")
    largest = rows * columns / 2 if max_block is None else max_block
    mask = np.zeros(grid, bool)
    done = 0
    while done < count:
        added = _add_block(mask, min(count - done, largest), rng)
        if added == 0:
            break
        done += added
    missing = rng.sample(np.flatnonzero(~mask).tolist(), count - done)  # also for none: the reference draws then too
    mask.reshape(-1)[list(missing)] = True
    return mask


def _add_block(mask: np.ndarray, budget: float, rng: MaskRandom) -> int:
    """Adds one rectangle in place; returns how many patches it added, 0 if none was accepted."""
    rows, columns = mask.shape
    for _ in range(ATTEMPTS):
        area = rng.uniform(MIN_BLOCK, budget)  # bounds in the wrong order are meant: the last block is often small
        aspect = math.exp(rng.uniform(*LOG_ASPECT))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (w < columns and h < rows):
            continue
        top, left = rng.randint(0, rows - h), rng.randint(0, columns - w)
        block = mask[top : top + h, left : left + w]
        fresh = h * w - int(block.sum())
        if 0 < fresh <= budget:
            block[:] = True
            return fresh
    return 0


def masked_counts(crops: int, patches: int, configs: MaskConfig) -> list[int]:
    """How many patches each masked crop loses: an even ladder over `rules.ratio`, the same in every batch."""
    masked = int(crops * configs.probability)
    low, high = configs.ratio
    return [int(patches * q) for q in np.linspace(low, high, masked + 1)[1:].tolist()]


def batch_masks(
    crops: int, grid: tuple[int, int], configs: MaskConfig, rng: MaskRandom, *, max_block: float | None = None
) -> Masks:
    """Masks for a batch of `crops` global crops (2B), which of them are masked left to chance, not to the image."""
    rows, columns = grid
    masks = []
    for count in masked_counts(crops, rows * columns, configs):
        mask = block_mask(count, grid, rng, max_block=max_block)
        if configs.circular_shift and count:
            mask = np.roll(mask, (rng.randint(0, rows - 1), rng.randint(0, columns - 1)), (0, 1))
        masks.append(mask)
    masks += [np.zeros(grid, bool)] * (crops - len(masks))
    rng.shuffle(masks)
    return summary(
        torch.from_numpy(np.stack(masks).reshape(crops, -1)) if masks else torch.zeros(0, rows * columns) > 0
    )


def summary(masks: Tensor) -> Masks:
    """bool [2B, P] → indices and weights."""
    weight = 1 / masks.sum(-1, keepdim=True).clamp(min=1).float()
    return Masks(masks, masks.flatten().nonzero().flatten(), weight.expand_as(masks)[masks])


# ---- crops -----------------------------------------------------------------------------------------------------------
# One image to the crops of one training step: large global crops, small local crops, crops for the Gram teacher.
#
# Paper: section 3.1 (multi-crop as in DINO and DINOv2) and 4.2 (Gram crops, of a higher resolution). The distribution
# is the released training code's; the semantics of each operation are those of torchvision on 8-bit images, which that
# code uses.
#
# A crop is first a plain value and then pixels: `CropConfig.plan` draws where and how (`Plan`), `render` does it. The
# draw is a pure function of (seed, epoch, index), so the same image gives the same crops in any worker, after any
# resume. Only uniform doubles are drawn, whose sequence Python guarantees for a seed, so that crops stay the same
# across versions.
#
# Why it is fast (4.7 ms against torchvision's 25 ms, for 2 × 224 and 8 × 96 pixels of a decoded 500 × 375 image,
# measured by `benchmarks/crops.py` on one core of a busy machine): the crop is cut before it is resized; torch resizes
# uint8 in integers; colours are float32 planes that numpy walks through with vector instructions; hue is turned without
# going through HSV (`transforms.inputs`); the blur is separable. Brightness, contrast and saturation are not folded
# into one matrix although each is affine: what one clips, the next cannot bring back, and the folded map differs by
# more than 3 levels in 4 % of the pixels, in one crop of ten in 14 % (four photographs), which is another augmentation.
#
# Crops stay uint8 (a quarter of the bytes between processes and to the device) until `CropBatch.to` normalises them.
#
# Blur: the released code applies the complement of the probabilities it names (1.0, 0.1, 0.5 become 0.0, 0.9, 0.5)
# because the library's argument means "keep". The released models were trained that way, so "applied" is the default;
# "paper" is what the DINOv2 papers describe.
#
# Legend: g, l, q sides of global, local and Gram crops; B images; n_l local crops an image; P patches of a global crop.


if TYPE_CHECKING:
    from PIL import Image

    from dinov3.data.crops import Masks

ASPECT = (3 / 4, 4 / 3)
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
MOST_JITTER = 2.5  # brightness and contrast may reach 0
JITTER_P, GREY_P, SOLARISE_P = 0.8, 0.2, 0.2
BLUR_SIGMA = (0.1, 2.0)  # made for 224 px
# of global crop 1, of global crop 2, of local crops
BLUR_P = {"applied": (0.0, 0.9, 0.5), "paper": (1.0, 0.1, 0.5)}


# ---------------------------------------------------------------------------------------------------------------------
# What to do: values


@dataclass(frozen=True)
class Crop:
    """A box of the image (pixels), and what happens to it after it was resized."""

    top: int = 0
    left: int = 0
    height: int = 0
    width: int = 0
    flip: bool = False
    colours: Colours = field(default_factory=Colours)
    sigma: float | None = None  # of the blur, in pixels of the crop
    solarise: bool = False


@dataclass(frozen=True)
class Plan:
    """All crops of one image. `windows`: (top, left) in the global crops, where local crops are cut out of them."""

    globals_: tuple[Crop, ...]
    locals_: tuple[Crop, ...]
    shared: Colours | None = None
    windows: tuple[tuple[int, int], ...] | None = None


class Uniform(Protocol):
    """What the draw needs of a generator: doubles in [0, 1)."""

    def random(self) -> float: ...


def generator(seed: int, epoch: int, index: int) -> random.Random:
    """The one source of chance of an image's crops."""
    return random.Random(f"crops {seed} {epoch} {index}")  # a text is hashed whole: similar keys give unrelated streams


@dataclass(frozen=True)
class CropConfig:
    """How crops are drawn, for one combination of sizes. The defaults are the reference's.

    gram_distorted: whether colour and blur reach the Gram teacher's crops too (`gram_teacher_no_distortions: false`).
    share_color_jitter: jitter and greyscale once for the whole image.
    color_jitter_strength: the ranges of brightness, contrast, saturation and hue are multiplied by it (SimCLR's s; ours).
    local_from_global: local crops are windows of the global crops, at multiples of `window_step` pixels and with colours of
    their own (`localcrops_subset_of_globalcrops`): the first half from crop 1, the second from crop 2.
    """

    global_size: int = 224
    local_size: int = 96
    local_count: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    gram_size: int | None = None
    gram_distorted: bool = True
    share_color_jitter: bool = False
    color_jitter_strength: float = 1.0
    local_from_global: bool = False
    window_step: int = 16
    horizontal_flips: bool = True
    blur: str = "applied"
    blur_sigma: tuple[float, float] = BLUR_SIGMA
    mean: tuple[float, float, float] = LVD_MEAN
    std: tuple[float, float, float] = LVD_STD
    ratio: float = 1.0

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size", "gram_size"):
            side = getattr(self, name)
            if side is not None and side <= BLUR_RADIUS:
                raise DinoError(f"{name} must be a side in pixels above {BLUR_RADIUS}, not {side}")
        if self.local_count < 0:
            raise DinoError(f"local_count cannot be negative ({self.local_count})")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise DinoError(f"{name} is a range of shares of the image's area, 0 < low ≤ high ≤ 1: not {low, high}")
        if not 0 <= self.color_jitter_strength <= MOST_JITTER:
            raise DinoError(f"color_jitter_strength is within 0 … {MOST_JITTER}, not {self.color_jitter_strength}")
        one_of("blur", self.blur, BLUR_P)
        low, high = self.blur_sigma
        if not 0 < low <= high:
            raise DinoError(f"blur_sigma is a range in pixels of the crop, 0 < low ≤ high: not {low, high}")
        room = self.global_size - self.local_size
        if self.local_from_global and (room < self.window_step or self.local_count % 2):
            raise DinoError(
                f"local crops cut out of global ones must be an even number and {self.window_step} pixels smaller or more: "
                f"{self.local_count} of {self.local_size} px out of {self.global_size} px"
            )

    def check_patch(self, patch: int) -> None:
        """Refuses sizes that a model with this patch would silently cut (70 px would become 4 × 4 patches of 16).

        Not those of local crops: the published high-resolution recipe has 168 px, of which 8 are dropped.
        """
        for name in ("global_size", "gram_size"):
            side = getattr(self, name)
            if side is not None and side % patch:
                nearest = max(patch, round(side / patch) * patch)
                raise DinoError(f"{name} {side} is no multiple of the patch size {patch}; the nearest one is {nearest}")

    @property
    def target_short_side(self) -> int:
        """For `open_image`, which keeps twice this: no crop has to be enlarged that the full image would not enlarge."""
        sides = [(max(self.global_size, self.gram_size or 0), self.global_scale[0])]
        if self.local_count and not self.local_from_global:
            sides.append((self.local_size, self.local_scale[0]))
        return max(math.ceil(side / math.sqrt(share * ASPECT[0]) / 2) for side, share in sides)

    def plan(self, width: int, height: int, rng: Uniform) -> Plan:
        """Draws all crops of an image of width × height pixels."""
        first, second, local = BLUR_P[self.blur]
        shared = self._draw_colours(rng) if self.share_color_jitter else None
        globals_ = (
            self._draw(width, height, self.global_scale, first, 0.0, rng),
            self._draw(width, height, self.global_scale, second, SOLARISE_P, rng),
        )
        locals_ = tuple(self._draw(width, height, self.local_scale, local, 0.0, rng) for _ in range(self.local_count))
        windows = None
        if self.local_from_global:
            step = self.window_step
            places = (self.global_size - self.local_size) // step
            windows = tuple((step * _integer(rng, places), step * _integer(rng, places)) for _ in locals_)
        return Plan(globals_, locals_, shared, windows)

    def _draw(
        self, width: int, height: int, scale: tuple[float, float], blur_p: float, solarise_p: float, rng: Uniform
    ) -> Crop:
        top, left, h, w = draw_box(width, height, scale, rng)
        return Crop(
            top=top,
            left=left,
            height=h,
            width=w,
            flip=self.horizontal_flips and rng.random() < 0.5,
            colours=Colours() if self.share_color_jitter else self._draw_colours(rng),
            sigma=_between(rng, *self.blur_sigma) if rng.random() < blur_p else None,
            solarise=rng.random() < solarise_p,
        )

    def _draw_colours(self, rng: Uniform) -> Colours:
        if rng.random() >= JITTER_P:
            return Colours(grey=rng.random() < GREY_P)
        names = ["brightness", "contrast", "saturation", "hue"]
        order = tuple(names.pop(_integer(rng, len(names))) for _ in range(4))
        s = self.color_jitter_strength
        return Colours(
            order=order,
            brightness=_between(rng, 1 - s * BRIGHTNESS, 1 + s * BRIGHTNESS),
            contrast=_between(rng, 1 - s * CONTRAST, 1 + s * CONTRAST),
            saturation=_between(rng, 1 - s * SATURATION, 1 + s * SATURATION),
            hue=_between(rng, -s * HUE, s * HUE),
            grey=rng.random() < GREY_P,
        )


def draw_box(width: int, height: int, scale: tuple[float, float], rng: Uniform) -> tuple[int, int, int, int]:
    """(top, left, height, width): area uniform in `scale`, aspect log-uniform in 3/4 … 4/3; after ten misses, the centre."""
    for _ in range(10):
        area = width * height * _between(rng, *scale)
        aspect = math.exp(_between(rng, math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return _integer(rng, height - h + 1), _integer(rng, width - w + 1), h, w
    w, h = width, height
    if width / height < ASPECT[0]:
        h = round(width / ASPECT[0])
    elif width / height > ASPECT[1]:
        w = round(height * ASPECT[1])
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop(image: Tensor, side: int, scale: tuple[float, float], rng: Uniform) -> Tensor:
    """uint8 [3, H, W] → [3, side, side]: the box of `draw_box`, mirrored with probability ½."""
    crop = cropped(image, draw_box(image.shape[2], image.shape[1], scale, rng), side)
    return (crop.flip(-1) if rng.random() < 0.5 else crop).contiguous()


def _between(rng: Uniform, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _integer(rng: Uniform, below: int) -> int:
    return int(rng.random() * below)


# ---------------------------------------------------------------------------------------------------------------------
# Doing it: pixels


@dataclass(frozen=True)
class Crops:
    """The crops of one image, uint8: global [2, 3, g, g], local [n_l, 3, l, l], Gram [2, 3, q, q] or None."""

    global_crops: Tensor
    local_crops: Tensor
    gram_crops: Tensor | None


def render(image: Image.Image | np.ndarray | Tensor, plan: Plan, config: CropConfig) -> Crops:
    """Applies a plan to an RGB image of the size that the plan was drawn for."""
    pixels = to_pixels(image)
    if pixels.dtype != torch.uint8:
        raise DinoError(f"crops are taken from 8-bit images, not from {pixels.dtype}")
    if plan.shared is not None:
        planes = coloured(pixels.numpy().astype(np.float32, order="C"), plan.shared)
        pixels = torch.from_numpy(planes.astype(np.uint8))

    g, q = config.global_size, config.gram_size
    seen = torch.empty(2, 3, g, g, dtype=torch.uint8)
    gram = None if q is None else torch.empty(2, 3, q, q, dtype=torch.uint8)
    bases: list[Pixels] = []
    for i, crop in enumerate(plan.globals_):
        base = cut(pixels, crop, max(g, q or 0))
        bases.append(base)
        if gram is None:
            finish(base, crop, seen[i].numpy())
        elif config.gram_distorted:  # at the large size: the blur is weaker, seen from the smaller crop
            distorted = np.empty_like(base)
            finish(base, crop, distorted)
            seen[i] = torch.from_numpy(_resized(distorted, g))
            gram[i] = torch.from_numpy(_resized(distorted, gram.shape[-1]))
        else:
            finish(_resized(base, g), crop, seen[i].numpy())
            gram[i] = torch.from_numpy(_resized(base, gram.shape[-1]))

    side = config.local_size
    local = torch.empty(len(plan.locals_), 3, side, side, dtype=torch.uint8)
    for i, crop in enumerate(plan.locals_):
        out = local[i].numpy()
        if plan.windows is None:
            finish(cut(pixels, crop, side), crop, out)
        else:  # colours and blur see the whole base, then the window is cut
            base = bases[0 if i < len(plan.locals_) // 2 else 1]
            whole = np.empty_like(base)
            finish(base, crop, whole)
            top, left = plan.windows[i]
            out[:] = whole[:, top : top + side, left : left + side]
    return Crops(seen, local, gram)


def cut(image: Tensor, crop: Crop, side: int) -> Pixels:
    """The crop's box of an image [3, H, W], resized and flipped."""
    planes = _planes(cropped(image, (crop.top, crop.left, crop.height, crop.width), side))
    return torch.from_numpy(planes).flip(-1).numpy() if crop.flip else planes


def _resized(pixels: Pixels, side: int) -> Pixels:
    return _planes(resized(torch.from_numpy(pixels), (side, side), "bicubic"))


def _planes(x: Tensor) -> Pixels:
    return np.ascontiguousarray(x.numpy())  # from interleaved colours; torch takes half as long again


def finish(pixels: Pixels, crop: Crop, out: Pixels) -> None:
    """Colours, greyscale, blur, solarisation: everything after the geometry."""
    if crop.colours.order or crop.colours.grey or crop.sigma is not None:
        planes = scratch("planes", pixels.shape)
        planes[:] = pixels
        coloured(planes, crop.colours)
        if crop.sigma is not None:
            blurred(planes, crop.sigma)
        np.copyto(out, planes, casting="unsafe")
    else:
        out[:] = pixels
    if crop.solarise:
        np.minimum(out, 255 - out, out=out)  # values of 128 and more are inverted


# ---------------------------------------------------------------------------------------------------------------------
# A batch


@dataclass
class CropBatch:
    """What one training step sees. All crops are crop-major: row c·B + b is crop c of image b.

    Crops are uint8 as they come from the workers; `to` moves the batch and turns them into normalised floats.
    """

    global_crops: Tensor  # [2B, 3, g, g]
    local_crops: Tensor  # [n_l·B, 3, l, l]
    gram_crops: Tensor | None  # [2B, 3, q, q]
    masks: Tensor  # bool [2B, P]
    mask_indices: Tensor  # int64 [n_masked], positions of true entries in the flattened masks
    masks_weight: Tensor  # float32 [n_masked], 1 / (masked patches of the same crop)
    n_masked: int
    unreadable: tuple[str, ...] = ()  # "name: reason" of images that were replaced by others
    step: int = 0  # number of this batch since the beginning of the training
    resolution: int = 0  # index of the loader's resolution
    indices: tuple[int, ...] = ()  # of the B images in the dataset
    mean: tuple[float, float, float] = LVD_MEAN
    std: tuple[float, float, float] = LVD_STD

    @property
    def batch_size(self) -> int:
        return self.global_crops.shape[0] // 2

    def to(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = torch.float32,
        *,
        non_blocking: bool = True,
    ) -> CropBatch:
        """The batch on a device, its crops as normalised floats, or as they are (None). Moving comes first, as long as they
        are bytes."""

        def crops(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x.to(device, non_blocking=non_blocking)
            if dtype is None:
                return x
            return normalised(x, self.mean, self.std, dtype) if x.dtype == torch.uint8 else x.to(dtype)

        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        global_crops, local_crops = crops(self.global_crops), crops(self.local_crops)
        assert global_crops is not None
        assert local_crops is not None
        return replace(
            self,
            global_crops=global_crops,
            local_crops=local_crops,
            gram_crops=crops(self.gram_crops),
            masks=moved(self.masks),
            mask_indices=moved(self.mask_indices),
            masks_weight=moved(self.masks_weight),
        )

    def pin_memory(self) -> CropBatch:
        """Called by torch's loader."""
        pinned: dict[str, Any] = {k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **pinned)


@dataclass(frozen=True)
class Sample:
    """One image's crops on their way into a batch."""

    crops: Crops
    index: int = 0
    unreadable: tuple[str, ...] = field(default=())


def collate(
    samples: Sequence[Sample], masks: Masks, config: CropConfig, *, step: int = 0, resolution: int = 0
) -> CropBatch:
    """B samples and the masks of 2B global crops to a batch."""

    def crop_major(crops: list[Tensor]) -> Tensor:
        return torch.stack(crops, dim=1).flatten(0, 1)  # [n, B, 3, s, s] → [n·B, 3, s, s]

    gram = [s.crops.gram_crops for s in samples if s.crops.gram_crops is not None]
    return CropBatch(
        global_crops=crop_major([s.crops.global_crops for s in samples]),
        local_crops=crop_major([s.crops.local_crops for s in samples]),
        gram_crops=crop_major(gram) if gram else None,
        masks=masks.masks,
        mask_indices=masks.indices,
        masks_weight=masks.weight,
        n_masked=int(masks.indices.numel()),
        unreadable=tuple(u for s in samples for u in s.unreadable),
        step=step,
        resolution=resolution,
        indices=tuple(s.index for s in samples),
        mean=config.mean,
        std=config.std,
    )
