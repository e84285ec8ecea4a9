"""COCO's measures of boxes, and how boxes of several views of one image are merged. Arrays in, numbers out.

Average precision per class and IoU threshold: detections by falling score, each taking the best free truth it overlaps
enough; precision made monotone and read at 101 recalls; then averaged over the thresholds .50, .55, … .95 and the
classes that occur. At most 100 detections per image and class. Crowds are matched any number of times and
count neither for nor against. faster-coco-eval computes it (equal to pycocotools, in C++).

Legend: N images, T true boxes and n detections of one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3.errors import DinoError, require

# column of the results → key of the library; percent
COLUMNS = {
    "AP": "AP_all", "AP50": "AP_50", "AP75": "AP_75", "APs": "AP_small", "APm": "AP_medium", "APl": "AP_large",
    "AR1": "AR_all", "AR10": "AR_second", "AR100": "AR_third", "ARs": "AR_small", "ARm": "AR_medium", "ARl": "AR_large",
}  # fmt: skip


EPS = 1e-7


def area(boxes_xyxy: Tensor) -> Tensor:
    sides = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp_min(0)
    return sides[..., 0] * sides[..., 1]


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(intersection over union, generalised IoU), element by element, of xyxy boxes that broadcast against each other.

    GIoU (arXiv 1902.09630) = IoU − (hull − union) / hull: it still has a slope where boxes do not touch. All pairs:
    `overlap(a[:, None], b[None])`.
    """
    common = torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], dim=-1)
    hull = area(torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], dim=-1))
    both = area(common)
    union = area(a) + area(b) - both
    iou = both / union.clamp_min(EPS)
    return iou, iou - (hull - union) / hull.clamp_min(EPS)


def average_precision(
    found: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]], class_names: Sequence[str]
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """(COCO's twelve numbers in percent, a row per class) of N images.

    found: `boxes_xyxy_px` [n, 4], `scores` [n], `labels` [n] per image; truth: `boxes_xyxy_px` [T, 4], `labels` [T], and
    where known `crowd` and `area_px2` [T]. Labels count `class_names`. A number is None where nothing is there to be
    found: AP of small boxes without small boxes. (small: below 32² px of area, large: above 96².)
    """
    library = require("faster_coco_eval", "detection", "COCO's average precision")
    if len(found) != len(truth):
        raise DinoError(f"{len(found)} images with detections, {len(truth)} with true boxes: one each is needed")
    facts = coco_facts(truth, class_names)
    rows = coco_results(found)
    if not facts["annotations"]:
        raise DinoError("there is no true box in any of the images, so nothing can be scored")
    # the library prints nothing: its tables go to a function that drops them
    reference = library.COCO(facts, print_function=_quiet)
    if rows:
        evaluation = library.COCOeval_faster(reference, reference.loadRes(rows), iouType="bbox", print_function=_quiet)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        stats = evaluation.stats_as_dict
        precision = np.asarray(evaluation.eval["precision"])[..., 0, -1]  # [thresholds, recalls, classes]
        results = {name: _percent(stats[key]) for name, key in COLUMNS.items()}
    else:
        present = _sizes_present(facts)
        results = {name: 0.0 if name[-1] not in "sml" or name[-1] in present else None for name in COLUMNS}
        labels = {row["category_id"] for row in facts["annotations"] if not row["iscrowd"]}
        precision = np.stack([np.full((10, 101), 0.0 if i in labels else -1.0) for i in range(len(class_names))], -1)
    per_class = []
    for i, name in enumerate(class_names):
        count = sum(row["category_id"] == i and not row["iscrowd"] for row in facts["annotations"])
        here = precision[:, :, i]
        ap, ap50 = (_percent(float(part[part > -1].mean())) if (part > -1).any() else None for part in (here, here[0]))
        per_class.append({"class": name, "boxes": count, "AP": ap, "AP50": ap50})
    return results, per_class


def coco_facts(truth: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> dict[str, Any]:
    """True boxes in COCO's form; images and classes are numbered from 0, as here."""
    annotations: list[dict[str, Any]] = []
    for i, target in enumerate(truth):
        boxes = np.asarray(target["boxes_xyxy_px"], np.float64).reshape(-1, 4)
        labels = np.asarray(target["labels"]).reshape(-1)
        areas = target.get("area_px2")
        for t, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            if not 0 <= labels[t] < len(class_names):
                raise DinoError(f"image {i} has a box of class {labels[t]}; there are {len(class_names)} classes")
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": int(labels[t]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(areas[t]) if areas is not None else (x2 - x1) * (y2 - y1),
                    "iscrowd": int(bool(target["crowd"][t])) if "crowd" in target else 0,
                }
            )
    return {
        "images": [{"id": i} for i in range(len(truth))],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(class_names)],
    }


def coco_results(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Detections in the form of COCO's results files."""
    rows = []
    for i, image in enumerate(found):
        boxes = np.asarray(image["boxes_xyxy_px"], np.float64).reshape(-1, 4)
        for (x1, y1, x2, y2), score, label in zip(boxes.tolist(), image["scores"], image["labels"]):
            box = [x1, y1, x2 - x1, y2 - y1]
            rows.append({"image_id": i, "category_id": int(label), "bbox": box, "score": float(score)})
    return rows


def _sizes_present(facts: Mapping[str, Any]) -> set[str]:
    areas = [row["area"] for row in facts["annotations"] if not row["iscrowd"]]
    return {"s" if a < 32**2 else "m" if a < 96**2 else "l" for a in areas}


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * float(value)


def _quiet(*_words: object, **_options: object) -> None:
    pass


# ---- several views of one image ----------------------------------------------------------------------------------


def soft_nms(
    boxes_xyxy_px: Tensor, scores: Tensor, labels: Tensor, *, sigma: float = 0.5, most: int = 300, least: float = 1e-3
) -> tuple[Tensor, Tensor, Tensor]:
    """(boxes, scores, labels), best first, after SoftNMS (arXiv 1704.04503): the best box stays, all others of its class
    lose exp(−IoU²/σ), and so on until `most` boxes stand or none scores `least`."""
    scores, chosen = scores.float().clone(), []
    values = []
    for _ in range(min(most, len(scores))):
        best = int(scores.argmax())
        if scores[best] < least:
            break
        chosen.append(best)
        values.append(scores[best].clone())
        iou, _giou = overlap(boxes_xyxy_px[best], boxes_xyxy_px)
        scores = torch.where(labels == labels[best], scores * torch.exp(-(iou**2) / sigma), scores)
        scores[best] = -1.0
    rows = torch.tensor(chosen, dtype=torch.int64, device=scores.device)
    return boxes_xyxy_px[rows], torch.stack(values) if values else scores[:0], labels[rows]
