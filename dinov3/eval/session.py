"""What every evaluation shares: the model, a session with its features and results, sweeps, and the entry point.

An evaluation is a configuration (dataclass), a function arrays → numbers, and an entry point:

    def evaluate(config: KnnConfig, session: Session) -> dict[str, float]: ...
    def main(argv=None) -> int:
        return common.main("knn", KnnConfig, evaluate, argv)

`common.main` takes the arguments of the public scripts: `key.sub=value` overrides, `config_file=FILE` or
`--config-file FILE`, `output_dir=DIR` or `--output-dir DIR`, and of our own `--sweep layers=8,9,11,size=224,256`. It joins
the ranks of torchrun or SLURM, saves the resolved configuration, and writes results-NAME.csv and results-NAME.json.

Modules it uses: `arguments` (sections of configurations, command line), `features` (images → features cached on disk,
labels, few shots), `published`.

Legend: N images, D width.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from enum import Enum
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from dinov3 import distributed
from dinov3.config.loading import dump, keys_of, load, to_dict
from dinov3.config.train import load_model_config, vit_config
from dinov3.data.datasets import make_dataset
from dinov3.data.datasets.base import ImageDataset
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.errors import DinoError, only_known, without_secrets
from dinov3.eval.arguments import (
    Arguments,
    C,
    FeatureSection,
    ModelSection,
    TransformSection,
    help_text,
    read_arguments,
)
from dinov3.eval.features import FeatureCache, Targets, check_classes, columns_of, labels_of, test_targets
from dinov3.eval.published import published
from dinov3.features import check_patches, default_preprocessing, layer_numbers
from dinov3.files import atomically
from dinov3.runlog import RunDir, peak_memory_gb, ticked, time_text
from dinov3.weights.filling import fill

if TYPE_CHECKING:
    from dinov3.models.architectures import BackboneConfig

Number = float | int | str | None
T = TypeVar("T")


# ---- the model ------------------------------------------------------------------------------------------------------


def open_model(section: ModelSection, device: str | torch.device = "cpu", *, plain: bool = False) -> nn.Module:
    """The frozen backbone of a `model` section, with `origin`: its fast form, or the `plain` module cast to the precision."""
    from dinov3.hub import load
    from dinov3.inference import cast_of, check_precision, faster

    check_precision(section.precision, device)
    dtype = cast_of(section.precision) if plain else torch.float32
    options: dict[str, Any] = {"device": device, "dtype": dtype}
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
    model = model.eval().requires_grad_(False)
    return model if plain else faster(model, section.precision)


def _from_configuration(file: str, weights: str | None, *, device: Any, dtype: torch.dtype) -> nn.Module:
    """The teacher's backbone of a training run: architecture from its configuration, weights from a file or folder."""
    from dinov3.hub import Origin
    from dinov3.models.build import backbone
    from dinov3.weights import filling, reading

    described, _ = load_model_config(file)
    config = vit_config(described.student)
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
        opened = reading.open(weights)
        model = filling.build(config, opened)
        name = opened.rows[0].id if opened.rows else "custom"
        origin = Origin(name, opened.source, opened.form, *statistics, tuple(opened.notes))
    model.origin = origin  # type: ignore[assignment]
    return model.to(device=device, dtype=dtype)


def _from_distributed(config: BackboneConfig, folder: Path) -> nn.Module:
    from dinov3 import checkpoint
    from dinov3.models.build import backbone

    prefix = checkpoint.teacher_prefix(folder) + "backbone."
    model = backbone(config)
    fill(model, checkpoint.read_tensors(folder, prefix), what="the backbone of model.config_file", source=str(folder))
    return model


# ---- a session ------------------------------------------------------------------------------------------------------


class Session:
    """One run of an evaluation: its output folder, device, opened model and cached features."""

    def __init__(self, name: str, output_dir: str | os.PathLike[str] = ".", device: str = "auto") -> None:
        self.name = name
        self.device = distributed.setup(None if device == "auto" else device)
        self.same_pass: tuple[list[int], list[str]] = ([], [])  # layers and pools that a sweep needs: computed together
        self._models: dict[str, nn.Module] = {}
        self._caches: dict[str, FeatureCache] = {}
        self.began = time.perf_counter()
        self._open(output_dir)

    def _open(self, output_dir: str | os.PathLike[str]) -> None:
        self.run = RunDir(output_dir, writer=distributed.is_main())
        if self.run.writer:
            self.output.mkdir(parents=True, exist_ok=True)

    @property
    def output(self) -> Path:
        return self.run.path

    def log(self, text: str) -> None:
        """One line on stderr and in log.txt, by the main process."""
        self.run.log(text)

    def shared(self, items: Sequence[T], what: str) -> Iterator[T]:
        """This process's share of the items; its progress is logged."""
        return ticked(distributed.share(items), self.log, what)

    def at(self, output_dir: str | os.PathLike[str]) -> Session:
        """The same session, writing elsewhere."""
        other = copy(self)
        other.began = time.perf_counter()
        other._open(output_dir)
        return other

    def model(self, section: ModelSection, *, plain: bool = False) -> nn.Module:
        """The backbone, opened once; `plain` as in `open_model`."""
        key = repr((section, plain))
        if key not in self._models:
            self._models.clear()  # one at a time: they may be large
            self._caches.clear()
            self._models[key] = open_model(section, self.device, plain=plain)
            net: Any = self._models[key]
            self.log(f"{net.origin}, {getattr(net, 'form', None) or section.precision} on {self.device}")
            if net.origin.random:
                self.log("the weights are RANDOM: the numbers say what chance and pixels give")
            for note in net.origin.notes:
                self.log(f"note: {note}")
        return self._models[key]

    def preprocessing(self, model: nn.Module, transform: TransformSection) -> Preprocessing:
        """The classification preprocessing with the statistics of the model's weights."""
        if min(transform.resize_size, transform.crop_size) < 1:
            raise DinoError("transform.resize_size and transform.crop_size are pixels: 1 or more")
        if abs(transform.resize_size / transform.crop_size - 256 / 224) > 0.03 and self.name == "knn":
            self.log(
                f"note: resize {transform.resize_size} and crop {transform.crop_size} are not in the usual ratio 256/224"
            )
        stride: Any = model.stride
        check_patches("transform.crop_size", transform.crop_size, stride)
        named = Preprocessing.named("classification", size=transform.resize_size, center_crop=transform.crop_size)
        statistics = default_preprocessing(model)
        return named.with_(multiple=stride, mean=statistics.mean, std=statistics.std)

    def features(
        self,
        model: nn.Module,
        dataset: ImageDataset,
        preprocessing: Preprocessing,
        section: FeatureSection,
        *,
        batch_size: int = 64,
        workers: int = 5,
    ) -> np.ndarray:
        """[N, D] of a data set's images: memory-mapped if it is one column, else in memory."""
        layers = layer_numbers(model, section.layers)
        wanted = columns_of(layers, section.pool)
        extra = (
            [
                c
                for pool in self.same_pass[1]
                for i in layer_numbers(model, self.same_pass[0])
                for c in columns_of([i], pool)
            ]
            if self.same_pass[0]
            else []
        )
        root = self.cache_root(section.cache)
        if str(root) not in self._caches:
            self._caches[str(root)] = FeatureCache(model, root, self.log)
        arrays = self._caches[str(root)].columns(
            dataset, preprocessing, [*wanted, *extra], norm=section.norm, dtype=section.dtype, batch_size=batch_size,
            workers=workers,
        )[: len(wanted)]  # fmt: skip
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)

    def cache_root(self, chosen: str | None) -> Path:
        from dinov3.weights import download as cache

        if chosen == "none":
            return self.output / ".features"
        return Path(chosen).expanduser() if chosen else cache.root() / "features"

    def sets(
        self, config: Any, train: str, *tests: str
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, Targets]]]:
        """(features [N, D], labels, [(features, targets) of each test set]) of a `ClassifierConfig`'s dataset specs.

        The classes of a test set must be those of the training images.
        """
        train_set, t, e = make_dataset(train), config.train, config.eval
        labels = labels_of(train_set, train)
        sets = [make_dataset(spec) for spec in tests]
        for spec, dataset in zip(tests, sets):
            check_classes(train_set, dataset, spec)
        targets = list(map(test_targets, sets, tests))
        model = self.model(config.model)  # after the data: mistakes in them are found first
        preprocessing = self.preprocessing(model, config.transform)
        options: dict[str, Any] = {"batch_size": t.batch_size, "workers": t.num_workers}
        features = self.features(model, train_set, preprocessing, config.features, **options)
        options = {"batch_size": e.batch_size or t.batch_size, "workers": e.num_workers}
        found = [self.features(model, dataset, preprocessing, config.features, **options) for dataset in sets]
        return features, labels, list(zip(found, targets))

    # -- results

    def append_json(self, value: Mapping[str, Any], *, before: str = "", after: str = "\n") -> None:
        """Appends one line of JSON to `results_eval_<name>.json`."""
        if self.run.writer:
            with open(self.output / f"results_eval_{self.name}.json", "a", encoding="utf-8") as out:
                out.write(before + json.dumps(value) + after)

    def save_arrays(self, suffix: str, preds: np.ndarray, target: np.ndarray) -> None:
        """`preds_<suffix>.npy` and `target_<suffix>.npy`, ordered by the images' numbers."""
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
        about["config"] = to_dict(config)
        text = without_secrets(json.dumps(about, indent=1, default=_json))
        (self.output / f"{stem}.json").write_text(text + "\n", encoding="utf-8")

    def clean(self) -> None:
        if self.run.writer:
            shutil.rmtree(self.output / ".features", ignore_errors=True)


def _json(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value.item() if isinstance(value, np.generic) else str(value)


# ---- tables ---------------------------------------------------------------------------------------------------------


def _cell(value: Any) -> Any:
    """64-bit int, 64-bit float or text; booleans are text, None is empty."""
    if value is None:
        return ""
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    return str(value)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of named cells as .csv; the file appears whole or not at all."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table for people."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[shown(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(c), *(len(row[i]) for row in cells)) for i, c in enumerate(columns)]
    table = [columns, ["-" * w for w in widths], *cells]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table)


def shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- sweeps ---------------------------------------------------------------------------------------------------------


SHORT_AXES = ("layers", "pool", "size")  # each sets other keys; any key is an axis too


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
    only_known("--sweep has no axis", axes, [*SHORT_AXES, *keys_of(cls)])
    base, _ = load(cls, arguments.file, arguments.overrides)
    grid = [dict(zip(axes, values)) for values in product(*axes.values())]
    points: list[tuple[dict[str, str], C]] = []
    for point in grid:  # all are read before the first one runs: a mistake in the last value is found early
        overrides = [o for name, value in point.items() for o in _overrides(name, value, base)]
        config, _ = load(cls, arguments.file, [*arguments.overrides, *overrides])
        folder = ",".join(f"{k}={v}" for k, v in point.items()).replace("/", "_")
        config.output_dir = str(session.output / "sweep" / folder)
        points.append((point, config))
    sections = [getattr(config, "features", None) for _, config in points]
    if all(isinstance(s, FeatureSection) for s in sections):
        session.same_pass = (sorted({i for s in sections for i in s.layers}), sorted({s.pool for s in sections}))  # type: ignore[union-attr]
    rows: list[dict[str, Any]] = []
    for i, (point, config) in enumerate(points):
        session.log(f"[{i + 1}/{len(points)}] " + ", ".join(f"{k}={v}" for k, v in point.items()))
        here = session.at(config.output_dir or ".")
        results = evaluate(config, here)
        here.finish(results, config)
        rows.append({**point, **results})
        if session.run.writer:
            write_table(session.output / f"sweep-{session.name.replace('_', '-')}.csv", rows)
    return rows


# ---- the entry point ------------------------------------------------------------------------------------------------


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
    given = list(sys.argv[1:] if argv is None else argv)
    joined_before = distributed.together()  # whoever made the group leaves it
    if {"-h", "--help"} & set(given):
        print(help_text(name, cls, doc or sys.modules[evaluate.__module__].__doc__))
        return 0
    try:
        config, notes, arguments = read_arguments(cls, given)
        session = Session(name, config.output_dir or ".", config.model.device)
        torch.manual_seed(0)
        for note in notes:
            session.log(f"note: {note}")
        if session.run.writer:
            dump(config, session.output / saved_as)
        if arguments.sweep is not None:
            rows = sweep(cls, arguments, evaluate, session)
            if session.run.writer:
                print(as_text(rows))
        else:
            results = evaluate(config, session)
            session.finish(results, config)
            _print_results(results, session)
        session.clean()
        session.log(
            f"{name} took {time_text(time.perf_counter() - session.began)}, {peak_memory_gb(session.device):.1f} GB; "
            f"results in {session.output}"
        )
    except (DinoError, OSError) as error:
        who = "" if distributed.is_main() else f"[rank {distributed.rank()}] "
        print(f"error: {who}{error}", file=sys.stderr)
        return 1
    if not joined_before:
        distributed.shutdown()
    return 0


def _print_results(results: Mapping[str, Number], session: Session) -> None:
    """Prints the results, and the published figures of the same model if there are any."""
    if not session.run.writer:
        return
    for key, value in results.items():
        print(f"{key}: {shown(value)}")
    model: Any = next(iter(session._models.values()), None)
    known = published(model.origin.name, session.name) if model is not None else None
    if known:
        print("published (paper or model card): " + ", ".join(f"{k} {v:g}" for k, v in known.items()))
