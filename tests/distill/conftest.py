"""A student of two blocks, a teacher file, and a folder of six images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.models.architectures import ViTConfig
from dinov3.models.vit import VisionTransformer
from dinov3.weights import catalog
from dinov3.weights.writing import save

TINY = ViTConfig(
    embed_dim=32, depth=2, num_heads=2, n_storage_tokens=1, layerscale_init=1e-5, mask_k_bias=True,
    norm_layer="layernormbf16",
)  # fmt: skip


def rows_with_a_tiny_one() -> tuple[Any, ...]:
    small = {name: getattr(TINY, name) for name in ("embed_dim", "depth", "num_heads", "n_storage_tokens")}
    return tuple(replace(row, config=replace(row.config, **small)) if row.packaged else row for row in catalog.ROWS)


@pytest.fixture
def tiny_student(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`dinov3_vitt16` becomes a model of two blocks."""
    monkeypatch.setattr(catalog, "ROWS", rows_with_a_tiny_one())
    catalog.aliases.cache_clear()
    yield
    monkeypatch.undo()
    catalog.aliases.cache_clear()


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    model = VisionTransformer(replace(TINY, layerscale_init=1.0))
    model.init_weights()
    return save(model, tmp_path / "teacher.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images of two kinds: two-coloured halves, upright or lying."""
    place = tmp_path / "images"
    place.mkdir()
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 60, (48, 60, 3), dtype=np.uint8)
        noise[(slice(None), slice(0, 30)) if i % 2 else (slice(0, 24),)] += 180
        Image.fromarray(noise).save(place / f"{i}.png")
    return place
