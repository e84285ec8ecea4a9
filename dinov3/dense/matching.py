"""Correspondence: which patch of one image shows what a patch of another shows (paper §6.1.3; the matching notebook).

Here too: patch maps as float32 or unit vectors, the input of all dense methods, from `Features` or a map [h, w, D].

Legend: B images, h×w patch grid, D width, N and M numbers of patches or points.
Points are (x, y) in pixels, patches (row, column).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.errors import DinoError
from dinov3.features import Features


def maps(features: Features | Tensor) -> Tensor:
    """Patch maps [B, h, w, D] in float32; a single map [h, w, D] becomes a batch of one."""
    patches = features.patches if isinstance(features, Features) else features
    if patches.ndim == 3:
        patches = patches[None]
    if patches.ndim != 4:
        raise DinoError(f"expected Features or a map of patches [h, w, D] or [B, h, w, D], got {list(patches.shape)}")
    return patches.float()


def unit_maps(features: Features | Tensor) -> Tensor:
    """Patch maps [B, h, w, D] of unit vectors, so that a dot product is a cosine."""
    return F.normalize(maps(features), dim=-1)


def unit_map(features: Features | Tensor) -> Tensor:
    """The patch map [h, w, D] of one image, as unit vectors."""
    every = unit_maps(features)
    if len(every) != 1:
        raise DinoError(f"this takes the features of one image, got {len(every)}: pass features[i]")
    return every[0]


@dataclass(frozen=True)
class Matches:
    """Pairs of patches, as indices into the flattened grids: left [M], right [M], and their cosine [M]."""

    left: Tensor
    right: Tensor
    similarity: Tensor

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, chosen: Tensor) -> Matches:
        """Some of the matches, by a mask or by numbers."""
        return Matches(self.left[chosen], self.right[chosen], self.similarity[chosen])


def nearest(queries: Tensor, targets: Tensor, k: int = 1, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """The k most similar targets of every query: dot products [N, k], falling, and their numbers [N, k].

    queries [N, D], targets [M, D]. `chunk` queries at a time (default: as many as make a quarter of a gigabyte): the
    whole matrix of two 128 × 128 maps would be a gigabyte.
    """
    if queries.ndim != 2 or targets.ndim != 2 or queries.shape[1] != targets.shape[1]:
        raise DinoError(f"expected two lists of vectors of one width, got {list(queries.shape)}, {list(targets.shape)}")
    if len(targets) < k:
        raise DinoError(f"{k} neighbours were wanted among {len(targets)} targets")
    chunk = chunk or max(1, 2**26 // max(1, len(targets)))
    found = [(part @ targets.T).topk(k, dim=1) for part in queries.split(chunk)]
    if not found:
        return queries.new_zeros(0, k), torch.zeros(0, k, dtype=torch.long, device=queries.device)
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def match(
    left: Features | Tensor,
    right: Features | Tensor,
    *,
    left_mask: Tensor | None = None,
    right_mask: Tensor | None = None,
    mutual: bool = False,
) -> Matches:
    """The best right patch of every left patch, by cosine; both are one image's features (or maps [h, w, D]).

    left_mask, right_mask: boolean maps [h, w]; matches with a patch outside are dropped (the search itself is over all
    patches, so a left patch best matched by the background is dropped and not pressed onto the object). mutual: keep a
    match only if it is the best in both directions.
    """
    if isinstance(left, Features) and isinstance(right, Features):
        left.check_comparable(right)
    a, b = unit_map(left), unit_map(right)
    for name, mask, x in (("left_mask", left_mask, a), ("right_mask", right_mask, b)):
        if mask is not None and mask.shape != x.shape[:2]:
            raise DinoError(f"{name} is a map of patches [{x.shape[0]}, {x.shape[1]}], not {list(mask.shape)}")
    a, b = a.flatten(0, 1), b.flatten(0, 1)
    similarity, there = nearest(a, b)
    matches = Matches(torch.arange(len(a), device=a.device), there[:, 0], similarity[:, 0])
    keep = torch.ones(len(a), dtype=torch.bool, device=a.device)
    if left_mask is not None:
        keep &= as_mask(left_mask).bool().flatten().to(a.device)
    if right_mask is not None:
        keep &= as_mask(right_mask).bool().flatten().to(a.device)[matches.right]
    if mutual:
        _, back = nearest(b, a)
        keep &= back[:, 0][matches.right] == matches.left
    return matches[keep]


def pixels(features: Features, patches: Tensor, image: int = 0) -> Tensor:
    """Centres (x, y) [M, 2] of patches, given as indices into the flattened grid, in the original image's pixels."""
    _, w = features.grid_hw
    points = [features.pixel_of_patch(i // w, i % w, image) for i in patches.tolist()]
    return torch.tensor(points, dtype=torch.float32).reshape(-1, 2)


def coverage(mask: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Share [h, w] of every patch that a mask [H, W] (booleans, or alpha in [0, 1]) covers: its mean over the cell."""
    return F.adaptive_avg_pool2d(as_mask(mask)[None, None].float(), grid_hw)[0, 0]


def as_mask(mask: Any) -> Tensor:
    """A mask of booleans or of alpha in [0, 1], tensor or array; other numbers (an image's 0 and 255) are refused."""
    values = torch.as_tensor(mask)
    if values.numel() and (float(values.max()) > 1 or float(values.min()) < 0):
        raise DinoError(
            f"a mask holds booleans or alpha in [0, 1], not values up to {float(values.max()):g}: write mask > 127, "
            "or mask / 255"
        )
    return values


def thin(points: Tensor, distance: float = 100.0) -> Tensor:
    """Numbers of the points [M, 2] that remain when crowded ones are taken away, until no two are nearer than `distance`.

    Again and again the point with the most others around it goes (of equals the first), so the rest stays spread out.
    """
    close = torch.cdist(points.float(), points.float()) < distance
    close.fill_diagonal_(False)
    around = close.sum(1)
    alive = torch.ones(len(points), dtype=torch.bool)
    while len(points) and int(around.max()) > 0:
        worst = int(around.argmax())
        alive[worst] = False
        around -= close[:, worst].to(around.dtype)
        around[worst] = 0
        close[worst] = close[:, worst] = False
    return alive.nonzero().flatten()


def sample(patches: Tensor, positions: Tensor) -> Tensor:
    """Bilinear values [K, D] of a map [h, w, D] at positions (x, y) [K, 2] in grid units: (0, 0) is the first cell."""
    h, w, _ = patches.shape
    scale = positions.new_tensor([max(w - 1, 1), max(h - 1, 1)])
    grid = (positions / scale * 2 - 1)[None, None].to(patches.dtype)  # corners aligned
    values = F.grid_sample(patches.permute(2, 0, 1)[None], grid, mode="bilinear", align_corners=True)
    return values[0, :, 0].T
