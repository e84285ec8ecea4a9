"""Position bias: planted position is found, projected out, and content stays; the shipped model's falls by 80 %."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dinov3
from dinov3.dense import debias
from dinov3.errors import DinoError


def planted(count: int, seed: int, h: int = 8, w: int = 10, D: int = 16) -> Tensor:
    """Content in every direction; y along direction 0 and x along a mixture of 1 and 2."""
    x = torch.randn(count, h, w, D, generator=torch.Generator().manual_seed(seed))
    y, across = torch.linspace(-1, 1, h)[:, None], torch.linspace(-1, 1, w)[None]
    x[..., 0] += 6 * y
    x[..., 1:3] += (4 * across)[..., None]
    return x


def features_of(x: Tensor) -> dinov3.Features:
    plan = dinov3.default_preprocessing(dinov3.load(), shape="native").plan(16 * x.shape[2], 16 * x.shape[1])
    D = x.shape[-1]
    return dinov3.Features(
        x.new_zeros(len(x), D), x.new_zeros(len(x), 0, D), x, 11, 12, True, "toy", "toy", (plan,) * len(x)
    )


def test_planted_position_is_found_and_projected_out() -> None:
    train, test = features_of(planted(40, 0)), features_of(planted(20, 1))
    assert debias.position_r2(train, test) > 0.9
    directions = debias.noise_directions(train, count=2)
    truth = torch.zeros(2, 16)
    truth[0, 0] = 1
    truth[1, 1:3] = 0.5**0.5
    assert torch.linalg.svdvals(truth @ directions).min() > 0.98  # the same plane
    clean = [debias.project_out(f, directions) for f in (train, test)]
    assert abs(debias.position_r2(*clean)) < 0.05
    # nothing else is lost, and projecting twice is projecting once
    assert torch.allclose(clean[0].patches[..., 3:], train.patches[..., 3:], atol=0.6)
    assert torch.allclose(debias.project_out(clean[0], directions).patches, clean[0].patches, atol=1e-4)
    assert torch.equal(clean[0].cls, train.cls)


def test_a_constant_image_gives_the_published_directions() -> None:
    x = planted(1, 0) * 0 + (planted(400, 3).mean(0))[None]
    directions = debias.constant_directions(x, count=2)
    assert directions.shape == (16, 2)
    assert (
        abs(debias.position_r2(*(debias.project_out(features_of(planted(20, s)), directions) for s in (4, 5)))) < 0.05
    )


def test_the_probe_is_least_squares() -> None:
    x, xt = planted(6, 0), planted(5, 1)
    y = torch.cartesian_prod((2 * torch.arange(8) + 1) / 8 - 1, (2 * torch.arange(10) + 1) / 10 - 1)
    flat, flat_t = (torch.cat([z.flatten(0, 2), torch.ones(z.flatten(0, 2).shape[0], 1)], 1) for z in (x, xt))
    weights = torch.linalg.lstsq(flat.double(), y.repeat(6, 1).double()).solution
    error = (y.repeat(5, 1).double() - flat_t.double() @ weights).square().sum()
    expected = 1 - error / (y.repeat(5, 1) - y.mean(0)).square().sum()
    assert debias.position_r2(x, xt) == pytest.approx(float(expected), abs=1e-4)


def test_position_in_the_shipped_model_falls_by_four_fifths() -> None:
    model = dinov3.load()
    bias = debias.measure(model, (128, 160))
    held_out = dinov3.embed(model, debias.noise_images(12, (128, 160), seed=1), shape="native")
    before = debias.position_r2(held_out[:6], held_out[6:])
    clean = bias.remove(held_out)
    after = debias.position_r2(clean[:6], clean[6:])
    assert before > 0.85
    assert after < 0.2 * before
    with pytest.raises(DinoError, match="measured for layer 11, the features are of 3"):
        bias.remove(dinov3.embed(model, torch.rand(3, 64, 64), layer=3))
    with pytest.raises(DinoError, match=r"\[192, K\]"):
        debias.project_out(held_out, torch.eye(16))
