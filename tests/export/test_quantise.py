"""Weights in 8 and 4 bits: what is written, how it loads, what it is refused for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import dinov3
from dinov3.errors import DinoError
from dinov3.export import quantise as module
from dinov3.export.convert import convert, save_pretrained
from dinov3.export.quantise import quantise
from dinov3.models import low_precision
from dinov3.models.architectures import ConvNeXtConfig, ViTConfig
from dinov3.weights import identity, reading
from dinov3.weights.catalog import ROWS
from tests.export.test_convert import pth
from tests.weights.test_formats import HUB, TINY, filled, images

PACKAGED = next(row.packaged_path for row in ROWS if row.packaged)


@pytest.mark.parametrize("kind, cosine, share", [("int8", 0.9995, 0.60), ("int4", 0.95, 0.45)])
def test_a_quantised_file_opens_in_a_fresh_process_with_its_features(kind, cosine, share, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dinov3", "convert", PACKAGED, tmp_path / "q", "--quantise", kind],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"note: {kind}: lowest cosine of a token of two probe images 0.9" in done.stderr
    file = tmp_path / "q" / "model.safetensors"
    assert file.stat().st_size < share * PACKAGED.stat().st_size  # which is bfloat16
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["dinov3"])
    assert (about["quantised"], about["row"]) == (kind, "dinov3_vitt16_own")

    plain, small = dinov3.load(), dinov3.load("dinov3_vitt16", weights=tmp_path / "q")
    x = F.interpolate(
        torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(3)), size=(96, 64), mode="bicubic"
    )
    with torch.no_grad():
        a, b = (m.forward_features(x)["x_norm_patchtokens"] for m in (plain, small))
    assert F.cosine_similarity(a, b, dim=-1).min() > cosine - 0.01
    assert small.origin.mean == plain.origin.mean
    assert identity.fingerprint(small) != identity.fingerprint(plain)
    assert not any(p.requires_grad for n, p in small.named_parameters() if "original" in n)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", low_precision.KINDS)
@torch.no_grad()
def test_every_family_loads_what_was_saved_bit_for_bit(name, kind, tmp_path, monkeypatch):
    monkeypatch.setitem(module.LOWEST_COSINE, kind, 0.5)  # random weights of width 64 bear little
    model, source = pth(tmp_path, name)
    report = quantise(source, tmp_path / "q", kind)
    again = dinov3.load(weights=tmp_path / "q")
    expected = low_precision.quantise(dinov3.load(weights=source), kind)
    x = images(64, 96)
    assert torch.equal(again(x), expected(x))
    assert type(again) is type(model)
    assert again.config == expected.config
    assert report.fingerprint == identity.fingerprint(again)
    assert report.cosine > (0.99 if kind == "int8" else 0.5)
    half = dinov3.load(weights=tmp_path / "q", dtype=torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_int8_is_within_a_step_of_torchao(oracles):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = ViTConfig(embed_dim=64, depth=1, num_heads=2, **HUB)
    ours, theirs = low_precision.quantise(filled(config), "int8"), filled(config)
    with torch.no_grad():
        quantization.quantize_(theirs, quantization.Int8WeightOnlyConfig())
        a, b, plain = (m.blocks[0].mlp.fc1.weight for m in (ours, theirs, filled(config)))
        step = plain.abs().amax(1, keepdim=True) / 127
        assert ((a - plain).abs() <= 0.501 * step).all()
        assert ((a - b.dequantize()).abs() <= 1.01 * step).all()  # whose scales are 0.4 % smaller
        assert F.cosine_similarity(ours(images(64, 64)), theirs(images(64, 64))).min() > 0.999


def test_four_bits_are_the_nearest_of_sixteen_levels_of_a_group():
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    pairs, scales, offsets = low_precision.Int4().right_inverse(weight)
    assert (pairs.shape, scales.shape) == ((3, 32), (3, 2))
    made = low_precision.Int4()(pairs, scales, offsets)
    for row in range(3):
        for group in range(2):
            part = weight[row, 32 * group : 32 * group + 32]
            levels = part.min() + torch.arange(16) * (part.max() - part.min()) / 15
            nearest = levels[(part[:, None] - levels).abs().argmin(1)]
            torch.testing.assert_close(made[row, 32 * group : 32 * group + 32], nearest, atol=1e-5, rtol=0)


def test_too_large_a_change_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(module.LOWEST_COSINE, "int4", 0.9999)
    with pytest.raises(
        DinoError, match=r"int4 changes the features too much: .* 0.9999 is the least allowed; take int8"
    ):
        quantise(PACKAGED, tmp_path / "q", "int4")
    assert not (tmp_path / "q").exists()


def test_quantised_weights_are_not_quantised_or_converted_again(tmp_path):
    quantise(PACKAGED, tmp_path / "q", "int8")
    with pytest.raises(DinoError, match="quantised already"):
        quantise(tmp_path / "q", tmp_path / "r", "int4")
    for write in (
        lambda out: convert(tmp_path / "q", out),
        lambda out: save_pretrained(dinov3.load(weights=tmp_path / "q"), out),
    ):
        with pytest.raises(DinoError, match="convert the original weights"):
            write(tmp_path / "r")
    with pytest.raises(DinoError, match="does not fit the requested model"):
        dinov3.load("dinov3_vits16", weights=tmp_path / "q")
    opened = reading.open(tmp_path / "q")
    assert [row.arch for row in opened.rows] == ["dinov3_vitt16"]


def test_a_layer_whose_inputs_are_no_whole_groups_stays_in_full():
    model = filled(ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)))
    low_precision.quantise(model, "int4")
    assert not hasattr(model.stages[2][0].pwconv1, "parametrizations")  # 24 inputs
    assert hasattr(model.stages[2][0].pwconv2, "parametrizations")  # 96
