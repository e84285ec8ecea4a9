"""Our own checkpoints: one safetensors file in Meta's names, with a JSON of metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.errors import WeightsError
from dinov3.files import atomically
from dinov3.weights.reading import OURS


def save(
    model_or_state: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes our own checkpoint: one safetensors file in Meta's names, with a JSON of `metadata` (config, row, mean, …).

    A model's configuration is added under "config". The file appears whole or not at all. Returns its path.
    """
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else dict(model_or_state)
    about = dict(metadata or {})
    config = getattr(model_or_state, "config", None)
    if "config" not in about and config is not None:
        about["config"] = asdict(config)
    tensors = {k: v for k, v in state.items() if not k.startswith("norms.")}  # a second name; `open` adds it back
    write_safetensors(tensors, Path(path), {"format": "pt", OURS: json.dumps(about)})
    return Path(path)


def write_safetensors(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, which appears whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with atomically(path) as temporary:
            temporary.touch()
            usual = temporary.stat().st_mode
            save_file({k: owned(v) for k, v in state.items()}, temporary, metadata)
            temporary.chmod(usual)  # safetensors makes files that only their owner can read
    except SafetensorError as error:
        raise WeightsError(f"{path} could not be written: {error}") from None


def write_torch(value: Any, path: Path) -> None:
    """One file of `torch.save`, which appears whole or not at all."""
    with atomically(path) as temporary:
        save_torch(value, temporary)


def save_torch(value: Any, path: Path) -> None:
    """`torch.save`, whose error on a full disk is a sentence."""
    try:
        torch.save(value, path)
    except RuntimeError as error:  # of the archive writer, where a write fell short
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{path} could not be written, perhaps because the disk is full ({reason})") from None


def owned(value: Tensor) -> Tensor:
    """The tensor on the CPU with a storage of its own: views would be written with all they are a view of."""
    value = value.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.numel() * value.element_size() else value.clone()
