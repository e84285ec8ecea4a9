"""What Mask2Former is trained with (arXiv 2112.01527): every segment finds its query, then class, mask and overlap.

The initial queries and every layer are matched and taught on their own. Masks are compared at points, not at pixels: for
the matching at random ones, for the loss mostly where the prediction is unsure (PointRend, arXiv 1912.08193). The DINOv3
paper states schedules (App. D) and no other weights of the losses; the numbers here are Mask2Former's.

Legend: B images, Q queries, K classes, T segments of one image, n matched pairs, P points, h×w the predicted masks,
H×W the target. Computed in float32, without autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3 import distributed
from dinov3.errors import DinoError
from dinov3.heads.objectives import check_classes, hungarian
from dinov3.losses import LossTerms


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
