"""The verb that measures: `dinov3 eval NAME key.sub=value …`, for every evaluation of `dinov3/eval`."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from dinov3.cli.shared import app
from dinov3.errors import one_of

# name → (module, what it measures); a module has main(argv) → exit status
EVALUATIONS: dict[str, tuple[str, str]] = {
    "knn": ("dinov3.eval.knn", "classes of images by their nearest neighbours"),
    "log-regression": ("dinov3.eval.log_regression", "classes of images by logistic regression on features"),
    "linear": ("dinov3.eval.linear", "classes of images by linear heads trained with augmentation"),
    "segmentation": ("dinov3.eval.segmentation.run", "classes of pixels by a linear head"),
    "depth": ("dinov3.eval.depth.run", "metres of pixels by a linear or DPT head"),
    "detection": ("dinov3.eval.detection.run", "boxes of objects"),
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
        print("usage: dinov3 eval NAME [--config-file FILE] [--output-dir DIR] [--sweep AXES] key.sub=value …\n")
        for each, (_, what) in EVALUATIONS.items():
            print(f"  {each:16}{what}")
        return
    module, _ = EVALUATIONS[one_of("the evaluation", name.replace("_", "-"), EVALUATIONS)]
    raise typer.Exit(importlib.import_module(module).main(list(context.args)))
