"""Shared by the tasks: an image to a model's input and back to its own geometry, names of result files.

Legend: H×W the original image, h×w the network's input, C channels of a map.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov3.data.images import DecodedImage, open_image, upright_rgb
from dinov3.data.transforms.inputs import Geometry, Preprocessing, to_pixels
from dinov3.drawing import palette
from dinov3.errors import DinoError
from dinov3.heads.encoder import resized, slide
from dinov3.weights import catalog


@dataclass(frozen=True)
class Prepared:
    """One image on its way through a model."""

    image: Image.Image  # the original, upright RGB, H×W
    x: Tensor  # [1, 3, h, w] on the model's device
    geometry: Geometry

    @property
    def size_hw(self) -> tuple[int, int]:
        return (self.image.height, self.image.width)


def image_of(source: Any) -> Image.Image:
    """Upright RGB of a path, bytes, PIL source, opened `DecodedImage`, array [H, W, 3] or tensor [3, H, W]. `ImageError`
    for what cannot be decoded."""
    if isinstance(source, DecodedImage):
        return source.image
    if isinstance(source, (str, bytes, os.PathLike)):
        return open_image(source).image
    if isinstance(source, Image.Image):
        return upright_rgb(source)
    pixels = to_pixels(source)
    if pixels.dtype != torch.uint8:
        pixels = (pixels * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def see(model: nn.Module, source: Any, preprocessing: Preprocessing) -> Prepared:
    """The image as `preprocessing` prepares it, on the model's device (the model casts it to its own dtype)."""
    image = image_of(source)
    x, geometry = preprocessing(image)
    return Prepared(image, x[None].to(next(model.parameters()).device), geometry)


def own_preprocessing(model: Any) -> Preprocessing | None:
    """How a head of your own saw its images in training, borders included."""
    info = getattr(model, "head_info", None)
    return info.preprocessing.with_(center_crop=None) if info is not None else None


def statistics(model: Any) -> dict[str, Any]:
    """Mean and std of the images a model was trained on: its own, else its backbone's."""
    for holder in (own_preprocessing(model), *(getattr(part, "origin", None) for part in model.modules())):
        if holder is not None:
            return {"mean": holder.mean, "std": holder.std}
    mean, std = catalog.STATISTICS["lvd1689m"]
    return {"mean": mean, "std": std}


def preprocessing_of(model: nn.Module, size: int | None, *, shape: str = "short", **changes: Any) -> Preprocessing:
    """Resized so that the short side is `size` (None: not resized), to the very pixel: the models pad by themselves."""
    size_or_native = {"shape": "native"} if size is None else {"size": size, "shape": shape}
    return Preprocessing(**({"multiple": 1} | size_or_native | statistics(model) | changes))


def chosen_preprocessing(model: nn.Module, size: int | None, default: int) -> Preprocessing:
    """A given size of the short side, else as a head of your own was trained, else the default size."""
    own = own_preprocessing(model)
    return own if own is not None and size is None else preprocessing_of(model, size or default)


def names_of(model: Any, n: int, names: Sequence[str] | None = None, default: Sequence[str] = ()) -> tuple[str, ...]:
    """n class names: those given, the model's own, those that `default` has if it has n, or "class 0" and so on."""
    numbered = tuple(f"class {i}" for i in range(n))
    info = getattr(model, "head_info", None)
    own = tuple(getattr(model, "class_names", ()) if info is None else info.class_names)
    own = own if own != numbered or info is not None else ()
    chosen = tuple(names or own or (default if len(default) == n else numbered))
    if len(chosen) != n:
        raise DinoError(f"{len(chosen)} class names for a model of {n} classes")
    return chosen


def colours_of(model: Any, n: int) -> np.ndarray:
    """[n, 3] uint8: a head file's colours, or as many that can be told apart."""
    info = getattr(model, "head_info", None)
    return np.array(info.colours if info is not None and info.colours else palette(n), dtype=np.uint8).reshape(n, 3)


def window_options(size_hw: tuple[int, int], window: int | None, stride: int | None) -> tuple[int, int] | None:
    """(window, stride) where sliding windows are needed: a window was given and the image is larger than it."""
    if window is None:
        if stride is not None:
            raise DinoError("a stride is the distance of windows: give a window as well")
        return None
    if window < 1 or (stride is not None and not 1 <= stride <= window):
        raise DinoError(f"windows of {window} pixels every {stride}: the stride is between 1 and the window's side")
    if max(size_hw) <= window:
        return None
    return window, stride or max(1, window * 2 // 3)


class Predicting:
    """A function (x [1, 3, h, w], size (h', w')) → [1, C, h', w'] with the name that `slide` calls."""

    def __init__(self, function: Callable[[Tensor, tuple[int, int]], Tensor]) -> None:
        self.predict = lambda x, rescale_to: function(x, rescale_to)


def predicted_map(
    x: Tensor,
    function: Callable[[Tensor, tuple[int, int]], Tensor],
    channels: int,
    window: int | None = None,
    stride: int | None = None,
) -> Tensor:
    """`function` over the whole input [1, 3, h, w], or the mean over its windows; [1, channels, h, w]."""
    size_hw = (x.shape[-2], x.shape[-1])
    windows = window_options(size_hw, window, stride)
    if windows is None:
        return function(x, size_hw)
    side, step = windows
    return slide(
        x,
        Predicting(function),
        decoder_head_type="linear",
        n_output_channels=channels,
        crop_hw=(side, side),
        stride_hw=(step, step),
    )


def to_original(maps: Tensor, seen: Prepared) -> Tensor:
    """[1, C, h, w] over the input → [1, C, H, W] over the original image, padding cut off."""
    height, width = seen.geometry.valid_hw
    return resized(maps[..., :height, :width].float(), seen.size_hw)


STRIP_VALUES = 1 << 26  # of a strip of resized class maps: 256 MiB of float32


def best_class(maps: Tensor, seen: Prepared, weights: Callable[[Tensor], Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """(class [H, W] uint8 or uint16, its weight [H, W] float32) of class maps [1, K, h, w].

    As `weights(to_original(maps)).max(1)`, in strips: 150 classes of a 12-megapixel image are 7 GB.
    """
    height, width = seen.geometry.valid_hw
    maps = maps[..., :height, :width].float()
    (H, W), K = seen.size_hw, maps.shape[1]
    classes = np.empty((H, W), np.uint8 if K <= 256 else np.uint16)
    weight = np.empty((H, W), np.float32)
    # bilinear is one direction after the other: rows are blended here, columns by `resized`
    y = ((torch.arange(H, device=maps.device) + 0.5) * (height / H) - 0.5).clamp(min=0)
    upper = y.floor().long().clamp(max=height - 1)
    lower, share = (upper + 1).clamp(max=height - 1), (y - upper)[:, None]
    rows = max(1, STRIP_VALUES // (K * W))
    for top in range(0, H, rows):
        part = slice(top, min(H, top + rows))
        blended = maps[:, :, upper[part]] * (1 - share[part]) + maps[:, :, lower[part]] * share[part]
        best = weights(resized(blended, (blended.shape[-2], W))).max(1)
        classes[part] = best.indices[0].cpu().numpy().astype(classes.dtype)
        weight[part] = best.values[0].cpu().numpy()
    return classes, weight


# ---- files out -----------------------------------------------------------------------------------------------------


class OutputNames:
    """One name per image in a folder of results; a name once given to an image is never given to another.

    `images.csv` in the folder keeps the names, so that a second run with other images of the same names overwrites nothing.
    One process at a time, which is the caller's to see to. Raises `DinoError` where `images.csv` is something else.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = make_folder(folder)
        self.table = self.folder / "images.csv"
        self.name_of: dict[str, str] = {}
        if self.table.is_file():
            with self.table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                rows = csv.DictReader(file)
                if rows.fieldnames != ["name", "image"]:
                    raise DinoError(f"{self.table} is a table of something else: give another folder for the results")
                self.name_of = {row["image"]: row["name"] for row in rows}

    def __call__(self, path: str) -> str:
        """The name for an image's path: its stem, of at most `LONGEST` bytes; with its folder, or digits, where that is
        another image's."""
        if path in self.name_of:
            return self.name_of[path]
        taken = {name.casefold() for name in self.name_of.values()}
        stem, folder = _cut(Path(path).stem or "image"), Path(path).parent.name
        digits = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        numbered = (f"{stem}-{digits}-{n}" for n in itertools.count(2))
        candidates = itertools.chain((stem, _cut(f"{folder}-{stem}"), f"{stem}-{digits}"), numbered)
        name = next(n for n in candidates if n.casefold() not in taken)
        new = not self.table.exists()
        with self.table.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(("name", "image"))
            writer.writerow((name, path))
        self.name_of[path] = name
        return name


LONGEST = 200  # bytes of a name; most file systems take 255, and an ending follows


def _cut(text: str) -> str:
    data = os.fsencode(text)
    return text if len(data) <= LONGEST else data[:LONGEST].decode("utf-8", "ignore")


def set_aside(path: Path) -> Path:
    """Renames a file to NAME.1, NAME.2, … before its ending, so that another can take its place. Returns the new path."""
    free = next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists())
    path.rename(free)
    return free


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder, made if need be. Raises `DinoError`."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DinoError(f"cannot make the folder {folder}: {error.strerror or error}") from None
    return Path(folder)


def result_files(folder: str | os.PathLike[str], name: str, *endings: str) -> list[Path]:
    """`NAME_ENDING` for each ending, in a folder that is made if need be."""
    return [make_folder(folder) / f"{name}_{ending}" for ending in endings]
