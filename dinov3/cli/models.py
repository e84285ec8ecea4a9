"""Verbs over weights: what a file is, what there is, rewriting for another library, naming foreign features."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dinov3.cli.shared import Device, Dtype, Progress, app, device_of, log, result_folder
from dinov3.errors import DinoError, WeightsError, importing


@app.command()
def info(
    what: Annotated[str, typer.Argument(help="A weights file or folder, a head file, an exported folder, or a store.")],
    failed: Annotated[bool, typer.Option("--failed", help="List a store's unreadable images.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Describe weights, a head, an exported model, or a store."""
    path = Path(what)
    is_store = ("://" in what and not what.startswith(("http", "file:"))) or any(path.glob("*.lance"))
    if is_store:
        from dinov3.embedding.manage import describe
        from dinov3.embedding.store import EmbeddingStore

        facts = describe(EmbeddingStore.open(what), failed)
    elif (path / "dinov3.json").is_file():
        facts = _exported_facts(path)
    else:
        facts = _weights_or_head_facts(what, whole=as_json)
    print_facts(facts, as_json)


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Names and values, a line each, or JSON."""
    if as_json:
        print(json.dumps(facts, default=str))
        return
    for name, value in facts.items():
        if name == "preprocessing_json":  # the line "input" says the same
            continue
        if isinstance(value, list):
            print(f"{name}:" + ("".join(f"\n  {v}" for v in value) or " none"))
        else:
            print(f"{name}: {value}")


def _weights_or_head_facts(source: str, *, whole: bool) -> dict[str, Any]:
    with importing():
        from dinov3.weights import reading

    try:
        opened = reading.open(source)
    except WeightsError:
        from dinov3.hub.own_heads import is_head_file, read_head_info

        if not is_head_file(source):
            raise
        head = read_head_info(source)
        return {
            "kind": f"{head.head} head for {head.task}",
            "source": source,
            "backbone": head.backbone_label,
            "layers": str(head.layers),
            "input": str(head.preprocessing),
            "classes": _names(head.class_names),
            "options": head.options,
            "metrics": {name: round(value, 4) for name, value in head.metrics.items()},
            "steps": head.steps,
            "data": head.data,
        }
    return _weights_facts(opened, whole=whole)


def _exported_facts(folder: Path) -> dict[str, Any]:
    """What the `dinov3.json` of an exported folder says, in short."""
    from dinov3.data.transforms.inputs import Preprocessing

    try:
        facts: dict[str, Any] = json.loads((folder / "dinov3.json").read_text())
        least = min(row["cosine"] for place in facts.pop("parity") for row in place["outputs"].values())
        if "preprocessing" in facts:
            facts["input"] = str(Preprocessing.from_json(json.dumps(facts.pop("preprocessing"))))
        facts |= {name: ", ".join(facts[name]) for name in ("outputs", "operators") if name in facts}
        facts |= {"classes": _names(facts["classes"])} if "classes" in facts else {}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise DinoError(f"{folder / 'dinov3.json'} is not what `dinov3 export` writes ({error!r})") from None
    return {"kind": "exported model", "source": str(folder), **facts, "least cosine to the model": f"{least:.7f}"}


def _names(names: Sequence[str]) -> str:
    """How many there are, and the first of them."""
    return f"{len(names)}" + (f" ({', '.join(names[:10])}{', …' * (len(names) > 10)})" if names else "")


def _config_in_short(config: Any) -> str:
    """The sizes, and what differs from the defaults."""
    sizes = ("patch_size", "embed_dim", "depth", "num_heads", "n_storage_tokens", "depths", "dims")
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name in sizes} | {
        f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default
    }
    return f"{type(config).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def _weights_facts(opened: Any, *, whole: bool) -> dict[str, Any]:
    import torch

    from dinov3.models import low_precision
    from dinov3.weights import identity

    state = {k: v for k, v in opened.state_dict.items() if not k.endswith(("bias_mask", "rope_embed.periods"))}
    loaded = opened.state_dict
    if any(t.dtype == torch.float16 for t in loaded.values()):  # `dinov3.load` computes in float32 then
        loaded = {name: t.float() if t.is_floating_point() else t for name, t in loaded.items()}
    values = {id(t): t.numel() for t in low_precision.shapes(state).values()}  # two names of one tensor count once
    return {
        "kind": "weights",
        "source": opened.source,
        "form": opened.form,
        "model": " or ".join(row.id for row in opened.rows) or "no published architecture",
        "licence": opened.licence or "not stated; the terms of what it was trained from apply",
        "tensors": len(opened.state_dict),
        "values": sum(values.values()),
        "dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in state.values()})),
        "fingerprint": identity.fingerprint(loaded),  # as stores and heads name it
        "mean": opened.mean or (opened.rows[0].mean if opened.rows else None),
        "std": opened.std or (opened.rows[0].std if opened.rows else None),
        "config": str(opened.config) if whole else _config_in_short(opened.config),
        "notes": [*opened.notes, *_same_shapes(opened)],
    }


def _same_shapes(opened: Any) -> list[str]:
    """The other files that these weights could be, where only a name would tell."""
    from dinov3.weights import catalog

    certain = opened.metadata.get("row") or any(
        row.known_by_name or f"-{row.hash}." in opened.source for row in opened.rows
    )
    same = [r.id for r in catalog.ROWS if r.known_by_name and any(r.config == row.config for row in opened.rows)]
    if certain or not same:
        return []
    have = "have" if len(same) > 1 else "has"
    return [f"{' and '.join(same)} {have} the same shapes and other licences; a name would tell, this one does not"]


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
        cells = (row.id, f"{row.parameters / 1e6:,.1f}M", str(row.config.embed_dim), str(row.tokens(size)), mean)
        table.add_row(*cells, scores or _where(row))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    print("\nOther names: the Hugging Face id, the timm name, the hub function, the file's name. Files:")
    for row in catalog.ROWS:
        print(f"  {row.id:32} {row.file or '-'}  {row.hf or f'({_where(row)})'}  {' '.join(row.timm)}")
    print("\nPublished heads, each with its backbone (verbs: classify, depth, detect, segment, canopy, zero-shot):")
    for head in catalog.HEADS:
        print(f"  {head.name:38} {head.backbone:26} {head.file.rsplit('/', 1)[-1]}")
    print("\nLicences (`dinov3 info FILE` says which applies):")
    for licence in dict.fromkeys(row.licence for row in catalog.ROWS):
        print(f"  {', '.join(name for name, its in catalog.LICENCES.items() if its == licence)}: {licence}")
    print(f"\nMeta's weights: request access at {catalog.DOWNLOAD_PAGE}")
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
        "width": row.config.embed_dim,
        "tokens": row.tokens(size),
        "size": size,
        "mean": row.mean,
        "std": row.std,
        "released": row.released,
        "licence": str(row.licence),
        "scores": {k: v for k, v in row.scores.items() if v == v},
    }


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="Weights in any form: file, folder, URL, Hugging Face id.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", callback=result_folder)],
    to: Annotated[
        Literal["meta", "transformers", "timm"] | None, typer.Option(help="Whose library shall load it.")
    ] = None,
    quantise: Annotated[
        Literal["int8", "int4"] | None, typer.Option(help="Matrices in 8 or 4 bits, for this package, instead of --to.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Cast the weights. Default: as they are.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a transformers file; larger ones are split.")] = "5GB",
) -> None:
    """Rewrite weights for Meta's code, transformers or timm, or in fewer bits for this package."""
    import torch

    from dinov3.export.convert import convert as run
    from dinov3.export.quantise import quantise as run_quantised

    kind = getattr(torch, dtype) if dtype else None
    if quantise is not None and to is None:
        report = run_quantised(source, out, quantise, dtype=kind)
    elif to is not None and quantise is None:
        report = run(source, out, to=to, dtype=kind, max_shard_size=max_shard_size)
    else:
        raise DinoError(
            "give either --to, the library that shall load it, or --quantise, which writes for this package"
        )
    for note in report.notes:
        log(f"note: {note}")
    print(out)


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A backbone's name or weights, a head file of yours, or a published head's name.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", callback=result_folder)],
    to: Annotated[
        Literal["onnx", "openvino", "torch-export", "executorch"], typer.Option(help="The form of the graph.")
    ] = "onnx",
    size: Annotated[str, typer.Option(help="HEIGHT,WIDTH in pixels, or dynamic: any in whole patches.")] = "dynamic",
    output: Annotated[
        Literal["cls", "patches", "pooled", "all"], typer.Option(help="Of a backbone; pooled: CLS and mean of patches.")
    ] = "all",
    precision: Annotated[
        Literal["fp32", "fp16", "bf16", "int8"], typer.Option(help="Of the products inside; int8: of the matrices.")
    ] = "fp32",
    weights: Annotated[str | None, typer.Option(help="The weights of a published backbone or head.")] = None,
    backbone_weights: Annotated[str | None, typer.Option(help="The backbone under a head.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Write a model as ONNX, OpenVINO, torch.export or ExecuTorch, compared with the original."""
    from dinov3.export.graph import export as run

    sides = None
    if size != "dynamic":
        parts = size.split(",")
        if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
            raise typer.BadParameter(f"HEIGHT,WIDTH in pixels or dynamic, not {size!r}", param_hint="--size")
        sides = (int(parts[0]), int(parts[1]))
    opened = _model(model, weights, backbone_weights)
    with Progress("writing and comparing"):
        facts = run(opened, out, to, size=sides, output=output, precision=precision)
    if as_json:
        print(json.dumps(facts))
        return
    for name, part in {"": facts}.items() if "parity" in facts else facts.items():
        log(f"{name} {part['target']}, {part['precision']}, checked with {part['runtime']}:".lstrip())
        for place in part["parity"]:
            extent = "×".join(map(str, place["size"])) + (" px" if len(place["size"]) == 2 else " tokens")
            differences = [f"{name} {v['max']:.1e} ({v['cosine']:.7f})" for name, v in place["outputs"].items()]
            log(f"  {place['batch']} × {extent}, largest difference (least cosine): {', '.join(differences)}")
    print(out)


def _model(name: str, weights: str | None, backbone_weights: str | None) -> Any:
    """A backbone, or a task model where a head is named."""
    from dinov3.hub import HEADS, load
    from dinov3.hub.own_heads import is_head_file, open_task_model, read_head_info, verb_of
    from dinov3.hub.published_heads import open_towers
    from dinov3.weights import catalog

    if name in HEADS or is_head_file(name):
        task = HEADS[name].task if name in HEADS else verb_of(read_head_info(name).task)
        if task == "text":
            return open_towers(weights, backbone_weights)
        return open_task_model(task, name, weights=weights, backbone_weights=backbone_weights)
    known = weights is not None or name.lower() in catalog.aliases()
    return load(name, weights) if known else load(None, name)


@app.command()
def verify_features(
    tensor: Annotated[Path, typer.Argument(help="Features of somebody: .npy, .npz, .safetensors or .csv.")],
    images: Annotated[list[str], typer.Option(help="Their images, in order: folders, files, lists. Repeatable.")],
    weights: Annotated[str | None, typer.Option(help="Path, URL or Hugging Face id. Default: the small model.")] = None,
    model: Annotated[str | None, typer.Option(help="A name from `dinov3 models`, or transformers:…, timm:….")] = None,
    key: Annotated[str | None, typer.Option(help="Which tensor of a file that holds several.")] = None,
    size: Annotated[list[int] | None, typer.Option(min=1, help="A side in pixels to try as well. Repeatable.")] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Say what features made elsewhere are: layer, norm, pooling, size, resize, statistics. Exit code 1: nothing fits."""
    from dinov3.data.sources import Item, open_sources
    from dinov3.hub import load
    from dinov3.verification import read_tensor, verify

    foreign, listed = read_tensor(tensor, key), list(open_sources(images))
    net = load(model, weights, device=device_of(device))
    with Progress("comparing"):
        verdict = verify(net, foreign, listed, read=Item.read, sizes=size or ())
    if as_json:
        print(json.dumps({"tensor": list(foreign.shape), "model": net.origin.name, **verdict.to_dict()}))  # type: ignore[union-attr]
    else:
        print(f"{tensor.name} {list(foreign.shape)}: {verdict}")
        for note in verdict.notes:
            print(f"  {note}")
        for code in dict.fromkeys(filter(None, (match.code() for match in verdict.matches))):
            print(f"  {code}")
        print("runners-up:")
        for match in verdict.runners_up:
            norm = "after the norm" if match.normed else "before the norm"
            print(f"  {match.cosine:.6f}  {match.part} {match.layer:<2}  {norm:15}  {match.pooling}  {match.inputs}")
    if not verdict.fits:
        raise typer.Exit(1)


@app.command()
def bench(
    cases: Annotated[list[str] | None, typer.Argument(metavar="MODEL:SIZE:BATCH", help="Default: three cases.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of every form.", min=1)] = 7,
    threads: Annotated[int, typer.Option(help="Of each form.", min=1)] = 1,
    skip: Annotated[list[str] | None, typer.Option(help="A library to leave out; may be repeated.")] = None,
    memory: Annotated[bool, typer.Option(help="Peak memory too: a process for each row, minutes in all.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Measure the forms of a backbone, and other libraries', on this machine."""
    from dinov3.cli.bench import CASES, table
    from dinov3.cli.bench import bench as run

    rows = run(cases or CASES, rounds=rounds, threads=threads, skip=skip or (), memory=memory, on_progress=log)
    print(json.dumps(rows) if as_json else table(rows))
