"""Self-supervised training (paper §3, §4): one loop for all stages, on a CPU, on one GPU, on many machines.

    python dinov3/train/train.py --config-file FILE --output-dir OUT [key.sub=value …]
    torchrun --nproc-per-node 8 dinov3/train/train.py …             # the same, sharded
    python -m dinov3.run.submit dinov3/train/train.py --nodes 4 …   # the same, on a cluster

Pre-training, Gram anchoring and high resolution are one loop with three configurations. The same command continues a run
that ended, for whatever reason: everything is in `<OUT>/ckpt`. A signal (Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2) or the time
limit ends it after the current iteration, with a checkpoint.

The loop is in `loop`, what is learned in `method`, how a run is assembled in `assembly`, how models are sharded in
`dinov3.parallel`.
"""

from __future__ import annotations

import sys

if __package__ in (None, ""):  # run as a file: import the package it lies in, and nothing that lies beside it
    from pathlib import Path as _Path

    sys.path[0] = str(_Path(__file__).resolve().parents[2])

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinov3 import distributed
from dinov3.config.loading import dump
from dinov3.config.train import TrainConfig, check_scale, load_config
from dinov3.errors import DinoError, did_you_mean
from dinov3.runlog import RunDir
from dinov3.train.assembly import assemble, deterministic, setup
from dinov3.train.loop import Outcome, archive, loop

# ---- a run ---------------------------------------------------------------------------------------------------------


def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = True,
    seed: int = 0,
    notes: Sequence[str] = (),
    base_dir: Path | None = None,
) -> Outcome:
    """Trains in the folder `out`, from its newest checkpoint if there is one and `resume`; alone, or with the other ranks.

    `seed`: of weights, and (plus the rank) of random draws in the network; the order of the images is
    `config.train.seed`. `notes`: lines for the log. `base_dir`: the folder that relative paths in the configuration refer to.
    """
    joined = distributed.together()
    device = setup(config)
    check_scale(config, distributed.world())
    config = replace(config, train=replace(config.train, output_dir=str(Path(out).absolute())))
    run = RunDir(out, writer=distributed.is_main())
    with run.claimed(), deterministic(config.run.deterministic):
        if not resume:
            archive(run)
        trainer = assemble(config, run, device, seed=seed, base_dir=base_dir)
        first = trainer.resume() if resume else 0
        run.start(config, iteration=first, sinks=config.run.sinks)
        if run.writer:
            dump(config, run.path / "config.yaml")  # the name that the reference's evaluation commands give
        for note in [*notes, *trainer.notes]:
            run.log(f"note: {note}")
        try:
            return loop(trainer, first)
        finally:
            run.close()
            if not joined and distributed.world() == 1:
                distributed.shutdown()  # a group of one, which sharding made


# ---- the command ----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Options and key=value overrides in any order; an unknown option is an error with suggestions."""

    def error(self, message: str) -> Any:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        known = [o for action in self._actions for o in action.option_strings]
        if message.startswith("unrecognized") and unknown:
            message = f"unknown option {unknown[0]}{did_you_mean(unknown[0].split('=')[0], known)}"
        super().error(message)


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="train.py", description="Self-supervised training of DINOv3 models.")
    p.add_argument("--config-file", required=True, help="a YAML file, or the name of one of the shipped recipes")
    p.add_argument("--output-dir", default="./local_dino", help="where everything goes; an existing run is resumed")
    p.add_argument("--no-resume", action="store_true", help="start from scratch; existing checkpoints are archived")
    p.add_argument("--seed", type=int, default=0, help="of weights and random draws (the data's is train.seed)")
    p.add_argument("--multi-distillation", action="store_true", help="several students of one teacher at once")
    p.add_argument("overrides", nargs="*", metavar="key.sub=value", help="overrides of the file")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0 finished or stopped on request, 1 for an error, which is one sentence."""
    options = parser().parse_intermixed_args(None if argv is None else list(argv))
    try:
        run_command(options)
    except (DinoError, OSError) as error:  # the process group stays: others may wait in it, and are ended from outside
        report(error)
        return 1
    distributed.shutdown()
    return 0


def report(error: Exception) -> None:
    """One line on stderr. Before processes meet all make the same mistakes, which the first reports."""
    try:
        number = distributed.detect().rank
    except DinoError:
        number = 0
    if number == 0 or (distributed.together() and not isinstance(error, distributed.ErrorElsewhere)):
        who = "" if number == 0 else f"[rank {number}] "
        print(f"error: {who}{error}", file=sys.stderr)


def run_command(options: argparse.Namespace) -> Outcome:
    overrides = list(options.overrides)
    config, notes = load_config(options.config_file, overrides)
    base_dir = Path(options.config_file).parent
    resume, seed = not options.no_resume, options.seed
    if options.multi_distillation or config.multidistillation.enabled:
        from dinov3.train.multi_distill import train_students

        return train_students(options.config_file, overrides, options.output_dir, resume=resume, seed=seed)
    return train(config, options.output_dir, resume=resume, seed=seed, notes=notes, base_dir=base_dir)


if __name__ == "__main__":
    sys.exit(main())
