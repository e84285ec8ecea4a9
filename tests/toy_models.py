"""Backbones of a few thousand drawn weights, the same at every call, for tests of what is built on one."""

from __future__ import annotations

from typing import Any

import torch

from dinov3.models.architectures import ConvNeXtConfig, ViTConfig
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vit import VisionTransformer

TINY: dict[str, Any] = {"embed_dim": 32, "depth": 4, "num_heads": 2, "n_storage_tokens": 1}
HEAD: Any = {
    "hidden_dim": 32,
    "ffn": 48,
    "n_heads": 4,
    "n_queries": 6,
    "pixel_layers": 2,
    "decoder_layers": 4,
}  # Mask2Former


def tiny_vit(seed: int = 0, **options: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(ViTConfig.of(**TINY | options))
    model.init_weights()
    return model.eval()


def tiny_convnext(**options: Any) -> ConvNeXt:
    torch.manual_seed(0)
    model = ConvNeXt(ConvNeXtConfig.of(**{"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)} | options))
    model.init_weights()
    return model.eval()
