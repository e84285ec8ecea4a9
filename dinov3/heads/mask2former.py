"""Mask2Former (arXiv 2112.01527) on a frozen backbone: segments as masks with a class each (paper §6.3.2, Tab. 11).

A pyramid of four maps at strides 4, 8, 16 and 32 (`ViTAdapter` of a ViT, `StagePyramid` of a ConvNeXt), a pixel decoder, and
queries that each give a mask and a class. `objectives` trains it, `encoder.make_inference` turns masks into class maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError
from dinov3.heads.detr import ThreeLinear, sine
from dinov3.heads.encoder import FrozenLayers, check_levels, dtype_of, resized, step_of
from dinov3.models.base import Backbone

# ---- the pyramid -----------------------------------------------------------------------------------------------------
# `ViTAdapter` is ViT-Adapter (arXiv 2205.08534) without its injector: a small convolutional branch sees the image's fine
# detail, and its tokens read the layers of the ViT, which stays as it is: no gradient, evaluation mode. A ConvNeXt has
# such maps already: `StagePyramid`.
#
# Legend: B images, D width of the ViT, p its patch, h×w its grid, H×W the adapted image in pixels (multiples of 32 and
# of p), N = HW/8² + HW/16² + HW/32² tokens of the branch. Attribute names that end up in files are given; batch norms keep
# plain BatchNorm2d keys.


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
    weights [B, Q, M, L, K]. All of one floating-point type. An exported graph samples `level_by_level`: other runtimes have
    that operator.
    """
    if torch.compiler.is_exporting():
        return level_by_level(value, shapes, locations, weights)
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


def level_by_level(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """`deformable_sampling` the usual way: each level as images [B·M, d, H, W], sampled, weighted and added."""
    (B, _, M, d), (Q, K) = value.shape, (locations.shape[1], locations.shape[4])
    reads, start = [], 0
    for level, (height, width) in enumerate(shapes):
        images = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(B * M, d, height, width)
        points = (2 * locations[:, :, :, level] - 1).transpose(1, 2).reshape(B * M, Q, K, 2)
        read = F.grid_sample(images, points, mode="bilinear", padding_mode="zeros", align_corners=False)
        reads.append((read * weights[:, :, :, level].transpose(1, 2).reshape(B * M, 1, Q, K)).sum(-1))
        start += height * width
    return torch.stack(reads).sum(0).view(B, M * d, Q).transpose(1, 2)


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


# ---- Mask2Former -----------------------------------------------------------------------------------------------------
# Queries attend to the maps of a pixel decoder and each gives one mask and one class, of which the last means "nothing".
# The published model is in `hub.published_heads`.
#
# Legend: B images, K classes, Q queries, M width, four maps at strides 4 to 32 of the adapted image of H×W pixels.
# Attribute names that end up in files are given.


GROUPS = 32  # of every GroupNorm


def positions(shape: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """[h·w, width] float32: width/2 sines of the row, then of the column, counted from 1 and scaled to at most 2π."""
    height, across = shape
    y = torch.arange(1, height + 1, device=device, dtype=torch.float32) / (height + 1e-6)
    x = torch.arange(1, across + 1, device=device, dtype=torch.float32) / (across + 1e-6)
    y, x = sine(y * 2 * math.pi, width // 2), sine(x * 2 * math.pi, width // 2)
    grid = torch.cat([y[:, None].expand(-1, across, -1), x[None].expand(height, -1, -1)], dim=-1)
    return grid.flatten(0, 1)


# ---- pixel decoder -------------------------------------------------------------------------------------------------


class PixelLayer(nn.Module):
    """Post-norm: every position of the three maps reads all three around its own place."""

    def __init__(self, width: int, *, n_heads: int, n_points: int, ffn: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(width, 3, n_heads, n_points)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.linear1, self.linear2 = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, s: Tensor, position: Tensor, reference: Tensor, shapes: Shapes) -> Tensor:
        s = self.norm1(s + self.self_attn(s + position, reference, s, shapes))
        return self.norm2(s + self.linear2(F.relu(self.linear1(s))))


class PixelLayers(nn.Module):
    """In files: `layers`."""

    def __init__(self, n_layers: int, width: int, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PixelLayer(width, **options) for _ in range(n_layers))


class PixelEncoder(nn.Module):
    """Three maps [B, M, h_l, w_l], coarse to fine, to three of the same shapes. In files: `level_encoding`, `encoder`."""

    def __init__(self, n_layers: int, width: int, **options: Any) -> None:
        super().__init__()
        self.level_encoding = nn.Parameter(torch.zeros(3, width))
        self.encoder = PixelLayers(n_layers, width, **options)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        shapes = [(level.shape[-2], level.shape[-1]) for level in maps]
        s = sequence_of(maps)  # [B, S, M]
        width, device = s.shape[-1], s.device
        places = [positions(shape, width, device) + e for shape, e in zip(shapes, self.level_encoding, strict=True)]
        position = torch.cat(places).to(s.dtype)  # [S, M]
        reference = centres(shapes, device=device)[None, :, None]  # [1, S, 1, 2]: the same on all three maps
        for layer in self.encoder.layers:
            s = layer(s, position, reference, shapes)
        return maps_of(s, shapes)


class NormedConv(nn.Conv2d):
    """A convolution without bias and its GroupNorm. In files: `weight` and `norm.*`."""

    def __init__(self, inside: int, outside: int, kernel_size: int) -> None:
        super().__init__(inside, outside, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.GroupNorm(GROUPS, outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class PixelDecoder(nn.Module):
    """Maps of D_i channels at strides 4, 8, 16, 32 → mask features [B, M, H/4, W/4] and maps [B, M, ·, ·] at strides 32,
    16, 8. Always in the parameters' own precision, also under autocast: the masks depend on it."""

    def __init__(
        self, widths: Sequence[int], width: int, *, n_layers: int, n_heads: int, n_points: int, ffn: int
    ) -> None:
        super().__init__()
        self.input_convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(D, width, kernel_size=1), nn.GroupNorm(GROUPS, width)) for D in widths[:0:-1]
        )
        self.encoder = PixelEncoder(n_layers, width, n_heads=n_heads, n_points=n_points, ffn=ffn)
        self.lateral_convs = nn.ModuleList([NormedConv(widths[0], width, 1)])
        self.output_convs = nn.ModuleList([NormedConv(width, width, 3)])
        self.mask_feature = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(maps[0].device.type, enabled=False):
            fine, *coarse = [level.to(dtype_of(self)) for level in maps]
            projected = [project(level) for project, level in zip(self.input_convs, reversed(coarse), strict=True)]
            outputs = self.encoder(projected)
            fine = self.lateral_convs[0](fine)
            fine = fine + resized(outputs[-1], fine.shape[-2:])
            return self.mask_feature(F.relu(self.output_convs[0](fine))), outputs


# ---- transformer decoder -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention under the key names of `nn.MultiheadAttention`, which would copy a mask for every head."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
        """q [B, Q, M], k and v [B, S, M]; allowed [B, Q, S]: True where a query may attend."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [B, heads, ·, M / heads]
            for x, weight, bias in zip((q, k, v), weights, biases)
        )
        mask = allowed.unsqueeze(1) if allowed is not None else None
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class CrossAttentionLayer(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.multihead_attn, self.norm = Attention(width, n_heads), nn.LayerNorm(width)

    def forward(self, q: Tensor, place: Tensor, memory: Tensor, position: Tensor, allowed: Tensor) -> Tensor:
        return self.norm(q + self.multihead_attn(q + place, memory + position, memory, allowed))


class SelfAttentionLayer(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.self_attn, self.norm = Attention(width, n_heads), nn.LayerNorm(width)

    def forward(self, q: Tensor, place: Tensor) -> Tensor:
        return self.norm(q + self.self_attn(q + place, q + place, q))


class FFNLayer(nn.Module):
    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.linear1, self.linear2, self.norm = nn.Linear(width, ffn), nn.Linear(ffn, width), nn.LayerNorm(width)

    def forward(self, q: Tensor) -> Tensor:
        return self.norm(q + self.linear2(F.relu(self.linear1(q))))


class MaskDecoder(nn.Module):
    """Mask features and three maps → Q masks with classes, after every layer. A query attends only where its mask of the
    layer before is: "masked attention"."""

    def __init__(self, width: int, n_classes: int, *, n_queries: int, n_layers: int, n_heads: int, ffn: int) -> None:
        super().__init__()
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(width, n_heads) for _ in range(n_layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(width, n_heads) for _ in range(n_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(FFNLayer(width, ffn) for _ in range(n_layers))
        self.post_norm = nn.LayerNorm(width)
        self.query_feat, self.query_embed = nn.Embedding(n_queries, width), nn.Embedding(n_queries, width)
        self.level_embed = nn.Embedding(3, width)
        self.class_embed = nn.Linear(width, n_classes + 1)
        self.mask_embed = ThreeLinear(width, width)

    def forward(self, mask_features: Tensor, maps: Sequence[Tensor], *, every_layer: bool) -> list[dict[str, Tensor]]:
        """[{pred_logits [B, Q, K + 1], pred_masks [B, Q, H/4, W/4]}]: of the initial queries and of all layers, or of the
        last layer only."""
        B, dtype = mask_features.shape[0], dtype_of(self)
        mask_features, maps = mask_features.to(dtype), [level.to(dtype) for level in maps]
        shapes = [(level.shape[-2], level.shape[-1]) for level in maps]
        memories = [sequence_of([level]) + self.level_embed.weight[i] for i, level in enumerate(maps)]  # [B, S_l, M]
        places = [positions(shape, mask_features.shape[1], mask_features.device).to(dtype) for shape in shapes]
        # Resizing is linear, so the mask features are resized once instead of the masks of every layer: where masks
        # are only looked through, they are never made at full size.
        small = [resized(mask_features, shape).detach().flatten(2) for shape in shapes]  # [B, M, S_l]

        queries = self.query_feat.weight.expand(B, -1, -1)
        place = self.query_embed.weight
        outputs = []
        n_layers = len(self.transformer_ffn_layers)
        for i in range(n_layers + 1):
            normed = self.post_norm(queries)
            embedding = self.mask_embed(normed)  # [B, Q, M]
            if every_layer or i == n_layers:
                masks = torch.einsum("bqm,bmhw->bqhw", embedding, mask_features)
                outputs.append({"pred_logits": self.class_embed(normed), "pred_masks": masks})
            if i == n_layers:
                break
            level = i % 3
            allowed = embedding.detach() @ small[level] >= 0  # [B, Q, S_l]: probability at least ½
            allowed |= ~allowed.any(-1, keepdim=True)  # a query whose mask is empty attends everywhere
            queries = self.transformer_cross_attention_layers[i](
                queries, place, memories[level], places[level], allowed
            )
            queries = self.transformer_self_attention_layers[i](queries, place)
            queries = self.transformer_ffn_layers[i](queries)
        return outputs


class Mask2FormerHead(nn.Module):
    """Four maps (strides 4, 8, 16, 32; `Pyramid`) → logits and masks of the queries. Defaults: the published head's.

    widths: channels of the maps. hidden_dim: the width M, a multiple of 32 and of n_heads.
    """

    def __init__(
        self,
        widths: Sequence[int],
        n_classes: int,
        *,
        hidden_dim: int = 2048,
        n_heads: int = 16,
        n_points: int = 4,
        ffn: int = 4096,
        n_queries: int = 100,
        pixel_layers: int = 6,
        decoder_layers: int = 9,
    ) -> None:
        super().__init__()
        check_levels("Mask2Former head", len(widths), 4)
        if n_classes < 1 or n_queries < 1:
            raise DinoError(
                f"a Mask2Former head needs at least one class and one query, not {n_classes} and {n_queries}"
            )
        if hidden_dim < GROUPS or hidden_dim % GROUPS or hidden_dim % n_heads:
            raise DinoError(
                f"hidden_dim must be a multiple of {GROUPS} (group norms) and of n_heads ({n_heads}), {hidden_dim} is not"
            )
        self.widths, self.n_classes = list(widths), n_classes
        self.pixel_decoder = PixelDecoder(
            widths, hidden_dim, n_layers=pixel_layers, n_heads=n_heads, n_points=n_points, ffn=ffn
        )
        self.predictor = MaskDecoder(
            hidden_dim, n_classes, n_queries=n_queries, n_layers=decoder_layers, n_heads=n_heads, ffn=ffn
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Attention):
                nn.init.xavier_uniform_(module.in_proj_weight)
                nn.init.zeros_(module.in_proj_bias)
            elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.Embedding)):
                module.reset_parameters()
        for module in self.modules():  # its layers were just given something else
            if isinstance(module, MSDeformAttn):
                module.init_weights()
        nn.init.normal_(self.pixel_decoder.encoder.level_encoding)

    def forward(self, maps: Sequence[Tensor], *, every_layer: bool = True) -> dict[str, Any]:
        check_levels("Mask2Former head", len(maps), 4)
        if [level.shape[1] for level in maps] != self.widths:
            raise DinoError(f"the Mask2Former head expects {self.widths} channels, got {[m.shape[1] for m in maps]}")
        mask_features, coarse_to_fine = self.pixel_decoder(maps)
        *aux, last = self.predictor(mask_features, coarse_to_fine, every_layer=every_layer)
        return {**last, "aux_outputs": aux} if every_layer else last


# ---- images to masks ---------------------------------------------------------------------------------------------


class Mask2FormerSegmentor(nn.Module):
    """A frozen backbone with its pyramid and a Mask2Former head, as two steps `segmentation_model.0` and `.1`.

    autocast_dtype: torch.bfloat16 or float16 runs both under autocast on an accelerator (never the pixel decoder, nor the
    sampling of deformable attention). On the CPU, as in the reference, and with None or float32 everywhere, the
    parameters' own precision counts.
    """

    def __init__(self, pyramid: Pyramid, head: Mask2FormerHead, *, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if pyramid.widths != head.widths:
            raise DinoError(
                f"this Mask2Former head reads maps of {head.widths} channels, the backbone gives {pyramid.widths}: the "
                "head belongs to another backbone"
            )
        self.segmentation_model = nn.ModuleList([pyramid, head])
        self.autocast_dtype = None if autocast_dtype is torch.float32 else autocast_dtype

    @property
    def pyramid(self) -> Pyramid:
        return self.segmentation_model[0]  # type: ignore[return-value]

    def outputs(self, x: Tensor, *, every_layer: bool) -> dict[str, Any]:
        pyramid, head = self.segmentation_model
        cast = self.autocast_dtype is not None and x.device.type != "cpu"
        with torch.autocast(x.device.type, self.autocast_dtype) if cast else nullcontext():
            return head(pyramid(x), every_layer=every_layer)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Normalised images [B, C, H, W] → `pred_logits` [B, Q, K + 1] (the last: nothing), `pred_masks` [B, Q, H'/4,
        W'/4] (logits, over the adapted image, H' and W' the next multiples of 32), and `aux_outputs`, the same of the
        initial queries and of every layer but the last."""
        return self.outputs(x, every_layer=True)

    @torch.no_grad()
    def predict(self, x: Tensor, rescale_to: tuple[int, int] = (512, 512)) -> dict[str, Tensor]:
        """`pred_logits` [B, Q, K + 1] and `pred_masks` [B, Q, *rescale_to] (logits) over exactly the image given,
        whatever its size. What only training needs is not computed."""
        outputs, size_hw = self.outputs(x, every_layer=False), (x.shape[-2], x.shape[-1])
        masks = outputs["pred_masks"]
        if self.pyramid.adapt == "center_padding" and self.pyramid.adapted_size(size_hw) != size_hw:
            masks = self.pyramid.to_image(masks, size_hw)
        return {"pred_logits": outputs["pred_logits"], "pred_masks": resized(masks, rescale_to)}


def default_width(backbone: Backbone) -> int:
    """M for a backbone: half its width, between 256 and the published 2048 of the 7B; a multiple of 64."""
    return min(max(backbone.embed_dim // 2 // 64 * 64, 256), 2048)


def build_segmentor(
    backbone: Backbone,
    n_classes: int = 150,
    *,
    hidden_dim: int | None = None,
    ffn: int | None = None,
    layers: str | Sequence[int] = "FOUR_EVEN_INTERVALS",
    adapt: str = "center_padding",
    autocast_dtype: torch.dtype | None = None,
    adapter: dict[str, Any] | None = None,
    **head_options: Any,
) -> Mask2FormerSegmentor:
    """A segmentor with a fresh head on any backbone: an adapter on a ViT, its own stages for a ConvNeXt.

    hidden_dim: the head's width; None: half the backbone's, 256 to 2048. ffn: None: twice the width, at least 1024.
    layers: four blocks of a ViT. adapter: options of `ViTAdapter`; head_options: those of `Mask2FormerHead`.
    """
    width = hidden_dim or default_width(backbone)
    pyramid: Pyramid
    if hasattr(backbone, "embed_dims"):
        if adapter or layers != "FOUR_EVEN_INTERVALS":
            raise DinoError("a ConvNeXt's pyramid are its four stages: it has no adapter and no layers to choose")
        pyramid = StagePyramid(backbone, adapt=adapt)
    else:
        pyramid = ViTAdapter(backbone, layers, adapt=adapt, **(adapter or {}))
    head = Mask2FormerHead(pyramid.widths, n_classes, hidden_dim=width, ffn=ffn or max(2 * width, 1024), **head_options)
    return Mask2FormerSegmentor(pyramid, head, autocast_dtype=autocast_dtype)
