"""Operations on the pixels of RGB images, from decoded image to normalised input: written once, used by every transform.

Values are 8-bit levels until they are normalised, and each operation rounds as torchvision and Pillow do on 8-bit images.
Legend: [3, h, w] planes; `Pixels` uint8, `Planes` float32 with whole numbers from 0 to 255.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.errors import DinoError

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
