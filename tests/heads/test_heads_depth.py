"""Depth heads: recorded numbers, published key lists, gradients, plain re-statements."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from golden_cases import Case
from paths import KEYS
from torch import Tensor
from toy_models import tiny_vit

from dinov3.errors import DinoError, UnknownName
from dinov3.heads.dpt import BINS, CHMV2, NORMS, SYNTHMIX, DPTHead, FeaturesToDepth, bin_centres, build_depther
from dinov3.heads.linear import LinearDepthHead
from dinov3.models.architectures import ConvNeXtConfig, ViTConfig
from dinov3.models.build import backbone
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vit import VisionTransformer

SMALL: dict[str, Any] = {"channels": 8, "post_process_channels": (4, 6, 8, 10), "n_output_channels": 6}


def tiny() -> VisionTransformer:
    return tiny_vit(embed_dim=16).train()


@pytest.mark.parametrize("name", ["depther_dpt", "depther_chmv2", "depther_linear"])
@torch.no_grad()
def test_depthers_give_the_recorded_numbers(name: str) -> None:
    case = Case(name)
    vit = VisionTransformer(ViTConfig.of(**case.config["backbone"]))
    model = build_depther(vit, **case.config["depther"]).eval()
    case.fill(model)
    for size in ("even", "odd"):
        x = case.input(size)
        levels = model.encoder(x)
        if size == "odd":
            case.compare("odd.feat0", levels[0][0])
            case.compare("odd.cls0", levels[0][1])
        case.compare(f"{size}.head", model.decoder(levels))
        case.compare(f"{size}.depth", model(x))
        if f"{size}.predict" in case.golden:
            h, w = case.spec["outputs"][f"{size}.predict"]["shape"][-2:]
            case.compare(f"{size}.predict", model.decoder.predict(levels, (h, w)))
    case.all_checked()


def test_all_bins_and_norms_give_the_recorded_depths() -> None:
    case = Case("features_to_depth")
    lo, hi, x = case.config["min_depth"], case.config["max_depth"], case.input("logits")
    for bins in BINS:
        for norm in NORMS:
            case.compare(f"{bins}.{norm}", FeaturesToDepth(lo, hi, bins=bins, norm=norm)(x))
    mixlog = FeaturesToDepth(lo, 96.0, bins="chmv2_mixlog", norm="chmv2_mixlog")
    case.compare("allneg.chmv2_mixlog.chmv2_mixlog", mixlog(-x.abs()))
    case.compare("regression", FeaturesToDepth(lo, hi)(case.input("reg")))
    case.compare("bins.chmv2_mixlog.256", bin_centres("chmv2_mixlog", 256, 0.001, 96.0))
    case.all_checked()


@pytest.mark.parametrize(
    ("bins", "norm", "expected"),
    [
        ("linear", "linear", 7.451235),
        ("linear", "softmax", 6.952375),
        ("linear", "sigmoid", 6.237461),
        ("log", "linear", 3.522644),
        ("log", "softmax", 2.669616),
        ("log", "sigmoid", 3.247004),
    ],
)
def test_four_channels_by_hand(bins: str, norm: str, expected: float) -> None:
    x = torch.tensor([-1.0, 0.0, 2.0, 1.0]).view(1, 4, 1, 1)
    assert FeaturesToDepth(0.001, 10, bins=bins, norm=norm)(x).item() == pytest.approx(expected, abs=1e-5)


def test_canopy_heights_by_hand() -> None:
    mixlog = FeaturesToDepth(0.001, 96, bins="chmv2_mixlog", norm="chmv2_mixlog")
    x = torch.tensor([-1.0, 0.0, 2.0, 1.0]).view(1, 4, 1, 1)
    assert mixlog(x).item() == pytest.approx(61.377449, abs=1e-4)
    assert mixlog(-x.abs()).item() == pytest.approx(37.716179, abs=1e-4)
    centres = bin_centres("chmv2_mixlog", 256, 0.001, 96)
    assert centres[[0, 128, 255]].tolist() == pytest.approx([0.001, 3.079397, 12.0], abs=1e-5)
    assert (centres.diff() > 0).all()


@pytest.mark.parametrize(
    ("file", "name", "options"),
    [("head_vit7b16_dd", "dinov3_vit7b16", SYNTHMIX), ("head_vitl16_chmv2", "dinov3_vitl16_sat493m", CHMV2)],
)
def test_published_heads_have_the_published_keys_shapes_and_size(file: str, name: str, options: dict) -> None:
    from dinov3.weights.catalog import resolve

    recorded = json.loads((KEYS / f"{file}.json").read_text())
    with torch.device("meta"):
        model = build_depther(backbone(resolve(name)[0].config), **options)
    state = model.decoder.state_dict()
    assert {k: (list(v.shape), str(v.dtype)) for k, v in state.items()} == {
        k: (shape, f"torch.{dtype}") for k, (shape, dtype) in recorded["state_dict"].items()
    }
    assert len(state) == recorded["n_keys"]
    assert sum(p.numel() for p in model.decoder.parameters()) == recorded["n_parameters"]
    assert model.encoder.layers == ([9, 19, 29, 39] if "7b" in file else [5, 11, 17, 23])


# ---- what must hold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"head_type": "dpt", "use_batchnorm": True, **SMALL},
        {"head_type": "dpt", "readout": "add", "projection_after_fusion": False, **SMALL},
        {"head_type": "dpt", "use_cls_token": True, "use_bias": True, **SMALL},
        {"head_type": "dpt", **SMALL | {"n_output_channels": 1}},
        {"head_type": "linear", "use_batchnorm": True, "use_cls_token": True, "n_output_channels": 6},
        {"head_type": "linear", "n_output_channels": 6, "backbone_out_layers": "LAST", "norm_strategy": "softmax"},
    ],
    ids=["dpt-bn", "dpt-add", "dpt-project", "dpt-regression", "linear-cls", "linear-last"],
)
def test_every_parameter_of_a_head_gets_a_gradient_in_training(options: dict) -> None:
    model = build_depther(tiny(), **options)
    torch.manual_seed(0)
    model.decoder.init_weights()
    model.train()
    depth = model(torch.randn(2, 3, 64, 64))
    if options["n_output_channels"] == 1:  # a relu may be closed everywhere: the channel itself is what must be reached
        depth = model.decoder(model.encoder(torch.randn(2, 3, 64, 64)))
    (depth * torch.randn(depth.shape)).sum().backward()
    without = [n for n, p in model.decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert all(p.grad is None for p in model.encoder.parameters())


@pytest.mark.parametrize(("size", "seen"), [((32, 64), (32, 64)), ((45, 60), (64, 64)), ((33, 33), (64, 64))])
def test_depth_covers_the_padded_image_and_in_image_exactly_the_image(size, seen) -> None:
    model = build_depther(tiny(), head_type="dpt", **SMALL).eval()
    x = torch.randn(1, 3, *size)
    assert model(x).shape == (1, 1, *seen)
    assert model.in_image(x).shape == (1, 1, *size)
    assert not model.in_image(x).requires_grad


def test_in_image_of_a_multiple_of_the_patch_is_the_prediction_itself() -> None:
    model = build_depther(tiny(), head_type="dpt", **SMALL).eval()
    x = torch.randn(1, 3, 32, 64)
    assert torch.equal(model(x), model.in_image(x))


def test_convnext_needs_one_grid_for_dpt_and_none_for_linear() -> None:
    def convnext(patch_size: int | None) -> ConvNeXt:
        config = ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), patch_size=patch_size)
        model = ConvNeXt(config)
        model.init_weights()
        return model

    x = torch.randn(1, 3, 40, 60)
    assert build_depther(convnext(16), head_type="dpt", **SMALL).eval()(x).shape == (1, 1, 64, 64)
    with pytest.raises(DinoError, match="build the ConvNeXt with patch_size=16"):
        build_depther(convnext(None), head_type="dpt", **SMALL)(x)
    linear = build_depther(convnext(None), head_type="linear", use_cls_token=True).eval()
    assert linear(x).shape == (1, 1, 16, 16)
    assert linear.in_image(x).shape == (1, 1, 40, 60)


def test_low_precision_is_an_option_and_depth_stays_float32() -> None:
    torch.manual_seed(0)
    model = build_depther(tiny(), head_type="dpt", **SMALL).eval()
    x = torch.randn(1, 3, 32, 32)
    plain = model(x)
    model.autocast_dtype = torch.bfloat16
    low = model(x)
    assert plain.dtype == low.dtype == torch.float32
    assert not torch.equal(plain, low)
    torch.testing.assert_close(plain, low, rtol=0.05, atol=0)
    logits = 10 * torch.randn(1, 64, 4, 4).bfloat16()
    to_depth = FeaturesToDepth(0.001, 100.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(to_depth(logits), to_depth(logits.float()))


def test_weights_are_between_the_nearest_and_the_farthest_bin() -> None:
    x = 5 * torch.randn(2, 16, 8, 8)
    for bins, norm in (("linear", "linear"), ("log", "softmax"), ("log", "sigmoid"), ("chmv2_mixlog", "chmv2_mixlog")):
        depth = FeaturesToDepth(0.5, 40.0, bins=bins, norm=norm)(x)
        assert depth.min() >= 0.5 - 1e-4
        assert depth.max() <= 40.0 + 1e-4


@torch.no_grad()
def test_the_projecting_readout_is_the_plain_one_per_patch() -> None:
    torch.manual_seed(0)
    head = DPTHead([4] * 4, readout="project", **SMALL).eval()
    patches, cls = torch.randn(1, 4, 2, 3), torch.randn(1, 4)
    read = head.reassemble_blocks.read(2, patches, cls)
    linear = head.reassemble_blocks.readout_projects[2][0]
    for i in range(2):
        for j in range(3):
            z = linear(torch.cat([patches[0, :, i, j], cls[0]]))
            gelu = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
            torch.testing.assert_close(read[0, :, i, j], gelu)


def test_the_linear_head_appends_cls_to_every_level() -> None:
    head = LinearDepthHead([2, 3], 4, use_batchnorm=False, use_cls_token=True)
    levels: list[tuple[Tensor, Tensor]] = [
        (torch.full((1, 2, 2, 2), 1.0), torch.full((1, 2), 2.0)),
        (torch.full((1, 3, 1, 1), 3.0), torch.full((1, 3), 4.0)),
    ]
    seen = head.concatenated(levels)[0, :, 1, 0].tolist()
    assert seen == [1, 1, 2, 2, 3, 3, 3, 4, 4, 4]
    with pytest.raises(DinoError, match="must be a pair"):
        head([m for m, _ in levels])


def test_errors_are_one_sentence() -> None:
    with pytest.raises(UnknownName, match="did you mean 'linear'"):
        FeaturesToDepth(0.1, 1.0, bins="linaer")
    with pytest.raises(UnknownName, match="norm is one of"):
        FeaturesToDepth(0.1, 1.0, norm="none")
    with pytest.raises(DinoError, match="no range"):
        FeaturesToDepth(2.0, 1.0)
    with pytest.raises(UnknownName, match="did you mean 'project'"):
        DPTHead([4] * 4, readout="projekt")
    with pytest.raises(UnknownName, match="head_type"):
        build_depther(tiny(), head_type="dtp")
    with pytest.raises(DinoError, match="built for 4 layers of the backbone and was given 1"):
        build_depther(tiny(), head_type="dpt", backbone_out_layers="LAST", **SMALL)
    with pytest.raises(DinoError, match=r"expects \[4, 4, 4, 4\] channels, got \[5, 4, 4, 4\]"):
        DPTHead([4] * 4, **SMALL)([(torch.zeros(1, w, 2, 2), torch.zeros(1, w)) for w in (5, 4, 4, 4)])
