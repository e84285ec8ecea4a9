"""The verb that fits a head of your own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dinov3.cli.shared import Device, app, config_options, device_of, log
from dinov3.errors import DinoError
from dinov3.train_head.config import HeadConfig


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
    out: Annotated[Path, typer.Option(help="The run's folder. Run again to resume.")],
    options: Annotated[list[str] | None, typer.Argument(help="Options of the head: name=value …")] = None,
    head: Annotated[
        str | None, typer.Option(help="linear, mask2former (segmentation), dpt (depth) or detr (detection).")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Names of the classes, separated by commas.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast.")] = False,
    resume: Annotated[bool, typer.Option(help="Resume from the newest checkpoint.")] = True,
    device: Device = "auto",
) -> None:
    """Fit a head of your own on a frozen backbone: classes, segmentation, depth, boxes. Prints the head's file."""
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
