"""Drawings: class colours with a legend, depth with a colour bar, named boxes, heat maps, matches, contact sheets.

Pillow and numpy only; PyAV where a video is written. A drawing is for eyes: long sides above `LONGEST` are reduced. The
data beside it has every pixel.
"""

from __future__ import annotations

import colorsys
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dinov3.errors import printable, require

LONGEST = 1600  # px
LINE, GAP = 24, 14  # px of a legend
TILE, BETWEEN, MARGIN, CAPTION = 220, 18, 36, 52  # px of a contact sheet: a tile's side, between, around, under tiles
PER_ROW = 5
INK, PAPER, FAINT = (28, 28, 30), (252, 252, 250), (108, 108, 114)
MAT, GREY = (241, 241, 238), (218, 218, 215)

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


def palette(n: int) -> tuple[tuple[int, int, int], ...]:
    """n colours, neighbours far apart in hue: hues in steps of the golden ratio, lightness and saturation in turns."""
    colours = []
    for i in range(n):
        hue, value, saturation = i * 0.618034 % 1, (0.95, 0.72, 0.85)[i % 3], (0.62, 0.85, 0.45)[i // 3 % 3]
        red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))
        colours.append((red, green, blue))
    return tuple(colours)


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
    entries = [(colour, printable(text)) for colour, text in entries]
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


# ---- what patches say ----------------------------------------------------------------------------------------------


def heat_over(image: Image.Image, values: np.ndarray, *, alpha: float = 0.65) -> Image.Image:
    """The image in grey under the colours of values [H, W] in [0, 1]."""
    base = reduced(image)
    grey = np.asarray(base.convert("L").convert("RGB"), np.float64)
    blended = (1 - alpha) * grey + alpha * ramp(_fitting(values, base.size))
    return Image.fromarray(np.rint(blended).astype(np.uint8))


def objects_over(image: Image.Image, numbers: np.ndarray, *, alpha: float = 0.45) -> Image.Image:
    """The image with its objects (numbers [H, W], 0 the background) tinted and outlined; the background is a bit darker."""
    base = reduced(image)
    shown = _fitting(numbers, base.size)
    pixels = np.asarray(base, np.float64)
    colours = np.array([(0, 0, 0), *palette(max(1, int(numbers.max(initial=0))))], np.float64)[shown]
    inside = (shown > 0)[..., None]
    blended = np.where(inside, (1 - alpha) * pixels + alpha * colours, 0.6 * pixels)
    edge = np.zeros(shown.shape, bool)
    edge[:, 1:] |= shown[:, 1:] != shown[:, :-1]
    edge[1:] |= shown[1:] != shown[:-1]
    thick = edge.copy()  # two pixels wide
    thick[:-1] |= edge[1:]
    thick[:, :-1] |= edge[:, 1:]
    blended[thick] = (255, 255, 255)
    return Image.fromarray(np.rint(blended).astype(np.uint8))


def colours_of(values: np.ndarray) -> Image.Image:
    """An image from values [H, W, 3] in [0, 1]."""
    return Image.fromarray(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))


def matches_between(
    left: Image.Image, right: Image.Image, a_xy_px: np.ndarray, b_xy_px: np.ndarray, colours: np.ndarray
) -> Image.Image:
    """Two images side by side, at one height, and a line for every match of points [M, 2], in its colour [M, 3] uint8."""
    height = min(LONGEST, max(left.height, right.height))
    pair = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in (left, right)]
    page = Image.new("RGB", (pair[0].width + GAP + pair[1].width, height), PAPER)
    page.paste(pair[0], (0, 0))
    page.paste(pair[1], (pair[0].width + GAP, 0))
    draw = ImageDraw.Draw(page)
    a, b = a_xy_px * height / left.height, b_xy_px * height / right.height + (pair[0].width + GAP, 0)
    for (x, y), (u, v), colour in zip(a.tolist(), b.tolist(), colours.tolist()):
        draw.line([x, y, u, v], fill=tuple(colour), width=2)
        for px, py in ((x, y), (u, v)):
            draw.ellipse([px - 5, py - 5, px + 5, py + 5], fill=tuple(colour), outline=PAPER)
    return reduced(page)


def dot(image: Image.Image, x: float, y: float, colour: tuple[int, int, int] = (0, 230, 200)) -> Image.Image:
    """The image with a ring around a pixel."""
    marked = image.copy()
    draw = ImageDraw.Draw(marked)
    for r, ink, width in ((11, INK, 7), (9, colour, 3)):
        draw.ellipse([x - r, y - r, x + r, y + r], outline=ink, width=width)
    return marked


def sheet(tiles: Sequence[tuple[str, Image.Image]], across: int, side: int = 260) -> Image.Image:
    """Images in rows of `across`, each under its name and at most `side` pixels wide and high."""
    across, font = min(across, len(tiles)), _font(14)
    fitted = [ImageOps.contain(image, (side, side), Image.Resampling.LANCZOS) for _, image in tiles]
    rows = [range(i, min(i + across, len(tiles))) for i in range(0, len(tiles), across)]
    head = [LINE if any(tiles[i][0] for i in row) else 0 for row in rows]  # px for the names, where there are any
    high = [max(fitted[i].height for i in row) for row in rows]
    step = side + GAP
    page = Image.new("RGB", (across * step + GAP, sum(head) + sum(high) + GAP * (len(rows) + 1)), PAPER)
    draw, y = ImageDraw.Draw(page), GAP
    for row, above, height in zip(rows, head, high):
        for i in row:
            x = GAP + (i - row.start) * step
            draw.text((x, y + 2), _shortened(printable(tiles[i][0]), font, side), font=font, fill=INK)
            page.paste(fitted[i], (x, y + above))
        y += above + height + GAP
    return page


class VideoWriter:
    """An H.264 file of images of one size, by PyAV: `with VideoWriter(path, fps) as video: video.add(image)`.

    The file appears under its name when it is complete.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float) -> None:
        self.path, self.fps = Path(path), fps
        self.part = self.path.with_name(f".{self.path.stem}.part{self.path.suffix}")
        self.container = require("av", "video", "writing video files").open(str(self.part), "w")
        self.stream: Any = None

    def add(self, image: Image.Image) -> None:
        import av

        if self.stream is None:
            self.stream = self.container.add_stream("libx264", rate=Fraction(self.fps).limit_denominator(1001))
            self.stream.width, self.stream.height = (side // 2 * 2 for side in image.size)  # the codec wants even sides
            self.stream.pix_fmt, self.stream.options = "yuv420p", {"crf": "20"}
        frame = av.VideoFrame.from_image(image.crop((0, 0, self.stream.width, self.stream.height)))
        for packet in self.stream.encode(frame):
            self.container.mux(packet)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: Any, error: object, trace: object) -> None:
        complete = kind is None and self.stream is not None
        if complete:
            for packet in self.stream.encode():
                self.container.mux(packet)
        self.container.close()
        if complete:
            self.part.replace(self.path)
        else:
            self.part.unlink(missing_ok=True)


# ---- boxes, words --------------------------------------------------------------------------------------------------


def boxes_over(
    image: Image.Image, boxes_xyxy_px: np.ndarray, labels: Sequence[str], colours: np.ndarray
) -> Image.Image:
    """The image with boxes [n, 4], each with its label and colour [n, 3]; the first one on top."""
    base = reduced(image)
    scale = np.array([base.width / image.width, base.height / image.height] * 2)
    draw, font, labels = ImageDraw.Draw(base), _font(14), [printable(label) for label in labels]
    for i in reversed(range(len(boxes_xyxy_px))):
        x0, y0, x1, y1 = (float(v) for v in np.asarray(boxes_xyxy_px[i]) * scale)
        colour = tuple(int(c) for c in colours[i])
        draw.rectangle([x0, y0, max(x0, x1), max(y0, y1)], outline=colour, width=3)
        wide = font.getlength(labels[i]) + 8
        x, y = min(x0, max(0.0, base.width - wide)), y0 - 19 if y0 >= 19 else y0
        draw.rectangle([x, y, x + wide, y + 19], fill=colour)
        draw.text((x + 4, y + 10), labels[i], font=font, fill=INK, anchor="lm")
    return base


def card(text: str, *, ink: tuple[int, int, int] = INK) -> Image.Image:
    """A card with text in place of an image: a text query, a class name."""
    page = Image.new("RGB", (300, 300), MAT)
    lines = "\n".join(textwrap.fill(line, 24) for line in text.splitlines())
    ImageDraw.Draw(page).multiline_text((150, 150), lines, font=_font(22), fill=ink, anchor="mm", align="center")
    return page


def shares_beside(image: Image.Image, rows: Sequence[tuple[str, float]]) -> Image.Image:
    """The image beside words with bars as long as their shares (0 to 1)."""
    base, rows = reduced(image), [(printable(text), share) for text, share in rows]
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


# ---- a query and its neighbours ------------------------------------------------------------------------------------


def contact_sheet(
    query_image: str | os.PathLike[str] | Image.Image,
    hits: Sequence[Any],
    root: str | os.PathLike[str],
    opened: Callable[[str | os.PathLike[str]], Image.Image],
) -> Image.Image:
    """The query and its neighbours (`rank`, `path`, `score`), each image over its rank, score and file name.

    Paths of hits are relative to `root`; `opened` gives the image of a path. One that is missing or unreadable is a
    grey tile with the reason.
    """
    across = max(1, min(PER_ROW, len(hits)))
    down = max(1, math.ceil(len(hits) / PER_ROW))
    big = TILE + TILE // 3  # the query is a third larger than its neighbours
    left = MARGIN + big + 2 * BETWEEN + 1  # where the neighbours begin, after a hairline
    title = 34
    width = left + 2 * BETWEEN + across * (TILE + BETWEEN) - BETWEEN + MARGIN
    height = MARGIN + title + max(big + CAPTION, down * (TILE + CAPTION + BETWEEN) - BETWEEN) + MARGIN
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    large, normal, small = _font(18), _font(15), _font(13)
    top = MARGIN + title

    draw.text((MARGIN, MARGIN), "Query", font=large, fill=INK)
    _put(page, query_image, opened, (MARGIN, top), big, small)
    name = "" if isinstance(query_image, Image.Image) else printable(Path(query_image).name)
    draw.text((MARGIN, top + big + 8), _shortened(name, normal, big), font=normal, fill=FAINT)

    draw.line([(left, MARGIN), (left, height - MARGIN)], fill=GREY, width=1)
    left += 2 * BETWEEN
    heading = f"{len(hits)} nearest images" if len(hits) > 1 else "Nearest image" if hits else "No neighbours"
    draw.text((left, MARGIN), heading, font=large, fill=INK)
    for n, hit in enumerate(hits):
        x, y = left + n % PER_ROW * (TILE + BETWEEN), top + n // PER_ROW * (TILE + CAPTION + BETWEEN)
        _put(page, Path(root) / hit.path, opened, (x, y), TILE, small)
        draw.text((x, y + TILE + 7), f"{hit.rank}.", font=normal, fill=INK)
        score = f"{hit.score:.3f}"
        draw.text((x + TILE - normal.getlength(score), y + TILE + 7), score, font=normal, fill=INK)
        draw.text((x, y + TILE + 28), _shortened(printable(Path(hit.path).name), small, TILE), font=small, fill=FAINT)
    return page


def _put(
    page: Image.Image, image: Any, opened: Callable[..., Image.Image], corner: tuple[int, int], side: int, font: Any
) -> None:
    """The whole image, as large as fits, in the middle of a square; a grey square with the reason if it cannot."""
    x, y = corner
    draw = ImageDraw.Draw(page)
    draw.rectangle([x, y, x + side - 1, y + side - 1], fill=MAT)
    try:
        upright = ImageOps.exif_transpose(image if isinstance(image, Image.Image) else opened(image)).convert("RGBA")
        fitted = ImageOps.contain(upright, (side, side), Image.Resampling.LANCZOS)
    except Exception:  # whatever a broken file makes a decoder do, the sheet is drawn
        reason = "unreadable" if os.path.exists(str(image).partition("#")[0]) else "missing"
        draw.rectangle([x, y, x + side - 1, y + side - 1], fill=GREY)
        draw.text((x + side / 2, y + side / 2), reason, font=font, fill=FAINT, anchor="mm")
        return
    page.paste(fitted, (x + (side - fitted.width) // 2, y + (side - fitted.height) // 2), fitted)


def _shortened(text: str, font: Any, width: float) -> str:
    """`text`, or as much of its beginning and end as fits: the end of a file name often tells files apart."""
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        shorter = text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]
        if font.getlength(shorter) <= width:
            return shorter
    return "…"


def confusion(counts: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Counts [K, K] of (truth, prediction) as a table: the darker a cell, the larger its share of the row."""
    K, font = len(names), _font(13)
    cell = max(4, min(44, LONGEST // (K + 6)))
    labelled = cell >= 14
    room = 24 + max(int(font.getlength(name[:24])) for name in names) if labelled else 12  # px of the names
    canvas = Image.new("RGB", (MARGIN + room + K * cell + MARGIN, MARGIN + room + K * cell + MARGIN), PAPER)
    draw, left = ImageDraw.Draw(canvas), MARGIN + room
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for i in range(K):
        for j in range(K):
            x, y, share = left + j * cell, left + i * cell, shares[i, j]
            colour = tuple(round(p * (1 - share) + c * share) for p, c in zip(PAPER, (24, 74, 140)))
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=colour, outline=GREY if labelled else None)
            if cell >= 30 and counts[i, j]:
                ink = PAPER if share > 0.5 else INK
                draw.text((x + cell / 2, y + cell / 2), str(counts[i, j]), fill=ink, font=font, anchor="mm")
    if labelled:
        beside, above = (Image.new("RGB", (room - 8, K * cell), PAPER) for _ in range(2))
        for i, name in enumerate(names):
            at = (i + 0.5) * cell
            ImageDraw.Draw(beside).text((room - 14, at), name[:24], fill=INK, font=font, anchor="rm")
            ImageDraw.Draw(above).text((6, at), name[:24], fill=INK, font=font, anchor="lm")
        canvas.paste(beside, (MARGIN, left))
        canvas.paste(above.transpose(Image.Transpose.ROTATE_90), (left, MARGIN))
    draw.text(
        (left, 10),
        "rows: truth, columns: prediction; the darker, the larger the share of the row",
        fill=FAINT,
        font=font,
    )
    return canvas
