"""Folder → store, beside transformers' processor + model on the same images: A B A B in one run.

    python benchmarks/embed.py FOLDER [--model dinov3_vits16] [--rounds 3] [--limit 200] [--size 224]

Both sides get the same random weights (converted), the same size and the same number of threads, and read the same
files. Ours writes a store; theirs keeps the vectors in memory, which favours it. Each round runs in a fresh process.
Prints images/s, CPU seconds an image and peak memory: median over the rounds, and the ratio of each pair of rounds.

The transformers side is what its documentation shows: PIL open, AutoImageProcessor, AutoModel, batches of 16.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def ours(images: list[str], size: int, weights: str, out: str) -> None:
    import dinov3
    from dinov3.data.sources import open_source
    from dinov3.embedding.pipeline import embed_source
    from dinov3.features import default_preprocessing

    (Path(out) / "list.txt").write_text("\n".join(images))
    model = dinov3.load(weights=weights)
    import lancedb  # noqa: F401  # seconds of import, which the clock excludes on both sides

    source = open_source(Path(out) / "list.txt")
    start = time.perf_counter(), time.process_time()
    report = embed_source(model, source, f"{out}/store", preprocessing=default_preprocessing(model, size=size))
    tell(report.embedded, start)


def theirs(paths: list[str], size: int, weights: str, out: str) -> None:
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # beside a CPU-only torch two operator schemas are missing; nothing here uses them
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    processor, model = AutoImageProcessor.from_pretrained(weights), AutoModel.from_pretrained(weights).eval()
    start = time.perf_counter(), time.process_time()
    vectors = []
    with torch.inference_mode():
        for i in range(0, len(paths), 16):
            images = [Image.open(p).convert("RGB") for p in paths[i : i + 16]]
            inputs = processor(images=images, size={"height": size, "width": size}, return_tensors="pt")
            vectors.append(model(**inputs).pooler_output)
    tell(len(torch.cat(vectors)), start)


def tell(images: int, start: tuple[float, float]) -> None:
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"images/s": images / wall, "CPU s/image": cpu / images, "peak MiB": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="dinov3_vits16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        job = json.loads(Path(args.job).read_text())
        {"ours": ours, "theirs": theirs}[args.side](job["images"], args.size, job["weights"], job["out"])
        return

    from dinov3 import load
    from dinov3.export.convert import convert
    from dinov3.weights.writing import save

    suffixes = {".jpg", ".jpeg", ".png"}
    images = [str(p.resolve()) for p in sorted(args.folder.rglob("*")) if p.suffix.lower() in suffixes][: args.limit]
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        save(load(args.model, "random"), f"{folder}/own.safetensors")
        convert(f"{folder}/own.safetensors", f"{folder}/transformers", to="transformers")
        for i in range(args.rounds):
            for side in runs:
                out = Path(folder) / f"{side}{i}"
                out.mkdir()
                weights = f"{folder}/own.safetensors" if side == "ours" else f"{folder}/transformers"
                job = {"images": images, "weights": weights, "out": str(out)}
                (out / "job.json").write_text(json.dumps(job))
                command = [sys.executable, __file__, str(args.folder), "--side", side, "--job", str(out / "job.json")]
                done = subprocess.run([*command, "--size", str(args.size)], capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr)
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(side, runs[side][-1], file=sys.stderr)

    print(f"{len(images)} images, {args.model} at {args.size}, {args.rounds} rounds, {platform.processor() or 'CPU'}")
    print(f"| | {' | '.join(runs['ours'][0])} |\n|---|---|---|---|")
    for side, rows in runs.items():
        print(f"| {side} | " + " | ".join(f"{statistics.median(r[k] for r in rows):.3g}" for k in rows[0]) + " |")
    ratios = {k: [a[k] / b[k] for a, b in zip(runs["ours"], runs["theirs"])] for k in runs["ours"][0]}
    print(
        "| ratio | "
        + " | ".join(f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in ratios.values())
        + " |"
    )


if __name__ == "__main__":
    main()
