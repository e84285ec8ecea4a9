"""Distillation: a small student learns from frozen teachers what they say of images (paper section 5.1).

    dinov3 distill FOLDER --teacher transformers:dinov2-small,layer=9 --student dinov3_vitt16 --out RUN

The paper trains its students with the 7B's own losses on 1.7 billion images; `train.multi_distill` is that. This is the
kind for one machine and a folder: teachers of any family (`teachers`), no prototypes, the student's tokens are mapped to
each teacher's width by a linear layer that is thrown away afterwards, and compared (as AM-RADIO, arXiv 2312.06709):

    cls, patches   0.9 · (1 − cosine) + 0.1 · smooth L1, on targets standardised per dimension
    logits         KL of the classifier's softened opinion
    relations      KL between the rows of similarities within the batch: whom the teacher finds alike

Teacher and student look at the same box of the image. There are two ways to teach:

    from a cache    what a teacher says of a few views is computed once and kept on disk (`cache`). Colours change and
                    images are mirrored for the student only (the map of targets is mirrored with it). Cheap, but the
                    student sees the same boxes again and again and learns them by heart.
    online=true     the teacher looks at the very pixels that the student sees, mirrored, recoloured and mixed with another
                    image (`mix`): a patient and consistent teacher (Beyer et al., arXiv 2106.05237), whose images
                    never come again. Few images go a long way (Asano and Saeed, arXiv 2112.00725). `share=0.25` asks a
                    costly teacher about the first quarter of every batch only.

Every random number is a function of (seed, step), so that a run that was killed and started again gives the same weights.
Under torchrun each process takes its share of every batch and asks the teachers about that; gradients are averaged, and
similarities are of the whole batch.

Left out: sharded weights (every process holds a student and its teachers); local crops.

Legend: B images, HW student patches, d student's width, D a teacher's width, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinov3 import distributed
from dinov3.data.crops import normalised
from dinov3.data.images import IMAGE_SUFFIXES
from dinov3.data.loading import permuted
from dinov3.data.sources import open_source
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.distill.batches import Batch, Batches, seed_of
from dinov3.distill.inherit import awaken_last
from dinov3.distill.students import Pupil, isometry
from dinov3.distill.teachers import Images, OnlineTargets, TargetCache, Targets, Teacher, Views, open_teacher
from dinov3.errors import DinoError, UnknownName
from dinov3.losses import LossTerms
from dinov3.optim import ema_update, multipliers, warmup_cosine_v2
from dinov3.runlog import RunDir
from dinov3.weights import catalog, loading

STATISTICS_FROM = 1024  # images that the targets' mean and spread, and the first projections, are fitted on
CHECKPOINT, STUDENT = "distill.pth", "student.safetensors"


@dataclass
class DistillConfig:
    """Everything that decides a run's result. `sizes`: SIDE:SHARE[,…], the student's input through the run."""

    images: str = ""
    teachers: list[str] = field(default_factory=list)
    student: str = "dinov3_vitt16"
    weights: str | None = None  # the student's first weights; None: random
    inherit: str | None = None  # a DINOv2 folder or file whose ViT the student starts as a compressed copy of
    inherit_images: int = 320
    awaken: int = 0  # begin with the last block in closed form, on so many images; for a teacher with isometry=true
    steps: int = 2000
    batch: int = 64  # of all processes together
    sizes: str = "128:0.9,224:0.1"
    views: int = 4
    scale: list[float] = field(default_factory=lambda: [0.35, 1.0])
    lr: float = 5e-4
    final_lr: float = 1e-6
    warmup: int = 50
    schedule: str = "cosine"  # or flat:SHARE, the peak, then in that last share of the steps a straight line down
    projection_lr: float = 1.0  # times lr
    weight_decay: float = 0.05
    clip: float = 3.0
    optimizer: str = "adamw"  # adamw | muon (the blocks' matrices; AdamW for all else)
    mix: str = ""  # KIND:SHARE[,…] of the images, cutmix or mixup; only online teachers can answer mixed images
    momentum: float = 0.998  # of the average
    rope_rescale: float | None = None
    bf16: bool = False
    compile: bool = False  # the student by torch.compile: minutes at first, for every size
    in_memory: bool = False  # images stay decoded
    cache: str | None = None  # folder of the teachers' words; None: they are asked every time
    cached_grid: int = 8  # the patch grid that is cached; other grids are resized from it
    knn: str | None = None  # a labelled folder (perhaps with train/ and val/)
    knn_every: int = 500
    knn_size: int = 224
    save_every: int = 100
    log_every: int = 10
    seed: int = 0
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
        warmup = min(self.warmup, self.steps // 2)
        if self.schedule == "cosine":
            return warmup_cosine_v2(step, start=0.0, peak=self.lr, end=self.final_lr, warmup=warmup, total=self.steps)
        name, _, share = self.schedule.partition(":")
        if name != "flat" or not share.replace(".", "", 1).isdecimal() or not 0 <= float(share) <= 1:
            raise DinoError(f"the schedule is cosine or flat:SHARE, for example flat:0.25, not {self.schedule!r}")
        falls = max(1, round(self.steps * float(share)))
        left = min(1.0, (self.steps - step) / falls)  # the total can be changed until the fall begins
        return min(1.0, step / max(1, warmup)) * (self.final_lr + (self.lr - self.final_lr) * left)


# ---- the run --------------------------------------------------------------------------------------------------------


class Distillation:
    """Student, average, projections, optimiser and where they are: all that a checkpoint holds."""

    def __init__(self, config: DistillConfig, run: RunDir) -> None:
        self.config, self.run = config, run
        self.device = torch.device(config.device)
        self.views = Views(config.views, (config.scale[0], config.scale[1]), config.seed)
        largest = max(side for _, side in config.phases())
        self.images = Images(open_source(config.images), target_short_side=largest, keep=config.in_memory)
        if not config.teachers:
            raise DinoError("distillation needs a teacher: --teacher KIND:WHAT (see `dinov3 distill --help`)")
        self.teachers = [open_teacher(line, device=self.device) for line in config.teachers]
        clean = [t.id for t in self.teachers if not t.line.online]
        if config.mixing() and clean:
            raise DinoError(f"{clean[0]} looks at clean images and cannot teach mixed ones: give it online=true")
        self.said = [self._said(teacher) for teacher in self.teachers]
        torch.manual_seed(config.seed)
        self.student = self._student().to(self.device)
        self.batches = Batches(config, self.images, self.views, self.said, int(self.student.stride))
        self.forward: Callable[[Tensor], dict[str, Tensor]] = self.student.forward_features
        if config.compile:
            self.forward = torch.compile(self.student.forward_features, dynamic=False)
        fresh = not (self.run.checkpoints / CHECKPOINT).is_file()
        count = min(STATISTICS_FROM if fresh else 4, len(self.images))  # a checkpoint brings its own: widths are enough
        some = permuted(np.arange(count), len(self.images), config.seed, 0)
        width = int(self.student.embed_dim)
        self.pupils = nn.ModuleList(Pupil(t, width, s.read(some, 0)) for t, s in zip(self.teachers, self.said))
        self.pupils.to(self.device)
        if fresh and config.awaken:
            self._awaken()
        if fresh and config.steps:
            self._fit_projections(some)
        distributed.broadcast([*self.student.state_dict().values(), *self.pupils.state_dict().values()])
        self.average = deepcopy(self.student).eval().requires_grad_(False)
        self.optimizers = self._optimizers()
        self.step = 0

    def _said(self, teacher: Teacher) -> TargetCache | OnlineTargets:
        c = self.config
        if c.cache is None or teacher.line.online:
            return OnlineTargets(teacher, self.views, self.images, c.cached_grid, bf16=c.bf16)
        cache = TargetCache(Path(c.cache), teacher, self.views, self.images, c.cached_grid)
        missing = distributed.broadcast_object(len(list(cache.missing())))  # all fill it, or none
        if missing:
            self.run.say(f"{teacher.id}: {missing} shards of targets to compute into {cache.folder}")
            cache.fill(bf16=c.bf16, tell=self.run.say)
        return cache

    def _student(self) -> Any:
        from dinov3.hub import load

        c = self.config
        student: Any = load(c.student, c.weights or "random", seed=c.seed)
        student = student.float().train()
        if hasattr(student, "rope_embed"):
            student.rope_embed.rescale_coords = c.rope_rescale
        checkpoint = self.run.checkpoints / CHECKPOINT
        if c.inherit and not checkpoint.is_file():
            self._inherit(student)
        return student

    def _inherit(self, student: Any) -> None:
        from dinov3.distill.inherit import inherit_dinov2

        c = self.config
        assert c.inherit is not None
        path = Path(c.inherit)
        state, _ = loading.read(path / "model.safetensors" if path.is_dir() else path)
        patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
        some = permuted(np.arange(min(c.inherit_images, len(self.images))), len(self.images), c.seed, 0)
        grid = c.cached_grid
        mine, its = (self.images.views(self.views, some, 0, grid * p) for p in (student.stride, patch))
        inherit_dinov2(student, state, mine, its, tell=self.run.say)

    @torch.no_grad()
    def _awaken(self) -> None:
        guides = [(p, s) for p, s in zip(self.pupils, self.said) if s.teacher.line.isometry]
        if len(guides) != 1 or not hasattr(self.student, "blocks"):
            raise DinoError("awaken needs a vision transformer and one teacher with isometry=true")
        pupil: Any = guides[0][0]
        count = min(self.config.awaken, len(self.images))
        some = permuted(np.arange(count), len(self.images), self.config.seed, 0)
        wanted = pupil.scale_cls(guides[0][1].read(some, 0).cls.to(self.device))
        pixels = self.images.views(self.views, some, 0, self.config.side(0)).to(self.device)

        def aim(cls: Tensor) -> Tensor:
            turn = isometry(cls, wanted)
            return wanted @ turn / turn.square().sum(0).mean()

        inputs = (normalised(part, *catalog.STATISTICS["lvd1689m"]) for part in pixels.split(64))
        was, now = awaken_last(self.student, inputs, aim, bf16=self.config.bf16)
        self.run.say(f"the last block awoke: cosine of CLS with what the teacher means {was:.3f} before, {now:.3f} now")

    @torch.no_grad()
    def _fit_projections(self, some: np.ndarray) -> None:
        pixels = self.images.views(self.views, some, 0, self.config.side(0)).to(self.device)
        tokens, maps = [], []
        for part in normalised(pixels, *catalog.STATISTICS["lvd1689m"]).split(64):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
                out = self.student.forward_features(part)
            tokens.append(out["x_norm_clstoken"].float())
            maps.append(out["x_norm_patchtokens"].float())
        cls, grid = torch.cat(tokens), self.student.patch_grid(*pixels.shape[-2:])
        for module, said in zip(self.pupils, self.said):
            pupil: Any = module
            known = Targets(**{k: v.to(self.device) for k, v in said.read(some, 0).fields().items()})
            pupil.fit(cls, torch.cat(maps).unflatten(1, grid), known)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW, and Muon for the matrices of the student's blocks where it was asked for."""
        c = self.config
        if c.optimizer not in ("adamw", "muon"):
            raise UnknownName(f"the optimizer is adamw or muon, not {c.optimizer!r}")
        inside = {id(p) for name, p in self.student.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
        groups: list[list[dict[str, Any]]] = [[], []]
        for module, rate in ((self.student, 1.0), (self.pupils, c.projection_lr)):
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
        # teachers' thread wants when it leaves its own autocast, each with what the other waits for. Seen: a standstill.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16, cache_enabled=False):
            out = self.forward(x)
            grid = self.student.patch_grid(*x.shape[-2:])
            cls, patches = out["x_norm_clstoken"], out["x_norm_patchtokens"].unflatten(1, grid)
            terms = LossTerms()
            for i, targets in batch.targets.items():
                moved = Targets(**{k: v.to(self.device) for k, v in targets.fields().items()})
                pupil: Any = self.pupils[i]
                pupil.terms(terms, f"{i}-{self.teachers[i].line.kind}", cls, patches, moved)
        return terms

    def train_step(self, batch: Batch) -> LossTerms:
        step, c = self.step, self.config
        lr = c.lr_at(step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["rate"]
            optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(seed_of(c.seed, step, self.batches.rank))  # what the student itself draws
        terms = self.terms(batch)
        terms.total().backward()
        trained = [p for p in (*self.student.parameters(), *self.pupils.parameters()) if p.requires_grad]
        distributed.average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, c.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        momentum = min(c.momentum, (1 + step) / (10 + step))
        ema_update(self.average.parameters(), self.student.parameters(), momentum)
        self.step += 1
        return terms

    # ---- what is kept --------------------------------------------------------------------------------------------

    def save(self) -> None:
        if not distributed.is_main():
            return
        path = self.run.checkpoints / CHECKPOINT
        temporary = path.with_name(f".{path.name}.new")
        torch.save(
            {
                "step": self.step,
                "student": self.student.state_dict(),
                "average": self.average.state_dict(),
                "pupils": self.pupils.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "begun_with": self.begun_with(),
            },
            temporary,
        )
        loading.publish(temporary, path)

    def resume(self) -> bool:
        path = self.run.checkpoints / CHECKPOINT
        if not path.is_file():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        before, now = state.get("begun_with", {}), self.begun_with()
        for name in (n for n in before if before[n] != now[n]):
            raise DinoError(
                f"{self.run.path} was begun with {name} {before[name]}, not {now[name]}; give the same to go on, or "
                f"another --out (and --weights {self.run.path / STUDENT} to begin with what it learned)"
            )
        self.student.load_state_dict(state["student"])
        self.average.load_state_dict(state["average"])
        self.pupils.load_state_dict(state["pupils"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step = int(state["step"])
        return True

    def begun_with(self) -> dict[str, Any]:
        """What must stay the same when a run goes on. Lengths, rates, sizes and the like may change."""
        c = self.config
        same = ("student", "inherit", "awaken", "batch", "views", "optimizer", "seed")
        return {name: getattr(c, name) for name in same} | {
            "teachers": [_without_folders(line) for line in c.teachers],
            "weights": Path(c.weights).name if c.weights else None,
            "images": len(self.images),
        }

    def export(self, path: Path | None = None, about: Mapping[str, Any] | None = None) -> Path:
        """The average as our own file, float16, with what it is and how it came about."""
        mean, std = catalog.STATISTICS["lvd1689m"]
        row = catalog.resolve(self.config.student)[0]
        outside = ("device", "cache", "knn", "images", "in_memory")  # of this machine, or without an effect
        options = {k: v for k, v in asdict(self.config).items() if k not in outside}
        options["teachers"] = [_without_folders(line) for line in self.config.teachers]
        for name in ("inherit", "weights"):
            options[name] = Path(options[name]).name if options[name] else None
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
        return loading.save(small, path or self.run.path / STUDENT, metadata)


def _without_folders(line: str) -> str:
    kind, _, rest = line.partition(":")
    what, *options = rest.split(",")
    return ",".join([f"{kind}:{Path(what).name}", *options])


def distill(config: DistillConfig, out: str | Path) -> Path:
    """Trains, or goes on with, the run in folder `out`, alone or with the other processes; the exported student's path."""
    config = replace(config, device=str(distributed.setup(config.device)))
    if config.knn:
        _labelled(Path(config.knn), 1)  # a mistake in it is said now, not after the first steps
    run = RunDir(out, writer=distributed.is_main())
    with run.claimed():
        return _distill(config, run)


def _distill(config: DistillConfig, run: RunDir) -> Path:
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    work = Distillation(config, run)
    resumed = work.resume()
    run.start(config, iteration=work.step)
    c, total = config, config.steps
    count = sum(p.numel() for p in work.student.parameters()) / 1e6
    run.say(
        f"{'resumed at step ' + str(work.step) if resumed else 'started'}: {c.student} ({count:.1f}M), "
        f"{len(work.images)} images, {total} steps of {work.batches.size}, teachers {[t.id for t in work.teachers]}"
    )
    # measured: torch's fused attention is the slower one in backward passes on CPUs, by a quarter at 69 tokens
    kernel: Any = sdpa_kernel(SDPBackend.MATH) if work.device.type == "cpu" else nullcontext()
    since, began = work.step, time.perf_counter()
    with kernel:
        for batch in work.batches.between(work.step, total):
            lr = c.lr_at(work.step)
            terms = work.train_step(batch)
            if work.step % c.log_every == 0 or work.step == total:
                rate = (work.step - since) * work.batches.size / (time.perf_counter() - began)
                since, began = work.step, time.perf_counter()
                numbers = distributed.average(terms.log())
                facts = {"lr": lr, "side": c.side(work.step - 1), "images_per_s": rate}
                run.record(work.step - 1, facts | numbers)
                shown = ", ".join(f"{k} {v:.3f}" for k, v in numbers.items())
                run.say(f"step {work.step}/{total}, {rate:.0f} images/s, {shown}")
            if work.step % c.save_every == 0 or work.step == total:
                work.save()
            if c.knn and run.writer and (work.step % c.knn_every == 0 or work.step == total):
                accuracy = knn(work.average, c.knn, size=c.knn_size, bf16=c.bf16)
                run.record(work.step - 1, {"knn_top1": accuracy})
                run.say(f"step {work.step}: k-NN on {Path(c.knn).name}: {accuracy:.4f}")
                since, began = work.step, time.perf_counter()
    unreadable = [pair for found in distributed.gather_objects(work.images.unreadable) for pair in found.items()]
    for path, reason in dict(unreadable).items():
        run.say(f"could not read {path}: {reason}")
    exported = work.export() if run.writer else run.path / STUDENT
    distributed.barrier()
    run.say(f"exported {exported}")
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
    rule = Preprocessing(size=size, interpolation="bicubic", mean=catalog.STATISTICS["lvd1689m"][0])
    tokens, labels = [], []
    device = next(model.parameters()).device.type
    for side in sides:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            found = [f.cls for f in extract(model, batched([p for p, _ in side], rule, 32), preprocessing=rule)]
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
