"""THE strict fill: a module takes the values of a state dict, or a readable difference says why it does not.

`fill` serves heads, towers and whole models; `build` makes a backbone of an opened file. Every entry of the module must be
there in its shape; what is left over is refused, or returned where a file may hold more than the module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from dinov3.errors import WeightsMismatch, without_secrets
from dinov3.models import low_precision
from dinov3.models.architectures import BackboneConfig, ConvNeXtConfig
from dinov3.models.build import backbone
from dinov3.weights import configs, formats
from dinov3.weights.catalog import Row
from dinov3.weights.reading import OpenedWeights


def difference(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], *, leftover: bool = True) -> list[str]:
    """Up to six indented lines on keys, shapes and kinds of numbers that differ; [] where everything fits."""
    lines = []
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    for what, keys in (("missing in the file", missing), ("not in the model", extra if leftover else [])):
        if keys:
            lines.append(f"  {what}: {some(keys)}")
    shapes = [k for k in expected if k in state and expected[k].shape != state[k].shape]
    for key in shapes[:2]:
        lines.append(f"  {key}: {tuple(state[key].shape)} in the file, {tuple(expected[key].shape)} in the model")
    if len(shapes) > 2:
        lines.append(f"  and {len(shapes) - 2} more shapes differ")
    kinds = [k for k in expected if k in state and expected[k].is_floating_point() != state[k].is_floating_point()]
    lines += [f"  {key}: {state[key].dtype} in the file, {expected[key].dtype} in the model" for key in kinds[:1]]
    return lines


def some(names: Iterable[str]) -> str:
    """The first two of several names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def fill(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    what: str,
    source: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    optional: str | None = None,
    leftover: bool = False,
) -> list[str]:
    """Gives a module (perhaps built without values) those of a state dict, on a device, in `dtype` or the file's own.

    what: the module, for the message. optional: entries below this prefix, such as a backbone's, may all be absent.
    leftover: entries that the module lacks are returned instead of refused. Raises `WeightsMismatch`.
    """
    expected = module.state_dict()
    if optional is not None and not any(key.startswith(optional) for key in state):
        expected = {key: value for key, value in expected.items() if not key.startswith(optional)}
    if lines := difference(expected, state, leftover=not leftover):
        lines.insert(0, f"{without_secrets(source)} does not hold {what} ({len(expected)} entries)")
        if "cls_token" in state or "embeddings.cls_token" in state:
            lines.append("  the file is a backbone: pass it as backbone_weights, and the head's file as weights")
        raise WeightsMismatch("\n".join(lines))
    place(module, {key: state[key] for key in expected}, device, dtype)
    return sorted(state.keys() - expected.keys())


def place(
    module: nn.Module, state: Mapping[str, Tensor], device: str | torch.device | None, dtype: torch.dtype | None
) -> None:
    """Assigns values that are known to fit. Rope periods keep their type, which half precision would change; two names of
    one tensor stay one tensor."""
    moved: dict[int, Tensor] = {}

    def move(key: str, value: Tensor) -> Tensor:
        keep = dtype is None or key.endswith("rope_embed.periods") or not value.is_floating_point()
        return moved.setdefault(id(value), value.to(device, None if keep else dtype))

    module.load_state_dict({key: move(key, value) for key, value in state.items()}, strict=False, assign=True)
    left = [n for n, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]
    assert not left, f"not loaded: {left}"


def build(
    config: BackboneConfig,
    opened: OpenedWeights,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    requested: Sequence[Row] = (),
) -> nn.Module:
    """The model of `config` with these weights, in eval mode.

    Built without allocating (meta device); every key and shape must fit. `dtype` converts all values except the rope
    periods, which bfloat16 would change. `requested`: the catalogue rows that the caller's name meant, for the message.
    Raises `WeightsMismatch` with the lines of `explain_mismatch`.
    """
    state = opened.state_dict if opened.form == "meta" else formats.complete(opened.state_dict, config)
    with torch.device("meta"):
        model = low_precision.prepare(backbone(config), state)
    if lines := difference(model.state_dict(), state):
        raise WeightsMismatch(explain_mismatch(lines, config, opened, requested))
    place(model, state, device, dtype)
    return model.eval()


def explain_mismatch(
    found: Sequence[str], config: BackboneConfig, opened: OpenedWeights, requested: Sequence[Row] = ()
) -> str:
    """Why these weights are not for this model, in at most ten lines: what the file is, what was requested, the first
    differences (`found`), what to call instead."""
    requested = requested or configs.fitting_rows(config, "meta")
    seems = " or ".join(r.id for r in opened.rows) or _described(opened.config)
    lines = [
        f"{without_secrets(opened.source)} does not fit the requested model",
        f"  the file is: {seems} ({opened.form} form)",
        f"  requested:   {' or '.join(r.id for r in requested) or _described(config)}",
    ]
    lines += found
    if opened.rows:
        lines.append(f"  call {opened.rows[0].arch} with this file, or give it another file")
    elif type(opened.config) is type(config):
        lines.append(f"  a model with {differences(opened.config, config) or 'the file’s own config'} would fit")
    return "\n".join(lines[:10])


def differences(config: BackboneConfig, other: BackboneConfig) -> str:
    """The fields of `config` that differ from `other`'s, the first six, as `name=value`."""
    theirs = asdict(other)
    ours = {k: v for k, v in asdict(config).items() if v != theirs.get(k) and k != "pos_embed_rope_rescale_coords"}
    return ", ".join(f"{k}={v!r}" for k, v in list(ours.items())[:6])


def _described(config: BackboneConfig) -> str:
    if isinstance(config, ConvNeXtConfig):
        return f"a ConvNeXt with depths {tuple(config.depths)} and widths {tuple(config.dims)}"
    return f"a ViT of width {config.embed_dim}, {config.depth} blocks, {config.num_heads} heads, {config.ffn_layer} FFN"
