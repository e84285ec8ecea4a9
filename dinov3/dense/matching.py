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
    ratio: float | None = None,
) -> Matches:
    """The best right patch of every left patch, by cosine; both are one image's features (or maps [h, w, D]).

    left_mask, right_mask: boolean maps [h, w]; matches with a patch outside are dropped (the search itself is over all
    patches, so a left patch best matched by the background is dropped and not pressed onto the object). mutual: keep a
    match only if it is the best in both directions. ratio: keep a match only if its distance (1 − cosine) is less than
    `ratio` times that of the best right patch elsewhere (Lowe's test; patches next to the match show the same thing and
    do not count as elsewhere).
    """
    if isinstance(left, Features) and isinstance(right, Features):
        left.check_comparable(right)
    a, b = unit_map(left), unit_map(right)
    for name, mask, x in (("left_mask", left_mask, a), ("right_mask", right_mask, b)):
        if mask is not None and mask.shape != x.shape[:2]:
            raise DinoError(f"{name} is a map of patches [{x.shape[0]}, {x.shape[1]}], not {list(mask.shape)}")
    grid_hw = (b.shape[0], b.shape[1])
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
    matches = matches[keep]
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise DinoError(f"ratio is above 0 and at most 1, not {ratio}")
        elsewhere = second_elsewhere(a[matches.left], b, matches.right, grid_hw)
        matches = matches[1 - matches.similarity < ratio * (1 - elsewhere)]
    return matches


def second_elsewhere(queries: Tensor, targets: Tensor, best: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """The largest cosine [N] of each query with a target outside the 3 × 3 neighbourhood of its best one.

    queries [N, D]; targets [h·w, D], a flattened grid of unit vectors; best [N] numbers of targets. −1 where there is none.
    """
    h, w = grid_hw
    rows, columns = (torch.arange(n, device=targets.device) for n in grid_hw)
    out = []
    chunk = max(1, 2**26 // max(1, len(targets)))
    for part, number in zip(queries.split(chunk), best.split(chunk)):
        near = ((rows - (number // w)[:, None]).abs() <= 1)[:, :, None] & (
            (columns - (number % w)[:, None]).abs() <= 1
        )[:, None]
        out.append((part @ targets.T).masked_fill(near.view(-1, h * w), -1).amax(1))
    return torch.cat(out) if out else queries.new_zeros(0)


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


def homography(
    left: Tensor, right: Tensor, *, tolerance: float = 8.0, tries: int = 2000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(matrix [3, 3], inliers [M] boolean) of the projective map from points (x, y) [M, 2] to points [M, 2]; RANSAC over DLT.

    tolerance: of an inlier, in pixels of the right image. Four matches drawn at random give a candidate; the one with most
    inliers is fitted once more to all of them. Two images of a plane, or from one place, agree with one; the number of
    inliers says whether they do. Raises `DinoError` for less than four matches, or where no candidate can be computed.
    """
    if len(left) != len(right) or len(left) < 4:
        raise DinoError(
            f"a homography needs four matches at least, as many left as right: {len(left)} and {len(right)}"
        )
    a, b = left.double().cpu(), right.double().cpu()
    rng = torch.Generator().manual_seed(seed)
    draws = torch.rand(tries, len(a), generator=rng).topk(4, dim=1).indices  # four different ones each
    matrices = _direct_linear(a[draws], b[draws])  # [tries, 3, 3]
    errors = (project(matrices, a[None]) - b).norm(dim=-1)  # [tries, M]
    counts = (errors < tolerance).sum(1)
    inliers = errors[int(counts.argmax())] < tolerance
    if int(inliers.sum()) < 4:
        raise DinoError("no homography was found: no four of the matches agree on one")
    for _ in range(3):  # the fit to all inliers takes in some more
        matrix = _direct_linear(a[inliers][None], b[inliers][None])[0]
        again = (project(matrix[None], a[None])[0] - b).norm(dim=-1) < tolerance
        if int(again.sum()) < int(inliers.sum()):
            break
        inliers = again
    return matrix.float(), inliers


def project(matrices: Tensor, points: Tensor) -> Tensor:
    """Points (x, y) [T, M, 2] through projective maps [T, 3, 3]; what a map sends to infinity is not a number."""
    there = torch.cat([points, torch.ones_like(points[..., :1])], -1) @ matrices.transpose(-1, -2)
    return there[..., :2] / torch.where(there[..., 2:].abs() < 1e-12, torch.nan, there[..., 2:])


def _direct_linear(a: Tensor, b: Tensor) -> Tensor:
    """Projective maps [T, 3, 3] from points a to b [T, n, 2], n ≥ 4, of least algebraic error (Hartley's normalised DLT)."""

    def normalised(points: Tensor) -> tuple[Tensor, Tensor]:
        centre = points.mean(1, keepdim=True)
        scale = 2**0.5 / (points - centre).norm(dim=-1).mean(1).clamp_min(1e-12)  # [T]
        matrix = torch.zeros(len(points), 3, 3, dtype=points.dtype)
        matrix[:, 0, 0] = matrix[:, 1, 1] = scale
        matrix[:, :2, 2] = -scale[:, None] * centre[:, 0]
        matrix[:, 2, 2] = 1
        return (points - centre) * scale[:, None, None], matrix

    (p, A), (q, B) = normalised(a), normalised(b)
    one, none = torch.ones_like(p[..., :1]), torch.zeros_like(p[..., :1])
    xyw = torch.cat([p, one], -1)
    zeros = none.expand_as(xyw)
    first = torch.cat([xyw, zeros, -q[..., :1] * xyw], -1)  # [T, n, 9]
    second = torch.cat([zeros, xyw, -q[..., 1:] * xyw], -1)
    rows = torch.cat([first, second], 1)
    _, vectors = torch.linalg.eigh(rows.transpose(-1, -2) @ rows)
    h = vectors[..., 0].unflatten(-1, (3, 3))
    matrix = torch.linalg.inv(B) @ h @ A
    return matrix / matrix.flatten(1).norm(dim=1)[:, None, None]


def sample(patches: Tensor, positions: Tensor) -> Tensor:
    """Bilinear values [K, D] of a map [h, w, D] at positions (x, y) [K, 2] in grid units: (0, 0) is the first cell."""
    h, w, _ = patches.shape
    scale = positions.new_tensor([max(w - 1, 1), max(h - 1, 1)])
    grid = (positions / scale * 2 - 1)[None, None].to(patches.dtype)  # corners aligned
    values = F.grid_sample(patches.permute(2, 0, 1)[None], grid, mode="bilinear", align_corners=True)
    return values[0, :, 0].T
