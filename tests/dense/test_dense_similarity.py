"""Cosine maps: queries of a pixel, a box and a mask on planted patches; one real image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import dinov3
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.dense import similarity
from dinov3.errors import DinoError
from dinov3.features import Features


def features_of(patches: Tensor, width: int, height: int, **changes: object) -> Features:
    """`Features` of one image of width × height pixels from its patches [h, w, D]."""
    geometry = Preprocessing(shape="native", fit="pad", **changes).plan(width, height)  # type: ignore[arg-type]
    D = patches.shape[-1]
    return Features(torch.zeros(1, D), torch.zeros(1, 0, D), patches[None], 11, 12, True, "toy", "toy", (geometry,))


def two_kinds() -> Features:
    """4 × 6 patches of 16 pixels: direction 0, but direction 1 in rows 1–2 and columns 2–4; lengths differ."""
    patches = torch.zeros(4, 6, 3)
    patches[..., 0] = 5
    patches[1:3, 2:5] = torch.tensor([0.0, 2.0, 0.0])
    return features_of(patches, 96, 64)


def test_a_pixel_a_box_and_a_mask_find_the_planted_object() -> None:
    features = two_kinds()
    truth = torch.zeros(4, 6)
    truth[1:3, 2:5] = 1
    mask = torch.zeros(64, 96)
    mask[16:48, 32:80] = 1
    for query in (
        similarity.at_pixel(features, 40, 20),
        similarity.in_box(features, (32, 16, 80, 48)),
        similarity.in_mask(features, mask),
    ):
        assert torch.allclose(similarity.cosine_map(features, query)[0], truth)


def test_a_box_weighs_patches_by_the_share_it_covers() -> None:
    # a quarter of a column of direction 0, a half of one of direction 1
    query = similarity.in_box(two_kinds(), (28, 16, 40, 32))
    assert torch.allclose(query, torch.nn.functional.normalize(torch.tensor([0.25, 0.5, 0]), dim=0))


def test_several_queries_give_the_largest_cosine() -> None:
    features = two_kinds()
    assert torch.allclose(similarity.cosine_map(features, torch.eye(3)[:2]), torch.ones(1, 4, 6))


def test_padding_is_no_part_of_a_mask() -> None:
    features = features_of(torch.ones(2, 2, 3), 24, 32)  # the right half of the second column is padding
    share = similarity.mask_on_grid(features, torch.ones(32, 24))
    assert share.tolist() == [[1.0, 0.5], [1.0, 0.5]]


def test_mistakes_are_sentences() -> None:
    features = two_kinds()
    with pytest.raises(DinoError, match="has no pixel of the image, which is 96×64"):
        similarity.in_box(features, (100, 0, 120, 20))
    with pytest.raises(DinoError, match="the mask is empty"):
        similarity.in_mask(features, torch.zeros(64, 96))
    with pytest.raises(DinoError, match="a mask of this image is 64×96"):
        similarity.in_mask(features, torch.zeros(96, 64))
    with pytest.raises(DinoError, match="width 3, the query is"):
        similarity.cosine_map(features, torch.ones(4))


def test_a_patch_of_a_real_face_is_most_like_the_face(skimage_images: Path) -> None:
    features = dinov3.embed(dinov3.load(), skimage_images / "astronaut.png", size=256)
    heat = similarity.cosine_map(features, similarity.at_pixel(features, 225, 110))[0]
    assert float(heat[features.patch_of_pixel(225, 110)]) == pytest.approx(1, abs=1e-5)
    (r0, c0), (r1, c1) = features.patch_of_pixel(180, 50), features.patch_of_pixel(260, 170)  # the head
    assert float(heat[r0:r1, c0:c1].mean()) > float(heat.mean()) + 0.15
