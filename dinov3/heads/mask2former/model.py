"""Mask2Former (arXiv 2112.01527) on a frozen backbone: segments as masks with a class each (paper §6.3.2, Tab. 11).

Queries attend to the maps of a pixel decoder and each gives one mask and one class, of which the last means "nothing".
`heads.mask2former.adapter` makes the pyramid it stands on, `heads.mask2former.loss` trains it, `heads.windows` turns its
masks into class maps; the published model is `hub.published_heads`.

Legend: B images, K classes, Q queries, M width, four maps at strides 4 to 32 of the adapted image of H×W pixels.
Attribute names that end up in files are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError
from dinov3.heads.detr.features import sine
from dinov3.heads.encoder import check_levels, dtype_of, resized
from dinov3.heads.mask2former.adapter import (
    MSDeformAttn,
    Pyramid,
    Shapes,
    StagePyramid,
    ViTAdapter,
    centres,
    maps_of,
    sequence_of,
)
from dinov3.models.base import Backbone

GROUPS = 32  # of every GroupNorm


def positions(shape: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """[h·w, width] float32: width/2 sines of the row, then of the column, counted from 1 and scaled to at most 2π."""
    height, across = shape
    y = torch.arange(1, height + 1, device=device, dtype=torch.float32) / (height + 1e-6)
    x = torch.arange(1, across + 1, device=device, dtype=torch.float32) / (across + 1e-6)
    y, x = sine(y * 2 * math.pi, width // 2), sine(x * 2 * math.pi, width // 2)
    grid = torch.cat([y[:, None].expand(-1, across, -1), x[None].expand(height, -1, -1)], dim=-1)
    return grid.flatten(0, 1)


# ---- pixel decoder -------------------------------------------------------------------------------------------------


class PixelLayer(nn.Module):
    """Post-norm: every position of the three maps reads all three around its own place."""

    def __init__(self, width: int, *, n_heads: int, n_points: int, ffn: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(width, 3, n_heads, n_points)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, s: Tensor, position: Tensor, reference: Tensor, shapes: Shapes) -> Tensor:
        s = self.norm1(s + self.self_attn(s + position, reference, s, shapes))
        return self.norm2(s + self.linear2(F.relu(self.linear1(s))))


class PixelLayers(nn.Module):
    """In files: `layers`."""

    def __init__(self, n_layers: int, width: int, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PixelLayer(width, **options) for _ in range(n_layers))


class PixelEncoder(nn.Module):
    """Three maps [B, M, h_l, w_l], coarse to fine, to three of the same shapes. In files: `level_encoding`, `encoder`."""

    def __init__(self, n_layers: int, width: int, **options: Any) -> None:
        super().__init__()
        self.level_encoding = nn.Parameter(torch.zeros(3, width))
        self.encoder = PixelLayers(n_layers, width, **options)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        shapes = [(level.shape[-2], level.shape[-1]) for level in maps]
        s = sequence_of(maps)  # [B, S, M]
        width, device = s.shape[-1], s.device
        places = [positions(shape, width, device) + e for shape, e in zip(shapes, self.level_encoding, strict=True)]
        position = torch.cat(places).to(s.dtype)  # [S, M]
        reference = centres(shapes, device=device)[None, :, None]  # [1, S, 1, 2]: the same on all three maps
        for layer in self.encoder.layers:
            s = layer(s, position, reference, shapes)
        return maps_of(s, shapes)


class NormedConv(nn.Conv2d):
    """A convolution without bias and its GroupNorm. In files: `weight` and `norm.*`."""

    def __init__(self, inside: int, outside: int, kernel_size: int) -> None:
        super().__init__(inside, outside, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.GroupNorm(GROUPS, outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class PixelDecoder(nn.Module):
    """Maps of D_i channels at strides 4, 8, 16, 32 → mask features [B, M, H/4, W/4] and maps [B, M, ·, ·] at strides 32,
    16, 8. Always in the parameters' own precision, also under autocast: the masks depend on it."""

    def __init__(
        self, widths: Sequence[int], width: int, *, n_layers: int, n_heads: int, n_points: int, ffn: int
    ) -> None:
        super().__init__()
        self.input_convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(D, width, kernel_size=1), nn.GroupNorm(GROUPS, width)) for D in widths[:0:-1]
        )
        self.encoder = PixelEncoder(n_layers, width, n_heads=n_heads, n_points=n_points, ffn=ffn)
        self.lateral_convs = nn.ModuleList([NormedConv(widths[0], width, 1)])
        self.output_convs = nn.ModuleList([NormedConv(width, width, 3)])
        self.mask_feature = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(maps[0].device.type, enabled=False):
            fine, *coarse = [level.to(dtype_of(self)) for level in maps]
            projected = [project(level) for project, level in zip(self.input_convs, reversed(coarse), strict=True)]
            outputs = self.encoder(projected)
            fine = self.lateral_convs[0](fine)
            fine = fine + resized(outputs[-1], fine.shape[-2:])
            return self.mask_feature(F.relu(self.output_convs[0](fine))), outputs


# ---- transformer decoder -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention under the key names of `nn.MultiheadAttention`, which would copy a mask for every head."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.in_proj_weight, self.in_proj_bias = (
            nn.Parameter(torch.empty(3 * width, width)),
            nn.Parameter(torch.zeros(3 * width)),
        )
        self.out_proj = nn.Linear(width, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
        """q [B, Q, M], k and v [B, S, M]; allowed [B, Q, S]: True where a query may attend."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [B, heads, ·, M / heads]
            for x, weight, bias in zip((q, k, v), weights, biases)
        )
        mask = allowed.unsqueeze(1) if allowed is not None else None
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class CrossAttentionLayer(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.multihead_attn, self.norm = Attention(width, n_heads), nn.LayerNorm(width)

    def forward(self, q: Tensor, place: Tensor, memory: Tensor, position: Tensor, allowed: Tensor) -> Tensor:
        return self.norm(q + self.multihead_attn(q + place, memory + position, memory, allowed))


class SelfAttentionLayer(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.self_attn, self.norm = Attention(width, n_heads), nn.LayerNorm(width)

    def forward(self, q: Tensor, place: Tensor) -> Tensor:
        return self.norm(q + self.self_attn(q + place, q + place, q))


class FFNLayer(nn.Module):
    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.linear1, self.linear2, self.norm = nn.Linear(width, ffn), nn.Linear(ffn, width), nn.LayerNorm(width)

    def forward(self, q: Tensor) -> Tensor:
        return self.norm(q + self.linear2(F.relu(self.linear1(q))))


class MaskEmbedding(nn.Module):
    """Three linear layers. In files: `layers`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](F.relu(self.layers[1](F.relu(self.layers[0](x)))))


class MaskDecoder(nn.Module):
    """Mask features and three maps → Q masks with classes, after every layer. A query attends only where its mask of the
    layer before is: "masked attention"."""

    def __init__(self, width: int, n_classes: int, *, n_queries: int, n_layers: int, n_heads: int, ffn: int) -> None:
        super().__init__()
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(width, n_heads) for _ in range(n_layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(width, n_heads) for _ in range(n_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(FFNLayer(width, ffn) for _ in range(n_layers))
        self.post_norm = nn.LayerNorm(width)
        self.query_feat, self.query_embed = nn.Embedding(n_queries, width), nn.Embedding(n_queries, width)
        self.level_embed = nn.Embedding(3, width)
        self.class_embed = nn.Linear(width, n_classes + 1)
        self.mask_embed = MaskEmbedding(width)

    def forward(self, mask_features: Tensor, maps: Sequence[Tensor], *, every_layer: bool) -> list[dict[str, Tensor]]:
        """[{pred_logits [B, Q, K + 1], pred_masks [B, Q, H/4, W/4]}]: of the initial queries and of all layers, or of the
        last layer only."""
        B, dtype = len(mask_features), dtype_of(self)
        mask_features, maps = mask_features.to(dtype), [level.to(dtype) for level in maps]
        shapes = [(level.shape[-2], level.shape[-1]) for level in maps]
        memories = [sequence_of([level]) + self.level_embed.weight[i] for i, level in enumerate(maps)]  # [B, S_l, M]
        places = [positions(shape, mask_features.shape[1], mask_features.device).to(dtype) for shape in shapes]
        # Resizing is linear, so the mask features are resized once instead of the masks of every layer: where masks
        # are only looked through, they are never made at full size.
        small = [resized(mask_features, shape).detach().flatten(2) for shape in shapes]  # [B, M, S_l]

        queries = self.query_feat.weight.expand(B, -1, -1)
        place = self.query_embed.weight
        outputs = []
        n_layers = len(self.transformer_ffn_layers)
        for i in range(n_layers + 1):
            normed = self.post_norm(queries)
            embedding = self.mask_embed(normed)  # [B, Q, M]
            if every_layer or i == n_layers:
                masks = torch.einsum("bqm,bmhw->bqhw", embedding, mask_features)
                outputs.append({"pred_logits": self.class_embed(normed), "pred_masks": masks})
            if i == n_layers:
                break
            level = i % 3
            allowed = embedding.detach() @ small[level] >= 0  # [B, Q, S_l]: probability at least ½
            allowed |= ~allowed.any(-1, keepdim=True)  # a query whose mask is empty attends everywhere
            queries = self.transformer_cross_attention_layers[i](
                queries, place, memories[level], places[level], allowed
            )
            queries = self.transformer_self_attention_layers[i](queries, place)
            queries = self.transformer_ffn_layers[i](queries)
        return outputs


class Mask2FormerHead(nn.Module):
    """Four maps (strides 4, 8, 16, 32; `Pyramid`) → logits and masks of the queries. Defaults: the published head's.

    widths: channels of the maps. hidden_dim: the width M, a multiple of 32 and of n_heads.
    """

    def __init__(
        self,
        widths: Sequence[int],
        n_classes: int,
        *,
        hidden_dim: int = 2048,
        n_heads: int = 16,
        n_points: int = 4,
        ffn: int = 4096,
        n_queries: int = 100,
        pixel_layers: int = 6,
        decoder_layers: int = 9,
    ) -> None:
        super().__init__()
        check_levels("Mask2Former head", len(widths), 4)
        if n_classes < 1 or n_queries < 1:
            raise DinoError(
                f"a Mask2Former head needs at least one class and one query, not {n_classes} and {n_queries}"
            )
        if hidden_dim < GROUPS or hidden_dim % GROUPS or hidden_dim % n_heads:
            raise DinoError(
                f"hidden_dim must be a multiple of {GROUPS} (group norms) and of n_heads ({n_heads}), {hidden_dim} is not"
            )
        self.widths, self.n_classes = list(widths), n_classes
        self.pixel_decoder = PixelDecoder(
            widths, hidden_dim, n_layers=pixel_layers, n_heads=n_heads, n_points=n_points, ffn=ffn
        )
        self.predictor = MaskDecoder(
            hidden_dim, n_classes, n_queries=n_queries, n_layers=decoder_layers, n_heads=n_heads, ffn=ffn
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Attention):
                nn.init.xavier_uniform_(module.in_proj_weight)
                nn.init.zeros_(module.in_proj_bias)
            elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.Embedding)):
                module.reset_parameters()
        for module in self.modules():  # its layers were just given something else
            if isinstance(module, MSDeformAttn):
                module.init_weights()
        nn.init.normal_(self.pixel_decoder.encoder.level_encoding)

    def forward(self, maps: Sequence[Tensor], *, every_layer: bool = True) -> dict[str, Any]:
        check_levels("Mask2Former head", len(maps), 4)
        if [level.shape[1] for level in maps] != self.widths:
            raise DinoError(f"the Mask2Former head expects {self.widths} channels, got {[m.shape[1] for m in maps]}")
        mask_features, coarse_to_fine = self.pixel_decoder(maps)
        *aux, last = self.predictor(mask_features, coarse_to_fine, every_layer=every_layer)
        return {**last, "aux_outputs": aux} if every_layer else last


# ---- images to masks ---------------------------------------------------------------------------------------------


class Mask2FormerSegmentor(nn.Module):
    """A frozen backbone with its pyramid and a Mask2Former head, as two steps `segmentation_model.0` and `.1`.

    autocast_dtype: torch.bfloat16 or float16 runs both under autocast on an accelerator (never the pixel decoder, nor the
    sampling of deformable attention). On the CPU, as in the reference, and with None or float32 everywhere, the
    parameters' own precision counts.
    """

    def __init__(self, pyramid: Pyramid, head: Mask2FormerHead, *, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if pyramid.widths != head.widths:
            raise DinoError(
                f"this Mask2Former head reads maps of {head.widths} channels, the backbone gives {pyramid.widths}: the "
                "head belongs to another backbone"
            )
        self.segmentation_model = nn.ModuleList([pyramid, head])
        self.autocast_dtype = None if autocast_dtype is torch.float32 else autocast_dtype

    @property
    def pyramid(self) -> Pyramid:
        return self.segmentation_model[0]  # type: ignore[return-value]

    def outputs(self, x: Tensor, *, every_layer: bool) -> dict[str, Any]:
        pyramid, head = self.segmentation_model
        cast = self.autocast_dtype is not None and x.device.type != "cpu"
        with torch.autocast(x.device.type, self.autocast_dtype) if cast else nullcontext():
            return head(pyramid(x), every_layer=every_layer)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Normalised images [B, C, H, W] → `pred_logits` [B, Q, K + 1] (the last: nothing), `pred_masks` [B, Q, H'/4,
        W'/4] (logits, over the adapted image, H' and W' the next multiples of 32), and `aux_outputs`, the same of the
        initial queries and of every layer but the last."""
        return self.outputs(x, every_layer=True)

    @torch.no_grad()
    def predict(self, x: Tensor, rescale_to: tuple[int, int] = (512, 512)) -> dict[str, Tensor]:
        """`pred_logits` [B, Q, K + 1] and `pred_masks` [B, Q, *rescale_to] (logits) over exactly the image given,
        whatever its size. What only training needs is not computed."""
        outputs, size_hw = self.outputs(x, every_layer=False), (x.shape[-2], x.shape[-1])
        masks = outputs["pred_masks"]
        if self.pyramid.adapt == "center_padding" and self.pyramid.adapted_size(size_hw) != size_hw:
            masks = self.pyramid.to_image(masks, size_hw)
        return {"pred_logits": outputs["pred_logits"], "pred_masks": resized(masks, rescale_to)}


def default_width(backbone: Backbone) -> int:
    """M for a backbone: half its width, between 256 and the published 2048 of the 7B; a multiple of 64."""
    return min(max(backbone.embed_dim // 2 // 64 * 64, 256), 2048)


def build_segmentor(
    backbone: Backbone,
    n_classes: int = 150,
    *,
    hidden_dim: int | None = None,
    ffn: int | None = None,
    layers: str | Sequence[int] = "FOUR_EVEN_INTERVALS",
    adapt: str = "center_padding",
    autocast_dtype: torch.dtype | None = None,
    adapter: dict[str, Any] | None = None,
    **head_options: Any,
) -> Mask2FormerSegmentor:
    """A segmentor with a fresh head on any backbone: an adapter on a ViT, its own stages for a ConvNeXt.

    hidden_dim: the head's width; None: half the backbone's, 256 to 2048. ffn: None: twice the width, at least 1024.
    layers: four blocks of a ViT. adapter: options of `ViTAdapter`; head_options: those of `Mask2FormerHead`.
    """
    width = hidden_dim or default_width(backbone)
    pyramid: Pyramid
    if hasattr(backbone, "embed_dims"):
        if adapter or layers != "FOUR_EVEN_INTERVALS":
            raise DinoError("a ConvNeXt's pyramid are its four stages: it has no adapter and no layers to choose")
        pyramid = StagePyramid(backbone, adapt=adapt)
    else:
        pyramid = ViTAdapter(backbone, layers, adapt=adapt, **(adapter or {}))
    head = Mask2FormerHead(pyramid.widths, n_classes, hidden_dim=width, ffn=ffn or max(2 * width, 1024), **head_options)
    return Mask2FormerSegmentor(pyramid, head, autocast_dtype=autocast_dtype)
