"""Folded blocks, computed as the docstring of `inference.fold` writes them, give what the plain blocks give."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.inference import kernels
from dinov3.inference.blocks import Blocks
from dinov3.inference.fold import FoldedBlock, FoldedBlocks
from dinov3.inference.linear import arithmetic_of
from dinov3.models.architectures import ViTConfig
from dinov3.models.vit import VisionTransformer, rotate, rotation

KINDS = {
    "plain": {},
    "released": {"n_storage_tokens": 4, "mask_k_bias": True, "norm_layer": "layernormbf16", "layerscale_init": 1e-5},
    "swiglu": {"ffn_layer": "swiglu64", "qkv_bias": False, "n_storage_tokens": 1, "layerscale_init": 0.1},
    "rmsnorm": {"norm_layer": "rmsnorm", "proj_bias": False, "ffn_bias": False},
    "untied": {"untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True, "n_storage_tokens": 2},
}


def varied(kind: str, **options) -> VisionTransformer:
    """A small ViT in which every weight matters: norms, biases and layer scale are no ones and zeros."""
    options = {"embed_dim": 64, "num_heads": 2, "depth": 3, "patch_size": 8} | KINDS[kind] | options
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig.of(**options))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.3))
    return model.eval()


def plain(block: FoldedBlock, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """The definition: the two equations of the module, nothing fused."""

    def normed(x: Tensor) -> Tensor:
        if block.norm == "rmsnorm":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + block.eps)
        return F.layer_norm(x, x.shape[-1:], eps=block.eps)

    B, N, D = x.shape
    qkv = F.linear(normed(x), block.qkv_weight, block.qkv_bias).view(B, N, 3, block.heads, -1)
    q, k = rotate(qkv[:, :, :2], sin, cos).transpose(1, 3).unbind(2)
    attention = (q @ k.transpose(-1, -2)).softmax(-1) @ qkv[:, :, 2].transpose(1, 2)
    x = x + F.linear(attention.transpose(1, 2).reshape(B, N, D), block.proj_weight, block.proj_bias)
    hidden = F.linear(normed(x), block.fc1_weight, block.fc1_bias)
    if block.ffn == "swiglu":
        gate, value = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * value
    else:
        hidden = F.gelu(hidden)
    return x + F.linear(hidden, block.fc2_weight, block.fc2_bias)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_folded_blocks_give_what_the_plain_ones_give(kind: str) -> None:
    model = varied(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, grid = model.tokens(torch.randn(2, 3, 24, 40))
    sin, cos = model.rope_embed(*grid)
    tables = rotation(sin, cos, 1 + model.n_storage_tokens)
    y = x
    for block in FoldedBlocks(model):
        y = plain(block, y, *tables)
    ((expected,),) = model._run([x], [grid])
    assert (y - expected).norm() / expected.norm() < 1e-6
    for name, value in model.state_dict().items():  # nothing is folded in place
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("engine", ["torch", "kernels"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_one_block_at_a_time_is_folded_and_no_engine_keeps_it(engine: str, precision: str) -> None:
    in_torch = {"fp32", arithmetic_of("bf16", torch.device("cpu"))}
    if precision not in (in_torch if engine == "torch" else kernels.available()):
        pytest.skip(f"no {precision} by {engine} here")
    watched: list[weakref.ref] = []
    most = 0

    class Watched(FoldedBlocks):
        def __getitem__(self, index):
            nonlocal most
            block = super().__getitem__(index)
            watched.append(weakref.ref(block))
            most = max(most, sum(other() is not None for other in watched))
            return block

    make = Blocks if engine == "torch" else kernels.Blocks
    engine_made = make(Watched(varied("plain", depth=5)), precision)
    gc.collect()
    assert engine_made is not None
    assert all(block() is None for block in watched)
    assert most <= 3  # the first one's shape, this one, and the one before it
