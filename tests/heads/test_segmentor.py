"""The Mask2Former segmentor: recorded numbers, published key list, gradients, every backbone, files, errors."""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import Case
from paths import KEYS, ROOT
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from toy_models import HEAD, tiny_convnext, tiny_vit

import hubconf
from dinov3.errors import DinoError, UnknownName, WeightsMismatch
from dinov3.eval.segmentation.inference import make_inference
from dinov3.heads.mask2former import (
    Attention,
    Mask2FormerHead,
    Mask2FormerSegmentor,
    StagePyramid,
    ViTAdapter,
    build_segmentor,
    default_width,
    positions,
)
from dinov3.hub import HEADS, published_heads
from dinov3.hub.published_heads import OPTIONS
from dinov3.models.architectures import ViTConfig
from dinov3.models.build import backbone
from dinov3.models.vit import VisionTransformer
from dinov3.weights import catalog

BACKBONE = "segmentation_model.0.backbone."


def tiny(**changes: Any) -> VisionTransformer:
    return tiny_vit(**{"num_heads": 1, "mask_k_bias": True} | changes).train()


def tiny_segmentor(n_classes: int = 5, **options: Any) -> Mask2FormerSegmentor:
    torch.manual_seed(1)
    return build_segmentor(tiny(), n_classes, **HEAD | options).eval()


def recorded(case: Case) -> Mask2FormerSegmentor:
    c = case.config
    vit = VisionTransformer(ViTConfig.of(**c["backbone"]))
    model = build_segmentor(
        vit, c["classes"], hidden_dim=c["hidden_dim"], ffn=4096, layers=c["interaction_indexes"]
    ).eval()
    case.fill(model)
    return model


# ---- recorded numbers ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_segmentor_gives_the_recorded_numbers() -> None:
    case = Case("seg_m2f")
    model, x = recorded(case), case.input("x")
    maps = model.pyramid(x)
    for i, level in enumerate(maps, 1):
        case.compare(f"adapter.{i}", level)
    head = model.segmentation_model[1]
    mask_features, coarse_to_fine = head.pixel_decoder(maps)
    case.compare("pixel.mask_features", mask_features)
    for i, level in enumerate(coarse_to_fine):
        case.compare(f"pixel.multi_scale.{i}", level)
    out = model(x)
    assert len(out["aux_outputs"]) == 9
    case.compare("pred_logits", out["pred_logits"])
    case.compare("pred_masks", out["pred_masks"])
    case.compare("aux0.pred_logits", out["aux_outputs"][0]["pred_logits"])
    case.compare("aux0.pred_masks", out["aux_outputs"][0]["pred_masks"])
    case.compare("aux8.pred_logits", out["aux_outputs"][8]["pred_logits"])
    case.compare("predict.pred_masks", model.predict(x, rescale_to=(40, 48))["pred_masks"][:, :20])
    window = {"crop_size": (64, 64), "stride": (64, 32), "output_activation": partial(torch.softmax, dim=1)}
    case.compare("slide", make_inference(x, model, "slide", "m2f", (40, 48), case.config["classes"], **window))
    case.all_checked()


def test_the_published_segmentor_has_the_published_keys() -> None:
    published = json.loads((KEYS / "head_vit7b16_ms.json").read_text())
    row = catalog.resolve("dinov3_vit7b16")[0]
    with torch.device("meta"):
        model = build_segmentor(backbone(row.config), **OPTIONS["dinov3_vit7b16_ms", "dinov3_vit7b16"], hidden_dim=2048)
    ours = {
        k: [list(v.shape), str(v.dtype).removeprefix("torch.")]
        for k, v in model.state_dict().items()
        if not k.startswith(BACKBONE)
    }
    assert ours == published["state_dict"]
    assert model.pyramid.layers == [9, 19, 29, 39]
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(BACKBONE))
    assert parameters == published["n_parameters"]


# ---- what the parts are --------------------------------------------------------------------------------------------


def test_attention_is_torchs_under_the_same_names() -> None:
    torch.manual_seed(0)
    theirs, ours = nn.MultiheadAttention(16, 4, batch_first=True), Attention(16, 4)
    nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict(theirs.state_dict())
    q, memory = torch.randn(2, 3, 16), torch.randn(2, 7, 16)
    allowed = torch.rand(2, 3, 7) > 0.5
    allowed[..., 0] = True
    expected, _ = theirs(q, memory, memory + 1, attn_mask=~allowed.repeat_interleave(4, 0), need_weights=False)
    assert torch.allclose(ours(q, memory, memory + 1, allowed), expected, atol=1e-6)


def test_positions_count_from_one_row_first() -> None:
    out = positions((2, 3), 4, torch.device("cpu"))
    angle = 2 * torch.pi * torch.tensor([1 / 2, 1 / 3])
    expected = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten()  # [sin y, cos y, sin x, cos x] of cell (0, 0)
    assert torch.allclose(out[0], expected, atol=1e-5)
    assert torch.allclose(out[1][:2], out[0][:2])  # the next cell is in the same row
    assert torch.allclose(out[3][2:], out[0][2:])


@torch.no_grad()
def test_attention_masks_equal_the_resized_masks() -> None:
    """The attention masks come from resized mask features: resizing the masks themselves gives the same."""
    model = tiny_segmentor()
    maps = model.pyramid(torch.randn(1, 3, 64, 96))
    head = model.segmentation_model[1]
    features, _ = head.pixel_decoder(maps)
    embedding = torch.randn(1, 6, 32)
    full = torch.einsum("bqm,bmhw->bqhw", embedding, features)
    expected = nn.functional.interpolate(full, size=(4, 6), mode="bilinear", align_corners=False)
    small = nn.functional.interpolate(features, size=(4, 6), mode="bilinear", align_corners=False)
    assert torch.allclose(torch.einsum("bqm,bmhw->bqhw", embedding, small), expected, atol=1e-5)


@torch.no_grad()
def test_predict_equals_forward_without_what_training_needs() -> None:
    model, x = tiny_segmentor(), torch.randn(1, 3, 64, 64)
    said, predicted = model(x), model.predict(x, rescale_to=(16, 16))
    assert set(predicted) == {"pred_logits", "pred_masks"}
    assert len(said["aux_outputs"]) == 4
    assert torch.allclose(predicted["pred_masks"], said["pred_masks"], atol=1e-5)
    assert torch.allclose(predicted["pred_logits"], said["pred_logits"], atol=1e-5)


@torch.no_grad()
def test_a_image_of_any_size_gets_masks_over_exactly_its_pixels() -> None:
    """An image with zeros around it is what the model sees of a smaller one."""
    model = tiny_segmentor()
    x = torch.randn(1, 3, 40, 70)
    padded = nn.functional.pad(x, (13, 13, 12, 12))  # 64 × 96
    whole = model.predict(padded, rescale_to=(64, 96))["pred_masks"]
    out = model.predict(x, rescale_to=(40, 70))
    assert out["pred_masks"].shape == (1, 6, 40, 70)
    assert torch.allclose(out["pred_masks"], whole[..., 12:52, 13:83], atol=1e-5)
    maps = make_inference(x, model, "slide", "m2f", (40, 70), 5, (37, 41), (20, 20))
    assert maps.shape == (1, 5, 40, 70)
    assert maps.isfinite().all()


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_the_gradient_reaches_every_parameter_of_the_head_and_none_of_the_backbone(training: bool) -> None:
    model = tiny_segmentor(adapter={"drop_path": 0.0}).train(training)
    for name, p in model.named_parameters():  # nothing hides behind an initial zero
        if not name.startswith(BACKBONE) and p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    out = model(torch.randn(2, 3, 64, 64))
    total = sum(((o["pred_masks"] ** 2).mean() + (o["pred_logits"] ** 2).mean()) for o in (out, *out["aux_outputs"]))
    total.backward()
    before_batchnorm = ("spm.fc1.bias", ".up.bias")  # a batch norm that trains subtracts them again
    for name, p in model.named_parameters():
        if name.startswith(BACKBONE):
            assert p.grad is None, name
        else:
            assert p.grad is not None, name
            assert p.grad.any() or (training and name.endswith(before_batchnorm)), name
    assert not model.pyramid.backbone.training


def test_drop_path_drops_whole_images_and_keeps_the_mean() -> None:
    from dinov3.heads.mask2former import Extractor, centres

    torch.manual_seed(0)
    extractor = Extractor(16, n_heads=2, n_points=1, ratio=0.5, ffn_ratio=0.5, drop=0.5)
    shapes = [(2, 2), (1, 1)]
    c, z, reference = torch.randn(1, 5, 16), torch.randn(1, 4, 16), centres(shapes)[None, :, None]
    given = (z.expand(400, -1, -1), reference, (2, 2), shapes)
    with torch.no_grad():
        once = extractor.eval()(c, z, reference, (2, 2), shapes)
        attended = c + extractor.attn(extractor.query_norm(c), reference, extractor.feat_norm(z), [(2, 2)])
        many = extractor.train()(c.expand(400, -1, -1), *given)
    dropped = torch.isclose(many, attended, atol=1e-6).flatten(1).all(1)
    assert 140 < dropped.sum() < 260
    assert torch.allclose(
        many[~dropped], (attended + 2 * (once - attended)).expand(int((~dropped).sum()), -1, -1), atol=1e-5
    )


# ---- every backbone ------------------------------------------------------------------------------------------------


SLOW = pytest.mark.slow


@pytest.mark.parametrize(("arch", "width", "layers"), [
    ("dinov3_vits16", 256, [2, 5, 8, 11]),
    pytest.param("dinov3_vits16plus", 256, [2, 5, 8, 11], marks=SLOW),
    pytest.param("dinov3_vitb16", 384, [2, 5, 8, 11], marks=SLOW),
    ("dinov3_vitl16", 512, [4, 11, 17, 23]),
    pytest.param("dinov3_vith16plus", 640, [7, 15, 23, 31], marks=SLOW),
    pytest.param("dinov3_vit7b16", 2048, [9, 19, 29, 39], marks=SLOW),
    pytest.param("dinov3_vitt16", 256, [2, 5, 8, 11], marks=SLOW),
    ("dinov3_convnext_tiny", 384, [0, 1, 2, 3]),
    pytest.param("dinov3_convnext_large", 768, [0, 1, 2, 3], marks=SLOW),
])  # fmt: skip
def test_every_backbone_of_the_family_gets_a_segmentor(arch: str, width: int, layers: list[int]) -> None:
    with torch.device("meta"):
        model = build_segmentor(backbone(catalog.resolve(arch)[0].config), 7)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # shapes and types only
        model.to_empty(device="cpu")
        out = model(torch.zeros(1, 3, 64, 96))
    assert out["pred_logits"].shape == (1, 100, 8)
    assert out["pred_masks"].shape == (1, 100, 16, 24)
    assert model.pyramid.layers == layers
    head = model.segmentation_model[1]
    assert default_width(model.pyramid.backbone) == width == head.predictor.level_embed.weight.shape[1]


def test_a_convnext_gives_its_own_stages() -> None:
    model = build_segmentor(tiny_convnext(), 5, **HEAD)
    assert isinstance(model.pyramid, StagePyramid)
    maps = model.pyramid(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 24), (16, 8, 12), (24, 4, 6), (32, 2, 3)]
    assert all(abs(m.mean().item()) < 1e-3 for m in maps)  # batch norm in training
    out = model.predict(torch.randn(2, 3, 50, 70), rescale_to=(50, 70))
    assert out["pred_masks"].shape == (2, 6, 50, 70)
    model(torch.randn(2, 3, 64, 64))["pred_masks"].sum().backward()
    assert all(p.grad is None for p in model.pyramid.backbone.parameters())


@torch.no_grad()
def test_a_backbone_in_bfloat16_under_a_float32_head_runs() -> None:
    model = build_segmentor(tiny().bfloat16(), 5, **HEAD).eval()
    assert model(torch.randn(1, 3, 64, 64))["pred_masks"].dtype == torch.float32
    assert model.bfloat16()(torch.randn(1, 3, 64, 64))["pred_masks"].dtype == torch.bfloat16


@torch.no_grad()
def test_under_autocast_the_pixel_decoder_keeps_its_precision() -> None:
    model, x = tiny_segmentor(), torch.randn(1, 3, 64, 64)
    expected = model(x)
    seen: list[Tensor] = []
    model.segmentation_model[1].pixel_decoder.register_forward_hook(lambda *a: seen.append(a[2][0]))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert seen[0].dtype == torch.float32
    assert (out["pred_masks"].float() - expected["pred_masks"]).abs().max() < 0.1 * expected["pred_masks"].abs().max()


@pytest.mark.slow
def test_it_exports() -> None:
    model, x = tiny_segmentor(pixel_layers=1, decoder_layers=1), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        assert torch.allclose(exported.module()(x)["pred_masks"], model(x)["pred_masks"], atol=1e-4)


# ---- torch.hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published name stands for the backbone of the recorded case."""
    config = Case("seg_m2f").config["backbone"]
    rows = tuple(catalog.Row("dinov3_vit7b16", d, ViTConfig.of(**config), 1, None) for d in ("lvd1689m", "sat493m"))
    monkeypatch.setattr(catalog, "resolve", lambda name: rows)


def files_of(model: Mask2FormerSegmentor, folder: Path) -> dict[str, str]:
    torch.save(model.pyramid.backbone.state_dict(), folder / "backbone.pth")
    head = {k: v for k, v in model.state_dict().items() if not k.startswith(BACKBONE)}
    torch.save(head, folder / "head.pth")
    return {"weights": str(folder / "head.pth"), "backbone_weights": str(folder / "backbone.pth")}


@torch.no_grad()
def test_torch_hub_gives_the_recorded_numbers_from_two_files(small: None, tmp_path: Path) -> None:
    case = Case("seg_m2f")
    files = files_of(recorded(case), tmp_path)
    options = {"hidden_dim": case.config["hidden_dim"], "n_classes": case.config["classes"]}
    model = torch.hub.load(str(ROOT), "dinov3_vit7b16_ms", source="local", **files, **options)
    assert not any(module.training for module in model.modules())
    assert model.autocast_dtype is torch.bfloat16
    assert model.origin.name == "dinov3_vit7b16_ms"
    assert "head.pth over" in model.origin.source
    assert {p.requires_grad for p in model.pyramid.backbone.parameters()} == {False}
    case.compare("pred_masks", model(case.input("x"))["pred_masks"])
    half = hubconf.dinov3_vit7b16_ms(**files, **options, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.pyramid.backbone.rope_embed.periods.dtype == torch.float32

    def mixed_up(**changes: Any) -> None:
        hubconf.dinov3_vit7b16_ms(**files | options | changes)

    with pytest.raises(WeightsMismatch, match=r"tells 11 classes apart, not 150: pass n_classes=11"):
        mixed_up(n_classes=150)
    with pytest.raises(WeightsMismatch, match=r"is 64 wide, not 2048: pass hidden_dim=64"):
        mixed_up(hidden_dim=2048)
    with pytest.raises(WeightsMismatch, match="pass it as backbone_weights"):
        mixed_up(weights=files["backbone_weights"])
    state = torch.load(files["weights"])
    torch.save({k: v for k, v in state.items() if "up.bias" not in k}, tmp_path / "lacks.pth")
    with pytest.raises(WeightsMismatch, match=r"missing in the file: segmentation_model\.0\.up\.bias"):
        mixed_up(weights=str(tmp_path / "lacks.pth"))
    torch.save({"model": state}, tmp_path / "wrapped.pth")
    mixed_up(weights=str(tmp_path / "wrapped.pth"))


def test_a_head_of_another_backbone_is_refused_in_a_sentence(small: None, tmp_path: Path) -> None:
    other = build_segmentor(tiny(), 150, hidden_dim=32, n_heads=4, ffn=4096, n_queries=4)
    torch.save({k: v for k, v in other.state_dict().items() if not k.startswith(BACKBONE)}, tmp_path / "head.pth")
    with pytest.raises(WeightsMismatch, match="was trained on a backbone of width 32, this one has 64"):
        hubconf.dinov3_vit7b16_ms(weights=str(tmp_path / "head.pth"), backbone_weights="random")


@pytest.mark.slow
def test_torch_hub_finds_both_files_at_the_published_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the published names, keys and shapes, whose values take no room."""
    row, head = catalog.resolve("dinov3_vit7b16")[0], HEADS["dinov3_vit7b16_ms"]
    with torch.device("meta"):
        vit = backbone(row.config)
    published = json.loads((KEYS / "head_vit7b16_ms.json").read_text())["state_dict"]
    (tmp_path / row.arch).mkdir()
    torch.save({k: torch.ones(1).expand(v.shape) for k, v in vit.state_dict().items()}, tmp_path / row.arch / row.file)
    twos = {k: torch.full((), 2, dtype=getattr(torch, d)).expand(shape) for k, (shape, d) in published.items()}
    torch.save(twos, tmp_path / head.file)
    monkeypatch.setenv("DINOV3_DOWNLOAD_BASE", tmp_path.as_uri())
    model = torch.hub.load(str(ROOT), "dinov3_vit7b16_ms", source="local")
    assert (model.segmentation_model[1].predictor.class_embed.bias == 2).all()
    assert model.pyramid.backbone.cls_token.all()
    assert model.origin.mean == (0.485, 0.456, 0.406)
    with pytest.raises(DinoError, match="promised by its name"):
        torch.hub.load(str(ROOT), "dinov3_vit7b16_ms", source="local", check_hash=True)


def test_fresh_weights_need_no_file(small: None) -> None:
    model = hubconf.dinov3_vit7b16_ms(pretrained=False, hidden_dim=64, n_classes=3)
    assert model.origin.random
    assert not model.training
    other = hubconf.dinov3_vit7b16_ms(weights="random", backbone_weights="random", hidden_dim=64, n_classes=3)
    key = "segmentation_model.1.predictor.class_embed.weight"
    assert not torch.equal(model.state_dict()[key], other.state_dict()[key])
    half = hubconf.dinov3_vit7b16_ms(pretrained=False, hidden_dim=64, n_classes=3, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_arguments_have_the_published_names_kinds_and_defaults() -> None:
    parameters = inspect.signature(hubconf.dinov3_vit7b16_ms).parameters
    assert list(parameters)[:5] == ["pretrained", "weights", "backbone_weights", "check_hash", "autocast_dtype"]
    assert {p.kind for p in parameters.values()} <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    assert parameters["autocast_dtype"].default is torch.bfloat16
    assert parameters["hidden_dim"].default == 2048
    assert [m.name for m in hubconf.SegmentorWeights] == ["ADE20K"]
    assert "dinov3_vit7b16_ms" in hubconf.__all__


# ---- errors --------------------------------------------------------------------------------------------------------


def test_wrong_shapes_are_errors_of_one_sentence() -> None:
    model = tiny_segmentor()
    with pytest.raises(DinoError, match=r"30×10 pixels is smaller than one patch \(16\)"):
        model(torch.zeros(1, 3, 10, 30))
    with pytest.raises(DinoError, match="normalised images"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(DinoError, match="multiples of 32, got 48×64"):
        tiny_segmentor(adapt="never")(torch.zeros(1, 3, 64, 48))
    with pytest.raises(DinoError, match="use StagePyramid"):
        ViTAdapter(tiny_convnext())
    with pytest.raises(DinoError, match="on a ViT use ViTAdapter"):
        StagePyramid(tiny())
    with pytest.raises(DinoError, match="load it without patch_size"):
        build_segmentor(tiny_convnext(patch_size=16), 5)
    with pytest.raises(DinoError, match="no adapter and no layers"):
        build_segmentor(tiny_convnext(), 5, layers=[1, 2, 3])
    with pytest.raises(DinoError, match="built for 4 layers of the backbone and was given 2"):
        build_segmentor(tiny(), 5, layers=[1, 2])
    with pytest.raises(DinoError, match="at least one class"):
        build_segmentor(tiny(), 0)
    with pytest.raises(DinoError, match=r"multiple of 32 .* 48 is not"):
        build_segmentor(tiny(), 5, hidden_dim=48)
    with pytest.raises(DinoError, match="head belongs to another backbone"):
        Mask2FormerSegmentor(ViTAdapter(tiny()), Mask2FormerHead([64] * 4, 5, **HEAD))
    with pytest.raises(DinoError, match="5 classes, but n_output_channels is 6"):
        make_inference(torch.zeros(1, 3, 64, 64), model, "slide", "m2f", (64, 64), 6, (64, 64), (64, 64))
    with pytest.raises(UnknownName, match="stands on dinov3_vit7b16 or dinov3_vitl16"):
        published_heads.load_published(
            "dinov3_vit7b16_ms", published_heads.Files(pretrained=False), {}, arch="dinov3_vitb16"
        )
