"""The detector: boxes with classes from a frozen backbone (paper §6.3, App. D.1), a plain DETR in two stages.

`build_detector` puts it on any backbone with sizes of its own; the defaults of `DetrConfig` are Meta's over the 7B.
The transformer is in `heads.detr.transformer`, its input in `heads.detr.features`, the losses in `heads.detr.loss`.

Legend: B images, Q queries, K classes. Boxes are (centre, size) in pixels of the images given, unless a name says
xyxy. Attribute names that end up in files are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.errors import DinoError
from dinov3.heads.detr.features import (
    ConcatenatedLayers,
    NamedNorm,
    Windows,
    batched,
    clip_xyxy,
    detector_layers,
    detector_patch,
    detector_windows,
    nearest,
    to_xyxy,
)
from dinov3.heads.detr.transformer import BoxMLP, DetrConfig, Transformer
from dinov3.heads.encoder import dtype_of
from dinov3.models.base import Backbone


class Detector(nn.Module):
    """Normalised images, a list of [3, H_i, W_i] in any sizes → logits and boxes of every query and layer.

    The backbone is frozen and stays in evaluation mode. In training mode `n_queries_one2many` more queries are used, in a
    group of their own ("hybrid matching", arXiv 2207.13080).
    """

    def __init__(self, features: ConcatenatedLayers | Windows, config: DetrConfig) -> None:
        super().__init__()
        c = self.config = config
        heads = c.decoder_layers + 1  # one per layer, and the proposals'
        class_embed = nn.ModuleList(nn.Linear(c.width, c.n_classes) for _ in range(heads))
        bbox_embed = nn.ModuleList(BoxMLP(c.width) for _ in range(heads))
        self.transformer = Transformer(c, class_embed, bbox_embed)
        self.class_embed, self.bbox_embed = class_embed, bbox_embed
        self.query_embed = nn.Embedding(c.n_queries + c.n_queries_one2many, c.width)
        self.input_proj = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(features.channels, c.width, kernel_size=1), nn.GroupNorm(32, c.width))]
        )
        self.backbone = nn.ModuleList([features])

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fresh weights of everything but the backbone. Every class begins at 1 %, every box as its proposal."""
        for module in self.head_modules():
            if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                module.reset_parameters()
            if isinstance(module, NamedNorm):
                nn.init.ones_(module.ln.weight)
                nn.init.zeros_(module.ln.bias)
        for name, p in self.transformer.named_parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for module in self.transformer.decoder.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.normal_(self.transformer.level_embed)
        nn.init.normal_(self.query_embed.weight)
        project: Any = self.input_proj.get_submodule("0.0")
        nn.init.xavier_uniform_(project.weight)
        nn.init.zeros_(project.bias)
        for to_class in self.class_embed:
            assert isinstance(to_class, nn.Linear)
            nn.init.constant_(to_class.bias, -math.log(99))
        for to_box in self.bbox_embed:
            last: Any = to_box.get_submodule("layers.2")
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def head_modules(self) -> list[nn.Module]:
        """Every module outside the frozen backbone."""
        frozen = set(self.frozen.modules())
        return [module for module in self.modules() if module not in frozen]

    @property
    def frozen(self) -> nn.Module:
        """The backbone itself."""
        return self.get_submodule(self.backbone_key.rstrip("."))

    @property
    def backbone_key(self) -> str:
        """What the backbone's entries in the state dict begin with."""
        return "backbone.0._backbone.backbone." if isinstance(self.backbone[0], Windows) else "backbone.0.backbone."

    def see(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor, bool]:
        """(features [B, C, h, w], padding [B, h, w], whether there is any)."""
        features: Any = self.backbone[0]
        check_images(images, features.patch)
        sides = [max(max(x.shape[i] for x in images), 4 * features.patch) for i in (-2, -1)]
        x, outside = batched(images, (features.smallest_side(sides[0]), features.smallest_side(sides[1])))
        seen = features(x)
        padded = any(tuple(image.shape[-2:]) != tuple(x.shape[-2:]) for image in images)
        return seen, nearest(outside, (seen.shape[-2], seen.shape[-1])), padded

    def forward(self, images: Sequence[Tensor]) -> dict[str, Any]:
        """`pred_logits` [B, Q, K], `pred_boxes`, `pred_boxes_old` (refined from), `pred_deltas` [B, Q, 4] of the last
        layer; the same with suffix `_one2many` (no rows in evaluation mode); `aux_outputs`, `aux_outputs_one2many`: lists
        of such for the layers before; `enc_outputs`: of all proposals."""
        seen, padding, padded = self.see(images)
        project = self.input_proj[0]
        features = project(seen.to(dtype_of(project)))
        c = self.config
        groups = (c.n_queries, c.n_queries_one2many) if self.training and c.n_queries_one2many else (c.n_queries,)
        sight: Any = self.backbone[0]
        layers, proposals, n = self.transformer(features, padding, sight.patch, self.query_embed.weight, groups, padded)
        one = [{name: value[:, :n] for name, value in layer.items()} for layer in layers]
        many = [{name: value[:, n:] for name, value in layer.items()} for layer in layers]
        outputs: dict[str, Any] = dict(one[-1])
        outputs |= {f"{name}_one2many": value for name, value in many[-1].items()}
        outputs |= {"aux_outputs": one[:-1], "aux_outputs_one2many": many[:-1], "enc_outputs": proposals}
        return outputs


def check_images(images: Sequence[Tensor], patch: int) -> None:
    """One sentence for a batch that is none."""
    if len(images) == 0:
        raise DinoError("the detector was given an empty list; it takes normalised images [3, height, width]")
    for i, x in enumerate(images):
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[0] != 3 or not x.is_floating_point():
            what = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise DinoError(
                f"image {i} of the list is {what}; the detector takes normalised images [3, height, width] in floating "
                "point"
            )
        if min(x.shape[-2:]) < patch:
            raise DinoError(
                f"image {i} of the list, {x.shape[-1]}×{x.shape[-2]} pixels, is smaller than one patch ({patch}); resize it"
            )


# ---- from queries to detections ------------------------------------------------------------------------------------


class PostProcess(nn.Module):
    """The best `topk` of all Q·K pairs of query and class: no suppression of overlaps, no threshold."""

    def __init__(self, topk: int) -> None:
        super().__init__()
        self.topk = topk

    @torch.no_grad()
    def forward(
        self, outputs: dict[str, Any], target_sizes: Tensor, original_target_sizes: Tensor | None = None
    ) -> list[dict[str, Tensor]]:
        """outputs with `pred_logits` and `pred_boxes`; target_sizes [B, 2]: height and width of the images given;
        original_target_sizes: of the images before they were resized (None: the same).

        → per image `scores` [n] descending, `labels` [n], `boxes` [n, 4] xyxy in pixels of the original image.
        """
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        original = target_sizes if original_target_sizes is None else original_target_sizes
        scores, index = logits.float().sigmoid().flatten(1).topk(min(self.topk, logits[0].numel()), dim=1)
        K = logits.shape[-1]
        size = target_sizes.to(boxes)[:, None]  # [B, 1, 2]
        corners = clip_xyxy(to_xyxy(boxes), size)
        corners = corners.gather(1, (index // K)[..., None].expand(-1, -1, 4))
        scale = (original.to(boxes)[:, None] / size).flip(-1).tile(2)
        found = zip(scores, index % K, corners * scale)
        return [{"scores": s, "labels": label, "boxes": box} for s, label, box in found]


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first."""

    boxes_xyxy_px: Tensor  # [n, 4] in pixels of the original image
    scores: Tensor  # [n] in 0 to 1
    labels: Tensor  # [n] columns of the class head
    names: tuple[str, ...]  # [n]

    def __len__(self) -> int:
        return len(self.scores)


class DetectorWithProcessor(nn.Module):
    """Images in, detections out. `class_names`: one per column of the class head ("" for columns without a class)."""

    def __init__(
        self, detector: Detector, postprocessor: PostProcess, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.detector, self.postprocessor = detector, postprocessor
        K = detector.config.n_classes
        self.class_names = tuple(class_names) if class_names is not None else tuple(f"class {i}" for i in range(K))
        if len(self.class_names) != K:
            raise DinoError(f"the detector has {K} classes and was given {len(self.class_names)} names")

    def forward(
        self, images: Sequence[Tensor], original_sizes_hw: Sequence[tuple[int, int]] | None = None
    ) -> list[dict[str, Tensor]]:
        """Normalised images [3, H_i, W_i] → per image `scores`, `labels`, `boxes` (xyxy, pixels of the tensor given,
        or of an image of original_sizes_hw of which the tensor is a resized copy)."""
        outputs = self.detector(images)
        device = outputs["pred_boxes"].device
        sizes = torch.tensor([tuple(x.shape[-2:]) for x in images], device=device)
        original = None
        if original_sizes_hw is not None:
            if len(original_sizes_hw) != len(images):
                raise DinoError(f"{len(original_sizes_hw)} sizes were given for {len(images)} images")
            original = torch.tensor([tuple(size) for size in original_sizes_hw], device=device)
        return self.postprocessor(outputs, sizes, original)

    @torch.no_grad()
    def detect(
        self,
        images: Sequence[Tensor],
        original_sizes_hw: Sequence[tuple[int, int]] | None = None,
        *,
        score_threshold: float = 0.0,
        most: int | None = None,
    ) -> list[Detections]:
        """As calling it, without those below `score_threshold` and those after the first `most`, and with names."""
        results = []
        for found in self(images, original_sizes_hw):
            n = int((found["scores"] >= score_threshold).sum())  # scores descend
            n = n if most is None else min(n, most)
            labels = found["labels"][:n]
            names = tuple(self.class_names[i] for i in labels.tolist())
            results.append(Detections(found["boxes"][:n], found["scores"][:n], labels, names))
        return results


def build_detector(
    backbone: Backbone,
    n_classes: int = 91,
    *,
    class_names: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **sizes: Any,
) -> DetectorWithProcessor:
    """A detector over a backbone, with a fresh head, in training mode (the backbone in evaluation mode).

    `sizes` are fields of `DetrConfig`; layers and windows follow the backbone unless given.
    """
    config = DetrConfig.of(n_classes=n_classes, **sizes)
    layers = config.layers if config.layers is not None else tuple(detector_layers(backbone))
    windows = config.windows if config.windows is not None else detector_windows(backbone)
    if windows and backbone.patch_size != backbone.stride:
        raise DinoError(
            "windows are for ViTs: a ConvNeXt's last map has strides of 32 and would not tile; pass windows=0"
        )
    if windows == 1 or windows < 0:
        raise DinoError(f"windows is 0 (none) or at least 2 per side, not {windows}")
    detector_patch(backbone)
    features: ConcatenatedLayers | Windows = ConcatenatedLayers(backbone, layers, layernorm=config.layernorm)
    if windows:
        assert isinstance(features, ConcatenatedLayers)
        features = Windows(features, windows)
    detector = Detector(features, replace(config, layers=layers, windows=windows))
    if not any(p.is_meta for p in detector.parameters()):
        detector.init_weights()
    model = DetectorWithProcessor(detector, PostProcess(config.topk), class_names)
    return model.to(device=device, dtype=dtype)
