"""Graceful shutdown: a signal or a time limit, noticed between two iterations."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any


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
            raise KeyboardInterrupt
        self.signal, self.reason = number, signal.Signals(number).name
        # a signal to the whole process group ends the data workers too; their death must not tear the step apart
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def requested(self) -> bool:
        if self.reason is None and self.until is not None and time.monotonic() > self.until:
            self.reason = "the time limit (run.time_limit_minutes)"
        return self.reason is not None

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        # handlers installed before ours run now that all is saved: SLURM's launcher queues the job again
        if self.signal not in (None, signal.SIGINT) and callable(self.before.get(signal.Signals(self.signal))):
            signal.raise_signal(self.signal)
