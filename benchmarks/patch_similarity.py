"""How well do patch features tell an object from its surroundings? Without training: each patch of the object is a query.

    python benchmarks/patch_similarity.py IMAGES MASKS vitt16 run/eval/training_99 …

IMAGES and MASKS are folders of any depth whose files have the same names up to their endings; a mask is white on the
object. Each patch of the object asks all patches of its image by cosine: patches of the object should come before those of
the background (patches on the edge are left out). Printed for each model: the area under the ROC curve, mean over images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import dinov3


def area(features: Tensor, inside: Tensor) -> float:
    """Of patch features [P, D] and the share of each patch [P] that lies on the object."""
    x = F.normalize(features.float(), dim=1)
    cosines = x[inside > 0.5] @ x.T
    positive, negative = cosines[:, inside > 0.5], cosines[:, inside < 0.1]
    return float((positive[:, :, None] > negative[:, None]).float().mean())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", type=Path)
    p.add_argument("masks", type=Path)
    p.add_argument("models", nargs="+", help="names, weight files, or dumps of a training run")
    p.add_argument("--size", type=int, nargs=2, default=(224, 384), metavar=("HEIGHT", "WIDTH"))
    p.add_argument("--every", type=int, default=1, help="take every n-th image")
    o = p.parse_args()
    masks = {m.relative_to(o.masks).with_suffix(""): m for m in sorted(o.masks.rglob("*.png"))}
    images = [i for i in sorted(o.images.rglob("*")) if i.relative_to(o.images).with_suffix("") in masks][:: o.every]
    for name in o.models:
        model = dinov3.load(weights=name) if Path(name).exists() else dinov3.load(name)
        areas = []
        for image, patches in zip(images, dinov3.embed(model, images, size=tuple(o.size)).patches):
            height, width = patches.shape[:2]
            with Image.open(masks[image.relative_to(o.images).with_suffix("")]) as mask:
                inside = torch.from_numpy(
                    np.array(mask.convert("L").resize((width, height), Image.Resampling.BOX)) / 255
                )
            if ((inside > 0.5).sum() > 0) and ((inside < 0.1).sum() > 0):
                areas.append(area(patches.flatten(0, 1), inside.flatten()))
        print(f"{name}\t{np.mean(areas):.4f}\t{len(areas)} images", flush=True)


if __name__ == "__main__":
    main()
