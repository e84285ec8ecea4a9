"""Instance retrieval: revisited Oxford and Paris, Met, AmsterTime.

    roxford5k/, rparis6k/    gnd_<name>.pkl (or .json), jpg/<name>.jpg
    Met                      ground_truth/{MET_database,testset,valset}.json beside images/ (or the images at the root)
    AmsterTime               new/0000.png …, old/0000.jpg …: the same place today and in the archive

Each is read as lists of images (`ImageList`) and what is known of them. The ground truth of Oxford and Paris is
published as a pickle; it is read without running anything in it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dinov3.data.datasets.base import DataUnpickler, FileDataset
from dinov3.data.images import image_suffix, open_image
from dinov3.errors import DinoError


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
