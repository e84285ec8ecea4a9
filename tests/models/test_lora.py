"""LoRA: its formula, the layers it is put in, and that merging gives the plain model back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dinov3.errors import DinoError
from dinov3.models.architectures import ConvNeXtConfig, ViTConfig
from dinov3.models.convnext import ConvNeXt
from dinov3.models.lora import LoRA, add_lora, merge_lora
from dinov3.models.vit import VisionTransformer


def backbone(kind: str) -> VisionTransformer | ConvNeXt:
    torch.manual_seed(0)
    model: VisionTransformer | ConvNeXt
    if kind == "vit":
        model = VisionTransformer(ViTConfig(embed_dim=32, depth=2, num_heads=2, mask_k_bias=True))
    else:
        model = ConvNeXt(ConvNeXtConfig(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), layer_scale_init_value=1.0))
    model.init_weights()
    return model.eval()


def learn(model: nn.Module) -> None:
    """Values in the place of B's zeros."""
    for part in model.modules():
        if isinstance(part, LoRA):
            nn.init.normal_(part.b, std=0.1)


def test_a_layer_is_its_base_plus_a_scaled_product() -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(3, 2), torch.randn(4, 3)
    lora = LoRA(base, rank=2, alpha=6.0)
    with torch.no_grad():
        lora.a.copy_(torch.tensor([[1.0, 0, 0], [0, 2, 0]]))
        lora.b.copy_(torch.tensor([[1.0, 0], [0, -1]]))
    for row, y in zip(x, lora(x)):
        plain = base.weight @ row + base.bias
        expected = plain + 3.0 * torch.stack([row[0], -2 * row[1]])
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_nothing_changes_before_the_first_step_and_merging_gives_what_was_learnt(kind: str) -> None:
    model, x = backbone(kind), torch.randn(2, 3, 64, 64)
    keys, shapes = list(model.state_dict()), [v.shape for v in model.state_dict().values()]

    def tokens() -> Tensor:
        with torch.no_grad():
            return model.forward_features(x)["x_norm_patchtokens"]

    plain = tokens()
    add_lora(model, 4)
    assert torch.equal(tokens(), plain)  # bit for bit
    learn(model)
    tuned = tokens()
    assert (tuned - plain).abs().max() > 0.03
    merge_lora(model)
    torch.testing.assert_close(tokens(), tuned, atol=1e-5, rtol=0)
    assert list(model.state_dict()) == keys
    assert [v.shape for v in model.state_dict().values()] == shapes


def test_layers_are_those_that_are_named() -> None:
    def names(kind: str, *layers: str) -> set[str]:
        model = backbone(kind)
        add_lora(model, 2, layers=layers)
        return {name for name, part in model.named_modules() if isinstance(part, LoRA)}

    assert names("vit") == {f"blocks.{i}.attn.{name}" for i in (0, 1) for name in ("qkv", "proj")}
    assert names("vit", "fc1") == {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1"}
    assert len(names("convnext")) == 2 * 5
    with pytest.raises(DinoError, match="did you mean 'qkv'"):
        names("vit", "qvk")
