"""Scores of class maps and depth maps: recorded numbers, public oracles, plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dinov3.errors import DinoError
from dinov3.metrics import (
    DEPTH_SCORES,
    CanopySums,
    align_least_squares,
    canopy_scores,
    confusion_matrix,
    depth_scores,
    iou_scores,
    mean_scores,
    percentages,
    reduce_zero_label,
    region_mask,
)

PREDICTION = torch.tensor([[0, 0, 1], [1, 2, 2]])
LABEL = torch.tensor([[1, 1, 2], [1, 3, 0]])


def test_the_recorded_segmentation_scores():
    scores = iou_scores(confusion_matrix(PREDICTION, reduce_zero_label(LABEL), 4))
    assert scores["aAcc"] == pytest.approx(0.8)
    assert scores["mIoU"] == pytest.approx(0.722222, abs=1e-6)
    expected = {
        "IoU_per_class": [2 / 3, 0.5, 1, math.nan],
        "dice_per_class": [0.8, 2 / 3, 1, math.nan],
        "precision_per_class": [1, 0.5, 1, math.nan],
        "acc_per_class": [2 / 3, 1, 1, math.nan],
    }
    for name, values in expected.items():
        assert scores[name] == pytest.approx(values, nan_ok=True), name
    assert percentages(scores) == {
        "mIoU": 72.22, "acc": 88.89, "aAcc": 80.0, "dice": 82.22, "fscore": 82.22, "precision": 83.33, "recall": 88.89,
    }  # fmt: skip


def test_zero_reduction_keeps_the_ignored_label():
    assert reduce_zero_label(torch.tensor([0, 1, 150, 255], dtype=torch.uint8)).tolist() == [255, 0, 149, 255]


def test_random_maps_score_as_in_torchmetrics(oracles):
    classification = pytest.importorskip("torchmetrics.classification")
    torch.manual_seed(0)
    prediction, target = torch.randint(0, 6, (2, 40, 30)), torch.randint(0, 6, (2, 40, 30))
    target[torch.rand(2, 40, 30) < 0.2] = 255
    scores = iou_scores(confusion_matrix(prediction, target, 6))
    oracles = {
        "mIoU": classification.MulticlassJaccardIndex(6, average="macro", ignore_index=255),
        "mAcc": classification.MulticlassRecall(6, average="macro", ignore_index=255),
        "precision": classification.MulticlassPrecision(6, average="macro", ignore_index=255),
        "dice": classification.MulticlassF1Score(6, average="macro", ignore_index=255),
        "aAcc": classification.MulticlassAccuracy(6, average="micro", ignore_index=255),
    }
    for name, oracle in oracles.items():
        assert scores[name] == pytest.approx(float(oracle(prediction, target)), abs=1e-6), name


def test_the_matrix_of_two_images_is_the_sum_and_equals_a_plain_loop():
    rng = np.random.default_rng(3)
    maps = [(rng.integers(0, 4, (7, 5)), rng.choice([0, 1, 2, 3, 255], (7, 5)).astype(np.uint8)) for _ in range(2)]
    slow = torch.zeros(4, 4, dtype=torch.int64)
    for prediction, target in maps:
        for p, t in zip(prediction.ravel(), target.ravel()):
            if t != 255:
                slow[t, p] += 1
    first, second = (confusion_matrix(p, t, 4) for p, t in maps)
    assert torch.equal(first + second, slow)
    both = [np.concatenate([m[k] for m in maps]) for k in (0, 1)]
    assert torch.equal(confusion_matrix(both[0], both[1], 4), slow)


def test_the_error_of_a_class_out_of_range_names_it():
    with pytest.raises(DinoError, match="target holds class 7, but there are 3 classes"):
        confusion_matrix(torch.zeros(2, dtype=torch.long), torch.tensor([0, 7]), 3)
    with pytest.raises(DinoError, match="prediction holds class 3"):
        confusion_matrix(torch.tensor([0, 3]), torch.tensor([0, 0]), 3)
    with pytest.raises(DinoError, match="argmax"):
        confusion_matrix(torch.zeros(2), torch.tensor([0, 0]), 3)
    with pytest.raises(DinoError, match="resize the prediction"):
        confusion_matrix(torch.zeros(2, dtype=torch.long), torch.zeros(3, dtype=torch.long), 3)
    confusion_matrix(torch.tensor([0, 3]), torch.tensor([0, 255]), 3)  # what is ignored may be predicted anyhow


# ---- depth ---------------------------------------------------------------------------------------------------------

TRUTH = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
GUESS = torch.tensor([[1.1, 1.8], [5.2, 3.0]])
RECORDED = {
    "a1": 0.666667, "a2": 1, "a3": 1, "abs_rel": 0.166667, "rmse": 0.704746, "log_10": 0.067031, "rmse_log": 0.172259,
    "silog": 15.033192, "sq_rel": 0.13, "mae": 0.5,
}  # fmt: skip


def test_the_recorded_depth_scores():
    scores = depth_scores(GUESS, TRUTH)
    assert set(scores) == set(DEPTH_SCORES)
    for name, value in RECORDED.items():
        assert scores[name] == pytest.approx(value, abs=1e-6, rel=1e-6), name


def test_depth_scores_equal_plain_loops():
    rng = np.random.default_rng(0)
    truth, guess = rng.uniform(0.5, 12, (9, 8)), rng.uniform(-1, 14, (9, 8))
    rows = []
    for t, p in zip(truth.ravel(), guess.ravel()):
        if 0.001 < t < 10:
            rows.append((t, min(max(p, 0.001), 10)))
    n = len(rows)
    e = [math.log(t) - math.log(p) for t, p in rows]
    slow = {f"a{k}": sum(max(t / p, p / t) < 1.25**k for t, p in rows) / n for k in (1, 2, 3)}
    slow |= {
        "abs_rel": sum(abs(t - p) / t for t, p in rows) / n,
        "sq_rel": sum((t - p) ** 2 / t for t, p in rows) / n,
        "rmse": math.sqrt(sum((t - p) ** 2 for t, p in rows) / n),
        "mae": sum(abs(t - p) for t, p in rows) / n,
        "log_10": sum(abs(math.log10(t) - math.log10(p)) for t, p in rows) / n,
        "rmse_log": math.sqrt(sum(x * x for x in e) / n),
        "silog": 100 * math.sqrt(sum(x * x for x in e) / n - (sum(e) / n) ** 2),
    }
    assert depth_scores(guess, truth) == pytest.approx(slow, rel=1e-9)


def test_the_regions_are_the_published_rectangles():
    mask = region_mask("NYU_EIGEN", (480, 640))
    assert int(mask.sum()) == 238_560
    rows, columns = torch.where(mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (45, 470, 41, 600)
    garg = region_mask("KITTI_GARG", (375, 1242))
    rows, columns = torch.where(garg)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (153, 370, 44, 1196)
    assert region_mask("FULL", (3, 4)).all()
    with pytest.raises(DinoError, match="did you mean 'NYU_EIGEN'"):
        region_mask("NYU_EIGN", (4, 4))


def test_alignment_finds_scale_and_shift():
    truth, guess = torch.tensor([[1.0, 2], [3, 5]]), torch.tensor([[0.1, 0.2], [0.3, 9]])
    mask = torch.tensor([[True, True], [True, False]])
    scale, shift = align_least_squares(guess, truth, mask)
    assert (scale, shift) == (pytest.approx(10), pytest.approx(0, abs=1e-6))
    aligned = depth_scores(0.3 * TRUTH + 2, TRUTH, align=True)
    assert aligned["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert aligned["a1"] == 1
    assert align_least_squares(torch.ones(2, 2), truth) == (0, pytest.approx(2.75))  # flat: the mean, not a crash
    assert np.allclose(
        align_least_squares(np.array([1.0, 2, 4]), np.array([2.0, 1, 7])),
        np.linalg.lstsq(np.array([[1, 1], [2, 1], [4, 1.0]]), np.array([2, 1, 7.0]), rcond=None)[0],
    )


def test_images_without_a_valid_pixel_do_not_count():
    nothing = depth_scores(GUESS, torch.zeros(2, 2))
    assert all(math.isnan(v) for v in nothing.values())
    means = mean_scores([nothing, depth_scores(GUESS, TRUTH)])
    assert means["rmse"] == pytest.approx(RECORDED["rmse"], abs=1e-6)
    assert math.isnan(mean_scores([nothing])["rmse"])


def test_only_pixels_of_the_mask_and_the_range_count():
    assert depth_scores(GUESS, TRUTH, mask=torch.tensor([[True, False], [False, True]]))["mae"] == pytest.approx(0.1)
    assert depth_scores(GUESS, TRUTH, max_depth=3)["mae"] == pytest.approx(0.15)  # the target 4 m is out of range
    with pytest.raises(DinoError, match="min_depth"):
        depth_scores(GUESS, TRUTH, 0, 10)


# ---- canopy height -------------------------------------------------------------------------------------------------


def test_canopy_heights_over_blocks():
    blocks = torch.tensor([[0.0, 10], [20, 30]]).repeat_interleave(50, 0).repeat_interleave(50, 1)
    target = torch.nn.functional.pad(blocks, (3, 0, 3, 0))
    scores = canopy_scores([CanopySums.of(target + 1, target)])
    assert scores["mae"] == pytest.approx(1)
    assert scores["bias"] == pytest.approx(1)
    assert scores["rmse"] == pytest.approx(1)
    assert scores["block_r2"] == pytest.approx(0.992)


def test_canopy_heights_below_ground_are_ground_and_unknown_ones_do_not_count():
    target = torch.tensor([[-3.0, 2.0], [math.nan, 4.0]])
    scores = canopy_scores([CanopySums.of(torch.tensor([[-1.0, 3.0], [9.0, 4.0]]), target)])
    assert scores["mae"] == pytest.approx(1 / 3)
    assert math.isnan(scores["block_r2"])  # smaller than a block
    assert scores["r2"] == pytest.approx(1 - 1 / 8)


def test_canopy_scores_of_several_maps_are_those_of_all_pixels():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    maps = [(rng.uniform(0, 30, (120, 60)), rng.uniform(0, 30, (120, 60))) for _ in range(3)]
    scores = canopy_scores([CanopySums.of(p, t) for p, t in maps])
    p, t = (np.concatenate([m[k].ravel() for m in maps]) for k in (0, 1))
    assert scores["mae"] == pytest.approx(sklearn.mean_absolute_error(t, p))
    assert scores["r2"] == pytest.approx(sklearn.r2_score(t, p))
    cells = [
        [m[k][3 + 50 * r : 53 + 50 * r, 3:53].mean() for m in maps for r in (0, 1)] for k in (0, 1)
    ]  # two whole blocks fit
    assert scores["block_r2"] == pytest.approx(sklearn.r2_score(cells[1], cells[0]))
    assert math.isnan(canopy_scores([])["mae"])
