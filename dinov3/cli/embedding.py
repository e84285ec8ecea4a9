"""Verbs over a store: embed images, search, serve both, explore them in a page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dinov3.cli.shared import (
    INTERRUPTED,
    UNREADABLE,
    Device,
    Fit,
    Patches,
    Pooling,
    Progress,
    Shape,
    app,
    batch_of,
    config_options,
    device_of,
    log,
    log_away,
    log_failures,
    log_model,
)
from dinov3.config.bounds import setting
from dinov3.errors import DinoError, importing, printable, require

if TYPE_CHECKING:
    from dinov3.data.transforms.inputs import Preprocessing
    from dinov3.embedding.pipeline import Report
    from dinov3.embedding.store import EmbeddingStore


@dataclass
class EmbedOptions:
    weights: str | None = setting(
        None,
        help="Path, URL or Hugging Face id of the weights; 'random' for none. Default: the published ones of --model, "
        "or without it the small model that ships with the package.",
    )
    backbone_weights: str | None = setting(
        None, help="For a dino.txt --model, whose --weights are the head's: the backbone's file."
    )
    size: int = setting(256, help="Pixels of the square, or of the side that --shape names.")
    shape: Shape = setting("square", help="square changes the aspect; short, long and native keep it.")
    fit: Fit = setting("resize", help="For sides that are no multiple of the patch; crop loses pixels.")
    pooling: Pooling | None = setting(None, help="What the vector is. Default: cls; cls+mean for dino.txt.")
    patches: Patches = setting("none", help="Also keep the patch features, in this precision.")
    batch: str = setting("auto", help="Images a batch, or auto.")
    precision: str = setting("fp32", help="fp32, bf16, int8 (CPUs with our kernels) or fp8 (new NVIDIA GPUs).")
    workers: int | None = setting(None, at_least=0, help="Decoding threads (Ray: actors). Default: chosen.")
    column: str | None = setting(None, help="The image column of a parquet file. Default: found.")
    fps: float = setting(1.0, help="Frames a second that are taken of a video file.")
    recursive: bool = setting(True, help="Include sub-folders.")
    retry_failed: bool = setting(False, help="Try images again that failed before.")
    prune: bool = setting(False, help="Remove images from the store whose files were deleted.", flag="--prune")
    strict: bool = setting(False, help="Exit code 3 for unreadable images of earlier runs as well.", flag="--strict")
    engine: Literal["local", "ray"] = setting("local", help="One process, or Ray Data on a cluster.")


@app.command()
@config_options(EmbedOptions)
def embed(
    config: EmbedOptions,
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE…", help="Folders, images, list files, tar shards, parquet, videos.")
    ],
    out: Annotated[str, typer.Option(help="The store: a folder, or s3://, gs://, az://.")],
    model: Annotated[
        str | None, typer.Option(help="A name from `dinov3 models`. Default: what the weights are.")
    ] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")] = False,
) -> None:
    """Embed images into a store. Run it again to continue, or to add what is new."""
    c, batch_size = config, batch_of(config.batch)
    require("pyarrow", "search", "an embedding store")  # missing, the error comes before a model is loaded
    with importing():
        from dinov3.data.sources import open_sources, videos_left_out
        from dinov3.features import default_preprocessing
        from dinov3.hub import HEADS, load
        from dinov3.inference import cast_of

    with Progress("listing images"):
        images = open_sources(sources, column=c.column, recursive=c.recursive, fps=c.fps)
    if images.videos:
        log(f"note: {videos_left_out(images.videos)}")
    is_text = model in HEADS and HEADS[model].task == "text"
    if is_text:
        from dinov3.hub.published_heads import ImageSide, open_towers

        if c.weights == "random":
            raise DinoError("a dino.txt with random weights has no text tower: give the head's file as --weights")
        towers = open_towers(c.weights, c.backbone_weights, device=device_of(device), dtype=cast_of(c.precision))
        net: Any = ImageSide(towers)
    elif c.backbone_weights is not None:
        raise DinoError("--backbone-weights belong to a dino.txt --model; a backbone's own file is --weights")
    else:
        ray = c.engine == "ray"  # whose workers make the fast form themselves
        kind: dict[str, Any] = {"dtype": "float32"} if ray else {"fast": c.precision}
        net = load(model, c.weights, device=device_of(device), **kind)
    log_model(net, RANDOM)
    preprocessing = default_preprocessing(net, size=c.size, shape=c.shape, fit=c.fit)
    options: dict[str, Any] = {
        "preprocessing": preprocessing,
        "pooling": c.pooling or ("cls+mean" if is_text else "cls"),
        "patches": c.patches,
        "batch_size": batch_size,
        "retry_failed": c.retry_failed,
        "prune": c.prune,
    }
    with Progress("embedding", len(images)) as bar:

        def progress(report: Report) -> None:
            bar(report.done, report.rate)

        if c.engine == "ray":
            from dinov3.embedding.ray_engine import embed_with_ray

            report = embed_with_ray(
                net, images, out, workers=c.workers, on_progress=progress, precision=c.precision, **options
            )
        else:
            from dinov3.embedding.pipeline import embed_source

            report = embed_source(net, images, out, workers=c.workers, on_progress=progress, **options)
    _log_report(report, out, preprocessing, as_json, c.strict)


RANDOM = "neighbours will share colours and layout, not meaning. Give --weights for real features."


def _log_report(report: Report, out: str, preprocessing: Preprocessing, as_json: bool, strict: bool) -> None:
    failures = [(f.path, f.reason) for f in report.failures]
    log_failures(failures, f"; `dinov3 store info {out} --failed` lists all")
    log_away(report.away, out)
    counts = [f"{report.embedded} embedded ({report.rate:.1f} images/s)", f"{report.skipped} already there"]
    for name in ("replaced", "moved", "copied", "touched"):
        if getattr(report, name):
            counts.append(f"{getattr(report, name)} {name}")
    if report.deleted:
        pruned = "removed from the store" if report.pruned else "still in the store, --prune removes them"
        counts.append(f"{len(report.deleted)} deleted ({pruned})")
    old = len(failures) - report.new_failures
    counts.append(f"{len(failures)} unreadable" + (f" ({old} of an earlier run)" if old else ""))
    log(f"{', '.join(counts)}; {out} ({preprocessing.id})")
    if as_json:
        names = ("found", "embedded", "replaced", "skipped", "moved", "copied", "touched", "deleted", "pruned", "away")
        facts = {name: getattr(report, name) for name in names}
        facts["failed"] = [{"path": path, "reason": reason} for path, reason in failures]
        facts |= {"new_failures": report.new_failures, "seconds": round(report.seconds, 3)}
        print(json.dumps(facts | {"interrupted": report.interrupted}))
    if report.interrupted:
        log("interrupted; run the same command to continue")
        raise typer.Exit(INTERRUPTED)
    if report.new_failures or (strict and report.failures):
        raise typer.Exit(UNREADABLE)


@dataclass
class SearchOptions:
    overwrite: bool = setting(False, help="Let --sheet replace any file.")
    weights: str | None = setting(None, help="Where the store's weights lie now, if they moved.")
    backbone_weights: str | None = setting(None, help="The same for dino.txt's backbone.")
    vocabulary: str | None = setting(
        None, help="For --text: CLIP's bpe_simple_vocab_16e6.txt.gz. Default: the published one."
    )


@app.command()
@config_options(SearchOptions)
def search(
    config: SearchOptions,
    store: Annotated[str, typer.Argument(help="A store made by `dinov3 embed`.")],
    image: Annotated[
        str | None, typer.Option(help="The query image; a hit's name too, such as clip.mp4#12.500s or a.tar#1.jpg.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="The query text, for a store filled with dino.txt.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many neighbours.")] = 10,
    where: Annotated[str | None, typer.Option(help='SQL filter on columns, for example "width > 500".')] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every row even in a large store.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Also draw the query and its neighbours into this PNG.")] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Find the images of a store that are most similar to an image or a text (cosine similarity)."""
    with importing():
        from dinov3.drawing import card
        from dinov3.embedding.pipeline import both_sides, model_of, query_vector
        from dinov3.embedding.search import check_sheet
        from dinov3.embedding.search import search as neighbours
        from dinov3.embedding.search import sheet as draw
        from dinov3.embedding.store import EmbeddingStore

    if (image is None) == (text is None):
        raise DinoError("give either --image, a query image, or --text, a query text")
    if sheet is not None:
        check_sheet(sheet, config.overwrite)
    opened = EmbeddingStore.open(store)
    place = device_of(device)
    where_weights: dict[str, Any] = {"weights": config.weights, "backbone_weights": config.backbone_weights}
    with Progress("searching"):
        if text is not None:
            *_, vector_of = both_sides(opened, device=place, vocabulary=config.vocabulary, **where_weights)
            vector = vector_of(text)
        else:
            net, preprocessing = model_of(opened, device=place, **where_weights)
            if net.origin.random:  # type: ignore[union-attr]
                log("The store was filled with RANDOM weights: neighbours share colours and layout, not meaning.")
            vector = query_vector(opened, image, net, preprocessing)
        hits = neighbours(opened, vector, top=top, where=where, exact=True if exact else None)
    if as_json:
        named = ("rank", "path", "score", "width", "height")
        print(json.dumps([{k: getattr(hit, k) for k in named} | hit.extra for hit in hits], default=str))
    else:
        for hit in hits:
            print(f"{hit.rank}\t{hit.score:.4f}\t{printable(hit.path)}")
    if sheet is not None:
        draw(image if image is not None else card(str(text)), hits, sheet, overwrite=config.overwrite)
        log(f"drawn: {sheet}")


@dataclass
class ServeOptions:
    weights: str | None = setting(None, help="As for `embed`; with --store: where its weights lie now, if they moved.")
    backbone_weights: str | None = setting(None, help="With a --store of dino.txt: the same for its backbone.")
    vocabulary: str | None = setting(None, help="With a --store of dino.txt: CLIP's file, as for `search --text`.")
    size: int = setting(256, help="Pixels of the square, or of the side that --shape names.")
    shape: Shape = setting("square", help="square changes the aspect; short, long and native keep it.")
    fit: Fit = setting("resize", help="For sides that are no multiple of the patch; crop loses pixels.")
    pooling: Pooling = setting("cls", help="What the vector is.")
    precision: str = setting("fp32", help="fp32, bf16, int8 (CPUs with our kernels) or fp8 (new NVIDIA GPUs).")
    batch: int = setting(16, at_least=1, help="Images a batch, at most.")
    max_mb: int = setting(32, at_least=1, help="Megabytes that a request may have.")
    max_megapixels: int = setting(50, at_least=1, help="Megapixels that an image may have.")
    max_images: int = setting(64, at_least=1, help="Images that a request may have.")
    allow_host: list[str] = setting([], help="A further name in the Host header; '*': any. Give it again for more.")


def _sides_of(
    store: EmbeddingStore | None, c: ServeOptions | ExploreOptions, model: str | None, device: str, *, fast: str, **shape: Any
) -> tuple[Any, Preprocessing, Any]:  # fmt: skip
    """(model, preprocessing, what makes a text a vector or None) for many queries: those that filled the store, or `model`
    with the preprocessing that `shape` describes."""
    from dinov3.embedding.pipeline import both_sides, is_text_aligned, model_of
    from dinov3.features import default_preprocessing
    from dinov3.hub import load

    where: dict[str, Any] = {"device": device_of(device), "weights": c.weights}
    if store is None:
        if c.backbone_weights is not None or c.vocabulary is not None:
            raise DinoError("--backbone-weights and --vocabulary belong to a store of dino.txt")
        net = load(model, fast=fast, **where)
        return net, default_preprocessing(net, **shape), None
    if is_text_aligned(store.facts):
        where["backbone_weights"] = c.backbone_weights
        try:
            return both_sides(store, vocabulary=c.vocabulary, **where)
        except DinoError as error:
            if c.vocabulary is not None:
                raise
            log(f"note: no search by text: {error}")  # without a vocabulary; other errors come again now
    elif c.backbone_weights is not None or c.vocabulary is not None:
        raise DinoError(
            f"--backbone-weights and --vocabulary are dino.txt's, and {store.uri} was filled by another model"
        )
    return (*model_of(store, lasting=True, **where), None)


@app.command()
@config_options(ServeOptions)
def serve(
    config: ServeOptions,
    store: Annotated[
        str | None, typer.Option(help="A store to search in; model, size and pooling are then the store's.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A name from `dinov3 models`.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 8000,
    device: Device = "auto",
) -> None:
    """Serve a model, and a store, over HTTP: /embed, /search, /health."""
    c, default = config, ServeOptions()
    require("fastapi", "serve", "dinov3 serve")
    with importing():
        from dinov3 import serve as service
        from dinov3 import web
        from dinov3.embedding.store import EmbeddingStore

    names = ("size", "shape", "fit", "pooling", "precision")
    given = [name for name in names if getattr(c, name) != getattr(default, name)] + ["model"] * (model is not None)
    if store is not None and given:
        raise DinoError(f"--{given[0]} is the store's own: leave it out, or serve without --store")
    opened = None if store is None else EmbeddingStore.open(store)
    shape = {name: getattr(c, name) for name in ("size", "shape", "fit")}
    net, preprocessing, vector_of = _sides_of(opened, c, model, device, fast=c.precision, **shape)
    log_model(net, RANDOM)
    app = service.application(
        net,
        preprocessing,
        pooling=c.pooling if opened is None else opened.facts.pooling,
        store=opened,
        vector_of=vector_of,
        hosts=(*web.LOOPBACK, host, *c.allow_host),
        limits=web.Limits(c.max_mb, c.max_megapixels, c.max_images),
        batch_size=c.batch,
    )
    rows = "" if opened is None else f"{len(opened)} images of {store}: "
    web.run(app, host, port, lambda at: log(f"{rows}{at}"))


@dataclass
class ExploreOptions:
    weights: str | None = setting(None, help="As for `embed`; of a store: where its weights lie now, if they moved.")
    backbone_weights: str | None = setting(None, help="The same for dino.txt's backbone.")
    vocabulary: str | None = setting(None, help="For a store of dino.txt: CLIP's file, as for `search --text`.")
    size: int = setting(512, help="Pixels of the side that the image view starts with.")
    max_mb: int = setting(32, at_least=1, help="Megabytes that a request may have.")
    max_megapixels: int = setting(100, at_least=1, help="Megapixels that an image may have.")
    allow_host: list[str] = setting([], help="A further name in the Host header; '*': any. Give it again for more.")
    open_page: bool = setting(False, help="Open the page in the browser of this machine.", flag="--open")


@app.command()
@config_options(ExploreOptions)
def explore(
    config: ExploreOptions,
    source: Annotated[str, typer.Argument(metavar="STORE|FOLDER|IMAGE", help="What to look at.")],
    model: Annotated[
        str | None, typer.Option(help="A name from `dinov3 models`; of a store it is the store's.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 8010,
    device: Device = "auto",
) -> None:
    """Open a page over a store, a folder or an image: search, a map, clusters, patches."""
    c = config
    require("fastapi", "explorer", "dinov3 explore")
    with importing():
        from dinov3 import web
        from dinov3.explorer.server import application
        from dinov3.explorer.source import FrozenModel, Source

    web.check_port(host, port)
    opened = Source.open(source)
    if opened.store is not None and model is not None:
        raise DinoError("--model is the store's own: leave it out")
    sides = _sides_of(opened.store, c, model, device, fast="fp32", size=c.size)
    log_model(sides[0], RANDOM)
    page = application(
        opened,
        FrozenModel(*sides),
        hosts=(*web.LOOPBACK, host, *c.allow_host),
        limits=web.Limits(c.max_mb, c.max_megapixels),
    )
    web.run(page, host, port, lambda at: log(f"{len(opened)} images of {source}: {at}"), open_page=c.open_page)
