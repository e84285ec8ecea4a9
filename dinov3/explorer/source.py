"""The images that the explorer shows, numbered from 0: those of a store, of a folder (or list, shard, table), or one.

Requests name images by number only. An image is read if its file lies, with every link followed, below the source's root or
one of the folders that were embedded, or if the source names exactly that file (a list of paths does). So neither `..` nor a
link leads out.

Shapes: N images, D width of a vector.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dinov3.data.images import DecodedImage, open_image
from dinov3.data.sources import open_source, read_stored
from dinov3.data.sources.items import spellings, stamp_of
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.embedding.place import IMAGES, place_of
from dinov3.embedding.schema import as_matrix
from dinov3.embedding.store import HIDDEN, EmbeddingStore
from dinov3.errors import DinoError, ImageError, StoreError

OWN = ("stamp", "content_hash", "model", "preprocessing", "grid_h", "grid_w", "patches_scale", *HIDDEN)  # not shown


@dataclass
class FrozenModel:
    """The network of the page, for one thread at a time: hold `busy` while it works. `words`: a text's vector, if it has a
    text tower."""

    net: nn.Module
    preprocessing: Preprocessing
    words: Callable[[str], np.ndarray] | None = None
    busy: threading.Lock = field(default_factory=threading.Lock)


class Source:
    """N images. `kind` is store, folder or image; `uri` is what was opened; `root` the folder that names start from."""

    def __init__(
        self,
        kind: str,
        uri: str,
        root: str,
        paths: list[str],
        folders: list[str],
        store: EmbeddingStore | None = None,
        table: Any = None,
    ) -> None:
        self.kind, self.uri, self.root, self.paths, self.store, self.table = kind, uri, root, paths, store, table
        self._folders = [os.path.realpath(folder) for folder in folders if folder]

    @classmethod
    def open(cls, spec: str | os.PathLike[str]) -> Source:
        """A store, or whatever `open_source` lists. Raises `DinoError` where there is no image."""
        uri, folder = place_of(spec)
        if folder is None or (folder / f"{IMAGES}.lance").is_dir() or (folder / "pictures.lance").is_dir():
            return cls._of_store(EmbeddingStore.open(uri))
        listed = open_source(uri)
        paths = [os.path.join(listed.root, item) for item in map(listed.path_of, range(len(listed)))]
        single = listed.kind == "image" and len(paths) == 1
        folders = [listed.root] if Path(uri).expanduser().is_dir() else []
        if single:
            paths = [os.path.realpath(paths[0])]
        return cls("image" if single else "folder", uri, listed.root, paths, folders)

    @classmethod
    def _of_store(cls, store: EmbeddingStore) -> Source:
        shown = [name for name in store.columns if name not in OWN]
        table = store.rows(["id", *shown])
        if not len(table):
            raise StoreError(f"the store at {store.uri} is empty: `dinov3 embed FOLDER --out {store.uri}` fills it")
        return cls(
            "store", store.uri, store.root, table["path"].to_pylist(), [store.root, *store.sources], store, table
        )

    def __len__(self) -> int:
        return len(self.paths)

    # ---- images ------------------------------------------------------------------------------------------------------

    def check(self, number: int) -> int:
        if not 0 <= number < len(self):
            raise DinoError(f"there is no image {number}: this page has {len(self)}, from 0")
        return number

    def name(self, number: int) -> str:
        """The path below the root, or the whole one of an image that lies elsewhere."""
        path, base = self.paths[number], self.root.rstrip(os.sep) + os.sep
        return path.removeprefix(base) if self.root else path

    def file(self, number: int) -> tuple[str, str]:
        """(file with every link followed, what follows it: "", or "#member"). Raises `ImageError` for one that leads out."""
        path = self.paths[self.check(number)]
        if "://" in path:
            raise ImageError("it lies behind an address, which the page does not read")
        for end in [len(path), *(at for at, letter in enumerate(path) if letter == "#")]:
            for name in map(os.fsdecode, spellings(path[:end])):
                if os.path.lexists(name):
                    real = os.path.realpath(name)
                    inside = any(real.startswith(folder.rstrip(os.sep) + os.sep) for folder in self._folders)
                    if not inside and real != name:
                        raise ImageError("its file lies outside the folders of this page, so it is not shown")
                    return real, path[end:]
        raise ImageError("its file is no longer there; `dinov3 store prune` removes such images from a store")

    def stamp(self, number: int) -> str:
        """Changes when the image's file does."""
        return stamp_of(self.file(number)[0])

    def read(self, number: int) -> bytes:
        """The encoded image. Raises `ImageError`."""
        file, member = self.file(number)
        return read_stored(file + member)

    def image(self, number: int, side: int | None = None, max_pixels: int = 178_956_970) -> DecodedImage:
        """The upright image; with `side` perhaps decoded smaller, its short side at least that. Raises `ImageError`."""
        return open_image(self.read(number), target_short_side=side, max_pixels=max_pixels)

    # ---- rows --------------------------------------------------------------------------------------------------------

    @property
    def columns(self) -> dict[str, str]:
        """Name → type of what a filter or an order can use."""
        if self.table is None:
            return {}
        return {f.name: str(f.type) for f in self.table.schema if f.name != "id"}

    def row(self, number: int) -> dict[str, Any]:
        """What is known of an image, as JSON can have it: id, name, width, height, columns."""
        row: dict[str, Any] = {"id": number, "name": self.name(number), "width": None, "height": None}
        if self.table is not None:
            values = self.table.slice(number, 1).to_pylist()[0]
            row |= {name: plain(value) for name, value in values.items() if name not in ("id", "path")}
        return row

    def need_store(self) -> EmbeddingStore:
        if self.store is None:
            raise DinoError(
                f"this needs a store, and {self.uri} is none: make one with `dinov3 embed {self.uri} --out store`, then "
                "`dinov3 explore store`"
            )
        return self.store

    def numbers(self, where: str | None = None, sort: str | None = None) -> np.ndarray:
        """The images that pass an SQL filter, in the order of a column ("-width": falling), int64."""
        return self._numbers(where or None, sort or None)

    @lru_cache(maxsize=16)  # noqa: B019  (a source lives as long as the process)
    def _numbers(self, where: str | None, sort: str | None) -> np.ndarray:
        if where is None and sort is None:
            return np.arange(len(self))
        store = self.need_store()
        found = np.arange(len(self))
        if where is not None:
            found = np.sort(self.numbers_of(store.rows(["id"], where)["id"].to_numpy()))
        if sort is not None:
            import pyarrow.compute as pc

            column = sort.removeprefix("-")
            store.check_columns([column])
            keys = [(column, "descending" if sort.startswith("-") else "ascending"), ("path", "ascending")]
            found = found[pc.sort_indices(self.table.take(found), keys).to_numpy()]
        return found

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.table["id"].to_numpy())

    def numbers_of(self, row_ids: np.ndarray) -> np.ndarray:
        """Numbers of rows by the store's own ids; rows that came after the page was opened are left out."""
        known = self.table["id"].to_numpy()
        places = np.searchsorted(known, row_ids, sorter=self._order).clip(max=len(known) - 1)
        found = self._order[places]
        return found[known[found] == row_ids]

    @cached_property
    def _number_of_path(self) -> dict[str, int]:
        return {path: number for number, path in enumerate(self.paths)}

    def number(self, path: str) -> int | None:
        """The number of an image by its absolute path; None for one that came later."""
        return self._number_of_path.get(path)

    @cached_property
    def vectors(self) -> np.ndarray:
        """Every vector, float32 [N, D], in the order of the numbers."""
        store = self.need_store()
        table = store.rows(["id", "vector"])
        found = np.zeros((len(self), store.facts.dim), np.float32)
        ids = table["id"].to_numpy()
        there = np.isin(ids, self.table["id"].to_numpy())
        found[self.numbers_of(ids)] = as_matrix(table["vector"], store.facts.dim)[there]
        return found


def plain(value: Any) -> Any:
    """A value as JSON and JavaScript can have it: no infinite number, none of more than 53 bits."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and abs(value) > 1 << 53:
        return str(value)
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)
