"""A wider student that computes what a narrower one does: the first weights of a longer training.

    python -m projects.vitt16.widen --to dinov3_vits16 --out wide.safetensors

The residual stream gets more channels, the attention more heads, the feed-forward layers more hidden units (in the spirit of
Net2Net, arXiv 1511.05641). Nothing writes to the new channels yet, and nothing reads the new heads and units: they are random
going in and zero coming out, so gradients reach all of them at once. LayerNorm takes its statistics over all channels: with
zeros in the new ones the mean must be zero, so everything that writes to the stream is centred (LayerNorm would take the
mean off anyway), and the variance is smaller by d/D, which goes into the norms' weights.

Legend: d the old width, D the new one.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import dinov3
from dinov3.errors import DinoError
from dinov3.hub import load
from dinov3.weights import catalog, writing


@torch.no_grad()
def widen(narrow: Any, wide: Any, *, seed: int = 0, std: float = 0.02) -> None:
    """Fills `wide`, a plain ViT of the same depth, head width and patch size, so that its first d output channels are those
    of `narrow` and the others zero. Raises `DinoError` where the two do not fit."""
    a, b = narrow.config, wide.config
    same = ("depth", "patch_size", "head_dim", "n_storage_tokens", "ffn_layer", "qkv_bias", "norm_layer")
    d, D = a.embed_dim, b.embed_dim
    if any(getattr(a, name) != getattr(b, name) for name in same) or d > D or a.ffn_layer != "mlp":
        raise DinoError(f"a student of width {D} cannot grow out of one of width {d}: only their widths may differ")
    draw = torch.Generator().manual_seed(seed)
    scale = (d / D) ** 0.5

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * std

    def written(x: Tensor, dim: int) -> Tensor:
        """What goes into the stream along `dim`: centred, zeros for the new channels."""
        x = x - x.mean(dim, keepdim=True)
        zeros = list(x.shape)
        zeros[dim] = D - d
        return torch.cat([x, x.new_zeros(zeros)], dim)

    def norm(old: Any, new: Any) -> None:
        new.weight.copy_(torch.cat([old.weight, old.weight.abs().mean().expand(D - d)]) * scale)
        new.bias.copy_(torch.cat([old.bias, old.bias.new_zeros(D - d)]))

    def grown(x: Tensor, rows: int) -> Tensor:
        """[n, d] → [rows, D]: what reads the stream; random for new channels and for new rows."""
        out = random(rows, D)
        out[: len(x), :d] = x
        return out

    def mixing(old: Any, new: Any, gamma: Tensor) -> None:
        """What writes to the stream: the layer scale goes into the layer, new columns are zero."""
        weight = written(gamma[:, None] * old.weight, 0)
        new.weight.zero_()
        new.weight[:, : weight.shape[1]] = weight
        new.bias.copy_(written(gamma * old.bias, 0))

    for name in ("cls_token", "storage_tokens", "mask_token"):
        getattr(wide, name).copy_(written(getattr(narrow, name), -1))
    wide.patch_embed.proj.weight.copy_(written(narrow.patch_embed.proj.weight, 0))
    wide.patch_embed.proj.bias.copy_(written(narrow.patch_embed.proj.bias, 0))
    wide.rope_embed.periods.copy_(narrow.rope_embed.periods)
    norm(narrow.norm, wide.norm)
    for old, new in zip(narrow.blocks, wide.blocks, strict=True):
        norm(old.norm1, new.norm1)
        norm(old.norm2, new.norm2)
        new.attn.qkv.weight.copy_(torch.cat([grown(part, D) for part in old.attn.qkv.weight.chunk(3)]))
        parts = [torch.cat([part, part.new_zeros(D - d)]) for part in old.attn.qkv.bias.chunk(3)]
        new.attn.qkv.bias.copy_(torch.cat(parts))
        mixing(old.attn.proj, new.attn.proj, old.ls1.gamma)
        new.mlp.fc1.weight.copy_(grown(old.mlp.fc1.weight, b.ffn_hidden))
        new.mlp.fc1.bias.copy_(torch.cat([old.mlp.fc1.bias, old.mlp.fc1.bias.new_zeros(b.ffn_hidden - a.ffn_hidden)]))
        mixing(old.mlp.fc2, new.mlp.fc2, old.ls2.gamma)
        for layer_scale in (new.ls1, new.ls2):
            layer_scale.gamma.fill_(1.0)


def main(
    to: Annotated[str, typer.Option(help="The wider architecture.")],
    out: Annotated[Path, typer.Option(help="Its first weights.")],
    start: Annotated[str, typer.Option(help="The narrower model, all that `dinov3.load` takes.")] = "dinov3_vitt16",
    seed: int = 0,
) -> None:
    """Widen a trained student without a change of what it computes."""
    narrow, wide = dinov3.load(start).float(), load(to, "random", seed=seed).float()
    widen(narrow, wide, seed=seed)
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        before, after = (m.eval().forward_features(x)["x_norm_clstoken"] for m in (narrow, wide))
    print(f"largest difference of CLS {(before - after[:, : before.shape[1]]).abs().max():.1e}, new channels "
          f"{after[:, before.shape[1] :].abs().max():.1e}")  # fmt: skip
    row = catalog.resolve(to)[0]
    mean, std = catalog.STATISTICS["lvd1689m"]
    writing.save(wide.state_dict(), out, {"config": asdict(row.config), "row": row.id, "mean": mean, "std": std})


if __name__ == "__main__":
    typer.run(main)
