"""Frames of a video file as items of a source."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3.data.sources import open_source, read_stored
from dinov3.errors import DinoError, ImageError

av = pytest.importorskip("av")


def write_greys(path: Path, codec: str, rate: int | Fraction, frames: int, *, first: int = 0) -> Path:
    """A video of which the grey of a frame is 8 times its number; its clock begins `first` frames after zero."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for n in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * n, np.uint8), format="rgb24")
            frame.pts, frame.time_base = first + n, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Three seconds at 10 frames a second."""
    return write_greys(tmp_path_factory.mktemp("video") / "clip.avi", "mjpeg", 10, 30)


def number(data: bytes) -> int:
    return round(np.asarray(Image.open(io.BytesIO(data))).mean() / 8)


@pytest.mark.parametrize("fps, frames", [(1, [0, 10, 20]), (2, [0, 5, 10, 15, 20, 25]), (0.5, [0, 20])])
def test_frames_are_taken_at_the_rate(clip, fps, frames) -> None:
    source = open_source(clip, fps=fps)
    assert source.kind == "video"
    assert [item.path for item in source] == [f"clip.avi#{k / fps:.3f}s" for k in range(len(frames))]
    assert [number(item.read()) for item in source] == frames
    assert [number(item.read()) for item in reversed(list(source))] == frames[::-1]


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_seconds_count_from_the_first_frame_whatever_the_clock_of_the_file(tmp_path, suffix) -> None:
    path = write_greys(tmp_path / f"late.{suffix}", "mpeg4", 25, 30, first=125)
    items = list(open_source(path, fps=5))
    assert [number(item.read()) for item in items] == [0, 5, 10, 15, 20, 25]
    assert [number(read_stored(tmp_path / item.path)) for item in items] == [0, 5, 10, 15, 20, 25]


def test_a_frame_that_is_shown_for_two_seconds_serves_all_their_instants(tmp_path) -> None:
    path = write_greys(tmp_path / "slow.mp4", "mpeg4", Fraction(1, 2), 3)
    assert [number(item.read()) for item in open_source(path, fps=2)] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]


def test_a_folder_of_videos_names_the_way_to_take_them(clip) -> None:
    with pytest.raises(DinoError, match=r"videos are taken where they are named: .*/\*\.avi"):
        open_source(clip.parent)


def test_threads_get_the_frames_of_one_reader(clip) -> None:
    items = list(open_source(clip, fps=10))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda item: number(item.read()), items)) == list(range(30))


@pytest.mark.parametrize("codec, suffix, fps", [("mjpeg", "avi", 10), ("mpeg4", "mp4", 30), ("mpeg4", "mkv", 7)])
def test_a_frame_is_read_again_by_its_name(tmp_path, codec, suffix, fps) -> None:
    path = tmp_path / f"clip.{suffix}"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size = 12  # key frames in between
        for n in range(60):
            pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = n, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for item in open_source(path, fps=fps):
        assert read_stored(tmp_path / item.path) == item.read()
    for name in ("clip.{}#9.000s", "clip.{}#1.jpg"):
        with pytest.raises(DinoError, match=r"it ends before 9.000 s|no image"):
            read_stored(tmp_path / name.format(suffix))
    with pytest.raises(ImageError, match=r"many images: name one of them by adding #12.500s, a time"):
        read_stored(tmp_path / f"clip.{suffix}")


def test_a_broken_video_is_an_item_with_its_reason(clip, tmp_path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    (item,) = open_source(tmp_path / "bad.mp4")
    with pytest.raises(ImageError, match="broken video"):
        item.read()
    (tmp_path / "cut.avi").write_bytes(clip.read_bytes()[: clip.stat().st_size // 3])
    results = []
    for item in open_source(tmp_path / "cut.avi", fps=5):
        try:
            results.append(number(item.read()))
        except ImageError as error:
            results.append(str(error))
    assert results[0] == 0
    assert all(isinstance(result, int) or "video" in result for result in results)
    with pytest.raises(DinoError, match="0 frames a second"):
        open_source(clip, fps=0)
