"""Commands that predict: segment, depth, detect, canopy, classify, zero-shot. The same steps in all of them:

list the images, load the model, and for each image: read, predict, save, one line on stdout. What cannot be read is
named, counted, and the exit code is 3. Results of different images never share a name (`images.csv` keeps the list).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov3.cli.shared import (
    INTERRUPTED,
    UNREADABLE,
    Dtype,
    Progress,
    app,
    config_options,
    device_of,
    log,
    log_failures,
    result_folder,
)
from dinov3.config.bounds import setting
from dinov3.errors import DinoError, ImageError, printable
from dinov3.files import DISK_ERRORS, Lock, atomically

if TYPE_CHECKING:
    from dinov3.data.images import DecodedImage
    from dinov3.data.sources import Item

Images = Annotated[list[str], typer.Argument(help="Images, folders, list files, tar shards or parquet.")]
Out = Annotated[Path, typer.Option(help="Folder for the results; made if need be.", callback=result_folder)]
OutIfAny = Annotated[
    Path | None, typer.Option(help="Folder for the results. Default: none, only stdout.", callback=result_folder)
]
Size = Annotated[int | None, typer.Option(min=1, help="Pixels of the short side that the model sees.")]
Window = Annotated[int | None, typer.Option(min=1, help="Sliding windows of so many pixels (after --size).")]
Stride = Annotated[int | None, typer.Option(min=1, help="Pixels between windows. Default: 2/3 of a window.")]
Labels = Annotated[str | None, typer.Option(help="Class names: a,b,c or a text file with one a line.")]


@dataclass
class ModelOptions:
    """Which model a verb runs, where, and how precisely."""

    model: str | None = setting(None, help="A published head by its hub name. Default: the one for this task.")
    head: str | None = setting(None, help="A head file of your own or its run's folder, instead of --model.")
    weights: str | None = setting(
        None,
        help="The published head's file: path, URL or Hugging Face id. 'random': an untrained head, to try the command; "
        "without --model it stands on the small backbone that ships with the package.",
    )
    backbone_weights: str | None = setting(None, help="The backbone's file: path, URL or Hugging Face id.")
    device: str = setting("auto", help="cpu, cuda, cuda:1, mps, or auto.")
    dtype: Dtype | None = setting(
        None, help="The model's precision. Default: float32; of a --head, what it was trained in."
    )


@app.command()
@config_options(ModelOptions)
def segment(
    config: ModelOptions,
    images: Images,
    out: Out,
    size: Size = None,
    window: Window = None,
    stride: Stride = None,
    whole: Annotated[bool, typer.Option("--whole", help="No windows: everything at once.")] = False,
    labels: Labels = None,
) -> None:
    """The class of every pixel: an indexed PNG, its legend as JSON, and a drawing, for each image."""
    from dinov3.predict.dense import predict_segments

    names, listed = names_given(labels), list_images(images, out)
    net = model_for("segment", config, size, n_classes=len(names or ()))
    options: dict[str, Any] = {"size": size, "window": window, "stride": stride, "whole": whole, "names": names}
    save_each(listed, "segmenting", lambda p, _: predict_segments(net, p, **options), out)


@app.command()
@config_options(ModelOptions)
def depth(
    config: ModelOptions,
    images: Images,
    out: Out,
    size: Size = None,
    window: Window = None,
    stride: Stride = None,
    flip: Annotated[bool, typer.Option("--flip", help="Mean with the mirrored image: slower, better.")] = False,
) -> None:
    """Metres from the camera for every pixel: a float32 .npy and a drawing for each image."""
    from dinov3.predict.dense import predict_depth

    listed = list_images(images, out)
    net = model_for("depth", config, size)
    options: dict[str, Any] = {"size": size, "window": window, "stride": stride, "flip": flip}
    save_each(listed, "measuring", lambda p, _: predict_depth(net, p, **options), out)


@app.command()
@config_options(ModelOptions)
def canopy(
    config: ModelOptions,
    images: Images,
    out: Out,
    size: Annotated[int | None, typer.Option(min=1, help="Resize the short side first. Default: not at all.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Larger images are seen through windows.")] = 1024,
    stride: Stride = None,
) -> None:
    """Height of trees in metres from aerial images: GeoTIFF for GeoTIFFs, else .npy, and a drawing for each."""
    from dinov3.predict.dense import predict_canopy

    listed = list_images(images, out)
    net = model_for("canopy", config)
    options: dict[str, Any] = {"size": size, "window": window, "stride": stride}
    save_each(listed, "measuring", lambda p, data: predict_canopy(net, p, file=data, **options), out)


@app.command()
@config_options(ModelOptions)
def detect(
    config: ModelOptions,
    images: Images,
    out: Out,
    size: Size = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="The least score that is kept.")] = 0.5,
    most: Annotated[int, typer.Option(min=1, help="At most so many boxes an image.")] = 100,
    labels: Labels = None,
) -> None:
    """Boxes around objects: one detections.json in COCO's form, and a drawing for each image."""
    from dinov3.predict.detect import predict_objects, write_coco

    names, listed = names_given(labels), list_images(images, out)
    net = model_for("detect", config, size, n_classes=len(names or ()))
    options: dict[str, Any] = {"size": size, "threshold": threshold, "most": most, "names": names}
    results = []

    def save(path: str, name: str, found: Any) -> str:
        found.drawing().save(out / f"{name}_boxes.png")
        results.append((path, found.without_image()))
        return found.summary()

    def finish() -> None:
        if results:
            write_coco(out / "detections.json", results)

    predict_each(listed, "detecting", lambda p, _: predict_objects(net, p, **options), out, save, finish)


@app.command()
@config_options(ModelOptions)
def classify(
    config: ModelOptions,
    images: Images,
    out: OutIfAny = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of the square cut from the middle.")] = None,
    top: Annotated[int, typer.Option(min=1, help="So many classes an image.")] = 5,
    labels: Labels = None,
) -> None:
    """What images show: classes with probabilities on stdout, in classes.csv and, with --out, drawn."""
    from dinov3.predict.classify import predict_classes

    names, listed = names_given(labels), list_images(images, out)
    net = model_for("classify", config, size, n_classes=len(names or ()))
    save_classes(listed, lambda p, _: predict_classes(net, p, size=size, names=names), out, top)


@dataclass
class TextOptions:
    """Which dino.txt, where, and how precisely."""

    weights: str | None = setting(None, help="dino.txt's head and text tower. 'random': to try.")
    backbone_weights: str | None = setting(None, help="The backbone's file: path, URL or Hugging Face id.")
    vocabulary: str | None = setting(None, help="CLIP's bpe_simple_vocab_16e6.txt.gz. Default: the published one.")
    device: str = setting("auto", help="cpu, cuda, cuda:1, mps, or auto.")
    dtype: Dtype = setting("float32", help="The model's precision.")


@app.command("zero-shot")
@config_options(TextOptions)
def zero_shot(
    config: TextOptions,
    images: Images,
    labels: Annotated[str, typer.Option(help="Class names: a,b,c or a text file with one a line.")],
    out: OutIfAny = None,
    templates: Annotated[
        str | None, typer.Option(help="Text file of sentences with {} for the class, or 'none'. Default: CLIP's 80.")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="The class of every pixel; needs --out.")] = False,
    size: Annotated[
        int | None, typer.Option(min=1, help="Side of the square seen (384); with --dense the short side (512).")
    ] = None,
    window: Annotated[int | None, typer.Option(min=1, help="With --dense. Default: 384.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="With --dense. Default: half a window.")] = None,
    top: Annotated[int, typer.Option(min=1, help="So many classes an image.")] = 5,
) -> None:
    """Classes by their names alone, with dino.txt: of whole images, or with --dense of every pixel."""
    import warnings

    from dinov3.data import names as known
    from dinov3.predict.classify import predict_places, predict_words, words

    names = names_given(labels)
    assert names is not None
    if dense and out is None:
        raise DinoError("--dense writes a mask for each image: name a folder with --out")
    if not dense and (window or stride):
        raise DinoError("--window and --stride are for --dense")
    listed = list_images(images, out)
    sentences = ("{}",) if templates == "none" else known.read_names(templates, "templates") if templates else None
    model, tokenizer = text_model(config)
    with warnings.catch_warnings(record=True, action="always") as caught:
        classes = words(model, tokenizer, names, sentences)
    for warning in caught:
        log(f"note: {warning.message}")
    if dense:
        assert out is not None
        options = {k: v for k, v in {"size": size, "window": window, "stride": stride}.items() if v is not None}
        save_each(
            listed, "segmenting", lambda p, _: predict_places(model, p, classes, **options), out, "_words", most=top
        )
    else:
        square = {"size": size} if size is not None else {}
        save_classes(listed, lambda p, _: predict_words(model, p, classes, **square), out, top)


# ---- the loop over images ------------------------------------------------------------------------------------------


Predict = Callable[["DecodedImage", bytes], Any]
Listed = list[tuple[str, "Item"]]  # absolute paths, and where their bytes are


def list_images(images: list[str], out: Path | None) -> Listed:
    """Every image once, however often it was named; results of earlier runs in `out` are left out. Raises before a model is
    opened where a file is missing."""
    from dinov3.data.sources import open_source, videos_left_out

    sources = [open_source(p) for p in images]
    folders = [os.path.abspath(p) for p in images if os.path.isdir(p)]
    if out is not None and os.path.abspath(out) in folders:
        raise DinoError(f"--out {out} is the images' own folder: results would be taken for images; name another")
    if videos := [pattern for source in sources for pattern in source.videos]:
        log(f"note: {videos_left_out(videos)}")
    return list(_each(sources, out if folders else None))


def save_each(images: Listed, label: str, predict: Predict, out: Path, suffix: str = "", **summary: int) -> None:
    """Every image's result in its own files, and a line of it on stdout."""

    def save(path: str, name: str, found: Any) -> str:
        found.save(out, name + suffix)
        return found.summary(**summary)

    predict_each(images, label, predict, out, save)


def save_classes(images: Listed, predict: Predict, out: Path | None, top: int) -> None:
    """The best classes of every image on stdout; with `out` in one table for all images, and drawn."""
    rows: list[tuple[Any, ...]] = []
    tables: dict[str, tuple[str, ...]] = {}

    def save(path: str, name: str, found: Any) -> str:
        if out is not None:
            found.drawing().save(out / f"{name}_{found.DRAWN}.png")
        rows.extend((path, *row) for row in found.rows(top))
        tables[f"{found.FILE}.csv"] = ("image", *found.COLUMNS)
        return found.summary(top)

    def finish() -> None:
        for file, columns in tables.items() if out is not None else ():
            write_csv(out / file, columns, rows)  # type: ignore[operator]

    predict_each(images, "classifying", predict, out, save, finish)


def predict_each(
    images: Listed,
    label: str,
    predict: Predict,
    out: Path | None,
    save: Callable[[str, str, Any], str],
    finish: Callable[[], None] = lambda: None,
) -> None:
    """Predicts and saves image by image; prints what `save` (path, name for files, result) gives.

    An image that cannot be read, predicted or saved is named at the end, with exit code 3, and stops nothing. Mistakes that
    concern all images (`DinoError`, a full disk) are raised. `finish` runs at the end, however it comes.
    """
    from dinov3.data.images import open_image
    from dinov3.predict.common import OutputNames, make_folder

    if out is not None:
        make_folder(out)
    lock = Lock(out / ".running.lock", str(out)) if out is not None else None
    names = OutputNames(out) if out is not None else None
    failures: list[tuple[str, str]] = []
    total = len(images)
    done = 0
    try:
        with Progress(label, total) as progress:
            for path, item in images:
                try:
                    data = item.read()
                    result = predict(open_image(data), data)
                    text = save(path, names(path) if names is not None else Path(path).stem, result)
                except ImageError as error:
                    failures.append((path, str(error)))
                except (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, ValueError) as error:
                    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                        error.filename = error.filename or (out and str(out))
                        raise
                    failures.append((path, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
                else:
                    print(f"{printable(path)}\t{text}")
                    done += 1
                progress(done + len(failures))
    except KeyboardInterrupt:
        log(f"interrupted after {done} of {total} images; what is done is saved")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        finish()
        if lock is not None:
            lock.release()
    log_failures(failures)
    log(f"{done} images, {len(failures)} unreadable" + (f"; {out}" if out is not None else ""))
    if failures:
        raise typer.Exit(UNREADABLE)


def _each(sources: list[Any], results: Path | None) -> Iterator[tuple[str, Item]]:
    """Every image once, by its absolute path, however often it was named; none of an earlier run's `results`."""
    from dinov3.data.sources.items import storable

    seen: set[str] = set()
    inside = None if results is None else storable(os.path.join(os.path.abspath(results), ""))
    for source in sources:
        for item in source:
            path = os.path.join(source.root, item.path)
            if path not in seen and (inside is None or not os.path.abspath(path).startswith(inside)):
                seen.add(path)
                yield path, item


def write_csv(path: Path, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """A table whose first column is the image; rows of other images, from earlier runs, stay."""
    new = {str(row[0]) for row in rows}
    kept: list[list[str]] = []
    if path.is_file():
        from dinov3.predict.common import set_aside

        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            there = csv.reader(file)
            if next(there, None) == list(head):
                kept = [row for row in there if row and row[0] not in new]
            else:
                log(f"note: {path} was another table; it is now {set_aside(path)}")
    with (
        atomically(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(kept)
        writer.writerows(rows)


def names_given(labels: str | None) -> list[str] | None:
    """Class names as people give them: a,b,c or a text file."""
    if labels is None:
        return None
    if os.path.isfile(labels):  # false, not an error, for a text too long to be a name
        from dinov3.data.names import read_names

        return list(read_names(labels))
    if "," not in labels and (labels.endswith(".txt") or os.sep in labels):
        raise DinoError(f"--labels {labels}: no such file (class names are written a,b,c)")
    names = [name.strip() for name in labels.split(",")]
    if not all(names):
        raise DinoError(f"--labels {labels!r} has an empty name; write a,b,c or name a text file")
    return names


# ---- the model -----------------------------------------------------------------------------------------------------


def model_for(verb: str, config: ModelOptions, size: int | None = None, n_classes: int = 0) -> Any:
    """The model of a verb's options, logged on stderr; an untrained one only where "random" requests it, with a warning."""
    import torch

    from dinov3.hub.own_heads import AUTOCAST, open_task_model, shipped_head, untrained_model

    if config.head is not None and (config.model is not None or config.weights is not None):
        raise DinoError("--head is a head file of your own, --model and --weights a published one: give one of them")
    if config.head is None and config.model is None and config.weights is None and config.backbone_weights is None:
        config = replace(config, head=str(shipped_head(verb)))
        log("the small model that ships with the package, for a first look; see --weights for better ones")
    place, precision = device_of(config.device), getattr(torch, config.dtype) if config.dtype else None
    if config.head is not None:
        net = open_task_model(
            verb, config.head, backbone_weights=config.backbone_weights, device=place, dtype=precision
        )
        info = net.head_info
        computes = str(next(net.parameters()).dtype).removeprefix("torch.")  # info.dtype is that of the file
        log(f"{info.head} head {config.head} over {info.backbone_label}, {computes} on {place}")
        trained = info.preprocessing.center_crop or info.preprocessing.size
        if size is not None and size != trained:
            log(f"note: the head was trained at {trained} pixels, not at --size {size}")
        return net
    precision = precision or torch.float32
    if config.weights == "random" and config.model is None:
        classes = {"n_classes": n_classes} if n_classes else {}
        net = untrained_model(verb, config.backbone_weights, device=place, dtype=precision, **classes)
        _log_random(f"the head for {verb}")
        return net
    options: dict[str, Any] = {"autocast_dtype": torch.float32} if verb in AUTOCAST else {}
    net = open_task_model(
        verb,
        config.model,
        weights=config.weights,
        backbone_weights=config.backbone_weights,
        device=place,
        dtype=precision,
        **options,
    )
    if net.origin.random:
        _log_random(net.origin.name)
    else:
        log(f"{net.origin}, {config.dtype or 'float32'} on {place}")
    for note in net.origin.notes:
        log(f"note: {note}")
    return net


def _log_random(what: str) -> None:
    log(f"The weights of {what} are RANDOM: results have the right form and no meaning. Give --weights or --head.")


def text_model(config: TextOptions) -> tuple[Any, Any]:
    """dino.txt and its tokenizer; an untrained small one where "random" requests it."""
    import torch

    from dinov3 import hub
    from dinov3.hub import published_heads
    from dinov3.hub.own_heads import shipped_head

    place, precision = device_of(config.device), getattr(torch, config.dtype)
    files = (config.weights, config.backbone_weights, config.vocabulary)
    if config.weights is None and config.backbone_weights is None:
        shipped_head("zero-shot")  # there is none: raises
    if config.weights != "random":
        model, tokenizer = published_heads.open_model(*files, device=place, dtype=precision)
        log(f"{model.origin}, {config.dtype} on {place}")
        return model, tokenizer
    from dinov3.data.tokenizer import Tokenizer
    from dinov3.heads.dinotxt import DinoTxtConfig, TextConfig

    tokenizer = (
        Tokenizer.from_file(config.vocabulary)
        if config.vocabulary is not None
        else published_heads.vocabulary(None, 49_408)
    )
    under: Any = hub.load(None, config.backbone_weights)
    text = TextConfig(vocab_size=tokenizer.vocab_size, dim=128, num_heads=2, num_layers=2)
    torch.manual_seed(0)
    model = published_heads.fresh(under, text, DinoTxtConfig(embed_dim=2 * under.embed_dim))
    _log_random(f"the text tower and the vision head (over {under.origin})")
    return published_heads.placed(model, place, precision), tokenizer
