"""The detector (paper §7, App. D.1): a DETR with a plain transformer on a frozen backbone's layers.

Legend: B images, D_i width of layer i, C = Σ D_i, p patch, k windows per side, h×w grid = H//p × W//p, d width of the
transformer, Q queries, K classes, P proposals. Attribute names that end up in files are given. `objectives` trains it; the
published model is in `hub.published_heads`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError, one_of, only_known
from dinov3.heads.encoder import FrozenLayers, adapted_size, dtype_of
from dinov3.models.base import Backbone
from dinov3.models.convnext import ChannelNorm, ConvNeXt

# ---- a frozen backbone's layers --------------------------------------------------------------------------------------
# The published detector processes large images: 3×3 windows, each near the size the backbone was trained at, run
# separately and laid back together; and the whole image once, at the size of one window. Features = [whole ; windows],
# 2·C channels. Without windows (k = 0) the whole image at its own size, C channels.


TEMPERATURE = 10000


def detector_layers(backbone: Backbone) -> list[int]:
    """Four blocks at even distances: m·n//4 − 1. (24 blocks: 5, 11, 17, 23, one off the depth heads' 4, 11, 17, 23.)"""
    return [m * backbone.n_blocks // 4 - 1 for m in (1, 2, 3, 4)]


def detector_windows(backbone: Backbone) -> int:
    """Windows per side by depth: 40 blocks 3 and 24 to 39 blocks 2, as in the reference; smaller ViTs and ConvNeXts,
    for smaller machines and images, none."""
    if isinstance(backbone, ConvNeXt) or backbone.n_blocks < 24:
        return 0
    return 2 if backbone.n_blocks < 40 else 3


def detector_patch(backbone: Backbone) -> int:
    """Pixels per cell of the feature grid, in both directions."""
    if backbone.patch_size is None:
        raise DinoError(
            "the detector needs all layers on one grid: build the ConvNeXt with patch_size=16, which resizes its maps to it"
        )
    return backbone.patch_size


class NamedNorm(nn.Module):
    """A channel norm under the name `ln`, as files have it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln = ChannelNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(x)


class ConcatenatedLayers(FrozenLayers):
    """Images [B, 3, H, W] → [B, C, h, w]: the chosen layers, each through the backbone's final norm, side by side.

    layernorm: a trainable norm of its own for every layer on top.
    """

    def __init__(self, backbone: Backbone, layers: str | Sequence[int], *, layernorm: bool = False) -> None:
        super().__init__(backbone, layers, adapt="never")
        self.patch = detector_patch(backbone)
        self.channels = sum(self.widths)
        self.layer_norms = nn.ModuleList(NamedNorm(D) for D in self.widths) if layernorm else None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        maps = [patches for patches, _ in super().forward(x)]
        if self.layer_norms is not None:
            maps = [norm(m.to(dtype_of(norm))) for norm, m in zip(self.layer_norms, maps)]
        return torch.cat(maps, dim=1)

    def smallest_side(self, side: int) -> int:
        """The side itself: any image of at least one patch will do."""
        return side


class Windows(nn.Module):
    """Images [B, 3, H, W] → [B, 2·C, h, w]: the whole at one window's size, and k×k windows, over channels.

    Windows are ⌈(H // k) / p⌉·p pixels high; the last takes what is left (likewise in width).
    """

    def __init__(self, layers: ConcatenatedLayers, k: int) -> None:
        super().__init__()
        self._backbone = layers
        self.k, self.patch, self.channels = k, layers.patch, 2 * layers.channels

    def sides(self, side: int) -> list[int]:
        """Heights (widths) of the windows, in pixels, of an image that high (wide)."""
        first = adapted_size((side // self.k, 0), self.patch)[0]
        return [first] * (self.k - 1) + [side - (self.k - 1) * first]

    def smallest_side(self, side: int) -> int:
        """The side, or the next larger one at which every window holds a patch: at 100 pixels and k = 3 the first two
        windows would take 96 of them."""
        while min(self.sides(side)) < self.patch:
            side += 1
        return side

    def forward(self, x: Tensor) -> Tensor:
        heights, widths = self.sides(x.shape[-2]), self.sides(x.shape[-1])
        rows = []
        for row in x.split(heights, dim=-2):
            rows.append(torch.cat([self._backbone(window) for window in row.split(widths, dim=-1)], dim=-1))
        windows = torch.cat(rows, dim=-2)  # [B, C, h, w]
        whole = self._backbone(antialiased(x, (heights[0], widths[0])))
        return torch.cat([antialiased(whole, (windows.shape[-2], windows.shape[-1])), windows], dim=1)


def antialiased(x: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """In float32: on CPUs there is no antialias in bfloat16."""
    y = x if x.dtype == torch.float64 else x.float()
    if torch.compiler.is_exporting():  # not every runtime filters when it resizes
        return (triangles(x.shape[-2], size_hw[0]) @ y @ triangles(x.shape[-1], size_hw[1]).T).to(x.dtype)
    return F.interpolate(y, size=size_hw, mode="bilinear", align_corners=False, antialias=True).to(x.dtype)


def triangles(size: int, out: int) -> Tensor:
    """[out, size] float32: what `antialiased` multiplies rows (or columns) by, triangles as wide as two cells of the coarser
    side, which sum to 1."""
    distance = (torch.arange(out)[:, None] + 0.5) * (size / out) - (torch.arange(size) + 0.5)
    weights = (1 - distance.abs() / torch.sym_max(size / out, 1.0)).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


# ---- images of different sizes as one batch ----------------------------------------------------------------------


def batched(images: Sequence[Tensor], smallest_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """[3, H_i, W_i] each → (zeros [B, 3, H, W] with the images at the top left, padding [B, H, W], True on it)."""
    H = max(smallest_hw[0], *(x.shape[-2] for x in images))
    W = max(smallest_hw[1], *(x.shape[-1] for x in images))
    batch = images[0].new_zeros(len(images), images[0].shape[0], H, W)
    padding = torch.ones(len(images), H, W, dtype=torch.bool, device=batch.device)
    for i, x in enumerate(images):
        batch[i, :, : x.shape[-2], : x.shape[-1]] = x
        padding[i, : x.shape[-2], : x.shape[-1]] = False
    return batch, padding


def nearest(mask: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """A boolean mask [B, H, W] at another size, nearest neighbour."""
    return F.interpolate(mask[:, None].float(), size=size_hw, mode="nearest")[:, 0] > 0.5


def sine(x: Tensor, n: int) -> Tensor:
    """[...] → [..., n]: sin at even and cos at odd places of x / t_i, t_i = 10000^(2·(i//2)/n)."""
    i = torch.arange(n, device=x.device)
    angles = x[..., None] / TEMPERATURE ** (2 * (i // 2) / n)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)


def grid_position(padding: Tensor, d: int) -> Tensor:
    """padding [B, h, w] → [B, d, h, w] float32: d/2 sines of the row, then of the column, counted from 0 to 2π over each
    image's own extent."""
    inside = (~padding).float()
    parts = []
    for axis in (1, 2):
        count = inside.cumsum(axis)
        last = count.narrow(axis, count.shape[axis] - 1, 1)
        parts.append(sine((count - 0.5) / (last + 1e-6) * 2 * math.pi, d // 2))
    return torch.cat(parts, dim=-1).permute(0, 3, 1, 2)


# ---- boxes ----------------------------------------------------------------------------------------------------------
# Pure functions of any leading shape, last dimension 4. "xyxy": left, top, right, bottom. "cxcywh": centre, width, height.
# Deltas: a box relative to another one, free of scale: (Δcx/w, Δcy/h, ln w'/w, ln h'/h). x to the right, y down, in pixels.
# Everything is computed in float32 or wider: at 2,000 pixels bfloat16 rounds to 8.


LARGEST_LOG_RATIO = abs(math.log(16 / 1000))  # one refinement changes a side by a factor of 62.5 at most
EPS = 1e-7


def to_xyxy(boxes: Tensor) -> Tensor:
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def to_cxcywh(boxes: Tensor) -> Tensor:
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def clip_xyxy(boxes: Tensor, size_hw: Tensor) -> Tensor:
    """Corners moved into the image. size_hw: [..., 2], broadcast against the boxes' leading shape."""
    limit = size_hw.flip(-1).to(boxes)  # (W, H)
    return torch.minimum(boxes.clamp_min(0), torch.cat([limit, limit], dim=-1))


def refine(boxes: Tensor, deltas: Tensor, size_hw: Tensor) -> Tensor:
    """Boxes (cxcywh) moved by deltas and clipped to an image of size_hw [..., 2]; cxcywh again.

    (50, 40, 20, 10) by (½, −1, ln 2, 10) in an image of 96×64 is (40, 0)–(80, 64), as corners.
    """
    deltas = deltas.to(boxes.dtype)
    centre = boxes[..., :2] + boxes[..., 2:] * deltas[..., :2]
    size = boxes[..., 2:] * deltas[..., 2:].clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    return to_cxcywh(clip_xyxy(to_xyxy(torch.cat([centre, size], dim=-1)), size_hw))


def deltas_between(boxes: Tensor, targets: Tensor) -> Tensor:
    """The deltas that take `boxes` to `targets` (both cxcywh, broadcast), within what one refinement can do."""
    size = boxes[..., 2:].clamp_min(EPS)
    shift = (targets[..., :2] - boxes[..., :2]) / size
    ratio = (targets[..., 2:].clamp_min(EPS) / size).log()
    return torch.cat([shift, ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)], dim=-1)


# ---- the transformer -------------------------------------------------------------------------------------------------
# An encoder, proposals on four grids, a decoder whose attention knows the boxes, after arXiv 2308.01904 ("DETR does not need
# multi-scale or locality design"). Boxes are (centre, size)
# in pixels of the images given, unless a name says xyxy. Boxes, positions and biases are computed in float32 whatever
# the parameters are: sines of pixels do not survive bfloat16.


BIASES = ("linear", "abs_log8")
PADDED = -100.0  # added to the attention to padded cells, as published; not −inf
MOST_BIASES = 2**25  # numbers in one piece of cross-attention's bias: 128 MiB of float32


@dataclass(frozen=True)
class DetrConfig:
    """What defines a detector beside its backbone; the defaults are the published one's."""

    n_classes: int = 91
    width: int = 768
    n_heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_ffn: int = 2048
    decoder_ffn: int = 2048
    encoder_dropout: float = 0.1
    n_queries: int = 1500  # each takes at most one object: what is used to detect
    n_queries_one2many: int = 1500  # in training only: each object is taken by several
    bias_hidden: int = 512
    bias_type: str = "linear"  # of pixel distances, or "abs_log8": sign(δ)·log2(|δ| + 1) / 3
    proposal_min_size: float = 50.0  # pixels, on the finest of the four grids; doubled on each next one
    layers: tuple[int, ...] | None = None  # of the backbone; None: `detector_layers`
    windows: int | None = None  # per side; 0: none; None: `detector_windows`
    layernorm: bool = False  # one of its own for every layer of the backbone
    topk: int = 1500  # detections per image

    @classmethod
    def of(cls, **options: Any) -> DetrConfig:
        """Like the constructor, but an unknown option is an error with suggestions instead of a TypeError."""
        only_known("a detector has no option", options, (f.name for f in fields(cls)))
        if options.get("layers") is not None:
            options["layers"] = tuple(options["layers"])
        return cls(**options)

    def __post_init__(self) -> None:
        one_of("bias_type", self.bias_type, BIASES)
        if self.width % 32 or self.width % self.n_heads:
            raise DinoError(
                f"a detector's width is a multiple of 32 and of n_heads; {self.width} with {self.n_heads} heads is not"
            )
        if self.n_classes < 1 or self.n_queries < 1:
            raise DinoError("a detector needs at least one class and one query")


# ---- encoder -------------------------------------------------------------------------------------------------------


class EncoderLayer(nn.Module):
    """Post-norm: s ← norm1(s + attention), s ← norm2(s + FFN)."""

    def __init__(self, c: DetrConfig) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(c.width, c.n_heads, batch_first=True)  # no dropout here
        self.linear1, self.linear2 = nn.Linear(c.width, c.encoder_ffn), nn.Linear(c.encoder_ffn, c.width)
        self.norm1, self.norm2 = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.dropout = nn.Dropout(c.encoder_dropout)

    def forward(self, s: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        q = s + position
        attended, _ = self.self_attn(q, q, s, key_padding_mask=padding, need_weights=False)
        s = self.norm1(s + self.dropout(attended))
        return self.norm2(s + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(s))))))


class Encoder(nn.Module):
    def __init__(self, c: DetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(c) for _ in range(c.encoder_layers))

    def forward(self, s: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        for layer in self.layers:
            s = layer(s, position, padding)
        return s


# ---- decoder -------------------------------------------------------------------------------------------------------


class BoxAttention(nn.Module):
    """Cross-attention with a bias from the box of every query: bias[(i, j)] = x-part[j] + y-part[i]."""

    def __init__(self, c: DetrConfig) -> None:
        super().__init__()
        self.n_heads, self.bias_type = c.n_heads, c.bias_type
        self.cpb_mlp1 = self._bias_mlp(c)  # of columns: distances to the left and right side
        self.cpb_mlp2 = self._bias_mlp(c)  # of rows: to the upper and lower side
        self.q, self.k, self.v = (nn.Linear(c.width, c.width) for _ in range(3))
        self.proj = nn.Linear(c.width, c.width)

    @staticmethod
    def _bias_mlp(c: DetrConfig) -> nn.Sequential:
        return nn.Sequential(nn.Linear(2, c.bias_hidden), nn.ReLU(), nn.Linear(c.bias_hidden, c.n_heads, bias=False))

    def line_bias(self, mlp: nn.Sequential, sides: Tensor, centres: Tensor) -> Tensor:
        """Sides [B, Q, 2] and cell centres [n] in pixels → [B, heads, Q, n] float32."""
        distance = sides[:, :, None, :] - centres[:, None]  # [B, Q, n, 2]
        if self.bias_type == "abs_log8":
            distance = distance.sign() * (distance.abs() + 1).log2() / 3
        first: Any = mlp[0]
        last: Any = mlp[2]
        hidden = F.relu(F.linear(distance, first.weight.float(), first.bias.float()))
        return F.linear(hidden, last.weight.float()).permute(0, 3, 1, 2)

    def forward(
        self, query: Tensor, boxes: Tensor, key: Tensor, value: Tensor, grid: Grid, padding: Tensor | None
    ) -> Tensor:
        """query [B, Q, d], boxes [B, Q, 4], key and value [B, hw, d], padding [B, hw] → [B, Q, d]."""
        B, Q, d = query.shape
        q, k, v = (
            layer(x).view(B, -1, self.n_heads, d // self.n_heads).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, key), (self.v, value))
        )  # [B, heads, Q or hw, d/heads]
        corners = to_xyxy(boxes)
        outputs = []
        # In pieces: at 2048 pixels the bias of all 1500 queries would take 0.8 GB a layer.
        step = Q if torch.compiler.is_exporting() else max(1, MOST_BIASES // (B * self.n_heads * k.shape[2]))
        for start in range(0, Q, step):
            chosen = slice(start, start + step)
            with torch.autocast(query.device.type, enabled=False):
                x = self.line_bias(self.cpb_mlp1, corners[:, chosen, 0::2], grid.columns_px(boxes))
                y = self.line_bias(self.cpb_mlp2, corners[:, chosen, 1::2], grid.rows_px(boxes))
                bias = (y[..., :, None] + x[..., None, :]).flatten(-2)  # [B, heads, q, hw]
                if padding is not None:
                    bias = bias + PADDED * padding[:, None, None]
            outputs.append(F.scaled_dot_product_attention(q[:, :, chosen], k, v, attn_mask=bias.to(q.dtype)))
        return self.proj(torch.cat(outputs, dim=2).transpose(1, 2).reshape(B, Q, d))


class DecoderLayer(nn.Module):
    """Pre-norm, in this order: queries among themselves (norm2), to the image (norm1), FFN (norm3)."""

    def __init__(self, c: DetrConfig) -> None:
        super().__init__()
        self.cross_attn = BoxAttention(c)
        self.norm1 = nn.LayerNorm(c.width)
        self.self_attn = nn.MultiheadAttention(c.width, c.n_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(c.width)
        self.linear1, self.linear2 = nn.Linear(c.width, c.decoder_ffn), nn.Linear(c.decoder_ffn, c.width)
        self.norm3 = nn.LayerNorm(c.width)

    def forward(self, t: Tensor, position: Tensor, boxes: Tensor, memory: Memory, apart: Tensor | None) -> Tensor:
        """`apart` [Q, Q]: True where a query does not see another one (the two groups of training)."""
        u = self.norm2(t)
        q = u + position
        t = t + self.self_attn(q, q, u, attn_mask=apart, need_weights=False)[0]
        u = self.norm1(t)
        t = t + self.cross_attn(u + position, boxes, memory.keys, memory.values, memory.grid, memory.padding)
        return t + self.linear2(F.relu(self.linear1(self.norm3(t))))


class ThreeLinear(nn.Module):
    """d → d → d → out. In files: `layers`."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, out)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](F.relu(self.layers[1](F.relu(self.layers[0](x)))))


class Decoder(nn.Module):
    """Queries and boxes refine each other. The heads are the detector's; files hold them under both names."""

    def __init__(self, c: DetrConfig, class_embed: nn.ModuleList, bbox_embed: nn.ModuleList) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.decoder_layers))
        self.final_layer_norm = nn.LayerNorm(c.width)
        self.bbox_embed, self.class_embed = bbox_embed, class_embed

    def forward(
        self, t: Tensor, position: Tensor, boxes: Tensor, memory: Memory, size_hw: Tensor, apart: Tensor | None
    ) -> list[dict[str, Tensor]]:
        """One prediction per layer. The boxes that steer the next layer carry no gradient; those that are predicted
        from do ("look forward twice", arXiv 2203.03605), so a layer also learns from the one after it."""
        predictions, before = [], boxes
        for layer, to_class, to_box in zip(self.layers, self.class_embed, self.bbox_embed):
            t = layer(t, position, boxes, memory, apart)
            normed = self.final_layer_norm(t)
            deltas = to_box(normed)
            predictions.append(
                {
                    "pred_logits": to_class(normed),
                    "pred_boxes": refine(before, deltas, size_hw),
                    "pred_boxes_old": before,
                    "pred_deltas": deltas,
                }
            )
            before = refine(boxes, deltas, size_hw)
            boxes = before.detach()
        return predictions


# ---- the two stages ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The feature grid: h×w cells of `patch` pixels."""

    h: int
    w: int
    patch: int

    def rows_px(self, like: Tensor) -> Tensor:
        """Pixel centres of the rows of cells, [h]."""
        return (torch.arange(self.h, device=like.device, dtype=like.dtype) + 0.5) * self.patch

    def columns_px(self, like: Tensor) -> Tensor:
        return (torch.arange(self.w, device=like.device, dtype=like.dtype) + 0.5) * self.patch


@dataclass(frozen=True)
class Memory:
    """The encoded image as the decoder reads it."""

    keys: Tensor  # [B, hw, d], positions added
    values: Tensor  # [B, hw, d]
    padding: Tensor | None  # [B, hw]; None where there is none
    grid: Grid


class Transformer(nn.Module):
    def __init__(self, c: DetrConfig, class_embed: nn.ModuleList, bbox_embed: nn.ModuleList) -> None:
        super().__init__()
        d = c.width
        self.config = c
        self.level_embed = nn.Parameter(torch.zeros(1, d))
        self.encoder = Encoder(c)
        self.decoder = Decoder(c, class_embed, bbox_embed)
        self.enc_output, self.enc_output_norm = nn.Linear(d, d), nn.LayerNorm(d)
        self.pos_trans, self.pos_trans_norm = nn.Linear(2 * d, 2 * d), nn.LayerNorm(2 * d)
        # The one map at half, one, two and four times its stride.
        self.enc_output_proj = nn.ModuleList(
            [
                nn.Sequential(nn.ConvTranspose2d(d, d, 2, stride=2)),
                nn.Identity(),
                nn.Sequential(nn.Conv2d(d, d, 2, stride=2)),
                nn.Sequential(nn.Conv2d(d, d, 2, stride=2), NamedNorm(d), nn.GELU(), nn.Conv2d(d, d, 2, stride=2)),
            ]
        )

    def forward(
        self, features: Tensor, padding: Tensor, patch: int, content: Tensor, groups: tuple[int, ...], padded: bool
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], int]:
        """Projected features [B, d, h, w], padding [B, h, w] and the queries' content [Q', d].

        groups: how many queries see each other: (Q,), or (Q, one-to-many) in training. padded: whether `padding` holds
        any True. → (a prediction per layer, the proposals' own prediction, how many queries the first group got).
        """
        B, d, h, w = features.shape
        position = grid_position(padding, d).to(features.dtype).flatten(2).transpose(1, 2)  # [B, hw, d]
        position = position + self.level_embed[0]
        flat = padding.flatten(1) if padded else None
        encoded = self.encoder(features.flatten(2).transpose(1, 2), position, flat)
        memory = Memory(encoded + position, encoded, flat, Grid(h, w, patch))

        tokens, proposals, valid, size_hw = self.proposals(encoded.transpose(1, 2).reshape(B, d, h, w), padding, patch)
        tokens = self.enc_output_norm(self.enc_output(tokens))
        first = {
            "pred_logits": self.decoder.class_embed[-1](tokens),
            "pred_deltas": self.decoder.bbox_embed[-1](tokens),
        }
        first |= {"pred_boxes_old": proposals, "pred_boxes": refine(proposals, first["pred_deltas"], size_hw)}
        first["valid"] = valid

        taken: list[int] = []  # small images have fewer proposals than there are queries
        rows, start = [], 0
        for group in groups:
            taken.append(min(group, proposals.shape[1] - sum(taken)))
            rows.append(content[start : start + taken[-1]])
            start += group
        best = first["pred_logits"][..., 0].topk(sum(taken), dim=1).indices  # class 0 says whether it is an object
        boxes = first["pred_boxes"].gather(1, best[..., None].expand(-1, -1, 4)).detach()
        query = torch.cat(rows).expand(B, -1, -1)
        predictions = self.decoder(query, self.box_position(boxes), boxes, memory, size_hw, self.apart(taken, boxes))
        return predictions, first, taken[0]

    def proposals(self, memory: Tensor, padding: Tensor, patch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(tokens [B, P, d], proposals [B, P, 4], which of them are any good [B, P], the images' height and width
        [B, 1, 2]), finest grid first.

        A proposal is a square in the middle of its cell. Those on padding or near the border are set to one constant,
        and their token to 0, so that they score alike and low.
        """
        tokens, boxes, outside = [], [], []
        extent = memory.new_zeros(0)
        for level, project in enumerate(self.enc_output_proj):
            y = project(memory)  # [B, d, h_l, w_l]
            h, w = y.shape[-2:]
            stride = patch * 2.0 ** (level - 1)
            mask = nearest(padding, (h, w))
            if level == 0:
                rows, columns = (~mask[:, :, 0]).sum(1), (~mask[:, 0, :]).sum(1)
                extent = torch.stack([rows, columns], dim=-1)[:, None].float() * stride  # [B, 1, (VH, VW)]
                far = max(h, w) * stride
            cy = (torch.arange(h, device=y.device, dtype=torch.float32) + 0.5) * stride
            cx = (torch.arange(w, device=y.device, dtype=torch.float32) + 0.5) * stride
            side = torch.full((h, w), self.config.proposal_min_size * 2.0**level, device=y.device)
            grid = torch.stack([cx.expand(h, w), cy[:, None].expand(h, w), side, side], dim=-1).flatten(0, 1)
            tokens.append(y.flatten(2).transpose(1, 2))
            boxes.append(grid.expand(y.shape[0], -1, -1))
            outside.append(mask.flatten(1))
        proposals, size = torch.cat(boxes, 1), extent.flip(-1).tile(2)  # [B, P, 4], [B, 1, (VW, VH, VW, VH)]
        inside = ((proposals > 0.01 * size) & (proposals < 0.99 * size)).all(-1)
        valid = inside & ~torch.cat(outside, 1)
        proposals = proposals.masked_fill(~valid[..., None], far)
        return torch.cat(tokens, 1).masked_fill(~valid[..., None], 0.0), proposals, valid, extent

    def box_position(self, boxes: Tensor) -> Tensor:
        """Boxes [B, Q, 4] → the queries' position [B, Q, d]: d/2 sines of each number, a linear layer, a norm. Half of
        its 2·d outputs are not used, as published."""
        sines = sine(boxes * 2 * math.pi, self.config.width // 2).flatten(-2)  # [B, Q, 2d]
        return self.pos_trans_norm(self.pos_trans(sines.to(self.pos_trans.weight.dtype)))[..., : self.config.width]

    @staticmethod
    def apart(taken: Sequence[int], like: Tensor) -> Tensor | None:
        """True between queries of different groups."""
        if len(taken) == 1:
            return None
        group = torch.cat([torch.full((n,), i, device=like.device) for i, n in enumerate(taken)])
        return group[:, None] != group[None, :]


# ---- the detector ----------------------------------------------------------------------------------------------------
# `build_detector` puts it on any backbone with sizes of its own; the defaults of `DetrConfig` are Meta's over the 7B.


class Detector(nn.Module):
    """Normalised images, a list of [3, H_i, W_i] → logits and boxes of every query and layer.

    The backbone is frozen and stays in evaluation mode. In training mode `n_queries_one2many` more queries are used, in a
    group of their own ("hybrid matching", arXiv 2207.13080).
    """

    def __init__(self, features: ConcatenatedLayers | Windows, config: DetrConfig) -> None:
        super().__init__()
        c = self.config = config
        heads = c.decoder_layers + 1  # one per layer, and the proposals'
        class_embed = nn.ModuleList(nn.Linear(c.width, c.n_classes) for _ in range(heads))
        bbox_embed = nn.ModuleList(ThreeLinear(c.width, 4) for _ in range(heads))
        self.transformer = Transformer(c, class_embed, bbox_embed)
        self.class_embed, self.bbox_embed = class_embed, bbox_embed
        self.query_embed = nn.Embedding(c.n_queries + c.n_queries_one2many, c.width)
        self.input_proj = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(features.channels, c.width, kernel_size=1), nn.GroupNorm(32, c.width))]
        )
        self.backbone = nn.ModuleList([features])

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fresh weights of everything but the backbone. Every class begins at 1 %, every box as its proposal."""
        for module in self.head_modules():
            if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                module.reset_parameters()
            if isinstance(module, NamedNorm):
                nn.init.ones_(module.ln.weight)
                nn.init.zeros_(module.ln.bias)
        for name, p in self.transformer.named_parameters():
            if p.ndim > 1:
                nn.init.xavier_uniform_(p)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for module in self.transformer.decoder.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.normal_(self.transformer.level_embed)
        nn.init.normal_(self.query_embed.weight)
        project: Any = self.input_proj.get_submodule("0.0")
        nn.init.xavier_uniform_(project.weight)
        nn.init.zeros_(project.bias)
        for to_class in self.class_embed:
            assert isinstance(to_class, nn.Linear)
            nn.init.constant_(to_class.bias, -math.log(99))
        for to_box in self.bbox_embed:
            last: Any = to_box.get_submodule("layers.2")
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def head_modules(self) -> list[nn.Module]:
        """Every module outside the frozen backbone."""
        frozen = set(self.frozen.modules())
        return [module for module in self.modules() if module not in frozen]

    @property
    def frozen(self) -> nn.Module:
        """The backbone itself."""
        return self.get_submodule(self.backbone_key.rstrip("."))

    @property
    def backbone_key(self) -> str:
        """What the backbone's entries in the state dict begin with."""
        return "backbone.0._backbone.backbone." if isinstance(self.backbone[0], Windows) else "backbone.0.backbone."

    def see(self, images: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor, bool]:
        """(features [B, C, h, w], padding [B, h, w], whether there is any)."""
        features: Any = self.backbone[0]
        if isinstance(images, Tensor) and torch.compiler.is_exporting():  # the number of images is a symbol there
            seen = features(images)
            return seen, seen.new_zeros(seen[:, 0].shape, dtype=torch.bool), False
        images = list(images)
        check_images(images, features.patch)
        sides = [max(max(x.shape[i] for x in images), 4 * features.patch) for i in (-2, -1)]
        x, outside = batched(images, (features.smallest_side(sides[0]), features.smallest_side(sides[1])))
        seen = features(x)
        padded = any(tuple(image.shape[-2:]) != tuple(x.shape[-2:]) for image in images)
        return seen, nearest(outside, (seen.shape[-2], seen.shape[-1])), padded

    def forward(self, images: Sequence[Tensor] | Tensor) -> dict[str, Any]:
        """`pred_logits` [B, Q, K], `pred_boxes`, `pred_boxes_old` (refined from), `pred_deltas` [B, Q, 4] of the last
        layer; the same with suffix `_one2many` (no rows in evaluation mode); `aux_outputs`, `aux_outputs_one2many`: lists
        of such for the layers before; `enc_outputs`: of all proposals."""
        seen, padding, padded = self.see(images)
        project = self.input_proj[0]
        features = project(seen.to(dtype_of(project)))
        c = self.config
        groups = (c.n_queries, c.n_queries_one2many) if self.training and c.n_queries_one2many else (c.n_queries,)
        sight: Any = self.backbone[0]
        layers, proposals, n = self.transformer(features, padding, sight.patch, self.query_embed.weight, groups, padded)
        one = [{name: value[:, :n] for name, value in layer.items()} for layer in layers]
        many = [{name: value[:, n:] for name, value in layer.items()} for layer in layers]
        outputs: dict[str, Any] = dict(one[-1])
        outputs |= {f"{name}_one2many": value for name, value in many[-1].items()}
        outputs |= {"aux_outputs": one[:-1], "aux_outputs_one2many": many[:-1], "enc_outputs": proposals}
        return outputs


def check_images(images: Sequence[Tensor], patch: int) -> None:
    """One sentence for a batch that is none."""
    if len(images) == 0:
        raise DinoError("the detector was given an empty list; it takes normalised images [3, height, width]")
    for i, x in enumerate(images):
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[0] != 3 or not x.is_floating_point():
            what = f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise DinoError(
                f"image {i} of the list is {what}; the detector takes normalised images [3, height, width] in floating "
                "point"
            )
        if min(x.shape[-2:]) < patch:
            raise DinoError(
                f"image {i} of the list, {x.shape[-1]}×{x.shape[-2]} pixels, is smaller than one patch ({patch}); resize it"
            )


# ---- from queries to detections ------------------------------------------------------------------------------------


class PostProcess(nn.Module):
    """The best `topk` of all Q·K pairs of query and class: no suppression of overlaps, no threshold."""

    def __init__(self, topk: int) -> None:
        super().__init__()
        self.topk = topk

    @torch.no_grad()
    def forward(
        self, outputs: dict[str, Any], target_sizes: Tensor, original_target_sizes: Tensor | None = None
    ) -> list[dict[str, Tensor]]:
        """outputs with `pred_logits` and `pred_boxes`; target_sizes [B, 2]: height and width of the images given;
        original_target_sizes: of the images before they were resized (None: the same).

        → per image `scores` [n] descending, `labels` [n], `boxes` [n, 4] xyxy in pixels of the original image.
        """
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        original = target_sizes if original_target_sizes is None else original_target_sizes
        scores, index = logits.float().sigmoid().flatten(1).topk(min(self.topk, logits[0].numel()), dim=1)
        K = logits.shape[-1]
        size = target_sizes.to(boxes)[:, None]  # [B, 1, 2]
        corners = clip_xyxy(to_xyxy(boxes), size)
        corners = corners.gather(1, (index // K)[..., None].expand(-1, -1, 4))
        scale = (original.to(boxes)[:, None] / size).flip(-1).tile(2)
        found = zip(scores, index % K, corners * scale)
        return [{"scores": s, "labels": label, "boxes": box} for s, label, box in found]


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first."""

    boxes_xyxy_px: Tensor  # [n, 4] in pixels of the original image
    scores: Tensor  # [n] in 0 to 1
    labels: Tensor  # [n] columns of the class head
    names: tuple[str, ...]  # [n]

    def __len__(self) -> int:
        return len(self.scores)


class DetectorWithProcessor(nn.Module):
    """Images in, detections out. `class_names`: one per column of the class head ("" for columns without a class)."""

    def __init__(
        self, detector: Detector, postprocessor: PostProcess, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.detector, self.postprocessor = detector, postprocessor
        K = detector.config.n_classes
        self.class_names = tuple(class_names) if class_names is not None else tuple(f"class {i}" for i in range(K))
        if len(self.class_names) != K:
            raise DinoError(f"the detector has {K} classes and was given {len(self.class_names)} names")

    def forward(
        self, images: Sequence[Tensor], original_sizes_hw: Sequence[tuple[int, int]] | None = None
    ) -> list[dict[str, Tensor]]:
        """Normalised images [3, H_i, W_i] → per image `scores`, `labels`, `boxes` (xyxy, pixels of the tensor given,
        or of an image of original_sizes_hw of which the tensor is a resized copy)."""
        outputs = self.detector(images)
        device = outputs["pred_boxes"].device
        sizes = torch.tensor([tuple(x.shape[-2:]) for x in images], device=device)
        original = None
        if original_sizes_hw is not None:
            if len(original_sizes_hw) != len(images):
                raise DinoError(f"{len(original_sizes_hw)} sizes were given for {len(images)} images")
            original = torch.tensor([tuple(size) for size in original_sizes_hw], device=device)
        return self.postprocessor(outputs, sizes, original)

    @torch.no_grad()
    def detect(
        self,
        images: Sequence[Tensor],
        original_sizes_hw: Sequence[tuple[int, int]] | None = None,
        *,
        score_threshold: float = 0.0,
        most: int | None = None,
    ) -> list[Detections]:
        """As calling it, without those below `score_threshold` and those after the first `most`, and with names."""
        results = []
        for found in self(images, original_sizes_hw):
            n = int((found["scores"] >= score_threshold).sum())  # scores descend
            n = n if most is None else min(n, most)
            labels = found["labels"][:n]
            names = tuple(self.class_names[i] for i in labels.tolist())
            results.append(Detections(found["boxes"][:n], found["scores"][:n], labels, names))
        return results


def build_detector(
    backbone: Backbone,
    n_classes: int = 91,
    *,
    class_names: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **sizes: Any,
) -> DetectorWithProcessor:
    """A detector over a backbone, with a fresh head, in training mode (the backbone in evaluation mode).

    `sizes` are fields of `DetrConfig`; layers and windows follow the backbone unless given.
    """
    config = DetrConfig.of(n_classes=n_classes, **sizes)
    layers = config.layers if config.layers is not None else tuple(detector_layers(backbone))
    windows = config.windows if config.windows is not None else detector_windows(backbone)
    if windows and backbone.patch_size != backbone.stride:
        raise DinoError(
            "windows are for ViTs: a ConvNeXt's last map has strides of 32 and would not tile; pass windows=0"
        )
    if windows == 1 or windows < 0:
        raise DinoError(f"windows is 0 (none) or at least 2 per side, not {windows}")
    detector_patch(backbone)
    features: ConcatenatedLayers | Windows = ConcatenatedLayers(backbone, layers, layernorm=config.layernorm)
    if windows:
        assert isinstance(features, ConcatenatedLayers)
        features = Windows(features, windows)
    detector = Detector(features, replace(config, layers=layers, windows=windows))
    if not any(p.is_meta for p in detector.parameters()):
        detector.init_weights()
    model = DetectorWithProcessor(detector, PostProcess(config.topk), class_names)
    return model.to(device=device, dtype=dtype)
