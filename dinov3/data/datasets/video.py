"""Videos: sequences of images with masks (DAVIS, YouTube-VOS, MOSE), and labelled clips for classification.

Two layouts of masked videos are read, both below one root:

    JPEGImages/480p/<sequence>/00000.jpg    Annotations/480p/<sequence>/00000.png    ImageSets/2017/val.txt   (DAVIS)
    JPEGImages/<sequence>/00000.jpg         Annotations/<sequence>/00000.png         (YouTube-VOS, MOSE: below train/)

Masks hold object numbers (0 background); frames without a mask are processed and not scored. A mask of 0 and 255 only
(DAVIS 2016) has one object, number 1; elsewhere 255 is void and becomes background.

Labelled clips lie in one folder per class, as video files (decoded by PyAV) or as folders of frames.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov3.data.datasets.dense import read_map
from dinov3.data.images import image_suffix, open_file
from dinov3.data.sources.containers import VIDEOS
from dinov3.errors import DinoError, UnknownName, only_known, require

VOID = 255


# ---- masked videos --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskedVideo:
    """One sequence: its frames in order, and the mask of each where there is one."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path | None, ...]

    def __len__(self) -> int:
        return len(self.frames)

    def frame(self, index: int) -> Image.Image:
        return open_file(self.frames[index])

    @cached_property
    def binary(self) -> bool:
        """Whether masks are 0 and 255 only, as in DAVIS 2016, where 255 is the object and no void."""
        first = next((path for path in self.masks if path is not None), None)
        return first is not None and set(np.unique(read_map(first)).tolist()) == {0, VOID}

    def mask(self, index: int) -> np.ndarray | None:
        """Object numbers [H, W], uint8."""
        path = self.masks[index]
        if path is None:
            return None
        numbers = read_map(path)
        if numbers.dtype != np.uint8:
            raise DinoError(f"{path} holds {numbers.dtype} values; a mask holds object numbers in 8 bits")
        numbers[numbers == VOID] = 1 if self.binary else 0
        return numbers


class MaskedVideos(Sequence[MaskedVideo]):
    """The sequences below a root.

    split: a list of sequence names below `ImageSets` ("2017/val", or simply "val"), or None for all of them.
    sequences: only these. Sequences that start without an object are refused by what tracks, not here.
    """

    def __init__(
        self, root: str | os.PathLike[str], *, split: str | None = None, sequences: Sequence[str] | None = None
    ) -> None:
        self.root = Path(root).expanduser()
        images, masks = self.root / "JPEGImages", self.root / "Annotations"
        if not (images.is_dir() and masks.is_dir()):
            raise DinoError(
                f"{self.root} holds no JPEGImages and Annotations: give the folder above them (DAVIS, train/ of MOSE)"
            )
        for resolution in ("480p", "Full-Resolution", "1080p"):
            if (images / resolution).is_dir() and (masks / resolution).is_dir():
                images, masks = images / resolution, masks / resolution
                break
        there = sorted(p.name for p in images.iterdir() if p.is_dir())
        wanted = list(sequences) if sequences else self._listed(split) if split else there
        only_known(f"{images} holds no sequence", wanted, there)
        if not wanted:
            raise DinoError(f"{images} holds no sequences")
        self.videos = [self._video(name, images / name, masks / name) for name in wanted]

    def _listed(self, split: str) -> list[str]:
        sets = self.root / "ImageSets"
        for path in (sets / f"{split}.txt", sets / "2017" / f"{split}.txt"):
            if path.is_file():
                return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
        lists = [str(p.relative_to(sets).with_suffix("")) for p in sorted(sets.rglob("*.txt"))]
        raise UnknownName(f"{sets} holds no list {split!r}; there: {', '.join(lists) or 'none at all'}")

    @staticmethod
    def _video(name: str, frames: Path, masks: Path) -> MaskedVideo:
        images = _images_of(frames)
        found = [masks / f"{p.stem}.png" for p in images]
        return MaskedVideo(name, tuple(images), tuple(p if p.is_file() else None for p in found))

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: Any) -> Any:
        return self.videos[index]


# ---- labelled clips -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """Some frames of a video and when they are shown."""

    frames: tuple[Image.Image, ...]
    seconds: np.ndarray  # [T]
    size_wh: tuple[int, int]


def read_frames(path: str | os.PathLike[str], indices: Sequence[int], *, fps: float = 25.0) -> Clip:
    """The frames of these numbers, ascending or not, of a video file or of a folder of images.

    fps: of a folder of images, which does not say it; a file's own time stamps are used.
    """
    source = Path(path)
    if source.is_dir():
        images = _images_of(source)
        frames = [open_file(images[i]) for i in indices]
        seconds = np.array([i / fps for i in indices])
    else:
        frames, seconds = _decode(source, indices)
    return Clip(tuple(frames), seconds, frames[0].size)


def stream_frames(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Every frame of a video file, or of a folder of images, in order; one at a time, whatever the length."""
    source = Path(path)
    if source.is_dir():
        for image in _images_of(source):
            yield open_file(image)
        return
    av = require("av", "video", "reading video files")
    with _opened(av, source) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in _frames(av, container, stream, source):
            yield frame.to_image()


def frame_rate(path: str | os.PathLike[str], default: float = 25.0) -> float:
    """Frames a second of a video file; `default` where the file does not say, and of a folder of images."""
    source = Path(path)
    if source.is_dir():
        return default
    with _opened(require("av", "video", "reading video files"), source) as container:
        return float(container.streams.video[0].average_rate or default)


def n_frames(path: str | os.PathLike[str]) -> int:
    """How many frames a video file or a folder of images has."""
    source = Path(path)
    if source.is_dir():
        return len(_images_of(source))
    av = require("av", "video", "reading video files")
    with _opened(av, source) as container:
        stream = container.streams.video[0]
        # containers may not say, or say wrongly; counting packets decodes nothing
        return stream.frames or sum(1 for packet in container.demux(stream) if packet.size)


def _images_of(folder: Path) -> list[Path]:
    images = sorted(p for p in folder.iterdir() if image_suffix(p.name))
    if not images:
        raise DinoError(f"{folder} holds no images")
    return images


def _opened(av: Any, path: Path) -> Any:
    try:
        container = av.open(str(path))
    except (OSError, ValueError) as error:  # av's errors are both
        raise DinoError(f"{path} cannot be read as a video ({getattr(error, 'strerror', None) or error})") from None
    if not container.streams.video:
        container.close()
        raise DinoError(f"{path} holds no video")
    return container


def _frames(av: Any, container: Any, stream: Any, path: Path) -> Iterator[Any]:
    try:
        yield from container.decode(stream)
    except av.error.FFmpegError as error:
        raise DinoError(f"{path} is broken: a frame cannot be decoded ({error.strerror or error})") from None


def _decode(path: Path, indices: Sequence[int]) -> tuple[list[Image.Image], np.ndarray]:
    """Decodes from the start up to the last frame wanted: exact for every codec, and clips are short."""
    av = require("av", "video", "reading video files")
    wanted = set(indices)
    found: dict[int, tuple[Image.Image, float]] = {}
    with _opened(av, path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or 25)
        last: tuple[Image.Image, float] | None = None
        number = -1
        for number, frame in enumerate(_frames(av, container, stream, path)):
            if number in wanted:
                last = found[number] = (frame.to_image(), number / rate if frame.time is None else frame.time)
            if number >= max(wanted):
                break
    if number < 0:
        raise DinoError(f"{path} holds no frame that can be decoded")
    for index in wanted - set(found):  # the container promised more than it has
        if last is None:
            raise DinoError(f"{path} was cut short: frame {index} was wanted and only {number + 1} could be decoded")
        found[index] = last
    return [found[i][0] for i in indices], np.array([found[i][1] for i in indices])


class Clips:
    """Labelled videos: `root/<class>/<video file or folder of frames>`, or a list file of lines "path label".

    A list file's paths are relative to it; labels are names or numbers. Classes are numbered in sorted order (numbers
    stay as they are), over the class names given if any, so that a validation set agrees with its training set.
    """

    def __init__(self, root: str | os.PathLike[str], *, class_names: Sequence[str] | None = None) -> None:
        self.root = Path(root).expanduser()
        if self.root.is_file():
            pairs = [line.rsplit(maxsplit=1) for line in self.root.read_text().splitlines() if line.strip()]
            if any(len(pair) != 2 for pair in pairs):
                raise DinoError(f"a line of {self.root} is no 'path label'")
            items = [(self.root.parent / path, label) for path, label in pairs]
        elif self.root.is_dir():
            items = [
                (video, folder.name)
                for folder in sorted(p for p in self.root.iterdir() if p.is_dir())
                for video in sorted(folder.iterdir())
                if video.is_dir() or video.suffix.lower() in VIDEOS
            ]
        else:
            raise DinoError(f"{self.root} is neither a folder of classes nor a list of videos")
        if not items:
            raise DinoError(f"{self.root} holds no videos: they lie in one folder per class ({', '.join(VIDEOS)})")
        labels = {label for _, label in items}
        order = sorted(labels, key=lambda x: (0, int(x), x) if x.isdigit() else (1, 0, x))
        self.class_names = list(class_names) if class_names is not None else order
        number = {name: i for i, name in enumerate(self.class_names)}
        if unknown := labels - set(number):
            raise UnknownName(f"{self.root}: class {min(unknown)!r} is not among the {len(number)} known ones")
        self.paths = [path for path, _ in items]
        self.labels = np.array([number[label] for _, label in items], np.int64)

    def __len__(self) -> int:
        return len(self.paths)
