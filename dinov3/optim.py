"""Schedules, parameter groups, gradient clipping and the EMA of weights (paper §3.2; tables 12 and 13).

A schedule is a pure function of the step; there is no state between steps, so a resumed run needs only its iteration.
Two generators exist because published recipes come in two forms: `cosine_v1` (keys in `optim` and `teacher`) and
`warmup_cosine_v2` (a `schedules` section). They differ in small ways that the numbers depend on: v1's warm-up contains
the peak, so the peak appears twice, and its cosine never arrives; v2's warm-up stops short of the peak and its cosine
arrives. Heads on frozen backbones have a third, `warmup_one_cycle`, and `polynomial`.

Everything works on plain tensors and on DTensors. Nothing here waits for the device: norms are returned as tensors.
Left out: loss scaling.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dinov3 import distributed
from dinov3.config.train import LearningRateConfig, OptimConfig, ScheduleConfig, TrainConfig
from dinov3.errors import DinoError

Schedule = Callable[[int], float]

# ---- schedules ------------------------------------------------------------------------------------------------------


def cosine_v1(
    step: int,
    *,
    base: float,
    final: float,
    total: int,
    warmup: int = 0,
    start: float = 0.0,
    freeze: int = 0,
    trunc_extra: float = 0.0,
) -> float:
    """`freeze` zeros; a line start → base over `warmup` steps, both ends included; a cosine base → final; then final.

    The cosine has n = total − freeze − warmup steps, cos(π·i/n) for i = 0..n−1, and so stops just short of `final`.
    With `trunc_extra` x it is the first n points of a slower one of (1 + x)·n points, rescaled to end at `final`.
    """
    n = total - freeze - warmup
    if n < 0:
        raise DinoError(f"a schedule of {total} steps cannot hold {freeze} frozen and {warmup} warm-up steps")
    if step >= total:
        return final
    if step < freeze:
        return 0.0
    if step < freeze + warmup:
        i = step - freeze
        return start + (base - start) * (i / (warmup - 1)) if warmup > 1 else start
    i = step - freeze - warmup
    if trunc_extra == 0:
        height = (1 + math.cos(math.pi * i / n)) / 2
    else:
        points = int((1 + trunc_extra) * n)

        def slow(j: int) -> float:
            return (1 + math.cos(math.pi * j / max(points - 1, 1))) / 2

        last = slow(n - 1)
        height = (slow(i) - last) / (1 - last) if last < 1 else 1.0
    return final + (base - final) * height


def warmup_cosine_v2(
    step: int, *, start: float, peak: float, end: float, warmup: int, total: int, cosine: int | None = None
) -> float:
    """A line from start towards peak over `warmup` steps; a cosine peak → end, both included, over `cosine`; then end.

    `cosine` None means all that is left. A rising cosine is peak < end; a constant with warm-up is peak == end.
    """
    cosine = total - warmup if cosine is None else cosine
    if cosine < 0 or warmup + cosine > total:
        raise DinoError(f"a schedule of {total} steps cannot hold {warmup} warm-up and {cosine} cosine steps")
    if step < warmup:
        return start + (peak - start) * (step / warmup)
    i = step - warmup
    if i >= cosine:
        return end
    if i == cosine - 1 and cosine > 1:
        return end  # what cos(π) means, without its rounding
    return end + (peak - end) * (1 + math.cos(math.pi * i / max(cosine - 1, 1))) / 2


def warmup_one_cycle(
    step: int,
    *,
    peak: float,
    total: int,
    warmup: int = 0,
    ratio: float = 0.0,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> float:
    """The learning rate of the dense heads' recipes, "WarmupOneCycleLR", at scheduler step `step` of `total`.

    Below `warmup`: a line that begins at ratio·peak, bent down by (1 − step/total); with ratio 0 instead
    peak/final_div_factor + the cosine times step/warmup. After it: a cosine over the *whole* of `total`, from peak to
    peak/(div_factor·final_div_factor), that is one step ahead of itself. (Its momentum: `warmup_one_cycle_momentum`.)
    """
    if not 0 <= warmup <= total:
        raise DinoError(f"a schedule of {total} steps cannot hold {warmup} warm-up steps")
    if step < warmup and ratio > 0:
        return peak * (1 - (1 - step / warmup) * (1 - ratio)) * (1 - step / total)
    if step < warmup:
        return peak / final_div_factor + peak * (1 + math.cos(math.pi * step / total)) / 2 * step / warmup
    return _annealed(peak, peak / (div_factor * final_div_factor), min((step + 1) / total, 1.0))


def warmup_one_cycle_momentum(step: int, *, base: float, highest: float, total: int, warmup: int = 0) -> float:
    """AdamW's first beta beside `warmup_one_cycle`: 0 during the warm-up, then a cosine from `base` to `highest`."""
    if step < warmup:
        return 0.0
    return _annealed(base, highest, min((step - warmup) / max(total - warmup, 1), 1.0))


def _annealed(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def polynomial(step: int, *, peak: float, total: int, warmup: int = 0, power: float = 1.0) -> float:
    """A line from 0 to peak over `warmup` steps, then peak·(1 − share of the rest)^power, down to 0 at `total`."""
    if not 0 <= warmup <= total:
        raise DinoError(f"a schedule of {total} steps cannot hold {warmup} warm-up steps")
    if step < warmup:
        return peak * (step / warmup)
    return peak * (1 - min((step - warmup) / max(total - warmup, 1), 1.0)) ** power


def constant(value: float, step: int) -> float:
    return value


def zero_before(first: int, schedule: Schedule, step: int) -> float:
    """The frozen last layer: learning rate 0 for the first steps (its moments are gathered all the same)."""
    return 0.0 if step < first else schedule(step)


def frozen_then_ramp(first: int, ramp: int, schedule: Schedule, step: int) -> float:
    """A backbone under new heads: 0 for the first steps, a line of `ramp` steps up to the schedule, then the schedule."""
    return 0.0 if step < first else schedule(step) * min(1.0, (step - first + 1) / (ramp + 1))


def lr_factor(scaling: str | None, global_batch: int) -> float:
    """What a learning rate is multiplied by for a batch of that many images, all processes and accumulation counted.

    `sqrt_wrt_1024` is 4·√(batch/1024): 1e-3 becomes 5.657e-3 at 2048, and the 7B's 5e-5 becomes 4e-4 at 4096.
    """
    if scaling == "sqrt_wrt_1024":
        return 4 * math.sqrt(global_batch / 1024)
    return global_batch / 256 if scaling == "linear_wrt_256" else 1.0


@dataclass(frozen=True)
class StepValues:
    """All that is scheduled, at one step."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float  # of the EMA
    teacher_temp: float
    local_loss_weight: float
    gram_loss_weight: float
    backbone_lr: float | None = None  # None: `lr`, as for the heads; 0: the backbone is frozen, and needs no gradient

    @property
    def frozen(self) -> bool:
        return self.backbone_lr == 0

    def slower(self, factor: float) -> StepValues:
        """With all learning rates multiplied."""
        backbone_lr = None if self.backbone_lr is None else self.backbone_lr * factor
        return replace(self, lr=self.lr * factor, last_layer_lr=self.last_layer_lr * factor, backbone_lr=backbone_lr)

    def fields(self) -> dict[str, float]:
        """Under the names of the metrics file; the loss weights are logged beside their losses."""
        named = {"lr": self.lr, "wd": self.weight_decay, "mom": self.momentum, "last_layer_lr": self.last_layer_lr}
        if self.backbone_lr is not None:
            named["backbone_lr"] = self.backbone_lr
        return named | {"teacher_temp": self.teacher_temp}


@dataclass(frozen=True)
class Schedules:
    """The schedules of a run; `schedules.at(it)` gives their values, the same at every call and on every rank."""

    lr: Schedule
    last_layer_lr: Schedule
    weight_decay: Schedule
    momentum: Schedule
    teacher_temp: Schedule
    local_loss_weight: Schedule
    gram_loss_weight: Schedule
    total: int  # iterations
    backbone_lr: Schedule | None = None
    frozen: int = 0  # iterations, the first ones, in which the backbone is

    def at(self, step: int) -> StepValues:
        schedules = {f.name: getattr(self, f.name) for f in fields(StepValues)}
        values: dict[str, Any] = {name: None if s is None else s(step) for name, s in schedules.items()}
        return StepValues(**values)


def build_schedules(config: TrainConfig, world_size: int) -> Schedules:
    """The schedules that a configuration describes, for so many processes (the learning rate is scaled with the batch).

    v1 scales the peak only; v2 scales `peak` and `end`, not `start`.
    """
    c, o, t = config, config.optim, config.teacher
    total = c.iterations
    epoch = c.train.OFFICIAL_EPOCH_LENGTH if o.iterations is None else total / o.epochs
    factor = lr_factor(o.scaling_rule, c.train.batch_size_per_gpu * world_size * o.accumulation_steps)

    def steps(epochs: float | None) -> int:
        return round((epochs or 0) * epoch)

    def v2(s: ScheduleConfig, scale: float = 1.0) -> Schedule:
        warmup = steps(s.warmup_epochs)
        cosine = None if s.cosine_epochs is None else steps(s.cosine_epochs)
        if cosine is not None and o.iterations is not None:
            cosine = min(cosine, total - warmup)  # both may have been rounded up
        run = partial(
            warmup_cosine_v2,
            start=s.start,
            peak=s.peak * scale,
            end=s.end * scale,
            warmup=warmup,
            total=total,
            cosine=cosine,
        )
        run(0)  # a length that does not fit is an error now
        return run

    backbone_lr: Schedule | None = None
    frozen_backbone = 0
    if c.schedules is not None:
        lr = v2(c.schedules.lr, factor)
        frozen_backbone, ramp = frozen_iterations(c.schedules.lr, epoch), c.schedules.lr.backbone_warmup_after_freeze
        if frozen_backbone or ramp:
            backbone_lr = partial(frozen_then_ramp, frozen_backbone, ramp, lr)
        frozen = steps(c.schedules.lr.freeze_last_layer_epochs)
        weight_decay, momentum = v2(c.schedules.weight_decay), v2(c.schedules.momentum)
        teacher_temp = v2(c.schedules.teacher_temp)
    else:
        v1 = partial(cosine_v1, total=total)
        values = {name: _number(o, name) for name in ("lr", "min_lr", "weight_decay", "weight_decay_end")}
        lr = partial(
            v1,
            base=values["lr"] * factor,
            final=values["min_lr"],
            warmup=steps(o.warmup_epochs),
            trunc_extra=o.schedule_trunc_extra or 0.0,
        )
        frozen = steps(o.freeze_last_layer_epochs)
        trunc = {"trunc_extra": o.schedule_trunc_extra or 0.0}
        weight_decay = partial(v1, base=values["weight_decay"], final=values["weight_decay_end"], **trunc)
        momentum = partial(v1, base=_number(t, "momentum_teacher"), final=_number(t, "final_momentum_teacher"), **trunc)
        warm, temp = steps(t.warmup_teacher_temp_epochs), _number(t, "teacher_temp")
        teacher_temp = partial(
            cosine_v1, base=temp, final=temp, total=warm, warmup=warm, start=_number(t, "warmup_teacher_temp")
        )

    local = v2(c.dino.local_loss_weight_schedule) if c.dino.reweight_dino_local_loss else partial(constant, 1.0)
    if not c.gram.use_loss:
        gram: Schedule = partial(constant, 0.0)
    elif c.gram.loss_weight_schedule is not None:
        gram = v2(c.gram.loss_weight_schedule)
    else:
        gram = partial(constant, c.gram.loss_weight)
    return Schedules(
        lr, partial(zero_before, frozen, lr), weight_decay, momentum, teacher_temp, local, gram, total=total,
        backbone_lr=backbone_lr, frozen=frozen_backbone,
    )  # fmt: skip


def frozen_iterations(lr: LearningRateConfig, epoch: float) -> int:
    """How many iterations the backbone is frozen for at the start; the key in iterations wins over the one in epochs."""
    n = lr.freeze_student_iterations
    return round(lr.freeze_student_epochs * epoch) if n is None else n


def _number(section: Any, name: str) -> float:
    value = getattr(section, name)
    assert value is not None, f"{name} is null: the configuration was not checked"
    return float(value)


# ---- groups of parameters -------------------------------------------------------------------------------------------

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Multipliers:
    """How one parameter departs from the schedules."""

    name: str  # relative to its sub-module
    lr_multiplier: float
    wd_multiplier: float
    is_last_layer: bool


def plain_name(name: str) -> str:
    """A parameter's name without what compilation and checkpointing put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def layer_lr(name: str, n_blocks: int, decay: float) -> float:
    """Layerwise decay: decay^(L+1) for tokens and patch projection, decay^(L−i) for block i of L, 1 for the rest.

    A model without `blocks` (ConvNeXt, heads) has 1 everywhere.
    """
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return decay ** (n_blocks - int(block[1]))
    first = n_blocks and name.startswith(("cls_token", "storage_tokens", "mask_token", "patch_embed."))
    return decay ** (n_blocks + 1) if first else 1.0


def multipliers(
    module: nn.Module, *, layerwise_decay: float = 1.0, patch_embed_lr_mult: float = 1.0, wd_multiplier: float = 1.0
) -> list[Multipliers]:
    """One row for each parameter of a sub-module, in its order.

    No decay for biases and for names holding `norm`, `gamma` or `fourier_w`. CLS, register and mask tokens do decay:
    a comment of the reference claims otherwise and decays them, and published models were trained so. ConvNeXt's
    down-sampling norms have no such name (`downsample_layers.0.1.weight`) and decay too, for the same reason.
    """
    names = [plain_name(name) for name, _ in module.named_parameters()]
    blocks = {int(m[1]) for name in names if (m := re.match(r"blocks\.(\d+)\.", name))}
    rows = []
    for name in names:
        lr = layer_lr(name, len(blocks), layerwise_decay)
        if name.startswith("patch_embed.") and blocks:
            lr *= patch_embed_lr_mult
        bare = name.endswith("bias") or any(word in name for word in ("norm", "gamma", "fourier_w"))
        rows.append(Multipliers(name, lr, 0.0 if bare else wd_multiplier, "last_layer" in name))
    return rows


def param_groups(modules: Mapping[str, nn.Module], optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW's groups for {"backbone": …, "dino_head": …, "ibot_head": …}; parameters that need no gradient are left out.

    With `multi_tensor_optim` parameters of one sub-module and equal multipliers share a group. Differently from the
    reference, `dino_head_wd_multiplier` acts: there it looks for "dino_head" in names that do not contain it.
    """
    groups: list[dict[str, Any]] = []
    for part, module in modules.items():
        rows = multipliers(
            module,
            layerwise_decay=optim.layerwise_decay,
            patch_embed_lr_mult=optim.patch_embed_lr_mult,
            wd_multiplier=optim.dino_head_wd_multiplier if part == "dino_head" else 1.0,
        )
        fused: dict[Any, dict[str, Any]] = {}
        for row, parameter in zip(rows, module.parameters(), strict=True):
            if not parameter.requires_grad:
                continue
            matrices = matrices_of(part, row.name, parameter) if optim.optimizer == "muon" else 0
            alike: Any = (row.lr_multiplier, row.wd_multiplier, row.is_last_layer, matrices)
            group = fused.setdefault(
                alike if optim.multi_tensor_optim else row.name,
                {
                    "params": [],
                    "lr_multiplier": row.lr_multiplier,
                    "wd_multiplier": row.wd_multiplier,
                    "is_last_layer": row.is_last_layer,
                    "is_backbone": part == "backbone",
                    **({"matrices": matrices} if matrices else {}),
                },
            )
            group["params"].append(parameter)
        groups += fused.values()
    return groups


def matrices_of(part: str, name: str, parameter: Tensor) -> int:
    """How many matrices a parameter is to Muon: three of q, k, v; one of other weights in the backbone's blocks; else 0."""
    if part != "backbone" or parameter.ndim != 2 or not re.match(r"(blocks|stages)\.", name):
        return 0
    return 3 if name.endswith("qkv.weight") else 1


def local(x: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, sharing its memory; a plain tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


class AdamW(torch.optim.AdamW):
    """AdamW over this rank's shards: it works element by element, so the kernel may run on them without DTensor's dispatch.

    Its state is sharded as the parameters are, for checkpoints. `found_inf`, a float tensor, leaves everything as it is in a
    step where it is 1, without the host's knowing.
    """

    found_inf: Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        if self.found_inf is not None and not self.param_groups[0]["fused"]:  # only the fused kernel reads it
            if bool(self.found_inf):
                return None
            self.found_inf = None
        return super().step(closure)

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(local, tensors)
        return has_complex


class Muon(AdamW):
    """Groups with `matrices` move along their orthogonalised momentum, the others as AdamW's.

    Muon (Jordan et al. 2024) with Nesterov momentum 0.95 and updates as large as AdamW's, 0.2·√(longer side) (arXiv
    2502.16982), so that learning rates and decays stay what they are. A sharded matrix is gathered for its update.
    """

    MOMENTUM = 0.95

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, **options)
        for group in self.param_groups:
            for p in group["params"] if group.get("matrices") else ():
                self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        bad = self.found_inf
        if bad is not None and not self.param_groups[0]["fused"] and bool(bad):
            return None
        result = super().step(closure)
        for group in self.param_groups:
            for p in group["params"] if group.get("matrices") else ():
                if p.grad is not None:
                    self._move(p, group, bad)
        return result

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        return False if group.get("matrices") else super()._init_group(group, *lists)

    def _move(self, p: Tensor, group: dict[str, Any], bad: Tensor | None) -> None:
        gradient, momentum, n = local(p.grad), local(self.state[p]["exp_avg"]), group["matrices"]  # type: ignore[arg-type]
        keep = torch.ones((), device=gradient.device) if bad is None else 1 - bad
        gradient = torch.where(keep > 0, gradient, 0)
        momentum.lerp_(gradient, (1 - self.MOMENTUM) * keep)
        towards = gathered(gradient.lerp(momentum, self.MOMENTUM), p)
        parts = [orthogonal(part) * (0.2 * max(part.shape) ** 0.5) for part in towards.chunk(n)]
        own = shard(torch.cat(parts).to(towards.dtype), p)
        local(p).mul_(1 - group["lr"] * group["weight_decay"] * keep).add_(own * keep, alpha=-group["lr"])


def orthogonal(x: Tensor) -> Tensor:
    """A matrix [m, n] with its singular values brought near 1 (0.7 to 1.2) by five Newton-Schulz steps; bfloat16 on CUDA."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.bfloat16() if x.is_cuda else x.float()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


def gathered(own: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor of which this rank has `own`, sharded as `like` is."""
    if not hasattr(like, "to_local"):
        return own
    from torch.distributed.tensor import DTensor

    place: Any = like
    return DTensor.from_local(
        own, place.device_mesh, place.placements, run_check=False, shape=like.shape, stride=like.stride()
    ).full_tensor()


def shard(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a tensor that all ranks have, as `like` is sharded."""
    if not hasattr(like, "to_local"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    place: Any = like
    everywhere = [Replicate()] * place.device_mesh.ndim
    return (
        DTensor.from_local(whole, place.device_mesh, everywhere, run_check=False)
        .redistribute(placements=place.placements)
        .to_local()
    )


def build_optimizer(modules: Mapping[str, nn.Module], optim: OptimConfig) -> AdamW:
    """AdamW or Muon, eps 1e-8, with AdamW's fused kernel on CUDA and CPU; rates and decays are 0 until `apply_schedules`
    writes them."""
    groups = param_groups(modules, optim)
    if not groups:
        raise DinoError("no parameter needs a gradient: there is nothing to train")
    fused = {p.device.type for group in groups for p in group["params"]} <= {"cuda", "cpu"}
    betas = (optim.adamw_beta1, optim.adamw_beta2)
    kind = Muon if optim.optimizer == "muon" else AdamW
    return kind(groups, lr=0.0, betas=betas, eps=1e-8, weight_decay=0.0, fused=fused or None)


def apply_schedules(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Write this step's rate and decay into every group."""
    for group in optimizer.param_groups:
        lr = values.last_layer_lr if group["is_last_layer"] else values.lr
        if group["is_backbone"] and values.backbone_lr is not None:
            lr = values.backbone_lr
        group["lr"] = lr * group["lr_multiplier"]
        group["weight_decay"] = values.weight_decay * group["wd_multiplier"]


# ---- clipping and averaging -----------------------------------------------------------------------------------------


@torch.no_grad()
def clip_per_module(modules: Mapping[str, nn.Module], max_norm: float | None) -> dict[str, Tensor]:
    """Clip each sub-module's gradients to an L2 norm of its own; the norms before clipping, as 0-dimensional tensors.

    The factor is min(1, max_norm / (norm + 1e-6)). 0 or None only measures. Of sharded gradients each rank measures its
    shards, and one reduction adds the squares of all sub-modules.
    """
    gradients: dict[str, list[Tensor]] = {}
    norms, mesh = [], None
    for name, module in modules.items():
        found = [p.grad for p in module.parameters() if p.grad is not None]
        gradients[name] = [local(g) for g in found]
        # a head whose loss has weight 0 has none, and the norm of nothing would be on the CPU
        norms.append(get_total_norm(gradients[name]) if found else local(next(module.parameters())).new_zeros(()))
        mesh = next((g.device_mesh for g in found if hasattr(g, "device_mesh")), mesh)
    total = torch.stack(norms)
    if mesh is not None:  # sharded over its last dimension; over another there are copies, with equal gradients
        total = distributed.all_reduce(total.square(), "sum", mesh.get_group(mesh.ndim - 1)).sqrt()
    results = dict(zip(gradients, total.unbind()))
    for name, norm in results.items():
        if max_norm and gradients[name]:
            torch._foreach_mul_(gradients[name], (max_norm / (norm + 1e-6)).clamp(max=1))
    return results


@torch.no_grad()
def ema_update(ema: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """ema ← ema + (1 − momentum)·(student − ema), in place, over parameters in the same order (not buffers).

    Give `model.parameters()` of both, which are sharded alike or not at all. The slow version:

        for e, s in zip(ema, student): e.lerp_(s, 1 - momentum)
    """
    averages, sources = [local(e) for e in ema], [local(s) for s in student]
    if [e.shape for e in averages] != [s.shape for s in sources]:
        raise DinoError(f"the average has {len(averages)} tensors and the student {len(sources)}, or shapes differ")
    if averages:
        torch._foreach_lerp_(averages, sources, 1 - momentum)


# ---- logistic regression --------------------------------------------------------------------------------------------


def logistic_regression(
    x: Tensor, target: Tensor, strength: float, rows: int, *, start: Tensor | None = None, tol: float = 1e-12,
    max_iter: int = 1000,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(weight [rows, D], bias [rows]) that minimise ½‖weight‖² + strength · Σ error, scikit-learn's objective, by L-BFGS.

    x [N, D]; target: classes int [N] (cross-entropy), or float [N, rows] (as many yes-or-no regressions). start: weight and
    bias [rows, D + 1] to begin from. The problem is convex, so where it ends does not depend on the solver.
    """
    D, N = x.shape[1], len(x)
    parameters = (start if start is not None else x.new_zeros(rows, D + 1)).clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [parameters],
        max_iter=max_iter,
        max_eval=2 * max_iter,
        tolerance_grad=tol,
        tolerance_change=1e-16 if x.dtype == torch.float64 else 1e-9,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        logits = F.linear(x, parameters[:, :D], parameters[:, D])
        if target.is_floating_point():
            error = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / N
        else:
            error = F.cross_entropy(logits, target)
        # the objective divided by strength · N, as scikit-learn scales it, so that `tol` means the same for every strength
        loss = error + parameters[:, :D].square().sum() / (2 * strength * N)  # the bias is free
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    found = parameters.detach()
    return found[:, :D], found[:, D]
