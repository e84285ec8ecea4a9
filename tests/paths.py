"""Where the repository and the recorded numbers are, and a path that is too long to be opened at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
GOLDEN_LOSSES = TESTS / "golden_losses"
KEYS = TESTS / "keys"  # published state-dict keys and shapes


@contextmanager
def nested(top: Path, depth: int = 1500) -> Iterator[int]:
    """`depth` folders named d in each other, below `top`; the deepest as a file descriptor. They are removed at the end:
    pytest's own cleaning recurses."""
    folder = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=folder)
        deeper = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = deeper
    try:
        yield folder
    finally:
        os.close(folder)
        (top / "stays").touch()
        os.removedirs(top / ("d/" * depth))
