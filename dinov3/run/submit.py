"""Starts a script of this package on a SLURM cluster, or on this machine where there is none.

    python -m dinov3.run.submit dinov3/train/train.py --nodes 4 --config-file FILE --output-dir OUT/%j key.sub=value …

Launcher options and the script's own may stand in any order; unknown ones are the script's. With SLURM
(`sbatch` is there; needs `pip install 'dinov3[slurm]'`) one job is queued, one task for each GPU. Two minutes before its time
is up, or when it is preempted, the script is signalled, saves and ends, and the job queues itself again. Without SLURM the
script runs here and now: in one process, or with `--ngpus N` in N that work together.

`%j` in the output folder becomes the job's number, in the script's arguments too. What differs from the reference: no
partition, account or quality of service is taken for granted, `--slurm-account` is passed on, and N local processes are
N ranks of one run (there: N runs in one folder).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dinov3.errors import DinoError, printable, require, without_secrets
from dinov3.files import nonexistent

PACKAGE = Path(__file__).resolve().parents[1]
SIGNAL_SECONDS = 120  # between the signal and the end
MAX_REQUEUES = 30


@dataclass
class Job:
    """What runs in every task of a SLURM job; pickled by submitit."""

    script: str
    function: str
    arguments: list[str]

    def __call__(self) -> int:
        number = os.environ.get("SLURM_JOB_ID", "")
        return call(self.script, self.function, [a.replace("%j", number) for a in self.arguments])

    def checkpoint(self) -> Any:
        """Submitit calls this when the time is up: the same job again, which resumes from the newest checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def script_path(script: str) -> Path:
    """A script's file: as named from here, or one of the package's (`dinov3/train/train.py`) from any folder."""
    for path in (Path(script), PACKAGE.parent / script):
        if path.is_file():
            return path.resolve()
    raise DinoError(nonexistent(script))


def call(script: str, function: str, arguments: Sequence[str]) -> int:
    """Imports a script by its path and calls a function of it with a list of arguments; its exit status."""
    path = script_path(script)
    if path.is_relative_to(PACKAGE):  # one of ours: under its real name, so that it exists once
        module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    else:
        spec = importlib.util.spec_from_file_location(f"submitted.{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise DinoError(f"{script} has no function {function!r} to call (--callable-name)")
    result = getattr(module, function)(list(arguments))
    return result if isinstance(result, int) else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m dinov3.run.submit",
        description="Runs a script on a SLURM cluster, or here. Unknown options and key=value overrides go to the script.",
        allow_abbrev=False,  # or --config would be taken for something of ours
    )
    p.add_argument("script", help="path of a Python file with a function main(arguments)")
    p.add_argument("--ngpus", "--nprocs", type=int, help="processes per node, one GPU each (SLURM: 8, here: 1)")
    p.add_argument("--nodes", type=int, default=1)
    p.add_argument("--timeout", type=int, default=2800, help="minutes")
    p.add_argument("--cpus-per-task", type=int, default=16)
    p.add_argument("--slurm-partition")
    p.add_argument("--slurm-qos")
    p.add_argument("--slurm-account")
    p.add_argument("--slurm-nice", type=int, default=0)
    p.add_argument("--slurm-array-parallelism", type=int, help="accepted, and without effect: one job is queued")
    p.add_argument("--comment", default="")
    p.add_argument("--exclude", default="", help="machines to avoid")
    p.add_argument("--output-dir", default="experiments/%j", help="logs and results; %%j is the job's number")
    p.add_argument("--callable-name", default="main")
    p.add_argument("--call", action="store_true", help=argparse.SUPPRESS)  # one of several local processes
    return p


def main(argv: Sequence[str] | None = None) -> int:
    options, rest = parser().parse_known_args(None if argv is None else list(argv))
    for argument in [a for a in rest if a.startswith(("output_dir=", "output-dir="))]:  # the evaluations' way to say it
        rest.remove(argument)
        value = argument.partition("=")[2]
        options.output_dir = options.output_dir if value in ("", "null") else value
    try:
        if options.call:
            return call(options.script, options.callable_name, [f"--output-dir={options.output_dir}", *rest])
        return submit(options, rest) if shutil.which("sbatch") else run_here(options, rest)
    except DinoError as error:
        log(f"error: {error}")
        return 1


def log(text: str) -> None:
    print(printable(without_secrets(text), lines=True), file=sys.stderr, flush=True)


# ---- here -----------------------------------------------------------------------------------------------------------


def run_here(options: argparse.Namespace, rest: list[str]) -> int:
    """In this process, or in several that torchrun starts and joins."""
    if options.nodes > 1:
        raise DinoError(
            f"{options.nodes} nodes need a cluster, and there is no SLURM here (no sbatch). On machines without it, start "
            f"torchrun --nnodes {options.nodes} … {options.script} on each of them"
        )
    script_path(options.script)  # a misspelt one is noticed before anything is announced
    processes = options.ngpus or 1
    output = options.output_dir.replace("%j", f"local-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}")
    what = "one process" if processes == 1 else f"{processes} processes of one run"
    log(f"there is no SLURM on this machine: {options.script} runs here, in {what}; results go to {output}")
    if processes == 1:
        return call(options.script, options.callable_name, [f"--output-dir={output}", *rest])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "dinov3.run.submit", "--call", f"--callable-name={options.callable_name}"]
    command += [f"--output-dir={output}", options.script, *rest]
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # also where nothing is installed
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, check=False).returncode


# ---- on a cluster ---------------------------------------------------------------------------------------------------


def submit(options: argparse.Namespace, rest: list[str]) -> int:
    """Queues one job and returns; logs its number and folder."""
    submitit = require("submitit", "slurm", "submitting to SLURM")
    ours: Any = importlib.import_module("dinov3.run.submit")  # not __main__: the job finds its class by this name
    script = script_path(options.script)
    folder = Path(options.output_dir).absolute()
    before_number = Path(str(folder).split("%j")[0])
    (before_number if "%j" in str(folder) else folder).mkdir(parents=True, exist_ok=True)
    processes = options.ngpus or 8
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=MAX_REQUEUES)
    parameters: dict[str, Any] = {
        "name": f"{script.stem}:{options.callable_name}",
        "nodes": options.nodes,
        "gpus_per_node": processes,
        "tasks_per_node": processes,
        "cpus_per_task": options.cpus_per_task,
        "timeout_min": options.timeout,
        "slurm_mem": "0",  # all of the node
        "slurm_signal_delay_s": SIGNAL_SECONDS,
        "slurm_comment": options.comment or None,
        "slurm_exclude": options.exclude or None,
        "slurm_partition": options.slurm_partition,
        "slurm_qos": options.slurm_qos,
        "slurm_account": options.slurm_account,
        "slurm_additional_parameters": {"nice": options.slurm_nice} if options.slurm_nice else None,
    }
    executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})
    job = executor.submit(ours.Job(str(script), options.callable_name, [f"--output-dir={folder}", *rest]))
    where = str(folder).replace("%j", job.job_id)
    log(
        f"queued job {job.job_id}: {options.nodes} × {processes} processes for at most {options.timeout} min; logs: {where}"
    )
    print(job.job_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
