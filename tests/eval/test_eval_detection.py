"""COCO's average precision: known answers, the plain loop, merging, and the evaluation from files to results."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov3 import hub
from dinov3.data.datasets import make_dataset
from dinov3.errors import DinoError
from dinov3.eval import detection as run
from dinov3.heads.detr import Detections
from dinov3.hub.own_heads import build_head, save_head
from dinov3.metrics import box_average_precision, soft_nms

pytest.importorskip("faster_coco_eval", reason="COCO's average precision needs faster-coco-eval")

ONE = {"boxes_xyxy_px": [[0.0, 0, 50, 50]], "labels": [0]}


def found(*rows: tuple[list[float], float, int]) -> dict[str, Any]:
    return {"boxes_xyxy_px": [r[0] for r in rows], "scores": [r[1] for r in rows], "labels": [r[2] for r in rows]}


# ---- known answers -------------------------------------------------------------------------------------------------


def test_known_answers() -> None:
    hit = ([0.0, 0, 50, 50], 0.5, 0)
    (results, per_class) = box_average_precision([found(hit)], [ONE], ["a"])
    assert results["AP"] == pytest.approx(100)
    assert (results["APs"], results["APm"], results["APl"]) == (None, pytest.approx(100), None)
    assert per_class == [{"class": "a", "boxes": 1, "AP": pytest.approx(100), "AP50": pytest.approx(100)}]
    above = ([60.0, 60, 90, 90], 0.9, 0)
    assert box_average_precision([found(above, hit)], [ONE], ["a"])[0]["AP"] == pytest.approx(50)
    below = ([60.0, 60, 90, 90], 0.1, 0)
    assert box_average_precision([found(hit, below)], [ONE], ["a"])[0]["AP"] == pytest.approx(100)
    two = {"boxes_xyxy_px": [[0.0, 0, 50, 50], [60, 60, 80, 80]], "labels": [0, 0]}
    assert box_average_precision([found(hit)], [two], ["a"])[0]["AP"] == pytest.approx(100 * 51 / 101)
    # an overlap of .8 counts at seven of ten thresholds (.80 included)
    near = ([0.0, 0, 50, 40], 0.5, 0)
    results, _ = box_average_precision([found(near)], [ONE], ["a"])
    assert results["AP"] == pytest.approx(70)
    assert (results["AP50"], results["AP75"]) == (pytest.approx(100), pytest.approx(100))


def test_the_class_counts_and_absent_classes_do_not() -> None:
    wrong = ([0.0, 0, 50, 50], 0.5, 1)
    results, per_class = box_average_precision([found(wrong)], [ONE], ["a", "b"])
    assert results["AP"] == 0
    assert [row["AP"] for row in per_class] == [0, None]


def test_crowds_count_neither_for_nor_against() -> None:
    truth = {"boxes_xyxy_px": [[0.0, 0, 50, 50], [100, 0, 200, 100]], "labels": [0, 0], "crowd": [False, True]}
    inside = [([100.0 + 10 * i, 0, 110 + 10 * i, 50], 0.9, 0) for i in range(5)]
    results, per_class = box_average_precision([found(*inside, ([0.0, 0, 50, 50], 0.1, 0))], [truth], ["a"])
    assert results["AP"] == pytest.approx(100)
    assert per_class[0]["boxes"] == 1


def test_nothing_found_is_zero_and_nothing_to_find_is_an_error() -> None:
    results, per_class = box_average_precision([found()], [ONE], ["a"])
    assert (results["AP"], results["APm"], results["APl"], per_class[0]["AP"]) == (0.0, 0.0, None, 0.0)
    with pytest.raises(DinoError, match="no true box"):
        box_average_precision([found()], [{"boxes_xyxy_px": [], "labels": []}], ["a"])
    with pytest.raises(DinoError, match="2 images with detections, 1 with true"):
        box_average_precision([found(), found()], [ONE], ["a"])


# ---- the plain loop ------------------------------------------------------------------------------------------------


def plain_ap(images: list[dict[str, Any]], truth: list[dict[str, Any]], classes: int) -> float:
    """Mean over classes and thresholds of the 101-point average precision, in percent."""

    def iou(a: list[float], b: list[float]) -> float:
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        both = max(w, 0) * max(h, 0)
        return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)

    values = []
    for c in range(classes):
        real = sum(t["labels"].count(c) for t in truth)
        if not real:
            continue
        ranked = sorted(
            (-s, i, box)
            for i, p in enumerate(images)
            for box, s, label in zip(p["boxes_xyxy_px"], p["scores"], p["labels"])
            if label == c
        )
        for threshold in np.linspace(0.5, 0.95, 10):
            taken: set[tuple[int, int]] = set()
            hits = []
            for _, i, box in ranked:
                free = [
                    (iou(box, t), n)
                    for n, (t, label) in enumerate(zip(truth[i]["boxes_xyxy_px"], truth[i]["labels"]))
                    if label == c and (i, n) not in taken
                ]
                best = max(free, default=(0.0, -1))
                hits.append(best[0] >= threshold)
                if hits[-1]:
                    taken.add((i, best[1]))
            precision = [sum(hits[: k + 1]) / (k + 1) for k in range(len(hits))]
            recall = [sum(hits[: k + 1]) / real for k in range(len(hits))]
            points = np.linspace(0, 1, 101)
            values.append(
                np.mean([max((p for p, r in zip(precision, recall) if r >= x - 1e-12), default=0) for x in points])
            )
    return 100 * float(np.mean(values))


def test_average_precision_is_the_plain_loop() -> None:
    rng = np.random.default_rng(3)
    truth, images = [], []
    for _ in range(6):
        n = int(rng.integers(1, 5))
        corner, side = rng.uniform(0, 200, (n, 2)), rng.uniform(20, 80, (n, 2))
        boxes = np.concatenate([corner, corner + side], 1)
        labels = rng.integers(0, 3, n)
        truth.append({"boxes_xyxy_px": boxes.tolist(), "labels": labels.tolist()})
        noisy = np.concatenate([boxes + rng.normal(0, 5, boxes.shape), rng.uniform(0, 90, (4, 4)) + [0, 0, 100, 100]])
        guess = np.concatenate([labels, rng.integers(0, 3, 4)])
        images.append({"boxes_xyxy_px": noisy.tolist(), "scores": rng.random(n + 4).tolist(), "labels": guess.tolist()})
    results, _ = box_average_precision(images, truth, ["a", "b", "c"])
    expected = plain_ap(images, truth, 3)
    assert 10 < expected < 90
    assert results["AP"] == pytest.approx(expected, abs=1e-6)


# ---- merging -------------------------------------------------------------------------------------------------------


def test_soft_nms_lowers_overlapping_boxes_of_the_same_class_only() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 10], [50, 50, 60, 60]])
    kept, scores, labels = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 0, 1, 0]))
    assert labels.tolist() == [0, 1, 0, 0]
    assert scores.tolist() == pytest.approx([0.9, 0.7, 0.6, 0.8 * math.exp(-0.25 / 0.5)])
    assert kept[-1].tolist() == [0, 0, 10, 5]
    kept, scores, _ = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.zeros(4, dtype=torch.int64), most=2)
    assert scores.tolist() == pytest.approx([0.9, 0.6])
    assert len(soft_nms(boxes[:0], torch.zeros(0), torch.zeros(0, dtype=torch.int64))[1]) == 0


# ---- from files to results -----------------------------------------------------------------------------------------


class Oracle:
    """A detector that finds bright rectangles exactly, in whatever size the image comes."""

    class_names = ("", "Light")
    origin = None

    def __init__(self, share: float = 1.0) -> None:
        self.share, self.detector = share, SimpleNamespace(backbone=[SimpleNamespace(patch=16)])
        self.sizes: list[tuple[int, int]] = []

    def detect(self, images: list[Tensor], original_sizes_hw: Any, most: int) -> list[Detections]:
        (x,), ((H, W),) = images, original_sizes_hw
        self.sizes.append((x.shape[-2], x.shape[-1]))
        bright = x[0] > 0
        rows, columns = bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten()
        if not len(rows):
            return [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), ())]
        box = [columns[0].item(), rows[0].item(), columns[-1].item() + 1, (rows[-1].item() + 1)]
        scale = torch.tensor([W / x.shape[-1], H / x.shape[-2]] * 2)
        boxes = torch.tensor([box], dtype=torch.float32) * scale
        boxes[:, 3] = boxes[:, 1] + (boxes[:, 3] - boxes[:, 1]) * self.share
        return [Detections(boxes, torch.tensor([0.9]), torch.tensor([1]), ("light",))]


@pytest.fixture
def lights(tmp_path: Path) -> Path:
    """Three dark images, two of them with a bright rectangle."""
    images, annotations = [], []
    for i, box in enumerate([(16, 16, 64, 48), (32, 8, 48, 72), None]):
        x = np.zeros((80, 96, 3), np.uint8)
        if box is not None:
            x[box[1] : box[3], box[0] : box[2]] = 255
            side = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            annotations.append({"id": i + 1, "image_id": 10 + i, "category_id": 7, "bbox": side, "iscrowd": 0})
        Image.fromarray(x).save(tmp_path / f"{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": 80, "width": 96})
    facts = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "light"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(facts))
    return tmp_path


def test_an_oracle_scores_all_and_a_worse_one_less(lights: Path, tmp_path: Path, monkeypatch) -> None:
    line = f"dataset=CocoDetection:root={lights}:annotations=boxes.json"
    oracle = Oracle()
    monkeypatch.setattr(run, "open_detector", lambda config, session: (oracle, 160))
    out = tmp_path / "out"
    assert run.main([line, f"output_dir={out}", "save_results=true"]) == 0
    with open(out / "results-detection.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["AP"]) == pytest.approx(100)
    assert (row["images"], row["APl"]) == ("3", "")
    assert list(row)[:4] == ["images", "AP", "AP50", "AP75"]
    assert oracle.sizes == [(160, 192)] * 3
    rows = json.loads((out / "detections.json").read_text())
    assert rows[0] == {"image_id": 10, "category_id": 7, "bbox": [16.0, 16.0, 48.0, 32.0], "score": 0.9}
    assert (out / "per-class.csv").read_text().splitlines()[1].startswith("light,2,")
    oracle.share = 0.72
    assert run.main([line, f"output_dir={out}", "limit=2"]) == 0
    assert json.loads((out / "results-detection.json").read_text())["results"]["AP"] == pytest.approx(50)


def test_test_time_augmentation_uses_every_size_and_its_mirror_image(
    lights: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    oracle = Oracle()
    monkeypatch.setattr(run, "open_detector", lambda config, session: (oracle, 160))
    line = f"dataset=CocoDetection:root={lights}:annotations=boxes.json"
    words = [
        "limit=1",
        "tta.enable=true",
        "tta.short_sides=[80,160]",
        "save_results=true",
        f"output_dir={tmp_path / 'o'}",
    ]
    assert run.main([line, *words]) == 0
    assert sorted(oracle.sizes) == [(80, 96), (80, 96), (160, 192), (160, 192)]
    rows = json.loads((tmp_path / "o" / "detections.json").read_text())
    assert rows[0]["bbox"] == [16.0, 16.0, 48.0, 32.0]
    assert (rows[0]["score"], len(rows)) == (0.9, 4)
    assert rows[1]["score"] == pytest.approx(0.9 * math.exp(-1 / 0.5), abs=1e-4)  # the same box again: mirrored back
    assert "AP: 100" in capsys.readouterr().out


def test_a_head_file_is_scored_on_its_data_set(lights: Path, tmp_path: Path, capsys) -> None:
    backbone = hub.load("dinov3_vitt16", "random")
    sizes = {"width": 32, "n_heads": 2, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn": 32, "decoder_ffn": 32,
             "n_queries": 8, "n_queries_one2many": 8, "topk": 8, "bias_hidden": 8}  # fmt: skip
    model = build_head("detection", "detr", backbone, n_classes=1, **sizes)
    file = save_head(
        tmp_path / "light.safetensors", model, task="detection", head="detr", options={"n_classes": 1} | sizes,
        class_names=["light"],
    )  # fmt: skip
    line = f"dataset=CocoDetection:root={lights}:annotations=boxes.json"
    assert run.main([line, f"load_from={file}", "short_side=80", f"output_dir={tmp_path / 'o'}"]) == 0
    results = json.loads((tmp_path / "o" / "results-detection.json").read_text())["results"]
    assert 0 <= results["AP"] < 50
    assert "AP: " in capsys.readouterr().out


def test_classes_are_joined_by_name(lights: Path) -> None:
    data = make_dataset(f"CocoDetection:root={lights}:annotations=boxes.json")
    assert run.label_map(["", "dark", "LIGHT "], data).tolist() == [-1, -1, 0]
    assert run.label_map(["class 0"], data).tolist() == [0]
    kept = run.in_classes_of(
        {
            "boxes_xyxy_px": torch.arange(8.0).view(2, 4),
            "scores": torch.tensor([0.9, 0.8]),
            "labels": torch.tensor([1, 2]),
        },
        torch.tensor([-1, -1, 0]),
    )
    assert (kept["labels"].tolist(), kept["scores"].tolist()) == ([0], [pytest.approx(0.8)])
    with pytest.raises(DinoError, match="no class in common"):
        run.label_map(["cat", "dog"], data)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "must be given"),
        (["dataset=CocoDetection:root=/nowhere"], "is no folder"),
        (["dataset=Folder:root=.", "load_from=x"], "has no boxes"),
        (["dataset=x", "short_side=3"], "must be at least 16"),
        (["dataset=x", "tta.enable=true", "tta.short_sides=[]"], "tta.short_sides"),
        (["datset=x"], "did you mean"),
    ],
)
def test_mistakes_are_one_sentence_and_a_status(
    words: list[str], said: str, lights: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(lights)
    assert run.main([*words, f"output_dir={tmp_path / 'o'}"]) == 1
    assert said in capsys.readouterr().err


def test_a_head_for_something_else_is_refused(lights: Path, tmp_path: Path, capsys) -> None:
    line = f"dataset=CocoDetection:root={lights}:annotations=boxes.json"
    for load_from, said in (("dinov3_vit7b16_dd", "is a head for depth"), ("gone.safetensors", "no head file")):
        assert run.main([line, f"load_from={load_from}", f"output_dir={tmp_path / 'o'}"]) == 1
        assert said in capsys.readouterr().err
