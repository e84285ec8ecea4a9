"""The detector's transformer: an encoder, proposals on four grids, a decoder whose attention knows the boxes.

After arXiv 2308.01904 ("DETR does not need multi-scale or locality design"). Attribute names that end up in files are
given. `heads.detr` puts it on a backbone and reads detections from it; `heads.detr.loss` trains it.

Legend: B images, d width, h×w grid of patches (p pixels), Q queries, K classes, P proposals. Boxes are (centre, size)
in pixels of the images given, unless a name says xyxy. Boxes, positions and biases are computed in float32 whatever
the parameters are: sines of pixels do not survive bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError, one_of, only_known
from dinov3.heads.detr.features import NamedNorm, grid_position, nearest, refine, sine, to_xyxy

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
        step = max(1, MOST_BIASES // (B * self.n_heads * k.shape[2]))
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


class BoxMLP(nn.Module):
    """d → d → d → 4 deltas."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)])

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
                nowhere = max(h, w) * stride
            cy = (torch.arange(h, device=y.device, dtype=torch.float32) + 0.5) * stride
            cx = (torch.arange(w, device=y.device, dtype=torch.float32) + 0.5) * stride
            side = torch.full((h, w), self.config.proposal_min_size * 2.0**level, device=y.device)
            grid = torch.stack([cx.expand(h, w), cy[:, None].expand(h, w), side, side], dim=-1).flatten(0, 1)
            tokens.append(y.flatten(2).transpose(1, 2))
            boxes.append(grid.expand(len(y), -1, -1))
            outside.append(mask.flatten(1))
        proposals, size = torch.cat(boxes, 1), extent.flip(-1).tile(2)  # [B, P, 4], [B, 1, (VW, VH, VW, VH)]
        inside = ((proposals > 0.01 * size) & (proposals < 0.99 * size)).all(-1)
        valid = inside & ~torch.cat(outside, 1)
        proposals = proposals.masked_fill(~valid[..., None], nowhere)
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
