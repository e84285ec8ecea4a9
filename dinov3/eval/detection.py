"""Detection: COCO's average precision of a detector over a frozen backbone (paper §6.3.1, Tab. 10).

    dinov3 eval detection dataset=CocoDetection:root=/data/coco:split=val2017 \\
        head_weights=HEAD.pth backbone_weights=7B.pth --output-dir=OUT
    dinov3 eval detection load_from=raccoon.safetensors dataset=VocDetection:root=/data/raccoon --output-dir=OUT

The paper's protocol: the short side to 2048 pixels, both sides rounded up to multiples of 16, boxes brought back to the
original image, at most 100 an image and class in the scorer. With tta.enable: the same at eight short sides and
mirrored, merged by SoftNMS (66.1 instead of 65.6 in the paper). A detector of other classes than the data set's is
scored on those whose names both have.

Results: results-detection.csv and .json (percent: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl),
per-class.csv, and with save_results=true detections.json in the form of COCO's results files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.config.bounds import Problem, setting
from dinov3.data.datasets.detection import BoxDataset, make_box_dataset
from dinov3.data.transforms.dense import DetectionTransform, flipped
from dinov3.errors import DinoError
from dinov3.eval import dense
from dinov3.eval import session as common
from dinov3.eval.arguments import EvalConfig
from dinov3.eval.session import Session
from dinov3.inference import cast_of
from dinov3.metrics import box_average_precision, soft_nms

PAPER_SIDE = 2048
Found = dict[str, Tensor]


@dataclass
class TtaSection:
    """Test-time augmentation: every short side, mirrored or not, merged by SoftNMS."""

    enable: bool = False
    short_sides: list[int] = field(default_factory=lambda: [1536, 1728, 1920, 2112, 2304, 2496, 2688, 2880])
    flip: bool = True
    sigma: float = 0.5  # of SoftNMS; the paper does not say


@dataclass
class DetectionConfig(EvalConfig):
    """Keys as the dense evaluations name them; no script of this task was published."""

    POSITIONAL = (("DATASET", "dataset"),)

    # CocoDetection:root=…:split=val2017, VocDetection:root=…
    dataset: str = setting("", required="dataset=CocoDetection:root=FOLDER:split=val2017 or VocDetection:root=FOLDER")
    load_from: str = "dinov3_vit7b16_de"  # or a head file
    head_weights: str | None = None  # where the published head lies
    backbone_weights: str | None = None  # and its backbone, or that of a head file
    # pixels; null: what a head file was trained at, 2048 for the published head
    short_side: int | None = setting(None, at_least=16)
    long_at_most: int | None = None  # pixels; null: nothing bounds the long side
    most: int = setting(300, at_least=1)  # detections per image
    tta: TtaSection = field(default_factory=TtaSection)
    limit: int = setting(0, at_least=0)  # only the first images; 0: all

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.tta.enable and (not self.tta.short_sides or min(self.tta.short_sides) < 16):
            yield "tta.short_sides", f"is a list of at least one side of 16 pixels or more, not {self.tta.short_sides}"


# ---- a detector on images ----------------------------------------------------------------------------------------


@torch.inference_mode()
def detect_view(
    model: Any, transform: DetectionTransform, image: Any, device: Any, *, mirrored: bool = False, most: int = 300
) -> Found:
    """One view of one image: `boxes_xyxy_px` in its own pixels, `scores`, `labels`, best first."""
    x, size_hw = transform.image(image)
    x = x.to(device)
    (found,) = model.detect([x.flip(-1) if mirrored else x], [size_hw], most=most)
    boxes = found.boxes_xyxy_px.float().cpu()
    result = {"boxes_xyxy_px": boxes, "scores": found.scores.float().cpu(), "labels": found.labels.cpu()}
    return flipped(result, size_hw[1]) if mirrored else result


def detect_views(
    model: Any, transforms: Sequence[DetectionTransform], image: Any, device: Any, config: DetectionConfig
) -> Found:
    """All views of one image, merged where there are several."""
    mirrored = (False, True) if config.tta.enable and config.tta.flip else (False,)
    every = [
        detect_view(model, transform, image, device, mirrored=m, most=config.most)
        for transform in transforms
        for m in mirrored
    ]
    if len(every) == 1:
        return every[0]
    together = {key: torch.cat([found[key] for found in every]) for key in every[0]}
    boxes, scores, labels = soft_nms(
        together["boxes_xyxy_px"], together["scores"], together["labels"], sigma=config.tta.sigma, most=config.most
    )
    return {"boxes_xyxy_px": boxes, "scores": scores, "labels": labels}


def label_map(model_names: Sequence[str], data: BoxDataset) -> Tensor:
    """[K] for each column of the class head: the data set's class of the same name, −1 where there is none.

    A detector without names counts as the data set does, if it has as many classes."""
    unnamed = all(name == f"class {i}" for i, name in enumerate(model_names))
    if unnamed and len(model_names) == len(data.class_names):
        return torch.arange(len(model_names))
    number = {_plain(name): i for i, name in enumerate(data.class_names)}
    mapped = torch.tensor([number.get(_plain(name), -1) if name else -1 for name in model_names])
    if not (mapped >= 0).any():
        raise DinoError(
            f"the detector ({_some(model_names)}) and the data set ({_some(data.class_names)}) have no class in common"
        )
    return mapped


def _plain(name: str) -> str:
    return name.strip().lower()


def _some(names: Sequence[str]) -> str:
    shown = [name for name in names if name]
    return ", ".join(shown[:3]) + (", …" if len(shown) > 3 else "")


def in_classes_of(found: Found, mapped: Tensor) -> Found:
    """Detections with the data set's labels; those of classes that it has not are dropped."""
    labels = mapped[found["labels"]]
    return {key: value[labels >= 0] for key, value in (found | {"labels": labels}).items()}


# ---- the evaluation ------------------------------------------------------------------------------------------------


def open_detector(config: DetectionConfig, session: Session) -> tuple[Any, int]:
    """(the detector of `load_from` in evaluation mode, the short side of its input)."""
    model = dense.existing_model("detect", config, session, dtype=cast_of(config.model.precision))
    info = getattr(model, "head_info", None)
    return model, config.short_side or (PAPER_SIDE if info is None else info.preprocessing.size)


def evaluate(config: DetectionConfig, session: Session) -> Mapping[str, float | None]:
    """COCO's numbers in percent; each process takes its share of the images."""
    data = make_box_dataset(config.dataset)
    model, short = open_detector(config, session)
    mapped = label_map(model.class_names, data)
    missing = [name for i, name in enumerate(data.class_names) if i not in mapped.tolist()]
    if missing:
        session.log(
            f"note: the detector does not know {len(missing)} of {len(data.class_names)} classes: {_some(missing)}"
        )
    origin: Any = getattr(model, "origin", None)
    if origin is not None and origin.random:
        session.log("the weights are RANDOM: the numbers say what chance gives")
    mean, std = dense.statistics(model)
    base = DetectionTransform(
        short=short,
        multiple=model.detector.backbone[0].patch,
        long_at_most=config.long_at_most,
        mean=tuple(255 * v for v in mean),
        std=tuple(255 * v for v in std),
    )
    sides = config.tta.short_sides if config.tta.enable else [short]
    transforms = [DetectionTransform(**(vars(base) | {"short": side})) for side in sides]
    total = min(config.limit, len(data)) if config.limit else len(data)
    scored: list[tuple[Found, dict[str, Tensor]]] = []
    for number in session.shared(range(total), "images"):
        image, target = data[number]
        scored.append((in_classes_of(detect_views(model, transforms, image, session.device, config), mapped), target))
    every = distributed.gather_shares(scored)
    results, per_class = box_average_precision([f for f, _ in every], [t for _, t in every], data.class_names)
    if session.run.writer:
        common.write_table(session.output / "per-class.csv", per_class)
        if config.save_results:
            write_detections(session, data, every)
    return {"images": total, **results}


def write_detections(session: Session, data: BoxDataset, every: Sequence[tuple[Found, Any]]) -> None:
    """detections.json: images by the data set's ids, classes by its category ids, boxes as left, top, width, height."""
    rows = []
    for number, (found, _) in enumerate(every):
        for (x1, y1, x2, y2), score, label in zip(
            found["boxes_xyxy_px"].tolist(), found["scores"].tolist(), found["labels"].tolist()
        ):
            box = [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)]
            rows.append(
                {
                    "image_id": data.image_id(number),
                    "category_id": data.category_ids[label],
                    "bbox": box,
                    "score": round(score, 5),
                }
            )
    (session.output / "detections.json").write_text(json.dumps(rows), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    return common.main("detection", DetectionConfig, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
