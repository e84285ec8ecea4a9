"""The configuration of a distillation: every option with its default and its help text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dinov3.config.bounds import setting
from dinov3.errors import DinoError


@dataclass
class DistillConfig:
    """Everything that decides a run's result."""

    images: str = ""
    teachers: list[str] = setting(
        [], help="KIND:WHAT[,option=value…], KIND one of dinov3, transformers, timm; repeatable.", flag="--teacher"
    )
    student: str = setting("dinov3_vitt16", help="A name from `dinov3 models`.")
    weights: str | None = setting(None, help="The student's first weights. Default: random.")
    steps: int = setting(2000, help="Batches in all.", at_least=0)
    batch: int = setting(64, help="Images a batch, of all processes.", at_least=2)
    sizes: str = setting("128:0.9,224:0.1", help="SIDE:SHARE of the steps, in order: the student's input.")
    views: int = setting(4, help="Different views of an image.", at_least=1)
    scale: float = setting(0.35, help="Smallest share of the image's area that a view shows.", above=0, at_most=1)
    lr: float = setting(5e-4, help="Peak learning rate.", above=0)
    final_lr: float = setting(1e-6, at_least=0)
    warmup: int = setting(50, at_least=0)
    schedule: str = setting(
        "cosine", help="cosine, or flat:SHARE: the peak, then a straight line down in that last share of the steps."
    )
    projection_lr: float = setting(1.0, above=0)  # times lr
    weight_decay: float = setting(0.05, at_least=0)
    clip: float = setting(3.0, above=0)
    optimizer: Literal["adamw", "muon"] = setting("adamw", help="adamw, or muon for the blocks' matrices.")
    mix: str = setting("", help="cutmix:SHARE,mixup:SHARE of the images; for teachers with online=true.")
    momentum: float = setting(0.998, help="Of the average that is exported.", at_least=0, at_most=1)
    rope_rescale: float | None = setting(None, at_least=1)
    bf16: bool = setting(False, help="bfloat16 autocast.")
    compile: bool = setting(False, help="torch.compile: minutes at first for every size, then faster.")
    workers: int | None = setting(None, help="Threads that decode images. Default: by cores.", at_least=0)
    in_memory: bool = setting(False, help="Keep the images decoded.")
    cache: str | None = setting(None, help="Keep the teachers' outputs in this folder.")
    cached_grid: int = setting(8, help="Side of the patch grid that is cached; others are resized from it.", at_least=1)
    knn: str | None = setting(None, help="Labelled folder for k-NN during training.")
    knn_every: int = setting(500, help="Steps between k-NN evaluations.", at_least=1)
    knn_size: int = setting(224, at_least=1)
    save_every: int = setting(100, help="Steps between checkpoints.", at_least=1)
    log_every: int = setting(10, at_least=1)
    seed: int = setting(0, help="Of weights and random draws.")
    device: str = "cpu"

    def phases(self) -> list[tuple[int, int]]:
        """(first step, side) of every phase."""
        begins, at = [], 0.0
        for part in self.sizes.split(","):
            side, _, share = part.partition(":")
            if not side.isdecimal() or int(side) < 16:
                raise DinoError(f"sizes are SIDE:SHARE[,SIDE:SHARE…], for example 128:0.9,224:0.1, not {self.sizes!r}")
            begins.append((round(at * self.steps), int(side)))
            at += float(share or 1)
        return begins

    def side(self, step: int) -> int:
        return [side for first, side in self.phases() if first <= step][-1]

    def mixing(self) -> dict[str, float]:
        """Share of the images of each kind of mixing."""
        shares = {}
        for part in filter(None, self.mix.split(",")):
            kind, _, share = part.partition(":")
            try:
                shares[kind] = float(share)
            except ValueError:
                shares[kind] = -1.0
        if set(shares) - {"cutmix", "mixup"} or min(shares.values(), default=0) < 0 or sum(shares.values()) > 1:
            raise DinoError(
                f"mix is KIND:SHARE, for example cutmix:0.5,mixup:0.2, together at most 1, not {self.mix!r}"
            )
        return shares

    def lr_at(self, step: int) -> float:
        from dinov3.optim import warmup_cosine_v2  # torch is not imported to show the help

        warmup = min(self.warmup, self.steps // 2)
        if self.schedule == "cosine":
            return warmup_cosine_v2(step, start=0.0, peak=self.lr, end=self.final_lr, warmup=warmup, total=self.steps)
        name, _, share = self.schedule.partition(":")
        if name != "flat" or not share.replace(".", "", 1).isdecimal() or not 0 <= float(share) <= 1:
            raise DinoError(f"the schedule is cosine or flat:SHARE, for example flat:0.25, not {self.schedule!r}")
        falls = max(1, round(self.steps * float(share)))
        left = min(1.0, (self.steps - step) / falls)  # the total can be changed until the fall begins
        return min(1.0, step / max(1, warmup)) * (self.final_lr + (self.lr - self.final_lr) * left)
