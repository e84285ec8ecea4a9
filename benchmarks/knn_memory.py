"""How much memory k-NN over a large bank takes: ImageNet-1k's size, 1.28 M × 1024 in float16, read from disk in chunks.

    python benchmarks/knn_memory.py                  # 1,281,167 rows, 300 queries, K = 200
    python benchmarks/knn_memory.py --rows 100000

The bank is made of clustered random features, written once to a temporary file (2.6 GB); then it is searched as the
evaluation does. Prints the peak of this process's resident memory, which counts the pages of the mapped file too, and
the peak of what it allocated itself.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from dinov3.neighbours import nearest, votes

CLASSES = 1000


def make_bank(path: Path, rows: int, width: int) -> np.ndarray:
    """Rows near one of a thousand centres, label = row mod 1000; returns the centres."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, width)).astype(np.float32)
    bank = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
    noise = 2 * rng.standard_normal((20_000, width), np.float32)  # drawn once and turned: drawing takes minutes
    for start in range(0, rows, len(noise)):
        labels = np.arange(start, min(start + len(noise), rows)) % CLASSES
        bank[start : start + len(labels)] = centres[labels] + np.roll(noise, start // len(noise), 1)[: len(labels)]
    bank.flush()
    return centres


def rss_gb(kind: str) -> float:
    """Of this process, from the kernel: RssAnon is what it allocated, RssFile pages of mapped files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(kind)) / 1e6


class Watch(threading.Thread):
    """The most anonymous memory seen, looked at every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0.0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.peak = max(self.peak, rss_gb("RssAnon:"))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rows", type=int, default=1_281_167)
    p.add_argument("--width", type=int, default=1024)
    p.add_argument("--queries", type=int, default=300)
    p.add_argument("--folder", help="for the temporary file (2.6 GB); default: the system's")
    o = p.parse_args()
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        path = Path(folder) / "bank.npy"
        began = time.perf_counter()
        centres = make_bank(path, o.rows, o.width)
        size, seconds = path.stat().st_size / 1e9, time.perf_counter() - began
        print(f"bank: {o.rows:,} × {o.width} float16, {size:.2f} GB, made in {seconds:.0f} s")
        rng = np.random.default_rng(1)
        truth = rng.integers(0, CLASSES, o.queries)
        queries = centres[truth] + 2 * rng.standard_normal((o.queries, o.width), np.float32)
        bank = np.load(path, mmap_mode="r")
        watch = Watch()
        watch.start()
        began = time.perf_counter()
        cosines, where = nearest(torch.from_numpy(queries.astype(np.float32)), bank, 200)
        scores = votes(cosines, where % CLASSES, 20, CLASSES)
        seconds = time.perf_counter() - began
        watch.over.set()
        right = float((scores.argmax(1).numpy() == truth).mean())
        print(f"{o.queries} queries, K = 200: {seconds:.0f} s, top-1 {100 * right:.1f} %")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"peak resident memory {peak:.2f} GB, of which allocated at most {watch.peak:.2f} GB; the rest is the file's"
        )


if __name__ == "__main__":
    main()
