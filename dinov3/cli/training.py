"""Verbs that train: a backbone on your own images, a small student of larger teachers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dinov3.cli.shared import INTERRUPTED, Device, app, config_options, device_of, log
from dinov3.distill.config import DistillConfig
from dinov3.errors import DinoError


@app.command(context_settings={"allow_interspersed_args": True})
def train(
    images: Annotated[str, typer.Argument(help="Folder, list file, tar shards, parquet, or a dataset spec.")],
    out: Annotated[Path, typer.Option(help="The run's folder. Run again to resume.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings that win: key.sub=value …")] = None,
    model: Annotated[
        str | None, typer.Option(help="vits16, vitb16, … or a recipe's own. Default: the recipe's.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="A YAML file, or one that comes along.")] = "vits16_one_gpu",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps in all; schedules are stretched.")] = None,
    knn: Annotated[str | None, typer.Option(help="TRAIN:VAL, two labelled folders for k-NN during training.")] = None,
    resume: Annotated[bool, typer.Option(help="Resume from the newest checkpoint.")] = True,
    seed: Annotated[int, typer.Option(help="Of weights and random draws.")] = 0,
    device: Device = "auto",
) -> None:
    """Train a backbone on your own images by self-distillation (DINO, iBOT, KoLeo, Gram). Under torchrun: on many."""
    from dinov3.config.train import load_config
    from dinov3.train.train import train as run

    chosen = training_overrides(images, model, recipe, steps, knn, device_of(device), overrides or [])
    config, notes = load_config(recipe if recipe.endswith((".yaml", ".yml")) else f"{recipe}.yaml", chosen)
    log("settings: " + " ".join(chosen))
    outcome = run(config, out, resume=resume, seed=seed, notes=notes)
    log(f"{outcome.reason}: {outcome.iterations} of {outcome.total} steps; {out}")
    for iteration, accuracy in outcome.knn.items():
        print(f"{iteration}\t{accuracy:.4f}")
    if outcome.signal is not None and not outcome.finished:
        raise typer.Exit(INTERRUPTED)


def training_overrides(
    images: str, model: str | None, recipe: str, steps: int | None, knn: str | None, device: str, given: list[str]
) -> list[str]:
    """Configuration overrides for the command's options; `given` come last and win."""
    import os

    from dinov3.weights.catalog import resolve

    overrides = [f"train.dataset_path={images}", f"run.device={device}"]
    if model is not None:
        overrides.append(f"student.arch={model if model.startswith(('vit_', 'convnext_')) else resolve(model)[0].arch}")
    if device == "cpu" and not recipe.startswith("toy"):
        # the recipes are for GPUs: a CPU gets a small batch, exact numbers, and no minutes of compilation
        workers = max(1, (os.cpu_count() or 2) // 2)
        overrides += ["compute_precision.param_dtype=fp32", "train.compile=false", "train.batch_size_per_gpu=16"]
        overrides.append(f"train.num_workers={workers}")
    if steps is not None:
        overrides += [
            f"optim.iterations={steps}",
            f"checkpointing.period={max(1, steps // 20)}",
            f"evaluation.eval_period_iterations={max(1, steps // 4)}",
        ]
    if knn is not None:
        labelled, colon, unlabelled = knn.rpartition(":")
        if not colon:
            raise DinoError(f"--knn takes two folders, TRAIN:VAL, not {knn!r}")
        overrides += [f"evaluation.knn_train_dataset={labelled}", f"evaluation.knn_val_dataset={unlabelled}"]
    return overrides + given


@app.command()
@config_options(DistillConfig)
def distill(
    config: DistillConfig,
    images: Annotated[str, typer.Argument(help="Folder, list file, tar shards or parquet.")],
    out: Annotated[Path, typer.Option(help="The run's folder. Run again to resume.")],
    device: Device = "auto",
) -> None:
    """Train a small model on the outputs of larger ones. Under torchrun: on several devices."""
    from dinov3 import distributed
    from dinov3.distill.run import distill as run

    path = run(replace(config, images=images, device=device_of(device)), out)
    if distributed.is_main():
        print(path)
    distributed.shutdown()
