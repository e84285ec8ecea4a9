"""Segmentation as `torch.hub` sees it: `dinov3_vit7b16_ms`, Mask2Former for the 150 classes of ADE20K.

    segmentor = torch.hub.load(REPO, "dinov3_vit7b16_ms", source="local",
                               weights="head.pth", backbone_weights="vit7b16.pth")
    class_map = make_inference(images, segmentor, "slide", "m2f", rescale_to=(height, width), n_output_channels=150,
                               crop_size=(896, 896), stride=(596, 596)).argmax(1)

Differences from the reference: the whole model comes in evaluation mode and its backbone frozen, no model moves to a GPU
by itself, images may have any size of a patch or more, and "random" as weights draws fresh ones. As there, autocast
is for accelerators; on the CPU everything is computed in the parameters' own precision.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from dinov3.errors import UnknownName, WeightsMismatch
from dinov3.heads.mask2former.model import Mask2FormerSegmentor, build_segmentor
from dinov3.hub import head, headfiles
from dinov3.hub.backbones import Weights
from dinov3.weights import loading


class SegmentorWeights(Enum):
    """The data sets that published segmentation heads were trained on."""

    ADE20K = "ADE20K"


# Options of `build_segmentor` on each backbone a head may stand on; for a ViT-L no file was published.
OPTIONS: dict[str, dict[str, Any]] = {"dinov3_vit7b16": {"ffn": 4096}, "dinov3_vitl16": {"ffn": 4096}}


def dinov3_vit7b16_ms(
    *,
    pretrained: bool = True,
    weights: SegmentorWeights | str | os.PathLike[str] = SegmentorWeights.ADE20K,
    backbone_weights: Weights | str | os.PathLike[str] = Weights.LVD1689M,
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.bfloat16,
    hidden_dim: int = 2048,
    hash: str | None = None,
    **options: Any,
) -> Mask2FormerSegmentor:
    """ViT-7B/16 with adapter and Mask2Former head: normalised images [B, 3, H, W] → `pred_logits` [B, 100, 151] and
    `pred_masks` [B, 100, H/4, W/4]; class maps come from `make_inference(…, decoder_head_type="m2f")`.

    `weights`: adapter and head, `backbone_weights`: the 7B; each a path, URL or enum member, or "random".
    `autocast_dtype`: for accelerators; float32 switches it off. `hidden_dim`: the head's width. `hash`: another ending of
    the published head's name. `options`: `device`, `dtype`, `n_classes` and constructor arguments of the backbone.
    """
    return make_segmentor(
        "dinov3_vit7b16_ms",
        "dinov3_vit7b16",
        pretrained=pretrained,
        weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
        autocast_dtype=autocast_dtype,
        hidden_dim=hidden_dim,
        hash=hash,
        **options,
    )


def make_segmentor(
    name: str,
    arch: str,
    *,
    pretrained: bool = True,
    weights: SegmentorWeights | str | os.PathLike[str],
    backbone_weights: Weights | str | os.PathLike[str],
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.bfloat16,
    hidden_dim: int = 2048,
    n_classes: int = 150,
    hash: str | None = None,
    **options: Any,
) -> Mask2FormerSegmentor:
    """The published kind of segmentor on a backbone."""
    row = head(name)
    if arch not in OPTIONS:
        raise UnknownName(f"{name} stands on {' or '.join(OPTIONS)}, not on {arch!r}")
    built = OPTIONS[arch] | {"n_classes": n_classes, "hidden_dim": hidden_dim, "autocast_dtype": autocast_dtype}
    asked = headfiles.chosen(SegmentorWeights, weights)
    file = headfiles.opened(row, asked, pretrained=pretrained, hash=hash, check_hash=check_hash)
    vit: Any = headfiles.backbone(
        row, arch, backbone_weights if pretrained else "random", check_hash=check_hash, **options
    )
    vit.requires_grad_(False)
    if not file.fresh:
        check(file.state, file.source, width=vit.embed_dim, hidden_dim=hidden_dim, n_classes=n_classes)
    with nullcontext() if file.fresh else torch.device("meta"):
        model = build_segmentor(vit, **built)
    pyramid: Any = model.pyramid
    pyramid.backbone = None  # for a moment: files hold everything else, and the backbone is where and what it should be
    if file.fresh:
        model.to(next(vit.parameters()).device, options.get("dtype"))
    else:
        what = "the adapter and Mask2Former head"
        headfiles.fill(model, file.state, what=what, source=file.source, like=vit, dtype=options.get("dtype"))
    pyramid.backbone = vit
    model.origin = headfiles.origin(row, file.source, vit, notes=file.notes)  # type: ignore[assignment]
    return model.eval()


def check(state: Mapping[str, Tensor], source: str, *, width: int, hidden_dim: int, n_classes: int) -> None:
    """The three numbers that people mix up, in one sentence each; everything else is for `headfiles.fill` to say."""

    def size(key: str, dim: int) -> int | None:
        value = state.get("segmentation_model." + key)
        return value.shape[dim] if value is not None and value.ndim > dim else None

    head_in = f"the head in {loading.shown(source)}"
    if (found := size("0.level_embed", 1)) not in (None, width):
        raise WeightsMismatch(
            f"{head_in} was trained on a backbone of width {found}, this one has {width}: load the one it belongs to"
        )
    if (found := size("1.predictor.query_feat.weight", 1)) not in (None, hidden_dim):
        raise WeightsMismatch(f"{head_in} is {found} wide, not {hidden_dim}: pass hidden_dim={found}")
    found = size("1.predictor.class_embed.bias", 0)
    if found is not None and found - 1 != n_classes:  # the last is no class
        raise WeightsMismatch(f"{head_in} tells {found - 1} classes apart, not {n_classes}: pass n_classes={found - 1}")
