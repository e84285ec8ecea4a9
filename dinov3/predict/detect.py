"""Boxes around objects, with classes and scores (paper §6.2.1, the DETR head)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dinov3 import drawing
from dinov3.data import names as known_names
from dinov3.errors import DinoError
from dinov3.files import atomically
from dinov3.predict.common import chosen_preprocessing, colours_of, names_of, result_files, see, set_aside

SIZE = 768  # short side; the published evaluation's 2048 costs seven times as much and finds smaller things
THRESHOLD = 0.5


@dataclass(frozen=True)
class Objects:
    """n boxes, best first: boxes_xyxy_px [n, 4] float32 in the original image's pixels, scores [n] in [0, 1], labels
    [n] (COCO category ids for the published head) and their names. `categories`: all names by label."""

    boxes_xyxy_px: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    image: Image.Image | None
    size_wh: tuple[int, int]
    categories: tuple[str, ...]
    colours: np.ndarray  # [K, 3] uint8, by label

    def __len__(self) -> int:
        return len(self.scores)

    def without_image(self) -> Objects:
        """For keeping the boxes of many images."""
        return replace(self, image=None)

    def summary(self) -> str:
        best = ", ".join(f"{name} {score:.2f}" for name, score in zip(self.names[:5], self.scores))
        return f"{len(self)}\t{best or 'nothing above the threshold'}"

    def drawing(self) -> Image.Image:
        assert self.image is not None
        labels = self.labels.tolist()
        words = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores)]
        return drawing.boxes_over(self.image, self.boxes_xyxy_px, words, self.colours[labels])

    def save(self, folder: str | os.PathLike[str], name: str = "image") -> list[Path]:
        """`NAME_boxes.json` (COCO's form) and `NAME_boxes.png`."""
        data, seen = result_files(folder, name, "boxes.json", "boxes.png")
        write_coco(data, [(name, self)])
        self.drawing().save(seen)
        return [data, seen]


def write_coco(path: Path, detections: Iterable[tuple[str, Objects]]) -> None:
    """One file in COCO's form: images, annotations (bbox x, y, width, height in pixels, with a score), categories.

    The images of an earlier file stay, unless they are among these; one with other categories is set aside.
    """
    detections = list(detections)
    categories = {i: {"id": i, "name": n} for _, found in detections for i, n in enumerate(found.categories) if n}
    images, annotations = _earlier(path, {name for name, _ in detections}, categories)
    for number, (file_name, found) in enumerate(detections, 1 + max((image["id"] for image in images), default=0)):
        images.append({"id": number, "file_name": file_name, "width": found.size_wh[0], "height": found.size_wh[1]})
        for (x0, y0, x1, y1), score, label in zip(found.boxes_xyxy_px.tolist(), found.scores, found.labels):
            box = [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label),
                    "bbox": box,
                    "area": round(box[2] * box[3], 2),
                    "iscrowd": 0,
                    "score": round(float(score), 5),
                }
            )
    facts = {"images": images, "annotations": annotations, "categories": list(categories.values())}
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def _earlier(
    path: Path, new: set[str], categories: dict[int, dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(images, annotations) of a file that `write_coco` wrote before, without those of the `new` images."""
    if not path.is_file():
        return [], []
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["categories"] != list(categories.values()):
            raise ValueError("other categories")
        images = [image for image in facts["images"] if image["file_name"] not in new]
        stay = {image["id"] for image in images}
        annotations = [box for box in facts["annotations"] if box["image_id"] in stay]
    except (ValueError, KeyError, TypeError):
        set_aside(path)
        return [], []
    return images, [box | {"id": number} for number, box in enumerate(annotations, 1)]


@torch.inference_mode()
def predict_objects(
    model: nn.Module,
    image: Any,
    *,
    size: int | None = None,
    threshold: float = THRESHOLD,
    most: int = 100,
    names: Sequence[str] | None = None,
) -> Objects:
    """size: the short side at which the model sees the image (default: as a head of your own was trained; else 768).
    threshold: the least score that is
    kept; most: at most so many boxes. names: of the labels, where the model has none."""
    if not hasattr(model, "detect"):
        raise DinoError(f"detection needs a detection head on a backbone, not a {type(model).__name__}")
    if not 0 <= threshold <= 1:
        raise DinoError(f"a threshold is a score between 0 and 1, not {threshold}")
    detector: Any = model
    # sides that are no multiples of the patch would lose their rest in the windows of the backbone
    seen = see(model, image, chosen_preprocessing(model, size, SIZE).with_(multiple=16, fit="resize"))
    x = seen.x[0].to(next(model.parameters()).dtype)
    (found,) = detector.detect([x], [seen.size_hw], score_threshold=threshold, most=most)
    categories = names_of(model, len(detector.class_names), names, known_names.coco())
    labels = found.labels.cpu().numpy()
    return Objects(
        found.boxes_xyxy_px.float().cpu().numpy(),
        found.scores.float().cpu().numpy(),
        labels,
        tuple(categories[i] or f"class {i}" for i in labels),
        seen.image,
        seen.image.size,
        categories,
        colours_of(model, len(categories)),
    )
