# %% [markdown]
# # Dense and sparse matching
#
# Patches that show the same part of a thing have similar features, so the nearest patch in another image is a match. The
# two photographs are a stereo pair; for the homography a photograph is warped by one that we know.

# %%
from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image

import dinov3
from dinov3 import drawing
from dinov3.dense import matching, pca

photos = Path(skimage.__file__).parent / "data"
model = dinov3.load()
left, right = (Image.open(photos / f"motorcycle_{side}.png").convert("RGB") for side in ("left", "right"))
a, b = (dinov3.embed(model, image, size=512, shape="short") for image in (left, right))

# %% [markdown]
# **Dense**: every patch takes the colour of its match in the left image's palette.

# %%
dense = matching.match(a, b)
palette = pca.fit(a)
back = matching.match(b, a)
colours_left = pca.rainbow(a, palette)[0]
colours_right = colours_left.flatten(0, 1)[back.right].view(
    *b.grid_hw, 3
)  # of the left patch that each right patch matches
drawing.sheet(
    [
        ("left", drawing.colours_of(colours_left.numpy())),
        ("right, by its matches", drawing.colours_of(colours_right.numpy())),
    ],
    across=2,
    side=380,
)

# %% [markdown]
# **Sparse**: mutual matches that pass Lowe's ratio test, thinned until no two are nearer than 60 pixels.

# %%
matches = matching.match(a, b, mutual=True, ratio=0.95)
points, there = matching.pixels(a, matches.left), matching.pixels(b, matches.right)
kept = matching.thin(points, distance=60)
colours = (colours_left.flatten(0, 1)[matches.left] * 255).byte().numpy()
print(f"{len(dense)} patches, {len(matches)} reliable matches, {len(kept)} drawn")
drawing.matches_between(left, right, points[kept].numpy(), there[kept].numpy(), colours[kept])

# %% [markdown]
# In a rectified stereo pair rows stay rows, which is a check that needs no labels:

# %%
rows_apart = (points[:, 1] - there[:, 1]).abs()
print(f"matches within one patch of their row: {float((rows_apart <= 16).float().mean()):.0%}")
assert float((rows_apart <= 16).float().mean()) > 0.8

# %% [markdown]
# **Homography check**: one photograph warped by a known projective map, and the map found again.

# %%
truth = np.array([[0.92, 0.08, 10.0], [-0.05, 0.95, 25.0], [0.0, 1e-4, 1.0]])
inverse = np.linalg.inv(truth)
warped = left.transform(left.size, Image.Transform.PERSPECTIVE, tuple((inverse / inverse[2, 2]).flatten()[:8]))
c = dinov3.embed(model, warped, size=512, shape="short")
matches = matching.match(a, c, mutual=True)
points, there = matching.pixels(a, matches.left), matching.pixels(c, matches.right)
matrix, inliers = matching.homography(points, there, tolerance=16)
corners = torch.tensor([[100.0, 100.0], [600.0, 100.0], [600.0, 400.0], [100.0, 400.0]])
found = matching.project(matrix[None], corners[None])[0]
expected = matching.project(torch.from_numpy(truth).float()[None], corners[None])[0]
print(
    f"{int(inliers.sum())} of {len(inliers)} matches agree; corners are off by",
    (found - expected).norm(dim=1).round().tolist(),
    "px",
)

# %% [markdown]
# **With a published model** the two images may show different animals of a kind: beak matches beak. This small model
# matches views of one scene.
