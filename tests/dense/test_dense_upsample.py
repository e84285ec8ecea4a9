"""Patch values at pixels: positions exact, edges of the image followed; one real image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from test_dense_similarity import features_of

import dinov3
from dinov3.dense.similarity import mask_on_grid
from dinov3.dense.upsample import bilinear, edge_aware
from dinov3.errors import DinoError


def test_a_ramp_of_patches_is_the_ramp_of_pixels() -> None:
    features = features_of(torch.zeros(3, 5, 1), 80, 48)
    columns = torch.arange(5).float().expand(3, 5)
    large = bilinear(columns, features)
    expected = (((torch.arange(80) + 0.5) / 16 - 0.5).clamp(0, 4)).expand(48, 80)
    assert torch.allclose(large, expected, atol=1e-5)
    assert torch.allclose(bilinear(torch.stack([columns, 2 * columns], -1), features)[..., 1], 2 * expected, atol=1e-5)


def test_padding_takes_no_part_of_the_image() -> None:
    features = features_of(torch.zeros(2, 2, 1), 24, 20)  # inputs of 32 × 32
    large = bilinear(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), features)
    assert large.shape == (20, 24)
    assert float(large[0, 7]) == 0  # a pixel left of the first patch's centre, at 8
    assert float(large[0, 23]) == pytest.approx((23.5 - 8) / 16)  # the centre of the second lies beyond, at 24


def test_another_size_of_the_whole_image() -> None:
    features = features_of(torch.zeros(2, 2, 1), 32, 32)
    values = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert bilinear(values, features, size_hw=(3, 4))[0].tolist() == pytest.approx([0, 0.25, 0.75, 1])


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_edges_move_to_the_edges_of_the_image() -> None:
    """A red disk on blue, known by the share of each patch that it covers."""
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(160.0), indexing="ij")
    disk = (y - 60).square() + (x - 85).square() < 35**2
    image = torch.where(disk[..., None], torch.tensor([200, 40, 40]), torch.tensor([30, 60, 180])).to(torch.uint8)
    features = features_of(torch.zeros(8, 10, 1), 160, 128)
    share = mask_on_grid(features, disk)
    plain, guided = bilinear(share, features) > 0.5, edge_aware(share, features, image.numpy()) > 0.5
    assert iou(plain, disk) < 0.95
    assert iou(guided, disk) > 0.985
    # three channels are three maps
    three = edge_aware(share[..., None].expand(-1, -1, 3), features, image.numpy())
    assert torch.allclose(three[..., 2], edge_aware(share, features, image.numpy()), atol=1e-6)


def test_a_flat_image_only_blurs_and_a_constant_map_stays() -> None:
    features = features_of(torch.zeros(4, 4, 1), 64, 64)
    flat = np.full((64, 64, 3), 90, np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    ramp = torch.arange(4).float().expand(4, 4)
    apart = (edge_aware(ramp, features, flat) - bilinear(ramp, features))[:, 16:-16]
    assert float(apart.abs().max()) < 2e-3  # the mean of a straight line around a pixel is its value there
    assert torch.allclose(edge_aware(torch.full((4, 4), 0.3), features, noise), torch.full((64, 64), 0.3), atol=1e-4)


def test_mistakes_are_sentences() -> None:
    features = features_of(torch.zeros(4, 4, 1), 64, 64)
    with pytest.raises(DinoError, match=r"\[4, 4\] or \[4, 4, C\], not \[3, 3\]"):
        bilinear(torch.zeros(3, 3), features)
    with pytest.raises(DinoError, match="64×64 pixels, not 32×32"):
        edge_aware(torch.zeros(4, 4), features, np.zeros((32, 32, 3), np.uint8))


def test_a_real_image_lends_its_edges(skimage_images: Path) -> None:
    """Coins, known by the share of each patch that they cover: the guided outlines are nearer to the true ones."""
    image = Image.open(skimage_images / "coins.png").convert("RGB")
    features = dinov3.embed(dinov3.load(), image, size=256)
    coins = torch.from_numpy(np.array(image.convert("L").filter(ImageFilter.MedianFilter(7)))) > 120
    share = mask_on_grid(features, coins)
    plain, guided = bilinear(share, features) > 0.5, edge_aware(share, features, image) > 0.5
    assert 1 - iou(guided, coins) < 0.75 * (1 - iou(plain, coins))
