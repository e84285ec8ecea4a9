"""Folder → store, beside transformers and timm on the same images: A B C A B C in one run.

    python benchmarks/embed.py FOLDER [--precision fp32] [--busy 1] [--model dinov3_vits16] [--rounds 7] [--limit 200]

All sides read the same files at the same size, with their own default number of threads unless OMP_NUM_THREADS is set;
transformers also gets the same weights (random ones, converted). Ours writes a store and is what `dinov3 embed --precision P`
runs; theirs keep the vectors in memory, which favours them. Each round runs in a fresh process, beside `--busy` processes
that take a core each. Prints images/s, CPU seconds an image and peak memory: medians, and the ratio of each round.

The other sides are what their documentation shows: PIL open, AutoImageProcessor, AutoModel, batches of 16; PIL open,
timm's `create_transform`, batches of 16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def ours(images: list[str], size: int, weights: str, out: str, precision: str) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command does
    import dinov3
    from dinov3.data.sources import open_source
    from dinov3.embedding.pipeline import embed_source
    from dinov3.features import default_preprocessing

    (Path(out) / "list.txt").write_text("\n".join(images))
    model = dinov3.load(weights=weights, fast=precision)
    import lancedb  # noqa: F401  # seconds of import, which the clock excludes on both sides

    source = open_source(Path(out) / "list.txt")
    start = time.perf_counter(), time.process_time()
    report = embed_source(model, source, f"{out}/store", preprocessing=default_preprocessing(model, size=size))
    tell(report.embedded, start)


def transformers(paths: list[str], size: int, weights: str) -> None:
    import torch

    from dinov3.hub.foreign import mend_torchvision

    mend_torchvision()
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


def timm(paths: list[str], size: int, model: str) -> None:
    import torch

    from dinov3.hub.foreign import mend_torchvision
    from dinov3.weights.catalog import resolve

    mend_torchvision()
    import timm
    from PIL import Image

    net = timm.create_model(resolve(model)[0].timm[0], num_classes=0, img_size=size).eval()
    config = timm.data.resolve_data_config({"input_size": (3, size, size)}, model=net)
    transform = timm.data.create_transform(**config)
    start = time.perf_counter(), time.process_time()
    vectors = []
    with torch.inference_mode():
        for i in range(0, len(paths), 16):
            images = [transform(Image.open(p).convert("RGB")) for p in paths[i : i + 16]]
            vectors.append(net(torch.stack(images)))
    tell(len(torch.cat(vectors)), start)


def tell(images: int, start: tuple[float, float]) -> None:
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"images/s": images / wall, "CPU s/image": cpu / images, "peak MiB": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="dinov3_vits16")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--busy", type=int, default=0, help="processes beside it that compute all the time")
    parser.add_argument("--peers", nargs="*", choices=("transformers", "timm"), default=["transformers", "timm"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        job = json.loads(Path(args.job).read_text())
        sides = {
            "ours": lambda: ours(job["images"], args.size, job["own"], job["out"], args.precision),
            "transformers": lambda: transformers(job["images"], args.size, job["transformers"]),
            "timm": lambda: timm(job["images"], args.size, args.model),
        }
        sides[args.side]()
        return

    from dinov3 import load
    from dinov3.export.convert import convert
    from dinov3.weights.writing import save

    suffixes = {".jpg", ".jpeg", ".png"}
    images = [str(p.resolve()) for p in sorted(args.folder.rglob("*")) if p.suffix.lower() in suffixes][: args.limit]
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in ("ours", *args.peers)}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            own, converted = f"{folder}/own.safetensors", f"{folder}/transformers"
            save(load(args.model, "random"), own)
            convert(own, converted, to="transformers")
            load(weights=own, fast=args.precision)  # chooses and probes the form, once for these weights
            for i in range(args.rounds):
                for side in runs:
                    out = Path(folder) / f"{side}{i}"
                    out.mkdir()
                    job = {"images": images, "own": own, "transformers": converted, "out": str(out)}
                    (out / "job.json").write_text(json.dumps(job))
                    command = [sys.executable, __file__, str(args.folder), "--side", side, "--model", args.model]
                    command += ["--size", str(args.size), "--precision", args.precision, "--job", str(out / "job.json")]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        raise SystemExit(done.stderr)
                    runs[side].append(json.loads(done.stdout.splitlines()[-1]))
                    print(side, runs[side][-1], file=sys.stderr)
    finally:
        for process in busy:
            process.kill()

    about = f"{args.precision}, {args.rounds} rounds, {args.busy} busy, {platform.processor() or 'CPU'}"
    print(f"{len(images)} images, {args.model} at {args.size}, {about}")
    print(f"| | {' | '.join(runs['ours'][0])} |\n|---|---|---|---|")
    for side, rows in runs.items():
        print(f"| {side} | " + " | ".join(f"{statistics.median(r[k] for r in rows):.3g}" for k in rows[0]) + " |")
    for peer in args.peers:
        ratios = {k: [a[k] / b[k] for a, b in zip(runs["ours"], runs[peer])] for k in runs["ours"][0]}
        text = " | ".join(f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in ratios.values())
        print(f"| ours / {peer} | {text} |")


if __name__ == "__main__":
    main()
