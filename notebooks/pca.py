# %% [markdown]
# # PCA of patches
#
# The three strongest directions of the patch features, as red, green and blue. Nobody labelled anything.

# %%
from pathlib import Path

import skimage
from PIL import Image

import dinov3
from dinov3 import drawing
from dinov3.dense import pca, upsample

photos = Path(skimage.__file__).parent / "data"
model = dinov3.load()
images = [Image.open(photos / name).convert("RGB") for name in ("astronaut.png", "chelsea.png", "coffee.png")]
features = [dinov3.embed(model, image, size=448, shape="short") for image in images]


def sheet(values):
    """The images over maps [h, w, 3] in [0, 1] of their patches."""
    tiles = [("", image) for image in images]
    tiles += [("", drawing.colours_of(upsample.bilinear(v, f).numpy())) for v, f in zip(values, features)]
    return drawing.sheet(tiles, across=len(images))


# %% [markdown]
# Each image with directions of its own:

# %%
sheet([pca.rainbow(f)[0] for f in features])

# %% [markdown]
# One palette for all three: the same colour means the same direction everywhere.

# %%
palette = pca.fit(features)
print("shares of the variance:", [round(s, 2) for s in palette.variance_share.tolist()])
sheet([pca.rainbow(f, palette)[0] for f in features])

# %% [markdown]
# The figure of the paper: directions of the object's patches alone, whitened, on black. The object comes from TokenCut
# here; the foreground notebook trains a classifier for it.

# %%
from dinov3.dense import discovery

masks = [discovery.token_cut(f, tau=None).mask for f in features]
sheet([pca.object_colours(f, mask)[0] for f, mask in zip(features, masks)])

# %% [markdown]
# **With a published model** (ViT-L, 768 pixels high, as in the reference's notebook) parts of animals and tools have
# their own colours, and edges are as fine as a patch. The paper picks the nicest of the 48 palettes for each image:
# `signs=` and `order=`.
