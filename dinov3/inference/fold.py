"""A ViT's blocks for inference only: everything that is linear in a row is multiplied into the weights once.

Of a block x + γ1 ⊙ proj(attention(norm1 x)), then x + γ2 ⊙ FFN(norm2 x), with x̂ = norm(x) without its affine part:

    x1 = x  + proj(softmax(q kᵀ) v),  q, k, v = thirds of (qkv x̂), q and k turned by RoPE
    x2 = x1 + fc2(GELU(fc1 x̂1))       or, SwiGLU: fc2(SiLU(a) ⊙ b), a, b = halves of (fc1 x̂1)

The norms' affine parts are in qkv and fc1, layer scale in proj and fc2, 1/√d of the softmax in q's rows (RoPE turns, so a
factor commutes with it), the mask of the key bias in qkv's bias. Folded in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from dinov3.models.vit import Block, LayerScale, MaskedKeyBiasLinear, RMSNorm, SwiGLU, VisionTransformer


@dataclass(frozen=True)
class FoldedBlock:
    """A block's weights, float32 on the CPU and contiguous. D width, h heads, F hidden width of the FFN.

    qkv_weight [3D, D] (rows: q, k, v, each h × d), qkv_bias [3D], proj_weight [D, D], proj_bias [D].
    ffn "mlp": fc1_weight [F, D], fc1_bias [F]; "swiglu": [2F, D] and [2F], the gate's rows (w1) first, then w2's.
    fc2_weight [D, F], fc2_bias [D]. `norm` and `eps`: x̂ is (x - mean) / √(variance + eps), or x / √(mean x² + eps).
    """

    heads: int
    norm: Literal["layernorm", "rmsnorm"]
    eps: float
    ffn: Literal["mlp", "swiglu"]
    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


class FoldedBlocks(Sequence[FoldedBlock]):
    """The folded blocks of a backbone, first to last. Each is folded whenever it is read, so that no second copy of all
    weights is needed."""

    def __init__(self, backbone: VisionTransformer) -> None:
        self.blocks = backbone.blocks

    def __len__(self) -> int:
        return len(self.blocks)

    @overload
    def __getitem__(self, index: int) -> FoldedBlock: ...
    @overload
    def __getitem__(self, index: slice) -> list[FoldedBlock]: ...
    def __getitem__(self, index: int | slice) -> FoldedBlock | list[FoldedBlock]:
        found: Any = self.blocks[index]
        return [_block(block) for block in found] if isinstance(index, slice) else _block(found)


@torch.no_grad()
def _block(block: Block) -> FoldedBlock:
    heads = block.attn.num_heads
    weight, bias = after_norm(_linear(block.attn.qkv), block.norm1)
    width = weight.shape[1]
    factor = torch.ones_like(bias)
    factor[:width] = (width // heads) ** -0.5
    proj = before_scale(_linear(block.attn.proj), block.ls1)
    mlp: Any = block.mlp
    if isinstance(mlp, SwiGLU):
        gate, value = _linear(mlp.w1), _linear(mlp.w2)
        fc1 = torch.cat([gate[0], value[0]]), torch.cat([gate[1], value[1]])
        fc2 = _linear(mlp.w3)
    else:
        fc1, fc2 = _linear(mlp.fc1), _linear(mlp.fc2)
    fc1, fc2 = after_norm(fc1, block.norm2), before_scale(fc2, block.ls2)
    tensors = [
        t.float().contiguous() for pair in ((weight * factor[:, None], bias * factor), proj, fc1, fc2) for t in pair
    ]
    return FoldedBlock(
        heads,
        "rmsnorm" if isinstance(block.norm1, RMSNorm) else "layernorm",
        float(block.norm1.eps),  # type: ignore[arg-type]
        "swiglu" if isinstance(mlp, SwiGLU) else "mlp",
        *tensors,
    )


Linear = tuple[Tensor, Tensor]  # weight [out, in] and bias [out], float32


def _linear(layer: nn.Linear) -> Linear:
    weight = layer.weight.detach().to("cpu", torch.float32, copy=True)  # the plain model may change later
    if layer.bias is None:
        return weight, weight.new_zeros(len(weight))
    bias = layer.bias.detach().to("cpu", torch.float32, copy=True)
    return weight, bias * layer.bias_mask.cpu() if isinstance(layer, MaskedKeyBiasLinear) else bias


def after_norm(linear: Linear, norm: Any) -> Linear:
    """The layer that takes x̂ instead of norm(x) = γ ⊙ x̂ + β."""
    weight, bias = linear
    if (beta := getattr(norm, "bias", None)) is not None:
        bias = bias + weight @ beta.detach().cpu().float()
    return weight * norm.weight.detach().cpu().float(), bias


def before_scale(linear: Linear, scale: nn.Module) -> Linear:
    """The layer whose output needs no layer scale any more."""
    if not isinstance(scale, LayerScale):
        return linear
    gamma = scale.gamma.detach().cpu().float()
    return linear[0] * gamma[:, None], linear[1] * gamma
