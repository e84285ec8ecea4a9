"""CorLoc: known answers, and boxes of real files."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.data.datasets import make_dataset
from dinov3.errors import DinoError
from dinov3.eval.discovery import annotated, corloc, is_hit, main


def test_three_of_four_images() -> None:
    hits = torch.tensor([[True, False], [True, False], [True, True], [False, False]])
    assert corloc(hits).tolist() == [75, 25]
    with pytest.raises(DinoError, match="nothing can be scored"):
        corloc(hits[:0])


def test_half_an_overlap_is_enough() -> None:
    truth = torch.tensor([[100.0, 100, 110, 110], [0, 0, 10, 10]])
    assert is_hit((0, 0, 10, 5), truth)
    assert not is_hit((0, 0, 10, 4.99), truth)
    assert is_hit((101, 100, 110, 110), truth)


def folder(root: Path, n: int = 4) -> Path:
    """VOC files: a bright textured block on a dark, smooth ground, nearly in the same place; the last one has no object."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    for i in range(n):
        image = np.zeros((100, 150, 3))
        image[:] = np.linspace(20, 40, 150)[:, None]
        y, x = 16, 16 * (i + 1)
        image[y : y + 48, x : x + 64] = rng.integers(120, 255, (48, 64, 3))
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"p-{i}.png")
        box = f"<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + 64}</xmax><ymax>{y + 48}</ymax></bndbox>"
        thing = f"<object><name>block</name><difficult>1</difficult>{box}</object>" if i < n - 1 else ""
        size = "<size><width>150</width><height>100</height></size>"
        text = f"<annotation><filename>p-{i}.png</filename>{size}{thing}</annotation>"
        (root / "annotations" / f"p-{i}.xml").write_text(text)
    return root


def test_blocks_are_found_and_the_best_threshold_counts(tmp_path: Path) -> None:
    """With random weights, which tell brightness and texture, whatever the model is that ships."""
    root, out = folder(tmp_path / "data"), tmp_path / "out"
    words = [f"data=VocDetection:root={root}", f"output_dir={out}", "model.device=cpu", "taus=[0.2,0.9]"]
    assert main([*words, "model.name=dinov3_vitt16", "model.weights=random"]) == 0
    results = json.loads((out / "results-discovery.json").read_text())["results"]
    assert results["images"] == 3  # the one without objects is not counted
    assert results["CorLoc"] > 60  # at 0.2: nothing is that much alike at 0.9
    assert results["CorLoc tau=0.9"] < results["CorLoc tau=0.2"]
    assert results["CorLoc"] == max(results["CorLoc tau=0.2"], results["CorLoc tau=0.9"])


def test_difficult_objects_of_voc_count_and_crowds_of_coco_do_not(tmp_path: Path) -> None:
    voc = make_dataset(f"VocDetection:root={folder(tmp_path / 'voc')}")
    assert annotated(voc, 0, (100, 150)).tolist() == [[16, 16, 80, 64]]  # type: ignore[arg-type]
    root = tmp_path / "coco"
    root.mkdir()
    boxes = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1.4, 2.6, 10, 10], "iscrowd": 0},
             {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 30, 30], "iscrowd": 1}]  # fmt: skip
    images = [{"id": 1, "file_name": "a.png", "width": 40, "height": 40}]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (root / "boxes.json").write_text(json.dumps(content))
    coco = make_dataset(f"CocoDetection:root={root}:annotations=boxes.json")
    assert annotated(coco, 0, (40, 40)).tolist() == [[1, 3, 11, 13]]  # type: ignore[arg-type]


def test_a_list_names_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = folder(tmp_path / "data"), tmp_path / "out"
    names = tmp_path / "names.txt"
    names.write_text("train/p-0.png\n\np-2.png\n")
    words = [str(root), f"output_dir={out}", "model.device=cpu", "taus=[0.2]", f"names={names}"]  # its form is found
    assert main(words) == 0
    assert json.loads((out / "results-discovery.json").read_text())["results"]["images"] == 2
    names.write_text("other.png\n")
    assert main(words) == 1
    assert "none of the 1 names" in capsys.readouterr().err


def test_data_without_boxes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"data=Folder:root={folder(tmp_path / 'd')}", f"output_dir={tmp_path}", "model.device=cpu"]) == 1
    assert "has no boxes" in capsys.readouterr().err
    (tmp_path / "bare").mkdir()
    assert main([str(tmp_path / "bare"), f"output_dir={tmp_path}", "model.device=cpu"]) == 1
    assert "bare has no boxes: neither annotations/*.xml" in capsys.readouterr().err
    assert main([f"output_dir={tmp_path}"]) == 1
    assert "VocDetection" in capsys.readouterr().err


@pytest.mark.data
@pytest.mark.slow
def test_raccoons_are_found_more_often_than_by_chance(development_data: Path, tmp_path: Path) -> None:
    root = development_data / "raccoon"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    words = shlex.split(
        f"data=VocDetection:root={root} limit=20 taus=[0.2,0.3,0.4] output_dir={tmp_path} model.device=cpu"
    )
    assert main(words) == 0
    assert json.loads((tmp_path / "results-discovery.json").read_text())["results"]["CorLoc"] > 50
