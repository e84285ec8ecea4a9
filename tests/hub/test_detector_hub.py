"""`dinov3_vit7b16_de`: published address, recorded numbers through files, what a head's file may lack or hold beside."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import Case
from paths import ROOT

import hubconf
from dinov3.data import names
from dinov3.errors import UnknownName, WeightsMismatch
from dinov3.hub import HEADS, published_heads
from dinov3.models.architectures import ViTConfig
from dinov3.models.vit import VisionTransformer
from dinov3.weights import catalog
from tests.heads.test_detector import of_case


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    """The published name stands for the recorded small detector."""
    case = Case("detector")
    config = of_case(case).detector.config
    row = (catalog.Row("dinov3_vit7b16", "lvd1689m", ViTConfig.of(**case.config["backbone"]), 1, None),)
    monkeypatch.setattr(catalog, "resolve", lambda name: row)
    monkeypatch.setitem(published_heads.OPTIONS, ("dinov3_vit7b16_de", "dinov3_vit7b16"), vars(config))
    return case


def files(case: Case, folder: Path, change: Any = lambda state: state) -> dict[str, str]:
    """The two files as published: the head without its backbone under "model", the backbone alone."""
    vit = VisionTransformer(ViTConfig.of(**case.config["backbone"]))
    detector = of_case(case).detector
    case.fill(detector)
    vit.load_state_dict(detector.frozen.state_dict())
    torch.save(vit.state_dict(), folder / "backbone.pth")
    state = {k: v for k, v in detector.state_dict().items() if not k.startswith(detector.backbone_key)}
    torch.save({"model": change(state)}, folder / "head.pth")
    return {"weights": str(folder / "head.pth"), "backbone_weights": str(folder / "backbone.pth")}


@torch.no_grad()
def test_a_detector_from_two_files_gives_the_recorded_numbers(case: Case, tmp_path: Path) -> None:
    given = files(case, tmp_path)
    model = torch.hub.load(str(ROOT), "dinov3_vit7b16_de", source="local", **given)
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.detector.frozen.parameters())
    for i, found in enumerate(model([case.input("a"), case.input("b")])):
        for key, value in found.items():
            case.compare(f"post.{i}.{key}", value)
    assert (model.origin.name, model.origin.mean) == ("dinov3_vit7b16_de", (0.485, 0.456, 0.406))
    assert "head.pth over" in model.origin.source
    half = hubconf.dinov3_vit7b16_de(**given, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.detector.frozen.rope_embed.periods.dtype == torch.float32
    assert half([case.input("a")])[0]["boxes"].dtype == torch.float32


def test_the_function_has_the_published_arguments_and_row() -> None:
    assert list(inspect.signature(hubconf.dinov3_vit7b16_de).parameters)[:4] == [
        "pretrained", "weights", "backbone_weights", "check_hash",
    ]  # fmt: skip
    assert [m.name for m in hubconf.DetectionWeights] == ["COCO2017"]
    row = HEADS["dinov3_vit7b16_de"]
    assert row.function is hubconf.dinov3_vit7b16_de
    assert row.url.endswith("/dinov3_vit7b16/dinov3_vit7b16_coco2017_detr_head-b0235ff7.pth")
    published = published_heads.OPTIONS["dinov3_vit7b16_de", "dinov3_vit7b16"]
    assert (published["n_queries"], published["windows"], published["n_classes"]) == (1500, 3, 91)
    assert published_heads.OPTIONS["dinov3_vit7b16_de", "dinov3_vitl16plus"]["windows"] == 2


@torch.no_grad()
def test_random_weights_need_no_file_and_the_published_columns_have_cocos_names(case: Case, monkeypatch) -> None:
    model = hubconf.dinov3_vit7b16_de(pretrained=False, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.origin.random
    monkeypatch.setitem(published_heads.OPTIONS["dinov3_vit7b16_de", "dinov3_vit7b16"], "n_classes", 91)
    assert hubconf.dinov3_vit7b16_de(pretrained=False).class_names == names.coco()


def test_a_head_under_one_of_its_two_names_is_complete(case: Case, tmp_path: Path) -> None:
    for copy in ("transformer.decoder.class_embed.", "class_embed."):
        given = files(case, tmp_path, lambda s, copy=copy: {k: v for k, v in s.items() if not k.startswith(copy)})
        model = hubconf.dinov3_vit7b16_de(**given)
        assert model.detector.class_embed[0].weight is model.detector.transformer.decoder.class_embed[0].weight
        assert not any("left over" in note for note in model.origin.notes)


def test_what_a_file_lacks_is_an_error_and_what_it_holds_beside_is_said(case: Case, tmp_path: Path) -> None:
    given = files(case, tmp_path, lambda s: {k: v for k, v in s.items() if "pos_trans." not in k})
    with pytest.raises(WeightsMismatch, match=r"missing in the file: transformer\.pos_trans\.bias, .*weight"):
        hubconf.dinov3_vit7b16_de(**given)
    given = files(case, tmp_path, lambda s: s | {"query_embed.weight": s["query_embed.weight"][:4]})
    with pytest.raises(WeightsMismatch, match=r"query_embed\.weight: \(4, 64\) in the file, \(24, 64\) in the model"):
        hubconf.dinov3_vit7b16_de(**given)
    given = files(case, tmp_path, lambda s: s | {"transformer.more": torch.zeros(1)})
    with pytest.warns(UserWarning, match=r"left over in .*transformer\.more"):
        model = hubconf.dinov3_vit7b16_de(**given)
    assert any("transformer.more" in note for note in model.origin.notes)
    with pytest.raises(WeightsMismatch, match="pass it as backbone_weights"):
        hubconf.dinov3_vit7b16_de(weights=given["backbone_weights"], backbone_weights=given["backbone_weights"])
    with pytest.raises(UnknownName, match="stands on"):
        published_heads.load_published(
            "dinov3_vit7b16_de", published_heads.Files(pretrained=False), {}, arch="dinov3_vits16"
        )


def test_a_backbone_in_the_heads_file_is_used_as_in_the_reference(case: Case, tmp_path: Path) -> None:
    own = "backbone.0._backbone.backbone."

    def with_backbone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        vit = torch.load(tmp_path / "backbone.pth")
        return state | {own + k: v + (1 if k == "cls_token" else 0) for k, v in vit.items()}

    given = files(case, tmp_path, with_backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = hubconf.dinov3_vit7b16_de(**given)
    before = torch.load(tmp_path / "backbone.pth")["cls_token"]
    assert torch.equal(model.detector.frozen.cls_token, before + 1)
    assert any("a backbone of its own" in note for note in model.origin.notes)
