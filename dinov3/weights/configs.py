"""A backbone's configuration out of shapes, and as the configuration files of transformers and timm say it; pure functions.

Where the two libraries cannot express a model, `refusals` says so in sentences. Legend as in `formats`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dinov3.errors import WeightsError
from dinov3.models.architectures import BackboneConfig, ConvNeXtConfig, ViTConfig
from dinov3.models.vit import RopeEmbedding
from dinov3.weights.catalog import ROWS, Row

Form = Literal["meta", "transformers", "timm"]
ROPE = ("pos_embed_rope_base", "pos_embed_rope_min_period", "pos_embed_rope_max_period")

# ---- from shapes ----------------------------------------------------------------------------------------------------


def infer_config(meta: Mapping[str, Tensor], hints: Mapping[str, Any] | None = None) -> BackboneConfig:
    """The configuration of a state dict in Meta's names, from its shapes, with `hints` for what shapes do not determine.

    A catalogue row with the same shapes gives its own values (`ffn_ratio`, alignment, rescale); `hints` (fields of the
    configuration, e.g. from `config_from_json`) win over both where they do not contradict a shape. The LayerNorm eps
    is 1e-5 unless hinted, as in every published file. Raises `WeightsError` if shapes are missing or make no sense.
    """
    hints = dict(hints or {})
    try:
        shaped = _convnext_shape(meta) if "downsample_layers.0.0.weight" in meta else _vit_shape(meta, hints)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise WeightsError(f"the file is incomplete: {error} is missing, so its architecture cannot be read") from None
    except (TypeError, ValueError) as error:
        raise WeightsError(f"the shapes in the file are those of no model ({error})") from None
    known = {f.name for f in fields(shaped)}
    free = {"img_size", "drop_path_rate", "patch_size"} & known
    if isinstance(shaped, ConvNeXtConfig) and shaped.layer_scale_init_value and hints.get("layer_scale_init_value"):
        free |= {"layer_scale_init_value"}
    if isinstance(shaped, ViTConfig):
        free = {k for k in known if k.startswith("pos_embed_rope_")} | {"img_size", "drop_path_rate"}
        free |= {"norm_layer"} if shaped.norm_layer != "rmsnorm" else set()
        free |= {"layerscale_init"} if shaped.layerscale_init is not None else set()
    hinted = {k: _checked(k, v, getattr(shaped, k)) for k, v in hints.items() if k in free}
    if isinstance(shaped, ViTConfig) and "rope_embed.periods" in meta:  # the file's own periods say the base
        hinted = {k: v for k, v in hinted.items() if k not in ROPE}
    for row in ROWS:
        if signature(row.config) == signature(shaped):
            return replace(row.config, **hinted)
    if isinstance(shaped, ViTConfig):  # another way to write the same FFN width, if the hints know it
        words: dict[str, Any] = {k: hints[k] for k in ("ffn_layer", "ffn_ratio") if k in hints}
        if words and replace(shaped, **words).ffn_hidden == shaped.ffn_hidden:
            hinted |= words
    return replace(shaped, **hinted)


def _count(numbers: Iterable[str], what: str) -> int:
    """How many blocks the keys number, from 0 without a gap."""
    found = {int(number) for number in numbers}
    if found and max(found) + 1 != len(found):
        raise WeightsError(f"the file numbers its {what} up to {max(found)}, but holds {len(found)} of them")
    if len(found) > 1000:  # the deepest published model has 40
        raise WeightsError(f"a model of {len(found)} {what} is none that DINOv3 builds")
    return len(found)


def _checked(key: str, value: Any, default: Any) -> Any:
    """A stated value, if it is of the kind of the default: text, a truth value, or a finite number or nothing."""
    if isinstance(default, (str, bool)):
        right = type(value) is type(default)
    else:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
        right = value is None or (number and (key not in ("img_size", "patch_size") or value >= 1))
    if not right:
        raise WeightsError(f"the configuration beside the weights says {key} = {value!r:.60}, which makes no sense")
    return value


def _convnext_shape(meta: Mapping[str, Tensor]) -> ConvNeXtConfig:
    stages = sum(1 for k in meta if k.startswith("downsample_layers.") and k.endswith(".0.weight"))
    blocks = [k.split(".") for k in meta if k.startswith("stages.") and k.endswith(".norm.weight")]
    depths = tuple(_count((j for _, i, j, *_ in blocks if int(i) == stage), "blocks") for stage in range(stages))
    dims = tuple(meta[f"stages.{i}.0.norm.weight"].shape[0] for i in range(stages))
    scale = ConvNeXtConfig.layer_scale_init_value if "stages.0.0.gamma" in meta else 0.0
    channels = meta["downsample_layers.0.0.weight"].shape[1]
    return ConvNeXtConfig(in_chans=channels, depths=depths, dims=dims, layer_scale_init_value=scale)


def _vit_shape(meta: Mapping[str, Tensor], hints: Mapping[str, Any]) -> ViTConfig:
    width, in_chans, patch, _ = meta["patch_embed.proj.weight"].shape
    depth = _count((k.split(".")[1] for k in meta if k.startswith("blocks.")), "blocks")
    if not depth:
        raise WeightsError("the file holds no transformer blocks")
    heads = heads_of(width, meta, hints)
    if heads < 1 or width % (4 * heads):
        raise WeightsError(f"{heads} heads do not divide the width {width}: the rope periods or config.json are wrong")
    first = "blocks.0."
    gated = first + "mlp.w1.weight" in meta
    hidden = meta[first + ("mlp.w1.weight" if gated else "mlp.fc1.weight")].shape[0]
    config = ViTConfig(
        patch_size=patch,
        in_chans=in_chans,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        ffn_layer="swiglu" if gated else "mlp",
        ffn_ratio=hidden * (1.5 if gated else 1.0) / width,
        qkv_bias=first + "attn.qkv.bias" in meta,
        mask_k_bias=first + "attn.qkv.bias_mask" in meta or first + "attn.qkv.bias" not in meta,
        ffn_bias=first + ("mlp.w1.bias" if gated else "mlp.fc1.bias") in meta,
        proj_bias=first + "attn.proj.bias" in meta,
        layerscale_init=1e-5 if first + "ls1.gamma" in meta else None,
        norm_layer="layernormbf16" if "norm.bias" in meta else "rmsnorm",
        n_storage_tokens=meta["storage_tokens"].shape[1] if "storage_tokens" in meta else 0,
        untie_cls_and_patch_norms="cls_norm.weight" in meta,
        untie_global_and_local_cls_norm="local_cls_norm.weight" in meta,
        **(rope_options(meta["rope_embed.periods"]) if "rope_embed.periods" in meta else {}),
    )
    if config.ffn_hidden != hidden:  # the ratio rounds down to one less: the next nominal width
        config = replace(config, ffn_ratio=(int(config.ffn_ratio * width) + 1) / width)
    if config.ffn_hidden != hidden:
        raise WeightsError(f"an FFN of {hidden} units is none that DINOv3 builds (SwiGLU widths are multiples of 8)")
    return config


def heads_of(width: int, meta: Mapping[str, Tensor], hints: Mapping[str, Any]) -> int:
    if "rope_embed.periods" in meta:
        return width // (4 * len(meta["rope_embed.periods"]))
    if "num_heads" in hints:
        heads = hints["num_heads"]
        if type(heads) is not int or not 1 <= heads <= width:
            raise WeightsError(f"the configuration beside the weights says {heads!r:.20} heads for a width of {width}")
        return heads
    for row in ROWS:
        if isinstance(row.config, ViTConfig) and row.config.embed_dim == width:
            return row.config.num_heads
    return max(width // 64, 1)


def rope_options(periods: Tensor) -> dict[str, Any]:
    """The constructor arguments (base, min, max) that give these periods [d/4], to the rounding of bfloat16."""
    p = periods.double()
    n = len(p)
    if n == 1:
        return dict(zip(ROPE, (100.0, None, None)))
    base = float(p[-1] ** (n / (n - 1)))
    short = float(f"{base:.2g}")
    base = short if abs(short / base - 1) < 0.01 else base  # 100.02, from bfloat16, means 100
    formula = base ** (torch.arange(n, dtype=torch.float64) / n)
    if bool(((formula / p - 1).abs() < 0.01).all()):
        return dict(zip(ROPE, (base, None, None)))
    return dict(zip(ROPE, (None, float(p[0]), float(p[-1]))))


def exact_periods(config: BackboneConfig) -> Tensor | None:
    """[d/4] float32: what the formula gives for a ViT; None for a ConvNeXt."""
    return RopeEmbedding(config).periods.float() if isinstance(config, ViTConfig) else None


def signature(config: BackboneConfig, *, without: Iterable[str] = ()) -> tuple[Any, ...]:
    """What decides keys, shapes and the function at inference: equal signatures load each other's weights."""
    if isinstance(config, ConvNeXtConfig):
        return (config.in_chans, tuple(config.depths), tuple(config.dims), bool(config.layer_scale_init_value))
    values = asdict(config) | {
        "ffn": (config.ffn_layer != "mlp", config.ffn_hidden),
        "scaled": bool(config.layerscale_init),
        "mask_k_bias": config.mask_k_bias and config.qkv_bias,
    }
    silent = {"img_size", "ffn_layer", "ffn_ratio", "drop_path_rate", "layerscale_init", "pos_embed_rope_dtype"}
    silent |= {f"pos_embed_rope_{x}_coords" for x in ("shift", "jitter", "rescale")} | set(without)
    return tuple(sorted((k, v) for k, v in values.items() if k not in silent))


def fitting_rows(config: BackboneConfig, form: Form) -> tuple[Row, ...]:
    """The catalogue rows of exactly this architecture, not counting what `form` never holds; Meta's first."""
    without = {"meta": (), "transformers": ("untie_global_and_local_cls_norm",)}.get(
        form, ("untie_global_and_local_cls_norm", "qkv_bias", "mask_k_bias")
    )
    wanted = signature(config, without=without)
    return tuple(r for r in ROWS if type(r.config) is type(config) and signature(r.config, without=without) == wanted)


# ---- as the libraries write it -------------------------------------------------------------------------------------

_EPS = {"layernorm": 1e-6, "layernormbf16": 1e-5}
_VIT_NAMES = {  # of transformers → ours: what a file states and its shapes do not
    "image_size": "img_size",
    "num_attention_heads": "num_heads",
    "layerscale_value": "layerscale_init",
    "drop_path_rate": "drop_path_rate",
    "rope_theta": "pos_embed_rope_base",
    **{f"pos_embed_{x}": f"pos_embed_rope_{x}_coords" for x in ("shift", "jitter", "rescale")},
}


def refusals(config: BackboneConfig, form: Form) -> list[str]:
    """Why `form` cannot hold this model (empty if it can)."""
    if form == "meta" or isinstance(config, ConvNeXtConfig):
        return []
    c, why = config, []
    if c.norm_layer == "rmsnorm":
        why.append("it has no RMSNorm")
    if c.layerscale_init is None or c.layerscale_init == 0:
        why.append("its blocks always have LayerScale")
    if c.untie_cls_and_patch_norms:
        why.append("it has one final norm for CLS and patches")
    if c.pos_embed_rope_base is None or c.pos_embed_rope_normalize_coords != "separate":
        why.append("its rope is the default one (base, coordinates normalised separately)")
    if form == "timm":
        if c.norm_layer != "layernormbf16":
            why.append("its LayerNorm eps is fixed at 1e-5")
        if not c.n_storage_tokens:
            why.append("its DINOv3 models have register tokens")
        if not (c.proj_bias and c.ffn_bias):
            why.append("its projections always have biases")
    return why


def transformers_config(config: BackboneConfig) -> dict[str, Any]:
    """The config.json with which `transformers` builds this model. Raises `WeightsError` if it cannot."""
    why = refusals(config, "transformers")
    if why:
        raise WeightsError(f"transformers cannot hold this model: {'; '.join(why)}")
    if isinstance(config, ConvNeXtConfig):
        return {
            "architectures": ["DINOv3ConvNextModel"],
            "model_type": "dinov3_convnext",
            "num_channels": config.in_chans,
            "hidden_sizes": list(config.dims),
            "depths": list(config.depths),
            "hidden_act": "gelu",
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-6,
            "layer_scale_init_value": config.layer_scale_init_value,
            "drop_path_rate": config.drop_path_rate,
            "image_size": 224,
        }
    c, gated = config, config.ffn_layer != "mlp"
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "patch_size": c.patch_size,
        "num_channels": c.in_chans,
        "hidden_size": c.embed_dim,
        "intermediate_size": c.ffn_hidden,
        "num_hidden_layers": c.depth,
        "num_register_tokens": c.n_storage_tokens,
        "hidden_act": "silu" if gated else "gelu",
        "use_gated_mlp": gated,
        "query_bias": c.qkv_bias,
        "key_bias": c.qkv_bias and not c.mask_k_bias,
        "value_bias": c.qkv_bias,
        "proj_bias": c.proj_bias,
        "mlp_bias": c.ffn_bias,
        "layer_norm_eps": _EPS[c.norm_layer],
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
    } | {theirs: getattr(c, ours) for theirs, ours in _VIT_NAMES.items()}


def timm_config(
    config: BackboneConfig,
    *,
    qkv_bias: bool,
    row: Row | None = None,
    mean: Iterable[float] = (0.485, 0.456, 0.406),
    std: Iterable[float] = (0.229, 0.224, 0.225),
) -> dict[str, Any]:
    """The config.json with which `timm.create_model("local-dir:…")` builds this model.

    `qkv_bias` chooses the `_qkvb` variant (see `has_qv_bias`). Pooling is set to "token" for ViTs, so that `model(x)`
    is Meta's output (timm's own default is the mean of the patches); `global_pool="avg"` in the call overrides it.
    A model that is no catalogue row is described by `model_args` on top of the small one. Raises `WeightsError` if timm
    cannot build it.
    """
    why = refusals(config, "timm")
    if why:
        raise WeightsError(f"timm cannot hold this model: {'; '.join(why)}")
    args: dict[str, Any] = {"num_classes": 0, "in_chans": config.in_chans}
    size = 256 if isinstance(config, ViTConfig) else 224
    if isinstance(config, ConvNeXtConfig):
        architecture, tag = (row.timm[0] if row and row.timm else "convnext_tiny.dinov3").split(".")
        width = config.dims[-1]
        if not row or not row.timm:
            args |= {"depths": list(config.depths), "dims": list(config.dims)}
    else:
        gated, width = config.ffn_layer != "mlp", config.embed_dim
        names = row.timm if row else ()
        name = next((n for n in names if ("_qkvb" in n or "lingbot" in n) == qkv_bias), None)
        fallback = "vit_small_plus_patch16_dinov3." if gated else "vit_small_patch16_dinov3."
        architecture, tag = (name or fallback).split(".")
        if name is None:
            architecture += "_qkvb" if qkv_bias else ""
            args |= {
                "patch_size": config.patch_size,
                "embed_dim": width,
                "depth": config.depth,
                "num_heads": config.num_heads,
                "mlp_ratio": config.ffn_hidden / width,  # timm's ratio is that of the real SwiGLU width
                "num_reg_tokens": config.n_storage_tokens,
                "rope_temperature": config.pos_embed_rope_base,
            }
        args["global_pool"] = "token"
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": width,
        "global_pool": args.get("global_pool", "avg"),
        "model_args": args,
        "pretrained_cfg": {
            "tag": tag,
            "custom_load": False,
            "input_size": [config.in_chans, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": None if isinstance(config, ViTConfig) else [7, 7],
            "first_conv": "patch_embed.proj" if isinstance(config, ViTConfig) else "stem.0",
            "classifier": "head" if isinstance(config, ViTConfig) else "head.fc",
            "license": row.licence.slug if row is not None else "unknown",
        },
    }


def is_dinov3_json(json: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a DINOv3 model (or one of its form) of transformers or timm."""
    timm = f"{json.get('architecture', '')}.{(json.get('pretrained_cfg') or {}).get('tag', '')}"
    named = any(word in timm for word in ("dinov3", "lingbot", "eupe"))
    return str(json.get("model_type", "")).startswith("dinov3_") or named


def config_from_json(json: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `transformers_config` and `timm_config`: fields of `ViTConfig` or `ConvNeXtConfig`, as hints.

    Only what the file states; shapes determine the rest. Raises `WeightsError` for an activation or eps that the architecture
    does not have.
    """
    if not is_dinov3_json(json):
        return {}
    if json.get("model_type") == "dinov3_convnext":
        _expect(json, "hidden_act", ("gelu",))
        _expect(json, "layer_norm_eps", (1e-6,))
        names = {"drop_path_rate": "drop_path_rate", "layer_scale_init_value": "layer_scale_init_value"}
    elif json.get("model_type") == "dinov3_vit":
        _expect(json, "hidden_act", ("silu",) if json.get("use_gated_mlp") else ("gelu",))
        _expect(json, "layer_norm_eps", tuple(_EPS.values()))
        names = _VIT_NAMES
    else:  # timm: the name says the architecture, `model_args` what differs from it
        args = json.get("model_args") or {}
        names = {"num_heads": "num_heads", "rope_temperature": "pos_embed_rope_base"}
        json = {k: args[k] for k in names if k in args}
    hints = {ours: json[theirs] for theirs, ours in names.items() if theirs in json}
    if "layer_norm_eps" in json and json.get("model_type") == "dinov3_vit":
        hints["norm_layer"] = next(k for k, eps in _EPS.items() if abs(eps - json["layer_norm_eps"]) < 1e-9)
    return hints


def _expect(json: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    value = json.get(key, allowed[0])
    if not any(value == a or (isinstance(a, float) and abs(float(value) - a) < 1e-9) for a in allowed):
        raise WeightsError(
            f"config.json says {key} = {value!r:.60}; DINOv3 models have {' or '.join(map(str, allowed))}"
        )
