"""Commands that train a backbone, a small student or a head of your own, and the one that evaluates."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import typer

from dinov3.cli.shared import INTERRUPTED, Device, RunFolder, app, config_options, device_of, is_first, log
from dinov3.config.bounds import setting
from dinov3.distill.config import DistillConfig
from dinov3.errors import DinoError, one_of, only_known
from dinov3.train_head.config import HeadConfig


@dataclass
class TrainOptions:
    """Labels that `dinov3 train` takes: for measuring, and for metadata-guided training."""

    knn: str | None = setting(None, help="TRAIN:VAL, two labelled folders for k-NN during training.")
    guide: list[str] = setting([], help="Follow a column: COLUMN[=METHOD][,key=value…]. Needs --metadata.")
    forget: list[str] = setting([], help="The same, but the backbone is to forget the column.")
    metadata: str | None = setting(None, help="CSV or Parquet file: a column path, and those of the guides.")


@app.command(context_settings={"allow_interspersed_args": True})
@config_options(TrainOptions)
def train(
    config: TrainOptions,
    images: Annotated[str, typer.Argument(help="Folder, list file, tar shards, parquet, or a dataset spec.")],
    out: RunFolder,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings that win: key.sub=value …")] = None,
    model: Annotated[
        str | None, typer.Option(help="vits16, vitb16, … or a recipe's own. Default: the recipe's.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="First weights: a file, URL, id or run; a model's name for the published ones.")
    ] = None,
    onward: Annotated[
        str | None,
        typer.Option(
            "--continue",
            help="Pretrain on from these weights (as --weights) and never fall below them: recipe `continue`, heads first, "
            "low learning rates, a guard.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="A YAML file, or one that comes along. Default: vits16_one_gpu; with --continue, continue."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps in all; schedules are stretched.")] = None,
    resume: Annotated[bool, typer.Option(help="Resume from the newest checkpoint.")] = True,
    seed: Annotated[int, typer.Option(help="Of weights and random draws.")] = 0,
    device: Device = "auto",
) -> None:
    """Train a backbone on your own images by self-distillation (DINO, iBOT, KoLeo, Gram). Under torchrun: on many."""
    from dinov3 import distributed
    from dinov3.config.train import load_config
    from dinov3.train.train import train as run

    if weights is not None and onward is not None:
        raise DinoError("--weights and --continue both name the first weights; give one (--continue guards them)")
    recipe = recipe or ("vits16_one_gpu" if onward is None else "continue")
    recipe = recipe if recipe.endswith((".yaml", ".yml")) else f"{recipe}.yaml"
    source = weights or onward
    first = [] if source is None else first_weights(source, model)
    first += guide_overrides(config)
    chosen = training_overrides(
        images, model, recipe, steps, config.knn, device_of(device), [*first, *(overrides or [])]
    )
    settings, notes = load_config(recipe, chosen)
    log("settings: " + " ".join(chosen))
    outcome = run(settings, out, resume=resume, seed=seed, notes=notes)
    log(f"{outcome.reason}: {outcome.iterations} of {outcome.total} steps; {out}")
    for iteration, accuracy in outcome.knn.items() if is_first() else ():
        print(f"iteration {iteration}\tk-NN {accuracy:.2%}")
    distributed.shutdown()
    if outcome.signal is not None and not outcome.finished:
        raise typer.Exit(INTERRUPTED)


def first_weights(weights: str, model: str | None) -> list[str]:
    """Overrides to start from weights; without `model` the student becomes the model that they are of."""
    import json
    from dataclasses import asdict, fields

    from dinov3 import hub
    from dinov3.config.train import StudentConfig, load_model_config
    from dinov3.models.architectures import PUBLISHED, ViTConfig
    from dinov3.weights import reading
    from dinov3.weights.catalog import aliases

    if weights.lower() in aliases():
        weights = hub.published_source(aliases()[weights.lower()][0])
    student: dict[str, object] = {}
    crops: dict[str, object] = {}
    described = Path(weights).expanduser() / "resolved.yaml"
    if model is None and described.is_file():  # a run
        config = load_model_config(described)[0]
        student, crops = asdict(config.student), {k: getattr(config.crops, k) for k in ("rgb_mean", "rgb_std")}
    elif model is None:
        opened = reading.open(weights)
        row = opened.rows[0] if opened.rows else None
        mean, std = opened.mean or (row and row.mean), opened.std or (row and row.std)
        if mean and std:
            crops = {"rgb_mean": list(mean), "rgb_std": list(std)}
        sizes = {"depth": None, "embed_dim": None, "num_heads": None}
        if row is not None and row.arch in PUBLISHED:
            student = {"arch": row.arch, "patch_size": row.config.patch_size or 16} | sizes | PUBLISHED[row.arch][1]
            if isinstance(row.config, ViTConfig):  # not the recipe's: its bf16 would round the rope periods
                student["layerscale"] = row.config.layerscale_init
                student["pos_embed_rope_dtype"] = row.config.pos_embed_rope_dtype
        elif isinstance(opened.config, ViTConfig):  # one of your own sizes
            shared = {f.name for f in fields(StudentConfig)} & {f.name for f in fields(ViTConfig)} - {"drop_path_rate"}
            student = {"arch": "vit_small"} | {name: getattr(opened.config, name) for name in sorted(shared)}
            student["layerscale"] = opened.config.layerscale_init
    student["resume_from_teacher_chkpt"] = weights
    chosen = {f"student.{k}": v for k, v in student.items()} | {f"crops.{k}": v for k, v in crops.items()}
    return [f"{key}={json.dumps(value)}" for key, value in chosen.items()]


def guide_overrides(given: TrainOptions) -> list[str]:
    """Overrides for `--guide` and `--forget`: COLUMN[=METHOD][,key=value…] with the keys of `guide.guides`."""
    import json

    from dinov3.config.train import GuideConfig

    if not given.guide and not given.forget and given.metadata is None:
        return []
    if given.metadata is None or not (given.guide or given.forget):
        raise DinoError("--guide COLUMN and --forget COLUMN need --metadata FILE, and it needs one of them")
    rows: list[dict[str, object]] = []
    for text, grl in [*((t, False) for t in given.guide), *((t, True) for t in given.forget)]:
        head, *options = text.split(",")
        column, equals, method = head.partition("=")
        row: dict[str, object] = {"name": column, "grl": grl}
        if equals or grl:
            row["method"] = method or "ridge"
        for option in options:
            key, equals, value = option.partition("=")
            if not equals:
                raise DinoError(f"{option!r} in {text!r} is no key=value; write COLUMN[=METHOD][,key=value…]")
            only_known("a guide has no key", [key], [f.name for f in fields(GuideConfig)])
            row[key] = value
        rows.append(row)
    return ["guide.enabled=true", f"guide.metadata={given.metadata}", f"guide.guides={json.dumps(rows)}"]


def training_overrides(
    images: str, model: str | None, recipe: str, steps: int | None, knn: str | None, device: str, given: list[str]
) -> list[str]:
    """Configuration overrides for the command's options; `given` come last and win."""
    import os

    from dinov3.config.train import SIZES_OF_THE_NAME, load_config
    from dinov3.inference.linear import has_bf16
    from dinov3.weights.catalog import resolve

    overrides = [f"train.dataset_path={images}", f"run.device={device}"]
    if model is not None:
        overrides.append(f"student.arch={model if model.startswith(('vit_', 'convnext_')) else resolve(model)[0].arch}")
        overrides += SIZES_OF_THE_NAME
    for_gpus = device == "cpu" and load_config(recipe, overrides[:1])[0].run.device != "cpu"
    if for_gpus:  # a CPU gets a small batch, exact numbers, and no minutes of compilation
        workers = max(1, (os.cpu_count() or 2) // 2)
        overrides += ["train.compile=false", "train.batch_size_per_gpu=16", f"train.num_workers={workers}"]
    if for_gpus or (device == "cpu" and not has_bf16()):  # a step takes nine times as long in emulated bfloat16
        overrides.append("compute_precision.param_dtype=fp32")
    if steps is not None:
        overrides += [
            f"optim.iterations={steps}",
            f"checkpointing.period={max(100, steps // 20)}",  # the last step is saved in any case
            f"evaluation.eval_period_iterations={max(25, steps // 4)}",  # as is its teacher
        ]
    if knn is not None:
        labelled, colon, unlabelled = knn.rpartition(":")
        if not colon:
            raise DinoError(f"--knn takes two folders, TRAIN:VAL, not {knn!r}")
        overrides += [f"evaluation.knn_train_dataset={labelled}", f"evaluation.knn_val_dataset={unlabelled}"]
    return overrides + given


@app.command()
def doctor(
    run: Annotated[Path, typer.Argument(help="The folder of a training run, finished or still running.")],
    plot: Annotated[
        Path | None, typer.Option(help="Draw the losses and measurements there (.png, .pdf, .svg).")
    ] = None,
) -> None:
    """Is it learning? One verdict for every dump of a run, and what to do. Reads the folder; needs no GPU."""
    from dinov3.config.train import load_config
    from dinov3.runlog import plot as draw
    from dinov3.runlog import read_metrics
    from dinov3.train.doctor import facts_of, numbers_text, verdicts

    records = list(read_metrics(run / "metrics.jsonl"))
    if not records or not (run / "resolved.yaml").is_file():
        raise DinoError(
            f"{run} holds no training run (metrics.jsonl and resolved.yaml); name the --out of `dinov3 train`"
        )
    if "\nstudent:\n" not in (run / "resolved.yaml").read_text():
        raise DinoError(f"{run} is a run of another command; the doctor reads those of `dinov3 train`")
    config, _ = load_config(str(run / "resolved.yaml"))
    found = verdicts(facts_of(config, str(run)), records)
    numbers = {r["iteration"]: r for r in records if "rankme" in r}
    for each in found:
        measured = numbers_text(numbers.get(each.iteration, {}))
        print(f"step {each.iteration}  {each.name}: {each.finding}" + (f"\n    {measured}" if measured else ""))
    if not numbers:
        log(
            "nothing was measured, only losses are judged: dumps are measured where that costs at most 2 % of a run; set "
            "evaluation.eval_period_iterations higher, or evaluation.doctor_images=256 whatever it costs"
        )
    if not found:
        raise DinoError(f"{run / 'metrics.jsonl'} holds no losses yet")
    print(f"\n{found[-1].name}: {found[-1].advice}")
    if plot is not None:
        log(draw(run / "metrics.jsonl", plot))


@app.command()
@config_options(DistillConfig)
def distill(
    config: DistillConfig,
    images: Annotated[str, typer.Argument(help="Folder, list file, tar shards or parquet.")],
    out: RunFolder,
    device: Device = "auto",
) -> None:
    """Train a small model on the outputs of larger ones. Under torchrun: on several devices."""
    from dinov3 import distributed
    from dinov3.distill.run import distill as run

    path = run(replace(config, images=images, device=device_of(device)), out)
    if distributed.is_main():
        print(path)
    distributed.shutdown()


@app.command("train-head")
@config_options(HeadConfig)
def train_head(
    config: HeadConfig,
    task: Annotated[str, typer.Argument(help="classification, segmentation, depth or detection.")],
    data: Annotated[
        str,
        typer.Argument(
            help="A folder: class folders; images and masks; images and depth; images with VOC or COCO boxes. Or a "
            "dataset spec, NAME:key=value…"
        ),
    ],
    out: RunFolder,
    options: Annotated[list[str] | None, typer.Argument(help="Options of the head: name=value …")] = None,
    head: Annotated[
        str | None, typer.Option(help="linear, mask2former (segmentation), dpt (depth) or detr (detection).")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Names of the classes, separated by commas.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast.")] = False,
    resume: Annotated[bool, typer.Option(help="Resume from the newest checkpoint.")] = True,
    device: Device = "auto",
) -> None:
    """Fit a head of your own on a frozen (or tuned) backbone: classes, segmentation, depth, boxes. Prints the head's file."""
    from dinov3 import distributed
    from dinov3.hub.own_heads import check_kind
    from dinov3.train_head.run import train_head as run

    chosen = head or ("detr" if task == "detection" else "linear")
    check_kind(task, chosen)
    config = replace(
        config, task=task, head=chosen, data=data, options=head_options(options or []), device=device_of(device),
        classes=[c.strip() for c in classes.split(",")] if classes else [],
        precision="bfloat16" if bf16 else "float32",
    )  # fmt: skip
    outcome = run(config, out, resume=resume)
    if distributed.is_main():
        for name, value in outcome.metrics.items():
            log(f"{name}\t{value:.4f}")
        print(outcome.head)
    distributed.shutdown()


def head_options(given: list[str]) -> dict[str, object]:
    """{name: value} of `name=value` arguments: hidden_dim=128, layers=[2,5,8,11], backbone_out_layers=LAST."""
    import json

    found: dict[str, object] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise DinoError(f"{text!r} is no option of a head; write name=value, for example backbone_out_layers=LAST")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


# name → (module, what it measures); a module has main(argv) → exit status
EVALUATIONS: dict[str, tuple[str, str]] = {
    "knn": ("dinov3.eval.knn", "classes of images by their nearest neighbours"),
    "log-regression": ("dinov3.eval.log_regression", "classes of images by logistic regression on features"),
    "linear": ("dinov3.eval.linear", "classes of images by linear heads trained with augmentation"),
    "segmentation": ("dinov3.eval.segmentation.run", "classes of pixels by a linear head"),
    "depth": ("dinov3.eval.depth.run", "metres of pixels by a linear or DPT head"),
    "detection": ("dinov3.eval.detection", "boxes of objects"),
    "retrieval": ("dinov3.eval.retrieval", "the same place or work of art among many images"),
    "keypoints": ("dinov3.eval.keypoints", "corresponding points of two images"),
    "tracking": ("dinov3.eval.tracking", "masks carried through a video"),
    "discovery": ("dinov3.eval.discovery", "objects found without a label (TokenCut)"),
    "video": ("dinov3.eval.video", "classes of video clips by an attentive probe"),
    "geobench": ("dinov3.eval.geobench", "classes and class maps of satellite images"),
    "zero-shot": ("dinov3.eval.text.zero_shot", "classes by their names, with dino.txt"),
}


@app.command(
    "eval", context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
)
def evaluate(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Which evaluation; without it, all are listed.")] = "",
) -> None:
    """Measure a model: k-NN, probes, retrieval, tracking, … `dinov3 eval NAME --help` lists an evaluation's keys."""
    if name in ("", "--help", "-h"):
        from dinov3.eval.arguments import OPTIONS

        print(f"usage: dinov3 eval NAME FOLDER … {OPTIONS}\n")
        for each, (_, what) in EVALUATIONS.items():
            print(f"  {each:16}{what}")
        return
    module, _ = EVALUATIONS[one_of("the evaluation", name.replace("_", "-"), EVALUATIONS)]
    raise typer.Exit(importlib.import_module(module).main(list(context.args)))
