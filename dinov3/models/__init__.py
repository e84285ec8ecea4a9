"""The two families of backbones and the protocol both meet; one file per family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dinov3.models.channels import with_channels
from dinov3.models.convnext import ConvNeXt, ConvNeXtConfig
from dinov3.models.vit import VisionTransformer, ViTConfig

__all__ = [
    "Backbone",
    "BackboneConfig",
    "ConvNeXt",
    "ConvNeXtConfig",
    "ViTConfig",
    "VisionTransformer",
    "backbone",
    "with_channels",
]

BackboneConfig = ViTConfig | ConvNeXtConfig


@runtime_checkable
class Backbone(Protocol):
    """What everything above this row may ask of a backbone."""

    embed_dim: int
    n_blocks: int
    n_storage_tokens: int
    patch_size: int | None
    stride: int  # input pixels per patch of the last layer, in both directions

    def patch_grid(self, height: int, width: int) -> tuple[int, int]: ...
    def forward_features(self, x: Any, masks: Any = None) -> Any: ...
    def get_intermediate_layers(self, x: Tensor, n: int | Sequence[int] = 1, **options: Any) -> tuple[Any, ...]: ...


def backbone(config: BackboneConfig) -> VisionTransformer | ConvNeXt:
    """The module of a configuration, with uninitialised values (call `init_weights` or load a file)."""
    return ConvNeXt(config) if isinstance(config, ConvNeXtConfig) else VisionTransformer(config)
