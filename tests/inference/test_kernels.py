"""The compiled blocks against the equations in plain torch, at every level of this CPU.

Levels that it lacks, but for AMX, run with their instructions emulated (`emulated.h`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3.errors import DinoError
from dinov3.inference import kernels
from dinov3.inference.fold import FoldedBlock
from dinov3.models.vit import rotate, rotation

HEADER = Path(__file__).with_name("emulated.h")
EMULATED = {  # options of the compiler, for levels that this CPU lacks
    level: f"-march=x86-64-v3 -O1 -Wno-psabi {defined} -DHEADER={zlib.crc32(HEADER.read_bytes())} -include {HEADER}"
    for level, defined in (
        ("avx512", "-DEMULATE_AVX512 -DEMULATE_BF16"),
        ("avx512vnni", "-DEMULATE_AVX512"),
        ("avxvnni", "-DEMULATE_AVXVNNI"),
    )
    if level not in kernels.supported() and kernels.available("avx2")
}


def cases(levels: Iterable[str]) -> list:
    def marks(level: str):  # real ones run it often enough
        return [pytest.mark.slow] if level in ("avx512", "avx512vnni") and level in EMULATED else []

    offered = {level: kernels.PRECISIONS if level in EMULATED else sorted(kernels.available(level)) for level in levels}
    return [pytest.param(level, p, marks=marks(level)) for level in offered for p in offered[level]]


CASES = cases([*kernels.supported(), *EMULATED])
BEST = cases([*kernels.supported()[:1], *EMULATED])
CLOSE = {"fp32": 3e-6, "bf16": 8e-3, "int8": 1.5e-2}  # relative error over all numbers
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    level = request.node.callspec.params.get("level") if hasattr(request.node, "callspec") else None
    if level in EMULATED:
        monkeypatch.setitem(kernels._LEVELS, level, (kernels._LEVELS[level][0], EMULATED[level]))
        monkeypatch.setattr(kernels, "supported", lambda: [level])


def folded(width: int, heads: int, hidden: int, ffn: str = "mlp", norm: str = "layernorm") -> FoldedBlock:
    fc1 = 2 * hidden if ffn == "swiglu" else hidden
    shapes = [(3 * width, width), (width, width), (fc1, width), (width, hidden)]
    tensors = [t for rows, k in shapes for t in (torch.randn(rows, k) * k**-0.5, torch.randn(rows) * 0.1)]
    tensors[0][:width] *= (width // heads) ** -0.5
    return FoldedBlock(heads, norm, 1e-5, ffn, *tensors)  # type: ignore[arg-type]


def sample(width: int, heads: int, images: int, tokens: int, prefix: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    x = torch.randn(images, tokens, width)
    x[:, -1] *= 30  # a token with a large norm
    angles = torch.randn(tokens - prefix, width // heads)
    return x, (angles.sin(), angles.cos())


def twin(
    blocks: list[FoldedBlock], x: Tensor, rope: tuple[Tensor, Tensor] | None, prefix: int, layer: Layer = F.linear
) -> list[Tensor]:
    outputs = []
    B, N, D = x.shape
    for b in blocks:

        def normed(x: Tensor, b: FoldedBlock = b) -> Tensor:
            return F.layer_norm(x, (D,), eps=b.eps) if b.norm == "layernorm" else F.rms_norm(x, (D,), eps=b.eps)

        qkv = layer(normed(x), b.qkv_weight, b.qkv_bias).view(B, N, 3, b.heads, -1)
        qk = qkv[:, :, :2] if rope is None else rotate(qkv[:, :, :2], *rotation(*rope, prefix))
        q, k = qk.transpose(1, 3).unbind(2)
        attended = (q @ k.transpose(-1, -2)).softmax(-1) @ qkv[:, :, 2].transpose(1, 2)
        x = x + layer(attended.transpose(1, 2).reshape(B, N, D), b.proj_weight, b.proj_bias)
        hidden = layer(normed(x), b.fc1_weight, b.fc1_bias)
        if b.ffn == "swiglu":
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden)
        x = x + layer(hidden, b.fc2_weight, b.fc2_bias)
        outputs.append(x)
    return outputs


def integer_layer(x: Tensor, weight: Tensor, bias: Tensor, inputs: int = 255, most: int = 127) -> Tensor:
    """Activations from 0 to `inputs`, a scale and zero point for each token; weights in ±`most`, a scale for each row."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = torch.where(high > low, (high - low) / inputs, 1.0)
    zero = (-low * (1 / scale)).round()
    u = ((x * (1 / scale)).round() + zero).clamp(0, inputs)
    w_scale = torch.maximum(
        weight.abs().amax(1) / most, weight.abs().sum(1) / ((2**31 - 1) / inputs - weight.shape[1] / 2)
    )
    w_scale = torch.where(w_scale > 0, w_scale, 1.0)
    w = (weight / w_scale[:, None]).round()
    return ((u - zero).double() @ w.double().T).float() * scale * w_scale + bias


def distance(x: Tensor, of: Tensor) -> float:
    return float((x - of).norm() / of.norm())


def layer_of(precision: str) -> Layer:
    return integer_layer if precision == "int8" else F.linear


@pytest.mark.parametrize("level, precision", CASES)
@pytest.mark.parametrize(
    "width, heads, hidden, ffn, norm, images, tokens",
    [
        (192, 3, 768, "mlp", "layernorm", 3, 37),
        (128, 4, 352, "swiglu", "rmsnorm", 1, 65),  # heads of 32; the hidden width is no multiple of 64
        (256, 2, 512, "swiglu", "layernorm", 2, 21),  # heads of 128
        (64, 1, 256, "mlp", "layernorm", 1, 1029),
        (64, 1, 256, "mlp", "layernorm", 1, 2),
    ],
)
def test_outputs_are_those_of_plain_torch(level, precision, width, heads, hidden, ffn, norm, images, tokens) -> None:
    torch.manual_seed(0)
    blocks = [folded(width, heads, hidden, ffn, norm) for _ in range(2)]
    prefix = min(5, tokens - 1)
    x, rope = sample(width, heads, images, tokens, prefix)
    before = x.clone()
    made = kernels.Blocks(blocks, precision, level)
    outputs = made(x, rope, prefix, [0, 1])
    before_last, first_tokens = made(x, rope, prefix, [0, 1], True)
    assert torch.equal(before_last, outputs[0])
    assert torch.equal(first_tokens, outputs[1][:, :1])
    expected = twin(blocks, x, rope, prefix, layer_of(precision))
    assert torch.equal(x, before)
    assert len(outputs) == 2
    for output, wanted in zip(outputs, expected):
        assert distance(output, wanted) < CLOSE[precision]
        assert F.cosine_similarity(output, wanted, dim=-1).min() > (0.9999 if precision != "int8" else 0.999)


@pytest.mark.parametrize("level, precision", CASES)
def test_integer_products_are_exact(level, precision) -> None:
    """Without attention's rounding (proj is zero) only a value on the edge between two integers may differ."""
    if precision != "int8" and not kernels.arithmetic(precision, level):
        pytest.skip("about integers")
    layer = partial(integer_layer, inputs=4095, most=2**15 - 1) if precision == "bf16" else integer_layer
    block = folded(128, 2, 320)
    block = replace(block, proj_weight=torch.zeros(128, 128))
    x, rope = sample(128, 2, 2, 19, 5)
    x[0, 3] = 0  # a token of zeros
    (output,) = kernels.Blocks([block], precision, level)(x, rope, 5, [0])
    assert distance(output, twin([block], x, rope, 5, layer)[0]) < 2e-4


def test_sums_of_integers_stay_within_32_bits() -> None:
    torch.manual_seed(0)
    weight = torch.ones(4, 4096) * torch.tensor([0.0, 1e-3, 30.0, -1.0])[:, None]
    weight = torch.cat([weight, torch.randn(4, 4096)])
    for inputs, most in (255, 127), (4095, 2**15 - 1):
        integers, scale = kernels.quantised(weight, inputs, most)
        assert integers.abs().max() <= most
        positive = integers.clamp(min=0).long().sum(1)
        assert max(positive.max(), (positive - integers.long().sum(1)).max()) * inputs < 2**31
        assert distance(integers * scale[:, None], weight) < 5e-3


@pytest.mark.parametrize("level, precision", CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_image(level, precision, bad) -> None:
    torch.manual_seed(0)
    run = kernels.Blocks([folded(64, 2, 128)], precision, level)
    x, rope = sample(64, 2, 2, 18, 5)
    (clean,) = run(x, rope, 5, [0])
    x[0, 7, 3] = bad
    (output,) = run(x, rope, 5, [0])
    assert output[0].isnan().any(-1).all()
    assert torch.equal(output[1], clean[1])


@pytest.mark.parametrize("level, precision", BEST)
def test_a_batch_in_one_thread_is_its_images_one_by_one(level, precision) -> None:
    torch.manual_seed(0)
    made = kernels.Blocks([folded(64, 1, 128), folded(64, 1, 128)], precision, level)
    x, rope = sample(64, 1, 5, 101, 5)  # two images at a time in int8, and one
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for cls_only in (False, True):
            batch = made(x, rope, 5, [0, 1], cls_only)
            single = [made(image[None], rope, 5, [0, 1], cls_only) for image in x]
            for layer, output in enumerate(batch):
                assert torch.equal(output, torch.cat([outputs[layer] for outputs in single]))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("level, precision", BEST)
def test_without_positions_and_with_strides(level, precision) -> None:
    torch.manual_seed(0)
    block = folded(128, 2, 256)
    x = torch.randn(50, 2, 128).transpose(0, 1)
    (output,) = kernels.Blocks([block], precision, level)(x, None, 1, [0])
    assert distance(output, twin([block], x, None, 1, layer_of(precision))[0]) < CLOSE[precision]
    assert kernels.Blocks([block], precision, level)(x[:0], None, 1, [0])[0].shape == (0, 50, 128)


@pytest.mark.parametrize("level, precision", BEST)
def test_threads_change_nothing(level, precision) -> None:
    torch.manual_seed(0)
    run = kernels.Blocks([folded(128, 2, 256), folded(128, 2, 256)], precision, level)
    inputs = [sample(128, 2, images, tokens, 5) for images, tokens in ((1, 300), (3, 70), (2, 41))]
    alone = [run(x, rope, 5, [1])[0] for x, rope in inputs]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)  # within a call
        with ThreadPoolExecutor(3) as pool:  # and three calls at once
            together = list(pool.map(lambda given: run(*given, 5, [1])[0], inputs))
            first_tokens = list(pool.map(lambda given: run(*given, 5, [1], True)[0], inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
    assert all(torch.equal(a[:, :1], b) for a, b in zip(alone, first_tokens))


def test_three_bfloat16_hold_a_float32() -> None:
    x = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    assert torch.equal(sum(part.double() for part in kernels.split(x)).float(), x)


def test_shapes_that_do_not_fit_are_named() -> None:
    assert kernels.fits(folded(64, 2, 64)) == ""
    assert "width 96" in kernels.fits(folded(96, 2, 64))
    if CASES:
        with pytest.raises(DinoError, match="heads of 16"):
            kernels.Blocks([folded(64, 4, 64)], "fp32")


# ---- building --------------------------------------------------------------------------------------------------------

PROBE = """
import os, sys, torch
from dinov3.inference import kernels
print(sorted(kernels.available("avx2")), kernels.reason("avx2"))
"""


def probe(cache: Path, compiler: str, code: str = PROBE, **variables: str) -> str:
    environment = os.environ | {"DINOV3_CACHE": str(cache), "CXX": compiler} | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(not kernels.available("avx2"), reason="needs AVX2 and a compiler")
def test_the_library_is_built_once_and_works_in_a_forked_child(tmp_path: Path) -> None:
    compiler = script(tmp_path / "compiler", f'echo "$*" >> {tmp_path}/log\nexec g++ "$@"')
    assert probe(tmp_path / "cache", compiler) == "['bf16', 'fp32', 'int8']"
    code = PROBE + (
        "from dinov3.inference.fold import FoldedBlock\n"
        "shapes = (192, 64), (192,), (64, 64), (64,), (64, 64), (64,), (64, 64), (64,)\n"
        "block = FoldedBlock(1, 'layernorm', 1e-5, 'mlp', *(torch.randn(s) / 8 for s in shapes))\n"
        "torch.set_num_threads(2)\n"
        "run, x = kernels.Blocks([block], 'fp32', 'avx2'), torch.randn(2, 40, 64)\n"
        "(wanted,) = run(x, None, 5, [0])\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(not torch.equal(run(x, None, 5, [0])[0], wanted))\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    assert probe(tmp_path / "cache", compiler, code).split() == ["['bf16',", "'fp32',", "'int8']", "0"]
    assert (tmp_path / "log").read_text().count("-shared") == 1
    assert [p.suffix for p in (tmp_path / "cache" / "kernels").iterdir()] == [".so"]


@pytest.mark.skipif("avx2" not in kernels.supported(), reason="needs AVX2")
@pytest.mark.parametrize(
    "compiler, sentence",
    [
        ("echo 'blocks.cpp:1: error: no concepts' >&2; exit 1", "no working library for avx2: blocks.cpp:1: error"),
        ('for last; do :; done; test "$last" = --version || echo nonsense > "$last"', "no working library for avx2"),
    ],
)
def test_a_compiler_that_fails_is_one_sentence(tmp_path: Path, compiler: str, sentence: str) -> None:
    output = probe(tmp_path / "cache", script(tmp_path / "compiler", compiler))
    assert output.startswith("[] ")
    assert sentence in output
    assert "\n" not in output


def test_without_a_compiler_nothing_breaks(tmp_path: Path) -> None:
    output = probe(tmp_path / "cache", str(tmp_path / "none"), PATH=str(tmp_path))
    assert output.startswith("[] ")
    assert "compiler" in output or "CPU" in output
    assert not (tmp_path / "cache").exists()
