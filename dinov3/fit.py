"""The one loop that fits a head on a frozen backbone: classifiers, segmentation, depth, detection (paper §6, App. D).

    report = fit(model, batches, loss, FitConfig(steps=1000, lr=1e-3), RunDir("run"), evaluate=validate)

`batches(step)` is a function of the step, and so is every random draw here: a run that was killed and started again ends
with the same numbers as one that was not (one process, one device). What trains is all of `module` but its backbones.

    <run>/ckpt/<step>/            head, moments of AdamW, evaluations so far; atomic, see `dinov3.checkpoint`
          ckpt/best.safetensors   the head at its best evaluation
          metrics.jsonl  log.txt  plots/loss.png

Several processes: each gets batches of its own (its `batches` must differ), gradients are averaged, and batch norms see the
batch of all of them. Left out: what a batch is, what the loss is (`heads.objectives`
and others), head files (`hub.own_heads`). `cached_features` runs the backbone once an image while a head is fitted.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from dinov3 import checkpoint, distributed
from dinov3.checkpoint import Checkpoints
from dinov3.config.bounds import check, setting
from dinov3.errors import DinoError, did_you_mean, one_of
from dinov3.losses import LossTerms
from dinov3.models.base import TokenModel
from dinov3.optim import multipliers, polynomial, warmup_cosine_v2, warmup_one_cycle, warmup_one_cycle_momentum
from dinov3.runlog import Progress, RunDir, StopRequest, plot
from dinov3.threads import prefetched
from dinov3.weights.reading import read
from dinov3.weights.writing import write_safetensors, write_torch

Batch = Any
Loss = Callable[[nn.Module, Batch], LossTerms]
Evaluate = Callable[[nn.Module], Mapping[str, float]]

SCHEDULES = ("constant", "cosine", "polynomial", "one_cycle", "steps")
MAX_BAD_STEPS = 5  # in a row, without a finite loss and gradient
BEST = "best.safetensors"


@dataclass
class FitConfig:
    """How a head is fitted. Steps count from 0; a learning rate is that of the batch of all processes."""

    steps: int = setting(1000, at_least=1)
    lr: float = 1e-3
    weight_decay: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    # constant | cosine (to 0) | polynomial | one_cycle | steps; all after `warmup` steps
    schedule: str = setting("cosine", choices=SCHEDULES)
    warmup: int = setting(0, at_least=0)
    # polynomial: power; steps: at (list of steps), factor; one_cycle: ratio, div_factor, final_div_factor, base_momentum,
    # max_momentum (AdamW's beta1, written where both are given), late (scheduler steps behind the optimiser's)
    schedule_options: dict[str, Any] = field(default_factory=dict)
    # parameters that the weight decay acts on: all | matrices (no biases, norms, embeddings)
    decay: Literal["all", "matrices"] = "all"
    clip: float | None = None  # L2 norm of the gradient of all that trains; null or inf: never
    batch: int = setting(1, at_least=1)  # images a step, all processes counted: for the log only
    log_every: int = setting(10, at_least=1)
    save_every: int = setting(0, at_least=0)  # 0: twenty times in all
    keep: int = setting(2, at_least=1)  # newest checkpoints that stay
    evaluate_every: int = setting(0, at_least=0)  # 0: at the end only
    best_by: str = ""  # the evaluation's number that chooses the best head; "": the last head is
    best_is: Literal["highest", "lowest"] = "highest"
    finish_with: Literal["best", "last"] = "best"  # which head the module has in the end
    precision: Literal["float32", "bfloat16"] = "float32"  # autocast around the loss
    # threads that make the next batches; then `batches` must draw from generators of its own
    workers: int = setting(0, at_least=0)
    seed: int = 0

    def problems(self) -> Iterator[tuple[str, str]]:
        if not 0 <= self.warmup <= self.steps:
            yield "warmup", f"must be between 0 and the {self.steps} steps, not {self.warmup}"
        unknown = set(self.schedule_options) - set(_OPTIONS.get(self.schedule, ()))
        if unknown:
            odd = min(unknown)
            yield "schedule_options", f"{self.schedule} has no {odd!r}{did_you_mean(odd, _OPTIONS[self.schedule])}"

    def lr_at(self, step: int) -> float:
        """The learning rate of a step; the same at every call."""
        o = dict(self.schedule_options)
        if self.schedule == "constant":
            return self.lr * (min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0)
        if self.schedule == "cosine":
            shift = int(self.warmup > 0)  # neither a first nor a last step of rate 0
            return warmup_cosine_v2(
                step + shift, start=0.0, peak=self.lr, end=0.0, warmup=self.warmup, total=self.steps + 1 + shift
            )
        if self.schedule == "polynomial":
            shifted = step + 1 if self.warmup else step
            return polynomial(shifted, peak=self.lr, total=self.steps + 1, warmup=self.warmup, **o)
        if self.schedule == "steps":
            warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
            return self.lr * warm * o.get("factor", 0.1) ** sum(step >= at for at in o.get("at", ()))
        named = {k: o[k] for k in ("ratio", "div_factor", "final_div_factor") if k in o}
        return warmup_one_cycle(self._late(step), peak=self.lr, total=self.steps, warmup=self.warmup, **named)

    def beta1_at(self, step: int) -> float:
        o = self.schedule_options
        if self.schedule != "one_cycle" or "base_momentum" not in o or "max_momentum" not in o:
            return self.beta1
        ends = {"base": o["base_momentum"], "highest": o["max_momentum"]}
        return warmup_one_cycle_momentum(self._late(step), total=self.steps, warmup=self.warmup, **ends)

    def _late(self, step: int) -> int:
        return max(step - int(self.schedule_options.get("late", 0)), 0)


_OPTIONS: dict[str, tuple[str, ...]] = {
    "polynomial": ("power",),
    "steps": ("at", "factor"),
    "one_cycle": ("ratio", "div_factor", "final_div_factor", "base_momentum", "max_momentum", "late"),
    "constant": (),
    "cosine": (),
}


@dataclass
class FitReport:
    """What came of it. `evaluations`: (step it came after, counted from 1, numbers) in order, earlier starts included."""

    steps: int
    resumed_at: int  # the first step of this start
    seconds: float
    last: dict[str, float]  # the terms of the last logged step
    evaluations: list[tuple[int, dict[str, float]]]
    best: tuple[int, dict[str, float]] | None
    skipped_steps: int


# ---- what trains and what does not ----------------------------------------------------------------------------------


def backbones_in(module: nn.Module) -> dict[str, TokenModel]:
    """The backbones inside a task model, by the prefix of their keys ("" for a bare one)."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, TokenModel)}
    return {name: part for name, part in found.items() if not any(name.startswith(f"{other}.") for other in found)}


def head_tensors(module: nn.Module, tuned: Collection[str] = ()) -> dict[str, Tensor]:
    """The state dict without the backbones: parameters and buffers of the head, the module's own storage. What stands under
    several names (a detector's class heads) is there once, under the first. tuned: parameters of a backbone beside them."""
    inside = tuple(f"{name}." for name in backbones_in(module))
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():  # the objects themselves: on the meta device too
        if (name.startswith(inside) and name not in tuned) or id(value) in seen:
            continue
        seen.add(id(value))
        found[name] = value.detach()
    return found


def load_head_tensors(module: nn.Module, tensors: Mapping[str, Tensor], tuned: Collection[str] = ()) -> None:
    """Fills what `head_tensors` gives, in place; the names must be the same."""
    own = head_tensors(module, tuned)
    assert own.keys() == tensors.keys(), f"{sorted(own.keys() ^ tensors.keys())[:4]} differ"
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)


def freeze(module: nn.Module) -> nn.Module:
    """No parameter of a backbone gets a gradient from here on."""
    for backbone in backbones_in(module).values():
        backbone.requires_grad_(False)
    return module


def training_mode(module: nn.Module) -> None:
    """Training mode for the head; a backbone stays in evaluation (no stochastic depth, no drawn positions)."""
    module.train()
    for backbone in backbones_in(module).values():
        backbone.eval()


# ---- the loop -------------------------------------------------------------------------------------------------------


def fit(
    module: nn.Module,
    batches: Callable[[int], Batch],
    loss: Loss,
    config: FitConfig,
    run: RunDir | None = None,
    evaluate: Evaluate | None = None,
    resume: bool = True,
    *,
    about: Any = None,
    tuned: Mapping[str, float] | None = None,
) -> FitReport:
    """Fits all of `module` but its backbones, in place; in evaluation mode afterwards.

    `batches(step)` → anything that `loss(module, batch)` → `LossTerms` takes; tensors in it (in dicts, lists and tuples)
    are moved to the module's device. `evaluate(module)` → numbers, called in evaluation mode without gradients, on all
    processes. `run`: its folder; None writes and logs nothing. `about`: the configuration to keep as
    resolved.yaml, default `config`. tuned: parameters of a backbone that train all the same, with their learning rates
    as multiples of the others' (`train_head.tune`); weight decay leaves out their biases and norms. Raises `DinoError`: a
    wrong configuration, nothing to train, a loss that stays NaN.
    """
    check(config, "fitting")
    freeze(module)
    work = _Fit(module, config, run, tuned or {})
    first = work.resume() if resume else 0
    if run is not None:
        run.start(about if about is not None else config, iteration=first)
        checkpoints = Checkpoints(run.checkpoints)
        checkpoints.clean()
        count = sum(p.numel() for p in work.parameters)
        run.log(f"{f'resumed at step {first}' if first else 'started'}: {count:,} parameters, {config.steps} steps")
    began = time.perf_counter()
    last: dict[str, float] = {}
    save_every = config.save_every or max(1, config.steps // 20)
    progress = None
    if run is not None:
        progress = Progress(
            run, total=config.steps, images_per_step=config.batch, first=first, every=config.log_every,
            device=work.device,
        )  # fmt: skip
    training_mode(module)
    fetched = prefetched(batches, range(first, config.steps), config.workers)
    stop = StopRequest()
    with stop if run is not None else nullcontext():
        for step, batch in enumerate(fetched, first):
            if progress is not None:
                progress.fetched()
            terms = work.train_step(loss, moved(batch, work.device), step)
            done = step + 1
            record = progress.stepped(step, {"lr": config.lr_at(step)}, terms) if progress is not None else {}
            if record or done == config.steps:
                last = {name: record.get(name, float(value)) for name, value in terms.items()}
            at_end = done == config.steps
            if evaluate is not None and (at_end or (config.evaluate_every and done % config.evaluate_every == 0)):
                work.evaluated(done, evaluate)
            stopping = run is not None and stop.agreed(work.device) and not at_end
            if run is not None and (stopping or at_end or done % save_every == 0):
                work.save(step)
            if stopping:
                raise KeyboardInterrupt(f"{done} of {config.steps} steps are done and saved")
    if config.finish_with == "best" and work.best_tensors is not None:
        load_head_tensors(module, work.best_tensors, work.tuned)
    module.eval()
    if run is not None:
        run.log(plot(run.metrics_file, run.plots / "loss.png"))
        run.close()
    return FitReport(
        config.steps, first, time.perf_counter() - began, last, work.evaluations, work.best, work.skipped_steps
    )


class _Fit:
    """State of a fit: module, optimiser, evaluations, best head; and its checkpoints."""

    def __init__(self, module: nn.Module, config: FitConfig, run: RunDir | None, tuned: Mapping[str, float]) -> None:
        self.module, self.config, self.run, self.tuned = module, config, run, tuned
        for name in tuned:
            module.get_parameter(name).requires_grad_(True)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise DinoError("nothing to fit: no parameter outside the backbone requires a gradient")
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(self._groups(), lr=0.0, betas=(config.beta1, config.beta2))
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self.best: tuple[int, dict[str, float]] | None = None
        self.best_tensors: dict[str, Tensor] | None = None
        self.skipped_steps = self.bad_in_a_row = 0
        if distributed.world() > 1:
            norm_across_ranks(module)
            head = distributed.broadcast_object({k: v.cpu() for k, v in self._head().items()})
            load_head_tensors(module, head, tuned)

    def _head(self) -> dict[str, Tensor]:
        return head_tensors(self.module, self.tuned)

    def _groups(self) -> list[dict[str, Any]]:
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for row, p in zip(multipliers(self.module), self.module.parameters(), strict=True):
            if p.requires_grad:
                spared = row.wd_multiplier == 0 or p.ndim < 2 or "embed.weight" in row.name
                bare = spared and (self.config.decay == "matrices" or row.name in self.tuned)
                lr, wd = self.tuned.get(row.name, 1.0), 0.0 if bare else self.config.weight_decay
                group = groups.setdefault((lr, wd), {"params": [], "lr_multiplier": lr, "weight_decay": wd})
                group["params"].append(p)
        return list(groups.values())

    def train_step(self, loss: Loss, batch: Batch, step: int) -> dict[str, Tensor]:
        """One step; the terms, averaged over processes. Without a finite loss and gradient nothing moves."""
        c = self.config
        for group in self.optimizer.param_groups:
            group["lr"], group["betas"] = c.lr_at(step) * group["lr_multiplier"], (c.beta1_at(step), c.beta2)
        torch.manual_seed(seed_of(c.seed, step, distributed.rank()))  # what dropout draws
        with torch.autocast(self.device.type, torch.bfloat16) if c.precision == "bfloat16" else nullcontext():
            terms = loss(self.module, batch)
        self.optimizer.zero_grad(set_to_none=True)
        terms.total().backward()
        distributed.average_gradients(self.parameters)
        clip = c.clip if c.clip is not None else math.inf
        norm = nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], clip)
        log = terms.log() | {"grad_norm": norm}
        names, values = list(log), torch.stack([v.detach().float().to(self.device) for v in log.values()])
        values = distributed.all_reduce(values, "mean")  # so that all processes decide alike
        log = dict(zip(names, values))
        if bool(values.isfinite().all()):
            self.optimizer.step()
            self.bad_in_a_row = 0
        else:
            self._not_finite(step, log)
        return log

    def _not_finite(self, step: int, log: Mapping[str, Tensor]) -> None:
        self.skipped_steps += 1
        self.bad_in_a_row += 1
        names = ", ".join(name for name, v in log.items() if not bool(v.isfinite()))
        if self.run is not None:
            self.run.log(f"step {step}: {names} not finite; no step ({self.bad_in_a_row} of {MAX_BAD_STEPS} in a row)")
        if self.bad_in_a_row >= MAX_BAD_STEPS:
            raise DinoError(
                f"the fit stopped at step {step}: {names} not finite {MAX_BAD_STEPS} times in a row; lower the learning "
                f"rate ({self.config.lr:g}), set clip, or check the data (the checkpoints are from before)"
            )

    def evaluated(self, done: int, evaluate: Evaluate) -> None:
        """Evaluates, logs, and stores the head if it is the best so far."""
        self.module.eval()
        with torch.no_grad():
            numbers = {k: float(v) for k, v in evaluate(self.module).items()}
        training_mode(self.module)
        numbers = distributed.broadcast_object(numbers)
        self.evaluations.append((done, numbers))
        better = self._better(numbers)
        if better:
            self.best = (done, numbers)
            self.best_tensors = {k: v.clone() for k, v in self._head().items()}
        if self.run is None:
            return
        self.run.record(done - 1, numbers)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if "/" not in name)
        self.run.log(f"after {done} steps: {shown}{' (best)' if better else ''}")
        if better and self.run.writer:
            assert self.best_tensors is not None
            write_safetensors(self.best_tensors, self.run.checkpoints / BEST, {"step": str(done)})

    def _better(self, numbers: Mapping[str, float]) -> bool:
        name = self.config.best_by
        if not name:
            return False
        one_of("best_by", name, numbers)
        value, sign = numbers[name], 1 if self.config.best_is == "highest" else -1
        if math.isnan(value):
            return False
        return self.best is None or sign * value > sign * self.best[1][name]

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        head = {f"head.{k}": v for k, v in self._head().items()}
        return head | checkpoint.optimizer_tensors(self.optimizer, self.module)

    def save(self, step: int) -> None:
        assert self.run is not None
        state = {"step": step, "evaluations": self.evaluations, "best": self.best, "skipped_steps": self.skipped_steps}
        Checkpoints(self.run.checkpoints, max_to_keep=self.config.keep).save(step, self._tensors(), state)

    def resume(self) -> int:
        """Resumes from the newest checkpoint that can be read; the step to begin with."""
        if self.run is None:
            return 0
        state = Checkpoints(self.run.checkpoints).resume(self._read, self.run.log)
        if state is None:
            return 0
        self.evaluations = [(int(done), dict(numbers)) for done, numbers in state["evaluations"]]
        self.skipped_steps = int(state["skipped_steps"])
        if state["best"] is not None:
            assert self.run is not None
            tensors, about = read(self.run.checkpoints / BEST)
            # a best head found after the checkpoint was written is found again
            if int(about["step"]) == int(state["best"][0]):
                self.best = (int(state["best"][0]), dict(state["best"][1]))
                self.best_tensors = {k: v.to(self.device) for k, v in tensors.items()}
        return int(state["step"]) + 1

    def _read(self, path: Path) -> dict[str, Any]:
        if missing := checkpoint.load(path, self._tensors()):
            raise DinoError(f"{path} was made by another head: it has no {missing[0]}; use another folder")
        return checkpoint.read_state(path, "step", "evaluations", "best", "skipped_steps")


# ---- batches --------------------------------------------------------------------------------------------------------


def seed_of(*numbers: int) -> int:
    """A seed that differs wherever any of the numbers does: (run's seed, step, rank, …)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def shuffled(n: int, size: int, step: int, *, seed: int = 0, rank: int = 0, world: int = 1) -> list[int]:
    """The `size` indices below n that this rank's batch of a step has: every epoch a permutation of its own, used up to
    its last index before the next begins (a batch may hold the end of one and the start of another).

        order = permutation of epoch 0 + permutation of epoch 1 + …;  order[(step·world + rank)·size:][:size]
    """
    if n < 1:
        raise DinoError("there is no image to draw a batch from")
    first = (step * world + rank) * size
    orders = {
        e: np.random.default_rng((seed, e)).permutation(n) for e in range(first // n, (first + size - 1) // n + 1)
    }
    return [int(orders[i // n][i % n]) for i in range(first, first + size)]


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device; dicts, lists and tuples are gone through, everything else is left."""
    return tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)


# ---- several processes ----------------------------------------------------------------------------------------------


class BatchNormAcrossRanks(nn.BatchNorm2d):
    """A batch norm whose training statistics are those of all processes' images; the same keys, evaluation unchanged.

    (torch's `SyncBatchNorm` does this on accelerators only.) Each process brings mean, sum of squared distances from it
    and count; joined, M2 = Σ M2_r + Σ n_r·(mean_r − mean)². Their gradients go back to all processes.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or distributed.world() == 1:
            return super().forward(x)
        n = x.new_full((1,), x.numel() / x.shape[1], dtype=torch.float32)
        mean_r = x.float().mean((0, 2, 3))
        m2_r = (x.float() - mean_r[:, None, None]).square().sum((0, 2, 3))
        parts = distributed.all_gather_with_gradient(torch.cat([mean_r, m2_r, n])[None])  # [W, 2C + 1]
        means, m2s, counts = parts[:, : len(mean_r)], parts[:, len(mean_r) : -1], parts[:, -1:]
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        m2 = m2s.sum(0) + (counts * (means - mean).square()).sum(0)
        var = m2 / total
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked += 1
                rate = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
                self.running_var.lerp_((m2 / (total - 1)).to(self.running_var.dtype), rate)
        y = (x.float() - mean[:, None, None]) * torch.rsqrt(var + self.eps)[:, None, None]
        if self.affine:
            y = y * self.weight.float()[:, None, None] + self.bias.float()[:, None, None]
        return y.to(x.dtype)


def norm_across_ranks(module: nn.Module) -> nn.Module:
    """Every 2-d batch norm outside the backbones becomes a `BatchNormAcrossRanks`, in place, with its own tensors."""
    inside = tuple(f"{name}." for name in backbones_in(module))
    for name, part in module.named_modules():
        if type(part) is nn.BatchNorm2d and not name.startswith(inside):
            part.__class__ = BatchNormAcrossRanks
    return module


# ---- cached features -------------------------------------------------------------------------------------------------
# Cached features: while a head is fitted, the frozen backbone runs once an image.
#
#     with cached_features(model, folder=run.path / "features"):
#         fit(model, …)
#
# Outputs are cached by the content of the image (the bytes of its tensor) and of the call (which layers), so nothing can be
# out of date, mirrored images are images of their own, and the caller (an adapter, windows, a linear head) need not know.
# Every image is run alone, whatever batch it came in: a killed and resumed fit sees the very same numbers. Where images are
# augmented at random a cache does not help: leave it out.
#
# Memory first; beyond `most_bytes` into the folder, if one is given, else the image is computed again every time.


METHODS = ("get_intermediate_layers", "forward_features")


class FeatureCache:
    """Outputs by key; in memory while they fit, then as files."""

    def __init__(self, most_bytes: int, folder: Path | None) -> None:
        self.most_bytes, self.folder = most_bytes, folder
        self.cached: dict[str, Any] = {}
        self.bytes = self.requests = self.computed = 0

    def __call__(self, key: str, compute: Callable[[], Any], device: torch.device) -> Any:
        self.requests += 1
        if key in self.cached:
            return moved(self.cached[key], device)
        file = self.folder / f"{key}.pt" if self.folder is not None else None
        if file is not None and file.is_file():
            return torch.load(file, map_location=device, weights_only=True)
        self.computed += 1
        output = compute()
        size = sum(t.numel() * t.element_size() for t in tree_leaves(output))
        if self.bytes + size <= self.most_bytes:
            self.cached[key] = tree_map(lambda t: t.to("cpu").clone(), output)
            self.bytes += size
        elif file is not None:
            write_torch(tree_map(lambda t: t.to("cpu").clone(), output), file)
        return output


@contextmanager
def cached_features(
    module: nn.Module, *, most_bytes: int = 2 << 30, folder: str | os.PathLike[str] | None = None
) -> Iterator[FeatureCache]:
    """A context in which the backbones inside `module` cache their outputs. The folder is removed at the end.

    Of `forward_features` only the input of a classifier is cached: the patches as their mean (of one).
    """
    cache = FeatureCache(most_bytes, Path(folder) if folder is not None else None)
    backbones = list(backbones_in(module).values())
    for i, backbone in enumerate(backbones):
        for method in METHODS:
            # an instance's attribute stands before its class's method; nothing else of the model changes
            setattr(backbone, method, _cached(getattr(backbone, method), f"{i}.{method}", cache))
    try:
        yield cache
    finally:
        for backbone in backbones:
            for method in METHODS:
                delattr(backbone, method)
        if cache.folder is not None:
            shutil.rmtree(cache.folder, ignore_errors=True)


def _cached(method: Callable[..., Any], name: str, cache: FeatureCache) -> Callable[..., Any]:
    @torch.no_grad()
    def cached_call(x: Tensor, *args: Any, **options: Any) -> Any:
        call = f"{name} {args!r} {sorted(options.items())!r} {x.dtype} {tuple(x.shape[1:])}"

        def output(one: Tensor) -> Any:
            out = method(one, *args, **options)
            if not isinstance(out, dict):
                return out
            patches = out["x_norm_patchtokens"].mean(1, keepdim=True)
            return {"x_norm_clstoken": out["x_norm_clstoken"], "x_norm_patchtokens": patches}

        outputs = [cache(_key(call, one), partial(output, one), x.device) for one in x.split(1)]
        return tree_map(lambda *of_each: torch.cat(of_each), *outputs)

    return cached_call


def _key(call: str, one: Tensor) -> str:
    digest = hashlib.blake2b(call.encode(), digest_size=16)
    digest.update(one.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
