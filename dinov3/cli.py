"""The `dinov3` command. Data goes to stdout, talk to stderr; every mistake is one sentence; torch is imported late.

Exit codes: 0 done · 1 an error, said in one sentence · 2 wrong usage · 3 done, but some pictures could not be read (they are
listed) · 130 interrupted, run the same command to continue.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dinov3.errors import DinoError

try:
    import typer
except ModuleNotFoundError:  # the core that loads models does without
    print("the dinov3 command needs typer and rich; install them with: pip install 'dinov3[cli]'", file=sys.stderr)
    raise SystemExit(1) from None

if TYPE_CHECKING:
    from dinov3.data.transforms import Preprocessing
    from dinov3.embedding.pipeline import Report

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="DINOv3: embed, search, inspect, convert, distil.",
)
UNREADABLE, INTERRUPTED = 3, 130


Shape = Literal["square", "short", "long", "native"]
Fit = Literal["resize", "pad", "crop"]
Pooling = Literal["cls", "mean", "cls+mean"]
Patches = Literal["none", "float16", "float32", "int8"]
Dtype = Literal["float32", "bfloat16", "float16"]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _batch(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"a positive number or 'auto', not {text!r}", param_hint="--batch")
    return int(text)


Weights = Annotated[
    str | None,
    typer.Option(
        help="Path, URL or Hugging Face id of the weights; 'random' for none. Default: the published ones of --model, "
        "or without it the small model that comes with the package."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")]


@app.command()
def embed(
    source: Annotated[str, typer.Argument(help="Folder, picture, list file, tar shards or parquet.")],
    out: Annotated[str, typer.Option(help="The store: a folder, or s3://, gs://, az://.")],
    model: Annotated[
        str | None, typer.Option(help="A name from `dinov3 models`. Default: what the weights are.")
    ] = None,
    weights: Weights = None,
    size: Annotated[int, typer.Option(help="Pixels of the square, or of the side that --shape names.")] = 256,
    shape: Annotated[Shape, typer.Option(help="square changes the aspect; short, long and native keep it.")] = "square",
    fit: Annotated[
        Fit, typer.Option(help="For sides that are no multiple of the patch; crop loses pixels.")
    ] = "resize",
    pooling: Annotated[Pooling, typer.Option(help="What the vector is.")] = "cls",
    patches: Annotated[Patches, typer.Option(help="Also keep the patch features, in this precision.")] = "none",
    batch: Annotated[str, typer.Option(help="Pictures a batch, or auto.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="The model's precision.")] = "float32",
    device: Device = "auto",
    workers: Annotated[int | None, typer.Option(help="Decoding threads (Ray: actors). Default: chosen.")] = None,
    column: Annotated[str | None, typer.Option(help="The picture column of a parquet file. Default: found.")] = None,
    recursive: Annotated[bool, typer.Option(help="Look into sub-folders.")] = True,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try pictures again that failed before.")
    ] = False,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="One process, or Ray Data on a cluster.")] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")] = False,
) -> None:
    """Embed pictures into a store. Run it again to continue, or to add what is new."""
    batch_size = _batch(batch)
    import torch

    from dinov3.data.sources import open_source
    from dinov3.features import default_preprocessing
    from dinov3.hub import load

    pictures = open_source(source, column=column, recursive=recursive)
    net = load(model, weights, device=_device(device), dtype=getattr(torch, dtype))
    _say_what_runs(net)
    rule = default_preprocessing(net, size=size, shape=shape, fit=fit)
    options: dict[str, Any] = {
        "preprocessing": rule,
        "pooling": pooling,
        "patches": patches,
        "batch_size": batch_size,
        "retry_failed": retry_failed,
    }
    with _Progress(pictures) as progress:
        if engine == "ray":
            from dinov3.embedding.ray_engine import embed_with_ray

            report = embed_with_ray(net, pictures, out, workers=workers, on_progress=progress, **options)
        else:
            from dinov3.embedding.pipeline import embed_source

            report = embed_source(net, pictures, out, workers=workers, on_progress=progress, **options)
    _tell_report(report, out, rule, as_json)


def _say_what_runs(net: Any) -> None:
    origin = net.origin
    parameter = next(net.parameters())
    say(f"{origin}, {str(parameter.dtype).removeprefix('torch.')} on {parameter.device}")
    if origin.random:
        say(
            "The weights are RANDOM: neighbours will share colours and layout, not meaning. Give --weights for real features."
        )
    for note in origin.notes:
        say(f"note: {note}")


class _Progress:
    """A bar with rate and time left on a terminal, a line now and then elsewhere."""

    def __init__(self, source: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.total = len(source)
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("embedding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.last = 0.0

    def __enter__(self) -> _Progress:
        self.bar.start()
        self.task = self.bar.add_task("embedding", total=self.total, rate="")
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, report: Report) -> None:
        done = report.skipped + report.embedded + len(report.failures)
        self.bar.update(self.task, completed=done, rate=f"{report.rate:.1f} pictures/s")
        if not self.console.is_terminal and report.seconds - self.last > 30:
            self.last = report.seconds
            left = (self.total - done) / report.rate if report.rate else float("nan")
            say(f"{done} of {self.total} · {report.rate:.1f} pictures/s · {left / 60:.0f} min left")


def _tell_report(report: Report, out: str, rule: Preprocessing, as_json: bool) -> None:
    shown = report.failures[:20]
    for failure in shown:
        say(f"could not read {failure.path}: {failure.reason}")
    if len(report.failures) > len(shown):
        say(f"… and {len(report.failures) - len(shown)} more; `dinov3 info {out} --failed` lists all")
    say(
        f"{report.embedded} embedded ({report.rate:.1f} pictures/s), {report.skipped} already there, "
        f"{len(report.failures)} unreadable; {out} ({rule.id})"
    )
    if as_json:
        failures = [{"path": f.path, "reason": f.reason} for f in report.failures]
        facts = {"embedded": report.embedded, "skipped": report.skipped, "failed": failures, "found": report.found}
        print(json.dumps(facts | {"seconds": round(report.seconds, 3), "interrupted": report.interrupted}))
    if report.interrupted:
        say("interrupted; run the same command to continue")
        raise typer.Exit(INTERRUPTED)
    if report.failures:
        raise typer.Exit(UNREADABLE)


@app.command()
def search(
    store: Annotated[str, typer.Argument(help="A store made by `dinov3 embed`.")],
    image: Annotated[str, typer.Option(help="The picture to look for.")],
    top: Annotated[int, typer.Option(min=1, help="How many neighbours.")] = 10,
    where: Annotated[str | None, typer.Option(help='SQL filter on columns, for example "width > 500".')] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every row even in a large store.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Also draw the query and its neighbours into this PNG.")] = None,
    weights: Annotated[str | None, typer.Option(help="Where the store's weights lie now, if they moved.")] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Find the pictures of a store that are most like one picture (cosine similarity)."""
    from dinov3.embedding.pipeline import model_of, query_vector
    from dinov3.embedding.search import search as neighbours
    from dinov3.embedding.search import sheet as draw
    from dinov3.embedding.store import EmbeddingStore

    opened = EmbeddingStore.open(store)
    net, preprocessing = model_of(opened, device=_device(device), weights=weights)
    if net.origin.random:  # type: ignore[union-attr]
        say("The store was filled with RANDOM weights: neighbours share colours and layout, not meaning.")
    vector = query_vector(opened, image, net, preprocessing)
    (hits,) = neighbours(opened, vector, top=top, where=where, exact=True if exact else None)
    if as_json:
        named = ("rank", "path", "score", "width", "height")
        print(json.dumps([{k: getattr(hit, k) for k in named} | hit.extra for hit in hits], default=str))
    else:
        for hit in hits:
            print(f"{hit.rank}\t{hit.score:.4f}\t{hit.path}")
    if sheet is not None:
        draw(image, hits, sheet)
        say(f"drawn: {sheet}")


@app.command()
def info(
    what: Annotated[str, typer.Argument(help="A weights file or folder, or a store.")],
    failed: Annotated[bool, typer.Option("--failed", help="List a store's unreadable pictures.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Say what a weights file or a store is."""
    path = Path(what)
    is_store = ("://" in what and not what.startswith(("http", "file:"))) or (path / "pictures.lance").is_dir()
    facts = _store_facts(what, failed) if is_store else _weights_facts(what)
    if as_json:
        print(json.dumps(facts, default=str))
        return
    for name, value in facts.items():
        if isinstance(value, list):
            print(f"{name}:" + "".join(f"\n  {v}" for v in value))
        else:
            print(f"{name}: {value}")


def _store_facts(uri: str, failed: bool) -> dict[str, Any]:
    from dataclasses import asdict

    from dinov3.embedding.store import EmbeddingStore

    store = EmbeddingStore.open(uri)
    failures = store.failures()
    facts = {"kind": "embedding store", "pictures": len(store), "unreadable": len(failures)} | asdict(store.facts)
    facts["columns"] = ", ".join(store.columns)
    if failed:
        facts["failed"] = [f"{f.path}: {f.reason}" for f in failures]
    return facts


def _weights_facts(source: str) -> dict[str, Any]:
    from dinov3.weights import loading

    opened = loading.open(source)
    tensors = [v for k, v in opened.state_dict.items() if not k.endswith(("bias_mask", "rope_embed.periods"))]
    tensors = list({id(t): t for t in tensors}.values())
    return {
        "kind": "weights",
        "source": opened.source,
        "form": opened.form,
        "model": " or ".join(row.id for row in opened.rows) or "no published architecture",
        "tensors": len(opened.state_dict),
        "values": sum(t.numel() for t in tensors),
        "dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors})),
        "fingerprint": loading.fingerprint(opened.state_dict),
        "mean": opened.mean or (opened.rows[0].mean if opened.rows else None),
        "std": opened.std or (opened.rows[0].std if opened.rows else None),
        "config": str(opened.config),
        "notes": list(opened.notes),
    }


@app.command()
def models(
    size: Annotated[int, typer.Option(help="For the tokens column: a square of so many pixels.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """List every published backbone: size, statistics, scores, names and where to get the file."""
    from dinov3.weights import catalog

    if as_json:
        print(json.dumps([_model_facts(row, size) for row in catalog.ROWS]))
        return
    from rich.console import Console
    from rich.table import Table

    columns = (f"{'model':31}", "params", "width", f"tokens@{size}", "mean")
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column.strip(), justify="left" if i in (0, 4) else "right", no_wrap=True)
    table.add_column("published scores")
    for row in catalog.ROWS:
        scores = ", ".join(f"{k} {v:g}" for k, v in row.scores.items() if v == v)
        mean = "/".join(f"{v:.3f}".lstrip("0") for v in row.mean)
        cells = (row.id, f"{row.parameters / 1e6:,.1f}M", str(row.width), str(row.tokens(size)), mean)
        table.add_row(*cells, scores or _where(row))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    print("\nAlso answers to: the Hugging Face id, the timm name, the hub function, the file's name. Files:")
    for row in catalog.ROWS:
        print(f"  {row.id:32} {row.file}  {row.hf or f'({_where(row)})'}  {' '.join(row.timm)}")
    print(f"\nPublished weights are under Meta's terms: request access at {catalog.DOWNLOAD_PAGE}")
    print("or on the model's Hugging Face page, then: dinov3 embed FOLDER --out STORE --weights FILE|URL|ID")
    print("Scores: arXiv 2508.10104 and model card; ↓ lower is better.")


def _where(row: Any) -> str:
    return "in this package" if row.packaged else "" if row.released else "not released"


def _model_facts(row: Any, size: int) -> dict[str, Any]:
    return {
        "id": row.id,
        "hub": row.arch,
        "huggingface": row.hf,
        "timm": list(row.timm),
        "file": row.file,
        "parameters": row.parameters,
        "width": row.width,
        "tokens": row.tokens(size),
        "size": size,
        "mean": row.mean,
        "std": row.std,
        "released": row.released,
        "scores": {k: v for k, v in row.scores.items() if v == v},
    }


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="Weights in any form: file, folder, URL, Hugging Face id.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    to: Annotated[Literal["meta", "transformers", "timm"], typer.Option(help="Whose library shall load it.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Cast the weights. Default: as they are.")] = None,
) -> None:
    """Rewrite weights for Meta's code, transformers or timm."""
    import torch

    from dinov3.export.convert import convert as run

    report = run(source, out, to=to, dtype=getattr(torch, dtype) if dtype else None)
    for note in getattr(report, "notes", ()):
        say(f"note: {note}")
    print(out)


@app.command(context_settings={"allow_interspersed_args": True})
def train(
    pictures: Annotated[str, typer.Argument(help="Folder, list file, tar shards, parquet, or a data set's line.")],
    out: Annotated[Path, typer.Option(help="The run's folder. Run again to go on after a stop.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings that win: key.sub=value …")] = None,
    model: Annotated[
        str | None, typer.Option(help="vits16, vitb16, … or a recipe's own. Default: the recipe's.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="A YAML file, or one that comes along.")] = "vits16_one_gpu",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps in all; schedules are stretched.")] = None,
    knn: Annotated[str | None, typer.Option(help="TRAIN:VAL, two labelled folders for k-NN now and then.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = True,
    seed: Annotated[int, typer.Option(help="Of weights and random draws.")] = 0,
    device: Device = "auto",
) -> None:
    """Train a backbone on your own pictures by self-distillation (DINO, iBOT, KoLeo, Gram). Under torchrun: on many."""
    from dinov3.config import load_config
    from dinov3.train.train import train as run

    chosen = training_overrides(pictures, model, recipe, steps, knn, _device(device), overrides or [])
    config, notes = load_config(recipe if recipe.endswith((".yaml", ".yml")) else f"{recipe}.yaml", chosen)
    say("settings: " + " ".join(chosen))
    outcome = run(config, out, resume=resume, seed=seed, notes=notes)
    say(f"{outcome.reason}: {outcome.iterations} of {outcome.total} steps; {out}")
    for iteration, accuracy in outcome.knn.items():
        print(f"{iteration}\t{accuracy:.4f}")


def training_overrides(
    pictures: str, model: str | None, recipe: str, steps: int | None, knn: str | None, device: str, given: list[str]
) -> list[str]:
    """What the command's options mean in the configuration's words; `given` come last and win."""
    import os

    from dinov3.config import load_config
    from dinov3.weights.catalog import resolve

    said = [f"train.dataset_path={pictures}", f"run.device={device}"]
    if model is not None:
        said.append(f"student.arch={model if model.startswith(('vit_', 'convnext_')) else resolve(model)[0].arch}")
    if device == "cpu" and not recipe.startswith("toy"):
        # the recipes speak to GPUs: a CPU gets a small batch, exact numbers, and no minutes of compilation
        workers = max(1, (os.cpu_count() or 2) // 2)
        said += ["compute_precision.param_dtype=fp32", "train.compile=false", "train.batch_size_per_gpu=16"]
        said.append(f"train.num_workers={workers}")
    if steps is not None:
        name = recipe if recipe.endswith((".yaml", ".yml")) else f"{recipe}.yaml"
        epochs = load_config(name, said + given)[0].optim.epochs
        if steps < epochs:
            raise DinoError(f"--steps {steps}: the schedules of {recipe} need at least {epochs} (or set optim.epochs)")
        said.append(f"train.OFFICIAL_EPOCH_LENGTH={round(steps / epochs)}")
        said += [
            f"checkpointing.period={max(1, steps // 20)}",
            f"evaluation.eval_period_iterations={max(1, steps // 4)}",
        ]
    if knn is not None:
        labelled, colon, unlabelled = knn.rpartition(":")
        if not colon:
            raise DinoError(f"--knn takes two folders, TRAIN:VAL, not {knn!r}")
        said += [f"evaluation.knn_train_dataset={labelled}", f"evaluation.knn_val_dataset={unlabelled}"]
    return said + given


@app.command()
def distill(
    pictures: Annotated[str, typer.Argument(help="Folder, list file, tar shards or parquet.")],
    out: Annotated[Path, typer.Option(help="The run's folder. Run again to go on after a stop.")],
    teacher: Annotated[
        list[str],
        typer.Option(
            help="KIND:WHAT[,option=value…], KIND one of dinov3, transformers, timm, mobilenetv2; repeatable."
        ),
    ],
    student: Annotated[str, typer.Option(help="A name from `dinov3 models`.")] = "dinov3_vitt16",
    weights: Annotated[str | None, typer.Option(help="The student's first weights. Default: random.")] = None,
    inherit: Annotated[str | None, typer.Option(help="A DINOv2 folder the student begins as a small copy of.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Batches in all.")] = 2000,
    batch: Annotated[int, typer.Option(min=2, help="Pictures a batch.")] = 64,
    sizes: Annotated[str, typer.Option(help="SIDE:SHARE of the steps, in order.")] = "128:0.9,224:0.1",
    views: Annotated[int, typer.Option(min=1, help="Different views of a picture.")] = 4,
    scale: Annotated[float, typer.Option(help="Smallest share of the picture that a view shows.")] = 0.35,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 5e-4,
    cache: Annotated[str | None, typer.Option(help="Keep what the teachers say in this folder.")] = None,
    knn: Annotated[str | None, typer.Option(help="Labelled folder for k-NN now and then.")] = None,
    knn_every: Annotated[int, typer.Option(min=1, help="Steps between.")] = 500,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Device = "auto",
) -> None:
    """Train a small model to say what larger ones say of your pictures."""
    from dinov3.train.distill import DistillConfig
    from dinov3.train.distill import distill as run

    config = DistillConfig(
        pictures=pictures, teachers=teacher, student=student, weights=weights, inherit=inherit, steps=steps, batch=batch,
        sizes=sizes, views=views, scale=[scale, 1.0], lr=lr, cache=cache, knn=knn, knn_every=knn_every,
        save_every=save_every, bf16=bf16, seed=seed, device=_device(device),
    )  # fmt: skip
    print(run(config, out))


def main() -> None:
    """The command's door: a `DinoError` is a sentence on stderr and exit code 1, Ctrl-C is 130."""
    try:
        app()
    except DinoError as error:
        say(f"error: {error}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        say("interrupted")
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # `dinov3 models | head`
        sys.stderr.close()
        raise SystemExit(0) from None


if __name__ == "__main__":
    main()
