"""Images with a number at every pixel: class maps (ADE20K, VOC, Cityscapes) and depth maps (NYUv2), or your own folders.

    ADE20K:root=/data/ade:split=VAL                     ADE20K_object150_val.txt, or the official folder as downloaded
    NYU:root=/data/nyu:split=TEST                       nyu_test.txt, lines "<rgb> <depth> <focal>"
    DepthList:root=/data/kitti:list=test.txt:unit=256   any list of that form; `unit`: integers per metre
    VOC2012:root=/data/VOCdevkit/VOC2012:split=VAL      Cityscapes:root=/data/cityscapes:split=VAL
    DenseFolder:root=/data/mine:split=train             images and masks that have the same names; see `DenseFolder`

`data[i]` → (upright RGB image, target): class numbers uint8 or int64 [h, w]; depth float32 [h, w] in metres, 0 where it is
unknown; heights float32 in metres, NaN where they are unknown (0 is the ground). Masks are what the files hold: ADE20K's 0
("other") is turned into "ignored" by whoever trains or scores (`metrics.reduce_zero_label`; `zero_is_other`
marks such a set).
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Container, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from dinov3.data.datasets.base import FileDataset
from dinov3.data.images import IMAGE_SUFFIXES, read_file
from dinov3.data.sources import files_below
from dinov3.errors import DinoError, ImageError, did_you_mean, one_of
from dinov3.files import nonexistent

KINDS = ("classes", "depth", "height")
UNKNOWN_DEPTH = 65535  # what depth cameras write into 16 bits where they saw nothing


ONE_CLASS = (
    "the masks hold only the number 0 (besides 255, which does not count): one class cannot be learned. "
    "Black and white masks are 0 and 255; write 0 and 1"
)


def _number(key: str, text: str, *, zero: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (value > 0 or (zero and value == 0)):
        raise DinoError(f"{key} is a number {'of at least' if zero else 'above'} 0, not {text!r}")
    return value


class DenseDataset(FileDataset):
    """Pairs of files: an image, and a map of its size. `kind` says what the map holds."""

    kind: str = "classes"
    class_names: list[str] | None = None
    ignore_index: int = 255
    zero_is_other: bool = False  # masks count classes from 1, and 0 is none of them (ADE20K)
    unit: float = 1000.0  # integers per metre in depth files; floating-point files are in metres
    left_out: int = 0  # images for which there was no target

    def __init__(self, pairs: Sequence[tuple[Path, Path]]) -> None:
        self.pairs = list(pairs)
        self.paths = [image for image, _ in self.pairs]

    @property
    def n_classes(self) -> int | None:
        """None where no file lists the classes; `highest_class` reads the masks."""
        return None if self.class_names is None else len(self.class_names)

    @cached_property
    def class_numbers(self) -> set[int]:
        """The numbers in any mask that are not ignored. Reads all masks."""
        found: set[int] = set()
        for index in range(len(self)):
            found.update(np.unique(self.target(index)).tolist())
        return found - {self.ignore_index}

    def highest_class(self) -> int:
        """The largest of `class_numbers`; -1 where there is none."""
        return max(self.class_numbers, default=-1)

    def target(self, index: int) -> np.ndarray:
        """The map [h, w] of image `index`: class numbers, or metres."""
        path = self.pairs[index][1]
        values = read_map(path)
        if self.kind == "classes":
            if values.dtype.kind == "f":
                raise ImageError(f"{path} holds {values.dtype} values, but class masks hold whole numbers")
            return self.relabelled(values)
        if self.kind == "height":
            return heights(values, self.unit, getattr(self, "ignored", None))
        return metres(values, self.unit)

    def relabelled(self, mask: np.ndarray) -> np.ndarray:
        """From the numbers in the files to the classes of the benchmark."""
        return mask

    def target_of(self, index: int, image: Any) -> np.ndarray:
        target = self.target(index)
        if (image.height, image.width) != target.shape:
            raise ImageError(
                f"{self.name(index)} has {image.width}×{image.height} pixels and {self.pairs[index][1].name} "
                f"{target.shape[1]}×{target.shape[0]}: a target has the size of its image"
            )
        return target


# ---- one map -------------------------------------------------------------------------------------------------------


def read_map(path: str | os.PathLike[str]) -> np.ndarray:
    """The numbers of a mask or depth file, [h, w]: PNG (palette, 8 or 16 bit), TIFF, PFM, or a numpy `.npy`."""
    data = read_file(path)
    try:
        if str(path).endswith(".npy"):
            values = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            with Image.open(io.BytesIO(data)) as image:
                if image.mode in ("RGB", "RGBA", "LA"):
                    values = _grey(np.array(image), path)
                elif image.mode in ("1", "L", "P", "I", "F") or image.mode.startswith("I;16"):
                    values = np.array(image)
                else:
                    raise ImageError(f"{path} is an image of colours ({image.mode}), not of numbers")
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        reason = "it is no image file" if isinstance(error, UnidentifiedImageError) else error
        raise ImageError(f"{path} cannot be read as a map of numbers: {reason}") from None
    values = values.squeeze() if values.ndim == 3 else values
    if values.ndim != 2:
        raise ImageError(f"{path} holds an array {list(values.shape)}; a map is [height, width]")
    if values.dtype.kind in "bu" and values.dtype.itemsize == 1:
        return values.astype(np.uint8)
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int64)


def _grey(values: np.ndarray, path: str | os.PathLike[str]) -> np.ndarray:
    """Greys that were saved as RGB are numbers still; colours are not."""
    colours = values[..., :3] if values.shape[-1] >= 3 else values[..., :1]
    if (colours != colours[..., :1]).any():
        raise ImageError(
            f"{path} is a mask of colours; masks hold the number of the class at every pixel (8-bit grey or palette): "
            "replace each colour by its number"
        )
    return colours[..., 0]


def metres(values: np.ndarray, unit: float) -> np.ndarray:
    """Depth as stored → float32 metres, 0 where it is unknown."""
    if values.dtype.kind == "f":
        depth = values.astype(np.float32)
    else:
        depth = np.where(values == UNKNOWN_DEPTH, 0, values).astype(np.float32) / np.float32(unit)
    depth[~np.isfinite(depth) | (depth < 0)] = 0
    return depth


def heights(values: np.ndarray, unit: float, ignored: int | None) -> np.ndarray:
    """Heights as stored → float32 metres, NaN where they are unknown."""
    known = np.isfinite(values) if ignored is None else np.isfinite(values) & (values != ignored)
    scale = 1.0 if values.dtype.kind == "f" else unit
    return np.where(known, values.astype(np.float32) / np.float32(scale), np.float32(np.nan))


# ---- benchmarks ----------------------------------------------------------------------------------------------------


class ADE20K(DenseDataset):
    """150 classes; masks hold 1 … 150, and 0 for everything else.

    Names come from `ADE20K_object150_{train,val}.txt` (relative to `images/`, sorted) or, where that file is not, from
    the folders `images/{training,validation}` of the official download.
    """

    SPLITS: ClassVar = {"TRAIN": "training", "VAL": "validation"}
    zero_is_other = True

    def __init__(self, *, root: str | os.PathLike[str], split: str) -> None:
        self.root, split = Path(root).expanduser(), one_of("the split", split.upper(), self.SPLITS)
        listed = self.root / f"ADE20K_object150_{split.lower()}.txt"
        images = self.root / "images"
        folder = images / self.SPLITS[split]
        if listed.is_file():
            names = sorted(line.strip() for line in listed.read_text().splitlines() if line.strip())
        else:
            names = [str(p.relative_to(images)) for p in files_of(folder, (".jpg",))] if folder.is_dir() else []
        if not names:
            raise DinoError(f"no images of ADE20K {split} in {self.root}: expected {listed.name}, or {folder}")
        annotations = self.root / "annotations"
        super().__init__([(images / n, annotations / Path(n).with_suffix(".png")) for n in names])
        info = self.root / "objectInfo150.txt"
        if info.is_file():
            rows = [line.split("\t") for line in info.read_text().splitlines()[1:] if line.strip()]
            self.class_names = [row[-1].split(",")[0].strip() for row in rows]

    @property
    def n_classes(self) -> int | None:
        return 150


class DepthList(DenseDataset):
    """Depth images by a list file: sorted lines `<rgb> <depth> <anything>`, relative to the root, a leading "/" dropped.

    Lines whose depth is "None" (KITTI's lists have some) are left out.
    """

    kind = "depth"
    PARSED: ClassVar = {"unit": partial(_number, "unit")}

    def __init__(self, *, root: str | os.PathLike[str], list: str, unit: float = 1000.0) -> None:
        self.root, self.unit = Path(root).expanduser(), unit
        path = self.root / list
        try:
            lines = sorted(line for line in path.read_text().splitlines() if line.strip())
        except OSError as error:
            raise DinoError(f"the list of images {path} cannot be read: {error.strerror}") from None
        pairs = []
        for line in lines:
            words = line.split()
            if len(words) < 2:
                raise DinoError(f"a line of {path.name} is '<rgb> <depth> <focal length>', not {line!r}")
            if words[1] == "None":
                self.left_out += 1
                continue
            pairs.append((self.root / words[0].lstrip("/"), self.root / words[1].lstrip("/")))
        if not pairs:
            raise DinoError(f"{path} lists no image with a depth map")
        super().__init__(pairs)


class NYU(DepthList):
    """NYUv2 as extracted for BTS: 16-bit millimetres, 640×480. VAL and TEST are the same 654 images."""

    SPLITS: ClassVar = {"TRAIN": "nyu_train.txt", "VAL": "nyu_test.txt", "TEST": "nyu_test.txt"}

    def __init__(self, *, root: str | os.PathLike[str], split: str) -> None:
        super().__init__(root=root, list=self.SPLITS[one_of("the split", split.upper(), self.SPLITS)])


class VOC2012(DenseDataset):
    """Pascal VOC segmentation: 20 classes and background (0), borders ignored (255)."""

    SPLITS = ("TRAIN", "VAL", "TRAINVAL")
    NAMES = (
        "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
        "pottedplant sheep sofa train tvmonitor"
    )

    def __init__(self, *, root: str | os.PathLike[str], split: str) -> None:
        self.root, split = Path(root).expanduser(), one_of("the split", split.upper(), self.SPLITS)
        listed = self.root / "ImageSets" / "Segmentation" / f"{split.lower()}.txt"
        if not listed.is_file():
            raise DinoError(f"{listed} does not exist: root is the folder that holds ImageSets, as VOCdevkit/VOC2012")
        names = sorted(line.strip() for line in listed.read_text().splitlines() if line.strip())
        images, masks = self.root / "JPEGImages", self.root / "SegmentationClass"
        super().__init__([(images / f"{n}.jpg", masks / f"{n}.png") for n in names])
        self.class_names = self.NAMES.split()


class Cityscapes(DenseDataset):
    """19 of the label numbers count, under the benchmark's training numbers; all others are ignored."""

    SPLITS = ("TRAIN", "VAL", "TEST")
    NAMES = (
        "road,sidewalk,building,wall,fence,pole,traffic light,traffic sign,vegetation,terrain,sky,person,rider,car,truck,"
        "bus,train,motorcycle,bicycle"
    )
    IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

    def __init__(self, *, root: str | os.PathLike[str], split: str) -> None:
        self.root, split = Path(root).expanduser(), one_of("the split", split.upper(), self.SPLITS)
        images = sorted((self.root / "leftImg8bit" / split.lower()).glob("*/*_leftImg8bit.png"))
        if not images:
            raise DinoError(f"no *_leftImg8bit.png in {self.root}/leftImg8bit/{split.lower()}/<city>/")
        masks = self.root / "gtFine" / split.lower()
        ends = ("_leftImg8bit.png", "_gtFine_labelIds.png")
        super().__init__([(p, masks / p.parent.name / p.name.replace(*ends)) for p in images])
        self.class_names = self.NAMES.split(",")
        self._table = np.full(256, 255, np.uint8)
        self._table[list(self.IDS)] = range(len(self.IDS))

    def relabelled(self, mask: np.ndarray) -> np.ndarray:
        return self._table[np.clip(mask, 0, 255)]


# ---- your own ------------------------------------------------------------------------------------------------------

_IMAGE_WORDS = ("images", "image", "imgs", "img", "pictures", "photos", "rgb", "color", "JPEGImages")
_TARGET_WORDS = (
    "annotations", "annotation", "annot", "masks", "mask", "labels", "label", "targets", "target", "gt", "segmentation",
    "depth", "depths", "height", "heights", "chm",
)  # fmt: skip
_IMAGE_ROLE = re.compile(rf"[._-]({'|'.join(_IMAGE_WORDS)})$", re.IGNORECASE)
_TARGET_ROLE = re.compile(rf"[._-]({'|'.join(_TARGET_WORDS)})$", re.IGNORECASE)
_MAP_SUFFIXES = frozenset((".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".pfm", ".npy"))


class DenseFolder(DenseDataset):
    """Images and targets of a folder, paired by name. These layouts are found by themselves (here: split=train):

        images/train/x.jpg   annotations/train/x.png     (also masks, labels, targets, gt, depth)
        train/x.jpg          trainannot/x.png            (also train_masks, …)
        train/images/x.jpg   train/masks/x.png
        images/x.jpg         masks/x.png                 (no split)
        x.jpg                masks/x.png
        x.color.jpg          x.depth.png                 (one folder; also x_mask.png)

    targets: the folder of the targets where it is another, relative to the root; "{split}" stands for the split.
    kind: "classes", "depth" or "height"; by default depth where "depth" is in the name of the folder or file, or in `.npy`
    files of floats; height where "height" or "chm" is. unit: integers per metre (depth 1000: millimetres; height 1).
    select: a slice of the sorted pairs ("0:80"). ignore: a number that does not count, in masks besides 255. classes: names
    separated by commas; by default the lines of `classes.txt` in the root, or the list in `classes.json`.
    """

    PARSED: ClassVar = {
        "unit": partial(_number, "unit"),
        "ignore": lambda text: int(_number("ignore", text, zero=True)),
        "classes": lambda text: [name.strip() for name in text.split(",")],
    }

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        split: str | None = None,
        targets: str | None = None,
        kind: str | None = None,
        unit: float | None = None,
        select: str | None = None,
        ignore: int | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.root, self.ignored = Path(root).expanduser(), ignore
        if not self.root.is_dir():
            raise DinoError(f"{self.root} is not a folder" if self.root.exists() else nonexistent(self.root))
        one_of("kind", kind, (*KINDS, None))
        images, maps = _find(self.root, split, targets)
        pairs, self.left_out = _paired(images, maps)
        if not pairs:
            raise DinoError(
                f"no image in {images} has a target of the same name in {maps}; name the folder of masks or depth maps "
                "with targets=…"
            )
        super().__init__(pairs[_slice(select)] if select else pairs)
        if not self.pairs:
            raise DinoError(f"select={select} leaves none of the {len(pairs)} pairs in {self.root}")
        self.kind = kind or _guessed_kind(self.pairs[0][1], self.root)
        self.unit = unit if unit is not None else 1.0 if self.kind == "height" else 1000.0
        self.class_names = list(classes) if classes else _class_names(self.root)

    def relabelled(self, mask: np.ndarray) -> np.ndarray:
        return mask if self.ignored is None else np.where(mask == self.ignored, self.ignore_index, mask)


def _find(root: Path, split: str | None, targets: str | None) -> tuple[Path, Path]:
    """The folders of images and of targets (the same one where both lie together)."""
    if split:
        candidates = [root / w / split for w in _IMAGE_WORDS]
        candidates += [root / split / w for w in _IMAGE_WORDS] + [root / split]
    else:
        candidates = [root / w for w in _IMAGE_WORDS] + [root]
    images = next((c for c in candidates if c.is_dir()), None)
    if images is None:
        there = sorted(p.name for p in root.iterdir() if p.is_dir())
        hint = did_you_mean(split or "", there) or f"; it holds {', '.join(there) or 'no folders'}"
        raise DinoError(f"{root} has no folder for split {split!r}{hint}")
    if targets is not None:
        folder = root / targets.replace("{split}", split or "")
        if not folder.is_dir():
            raise DinoError(f"the folder of targets {folder} does not exist")
        return images, folder
    maps: list[Path] = []
    if split and images == root / split:
        maps = [root / f"{split}{sep}{w}" for w in _TARGET_WORDS for sep in ("", "_", "-")]
        maps += [root / w / split for w in _TARGET_WORDS]
    elif split and images.parent == root / split:
        maps = [root / split / w for w in _TARGET_WORDS]
    elif split:
        maps = [root / w / split for w in _TARGET_WORDS]
    else:
        maps = [root / w for w in _TARGET_WORDS]
    return images, next((m for m in maps if m.is_dir()), images)


def files_of(folder: Path, suffixes: Container[str]) -> list[Path]:
    """The files below a folder with these endings (in lower case), sorted."""
    return sorted(folder / name for name in files_below(folder) if os.path.splitext(name)[1].lower() in suffixes)


def _paired(images: Path, maps: Path) -> tuple[list[tuple[Path, Path]], int]:
    """Pairs sorted by name, and how many images have no target."""

    def stem(path: Path, folder: Path) -> str:
        return str(path.relative_to(folder).with_suffix(""))

    together = images == maps
    found: dict[str, Path] = {}
    for path in files_of(maps, _MAP_SUFFIXES):
        bare = _TARGET_ROLE.sub("", stem(path, maps))
        if together and bare == stem(path, maps):
            continue  # an image, not a target
        if bare in found:
            raise DinoError(
                f"{found[bare].name} and {path.name} in {maps} are both targets of {bare!r}: keep one of them"
            )
        found[bare] = path
    pairs, alone = [], 0
    for path in files_of(images, IMAGE_SUFFIXES):
        name = stem(path, images)
        if _TARGET_ROLE.search(name) if together else maps in path.parents:
            continue
        target = found.get(name) or found.get(_IMAGE_ROLE.sub("", name))
        if target is None:
            alone += 1
        else:
            pairs.append((path, target))
    return pairs, alone


def _guessed_kind(target: Path, root: Path) -> str:
    parts = target.relative_to(root).parts if root in target.parents else target.parts[-2:]
    for word, kind in (("depth", "depth"), ("height", "height"), ("chm", "height")):
        if any(word in part.lower() for part in parts):
            return kind
    if target.suffix == ".npy" and np.load(target, mmap_mode="r", allow_pickle=False).dtype.kind == "f":
        return "depth"
    return "classes"


def _class_names(root: Path) -> list[str] | None:
    if (root / "classes.txt").is_file():
        return [line.strip() for line in (root / "classes.txt").read_text().splitlines() if line.strip()]
    if (root / "classes.json").is_file():
        names = json.loads((root / "classes.json").read_text())
        if not isinstance(names, list):
            raise DinoError(f"{root / 'classes.json'} must hold a list of class names")
        return [str(n) for n in names]
    return None


def _slice(text: str) -> slice:
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(re.fullmatch(r"-?\d*", p) for p in parts):
        raise DinoError(f"select is a slice of the sorted images, as 0:80 or 80: or ::2, not {text!r}")
    return slice(*(int(p) if p else None for p in parts))
