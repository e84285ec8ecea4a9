"""Both families against recorded numbers of the reference, published key lists and plain re-statements."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Case
from paths import KEYS
from PIL import Image
from toy_models import tiny_convnext, tiny_vit

from dinov3.errors import DinoError, UnknownName
from dinov3.models.architectures import ConvNeXtConfig, ViTConfig
from dinov3.models.base import Backbone
from dinov3.models.build import backbone, with_channels
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vit import RopeEmbedding, VisionTransformer, attend, rotate, rotation


def vit(case: Case) -> VisionTransformer:
    model = VisionTransformer(ViTConfig.of(**case.config)).eval()
    case.fill(model)
    return model


def features(case: Case, prefix: str, out: dict) -> None:
    for key in ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens", "x_prenorm"):
        if f"{prefix}.{key}" in case.golden:
            case.compare(f"{prefix}.{key}", out[key])


@pytest.mark.parametrize("name", ["vit_mlp", "vit_7b_like", "vit_odd"])
@torch.no_grad()
def test_vit_gives_the_recorded_numbers(name: str) -> None:
    case = Case(name)
    model, x, x_odd = vit(case), case.input("x"), case.input("x_odd")
    mask = case.input("mask") > 0.5
    case.compare("mask", mask)
    case.compare("forward", model(x))
    features(case, "features", model.forward_features(x))
    features(case, "features_masked", model.forward_features(x, mask))
    case.compare("inter.n1", model.get_intermediate_layers(x, n=1)[0])
    options = {"reshape": True, "return_class_token": True, "return_extra_tokens": True}
    for i, (patch, cls, extra) in enumerate(model.get_intermediate_layers(x, n=[0, 2], **options)):
        case.compare(f"inter.n0_2.norm.{i}.patch", patch)
        case.compare(f"inter.n0_2.norm.{i}.cls", cls)
        if f"inter.n0_2.norm.{i}.extra" in case.golden:
            case.compare(f"inter.n0_2.norm.{i}.extra", extra)
    for i, (patch, cls) in enumerate(model.get_intermediate_layers(x, n=2, return_class_token=True, norm=False)):
        case.compare(f"inter.last2.raw.{i}.patch", patch)
        case.compare(f"inter.last2.raw.{i}.cls", cls)
    case.compare("odd.forward", model(x_odd))
    case.compare("odd.patch", model.get_intermediate_layers(x_odd, reshape=True)[0])
    if name == "vit_7b_like":
        crops = [case.raw_input("vit_7b_like/g", (2, 3, 64, 64)), case.raw_input("vit_7b_like/l", (3, 3, 32, 32))]
        gmask = case.raw_input("vit_7b_like/gmask", (2, 16)) > 0.3
        case.compare("train_list.gmask", gmask)
        case.compare("eval_list.1.x_norm_clstoken", model.forward_features(crops, [gmask, None])[1]["x_norm_clstoken"])
        model.train()
        model.rope_embed.rescale_coords = None
        for i, out in enumerate(model.forward_features(crops, [gmask, None])):
            features(case, f"train_list.{i}", out)
    case.all_checked()


@torch.no_grad()
def test_stochastic_depth_draws_in_the_recorded_order() -> None:
    case = Case("vit_droppath")
    model = vit(case).train()
    crops = [case.input("g"), case.input("l")]
    torch.manual_seed(7)
    for i, out in enumerate(model.forward_features(crops, [None, None])):
        case.compare(f"{i}.x_prenorm", out["x_prenorm"])
    case.all_checked()


@pytest.mark.parametrize("name", ["convnext", "convnext_ps16"])
@torch.no_grad()
def test_convnext_gives_the_recorded_numbers(name: str) -> None:
    case = Case(name)
    model = ConvNeXt(ConvNeXtConfig.of(**case.config)).eval()
    case.fill(model)
    x, x_odd = case.input("x"), case.input("x_odd")
    case.compare("forward", model(x))
    features(case, "features", model.forward_features(x))
    assert model.forward_features(x)["x_storage_tokens"].shape == (2, 0, 64)
    case.compare("odd.forward", model(x_odd))
    for i, (patch, cls) in enumerate(model.get_intermediate_layers(x, 2, reshape=True, return_class_token=True)):
        case.compare(f"inter.last2.norm.{i}.patch", patch)
        case.compare(f"inter.last2.norm.{i}.cls", cls)
    every = model.get_intermediate_layers(x, n=[0, 1, 2, 3], return_class_token=True, norm=False)
    for i, (patch, cls) in enumerate(every):
        case.compare(f"inter.all.raw.{i}.patch", patch)
        case.compare(f"inter.all.raw.{i}.cls", cls)
    case.compare("inter.n1", model.get_intermediate_layers(x)[0])
    if "inter.odd.patch" in case.golden:
        shape = case.spec["outputs"]["inter.odd.patch"]["shape"]
        case.compare("inter.odd.patch", model.get_intermediate_layers(x_odd, reshape=len(shape) == 4)[0])
    case.all_checked()


def test_rope_tables_are_the_recorded_ones() -> None:
    case = Case("rope")

    def rope(**options) -> RopeEmbedding:
        return RopeEmbedding(ViTConfig(**options)).eval()

    small = {"embed_dim": 64, "num_heads": 4}
    variants = {
        "base100_separate": rope(**small),
        "base100_separate_d64": rope(embed_dim=384, num_heads=6),
        "base100_min": rope(**small, pos_embed_rope_normalize_coords="min"),
        "minmax_max": rope(
            **small,
            pos_embed_rope_base=None,
            pos_embed_rope_min_period=0.5,
            pos_embed_rope_max_period=90.0,
            pos_embed_rope_normalize_coords="max",
        ),
        "base100_bf16": rope(**small, pos_embed_rope_dtype="bf16"),
        "bf16_loaded": rope(embed_dim=384, num_heads=6),
        "train_aug": rope(
            **small,
            pos_embed_rope_shift_coords=0.3,
            pos_embed_rope_jitter_coords=1.5,
            pos_embed_rope_rescale_coords=2.0,
        ).train(),
    }
    variants["bf16_loaded"].periods.copy_(variants["bf16_loaded"].periods.bfloat16())
    for name, module in variants.items():
        for grid in ("14x14", "3x5", "7x2"):
            if f"{name}.{grid}.sin" in case.golden:
                torch.manual_seed(1234)
                sin, cos = module(*map(int, grid.split("x")))
                case.compare(f"{name}.{grid}.sin", sin)
                case.compare(f"{name}.{grid}.cos", cos)
        if f"{name}.periods" in case.golden:
            case.compare(f"{name}.periods", module.periods)
    case.all_checked()


def test_rotation_is_the_plain_two_by_two_one() -> None:
    """The definition: element i and element i + d/2 are a point, turned by the patch's angle; the prefix is left."""
    rope = RopeEmbedding(ViTConfig(embed_dim=32, num_heads=2))
    z = torch.randn(1, 2, 1 + 6, 16)  # [B, h, N, d]
    turned = rotate(z.transpose(1, 2), *(t[:, 0] for t in rotation(*rope(2, 3), prefix=1))).transpose(1, 2)
    assert torch.equal(turned[:, :, :1], z[:, :, :1])
    coords = [((r + 0.5) / 2 * 2 - 1, (c + 0.5) / 3 * 2 - 1) for r in range(2) for c in range(3)]
    for n, (y, x) in enumerate(coords):
        for i in range(8):
            period = 100 ** (4 * (i % 4) / 16)
            angle = 2 * math.pi * (y if i < 4 else x) / period
            a, b = z[0, 1, 1 + n, i].item(), z[0, 1, 1 + n, i + 8].item()
            assert turned[0, 1, 1 + n, i].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-5)
            assert turned[0, 1, 1 + n, i + 8].item() == pytest.approx(
                b * math.cos(angle) + a * math.sin(angle), abs=1e-5
            )


def tiny(**options) -> VisionTransformer:
    return tiny_vit(**{"depth": 2, "n_storage_tokens": 4, "mask_k_bias": True} | options).train()


def test_key_bias_has_no_effect() -> None:
    model, x = tiny().eval(), torch.randn(1, 3, 32, 32)
    before = model(x)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[32:64] = 1e3
    assert torch.equal(model(x), before)
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias[64:] = 1.0  # the value bias does act
    assert not torch.equal(model(x), before)


def test_masked_patches_do_not_reach_the_output() -> None:
    model = tiny().eval()
    x = torch.randn(1, 3, 32, 32)
    mask = torch.tensor([[True, False, False, False]])
    changed = x.clone()
    changed[..., :16, :16] += 5
    assert torch.equal(model(x, mask), model(changed, mask))
    assert not torch.equal(model(x), model(changed))


def test_crop_groups_travel_together_and_never_meet() -> None:
    model = tiny().eval()
    a, b = torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 48)
    together = model.forward_features([a, b])
    for x, out in zip((a, b), together):
        alone = model.forward_features(x)
        torch.testing.assert_close(out["x_prenorm"], alone["x_prenorm"], rtol=0, atol=1e-6)


def test_every_parameter_gets_a_gradient_in_training() -> None:
    model = tiny(
        drop_path_rate=0.3,
        layerscale_init=1e-5,
        untie_global_and_local_cls_norm=True,
        pos_embed_rope_rescale_coords=2.0,
    ).train()
    crops = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16)]
    masks = [torch.rand(4, 4) > 0.5, None]
    outs = model.forward_features(crops, masks)
    sum((o["x_norm_clstoken"] ** 3).sum() + (o["x_norm_patchtokens"] ** 3).sum() for o in outs).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []


RESCALE = {"pos_embed_rope_rescale_coords": 2.0}


def test_rope_augmentation_is_drawn_anew_for_every_block_and_group_and_only_in_training() -> None:
    model, calls = tiny(pos_embed_rope_rescale_coords=2.0), []
    model.rope_embed.register_forward_hook(lambda m, args, out: calls.append(out[0].clone()))
    x = torch.randn(2, 3, 32, 32)
    model.train().forward_features([x, x])
    assert [len(c) for c in calls] == [2, 2]  # the tables of both blocks at once, for each group
    assert len({table[0].sum().item() for c in calls for table in c}) == 4
    calls.clear()
    model.eval().forward_features([x, x])
    assert [len(c) for c in calls] == [1, 1]  # one table per group, shared by all blocks


def test_tables_of_positions_of_all_blocks_are_computed_at_once() -> None:
    """Tables of all blocks are computed at once; a block adds the draws of its coordinates only, one per group."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.operations += not func.is_view
            return func(*args, **(kwargs or {}))

    def operations(depth: int, **options) -> int:
        model = tiny(depth=depth, **options).train()
        with Count() as count:
            model.forward_features([torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 16, 16)])
        return count.operations

    plain, drawn = ([operations(depth, **options) for depth in (2, 6)] for options in ({}, RESCALE))
    assert (drawn[1] - plain[1]) - (drawn[0] - plain[0]) == 2 * (6 - 2) * 2  # empty and uniform, of two groups


def test_casting_the_model_keeps_float32_tables() -> None:
    model = tiny().eval().bfloat16()
    sin, _ = model.rope_embed(2, 2)
    assert sin.dtype == torch.float32
    assert model(torch.randn(1, 3, 32, 32).bfloat16()).dtype == torch.bfloat16


def test_intermediate_layers_come_in_block_order_and_wrong_ones_are_refused() -> None:
    model, x = tiny().eval(), torch.randn(1, 3, 32, 32)
    first, last = model.get_intermediate_layers(x, n=[1, 0])
    assert torch.equal(last, model.get_intermediate_layers(x, n=1)[0])
    assert not torch.equal(first, last)
    for wrong in ([0, 0], [-1], [2], 3, []):
        with pytest.raises(DinoError, match="there are 2"):
            model.get_intermediate_layers(x, n=wrong)


def test_a_misspelt_option_is_refused_with_a_proposal() -> None:
    with pytest.raises(UnknownName, match="did you mean 'drop_path_rate'"):
        ViTConfig.of(drop_path=0.1)


def test_a_image_smaller_than_a_patch_is_refused_in_a_sentence() -> None:
    with pytest.raises(DinoError, match="20×12 pixels is smaller"):
        tiny()(torch.randn(1, 3, 12, 20))


def test_both_families_meet_the_protocol() -> None:
    assert isinstance(tiny(), Backbone)
    assert isinstance(backbone(ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))), Backbone)


@pytest.mark.parametrize("path", sorted(KEYS.glob("dinov3_*.json")), ids=lambda p: p.stem)
def test_every_published_architecture_has_the_published_keys_shapes_and_size(path: Path) -> None:
    from dinov3.weights.catalog import resolve

    row = resolve(path.stem)[0]
    recorded = json.loads(path.read_text())
    with torch.device("meta"):
        model = backbone(row.config)
    state = model.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == {k: s for k, (s, _) in recorded["state_dict"].items()}
    assert {str(v.dtype).removeprefix("torch.") for v in state.values()} == {"float32"}
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == recorded["n_parameters"] == row.parameters


# ---- other channels than three -------------------------------------------------------------------------------------

SMALL = (
    ViTConfig(embed_dim=32, depth=1, num_heads=2, n_storage_tokens=1),
    ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 8, 8, 16)),
)


def small(config: ViTConfig | ConvNeXtConfig) -> VisionTransformer | ConvNeXt:
    torch.manual_seed(0)
    model = backbone(config).eval()
    model.init_weights()
    return model


@pytest.mark.parametrize("config", SMALL, ids=("vit", "convnext"))
@torch.no_grad()
def test_a_fourth_channel_is_seen_as_the_mean_of_the_others(config: ViTConfig | ConvNeXtConfig) -> None:
    model = small(config)
    wide = with_channels(model, 4)
    rgb, infrared = torch.randn(2, 3, 64, 64), torch.randn(2, 1, 64, 64)
    nothing = torch.cat([rgb, torch.zeros_like(infrared)], 1)
    torch.testing.assert_close(wide(nothing), model(rgb))
    torch.testing.assert_close(wide(torch.cat([rgb, infrared], 1)), model(rgb + infrared / 3))
    assert model.config.in_chans == 3
    with pytest.raises(RuntimeError, match="channels"):
        wide(rgb)


@pytest.mark.parametrize("config", SMALL, ids=("vit", "convnext"))
@torch.no_grad()
def test_one_channel_gives_what_three_copies_gave(config: ViTConfig | ConvNeXtConfig) -> None:
    model, grey = small(config), torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(with_channels(model, 1)(grey), model(grey.expand(-1, 3, -1, -1)))


def test_channels_survive_a_file(tmp_path: Path) -> None:
    import dinov3
    from dinov3.weights.writing import save

    wide = with_channels(dinov3.load("dinov3_vitt16"), 5)
    assert wide.origin.name == "custom"
    assert wide.origin.source.endswith("with 5 channels")
    again = dinov3.load(weights=save(wide, tmp_path / "wide.safetensors"))
    x = torch.randn(1, 5, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(x), wide(x))
    with pytest.raises(DinoError, match="takes 5 channels, not 3"):
        dinov3.embed(again, Image.new("RGB", (40, 40)))


@pytest.mark.parametrize("channels", [0, 2, -1])
def test_numbers_of_channels_that_say_nothing(channels: int) -> None:
    with pytest.raises(DinoError, match="1 channel, or 3 and more"):
        with_channels(small(SMALL[0]), channels)
    with pytest.raises(DinoError, match="three channels"):
        with_channels(with_channels(small(SMALL[0]), 4), 5)


def test_a_convnext_without_layer_scale_has_no_gamma_and_is_found_so_in_a_file() -> None:
    from dinov3.weights.configs import infer_config

    config = ConvNeXtConfig(depths=(1, 2, 1, 1), dims=(8, 8, 16, 16), layer_scale_init_value=0.0)
    model = ConvNeXt(config).eval()
    model.init_weights()
    keys = model.state_dict()
    assert not [key for key in keys if key.endswith("gamma")]
    x = torch.randn(1, 3, 32, 32)
    ones = ConvNeXt(ConvNeXtConfig(depths=(1, 2, 1, 1), dims=(8, 8, 16, 16), layer_scale_init_value=1.0)).eval()
    ones.load_state_dict(keys, strict=False)
    assert torch.equal(model(x), ones(x))  # the branch is added unscaled
    hint = {"layer_scale_init_value": 1e-6}
    for file, hints, found in ((keys, {}, 0), (keys, hint, 0), (ones.state_dict(), hint, 1e-6)):
        assert infer_config(file, hints).layer_scale_init_value == found  # type: ignore[union-attr]


@pytest.mark.parametrize("tokens", [7, 67])
def test_attention_of_a_training_step_in_bfloat16_on_a_cpu_is_as_exact_as_the_fused_kernel(tokens: int) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, tokens, 16).bfloat16().float().requires_grad_() for _ in range(3)]
    low = [x.detach().bfloat16().requires_grad_() for x in exact]
    seed = torch.randn(2, 3, tokens, 16).bfloat16()

    def results(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        y = function(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, seed.to(y.dtype))]

    truth = results(F.scaled_dot_product_attention, exact)
    fused, plain = results(F.scaled_dot_product_attention, low), results(attend, low)
    for t, f, p in zip(truth, fused, plain, strict=True):
        assert p.dtype == torch.bfloat16
        assert (p - t).norm() < 3 * (f - t).norm()
    assert torch.equal(attend(*exact), truth[0])  # other precisions and forward passes alone: the fused kernel
    with torch.no_grad():
        frozen = [x.detach() for x in low]
        assert torch.equal(attend(*frozen), F.scaled_dot_product_attention(*frozen))


@pytest.mark.parametrize("model", [tiny_vit(), tiny_convnext(patch_size=16)], ids=["vit", "convnext"])
def test_layers_as_maps_are_exported_with_a_free_batch(model: Any) -> None:
    class Maps(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = model

        def forward(self, x: torch.Tensor) -> Any:
            return self.backbone.get_intermediate_layers(x, n=2, reshape=True, return_class_token=True)

    program = torch.export.export(
        Maps(), (torch.zeros(3, 3, 32, 48),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    x = torch.rand(2, 3, 32, 48)
    for (maps, cls), (maps_, cls_) in zip(program.module()(x), Maps()(x)):
        torch.testing.assert_close(maps, maps_)
        torch.testing.assert_close(cls, cls_)
