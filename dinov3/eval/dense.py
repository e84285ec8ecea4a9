"""What the evaluations of segmentation and depth share: keys of their configurations, batches, the fit of a linear head.

Both scripts take the reference's keys with its defaults; keys of ours are marked so. A head is fitted by
`fit.fit` on images that are transformed anew in every epoch or, with `transforms.train.augment=false` (ours),
as they are: then their features are computed once and cached, which takes minutes on a CPU for some hundred images.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.config.bounds import setting
from dinov3.data.datasets import KNOWN, make_dataset
from dinov3.data.datasets.dense import DenseDataset, DenseFolder
from dinov3.data.transforms import dense as dense_transforms
from dinov3.errors import DinoError, choices_sentence
from dinov3.eval import arguments
from dinov3.eval import session as common
from dinov3.eval.arguments import EvalConfig, take_options
from dinov3.files import nonexistent
from dinov3.fit import SCHEDULES, Evaluate, FitConfig, FitReport, Loss, fit, shuffled
from dinov3.hub import HEADS
from dinov3.hub.own_heads import is_head_file, open_task_model
from dinov3.runlog import RunDir
from dinov3.weights.filling import fill
from dinov3.weights.writing import write_torch

Transform = Callable[..., tuple[Tensor, Tensor]]

# ---- configuration -------------------------------------------------------------------------------------------------


@dataclass
class OptimizerSection:
    """AdamW."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-2
    gradient_clip: float = 35.0  # .inf: never


@dataclass
class SchedulerSection:
    """WarmupOneCycleLR, or (ours) a schedule of `fit`: cosine, polynomial, constant, steps.

    constructor_kwargs of WarmupOneCycleLR: warmup_iters, warmup_ratio, div_factor, final_div_factor (1000), pct_start (0),
    anneal_strategy (cos), use_beta1 (true), base_momentum, max_momentum; of the others: `warmup` and what the schedule knows.
    """

    type: str = setting("WarmupOneCycleLR", choices=("WarmupOneCycleLR", *(s for s in SCHEDULES if s != "one_cycle")))
    total_iter: int = setting(40000, at_least=1)
    constructor_kwargs: dict[str, Any] = field(default_factory=dict)


ONE_CYCLE = (
    "warmup_iters", "warmup_ratio", "div_factor", "final_div_factor", "pct_start", "anneal_strategy", "cycle_momentum",
    "use_beta1", "base_momentum", "max_momentum",
    "update_momentum",  # in the published files; means nothing
)  # fmt: skip


ModelDtype = Literal["FLOAT32", "BFLOAT16"]


@dataclass
class DatasetsSection:
    root: str | None = None  # appended to the lines below as :root=
    train: str = ""
    val: str = ""


@dataclass
class DenseConfig(EvalConfig):
    """The keys that segmentation and depth share."""

    POSITIONAL = (("FOLDER", "datasets.root"),)

    bs: int = setting(2, at_least=1)  # images of a process
    n_gpus: int = 8  # for information; torchrun or the launcher decides
    num_workers: int = 6
    model_dtype: ModelDtype | None = None  # null: as FLOAT32
    seed: int = 100
    datasets: DatasetsSection = field(default_factory=DatasetsSection)
    scheduler: SchedulerSection = field(default_factory=SchedulerSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    load_from: str | None = None  # a published head's name, or the file of a head
    head_weights: str | None = None  # ours: where the published head of load_from lies
    backbone_weights: str | None = None  # ours: and its backbone

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from scheduler_problems(self.scheduler)


def scheduler_problems(section: SchedulerSection) -> Iterator[tuple[str, str]]:
    kwargs = section.constructor_kwargs
    if section.type == "WarmupOneCycleLR":
        for name in kwargs:
            if name not in ONE_CYCLE:
                yield "scheduler.constructor_kwargs", f"each key {choices_sentence(name, ONE_CYCLE)}"
        if kwargs.get("pct_start", 0) != 0 or kwargs.get("anneal_strategy", "cos") != "cos":
            yield "scheduler.constructor_kwargs", "only pct_start 0 with a cosine exists: the warm-up is warmup_iters"


def fit_config(
    optimizer: OptimizerSection,
    scheduler: SchedulerSection,
    *,
    images: int,
    late: int,
    evaluate_every: int,
    **others: Any,
) -> FitConfig:
    """The reference's two sections as a `FitConfig`. late: 1 where the scheduler skips its first step
    (segmentation: the second iteration repeats the first one's rate, and published numbers were made so)."""
    kwargs = dict(scheduler.constructor_kwargs)
    options: dict[str, Any] = kwargs
    schedule, warmup = scheduler.type, int(kwargs.pop("warmup", 0))
    if schedule == "WarmupOneCycleLR":
        schedule, warmup = "one_cycle", int(kwargs.get("warmup_iters", 0))
        options = {"ratio": float(kwargs.get("warmup_ratio", 0.0)), "late": late}
        options["final_div_factor"] = float(kwargs.get("final_div_factor", 1000))
        if "div_factor" in kwargs:
            options["div_factor"] = float(kwargs["div_factor"])
        if kwargs.get("use_beta1", True):
            options["base_momentum"] = float(kwargs.get("base_momentum", 0.85))
            options["max_momentum"] = float(kwargs.get("max_momentum", 0.95))
    return FitConfig(
        steps=scheduler.total_iter, lr=optimizer.lr, weight_decay=optimizer.weight_decay, beta1=optimizer.beta1,
        beta2=optimizer.beta2, clip=None if math.isinf(optimizer.gradient_clip) else optimizer.gradient_clip,
        schedule=schedule, warmup=warmup, schedule_options=options, batch=images * distributed.world(),
        evaluate_every=evaluate_every, **others,
    )  # fmt: skip


def autocast(dtype: str | None, device: torch.device) -> AbstractContextManager[Any]:
    """`model_dtype` BFLOAT16 runs backbone and head under autocast; parameters stay what they are."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "BFLOAT16" else nullcontext()


def pair(value: Any, key: str) -> tuple[int, int]:
    """A side, or [height, width]."""
    sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise DinoError(f"{key} is a side in pixels or [height, width], not {value!r}")
    return sides[0], sides[1]


# ---- data ----------------------------------------------------------------------------------------------------------


def open_dense(line: str, root: str | None, kinds: Sequence[str], key: str) -> DenseDataset:
    """The data set of a line of the configuration; `datasets.root` is appended to lines that name none."""
    if not line:
        raise DinoError(f"{key} must be given, for example {key}=ADE20K:split=TRAIN datasets.root=/data/ade")
    if root and ":root=" not in line:
        line = f"{line}:root={root}"
    dataset = make_dataset(line)
    if not isinstance(dataset, DenseDataset):
        dense = [name for name, (module, _) in KNOWN.items() if module == "dense"]
        raise DinoError(f"{key}={line} has no map for each image; data sets that have: {', '.join(dense)}")
    if dataset.kind not in kinds:
        raise DinoError(
            f"{key}={line} holds {dataset.kind}, this evaluation needs {' or '.join(kinds)} (set it by a folder's key kind=…)"
        )
    if len(dataset) == 0:
        raise DinoError(f"{key}={line} is empty")
    return dataset


def batches(
    dataset: DenseDataset, transform: Transform, size: int, seed: int, *, augment: bool
) -> Callable[[int], dict[str, Any]]:
    """step → {"x" [B, 3, h, w], "target" [B, h', w'], "step"}: shuffled, and transformed by draws of (seed, epoch, index) if
    `augment`; else as for evaluation, so that the backbone runs once an image (`fit.cached_features`)."""
    rank, world, n = distributed.rank(), distributed.world(), len(dataset)

    def batch(step: int) -> dict[str, Any]:
        first = (step * world + rank) * size
        made = []
        for position, index in enumerate(shuffled(n, size, step, seed=seed, rank=rank, world=world), first):
            draws = dense_transforms.generator(seed, position // n, index) if augment else None
            made.append(transform(*dataset[index], draws))
        return {"x": stacked([x for x, _ in made]), "target": stacked([t for _, t in made]), "step": step}

    return batch


def feature_cache(model: nn.Module, folder: Path, *, augment: bool) -> AbstractContextManager[Any]:
    """Caches features while a head is fitted to images that do not change."""
    from dinov3.fit import cached_features

    return nullcontext() if augment else cached_features(model, folder=folder / f"features-{distributed.rank()}")


def stacked(parts: Sequence[Tensor]) -> Tensor:
    shapes = sorted({tuple(p.shape) for p in parts})
    if len(shapes) > 1:
        raise DinoError(
            f"the images of a batch differ in size ({shapes[0]} and {shapes[-1]}): set a crop for training "
            "(transforms.train.crop_size or random_crop), or bs=1"
        )
    return torch.stack(list(parts))


def workers(requested: int) -> int:
    return max(0, min(requested, os.cpu_count() or 1))


def folder_specs(folder: str | os.PathLike[str], kind: str, extra: str = "") -> tuple[str, str]:
    """(train, validation) dataset specs for a plain folder: its splits, or the first 80 % and the last 20 % of its pairs
    in the order of their names (frames of one video stay on one side)."""
    root = Path(folder).expanduser()
    base = f"DenseFolder:root={root}{extra}"

    def there(split: str) -> bool:
        try:
            return len(make_dataset(f"{base}:split={split}")) > 0
        except DinoError:
            return False

    if there("train"):
        for split in ("val", "validation", "test"):
            if there(split):
                return f"{base}:split=train", f"{base}:split={split}"
    whole = make_dataset(base)
    assert isinstance(whole, DenseFolder)
    if whole.kind != kind:
        raise DinoError(f"{root} holds {whole.kind} targets, not {kind}; see the key kind of DenseFolder")
    cut = int(0.8 * len(whole))
    if cut < 1 or cut == len(whole):
        raise DinoError(f"{root} has {len(whole)} images with a target: too few to train and to evaluate on")
    return f"{base}:select=:{cut}", f"{base}:select={cut}:"


def fit_head(
    config: Any, session: Any, model: nn.Module, train: DenseDataset, transform: Transform, loss: Loss, validate: Evaluate,
    **options: Any,
) -> FitReport:  # fmt: skip
    """Fits the head of `model` on the training images; options: of `fit_config`."""
    c, augment = config, config.transforms.train.augment
    chosen = fit_config(
        c.optimizer, c.scheduler, images=c.bs, evaluate_every=c.eval.eval_interval, seed=c.seed,
        precision="bfloat16" if c.model_dtype == "BFLOAT16" else "float32", workers=workers(c.num_workers), **options,
    )  # fmt: skip
    made = batches(train, transform, c.bs, c.seed, augment=augment)
    run = RunDir(session.output, writer=distributed.is_main())
    with feature_cache(model, session.output, augment=augment):
        return fit(model, made, loss, chosen, run, evaluate=validate, about=c)


# ---- heads ---------------------------------------------------------------------------------------------------------


def write_head(path: Path, tensors: Mapping[str, Tensor], iteration: int) -> None:
    """`model_final.pth` as the reference writes it: {"model": head's state, "iteration"}; moments stay in ckpt/."""
    if distributed.is_main():
        write_torch({"model": {k: v.cpu() for k, v in tensors.items()}, "iteration": iteration}, path)


def task_model(
    task: str, config: Any, session: Any, build: Callable[[Any], Any], head: str, **options: Any
) -> Any:  # fmt: skip
    """The model of a configuration: that of `load_from` (a published head, whose function takes `options`; an own head file;
    a file of the reference for the submodule `head`), else `build(backbone)`, drawn with the configuration's seed."""
    c = config
    if c.load_from in HEADS:
        dtype = torch.bfloat16 if c.model_dtype == "BFLOAT16" else torch.float32
        return existing_model(task, c, session, autocast_dtype=dtype, **options)
    if c.load_from is not None and is_head_file(c.load_from):
        return existing_model(task, c, session)
    backbone: Any = session.model(c.model, plain=True)
    torch.manual_seed(c.seed)
    model = build(backbone)
    model.origin = backbone.origin
    model.to(session.device)
    if c.load_from is not None:
        fill_head(model.get_submodule(head), c.load_from, f"{head}.")
        model.eval()
    return model


def existing_model(task: str, config: Any, session: Any, **options: Any) -> Any:
    """The model of `load_from`: a published head's name or an own head file, over the backbone that was named."""
    own = config.load_from not in HEADS and not config.backbone_weights
    return open_task_model(
        task, config.load_from, weights=config.head_weights, backbone_weights=config.backbone_weights,
        backbone=chosen_backbone(config.model, session) if own else None, device=session.device, **options,
    )  # fmt: skip


def chosen_backbone(section: Any, session: Any) -> nn.Module | None:
    """The backbone of the `model` section, or None if it names none: a head file then names its own."""
    requested = (section.config_file, section.dino_hub, section.name, section.weights)
    return session.model(section, plain=True) if any(requested) else None


def fill_head(module: nn.Module, path: str, prefix: str) -> None:
    """Loads a head that a run of this script (or of the reference) has written; strictly, prefixes aside."""
    from dinov3.hub import published_heads

    if not Path(path).is_file():
        raise DinoError(f"load_from={path} is neither a published head nor a file")
    state, _ = published_heads.read(path)
    state = {k: v for k, v in state.items() if not k.startswith("optimizer") and k != "iteration"}
    for wrapping in ("model.", "module.", prefix):
        if state and all(k.startswith(wrapping) for k in state):
            state = {k.removeprefix(wrapping): v for k, v in state.items()}
    fill(module, state, what="the head of this configuration", source=path, device=next(module.parameters()).device)


def statistics(model: nn.Module) -> tuple[list[float], list[float]]:
    """(mean, std) of the images a model was trained on, in [0, 1]."""
    from dinov3.data.transforms.inputs import LVD_MEAN, LVD_STD

    origin: Any = getattr(model, "origin", None)
    mean, std = getattr(origin, "mean", None), getattr(origin, "std", None)
    return list(mean or LVD_MEAN), list(std or LVD_STD)


def normalisation(config: Any, model: nn.Module, scale: float) -> dict[str, tuple[float, ...]]:
    """{"mean", "std"} of `transforms`, on a scale from 0 to `scale`; by default those of the weights."""
    keys = zip(("mean", "std"), statistics(model))
    return {
        key: as_numbers(getattr(config.transforms, key), [scale * v for v in own], f"transforms.{key}")
        for key, own in keys
    }


def as_numbers(values: Sequence[float] | None, otherwise: Sequence[float], key: str) -> tuple[float, ...]:
    chosen = tuple(float(v) for v in (values if values is not None else otherwise))
    if len(chosen) != 3 or not np.isfinite(chosen).all():
        raise DinoError(f"{key} holds one number for each colour, not {list(chosen)}")
    return chosen


# ---- the short form ------------------------------------------------------------------------------------------------


SHORT = arguments.SHORT | {"steps": "scheduler.total_iter"}


@dataclass(frozen=True)
class FolderForm:
    """How an evaluation reads `FOLDER --model NAME --size 448 key=value …`.

    overrides: (train spec, validation spec, overrides of the arguments, options) → what the task adds; its keyword
    arguments are whole numbers.
    """

    name: str  # results go to NAME-FOLDER
    kind: str  # of the folder's targets
    key: str  # of their dataset spec, an option too: a whole number
    overrides: Callable[..., list[str]]

    def read(self, argv: Sequence[str]) -> list[str] | None:
        """Overrides of the configuration, those of the arguments last; None where no folder comes first."""
        if not argv:
            raise DinoError("a folder is needed: FOLDER [--model NAME] [--size PIXELS] …, or key=value overrides")
        if argv[0].startswith("-") or "=" in argv[0]:
            return None
        folder = Path(argv[0])
        if not folder.expanduser().is_dir():
            what = f"{folder} is no folder" if folder.exists() else nonexistent(folder)
            raise DinoError(f"{what} (write FOLDER [--model NAME] [--size PIXELS] …, or key=value overrides)")
        own = [p.name for p in inspect.signature(self.overrides).parameters.values() if p.kind is p.KEYWORD_ONLY]
        numbers = ("steps", self.key, *own)
        given, last = take_options(argv[1:], (*SHORT, self.key, *own))
        for option in numbers:
            if not given.get(option, "0").isdecimal():
                raise DinoError(f"--{option} takes a whole number, not {given[option]!r}")
        train, val = folder_specs(folder, self.kind, f":{self.key}={given[self.key]}" if self.key in given else "")
        return [
            f"datasets.train={train}", f"datasets.val={val}", f"output_dir={self.name}-{folder.name}",
            "scheduler.total_iter=500", "scheduler.type=cosine", "bs=4", "decoder_head.type=linear",
            "transforms.train.augment=false",
            *(f"{SHORT[option]}={value}" for option, value in given.items() if option in SHORT),
            *self.overrides(train, val, last, **{option: int(given[option]) for option in own if option in given}),
            *last,
        ]  # fmt: skip


def main(
    name: str,
    cls: type[Any],
    evaluate: Callable[[Any, common.Session], Mapping[str, common.Number]],
    argv: Sequence[str] | None,
    folder_form: FolderForm,
    *,
    saved_as: str,
    doc: str | None,
) -> int:
    """Entry point of both: `common.main`, where a folder may stand for a configuration."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        given = folder_form.read(given) or given
    except DinoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return common.main(name, cls, evaluate, given, saved_as=saved_as, doc=doc)
