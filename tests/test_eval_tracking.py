"""J and F of masks with known answers, DAVIS' averages, and the files of masked videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3.data.datasets.video import MaskedVideos
from dinov3.errors import DinoError, UnknownName
from dinov3.eval.tracking import (
    boundary,
    contour_accuracy,
    davis_scores,
    dilated,
    mean_recall_decay,
    region_similarity,
    sequence_scores,
)


def square(shift: int = 0, size: int = 40) -> np.ndarray:
    mask = np.zeros((100, 100), bool)
    mask[20 : 20 + size, 20 + shift : 20 + shift + size] = True
    return mask


@pytest.mark.parametrize(
    "shift, j, f", [(0, 1, 1), (1, 0.951220, 1), (2, 0.904762, 1), (3, 0.860465, 0.525), (10, 0.6, 0.4375)]
)
def test_the_recorded_squares(shift: int, j: float, f: float) -> None:
    assert region_similarity(square(shift), square()) == pytest.approx(j, abs=1e-6)
    assert contour_accuracy(square(shift), square()) == pytest.approx(f, abs=1e-6)


def test_empty_masks() -> None:
    empty = np.zeros((100, 100), bool)
    assert (region_similarity(empty, empty), contour_accuracy(empty, empty)) == (1, 1)
    assert (region_similarity(empty, square()), contour_accuracy(empty, square())) == (0, 0)
    assert (region_similarity(square(), empty), contour_accuracy(square(), empty)) == (0, 0)


def test_the_contour_looks_right_and_down() -> None:
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True
    assert boundary(mask).astype(int).tolist() == [[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    corner = np.zeros((3, 3), bool)
    corner[2, 2] = True
    assert boundary(corner).astype(int).tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 0]]


def test_growing_by_a_disk_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    for radius in (0, 1, 2, 5, 8):
        mask = rng.random((23, 31)) < 0.01
        ys, xs = np.nonzero(mask)
        slow = np.zeros_like(mask)
        for y in range(23):
            for x in range(31):
                slow[y, x] = bool(((ys - y) ** 2 + (xs - x) ** 2 <= radius**2).any())
        assert np.array_equal(dilated(mask, radius), slow)


def test_the_tolerance_at_davis_resolution_is_eight_pixels() -> None:
    truth = np.zeros((480, 854), bool)
    truth[100:300, 100:300] = True
    assert contour_accuracy(np.roll(truth, 8, 0), truth) == 1
    assert contour_accuracy(np.roll(truth, 9, 0), truth) < 0.6


def test_mean_recall_and_decay_of_eight_frames() -> None:
    values = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    assert mean_recall_decay(values) == pytest.approx((0.55, 0.5, 0.5))


def test_first_and_last_frame_do_not_count() -> None:
    truth = [square().astype(np.uint8)] * 4
    wrong = np.zeros((100, 100), np.uint8)
    ((js, fs),) = sequence_scores([wrong, truth[0], truth[0], wrong], truth)
    assert js == fs == [1, 1]


def test_frames_without_truth_are_not_scored() -> None:
    t = square().astype(np.uint8)
    ((js, _),) = sequence_scores([t, 0 * t, t, 0 * t, t], [t, None, t, None, t])
    assert js == [1]


def test_every_object_counts_the_same() -> None:
    one, two = square(size=10).astype(np.uint8), 2 * square(30, 20).astype(np.uint8)
    truth, predicted = one + two, one  # the second object was lost
    scores = sequence_scores([truth, predicted, truth], [truth] * 3)
    assert len(scores) == 2
    table = davis_scores([scores, [([0.5, 0.5], [0.5, 0.5])]])
    assert table["J"] == pytest.approx(100 * (1 + 0 + 0.5) / 3)
    assert table["J&F"] == pytest.approx((table["J"] + table["F"]) / 2)
    assert table["J-recall"] == pytest.approx(100 / 3)
    assert table["objects"] == 3


def test_an_object_that_never_was_is_an_error() -> None:
    t = square().astype(np.uint8)
    with pytest.raises(DinoError, match="object 3 was predicted"):
        sequence_scores([t, 3 * t, t], [t] * 3)
    with pytest.raises(DinoError, match="no object to follow"):
        sequence_scores([t] * 3, [0 * t] * 3)
    with pytest.raises(DinoError, match="needs three"):
        sequence_scores([t] * 2, [t] * 2)


def video(root: Path, name: str, masks: list[np.ndarray | None], *, davis: bool = True) -> None:
    part = ["480p"] if davis else []
    frames, annotations = root.joinpath("JPEGImages", *part, name), root.joinpath("Annotations", *part, name)
    frames.mkdir(parents=True)
    annotations.mkdir(parents=True)
    for i, mask in enumerate(masks):
        Image.new("RGB", (20, 10), (i, 0, 0)).save(frames / f"{i:05d}.png")
        if mask is not None:
            image = Image.fromarray(mask.astype(np.uint8))
            image.putpalette(list(range(256)) * 3)
            image.save(annotations / f"{i:05d}.png")


def test_masks_of_davis_2017_keep_their_numbers_and_lose_void(tmp_path: Path) -> None:
    mask = np.zeros((10, 20))
    mask[2:4], mask[5:7], mask[8] = 1, 2, 255
    video(tmp_path, "bear", [mask, mask])
    video(tmp_path, "cat", [mask])
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("bear\n")
    (bear,) = MaskedVideos(tmp_path, split="val")
    assert (bear.name, len(bear)) == ("bear", 2)
    read = bear.mask(0)
    assert read is not None
    assert read[:, 0].tolist() == [0, 0, 1, 1, 0, 2, 2, 0, 0, 0]
    assert bear.frame(1).size == (20, 10)
    assert [v.name for v in MaskedVideos(tmp_path)] == ["bear", "cat"]


def test_masks_of_davis_2016_have_one_object(tmp_path: Path) -> None:
    mask = np.zeros((10, 20))
    mask[3:5] = 255
    video(tmp_path, "dog", [mask, None, 0 * mask], davis=False)
    (dog,) = MaskedVideos(tmp_path)
    read = dog.mask(0)
    assert read is not None
    assert read[:, 0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert dog.mask(1) is None
    assert dog.mask(2) is not None


def test_missing_videos_are_named(tmp_path: Path) -> None:
    with pytest.raises(DinoError, match="holds no JPEGImages"):
        MaskedVideos(tmp_path)
    video(tmp_path, "blackswan", [np.zeros((10, 20))])
    with pytest.raises(UnknownName, match="did you mean 'blackswan'"):
        MaskedVideos(tmp_path, sequences=["blakswan"])
    with pytest.raises(UnknownName, match="no list 'val'; there: none"):
        MaskedVideos(tmp_path, split="val")
