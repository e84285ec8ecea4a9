"""Prefetching: threads make what a loop needs next while it works on what it has.

Threads suffice where the work releases the interpreter's lock, as reading, decoding, hashing and resizing do.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")

MOST_BYTES = 1 << 30  # of results that wait to be used


def size_of(value: Any, depth: int = 3) -> int:
    """Bytes of the arrays, tensors, Pillow images and encoded data in a value and its parts; of all else 0."""
    if isinstance(size := getattr(value, "nbytes", None), int):
        return size
    if isinstance(value, (bytes, bytearray)):
        return len(value)
    if hasattr(value, "getbands"):  # a Pillow image
        return value.width * value.height * len(value.getbands())
    if depth == 0 or isinstance(value, type):
        return 0
    parts = value if isinstance(value, (list, tuple)) else vars(value).values() if hasattr(value, "__dict__") else ()
    return sum(size_of(part, depth - 1) for part in parts)


def prefetched(
    make: Callable[[K], V],
    keys: Iterable[K],
    workers: int,
    ahead: int | None = None,
    *,
    initializer: Callable[[], object] | None = None,
) -> Generator[V, None, None]:
    """`make(key)` for every key, in order; while one result is used, threads make the next `ahead` (default `workers`), or
    fewer: those that wait take `MOST_BYTES` at most, the largest so far counting for each that is not ready.

    `keys` may be endless: it is read in the consumer's thread, no further than needed. An error raised by `make` reaches
    the consumer in its turn. Closing the iterator cancels what has not begun and waits for what has. `workers` 0 makes
    each result when it is needed, in the consumer's thread. `initializer` runs first in every thread.
    """
    if workers < 1:
        yield from map(make, keys)
        return
    pool = ThreadPoolExecutor(workers, "prefetch", initializer)
    pending: deque[Future[tuple[V, int]]] = deque()
    lock = threading.Lock()
    ready = waiting = largest = 0  # results that were made and not used, their bytes, bytes of the largest so far

    def sized(key: K) -> tuple[V, int]:
        nonlocal ready, waiting, largest
        size = 0
        try:
            value = make(key)
            size = size_of(value)
            return value, size
        finally:
            with lock:
                ready, waiting, largest = ready + 1, waiting + size, max(largest, size)

    def used() -> V:
        nonlocal ready, waiting
        value, size = pending.popleft().result()
        with lock:
            ready, waiting = ready - 1, waiting - size
        return value

    def full() -> bool:
        with lock:
            expected = waiting + (len(pending) - ready) * largest
        return len(pending) > (workers if ahead is None else ahead) or (len(pending) > 1 and expected > MOST_BYTES)

    try:
        for key in keys:
            if largest == 0 and len(pending) == workers:  # no more than one a thread until their size is known
                wait(pending, return_when=FIRST_COMPLETED)
            pending.append(pool.submit(sized, key))
            while full():
                yield used()
        while pending:
            yield used()
    finally:
        pool.shutdown(cancel_futures=True)
