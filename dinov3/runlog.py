"""The folder of a run, its metrics file, its log and its progress line; requests to stop it.

    <output>/resolved.yaml     the configuration with every value      resolved.1.yaml …: earlier ones, if it changed
             metrics.jsonl     one JSON object per record, `iteration` first
             log.txt           what the console showed
             ckpt/  eval/  plots/  images/

One line on stderr per event, one JSON line per record of numbers, both written by one process (`writer`). The metrics
file is the truth that TensorBoard or W&B only show. After a resume the records of iterations that will be run again are
cut, so every iteration is in the file once. Field names are the reference's; where it writes the median of the last 20
iterations, schedules included, a record here holds the schedule's value at that very iteration and the mean of losses
and norms since the previous record. Numbers that are not finite become null: JSON has no NaN.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3 import distributed
from dinov3.config.loading import dump, to_dict
from dinov3.config.train import SINKS
from dinov3.errors import DinoError, one_of, printable, require, without_secrets
from dinov3.files import Lock, atomically

Number = float | int | Tensor
SILENCE = 20.0  # s
T = TypeVar("T")


class Sink(Protocol):
    """Somewhere else that numbers are shown."""

    def config(self, values: Mapping[str, Any]) -> None: ...

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None: ...

    def image(self, iteration: int, name: str, image: Image.Image) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, folder: Path, iteration: int) -> None:
        require("tensorboard", "track", "the tensorboard sink")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration or None)

    def config(self, values: Mapping[str, Any]) -> None:
        self.writer.add_text("config", "```\n" + json.dumps(values, indent=1, default=str) + "\n```")

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration)
        self.writer.flush()

    def image(self, iteration: int, name: str, image: Image.Image) -> None:
        self.writer.add_image(name, np.asarray(image), iteration, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """W&B, or trackio, which has the same interface. W&B keeps what it saw of iterations that are run again."""

    def __init__(self, folder: Path, iteration: int, module: str = "wandb") -> None:
        self.module = module
        self.client = require(module, "track", f"the {module} sink")
        options: dict[str, Any] = {"project": "dinov3", "name": folder.name}
        if module == "wandb":
            options |= {"dir": str(folder), "resume": "allow", "id": _short_hash(folder)}
        self.run = self.client.init(**options)

    def config(self, values: Mapping[str, Any]) -> None:
        if self.module == "wandb":
            self.run.config.update(dict(values), allow_val_change=True)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self.client.log(dict(values), step=iteration)

    def image(self, iteration: int, name: str, image: Image.Image) -> None:
        self.client.log({name: self.client.Image(image)}, step=iteration)

    def close(self) -> None:
        self.client.finish()


def _short_hash(folder: Path) -> str:
    import hashlib

    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]


def open_sink(name: str, folder: Path, iteration: int) -> Sink:
    if name == "tensorboard":
        return TensorBoard(folder, iteration)
    return Wandb(folder, iteration, one_of("the sink", name, SINKS))


class RunDir:
    """The folder of a run. Processes that are not the writer know its paths and stay silent."""

    def __init__(self, path: str | os.PathLike[str], *, writer: bool = True, console: TextIO | None = None) -> None:
        self.path = Path(path).absolute()
        self.writer = writer
        self.console = console
        self.sinks: list[Sink] = []
        self.config_file = self.path / "resolved.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.log_file = self.path / "log.txt"
        self.checkpoints = self.path / "ckpt"
        self.evaluations = self.path / "eval"
        self.plots = self.path / "plots"

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """While this lasts no other process may do the same with this folder. Raises DinoError if one does already."""
        if not self.writer:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = Lock(self.path / ".running.lock", str(self.path))
        try:
            yield
        finally:
            lock.release()

    def start(self, config: Any, *, iteration: int = 0, sinks: Sequence[str | Sink] = ()) -> None:
        """Make the folder, write the configuration, cut the metrics at the iteration about to be run, open the sinks."""
        if not self.writer:
            return
        for folder in (self.path, self.checkpoints, self.evaluations, self.plots):
            folder.mkdir(parents=True, exist_ok=True)
        self._save_config(config)
        cut = cut_metrics(self.metrics_file, iteration)
        if cut:
            self.log(f"{cut} records of iterations from {iteration} on were cut from {self.metrics_file.name}")
        self.sinks = [open_sink(s, self.path, iteration) if isinstance(s, str) else s for s in sinks]
        for sink in self.sinks:
            sink.config(to_dict(config))

    def _save_config(self, config: Any) -> None:
        """An earlier configuration that differs is renamed with a number: a resumed run may have another configuration."""
        with atomically(self.config_file) as temporary:
            dump(config, temporary)
            if self.config_file.exists() and self.config_file.read_bytes() != temporary.read_bytes():
                n = 1
                while (earlier := self.path / f"resolved.{n}.yaml").exists():
                    n += 1
                os.replace(self.config_file, earlier)
                self.log(f"the configuration differs from that of the last start, which is kept as {earlier.name}")

    def log(self, text: str) -> None:
        """One event, one line: on the console and in log.txt."""
        if not self.writer:
            return
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S} " + printable(without_secrets(" ".join(text.splitlines())))
        print(line, file=self.console or sys.stderr, flush=True)
        if self.path.is_dir():
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def record(self, iteration: int, values: Mapping[str, Number]) -> None:
        """One JSON line; the same finite numbers go to the sinks."""
        if not self.writer:
            return
        numbers = {name: float(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        finite = {name: v for name, v in numbers.items() if math.isfinite(v)}
        line = {"iteration": iteration} | {name: finite.get(name) for name in numbers}
        with open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        for sink in self.sinks:
            sink.scalars(iteration, finite)

    def image(self, iteration: int, name: str, image: Image.Image) -> None:
        """A drawing, as images/<name>_<iteration>.png and in the sinks."""
        if not self.writer:
            return
        with atomically(self.path / "images" / f"{name}_{iteration}.png") as temporary:
            image.save(temporary, "PNG")
        for sink in self.sinks:
            sink.image(iteration, name, image)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
        self.sinks = []


# ---- the metrics file -----------------------------------------------------------------------------------------------


def read_metrics(file: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The records of a metrics file, one after the other; a line torn by a crash is passed over."""
    path = Path(file)
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                yield record


def cut_metrics(file: str | os.PathLike[str], iteration: int) -> int:
    """Drop records of `iteration` and later, and torn lines; how many records went. The file changes at once or not."""
    path = Path(file)
    if not path.exists():
        return 0
    records = list(read_metrics(path))
    remaining = [r for r in records if r.get("iteration", -1) < iteration]
    text = "".join(json.dumps(r) + "\n" for r in remaining)
    if text != path.read_text(encoding="utf-8", errors="replace"):
        with atomically(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return len(records) - len(remaining)


# ---- graceful shutdown -----------------------------------------------------------------------------------------------


class StopRequest:
    """Holds a signal, or that the time is up, until the iteration is over. A second Ctrl-C does not wait."""

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
            raise KeyboardInterrupt("steps since the newest checkpoint are lost")
        self.signal, self.reason = number, signal.Signals(number).name
        if distributed.is_main() and parent_process() is None:  # no print: it may come in the middle of another
            os.write(2, f"{self.reason}: saving after this step; Ctrl-C again ends at once, without\n".encode())
        # a signal to the whole process group ends the data workers too; their death must not tear the step apart
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def requested(self) -> bool:
        """Whether to stop, as this process knows it; others may not know yet."""
        if self.reason is None and self.until is not None and time.monotonic() > self.until:
            self.reason = "the time limit (run.time_limit_minutes)"
        return self.reason is not None

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was asked to stop. Collective."""
        asked = self.requested()
        return (
            asked
            if distributed.world() == 1
            else bool(distributed.all_reduce(torch.tensor(asked * 1.0, device=device), "max"))
        )

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        # handlers installed before ours run now that all is saved: SLURM's launcher queues the job again
        if self.signal not in (None, signal.SIGINT) and callable(self.before.get(signal.Signals(self.signal))):
            signal.raise_signal(self.signal)


# ---- progress -------------------------------------------------------------------------------------------------------


class Progress:
    """Times the loop and logs its progress at intervals: one line, one record, one wait for the device.

        progress = Progress(run, total=1000, images_per_step=64)
        for it, batch in …:
            progress.fetched()
            …
            progress.stepped(it, schedules.at(it).fields(), {"total_loss": loss, …})

    Values may be tensors on the device; they are not read before the line is due, and then all at once. Those that are not
    finite are left out of the means. Several processes: reduce first.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        total: int,
        images_per_step: int,
        first: int = 0,
        every: int = 10,
        device: torch.device | str = "cpu",
    ) -> None:
        self.run, self.total, self.first, self.every = run, total, first, every
        self.images, self.device = images_per_step, torch.device(device)
        self.began = self.last = self.logged = time.perf_counter()
        self.timed_from, self.timed_steps = self.began, 0  # for the ETA: without the first step, which compiles
        self.waits: list[float] = []
        self.steps: list[float] = []
        self.terms: dict[str, list[Number]] = {}

    def fetched(self, waited: float | None = None) -> None:
        """The data of a step is here, after `waited` seconds; without a number, what passed since the last step."""
        self.waits.append(time.perf_counter() - self.last if waited is None else waited)

    def due(self, iteration: int) -> bool:
        """Whether a line is logged after this iteration. A process alone does not stay silent for more than `SILENCE`."""
        silent = distributed.world() == 1 and time.perf_counter() - self.logged > SILENCE
        return silent or iteration % self.every == 0 or iteration + 1 >= self.total

    def means(self) -> dict[str, float]:
        """The terms since the last line, each averaged over its finite values."""
        tensors = [v for values in self.terms.values() for v in values if isinstance(v, Tensor)]
        read = iter(torch.stack(tensors).tolist() if tensors else [])
        means = {}
        for name, values in self.terms.items():
            numbers = [next(read) if isinstance(v, Tensor) else float(v) for v in values]
            finite = [v for v in numbers if math.isfinite(v)]
            if finite:
                means[name] = sum(finite) / len(finite)
        return means

    def stepped(self, iteration: int, schedules: Mapping[str, float], terms: Mapping[str, Number]) -> dict[str, float]:
        """An iteration is over. The record, if a line was due, else an empty dict."""
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value.detach().float() if isinstance(value, Tensor) else value)
        due = self.due(iteration)
        means = self.means() if due else {}
        now = time.perf_counter()  # after the device was waited for
        self.steps.append(now - self.last)
        self.last = now
        if iteration == self.first:
            self.timed_from = now
        else:
            self.timed_steps += 1
        if not due:
            return {}
        step = sum(self.steps) / len(self.steps)
        wait = sum(self.waits) / max(len(self.waits), 1)
        # order and names: the reference's, then what it lacks
        record: dict[str, float] = {"iter_time": step, "data_time": wait}
        record |= {name: v for name, v in schedules.items() if name != "teacher_temp"} | means
        record |= {name: v for name, v in schedules.items() if name == "teacher_temp"}
        record |= {
            "images_per_second": self.images / max(step, 1e-9),
            "data_share": wait / max(step, 1e-9),
            "memory_gb": peak_memory_gb(self.device),
        }
        self.waits, self.steps, self.terms, self.logged = [], [], {}, now
        self.run.record(iteration, record)
        self.run.log(self.line(iteration, record, means))
        return record

    def line(self, iteration: int, record: Mapping[str, float], means: Mapping[str, float]) -> str:
        done = iteration + 1
        each = (self.last - self.timed_from) / self.timed_steps if self.timed_steps else record["iter_time"]
        losses = "  ".join(
            f"{name.removesuffix('_loss')} {v:.4g}" for name, v in means.items() if name.endswith("_loss")
        )
        return (
            f"[{done:>{len(str(self.total))}}/{self.total}]  eta {time_text(each * (self.total - done))}  {losses}  "
            f"lr {record.get('lr', 0):.3g}  {record['iter_time']:.3g} s/step ({record['data_share']:.0%} waiting for "
            f"data)  {rate_text(record['images_per_second'])} images/s  {record['memory_gb']:.1f} GB"
        )

    def close(self) -> None:
        """The last line: how long the iterations of this start took, and each of them."""
        steps, seconds = self.timed_steps + 1, self.last - self.began
        self.run.log(f"{steps} iterations in {time_text(seconds)}, {seconds / steps:.3g} s each")


class Ticker:
    """Progress of a loop without records, every 15 seconds and at the end: "features 64/100  eta 0:00:12  3.1 images/s"."""

    def __init__(
        self, log: Callable[[str], None], what: str, total: int, *, first: int = 0, unit: str = "images", each: int = 1
    ) -> None:
        """first: where a resumed loop begins; each: `unit`s a step."""
        self.log, self.what, self.total, self.first, self.unit, self.each = log, what, total, first, unit, each
        self.began = self.last = time.perf_counter()

    def due(self, done: int) -> bool:
        return done == self.total or time.perf_counter() - self.last > 15

    def __call__(self, done: int, more: str = "") -> None:
        """`done` of `total` are finished; `more` stands at the end of a line that is due."""
        if not self.due(done):
            return
        self.last = time.perf_counter()
        rate = (done - self.first) / max(self.last - self.began, 1e-9)
        left = time_text((self.total - done) / max(rate, 1e-9))
        self.log(f"{self.what} {done}/{self.total}  eta {left}  {rate_text(rate * self.each)} {self.unit}/s{more}")


def silent(text: str) -> None:
    """A log that goes nowhere."""


def ticked(items: Sequence[T], log: Callable[[str], None], unit: str) -> Iterator[T]:
    """The items, with the progress through them logged."""
    ticker = Ticker(log, unit, len(items), unit=unit)
    for done, item in enumerate(items, 1):
        yield item
        ticker(done)


def rate_text(rate: float) -> str:
    """Two digits and all before the point: 0.31, 4.2, 128."""
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"


def time_text(seconds: float) -> str:
    """0:00:07, 14:02:10, 3 d 02:00:00."""
    days, rest = divmod(round(seconds), 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days} d {clock.rjust(8, '0')}" if days else clock


def peak_memory_gb(device: torch.device) -> float:
    """The most memory so far: of the accelerator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kilobytes elsewhere


# ---- curves --------------------------------------------------------------------------------------------------------


PANELS: dict[str, Callable[[str], bool]] = {
    "losses": lambda name: name.endswith("_loss"),
    "k-NN accuracy": lambda name: name.startswith("knn"),
    "dimensions that features use": lambda name: name in ("rankme", "lidar"),
    "shares": lambda name: name in ("cls_cosine", "patch_structure", "patch_drift") or name.endswith("prototypes_used"),
    "teacher and student": lambda name: name in ("teacher_gap", "teacher_moved"),
    "gradient norms": lambda name: name.endswith("_grad_norm"),
}


def plot(metrics: str | os.PathLike[str], out: str | os.PathLike[str]) -> str:
    """Loss terms, k-NN accuracy and what else was measured (PANELS), over iterations; returns a log line.

    Without matplotlib nothing is drawn and that is no error: a run does not die of a missing image.
    """
    records = list(read_metrics(metrics))
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if value is not None and any(fits(name) for fits in PANELS.values()):
                x, y = curves.setdefault(name, ([], []))
                x.append(record["iteration"])
                y.append(value)
    if not curves:
        return f"no plot: {metrics} holds no losses"
    try:
        require("matplotlib", "plots", "plotting")
    except DinoError as error:
        return f"no plot: {error}"
    from matplotlib.figure import Figure

    groups = {title: [n for n in curves if fits(n)] for title, fits in PANELS.items()}
    groups = {title: names for title, names in groups.items() if names}
    figure = Figure(figsize=(8, 3.5 * len(groups)), layout="constrained")
    for i, (title, names) in enumerate(groups.items()):
        axes = figure.add_subplot(len(groups), 1, i + 1, title=title)
        for name in names:
            axes.plot(*curves[name], label=name, linewidth=1.2, marker="." if len(curves[name][0]) < 20 else None)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    out = Path(out)
    with atomically(out) as temporary:
        figure.savefig(temporary, dpi=120, format=out.suffix.lstrip(".") or "png")
    return f"plotted {', '.join(curves)} to {out}"
