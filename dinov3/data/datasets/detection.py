"""Images with boxes: COCO's JSON and Pascal VOC's XML.

    CocoDetection:root=/data/coco:split=val2017         annotations/instances_val2017.json and val2017/*.jpg
    CocoDetection:root=/data/mine:annotations=boxes.json     any file of that form; images below root (or root/images)
    VocDetection:root=/data/VOCdevkit/VOC2007:split=test     Annotations/*.xml, JPEGImages/, ImageSets/Main/test.txt
    VocDetection:root=/data/raccoon                     annotations/*.xml beside images/, without a list

`data[i]` → (upright RGB image, target), the target a dict of tensors, one row a box:

    boxes_xyxy_px float32 [T, 4]   left, top, right, bottom; (0, 0) is the top left corner of the image
    labels        int64 [T]        index into `class_names` (COCO: in the order of `category_ids`)
    crowd         bool [T]         COCO's crowds and VOC's difficult objects: training leaves them out, scoring ignores them
    area_px2      float32 [T]      what COCO's small, medium and large go by: of the mask where one is known, else of the box

Images without any box stay, with T = 0: they teach what is nothing. Boxes are cut to the image; those without area
are left out (`left_out` counts them). VOC counts pixels from 1 and includes the last: 1–1 is one pixel wide, 0 to 1 here.
"""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3.data import names as known_names
from dinov3.data.datasets import make_dataset
from dinov3.data.datasets.base import FileDataset
from dinov3.data.datasets.dense import files_of
from dinov3.data.images import IMAGE_SUFFIXES, read_file
from dinov3.errors import DinoError, ImageError, UnknownName, did_you_mean

Target = dict[str, Tensor]


@dataclass(frozen=True)
class Box:
    """One annotation as the file has it, in our frame."""

    xyxy_px: tuple[float, float, float, float]
    label: int
    crowd: bool = False
    area_px2: float | None = None


@dataclass(frozen=True)
class Row:
    """One image and what is known of it before it is opened."""

    path: Path
    id: int
    boxes: tuple[Box, ...]
    size_hw: tuple[int, int] | None = None


class BoxDataset(FileDataset):
    """Images and boxes, independent of the file format."""

    def __init__(self, rows: Sequence[Row], class_names: Sequence[str], category_ids: Sequence[int] | None = None):
        self.rows = list(rows)
        self.paths = [row.path for row in self.rows]
        self.class_names = list(class_names)
        self.category_ids = list(category_ids) if category_ids is not None else list(range(1, len(class_names) + 1))
        self.without_area = [row.path.name for row in self.rows for box in row.boxes if not _has_area(box)]
        self.left_out = len(self.without_area)
        self.unannotated: list[str] = []  # images beside those that have a file of boxes

    def image_id(self, index: int) -> int:
        """The number by which results name the image."""
        return self.rows[index].id

    def target(self, index: int, size_hw: tuple[int, int] | None = None) -> Target:
        """The boxes of image `index`, cut to its size where that is known."""
        row = self.rows[index]
        h, w = size_hw or row.size_hw or (float("inf"), float("inf"))
        boxes = []
        for box in filter(_has_area, row.boxes):
            x1, y1, x2, y2 = box.xyxy_px
            cut = (max(0.0, x1), max(0.0, y1), min(float(w), x2), min(float(h), y2))
            if cut[2] > cut[0] and cut[3] > cut[1]:
                area = box.area_px2 if box.area_px2 is not None else (cut[2] - cut[0]) * (cut[3] - cut[1])
                boxes.append((cut, box.label, box.crowd, area))
        return {
            "boxes_xyxy_px": torch.tensor([b for b, *_ in boxes], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([label for _, label, _, _ in boxes], dtype=torch.int64),
            "crowd": torch.tensor([crowd for _, _, crowd, _ in boxes], dtype=torch.bool),
            "area_px2": torch.tensor([area for *_, area in boxes], dtype=torch.float32),
        }

    def target_of(self, index: int, image: Any) -> Target:
        size_hw, stated = (image.height, image.width), self.rows[index].size_hw
        if stated is not None and stated != size_hw:
            turned = "; it was turned upright by its EXIF tag, its boxes were not" if stated == size_hw[::-1] else ""
            raise ImageError(
                f"{self.name(index)} has {size_hw[1]}×{size_hw[0]} pixels, its boxes are for {stated[1]}×{stated[0]}{turned}"
            )
        return self.target(index, size_hw)


def _has_area(box: Box) -> bool:
    x1, y1, x2, y2 = box.xyxy_px
    return x2 > x1 and y2 > y1


# ---- COCO -----------------------------------------------------------------------------------------------------------


class CocoDetection(BoxDataset):
    """COCO's form: `images`, `annotations` with `bbox` (left, top, width, height), `categories`.

    A bare list of annotations is read too, as results files have it: then the images are those named, with COCO's 12
    digits, and the categories COCO's own.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str | None = None,
        annotations: str | os.PathLike[str] | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise DinoError(f"{self.root} is no folder; CocoDetection needs root=FOLDER with the images in it")
        self.file = self._annotation_file(split, annotations)
        content = _json(self.file)
        if isinstance(content, list):
            content = self._of_list(content)
        if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
            raise DinoError(f"{self.file} is no COCO file of boxes: it needs the lists images, annotations, categories")
        try:
            self._read(content, split)
        except (KeyError, TypeError, ValueError) as error:
            raise DinoError(f"{self.file} is no COCO file of boxes: {type(error).__name__} {error}") from None

    def _read(self, content: Mapping[str, Any], split: str | None) -> None:
        listed = content.get("categories")
        names = (
            {int(c["id"]): str(c["name"]) for c in listed}
            if listed
            else {i: name for i, name in enumerate(known_names.coco()) if name}
        )
        ids = sorted(names)
        number = {category: i for i, category in enumerate(ids)}
        boxes: dict[int, list[Box]] = {int(image["id"]): [] for image in content["images"]}
        for annotation in content["annotations"]:
            image_id, category = int(annotation["image_id"]), int(annotation["category_id"])
            if image_id not in boxes or category not in number:
                what = f"image {image_id}" if image_id not in boxes else f"category {category}"
                raise DinoError(f"{self.file}: an annotation names {what}, which the file does not list")
            x, y, w, h = (float(v) for v in annotation["bbox"])
            area = float(annotation["area"]) if annotation.get("area") is not None else None
            crowd = bool(annotation.get("iscrowd", 0))
            boxes[image_id].append(Box((x, y, x + w, y + h), number[category], crowd, area))
        places = self._places(split)
        rows = []
        for image in content["images"]:
            size = (int(image["height"]), int(image["width"])) if image.get("height") and image.get("width") else None
            path = _first_file([place / str(image["file_name"]) for place in places])
            rows.append(Row(path, int(image["id"]), tuple(boxes[int(image["id"])]), size))
        super().__init__(rows, [names[i] for i in ids], ids)

    def _annotation_file(self, split: str | None, annotations: str | os.PathLike[str] | None) -> Path:
        if annotations is not None:
            given = Path(annotations).expanduser()
            tried = [given if given.is_absolute() else self.root / given, given]
        elif split is not None:
            tried = [
                self.root / "annotations" / f"instances_{split}.json",
                self.root / split / "_annotations.coco.json",
            ]
        else:
            tried = [self.root / "_annotations.coco.json", *sorted((self.root / "annotations").glob("*.json"))]
            found = [path for path in tried if path.is_file()]
            if len(found) > 1:
                raise DinoError(
                    f"{self.root} has several annotation files; say which: annotations={found[0].relative_to(self.root)}, "
                    "or split=val2017"
                )
        for path in tried:
            if path.is_file():
                return path
        raise DinoError(f"there is no COCO annotation file at {' or '.join(map(str, tried))}; pass annotations=FILE")

    def _places(self, split: str | None) -> list[Path]:
        """Folders in which images are looked for."""
        splits = [split] if split else []
        if hit := re.fullmatch(r"instances_(.+)", self.file.stem):
            splits.append(hit[1])
        places = [self.root / s for s in splits] + [self.root / "images" / s for s in splits]
        return [*places, self.root, self.root / "images", self.file.parent]

    def _of_list(self, annotations: list[Any]) -> dict[str, Any]:
        images = []
        for image in sorted({int(a["image_id"]) for a in annotations if isinstance(a, dict) and "image_id" in a}):
            stem = f"{image:012d}"
            names = [stem + suffix for suffix in sorted(IMAGE_SUFFIXES) if (self.root / (stem + suffix)).is_file()]
            images.append({"id": image, "file_name": names[0] if names else stem + ".jpg"})
        return {"images": images, "annotations": annotations}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DinoError(f"{path} is no JSON: {error}") from None


def _first_file(paths: Sequence[Path]) -> Path:
    """The first that exists; else the first, and opening it fails with the reason."""
    return next((path for path in paths if path.is_file()), paths[0])


# ---- Pascal VOC -----------------------------------------------------------------------------------------------------

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class VocDetection(BoxDataset):
    """One XML file an image. Classes are VOC's twenty where all names are among them, else those that occur, sorted."""

    def __init__(self, root: str | os.PathLike[str], *, split: str | None = None) -> None:
        self.root = Path(root).expanduser()
        folder = _first_folder(self.root, "Annotations", "annotations")
        self.images = _first_folder(self.root, "JPEGImages", "images")
        files = sorted(folder.glob("*.xml"), key=_natural)
        if split is not None:
            listed = self._list(split)
            files = [folder / f"{stem}.xml" for stem in listed]
        if not files:
            raise DinoError(f"there are no .xml files in {folder}")
        parsed = [self._parse(file) for file in files]
        names = {name for _, _, objects in parsed for name, *_ in objects}
        class_names = VOC_CLASSES if names <= set(VOC_CLASSES) and names else tuple(sorted(names))
        number = {name: i for i, name in enumerate(class_names)}
        rows = []
        for i, (path, size_hw, objects) in enumerate(parsed):
            boxes = tuple(Box(xyxy, number[name], difficult) for name, xyxy, difficult in objects)
            rows.append(Row(path, i + 1, boxes, size_hw))
        super().__init__(rows, class_names)
        if split is None:
            self.unannotated = sorted(
                {p.name for p in files_of(self.images, IMAGE_SUFFIXES)} - {Path(p).name for p in self.paths}
            )

    def _list(self, split: str) -> list[str]:
        file = self.root / "ImageSets" / "Main" / f"{split}.txt"
        if not file.is_file():
            known = [p.stem for p in sorted(file.parent.glob("*.txt"))]
            hint = did_you_mean(split, known) or (f"; there are {', '.join(known[:6])}" if known else "")
            raise UnknownName(f"there is no list {file}{hint}; without split, all images are taken")
        return [line.split()[0] for line in file.read_text().splitlines() if line.strip()]

    def _parse(self, file: Path) -> tuple[Path, tuple[int, int] | None, list[tuple[str, Any, bool]]]:
        """(image, its size, (class, box, difficult) of every object)."""
        try:
            tree = ElementTree.fromstring(read_file(file))
            size = tree.find("size")
            size_hw = None
            if size is not None and float(size.findtext("width", "0")) > 0:
                size_hw = (int(float(size.findtext("height", "0"))), int(float(size.findtext("width", "0"))))
            objects = []
            for item in tree.iter("object"):
                box = item.find("bndbox")
                if box is None:
                    raise ValueError("an object without bndbox")
                x1, y1, x2, y2 = (float(box.findtext(k, "")) for k in ("xmin", "ymin", "xmax", "ymax"))
                name = (item.findtext("name") or "").strip()
                objects.append((name, (x1 - 1, y1 - 1, x2, y2), item.findtext("difficult", "0").strip() == "1"))
        except (ElementTree.ParseError, ValueError) as error:
            raise DinoError(f"{file} is no VOC annotation: {error}") from None
        named = tree.findtext("filename") or ""
        stems = [named, *(file.stem + s for s in sorted(IMAGE_SUFFIXES))]
        return _first_file([self.images / stem for stem in stems if stem]), size_hw, objects


def _first_folder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DinoError(
        f"{root} has no folder {' or '.join(names)}; VocDetection needs XML files in one and images in another"
    )


def _natural(path: Path) -> list[Any]:
    """raccoon-2 before raccoon-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.stem)]


# ---- of either form --------------------------------------------------------------------------------------------------


def boxes_at(root: Path, split: str | None = None) -> BoxDataset:
    """A folder with boxes in VOC's or COCO's form, or a file of COCO's in the folder of its images."""
    if root.is_file():
        return CocoDetection(root.parent, annotations=root.name)
    folders = [root / name for name in ("Annotations", "annotations") if (root / name).is_dir()]
    if any(next(folder.glob("*.xml"), None) for folder in folders):
        return VocDetection(root, split=split)
    if not any(next(root.glob(name), None) for name in ("*.json", "*/*.json")):
        raise DinoError(f"{root} has no boxes: neither annotations/*.xml (VOC's form) nor annotations/*.json (COCO's)")
    return CocoDetection(root, split=split)


def make_box_dataset(text: str) -> BoxDataset:
    """The data set of a spec, a folder or a file of COCO's."""
    path = Path(text).expanduser()
    data: Any = boxes_at(path) if path.exists() else make_dataset(text)
    if not isinstance(data, BoxDataset):
        raise DinoError(f"{text} has no boxes; use CocoDetection:root=… or VocDetection:root=…")
    return data
