"""THE table of architectures: what defines a backbone, the sizes by name, and the published models. No torch.

`SIZES` are the names that the reference's training configurations use; `PUBLISHED` adds the options that the released
models were trained with. The catalogue of weights and the `student` section both read these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from dinov3.errors import one_of, only_known

C = TypeVar("C")


@dataclass(frozen=True)
class ViTConfig:
    """What defines a ViT. Field names are those of the reference constructor and of its configuration files."""

    img_size: int = 224  # informative only: any size is accepted
    patch_size: int = 16
    in_chans: int = 3
    pos_embed_rope_base: float | None = 100.0
    pos_embed_rope_min_period: float | None = None
    pos_embed_rope_max_period: float | None = None
    pos_embed_rope_normalize_coords: str = "separate"  # "min" | "max" | "separate"
    pos_embed_rope_shift_coords: float | None = None  # these three augment coordinates in training mode only
    pos_embed_rope_jitter_coords: float | None = None
    pos_embed_rope_rescale_coords: float | None = None
    pos_embed_rope_dtype: str = "fp32"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    ffn_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path_rate: float = 0.0
    layerscale_init: float | None = None
    norm_layer: str = "layernorm"  # "layernorm" eps 1e-6 | "layernormbf16" eps 1e-5 (nothing bf16) | "rmsnorm"
    ffn_layer: str = "mlp"  # "mlp" | "swiglu" | "swiglu32" | "swiglu64" | "swiglu128": hidden width aligned to that
    ffn_bias: bool = True
    proj_bias: bool = True
    n_storage_tokens: int = 0  # register tokens
    mask_k_bias: bool = False
    untie_cls_and_patch_norms: bool = False
    untie_global_and_local_cls_norm: bool = False

    @classmethod
    def of(cls, **options: Any) -> ViTConfig:
        """Like the constructor, but an unknown option is an error with suggestions instead of a TypeError."""
        return checked(cls, "a ViT", options)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def ffn_hidden(self) -> int:
        """Width inside the FFN. SwiGLU takes 2/3 of the nominal width, rounded up to its alignment."""
        nominal = int(self.embed_dim * self.ffn_ratio)
        if self.ffn_layer == "mlp":
            return nominal
        align = int(self.ffn_layer.removeprefix("swiglu") or 8)
        return math.ceil(int(nominal * 2 / 3) / align) * align


@dataclass(frozen=True)
class ConvNeXtConfig:
    """What defines a ConvNeXt: depth and width of its stages."""

    in_chans: int = 3
    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    drop_path_rate: float = 0.0
    layer_scale_init_value: float = 1e-6  # 0: no gamma
    patch_size: int | None = None  # pseudo patch size of intermediate maps

    @classmethod
    def of(cls, **options: Any) -> ConvNeXtConfig:
        """Like the constructor, but an unknown option is an error with suggestions instead of a TypeError."""
        return checked(cls, "a ConvNeXt", {k: tuple(v) if k in ("depths", "dims") else v for k, v in options.items()})

    @property
    def embed_dim(self) -> int:
        return self.dims[-1]


BackboneConfig = ViTConfig | ConvNeXtConfig


def checked(cls: type[C], what: str, options: Mapping[str, Any]) -> C:
    """A dataclass made from options; an unknown one is an error with suggestions."""
    only_known(f"{what} has no option", options, (f.name for f in fields(cls)))  # type: ignore[arg-type]
    return cls(**options)


def _vit(embed_dim: int, depth: int, num_heads: int, ffn_ratio: float = 4.0) -> ViTConfig:
    return ViTConfig(embed_dim=embed_dim, depth=depth, num_heads=num_heads, ffn_ratio=ffn_ratio)


def _convnext(depth: int, width: int) -> ConvNeXtConfig:
    return ConvNeXtConfig(depths=(3, 3, depth, 3), dims=(width, 2 * width, 4 * width, 8 * width))


SIZES: dict[str, BackboneConfig] = {
    "vit_tiny": _vit(192, 12, 3),  # ours
    "vit_small": _vit(384, 12, 6),
    "vit_base": _vit(768, 12, 12),
    "vit_large": _vit(1024, 24, 16),
    "vit_so400m": _vit(1152, 27, 18, 3.777777778),
    "vit_huge2": _vit(1280, 32, 20),
    "vit_giant2": _vit(1536, 40, 24),
    "vit_7b": _vit(4096, 40, 32, 3.0),
    "convnext_tiny": _convnext(9, 96),
    "convnext_small": _convnext(27, 96),
    "convnext_base": _convnext(27, 128),
    "convnext_large": _convnext(27, 192),
}

_RELEASED: dict[str, Any] = {
    "norm_layer": "layernormbf16",
    "n_storage_tokens": 4,
    "mask_k_bias": True,
    "pos_embed_rope_rescale_coords": 2.0,
}
_PLUS: dict[str, Any] = _RELEASED | {"ffn_layer": "swiglu", "ffn_ratio": 6.0}
_7B: dict[str, Any] = _RELEASED | {"ffn_layer": "swiglu64", "qkv_bias": False, "untie_global_and_local_cls_norm": True}

# Published names: the size, and the options that come with the name.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov3_vitt16": ("vit_tiny", _RELEASED),
    "dinov3_vits16": ("vit_small", _RELEASED),
    "dinov3_vits16plus": ("vit_small", _PLUS),
    "dinov3_vitb16": ("vit_base", _RELEASED),
    "dinov3_vitl16": ("vit_large", _RELEASED),
    "dinov3_vitl16plus": ("vit_large", _PLUS),
    "dinov3_vith16plus": ("vit_huge2", _PLUS),
    "dinov3_vit7b16": ("vit_7b", _7B),
    **{f"dinov3_{name}": (name, {}) for name in SIZES if name.startswith("convnext")},
}
NAMES: tuple[str, ...] = (*SIZES, *PUBLISHED)


def size_of(name: str) -> BackboneConfig:
    """The entry of `SIZES` behind a size or a published name. Raises `UnknownName`."""
    one_of("the architecture", name, NAMES)
    return SIZES[PUBLISHED[name][0] if name in PUBLISHED else name]


def published(name: str, **options: Any) -> BackboneConfig:
    """The configuration of a published model as its weights have it, with other options where given."""
    size = size_of(name)
    trained: dict[str, Any] = {"layerscale_init": 1e-5} if isinstance(size, ViTConfig) else {}
    return replace(size, **trained | PUBLISHED[name][1] | options)
