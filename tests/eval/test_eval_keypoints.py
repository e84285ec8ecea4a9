"""Correspondence: geometry by hand, known recalls, and the files of NAVI, SPair and posed frames."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinov3.data.datasets import retrieval
from dinov3.errors import DinoError, UnknownName
from dinov3.eval.keypoints import (
    Matched,
    back_project,
    draw_pairs,
    frame_input,
    geometric_matches,
    main,
    metric_errors,
    moved,
    navi_input,
    overlap,
    pck,
    ratio_weight,
    recalls,
    relative_pose,
    semantic_errors,
    spair_input,
    square_around,
)

THRESHOLDS = (1, 2, 5)


def plane(g: int = 8) -> Tensor:
    """Points [g, g, 3] of a wall one metre away, seen by a camera whose focal length is g cells."""
    return back_project(torch.ones(g, g), float(g), (g / 2, g / 2))


def one_hot_cells(g: int = 8) -> Tensor:
    return torch.eye(g * g).view(g, g, g * g)


# ---- geometry -------------------------------------------------------------------------------------------------------


def test_back_projection_of_pixel_centres() -> None:
    points = back_project(torch.tensor([[2.0, 4.0]]), 10.0, (1.0, 0.5))
    torch.testing.assert_close(points, torch.tensor([[[-0.1, 0, 2], [0.2, 0, 4]]]))


def test_the_same_view_twice_is_recalled_wholly() -> None:
    points, x = plane(), one_hot_cells()
    matched = geometric_matches(x, x, points, points)
    assert recalls(metric_errors(matched, torch.eye(4)), THRESHOLDS) == {
        "recall": 100, "recall@1cm": 100, "recall@2cm": 100, "recall@5cm": 100,
    }  # fmt: skip


@pytest.mark.parametrize("rank", ["cosine", "ratio"])
def test_a_view_displaced_by_three_centimetres(rank: str) -> None:
    points, x = plane(), one_hot_cells()
    matched = geometric_matches(x, x, points, points + torch.tensor([0.03, 0, 0]), rank=rank)
    got = recalls(metric_errors(matched, torch.eye(4)), THRESHOLDS)
    assert [got[f"recall@{t}cm"] for t in THRESHOLDS] == [0, 0, 100]
    assert got["recall"] == pytest.approx(100 / 3)


def test_the_pose_takes_points_to_the_other_camera() -> None:
    a, b = np.eye(4), np.eye(4)
    b[:3, :3] = retrieval.quaternion_to_rotation([math.cos(0.3), 0, math.sin(0.3), 0])
    b[:3, 3] = (0.1, 0, 0.4)
    points = plane()
    pose = relative_pose(a, b)
    seen = torch.from_numpy(points.numpy() @ b[:3, :3].T + b[:3, 3]).float()
    matched = geometric_matches(one_hot_cells(), one_hot_cells(), points, seen)
    assert float(metric_errors(matched, pose).max()) < 1e-5
    torch.testing.assert_close(moved(seen, relative_pose(b, a)), points)


def test_ratio_weights() -> None:
    got = ratio_weight(torch.tensor([0.1, 0.2, 0.0]), torch.tensor([0.4, 0.21, 0.3]))
    torch.testing.assert_close(got, torch.tensor([0.75, 0.047619, 1.0]), atol=1e-6, rtol=0)


def test_only_the_best_matches_of_cells_with_depth_count() -> None:
    points, x = plane(), one_hot_cells()
    holes = points.clone()
    holes[:4] = 0
    matched = geometric_matches(x, x, holes, points, keep=1000)
    assert len(matched.weight) == 32
    y = x.clone()
    y[7] = torch.roll(y[7], 1, 0) + 0.5 * y[7]  # the last row is less sure
    matched = geometric_matches(y, x, holes, points, keep=24)
    assert float(metric_errors(matched, torch.eye(4)).max()) == 0  # the sure rows only
    with pytest.raises(DinoError, match="no cells with depth"):
        geometric_matches(x, x, 0 * points, points)
    with pytest.raises(DinoError, match="no matches"):
        recalls(torch.zeros(0), THRESHOLDS)


def test_the_square_around_an_object() -> None:
    mask = torch.zeros(10, 12, dtype=torch.bool)
    mask[4:6, 3:9] = True
    assert square_around(mask) == (2, 3, 6)
    mask[9, 11] = True  # 6 rows × 9 columns: shifted up to stay inside
    assert square_around(mask) == (1, 3, 9)
    with pytest.raises(DinoError, match="no depth"):
        square_around(mask & False)


def test_overlap_of_two_views() -> None:
    points, same = plane(), torch.eye(4)
    assert overlap(points, points, same, 8.0, (4.0, 4.0)) == 1
    away = torch.eye(4)
    away[0, 3] = 0.5  # half the width of what is seen at one metre
    assert overlap(points, points, away, 8.0, (4.0, 4.0)) == pytest.approx(0.5, abs=0.13)
    behind = torch.diag(torch.tensor([-1.0, 1, -1, 1]))
    assert overlap(points, points, behind, 8.0, (4.0, 4.0)) == 0


# ---- keypoints of a class -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset, scale, error", [(0.0, 1.0, 0.0), (0.5, 1.0, 0.0110485), (0.5, 0.8, 0.0138107)])
def test_a_keypoint_is_found_at_its_patchs_top_left(offset: float, scale: float, error: float) -> None:
    w = 64
    x = torch.zeros(w, w, 3)
    x[..., 2] = 1
    x[20, 30] = torch.tensor([1.0, 0, 0])
    # the source's sample with aligned corners hits the patch exactly
    source = torch.tensor([[30 / (w - 1), 20 / (w - 1)]])
    target = torch.tensor([[(30 + offset) / w, (20 + offset) / w]])
    got = semantic_errors(x, x, source, target, target_scale=scale)
    assert float(got) == pytest.approx(error, abs=1e-6)


def test_pck_is_the_mean_of_the_classes() -> None:
    got = pck({"cat": torch.tensor([0.05, 0.2, 0.09, 0.1]), "dog": torch.tensor([0.0]), "none": torch.zeros(0)}, 0.1)
    assert got == {"recall": 75, "cat": 50, "dog": 100}
    with pytest.raises(DinoError, match="no pair"):
        pck({"cat": torch.zeros(0)})


@pytest.mark.parametrize("shift, right", [(0, 100.0), (16, 100.0), (32, 100.0)])
def test_pck_of_translated_noise_is_perfect(shift: int, right: float) -> None:
    """Pixel values as features, translations by multiples of the patch."""
    P = 8
    rng = torch.Generator().manual_seed(0)
    image = torch.rand(128 + shift, 128 + shift, generator=rng)

    def encode(x: Tensor) -> Tensor:
        return x.unfold(0, P, P).unfold(1, P, P).flatten(2) - 0.5

    a, b = encode(image[:128, :128]), encode(image[shift:, shift:])
    cells = torch.tensor([[5, 6], [9, 12], [14, 7]]) + shift // P
    cells = cells.clamp(max=15)
    errors = semantic_errors(a, b, cells / 15, (cells - shift // P) / 16, target_scale=1)
    assert pck({"noise": errors}) == {"recall": right, "noise": right}


def pck_of_a_turn(degrees: float, seed: int) -> float:
    """Recall among the inner patches of a cloudy image and the same turned about its centre; pixel values as features."""
    P, side = 8, 128
    cloudy = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    image = F.interpolate(cloudy, size=side, mode="bicubic")
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    grid = F.affine_grid(torch.tensor([[[c, -s, 0.0], [s, c, 0.0]]]), [1, 3, side, side], align_corners=False)
    turned = F.grid_sample(image, grid, align_corners=False)

    def encode(x: Tensor) -> Tensor:
        return F.unfold(x, P, stride=P)[0].T.unflatten(0, (side // P, side // P)) - 0.5

    cells = torch.cartesian_prod(torch.arange(4, 12), torch.arange(4, 12))
    centre = (cells + 0.5) / 8 - 1  # from -1 to 1, as in the grid, whose inverse takes a point to where it is seen
    there = torch.stack([c * centre[:, 0] + s * centre[:, 1], c * centre[:, 1] - s * centre[:, 0]], -1)
    errors = semantic_errors(encode(image), encode(turned), cells / 15, (there + 1) / 2 - 0.5 / 16, target_scale=1)
    return pck({"clouds": errors})["recall"]


def test_pck_of_a_turned_image_falls_with_the_angle() -> None:
    recall = [np.mean([pck_of_a_turn(degrees, seed) for seed in range(3)]) for degrees in (0, 5, 20, 90)]
    assert recall[0] == 100
    assert recall[1] > 70
    assert recall[3] < 25
    assert recall == sorted(recall, reverse=True)


def test_the_padded_square_is_white_and_points_are_whole_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "a.png")
    image, points, longest = spair_input(tmp_path / "a.png", np.array([[10.0, 5.0], [39.9, 19.9]]), 64)
    assert image.size == (64, 64)
    assert image.getpixel((10, 60)) == (255, 255, 255)
    assert image.getpixel((10, 10)) == (255, 0, 0)
    assert (points * 64).tolist() == [[16, 8], [63, 31]]
    assert longest == 40


# ---- files ----------------------------------------------------------------------------------------------------------


def navi_folder(root: Path) -> Path:
    """Two objects; the second has no second scene. A wall half a metre away, in the middle of the image."""
    for thing, scenes in (("owl", ("wild_set", "multiview_00")), ("dog", ("wild_set",))):
        for scene in scenes:
            folder = root / "navi_v1" / thing / scene
            (folder / "images").mkdir(parents=True)
            (folder / "depth").mkdir()
            rows = []
            for i, angle in enumerate((0.0, 0.2, 0.4)):
                Image.new("RGB", (80, 60), (40 * i, 100, 100)).save(folder / "images" / f"{i:03d}.jpg")
                depth = np.zeros((60, 80), np.uint16)
                depth[20:40, 30:50] = round(655350 / 500)
                Image.fromarray(depth).save(folder / "depth" / f"{i:03d}.png")
                camera = {"q": [math.cos(angle / 2), 0, math.sin(angle / 2), 0], "t": [100, 0, 0], "focal_length": 90}
                rows.append({"filename": f"{i:03d}.jpg", "image_size": [60, 80], "split": "train", "camera": camera})
            (folder / "annotations.json").write_text(json.dumps(rows))
    return root


def test_navi_is_read(tmp_path: Path) -> None:
    views = retrieval.navi(navi_folder(tmp_path))
    assert [v.name for v in views] == ["owl/000.jpg", "owl/001.jpg", "owl/002.jpg"]
    assert views[0].size_wh == (80, 60)
    assert views[0].world_to_camera[0, 3] == pytest.approx(0.1)
    depth = views[0].depth_m()
    assert depth[0, 0] == 0
    assert depth[30, 40] == pytest.approx(0.5, rel=1e-3)
    with pytest.raises(DinoError, match="no NAVI folder"):
        retrieval.navi(tmp_path / "navi_v1" / "owl")


def test_navi_views_are_cropped_to_the_object(tmp_path: Path) -> None:
    view = retrieval.navi(navi_folder(tmp_path))[0]
    x, points = navi_input(view, 64)
    assert x.shape == (3, 64, 64)
    assert points.shape == (64, 64, 3)
    assert float((points[..., 2] > 0).float().mean()) > 0.9  # the square is the object, but for rounding
    # 20 of 60 pixels at half a metre, focal length 90: 0.5·20/90 wide, less one pixel between the centres
    width = float(points[32, -1, 0] - points[32, 0, 0])
    assert width == pytest.approx(0.5 * 20 / 90, abs=0.5 / 90)
    assert float(points[..., 0].mean()) == pytest.approx(0, abs=0.5 / 90)


def test_pairs_of_views_turn_by_at_most_the_limit(tmp_path: Path) -> None:
    views = retrieval.navi(navi_folder(tmp_path))
    pairs = draw_pairs(views, max_rotation=15, every=1)  # 0.2 rad are 11.5 degrees
    assert [i for i, _ in pairs] == [0, 1, 2]
    assert dict(pairs)[0] == 1
    assert dict(pairs)[2] == 1
    assert draw_pairs(views, max_rotation=15, every=2) == [p for p in pairs if p[0] != 1]
    assert draw_pairs(views, max_rotation=5, every=1) == []
    assert draw_pairs(views, max_rotation=120) == draw_pairs(views, max_rotation=120)


def rgbd_folder(root: Path, n: int = 3) -> Path:
    """A textured wall one metre away, seen by a camera that slides one patch (16 pixels) a frame."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 255, (6, 12, 3)), np.ones((16, 16, 1)))
    texture = (texture * 0.5 + rng.integers(0, 127, texture.shape)).astype(np.uint8)
    root.mkdir(exist_ok=True)
    np.savetxt(root / "camera-intrinsics.txt", [[96, 0, 64], [0, 96, 48], [0, 0, 1]])
    for i in range(n):
        Image.fromarray(texture[:, 16 * i : 16 * i + 128]).save(root / f"frame-{i:06d}.color.png")
        depth = np.full((96, 128), 1000, np.uint16)
        depth[:2] = 65535
        Image.fromarray(depth).save(root / f"frame-{i:06d}.depth.png")
        pose = np.eye(4)
        pose[:3, :3] = retrieval.quaternion_to_rotation([1, 1e-4 * i, 0, 0])  # pairs must be turned a little
        pose[0, 3] = 16 * i / 96
        np.savetxt(root / f"frame-{i:06d}.pose.txt", pose)
    return root


def test_frames_are_read(tmp_path: Path) -> None:
    views = retrieval.frames(rgbd_folder(tmp_path))
    assert len(views) == 3
    assert views[1].depth_m()[0, 0] == 0
    assert views[1].depth_m()[50, 50] == 1
    x, points, (focal, center) = frame_input(views[0], 96, 16)
    assert x.shape == (3, 96, 128)
    assert (focal, center) == (96, (64, 48))
    pose = relative_pose(views[0].world_to_camera, views[2].world_to_camera)
    assert overlap(points, frame_input(views[2], 96, 16)[1], pose, focal, center) == pytest.approx(0.75, abs=0.03)
    (tmp_path / "camera-intrinsics.txt").unlink()
    with pytest.raises(DinoError, match="camera-intrinsics"):
        retrieval.frames(tmp_path)


def test_a_sliding_wall_is_matched_by_the_shipped_model(tmp_path: Path) -> None:
    root, out = rgbd_folder(tmp_path / "wall"), tmp_path / "out"
    words = ["benchmark=frames", f"root={root}", "size=96", "cells=0.0625", "every=1", "keep=30", f"output_dir={out}"]
    assert main([*words, "model.device=cpu"]) == 0
    results = json.loads((out / "results-keypoints.json").read_text())["results"]
    assert results["pairs"] == 3
    assert results["recall@5cm"] > 70  # chance is one in fifty
    assert results["recall"] == max(results["recall with norm"], results["recall without norm"])


def spair_folder(root: Path) -> Path:
    for folder in ("PairAnnotation/test", "ImageAnnotation/cat", "JPEGImages/cat"):
        (root / "SPair-71k" / folder).mkdir(parents=True)
    base = root / "SPair-71k"
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 255, (6, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    for name in ("a", "b"):
        Image.fromarray(image).save(base / "JPEGImages" / "cat" / f"{name}.jpg", quality=95)
        kps = {"0": [24, 24], "1": [104, 56], "2": None if name == "b" else [8, 8]}
        (base / "ImageAnnotation" / "cat" / f"{name}.json").write_text(json.dumps({"kps": kps}))
    for i, (s, t) in enumerate((("a", "b"), ("b", "a"))):
        row = {
            "src_imname": f"{s}.jpg",
            "trg_imname": f"{t}.jpg",
            "trg_bndbox": [0, 0, 128, 96],
            "viewpoint_variation": i,
        }
        (base / "PairAnnotation" / "test" / f"{i:06d}-{s}-{t}:cat.json").write_text(json.dumps(row))
    return root


def test_spair_is_read_and_only_keypoints_in_both_count(tmp_path: Path) -> None:
    pairs = retrieval.spair(spair_folder(tmp_path))
    assert len(pairs) == 2
    assert all(p.source_xy.tolist() == [[24, 24], [104, 56]] for p in pairs)
    assert pairs[0].category == "cat"
    assert len(retrieval.spair(tmp_path, per_class=1)) == 1
    with pytest.raises(UnknownName, match="the split of SPair is one of trn, val, test, not 'tests'"):
        retrieval.spair(tmp_path, split="tests")
    with pytest.raises(DinoError, match="no SPair"):
        retrieval.spair(tmp_path, split="val")


def test_the_same_image_has_its_keypoints_where_they_are(tmp_path: Path) -> None:
    root, out = spair_folder(tmp_path), tmp_path / "out"
    words = ["benchmark=spair", f"root={root}", "size=256", f"output_dir={out}", "model.device=cpu"]
    assert main(words) == 0
    results = json.loads((out / "results-keypoints.json").read_text())["results"]
    assert results["recall"] == results["cat"] == 100
    assert {"viewpoint 0", "viewpoint 1", "recall with norm"} <= set(results)


def test_impossible_requests_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main([f"output_dir={tmp_path}", "benchmark=frames", f"root={rgbd_folder(tmp_path / 'w')}", "min_overlap=1.1"])
        == 1
    )
    assert "overlaps by 1.1" in capsys.readouterr().err
    assert main([f"output_dir={tmp_path}", "benchmark=spair", f"root={spair_folder(tmp_path / 's')}", "size=100"]) == 1
    assert "try 96" in capsys.readouterr().err


def test_matched_points_stay_together() -> None:
    m = Matched(torch.ones(1), torch.zeros(1, 3), torch.ones(1, 3))
    assert float(metric_errors(m, torch.eye(4))) == pytest.approx(math.sqrt(3))
