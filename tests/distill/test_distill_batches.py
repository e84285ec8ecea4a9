"""What is done to the pixels of a distillation's batches."""

from __future__ import annotations

import torch

from dinov3.distill import run
from dinov3.distill.teachers import Targets


def test_colours_are_changed_as_defined_step_by_step() -> None:
    pixels = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    x, turned = run.distorted(pixels, torch.Generator().manual_seed(3))
    rng = torch.Generator().manual_seed(3)
    assert torch.equal(turned, torch.rand(16, generator=rng) < 0.5)
    greyed, saturation, contrast, light = (torch.rand(16, 1, 1, 1, generator=rng) for _ in range(4))
    y = torch.stack([p.flip(-1) if t else p for p, t in zip(pixels, turned, strict=True)]).float()
    grey = (y * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    y = grey + (y - grey) * torch.where(greyed < 0.1, 0, 1 + 0.3 * (2 * saturation - 1))
    mean = grey.mean((2, 3), keepdim=True)
    y = (mean + (y - mean) * (1 + 0.3 * (2 * contrast - 1))) * (1 + 0.3 * (2 * light - 1))
    assert (y.round().clamp(0, 255) - x.float()).abs().max() <= 1  # rounding of halves


def test_mirrored_pixels_get_mirrored_targets() -> None:
    pixels = torch.arange(4 * 3 * 4 * 4, dtype=torch.uint8).reshape(4, 3, 4, 4)
    x, turned = run.distorted(pixels, torch.Generator().manual_seed(1))
    assert turned.any()
    assert not turned.all()
    assert x.shape == pixels.shape
    for i in range(4):
        kept = pixels[i].flip(-1) if turned[i] else pixels[i]
        signs = (kept.float().mean(0).diff(dim=-1) > 0) == (x[i].float().mean(0).diff(dim=-1) > 0)
        assert signs.float().mean() > 0.8
    said = Targets(torch.randn(4, 5), torch.randn(4, 2, 3, 5))
    for i, (was, now) in enumerate(zip(said.patches, run.mirrored(said, turned).patches, strict=True)):
        assert torch.equal(now, was.flip(1) if turned[i] else was)


def test_mixing_takes_whole_pixels_or_weighted_means_of_the_neighbour() -> None:
    pixels = torch.tensor([0, 100, 200], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 16, 16).contiguous()
    other = pixels.roll(1, 0)

    def draw(**shares: float) -> torch.Tensor:
        return run.mixed(pixels, shares, torch.Generator().manual_seed(5))

    cut = draw(cutmix=1.0)
    assert ((cut == pixels) | (cut == other)).all()
    taken = (cut == other)[:, 0]
    assert taken.any()
    for box in taken:  # a rectangle: whole rows by whole columns
        assert torch.equal(box, box.any(1)[:, None] & box.any(0)[None, :])
    blend = draw(mixup=1.0).float()
    weights = (blend - pixels) / (other.float() - pixels)
    assert all(w.min() == w.max() and 0 <= w.min() <= 0.51 for w in weights)
    assert torch.equal(draw(), pixels)
    assert torch.equal(draw(cutmix=0.5, mixup=0.5), draw(cutmix=0.5, mixup=0.5))


def test_a_share_of_the_images_is_mixed() -> None:
    pixels = torch.tensor([0, 255] * 100, dtype=torch.uint8)[:, None, None, None].expand(200, 3, 8, 8).contiguous()
    changed = run.mixed(pixels, {"mixup": 0.3}, torch.Generator().manual_seed(0)) != pixels
    assert 0.15 < changed.flatten(1).any(1).float().mean() < 0.45
