"""The training loop: fetch, targets, predict, backward, clip, step, EMA, Gram refresh, log, evaluate, save.

A stop request (signal or time limit) ends it after the current iteration (on several ranks after the next), with a
checkpoint. A step whose loss or gradient is not finite is skipped by the optimiser (the average moves, towards the student
as it was); three in a row end the run, and no NaN reaches a checkpoint. Between backward pass and step nothing waits for
the device: whether a step was finite is read in the next iteration, or at once where there is something to log or save.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov3 import checkpoint, distributed
from dinov3.distributed import Group
from dinov3.errors import DinoError
from dinov3.optim import StepValues, apply_schedules, clip_per_module
from dinov3.parallel import DTYPES, precision, reduce_gradients, reshard
from dinov3.runlog import Progress, RunDir, StopRequest, plot
from dinov3.train.assembly import Trainer, Verdict, due
from dinov3.train.method import gram_active

MAX_BAD_STEPS = 3  # in a row


@dataclass
class Outcome:
    """How a call of `train` ended."""

    iterations: int  # finished, of all starts of this run
    total: int
    reason: str  # "finished", or what requested the stop
    signal: int | None = None
    checkpoint: Path | None = None
    error: str | None = None  # what ended it, raised once all is saved
    skipped_steps: int = 0  # of this start
    bad_steps: int = 0  # not finite, in a row
    knn: dict[int, float] = field(default_factory=dict)  # iteration → accuracy, of this start

    @property
    def finished(self) -> bool:
        return self.iterations >= self.total


def loop(trainer: Trainer, first: int) -> Outcome:
    """Trains from iteration `first` to the end of the schedules, or until a stop is requested."""
    t, c, run, method = trainer, trainer.config, trainer.run, trainer.method
    total = t.schedules.total
    outcome = Outcome(first, total, "finished", checkpoint=t.checkpoints.latest())
    if is_over(t, outcome):
        return outcome
    run.log(t.introduction(first))
    began = time.perf_counter()
    t.begin_guard(first)
    for warning in t.doctor.at_start():
        run.log(warning)
    progress = Progress(
        run, total=total, images_per_step=t.global_batch, first=first, every=c.run.log_every, device=t.device
    )
    unread: list[Verdict] = []
    with StopRequest(c.run.time_limit_minutes) as stop, t.checkpoints:
        batches = iter(t.loader)
        for it in range(first, total):
            last = it + 1 == total
            values = scheduled(t, it)
            logs = gradients(t, batches, values, stop, progress)
            if logs is None:  # a stop was requested while waiting for data
                break
            norms = clip_per_module(method.student.parts(), c.optim.clip_grad)
            verdict = t.agree(it, logs, norms, stop)
            t.optimizer.found_inf = verdict.bad
            t.optimizer.step()  # changes nothing where something is not finite
            method.update_ema(values.momentum)
            if method.refresh_gram(it):
                run.log(f"iteration {it}: the Gram teacher is now a copy of the teacher")
            outcome.iterations, t.consumed = it + 1, t.loader.consumed
            unread.append(verdict)
            dumping = due(it, c.evaluation.eval_period_iterations) or (last and c.evaluation.eval_period_iterations > 0)
            saving, evaluating = due(it, c.checkpointing.period) or last, t.knn_due(it, last)
            if t.guard is not None:  # the average of a frozen backbone is the start
                evaluating = not values.frozen and (evaluating or (dumping and t.guard.labelled))
                dumping |= it + 1 == t.schedules.frozen  # heads that are warm are a good state
            # alone, a request is known at once; several ranks must read in the same iterations, and decide alike
            stopping = distributed.world() == 1 and stop.requested()
            reading = stopping or saving or dumping or evaluating or progress.due(it)
            stopping |= settle(outcome, t, unread, leave=0 if reading else 1)
            logged = progress.stepped(it, values.fields(), t.fields(verdict.log, norms, values))
            for warning in t.doctor.warnings(it, logged):
                run.log(warning)
            if has_error(outcome, t, it, bool(logged)) and not last:
                stop.reason = "an error"
                # with several ranks the others learn it in the next step
                stopping = stopping or distributed.world() == 1
            watched = time.perf_counter()
            if evaluating:
                outcome.knn[it] = t.evaluate(it)
            if guarded(t, outcome, it, due=dumping, frozen=values.frozen):  # a good state, perhaps an earlier one
                saving = dumping = True
            if t.guard is not None:
                t.guard.seconds += time.perf_counter() - watched
            if dumping:
                t.dump(it)
            if t.doctor.due(it, dumping):
                t.doctor.measure(it, t.consumed)
            if t.guard is not None and t.guard.ended:
                stop.reason, stopping = "the guard", True
            if saving or stopping:
                outcome.checkpoint = t.save(it, wait=last or stopping)
            if stopping and not last:
                break
        settle(outcome, t, unread, leave=0)
        conclude(outcome, t, first, stop)
    if outcome.iterations > first:
        progress.close()
        if t.guard is not None:
            run.log(t.guard.cost(time.perf_counter() - began))
    if run.writer:
        run.log(plot(run.metrics_file, run.plots / "losses.png"))
    if outcome.error is not None:
        raise DinoError(outcome.error)
    return outcome


def is_over(t: Trainer, outcome: Outcome) -> bool:
    """Whether an earlier start has ended this run; the log says so."""
    first, total = outcome.iterations, outcome.total
    if first >= total:
        t.run.log(f"nothing to do: {first} of {total} iterations are done (optim.iterations, --steps, sets the total)")
    elif t.guard is not None and t.guard.ended:
        outcome.reason = "the guard"
        t.run.log(f"nothing to do: {t.guard.last_word(first - 1)}")
    else:
        return False
    return True


# ---- a step's parts -------------------------------------------------------------------------------------------------


def scheduled(t: Trainer, it: int) -> StepValues:
    """Learning rates, weight decay, momentum, temperature and loss weights of an iteration, set in the optimiser."""
    values = t.schedules.at(it)
    if not gram_active(t.config.gram, it) or values.frozen:  # without a gradient it would only cost a forward pass
        values = replace(values, gram_loss_weight=0.0)
    if t.guard is not None:
        values = values.slower(t.guard.state.lr_factor)
    apply_schedules(t.optimizer, values)
    t.optimizer.zero_grad(set_to_none=True)
    return values


def gradients(
    t: Trainer, batches: Iterator[Any], values: StepValues, stop: StopRequest, progress: Progress
) -> list[dict[str, Tensor]] | None:
    """Fetch, targets, predict, backward; several batches where they are accumulated. The terms of each batch, or None if
    a stop was requested while waiting for data."""
    n, method = t.config.optim.accumulation_steps, t.method
    logs, waited = [], t.loader.waited_s
    before = checkpoint.random_states() if n > 1 and distributed.world() == 1 else None
    for nth in range(n):
        batch = t.fetch(batches, stop)
        if batch is None:
            if before is not None:  # what the abandoned step's first batches drew is drawn again
                checkpoint.restore_random_states(before)
            return None
        with precision(t.device, t.config.compute_precision.param_dtype):
            batch = method.receive(batch, DTYPES[t.config.compute_precision.param_dtype])
            targets = method.targets(batch, values)
            terms = method.predict(batch, targets, values)
        t.doctor.watch(batch, targets)
        reduce_gradients(method.student.parts(), nth + 1 == n)
        (terms.total() / n).backward()
        logs.append(terms.log())
    progress.fetched(t.loader.waited_s - waited)
    reshard(method.student.parts())
    return logs


def settle(outcome: Outcome, t: Trainer, unread: list[Verdict], *, leave: int) -> bool:
    """Reads what iterations came to, but for the last `leave`, so that the device need not be waited for: counts and logs
    skipped steps. Whether a stop is requested."""
    stopping = False
    while len(unread) > leave:
        verdict = unread.pop(0)
        finite, requested = verdict.read()
        stopping |= requested
        outcome.bad_steps = 0 if finite else outcome.bad_steps + 1
        outcome.skipped_steps += not finite
        if not finite:
            bad = f"{outcome.bad_steps} of {MAX_BAD_STEPS} in a row"
            what = not_finite_names(verdict.log, verdict.norms)
            t.run.log(f"iteration {verdict.iteration}: {what}; step skipped ({bad})")
        if outcome.bad_steps == MAX_BAD_STEPS:
            break  # the run ends here, whatever came after
    return stopping


def guarded(t: Trainer, outcome: Outcome, it: int, *, due: bool, frozen: bool) -> bool:
    """The guard's part of an iteration: where it is `due`, or steps were not finite, the state is the last good one
    afterwards, this one or an earlier one that came back. Whether it is: then it must be saved."""
    guard = t.guard
    if guard is None:
        return False
    fell = None
    if outcome.bad_steps >= MAX_BAD_STEPS:
        fell = f"the loss or its gradient was not finite {MAX_BAD_STEPS} times in a row"
        outcome.bad_steps = 0
    elif not due:
        return False
    elif not frozen:
        began = time.perf_counter()
        measured = guard.measure(t.method.ema.backbone, outcome.knn.get(it))
        t.run.record(it, {f"guard_{name}": value for name, value in measured.items()})
        if not guard.labelled:
            t.run.log(f"iteration {it}: {guard.words(measured)} ({time.perf_counter() - began:.1f} s)")
        fell = guard.fall(measured)
    if fell is not None:
        path = t.restore()
        guard.lower()
        t.run.log(f"iteration {it}: {fell}; back to {path}, {guard.consequence()}")
    guard.state.good = it
    return True


def has_error(outcome: Outcome, t: Trainer, it: int, logged: bool) -> bool:
    """Whether this rank must end the run, with the sentence in `outcome.error`: too many unreadable images, or too many
    steps that were not finite. The latter all ranks know, so that they raise together."""
    error = t.report_unreadable() if logged else None
    if outcome.bad_steps >= MAX_BAD_STEPS and t.guard is None:
        error = (
            f"stopped at iteration {it}: the loss or its gradient was not finite {MAX_BAD_STEPS} times in a row. "
            f"The newest checkpoint is sound ({outcome.checkpoint or 'none yet'}). Try a lower learning rate (optim.lr), a "
            "longer warm-up, smaller optim.clip_grad, or compute_precision.param_dtype=fp32"
        )
        if not t.multi_student:
            raise DinoError(error)
    if error is not None and outcome.iterations < outcome.total:
        outcome.error = error
    return error is not None


def conclude(outcome: Outcome, t: Trainer, first: int, stop: StopRequest) -> None:
    """A run that stops early saves what it has; errors of other ranks are exchanged."""
    if outcome.iterations >= outcome.total:
        outcome.error = None  # it would have been exchanged in the next step, and this was the last
        return
    outcome.reason, outcome.signal = stop.reason or "another process requested a stop", stop.signal
    if outcome.iterations > first and not t.saved_at(outcome.iterations - 1):
        outcome.checkpoint = t.save(outcome.iterations - 1)
    if t.guard is not None and t.guard.ended:
        t.run.log(t.guard.last_word(outcome.iterations - 1))
    else:
        where = (
            f"after iteration {outcome.iterations - 1}; everything is in {outcome.checkpoint}, the same command resumes"
        )
        if outcome.iterations == 0:
            where = "before the first step; nothing is lost, and the same command starts again"
        t.run.log(f"stopped by {outcome.reason} {where}")
    outcome.error = next(filter(None, distributed.gather_objects(outcome.error)), None)


def not_finite_names(log: dict[str, Tensor], norms: dict[str, Tensor]) -> str:
    values = log | {f"gradient of {name}": norm for name, norm in norms.items()}
    bad = [f"{name} {float(v)}" for name, v in values.items() if not math.isfinite(float(v))]
    return ", ".join(bad) or "another process has a loss that is not finite"


def archive(run: RunDir, group: Group = None) -> None:
    """Renames checkpoints and dumps of an earlier start, so that a fresh start neither resumes from them nor adopts them."""
    for folder in (run.checkpoints, run.evaluations):
        if distributed.rank(group) == 0 and folder.is_dir() and any(folder.iterdir()):
            n = 1
            while folder.with_name(f"{folder.name}.{n}").exists():
                n += 1
            folder.rename(folder.with_name(f"{folder.name}.{n}"))
    distributed.barrier()
