"""Dense data sets (files to images and maps) and their joint transforms."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import nested
from PIL import Image

from dinov3.data.datasets import make_dataset
from dinov3.data.transforms.dense import (
    DepthTransform,
    SegmentationTransform,
    depth_colours,
    fixed_box,
    generator,
    photometric,
    resized_map,
    short_side,
    tta_short,
    turned,
    varied_box,
)
from dinov3.data.transforms.inputs import resized
from dinov3.errors import DinoError, ImageError


def image(path: Path, wh: tuple[int, int] = (8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", wh, (10, 200, 30)).save(path)


def mask(path: Path, values=0, wh: tuple[int, int] = (8, 6), dtype=np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.broadcast_to(np.asarray(values, dtype), wh[::-1]).copy()).save(path)


# ---- your own folders ----------------------------------------------------------------------------------------------

LAYOUTS = {
    "images/train, masks/train": ("images/train/{}.jpg", "masks/train/{}.png", "split=train"),
    "train, trainannot": ("train/{}.jpg", "trainannot/{}.png", "split=train"),
    "train, train_masks": ("train/{}.jpg", "train_masks/{}.png", "split=train"),
    "train/images, train/labels": ("train/images/{}.jpg", "train/labels/{}.png", "split=train"),
    "images, annotations": ("images/{}.jpg", "annotations/{}.png", ""),
    "a folder of masks inside": ("{}.png", "masks/{}.png", ""),
    "side by side": ("{}.jpg", "{}_mask.png", ""),
    "side by side with roles": ("{}.color.png", "{}.labels.png", ""),
    "a named folder": ("train/{}.jpg", "elsewhere/train/{}.png", "split=train:targets=elsewhere/{split}"),
    "deeper": ("images/town/{}.jpg", "masks/town/{}.png", ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_found_in_the_usual_layouts(tmp_path, layout):
    images, masks, options = LAYOUTS[layout]
    for i, name in enumerate(("b", "a", "c")):
        image(tmp_path / images.format(name))
        mask(tmp_path / masks.format(name), i)
    data = make_dataset(f"DenseFolder:root={tmp_path}" + (f":{options}" if options else ""))
    assert [int(data[i][1][0, 0]) for i in range(len(data))] == [1, 0, 2]  # a, b, c
    assert data.kind == "classes"
    assert data[0][0].size == (8, 6)
    assert data[0][1].dtype == np.uint8
    assert data.highest_class() == 2
    assert len(pickle.loads(pickle.dumps(data))) == 3


def test_images_without_a_target_are_left_out_and_counted(tmp_path):
    for name in "abc":
        image(tmp_path / "images" / f"{name}.jpg")
    mask(tmp_path / "masks" / "b.png")
    data = make_dataset(f"DenseFolder:root={tmp_path}")
    assert (len(data), data.left_out) == (1, 2)


def test_links_between_folders_give_every_pair_once_and_deep_folders_are_listed(tmp_path):
    for folder in ("images", "masks"):
        for part in ("a", "b"):
            (tmp_path / "elsewhere" / folder / part).mkdir(parents=True)
    for part in ("a", "b"):
        image(tmp_path / "elsewhere" / "images" / part / "x.jpg")
        mask(tmp_path / "elsewhere" / "masks" / part / "x.png")
        for folder in ("images", "masks"):  # into each other, and back to the top
            (tmp_path / "elsewhere" / folder / part / "up").symlink_to(tmp_path / "elsewhere" / folder)
    (tmp_path / "data").mkdir()
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir()
        (tmp_path / "data" / folder / "part").symlink_to(tmp_path / "elsewhere" / folder)
    data = make_dataset(f"DenseFolder:root={tmp_path / 'data'}")
    assert [p.relative_to(tmp_path).as_posix() for p in data.paths] == [
        f"data/images/part/{part}/x.jpg" for part in ("a", "b")
    ]
    assert data.left_out == 0

    with nested(tmp_path / "data" / "images"):
        assert len(make_dataset(f"DenseFolder:root={tmp_path / 'data'}")) == 2


def test_names_and_numbers_of_classes(tmp_path):
    image(tmp_path / "images" / "a.jpg")
    mask(tmp_path / "masks" / "a.png", 11)
    assert make_dataset(f"DenseFolder:root={tmp_path}").n_classes is None
    data = make_dataset(f"DenseFolder:root={tmp_path}:ignore=11:classes=sky,tree")
    assert (data.class_names, data.n_classes, data.highest_class()) == (["sky", "tree"], 2, -1)
    assert (data.target(0) == 255).all()
    (tmp_path / "classes.txt").write_text("one\ntwo\nthree\n")
    assert make_dataset(f"DenseFolder:root={tmp_path}").class_names == ["one", "two", "three"]


def test_depth_comes_in_metres_with_zero_for_unknown(tmp_path):
    image(tmp_path / "x.color.png", (3, 1))
    mask(tmp_path / "x.depth.png", [[1500, 0, 65535]], (3, 1), np.uint16)
    data = make_dataset(f"DenseFolder:root={tmp_path}")
    assert data.kind == "depth"
    assert data[0][1].dtype == np.float32
    assert data[0][1].tolist() == [[1.5, 0, 0]]
    assert make_dataset(f"DenseFolder:root={tmp_path}:unit=500").target(0).tolist() == [[3, 0, 0]]


def test_depth_of_floating_point_files_is_in_metres_already(tmp_path):
    image(tmp_path / "images" / "a.png", (3, 1))
    (tmp_path / "depth").mkdir()
    np.save(tmp_path / "depth" / "a.npy", np.array([[1.5, np.nan, -2]], np.float32))
    assert make_dataset(f"DenseFolder:root={tmp_path}").target(0).tolist() == [[1.5, 0, 0]]


def test_heights_keep_the_ground_and_forget_what_is_ignored(tmp_path):
    image(tmp_path / "images" / "a.png", (3, 1))
    mask(tmp_path / "chm" / "a.tif", [[0, 12, 255]], (3, 1))
    data = make_dataset(f"DenseFolder:root={tmp_path}:ignore=255")
    assert data.kind == "height"
    assert data.target(0).tolist()[0][:2] == [0, 12]
    assert np.isnan(data.target(0)[0, 2])
    assert make_dataset(f"DenseFolder:root={tmp_path}:unit=10").target(0)[0, 1] == np.float32(1.2)


def test_select_takes_a_slice_of_the_sorted_pairs(tmp_path):
    for i in range(5):
        image(tmp_path / "images" / f"{i}.jpg")
        mask(tmp_path / "masks" / f"{i}.png", i)
    values = [int(t[0, 0]) for _, t in make_dataset(f"DenseFolder:root={tmp_path}:select=1:4")]
    assert values == [1, 2, 3]
    assert len(make_dataset(f"DenseFolder:root={tmp_path}:select=::2")) == 3
    for wrong in ("x", "9:", "1"):
        with pytest.raises(DinoError, match="select"):
            make_dataset(f"DenseFolder:root={tmp_path}:select={wrong}")


def test_palette_and_grey_rgb_masks_are_numbers_and_colours_are_refused(tmp_path):
    for name in "abc":
        image(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "masks").mkdir()
    palette = Image.fromarray(np.full((6, 8), 3, np.uint8), "P")
    palette.putpalette([0, 0, 0] * 3 + [255, 0, 0] * 253)
    palette.save(tmp_path / "masks" / "a.png")
    Image.new("RGB", (8, 6), (4, 4, 4)).save(tmp_path / "masks" / "b.png")
    Image.new("RGB", (8, 6), (4, 5, 4)).save(tmp_path / "masks" / "c.png")
    data = make_dataset(f"DenseFolder:root={tmp_path}")
    assert (int(data.target(0)[0, 0]), int(data.target(1)[0, 0])) == (3, 4)
    with pytest.raises(ImageError, match="mask of colours"):
        data.target(2)


def test_errors_of_a_folder_name_the_cause(tmp_path):
    image(tmp_path / "train" / "a.jpg")
    with pytest.raises(DinoError, match="is not a folder"):
        make_dataset(f"DenseFolder:root={tmp_path / 'train' / 'a.jpg'}")
    with pytest.raises(DinoError, match=r"no such file or folder: .*trian; did you mean 'train'"):
        make_dataset(f"DenseFolder:root={tmp_path / 'trian'}")
    with pytest.raises(DinoError, match="did you mean 'train'"):
        make_dataset(f"DenseFolder:root={tmp_path}:split=trian")
    with pytest.raises(DinoError, match="targets="):
        make_dataset(f"DenseFolder:root={tmp_path}:split=train")
    mask(tmp_path / "trainannot" / "a.png", wh=(4, 4))
    with pytest.raises(ImageError, match=r"8×6 pixels and a\.png 4×4"):
        make_dataset(f"DenseFolder:root={tmp_path}:split=train")[0]
    mask(tmp_path / "trainannot" / "a_mask.png")
    with pytest.raises(DinoError, match="keep one of them"):
        make_dataset(f"DenseFolder:root={tmp_path}:split=train")
    (tmp_path / "trainannot" / "a_mask.png").unlink()
    (tmp_path / "trainannot" / "a.png").write_text("no image")
    with pytest.raises(ImageError, match="cannot be read as a map"):
        make_dataset(f"DenseFolder:root={tmp_path}:split=train").target(0)


# ---- benchmarks ----------------------------------------------------------------------------------------------------


def test_ade20k_by_list_and_by_folder(tmp_path):
    for name in ("validation/ADE_val_00000002", "validation/ADE_val_00000001"):
        image(tmp_path / "images" / f"{name}.jpg")
        mask(tmp_path / "annotations" / f"{name}.png", int(name[-1]))
    by_folder = make_dataset(f"ADE20K:root={tmp_path}:split=VAL")
    assert [int(t[0, 0]) for _, t in by_folder] == [1, 2]
    assert by_folder.zero_is_other
    assert by_folder.n_classes == 150
    (tmp_path / "ADE20K_object150_val.txt").write_text("validation/ADE_val_00000002.jpg\n")
    assert len(make_dataset(f"ADE20K:root={tmp_path}:split=val")) == 1
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0\t0\t0\t1\twall, panel\n")
    assert make_dataset(f"ADE20K:root={tmp_path}:split=val").class_names == ["wall"]
    with pytest.raises(DinoError, match="no images of ADE20K TRAIN"):
        make_dataset(f"ADE20K:root={tmp_path}:split=TRAIN")


def test_nyu_lists_are_sorted_and_leading_slashes_dropped(tmp_path):
    for room in "ba":
        image(tmp_path / room / "rgb.jpg")
        mask(tmp_path / room / "depth.png", 2000 if room == "a" else 3000, dtype=np.uint16)
    (tmp_path / "nyu_test.txt").write_text("/b/rgb.jpg /b/depth.png 518.8\n/a/rgb.jpg /a/depth.png 518.8\n")
    for split in ("VAL", "TEST"):
        assert [float(t[0, 0]) for _, t in make_dataset(f"NYU:root={tmp_path}:split={split}")] == [2, 3]
    (tmp_path / "kitti.txt").write_text("b/rgb.jpg None 721\na/rgb.jpg a/depth.png 721\n")
    data = make_dataset(f"DepthList:root={tmp_path}:list=kitti.txt:unit=256")
    assert (len(data), data.left_out, float(data.target(0)[0, 0])) == (1, 1, 2000 / 256)
    with pytest.raises(DinoError, match=r"nyu_train\.txt"):
        make_dataset(f"NYU:root={tmp_path}:split=TRAIN")


def test_voc_and_cityscapes_layouts(tmp_path):
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_1\n")
    image(tmp_path / "JPEGImages" / "2007_1.jpg")
    mask(tmp_path / "SegmentationClass" / "2007_1.png", 20)
    voc = make_dataset(f"VOC2012:root={tmp_path}:split=VAL")
    assert (voc.n_classes, voc.class_names[20], int(voc[0][1][0, 0])) == (21, "tvmonitor", 20)

    image(tmp_path / "leftImg8bit/val/ulm/ulm_0_leftImg8bit.png", (3, 1))
    mask(tmp_path / "gtFine/val/ulm/ulm_0_gtFine_labelIds.png", [[7, 33, 3]], (3, 1))
    cityscapes = make_dataset(f"Cityscapes:root={tmp_path}:split=VAL")
    assert cityscapes[0][1].tolist() == [[0, 18, 255]]
    assert cityscapes.n_classes == 19


@pytest.mark.data
def test_real_folders_load(development_data):
    camvid = make_dataset(f"DenseFolder:root={development_data / 'camvid'}:split=val:ignore=11")
    assert (len(camvid), camvid.kind, camvid.highest_class()) == (34, "classes", 10)
    rooms = make_dataset(f"DenseFolder:root={development_data / '7scenes'}")
    assert (len(rooms), rooms.kind) == (112, "depth")
    depth = rooms[0][1]
    assert 0.5 < np.median(depth[depth > 0]) < 3


# ---- joint transforms ----------------------------------------------------------------------------------------------

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


class Replay:
    """A generator that gives prepared numbers, then complains."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def random(self) -> float:
        return self.values.pop(0)


def blocks(h: int = 48, w: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """An image of 16-pixel blocks whose grey says the class: 0, 20, 40, … and its class map."""
    labels = (np.arange(h)[:, None] // 16 * (w // 16) + np.arange(w)[None] // 16).astype(np.uint8)
    return np.repeat(labels[..., None] * 20, 3, axis=-1), labels


def test_depth_is_evaluated_at_a_long_side_rounded_down():
    x, depth = DepthTransform(img_size=256)(np.zeros((427, 640, 3), np.uint8), np.ones((427, 640), np.float32))
    assert x.shape == (3, 256, 383)
    assert depth.shape == (427, 640)
    labels = np.zeros((427, 640), np.uint8)
    assert SegmentationTransform(img_size=256)(np.zeros((427, 640, 3), np.uint8), labels)[0].shape == (3, 256, 384)


def test_sizes_of_the_published_protocol():
    assert [tta_short(896, r) for r in (0.9, 0.95, 1, 1.05, 1.1)] == [832, 864, 896, 940, 985]
    assert short_side((480, 640), 512) == (512, 683)
    assert short_side((640, 480), 896) == (1195, 896)
    assert short_side((480, 640), 832) == (832, 1109)
    assert short_side((427, 640), 256, down=True) == (256, 383)  # as torchvision; the depth path
    assert short_side((480, 640), 512, down=True) == (512, 682)
    assert fixed_box("NYU", (480, 640)) == (45, 43, 472, 608)
    assert fixed_box("NYU", (240, 320)) == (22, 21, 236, 304)
    with pytest.raises(DinoError, match="did you mean 'NYU'"):
        fixed_box("NYUV", (4, 4))


def test_transforms_are_a_function_of_seed_epoch_and_index():
    image_, labels = blocks()
    transform = SegmentationTransform(32, (0.5, 2.0), (24, 24), 0.5)
    depth_rule = DepthTransform(random_crop=(40, 40), rotation_angle=2.5)

    def made(*key):
        return [*transform(image_, labels, generator(*key)), *depth_rule(image_, labels / 4, generator(*key))]

    first = made(0, 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, made(0, 1, 2)))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        changed = made(*other)
        assert not torch.equal(first[0], changed[0])
        assert not torch.equal(first[2], changed[2])


def test_image_and_classes_stay_together():
    image_, labels = blocks()
    transform = SegmentationTransform(96, (0.5, 2.0), (40, 56), 0.5, colours=False, mean=MEAN, std=STD)
    for index in range(20):
        x, y = transform(image_, labels, generator(0, 0, index))
        assert x.shape == (3, 40, 56)
        assert y.shape == (40, 56)
        agree = (x[0] / 20 - y).abs() < 0.01  # exact inside of blocks, mixed at their borders
        assert agree.float().mean() > 0.7
        assert set(y.unique().tolist()) <= set(range(12))


def test_padding_is_zero_and_ignored():
    image_, labels = blocks()
    x, y = SegmentationTransform(None, None, (64, 80), mean=(9.0, 9.0, 9.0), std=STD)(
        image_, labels, generator(0, 0, 0)
    )
    assert (y[48:] == 255).all()
    assert (y[:, 64:] == 255).all()
    assert (y[:48, :64] != 255).all()
    assert (x[:, 48:] == 0).all()
    assert (x[:, :, 64:] == 0).all()


def test_zero_reduction_comes_before_the_crop_counts_classes():
    labels = np.zeros((40, 40), np.uint8)
    labels[:, 20:] = 1
    labels[:, 30:] = 2
    _, y = SegmentationTransform(crop_hw=(8, 40), reduce_zero_label=True)(
        np.zeros((40, 40, 3), np.uint8), labels, generator(0, 0, 0)
    )
    assert y[0].unique().tolist() == [0, 1, 255]


def slow_varied_box(labels, crop_hw, rng):
    h, w = labels.shape
    for _ in range(11):
        top = int(rng.random() * (h - crop_hw[0] + 1))
        left = int(rng.random() * (w - crop_hw[1] + 1))
        seen = Counter(int(v) for v in labels[top : top + crop_hw[0], left : left + crop_hw[1]].flatten() if v != 255)
        if len(seen) >= 2 and max(seen.values()) < 0.75 * sum(seen.values()):
            break
    return top, left, top + crop_hw[0], left + crop_hw[1]


def test_crops_are_drawn_again_until_no_class_fills_them():
    labels = torch.zeros(60, 60, dtype=torch.uint8)
    labels[:30, :30] = 1
    labels[50:] = 255
    good = 0
    for index in range(60):
        box = varied_box(labels, (20, 20), generator(0, 0, index))
        assert box == slow_varied_box(labels, (20, 20), generator(0, 0, index))
        part = labels[box[0] : box[2], box[1] : box[3]]
        part = part[part != 255]
        good += 0.25 < float((part == 1).float().mean()) < 0.75
    assert good > 55  # a single draw satisfies in a minority of the cases


def test_colours_equal_torchvisions_operations(oracles):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (3, 30, 31)).astype(np.uint8))
    no, yes = 0.9, 0.1  # probability ½ each
    # shift, contrast, early?, saturation, hue
    alone = {
        (no, yes, 0.7, yes, no, no): (pixels * 1.2).clamp(0, 255).to(torch.uint8),
        (no, no, yes, yes, 0.2, no): functional.adjust_saturation(pixels, 0.7),
        (no, no, yes, no, yes, 0.85): functional.adjust_hue(pixels, 0.35),
        (no, no, yes, no, yes, 0.05): functional.adjust_hue(pixels, -0.45),
        (yes, 0.75, no, yes, no, no): (pixels.int() + 16).clamp(0, 255),
        (no, no, yes, no, no): pixels,
    }
    for draws, expected in alone.items():
        away = (photometric(pixels, Replay(*draws)).int() - expected.int()).abs()
        assert away.max() <= 2, draws  # torchvision's hue goes through rounded HSV
        assert away.float().mean() < 0.3, draws
    late, early = (photometric(pixels, Replay(no, yes, 0.9, coin, yes, 0.1, no)) for coin in (no, yes))
    steps = ("saturation", 0.6), ("contrast", 1.4)
    for got, order in ((late, steps), (early, steps[::-1])):
        assert (got.int() - in_order(functional, pixels, order).int()).abs().max() <= 2
    assert (late.int() - early.int()).abs().max() > 10


def in_order(functional, x, steps):
    for name, factor in steps:
        x = (
            functional.adjust_saturation(x, factor)
            if name == "saturation"
            else (x * factor).clamp(0, 255).to(torch.uint8)
        )
    return x


def test_a_constant_grey_spreads_as_in_the_reference() -> None:
    grey, rng = torch.full((3, 2, 2), 100, dtype=torch.uint8), random.Random(0)
    levels = torch.stack([photometric(grey, rng).float().mean() for _ in range(4000)])
    assert 30 < levels.min() < 40
    assert 185 < levels.max() < 199
    assert levels.std() == pytest.approx(24.5, abs=0.7)


def test_resizing_equals_torchvisions(oracles):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    rng = np.random.default_rng(1)
    pixels = torch.from_numpy(rng.integers(0, 256, (3, 30, 40)).astype(np.uint8))
    labels = torch.from_numpy(rng.integers(0, 151, (30, 40)).astype(np.uint8))
    nearest = functional.InterpolationMode.NEAREST
    for size in ((21, 28), (45, 60)):
        assert (resized(pixels, size).int() - functional.resize(pixels, size, antialias=True).int()).abs().max() <= 1
        assert torch.equal(resized_map(labels, size), functional.resize(labels[None], size, interpolation=nearest)[0])


@pytest.mark.parametrize("degrees", [0.0, 2.5, -40.0])
def test_turning_equals_torchvisions_rotation(oracles, degrees):
    functional = pytest.importorskip("torchvision.transforms.functional")
    rng = np.random.default_rng(2)
    smooth = np.cumsum(rng.normal(0, 3, (3, 40, 41)), axis=1) + 128
    pixels, depth = (
        torch.from_numpy(smooth.clip(0, 255).astype(np.uint8)),
        torch.from_numpy(rng.uniform(1, 9, (40, 41))),
    )
    x, d = turned(pixels, depth.float(), degrees)
    bilinear = functional.InterpolationMode.BILINEAR
    assert (x - functional.rotate(pixels.float(), degrees, bilinear)).abs().max() <= 0.6
    assert (d != functional.rotate(depth.float()[None], degrees)[0]).float().mean() < 0.01  # ties of rounding
    square = depth[:, :40].float()
    assert torch.equal(turned(pixels[:, :, :40], square, 90.0)[1], torch.rot90(square))


def test_depth_colours_are_computed_on_levels():
    x = torch.full((3, 1, 1), 100, dtype=torch.uint8)
    got = depth_colours(x, Replay(0.0, 0.5, 0.5, 0.0, 1.0), (0.75, 1.25))
    assert got.flatten().tolist() == pytest.approx([100**0.9 * f for f in (1.0, 0.9, 1.1)], rel=1e-5)
    assert depth_colours(x, Replay(1.0, 1.0, 1.0, 1.0, 1.0), (0.75, 1.25)).max() <= 255


def test_depth_targets_follow_the_crop_the_region_and_the_flip():
    depth = np.tile(np.arange(64, dtype=np.float32) + 1, (48, 1))
    image_ = np.repeat(depth[..., None], 3, -1).astype(np.uint8)
    transform = DepthTransform(fixed_crop="NYU", mean=MEAN, std=(1 / 255,) * 3)
    x, d = transform(image_, depth)
    assert x.shape[1:] == d.shape == (43, 56)  # 45…472 of 480 and 43…608 of 640, over ten
    assert torch.equal(x[0], d)
    flipped = DepthTransform(mean=MEAN, std=(1 / 255,) * 3)(image_, depth, Replay(0.1, 0.9))
    assert torch.equal(flipped[0][0], flipped[1])
    assert flipped[1][0, 0] == 64
    masked = DepthTransform(region="NYU_EIGEN")(image_, depth)[1]
    assert (masked[:4] == 0).all()
    assert (masked[5:47, 5:60] > 0).all()
    small, kept = DepthTransform(24, mean=MEAN, std=(1 / 255,) * 3)(image_, depth)
    assert small.shape[1:] == (24, 32)
    assert kept.shape == (48, 64)  # for evaluation the truth keeps its size
    with pytest.raises(DinoError, match="random_crop 99×10"):
        DepthTransform(random_crop=(99, 10))(image_, depth, generator(0, 0, 0))
