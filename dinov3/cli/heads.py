"""The verb that fits a head of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dinov3.cli.shared import Device, app, device_of, say
from dinov3.errors import DinoError


@app.command("train-head")
def train_head(
    task: Annotated[str, typer.Argument(help="classification, segmentation, depth or detection.")],
    data: Annotated[
        str,
        typer.Argument(
            help="A folder: class folders; images and masks; images and depth; images with VOC or COCO boxes. Or a "
            "data set's line, NAME:key=value…"
        ),
    ],
    out: Annotated[Path, typer.Option(help="The run's folder. Run again to go on after a stop.")],
    options: Annotated[list[str] | None, typer.Argument(help="Options of the head: name=value …")] = None,
    head: Annotated[
        str | None, typer.Option(help="linear, mask2former (segmentation), dpt (depth) or detr (detection).")
    ] = None,
    val: Annotated[str | None, typer.Option(help="Data to validate with. Default: val/ beside train/ in DATA.")] = None,
    backbone: Annotated[str | None, typer.Option(help="A name from `dinov3 models`.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Path, URL or Hugging Face id of the backbone's weights; 'random' for none. Default: the published ones of "
            "--backbone, or without it the small model that comes with the package."
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of the short side. Default: 512 (classes 256).")
    ] = None,
    shape: Annotated[
        Literal["auto", "square", "short", "long"],
        typer.Option(help="auto: the short side where all images have one aspect, else squares."),
    ] = "auto",
    augment: Annotated[
        str, typer.Option(help="none, flip, or full: scale, crops, colours; the backbone then runs at every step.")
    ] = "flip",
    classes: Annotated[str | None, typer.Option(help="Names of the classes, separated by commas.")] = None,
    ignore: Annotated[int | None, typer.Option(help="A number in a folder's masks that does not count.")] = None,
    max_depth: Annotated[float | None, typer.Option(help="Metres. Default: the farthest in the data.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Batches in all.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images a batch.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of AdamW.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between. Default: five times in all.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = True,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Device = "auto",
) -> None:
    """Fit a head of your own on a frozen backbone: classes, segmentation, depth, boxes. Prints the head's file."""
    from dinov3 import distributed
    from dinov3.hub.own_heads import check_kind
    from dinov3.train_head.run import HeadConfig
    from dinov3.train_head.run import train_head as run

    if task == "detection" and head is None:
        head = "detr"
    chosen = head if head is not None else "linear"
    check_kind(task, chosen)
    config = HeadConfig(
        task=task, head=chosen, data=data, val=val, backbone=backbone, weights=weights,
        options=head_options(options or []), classes=[c.strip() for c in classes.split(",")] if classes else [],
        ignore=ignore, max_depth=max_depth, size=size, shape=shape, augment=augment, steps=steps, batch=batch, lr=lr,
        weight_decay=weight_decay, evaluate_every=evaluate_every, save_every=save_every,
        precision="bfloat16" if bf16 else "float32", seed=seed, device=device_of(device),
    )  # fmt: skip
    outcome = run(config, out, resume=resume)
    if distributed.is_main():
        for name, value in outcome.metrics.items():
            say(f"{name}\t{value:.4f}")
        print(outcome.head)
    distributed.shutdown()


def head_options(given: list[str]) -> dict[str, object]:
    """name=value … numbers, lists and words: hidden_dim=128, layers=[2,5,8,11], backbone_out_layers=LAST."""
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
