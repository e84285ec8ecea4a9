"""Linear layers in few bits: matrices kept in 8 or 4 bits (inference), products of 8-bit floats (training)."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dinov3.errors import DinoError, one_of
from dinov3.models.vit import MaskedKeyBiasLinear

# ---- matrices kept in 8 or 4 bits ------------------------------------------------------------------------------------
# Weight-only quantisation: the matrices of linear layers kept in 8 or 4 bits, and computed with as before.
#
# `quantise` puts a parametrisation on each `nn.Linear`: its `weight` is then made of small integers and scales whenever it is
# read, in the precision of the scales, so every other line of code sees an ordinary layer. That saves memory and disk, not
# time. All else (embeddings, norms, biases, layer scale, convolutions) keeps its precision: it is a few per cent.
#
# int8: a scale for each output, symmetric, as torchao's `Int8WeightOnlyConfig`. int4: a scale and an offset for each `GROUP`
# inputs of an output; two codes a byte. Names in a state dict are those of `torch.nn.utils.parametrize`:
# `blocks.0.mlp.fc1.parametrizations.weight.original0`.
#
# Legend: O outputs, I inputs, G = I / GROUP.


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


# ---- products of 8-bit floats ----------------------------------------------------------------------------------------
# Linear layers whose products are of 8-bit floats (e4m3), scaled by rows on the fly; for training large models.
#
# Forward: activations are scaled row by row, the weight by output row, both with scale = max(|row|, 1e-12) / 448; the 8-bit
# matrices are multiplied without scales into bfloat16, then both scales are multiplied in and the bias added. The gradient of
# the input is such a product too, of the output gradient scaled by rows and the weight under one scale; the gradient of the
# weight is a plain bfloat16 product. Weights themselves, their names and the optimiser see nothing of it.
#
# Without hardware for it (anything but recent NVIDIA GPUs) the same numbers come from bfloat16-exact products of the rounded
# values: slow, for tests and for looking at what the rounding does. Where torchao is installed (extra `fp8`), a GPU takes its
# kernels, which scale inside of the product: its recipe `rowwise_with_gw_hp`, which is the above. Weights are gathered in
# bfloat16 all the same: torchao gathers 8-bit weights only under one scale for a whole matrix.


F8 = torch.float8_e4m3fn
LARGEST = torch.finfo(F8).max  # 448


def row_scales(x: Tensor) -> Tensor:
    """[n, k] → [n, 1] float32: what a row is divided by so that its largest entry becomes 448."""
    return x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST


def quantised(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).to(F8)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] · bᵀ for b [m, k], both 8-bit, without scales, as bfloat16 [n, m]."""
    if a.is_cuda and torch.cuda.get_device_capability(a.device) >= (8, 9):
        one = torch.ones((), device=a.device)
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=False)
    return (a.float() @ b.float().t()).bfloat16()


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # [n, in], [out, in], both bfloat16
        ctx.save_for_backward(x, weight)
        of_x, of_w = row_scales(x), row_scales(weight)
        y = product(quantised(x, of_x), quantised(weight, of_w))
        return (y.float() * of_x * of_w.t()).bfloat16()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        of_g, of_w = row_scales(grad), row_scales(weight).amax()
        back = product(quantised(grad, of_g), quantised(weight, of_w).t().contiguous())
        return (back.float() * of_g * of_w).bfloat16(), grad.t() @ x


Product = Callable[[Tensor, Tensor], Tensor]  # x [n, in], weight [out, in], both bfloat16 → [n, out]
REFERENCE: Product = _Fp8Product.apply


def torchao_product(*, emulate: bool = False) -> Product:
    """The same product in torchao's kernels. emulate: on devices without 8-bit products."""
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    # scales as the reference has them, where the recipe rounds them to powers of two
    recipe = Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
    recipe = replace(recipe, emulate=emulate, round_scales_to_power_of_2=False)
    kernels = LinearMMConfig(*[ScaledMMConfig(emulate, False, False, False)] * 3)

    def product_of(x: Tensor, weight: Tensor) -> Tensor:
        return matmul_with_hp_or_float8_args.apply(x, weight.t(), kernels, recipe)

    return product_of


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, multiply: Product = REFERENCE) -> Tensor:
    """x [..., in] · weightᵀ + bias in 8-bit products, bfloat16 out."""
    y = multiply(x.bfloat16().flatten(0, -2), weight.bfloat16()).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias.bfloat16()


class Fp8Linear(nn.Linear):
    multiply: Product

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return fp8_linear(x, self.weight, self.bias, self.multiply)


class Fp8MaskedKeyBiasLinear(MaskedKeyBiasLinear):
    multiply: Product

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return fp8_linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype), self.multiply)


def convert_to_fp8(model: nn.Module, pattern: str = "blocks", multiply: Product | None = None) -> int:
    """Turns every linear layer whose path matches the regular expression; the number of them. `multiply`: by default
    torchao's on a GPU where it is installed, else the reference.

    Raises `DinoError` if there is none, or where a side is no multiple of 64.
    """
    if multiply is None:
        fast = next(model.parameters()).is_cuda and importlib.util.find_spec("torchao") is not None
        multiply = torchao_product() if fast else REFERENCE
    wanted = re.compile(pattern)
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and wanted.search(n)}
    for name, layer in found.items():
        if layer.in_features % 64 or layer.out_features % 64:
            raise DinoError(
                f"{name} is {layer.in_features} → {layer.out_features}; 8-bit products need multiples of 64 "
                "(student.ffn_layer=swiglu64, or a narrower student.fp8_filter)"
            )
        # The class is exchanged, not the module: parameters, hooks and the names in checkpoints stay as they are.
        layer.__class__ = Fp8MaskedKeyBiasLinear if isinstance(layer, MaskedKeyBiasLinear) else Fp8Linear
        layer.multiply = multiply  # type: ignore[assignment]
    if not found:
        raise DinoError(f"no linear layer's path matches {pattern!r}; the paths look like 'blocks.0.attn.qkv'")
    return len(found)
