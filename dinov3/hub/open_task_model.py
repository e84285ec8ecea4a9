"""A task model (backbone and head) by what people name: a published head, a head file of their own, or an untrained head.

Tasks are those of the commands: classify, segment, depth, canopy, detect.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov3.errors import DinoError, WeightsError
from dinov3.hub import HEADS, head, load
from dinov3.hub.own_heads import METADATA, build_head, load_head, read_head_info
from dinov3.hub.published_heads import placed
from dinov3.weights.catalog import DOWNLOAD_PAGE, FILES
from dinov3.weights.reading import read

# task → (published head, its name in own head files, kind and options of an untrained head)
TASKS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "classify": ("dinov3_vit7b16_lc", "classification", "linear", {"n_classes": 1000}),
    "segment": ("dinov3_vit7b16_ms", "segmentation", "linear", {"n_classes": 150}),
    "depth": ("dinov3_vit7b16_dd", "depth", "dpt", {}),
    "canopy": ("dinov3_vitl16_chmv2", "depth", "dpt", {"max_depth": 96.0}),
    "detect": ("dinov3_vit7b16_de", "detection", "detr", {"n_classes": 91}),
}
# Heads of our own on the small model, files of the package: what a command uses where no weights are named.
SHIPPED = {"classify": "dinov3_vitt16_classify.safetensors", "segment": "dinov3_vitt16_segment.safetensors"}
AUTOCAST = ("segment", "depth", "canopy")  # whose published functions take autocast_dtype


def open_task_model(
    task: str,
    source: str | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    backbone_weights: str | os.PathLike[str] | None = None,
    backbone: nn.Module | None = None,
    device: Any = "cpu",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """The model of a published head's name (None: the one of the task) or of an own head file, in evaluation mode.

    weights: the published head's file, "random" without backbone_weights for an untrained model. backbone: what an own
    head stands on, instead of backbone_weights and of what its file names. options: of the published function. Raises
    `DinoError` for a head of another task, and what the openers raise.
    """
    if (
        source is not None
        and source not in HEADS
        and (os.path.exists(source) or Path(source).name != Path(source).stem)
    ):
        info = read_head_info(source)
        _same_task(source, info.task, TASKS[task][1])
        model = load_head(source, backbone=backbone, backbone_weights=backbone_weights)
        return placed(model, device, dtype)
    row = head(source or TASKS[task][0])
    _same_task(row.name, row.task, task)
    files = {"weights": weights, "backbone_weights": backbone_weights}
    given: dict[str, Any] = {name: file for name, file in files.items() if file is not None}
    if weights == "random" and backbone_weights is None:
        given = {"pretrained": False}
    return row.function(**given, device=device, dtype=dtype, **options).eval()


def shipped_head(task: str) -> Path:
    """The head file that the package has for a task. Raises `WeightsError` that says what to get where it has none."""
    if task in SHIPPED:
        return FILES / SHIPPED[task]
    published = "dino.txt" if task == "zero-shot" else TASKS[task][0]
    own = "" if task == "zero-shot" else f"; or a head of your own: --head FILE (`dinov3 train-head {TASKS[task][1]}`)"
    raise WeightsError(
        f"{task} needs weights that do not ship: Meta's {published}, free to request at {DOWNLOAD_PAGE}, as "
        f"--weights HEAD --backbone-weights BACKBONE{own}.\nTo see the form of the output without them: --weights random"
    )


def untrained_model(
    task: str, backbone_weights: Any = None, *, device: Any = "cpu", dtype: Any = None, **options: Any
) -> nn.Module:
    """An untrained head of the task over a backbone (None: the small model that ships), to try a command."""
    _, own, kind, default = TASKS[task]
    under: Any = load(None, backbone_weights)
    return placed(build_head(own, kind, under, **default | options).eval(), device, dtype)


def is_head_file(path: str) -> bool:
    """Whether it is a head file of ours, which knows its backbone and its options."""
    return os.path.isfile(path) and METADATA in read(path)[1]


def verb_of(task: str) -> str:
    """The command for a task, by either of its names."""
    return "zero-shot" if task == "text" else next((v for v, row in TASKS.items() if task in (v, row[1])), task)


def _same_task(source: str, found: str, wanted: str) -> None:
    depths = {"depth", "canopy"}
    if found != wanted and not {found, wanted} <= depths:
        raise DinoError(f"{source} is a head for {found}, not for {wanted}: use `dinov3 {verb_of(found)}`")
