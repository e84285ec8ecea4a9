"""More kinds of things than a few thousand photographs show: images with a transparent ground, pasted onto photographs.

    python examples/clipart_on_photographs.py PHOTOGRAPHS CLIPART OUT --count 3600

A student that learns from teachers needs no labels and no realism, only images that make the teachers say many different
things. Written for the shipped model (docs/model-card-vitt16.md): Caltech-101, Open Clip Art (public domain) and
Fluent Emoji (MIT). One image in four gets a plain ground instead of a photograph. The same arguments give the same
images.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from PIL import Image

SIDE = 160


def files(folder: Path, *ends: str) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in ends)


def composed(photographs: list[Path], clipart: list[Path], draw: random.Random) -> tuple[Image.Image, Image.Image]:
    """(image, mask): a square photograph (or plain ground) with one or two things pasted on it, each a third of its side to
    all of it; the mask is 1 where they are."""
    if draw.random() < 0.25:
        ground = Image.new("RGB", (SIDE, SIDE), tuple(draw.randint(100, 255) for _ in range(3)))
    else:
        photograph = Image.open(draw.choice(photographs)).convert("RGB")
        side = min(photograph.size)
        left, top = (draw.randint(0, length - side) for length in photograph.size)
        ground = photograph.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    mask = Image.new("L", ground.size)
    for _ in range(draw.choice((1, 1, 2))):
        thing = Image.open(draw.choice(clipart)).convert("RGBA")
        box = thing.getbbox() or (0, 0, *thing.size)
        thing = thing.crop(box).rotate(draw.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
        if draw.random() < 0.5:
            thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        scale = SIDE * draw.uniform(0.35, 1.0) / max(thing.size)
        thing = thing.resize([max(1, round(length * scale)) for length in thing.size], Image.Resampling.LANCZOS)
        at = tuple(draw.randint(0, SIDE - length) for length in thing.size)
        ground.paste(thing, at, thing)
        mask.paste(1, at, thing.getchannel("A").point(lambda alpha: 255 * (alpha > 127)))
    return ground, mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("clipart", type=Path, nargs="+", help="folders of PNGs or WebPs with a transparent ground")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--masks", type=Path, help="a folder for masks of what was pasted, PNGs of the images' names")
    given = parser.parse_args()
    photographs = files(given.photographs, ".jpg", ".jpeg")
    clipart = [p for folder in given.clipart for p in files(folder, ".png", ".webp")]
    clipart = [p for p in clipart if p.stat().st_size < 1 << 20]  # a few are gigantic
    given.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(given.seed)
    for number in range(given.count):
        image, mask = composed(photographs, clipart, draw)
        image.save(given.out / f"{number:05d}.jpg", quality=92)
        if given.masks is not None:
            given.masks.mkdir(parents=True, exist_ok=True)
            mask.save(given.masks / f"{number:05d}.png")
    print(f"{given.count} images of {len(clipart)} things on {len(photographs)} photographs in {given.out}")


if __name__ == "__main__":
    main()
