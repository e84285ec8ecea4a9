"""Long computations of a page, two at a time in threads: requested again and again until they are done."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass, field
from typing import Any

CACHED = 16  # results
AT_ONCE = 0.25  # s that a request waits for a result: what takes less needs no second request
Progress = Callable[[int], None]


class Stopped(Exception):
    """Raised inside a computation that a newer one of its kind has replaced."""


@dataclass
class Job:
    """One computation. `done` of `total` images."""

    kind: str
    total: int
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    stop: bool = False
    future: Future[Any] = field(default_factory=Future)

    def progress(self, done: int) -> None:
        self.done = done
        if self.stop:
            raise Stopped

    def result(self, wait: float) -> Any | None:
        """The result, or None where it takes longer than `wait` seconds. What the computation raised is raised."""
        try:
            return self.future.result(wait)
        except (TimeoutError, Stopped, CancelledError):
            return None

    @property
    def state(self) -> dict[str, Any]:
        return {"done": self.done, "total": self.total, "seconds": round(time.monotonic() - self.started, 1)}


class Jobs:
    """Results by (kind, arguments). A newer computation of the same kind stops an unfinished one."""

    def __init__(self) -> None:
        # two, so that UMAP, which cannot be stopped, keeps nothing else waiting
        self._thread = ThreadPoolExecutor(2, "explorer")
        self._jobs: OrderedDict[Hashable, Job] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, kind: str, arguments: Hashable, total: int, work: Callable[[Progress], Any]) -> Job:
        """The job of these arguments, started if there is none; one that failed is started again."""
        with self._lock:
            job = self._jobs.get((kind, arguments))
            if job is None or job.stop or (job.future.done() and job.future.exception() is not None):
                for other in self._jobs.values():
                    if other.kind == kind and not other.future.done():
                        other.stop = True
                        other.future.cancel()
                job = Job(kind, total)
                job.future = self._thread.submit(work, job.progress)
                self._jobs[kind, arguments] = job
                while len(self._jobs) > CACHED:
                    self._jobs.popitem(last=False)
            self._jobs.move_to_end((kind, arguments))
            return job
