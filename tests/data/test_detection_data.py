"""Images with boxes: COCO's JSON, VOC's XML, what is done to both together, and a sentence for every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.data import names
from dinov3.data.datasets import make_dataset
from dinov3.data.transforms.dense import DetectionTransform, cropped, flipped, generator
from dinov3.errors import DinoError, ImageError, UnknownName


def image(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(path)


CONTENT: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 9, "file_name": "b.png", "width": 20, "height": 20},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 18, "bbox": [2, 3, 10, 20], "area": 77.5, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 3, "bbox": [30, 20, 15, 5], "area": 50, "iscrowd": 1},
        {"id": 3, "image_id": 7, "category_id": 3, "bbox": [1, 1, 0, 5], "area": 0, "iscrowd": 0},
    ],
    "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    image(tmp_path / "val2017" / "a.png", (40, 30))
    image(tmp_path / "val2017" / "b.png", (20, 20))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(CONTENT))
    return tmp_path


def test_coco_boxes_are_corners_cut_to_the_image_and_classes_are_counted_from_0(coco: Path) -> None:
    data = make_dataset(f"CocoDetection:root={coco}:split=val2017")
    assert (len(data), data.class_names, data.category_ids, data.left_out) == (2, ["car", "dog"], [3, 18], 1)
    image, target = data[0]
    assert image.size == (40, 30)
    assert target["boxes_xyxy_px"].tolist() == [[2, 3, 12, 23], [30, 20, 40, 25]]
    assert target["labels"].tolist() == [1, 0]
    assert target["crowd"].tolist() == [False, True]
    assert target["area_px2"].tolist() == [77.5, 50]
    assert data.image_id(0) == 7


def test_a_image_without_boxes_stays(coco: Path) -> None:
    _, target = make_dataset(f"CocoDetection:root={coco}:split=val2017")[1]
    assert target["boxes_xyxy_px"].shape == (0, 4)
    assert target["labels"].dtype == torch.int64


def test_the_only_annotation_file_need_not_be_named(coco: Path) -> None:
    assert len(make_dataset(f"CocoDetection:root={coco}")) == 2
    (coco / "annotations" / "instances_train2017.json").write_text("{}")
    with pytest.raises(DinoError, match="several annotation files"):
        make_dataset(f"CocoDetection:root={coco}")


def test_a_bare_list_of_annotations_takes_cocos_own_categories(tmp_path: Path) -> None:
    image(tmp_path / "000000000042.png", (40, 30))
    rows = [{"image_id": 42, "category_id": 17, "bbox": [0, 0, 5, 5], "id": 1}]
    (tmp_path / "boxes.json").write_text(json.dumps(rows))
    data = make_dataset(f"CocoDetection:root={tmp_path}:annotations=boxes.json")
    assert data.class_names[data[0][1]["labels"][0]] == "cat"
    assert len(data.class_names) == 80


def test_the_published_columns_are_cocos_numbers() -> None:
    columns = names.coco()
    assert len(columns) == 91
    assert (columns[0], columns[1], columns[12], columns[90]) == ("", "person", "", "toothbrush")
    assert len(set(columns)) == 81


XML = """<annotation><filename>{name}</filename><size><width>40</width><height>30</height><depth>3</depth></size>
{objects}</annotation>"""
OBJECT = """<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>
<ymax>{}</ymax></bndbox></object>"""


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    (tmp_path / "Annotations").mkdir()
    for n, objects in (
        (10, [("dog", 1, 1, 1, 40, 30)]),
        (2, [("hare", 0, 5, 6, 8, 9), ("dog", 0, 1, 1, 2, 2)]),
        (3, []),
    ):
        image(tmp_path / "JPEGImages" / f"p-{n}.png", (40, 30))
        text = XML.format(name=f"p-{n}.png", objects="".join(OBJECT.format(*o) for o in objects))
        (tmp_path / "Annotations" / f"p-{n}.xml").write_text(text)
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("p-3\np-10\n")
    return tmp_path


def test_voc_counts_pixels_from_one_and_includes_the_last(voc: Path) -> None:
    data = make_dataset(f"VocDetection:root={voc}")
    assert [Path(data.name(i)).stem for i in range(3)] == ["p-2", "p-3", "p-10"]
    assert data.class_names == ["dog", "hare"]
    assert data[0][1]["boxes_xyxy_px"].tolist() == [[4, 5, 8, 9], [0, 0, 2, 2]]
    assert len(data[1][1]["labels"]) == 0
    assert data[2][1]["boxes_xyxy_px"].tolist() == [[0, 0, 40, 30]]
    assert data[2][1]["crowd"].tolist() == [True]  # difficult


def test_a_voc_list_chooses_and_orders(voc: Path) -> None:
    data = make_dataset(f"VocDetection:root={voc}:split=test")
    assert [Path(data.name(i)).stem for i in range(2)] == ["p-3", "p-10"]
    assert len(data.class_names) == 20  # dog is one of VOC's
    with pytest.raises(UnknownName, match="did you mean 'test'"):
        make_dataset(f"VocDetection:root={voc}:split=tets")


def test_mistakes_are_one_sentence(coco: Path, voc: Path, tmp_path: Path) -> None:
    for line, said in (
        ("CocoDetection:split=val2017", "needs root"),
        (f"CocoDetection:root={tmp_path / 'gone'}", "is no folder"),
        (f"CocoDetection:root={coco}:split=val2018", "instances_val2018.json"),
        (f"VocDetection:root={voc / 'ImageSets'}", "no folder Annotations or annotations"),
        (f"CocoDetection:root={coco}:annotation=x", "did you mean 'annotations'"),
    ):
        with pytest.raises(DinoError, match=said) as error:
            make_dataset(line)
        assert "\n" not in str(error.value)
    file = coco / "annotations" / "instances_val2017.json"
    for content, said in (
        ("{]", "no JSON"),
        ('{"images": []}', "needs the lists"),
        (json.dumps(CONTENT | {"annotations": [{"image_id": 8, "category_id": 3, "bbox": [0, 0, 1, 1]}]}), "image 8"),
        (
            json.dumps(CONTENT | {"annotations": [{"image_id": 7, "category_id": 4, "bbox": [0, 0, 1, 1]}]}),
            "category 4",
        ),
        (json.dumps(CONTENT | {"annotations": [{"image_id": 7, "category_id": 3, "bbox": [0, 0]}]}), "no COCO file"),
    ):
        file.write_text(content)
        with pytest.raises(DinoError, match=said):
            make_dataset(f"CocoDetection:root={coco}:split=val2017")
    (voc / "Annotations" / "p-3.xml").write_text("<annotation><object><name>x</name></object></annotation>")
    with pytest.raises(DinoError, match=r"p-3\.xml is no VOC annotation"):
        make_dataset(f"VocDetection:root={voc}")


def test_a_image_of_another_size_than_its_boxes_is_refused(coco: Path) -> None:
    image(coco / "val2017" / "a.png", (30, 40))
    data = make_dataset(f"CocoDetection:root={coco}:split=val2017")
    with pytest.raises(ImageError, match=r"30×40 pixels, its boxes are for 40×30; it was turned"):
        data[0]
    (coco / "val2017" / "b.png").unlink()
    with pytest.raises(ImageError, match=r"b\.png"):
        data[1]


# ---- together ------------------------------------------------------------------------------------------------------


def square(size: tuple[int, int], box: tuple[int, int, int, int]) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """A dark image whose box is white: where the white is, the box must be."""
    x = np.zeros((size[1], size[0], 3), np.uint8)
    x[box[1] : box[3], box[0] : box[2]] = 255
    target = {
        "boxes_xyxy_px": torch.tensor([box], dtype=torch.float32),
        "labels": torch.tensor([4]),
        "crowd": torch.tensor([False]),
        "area_px2": torch.tensor([float((box[2] - box[0]) * (box[3] - box[1]))]),
    }
    return x, target


def test_boxes_follow_their_pixels_through_every_draw() -> None:
    transform = DetectionTransform(short_range=(90, 160), multiple=16)
    image, target = square((120, 80), (30, 24, 78, 66))
    crops = 0
    for i in range(30):
        x, after = transform(image, target, generator(0, 0, i))
        assert x.shape[-2] % 16 == x.shape[-1] % 16 == 0
        white = x[0] > (x.max() + x.min()) / 2 if x.max() > x.min() else torch.ones_like(x[0], dtype=torch.bool)
        rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
        found = [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]
        assert after["boxes_xyxy_px"][0].tolist() == pytest.approx(found, abs=1.5), i
        assert after["labels"].tolist() == [4]
        crops += round(x.shape[-1] / x.shape[-2], 1) not in (1.4, 1.5, 1.6)
    assert crops > 0


def test_draws_depend_on_seed_epoch_and_index_only() -> None:
    transform = DetectionTransform(short_range=(64, 128))
    image, target = square((120, 80), (30, 24, 78, 66))
    x, one = transform(image, target, generator(1, 2, 3))
    y, two = transform(image, target, generator(1, 2, 3))
    assert torch.equal(x, y)
    assert torch.equal(one["boxes_xyxy_px"], two["boxes_xyxy_px"])


def test_evaluation_resizes_to_the_short_side_and_rounds_up() -> None:
    transform = DetectionTransform(short=100)
    assert transform.size_hw((80, 120)) == (112, 160)
    assert transform.size_hw((128, 128)) == (112, 112)
    assert DetectionTransform().size_hw((480, 640)) == (2048, 2736)
    assert DetectionTransform(short=100, long_at_most=128).size_hw((80, 120)) == (96, 128)
    image, target = square((120, 80), (30, 20, 60, 40))
    x, after = transform(image, target)
    assert x.shape == (3, 112, 160)
    assert after["boxes_xyxy_px"].tolist() == [[40, 28, 80, 56]]
    assert after["area_px2"].item() == pytest.approx(40 * 28)
    y, original = transform.image(image)
    assert torch.equal(x, y)
    assert original == (80, 120)


def test_training_leaves_crowds_out_and_evaluation_keeps_them() -> None:
    image, target = square((64, 64), (10, 10, 40, 40))
    target["crowd"] = torch.tensor([True])
    assert len(DetectionTransform(short=64)(image, target)[1]["labels"]) == 1
    assert len(DetectionTransform(short_range=(64, 64))(image, target, generator(0, 0, 0))[1]["labels"]) == 0


def test_a_crop_cuts_boxes_and_drops_what_it_loses() -> None:
    target = {
        "boxes_xyxy_px": torch.tensor([[0.0, 0, 10, 10], [8, 8, 30, 30], [0, 0, 4, 4]]),
        "labels": torch.arange(3),
    }
    after = cropped(target, (5, 5, 20, 25))
    assert after["boxes_xyxy_px"].tolist() == [[0, 0, 5, 5], [3, 3, 20, 15]]
    assert after["labels"].tolist() == [0, 1]
    assert flipped(after, 20)["boxes_xyxy_px"].tolist() == [[15, 0, 20, 5], [0, 3, 17, 15]]


def test_an_invalid_transform_is_an_error() -> None:
    with pytest.raises(DinoError, match="crop_share"):
        DetectionTransform(crop_share=(0.0, 1.0))
    with pytest.raises(DinoError, match="short_range"):
        DetectionTransform(short_range=(200, 100))


# ---- real files ----------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_the_development_sets_load(development_data: Path) -> None:
    if not (development_data / "raccoon").is_dir():
        pytest.skip("the raccoon images are not present")
    raccoon = make_dataset(f"VocDetection:root={development_data / 'raccoon'}")
    assert (len(raccoon), raccoon.class_names, raccoon.left_out) == (60, ["raccoon"], 0)
    sizes = [raccoon[i][0].size for i in range(60)]
    assert sum(len(raccoon.target(i, sizes[i][::-1])["labels"]) for i in range(60)) == 64
    cats = development_data / "coco-cats" / "COCO"
    two = make_dataset(f"CocoDetection:root={cats}:annotations=coco_annotations.txt")
    image, target = two[0]
    assert image.size == (640, 480)
    found = sorted(two.class_names[i] for i in target["labels"])
    assert found == ["bed", "cat", "cat", "couch", "remote", "remote"]
