"""`dinov3 see …` on small images: every verb writes what it names, and mistakes are sentences."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dinov3.cli import app, see
from dinov3.errors import DinoError

SMALL = ["--size", "128"]


def run(*arguments: str | Path) -> str:
    """stdout of a verb; what it raises is raised."""
    done = CliRunner().invoke(app, ["see", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.fixture
def images(tmp_path: Path, skimage_images: Path) -> Path:
    """A folder with a coffee cup, twice: as it is, and mirrored; beside it `cup.png`, the cup's mask."""
    folder = tmp_path / "images"
    folder.mkdir()
    cup = Image.open(skimage_images / "coffee.png").convert("RGB").resize((192, 128))
    cup.save(folder / "a.png")
    cup.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "b.png")
    mask = np.zeros((128, 192), np.uint8)
    mask[20:115, 40:145] = 255
    Image.fromarray(mask).save(tmp_path / "cup.png")
    return folder


def test_maps_of_two_images(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = run("pca", images, "--out", out, *SMALL)
    assert printed.count("of the variance") == 2
    assert Image.open(out / "a_pca.png").size == (192 + 12 + 192, 128)  # the image beside its colours
    printed = run("similarity", images, "--at", "90,60", "--upsample", "nearest", "--out", out, *SMALL)
    assert "cosine up to 1.000 at (88, 56)" in printed
    assert run("attention", images / "a.png", "--layer", "5", "--out", out, *SMALL).count("attention to patches") == 1
    assert run("discover", images, "--upsample", "bilinear", "--out", out, *SMALL).count("object in (") == 2
    names = {p.name for p in out.glob("*.png")}
    assert names == {f"{n}_{e}.png" for n in "ab" for e in ("pca", "similarity", "object", "mask")} | {
        "a_attention.png"
    }


def test_an_example_and_clicks_find_the_mirrored_cup(images: Path, tmp_path: Path) -> None:
    out, classifier = tmp_path / "out", tmp_path / "fg.safetensors"
    truth = np.array(Image.open(tmp_path / "cup.png"))[:, ::-1] > 127

    def iou() -> float:
        found = np.array(Image.open(out / "b_mask.png")) > 127
        return float((found & truth).sum() / (found | truth).sum())

    run("example", images, "--mask", tmp_path / "cup.png", "--out", out, *SMALL)
    assert iou() > 0.5
    clicks = shlex.split("--at 90,50 --at 60,90 --not 5,5 --not 185,120")
    run("foreground", images, *clicks, "--save", classifier, "--out", out, *SMALL)
    by_clicks = (out / "b_mask.png").read_bytes()
    assert iou() > 0.4
    run("foreground", images, "--classifier", classifier, "--out", out, *SMALL)
    assert (out / "b_mask.png").read_bytes() == by_clicks
    masks = tmp_path / "masks"
    masks.mkdir()
    (tmp_path / "cup.png").rename(masks / "a.png")
    run("foreground", images, "--masks", masks, "--out", out, *SMALL)
    assert iou() > 0.5
    run("pca", images, "--foreground", classifier, "--out", out, *SMALL)
    assert Image.open(out / "a_pca.png").getpixel((204 + 2, 2)) == (0, 0, 0)  # the corner is no object


def test_two_images_are_matched(images: Path, tmp_path: Path) -> None:
    printed = run("match", images / "a.png", images / "a.png", "--out", tmp_path / "out", "--ratio", "1", *SMALL)
    assert printed.startswith("96 matches\t96 (100%) agree on a homography")
    with (tmp_path / "out" / "a_a_matches.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 96
    assert all(row["left_x"] == row["right_x"] for row in rows)


def test_a_moving_square_is_followed_in_a_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 60, (8, 12, 3)).repeat(16, 0).repeat(16, 1)
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 192, 128, "yuv420p"
        for t in range(5):
            frame = ground.copy()
            frame[32:80, 16 + 16 * t : 64 + 16 * t] = (240, 200, 40)
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame.astype(np.uint8), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    printed = run("track", path, "--box", "16,32,64,80", "--out", tmp_path / "out", *SMALL)
    assert printed.startswith("5 frames")
    last = np.array(Image.open(tmp_path / "out" / "clip_masks" / "00004.png"))
    truth = np.zeros((128, 192), bool)
    truth[32:80, 80:128] = True
    assert ((last == 1) & truth).sum() / ((last == 1) | truth).sum() > 0.6
    with av.open(str(tmp_path / "out" / "clip_tracked.mp4")) as written:
        frames = list(written.decode(video=0))
    assert len(frames) == 5
    assert (frames[0].width, frames[0].height) == (192, 128)
    # the square in the written video is tinted, the ground darker than it was
    assert frames[4].to_ndarray(format="rgb24")[56, 104].mean() > 100


def test_mistakes_are_sentences(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "mixed").mkdir()
    for name, size in (("a", (48, 64)), ("b", (64, 48))):
        Image.new("RGB", size).save(tmp_path / "mixed" / f"{name}.png")
    for arguments, sentence in (
        (["similarity", images], "one of --at X,Y, --box X0,Y0,X1,Y1, --mask FILE"),
        (["similarity", images, "--at", "5"], "is not 2 numbers in pixels"),
        (["similarity", images, "--at", "900,5"], r"outside the image, which is 192×128"),
        (["track", images], "say what to follow"),
        (["track", tmp_path / "no.mp4", "--box", "1,1,9,9"], "no such file or folder"),
        (["foreground", images], "say what the object is"),
        (["attention", images, "--precision", "bf16"], "leave --precision out"),
        (["pca", images, "--layer", "12"], "0 to 11"),
        (["match", images / "a.png", images], rf"{images}: a folder, not an image"),
        (["track", tmp_path / "mixed", "--box", "1,1,30,30"], "frame 1 has 64×48 pixels, the first one 48×64"),
    ):
        with pytest.raises(DinoError, match=sentence):
            run(*arguments, "--out", out, *SMALL)
    Image.new("L", (10, 10), 255).save(tmp_path / "small.png")
    with pytest.raises(DinoError, match="is 10×10 pixels, the image is 192×128"):
        see.mask_of(tmp_path / "small.png", Image.open(images / "a.png"))
