"""What the verbs share: the application they register with, the words of common options, and talk to stderr."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="DINOv3: embed, search, inspect, convert, train, distil.",
)
UNREADABLE, INTERRUPTED = 3, 130

Shape = Literal["square", "short", "long", "native"]
Fit = Literal["resize", "pad", "crop"]
Pooling = Literal["cls", "mean", "cls+mean"]
Patches = Literal["none", "float16", "float32", "int8"]
Dtype = Literal["float32", "bfloat16", "float16"]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def device_of(name: str) -> str:
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def batch_of(text: str) -> int | None:
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
