"""What every evaluation shares: arguments, the model, pictures → features kept on disk, results, sweeps.

An evaluation is a configuration (dataclass), a function arrays → numbers, and a door:

    def evaluate(config: KnnConfig, session: Session) -> dict[str, float]: ...
    def main(argv=None) -> int:
        return common.main("knn", KnnConfig, evaluate, argv)

`common.main` understands what people type at the public scripts: `key.sub=value` words, `config_file=FILE` or
`--config-file FILE`, `output_dir=DIR` or `--output-dir DIR`, and of our own `--sweep layers=8,9,11,size=224,256`. It joins
the ranks of torchrun or SLURM, saves the resolved configuration, and writes results-NAME.csv and results-NAME.json.

Features are computed once: a column of numbers (the CLS token or the mean patch of one layer) is a .npy file under
$DINOV3_CACHE/features, in a folder named by the weights' fingerprint, the preprocessing and the pictures. Whoever
asks for the same column again, from another evaluation or with another pooling, reads the file. Several processes
write one file together, so the cache must lie where all of them see it.

Legend: N pictures, D width, C classes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dinov3 import config as configuration
from dinov3 import distributed
from dinov3.data.datasets import make_dataset
from dinov3.data.datasets.base import PictureDataset
from dinov3.data.pictures import Picture, open_picture
from dinov3.data.transforms import Preprocessing
from dinov3.errors import DinoError, PictureError, WeightsMismatch, did_you_mean
from dinov3.eval.published import published
from dinov3.features import default_preprocessing, model_label
from dinov3.heads.encoder import widths_of
from dinov3.runlog import RunDir, peak_memory_gb, spoken_time

if TYPE_CHECKING:
    from dinov3.models import BackboneConfig

__all__ = [
    "EvalConfig", "FeatureSection", "FewShotSection", "ModelSection", "Session", "TransformSection", "few_shot_subset",
    "main", "open_model", "published", "read_arguments", "write_table",
]  # fmt: skip

C = TypeVar("C", bound="EvalConfig")
K = TypeVar("K")
Number = float | int | str | None
Pool = Literal["cls", "mean", "cls+mean"]


# ---- sections of configurations -------------------------------------------------------------------------------------


@dataclass
class ModelSection:
    """Whose features. The first three keys are the public scripts'; with none of all, the model that ships."""

    config_file: str | None = None  # a training configuration that describes the architecture …
    pretrained_weights: str | None = None  # … and weights for it (file, or a folder of a distributed checkpoint)
    dino_hub: str | None = None  # a hub function's name
    name: str | None = None  # ours: any name `dinov3.load` takes, also transformers:FOLDER,layer=9
    weights: str | None = None  # ours: any weights `dinov3.load` takes, or "random"
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of parameters and arithmetic; nothing is autocast


@dataclass
class TransformSection:
    """Short side to `resize_size` (bicubic), then a square of `crop_size` from the middle."""

    resize_size: int = 256
    crop_size: int = 224


@dataclass
class FeatureSection:
    """What a picture's vector is.

    cls: the CLS tokens of the layers, one after the other; mean: their mean patches; cls+mean: the CLS tokens of all,
    then the mean patch of the last of them (the reference's linear evaluation).
    """

    layers: list[int] = field(default_factory=lambda: [-1])  # 0-based blocks; negative ones count from the end
    pool: Pool = "cls"
    norm: bool = True  # the final norm, on every layer
    dtype: Literal["float32", "float16"] = "float32"  # on disk; float16 halves it
    cache: str | None = None  # a folder; null: $DINOV3_CACHE/features; "none": nothing is kept


@dataclass
class FewShotSection:
    enable: bool = False
    k_or_percent: float | None = None  # < 1: share of each class; ≥ 1: pictures of each class
    n_tries: int = 1


@dataclass
class EvalConfig:
    """What all evaluations' configurations have; put your own sections beside these."""

    model: ModelSection = field(default_factory=ModelSection)
    output_dir: str = "."
    save_results: bool = False  # keep predictions and targets as .npy


def section_problems(config: Any) -> Iterator[tuple[str, str]]:
    """Conditions on the sections above, for a configuration's `problems()`."""
    model: ModelSection = config.model
    theirs = [f"model.{k}" for k in ("config_file", "pretrained_weights") if getattr(model, k)]
    ours = [f"model.{k}" for k in ("name", "weights") if getattr(model, k)]
    if model.dino_hub and (theirs or ours):
        yield "model.dino_hub", f"excludes {', '.join(theirs + ours)}: it names architecture and weights"
    if theirs and ours:
        yield ours[0], f"excludes {', '.join(theirs)}; give one or the other"
    if model.pretrained_weights and not model.config_file:
        yield "model.pretrained_weights", "needs model.config_file; a file that says what it is goes to model.weights"
    shots: FewShotSection | None = getattr(config, "few_shot", None)
    if shots is not None and shots.enable and (shots.k_or_percent is None or shots.k_or_percent <= 0):
        yield "few_shot.k_or_percent", "must be given with few_shot.enable: 5 pictures of each class, or 0.1 of them"
    if shots is not None and shots.n_tries < 1:
        yield "few_shot.n_tries", "must be at least 1"


# ---- arguments ------------------------------------------------------------------------------------------------------

FILE_WORDS = ("config_file", "config-file", "config", "trainer_config_file")
OUTPUT_WORDS = ("output_dir", "output-dir")


@dataclass
class Arguments:
    file: str | None
    overrides: list[str]
    sweep: str | None = None


def split_arguments(argv: Sequence[str]) -> Arguments:
    """Options and key=value words in any order, as the public scripts and the launcher write them."""
    found, rest = Arguments(None, []), list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("-") and name not in (*FILE_WORDS, *OUTPUT_WORDS, "sweep"):
            options = ["--config-file", "--output-dir", "--sweep", "--help"]
            hint = did_you_mean(f"--{name}", options) or f"; there are {', '.join(options)}, and key.sub=value words"
            raise DinoError(f"unknown option {word}{hint}")
        if word.startswith("-") and not equals:
            if not rest:
                raise DinoError(f"{word} needs a value")
            value = rest.pop(0)
        if name in FILE_WORDS and "." not in name:
            found.file = value
        elif name in OUTPUT_WORDS:
            found.overrides.append(f"output_dir={value}")
        elif name == "sweep":
            found.sweep = value
        else:
            found.overrides.append(word)
    return found


def read_arguments(cls: type[C], argv: Sequence[str]) -> tuple[C, list[str], Arguments]:
    """(configuration, notes, the arguments in parts). Raises one `DinoError` with every mistake."""
    arguments = split_arguments(argv)
    config, notes = configuration.load(cls, arguments.file, arguments.overrides)
    return config, notes, arguments


def help_text(name: str, cls: type[Any], doc: str | None) -> str:
    """The evaluation's first words and every key with its default."""

    def keys(of: Any, prefix: str = "") -> Iterator[str]:
        for f in fields(of):
            value = getattr(of, f.name)
            if is_dataclass(value):
                yield from keys(value, f"{prefix}{f.name}.")
            else:
                yield f"  {prefix}{f.name}={_shown(value)}"

    usage = f"usage: dinov3 eval {name} [--config-file FILE] [--output-dir DIR] [--sweep AXES] key.sub=value …"
    return "\n".join([usage, "", (doc or "").strip(), "", "keys and defaults:", *keys(cls())])


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if hasattr(value, "value"):
        return str(value.value)
    return str(value) if not isinstance(value, (list, tuple)) else "[" + ",".join(map(_shown, value)) + "]"


# ---- the model ------------------------------------------------------------------------------------------------------


def open_model(section: ModelSection, device: str | torch.device = "cpu") -> nn.Module:
    """The frozen backbone of a `model` section, with `origin`."""
    from dinov3.hub import load

    options: dict[str, Any] = {"device": device, "dtype": getattr(torch, section.dtype)}
    if section.config_file is not None:
        model = _from_configuration(section.config_file, section.pretrained_weights, **options)
    elif section.dino_hub is not None:
        if "dinov2" in section.dino_hub:
            raise DinoError(
                f"model.dino_hub={section.dino_hub} is a DINOv2 model of another repository; save it in transformers' "
                "layout and write model.name=transformers:FOLDER"
            )
        model = load(section.dino_hub, **options)
    else:
        model = load(section.name, section.weights, **options)
    return model.eval().requires_grad_(False)


def _from_configuration(file: str, weights: str | None, *, device: Any, dtype: torch.dtype) -> nn.Module:
    """The teacher's backbone of a training run: architecture from its configuration, weights from a file or folder."""
    from dinov3.hub import Origin
    from dinov3.models import backbone
    from dinov3.weights import loading

    described, _ = configuration.load_model_config(file)
    config = configuration.vit_config(described.student)
    mean, std = described.crops.rgb_mean, described.crops.rgb_std
    statistics = (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
    if not weights:
        torch.manual_seed(0)
        model: nn.Module = backbone(config)
        model.init_weights()  # type: ignore[operator]
        origin = Origin("custom", f"random ({Path(file).name})", "random", *statistics)
    elif Path(weights).is_dir() and (Path(weights) / ".metadata").is_file():
        model = _from_distributed(config, Path(weights))
        origin = Origin("custom", weights, "dinov3", *statistics)
    else:
        opened = loading.open(weights)
        model = loading.build(config, opened)
        name = opened.rows[0].id if opened.rows else "custom"
        origin = Origin(name, opened.source, opened.form, *statistics, opened.notes)
    model.origin = origin  # type: ignore[assignment]
    return model.to(device=device, dtype=dtype)


def _from_distributed(config: BackboneConfig, folder: Path) -> nn.Module:
    from dinov3 import checkpoint
    from dinov3.models import backbone

    names = checkpoint.stored(folder)
    places = ("model.model_ema.backbone.", "model.teacher.backbone.", "model.backbone.", "teacher.backbone.")
    for prefix in places:
        state = {n.removeprefix(prefix) for n in names if n.startswith(prefix)}
        if state:
            break
    else:
        raise DinoError(f"the checkpoint {folder} holds no teacher (none of {', '.join(p + '…' for p in places)})")
    model = backbone(config)
    try:
        model.load_state_dict(checkpoint.read_tensors(folder, prefix))
    except RuntimeError as error:
        raise WeightsMismatch(
            f"{folder} does not fit model.config_file: {str(error).splitlines()[1].strip()}"
        ) from None
    return model


# ---- pictures → features --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One kind of number of every picture: `token` "cls" or "mean" of a layer."""

    token: str
    layer: int

    def file(self, norm: bool, dtype: str) -> str:
        return f"{self.token}-layer{self.layer}{'' if norm else '-prenorm'}-{dtype}.npy"


def columns_of(layers: Sequence[int], pool: str) -> list[Column]:
    """The columns that make up a vector, in order (see `FeatureSection`)."""
    cls, means = [Column("cls", i) for i in layers], [Column("mean", i) for i in layers]
    return {"cls": cls, "mean": means, "cls+mean": [*cls, means[-1]]}[pool]


def dataset_id(dataset: PictureDataset) -> str:
    """12 hex digits of which pictures these are: names, and what changes when a file does, where it is known."""
    digest = hashlib.sha256(type(dataset).__name__.encode())
    items = getattr(dataset, "items", None)
    if items is not None:
        digest.update(str(getattr(getattr(dataset, "source", None), "root", "")).encode())
        digest.update("\n".join(f"{item.path} {item.stamp}" for item in items).encode())
    else:
        digest.update(str(getattr(dataset, "root", "")).encode())
        digest.update("\n".join(dataset.name(i) for i in range(len(dataset))).encode())
    return digest.hexdigest()[:12]


def labels_of(dataset: PictureDataset, what: str) -> np.ndarray:
    """int64 [N], or [N, C] where the data set has several labels a picture. Raises `DinoError` where there are none."""
    targets = dataset.get_targets() if hasattr(dataset, "get_targets") else None
    if targets is None:
        targets = [-1 if (label := dataset.label(i)) is None else label for i in range(len(dataset))]
    labels = np.asarray(targets).astype(np.int64)
    if labels.ndim == 1 and (len(labels) == 0 or labels.min() < 0):
        n = int((labels < 0).sum())
        raise DinoError(
            f"{what}: {n} of {len(labels)} pictures have no class; each needs one (a sub-folder for each class)"
        )
    return labels


def class_count(labels: np.ndarray) -> int:
    """The largest label + 1, or the width of multi-hot labels."""
    return labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1


@dataclass(frozen=True)
class Targets:
    """What test pictures should be called.

    labels: int [N], multi-hot [N, C], or sets [N, L] padded with −1. groups: a word for each picture (fairness tables,
    ImageNet-C's "fog/3"). columns: for each class of the data set the classifier's columns that mean it, where it has
    only some of the classifier's classes (ImageNet-A, -R, ObjectNet).
    """

    labels: np.ndarray
    groups: np.ndarray | None = None
    columns: list[list[int]] | None = None

    def chosen(self, scores: np.ndarray) -> np.ndarray:
        """Scores of the data set's own classes: of several columns the best."""
        if self.columns is None:
            return scores
        last = max(max(c) for c in self.columns)
        if last >= scores.shape[1]:
            raise DinoError(
                f"this data set's classes are columns up to {last} of an ImageNet-1k classifier, and this one has "
                f"{scores.shape[1]}: train on ImageNet-1k"
            )
        return np.stack([scores[:, c].max(1) for c in self.columns], axis=1)


def test_targets(dataset: PictureDataset, what: str) -> Targets:
    """The targets of a data set, with the hooks that the reference's data sets have."""
    groups = dataset.get_groupby_labels() if hasattr(dataset, "get_groupby_labels") else None
    mapping = dataset.get_imagenet_class_mapping() if hasattr(dataset, "get_imagenet_class_mapping") else None
    columns = None if mapping is None else [[int(c)] if np.ndim(c) == 0 else [int(x) for x in c] for c in mapping]
    return Targets(labels_of(dataset, what), None if groups is None else np.asarray(groups), columns)


def check_classes(train: PictureDataset, test: PictureDataset) -> None:
    """Raises where both data sets name their classes and number them differently: sub-folders are counted in order."""
    names = getattr(train, "class_names", None), getattr(test, "class_names", None)
    if names[0] and names[1] and list(names[0])[: len(names[1])] != list(names[1]):
        odd = sorted(set(names[1]) ^ set(names[0]))
        hint = f"only one of them has {', '.join(odd[:3])}" if odd else "their order differs"
        raise DinoError(
            f"training and test pictures have different classes, so their numbers mean different things: {hint}"
        )


def in_threads(batches: Iterable[Sequence[K]], make: Callable[[K], Tensor], workers: int) -> Iterator[Tensor]:
    """Stacked results of `make` for batches of keys, in order, made by threads two batches ahead."""
    pool = ThreadPoolExecutor(max(1, min(workers, os.cpu_count() or 1)))
    waiting: deque[list[Future[Tensor]]] = deque()
    try:
        for keys in batches:
            waiting.append([pool.submit(make, key) for key in keys])
            if len(waiting) > 2:
                yield torch.stack([future.result() for future in waiting.popleft()])
        while waiting:
            yield torch.stack([future.result() for future in waiting.popleft()])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def decoded(dataset: PictureDataset, i: int, target_short_side: int | None = None) -> Picture:
    """Picture i; one that cannot be read stops an evaluation, which without it would be another evaluation."""
    try:
        return open_picture(dataset.read(i), target_short_side=target_short_side)
    except PictureError as error:
        raise PictureError(f"{dataset.name(i)}: {error}; an evaluation needs all of its pictures") from None


def picture_batches(
    dataset: PictureDataset, rows: Sequence[int], rule: Preprocessing, batch_size: int, workers: int
) -> Iterator[Tensor]:
    """Network inputs [B, 3, h, w] in the order of `rows`."""

    def make(i: int) -> Tensor:
        picture = decoded(dataset, i, rule.target_short_side)
        return rule(picture.image, original_wh=(picture.width, picture.height))[0]

    return in_threads((rows[i : i + batch_size] for i in range(0, len(rows), batch_size)), make, workers)


class FeatureCache:
    """Columns of features in a folder of their own for each (weights, preprocessing, pictures)."""

    def __init__(self, model: nn.Module, root: Path, say: Callable[[str], None]) -> None:
        from dinov3.weights.loading import fingerprint

        self.model, self.root, self.say = model, root, say
        weight = next(model.parameters())
        self.model_id = f"{fingerprint(model)}-{str(weight.dtype).removeprefix('torch.')}"

    def columns(
        self,
        dataset: PictureDataset,
        rule: Preprocessing,
        columns: Sequence[Column],
        *,
        norm: bool = True,
        dtype: str = "float32",
        batch_size: int = 64,
        workers: int = 5,
    ) -> list[np.ndarray]:
        """One memory-mapped array [N, D_i] for each column; what is not there yet is computed in one pass."""
        folder = self.root / self.model_id / f"{rule.id}-{dataset_id(dataset)}"
        missing = [c for c in dict.fromkeys(columns) if not (folder / c.file(norm, dtype)).exists()]
        missing = distributed.broadcast_object(missing)
        if missing:
            self._compute(folder, dataset, rule, missing, norm, dtype, batch_size, workers)
        return [np.load(folder / c.file(norm, dtype), mmap_mode="r") for c in columns]

    def _compute(
        self,
        folder: Path,
        dataset: PictureDataset,
        rule: Preprocessing,
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
        mine = range(min(rank * each, N), min((rank + 1) * each, N))
        owner = distributed.broadcast_object(os.getpid())
        parts = {c: folder / f".{c.file(norm, dtype)}.{owner}" for c in columns}
        arrays: dict[Column, np.ndarray] = {}
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            about = {"model": model_label(self.model), "preprocessing": json.loads(rule.to_json()), "pictures": N}
            (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")
        weight, net = next(self.model.parameters()), self.model
        began, done, told = time.perf_counter(), 0, time.perf_counter()
        batches = picture_batches(dataset, mine, rule, batch_size, workers)
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
        for x in batches:
            with torch.inference_mode():
                said = layer_tokens(net, x.to(weight.device, weight.dtype, non_blocking=True), layers, norm)
            rows = slice(mine.start + done, mine.start + done + len(x))
            for c in columns:
                values = said[c.layer][0 if c.token == "cls" else 1]
                arrays[c][rows] = values.float().cpu().numpy()
            done += len(x)
            now = time.perf_counter()
            if now - told > 15 or done == len(mine):
                rate = done / (now - began)
                left = spoken_time((len(mine) - done) / rate)
                memory = peak_memory_gb(weight.device)
                self.say(f"features {done}/{len(mine)}  {rate:.1f} pictures/s  eta {left}  {memory:.1f} GB")
                told = now
        for array in arrays.values():
            array.flush()  # type: ignore[attr-defined]
        arrays.clear()
        distributed.barrier()
        if rank == 0:
            for c in columns:
                os.replace(parts[c], folder / c.file(norm, dtype))
        distributed.barrier()


def layer_tokens(model: Any, x: Tensor, layers: Sequence[int], norm: bool) -> dict[int, tuple[Tensor, Tensor]]:
    """{layer: (CLS [B, D], mean patch [B, D])} of a batch."""
    if list(layers) == [model.n_blocks - 1] and norm:  # exactly what the model puts out
        out = model.forward_features(x)
        return {layers[0]: (out["x_norm_clstoken"], out["x_norm_patchtokens"].mean(1))}
    said = model.get_intermediate_layers(x, n=list(layers), return_class_token=True, norm=norm)
    return {i: (cls, patches.mean(1)) for i, (patches, cls) in zip(layers, said)}


def normal_layers(model: Any, layers: Sequence[int]) -> list[int]:
    """0-based, as given otherwise; negative ones count from the end."""
    n = model.n_blocks
    for i in layers:
        if not -n <= i < n:
            raise DinoError(f"layer {i} does not exist: this model has {n} (0 to {n - 1}, or -1 for the last)")
    if not layers:
        raise DinoError("features.layers is empty; write features.layers=[-1] for the last layer")
    return [range(n)[i] for i in layers]


# ---- few shots ------------------------------------------------------------------------------------------------------


def few_shot_subset(labels: np.ndarray, k_or_percent: float, seed: int) -> np.ndarray:
    """Sorted rows: of each class the first k (or the share, at least one) of a permutation drawn with `seed`.

    labels: int [N], or multi-hot [N, C]: then a picture counts for each of its classes, and a share that selects too
    many labels is corrected once.
    """
    multi = labels.ndim == 2
    classes = range(labels.shape[1]) if multi else np.unique(labels).tolist()

    def drawn(share: float) -> np.ndarray:
        rng = torch.Generator().manual_seed(seed)
        kept: list[np.ndarray] = []
        for c in classes:
            rows = np.flatnonzero(labels[:, c] > 0 if multi else labels == c)
            if len(rows) == 0:
                continue
            order = torch.randperm(len(rows), generator=rng).numpy()
            k = max(1, math.floor(share * len(rows))) if share < 1 else int(share)
            kept.append(rows[order[:k]])
        return np.unique(np.concatenate(kept))

    rows = drawn(k_or_percent)
    if multi and k_or_percent < 1:
        rows = drawn(k_or_percent / (labels[rows].sum() / max(1.0, k_or_percent * labels.sum())))
    return rows


def over_tries(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean and unbiased standard deviation of several tries, as `<key>_mean` and `<key>_std`."""
    values = {key: np.array([row[key] for row in rows], float) for key in rows[0]}
    spread = {key: float(v.std(ddof=1)) if len(v) > 1 else 0.0 for key, v in values.items()}
    return {
        name: x
        for key, v in values.items()
        for name, x in ((f"{key}_mean", float(v.mean())), (f"{key}_std", spread[key]))
    }


# ---- a session ------------------------------------------------------------------------------------------------------


class Session:
    """One run of an evaluation: where it writes, on which device, and what has been opened already."""

    def __init__(self, name: str, output_dir: str | os.PathLike[str] = ".", device: str = "auto") -> None:
        self.name, self.device_name = name, device
        self.device = distributed.setup(None if device == "auto" else device)
        self.run = RunDir(output_dir, writer=distributed.is_main())
        self.also: tuple[list[int], list[str]] = ([], [])  # layers and pools to compute in the same pass (sweeps)
        self._models: dict[str, nn.Module] = {}
        self._caches: dict[str, FeatureCache] = {}
        self.began = time.perf_counter()
        if self.run.writer:
            self.output.mkdir(parents=True, exist_ok=True)

    @property
    def output(self) -> Path:
        return self.run.path

    def say(self, text: str) -> None:
        """One line on stderr and in log.txt, by the main process."""
        self.run.say(text)

    def at(self, output_dir: str | os.PathLike[str]) -> Session:
        """The same session, writing elsewhere."""
        other = Session.__new__(Session)
        other.__dict__.update(self.__dict__)
        other.run = RunDir(output_dir, writer=distributed.is_main())
        if other.run.writer:
            other.output.mkdir(parents=True, exist_ok=True)
        return other

    def model(self, section: ModelSection) -> nn.Module:
        """The backbone, opened once."""
        key = repr(section)
        if key not in self._models:
            self._models.clear()  # one at a time: they may be large
            self._caches.clear()
            self._models[key] = open_model(section, self.device)
            net: Any = self._models[key]
            self.say(f"{net.origin}, {section.dtype} on {self.device}")
            if net.origin.random:
                self.say("the weights are RANDOM: the numbers say what chance and pixels give")
            for note in net.origin.notes:
                self.say(f"note: {note}")
        return self._models[key]

    def rule(self, model: nn.Module, transform: TransformSection) -> Preprocessing:
        """The classification preprocessing with the statistics of the model's weights."""
        if abs(transform.resize_size / transform.crop_size - 256 / 224) > 0.03 and self.name == "knn":
            self.say(
                f"note: resize {transform.resize_size} and crop {transform.crop_size} are not in the usual ratio 256/224"
            )
        stride: Any = model.stride
        if transform.crop_size % stride:
            near = max(1, round(transform.crop_size / stride)) * stride
            raise DinoError(
                f"transform.crop_size={transform.crop_size} is no multiple of the patch ({stride}); try {near}"
            )
        named = Preprocessing.named("classification", size=transform.resize_size, center_crop=transform.crop_size)
        return default_preprocessing(
            model, size=named.size, shape=named.shape, interpolation=named.interpolation, center_crop=named.center_crop
        )

    def features(
        self,
        model: nn.Module,
        dataset: PictureDataset,
        rule: Preprocessing,
        section: FeatureSection,
        *,
        batch_size: int = 64,
        workers: int = 5,
    ) -> np.ndarray:
        """[N, D] of a data set's pictures: memory-mapped if it is one column, else in memory."""
        layers = normal_layers(model, section.layers)
        wanted = columns_of(layers, section.pool)
        extra = (
            [c for pool in self.also[1] for i in normal_layers(model, self.also[0]) for c in columns_of([i], pool)]
            if self.also[0]
            else []
        )
        root = self.cache_root(section.cache)
        if str(root) not in self._caches:
            self._caches[str(root)] = FeatureCache(model, root, self.say)
        arrays = self._caches[str(root)].columns(
            dataset, rule, [*wanted, *extra], norm=section.norm, dtype=section.dtype, batch_size=batch_size, workers=workers
        )[: len(wanted)]  # fmt: skip
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)

    def cache_root(self, chosen: str | None) -> Path:
        from dinov3.weights import cache

        if chosen == "none":
            return self.output / ".features"
        return Path(chosen).expanduser() if chosen else cache.root() / "features"

    def labelled(
        self,
        line: str,
        model: nn.Module,
        rule: Preprocessing,
        section: FeatureSection,
        *,
        batch_size: int = 64,
        workers: int = 5,
    ) -> tuple[np.ndarray, np.ndarray, PictureDataset]:
        """(features [N, D], labels, the data set) of a data set line."""
        dataset = make_dataset(line)
        labels = labels_of(dataset, line)
        return self.features(model, dataset, rule, section, batch_size=batch_size, workers=workers), labels, dataset

    # -- results

    def append_json(self, value: Mapping[str, Any], file: str | None = None) -> None:
        """One JSON line more in `results_eval_<name>.json`."""
        if self.run.writer:
            with open(self.output / (file or f"results_eval_{self.name}.json"), "a", encoding="utf-8") as out:
                out.write(json.dumps(value) + "\n")

    def save_arrays(self, suffix: str, preds: np.ndarray, target: np.ndarray) -> None:
        """`preds_<suffix>.npy` and `target_<suffix>.npy`, ordered by the pictures' numbers."""
        if self.run.writer:
            tail = f"_{suffix}" if suffix else ""
            np.save(self.output / f"preds{tail}.npy", preds)
            np.save(self.output / f"target{tail}.npy", target)

    def finish(self, results: Mapping[str, Number], config: Any, model: nn.Module | None = None) -> None:
        """results-<name>.csv with the documented columns, results-<name>.json with all that produced them."""
        if not self.run.writer:
            return
        stem = f"results-{self.name.replace('_', '-')}"
        write_table(self.output / f"{stem}.csv", [results])
        about: dict[str, Any] = {"evaluation": self.name, "results": dict(results)}
        model = model or next(iter(self._models.values()), None)
        if model is not None:
            origin: Any = getattr(model, "origin", None)
            about["model"] = {"id": getattr(origin, "name", None), "source": getattr(origin, "source", None)}
            if (known := published(getattr(origin, "name", ""), self.name)) is not None:
                about["published"] = known
        about |= {"seconds": round(time.perf_counter() - self.began, 1), "processes": distributed.world()}
        about["config"] = configuration.to_dict(config)
        (self.output / f"{stem}.json").write_text(json.dumps(about, indent=1, default=_json) + "\n", encoding="utf-8")

    def clean(self) -> None:
        if self.run.writer:
            shutil.rmtree(self.output / ".features", ignore_errors=True)


# ---- tables ---------------------------------------------------------------------------------------------------------


def _cell(value: Any) -> Any:
    """64-bit int, 64-bit float or text; booleans are text, None is empty."""
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    return value if value is None else str(value)


def _json(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value.item() if isinstance(value, np.generic) else str(value)


def write_table(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows of named cells; the form follows the ending: .csv, .jsonl, .yaml. Appears whole or not at all."""
    path = Path(path)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [{c: _cell(row.get(c)) for c in columns} for row in rows]
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in cells)
        elif path.suffix == ".jsonl":
            file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in cells)
        elif path.suffix == ".yaml":
            for i, row in enumerate(cells):  # JSON scalars are YAML
                file.write(f"{i}:\n" + "".join(f"  {json.dumps(k)}: {json.dumps(v)}\n" for k, v in row.items()))
        else:
            raise DinoError(f"a table is written as .csv, .jsonl or .yaml, not as {path.name}")
    os.replace(beside, path)
    return path


def read_table(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows that `write_table` wrote (.csv, .jsonl), numbers as numbers, empty cells as None."""
    path = Path(path)
    with open(path, newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file]
        return [{k: _parsed(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _parsed(text: str) -> Any:
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table for people."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_spoken(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    lines = [columns, ["-" * w for w in widths], *cells]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def _spoken(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- sweeps ---------------------------------------------------------------------------------------------------------


def sweep_axes(text: str) -> dict[str, list[str]]:
    """`layers=8,9,size=224,256` → {"layers": ["8", "9"], "size": ["224", "256"]}; a dash is a range: `layers=0-11`,
    a plus joins layers to one vector: `layers=8+11`."""
    axes: dict[str, list[str]] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if equals:
            if name in axes:
                raise DinoError(f"{name} is given twice in --sweep {text}")
            axes[name.strip()] = []
        elif not axes:
            raise DinoError(
                f"--sweep is name=value,value,name=value…, for example layers=8,9,11,size=224,256; not {text!r}"
            )
        values = axes[next(reversed(axes))]
        value = value if equals else part
        first, dash, last = value.partition("-")
        if dash and first.isdecimal() and last.isdecimal():
            values += [str(i) for i in range(int(first), int(last) + 1)]
        elif value.strip():
            values.append(value.strip())
        else:
            raise DinoError(f"--sweep {text}: {part!r} has no value")
    return axes


def _overrides(name: str, value: str, config: Any) -> list[str]:
    """What an axis sets: layers, pool and size are short for keys; any other name is a key."""
    if name == "layers":
        return [f"features.layers=[{value.replace('+', ',')}]"]
    if name == "pool":
        return [f"features.pool={value}"]
    if name == "size":
        if not value.isdecimal():
            raise DinoError(f"--sweep size is in pixels, not {value!r}")
        ratio = config.transform.resize_size / config.transform.crop_size
        return [f"transform.crop_size={value}", f"transform.resize_size={round(int(value) * ratio)}"]
    return [f"{name}={value}"]


def sweep(
    cls: type[C], arguments: Arguments, evaluate: Callable[[C, Session], Mapping[str, Number]], session: Session
) -> list[dict[str, Any]]:
    """The evaluation at every point of a grid: one table on stdout, sweep-<name>.csv, a folder for each point."""
    assert arguments.sweep is not None
    axes = sweep_axes(arguments.sweep)
    base, _ = configuration.load(cls, arguments.file, arguments.overrides)
    grid = [dict(zip(axes, values)) for values in product(*axes.values())]
    points: list[tuple[dict[str, str], C]] = []
    for point in grid:  # all are read before the first one runs: a mistake in the last value costs nothing
        overrides = [o for name, value in point.items() for o in _overrides(name, value, base)]
        config, _ = configuration.load(cls, arguments.file, [*arguments.overrides, *overrides])
        folder = ",".join(f"{k}={v}" for k, v in point.items()).replace("/", "_")
        config.output_dir = str(session.output / "sweep" / folder)
        points.append((point, config))
    sections = [getattr(config, "features", None) for _, config in points]
    if all(isinstance(s, FeatureSection) for s in sections):
        session.also = (sorted({i for s in sections for i in s.layers}), sorted({s.pool for s in sections}))  # type: ignore[union-attr]
    rows: list[dict[str, Any]] = []
    for i, (point, config) in enumerate(points):
        session.say(f"[{i + 1}/{len(points)}] " + ", ".join(f"{k}={v}" for k, v in point.items()))
        here = session.at(config.output_dir)
        results = evaluate(config, here)
        here.finish(results, config)
        rows.append({**point, **results})
        if session.run.writer:
            write_table(session.output / f"sweep-{session.name.replace('_', '-')}.csv", rows)
    return rows


# ---- the door -------------------------------------------------------------------------------------------------------


def main(
    name: str,
    cls: type[C],
    evaluate: Callable[[C, Session], Mapping[str, Number]],
    argv: Sequence[str] | None = None,
    *,
    saved_as: str = "eval_config.yaml",
    doc: str | None = None,
) -> int:
    """Reads the arguments, runs the evaluation on all ranks, writes and prints the results; the exit status.

    evaluate: (configuration, session) → one row of named results, the same on all ranks.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    outside = distributed.together()  # a group that somebody else made is somebody else's to leave
    if {"-h", "--help"} & set(words):
        print(help_text(name, cls, doc or sys.modules[evaluate.__module__].__doc__))
        return 0
    try:
        config, notes, arguments = read_arguments(cls, words)
        session = Session(name, config.output_dir, config.model.device)
        torch.manual_seed(0)
        for note in notes:
            session.say(f"note: {note}")
        if session.run.writer:
            configuration.dump(config, session.output / saved_as)
        if arguments.sweep is not None:
            rows = sweep(cls, arguments, evaluate, session)
            if session.run.writer:
                print(as_text(rows))
        else:
            results = evaluate(config, session)
            session.finish(results, config)
            _tell(results, session)
        session.clean()
        session.say(
            f"{name} took {spoken_time(time.perf_counter() - session.began)}, {peak_memory_gb(session.device):.1f} GB; "
            f"results in {session.output}"
        )
    except DinoError as error:
        who = "" if distributed.is_main() else f"[rank {distributed.rank()}] "
        print(f"{who}{error}", file=sys.stderr)
        return 1
    if not outside:
        distributed.shutdown()
    return 0


def _tell(results: Mapping[str, Number], session: Session) -> None:
    """Results on stdout, and beside them what was published of the same model, where something was."""
    if not session.run.writer:
        return
    for key, value in results.items():
        print(f"{key}: {_spoken(value)}")
    model: Any = next(iter(session._models.values()), None)
    known = published(model.origin.name, session.name) if model is not None else None
    if known:
        print("published (paper or model card): " + ", ".join(f"{k} {v:g}" for k, v in known.items()))
