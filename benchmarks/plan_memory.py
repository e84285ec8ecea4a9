"""The planner's memory against training that ran: eight configurations on the CPU, each in a process of its own.

    python benchmarks/plan_memory.py IMAGES            # the table of docs/plan.md
    python benchmarks/plan_memory.py IMAGES --only 3   # the third alone

Measured: the highest resident memory (VmHWM of /proc/self/status, kept by Linux) of a process that trains three steps with
one loader process beside it. Predicted: what `dinov3 plan` prints. The last two columns are of a second run in which the C
library returns every block above 64 kB to the system as soon as it is freed (MALLOC_MMAP_THRESHOLD_), against tensors
and process alone: the count itself, without what a heap holds back.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SMALL = "small_cpu.yaml"
FP32 = "compute_precision.param_dtype=fp32"
# name → (recipe, overrides)
CASES: dict[str, tuple[str, list[str]]] = {
    "small_cpu, batch 32": (SMALL, [FP32, "train.batch_size_per_gpu=32"]),
    "batch 64, 8 local crops": (SMALL, [FP32, "crops.local_crops_number=8"]),
    "ViT-S, 112 px, batch 8, K 4096": (
        "vits16_one_gpu.yaml",
        [FP32, "train.batch_size_per_gpu=8", "crops.global_crops_size=112", "crops.local_crops_size=48",
         "crops.local_crops_number=4",
         "dino.head_n_prototypes=4096", "ibot.head_n_prototypes=4096"],
    ),
    "the same, selective checkpointing": ("", ["train.checkpointing=true"]),
    "the same, full checkpointing": ("", ["train.checkpointing_full=true"]),
    "Gram teacher at 160 px, 2 × 12 images": (
        SMALL,
        [FP32, "train.batch_size_per_gpu=12", "optim.accumulation_steps=2", "gram.use_loss=true",
         "gram.it_load_ema_teacher=0", "gram.rep_update=false", "crops.gram_teacher_crops_size=160"],
    ),
    "ConvNeXt-T, 96 px, batch 8": (
        "vits16_one_gpu.yaml",
        [FP32, "student.arch=convnext_tiny", "student.patch_size=32", "train.batch_size_per_gpu=8",
         "crops.global_crops_size=96", "crops.local_crops_size=64", "crops.local_crops_number=4",
         "dino.head_n_prototypes=1024", "ibot.head_n_prototypes=1024"],
    ),
    "small_cpu, bf16, batch 16": (SMALL, ["train.batch_size_per_gpu=16"]),
}  # fmt: skip
COMMON = ["run.device=cpu", "train.compile=false", "train.num_workers=1", "optim.iterations=3", "run.log_every=1",
          "evaluation.eval_period_iterations=0"]  # fmt: skip


def case(name: str) -> tuple[str, list[str]]:
    """(recipe, overrides); 'the same' stands for the case before it that is not."""
    recipe, given = CASES[name]
    if not recipe:
        names = list(CASES)
        before = next(n for n in reversed(names[: names.index(name)]) if CASES[n][0])
        recipe, given = CASES[before][0], [*CASES[before][1], *given]
    return recipe, [*given, *COMMON]


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def measure(images: str, name: str) -> dict[str, float]:
    """In a process of its own: trains three steps."""
    import torch

    from dinov3.config.train import load_config
    from dinov3.train.train import train

    torch.set_num_threads(1)
    recipe, given = case(name)
    config, _ = load_config(recipe, [f"train.dataset_path={images}", *given])
    base = memory("VmRSS")
    with tempfile.TemporaryDirectory() as out:
        outcome = train(config, out)
    assert outcome.finished
    return {"base": base, "peak": memory("VmHWM")}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", help="a folder of a few hundred photographs")
    p.add_argument("--only", type=int, metavar="N", help="one case, from 1")
    p.add_argument("--measure", metavar="CASE", help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.measure:
        print(json.dumps(measure(o.images, o.measure)))
        return 0
    from dinov3.config.train import load_config
    from dinov3.train.planner import PROCESS_BYTES, step

    print(
        "| configuration | tensors, MB | predicted, MB | measured, MB | ratio | blocks returned at once, MB | ratio |"
    )
    print("|---|---|---|---|---|---|---|")
    worst = 0.0
    for name in list(CASES)[o.only - 1 : o.only] if o.only else CASES:
        recipe, given = case(name)
        config, _ = load_config(recipe, [f"train.dataset_path={o.images}", *given])
        need = step(config)
        argv = [sys.executable, __file__, o.images, "--measure", name]
        measured = []
        for settings in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"}):
            done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | settings)
            measured.append(json.loads(done.stdout.splitlines()[-1]))
        plain, exact = (found["peak"] for found in measured)
        predicted = PROCESS_BYTES + need.on_cpu
        cells = [need.bytes / 1e6, predicted / 1e6, plain / 1e6]
        print(f"| {name} | {' | '.join(f'{c:.0f}' for c in cells)} | {predicted / plain:.3f} | {exact / 1e6:.0f} | "
              f"{(PROCESS_BYTES + need.bytes) / exact:.3f} |", flush=True)  # fmt: skip
        print(name, need.parts, measured, file=sys.stderr, flush=True)
        worst = max(worst, abs(predicted / plain - 1))
    print(f"largest deviation {worst:.1%}", file=sys.stderr)
    return 0 if worst <= 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
