"""J and F of masks with known answers, DAVIS' averages, and the files of masked videos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_models import tiny_vit

from dinov3.data.datasets.video import MaskedVideos
from dinov3.errors import DinoError, UnknownName
from dinov3.eval.tracking import (
    TrackingConfig,
    boundary,
    contour_accuracy,
    dilated,
    followed,
    frame_size,
    main,
    mean_recall_decay,
    object_row,
    region_similarity,
    sequence_scores,
    table,
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
    for radius in (0, 1, 2, 5, 8, 30):
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
    got = table([object_row(js, fs) for js, fs in [*scores, ([0.5, 0.5], [0.5, 0.5])]])
    assert got["J"] == pytest.approx(100 * (1 + 0 + 0.5) / 3)
    assert got["J&F"] == pytest.approx((got["J"] + got["F"]) / 2)
    assert got["J-recall"] == pytest.approx(100 / 3)
    assert got["objects"] == 3


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


@pytest.mark.parametrize(
    "patch, side, up, nearest",
    [
        (16, 480, (864, 480), (848, 480)),
        (16, 960, (1712, 960), (1712, 960)),
        (16, 1440, (2576, 1440), (2560, 1440)),
        (14, 960, (1722, 966), (1708, 966)),
    ],
)
def test_sizes_of_frames(patch: int, side: int, up: tuple[int, int], nearest: tuple[int, int]) -> None:
    assert frame_size(854, 480, side, patch, "up") == up
    assert frame_size(854, 480, side, patch, "nearest") == nearest
    assert frame_size(480, 854, side, patch, "up") == up[::-1]


@pytest.fixture
def gliding_square(tmp_path: Path) -> Path:
    """Eight frames: a bright square glides over a textured dark ground, 8 pixels a frame."""
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 60, (64, 96, 3))
    frames, masks = tmp_path / "JPEGImages" / "square", tmp_path / "Annotations" / "square"
    frames.mkdir(parents=True)
    masks.mkdir(parents=True)
    for t in range(8):
        image, mask = ground.copy(), np.zeros((64, 96), np.uint8)
        image[16:40, 8 + 8 * t : 32 + 8 * t] = (250, 200, 40)
        mask[16:40, 8 + 8 * t : 32 + 8 * t] = 1
        Image.fromarray(image.astype(np.uint8)).save(frames / f"{t:05d}.png")
        Image.fromarray(mask).save(masks / f"{t:05d}.png")
    return tmp_path


def test_a_bright_square_is_followed_by_the_shipped_model(gliding_square: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [f"root={gliding_square}", "patches=16", f"output_dir={out}", "save_masks=true", "model.device=cpu"]
    assert main(words) == 0
    results = json.loads((out / "results-tracking.json").read_text())["results"]
    assert results["J"] > 75
    assert results["objects"] == 1
    assert results["J&F square"] == pytest.approx(results["J&F"])
    assert main([*words[:-2], "model.device=cpu", "propagation.radius=0", "propagation.k=1"]) == 0  # nothing moves
    held = json.loads((out / "results-tracking.json").read_text())
    assert held["config"]["propagation"]["radius"] == 0
    assert held["results"]["J"] < 60
    saved = np.array(Image.open(out / "masks" / "square" / "00007.png"))
    assert set(np.unique(saved)) == {0, 1}
    assert (saved[16:40, 64:88] == 1).mean() > 0.8


def test_frames_before_the_first_mask_are_empty(gliding_square: Path) -> None:
    (gliding_square / "Annotations" / "square" / "00000.png").unlink()
    model = tiny_vit()
    (video,) = MaskedVideos(gliding_square)
    found = followed(model, video, TrackingConfig(short_side=64))
    assert len(found) == 8
    assert not found[0].any()
    assert found[1].any()


def test_missing_keys_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([f"output_dir={tmp_path}"]) == 1
    assert "root=FOLDER" in capsys.readouterr().err
    assert main([f"output_dir={tmp_path}", f"root={tmp_path}", "propagation.shape=round"]) == 1
    assert "circle" in capsys.readouterr().err
    assert main([f"root={tmp_path}", "size=480"]) == 1
    assert "size (command line): unknown key (there are model, " in capsys.readouterr().err


def test_a_frame_that_cannot_be_read_is_named(gliding_square: Path, tmp_path: Path, capsys) -> None:
    frame = gliding_square / "JPEGImages" / "square" / "00003.png"
    frame.write_text("junk")
    assert main([f"root={gliding_square}", "patches=4", f"output_dir={tmp_path}", "model.device=cpu"]) == 1
    assert f"error: {frame}: not an image (begins with 'junk')" in capsys.readouterr().err


@pytest.mark.data
@pytest.mark.slow
def test_a_real_swan_is_followed(development_data: Path, tmp_path: Path) -> None:
    root = development_data / "davis2016"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    words = [f"root={root}", "sequences=[blackswan]", "short_side=240", f"output_dir={tmp_path}", "model.device=cpu"]
    assert main(words) == 0
    assert json.loads((tmp_path / "results-tracking.json").read_text())["results"]["J"] > 60
