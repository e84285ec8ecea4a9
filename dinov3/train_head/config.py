"""The configuration of `dinov3 train-head`: every option with its default and its help text. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dinov3.config.bounds import setting
from dinov3.errors import DinoError, one_of

if TYPE_CHECKING:
    from dinov3.fit import FitConfig

# What suits a kind of head; anything may be given otherwise. Rates are AdamW's.
RECIPES: dict[tuple[str, str], dict[str, Any]] = {
    ("classification", "linear"): {"steps": 1000, "batch": 64, "lr": 1e-3, "weight_decay": 1e-4, "size": 256},
    ("segmentation", "linear"): {"steps": 1000, "batch": 8, "lr": 1e-3, "weight_decay": 1e-3},
    ("segmentation", "mask2former"): {"steps": 2000, "batch": 4, "lr": 1e-4, "weight_decay": 0.05, "clip": 0.01},
    ("depth", "linear"): {"steps": 1000, "batch": 8, "lr": 1e-3, "weight_decay": 1e-4, "clip": 35.0},
    ("depth", "dpt"): {"steps": 1000, "batch": 4, "lr": 3e-4, "weight_decay": 1e-4, "clip": 35.0},
    ("detection", "detr"): {"steps": 2000, "batch": 4, "lr": 1e-4, "weight_decay": 0.05, "clip": 0.1},
}


@dataclass
class HeadConfig:
    """What is fitted to what; null means: as `RECIPES` has it, or as the data suggest."""

    task: str = "segmentation"
    head: str = "linear"
    data: str = ""  # a folder, or a dataset spec (`dinov3.data.datasets`)
    val: str | None = setting(None, help="Data to validate with. Default: val/ beside train/ in DATA.")
    backbone: str | None = setting(None, help="A name from `dinov3 models`.")
    weights: str | None = setting(
        None,
        help="Path, URL or Hugging Face id of the backbone's weights; 'random' for none. Default: the published ones of "
        "--backbone, or without it the small model that ships with the package.",
    )
    options: dict[str, Any] = setting({})  # of the head: `hub.own_heads.build_head`
    classes: list[str] = setting([])  # names; empty: from the data, or "class 0" …
    ignore: int | None = setting(None, help="A number in a folder's masks that does not count, besides 255.")
    min_depth: float = setting(0.001, at_least=0)
    max_depth: float | None = setting(None, help="Metres. Default: the farthest in the data.", above=0)
    losses: dict[str, float] = setting({})  # of depth: `heads.objectives.DEPTH_LOSSES`
    size: int | None = setting(None, help="Pixels of the short side. Default: 512 (classes 256).", above=0)
    shape: Literal["auto", "square", "short", "long"] = setting(
        "auto", help="auto: the short side where all images have one aspect, else squares."
    )
    augment: Literal["none", "flip", "full"] = setting(
        "flip", help="none, flip, or full: scale, crops, colours; the backbone then runs at every step."
    )
    steps: int | None = setting(None, help="Batches in all.", above=0)
    batch: int | None = setting(None, help="Images a batch and process.", above=0)
    lr: float | None = setting(None, help="Peak learning rate of AdamW.", above=0)
    weight_decay: float | None = setting(None, help="Of AdamW.", at_least=0)
    warmup: int | None = setting(None, at_least=0)  # steps; null: a twentieth
    tune: str | None = setting(
        None, help="Train the backbone, too: lora, lora:RANK, last:BLOCKS or all. Default: it stays frozen."
    )
    tune_lr: float | None = setting(
        None, help="Peak learning rate of the backbone. Default: --lr for LoRA, a tenth of it for blocks.", at_least=0
    )
    tune_decay: float = setting(
        0.75, help="Factor of the learning rate from a block to the one before it (last, all).", above=0, at_most=1
    )
    tune_alpha: float | None = setting(None, help="LoRA is scaled by alpha / rank. Default: the rank.", above=0)
    tune_linears: str = setting("", help="Linear layers for LoRA. Default: qkv,proj (ConvNeXt: pwconv1,pwconv2).")
    evaluate_every: int | None = setting(None, help="Steps between. Default: five times in all.", at_least=1)
    save_every: int | None = setting(None, help="Steps between checkpoints. Default: twenty in all.", at_least=1)
    log_every: int = setting(10, at_least=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    workers: int = setting(1, at_least=0)  # threads that prepare batches
    memory_gb: float = setting(2.0, at_least=0)  # of cached features; beyond it they go to the run's folder
    seed: int = setting(0, help="Of weights and random draws.")
    device: str = "cpu"

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.tune is not None:
            try:
                tuning(self.tune)
            except DinoError as error:
                yield "tune", str(error)

    def fitting(self) -> FitConfig:
        from dinov3 import distributed
        from dinov3.fit import FitConfig

        r = {"clip": None} | RECIPES[self.task, self.head]
        steps = self.steps or int(r["steps"])
        same = {name: getattr(self, name) for name in ("log_every", "precision", "workers", "seed")}
        return FitConfig(
            steps=steps,
            lr=self.lr or float(r["lr"]),
            weight_decay=self.weight_decay if self.weight_decay is not None else float(r["weight_decay"]),
            warmup=self.warmup if self.warmup is not None else steps // 20,
            decay="matrices" if self.head in ("mask2former", "detr", "dpt") else "all",
            clip=r["clip"],
            batch=(self.batch or int(r["batch"])) * distributed.world(),
            save_every=self.save_every or 0,
            evaluate_every=self.evaluate_every or max(1, steps // 5),
            **same,
        )


def tuning(text: str) -> tuple[str, int]:
    """("lora", rank), ("last", blocks) or ("all", 0) of a `--tune`. Raises `DinoError` for anything else."""
    kind, colon, number = text.partition(":")
    one_of("what to tune", kind, ("lora", "last", "all"))
    if kind == "lora" and not colon:
        return kind, 8
    if (kind == "all") == bool(colon) or (colon and not (number.isdecimal() and int(number))):
        raise DinoError(f"is lora, lora:RANK, last:BLOCKS or all, such as lora:8 or last:2, not {text!r}")
    return kind, int(number or 0)
