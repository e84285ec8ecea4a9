"""A student's first weights out of a larger teacher, in closed form: half the width without a step of training.

Distilling from random weights needs hundreds of epochs; a student that begins as a compressed copy of its teacher starts
near the goal (in the spirit of SliceGPT, arXiv 2401.15024, and of weight selection, arXiv 2311.18823). Here a DINOv2 ViT
in transformers' names (learned positions, patch 14) becomes one of ours (RoPE, registers, patch 16). Block by block, on a
few hundred images:

 1. One basis for the whole residual stream: the principal directions of all its layers, each token scaled as the next
    norm will scale it, laid orthogonal to the vector of ones, so that the student's LayerNorm centres nothing away.
 2. What a linear layer needs, it gets by ridge regression from what the student really has at that place: errors made
    earlier are corrected, not summed. Of the heads and of the hidden units the most active ones are kept.
 3. What a branch gives is regressed onto what the teacher's stream is after it, minus what the student's is before.
 4. Queries and keys are turned, together, so that what they agree on most lies where RoPE turns the slowest.

The last `fresh` blocks stay as they were initialised. Left out: teachers with SwiGLU, other head widths than the
student's.

Legend: B images, N tokens (CLS and patches), D teacher's width, d student's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.data.transforms.inputs import LVD_MEAN, LVD_STD, normalised
from dinov3.distill.teachers import ridge
from dinov3.errors import DinoError
from dinov3.models.vit import VisionTransformer, rotation


class Dinov2Tokens:
    """The parts of a DINOv2 forward pass that the student is fitted to, straight from its state dict."""

    def __init__(self, state: Mapping[str, Tensor], heads: int, eps: float = 1e-6) -> None:
        self.state = {k: v.float() for k, v in state.items()}
        self.heads, self.eps = heads, eps
        self.depth = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.layer."))

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], self.eps)

    def embed(self, x: Tensor) -> Tensor:
        """Normalised images [B, 3, s, s] → tokens [B, N, D] with their positions."""
        weight = self.state["embeddings.patch_embeddings.projection.weight"]
        bias = self.state["embeddings.patch_embeddings.projection.bias"]
        maps = F.conv2d(x, weight, bias, stride=weight.shape[-1])
        positions = self.state["embeddings.position_embeddings"]
        side = round((positions.shape[1] - 1) ** 0.5)
        grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, maps.shape[-2:], mode="bicubic", align_corners=False)
        cls = (self.state["embeddings.cls_token"] + positions[:, :1]).expand(len(x), -1, -1)
        return torch.cat([cls, (maps + grid).flatten(2).mT], dim=1)

    def heads_of(self, x: Tensor, block: int) -> Tensor:
        """What the heads give before they are mixed [B, N, D]."""
        at = f"encoder.layer.{block}.attention.attention"
        q, k, v = (
            self.linear(x, f"{at}.{n}").unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for n in ("query", "key", "value")
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _select(activity: Tensor, mixing: Tensor, groups: int, keep: int) -> Tensor:
    """Which columns to keep, in whole groups: those that contribute most energy through `mixing` [d, columns]."""
    energy = activity.flatten(0, -2).var(0) * mixing.square().sum(0)
    best = energy.unflatten(0, (groups, -1)).sum(1).topk(keep).indices.sort().values
    size = activity.shape[-1] // groups
    return (best[:, None] * size + torch.arange(size)).flatten()


def slow_first(query: Tensor, key: Tensor, periods: Tensor) -> Tensor:
    """An orthogonal [e, e] for one head: component order of q and k such that what varies most turns slowest.

    query, key [n, e]; periods [e/4]. Element i of a head is turned with periods[i mod e/4].
    """
    q, k = query - query.mean(0), key - key.mean(0)
    both = q.T @ q / q.square().mean() + k.T @ k / k.square().mean()
    directions = torch.linalg.eigh(both.double())[1].flip(1).float()  # strongest first
    slots = periods.float().repeat(4).argsort(descending=True, stable=True)
    turn = torch.empty_like(directions)
    turn[slots] = directions.T
    return turn


@torch.no_grad()
def inherit_dinov2(
    student: VisionTransformer,
    state: Mapping[str, Tensor],
    pixels: Tensor,
    teacher_pixels: Tensor,
    *,
    fresh: int = 1,
    log: Any = lambda text: None,
) -> list[float]:
    """Fills `student` from a DINOv2 state dict. The share of the teacher's stream it then explains, after every block.

    pixels, teacher_pixels: uint8 [B, 3, s, s], the same images at sizes with equal grids. `fresh`: so many last blocks
    keep their initial weights. Raises `DinoError` where the two architectures cannot be brought together.
    """
    c = student.config
    D, d = state["embeddings.cls_token"].shape[-1], c.embed_dim
    head = c.head_dim
    net = Dinov2Tokens(state, heads=D // head)
    blocks = c.depth - fresh
    if net.depth < blocks or D < d or D % head or "encoder.layer.0.mlp.fc1.weight" not in state:
        raise DinoError(
            f"a student of width {d} with {c.depth} blocks cannot inherit from a teacher of width {D} with {net.depth}"
        )
    x = net.embed(normalised(teacher_pixels, LVD_MEAN, LVD_STD))  # [B, N, D]

    # the teacher's whole course, and the basis of its stream
    middles, ends, moments = [], [], torch.zeros(D, D)
    t = x
    for i in range(blocks):
        at = f"encoder.layer.{i}"
        branch = net.linear(net.heads_of(net.norm(t, f"{at}.norm1"), i), f"{at}.attention.output.dense")
        middles.append(t + net.state[f"{at}.layer_scale1.lambda1"] * branch)
        hidden = F.gelu(net.linear(net.norm(middles[-1], f"{at}.norm2"), f"{at}.mlp.fc1"))
        t = middles[-1] + net.state[f"{at}.layer_scale2.lambda1"] * net.linear(hidden, f"{at}.mlp.fc2")
        ends.append(t)
        for tokens in (middles[-1], t):
            unit = F.layer_norm(tokens, (D,)).flatten(0, 1)
            moments += unit.T @ unit / len(unit)
    U = torch.linalg.eigh(moments.double())[1].flip(1)[:, : d - 1].float()  # [D, d−1]; ⟂ ones, as every `unit` is
    complement = torch.linalg.qr(torch.cat([torch.ones(d, 1), torch.eye(d)[:, : d - 1]], dim=1))[0][:, 1:]
    A = complement @ U.T  # [d, D]

    def stream(t: Tensor) -> Tensor:
        return t @ A.T

    def weight(t: Tensor) -> Tensor:
        return 1 / t.var(-1).flatten().clamp_min(1e-6)

    def flat(y: Tensor) -> Tensor:
        """The student's CLS and patches, without registers."""
        return torch.cat([y[:, :1], y[:, 1 + c.n_storage_tokens :]], dim=1).flatten(0, 1)

    for parameter in student.norm.parameters():
        parameter.copy_(torch.full_like(parameter, float(parameter is student.norm.weight)))
    inputs = normalised(pixels, LVD_MEAN, LVD_STD)
    p = c.patch_size
    patches = F.unfold(inputs, p, stride=p).mT.flatten(0, 1)  # [B·HW, 3·p·p]
    W, b = ridge(patches, stream(x)[:, 1:].flatten(0, 1), strength=1e-2)
    student.patch_embed.proj.weight.copy_(W.view_as(student.patch_embed.proj.weight))
    assert student.patch_embed.proj.bias is not None
    student.patch_embed.proj.bias.copy_(b)
    student.cls_token.copy_(stream(x[:1, :1]))
    was_training = student.training
    student.eval()
    y, (h, w) = student.tokens(inputs)
    sin, cos = student.rope_embed(h, w)
    rope = rotation(sin, cos, 1 + c.n_storage_tokens)
    explained = []
    for i in range(blocks):
        block: Any = student.blocks[i]
        at = f"encoder.layer.{i}"
        # attention
        seen = net.norm(x, f"{at}.norm1")
        given = net.heads_of(seen, i)
        mixing = A @ (
            net.state[f"{at}.layer_scale1.lambda1"][:, None] * net.state[f"{at}.attention.output.dense.weight"]
        )
        keep = _select(given, mixing, net.heads, c.num_heads)
        W, b = ridge(flat(block.norm1(y)), seen.flatten(0, 1))
        rows, offsets = [], []
        wq, wk, wv = (net.state[f"{at}.attention.attention.{n}.weight"][keep] for n in ("query", "key", "value"))
        bq, bk, bv = (net.state[f"{at}.attention.attention.{n}.bias"][keep] for n in ("query", "key", "value"))
        turn = torch.block_diag(
            *[
                slow_first(seen.flatten(0, 1) @ q.T, seen.flatten(0, 1) @ k.T, student.rope_embed.periods)
                for q, k in zip(wq.split(head), wk.split(head))
            ]
        )
        for matrix, offset in ((turn @ wq, turn @ bq), (turn @ wk, turn @ bk), (wv, bv)):
            rows.append(matrix @ W)
            offsets.append(offset + matrix @ b)
        block.attn.qkv.weight.copy_(torch.cat(rows))
        block.attn.qkv.bias.copy_(torch.cat(offsets))
        mix, block.attn.proj = block.attn.proj, nn.Identity()
        heads = block.attn(block.norm1(y), rope)
        block.attn.proj = mix
        W, b = ridge(flat(heads), stream(middles[i]).flatten(0, 1) - flat(y), weight(middles[i]))
        write_linear(mix, W, b)
        block.ls1.gamma.fill_(1.0)
        y = y + mix(heads)
        # feed-forward
        seen = net.norm(middles[i], f"{at}.norm2")
        hidden = F.gelu(net.linear(seen, f"{at}.mlp.fc1"))
        mixing = A @ (net.state[f"{at}.layer_scale2.lambda1"][:, None] * net.state[f"{at}.mlp.fc2.weight"])
        keep = _select(hidden, mixing, hidden.shape[-1], c.ffn_hidden)
        W, b = ridge(flat(block.norm2(y)), seen.flatten(0, 1))
        w1, b1 = net.state[f"{at}.mlp.fc1.weight"][keep], net.state[f"{at}.mlp.fc1.bias"][keep]
        write_linear(block.mlp.fc1, w1 @ W, b1 + w1 @ b)
        hidden = F.gelu(block.mlp.fc1(block.norm2(y)))
        W, b = ridge(flat(hidden), stream(ends[i]).flatten(0, 1) - flat(y), weight(ends[i]))
        write_linear(block.mlp.fc2, W, b)
        block.ls2.gamma.fill_(1.0)
        y = y + block.mlp.fc2(hidden)
        x = ends[i]
        target = F.layer_norm(x, (D,)).flatten(0, 1)
        W, b = ridge(F.layer_norm(flat(y), (d,)), target)
        left = (target - F.layer_norm(flat(y), (d,)) @ W.T - b).square().sum() / (
            target - target.mean(0)
        ).square().sum()
        explained.append(1 - left.item())
        log(f"block {i}: {explained[-1]:.3f} of the teacher's stream explained")
    student.train(was_training)
    return explained


def write_linear(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
