"""One distillation: its batches, its steps, its checkpoints, and how good the student is."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from dinov3 import distributed
from dinov3.checkpoint import first_line
from dinov3.config.bounds import check
from dinov3.data.images import IMAGE_SUFFIXES
from dinov3.data.loading import permuted
from dinov3.data.sources import open_source
from dinov3.data.transforms.inputs import Preprocessing, normalised, resized
from dinov3.distill.config import DistillConfig
from dinov3.distill.teachers import Images, OnlineTargets, Projector, TargetCache, Targets, Teacher, Views, open_teacher
from dinov3.errors import DinoError
from dinov3.features import decoding_threads
from dinov3.files import atomically
from dinov3.losses import LossTerm, LossTerms
from dinov3.optim import ema_update, multipliers
from dinov3.runlog import RunDir, StopRequest, rate_text
from dinov3.threads import prefetched
from dinov3.weights import catalog, writing
from dinov3.weights.writing import save_torch

# ---- batches ---------------------------------------------------------------------------------------------------------
# Views of images, their augmentation, and the teachers' outputs for them. Legend as in `teachers`.
# A batch, its views and colours are functions of (seed, step), whatever the number of processes; mixtures also of rank.


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


# ---- the method ------------------------------------------------------------------------------------------------------
# Distillation: a small student learns the outputs of frozen teachers (paper section 5.1).
#
#     dinov3 distill FOLDER --teacher transformers:dinov2-small,layer=9 --student dinov3_vitt16 --out RUN
#
# The paper trains its students with the 7B's own losses on 1.7 billion images; `train.multi_distill` is that. This is the
# kind for one machine and a folder: teachers of any family (`teachers`), no prototypes, the student's tokens are mapped to
# each teacher's width by a linear layer that is thrown away afterwards, and compared (as AM-RADIO, arXiv 2312.06709):
#
#     cls, patches   0.9 · (1 − cosine) + 0.1 · smooth L1, on targets standardised per dimension
#     logits         KL of the classifier's softened outputs
#     relations      KL between the rows of similarities within the batch: whom the teacher finds alike
#
# Teacher and student see the same box of the image. There are two ways to teach:
#
#     from a cache    a teacher's outputs for a few views are computed once and cached on disk (`cache`). Colours change and
#                     images are mirrored for the student only (the map of targets is mirrored with it). Cheap, but the
#                     student sees the same boxes again and again and learns them by heart.
#     online=true     the teacher sees the very pixels of the student, mirrored, recoloured and mixed with another
#                     image (`mix`): a patient and consistent teacher (Beyer et al., arXiv 2106.05237), whose images
#                     never come again. Few images go a long way (Asano and Saeed, arXiv 2112.00725). `share=0.25` gives a
#                     costly teacher the first quarter of every batch only.
#
# Every random number is a function of (seed, step), so that a run that was killed and started again gives the same weights.
# Under torchrun each process takes its share of every batch and runs the teachers on that; gradients are averaged, and
# similarities are of the whole batch.
#
# Left out: sharded weights (every process holds a student and its teachers); local crops.
#
# Legend: B images, HW student patches, d student's width, D a teacher's width, K classes.


STATISTICS_FROM = 1024  # images that the targets' mean and spread, and the first projections, are fitted on
CHECKPOINT, OLDER, STUDENT = "distill.pth", "distill.older.pth", "student.safetensors"
Prepare = Callable[["Distillation", bool], None]


# ---- the run --------------------------------------------------------------------------------------------------------


class Distillation:
    """Student, average, projections, optimiser and where they are: all that a checkpoint holds."""

    def __init__(self, config: DistillConfig, run: RunDir, prepare: Prepare | None = None) -> None:
        check(config, "distill")
        self.config, self.run = config, run
        self.device = torch.device(config.device)
        self.views = Views(config.views, (config.scale, 1.0), config.seed)
        largest = max(side for _, side in config.phases())
        workers = decoding_threads(self.device) if config.workers is None else config.workers
        self.images = Images(
            open_source(config.images), target_short_side=largest, keep=config.in_memory, workers=workers
        )
        if not config.teachers:
            raise DinoError("distillation needs a teacher: --teacher KIND:WHAT (see `dinov3 distill --help`)")
        catalog.resolve(config.student)  # a misspelt name is noticed before the teachers are opened
        self.teachers = [open_teacher(spec, device=self.device) for spec in config.teachers]
        clean = [t.id for t in self.teachers if not t.spec.online]
        if config.mixing() and clean:
            raise DinoError(f"{clean[0]} sees clean images and has no output for mixed ones: give it online=true")
        self.targets = [self._targets(teacher) for teacher in self.teachers]
        torch.manual_seed(config.seed)
        self.student = self._student().to(self.device)
        self.batches = Batches(config, self.images, self.views, self.targets, int(self.student.stride))
        self.forward: Callable[[Tensor], dict[str, Tensor]] = self.student.forward_features
        if config.compile:
            self.forward = torch.compile(self.student.forward_features, dynamic=False)
        fresh = not any((self.run.checkpoints / name).is_file() for name in (CHECKPOINT, OLDER))
        count = min(STATISTICS_FROM if fresh else 4, len(self.images))  # a checkpoint brings its own: widths are enough
        some = permuted(np.arange(count), len(self.images), config.seed, 0)
        width = int(self.student.embed_dim)
        self.projectors = nn.ModuleList(
            Projector(teacher, width, targets.read(some, 0)) for teacher, targets in zip(self.teachers, self.targets)
        )
        self.projectors.to(self.device)
        if prepare is not None:
            prepare(self, fresh)
        if fresh and config.steps:
            self._fit_projections(some)
        distributed.broadcast([*self.student.state_dict().values(), *self.projectors.state_dict().values()])
        self.average = deepcopy(self.student).eval().requires_grad_(False)
        self.learner = self._learner()
        self.optimizers = self._optimizers()
        self.step = 0

    def _targets(self, teacher: Teacher) -> TargetCache | OnlineTargets:
        c = self.config
        if c.cache is None or teacher.spec.online:
            return OnlineTargets(teacher, self.views, self.images, c.cached_grid, bf16=c.bf16)
        cache = TargetCache(Path(c.cache), teacher, self.views, self.images, c.cached_grid)
        missing = distributed.broadcast_object(len(list(cache.missing())))  # all fill it, or none
        if missing:
            self.run.log(f"{teacher.id}: {missing} shards of targets to compute into {cache.folder}")
            cache.fill(bf16=c.bf16, log=self.run.log)
        return cache

    def _student(self) -> Any:
        from dinov3.hub import load

        c = self.config
        student: Any = load(c.student, c.weights or "random", seed=c.seed)
        student = student.float().train()
        if hasattr(student, "rope_embed"):
            student.rope_embed.rescale_coords = c.rope_rescale
        return student

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """CLS [B, d] and patches [B, H, W, d] of the student, float32, for uint8 images [B, 3, s, s]."""
        x = normalised(pixels.to(self.device), *catalog.STATISTICS["lvd1689m"])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            out = self.student.forward_features(x)
        grid = self.student.patch_grid(*x.shape[-2:])
        return out["x_norm_clstoken"].float(), out["x_norm_patchtokens"].float().unflatten(1, grid)

    @torch.no_grad()
    def _fit_projections(self, some: np.ndarray) -> None:
        pixels = self.images.views(self.views, some, 0, self.config.side(0))
        cls, patches = (torch.cat(parts) for parts in zip(*(self.tokens(part) for part in pixels.split(64))))
        for module, targets in zip(self.projectors, self.targets):
            projector: Any = module
            sample = Targets(**{k: v.to(self.device) for k, v in targets.read(some, 0).fields().items()})
            projector.fit(cls, patches, sample)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW, and Muon for the matrices of the student's blocks where it is chosen."""
        c = self.config
        inside = {id(p) for name, p in self.student.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
        groups: list[list[dict[str, Any]]] = [[], []]
        for module, rate in ((self.student, 1.0), (self.projectors, c.projection_lr)):
            rows = list(zip(multipliers(module), module.parameters(), strict=True))
            for muon in (False, True):
                for decays in (True, False):
                    params = [
                        p
                        for row, p in rows
                        if bool(row.wd_multiplier) == decays
                        and p.requires_grad
                        and (c.optimizer == "muon" and id(p) in inside) == muon
                    ]
                    decay = c.weight_decay if decays else 0.0
                    if params:
                        groups[muon].append({"params": params, "rate": rate, "weight_decay": decay})
        optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups[0], lr=0.0, fused=True)]
        if groups[1]:  # its updates scaled to the size of AdamW's, so that one learning rate serves both
            optimizers.append(torch.optim.Muon(groups[1], lr=0.0, adjust_lr_fn="match_rms_adamw"))
        return optimizers

    def terms(self, batch: Batch) -> LossTerms:
        x = normalised(batch.pixels.to(self.device), *catalog.STATISTICS["lvd1689m"])
        # No cache of casts: it is one for all threads, behind a lock that this thread would hold while compiling and the
        # teachers' thread needs to leave its own autocast, each with what the other waits for. Seen: a deadlock.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16, cache_enabled=False):
            out = self.forward(x)
            grid = self.student.patch_grid(*x.shape[-2:])
            cls, patches = out["x_norm_clstoken"], out["x_norm_patchtokens"].unflatten(1, grid)
            terms = LossTerms()
            for i, targets in batch.targets.items():
                moved = Targets(**{k: v.to(self.device) for k, v in targets.fields().items()})
                projector: Any = self.projectors[i]
                projector.terms(terms, f"{i}-{self.teachers[i].spec.kind}", cls, patches, moved)
        return terms

    def _learner(self) -> nn.Module:
        """Student and projectors from a batch to their loss terms; on several processes gradients are averaged while the
        backward pass runs."""
        learner = _Learner(self.student, self.projectors, self.terms)
        if distributed.world() == 1:
            return learner
        # which teacher has a target depends on the view, and mask tokens never get a gradient
        return DistributedDataParallel(learner, broadcast_buffers=False, find_unused_parameters=True)

    def train_step(self, batch: Batch) -> LossTerms:
        step, c = self.step, self.config
        lr = c.lr_at(step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["rate"]
            optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(seed_of(c.seed, step, self.batches.rank))  # what the student itself draws
        terms = LossTerms(LossTerm(*term) for term in self.learner(batch))
        terms.total().backward()
        trained = [p for p in (*self.student.parameters(), *self.projectors.parameters()) if p.requires_grad]
        nn.utils.clip_grad_norm_(trained, c.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        momentum = min(c.momentum, (1 + step) / (10 + step))
        ema_update(self.average.parameters(), self.student.parameters(), momentum)
        self.step += 1
        return terms

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        if not distributed.is_main():
            return
        state = {
            "step": self.step,
            "student": self.student.state_dict(),
            "average": self.average.state_dict(),
            "projectors": self.projectors.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "started_with": self.started_with(),
        }
        path = self.run.checkpoints / CHECKPOINT
        with atomically(path) as temporary:
            save_torch(state, temporary)
            if path.is_file():  # read where the newest is damaged
                os.replace(path, self.run.checkpoints / OLDER)

    def resume(self) -> bool:
        state = self._newest()
        if state is None:
            return False
        before, now = state.get("started_with", {}), self.started_with()
        for name in (n for n in before if before[n] != now[n]):
            raise DinoError(
                f"{self.run.path} was started with {name} {before[name]}, not {now[name]}; give the same to resume, or "
                f"another --out (and --weights {self.run.path / STUDENT} to begin with what it learned)"
            )
        self.student.load_state_dict(state["student"])
        self.average.load_state_dict(state["average"])
        self.projectors.load_state_dict(state["projectors"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = int(state["step"])
        return True

    def _newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read; None if there is none."""
        damaged = []
        for path in (self.run.checkpoints / name for name in (CHECKPOINT, OLDER)):
            if not path.is_file():
                continue
            try:
                state = torch.load(path, map_location=self.device, weights_only=True)
                missing = {"step", "student", "average", "projectors", "optimizers"} - set(state)
                if missing:
                    raise ValueError(f"it has no {min(missing)}")
            except Exception as error:  # of zip files, pickles, tensors
                damaged.append(f"the checkpoint {path} cannot be read: {first_line(error)}")
                continue
            for line in damaged:  # at most the newest, which must not become the older one
                self.run.log(f"{line}; resuming from the older {path.name}")
                if self.run.writer:
                    path.with_name(CHECKPOINT).rename(path.with_name("distill.damaged.pth"))
            distributed.barrier()
            return state
        if damaged:
            raise DinoError(f"{damaged[0]}, and there is no older one that can: take another --out")
        return None

    def started_with(self) -> dict[str, Any]:
        """What must stay the same when a run resumes. Lengths, rates, sizes and the like may change."""
        c = self.config
        same = ("student", "batch", "views", "optimizer", "seed")
        return {name: getattr(c, name) for name in same} | {
            "teachers": [_without_folders(spec) for spec in c.teachers],
            "weights": Path(c.weights).name if c.weights else None,
            "images": len(self.images),
        }

    def export(self, path: Path | None = None, about: Mapping[str, Any] | None = None) -> Path:
        """The average as our own file, float16, with what it is and how it came about."""
        mean, std = catalog.STATISTICS["lvd1689m"]
        row = catalog.resolve(self.config.student)[0]
        outside = ("device", "cache", "knn", "images", "in_memory")  # of this machine, or without an effect
        options = {k: v for k, v in asdict(self.config).items() if k not in outside}
        options["teachers"] = [_without_folders(spec) for spec in self.config.teachers]
        options["weights"] = Path(options["weights"]).name if options["weights"] else None
        metadata = {
            "config": asdict(row.config),
            "row": row.id,
            "mean": mean,
            "std": std,
            "recipe": options,
            "steps": self.step,
            "images": len(self.images),
        } | dict(about or {})
        periods = "rope_embed.periods"
        state = self.average.state_dict()
        small = {k: v.half() if v.is_floating_point() and k != periods else v for k, v in state.items()}
        return writing.save(small, path or self.run.path / STUDENT, metadata)


class _Learner(nn.Module):
    def __init__(self, student: nn.Module, projectors: nn.Module, terms: Callable[[Batch], LossTerms]) -> None:
        super().__init__()
        self.student, self.projectors, self.terms = student, projectors, terms

    def forward(self, batch: Batch) -> list[tuple[str, float, Tensor]]:
        return [(term.name, term.weight, term.value) for term in self.terms(batch)]


def _without_folders(spec: str) -> str:
    kind, _, rest = spec.partition(":")
    what, *options = rest.split(",")
    return ",".join([f"{kind}:{Path(what).name}", *options])


def distill(config: DistillConfig, out: str | Path, *, prepare: Prepare | None = None) -> Path:
    """Trains the student in folder `out`, or resumes, alone or with the other processes; returns the exported file.

    prepare(work, fresh): may change the student and its projectors before the first step; `fresh` is False on a resume.
    """
    config = replace(config, device=str(distributed.setup(config.device)))
    if config.knn:
        _labelled(Path(config.knn), 1)  # a mistake in it is an error now, not after the first steps
    run = RunDir(out, writer=distributed.is_main())
    with run.claimed():
        return _distill(config, run, prepare)


def _distill(config: DistillConfig, run: RunDir, prepare: Prepare | None) -> Path:
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    work = Distillation(config, run, prepare)
    resumed = work.resume()
    run.start(config, iteration=work.step)
    c, total = config, config.steps
    count = sum(p.numel() for p in work.student.parameters()) / 1e6
    run.log(
        f"{'resumed at step ' + str(work.step) if resumed else 'started'}: {c.student} ({count:.1f}M), "
        f"{len(work.images)} images, {total} steps of {work.batches.size}, teachers {[t.id for t in work.teachers]}"
    )
    # measured: torch's fused attention is the slower one in backward passes on CPUs, by a quarter at 69 tokens
    kernel: Any = sdpa_kernel(SDPBackend.MATH) if work.device.type == "cpu" else nullcontext()
    first = since = work.step
    began = time.perf_counter()
    with kernel, StopRequest() as stop:
        for batch in work.batches.between(work.step, total):
            lr = c.lr_at(work.step)
            terms = work.train_step(batch)
            if work.step % c.log_every == 0 or work.step in (first + 1, total):
                rate = (work.step - since) * work.batches.size / (time.perf_counter() - began)
                since, began = work.step, time.perf_counter()
                numbers = distributed.average(terms.log())
                facts = {"lr": lr, "side": c.side(work.step - 1), "images_per_s": rate}
                run.record(work.step - 1, facts | numbers)
                shown = ", ".join(f"{k} {v:.3f}" for k, v in numbers.items())
                run.log(f"step {work.step}/{total}, {rate_text(rate)} images/s, {shown}")
            stopping = stop.agreed(work.device) and work.step < total
            if stopping or work.step % c.save_every == 0 or work.step == total:
                work.save()
            if stopping:
                raise KeyboardInterrupt(f"{work.step} of {total} steps are done and saved")
            if c.knn and run.writer and (work.step % c.knn_every == 0 or work.step == total):
                accuracy = knn(work.average, c.knn, size=c.knn_size, bf16=c.bf16)
                run.record(work.step - 1, {"knn_top1": accuracy})
                run.log(f"step {work.step}: k-NN on {Path(c.knn).name}: {accuracy:.4f}")
                since, began = work.step, time.perf_counter()
    unreadable = [pair for found in distributed.gather_objects(work.images.unreadable) for pair in found.items()]
    for path, reason in dict(unreadable).items():
        run.log(f"could not read {path}: {reason}")
    exported = work.export() if run.writer else run.path / STUDENT
    distributed.barrier()
    run.log(f"exported {exported}")
    run.close()
    return exported


# ---- how good it is -------------------------------------------------------------------------------------------------


def knn(
    model: nn.Module, folder: str | Path, *, size: int = 224, most: int = 40, k: int = 10, bf16: bool = False
) -> float:
    """10-NN accuracy of CLS tokens on a folder with a sub-folder for each class, at most `most` images a class.

    With sub-folders train/ and val/ these are the two sides, otherwise every second image.
    """
    from dinov3.features import batched, extract
    from dinov3.neighbours import knn_accuracy

    sides = _labelled(Path(folder), most)
    preprocessing = Preprocessing(size=size, interpolation="bicubic", mean=catalog.STATISTICS["lvd1689m"][0])
    tokens, labels = [], []
    device = next(model.parameters()).device.type
    for side in sides:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            found = [
                f.cls
                for f in extract(model, batched([p for p, _ in side], preprocessing, 32), preprocessing=preprocessing)
            ]
        tokens.append(torch.cat(found))
        labels.append(torch.tensor([label for _, label in side]))
    return knn_accuracy(tokens[0], labels[0], tokens[1], labels[1], k=k)


def _labelled(folder: Path, most: int) -> list[list[tuple[Path, int]]]:
    def of(root: Path) -> list[list[Path]]:
        classes = [c for c in sorted(root.iterdir()) if c.is_dir()]
        return [sorted(f for f in c.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES) for c in classes]

    if not folder.is_dir():
        raise DinoError(f"{folder} is no folder: one with a sub-folder of images for each class is needed")
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        parts = [[files[:most] for files in of(folder / part)] for part in ("train", "val")]
    else:
        parts = [[files[i : 2 * most : 2] for files in of(folder)] for i in (0, 1)]
    if min(len(p) for p in parts) < 2:
        raise DinoError(f"{folder} holds no labelled images: one sub-folder for each class is needed")
    return [[(path, label) for label, files in enumerate(part) for path in files] for part in parts]
