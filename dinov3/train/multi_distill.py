"""Several students of one frozen teacher in one run (paper §5.2): the teacher's forward pass, the expensive part, is shared.

    torchrun --nproc-per-node 8 dinov3/train/train.py --multi-distillation --config-file … --output-dir OUT …

World of N ranks; student s has n_s of them, in proportion to its size, so that all take equally long. Every rank loads
ceil(G/N) images and runs the teacher, sharded over all ranks, on these. Then images and the teacher's outputs
are gathered and redistributed: each student sees the whole batch G, G/n_s images a rank. What travels of the teacher are
the unit vectors before the prototypes (hundreds of numbers), and the prototypes are applied where they are needed.

Losses, optimiser, average, checkpoints and metrics are each student's own, in <OUT>/<name>. All students stop and
resume together, from the newest iteration that all of them have saved.

Left out: Gram anchoring, and KoLeo with neighbours on other ranks (the configuration rejects them).
Legend: G images of a step, L loaded by a rank, b = G/n_s of a student's rank, P patches, w width of a bottleneck.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3 import distributed, losses
from dinov3.config.loading import dump, report
from dinov3.config.train import TrainConfig, check_scale, load_config, load_student
from dinov3.data.crops import CropBatch
from dinov3.distributed import Group
from dinov3.errors import DinoError
from dinov3.optim import StepValues
from dinov3.runlog import RunDir
from dinov3.train.assembly import assemble, deterministic, setup
from dinov3.train.loop import Outcome, archive, loop
from dinov3.train.method import SelfDistillation, Targets


def redistributed(x: Tensor, global_batch: int, group: Group, axis: int = 0) -> Tensor:
    """All ranks' images (along `axis`, L each) in rank order, the first G of them, this rank's share in its group.

    [.., L, ..] → [.., G/n, ..]. A student's ranks together hold all G images, whatever the sizes of the groups.
    """
    gathered = distributed.all_gather(x.movedim(axis, 0).contiguous(), equal=True)[:global_batch]
    n = distributed.world(group)
    if len(gathered) < global_batch or global_batch % n:
        raise DinoError(f"{len(gathered)} images were loaded for a global batch of {global_batch}, for {n} ranks")
    return gathered.chunk(n)[distributed.rank(group)].movedim(0, axis)


@dataclass
class RedistributedBatch(CropBatch):
    """What a rank's student sees (masks included), and the images that this rank loaded, for the teacher."""

    loaded: CropBatch | None = None


class MultiDistillation(SelfDistillation):
    """One of the students; each rank has the one it trains. The teacher is all students'."""

    def __init__(self, *args: Any, global_batch: int, **options: Any) -> None:
        super().__init__(*args, **options)
        if not self.distilling:
            raise DinoError("several students need a frozen teacher (distillation.enabled)")
        self.global_batch = global_batch

    def receive(self, batch: CropBatch, dtype: torch.dtype) -> CropBatch:
        """Crops of other ranks' images for this rank's student; the masks were made for them already. They travel as they
        were loaded, as bytes."""
        L, device = batch.batch_size, batch.global_crops.device

        def share(crops: Tensor) -> Tensor:
            return redistributed(crops.unflatten(0, (-1, L)), self.global_batch, self.group, axis=1).flatten(0, 1)

        received = replace(batch, global_crops=share(batch.global_crops), local_crops=share(batch.local_crops))
        received = received.to(device, dtype)
        return RedistributedBatch(**vars(received), loaded=batch.to(device, dtype))

    @torch.no_grad()
    def targets(self, batch: CropBatch, values: StepValues) -> Targets:
        assert isinstance(batch, RedistributedBatch)
        assert batch.loaded is not None
        L, G, T = batch.loaded.batch_size, self.global_batch, values.teacher_temp
        out = self.teacher.backbone(self._seen_by_teacher(batch.loaded.global_crops), is_training=True)
        cls, patches = out["x_norm_clstoken"], out["x_norm_patchtokens"]  # [2L, D], [2L, P, D]
        self._check_grid("teacher", patches, batch.masks)
        dino_head, ibot_head = self.teacher.dino_head, self.teacher.ibot_head
        unit = dino_head(cls, part="bottleneck").unflatten(0, (2, L))  # [2, L, w]
        unit = redistributed(unit, G, self.group, axis=1).flatten(0, 1)  # [2b, w]
        dino = losses.sinkhorn_knopp(dino_head(unit, part="prototypes"), T, group=self.group)
        unit = ibot_head(patches, part="bottleneck").unflatten(0, (2, L))  # [2, L, P, w]
        unit = redistributed(unit, G, self.group, axis=1).flatten(0, 2)  # [2b·P, w]
        compared = unit.index_select(0, self._compared(batch))
        ibot = losses.sinkhorn_knopp(ibot_head(compared, part="prototypes"), T, group=self.group)
        return Targets(dino.unflatten(0, (2, batch.batch_size)), ibot, None)


def train_students(
    file: str | os.PathLike[str],
    overrides: Sequence[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = True,
    seed: int = 0,
) -> Outcome:
    """Trains this rank's student, together with the ranks of all others; how its part ended."""
    overrides = [*overrides, f"train.output_dir={Path(out).absolute()}"]
    shared, notes = load_config(file, overrides)
    device = setup(shared)
    world = distributed.world()
    check_scale(shared, world)
    if not shared.multidistillation.enabled:
        raise DinoError(f"{file} names no students (multidistillation.students); leave --multi-distillation out")
    student, config, own_notes = load_student(shared, distributed.rank(), world, file, overrides)
    check_alike(student.name, config)
    group = distributed.subgroup([range(*s.ranks_range) for s in shared.multidistillation.students])
    run = RunDir(config.train.output_dir, writer=distributed.rank(group) == 0)
    G = config.multidistillation.global_batch_size
    assert G is not None
    with run.claimed(), deterministic(config.run.deterministic):
        if not resume:
            archive(run, group)
        trainer = assemble(
            config,
            run,
            device,
            seed=seed,
            base_dir=Path(file).parent,
            group=group,
            method=MultiDistillation,
            global_batch=G,
        )
        first = trainer.resume(common_iteration([it for it, _ in trainer.checkpoints.all()])) if resume else 0
        run.start(config, iteration=first, sinks=config.run.sinks)
        if run.writer:
            dump(config, run.path / "config.yaml")
        for note in [f"student {student.name}, ranks {list(student.ranks_range)}", *notes, *own_notes, *trainer.notes]:
            run.log(f"note: {note}")
        try:
            return loop(trainer, first)
        finally:
            run.close()


def check_alike(name: str, config: TrainConfig) -> None:
    """Students see the same images in the same steps: what shapes these must not differ between their files."""
    keys = ["optim.epochs", "optim.iterations", "optim.accumulation_steps", "train.OFFICIAL_EPOCH_LENGTH"]
    keys += ["train.dataset_path", "train.seed", "student.patch_size"]
    keys += [f"crops.{f.name}" for f in fields(config.crops) if f.name != "teacher_to_student_resolution_scale"]
    own = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in keys}
    students = dict(distributed.gather_objects((name, own)))
    wrong = []
    for key in keys:
        values = {student: values[key] for student, values in students.items()}
        if any(value != own[key] for value in values.values()):
            wrong.append(f"{key}: {', '.join(f'{value} for {student}' for student, value in values.items())}")
    if wrong:
        raise DinoError(report([f"{line}; set it in the shared file only" for line in wrong]))


def common_iteration(own: list[int]) -> int | None:
    """The newest iteration of which all students have a checkpoint: a crash may fall between two students' saves."""
    saved = distributed.gather_objects(own)
    common = set(saved[0]).intersection(*saved[1:])
    return max(common, default=None)
