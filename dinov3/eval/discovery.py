"""Unsupervised object discovery: TokenCut's box of every image against the annotated ones, CorLoc (paper §6.1.4, Fig. 14).

Images at their own size, zeros to the right and below up to a multiple of the patch. The threshold τ of the graph is
chosen per backbone among 0, 0.05, …, 0.4 on the same images, as in the paper; all are reported.

CorLoc: percent of images whose box overlaps some annotated one with IoU of at least 0.5. Without the tiny constants of
the public code, which only turn exact ties into misses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.config.bounds import setting
from dinov3.data.datasets.detection import BoxDataset, CocoDetection, make_box_dataset
from dinov3.dense.discovery import box_in_image, cosines, cut
from dinov3.errors import DinoError
from dinov3.eval import session as common
from dinov3.eval.arguments import EvalConfig
from dinov3.eval.session import Session
from dinov3.features import default_preprocessing, embed
from dinov3.metrics import overlap


@dataclass
class DiscoveryConfig(EvalConfig):
    POSITIONAL = (("DATASET", "data"),)

    # VocDetection:root=…/VOC2007:split=trainval, CocoDetection:root=…:split=train2014, …
    data: str = setting("", required="data=VocDetection:root=FOLDER:split=trainval, or CocoDetection:…")
    names: str | None = None  # a file of image names, one a line: only these (COCO20k)
    limit: int | None = setting(None, at_least=1)  # the first so many images
    taus: list[float] = setting([round(0.05 * i, 2) for i in range(9)], required="at least one threshold")
    epsilon: float = 1e-5
    patches: int | None = setting(None, at_least=1)  # on the short side; null: the images' own size
    layer: int = -1
    norm: bool = True
    iou: float = 0.5


def corloc(hits: Tensor) -> Tensor:
    """Percent [T] of images found, from hits [N, T] for T thresholds."""
    if not len(hits):
        raise DinoError("no image has an annotated box: nothing can be scored")
    return 100 * hits.double().mean(0)


def is_hit(box: Sequence[float], truth: Tensor, least: float = 0.5) -> bool:
    """Whether a box (x0, y0, x1, y1) overlaps one of the annotated ones [T, 4] with an IoU of at least `least`."""
    return bool((overlap(torch.tensor([list(box)]), truth)[0] >= least).any())


def boxes_of(
    model: nn.Module, image: Any, config: DiscoveryConfig
) -> list[tuple[float, float, float, float]]:  # fmt: skip
    """TokenCut's box in the image's pixels, for every τ; the cosines are computed once."""
    backbone: Any = model
    size: dict[str, Any] = {"shape": "native"}
    if config.patches is not None:
        size = {"shape": "short", "size": config.patches * backbone.stride}
    preprocessing = default_preprocessing(model, fit="pad", **size)
    features = embed(model, image, preprocessing=preprocessing, layer=config.layer, norm=config.norm)
    similarity = cosines(features)
    found = (cut(similarity, features.grid_hw, tau=tau, epsilon=config.epsilon) for tau in config.taus)
    return [box_in_image(c, features) for c in found]


def chosen(data: BoxDataset, config: DiscoveryConfig) -> list[int]:
    """Indices of the images that are evaluated."""
    rows = list(range(len(data)))
    if config.names is not None:
        file = Path(config.names).expanduser()
        if not file.is_file():
            raise DinoError(f"names={file} is no file")
        wanted = {Path(line.strip()).name for line in file.read_text().splitlines() if line.strip()}
        rows = [i for i in rows if Path(data.name(i)).name in wanted]
        if not rows:
            raise DinoError(f"none of the {len(wanted)} names in {file} is an image of {config.data}")
    return rows[: config.limit]


def annotated(data: BoxDataset, index: int, size_hw: tuple[int, int]) -> Tensor:
    """Ground-truth boxes [T, 4]: VOC's with the difficult ones; COCO's rounded, without crowds."""
    target = data.target(index, size_hw)
    boxes: Tensor = target["boxes_xyxy_px"]
    return boxes[~target["crowd"]].round() if isinstance(data, CocoDetection) else boxes


def evaluate(config: DiscoveryConfig, session: Session) -> dict[str, float]:
    data = make_box_dataset(config.data)
    rows = chosen(data, config)
    model = session.model(config.model)
    hits: list[list[bool]] = []
    for i in session.shared(rows, "images"):
        image, _ = data[i]
        truth = annotated(data, i, (image.height, image.width))
        if len(truth):  # an image without objects cannot be right
            hits.append([is_hit(box, truth, config.iou) for box in boxes_of(model, image, config)])
    every = distributed.all_gather(
        torch.tensor(hits, dtype=torch.bool, device=session.device).reshape(-1, len(config.taus))
    )
    found = corloc(every.cpu())
    best = int(found.argmax())
    results: dict[str, Any] = {"CorLoc": float(found[best]), "tau": config.taus[best], "images": len(every)}
    return results | {f"CorLoc tau={t:g}": float(v) for t, v in zip(config.taus, found)}


def main(argv: Sequence[str] | None = None) -> int:
    return common.main("discovery", DiscoveryConfig, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
