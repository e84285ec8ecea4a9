"""A folder of two images that share a planted thing: a chequered square, at another place on another background."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, SIDE = 256, 192, 96
CORNERS = ((32, 48), (128, 32))  # (x, y) of the square in a.png and b.png


def write_pair(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:SIDE, :SIDE]
    square = np.where(((x // 8 + y // 8) % 2)[..., None], (230, 60, 40), (250, 220, 60)).astype(np.uint8)
    for seed, (left, top) in enumerate(CORNERS):
        coarse = np.random.default_rng(seed).integers(90, 160, (4, 5, 3), dtype=np.uint8)
        pixels = np.array(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        pixels[top : top + SIDE, left : left + SIDE] = square
        Image.fromarray(pixels).save(folder / f"{'ab'[seed]}.png")
    return folder


def squares(grid_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Two boolean maps [2, h, w]: patches well inside the square, and patches well outside it."""
    h, w = grid_hw
    y, x = ((np.arange(n) + 0.5) / n * side for n, side in ((h, HEIGHT), (w, WIDTH)))
    away = np.stack(
        [
            np.maximum(np.abs(x[None] - left - SIDE / 2), np.abs(y[:, None] - top - SIDE / 2)) - SIDE / 2
            for left, top in CORNERS
        ]
    )  # pixels from the square's edge, negative inside
    return away < -16, away > 16
