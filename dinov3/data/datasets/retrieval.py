"""Benchmarks of retrieval (Oxford, Paris, Met, AmsterTime) and of correspondence (NAVI, posed frames, SPair-71k)."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov3.data.datasets.base import DataUnpickler, FileDataset
from dinov3.data.datasets.dense import metres, read_map
from dinov3.data.images import image_suffix, open_file, open_image
from dinov3.errors import DinoError, one_of

# ---- retrieval -------------------------------------------------------------------------------------------------------
# Instance retrieval: revisited Oxford and Paris, Met, AmsterTime.
#
#     roxford5k/, rparis6k/    gnd_<name>.pkl (or .json), jpg/<name>.jpg
#     Met                      ground_truth/{MET_database,testset,valset}.json beside images/ (or the images at the root)
#     AmsterTime               new/0000.png …, old/0000.jpg …: the same place today and in the archive
#
# Each is read as lists of images (`ImageList`) and what is known of them. The ground truth of Oxford and Paris is
# published as a pickle; it is read without running anything in it.


class ImageList(FileDataset):
    """Images by their paths, each perhaps cut to a box and brought to a square before anything else happens.

    boxes: (x0, y0, x1, y1) for each image, or None. square: None, or the side of a square; fit "pad": the longer side
    becomes that long and black fills the rest, the image in the middle; "crop": the shorter side does, and the middle
    stays.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        boxes: Sequence[Sequence[float]] | None = None,
        square: int | None = None,
        fit: str = "pad",
    ) -> None:
        self.paths, self.boxes, self.square, self.fit = list(paths), boxes, square, fit

    def name(self, index: int) -> str:
        """The path, and what is done to the image: features are cached under this name."""
        box = "" if self.boxes is None else "#" + ",".join(f"{v:g}" for v in self.boxes[index])
        return f"{self.paths[index]}{box}" + (f"#{self.fit}{self.square}" if self.square else "")

    def read(self, index: int) -> bytes:
        encoded = super().read(index)
        if self.boxes is None and self.square is None:
            return encoded
        image = open_image(encoded).image
        if self.boxes is not None:
            image = image.crop(tuple(round(v) for v in self.boxes[index]))  # type: ignore[arg-type]
        if self.square is not None:
            image = squared(image, self.square, self.fit)
        out = io.BytesIO()
        image.save(out, "PNG", compress_level=1)
        return out.getvalue()


def squared(image: Image.Image, side: int, fit: str = "pad") -> Image.Image:
    """A square of `side` pixels (see `ImageList`), bicubic."""
    chosen = max(image.size) if fit == "pad" else min(image.size)
    w, h = (max(1, round(s * side / chosen)) for s in image.size)
    out = Image.new("RGB", (side, side))
    out.paste(image.resize((w, h), Image.Resampling.BICUBIC), (round((side - w) / 2), round((side - h) / 2)))
    return out


# ---- revisited Oxford and Paris -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Revisited:
    """Database and query images; per query a box (x0, y0, x1, y1) and database numbers that are easy, hard, junk."""

    database: list[Path]
    queries: list[Path]
    boxes: list[tuple[float, ...]]
    easy: list[np.ndarray]
    hard: list[np.ndarray]
    junk: list[np.ndarray]


def revisited(root: str | os.PathLike[str], name: str) -> Revisited:
    """`name`: roxford5k or rparis6k."""
    base = Path(root).expanduser()
    base = base / name if (base / name).is_dir() else base
    files = [base / f"gnd_{name}.json", base / f"gnd_{name}.pkl"]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise DinoError(f"{base} holds no gnd_{name}.pkl: it is no folder of {name}")
    try:
        if file.suffix == ".json":
            content = json.loads(file.read_bytes())
        else:
            content = DataUnpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()
        rows = content["gnd"]
        return Revisited(
            [_image(base / "jpg", n) for n in content["imlist"]],
            [_image(base / "jpg", n) for n in content["qimlist"]],
            [tuple(float(v) for v in row["bbx"]) for row in rows],
            *([np.asarray(row[key], dtype=np.int64).reshape(-1) for row in rows] for key in ("easy", "hard", "junk")),
        )
    except (KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise DinoError(f"{file} is no ground truth of {name}: {type(error).__name__} {error}") from None


def _image(folder: Path, name: str) -> Path:
    """A listed name has no ending."""
    path = folder / name
    return path if image_suffix(name) else folder / f"{name}.jpg"


# ---- Met ------------------------------------------------------------------------------------------------------------


def met(root: str | os.PathLike[str], part: str) -> tuple[list[Path], np.ndarray]:
    """(images, exhibit numbers) of "database", "test" or "val"; −1 is a distractor, of no exhibit."""
    base = Path(root).expanduser()
    file = {"database": "MET_database", "test": "testset", "val": "valset"}[part]
    listed = next((p for p in (base / "ground_truth", base) if (p / f"{file}.json").is_file()), None)
    if listed is None:
        raise DinoError(f"{base} holds no ground_truth/{file}.json: it is no folder of Met")
    rows = json.loads((listed / f"{file}.json").read_bytes())
    places = [p for p in (base / "images", base) if rows and (p / rows[0]["path"]).is_file()] or [base / "images"]
    key = "id" if part == "database" else "MET_id"
    return [places[0] / row["path"] for row in rows], np.array([int(row.get(key, -1)) for row in rows], np.int64)


# ---- AmsterTime -----------------------------------------------------------------------------------------------------


def amstertime(root: str | os.PathLike[str]) -> tuple[list[Path], list[Path]]:
    """(images of today, archive images), pair by pair."""
    base = Path(root).expanduser()
    sides = []
    for name in ("new", "old"):
        folder = base / name
        found = folder.iterdir() if folder.is_dir() else iter(())
        sides.append({p.stem: p for p in sorted(found) if image_suffix(p.name)})
    new, old = sides
    if not new or set(new) != set(old):
        alone = sorted(set(new) ^ set(old))
        why = f"{alone[0]} has no partner" if alone else "they are empty or missing"
        raise DinoError(f"{base} needs pairs of images in new/ and old/ with the same names; {why}")
    return [new[k] for k in sorted(new)], [old[k] for k in sorted(new)]


# ---- correspondences -------------------------------------------------------------------------------------------------
# Images between which the true correspondence is known: by depth and camera (NAVI, posed RGB-D frames) or by
# annotated keypoints (SPair-71k).
#
#     NAVI      navi_v1/<object>/<scene>/{images/*.jpg, depth/*.png, annotations.json}
#     frames    camera-intrinsics.txt, frame-*.{color.jpg|png, depth.png, pose.txt}      (7-Scenes and its like)
#     SPair     PairAnnotation/<split>/*.json, ImageAnnotation/<class>/*.json, JPEGImages/<class>/*.jpg
#
# Frames: cameras look along +z, x to the right, y down; points are in metres.


NAVI_SHORT_SIDE = 1024  # the benchmark shrinks its large photographs first


@dataclass(frozen=True)
class View:
    """An image, the depth of its pixels, and its camera.

    group: what shows the same thing (object or scene). world_to_camera [4, 4], metres. focal_px: for an image of
    `size_wh`. center_px: the principal point, or None for the middle.
    """

    name: str
    group: str
    path: Path
    depth: Path
    world_to_camera: np.ndarray
    focal_px: float
    size_wh: tuple[int, int]
    center_px: tuple[float, float] | None = None
    inverse: bool = False  # depth is stored as 655350 / mm

    def image(self) -> Image.Image:
        return open_file(self.path)

    def depth_m(self) -> np.ndarray:
        """[H, W] float32, 0 where there is none."""
        raw = read_map(self.depth)
        if self.inverse:
            return np.divide(np.float32(655.350), raw, out=np.zeros(raw.shape, np.float32), where=raw > 0)
        return metres(raw, 1000)


def quaternion_to_rotation(q: Any) -> np.ndarray:
    """[3, 3] of a quaternion (real part first), normalised."""
    w, x, y, z = np.asarray(q, float) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def navi(root: str | os.PathLike[str], scene: str = "wild_set") -> list[View]:
    """The views of one scene of every object that has it and at least one other."""
    base = Path(root).expanduser()
    base = base / "navi_v1" if (base / "navi_v1").is_dir() else base
    views: list[View] = []
    objects = sorted(p for p in base.iterdir() if p.is_dir()) if base.is_dir() else []
    for thing in objects:
        scenes = [p for p in thing.iterdir() if (p / "annotations.json").is_file()]
        if not (thing / scene / "annotations.json").is_file() or len(scenes) < 2:
            continue
        folder = thing / scene
        for row in json.loads((folder / "annotations.json").read_text()):
            camera, name = row["camera"], row["filename"]
            pose = np.eye(4)
            pose[:3, :3] = quaternion_to_rotation(camera["q"])
            pose[:3, 3] = np.asarray(camera["t"], float) / 1000
            height, width = (int(v) for v in row["image_size"])
            views.append(
                View(
                    f"{thing.name}/{name}", thing.name, _navi_file(folder / "images", name),
                    _navi_file(folder / "depth", Path(name).with_suffix(".png").name), pose,
                    float(camera["focal_length"]), (width, height), inverse=True,
                )
            )  # fmt: skip
    if not views:
        raise DinoError(f"{base} holds no object with {scene}/annotations.json and another scene: it is no NAVI folder")
    return views


def _navi_file(folder: Path, name: str) -> Path:
    """The shrunken copy where somebody made one."""
    small = folder / f"downsampled_{name}"
    return small if small.is_file() else folder / name


def frames(root: str | os.PathLike[str]) -> list[View]:
    """Posed RGB-D frames; depth in millimetres, poses camera to world."""
    base = Path(root).expanduser()
    intrinsics = base / "camera-intrinsics.txt"
    if not intrinsics.is_file():
        raise DinoError(
            f"{base} holds no camera-intrinsics.txt: frames are frame-*.color.jpg, .depth.png and .pose.txt"
        )
    K = np.loadtxt(intrinsics)
    views: list[View] = []
    for pose in sorted(base.glob("*.pose.txt")):
        stem = pose.name.removesuffix(".pose.txt")
        color = next((p for e in ("jpg", "png") if (p := base / f"{stem}.color.{e}").is_file()), None)
        depth = base / f"{stem}.depth.png"
        world = np.loadtxt(pose)
        if color is None or not depth.is_file() or not np.isfinite(world).all():
            continue  # tracking was lost, or half a frame
        with Image.open(color) as image:
            size = image.size
        center = (float(K[0, 2]), float(K[1, 2]))
        views.append(View(stem, base.name, color, depth, np.linalg.inv(world), float(K[0, 0]), size, center))
    if len(views) < 2:
        raise DinoError(f"{base} holds fewer than two frames with colour, depth and pose")
    return views


@dataclass(frozen=True)
class KeypointPair:
    """Two images of one class and keypoints annotated in both, (x, y) [K, 2] in the images' pixels."""

    category: str
    source: Path
    target: Path
    source_xy: np.ndarray
    target_xy: np.ndarray
    target_box: tuple[float, float, float, float]
    viewpoint: int  # difference 0, 1, 2


SPAIR_SPLITS = ("trn", "val", "test")


def spair(
    root: str | os.PathLike[str], *, split: str = "test", per_class: int = 200, seed: int = 20
) -> list[KeypointPair]:
    """SPair-71k: of every class the first `per_class` pairs of its sorted list, shuffled with Python's `seed`."""
    base = Path(root).expanduser()
    base = base / "SPair-71k" if (base / "SPair-71k").is_dir() else base
    one_of("the split of SPair", split, SPAIR_SPLITS)
    files = sorted((base / "PairAnnotation" / split).glob("*.json"))
    if not files:
        raise DinoError(f"{base / 'PairAnnotation' / split} holds no pairs: it is no SPair-71k folder")
    by_class: dict[str, list[Path]] = {}
    for file in files:  # 000001-2008_000585-2008_005221:aeroplane.json
        by_class.setdefault(file.stem.split(":")[-1], []).append(file)
    keypoints: dict[Path, dict[str, list[float] | None]] = {}

    def points(category: str, image: str) -> dict[str, list[float] | None]:
        file = base / "ImageAnnotation" / category / f"{Path(image).stem}.json"
        if file not in keypoints:
            keypoints[file] = json.loads(file.read_text())["kps"]
        return keypoints[file]

    pairs: list[KeypointPair] = []
    for category, listed in sorted(by_class.items()):
        random.Random(seed).shuffle(listed)
        for file in listed[:per_class]:
            row = json.loads(file.read_text())
            a, b = points(category, row["src_imname"]), points(category, row["trg_imname"])
            both = [k for k in a if a[k] is not None and b.get(k) is not None]
            images = base / "JPEGImages" / category
            x0, y0, x1, y1 = (float(v) for v in row["trg_bndbox"])
            pairs.append(
                KeypointPair(
                    category, images / row["src_imname"], images / row["trg_imname"],
                    np.array([a[k] for k in both], float).reshape(-1, 2),
                    np.array([b[k] for k in both], float).reshape(-1, 2),
                    (x0, y0, x1, y1), int(row.get("viewpoint_variation", 0)),
                )
            )  # fmt: skip
    return pairs
