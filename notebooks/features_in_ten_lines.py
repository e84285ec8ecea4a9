# %% [markdown]
# # Features in ten lines
#
# An image becomes a CLS token (the whole image) and a grid of patch tokens (its parts). The photographs are inside the
# scikit-image package, the model is the small one that ships with `dinov3`: nothing is downloaded.

# %%
from pathlib import Path

import skimage
from PIL import Image

import dinov3

photos = Path(skimage.__file__).parent / "data"
model = dinov3.load()  # a published one: dinov3.load("dinov3_vitl16", "weights.pth")
names = ["chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png"]
features = dinov3.embed(model, [photos / name for name in names], size=256)
print(features)
print(features.cls.shape, features.registers.shape, features.patches.shape)

# %% [markdown]
# Images of the same thing have similar CLS tokens. Here each photograph is compared with mirrored copies of all.

# %%
from PIL import ImageOps

mirrored = [ImageOps.mirror(Image.open(photos / name).convert("RGB")) for name in names]
cosines = features.similarity(dinov3.embed(model, mirrored, size=256))
for name, row in zip(names, cosines.tolist()):
    print(f"{name:14s}", "  ".join(f"{c:5.2f}" for c in row))
assert cosines.argmax(1).tolist() == [0, 1, 2, 3]

# %% [markdown]
# A patch knows where it is: positions go both ways between patches and the original image's pixels.

# %%
row, column = features.patch_of_pixel(140, 110, image=0)  # the cat's left eye
print("patch", (row, column), "sees the box", features.box_of_patch(row, column, image=0))

# %% [markdown]
# **With a published model** the code is the same; features are 384 to 4,096 wide instead of 192, and far better: this
# small model was made in hours on two CPU cores (its card has the numbers).
