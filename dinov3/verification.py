"""Where foreign features come from: a tensor somebody made of the same images, compared with what a model can give.

Layers × norm × pooling are in the model's outputs; sizes × statistics × channels × resize are tried one after the other,
likely ones first, each from the best found so far, until the cosine is 1 or nothing improves: some forty settings on three
images. Columns are cut into pieces of the model's width, each named on its own: that is how concatenations are found. What
no `Preprocessing` does (no antialias, BGR, EXIF ignored) is done to the pixels before it.

Legend: N images, T tokens an image (1 for vectors), D width, K pieces.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov3.data.images import open_image, upright_rgb
from dinov3.data.transforms.inputs import Geometry, Preprocessing, to_bytes
from dinov3.errors import DinoError, ImageError, one_of, require
from dinov3.features import Features, default_preprocessing, extract_layers, prepare
from dinov3.weights.catalog import ROWS, STATISTICS

# Cosines: nothing left to find; named; named with a doubt; worth the unlikely settings.
EXACT, FITS, NEARLY, RELATED = 1 - 1e-6, 0.999, 0.98, 0.3
SEARCHED, ORDERED = 3, 32  # images of the search; most rows whose order is looked for
MOST_PIECES = 12
ROUNDS = 2
ORIENTATION = 0x0112  # EXIF's number of it

Triple = tuple[float, float, float]
Choice = dict[str, Any]
# What torchvision, the bare model and the reference do with sides that are no multiple of the patch.
PLAIN: Choice = {"fit": "crop", "rounding": "down", "center_crop": None}
# Sizes and shapes, likely ones first: transformers, the reference, timm (crop), what people choose for dense features.
LIKELY: tuple[Choice, ...] = (
    {"size": 224, "shape": "square"},
    {"size": 256, "shape": "square"},
    {"size": 256, "shape": "short", "center_crop": 224},
    {"size": 224, "shape": "short", "center_crop": 224},
    {"size": 256, "shape": "short", "center_crop": 256},
)
UNLIKELY: tuple[Choice, ...] = (
    *({"size": size, "shape": "square"} for size in (320, 336, 384, 448, 480, 512, 518, 640, 768)),
    *({"size": size, "shape": "short", "center_crop": size} for size in (384, 512)),
    *({"size": size, "shape": "short"} for size in (224, 256, 512)),
    *({"size": size, "shape": "short", "fit": "resize", "rounding": "nearest"} for size in (224, 256, 512)),
    {"shape": "native"},
)
STATISTICS_SEEN: dict[str, tuple[Triple, Triple]] = {
    "LVD": STATISTICS["lvd1689m"],
    "SAT": STATISTICS["sat493m"],
    "0.5": ((0.5,) * 3, (0.5,) * 3),
    "CLIP's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "no (0 to 1)": ((0.0,) * 3, (1.0,) * 3),
    "no (0 to 255)": ((0.0,) * 3, (1 / 255,) * 3),
}
PIXELS = ("RGB", "BGR", "not turned by EXIF")
RESIZES: tuple[Choice, ...] = (
    {"resize": "antialiased", "interpolation": "bilinear", "order": "uint8"},
    {"resize": "antialiased", "interpolation": "bilinear", "order": "float"},
    {"resize": "antialiased", "interpolation": "bicubic", "order": "uint8"},
    {"resize": "antialiased", "interpolation": "bicubic", "order": "float"},
    # interpolation and order have no effect in these: fixed, so that each is one setting
    {"resize": "bilinear without antialias", "interpolation": "bilinear", "order": "float"},
    {"resize": "nearest without antialias", "interpolation": "bilinear", "order": "float"},
)


@dataclass(frozen=True)
class Photo:
    """Decoded pixels uint8 [3, h, w]: upright, and as the file has them."""

    upright: Tensor
    stored: Tensor

    @classmethod
    def of(cls, image: Any) -> Photo:
        """Of a path, bytes, PIL image or array. Raises `ImageError`."""
        if not isinstance(image, (str, bytes, os.PathLike)):
            x = to_bytes(upright_rgb(image) if isinstance(image, Image.Image) else image)
            return cls(x, x)
        upright = to_bytes(open_image(image).image)
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            turned = opened.getexif().get(ORIENTATION, 1) != 1
            return cls(upright, to_bytes(opened) if turned else upright)


@dataclass(frozen=True)
class Inputs:
    """How images became network inputs."""

    preprocessing: Preprocessing
    resize: str = "antialiased"  # or another of RESIZES
    pixels: str = "RGB"  # of PIXELS

    def with_(self, changes: Choice) -> Inputs:
        own = {k: v for k, v in changes.items() if k in ("resize", "pixels")}
        others = {k: v for k, v in changes.items() if k not in own}
        return replace(self, preprocessing=self.preprocessing.with_(**others), **own)

    def network_input(self, photo: Photo) -> tuple[Tensor, Geometry]:
        """[3, h, w] and how it came about. Raises `DinoError` where the image is too small for a crop."""
        x = photo.stored if self.pixels == "not turned by EXIF" else photo.upright
        x = x.flip(0) if self.pixels == "BGR" else x
        if self.resize != "antialiased":
            plan = self.preprocessing.plan(x.shape[2], x.shape[1])
            size_hw = round(plan.height * plan.scale_y), round(plan.width * plan.scale_x)
            x = F.interpolate(x[None].float() / 255, size=size_hw, mode=self.resize.split()[0])[0]
        return prepare(x, self.preprocessing)

    def __str__(self) -> str:
        p = self.preprocessing
        if p.size_hw is not None:
            size = "{} × {} px (height × width)".format(*p.size_hw)
        elif p.center_crop:
            size = f"{p.center_crop} px (centre of short side {p.size})"
        else:
            size = {"square": f"{p.size} px", "short": f"short side {p.size} px"}.get(p.shape, "the image's own size")
        named = [name for name, values in STATISTICS_SEEN.items() if values == (p.mean, p.std)]
        values = "8-bit values" if p.order == "uint8" else "floats"
        resize = f"{p.interpolation} on {values}" if self.resize == "antialiased" else self.resize
        about = f"{size} with {named[0] if named else 'other'} statistics, {resize}"
        return about if self.pixels == "RGB" else f"{about}, {self.pixels}"


@dataclass(frozen=True)
class Match:
    """A setting and how near its features are, as the mean over the images of the search."""

    part: str  # "block", of a ConvNeXt "stage"
    layer: int
    normed: bool
    pooling: str
    inputs: Inputs
    cosine: float
    scales: tuple[float, ...] = field(repr=False)  # ‖tensor‖ / ‖features‖ of each image
    columns: tuple[int, int]  # first and last column that it is about

    @property
    def key(self) -> tuple[Any, ...]:
        return self.layer, self.normed, self.pooling, self.columns

    def __str__(self) -> str:
        norm = "after the norm" if self.normed else "before the norm"
        return f"{self.part} {self.layer}, {norm}, {self.pooling}, {self.inputs}, cosine {self.cosine:.4f}"

    def to_dict(self) -> dict[str, Any]:
        values = {k: getattr(self, k) for k in ("layer", "normed", "pooling", "cosine", "columns")}
        about = {"resize": self.inputs.resize, "pixels": self.inputs.pixels}
        return values | about | {"preprocessing": asdict(self.inputs.preprocessing)}

    def code(self) -> str | None:
        """The call of this package that gives the same; None where there is none."""
        attribute = {"CLS": "cls", "mean of patches": "mean", "patches": "patches"}.get(self.pooling)
        if attribute is None or (self.inputs.pixels, self.inputs.resize) != ("RGB", "antialiased"):
            return None
        given = self.inputs.preprocessing
        names = {"size": given.size} if given.size_hw is None else {"size": given.size_hw}
        usual = vars(Preprocessing(multiple=given.multiple))
        others = {k: v for k, v in vars(given).items() if v != usual[k] and k not in ("size", "size_hw")}
        if given.shape == "square":  # the same for every image: there is no other side
            others = {k: v for k, v in others.items() if k not in ("rounding", "fit")}
        statistics = {"mean": given.mean, "std": given.std}
        values = {"layer": self.layer, "norm": self.normed, **names, **others, **statistics}
        return f"dinov3.embed(model, images, {', '.join(f'{k}={v!r}' for k, v in values.items())}).{attribute}"


@dataclass
class Verdict:
    """What a tensor is: one `Match` for each piece of its columns, the runners-up, and what else was noticed."""

    matches: list[Match]
    runners_up: list[Match]
    notes: list[str]
    order: list[int] | None = None  # row i is of image order[i], where that is not i

    @property
    def cosine(self) -> float:
        return _least(self.matches)

    @property
    def fits(self) -> bool:
        return self.cosine >= FITS

    def __str__(self) -> str:
        several = len(self.matches) > 1
        parts = [(f"columns {m.columns[0]} to {m.columns[1]}: " if several else "") + str(m) for m in self.matches]
        lead = "" if self.fits else "nearly " if self.cosine >= NEARLY else "nothing fits; the nearest is "
        return lead + "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        facts = {"sentence": str(self), "fits": self.fits, "cosine": self.cosine, "order": self.order}
        lists = {"matches": self.matches, "runners_up": self.runners_up}
        return facts | {"notes": self.notes} | {k: [match.to_dict() for match in v] for k, v in lists.items()}


def verify(
    model: nn.Module,
    tensor: Tensor | np.ndarray,
    images: Sequence[Any],
    *,
    read: Callable[[Any], Any] = lambda image: image,
    sizes: Sequence[int] = (),
) -> Verdict:
    """Names what `tensor` is of `model` and `images` (paths, bytes, PIL images or arrays; `read` gives these).

    tensor: vectors [N, D] or concatenations [N, K·D]; patches [N, h, w, D], [N, D, h, w] or [N, T, D] with or without CLS
    and registers before them. `sizes`: sides in pixels to be tried as well. Raises `DinoError` where the number of rows or
    the width cannot belong to these images and this model, `ImageError` for an image that cannot be read.
    """
    backbone: Any = model
    tensor = torch.as_tensor(tensor)
    target, notes = _target(tensor, len(images), _widths(backbone))
    search = _Search(backbone, target, images, read, sizes)
    matches = search.run(search.likely)
    order = search.other_order() if _least(matches) < NEARLY else None
    if order is not None:
        again = _Search(backbone, target, [images[i] for i in order], read, sizes)
        if _least(found := again.run(again.likely)) > _least(matches):
            search, matches = again, found
            moved = [f"row {i} is of image {k}" for i, k in enumerate(order) if i != k]
            more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
            notes.append(f"the rows are in another order than the images: {', '.join(moved[:3])}{more}")
        else:
            order = None
    if RELATED < _least(matches) < EXACT:
        matches = search.run(UNLIKELY)
    verdict = Verdict(matches, search.runners_up(matches), notes, order)
    notes += _remarks(verdict, tensor, target)
    return verdict


def _least(matches: Sequence[Match]) -> float:
    return min(match.cosine for match in matches)


def _remarks(verdict: Verdict, tensor: Tensor, target: Tensor) -> list[str]:
    """What else tells the tensor from the features: scale, rounding, settings that these images do not tell apart."""
    found = []
    for match in verdict.matches if verdict.cosine >= NEARLY else []:
        a, b = match.columns
        scales = torch.tensor(match.scales)
        scale = scales.mean().item()
        where = f"columns {a} to {b}" if len(verdict.matches) > 1 else "vectors" if target.shape[1] == 1 else "tokens"
        if _unit(target[..., a : b + 1]):
            found.append(f"{where} are L2-normalised")
        elif _unit(target):
            found.append("rows are L2-normalised as a whole")
        elif scales.std(correction=0) < 2e-3 * scale and abs(scale - 1) > 2e-3:
            found.append(f"{where} are the features times {scale:.4g}")
        same = [m for m in verdict.runners_up if m.key == match.key and abs(m.cosine - match.cosine) < 1e-7]
        found += [f"these images do not tell it from {m.inputs}" for m in same[:1]]
    dtypes = (d for d in (torch.bfloat16, torch.float16) if torch.equal(target, target.to(d).float()))
    if rounded := next(dtypes, None):
        found.append(f"values are rounded to {str(rounded).removeprefix('torch.')}")
    elif FITS <= verdict.cosine < 1 - 1e-4:
        found.append("not to the last digit: bfloat16, another decoder, or a resize that was not tried")
    if verdict.cosine < NEARLY:
        names = list(dict.fromkeys(row.arch for row in ROWS if row.config.embed_dim == tensor.shape[-1]))
        found += [f"width {tensor.shape[-1]} is that of {' and '.join(names)}: are these the right weights?"] * bool(
            names
        )
        vectors = target.flatten(1)
        if len(vectors) > 3 and vectors.mean(0).abs().amax() < 1e-3 * vectors.std(0).amax():
            found.append("every column has mean 0: centred or standardised over the images")
        if len(target) > ORDERED:
            found.append(f"the order of more than {ORDERED} images is not checked: give the first of both")
    return list(dict.fromkeys(found))


def _unit(x: Tensor) -> bool:
    return bool((x.norm(dim=-1) - 1).abs().amax() < 2e-3)


# ---- the tensor -----------------------------------------------------------------------------------------------------


def read_tensor(path: str | os.PathLike[str], key: str | None = None) -> Tensor:
    """The tensor of an .npy, .npz, .safetensors or .csv file; `key` names one of several. Raises `DinoError`."""
    path = Path(path)
    suffix = one_of("the tensor's file type", path.suffix.lower(), (".npy", ".npz", ".safetensors", ".csv"))
    if not path.is_file():
        raise DinoError(f"there is no file {path}")
    try:
        if suffix == ".csv":
            return _read_csv(path)
        arrays: Any = (
            require("safetensors.torch", "hub", f"reading {path}").load_file(path)
            if suffix == ".safetensors"
            else np.load(path, allow_pickle=False)
        )
        if suffix == ".npy":
            return torch.from_numpy(arrays)
        names = list(arrays)
        if key is None and len(names) != 1:
            raise DinoError(f"{path} holds {len(names)} tensors ({', '.join(names[:8])}): name one with --key")
        return torch.as_tensor(arrays[one_of("key", key or names[0], names)])
    except DinoError:
        raise
    except Exception as error:  # numpy and safetensors raise a dozen kinds for a damaged file
        raise DinoError(f"{path} is no tensor that can be read: {(str(error).splitlines() or [''])[0][:120]}") from None


def _read_csv(path: Path) -> Tensor:
    """Rows of numbers. A header is left out, and a first column of names, or of row numbers where the width is then even."""
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    rows = rows[1:] if rows and not _number(rows[0][-1]) else rows
    first = [row[0] for row in rows]
    named = not all(map(_number, first)) or (first == [str(i) for i in range(len(rows))] and len(rows[0]) % 2 == 1)
    return torch.tensor([[float(cell) for cell in row[named:]] for row in rows])


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _widths(model: Any) -> list[int]:
    """Widths of the layers, the last one's first."""
    return [model.embed_dim, *reversed(getattr(getattr(model, "config", None), "dims", ())[:-1])]


def _target(tensor: Tensor, n_images: int, widths: Sequence[int]) -> tuple[Tensor, list[str]]:
    """[N, T, W] or [N, h, w, W] float32 of a foreign tensor, and notes. Raises where rows or columns cannot fit."""
    x, notes = tensor.float(), []
    if n_images == 1 and (x.ndim == 1 or (x.ndim in (2, 3) and len(x) != 1)):
        x = x[None]
    if x.ndim == 2 and len(x) != n_images and x.shape[1] == n_images:
        x = x.T
        notes.append("the tensor is transposed: its columns are the images")
    if not 2 <= x.ndim <= 4 or len(x) != n_images:
        raise DinoError(
            f"a tensor {list(tensor.shape)} cannot be of {n_images} images: vectors are [{n_images}, D], patches "
            f"[{n_images}, h, w, D], [{n_images}, D, h, w] or [{n_images}, T, D]"
        )
    if x.ndim > 2 and x.shape[-1] not in widths and x.shape[1] in widths:
        x = x.movedim(1, -1)
        notes.append("channels come before the positions")
    width = x.shape[-1]
    if width not in widths and (width % widths[0] or width > MOST_PIECES * widths[0]):
        raise DinoError(f"the tensor's width is {width}, this model's {' or '.join(map(str, widths))}{_owners(width)}")
    bad = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise DinoError(
            f"row {bad[0]} of the tensor holds NaN or infinity ({len(bad)} of {len(x)} rows do): leave it out"
        )
    return (x[:, None] if x.ndim == 2 else x), notes


def _owners(width: int) -> str:
    """Which published architectures have a width, or half of it."""
    for divisor, what in ((1, "the width of"), (2, "two vectors (CLS and mean of patches?) of")):
        if names := list(dict.fromkeys(row.arch for row in ROWS if width == divisor * row.config.embed_dim)):
            return f"; {width} is {what} {' or '.join(names)}"
    return "; no published architecture has it"


# ---- the search -----------------------------------------------------------------------------------------------------


class _Search:
    """Settings compared so far, and the way through those that are left."""

    def __init__(self, model: Any, target: Tensor, images: Sequence[Any], read: Any, sizes: Sequence[int]) -> None:
        self.model, self.target, self.images, self.read = model, target, images, read
        self.found: dict[Inputs, list[list[Match]]] = {}  # of every piece, best first
        self.usual = default_preprocessing(model).with_(**PLAIN)
        width, D = target.shape[-1], model.embed_dim
        self.pieces = [(a, a + D) for a in range(0, width, D)] if width % D == 0 else [(0, width)]
        self.rows, self.photos = self._longest()
        self.prefixes = tuple(dict.fromkeys((0, 1, 1 + model.n_storage_tokens)))  # tokens that may precede the patches
        places: list[Choice] = [{"size": s, "shape": "square"} for s in sizes]
        places += [{"size": s, "shape": "short", "center_crop": s} for s in sizes]
        if target.ndim == 4:
            places.append({"size": (target.shape[1] * model.stride, target.shape[2] * model.stride)})
        elif (T := target.shape[1]) > 1:
            squares = [math.isqrt(T - k) for k in self.prefixes if T > k and math.isqrt(T - k) ** 2 == T - k]
            places += [{"size": side * model.stride, "shape": "square"} for side in squares]
        self.likely = [*LIKELY, *places, *(UNLIKELY if target.shape[1] > 1 else ())]  # few give as many tokens

    def _photo(self, i: int) -> Photo:
        try:
            return Photo.of(self.read(self.images[i]))
        except ImageError as error:
            raise ImageError(f"image {i} ({getattr(self.images[i], 'path', self.images[i])}): {error}") from None

    def _longest(self) -> tuple[list[int], list[Photo]]:
        """The images of the search: of the first eight those furthest from a square, which tell it from a crop."""
        photos = [self._photo(i) for i in range(min(8, len(self.images)))]
        away = [abs(math.log(photo.upright.shape[2] / photo.upright.shape[1])) for photo in photos]
        rows = sorted(sorted(range(len(away)), key=lambda i: -away[i])[:SEARCHED])
        return rows, [photos[i] for i in rows]

    def run(self, places: Sequence[Choice]) -> list[Match]:
        """The best match of every piece: one choice after the other, from the best so far."""
        turned = any(photo.stored is not photo.upright for photo in self.photos)
        pixels = [
            {"mean": mean, "std": std, "pixels": name}
            for name in PIXELS[: 3 if turned else 2]
            for mean, std in STATISTICS_SEEN.values()
        ]
        placed = [{**PLAIN, **place} for place in places]
        for choices in (placed, pixels, RESIZES) * ROUNDS:
            best = self._top() if self.found else Inputs(self.usual)
            for changes in choices:
                self._compare(best.with_(changes))
                if self.found and self._score(top := self._top()) >= EXACT:
                    for resize in RESIZES:  # some differ by less than what counts as exact
                        self._compare(top.with_(resize))
                    return self._best(self._top())
        if not self.found:
            shape = " × ".join(map(str, self.target.shape[1:-1]))
            raise DinoError(f"no size that was tried gives {shape} tokens an image: name the side in pixels (--size)")
        return self._best(self._top())

    def _top(self) -> Inputs:
        return max(self.found, key=self._score)

    def _best(self, inputs: Inputs) -> list[Match]:
        return [piece[0] for piece in self.found[inputs]]

    def _score(self, inputs: Inputs) -> float:
        return sum(match.cosine for match in self._best(inputs)) / len(self.pieces)

    def runners_up(self, matches: Sequence[Match], most: int = 6) -> list[Match]:
        """The nearest others of every piece, two of each setting at most."""
        chosen: list[Match] = []
        for k, match in enumerate(matches):
            every = [m for found in self.found.values() for m in [m for m in found[k] if m != match][:2]]
            chosen += sorted(every, key=lambda m: -m.cosine)[: max(1, most // len(matches))]
        return chosen

    def _compare(self, inputs: Inputs) -> None:
        """Adds the matches of one setting to `found`, if it is new, possible, and gives as many tokens."""
        if inputs in self.found:
            return
        try:
            prepared = [inputs.network_input(photo) for photo in self.photos]
        except DinoError:  # a crop larger than the image; not one whole patch
            return
        grids = [self.model.patch_grid(*x.shape[-2:]) for x, _ in prepared]
        if not hasattr(self.model, "norms") and not all(self._possible(h, w) for h, w in grids):
            return  # a ConvNeXt's stages have grids of their own
        scores: list[dict[Any, tuple[float, float]]] = []
        for i, (x, geometry) in zip(self.rows, prepared):
            scores.append({})
            for features in self._features(inputs, x, geometry):
                if not (named := dict(self._tokens(features))):
                    continue
                tokens = torch.stack([*named.values()])
                for k, (a, b) in enumerate(self.pieces):
                    part = self.target[i][..., a:b].reshape(-1, b - a)
                    if part.shape == tokens.shape[1:]:
                        for pooling, pair in zip(named, _compared(part, tokens)):
                            scores[-1][features.layer, features.normed, pooling, k] = pair
        found: list[list[Match]] = [[] for _ in self.pieces]
        unit = "stage" if hasattr(self.model, "norms") else "block"
        for layer, normed, pooling, k in (key for key in scores[0] if all(key in image for image in scores)):
            cosines, scales = zip(*(image[layer, normed, pooling, k] for image in scores))
            a, b = self.pieces[k]
            cosine = sum(cosines) / len(cosines)
            found[k].append(Match(unit, layer, normed, pooling, inputs, cosine, scales, (a, b - 1)))
        if all(found):
            self.found[inputs] = [sorted(piece, key=lambda m: -round(m.cosine, 7)) for piece in found]

    def _possible(self, h: int, w: int) -> bool:
        shape = tuple(self.target.shape[1:-1])
        return shape in ((h, w), (1,)) or (len(shape) == 1 and shape[0] - h * w in self.prefixes)

    def _features(self, inputs: Inputs, x: Tensor, geometry: Geometry) -> Iterator[Features]:
        """Of one image: every layer, the last first, after the norm and before it."""
        layers = range(self.model.n_blocks - 1, -1, -1)
        for norm in (True, False):
            batches = [(x[None], [geometry])]
            (found,) = extract_layers(self.model, batches, layers, preprocessing=inputs.preprocessing, norm=norm)
            yield from (features.to("cpu", torch.float32) for features in found if features.normed == norm)

    def _tokens(self, features: Features) -> Iterator[tuple[str, Tensor]]:
        """Named tokens [T, D] of one image, as many as the tensor has."""
        T = math.prod(self.target.shape[1:-1])
        if T == 1:
            yield from _pooled(features)
            return
        prefix = T - features.patches[0, :, :, 0].numel()
        names = {0: "patches", 1: "CLS and patches", 1 + features.registers.shape[1]: "CLS, registers and patches"}
        if prefix in names:
            before = [features.cls, features.registers[0]][: 2 if prefix > 1 else prefix]
            yield names[prefix], torch.cat([*before, features.patches[0].flatten(0, 1)])

    def other_order(self) -> list[int] | None:
        """The images that the rows seem to be of, where that is another order than theirs; None where none is seen.

        Looked for in every layer and pooling of the first settings, with the mean over images taken out: each row's nearest
        image, if that uses every image once.
        """
        n, (a, b) = len(self.images), self.pieces[0]
        if not 2 <= n <= ORDERED:
            return None
        photos = [self._photo(i) for i in range(n)]
        rows = _centred(self.target[..., a:b].reshape(n, -1, b - a).mean(1))
        best, order = 0.5, None
        for inputs in list(self.found)[:3]:
            vectors: dict[Any, list[Tensor]] = {}
            for photo in photos:
                for features in self._features(inputs, *inputs.network_input(photo)):
                    for pooling, vector in _pooled(features):
                        vectors.setdefault((features.layer, features.normed, pooling), []).append(vector)
            for candidates in (found for found in vectors.values() if found[0].shape[1] == b - a):
                similarity = rows @ _centred(torch.cat(candidates)).T
                score, nearest = similarity.amax(1).mean().item(), similarity.argmax(1)
                if score > best and len(nearest.unique()) == n:
                    best, order = score, nearest.tolist()
        return order if order != list(range(n)) else None


def _pooled(features: Features) -> Iterator[tuple[str, Tensor]]:
    """The vectors [1, D] that people make of one image's tokens, likely ones first."""
    cls, registers, patches = features.cls, features.registers[0], features.patches[0].flatten(0, 1)
    yield "CLS", cls
    yield "mean of patches", patches.mean(0, keepdim=True)
    yield "mean of all tokens", torch.cat([cls, registers, patches]).mean(0, keepdim=True)
    if len(registers):
        yield "mean of registers and patches", torch.cat([registers, patches]).mean(0, keepdim=True)
    yield "maximum of patches", patches.amax(0, keepdim=True)
    for i, register in enumerate(registers):
        yield f"register {i}", register[None]


def _compared(a: Tensor, b: Tensor) -> list[tuple[float, float]]:
    """Of [T, D] and each of [C, T, D]: the mean cosine of the rows, and the ratio of the lengths."""
    cosines = F.cosine_similarity(a.double(), b.double(), dim=-1).mean(-1)
    return list(zip(cosines.tolist(), (a.norm() / b.flatten(1).norm(dim=1).clamp_min(1e-30)).tolist()))


def _centred(x: Tensor) -> Tensor:
    """[N, D] of length 1, without what all rows share."""
    x = F.normalize(x, dim=-1)
    return F.normalize(x - x.mean(0), dim=-1)
