"""Cached features: while a head is fitted, the frozen backbone runs once an image.

    with cached_features(model, folder=run.path / "features"):
        fit(model, …)

Outputs are cached by the content of the image (the bytes of its tensor) and of the call (which layers), so nothing can be
out of date, mirrored images are images of their own, and the caller (an adapter, windows, a linear head) need not know.
Every image is run alone, whatever batch it came in: a killed and resumed fit sees the very same numbers. Where images are
augmented at random a cache does not help: leave it out.

Memory first; beyond `most_bytes` into the folder, if one is given, else the image is computed again every time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.fit.loop import backbones_in
from dinov3.weights.writing import write_torch

METHODS = ("get_intermediate_layers", "forward_features")


class FeatureCache:
    """Outputs by key; in memory while they fit, then as files."""

    def __init__(self, most_bytes: int, folder: Path | None) -> None:
        self.most_bytes, self.folder = most_bytes, folder
        self.cached: dict[str, Any] = {}
        self.bytes = self.requests = self.computed = 0

    def __call__(self, key: str, compute: Callable[[], Any], device: torch.device) -> Any:
        self.requests += 1
        if key in self.cached:
            return _each(self.cached[key], lambda t: t.to(device))
        file = self.folder / f"{key}.pt" if self.folder is not None else None
        if file is not None and file.is_file():
            return torch.load(file, map_location=device, weights_only=True)
        self.computed += 1
        output = compute()
        size = sum(t.numel() * t.element_size() for t in _leaves(output))
        if self.bytes + size <= self.most_bytes:
            self.cached[key] = _each(output, lambda t: t.to("cpu").clone())
            self.bytes += size
        elif file is not None:
            write_torch(_each(output, lambda t: t.to("cpu").clone()), file)
        return output


@contextmanager
def cached_features(
    module: nn.Module, *, most_bytes: int = 2 << 30, folder: str | os.PathLike[str] | None = None
) -> Iterator[FeatureCache]:
    """A context in which the backbones inside `module` cache their outputs. The folder is removed at the end.

    Of `forward_features` only the input of a classifier is cached: the patches as their mean (of one).
    """
    cache = FeatureCache(most_bytes, Path(folder) if folder is not None else None)
    backbones = list(backbones_in(module).values())
    for i, backbone in enumerate(backbones):
        for method in METHODS:
            # an instance's attribute stands before its class's method; nothing else of the model changes
            setattr(backbone, method, _cached(getattr(backbone, method), f"{i}.{method}", cache))
    try:
        yield cache
    finally:
        for backbone in backbones:
            for method in METHODS:
                delattr(backbone, method)
        if cache.folder is not None:
            shutil.rmtree(cache.folder, ignore_errors=True)


def _cached(method: Callable[..., Any], name: str, cache: FeatureCache) -> Callable[..., Any]:
    @torch.no_grad()
    def cached_call(x: Tensor, *args: Any, **options: Any) -> Any:
        call = f"{name} {args!r} {sorted(options.items())!r} {x.dtype} {tuple(x.shape[1:])}"

        def output(one: Tensor) -> Any:
            out = method(one, *args, **options)
            if not isinstance(out, dict):
                return out
            patches = out["x_norm_patchtokens"].mean(1, keepdim=True)
            return {"x_norm_clstoken": out["x_norm_clstoken"], "x_norm_patchtokens": patches}

        return _joined([cache(_key(call, one), partial(output, one), x.device) for one in x.split(1)])

    return cached_call


def _key(call: str, one: Tensor) -> str:
    digest = hashlib.blake2b(call.encode(), digest_size=16)
    digest.update(one.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _each(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of dicts, lists and tuples, every tensor through the function."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: _each(v, function) for k, v in value.items()}
    return type(value)(_each(v, function) for v in value)


def _leaves(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _each(value, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


def _joined(outputs: list[Any]) -> Any:
    """Outputs of one image each → the output of the batch."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, dict):
        return {k: _joined([a[k] for a in outputs]) for k in first}
    return type(first)(_joined(list(parts)) for parts in zip(*outputs, strict=True))
