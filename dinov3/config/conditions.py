"""What must hold of a training configuration, each condition a sentence under the key it is about."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from dinov3.config.bounds import Problem
from dinov3.config.loading import report
from dinov3.config.train import V1_KEYS, ScheduleConfig, StudentConfig, TrainConfig, as_list, vit_config
from dinov3.errors import DinoError
from dinov3.models.architectures import NAMES, ConvNeXtConfig, ViTConfig, size_of


def problems(config: TrainConfig) -> Iterator[Problem]:
    """Every condition that does not hold, as (key, sentence)."""
    yield from _loop_problems(config)
    yield from student_problems(config.student)
    yield from _crop_problems(config)
    yield from _loss_problems(config)
    yield from _schedule_problems(config)
    yield from _distillation_problems(config)


def dataset_problem(path: str | None) -> str | None:
    """What can be checked of a dataset spec without its reader, or None: names and keys are the reader's to know."""
    if not path:
        return "name the images: a folder, or Name:key=value:…, such as ImageNet:split=TRAIN:root=/data/imagenet"
    if re.fullmatch(r"[A-Za-z]\w+(:\w+=[^:]*)+", path) and ":root=" not in path and not os.path.exists(path):
        return f"{path!r} does not say where the files are: add :root=/folder"
    return None


def _share(key: str, pair: Sequence[float], *, zero: bool) -> Iterator[Problem]:
    low, high = pair
    if not (0 <= low <= high <= 1) or (low == high if zero else low == 0):
        yield key, f"must be two rising numbers {'from' if zero else 'above'} 0 up to 1, not {list(pair)}"


def _loop_problems(c: TrainConfig) -> Iterator[Problem]:
    if (wrong := dataset_problem(c.train.dataset_path)) is not None:
        yield "train.dataset_path", wrong
    e = c.evaluation
    if (e.knn_train_dataset is None) != (e.knn_val_dataset is None):
        yield "evaluation.knn_train_dataset", "k-NN needs both knn_train_dataset and knn_val_dataset, or neither"
    for name in ("knn_train_dataset", "knn_val_dataset"):
        path = getattr(e, name)
        if path is not None and (wrong := dataset_problem(path)) is not None:
            yield f"evaluation.{name}", wrong


def student_problems(s: StudentConfig) -> Iterator[Problem]:
    """Conditions on the model alone; also those of a configuration that only describes a model."""
    if s.arch not in NAMES:
        return  # as the field's choices say
    if isinstance(size_of(s.arch), ConvNeXtConfig):
        for name in ("embed_dim", "depth", "num_heads"):
            if getattr(s, name) is not None:
                yield f"student.{name}", f"is for transformers; {s.arch} has its own stages"
        if s.fp8_enabled:
            yield "student.fp8_enabled", f"replaces the linear layers of transformer blocks; {s.arch} has none"
        return
    both = s.pos_embed_rope_min_period is not None and s.pos_embed_rope_max_period is not None
    either = s.pos_embed_rope_min_period is not None or s.pos_embed_rope_max_period is not None
    if (s.pos_embed_rope_base is None and not both) or (s.pos_embed_rope_base is not None and either):
        yield (
            "student.pos_embed_rope_base",
            "give either pos_embed_rope_base, or null and both pos_embed_rope_min_period and _max_period",
        )
    c = vit_config(s)
    assert isinstance(c, ViTConfig)
    if c.num_heads > 0 and c.embed_dim % (4 * c.num_heads):
        key = "student.num_heads" if s.num_heads else "student.embed_dim"
        yield key, f"width {c.embed_dim} must be a multiple of 4 × heads = {4 * c.num_heads} for rotary positions"
    if s.fp8_enabled:
        try:
            re.compile(s.fp8_filter)
        except re.error as error:
            yield "student.fp8_filter", f"{s.fp8_filter!r} is no regular expression: {error}"
        for what, dim in (("width", c.embed_dim), ("hidden width of the FFN", c.ffn_hidden)):
            if dim % 64:
                yield (
                    "student.fp8_enabled",
                    f"needs layers whose sides are multiples of 64; the {what} is {dim}"
                    + ("; student.ffn_layer=swiglu64 rounds it up" if "FFN" in what and c.ffn_layer != "mlp" else ""),
                )


def _crop_problems(c: TrainConfig) -> Iterator[Problem]:
    crops, patch = c.crops, c.student.patch_size
    yield from _share("crops.global_crops_scale", crops.global_crops_scale, zero=False)
    yield from _share("crops.local_crops_scale", crops.local_crops_scale, zero=False)
    for name in ("rgb_mean", "rgb_std"):
        if len(getattr(crops, name)) != c.student.in_chans:
            yield f"crops.{name}", f"needs one number for each of {c.student.in_chans} channels: {getattr(crops, name)}"
    scale = crops.teacher_to_student_resolution_scale
    names = ["global_crops_size", "local_crops_size", "global_local_crop_pairs_ratios"]
    names += ["gram_teacher_crops_size"] if crops.gram_teacher_crops_size is not None else []
    columns = {name: as_list(getattr(crops, name)) for name in names}
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        yield "crops.global_crops_size", f"several resolutions are lists of one length; here: {lengths}"
    if (
        abs(sum(columns["global_local_crop_pairs_ratios"]) - 1) > 1e-6
        or min(columns["global_local_crop_pairs_ratios"], default=0) < 0
    ):
        ratios = columns["global_local_crop_pairs_ratios"]
        yield "crops.global_local_crop_pairs_ratios", f"are probabilities and must add up to 1: {ratios}"
    # Masks are drawn on the grid of global crops, and Gram features are compared on it: no remainder there. The border
    # of a local crop may be lost, as in the published high-resolution recipe (168 px): that is a remark.
    for name, unit in (("global_crops_size", patch * scale), ("gram_teacher_crops_size", float(patch))):
        for size in columns.get(name, []):
            if size <= 0 or size % unit:
                at = f"{patch} px" + (f" × {scale:g}" if unit != patch else "")
                below = int(size // unit * unit)
                near = f"{below} or {int(below + unit)}" if below > 0 else f"{int(unit)}"
                yield f"crops.{name}", f"{size} is no multiple of the patch ({at}); nearest: {near}"
    for size in columns["local_crops_size"]:
        if size < patch:
            yield "crops.local_crops_size", f"{size} is smaller than one patch ({patch} px)"
    arch = c.student.arch
    if arch in NAMES and isinstance(size_of(arch), ConvNeXtConfig) and patch * scale != 32:
        yield (
            "crops.teacher_to_student_resolution_scale",
            f"a ConvNeXt has one token per 32 px, so student.patch_size × this must be 32, not {patch} × {scale:g}",
        )
    elif c.student.arch.startswith("vit_") and scale != 1 and not c.multidistillation.enabled:
        yield (
            "crops.teacher_to_student_resolution_scale",
            f"is for a student of another stride than the teacher's, a ConvNeXt; 1 for a ViT, not {scale:g}",
        )
    if crops.localcrops_subset_of_globalcrops:
        if crops.local_crops_number % 2:
            yield "crops.local_crops_number", "must be even with localcrops_subset_of_globalcrops: half of each crop"
        for g, n in zip(columns["global_crops_size"], columns["local_crops_size"]):
            if n >= g:
                yield "crops.local_crops_size", f"a window of {n} px does not fit into a global crop of {g} px"


def _loss_problems(c: TrainConfig) -> Iterator[Problem]:
    yield from _share("ibot.mask_ratio_min_max", c.ibot.mask_ratio_min_max, zero=True)

    dino, batch = c.dino, c.train.batch_size_per_gpu
    if not dino.koleo_loss_distributed and dino.koleo_topk != 1:
        yield "dino.koleo_topk", f"{dino.koleo_topk} neighbours need dino.koleo_loss_distributed=true; otherwise 1"
    group = dino.koleo_distributed_loss_group_size
    if dino.koleo_loss_distributed and group is not None:
        if group % batch:
            yield (
                "dino.koleo_distributed_loss_group_size",
                f"{group} images must be whole processes of train.batch_size_per_gpu {batch}: a multiple of it",
            )
        if dino.koleo_topk >= group:
            yield "dino.koleo_topk", f"{dino.koleo_topk} neighbours do not exist among {group} images"

    g = c.gram
    if g.remove_neg and g.remove_only_teacher_neg:
        yield "gram.remove_neg", "remove_neg and remove_only_teacher_neg exclude each other"
    if g.tokens_used != "all" and g.img_level:
        yield "gram.tokens_used", f"{g.tokens_used!r} differs in number per crop and needs gram.img_level=false"
    if not g.use_loss:
        return
    if g.ema_teacher:
        if g.ckpt is not None:
            yield "gram.ckpt", "gram.ema_teacher follows the EMA teacher; leave ckpt null, or ema_teacher false"
        if g.rep_update:
            yield "gram.rep_update", "the EMA teacher needs no refresh; set gram.rep_update=false with ema_teacher"
        if c.crops.gram_teacher_crops_size is not None:
            yield (
                "crops.gram_teacher_crops_size",
                "gram.ema_teacher sees the same crops as the student; leave this null",
            )
    elif g.ckpt == "ignore":
        yield (
            "gram.ckpt",
            "'ignore' is a place-holder: name the Gram teacher, e.g. gram.ckpt=/run/eval/training_199999",
        )
    elif not g.ckpt and g.it_load_ema_teacher < 0:
        yield (
            "gram.ckpt",
            "which Gram teacher? Name a file or folder here (the teacher of an earlier run), or set "
            "gram.it_load_ema_teacher=N to take the EMA teacher at iteration N, or gram.ema_teacher=true",
        )
    elif g.ckpt and g.it_load_ema_teacher >= 0:
        yield "gram.it_load_ema_teacher", "the Gram teacher comes from gram.ckpt or from the EMA teacher, not both"


def _schedule_problems(c: TrainConfig) -> Iterator[Problem]:
    total = c.optim.epochs
    v2: dict[str, ScheduleConfig] = {}
    if c.dino.reweight_dino_local_loss:
        v2["dino.local_loss_weight_schedule"] = c.dino.local_loss_weight_schedule
    if c.gram.loss_weight_schedule is not None:
        v2["gram.loss_weight_schedule"] = c.gram.loss_weight_schedule
    if c.schedules is not None:
        v2 |= {f"schedules.{f.name}": getattr(c.schedules, f.name) for f in dataclasses.fields(c.schedules)}
    else:
        for key in V1_KEYS:
            section, name = key.split(".")
            value = getattr(getattr(c, section), name)
            if value is None:
                yield key, f"is null and there is no schedules section; give a number (default {_default(key)})"
            elif "epochs" in name and value < 0:
                yield key, f"must be 0 or more, not {value:g}"
            elif name == "warmup_epochs" and value > total:
                yield key, f"{value:g} epochs do not fit into optim.epochs {total}"
    for key, s in v2.items():
        if s.warmup_epochs < 0 or (s.cosine_epochs or 0) < 0:
            yield key, "epochs must be 0 or more"
        elif s.warmup_epochs + (s.cosine_epochs or 0) > total:
            cosine = f" + cosine_epochs {s.cosine_epochs:g}" if s.cosine_epochs else ""
            yield key, f"warmup_epochs {s.warmup_epochs:g}{cosine} is longer than optim.epochs {total}"
    for key, name in (("schedules.teacher_temp", "teacher_temp"), ("schedules.momentum", "momentum")):
        if key in v2:
            values = [v2[key].start, v2[key].peak, v2[key].end]
            if name == "teacher_temp" and min(values) <= 0:
                yield key, f"temperatures must be above 0: {values}"
            if name == "momentum" and not all(0 <= v <= 1 for v in values):
                yield key, f"momenta must be from 0 to 1: {values}"


def _default(key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(TrainConfig(), section), name)


def _distillation_problems(c: TrainConfig) -> Iterator[Problem]:
    d, m = c.distillation, c.multidistillation
    if d.enabled:
        if not d.full_cfg_path:
            yield "distillation.full_cfg_path", "name the teacher's configuration, such as its run's resolved.yaml"
        if not d.checkpoint_path:
            yield "distillation.checkpoint_path", "name the teacher's weights (the word 'ignore': random, for tests)"
        if d.checkpoint_path and c.gram.use_loss and c.gram.ema_teacher:
            yield "gram.ema_teacher", "is not defined when distilling: the EMA is not the teacher"
    several = c.MODEL.META_ARCHITECTURE == "MultiDistillationMetaArch"
    if several != m.enabled:
        yield (
            "multidistillation.enabled",
            f"is {str(m.enabled).lower()}, but MODEL.META_ARCHITECTURE is {c.MODEL.META_ARCHITECTURE}",
        )
    if not m.enabled:
        return
    if not d.enabled:
        yield "distillation.enabled", "several students need a teacher: set it and its two paths"
    if c.gram.use_loss:
        yield "gram.use_loss", "must be false with several students"
    if c.dino.koleo_loss_distributed:
        yield "dino.koleo_loss_distributed", "would compare students of different width; use false"
    if not m.students:
        yield "multidistillation.students", "is empty"
        return
    G = m.global_batch_size
    if not G or G <= 0:
        yield "multidistillation.global_batch_size", f"must be above 0, not {G}"
        return
    if len({s.name for s in m.students}) < len(m.students):
        yield "multidistillation.students", f"two have one name: {', '.join(s.name for s in m.students)}"
    end = 0
    for s in sorted(m.students, key=lambda s: s.ranks_range):
        first, last = s.ranks_range
        if last <= first:
            yield "multidistillation.students", f"{s.name}: ranks [{first}, {last}) are none"
        elif first != end:
            what = "belong to nobody" if first > end else "belong to two students"
            yield ("multidistillation.students", f"{s.name}: ranks begin at {first} where {end} is next; some {what}")
        elif G % (last - first):
            yield (
                "multidistillation.global_batch_size",
                f"{G} does not divide among the {last - first} processes of {s.name}",
            )
        end = max(end, last)


def check_scale(config: TrainConfig, world_size: int) -> None:
    """The conditions that need the number of processes (of this student); raises one DinoError with all of them."""
    wrong: list[str] = []
    c, batch = config, config.train.batch_size_per_gpu
    if c.dino.koleo_loss_distributed:
        group, everything = c.dino.koleo_distributed_loss_group_size or batch * world_size, batch * world_size
        if group % batch or everything % group:
            wrong.append(
                f"dino.koleo_distributed_loss_group_size: {group} images must be whole processes of {batch} and "
                f"divide the {everything} images of a step on {world_size} processes"
            )
        if c.dino.koleo_topk >= group:
            wrong.append(f"dino.koleo_topk: {c.dino.koleo_topk} neighbours do not exist among {group} images")
    if c.multidistillation.enabled:
        ranks = max(s.ranks_range[1] for s in c.multidistillation.students)
        if ranks != world_size:
            wrong.append(f"multidistillation.students: their ranks end at {ranks}, but {world_size} processes run")
    if wrong:
        raise DinoError(report(wrong))
