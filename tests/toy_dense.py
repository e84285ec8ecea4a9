"""What the tests of dense evaluations share: a tiny model by configuration, and folders that a linear head can learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

MODEL = """
student: {arch: vit_tiny, embed_dim: 32, depth: 4, num_heads: 2, patch_size: 8, n_storage_tokens: 2, layerscale: 1.0,
          pos_embed_rope_dtype: fp32}
train: {dataset_path: none}
"""


def write_model(folder: Path) -> str:
    """A configuration that describes a model of 50 thousand random weights with patches of 8 pixels."""
    file = folder / "toy.yaml"
    file.write_text(MODEL)
    return str(file)


def write_scenes(root: Path, splits: dict[str, int], *, ade: bool = False, seed: int = 0) -> Path:
    """Red, green and blue boxes in grey images of 40 × 56; the mask says the colour, 0 is grey (in ADE20K's form also, but
    there it is nothing, and 1 to 3 are the classes)."""
    rng = np.random.default_rng(seed)
    for split, count in splits.items():
        for i in range(count):
            pixels = rng.integers(90, 130, (40, 56, 3)).astype(np.uint8)
            mask = np.zeros((40, 56), np.uint8)
            for colour in rng.permutation(3)[:2]:
                top, left = rng.integers(0, 3) * 8, rng.integers(0, 4) * 8
                box = slice(top, top + 24), slice(left, left + 24)
                mask[box] = colour + 1
                pixels[box] = 20
                pixels[*box, colour] = 240
            images, masks = ("images", "annotations") if not ade else (f"images/{split}", f"annotations/{split}")
            folder = root / (images if ade else f"{split}/images")
            target = root / (masks if ade else f"{split}/masks")
            for where, values in ((folder, pixels), (target, mask)):
                where.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(where / f"{i:03}.png")
            if ade:
                (folder / f"{i:03}.png").rename(folder / f"{i:03}.jpg")  # decided by content
    return root


def write_depths(root: Path, count: int, seed: int = 0) -> Path:
    """Grey boxes, the brighter the nearer, on a wall of 4 m; unknown in the first row. Millimetres, 32 × 40."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        metres = np.full((32, 40), 4.0)
        for near in (3.0, 1.5):
            top, left = rng.integers(0, 3) * 8, rng.integers(0, 3) * 8
            metres[top : top + 16, left : left + 16] = near
        pixels = np.repeat((255 - metres * 60)[..., None], 3, axis=-1) + rng.integers(-5, 5, (32, 40, 1))
        depth = (metres * 1000).astype(np.uint16)
        depth[0] = 65535
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{i:03}.color.png")
        Image.fromarray(depth).save(root / f"{i:03}.depth.png")
    return root
