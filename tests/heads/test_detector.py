"""The detector: recorded numbers, published key list, gradients, sizes, precision, detections."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Case
from paths import KEYS
from torch import Tensor
from toy_models import tiny_vit

from dinov3.errors import DinoError, UnknownName
from dinov3.heads.detr import (
    BoxAttention,
    DetectorWithProcessor,
    DetrConfig,
    Grid,
    PostProcess,
    build_detector,
    deltas_between,
    grid_position,
    refine,
    to_xyxy,
)
from dinov3.metrics import overlap
from dinov3.models.architectures import ConvNeXtConfig, ViTConfig
from dinov3.models.build import backbone
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vit import VisionTransformer
from dinov3.weights import catalog


def of_case(case: Case) -> DetectorWithProcessor:
    c = case.config["detection"]
    return build_detector(
        VisionTransformer(ViTConfig.of(**case.config["backbone"])),
        c["num_classes"],
        width=c["hidden_dim"],
        n_heads=c["nheads"],
        encoder_layers=c["num_encoder_layers"],
        decoder_layers=c["dec_layers"],
        decoder_ffn=c["dim_feedforward"],
        n_queries=c["num_queries_one2one"],
        n_queries_one2many=c["num_queries_one2many"],
        bias_hidden=c["decoder_rpe_hidden_dim"],
        bias_type=c["decoder_rpe_type"],
        proposal_min_size=c["proposal_min_size"],
        layers=c["layers_to_use"],
        windows=c["n_windows_sqrt"],
        layernorm=c["backbone_use_layernorm"],
        topk=c["topk"],
    ).eval()


# ---- recorded numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["detector", "detector_nowin_ln"])
@torch.no_grad()
def test_the_detector_gives_the_recorded_numbers(name: str) -> None:
    case = Case(name)
    model = of_case(case)
    case.fill(model.detector)
    images = [case.input("a"), case.input("b")]
    seen, padding, padded = model.detector.see(images)
    assert padded
    case.compare("backbone.features", seen)
    case.compare("backbone.mask", padding)
    case.compare("backbone.pos", grid_position(padding, model.detector.config.width))
    outputs = model.detector(images)
    for key in ("pred_logits", "pred_boxes", "pred_boxes_old", "pred_deltas"):
        case.compare(key, outputs[key])
        case.compare(f"enc.{key}", outputs["enc_outputs"][key])
        assert outputs[f"{key}_one2many"].shape[1] == 0
    case.compare("aux0.pred_boxes", outputs["aux_outputs"][0]["pred_boxes"])
    for i, found in enumerate(model(images)):
        for key, value in found.items():
            case.compare(f"post.{i}.{key}", value)
    case.all_checked()


def test_the_head_has_the_published_keys_at_full_size() -> None:
    listed = json.loads((KEYS / "head_vit7b16_de.json").read_text())["state_dict"]
    with torch.device("meta"):
        (row,) = catalog.resolve("dinov3_vit7b16_lvd1689m")
        model = build_detector(backbone(row.config)).detector
    assert model.backbone_key == "backbone.0._backbone.backbone."
    assert model.backbone[0]._backbone.layers == [9, 19, 29, 39]
    assert model.backbone[0].k == 3
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(model.backbone_key)}
    assert {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in state.items()} == listed


@pytest.mark.parametrize(
    ("name", "layers", "windows", "channels"),
    [
        ("dinov3_vits16", [2, 5, 8, 11], 0, 4 * 384),
        ("dinov3_vits16plus", [2, 5, 8, 11], 0, 4 * 384),
        ("dinov3_vitb16", [2, 5, 8, 11], 0, 4 * 768),
        ("dinov3_vitl16_lvd1689m", [5, 11, 17, 23], 2, 8 * 1024),
        ("dinov3_vith16plus", [7, 15, 23, 31], 2, 8 * 1280),
        ("dinov3_vit7b16_lvd1689m", [9, 19, 29, 39], 3, 8 * 4096),
        ("dinov3_convnext_tiny", [0, 1, 2, 3], 0, 96 + 192 + 384 + 768),
        ("dinov3_convnext_large", [0, 1, 2, 3], 0, 192 + 384 + 768 + 1536),
    ],
)
def test_every_backbone_gets_layers_and_windows(name: str, layers: list[int], windows: int, channels: int) -> None:
    config = catalog.resolve(name)[0].config
    if isinstance(config, ConvNeXtConfig):
        config = replace(config, patch_size=16)
    with torch.device("meta"):
        model = build_detector(backbone(config), 5).detector
    assert (list(model.config.layers), model.config.windows) == (layers, windows)
    assert model.input_proj[0][0].in_channels == channels


# ---- a small one ---------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "width": 32,
    "n_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn": 48,
    "decoder_ffn": 48,
    "n_queries": 10,
    "n_queries_one2many": 6,
    "bias_hidden": 8,
    "proposal_min_size": 12,
    "topk": 20,
}


def vit() -> VisionTransformer:
    return tiny_vit().train()


def small(n_classes: int = 3, **options: Any) -> DetectorWithProcessor:
    return build_detector(vit(), n_classes, **(SMALL | options))


def stirred(model: DetectorWithProcessor) -> DetectorWithProcessor:
    """With the box layers no longer at zero, so that boxes move."""
    with torch.no_grad():
        for mlp in model.detector.bbox_embed:
            mlp.layers[2].weight.normal_(std=0.3)
    return model


def images(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


@pytest.mark.parametrize("windows", [0, 2])
def test_gradient_reaches_every_head_parameter_and_no_backbone(windows: int) -> None:
    model = stirred(small(windows=windows, layernorm=True, proposal_min_size=8)).train()
    outputs = model.detector(images((96, 128), (80, 64)))
    total = sum(v.square().sum() for k, v in outputs.items() if k.startswith("pred_"))
    for layer in [*outputs["aux_outputs"], *outputs["aux_outputs_one2many"], outputs["enc_outputs"]]:
        total = total + layer["pred_logits"].square().sum() + layer["pred_boxes"].square().sum()
    total.backward()
    key = model.detector.backbone_key
    for name, p in model.detector.named_parameters():
        if name.startswith(key):
            assert p.grad is None, name
        else:
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


def test_training_mode_leaves_the_backbone_in_evaluation_mode() -> None:
    model = small(windows=2).train()
    assert model.detector.transformer.training
    assert not model.detector.frozen.training
    assert isinstance(model.detector.frozen, VisionTransformer)


@torch.no_grad()
def test_one_to_many_queries_answer_in_training_only_and_are_seen_by_nobody_else() -> None:
    model = stirred(small(encoder_dropout=0.0)).train()
    batch = images((96, 128))
    before = model.detector(batch)
    assert before["pred_logits"].shape == (1, 10, 3)
    assert before["pred_logits_one2many"].shape == (1, 6, 3)
    model.detector.query_embed.weight[10:] += torch.randn(6, 32)
    after = model.detector(batch)
    torch.testing.assert_close(after["pred_logits"], before["pred_logits"])
    assert not torch.allclose(after["pred_logits_one2many"], before["pred_logits_one2many"])
    assert model.eval().detector(batch)["pred_logits_one2many"].shape == (1, 0, 3)
    torch.testing.assert_close(model.detector(batch)["pred_logits"], before["pred_logits"])


@torch.no_grad()
def test_every_size_from_one_patch_up_is_seen() -> None:
    for windows in (0, 2, 3):
        model = small(windows=windows, n_queries=300).eval()
        for size in ((16, 16), (17, 100), (40, 79), (100, 111), (64, 200)):
            (found,) = model(images(size))
            assert found["boxes"].isfinite().all()
            assert (found["boxes"] >= 0).all()
            assert (found["boxes"] <= torch.tensor([size[1], size[0]] * 2)).all(), (windows, size)


@torch.no_grad()
def test_the_canvas_of_a_batch_does_not_change_positions_or_proposals() -> None:
    """An image's own positions and valid proposals are the same alone and beside a larger one."""
    alone = grid_position(torch.zeros(1, 5, 6, dtype=torch.bool), 8)
    padding = torch.ones(1, 7, 9, dtype=torch.bool)
    padding[:, :5, :6] = False
    torch.testing.assert_close(grid_position(padding, 8)[..., :5, :6], alone)
    transformer = small().detector.transformer
    _, boxes, valid, extent = transformer.proposals(
        torch.randn(1, 32, 5, 6), torch.zeros(1, 5, 6, dtype=torch.bool), 16
    )
    _, wider, there, same = transformer.proposals(torch.randn(1, 32, 7, 9), padding, 16)
    assert extent.tolist() == same.tolist() == [[[80.0, 96.0]]]
    first = {tuple(b) for b in boxes[0][valid[0]].tolist()}
    assert {tuple(b) for b in wider[0][there[0]].tolist()} == first
    assert (52.0, 36.0, 12.0, 12.0) in first
    # 12, 24, 48 and 96 pixels; 96 is no less than 0.99 times the height
    assert {b[2] for b in first} == {12.0, 24.0, 48.0}


@torch.no_grad()
def test_box_attention_is_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    for bias_type in ("linear", "abs_log8"):
        c = DetrConfig.of(**SMALL | {"bias_type": bias_type})
        attention = BoxAttention(c)
        grid, d = Grid(2, 3, 16), c.width // c.n_heads
        query, key, value = torch.randn(1, 5, 32), torch.randn(1, 6, 32), torch.randn(1, 6, 32)
        boxes = torch.rand(1, 5, 4) * 40
        padding = torch.tensor([[False, False, True, False, False, True]])
        result = attention(query, boxes, key, value, grid, padding)

        def seen(delta: Tensor, kind: str = bias_type) -> Tensor:
            return delta if kind == "linear" else delta.sign() * torch.log2(delta.abs() + 1) / 3

        expected = torch.zeros(5, 32)
        for n in range(5):
            cx, cy, w, h = boxes[0, n]
            for head in range(c.n_heads):
                part = slice(head * d, (head + 1) * d)
                scores = []
                for i in range(2):
                    for j in range(3):
                        X, Y = (j + 0.5) * 16, (i + 0.5) * 16
                        bx = attention.cpb_mlp1(seen(torch.stack([cx - w / 2 - X, cx + w / 2 - X])))[head]
                        by = attention.cpb_mlp2(seen(torch.stack([cy - h / 2 - Y, cy + h / 2 - Y])))[head]
                        q, k = attention.q(query[0, n])[part], attention.k(key[0, 3 * i + j])[part]
                        scores.append(q @ k / math.sqrt(d) + bx + by - 100 * padding[0, 3 * i + j])
                weights = torch.stack(scores).softmax(0)
                expected[n, part] = weights @ attention.v(value[0])[:, part]
        torch.testing.assert_close(result[0], attention.proj(expected))
        monkeypatch.setattr("dinov3.heads.detr.MOST_BIASES", 2 * 2 * 6)  # two queries at a time
        torch.testing.assert_close(attention(query, boxes, key, value, grid, padding), result)


@torch.no_grad()
def test_windows_are_laid_where_they_were_cut() -> None:
    """An image whose windows are constant gives maps constant in the same places, and the whole beside them."""
    model = small(windows=2).detector.backbone[0]
    assert model.sides(112) == [64, 48]
    assert model.sides(144) == [80, 64]
    x = torch.zeros(1, 3, 112, 144)
    x[..., 64:, 80:] = 1.0
    seen = model(x)
    C = model._backbone.channels
    assert seen.shape == (1, 2 * C, 7, 9)
    torch.testing.assert_close(seen[0, C:, 4:, 5:], model._backbone(torch.ones(1, 3, 48, 64))[0])
    torch.testing.assert_close(seen[0, C:, :4, :5], model._backbone(torch.zeros(1, 3, 64, 80))[0])
    whole = model._backbone(F.interpolate(x, size=(64, 80), mode="bilinear", antialias=True))
    torch.testing.assert_close(seen[:, :C], F.interpolate(whole, size=(7, 9), mode="bilinear", antialias=True))


# ---- precision ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_boxes_stay_float32_in_low_precision_and_inside_autocast() -> None:
    batch = images((96, 128), (80, 64))
    exact = small(dtype=torch.float32).eval()
    low = small(dtype=torch.bfloat16, windows=2).eval()
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    # deltas begin at zero, so boxes are proposals, whole numbers that bfloat16 would round only beyond 256
    outputs = low.detector(batch)
    assert outputs["pred_logits"].dtype == torch.bfloat16
    assert outputs["pred_boxes"].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = exact.detector(batch)
    assert inside["pred_boxes"].dtype == torch.float32
    outside = exact.detector(batch)
    assert (inside["pred_logits"].float() - outside["pred_logits"]).abs().max() < 0.2
    double = small(dtype=torch.float64).eval()
    assert double.detector(batch)["pred_logits"].dtype == torch.float64


@torch.no_grad()
def test_nothing_opens_an_autocast_region() -> None:
    model = small().eval()
    dtypes = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _m, _i, out: dtypes.add(out.dtype))
    model(images((64, 64)))
    assert dtypes == {torch.float32}


# ---- boxes and detections ------------------------------------------------------------------------------------------


def test_a_delta_moves_a_box_as_recorded_and_back() -> None:
    box, delta = torch.tensor([50.0, 40, 20, 10]), torch.tensor([0.5, -1, math.log(2), 10])
    size = torch.tensor([64.0, 96])
    assert to_xyxy(refine(box, delta, size)).tolist() == pytest.approx([40, 0, 80, 64], abs=1e-4)
    target = torch.tensor([60.0, 30, 40, 8])
    again = refine(box, deltas_between(box, target), size)
    torch.testing.assert_close(again, target)
    far = deltas_between(torch.tensor([5.0, 5, 0.001, 10]), target)
    assert far[2].item() == pytest.approx(math.log(62.5))


def test_overlap_of_known_boxes() -> None:
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1]])
    b = torch.tensor([[1.0, 1, 3, 3], [0, 0, 1, 1], [2, 0, 3, 1]])
    iou, giou = overlap(a[:, None], b[None])
    torch.testing.assert_close(iou, torch.tensor([[1 / 7, 1 / 4, 0], [0, 1, 0]]))
    torch.testing.assert_close(
        giou, torch.tensor([[1 / 7 - 2 / 9, 1 / 4, -1 / 6], [-4 / 9, 1, -1 / 3]]), atol=1e-6, rtol=0
    )


def test_post_processing_gives_the_recorded_detections() -> None:
    logits = torch.full((1, 3, 4), -5.0)
    logits[0, 1, 2], logits[0, 0, 3] = 2.0, 1.0
    boxes = torch.tensor([[[50.0, 40, 20, 20], [10, 10, 40, 30], [90, 60, 10, 10]]])
    outputs = {"pred_logits": logits, "pred_boxes": boxes}
    (found,) = PostProcess(3)(outputs, torch.tensor([[64, 96]]), torch.tensor([[128, 192]]))
    assert found["scores"].tolist() == pytest.approx([0.880797, 0.731059, 0.006693], abs=1e-6)
    assert found["labels"].tolist()[:2] == [2, 3]
    assert found["boxes"].tolist()[:2] == [[0, 0, 60, 50], [80, 60, 120, 100]]
    (all_of_them,) = PostProcess(1500)(outputs, torch.tensor([[64, 96]]))
    assert len(all_of_them["scores"]) == 12
    assert all_of_them["boxes"][0].tolist() == [0, 0, 30, 25]


@torch.no_grad()
def test_detections_have_names_a_threshold_and_the_original_images_pixels() -> None:
    model = stirred(small(class_names=["cat", "dog", "hare"])).eval()
    batch = images((64, 96), (64, 64))
    raw = model(batch)
    assert [len(r["scores"]) for r in raw] == [20, 20]
    assert all((r["scores"].diff() <= 0).all() for r in raw)
    threshold = raw[0]["scores"][4].item()
    first, second = model.detect(batch, [(128, 192), (64, 64)], score_threshold=threshold, most=7)
    assert 5 <= len(first) <= 7
    torch.testing.assert_close(first.boxes_xyxy_px, 2 * raw[0]["boxes"][: len(first)])
    torch.testing.assert_close(second.boxes_xyxy_px, raw[1]["boxes"][: len(second)])
    assert first.names == tuple(("cat", "dog", "hare")[i] for i in first.labels)
    assert len(model.detect(batch, score_threshold=1.1)[0]) == 0


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ([], "empty list"),
        ([torch.zeros(3, 64, 15)], "smaller than one patch"),
        ([torch.zeros(3, 64, 64), torch.zeros(1, 64, 64)], r"image 1 of the list is \[1, 64, 64\]"),
        ([torch.zeros(3, 64, 64, dtype=torch.uint8)], "floating"),
        ([[1, 2]], "is list"),
    ],
)
def test_a_batch_that_is_none_is_one_sentence(batch: Any, said: str) -> None:
    with pytest.raises(DinoError, match=said) as error:
        small()(batch)
    assert "\n" not in str(error.value)


def test_mistakes_in_building_are_one_sentence() -> None:
    with pytest.raises(UnknownName, match="did you mean 'n_queries'"):
        small(nqueries=3)
    with pytest.raises(UnknownName, match="bias_type is one of"):
        small(bias_type="log")
    with pytest.raises(DinoError, match="multiple of 32"):
        small(width=40)
    with pytest.raises(DinoError, match="2 per side"):
        small(windows=1)
    with pytest.raises(DinoError, match="3 classes and was given 2 names"):
        small(class_names=["a", "b"])
    with pytest.raises(DinoError, match="were requested"):
        small(layers=(1, 9))
    tiny = ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    with pytest.raises(DinoError, match="patch_size=16"):
        build_detector(ConvNeXt(tiny), 3, **SMALL)
    with pytest.raises(DinoError, match="windows are for ViTs"):
        build_detector(ConvNeXt(replace(tiny, patch_size=16)), 3, **SMALL, windows=2)
    with pytest.raises(DinoError, match="2 sizes were given for 1 image"):
        small().eval()(images((64, 64)), [(1, 1), (2, 2)])


@torch.no_grad()
def test_a_convnext_detects_too() -> None:
    convnext = ConvNeXt(ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), patch_size=16))
    convnext.init_weights()
    (found,) = build_detector(convnext, 3, **SMALL).eval()(images((96, 64)))
    assert found["boxes"].isfinite().all()


def test_attention_of_the_encoder_has_no_dropout_in_training() -> None:
    layers = [m for m in small(encoder_dropout=0.3).modules() if type(m).__name__ == "EncoderLayer"]
    assert layers
    assert {(layer.self_attn.dropout, layer.dropout.p) for layer in layers} == {(0.0, 0.3)}
