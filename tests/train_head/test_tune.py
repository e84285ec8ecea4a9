"""`train-head --tune`: learning rates, the frozen run where nothing is learnt, the pair of files, resumption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import stopped_at
from PIL import Image
from torch import Tensor, nn
from toy_models import tiny_convnext, tiny_vit

import dinov3
from dinov3 import fit as fitting
from dinov3.errors import DinoError, WeightsError, WeightsMismatch
from dinov3.fit import FitConfig, fit
from dinov3.hub import Origin
from dinov3.hub.own_heads import METADATA, build_head, load_head
from dinov3.models.lora import LoRA
from dinov3.models.low_precision import quantise
from dinov3.optim import multipliers
from dinov3.train_head import run as head_module
from dinov3.train_head.config import HeadConfig
from dinov3.train_head.run import train_head
from dinov3.train_head.tune import learning_rates, tune
from dinov3.weights import reading
from dinov3.weights.identity import fingerprint

COLOURS = np.array([(220, 40, 40), (40, 200, 60), (50, 60, 230)], np.uint8)


def tiny(kind: str = "vit") -> Any:
    model: Any = tiny_vit() if kind == "vit" else tiny_convnext()
    model.origin = Origin("custom", "tiny", "random", (0.5,) * 3, (0.25,) * 3, licence="Apache-2.0")
    return model


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "load_backbone", lambda config: tiny(config.backbone or "vit"))
    monkeypatch.setattr(head_module, "figure", lambda *_: "")
    monkeypatch.setattr(fitting, "plot", lambda *_: "")


def folder(root: Path, task: str, n: int = 2) -> Path:
    """A few images of coloured blocks with what the task wants."""
    boxes: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for i in range(n):
        classes = np.random.default_rng(i).integers(0, 3, (4, 4)).repeat(16, 0).repeat(16, 1)
        images = {
            "segmentation": {f"images/{i}.png": COLOURS[classes], f"masks/{i}.png": classes.astype(np.uint8)},
            "depth": {f"{i}.color.png": COLOURS[classes], f"{i}.depth.png": (1000 * (1 + classes)).astype(np.uint16)},
            "classification": {f"{'ab'[i % 2]}/{i}.png": COLOURS[classes]},
            "detection": {f"{i}.png": COLOURS[classes]},
        }
        for name, pixels in images[task].items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / name)
        boxes["images"].append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
        box = {"id": i, "image_id": i, "category_id": 1, "bbox": [8, 8, 40, 40], "iscrowd": 0}
        boxes["annotations"].append(box)
    if task == "detection":
        (root / "_annotations.coco.json").write_text(json.dumps(boxes))
    return root


def config(data: Path, task: str = "segmentation", **changes: Any) -> HeadConfig:
    given: dict[str, Any] = {
        "size": 64,
        "steps": 4,
        "batch": 2,
        "lr": 1e-2,
        "workers": 0,
        "evaluate_every": 4,
        "save_every": 4,
    }
    return HeadConfig(task=task, data=str(data), **(given | changes))


def backbone_of(run: Path) -> dict[str, Tensor]:
    return reading.open(run / "backbone.safetensors").state_dict


# ---- learning rates --------------------------------------------------------------------------------------------------


def test_learning_rates_fall_by_a_factor_a_block() -> None:
    model = tiny()
    rates = learning_rates(model, "all", 0, 0.5)
    expected = {"patch_embed.proj.weight": 1 / 32, "cls_token": 1 / 32, "storage_tokens": 1 / 32, "norm.bias": 1.0}
    expected |= {f"blocks.{i}.attn.qkv.weight": 0.5 ** (4 - i) for i in range(4)}
    assert {name: rates[name] for name in expected} == expected
    # those of pretraining, but for what acts in pretraining only
    pretraining = {row.name: row.lr_multiplier for row in multipliers(model, layerwise_decay=0.5)}
    assert pretraining.pop("mask_token") == 1 / 32
    assert rates == pretraining
    last = learning_rates(model, "last", 1, 0.5)
    assert last == {name: rate for name, rate in rates.items() if name.startswith(("blocks.3.", "norm."))}
    stages = learning_rates(tiny("convnext"), "all", 0, 0.5)
    assert stages["downsample_layers.0.0.weight"] == stages["stages.0.0.pwconv1.weight"] == 1 / 16
    assert (stages["stages.3.0.gamma"], stages["norm.weight"]) == (0.5, 1.0)


def test_the_first_step_of_adam_moves_every_parameter_by_its_learning_rate() -> None:
    """|m / √v| is 1 in the first step, so a parameter with a gradient moves by its learning rate."""
    backbone = tiny()
    model = build_head("classification", "linear", backbone, n_classes=3)
    lr = 1e-3
    tuned = tune(model, HeadConfig(task="classification", tune="all", tune_decay=0.5, tune_lr=1e-4), lr)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, target = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])

    def loss(module: Any, _: Any) -> Any:
        terms = fitting.LossTerms()
        terms.add("ce", 1e6, nn.functional.cross_entropy(module(x), target))  # gradients far above Adam's eps
        return terms

    fit(model, lambda step: None, loss, FitConfig(steps=1, lr=lr, schedule="constant", weight_decay=0.0), tuned=tuned)
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    expected = {
        "linear_head.weight": 1e-3, "backbone.norm.weight": 1e-4, "backbone.blocks.3.mlp.fc1.weight": 5e-5,
        "backbone.blocks.0.attn.proj.weight": 1e-4 / 16, "backbone.cls_token": 1e-4 / 32, "backbone.mask_token": 0.0,
    }  # fmt: skip
    assert {name: moved[name] for name in expected} == pytest.approx(expected, rel=1e-2)


# ---- where nothing is learnt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["all", pytest.param("lora:2", marks=pytest.mark.slow)])
def test_a_learning_rate_of_zero_gives_the_frozen_head(tmp_path: Path, how: str) -> None:
    data = folder(tmp_path / "data", "segmentation")
    # augmented at random, the frozen backbone is not cached either, and batches are the same to the bit
    frozen = train_head(config(data, augment="full"), tmp_path / "frozen")
    tuned = train_head(config(data, augment="full", tune=how, tune_lr=0.0), tmp_path / "tuned")
    assert not (tmp_path / "frozen" / "backbone.safetensors").exists()
    heads = [reading.read(outcome.head)[0] for outcome in (frozen, tuned)]
    assert all(torch.equal(value, heads[1][name]) for name, value in heads[0].items())
    assert fingerprint(backbone_of(tmp_path / "tuned")) == fingerprint(tiny())
    assert '"tuned"' not in reading.read(frozen.head)[1][METADATA]  # files of frozen heads are as they were


# ---- the pair --------------------------------------------------------------------------------------------------------

SMALL: dict[tuple[str, str], dict[str, Any]] = {
    ("classification", "linear"): {},
    ("segmentation", "linear"): {},
    ("segmentation", "mask2former"): {"hidden_dim": 32, "ffn": 32, "n_queries": 8, "decoder_layers": 3, "pixel_layers": 1},
    ("depth", "linear"): {"n_output_channels": 16},
    ("depth", "dpt"): {"channels": 16, "post_process_channels": [8, 8, 16, 16], "n_output_channels": 16},
    ("detection", "detr"): {
        "width": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn": 32, "decoder_ffn": 32, "bias_hidden": 8,
        "n_queries": 8, "n_queries_one2many": 8, "topk": 8,
    },
}  # fmt: skip


KINDS = [pytest.param(*kind, marks=() if kind[1] == "linear" else pytest.mark.slow) for kind in SMALL]


@pytest.mark.parametrize(("task", "head"), KINDS)
def test_every_head_is_tuned_with_its_backbone_and_the_pair_is_found_by_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, head: str
) -> None:
    models: list[Any] = []
    save = head_module.save_tuned

    def watched(run: Any, model: nn.Module, *rest: Any) -> None:
        adapters = [part for part in model.modules() if isinstance(part, LoRA)]
        assert len(adapters) == 8
        assert all(bool(part.b.detach().abs().max() > 0) for part in adapters), "a layer got no gradient"
        models.append([output(model), model])
        save(run, model, *rest)

    x = torch.randn(1, 3, 64, 64)

    @torch.no_grad()
    def output(model: Any) -> Tensor:
        value = model.detector([x[0]]) if task == "detection" else model(x)
        return next(v for v in (value.values() if isinstance(value, dict) else [value]) if isinstance(v, Tensor))

    monkeypatch.setattr(head_module, "save_tuned", watched)
    wanted = config(folder(tmp_path / "data", task), task, head=head, options=SMALL[task, head], tune="lora:2", steps=2)
    train_head(wanted, tmp_path / "run")
    ((unmerged, trained),) = models
    again: Any = load_head(tmp_path / "run")
    assert again.head_info.tuned == "lora:2"
    torch.testing.assert_close(output(again), unmerged, atol=1e-5, rtol=0)
    assert torch.equal(output(again), output(trained))
    # as a backbone: by the folder of the run, or by its file
    backbone: Any = dinov3.load(weights=tmp_path / "run")
    assert fingerprint(backbone) == again.head_info.fingerprint != fingerprint(tiny())
    assert (backbone.origin.mean, backbone.origin.licence) == ((0.5,) * 3, "Apache-2.0")


def test_a_convnext_is_tuned(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", "segmentation")
    train_head(config(data, backbone="convnext", tune="last:1", steps=2), tmp_path / "run")
    found = backbone_of(tmp_path / "run")
    changed = {k for k, v in tiny("convnext").state_dict().items() if not torch.equal(v, found[k])}
    assert {name.partition(".0.")[0] for name in changed} >= {"stages.3", "downsample_layers.3", "norm.weight"}
    assert all(name.startswith(("stages.3.", "downsample_layers.3.", "norm")) for name in changed)
    assert load_head(tmp_path / "run").head_info.tuned == "last:1"


def test_a_head_refuses_the_backbone_that_it_was_not_trained_on(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", "segmentation")
    tuned = train_head(config(data, tune="last:1", steps=2), tmp_path / "tuned")
    frozen = train_head(config(data, steps=2), tmp_path / "frozen")
    with pytest.raises(WeightsMismatch, match=r"trained on custom tuned with it \(last:1\), from backbone.safetensors"):
        load_head(tuned.head, backbone=tiny())
    with pytest.raises(WeightsMismatch, match=r"and this backbone is custom from .*backbone.safetensors"):
        load_head(frozen.head, backbone_weights=tmp_path / "tuned" / "backbone.safetensors")
    moved = tmp_path / "street.safetensors"
    moved.write_bytes(tuned.head.read_bytes())
    with pytest.raises(WeightsError, match=r"no backbone.safetensors lies beside it; pass it as backbone_weights"):
        load_head(moved)
    assert load_head(moved, backbone_weights=tmp_path / "tuned").head_info.tuned == "last:1"


# ---- stopping and resuming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["lora:2", pytest.param("all", marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_same_pair(tmp_path: Path, how: str) -> None:
    # the best pair comes before the kill, so that it has to be found again
    wanted = config(folder(tmp_path / "data", "segmentation"), tune=how, tune_lr=1e-3, steps=6, save_every=2)
    wanted.evaluate_every = 3
    whole = train_head(wanted, tmp_path / "whole")
    with stopped_at(5):
        train_head(wanted, tmp_path / "torn")
    torn = train_head(wanted, tmp_path / "torn")
    assert torn.report.resumed_at == 4
    assert torn.head.read_bytes() == whole.head.read_bytes()
    one, other = backbone_of(tmp_path / "whole"), backbone_of(tmp_path / "torn")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert fingerprint(one) != fingerprint(tiny())
    with pytest.raises(DinoError, match="was started with tune="):
        train_head(config(tmp_path / "data", tune="last:1"), tmp_path / "torn")


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "sentence"),
    [("lara", "did you mean 'lora'"), ("lora:0", "such as lora:8 or last:2, not 'lora:0'"), ("last", "not 'last'"),
     ("all:3", "not 'all:3'"), ("last:9", "last:9 is more than the 4 blocks of the backbone: --tune all")],
)  # fmt: skip
def test_what_cannot_be_tuned_is_refused_in_a_sentence(tmp_path: Path, how: str, sentence: str) -> None:
    with pytest.raises(DinoError, match=sentence):
        train_head(config(folder(tmp_path / "data", "segmentation"), tune=how), tmp_path / "run")


def test_other_libraries_and_quantised_backbones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder(tmp_path / "data", "segmentation")
    for model, sentence in ((nn.Identity(), "of another library"), (quantise(tiny(), "int8"), "these are quantised")):
        monkeypatch.setattr(head_module, "load_backbone", lambda config, model=model: model)
        with pytest.raises(DinoError, match=sentence):
            train_head(config(data, tune="lora"), tmp_path / "run")


# ---- as a command ----------------------------------------------------------------------------------------------------


def test_the_verb_leaves_a_pair_that_the_other_verbs_take_by_its_run(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from dinov3.cli import app

    data, run = folder(tmp_path / "data", "classification"), str(tmp_path / "run")
    command = ["train-head", "classification", str(data), "--out", run, "--tune", "lora:2", "--size", "32"]
    made = subprocess.run(
        [sys.executable, "-m", "dinov3", *command, "--steps", "1", "--batch", "2", "--device", "cpu"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == f"{run}/head.safetensors"
    assert "backbone.safetensors: the tuned backbone, dinov3_vitt16_own@" in made.stderr
    shown = CliRunner().invoke(app, ["classify", str(data / "a"), "--head", run, "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert "dinov3_vitt16_own tuned with it (lora:2), from backbone.safetensors" in shown.stderr


@pytest.mark.slow
def test_a_tuned_pair_is_exported_by_its_run(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from dinov3.cli.models import _model as named
    from dinov3.export.graph import export

    train_head(config(folder(tmp_path / "data", "segmentation"), tune="lora:2", tune_lr=1e-2), tmp_path / "run")
    model = named(str(tmp_path / "run"), None, None)  # as `dinov3 export RUN` opens it
    facts = export(model, tmp_path / "onnx", "onnx")
    assert facts["fingerprint"] == model.head_info.fingerprint != fingerprint(tiny())
    assert max(row["max"] for place in facts["parity"] for row in place["outputs"].values()) < 1e-5
