"""The detector's input features: a frozen backbone's layers in windows and as a whole (paper §7; App. D.1); its boxes.

Legend: B images, D_i width of layer i, C = Σ D_i, p patch, k windows per side, h×w grid = H//p × W//p.

The published detector processes large images: 3×3 windows, each near the size the backbone was trained at, run
separately and laid back together; and the whole image once, at the size of one window. Features = [whole ; windows],
2·C channels. Without windows (k = 0) the whole image at its own size, C channels.

Attribute names that end up in files are given: `_backbone`, `backbone`, `layer_norms.j.ln`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError
from dinov3.heads.encoder import FrozenLayers, dtype_of
from dinov3.models.base import Backbone
from dinov3.models.convnext import ChannelNorm, ConvNeXt

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
        first = math.ceil((side // self.k) / self.patch) * self.patch
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
    return F.interpolate(y, size=size_hw, mode="bilinear", align_corners=False, antialias=True).to(x.dtype)


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
