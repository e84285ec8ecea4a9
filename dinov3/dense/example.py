"""One image and a mask → the same thing in other images. Nothing is trained.

The thing and what is around it each become a few prototypes, the cluster centres of their patches. A patch of another image
belongs to the thing where it is more like one of the thing's prototypes than like one of the others. The surroundings
matter: the mean direction of the mask alone, with a threshold, has half the IoU or less on street scenes and videos.

Legend: B images, h×w patch grid, D width, P and Q prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.dense.debias import PositionBias
from dinov3.dense.foreground import kind_of, median3
from dinov3.dense.matching import unit_maps
from dinov3.dense.similarity import mask_on_grid
from dinov3.errors import DinoError
from dinov3.features import Features
from dinov3.neighbours import k_means

# shares of a patch under the mask from which it counts as the thing, below which it does not
INSIDE, OUTSIDE = 0.6, 0.1


@dataclass(frozen=True)
class Example:
    """P(thing) of patches, from prototypes inside [P, D] and outside [Q, D], unit vectors. `threshold` is the margin at
    which P is a half; `bias` is removed first where it is given."""

    inside: Tensor
    outside: Tensor
    temperature: float
    threshold: float = 0.0
    kind: str = ""
    bias: PositionBias | None = None

    def __call__(self, features: Features, *, smooth: bool = True) -> Tensor:
        """Probabilities [B, h, w]; above 0.5 is the thing. `smooth`: the median of every 3 × 3 neighbourhood."""
        if self.kind not in ("", kind_of(features)):
            raise DinoError(f"this example was made with {self.kind}, the features are of {kind_of(features)}")
        x = unit_maps(features if self.bias is None else self.bias.remove(features))
        probability = (self.margin(x) - self.threshold).sigmoid()
        return median3(probability) if smooth else probability

    def margin(self, x: Tensor) -> Tensor:
        """How much more like the inside than like the outside: log-odds [...] of unit vectors [..., D]."""
        inside, outside = (
            (x @ prototypes.to(x).T / self.temperature).logsumexp(-1) for prototypes in (self.inside, self.outside)
        )
        return inside - outside


def learn(
    images: Features | Sequence[Features],
    masks: Tensor | np.ndarray | Sequence[Tensor | np.ndarray],
    *,
    prototypes: int = 8,
    temperature: float = 0.07,
    bias: PositionBias | None = None,
    seed: int = 0,
) -> Example:
    """The `Example` of one image's features and its mask [H, W] (original pixels, booleans or alpha), or of several.

    prototypes: of the thing and of the rest each, at most. bias: position directions to remove (`debias.measure`); of use
    where the thing is elsewhere in the other images.
    """
    every = [images] if isinstance(images, Features) else list(images)
    given = [masks] if isinstance(masks, (Tensor, np.ndarray)) else list(masks)
    if len(every) != len(given) or not every:
        raise DinoError(f"as many masks as images are needed, at least one; got {len(given)} and {len(every)}")
    for other in every[1:]:
        every[0].check_comparable(other, ignore=["preprocessing"])
    patches, shares = [], []
    for features, mask in zip(every, given):
        if len(features) != 1:
            raise DinoError(f"an example is the features of one image, got {len(features)}: pass features[i]")
        shares.append(mask_on_grid(features, torch.as_tensor(mask)).flatten())
        patches.append(unit_maps(features if bias is None else bias.remove(features)).flatten(0, 2).cpu())
    x, share = torch.cat(patches), torch.cat(shares)
    inside = share > INSIDE
    if not bool(inside.any()):  # thinner than a patch: the patches that it covers most
        inside = share >= max(float(share.max()), 1e-6)
    outside = share < OUTSIDE
    if not bool(inside.any()) or not bool(outside.any()):
        raise DinoError("the mask is empty or covers everything: it has to leave a thing and something around it")
    example = Example(
        centres(x[inside], prototypes, seed),
        centres(x[outside], prototypes, seed),
        temperature,
        kind=kind_of(every[0]),
        bias=bias,
    )
    # half way to the threshold that is best on the example: prototypes fit it more tightly than other images
    return replace(example, threshold=best_threshold(example.margin(x), share > 0.5) / 2)


def centres(x: Tensor, count: int, seed: int = 0) -> Tensor:
    """At most `count` cluster centres [P, D] of unit vectors [N, D], by spherical k-means."""
    if len(x) <= count:
        return x
    labels = torch.from_numpy(k_means(x, count, seed=seed)[0])
    sums = x.new_zeros(count, x.shape[1]).index_add_(0, labels, x)
    return F.normalize(sums[sums.norm(dim=1) > 0], dim=1)


def plain(features: Features, mask: Tensor) -> tuple[Tensor, float]:
    """(the mean direction [D] of the masked patches, the cosine that separates the example best): what `learn` is measured
    against, `similarity.cosine_map(other, direction) > threshold`."""
    share = mask_on_grid(features, mask)
    x = unit_maps(features)[0].cpu()
    direction = F.normalize((x * share[..., None]).sum((0, 1)), dim=0)
    return direction, best_threshold((x @ direction).flatten(), share.flatten() > 0.5)


def best_threshold(score: Tensor, truth: Tensor) -> float:
    """The threshold t for which score > t has the largest IoU with the truth; [N] each."""
    values, order = score.sort(descending=True)
    hits = truth[order].cumsum(0)
    union = truth.sum() + torch.arange(1, len(order) + 1) - hits
    best = int((hits / union).argmax())
    below = float(values[min(best + 1, len(values) - 1)])
    return (float(values[best]) + below) / 2
