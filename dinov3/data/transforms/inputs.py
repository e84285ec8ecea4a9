"""From a decoded image to a network input, with nothing lost by accident and everything written down.

`Preprocessing` describes how (a value with a short id), `Geometry` is the result for one image: enough to go from
a patch to the original image's pixels and back. Frames: x to the right, y down, in pixels; (0, 0) is the top left
corner of the top left pixel, so the centre of that pixel is (0.5, 0.5).

Sources of the named ones: the reference's example (resize to a square on uint8, bilinear, antialias), transformers'
processor (divides by 255 first, then resizes), the reference's classification evaluation (short side to 256, bicubic,
centre crop 224).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.data.transforms.pixels import resized, standardised, to_pixels
from dinov3.errors import DinoError, ImageError, UnknownName, one_of, only_known

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
    rounding: str = (
        "nearest"  # of the other side with shape "short" or "long"; "down" is torchvision's and the reference's
    )

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
