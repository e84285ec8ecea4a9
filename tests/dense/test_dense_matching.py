"""Matching patches: identity, masks, thinning, and a known shift."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from toy_models import tiny_vit

import dinov3
from dinov3.dense.matching import Matches, coverage, homography, match, nearest, pixels, project, sample, thin
from dinov3.errors import DinoError, IncompatibleFeatures
from dinov3.features import embed


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_image_matches_itself() -> None:
    x = noise(5, 7, 16)
    found = match(x, x)
    assert torch.equal(found.left, found.right)
    torch.testing.assert_close(found.similarity, torch.ones(35))


def test_chunks_equal_the_whole_matrix() -> None:
    a, b = noise(50, 8), noise(40, 8, seed=1)
    values, numbers = nearest(a, b, 3, chunk=7)
    whole = (a @ b.T).topk(3, dim=1)
    assert torch.equal(numbers, whole.indices)
    torch.testing.assert_close(values, whole.values)
    with pytest.raises(DinoError, match="3 neighbours"):
        nearest(a, b[:2], 3)


def test_masks_drop_matches_and_do_not_bend_them() -> None:
    x = noise(2, 3, 16)
    shuffled = x.flatten(0, 1)[[3, 4, 5, 0, 1, 2]].view(2, 3, 16)  # rows swapped
    left = torch.tensor([[1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    right = torch.tensor([[1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    found = match(x, shuffled, left_mask=left, right_mask=right)
    assert found.left.tolist() == [1, 5]
    assert found.right.tolist() == [4, 2]
    with pytest.raises(DinoError, match="left_mask is a map of patches"):
        match(x, x, left_mask=torch.ones(3, 2))


def test_mutual_matches_are_best_both_ways() -> None:
    left = torch.tensor([[[1.0, 0.0], [0.9, 0.1]]])
    right = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert match(left, right).right.tolist() == [0, 0]
    assert match(left, right, mutual=True).left.tolist() == [0]


def test_a_shift_by_whole_patches_is_found_exactly() -> None:
    """Pixels of textured noise under a random linear patch encoder, translated by two patches."""
    P, encoder = 8, noise(8 * 8, 12, seed=3)
    image = noise(64 + 16, 64 + 16, seed=4)

    def encode(x: torch.Tensor) -> torch.Tensor:
        return x.unfold(0, P, P).unfold(1, P, P).flatten(2) @ encoder

    found = match(encode(image[:64, :64]), encode(image[16:, 8:72]))
    rows, columns = found.left // 8, found.left % 8
    inside = (rows >= 2) & (columns >= 1)
    assert torch.equal(found.right[inside], (rows - 2)[inside] * 8 + (columns - 1)[inside])


def test_pixels_are_of_the_original_image() -> None:
    model = tiny_vit()
    features = embed(model, torch.rand(3, 100, 200), size=64)
    found = match(features, features)
    points = pixels(features, found.left)
    assert points[0].tolist() == [25, 12.5]
    assert points[-1].tolist() == [175, 87.5]
    with pytest.raises(IncompatibleFeatures):
        match(features, embed(model, torch.rand(3, 100, 200), size=32))


def test_coverage_is_the_mean_of_the_cell() -> None:
    mask = torch.zeros(4, 4)
    mask[:, 1] = 1
    assert coverage(mask, (2, 2)).tolist() == [[0.5, 0], [0.5, 0]]


def test_thinning_leaves_no_crowd() -> None:
    points = torch.rand(300, 2, generator=torch.Generator().manual_seed(5)) * 1000
    kept = points[thin(points)]
    assert F.pdist(kept).min() >= 100
    assert len(kept) > 30  # and does not empty the image
    assert thin(torch.tensor([[0.0, 0], [60, 0], [120, 0]])).tolist() == [0, 2]  # the middle one has two neighbours
    assert thin(torch.zeros(0, 2)).tolist() == []


def test_sampling_aligns_corners() -> None:
    ramp = torch.arange(8.0).expand(8, 8)[..., None]
    x = torch.tensor([[0.0, 3], [3.5, 0], [7, 7]])
    assert sample(ramp, x)[:, 0].tolist() == [0, 3.5, 7]


def test_some_of_the_matches() -> None:
    m = Matches(torch.arange(3), torch.arange(3), torch.tensor([0.1, 0.9, 0.5]))
    assert m[m.similarity > 0.3].left.tolist() == [1, 2]
    assert len(m) == 3


def test_a_mask_of_bytes_is_refused_and_an_array_is_taken() -> None:
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    assert coverage(mask, (2, 1)).tolist() == [[1.0], [0.0]]
    with pytest.raises(DinoError, match="not values up to 255"):
        coverage(mask.astype(np.uint8) * 255, (2, 1))


def test_the_ratio_test_drops_what_occurs_twice_but_not_for_neighbours() -> None:
    D = 8
    left = torch.zeros(1, 2, D)
    left[0, 0, 0] = left[0, 1, 1] = 1
    right = torch.zeros(5, 5, D)
    right[..., 7] = 1
    right[0, 0], right[4, 4] = torch.eye(D)[0] + 0.05, torch.eye(D)[0] + 0.051  # twice, far apart
    right[0, 3], right[1, 3] = torch.eye(D)[1] + 0.05, torch.eye(D)[1] + 0.051  # twice, side by side
    assert match(left, right).left.tolist() == [0, 1]
    kept = match(left, right, ratio=0.8)
    assert kept.left.tolist() == [1]
    assert kept.right.tolist() == [3]
    with pytest.raises(DinoError, match="ratio"):
        match(left, right, ratio=1.5)


def test_a_known_homography_is_found_among_half_wrong_matches() -> None:
    truth = torch.tensor([[0.9, 0.1, 20.0], [-0.05, 1.1, -10.0], [1e-4, -2e-4, 1.0]], dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    a = torch.rand(60, 2, generator=rng, dtype=torch.float64) * 400
    b = project(truth[None], a[None])[0]
    wrong = torch.arange(60) % 2 == 0
    b[wrong] += (torch.rand(30, 2, generator=rng, dtype=torch.float64) - 0.5) * 300
    matrix, inliers = homography(a.float(), b.float(), tolerance=2)
    assert bool((inliers[~wrong]).all())
    assert int(inliers[wrong].sum()) <= 2
    assert torch.allclose(matrix.double() / matrix[2, 2], truth, atol=2e-3, rtol=2e-2)


def test_the_homography_is_that_of_scikit_image() -> None:
    transform = pytest.importorskip("skimage.transform")
    rng = torch.Generator().manual_seed(1)
    a = torch.rand(20, 2, generator=rng) * 300
    b = a * torch.tensor([1.2, 0.9]) + 5 + torch.randn(20, 2, generator=rng)
    ours, inliers = homography(a, b, tolerance=50)
    theirs = transform.ProjectiveTransform.from_estimate(a.numpy(), b.numpy())
    assert bool(inliers.all())
    there = torch.from_numpy(theirs(a.numpy())).float()
    assert torch.allclose(project(ours[None], a[None])[0], there, atol=0.05)


def test_three_matches_or_points_on_a_line_have_no_homography() -> None:
    with pytest.raises(DinoError, match="four matches at least"):
        homography(torch.rand(3, 2), torch.rand(3, 2))


def test_a_real_image_and_its_shift_agree_on_the_shift(skimage_images: Path) -> None:
    image = Image.open(skimage_images / "coffee.png").convert("RGB").crop((0, 0, 384, 256))
    moved = Image.new("RGB", (384, 256), (124, 116, 104))
    moved.paste(image.crop((64, 32, 384, 256)), (0, 0))
    model = dinov3.load()
    left, right = (dinov3.embed(model, i, shape="native") for i in (image, moved))
    matches = match(left, right, mutual=True, ratio=0.95)
    a, b = pixels(left, matches.left), pixels(right, matches.right)
    matrix, inliers = homography(a, b, tolerance=8)
    assert int(inliers.sum()) > 60
    there = project(matrix[None], torch.tensor([[[200.0, 120.0]]]))[0, 0]
    assert there.tolist() == pytest.approx([136, 88], abs=4)
