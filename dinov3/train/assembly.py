"""From a configuration to the parts of a run: networks with their first weights, data, optimiser, checkpoints."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov3 import checkpoint, distributed
from dinov3.checkpoint import Checkpoints
from dinov3.config.train import TrainConfig, load_teacher, resolutions, vit_config
from dinov3.data.crops import CropConfig, MaskConfig
from dinov3.data.datasets import make_dataset
from dinov3.data.loading import CropLoader
from dinov3.distributed import Group
from dinov3.errors import DinoError
from dinov3.models.low_precision import convert_to_fp8
from dinov3.optim import AdamW, StepValues, build_optimizer, build_schedules
from dinov3.parallel import parallelize, reshard
from dinov3.runlog import RunDir, StopRequest
from dinov3.train import teacher_files
from dinov3.train.doctor import Doctor
from dinov3.train.guard import START, Guard
from dinov3.train.guides import build_guides
from dinov3.train.method import Network, SelfDistillation, build_network, copy_weights
from dinov3.train.monitor import knn, labelled_images


class Verdict:
    """An iteration's numbers, on the device, and two flags that are on their way to the host."""

    def __init__(self, iteration: int, log: dict[str, Tensor], norms: dict[str, Tensor], bad: Tensor, stop: Tensor):
        """log: terms averaged over batches and ranks; norms: of the gradients; bad: 1 where one of them is not finite;
        stop: above 0 where a rank requests a stop."""
        self.iteration, self.log, self.norms, self.bad = iteration, log, norms, bad
        self.flags, self.arrived = torch.stack([bad, stop]), None
        if bad.is_cuda:
            host = torch.empty(2, pin_memory=True)
            self.flags = host.copy_(self.flags, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> tuple[bool, bool]:
        """(whether all was finite, whether a stop was requested); an iteration later nobody waits for it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        bad, stop = self.flags.tolist()
        return bad == 0, stop > 0


@dataclass
class Trainer:
    """The parts of a run, put together."""

    config: TrainConfig
    run: RunDir
    device: torch.device
    method: SelfDistillation
    optimizer: AdamW
    schedules: Any
    loader: CropLoader
    checkpoints: Checkpoints
    doctor: Doctor
    seed: int
    group: Group = None  # the ranks of this student
    multi_student: bool = False  # other students are trained beside it
    batch: int = 0  # images of all ranks of this student in a batch
    notes: list[str] = field(default_factory=list)
    reported: int = 0
    consumed: int = 0  # images of finished iterations
    guard: Guard | None = None

    @property
    def global_batch(self) -> int:
        """Images in a step."""
        return self.batch * self.config.optim.accumulation_steps

    def introduction(self, first: int) -> str:
        count = sum(p.numel() for p in self.method.student.parameters())
        ranks = distributed.world(self.group)
        return (
            f"{'training' if first == 0 else f'resuming at iteration {first} of'} {self.schedules.total} iterations, "
            f"{self.global_batch} of {self.loader.order.length} images each, on {ranks} "
            f"{'process' if ranks == 1 else 'processes'} ({self.device.type}); the student has {count / 1e6:.1f} M parameters"
        )

    # -- data

    def fetch(self, batches: Iterator[Any], stop: StopRequest) -> Any:
        """The next batch; None if loading broke off because the process is being stopped."""
        try:
            return next(batches)
        except RuntimeError:
            if stop.reason is not None and distributed.world() == 1:  # a signal to the group reached the workers too
                return None
            raise

    def report_unreadable(self) -> str | None:
        """Logs how many images could not be read and were replaced; the error message if they are too many, else None.

        Each counts once, however many passes meet it.
        """
        count, data = len(self.loader.unreadable), self.config.data
        if count <= self.reported:
            return None
        self.reported = count
        name = list(self.loader.unreadable)[-1]
        self.run.log(f"unreadable images replaced by others so far: {count}; the last: {name}")
        if data.unreadable == "skip" and count <= data.max_unreadable:
            return None
        return (
            f"{count} images could not be read, such as {name}; data.unreadable={data.unreadable} and "
            f"data.max_unreadable={data.max_unreadable} require a stop"
        )

    # -- numbers

    def agree(
        self, iteration: int, logs: list[dict[str, Tensor]], norms: dict[str, Tensor], stop: StopRequest
    ) -> Verdict:
        """What all ranks find out about an iteration: one collective, and no wait for the device."""
        names = list(logs[0])
        mean = torch.stack([torch.stack([log[n].float() for n in names]) for log in logs]).mean(0)
        stopping = torch.full_like(mean[:1], float(stop.requested()))
        mean, stopping = distributed.all_reduce(torch.cat([mean, stopping]), "mean", self.group).split([len(names), 1])
        if self.multi_student:
            stopping = distributed.all_reduce(stopping, "max")  # students stop together
        finite = torch.isfinite(torch.stack([mean[0], *(n.float() for n in norms.values())])).all()
        return Verdict(iteration, dict(zip(names, mean.unbind())), norms, 1 - finite.float(), stopping[0])

    def fields(self, log: dict[str, Tensor], norms: dict[str, Tensor], values: StepValues) -> dict[str, Any]:
        """A step's numbers under the names, and in the order, of the reference's metrics file."""
        numbers: dict[str, Any] = {"total_loss": log["total_loss"]}
        numbers["local_batch_size"] = self.global_batch // distributed.world(self.group)
        numbers["global_batch_size"] = self.global_batch
        for name, value in log.items():
            if name == "gram_loss":
                numbers["gram_loss_weight"] = values.gram_loss_weight
            numbers[name] = value
            if name == "dino_local_crops_loss":
                numbers["dino_local_loss_weight"] = values.local_loss_weight
        return numbers | {f"{name}_grad_norm": norm for name, norm in norms.items()}

    # -- evaluation

    def dump(self, iteration: int) -> None:
        folder = self.run.evaluations / f"training_{iteration}"
        ema, writer = self.method.ema, distributed.rank(self.group) == 0
        if self.config.train.sharded_eval_checkpoint and distributed.world(self.group) > 1:
            tensors = checkpoint.module_tensors(ema, "model.")
            saved = Checkpoints(folder, group=self.group).save(
                iteration, tensors, {"iteration": f"training_{iteration}"}
            )
            where = teacher_files.adopt_sharded(saved) if writer else folder / teacher_files.SHARDED_FOLDER
            distributed.barrier(self.group)
        else:
            where = teacher_files.write_teacher(ema, folder, self.config, writer=writer, iteration=iteration)
        self.run.log(f"iteration {iteration}: wrote the teacher to {where}")

    def knn_due(self, iteration: int, last: bool) -> bool:
        e = self.config.evaluation
        period = e.knn_period_iterations if e.knn_period_iterations is not None else e.eval_period_iterations
        return e.knn_train_dataset is not None and (due(iteration, period) or (last and period > 0))

    def evaluate(self, iteration: int) -> float:
        began = time.perf_counter()
        accuracy, unreadable = knn(self.method.ema.backbone, self.config, self.device, self.group)
        self.run.record(iteration, {"knn_accuracy": accuracy})
        self.run.log(
            f"iteration {iteration}: k-NN accuracy of the teacher {accuracy:.1%} ({time.perf_counter() - began:.0f} s)"
        )
        if unreadable:
            self.run.log(f"k-NN left out {len(unreadable)} images that cannot be read, such as {unreadable[0]}")
        return accuracy

    # -- saving and resuming

    def tensors(self) -> checkpoint.Tensors:
        m = self.method
        tensors = checkpoint.module_tensors(m.student, "model.student.")
        tensors |= checkpoint.module_tensors(m.ema, "model.model_ema.")
        if m.gram_teacher is not None:
            tensors |= checkpoint.module_tensors(m.gram_teacher, "model.gram_teacher.")
        if self.guard is not None:
            tensors |= self.guard.tensors()
        if m.guides is not None:
            tensors |= checkpoint.module_tensors(m.guides.centroids, "model.guide_centroids.")
            tensors |= checkpoint.module_tensors(m.guides.ridges, "model.guide_ridges.")
        return tensors | checkpoint.optimizer_tensors(self.optimizer, m.student)

    def save(self, iteration: int, *, wait: bool = True) -> Path:
        state = {
            "iteration": iteration,
            "loader": {"consumed": self.consumed},
            "random": checkpoint.random_states(self.group),
        }
        began, checkpoints, number = time.perf_counter(), self.checkpoints, iteration
        if self.guard is not None:
            state["guard"] = self.guard.saved()
            checkpoints.finish()
            checkpoints.protected = self.guard.state.good
            if iteration == START:  # not one to resume from: a run that has not begun begins
                checkpoints, number = Checkpoints(self.run.checkpoints / "start", group=self.group), 0
        path = checkpoints.save(number, self.tensors(), state, wait=wait)
        what = "saved" if wait else "saving"  # in the background
        when = "before the first iteration" if iteration == START else f"iteration {iteration}"
        self.run.log(f"{when}: {what} {path} ({time.perf_counter() - began:.1f} s)")
        return path

    def begin_guard(self, first: int) -> None:
        """Measures the start, unless an earlier start of this run has; what the run begins with is the first good state."""
        guard = self.guard
        if guard is None or guard.state.start:
            return
        began = time.perf_counter()
        start = guard.begin(self.method.ema.backbone)
        guard.state.good = first - 1
        guard.seconds = time.perf_counter() - began
        self.run.log(
            f"guard: the start has {guard.words(start)}; measured in {guard.seconds:.1f} s, as is every "
            f"teacher that is written (evaluation.eval_period_iterations={self.config.evaluation.eval_period_iterations})"
        )
        if first == 0:
            self.save(START)

    def restore(self) -> Path:
        """Networks, optimiser and average become those of the last good state; where it was read from."""
        assert self.guard is not None
        self.checkpoints.finish()
        good, folder = self.guard.state.good, self.run.checkpoints
        path = folder / "start" / "0" if good == START else folder / str(good)
        self.read(path)
        return path

    def saved_at(self, iteration: int) -> bool:
        latest = self.checkpoints.latest()
        return latest is not None and latest.name == str(iteration)

    def resume(self, iteration: int | None = None) -> int:
        """Takes everything from the newest checkpoint (several students: that of `iteration`, which all of them have);
        the iteration to resume with, 0 if there is none."""
        removed = self.checkpoints.clean()
        if removed:
            self.notes.append(f"removed what an interrupted save had left behind: {', '.join(removed)}")
        if not self.multi_student:
            read = self.checkpoints.resume(self.read, self.notes.append)
        elif iteration is None:
            read = None
        else:
            path = self.checkpoints.folder / str(iteration)
            try:
                read = self.read(path)
            except checkpoint.Damaged as error:
                raise DinoError(f"{error}; rename {path}, and all students resume from an older checkpoint") from None
        if read is None:
            return 0
        path, state, gram = read
        if self.guard is not None and "guard" in state:
            self.guard.load(state["guard"])
            self.checkpoints.protected = self.guard.state.good
        if gram and not self.config.gram.ckpt and self.method.gram_teacher is not None:
            copy_weights(self.method.gram_teacher.backbone, self.method.teacher.backbone)
            self.notes.append(f"{path} has no Gram teacher: it begins as a copy of the teacher")
        self.loader.load_state_dict(state["loader"])
        self.consumed = self.loader.consumed
        first = int(state["iteration"]) + 1
        if not checkpoint.restore_random_states(state["random"], self.group):
            seed_everything(self.seed + distributed.rank() + 1_000_003 * first)
            self.notes.append(
                f"{path} was saved by {len(state['random'])} processes and {distributed.world(self.group)} resume: the "
                "images are the same, random draws inside the network start afresh"
            )
        return first

    def read(self, path: Path) -> tuple[Path, dict[str, Any], list[str]]:
        """Fills the networks and the optimiser from a checkpoint; (path, its state, names of the Gram teacher it lacks)."""
        tensors = self.tensors()
        if self.method.shares_backbone:  # the student's, whatever a run that averaged it has saved
            # what k-NN gathered, which nothing gave back yet, would hide what is loaded
            reshard(dict(self.method.student.named_modules()))
            tensors = {n: x for n, x in tensors.items() if not n.startswith("model.model_ema.backbone.")}
        missing = checkpoint.load(path, tensors, group=self.group)
        state = checkpoint.read_state(path, "iteration", "loader", "random")
        gram = [name for name in missing if name.startswith("model.gram_teacher.")]
        # a guard that is new measures a start
        others = [name for name in missing if name not in {*gram, "guard.cosines"}]
        if others:
            raise DinoError(
                f"{path} has no {others[0]} (and {len(others) - 1} more): it was made by another configuration; "
                "use that one, or another --output-dir"
            )
        return path, state, gram


def setup(config: TrainConfig) -> torch.device:
    """The device of this process, once it has joined the others."""
    r = config.run
    return distributed.setup(None if r.device == "auto" else r.device, timedelta(minutes=r.collective_timeout_minutes))


def assemble(
    config: TrainConfig,
    run: RunDir,
    device: torch.device,
    *,
    seed: int = 0,
    base_dir: Path | None = None,
    group: Group = None,
    method: type[SelfDistillation] = SelfDistillation,
    global_batch: int | None = None,
) -> Trainer:
    """From a configuration to the parts of a run.

    `global_batch`: one of several students, trained by `group` on that many images, which all ranks load together.
    """
    notes: list[str] = []
    rank, world = distributed.rank(), distributed.world()
    shares: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if global_batch is not None:
        shares = {"batch_size": -(-global_batch // world), "masked_images": global_batch // distributed.world(group)}
        options = {"global_batch": global_batch}
    loader = build_loader(config, device, rank, world, **shares)
    if loader.order.length < loader.global_batch:
        notes.append(
            f"{loader.order.length} images are fewer than a batch of {loader.global_batch}: each is in it several times, and "
            "losses that compare images mean little; give more images, or a smaller train.batch_size_per_gpu"
        )
    for source in (config.evaluation.knn_train_dataset, config.evaluation.knn_val_dataset):
        if source is not None:
            labelled_images(source, config.evaluation.knn_max_images)  # a mistake is found now, not hours later
    seed_everything(seed)
    guides = build_guides(config, loader.images, notes, device, group)
    heads = None if guides is None else guides.heads
    networks = build_networks(config, device, seed=seed, base_dir=base_dir, notes=notes, group=group, heads=heads)
    learner = method(
        **networks, dino=config.dino, ibot=config.ibot, gram=config.gram, group=group, guides=guides,
        teacher_scale=config.crops.teacher_to_student_resolution_scale, **options,
    )  # fmt: skip
    guard = None
    if config.guard.enabled:
        guard = Guard(config, make_dataset(config.train.dataset_path or ""), learner.ema.backbone, device, group)
    seed_everything(seed + rank)
    return Trainer(
        config=config,
        run=run,
        device=device,
        method=learner,
        optimizer=build_optimizer(learner.student.parts(), config.optim),
        schedules=build_schedules(config, world),
        loader=loader,
        checkpoints=Checkpoints(
            run.checkpoints,
            max_to_keep=config.checkpointing.max_to_keep,
            keep_every=config.checkpointing.keep_every,
            group=group,
        ),
        doctor=Doctor(config, run, loader, learner, device),
        seed=seed,
        group=group,
        multi_student=global_batch is not None,
        batch=global_batch or loader.global_batch,
        notes=notes,
        guard=guard,
    )


def build_loader(
    config: TrainConfig,
    device: torch.device,
    rank: int,
    world: int,
    *,
    batch_size: int | None = None,
    masked_images: int | None = None,
) -> CropLoader:
    """Images, crops and masks from the sections `train`, `crops`, `ibot` and `data`."""
    c = config.crops
    assert config.train.dataset_path is not None
    shared = {
        "local_count": c.local_crops_number,
        "global_scale": tuple(c.global_crops_scale),
        "local_scale": tuple(c.local_crops_scale),
        "gram_distorted": not c.gram_teacher_no_distortions,
        "share_color_jitter": c.share_color_jitter,
        "color_jitter_strength": c.color_jitter_strength,
        "local_from_global": c.localcrops_subset_of_globalcrops,
        "horizontal_flips": c.horizontal_flips,
        "blur": c.blur_probabilities,
        "blur_sigma": tuple(c.blur_sigma),
        "mean": tuple(c.rgb_mean),
        "std": tuple(c.rgb_std),
    }
    with_gram = config.gram.use_loss and not config.gram.ema_teacher  # unused Gram crops are not made
    configs = [
        CropConfig(
            global_size=row.global_px,
            local_size=row.local_px,
            gram_size=row.gram_px if with_gram else None,
            ratio=row.ratio,
            **shared,  # type: ignore[arg-type]
        )
        for row in resolutions(c)
    ]
    return CropLoader(
        make_dataset(config.train.dataset_path),
        configs,
        MaskConfig(
            config.ibot.mask_sample_probability,
            config.ibot.mask_ratio_min_max,
            scale=c.teacher_to_student_resolution_scale,
            circular_shift=config.ibot.mask_random_circular_shift,
        ),
        patch=config.student.patch_size,
        batch_size=batch_size or config.train.batch_size_per_gpu,
        seed=config.train.seed,
        rank=rank,
        world=world,
        workers=config.train.num_workers,
        prefetch=config.data.prefetch_factor,
        device=device,
        masked_images=masked_images,
    )


def build_networks(
    config: TrainConfig,
    device: torch.device,
    *,
    seed: int,
    base_dir: Path | None,
    notes: list[str],
    group: Group = None,
    heads: nn.Module | None = None,
) -> dict[str, Any]:
    """student, ema, gram_teacher and teacher (None where there is none), with their first weights, spread over `group`.

    Order: the student is drawn (the same on all ranks) or read; the average is a copy of it (or of its heads); the Gram
    teacher is read, or begins as the average; a frozen teacher is read. Weights are whole until they are sharded.
    """
    c = config
    seed_everything(seed)

    def network(
        source: str | None, described: TrainConfig, *, heads: bool = True, needs_heads: bool = False,
        ranks: Group = group,
    ) -> Network:  # fmt: skip
        with torch.device(device):
            made = build_network(described, heads=heads)
        if described.student.fp8_enabled:
            convert_to_fp8(made.backbone, described.student.fp8_filter)
        made.init_weights()
        if source:
            notes.extend(fill(made, source, described, needs_heads=needs_heads, group=ranks))
        return made

    def spread(made: Network, *, trained: bool = False, ranks: Group = group, only: Sequence[str] = ()) -> Network:
        checkpointing = "full" if c.train.checkpointing_full else "selective" if c.train.checkpointing else "none"
        parallelize(
            {name: part for name, part in made.parts().items() if not only or name in only},
            device=device,
            trained=trained,
            group=ranks,
            checkpointing=checkpointing,
            compile=c.train.compile,
            cudagraphs=c.train.cudagraphs,
            param_dtype=c.compute_precision.param_dtype,
            reduce_dtype=c.compute_precision.reduce_dtype,
            over=c.run.shard_over,
        )
        return made

    student = network(c.student.resume_from_teacher_chkpt, c)
    if heads is not None:
        student.guides = heads
    spread(student, trained=True)
    if c.teacher.ema == "heads":
        with torch.device(device):
            ema = spread(build_network(c, backbone=student.backbone), only=teacher_files.HEADS)
    else:
        ema = spread(network(None, c))
    copy_weights(ema, student)
    ema.licence = student.licence
    gram_teacher = teacher = None
    if c.gram.use_loss and not c.gram.ema_teacher:
        gram_teacher = spread(network(c.gram.ckpt, c, heads=False))
        if not c.gram.ckpt:
            copy_weights(gram_teacher.backbone, ema.backbone)
    if c.distillation.enabled:
        described = load_teacher(c, base_dir=base_dir)
        source = c.distillation.checkpoint_path
        # all ranks, also those that train other students
        teacher = spread(
            network(None if source == "ignore" else source, described, needs_heads=True, ranks=None), ranks=None
        )
        if source == "ignore":
            notes.append("distillation.checkpoint_path is 'ignore': the teacher has random weights, which is for tests")
    if teacher is not None and gram_teacher is not None and (c.gram.rep_update or c.gram.it_load_ema_teacher >= 0):
        shapes = [[p.shape for p in network.backbone.parameters()] for network in (gram_teacher, teacher)]
        if shapes[0] != shapes[1]:
            raise DinoError(
                "the Gram teacher is refreshed from the teacher, and here that is a frozen one of another shape; set "
                "gram.rep_update=false and name a file in gram.ckpt"
            )
    return {"student": student, "ema": ema, "gram_teacher": gram_teacher, "teacher": teacher}


def fill(network: Network, source: str, config: TrainConfig, *, needs_heads: bool, group: Group) -> list[str]:
    """Puts weights into a network that is not sharded yet; notes. The first rank reads the file, of up to 27 GB, and sends
    the values to the others."""

    def read() -> list[str]:
        found = teacher_files.read_network(source)
        network.licence = found.opened.licence if found.opened is not None else ""
        return teacher_files.fill(network, found, vit_config(config.student), needs_heads=needs_heads)

    notes = distributed.once(read, group)
    distributed.broadcast([*network.parameters(), *network.buffers()], group)
    return notes


def due(iteration: int, period: int | None) -> bool:
    return period is not None and period > 0 and (iteration + 1) % period == 0


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)  # CUDA too
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """The same numbers twice on one machine; operations that cannot do that raise."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
