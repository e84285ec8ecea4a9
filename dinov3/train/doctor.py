"""Is the run learning? Measurements of the teacher's features during training, and one plain verdict from them.

    doctor = Doctor(config, schedules, run, loader)
    doctor.watch(batch, targets, dumping)       # every step: which prototypes win
    doctor.measure(iteration, method, images)   # at a dump: numbers into metrics.jsonl
    for verdict in verdicts(facts, records): …  # pure: from the numbers of a run's folder, finished or not

Everything is measured on the average ("the teacher" here) over a fixed sample of the training images, the same in every
start of a run, read once and cached as bytes. Nothing draws from the run's random generators. All ranks take part: each
has its share of the sample, and sharded weights are gathered by all of them together.

Sources: RankMe (arXiv 2210.02885), LiDAR (arXiv 2312.04000), drift of patch similarities (DINOv3 paper §4).
Legend: n images, D width, K prototypes, P patches of an image.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dinov3 import distributed, drawing
from dinov3.config.train import TrainConfig, vit_config
from dinov3.data.crops import CropBatch, generator, render
from dinov3.data.images import open_image
from dinov3.data.loading import REPLACEMENTS, CropLoader
from dinov3.data.transforms.inputs import cropped, normalised, to_bytes
from dinov3.dense.pca import rainbow
from dinov3.errors import ImageError
from dinov3.features import Features, outputs
from dinov3.files import atomically
from dinov3.metrics import pattern_kept, rank_me
from dinov3.optim import Schedule, build_schedules, local
from dinov3.parallel import precision
from dinov3.runlog import RunDir, read_metrics
from dinov3.threads import prefetched
from dinov3.train.method import SelfDistillation, Targets

# ---- from tensors to numbers -----------------------------------------------------------------------------------------


def lidar(views: Tensor, delta: float = 1e-4) -> float:
    """LiDAR of features [n, q, D] of q augmented views of n images: the effective rank of the LDA matrix
    W^(−1/2) B W^(−1/2), B the scatter of the images' means, W (+ delta on its diagonal) that of views around them."""
    if not views.isfinite().all():
        return math.nan
    x = views.double()
    means = x.mean(1)  # [n, D]
    around = (x - means[:, None]).flatten(0, 1)
    within = around.T @ around / len(around)
    within += delta * within.diagonal().mean().clamp_min(1e-12) * torch.eye(len(within), dtype=x.dtype, device=x.device)
    centred = means - means.mean(0)
    # B = CᵀC / (n − 1): the LDA matrix has the singular values of C W^(−1/2), squared
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), centred.T, upper=False)  # [D, n]
    values = torch.linalg.svdvals(whitened).square()
    return float(torch.special.entr(values / values.sum().clamp_min(1e-300)).sum().exp())


def mean_cosine(x: Tensor) -> float:
    """The mean cosine of two different rows of [n, D]: 1 where all are alike."""
    unit, n = F.normalize(x.double(), dim=1), len(x)
    return float((unit.sum(0).square().sum() - n) / max(n * (n - 1), 1))


def patch_cosines(patches: Tensor) -> Tensor:
    """[n, h, w, D] → cosines of all pairs of patches of an image, [n, P, P]."""
    x = F.normalize(patches.float().flatten(1, 2), dim=-1)
    return x @ x.transpose(1, 2)


def structure(patches: Tensor, mirrored: Tensor) -> float:
    """Whether patches tell what they show from where they are: the share whose most similar patch in the mirrored image is
    the one that shows the same, or touches it. [n, h, w, D] of n images and of the same, mirrored."""
    h, w = patches.shape[1:3]
    x, y = (F.normalize(p.float().flatten(1, 2), dim=-1) for p in (patches, mirrored.flip(2)))
    found = (x @ y.transpose(1, 2)).argmax(-1)  # [n, P]
    own = torch.arange(h * w, device=found.device)
    near = ((found // w - own // w).abs() <= 1) & ((found % w - own % w).abs() <= 1)
    return float(near.float().mean())


def relative_distance(a: nn.Module, b: nn.Module) -> Tensor:
    """‖a − b‖ / ‖b‖ over all parameters, sharded or not; without waiting for the device."""
    mine, theirs = ([local(p.detach()) for p in m.parameters()] for m in (a, b))
    squares = torch.stack(
        [torch.stack(torch._foreach_norm(x)).square().sum() for x in (torch._foreach_sub(mine, theirs), theirs)]
    )
    mesh = next((p.device_mesh for p in a.parameters() if hasattr(p, "device_mesh")), None)
    if mesh is not None:  # over its other dimension there are copies
        squares = distributed.all_reduce(squares, "sum", mesh.get_group(mesh.ndim - 1))
    return (squares[0] / squares[1]).sqrt()


def distinct(thumbnails: Tensor, of: int) -> float:
    """How many different images there are among `of`, from thumbnails [n, 3, s, s] (0 to 255) of n drawn from them.

    Two are copies where their thumbnails differ by less than SAME levels on average: a re-encoded or resized copy is one, the
    next frame of a still camera too. m different ones among n drawn: the M solves M·(1 − (1 − 1/M)^n) = m.
    """
    x = thumbnails.float().flatten(1)
    same = torch.cdist(x, x, p=1) / x.shape[1] < SAME
    m, n = int((same.float().triu(1).sum(0) == 0).sum()), len(x)  # the first of its copies
    if m == n or n >= of:
        return float(of if m == n else m)
    low, high = float(m), float(of)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if -middle * math.expm1(n * math.log1p(-1 / middle)) < m else (low, middle)
    return high


SAME = 3.0  # of 255 levels


# ---- during a run ----------------------------------------------------------------------------------------------------

LEAST, MOST = 64, 2048  # images of the sample
SHARE = 0.02  # of a run's time
FORWARD = 6  # forward passes that a training image costs at least: two by the teacher, two by the student, gradients
VIEWS = 4  # of an image, for LiDAR
FIXED, DRAWN = 6, 3  # images whose patches are compared between dumps; images that are drawn
SAMPLE_EPOCH = 1_000_003  # of the loader's order: a pass at which no run arrives
THUMBNAIL = 8  # px
RECENT = 100  # log records that a verdict goes by


def sample_size(config: TrainConfig, images_per_step: int, available: int, ranks: int = 1) -> int:
    """Images of the sample: `evaluation.doctor_images`, or four times the features' width, where it costs at most SHARE of a
    run; 0 where that allows less than LEAST. A multiple of the ranks."""
    n = config.evaluation.doctor_images
    if n is None:
        steps = min(max(config.evaluation.eval_period_iterations, 0), config.iterations)
        n = int(SHARE * FORWARD * steps * images_per_step / 3)  # half as many views for LiDAR, and as much for the rest
        n = min(n, 4 * vit_config(config.student).embed_dim, MOST) if n >= LEAST else 0
    return min(n, available) // ranks * ranks


@dataclass(frozen=True)
class Sample:
    """This rank's share of the fixed images, as bytes; `fixed` is the same on all ranks."""

    images: Tensor  # [n, 3, g, g], the middle square
    views: Tensor  # [m, VIEWS, 3, g, g], augmented as global crops are
    fixed: Tensor  # [FIXED, 3, s, s]
    thumbnails: Tensor  # [n, 3, THUMBNAIL, THUMBNAIL]


class Doctor:
    """Measures a run while it trains; see the top of the file."""

    def __init__(
        self, config: TrainConfig, run: RunDir, loader: CropLoader, method: SelfDistillation, device: torch.device
    ) -> None:
        self.config, self.run, self.loader, self.method, self.device = config, run, loader, method, device
        self.group, self.ranks = method.group, distributed.world(method.group)
        self.stride: int = method.ema.backbone.stride  # type: ignore[assignment]
        images_per_step = loader.global_batch * config.optim.accumulation_steps
        self.size = sample_size(config, images_per_step, loader.order.length, self.ranks)
        self.facts = facts_of(config, str(run.path))
        self.logs: list[dict[str, Any]] = []  # the latest log records
        self.warned: set[str] = set()
        self.windows: dict[str, list[Tensor]] = {}  # head → [whether a prototype won [K], sum of the targets [K], rows]
        self.crops: CropBatch | None = None  # of the first images of a step that is drawn

    def due(self, iteration: int, dumping: bool) -> bool:
        """Whether this iteration is measured: those that write the teacher, and the first, which is the start."""
        return self.size > 0 and (dumping or iteration == 0)

    # -- words

    def at_start(self) -> Iterator[str]:
        """Whether the teacher can follow the student in this run at all."""
        total = self.facts.total
        left = self.facts.remains(total - 1) if PATIENCE <= total <= 10_000 else 0.0
        if left > REMAINS:
            advice = ADVICE["teacher frozen"].format(**self.facts.keys)
            yield f"warning: after {total} iterations the teacher still is {left:.0%} of its first weights; {advice}"

    def warnings(self, iteration: int, logged: Mapping[str, float]) -> Iterator[str]:
        """A sentence about a log line, where there is something to warn of; each kind once in a process."""
        if not logged:
            return
        self.logs = [*self.logs[-RECENT:], {"iteration": iteration, **logged}]
        found = verdict(self.facts, self.logs, self.measured, iteration)
        if found.ill and found.name not in self.warned:
            self.warned.add(found.name)
            yield f"warning: {found}"

    @cached_property
    def measured(self) -> list[Mapping[str, Any]]:
        """The measurements so far, those of earlier starts too."""
        return [r for r in read_metrics(self.run.metrics_file) if "rankme" in r]

    # -- the batch

    @torch.no_grad()
    def watch(self, batch: CropBatch, targets: Targets) -> None:
        """Which prototypes win, and the mean target, since the last measurement; without waiting for the device."""
        if not self.size:
            return
        if self.config.evaluation.doctor_draws:
            self.crops = first_images(batch, DRAWN)
        for name, t in (("dino", targets.dino.flatten(0, -2)), ("ibot", targets.ibot)):
            if name not in self.windows:
                won = torch.zeros(t.shape[-1], dtype=torch.bool, device=t.device)
                self.windows[name] = [won, torch.zeros(t.shape[-1], device=t.device), torch.zeros(1, device=t.device)]
            won, mass, rows = self.windows[name]
            won.scatter_(0, t.argmax(-1), True)
            mass += t.sum(0)
            rows += len(t)

    def _averaged(self) -> nn.Module:
        """The parts of the student that the teacher has too: not the heads of guides."""
        return nn.ModuleList(getattr(self.method.student, name) for name in self.method.ema.parts())

    def _prototypes(self) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for name, (won, mass, rows) in self.windows.items():
            won, mass = (distributed.all_reduce(x.float(), op, self.group) for x, op in ((won, "max"), (mass, "sum")))
            p = mass.double().cpu() / mass.double().cpu().sum().clamp_min(1e-300)
            numbers |= {
                f"{name}_prototypes_used": float(won.mean()),
                f"{name}_target_entropy": float(torch.special.entr(p).sum()),
                f"{name}_targets": float(distributed.all_reduce(rows, "sum", self.group)),
            }
        self.windows = {}
        return numbers

    # -- the sample

    @cached_property
    def sample(self) -> Sample:
        order, config = self.loader.order, replace(self.loader.configs[0], local_count=0, gram_size=None)
        positions = SAMPLE_EPOCH * order.length + np.arange(self.size)
        indices = order.at(positions)[1].tolist()
        side = self.stride * min(max(16, config.global_size // self.stride), 32)  # px: patches enough to see outlines
        rank, seed = distributed.rank(self.group), self.config.train.seed
        n_views = self.size // 8 // self.ranks * self.ranks

        def read(nth: int) -> Image.Image:
            for attempt in range(REPLACEMENTS + 1):
                index = order.replacement(int(positions[nth]), attempt) if attempt else indices[nth]
                try:
                    return open_image(self.loader.images.read(index), target_short_side=config.target_short_side).image
                except (ImageError, OSError):
                    continue
            raise ImageError(f"{REPLACEMENTS + 1} images in a row could not be read")

        def square(image: Image.Image, side: int) -> Tensor:
            x = to_bytes(image)
            short, height, width = min(x.shape[1:]), *x.shape[1:]
            return cropped(x, ((height - short) // 2, (width - short) // 2, short, short), side)

        def made(nth: int) -> tuple[Tensor, Tensor, list[Tensor]]:
            image = read(nth)
            seen = []
            for draw in range(VIEWS // 2 if nth < n_views else 0):
                plan = config.plan(*image.size, generator(seed, SAMPLE_EPOCH + draw, nth))
                seen.append(render(image, plan, config).global_crops)
            return square(image, config.global_size), square(image, THUMBNAIL), seen

        mine = range(rank, self.size, self.ranks)
        parts = list(prefetched(made, mine, max(1, self.config.train.num_workers), 64))
        fixed = [square(read(nth), side) for nth in range(min(FIXED, self.size))]
        g = config.global_size
        views = [torch.cat(seen) for _, _, seen in parts if seen]
        return Sample(
            torch.stack([image for image, _, _ in parts]),
            torch.stack(views) if views else torch.zeros(0, VIEWS, 3, g, g, dtype=torch.uint8),
            torch.stack(fixed),
            torch.stack([small for _, small, _ in parts]),
        )

    def _outputs(self, images: Tensor, batch: int) -> Iterator[dict[str, Any]]:
        c = self.config.crops
        batches = (normalised(x.to(self.device), c.rgb_mean, c.rgb_std) for x in images.split(batch))
        with precision(self.device, self.config.compute_precision.param_dtype):
            for (found,) in outputs(self.method.ema.backbone, batches):
                yield found

    def _cls(self, images: Tensor) -> Tensor:
        """CLS tokens of this rank's images [..., 3, g, g] and of all other ranks', [Σ ..., D] in float32 on the CPU."""
        batch = self.config.evaluation.knn_batch_size
        x = torch.cat([f["cls"].float() for f in self._outputs(images.flatten(0, -4), batch)])
        return distributed.all_gather(x.unflatten(0, images.shape[:-3]).clone(), self.group).cpu()

    # -- a measurement

    def measure(self, iteration: int, seen: int) -> None:
        """After an iteration, with `seen` images so far: a record in metrics.jsonl, a line in the log, two drawings. All
        ranks call it."""
        began = time.perf_counter()
        prototypes, gap = self._prototypes(), float(relative_distance(self._averaged(), self.method.ema))
        cls = self._cls(self.sample.images)
        views = self._cls(self.sample.views) if len(self.sample.views) else None
        fixed, mirrored = (next(self._outputs(x, FIXED)) for x in (self.sample.fixed, self.sample.fixed.flip(-1)))
        thumbnails = distributed.all_gather(self.sample.thumbnails.to(self.device), self.group).cpu()
        if self.run.writer:
            numbers = {
                "rankme": rank_me(cls) if cls.isfinite().all() else math.nan,
                "lidar": math.nan if views is None else lidar(views),
                "cls_cosine": mean_cosine(cls),
                "patch_structure": structure(fixed["patches"], mirrored["patches"]),
                **self._compared(iteration, cls, patch_cosines(fixed["patches"]).cpu()),
                "teacher_gap": gap,
                **prototypes,
                "images_seen": seen,
                "images_distinct": distinct(thumbnails, self.loader.order.length),
                "images_listed": self.loader.order.length,
            }
            if self.config.evaluation.doctor_draws:
                self._draw(iteration, fixed)
            numbers["doctor_images"], numbers["doctor_seconds"] = len(cls), time.perf_counter() - began
            self.run.record(iteration, numbers)
            self.measured.append({"iteration": iteration, **numbers})
            found = verdict(self.facts, self.logs, self.measured, iteration)
            self.warned.add(found.name)
            self.run.log(f"iteration {iteration}: {numbers_text(numbers)}. {found}")

    def _compared(self, iteration: int, cls: Tensor, cosines: Tensor) -> dict[str, float]:
        """What changed since the last measurement, and since the one whose patches had the most structure."""
        folder = self.run.path / "doctor"
        numbers: dict[str, float] = {}
        folder.mkdir(exist_ok=True)
        with atomically(folder / f"{iteration}.safetensors") as temporary:
            save_file({"cls": cls.half(), "cosines": cosines.half()}, temporary)
        last = self.measured[-1] if self.measured else None
        for name, record in (("teacher_moved", last), ("patch_drift", _best(self.facts, self.measured))):
            file = folder / f"{record['iteration']}.safetensors" if record else None
            if file is None or not file.is_file():
                continue
            before = load_file(file)
            if name == "teacher_moved" and before["cls"].shape == cls.shape:
                numbers[name] = 1 - float(F.cosine_similarity(before["cls"].float(), cls).mean())
            elif name == "patch_drift" and before["cosines"].shape == cosines.shape:
                numbers[name] = 1 - pattern_kept(before["cosines"].float(), cosines)
        return numbers

    # -- drawings

    def _draw(self, iteration: int, fixed: dict[str, Any]) -> None:
        """`images/crops_N.png`: crops of this step as the student saw them, masked patches grey; `images/pca_N.png`: the
        same three images at every dump, above the three strongest directions of their patches as red, green and blue."""
        if self.crops is not None:
            self.run.image(iteration, "crops", crops_drawn(self.crops))
        originals = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in self.sample.fixed[:DRAWN]]
        found: dict[str, Any] = fixed | {"patches": fixed["patches"][:DRAWN]}
        features = Features(**found, preprocessing="", model="", geometry=())
        colours = [
            drawing.colours_of(x.numpy()).resize(image.size, Image.Resampling.NEAREST)
            for x, image in zip(rainbow(features), originals)
        ]
        self.run.image(iteration, "pca", drawing.sheet([("", image) for image in (*originals, *colours)], DRAWN))


def first_images(batch: CropBatch, n: int) -> CropBatch:
    """The crops and masks of a batch's first n images, copied."""
    B, n = batch.batch_size, min(n, batch.batch_size)

    def first(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, B))[:, :n].flatten(0, 1).clone()

    crops = (first(x) for x in (batch.global_crops, batch.local_crops, batch.masks))
    return replace(batch, gram_crops=None, **dict(zip(("global_crops", "local_crops", "masks"), crops)))  # type: ignore[arg-type]


def crops_drawn(batch: CropBatch) -> Image.Image:
    """A row for each image of a small batch: two global crops with the masked patches grey, and the local crops."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (batch.mean, batch.std))
    B, tiles = batch.batch_size, []

    def shown(crop: Tensor, mask: Tensor | None = None) -> Image.Image:
        x = (crop.float().cpu() * std + mean).clamp(0, 1)
        if mask is not None:
            side = crop.shape[-1]
            cells = mask.cpu().view(1, 1, round(len(mask) ** 0.5), -1).float()
            x = torch.where(F.interpolate(cells, (side, side))[0] > 0, torch.full((), 0.5), x)
        return drawing.colours_of(x.permute(1, 2, 0).numpy())

    for i in range(B):
        rows = [(f"global {c + 1}", shown(batch.global_crops[c * B + i], batch.masks[c * B + i])) for c in range(2)]
        rows += [(f"local {c + 1}", shown(x)) for c, x in enumerate(batch.local_crops[i::B])]
        tiles += rows if i == 0 else [("", image) for _, image in rows]
    return drawing.sheet(tiles, len(tiles) // B, side=128)


# ---- from numbers to a verdict ---------------------------------------------------------------------------------------
# THE place of thresholds and sentences: what the log of a run warns of, and what `dinov3 doctor` prints. All thresholds
# lie between what healthy and planted runs gave: table in docs/doctor.md.

PATIENCE = 200  # iterations before a loss that has not fallen is worth a warning; or the warm-up, if that is longer
PLATEAU = 0.995  # of a loss's value for targets and predictions that are uniform
ABOVE, EARLY = 1.05, 20  # of the same value: worse than knowing nothing; iterations in which that may be
FAR = 0.45  # ‖student − teacher‖ / ‖teacher‖
EXPLODED, RISEN = 10.0, 1.02  # times the typical gradient norm and DINO loss of the run's latest records
ALIKE = 0.95  # mean cosine of CLS tokens of different images
ONE_TARGET = 0.85  # of ln K, entropy of the mean target; Sinkhorn-Knopp keeps it at 1.00
KOLEO_ALIKE = 4.0  # KoLeo: the nearest of a batch's CLS tokens lie e⁻⁴ = 0.018 apart, on a sphere of radius 1
FEW_DIMENSIONS, FEW_OF = 4.0, 0.02  # RankMe: that, or that share of the most it can be
FEW_PROTOTYPES = 0.12  # of those that as many uniform draws would hit
REMAINS = 0.5  # of its first weights in the teacher
REPEATED, FEW_IMAGES = 100, 2000  # views of each image, where there are fewer different ones than that
COPIES = 0.5  # different images per file
STRUCTURED = 0.5  # share of patches: below it, as in young networks, there is no structure to lose
DECAYED, DRIFTED = 0.92, 0.02  # of the best structure of patches; 1 − correlation of their cosines

ADVICE = {
    "learning rate too high": "lower {lr} to a third or less, lengthen the warm-up, and start again from the last sound dump",
    "repeated data": "give more different images: drop copies (`dinov3 store duplicates`), or train fewer steps",
    "teacher frozen": "lower {momentum} (0.99 for a few hundred iterations, 0.998 for thousands)",
    "full collapse": "lower {lr}, raise dino.koleo_loss_weight, and start again: a collapsed run does not recover",
    "dimensional collapse": "raise dino.koleo_loss_weight and dino.head_n_prototypes, keep ibot.loss_weight above 0",
    "plateau": "try another learning rate ({lr}), a lower {momentum}, fewer prototypes (dino.head_n_prototypes), more images",
    "unused prototypes": "lower dino.head_n_prototypes and ibot.head_n_prototypes to about what is used",
    "patch similarity decayed": "start Gram now, teacher = step {best}: gram.use_loss=true gram.ckpt={teacher} "
    "gram.rep_update=false, with student.resume_from_teacher_chkpt={student} and another --out",
    "healthy": "go on",
    "too early": "wait",
}


@dataclass(frozen=True)
class Facts:
    """What a verdict needs of a configuration."""

    total: int  # iterations
    patience: int
    uniform: Mapping[str, float]  # loss → its value for a network that has learned nothing
    prototypes: Mapping[str, int]  # head → K
    width: int  # D
    momentum: Schedule
    gram: bool  # Gram anchoring is on
    weights: str  # the first ones, "" for random ones
    folder: str
    keys: Mapping[str, str]  # learning rate and momentum, as this configuration calls them

    def remains(self, iteration: int) -> float:
        """The share of the teacher's first weights that is left after an iteration; below 1e-3 it is not counted on."""
        left = 1.0
        for it in range(iteration + 1):
            left *= self.momentum(it)
            if left < 1e-3:
                break
        return left


def facts_of(config: TrainConfig, folder: str = "RUN") -> Facts:
    schedules = build_schedules(config, 1)
    total = schedules.total
    peak = max(range(total), key=schedules.lr) if total <= 10_000 else total // 10
    K = {"dino": config.dino.head_n_prototypes, "ibot": config.ibot.head_n_prototypes}
    uniform = {"dino_global_crops_loss": math.log(K["dino"])}
    if not config.distillation.enabled:  # only so many of the crops are masked
        uniform["ibot_loss"] = math.log(K["ibot"]) * config.ibot.mask_sample_probability
    weights = {"dino_global_crops_loss": config.dino.loss_weight, "ibot_loss": config.ibot.loss_weight}
    uniform = {name: value for name, value in uniform.items() if value > 0 and weights[name] > 0}  # what is learned
    keys = {"lr": "optim.lr", "momentum": "teacher.momentum_teacher"}
    if config.schedules is not None:
        keys = {"lr": "schedules.lr.peak", "momentum": "schedules.momentum.peak"}
    return Facts(
        total=total,
        patience=max(PATIENCE, peak),
        uniform=uniform,
        prototypes=K,
        width=vit_config(config.student).embed_dim,
        momentum=schedules.momentum if config.teacher.ema != "heads" else lambda _: 0.0,
        gram=config.gram.use_loss,
        weights=config.student.resume_from_teacher_chkpt,
        folder=folder,
        keys=keys,
    )


@dataclass(frozen=True)
class Verdict:
    """One plain sentence on a run at an iteration."""

    iteration: int
    name: str  # a key of ADVICE
    finding: str  # with its numbers
    advice: str

    @property
    def ill(self) -> bool:
        return self.name not in ("healthy", "too early")

    def __str__(self) -> str:
        return f"{self.name}: {self.finding}; {self.advice}" if self.ill else f"{self.name}: {self.finding}"


Records = Sequence[Mapping[str, Any]]


def verdicts(facts: Facts, records: Records) -> list[Verdict]:
    """A verdict for every measurement of a run, and one for its newest record where that is later."""
    logs = [r for r in records if "total_loss" in r]
    measured = [r for r in records if "rankme" in r]
    ends = [r["iteration"] for r in measured]
    if logs and logs[-1]["iteration"] > max(ends, default=-1):
        ends.append(logs[-1]["iteration"])

    def until(of: Records, end: int) -> Records:
        return [r for r in of if r["iteration"] <= end]

    return [verdict(facts, until(logs, end), until(measured, end), end) for end in ends]


def verdict(facts: Facts, logs: Records, measured: Records, iteration: int) -> Verdict:
    """The first finding that applies, causes before what they bring about; of records up to that iteration, in order."""
    now = measured[-1] if measured else {}
    findings = ((name, check(facts, logs, measured)) for name, check in CHECKS.items())
    name, finding = next(((n, f) for n, f in findings if f is not None), ("healthy", "nothing is wrong"))
    if name == "healthy" and iteration < facts.patience:
        name, finding = "too early", f"{iteration + 1} of {facts.patience} iterations before a loss says anything"
    assert finding is not None
    best = (_best(facts, measured) or {"iteration": 0})["iteration"]
    dump = f"{facts.folder}/eval/training_"
    advice = ADVICE[name].format(
        **facts.keys,
        best=best,
        teacher=facts.weights if best == 0 and facts.weights else f"{dump}{best}",
        student=f"{dump}{now.get('iteration', iteration)}",
    )
    return Verdict(iteration, name, finding, advice)


def _best(facts: Facts, measured: Records) -> Mapping[str, Any] | None:
    """The measurement whose patches have the most structure; the start is none, unless it has weights."""
    known = [r for r in measured if r.get("patch_structure") is not None and (r["iteration"] > 0 or facts.weights)]
    return max(known, key=lambda r: r["patch_structure"], default=None)


def _latest(logs: Records, name: str) -> float | None:
    return next((r[name] for r in reversed(logs) if r.get(name) is not None), None)


def _too_fast(facts: Facts, logs: Records, measured: Records) -> str | None:
    """Losses that are not finite, or were worse than a network's that knows nothing and still are no better; a student that
    runs away from its average and learns nothing; gradients that explode."""
    recent = logs[-RECENT:]
    bad = [r["iteration"] for r in recent if "total_loss" in r and r["total_loss"] is None]
    if bad:
        return f"the loss was not finite, first around iteration {bad[0]}"
    gap = measured[-1].get("teacher_gap") if measured else None
    for name, uniform in facts.uniform.items():
        values = {r["iteration"]: r[name] for r in recent if r.get(name) is not None and r["iteration"] > EARLY}
        if not values or values[max(values)] < PLATEAU * uniform:
            continue
        it = max(values, key=lambda i: values[i])
        if values[it] > ABOVE * uniform:
            return f"{name} was {values[it]:.4g} at iteration {it}, above the {uniform:.4g} of a network that knows nothing"
        if gap is not None and gap > FAR and facts.remains(measured[-1]["iteration"]) < REMAINS:
            return f"the student is {gap:.0%} of the weights' size away from its average, and nothing is learned"
    losses = [r["dino_global_crops_loss"] for r in recent if r.get("dino_global_crops_loss") is not None]
    if len(losses) < 12 or min(losses[-2:]) < RISEN * float(np.median(losses[:-2])):
        return None
    for name in ("backbone_grad_norm", "dino_head_grad_norm"):
        norms = [r[name] for r in recent if r.get(name)]  # 0 while it is frozen
        if len(norms) >= 12 and min(norms[-2:]) > EXPLODED * (usual := float(np.median(norms[:-2]))):
            return f"losses rise, and {name} is {norms[-1]:.3g}, where {usual:.3g} was usual"
    return None


def _repeated(_facts: Facts, _logs: Records, measured: Records) -> str | None:
    """Few different images for the steps, or many copies among the files."""
    if not measured or not measured[-1].get("images_distinct"):
        return None
    seen, different, files = (measured[-1].get(f"images_{n}", 0) for n in ("seen", "distinct", "listed"))
    if different < COPIES * files:
        return f"about {different:.0f} of {files:.0f} images differ, the others are copies of them"
    if different < FEW_IMAGES and seen > REPEATED * different:
        return f"the {different:.0f} different images were seen {seen / different:.0f} times each"
    return None


def _frozen(facts: Facts, logs: Records, measured: Records) -> str | None:
    """A teacher that is still its first weights while the student has gone elsewhere."""
    it = max(r[-1]["iteration"] if r else 0 for r in (logs, measured))
    if it < facts.patience or (left := facts.remains(it)) <= REMAINS:
        return None
    return f"after {it + 1} iterations the teacher still is {left:.0%} of its first weights"


def _collapsed(facts: Facts, logs: Records, measured: Records) -> str | None:
    """CLS tokens of different images that became equal; at the start they may be, with a small layer scale."""
    first, now = (r.get("cls_cosine") for r in (measured[0], measured[-1])) if measured else (None, None)
    if now is not None and now > ALIKE and first is not None and first <= ALIKE:
        return f"the CLS tokens of different images have a mean cosine of {now:.3f}"
    spread = measured[-1].get("dino_target_entropy") if len(measured) > 1 else None
    even = math.log(facts.prototypes["dino"])
    if spread is not None and spread < ONE_TARGET * even:
        return f"the images' targets come together (entropy of the mean target {spread:.2f} of {even:.2f})"
    koleo = _latest(logs[-1:], "koleo_loss")
    if koleo is not None and koleo > KOLEO_ALIKE and logs[-1]["iteration"] >= facts.patience:
        return f"the CLS tokens of different images are nearly equal (KoLeo {koleo:.3g})"
    return None


def _flat(facts: Facts, _logs: Records, measured: Records) -> str | None:
    """Features that differ in a few directions only."""
    first, now = (r.get("rankme") for r in (measured[0], measured[-1])) if len(measured) > 1 else (None, None)
    most = min(facts.width, measured[-1].get("doctor_images", facts.width)) if measured else 0
    if first is None or now is None or now >= max(FEW_DIMENSIONS, FEW_OF * most):
        return None
    return f"the features use about {now:.1f} dimensions (RankMe), {first:.1f} at the start"


def _plateau(facts: Facts, logs: Records, _measured: Records) -> str | None:
    if not logs or logs[-1]["iteration"] < facts.patience:
        return None
    stuck = {n: u for n, u in facts.uniform.items() if (_latest(logs[-1:], n) or 0.0) >= PLATEAU * u}
    if not stuck:
        return None
    values = ", ".join(f"{n} is {_latest(logs, n):.4g} ({u:.4g})" for n, u in stuck.items())
    return f"{values} after {logs[-1]['iteration'] + 1} iterations, as for a network that has learned nothing"


def _unused(facts: Facts, _logs: Records, measured: Records) -> str | None:
    """Prototypes that win nowhere in a window, compared with as many draws at random."""
    for head, K in facts.prototypes.items():
        now = measured[-1] if measured and measured[-1]["iteration"] > 0 else {}
        used, rows = now.get(f"{head}_prototypes_used"), now.get(f"{head}_targets")
        if used is None or rows is None:
            continue
        if used < FEW_PROTOTYPES * -math.expm1(-rows / K):
            return f"{used:.0%} of the {K} {head} prototypes won at least once in {rows:.0f} targets"
    return None


def _decayed(facts: Facts, _logs: Records, measured: Records) -> str | None:
    """Patches that find themselves in the mirrored image less often than those of an earlier teacher. A network from random
    weights has no good earlier teacher at its first measurement."""
    best = _best(facts, measured[:-1])
    if facts.gram or best is None:
        return None
    before, after, drift = best["patch_structure"], measured[-1].get("patch_structure"), measured[-1].get("patch_drift")
    if before < STRUCTURED:
        return None
    if after is None or drift is None or after >= DECAYED * before or drift < DRIFTED:
        return None
    return (
        f"{after:.0%} of the patches find themselves in the mirrored image, {before:.0%} did at step {best['iteration']} "
        f"(drift {drift:.2f})"
    )


Check = Callable[[Facts, Records, Records], str | None]
CHECKS: dict[str, Check] = {  # in the order of causes
    "learning rate too high": _too_fast,
    "repeated data": _repeated,
    "teacher frozen": _frozen,
    "full collapse": _collapsed,
    "dimensional collapse": _flat,
    "unused prototypes": _unused,
    "plateau": _plateau,
    "patch similarity decayed": _decayed,
}

SHOWN = {  # fields of a measurement → a column
    "rankme": ("RankMe", "{:.1f}"),
    "lidar": ("LiDAR", "{:.1f}"),
    "cls_cosine": ("cosine", "{:.3f}"),
    "dino_prototypes_used": ("prototypes", "{:.0%}"),
    "teacher_gap": ("gap", "{:.3f}"),
    "patch_structure": ("patches", "{:.3f}"),
    "patch_drift": ("drift", "{:.3f}"),
}


def numbers_text(numbers: Mapping[str, Any], between: str = ", ") -> str:
    return between.join(
        f"{label} {form.format(numbers[name])}"
        for name, (label, form) in SHOWN.items()
        if numbers.get(name) is not None
    )
