"""Any image to upright RGB, or a reason: every mode and mishap, against Pillow's plain decoding and known numbers."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageChops, ImageFile

from dinov3.data.images import (
    FORMATS,
    IMAGE_SUFFIXES,
    DecodedImage,
    is_image_header,
    open_image,
    read_file,
    upright_rgb,
)
from dinov3.errors import DinoError, ImageError


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(width: int, height: int, bits: int, colour: int, rows: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG written by hand: `rows` are filtered scanlines, `extra` are chunks before the data."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def pixels(image: DecodedImage) -> np.ndarray:
    assert image.image.mode == "RGB"
    return np.asarray(image.image)


def reason(source: object, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(source, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def colours() -> Image.Image:
    ramp = np.stack(np.meshgrid(np.arange(24) * 10, np.arange(16) * 16), -1)
    return Image.fromarray(np.concatenate([ramp, 255 - ramp[..., :1]], -1).astype(np.uint8))


@pytest.fixture(scope="module")
def photograph(skimage_images: Path) -> Image.Image:
    with Image.open(skimage_images / "astronaut.png") as image:
        return image.convert("RGB")


# ---- plain images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI", "TGA", "DDS"])
def test_plain_rgb_decodes_exactly_as_pillow_does(kind: str, colours: Image.Image) -> None:
    data = encoded(colours, kind)
    image = open_image(data)
    np.testing.assert_array_equal(pixels(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert (image.width, image.height, image.notes) == (24, 16, ())


def test_every_photograph_of_scikit_image_opens_as_pillow_opens_it(skimage_images: Path) -> None:
    paths = sorted(p for p in skimage_images.iterdir() if p.suffix in IMAGE_SUFFIXES)
    assert len(paths) >= 5  # the wheel holds a dozen and more; the rest is downloaded on demand
    for path in paths:
        if path.name == "multipage_rgb.tif":  # planes of 64-bit floats: not for Pillow, and refused
            assert reason(path) == "broken TIFF: unknown pixel mode"
            continue
        decoded = open_image(path)
        with Image.open(path) as image:
            assert (decoded.width, decoded.height) == image.size
            if image.mode in ("RGB", "L"):
                np.testing.assert_array_equal(pixels(decoded), np.asarray(image.convert("RGB")), err_msg=path.name)


def test_path_string_bytes_and_stream_give_the_same_image(tmp_path: Path, colours: Image.Image) -> None:
    path = tmp_path / "a.png"
    colours.save(path)
    stream = io.BytesIO(path.read_bytes())
    stream.read(10)  # not at its beginning
    for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), stream):
        np.testing.assert_array_equal(pixels(open_image(source)), np.asarray(colours))


def test_content_decides_and_not_the_suffix(tmp_path: Path, colours: Image.Image) -> None:
    path = tmp_path / "really-a-png.jpg"
    path.write_bytes(encoded(colours, "PNG"))
    np.testing.assert_array_equal(pixels(open_image(path)), np.asarray(colours))


def test_the_result_is_a_plain_image_without_metadata(colours: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = open_image(encoded(colours, "JPEG", exif=exif.tobytes())).image
    assert type(image) is Image.Image
    assert not image.info, "a later reader would turn it a second time"
    assert image.getexif().get(0x0112) is None


# ---- orientation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_to_pixels_and_size(kind: str, orientation: int, colours: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    stored = np.asarray(colours)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    image = open_image(encoded(colours, kind, exif=exif.tobytes(), **options))
    assert (image.height, image.width) == upright.shape[:2] == pixels(image).shape[:2]
    assert np.abs(pixels(image).astype(int) - upright).mean() < (3 if kind == "JPEG" else 0.01)
    assert ("EXIF rotated" in image.notes) == (orientation != 1)


def test_the_size_of_a_turned_and_reduced_jpeg_is_the_upright_originals(photograph: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = photograph.resize((640, 400))
    image = open_image(encoded(wide, "JPEG", exif=exif.tobytes()), target_short_side=100)
    assert (image.width, image.height) == (400, 640)
    assert image.image.size == (200, 320)
    assert image.notes == ("EXIF rotated", "decoded at 1/2")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("garbage", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0nonsense" * 3])
def test_broken_exif_is_ignored(garbage: bytes, colours: Image.Image) -> None:
    image = open_image(encoded(colours, "JPEG", exif=garbage))
    assert (image.width, image.height, image.notes) == (24, 16, ())


def test_an_orientation_that_does_not_exist_is_ignored(colours: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    assert open_image(encoded(colours, "PNG", exif=exif.tobytes())).notes == ()


def test_upright_rgb_follows_the_same_rules_for_pillow_images(colours: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    opened = Image.open(io.BytesIO(encoded(colours, "PNG", exif=exif.tobytes())))
    np.testing.assert_array_equal(np.asarray(upright_rgb(opened)), np.rot90(np.asarray(colours)))
    deep = Image.fromarray(np.full((2, 2), 65535 // 2, np.uint16))
    assert upright_rgb(deep).getpixel((0, 0)) == (127, 127, 127)
    with pytest.raises(ImageError, match="truncated BMP"):
        upright_rgb(Image.open(io.BytesIO(encoded(colours, "BMP")[:-90])))


# ---- cheap decoding of large JPEGs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_almost_square_jpeg_keeps_its_sides_apart(orientation: int, photograph: Image.Image) -> None:
    """1999 × 2000 is 1000 × 1000 at half its size, which does not tell which side was longer."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(photograph.resize((1999, 2000)), "JPEG", quality=50, exif=exif)
    image = open_image(data, target_short_side=256)
    assert (image.width, image.height) == ((2000, 1999) if orientation >= 5 else (1999, 2000))
    assert image.image.size == (1000, 1000)


@pytest.mark.parametrize(
    "target, expected", [(None, 1), (501, 1), (500, 2), (251, 2), (250, 4), (126, 4), (125, 8), (9, 8)]
)
def test_a_jpeg_is_reduced_only_while_twice_the_target_remains(
    target: int | None, expected: int, photograph: Image.Image
) -> None:
    """Short side 2001: halves, rounded up, are 1001, 501 and 251 pixels."""
    data = encoded(photograph.resize((2600, 2001)), "JPEG", quality=50)
    image = open_image(data, target_short_side=target)
    assert image.image.size == (-(-2600 // expected), -(-2001 // expected))
    assert (image.width, image.height) == (2600, 2001)
    assert image.notes == ((f"decoded at 1/{expected}",) if expected > 1 else ())
    if target is not None and expected > 1:
        assert min(image.image.size) >= 2 * target


def test_other_formats_are_never_reduced(photograph: Image.Image) -> None:
    assert open_image(encoded(photograph, "PNG", compress_level=1), target_short_side=16).image.size == (512, 512)


def test_reduced_decoding_shows_the_same_image_after_the_resize(photograph: Image.Image) -> None:
    data = encoded(photograph.resize((2048, 2048), Image.Resampling.BICUBIC), "JPEG", quality=92)
    full = open_image(data).image.resize((256, 256), Image.Resampling.BICUBIC)
    for target in (256, 500):
        reduced = open_image(data, target_short_side=target).image
        assert reduced.width < 2048
        small = reduced.resize((256, 256), Image.Resampling.BICUBIC)
        assert np.asarray(ImageChops.difference(full, small)).mean() < 1.5  # grey levels


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_reduced_decoding_does_not_change_how_colours_are_read(mode: str, photograph: Image.Image) -> None:
    data = encoded(photograph.convert(mode), "JPEG", quality=95)
    full = open_image(data).image.resize((64, 64), Image.Resampling.BICUBIC)
    small = open_image(data, target_short_side=64).image
    assert small.size == (128, 128)
    difference = ImageChops.difference(full, small.resize((64, 64), Image.Resampling.BICUBIC))
    assert np.asarray(difference).mean() < 1.5


# ---- modes ----------------------------------------------------------------------------------------------------------

DEEP = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
EIGHT = [0, 0, 1, 1, 128, 255]  # round(v / 257)


def grey(image: DecodedImage) -> list[int]:
    values = pixels(image)
    assert (values[..., :1] == values).all()
    return values[..., 0].ravel().tolist()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_greys_are_scaled_and_not_clipped(kind: str) -> None:
    image = open_image(encoded(Image.fromarray(DEEP), kind))
    assert grey(image) == EIGHT
    assert image.notes == ("16-bit",)


def test_big_endian_and_integer_sixteen_bit_tiffs_are_scaled() -> None:
    swapped = Image.frombytes("I;16B", (6, 1), DEEP.astype(">u2").tobytes())
    assert grey(open_image(encoded(swapped, "TIFF"))) == EIGHT
    integers = open_image(encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"))
    assert grey(integers) == EIGHT
    assert integers.notes == ("32-bit integers taken for 16-bit",)


def test_a_sixteen_bit_tiff_whose_zero_is_white_is_inverted() -> None:
    data = encoded(Image.fromarray(DEEP), "TIFF")
    entry = struct.pack("<HHI", 262, 3, 1)
    assert data.count(entry + b"\1\0") == 1
    assert grey(open_image(data.replace(entry + b"\1\0", entry + b"\0\0"))) == [255 - v for v in EIGHT]


def test_integers_beyond_sixteen_bit_are_refused_with_their_range() -> None:
    assert "from 0 to 65536" in reason(encoded(Image.fromarray(np.array([[0, 65536]], np.int32)), "TIFF"))
    assert "from -1 to 5" in reason(encoded(Image.fromarray(np.array([[-1, 5]], np.int32)), "TIFF"))


def test_sixteen_bit_colours_keep_their_high_bytes() -> None:
    row = b"\0" + struct.pack(">6H", 65535, 32768, 0, 256, 512, 65280)
    image = open_image(png(2, 1, 16, 2, row))
    assert pixels(image).tolist() == [[[255, 128, 0], [1, 2, 255]]]
    assert image.notes == ("16-bit",)
    alpha = open_image(png(1, 1, 16, 4, b"\0" + struct.pack(">2H", 0, 0)))
    assert pixels(alpha).tolist() == [[[255, 255, 255]]]
    assert alpha.notes == ("16-bit", "alpha over white")


def test_floats_from_zero_to_one_are_scaled_and_others_refused() -> None:
    image = open_image(encoded(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "TIFF"))
    assert grey(image) == [0, 128, 255]
    assert image.notes == ("float",)
    assert "from -3 to 812" in reason(encoded(Image.fromarray(np.array([[-3, 812]], np.float32)), "TIFF"))
    assert "float values" in reason(encoded(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF"))


def test_one_bit_becomes_black_and_white() -> None:
    image = open_image(encoded(Image.fromarray(np.array([[True, False]])), "PNG"))
    assert grey(image) == [255, 0]
    assert image.notes == ("1-bit",)


def test_palettes_with_and_without_transparency() -> None:
    indexed = Image.new("P", (3, 1))
    indexed.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    indexed.putdata([0, 1, 2])
    plain = open_image(encoded(indexed, "PNG"))
    assert pixels(plain).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    assert plain.notes == ("palette",)
    one = open_image(encoded(indexed, "GIF", transparency=1))
    assert pixels(one).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    half = open_image(encoded(indexed, "PNG", transparency=bytes([255, 0, 128])))
    assert pixels(half).tolist() == [[[255, 0, 0], [255, 255, 255], [127, 127, 255]]]
    assert half.notes == ("palette", "alpha over white")


@pytest.mark.parametrize("mode, pixel", [("RGBA", (200, 0, 0, 128)), ("LA", (0, 128))])
def test_alpha_is_laid_over_white(mode: str, pixel: tuple[int, ...]) -> None:
    image = open_image(encoded(Image.new(mode, (2, 2), pixel), "PNG"))
    expected = [round(c * 128 / 255 + 255 * 127 / 255) for c in (pixel[:3] if mode == "RGBA" else pixel[:1] * 3)]
    assert np.abs(pixels(image)[0, 0].astype(int) - expected).max() <= 1
    assert image.notes == ("alpha over white",)


def test_an_alpha_channel_that_hides_nothing_changes_nothing(colours: Image.Image) -> None:
    image = open_image(encoded(colours.convert("RGBA"), "PNG"))
    np.testing.assert_array_equal(pixels(image), np.asarray(colours))
    assert image.notes == ()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_or_grey_of_a_png_is_white(bits: int) -> None:
    size = "B" if bits == 8 else "H"
    top = 2**bits - 1
    key = chunk(b"tRNS", struct.pack(">3H", top, 0, 0))
    colour = png(2, 1, bits, 2, b"\0" + struct.pack(f">6{size}", top, 0, 0, 0, top, 0), key)
    assert pixels(open_image(colour)).tolist() == [[[255, 255, 255], [0, 255, 0]]]
    key = chunk(b"tRNS", struct.pack(">H", 0))
    assert grey(open_image(png(2, 1, bits, 0, b"\0" + struct.pack(f">2{size}", 0, top // 2), key))) == [255, 127]


def test_inverted_cmyk_of_a_jpeg_comes_out_in_its_true_colours() -> None:
    colours = {"red": (254, 0, 0), "green": (0, 128, 1), "blue": (0, 0, 254), "white": (255,) * 3, "black": (0,) * 3}
    for name, expected in colours.items():
        cmyk = Image.new("RGB", (16, 16), name).convert("CMYK")
        data = encoded(cmyk, "JPEG", quality=100)
        assert b"Adobe" in data, "Pillow writes CMYK as Photoshop does: inverted, and says so"
        image = open_image(data)
        assert np.abs(pixels(image)[8, 8].astype(int) - expected).max() <= 4, name
        assert image.notes == ("CMYK",)
        assert np.abs(pixels(open_image(encoded(cmyk, "TIFF")))[8, 8].astype(int) - expected).max() <= 4, name


def test_ycck_of_a_jpeg_comes_out_in_its_true_colours() -> None:
    """Photoshop's other form, marked by the transform flag: made here by storing the YCbCr of the ink values."""
    c, m, y, k = 255, 60, 20, 40
    luma = Image.new("RGB", (16, 16), (c, m, y)).convert("YCbCr").getpixel((0, 0))
    ycck = Image.new("CMYK", (16, 16), (*(255 - v for v in luma), k))  # Pillow inverts what it writes
    data = encoded(ycck, "JPEG", quality=100)
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    image = open_image(data[:at] + b"\2" + data[at + 1 :])
    expected = np.asarray(Image.new("CMYK", (1, 1), (c, m, y, k)).convert("RGB"))[0, 0].astype(int)
    assert np.abs(pixels(image)[8, 8] - expected).max() <= 5
    assert image.notes == ("CMYK",)


@pytest.mark.parametrize("mode", ["LAB", "YCbCr"])
def test_lab_and_ycbcr_files_are_converted(mode: str, colours: Image.Image) -> None:
    if mode == "LAB":
        pytest.importorskip("PIL._imagingcms")
    image = open_image(encoded(colours.convert(mode), "TIFF"))
    assert np.abs(pixels(image).astype(int) - np.asarray(colours)).mean() < 2
    assert image.notes == (mode,)


def test_hsv_images_in_memory_are_converted(colours: Image.Image) -> None:
    back = np.asarray(upright_rgb(colours.convert("HSV"))).astype(int)
    assert np.abs(back - np.asarray(colours)).mean() < 3


# ---- several frames -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = open_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert np.abs(pixels(image)[4, 4].astype(int) - (255, 0, 0)).max() <= 2
    assert image.notes[-1] == "first of 3 frames"


def test_a_broken_later_frame_does_not_spoil_the_first() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(open_image(data[:-30]))[0, 0].tolist() == [255, 0, 0]


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    assert reason(png(50000, 50000, 8, 2)) == "decompression bomb: 50000x50000 = 2500 megapixels, limit 179"
    bitmap = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 20000, 20000, 1, 24, 0, 0, 0, 0, 0, 0)
    assert reason(bitmap) == "decompression bomb: 20000x20000 = 400 megapixels, limit 179"
    gif = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
    assert reason(gif + b"\x08\x00;").startswith("decompression bomb: 65535x65535")


def test_the_limit_is_the_callers(colours: Image.Image) -> None:
    assert open_image(encoded(colours, "PNG"), max_pixels=24 * 16).width == 24
    assert reason(encoded(colours, "PNG"), max_pixels=24 * 16 - 1).startswith("decompression bomb: 24x16")
    assert Image.MAX_IMAGE_PIXELS == 1024**3 // 4 // 3
    # above Pillow's own limits: the header is accepted, and what fails is the missing data
    assert reason(png(30000, 20000, 1, 0), max_pixels=700_000_000).startswith("truncated PNG")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "DDS"])
def test_half_a_image_is_refused_and_never_shown_grey(kind: str, colours: Image.Image) -> None:
    data = encoded(colours, kind)
    assert reason(data[: len(data) // 2]).startswith((f"truncated {kind}: ", f"broken {kind}: "))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest drops the filter that the module sets
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "PSD"])
def test_no_cut_and_no_flipped_byte_raises_anything_else(kind: str, colours: Image.Image) -> None:
    """Pillow's zoo of exceptions stays inside: whatever the damage, there is an image or a reason."""
    data = b"8BPS" + os.urandom(60) if kind == "PSD" else encoded(colours, kind)
    rng = np.random.default_rng(0)
    cuts = [data[:n] for n in [*range(1, 40), *rng.integers(40, max(41, len(data)), 15)]]
    flips = []
    for at in rng.integers(8, min(len(data), 300), 60):
        damaged = bytearray(data)
        damaged[at] ^= int(rng.integers(1, 256))
        flips.append(bytes(damaged))
    reasons = []
    for damaged_data in cuts + flips:
        try:
            open_image(damaged_data, max_pixels=10_000_000)
        except ImageError as error:
            reasons.append(str(error))
    assert reasons
    assert all(0 < len(r) < 220 and "\n" not in r for r in reasons)


def test_a_truncated_photograph_says_so(photograph: Image.Image) -> None:
    assert reason(encoded(photograph, "JPEG")[:20000]).startswith("truncated JPEG: image file is truncated")


def test_the_error_of_other_files_shows_their_first_bytes() -> None:
    assert reason(b"") == "empty file (0 bytes)"
    assert reason(b"<!DOCTYPE html><html>not found</html>") == "not an image (begins with '<!DOCTYPE html')"
    assert reason(b"\x7fELF\x02\x01\x01\0\0\0\0\0") == "not an image (begins with bytes 7f 45 4c 46 02 01 01 00)"
    assert reason(bytes(4096)) == "not an image (begins with zeros)"
    assert "Git LFS pointer" in reason(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    assert "pi-heif" in reason(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


def test_programs_that_draw_are_not_run() -> None:
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").startswith("not an image")
    assert reason(b"%PDF-1.7\n").startswith("not an image")


def test_folders_missing_files_links_and_pipes_have_their_reasons(tmp_path: Path) -> None:
    assert reason(tmp_path) == "a folder, not an image"
    assert reason(tmp_path / "nowhere.jpg") == "no such file"
    (tmp_path / "link.jpg").symlink_to("gone.jpg")
    assert reason(tmp_path / "link.jpg") == "dangling link to gone.jpg"
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert reason(tmp_path / "loop.jpg") == "a link that leads to itself"
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason(tmp_path / "pipe.jpg") == "not a regular file"
    if os.geteuid() != 0:
        (tmp_path / "locked.jpg").write_bytes(b"x")
        (tmp_path / "locked.jpg").chmod(0)
        assert reason(tmp_path / "locked.jpg") == "permission denied"


def test_a_stream_that_fails_is_a_reason_too() -> None:
    stream = io.BytesIO(b"x")
    stream.close()
    assert "closed file" in reason(stream)


def test_running_out_of_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch, colours: Image.Image) -> None:
    def exhausted(self: Image.Image) -> None:
        raise MemoryError

    data = encoded(colours, "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", exhausted)
    assert reason(data) == "not enough memory to decode this PNG"


# ---- and the rest ---------------------------------------------------------------------------------------------------


def test_signatures_are_recognised_without_decoding(colours: Image.Image) -> None:
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "DDS"):
        assert is_image_header(encoded(colours, kind)[:32]), kind
    for other in (b"", b"BM is a fine start of a letter to you all", b"<html>", b"PK\3\4", b"P4ss the salt", bytes(32)):
        assert not is_image_header(other), other


def test_threads_decode_the_same_pixels(photograph: Image.Image) -> None:
    data = encoded(photograph, "JPEG")
    expected = pixels(open_image(data, target_short_side=100)).copy()
    start = threading.Barrier(4)

    def work(_: int) -> bool:
        start.wait()
        return all(np.array_equal(pixels(open_image(data, target_short_side=100)), expected) for _ in range(5))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


# ---- formats in a fresh process ------------------------------------------------------------------------------------

# Pillow writes all formats that are read but two: their smallest files by hand, of one grey pixel.
BY_HAND = {
    "PSD": b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, 2, 2, 8, 1) + bytes(12) + bytes(2) + bytes([9]) * 4,
    "QOI": b"qoif" + struct.pack(">IIBB", 2, 2, 3, 0) + b"\xfe\x09\x09\x09" + b"\xc2" + bytes(7) + b"\x01",
}


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_opened_in_a_fresh_process(kind: str, tmp_path: Path) -> None:
    data = BY_HAND.get(kind) or encoded(Image.new("RGB", (16, 16), (9, 9, 9)), kind)
    (tmp_path / "image").write_bytes(data)  # no suffix to go by
    code = (
        "import sys; from dinov3.data.images import open_image; print(open_image(sys.argv[1]).image.getpixel((1, 1)))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "image"], capture_output=True, text=True)
    assert done.stderr == ""
    assert max(abs(v - 9) for v in eval(done.stdout)) <= 2


def test_a_decoder_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, colours: Image.Image) -> None:
    data = encoded(colours, "WEBP")
    factory, _ = Image.OPEN["WEBP"]
    monkeypatch.setitem(Image.OPEN, "WEBP", (factory, lambda head: "WEBP support not installed"))
    assert reason(data) == "WEBP support not installed"


# ---- limits ---------------------------------------------------------------------------------------------------------


def test_a_file_beyond_the_limit_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sparse.jpg"
    with open(path, "wb") as file:
        file.write(encoded(Image.new("RGB", (8, 8)), "JPEG"))
        file.truncate(30 << 30)
    for read in (open_image, read_file):
        with pytest.raises(ImageError, match=r"30,720 MB, more than the 512 MB .*DINOV3_MAX_IMAGE_MB changes it"):
            read(path)
    with open(path, "rb") as stream:
        assert "30,720 MB" in reason(stream)
    monkeypatch.setenv("DINOV3_MAX_IMAGE_MB", "1")
    assert reason(bytes(2 << 20)).startswith("2 MB, more than the 1 MB")
    monkeypatch.setenv("DINOV3_MAX_IMAGE_MB", "none")
    with pytest.raises(DinoError, match="a whole number of megabytes above 0, not 'none'"):
        open_image(path)


def test_links_to_the_kernel_s_files_neither_block_nor_are_read(tmp_path: Path) -> None:
    for name in ("kmsg", "self/mem", "self/pagemap", "self/status", "kcore", "self/fd/0"):
        (tmp_path / (name.replace("/", "-") + ".jpg")).symlink_to(f"/proc/{name}")
    (tmp_path / "log.jpg").symlink_to("/dev/kmsg")
    (tmp_path / "zero").symlink_to("/dev/zero")
    code = "import sys; from dinov3.data.sources import open_source; from dinov3.data.images import open_image\n"
    code += "from dinov3.errors import DinoError, ImageError\n"
    code += "for item in open_source(sys.argv[1]):\n"
    code += "  for read in (lambda: open_image(item.read()), lambda: open_image(sys.argv[1] + '/' + item.path)):\n"
    code += "    try: read()\n    except ImageError as e: print(item.path, e)\n    else: raise SystemExit(item.path)"
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    assert len(done.stdout.splitlines()) == 14  # each item twice; "zero" has no suffix and no header


def test_a_lack_of_memory_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (8, 8)), "PNG"))
    monkeypatch.setattr("dinov3.data.images._to_upright_rgb", full)
    assert reason(tmp_path / "a.png") == "not enough memory to decode this PNG"


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0

    def convert(image: Image.Image, notes: list[str]) -> Image.Image:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        running -= 1
        return image

    data = encoded(Image.new("RGB", (40, 40)), "PNG")
    monkeypatch.setattr("dinov3.data.images._to_upright_rgb", convert)
    for large, expected in ((1599, 1), (1600, 4)):
        most = 0
        monkeypatch.setattr("dinov3.data.images.LARGE", large)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(open_image, [data] * 8))
        assert most == expected
