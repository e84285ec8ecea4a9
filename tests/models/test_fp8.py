"""8-bit linear layers against recorded numbers and the plain product."""

from __future__ import annotations

import pytest
import torch
from paths import GOLDEN_LOSSES
from safetensors.torch import load_file
from toy_models import tiny_vit

from dinov3.errors import DinoError
from dinov3.models.low_precision import REFERENCE, Fp8Linear, convert_to_fp8, fp8_linear, torchao_product
from dinov3.models.vit import VisionTransformer

GOLDEN = load_file(GOLDEN_LOSSES / "fp8_linear.safetensors")


# torchao's emulation multiplies scaled values that were rounded to bfloat16
@pytest.mark.parametrize("library, most", [("ours", 1e-2), ("torchao", 2e-2)])
def test_output_and_gradients_are_the_recorded_ones(library: str, most: float) -> None:
    if library == "torchao":
        pytest.importorskip("torchao")
    multiply = REFERENCE if library == "ours" else torchao_product(emulate=True)
    x, weight, bias = (GOLDEN[name].clone().requires_grad_() for name in ("input", "weight", "bias"))
    y = fp8_linear(x, weight, bias, multiply)
    y.backward(GOLDEN["grad_output"])
    got = {"output": y, "grad_input": x.grad, "grad_weight": weight.grad, "grad_bias": bias.grad}
    for name, value in got.items():
        expected = GOLDEN[name].float()
        assert value.dtype == torch.bfloat16
        worst = (value.float() - expected).abs().max() / expected.abs().max()
        assert worst < most, f"{name}: {worst:.1e}"
    plain = GOLDEN["input"] @ GOLDEN["weight"].t() + GOLDEN["bias"]
    torch.testing.assert_close(plain, GOLDEN["output_bf16_matmul"], rtol=2e-2, atol=2e-2)
    used = {"input", "weight", "bias", "grad_output", "output_bf16_matmul", *got}
    assert used == set(GOLDEN)


def test_rounding_to_eight_bits_is_what_happens_and_no_more() -> None:
    """Far from the bfloat16 product's accuracy, near to the exact one: a relative error of an e4m3 step."""
    torch.manual_seed(0)
    x, w = torch.randn(32, 128).bfloat16(), torch.randn(64, 128).bfloat16()
    exact = x.double() @ w.double().t()
    off = (fp8_linear(x, w, None).double() - exact).norm() / exact.norm()
    assert 0.01 < off < 0.06


def vit(**options) -> VisionTransformer:
    wide = {"embed_dim": 64, "depth": 2, "n_storage_tokens": 0, "mask_k_bias": True, "layerscale_init": 1.0}
    return tiny_vit(**wide | options).train()


def test_a_converted_model_keeps_its_keys_and_nearly_its_output_and_trains() -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    keys, before = set(model.state_dict()), model(x)
    assert convert_to_fp8(model, "blocks") == 2 * 4
    assert set(model.state_dict()) == keys
    assert isinstance(model.blocks[0].mlp.fc1, Fp8Linear)
    with torch.autocast("cpu", torch.bfloat16):
        after = model(x)
        after.square().sum().backward()
    assert 0.99 < torch.cosine_similarity(before, after.float()).min() < 0.999999
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if "blocks" in n)
    with torch.no_grad():  # the key bias stays without effect
        model.blocks[0].attn.qkv.bias[64:128] = 1e3
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), after)


def test_a_model_in_torchaos_products_is_as_near_to_ours_as_either_to_the_plain_one() -> None:
    """A last bit of bfloat16 that differs moves some of the next layer's values to another 8-bit number."""
    pytest.importorskip("torchao")
    torch.manual_seed(1)
    x, outcomes = torch.randn(2, 3, 32, 32), []
    for multiply in (None, REFERENCE, torchao_product(emulate=True)):
        model = vit()
        if multiply is not None:
            convert_to_fp8(model, "blocks", multiply)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            y.square().mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        outcomes.append((y.detach().float().flatten(), gradients))
    for plain, ours, theirs in zip(*outcomes):
        assert torch.dist(ours, theirs) < 1.2 * torch.dist(plain, ours)
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99


def test_sides_that_do_not_fit_and_filters_that_match_nothing_are_errors() -> None:
    with pytest.raises(DinoError, match="multiples of 64"):
        convert_to_fp8(vit(embed_dim=48, num_heads=2))
    with pytest.raises(DinoError, match="no linear layer's path matches"):
        convert_to_fp8(vit(), "blokcs")
