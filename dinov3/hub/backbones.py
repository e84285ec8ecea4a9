"""The backbone functions that `torch.hub` sees, with the reference's arguments. Loading needs only torch.

Differences from the reference: models come back in evaluation mode; `check_hash` works for
every file, ConvNeXt included; a local path is read where it lies instead of being copied by base name into a cache; the
strings "LVD1689M" and "SAT493M" select the enum; an unknown keyword is refused instead of ignored.
"""

from __future__ import annotations

import os
from enum import Enum
from typing import Any

from torch import nn

from dinov3.errors import UnknownName, WeightsError
from dinov3.hub import assemble, fresh
from dinov3.weights import catalog


class Weights(Enum):
    """The data sets that published weights were trained on."""

    LVD1689M = "LVD1689M"
    SAT493M = "SAT493M"


def _make(
    arch: str,
    *,
    pretrained: bool = True,
    weights: Weights | str | os.PathLike[str] = Weights.LVD1689M,
    check_hash: bool = False,
    hash: str | None = None,
    version: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    rows = catalog.resolve(arch)
    if isinstance(weights, str) and weights in Weights.__members__:
        weights = Weights[weights]
    if isinstance(weights, Weights):
        dataset = weights.value.lower()
        rows = tuple(row for row in rows if row.dataset == dataset)
        if not rows:
            known = [
                f"Weights.{w.name}" for w in Weights if any(w.value.lower() == r.dataset for r in catalog.resolve(arch))
            ]
            published = f"published: {', '.join(known)}" if known else "leave weights out"
            raise UnknownName(f"{arch} was not trained on {weights.value}; {published}")
    if not pretrained:
        return fresh(rows[0], seed=None, **kwargs)

    from dinov3.weights import reading

    if isinstance(weights, Weights):
        row = rows[0]
        url = row.url
        if url is None:
            raise WeightsError(f"no file of {arch} was published; pass weights=PATH")
        if hash is not None:
            url = url.replace(f"-{row.hash}.pth", f"-{hash}.pth" if hash else ".pth")
        if version is not None:
            url = url.replace(f"_{row.dataset}-", f"_{row.dataset}_{version}-")
        source: str = url
    else:
        source = os.fspath(weights)
    return assemble(reading.open(source, check_hash=check_hash), rows, **kwargs)


def dinov3_vitt16(**kwargs: Any) -> nn.Module:
    """ViT-Ti/16, our own small model (docs/model-card-vitt16.md), which ships with the package: pretrained=True,
    weights=path | URL of another file, check_hash=False, and constructor options. Computes in float32, as all do."""
    kwargs.setdefault("weights", catalog.resolve("dinov3_vitt16")[0].packaged_path)
    return _make("dinov3_vitt16", **kwargs)


def dinov3_vits16(**kwargs: Any) -> nn.Module:
    """ViT-S/16: pretrained=True, weights=Weights.LVD1689M | path | URL, check_hash=False, and constructor options."""
    return _make("dinov3_vits16", **kwargs)


def dinov3_vits16plus(**kwargs: Any) -> nn.Module:
    """ViT-S+/16. Arguments as `dinov3_vits16`."""
    return _make("dinov3_vits16plus", **kwargs)


def dinov3_vitb16(**kwargs: Any) -> nn.Module:
    """ViT-B/16. Arguments as `dinov3_vits16`."""
    return _make("dinov3_vitb16", **kwargs)


def dinov3_vitl16(**kwargs: Any) -> nn.Module:
    """ViT-L/16. Arguments as `dinov3_vits16`; weights=Weights.SAT493M gives the satellite model."""
    return _make("dinov3_vitl16", **kwargs)


def dinov3_vitl16plus(**kwargs: Any) -> nn.Module:
    """ViT-L+/16, of which no weights were published. Arguments as `dinov3_vits16`."""
    return _make("dinov3_vitl16plus", **kwargs)


def dinov3_vith16plus(**kwargs: Any) -> nn.Module:
    """ViT-H+/16. Arguments as `dinov3_vits16`."""
    return _make("dinov3_vith16plus", **kwargs)


def dinov3_vit7b16(**kwargs: Any) -> nn.Module:
    """ViT-7B/16. Arguments as `dinov3_vits16`; weights=Weights.SAT493M gives the satellite model."""
    return _make("dinov3_vit7b16", **kwargs)


def dinov3_convnext_tiny(**kwargs: Any) -> nn.Module:
    """ConvNeXt-T. Arguments as `dinov3_vits16`; patch_size=16 resizes intermediate maps to stride 16."""
    return _make("dinov3_convnext_tiny", **kwargs)


def dinov3_convnext_small(**kwargs: Any) -> nn.Module:
    """ConvNeXt-S. Arguments as `dinov3_convnext_tiny`."""
    return _make("dinov3_convnext_small", **kwargs)


def dinov3_convnext_base(**kwargs: Any) -> nn.Module:
    """ConvNeXt-B. Arguments as `dinov3_convnext_tiny`."""
    return _make("dinov3_convnext_base", **kwargs)


def dinov3_convnext_large(**kwargs: Any) -> nn.Module:
    """ConvNeXt-L. Arguments as `dinov3_convnext_tiny`."""
    return _make("dinov3_convnext_large", **kwargs)
