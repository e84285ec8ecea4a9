"""Building a backbone: from a configuration, or from an RGB one for another number of channels (infrared, one grey band)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dinov3.errors import DinoError
from dinov3.models.architectures import BackboneConfig, ConvNeXtConfig
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vit import VisionTransformer


def backbone(config: BackboneConfig) -> VisionTransformer | ConvNeXt:
    """The module of a configuration, with uninitialised values (call `init_weights` or load a file)."""
    return ConvNeXt(config) if isinstance(config, ConvNeXtConfig) else VisionTransformer(config)


def with_channels(model: VisionTransformer | ConvNeXt, channels: int) -> VisionTransformer | ConvNeXt:
    """A copy of an RGB backbone that takes images [B, channels, height, width]; only the first convolution differs.

    Channels after the third begin with the mean of the RGB weights, as the paper does for Open-Canopy, SPOT images with an
    infrared band. One channel takes their sum: a grey band gives what three copies of it gave. The statistics to normalise
    with are yours to choose: tensors go straight to the model, commands open images as RGB. `weights.writing.save` keeps the
    result, and opening that file gives it back.

    Raises DinoError for two channels or none, and for a model that is no RGB model.
    """
    if getattr(getattr(model, "config", None), "in_chans", None) != 3:
        raise DinoError("with_channels begins with a backbone of ours that takes three channels")
    if channels < 1 or channels == 2:
        raise DinoError(f"an RGB model can be made to take 1 channel, or 3 and more: not {channels}")
    changed: Any = copy.deepcopy(model)
    changed.config = replace(changed.config, in_chans=channels)
    layer = changed.patch_embed.proj if isinstance(changed, VisionTransformer) else changed.downsample_layers[0][0]
    rgb = layer.weight.detach()  # [D, 3, p, p]
    weight = rgb.sum(1, keepdim=True)
    if channels > 1:
        weight = torch.cat([rgb, rgb.mean(1, keepdim=True).expand(-1, channels - 3, -1, -1)], dim=1)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=layer.weight.requires_grad)
    layer.in_channels = channels
    origin = getattr(model, "origin", None)
    if origin is not None:  # no published model any more
        changed.origin = replace(origin, name="custom", source=f"{origin.source} with {channels} channels")
    return changed
