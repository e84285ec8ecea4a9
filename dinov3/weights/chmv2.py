"""transformers' canopy height model (`CHMv2ForDepthEstimation`): its decoder's keys and options in ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov3.errors import WeightsMismatch, without_secrets
from dinov3.weights.reading import locate

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
    """What the config.json beside transformers' weights states about the head, as options of `build_depther`."""
    path = Path(locate(source))
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    config = json.loads(file.read_text())
    if config.get("model_type") != "chmv2":
        raise WeightsMismatch(
            f"{without_secrets(source)}: config.json describes {config.get('model_type')!r}, not chmv2"
        )
    options = {ours: config[theirs] for theirs, ours in _CONFIG.items() if theirs in config}
    layers = (config.get("backbone_config") or {}).get("out_indices")
    if layers:
        options["backbone_out_layers"] = tuple(i - 1 for i in layers)  # there 0 is the patch embedding
    return options
