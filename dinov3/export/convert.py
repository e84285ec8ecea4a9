"""Rewriting weights from any form into a folder that Meta's code, transformers or timm loads as its own.

    convert("dinov3_vits16_pretrain_lvd1689m-08c60483.pth", "out", "transformers")
    convert("facebook/dinov3-vits16-pretrain-lvd1689m", "out", "timm")      # timm.create_model("local-dir:out", …)
    save_pretrained(model, "out")                                           # what is in memory; push_to_hub(model, "me/it")

Beside the model lies what its form cannot hold (`dinov3_residue.safetensors`, see `dinov3.weights.formats`), which this
package merges back on loading, so that a detour through another library's files is lossless bit for bit; and the licence
of the weights, which goes wherever they go. The folder appears whole or not at all.

Left out: heads; fewer bits (`quantise`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.errors import DinoError, one_of, require, without_secrets
from dinov3.files import atomically, remove_leftovers
from dinov3.models import low_precision
from dinov3.models.architectures import ConvNeXtConfig, ViTConfig
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vit import VisionTransformer
from dinov3.weights import configs, formats, identity, reading, writing
from dinov3.weights import download as cache
from dinov3.weights.catalog import LICENCES, ROWS, STATISTICS, Row


@dataclass
class Report:
    """What was written."""

    folder: Path
    form: formats.Form
    files: tuple[str, ...]
    row: Row | None  # the published model it is, if that is certain
    fingerprint: str  # `weights.identity.fingerprint` of what was written
    notes: list[str] = field(default_factory=list)
    cosine: float | None = None  # of a quantised file: the lowest of a token of the probe images


def convert(
    source: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    to: formats.Form = "transformers",
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: float | str = "5GB",
    periods: formats.Periods = "source",
) -> Report:
    """Writes `source` (anything `weights.reading.open` takes) as a folder in the form `to`.

    meta: one `dinov3_<arch>_pretrain_<dataset>-<first 8 digits of its sha256>.pth`. transformers: config.json,
    model.safetensors (above `max_shard_size`, bytes or "5GB", in shards with an index), preprocessor_config.json. timm:
    config.json and one model.safetensors. `dtype` converts all values but the rope periods. `periods` as in
    `weights.reading.open`.

    Raises `WeightsError` if the source is not a DINOv3 backbone or the form cannot express it, `DinoError` if `out_dir`
    is there and not empty.
    """
    one_of("the form", to, formats.FORMS)
    out = empty_folder(out_dir)
    return _write(reading.open(source, periods=periods), out, to, dtype, max_shard_size)


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    to: formats.Form = "transformers",
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: float | str = "5GB",
) -> Report:
    """Writes a backbone of this package, as it is in memory, to a folder that `load` and the library of the form open.
    `dtype` and `max_shard_size` as in `convert`.

    Raises `DinoError` for another library's model, and as `convert` does.
    """
    if not isinstance(model, (VisionTransformer, ConvNeXt)):
        raise DinoError(
            f"a {type(model).__name__} is no backbone of this package; heads have `hub.own_heads.save_head`"
        )
    origin: Any = getattr(model, "origin", None)
    rows = tuple(row for row in ROWS if origin is not None and row.id == origin.name)
    source = origin.source if origin is not None else "a model in memory"
    about = {"mean": origin.mean, "std": origin.std, "licence": origin.licence} if origin is not None else {}
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    opened = reading.OpenedWeights(state, "meta", model.config, rows, source, Path(source), **about)
    return _write(opened, empty_folder(folder), to, dtype, max_shard_size)


def push_to_hub(model: nn.Module, repository: str, *, private: bool = False, token: str | None = None) -> str:
    """Uploads `save_pretrained`'s folder to a Hugging Face repository `name/model`, made if need be; its URL.

    `load(weights="name/model")` opens it again. Raises `MissingExtra` without huggingface_hub, whose errors pass through.
    """
    hub = require("huggingface_hub", "hub", "uploading to Hugging Face")
    api = hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        save_pretrained(model, Path(temporary) / "model")
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=Path(temporary) / "model")
    return str(url)


def empty_folder(folder: str | os.PathLike[str]) -> Path:
    out = Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DinoError(f"{out} is not an empty folder; name a new one, nothing is overwritten")
    remove_leftovers(out)
    return out


def _write(
    opened: reading.OpenedWeights,
    out: Path,
    to: formats.Form,
    dtype: torch.dtype | None = None,
    max_shard_size: float | str = "5GB",
) -> Report:
    if low_precision.is_quantised(opened.state_dict):
        raise DinoError(f"{opened.source} is quantised, which only this package reads: convert the original weights")
    most_bytes = _bytes(max_shard_size)
    state, config, notes = opened.state_dict, opened.config, list(opened.notes)
    if dtype is not None:
        state = {k: v if k == "rope_embed.periods" else v.to(dtype) for k, v in state.items()}
        if isinstance(config, ConvNeXtConfig):
            formats.alias_final_norm(state)
    row = opened.rows[0] if len(opened.rows) == 1 else None
    if len(opened.rows) > 1:
        notes.append(
            f"the weights may be {' or '.join(r.id for r in opened.rows)}; the statistics of the first are written"
        )
    mean, std = opened.mean, opened.std
    if mean is None or std is None:
        mean, std = (opened.rows[0].mean, opened.rows[0].std) if opened.rows else STATISTICS["lvd1689m"]
        if not opened.rows:
            notes.append("nothing says the input statistics; ImageNet's are written")

    tensors, residue = formats.from_meta(state, to, config)
    if "rope_embed.periods" in residue:
        exact = configs.exact_periods(config)
        if exact is not None and not torch.equal(exact, residue["rope_embed.periods"].float()):
            notes.append(
                f"{to} computes rope periods exactly, these weights hold rounded ones: its outputs differ by up to "
                "4e-3 from the source's; the residue keeps them for this package"
            )

    with atomically(out) as work:
        work.mkdir()
        if to == "meta":
            _write_meta(work, tensors, row.id if row else _label(opened))
        elif to == "transformers":
            about = {"_name_or_path": row.id} if row else {}  # files of the same shapes differ in their names
            _write_json(
                work / "config.json", configs.transformers_config(config) | {"dtype": _dtype_name(tensors)} | about
            )
            _write_json(work / "preprocessor_config.json", preprocessor_config(mean, std))
            _write_shards(work, tensors, most_bytes)
        else:
            bias = any(k.endswith(".attn.q_bias") for k in tensors)
            about = configs.timm_config(
                config, qkv_bias=bias, row=opened.rows[0] if opened.rows else None, mean=mean, std=std
            )
            _write_json(work / "config.json", about)
            writing.write_safetensors(tensors, work / "model.safetensors", {"format": "pt"})
        if residue:
            about_residue = {"format": "pt", reading.MAIN_HASH: identity.main_hash(tensors), "form": to}
            writing.write_safetensors(residue, work / reading.RESIDUE_FILE, about_residue)
        write_licence(work, opened)
    files = tuple(sorted(p.name for p in out.iterdir()))
    return Report(out, to, files, row, identity.fingerprint(state), notes)


def preprocessor_config(mean: tuple[float, float, float], std: tuple[float, float, float]) -> dict[str, Any]:
    """transformers' image processor for DINOv3 at the size of `dinov3.embed` (Meta's files say 224): 256×256, bilinear, then
    these statistics. It divides by 255 before it resizes, which moves features by about 1e-4 of a cosine.

    The name with "Fast" opens in transformers 4.56 and 5, the one without only in 5.
    """
    return {
        "image_processor_type": "DINOv3ViTImageProcessorFast",  # transformers 4.56 knows this name only, 5 knows both
        "do_resize": True,
        "size": {"height": 256, "width": 256},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def _label(opened: reading.OpenedWeights) -> str:
    """A name for weights that are no catalogue row: an accurate description."""
    if opened.rows:
        return opened.rows[0].arch
    c = opened.config
    return f"dinov3_vit_{c.embed_dim}x{c.depth}" if isinstance(c, ViTConfig) else f"dinov3_convnext_{c.dims[-1]}"


def _write_meta(work: Path, tensors: Mapping[str, Tensor], label: str) -> None:
    """A flat dict, whose file name ends in its own hash, as Meta's do."""
    own: dict[int, Tensor] = {}  # ConvNeXt's two names of one norm stay one tensor
    state = {k: own.setdefault(id(v), writing.owned(v)) for k, v in tensors.items()}
    arch, _, dataset = label.rpartition("_")
    name = f"{arch}_pretrain_{dataset}" if dataset in STATISTICS else f"{label}_pretrain"
    path = work / f"{name}.pth"
    writing.save_torch(state, path)
    path.rename(work / f"{name}-{cache.sha256_of(path)[:8]}.pth")


def _write_shards(work: Path, tensors: Mapping[str, Tensor], most_bytes: float) -> None:
    """model.safetensors, or model-0000i-of-0000n.safetensors and their index, none larger than `most_bytes` unless one
    tensor alone is."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, value in tensors.items():
        size = value.numel() * value.element_size()
        if filled + size > most_bytes and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    if len(shards) == 1:
        writing.write_safetensors(tensors, work / "model.safetensors", {"format": "pt"})
        return
    where: dict[str, str] = {}
    for i, keys in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        writing.write_safetensors({k: tensors[k] for k in keys}, work / name, {"format": "pt"})
        where |= dict.fromkeys(keys, name)
    total = sum(v.numel() * v.element_size() for v in tensors.values())
    _write_json(work / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _bytes(size: float | str) -> float:
    """A number of bytes, or a text such as "5GB" or "200MB"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", str(size).upper())
    if found is None or float(found[1]) <= 0:
        raise DinoError(f"a shard's size is a number of bytes or a text such as 5GB or 200MB, not {size!r}")
    return float(found[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[found[2]]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _dtype_name(tensors: Mapping[str, Tensor]) -> str:
    return str(next(iter(tensors.values())).dtype).removeprefix("torch.")


def write_licence(work: Path, opened: reading.OpenedWeights) -> None:
    """The licence and notice files found beside the input; without any, a NOTICE that says whose terms apply."""
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    patterns = ("LICEN[SC]E*", "NOTICE*") if opened.path.exists() else ()
    found = [p for pattern in patterns for p in sorted(folder.glob(pattern)) if p.is_file()]
    for path in found:
        shutil.copyfile(path, work / path.name)
    if found:
        return
    if opened.rows and opened.rows[0].packaged:
        text = (
            "These weights are the small model of the dinov3 package, under the Apache License 2.0. Its card there,\n"
        )
        (work / "NOTICE").write_text(
            text + "docs/model-card-vitt16.md, holds the attributions of what it was trained on.\n"
        )
        return
    name = opened.path.name if opened.path.exists() and "://" not in opened.source else without_secrets(opened.source)
    text = f"These weights are a conversion of {name}; the terms of that source go with them.\n"
    if opened.rows and opened.licence == str(opened.rows[0].licence):  # going by shapes and names
        text += f"They have the form of {opened.rows[0].id}, whose licence is: {opened.licence}\n"
    elif opened.licence:
        text += f"Their licence, as the source states it: {opened.licence}\n"
    else:
        text += (
            f"If they derive from Meta's DINOv3 release, they are\nDINO Materials under the {LICENCES['lvd1689m']}\n"
        )
    (work / "NOTICE").write_text(text)
