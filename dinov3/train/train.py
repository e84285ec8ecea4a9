"""Self-supervised training (paper §3, §4): one loop for all stages, on a CPU, on one GPU, on many machines.

    python dinov3/train/train.py --config-file FILE --output-dir OUT [key.sub=value …]
    torchrun --nproc-per-node 8 dinov3/train/train.py …             # the same, sharded
    python -m dinov3.run.submit dinov3/train/train.py --nodes 4 …   # the same, on a cluster

Pre-training, Gram anchoring and high resolution are one loop with three configurations. The same command continues a run
that ended, for whatever reason: everything is in `<OUT>/ckpt`. A signal (Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2) or the time
limit ends it after the current iteration, with a checkpoint. A step whose loss or gradient is not finite is left out, and
after three in a row the run stops; neither it nor any other NaN reaches a checkpoint.

Left out: what is learned (`method`), how a run is put together (`assembly`), how models are spread over devices
(`dinov3.parallel`).
"""

from __future__ import annotations

import sys

if __package__ in (None, ""):  # run as a file: import the package it lies in, and nothing that lies beside it
    from pathlib import Path as _Path

    sys.path[0] = str(_Path(__file__).resolve().parents[2])

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov3 import checkpoint, distributed
from dinov3.config.conditions import check_scale
from dinov3.config.recipes import load_config
from dinov3.config.train import TrainConfig
from dinov3.distributed import Group
from dinov3.errors import DinoError, did_you_mean
from dinov3.optim import apply_schedules, clip_per_module
from dinov3.parallel import precision, reduce_gradients, reshard
from dinov3.runlog import Progress, RunDir, plot
from dinov3.train.assembly import Trainer, assemble, deterministic, due
from dinov3.train.method import gram_active
from dinov3.train.stopping import StopRequest

MAX_BAD_STEPS = 3  # in a row


@dataclass
class Outcome:
    """How a call of `train` ended."""

    iterations: int  # finished, of all starts of this run
    total: int
    reason: str  # "finished", or what asked it to stop
    signal: int | None = None
    checkpoint: Path | None = None
    error: str | None = None  # what ended it, raised once all is saved
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

    `seed`: of weights, and (plus the rank) of random draws in the network; the order of the images is
    `config.train.seed`. `notes`: lines for the log. `near`: the folder that relative paths in the configuration refer to.
    """
    device = distributed.setup(None if config.run.device == "auto" else config.run.device)
    check_scale(config, distributed.world())
    config = replace(config, train=replace(config.train, output_dir=str(Path(out).absolute())))
    run = RunDir(out, writer=distributed.is_main())
    with run.claimed(), deterministic(config.run.deterministic):
        if not resume:
            put_aside(run)
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
            fetched, waited = True, t.loader.waited_s
            before = checkpoint.random_states() if c.optim.accumulation_steps > 1 and distributed.world() == 1 else None
            for nth in range(c.optim.accumulation_steps):
                batch = t.fetch(batches, stop)
                if batch is None:
                    fetched = False
                    break
                with precision(t.device, c.compute_precision.param_dtype, t.group):
                    batch = method.receive(batch)
                    targets = method.targets(batch, values)
                    terms = method.predict(batch, targets, values)
                reduce_gradients(method.student.parts(), nth + 1 == c.optim.accumulation_steps)
                (terms.total() / c.optim.accumulation_steps).backward()
                logs.append(terms.log())
            if not fetched:  # asked to stop while waiting for data
                if before is not None:
                    checkpoint.restore_random_states(
                        before
                    )  # what the abandoned step's first batches drew is drawn again
                break
            progress.fetched(t.loader.waited_s - waited)
            reshard(method.student.parts())
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
            # -- an error of this rank ends them all: alone at once, among several after a step more
            wrong = t.report_unreadable() if told else None
            if in_a_row >= MAX_BAD_STEPS:
                wrong = (
                    f"stopped at iteration {it}: the loss or its gradient was not finite {MAX_BAD_STEPS} times in a row. "
                    f"The newest checkpoint is sound ({outcome.checkpoint or 'none yet'}). Try a lower rate (optim.lr), a "
                    "longer warm-up, smaller optim.clip_grad, or compute_precision.param_dtype=fp32"
                )
                if not t.several:  # its ranks all know
                    raise DinoError(wrong)
            if wrong is not None and it + 1 < total:
                outcome.error, stop.reason = wrong, "an error"
                asked = asked or distributed.world() == 1

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
            outcome.error = next(filter(None, distributed.gather_objects(outcome.error)), None)
        else:
            outcome.error = None  # the step in which the others would have heard of it was the last
    if outcome.iterations > first:
        progress.close()
    if run.writer:
        run.say(plot(run.metrics_file, run.plots / "losses.png"))
    if outcome.error is not None:
        raise DinoError(outcome.error)
    return outcome


def put_aside(run: RunDir, group: Group = None) -> None:
    """What a run that is begun anew had saved, under other names: nothing later may go on from it or take it for its own."""
    for folder in (run.checkpoints, run.evaluations):
        if distributed.rank(group) == 0 and folder.is_dir() and any(folder.iterdir()):
            n = 1
            while folder.with_name(f"{folder.name}.{n}").exists():
                n += 1
            folder.rename(folder.with_name(f"{folder.name}.{n}"))
    distributed.barrier()


def not_finite_names(log: dict[str, Tensor], norms: dict[str, Tensor]) -> str:
    values = log | {f"gradient of {name}": norm for name, norm in norms.items()}
    bad = [f"{name} {float(v)}" for name, v in values.items() if not math.isfinite(float(v))]
    return ", ".join(bad) or "another process has a loss that is not finite"


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
