"""`dinov3 train-head`: small folders of every task, exact resumption, the files it leaves, the sentences it says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import killed_until_done, stopped_at
from PIL import Image
from torch import nn
from toy_models import tiny_vit

from dinov3 import fit as fitting
from dinov3.drawing import palette
from dinov3.errors import DinoError
from dinov3.fit import cached_features
from dinov3.hub.own_heads import build_head, load_head
from dinov3.models.vit import VisionTransformer
from dinov3.runlog import read_metrics
from dinov3.train_head import run as head_module
from dinov3.train_head.run import HeadConfig, checked_sizes, open_data, preprocessing_for, train_head
from dinov3.train_head.tasks import Segmentation, cropped

COLOURS = np.array([(220, 40, 40), (40, 200, 60), (50, 60, 230)], np.uint8)


@pytest.fixture(autouse=True)
def tiny_backbone(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The verb's own small model and its images cost seconds a test; these cost none."""

    def tiny(config: HeadConfig) -> nn.Module:
        from dinov3.hub import Origin

        model = tiny_vit()
        model.origin = Origin("custom", "tiny", "random", (0.5,) * 3, (0.25,) * 3)  # type: ignore[assignment]
        return model

    monkeypatch.setattr(head_module, "load_backbone", tiny)
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(head_module, "figure", lambda *_: "")
        monkeypatch.setattr(fitting, "plot", lambda *_: "")


@pytest.fixture
def drawn() -> None:
    """For tests that look at the images of the result."""


def blocks(seed: int, side: int = 64) -> np.ndarray:
    """Classes [side, side] in blocks of 16."""
    return np.random.default_rng(seed).integers(0, 3, (side // 16, side // 16)).repeat(16, 0).repeat(16, 1)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def mask_folder(root: Path, n: int = 6) -> Path:
    for i in range(n):
        split = "train" if i < n - 2 else "val"
        classes = blocks(i)
        write(root / split / f"{i}.png", COLOURS[classes])
        write(root / f"{split}annot" / f"{i}.png", classes.astype(np.uint8))
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    return root


def test_masks_of_black_and_white_are_not_one_class(tmp_path: Path) -> None:
    """0 and 255, the second of which does not count: a head of one class would be right everywhere."""
    data = mask_folder(tmp_path / "data")
    for file in data.glob("*annot/*.png"):
        write(file, np.where(np.asarray(Image.open(file)) > 0, 255, 0).astype(np.uint8))
    (data / "classes.txt").unlink()
    for classes in ([], ["back", "person"]):
        with pytest.raises(DinoError, match=r"only the number 0 \(besides 255"):
            train_head(config(data, classes=classes), tmp_path / "run")


def depth_folder(root: Path, n: int = 4) -> Path:
    for i in range(n):
        classes = blocks(i)
        write(root / f"{i}.color.png", COLOURS[classes])
        write(root / f"{i}.depth.png", (1000 * (1 + classes)).astype(np.uint16))
    return root


def class_folder(root: Path, n: int = 6) -> Path:
    for i in range(n):
        for label, name in enumerate(("red", "green")):
            noise = np.random.default_rng(i).integers(-30, 30, (40, 48, 3))
            write(root / name / f"{i}.png", np.clip(COLOURS[label] + noise, 0, 255).astype(np.uint8))
    return root


def box_folder(root: Path, n: int = 3) -> Path:
    images, annotations = [], []
    for i in range(n):
        rng = np.random.default_rng(i)
        page = np.full((64, 96, 3), 128, np.uint8)
        x, y, label = int(rng.integers(0, 60)), int(rng.integers(0, 30)), i % 2
        page[y : y + 30, x : x + 32] = COLOURS[label]
        write(root / f"{i}.png", page)
        images.append({"id": i, "file_name": f"{i}.png", "width": 96, "height": 64})
        annotations.append({"id": i, "image_id": i, "category_id": label + 1, "bbox": [x, y, 32, 30], "iscrowd": 0})
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def config(data: Path, **changes: Any) -> HeadConfig:
    given: dict[str, Any] = {"size": 64, "steps": 30, "batch": 2, "lr": 3e-2, "log_every": 5, "workers": 0}
    return HeadConfig(data=str(data), **(given | changes))


# ---- every task ------------------------------------------------------------------------------------------------------


def test_a_segmentation_head_learns_a_folder_and_is_found_again(tmp_path: Path, drawn: None) -> None:
    data = mask_folder(tmp_path / "data")
    outcome = train_head(config(data), tmp_path / "run")
    assert outcome.measured_on == "validation"
    assert outcome.metrics["aAcc"] > 0.95
    assert {"mIoU", "IoU/red", "IoU/blue"} <= set(outcome.metrics)
    backbone = head_module.load_backbone(config(data))
    model: Any = load_head(outcome.head, backbone=backbone)
    info = model.head_info
    assert (info.class_names, info.preprocessing.size, info.preprocessing.shape) == (
        ("red", "green", "blue"),
        64,
        "short",
    )
    assert info.data == {"images": 4, "measured_on": "validation", "name": "data"}
    image, classes = open_data("segmentation", str(data), "val")[0]
    x, _ = info.preprocessing(image)
    found = model.predict(x[None], rescale_to=classes.shape)[0].argmax(0).numpy()
    assert (found == classes).mean() > 0.95
    drawing = tmp_path / "run" / "result.png"
    if drawing.is_file():
        assert Image.open(drawing).width > 800
    else:
        assert "it needs matplotlib" in (tmp_path / "run" / "log.txt").read_text()
    assert str(tmp_path) not in Path(outcome.head).read_bytes().decode("latin-1")


def test_the_drawing_names_the_classes_that_it_shows() -> None:
    matplotlib = pytest.importorskip("matplotlib.figure")
    page, task = matplotlib.Figure(), object.__new__(Segmentation)
    task.class_names, task.colours = ["_sky", "never", "cost $ and $"], np.array(palette(3), np.uint8)
    truth, found = task.painted(np.array([[0, 0], [255, 0]])), task.painted(np.array([[0, 2], [2, 0]]))
    head_module.add_legend(page, task, [[truth, truth, found]])
    (legend,) = page.legends
    assert [text.get_text() for text in legend.get_texts()] == ["0 _sky", r"2 cost \$ and \$"]
    colours = [patch.get_facecolor()[:3] for patch in legend.get_patches()]
    np.testing.assert_allclose(colours, task.colours[[0, 2]] / 255)


def test_a_mask2former_head_is_fitted(tmp_path: Path) -> None:
    small = {"hidden_dim": 32, "ffn": 32, "n_queries": 8, "decoder_layers": 3, "pixel_layers": 1}
    wanted = config(mask_folder(tmp_path / "data"), head="mask2former", options=small, steps=5, batch=1, log_every=1)
    wanted.lr, wanted.evaluate_every = 2e-3, 5
    outcome = train_head(wanted, tmp_path / "run")
    losses = [r["total_loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "total_loss" in r]
    assert losses[-1] < 0.95 * losses[0]
    assert load_head(outcome.head, backbone=head_module.load_backbone(wanted)).head_info.options["n_queries"] == 8


@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_a_depth_head_learns_a_folder(tmp_path: Path, head: str) -> None:
    small = {"channels": 16, "post_process_channels": [8, 8, 16, 16]} if head == "dpt" else {}
    wanted = config(depth_folder(tmp_path / "data"), task="depth", head=head, options=small, lr=1e-2)
    wanted.options["n_output_channels"], wanted.losses = 16, {"SIGLOSS": 1.0}
    if head == "dpt":
        wanted.steps, wanted.lr = 12, 3e-3
    outcome = train_head(wanted, tmp_path / "run")
    assert outcome.measured_on == "training"
    first, *_, last = (r["rmse"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "rmse" in r)
    assert last < first
    assert outcome.metrics["a1"] > {"linear": 0.7, "dpt": 0.3}[head]
    model: Any = load_head(outcome.head, backbone=head_module.load_backbone(wanted))
    assert model.head_info.options["max_depth"] == 4.0  # the farthest, 3 m, rounded up
    assert model.features_to_depth.max_depth == 4.0
    image, truth, found = panels(wanted, outcome)
    assert image.shape == truth.shape == found.shape == (64, 64, 3)
    assert len(np.unique(truth.reshape(-1, 3), axis=0)) == 3  # three depths, three colours


def test_a_classifier_learns_a_folder(tmp_path: Path) -> None:
    wanted = config(class_folder(tmp_path / "data"), task="classification", val=str(class_folder(tmp_path / "val")))
    outcome = train_head(wanted, tmp_path / "run")
    assert outcome.metrics == {"accuracy": 1.0}
    assert load_head(outcome.head, backbone=head_module.load_backbone(wanted)).head_info.class_names == ("green", "red")
    _, truth, found = panels(wanted, outcome)
    assert truth.shape == found.shape
    assert not np.array_equal(truth, found)  # the prediction says how sure it is


def test_a_classifier_runs_its_backbone_once_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two views (mirrored or not) of 12 training images, one of 12 validation images, whatever the number of steps."""
    images = 0
    forward = VisionTransformer.forward_features

    def counted(self: Any, x: Any, *rest: Any, **options: Any) -> Any:
        nonlocal images
        images += len(x)
        return forward(self, x, *rest, **options)

    monkeypatch.setattr(VisionTransformer, "forward_features", counted)
    given: Any = {
        "task": "classification",
        "val": str(class_folder(tmp_path / "val")),
        "steps": 60,
        "evaluate_every": 5,
    }
    pooled = train_head(config(class_folder(tmp_path / "data"), **given), tmp_path / "run")
    assert images == 2 * 12 + 12
    # too little memory: the general cache gives the same head
    cached = train_head(config(tmp_path / "data", memory_gb=0.0, **given), tmp_path / "other")
    assert cached.metrics == pooled.metrics
    a, b = (load_head(o.head, backbone=head_module.load_backbone(config(tmp_path))) for o in (pooled, cached))
    torch.testing.assert_close(a.linear_head.weight, b.linear_head.weight, atol=1e-4, rtol=1e-3)  # type: ignore[union-attr]


def test_a_classifier_leaves_a_confusion_matrix_and_a_table_of_classes(tmp_path: Path) -> None:
    val = class_folder(tmp_path / "val")
    for i in range(2):  # two red images among the green ones
        write(val / "green" / f"red{i}.png", np.asarray(Image.open(val / "red" / f"{i}.png")))
    wanted = config(class_folder(tmp_path / "data"), task="classification", val=str(val))
    train_head(wanted, tmp_path / "run")
    read = [line.split(",") for line in (tmp_path / "run" / "confusion.csv").read_text().splitlines()]
    assert read == [["truth", "green", "red"], ["green", "6", "2"], ["red", "0", "6"]]
    table = [line.split(",") for line in (tmp_path / "run" / "classes.csv").read_text().splitlines()]
    assert table == [
        ["class", "images", "recall", "precision", "most often taken for", "times"],
        ["green", "8", "0.75", "1.0", "red", "2"],
        ["red", "6", "1.0", "0.75", "", "0"],
    ]
    assert "the weakest: green 75% (taken for red)" in (tmp_path / "run" / "log.txt").read_text()
    image = np.asarray(Image.open(tmp_path / "run" / "confusion.png").convert("L"))
    assert image[-70, -70] < image[-114, -70] < image[-70, -114]  # red as red, green as red, red as green


def test_two_runs_in_one_folder_are_an_error(tmp_path: Path) -> None:
    from dinov3.runlog import RunDir

    with RunDir(tmp_path / "run").claimed():
        # a lock is a process's own: another one is needed to see it refused
        code = (
            "from dinov3.runlog import RunDir; from dinov3.train_head.run import *; import sys\n"
            "from dinov3.errors import DinoError\n"
            f"c = HeadConfig(task='classification', data={str(class_folder(tmp_path / 'data'))!r}, size=32, steps=2, "
            "backbone='dinov3_vitt16', weights='random')\n"
            f"try: train_head(c, {str(tmp_path / 'run')!r})\n"
            "except DinoError as e: print(e)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "is writing to" in done.stdout
    assert "another --out" in done.stdout


def panels(config: HeadConfig, outcome: Any) -> list[np.ndarray]:
    """What the image of the result shows of the first image."""
    backbone = head_module.load_backbone(config)
    model = load_head(outcome.head, backbone=backbone)
    data = open_data(config.task, config.data)
    task = head_module.build_task(config, data, None, preprocessing_for(config, backbone, {(64, 64)}))
    with torch.no_grad():
        return task.panels(model, data, 0, torch.device("cpu"))


def test_validation_classes_are_numbered_as_those_of_training(tmp_path: Path) -> None:
    val = class_folder(tmp_path / "val")
    for i in range(6):  # without green, red would be number 0
        (val / "green" / f"{i}.png").unlink()
    (val / "green").rmdir()
    wanted = config(class_folder(tmp_path / "data"), task="classification", val=str(val))
    data, other = head_module.both_sides(wanted)
    assert data.class_names == ["green", "red"]
    assert {other[i][1] for i in range(len(other))} == {1}
    write(val / "blue" / "0.png", COLOURS[blocks(0)])
    with pytest.raises(DinoError, match="classes that the training data lack: blue"):
        head_module.both_sides(wanted)


def test_a_data_set_for_another_task_is_an_error(tmp_path: Path) -> None:
    line = f"DenseFolder:root={depth_folder(tmp_path)}:kind=depth"
    assert len(open_data("depth", line)) == 4
    with pytest.raises(DinoError, match="is a data set for depth: a head for segmentation cannot learn from it"):
        open_data("segmentation", line)
    assert open_data("classification", f"Folder:root={class_folder(tmp_path / 'c')}").class_names == ["green", "red"]


def simple_precision(found: Any, truth: Any, names: Any) -> Any:
    """The share of true boxes that the best detection of their image overlaps by half: enough to see that it learns."""
    from dinov3.metrics import overlap

    hits = [
        float(
            overlap(f["boxes_xyxy_px"][:1], t["boxes_xyxy_px"][:1])[0].item() > 0.5 and f["labels"][0] == t["labels"][0]
        )
        for f, t in zip(found, truth)
    ]
    share = 100 * sum(hits) / len(hits)
    return {"AP": share, "AP50": share, "AP75": None}, [{"class": name, "AP": share} for name in names]


def test_a_detector_is_fitted_to_boxes(tmp_path: Path, drawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov3.train_head.tasks.box_average_precision", simple_precision)
    small = {"width": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn": 32, "decoder_ffn": 32, "n_heads": 2}
    small |= {"n_queries": 10, "n_queries_one2many": 10, "topk": 10, "proposal_min_size": 16.0, "bias_hidden": 16}
    wanted = config(
        box_folder(tmp_path / "data"), task="detection", head="detr", options=small, lr=1e-3, steps=12, batch=3
    )
    outcome = train_head(wanted, tmp_path / "run")
    losses = [r["total_loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "total_loss" in r]
    assert losses[-1] < losses[0]
    model: Any = load_head(outcome.head, backbone=head_module.load_backbone(wanted))
    assert model.class_names == ("red", "green")


@pytest.mark.parametrize("task", ["segmentation", "depth", "classification", "detection"])
def test_full_augmentation_gives_sound_examples(tmp_path: Path, task: str) -> None:
    make = {"segmentation": mask_folder, "depth": depth_folder, "classification": class_folder, "detection": box_folder}
    data = open_data(task, str(make[task](tmp_path)), "train" if task == "segmentation" else None)
    wanted = HeadConfig(task=task, head="detr" if task == "detection" else "linear", size=64, augment="full", batch=3)
    preprocessing = preprocessing_for(wanted, head_module.load_backbone(wanted), {(64, 64)})
    made = head_module.build_task(wanted, data, None, preprocessing)
    batch = made.batches(0, 1)(0)
    again = made.batches(0, 1)(0)
    other = made.batches(0, 1)(1)
    assert all(torch.equal(a, b) for a, b in zip(batch["x"], again["x"]))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(batch["x"], other["x"]))
    if task == "segmentation":
        assert batch["x"].shape == (3, 3, 64, 64)
        assert batch["target"].shape == (3, 64, 64)
    elif task == "depth":
        assert batch["x"].shape[-2:] == batch["target"].shape[-2:]
        assert float(batch["target"].max()) <= 3.0
    elif task == "detection":
        for x, target in zip(batch["x"], batch["target"]):
            boxes = target["boxes_xyxy_px"]
            assert bool((boxes[:, 2:] > boxes[:, :2]).all())
            assert bool((boxes[:, 2] <= x.shape[-1] + 1e-3).all())


def test_a_mirrored_image_takes_its_target_with_it(tmp_path: Path) -> None:
    data = open_data("segmentation", str(mask_folder(tmp_path)), "train")
    wanted = HeadConfig(size=64, augment="flip", batch=4)
    made = head_module.build_task(
        wanted, data, None, preprocessing_for(wanted, head_module.load_backbone(wanted), {(64, 64)})
    )
    straight = {i: made.example(i, None) for i in range(4)}
    turned = 0
    for step in range(6):
        batch = made.batches(0, 1)(step)
        for i, index in enumerate(head_module.tasks.shuffled(4, 4, step)):
            x, labels = straight[index]
            mirrored = torch.equal(batch["x"][i], x.flip(-1))
            turned += mirrored
            assert mirrored or torch.equal(batch["x"][i], x)
            assert torch.equal(batch["target"][i], labels.flip(-1) if mirrored else labels)
    assert 4 < turned < 20


def test_a_crop_keeps_boxes_that_are_still_there() -> None:
    class Fixed:
        values = iter([0.0, 0.0, 0.0] * 9)

        def random(self) -> float:
            return next(self.values)

    image = Image.new("RGB", (100, 100))
    boxes = torch.tensor([[0.0, 0, 40, 40], [90, 90, 100, 100], [70, 0, 90, 50]])
    part, left, labels = cropped(image, boxes, torch.tensor([0, 1, 2]), Fixed())
    assert part.size == (77, 77)  # 60 % of the area
    assert left.tolist() == [[0, 0, 40, 40], [70, 0, 77, 50]]
    assert labels.tolist() == [0, 2]


# ---- cached features ------------------------------------------------------------------------------------------------


def test_cached_features_are_those_of_the_backbone_and_are_computed_once(tmp_path: Path) -> None:
    backbone = head_module.load_backbone(HeadConfig())
    model: Any = build_head("segmentation", "linear", backbone, n_classes=3)
    x = torch.randn(3, 3, 48, 64)
    encoder = model.segmentation_model[0]
    expected = encoder(x)
    for most_bytes in (1 << 30, 0):
        with cached_features(model, most_bytes=most_bytes, folder=tmp_path / "features") as memory:
            for chosen in ([0, 1], [2, 0], [1, 2], [0, 1, 2]):
                got = encoder(x[chosen])
                for (a, b), (c, d) in zip(got, expected):
                    torch.testing.assert_close(a, c[chosen], atol=1e-5, rtol=1e-5)
                    torch.testing.assert_close(b, d[chosen], atol=1e-5, rtol=1e-5)
                got[0][0].zero_()  # what a head does to them is its own business
        assert (memory.computed, memory.requests) == (3, 9)
        assert not (tmp_path / "features").exists()
    assert torch.equal(encoder(x)[0][0], expected[0][0])
    assert "get_intermediate_layers" not in vars(backbone)
    classifier = build_head("classification", "linear", backbone, n_classes=2)
    said = classifier(x)
    with cached_features(classifier):
        torch.testing.assert_close(classifier(x), said, atol=1e-5, rtol=1e-5)


# ---- stopping and resuming ------------------------------------------------------------------------------------------


def test_a_stopped_run_resumes_to_the_same_head(tmp_path: Path) -> None:
    wanted = config(mask_folder(tmp_path / "data"), save_every=4, evaluate_every=5, steps=16)
    whole = train_head(wanted, tmp_path / "whole")
    with stopped_at(10):
        train_head(wanted, tmp_path / "torn")
    torn = train_head(wanted, tmp_path / "torn")
    assert torn.report.resumed_at == 8
    assert torn.metrics == whole.metrics
    assert torn.head.read_bytes() == whole.head.read_bytes()
    for size, shown in ((32, "32"), (None, "the default")):
        with pytest.raises(DinoError, match=f"was started with size=64, not {shown}"):
            train_head(config(tmp_path / "data", size=size), tmp_path / "torn")
    assert "3 classes (red, green, blue)" in (tmp_path / "torn" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("tune", [(), ("--tune", "lora:2")], ids=["frozen", "tuned"])
def test_a_killed_command_started_again_ends_as_if_nothing_had_happened(tmp_path: Path, tune: tuple[str, ...]) -> None:
    data = mask_folder(tmp_path / "data")

    def command(out: str) -> list[str]:
        return [
            sys.executable, "-m", "dinov3", "train-head", "segmentation", str(data), "--out", str(tmp_path / out),
            "--backbone", "dinov3_vitt16", "--size", "64", "--steps", "60", "--batch", "2", "--save-every", "5",
            "--device", "cpu", *tune,
        ]  # fmt: skip

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), check=True, capture_output=True, env=environment)
    process = subprocess.Popen(command("torn"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    while process.poll() is None and not (tmp_path / "torn" / "ckpt" / "19").is_dir():
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command("torn"), check=True, capture_output=True, env=environment, text=True)
    assert "resumed at step" in done.stderr
    assert done.stdout.strip() == str(tmp_path / "torn" / "head.safetensors")
    whole, torn = ((tmp_path / out / "head.safetensors").read_bytes() for out in ("whole", "torn"))
    assert whole == torn  # a tuned head names its backbone by a fingerprint of the weights


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_a_run_killed_twenty_times_ends_in_the_same_head(tmp_path: Path, task: str) -> None:
    data = (mask_folder if task == "segmentation" else class_folder)(tmp_path / "data")
    wanted = config(data, task=task, save_every=10, evaluate_every=100, steps=300)
    began = time.monotonic()
    whole = train_head(wanted, tmp_path / "whole")
    killed = killed_until_done(train_head, wanted, tmp_path / "torn", seconds=time.monotonic() - began)
    assert killed >= 12
    assert (tmp_path / "torn" / "head.safetensors").read_bytes() == whole.head.read_bytes()
    steps = [r["iteration"] for r in read_metrics(tmp_path / "torn" / "metrics.jsonl") if "total_loss" in r]
    assert steps == sorted(set(steps))


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    wanted = config(mask_folder(tmp_path / "data"), save_every=4, steps=12)
    whole = train_head(wanted, tmp_path / "run").head.read_bytes()
    newest = tmp_path / "run" / "ckpt" / "11"
    (newest / "state.json").write_bytes(b"")
    again = train_head(wanted, tmp_path / "run")
    assert again.report.resumed_at == 8
    assert again.head.read_bytes() == whole
    assert (
        "resuming from the older 7, and keeping the damaged one as 11.damaged"
        in (tmp_path / "run" / "log.txt").read_text()
    )


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_an_empty_or_missing_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for task, head in (
        ("segmentation", "linear"),
        ("depth", "linear"),
        ("classification", "linear"),
        ("detection", "detr"),
    ):
        with pytest.raises(DinoError):
            train_head(HeadConfig(task=task, head=head, data=str(tmp_path / "empty")), tmp_path / "run")
        with pytest.raises(DinoError, match="no such file or folder"):
            train_head(HeadConfig(task=task, head=head, data=str(tmp_path / "nowhere")), tmp_path / "run")


def test_masks_that_do_not_match_are_named_at_most_five(tmp_path: Path) -> None:
    data = mask_folder(tmp_path / "data", n=10)
    for i in range(7):
        write(data / "trainannot" / f"{i}.png", np.zeros((32, 64), np.uint8))
    with pytest.raises(DinoError) as said:
        train_head(config(data), tmp_path / "run")
    text = str(said.value)
    assert text.startswith("7 of the targets not of their image's size: 0.png 64×64 with 64×32, 1.png")
    assert text.endswith("and 2 more")
    assert text.count(".png") == 5


def test_the_error_of_masks_of_other_names_lists_the_files(tmp_path: Path) -> None:
    write(tmp_path / "images" / "a.png", COLOURS[blocks(0)])
    write(tmp_path / "masks" / "b.png", blocks(0).astype(np.uint8))
    with pytest.raises(DinoError, match=r"of the same name .*it holds images/a.png, masks/b.png\)"):
        open_data("segmentation", str(tmp_path))


def test_images_without_masks_are_named_and_left_out(tmp_path: Path) -> None:
    data = mask_folder(tmp_path / "data")
    write(data / "train" / "lonely.png", COLOURS[blocks(9)])
    outcome = train_head(config(data, steps=2), tmp_path / "run")
    assert (
        "1 of the images without a target of the same name, left out: lonely.png"
        in (tmp_path / "run" / "log.txt").read_text()
    )
    assert outcome.head.is_file()


def test_masks_of_few_scattered_numbers_are_doubted(tmp_path: Path) -> None:
    data = mask_folder(tmp_path / "data")
    (data / "classes.txt").unlink()
    for file in data.glob("*annot/*.png"):
        write(file, 40 * np.asarray(Image.open(file)))
    train_head(config(data, steps=1), tmp_path / "run")
    assert "the masks hold 3 of the numbers 0 to 80: are these" in (tmp_path / "run" / "log.txt").read_text()


def test_depths_below_a_metre_are_doubted(tmp_path: Path) -> None:
    data = depth_folder(tmp_path / "data")
    wanted = config(data, task="depth", steps=1)
    wanted.options["n_output_channels"] = 4
    train_head(wanted, tmp_path / "far")
    for file in data.glob("*.depth.png"):
        write(file, (np.asarray(Image.open(file)) // 16).astype(np.uint8))
    train_head(wanted, tmp_path / "near")
    assert ["another unit? unit=1000" in (tmp_path / run / "log.txt").read_text() for run in ("far", "near")] == [
        False,
        True,
    ]


def test_a_mask_that_is_no_image_is_named_without_the_decoder_s_words(tmp_path: Path) -> None:
    data = mask_folder(tmp_path / "data")
    (data / "trainannot" / "0.png").write_text("junk")
    with pytest.raises(DinoError, match=r"0.png cannot be read as a map of numbers: it is no image file$"):
        train_head(config(data), tmp_path / "run")


def test_one_class_is_nothing_to_classify(tmp_path: Path) -> None:
    data = class_folder(tmp_path / "data")
    shutil.rmtree(data / "green")
    with pytest.raises(DinoError, match="all images are of one class, red: give a folder"):
        train_head(config(data, task="classification"), tmp_path / "run")


def test_what_is_left_out_of_boxes_is_named_and_so_are_the_classes(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / "data" / "images" / f"{i}.png", np.full((48, 64, 3), 99, np.uint8))
    (tmp_path / "data" / "annotations").mkdir()
    for i, xmax in enumerate((90, 4)):  # the first box ends beyond the image, the second before it begins
        box = f"<bndbox><xmin>9</xmin><ymin>2</ymin><xmax>{xmax}</xmax><ymax>20</ymax></bndbox>"
        text = f"<annotation><filename>{i}.png</filename><object><name>cat</name>{box}</object></annotation>"
        (tmp_path / "data" / "annotations" / f"{i}.xml").write_text(text)
    data, notes = open_data("detection", str(tmp_path / "data")), []
    checked_sizes(data, notes.append)
    assert notes == [
        "1 of the boxes without area, left out: 1.png",
        "1 of the images without a file of boxes, left out: 2.png",
        "1 of the images with boxes that reach beyond them, which are cut: 0.png",
    ]


def test_the_error_of_a_class_beyond_the_named_ones_suggests_ignore(tmp_path: Path) -> None:
    data = mask_folder(tmp_path / "data")
    with pytest.raises(DinoError, match=r"masks hold .* up to 2, but there are 2 classes .*--ignore 2"):
        train_head(config(data, classes=["red", "green"]), tmp_path / "run")
    with pytest.raises(DinoError, match=r"masks hold .* up to 2, but there are 1 classes .* \(--classes\)$"):
        train_head(config(data, classes=["red"]), tmp_path / "run")
    outcome = train_head(config(data, classes=["red", "green"], ignore=2, steps=3), tmp_path / "run")
    assert {"IoU/red", "IoU/green"} <= set(outcome.metrics)


def test_a_size_below_a_patch_and_a_broken_image_are_errors(tmp_path: Path) -> None:
    data = mask_folder(tmp_path / "data")
    with pytest.raises(DinoError, match="size 8 is smaller than one patch"):
        train_head(config(data, size=8), tmp_path / "run")
    (data / "train" / "0.png").write_bytes(b"no image at all, but bytes")
    with pytest.raises(DinoError, match=r"1 of the images cannot be read: 0.png \("):
        train_head(config(data), tmp_path / "run")


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "P"])
def test_grey_transparent_deep_and_palette_images_are_images(tmp_path: Path, mode: str) -> None:
    data = mask_folder(tmp_path / "data")
    path = data / "train" / "0.png"
    with Image.open(path) as image:
        grey = image.convert("L")
        if mode == "I;16":
            Image.fromarray((np.asarray(grey).astype(np.uint16)) * 257).save(path)
        else:
            (grey if mode == "L" else image.convert(mode)).save(path)
    assert train_head(config(data, steps=2), tmp_path / "run").head.is_file()


def test_images_of_several_aspects_become_squares(tmp_path: Path) -> None:
    data = mask_folder(tmp_path / "data")
    classes = blocks(20)[:32]
    write(data / "train" / "wide.png", COLOURS[classes])
    write(data / "trainannot" / "wide.png", classes.astype(np.uint8))
    outcome = train_head(config(data, steps=3), tmp_path / "run")
    info = load_head(outcome.head, backbone=head_module.load_backbone(config(data))).head_info
    assert info.preprocessing.shape == "square"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"head": "dtp", "task": "depth"}, "did you mean 'dpt'"),
        ({"head": "detr"}, "detr is a head for detection"),
        ({"augment": "flop"}, "did you mean 'flip'"),
        ({"options": {"dropot": 0.5}}, "no option 'dropot'"),
    ],
)
def test_a_wrong_option_is_an_error(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DinoError, match=says):
        train_head(config(mask_folder(tmp_path / "data"), **changes), tmp_path / "run")


def test_the_verb_reads_options_and_prints_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from dinov3.cli import app

    data = class_folder(tmp_path / "data")
    args = ["train-head", "classification", str(data), "--out", str(tmp_path / "run"), "--steps", "2", "--batch", "2"]
    result = CliRunner().invoke(app, [*args, "--size", "32", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "run" / "head.safetensors") in result.stdout
    wrong = CliRunner().invoke(app, ["train-head", "depth", str(data), "--out", "x", "--head", "detr"])
    assert isinstance(wrong.exception, DinoError)
    segments = ["train-head", "segmentation", str(mask_folder(tmp_path / "m")), "--out", str(tmp_path / "run2")]
    chosen = [*segments, "--size", "32", "--steps", "1", "--device", "cpu", "backbone_out_layers=LAST", "dropout=0.0"]
    assert CliRunner().invoke(app, chosen).exit_code == 0
    model = load_head(tmp_path / "run2" / "head.safetensors", backbone=head_module.load_backbone(HeadConfig()))
    assert model.head_info.layers == (3,)


# ---- real images --------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "task, head, line, least",
    [
        ("segmentation", "linear", "DenseFolder:root={}/camvid:split=train:select=0:8:ignore=11", {"aAcc": 0.85}),
        ("depth", "linear", "DenseFolder:root={}/7scenes:kind=depth:select=0:8", {"a1": 0.9}),
        ("depth", "dpt", "DenseFolder:root={}/7scenes:kind=depth:select=0:8", {"a1": 0.95}),
    ],
)
def test_heads_learn_eight_real_images_by_heart(
    tmp_path: Path, development_data: Path, monkeypatch: pytest.MonkeyPatch, task: str, head: str, line: str, least: Any
) -> None:
    monkeypatch.undo()
    narrow = {"channels": 32, "post_process_channels": [24, 48, 96, 192]}  # a DPT that a CPU trains in a minute
    wanted = HeadConfig(
        task=task, head=head, data=line.format(development_data), augment="none",
        **({"size": 160, "steps": 200, "batch": 2, "lr": 1e-3, "options": narrow} if head == "dpt" else
           {"size": 240, "steps": 150, "batch": 4, "lr": 1e-2}),
    )  # fmt: skip
    metrics = train_head(wanted, tmp_path / "run").metrics
    for name, value in least.items():
        assert metrics[name] > value, metrics
