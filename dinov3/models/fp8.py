"""Linear layers whose products are of 8-bit floats (e4m3), scaled by rows on the fly; for training large models.

Forward: activations are scaled row by row, the weight by output row, both with scale = max(|row|, 1e-12) / 448; the 8-bit
matrices are multiplied without scales into bfloat16, then both scales are multiplied in and the bias added. The gradient of
the input is such a product too, of the output gradient scaled by rows and the weight under one scale; the gradient of the
weight is a plain bfloat16 product. Weights themselves, their names and the optimiser see nothing of it.

Without hardware for it (anything but recent NVIDIA GPUs) the same numbers come from bfloat16-exact products of the rounded
values: slow, for tests and for looking at what the rounding does. Where torchao is installed (extra `fp8`), a GPU takes its
kernels, which scale inside of the product: its recipe `rowwise_with_gw_hp`, which is the above. Weights are gathered in
bfloat16 all the same: torchao gathers 8-bit weights only under one scale for a whole matrix.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.errors import DinoError
from dinov3.models.vit import MaskedKeyBiasLinear

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
