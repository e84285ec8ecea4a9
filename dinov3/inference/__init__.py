"""A frozen, faster form of a backbone, chosen for the device, with its measured distance to the plain model.

    model = dinov3.load("dinov3_vits16", weights, fast="bf16")     # or faster(plain, "bf16")

fp32 gives the plain model's numbers up to rounding and has its identity in stores; bf16, int8 and fp8 have their own.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3.errors import DinoError, one_of
from dinov3.files import atomically
from dinov3.inference import kernels
from dinov3.inference.blocks import Blocks, Compiled
from dinov3.inference.fold import FoldedBlock, FoldedBlocks
from dinov3.inference.forms import Engine, FastConvNeXt, FastViT, Form
from dinov3.inference.linear import DTYPES, arithmetic_of
from dinov3.models.convnext import ConvNeXt
from dinov3.models.vit import VisionTransformer
from dinov3.weights.download import root
from dinov3.weights.identity import fingerprint

PRECISIONS = ("fp32", "bf16", "int8", "fp8")
LARGEST_ERROR = 1e-5  # of a token in fp32, relative
LOWEST_COSINE = {"bf16": 0.9999, "int8": 0.999, "fp8": 0.999}  # of a token
PROBE_GRID = (5, 8)  # patches of the probe images
Fast = FastViT | FastConvNeXt
Candidate = tuple[str, Callable[[Sequence[FoldedBlock]], Engine]]  # what it computes in, or ""; and what makes it


def faster(model: nn.Module, precision: str = "fp32") -> nn.Module:
    """The fast form of a backbone, on its device; `form` says which it is. The plain model stays as it was.

    For a network of another library there is none: "fp32" returns it as it is, "bf16" casts it. "fp32" returns a ViT with
    position tables below float32 (of a training run) as it is, too.

    Raises `DinoError` for a precision that this machine cannot do, and where tokens of a probe image are further from the
    plain model's than `LARGEST_ERROR` or `LOWEST_COSINE` allow.
    """
    check_precision(precision, next(model.parameters()).device)
    if isinstance(model, VisionTransformer) and precision == "fp32" and model.rope_embed.dtype != torch.float32:
        return model  # rounds q and k, and one that is rounded the other way is an error above the threshold
    if not isinstance(model, (VisionTransformer, ConvNeXt)):
        return model.to(cast_of(precision))
    plain: Any = model if next(model.parameters()).dtype == torch.float32 else copy.deepcopy(model).float()
    if isinstance(plain, ConvNeXt):
        if precision == "int8":
            raise DinoError("int8 is for vision transformers; for a ConvNeXt use bf16")
        engines, in_order = {"torch": _in_torch(precision, plain.device)}, lambda: ["torch"]
        build: Callable[[Form], Fast] = lambda form: FastConvNeXt(plain, form)  # noqa: E731
    else:
        folded = FoldedBlocks(plain)
        engines = _engines(folded[0], precision, plain.device)
        in_order = lambda: _by_speed(engines, folded[:1])  # noqa: E731
        build = lambda form: FastViT(plain, engines[form.engine][1](folded), form)  # noqa: E731
    record = _Record(plain, precision, {name: arithmetic for name, (arithmetic, _) in engines.items()})
    if (known := record.read()) is not None:
        return build(known)
    names = in_order()
    for name in names:
        fast = build(Form(precision, name, fingerprint(plain), arithmetic=engines[name][0]))
        error, cosine = distance(fast, plain)
        fast.form = replace(fast.form, error=error, cosine=cosine)
        try:
            check_distance(fast.form)
            break
        except DinoError:  # another engine may be closer
            if name == names[-1]:
                raise
    record.write(fast.form)
    return fast


def cast_of(precision: str) -> torch.dtype:
    """The dtype for networks that have no fast form and are cast as a whole. Raises `DinoError` for int8 and fp8."""
    check_precision(precision, "cpu")
    if precision not in ("fp32", "bf16"):
        raise DinoError(f"{precision} is for backbones of ours only; bf16 is for every network")
    return DTYPES[precision]


def check_precision(precision: str, device: torch.device | str) -> None:
    """Raises `DinoError` for a precision that does not exist, or not on this device."""
    device = torch.device(device)
    if precision in ("fp16", "float16", "half"):
        raise DinoError("fp16 is no fast form: a CPU takes four times as long with it as with fp32; use bf16")
    one_of("precision", precision, PRECISIONS)
    if precision == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise DinoError("fp8 needs an NVIDIA GPU of the Ada or Hopper generation or a later one; use bf16")
    if precision == "int8" and "int8" not in _kernels(device):
        why = kernels.reason() if device.type == "cpu" else "they are for CPUs"
        raise DinoError(f"int8 needs the compiled kernels ({why or 'not for this CPU'}); use bf16")


def _kernels(device: torch.device) -> frozenset[str]:
    return kernels.available() if device.type == "cpu" else frozenset()


# ---- which engine ----------------------------------------------------------------------------------------------------


def _in_torch(precision: str, device: torch.device) -> Candidate:
    arithmetic = arithmetic_of(precision, device)
    in_torch = Compiled if device.type == "cuda" and precision != "fp32" else Blocks
    return "" if arithmetic == precision else arithmetic, lambda folded: in_torch(folded, arithmetic, device)


def _engines(block: FoldedBlock, precision: str, device: torch.device) -> dict[str, Candidate]:
    """What can compute folded blocks on a device, by name."""
    engines: dict[str, Candidate] = {}
    if precision in _kernels(device) and not kernels.fits(block):
        engines["kernels"] = kernels.arithmetic(precision), lambda folded: kernels.Blocks(folded, precision)
    if precision != "int8":
        engines["torch"] = _in_torch(precision, device)
    if not engines:
        raise DinoError(f"there are no int8 kernels for {kernels.fits(block)}; use bf16")
    return engines


@torch.inference_mode()
def _by_speed(engines: dict[str, Candidate], folded: Sequence[FoldedBlock]) -> list[str]:
    """The engines by their CPU time for a block over two images of 14 × 14 patches, best of three turns, least first."""
    if len(engines) == 1:
        return list(engines)
    x = torch.randn(2, 197, len(folded[0].proj_bias), generator=torch.Generator().manual_seed(0))
    made = {name: make(folded) for name, (_, make) in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for _turn in range(4):
        for name, engine in made.items():
            start = time.process_time()
            engine(x, None, 1, [0], False)
            times[name].append(time.process_time() - start)
    return sorted(times, key=lambda name: min(times[name][1:]))  # the first turn warms up


# ---- how far from the plain model ------------------------------------------------------------------------------------


class _Record:
    """The file that remembers a form, so that choosing and probing are paid once for weights, precision, torch and CPU."""

    def __init__(self, plain: Any, precision: str, engines: dict[str, str]) -> None:
        self.path = root() / "inference" / f"{fingerprint(plain)}-{precision}.json"
        cpu = f"{torch.backends.cpu.get_cpu_capability()} {platform.machine()}"
        self.made_by = f"torch {torch.__version__} {cpu} {plain.device} {engines}"

    def read(self) -> Form | None:
        try:
            known = json.loads(self.path.read_text())
            return Form(**known) if known.pop("made_by") == self.made_by else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def write(self, form: Form) -> None:
        with suppress(OSError), atomically(self.path) as temporary:  # without a cache, the next probe costs again
            temporary.write_text(json.dumps(asdict(form) | {"made_by": self.made_by}))


def check_distance(form: Form) -> None:
    """Raises `DinoError` for a form that is further from the plain model than its precision explains."""
    if form.precision == "fp32" and not form.error <= LARGEST_ERROR:
        raise DinoError(
            f"the fast form's tokens are off by {form.error:.1g} of their length, {LARGEST_ERROR:.0g} is allowed: "
            "use the plain model, and please report this"
        )
    if form.precision != "fp32" and not form.cosine >= LOWEST_COSINE[form.precision]:
        raise DinoError(
            f"{form.precision} is not exact enough for these weights: a token of a probe image has cosine {form.cosine:.6f} "
            f"to the plain model's, {LOWEST_COSINE[form.precision]} is the least allowed; use fp32"
        )


@torch.inference_mode()
def distance(fast: Any, plain: Any) -> tuple[float, float]:
    """(largest relative error, lowest cosine) of a token of the probe images, after the final norm."""
    images = probe_images(plain)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        given, expected = (all_tokens(m.forward_features(images)) for m in (fast, plain.eval()))
    error = (given - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(error.max()), float(F.cosine_similarity(given.double(), expected.double(), dim=-1).min())


def probe_images(model: Any, grid: tuple[int, int] = PROBE_GRID) -> Tensor:
    """Two smooth images of so many patches, on the model's device."""
    coarse = torch.randn(2, model.config.in_chans, 6, 6, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=tuple(model.stride * n for n in grid), mode="bicubic").to(model.device)


def all_tokens(features: dict[str, Any]) -> Tensor:
    """[B, 1 + R + N, D] of `forward_features`."""
    names = ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens")
    return torch.cat([features[n] if features[n].ndim == 3 else features[n][:, None] for n in names], dim=1)
