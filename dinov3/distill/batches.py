"""Batches of a distillation: views of images, their augmentation, and the teachers' outputs for them.

A batch, its views and colours are functions of (seed, step), whatever the number of processes; mixtures also of rank.
Legend as in `distill`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov3 import distributed
from dinov3.data.loading import permuted
from dinov3.data.transforms.pixels import resized
from dinov3.distill.config import DistillConfig
from dinov3.distill.teachers import Images, OnlineTargets, TargetCache, Targets, Views
from dinov3.errors import DinoError
from dinov3.threads import prefetched


@dataclass(frozen=True)
class Batch:
    """pixels uint8 [B, 3, s, s], as the student sees them · targets by teacher, without those that skip this view; a
    teacher's targets may be of the first images only."""

    pixels: Tensor
    targets: dict[int, Targets]


class Batches:
    """The batch of any step; the next one is made while this one is used."""

    def __init__(
        self,
        config: DistillConfig,
        images: Images,
        views: Views,
        sources: Sequence[TargetCache | OnlineTargets],
        patch: int = 16,
    ) -> None:
        self.config, self.images, self.views, self.sources, self.patch = config, images, views, sources, patch
        self.rank, world = distributed.rank(), distributed.world()
        self.size = min(config.batch, len(images))
        self.share = self.size // world  # this process's
        if self.share * world != self.size or self.share < 2:
            raise DinoError(
                f"{self.size} images a batch do not go round {world} processes with two or more each: change --batch"
            )
        self.epoch_length = len(images) // self.size

    def at(self, step: int) -> Batch:
        epoch, place = divmod(step, self.epoch_length)
        offsets = np.arange(place * self.size, (place + 1) * self.size)
        indices = permuted(offsets, len(self.images), self.config.seed, epoch)
        indices = indices[self.rank * self.share :][: self.share]
        view, side = epoch % self.views.count, self.config.side(step)
        online = {i: t for i, t in enumerate(self.sources) if isinstance(t, OnlineTargets) and t.sees_students_pixels}
        sides = {i: t.teacher.side(side // self.patch) for i, t in online.items()}
        canvas = self.images.views(self.views, indices, view, max([side, *sides.values()]))
        rng = torch.Generator().manual_seed(seed_of(self.config.seed, step))
        canvas, turned = distorted(canvas, rng, self.rank * self.share, self.size)
        if self.rank:  # images are mixed within a process
            rng.manual_seed(seed_of(self.config.seed, step, self.rank))
        canvas = mixed(canvas, self.config.mixing(), rng)
        targets = {}
        for i, source in enumerate(self.sources):
            if i in online:
                some = math.ceil(len(canvas) * source.teacher.spec.share)
                targets[i] = online[i].forward(resized(canvas[:some], (sides[i], sides[i]), "bicubic").contiguous())
            elif view in source:
                targets[i] = mirrored(source.read(indices, view), turned)
        return Batch(resized(canvas, (side, side), "bicubic").contiguous(), targets)

    def between(self, first: int, last: int) -> Iterator[Batch]:
        return prefetched(self.at, range(first, last), workers=1)


def distorted(pixels: Tensor, rng: torch.Generator, first: int = 0, of: int | None = None) -> tuple[Tensor, Tensor]:
    """uint8 [B, 3, s, s] → (mirrored by chance and mildly recoloured uint8, which were mirrored [B]).

    The images are those from `first` on in a batch `of` so many, for all of which is drawn: shares are as the whole.
    """
    B = len(pixels)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(of or B, *shape, generator=rng)[first : first + B]

    turned = drawn() < 0.5
    x = pixels.clone()
    x[turned] = pixels[turned].flip(-1)
    x = x.float()

    def factor(spread: float) -> Tensor:
        return 1 + spread * (2 * drawn(1, 1, 1) - 1)

    keep = torch.where(drawn(1, 1, 1) < 0.1, torch.zeros(1), factor(0.3))  # 0: without colour
    contrast, light = factor(0.3), factor(0.3)
    grey = (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]
    mean = grey.mean((2, 3), keepdim=True)
    # saturation grey + (x - grey)·keep, then contrast about the mean, then light: one linear map
    x.mul_(keep * contrast * light).add_(grey * ((1 - keep) * contrast * light) + mean * ((1 - contrast) * light))
    return x.round_().clamp_(0, 255).to(torch.uint8), turned


def mirrored(targets: Targets, turned: Tensor) -> Targets:
    """Targets of the clean images for those that were mirrored: the map of patches turns with them."""
    if targets.patches is None:
        return targets
    patches = torch.where(turned[:, None, None, None], targets.patches.flip(2), targets.patches)
    return Targets(targets.cls, patches, targets.logits)


def mixed(pixels: Tensor, shares: Mapping[str, float], rng: torch.Generator) -> Tensor:
    """uint8 [B, 3, s, s] → the same, some of them mixed with their neighbour in the batch.

    cutmix (arXiv 1905.04899): a box of the neighbour, its area uniform, is pasted. mixup (arXiv 1710.09412): a weighted
    mean, the weight uniform in 0 … 0.5. No label is mixed: the teacher sees the mixed image.
    """
    B, side = len(pixels), pixels.shape[-1]
    if not shares:
        return pixels
    kind, amount, top, left = torch.rand(4, B, 1, 1, 1, generator=rng).unbind(0)
    cut = kind < shares.get("cutmix", 0.0)
    blend = ~cut & (kind < sum(shares.values()))
    length = (side * amount.sqrt()).round()  # of the box's sides
    top, left = ((side - length) * at for at in (top, left))
    at = torch.arange(side)
    y, x = at[:, None], at[None, :]
    inside = (y >= top.floor()) & (y < top.floor() + length) & (x >= left.floor()) & (x < left.floor() + length)
    weight = torch.where(blend, 0.5 * amount, (cut & inside).float())
    some = (cut | blend).flatten().nonzero().flatten()
    outcome = pixels.clone()
    outcome[some] = torch.lerp(pixels[some].float(), pixels[some - 1].float(), weight[some]).round().to(torch.uint8)
    return outcome


def seed_of(seed: int, step: int, rank: int = 0) -> int:
    sequence = np.random.SeedSequence((seed, step, rank) if rank else (seed, step))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
