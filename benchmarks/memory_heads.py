"""Peak memory and time of one forward of a head on a backbone, each in a process of its own (CPU, float32).

    python benchmarks/memory_heads.py                       # every row of the table
    python benchmarks/memory_heads.py segmentor --size 1024 --backbone dinov3_vitb16

Printed: resident memory before the forward (torch and weights), its peak, and the CPU seconds of the forward (all threads).
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


def segmentor(backbone: Any, x: torch.Tensor) -> Callable[[], Any]:
    """All a training step would see: masks of every layer."""
    from dinov3.heads.mask2former import build_segmentor

    model = build_segmentor(backbone, 150).eval()
    return lambda: model(x)


def segmentor_predict(backbone: Any, x: torch.Tensor) -> Callable[[], Any]:
    from dinov3.heads.mask2former import build_segmentor

    model = build_segmentor(backbone, 150).eval()
    return lambda: model.predict(x, rescale_to=(x.shape[-2], x.shape[-1]))


def depther_dpt(backbone: Any, x: torch.Tensor) -> Callable[[], Any]:
    from dinov3.heads.dpt import build_depther

    model = build_depther(backbone, head_type="dpt").eval()
    return lambda: model(x)


def detector(backbone: Any, x: torch.Tensor) -> Callable[[], Any]:
    """At the published sizes: width 768, 6 + 6 layers, 1500 queries."""
    from dinov3.heads.detr import build_detector

    model = build_detector(backbone).eval()
    return lambda: model.detect(list(x))


# what: (its forward, the default side of the image)
ROWS: dict[str, tuple[Callable[[Any, torch.Tensor], Callable[[], Any]], int]] = {
    "segmentor": (segmentor, 1024),
    "segmentor_predict": (segmentor_predict, 1024),
    "depther_dpt": (depther_dpt, 1024),
    "detector": (detector, 1024),
}


def resident() -> float:
    """GB of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def measure(row: str, name: str, side: int) -> str:
    from dinov3.hub import load

    torch.manual_seed(0)
    build, default = ROWS[row]
    side = side or default
    forward = build(load(name, "random"), torch.randn(1, 3, side, side))
    before, began = resident(), time.process_time()
    with torch.no_grad():
        forward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux: kibibytes
    return f"{row:20}{name:24}{side:6}{before:10.2f}{peak:10.2f}{time.process_time() - began:10.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--backbone", default="dinov3_vits16")
    parser.add_argument("--size", type=int, default=0, help="side of the image in pixels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [row for row in args.rows if row not in ROWS]:
        parser.error(f"{unknown[0]} is none of {', '.join(ROWS)}")
    torch.set_num_threads(args.threads)
    if args.here:
        print(measure(args.rows[0], args.backbone, args.size), flush=True)
        return
    print(f"{'':20}{'':24}{'side':>6}{'before GB':>10}{'peak GB':>10}{'CPU s':>10}")
    for row in args.rows:
        again = [sys.executable, __file__, row, "--here", "--backbone", args.backbone, "--size", str(args.size)]
        subprocess.run([*again, "--threads", str(args.threads)], check=True)


if __name__ == "__main__":
    main()
