"""The blocks of a frozen ViT as one C++ call, on x86 CPUs with Linux and a compiler (g++ or clang++, C++20).

`blocks.cpp` is compiled on first use, in seconds, for what this CPU has, and the library cached in `DINOV3_CACHE`
(`weights.download`) under a name that holds the source, compiler and options. Never needed: without a compiler `available()`
is empty, and `reason()` says why.

A level is what a library is compiled for: `avx2`, `avxvnni` (the same with VNNI), `avx512vnni`, `avx512` (with bf16 too) or
`amx`. Without instructions for bf16 integers of 16 bits take its place, which are more exact (`arithmetic`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.errors import DinoError, one_of
from dinov3.files import atomically
from dinov3.inference.fold import FoldedBlock
from dinov3.weights.download import root

SOURCE = Path(__file__).with_name("blocks.cpp")
PRECISIONS = ("fp32", "bf16", "int8")
RETURNED_AFTER = 128 << 20  # bytes of folded weights; a tenth of a second for each return

_V4 = "avx512f avx512bw avx512cd avx512dq avx512vl"
_LEVELS = {  # best first: features of the CPU as Linux names them, options of the compiler
    "amx": (
        f"{_V4} avx512_bf16 avx512_vnni amx_tile amx_bf16 amx_int8",
        "-march=x86-64-v4 -mavx512bf16 -mavx512vnni -mamx-tile -mamx-bf16 -mamx-int8",
    ),
    "avx512": (f"{_V4} avx512_bf16 avx512_vnni", "-march=x86-64-v4 -mavx512bf16 -mavx512vnni"),
    "avx512vnni": (f"{_V4} avx512_vnni", "-march=x86-64-v4 -mavx512vnni"),
    "avxvnni": ("avx2 fma bmi2 avx_vnni", "-march=x86-64-v3 -mavxvnni"),
    "avx2": ("avx2 fma bmi2", "-march=x86-64-v3"),
}


def supported() -> list[str]:
    """Levels whose instructions this CPU has, best first; none on other systems than Linux on x86."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return [level for level, (needed, _) in _LEVELS.items() if set(needed.split()) <= set(flags)]


def available(level: str | None = None) -> frozenset[str]:
    """Precisions that `Blocks` offers on this machine, at the best level or the given one. Compiles on first use."""
    return frozenset(PRECISIONS if _library(level)[0] else ())


def arithmetic(precision: str, level: str | None = None) -> str:
    """What takes a precision's place in the products, at the best level or the given one; empty where nothing does."""
    library, _ = _library(level)
    without = library is not None and "bf16" not in _LEVELS[library.level][0]
    return "16-bit integers" if precision == "bf16" and without else ""


def reason(level: str | None = None) -> str:
    """Why `available` is empty, in a sentence; empty where it is not."""
    return _library(level)[1]


class _Library:
    def __init__(self, path: Path, level: str) -> None:
        library = ctypes.CDLL(str(path))  # releases the interpreter's lock while it runs
        self.level = level
        self.blocks = library.dinov3_blocks
        self.blocks.argtypes = [ctypes.POINTER(_Job), ctypes.c_int]
        self.ready = bool(library.dinov3_ready())


@functools.lru_cache
def _library(level: str | None) -> tuple[_Library | None, str]:
    """The library of a level, or of the best one that works; else None and why."""
    levels = supported() if level is None else [one_of("level", level, _LEVELS)]
    compiler = os.environ.get("CXX") or "g++"
    compiler = shutil.which(compiler) or shutil.which("c++") or shutil.which("clang++") or ""
    if not set(levels) & set(supported()):
        return None, f"this CPU lacks what {level or 'the kernels'} need{'s' if level else ''}"
    if not compiler:
        return None, "there is no C++ compiler (g++, c++, clang++ or $CXX)"
    why = ""
    for name in levels:
        try:
            library = _Library(_built(compiler, name), name)
        except (OSError, subprocess.SubprocessError, DinoError) as error:
            why = f"{compiler} built no working library for {name}: {_last_line(error)}"
            continue
        if library.ready:
            return library, ""
        why = f"the system does not grant {name}"
    return None, why


def _last_line(error: Exception) -> str:
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
    errors = [line for line in text.splitlines() if "error" in line] or text.splitlines() or [type(error).__name__]
    return errors[0][:200]


def _built(compiler: str, level: str) -> Path:
    """The library's file; compiled unless the cache has it."""
    command = [compiler, "-std=c++20", "-O3", "-shared", "-fPIC", "-pthread", *_LEVELS[level][1].split()]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    key = hashlib.sha256(f"{command} {version}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    path = root() / "kernels" / f"blocks-{level}-{key}.so"
    if not path.is_file():  # two processes may both build it: the later one replaces it with the same
        with atomically(path) as temporary:
            command += [str(SOURCE), "-o", str(temporary)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return path


# ---- what the library takes ------------------------------------------------------------------------------------------


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "scale", "shift")),
        ("outputs", ctypes.c_int32),
        ("k", ctypes.c_int32),
    )


class _Block(ctypes.Structure):
    _fields_ = tuple((name, _Linear) for name in ("qkv", "proj", "fc1", "fc2"))


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("blocks", "x", "keep", "sin", "cos")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "n_blocks",
                "images",
                "tokens",
                "prefix",
                "width",
                "heads",
                "swiglu",
                "rms",
                "threads",
                "cls_only",
            )
        ),
        ("eps", ctypes.c_float),
    )


def _return_freed_memory() -> None:
    """To the system: glibc keeps what folding and packing freed, between the tiles that stay, in all as much as the model."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def quantised(weight: Tensor, inputs: int, most: int) -> tuple[Tensor, Tensor]:
    """Integers [out, in] in ±`most` and the scale of each row [out] (1 for a row of zeros).

    Smaller where a sum of products with integers from 0 to `inputs` could leave 32 bits.
    """
    scale = weight.abs().amax(1) / most
    largest = torch.maximum(weight.clamp(min=0).sum(1), -weight.clamp(max=0).sum(1))  # sums, by the inputs' choice
    scale = torch.maximum(scale, largest / ((2**31 - 1) / inputs - weight.shape[1] / 2))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight / scale[:, None]).round().to(torch.int16), scale


def packed(planes: Sequence[Tensor]) -> Tensor:
    """Weights [out, in] (one tensor, or three bf16 that add up) as tiles of 16 groups, 4 bytes along `in`, by 16 outputs."""
    group = 4 // planes[0].element_size()
    tiles = [w.reshape(len(w) // 16, 16, -1, 16, group).permute(0, 2, 3, 1, 4) for w in planes]
    return torch.stack(tiles, dim=2).contiguous()  # [out / 16, tiles, planes, 16, 16, group]


def split(x: Tensor) -> list[Tensor]:
    """Three bf16 tensors whose sum is the float32 tensor."""
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return parts


class Blocks:
    """The blocks of `fold`, packed for a precision. Calls may come from several threads at once."""

    def __init__(self, folded: Sequence[FoldedBlock], precision: str, level: str | None = None) -> None:
        """Raises DinoError where the kernels are not available or don't take the model's shape (see `fits`)."""
        library, why = _library(level)
        if library is None:
            raise DinoError(f"no kernels: {why}")
        one_of("precision", precision, sorted(available(level)))
        if unfit := fits(folded[0]):
            raise DinoError(f"no kernels for {unfit}")
        self.library, self.precision = library, precision
        self.integers = precision == "int8" or bool(arithmetic(precision, level))
        first = folded[0]
        self.width, self.heads, self.eps = first.proj_weight.shape[0], first.heads, first.eps
        self.swiglu, self.rms = first.ffn == "swiglu", first.norm == "rmsnorm"
        self.tensors: list[Tensor] = []  # what the pointers point to
        self.blocks = (_Block * len(folded))()
        freed = 0
        for i, block in enumerate(folded):
            self.blocks[i] = self._block(block)
            freed += sum(t.nbytes for t in vars(block).values() if isinstance(t, Tensor))
            if freed > RETURNED_AFTER:
                _return_freed_memory()
                freed = 0

    def _block(self, b: FoldedBlock) -> _Block:
        hidden = b.fc2_weight.shape[1]
        pad = -hidden % 64
        fc1, bias, fc2 = b.fc1_weight, b.fc1_bias, F.pad(b.fc2_weight, (0, pad))
        if self.swiglu:  # 32 rows of the gate, 32 of the value, and so on
            fc1 = F.pad(fc1.view(2, hidden, -1), (0, 0, 0, pad)).unflatten(1, (-1, 32)).transpose(0, 1).flatten(0, 2)
            bias = F.pad(bias.view(2, hidden), (0, pad)).unflatten(1, (-1, 32)).transpose(0, 1).flatten()
        else:
            fc1, bias = F.pad(fc1, (0, 0, 0, pad)), F.pad(bias, (0, pad))
        pairs = (b.qkv_weight, b.qkv_bias), (b.proj_weight, b.proj_bias), (fc1, bias), (fc2, b.fc2_bias)
        return _Block(*(self._linear(*pair) for pair in pairs))

    def _linear(self, weight: Tensor, bias: Tensor) -> _Linear:
        scale = shift = torch.empty(0)
        if self.integers:
            inputs, most = (255, 127) if self.precision == "int8" else (4095, 2**15 - 1)
            integers, scale = quantised(weight, inputs, most)
            shift = integers.float().sum(1) * scale
            in_bytes = most == 127 and self.library.level != "avx2"
            tiles = packed([integers.to(torch.int8) if in_bytes else integers])
        elif self.precision == "bf16":
            tiles = packed([weight.bfloat16()])
        else:
            tiles = packed(split(weight) if self.library.level == "amx" else [weight])
        tensors = [tiles, *(t.float().contiguous() for t in (bias, scale, shift))]
        self.tensors += tensors
        return _Linear(*(t.data_ptr() for t in tensors), *weight.shape)

    def __call__(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, prefix: int, layers: Sequence[int], cls_only: bool = False
    ) -> list[Tensor]:
        """Tokens [B, N, D] → the residual stream after each of `layers` (ascending), float32 [B, N, D]; the last of them
        [B, 1, D] with `cls_only`.

        rope: (sin, cos) [N - prefix, head_dim] as `RopeEmbedding` gives them; the first `prefix` tokens are not turned.
        """
        images, tokens, width = x.shape
        assert width == self.width, (width, self.width)
        assert list(layers) == sorted(set(layers)), layers
        stream = x.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        kept = {layer: torch.empty_like(stream) for layer in layers[:-1]}
        results = [*kept.values(), stream[:, :1] if cls_only else stream]
        if not stream.numel():
            return results
        keep = (ctypes.c_void_p * len(self.blocks))()
        for layer, y in kept.items():
            keep[layer] = y.data_ptr()
        tables = [] if rope is None else [t.detach().float().contiguous() for t in rope]
        assert all(t.shape == (tokens - prefix, width // self.heads) for t in tables), [t.shape for t in tables]
        sin, cos = [t.data_ptr() for t in tables] or (None, None)
        job = _Job(
            *(ctypes.addressof(self.blocks), stream.data_ptr(), ctypes.addressof(keep), sin, cos),
            *(layers[-1] + 1, images, tokens, prefix, width, self.heads, self.swiglu, self.rms),
            *(torch.get_num_threads(), cls_only, self.eps),
        )
        if self.library.blocks(ctypes.byref(job), PRECISIONS.index(self.precision)):
            raise MemoryError(f"no memory for {images} × {tokens} tokens in the kernels; take a smaller batch")
        return results


def fits(block: FoldedBlock) -> str:
    """What of a model's shape the kernels can't take, or an empty string."""
    width = block.proj_weight.shape[0]
    head_dim = width // block.heads
    if width % 64 or head_dim % 32:
        return f"width {width} with heads of {head_dim}: they take multiples of 64 and 32"
    return ""
