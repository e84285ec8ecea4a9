"""`dinov3 store VERB STORE`: the upkeep of a store; each verb is a function of `embedding.manage`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov3.cli.models import print_facts
from dinov3.cli.shared import Progress, app, log, log_away
from dinov3.errors import DinoError, printable

if TYPE_CHECKING:
    from dinov3.embedding.store import EmbeddingStore

store_app = typer.Typer(no_args_is_help=True, help="Look after a store: info, prune, export, duplicates, verify, …")
app.add_typer(store_app, name="store")

Store = Annotated[str, typer.Argument(metavar="STORE", help="A store made by `dinov3 embed`.")]
Where = Annotated[str | None, typer.Option(help='Only images that pass this filter, for example "width > 500".')]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


def _open(uri: str) -> EmbeddingStore:
    from dinov3.embedding.store import EmbeddingStore

    return EmbeddingStore.open(uri)


@store_app.command()
def info(
    store: Store,
    failed: Annotated[bool, typer.Option("--failed", help="List the unreadable images.")] = False,
    as_json: Json = False,
) -> None:
    """Counts, root, model, preprocessing, columns, bytes."""
    from dinov3.embedding.manage import describe

    print_facts(describe(_open(store), failed), as_json)


@store_app.command()
def prune(
    store: Store,
    missing_sources: Annotated[
        bool, typer.Option("--missing-sources", help="Also images of source folders that are not there or empty.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List them only.")] = False,
    as_json: Json = False,
) -> None:
    """Remove images whose files no longer exist; prints their paths."""
    from dinov3.embedding import manage

    with _open(store) as opened, Progress("looking for files", len(opened)) as bar:
        gone, away = manage.prune(opened, missing_sources=missing_sources, dry_run=dry_run, on_progress=bar)
    _print_lines([json.dumps(gone)] if as_json else map(printable, gone))
    log_away(away, store)
    log(f"{len(gone)} images {'would be removed' if dry_run else 'removed'}")


@store_app.command()
def remove(
    store: Store,
    paths: Annotated[list[str] | None, typer.Argument(metavar="PATH…", help="Images by path.")] = None,
    where: Where = None,
) -> None:
    """Remove images from the store, by path or filter. Their files stay."""
    from dinov3.embedding import manage

    if not paths and where is None:
        raise DinoError('give paths of images, or --where "…"; all of a store goes by deleting its folder')
    with _open(store) as opened, Progress("removing"):
        removed = manage.remove(opened, paths or (), where)
    log(f"{removed} images removed")


@store_app.command()
def export(
    store: Store,
    out: Annotated[
        Path, typer.Argument(help="A .parquet, .csv, .npy (the columns beside it, as .csv) or .safetensors.")
    ],
    where: Where = None,
    column: Annotated[list[str] | None, typer.Option(help="Only these columns (repeatable).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file of that name.")] = False,
) -> None:
    """Write vectors and columns to a file."""
    from dinov3.embedding import manage

    opened = _open(store)
    with Progress("exporting", opened.count(where)) as bar:
        count = manage.export(opened, out, columns=column, where=where, overwrite=overwrite, on_progress=bar)
    log(f"{count} images: {out}")


@store_app.command()
def duplicates(
    store: Store,
    threshold: Annotated[float, typer.Option(help="Cosine from which images are alike; 1: exact copies.")] = 0.97,
    where: Where = None,
    as_json: Json = False,
) -> None:
    """Groups of images that are alike: group number and path, a line each."""
    from dinov3.embedding import manage

    opened = _open(store)
    with Progress("comparing", opened.count(where)) as bar:
        groups = manage.duplicates(opened, threshold, where=where, on_progress=bar)
    if as_json:
        print(json.dumps(groups))
    else:
        _print_lines(f"{number}\t{printable(path)}" for number, group in enumerate(groups, 1) for path in group)
    log(f"{len(groups)} groups, {sum(len(group) - 1 for group in groups)} images more than one of each")


@store_app.command()
def clusters(
    store: Store,
    k: Annotated[int, typer.Option("-k", min=1, help="How many.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the start.")] = 0,
    column: Annotated[str | None, typer.Option(help="Also store the numbers in this column.")] = None,
    where: Where = None,
    as_json: Json = False,
) -> None:
    """k-means: cluster number and path, a line each; large clusters first, the most typical image first."""
    from dinov3.embedding import manage

    with _open(store) as opened, Progress("clustering", opened.count(where)) as bar:
        found = manage.clusters(opened, k, seed=seed, where=where, on_progress=bar)
        if column is not None and column in opened.columns:
            opened.set_metadata({path: {column: number} for path, number in found.items()})
        elif column is not None:
            opened.add_column(column, found)
    if as_json:
        print(json.dumps(found))
    else:
        _print_lines(f"{number}\t{printable(path)}" for path, number in found.items())


@store_app.command()
def outliers(
    store: Store,
    top: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    where: Where = None,
    as_json: Json = False,
) -> None:
    """The images least like any other: mean cosine of their five nearest and path, a line each."""
    from dinov3.embedding import manage

    opened = _open(store)
    with Progress("comparing", opened.count(where)) as bar:
        found = manage.outliers(opened, top, where=where, on_progress=bar)
    if as_json:
        print(json.dumps(found))
    else:
        _print_lines(f"{score:.4f}\t{printable(path)}" for path, score in found)


@store_app.command()
def merge(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The store they are added to; made if there is none.")],
    others: Annotated[list[str], typer.Argument(metavar="OTHER…", help="Stores whose images are added.")],
) -> None:
    """Add the images of stores with the same model and preprocessing to one; a path that is there already stays."""
    from dinov3.embedding import manage
    from dinov3.embedding.store import EmbeddingStore

    sources = [_open(uri) for uri in others]
    for other in sources[1:]:  # before anything is made
        sources[0].check_same(other.facts)
    with EmbeddingStore.open_or_create(out, sources[0].facts, sources[0].root) as opened:
        for uri, other in zip(others, sources):
            with Progress(f"adding {uri}", len(other)) as bar:
                added = manage.merge(opened, other, on_progress=bar)
            log(f"{added} of {len(other)} images of {uri} added")
        with Progress("compacting"):
            manage.compact(opened)
        log(f"{out}: {len(opened)} images")


@store_app.command()
def compact(
    store: Store,
    flat: Annotated[
        bool, typer.Option("--flat", help="Also make a flat index for `search --exact`: 4 bytes × width an image.")
    ] = False,
) -> None:
    """Merge small files and delete older versions; `embed` does so at its end."""
    from dinov3.embedding import manage

    with _open(store) as opened, Progress("compacting"):
        before, after = manage.compact(opened, flat)
    log(f"{before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after")


@store_app.command()
def verify(
    store: Store,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged rows, so that `embed` does those images again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare every row with its checksum. Exit code 1 if anything is wrong."""
    from dataclasses import asdict

    from dinov3.embedding import manage

    with _open(store) as opened, Progress("verifying", len(opened)) as bar:
        found = manage.verify(opened, repair=repair, on_progress=bar)
    if as_json:
        print(json.dumps(asdict(found) | {"whole": found.whole}))
    else:
        _print_lines(f"damaged: {printable(path)}" for path in found.damaged)
        _print_lines(found.problems)
    log(f"{found.rows} rows, {len(found.damaged)} damaged{' and removed' if repair and found.damaged else ''}")
    if not found.whole:
        raise typer.Exit(1)


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)
