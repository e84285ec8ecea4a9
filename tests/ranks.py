"""Runs a function as several ranks on this machine: `run_ranks(fn, 2, x)` → [fn(x) of rank 0, fn(x) of rank 1].

`fn` is a function at the top level of a test module. The ranks are forks of one server that has imported torch
already (0.1 s each instead of 2), talk over gloo, and find each other through a file, so no port can be taken.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout_s: float = 60, **options: Any) -> list[Any]:
    """What `fn(*args, **options)` returns on each rank; an exception on a rank is raised here with its traceback."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "numpy"])
    with tempfile.TemporaryDirectory() as folder:
        ranks, pipes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            packed = pickle.dumps((partial(fn, **options), args))  # by value: tensors need no shared memory
            target = (os.path.join(folder, "store"), rank, world, timeout_s, packed, theirs)
            process = context.Process(target=_one_rank, args=target, daemon=True)
            process.start()
            theirs.close()
            ranks.append(process)
            pipes.append(ours)
        try:
            return _collect(pipes, time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                process.terminate()
                process.join()


def _collect(pipes: list[Connection], until: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), timeout=max(until - time.monotonic(), 0))
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting.values())} did not finish in time")
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            try:
                failure, results[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
    return [results[rank] for rank in range(len(pipes))]


def _one_rank(store: str, rank: int, world: int, timeout_s: float, packed: bytes, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # never used: the file is where ranks meet
    try:
        fn, args = pickle.loads(packed)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
        )
        answer = (None, fn(*args))
        dist.barrier()  # a rank that leaves early would break the others' last collective
    except BaseException:
        answer = (traceback.format_exc(), None)
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    if answer[0] is None:
        dist.destroy_process_group()
