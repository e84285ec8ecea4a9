"""TokenCut: the recorded example, both solvers, and its parts."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from toy_models import tiny_vit

from dinov3.dense import discovery
from dinov3.dense.discovery import Cut, box_in_image, connected, cosines, cut, second_smallest, token_cut
from dinov3.errors import DinoError
from dinov3.features import embed


def box_px(
    found: Cut, patch_size: tuple[float, float] | float, size_hw: tuple[int, int]
) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) in the network input's pixels, clipped to the unpadded image."""
    ph, pw = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
    r0, c0, r1, c1 = found.box_rc
    return c0 * pw, r0 * ph, min(c1 * pw, size_hw[1]), min(r1 * ph, size_hw[0])


def object_in_grid() -> Tensor:
    """6×8 patches, an object in rows 2–4 and columns 3–6."""
    x = torch.tensor([0.0, 1.0, 0.1]).expand(6, 8, 3).clone()
    x[2:5, 3:7] = torch.tensor([1.0, 0.0, 0.1])
    return x


def test_the_recorded_example() -> None:
    found = token_cut(object_in_grid(), tau=0.2)
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[2:5, 3:7] = True
    assert torch.equal(found.mask, expected)
    assert torch.equal(found.foreground, expected)
    d0, d1 = 12 + 36e-5, 36 + 12e-5
    assert found.eigenvalue == pytest.approx(1e-5 * (12 / d1 + 36 / d0), rel=1e-6)
    assert found.eigenvalue == pytest.approx(3.333242e-5, rel=1e-6)
    v = found.eigenvector * found.eigenvector[2, 3].sign()
    assert v[3, 4].item() == pytest.approx(0.079056, abs=1e-6)
    assert v[0, 0].item() == pytest.approx(-0.008784, abs=1e-6)
    assert box_px(found, 16, (96, 128)) == (48, 32, 112, 80)


def test_the_sign_of_the_eigenvector_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = token_cut(object_in_grid())

    def turned(weights: Tensor) -> tuple[float, Tensor]:
        value, vector = second_smallest(weights)
        return value, -vector

    monkeypatch.setattr(discovery, "second_smallest", turned)
    assert torch.equal(token_cut(object_in_grid()).mask, expected.mask)


def test_the_box_is_clipped_to_the_unpadded_image() -> None:
    assert box_px(token_cut(object_in_grid()), 16, (75, 100)) == (48, 32, 100, 75)


def test_both_solvers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 9, 6, generator=generator)
    fast = token_cut(x, tau=0.1)
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)  # as if it were not installed
    plain = token_cut(x, tau=0.1)
    assert fast.eigenvalue == pytest.approx(plain.eigenvalue, abs=1e-10)
    torch.testing.assert_close(fast.eigenvector.abs(), plain.eigenvector.abs(), atol=1e-8, rtol=0)
    assert torch.equal(fast.mask, plain.mask)


def test_the_pair_solves_the_generalised_problem() -> None:
    generator = torch.Generator().manual_seed(1)
    w = torch.rand(20, 20, generator=generator).double()
    w = (w + w.T) / 2
    value, v = second_smallest(w)
    d = torch.diag(w.sum(1))
    torch.testing.assert_close((d - w) @ v, value * d @ v)
    assert float(v @ d @ v) == pytest.approx(1)
    assert abs(float(v @ d @ torch.ones(20).double())) < 1e-9  # not the trivial pair


def test_only_what_touches_the_seed_is_the_object() -> None:
    x = object_in_grid()
    x[0, 0] = x[2, 3]  # the same stuff elsewhere
    found = token_cut(x)
    assert found.foreground[0, 0]
    assert found.foreground.sum() == 13
    # all thirteen tie but for rounding: the seed is in the object or is the speck
    assert found.mask.sum() == (1 if found.seed == (0, 0) else 12)
    assert found.mask[found.seed]


def test_neighbours_touch_by_their_sides() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 1]], dtype=torch.bool)
    assert connected(mask, (0, 0)).int().tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert connected(mask, (2, 2)).int().tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 1]]
    assert connected(mask, (2, 0)).sum() == 0


def test_cosines_serve_every_threshold() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 5, 8, generator=generator)
    for tau in (0.0, 0.2, 0.4):
        assert torch.equal(cut(cosines(x), (4, 5), tau=tau).mask, token_cut(x, tau=tau).mask)


def test_a_box_of_features_is_in_the_images_pixels() -> None:
    model = tiny_vit()
    features = embed(model, torch.rand(3, 50, 90), shape="native", fit="pad")
    assert features.grid_hw == (4, 6)
    found = token_cut(features)
    x0, y0, x1, y1 = box_in_image(found, features)
    assert 0 <= x0 < x1 <= 90
    assert 0 <= y0 < y1 <= 50
    assert (x0, y0, x1, y1) == box_px(found, 16, (50, 90))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(DinoError, match="not \\[6, 6\\]"):
        cut(torch.zeros(6, 6), (2, 2))
    with pytest.raises(DinoError, match="one image, got 2"):
        token_cut(torch.zeros(2, 3, 3, 4))
