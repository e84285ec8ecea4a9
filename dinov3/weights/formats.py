"""The three ways DINOv3 weights are written (Meta's .pth, transformers, timm): recognised, and translated both ways.

Everything here is a pure function on state dicts; configurations are `configs`, files are `loading`.
Meta's key names are the pivot: a model of this package has them, and any form reaches any other through them.

What a form cannot hold is the *residue*: the loaded rope periods (transformers and timm recompute them), the masked
third of the qkv bias and its mask, the mask token (timm), `local_cls_norm`, all-zero Q and V biases (timm). None of it
changes the output at inference except the periods: published files hold them rounded to bfloat16, which moves outputs
by 2e-3 to 4e-3 against the exact ones the two libraries compute. `from_meta` returns the residue apart; a dict update
puts it back bit for bit. Without a residue, `to_meta` fills in: K bias 0, mask 1/0/1, exact periods, mask token 0.

Legend: D width, d = D/h head width, R registers, K/Q/V thirds of `qkv`; `#` in a key template is a number.

Sources: the key lists and config fields of the public libraries (transformers 5, timm 1.0), checked against both by
tests. Left out: models that only one side can express (RMSNorm, no LayerScale, untied CLS norm, min/max periods):
refused with a sentence. Also left out: heads; CHMv2 in transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dinov3.errors import WeightsError
from dinov3.models.architectures import BackboneConfig, ConvNeXtConfig, ViTConfig
from dinov3.models.vit import RopeEmbedding
from dinov3.weights.configs import ROPE, Form, heads_of, refusals, rope_options

Family = Literal["vit", "convnext"]
Periods = Literal["source", "exact", "bf16"]
FORMS: tuple[Form, ...] = ("meta", "transformers", "timm")
State = dict[str, Tensor]

# ---- the tables of names -------------------------------------------------------------------------------------------
# `.*` stands for `.weight` and `.bias`, `-` for "cannot be held"; the q/k/v split is code below.

_VIT = """
cls_token                   embeddings.cls_token                cls_token
storage_tokens              embeddings.register_tokens          reg_token
mask_token                  embeddings.mask_token               -
patch_embed.proj.*          embeddings.patch_embeddings.*       patch_embed.proj.*
blocks.#.norm1.*            layer.#.norm1.*                     blocks.#.norm1.*
blocks.#.attn.qkv.weight    -                                   blocks.#.attn.qkv.weight
blocks.#.attn.proj.*        layer.#.attention.o_proj.*          blocks.#.attn.proj.*
blocks.#.ls1.gamma          layer.#.layer_scale1.lambda1        blocks.#.gamma_1
blocks.#.norm2.*            layer.#.norm2.*                     blocks.#.norm2.*
blocks.#.ls2.gamma          layer.#.layer_scale2.lambda1        blocks.#.gamma_2
norm.*                      norm.*                              norm.*
"""
_MLP = """
blocks.#.mlp.fc1.*          layer.#.mlp.up_proj.*               blocks.#.mlp.fc1.*
blocks.#.mlp.fc2.*          layer.#.mlp.down_proj.*             blocks.#.mlp.fc2.*
"""
_SWIGLU = """
blocks.#.mlp.w1.*           layer.#.mlp.gate_proj.*             blocks.#.mlp.fc1_g.*
blocks.#.mlp.w2.*           layer.#.mlp.up_proj.*               blocks.#.mlp.fc1_x.*
blocks.#.mlp.w3.*           layer.#.mlp.down_proj.*             blocks.#.mlp.fc2.*
"""
# timm's `stages.0.downsample.` is spelled `stem.`: see _SPELLING.
_CONVNEXT = """
downsample_layers.#.#.*     stages.#.downsample_layers.#.*      stages.#.downsample.#.*
stages.#.#.gamma            stages.#.layers.#.gamma             stages.#.blocks.#.gamma
stages.#.#.dwconv.*         stages.#.layers.#.depthwise_conv.*  stages.#.blocks.#.conv_dw.*
stages.#.#.norm.*           stages.#.layers.#.layer_norm.*      stages.#.blocks.#.norm.*
stages.#.#.pwconv1.*        stages.#.layers.#.pointwise_conv1.* stages.#.blocks.#.mlp.fc1.*
stages.#.#.pwconv2.*        stages.#.layers.#.pointwise_conv2.* stages.#.blocks.#.mlp.fc2.*
norm.*                      layer_norm.*                        head.norm.*
"""
_SPELLING = {"timm": ("stages.0.downsample.", "stem."), "transformers": ("", "")}


def _names(family: Family, form: Form, gated: bool) -> dict[str, str]:
    """Key template in Meta's words → in `form`'s."""
    text = _CONVNEXT if family == "convnext" else _VIT + (_SWIGLU if gated else _MLP)
    pairs: dict[str, str] = {}
    for line in filter(None, text.splitlines()):
        words = line.split()
        meta, other = words[0], words[FORMS.index(form)]
        if other != "-":
            for leaf in ("weight", "bias"):
                pairs[meta.replace("*", leaf)] = other.replace("*", leaf)
    return pairs


def _rename(key: str, names: Mapping[str, str]) -> str | None:
    """`blocks.3.norm1.bias` → `layer.3.norm1.bias`: numbers keep their order. None for a key not in the table."""
    parts = key.split(".")
    target = names.get(".".join("#" if p.isdigit() else p for p in parts))
    if target is None:
        return None
    numbers = iter([p for p in parts if p.isdigit()])
    return ".".join(next(numbers) if p == "#" else p for p in target.split("."))


# ---- recognising ---------------------------------------------------------------------------------------------------

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclass(frozen=True)
class Detected:
    """What a set of keys is: the form, the family, and the prefix under which the backbone lies ("" if at the root)."""

    form: Form
    family: Family
    prefix: str


def unwrapped(key: str) -> str:
    """A key without the components that DDP, FSDP, activation checkpointing and torch.compile put into it."""
    return ".".join(p for p in key.split(".") if p not in _WRAPPERS)


# What identifies a backbone: a key that each form has exactly once, and one more that must stand beside it.
_ANCHORS: tuple[tuple[str, Form, Family, tuple[str, ...]], ...] = (
    ("embeddings.patch_embeddings.weight", "transformers", "vit", ("layer.0.", "model.layer.0.")),
    ("stages.0.downsample_layers.0.weight", "transformers", "convnext", ("stages.0.layers.0.depthwise_conv.",)),
    ("stem.0.weight", "timm", "convnext", ("stages.0.blocks.0.conv_dw.",)),
    ("downsample_layers.0.0.weight", "meta", "convnext", ("stages.0.0.dwconv.",)),
    ("patch_embed.proj.weight", "timm", "vit", ("blocks.0.gamma_1",)),
    ("patch_embed.proj.weight", "meta", "vit", ("blocks.0.attn.qkv.weight",)),
)


def detect(keys: Iterable[str]) -> Detected:
    """The form and family of a state dict, by its keys alone (wrapper components such as `module.` do not matter).

    Several backbones in one dict (a training checkpoint): the teacher's, else the exponential average's. Raises
    `WeightsError` with one sentence for an empty dict, a head's file, or another model.
    """
    known = {unwrapped(k) for k in keys}
    if not known:
        raise WeightsError("the file holds no tensors")
    found: dict[str, Detected] = {}
    for anchor, form, family, beside in _ANCHORS:
        for key in known:
            prefix = key.removesuffix(anchor)
            if prefix == key or (prefix and not prefix.endswith(".")) or prefix in found:
                continue
            if any(k.startswith(tuple(prefix + b for b in beside)) for k in known):
                if (form, family) == ("transformers", "convnext"):
                    # the stages lie under `model.` in transformers 5's modules, the final norm beside it
                    outer = prefix.removesuffix("model.")
                    prefix = outer if outer + "layer_norm.weight" in known else prefix
                found[prefix] = Detected(form, family, prefix)
    if not found:
        raise WeightsError(_what_it_is_instead(known))
    if len(found) > 1:
        for preferred in ("teacher", "ema"):
            chosen = [d for prefix, d in found.items() if preferred in prefix and "gram" not in prefix]
            if len(chosen) == 1:
                found = {chosen[0].prefix: chosen[0]}
                break
        else:
            shown = ", ".join(repr(p) for p in sorted(found)[:4])
            raise WeightsError(f"the file holds {len(found)} backbones (under {shown}); save the one you mean alone")
    detected = next(iter(found.values()))
    _refuse_relatives(known, detected)
    return detected


def _refuse_relatives(known: set[str], detected: Detected) -> None:
    """DINOv2, DINO and plain ViTs share most key names; ImageNet ConvNeXts share all of them."""
    p = detected.prefix
    if p + "pos_embed" in known:
        if p + "blocks.0.ls1.gamma" in known:
            what = "DINOv2 or a ViT like it"
        else:
            what = "DINO v1 or another plain ViT"
        raise WeightsError(f"these are the weights of {what} (learned pos_embed), not of a DINOv3 model")
    if detected.form == "timm" and detected.family == "vit" and not {p + "cls_token", p + "reg_token"} <= known:
        raise WeightsError("these are the weights of another timm ViT (no CLS or no register tokens), not of DINOv3")
    if any(k.startswith(p) and ".grn." in k for k in known):
        raise WeightsError("these are ConvNeXt V2 weights (they hold grn.*), not those of a DINOv3 model")
    if detected == Detected("meta", "convnext", p) and p + "head.weight" in known and p + "norms.3.weight" not in known:
        raise WeightsError("these are supervised ConvNeXt weights (a classifier and no norms.3), not DINOv3's")


_HEAD_USE = "call {0}(weights=<this file>, backbone_weights=<a backbone file>), or load a backbone file here"


def _what_it_is_instead(known: set[str]) -> str:
    known = {k.removeprefix("model.").removeprefix("state_dict.") for k in known}

    def has(*starts: str) -> bool:
        return all(any(k.startswith(s) for k in known) for s in starts)

    heads = (
        (known == {"weight", "bias"}, "the ImageNet-1k linear classifier", "dinov3_vit7b16_lc"),
        (has("reassemble_blocks.readout_projects."), "the canopy height head (CHMv2)", "dinov3_vitl16_chmv2"),
        (has("reassemble_blocks.", "conv_depth."), "the SYNTHMIX depth head", "dinov3_vit7b16_dd"),
        (has("transformer.decoder.", "class_embed."), "the COCO detection head", "dinov3_vit7b16_de"),
        (has("segmentation_model."), "the ADE20k Mask2Former head", "dinov3_vit7b16_ms"),
        (has("text_model.", "visual_model.head."), "the dino.txt text encoder", "dinov3_vitl16_dinotxt_tet1280d20h24l"),
    )
    for matches, what, function in heads:
        if matches:
            return f"the file holds only {what}, no backbone: " + _HEAD_USE.format(function)
    if has("dino_head.") or has("ibot_head."):
        return "the file holds only projection heads of pre-training (dino_head, ibot_head), no backbone"
    if any(k.endswith("pos_embed") for k in known):
        return "these are the weights of another ViT (learned pos_embed, e.g. DINOv2), not of a DINOv3 model"
    if any(k.endswith("embeddings.position_embeddings") for k in known):
        return "these are transformers weights of a ViT with learned positions (DINOv2 or another), not of DINOv3"
    if any("encoder.stages." in k for k in known):
        return "these are transformers weights of a ConvNeXt that is not DINOv3's"
    if any("lora_" in k for k in known):
        return "the file holds a LoRA adapter, no backbone: merge it into its base model first"
    return f"the {len(known)} tensors of this file are not those of a DINOv3 backbone (e.g. {min(known)!r})"


# ---- to Meta's names -----------------------------------------------------------------------------------------------

_DROPPED_HEADS = ("head.", "classifier.", "linear_head.", "dino_head.", "ibot_head.", "fc_norm.")


def to_meta(
    state: Mapping[str, Tensor],
    detected: Detected | None = None,
    *,
    hints: Mapping[str, Any] | None = None,
    periods: Periods = "source",
) -> tuple[State, list[str]]:
    """A state dict in Meta's names, and notes on what was left out or filled in.

    `hints` are `ViTConfig` fields known from elsewhere (`num_heads`, `pos_embed_rope_base`); without them heads are 64
    wide, 128 at width 4096. `periods`: "source" keeps what the file holds and otherwise computes what the file's
    library would (float32, exact); "exact" and "bf16" (the rounding of the published files) recompute. Values are not
    copied where a view will do. Keys that the form does not know are passed through, so that a strict comparison with
    a model names them. Raises `WeightsError` as `detect` does, and if a ConvNeXt's two copies of the final norm differ.
    """
    detected = detected or detect(state)
    hints, notes = hints or {}, []
    inside: State = {}
    outside: set[str] = set()
    around = detected.prefix.removesuffix("backbone.")  # "teacher.": what is left out is teacher.dino_head, not teacher
    for key, value in state.items():
        plain = unwrapped(key)
        if not plain.startswith(detected.prefix):
            known = around if plain.startswith(around) else ""
            outside.add(known + plain.removeprefix(known).split(".")[0])
            continue
        plain = plain.removeprefix(detected.prefix)
        is_norm = detected.family == "convnext" and plain.startswith("head.norm.")
        if plain.startswith(_DROPPED_HEADS) and not is_norm:
            outside.add(plain.split(".")[0])
        else:
            inside[plain] = value.detach()
    if outside:
        notes.append(f"left out, not part of the backbone: {', '.join(f'{o}.*' for o in sorted(outside)[:4])}")

    if detected.form == "timm" and detected.family == "convnext" and any(".head.fc." in f".{k}" for k in state):
        notes.append("the file has a classifier: keys cannot tell a fine-tuned DINOv3 ConvNeXt from a supervised one")

    if detected.form == "meta":
        meta = inside
    elif detected.family == "convnext":
        meta = _convnext_to_meta(inside, detected.form)
    else:
        meta = _vit_to_meta(inside, detected.form)

    if detected.family == "convnext":
        alias_final_norm(meta)
    else:
        had = "rope_embed.periods" in meta
        if periods != "source" or not had:
            meta["rope_embed.periods"] = _periods(meta, hints, bf16=periods == "bf16")
        if detected.form == "meta" and not had:
            notes.append("the file holds no rope periods; computed from the formula")
        if "mask_token" not in meta and "cls_token" in meta:
            meta["mask_token"] = torch.zeros_like(meta["cls_token"][0])
        if detected.form == "meta":
            _complete_k_masks(meta, hints)
    return meta, notes


def _vit_to_meta(inside: State, form: Form) -> State:
    gated = any(".mlp.gate_proj." in k or ".mlp.fc1_g." in k for k in inside)
    names = {v: k for k, v in _names("vit", form, gated).items()}
    thirds: dict[tuple[str, str], dict[str, Tensor]] = {}  # (block, weight|bias) → its q, k, v
    meta: State = {}
    for key, value in inside.items():
        key = key.removeprefix("model.")
        parts = key.split(".")
        if form == "transformers" and parts[2:3] == ["attention"] and parts[3] in ("q_proj", "k_proj", "v_proj"):
            thirds.setdefault((parts[1], parts[4]), {})[parts[3][0]] = value
        elif form == "timm" and parts[2:3] == ["attn"] and parts[3] in ("q_bias", "k_bias", "v_bias"):
            thirds.setdefault((parts[1], "bias"), {})[parts[3][0]] = value
        elif key in ("rope_embeddings.inv_freq", "rope.periods"):
            continue  # never in a saved file, but in a dict made by hand
        else:
            meta[_rename(key, names) or key] = value
    if "mask_token" in meta:
        meta["mask_token"] = meta["mask_token"].reshape(1, -1)  # [1, 1, D] there, [1, D] here
    if "storage_tokens" in meta and meta["storage_tokens"].shape[1] == 0:
        del meta["storage_tokens"]
    for (block, leaf), third in thirds.items():
        if leaf == "weight":
            if third.keys() == {"q", "k", "v"}:
                meta[f"blocks.{block}.attn.qkv.weight"] = torch.cat([third["q"], third["k"], third["v"]])  # [3D, D]
            continue
        zero = torch.zeros_like(next(iter(third.values())))
        meta[f"blocks.{block}.attn.qkv.bias"] = torch.cat([third.get(x, zero) for x in "qkv"])  # [3D]
        if "k" not in third:
            meta[f"blocks.{block}.attn.qkv.bias_mask"] = k_mask(len(zero)).to(zero)
    return meta


def k_mask(width: int) -> Tensor:
    """[3D] of 1/0/1 by thirds: the key bias never acts."""
    return torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(width)


def _complete_k_masks(meta: State, hints: Mapping[str, Any]) -> None:
    if hints.get("mask_k_bias") and not any(k.endswith(".bias_mask") for k in meta):
        for key in [k for k in meta if k.endswith(".attn.qkv.bias")]:
            meta[key + "_mask"] = k_mask(len(meta[key]) // 3).to(meta[key])


def _convnext_to_meta(inside: State, form: Form) -> State:
    names = {v: k for k, v in _names("convnext", form, False).items()}
    long, short = _SPELLING[form]
    meta: State = {}
    for key, value in inside.items():
        key = key.removeprefix("model.")
        if short and key.startswith(short):
            key = long + key.removeprefix(short)
        name = _rename(key, names) or key
        if ".pwconv" in name and value.ndim == 4:
            value = value.flatten(1)  # timm's conv_mlp: [4c, c, 1, 1]
        meta[name] = value
    if "norm.weight" not in meta:
        raise WeightsError("this ConvNeXt file has no final norm (saved from a DINOv3ConvNextBackbone?)")
    return meta


def alias_final_norm(meta: State) -> None:
    """ConvNeXt files hold the final norm under two names; the module has one."""
    last = sum(1 for k in meta if k.startswith("downsample_layers.") and k.endswith(".0.weight")) - 1
    for leaf in ("weight", "bias"):
        one, other = f"norm.{leaf}", f"norms.{last}.{leaf}"
        if one in meta and other in meta and not torch.equal(meta[one], meta[other]):
            raise WeightsError(f"{one} and {other} are two names of one tensor, but differ in this file: it is damaged")
        if one in meta or other in meta:
            meta[one] = meta[other] = meta.get(one, meta.get(other))  # type: ignore[assignment]


def _periods(meta: State, hints: Mapping[str, Any], *, bf16: bool) -> Tensor:
    """[d/4] float32 by the formula of the paper's rope; `bf16` rounds them as the published files are."""
    if "rope_embed.periods" in meta:
        options = rope_options(meta["rope_embed.periods"])
    else:
        options = {k: hints[k] for k in ROPE if k in hints}
    width = meta["norm.weight"].shape[0] if "norm.weight" in meta else meta["cls_token"].shape[-1]
    heads = heads_of(width, meta, hints)
    exact = RopeEmbedding(ViTConfig(embed_dim=width, num_heads=heads, **options)).periods
    return exact.bfloat16().float() if bf16 else exact


def complete(meta: State, config: BackboneConfig) -> State:
    """Adds what a foreign form never holds and `config` needs, with values that change no output at inference:
    `local_cls_norm` := `norm`; an all-zero qkv bias, with its mask (timm's plain models)."""
    if not isinstance(config, ViTConfig):
        return meta
    meta = dict(meta)
    for leaf in ("weight", "bias"):
        if config.untie_global_and_local_cls_norm and f"norm.{leaf}" in meta:
            meta.setdefault(f"local_cls_norm.{leaf}", meta[f"norm.{leaf}"].clone())
    for key in [k for k in meta if k.endswith(".attn.qkv.weight")] if config.qkv_bias else []:
        bias = key.removesuffix("weight") + "bias"
        if bias not in meta:
            meta[bias] = meta[key].new_zeros(len(meta[key]))
        if config.mask_k_bias:
            meta.setdefault(bias + "_mask", k_mask(len(meta[key]) // 3).to(meta[bias]))
    return meta


# ---- from Meta's names ---------------------------------------------------------------------------------------------


def from_meta(state: Mapping[str, Tensor], form: Form, config: BackboneConfig) -> tuple[State, State]:
    """`state` (Meta's names) in the names of `form`, and the residue: what that form cannot hold, in Meta's names.

    transformers keys are those of files on the hub (`layer.i`, `stages.i`). timm keys are those of the `_qkvb` models
    if any Q or V bias is nonzero, else of the plain ones. `to_meta(out)` updated with the residue is `state` again, bit
    for bit. Raises `WeightsError` if the form cannot express the model (see `refusals`).
    """
    why = refusals(config, form)
    if why:
        raise WeightsError(f"{form} cannot hold this model: {'; '.join(why)}")
    if form == "meta":
        return dict(state), {}
    if isinstance(config, ConvNeXtConfig):
        return _convnext_from_meta(state, form), {}
    names = _names("vit", form, config.ffn_layer != "mlp")
    with_bias = form == "transformers" or has_qv_bias(state)
    out: State = {}
    residue: State = {}
    for key, value in state.items():
        parts = key.split(".")
        renamed = _rename(key, names)
        if renamed is not None:
            out[renamed] = value[None] if key == "mask_token" else value
        elif key.endswith(".attn.qkv.weight"):
            for x, third in zip("qkv", value.chunk(3)):
                out[f"layer.{parts[1]}.attention.{x}_proj.weight"] = third
        elif key.endswith(".attn.qkv.bias"):
            q, k, v = value.chunk(3)
            mask = state.get(key + "_mask")
            if mask is not None and not torch.equal(mask.float().cpu(), k_mask(len(q))):
                raise WeightsError(f"{key}_mask is not 1/0/1: the model was saved before init_weights()")
            k_acts = mask is None and bool(k.count_nonzero())
            if k_acts and form == "timm":
                raise WeightsError("timm cannot hold this model: its key bias acts (mask_k_bias is off)")
            if with_bias:
                name = {"timm": "blocks.{}.attn.{}_bias", "transformers": "layer.{}.attention.{}_proj.bias"}[form]
                kept = {"q": q, "k": k, "v": v} if mask is None and form == "transformers" else {"q": q, "v": v}
                out |= {name.format(parts[1], x): third for x, third in kept.items()}
            residue[key] = value  # whole: three thirds cost little and go back by a plain update
        else:
            residue[key] = value
    if form == "transformers" and "storage_tokens" not in state:
        cls = state["cls_token"]
        out["embeddings.register_tokens"] = cls.new_zeros(1, 0, cls.shape[-1])
    return out, residue


def _convnext_from_meta(state: Mapping[str, Tensor], form: Form) -> State:
    names = _names("convnext", form, False)
    long, short = _SPELLING[form]
    out: State = {}
    for key, value in state.items():
        if key.startswith("norms."):
            continue
        name = _rename(key, names)
        if name is None:
            raise WeightsError(f"{key} is not a ConvNeXt key")
        out[short + name.removeprefix(long) if short and name.startswith(long) else name] = value
    return out


def has_qv_bias(state: Mapping[str, Tensor]) -> bool:
    """Whether any Q or V bias differs from zero; if none does, timm's plain models hold the same function."""
    for key, value in state.items():
        if key.endswith(".attn.qkv.bias"):
            q, _, v = value.chunk(3)
            if q.count_nonzero() or v.count_nonzero():
                return True
    return False
