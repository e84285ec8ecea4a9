"""Commands and snippets of the README and of pages for beginners, run as printed, in a folder that holds what they name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT

import dinov3

PAGES = ("README.md", "docs/use.md", "docs/faq.md", "docs/gallery.md")
WEIGHTS = "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


ELSEWHERE = tuple(f"dinov3 {verb}" for verb in ("serve", "explore", "bench", "export"))  # tests of their own; long


def commands(page: str) -> list[str]:
    lines = [line for block in blocks("sh", page) for line in block.splitlines()]
    return [line for line in lines if line.startswith("dinov3 ") and not line.startswith(ELSEWHERE)]


def draw_scene(folder: Path | None, name: str | Path, horizon: int) -> None:
    """A road below a sky; in a folder of images and masks, or as an image alone."""
    from PIL import Image

    below = np.arange(64)[:, None, None] >= horizon
    pixels = np.where(below, np.array([90, 90, 95]), np.array([120, 170, 240])) * np.ones((64, 80, 1))
    pixels += np.random.default_rng(horizon).normal(0, 6, pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if folder is None:
        image.save(name)
        return
    image.save(folder / "images" / name)
    mask = np.where(below[:, :, 0], 0, 1) * np.ones((64, 80))
    Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory, skimage_images) -> Path:
    """A folder with `demo-out/images` and a weights file (random values in Meta's form) under the published name."""
    folder = tmp_path_factory.mktemp("readme")
    photographs = folder / "demo-out" / "images"  # as `make demo` leaves them
    photographs.mkdir(parents=True)
    for source in ("chelsea.png", "coffee.png", "rocket.jpg"):
        from PIL import Image

        Image.open(skimage_images / source).save(photographs / f"{Path(source).stem}.jpg")
    (folder / "demo-out" / "store").symlink_to(folder / "store")
    for split, parts in (("train", "images masks"), ("val", "images masks")):
        for part in parts.split():
            (folder / "scenes" / split / part).mkdir(parents=True)
        for i in range(3):
            draw_scene(folder / "scenes" / split, f"{i}.png", horizon=20 + 8 * i)
            for kind in ("low", "high"):
                (folder / "labelled" / split / kind).mkdir(parents=True, exist_ok=True)
                draw_scene(
                    None, folder / "labelled" / split / kind / f"{i}.png", horizon=10 if kind == "high" else 50 + i
                )
    torch.save(dinov3.load("dinov3_vits16", "random").state_dict(), folder / WEIGHTS)
    for name in ("hubconf.py", "dinov3"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(command: str, place: Path) -> str:
    binaries = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if command.startswith("dinov3 ") and not (binaries / "dinov3").exists():
        command = f"{sys.executable} -m dinov3 {command.removeprefix('dinov3 ')}"
    done = subprocess.run(command, shell=True, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.timeout(600)  # a dozen processes
def test_the_commands_work_as_printed(place: Path) -> None:
    printed = commands("README.md")
    assert len(printed) >= 7
    said = {command: run(command, place) for command in printed}
    found = next(text for command, text in said.items() if "--sheet" in command)
    assert "images/chelsea.jpg" in found
    assert (place / "neighbours.png").stat().st_size > 10_000
    assert (place / "vits16-transformers" / "config.json").is_file()
    assert (place / "street" / "head.safetensors").is_file()
    masks = {p.name for p in (place / "masks").iterdir()}
    assert {"chelsea_classes.png", "coffee_classes.png", "rocket_classes.png"} <= masks
    assert (place / "knn" / "results-knn.csv").is_file()
    assert all("3 embedded" in text for command, text in said.items() if " embed " in command)


def test_the_make_targets_printed_first_exist() -> None:
    first = blocks("sh")[0]
    targets = re.findall(r"^make (\w+)", first, re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr


@pytest.mark.parametrize("status", [0, 1])
def test_make_demo_says_now_and_then_that_it_installs(status: int, tmp_path: Path) -> None:
    pip, inside = tmp_path / "pip", tmp_path / "venv" / "bin" / "python"
    pip.write_text(f"#!/bin/sh\nsleep 2.5\nexit {status}\n")
    pip.chmod(0o755)
    inside.parent.mkdir(parents=True)
    inside.touch()
    made = [f"VENV={tmp_path / 'venv'}", f"PYTHON={pip}", "TICK=1", f"{tmp_path / 'venv'}/.demo"]
    done = subprocess.run(["make", *made], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) == (status == 0)
    assert 1 <= len(re.findall(r"still installing, \d+ MB", done.stdout)) <= 2
    assert (tmp_path / "venv" / ".demo").exists() == (status == 0)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "page",
    [
        "docs/use.md",
        "docs/faq.md",
        *(pytest.param(f"docs/{p}.md", marks=pytest.mark.slow) for p in ("gallery", "tune")),
    ],
)
def test_other_commands_of_the_pages_work_as_printed(page: str, place: Path) -> None:
    known = commands("README.md")  # run above, perhaps by another process
    if not (place / "store").exists():
        run("dinov3 embed demo-out/images --out store", place)
    for command in dict.fromkeys(commands(page)):
        if command not in known:
            run(command, place)


@pytest.mark.parametrize("page, index", [(page, i) for page in PAGES for i in range(len(blocks("python", page)))])
def test_the_snippets_work_as_printed(page: str, index: int, place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    exec(compile(blocks("python", page)[index], f"{page}, snippet {index}", "exec"), {})


def test_the_shapes_printed_beside_the_snippet_are_right(place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    scope: dict = {}
    exec(blocks("python")[0], scope)
    f = scope["f"]
    printed = dict(re.findall(r"^f\.(\w+)\s+# (\[[\d, ]+\])", blocks("python")[0], re.MULTILINE))
    assert {name: str(list(getattr(f, name).shape)) for name in printed} == printed
    assert len(printed) == 3
    assert (f.layer, f.normed) == (11, True)


def test_the_demo_draws_its_image(tmp_path: Path) -> None:
    shown = run(f"{sys.executable} {ROOT / 'examples' / 'demo.py'} --out {tmp_path / 'out'}", ROOT)
    command = next(line for line in shown.splitlines() if line.startswith("$ dinov3 search"))
    again = run(command.removeprefix("$ "), ROOT)  # what stands below a command is what it prints
    lines = [line for line in again.splitlines() if "\t" in line]
    assert len(lines) == 7
    assert "\n".join([command, *lines, ""]) in shown
    from PIL import Image

    assert Image.open(tmp_path / "out" / "demo.png").size[0] > 900
    shutil.rmtree(tmp_path / "out")
