"""Images between which the true correspondence is known: by depth and camera (NAVI, posed RGB-D frames) or by
annotated keypoints (SPair-71k).

    NAVI      navi_v1/<object>/<scene>/{images/*.jpg, depth/*.png, annotations.json}
    frames    camera-intrinsics.txt, frame-*.{color.jpg|png, depth.png, pose.txt}      (7-Scenes and its like)
    SPair     PairAnnotation/<split>/*.json, ImageAnnotation/<class>/*.json, JPEGImages/<class>/*.jpg

Frames: cameras look along +z, x to the right, y down; points are in metres.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov3.data.datasets.dense import metres, read_map
from dinov3.data.images import open_image
from dinov3.errors import DinoError, one_of

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
        return open_image(self.path).image

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
