# %% [markdown]
# # Your own head in two minutes
#
# A classifier on frozen features, from a folder with one sub-folder a class. The classes are photographs from
# scikit-image, the training images random crops of them; validation images are crops of the mirrored photographs.

# %%
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import skimage
from PIL import Image, ImageOps

photos = Path(skimage.__file__).parent / "data"
work = Path(tempfile.mkdtemp())
draw = random.Random(0)
for name in ("astronaut.png", "brick.png", "chelsea.png", "coffee.png", "grass.png", "rocket.jpg"):
    photo = Image.open(photos / name).convert("RGB")
    for split, count, source in (("train", 10, photo), ("val", 5, ImageOps.mirror(photo))):
        folder = work / "data" / split / Path(name).stem
        folder.mkdir(parents=True)
        for i in range(count):
            side = draw.randint(min(photo.size) // 2, min(photo.size) * 3 // 4)
            x, y = draw.randint(0, photo.width - side), draw.randint(0, photo.height - side)
            source.crop((x, y, x + side, y + side)).resize((160, 160)).save(folder / f"{i}.jpg")


def dinov3(*arguments):
    """A command as you would type it."""
    done = subprocess.run([sys.executable, "-m", "dinov3", *map(str, arguments)], capture_output=True, text=True)
    print("$ dinov3", *(str(a).replace(str(work) + "/", "") for a in arguments))
    print("\n".join(done.stdout.replace(str(work) + "/", "").splitlines()[-8:]))
    assert done.returncode == 0, done.stderr


start = time.monotonic()
dinov3("train-head", "classification", work / "data", "--out", work / "run", "--size", "160", "--steps", "200")
print(f"{time.monotonic() - start:.0f} s")

# %%
Image.open(next((work / "run").glob("*.png")))

# %% [markdown]
# The head is one file. It classifies images from the command line:

# %%
val = work / "data" / "val"
dinov3(
    "classify",
    val / "chelsea" / "0.jpg",
    val / "rocket" / "0.jpg",
    "--head",
    work / "run" / "head.safetensors",
    "--top",
    "2",
)

# %% [markdown]
# **With a published model**: `--backbone dinov3_vits16 --weights FILE`. Segmentation, depth and detection are learnt in
# the same way: docs/heads.md.
