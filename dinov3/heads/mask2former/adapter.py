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
from dinov3.heads.mask2former.deformable import MSDeformAttn, centres
from dinov3.models.base import Backbone

COARSEST = 32  # stride of the coarsest map
Shapes = Sequence[tuple[int, int]]


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
