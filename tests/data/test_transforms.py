"""Preprocessing: what happens to the pixels, what is written down, and the way back to the original image."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.data.transforms.inputs import Preprocessing
from dinov3.errors import DinoError, UnknownName


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: a pixel's colour says where it comes from."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).round().astype(np.uint8))


def denormalised(preprocessing: Preprocessing, x: torch.Tensor) -> torch.Tensor:
    return x * torch.tensor(preprocessing.std)[:, None, None] + torch.tensor(preprocessing.mean)[:, None, None]


@pytest.mark.parametrize(
    "preprocessing, image, input_hw",
    [
        (Preprocessing(), (640, 480), (256, 256)),
        (Preprocessing(size=250), (640, 480), (256, 256)),
        (Preprocessing(size=250, fit="crop"), (640, 480), (240, 240)),
        (Preprocessing(size=250, fit="pad"), (640, 480), (256, 256)),
        (Preprocessing(size=256, shape="short"), (640, 480), (256, 336)),  # 341 → 336, the nearest multiple of 16
        (Preprocessing(size=256, shape="short", fit="pad"), (640, 480), (256, 352)),
        (Preprocessing(size=256, shape="short", fit="crop"), (640, 480), (256, 336)),
        (Preprocessing(size=256, shape="long"), (640, 480), (192, 256)),
        (Preprocessing(shape="native"), (100, 50), (48, 96)),
        (Preprocessing(shape="native", multiple=32), (100, 50), (64, 96)),
        (Preprocessing(size=16, shape="long"), (1000, 10), (16, 16)),  # never less than one patch
        (Preprocessing.named("classification"), (640, 480), (224, 224)),
        (Preprocessing.named("transformers"), (640, 480), (224, 224)),
    ],
)
def test_the_plan_is_what_happens(
    preprocessing: Preprocessing, image: tuple[int, int], input_hw: tuple[int, int]
) -> None:
    x, geometry = preprocessing(gradient(*image))
    assert tuple(x.shape) == (3, *input_hw)
    assert geometry.input_hw == input_hw
    assert geometry == preprocessing.plan(*image)
    assert (geometry.width, geometry.height) == image


@pytest.mark.parametrize("fit", ["resize", "pad"])
@pytest.mark.parametrize("shape", ["square", "short", "long", "native"])
def test_no_pixel_is_lost_by_default(shape: str, fit: str) -> None:
    preprocessing = Preprocessing(size=100, shape=shape, fit=fit)
    _, geometry = preprocessing(gradient(157, 83))
    assert not geometry.lost
    x, y = geometry.to_input(157, 83)
    assert (x, y) == pytest.approx((geometry.valid_hw[1], geometry.valid_hw[0]))


def test_a_crop_reports_lost_pixels() -> None:
    _, geometry = Preprocessing(shape="native", fit="crop")(gradient(70, 61))
    assert geometry.lost
    assert geometry.input_hw == (48, 64)
    assert "cropped to 64×48" in str(geometry)


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(size=128),
        Preprocessing(size=128, shape="short"),
        Preprocessing(size=120, shape="long", fit="pad"),
        Preprocessing(size=120, shape="short", fit="crop"),
        Preprocessing.named("classification"),
    ],
)
def test_a_point_of_the_input_is_found_again_in_the_original(preprocessing: Preprocessing) -> None:
    """The colour at an input pixel is the colour at the original pixel that the geometry names."""
    width, height = 400, 300
    x, geometry = preprocessing(gradient(width, height))
    colours = denormalised(preprocessing, x)
    H, W = geometry.valid_hw
    for u, v in ((W * 0.3, H * 0.4), (W * 0.7, H * 0.6), (W * 0.5, H * 0.25)):
        ox, oy = geometry.to_original(u, v)
        assert geometry.to_input(ox, oy) == pytest.approx((u, v))
        red, green, _ = colours[:, int(v), int(u)]
        assert red.item() == pytest.approx(ox / width, abs=0.015)
        assert green.item() == pytest.approx(oy / height, abs=0.015)


def test_padding_is_the_mean_colour_and_lies_right_and_below() -> None:
    preprocessing = Preprocessing(shape="native", fit="pad")
    x, geometry = preprocessing(Image.new("RGB", (20, 30), (255, 0, 0)))
    assert geometry.input_hw == (32, 32)
    assert geometry.valid_hw == (30, 20)
    assert torch.equal(x[:, 30:], torch.zeros(3, 2, 32))
    assert torch.equal(x[:, :, 20:], torch.zeros(3, 32, 12))
    assert torch.allclose(
        denormalised(preprocessing, x)[:, :30, :20], torch.tensor([1.0, 0, 0])[:, None, None], atol=1e-6
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_uint8_resizing_equals_pillow_within_a_grey_level(interpolation: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    preprocessing = Preprocessing(size=64, interpolation=interpolation, mean=(0, 0, 0), std=(1, 1, 1))
    x, _ = preprocessing(noise)
    filter = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    expected = np.asarray(Image.fromarray(noise).resize((64, 64), filter)).astype(int)
    assert np.abs((x * 255).round().permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_dividing_first_differs_from_resizing_first_by_half_a_grey_level() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "size": 64}
    a, _ = Preprocessing(**plain)(noise)
    b, _ = Preprocessing(**plain, order="float")(noise)
    assert 0 < (a - b).abs().max() * 255 < 1.01


def test_the_id_changes_with_every_field() -> None:
    base = Preprocessing()
    changes = {
        "size": 224, "shape": "short", "fit": "pad", "multiple": 32, "interpolation": "bicubic", "order": "float",
        "center_crop": 224, "mean": (0.4, 0.4, 0.3), "std": (0.2, 0.2, 0.2),
    }  # fmt: skip
    assert set(changes) == set(json.loads(base.to_json()))
    assert len({base.id, *(base.with_(**{k: v}).id for k, v in changes.items())}) == 1 + len(changes)
    assert base.id == Preprocessing().id
    assert len(base.id) < 50


def test_preprocessing_survives_json() -> None:
    preprocessing = Preprocessing.named("classification", mean=(0.1, 0.2, 0.3))
    again = Preprocessing.from_json(preprocessing.to_json())
    assert again == preprocessing
    assert again.id == preprocessing.id


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((40, 30), np.uint8),
        np.zeros((40, 30, 3), np.uint8),
        np.zeros((40, 30, 1), np.float32),
        torch.zeros(3, 40, 30, dtype=torch.uint8),
        torch.zeros(3, 40, 30),
        torch.zeros(1, 40, 30),
    ],
)
def test_arrays_and_tensors_are_images_too(image) -> None:
    _, geometry = Preprocessing(size=32)(image)
    assert (geometry.width, geometry.height) == (30, 40)


@pytest.mark.parametrize(
    "image, message",
    [
        (torch.randn(3, 32, 32) * 3, r"floats? .*\[0, 1\]"),
        (torch.full((3, 32, 32), 128.0), r"0 to 255"),
        (torch.zeros(4, 32, 32), r"\[3, height, width\]"),
        (np.zeros((4, 4, 4), np.uint8), r"\[height, width, 3\]"),
        (torch.zeros(3, 32, 32, dtype=torch.int32), "no agreed scale"),
    ],
)
def test_a_tensor_that_is_no_image_is_refused_in_a_sentence(image, message: str) -> None:
    with pytest.raises(DinoError, match=message):
        Preprocessing()(image)


def test_wrong_words_are_answered_with_the_right_ones() -> None:
    with pytest.raises(UnknownName, match="did you mean 'square'"):
        Preprocessing(shape="squares")
    with pytest.raises(UnknownName, match="resize, pad, crop"):
        Preprocessing(fit="stretch")
    with pytest.raises(DinoError, match="leaves nothing"):
        Preprocessing(shape="native", fit="crop")(gradient(10, 100))
    with pytest.raises(DinoError, match="positive"):
        Preprocessing(size=0)


def test_a_strip_is_not_enlarged_beyond_memory() -> None:
    with pytest.raises(DinoError, match="20000×3 would be enlarged to 1706667×256"):
        Preprocessing(size=256, shape="short").plan(20000, 3)
    assert Preprocessing(size=256, shape="square").plan(20000, 3).input_hw == (256, 256)
    assert Preprocessing(shape="native").plan(8992, 8992).input_hw == (8992, 8992)
