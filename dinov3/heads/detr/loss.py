"""What the detector is trained with (paper App. D.1): every target finds its query, then class, deltas and overlap.

Published weights: class 2, deltas 1, GIoU 2 (4 in the last stage, with the IoU-aware class loss). The sources do not say
how costs of the matching are weighted, how often a target is repeated for the one-to-many queries, and what their share
is: here the weights of the losses, 6 times and 1, as in arXiv 2308.01904 and 2207.13080.

Four branches, each summed over its predictions: the last layer, the layers before it ("auxiliary"), all layers of the
one-to-many queries, and the proposals, which only separate objects from background (class 0; the other columns learn
to stay at zero). Every prediction is matched on its own. Sums are divided by the number of targets in the batch.

Legend: B images, Q queries or proposals, K classes, T targets of one image. Computed in float32, without autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3 import distributed
from dinov3.errors import DinoError, one_of
from dinov3.heads.detr.features import deltas_between, to_cxcywh, to_xyxy
from dinov3.heads.objectives import hungarian
from dinov3.losses import LossTerms
from dinov3.metrics.boxes import overlap

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
