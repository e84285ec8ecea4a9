"""Draws the images of the documentation into docs/images.

    python tools/page_images.py              all of them
    python tools/page_images.py NAME…        some, by file name
    python tools/page_images.py --out DIR    somewhere else

The photographs are those `examples/demo.py` takes from installed packages; the model is the one that ships. The two
training curves are drawn from the tables in docs/training.md.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import explorer_images
from PIL import Image, ImageDraw, ImageOps

from dinov3 import drawing

ROOT = Path(__file__).resolve().parents[1]


def dinov3_command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dinov3", *arguments], check=True, stdout=subprocess.DEVNULL)


def tiles(rows: list[list[Image.Image]], side: int = 256, gap: int = 8) -> Image.Image:
    """Images in rows, each cut to a square."""
    page = Image.new("RGB", (gap + len(rows[0]) * (side + gap), gap + len(rows) * (side + gap)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            page.paste(
                ImageOps.fit(image.convert("RGB"), (side, side)), (gap + x * (side + gap), gap + y * (side + gap))
            )
    return page


def demo(work: Path) -> Image.Image:
    """What `make demo` draws."""
    subprocess.run([sys.executable, ROOT / "examples/demo.py", "--out", work], check=True, stdout=subprocess.DEVNULL)
    return Image.open(work / "demo.png")


def patches(work: Path) -> Image.Image:
    """Four photographs above the three strongest directions of their patches."""
    import dinov3
    from dinov3.dense.pca import rainbow

    model = dinov3.load()
    rows: list[list[Image.Image]] = [[], []]
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        photograph = ImageOps.fit(Image.open(work / "images" / f"{name}.jpg"), (512, 512))
        colours = rainbow(dinov3.embed(model, photograph, size=512))[0]
        coloured = Image.fromarray((colours.numpy() * 255).astype("uint8"))
        rows[0].append(photograph)
        rows[1].append(coloured.resize((256, 256), Image.Resampling.NEAREST))
    return tiles(rows)


def search(work: Path) -> Image.Image:
    """`dinov3 search … --sheet`: a photograph and its nearest."""
    sheet = work / "neighbours.png"
    sheet.unlink(missing_ok=True)
    dinov3_command(
        "search", str(work / "store"), "--image", str(work / "images/coffee.jpg"), "--top", "5", "--sheet", str(sheet)
    )
    return Image.open(sheet)


def segment(work: Path) -> Image.Image:
    """`dinov3 segment`: foreground by the head that ships."""
    dinov3_command(
        "segment", *(str(work / f"images/{name}.jpg") for name in ("coffee", "chelsea")), "--out", str(work / "masks")
    )
    return Image.open(work / "masks/coffee_segments.png")


def classify(work: Path) -> Image.Image:
    """`dinov3 classify`: the shares of five classes."""
    dinov3_command("classify", str(work / "images/coffee.jpg"), "--out", str(work / "classes"))
    return Image.open(work / "classes/coffee_probabilities.png")


@contextmanager
def explored(work: Path, size: tuple[int, int], query: str = "") -> Iterator[Any]:
    """The page of `dinov3 explore` over four photographs, once it has their features."""
    from playwright.sync_api import expect, sync_playwright

    folder = work / "explored"
    folder.mkdir(exist_ok=True)
    names = ("astronaut", "chelsea", "coffee", "rocket")
    for name in names:
        shutil.copy(work / "images" / f"{name}.jpg", folder)
    command = [sys.executable, "-m", "dinov3", "explore", str(folder), "--port", "8123"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as service, sync_playwright() as playwright:
        try:
            assert service.stderr is not None
            assert any("http://" in line for line in iter(service.stderr.readline, ""))
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page(viewport={"width": size[0], "height": size[1]})
            page.goto(f"http://127.0.0.1:8123/#tab=images{query}")
            expect(page.locator(".shot")).to_have_count(len(names), timeout=60_000)
            expect(page.locator(".shot[aria-busy=true]")).to_have_count(0, timeout=120_000)
            yield page
            browser.close()
        finally:
            service.terminate()


def explorer(work: Path) -> Image.Image:
    """One patch, and what is like it in four photographs."""
    with explored(work, (1280, 760), "&q=1_0.42_0.45") as page:
        page.locator(".mark-query").wait_for(timeout=60_000)
        page.wait_for_timeout(1000)
        return Image.open(io.BytesIO(page.screenshot()))


def rows_of(page: str, heading: str) -> tuple[list[float], dict[str, list[float | None]]]:
    """Steps and curves of the first table below a heading in docs/training.md."""
    below = (ROOT / "docs" / page).read_text().split(heading)[1]
    lines = [
        [cell.strip(" *") for cell in line.strip("|").split("|")]
        for line in re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)[0].splitlines()  # type: ignore[index]
    ]

    def number(cell: str) -> float | None:
        return float(cell.replace(",", "")) if cell else None

    steps = [float(cell.replace(",", "")) for cell in lines[0][1:]]
    return steps, {line[0]: [number(cell) for cell in line[1:]] for line in lines[2:]}


def curves(panels: list[tuple[str, list[str]]], heading: str, size: tuple[float, float]) -> Image.Image:
    """A panel for each (title, names of rows) of a table of docs/training.md."""
    from matplotlib.figure import Figure

    steps, table = rows_of("training.md", heading)
    figure = Figure(figsize=size, layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name in names:
            points: Any = [(step, value) for step, value in zip(steps, table[name]) if value is not None]
            axes.plot(*zip(*points), marker="o", markersize=4, label=name)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    data = io.BytesIO()
    figure.savefig(data, dpi=110)
    return Image.open(data)


def small_cpu(work: Path) -> Image.Image:
    return curves(
        [
            ("losses", ["DINO, global crops (ln 256 = 5.55)", "iBOT (2.77)"]),
            (
                "10-NN on Imagenette, %",
                ["k-NN of both, %", "k-NN of CLS, %", "the same of a control, lightly's DINO loss"],
            ),
        ],
        "### Seen to learn",
        (9, 3.2),
    )


def gram_cpu(work: Path) -> Image.Image:
    return curves(
        [("AUROC of patch similarity", ["without", "with, from step 100"])],
        "### Seen to help: Gram anchoring",
        (6.4, 3.2),
    )


def doctor_images(work: Path) -> Image.Image:
    """What a run draws: crops as the student sees them, and PCA of three images; two steps on the demo's photographs."""
    run = work / "run"
    settings = ["student.layerscale=1e-5", "train.batch_size_per_gpu=4", "train.num_workers=0", "optim.iterations=2"]
    settings += ["crops.global_crops_size=224", "crops.local_crops_size=96", "optim.warmup_epochs=0"]
    settings += ["evaluation.eval_period_iterations=2", "evaluation.doctor_images=4"]
    start = ("--out", str(run), "--recipe", "toy_cpu", "--weights", "vitt16", "--device", "cpu")
    dinov3_command("train", str(work / "images"), *start, *settings)
    crops, pca = (Image.open(run / "images" / f"{name}_1.png") for name in ("crops", "pca"))
    page = Image.new("RGB", (max(crops.width, pca.width), crops.height + pca.height), drawing.PAPER)
    page.paste(crops, (0, 0))
    page.paste(pca, (0, crops.height))
    return page


def explorer_moving(work: Path) -> list[tuple[Image.Image, int]]:
    """The pointer over patches of four photographs, then their common colours: images and their milliseconds."""
    # (photograph, place in it as shares of width and height) that the pointer goes to
    path = [
        (1, 0.38, 0.38),
        (1, 0.71, 0.44),
        (1, 0.58, 0.82),
        (2, 0.5, 0.14),
        (2, 0.18, 0.7),
        (0, 0.42, 0.2),
        (3, 0.5, 0.6),
    ]
    frames: list[tuple[Image.Image, int]] = []
    with explored(work, (1000, 640)) as page:

        def frame(milliseconds: int, pointer: tuple[float, float] | None = None) -> None:
            page.wait_for_timeout(400)
            image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            if pointer:
                x, y = pointer
                arrow = [(x + a, y + b) for a, b in ((0, 0), (0, 17), (4, 13), (7, 20), (10, 18), (7, 12), (12, 12))]
                ImageDraw.Draw(image).polygon(arrow, fill="white", outline="black")
            frames.append((image, milliseconds))

        frame(800)
        boxes = [shot.bounding_box() for shot in page.locator(".shot-view").all()]
        last: tuple[int, float, float] | None = None
        for i, u, v in path:
            steps = [(u, v)]
            if last and last[0] == i:  # on the way, where it stays in one photograph
                steps = [(last[1] + t / 3 * (u - last[1]), last[2] + t / 3 * (v - last[2])) for t in (1, 2, 3)]
            for n, (across, down) in enumerate(steps, 1):
                place = (boxes[i]["x"] + boxes[i]["width"] * across, boxes[i]["y"] + boxes[i]["height"] * down)
                page.mouse.move(*place)
                frame(1000 if n == len(steps) else 180, place)
            last = (i, u, v)
        page.get_by_role("button", name="PCA").click()
        page.wait_for_timeout(2000)
        frame(1800)
    return frames


def store_view(name: str) -> Callable[[Path], Path]:
    """A screenshot or the recording of the explorer's store view: a file that is copied as it is."""
    return lambda work: explorer_images.drawn(work)[name]


IMAGES: dict[str, Callable[[Path], Any]] = {
    "demo.jpg": demo,  # first: it leaves the photographs and the store
    "vitt16-pca.jpg": patches,
    "search.jpg": search,
    "segment.jpg": segment,
    "classify.jpg": classify,
    "explorer.jpg": explorer,
    "small-cpu.png": small_cpu,
    "gram-cpu.png": gram_cpu,
    "doctor-images.png": doctor_images,
    "explorer.webp": explorer_moving,  # with Playwright and Chromium
    **{name: store_view(name) for name in explorer_images.NAMES},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of " + " ".join(IMAGES))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    if unknown := set(args.names) - set(IMAGES):
        raise SystemExit(f"no image {' '.join(sorted(unknown))}; there are {' '.join(IMAGES)}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        first = demo(work)
        for name, draw in IMAGES.items():
            if name in args.names or not args.names:
                image = first if draw is demo else draw(work)
                if isinstance(image, Path):
                    shutil.copy(image, args.out / name)
                    continue
                if isinstance(image, list):
                    (image, *rest), durations = zip(*image)
                    image.save(
                        args.out / name, save_all=True, append_images=rest, duration=durations, loop=0, quality=70
                    )
                else:
                    image.convert("RGB").save(args.out / name, quality=88, optimize=True)
                print(f"{args.out / name} {image.width}×{image.height}")


if __name__ == "__main__":
    main()
