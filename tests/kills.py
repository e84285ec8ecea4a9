"""Runs in a process of their own that is killed at random moments and started again until it ends."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from typing import Any

KILLS = 20
LIMIT = 240.0  # seconds, all starts together


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
