"""Runs that are stopped: fits of heads at a step, and processes killed at random moments until they end."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dinov3 import fit

KILLS = 20
LIMIT = 240.0  # seconds, all starts together


@contextmanager
def stopped_at(number: int) -> Iterator[None]:
    """The fit of a head in this block is interrupted before its step of this number."""
    step = fit._Fit.train_step

    def dying(self: Any, loss: Any, batch: Any, at: int) -> Any:
        if at == number:
            raise KeyboardInterrupt
        return step(self, loss, batch, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit._Fit, "train_step", dying)
        with pytest.raises(KeyboardInterrupt):
            yield


def killed_until_done(work: Callable[..., Any], *arguments: Any, seconds: float, seed: int = 0) -> int:
    """Starts `work(*arguments)` and kills it `KILLS` times, each after a tenth of its time or so; then lets it end.

    `seconds`: how long the whole work takes. A start that ends before its kill counts as one (it resumes a finished run).
    Returns how many starts were killed at work.
    """
    rng, began, killed = random.Random(seed), time.monotonic(), 0
    processes = multiprocessing.get_context("fork")
    for _ in range(KILLS):
        process = processes.Process(target=work, args=arguments)
        process.start()
        process.join(rng.uniform(0.02, 0.12) * seconds)
        if process.is_alive():
            process.kill()
            process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        assert time.monotonic() - began < LIMIT
    process = processes.Process(target=work, args=arguments)
    process.start()
    process.join(LIMIT)
    assert process.exitcode == 0
    print(f"killed at work: {killed} of {KILLS}")
    return killed
