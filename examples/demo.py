"""`make demo`: a folder of photographs → store → search with one of them → an image to look at.

The photographs are those inside scikit-image's and scikit-learn's installed packages, and crops of them, so nothing is
downloaded. Every command it runs is printed, and is what you would type for a folder of your own.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

import dinov3
from dinov3.dense.pca import rainbow
from dinov3.weights import catalog

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg",
    "rocket.jpg", "china.jpg", "flower.jpg",
)  # fmt: skip
CROPS = {"left": (0, 0, 0.7, 0.7), "right": (0.3, 0.3, 1, 1), "middle": (0.15, 0.15, 0.85, 0.85)}


def photographs(folder: Path) -> None:
    """Fills `folder` with the photographs, three crops of each, and a mirrored one."""
    import skimage
    import sklearn

    places = [Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"]
    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOGRAPHS:
        found = next((place / name for place in places if (place / name).is_file()), None)
        if found is None:
            continue
        image = Image.open(found).convert("RGB")
        w, h = image.size
        stem = Path(name).stem
        image.save(folder / f"{stem}.jpg", quality=92)
        for crop, (x0, y0, x1, y1) in CROPS.items():
            part = image.crop((round(x0 * w), round(y0 * h), round(x1 * w), round(y1 * h)))
            part.save(folder / f"{stem}-{crop}.jpg", quality=92)
        ImageOps.mirror(image).save(folder / f"{stem}-mirrored.jpg", quality=92)


def run(*command: str) -> str:
    """Runs a `dinov3` command as printed; what it writes to stdout, which is shown too."""
    print(f"\n$ dinov3 {shlex.join(command)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "dinov3", *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    print(done.stdout, end="", flush=True)
    return done.stdout


def draw(query: Path, hits: list[list[str]], colours: Image.Image, random: bool, out: Path) -> None:
    """One image: the query, the rainbow of its patches, and its neighbours."""
    side, gap, label = 224, 16, 44
    font, small = ImageFont.load_default(size=17), ImageFont.load_default(size=14)
    tiles = [("query", query.stem, Image.open(query)), ("its patches", "first three principal directions", colours)]
    tiles += [(f"{rank} · cosine {float(score):.3f}", Path(path).stem, Image.open(path)) for rank, score, path in hits]
    columns = 4
    rows = -(-len(tiles) // columns)
    head = 60
    canvas = Image.new("RGB", (gap + columns * (side + gap), head + rows * (side + label + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((gap, 14), "dinov3: search by image, and what the patches see", "black", ImageFont.load_default(size=22))
    if random:
        note = "random weights: colours and layout, not meaning"
        pen.text((canvas.width - gap - pen.textlength(note, font), 18), note, (190, 30, 30), font)
    for i, (title, name, image) in enumerate(tiles):
        x, y = gap + i % columns * (side + gap), head + i // columns * (side + label + gap)
        canvas.paste(ImageOps.fit(image.convert("RGB"), (side, side)), (x, y))
        pen.text((x, y + side + 4), title, "black", font)
        pen.text((x, y + side + 24), name, (110, 110, 110), small)
    canvas.save(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--weights", help="your own weights: a file, URL or Hugging Face id")
    args = parser.parse_args()
    out = args.out
    images, store = out / "images", out / "store"
    photographs(images)
    weights = ["--weights", args.weights] if args.weights else []
    run("embed", str(images), "--out", str(store), *weights)
    query = images / "chelsea-middle.jpg"
    printed = run("search", str(store), "--image", str(query), "--top", "7")
    hits = [line.split("\t") for line in printed.splitlines()]  # rank, cosine, path
    hits = [hit for hit in hits if Path(hit[2]).name != query.name][:6]

    model = dinov3.load(weights=args.weights) if args.weights else dinov3.load()
    features = dinov3.embed(model, query, size=448)
    colours = Image.fromarray((rainbow(features)[0].numpy() * 255).astype("uint8"))
    draw(query, hits, colours.resize((448, 448), Image.Resampling.NEAREST), model.origin.random, out / "demo.png")
    print(f"\nLook at {out / 'demo.png'}. To go on:")
    if (Path(sys.prefix) / "bin" / "activate").is_file():
        print(f"  source {os.path.relpath(Path(sys.prefix) / 'bin' / 'activate')}")
    print(f"  dinov3 search {store} --image {images / 'coffee.jpg'} --sheet neighbours.png")
    if not args.weights:
        print(
            "This was the small model that ships with the package (docs/model-card-vitt16.md). For Meta's far better ones:\n"
            f"  request access at {catalog.DOWNLOAD_PAGE}\n"
            "  python examples/demo.py --weights FILE"
        )


if __name__ == "__main__":
    main()
