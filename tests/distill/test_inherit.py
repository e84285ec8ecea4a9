"""A student that begins as a compressed copy of its teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dinov3.distill.inherit import inherit_dinov2, ridge, slow_first
from dinov3.errors import DinoError
from dinov3.models.vit import VisionTransformer
from dinov3.weights import loading
from tests.distill.test_distill import TINY, tiny_dinov2


def test_ridge_finds_the_map_that_made_the_data() -> None:
    torch.manual_seed(0)
    x, W, b = torch.randn(500, 6), torch.randn(4, 6), torch.randn(4)
    found, offset = ridge(x, x @ W.T + b, torch.rand(500) + 0.5, strength=1e-8)
    torch.testing.assert_close(found, W, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(offset, b, atol=1e-4, rtol=1e-4)


def test_turning_queries_and_keys_changes_no_product_and_puts_the_strongest_where_rope_is_slowest() -> None:
    torch.manual_seed(0)
    scale = torch.logspace(1, -1, 16)[torch.randperm(16)]
    q, k = torch.randn(300, 16) * scale, torch.randn(300, 16) * scale
    periods = torch.tensor([1.0, 3.0, 9.0, 27.0])
    turn = slow_first(q, k, periods)
    torch.testing.assert_close((q @ turn.T) @ (k @ turn.T).T, q @ k.T, atol=1e-3, rtol=1e-3)
    energy = (q @ turn.T).var(0).unflatten(0, (4, 4)).sum(0)  # by period
    assert energy.argsort().tolist() == [0, 1, 2, 3]


def test_a_student_of_the_same_width_inherits_nearly_everything_and_half_the_width_a_good_part(
    oracles, tmp_path: Path
) -> None:
    tiny_dinov2(layerscale_value=0.5).save_pretrained(tmp_path)
    state, _ = loading.read(tmp_path / "model.safetensors")
    torch.manual_seed(3)
    blobs = F.interpolate(torch.rand(24, 3, 5, 5) * 255, size=(64, 64), mode="bicubic").clamp(0, 255)
    mine = blobs.to(torch.uint8)
    its = F.interpolate(blobs, size=(56, 56), mode="bicubic", antialias=True).clamp(0, 255).to(torch.uint8)
    for width, heads, least in ((64, 4, 0.8), (32, 2, 0.4)):
        config = replace(TINY, embed_dim=width, num_heads=heads, depth=3)
        torch.manual_seed(0)
        student = VisionTransformer(config)
        student.init_weights()
        explained = inherit_dinov2(student, state, mine, its, fresh=0)
        assert explained[-1] > least
        assert all(torch.isfinite(p).all() for p in student.parameters())
    with pytest.raises(DinoError, match="cannot inherit"):
        inherit_dinov2(VisionTransformer(replace(TINY, depth=9)), state, mine, its)
