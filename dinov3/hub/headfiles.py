"""What the head functions of `torch.hub` share: reading a head's file, filling a head with it strictly, its backbone.

A head's file holds the head alone (flat, or under one wrapping such as `model.`); the backbone comes from a file of its
own. Nothing is skipped in silence: a head that lacks an entry, or a file with one too many, is refused in a few lines.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dinov3.errors import WeightsMismatch
from dinov3.hub import Head, Origin
from dinov3.hub.backbones import Weights, _make
from dinov3.weights import catalog, loading
from dinov3.weights import download as cache

WRAPPINGS = ("model.", "module.")
Names = TypeVar("Names", bound=Enum)


def chosen(names: type[Names], weights: Names | str | os.PathLike[str]) -> Names | str:
    """An enum's member (also by its name), or the source: a path or URL."""
    if isinstance(weights, names):
        return weights
    text = os.fspath(weights)  # type: ignore[arg-type]
    return names[text] if text in names.__members__ else text


def source_of(row: Head, weights: Enum | str, hash: str | None = None) -> str:
    """Where a head's file is: the source itself, or for an enum's member the published file (with another `hash`)."""
    if isinstance(weights, str):
        return weights
    published = cache.hash_in_name(row.file)
    return row.url.replace(f"-{published}.", f"-{hash}." if hash else ".") if hash is not None else row.url


def checkable(source: str, check_hash: bool) -> bool:
    """Published files have a hash in their name, others need not: what cannot be checked is not asked for."""
    return check_hash and cache.hash_in_name(source.split("?")[0]) is not None


def read(source: str, *, check_hash: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of a head's file at a path or URL, and what a careful person would want to know about it.

    A wrapping that all keys share (`model.`, `module.`) is taken off; whether the content fits is for `fill` to say.
    """
    _, _, state, _ = loading.read_all(source, check_hash=checkable(source, check_hash))
    notes = []
    for wrapping in WRAPPINGS:
        if state and all(key.startswith(wrapping) for key in state):
            state = {key.removeprefix(wrapping): value for key, value in state.items()}
            notes.append(f"the keys of {loading.shown(source)} began with {wrapping!r}; taken off")
    return state, notes


@dataclass(frozen=True)
class HeadFile:
    """What a head's file holds; `source` is "random" and the rest empty for a fresh head."""

    source: str = "random"
    state: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def fresh(self) -> bool:
        return self.source == "random"


def opened(
    row: Head, asked: Enum | str, *, pretrained: bool = True, hash: str | None = None, check_hash: bool = False
) -> HeadFile:
    """The head's file (of `chosen` weights), read. Before the backbone's: it is the smaller one, and a mistake costs less."""
    if not pretrained or asked == "random":
        return HeadFile()
    source = source_of(row, asked, hash)
    return HeadFile(source, *read(source, check_hash=check_hash))


def backbone(
    row: Head, arch: str, weights: Weights | str | os.PathLike[str], *, check_hash: bool = False, **options: Any
) -> nn.Module:
    """The backbone a head stands on: `weights` as the backbone functions take them, "random" for fresh ones."""
    asked = chosen(Weights, weights)
    if asked == "random":
        return _make(arch, weights=Weights[_dataset(row)], pretrained=False, **options)
    if isinstance(asked, str):
        check_hash = checkable(asked, check_hash)
    return _make(arch, weights=asked, check_hash=check_hash, **options)


def _dataset(row: Head) -> str:
    return next(r.dataset.upper() for r in catalog.ROWS if r.id == row.backbone)


def fill(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    what: str,
    source: str,
    like: nn.Module,
    dtype: torch.dtype | None = None,
) -> None:
    """A head (built without values) takes a file's, strictly; on the device of `like`, in `dtype` or the file's own."""
    expected = module.state_dict()
    shown = loading.shown(source)
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    other = sorted(k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape)
    if missing or extra or other:
        lines = [f"{shown} does not hold {what} ({len(expected)} entries)"]
        lines += [f"  missing in the file: {some(missing)}"] if missing else []
        lines += [f"  not in the head: {some(extra)}"] if extra else []
        lines += [
            f"  {k}: {tuple(state[k].shape)} in the file, {tuple(expected[k].shape)} in the head" for k in other[:2]
        ]
        if "cls_token" in state or "embeddings.cls_token" in state:
            lines.append("  the file is a backbone: pass it as backbone_weights, and the head's file as weights")
        raise WeightsMismatch("\n".join(lines))
    device = next(like.parameters()).device
    module.load_state_dict(
        {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in state.items()}, strict=True, assign=True
    )


def some(names: Iterable[str]) -> str:
    """The first two of several names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def origin(row: Head, source: str, under: nn.Module, *, form: str = "meta", notes: Iterable[str] = ()) -> Origin:
    """What the finished model says of itself; `source` "random" for fresh weights."""
    mean, std = row.statistics
    backbone_origin = getattr(under, "origin", None)
    below = str(backbone_origin) if backbone_origin is not None else "the backbone given"
    all_notes = (*notes, *(backbone_origin.notes if backbone_origin is not None else ()))
    return Origin(row.name, f"{source} over {below}", "random" if source == "random" else form, mean, std, all_notes)


def placed(model: nn.Module, device: str | torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """The model on a device, in a dtype (None: as it is), except for rope periods, which half precision would change."""
    kept = {name: value.clone() for name, value in model.named_buffers() if name.endswith("rope_embed.periods")}
    model.to(device, dtype)
    for name, value in kept.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value.to(device))
    return model
