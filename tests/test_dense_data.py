"""Dense data sets (files to pictures and maps) and their joint transforms."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3.data.datasets import make_dataset
from dinov3.errors import DinoError, PictureError


def picture(path: Path, wh: tuple[int, int] = (8, 6)) -> None:
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
    pictures, masks, options = LAYOUTS[layout]
    for i, name in enumerate(("b", "a", "c")):
        picture(tmp_path / pictures.format(name))
        mask(tmp_path / masks.format(name), i)
    data = make_dataset(f"DenseFolder:root={tmp_path}" + (f":{options}" if options else ""))
    assert [int(data[i][1][0, 0]) for i in range(len(data))] == [1, 0, 2]  # a, b, c
    assert data.kind == "classes"
    assert data[0][0].size == (8, 6)
    assert data[0][1].dtype == np.uint8
    assert data.highest_class() == 2
    assert len(pickle.loads(pickle.dumps(data))) == 3


def test_pictures_without_a_target_are_left_out_and_counted(tmp_path):
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.jpg")
    mask(tmp_path / "masks" / "b.png")
    data = make_dataset(f"DenseFolder:root={tmp_path}")
    assert (len(data), data.left_out) == (1, 2)


def test_names_and_numbers_of_classes(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    mask(tmp_path / "masks" / "a.png", 11)
    assert make_dataset(f"DenseFolder:root={tmp_path}").n_classes is None
    data = make_dataset(f"DenseFolder:root={tmp_path}:ignore=11:classes=sky,tree")
    assert (data.class_names, data.n_classes, data.highest_class()) == (["sky", "tree"], 2, -1)
    assert (data.target(0) == 255).all()
    (tmp_path / "classes.txt").write_text("one\ntwo\nthree\n")
    assert make_dataset(f"DenseFolder:root={tmp_path}").class_names == ["one", "two", "three"]


def test_depth_comes_in_metres_with_zero_for_unknown(tmp_path):
    picture(tmp_path / "x.color.png", (3, 1))
    mask(tmp_path / "x.depth.png", [[1500, 0, 65535]], (3, 1), np.uint16)
    data = make_dataset(f"DenseFolder:root={tmp_path}")
    assert data.kind == "depth"
    assert data[0][1].dtype == np.float32
    assert data[0][1].tolist() == [[1.5, 0, 0]]
    assert make_dataset(f"DenseFolder:root={tmp_path}:unit=500").target(0).tolist() == [[3, 0, 0]]


def test_depth_of_floating_point_files_is_in_metres_already(tmp_path):
    picture(tmp_path / "images" / "a.png", (3, 1))
    (tmp_path / "depth").mkdir()
    np.save(tmp_path / "depth" / "a.npy", np.array([[1.5, np.nan, -2]], np.float32))
    assert make_dataset(f"DenseFolder:root={tmp_path}").target(0).tolist() == [[1.5, 0, 0]]


def test_select_takes_a_slice_of_the_sorted_pairs(tmp_path):
    for i in range(5):
        picture(tmp_path / "images" / f"{i}.jpg")
        mask(tmp_path / "masks" / f"{i}.png", i)
    values = [int(t[0, 0]) for _, t in make_dataset(f"DenseFolder:root={tmp_path}:select=1:4")]
    assert values == [1, 2, 3]
    assert len(make_dataset(f"DenseFolder:root={tmp_path}:select=::2")) == 3
    for wrong in ("x", "9:", "1"):
        with pytest.raises(DinoError, match="select"):
            make_dataset(f"DenseFolder:root={tmp_path}:select={wrong}")


def test_palette_and_grey_rgb_masks_are_numbers_and_colours_are_refused(tmp_path):
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "masks").mkdir()
    palette = Image.fromarray(np.full((6, 8), 3, np.uint8), "P")
    palette.putpalette([0, 0, 0] * 3 + [255, 0, 0] * 253)
    palette.save(tmp_path / "masks" / "a.png")
    Image.new("RGB", (8, 6), (4, 4, 4)).save(tmp_path / "masks" / "b.png")
    Image.new("RGB", (8, 6), (4, 5, 4)).save(tmp_path / "masks" / "c.png")
    data = make_dataset(f"DenseFolder:root={tmp_path}")
    assert (int(data.target(0)[0, 0]), int(data.target(1)[0, 0])) == (3, 4)
    with pytest.raises(PictureError, match="mask of colours"):
        data.target(2)


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(DinoError, match="is not a folder"):
        make_dataset(f"DenseFolder:root={tmp_path / 'no'}")
    picture(tmp_path / "train" / "a.jpg")
    with pytest.raises(DinoError, match="did you mean 'train'"):
        make_dataset(f"DenseFolder:root={tmp_path}:split=trian")
    with pytest.raises(DinoError, match="targets="):
        make_dataset(f"DenseFolder:root={tmp_path}:split=train")
    mask(tmp_path / "trainannot" / "a.png", wh=(4, 4))
    with pytest.raises(PictureError, match=r"8×6 pixels and a\.png 4×4"):
        make_dataset(f"DenseFolder:root={tmp_path}:split=train")[0]
    mask(tmp_path / "trainannot" / "a_mask.png")
    with pytest.raises(DinoError, match="keep one of them"):
        make_dataset(f"DenseFolder:root={tmp_path}:split=train")
    (tmp_path / "trainannot" / "a_mask.png").unlink()
    (tmp_path / "trainannot" / "a.png").write_text("no picture")
    with pytest.raises(PictureError, match="cannot be read as a map"):
        make_dataset(f"DenseFolder:root={tmp_path}:split=train").target(0)


# ---- benchmarks ----------------------------------------------------------------------------------------------------


def test_ade20k_by_list_and_by_folder(tmp_path):
    for name in ("validation/ADE_val_00000002", "validation/ADE_val_00000001"):
        picture(tmp_path / "images" / f"{name}.jpg")
        mask(tmp_path / "annotations" / f"{name}.png", int(name[-1]))
    by_folder = make_dataset(f"ADE20K:root={tmp_path}:split=VAL")
    assert [int(t[0, 0]) for _, t in by_folder] == [1, 2]
    assert by_folder.zero_is_other
    assert by_folder.n_classes == 150
    (tmp_path / "ADE20K_object150_val.txt").write_text("validation/ADE_val_00000002.jpg\n")
    assert len(make_dataset(f"ADE20K:root={tmp_path}:split=val")) == 1
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0\t0\t0\t1\twall, panel\n")
    assert make_dataset(f"ADE20K:root={tmp_path}:split=val").class_names == ["wall"]
    with pytest.raises(DinoError, match="no pictures of ADE20K TRAIN"):
        make_dataset(f"ADE20K:root={tmp_path}:split=TRAIN")


def test_nyu_lists_are_sorted_and_leading_slashes_dropped(tmp_path):
    for room in "ba":
        picture(tmp_path / room / "rgb.jpg")
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
    picture(tmp_path / "JPEGImages" / "2007_1.jpg")
    mask(tmp_path / "SegmentationClass" / "2007_1.png", 20)
    voc = make_dataset(f"VOC2012:root={tmp_path}:split=VAL")
    assert (voc.n_classes, voc.class_names[20], int(voc[0][1][0, 0])) == (21, "tvmonitor", 20)

    picture(tmp_path / "leftImg8bit/val/ulm/ulm_0_leftImg8bit.png", (3, 1))
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
