"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159) in plain PyTorch: forward, backward, any device.

Every query attends to a few points only: a linear layer gives each head K offsets per level from a reference point and a
weight for each, the value maps are read there bilinearly (zero outside), and the output is their weighted sum.

Legend: B images, Q queries, S = Σ H_l·W_l value positions, L levels, M heads, K points, C width, d width of one head.
Points are (x, y) in [0, 1] of the map, pixel centres at (i + 0.5) / size.

The published code needs a compiled operator; here every point is four corners, each a row number of the value table and
a weight (bilinear · attention), and `embedding_bag` sums the 4·L·K weighted rows of a query and head without ever laying
them out. The plain definition, one point after another, is in the tests; `benchmarks/deformable.py` has the ratio to the
usual loop of `grid_sample` over the levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError

Shapes = Sequence[tuple[int, int]]  # (H_l, W_l) of the levels


def neighbours(coordinate: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The two cells beside each coordinate (in cells, centres at whole numbers): their numbers, int32 and inside
    [0, size), and their linear weights, 0 for a cell that lies outside."""
    coordinate = coordinate.clamp(-1, size)  # further out nothing changes, and no offset overflows an integer
    below = coordinate.detach().floor()
    fraction = coordinate - below
    cells = []
    for cell, weight in ((below, 1 - fraction), (below + 1, fraction)):
        inside = cell.clamp(0, size - 1)
        # the second clamp is for NaN, which would be an address far outside the table
        cells.append((inside.int().clamp(0, size - 1), weight * (inside == cell)))
    return cells


def deformable_sampling(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Σ_l Σ_k weights · value_l(locations): [B, Q, M·d].

    value [B, S, M, d]: the levels one after another, each row by row. locations [B, Q, M, L, K, 2] as (x, y) in [0, 1].
    weights [B, Q, M, L, K]. All of one floating-point type.
    """
    (B, S, M, d), Q = value.shape, locations.shape[1]
    table_row = torch.arange(B, device=value.device, dtype=torch.int32).view(B, 1, 1, 1) * S * M
    table_row = table_row + torch.arange(M, device=value.device, dtype=torch.int32).view(M, 1)  # [B, 1, M, 1]
    rows, factors, start = [], [], 0
    for level, (height, width) in enumerate(shapes):
        x, y = locations[:, :, :, level].unbind(-1)  # [B, Q, M, K]
        columns = neighbours(x * width - 0.5, width)
        for line, across in neighbours(y * height - 0.5, height):
            across = across * weights[:, :, :, level]
            line = (line * width + start) * M + table_row
            for column, along in columns:
                rows.append(line + column * M)
                factors.append(across * along)
        start += height * width
    # [B·Q·M, 4·L·K]
    bags, factor = torch.stack(rows, -1).view(B * Q * M, -1), torch.stack(factors, -1).view(B * Q * M, -1)
    sums = F.embedding_bag(bags, value.reshape(B * S * M, d), per_sample_weights=factor, mode="sum")
    return sums.view(B, Q, M * d)


def centres(shapes: Shapes, *, device: torch.device | None = None) -> Tensor:
    """(x, y) in [0, 1] of every cell's centre, the levels one after another, each row by row: [Σ H_l·W_l, 2] float32."""
    points = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        points.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1))
    return torch.cat(points)


class MSDeformAttn(nn.Module):
    """Queries [B, Q, C] that read L value maps at the points they choose: [B, Q, C].

    ratio: the values' width M·d as a part of C. Points and sampling are float32 (float64 in a float64 model) whatever
    the module's own type, and also under autocast: in bfloat16 a point on a map of 128 would be off by half a cell.
    """

    def __init__(self, d_model: int, n_levels: int, n_heads: int = 8, n_points: int = 4, *, ratio: float = 1.0) -> None:
        super().__init__()
        width = int(d_model * ratio)
        if width < n_heads or width % n_heads:
            raise DinoError(
                f"deformable attention cannot share {width} value channels (width {d_model} · ratio {ratio}) among "
                f"{n_heads} heads; choose n_heads so that it divides them"
            )
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, width)
        self.output_proj = nn.Linear(width, d_model)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """At first head m looks along its own direction 2π·m/M, 1 to K cells away, at all points equally."""
        angle = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)  # [M, 2]
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        bias = direction[:, None, None] * steps[:, None]  # [M, 1, K, 2]
        bias = bias.expand(self.n_heads, self.n_levels, self.n_points, 2).flatten()
        self.sampling_offsets.bias.copy_(bias)
        for zero in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(zero)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, reference_points: Tensor, value: Tensor, shapes: Shapes, padding_mask: Tensor | None = None
    ) -> Tensor:
        """query [B, Q, C]; value [B, S, C], S positions of L maps of these shapes (H_l, W_l), one after another.

        reference_points: [B or 1, Q, L or 1, 2] (x, y) in [0, 1], offsets then count cells; or [·, ·, ·, 4] boxes
        (x, y, w, h), offsets then count the K-th part of half a box. padding_mask [B, S]: True where a position is
        padding and reads as 0.
        """
        (B, Q, _), S = query.shape, value.shape[1]
        M, L, K = self.n_heads, self.n_levels, self.n_points
        if len(shapes) != L or sum(height * width for height, width in shapes) != S:
            raise DinoError(f"deformable attention over {L} levels was given {S} positions as maps of {list(shapes)}")
        if reference_points.shape[-1] not in (2, 4):
            raise DinoError(f"reference points are (x, y) or (x, y, w, h), not {reference_points.shape[-1]} numbers")
        value = self.value_proj(value)  # [B, S, M·d]
        if padding_mask is not None:
            value = value.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        offsets, weights = self.sampling_offsets(query), self.attention_weights(query)
        with torch.autocast(query.device.type, enabled=False):
            wide = torch.float64 if query.dtype is torch.float64 else torch.float32
            offsets = offsets.to(wide).view(B, Q, M, L, K, 2)
            weights = weights.to(wide).view(B, Q, M, L * K).softmax(-1).view(B, Q, M, L, K)
            reference = reference_points.to(wide)[:, :, None, :, None]  # [·, Q, 1, L, 1, 2 or 4]
            if reference.shape[-1] == 2:
                # plain numbers as divisors: no tensor has to travel to the device for them
                x, y = offsets.unbind(-1)  # [B, Q, M, L, K]
                cells = [torch.stack([x[..., i, :] / w, y[..., i, :] / h], -1) for i, (h, w) in enumerate(shapes)]
                locations = reference + torch.stack(cells, dim=3)
            else:
                locations = reference[..., :2] + offsets * (reference[..., 2:] * (0.5 / K))
            read = deformable_sampling(value.to(wide).unflatten(-1, (M, -1)), shapes, locations, weights)
        return self.output_proj(read.to(value.dtype))
