"""The PCA rainbow (paper Fig. 1, 13): the three strongest directions of the patch features as red, green and blue."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dinov3.errors import DinoError
from dinov3.features import Features


@dataclass(frozen=True)
class PatchPCA:
    """Directions fitted on some patches, applicable to others, so that colours mean the same across pictures."""

    mean: Tensor  # [D]
    directions: Tensor  # [D, k], strongest first, signs fixed
    variance_share: Tensor  # [k], of the total variance

    def __call__(self, features: Features) -> Tensor:
        """Coordinates [B, h, w, k] along the directions."""
        return (features.patches.float().cpu() - self.mean) @ self.directions


def fit(features: Features, components: int = 3) -> PatchPCA:
    """Principal directions of all patches of all pictures together."""
    x = features.patches.float().cpu().flatten(0, 2)  # [B·h·w, D]
    if len(x) <= components:
        raise DinoError(f"{components} components need more than {components} patches; there are {len(x)}")
    mean = x.mean(0)
    _, singular, v = torch.linalg.svd(x - mean, full_matrices=False)
    directions = v[:components].T
    # a direction's sign is arbitrary: make its largest entry positive so that colours are the same on every machine
    largest = directions.abs().argmax(0)
    directions = directions * directions[largest, torch.arange(components)].sign()
    variance = singular.square()
    return PatchPCA(mean, directions, variance[:components] / variance.sum())


def rainbow(features: Features, pca: PatchPCA | None = None, *, quantile: float = 0.01) -> Tensor:
    """Colours [B, h, w, 3] in [0, 1]: coordinates stretched between their `quantile` and 1 − `quantile`, per channel."""
    coordinates = (pca or fit(features))(features)[..., :3]
    flat = coordinates.flatten(0, 2)
    low, high = flat.quantile(quantile, 0), flat.quantile(1 - quantile, 0)
    return ((coordinates - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
