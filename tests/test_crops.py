"""Crops: the fast operations against their plain definitions, the reference's recorded crops, the distribution, the modes."""

from __future__ import annotations

import colorsys
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from safetensors.numpy import load_file

from dinov3.data.crops import (
    ASPECT,
    BLUR_P,
    Colours,
    Crop,
    CropRules,
    Plan,
    Sample,
    blurred,
    coloured,
    collate,
    cut,
    draw_box,
    finish,
    generator,
    normalised,
    render,
)
from dinov3.data.masking import MaskRules, batch_masks
from dinov3.data.transforms import LVD_MEAN, LVD_STD, to_pixels
from dinov3.errors import DinoError, UnknownName

GOLDEN = Path(__file__).parent / "golden_losses"
MEAN, STD = np.array(LVD_MEAN)[:, None, None], np.array(LVD_STD)[:, None, None]


def picture(width: int = 120, height: int = 90, seed: int = 0) -> np.ndarray:
    """uint8 [h, w, 3], smooth, with saturated colours, greys, black and white in it."""
    small = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (9, 12, 3), np.uint8)
    small[0, :4] = [[0, 0, 0], [255, 255, 255], [128, 128, 128], [255, 0, 0]]
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


# ---------------------------------------------------------------------------------------------------------------------
# The definition: slow, with Pillow and plain loops


def plain_hue(image: Image.Image, turn: float) -> Image.Image:
    """HSV in floating point, pixel by pixel. (Pillow's own HSV has 8 bits: off by several levels.)"""
    pixels = np.asarray(image) / 255
    turned = np.empty_like(pixels)
    for at in np.ndindex(pixels.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*pixels[at])
        turned[at] = colorsys.hsv_to_rgb((h + turn) % 1, s, v)
    return Image.fromarray(np.rint(turned * 255).astype(np.uint8))


def plain_blur(image: Image.Image, sigma: float) -> Image.Image:
    """One 9 × 9 window, all at once, in double precision, on the reflected picture."""
    x = np.arange(-4, 5)
    line = np.exp(-0.5 * (x / sigma) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    padded = np.pad(np.asarray(image).astype(float), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    views = np.lib.stride_tricks.sliding_window_view(padded, (9, 9), axis=(0, 1))  # [h, w, 3, 9, 9]
    return Image.fromarray(np.rint((views * window).sum((-2, -1))).astype(np.uint8))


def plain(image: Image.Image, crop: Crop, side: int) -> np.ndarray:
    """uint8 [3, side, side]: the crop, one Pillow operation after the other."""
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    image = image.crop(box).resize((side, side), Image.Resampling.BICUBIC)
    if crop.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name in crop.colours.order:
        factor = getattr(crop.colours, name)
        if name == "hue":
            image = plain_hue(image, factor)
        else:
            kind = {"brightness": "Brightness", "contrast": "Contrast", "saturation": "Color"}[name]
            image = getattr(ImageEnhance, kind)(image).enhance(factor)
    if crop.colours.grey:
        image = image.convert("L").convert("RGB")
    if crop.sigma is not None:
        image = plain_blur(image, crop.sigma)
    if crop.solarise:
        image = ImageOps.solarize(image, 128)
    return np.asarray(image).transpose(2, 0, 1)


def fast(image: np.ndarray, crop: Crop, side: int) -> np.ndarray:
    base = cut(to_pixels(image)[None], crop, side)
    out = np.empty_like(base)
    finish(base, crop, out)
    return out


def difference(a: np.ndarray, b: np.ndarray) -> tuple[int, float]:
    """(largest, mean) difference in grey levels."""
    d = np.abs(a.astype(int) - b.astype(int))
    return int(d.max()), float(d.mean())


WHOLE = Crop(height=90, width=120)


@pytest.mark.parametrize(
    "colours",
    [Colours(("brightness",), brightness=f) for f in (0.6, 0.93, 1.4)]
    + [Colours(("contrast",), contrast=f) for f in (0.6, 1.07, 1.4)]
    + [Colours(("saturation",), saturation=f) for f in (0.8, 1.01, 1.2)]
    + [Colours(("hue",), hue=f) for f in (-0.1, -0.013, 0.0, 0.06, 0.1)]
    + [Colours(grey=True), Colours()],
    ids=lambda c: f"{(*c.order, 'none')[0]}{c.brightness * c.contrast * c.saturation - 1:+.2f}{c.hue:+.2f}{c.grey}",
)
def test_each_colour_operation_equals_its_definition_within_one_grey_level(colours: Colours) -> None:
    pixels = np.ascontiguousarray(picture().transpose(2, 0, 1))
    got = coloured(pixels.astype(np.float32), colours).astype(np.uint8)
    crop = replace(WHOLE, colours=colours)
    image = Image.fromarray(picture())
    wanted = plain_without_resizing(image, crop)
    largest, mean = difference(got, wanted)
    assert largest <= 1
    assert mean <= 0.01


def plain_without_resizing(image: Image.Image, crop: Crop) -> np.ndarray:
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image)
    if crop.colours.order == ("contrast",):  # its middle is the picture's: no padding
        return np.asarray(ImageEnhance.Contrast(image).enhance(crop.colours.contrast)).transpose(2, 0, 1)
    whole = plain(square, replace(crop, top=0, left=0, height=side, width=side), side)
    return whole[:, : image.height, : image.width]


@pytest.mark.parametrize("turn", (-1 / 6, -0.1, 0.05, 1 / 6))
def test_hue_keeps_value_and_saturation(turn: float) -> None:
    x = np.random.Generator(np.random.PCG64(3)).integers(0, 256, (3, 40, 40)).astype(np.float32)
    high, low = x.max(0), x.min(0)
    y = coloured(x.copy(), Colours(("hue",), hue=turn))
    np.testing.assert_array_equal(y.max(0), high)
    np.testing.assert_array_equal(y.min(0), low)


@pytest.mark.parametrize("sigma", (0.1, 0.3, 0.8, 1.3, 2.0))
@pytest.mark.parametrize("side", (16, 37))
def test_the_separable_blur_equals_the_square_window_within_one_grey_level(sigma: float, side: int) -> None:
    x = np.random.Generator(np.random.PCG64(side)).integers(0, 256, (side, side, 3), np.uint8)  # noise: the worst case
    got = blurred(x.transpose(2, 0, 1).astype(np.float32), sigma)
    largest, mean = difference(got, np.asarray(plain_blur(Image.fromarray(x), sigma)).transpose(2, 0, 1))
    assert largest <= 1
    assert mean <= 0.02


def test_solarisation_inverts_values_of_128_and_more() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = np.stack([ramp] * 3)
    out = np.empty_like(pixels)
    finish(pixels, Crop(solarise=True), out)
    wanted = np.asarray(ImageOps.solarize(Image.fromarray(ramp), 128))
    np.testing.assert_array_equal(out[0], wanted)


@pytest.mark.parametrize("seed", range(12))
def test_whole_crops_equal_the_plain_pipeline(seed: int) -> None:
    image = picture(seed=seed)
    plan = CropRules().plan(120, 90, generator(1, 0, seed))
    for crop, side in [(c, 48) for c in plan.globals_] + [(c, 32) for c in plan.locals_[:3]]:
        largest, mean = difference(fast(image, crop, side), plain(Image.fromarray(image), crop, side))
        assert mean < 0.5, crop
        assert largest <= 6, crop  # one level of resizing, amplified by brightness and contrast one after the other


# ---------------------------------------------------------------------------------------------------------------------
# The reference's recorded crops


class TorchvisionDraws:
    """Draws parameters in torchvision's order from torch's generator, as the recorded run did."""

    def __init__(self, rules: CropRules, seed: int = 51):
        self.rng, self.rules = torch.Generator().manual_seed(seed), rules

    def uniform(self, low: float, high: float) -> float:
        return torch.empty(1).uniform_(low, high, generator=self.rng).item()

    def hit(self, p: float) -> bool:
        return bool(torch.rand(1, generator=self.rng) < p)

    def box(self, width: int, height: int, scale: tuple[float, float]) -> Crop:
        for _ in range(10):
            area = width * height * self.uniform(*scale)
            ratio = torch.empty(1).uniform_(math.log(ASPECT[0]), math.log(ASPECT[1]), generator=self.rng)
            aspect = torch.exp(ratio).item()
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(0, height - h + 1, (1,), generator=self.rng))
                left = int(torch.randint(0, width - w + 1, (1,), generator=self.rng))
                return Crop(top, left, h, w)
        raise AssertionError("ten misses")

    def geometry(self, width: int, height: int, scale: tuple[float, float]) -> Crop:
        crop = self.box(width, height, scale)
        return replace(crop, flip=self.hit(0.5 if self.rules.horizontal_flips else 0.0))

    def colours(self) -> Colours:
        colours = Colours()
        if self.hit(0.8):
            order = torch.randperm(4, generator=self.rng).tolist()
            names = ("brightness", "contrast", "saturation", "hue")
            ranges = ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))
            values = {name: self.uniform(*r) for name, r in zip(names, ranges)}
            values["hue"] = math.trunc(values["hue"] * 255) / 255  # Pillow's HSV has 8 bits
            colours = Colours(order=tuple(names[i] for i in order), **values)
        return replace(colours, grey=self.hit(0.2))

    def distortion(self, crop: Crop, blur_p: float, solarise: bool) -> Crop:
        if not self.rules.share_color_jitter:
            crop = replace(crop, colours=self.colours())
        if self.hit(blur_p):
            crop = replace(crop, sigma=self.uniform(0.1, 2.0))
        return replace(crop, solarise=self.hit(0.2)) if solarise else crop

    def plan(self, width: int, height: int) -> Plan:
        first, second, local = BLUR_P["applied"]
        shared = self.colours() if self.rules.share_color_jitter else None
        one = self.distortion(self.geometry(width, height, self.rules.global_scale), first, False)
        two = self.distortion(self.geometry(width, height, self.rules.global_scale), second, True)
        locals_ = [
            self.distortion(self.geometry(width, height, self.rules.local_scale), local, False)
            for _ in range(self.rules.local_count)
        ]
        return Plan((one, two), tuple(locals_), shared)


RECORDED: dict[str, dict[str, Any]] = {
    "default": {},
    "shared_jitter_noflip": {"share_color_jitter": True, "horizontal_flips": False},
    "gram_distorted": {"gram_size": 48},
    "gram_no_distortions": {"gram_size": 48, "gram_distorted": False},
}


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_crops_of_the_reference_are_reproduced_from_its_draws(case: str) -> None:
    golden = load_file(GOLDEN / "augmentation.safetensors")
    image = golden["image_uint8_hwc"]
    rules = CropRules(global_size=32, local_size=16, local_count=2, **RECORDED[case])
    draws = TorchvisionDraws(rules)
    crops = render(image, draws.plan(image.shape[1], image.shape[0]), rules)
    got = {f"global{i}": c for i, c in enumerate(crops.global_crops)}
    got |= {f"local{i}": c for i, c in enumerate(crops.local_crops)}
    if crops.gram_crops is not None:
        got |= {f"gram{i}": c for i, c in enumerate(crops.gram_crops)}
    for name, crop in got.items():
        wanted = golden[f"{case}.{name}"] * STD * 255 + MEAN * 255
        d = np.abs(crop.numpy().astype(float) - wanted)
        # Pillow's 8-bit HSV: a few levels where hue is turned
        assert d.mean() < 1.5, (name, d.mean(), d.max())
        assert d.max() < 16, (name, d.mean(), d.max())
