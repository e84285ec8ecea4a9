"""Frames of a video file at a rate, as items of a source: `clip.mp4#12.500s`. Decoded by PyAV (extra `video`)."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3.data.sources.items import Part, Place
from dinov3.errors import DinoError, ImageError, require

VIDEOS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg")
KEPT = 128 << 20  # bytes of frames that threads may still ask for


class _Reader:
    """Goes forwards through one video; the last frames wait, because threads come in any order."""

    def __init__(self, path: str, fps: float) -> None:
        self.path, self.fps, self.lock = path, fps, threading.Lock()
        self._restart()

    def _restart(self) -> None:
        container = require("av", "video", "reading video files").open(self.path)
        stream = container.streams.video[0]
        self.frames = container.decode(stream)
        self.rate = float(stream.average_rate or 25)
        self.next = self.number = self.size = 0
        self.waiting: OrderedDict[int, bytes] = OrderedDict()
        self.last: Any = None

    def frame(self, k: int) -> bytes:
        """The first frame at or after k / fps seconds as a PPM; the last one where the video ends within a second."""
        with self.lock:
            if k < self.next and k not in self.waiting:
                self._restart()
            while k >= self.next:
                frame = next(self.frames, None)
                if frame is None:
                    break
                time = self.number / self.rate if frame.time is None else frame.time
                self.number += 1
                self.last = (frame, time)
                if time < self.next / self.fps - 1e-6:
                    continue
                ppm = _ppm(frame)
                while time >= self.next / self.fps - 1e-6:  # one frame may serve several instants
                    self._keep(ppm)
            if k >= self.next:
                if self.last is None or self.last[1] < k / self.fps - 1:
                    raise ImageError(f"truncated video: it ends before {k / self.fps:.3f} s")
                return _ppm(self.last[0])
            return self.waiting[k]

    def _keep(self, ppm: bytes) -> None:
        self.waiting[self.next] = ppm
        self.next += 1
        self.size += len(ppm)
        while self.size > KEPT and len(self.waiting) > 1:
            self.size -= len(self.waiting.popitem(last=False)[1])


def _ppm(frame: Any) -> bytes:
    image = frame.to_image()
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


_reader = threading.Lock()
_open: OrderedDict[tuple[str, str, float], _Reader] = OrderedDict()  # the two videos that were read last


@dataclass(frozen=True, slots=True)
class _Frame:
    path: str
    stamp: str
    fps: float
    k: int

    def read(self) -> bytes:
        try:
            with _reader:
                key = (self.path, self.stamp, self.fps)
                reader = _open.pop(key, None) or _Reader(self.path, self.fps)
                _open[key] = reader
                while len(_open) > 2:
                    _open.popitem(last=False)
            return reader.frame(self.k)
        except DinoError:
            raise
        except Exception as error:  # a decoder raises anything
            raise _broken(error) from None


def frame_at(path: str, seconds: float) -> bytes:
    """The frame that `Video` names `{path}#{seconds}s`, as a PPM: the first at or after that time. Raises `ImageError`."""
    after = max(0.0, seconds - 0.0005 + 1e-9)  # names are rounded to milliseconds
    try:
        with require("av", "video", "reading video files").open(path) as container:
            stream = container.streams.video[0]
            container.seek(int(after / stream.time_base), stream=stream)  # the key frame before
            for number, frame in enumerate(container.decode(stream)):
                if frame.time is None or (number == 0 and frame.time > seconds + 0.0005):
                    break  # no times, or not before: from the beginning
                if frame.time >= after - 1e-6:
                    return _ppm(frame)
        return _Reader(path, 1 / after if after else 1.0).frame(int(after > 0))
    except DinoError:
        raise
    except Exception as error:
        raise _broken(error) from None


def _broken(error: Exception) -> ImageError:
    reason = "it holds no video" if isinstance(error, IndexError) else " ".join(str(error).split())[:160]
    return ImageError(f"broken video: {reason}")


@dataclass
class Video(Part):
    """One video file; `frames` of it are taken, `fps` a second."""

    path: str
    name: str
    stamp: str
    fps: float
    frames: int
    kind: str = "video"

    @classmethod
    def open(cls, path: Path, name: str, stamp: str, fps: float) -> Video:
        av = require("av", "video", "reading video files")
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
                seconds = seconds or (container.duration or 0) / 1e6 or stream.frames / float(stream.average_rate or 25)
        except Exception as error:
            raise _broken(error) from None
        return cls(str(path), name, stamp, fps, max(1, math.ceil(seconds * fps - 1e-6)))

    def __len__(self) -> int:
        return self.frames

    def path_of(self, i: int) -> str:
        return f"{self.name}#{i / self.fps:.3f}s"

    def stamp_of(self, i: int) -> str:
        return f"{self.stamp}@{i / self.fps:.3f}"

    def place_of(self, i: int) -> Place:
        return _Frame(self.path, self.stamp, self.fps, i)
