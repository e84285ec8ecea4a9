"""The projection head: its names, its formula, its parts."""

from __future__ import annotations

import math

import pytest
import torch

from dinov3.errors import DinoError
from dinov3.heads import ProjectionHead


def head(**options: int) -> ProjectionHead:
    torch.manual_seed(0)
    made = ProjectionHead(6, 9, **{"hidden_dim": 5, "bottleneck_dim": 4} | options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def test_state_dict_names_and_shapes_are_the_given_ones() -> None:
    with torch.device("meta"):
        made = ProjectionHead(1024, 65_536)
    assert {name: tuple(value.shape) for name, value in made.state_dict().items()} == {
        "mlp.0.weight": (2048, 1024),
        "mlp.0.bias": (2048,),
        "mlp.2.weight": (2048, 2048),
        "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048),
        "mlp.4.bias": (256,),
        "last_layer.weight": (65_536, 256),
    }


def test_the_head_is_its_formula() -> None:
    made, x = head(), torch.randn(3, 6)
    w = made.state_dict()

    def exact_gelu(z: float) -> float:
        return z * 0.5 * (1 + math.erf(z / math.sqrt(2)))

    def linear(weight: str, z: list[float], bias: bool = True) -> list[float]:
        rows, offsets = w[weight + ".weight"].tolist(), w[weight + ".bias"].tolist() if bias else None
        return [
            sum(a * b for a, b in zip(row, z)) + (offsets[i] if offsets else 0.0)  # type: ignore[index]
            for i, row in enumerate(rows)
        ]

    for row, logits in zip(x.tolist(), made(x)):
        z = linear("mlp.4", [*map(exact_gelu, linear("mlp.2", [*map(exact_gelu, linear("mlp.0", row))]))])
        length = math.sqrt(sum(value * value for value in z))
        expected = linear("last_layer", [value / length for value in z], bias=False)
        torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_the_parts_one_after_the_other_are_the_whole() -> None:
    made, x = head(), torch.randn(2, 3, 6)
    unit = made(x, part="bottleneck")
    assert unit.shape == (2, 3, 4)
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(2, 3))
    torch.testing.assert_close(made(unit, part="prototypes"), made(x))
    with pytest.raises(DinoError, match="'bottleneck' or 'prototypes', not 'mlp'"):
        made(x, part="mlp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_bottleneck_stays_finite_in_every_dtype(dtype: torch.dtype) -> None:
    made = head().to(dtype)
    for parameter in made.mlp.parameters():
        torch.nn.init.zeros_(parameter)
    assert made(torch.zeros(1, 6, dtype=dtype)).isfinite().all()  # 1e-12 is 0 in float16


def test_no_masked_patch_gives_no_logit() -> None:
    assert head()(torch.zeros(0, 6)).shape == (0, 9)


@pytest.mark.parametrize("n_layers", [1, 2, 4])
def test_the_number_of_layers_is_that_of_linear_layers(n_layers: int) -> None:
    made = head(n_layers=n_layers)
    assert [name for name in made.state_dict() if name.endswith("weight")] == [
        *(["mlp.weight"] if n_layers == 1 else [f"mlp.{2 * i}.weight" for i in range(n_layers)]),
        "last_layer.weight",
    ]
    assert made(torch.randn(2, 6)).shape == (2, 9)


def test_a_head_without_layers_is_refused() -> None:
    with pytest.raises(DinoError, match="at least 1 layer, not 0"):
        head(n_layers=0)


def test_fresh_weights_are_small_and_biases_zero() -> None:
    torch.manual_seed(0)
    made = ProjectionHead(64, 128, hidden_dim=64, bottleneck_dim=64)
    made.init_weights()
    for name, value in made.state_dict().items():
        if name.endswith("bias"):
            assert not value.any(), name
        else:
            assert 0.018 < value.std() < 0.022, name
