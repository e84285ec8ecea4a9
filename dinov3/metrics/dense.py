"""Numbers of dense predictions: class maps (paper §6.1.2, Tab. 3) and depth maps (§6.1.2; Eigen et al. 2014).

Legend: K classes, t target, p prediction, I / L / P pixels of a class that are right / in the target / in the prediction.

Class maps are counted into a confusion matrix [K, K] (row: target, column: prediction), the one thing that adds up over
images and ranks; scores are computed from its sum, never averaged over images. Depth scores are the other way round:
one set per image, then the mean over images that have a valid pixel. Everything is a share of 1 (`percentages`
makes the table's numbers), metres stay metres. Arrays may be numpy or torch; nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3.errors import DinoError, one_of

Array = Tensor | np.ndarray
IGNORED = 255

# ---- class maps ----------------------------------------------------------------------------------------------------


def reduce_zero_label(labels: Tensor) -> Tensor:
    """ADE20K's masks count classes from 1 and say "other" with 0: 0 → 255 (ignored), k → k − 1, 255 stays."""
    return torch.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)


def confusion_matrix(prediction: Array, target: Array, n_classes: int, ignore_index: int | None = IGNORED) -> Tensor:
    """Counts int64 [K, K] of (target, prediction) over all pixels whose target is not `ignore_index`.

    Both are class numbers of equal shape. The sum of two matrices is the matrix of both images.
    """
    p, t = _tensor(prediction), _tensor(target)
    if p.shape != t.shape:
        raise DinoError(
            f"the prediction is {list(p.shape)} and the target {list(t.shape)}: resize the prediction first"
        )
    if p.is_floating_point() or t.is_floating_point():
        raise DinoError("confusion_matrix takes class numbers; for logits [K, h, w] call .argmax(0) first")
    p, t = p.reshape(-1).long(), t.reshape(-1).long()
    if ignore_index is not None:
        seen = t != ignore_index
        p, t = p[seen], t[seen]
    for what, values in (("target", t), ("prediction", p)):
        if values.numel() and not (values.min() >= 0 and values.max() < n_classes):
            wrong = values.min() if values.min() < 0 else values.max()
            raise DinoError(
                f"the {what} holds class {int(wrong)}, but there are {n_classes} classes (0 to {n_classes - 1}) and "
                f"{ignore_index} is ignored: give another number of classes, or mark what should not count"
            )
    return torch.bincount(t * n_classes + p, minlength=n_classes**2).reshape(n_classes, n_classes)


def iou_scores(confusion: Array) -> dict[str, Any]:
    """Scores of a confusion matrix, as shares of 1.

    Means over the classes that have one (a class that is neither in the targets nor predicted has no IoU): `mIoU`, `mAcc`
    (= `recall` = the reference's `acc`), `dice`, `precision`, `fscore`; `aAcc` is the share of right pixels. Per class,
    NaN where undefined: `IoU_per_class` = I/(L+P−I), `acc_per_class` = I/L, `precision_per_class` = I/P,
    `dice_per_class` = 2I/(P+L).
    """
    c = _tensor(confusion).double()
    right, labelled, predicted = c.diagonal(), c.sum(1), c.sum(0)
    iou = right / (labelled + predicted - right)
    recall, precision = right / labelled, right / predicted
    dice = 2 * right / (labelled + predicted)
    fscore = 2 * precision * recall / (precision + recall)  # undefined for a class with no hit, where dice is 0
    per_class = {"IoU": iou, "acc": recall, "precision": precision, "dice": dice}
    means = {"mIoU": iou, "acc": recall, "mAcc": recall, "dice": dice, "fscore": fscore}
    means |= {"precision": precision, "recall": recall}
    scores: dict[str, Any] = {name: float(values.nanmean()) for name, values in means.items()}
    scores["aAcc"] = float(right.sum() / labelled.sum())
    return scores | {f"{name}_per_class": values.tolist() for name, values in per_class.items()}


SEGMENTATION_COLUMNS = ("mIoU", "acc", "aAcc", "dice", "fscore", "precision", "recall")


def percentages(scores: Mapping[str, Any]) -> dict[str, float]:
    """The documented columns of a segmentation result: percent, two decimals."""
    return {name: round(100 * scores[name], 2) for name in SEGMENTATION_COLUMNS}


# ---- depth maps ----------------------------------------------------------------------------------------------------

# Borders (top, bottom, left, right) of the region that counts, as shares of height and width, ends excluded.
REGIONS: dict[str, tuple[float, float, float, float]] = {
    "FULL": (0.0, 1.0, 0.0, 1.0),
    "NYU_EIGEN": (
        45 / 480,
        471 / 480,
        41 / 640,
        601 / 640,
    ),  # NYUv2's inner frame: outside of it the sensor sees nothing
    "KITTI_GARG": (0.40810811, 0.99189189, 0.03594771, 0.96405229),  # Garg et al. 2016: where the laser reaches
    "KITTI_EIGEN": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}
DEPTH_SCORES = ("a1", "a2", "a3", "abs_rel", "sq_rel", "rmse", "mae", "log_10", "rmse_log", "silog")


def region_mask(name: str, size_hw: tuple[int, int]) -> Tensor:
    """bool [h, w]: the pixels of an image that an evaluation counts, by the name of the region."""
    h, w = size_hw
    top, bottom, left, right = REGIONS[one_of("the region", name, REGIONS)]
    mask = torch.zeros(h, w, dtype=torch.bool)
    # a thousandth of a pixel is added because 45/480·480 may come out as 44.999…
    mask[int(h * top + 1e-3) : int(h * bottom + 1e-3), int(w * left + 1e-3) : int(w * right + 1e-3)] = True
    return mask


def align_least_squares(prediction: Array, target: Array, mask: Array | None = None) -> tuple[float, float]:
    """(a, b) of the least squares target ≈ a·prediction + b over the mask's pixels: depth up to scale and shift."""
    p, t = _tensor(prediction).double(), _tensor(target).double()
    chosen = torch.ones_like(t, dtype=torch.bool) if mask is None else _tensor(mask).bool()
    p, t = p[chosen], t[chosen]
    if p.numel() == 0:
        return 1.0, 0.0
    mean_p, mean_t = p.mean(), t.mean()
    spread = ((p - mean_p) ** 2).sum()
    if spread == 0:  # a flat prediction does not determine the scale
        return 0.0, float(mean_t)
    a = ((p - mean_p) * (t - mean_t)).sum() / spread
    return float(a), float(mean_t - a * mean_p)


def depth_scores(
    prediction_m: Array,
    target_m: Array,
    min_depth: float = 0.001,
    max_depth: float = 10.0,
    *,
    mask: Array | None = None,
    align: bool = False,
) -> dict[str, float]:
    """Scores of one depth map in metres, over pixels with min_depth < target < max_depth inside `mask`.

    align: first replace the prediction by its least-squares fit a·p + b to those pixels. The prediction is then clamped
    to [min_depth, max_depth]. With e = ln t − ln p and r = max(t/p, p/t): a1, a2, a3 shares of r < 1.25, 1.25², 1.25³;
    abs_rel mean |t−p|/t; sq_rel mean (t−p)²/t; rmse, mae in metres; log_10 mean |log₁₀t − log₁₀p|; rmse_log; silog
    100·√(mean e² − (mean e)²). All NaN where no pixel counts.
    """
    if not 0 < min_depth < max_depth:
        raise DinoError(
            f"depths lie in 0 < min_depth < max_depth, not {min_depth} and {max_depth} (logarithms are taken)"
        )
    p, t = _tensor(prediction_m).double(), _tensor(target_m).double()
    if p.shape != t.shape:
        raise DinoError(
            f"the prediction is {list(p.shape)} and the target {list(t.shape)}: resize the prediction first"
        )
    valid = (t > min_depth) & (t < max_depth)
    if mask is not None:
        valid &= _tensor(mask).bool().expand_as(t)
    if not valid.any():
        return dict.fromkeys(DEPTH_SCORES, math.nan)
    if align:
        a, b = align_least_squares(p, t, valid)
        p = a * p + b
    p, t = p[valid].clamp(min_depth, max_depth), t[valid]
    worse = torch.maximum(t / p, p / t)
    e = t.log() - p.log()
    scores = {f"a{k}": (worse < 1.25**k).double().mean() for k in (1, 2, 3)}
    scores |= {
        "abs_rel": ((t - p).abs() / t).mean(),
        "sq_rel": ((t - p) ** 2 / t).mean(),
        "rmse": ((t - p) ** 2).mean().sqrt(),
        "mae": (t - p).abs().mean(),
        "log_10": e.abs().mean() / math.log(10),
        "rmse_log": (e**2).mean().sqrt(),
        # the variance as such: the difference of two means can fall below zero by rounding
        "silog": 100 * e.var(correction=0).sqrt(),
    }
    return {name: float(value) for name, value in scores.items()}


def mean_scores(per_image: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every score over the images that have it (NaN: none)."""
    rows = list(per_image)
    names = list(rows[0]) if rows else []
    means = {}
    for name in names:
        values = [row[name] for row in rows if not math.isnan(row[name])]
        means[name] = sum(values) / len(values) if values else math.nan
    return means


# ---- canopy height -------------------------------------------------------------------------------------------------


@dataclass
class CanopySums:
    """What a map of heights adds to the scores; small, so that processes can exchange it."""

    n: int
    error: float  # Σ e, e = prediction − target
    absolute: float
    squared: float
    target: float
    target_squared: float
    blocks: list[tuple[float, float]]  # (prediction, target): means over blocks

    @staticmethod
    def of(prediction_m: Array, target_m: Array, *, block: int = 50, dropped: int = 3) -> CanopySums:
        """Of one map: heights below 0 count as 0, targets that are NaN do not count; whole blocks only, after the first
        `dropped` rows and columns."""
        p, t = _tensor(prediction_m).double().squeeze(), _tensor(target_m).double().squeeze()
        if p.shape != t.shape or p.ndim != 2:
            raise DinoError(f"heights are maps [h, w] of equal size, not {list(p.shape)} and {list(t.shape)}")
        p, t = p.clamp(min=0), t.clamp(min=0)
        known = ~t.isnan()
        p = torch.where(known, p, math.nan)
        e, seen = (p - t)[known], t[known]
        error, absolute, squared, target, target_squared = (float(x.sum()) for x in (e, e.abs(), e**2, seen, seen**2))
        rows, columns = (max(0, side - dropped) // block for side in t.shape)
        means = []
        for x in (p, t):
            cells = x[dropped : dropped + rows * block, dropped : dropped + columns * block]
            cells = cells.reshape(rows, block, columns, block).transpose(1, 2).flatten(2)
            means.append(cells.nanmean(-1).flatten().tolist())
        pairs = [(a, b) for a, b in zip(*means) if not math.isnan(b)]
        return CanopySums(len(seen), error, absolute, squared, target, target_squared, pairs)


def canopy_scores(maps: Iterable[CanopySums]) -> dict[str, float]:
    """`mae`, `rmse`, `bias` (prediction − target), all in metres, pixel `r2`, and `block_r2` over the means of 50 × 50 pixels
    (Tolan et al. 2024); NaN where there is nothing to compare."""
    maps = list(maps)
    n = sum(m.n for m in maps)
    if n == 0:
        return dict.fromkeys(("mae", "rmse", "bias", "r2", "block_r2"), math.nan)
    squared, target = sum(m.squared for m in maps), sum(m.target for m in maps)
    spread = sum(m.target_squared for m in maps) - target**2 / n
    blocks = [pair for m in maps for pair in m.blocks]
    middle = sum(t for _, t in blocks) / max(len(blocks), 1)
    return {
        "mae": sum(m.absolute for m in maps) / n,
        "rmse": math.sqrt(squared / n),
        "bias": sum(m.error for m in maps) / n,
        "r2": _r2(squared, spread),
        "block_r2": _r2(sum((p - t) ** 2 for p, t in blocks), sum((t - middle) ** 2 for _, t in blocks)),
    }


def _r2(residual: float, spread: float) -> float:
    return 1 - residual / spread if spread > 0 else math.nan


def _tensor(x: Array) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach().cpu()
    # torch has no arithmetic for numpy's wider unsigned integers, and none of its own for arrays that may not be written
    return torch.from_numpy(
        np.require(x.astype(np.int64) if x.dtype in (np.uint16, np.uint32) else x, None, ["C", "W"])
    )
