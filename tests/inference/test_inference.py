"""Fast forms: the plain model's numbers, its interface, its identity; what is refused, and with which sentence."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_fold import KINDS, varied
from torch import Tensor

import dinov3
from dinov3 import inference
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.errors import DinoError
from dinov3.features import extract, extract_layers, outputs, pool, vectors_of
from dinov3.inference import LOWEST_COSINE, distance, faster, kernels
from dinov3.inference.blocks import Blocks, Compiled
from dinov3.inference.fold import FoldedBlocks
from dinov3.inference.forms import FastConvNeXt, FastViT, Form
from dinov3.models.architectures import ConvNeXtConfig
from dinov3.models.convnext import ConvNeXt
from dinov3.weights.download import root
from dinov3.weights.identity import fingerprint, name_of

CPU, CACHE = torch.device("cpu"), str(root())
HAS_INT8 = "int8" in kernels.available()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "available", lambda level=None: frozenset())  # they have tests of their own
    monkeypatch.setattr(kernels, "reason", lambda level=None: "there is no C++ compiler")


def convnext(**options) -> ConvNeXt:
    torch.manual_seed(0)
    model = ConvNeXt(ConvNeXtConfig.of(depths=(1, 2, 1, 1), dims=(16, 24, 32, 48), **options))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.3))
    return model.eval()


def relative(given: Tensor, expected: Tensor) -> float:
    """The largest relative error of a token."""
    assert given.shape == expected.shape
    return float(((given - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@torch.no_grad()
def test_size_and_batch_do_not_matter_for_every_architecture() -> None:
    for kind in (*KINDS, "convnext", "pseudo patches"):
        plain = varied(kind) if kind in KINDS else convnext(patch_size=16 if kind == "pseudo patches" else None)
        fast = faster(plain)
        assert type(fast) in (FastViT, FastConvNeXt)
        for B, height, width in ((1, 64, 64), (3, 75, 130), (2, 32, 97)):
            x = torch.randn(B, 3, height, width)
            given, expected = fast.forward_features(x), plain.forward_features(x)
            assert given.keys() == expected.keys()
            for name in ("x_norm_clstoken", "x_norm_patchtokens", "x_prenorm"):
                assert relative(given[name], expected[name]) < 1e-5, (kind, name, B, height, width)
            assert given["x_storage_tokens"].shape == expected["x_storage_tokens"].shape
            assert relative(fast(x), plain(x)) < 1e-5


@pytest.mark.parametrize("kind", ["released", "untied", "convnext"])
@torch.no_grad()
def test_intermediate_layers_are_the_plain_models(kind: str) -> None:
    plain = convnext() if kind == "convnext" else varied(kind)
    fast, x = faster(plain), torch.randn(2, 3, 64, 96)
    variants = [{"n": 1}, {"n": 3, "norm": False}, {"n": [0, 2], "return_class_token": True, "reshape": True}]
    if kind != "convnext":
        variants.append({"n": [1, 2], "return_class_token": True, "return_extra_tokens": True})
    for options in variants:
        given, expected = (m.get_intermediate_layers(x, **options) for m in (fast, plain))
        assert len(given) == len(expected)
        for a, b in zip(given, expected, strict=True):
            for one, other in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert [m.shape for m in fast.feature_maps(x, 2)] == [m.shape for m in plain.feature_maps(x, 2)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_class_token_alone_is_that_of_the_full_pass(kind: str) -> None:
    fast, x = faster(varied(kind)), torch.randn(3, 3, 64, 96)
    expected = fast.forward_features(x)["x_norm_clstoken"]
    torch.testing.assert_close(fast.class_tokens(x), expected, rtol=1e-6, atol=1e-6)  # oneDNN may add in another order
    inputs = [(x, [])]
    for pooling, layer in (("cls", -1), ("cls", 0), ("mean", -1), ("cls+mean", -1)):
        of = {"preprocessing": Preprocessing(), "layer": layer}
        (given,), (features,) = vectors_of(fast, inputs, pooling=pooling, **of), extract(fast, inputs, **of)
        torch.testing.assert_close(given, pool(features, pooling), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_masks_and_lists_of_crops_are_taken() -> None:
    plain = varied("released")
    fast, large, small = faster(plain), torch.randn(2, 3, 32, 32), torch.randn(4, 3, 16, 16)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 3] = True
    given, expected = (m.forward_features([large, small], [mask, None]) for m in (fast, plain))
    for a, b in zip(given, expected, strict=True):
        assert relative(a["x_norm_patchtokens"], b["x_norm_patchtokens"]) < 1e-5


@pytest.mark.parametrize("tokens", [7, 300, 600])
@pytest.mark.parametrize("fused", [False, True])
def test_attention_in_chunks_is_softmax_attention(tokens: int, fused: bool) -> None:
    from dinov3.inference.blocks import attention

    q, k, v = (torch.randn(2, 3, tokens, 16) for _ in range(3))
    expected = (q @ k.transpose(-1, -2)).softmax(-1) @ v
    torch.testing.assert_close(attention(q, k, v, fused), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["released", "swiglu", "rmsnorm", "convnext"])
def test_bf16_is_near_the_plain_model_and_gives_float32(kind: str) -> None:
    plain = convnext() if kind == "convnext" else varied(kind)
    fast = faster(plain, "bf16")
    assert fast.form.cosine > LOWEST_COSINE["bf16"]
    assert distance(fast, plain)[1] == fast.form.cosine
    (found,) = next(outputs(fast, [torch.randn(1, 3, 64, 64)]))
    assert found["cls"].dtype == torch.float32


def test_a_cpu_without_bf16_computes_that_form_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, x = varied("released"), torch.randn(2, 3, 48, 64)
    monkeypatch.setattr("dinov3.inference.linear.has_bf16", lambda: False)
    fast = faster(plain, "bf16")
    assert "bf16 by torch in fp32" in str(fast.form)
    assert name_of(fast).endswith("-bf16")
    torch.testing.assert_close(fast(x), faster(plain)(x), rtol=0, atol=0)
    monkeypatch.setattr("dinov3.inference.linear.has_bf16", lambda: True)
    monkeypatch.setattr("dinov3.inference.linear.packs", lambda: False)  # emulated on such a CPU
    other = faster(plain, "bf16")
    assert not other.form.arithmetic  # another record than that of float32
    assert 0.9999 < F.cosine_similarity(other(x), fast(x)).min() < 1 - 1e-9


def test_without_onednn_plain_products_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, x = varied("swiglu"), torch.randn(1, 3, 40, 40)
    packed = faster(plain)(x)
    monkeypatch.setattr("dinov3.inference.linear.packs", lambda: False)
    torch.testing.assert_close(faster(plain)(x), packed, rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # imports torch's compiler
def test_blocks_for_a_gpu_give_the_same_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit products through their plain twin; the compiled form after some calls of a size."""
    plain = varied("released")
    x, grid = plain.tokens(torch.randn(2, 3, 32, 32))
    rope = plain.rope_embed(*grid)
    (expected,) = Blocks(FoldedBlocks(plain), "fp32")(x, rope, 5, [2])
    (in_fp8,) = Blocks(FoldedBlocks(plain), "fp8")(x, rope, 5, [2])
    assert F.cosine_similarity(in_fp8, expected, dim=-1).min() > 0.99
    monkeypatch.setattr(Compiled, "OPTIONS", {"backend": "eager"})
    compiled = Compiled(FoldedBlocks(plain), "fp32", CPU)
    with torch.no_grad():
        for _call in range(Compiled.AFTER + 1):
            torch.testing.assert_close(compiled(x, rope, 5, [2])[0], expected, rtol=1e-5, atol=1e-5)


# ---- identity --------------------------------------------------------------------------------------------------------


def test_fp32_has_the_plain_identity_and_bf16_its_own() -> None:
    plain = dinov3.load()
    exact, half = dinov3.load(fast="fp32"), dinov3.load(fast="bf16")
    assert name_of(exact) == name_of(plain)
    assert name_of(half) == f"{name_of(plain)}-bf16"
    assert fingerprint(half) == fingerprint(plain)
    assert exact.origin == plain.origin
    image = torch.rand(3, 32, 32)
    assert dinov3.embed(exact, image, size=32).similarity(dinov3.embed(plain, image, size=32)).item() > 0.99999
    assert dinov3.embed(half, image, size=32).model == name_of(half)


def test_choosing_and_probing_are_paid_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = varied("plain")
    first = faster(plain, "bf16")
    monkeypatch.setattr(inference, "distance", lambda fast, plain: pytest.fail("probed again"))
    assert faster(plain, "bf16").form == first.form
    with torch.no_grad():
        plain.cls_token += 1
    monkeypatch.setattr(inference, "distance", lambda fast, plain: (0.0, 0.99))
    with pytest.raises(
        DinoError, match=r"bf16 is not exact enough .* cosine 0.99.*, 0.9999 is the least allowed; use fp32"
    ):
        faster(plain, "bf16")


def test_the_faster_engine_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = varied("plain")

    class Slow(Blocks):
        def __init__(self, folded, precision) -> None:
            super().__init__(folded, precision)

        def __call__(self, *args):
            for _again in range(30):
                super().__call__(*args)
            return super().__call__(*args)

    monkeypatch.setattr(kernels, "available", lambda level=None: frozenset({"fp32", "int8"}))
    monkeypatch.setattr(kernels, "fits", lambda block: "")
    monkeypatch.setattr(kernels, "Blocks", Slow)
    assert faster(plain).form.engine == "torch"


def test_an_engine_that_is_not_exact_enough_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(Blocks):
        def __init__(self, folded, precision) -> None:
            super().__init__(folded, "fp32")

        def __call__(self, *args):
            return [y + torch.randn_like(y) for y in super().__call__(*args)]

    monkeypatch.setattr(kernels, "available", lambda level=None: frozenset({"fp32", "bf16", "int8"}))
    monkeypatch.setattr(kernels, "fits", lambda block: "")
    monkeypatch.setattr(kernels, "Blocks", Off)
    monkeypatch.setattr(inference, "_by_speed", lambda engines, folded: ["kernels", "torch"])
    for precision in ("fp32", "bf16"):
        for _from_the_record in (False, True):
            assert faster(varied("plain"), precision).form.engine == "torch"
    monkeypatch.setattr(inference, "_by_speed", lambda engines, folded: ["kernels"])
    with pytest.raises(DinoError, match="int8 is not exact enough"):
        faster(varied("plain"), "int8")


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "sentence"),
    [
        ("fp16", "four times as long with it as with fp32; use bf16"),
        ("fp8", "fp8 needs an NVIDIA GPU"),
        ("int8", r"int8 needs the compiled kernels \(there is no C\+\+ compiler\); use bf16"),
        ("bf61", "bf16"),
    ],
)
def test_other_precisions_are_one_sentence(precision: str, sentence: str) -> None:
    with pytest.raises(DinoError, match=sentence):
        dinov3.load(fast=precision)


def test_a_form_that_is_off_raises() -> None:
    with pytest.raises(DinoError, match=r"off by 0\.0001 of their length"):
        inference.check_distance(Form("fp32", "torch", "", error=1e-4))
    with pytest.raises(DinoError, match="int8 is not exact enough"):
        inference.check_distance(Form("int8", "kernels", "", cosine=0.998))
    with pytest.raises(DinoError, match="not exact"):
        inference.check_distance(Form("bf16", "torch", "", cosine=float("nan")))


def test_a_fast_form_is_not_trained_moved_or_copied() -> None:
    fast = faster(varied("plain"))
    assert not fast.train().training
    assert fast.to("cpu", torch.float32) is fast
    assert not any(p.requires_grad for p in fast.parameters())
    with pytest.raises(DinoError, match="stays as it was made"):
        fast.bfloat16()
    with pytest.raises(DinoError, match="no gradients"):
        fast(torch.randn(1, 3, 16, 16, requires_grad=True))
    for act in (copy.deepcopy, pickle.dumps):
        with pytest.raises(DinoError, match="send the plain model"):
            act(fast)
    with pytest.raises(DinoError, match="leave out dtype"):
        dinov3.load(fast="fp32", dtype="bfloat16")


def test_gradients_and_weights_of_the_plain_model_stay() -> None:
    plain = varied("released")
    state = copy.deepcopy(plain.state_dict())
    fast = faster(plain)
    plain(torch.randn(1, 3, 16, 16)).sum().backward()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    before = fast(torch.ones(1, 3, 16, 16))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    torch.testing.assert_close(fast(torch.ones(1, 3, 16, 16)), before)


# ---- in a fresh process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "precision",
    ["bf16", pytest.param("int8", marks=[pytest.mark.slow, pytest.mark.skipif(not HAS_INT8, reason="no kernels")])],
)
def test_embed_with_a_precision_fills_a_store_that_answers(
    precision: str, skimage_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINOV3_CACHE", CACHE)  # where compiled kernels are, if this machine has them
    store = tmp_path / "store"

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dinov3", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True)

    images = [skimage_images / "coffee.png", skimage_images / "chelsea.png"]
    done = run("embed", *images, "--out", store, "--precision", precision, "--size", 64)
    assert done.returncode == 0, done.stderr
    assert f"{precision} by" in done.stderr
    assert "2 embedded" in done.stderr
    hits = json.loads(run("search", store, "--image", images[0], "--json").stdout)
    assert hits[0]["path"].endswith("coffee.png")
    assert hits[0]["score"] > 0.999
    again = run("embed", images[0], "--out", store, "--size", 64)
    assert again.returncode == 1
    assert f"-{precision}" in again.stderr


def test_position_tables_of_a_training_run_are_exact_in_the_plain_model_only() -> None:
    plain = varied("released", pos_embed_rope_dtype="bf16")
    assert faster(plain) is plain
    assert faster(plain, "bf16").form.cosine > LOWEST_COSINE["bf16"]


@torch.no_grad()
def test_autocast_around_a_fast_form_changes_nothing() -> None:
    fast, x = faster(varied("released")), torch.randn(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fast(x)
    torch.testing.assert_close(inside, fast(x))


def test_layers_of_a_fast_form_come_in_the_order_requested() -> None:
    plain = varied("released")
    fast = faster(plain)
    batches = [(torch.randn(1, 3, 16, 16), [])]
    preprocessing = dinov3.default_preprocessing(plain)
    given, expected = (next(extract_layers(m, batches, [2, 0], preprocessing=preprocessing)) for m in (fast, plain))
    for a, b in zip(given, expected, strict=True):
        assert (a.layer, a.model) == (b.layer, b.model)
        torch.testing.assert_close(a.patches, b.patches, rtol=1e-4, atol=1e-4)
