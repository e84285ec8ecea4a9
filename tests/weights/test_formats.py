"""Translation between the three forms, against transformers and timm themselves as oracles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dinov3.errors import WeightsError
from dinov3.models.architectures import ConvNeXtConfig, ViTConfig
from dinov3.models.build import backbone
from dinov3.weights import catalog, configs, formats

HUB = {
    "layerscale_init": 1e-5,
    "norm_layer": "layernormbf16",
    "n_storage_tokens": 4,
    "mask_k_bias": True,
    "pos_embed_rope_rescale_coords": 2.0,
}
TINY = {
    "mlp": ViTConfig(embed_dim=64, depth=2, num_heads=2, **HUB),
    "swiglu": ViTConfig(embed_dim=64, depth=2, num_heads=1, ffn_layer="swiglu", ffn_ratio=6.0, **HUB),
    "7b-like": ViTConfig(
        embed_dim=64,
        depth=2,
        num_heads=2,
        ffn_layer="swiglu64",
        ffn_ratio=3.0,
        qkv_bias=False,
        untie_global_and_local_cls_norm=True,
        **HUB,
    ),
    "convnext": ConvNeXtConfig(depths=(1, 2, 2, 1), dims=(8, 16, 24, 32)),
}


def filled(config: ViTConfig | ConvNeXtConfig, *, seed: int = 0, rounded_periods: bool = False) -> nn.Module:
    """A small model in which every parameter matters: no zero biases, LayerScale near 1, noise in the masked K bias."""
    model = backbone(config)
    model.init_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            scale = 0.1 if p.ndim < 2 else p[0].numel() ** -0.5
            p.copy_(noise * scale + (1.0 if p.ndim < 2 and name.endswith(("weight", "gamma")) else 0.0))
        if rounded_periods:
            model.rope_embed.periods.copy_(model.rope_embed.periods.bfloat16().float())
    return model.eval()


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def transformers_model(config, state) -> nn.Module:
    """The library's own module with `state`, loaded strictly (its modules put `model.` before `layer` and `stages`)."""
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ViTConfig, DINOv3ViTModel

    about = configs.transformers_config(config)
    if isinstance(config, ConvNeXtConfig):
        model = DINOv3ConvNextModel(DINOv3ConvNextConfig(**about))
    else:
        model = DINOv3ViTModel(DINOv3ViTConfig(**about))
    prefix = "model." if any(k.startswith("model.") for k in model.state_dict()) else ""
    model.load_state_dict({prefix + k if k.startswith(("layer.", "stages.")) else k: v for k, v in state.items()})
    return model.eval()


def timm_model(config, state, *, qkv_bias: bool = True) -> nn.Module:
    import timm

    about = configs.timm_config(config, qkv_bias=qkv_bias)
    model = timm.create_model(about["architecture"], **about["model_args"])
    model.load_state_dict(state)
    return model.eval()


# ---- parity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (77, 101)])
@torch.no_grad()
def test_transformers_computes_the_same_tokens_with_our_converted_weights(name, size, oracles):
    config, x = TINY[name], images(*size)
    model = filled(config)
    state, _ = formats.from_meta(model.state_dict(), "transformers", config)
    theirs, ours = transformers_model(config, state)(x), model.forward_features(x)
    tokens = torch.cat([ours["x_norm_clstoken"][:, None], ours["x_storage_tokens"], ours["x_norm_patchtokens"]], dim=1)
    torch.testing.assert_close(theirs.last_hidden_state, tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.pooler_output, model(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
@torch.no_grad()
def test_timm_computes_the_same_tokens_with_our_converted_weights(name, size, oracles):
    config, x = TINY[name], images(*size)
    model = filled(config)
    state, _ = formats.from_meta(model.state_dict(), "timm", config)
    theirs = timm_model(config, state, qkv_bias=any("q_bias" in k for k in state))
    torch.testing.assert_close(theirs(x), model(x), atol=1e-5, rtol=0)
    if isinstance(config, ViTConfig):
        ours = model.forward_features(x)
        patches = theirs.forward_features(x)[:, 5:]
        torch.testing.assert_close(patches, ours["x_norm_patchtokens"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("form", ["transformers", "timm"])
@torch.no_grad()
def test_a_model_of_the_other_library_becomes_ours_with_the_same_output(name, form, oracles):
    config, x = TINY[name], images(64, 96)
    start, _ = formats.from_meta(filled(config, seed=3).state_dict(), form, config)
    theirs = transformers_model(config, start) if form == "transformers" else None
    theirs = theirs or timm_model(config, start, qkv_bias=any("q_bias" in k for k in start))
    hints = {"num_heads": config.num_heads} if isinstance(config, ViTConfig) else {}
    meta, _ = formats.to_meta(theirs.state_dict(), hints=hints)  # in-memory names, `model.layer.i` included
    found = configs.infer_config(meta, hints)
    model = backbone(found)
    model.load_state_dict(formats.complete(meta, found), strict=True)
    output = theirs(x).pooler_output if form == "transformers" else theirs(x)
    torch.testing.assert_close(model.eval()(x), output, atol=1e-5, rtol=0)


def test_a_layer_norm_eps_of_1e_6_reaches_transformers_and_comes_back(oracles):
    config = ViTConfig(embed_dim=64, depth=2, num_heads=2, **(HUB | {"norm_layer": "layernorm"}))
    model, x = filled(config), images(64, 64)
    about = configs.transformers_config(config)
    assert about["layer_norm_eps"] == 1e-6
    state, _ = formats.from_meta(model.state_dict(), "transformers", config)
    with torch.no_grad():
        theirs = transformers_model(config, state)
        torch.testing.assert_close(theirs(x).pooler_output, model(x), atol=1e-5, rtol=0)
    hints = configs.config_from_json(theirs.config.to_dict())
    assert configs.infer_config(formats.to_meta(state, hints=hints)[0], hints).norm_layer == "layernorm"


def test_an_acting_key_bias_reaches_transformers_and_is_refused_for_timm(oracles):
    config = ViTConfig(embed_dim=64, depth=2, num_heads=2, **(HUB | {"mask_k_bias": False}))
    model, x = filled(config), images(64, 64)
    state, _ = formats.from_meta(model.state_dict(), "transformers", config)
    with torch.no_grad():
        torch.testing.assert_close(transformers_model(config, state)(x).pooler_output, model(x), atol=1e-5, rtol=0)
    back, _ = formats.to_meta(state, hints={"num_heads": 2})
    assert configs.infer_config(back).mask_k_bias is False
    with pytest.raises(WeightsError, match="key bias acts"):
        formats.from_meta(model.state_dict(), "timm", config)


# ---- losslessness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("form", ["transformers", "timm"])
def test_with_the_residue_the_way_back_is_bit_for_bit(name, form):
    config = TINY[name]
    state = filled(config, rounded_periods=isinstance(config, ViTConfig)).state_dict()
    out, residue = formats.from_meta(state, form, config)
    back, _ = formats.to_meta(out)
    assert same(back | residue, dict(state))


@pytest.mark.parametrize("name", TINY)
def test_transformers_to_timm_and_back_is_bit_for_bit(name):
    config = TINY[name]
    start, _ = formats.from_meta(filled(config).state_dict(), "transformers", config)
    hints = {"num_heads": getattr(config, "num_heads", None)}
    meta, _ = formats.to_meta(start, hints=hints)
    there, residue = formats.from_meta(meta, "timm", configs.infer_config(meta))
    back, _ = formats.to_meta(there, hints=hints)
    again, _ = formats.from_meta(back | residue, "transformers", configs.infer_config(back | residue))
    assert same(again, start)


def test_without_the_residue_only_what_is_silent_at_inference_is_lost():
    config = TINY["mlp"]
    state = filled(config).state_dict()
    for form in ("transformers", "timm"):
        out, _ = formats.from_meta(state, form, config)
        back, _ = formats.to_meta(out, hints={"num_heads": 2})
        differing = {k.split(".", 2)[-1] for k in state if not torch.equal(state[k], back[k])}
        assert differing <= {"attn.qkv.bias", "mask_token"}
        assert torch.equal(back["blocks.0.attn.qkv.bias"][64:128], torch.zeros(64))


def test_timm_names_carry_biases_only_when_one_is_nonzero(oracles):
    config = TINY["mlp"]
    model = filled(config)
    state = model.state_dict()
    assert "blocks.0.attn.q_bias" in formats.from_meta(state, "timm", config)[0]
    for key in state:
        if key.endswith("qkv.bias"):
            state[key][:64] = 0
            state[key][128:] = 0
    out, residue = formats.from_meta(state, "timm", config)
    assert "blocks.0.attn.q_bias" not in out
    with torch.no_grad():
        x = images(64, 64)
        torch.testing.assert_close(timm_model(config, out, qkv_bias=False)(x), model(x), atol=1e-5, rtol=0)
    assert same(formats.to_meta(out)[0] | residue, dict(state))


def test_rope_periods_are_kept_or_recomputed_as_asked():
    state = filled(TINY["mlp"], rounded_periods=True).state_dict()
    kept = formats.to_meta(state)[0]["rope_embed.periods"]
    assert torch.equal(kept, state["rope_embed.periods"])
    exact = formats.to_meta(state, periods="exact")[0]["rope_embed.periods"]
    assert torch.equal(exact, backbone(TINY["mlp"]).rope_embed.periods)
    assert torch.equal(formats.to_meta(state, periods="bf16")[0]["rope_embed.periods"], exact.bfloat16().float())
    out, _ = formats.from_meta(state, "transformers", TINY["mlp"])
    assert torch.equal(formats.to_meta(out, hints={"num_heads": 2})[0]["rope_embed.periods"], exact)


def test_conv_mlp_shapes_of_timm_are_accepted(oracles):
    import timm

    args = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 0, "conv_mlp": True}
    theirs, x = timm.create_model("convnext_tiny", **args).eval(), images(64, 96)
    meta, _ = formats.to_meta(theirs.state_dict())
    model = backbone(configs.infer_config(meta)).eval()
    model.load_state_dict(meta, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), atol=1e-5, rtol=0)


# ---- recognising ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: (
            {f"teacher.backbone.{k}": v for k, v in s.items()} | {"teacher.dino_head.mlp.0.weight": torch.ones(1)}
        ),
        lambda s: (
            {f"student.module.backbone.{k}": v + 1 for k, v in s.items()}
            | {f"teacher.module.backbone.{k}": v for k, v in s.items()}
            | {"iteration": torch.ones(1)}
        ),
        lambda s: s | {"head.weight": torch.ones(3, 64), "head.bias": torch.ones(3)},
    ],
    ids=["ddp", "compiled", "teacher", "student-and-teacher", "with-a-classifier"],
)
def test_wrapped_checkpoints_are_unwrapped(wrap):
    state = dict(filled(TINY["mlp"]).state_dict())
    meta, _ = formats.to_meta(wrap(state))
    assert same(meta, state)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], "no tensors"),
        (["weight", "bias"], "linear classifier.*dinov3_vit7b16_lc"),
        (["reassemble_blocks.readout_projects.0.0.weight", "conv_depth.head.0.weight"], "dinov3_vitl16_chmv2"),
        (["reassemble_blocks.projects.0.conv.weight", "conv_depth.head.0.weight"], "dinov3_vit7b16_dd"),
        (["model.transformer.decoder.norm.weight", "model.class_embed.0.bias"], "dinov3_vit7b16_de.*backbone_weights="),
        (["segmentation_model.0.spm.stem.0.weight"], "dinov3_vit7b16_ms"),
        (["text_model.head.linear_projection.weight", "visual_model.head.ln_final.bias"], "dinotxt"),
        (["dino_head.mlp.0.weight"], "projection heads"),
        (["embeddings.position_embeddings", "encoder.layer.0.norm1.weight"], "learned positions"),
        (["pos_embed", "blocks.0.0.ls1.gamma"], "pos_embed"),
        (["features.0.weight"], "not those of a DINOv3 backbone"),
        (["pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma"], "DINOv2"),
        (["pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"], "DINO v1"),
        (["downsample_layers.0.0.weight", "stages.0.0.dwconv.weight", "head.weight"], "supervised ConvNeXt"),
    ],
)
def test_files_that_are_no_dinov3_backbone_are_named_in_one_sentence(keys, expected):
    with pytest.raises(WeightsError, match=expected) as caught:
        formats.detect(keys)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_rope_224",
        "vit_medium_patch16_rope_reg1_gap_256",
        "convnextv2_atto",
        "resnet10t",
    ],
)
def test_other_models_of_timm_are_refused(name, oracles):
    import timm

    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    with pytest.raises(WeightsError, match=r"not (of|those of)"):
        formats.to_meta(state)


@pytest.mark.parametrize("name", ["Dinov2WithRegisters", "ViT", "ConvNext", "ConvNextV2", "CLIPVision", "Swin"])
def test_other_models_of_transformers_are_refused(name, oracles):
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")())
    with pytest.raises(WeightsError, match=r"not (of|those of)|is not DINOv3"):
        formats.to_meta(model.state_dict())


def test_two_unequal_names_of_the_final_norm_are_reported():
    state = dict(filled(TINY["convnext"]).state_dict())
    state["norms.3.weight"] = state["norms.3.weight"] + 1
    with pytest.raises(WeightsError, match=r"norm\.weight and norms\.3\.weight"):
        formats.to_meta(state)


def test_a_missing_second_name_of_the_final_norm_is_filled_in():
    state = dict(filled(TINY["convnext"]).state_dict())
    short = {k: v for k, v in state.items() if not k.startswith("norms.")}
    assert same(formats.to_meta(short)[0], state)


# ---- configurations ------------------------------------------------------------------------------------------------


def shapes_of(config) -> dict[str, Tensor]:
    with torch.device("meta"):
        state = dict(backbone(config).state_dict())
    if isinstance(config, ViTConfig):
        state["rope_embed.periods"] = configs.exact_periods(config).bfloat16().float()
    return state


@pytest.mark.parametrize("row", catalog.ROWS, ids=lambda r: r.id)
def test_every_published_architecture_is_read_from_its_shapes(row):
    found = configs.infer_config(shapes_of(row.config))
    assert found == row.config
    assert row in configs.fitting_rows(found, "meta")
    ours = [r for r in configs.fitting_rows(found, "meta") if not r.known_by_name]
    assert len(ours) == (2 if row.arch == "dinov3_vit7b16" else 1)


@pytest.mark.parametrize("row", catalog.ROWS, ids=lambda r: r.id)
def test_every_published_architecture_has_a_configuration_in_both_libraries(row, oracles):
    import timm
    from transformers import AutoConfig, AutoModel

    about = configs.transformers_config(row.config)
    meta_state = shapes_of(row.config)
    for key in list(meta_state):
        if key.endswith(".bias_mask"):
            meta_state[key] = formats.k_mask(meta_state[key].shape[0] // 3)
        elif key.endswith("qkv.bias"):
            meta_state[key] = torch.zeros(meta_state[key].shape)
    with torch.device("meta"):
        theirs = AutoModel.from_config(AutoConfig.for_model(**about)).state_dict()
    ours, _ = formats.from_meta(meta_state, "transformers", row.config)
    assert {k.removeprefix("model."): v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}
    plain, _ = formats.from_meta(meta_state, "timm", row.config)
    about = configs.timm_config(row.config, qkv_bias=False, row=row)
    with torch.device("meta"):
        theirs = timm.create_model(about["architecture"], **about["model_args"]).state_dict()
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in plain.items()}
    if row.timm and not (row.known_by_name and isinstance(row.config, ViTConfig)):  # those have biases that act
        assert f"{about['architecture']}.{about['pretrained_cfg']['tag']}" in row.timm


@pytest.mark.parametrize(
    ("options", "form", "reason"),
    [
        ({"norm_layer": "rmsnorm"}, "transformers", "RMSNorm"),
        ({"layerscale_init": None}, "timm", "LayerScale"),
        ({"untie_cls_and_patch_norms": True}, "transformers", "one final norm"),
        ({"norm_layer": "layernorm"}, "timm", "eps"),
        ({"pos_embed_rope_normalize_coords": "max"}, "timm", "rope"),
    ],
)
def test_a_model_that_the_target_cannot_express_is_refused_with_the_reason(options, form, reason):
    config = ViTConfig(embed_dim=64, depth=1, num_heads=2, **(HUB | options))
    with pytest.raises(WeightsError, match=reason):
        formats.from_meta(filled(config).state_dict(), form, config)


def test_unusual_architectures_are_inferred_from_shapes():
    config = ViTConfig(
        embed_dim=48,
        depth=1,
        num_heads=3,
        patch_size=8,
        in_chans=4,
        norm_layer="rmsnorm",
        untie_cls_and_patch_norms=True,
        ffn_layer="swiglu32",
        ffn_ratio=2.0,
        ffn_bias=False,
        proj_bias=False,
        qkv_bias=False,
        pos_embed_rope_base=None,
        pos_embed_rope_min_period=2.0,
        pos_embed_rope_max_period=9.0,
    )
    state = filled(config).state_dict()
    found = configs.infer_config(state)
    assert configs.signature(found) == configs.signature(config)
    backbone(found).load_state_dict(state, strict=True)


def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(tmp_path, monkeypatch):
    from dinov3.errors import WeightsError
    from dinov3.weights import writing

    path = tmp_path / "w.pth"
    writing.write_torch({"x": torch.ones(3)}, path)

    def full(value, file):
        file.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 758784 vs 758672\nmore")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(WeightsError, match=r"could not be written, perhaps because the disk is full .*758672\)$"):
        writing.write_torch({"x": torch.zeros(3)}, path)
    assert torch.load(path, weights_only=True)["x"].sum() == 3
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]
