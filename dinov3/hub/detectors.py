"""Objects in boxes as `torch.hub` sees it: `dinov3_vit7b16_de`, the 7B with a detector trained on COCO.

    detector = torch.hub.load(REPO, "dinov3_vit7b16_de", source="local",
                              weights="head.pth", backbone_weights="vit7b16.pth")
    (found,) = detector([image])  # a list of normalised [3, H, W]; scores [1500], labels [1500] (COCO), boxes [1500, 4]
    detector.detect([image], score_threshold=0.5)  # fewer, with names

Differences from the reference: everything comes in evaluation mode (there the encoder's dropout is on until `.eval()`);
the head's file must hold every entry of the head, and what else it holds is said; images of any size are taken, also
those whose last window or coarsest proposals would be empty; "random" as weights draws fresh ones.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from dinov3.data import names
from dinov3.errors import UnknownName, WeightsMismatch
from dinov3.heads.detr.model import DetectorWithProcessor, build_detector
from dinov3.heads.detr.transformer import DetrConfig
from dinov3.hub import head, headfiles
from dinov3.hub.backbones import Weights
from dinov3.weights import loading


class DetectionWeights(Enum):
    """The data sets that published detectors were trained on."""

    COCO2017 = "COCO2017"


# What a detector is on each backbone it may stand on; one on a ViT-L+ was never published.
OPTIONS: dict[str, dict[str, Any]] = {
    "dinov3_vit7b16": asdict(DetrConfig(windows=3)),
    "dinov3_vitl16plus": asdict(DetrConfig(windows=2)),
}
# In files the decoder's own copies of the heads are the heads.
COPIES = {f"transformer.decoder.{name}.": f"{name}." for name in ("class_embed", "bbox_embed")}


def dinov3_vit7b16_de(
    *,
    pretrained: bool = True,
    weights: DetectionWeights | str | os.PathLike[str] = DetectionWeights.COCO2017,
    backbone_weights: Weights | str | os.PathLike[str] = Weights.LVD1689M,
    check_hash: bool = False,
    hash: str | None = None,
    **options: Any,
) -> DetectorWithProcessor:
    """ViT-7B/16 with the COCO detector: a list of normalised images [3, H_i, W_i] → 1500 boxes in each.

    `weights`: the head, `backbone_weights`: the 7B; each a path, URL or enum member, or "random". `hash`: another ending
    of the published head's name. `options`: `device`, `dtype` and constructor arguments of the backbone. The backbone is
    frozen, the model in evaluation mode.
    """
    return make_detector(
        "dinov3_vit7b16_de",
        "dinov3_vit7b16",
        pretrained=pretrained,
        weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
        hash=hash,
        **options,
    )


def make_detector(
    name: str,
    arch: str,
    *,
    pretrained: bool = True,
    weights: DetectionWeights | str | os.PathLike[str],
    backbone_weights: Weights | str | os.PathLike[str],
    check_hash: bool = False,
    hash: str | None = None,
    **options: Any,
) -> DetectorWithProcessor:
    """A published kind of detector on a backbone of `OPTIONS`."""
    row = head(name)
    if arch not in OPTIONS:
        raise UnknownName(f"{name} stands on {' or '.join(OPTIONS)}, not on {arch!r}")
    sizes, dtype = OPTIONS[arch], options.get("dtype")
    asked = headfiles.chosen(DetectionWeights, weights)
    file = headfiles.opened(row, asked, pretrained=pretrained, hash=hash, check_hash=check_hash)
    vit: Any = headfiles.backbone(
        row, arch, backbone_weights if pretrained else "random", check_hash=check_hash, **options
    )
    vit.requires_grad_(False)
    class_names = names.coco() if sizes["n_classes"] == 91 else None
    notes = list(file.notes)
    if file.fresh:
        model = build_detector(vit, class_names=class_names, **sizes)
        for child, part in model.detector.named_children():
            if child != "backbone":  # which is where and what it was asked to be
                part.to(next(vit.parameters()).device, dtype)
    else:
        with torch.device("meta"):
            model = build_detector(vit, class_names=class_names, **sizes)
        notes += fill(model, file.state, source=file.source, dtype=dtype)
    model.origin = headfiles.origin(row, file.source, vit, notes=notes)  # type: ignore[assignment]
    return model.eval()


def fill(
    model: DetectorWithProcessor, state: Mapping[str, Tensor], *, source: str, dtype: torch.dtype | None = None
) -> list[str]:
    """A detector (its head built without values) takes a file's; what a careful person would want to know about that.

    Every entry of the head must be there, under one of its two names where it has two. The reference loads without any
    check, and nobody but Meta has seen the file's exact keys: so a backbone in it replaces the one given, and anything
    else is left over, a warning and a note.
    """
    detector, shown = model.detector, loading.shown(source)
    state = {k.removeprefix("detector."): v for k, v in state.items()}
    expected, own = detector.state_dict(), detector.backbone_key
    for copy, original in COPIES.items():
        for key in expected:
            if key.startswith(copy):
                other = original + key.removeprefix(copy)
                for there, lacking in ((key, other), (other, key)):
                    if there in state:
                        state.setdefault(lacking, state[there])
    inside = {k for k in state if k.startswith(own)}
    below, notes = model.detector.frozen, []
    wanted = {k: v for k, v in expected.items() if not k.startswith(own)}
    missing = sorted(wanted.keys() - state.keys())
    wrong = sorted(k for k in wanted.keys() & state.keys() if wanted[k].shape != state[k].shape)
    if missing or wrong:
        lines = [f"{shown} does not hold the detector's head ({len(wanted)} entries)"]
        lines += [f"  missing in the file: {headfiles.some(missing)}"] if missing else []
        lines += [
            f"  {k}: {tuple(state[k].shape)} in the file, {tuple(wanted[k].shape)} in the head" for k in wrong[:2]
        ]
        if "cls_token" in state or "embeddings.cls_token" in state:
            lines.append("  the file is a backbone: pass it as backbone_weights, and the head's file as weights")
        raise WeightsMismatch("\n".join(lines))
    device = next(below.parameters()).device
    taken = {k: state[k].to(device, dtype if state[k].is_floating_point() else None) for k in wanted}
    detector.load_state_dict(taken, strict=False, assign=True)
    if inside:
        given = below.state_dict()
        theirs = {k.removeprefix(own): state[k] for k in inside}
        if theirs.keys() != given.keys() or any(theirs[k].shape != given[k].shape for k in given):
            raise WeightsMismatch(
                f"{shown} holds a backbone beside the head ({len(inside)} entries), and it is not the {len(given)} "
                "entries of this one: remove the keys below " + own
            )
        below.load_state_dict({k: v.to(given[k]) for k, v in theirs.items()})
        notes.append(f"{shown} holds a backbone of its own ({len(inside)} entries), which is used")
    if left := sorted(state.keys() - expected.keys()):
        notes.append(f"left over in {shown}: {headfiles.some(left)}")
        warnings.warn(notes[-1], stacklevel=4)
    assert not any(p.is_meta for p in model.parameters())
    return notes
