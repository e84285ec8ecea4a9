"""Foreground patches: labels, the solver against scikit-learn, leaving one out, colours of the object."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import dinov3
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.dense import foreground
from dinov3.dense.foreground import (
    Foreground,
    fit,
    kind_of,
    leave_one_out,
    logistic,
    median3,
    notebook_size,
    patch_labels,
)
from dinov3.dense.pca import fit as fit_pca
from dinov3.dense.pca import object_colours, rainbow
from dinov3.errors import DinoError
from dinov3.features import Features
from dinov3.metrics import average_precision


def image(seed: int, h: int = 6, w: int = 8, D: int = 12) -> tuple[Features, Tensor]:
    """Two Gaussian kinds of patches, an object in the middle, a ring of mixed patches without a label."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.zeros(h, w, dtype=torch.long)
    labels[1:5, 2:6] = -1
    labels[2:4, 3:5] = 1
    x = torch.randn(h, w, D, generator=rng)
    x[..., 0] += torch.where(labels == 1, 6.0, -6.0)
    geometry = Preprocessing(size=96).plan(96, 96)
    return Features(x.new_zeros(1, D), x.new_zeros(1, 0, D), x[None], 11, 12, True, "toy", "toy", (geometry,)), labels


def test_cells_wholly_in_or_out_are_labelled() -> None:
    mask = torch.zeros(48, 48)
    mask[:16, :16] = 1
    mask[16:32, 8:16] = 1  # half a cell
    assert patch_labels(mask, (3, 3)).tolist() == [[1, 0, 0], [-1, 0, 0], [0, 0, 0]]


def test_two_clear_kinds_are_separated_and_mixed_patches_left_out() -> None:
    parts = [image(i) for i in range(3)]
    classifier, table = fit([p[0] for p in parts], [p[1] for p in parts])
    assert max(table.values()) == pytest.approx(1)
    assert classifier.C == min(c for c, ap in table.items() if ap == max(table.values()))
    probability = classifier(parts[0][0], smooth=False)[0]
    assert bool((probability[parts[0][1] == 1] > probability[parts[0][1] == 0].max()).all())
    assert classifier(parts[0][0]).shape == (1, 6, 8)
    x, _ = foreground.examples(*parts[0])
    assert len(x) == 48 - 12


def test_the_image_left_out_is_never_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [foreground.examples(*image(i)) for i in range(3)]
    seen: list[Tensor] = []

    def spy(x: Tensor, y: Tensor, C: float) -> tuple[Tensor, Tensor]:
        seen.append(x)
        return logistic(x, y, C)

    monkeypatch.setattr(foreground, "logistic", spy)
    leave_one_out(parts, [0.1])
    assert len(seen) == 3
    for i, x in enumerate(seen):
        assert torch.equal(x, torch.cat([parts[j][0] for j in range(3) if j != i]))


@pytest.mark.parametrize("C", [1e-3, 0.1, 1.0])
def test_the_solver_ends_where_scikit_learn_does(C: float) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(300, 10, generator=rng) * torch.linspace(0.1, 4, 10) + 2
    y = (x[:, 0] * 8 + x[:, 5] + torch.randn(300, generator=rng) > 18).long()
    ours, bias = logistic(x, y, C)
    theirs = linear.LogisticRegression(C=C, max_iter=10000, tol=1e-10).fit(x.double().numpy(), y.numpy())
    assert ours.tolist() == pytest.approx(theirs.coef_[0].tolist(), abs=2e-4)
    assert float(bias) == pytest.approx(float(theirs.intercept_[0]), abs=2e-3)


def test_average_precision_with_equals() -> None:
    assert average_precision(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 0, 1])) == pytest.approx((1 + 2 / 3) / 2)
    # three equal scores: one step
    assert average_precision(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1, 0, 0])) == pytest.approx(1 / 3)
    assert average_precision(torch.tensor([0.1, 0.5, 0.5]), torch.tensor([1, 1, 0])) == pytest.approx(
        0.5 * 0.5 + 0.5 * 2 / 3
    )


def test_a_lonely_speck_is_smoothed_away_and_an_edge_stays() -> None:
    x = torch.zeros(1, 5, 5)
    x[0, 2, 2] = 1
    assert float(median3(x).sum()) == 0
    x = torch.zeros(1, 5, 5)
    x[0, :, :2] = 1
    assert torch.equal(median3(x), x)


def test_a_classifier_survives_its_file_and_refuses_other_features(tmp_path: Path) -> None:
    parts = [image(i) for i in range(2)]
    classifier, table = fit([p[0] for p in parts], [p[1] for p in parts], C=0.1)
    assert table == {}
    classifier.save(tmp_path / "fg.safetensors")
    again = Foreground.load(tmp_path / "fg.safetensors")
    assert torch.equal(again(parts[0][0]), classifier(parts[0][0]))
    assert again.trained_on == kind_of(parts[0][0])
    with pytest.raises(DinoError, match="was trained on toy, layer 11"):
        again(replace(parts[0][0], layer=3))
    with pytest.raises(DinoError, match="width 12, not 5"):
        again(torch.zeros(2, 2, 5))
    with pytest.raises(DinoError, match="no foreground classifier"):
        Foreground.load(tmp_path / "nothing.safetensors")


def test_data_that_cannot_be_learnt_is_an_error() -> None:
    one, labels = image(0)
    with pytest.raises(DinoError, match="needs two images"):
        fit([one], [labels])
    with pytest.raises(DinoError, match="nothing to separate"):
        fit([one], [torch.zeros_like(labels)], C=1)
    with pytest.raises(DinoError, match="two kinds"):
        fit([one, replace(one, layer=2)], [labels, labels])
    with pytest.raises(DinoError, match="have the shape"):
        fit([one], [labels[:2]], C=1)


def test_the_notebooks_size_is_whole_patches_wide() -> None:
    assert notebook_size(Image.new("RGB", (1000, 500))).size == (1536, 768)
    assert notebook_size(Image.new("L", (333, 500))).size == (496, 768)  # 511 px are 31 whole patches


def test_colours_of_the_object_on_black() -> None:
    features, labels = image(4)
    mask = labels != 0
    pca = fit_pca(features, 3, mask)
    inside = pca.whitened(features)[0][mask]
    torch.testing.assert_close(inside.var(0), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(inside.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    colours = object_colours(features, mask)
    assert colours.shape == (1, 6, 8, 3)
    assert float(colours[0][~mask].abs().max()) == 0
    turned = object_colours(features, mask, signs=(-1, 1, 1), order=(2, 1, 0))
    torch.testing.assert_close(turned[0][mask][:, 2], 1 - colours[0][mask][:, 0])
    torch.testing.assert_close(turned[0][mask][:, 0], colours[0][mask][:, 2])
    with pytest.raises(DinoError, match="permutation"):
        object_colours(features, mask, order=(0, 0, 1))
    with pytest.raises(DinoError, match="has the shape"):
        object_colours(features, mask[:3])


def test_clicks_are_labels_and_one_click_is_enough() -> None:
    features, truth = image(2)  # 96 × 96 pixels: patches of 12 × 16
    labels = foreground.click_labels(features, [(42, 36)], [(6, 6), (90, 90)])
    assert labels.tolist()[2][3] == 1
    assert labels[0, 0] == labels[5, 7] == 0
    assert int((labels != foreground.MIXED).sum()) == 3
    for outside in ([(6, 6), (90, 90)], []):
        labels = foreground.click_labels(features, [(42, 36)], outside)
        classifier, _ = fit([features], [labels], C=0.1)
        probability = classifier(features, smooth=False)[0]
        assert bool((probability[truth == 1] > probability[truth == 0].max()).all())
    with pytest.raises(DinoError, match="a click on the object"):
        foreground.click_labels(features, [], [(6, 6)])


def test_one_click_on_a_real_cat_finds_more_cat_than_wall(skimage_images: Path) -> None:
    features = dinov3.embed(dinov3.load(), skimage_images / "chelsea.png", size=256)
    labels = foreground.click_labels(features, [(220, 150), (130, 120)], [(20, 20), (430, 20)])
    probability = fit([features], [labels], C=1.0)[0](features)[0]
    assert float(probability[4:10, 4:10].mean()) > 0.7 > 0.5 > float(probability[:, -3:].mean())


def test_one_palette_for_images_of_two_sizes() -> None:
    """Directions fitted on a list of features are those of all patches together; a fitted palette gives equal patches
    equal colours."""
    (a, _), (b, _) = image(0), image(1, h=4, w=5)
    joint = fit_pca([a, b])
    x = torch.cat([a.patches.flatten(0, 2), b.patches.flatten(0, 2)])
    _, singular, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(joint.variance_share, (singular.square() / singular.square().sum())[:3])
    torch.testing.assert_close((joint.directions.T @ v[:3].T).abs(), torch.eye(3), atol=1e-4, rtol=0)
    b.patches[0, 0, 0] = a.patches[0, 3, 3]
    torch.testing.assert_close(rainbow(a, joint)[0, 3, 3], rainbow(b, joint)[0, 0, 0])
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[:3] = True
    part = fit_pca([a, b], mask=[mask, None])
    torch.testing.assert_close(part.mean, torch.cat([a.patches[0][mask], b.patches.flatten(0, 2)]).mean(0))
    with pytest.raises(DinoError, match="as many masks"):
        fit_pca([a, b], mask=[mask])
