"""Depth as `torch.hub` sees it: `dinov3_vit7b16_dd` (monocular depth) and `dinov3_vitl16_chmv2` (canopy height).

    depther = torch.hub.load(REPO, "dinov3_vit7b16_dd", source="local",
                             weights="head.pth", backbone_weights="vit7b16.pth")
    depth_m = depther(images)  # [B, 1, H', W'] metres over the image padded to multiples of 16

Canopy height reads transformers' file as well (`CHMv2ForDepthEstimation`, a folder or Hugging Face id with backbone and
head in one): then `backbone_weights` may be left out.

Differences from the reference: no model moves to a GPU by itself, and on the CPU nothing is computed in bfloat16 unless
asked for; `check_hash` reaches the backbone as well; "random" as weights draws fresh ones.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3.errors import UnknownName, WeightsMismatch
from dinov3.heads.dpt import CHMV2, SYNTHMIX, Depther, build_depther
from dinov3.hub import head, headfiles
from dinov3.hub.backbones import Weights
from dinov3.weights import loading


class DepthWeights(Enum):
    """The data sets that published depth heads were trained on."""

    SYNTHMIX = "SYNTHMIX"
    CHMV2 = "CHMV2"


# What a head's options are on each backbone it may stand on; a ViT-L of monocular depth was never published.
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("dinov3_vit7b16_dd", "dinov3_vit7b16"): SYNTHMIX,
    ("dinov3_vit7b16_dd", "dinov3_vitl16"): SYNTHMIX
    | {"backbone_out_layers": (4, 11, 17, 23), "post_process_channels": (1024,) * 4},
    ("dinov3_vitl16_chmv2", "dinov3_vitl16"): CHMV2,
}


def dinov3_vit7b16_dd(
    *,
    pretrained: bool = True,
    weights: DepthWeights | str | os.PathLike[str] = DepthWeights.SYNTHMIX,
    backbone_weights: Weights | str | os.PathLike[str] = Weights.LVD1689M,
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.float32,
    hash: str | None = None,
    **options: Any,
) -> Depther:
    """ViT-7B/16 with the SYNTHMIX depth head: normalised images [B, 3, H, W] → metres [B, 1, H', W'], 0.001 to 100.

    `weights`: the head, `backbone_weights`: the 7B; each a path, URL or enum member, or "random". `autocast_dtype`:
    float32 computes in the parameters' own precision. `hash`: another ending of the published head's name. `options`:
    `device`, `dtype` and constructor arguments of the backbone. The backbone is frozen, the model in evaluation mode.
    """
    return make_depther(
        "dinov3_vit7b16_dd",
        "dinov3_vit7b16",
        pretrained=pretrained,
        weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
        autocast_dtype=autocast_dtype,
        hash=hash,
        **options,
    )


def dinov3_vitl16_chmv2(
    pretrained: bool = True,
    weights: DepthWeights | str | os.PathLike[str] = DepthWeights.CHMV2,
    backbone_weights: Weights | str | os.PathLike[str] = Weights.SAT493M,
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Depther:
    """Satellite ViT-L/16 with the CHMv2 head: aerial images [B, 3, H, W] → canopy height in metres [B, 1, H', W'].

    Images in [0, 1] are normalised with mean (0.420, 0.411, 0.296) and std (0.213, 0.156, 0.143) (`model.origin`).
    `weights` may be transformers' folder or id, which holds the backbone too. Otherwise as `dinov3_vit7b16_dd`.
    """
    return make_depther(
        "dinov3_vitl16_chmv2",
        "dinov3_vitl16",
        pretrained=pretrained,
        weights=weights,
        backbone_weights=backbone_weights,
        check_hash=check_hash,
        autocast_dtype=autocast_dtype,
        **options,
    )


def make_depther(
    name: str,
    arch: str,
    *,
    pretrained: bool = True,
    weights: DepthWeights | str | os.PathLike[str],
    backbone_weights: Weights | str | os.PathLike[str],
    check_hash: bool = False,
    autocast_dtype: torch.dtype = torch.float32,
    hash: str | None = None,
    depth_range: tuple[float, float] | None = None,
    **options: Any,
) -> Depther:
    """A published kind of depther on a backbone; `depth_range`: other nearest and farthest metres."""
    row = head(name)
    if (name, arch) not in OPTIONS:
        raise UnknownName(f"{name} stands on {' or '.join(a for n, a in OPTIONS if n == name)}, not on {arch!r}")
    built = dict(OPTIONS[name, arch])
    if depth_range is not None:
        built["min_depth"], built["max_depth"] = depth_range
    dtype = options.get("dtype")
    asked = headfiles.chosen(DepthWeights, weights)
    published = "CHMV2" if row.task == "canopy" else "SYNTHMIX"
    if pretrained and isinstance(asked, DepthWeights) and asked.value != published:
        raise UnknownName(f"{name} was trained on {published}, not {asked.value}")
    file = headfiles.opened(row, asked, pretrained=pretrained, hash=hash, check_hash=check_hash)
    state: Mapping[str, Tensor] = file.state
    notes = file.notes
    below: Weights | str | os.PathLike[str] = backbone_weights if pretrained else "random"
    if is_transformers(state):
        built |= transformers_options(file.source)
        if any(k.startswith("backbone.") for k in state) and headfiles.chosen(Weights, below) is Weights.SAT493M:
            below = file.source
            notes = [*notes, "the backbone comes from the same file as the head"]
        state = from_transformers(state)
    vit: Any = headfiles.backbone(row, arch, below, check_hash=check_hash, **options)
    vit.requires_grad_(False)
    cast_to = None if autocast_dtype is torch.float32 else autocast_dtype
    if file.fresh:
        model = build_depther(vit, autocast_dtype=cast_to, **built)
        weight = next(vit.parameters())
        model.decoder.to(weight.device, dtype)
    else:
        with torch.device("meta"):
            model = build_depther(vit, autocast_dtype=cast_to, **built)
        what = "the canopy height head (CHMv2)" if row.task == "canopy" else "the SYNTHMIX depth head"
        headfiles.fill(model.decoder, without_prefix(state), what=what, source=file.source, like=vit, dtype=dtype)
    model.origin = headfiles.origin(row, file.source, vit, notes=notes)  # type: ignore[assignment]
    return model.eval()


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file of the whole depther holds the decoder under its name."""
    if state and all(k.startswith("decoder.") for k in state):
        return {k.removeprefix("decoder."): v for k, v in state.items()}
    return dict(state)


# ---- transformers' CHMv2 -------------------------------------------------------------------------------------------

# transformers' name → ours, of everything under `head.`
_NAMES = (
    (r"reassemble_stage\.layers\.(\d)\.projection\.", r"reassemble_blocks.projects.\1.conv."),
    (r"reassemble_stage\.layers\.(\d)\.resize\.", r"reassemble_blocks.resize_layers.\1."),
    (r"reassemble_stage\.readout_projects\.", r"reassemble_blocks.readout_projects."),
    (r"convs\.(\d)\.", r"convs.\1.conv."),
    (r"fusion_layers\.(\d)\.projection\.", r"fusion_blocks.\1.project.conv."),
    (r"fusion_layers\.(\d)\.residual_layer(\d)\.convolution(\d)\.", r"fusion_blocks.\1.res_conv_unit\2.conv\3.conv."),
    (r"conv_depth\.", r"conv_depth."),
)


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    return any(k.startswith("head.reassemble_stage.") for k in state)


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's state dict out of `CHMv2ForDepthEstimation`'s; a key without a counterpart keeps its name, so that
    the strict comparison names it."""
    decoder: dict[str, Tensor] = {}
    for key, value in state.items():
        if not key.startswith("head."):
            continue
        plain = key.removeprefix("head.")
        for pattern, ours in _NAMES:
            renamed, hits = re.subn("^" + pattern, ours, plain)
            if hits:
                plain = renamed
                break
        decoder[plain] = value
    return decoder


_CONFIG = {
    "fusion_hidden_size": "channels",
    "head_hidden_size": "n_hidden_channels",
    "number_output_channels": "n_output_channels",
    "post_process_channels": "post_process_channels",
    "readout_type": "readout",
    "min_depth": "min_depth",
    "max_depth": "max_depth",
    "bins_strategy": "bins_strategy",
    "norm_strategy": "norm_strategy",
}


def transformers_options(source: str) -> dict[str, Any]:
    """What the config.json beside transformers' weights says of the head, in `build_depther`'s words."""
    path = Path(loading.locate(source))
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    config = json.loads(file.read_text())
    if config.get("model_type") != "chmv2":
        raise WeightsMismatch(f"{loading.shown(source)}: config.json describes {config.get('model_type')!r}, not chmv2")
    options = {ours: config[theirs] for theirs, ours in _CONFIG.items() if theirs in config}
    layers = (config.get("backbone_config") or {}).get("out_indices")
    if layers:
        options["backbone_out_layers"] = tuple(i - 1 for i in layers)  # there 0 is the patch embedding
    return options
