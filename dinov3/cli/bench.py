"""Forms of a backbone side by side on this machine: CPU seconds an image, in turns in one run.

    dinov3 bench                                          # ViT-S and ViT-B at 224 px × 8, ViT-S at 512 px × 1
    dinov3 bench dinov3_vits16:224:8 --rounds 7 --skip timm --json

Ours: the plain model (eager), and its fast forms in fp32, bf16 and int8 by every engine this machine has. Peers, where
installed: transformers and timm (eager), onnxruntime and OpenVINO (both read the file of `dinov3 export`). Weights are random
and of equal shapes everywhere, images are noise: speed does not depend on them. Cosines to the plain model are those of the
shipped model's weights (`dinov3.inference`'s probe), which random weights would flatter.

A round runs every form once; reported are medians over rounds of CPU seconds (user + system) an image, the ratio to our
eager model of the same round, and the ratios' range. Wall time is not: other work on the machine would enter it.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dinov3
from dinov3.errors import DinoError
from dinov3.export.graph import ONNX, TARGETS, export
from dinov3.hub.foreign import mend_torchvision
from dinov3.inference import distance, kernels
from dinov3.inference.blocks import Blocks
from dinov3.inference.fold import fold
from dinov3.inference.forms import FastViT, Form
from dinov3.inference.linear import arithmetic_of
from dinov3.models.architectures import ViTConfig
from dinov3.weights.catalog import resolve

CASES = ("dinov3_vits16:224:8", "dinov3_vitb16:224:8", "dinov3_vits16:512:1")
Run = Callable[[Tensor], Any]


def forms_of(plain: Any) -> Iterator[tuple[str, Any]]:
    """(name, model) of every fast form on this machine."""
    folded = fold(plain)
    for precision in ("fp32", "bf16", "int8"):
        if arithmetic_of(precision, plain.device) != precision:
            continue
        if precision != "int8":
            form = Form(precision, "torch", "")
            yield f"{precision}, torch", FastViT(plain, Blocks(folded, precision), form)
        if precision in kernels.available() and not kernels.fits(folded[0]):
            form = Form(precision, "kernels", "")
            yield f"{precision}, kernels", FastViT(plain, kernels.Blocks(folded, precision), form)


def transformers_model(name: str) -> Run:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    from dinov3.weights.configs import transformers_config

    config = {k: v for k, v in transformers_config(resolve(name)[0].config).items() if k != "architectures"}
    model: Any = DINOv3ViTModel(DINOv3ViTConfig(**config)).eval()
    return lambda x: model(pixel_values=x)


def timm_model(name: str) -> Run:
    import timm

    model: Any = timm.create_model(resolve(name)[0].timm[0], num_classes=0, dynamic_img_size=True).eval()
    return lambda x: model.forward_features(x)


def onnx_file(name: str, size: int, folder: str) -> str:
    """The file that `dinov3 export` writes, once for each model and size."""
    out = Path(folder) / f"{name}-{size}"
    if not out.is_dir():
        export(dinov3.load(name, "random"), out, "onnx", size=(size, size))
    return str(out / TARGETS["onnx"])


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


def peers(
    name: str, size: int, batch: int, threads: int, skip: Sequence[str], folder: str
) -> Iterator[tuple[str, Run]]:
    def wanted(library: str) -> bool:
        return library not in skip and importlib.util.find_spec(library) is not None

    mend_torchvision()
    if wanted("transformers"):
        yield "transformers", transformers_model(name)
    if wanted("timm") and resolve(name)[0].timm:
        yield "timm", timm_model(name)
    if all(importlib.util.find_spec(library) for library in ONNX):
        if wanted("onnxruntime"):
            yield "onnxruntime", onnxruntime_model(onnx_file(name, size, folder), threads)
        if wanted("openvino"):
            for precision in ("f32", "bf16"):
                path = onnx_file(name, size, folder)
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


def bench(
    cases: Sequence[str] = CASES,
    *,
    rounds: int = 7,
    threads: int = 1,
    skip: Sequence[str] = (),
    on_progress: Callable[[str], object] = lambda _: None,
) -> list[dict[str, Any]]:
    """A row for each case ("MODEL:SIZE:BATCH") and form: case, form, cpu_ms, ratio (times eager), least, most, cosine.

    skip: libraries to leave out. Raises `DinoError` for a case that is not of that form.
    """
    parsed = [_case(case) for case in cases]
    torch.set_num_threads(threads)
    shipped = dinov3.load()
    cosines = {name: distance(model, shipped)[1] for name, model in forms_of(shipped)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case, (name, size, batch) in zip(cases, parsed):
            on_progress(case)
            plain: Any = dinov3.load(name, "random")
            runs: dict[str, Run] = {"eager": plain.forward_features}
            runs |= {form: model.forward_features for form, model in forms_of(plain)}
            runs |= dict(peers(name, size, batch, threads, skip, folder))
            times = turns(runs, torch.randn(batch, 3, size, size), rounds)
            for form, taken in times.items():
                ratios = [a / b for a, b in zip(times["eager"], taken)]
                row = {"case": case, "form": form, "cpu_ms": 1e3 * statistics.median(taken)}
                row |= {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
                rows.append(row | {"cosine": cosines.get(form)})
    return rows


def _case(text: str) -> tuple[str, int, int]:
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts[1:]):
        raise DinoError(f"a case is MODEL:SIZE:BATCH, such as {CASES[0]}, not {text!r}")
    model = resolve(parts[0])[0]
    if not isinstance(model.config, ViTConfig) or int(parts[1]) % model.config.patch_size:
        raise DinoError(f"{text!r}: a ViT and a size in whole patches are measured, such as {CASES[0]}")
    return parts[0], int(parts[1]), int(parts[2])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, a table for each case."""
    lines = []
    heading = "| form | CPU ms an image | times eager (range) | cosine, shipped model |"
    for case in dict.fromkeys(row["case"] for row in rows):
        lines += [f"{case}\n", heading, "|---|---|---|---|"]
        for r in (r for r in rows if r["case"] == case):
            cosine = "" if r["cosine"] is None else f"{r['cosine']:.6f}"
            ratio = f"{r['ratio']:.2f} ({r['least']:.2f}–{r['most']:.2f})"
            lines.append(f"| {r['form']} | {r['cpu_ms']:.1f} | {ratio} | {cosine} |")
        lines.append("")
    return "\n".join(lines)
