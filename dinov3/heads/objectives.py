"""Losses of the dense heads: segmentation, depth, Mask2Former, the detector (paper §6.1, §6.3.2, §7, App. D); matching.

Legend: B images, K classes, H×W pixels of the target. Targets say themselves which pixels do not count: a class map by
`ignore_index`, a depth map by a mask. All is computed in float32.

The reference's depth recipe averages over pixels of the whole batch at once, and so do these, unless they say "per image".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3 import distributed
from dinov3.errors import DinoError, one_of, only_known, require
from dinov3.heads.detr import deltas_between, to_cxcywh, to_xyxy
from dinov3.heads.encoder import resized
from dinov3.losses import LossTerms
from dinov3.metrics import overlap

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
    return _edge_differences(error, valid, STRIDES, apart=2)


def _edge_differences(error: Tensor, valid: Tensor, strides: Iterable[int], *, apart: int) -> Tensor:
    total = error.new_zeros(())
    for stride in strides:
        e, m = error[..., ::stride, ::stride], valid[..., ::stride, ::stride].float()
        n = m.sum()
        if float(n) == 0:
            continue
        down = ((e[..., apart:, :] - e[..., :-apart, :]).abs() * m[..., apart:, :] * m[..., :-apart, :]).sum()
        across = ((e[..., apart:] - e[..., :-apart]).abs() * m[..., apart:] * m[..., :-apart]).sum()
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
    return _edge_differences(difference, valid, [2**k for k in range(scales)], apart=1)


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


# ---- Mask2Former -----------------------------------------------------------------------------------------------------
# What Mask2Former is trained with (arXiv 2112.01527): every segment finds its query, then class, mask and overlap.
#
# The initial queries and every layer are matched and taught on their own. Masks are compared at points, not at pixels: for
# the matching at random ones, for the loss mostly where the prediction is unsure (PointRend, arXiv 1912.08193). The DINOv3
# paper states schedules (App. D) and no other weights of the losses; the numbers here are Mask2Former's.
#
# Legend: B images, Q queries, K classes, T segments of one image, n matched pairs, P points, h×w the predicted masks,
# H×W the target. Computed in float32, without autocast.


@dataclass(frozen=True)
class Segments:
    """One image's target: labels [T], masks [T, H, W] (0 or 1), and counted [H, W]: False where nothing is known."""

    labels: Tensor
    masks: Tensor
    counted: Tensor

    @staticmethod
    def of(class_map: Tensor, *, ignore_index: int = 255) -> Segments:
        """A map of class numbers [H, W]: every class that is there is one segment."""
        counted = class_map != ignore_index
        labels = class_map[counted].unique()
        return Segments(labels.long(), class_map == labels[:, None, None], counted)


# ---- masks at points -----------------------------------------------------------------------------------------------


def at_points(maps: Tensor, points: Tensor) -> Tensor:
    """maps [n, h, w] at points [n or 1, P, 2], (x, y) in [0, 1], bilinear: [n, P]."""
    grid = (2 * points - 1).expand(len(maps), -1, -1)[:, None]  # [n, 1, P, 2]
    return F.grid_sample(maps[:, None], grid, mode="bilinear", align_corners=False)[:, 0, 0]


def mask_loss(logits: Tensor, truth: Tensor, counted: Tensor) -> Tensor:
    """Binary cross-entropy of logits, truth, counted [n, P], mean over the counted points: [n]."""
    loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return (loss * counted).sum(-1) / counted.sum(-1).clamp_min(1e-6)


def dice_loss(logits: Tensor, truth: Tensor, counted: Tensor) -> Tensor:
    """1 − (2 Σ p·t + 1) / (Σ p + Σ t + 1) over the counted points: [n]."""
    p, t = logits.sigmoid() * counted, truth * counted
    return 1 - (2 * (p * truth).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)


def pair_costs(logits: Tensor, truth: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """`mask_loss` and `dice_loss` of every query [Q, P] with every segment [T, P], as products of matrices: [Q, T]."""
    p, t = logits.sigmoid() * counted, truth * counted
    positive, negative = F.softplus(-logits) * counted, F.softplus(logits) * counted
    masks = (positive @ truth.T + negative @ (1 - truth).T) / counted.sum().clamp_min(1e-6)
    dice = 1 - (2 * p @ truth.T + 1) / (p.sum(-1)[:, None] + t.sum(-1)[None] + 1)
    return masks, dice


class Mask2FormerCriterion:
    """Outputs of a `Mask2FormerSegmentor` and targets → `LossTerms`: class, mask and dice loss of the last layer, and
    the sums over the others ("auxiliary_…"). Holds no parameters.

    no_object: how much a query counts in the class loss that got no segment. n_points: 112², as published; for the loss
    `oversample` times as many are drawn, the most unsure become `importance` of the points, the rest are random ones.
    """

    def __init__(
        self,
        n_classes: int,
        *,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object: float = 0.1,
        n_points: int = 12544,
        oversample: float = 3.0,
        importance: float = 0.75,
        ignore_index: int = 255,
    ) -> None:
        if n_points < 1 or oversample < 1 or not 0 <= importance <= 1:
            raise DinoError(
                f"points are drawn in a number of at least 1, oversample is at least 1 and importance in [0, 1]; got "
                f"{n_points}, {oversample} and {importance}"
            )
        self.n_classes, self.no_object, self.ignore_index = n_classes, no_object, ignore_index
        self.class_weight, self.mask_weight, self.dice_weight = class_weight, mask_weight, dice_weight
        self.n_points, self.oversample, self.importance = n_points, oversample, importance

    def __call__(self, outputs: dict[str, Any], targets: Tensor | Sequence[Segments]) -> LossTerms:
        """targets: class maps [B, H, W] (`ignore_index` where nothing is known), or `Segments`, one an image; over
        exactly what the predicted masks cover."""
        logits, masks = outputs["pred_logits"], outputs["pred_masks"]
        segments = self.checked(targets, logits, masks)
        count = torch.tensor(float(sum(len(s.labels) for s in segments)), device=masks.device)
        count = distributed.all_reduce(count, "mean").clamp_min(1.0)  # the same divisor for every rank
        terms = LossTerms()
        with torch.autocast(masks.device.type, enabled=False):
            for name, layers in (("", [outputs]), ("auxiliary_", outputs.get("aux_outputs", []))):
                if not layers:
                    continue
                losses = torch.stack([self.layer(output, segments, count) for output in layers]).sum(0)
                terms.add(f"{name}class_loss", self.class_weight, losses[0])
                terms.add(f"{name}mask_loss", self.mask_weight, losses[1])
                terms.add(f"{name}dice_loss", self.dice_weight, losses[2])
        return terms

    def layer(self, output: dict[str, Any], segments: Sequence[Segments], count: Tensor) -> Tensor:
        """Class, mask and dice loss of one layer's queries: [3]."""
        logits, masks = output["pred_logits"].float(), output["pred_masks"].float()
        wanted = torch.full(logits.shape[:2], self.n_classes, device=logits.device)  # "nothing"
        sums = masks.sum() * 0.0, masks.sum() * 0.0  # in the graph where no image has a segment
        for i, target in enumerate(segments):
            rows, cols = self.matched(logits[i], masks[i], target)
            wanted[i, rows] = target.labels[cols]
            if len(rows):
                compared = self.compared(masks[i, rows], target, cols)
                sums = sums[0] + mask_loss(*compared).sum(), sums[1] + dice_loss(*compared).sum()
        weights = torch.ones(self.n_classes + 1, device=logits.device)
        weights[-1] = self.no_object
        classes = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weights)
        return torch.stack([classes, sums[0] / count, sums[1] / count])

    @torch.no_grad()
    def matched(self, logits: Tensor, masks: Tensor, target: Segments) -> tuple[Tensor, Tensor]:
        """The cheapest pairs of queries (logits [Q, K + 1], masks [Q, h, w]) and segments, at points common to all."""
        points = self.points(1, self.n_points, masks.device)
        counted = at_points(target.counted[None].float(), points)[0]
        by_mask, by_dice = pair_costs(at_points(masks, points), at_points(target.masks.float(), points), counted)
        by_class = -logits.softmax(-1)[:, target.labels]
        return hungarian(self.class_weight * by_class + self.mask_weight * by_mask + self.dice_weight * by_dice)

    def compared(self, masks: Tensor, target: Segments, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, truth and counted [n, P] of matched masks [n, h, w], at points of each pair's own."""
        counted_map = target.counted[None].float().expand(len(masks), -1, -1)
        points = self.unsure_points(masks.detach(), counted_map)
        truth = at_points(target.masks[cols].float(), points)
        return at_points(masks, points), truth, at_points(counted_map, points)

    @torch.no_grad()
    def unsure_points(self, masks: Tensor, counted: Tensor) -> Tensor:
        """Points [n, P, 2] of masks [n, h, w]: the most unsure of many, and random ones."""
        n, n_unsure = len(masks), int(self.importance * self.n_points)
        others = self.points(n, self.n_points - n_unsure, masks.device)
        if not n_unsure:
            return others
        many = self.points(n, max(int(self.oversample * self.n_points), n_unsure), masks.device)
        # what does not count comes last, however unsure
        sure = at_points(masks, many).abs().masked_fill(at_points(counted, many) < 0.5, float("inf"))
        chosen = sure.topk(n_unsure, dim=1, largest=False).indices
        return torch.cat([many.gather(1, chosen[..., None].expand(-1, -1, 2)), others], dim=1)

    def points(self, n: int, count: int, device: torch.device) -> Tensor:
        """Points drawn evenly, (x, y) in [0, 1]: [n, count, 2]."""
        return torch.rand(n, count, 2, device=device)

    def checked(self, targets: Tensor | Sequence[Segments], logits: Tensor, masks: Tensor) -> list[Segments]:
        """Targets as `Segments` on the device, or one sentence."""
        B, K, device = len(masks), self.n_classes, masks.device
        if logits.shape[-1] != K + 1:
            raise DinoError(f"the criterion was made for {K} classes, the head has {logits.shape[-1] - 1}")
        if len(targets) != B:
            raise DinoError(f"{B} images came with {len(targets)} targets; one an image")
        if isinstance(targets, Tensor):
            if targets.ndim != 3:
                raise DinoError(f"class maps are [images, height, width], not {list(targets.shape)}")
            check_classes(targets, K, self.ignore_index)
            targets = [Segments.of(class_map, ignore_index=self.ignore_index) for class_map in targets.to(device)]
        for i, s in enumerate(targets):
            if len(s.labels) and not 0 <= (least := int(s.labels.min())) <= (most := int(s.labels.max())) < K:
                raise DinoError(f"target {i} has labels from {least} to {most}; the head's classes are 0 to {K - 1}")
            (H, W), (h, w) = s.counted.shape, masks.shape[-2:]
            if h * W != w * H:
                raise DinoError(
                    f"target {i} is {W}×{H}, the predicted masks are {w}×{h} and cover padding too: train on images "
                    "whose sides are multiples of 32"
                )
        return [Segments(s.labels.to(device), s.masks.to(device), s.counted.to(device)) for s in targets]


# ---- the detector ----------------------------------------------------------------------------------------------------
# What the detector is trained with (paper App. D.1): every target finds its query, then class, deltas and overlap.
#
# Published weights: class 2, deltas 1, GIoU 2 (4 in the last stage, with the IoU-aware class loss). The sources do not say
# how costs of the matching are weighted, how often a target is repeated for the one-to-many queries, and what their share
# is: here the weights of the losses, 6 times and 1, as in arXiv 2308.01904 and 2207.13080.
#
# Four branches, each summed over its predictions: the last layer, the layers before it ("auxiliary"), all layers of the
# one-to-many queries, and the proposals, which only separate objects from background (class 0; the other columns learn
# to stay at zero). Every prediction is matched on its own. Sums are divided by the number of targets in the batch.
#
# Legend: B images, Q queries or proposals, K classes, T targets of one image. Computed in float32, without autocast.


# An image's target as training wants it: boxes_xyxy_px [T, 4] in pixels of the image given, labels [T]; T may be 0.
Target = dict[str, Tensor]
CLASSIFICATIONS = ("focal", "ia_bce")
OUTSIDE = 1e6
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (arXiv 1708.02002); the same numbers mean other things in ia_bce


# ---- one prediction and its targets --------------------------------------------------------------------------------


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Element by element: −α_t (1 − p_t)^γ ln p_t, p_t the probability of the truth (targets 0 or 1)."""
    p = logits.sigmoid()
    truth = p * targets + (1 - p) * (1 - targets)
    alpha = ALPHA * targets + (1 - ALPHA) * (1 - targets)
    return alpha * (1 - truth) ** GAMMA * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def ia_bce_loss(logits: Tensor, targets: Tensor, iou: Tensor) -> Tensor:
    """Element by element (Align-DETR, arXiv 2304.07527): where the target is 1, the probability p is drawn to
    p^α · IoU^(1−α), which makes the score say how good the box is; elsewhere p^γ · cross-entropy to 0.

    iou: [..., 1] of the matched box (anything where there is none)."""
    p = logits.sigmoid()
    wanted = (p.detach() ** ALPHA * iou.clamp_min(0) ** (1 - ALPHA)).clamp_min(0.01)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted * targets, reduction="none")
    return (targets + (1 - targets) * p**GAMMA) * cross_entropy


@torch.no_grad()
def matching_cost(
    logits: Tensor, boxes: Tensor, before: Tensor, deltas: Tensor, target: Target, weights: Weights
) -> Tensor:
    """[Q, T]: what it would cost to give a target to a query. Class: the focal loss of saying "yes" less that of saying
    "no"; L1 between the deltas and those that would lead to the target; minus the GIoU."""
    wanted = logits[:, target["labels"]]  # [Q, T]
    classes = focal_loss(wanted, torch.ones_like(wanted)) - focal_loss(wanted, torch.zeros_like(wanted))
    truth = target["boxes_xyxy_px"]
    ideal = deltas_between(before[:, None], to_cxcywh(truth)[None])  # [Q, T, 4]
    l1 = (deltas[:, None] - ideal).abs().sum(-1)
    _, giou = overlap(to_xyxy(boxes)[:, None], truth[None])
    return weights.classes * classes + weights.l1 * l1 - weights.giou * giou


def branch_losses(
    prediction: dict[str, Tensor], targets: Sequence[Target], weights: Weights, classification: str
) -> Tensor:
    """(class, L1, GIoU) of one prediction, [3], summed over the batch and not yet divided."""
    logits, boxes = prediction["pred_logits"].float(), prediction["pred_boxes"].float()
    before, deltas = prediction["pred_boxes_old"].detach().float(), prediction["pred_deltas"].float()
    if logits.shape[1] == 0:
        return logits.new_zeros(3)
    truth, ious = torch.zeros_like(logits), logits.new_zeros(*logits.shape[:2], 1)
    l1, giou_loss = deltas.sum() * 0, boxes.sum() * 0  # also without targets every head is in the graph
    for i, target in enumerate(targets):
        if not len(target["labels"]):
            continue
        cost = matching_cost(logits[i], boxes[i], before[i], deltas[i], target, weights)
        if "valid" in prediction:  # a proposal on padding is the last to get a target
            cost = cost + OUTSIDE * ~prediction["valid"][i][:, None]
        rows, cols = hungarian(cost)
        wanted = target["boxes_xyxy_px"][cols]
        iou, giou = overlap(to_xyxy(boxes[i][rows]), wanted)
        truth[i, rows, target["labels"][cols]] = 1.0
        ious[i, rows, 0] = iou.detach()
        l1 = l1 + (deltas[i][rows] - deltas_between(before[i][rows], to_cxcywh(wanted))).abs().sum()
        giou_loss = giou_loss + (1 - giou).sum()
    classes = focal_loss(logits, truth) if classification == "focal" else ia_bce_loss(logits, truth, ious)
    return torch.stack([classes.sum(), l1, giou_loss])


# ---- all of them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    classes: float = 2.0
    l1: float = 1.0
    giou: float = 2.0


class DetrCriterion:
    """outputs of a `Detector` and targets, one an image → `LossTerms`. Holds no parameters.

    classification: "focal", or "ia_bce" for the last stage. one2many: how often a target is repeated for those queries.
    """

    def __init__(
        self,
        weights: Weights | None = None,
        *,
        classification: str = "focal",
        one2many: int = 6,
        one2many_weight: float = 1.0,
    ) -> None:
        one_of("classification", classification, CLASSIFICATIONS)
        self.weights, self.classification = weights or Weights(), classification
        self.one2many, self.one2many_weight = one2many, one2many_weight

    def __call__(self, outputs: dict[str, Any], targets: Sequence[Target]) -> LossTerms:
        logits = outputs["pred_logits"]
        targets = checked(targets, logits.shape[0], logits.shape[-1], logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            return self._terms(outputs, targets)

    def _terms(self, outputs: dict[str, Any], targets: list[Target]) -> LossTerms:
        w, last = self.weights, {k: v for k, v in outputs.items() if k.startswith("pred_")}
        many = [{k.removesuffix("_one2many"): v for k, v in last.items() if k.endswith("_one2many")}]
        repeated = [{k: v.repeat_interleave(self.one2many, 0) for k, v in target.items()} for target in targets]
        objects = [target | {"labels": torch.zeros_like(target["labels"])} for target in targets]
        branches = {
            "": ([last], targets, 1.0),
            "auxiliary_": (outputs["aux_outputs"], targets, 1.0),
            "one2many_": (many + outputs["aux_outputs_one2many"], repeated, self.one2many_weight),
            "proposal_": ([outputs["enc_outputs"]], objects, 1.0),
        }
        terms, count = LossTerms(), self._count(targets)
        for name, (predictions, wanted, share) in branches.items():
            if not predictions or predictions[0]["pred_logits"].shape[1] == 0:
                continue
            divisor = count * (self.one2many if wanted is repeated else 1)
            losses = [branch_losses(p, wanted, w, self.classification) for p in predictions]
            classes, l1, giou = (torch.stack(losses).sum(0) / divisor).unbind()
            terms.add(f"{name}class_loss", share * w.classes, classes)
            terms.add(f"{name}l1_loss", share * w.l1, l1)
            terms.add(f"{name}giou_loss", share * w.giou, giou)
        return terms

    @staticmethod
    def _count(targets: Sequence[Target]) -> Tensor:
        """Targets per process, averaged over all processes, at least 1: every process divides by the same number."""
        device = targets[0]["labels"].device
        count = torch.tensor(float(sum(len(t["labels"]) for t in targets)), device=device)
        return (distributed.all_reduce(count) / distributed.world()).clamp_min(1.0)


def checked(targets: Sequence[Target], B: int, K: int, device: torch.device) -> list[Target]:
    """Targets on the device, or one sentence: as many as images, labels within the head, boxes with an area."""
    if len(targets) != B:
        raise DinoError(
            f"{B} images came with {len(targets)} targets; one an image, with no boxes where there are none"
        )
    result = []
    for i, target in enumerate(targets):
        boxes = target["boxes_xyxy_px"].to(device, torch.float32).reshape(-1, 4)
        labels = target["labels"].to(device, torch.int64)
        if len(boxes) != len(labels):
            raise DinoError(f"target {i} has {len(boxes)} boxes and {len(labels)} labels")
        if len(labels) and not 0 <= (least := int(labels.min())) <= (most := int(labels.max())) < K:
            raise DinoError(f"target {i} has labels from {least} to {most}; the detector's classes are 0 to {K - 1}")
        if not bool((boxes[:, 2:] > boxes[:, :2]).all()):
            raise DinoError(f"target {i} has a box without area; boxes are (left, top, right, bottom) in pixels")
        result.append({"boxes_xyxy_px": boxes, "labels": labels})
    return result
