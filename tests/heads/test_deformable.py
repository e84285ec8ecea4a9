"""Deformable attention: recorded numbers, the plain definition, gradients, autocast, export."""

from __future__ import annotations

import math

import pytest
import torch
from golden_cases import Case
from torch import Tensor

from dinov3.errors import DinoError
from dinov3.heads.mask2former import MSDeformAttn, centres, deformable_sampling, neighbours

SHAPES = [(2, 3), (4, 5), (1, 4)]
S = sum(h * w for h, w in SHAPES)


def one_point_after_another(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The definition: bilinear, pixel centres at (i + 0.5) / size, zero outside."""
    B, _, M, d = value.shape
    _, Q, _, L, K, _ = locations.shape
    out = torch.zeros(B, Q, M, d, dtype=value.dtype)
    for b, q, m, level, k in torch.cartesian_prod(*(torch.arange(n) for n in (B, Q, M, L, K))).tolist():
        height, width = shapes[level]
        start = sum(h * w for h, w in shapes[:level])
        x = locations[b, q, m, level, k, 0].item() * width - 0.5
        y = locations[b, q, m, level, k, 1].item() * height - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    near = (1 - abs(y - row)) * (1 - abs(x - column))
                    out[b, q, m] += weights[b, q, m, level, k] * near * value[b, start + row * width + column, m]
    return out.flatten(2)


def drawn(dtype: torch.dtype = torch.float64, *, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, S, 2, 3, generator=generator, dtype=dtype)
    locations = torch.rand(2, 4, 2, 3, 2, 2, generator=generator, dtype=dtype) * spread + (1 - spread) / 2
    weights = torch.rand(2, 4, 2, 3, 2, generator=generator, dtype=dtype)
    return value, locations, weights


def test_it_gives_the_recorded_numbers() -> None:
    case = Case("ms_deform_attn")
    c = case.config
    attention = MSDeformAttn(c["d_model"], c["n_levels"], c["n_heads"], c["n_points"], ratio=c["ratio"])
    case.compare("init.sampling_offsets.bias", attention.sampling_offsets.bias.detach())
    assert not attention.sampling_offsets.weight.any()
    case.fill(attention)
    shapes = [(h, w) for h, w in c["spatial_shapes_HW"]]
    query, value = case.input("query"), case.input("value")
    ref2 = case.input("reference_points_2") * 0.25 + 0.5
    ref4 = torch.cat([ref2, case.input("reference_wh") * 0.1 + 0.4], dim=-1)
    padding = torch.zeros(value.shape[:2], dtype=torch.bool)
    padding[1, -10:] = True
    with torch.no_grad():
        case.compare("ref2", attention(query, ref2, value, shapes))
        case.compare("ref4", attention(query, ref4, value, shapes))
        case.compare("ref2_padded", attention(query, ref2, value, shapes, padding))
    case.all_checked()


@pytest.mark.parametrize("spread", [1.0, 3.0, 1e6])
def test_sampling_is_the_plain_definition_inside_and_outside_the_map(spread: float) -> None:
    value, locations, weights = drawn(spread=spread)
    expected = one_point_after_another(value, SHAPES, locations, weights)
    assert torch.allclose(deformable_sampling(value, SHAPES, locations, weights), expected, atol=1e-12)
    if spread < 10:
        assert expected.any()


def test_points_on_borders_and_centres_are_the_plain_definition() -> None:
    value, locations, weights = drawn()
    grid = torch.tensor([0.0, 1.0, 0.5, 0.125, -0.125, 1.125], dtype=torch.float64)
    locations = torch.cartesian_prod(grid, grid)[:32].reshape(1, 4, 2, 1, 4, 2).expand(2, 4, 2, 3, 4, 2).contiguous()
    weights = weights[..., :1].expand(*weights.shape[:-1], 4).contiguous()
    expected = one_point_after_another(value, SHAPES, locations, weights)
    assert torch.allclose(deformable_sampling(value, SHAPES, locations, weights), expected, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    value, locations, weights = (t.requires_grad_() for t in drawn(spread=1.4))
    assert torch.autograd.gradcheck(
        lambda v, p, w: deformable_sampling(v, SHAPES, p, w), (value, locations, weights), atol=1e-7
    )


def test_gradients_of_the_whole_attention_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    attention = MSDeformAttn(4, len(SHAPES), n_heads=2, n_points=2, ratio=0.5).double()
    for p in attention.parameters():
        torch.nn.init.normal_(p, std=0.3)
    query = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    value = torch.randn(1, S, 4, dtype=torch.float64, requires_grad=True)
    reference = (torch.rand(1, 3, 1, 4, dtype=torch.float64) * 0.5 + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, v, r: attention(q, r, v, SHAPES), (query, value, reference), atol=1e-6)


def test_points_that_are_not_numbers_give_no_numbers_and_no_crash() -> None:
    value, locations, weights = drawn()
    locations[0, 0] = float("nan")
    out = deformable_sampling(value, SHAPES, locations, weights)
    assert out[0, 0].isnan().all()
    assert out[1].isfinite().all()
    assert all(0 <= int(cell) < 5 for cell, _ in neighbours(torch.tensor(float("inf")), 5))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_under_autocast_points_stay_float32(half: torch.dtype) -> None:
    """On a map of 500 cells that are 0 and 1 in turn, a point in half precision would read something in between."""
    attention = MSDeformAttn(2, 1, n_heads=1, n_points=1)
    with torch.no_grad():
        attention.sampling_offsets.bias.zero_()
        for projection in (attention.value_proj, attention.output_proj):
            projection.weight.copy_(torch.eye(2))
    stripes = (torch.arange(500) % 2).float()[None, :, None].expand(1, 500, 2)
    cells = torch.tensor([100, 351, 497])
    reference = torch.stack([(cells + 0.5) / 500, torch.full((3,), 0.5)], dim=-1).view(1, 3, 1, 2)
    with torch.no_grad(), torch.autocast("cpu", half):
        out = attention(torch.zeros(1, 3, 2), reference, stripes, [(1, 500)])
    assert out.dtype is half
    assert torch.allclose(out[0, :, 0].float(), (cells % 2).float(), atol=0.01)


def test_a_module_in_bfloat16_agrees_with_float32() -> None:
    torch.manual_seed(0)
    attention = MSDeformAttn(16, len(SHAPES), n_heads=4)
    query, value, reference = torch.randn(2, 5, 16), torch.randn(2, S, 16), torch.rand(2, 5, 1, 2)
    with torch.no_grad():
        expected = attention(query, reference, value, SHAPES)
        out = attention.bfloat16()(query.bfloat16(), reference, value.bfloat16(), SHAPES)
    assert out.dtype is torch.bfloat16
    assert (out.float() - expected).abs().max() < 0.05


def test_centres_are_x_then_y_row_by_row() -> None:
    points = centres([(1, 2), (2, 1)])
    assert points.tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]


class Fixed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = MSDeformAttn(8, 2, n_heads=2, n_points=2)
        torch.nn.init.normal_(self.attention.sampling_offsets.weight)

    def forward(self, query: Tensor, value: Tensor) -> Tensor:
        reference = centres([(2, 3), (4, 4)], device=query.device)[None, :, None]
        return self.attention(query, reference, value, [(2, 3), (4, 4)])


def test_it_exports() -> None:
    model = Fixed().eval()
    inputs = (torch.randn(1, 22, 8), torch.randn(1, 22, 8))
    exported = torch.export.export(model, inputs)
    assert torch.allclose(exported.module()(*inputs), model(*inputs), atol=1e-6)


@pytest.mark.slow
def test_it_compiles_without_a_graph_break() -> None:
    model = Fixed().eval()
    inputs = (torch.randn(1, 22, 8), torch.randn(1, 22, 8))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(*inputs)
    out.sum().backward()
    gradient = model.attention.sampling_offsets.weight.grad.clone()
    model.zero_grad()
    eager = model(*inputs)
    eager.sum().backward()
    assert torch.allclose(out, eager, atol=1e-6)
    assert torch.allclose(gradient, model.attention.sampling_offsets.weight.grad, atol=1e-5)


def test_wrong_shapes_are_errors_of_one_sentence() -> None:
    with pytest.raises(DinoError, match="cannot share 30 value channels"):
        MSDeformAttn(30, 1, n_heads=16)
    attention = MSDeformAttn(8, 1, n_heads=2)
    query = torch.zeros(1, 3, 8)
    with pytest.raises(DinoError, match="was given 6 positions"):
        attention(query, torch.zeros(1, 3, 1, 2), torch.zeros(1, 6, 8), [(2, 2)])
    with pytest.raises(DinoError, match="not 3 numbers"):
        attention(query, torch.zeros(1, 3, 1, 3), torch.zeros(1, 4, 8), [(2, 2)])
