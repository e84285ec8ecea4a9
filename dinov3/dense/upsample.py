"""Values of patches at the original image's pixels: bilinear, or along the image's edges without training.

`edge_aware` is the guided filter (He et al., 2010) over the bilinear map: around every pixel the map becomes a linear
function of the image's colours. It is made for maps (masks, similarities, colours), not for features of hundreds of
channels. Shares of patches under 12 true masks (DAVIS, 30 rows) came back with an IoU of 0.934, against 0.927 bilinear and
0.926 by joint bilateral upsampling, whose patch colours are mixtures just where it matters.

Legend: h×w patch grid of one image, H×W the original image, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.data.transforms.inputs import Geometry
from dinov3.errors import DinoError
from dinov3.features import Features

if TYPE_CHECKING:
    from PIL import Image


def bilinear(values: Tensor, features: Features, image: int = 0, size_hw: tuple[int, int] | None = None) -> Tensor:
    """A map [h, w] or [h, w, C] of one image's patches at the original image's pixels, [H, W] or [H, W, C].

    The value of a patch stands at its centre; beyond the outermost centres it stays constant. size_hw: another size of the
    whole image (such as a drawing's) instead of H×W.
    """
    maps, single = _channels(values, features)
    rows, columns = _positions(features.geometry[image], features.grid_hw, size_hw)
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)[None].to(maps)
    large = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
    return large[0] if single else large.permute(1, 2, 0)


def edge_aware(
    values: Tensor,
    features: Features,
    image_rgb: Any,
    image: int = 0,
    *,
    radius: float = 1 / 3,
    epsilon: float = 1e-4,
    longest: int = 512,
) -> Tensor:
    """As `bilinear`, guided by the image (PIL or array [H, W, 3] uint8): edges of the map move to edges of the image.

    radius: of the neighbourhood, in patches; epsilon: variance of colours (in [0, 1]) below which it is flat. The linear
    functions are found on the image reduced to `longest` and applied to its own pixels. Values may pass their range by a
    little: they are clamped to that of the map.
    """
    from PIL import Image as pil

    original = image_rgb if isinstance(image_rgb, pil.Image) else pil.fromarray(np.asarray(image_rgb))
    geometry, device = features.geometry[image], values.device
    if original.size != (geometry.width, geometry.height):
        raise DinoError(
            f"the guide is the original image, {geometry.width}×{geometry.height} pixels, not "
            f"{original.width}×{original.height}"
        )
    factor = min(1.0, longest / max(original.size))
    W, H = (max(1, round(side * factor)) for side in original.size)
    full = _colours(original, device)
    guide = full if factor == 1 else _colours(original.resize((W, H), pil.Resampling.BILINEAR), device)
    coarse = bilinear(values, features, image, (H, W))
    target = (coarse[..., None] if coarse.ndim == 2 else coarse).permute(2, 0, 1)  # [C, H, W]
    # px of the reduced image
    patch = geometry.input_hw[1] / features.grid_hw[1] / geometry.scale_x * W / geometry.width
    r = max(1, round(radius * patch))
    slope, offset = _local_lines(guide, target, r, epsilon)
    size = (geometry.height, geometry.width)
    slope, offset = (F.interpolate(t, size, mode="bilinear", align_corners=False) for t in (slope, offset[None]))
    fine = (slope * full).sum(1) + offset[0]  # [C, H, W]
    low, high = target.amin((1, 2)), target.amax((1, 2))
    fine = fine.clamp(low[:, None, None], high[:, None, None])
    return fine[0] if values.ndim == 2 else fine.permute(1, 2, 0)


def _colours(image: Image.Image, device: torch.device) -> Tensor:
    """[3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().to(device) / 255


def _local_lines(guide: Tensor, target: Tensor, r: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Slopes [C, 3, H, W] and offsets [C, H, W] of the guided filter: in every window of side 2r + 1 the least-squares linear
    function of the guide [3, H, W] that gives the target [C, H, W], averaged over the windows that hold the pixel."""

    def mean(x: Tensor) -> Tensor:
        padded = F.pad(x.flatten(0, -3)[None], (r, r, r, r), mode="replicate")
        rows = F.avg_pool2d(padded, (2 * r + 1, 1), 1)
        return F.avg_pool2d(rows, (1, 2 * r + 1), 1)[0].view(x.shape)

    mean_guide, mean_target = mean(guide), mean(target)
    covariance = mean(target[:, None] * guide) - mean_target[:, None] * mean_guide  # [C, 3, H, W]
    aa, ab, ac, bb, bc, cc = (
        mean(guide[i : i + 1] * guide[j : j + 1])[0] - mean_guide[i] * mean_guide[j] + (epsilon if i == j else 0.0)
        for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
    )
    # the inverse of a symmetric 3 × 3 matrix by its cofactors: a solver for every pixel takes ten times as long
    cofactors = [
        [bb * cc - bc * bc, ac * bc - ab * cc, ab * bc - ac * bb],
        [ac * bc - ab * cc, aa * cc - ac * ac, ab * ac - aa * bc],
        [ab * bc - ac * bb, ab * ac - aa * bc, aa * bb - ab * ab],
    ]
    determinant = aa * cofactors[0][0] + ab * cofactors[0][1] + ac * cofactors[0][2]
    inverse = torch.stack([torch.stack(row) for row in cofactors]) / determinant  # [3, 3, H, W]
    slope = (inverse * covariance[:, None]).sum(2)  # [C, 3, H, W]
    offset = mean_target - (slope * mean_guide).sum(1)
    return mean(slope), mean(offset)


def _channels(values: Tensor, features: Features) -> tuple[Tensor, bool]:
    """(a map as [1, C, h, w], whether it came without channels)."""
    if values.ndim not in (2, 3) or tuple(values.shape[:2]) != features.grid_hw:
        h, w = features.grid_hw
        raise DinoError(
            f"expected values of one image's patches, [{h}, {w}] or [{h}, {w}, C], not {list(values.shape)}"
        )
    single = values.ndim == 2
    return (values[None] if single else values.permute(2, 0, 1))[None].float(), single


def _positions(geometry: Geometry, grid_hw: tuple[int, int], size_hw: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Centres of the image's rows [H] and columns [W] on the grid, in `grid_sample`'s units (−1 and 1 are its borders)."""
    H, W = size_hw or (geometry.height, geometry.width)
    out = []
    for n, whole, scale, offset, side in (
        (H, geometry.height, geometry.scale_y, geometry.offset_y, geometry.input_hw[0]),
        (W, geometry.width, geometry.scale_x, geometry.offset_x, geometry.input_hw[1]),
    ):
        pixel = (torch.arange(n, dtype=torch.float64) + 0.5) * (whole / n)
        out.append((2 * (pixel * scale - offset) / side - 1).float())
    return out[0], out[1]
