"""Forms of a backbone side by side: CPU seconds an image, in turns in one run.

    python benchmarks/inference.py                                     # ViT-S and ViT-B at 224 px × 8, ViT-S at 512 px × 1
    python benchmarks/inference.py --case dinov3_vits16:224:8 --rounds 7 --threads 1
    python benchmarks/inference.py --skip timm transformers --json

Ours: the plain model (eager), and its fast forms in fp32, bf16 and int8 by every engine this machine has. Peers, where
installed: transformers and timm (eager), onnxruntime and OpenVINO (from an ONNX file that torch writes). Weights are random
and of equal shapes everywhere, images are noise: speed does not depend on them. Cosines to the plain model are those of the
shipped model's weights (`dinov3.inference`'s probe), which random weights would flatter.

A round runs every form once; the table holds medians over rounds of CPU seconds (user + system) an image, the ratio to our
eager model of the same round, and the ratios' range. Wall time is not shown: other work on the machine would enter it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dinov3
from dinov3.hub.foreign import mend_torchvision
from dinov3.inference import distance, kernels
from dinov3.inference.blocks import Blocks
from dinov3.inference.fold import fold
from dinov3.inference.forms import FastViT, Form

CASES = ("dinov3_vits16:224:8", "dinov3_vitb16:224:8", "dinov3_vits16:512:1")
Run = Callable[[Tensor], Any]


def forms_of(plain: Any) -> Iterator[tuple[str, Any]]:
    """(name, model) of every fast form on this machine."""
    folded = fold(plain)
    for precision in ("fp32", "bf16", "int8"):
        if precision != "int8":
            form = Form(precision, "torch", "")
            yield f"{precision}, torch", FastViT(plain, Blocks(folded, precision), form)
        if precision in kernels.available() and not kernels.fits(folded[0]):
            form = Form(precision, "kernels", "")
            yield f"{precision}, kernels", FastViT(plain, kernels.Blocks(folded, precision), form)


def transformers_model(name: str) -> Run:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    from dinov3.weights.configs import transformers_config

    config = {k: v for k, v in transformers_config(dinov3.load(name, "random").config).items() if k != "architectures"}
    model = DINOv3ViTModel(DINOv3ViTConfig(**config)).eval()
    return lambda x: model(pixel_values=x)


def timm_model(name: str) -> Run:
    import timm

    kind = {"dinov3_vits16": "small", "dinov3_vitb16": "base", "dinov3_vitl16": "large"}[name]
    model = timm.create_model(f"vit_{kind}_patch16_dinov3", num_classes=0, dynamic_img_size=True).eval()
    return lambda x: model.forward_features(x)


def onnx_file(name: str, size: int, batch: int, folder: str) -> str:
    path = f"{folder}/{name}-{size}-{batch}.onnx"
    if not Path(path).is_file():
        x = torch.randn(batch, 3, size, size)
        torch.onnx.export(dinov3.load(name, "random"), (x,), path, dynamo=False, opset_version=17)
    return path


def onnxruntime_model(path: str, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def openvino_model(path: str, threads: int, precision: str) -> Run:
    import openvino

    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", hints)
    return lambda x: compiled([np.asarray(x)])


def peers(name: str, size: int, batch: int, threads: int, skip: list[str], folder: str) -> Iterator[tuple[str, Run]]:
    def wanted(library: str) -> bool:
        return library not in skip and importlib.util.find_spec(library) is not None

    mend_torchvision()
    if wanted("transformers"):
        yield "transformers", transformers_model(name)
    if wanted("timm"):
        yield "timm", timm_model(name)
    if importlib.util.find_spec("onnx") is not None:
        if wanted("onnxruntime"):
            yield "onnxruntime", onnxruntime_model(onnx_file(name, size, batch, folder), threads)
        if wanted("openvino"):
            for precision in ("f32", "bf16"):
                path = onnx_file(name, size, batch, folder)
                yield f"OpenVINO {precision}", openvino_model(path, threads, precision)


def turns(runs: dict[str, Run], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """CPU seconds an image of each run in every round; one round before them warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, run in runs.items():
                start = time.process_time()
                run(x)
                if turn:
                    times[name].append((time.process_time() - start) / len(x))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=CASES, help="MODEL:SIZE:BATCH")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip", nargs="*", default=[], help="libraries to leave out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    shipped = dinov3.load()
    cosines = {name: distance(model, shipped)[1] for name, model in forms_of(shipped)}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in args.case:
            name, size, batch = case.split(":")
            plain: Any = dinov3.load(name, "random")
            runs: dict[str, Run] = {"eager": plain.forward_features}
            runs |= {name: model.forward_features for name, model in forms_of(plain)}
            runs |= dict(peers(name, int(size), int(batch), args.threads, args.skip, folder))
            times = turns(runs, torch.randn(int(batch), 3, int(size), int(size)), args.rounds)
            for form, taken in times.items():
                ratios = [a / b for a, b in zip(times["eager"], taken)]
                median = statistics.median(ratios)
                row = {"case": case, "form": form, "cpu_ms": 1e3 * statistics.median(taken), "ratio": median}
                results.append(row | {"least": min(ratios), "most": max(ratios), "cosine": cosines.get(form)})
            print(f"{case} done", file=sys.stderr)
    if args.json:
        print(json.dumps(results))
        return
    for case in args.case:
        print(f"\n{case}, {args.rounds} rounds, {args.threads} threads\n")
        print("| form | CPU ms an image | times eager (range) | cosine, shipped model |\n|---|---|---|---|")
        for r in (r for r in results if r["case"] == case):
            cosine = "" if r["cosine"] is None else f"{r['cosine']:.6f}"
            ratio = f"{r['ratio']:.2f} ({r['least']:.2f}–{r['most']:.2f})"
            print(f"| {r['form']} | {r['cpu_ms']:.1f} | {ratio} | {cosine} |")


if __name__ == "__main__":
    main()
