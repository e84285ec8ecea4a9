"""Head functions of torch.hub: published addresses and keys, recorded numbers through files, transformers' CHMv2."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import Case
from paths import KEYS, ROOT

import hubconf
from dinov3 import hub
from dinov3.errors import DinoError, UnknownName, WeightsMismatch
from dinov3.heads.dpt import build_depther
from dinov3.heads.linear import LinearClassifier
from dinov3.hub import HEADS, published_heads
from dinov3.hub.backbones import Weights
from dinov3.models.architectures import ViTConfig
from dinov3.models.vit import VisionTransformer
from dinov3.weights import catalog


def stand_ins(config: Any) -> dict[str, torch.Tensor]:
    """A state dict of a backbone's shapes that takes no room."""
    with torch.device("meta"):
        backbone = VisionTransformer(config)
    return {k: torch.ones(1).expand(v.shape) for k, v in backbone.state_dict().items()}


def published_keys(name: str) -> dict[str, torch.Tensor]:
    recorded = json.loads((KEYS / f"head_{name}.json").read_text())["state_dict"]
    return {k: torch.full((), 2.0, dtype=getattr(torch, d)).expand(shape) for k, (shape, d) in recorded.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The published addresses as folders, with files of the published shapes."""
    root = tmp_path_factory.mktemp("base")
    for name, key in (
        ("dinov3_vit7b16_lc", "vit7b16_lc"),
        ("dinov3_vit7b16_dd", "vit7b16_dd"),
        ("dinov3_vitl16_chmv2", "vitl16_chmv2"),
    ):
        head = HEADS[name]
        (row,) = [row for row in catalog.ROWS if row.id == head.backbone]
        for file in (f"{row.arch}/{row.file}", head.file):
            (root / file).parent.mkdir(exist_ok=True)
        torch.save(stand_ins(row.config), root / row.arch / row.file)
        torch.save(published_keys(key), root / head.file)
    return root


@pytest.mark.parametrize("name", ["dinov3_vit7b16_lc", "dinov3_vit7b16_dd", "dinov3_vitl16_chmv2"])
def test_torch_hub_finds_both_files_at_the_published_addresses(name: str, base: Path, monkeypatch) -> None:
    monkeypatch.setenv("DINOV3_DOWNLOAD_BASE", base.as_uri())
    model = torch.hub.load(str(ROOT), name, source="local")
    assert not any(module.training for module in model.modules())
    head = model.linear_head if name.endswith("lc") else model.decoder
    assert all((p == 2).all() for p in list(head.parameters())[-2:])  # the head file's twos
    vit = model.backbone if name.endswith("lc") else model.encoder.backbone
    assert vit.cls_token.all()  # the backbone file's ones
    # the depth heads' backbones are frozen, the classifier's is not, as in the reference
    assert {p.requires_grad for p in vit.parameters()} == {name.endswith("lc")}
    assert all(p.requires_grad for p in head.parameters())
    assert model.origin.name == name
    assert model.origin.mean == ((0.420, 0.411, 0.296) if "chm" in name else (0.485, 0.456, 0.406))
    with pytest.raises(DinoError, match="promised by its name"):
        torch.hub.load(str(ROOT), name, source="local", check_hash=True)
    with pytest.raises(DinoError, match="promised by its name"):
        published_heads.read(HEADS[name].url, check_hash=True)


def test_every_row_of_the_table_that_is_there_is_what_torch_hub_sees() -> None:
    for name, row in HEADS.items():
        if row.task in ("classify", "depth", "canopy", "text"):
            assert getattr(hubconf, name) is row.function
            assert name in hubconf.__all__
    with pytest.raises(UnknownName, match="did you mean 'dinov3_vit7b16_dd'"):
        hub.head("dinov3_vitb16_dd")


def test_arguments_have_the_published_names_and_kinds() -> None:
    kinds = inspect.Parameter
    common = ["pretrained", "weights", "backbone_weights", "check_hash"]
    for function in (hubconf.dinov3_vit7b16_lc, hubconf.dinov3_vit7b16_dd, hubconf.dinov3_vitl16_chmv2):
        parameters = inspect.signature(function).parameters
        assert list(parameters)[:4] == common
        positional = function is hubconf.dinov3_vitl16_chmv2
        assert (parameters["weights"].kind is kinds.POSITIONAL_OR_KEYWORD) == positional
    assert [m.name for m in hubconf.DepthWeights] == ["SYNTHMIX", "CHMV2"]
    assert [m.name for m in hubconf.ClassifierWeights] == ["IMAGENET1K"]
    assert inspect.signature(hubconf.dinov3_vit7b16_dd).parameters["autocast_dtype"].default is torch.float32
    assert inspect.signature(hubconf.dinov3_vitl16_chmv2).parameters["backbone_weights"].default is Weights.SAT493M


# ---- small models through real files -------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """The published names stand for a small backbone and small heads."""

    def use(config: dict[str, Any], options: dict[str, Any] | None = None) -> None:
        def rows(name: str) -> tuple[catalog.Row, ...]:
            dataset = ("sat493m", "lvd1689m") if "vitl16" in name else ("lvd1689m",)
            return tuple(catalog.Row(name, d, ViTConfig.of(**config), 1, None) for d in dataset)

        monkeypatch.setattr(catalog, "resolve", rows)
        if options is not None:
            for key in list(published_heads.OPTIONS):
                if "_lc" not in key[0]:
                    monkeypatch.setitem(published_heads.OPTIONS, key, options)

    return use


@torch.no_grad()
def test_depth_from_two_files_gives_the_recorded_numbers(small, tmp_path: Path) -> None:
    for name, function in (("depther_dpt", hubconf.dinov3_vit7b16_dd), ("depther_chmv2", hubconf.dinov3_vitl16_chmv2)):
        case = Case(name)
        vit = VisionTransformer(ViTConfig.of(**case.config["backbone"]))
        model = build_depther(vit, **case.config["depther"]).eval()
        case.fill(model)
        torch.save(vit.state_dict(), tmp_path / "backbone.pth")
        torch.save(model.decoder.state_dict(), tmp_path / "head.pth")
        small(case.config["backbone"], case.config["depther"])
        loaded = function(weights=str(tmp_path / "head.pth"), backbone_weights=str(tmp_path / "backbone.pth"))
        for size in ("even", "odd"):
            case.compare(f"{size}.depth", loaded(case.input(size)))
        assert "head.pth over" in loaded.origin.source
        half = function(
            weights=str(tmp_path / "head.pth"), backbone_weights=str(tmp_path / "backbone.pth"), dtype=torch.bfloat16
        )
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert half(case.input("even")).dtype == torch.float32
        assert half.encoder.backbone.rope_embed.periods.dtype == torch.float32


TINY = {"embed_dim": 64, "depth": 4, "num_heads": 1, "n_storage_tokens": 1, "mask_k_bias": True}
HEAD = {"channels": 8, "post_process_channels": (4, 6, 8, 10), "n_output_channels": 6}


@torch.no_grad()
def test_the_linear_classifier_gives_the_recorded_logits(small, tmp_path: Path, monkeypatch) -> None:
    case = Case("linear_classifier")
    c = case.config
    n_classes = next(r["shape"][0] for r in case.spec["state_dict"] if r["key"] == "linear_head.weight")
    vit = VisionTransformer(ViTConfig.of(**c.get("backbone", c)))
    model = LinearClassifier(vit, torch.nn.Linear(2 * vit.embed_dim, n_classes)).eval()
    case.fill(model)
    torch.save(vit.state_dict(), tmp_path / "backbone.pth")
    torch.save(model.linear_head.state_dict(), tmp_path / "head.pth")
    small(c.get("backbone", c))
    monkeypatch.setattr(published_heads, "N_CLASSES", n_classes)
    files = {"weights": str(tmp_path / "head.pth"), "backbone_weights": str(tmp_path / "backbone.pth")}
    loaded = hubconf.dinov3_vit7b16_lc(**files)
    (name,) = case.spec["inputs"]
    (out,) = case.golden
    case.compare(out, loaded(case.input(name)))
    monkeypatch.setattr(published_heads, "N_CLASSES", n_classes + 1)
    with pytest.raises(WeightsMismatch, match=rf"weight: \({n_classes}, .*in the file"):
        hubconf.dinov3_vit7b16_lc(**files)


def test_fresh_weights_need_no_file(small) -> None:
    small(TINY, HEAD | {"head_type": "dpt"})
    x = torch.zeros(1, 3, 32, 32)
    model = hubconf.dinov3_vit7b16_dd(pretrained=False)
    assert model.origin.random
    assert model(x).shape == (1, 1, 32, 32)
    assert hubconf.dinov3_vit7b16_lc(pretrained=False)(x).shape == (1, 1000)
    assert not torch.equal(
        model.decoder.convs[0].conv.weight, hubconf.dinov3_vit7b16_dd(pretrained=False).decoder.convs[0].conv.weight
    )


def test_a_wrong_file_is_refused_in_a_few_lines(small, tmp_path: Path) -> None:
    small(TINY, HEAD | {"head_type": "dpt"})
    right = hubconf.dinov3_vit7b16_dd(pretrained=False)
    backbone = str(tmp_path / "backbone.pth")
    torch.save(right.encoder.backbone.state_dict(), backbone)

    def load(state: dict, name: str = "head.pth", **options: Any) -> Any:
        torch.save(state, tmp_path / name)
        return hubconf.dinov3_vit7b16_dd(weights=str(tmp_path / name), backbone_weights=backbone, **options)

    state = right.decoder.state_dict()
    load(state)
    assert "taken off" in load({f"module.{k}": v for k, v in state.items()}).origin.notes[0]
    with pytest.raises(WeightsMismatch, match=r"missing in the file: project\.conv\.bias"):
        load({k: v for k, v in state.items() if k != "project.conv.bias"})
    with pytest.raises(WeightsMismatch, match="not in the model: extra"):
        load(state | {"extra": torch.zeros(1)})
    with pytest.raises(WeightsMismatch, match="pass it as backbone_weights"):
        load(right.encoder.backbone.state_dict())
    with pytest.raises(UnknownName, match="trained on SYNTHMIX, not CHMV2"):
        hubconf.dinov3_vit7b16_dd(weights=hubconf.DepthWeights.CHMV2, backbone_weights=backbone)
    with pytest.raises(UnknownName, match="colour"):
        load(state, colour="red")
    with pytest.raises(UnknownName, match="stands on dinov3_vitl16, not on"):
        published_heads.load_published(
            "dinov3_vitl16_chmv2", published_heads.Files(pretrained=False), {}, arch="dinov3_vit7b16"
        )


# ---- transformers --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_canopy_height_from_transformers_equals_transformers(oracles, small, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CHMv2Config(
        backbone_config={
            "model_type": "dinov3_vit",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 1,
            "num_hidden_layers": 4,
            "num_register_tokens": 2,
            "out_indices": [1, 2, 3, 4],
            "reshape_hidden_states": True,
            "apply_layernorm": True,
            "return_class_token": True,
        },
        post_process_channels=[4, 6, 8, 10],
        fusion_hidden_size=8,
        head_hidden_size=4,
        number_output_channels=16,
    )
    theirs = transformers.CHMv2ForDepthEstimation(config).eval()
    for p in theirs.parameters():
        p.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "chm")
    tiny = {"embed_dim": 64, "depth": 4, "num_heads": 1, "n_storage_tokens": 2, "ffn_ratio": 2.0, "mask_k_bias": True}
    small(tiny | {"layerscale_init": 1.0, "norm_layer": "layernormbf16"})
    ours = hubconf.dinov3_vitl16_chmv2(weights=str(tmp_path / "chm"))
    assert any("same file as the head" in note for note in ours.origin.notes)
    assert ours.encoder.layers == [0, 1, 2, 3]
    # in float64: large random weights amplify the last bits, differently on every CPU (RoPE tables stay float32 in theirs)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected = theirs.double()(pixel_values=x).predicted_depth  # [B, H, W]
    depth = ours.double()(x)[:, 0]
    assert depth.shape == expected.shape
    assert expected.std() > 0.1
    torch.testing.assert_close(depth, expected, atol=1e-3, rtol=1e-4)
