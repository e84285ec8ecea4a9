"""Four maps at strides 4, 8, 16 and 32 from a frozen backbone, for heads that need a pyramid (paper §6.3.2).

`ViTAdapter` is ViT-Adapter (arXiv 2205.08534) without its injector: a small convolutional branch sees the image's fine
detail, and its tokens read the layers of the ViT, which stays as it is: no gradient, evaluation mode. A ConvNeXt has
such maps already: `StagePyramid`. What to do with the maps is the business of `heads.mask2former`.

Legend: B images, D width of the ViT, p its patch, h×w its grid, H×W the adapted image in pixels (multiples of 32 and
of p), N = HW/8² + HW/16² + HW/32² tokens of the branch. Attribute names that end up in files are given; batch norms keep
plain BatchNorm2d keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError
from dinov3.heads.encoder import FrozenLayers, check_levels, resized, step_of
from dinov3.models.base import Backbone

# ---- multi-scale deformable attention -------------------------------------------------------------------------------
# Deformable DETR (arXiv 2010.04159) in plain PyTorch: forward, backward, any device. Every query attends to a few points:
# a linear layer gives each head K offsets per level from a reference point and a weight for each, the value maps are read
# there bilinearly (zero outside), and the output is their weighted sum. The published code needs a compiled operator; here
# every point is four corners, each a row number of the value table and a weight (bilinear · attention), and `embedding_bag`
# sums the 4·L·K weighted rows of a query and head without ever laying them out. The plain definition, one point after
# another, is in the tests; `benchmarks/deformable.py` has the ratio to the usual loop of `grid_sample` over the levels.
#
# Legend: Q queries, S = Σ H_l·W_l value positions, L levels, M heads, K points, C width, d width of one head. Points are
# (x, y) in [0, 1] of the map, pixel centres at (i + 0.5) / size.


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


COARSEST = 32  # stride of the coarsest map


# ---- the branch ----------------------------------------------------------------------------------------------------


def conv_norm_relu(inside: int, outside: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inside, outside, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(inplace=True),
    ]


class SpatialPrior(nn.Module):
    """Images [B, C, H, W] → maps of D channels at strides 4, 8, 16, 32."""

    def __init__(self, dim: int, channels: int = 64, in_chans: int = 3) -> None:
        super().__init__()
        c = channels
        self.stem = nn.Sequential(
            *conv_norm_relu(in_chans, c, 2),
            *conv_norm_relu(c, c, 1),
            *conv_norm_relu(c, c, 1),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*conv_norm_relu(c, 2 * c, 2))
        self.conv3 = nn.Sequential(*conv_norm_relu(2 * c, 4 * c, 2))
        self.conv4 = nn.Sequential(*conv_norm_relu(4 * c, 4 * c, 2))
        self.fc1, self.fc2, self.fc3, self.fc4 = (nn.Conv2d(n * c, dim, kernel_size=1) for n in (1, 2, 4, 4))

    def forward(self, x: Tensor) -> list[Tensor]:
        c1 = self.stem(x)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return [self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)]


class DepthwiseConv(nn.Module):
    """Each map of a sequence [B, N, C] convolved by itself. In files: `dwconv`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        return torch.cat([self.dwconv(level).flatten(2).transpose(1, 2) for level in maps_of(x, shapes)], dim=1)


class ConvFFN(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.dwconv, self.fc2 = nn.Linear(dim, hidden), DepthwiseConv(hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), shapes)))


class Extractor(nn.Module):
    """Tokens c [B, N, D] read one layer of the ViT, z [B, h·w, D], and pass through an FFN."""

    def __init__(self, dim: int, *, n_heads: int, n_points: int, ratio: float, ffn_ratio: float, drop: float) -> None:
        super().__init__()
        self.query_norm, self.feat_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = MSDeformAttn(dim, 1, n_heads, n_points, ratio=ratio)
        self.ffn, self.ffn_norm = ConvFFN(dim, int(dim * ffn_ratio)), nn.LayerNorm(dim, eps=1e-6)
        self.drop = drop  # stochastic depth of the FFN, per image, in training

    def forward(self, c: Tensor, z: Tensor, reference: Tensor, grid_hw: tuple[int, int], shapes: Shapes) -> Tensor:
        c = c + self.attn(self.query_norm(c), reference, self.feat_norm(z), [grid_hw])
        y = self.ffn(self.ffn_norm(c), shapes)
        if self.training and self.drop:
            kept = torch.empty(len(y), 1, 1, dtype=y.dtype, device=y.device).bernoulli_(1 - self.drop)
            y = y * (kept / (1 - self.drop))
        return c + y


class Interaction(nn.Module):
    """One layer of the ViT and the extractors that read it: one, and on the last layer two more."""

    def __init__(self, dim: int, *, n_extra: int, **options: Any) -> None:
        super().__init__()
        self.extractor = Extractor(dim, **options)
        if n_extra:
            self.extra_extractors = nn.ModuleList(Extractor(dim, **options) for _ in range(n_extra))

    def forward(self, c: Tensor, *given: Any) -> Tensor:
        c = self.extractor(c, *given)
        for extractor in getattr(self, "extra_extractors", ()):
            c = extractor(c, *given)
        return c


# ---- the adapter ---------------------------------------------------------------------------------------------------


def maps_of(x: Tensor, shapes: Shapes) -> list[Tensor]:
    """A sequence [B, Σ H_l·W_l, C] → its maps [B, C, H_l, W_l]."""
    parts = x.split([height * width for height, width in shapes], dim=1)
    return [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]


def sequence_of(maps: Sequence[Tensor]) -> Tensor:
    """Maps [B, C, H_l, W_l] → one sequence [B, Σ H_l·W_l, C], row by row."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)


class Pyramid(FrozenLayers):
    """Images [B, C, height, width] → maps at strides 4, 8, 16, 32 of the adapted image, `widths` channels each.

    Common to both kinds: images are padded (or stretched) to multiples of `multiple`, 32 or more, and one that is
    smaller than a patch is refused: it would be nearly all padding.
    """

    def __init__(self, backbone: Backbone, layers: str | Sequence[int], *, adapt: str) -> None:
        super().__init__(backbone, layers, adapt=adapt, multiple=math.lcm(COARSEST, step_of(backbone)))
        check_levels("pyramid", len(self.layers), 4)
        self.smallest = backbone.patch_size or backbone.stride

    def adapted(self, x: Tensor) -> Tensor:
        if x.ndim == 4 and min(x.shape[-2:]) < self.smallest:
            raise DinoError(
                f"an image of {x.shape[-1]}×{x.shape[-2]} pixels is smaller than one patch ({self.smallest}); resize it"
            )
        x = super().adapted(x)
        if x.shape[-2] % self.multiple or x.shape[-1] % self.multiple:
            raise DinoError(
                f"the pyramid needs sides in multiples of {self.multiple}, got {x.shape[-1]}×{x.shape[-2]} pixels; "
                "adapt='center_padding' pads any image"
            )
        return x

    def pyramid(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return self.pyramid(self.adapted(x))

    def norms(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self.get_submodule(f"norm{i}")(level) for i, level in enumerate(maps, 1)]


class ViTAdapter(Pyramid):
    """The adapter on a ViT; `widths` are four times D. In files the backbone is `backbone.*`.

    layers: four blocks that are read, finest use first. drop_path: stochastic depth of the extractors' FFNs, in training.
    """

    def __init__(
        self,
        backbone: Backbone,
        layers: str | Sequence[int] = "FOUR_EVEN_INTERVALS",
        *,
        channels: int = 64,
        n_heads: int = 16,
        n_points: int = 4,
        value_ratio: float = 0.5,
        ffn_ratio: float = 0.25,
        drop_path: float = 0.3,
        adapt: str = "center_padding",
    ) -> None:
        if hasattr(backbone, "embed_dims"):
            raise DinoError(
                "the adapter reads the layers of a ViT, and this backbone is a ConvNeXt, whose stages are a pyramid "
                "already: use StagePyramid (build_segmentor chooses it by itself)"
            )
        super().__init__(backbone, layers, adapt=adapt)
        dim = backbone.embed_dim
        in_chans = getattr(getattr(backbone, "config", None), "in_chans", 3)
        self.level_embed = nn.Parameter(torch.zeros(3, dim))
        self.spm = SpatialPrior(dim, channels, in_chans)
        options: dict[str, Any] = {
            "n_heads": n_heads,
            "n_points": n_points,
            "ratio": value_ratio,
            "ffn_ratio": ffn_ratio,
            "drop": drop_path,
        }
        self.interactions = nn.ModuleList(Interaction(dim, n_extra=2 if i == 3 else 0, **options) for i in range(4))
        self.up = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.BatchNorm2d(dim) for _ in range(4))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Everything but the backbone."""
        for part in (self.spm, self.interactions, self.up, self.norm1, self.norm2, self.norm3, self.norm4):
            for module in part.modules():
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out")
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
                elif isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
                elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                    module.reset_parameters()
        for module in self.interactions.modules():
            if isinstance(module, MSDeformAttn):
                module.init_weights()
        nn.init.normal_(self.level_embed)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        dtype = self.level_embed.dtype  # the backbone's may differ
        # of the CLS tokens nothing is used
        z = [patches.to(dtype) for patches, _ in FrozenLayers.forward(self, x)]  # 4 · [B, D, h, w]
        c1, *coarse = self.spm(x.to(dtype))
        shapes = [(level.shape[-2], level.shape[-1]) for level in coarse]
        c = torch.cat([sequence_of([level]) + e for level, e in zip(coarse, self.level_embed, strict=True)], dim=1)
        del coarse
        reference = centres(shapes, device=x.device)[None, :, None]  # [1, N, 1, 2]
        grid = (z[0].shape[-2], z[0].shape[-1])
        for interaction, layer in zip(self.interactions, z, strict=True):
            c = interaction(c, sequence_of([layer]), reference, grid, shapes)
        c2, c3, c4 = maps_of(c, shapes)
        c1 = self.up(c2) + c1
        return self.norms([level + resized(layer, level.shape[-2:]) for level, layer in zip((c1, c2, c3, c4), z)])


class StagePyramid(Pyramid):
    """A ConvNeXt's four stages as they are, each through a batch norm: the plain counterpart of the adapter. Nothing
    like it was published."""

    def __init__(self, backbone: Backbone, *, adapt: str = "center_padding") -> None:
        if not hasattr(backbone, "embed_dims"):
            raise DinoError("StagePyramid takes the stages of a ConvNeXt; on a ViT use ViTAdapter")
        if backbone.patch_size:
            raise DinoError(
                f"this ConvNeXt resizes all its maps to one stride (patch_size={backbone.patch_size}), so they are no "
                "pyramid; load it without patch_size"
            )
        super().__init__(backbone, [0, 1, 2, 3], adapt=adapt)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.BatchNorm2d(width) for width in self.widths)

    @torch.no_grad()
    def init_weights(self) -> None:
        for norm in (self.norm1, self.norm2, self.norm3, self.norm4):
            norm.reset_parameters()

    def pyramid(self, x: Tensor) -> list[Tensor]:
        return self.norms([stage.to(self.norm1.weight.dtype) for stage, _ in FrozenLayers.forward(self, x)])
