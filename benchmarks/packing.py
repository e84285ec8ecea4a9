"""Global and local crops of a step: apart, or packed into one sequence? Forward and backward through all blocks.

    python benchmarks/packing.py                                  # ViT-S, 2 × 224 and 8 × 96 pixels, this machine
    python benchmarks/packing.py --model dinov3_vitl16 --images 32 --device cuda --dtype bfloat16 --compile

    apart     each group of equal crops is a batch of its own (what the package does)
    linears   norms, projections and FFNs run once over the tokens of all crops; attention a group at a time
    masked    one sequence an image, attention kept inside the crops by a block-diagonal mask
    flex      as masked, by flex_attention's block mask, which skips empty blocks (with --compile only)

All four compute the same (checked first). A B C A B C … in one process; the median of the rounds and the ratio to `apart`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.hub import load
from dinov3.models.vit import rotate, rotation

Rope = tuple[Tensor, Tensor]


def apart(model: Any, groups: list[Tensor], ropes: list[Rope]) -> list[Tensor]:
    for block in model.blocks:
        groups = block(groups, ropes)
    return groups


def linears(model: Any, groups: list[Tensor], ropes: list[Rope]) -> list[Tensor]:
    """The tokens of all crops are rows of one matrix wherever tokens do not meet."""
    shapes = [g.shape[:2] for g in groups]
    sizes = [b * n for b, n in shapes]
    x = torch.cat([g.flatten(0, 1) for g in groups])  # [ΣN, D]
    for block in model.blocks:
        a, heads = block.attn, block.attn.num_heads
        qkv = a.qkv(block.norm1(x))
        seen = []
        for part, (b, n), rope in zip(qkv.split(sizes), shapes, ropes):
            part = part.view(b, n, 3, heads, -1)
            q, k = rotate(part[:, :, :2], *rope).transpose(1, 3).unbind(2)
            y = F.scaled_dot_product_attention(q, k, part[:, :, 2].transpose(1, 2))
            seen.append(y.transpose(1, 2).reshape(b * n, -1))
        x = x + block.ls1(a.proj(torch.cat(seen)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return [p.unflatten(0, s) for p, s in zip(x.split(sizes), shapes)]


def one_sequence(model: Any, groups: list[Tensor], ropes: list[Rope], attend: Callable[..., Tensor]) -> list[Tensor]:
    """[images, all tokens of all crops of an image, D], crop-major groups in."""
    images = IMAGES
    parts = [g.unflatten(0, (-1, images)).transpose(0, 1).flatten(1, 2) for g in groups]
    lengths = [p.shape[1] for p in parts]
    x = torch.cat(parts, 1)  # [B, ΣN, D]
    crops = [g.shape[0] // images for g in groups]
    sin, cos = (torch.cat([t.repeat(c, 1, 1, 1) for t, c in zip(ts, crops)]) for ts in zip(*ropes))
    for block in model.blocks:
        a, heads = block.attn, block.attn.num_heads
        qkv = a.qkv(block.norm1(x)).unflatten(-1, (3, heads, -1))  # [B, ΣN, 3, heads, d]
        q, k = rotate(qkv[:, :, :2], sin, cos).transpose(1, 3).unbind(2)
        y = attend(q, k, qkv[:, :, 2].transpose(1, 2))
        x = x + block.ls1(a.proj(y.transpose(1, 2).flatten(2)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return [
        p.unflatten(1, (c, -1)).transpose(0, 1).flatten(0, 1) for p, c in zip(x.split(lengths, 1), crops)
    ]  # fmt: skip


def documents(groups: Sequence[Tensor], device: str) -> Tensor:
    """To which crop of the image every token belongs [ΣN]."""
    lengths = [n for g in groups for n in [g.shape[1]] * (g.shape[0] // IMAGES)]
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="dinov3_vits16")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--global-size", type=int, default=224)
    parser.add_argument("--local-size", type=int, default=96)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    global IMAGES
    IMAGES = args.images
    dtype = getattr(torch, args.dtype)

    model: Any = load(args.model, "random", seed=0).to(args.device, dtype).eval()
    groups, ropes = [], []
    for crops, side in ((2, args.global_size), (8, args.local_size)):
        x = torch.randn(crops * IMAGES, 3, side, side, device=args.device, dtype=dtype)
        tokens, grid = model.tokens(x)
        groups.append(tokens.detach())
        ropes.append(rotation(*model.rope_embed(*grid), 1 + model.n_storage_tokens))
    same = documents(groups, args.device)
    mask = same[:, None] == same[None]

    def masked(model: Any, groups: list[Tensor], ropes: list[Rope]) -> list[Tensor]:
        return one_sequence(
            model, groups, ropes, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        )

    variants: dict[str, Callable[..., list[Tensor]]] = {"apart": apart, "linears": linears, "masked": masked}
    if args.compile:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        n = len(same)
        blocks = create_block_mask(lambda b, h, i, j: same[i] == same[j], None, None, n, n, device=args.device)

        def flex(model: Any, groups: list[Tensor], ropes: list[Rope]) -> list[Tensor]:
            return one_sequence(model, groups, ropes, lambda q, k, v: flex_attention(q, k, v, block_mask=blocks))

        variants["flex"] = flex
        variants = {name: torch.compile(f) for name, f in variants.items()}

    def step(f: Callable[..., list[Tensor]]) -> float:
        model.zero_grad(set_to_none=True)
        inputs = [g.requires_grad_() for g in groups]
        if args.device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        out = f(model, inputs, ropes)
        sum(o.float().square().mean() for o in out).backward()  # type: ignore[union-attr]
        if args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    with torch.no_grad():
        wanted = apart(model, groups, ropes)
        for name, f in variants.items():
            worst = max(float((a - b).abs().max()) for a, b in zip(wanted, f(model, groups, ropes)))
            assert worst < (1e-4 if dtype == torch.float32 else 0.5), (name, worst)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(args.rounds + 1):
        for name, f in variants.items():
            seconds = step(f)
            if i:  # the first round warms up
                times[name].append(seconds)
    lengths = [n for g in groups for n in [g.shape[1]] * (g.shape[0] // IMAGES)]
    what = f"{sum(lengths)} tokens an image in {len(lengths)} crops"
    print(f"{args.model}, {IMAGES} images, {what}, {args.dtype} on {args.device}")
    for name, seconds_ in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds_, times["apart"]))
        print(f"{name:8} {1e3 * statistics.median(seconds_):8.1f} ms a step   {ratio:5.2f} of apart")


if __name__ == "__main__":
    main()
