"""Following a mask through a video: labels of the first frame, propagated from patch to patch (paper §6.1.5, App. D).

Nothing is trained. A patch of the current frame takes the labels of the patches most like it in frame 0 and in the few
frames before, within a radius in the image; a label is a distribution and stays soft from frame to frame.

Legend: h×w patch grid, D width, M labels (0 is the background), C context frames, R radius in patches.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.dense.matching import unit_map
from dinov3.errors import DinoError, UnknownName, one_of
from dinov3.features import Features

Shape = Literal["circle", "square"]


@dataclass(frozen=True)
class Propagation:
    """Settings of the label propagation. Defaults: the paper's notebook (its table marks the best row only graphically).

    n_context: frames in the context besides frame 0, which always stays. radius: how far away, in patches, a match may
    lie (inf: anywhere); shape: "circle" (Euclidean) or "square" (the larger of the two distances). k: matches that vote,
    over all context frames together. temperature: of the softmax over their cosines.
    """

    n_context: int = 7
    radius: float = 12
    shape: Shape = "circle"
    k: int = 5
    temperature: float = 0.2

    def __post_init__(self) -> None:
        one_of("shape", self.shape, get_args(Shape))
        if self.n_context < 0 or self.radius < 0 or self.k < 1 or not self.temperature > 0:
            raise DinoError(f"n_context and radius are at least 0, k at least 1, temperature above 0: {self}")


# the rows the paper searched on DAVIS' training videos (appendix D): n_context, radius, shape, k, temperature
PAPER_GRID = tuple(
    Propagation(*row)
    for row in (
        (7, 12, "square", 5, 0.2), (7, 12, "circle", 5, 0.2), (7, 5, "square", 5, 0.2), (7, 24, "square", 5, 0.2),
        (7, math.inf, "square", 5, 0.2), (7, 12, "square", 5, 0.01), (7, 12, "square", 5, 0.1), (7, 12, "square", 5, 0.7),
        (4, 12, "square", 5, 0.2), (10, 12, "square", 5, 0.2), (15, 12, "square", 5, 0.2), (7, 12, "square", 3, 0.2),
        (7, 12, "square", 10, 0.2), (7, 12, "square", 15, 0.2), (15, 12, "circle", 10, 0.1), (15, 24, "circle", 10, 0.1),
        (15, 36, "circle", 10, 0.1), (15, math.inf, "circle", 10, 0.1),
    )
)  # fmt: skip


def within_reach(rows_apart: Tensor, columns_apart: Tensor, radius: float, shape: str = "circle") -> Tensor:
    """Whether patches so many rows and columns apart are neighbours."""
    if shape == "square":
        return torch.maximum(rows_apart.abs(), columns_apart.abs()) <= radius
    return rows_apart.square() + columns_apart.square() <= radius**2


def propagate(
    current: Tensor, context: Tensor, labels: Tensor, settings: Propagation = Propagation()
) -> Tensor:  # fmt: skip
    """Label distributions [h, w, M] of a frame [h, w, D], from context frames [C, h, w, D] labelled [C, h, w, M].

    Features are unit vectors. All similarities of a frame at once would be (h·w)·C·(h·w) numbers, 1.3 GB at 60 × 107
    patches and eight frames: here it is one row of the grid at a time, against the rows within reach.
    """
    h, w, D = current.shape
    if context.shape[1:] != current.shape or labels.shape[:3] != context.shape[:3]:
        raise DinoError(
            f"context {list(context.shape)} and labels {list(labels.shape)} do not fit a frame of {h}×{w} patches, "
            f"width {D}: they are [C, {h}, {w}, {D}] and [C, {h}, {w}, M]"
        )
    C, M = len(context), labels.shape[-1]
    reach = h if math.isinf(settings.radius) else int(settings.radius)
    column = torch.arange(w, device=current.device)
    out = []
    for row in range(h):
        low, high = max(0, row - reach), min(h, row + reach + 1)
        window = context[:, low:high].reshape(-1, D)  # [C·(high−low)·w, D]
        similarity = (current[row] @ window.T).view(w, C, high - low, w)
        away = torch.arange(low, high, device=current.device)[:, None] - row  # [high−low, 1]
        allowed = within_reach(away, column[None, None] - column[:, None, None], settings.radius, settings.shape)
        similarity = similarity.masked_fill(~allowed[:, None], -math.inf).flatten(1)
        # the k-th largest is a threshold, so ties keep more than k; a patch with fewer than k neighbours has −∞ there,
        # and what lies out of reach gets weight exp(−∞) = 0
        threshold = similarity.topk(min(settings.k, similarity.shape[1]), dim=1).values[:, -1:]
        similarity = similarity.masked_fill(similarity < threshold, -math.inf)
        weights = (similarity / settings.temperature).softmax(1)
        out.append(weights @ labels[:, low:high].reshape(-1, M).to(weights.dtype))
    result = torch.stack(out)
    return result / result.sum(-1, keepdim=True)


def track(
    frames: Iterable[Features | Tensor], first: Tensor, settings: Propagation = Propagation()
) -> Iterator[Tensor]:  # fmt: skip
    """Label distributions [h, w, M] of every frame, frame 0 included, as they come.

    frames: features of one image each, in order, all of one grid. first: labels of frame 0, as numbers [H, W] of any
    size (0 is the background) or as distributions [h, w, M].
    """
    context: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.n_context)
    start: tuple[Tensor, Tensor] | None = None
    for frame in frames:
        x = unit_map(frame)
        if start is None:
            labels = first if first.ndim == 3 else patch_labels(first, (x.shape[0], x.shape[1]))
            start = (x, labels.to(x.device, x.dtype))
            yield start[1]
            continue
        frames_kept = [start, *context]
        labels = propagate(
            x, torch.stack([c[0] for c in frames_kept]), torch.stack([c[1] for c in frames_kept]), settings
        )
        context.append((x, labels))
        yield labels


def patch_labels(mask: Tensor, grid_hw: tuple[int, int], n_labels: int | None = None) -> Tensor:
    """One-hot labels [h, w, M] from a mask of numbers [H, W]: each patch takes the pixel at its centre."""
    small = F.interpolate(mask[None, None].float(), grid_hw, mode="nearest-exact")[0, 0].long()
    M = n_labels if n_labels is not None else int(mask.max()) + 1
    return F.one_hot(small, M).float()


def masks(labels: Tensor, size_hw: tuple[int, int], *, upsampling: str = "bilinear", stretch: bool = True) -> Tensor:
    """Distributions [h, w, M] to a mask of numbers [H, W] at any size.

    upsampling: "bilinear" (the paper's text) or "nearest" (its notebook). stretch: every label's map is first stretched
    to [0, 1] over the image, which lets an object that has become faint win over the background where it is strongest;
    a constant map becomes 0.
    """
    if upsampling not in ("bilinear", "nearest"):
        raise UnknownName(f"upsampling is bilinear or nearest, not {upsampling!r}")
    options = {"align_corners": False} if upsampling == "bilinear" else {}
    large = F.interpolate(labels.permute(2, 0, 1)[None], size_hw, mode=upsampling, **options)[0]  # [M, H, W]
    if stretch:
        low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
        large = torch.where(high > low, (large - low) / (high - low).clamp_min(torch.finfo(large.dtype).tiny), 0.0)
    return large.argmax(0)
