"""THE name of weights: hashes that say whether two files, models or feature sets come from the same values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def fingerprint(model_or_state: nn.Module | Mapping[str, Tensor]) -> str:
    """16 hex digits that name the weights: the same for the same weights in whatever form they came.

    The sha256 over (key, dtype, shape, bytes) of what acts at inference, in Meta's names, sorted. Not counted: the mask
    token, `bias_mask`, `local_cls_norm`, the masked K third of the qkv bias, an all-zero qkv bias, ConvNeXt's second
    name of the norm. Rope periods count after rounding to bfloat16: published files hold them so, transformers and timm
    compute them exactly, and both mean the same model.
    """
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach()
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
