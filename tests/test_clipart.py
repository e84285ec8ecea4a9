"""The example that pastes clipart onto photographs: the same arguments give the same images."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from paths import ROOT
from PIL import Image

SCRIPT = ROOT / "examples" / "clipart_on_photographs.py"


def test_clipart_lies_on_photographs_and_every_run_makes_the_same(tmp_path: Path) -> None:
    for name in ("photographs", "clipart"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (200, 120), (0, 0, 255)).save(tmp_path / "photographs" / "blue.jpg")
    thing = np.zeros((64, 64, 4), np.uint8)
    thing[16:48, 16:48] = (255, 0, 0, 255)  # red on a transparent ground
    Image.fromarray(thing).save(tmp_path / "clipart" / "red.png")
    for out in ("a", "b"):
        words = [
            tmp_path / "photographs",
            tmp_path / "clipart",
            tmp_path / out,
            "--count",
            "8",
            "--masks",
            tmp_path / "masks",
        ]
        subprocess.run([sys.executable, SCRIPT, *words], check=True)
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == [f"{i:05d}.jpg" for i in range(8)]
    blue = 0
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        pixels = np.asarray(Image.open(path)).reshape(-1, 3).astype(int)
        assert pixels.shape == (160 * 160, 3)
        mask = np.asarray(Image.open(tmp_path / "masks" / f"{path.stem}.png")).ravel()
        red = (pixels[:, 0] > 180) & (pixels[:, 2] < 90)
        assert set(mask) <= {0, 1}
        assert (mask == red).mean() > 0.97
        assert ((pixels[:, 0] > 200) & (pixels[:, 1:] < 60).all(1)).mean() > 0.05
        blue += ((pixels[:, 2] > 200) & (pixels[:, :2] < 60).all(1)).mean() > 0.02
    assert 0 < blue < 8  # the others lie on a plain ground, or cover all of it
