"""Feature extraction: the one loop from images to `Features`, and what a `Features` guarantees.

Legend: B images, R registers, D width, h×w patch grid. Patch positions are (row, column); pixel positions are (x, y) in
the ORIGINAL image, x to the right, y down, (0, 0) the top left corner.

The commonest silent mistakes with these features are a layer taken before the norm, a mixture of preprocessings, and a
patch map read with the wrong scale. So every `Features` records its layer, its norm and the preprocessing, and raises
when compared or concatenated with one that differs.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.data.images import DecodedImage, open_image, upright_rgb
from dinov3.data.transforms.inputs import Geometry, Preprocessing
from dinov3.errors import DinoError, ImageError, IncompatibleFeatures, UnknownName, choices_sentence, one_of
from dinov3.threads import prefetched
from dinov3.weights.identity import name_of

if TYPE_CHECKING:
    from PIL import Image

    ImageLike = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor


POOLINGS = ("cls", "mean", "cls+mean")
OnError = Literal["raise", "skip"]


@dataclass(frozen=True, eq=False)
class Features:
    """Features of B images.

    cls [B, D] · registers [B, R, D] · patches [B, h, w, D]. `layer` is the 0-based index of the block (ConvNeXt: stage)
    they come from, `normed` whether the final norm was applied, `preprocessing` the id of the preprocessing, `model` the
    name of the weights (`weights.identity`), `geometry` how each image became an input.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor
    layer: int
    n_layers: int
    normed: bool
    preprocessing: str
    model: str
    geometry: tuple[Geometry, ...]
    missing: Mapping[int, ImageError] = field(default_factory=dict)  # position in `embed`'s list → why it has no row

    def __len__(self) -> int:
        return len(self.cls)

    def __repr__(self) -> str:
        (h, w), (B, D) = self.grid_hw, self.cls.shape
        norm = "normed" if self.normed else "before the norm"
        where = f"layer {self.layer} of {self.n_layers}, {norm}"
        return f"Features({B} images, grid {h}×{w}, width {D}, {where}, {self.preprocessing}, {self.model})"

    def __getitem__(self, index: Any) -> Features:
        """The features of some of the images: an integer (the batch dimension stays), a slice, integers, or a mask [B].

        A slice without steps keeps the `missing` images between its rows, and before its first row; the others have none.
        """
        B, missing = len(self), {}
        if isinstance(index, slice):
            rows = list(range(B)[index])
            if rows and index.step in (None, 1):
                missing = self._missing_among(rows[0], rows[-1])
        else:
            chosen = torch.as_tensor(index)
            if chosen.dtype == torch.bool:
                if chosen.shape != (B,):
                    raise IndexError(f"a mask of {B} images has {B} entries, not {list(chosen.shape)}")
                chosen = chosen.nonzero()
            rows = [range(B)[int(i)] for i in chosen.flatten().tolist()]
        return self._changed(lambda x: x[rows], geometry=tuple(self.geometry[i] for i in rows), missing=missing)

    def _changed(self, change: Callable[[Tensor], Tensor], **others: Any) -> Features:
        """The same with each of the three tensors through a function."""
        tensors: dict[str, Any] = {name: change(getattr(self, name)) for name in ("cls", "registers", "patches")}
        return replace(self, **tensors, **others)

    def _missing_among(self, first: int, last: int) -> dict[int, ImageError]:
        """The images without a row that belong to rows first … last: those before each of them, after the very last row too.

        Positions count from the first image that belongs to them.
        """
        total = len(self) + len(self.missing)
        places = [position for position in range(total) if position not in self.missing]  # of the rows
        start = places[first - 1] + 1 if first else 0
        stop = places[last] + 1 if last < len(self) - 1 else total
        return {position - start: error for position, error in self.missing.items() if start <= position < stop}

    @property
    def grid_hw(self) -> tuple[int, int]:
        return (self.patches.shape[1], self.patches.shape[2])

    @property
    def pooled(self) -> Tensor:
        """The normed CLS token of the last layer [B, D]; transformers calls it `pooler_output`."""
        if self.layer != self.n_layers - 1 or not self.normed:
            raise IncompatibleFeatures(
                f"pooled is the normed output of the last layer ({self.n_layers - 1}); these features are of layer "
                f"{self.layer}, {'normed' if self.normed else 'before the norm'}. Use .cls for those"
            )
        return self.cls

    @property
    def mean(self) -> Tensor:
        """Mean of the patches [B, D]."""
        return self.patches.mean((1, 2))

    def to(self, *args: Any, **kwargs: Any) -> Features:
        """As `Tensor.to`, for all three tensors."""
        return self._changed(lambda x: x.to(*args, **kwargs))

    # ---- patches and pixels --------------------------------------------------------------------------------------

    def _patch_size(self, image: int) -> tuple[Geometry, float, float]:
        geometry, (h, w) = self.geometry[image], self.grid_hw
        return geometry, geometry.input_hw[1] / w, geometry.input_hw[0] / h

    def pixel_of_patch(self, row: float, col: float, image: int = 0) -> tuple[float, float]:
        """(x, y) of the patch's centre in the original image."""
        geometry, pw, ph = self._patch_size(image)
        return geometry.to_original((col + 0.5) * pw, (row + 0.5) * ph)

    def box_of_patch(self, row: int, col: int, image: int = 0) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of the patch in the original image; beyond the image where the patch is padding."""
        geometry, pw, ph = self._patch_size(image)
        return (*geometry.to_original(col * pw, row * ph), *geometry.to_original((col + 1) * pw, (row + 1) * ph))

    def patch_of_pixel(self, x: float, y: float, image: int = 0) -> tuple[int, int]:
        """(row, column) of the patch that sees a pixel of the original image.

        Raises `DinoError` outside the image, and where the pixel was cropped away.
        """
        geometry, pw, ph = self._patch_size(image)
        if not (0 <= x < geometry.width and 0 <= y < geometry.height):
            raise DinoError(f"pixel ({x}, {y}) is outside the image, which is {geometry.width}×{geometry.height}")
        u, v = geometry.to_input(x, y)
        row, col = int(v // ph), int(u // pw)
        (h, w) = self.grid_hw
        if not (u >= 0 and v >= 0 and row < h and col < w):
            raise DinoError(f"pixel ({x}, {y}) was cropped away ({geometry}); use fit='resize' or 'pad'")
        return row, col

    # ---- joining and comparing -----------------------------------------------------------------------------------

    def check_comparable(self, other: Features, *, ignore: Iterable[str] = ()) -> None:
        """Raises `IncompatibleFeatures` where model, layer, norm or preprocessing differ."""
        for name in ("model", "layer", "normed", "preprocessing"):
            first, second = getattr(self, name), getattr(other, name)
            if first != second and name not in ignore:
                raise IncompatibleFeatures(
                    f"these features differ in {name}: {first!r} and {second!r}. Extract both the same way, or pass "
                    f"ignore=[{name!r}] if you mean it"
                )

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        """The concatenation of batches, which must agree in model, layer, norm, preprocessing and grid.

        `missing` is that of the lists of images one after the other.
        """
        if not parts:
            raise DinoError("nothing to concatenate: the list of features is empty")
        for other in parts[1:]:
            parts[0].check_comparable(other)
            if parts[0].grid_hw != other.grid_hw:
                raise IncompatibleFeatures(
                    f"patch grids {parts[0].grid_hw} and {other.grid_hw} differ: give the images one size "
                    "(shape='square'), or keep the features apart"
                )
        starts = itertools.accumulate((len(p) + len(p.missing) for p in parts), initial=0)
        return replace(
            parts[0],
            cls=torch.cat([p.cls for p in parts]),
            registers=torch.cat([p.registers for p in parts]),
            patches=torch.cat([p.patches for p in parts]),
            geometry=tuple(g for p in parts for g in p.geometry),
            missing={start + i: error for start, p in zip(starts, parts) for i, error in p.missing.items()},
        )

    def similarity(self, other: Features, *, ignore: Iterable[str] = ()) -> Tensor:
        """Cosine similarities of the CLS tokens [B, B']."""
        self.check_comparable(other, ignore=ignore)
        return F.normalize(self.cls.float(), dim=-1) @ F.normalize(other.cls.float(), dim=-1).T

    def patch_similarity(self, row: int, col: int, other: Features | None = None, *, image: int = 0) -> Tensor:
        """Cosine similarity of one patch to every patch of `other` (default: these) [B', h', w']."""
        other = other if other is not None else self
        self.check_comparable(other)
        query = F.normalize(self.patches[image, row, col].float(), dim=-1)
        return F.normalize(other.patches.float(), dim=-1) @ query


# ---- images in ----------------------------------------------------------------------------------------------------


def default_preprocessing(model: nn.Module, **changes: Any) -> Preprocessing:
    """The reference's preprocessing, with the mean and standard deviation that the weights were trained with."""
    backbone: Any = model
    origin = getattr(model, "origin", None)
    statistics = {"mean": origin.mean, "std": origin.std} if origin is not None else {}
    return Preprocessing(multiple=backbone.stride, **statistics).with_(**changes)


def check_patches(key: str, side: int, patch: int) -> None:
    """Raises for a side in pixels that is no multiple of the patch: the model would not see its last pixels."""
    if side % patch:
        near = max(1, round(side / patch)) * patch
        raise DinoError(f"{key}={side} is no multiple of the patch ({patch}); try {near}")


def _images(images: Any) -> Iterator[Any]:
    """Iterates over the images of an argument: a single image, a list of images, or a tensor [B, 3, h, w]."""
    if isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4:
        yield from images
    elif isinstance(images, (str, bytes, os.PathLike, Tensor, np.ndarray)) or not isinstance(images, Iterable):
        yield images
    else:
        yield from images


def prepare(image: Any, preprocessing: Preprocessing) -> tuple[Tensor, Geometry]:
    """Any image (path, bytes, PIL, array, tensor) to a network input [3, h, w] and its geometry."""
    try:
        return _prepare(image, preprocessing)
    except MemoryError:
        raise ImageError("not enough memory to prepare this image") from None
    except RuntimeError as error:  # torch's allocator
        if "allocate memory" not in str(error):
            raise
        raise ImageError("not enough memory to prepare this image") from None


def _prepare(image: Any, preprocessing: Preprocessing) -> tuple[Tensor, Geometry]:
    if isinstance(image, (str, bytes, os.PathLike)):
        image = open_image(image, target_short_side=preprocessing.target_short_side)
    elif hasattr(image, "getexif"):  # PIL
        image = upright_rgb(image)
    if isinstance(image, DecodedImage):
        return preprocessing(image.image, original_wh=(image.width, image.height))
    return preprocessing(image)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients: in training mode positions are drawn at random and outputs differ."""
    was = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was)


def layer_numbers(model: Any, layers: Iterable[int]) -> list[int]:
    """0-based indices of layers in the order given; negative ones count from the end. Raises for one that does not exist."""
    n = model.n_blocks
    for i in layers:
        if not -n <= i < n:
            raise DinoError(f"layer {i} does not exist: this model has {n} (0 to {n - 1}, or -1 for the last)")
    return [range(n)[i] for i in layers]


def _check_channels(model: Any, x: Tensor) -> None:
    channels = getattr(getattr(model, "config", None), "in_chans", x.shape[1])
    if x.shape[1] != channels:
        raise DinoError(
            f"this model takes {channels} channels, not {x.shape[1]}: images are opened as RGB; other bands go straight to "
            "its forward_features as a tensor"
        )


def run(model: Any, x: Tensor, *, layer: int = -1, norm: bool = True) -> dict[str, Any]:
    """One batch [B, 3, height, width] through the model: cls, registers, patches, layer, n_layers, normed."""
    return run_layers(model, x, [layer], norm=norm)[0]


def run_layers(model: Any, x: Tensor, layers: Sequence[int], *, norm: bool = True) -> list[dict[str, Any]]:
    """The outputs of several layers (ascending) from one forward pass, each as `run` gives it."""
    last, numbers = model.n_blocks - 1, layer_numbers(model, layers)
    _check_channels(model, x)
    h, w = model.patch_grid(x.shape[-2], x.shape[-1])
    outputs: list[tuple[Tensor, ...]]  # cls, registers, patches of every layer
    if numbers == [last] and norm:
        out = model.forward_features(x)
        patches = out["x_norm_patchtokens"].unflatten(1, (h, w))
        outputs = [(out["x_norm_clstoken"], out["x_storage_tokens"], patches)]
    else:
        options: dict[str, Any] = {"n": numbers, "reshape": True, "return_class_token": True, "norm": norm}
        if model.n_storage_tokens > 0:
            options["return_extra_tokens"] = True
        outputs = [
            (cls, extra[0] if extra else cls[:, None][:, 1:], patches.permute(0, 2, 3, 1))
            for patches, cls, *extra in model.get_intermediate_layers(x, **options)
        ]
    return [
        {
            "cls": cls,
            "registers": registers,
            "patches": patches,
            "layer": i,
            "n_layers": model.n_blocks,
            # a ConvNeXt has a norm on its last stage only
            "normed": norm and (not hasattr(model, "norms") or i == last),
        }
        for i, (cls, registers, patches) in zip(numbers, outputs, strict=True)
    ]


def outputs(
    model: nn.Module, batches: Iterable[Tensor], layers: Sequence[int] = (-1,), *, norm: bool = True
) -> Iterator[list[dict[str, Any]]]:
    """The loop: network inputs [B, 3, height, width] in; for each batch the outputs of the layers (`run_layers`).

    Runs on the model's device and in its dtype, in evaluation mode and without gradients; there is no hidden autocast.
    The model's mode is restored after every batch.
    """
    weight = next(model.parameters())
    for x in batches:
        with evaluating(model):
            found = run_layers(model, x.to(weight.device, weight.dtype, non_blocking=True), layers, norm=norm)
        yield found


def extract(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Sequence[Geometry]]],
    *,
    preprocessing: Preprocessing,
    layer: int = -1,
    norm: bool = True,
) -> Iterator[Features]:
    """`Features` of normalised batches [B, 3, height, width] with their geometries (`batched`), batch by batch."""
    for (features,) in extract_layers(model, batches, [layer], preprocessing=preprocessing, norm=norm):
        yield features


def extract_layers(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Sequence[Geometry]]],
    layers: Sequence[int],
    *,
    preprocessing: Preprocessing,
    norm: bool = True,
) -> Iterator[list[Features]]:
    """As `extract`, the `Features` of several layers from one forward pass, in the order given."""
    numbers = layer_numbers(model, layers)
    ascending = sorted(set(numbers))
    about: dict[str, Any] = {"preprocessing": preprocessing.id, "model": name_of(model)}
    for x, geometry in batches:
        (found,) = outputs(model, [x], ascending, norm=norm)
        yield [Features(geometry=tuple(geometry), **about, **found[ascending.index(i)]) for i in numbers]


def batched(
    images: Iterable[Any],
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    workers: int = 0,
    read: Callable[[Any], Any] | None = None,
) -> Iterator[tuple[Tensor, list[Geometry]]]:
    """Network inputs in batches of at most `batch_size` images of one size, in order, with their geometries.

    `read` makes an image of each item, such as an index. `workers` threads read, decode and transform the images of the
    next two batches while the consumer works; 0: the consumer's own thread does it when a batch is needed.
    """

    def make(item: Any) -> tuple[Tensor, Geometry]:
        return prepare(item if read is None else read(item), preprocessing)

    yield from _stacked(prefetched(make, images, workers, 2 * batch_size), batch_size)


def _stacked(pairs: Iterable[tuple[Tensor, Geometry]], batch_size: int) -> Iterator[tuple[Tensor, list[Geometry]]]:
    """Batches of at most `batch_size` inputs of one size, in order."""
    inputs: list[Tensor] = []
    geometry: list[Geometry] = []
    for x, g in pairs:
        if inputs and inputs[0].shape != x.shape:
            yield torch.stack(inputs), geometry
            inputs, geometry = [], []
        inputs.append(x)
        geometry.append(g)
        if len(inputs) == batch_size:
            yield torch.stack(inputs), geometry
            inputs, geometry = [], []
    if inputs:
        yield torch.stack(inputs), geometry


def auto_workers(model: nn.Module) -> int:
    return decoding_threads(next(model.parameters()).device)


def decoding_threads(device: torch.device) -> int:
    """Decoding threads: every core where the model has a device of its own; beside a model on the CPU half of them,
    since decoding is the smaller part and a thread too many makes the model's own threads wait for each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2) if device.type == "cpu" else cores


class _Given:
    """The images of an argument as batches: decoded by threads, failures named and raised or collected, progress shown."""

    def __init__(
        self, images: Any, preprocessing: Preprocessing, workers: int | None, on_error: str, progress: bool
    ) -> None:
        one_of("on_error", on_error, ("raise", "skip"))
        self.images, self.preprocessing, self.on_error, self.progress = images, preprocessing, on_error, progress
        self.workers = workers
        self.total: int | None = len(images) if isinstance(images, (list, tuple)) else None
        self.missing: dict[int, ImageError] = {}

    def make(self, numbered: tuple[int, Any]) -> tuple[Tensor, Geometry] | ImageError:
        index, image = numbered
        path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
        try:
            return prepare(image, self.preprocessing)
        except ImageError as error:
            named = ImageError(f"{path if path is not None else f'image {index}'}: {error}")
            named.path, named.index = path, index
            return named

    def batches(self, model: nn.Module, batch_size: int) -> Iterator[tuple[Tensor, list[Geometry]]]:
        workers = self.workers
        if workers is None:
            workers = 0 if self.total in (None, 1) else auto_workers(model)
        one_thread = partial(torch.set_num_threads, 1)  # a resize must not start a pool of threads inside each thread
        made = prefetched(self.make, enumerate(_images(self.images)), workers, 2 * batch_size, initializer=one_thread)
        yield from _stacked(self._readable(made), batch_size)

    def _readable(self, made: Iterable[tuple[Tensor, Geometry] | ImageError]) -> Iterator[tuple[Tensor, Geometry]]:
        start = last = time.perf_counter()
        for done, result in enumerate(made):
            if not isinstance(result, ImageError):
                yield result
            elif self.on_error == "raise":
                raise result
            else:
                self.missing[done] = result
            now = time.perf_counter()
            if self.progress and now - last > 2:
                last = now
                total = f" of {self.total}" if self.total is not None else ""
                print(
                    f"{done + 1}{total} images, {(done + 1) / (now - start):.1f} a second", file=sys.stderr, flush=True
                )


@overload
def embed(
    model: nn.Module, images: Any, *, preprocessing: Preprocessing | None = None, layer: int = -1, norm: bool = True,
    batch_size: int = 16, workers: int | None = None, on_error: OnError = "raise", progress: bool = False, **changes: Any,
) -> Features: ...  # fmt: skip


@overload
def embed(
    model: nn.Module, images: Any, *, preprocessing: Preprocessing | None = None, layer: Sequence[int],
    norm: bool = True, batch_size: int = 16, workers: int | None = None, on_error: OnError = "raise",
    progress: bool = False, **changes: Any,
) -> list[Features]: ...  # fmt: skip


def embed(
    model: nn.Module,
    images: Any,
    *,
    preprocessing: Preprocessing | None = None,
    layer: int | Sequence[int] = -1,
    norm: bool = True,
    batch_size: int = 16,
    workers: int | None = None,
    on_error: OnError = "raise",
    progress: bool = False,
    **changes: Any,
) -> Features | list[Features]:
    """Images to `Features`; to a list of `Features` where `layer` is a list. With on_error="skip" an unreadable image has no
    row (`encode`: a row of NaN).

    `images`: a path, PIL image, array [h, w, 3], tensor [3, h, w] (uint8, or floats in [0, 1]), or a list of those, or
    a tensor [B, 3, h, w]. `preprocessing`: default 256 × 256, nothing cropped, with the statistics
    of the model's weights; single fields can be given by name: `embed(model, x, size=512, shape="short", fit="pad")`,
    `size=(height, width)`.
    `layer`: 0-based block (ConvNeXt: stage), -1 the last; `norm`: apply the final norm. `workers` threads decode (default:
    by the number of cores; one image needs none). `progress`: a line on stderr every two seconds.

    An image that cannot be decoded raises `ImageError`, which names the file (attributes `path`, `index`); with
    on_error="skip" it has no row in the result, and `features.missing` says which and why. Images that come out at
    different grids raise `IncompatibleFeatures` (possible with shape="short", "long" or "native": one call per image).
    """
    preprocessing = preprocessing.with_(**changes) if preprocessing else default_preprocessing(model, **changes)
    given = _Given(images, preprocessing, workers, on_error, progress)
    batches = given.batches(model, batch_size)
    layers = [layer] if isinstance(layer, int) else layer
    parts = list(extract_layers(model, batches, layers, preprocessing=preprocessing, norm=norm))
    if not parts:
        raise next(iter(given.missing.values()), DinoError("no images were given"))
    found = [replace(Features.cat(of_one_layer), missing=given.missing) for of_one_layer in zip(*parts)]
    return found[0] if isinstance(layer, int) else found


def pool(features: Features, pooling: str) -> Tensor:
    """One vector an image [B, D], or [B, 2D] for "cls+mean"."""
    if pooling == "cls":
        return features.cls
    if pooling == "mean":
        return features.mean
    if pooling == "cls+mean":
        return torch.cat([features.cls, features.mean], dim=-1)
    raise UnknownName(f"pooling {choices_sentence(pooling, POOLINGS)}")


def vectors_of(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Sequence[Geometry]]],
    *,
    preprocessing: Preprocessing,
    pooling: str,
    layer: int = -1,
) -> Iterator[Tensor]:
    """One vector an image, float32 [B, D] ([B, 2D] for "cls+mean"), batch by batch: `pool` of what `extract` gives.

    A fast form that has nothing but the CLS token to give leaves the other tokens of its last block out.
    """
    only_cls = pooling == "cls" and layer_numbers(model, [layer]) == layer_numbers(model, [-1])
    alone = getattr(model, "class_tokens", None) if only_cls else None
    if alone is None:
        for features in extract(model, batches, preprocessing=preprocessing, layer=layer):
            yield pool(features, pooling).float()
        return
    weight = next(model.parameters())
    for x, _geometry in batches:
        _check_channels(model, x)
        with evaluating(model):
            found = alone(x.to(weight.device, weight.dtype, non_blocking=True))
        yield found


def encode(
    model: nn.Module,
    images: Any,
    *,
    pooling: str = "cls",
    normalize: bool = False,
    convert_to: Literal["numpy", "tensor"] = "numpy",
    preprocessing: Preprocessing | None = None,
    layer: int = -1,
    batch_size: int = 16,
    workers: int | None = None,
    on_error: OnError = "raise",
    progress: bool = False,
    **changes: Any,
) -> np.ndarray | Tensor:
    """One vector an image, float32 [N, D] ([N, 2D] for pooling="cls+mean"), as sentence-transformers' `encode`. With
    on_error="skip" the row of an unreadable image is NaN, so that rows stay those of the list (`embed`: no row).

    `images` and the options are those of `embed`, but one `layer`, with the final norm; images may come out at different
    grids. `normalize`: vectors of length 1. convert_to="tensor": on the model's device. A single image gives [1, D].
    """
    if not isinstance(layer, int):
        raise DinoError(f"encode takes one layer, not {layer!r}: embed takes a list, and features.cls are its vectors")
    one_of("pooling", pooling, POOLINGS)
    one_of("convert_to", convert_to, ("numpy", "tensor"))
    preprocessing = preprocessing.with_(**changes) if preprocessing else default_preprocessing(model, **changes)
    given = _Given(images, preprocessing, workers, on_error, progress)
    batches = given.batches(model, batch_size)
    parts = list(vectors_of(model, batches, preprocessing=preprocessing, pooling=pooling, layer=layer))
    if not parts:
        raise next(iter(given.missing.values()), DinoError("no images were given"))
    vectors = torch.cat(parts)
    if normalize:
        vectors = F.normalize(vectors, dim=-1)
    if given.missing:
        rows = vectors.new_full((len(vectors) + len(given.missing), vectors.shape[1]), torch.nan)
        rows[[i for i in range(len(rows)) if i not in given.missing]] = vectors
        vectors = rows
    return vectors if convert_to == "tensor" else vectors.cpu().numpy()
