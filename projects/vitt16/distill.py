"""`dinov3 distill` with what only the first runs of the shipped model needed: see README.md beside this file.

python -m projects.vitt16.distill FOLDER --out RUN --teacher … [--inherit FOLDER] [--last-block-images N] [--isometric KIND]
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dinov3.cli.shared import Device, config_options, device_of
from dinov3.distill import teachers
from dinov3.distill.config import DistillConfig
from dinov3.distill.run import distill
from projects.vitt16.mobilenetv2 import open_mobilenetv2
from projects.vitt16.start import Start

teachers.KINDS["mobilenetv2"] = open_mobilenetv2
app = typer.Typer(add_completion=False)


@app.command()
@config_options(DistillConfig)
def main(
    config: DistillConfig,
    images: Annotated[str, typer.Argument(help="Folder, list file, tar shards or parquet.")],
    out: Annotated[Path, typer.Option(help="The run's folder. Run again to resume.")],
    inherit: Annotated[
        str | None, typer.Option(help="A DINOv2 folder the student begins as a compressed copy of.")
    ] = None,
    inherit_images: Annotated[int, typer.Option(help="On so many images it is fitted.")] = 320,
    last_block_images: Annotated[int, typer.Option(help="Initialise the last block in closed form on so many.")] = 0,
    isometric: Annotated[str | None, typer.Option(help="Kind of the teacher met through a fixed projection.")] = None,
    device: Device = "auto",
) -> None:
    """Train a small model on the outputs of larger ones."""
    start = Start(inherit, inherit_images, last_block_images, isometric)
    print(distill(replace(config, images=images, device=device_of(device)), out, prepare=start))


if __name__ == "__main__":
    app()
