"""Attention of the CLS and register tokens over the patches, of one chosen block, exactly.

The forward pass runs as always, fused attention included. A hook takes the chosen block's attention input, and the softmax
is computed once more for the 1 + R rows that are wanted; the N × N matrix is never made.

Legend: B images, R registers, N = 1 + R + h·w tokens, A heads, d = D/A, h×w patch grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.errors import DinoError
from dinov3.features import Features, embed, layer_numbers
from dinov3.models.vit import Attention, VisionTransformer, rotate


@dataclass(frozen=True)
class AttentionMaps:
    """Attention probabilities of one block. cls [B, A, h, w] and registers [B, R, A, h, w] are over the patches; what is left
    to 1 went to CLS and registers: prefix [B, 1+R, A, 1+R], row 0 for CLS."""

    cls: Tensor
    registers: Tensor
    prefix: Tensor
    layer: int


def attention_maps(
    model: nn.Module, images: Any, *, layer: int = -1, **options: Any
) -> tuple[AttentionMaps, Features]:  # fmt: skip
    """(attention of block `layer`, the last layer's `Features`) of images of one size; `options` are those of `embed`.

    Raises `DinoError` for a model without attention (ConvNeXt) and for the fast form, whose blocks are fused.
    """
    if not isinstance(model, VisionTransformer) or not hasattr(model, "blocks"):
        raise DinoError(
            f"attention maps need a plain vision transformer, not a {type(model).__name__}: load the model without fast=, "
            "and not a ConvNeXt"
        )
    (number,) = layer_numbers(model, [layer])
    prefix = 1 + model.n_storage_tokens
    with _rows_of(model.blocks[number].attn, prefix) as batches:  # type: ignore[arg-type]
        features = embed(model, images, **options)
    rows = torch.cat(batches).transpose(1, 2)  # [B, 1+R, A, N]
    over_patches = rows[..., prefix:].unflatten(-1, features.grid_hw)
    return AttentionMaps(over_patches[:, 0], over_patches[:, 1:], rows[..., :prefix], number), features


@contextmanager
def _rows_of(attention: Attention, count: int) -> Iterator[list[Tensor]]:
    """Collects softmax(q kᵀ / √d) [B, A, count, N] of the first `count` tokens at every call of an attention module."""
    found: list[Tensor] = []

    def hook(module: Any, inputs: tuple[Any, ...]) -> None:
        x, rope = inputs
        B, N, D = x.shape
        qkv = module.qkv(x).view(B, N, 3, module.num_heads, D // module.num_heads)
        q, k = rotate(qkv[:, :, :2], *rope).transpose(1, 3).unbind(2)  # [B, A, N, d] each
        scores = q[:, :, :count].float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
        found.append(scores.softmax(-1))

    handle = attention.register_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def mass_mask(attention: Tensor, share: float = 0.6) -> Tensor:
    """The fewest patches that hold `share` of a map's attention, boolean [..., h, w] (the DINO paper's masks)."""
    if not 0 < share <= 1:
        raise DinoError(f"share is above 0 and at most 1, not {share}")
    flat = attention.flatten(-2)
    values, order = flat.sort(-1, descending=True)
    before = values.cumsum(-1) - values  # what stronger patches already hold
    keep = before < share * flat.sum(-1, keepdim=True)
    return torch.zeros_like(keep).scatter(-1, order, keep).view(attention.shape)
