"""Weight-only quantisation: the matrices of linear layers kept in 8 or 4 bits, and computed with as before.

`quantise` puts a parametrisation on each `nn.Linear`: its `weight` is then made of small integers and scales whenever it is
read, in the precision of the scales, so every other line of code sees an ordinary layer. That saves memory and disk, not
time. All else (embeddings, norms, biases, layer scale, convolutions) keeps its precision: it is a few per cent.

int8: a scale for each output, symmetric, as torchao's `Int8WeightOnlyConfig`. int4: a scale and an offset for each `GROUP`
inputs of an output; two codes a byte. Names in a state dict are those of `torch.nn.utils.parametrize`:
`blocks.0.mlp.fc1.parametrizations.weight.original0`.

Legend: O outputs, I inputs, G = I / GROUP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dinov3.errors import DinoError, one_of

Kind = Literal["int8", "int4"]
KINDS: tuple[Kind, ...] = ("int8", "int4")
GROUP = 32
_PART = re.compile(r"(.+)\.parametrizations\.weight\.original([012])")


class Int8(nn.Module):
    """int8 codes [O, I] and scales [O, 1] ↔ a matrix [O, I]."""

    def forward(self, codes: Tensor, scales: Tensor) -> Tensor:
        return codes.to(scales.dtype) * scales

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scales = (weight.float().abs().amax(1, keepdim=True) / 127).clamp_min(1e-12).to(weight.dtype)
        return (weight.float() / scales.float()).round().clamp(-127, 127).to(torch.int8), scales


class Int4(nn.Module):
    """uint8 pairs of codes [O, I/2], scales and offsets [O, G] ↔ a matrix [O, I]."""

    def forward(self, pairs: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
        codes = torch.stack((pairs & 15, pairs >> 4), -1).view(len(pairs), -1, GROUP)  # [O, G, GROUP]
        return torch.addcmul(offsets[..., None], codes.to(scales.dtype), scales[..., None]).flatten(1)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = weight.float().unflatten(1, (-1, GROUP))
        low, high = groups.amin(-1), groups.amax(-1)
        scales, offsets = ((high - low) / 15).clamp_min(1e-12).to(weight.dtype), low.to(weight.dtype)
        codes = ((groups - offsets.float()[..., None]) / scales.float()[..., None]).round().clamp(0, 15).to(torch.uint8)
        codes = codes.flatten(1)
        return codes[:, ::2] | codes[:, 1::2] << 4, scales, offsets


def quantise(model: nn.Module, kind: Kind) -> nn.Module:
    """The model itself, with its linear layers in `kind`; their gradients are switched off.

    int4 leaves layers in full whose inputs are no multiple of `GROUP`. Raises `DinoError` for a model that is quantised
    already or has no such layer.
    """
    one_of("the quantisation", kind, KINDS)
    if is_quantised(model.state_dict()):
        raise DinoError("this model is quantised already: quantise the original")
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and (kind == "int8" or m.in_features % GROUP == 0)]
    if not layers:
        raise DinoError(f"this model has no linear layer that could be kept in {kind}")
    for layer in layers:
        _register(layer, Int8() if kind == "int8" else Int4())
    return model


def prepare(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The model, perhaps without values, with quantised layers where a state dict has them, so that it can be filled."""
    parts: dict[str, int] = {}
    for match in filter(None, map(_PART.fullmatch, state)):
        parts[match[1]] = max(parts.get(match[1], 0), int(match[2]))
    for name, last in parts.items():
        layer = dict(model.named_modules()).get(name)
        if isinstance(layer, nn.Linear):  # otherwise the strict fill says that the file has more than the model
            _register(layer, Int8() if last == 1 else Int4())
    return model


def _register(layer: nn.Linear, form: nn.Module) -> None:
    layer.weight.requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", form, unsafe=True)  # its dtype is not the original's


def is_quantised(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict holds quantised matrices."""
    return any(map(_PART.fullmatch, state))


def shapes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with a matrix without values, under its plain name, in the place of each quantised one."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        match = _PART.fullmatch(key)
        if match is None:
            found[key] = value
        elif match[2] == "0":
            wide = value.shape[1] * (2 if value.dtype == torch.uint8 else 1)
            found[f"{match[1]}.weight"] = torch.empty(value.shape[0], wide, device="meta")
    return found


def with_parts(shaped: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `shapes`: `state`'s quantised matrices in the place of those without values."""
    whole = {key: value for key, value in shaped.items() if not value.is_meta}
    return whole | {key: value for key, value in state.items() if _PART.fullmatch(key)}
