# %% [markdown]
# # Zero-shot segmentation
#
# dino.txt puts words and patches into one space: a patch belongs to the class whose text it is most like. **No text tower
# ships with this package**: the published one is large and has terms of its own. So this notebook runs the same
# computation with *planted* class vectors in place of words: each is the mean of a few patches that were pointed at in
# one image. What it shows is the method and its code, not the quality of dino.txt.

# %%
from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image, ImageOps

import dinov3
from dinov3 import drawing
from dinov3.dense import similarity, upsample

photos = Path(skimage.__file__).parent / "data"
model = dinov3.load()
image = Image.open(photos / "astronaut.png").convert("RGB")
features = dinov3.embed(model, image, size=448)

planted = {
    "face": [(225, 100), (225, 130)],
    "spacesuit": [(120, 300), (220, 420), (90, 380)],
    "flag": [(30, 150), (20, 250)],
    "helmet": [(380, 420), (430, 440)],
    "wall": [(330, 60), (120, 60), (460, 120)],
}
queries = [torch.stack([similarity.at_pixel(features, *p) for p in points]).mean(0) for points in planted.values()]
words = torch.nn.functional.normalize(torch.stack(queries), dim=1)  # [K, D]: where a text tower's vectors would stand

# %% [markdown]
# Cosine of every patch with every class, brought to the image's pixels, and the largest wins.


# %%
def classes(image, features):
    cosine = torch.nn.functional.normalize(features.patches[0], dim=-1) @ words.T  # [h, w, K]
    return upsample.edge_aware(cosine, features, image).argmax(-1).numpy()


def drawn(image, features):
    colours = np.array(drawing.palette(len(planted)), np.uint8)
    return drawing.classes_over(image, classes(image, features), list(planted), colours)


drawn(image, features)

# %% [markdown]
# The same vectors on an image that they were not taken from: mirrored, cropped and darker.

# %%
other = ImageOps.mirror(image).crop((0, 0, 440, 440)).point(lambda v: int(v * 0.8))
other_features = dinov3.embed(model, other, size=384)
drawn(other, other_features)

# %% [markdown]
# **With the published model** the vectors are text, and the rest stays:
#
# ```python
# from dinov3.hub.published_heads import open_model
# from dinov3.predict.classify import predict_places, words
#
# model, tokenizer = open_model("dinov3_vitl16_dinotxt….pth", "dinov3_vitl16….pth")
# classes = words(model, tokenizer, ["an astronaut", "a flag", "a wall"])
# predict_places(model, "photo.jpg", classes).save("out", "photo")
# ```
#
# or `dinov3 zero-shot photo.jpg --labels "astronaut,flag,wall" --dense --out out --weights … --backbone-weights …`.
