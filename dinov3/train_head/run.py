"""Your own head: a folder of images with classes, masks, depth or boxes → a small file (`dinov3 train-head`).

    <run>/head.safetensors     the head; `dinov3.hub.own_heads.load_head` gives the task model back
          result.png           images, truth and prediction side by side; the loss and the score over steps
          confusion.png, confusion.csv, classes.csv     of a classifier: what was taken for what; recall, precision
          backbone.safetensors     the backbone, where it was tuned: see `tune`
          resolved.yaml  metrics.jsonl  log.txt  plots/  ckpt/

The backbone is frozen (unless it is tuned), so its features of an image are computed once (a classifier's pooled, before
the first step; else by `fit.cached_features`) unless images are augmented at random; on a laptop a linear head then takes
a minute. A run that was stopped or killed resumes with the same command, and gives the same head. The loop is `fit`, the
tasks are in `tasks`; recipes of the published evaluations are in `eval`.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dinov3 import distributed, drawing, hub
from dinov3.config.bounds import check
from dinov3.data.datasets import make_dataset
from dinov3.data.datasets.dense import ONE_CLASS, files_of
from dinov3.data.datasets.detection import BoxDataset, boxes_at
from dinov3.data.images import IMAGE_SUFFIXES, open_image
from dinov3.data.sources import files_below
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.errors import DinoError, ImageError, install, printable
from dinov3.features import default_preprocessing
from dinov3.files import atomically, nonexistent
from dinov3.fit import FitReport, cached_features, fit, seed_of
from dinov3.hub.own_heads import HEAD, build_head, check_kind, save_head
from dinov3.metrics import confusion_matrix
from dinov3.models.convnext import ConvNeXt
from dinov3.runlog import RunDir, read_metrics
from dinov3.train_head import tasks
from dinov3.train_head.config import RECIPES, HeadConfig
from dinov3.train_head.tune import check_backbone, save_tuned, tune
from dinov3.weights import identity

RESULT = "result.png"
LISTED = 5  # names in a message


@dataclass
class Outcome:
    head: Path
    metrics: dict[str, float]
    report: FitReport
    measured_on: str  # "validation" or "training"


# ---- the data ------------------------------------------------------------------------------------------------------


def open_data(task: str, text: str, split: str | None = None, *, ignore: int | None = None) -> Any:
    """The data set behind a folder or a line, for a task; `split` of a folder; `ignore`: a number in its masks that does
    not count."""
    if ":" in text and "=" in text.partition(":")[2]:
        dataset: Any = make_dataset(text)
        kind = kind_of(dataset)
        if kind != task:
            raise DinoError(f"{text} is a data set for {kind}: a head for {task} cannot learn from it")
        dataset = labelled(dataset) if task == "classification" else dataset
    else:
        root = Path(text).expanduser()
        if not root.exists():
            raise DinoError(nonexistent(text))
        dataset = _of_folder(task, root, split, ignore)
    if len(dataset) == 0:
        raise DinoError(f"{text} holds no images a head for {task} could learn from")
    return dataset


def _of_folder(task: str, root: Path, split: str | None, ignore: int | None) -> Any:
    if task in ("segmentation", "depth"):
        from dinov3.data.datasets.dense import DenseFolder

        kind = "classes" if task == "segmentation" else "depth"
        try:
            return DenseFolder(root=root, split=split, kind=kind, ignore=ignore)
        except DinoError as error:
            names = sorted(files_below(root)) if "of the same name" in str(error) else []
            if not names:
                raise
            raise DinoError(f"{error} (it holds {_names(names)})") from None
    if task == "detection":
        return boxes_at(root, split)
    from dinov3.data.datasets.base import Folder

    return labelled(Folder(root / split if split else root))


def kind_of(dataset: Any) -> str:
    """The task a data set is for."""
    if hasattr(dataset, "kind"):
        return {"classes": "segmentation", "depth": "depth"}.get(dataset.kind, dataset.kind)
    return "detection" if hasattr(dataset, "category_ids") else "classification"


def labelled(data: Any) -> tasks.Selected:
    """The images of a data set that have a class; in a folder, what lies beside the class folders has none."""
    labels = [data.label(i) for i in range(len(data))]
    chosen = [i for i, label in enumerate(labels) if label is not None]
    if not chosen:
        raise DinoError("no image has a class: a classifier needs one folder of images for each class")
    selected = tasks.Selected(data, chosen)
    names = getattr(data, "class_names", None)
    selected.class_names = list(names or (f"class {i}" for i in range(1 + max(labels[i] for i in chosen))))
    return selected


def same_classes(data: Any, val: Any) -> Any:
    """The validation data with the training data's numbers of the classes, which must hold all of its classes."""
    known, names = getattr(data, "class_names", None), getattr(val, "class_names", None)
    if not known or not names or list(known) == list(names):
        return val
    if new := [name for name in names if name not in known]:
        raise DinoError(f"the validation data have classes that the training data lack: {_names(new)}")
    if hasattr(val, "pairs"):
        raise DinoError("the masks of training and validation data number their classes differently; name them alike")
    return tasks.Selected(val, range(len(val)), numbers=[known.index(name) for name in names])


def both_sides(config: HeadConfig) -> tuple[Any, Any | None]:
    """(training, validation) data; a folder with train/ and val/ inside has both."""
    root = Path(config.data).expanduser()
    inside = [name for name in ("train", "training") if (root / name).is_dir() or (root / "images" / name).is_dir()]
    beside = [n for n in ("val", "valid", "validation") if (root / n).is_dir() or (root / "images" / n).is_dir()]
    data = open_data(config.task, config.data, inside[0] if inside else None, ignore=config.ignore)
    if config.val is not None:
        other = Path(config.val).expanduser()
        split = beside[0] if beside and other.exists() and other.resolve() == root.resolve() else None
        return data, same_classes(data, open_data(config.task, config.val, split, ignore=config.ignore))
    if not (inside and beside):
        return data, None
    return data, same_classes(data, open_data(config.task, config.data, beside[0], ignore=config.ignore))


def checked_sizes(data: Any, log: Any, most: int = 20_000) -> set[tuple[int, int]]:
    """(width, height) of all images (of very many: of some), upright; images that cannot be opened and targets of other
    sizes are named, at most five."""
    sizes: set[tuple[int, int]] = set()
    unreadable: list[str] = []
    wrong: list[str] = []
    beyond: list[str] = []
    pairs, rows = getattr(data, "pairs", None), data.rows if isinstance(data, BoxDataset) else None
    for index in range(0, len(data), 1 + len(data) // most):
        try:
            size = header_size(data.read(index))
        except ImageError as error:
            unreadable.append(f"{Path(data.name(index)).name} ({error})")
            continue
        sizes.add(size)
        if rows and any(_beyond(box.xyxy_px, size) for box in rows[index].boxes):
            beyond.append(Path(data.name(index)).name)
        if pairs is not None:
            target = target_size(pairs[index][1])
            if target is not None and target not in (size, size[::-1]):
                wrong.append(f"{Path(data.name(index)).name} {size[0]}×{size[1]} with {target[0]}×{target[1]}")
    if unreadable:
        raise DinoError(f"{listed(unreadable, 'images')} cannot be read: {_names(unreadable)}")
    if wrong:
        raise DinoError(f"{listed(wrong, 'targets')} not of their image's size: {_names(wrong)}")
    if pairs is not None and getattr(data, "left_out", False):
        alone = without_target(data)
        if alone:
            log(f"{listed(alone, 'images')} without a target of the same name, left out: {_names(alone)}")
    for names, what in (("without_area", "boxes without area"), ("unannotated", "images without a file of boxes")):
        if found := getattr(data, names, None):
            log(f"{listed(found, what)}, left out: {_names(found)}")
    if beyond:
        log(f"{listed(beyond, 'images')} with boxes that reach beyond them, which are cut: {_names(beyond)}")
    return sizes


def _beyond(xyxy_px: tuple[float, float, float, float], size_wh: tuple[int, int]) -> bool:
    """By more than a pixel, which is how formats count."""
    x0, y0, x1, y1 = xyxy_px
    return min(x0, y0) < -1 or x1 > size_wh[0] + 1 or y1 > size_wh[1] + 1


def listed(names: Sequence[str], what: str) -> str:
    return f"1 of the {what}" if len(names) == 1 else f"{len(names)} of the {what}"


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def header_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded image, upright, without decoding it where that is not needed."""
    import io

    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else (image.width, image.height)
    except (OSError, ValueError, SyntaxError):
        decoded = open_image(data)
        return decoded.width, decoded.height


def target_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of a map, from its header; None where the file has to be read to know."""
    try:
        if path.suffix == ".npy":
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
            return (shape[1], shape[0]) if len(shape) == 2 else None
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError):
        return None


def without_target(data: Any) -> list[str]:
    """Names of the images beside the pairs of a `DenseFolder` that are part of none."""
    have = {path for pair in data.pairs for path in pair}
    folder = Path(os.path.commonpath([pair[0].parent for pair in data.pairs]))
    return sorted(path.name for path in files_of(folder, IMAGE_SUFFIXES) if path not in have)


# ---- putting it together -------------------------------------------------------------------------------------------


def load_backbone(config: HeadConfig) -> nn.Module:
    """The backbone on the CPU; a ConvNeXt whose maps one grid must hold gets the patch size 16."""
    dtype = "float32" if config.tune else None
    backbone = hub.load(config.backbone, config.weights, dtype=dtype)
    if isinstance(backbone, ConvNeXt) and config.head in ("dpt", "detr") and backbone.patch_size is None:
        backbone = hub.load(config.backbone, config.weights, dtype=dtype, patch_size=16)
    return backbone


def preprocessing_for(config: HeadConfig, backbone: nn.Module, sizes: set[tuple[int, int]]) -> Preprocessing:
    """How images become inputs, with the backbone's statistics."""
    size = config.size or int(RECIPES[config.task, config.head].get("size", 512))
    multiple = {"mask2former": 32}.get(config.head, int(backbone.stride))  # type: ignore[arg-type]
    if size < multiple:
        raise DinoError(f"size {size} is smaller than one patch of the backbone and head ({multiple} pixels)")
    preprocessing = default_preprocessing(backbone, size=size, multiple=multiple, shape="short")
    if config.shape != "auto":
        return preprocessing.with_(shape=config.shape)
    aspects = {preprocessing.plan(*wh).input_hw for wh in sizes}
    return preprocessing if len(aspects) == 1 else preprocessing.with_(shape="square")


def build_task(config: HeadConfig, data: Any, val: Any | None, preprocessing: Preprocessing) -> tasks.Task:
    """The task over the data, with its classes."""
    given = (data, val, preprocessing)
    batch = config.batch or int(RECIPES[config.task, config.head]["batch"])
    options: dict[str, Any] = {"augment": config.augment, "batch": batch, "seed": config.seed}
    if config.task == "depth":
        losses = config.losses or ({"SIGLOSS": 1.0} | ({"GRADIENT_LOG_LOSS": 0.5} if config.head == "dpt" else {}))
        far = config.max_depth if config.max_depth is not None else farthest(data)
        warm_up = min(100, config.fitting().steps // 10)  # steps in which SIGLOSS finds the scale
        return tasks.Depth(*given, min_depth=config.min_depth, max_depth=far, losses=losses, warm_up=warm_up, **options)
    names = class_names(config, data)
    task: tasks.Task
    if config.task == "segmentation":
        criterion = None
        if config.head == "mask2former":
            from dinov3.heads.objectives import Mask2FormerCriterion

            # masks have a sixteenth of the image's pixels: more points than that add nothing
            criterion = Mask2FormerCriterion(len(names), n_points=min(12544, preprocessing.size**2 // 16))
        task = tasks.Segmentation(
            *given, head=config.head, criterion=criterion, colours=drawing.palette(len(names)), **options
        )
    elif config.task == "detection":
        from dinov3.heads.objectives import DetrCriterion

        task = tasks.Detection(*given, criterion=DetrCriterion(), **options)
    else:
        task = tasks.Classification(*given, **options)
    task.class_names = names
    return task


def class_names(config: HeadConfig, data: Any) -> list[str]:
    """Names of the classes: those given, the data's own, or as many numbers as the masks hold."""
    own = getattr(data, "class_names", None)
    names = list(config.classes) or list(own or [])
    if config.task != "segmentation":
        if config.classes and own and len(config.classes) != len(own):
            raise DinoError(
                f"{len(config.classes)} class names were given, the data have {len(own)}: {', '.join(own[:8])}"
            )
        if config.task == "classification" and len(names) == 1:
            raise DinoError(f"all images are of one class, {names[0]}: give a folder of images for each of two or more")
        return names
    zero = 1 if getattr(data, "zero_is_other", False) else 0
    known = len(names) or data.n_classes
    if known is None or len(data) <= 2000:  # beyond it, a wrong number is found in the first batch that holds it
        highest = data.highest_class() - zero
        if highest < 0:
            raise DinoError("no mask holds a class: all pixels are ignored (255)")
        if highest == 0 and not zero:
            raise DinoError(ONE_CLASS)
        if known is not None and highest >= known:
            rest = (
                "" if highest > known else f", or leave it out (--ignore {highest}; ignore={highest} in a dataset spec)"
            )
            raise DinoError(
                f"masks hold class numbers up to {highest}, but there are {known} classes (0 to {known - 1}): name all of "
                f"them, in the order of their numbers (--classes){rest}"
            )
        known = known if known is not None else highest + 1
    return names or [f"class {i}" for i in range(known)]


def farthest(data: Any, most: int = 200) -> float:
    """The depth that 99.9 % of the known pixels stay below, rounded up to whole metres; of at most 200 images."""
    step = max(1, len(data) // most)
    known = [t[t > 0] for t in (data.target(i)[::4, ::4] for i in range(0, len(data), step))]
    values = np.concatenate(known) if known else np.zeros(0)
    if not values.size:
        raise DinoError("no depth map holds a known depth: are they in another unit? (unit=1000 means millimetres)")
    return float(np.ceil(np.quantile(values, 0.999) * 1.05))


def train_head(config: HeadConfig, out: str | os.PathLike[str], *, resume: bool = True) -> Outcome:
    """Fits the head in folder `out`, or resumes there. Raises `DinoError` while another process does the same."""
    check_kind(config.task, config.head)
    check(config, "train-head")
    device = distributed.setup(config.device)
    run = RunDir(out, writer=distributed.is_main())
    data, val = both_sides(config)
    notes: list[str] = []
    sizes = checked_sizes(data, notes.append)
    if val is not None:
        checked_sizes(val, notes.append)
    backbone = load_backbone(config)
    if config.tune:
        check_backbone(backbone)
    task = build_task(config, data, val, preprocessing_for(config, backbone, sizes))
    with run.claimed():
        same_as_before(run, config, resume)
        for note in notes:
            run.log(note)
        if isinstance(task, tasks.Depth):
            what = f"depths to {task.range[1]:g} m"
            if task.range[1] <= 1 and config.max_depth is None:
                run.log(
                    "no depth is beyond 1 m: are the numbers in another unit? unit=1000, the default, means millimetres"
                )
        else:
            what = f"{task.n_classes} class{'es' * (task.n_classes != 1)} ({_names(task.class_names)})"
        numbers = vars(data).get("class_numbers", ())  # known where the masks were read for them
        if numbers and data.n_classes is None and 2 * len(numbers) <= max(numbers):
            run.log(
                f"the masks hold {len(numbers)} of the numbers 0 to {max(numbers)}: are these classes, and not greys?"
            )
        run.log(
            f"{len(data)} images, {f'{len(val)} to validate' if val is not None else 'none to validate'}, "
            f"{what}, {backbone.origin}, input {task.preprocessing.id}"
        )
        return _fitted(config, run, task, backbone, device, resume)


def _fitted(
    config: HeadConfig, run: RunDir, task: tasks.Task, backbone: nn.Module, device: torch.device, resume: bool
) -> Outcome:
    """Builds the head, fits it and writes its file and the drawings."""
    options = dict(config.options) | ({} if task.n_classes is None else {"n_classes": task.n_classes})
    if isinstance(task, tasks.Depth):
        options |= {"min_depth": task.range[0], "max_depth": task.range[1]}
    torch.manual_seed(seed_of(config.seed, 0x4EAD))
    fitting, before = config.fitting(), identity.name_of(backbone) if config.tune else ""
    model = build_head(config.task, config.head, backbone, **options)
    tuned = tune(model, config, fitting.lr) if config.tune else None
    model.to(device)
    fitting.best_by, fitting.best_is = task.score, task.score_is
    measured_on = "validation" if task.val is not None else "training"
    with frozen_features(config, run, task, model):
        report = fit(
            model,
            task.batches(distributed.rank(), distributed.world()),
            task.loss,
            fitting,
            run,
            evaluate=lambda module: task.evaluate(module, device),
            resume=resume,
            about=config,
            tuned=tuned,
        )
        if config.tune:
            save_tuned(run, model, config, before)
        metrics = report.best[1] if report.best is not None else {}
        path = run.path / HEAD
        if run.writer:
            save_head(
                path, model, task=config.task, head=config.head, options=options,
                class_names=task.class_names or None, preprocessing=task.preprocessing, metrics=metrics,
                steps=fitting.steps,
                data={"images": len(task.data), "measured_on": measured_on, "name": data_name(config.data)},
                tuned=config.tune or "",
            )  # fmt: skip
            with torch.no_grad():
                run.log(figure(task, model, run, device))
                if isinstance(task, tasks.Classification):
                    write_confusion(task, model, run, device)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "/" not in name)
    run.log(f"{path}: {shown} (on {measured_on} images, after {report.best[0] if report.best else 0} steps)")
    return Outcome(path, metrics, report, measured_on)


def frozen_features(config: HeadConfig, run: RunDir, task: tasks.Task, model: nn.Module) -> Any:
    """A context in which the backbone runs once an image, where neither images nor the backbone change from step to step.

    A classifier's few numbers an image are computed before; everything else is cached when it is first needed.
    """
    if config.augment == "full" or config.tune:
        return nullcontext()
    most = int(config.memory_gb * 2**30)
    if isinstance(task, tasks.Classification):
        device = next(model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
            if task.pool(model, most_bytes=most, workers=config.workers, log=run.log):
                return nullcontext()
    return cached_features(model, most_bytes=most, folder=run.path / "features" if run.writer else None)


# What another value of would make another run of; steps, rates and intervals may be changed on the way.
IDENTITY = (
    "task", "head", "data", "backbone", "weights", "options", "classes", "size", "shape", "augment", "batch", "seed",
    "tune", "tune_alpha", "tune_linears",
)  # fmt: skip


def same_as_before(run: RunDir, config: HeadConfig, resume: bool) -> None:
    """Raises where the run in this folder was started with another configuration."""
    if not resume or not run.config_file.is_file() or not any(run.checkpoints.glob("[0-9]*")):
        return
    from dinov3.config.loading import load

    before, _ = load(HeadConfig, run.config_file)
    for name in IDENTITY:
        if getattr(before, name) != getattr(config, name):
            raise DinoError(
                f"the run in {run.path} was started with {name}={getattr(before, name)!r}, not "
                f"{'the default' if getattr(config, name) is None else repr(getattr(config, name))}: "
                "take another --out, or --no-resume to start from scratch"
            )


def data_name(text: str) -> str:
    """The data's name as a file may carry it: a folder's last part, or the name before a line's options."""
    return text.partition(":")[0] if "=" in text else Path(text).name


def figure(task: tasks.Task, model: nn.Module, run: RunDir, device: torch.device, rows: int = 4) -> str:
    """Draws result.png; returns a log line. Without matplotlib nothing is drawn, which is no error."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return f"no image of the result: it needs matplotlib; install it with: {install('plots')}"
    dataset = task.val if task.val is not None else task.data
    chosen = [round(i) for i in np.linspace(0, len(dataset) - 1, min(rows, len(dataset)))]
    drawn = [task.panels(model, dataset, index, device) for index in chosen]
    heights = [3.6 * max(p.shape[0] / p.shape[1] for p in panels) for panels in drawn] + [2.4]  # inches
    page = Figure(figsize=(11, sum(heights) + 0.5), layout="constrained")
    grid = page.add_gridspec(len(chosen) + 1, 3, height_ratios=heights)
    for row, panels in enumerate(drawn):
        for column, (panel, title) in enumerate(zip(panels, ("image", "truth", "prediction"))):
            axes = page.add_subplot(grid[row, column])
            axes.imshow(panel)
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=10)
    if isinstance(task, tasks.Segmentation):
        add_legend(page, task, drawn)
    records = list(read_metrics(run.metrics_file))
    axes = page.add_subplot(grid[len(chosen), :])
    for name, side in (("total_loss", axes), (task.score, axes.twinx())):
        points = [(r["iteration"] + 1, r[name]) for r in records if r.get(name) is not None]
        colour = "tab:blue" if side is axes else "tab:red"
        if points:
            side.plot(*zip(*points), color=colour, marker="o" if side is not axes else None, linewidth=1.2)
        side.set_ylabel(name, color=colour)
    axes.set_xlabel("steps")
    axes.grid(alpha=0.3)
    path = run.path / RESULT
    with atomically(path) as temporary:
        page.savefig(temporary, dpi=110)
    return f"result drawn: {path}"


def add_legend(page: Any, task: tasks.Segmentation, drawn: Sequence[Sequence[np.ndarray]], most: int = 40) -> None:
    """Colours and names, below the page, of the classes that occur in the drawn truths and predictions."""
    from matplotlib.patches import Patch

    def codes(colours: np.ndarray) -> np.ndarray:
        return colours.reshape(-1, 3).astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])

    occur = np.unique(np.concatenate([np.unique(codes(panel)) for _, *painted in drawn for panel in painted]))
    shown = np.flatnonzero(np.isin(codes(task.colours), occur))[:most]
    # with their numbers: matplotlib leaves out names that begin with _
    labels = [f"{i} {printable(task.class_names[i])}".replace("$", r"\$") for i in shown]
    squares = [Patch(facecolor=task.colours[i] / 255, edgecolor="0.5") for i in shown]
    page.legend(squares, labels, loc="outside lower center", ncols=min(6, max(1, len(shown))), fontsize=8)


def write_confusion(task: tasks.Classification, model: nn.Module, run: RunDir, device: torch.device) -> None:
    """confusion.csv (rows: truth, columns: prediction), classes.csv (a row a class) and confusion.png, with a log line."""
    logits, labels = task.predictions(model, task.evaluated(), device)
    names, K = task.class_names, len(task.class_names)
    matrix = confusion_matrix(logits.argmax(1), labels, K, ignore_index=None).numpy()
    right, images, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    wrong = matrix - np.diag(right)
    rows = []
    for i, name in enumerate(names):
        recall, precision = (float(right[i] / n[i]) if n[i] else None for n in (images, predicted))
        mistaken = f"{names[wrong[i].argmax()]}" if wrong[i].any() else ""
        rows.append((name, int(images[i]), recall, precision, mistaken, int(wrong[i].max())))
    head = ("class", "images", "recall", "precision", "most often taken for", "times")
    for file, lines in (
        (run.path / "classes.csv", [head, *rows]),
        (run.path / "confusion.csv", [("truth", *names), *((n, *row) for n, row in zip(names, matrix.tolist()))]),
    ):
        with atomically(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows(lines)
    weakest = sorted((row for row in rows if row[2] is not None and row[2] < 1), key=lambda row: row[2] or 0)[:3]
    shown = ", ".join(f"{name} {recall:.0%} (taken for {other})" for name, _, recall, _, other, _ in weakest)
    run.log(f"recall of each class in {run.path / 'classes.csv'}" + (f"; the weakest: {shown}" if shown else ""))
    with atomically(run.path / "confusion.png") as temporary:
        drawing.confusion(matrix, names).save(temporary)
