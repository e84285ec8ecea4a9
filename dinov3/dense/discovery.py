"""Finding the object of an image without labels: TokenCut on patch features (paper §6.1.4, App. D).

Patches are the nodes of a graph, joined where their features point the same way (cosine above τ). A normalised cut
splits it in two; the part that holds the patch which sticks out most is the object.

Legend: h×w patch grid, N = h·w nodes, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3.dense.matching import unit_map
from dinov3.errors import DinoError
from dinov3.features import Features


@dataclass(frozen=True)
class Cut:
    """An image's two parts.

    mask [h, w]: the connected part that holds the seed. foreground [h, w]: the whole side of the cut that does.
    eigenvector [h, w]: where every patch lies between the parts (its sign is arbitrary). seed: (row, column).
    """

    mask: Tensor
    foreground: Tensor
    eigenvector: Tensor
    eigenvalue: float
    seed: tuple[int, int]

    @property
    def box_rc(self) -> tuple[int, int, int, int]:
        """(first row, first column, last row + 1, last column + 1) of the object, in patches."""
        rows, columns = self.mask.any(1).nonzero().flatten(), self.mask.any(0).nonzero().flatten()
        return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def token_cut(features: Features | Tensor, *, tau: float | None = 0.2, epsilon: float = 1e-5) -> Cut:
    """The object of one image from its patches (`Features` of one image, or a map [h, w, D]).

    tau: cosine above which two patches belong together. The paper tries 0, 0.05, …, 0.4 for each backbone; see
    `cosines` and `cut` to do so without computing the cosines again. None: the image's mean cosine, which suits models
    whose patches are all alike to some degree (the small model that ships: 0.6). epsilon: the weight of all other pairs,
    which keeps the graph in one piece.
    """
    x = unit_map(features)
    similarity = cosines(x)
    tau = float(similarity.mean()) if tau is None else tau
    return cut(similarity, (x.shape[0], x.shape[1]), tau=tau, epsilon=epsilon)


def cosines(features: Features | Tensor) -> Tensor:
    """Cosine [N, N] of every pair of one image's patches."""
    x = unit_map(features).flatten(0, 1)
    return x @ x.T


def cut(similarity: Tensor, grid_hw: tuple[int, int], *, tau: float = 0.2, epsilon: float = 1e-5) -> Cut:
    """TokenCut from the cosines [N, N] of a grid of h × w patches."""
    h, w = grid_hw
    if similarity.shape != (h * w, h * w) or h * w < 2:
        raise DinoError(f"a grid of {h}×{w} patches (two at least) has cosines [{h * w}, {h * w}], not "
                        f"{list(similarity.shape)}")  # fmt: skip
    weights = torch.where(similarity > tau, 1.0, epsilon).double().cpu()
    value, vector = second_smallest(weights)
    # the vector's sign is arbitrary, and so is which side of the mean is called foreground: the seed decides
    foreground = vector > vector.mean()
    seed = int(vector.abs().argmax())
    if not foreground[seed]:
        foreground = ~foreground
    foreground, place = foreground.view(h, w), (seed // w, seed % w)
    return Cut(connected(foreground, place), foreground, vector.view(h, w), value, place)


def second_smallest(weights: Tensor) -> tuple[float, Tensor]:
    """Second smallest eigenvalue and its vector v [N] of (D − W) v = λ D v, D = diag(row sums of W); vᵀ D v = 1.

    Dense on purpose, O(N³): a tenth of a second for 1,200 patches, on one thread (OPENBLAS_NUM_THREADS=1; beside busy
    processes more are slower by far). Short-cuts (Lanczos, power iteration) stall where the graph falls into pieces,
    and then the second eigenvalue has close neighbours.
    """
    root = weights.sum(1).sqrt()
    laplacian = torch.eye(len(weights), dtype=weights.dtype) - weights / (root[:, None] * root[None])
    try:
        from scipy.linalg import eigh
    except ModuleNotFoundError:
        values, vectors = torch.linalg.eigh(laplacian)
        return float(values[1]), vectors[:, 1] / root
    one: Any = eigh(laplacian.numpy(), subset_by_index=[1, 1])  # this pair only: a quarter of the time
    return float(one[0][0]), torch.from_numpy(np.ascontiguousarray(one[1][:, 0])) / root


def connected(mask: Tensor, seed: tuple[int, int]) -> Tensor:
    """The part of a boolean map [h, w] that is joined to the seed by left, right, upper and lower neighbours."""
    part = torch.zeros_like(mask)
    if not mask[seed]:
        return part
    part[seed] = True
    edge = [seed]
    while edge:
        r, c = edge.pop()
        for y, x in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not part[y, x]:
                part[y, x] = True
                edge.append((y, x))
    return part


def box_in_image(found: Cut, features: Features, image: int = 0) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) in the original image's pixels."""
    r0, c0, r1, c1 = found.box_rc
    x0, y0, _, _ = features.box_of_patch(r0, c0, image)
    _, _, x1, y1 = features.box_of_patch(r1 - 1, c1 - 1, image)
    geometry = features.geometry[image]
    return max(x0, 0.0), max(y0, 0.0), min(x1, float(geometry.width)), min(y1, float(geometry.height))
