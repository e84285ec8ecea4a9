"""Forms of a backbone side by side on this machine: CPU seconds an image, in turns in one run, accuracy and memory.

    dinov3 bench                                          # ViT-S and ViT-B at 224 px × 8, ViT-S at 512 px × 1
    dinov3 bench dinov3_vits16:224:8 --rounds 7 --skip timm --json

Ours: the plain model (eager), and its fast forms in fp32, bf16 and int8 by every engine this machine has. Peers, where
installed: transformers and timm (eager), onnxruntime and OpenVINO (both read the file of `dinov3 export`). Weights are random
and of equal shapes everywhere, images are noise: speed does not depend on them. Errors and cosines to the plain model are of
the shipped weights (`dinov3.inference`'s probe), since random ones would flatter; transformers and timm have none.

A round runs every form once; reported are medians over rounds of CPU seconds (user + system) an image, the ratio to our
eager model of the same round, and the ratios' range. Wall time is not: other work on the machine would enter it. Memory is
what making a form and computing two batches add to the peak of a process of its own, which has imported the libraries.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dinov3
from dinov3.errors import DinoError
from dinov3.export.graph import ONNX, TARGETS, export
from dinov3.hub.foreign import mend_torchvision
from dinov3.inference import PROBE_GRID, distance, kernels
from dinov3.inference.blocks import Blocks
from dinov3.inference.fold import FoldedBlocks
from dinov3.inference.forms import FastViT, Form
from dinov3.inference.linear import arithmetic_of
from dinov3.models.architectures import ViTConfig
from dinov3.weights.catalog import DEFAULT_MODEL, resolve

CASES = ("dinov3_vits16:224:8", "dinov3_vitb16:224:8", "dinov3_vits16:512:1")
PEERS = {  # form → its library, and the module that is imported before its memory is counted
    "transformers": ("transformers", "transformers.models.dinov3_vit.modeling_dinov3_vit"),
    "timm": ("timm", "timm"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "OpenVINO f32": ("openvino", "openvino"),
    "OpenVINO bf16": ("openvino", "openvino"),
}
READERS = ("onnxruntime", "openvino")  # of exported files
SHIPPED = "shipped"  # in the place of a model's name: the default model with its own weights
Run = Callable[[Tensor], Any]


# ---- the forms -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def plain_model(name: str) -> Any:
    return dinov3.load() if name == SHIPPED else dinov3.load(name, "random")


def fast_forms(name: str) -> Iterator[str]:
    """The fast forms of a model on this machine: "precision, engine"."""
    for precision in ("fp32", "bf16", "int8"):
        if precision != "int8" and arithmetic_of(precision, torch.device("cpu")) == precision:
            yield f"{precision}, torch"
        if precision in kernels.available() and not kernels.fits(FoldedBlocks(plain_model(name))[0]):
            yield f"{precision}, kernels"


def peer_forms(name: str, skip: Sequence[str]) -> Iterator[str]:
    """The forms of other libraries that are installed and have the model."""
    for form, (library, _) in PEERS.items():
        needed = (library, *(ONNX if library in READERS else ()))
        there = library not in skip and all(importlib.util.find_spec(module) for module in needed)
        if there and (library != "timm" or resolve(name)[0].timm):
            yield form


def runner(form: str, name: str, size: tuple[int, int], threads: int, folder: str) -> Run:
    """What computes one form of a model. folder: of exported files."""
    if form == "eager":
        return plain_model(name).forward_features
    if form not in PEERS:
        return fast_model(form, name).forward_features
    if PEERS[form][0] in READERS:
        path = onnx_file(name, size, folder)
        precision = form.removeprefix("OpenVINO ")
        return onnxruntime_model(path, threads) if form == "onnxruntime" else openvino_model(path, threads, precision)
    mend_torchvision()
    return transformers_model(name) if form == "transformers" else timm_model(name)


def fast_model(form: str, name: str) -> FastViT:
    precision, engine = form.split(", ")
    blocks: Any = {"torch": Blocks, "kernels": kernels.Blocks}[engine](FoldedBlocks(plain_model(name)), precision)
    return FastViT(plain_model(name), blocks, Form(precision, engine, ""))


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


def onnx_file(name: str, size: tuple[int, int], folder: str) -> str:
    """The file that `dinov3 export` writes, once for each model and size (height, width)."""
    out = Path(folder) / f"{name}-{size[0]}-{size[1]}"
    if not out.is_dir():
        export(plain_model(name), out, "onnx", size=size)
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


# ---- what is measured ------------------------------------------------------------------------------------------------


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


class Outputs:
    """The outputs of an exported file, named as a backbone's."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        found = self.run(images)
        values = found.values() if hasattr(found, "values") else found
        cls, _, registers, patches = (torch.from_numpy(np.asarray(value)) for value in values)
        return {"x_norm_clstoken": cls, "x_storage_tokens": registers, "x_norm_patchtokens": patches.flatten(1, 2)}


def accuracy(form: str, threads: int, folder: str) -> dict[str, float | None]:
    """The largest relative error and the lowest cosine of a token, of the shipped model's weights; None where a library is
    not given them."""
    shipped = plain_model(SHIPPED)
    if form in PEERS and PEERS[form][0] not in READERS:
        return {"error": None, "cosine": None}
    if form in PEERS:
        rows, columns = PROBE_GRID
        size = rows * shipped.stride, columns * shipped.stride
        model: Any = Outputs(runner(form, SHIPPED, size, threads, folder))
    else:
        model = shipped if form == "eager" else fast_model(form, SHIPPED)
    error, cosine = distance(model, shipped)
    return {"error": error, "cosine": cosine}


def memory_of(form: str, case: str, threads: int, folder: str) -> float | None:
    """MiB that a form needs above the libraries, measured in a process of its own; None where the system does not count."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_growth, form, case, threads, folder).result()


def _growth(form: str, case: str, threads: int, folder: str) -> float | None:
    name, size, batch = _case(case)
    torch.set_num_threads(threads)
    x = torch.randn(batch, 3, size, size)
    mend_torchvision()
    for module in ["sympy", *(PEERS[form][1:] if form in PEERS else ())]:  # torch imports sympy to initialise weights
        importlib.import_module(module)
    before = _peak()
    run = runner(form, name, (size, size), threads, folder)
    plain_model.cache_clear()  # as `load(…, fast=…)` keeps none
    with torch.inference_mode():
        for _ in range(2):
            run(x)
    after = _peak()
    return None if before is None or after is None else (after - before) / 1024


def _peak() -> int | None:
    """The most resident memory of this process so far, KiB (Linux)."""
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1])
    return None


def bench(
    cases: Sequence[str] = CASES,
    *,
    rounds: int = 7,
    threads: int = 1,
    skip: Sequence[str] = (),
    memory: bool = True,
    on_progress: Callable[[str], object] = lambda _: None,
) -> list[dict[str, Any]]:
    """A row for each case ("MODEL:SIZE:BATCH") and form: case, form, cpu_ms, ratio (times eager), least, most, error, cosine,
    peak_mib.

    skip: libraries to leave out. memory: also measure it, with a process for each row. Raises `DinoError` for a case that is
    not of that form.
    """
    parsed = [_case(case) for case in cases]
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case, (name, size, batch) in zip(cases, parsed):
            on_progress(f"{case}: making its forms")
            forms = ["eager", *fast_forms(name), *peer_forms(name, skip)]
            runs = {form: runner(form, name, (size, size), threads, folder) for form in forms}
            on_progress(f"{case}: {rounds} rounds of {', '.join(forms)}")
            times = turns(runs, torch.randn(batch, 3, size, size), rounds)
            del runs
            for form, taken in times.items():
                ratios = [a / b for a, b in zip(times["eager"], taken)]
                row = {"case": case, "form": form, "cpu_ms": 1e3 * statistics.median(taken)}
                row |= {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
                rows.append(row | {"peak_mib": None})
                if memory:
                    on_progress(f"{case}: peak memory of {form}")
                    rows[-1]["peak_mib"] = memory_of(form, case, threads, folder)
        measured = {}
        for form in dict.fromkeys(row["form"] for row in rows):
            on_progress(f"accuracy of {form}, {DEFAULT_MODEL}")
            measured[form] = accuracy(form, threads, folder)
    return [row | measured[row["form"]] for row in rows]


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

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = []
    heading = "| form | CPU ms an image | times eager (range) | peak MiB | error | cosine |"
    for case in dict.fromkeys(row["case"] for row in rows):
        lines += [f"{case}\n", heading, "|---|---|---|---|---|---|"]
        for r in (r for r in rows if r["case"] == case):
            ratio = f"{r['ratio']:.2f} ({r['least']:.2f}–{r['most']:.2f})"
            numbers = (number(r["peak_mib"], ".0f"), number(r["error"], ".1e"), number(r["cosine"], ".6f"))
            lines.append(f"| {r['form']} | {r['cpu_ms']:.1f} | {ratio} | {' | '.join(numbers)} |")
        lines.append("")
    return "\n".join(lines)
