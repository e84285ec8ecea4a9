"""Features of data sets, computed once and cached on disk; labels and few-shot subsets.

A column of numbers (the CLS token or the mean patch of one layer) is a .npy file in a folder named by the model's
name, the preprocessing and the images. A later request for the same column, from another evaluation or with another
pooling, reads the file. Distributed processes write one file together, so the folder must be visible to all of them.

Legend: N images, D width, C classes, L labels in a set.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.data.datasets.base import ImageDataset
from dinov3.data.images import DecodedImage, open_image
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.errors import DinoError, ImageError
from dinov3.eval.arguments import FewShotSection
from dinov3.features import batched, outputs
from dinov3.heads.encoder import widths_of
from dinov3.runlog import Ticker, peak_memory_gb
from dinov3.weights.identity import name_of

# ---- labels ---------------------------------------------------------------------------------------------------------


def labels_of(dataset: ImageDataset, what: str) -> np.ndarray:
    """Labels int64 [N], or multi-hot [N, C]. Raises `DinoError` for images without a class."""
    targets = dataset.get_targets() if hasattr(dataset, "get_targets") else None
    if targets is None:
        targets = [-1 if (label := dataset.label(i)) is None else label for i in range(len(dataset))]
    labels = np.asarray(targets).astype(np.int64)
    if labels.ndim == 1 and (len(labels) == 0 or labels.min() < 0):
        n = int((labels < 0).sum())
        raise DinoError(
            f"{what}: {n} of {len(labels)} images have no class; each needs one (a sub-folder for each class)"
        )
    return labels


def class_count(labels: np.ndarray) -> int:
    """The largest label + 1, or the width of multi-hot labels."""
    return labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1


@dataclass(frozen=True)
class Targets:
    """Labels of test images, and how a classifier's scores are compared with them.

    labels: int [N], multi-hot [N, C], or sets [N, L] padded with −1. groups: a name for each image (fairness tables,
    ImageNet-C's "fog/3"). columns: for each class of the data set the classifier's columns that mean it, where it has
    only some of the classifier's classes (ImageNet-A, -R, ObjectNet).
    """

    labels: np.ndarray
    groups: np.ndarray | None = None
    columns: list[list[int]] | None = None

    def chosen(self, scores: np.ndarray) -> np.ndarray:
        """Scores of the data set's own classes; the highest where several columns mean one class."""
        if self.columns is None:
            return scores
        last = max(max(c) for c in self.columns)
        if last >= scores.shape[1]:
            raise DinoError(
                f"this data set's classes are columns up to {last} of an ImageNet-1k classifier, and this one has "
                f"{scores.shape[1]}: train on ImageNet-1k"
            )
        return np.stack([scores[:, c].max(1) for c in self.columns], axis=1)


def test_targets(dataset: ImageDataset, what: str) -> Targets:
    """The targets of a data set, with the hooks that the reference's data sets have."""
    groups = dataset.get_groupby_labels() if hasattr(dataset, "get_groupby_labels") else None
    mapping = dataset.get_imagenet_class_mapping() if hasattr(dataset, "get_imagenet_class_mapping") else None
    columns = None if mapping is None else [[int(c)] if np.ndim(c) == 0 else [int(x) for x in c] for c in mapping]
    return Targets(labels_of(dataset, what), None if groups is None else np.asarray(groups), columns)


def check_classes(train: ImageDataset, test: ImageDataset, what: str) -> None:
    """Raises where both data sets name their classes and number them differently: sub-folders are counted in order.

    what: the spec of the test images."""
    names: list[Any] = [getattr(dataset, "class_names", None) for dataset in (train, test)]
    if names[0] and names[1] and list(names[0])[: len(names[1])] != list(names[1]):
        here, there = (sorted(set(a) - set(b)) for a, b in (names[::-1], names))
        hints = [
            f"only {who} {', '.join(odd[:3])}" for who, odd in (("these have", here), ("training has", there)) if odd
        ]
        raise DinoError(
            f"{what}: these images have other classes than those of training, so their numbers mean different things: "
            + (" and ".join(hints) or "their order differs")
        )


# ---- columns ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One cached array [N, D]: the CLS token ("cls") or the mean patch ("mean") of a layer."""

    token: str
    layer: int

    def file(self, norm: bool, dtype: str) -> str:
        return f"{self.token}-layer{self.layer}{'' if norm else '-prenorm'}-{dtype}.npy"

    def of(self, output: Mapping[str, Any]) -> Tensor:
        """This column [B, D] of the output of its layer (`features.run`)."""
        return output["cls"] if self.token == "cls" else output["patches"].contiguous().flatten(1, 2).mean(1)


def columns_of(layers: Sequence[int], pool: str) -> list[Column]:
    """The columns that make up a vector, in order (see `FeatureSection`)."""
    cls, means = [Column("cls", i) for i in layers], [Column("mean", i) for i in layers]
    return {"cls": cls, "mean": means, "cls+mean": [*cls, means[-1]]}[pool]


def dataset_id(dataset: ImageDataset) -> str:
    """Hash (12 hex digits) of the images: their names, and their files' stamps where they are known."""
    digest = hashlib.sha256(type(dataset).__name__.encode())
    digest.update(str(getattr(getattr(dataset, "source", dataset), "root", "")).encode())
    stamps = ((dataset.name(i), dataset.stamp(i)) for i in range(len(dataset)))
    digest.update("\n".join(name if stamp is None else f"{name} {stamp}" for name, stamp in stamps).encode())
    return digest.hexdigest()[:12]


def decoded(dataset: ImageDataset, i: int, target_short_side: int | None = None) -> DecodedImage:
    """Image i, decoded. Raises `ImageError` if it cannot be read: without it this would be another benchmark."""
    try:
        return open_image(dataset.read(i), target_short_side=target_short_side)
    except ImageError as error:
        raise ImageError(f"{dataset.name(i)}: {error}; an evaluation needs all of its images") from None


class FeatureCache:
    """Cached columns of features; each (weights, preprocessing, images) has a folder of its own."""

    def __init__(self, model: nn.Module, root: Path, log: Callable[[str], None]) -> None:
        self.model, self.root, self.log = model, root, log
        self.model_name = name_of(model)

    def columns(
        self,
        dataset: ImageDataset,
        preprocessing: Preprocessing,
        columns: Sequence[Column],
        *,
        norm: bool = True,
        dtype: str = "float32",
        batch_size: int = 64,
        workers: int = 5,
    ) -> list[np.ndarray]:
        """One memory-mapped array [N, D_i] for each column; what is not there yet is computed in one pass."""
        folder = self.root / self.model_name / f"{preprocessing.id}-{dataset_id(dataset)}"
        missing = [c for c in dict.fromkeys(columns) if not (folder / c.file(norm, dtype)).exists()]
        missing = distributed.broadcast_object(missing)
        if missing:
            self._compute(folder, dataset, preprocessing, missing, norm, dtype, batch_size, workers)
        return [np.load(folder / c.file(norm, dtype), mmap_mode="r") for c in columns]

    def _compute(
        self,
        folder: Path,
        dataset: ImageDataset,
        preprocessing: Preprocessing,
        columns: Sequence[Column],
        norm: bool,
        dtype: str,
        batch_size: int,
        workers: int,
    ) -> None:
        rank, world, N = distributed.rank(), distributed.world(), len(dataset)
        if N == 0:
            raise DinoError("the data set is empty: there is nothing to evaluate")
        layers = sorted({c.layer for c in columns})
        each = -(-N // world)
        share = range(min(rank * each, N), min((rank + 1) * each, N))
        owner = distributed.broadcast_object(os.getpid())
        parts = {c: folder / f".{c.file(norm, dtype)}.{owner}" for c in columns}
        arrays: dict[Column, np.ndarray] = {}
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            about = {"model": self.model_name, "preprocessing": json.loads(preprocessing.to_json()), "images": N}
            (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")
        done, ticker = 0, Ticker(self.log, "features", len(share))
        widths = dict(zip(layers, widths_of(self.model, layers)))  # type: ignore[arg-type]
        for c in columns:
            if rank == 0:
                np.lib.format.open_memmap(parts[c], "w+", np.dtype(dtype), (N, widths[c.layer]))
        distributed.barrier()
        for c in columns:
            if not parts[c].exists():
                raise DinoError(
                    f"{parts[c]} was made by rank 0, but rank {rank} does not see it: set features.cache to a shared folder"
                )
            arrays[c] = np.lib.format.open_memmap(parts[c], "r+")
        read = partial(decoded, dataset, target_short_side=preprocessing.target_short_side)
        batches = batched(share, preprocessing, batch_size, workers=workers, read=read)
        for found in outputs(self.model, (x for x, _ in batches), layers, norm=norm):
            tokens, B = dict(zip(layers, found)), len(found[0]["cls"])
            for c in columns:
                arrays[c][share.start + done :][:B] = c.of(tokens[c.layer]).float().cpu().numpy()
            done += B
            ticker(done, f"  {peak_memory_gb(next(self.model.parameters()).device):.1f} GB")
        for array in arrays.values():
            array.flush()  # type: ignore[attr-defined]
        arrays.clear()
        distributed.barrier()
        if rank == 0:
            for c in columns:
                os.replace(parts[c], folder / c.file(norm, dtype))
        distributed.barrier()


# ---- few shots ------------------------------------------------------------------------------------------------------


def few_shot_subset(labels: np.ndarray, k_or_percent: float, seed: int) -> np.ndarray:
    """Sorted rows: of each class the first k (or the share, at least one) of a permutation drawn with `seed`.

    labels: int [N], or multi-hot [N, C]: then an image counts for each of its classes, and a share that selects too
    many labels is corrected once.
    """
    multi = labels.ndim == 2
    classes = range(labels.shape[1]) if multi else np.unique(labels).tolist()

    def drawn(share: float) -> np.ndarray:
        rng = torch.Generator().manual_seed(seed)
        chosen: list[np.ndarray] = []
        for c in classes:
            rows = np.flatnonzero(labels[:, c] > 0 if multi else labels == c)
            if len(rows) == 0:
                continue
            order = torch.randperm(len(rows), generator=rng).numpy()
            k = max(1, math.floor(share * len(rows))) if share < 1 else int(share)
            chosen.append(rows[order[:k]])
        return np.unique(np.concatenate(chosen))

    rows = drawn(k_or_percent)
    if multi and k_or_percent < 1:
        rows = drawn(k_or_percent / (labels[rows].sum() / max(1.0, k_or_percent * labels.sum())))
    return rows


def training_rows(shots: FewShotSection, labels: np.ndarray) -> list[Any]:
    """For each try an index of the training images: one try with all of them, or tries with a few of each class."""
    if not shots.enable:
        return [slice(None)]
    assert shots.k_or_percent is not None
    return [few_shot_subset(labels, shots.k_or_percent, number) for number in range(shots.n_tries)]


def over_tries(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean and unbiased standard deviation of several tries, as `<key>_mean` and `<key>_std`."""
    values = {key: np.array([row[key] for row in rows], float) for key in rows[0]}
    spread = {key: float(v.std(ddof=1)) if len(v) > 1 else 0.0 for key, v in values.items()}
    return {
        name: x
        for key, v in values.items()
        for name, x in ((f"{key}_mean", float(v.mean())), (f"{key}_std", spread[key]))
    }
