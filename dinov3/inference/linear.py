"""One linear layer of a fast form: packed for oneDNN on a CPU, fused with what follows it; torch's own product elsewhere.

Legend: T rows (tokens), K inputs, M outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.models.low_precision import product, quantised, row_scales

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # of what goes through the layers


def has_bf16() -> bool:
    """Whether this CPU has instructions that multiply bf16, as oneDNN sees it."""
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)())


def arithmetic_of(precision: str, device: torch.device) -> str:
    """The precision of the products. bf16 on a CPU without its instructions is "fp32": no less exact, and emulated products
    take eight times as long."""
    return "fp32" if precision == "bf16" and device.type == "cpu" and not has_bf16() else precision


def packs() -> bool:
    """Whether this torch has oneDNN's layers with packed weights."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear:
    """x [..., K] · weightᵀ + bias [..., M], for inference. weight [M, K], bias [M], of float32."""

    def __init__(self, weight: Tensor, bias: Tensor, precision: str, device: torch.device) -> None:
        dtype = DTYPES[precision]
        self.bias = bias.to(device, dtype, copy=True)
        self.scale: Tensor | None = None  # [M, 1], of an 8-bit weight
        self.packed = device.type == "cpu" and precision != "fp8" and packs()
        weight = weight.to(device, dtype, copy=True)
        if precision == "fp8":
            self.scale = row_scales(weight)
            self.weight = quantised(weight, self.scale)
        elif self.packed:
            with torch.inference_mode():
                self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        else:
            self.weight = weight

    def __call__(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """The layer, and GELU of it."""
        if self.packed:
            kind: Any = ("gelu", [], "none") if gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *kind)
        y = self._eight_bits(x) if self.scale is not None else F.linear(x, self.weight, self.bias)
        return F.gelu(y) if gelu else y

    def _eight_bits(self, x: Tensor) -> Tensor:
        assert self.scale is not None
        of_x = row_scales(rows := x.flatten(0, -2))
        y = product(quantised(rows, of_x), self.weight).float() * of_x * self.scale.t() + self.bias
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    def add(self, stream: Tensor, x: Tensor) -> Tensor:
        """stream + layer(x), in the stream's float32; its memory may be used."""
        if self.packed and x.dtype == stream.dtype:
            return torch.ops.mkldnn._linear_pointwise.binary(x, stream, self.weight, self.bias, "add")
        return stream.add_(self(x))
