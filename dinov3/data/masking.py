"""Which patches of the global crops the student does not see: block masks for the iBOT loss.

Paper: section 3.1, iBOT's masking as in DINOv2 (BEiT's blocks). Half of a batch's global crops are masked; the shares of
masked patches cover [0.1, 0.5] evenly within each batch, so that every batch costs the same. Each mask is made of
rectangles until its exact count is reached, and of single patches where no rectangle fits any more.

The generator is handed in: anything with `random.Random`'s uniform, randint, sample and shuffle. `batch_masks` draws all from
it and keeps no state, so a batch's masks are a function of the seed.

One number differs from the reference: the largest block is half of the grid. The reference computes it as
(0.5·g // patch)·g // patch from left to right, which is the same on even grids (98 at 224/16, 128 at 256/16) and smaller
on odd ones (21 instead of 24 at 112/16); `reference_max_block` gives that number to those who need it.

Legend: B images, so 2B global crops; P = rows × columns patches of a crop.
"""

from __future__ import annotations

import math
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dinov3.errors import DinoError

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
