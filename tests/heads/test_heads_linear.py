"""Linear classifier, linear segmentation head, and the frozen encoder: recorded numbers, key lists, plain twins."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Case
from paths import KEYS
from torch import Tensor, nn
from toy_models import tiny_convnext, tiny_vit

from dinov3.errors import DinoError, UnknownName
from dinov3.eval.segmentation.inference import class_maps, make_inference, windows
from dinov3.heads.encoder import FrozenLayers, adapted_size, center_pad, layers_of, step_of
from dinov3.heads.linear import LinearClassifier, LinearSegmentationHead, LinearSegmentor, build_linear_segmentor
from dinov3.models.architectures import ViTConfig
from dinov3.models.build import backbone
from dinov3.models.vit import VisionTransformer


def tiny(**options: Any) -> VisionTransformer:
    return tiny_vit(**{"embed_dim": 16, "drop_path_rate": 0.5} | options).train()


@torch.no_grad()
def test_the_linear_classifier_gives_the_recorded_numbers() -> None:
    case = Case("linear_classifier")
    vit = VisionTransformer(ViTConfig.of(**case.config["backbone"]))
    model = LinearClassifier(vit, nn.Linear(2 * vit.embed_dim, case.config["classes"])).eval()
    case.fill(model)
    case.compare("logits", model(case.input("x")))
    case.all_checked()


@torch.no_grad()
def test_the_linear_segmentor_gives_the_recorded_numbers() -> None:
    case = Case("seg_linear")
    vit = VisionTransformer(ViTConfig.of(**case.config["backbone"]))
    model = build_linear_segmentor(
        vit,
        backbone_out_layers=case.config["layers"],
        num_classes=case.config["classes"],
        use_batchnorm=case.config["batchnorm"],
    ).eval()
    case.fill(model)
    x = case.input("x")
    case.compare("logits", model(x))
    case.compare("predict", model.predict(x, rescale_to=(50, 70)))
    slide: dict[str, Any] = {
        "inference_mode": "slide",
        "rescale_to": (60, 76),
        "n_output_channels": 7,
        "crop_size": (32, 48),
        "stride": (24, 20),
    }
    case.compare("slide", make_inference(x, model, **slide, output_activation=lambda m: m.softmax(1)))
    case.compare("slide_flip", make_inference(x, model, **slide, apply_horizontal_flip=True))
    case.compare("whole", make_inference(x, model, rescale_to=(60, 76), n_output_channels=7))
    case.all_checked()


def test_the_published_classifier_head_fits() -> None:
    from dinov3.weights.catalog import resolve

    recorded = json.loads((KEYS / "head_vit7b16_lc.json").read_text())
    with torch.device("meta"):
        vit = backbone(resolve("dinov3_vit7b16")[0].config)
        model = LinearClassifier(vit, nn.Linear(2 * vit.embed_dim, 1000))
    state = model.linear_head.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == {k: s for k, (s, _) in recorded["state_dict"].items()}


# ---- the encoder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dinov3_vits16", [2, 5, 8, 11]),
        ("dinov3_vits16plus", [2, 5, 8, 11]),
        ("dinov3_vitb16", [2, 5, 8, 11]),
        ("dinov3_vitl16", [4, 11, 17, 23]),
        ("dinov3_vith16plus", [7, 15, 23, 31]),
        ("dinov3_vit7b16", [9, 19, 29, 39]),
        ("dinov3_convnext_tiny", [0, 1, 2, 3]),
        ("dinov3_convnext_large", [0, 1, 2, 3]),
    ],
)
def test_every_backbone_has_four_even_layers(name: str, expected: list[int]) -> None:
    from dinov3.weights.catalog import resolve

    with torch.device("meta"):
        model = backbone(resolve(name)[0].config)
    assert layers_of(model, "FOUR_EVEN_INTERVALS") == expected
    assert layers_of(model, "LAST") == [model.n_blocks - 1]
    assert layers_of(model, "FOUR_LAST") == list(range(model.n_blocks - 4, model.n_blocks))
    encoder = FrozenLayers(model)
    stages = {"dinov3_convnext_tiny": [96, 192, 384, 768], "dinov3_convnext_large": [192, 384, 768, 1536]}
    assert encoder.widths == stages.get(name, [model.embed_dim] * 4)
    assert encoder.multiple == (32 if "convnext" in name else 16)


def test_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'FOUR_LAST'"):
        FrozenLayers(tiny(), "FOUR_LATS")
    with pytest.raises(DinoError, match="there are 4"):
        FrozenLayers(tiny(), [1, 4])
    with pytest.raises(DinoError, match="there are 2"):
        FrozenLayers(tiny(depth=2), "FOUR_EVEN_INTERVALS")
    with pytest.raises(UnknownName, match="did you mean 'stretch'"):
        FrozenLayers(tiny(), adapt="strech")


def test_padding_is_centred_and_the_larger_half_goes_right_and_bottom() -> None:
    padded = center_pad(torch.ones(1, 1, 45, 60), 16)[0, 0]
    assert adapted_size((45, 60), 16) == tuple(padded.shape) == (48, 64)
    assert torch.equal(padded.nonzero().amin(0), torch.tensor([1, 2]))
    assert torch.equal(padded.nonzero().amax(0), torch.tensor([1 + 44, 2 + 59]))
    assert padded.sum() == 45 * 60


@pytest.mark.parametrize("make", [tiny, tiny_convnext, lambda: tiny_convnext(patch_size=16)])
def test_the_last_row_and_column_of_any_image_reach_the_features(make) -> None:
    encoder = FrozenLayers(make()).eval()
    x = torch.zeros(1, 3, 41, 50, requires_grad=True)
    padded = center_pad(x, encoder.multiple)
    padded.retain_grad()
    model: Any = encoder.get_submodule("backbone")
    maps = model.get_intermediate_layers(padded, n=[3], reshape=True, norm=False)
    (maps[0] * torch.randn(maps[0].shape)).sum().backward()
    assert (x.grad[..., -1, :] != 0).any()
    assert (x.grad[..., -1] != 0).any()


@pytest.mark.parametrize("make", [tiny, tiny_convnext])
def test_the_backbone_stays_frozen_and_in_eval_mode_while_a_head_trains(make) -> None:
    encoder = FrozenLayers(make(), "LAST").train()
    assert encoder.training
    assert not encoder.get_submodule("backbone").training
    x = torch.randn(2, 3, 40, 40)
    first, second = encoder(x), encoder(x)
    assert not first[0][0].requires_grad
    assert torch.equal(first[0][0], second[0][0])  # no stochastic depth


def test_convnext_levels_have_the_widths_and_strides_of_its_stages() -> None:
    levels = FrozenLayers(tiny_convnext(dims=(8, 12, 16, 20)))(torch.randn(1, 3, 33, 64))  # seen as 64×64
    assert [tuple(m.shape[1:]) for m, _ in levels] == [(8, 16, 16), (12, 8, 8), (16, 4, 4), (20, 2, 2)]
    assert [c.shape[1] for _, c in levels] == [8, 12, 16, 20]
    assert step_of(tiny_convnext(patch_size=14)) == 224


@pytest.mark.parametrize("adapt", ["center_padding", "stretch", "never"])
def test_a_prediction_comes_back_to_the_pixels_of_the_image(adapt: str) -> None:
    encoder = FrozenLayers(tiny(), adapt=adapt)
    image = torch.rand(1, 1, 45, 60)
    seen = center_pad(image, 16) if adapt == "center_padding" else image
    back = encoder.to_image(seen, (45, 60))
    assert torch.equal(back, image)
    assert encoder.to_image(torch.rand(1, 1, 3, 4), (45, 60)).shape == (1, 1, 45, 60)


def test_images_of_whole_numbers_are_refused_in_a_sentence() -> None:
    with pytest.raises(DinoError, match="normalised images"):
        FrozenLayers(tiny())(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_images_are_cast_to_the_backbone_and_features_to_the_head() -> None:
    model = build_linear_segmentor(tiny(), num_classes=5).eval()
    model.segmentation_model[0].bfloat16()
    x = torch.randn(1, 3, 32, 32)
    assert model.segmentation_model[0](x)[0][0].dtype == torch.bfloat16
    assert model(x).dtype == torch.float32


# ---- heads ---------------------------------------------------------------------------------------------------------


def test_a_classifier_for_another_backbone_is_refused() -> None:
    with pytest.raises(DinoError, match="belongs to another backbone"):
        LinearClassifier(tiny(), nn.Linear(64, 10))


@pytest.mark.parametrize("make", [tiny, tiny_convnext])
def test_the_classifier_reads_cls_and_mean_patch(make) -> None:
    vit = make().eval()
    model = LinearClassifier(vit, nn.Linear(2 * vit.embed_dim, 3))
    x = torch.randn(2, 3, 64, 64)
    out = vit.forward_features(x)
    both = torch.cat([out["x_norm_clstoken"], out["x_norm_patchtokens"].mean(1)], 1)
    torch.testing.assert_close(model(x), model.linear_head(both))
    model(x).square().sum().backward()  # here the backbone learns too
    assert vit.norm.weight.grad is not None


@pytest.mark.parametrize("make", [tiny, tiny_convnext])
def test_every_parameter_of_the_segmentation_head_gets_a_gradient(make) -> None:
    model = build_linear_segmentor(make(), num_classes=5).train()
    logits = model(torch.randn(2, 3, 40, 50))
    (logits * torch.randn(logits.shape)).sum().backward()
    encoder, head = model.segmentation_model
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert all(p.grad is None for p in encoder.parameters())


def test_dropout_removes_whole_channels_in_training_and_never_in_predict() -> None:
    head = LinearSegmentationHead([8], 3, use_batchnorm=False, dropout=0.5).train()
    maps = [torch.randn(1, 8, 4, 4)]
    torch.manual_seed(0)
    assert not torch.equal(head(maps), head(maps))
    assert torch.equal(head.predict(maps, (4, 4)), head.predict(maps, (4, 4)))
    assert torch.equal(head.predict(maps, (4, 4)), head.eval()(maps))


def test_a_fresh_head_starts_small_and_without_bias() -> None:
    head = LinearSegmentationHead([4096], 150)
    assert head.conv.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert head.conv.bias.abs().max() == 0


def test_levels_that_do_not_fit_the_head_are_refused_in_a_sentence() -> None:
    head = LinearSegmentationHead([8, 8], 3)
    with pytest.raises(DinoError, match="built for 2 layers of the backbone and was given 1"):
        head([torch.zeros(1, 8, 2, 2)])
    with pytest.raises(DinoError, match=r"expects \[8, 8\] channels, got \[8, 4\]"):
        head([torch.zeros(1, 8, 2, 2), torch.zeros(1, 4, 2, 2)])


class FeatureOfPixels(nn.Module):
    """A toy backbone whose patches are the mean colours: what a segmentor predicts is then known."""

    embed_dim, n_blocks, n_storage_tokens, patch_size, stride = 3, 1, 0, 16, 16

    def get_intermediate_layers(self, x: Tensor, **_: Any) -> list[tuple[Tensor, Tensor]]:
        return [(F.avg_pool2d(x, 16), x.mean((2, 3)))]


def test_classes_stay_where_they_are_in_images_that_are_no_multiple_of_the_patch() -> None:
    toy: Any = FeatureOfPixels()
    head = LinearSegmentationHead([3], 3, use_batchnorm=False).eval()
    with torch.no_grad():
        head.conv.weight.copy_(torch.eye(3)[:, :, None, None])
    model = LinearSegmentor(FrozenLayers(toy, "LAST", key="feature_model"), head).eval()
    x = torch.zeros(1, 3, 62, 62)  # padded by one pixel on each side
    x[:, 0, :31], x[:, 1, 31:] = 1.0, 1.0
    top = model.predict(x, rescale_to=(62, 62)).argmax(1)[0]
    assert torch.equal(top, torch.cat([torch.zeros(31, 62), torch.ones(31, 62)]).long())


# ---- inference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "crop", "stride", "count", "window"),
    [
        ((512, 683), 512, 341, 2, (512, 512)),
        ((512, 512), 512, 341, 1, (512, 512)),
        ((900, 512), 512, 341, 3, (512, 512)),
        ((896, 1195), 896, 596, 2, (896, 896)),
        ((832, 1109), 896, 596, 2, (832, 896)),
        ((400, 500), 512, 341, 2, (400, 400)),
    ],
)
def test_windows_are_as_many_and_as_large_as_the_protocol_says(size, crop, stride, count, window) -> None:
    spans = windows(size, (crop, crop), (stride, stride))
    assert len(spans) == count
    assert {(bottom - top, right - left) for top, left, bottom, right in spans} == {window}
    seen = torch.zeros(size)
    for top, left, bottom, right in spans:
        seen[top:bottom, left:right] += 1
    assert seen.min() >= 1


class Echo:
    """A model that predicts its input, and counts."""

    calls = 0

    def predict(self, x: Tensor, rescale_to: tuple[int, int]) -> Tensor:
        self.calls += 1
        return F.interpolate(x, size=rescale_to, mode="bilinear", align_corners=False)


def test_sliding_over_a_model_that_echoes_gives_the_image() -> None:
    x, model = torch.randn(2, 3, 45, 70), Echo()
    options: dict[str, Any] = {"inference_mode": "slide", "rescale_to": (45, 70), "n_output_channels": 3}
    out = make_inference(x, model, **options, crop_size=(32, 32), stride=(20, 20))
    torch.testing.assert_close(out, x, rtol=0, atol=1e-5)
    assert model.calls == 2 * 3
    make_inference(x, model, **options, crop_size=(32, 32), stride=(20, 20), num_max_forward=9)
    assert model.calls == 6 + 9
    flipped = make_inference(
        x.flip(-1), model, **options, crop_size=(32, 32), stride=(20, 20), apply_horizontal_flip=True
    )
    torch.testing.assert_close(flipped, x, rtol=0, atol=1e-5)


def test_mask_predictions_become_class_maps_by_the_plain_sum() -> None:
    prediction = {"pred_logits": torch.randn(1, 4, 3), "pred_masks": torch.randn(1, 4, 2, 2)}
    p, m = prediction["pred_logits"].softmax(-1), prediction["pred_masks"].sigmoid()
    maps = class_maps(prediction, "m2f")
    assert maps.shape == (1, 2, 2, 2)
    for k in range(2):
        for i in range(2):
            for j in range(2):
                plain = sum(p[0, q, k] * m[0, q, i, j] for q in range(4))
                assert maps[0, k, i, j].item() == pytest.approx(plain.item(), abs=1e-6)


def test_inference_errors_are_one_sentence() -> None:
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(UnknownName, match="did you mean 'slide'"):
        make_inference(x, Echo(), inference_mode="slides")
    with pytest.raises(DinoError, match="need crop_size"):
        make_inference(x, Echo(), inference_mode="slide")
    with pytest.raises(DinoError, match="gives 3 classes, but n_output_channels is 256"):
        make_inference(x, Echo(), inference_mode="slide", crop_size=(16, 16), stride=(16, 16))
