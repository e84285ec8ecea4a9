"""The configuration of a training run: dataclasses, YAML on top, dotted overrides on top of that, all of it strict.

    config, notes = load_config("vits16_one_gpu.yaml", ["train.dataset_path=/images", "optim.lr=3e-4"])

Keys and defaults are those of the public training code, so its files load here. Three things differ. A key nobody reads
is refused, and every mistake of every source is reported at once, with its source and a proposal. A key that the
reference reads past (RETIRED) is accepted only at the value that changes nothing, and noted as ignored; four that it
reads past by oversight work here: `student.ffn_ratio`, `student.in_chans`, `student.pos_embed_rope_dtype`,
`optim.dino_head_wd_multiplier`, and so does `student.drop_path_rate` for ConvNeXt. Conditions that are bare asserts
there are sentences here. Keys of our own are marked "ours".

Other activities bring their own dataclasses to `load`: nested dataclasses, a method `problems()` giving (key, sentence)
for each condition that does not hold, `remarks()` for what is worth saying, and a class attribute `RETIRED`.
Left out: checking that paths exist (the reader of the path does that) and everything that needs the number of
processes, which is `check_scale`, called once that number is known.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dinov3.config.conditions import problems, student_problems
from dinov3.config.loading import find_file, load, report
from dinov3.config.train import DistilledStudent, TrainConfig
from dinov3.errors import DinoError

# ---- loading: defaults ← files ← command line -----------------------------------------------------------------------


def load_config(
    file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None, overrides: Sequence[str] = ()
) -> tuple[TrainConfig, list[str]]:
    """Defaults ← file(s), later ones winning ← `key.sub=value`; the configuration and notes worth printing.

    Raises one DinoError that lists every mistake of every source.
    """
    return load(TrainConfig, file, overrides, check=problems)


def load_model_config(file: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[TrainConfig, list[str]]:
    """A training configuration that only describes a model: data, losses and schedules need not be sound."""
    return load(TrainConfig, file, overrides, check=lambda config: student_problems(config.student))


def load_student(
    config: TrainConfig, rank: int, world_size: int, file: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[DistilledStudent, TrainConfig, list[str]]:
    """The student that `rank` trains and its own configuration, with several students (`config` is the shared one).

    Defaults ← student's file ← shared file ← command line: what the shared file says wins, as in the reference. Its
    folder is <output_dir>/<name>; the batch per process is global batch // processes, used for scaling the rate.
    """
    m = config.multidistillation
    for student in m.students:
        if student.ranks_range[0] <= rank < student.ranks_range[1]:
            break
    else:
        raise DinoError(f"multidistillation.students: no student has rank {rank}")
    assert m.global_batch_size is not None
    own = [
        f"train.output_dir={os.path.join(config.train.output_dir, student.name)}",
        f"train.batch_size_per_gpu={m.global_batch_size // world_size}",
    ]
    near = find_file(file).parent
    files = [find_file(student.config_path, near=near), file]
    loaded, notes = load_config(files, [*overrides, *own])
    return student, loaded, notes


def load_teacher(config: TrainConfig, *, near: Path | None = None) -> TrainConfig:
    """The configuration of the teacher one distils from; its prototypes and patch must be the student's.

    `near` is the folder of the student's own configuration: the path may be relative to it.
    """
    path = find_file(config.distillation.full_cfg_path, near=near)
    teacher, _ = load_model_config(path)
    wrong = []
    for key in ("dino.head_n_prototypes", "ibot.head_n_prototypes", "student.patch_size"):
        section, name = key.split(".")
        ours, theirs = getattr(getattr(config, section), name), getattr(getattr(teacher, section), name)
        if ours != theirs:
            wrong.append(f"{key}: {ours} here, {theirs} in the teacher's {path.name}; they must be equal")
    if wrong:
        raise DinoError(report(wrong))
    return teacher
