"""Prefetching: threads make what a loop needs next while it works on what it has.

Threads suffice where the work releases the interpreter's lock, as reading, decoding, hashing and resizing do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def prefetched(
    make: Callable[[K], V],
    keys: Iterable[K],
    workers: int,
    ahead: int | None = None,
    *,
    initializer: Callable[[], object] | None = None,
) -> Generator[V, None, None]:
    """`make(key)` for every key, in order; while one result is used, threads make the next `ahead` (default `workers`).

    `keys` may be endless: it is read in the consumer's thread, no further than needed. An error raised by `make` reaches
    the consumer in its turn. Closing the iterator cancels what has not begun and waits for what has. `workers` 0 makes
    each result when it is needed, in the consumer's thread. `initializer` runs first in every thread.
    """
    if workers < 1:
        yield from map(make, keys)
        return
    pool = ThreadPoolExecutor(workers, "prefetch", initializer)
    pending: deque[Future[V]] = deque()
    try:
        for key in keys:
            pending.append(pool.submit(make, key))
            if len(pending) > (workers if ahead is None else ahead):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
