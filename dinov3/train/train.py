"""Self-supervised training (paper §3, §4): one loop for all stages, on a CPU, on one GPU, on many machines.

    python dinov3/train/train.py --config-file FILE --output-dir OUT [key.sub=value …]
    torchrun --nproc-per-node 8 dinov3/train/train.py …             # the same, sharded
    python -m dinov3.run.submit dinov3/train/train.py --nodes 4 …   # the same, on a cluster

Pre-training, Gram anchoring and high resolution are one loop with three configurations. The same command continues a run
that ended, for whatever reason: everything is in `<OUT>/ckpt`. A signal (Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2) or the time
limit ends it after the current iteration, with a checkpoint. A step whose loss or gradient is not finite is left out, and
after three in a row the run stops; neither it nor any other NaN reaches a checkpoint.

Left out: what is learned (`method`), how models are spread over devices (`dinov3.parallel`).
"""

from __future__ import annotations

import sys

if __package__ in (None, ""):  # run as a file: import the package it lies in, and nothing that lies beside it
    from pathlib import Path as _Path

    sys.path[0] = str(_Path(__file__).resolve().parents[2])

import argparse
import contextlib
import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3 import checkpoint, distributed
from dinov3.checkpoint import Checkpoints
from dinov3.config import TrainConfig, check_scale, load_config, load_teacher, resolutions, vit_config
from dinov3.data.crops import CropRules
from dinov3.data.datasets import make_dataset
from dinov3.data.loaders import CropLoader
from dinov3.data.masking import MaskRules
from dinov3.distributed import Group
from dinov3.errors import DinoError, did_you_mean
from dinov3.models.fp8 import convert_to_fp8
from dinov3.optim import StepValues, apply_schedules, build_optimizer, build_schedules, clip_per_module
from dinov3.parallel import DTYPES, parallelize, precision, reduce_gradients
from dinov3.runlog import Progress, RunDir, plot
from dinov3.train import teacher_files
from dinov3.train.knn import knn
from dinov3.train.method import Network, SelfDistillation, build_network, copy_weights, gram_active

MAX_BAD_STEPS = 3  # in a row


@dataclass
class Outcome:
    """How a call of `train` ended."""

    iterations: int  # finished, of all starts of this run
    total: int
    reason: str  # "finished", or what asked it to stop
    signal: int | None = None
    checkpoint: Path | None = None
    skipped_steps: int = 0  # of this start
    knn: dict[int, float] = field(default_factory=dict)  # iteration → accuracy, of this start

    @property
    def finished(self) -> bool:
        return self.iterations >= self.total


# ---- the loop -------------------------------------------------------------------------------------------------------


def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = True,
    seed: int = 0,
    notes: Sequence[str] = (),
    near: Path | None = None,
) -> Outcome:
    """Trains in the folder `out`, from its newest checkpoint if there is one and `resume`; alone, or with the other ranks.

    `seed`: of weights, and (plus the rank) of random draws in the network; the order of the pictures is
    `config.train.seed`. `notes`: lines for the log. `near`: the folder that relative paths in the configuration refer to.
    """
    device = distributed.setup(None if config.run.device == "auto" else config.run.device)
    check_scale(config, distributed.world())
    config = replace(config, train=replace(config.train, output_dir=str(Path(out).absolute())))
    run = RunDir(out, writer=distributed.is_main())
    if not resume:
        put_aside(run.checkpoints)
    with deterministic(config.run.deterministic):
        trainer = assemble(config, run, device, seed=seed, near=near)
        first = trainer.resume() if resume else 0
        run.start(config, iteration=first, sinks=config.run.sinks)
        for note in [*notes, *trainer.notes]:
            run.say(f"note: {note}")
        try:
            return loop(trainer, first)
        finally:
            run.close()


def loop(trainer: Trainer, first: int) -> Outcome:
    """Read data, compute terms, step, average, tell."""
    t, c, run = trainer, trainer.config, trainer.run
    method, total = t.method, t.schedules.total
    outcome = Outcome(first, total, "finished", checkpoint=t.checkpoints.latest())
    if first >= total:
        run.say(f"nothing to do: {first} of {total} iterations are done (optim.epochs says how many)")
        return outcome
    run.say(t.introduction(first))
    progress = Progress(
        run, total=total, images_per_step=t.global_batch, first=first, every=c.run.log_every, device=t.device
    )
    in_a_row = 0
    with StopRequest(c.run.time_limit_minutes) as stop:
        batches = iter(t.loader)
        for it in range(first, total):
            # -- what is scheduled
            values = t.schedules.at(it)
            if not gram_active(c.gram, it):
                values = replace(values, gram_loss_weight=0.0)
            apply_schedules(t.optimizer, values)
            t.optimizer.zero_grad(set_to_none=True)

            # -- data, targets, prediction, gradients; several batches when they are accumulated
            logs: list[dict[str, Tensor]] = []
            fetched = True
            for nth in range(c.optim.accumulation_steps):
                batch = t.fetch(batches, stop)
                if batch is None:
                    fetched = False
                    break
                if not logs:
                    progress.fetched()
                with precision(t.device, c.compute_precision.param_dtype, t.group):
                    batch = method.receive(batch)
                    targets = method.targets(batch, values)
                    terms = method.predict(batch, targets, values)
                reduce_gradients(method.student.parts(), nth + 1 == c.optim.accumulation_steps)
                (terms.total() / c.optim.accumulation_steps).backward()
                logs.append(terms.log())
            if not fetched:
                break  # asked to stop while waiting for data
            norms = clip_per_module(method.student.parts(), c.optim.clip_grad)

            # -- step, unless something is not finite; all ranks see the same numbers and decide alike
            log, finite, asked = t.agree(logs, norms, stop)
            if finite:
                t.optimizer.step()
                method.update_ema(values.momentum)
                if method.refresh_gram(it):
                    run.say(f"iteration {it}: the Gram teacher is now a copy of the teacher")
            in_a_row = 0 if finite else in_a_row + 1
            outcome.skipped_steps += not finite
            outcome.iterations, t.consumed = it + 1, t.loader.consumed

            # -- tell
            if finite:
                told = progress.stepped(it, values.fields(), t.fields(log, norms, values))
            else:
                told = progress.stepped(it, values.fields(), {})
                run.say(
                    f"iteration {it}: {not_finite_names(log, norms)}; no step ({in_a_row} of {MAX_BAD_STEPS} in a row)"
                )
            too_many = t.report_unreadable() if told else None
            if too_many and distributed.world() == 1:
                raise DinoError(too_many)
            stop.reason = stop.reason or too_many  # several processes: all stop, after a step more
            if in_a_row >= MAX_BAD_STEPS and t.several:
                stop.reason = "losses that are not finite"  # the other students stop with this one, after a step more
            elif in_a_row >= MAX_BAD_STEPS:
                raise DinoError(
                    f"stopped at iteration {it}: the loss or its gradient was not finite {MAX_BAD_STEPS} times in a row. "
                    f"The newest checkpoint is sound ({outcome.checkpoint or 'none yet'}). Try a lower rate (optim.lr), a "
                    "longer warm-up, smaller optim.clip_grad, or compute_precision.param_dtype=fp32"
                )

            # -- evaluate, save
            last = it + 1 == total
            if due(it, c.evaluation.eval_period_iterations) or (last and c.evaluation.eval_period_iterations > 0):
                t.dump(it)
            if t.knn_due(it, last):
                outcome.knn[it] = t.evaluate(it)
            if due(it, c.checkpointing.period) or last or asked:
                outcome.checkpoint = t.save(it)
            if asked and not last:
                break
        if outcome.iterations < total:
            outcome.reason, outcome.signal = stop.reason or "another process was asked to stop", stop.signal
            if outcome.iterations > first and not t.saved_at(outcome.iterations - 1):
                outcome.checkpoint = t.save(outcome.iterations - 1)
            run.say(
                f"stopped by {outcome.reason} after iteration {outcome.iterations - 1}; everything is in "
                f"{outcome.checkpoint or 'no checkpoint yet'}, and the same command goes on from there"
            )
    if outcome.iterations > first:
        progress.close()
    if run.writer:
        run.say(plot(run.metrics_file, run.plots / "losses.png"))
    return outcome


def put_aside(folder: Path, group: Group = None) -> None:
    """Checkpoints of a run that is begun anew, under another name: a later start must not go on from them."""
    if distributed.rank(group) == 0 and folder.is_dir() and any(folder.iterdir()):
        n = 1
        while folder.with_name(f"{folder.name}.{n}").exists():
            n += 1
        folder.rename(folder.with_name(f"{folder.name}.{n}"))
    distributed.barrier()


def due(iteration: int, period: int | None) -> bool:
    return period is not None and period > 0 and (iteration + 1) % period == 0


def not_finite_names(log: dict[str, Tensor], norms: dict[str, Tensor]) -> str:
    values = log | {f"gradient of {name}": norm for name, norm in norms.items()}
    bad = [f"{name} {float(v)}" for name, v in values.items() if not math.isfinite(float(v))]
    return ", ".join(bad) or "another process has a loss that is not finite"


# ---- assembly -------------------------------------------------------------------------------------------------------


@dataclass
class Trainer:
    """The parts of a run, put together."""

    config: TrainConfig
    run: RunDir
    device: torch.device
    method: SelfDistillation
    optimizer: torch.optim.Optimizer
    schedules: Any
    loader: CropLoader
    checkpoints: Checkpoints
    seed: int
    group: Group = None  # the ranks of this student
    several: bool = False  # whether other students run beside it
    batch: int = 0  # pictures of all ranks of this student in a batch
    notes: list[str] = field(default_factory=list)
    reported: int = 0
    consumed: int = 0  # pictures of finished iterations

    @property
    def global_batch(self) -> int:
        """Pictures in a step."""
        return self.batch * self.config.optim.accumulation_steps

    def introduction(self, first: int) -> str:
        count = sum(p.numel() for p in self.method.student.parameters())
        ranks = distributed.world(self.group)
        return (
            f"{'training' if first == 0 else f'going on at iteration {first} of'} {self.schedules.total} iterations, "
            f"{self.global_batch} of {self.loader.order.length} pictures each, on {ranks} "
            f"{'process' if ranks == 1 else 'processes'} ({self.device.type}); the student has {count / 1e6:.1f} M parameters"
        )

    # -- data

    def fetch(self, batches: Iterator[Any], stop: StopRequest) -> Any:
        """The next batch on the device; None if loading broke off because the process is being stopped."""
        try:
            batch = next(batches)
        except RuntimeError:
            if stop.reason is not None and distributed.world() == 1:  # a signal to the group reached the workers too
                return None
            raise
        return batch.to(self.device, DTYPES[self.config.compute_precision.param_dtype])

    def report_unreadable(self) -> str | None:
        """Says how many pictures could not be read and were replaced; why to stop, if they are too many."""
        count, data = self.loader.unreadable_count, self.config.data
        if count <= self.reported:
            return None
        self.reported = count
        name = list(self.loader.unreadable)[-1]
        self.run.say(f"unreadable pictures replaced by others so far: {count}; the last: {name}")
        if data.unreadable == "skip" and count <= data.max_unreadable:
            return None
        return (
            f"{count} pictures could not be read, such as {name}; data.unreadable={data.unreadable} and "
            f"data.max_unreadable={data.max_unreadable} say to stop"
        )

    # -- numbers

    def agree(
        self, logs: list[dict[str, Tensor]], norms: dict[str, Tensor], stop: StopRequest
    ) -> tuple[dict[str, Tensor], bool, bool]:
        """(terms averaged over batches and ranks, whether all is finite, whether any rank was asked to stop).

        One collective and one wait for the device in an iteration.
        """
        names = list(logs[0])
        mean = torch.stack([torch.stack([log[n].float() for n in names]) for log in logs]).mean(0)
        asked = mean.new_tensor([float(stop.requested())])
        mean, asked = distributed.all_reduce(torch.cat([mean, asked]), "mean", self.group).split([len(names), 1])
        if self.several:
            asked = distributed.all_reduce(asked, "max")  # students stop together
        finite = torch.isfinite(torch.stack([mean[0], *(n.float() for n in norms.values())])).all().float()
        ok, stopping = torch.stack([finite, asked[0]]).tolist()
        return dict(zip(names, mean.unbind())), bool(ok), stopping > 0

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
            where = folder / teacher_files.SHARDED_FOLDER
            if writer and not where.exists():
                saved.rename(where)
            distributed.barrier(self.group)
        else:
            where = teacher_files.write_teacher(ema, folder, self.config, writer=writer, iteration=iteration)
        self.run.say(f"iteration {iteration}: wrote the teacher to {where}")

    def knn_due(self, iteration: int, last: bool) -> bool:
        e = self.config.evaluation
        period = e.knn_period_iterations if e.knn_period_iterations is not None else e.eval_period_iterations
        return e.knn_train_dataset is not None and (due(iteration, period) or (last and period > 0))

    def evaluate(self, iteration: int) -> float:
        began = time.perf_counter()
        accuracy = knn(self.method.ema.backbone, self.config, self.device, self.group)
        self.run.record(iteration, {"knn_accuracy": accuracy})
        self.run.say(
            f"iteration {iteration}: k-NN accuracy of the teacher {accuracy:.1%} ({time.perf_counter() - began:.0f} s)"
        )
        return accuracy

    # -- saving and going on

    def tensors(self) -> checkpoint.Tensors:
        m = self.method
        tensors = checkpoint.module_tensors(m.student, "model.student.")
        tensors |= checkpoint.module_tensors(m.ema, "model.model_ema.")
        if m.gram_teacher is not None:
            tensors |= checkpoint.module_tensors(m.gram_teacher, "model.gram_teacher.")
        return tensors | checkpoint.optimizer_tensors(self.optimizer, m.student)

    def save(self, iteration: int) -> Path:
        state = {
            "iteration": iteration,
            "loader": {"consumed": self.consumed},
            "random": checkpoint.random_states(self.group),
        }
        began = time.perf_counter()
        path = self.checkpoints.save(iteration, self.tensors(), state)
        self.run.say(f"iteration {iteration}: saved {path} ({time.perf_counter() - began:.1f} s)")
        return path

    def saved_at(self, iteration: int) -> bool:
        latest = self.checkpoints.latest()
        return latest is not None and latest.name == str(iteration)

    def resume(self, iteration: int | None = None) -> int:
        """Takes everything from the newest checkpoint (several students: that of `iteration`, which all of them have);
        the iteration to go on with, 0 if there is none."""
        removed = self.checkpoints.clean()
        if removed:
            self.notes.append(f"removed what an interrupted save had left behind: {', '.join(removed)}")
        path = self.checkpoints.latest()
        if self.several:
            path = None if iteration is None else self.checkpoints.folder / str(iteration)
        if path is None:
            return 0
        state = checkpoint.read_state(path)
        missing = checkpoint.load(path, self.tensors(), group=self.group)
        gram = [name for name in missing if name.startswith("model.gram_teacher.")]
        if len(missing) > len(gram):
            other = next(name for name in missing if name not in set(gram))
            raise DinoError(
                f"{path} has no {other} (and {len(missing) - len(gram) - 1} more): it was made by another configuration; "
                "use that one, or another --output-dir"
            )
        if gram and not self.config.gram.ckpt and self.method.gram_teacher is not None:
            copy_weights(self.method.gram_teacher.backbone, self.method.teacher.backbone)
            self.notes.append(f"{path} has no Gram teacher: it begins as a copy of the teacher")
        self.loader.load_state_dict(state["loader"])
        self.consumed = self.loader.consumed
        first = int(state["iteration"]) + 1
        if not checkpoint.restore_random_states(state["random"], self.group):
            seed_everything(self.seed + distributed.rank() + 1_000_003 * first)
            self.notes.append(
                f"{path} was saved by {len(state['random'])} processes and {distributed.world(self.group)} go on: the "
                "pictures are the same, random draws inside the network begin anew"
            )
        return first


def assemble(
    config: TrainConfig,
    run: RunDir,
    device: torch.device,
    *,
    seed: int = 0,
    near: Path | None = None,
    group: Group = None,
    several: bool = False,
    global_batch: int | None = None,
) -> Trainer:
    """From a configuration to the parts of a run.

    `several`: one of several students, trained by `group` on `global_batch` pictures, which all ranks load together.
    """
    notes: list[str] = []
    rank, world = distributed.rank(), distributed.world()
    options: dict[str, Any] = {}
    if several:
        from dinov3.train.multi_distill import MultiDistillation  # it is built on this file

        assert global_batch is not None
        loader = build_loader(
            config,
            device,
            rank,
            world,
            batch_size=-(-global_batch // world),
            masked_pictures=global_batch // distributed.world(group),
        )
        options = {"cls": MultiDistillation, "global_batch": global_batch}
    else:
        loader = build_loader(config, device, rank, world)
    method = build_method(config, device, seed=seed, near=near, notes=notes, group=group, **options)
    seed_everything(seed + rank)
    if device.type == "cuda" and not config.run.deterministic:
        torch.backends.cuda.matmul.allow_tf32 = True
    return Trainer(
        config=config,
        run=run,
        device=device,
        method=method,
        optimizer=build_optimizer(method.student.parts(), config.optim),
        schedules=build_schedules(config, world),
        loader=loader,
        checkpoints=Checkpoints(
            run.checkpoints,
            max_to_keep=config.checkpointing.max_to_keep,
            keep_every=config.checkpointing.keep_every,
            group=group,
        ),
        seed=seed,
        group=group,
        several=several,
        batch=global_batch or loader.global_batch,
        notes=notes,
    )


def build_loader(
    config: TrainConfig,
    device: torch.device,
    rank: int,
    world: int,
    *,
    batch_size: int | None = None,
    masked_pictures: int | None = None,
) -> CropLoader:
    """Pictures, crops and masks as `train`, `crops`, `ibot` and `data` say."""
    c = config.crops
    assert config.train.dataset_path is not None
    shared = {
        "local_count": c.local_crops_number,
        "global_scale": tuple(c.global_crops_scale),
        "local_scale": tuple(c.local_crops_scale),
        "gram_distorted": not c.gram_teacher_no_distortions,
        "share_color_jitter": c.share_color_jitter,
        "local_from_global": c.localcrops_subset_of_globalcrops,
        "horizontal_flips": c.horizontal_flips,
        "blur": c.blur_probabilities,
        "mean": tuple(c.rgb_mean),
        "std": tuple(c.rgb_std),
    }
    with_gram = config.gram.use_loss and not config.gram.ema_teacher  # Gram crops that nobody looks at are not made
    rows = resolutions(c)
    rules = [
        CropRules(
            global_size=row.global_px,
            local_size=row.local_px,
            gram_size=row.gram_px if with_gram else None,
            **shared,  # type: ignore[arg-type]
        )
        for row in rows
    ]
    return CropLoader(
        make_dataset(config.train.dataset_path),
        rules,
        MaskRules(
            config.ibot.mask_sample_probability,
            config.ibot.mask_ratio_min_max,
            circular_shift=config.ibot.mask_random_circular_shift,
        ),
        patch=config.student.patch_size,
        mask_scale=c.teacher_to_student_resolution_scale,
        batch_size=batch_size or config.train.batch_size_per_gpu,
        ratios=[row.ratio for row in rows],
        seed=config.train.seed,
        rank=rank,
        world=world,
        workers=config.train.num_workers,
        prefetch=config.data.prefetch_factor,
        pin_memory=device.type == "cuda",
        masked_pictures=masked_pictures,
    )


def build_method(
    config: TrainConfig,
    device: torch.device,
    *,
    seed: int,
    near: Path | None,
    notes: list[str],
    group: Group = None,
    cls: type[SelfDistillation] = SelfDistillation,
    **more: Any,
) -> SelfDistillation:
    """The networks, with their first weights, spread over `group`.

    Order: the student is drawn (the same on all ranks) or read; the average is a copy of it; the Gram teacher is read, or
    begins as the average; a frozen teacher is read. Weights are whole until they are sharded, one network after another.
    """
    c = config
    seed_everything(seed)

    def network(
        source: str | None, described: TrainConfig, *, heads: bool = True, needs_heads: bool = False
    ) -> Network:
        with torch.device(device):
            made = build_network(described, heads=heads)
        if described.student.fp8_enabled:
            convert_to_fp8(made.backbone, described.student.fp8_filter)
        made.init_weights()
        if source:
            found = teacher_files.read_network(source)
            if needs_heads:
                teacher_files.frozen_teacher_needs_heads(found)
            notes.extend(teacher_files.fill(made, found, vit_config(described.student)))
        return made

    def spread(made: Network, *, trained: bool = False, over: Group = group) -> Network:
        checkpointing = "full" if c.train.checkpointing_full else "selective" if c.train.checkpointing else "none"
        parallelize(
            made.parts(),
            device=device,
            trained=trained,
            group=over,
            checkpointing=checkpointing,
            compile=c.train.compile,
            cudagraphs=c.train.cudagraphs,
            param_dtype=c.compute_precision.param_dtype,
            reduce_dtype=c.compute_precision.reduce_dtype,
        )
        return made

    student = spread(network(c.student.resume_from_teacher_chkpt, c), trained=True)
    ema = spread(network(None, c))
    copy_weights(ema, student)
    gram_teacher = teacher = None
    if c.gram.use_loss and not c.gram.ema_teacher:
        gram_teacher = spread(network(c.gram.ckpt, c, heads=False))
        if not c.gram.ckpt:
            copy_weights(gram_teacher.backbone, ema.backbone)
    if c.distillation.enabled:
        described = load_teacher(c, near=near)
        source = c.distillation.checkpoint_path
        teacher = spread(
            network(None if source == "ignore" else source, described, needs_heads=True),
            over=None,  # all ranks, also those that train other students
        )
        if source == "ignore":
            notes.append("distillation.checkpoint_path is 'ignore': the teacher has random weights, which is for tests")
    return cls(
        student,
        ema,
        dino=c.dino,
        ibot=c.ibot,
        gram=c.gram,
        teacher=teacher,
        gram_teacher=gram_teacher,
        teacher_scale=c.crops.teacher_to_student_resolution_scale,
        group=group,
        **more,
    )


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


# ---- being asked to stop --------------------------------------------------------------------------------------------


class StopRequest:
    """Remembers a signal, or that the time is up, until the iteration is over. A second Ctrl-C does not wait."""

    SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")

    def __init__(self, limit_minutes: float | None = None) -> None:
        self.until = None if limit_minutes is None else time.monotonic() + 60 * limit_minutes
        self.reason: str | None = None
        self.signal: int | None = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow it
            for name in self.SIGNALS:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self.before[number] = signal.signal(number, self._signalled)
        return self

    def _signalled(self, number: int, _frame: Any) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal, self.reason = number, signal.Signals(number).name
        # a signal to the whole process group ends the data workers too; their death must not tear the step apart
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def requested(self) -> bool:
        if self.reason is None and self.until is not None and time.monotonic() > self.until:
            self.reason = "the time limit (run.time_limit_minutes)"
        return self.reason is not None

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        # whoever waited for the signal before us hears of it now that all is saved: SLURM's launcher queues the job again
        if self.signal not in (None, signal.SIGINT) and callable(self.before.get(signal.Signals(self.signal))):
            signal.raise_signal(self.signal)


# ---- the command ----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Options and key=value words in any order; a misspelt option is met with a proposal."""

    def error(self, message: str) -> Any:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        known = [o for action in self._actions for o in action.option_strings]
        if message.startswith("unrecognized") and unknown:
            message = f"unknown option {unknown[0]}{did_you_mean(unknown[0].split('=')[0], known)}"
        super().error(message)


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="train.py", description="Self-supervised training of DINOv3 models.")
    p.add_argument(
        "--config-file", required=True, help="a YAML file, or the name of one of the recipes that come along"
    )
    p.add_argument("--output-dir", default="./local_dino", help="where everything goes; an existing run is continued")
    p.add_argument("--no-resume", action="store_true", help="begin anew even if there are checkpoints")
    p.add_argument("--seed", type=int, default=0, help="of weights and random draws (the data's is train.seed)")
    p.add_argument("--multi-distillation", action="store_true", help="several students of one teacher at once")
    p.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over the file's")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0 finished or stopped on request, 1 for an error, which is one sentence."""
    options = parser().parse_intermixed_args(None if argv is None else list(argv))
    try:
        run_command(options)
    except (
        DinoError
    ) as error:  # the group is not left in order: others may be waiting in it, and are ended from outside
        who = "" if distributed.is_main() else f"[rank {distributed.rank()}] "
        print(f"{who}{error}", file=sys.stderr)
        return 1
    distributed.shutdown()
    return 0


def run_command(options: argparse.Namespace) -> Outcome:
    overrides = list(options.overrides)
    config, notes = load_config(options.config_file, overrides)
    near = Path(options.config_file).parent
    resume, seed = not options.no_resume, options.seed
    if options.multi_distillation or config.multidistillation.enabled:
        from dinov3.train.multi_distill import train_students

        return train_students(options.config_file, overrides, options.output_dir, resume=resume, seed=seed)
    return train(config, options.output_dir, resume=resume, seed=seed, notes=notes, near=near)


if __name__ == "__main__":
    sys.exit(main())
