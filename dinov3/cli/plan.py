"""The command that says what a training run needs before it is started."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from dinov3.cli.shared import Progress, app, log
from dinov3.errors import DinoError


@app.command(context_settings={"allow_interspersed_args": True})
def plan(
    data: Annotated[str, typer.Option(help="Images as `dinov3 train` takes them, or how many: 50000, 1.3M.")],
    gpus: Annotated[str, typer.Option(help="1x24GB, 4090, 8xh100, cpu, cpu:16GB.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings that win: key.sub=value …")] = None,
    model: Annotated[
        str | None, typer.Option(help="vits16, vitb16, … Default: by the number of images, if it fits.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="A YAML file, or one that comes along. Default: by model.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images in a step, of all devices. Default: the recipe's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's, at most 100 passes.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Measured images/s of all devices.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the recipe here, for `dinov3 train --recipe`.")] = None,
) -> None:
    """Will it fit, and how long will it take? Batch, checkpointing, memory and hours of a training run, as a recipe."""
    from dinov3.train import planner

    if out is not None and out.suffix not in (".yaml", ".yml"):
        raise DinoError(f"--out is the recipe that is written, a YAML file such as plan.yaml, not {out}")
    if recipe is not None and not recipe.endswith((".yaml", ".yml")):
        recipe = f"{recipe}.yaml"
    on = planner.devices(gpus)
    images = count_of(data)
    with Progress("planning"):
        made = planner.plan(
            images, on, model=model, recipe=recipe, overrides=overrides or [], batch=batch, steps=steps, rate=rate,
            on_progress=log,
        )  # fmt: skip
    print("\n".join([*planner.lines(made), "", *planner.table(made)]))
    if out is not None:
        folder = data if not NUMBER.fullmatch(data) else "IMAGES"
        planner.write(made, out, folder)
        log(f"wrote {out}: dinov3 train {folder} --recipe {out} --out RUN")


NUMBER = re.compile(r"(\d[\d_,]*(?:\.\d+)?)\s*([kKmM]?)")


def count_of(data: str) -> int:
    """The number of images: as written (50000, 50k, 1.3M), or of what `dinov3 train` would read."""
    from dinov3.data.datasets import make_dataset

    number = NUMBER.fullmatch(data)
    if number and not Path(data).exists():
        count = round(float(re.sub("[_,]", "", number[1])) * {"": 1, "k": 1000, "m": 1_000_000}[number[2].lower()])
    else:
        count = len(make_dataset(data))
    if count < 1:
        raise DinoError(f"there are no images in {data}")
    return count
