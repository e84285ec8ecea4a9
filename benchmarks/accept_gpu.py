"""Is training sound on this accelerator? ViT-S/16 from scratch on a folder, in calls of at most ten minutes.

    python benchmarks/accept_gpu.py IMAGES --knn TRAIN:VAL --out OUT                # call it again until it says PASS or FAIL
    python benchmarks/accept_gpu.py IMAGES --knn TRAIN:VAL --out OUT --recipe toy_cpu --steps 60 --device cpu    # a rehearsal

The first call profiles eight steps (OUT/profile.txt). Every call then trains for `--minutes`, resumes what the call before
left, and writes OUT/acceptance.json. Asked for after `--steps` steps: DINO's loss a twentieth below its plateau (the
logarithm of the number of prototypes), k-NN of the averaged teacher at least `--goal`. Reported: images a second (median
of log lines), the share of time that waits for data, peak memory, the device. Exit status: 0 passed, 1 failed, 3 not
finished yet.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dinov3.cli import training_overrides
from dinov3.config.train import TrainConfig, load_config
from dinov3.runlog import read_metrics
from dinov3.train.train import train


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images")
    p.add_argument("--knn", required=True, metavar="TRAIN:VAL", help="two labelled folders")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--recipe", default="vits16_one_gpu")
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--minutes", type=float, default=9.0, help="of training in this call")
    p.add_argument("--goal", type=float, default=0.55, help="k-NN accuracy")
    p.add_argument("--device", default="cuda")
    p.add_argument("overrides", nargs="*", help="settings that win: key.sub=value")
    o = p.parse_intermixed_args()
    recipe = o.recipe if o.recipe.endswith(".yaml") else f"{o.recipe}.yaml"

    def config(steps: int, knn: str | None, *given: str) -> TrainConfig:
        settings = training_overrides(o.images, None, recipe, steps, knn, o.device, [*given, *o.overrides])
        return load_config(recipe, settings)[0]

    report, profiled = o.out / "acceptance.json", o.out / "profile.txt"
    o.out.mkdir(parents=True, exist_ok=True)
    if not profiled.exists():
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if o.device.startswith("cuda") else [])]
        short = config(8, None, "evaluation.eval_period_iterations=0", "run.log_every=1")
        with profile(activities=activities) as steps:
            train(short, o.out / "profile-run", resume=False)
        order = f"self_{'device' if o.device.startswith('cuda') else 'cpu'}_time_total"
        profiled.write_text(steps.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))
    full = config(o.steps, o.knn, f"run.time_limit_minutes={o.minutes}")
    outcome = train(full, o.out / "run")

    records = list(read_metrics(o.out / "run" / "metrics.jsonl"))
    uniform = math.log(full.dino.head_n_prototypes)
    knn = [r["knn_accuracy"] for r in records if "knn_accuracy" in r]
    lines = [r for r in records if "images_per_second" in r]
    result = {
        "device": torch.cuda.get_device_name() if o.device.startswith("cuda") else o.device,
        "torch": torch.__version__,
        "steps": outcome.iterations,
        "of": outcome.total,
        "dino_loss": lines[-1]["dino_global_crops_loss"],
        "dino_plateau": uniform,
        "knn": knn,
        "images_per_second": statistics.median(r["images_per_second"] for r in lines[1:] or lines),
        "data_share": statistics.median(r["data_share"] for r in lines[1:] or lines),
        "memory_gb": max(r["memory_gb"] for r in lines),
    }
    learned, good = result["dino_loss"] < 0.95 * uniform, bool(knn) and max(knn) >= o.goal
    result["verdict"] = "unfinished" if not outcome.finished else "PASS" if learned and good else "FAIL"
    report.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return {"PASS": 0, "FAIL": 1}.get(result["verdict"], 3)


if __name__ == "__main__":
    sys.exit(main())
