"""Crops: the fast operations against their plain definitions, the reference's recorded crops, the distribution, the modes."""

from __future__ import annotations

import colorsys
import json
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from paths import GOLDEN_LOSSES
from PIL import Image, ImageEnhance, ImageOps
from safetensors.numpy import load_file

from dinov3.config.train import load_config
from dinov3.data.crops import (
    ASPECT,
    BLUR_P,
    Crop,
    CropConfig,
    MaskConfig,
    Plan,
    Sample,
    batch_masks,
    collate,
    cut,
    draw_box,
    finish,
    generator,
    render,
)
from dinov3.data.transforms.inputs import LVD_MEAN, LVD_STD, Colours, blurred, coloured, normalised, to_pixels
from dinov3.errors import DinoError, UnknownName

MEAN, STD = np.array(LVD_MEAN)[:, None, None], np.array(LVD_STD)[:, None, None]


def random_image(width: int = 120, height: int = 90, seed: int = 0) -> np.ndarray:
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
    """One 9 × 9 window, all at once, in double precision, on the reflected image."""
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
    base = cut(to_pixels(image), crop, side)
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
    pixels = np.ascontiguousarray(random_image().transpose(2, 0, 1))
    got = coloured(pixels.astype(np.float32), colours).astype(np.uint8)
    crop = replace(WHOLE, colours=colours)
    image = Image.fromarray(random_image())
    wanted = plain_without_resizing(image, crop)
    largest, mean = difference(got, wanted)
    assert largest <= 1
    assert mean <= 0.07  # where a product is a whole number, float32 and Pillow may truncate to different sides


def plain_without_resizing(image: Image.Image, crop: Crop) -> np.ndarray:
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image)
    if crop.colours.order == ("contrast",):  # its middle is the image's: no padding
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
    image = random_image(seed=seed)
    plan = CropConfig().plan(120, 90, generator(1, 0, seed))
    for crop, side in [(c, 48) for c in plan.globals_] + [(c, 32) for c in plan.locals_[:3]]:
        largest, mean = difference(fast(image, crop, side), plain(Image.fromarray(image), crop, side))
        assert mean < 0.5, crop
        assert largest <= 8, crop  # one level of resizing, amplified by brightness and contrast one after the other


# ---------------------------------------------------------------------------------------------------------------------
# The reference's recorded crops


class TorchvisionDraws:
    """Draws parameters in torchvision's order from torch's generator, as the recorded run did."""

    def __init__(self, config: CropConfig, seed: int = 51):
        self.rng, self.config = torch.Generator().manual_seed(seed), config

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
        return replace(crop, flip=self.hit(0.5 if self.config.horizontal_flips else 0.0))

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
        if not self.config.share_color_jitter:
            crop = replace(crop, colours=self.colours())
        if self.hit(blur_p):
            crop = replace(crop, sigma=self.uniform(0.1, 2.0))
        return replace(crop, solarise=self.hit(0.2)) if solarise else crop

    def plan(self, width: int, height: int) -> Plan:
        first, second, local = BLUR_P["applied"]
        shared = self.colours() if self.config.share_color_jitter else None
        one = self.distortion(self.geometry(width, height, self.config.global_scale), first, False)
        two = self.distortion(self.geometry(width, height, self.config.global_scale), second, True)
        locals_ = []
        for _ in range(self.config.local_count):
            windowed = self.config.local_from_global
            crop = Crop() if windowed else self.geometry(width, height, self.config.local_scale)
            locals_.append(self.distortion(crop, local, False))
        return Plan((one, two), tuple(locals_), shared)


RECORDED: dict[str, dict[str, Any]] = {
    "default": {},
    "shared_jitter_noflip": {"share_color_jitter": True, "horizontal_flips": False},
    "gram_distorted": {"gram_size": 48},
    "gram_no_distortions": {"gram_size": 48, "gram_distorted": False},
    "local_subset": {"local_from_global": True, "window_step": 8},
}


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_crops_of_the_reference_are_reproduced_from_its_draws(case: str) -> None:
    golden = load_file(GOLDEN_LOSSES / "augmentation.safetensors")
    image = golden["image_uint8_hwc"]
    config = CropConfig(global_size=32, local_size=16, local_count=2, **RECORDED[case])
    plan = TorchvisionDraws(config).plan(image.shape[1], image.shape[0])
    if config.local_from_global:  # drawn elsewhere, and recorded
        plan = replace(plan, windows=tuple(map(tuple, golden[f"{case}.offsets"].tolist())))
    crops = render(image, plan, config)
    got = {f"global{i}": c for i, c in enumerate(crops.global_crops)}
    got |= {f"local{i}": c for i, c in enumerate(crops.local_crops)}
    if crops.gram_crops is not None:
        got |= {f"gram{i}": c for i, c in enumerate(crops.gram_crops)}
    for name, crop in got.items():
        wanted = golden[f"{case}.{name}"] * STD * 255 + MEAN * 255
        d = np.abs(crop.numpy().astype(float) - wanted)
        assert d.mean() < 0.75, (name, d.mean(), d.max())  # Pillow's 8-bit HSV is off by this much where hue is turned
        assert d.max() <= 8, (name, d.mean(), d.max())


def hue_with_8_bits(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue).astype(int) + round(turn * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), saturation, value)).convert("RGB")


def test_with_pillows_hue_the_plain_definition_is_the_reference_to_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the definition above is the right one, and 8-bit hue is the only difference."""
    monkeypatch.setitem(globals(), "plain_hue", hue_with_8_bits)
    golden = load_file(GOLDEN_LOSSES / "augmentation.safetensors")
    image = golden["image_uint8_hwc"]
    plan = TorchvisionDraws(CropConfig(32, 16, 2)).plan(image.shape[1], image.shape[0])
    for kind, crops, side in (("global", plan.globals_, 32), ("local", plan.locals_, 16)):
        for i, crop in enumerate(crops):
            wanted = golden[f"default.{kind}{i}"] * STD * 255 + MEAN * 255
            d = np.abs(plain(Image.fromarray(image), crop, side) - wanted)
            assert d.mean() < 0.02, (kind, i)
            assert d.max() < 1.01, (kind, i)


# ---------------------------------------------------------------------------------------------------------------------
# The distribution


def plans(config: CropConfig, n: int = 2000) -> list[Plan]:
    return [config.plan(500, 375, generator(0, 0, i)) for i in range(n)]


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


@pytest.mark.parametrize("blur", ("applied", "paper"))
def test_probabilities_are_the_stated_ones(blur: str) -> None:
    drawn = plans(CropConfig(blur=blur, local_count=2))
    one, two, local = ([p.globals_[0] for p in drawn], [p.globals_[1] for p in drawn], [p.locals_[1] for p in drawn])
    for crops, blur_p, solarise_p in zip((one, two, local), BLUR_P[blur], (0, 0.2, 0)):
        for got, wanted in (
            (share([c.sigma is not None for c in crops]), blur_p),
            (share([c.solarise for c in crops]), solarise_p),
            (share([c.flip for c in crops]), 0.5),
            (share([bool(c.colours.order) for c in crops]), 0.8),
            (share([c.colours.grey for c in crops]), 0.2),
        ):
            assert abs(got - wanted) <= 4 * (wanted * (1 - wanted) / len(crops)) ** 0.5


def test_the_applied_blur_is_the_complement_that_was_recorded() -> None:
    recorded = json.loads((GOLDEN_LOSSES / "augmentation_blur.json").read_text())
    nominal = [recorded[f"{p:.1f}"]["torchvision_apply_probability"] for p in BLUR_P["paper"]]
    assert list(BLUR_P["applied"]) == nominal == [0.0, 0.9, 0.5]
    assert CropConfig().blur == "applied"


def test_blur_is_drawn_from_the_range_that_is_set() -> None:
    sigmas = [p.globals_[1].sigma for p in plans(CropConfig(local_count=0, blur_sigma=(0.1, 0.7)))]
    drawn = [s for s in sigmas if s is not None]
    assert 0.1 <= min(drawn) < 0.12
    assert 0.68 < max(drawn) <= 0.7
    changed = load_config(None, ["train.dataset_path=unused", "crops.blur_sigma=[0.1,0.7]"])[0]
    assert changed.crops.blur_sigma == (0.1, 0.7)


@pytest.mark.parametrize("strength", [1.0, 0.5, 2.5])
def test_factors_are_uniform_in_their_ranges_and_orders_are_all_permutations(strength: float) -> None:
    config = CropConfig(local_count=0, color_jitter_strength=strength)
    colours = [p.globals_[0].colours for p in plans(config, 6000)]
    drawn = [c for c in colours if c.order]
    for name, middle, range_ in (("brightness", 1, 0.4), ("contrast", 1, 0.4), ("saturation", 1, 0.2), ("hue", 0, 0.1)):
        low, high = middle - strength * range_, middle + strength * range_
        values = np.sort([getattr(c, name) for c in drawn])
        steps = np.abs((values - low) / (high - low) - np.linspace(0, 1, len(values))).max()  # Kolmogorov-Smirnov
        assert steps < 1.95 / len(values) ** 0.5, name
    orders, counts = np.unique([" ".join(c.order) for c in drawn], return_counts=True)
    assert len(orders) == 24
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 58  # chi-squared, 23 degrees, p < 1e-4


def test_boxes_have_the_area_and_aspect_of_random_resized_crops() -> None:
    """Against the definition drawn by another generator, on an image so large that rounding does not matter."""
    rng = generator(0, 0, 0)
    boxes = np.array([draw_box(4000, 3000, (0.05, 0.32), rng) for _ in range(4000)])
    area = np.sort(boxes[:, 2] * boxes[:, 3] / 12e6)
    log_aspect = np.sort(np.log(boxes[:, 3] / boxes[:, 2]))
    for values, low, high in ((area, 0.05, 0.32), (log_aspect, math.log(3 / 4), math.log(4 / 3))):
        distance = np.abs((values - low) / (high - low) - np.linspace(0, 1, len(values))).max()
        assert distance < 1.95 / len(values) ** 0.5 + 1e-3
    assert (boxes[:, 0] + boxes[:, 2] <= 3000).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 4000).all()
    room = 4000 - boxes[:, 3] + 1
    assert abs(((boxes[:, 1] + 0.5) / room).mean() - 0.5) < 0.02


@pytest.mark.parametrize("size, wanted", (((1000, 10), (0, 493, 10, 13)), ((10, 1000), (493, 0, 13, 10))))
def test_a_image_too_narrow_for_any_box_gives_its_centre(size: tuple[int, int], wanted: tuple[int, ...]) -> None:
    assert draw_box(*size, (0.9, 1.0), generator(0, 0, 0)) == wanted


# ---------------------------------------------------------------------------------------------------------------------
# Rules and modes


def test_the_same_seed_epoch_and_index_give_the_same_crops_and_any_other_does_not() -> None:
    config, image = CropConfig(32, 16, 2), random_image()

    def crops(*key: int) -> torch.Tensor:
        return render(image, config.plan(120, 90, generator(*key)), config).global_crops

    assert crops(1, 2, 3).equal(crops(1, 2, 3))
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not crops(1, 2, 3).equal(crops(*other))


def test_a_pillow_image_an_array_and_a_tensor_give_the_same_crops() -> None:
    config, image = CropConfig(32, 16, 2), random_image()
    plan = config.plan(120, 90, generator(0, 0, 0))
    forms = (image, Image.fromarray(image), torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous())
    a, b, c = (render(form, plan, config) for form in forms)
    assert a.global_crops.equal(b.global_crops)
    assert a.global_crops.equal(c.global_crops)
    assert a.local_crops.equal(c.local_crops)


@pytest.mark.parametrize("size", ((1, 1), (1, 300), (300, 2)))
def test_a_image_of_hardly_any_pixels_still_gives_crops(size: tuple[int, int]) -> None:
    config = CropConfig(32, 16, 2)
    image = Image.new("RGB", size, (10, 200, 30))
    for seed in range(5):
        crops = render(image, config.plan(*size, generator(0, 0, seed)), config)
        assert crops.global_crops.shape == (2, 3, 32, 32)
        assert crops.local_crops.flatten(2).float().std(-1).max() == 0  # of one colour it stays


def test_gram_crops_without_distortions_show_the_box_of_the_global_crop_and_nothing_else() -> None:
    config, image = CropConfig(32, 16, 2, gram_size=48, gram_distorted=False), random_image()
    plan = config.plan(120, 90, generator(0, 0, 4))
    crops = render(image, plan, config)
    assert crops.gram_crops is not None
    for crop, gram in zip(plan.globals_, crops.gram_crops):
        bare = replace(crop, colours=Colours(), sigma=None, solarise=False)
        np.testing.assert_array_equal(gram.numpy(), fast(image, bare, 48))


def test_distorted_gram_crops_show_what_the_global_crops_show() -> None:
    config, image = CropConfig(32, 16, 2, gram_size=64), random_image()
    crops = render(image, config.plan(120, 90, generator(0, 0, 2)), config)
    assert crops.gram_crops is not None
    halved = crops.gram_crops.float().view(2, 3, 32, 2, 32, 2).mean((3, 5))
    assert (halved - crops.global_crops.float()).abs().mean() < 3


def test_shared_colours_are_drawn_once_and_the_crops_have_none_of_their_own() -> None:
    plan = CropConfig(share_color_jitter=True).plan(500, 375, generator(0, 0, 0))
    assert plan.shared is not None
    assert all(c.colours == Colours() for c in plan.globals_ + plan.locals_)


def test_no_crop_is_flipped_where_flips_are_off() -> None:
    drawn = plans(CropConfig(horizontal_flips=False), 50)
    assert not any(c.flip for p in drawn for c in p.globals_ + p.locals_)


def test_windows_are_multiples_of_the_step_inside_the_global_crop() -> None:
    config = CropConfig(224, 96, 8, local_from_global=True)
    windows = np.array([p.windows for p in plans(config, 200)])
    assert set(np.unique(windows)) == set(range(0, 128, 16))


@pytest.mark.parametrize(
    "changes, sentence",
    (
        ({"blur": "aplied"}, "blur is one of applied, paper, not 'aplied'; did you mean 'applied'"),
        ({"global_scale": (0.0, 1.0)}, "global_scale is a range of shares"),
        ({"local_scale": (0.5, 0.1)}, "local_scale is a range of shares"),
        ({"color_jitter_strength": 3.0}, "color_jitter_strength is within 0 … 2.5, not 3.0"),
        ({"blur_sigma": (0.7, 0.1)}, "blur_sigma is a range in pixels"),
        ({"gram_size": 2}, "gram_size must be a side in pixels"),
        ({"local_count": -1}, "local_count cannot be negative"),
        ({"local_from_global": True, "local_count": 3}, "must be an even number"),
        ({"local_from_global": True, "local_size": 224}, "16 pixels smaller"),
    ),
)
def test_invalid_crop_settings_are_errors(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DinoError, match=sentence):
        CropConfig(**changes)
    with pytest.raises(UnknownName):
        CropConfig(blur="gaussian")


def test_sizes_that_a_model_would_silently_cut_are_refused() -> None:
    with pytest.raises(DinoError, match="global_size 70 is no multiple of the patch size 16; the nearest one is 64"):
        CropConfig(global_size=70).check_patch(16)
    with pytest.raises(DinoError, match="gram_size 100 is no multiple"):
        CropConfig(gram_size=100).check_patch(16)
    CropConfig().check_patch(16)
    CropConfig(768, 168, gram_size=1152).check_patch(
        16
    )  # the published high-resolution recipe: a local crop of 10.5 patches


def test_reduced_decoding_never_enlarges_a_crop_that_the_full_image_would_not() -> None:
    config = CropConfig()
    short = 2 * config.target_short_side  # what the decoder keeps at least
    smallest_local = math.sqrt(0.05 * short * short * ASPECT[0])
    smallest_global = math.sqrt(0.32 * short * short * ASPECT[0])
    assert smallest_local >= 96
    assert smallest_global >= 224


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def batch(config: CropConfig, n: int = 3) -> Any:
    samples = []
    for i in range(n):
        plan = config.plan(120, 90, generator(0, 0, i))
        samples.append(Sample(render(random_image(seed=i), plan, config), i, (f"bad{i}",) if i == 1 else ()))
    return samples, collate(samples, batch_masks(2 * n, (2, 2), MaskConfig(), random.Random(0)), config)


def test_batches_are_crop_major() -> None:
    samples, got = batch(CropConfig(32, 16, 4, gram_size=48))
    assert got.global_crops.shape == (6, 3, 32, 32)
    assert got.local_crops.shape == (12, 3, 16, 16)
    assert got.gram_crops.shape == (6, 3, 48, 48)
    for b, sample in enumerate(samples):
        for c in range(2):
            assert got.global_crops[c * 3 + b].equal(sample.crops.global_crops[c])
            assert got.gram_crops[c * 3 + b].equal(sample.crops.gram_crops[c])
        for c in range(4):
            assert got.local_crops[c * 3 + b].equal(sample.crops.local_crops[c])
    assert got.unreadable == ("bad1",)
    assert got.n_masked == got.mask_indices.numel() == got.masks.sum()
    assert got.batch_size == 3


def test_a_batch_is_normalised_when_it_is_moved_and_only_once() -> None:
    _, got = batch(CropConfig(32, 16, 2, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)))
    assert got.global_crops.dtype == torch.uint8
    moved = got.to("cpu", torch.float32)
    wanted = (got.local_crops.numpy() / 255 - np.array([0.5, 0.4, 0.3])[:, None, None]) / np.array([0.2, 0.3, 0.4])[
        :, None, None
    ]
    np.testing.assert_allclose(moved.local_crops.numpy(), wanted, atol=1e-5)
    assert moved.gram_crops is None
    again = moved.to("cpu", torch.bfloat16)
    assert again.global_crops.dtype == torch.bfloat16
    assert again.global_crops.equal(moved.global_crops.bfloat16())
    assert again.masks_weight.dtype == torch.float32


def test_normalising_in_half_precision_rounds_once() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert normalised(x, LVD_MEAN, LVD_STD, torch.bfloat16).equal(normalised(x, LVD_MEAN, LVD_STD).bfloat16())


def test_settings_without_local_crops_give_an_empty_tensor() -> None:
    _, got = batch(CropConfig(32, 16, 0))
    assert got.local_crops.shape == (0, 3, 16, 16)


# ---------------------------------------------------------------------------------------------------------------------
# torchvision, where it is installed


@pytest.mark.parametrize("seed", range(4))
def test_our_definition_is_torchvisions(oracles: None, seed: int) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    image = Image.fromarray(random_image(seed=seed))
    for name, factor in (("brightness", 1.3), ("contrast", 0.7), ("saturation", 1.15)):
        theirs = getattr(functional, f"adjust_{name}")(image, factor)
        ours = plain_without_resizing(image, replace(WHOLE, colours=Colours((name,), **{name: factor})))
        np.testing.assert_array_equal(np.asarray(theirs).transpose(2, 0, 1), ours)
    blurred_ = functional.gaussian_blur(image, [9, 9], [1.3, 1.3])
    largest, mean = difference(np.asarray(blurred_), np.asarray(plain_blur(image, 1.3)))
    assert largest <= 1
    assert mean < 1e-3
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    theirs_hue = (functional.adjust_hue(tensor, 0.07) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    assert difference(theirs_hue, np.asarray(plain_hue(image, 0.07)))[0] <= 1
