"""The linear ImageNet-1k classifier as `torch.hub` sees it: `dinov3_vit7b16_lc`.

    classifier = torch.hub.load(REPO, "dinov3_vit7b16_lc", source="local",
                                weights="head.pth", backbone_weights="vit7b16.pth")
    logits = classifier(images)  # [B, 1000]

Differences from the reference, all on the side of telling: the model comes in evaluation mode (there in training mode);
`check_hash` reaches the head as well where its name holds a hash; "random" as weights draws fresh ones.
"""

from __future__ import annotations

import os
from enum import Enum
from typing import Any, cast

import torch
from torch import nn

from dinov3.heads.linear import LinearClassifier
from dinov3.hub import head, headfiles
from dinov3.hub.backbones import Weights

N_CLASSES = 1000


class ClassifierWeights(Enum):
    """The data sets that published linear classifiers were trained on."""

    IMAGENET1K = "IMAGENET1K"


def dinov3_vit7b16_lc(
    *,
    pretrained: bool = True,
    weights: ClassifierWeights | str | os.PathLike[str] = ClassifierWeights.IMAGENET1K,
    backbone_weights: Weights | str | os.PathLike[str] = Weights.LVD1689M,
    check_hash: bool = False,
    hash: str | None = None,
    **options: Any,
) -> LinearClassifier:
    """ViT-7B/16 with a linear layer over [CLS ; mean patch]: normalised images [B, 3, H, W] → logits [B, 1000].

    `weights`: the head, `backbone_weights`: the 7B; each a path, URL or enum member, or "random". `hash`: another ending
    of the published head's name. `options`: `device`, `dtype` and constructor arguments of the backbone.
    """
    return make_classifier(
        "dinov3_vit7b16_lc", "dinov3_vit7b16", pretrained, weights, backbone_weights, check_hash, hash, **options
    )


def make_classifier(
    name: str,
    arch: str,
    pretrained: bool,
    weights: ClassifierWeights | str | os.PathLike[str],
    backbone_weights: Weights | str | os.PathLike[str],
    check_hash: bool = False,
    hash: str | None = None,
    **options: Any,
) -> LinearClassifier:
    row = head(name)
    asked = headfiles.chosen(ClassifierWeights, weights)
    file = headfiles.opened(row, asked, pretrained=pretrained, hash=hash, check_hash=check_hash)
    vit: Any = headfiles.backbone(
        row, arch, backbone_weights if pretrained else "random", check_hash=check_hash, **options
    )
    if file.fresh:
        linear = nn.Linear(2 * vit.embed_dim, N_CLASSES)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        weight = next(vit.parameters())
        linear = linear.to(weight.device, options.get("dtype"))
    else:
        state = {k.removeprefix("linear_head."): v for k, v in file.state.items()}
        with torch.device("meta"):
            linear = nn.Linear(2 * vit.embed_dim, N_CLASSES)
        headfiles.fill(
            linear,
            state,
            what="the linear ImageNet-1k classifier",
            source=file.source,
            like=vit,
            dtype=options.get("dtype"),
        )
    model = LinearClassifier(vit, linear).eval()
    model.origin = headfiles.origin(row, file.source, vit, notes=file.notes)  # type: ignore[assignment]
    return cast(LinearClassifier, model)
