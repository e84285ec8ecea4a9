"""Object or background, patch by patch: a logistic regression on patch features (the foreground notebook).

A handful of images with masks is enough. Patches that lie wholly in or wholly out of the mask are learnt from, the
others are not; how strongly to regularise is found by leaving out one image at a time.

Legend: B images, h×w patch grid, D width, N patches.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.dense.matching import coverage, maps
from dinov3.errors import DinoError
from dinov3.features import Features
from dinov3.metrics import average_precision
from dinov3.optim import logistic_regression

if TYPE_CHECKING:
    from PIL import Image

MIXED = -1
STRENGTHS = tuple(10.0**e for e in range(-7, 1))  # the notebook's; it found 0.1 for ViT-L


@dataclass(frozen=True)
class Foreground:
    """P(object) = σ(weight · patch + bias). `trained_on`: model, layer and norm of the features; checked in use."""

    weight: Tensor  # [D]
    bias: Tensor  # []
    C: float
    trained_on: str = ""

    def __call__(self, features: Features | Tensor, *, smooth: bool = True) -> Tensor:
        """Probabilities [B, h, w]; `smooth`: the median of every 3 × 3 neighbourhood."""
        if isinstance(features, Features) and self.trained_on not in ("", kind_of(features)):
            raise DinoError(
                f"this foreground classifier was trained on {self.trained_on} and was given {kind_of(features)}"
            )
        x = maps(features)
        if x.shape[-1] != len(self.weight):
            raise DinoError(f"this foreground classifier takes patches of width {len(self.weight)}, not {x.shape[-1]}")
        probability = (x @ self.weight.to(x) + self.bias.to(x)).sigmoid()
        return median3(probability) if smooth else probability

    def save(self, path: str | os.PathLike[str]) -> None:
        from safetensors.torch import save_file

        about = json.dumps({"C": self.C, "trained_on": self.trained_on})
        save_file({"weight": self.weight.contiguous(), "bias": self.bias.reshape(1)}, path, {"foreground": about})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Foreground:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["foreground"])
                return cls(file.get_tensor("weight"), file.get_tensor("bias")[0], about["C"], about["trained_on"])
        except (SafetensorError, KeyError, OSError) as error:
            raise DinoError(f"{path} is no foreground classifier written by `save` ({error})") from None


def kind_of(features: Features) -> str:
    """Model, layer and norm of features, which must agree between training and use (the size may differ)."""
    return f"{features.model}, layer {features.layer}, {'normed' if features.normed else 'before the norm'}"


def notebook_size(image: Image.Image, *, height: int = 768, patch: int = 16) -> Image.Image:
    """An image (or mask) at the notebooks' size: that high, and as wide as whole patches fit; bilinear, antialiased."""
    from PIL import Image as pil

    width = max(1, int(image.width * height / (image.height * patch))) * patch
    return image.resize((width, height), pil.Resampling.BILINEAR)


def patch_labels(mask: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """1 object, 0 background, −1 mixed, int64 [h, w], from a mask [H, W] (booleans or alpha in [0, 1]).

    Object: above 99 % of the cell is covered; background: below 1 %.
    """
    return labels_of_shares(coverage(mask, grid_hw))


def labels_of_shares(share: Tensor) -> Tensor:
    """`patch_labels` from the share of every patch that the mask covers, [h, w]."""
    return torch.where(share > 0.99, 1, torch.where(share < 0.01, 0, MIXED))


def click_labels(
    features: Features,
    inside: Sequence[tuple[float, float]],
    outside: Sequence[tuple[float, float]] = (),
    image: int = 0,
    *,
    others: float = 0.3,
) -> Tensor:
    """Labels [h, w] as `patch_labels` gives them, from clicks (x, y) on the object and beside it, in the image's pixels.

    Without any click beside the object, background is guessed: four patches for each click, evenly from the share `others`
    of the patches that are least like the clicked ones. (All of that share would outweigh the clicks.)
    """
    if not inside:
        raise DinoError("a click on the object is needed")
    labels = torch.full(features.grid_hw, MIXED, dtype=torch.long)
    places = [features.patch_of_pixel(x, y, image) for x, y in inside]
    if not outside:
        unit = F.normalize(features.patches[image].float().cpu(), dim=-1)
        best = (unit @ torch.stack([unit[place] for place in places]).T).amax(-1)  # [h, w]
        least = best.flatten().argsort()[: max(1, int(others * best.numel()))]
        guessed = least[torch.linspace(0, len(least) - 1, min(len(least), 4 * len(places))).long()]
        labels.view(-1)[guessed] = 0
    for x, y in outside:
        labels[features.patch_of_pixel(x, y, image)] = 0
    for place in places:
        labels[place] = 1
    return labels


def examples(features: Features | Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(patches [N, D], labels [N]) of one image without the mixed ones."""
    x, y = maps(features), labels[None] if labels.ndim == 2 else labels
    if x.shape[:3] != y.shape:
        raise DinoError(f"labels of these features have the shape {list(x.shape[:3])}, not {list(y.shape)}")
    clear = y.to(x.device) != MIXED
    return x[clear], y.to(x.device)[clear]


def fit(
    images: Sequence[Features],
    labels: Sequence[Tensor],
    *,
    C: float | None = None,
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[Foreground, dict[float, float]]:
    """(the classifier on all images, mean average precision of each strength tried).

    images: features of one image each; labels [h, w] of each (`patch_labels`). C: the inverse of the regularisation,
    as scikit-learn's; None: the best of `strengths` when each image in turn is left out (the table is empty otherwise).
    """
    if len(images) != len(labels) or not images:
        raise DinoError(f"as many label maps as images are needed, at least one; got {len(labels)} and {len(images)}")
    for other in images[1:]:
        if kind_of(other) != kind_of(images[0]):
            raise DinoError(f"images of two kinds of features: {kind_of(images[0])}, {kind_of(other)}")
    parts = [examples(f, y) for f, y in zip(images, labels)]
    table: dict[float, float] = {}
    if C is None:
        table = leave_one_out(parts, strengths)
        C = max(table, key=lambda c: table[c])  # of equals the first: the stronger regularisation
    x, y = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    weight, bias = logistic(x, y, C)
    return Foreground(weight.cpu(), bias.cpu(), C, kind_of(images[0])), table


def leave_one_out(parts: Sequence[tuple[Tensor, Tensor]], strengths: Sequence[float] = STRENGTHS) -> dict[float, float]:
    """Average precision on the image left out, averaged over images, for every strength.

    parts: (patches [N, D], labels [N]) of every image. Images without both kinds of patches train and are not scored.
    """
    if len(parts) < 2:
        raise DinoError("leaving one image out needs two images at least; give C (the notebook found 0.1)")
    scored = [i for i, (_, y) in enumerate(parts) if 0 < int(y.sum()) < len(y)]
    if not scored:
        raise DinoError("no image has both object and background patches: the strength cannot be chosen, give C")
    table: dict[float, float] = {}
    for C in strengths:
        found = []
        for i in scored:
            x = torch.cat([p[0] for j, p in enumerate(parts) if j != i])
            y = torch.cat([p[1] for j, p in enumerate(parts) if j != i])
            weight, bias = logistic(x, y, C)
            found.append(average_precision(parts[i][0].double() @ weight.double() + bias.double(), parts[i][1]))
        table[C] = math.fsum(found) / len(found)
    return table


def logistic(x: Tensor, y: Tensor, C: float, *, max_iter: int = 1000) -> tuple[Tensor, Tensor]:
    """(weight [D], bias []) that minimise C·Σ log-loss + ½‖weight‖², scikit-learn's objective; x [N, D], y [N] 0 or 1.

    L-BFGS in float64 from zero: the problem is convex, so where it ends does not depend on the solver.
    """
    if not 0 < int(y.sum()) < len(y):
        raise DinoError("the patches are all object or all background: there is nothing to separate")
    x64 = x.double()
    # centred and scaled as a whole, the same problem is much rounder: the bias takes up the shift
    shift = x64.mean(0)
    weight, bias = logistic_regression(x64 - shift, y.double()[:, None], C, 1, tol=1e-9, max_iter=max_iter)
    return weight[0].float(), (bias[0] - shift @ weight[0]).float()


def median3(x: Tensor) -> Tensor:
    """The median of every 3 × 3 neighbourhood of maps [B, h, w]; the border is repeated outwards, so that an object at
    the image's edge is not eaten away."""
    padded = F.pad(x[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    h, w = x.shape[-2:]
    around = torch.stack([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)])
    return around.median(0).values
