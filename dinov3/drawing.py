"""Drawings: class colours with a legend, depth with a colour bar, boxes with names. Pillow and numpy only.

A drawing is for eyes: long sides above `LONGEST` are reduced. The data beside it has every pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LONGEST = 1600  # px
LINE, GAP = 24, 14  # px of a legend
INK, PAPER, FAINT = (28, 28, 30), (252, 252, 250), (108, 108, 114)

# dark violet (near) over rose to pale yellow (far): lightness rises evenly, so that it reads in grey as well
_RAMP = np.array(
    [(10, 7, 34), (58, 15, 109), (110, 27, 129), (163, 44, 125), (213, 67, 106), (246, 112, 92), (254, 166, 115),
     (253, 212, 157), (252, 250, 214)],
    dtype=np.float64,
)  # fmt: skip


def ramp(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] → colours [..., 3] uint8; not-a-number is grey."""
    missing = ~np.isfinite(values)
    at = np.clip(np.where(missing, 0, values), 0, 1) * (len(_RAMP) - 1)
    low = np.minimum(at.astype(int), len(_RAMP) - 2)
    share = (at - low)[..., None]
    colours = np.rint(_RAMP[low] * (1 - share) + _RAMP[low + 1] * share).astype(np.uint8)
    colours[missing] = 128
    return colours


def reduced(image: Image.Image) -> Image.Image:
    """The image at a size for the screen."""
    if max(image.size) <= LONGEST:
        return image.copy()
    return image.resize(_reduced_size(image.size), Image.Resampling.LANCZOS)


def _reduced_size(size: tuple[int, int]) -> tuple[int, int]:
    factor = min(1.0, LONGEST / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _fitting(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W] values at a drawing's size, nearest: classes and missing values do not blend."""
    if (values.shape[1], values.shape[0]) == size:
        return values
    rows = ((np.arange(size[1]) + 0.5) * values.shape[0] / size[1]).astype(int)
    cols = ((np.arange(size[0]) + 0.5) * values.shape[1] / size[0]).astype(int)
    return values[rows][:, cols]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


# ---- classes -------------------------------------------------------------------------------------------------------


def classes_over(
    image: Image.Image, classes: np.ndarray, names: Sequence[str], colours: np.ndarray, *, alpha: float = 0.55
) -> Image.Image:
    """The image under its classes' colours, beside a legend of those that occur, the largest first, with shares."""
    base = reduced(image)
    shown = _fitting(classes, base.size)
    blended = (1 - alpha) * np.asarray(base, np.float64) + alpha * colours[shown]
    numbers, counts = np.unique(classes, return_counts=True)
    most = max(8, (base.height - 2 * GAP) // LINE - 1)  # what stands beside the image, or a few more
    order = np.argsort(-counts, kind="stable")[:most]
    entries = [(tuple(colours[numbers[i]]), f"{names[numbers[i]]}  {counts[i] / classes.size:.1%}") for i in order]
    if len(numbers) > len(order):
        entries.append(((200, 200, 200), f"and {len(numbers) - len(order)} more"))
    return with_legend(Image.fromarray(np.rint(blended).astype(np.uint8)), entries)


def with_legend(image: Image.Image, entries: Sequence[tuple[tuple[int, ...], str]]) -> Image.Image:
    """A column of coloured squares with words at the right of an image."""
    font, line, gap = _font(15), LINE, GAP
    wide = int(max([font.getlength(text) for _, text in entries] or [0])) + 3 * gap + 16
    page = Image.new("RGB", (image.width + wide, max(image.height, line * len(entries) + 2 * gap)), PAPER)
    page.paste(image, (0, 0))
    draw = ImageDraw.Draw(page)
    for i, (colour, text) in enumerate(entries):
        x, y = image.width + gap, gap + i * line
        draw.rectangle([x, y, x + 15, y + 15], fill=tuple(int(c) for c in colour), outline=FAINT)
        draw.text((x + 16 + gap, y + 8), text, font=font, fill=INK, anchor="lm")
    return page


# ---- metres --------------------------------------------------------------------------------------------------------


def heights_drawn(values: np.ndarray, low: float, high: float, unit: str) -> Image.Image:
    """Values [H, W] in colours between `low` and `high`, beside a colour bar in `unit`."""
    shown = _fitting(values, _reduced_size((values.shape[1], values.shape[0])))
    span = high - low if high > low else 1.0
    image = Image.fromarray(ramp((shown.astype(np.float64) - low) / span))
    font, gap, bar, least = _font(15), GAP, 22, 160
    digits = min(6, max(0, 1 - math.floor(math.log10(span / 4))))  # as many as tell the labels apart
    labels = [f"{low + span * i / 4:.{digits}f} {unit}" for i in range(5)]
    wide = int(max(font.getlength(text) for text in labels)) + bar + 4 * gap
    page = Image.new("RGB", (image.width + wide, max(image.height, least)), PAPER)
    page.paste(image, (0, 0))
    height = page.height - 2 * gap
    column = ramp(np.linspace(1, 0, height))[:, None].repeat(bar, 1)
    page.paste(Image.fromarray(column), (image.width + gap, gap))
    draw = ImageDraw.Draw(page)
    for i, text in enumerate(labels):
        y = gap + (height - 1) * (4 - i) / 4
        draw.text((image.width + 2 * gap + bar, y), text, font=font, fill=INK, anchor="lm")
    return page


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """The image and what was made of it."""
    left = reduced(left)
    page = Image.new("RGB", (left.width + 12 + right.width, max(left.height, right.height)), PAPER)
    page.paste(left, (0, 0))
    page.paste(right, (left.width + 12, 0))
    return page


# ---- boxes, words --------------------------------------------------------------------------------------------------


def boxes_over(
    image: Image.Image,
    boxes_xyxy_px: np.ndarray,
    labels: Sequence[int],
    names: Sequence[str],
    scores: np.ndarray,
    colours: np.ndarray,
) -> Image.Image:
    """The image with boxes [n, 4], each with its name and score; the best one on top."""
    base = reduced(image)
    scale = np.array([base.width / image.width, base.height / image.height] * 2)
    draw, font = ImageDraw.Draw(base), _font(14)
    for i in reversed(range(len(boxes_xyxy_px))):
        x0, y0, x1, y1 = (float(v) for v in np.asarray(boxes_xyxy_px[i]) * scale)
        colour = tuple(int(c) for c in colours[labels[i]])
        draw.rectangle([x0, y0, max(x0, x1), max(y0, y1)], outline=colour, width=3)
        text = f"{names[i]} {scores[i]:.2f}"
        wide = font.getlength(text) + 8
        x, y = min(x0, max(0.0, base.width - wide)), y0 - 19 if y0 >= 19 else y0
        draw.rectangle([x, y, x + wide, y + 19], fill=colour)
        draw.text((x + 4, y + 10), text, font=font, fill=INK, anchor="lm")
    return base


def shares_beside(image: Image.Image, rows: Sequence[tuple[str, float]]) -> Image.Image:
    """The image beside words with bars as long as their shares (0 to 1)."""
    base = reduced(image)
    font, line, gap, bar = _font(15), 40, 16, 160
    wide = int(max([font.getlength(f"{text}  {share:.1%}") for text, share in rows] + [bar])) + 2 * gap
    page = Image.new("RGB", (base.width + wide, max(base.height, line * len(rows) + gap)), PAPER)
    page.paste(base, (0, 0))
    draw = ImageDraw.Draw(page)
    for i, (text, share) in enumerate(rows):
        x, y = base.width + gap, gap + i * line
        draw.text((x, y), f"{text}  {share:.1%}", font=font, fill=INK)
        draw.rectangle([x, y + 21, x + bar, y + 27], fill=(228, 228, 225))
        draw.rectangle([x, y + 21, x + max(1.0, bar * min(1.0, share)), y + 27], fill=(110, 27, 129))
    return page
