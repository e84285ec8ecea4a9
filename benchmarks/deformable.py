"""CPU milliseconds of deformable attention's sampling: ours, and the usual loop of `grid_sample` over the levels.

    python benchmarks/deformable.py                  # A B A B …, one thread, shapes of the segmentor at 512 px

CPU time of the process, not wall time, so that a busy machine disturbs less; the smallest of the rounds is reported,
and the ratio of each pair of neighbouring rounds as median. Both are checked to give the same numbers first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dinov3.heads.mask2former import deformable_sampling, level_by_level

PYRAMID = [(16, 16), (32, 32), (64, 64)]
# what: shapes of the value levels, width of a head; always 16 heads, 4 points, 5376 queries
CASES = {
    "adapter, ViT-S": ([(32, 32)], 12),
    "adapter, ViT-L": ([(32, 32)], 32),
    "adapter, ViT-7B": ([(32, 32)], 128),
    "pixel decoder, width 256": (PYRAMID, 16),
    "pixel decoder, width 512": (PYRAMID, 32),
    "pixel decoder, width 2048": (PYRAMID, 128),
}


def milliseconds(sample: Callable[..., Tensor], inputs: tuple[Tensor, ...], shapes: object, *, train: bool) -> float:
    value, locations, weights = inputs
    begin = time.process_time()
    with torch.set_grad_enabled(train):
        out = sample(value, shapes, locations, weights)
        if train:
            torch.autograd.grad(out.sum(), inputs)
    return (time.process_time() - begin) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{'':26}{'':18}{'by level':>10}{'ours':>10}{'ratio':>8}")
    for name, (shapes, d) in CASES.items():
        torch.manual_seed(0)
        S, Q = sum(h * w for h, w in shapes), sum(h * w for h, w in PYRAMID)
        value = torch.randn(1, S, 16, d).requires_grad_()
        around = torch.rand(1, Q, 1, 1, 1, 2)
        locations = (around + 0.05 * torch.randn(1, Q, 16, len(shapes), 4, 2)).requires_grad_()
        weights = torch.rand(1, Q, 16, len(shapes), 4).requires_grad_()
        inputs = (value, locations, weights)
        with torch.no_grad():
            a, b = (f(value, shapes, locations, weights) for f in (level_by_level, deformable_sampling))
            assert torch.allclose(a, b, atol=1e-4), f"the two differ by {(a - b).abs().max():.1e}"
        for train in (False, True):
            pairs = [
                [milliseconds(f, inputs, shapes, train=train) for f in (level_by_level, deformable_sampling)]
                for _ in range(args.rounds + 1)
            ][1:]  # the first round warms up
            by_level, ours = (min(pair[i] for pair in pairs) for i in (0, 1))
            ratio = statistics.median(pair[0] / pair[1] for pair in pairs)
            what = "forward + backward" if train else "forward"
            print(f"{name if not train else '':26}{what:18}{by_level:10.0f}{ours:10.0f}{ratio:8.2f}", flush=True)


if __name__ == "__main__":
    main()
