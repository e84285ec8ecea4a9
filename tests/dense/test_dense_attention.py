"""Attention maps against the plain N × N softmax; the forward pass is untouched; one real image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dinov3
from dinov3.dense.attention import attention_maps, mass_mask
from dinov3.errors import DinoError
from dinov3.models.architectures import ViTConfig
from dinov3.models.vit import VisionTransformer, rotate, rotation

SMALL = ViTConfig(embed_dim=32, depth=3, num_heads=2, n_storage_tokens=4, layerscale_init=1.0)


def plain_attention(model: VisionTransformer, x: torch.Tensor, layer: int) -> torch.Tensor:
    """softmax(q kᵀ / √d) [B, A, N, N] of one block, all of it, step by step."""
    tokens, grid = model.tokens(x)
    rope = tuple(t[0] for t in zip(*[rotation(*model.rope_embed(*grid), 1 + model.n_storage_tokens)]))
    for block in model.blocks[:layer]:
        (tokens,) = block([tokens], [rope])
    attn = model.blocks[layer].attn
    B, N, D = tokens.shape
    qkv = attn.qkv(model.blocks[layer].norm1(tokens)).view(B, N, 3, attn.num_heads, -1)
    q, k = (rotate(qkv[:, :, i : i + 1], *rope)[:, :, 0].transpose(1, 2) for i in range(2))
    return (q @ k.transpose(-1, -2) / (D / attn.num_heads) ** 0.5).softmax(-1)


@pytest.mark.parametrize("registers", [0, 4])
def test_maps_are_rows_of_the_whole_softmax(registers: int) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(replace(SMALL, n_storage_tokens=registers)).eval()
    model.init_weights()
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)  # so that attention is far from uniform
    images = torch.rand(3, 3, 64, 48)
    for layer in (0, 1, -1):
        maps, features = attention_maps(model, images, layer=layer, shape="native", batch_size=2)
        x = torch.stack(
            [dinov3.features.prepare(i, dinov3.default_preprocessing(model, shape="native"))[0] for i in images]
        )
        with torch.no_grad():
            truth = plain_attention(model, x, range(3)[layer])
        prefix = 1 + registers
        assert maps.layer == range(3)[layer]
        assert maps.cls.shape == (3, 2, 4, 3)
        assert maps.registers.shape == (3, registers, 2, 4, 3)
        assert torch.allclose(maps.cls.flatten(2), truth[:, :, 0, prefix:], atol=1e-6)
        assert torch.allclose(maps.registers.flatten(3).transpose(1, 2), truth[:, :, 1:prefix, prefix:], atol=1e-6)
        whole = maps.cls.sum((2, 3)) + maps.prefix[:, 0].sum(-1)
        assert torch.allclose(whole, torch.ones(3, 2), atol=1e-5)
        assert torch.equal(features.patches, dinov3.embed(model, images, shape="native", batch_size=2).patches)
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)


def test_the_fewest_patches_that_hold_a_share() -> None:
    maps = torch.tensor([[[0.1, 0.5], [0.3, 0.1]], [[0.25, 0.25], [0.25, 0.25]]])
    assert mass_mask(maps, 0.6).tolist() == [[[False, True], [True, False]], [[True, True], [True, False]]]
    assert mass_mask(maps, 0.5)[0].tolist() == [[False, True], [False, False]]
    with pytest.raises(DinoError, match="share"):
        mass_mask(maps, 0)


def test_a_convnext_and_a_fast_form_are_refused() -> None:
    with pytest.raises(DinoError, match="plain vision transformer, not a FastViT"):
        attention_maps(dinov3.load(fast="fp32"), torch.rand(3, 32, 32))
    with pytest.raises(DinoError, match="0 to 11"):
        attention_maps(dinov3.load(), torch.rand(3, 32, 32), layer=12)


def test_a_real_image_in_the_shipped_model(skimage_images: Path) -> None:
    model: Any = dinov3.load()
    maps, features = attention_maps(model, skimage_images / "chelsea.png", layer=5, size=224)
    x, _ = dinov3.features.prepare(skimage_images / "chelsea.png", dinov3.default_preprocessing(model, size=224))
    with torch.no_grad():
        truth = plain_attention(model, x[None], 5)
    assert torch.allclose(maps.cls.flatten(2), truth[:, :, 0, 5:], atol=1e-6)
    assert features.layer == 11
