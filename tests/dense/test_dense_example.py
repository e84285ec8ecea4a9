"""Segmentation by one example: planted things, several examples, debiasing; one real image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from test_dense_similarity import features_of
from torch import Tensor

import dinov3
from dinov3.dense import debias, example, similarity
from dinov3.errors import DinoError
from dinov3.features import Features


def scene(box: tuple[int, int, int, int], seed: int) -> tuple[Features, Tensor]:
    """8 × 12 patches: a thing of two materials in a box of patches (r0, c0, r1, c1), on ground of three; and its mask."""
    rng = torch.Generator().manual_seed(seed)
    kinds = torch.randint(2, 5, (8, 12), generator=rng)
    r0, c0, r1, c1 = box
    kinds[r0:r1, c0:c1] = torch.randint(0, 2, (r1 - r0, c1 - c0), generator=rng)
    patches = torch.eye(16)[kinds] + 0.15 * torch.randn(8, 12, 16, generator=rng)
    mask = torch.zeros(128, 192)
    mask[16 * r0 : 16 * r1, 16 * c0 : 16 * c1] = 1
    return features_of(patches, 192, 128), mask


def test_a_planted_thing_of_two_materials_is_found_elsewhere() -> None:
    seen, mask = scene((2, 3, 6, 8), 0)
    other, truth = scene((1, 6, 5, 11), 1)
    probability = example.learn(seen, mask)(other, smooth=False)
    assert probability.shape == (1, 8, 12)
    assert torch.equal(probability[0] > 0.5, similarity.mask_on_grid(other, truth) > 0.5)
    # the mean of the two materials is no patch's direction: with its threshold some ground is taken in, or thing left out
    direction, threshold = example.plain(seen, mask)
    assert float(similarity.cosine_map(other, direction)[0].max()) < 0.9
    assert 0 < threshold < 1


def test_several_examples_are_joined() -> None:
    parts = [scene((2, 3, 6, 8), 0), scene((0, 0, 3, 3), 2)]
    parts[1] = (replace(parts[1][0], patches=parts[1][0].patches.roll(5, -1)), parts[1][1])  # other materials
    joint = example.learn([p[0] for p in parts], [p[1] for p in parts])
    for seed, roll in ((3, 0), (4, 5)):
        other, truth = scene((1, 6, 5, 11), seed)
        other = replace(other, patches=other.patches.roll(roll, -1))
        assert torch.equal(joint(other, smooth=False)[0] > 0.5, similarity.mask_on_grid(other, truth) > 0.5)


def test_position_is_no_help_after_debiasing() -> None:
    """A strong direction says left or right; the thing is left in the example and right elsewhere."""
    seen, mask = scene((2, 1, 6, 5), 0)
    other, truth = scene((2, 7, 6, 11), 1)
    slope = 3 * torch.linspace(-1, 1, 12)[None, :, None] * torch.eye(16)[15]
    seen, other = (replace(f, patches=f.patches + slope) for f in (seen, other))
    bias = debias.PositionBias(torch.eye(16)[:, 15:], "toy", 11, True)
    found = similarity.mask_on_grid(other, truth) > 0.5
    assert torch.equal(example.learn(seen, mask, bias=bias)(other, smooth=False)[0] > 0.5, found)
    assert not torch.equal(example.learn(seen, mask)(other, smooth=False)[0] > 0.5, found)


def test_a_thing_thinner_than_a_patch_is_an_example() -> None:
    seen, _ = scene((2, 3, 6, 8), 0)
    mask = torch.zeros(128, 192)
    mask[40:44, 56:120] = 1  # a quarter of the patches in row 2
    found = example.learn(seen, mask)(seen, smooth=False)
    assert float(found[0, 2, 4]) > 0.5
    assert torch.equal(example.learn(seen, mask.numpy())(seen, smooth=False), found)


def test_the_best_threshold() -> None:
    score, truth = torch.tensor([0.9, 0.1, 0.8, 0.4, 0.3]), torch.tensor([True, False, True, False, True])
    assert example.best_threshold(score, truth) == pytest.approx(0.2)  # 3 of 4; 0.6 has 2 of 3
    assert example.best_threshold(score, truth & (score > 0.5)) == pytest.approx(0.6)


def test_mistakes_are_sentences() -> None:
    seen, mask = scene((2, 3, 6, 8), 0)
    with pytest.raises(DinoError, match="empty or covers everything"):
        example.learn(seen, mask * 0)
    with pytest.raises(DinoError, match="empty or covers everything"):
        example.learn(seen, mask * 0 + 1)
    with pytest.raises(DinoError, match="as many masks as images"):
        example.learn([seen, seen], [mask])
    with pytest.raises(DinoError, match=r"layer 11.*layer 3"):
        example.learn(seen, mask)(replace(seen, layer=3))


def test_a_real_coffee_cup_is_found_in_its_mirror_image(skimage_images: Path) -> None:
    image = Image.open(skimage_images / "coffee.png").convert("RGB")
    mask = torch.zeros(image.height, image.width)
    mask[60:360, 120:460] = 1  # cup and saucer, roughly
    model = dinov3.load()
    seen, other = (dinov3.embed(model, i, size=256) for i in (image, ImageOps.mirror(image)))
    found = example.learn(seen, mask)(other)[0] > 0.5
    truth = similarity.mask_on_grid(other, mask.flip(1)) > 0.5
    assert float((found & truth).sum() / (found | truth).sum()) > 0.6
