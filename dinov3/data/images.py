"""Any image file to upright 8-bit RGB, or one plain sentence why not.

Millions of files found on disks hold everything: sixteen-bit scans, inverted CMYK, palettes with holes, animations,
photographs lying on their side, halves of downloads, web pages called `.jpg`. `open_image` decides by content, never by
the suffix, and has two outcomes: a `DecodedImage`, or a `ImageError` whose text is the reason. Nothing that a decoder raises
gets past it, and no setting of Pillow is touched (`MAX_IMAGE_PIXELS`, `LOAD_TRUNCATED_IMAGES`), so that threads share it.

No file, member or cell of more than `most_bytes()` is read (512 MB; `DINOV3_MAX_IMAGE_MB` in the environment changes it), and
no image decoded of more than `max_pixels`. Only regular files are opened: pipes, devices and /proc would block or never end.

What becomes of the unusual (noted in `DecodedImage.notes`):
- transparency is laid over white, as a page would show it;
- 12- and 16-bit greys are scaled to 8 bit (Pillow's own `convert` clips at 255: a white image); other integers and
  floats have no agreed range: floats within [0, 1] are scaled by 255, everything else is refused with its range;
- of an animation or a multi-page file, the first frame; of a Photoshop file, the flattened image;
- colour profiles are ignored, as the training pipelines of such models do; CMYK is converted by the plain formula.

Left out: vector and page formats (EPS, PDF, SVG, WMF: programs rather than images, Pillow would run Ghostscript on them),
raw camera files, multi-band science formats. HEIC works once `pi_heif.register_heif_opener()` was called.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import struct
import threading
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from dinov3.errors import DinoError, ImageError, TooLarge

# Pillow warns of odd metadata, which may say something else for every file of a million. Only here and once: swapping
# filters around a call (`catch_warnings`) is not safe among threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.(Tiff|Png|Tga|Ico)ImagePlugin")

# Pillow's names of the formats, in the order of trying. TGA is last: it has no signature, only a plausible header.
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "PSD", "QOI", "DDS", "SGI", "TGA",
)  # fmt: skip
_FRAMED = {"GIF", "WEBP", "PNG", "TIFF", "AVIF"}  # where a further frame is a further image (in a PSD it is a layer)

# fmt: off
IMAGE_SUFFIXES = frozenset([
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif",
    ".jp2", ".j2k", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".ico", ".psd", ".qoi", ".dds", ".tga",
    ".heic", ".heif",
])
# fmt: on

_SIGNATURES = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\x00",
    b"MM\x00*",
    b"II+\x00",
    b"MM\x00+",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n",
    b"\xff\x4f\xff\x51",
    b"8BPS",
    b"qoif",
    b"DDS ",
)
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
HEAD = 32  # bytes that `is_image_header` wants
# pixels; larger images are decoded one at a time, whatever the number of threads: the largest take 2.3 GB
LARGE = 1 << 25
_one_large = threading.Lock()


def _new_lock() -> None:
    global _one_large
    _one_large = threading.Lock()


if hasattr(os, "register_at_fork"):  # a thread of the parent may hold it
    os.register_at_fork(after_in_child=_new_lock)


def most_bytes() -> int:
    """The largest file, archive member or table cell that is read: 512 MB, or `DINOV3_MAX_IMAGE_MB` of the environment."""
    text = os.environ.get("DINOV3_MAX_IMAGE_MB", "512")
    if not text.isdecimal() or int(text) < 1:
        raise DinoError(f"DINOV3_MAX_IMAGE_MB is a whole number of megabytes above 0, not {text!r}")
    return int(text) << 20


def check_size(size: int) -> None:
    """Raises `ImageError` for more bytes than are read."""
    if size > (most := most_bytes()):
        raise TooLarge(
            f"{size / 2**20:,.0f} MB, more than the {most >> 20} MB that an image may have (DINOV3_MAX_IMAGE_MB changes it)"
        )


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image: `image` is upright RGB, perhaps decoded smaller; `width` and `height` are the upright original's."""

    image: Image.Image
    width: int
    height: int
    notes: tuple[str, ...] = ()


def open_image(
    source: bytes | str | os.PathLike[str] | BinaryIO,
    *,
    target_short_side: int | None = None,
    max_pixels: int = 178_956_970,
) -> DecodedImage:
    """Decode a file, its bytes, or a binary stream (read from its beginning).

    With `target_short_side` (pixels), a JPEG may be decoded at 1/2, 1/4 or 1/8, which costs a fraction, as long as its
    short side stays at least twice the target: the resize that follows then still averages over real detail.
    A header that announces more than `max_pixels` is refused before anything is decoded. Raises `ImageError`.
    """
    if isinstance(source, (str, os.PathLike)):
        try:
            with _open_regular(source) as stream:
                return _decode(stream, target_short_side, max_pixels)
        except OSError as error:
            raise ImageError(os_reason(error, source)) from None
    if isinstance(source, (bytes, bytearray, memoryview)):
        check_size(len(source))
        return _decode(io.BytesIO(source), target_short_side, max_pixels)
    try:
        seekable = source.seekable()
        stream = source if seekable else io.BytesIO(source.read(most_bytes() + 1))
        check_size(stream.seek(0, io.SEEK_END))
    except (OSError, ValueError) as error:
        raise ImageError(f"the stream cannot be read: {_one_line(error)}") from None
    return _decode(stream, target_short_side, max_pixels)


def open_file(path: str | os.PathLike[str]) -> Image.Image:
    """The upright RGB image of a file. Raises `ImageError`, which names the file."""
    try:
        return open_image(path).image
    except ImageError as error:
        raise ImageError(f"{os.fspath(path)}: {error}") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image to upright RGB in the same way as `open_image`. Raises `ImageError`."""
    try:
        return _to_upright_rgb(image, [])
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(_decoding_reason(error, image.format or "image")) from None


def is_image_header(head: bytes) -> bool:
    """Whether a file that begins with these bytes (`HEAD` of them) is an image. Formats without a signature are not seen."""
    if head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return True
    if head[4:8] == b"ftyp":
        return head[8:12] in _BRANDS
    if head[:2] == b"BM":  # two letters are a weak signature: the reserved bytes and the header's size must fit as well
        return head[6:10] == b"\0\0\0\0" and head[14:18] in (b"\x0c\0\0\0", b"\x28\0\0\0", b"\x6c\0\0\0", b"\x7c\0\0\0")
    return re.match(rb"P[1-6][ \t\r\n]+(#|\d)", head) is not None


def os_reason(error: OSError, path: str | os.PathLike[str]) -> str:
    """Why a file could not be read, in a few words."""
    if isinstance(error, FileNotFoundError):
        if os.path.islink(path):
            return f"dangling link to {os.readlink(path)}"
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "a folder, not an image"
    if isinstance(error, PermissionError):
        return "permission denied"
    if error.errno == errno.ELOOP:
        return "a link that leads to itself"
    return _one_line(error.strerror or error)


def _open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file, but not what would block or never end (a pipe, a device, /proc) or is larger than the limit."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))  # a pipe would wait
    try:
        facts = os.fstat(file)
        if stat.S_ISDIR(facts.st_mode):
            raise IsADirectoryError(errno.EISDIR, "a folder")
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        check_size(facts.st_size)
        if facts.st_size == 0:  # also what the kernel makes up when it is read, such as its log
            return io.BytesIO()
        return os.fdopen(os.dup(file), "rb")
    finally:
        os.close(file)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a file. Raises `ImageError`."""
    try:
        with _open_regular(path) as stream:
            data = stream.read(most_bytes() + 1)
    except OSError as error:
        raise ImageError(os_reason(error, path)) from None
    except MemoryError:
        raise ImageError("not enough memory to read this file") from None
    check_size(len(data))
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def _decode(stream: BinaryIO, target_short_side: int | None, max_pixels: int) -> DecodedImage:
    opened: ImageFile.ImageFile | None = None
    try:
        opened = _identify(stream)
        return _decode_opened(opened, target_short_side, max_pixels)
    except ImageError:
        raise
    except Exception as error:  # a decoder fed with invalid data raises anything; all of it means the same here
        raise ImageError(_decoding_reason(error, _format(opened) if opened is not None else "image")) from None


def _decode_opened(image: ImageFile.ImageFile, target_short_side: int | None, max_pixels: int) -> DecodedImage:
    notes: list[str] = []
    width, height = image.size
    _refuse_bomb(width, height, max_pixels)
    factor = 1
    if target_short_side is not None and image.format in ("JPEG", "MPO"):
        fitting = [s for s in (8, 4, 2) if -(-min(width, height) // s) >= 2 * target_short_side]
        if fitting:
            factor = fitting[0]
            image.draft(None, (width // factor, height // factor))  # mode None: the colours' handling stays the same
            factor = round(max(width, height) / max(image.size))
            assert min(image.size) >= 2 * target_short_side, (image.size, target_short_side)
    sideways = _orientation(image) if image.format == "TIFF" else 1  # Pillow turns a TIFF while loading it
    with _one_large if image.width * image.height > LARGE else nullcontext():
        rgb = _to_upright_rgb(image, notes)
    if sideways != 1:
        notes.append("EXIF rotated")
    if factor > 1:
        notes.append(f"decoded at 1/{factor}")
        if _orientation(image) >= 5:  # a quarter turn
            width, height = height, width
    else:
        width, height = rgb.size  # of an ICO, only now known
        _refuse_bomb(width, height, max_pixels)
    frames = _frames(image)
    if frames > 1:
        notes.append(f"first of {frames} frames")
    return DecodedImage(rgb, width, height, tuple(notes))


def _identify(stream: BinaryIO) -> ImageFile.ImageFile:
    """The header, read by the first decoder that accepts the first bytes.

    As `Image.open`, without its size check: that one follows a global and warns through `warnings`, which threads share.
    """
    Image.init()  # imports the decoders, once
    stream.seek(0)
    head = stream.read(HEAD)
    if not head:
        raise ImageError("empty file (0 bytes)")
    broken: ImageError | None = None
    for name in (*FORMATS, "HEIF"):
        if name not in Image.OPEN:  # HEIF is registered by its own package; a build of Pillow may lack AVIF or JPEG2000
            continue
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(head[:16])
        if isinstance(accepted, str):  # why this build of Pillow cannot
            broken = broken or ImageError(_one_line(accepted))
            continue
        if not accepted:
            continue
        stream.seek(0)
        try:
            return factory(stream, "")
        except Exception as error:
            if accept is not None and broken is None:
                broken = ImageError(_decoding_reason(error, name))
                if name == "WEBP" and int.from_bytes(head[4:8], "little") + 8 > stream.seek(0, io.SEEK_END):
                    broken = ImageError("truncated WEBP: fewer bytes than its header says")
    if broken is not None:
        raise broken
    raise ImageError(_not_a_image(head))


def _not_a_image(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the image itself (git lfs pull fetches it)"
    if head[4:8] == b"ftyp" and head[8:12] in _BRANDS:
        return "a HEIF/AVIF image without a decoder (pip install pi-heif, then pi_heif.register_heif_opener())"
    if not head.strip(b"\0"):
        return "not an image (begins with zeros)"
    start = head[:14]
    if all(32 <= b < 127 or b in b"\t\r\n" for b in start):
        return f"not an image (begins with {start.decode('ascii')!r})"
    return f"not an image (begins with bytes {head[:8].hex(' ')})"


def _refuse_bomb(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"broken image: its header says {width}x{height} pixels")
    if width * height > max_pixels:
        limit = f"{max_pixels / 1e6:.0f}" if max_pixels >= 10_000_000 else f"{max_pixels / 1e6:g}"
        raise TooLarge(f"decompression bomb: {width}x{height} = {width * height / 1e6:.0f} megapixels, limit {limit}")


def _decoding_reason(error: Exception, name: str) -> str:
    text = _one_line(error)
    if isinstance(error, (struct.error, IndexError)) or "requires a buffer of" in text:
        return f"truncated {name}: the header ends early"
    if isinstance(error, MemoryError):
        return f"not enough memory to decode this {name}"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        pixels = re.search(r"\((\d+) pixels\)", text)
        return "decompression bomb" + (f": {int(pixels[1]) / 1e6:.0f} megapixels" if pixels else f": {text}")
    if isinstance(error, UnidentifiedImageError) or text == "not identified by this driver":
        return f"broken {name}: the header makes no sense"
    cut = isinstance(error, EOFError) or re.search(
        r"truncat|unexpected end|end of file|not enough (image )?data|too small|no more images|buffer is not large enough"
        r"|reached EOF|incomplete header|only got",
        text,
        re.IGNORECASE,
    )
    return f"{'truncated' if cut else 'broken'} {name}: {text}"


def _one_line(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _format(image: Image.Image) -> str:
    return {"MPO": "JPEG", None: "image"}.get(image.format, image.format or "image")


def _frames(image: Image.Image) -> int:
    """How many frames the file claims to have; read after decoding, since a broken later frame is no reason to refuse."""
    if image.format not in _FRAMED:
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:
        return 1


# ---------------------------------------------------------------------------------------------------------------------
# Colours and orientation

_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # unparsable EXIF is ignored
        return 1
    return value if value in _TURN else 1


def _to_upright_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Loads, turns and converts; the result carries no metadata, or a later reader would turn it a second time."""
    raw = _raw_mode(image)
    image.load()
    orientation = _orientation(image)
    rgb = _to_rgb(image, raw, notes)
    if orientation != 1:
        rgb = rgb.transpose(_TURN[orientation])
        notes.append("EXIF rotated")
    if rgb is image:
        rgb = image.copy()  # a plain image, independent of the file it came from
    rgb.info.clear()
    return rgb


def _raw_mode(image: Image.Image) -> str:
    """How the file stores a pixel ("RGB;16B"); known only before loading."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3]
        first = arguments if isinstance(arguments, str) else arguments[0] if arguments else ""
        return first if isinstance(first, str) else ""
    return ""


def _to_rgb(image: Image.Image, raw: str, notes: list[str]) -> Image.Image:
    mode = image.mode
    if mode == "F":
        return _from_float(image, notes)
    if mode == "I" or mode.startswith("I;"):
        return _from_deep_grey(image, notes)
    if ";16" in raw:
        notes.append("16-bit")  # colour: Pillow's decoder keeps the high byte
    name = {"1": "1-bit", "P": "palette", "PA": "palette"}.get(mode, mode)
    if name not in ("RGB", "RGBA", "RGBa", "RGBX", "L", "LA", "La"):
        notes.append(name)
    if image.has_transparency_data:
        return _over_white(_with_alpha(image), notes)
    return image if mode == "RGB" else image.convert("RGB")


def _with_alpha(image: Image.Image) -> Image.Image:
    key: Any = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image = image.copy()  # a 16-bit image's transparent colour is 16-bit as well
        image.info["transparency"] = tuple(k >> 8 for k in key)
    if image.mode == "La":
        image = image.convert("LA")
    return image if image.mode == "RGBA" else image.convert("RGBA")


def _over_white(rgba: Image.Image, notes: list[str]) -> Image.Image:
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):  # an alpha channel that hides nothing
        return rgba.convert("RGB")
    notes.append("alpha over white")
    page = Image.new("RGB", rgba.size, "white")
    page.paste(rgba.convert("RGB"), mask=alpha)
    return page


def _from_deep_grey(image: Image.Image, notes: list[str]) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    tags = getattr(image, "tag_v2", None) or {}  # TIFF
    stored = tuple(tags.get(258, ()))
    bits = 12 if stored == (12,) else 16
    if low < 0 or high >= 1 << 16:
        raise ImageError(f"integer values from {low} to {high}: only 8 to 16 bit without sign are understood")
    notes.append("32-bit integers taken for 16-bit" if stored == (32,) else f"{bits}-bit")
    top = (1 << bits) - 1
    eight = ((np.arange(1 << 16, dtype=np.uint32).clip(max=top) * 255 + top // 2) // top).astype(np.uint8)
    grey = eight[values]
    if tags.get(262) == 0:  # white is zero; Pillow inverts 8-bit TIFFs only
        grey = 255 - grey
    key = image.info.get("transparency")
    if isinstance(key, int) and (values == key).any():
        notes.append("alpha over white")
        grey = np.where(values == key, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _from_float(image: Image.Image, notes: list[str]) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # also where there is a NaN
        raise ImageError(f"float values from {low:g} to {high:g}: only [0, 1] is understood, rescale them first")
    notes.append("float")
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")


def image_suffix(name: str) -> bool:
    """Whether the name ends as images do."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES
