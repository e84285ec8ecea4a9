"""Losses of dense heads of segmentation and of depth (paper §6.1, App. D); the matching of queries with targets.

Legend: B images, K classes, H×W pixels of the target. Targets say themselves which pixels do not count: a class map by
`ignore_index`, a depth map by a mask. All is computed in float32. Mask2Former's and DETR's criteria: beside them.

The reference's depth recipe averages over pixels of the whole batch at once, and so do these, unless they say "per image".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.errors import DinoError, one_of, only_known, require
from dinov3.heads.encoder import resized
from dinov3.losses import LossTerms

# ---- segmentation --------------------------------------------------------------------------------------------------


def cross_entropy_map(
    logits: Tensor, target: Tensor, *, ignore_index: int = 255, mean_over: str = "all", label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of logits [B, K, h, w], resized to the target [B, H, W] of class numbers.

    mean_over: "all" divides by all pixels, ignored ones included (the reference's recipe: an image that is mostly void
    weighs little), "valid" by those that count. The slow version:

        sum(-log softmax(logits[b, :, y, x])[target[b, y, x]] for valid (b, y, x)) / (B·H·W or number of valid)
    """
    one_of("mean_over", mean_over, ("all", "valid"))
    check_classes(target, logits.shape[1], ignore_index)
    logits = resized(logits.float(), target.shape[-2:])
    total = F.cross_entropy(
        logits, target.long(), ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )
    count = target.numel() if mean_over == "all" else int((target != ignore_index).sum())
    return total / max(count, 1)


def check_classes(target: Tensor, n_classes: int, ignore_index: int) -> None:
    """Refuses a class number that the head has no output for."""
    counted = target[target != ignore_index]
    if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= n_classes):
        odd = int(counted.max()) if int(counted.max()) >= n_classes else int(counted.min())
        raise DinoError(
            f"a mask holds class {odd}, but the head has {n_classes} classes (0 to {n_classes - 1}; {ignore_index} is "
            "ignored); raise the number of classes or repair the mask"
        )


def dice_map(logits: Tensor, target: Tensor, *, ignore_index: int = 255) -> Tensor:
    """1 − Dice of the softmax of logits [B, K, h, w], resized to the target [B, H, W], ignored pixels left out.

    Per image and class (2·Σ p·t + 1) / (Σ p² + Σ t² + 1) over pixels; mean over classes, then images.
    """
    K = logits.shape[1]
    check_classes(target, K, ignore_index)
    valid = target != ignore_index
    p = resized(logits.float(), target.shape[-2:]).softmax(1) * valid[:, None]
    t = F.one_hot(torch.where(valid, target, 0).long(), K).movedim(-1, 1).float() * valid[:, None]
    return multilabel_dice(p, t)


def multilabel_dice(p: Tensor, t: Tensor) -> Tensor:
    """1 − Dice of probabilities and targets [B, K, H, W], both in [0, 1]: the reference's, on sigmoids."""
    overlap = 2 * (p * t).sum((2, 3)) + 1
    return (1 - overlap / (p.square().sum((2, 3)) + t.square().sum((2, 3)) + 1)).mean()


def segmentation_terms(
    logits: Tensor,
    target: Tensor,
    *,
    ce: float = 1.0,
    dice: float = 0.0,
    ignore_index: int = 255,
    mean_over: str = "all",
) -> LossTerms:
    """Cross-entropy and Dice, added with their weights; a weight of 0 leaves the term out. (The reference's recipes use
    one or the other.)"""
    terms = LossTerms()
    if ce:
        mean = cross_entropy_map(logits, target, ignore_index=ignore_index, mean_over=mean_over)
        terms.add("ce_loss", ce, mean)
    if dice:
        terms.add("dice_loss", dice, dice_map(logits, target, ignore_index=ignore_index))
    return terms


# ---- metric depth --------------------------------------------------------------------------------------------------

OFFSET = 0.001  # metres added before every logarithm of a depth: the reference's


def log_error(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """log(p + .001) − log(t + .001), 0 where not valid; the logarithm of invalid pixels is never taken."""
    p = torch.where(valid, prediction.float(), 1.0)
    t = torch.where(valid, target.float(), 1.0)
    return torch.log(p + OFFSET) - torch.log(t + OFFSET)


def sig_loss(prediction: Tensor, target: Tensor, valid: Tensor, *, with_variance: bool = True) -> Tensor:
    """√(var(g) + 0.15·mean(g)²) of the log-error g over valid pixels: scale is forgiven for the most part (Eigen et al.).

    prediction, target [B, 1, H, W] in metres; valid [B, 1, H, W] boolean; the variance divides by n − 1. Without it only the
    scale counts: the recipes begin so (`DepthLoss`). A batch without valid pixels has loss 0.
    """
    n = valid.sum()
    if int(n) == 0:
        return prediction.sum() * 0
    g = log_error(prediction, target, valid)
    mean = g.sum() / n
    squared = 0.15 * mean.square()
    if with_variance and int(n) > 1:
        squared = squared + (torch.where(valid, g - mean, 0.0)).square().sum() / (n - 1)
    return torch.sqrt(squared.clamp_min(1e-12))  # the root of 0 has no gradient


STRIDES = (1, 2, 4, 6)


def gradient_loss(prediction: Tensor, target: Tensor, valid: Tensor, *, logarithmic: bool = True) -> Tensor:
    """Where edges differ: differences of the (log-)error between pixels two apart, down and across, on the map and on every
    2nd, 4th and 6th pixel of it; absolute values summed, divided by the valid pixels of that map, summed over the maps.

    A pair counts where both its pixels are valid. The slow version of one map e with mask m:

        (Σ |e[y + 2, x] − e[y, x]|·m·m + Σ |e[y, x + 2] − e[y, x]|·m·m) / Σ m
    """
    if logarithmic:
        error = log_error(prediction, target, valid)
    else:
        error = torch.where(valid, prediction.float() - target.float(), 0.0)
    total = error.new_zeros(())
    for stride in STRIDES:
        e, m = error[..., ::stride, ::stride], valid[..., ::stride, ::stride].float()
        n = m.sum()
        if float(n) == 0:
            continue
        down = ((e[..., 2:, :] - e[..., :-2, :]).abs() * m[..., 2:, :] * m[..., :-2, :]).sum()
        across = ((e[..., 2:] - e[..., :-2]).abs() * m[..., 2:] * m[..., :-2]).sum()
        total = total + (down + across) / n
    return total


def depth_l1(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean |p − t| over valid pixels, in metres."""
    difference = torch.where(valid, prediction.float() - target.float(), 0.0).abs()
    return difference.sum() / (valid.sum() + 1e-7)


# ---- relative depth ------------------------------------------------------------------------------------------------


def aligned(x: Tensor, valid: Tensor) -> Tensor:
    """Each image's map [B, 1, H, W] less its median, over its mean distance from it (valid pixels): scale and shift are
    gone. (MiDaS, arXiv 1907.01341; Depth Anything v2 trains DPT so.) Invalid places are 0."""
    x = x.float()
    out = []
    for image, mask in zip(x, valid):
        known = image[mask]
        if known.numel() == 0:
            out.append(torch.zeros_like(image))
            continue
        shift = known.median()
        scale = (known - shift).abs().mean().clamp_min(1e-6)
        out.append(torch.where(mask, (image - shift) / scale, 0.0))
    return torch.stack(out)


def scale_and_shift_invariant(prediction: Tensor, target: Tensor, valid: Tensor, *, trim: float = 0.0) -> Tensor:
    """Mean |aligned prediction − aligned target| per image, then over images that have valid pixels.

    `target` is what should be linear in the prediction: for relative depth the inverse, 1/t. trim: the share of a
    image's largest errors that is left out (0.2 in MiDaS, against wrong ground truth)."""
    difference = (aligned(prediction, valid) - aligned(target, valid)).abs()
    losses = []
    for errors, mask in zip(difference, valid):
        known = errors[mask]
        if known.numel():
            kept = known.sort().values[: max(1, round(known.numel() * (1 - trim)))]
            losses.append(kept.sum() / known.numel())
    return torch.stack(losses).mean() if losses else prediction.sum() * 0


def gradient_matching(prediction: Tensor, target: Tensor, valid: Tensor, *, scales: int = 4) -> Tensor:
    """|∇(aligned prediction − aligned target)| between neighbours, on the map and on every 2nd, 4th, 8th pixel of it, over
    the valid pixels of that map, summed over maps: sharp edges (MiDaS)."""
    difference = aligned(prediction, valid) - aligned(target, valid)
    total = difference.new_zeros(())
    for k in range(scales):
        e, m = difference[..., :: 2**k, :: 2**k], valid[..., :: 2**k, :: 2**k].float()
        n = m.sum()
        if float(n) == 0:
            continue
        down = ((e[..., 1:, :] - e[..., :-1, :]).abs() * m[..., 1:, :] * m[..., :-1, :]).sum()
        across = ((e[..., 1:] - e[..., :-1]).abs() * m[..., 1:] * m[..., :-1]).sum()
        total = total + (down + across) / n
    return total


# ---- by name -------------------------------------------------------------------------------------------------------

# the reference's names, then ours for relative depth
DEPTH_LOSSES = ("SIGLOSS", "GRADIENT_LOG_LOSS", "GRADIENT_LOSS", "L1", "SSI", "GRADIENT_MATCHING")


class DepthLoss:
    """Several depth losses with their weights, by name: {"SIGLOSS": 1.0, "GRADIENT_LOG_LOSS": 0.5}.

    prediction [B, 1, h, w] in metres is resized to the target [B, 1, H, W]; pixels count where min_depth < target <
    max_depth (and `valid`, if given). For the first `warm_up` steps SIGLOSS is without its variance: the scale is found
    first. "SSI" and "GRADIENT_MATCHING" compare 1/prediction with 1/target.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        min_depth: float = 0.001,
        max_depth: float = 10.0,
        warm_up: int = 100,
    ) -> None:
        self.weights = dict(weights if weights is not None else {"SIGLOSS": 1.0})
        only_known("there is no depth loss", self.weights, DEPTH_LOSSES)
        self.min_depth, self.max_depth, self.warm_up = min_depth, max_depth, warm_up

    def __call__(self, prediction: Tensor, target: Tensor, valid: Tensor | None = None, *, step: int) -> LossTerms:
        prediction = resized(prediction.float(), target.shape[-2:])
        known = (target > self.min_depth) & (target < self.max_depth)
        known = known if valid is None else known & valid
        terms = LossTerms()
        for name, weight in self.weights.items():
            if weight:
                terms.add(_LOGGED[name], weight, self._one(name, prediction, target, known, step))
        return terms

    def _one(self, name: str, p: Tensor, t: Tensor, valid: Tensor, step: int) -> Tensor:
        if name == "SIGLOSS":
            return sig_loss(p, t, valid, with_variance=step >= self.warm_up)
        if name in ("GRADIENT_LOG_LOSS", "GRADIENT_LOSS"):
            return gradient_loss(p, t, valid, logarithmic=name == "GRADIENT_LOG_LOSS")
        if name == "L1":
            return depth_l1(p, t, valid)
        inverse = 1 / p.clamp_min(self.min_depth), 1 / torch.where(valid, t, 1.0)
        return scale_and_shift_invariant(*inverse, valid) if name == "SSI" else gradient_matching(*inverse, valid)


_LOGGED = {name: f"{name.lower().removesuffix('_loss').removesuffix('loss')}_loss" for name in DEPTH_LOSSES}


# ---- matching: which query is matched to which target ---------------------------------------------------------------


@torch.no_grad()
def hungarian(cost: Tensor) -> tuple[Tensor, Tensor]:
    """cost [Q, T] → (rows, cols), both [min(Q, T)] of int64 on the cost's device, rows ascending: query rows[i] takes
    target cols[i], every target at most once, and no other choice has a smaller sum of costs.

    Raises `DinoError` for costs that are NaN or infinite: the method would fail or, worse, give any assignment.
    """
    optimize = require("scipy.optimize", "heads", "matching queries with targets")
    if cost.ndim != 2:
        raise DinoError(f"the matching takes costs [queries, targets], not {list(cost.shape)}; call it once an image")
    matrix = cost.detach().to("cpu", torch.float64)
    if bad := int((~matrix.isfinite()).sum()):
        raise DinoError(
            f"{bad} of the {cost.numel()} matching costs ({cost.shape[0]} queries, {cost.shape[1]} targets) are NaN or "
            "infinite: the training has diverged (lower the learning rate, clip gradients) or a target is broken"
        )
    rows, cols = optimize.linear_sum_assignment(matrix.numpy())
    return (torch.as_tensor(rows, device=cost.device), torch.as_tensor(cols, device=cost.device))
