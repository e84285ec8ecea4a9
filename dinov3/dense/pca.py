"""The PCA rainbow (paper Fig. 1, 13): the three strongest directions of the patch features as red, green and blue.

`rainbow` stretches every channel and needs no mask; `object_colours` is the notebooks' way: directions of the object's
patches alone, whitened, through a sigmoid, on black.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov3.dense.matching import as_mask
from dinov3.errors import DinoError
from dinov3.features import Features


@dataclass(frozen=True)
class PatchPCA:
    """Directions fitted on some patches, applicable to others, so that colours mean the same across images."""

    mean: Tensor  # [D]
    directions: Tensor  # [D, k], strongest first, signs fixed
    variance_share: Tensor  # [k], of the total variance
    deviation: Tensor  # [k], standard deviation along the directions

    def __call__(self, features: Features) -> Tensor:
        """Coordinates [B, h, w, k] along the directions."""
        return (features.patches.float().cpu() - self.mean) @ self.directions

    def whitened(self, features: Features) -> Tensor:
        """Coordinates [B, h, w, k] in units of the fitted patches' standard deviation."""
        return self(features) / self.deviation.clamp_min(1e-12)


def fit(
    features: Features | Sequence[Features], components: int = 3, mask: Tensor | Sequence[Tensor | None] | None = None
) -> PatchPCA:
    """Principal directions of the patches of all images together: all of them, or those in a boolean mask [B, h, w].

    features: of one call, or a list, whose images may have different grids; then `mask` is a list too, None for all
    patches of an element. Colours by one `PatchPCA` mean the same in all of its images.
    """
    parts = [features] if isinstance(features, Features) else list(features)
    if not parts:
        raise DinoError("no features were given")
    chosen = [mask] if isinstance(mask, Tensor) or mask is None else list(mask)
    if mask is None:
        chosen = chosen * len(parts)
    if len(chosen) != len(parts):
        raise DinoError(f"as many masks as features are needed, {len(parts)}; got {len(chosen)}")
    for other in parts[1:]:
        parts[0].check_comparable(other, ignore=["preprocessing"])
    x = torch.cat([_patches_of(part, m) for part, m in zip(parts, chosen)])  # [N, D]
    if len(x) <= components:
        raise DinoError(f"{components} components need more than {components} patches; there are {len(x)}")
    mean = x.mean(0)
    # from the scatter matrix [D, D]: many images cost no more memory than their patches
    centred = (x - mean).double()
    variance, vectors = torch.linalg.eigh(centred.T @ centred)
    variance, directions = variance.flip(0).clamp_min(0), vectors.flip(1)[:, :components]
    # a direction's sign is arbitrary: make its largest entry positive so that colours are the same on every machine
    largest = directions.abs().argmax(0)
    directions = directions * directions[largest, torch.arange(components)].sign()
    share, deviation = variance[:components] / variance.sum(), (variance[:components] / (len(x) - 1)).sqrt()
    return PatchPCA(mean, directions.float(), share.float(), deviation.float())


def _patches_of(features: Features, mask: Tensor | None) -> Tensor:
    """Patches [N, D]: all, or those in a mask."""
    x = features.patches.float().cpu().flatten(0, 2)
    return x if mask is None else x[_mask_of(features, mask).flatten()]


def _mask_of(features: Features, mask: Tensor) -> Tensor:
    """A boolean mask [B, h, w] of the features' patches, from one of that shape or, for one image, [h, w]."""
    mask = as_mask(mask).bool().cpu()
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.shape != features.patches.shape[:3]:
        expected = list(features.patches.shape[:3])
        raise DinoError(f"a mask of these features has the shape {expected}, not {list(mask.shape)}")
    return mask


def rainbow(features: Features, pca: PatchPCA | None = None, *, quantile: float = 0.01) -> Tensor:
    """Colours [B, h, w, 3] in [0, 1]: coordinates stretched between their `quantile` and 1 − `quantile`, per channel.

    Without `pca` directions and stretch are those of these images. With it both are the fitted patches' (the stretch is ±2
    standard deviations), so that one colour means one direction in every image.
    """
    if pca is not None:
        return ((pca.whitened(features)[..., :3] + 2) / 4).clamp(0, 1)
    coordinates = fit(features)(features)
    flat = coordinates.flatten(0, 2)
    low, high = flat.quantile(quantile, 0), flat.quantile(1 - quantile, 0)
    return ((coordinates - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def object_colours(
    features: Features,
    mask: Tensor,
    pca: PatchPCA | None = None,
    *,
    signs: tuple[int, int, int] = (1, 1, 1),
    order: tuple[int, int, int] = (0, 1, 2),
) -> Tensor:
    """Colours [B, h, w, 3] in [0, 1] of the patches in a boolean mask [B, h, w] (or [h, w] of one image), black elsewhere.

    Directions of the masked patches (or `pca`'s), whitened, sigmoid(2x). signs (±1 per direction) and order (which
    direction is red, green, blue) change the palette: the paper picks the nicest for each image.
    """
    if sorted(order) != [0, 1, 2] or any(s not in (1, -1) for s in signs):
        raise DinoError(f"order is a permutation of 0, 1, 2 and signs are 1 or -1; got {order} and {signs}")
    mask = _mask_of(features, mask)
    x = (pca or fit(features, 3, mask)).whitened(features)[..., :3] * torch.tensor(signs)
    return (2 * x[..., list(order)]).sigmoid() * mask[..., None]
