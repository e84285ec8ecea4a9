"""Weights with their matrices in 8 or 4 bits, as a folder that `dinov3.load` opens: about size and memory, not speed.

    quantise("dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth", "vit7b16-int4", "int4", dtype=torch.bfloat16)
    dinov3.load(weights="vit7b16-int4", device="cuda")

The folder holds our own checkpoint (`weights.writing`, safetensors) and the licence. What it costs is measured before
anything is written: the lowest cosine of a token of two probe images to the unquantised model's. Below `LOWEST_COSINE` it
is refused.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.errors import DinoError, one_of
from dinov3.export.convert import Report, empty_folder, write_licence
from dinov3.features import evaluating
from dinov3.files import atomically
from dinov3.hub import assemble
from dinov3.inference import all_tokens, probe_images
from dinov3.models import low_precision
from dinov3.weights import identity, reading, writing

LOWEST_COSINE = {"int8": 0.999, "int4": 0.95}
PROBE_GRID = (8, 11)  # patches


def quantise(
    source: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    kind: low_precision.Kind = "int8",
    *,
    dtype: torch.dtype | None = None,
) -> Report:
    """Writes `source` (anything `dinov3.load` takes as weights) with the matrices of its linear layers in `kind`.

    dtype: of scales and of all else, and so what the loaded model computes in; default the file's, float32 for float16.
    Raises `DinoError` if the features come out too different (nothing is written) or `out_dir` is there and not empty.
    """
    one_of("the quantisation", kind, low_precision.KINDS)
    out = empty_folder(out_dir)
    opened = reading.open(source)
    model: Any = assemble(opened, (), dtype=dtype)
    expected = _probe_tokens(model)
    low_precision.quantise(model, kind)
    cosine = F.cosine_similarity(expected, _probe_tokens(model), dim=-1).min().item()
    if not cosine >= LOWEST_COSINE[kind]:
        finer = "take int8" if kind == "int4" else "these weights do not bear it"
        raise DinoError(
            f"{kind} changes the features too much: a token of a probe image has cosine {cosine:.4f} to the unquantised "
            f"model's, {LOWEST_COSINE[kind]} is the least allowed; {finer}"
        )
    origin = model.origin
    about = {"row": origin.name, "mean": origin.mean, "std": origin.std, "quantised": kind, "cosine": round(cosine, 6)}
    about |= {"licence": origin.licence} if origin.licence else {}
    with atomically(out) as work:
        work.mkdir()
        writing.save(model, work / "model.safetensors", about)
        write_licence(work, opened)
    row = opened.rows[0] if len(opened.rows) == 1 else None
    files = tuple(sorted(path.name for path in out.iterdir()))
    notes = [*origin.notes, f"{kind}: lowest cosine of a token of two probe images {cosine:.4f}"]
    return Report(out, "meta", files, row, identity.fingerprint(model), notes, cosine)


def _probe_tokens(model: Any) -> Tensor:
    images = probe_images(model, PROBE_GRID).to(next(model.parameters()).dtype)
    with evaluating(model):
        return all_tokens(model.forward_features(images)).double()
