"""Head files: a small file that finds its backbone again, and says in one sentence when it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_models import tiny_vit

from dinov3.data.transforms.inputs import Preprocessing
from dinov3.drawing import palette
from dinov3.errors import DinoError, WeightsError, WeightsMismatch
from dinov3.fit import backbones_in, head_tensors
from dinov3.hub import load, own_heads
from dinov3.hub.own_heads import build_head, load_head, read_head_info, save_head
from dinov3.models.architectures import ConvNeXtConfig
from dinov3.models.convnext import ConvNeXt

TINY: dict[str, dict[str, Any]] = {
    "classification linear": {},
    "segmentation linear": {"backbone_out_layers": "LAST"},
    "segmentation mask2former": {"hidden_dim": 32, "ffn": 64, "n_queries": 5, "decoder_layers": 3, "pixel_layers": 1},
    "depth linear": {"n_output_channels": 8},
    "depth dpt": {"channels": 8, "post_process_channels": (4, 6, 8, 10), "n_output_channels": 8},
    "detection detr": {"width": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn": 32, "n_queries": 5},
}


def answer(model: nn.Module) -> Any:
    x = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    model.eval()
    with torch.no_grad():
        return model([x[0]]) if hasattr(model, "detector") else model(x)


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in (value.values() if isinstance(value, dict) else value) for t in flat(v)]


@pytest.mark.parametrize("kind", TINY)
def test_a_saved_head_answers_as_before_and_holds_no_backbone(tmp_path: Path, kind: str) -> None:
    task, head = kind.split()
    vit = tiny_vit()
    options = TINY[kind] | ({} if task == "depth" else {"n_classes": 3})
    torch.manual_seed(1)
    model = build_head(task, head, vit, **options)
    with torch.no_grad():  # a head that answers something else than fresh ones do
        for tensor in head_tensors(model).values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.rand_like(tensor))
    path = save_head(
        tmp_path / "head.safetensors", model, task=task, head=head, options=options, metrics={"score": 0.5},
        class_names=None if task == "depth" else ["cat", "dog", "fish"], preprocessing=Preprocessing(size=64), steps=7,
    )  # fmt: skip
    again: Any = load_head(path, backbone=tiny_vit())
    assert not again.training
    for a, b in zip(flat(answer(model)), flat(answer(again)), strict=True):
        assert torch.equal(a, b)
    tensors, _ = own_heads._opened(path)
    assert not any("blocks" in k or "patch_embed" in k for k in tensors if "backbone" in k)
    head_bytes = sum(t.numel() * t.element_size() for t in head_tensors(model).values())
    assert path.stat().st_size < head_bytes + 60_000
    info = again.head_info
    assert (info.task, info.head, info.metrics, info.steps) == (task, head, {"score": 0.5}, 7)
    assert info.preprocessing == Preprocessing(size=64)
    assert info.class_names == (() if task == "depth" else ("cat", "dog", "fish"))
    assert info.layers == {"classification": ()}.get(task, (3,) if kind == "segmentation linear" else (0, 1, 2, 3))
    assert read_head_info(path) == info
    only_head = [n for n, p in again.named_parameters() if p.requires_grad]
    assert only_head
    assert not any(n.startswith(f"{name}.") for n in only_head for name in backbones_in(again))


def test_another_backbone_is_refused_in_one_sentence_that_names_both(tmp_path: Path) -> None:
    model = build_head("segmentation", "linear", load("dinov3_vitt16"), n_classes=2)
    path = save_head(tmp_path / "h.safetensors", model, task="segmentation", head="linear", options={"n_classes": 2})
    loaded: Any = load_head(path)  # the small model that comes along is found by its name
    assert loaded.head_info.backbone == loaded.origin.name
    with pytest.raises(WeightsMismatch) as said:
        load_head(path, backbone=load("dinov3_vitt16", "random", seed=3))
    text = str(said.value)
    assert text.count("dinov3_vitt16") >= 2
    assert "random (seed 3)" in text
    assert loaded.head_info.fingerprint in text
    assert "\n" not in text


def test_random_backbones_are_drawn_again(tmp_path: Path) -> None:
    model = build_head("classification", "linear", load("dinov3_vitt16", "random", seed=5), n_classes=2)
    path = save_head(tmp_path / "h.safetensors", model, task="classification", head="linear", options={"n_classes": 2})
    assert torch.equal(answer(model), answer(load_head(path)))


def test_a_backbone_from_a_file_is_asked_for_by_its_name_without_the_folder(tmp_path: Path) -> None:
    from dinov3.weights import writing

    vit = load("dinov3_vitt16", "random", seed=1)
    mine = writing.save(vit, tmp_path / "secret" / "mine.safetensors")
    model = build_head("classification", "linear", load(None, mine), n_classes=2)
    path = save_head(tmp_path / "h.safetensors", model, task="classification", head="linear", options={"n_classes": 2})
    assert "secret" not in own_heads.read_head_info(path).to_json()
    assert torch.equal(answer(model), answer(load_head(path, backbone_weights=mine)))
    with pytest.raises(WeightsError, match=r"trained on .*from mine.safetensors \(fingerprint \w{16}\)"):
        load_head(path)


def test_a_convnext_keeps_the_grid_its_head_was_built_for(tmp_path: Path) -> None:
    small = ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), patch_size=16)
    torch.manual_seed(0)
    convnext = ConvNeXt(small)
    convnext.init_weights()
    model = build_head("depth", "dpt", convnext.eval(), **TINY["depth dpt"])
    path = save_head(tmp_path / "h.safetensors", model, task="depth", head="dpt", options=TINY["depth dpt"])
    assert read_head_info(path).backbone_options == {"patch_size": 16}
    assert torch.equal(answer(model), answer(load_head(path, backbone=convnext)))


@pytest.mark.parametrize(
    "task, head, says",
    [
        ("segmentation", "mask2fomer", "did you mean 'mask2former'"),
        ("depth", "detr", "detr is a head for detection; depth has linear and dpt"),
        ("segmentaton", "linear", "the task is one of .*, not 'segmentaton'; did you mean 'segmentation'"),
    ],
)
def test_a_wrong_kind_is_told(task: str, head: str, says: str) -> None:
    with pytest.raises(DinoError, match=says):
        build_head(task, head, tiny_vit(), n_classes=2)


def test_options_and_classes_that_are_wrong_are_told() -> None:
    with pytest.raises(DinoError, match="no option 'dropoot'"):
        build_head("segmentation", "linear", tiny_vit(), n_classes=2, dropoot=0.1)
    with pytest.raises(DinoError, match="no option 'n_queres'; did you mean 'n_queries'"):
        build_head("detection", "detr", tiny_vit(), n_classes=2, n_queres=3)
    with pytest.raises(DinoError, match="needs n_classes"):
        build_head("segmentation", "linear", tiny_vit())
    with pytest.raises(DinoError, match="has no classes"):
        build_head("depth", "linear", tiny_vit(), n_classes=2)


def test_what_is_no_head_file_is_told(tmp_path: Path) -> None:
    from dinov3.weights import catalog

    with pytest.raises(WeightsError, match="no head file"):
        load_head(tmp_path / "nothing.safetensors")
    packaged = catalog.resolve("dinov3_vitt16")[0].packaged_path
    with pytest.raises(WeightsError, match="backbones by dinov3"):
        load_head(str(packaged))


def test_colours_of_many_classes_differ() -> None:
    assert len(set(palette(150))) == 150
    assert palette(3) == palette(150)[:3]


def test_a_head_in_half_precision_keeps_the_backbones_rope_periods(tmp_path: Path) -> None:
    model = build_head("classification", "linear", tiny_vit(), n_classes=3)
    path = save_head(tmp_path / "h.safetensors", model, task="classification", head="linear", options={"n_classes": 3})
    backbone = tiny_vit()
    periods = backbone.rope_embed.periods.clone()
    loaded: Any = load_head(path, backbone=backbone, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert not torch.equal(periods, periods.bfloat16().float())  # or nothing is tested
    assert torch.equal(backbone.rope_embed.periods, periods)
