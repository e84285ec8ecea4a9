"""Evaluation of depth: the protocol on known answers, the recipes, and the script from end to end."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import stopped_at
from paths import ROOT
from PIL import Image
from ranks import run_ranks
from torch import Tensor
from toy_dense import write_depths, write_model
from toy_models import tiny_vit

from dinov3.config.loading import EVALUATIONS, load
from dinov3.data.datasets import make_dataset
from dinov3.data.transforms.dense import DepthTransform
from dinov3.errors import DinoError
from dinov3.eval import dense
from dinov3.eval.depth import run as depth
from dinov3.eval.depth.run import DepthConfig, EvalSection, depth_map, evaluate_model
from dinov3.heads.dpt import build_depther
from dinov3.heads.objectives import DepthLoss
from dinov3.hub import Origin, published_heads
from dinov3.metrics import depth_scores, mean_scores

NYU, SYNTHMIX = "config-nyu.yaml", "config-nyu-synthmix-dpt-inference.yaml"


def configured(*words: str, recipe: str | None = None) -> DepthConfig:
    file = EVALUATIONS / recipe if recipe else None
    return load(DepthConfig, file, words)[0]


# ---- recipes -------------------------------------------------------------------------------------------------------


def test_the_nyu_recipe_has_the_published_rates_and_momenta():
    c = configured("datasets.root=/data", recipe=NYU)
    fit = dense.fit_config(c.optimizer, c.scheduler, images=2, late=0, evaluate_every=1600)
    rates = {
        0: 3e-7, 1: 3.23437e-7, 100: 2.64371e-6, 6400: 1.40252e-4, 12799: 2.25293e-4, 12800: 2.24992e-4, 19200: 1.49994e-4,
        25600: 7.49984e-5, 38399: 1.2e-8,
    }  # fmt: skip
    for step, rate in rates.items():
        assert fit.lr_at(step) == pytest.approx(rate, rel=1e-5), step
    for step, beta in {0: 0.0, 12799: 0.0, 12800: 0.85, 19200: 0.864645, 25600: 0.9, 38399: 0.95}.items():
        assert fit.beta1_at(step) == pytest.approx(beta, abs=1e-5), step
    assert (fit.clip, fit.beta2, fit.weight_decay, fit.steps) == (35, 0.99, 1e-4, 38400)
    assert list(fit.problems()) == []


def test_recipes_hold_the_published_values():
    c = configured("datasets.root=/data", recipe=NYU)
    t = c.transforms
    assert (t.train.fixed_crop, t.train.random_crop, t.train.rotation_angle) == ("NYU", [416, 544], 2.5)
    assert (t.train.brightness_range, t.eval.eval_mask, t.eval.fixed_crop) == ([0.75, 1.25], "NYU_EIGEN", "FULL")
    assert (c.eval.use_tta, c.eval.align_least_squares, c.eval.min_depth, c.eval.max_depth) == (True, False, 0.001, 10)
    d = c.decoder_head
    assert (d.backbone_out_layers, d.use_batchnorm, d.use_cls_token, d.n_output_channels) == ("LAST", True, False, 256)
    s = configured("datasets.root=/data", recipe=SYNTHMIX)
    assert (s.load_from, s.eval.align_least_squares, s.transforms.eval.img_size) == ("dinov3_vit7b16_dd", True, 768)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["losses.SIGLOS=1"], "did you mean 'SIGLOSS'"),
        (["save_results=true"], "result_config.save_results=true"),
        (["metrics=[rmsee]"], "did you mean 'rmse'"),
        (["transforms.eval.eval_mask=NYU"], "is one of FULL, NYU_EIGEN"),
        (["transforms.train.fixed_crop=KITTI"], "is one of FULL, NYU"),
        (["decoder_head.backbone_out_layers=FOUR"], "a list of blocks, not"),
        (["eval.min_depth=0"], "must be above 0"),
        (["decoder_head.bins_strategy=cubic"], "'linear' or 'log'"),
    ],
)
def test_a_wrong_configuration_is_refused_with_a_sentence(words, sentence):
    with pytest.raises(DinoError) as caught:
        configured(*words)
    assert sentence in str(caught.value)


def test_enumerated_keys_take_name_or_value():
    for text in ("NO_ADAPTATION", "never"):
        assert configured(f"decoder_head.adapt_to_patch_size={text}").decoder_head.adapt_to_patch_size.value == "never"
    assert configured("decoder_head.backbone_out_layers=[1,3]").decoder_head.backbone_out_layers == [1, 3]
    assert configured("losses.SIGLOSS=1.0", "losses.GRADIENT_LOG_LOSS=0.5").losses == {
        "SIGLOSS": 1.0,
        "GRADIENT_LOG_LOSS": 0.5,
    }


# ---- the protocol --------------------------------------------------------------------------------------------------


class Grey:
    """Depth is a function of the image's mean colour, `a`·grey + b; not equivariant to flips if `lean`."""

    def __init__(self, a: float = 1.0, b: float = 3.0, lean: float = 0.0) -> None:
        self.a, self.b, self.lean = a, b, lean

    def in_image(self, x: Tensor) -> Tensor:
        slope = torch.linspace(-1, 1, x.shape[-1]) * self.lean
        return self.a * x.mean(1, keepdim=True) + self.b + slope


def test_mirror_images_are_turned_back_before_they_are_averaged():
    x = torch.rand(3, 8, 10)
    lean = Grey(lean=0.5)
    assert torch.allclose(depth_map(lean, x, (8, 10), flip=True), Grey().in_image(x[None])[0, 0], atol=1e-6)
    assert not torch.allclose(depth_map(lean, x, (8, 10), flip=False), Grey().in_image(x[None])[0, 0], atol=1e-2)
    assert depth_map(lean, x, (16, 20), flip=True).shape == (16, 20)


@pytest.fixture
def rooms(tmp_path):
    write_depths(tmp_path / "rooms", 5)
    return tmp_path


def test_scores_are_means_over_images_inside_of_the_region_and_range(rooms):
    data = make_dataset(f"DenseFolder:root={rooms / 'rooms'}")
    transform = DepthTransform(region="NYU_EIGEN", mean=(0.0,) * 3, std=(1.0,) * 3)
    protocol = EvalSection(max_depth=3.5, use_tta=False)
    got, each = evaluate_model(Grey(), data, transform, protocol)
    slow = []
    for image, truth in data:
        prediction = np.asarray(image).astype(float).mean(-1) / 255 + 3
        rows = [
            (truth[y, x], prediction[y, x])
            for y in range(3, 31)
            for x in range(2, 37)
            if 0.001 < truth[y, x] < 3.5  # without the wall of 4 m and the unknown first row
        ]
        t, p = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
        slow.append(depth_scores(p, t, 0.001, 3.5))
    assert [row["rmse"] for row in each] == pytest.approx([row["rmse"] for row in slow], rel=1e-5)
    assert got == pytest.approx(mean_scores(slow), rel=1e-5)


def test_alignment_forgives_scale_and_shift(rooms):
    data = make_dataset(f"DenseFolder:root={rooms / 'rooms'}:select=:2")
    transform = DepthTransform(mean=(0.0,) * 3, std=(1.0,) * 3)

    def scored(model: Grey, align: bool) -> float:
        return evaluate_model(model, data, transform, EvalSection(align_least_squares=align, use_tta=False))[0]["rmse"]

    assert scored(Grey(), True) == pytest.approx(scored(Grey(a=-7, b=100), True), rel=1e-4)
    assert scored(Grey(), True) < 0.15  # brightness is depth here, up to scale, shift and noise
    assert scored(Grey(a=-7, b=100), False) > 3


def _scored(root: str) -> tuple[float, int]:
    data = make_dataset(f"DenseFolder:root={root}")
    scores, each = evaluate_model(Grey(), data, DepthTransform(), EvalSection())
    return scores["rmse"], len(each)


def test_every_image_counts_once_on_several_ranks(rooms):
    alone = _scored(str(rooms / "rooms"))
    assert alone[1] == 5
    for rmse, n in run_ranks(_scored, 2, str(rooms / "rooms")):
        assert (rmse, n) == (pytest.approx(alone[0], rel=1e-9), 5)


# ---- the script ----------------------------------------------------------------------------------------------------


def words_for(folder: Path, out: str, *more: str) -> list[str]:
    return [
        f"model.config_file={write_model(folder)}", f"datasets.root={folder / 'rooms'}",
        "datasets.train=DenseFolder:select=:4", "datasets.val=DenseFolder:select=4:", "decoder_head.use_batchnorm=true",
        "decoder_head.backbone_out_layers=LAST", "decoder_head.max_depth=10", "decoder_head.n_output_channels=32",
        "transforms.train.random_crop=[24,32]", "scheduler.total_iter=12", "scheduler.constructor_kwargs.warmup_iters=2",
        "scheduler.constructor_kwargs.use_beta1=true", "optimizer.lr=0.03", "eval.eval_interval=6", "num_workers=0",
        f"output_dir={folder / out}", *more,
    ]  # fmt: skip


def results(folder: Path) -> dict[str, float]:
    with open(folder / "results-depth.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    return {k: float(v) for k, v in row.items()}


def test_the_script_fits_a_head_and_writes_the_documented_files(rooms, capsys):
    assert depth.main(words_for(rooms, "out", "metrics=[rmse,abs_rel,a1,silog]")) == 0, capsys.readouterr().err
    out = rooms / "out"
    row = results(out)
    assert list(row) == [f"DenseFolder_{k}" for k in ("rmse", "abs_rel", "a1", "silog")]
    assert row["DenseFolder_rmse"] < 2  # the middle of all bins, 5 m, is off by 1.7
    each = json.loads((out / "DenseFolder" / "results.json").read_text())
    assert len(each["rmse"]) == 1
    assert np.mean(each["rmse"]) == pytest.approx(row["DenseFolder_rmse"])
    assert set(torch.load(out / "model_final.pth", weights_only=True)["model"]) == {
        "conv_depth.weight", "conv_depth.bias", "batchnorm_layer.weight", "batchnorm_layer.bias",
        "batchnorm_layer.running_mean", "batchnorm_layer.running_var", "batchnorm_layer.num_batches_tracked",
    }  # fmt: skip
    assert load(DepthConfig, out / "depth_config.yaml")[0].optimizer.lr == 0.03
    for name in ("model_final.pth", "head.safetensors"):
        again = words_for(rooms, f"again-{name}", f"load_from={out / name}", "metrics=[rmse,abs_rel,a1,silog]")
        assert depth.main(again) == 0, capsys.readouterr().err
        assert results(rooms / f"again-{name}") == pytest.approx(row)


def test_a_run_that_was_cut_ends_with_the_same_head(rooms):
    assert depth.main(words_for(rooms, "whole")) == 0
    with stopped_at(8):
        depth.main(words_for(rooms, "cut"))
    assert depth.main(words_for(rooms, "cut")) == 0
    first, second = (
        torch.load(rooms / run / "model_final.pth", weights_only=True)["model"] for run in ("whole", "cut")
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert results(rooms / "cut") == results(rooms / "whole")


def test_a_dpt_head_is_fitted_on_cached_features(rooms, capsys):
    words = words_for(
        rooms, "dpt", "decoder_head.type=dpt", "decoder_head.backbone_out_layers=FOUR_EVEN_INTERVALS",
        "scheduler.total_iter=4",
        "decoder_head.head_kwargs={channels: 16, post_process_channels: [16, 16, 16, 16], n_hidden_channels: 8}",
        "transforms.train.augment=false", "losses.SIGLOSS=1.0", "losses.GRADIENT_LOG_LOSS=0.5",
    )  # fmt: skip
    assert depth.main(words) == 0, capsys.readouterr().err
    assert math.isfinite(results(rooms / "dpt")["DenseFolder_rmse"])
    lines = [json.loads(line) for line in (rooms / "dpt" / "metrics.jsonl").read_text().splitlines()]
    assert {"sig_loss", "gradient_log_loss"} <= set().union(*lines)
    odd = words_for(rooms, "odd", "decoder_head.type=dpt", "decoder_head.head_kwargs.chanels=3")
    assert depth.main(odd) == 1
    assert "'chanels'" in capsys.readouterr().err


@pytest.mark.parametrize("extension", ["PNG", "PTH"])
def test_images_of_the_results_are_written_on_request(rooms, capsys, extension):
    if extension == "PNG":
        pytest.importorskip("matplotlib")
    words = words_for(
        rooms, "shown", "scheduler.total_iter=1", "scheduler.constructor_kwargs.warmup_iters=0",
        "result_config.save_results=true",
        f"result_config.extension={extension}", "result_config.save_resolution=[20,30]", "result_config.overlay_alpha=0.5",
    )  # fmt: skip
    assert depth.main(words) == 0, capsys.readouterr().err
    file = rooms / "shown" / "visualizations" / f"results_0.{extension.lower()}"
    if extension == "PNG":
        assert Image.open(file).size == (60, 20)
    else:
        assert torch.load(file, weights_only=True)["prediction"].shape == (20, 30)


def _on_a_rank(words: list[str]) -> int:
    from dinov3 import distributed

    distributed.shutdown = lambda: None  # the ranks of a test part by themselves
    return depth.main(words)


@pytest.mark.slow
def test_two_ranks_fit_one_head_together(rooms):
    assert run_ranks(_on_a_rank, 2, words_for(rooms, "two", "model.device=cpu"), timeout_s=120) == [0, 0]
    assert results(rooms / "two")["DenseFolder_rmse"] < 2


@pytest.mark.slow
def test_the_launcher_and_the_script_itself_run_as_printed(rooms):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    script = "dinov3/eval/depth/run.py"
    for start in ([sys.executable, "-m", "dinov3.run.submit", script], [sys.executable, script]):
        done = subprocess.run(
            [*start, *words_for(rooms, f"out-{len(start)}")], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "DenseFolder_rmse" in done.stdout
    assert results(rooms / "out-4") == results(rooms / "out-2")


def test_a_plain_folder_needs_no_configuration(rooms, monkeypatch, capsys):
    write_model(rooms)
    monkeypatch.chdir(rooms)
    words = shlex.split("rooms --steps 20 --max-depth 6 model.config_file=toy.yaml num_workers=0 optimizer.lr=0.03")
    assert depth.main(words) == 0, capsys.readouterr().err
    assert results(rooms / "depth-rooms")["DenseFolder_rmse"] < 1.5


def test_a_plain_folder_fits_a_dpt_on_four_layers(rooms, monkeypatch, capsys):
    write_model(rooms)
    monkeypatch.chdir(rooms)
    words = "rooms --steps 1 --size 32 model.config_file=toy.yaml num_workers=0 bs=1 eval.use_tta=false"
    assert depth.main([*shlex.split(words), "decoder_head.type=dpt"]) == 0, capsys.readouterr().err


# ---- published heads -----------------------------------------------------------------------------------------------


def tiny_depther(**options: Any) -> Any:
    head = {"head_type": "dpt", "channels": 16, "post_process_channels": (16,) * 4, "n_hidden_channels": 8}
    model = build_depther(tiny_vit(num_heads=1), n_output_channels=16, **head, **options).eval()
    model.origin = Origin("toy", "random", "random", (0.420, 0.411, 0.296), (0.213, 0.156, 0.143))
    return model


def test_the_published_depther_is_scored_with_alignment_and_mirror_images(tmp_path, monkeypatch):
    write_depths(tmp_path / "rooms", 2)
    asked: dict[str, Any] = {}

    def published(**kwargs: Any) -> Any:
        asked.update(kwargs)
        return tiny_depther(max_depth=100.0)

    monkeypatch.setattr(published_heads, "dinov3_vit7b16_dd", published)
    words = [
        f"config={SYNTHMIX}", f"datasets.test=DenseFolder:root={tmp_path / 'rooms'}", f"output_dir={tmp_path / 'out'}",
        "head_weights=H", "backbone_weights=B", "transforms.eval.img_size=48",
    ]  # fmt: skip
    assert depth.main(words) == 0
    assert (asked["weights"], asked["backbone_weights"]) == ("H", "B")
    transform = DepthTransform(48, region="NYU_EIGEN", mean=(0.420, 0.411, 0.296), std=(0.213, 0.156, 0.143))
    data = make_dataset(f"DenseFolder:root={tmp_path / 'rooms'}")
    direct, _ = evaluate_model(tiny_depther(max_depth=100.0), data, transform, EvalSection(align_least_squares=True))
    assert results(tmp_path / "out")["DenseFolder_rmse"] == pytest.approx(direct["rmse"])


def test_canopy_heights_are_scored_over_all_pixels(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for folder in ("images", "chm"):
        (tmp_path / folder).mkdir()
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(rng.uniform(0, 20, (64, 64)).astype(np.float32)).save(tmp_path / "chm" / f"{i}.tif")
    monkeypatch.setattr(published_heads, "dinov3_vitl16_chmv2", lambda **kwargs: tiny_depther(max_depth=96.0))
    words = [
        "load_from=dinov3_vitl16_chmv2",
        f"datasets.test=DenseFolder:root={tmp_path}",
        f"output_dir={tmp_path / 'out'}",
    ]
    assert depth.main([*words, "eval.use_tta=false"]) == 0, capsys.readouterr().err
    row = results(tmp_path / "out")
    model, data = tiny_depther(max_depth=96.0), make_dataset(f"DenseFolder:root={tmp_path}")
    transform = DepthTransform(mean=model.origin.mean, std=model.origin.std)
    errors = [(model.in_image(transform(p, t * 0)[0][None])[0, 0] - torch.from_numpy(t)).flatten() for p, t in data]
    e = torch.cat(errors)
    assert row["DenseFolder_mae"] == pytest.approx(float(e.abs().mean()), rel=1e-4)
    assert row["DenseFolder_bias"] == pytest.approx(float(e.mean()), rel=1e-4)
    assert "DenseFolder_block_r2" in row
    assert depth.main(["load_from=dinov3_vit7b16_ms", *words[1:]]) == 1
    assert "is a head for segment" in capsys.readouterr().err


# ---- the losses of the recipes, on the specification's known answers -------------------------------------------------


def test_losses_have_the_recorded_values():
    prediction, truth = (
        torch.tensor([1.0, 2, 3, 4]).view(1, 1, 2, 2),
        torch.tensor([1.2, 1.9, 2.5, 4.4]).view(1, 1, 2, 2),
    )
    loss = DepthLoss({"SIGLOSS": 1.0})
    assert float(loss(prediction, truth, step=99).total()) == pytest.approx(
        0.00425259, rel=1e-5
    )  # the first hundred calls
    assert float(loss(prediction, truth, step=100).total()) == pytest.approx(0.16091134, rel=1e-5)
    ramp = (1 + torch.arange(64.0) / 10).view(1, 1, 8, 8)
    raised = ramp.clone()
    raised[0, 0, 3, 3] += 1
    for names, value in (("GRADIENT_LOSS", 0.0625), ("GRADIENT_LOG_LOSS", 0.01494826)):
        assert float(DepthLoss({names: 1.0})(ramp, raised, step=0).total()) == pytest.approx(value, rel=1e-5)
        assert float(DepthLoss({names: 1.0})(ramp, ramp, step=0).total()) == 0
