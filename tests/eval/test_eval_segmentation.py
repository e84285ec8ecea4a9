"""Evaluation of segmentation: the protocol on known answers, the recipes, and the script from end to end."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kills import stopped_at
from paths import ROOT
from PIL import Image
from ranks import run_ranks
from torch import Tensor, nn
from toy_dense import write_model, write_scenes
from toy_models import HEAD, tiny_vit

from dinov3.config.loading import EVALUATIONS, find_file, load
from dinov3.data.datasets import make_dataset
from dinov3.data.transforms.dense import short_side
from dinov3.errors import DinoError
from dinov3.eval import dense
from dinov3.eval.segmentation import run as segmentation
from dinov3.eval.segmentation.run import Protocol, SegmentationConfig, class_probabilities, copies, evaluate_model
from dinov3.heads.linear import build_linear_segmentor
from dinov3.heads.objectives import cross_entropy_map, multilabel_dice
from dinov3.hub import load as load_backbone
from dinov3.hub import published_heads
from dinov3.metrics import confusion_matrix, iou_scores, percentages

TRAINING, INFERENCE = "config-ade20k-linear-training.yaml", "config-ade20k-m2f-inference.yaml"


def configured(*words: str, recipe: str | None = None) -> SegmentationConfig:
    file = EVALUATIONS / recipe if recipe else None
    return load(SegmentationConfig, file, words)[0]


# ---- recipes -------------------------------------------------------------------------------------------------------


def test_the_training_recipe_has_the_published_rates():
    c = configured("datasets.root=/data", recipe=TRAINING)
    fit = dense.fit_config(c.optimizer, c.scheduler, images=2, late=1, evaluate_every=5000)
    golden = {
        0: 1e-9, 1: 1e-9, 2: 6.6765e-7, 100: 6.58376e-5, 750: 4.89984e-4, 1499: 9.61267e-4, 1500: 9.61883e-4,
        1501: 9.96530e-4, 10000: 8.53553e-4, 20000: 5e-4, 30000: 1.46447e-4, 39999: 1.54e-12,
    }  # fmt: skip
    for step, rate in golden.items():
        assert fit.lr_at(step) == pytest.approx(rate, rel=1e-5 if step < 39999 else 5e-3), step
    assert fit.clip is None
    assert (fit.beta1_at(100), fit.beta2, fit.weight_decay, fit.steps) == (0.9, 0.999, 1e-3, 40000)
    assert list(fit.problems()) == []


def test_what_a_recipe_leaves_out_is_as_in_the_reference():
    words = ["scheduler.constructor_kwargs.warmup_iters=10", "scheduler.constructor_kwargs.update_momentum=false"]
    silent = configured("decoder_head.type=linear", "scheduler.total_iter=100", *words)
    fit = dense.fit_config(silent.optimizer, silent.scheduler, images=2, late=0, evaluate_every=100)
    assert fit.schedule_options["final_div_factor"] == 1000
    assert fit.lr_at(0) == pytest.approx(silent.optimizer.lr / 1000)
    assert [fit.beta1_at(i) for i in (0, 9)] == [0, 0]
    assert [fit.beta1_at(i) for i in (10, 99)] == pytest.approx([0.85, 0.95], abs=1e-3)
    words.append("scheduler.constructor_kwargs.warmup_ratio=0.1")  # the momentum does not know the ratio
    silent = configured("decoder_head.type=linear", "scheduler.total_iter=100", *words)
    fit = dense.fit_config(silent.optimizer, silent.scheduler, images=2, late=0, evaluate_every=100)
    assert (fit.lr_at(0), fit.beta1_at(0), fit.beta1_at(9)) == (pytest.approx(0.1 * silent.optimizer.lr), 0, 0)


def test_recipes_hold_the_published_values():
    c = configured("datasets.root=/data", recipe=TRAINING)
    assert c.transforms.train.random_img_size_ratio_range == [0.5, 2.0]
    assert (c.transforms.train.crop_size, c.transforms.train.flip_prob) == ([512, 512], 0.5)
    assert (c.eval.crop_size, c.eval.stride, c.eval.use_tta, c.decoder_head.backbone_out_layers) == (
        512,
        341,
        False,
        "LAST",
    )
    m = configured("datasets.root=/data", recipe=INFERENCE)
    assert (m.load_from, m.decoder_head.type, m.decoder_head.num_classes) == ("dinov3_vit7b16_ms", "m2f", 150)
    assert m.transforms.eval.tta_ratios == [0.9, 0.95, 1.0, 1.05, 1.1]
    assert (m.eval.crop_size, m.eval.stride, m.eval.use_tta) == (896, 596, True)


@pytest.mark.parametrize("recipe", [TRAINING, INFERENCE])
def test_a_recipe_is_found_under_the_references_path_too(recipe):
    assert find_file(f"dinov3/eval/segmentation/configs/{recipe}") == EVALUATIONS / recipe
    assert find_file(recipe) == EVALUATIONS / recipe
    with pytest.raises(DinoError, match=r"no configuration file /no/such\.yaml"):
        find_file("/no/such.yaml")


@pytest.mark.parametrize(
    ("arch", "parameters"), [("small", 58_518), ("base", 116_886), ("large", 155_798), ("7b", 622_742)]
)
def test_a_head_has_the_published_number_of_parameters(arch, parameters):
    width = {"small": 384, "base": 768, "large": 1024, "7b": 4096}[arch]
    backbone = SimpleNamespace(n_blocks=12, embed_dim=width, stride=16, patch_size=16)

    class Stub(nn.Module):
        pass

    stub = Stub()
    stub.__dict__.update(vars(backbone))
    with torch.device("meta"):
        model = build_linear_segmentor(stub, backbone_out_layers="LAST")  # type: ignore[arg-type]
    assert sum(p.numel() for p in model.parameters()) == parameters


# ---- what a configuration refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["decoder_head.type=m2f"], "not fitted: give load_from"),
        (["decoder_head.type=linear", "metric_to_save=miou"], "is one of mIoU"),
        (["decoder_head.type=linear", "decoder_head.use_cls_token=true"], "leave it false"),
        (["decoder_head.type=linear", "scheduler.constructor_kwargs.warmup_iter=3"], "did you mean 'warmup_iters'"),
        (["decoder_head.type=linear", "scheduler.constructor_kwargs.pct_start=0.3"], "the warm-up is warmup_iters"),
        (["decoder_head.type=linear", "scheduler.type=WarmupOneCycle"], "did you mean 'WarmupOneCycleLR'"),
        (["decoder_head.type=linear", "train.celoss_weight=0"], "one of celoss_weight and diceloss_weight"),
        (
            ["decoder_head.type=linear", "transforms.train.random_img_size_ratio_range=[2.0]"],
            "must be two rising numbers, [low, high]",
        ),
        (["decoder_head.type=linear", "eval.croop=3"], "unknown key"),
    ],
)
def test_a_wrong_configuration_is_refused_with_a_sentence(words, sentence):
    with pytest.raises(DinoError) as caught:
        configured(*words)
    assert sentence in str(caught.value)


def test_enumerated_keys_take_either_form_and_are_saved_by_name(tmp_path):
    assert configured("decoder_head.type=LINEAR", "model_dtype=bfloat16").model_dtype == "BFLOAT16"
    assert (
        configured(
            "decoder_head.type=linear", "decoder_head.backbone_out_layers=four_last"
        ).decoder_head.backbone_out_layers
        == "FOUR_LAST"
    )


def test_what_is_no_dense_data_set_is_refused(tmp_path):
    write_scenes(tmp_path, {"train": 1})
    with pytest.raises(DinoError, match="no map for each image"):
        dense.open_dense(f"Folder:root={tmp_path}", None, ("classes",), "datasets.val")
    with pytest.raises(DinoError, match="this evaluation needs depth"):
        dense.open_dense(f"DenseFolder:root={tmp_path}:split=train", None, ("depth",), "datasets.val")
    with pytest.raises(DinoError, match=r"datasets\.train must be given"):
        dense.open_dense("", None, ("depth",), "datasets.train")


# ---- the protocol --------------------------------------------------------------------------------------------------


class Colours(nn.Module):
    """Logits are the image's own colours, or what `f` makes of them: equivariant to flips."""

    def predict(self, x: Tensor, rescale_to: tuple[int, int]) -> Tensor:
        return F.interpolate(x[:, :3], rescale_to, mode="bilinear", align_corners=False)


class Left(nn.Module):
    """Class 0 on the left half of whatever it sees: not equivariant."""

    def predict(self, x: Tensor, rescale_to: tuple[int, int]) -> Tensor:
        h, w = rescale_to
        right = (torch.arange(w) >= w // 2).float().expand(h, w)
        return torch.stack([1 - right, right])[None] * 5


def test_copies_come_at_the_published_sizes_originals_first():
    image = np.zeros((90, 120, 3), np.uint8)
    made = copies(image, Protocol(3, size=896, ratios=(0.9, 0.95, 1.0, 1.05, 1.1), flip=True))
    assert [tuple(x.shape[-2:]) for x, _ in made[:5]] == [short_side((90, 120), s) for s in (832, 864, 896, 940, 985)]
    assert [mirrored for _, mirrored in made] == [False] * 5 + [True] * 5
    assert [x.shape for x, _ in made[:5]] == [x.shape for x, _ in made[5:]]


def test_a_model_that_follows_flips_gives_the_same_with_mirror_images():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    one, two = (
        class_probabilities(Colours(), image, (30, 40), Protocol(3, crop=16, stride=11, flip=flip), "cpu")
        for flip in (False, True)
    )
    assert torch.allclose(one, two, atol=1e-6)
    alone, both = (
        class_probabilities(Left(), image, (30, 40), Protocol(2, crop=64, mode="whole", flip=flip), "cpu")
        for flip in (False, True)
    )
    assert alone[0, :, :20].min() > 0.9
    assert torch.allclose(both, torch.full_like(both, 0.5))  # mirrored, predicted, and mirrored back: they cancel


def test_windows_of_a_model_that_returns_its_input_give_the_input():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    p = class_probabilities(Colours(), image, (30, 40), Protocol(3, crop=16, stride=11), "cpu")
    x = copies(image, Protocol(3))[0][0]
    assert torch.allclose(p, x[0].softmax(0), atol=1e-6)


def slow_scores(data: Any, K: int, zero: bool) -> np.ndarray:
    """Predictions are the strongest colour; class by class, pixel by pixel."""
    counts = np.zeros((K, K), int)
    for image, mask in data:
        strongest = np.asarray(image).astype(int)
        x = copies(image, Protocol(K))[0][0][0].numpy()
        for y in range(mask.shape[0]):
            for z in range(mask.shape[1]):
                label = int(mask[y, z])
                if zero:
                    label = 255 if label == 0 else label - 1
                if label != 255:
                    counts[label, int(x[:, y, z].argmax())] += 1
        assert strongest.shape[-1] == 3
    return counts


@pytest.mark.parametrize("ade", [True, False])
def test_scores_equal_a_plain_loop_with_and_without_zero_reduction(tmp_path, ade):
    write_scenes(tmp_path, {"validation": 2} if ade else {"val": 2}, ade=ade)
    line = f"ADE20K:root={tmp_path}:split=VAL" if ade else f"DenseFolder:root={tmp_path}:split=val:ignore=3"
    data = make_dataset(line)
    scores = evaluate_model(Colours(), data, Protocol(3, crop=24, stride=16), reduce_zero=ade)
    c = slow_scores(data, 3, ade)
    iou = [c[k, k] / (c[k].sum() + c[:, k].sum() - c[k, k]) for k in range(3)]
    assert scores["mIoU"] == pytest.approx(np.mean(iou))
    assert scores["aAcc"] == pytest.approx(np.trace(c) / c.sum())
    if ade:
        assert scores["mIoU"] > 0.99  # the boxes are pure colours


def test_scores_of_single_images_are_averaged_on_request(tmp_path):
    write_scenes(tmp_path, {"val": 3})
    data = make_dataset(f"DenseFolder:root={tmp_path}:split=val:ignore=3")
    whole = evaluate_model(Colours(), data, Protocol(3), reduce_zero=False)
    each = [
        evaluate_model(Colours(), make_dataset(f"DenseFolder:root={tmp_path}:split=val:ignore=3:select={i}:{i + 1}"),
                       Protocol(3), reduce_zero=False)["mIoU"]
        for i in range(3)
    ]  # fmt: skip
    averaged = evaluate_model(Colours(), data, Protocol(3), reduce_zero=False, per_image=True)
    assert averaged["mIoU"] == pytest.approx(np.mean(each))
    assert averaged["mIoU"] != pytest.approx(whole["mIoU"])


def _scored(root: str) -> float:
    data = make_dataset(f"DenseFolder:root={root}:split=val:ignore=3")
    return evaluate_model(Colours(), data, Protocol(3), reduce_zero=False)["mIoU"]


def test_every_image_counts_once_on_several_ranks(tmp_path):
    write_scenes(tmp_path, {"val": 3})  # an odd number: a padding sampler would count one twice
    assert run_ranks(_scored, 2, str(tmp_path)) == [_scored(str(tmp_path))] * 2


# ---- the script ----------------------------------------------------------------------------------------------------


def words_for(tmp_path: Path, out: str, *more: str) -> list[str]:
    return [
        f"model.config_file={write_model(tmp_path)}", f"datasets.root={tmp_path / 'scenes'}",
        "datasets.train=DenseFolder:split=train", "datasets.val=DenseFolder:split=val", "decoder_head.type=linear",
        "decoder_head.num_classes=4", "transforms.train.img_size=32",
        "transforms.train.random_img_size_ratio_range=[0.8,1.5]",
        "transforms.train.crop_size=32", "transforms.train.flip_prob=0.5", "transforms.eval.img_size=32", "eval.crop_size=32",
        "eval.stride=16", "scheduler.total_iter=12", "scheduler.constructor_kwargs.warmup_iters=2",
        "scheduler.constructor_kwargs.use_beta1=false", "optimizer.lr=0.02",
        "eval.eval_interval=6", "num_workers=0", f"output_dir={tmp_path / out}", *more,
    ]  # fmt: skip


@pytest.fixture
def scenes(tmp_path):
    write_scenes(tmp_path / "scenes", {"train": 6, "val": 3})
    return tmp_path


def results(folder: Path) -> dict[str, float]:
    with open(folder / "results-semantic-segmentation.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    return {k: float(v) for k, v in row.items()}


def test_the_script_fits_a_head_and_writes_the_documented_files(scenes, capsys):
    assert segmentation.main(words_for(scenes, "out")) == 0, capsys.readouterr().err
    out = scenes / "out"
    row = results(out)
    assert list(row) == ["mIoU", "acc", "aAcc", "dice", "fscore", "precision", "recall"]
    assert row["mIoU"] > 40  # random features of a tiny model; chance and a constant class are below 20
    saved = torch.load(out / "model_final.pth", weights_only=True)
    assert all(k.startswith("segmentation_model.1.") for k in saved["model"])
    with open(out / "per-class.csv", newline="") as file:
        per_class = list(csv.DictReader(file))
    assert [r["class"] for r in per_class] == ["0", "1", "2", "3"]
    assert np.mean([float(r["IoU"]) for r in per_class]) == pytest.approx(row["mIoU"], abs=0.01)
    assert load(SegmentationConfig, out / "segmentation_config.yaml")[0].optimizer.lr == 0.02
    assert json.loads((out / "results-semantic-segmentation.json").read_text())["results"] == row

    # the head that was written scores the same, in both forms
    for name in ("model_final.pth", "head.safetensors"):
        again = words_for(scenes, f"again-{name}", f"load_from={out / name}", "save_results=true")
        assert segmentation.main(again) == 0, capsys.readouterr().err
        assert results(scenes / f"again-{name}") == row
    saved_maps = [np.asarray(Image.open(p)) for p in sorted((scenes / "again-head.safetensors/predictions").iterdir())]
    data = make_dataset(f"DenseFolder:root={scenes / 'scenes'}:split=val")
    counts = sum(confusion_matrix(p, data.target(i), 4) for i, p in enumerate(saved_maps))
    assert percentages(iou_scores(counts)) == row

    # and a run that had ended gives its best again, without fitting
    before = (out / "metrics.jsonl").read_text()
    assert segmentation.main(words_for(scenes, "out")) == 0
    assert results(out) == row
    assert (out / "metrics.jsonl").read_text() == before


def test_a_run_that_was_cut_ends_with_the_same_head(scenes):
    assert segmentation.main(words_for(scenes, "whole")) == 0
    with stopped_at(8):
        segmentation.main(words_for(scenes, "cut"))
    assert segmentation.main(words_for(scenes, "cut")) == 0
    first, second = (
        torch.load(scenes / run / "model_final.pth", weights_only=True)["model"] for run in ("whole", "cut")
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert results(scenes / "cut") == results(scenes / "whole")


def test_features_computed_once_fit_the_same_head_as_features_computed_every_time(scenes, monkeypatch):
    """Without augmentation, on images of one size: the kept features are what the backbone would say again."""
    plain = ["transforms.train.augment=false", "decoder_head.dropout=0", "eval.eval_interval=100"]
    assert segmentation.main(words_for(scenes, "kept", *plain)) == 0
    monkeypatch.setattr(dense, "feature_cache", lambda *given, **options: nullcontext())
    assert segmentation.main(words_for(scenes, "anew", *plain)) == 0
    first, second = (
        torch.load(scenes / run / "model_final.pth", weights_only=True)["model"] for run in ("kept", "anew")
    )
    for k in first:
        assert torch.allclose(first[k].float(), second[k].float(), atol=1e-5), k


def _on_a_rank(words: list[str]) -> int:
    from dinov3 import distributed

    distributed.shutdown = lambda: None  # the ranks of a test part by themselves
    return segmentation.main(words)


def test_two_ranks_fit_one_head_together(scenes):
    assert run_ranks(_on_a_rank, 2, words_for(scenes, "two", "model.device=cpu"), timeout_s=120) == [0, 0]
    assert results(scenes / "two")["mIoU"] > 40
    record = json.loads((scenes / "two" / "results-semantic-segmentation.json").read_text())
    assert record["processes"] == 2


@pytest.mark.slow
def test_the_launcher_and_the_script_itself_run_as_printed(scenes):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    script = "dinov3/eval/segmentation/run.py"
    for start in ([sys.executable, "-m", "dinov3.run.submit", script], [sys.executable, script]):
        out = f"out-{len(start)}"
        done = subprocess.run([*start, *words_for(scenes, out)], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "mIoU" in done.stdout
    assert results(scenes / "out-4") == results(scenes / "out-2")


def test_the_papers_sweep_is_one_command(scenes, capsys):
    words = words_for(scenes, "sweep", "scheduler.total_iter=2", "--sweep", "optimizer.lr=1e-3,0.1")
    assert segmentation.main(words) == 0, capsys.readouterr().err
    with open(scenes / "sweep" / "sweep-semantic-segmentation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["optimizer.lr"]) for row in rows] == [1e-3, 0.1]
    assert all(float(row["mIoU"]) > 0 for row in rows)
    assert (scenes / "sweep/sweep/optimizer.lr=0.1/model_final.pth").is_file()


def test_a_plain_folder_needs_no_configuration(scenes, monkeypatch, capsys):
    write_model(scenes)
    monkeypatch.chdir(scenes)
    words = shlex.split("scenes --size 32 --steps 20 model.config_file=toy.yaml num_workers=0 optimizer.lr=0.03")
    assert segmentation.main(words) == 0, capsys.readouterr().err
    row = results(scenes / "segmentation-scenes")
    assert row["mIoU"] > 50
    assert segmentation.main(["nowhere"]) == 1
    assert "no such file or folder: nowhere" in capsys.readouterr().err
    assert segmentation.main(["scenes", "--sise", "3"]) == 1
    assert "did you mean '--size'" in capsys.readouterr().err
    assert segmentation.main(["scenes", "--size", "big"]) == 1
    assert "whole number" in capsys.readouterr().err


def test_a_folder_without_splits_is_cut_in_the_order_of_names(tmp_path):
    write_scenes(tmp_path, {"all": 10})
    train, val = dense.folder_specs(tmp_path / "all", "classes")
    assert (len(make_dataset(train)), len(make_dataset(val))) == (8, 2)
    assert make_dataset(train).name(7) < make_dataset(val).name(0)


# ---- Mask2Former ---------------------------------------------------------------------------------------------------


def tiny_segmentor(n_classes: int) -> Any:
    from dinov3.heads.mask2former import build_segmentor
    from dinov3.hub import Origin

    model = build_segmentor(tiny_vit(num_heads=1), n_classes, **HEAD).eval()
    model.origin = Origin("toy", "random", "random", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return model


def test_the_published_mask2former_is_scored_with_its_protocol(tmp_path, monkeypatch):
    write_scenes(tmp_path, {"validation": 2}, ade=True)
    asked: dict[str, Any] = {}

    def published(**kwargs: Any) -> Any:
        asked.update(kwargs)
        return tiny_segmentor(kwargs["n_classes"])

    monkeypatch.setattr(published_heads, "dinov3_vit7b16_ms", published)
    words = [
        f"config={INFERENCE}", f"datasets.root={tmp_path}", f"output_dir={tmp_path / 'out'}",
        "head_weights=H", "backbone_weights=B",
        "decoder_head.num_classes=3", "decoder_head.hidden_dim=32", "transforms.eval.img_size=64", "eval.crop_size=64",
        "eval.stride=42", "transforms.eval.tta_ratios=[0.9,1.0]", "model_dtype=FLOAT32",
    ]  # fmt: skip
    assert segmentation.main(words) == 0
    assert asked["weights"] == "H"
    assert asked["backbone_weights"] == "B"
    assert asked["hidden_dim"] == 32
    protocol = Protocol(3, size=64, crop=64, stride=42, ratios=(0.9, 1.0), flip=True, head="m2f")
    data = make_dataset(f"ADE20K:root={tmp_path}:split=VAL")
    direct = evaluate_model(tiny_segmentor(3), data, protocol, reduce_zero=True)
    assert results(tmp_path / "out")["mIoU"] == pytest.approx(100 * direct["mIoU"], abs=0.01)


def test_a_mask2former_of_your_own_is_scored_from_its_head_file(scenes, capsys):
    from dinov3.hub.own_heads import build_head, save_head

    backbone = load_backbone("dinov3_vitt16", "random")
    options = HEAD | {"n_classes": 4}
    torch.manual_seed(0)
    model = build_head("segmentation", "mask2former", backbone, **options).eval()
    save_head(scenes / "head.safetensors", model, task="segmentation", head="mask2former", options=options)
    words = [
        f"datasets.val=DenseFolder:root={scenes / 'scenes'}:split=val", f"load_from={scenes / 'head.safetensors'}",
        "transforms.eval.img_size=64", "eval.crop_size=64", "eval.stride=42",
        f"output_dir={scenes / 'out'}",
    ]  # fmt: skip
    assert segmentation.main(words) == 0, capsys.readouterr().err
    data = make_dataset(f"DenseFolder:root={scenes / 'scenes'}:split=val")
    direct = evaluate_model(model, data, Protocol(4, size=64, crop=64, stride=42, head="m2f"), reduce_zero=False)
    assert results(scenes / "out")["mIoU"] == pytest.approx(100 * direct["mIoU"], abs=0.01)


def test_a_head_for_another_task_is_refused(tmp_path, capsys):
    write_scenes(tmp_path, {"val": 1})
    words = [
        f"datasets.val=DenseFolder:root={tmp_path}:split=val",
        f"output_dir={tmp_path / 'out'}",
        "decoder_head.type=linear",
    ]
    assert segmentation.main([*words, "load_from=dinov3_vit7b16_dd"]) == 1
    assert "is a head for depth" in capsys.readouterr().err
    assert segmentation.main([*words, "load_from=/nothing.pth"]) == 1
    assert "neither a published head nor a file" in capsys.readouterr().err


def test_a_mask_with_more_classes_than_the_head_is_an_error(scenes, capsys):
    assert segmentation.main(words_for(scenes, "out", "decoder_head.num_classes=2")) == 1
    err = capsys.readouterr().err
    assert "class 3" in err
    assert "2 classes" in err


# ---- the losses of the recipes, on the specification's known answers -------------------------------------------------


def test_losses_have_the_recorded_values():
    target = torch.tensor([[[0, 1], [255, 255]]])
    assert float(cross_entropy_map(torch.zeros(1, 2, 2, 2), target)) == pytest.approx(np.log(2) / 2)  # over all pixels
    one_hot = torch.tensor([[[[1.0, 0], [0, 1]], [[0, 1], [1, 0]]]])
    assert float(multilabel_dice(torch.zeros(1, 2, 2, 2).sigmoid(), one_hot)) == pytest.approx(0.25)


def test_options_of_a_folder_are_those_of_every_evaluation(scenes):
    read = segmentation.FOLDER.read([str(scenes / "scenes"), "--device", "cpu", "--weights=random", "--size", "64"])
    assert {"model.device=cpu", "model.weights=random", "eval.crop_size=64"} <= set(read)
