"""Position bias: the part of patch features that says where a patch is, found without labels and projected out.

Published (INSID3, arXiv 2603.28480): the features of one constant image, centred over patches, have only position left;
their SVD gives a subspace, which is projected out of real features (`constant_directions`). At width 192 that is not
enough: a probe of position on noise images keeps an R² of 0.80 after 128 directions (0.93 before). So `noise_directions`
takes noise of several coarsenesses and only what varies slowly over the image, the lowest cosines: ten directions leave
an R² of 0.00 at the size at which they were measured.

Position is not always a mistake: roads are below. Remove it where the thing moves or the camera turns.

Legend: B images, h×w patch grid, D width, K directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.dense.matching import maps
from dinov3.errors import DinoError
from dinov3.features import Features, embed

ORDER = 2  # of the cosines: five of them beside the constant
COARSENESS = (1, 2, 4, 8, 16, 32)  # px of the noise's cells
PROBE_SIZE = 256  # px


@dataclass(frozen=True)
class PositionBias:
    """Orthonormal directions [D, K] of position, the strongest first, and whose features they are of."""

    directions: Tensor
    model: str
    layer: int
    normed: bool

    def remove(self, features: Features, count: int | None = None) -> Features:
        """The features with the first `count` directions (default: all) projected out of their patches."""
        for name in ("model", "layer", "normed"):
            if getattr(self, name) != getattr(features, name):
                raise DinoError(
                    f"this position bias was measured for {name} {getattr(self, name)}, the features are of "
                    f"{getattr(features, name)}: measure it for them"
                )
        return project_out(features, self.directions[:, :count])


def measure(
    model: nn.Module,
    size_hw: tuple[int, int] = (PROBE_SIZE, PROBE_SIZE),
    *,
    layer: int = -1,
    norm: bool = True,
    count: int = 10,
    seed: int = 0,
) -> PositionBias:
    """The `count` position directions of a model's layer, from 24 noise images: seconds for a small model.

    size_hw: of the inputs (`features.geometry[0].input_hw`), multiples of the patch. Measure at the size that you use: at
    another one a part of the bias stays.
    """
    images = noise_images(24, size_hw, seed)
    found = embed(model, images, layer=layer, norm=norm, shape="native")
    directions = noise_directions(found, kinds=len(COARSENESS), count=count)
    return PositionBias(directions, found.model, found.layer, found.normed)


def noise_images(count: int, size_hw: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """Images [3, h, w] in [0, 1] of uniform noise, in turn of each coarseness."""
    rng = torch.Generator().manual_seed(seed)
    images = []
    for i in range(count):
        cells = [max(2, side // COARSENESS[i % len(COARSENESS)]) for side in size_hw]
        coarse = torch.rand(1, 3, *cells, generator=rng)
        images.append(F.interpolate(coarse, size_hw, mode="bilinear", align_corners=False)[0])
    return images


def noise_directions(features: Features | Tensor, *, kinds: int = 1, count: int = 10, order: int = ORDER) -> Tensor:
    """Directions [D, K ≤ count] along which features of noise vary slowly with position.

    Images i, i + kinds, i + 2·kinds, … are of one kind: their mean is nearly free of content. Its coefficients on the lowest
    cosines of the grid are position; the SVD of those of all kinds gives the directions.
    """
    x = maps(features).cpu()  # [B, h, w, D]
    basis = cosines((x.shape[1], x.shape[2]), order)  # [n, h·w]
    parts = [basis @ x[i::kinds].mean(0).flatten(0, 1) for i in range(kinds)]
    return _strongest(torch.cat(parts), count)


def constant_directions(features: Features | Tensor, count: int = 500) -> Tensor:
    """The published directions [D, K ≤ count]: singular vectors of a constant image's features, centred over patches."""
    x = maps(features).cpu().flatten(1, 2)
    return _strongest((x - x.mean(1, keepdim=True)).flatten(0, 1), count)


def _strongest(rows: Tensor, count: int) -> Tensor:
    _, singular, v = torch.linalg.svd(rows, full_matrices=False)
    rank = int((singular > singular[0] * 1e-5).sum())
    return v[: min(count, rank)].T.contiguous()


def cosines(grid_hw: tuple[int, int], order: int) -> Tensor:
    """The lowest cosines over a grid, orthonormal, without the constant one: [n, h·w] of order 1 … `order` in all."""
    # [order + 1, n] each
    along = [torch.cos(math.pi * torch.arange(order + 1)[:, None] * (torch.arange(n) + 0.5) / n) for n in grid_hw]
    pairs = [(i, j) for i in range(order + 1) for j in range(order + 1) if 0 < i + j <= order]
    rows = torch.stack([(along[0][i][:, None] * along[1][j]).flatten() for i, j in pairs])
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def project_out(features: Features, directions: Tensor) -> Features:
    """The features without what their patches have along orthonormal directions [D, K]."""
    x = features.patches
    if directions.ndim != 2 or len(directions) != x.shape[-1]:
        raise DinoError(f"directions of these features are [{x.shape[-1]}, K], not {list(directions.shape)}")
    d = directions.to(x.device, torch.float32)
    return replace(features, patches=(x.float() - (x.float() @ d) @ d.T).to(x.dtype))


def position_r2(train: Features | Tensor, test: Features | Tensor, *, ridge: float = 1e-6) -> float:
    """R² of a linear probe that predicts a patch's (y, x) from its features: fitted on some images, measured on others.

    ridge: relative to the mean variance of the features. 0 where nothing says where a patch is; below 0 is possible.
    """
    fitted, measured = maps(train).cpu().double(), maps(test).cpu().double()
    x, y = _with_positions(fitted)
    xt, yt = _with_positions(measured)
    mean = x.mean(0)
    x, xt = x - mean, xt - mean
    scatter = x.T @ x
    scatter += ridge * scatter.trace() / len(scatter) * torch.eye(len(scatter), dtype=scatter.dtype)
    weights = torch.linalg.solve(scatter, x.T @ y)
    return float(1 - (yt - xt @ weights).square().sum() / (yt - yt.mean(0)).square().sum())


def _with_positions(x: Tensor) -> tuple[Tensor, Tensor]:
    """(patches [B·h·w, D], their (y, x) in [−1, 1])."""
    B, h, w, D = x.shape
    y, across = ((2 * torch.arange(n, dtype=x.dtype) + 1) / n - 1 for n in (h, w))
    places = torch.stack(torch.meshgrid(y, across, indexing="ij"), -1)
    return x.reshape(-1, D), places.expand(B, h, w, 2).reshape(-1, 2)
