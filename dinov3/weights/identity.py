"""THE name of weights: hashes that say whether two files, models or feature sets come from the same values."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[list[tuple[int, int]], str]] = weakref.WeakKeyDictionary()


def name_of(model: nn.Module) -> str:
    """`dinov3_vits16_lvd1689m@<fingerprint>`, with `-bfloat16` or another precision: whose features, store or cache it is.

    The catalogue's name, or the class of a model without an origin. A fast form (`inference`) in fp32 is called as the
    plain model, in another precision with `-bf16`, `-int8` or `-fp8`.
    """
    form: Any = getattr(model, "form", None)
    kind = type(model) if form is None else type(model).__bases__[-1]  # of the plain model
    name = getattr(getattr(model, "origin", None), "name", kind.__name__)
    if form is not None:
        return f"{name}@{form.fingerprint}" + f"-{form.precision}" * (form.precision != "fp32")
    dtype = next(model.parameters()).dtype
    precision = "" if dtype == torch.float32 else f"-{str(dtype).removeprefix('torch.')}"
    return f"{name}@{fingerprint(model)}{precision}"


def fingerprint(model_or_state: nn.Module | Mapping[str, Tensor]) -> str:
    """16 hex digits that name the weights: the same for the same weights in whatever form they came.

    The sha256 over (key, dtype, shape, bytes) of what acts at inference, in Meta's names, sorted. Not counted: the mask
    token, `bias_mask`, `local_cls_norm`, the masked K third of the qkv bias, an all-zero qkv bias, ConvNeXt's second
    name of the norm. Rope periods count after rounding to bfloat16: published files hold them so, transformers and timm
    compute them exactly, and both mean the same model. Of a sharded model, this rank's part counts.

    A module is hashed once (2 GB/s), and again after a tensor was replaced or changed in place. A fast form's is the plain
    model's.
    """
    if (form := getattr(model_or_state, "form", None)) is not None:
        return form.fingerprint
    if not isinstance(model_or_state, nn.Module):
        return _hash(model_or_state)
    values = [*model_or_state.parameters(), *model_or_state.buffers()]
    now = [(id(value), 0 if value.is_inference() else value._version) for value in values]
    known = _KNOWN.get(model_or_state)
    if known is None or known[0] != now:
        known = _KNOWN[model_or_state] = (now, _hash(model_or_state.state_dict()))
    return known[1]


def _hash(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        value = getattr(state[key], "_local_tensor", state[key]).detach()
        if key == "mask_token" or key.endswith(".bias_mask") or key.startswith(("local_cls_norm.", "norms.")):
            continue
        if key == "rope_embed.periods":
            value = value.bfloat16()
        elif key.endswith(".attn.qkv.bias"):
            q, k, v = value.chunk(3)
            masked = key + "_mask" in state
            value = torch.cat([q, torch.zeros_like(k) if masked else k, v])
            if not value.count_nonzero():
                continue
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()[:16]


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def main_hash(state: Mapping[str, Tensor]) -> str:
    """Ties a residue to its weights: every name, dtype and shape, and the values of all vectors and tokens.

    Two trainings differ in every norm and bias, so the matrices (nearly all the bytes) need not be read.
    """
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key]
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        if value.numel() <= 1 << 16:
            digest.update(_bytes(value))
    return digest.hexdigest()
