"""From a decoded image to a model's input: operations on pixels, and `Preprocessing`, which puts them in order."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.errors import DinoError, ImageError, UnknownName, one_of, only_known

# ---- operations on pixels --------------------------------------------------------------------------------------------
# Operations on the pixels of RGB images, from decoded image to normalised input: written once, used by every transform.
#
# Values are 8-bit levels until they are normalised, and each operation rounds as torchvision and Pillow do on 8-bit images.
# Legend: [3, h, w] planes; `Pixels` uint8, `Planes` float32 with whole numbers from 0 to 255.


if TYPE_CHECKING:
    from PIL import Image

Pixels = np.ndarray
Planes = np.ndarray

BLUR_RADIUS = 4
GREY = np.array([0.299, 0.587, 0.114], np.float32)
SIGN = np.uint32(1 << 31)


# ---- in ------------------------------------------------------------------------------------------------------------


def to_pixels(image: Image.Image | np.ndarray | Tensor) -> Tensor:
    """[3, h, w], uint8 or float32 in [0, 1], from the forms a decoded RGB image comes in."""
    if isinstance(image, Tensor):
        x = image
    elif isinstance(image, np.ndarray):
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=-1)
        if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[-1] not in (1, 3):
            return to_pixels(torch.from_numpy(np.array(image)))  # [3, height, width]
        if image.ndim != 3 or image.shape[-1] not in (1, 3):
            raise DinoError(
                f"an array image is [height, width, 3], [3, height, width] or [height, width], not {list(image.shape)}"
            )
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a copy: PIL's arrays are read-only
    else:
        x = torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        raise DinoError(f"an image tensor is [3, height, width]; this one is {list(x.shape)}")
    if x.shape[0] == 1:
        x = x.expand(3, -1, -1)
    if x.dtype == torch.uint8:
        return x
    if x.dtype in (torch.uint16, torch.int32, torch.int64, torch.int16):
        raise DinoError(f"an image of {x.dtype} values has no agreed scale; give uint8, or floats in [0, 1]")
    x = x.float()
    low, high = (x.min().item(), x.max().item()) if x.numel() else (0.0, 0.0)
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise DinoError(
            f"float images have values in [0, 1]; this one has [{low:.3g}, {high:.3g}]. If it is already normalised, "
            "call the model itself; if it is 0 to 255, convert it to uint8"
        )
    return x


def to_bytes(image: Image.Image | np.ndarray | Tensor) -> Tensor:
    """uint8 [3, h, w], from the same forms."""
    x = to_pixels(image)
    return x if x.dtype == torch.uint8 else (x * 255).round().to(torch.uint8)


# ---- size ----------------------------------------------------------------------------------------------------------


def resized(x: Tensor, size_hw: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """[3, h, w] or [B, 3, h, w] at another size, "bilinear" or "bicubic", antialiased; bytes in integers."""
    if tuple(x.shape[-2:]) == tuple(size_hw):
        return x
    # channels_last is an order of magnitude faster for uint8, and equal to Pillow within one grey level
    batch = (x if x.ndim == 4 else x[None]).contiguous(memory_format=torch.channels_last)
    y = F.interpolate(batch, size=size_hw, mode=mode, antialias=True)
    return y if x.ndim == 4 else y[0]


def cropped(x: Tensor, box: tuple[int, int, int, int], side: int) -> Tensor:
    """The box (top, left, height, width) of an image [3, h, w] at [3, side, side], bicubic."""
    top, left, height, width = box
    return resized(x[:, top : top + height, left : left + width], (side, side), "bicubic")


# ---- values --------------------------------------------------------------------------------------------------------


def normalised(x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [n, 3, h, w] → (x / 255 − mean) / std: one multiplication and addition in float32, for batches on a device."""
    shift, scale = _shift_and_scale(tuple(mean), tuple(std), x.device)
    return torch.addcmul(shift, x.float(), scale).to(dtype)


@lru_cache(maxsize=16)  # making them copies from the host, which waits for the device
def _shift_and_scale(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # whoever comes first
        scale = torch.tensor([1 / (255 * s) for s in std], device=device)[:, None, None]
        shift = torch.tensor([-m / s for m, s in zip(mean, std)], device=device)[:, None, None]
    return shift, scale


def standardised(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[…, 3, h, w] → (x − mean) / std in float32; mean and std on the scale of x."""
    shift, scale = (torch.tensor(values, device=x.device)[:, None, None] for values in (mean, std))
    return (x.float() - shift) / scale


# ---- colours -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Colours:
    """Factors of 1 and a turn of 0 change nothing. `order` lists the operations done, in their order; empty: none."""

    order: tuple[str, ...] = ()
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0  # in turns of the colour circle
    grey: bool = False


def coloured(x: Planes, colours: Colours) -> Planes:
    """Colour operations, in place, with the rounding of 8-bit images after each: what an operation clips stays lost."""
    for name in colours.order:
        if name == "brightness":
            x *= np.float32(colours.brightness)
            _as_bytes(x, colours.brightness)
        elif name == "contrast":
            middle = math.floor(float(torch.from_numpy(x).mean((1, 2)).numpy() @ GREY) + 0.5)
            x *= np.float32(colours.contrast)
            x += np.float32(middle * (1 - colours.contrast))
            _as_bytes(x, colours.contrast)
        elif name == "saturation":
            away = grey(x)
            away *= np.float32(1 - colours.saturation)
            x *= np.float32(colours.saturation)
            x += away
            _as_bytes(x, colours.saturation)
        else:
            assert name == "hue", name
            _turn_hue(x, colours.hue)
    if colours.grey:
        x[:] = grey(x)
    return x


def _as_bytes(x: Planes, factor: float) -> None:
    """Rounds down and clips to 0 … 255. With a factor up to 1 each value lies between two that were in the range."""
    if factor > 1:
        torch.from_numpy(x).clamp_(0, 255)  # a third of np.clip's time
    np.floor(x, out=x)


def grey(x: Planes) -> np.ndarray:
    """[3, h, w] → [h, w], rounded as Pillow does; valid until the next call."""
    y, part = scratch("grey", x.shape[1:]), scratch("part", x.shape[1:])
    np.multiply(x[0], GREY[0], out=y)
    y += np.multiply(x[1], GREY[1], out=part)
    y += np.multiply(x[2], GREY[2], out=part)
    y += np.float32(0.5)
    return np.floor(y, out=y)


def _turn_hue(x: Planes, turn: float) -> None:
    """Turns the hue of HSV by `turn` (at most a sixth), in place, value and saturation unchanged; exact, rounded once.

    With C = max − min, let the hue be an angle h from red over green to blue, in sixths of a turn: 0 … 6. Then
    C·(3 − |h − 3|) = g + b − r − min + C in all six sectors, and h < 3 where g > b: no division, no case distinction.
    The way back is linear in pieces too: red is |h − 3| − 1, green 2 − |h − 2|, blue 2 − |h − 4|, clipped to 0 … 1, times C,
    plus min. A turn forwards leaves this range at its upper end only, where green begins again, h − 6; for a turn
    backwards, green and blue change places. Everything below is multiplied by C, and w = h − 3.
    """
    assert abs(turn) <= 1 / 6, turn
    r, g, b = x if turn >= 0 else (x[0], x[2], x[1])
    high, low, chroma, twice, w, t = (scratch(name, r.shape) for name in ("high", "low", "chroma", "twice", "w", "t"))
    np.maximum(np.maximum(g, b, out=high), r, out=high)
    np.minimum(np.minimum(g, b, out=low), r, out=low)
    np.subtract(high, low, out=chroma)
    np.add(chroma, chroma, out=twice)
    np.add(g, b, out=w)
    w -= r
    w -= low
    np.subtract(twice, w, out=w)  # 2C − (g + b − r − min) = |h − 3|
    np.subtract(b, g, out=t)
    sign, bits = t.view(np.uint32), w.view(np.uint32)  # np.copysign takes three times as long
    sign &= SIGN
    bits |= sign
    w += np.multiply(chroma, np.float32(6 * abs(turn)), out=t)  # h − 3, turned

    np.abs(w, out=r)
    r -= chroma
    np.add(w, chroma, out=t)
    np.abs(t, out=t)
    np.subtract(twice, t, out=g)
    np.subtract(w, chroma, out=t)
    np.abs(t, out=b)
    np.subtract(twice, b, out=b)
    t -= twice
    np.maximum(g, t, out=g)  # green beyond a full turn: h − 6
    x += low
    np.maximum(x, low, out=x)
    np.minimum(x, high, out=x)
    np.rint(x, out=x)


def blur_kernel(sigma: float) -> np.ndarray:
    """Weights at distances 0 … radius, for a Gaussian of 2·4 + 1 taps that sum to one."""
    taps = np.exp(-0.5 * (np.arange(BLUR_RADIUS + 1) / sigma) ** 2)
    return taps / (taps[0] + 2 * taps[1:].sum())


def blurred(x: Planes, sigma: float) -> Planes:
    """Gaussian blur with 9 × 9 taps, in place, the border reflected; first down the columns, then along the rows.

    The padded planes are one long row of numbers: a step down is a shift by the width, a step aside a shift by one, and
    what runs over an edge only reaches padding. That costs three quarters of the same on 2-D views.
    """
    weights = [np.float32(w) for w in blur_kernel(sigma) if w > 1e-4]  # weaker ones move no value by a tenth of a level
    r = len(weights) - 1
    if r == 0:
        return x
    planes, h, w = x.shape
    shape = (planes, h + 2 * r, w + 2 * r)
    padded = scratch("padded", shape)
    padded[:, r : r + h, r : r + w] = x
    padded[:, :r] = padded[:, 2 * r : r : -1]
    padded[:, r + h :] = padded[:, r + h - 2 : h - 2 : -1]
    padded[:, :, :r] = padded[:, :, 2 * r : r : -1]
    padded[:, :, r + w :] = padded[:, :, r + w - 2 : w - 2 : -1]

    half, pair = scratch("half blurred", shape).reshape(-1), scratch("pair", shape).reshape(-1)
    flat = padded.reshape(-1)
    for source, out, step in ((flat, half, shape[2]), (half, flat, 1)):
        first, n = r * step, flat.size - 2 * r * step
        done, both = out[first : first + n], pair[:n]
        np.multiply(source[first : first + n], weights[0], out=done)
        for k in range(1, r + 1):
            before, after = first - k * step, first + k * step
            np.add(source[before : before + n], source[after : after + n], out=both)
            both *= weights[k]
            done += both
    return np.rint(padded[:, r : r + h, r : r + w], out=x)


_local = threading.local()


def scratch(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array of this thread to write into; fresh ones cost page faults, a fifth of the whole time."""
    arrays: dict[Any, np.ndarray] = _local.__dict__.setdefault("arrays", {})
    if (name, shape) not in arrays:
        if len(arrays) > 200:  # many sizes
            arrays.clear()
        arrays[name, shape] = np.zeros(shape, np.float32)
    return arrays[name, shape]


# ---- Preprocessing and Geometry --------------------------------------------------------------------------------------
# From a decoded image to a network input, with nothing lost by accident and everything written down.
#
# `Preprocessing` describes how (a value with a short id), `Geometry` is the result for one image: enough to go from
# a patch to the original image's pixels and back. Frames: x to the right, y down, in pixels; (0, 0) is the top left
# corner of the top left pixel, so the centre of that pixel is (0.5, 0.5).
#
# Sources of the named ones: the reference's example (resize to a square on uint8, bilinear, antialias), transformers'
# processor (divides by 255 first, then resizes), the reference's classification evaluation (short side to 256, bicubic,
# centre crop 224).


if TYPE_CHECKING:
    from PIL import Image

SHAPES = ("square", "short", "long", "native")
FITS = ("resize", "pad", "crop")
INTERPOLATIONS = ("bilinear", "bicubic")
# Fields that came after the first stores: left out of the JSON at their defaults, so that ids stay.
LATER = ("size_hw", "rounding")
# What other libraries call things, and where they are here.
ELSEWHERE = {
    "image_size": "write size=",
    "img_size": "write size=",
    "resolution": "write size=",
    "device": "load(…, device=…) or model.to(…) says where the model runs",
    "dtype": "load(…, dtype=…) says in which precision",
    "pooling": "Features has .cls, .mean (of the patches) and .patches",
    "normalize": "torch.nn.functional.normalize(features.cls, dim=-1); .similarity does it itself",
    "layers": "write layer=[3, 11]",
    "norm": "encode's vectors are normed; embed(…, norm=False) gives features before the norm",
}
LVD_MEAN, LVD_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGEST_ENLARGED = 1 << 24  # pixels: a strip of 20000 × 3 at a short side of 256 would have 437 million


@dataclass(frozen=True)
class Geometry:
    """What happened to one image: input pixel = original pixel × scale − offset."""

    width: int  # of the original image, upright
    height: int
    scale_x: float
    scale_y: float
    offset_x: float  # input pixels cut off at the left, top
    offset_y: float
    input_hw: tuple[int, int]  # of the network input, padding included
    valid_hw: tuple[int, int]  # of the part that shows the image (top left corner of the input)
    lost: bool  # whether pixels of the original fall outside the input

    def to_original(self, x: float, y: float) -> tuple[float, float]:
        """Network input pixels to the original image's pixels."""
        return (x + self.offset_x) / self.scale_x, (y + self.offset_y) / self.scale_y

    def to_input(self, x: float, y: float) -> tuple[float, float]:
        """The original image's pixels to network input pixels."""
        return x * self.scale_x - self.offset_x, y * self.scale_y - self.offset_y

    def __str__(self) -> str:
        h, w = self.input_hw
        shown = f"{round(self.width * self.scale_x)}×{round(self.height * self.scale_y)}"
        text = f"{self.width}×{self.height} resized to {shown}"
        if self.valid_hw != self.input_hw:
            text += f", padded to {w}×{h}"
        return text + (f", cropped to {w}×{h}" if self.lost else "")


@dataclass(frozen=True)
class Preprocessing:
    """How images become inputs.

    shape: "square" (both sides `size`, the aspect changes), "short" / "long" (that side becomes `size`, the aspect
    stays), "native" (the image's own size; `size` is ignored).
    fit: what happens when a side is no multiple of `multiple` (the patch): "resize" to the nearest multiple, "pad"
    at the right and bottom with the mean colour, "crop" the right and bottom (what the bare model does).
    center_crop: a square cut from the middle after resizing; loses pixels, off by default.
    order: "uint8" resizes 8-bit values and rounds, "float" divides by 255 first. They differ by up to half a grey level.
    """

    size: int = 256
    shape: str = "square"
    fit: str = "resize"
    multiple: int = 16
    interpolation: str = "bilinear"
    order: str = "uint8"
    center_crop: int | None = None
    mean: tuple[float, float, float] = LVD_MEAN
    std: tuple[float, float, float] = LVD_STD
    size_hw: tuple[int, int] | None = None  # instead of size and shape: (height, width) of every input
    # of the other side with shape "short" or "long"; "down" is torchvision's and the reference's
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        choices = (
            ("shape", SHAPES),
            ("fit", FITS),
            ("interpolation", INTERPOLATIONS),
            ("order", ("uint8", "float")),
            ("rounding", ("nearest", "down")),
        )
        for name, known in choices:
            one_of(name, getattr(self, name), known)
        if self.shape != "native" and (not isinstance(self.size, Integral) or self.size < 1):
            raise DinoError(f"size must be a positive number of pixels, not {self.size!r}")

    @classmethod
    def named(cls, name: str, **changes: Any) -> Preprocessing:
        """A published preprocessing by name ("reference", "transformers", "classification"), with changes on top."""
        known: dict[str, dict[str, Any]] = {
            "reference": {},
            "transformers": {"size": 224, "order": "float"},
            "classification": {
                "size": 256,
                "shape": "short",
                "interpolation": "bicubic",
                "center_crop": 224,
                "rounding": "down",
            },
        }
        return cls(**known[one_of("preprocessing", name, known)]).with_(**changes)

    def with_(self, **changes: Any) -> Preprocessing:
        """The same with other values of some fields. `size` may also be (height, width). Raises `UnknownName`."""
        for name in changes:
            if name in ELSEWHERE:
                raise UnknownName(f"{name}= is not an option here: {ELSEWHERE[name]}")
        only_known("preprocessing has no option", changes, [f.name for f in fields(self)])
        if isinstance(size := changes.get("size"), (tuple, list)):
            if len(size) != 2 or min(size) < 1:
                raise DinoError(f"size is a number of pixels or (height, width), not {size!r}")
            if "shape" in changes:
                raise DinoError(
                    f"size=(height, width) is the size of every input, so shape={changes['shape']!r} has nothing to say: "
                    "leave shape out, or give size as one number"
                )
            changes |= {"size": int(min(size)), "size_hw": (int(size[0]), int(size[1]))}
        elif "size" in changes or "shape" in changes:
            changes = {"size_hw": None, **changes}
        return replace(self, **changes)

    def to_json(self) -> str:
        values = asdict(self)
        for field in fields(self):
            if field.name in LATER and values[field.name] == field.default:
                del values[field.name]
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        values: dict[str, Any] = json.loads(text)
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise UnknownName(f"preprocessing has no field {sorted(unknown)[0]!r}; it was written by a newer version")
        for name in ("mean", "std", "size_hw"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return cls(**values)

    @property
    def id(self) -> str:
        """Short, readable, and different whenever any field is."""
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()[:6]
        size = "native" if self.shape == "native" else f"{self.shape}{self.size}"
        if self.size_hw is not None:
            size = "{}x{}".format(*self.size_hw)
        crop = f"-crop{self.center_crop}" if self.center_crop else ""
        return f"{size}{crop}-{self.interpolation}-{self.fit}{self.multiple}-{digest}"

    def __str__(self) -> str:
        """One line for people: every field that matters."""
        side = f"center crop {self.center_crop} of " if self.center_crop else ""
        if self.size_hw is not None:
            side += "{} × {} px (height × width)".format(*self.size_hw)
        elif self.shape == "native":
            side += "the image's own size"
        elif self.shape == "square":
            side += f"{self.size} × {self.size} px"
        else:
            side += f"{self.shape} side {self.size} px"
        fit = {"resize": "resized", "pad": "padded", "crop": "cropped"}[self.fit]
        mean, std = (" ".join(f"{v:.3g}" for v in values) for values in (self.mean, self.std))
        values = "8-bit values" if self.order == "uint8" else "floats"
        fitted = f"sides {fit} to multiples of {self.multiple}"
        return f"{side}, {self.interpolation} on {values}, {fitted}, mean {mean}, std {std}"

    @property
    def target_short_side(self) -> int | None:
        """The short side needed at most, for decoders that can decode smaller; None: the full image is needed."""
        if self.size_hw is not None:
            return max(self.size_hw)
        return {"square": self.size, "short": self.size, "long": self.size}.get(self.shape)

    @property
    def input_hw(self) -> tuple[int, int] | None:
        """The input's size where it is the same for every image."""
        if self.shape == "square" or self.center_crop or self.size_hw is not None:
            geometry = self.plan(self.size, self.size)
            return geometry.input_hw
        return None

    def plan(self, width: int, height: int) -> Geometry:
        """What will happen to an image of width × height pixels."""
        w, h = self._scaled(width, height)
        if w * h > max(LARGEST_ENLARGED, 4 * width * height):
            raise ImageError(
                f"an image of {width}×{height} would be enlarged to {w}×{h} pixels; leave it out, or shape='square'"
            )
        m = self.multiple
        if self.center_crop:
            return self._center_cropped(width, height, w, h)
        if self.fit == "resize":
            w, h = (max(m, round(v / m) * m) for v in (w, h))
            input_hw = valid_hw = (h, w)
        elif self.fit == "pad":
            input_hw, valid_hw = (-(-h // m) * m, -(-w // m) * m), (h, w)
        else:
            input_hw = valid_hw = (h // m * m, w // m * m)
            if 0 in input_hw:
                raise DinoError(f"cropping a {w}×{h} image to multiples of {m} leaves nothing; use fit='resize'")
        lost = valid_hw[0] < h or valid_hw[1] < w
        return Geometry(width, height, w / width, h / height, 0.0, 0.0, input_hw, valid_hw, lost)

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        if self.size_hw is not None:
            return self.size_hw[1], self.size_hw[0]
        if self.shape == "native":
            return width, height
        if self.shape == "square":
            return self.size, self.size
        side = (min if self.shape == "short" else max)(width, height)
        if self.rounding == "down":
            return max(1, width * self.size // side), max(1, height * self.size // side)
        factor = self.size / side
        return max(1, round(width * factor)), max(1, round(height * factor))

    def _center_cropped(self, width: int, height: int, w: int, h: int) -> Geometry:
        side = self.center_crop
        assert side is not None
        if side % self.multiple or side > min(w, h):
            raise DinoError(
                f"center_crop={side} must be a multiple of {self.multiple} and fit into the resized image ({w}×{h})"
            )
        left, top = round((w - side) / 2), round((h - side) / 2)
        return Geometry(
            width, height, w / width, h / height, left, top, (side, side), (side, side), side < w or side < h
        )

    def to_tensor(self, image: Image.Image | np.ndarray | Tensor) -> Tensor:
        """The network input [3, h, w] alone, as a `transform` of torchvision's data sets, which a DataLoader collates."""
        return self(image)[0]

    def __call__(
        self, image: Image.Image | np.ndarray | Tensor, *, original_wh: tuple[int, int] | None = None
    ) -> tuple[Tensor, Geometry]:
        """An RGB image to (normalised float32 input [3, h, w], what was done).

        `image`: PIL RGB, uint8 array [h, w, 3], or tensor [3, h, w] (uint8, or float in [0, 1]). `original_wh` where the
        decoder already returned a reduced image: the size in `Geometry`.
        """
        pixels = to_pixels(image)
        height, width = pixels.shape[-2:]
        geometry = self.plan(*(original_wh or (width, height)))
        w, h = round(geometry.width * geometry.scale_x), round(geometry.height * geometry.scale_y)
        if self.order == "float" and pixels.dtype == torch.uint8:
            pixels = pixels.float() / 255
        pixels = resized(pixels, (h, w), self.interpolation)
        x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        top, left = int(geometry.offset_y), int(geometry.offset_x)
        x = x[:, top : top + geometry.valid_hw[0], left : left + geometry.valid_hw[1]]
        x = standardised(x, self.mean, self.std)
        (H, W), (vh, vw) = geometry.input_hw, geometry.valid_hw
        if (H, W) != (vh, vw):
            x = F.pad(x, (0, W - vw, 0, H - vh))  # zero is the mean colour
        return x.contiguous(), geometry
