"""Instance retrieval: known answers of each benchmark's measure, and its files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov3.data.datasets import retrieval as data
from dinov3.data.datasets.retrieval import ImageList, squared
from dinov3.errors import DinoError, UnsafeFile
from dinov3.eval.retrieval import (
    amstertime_scores,
    choose,
    confidences,
    fit_whitening,
    gap,
    main,
    met_scores,
    neighbours,
    positions,
    precision_at,
    ranked,
    ranks_of_partners,
    revisited_scores,
    trapezoid_ap,
    unit,
)

# ---- Oxford and Paris -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, n_ok, ap", [([0, 2, 5], 3, 0.677778), ([0, 1], 2, 1), ([1], 1, 0.25), ([], 2, 0)])
def test_recorded_average_precisions(ranks: list[int], n_ok: int, ap: float) -> None:
    assert trapezoid_ap(np.array(ranks, int), n_ok) == pytest.approx(ap, abs=1e-6)


def test_junk_is_taken_out_of_the_ranking() -> None:
    found = positions(np.array([7, 3, 9, 1, 4]), np.array([3, 1]), np.array([7]))
    assert found.tolist() == [0, 2]
    assert trapezoid_ap(found, 2) == pytest.approx(0.791667, abs=1e-6)


def test_the_trapezoids_differ_from_the_usual_steps() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        right = rng.random(20) < 0.3
        right[rng.integers(20)] = True
        ranks = np.flatnonzero(right)
        usual = np.mean((np.arange(len(ranks)) + 1) / (ranks + 1))
        ours = trapezoid_ap(ranks, len(ranks))
        perfect = right[: right.sum()].all()
        assert (ours == pytest.approx(usual)) == bool(perfect)


def test_precision_stops_at_the_last_right_image() -> None:
    ranks = np.array([0, 2])
    assert [precision_at(ranks, k) for k in (1, 2, 3, 10)] == pytest.approx([1, 0.5, 2 / 3, 2 / 3])
    assert precision_at(np.array([], int), 5) == 0


def test_easy_medium_and_hard_want_different_images() -> None:
    rankings = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    easy = [np.array([0]), np.array([], int)]
    hard = [np.array([2]), np.array([], int)]
    junk = [np.array([1]), np.array([0])]
    got = revisited_scores(rankings, easy, hard, junk)  # the second query has nothing right and is left out
    assert got["mAP-E"] == got["mAP-M"] == got["mAP-H"] == 100
    worse = revisited_scores(np.array([[3, 0, 1, 2]]), easy[:1], hard[:1], junk[:1])
    assert worse["mAP-E"] == pytest.approx(25)
    assert worse["mAP-M"] == pytest.approx(100 * ((0 + 0.5) + (0.5 + 2 / 3)) / 4)
    assert worse["mAP-H"] == pytest.approx(25)  # 0 is ignored with the junk
    assert worse["mP@1-M"] == 0
    # for the easy ones, hard images are neither right nor wrong, whatever their rank
    assert revisited_scores(np.array([[2, 0, 1, 3]]), easy[:1], hard[:1], junk[:1])["mAP-E"] == 100


def test_ranking_is_by_cosine() -> None:
    database = np.array([[0.0, 5], [1, 1], [3, 0]])
    assert ranked(np.array([[10.0, 1]]), database).tolist() == [[2, 1, 0]]


# ---- Met ------------------------------------------------------------------------------------------------------------


def test_the_recorded_gap() -> None:
    predicted, truth = np.array([1, 2, 3, 4, 5]), np.array([1, -1, 3, 9, 5])
    sure = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    order = np.array([3, 1, 4, 0, 2])  # the order they come in does not matter
    got = met_scores(predicted[order], sure[order], truth[order])
    assert got == pytest.approx({"GAP": 56.6667, "GAP-": 68.75, "ACC": 75}, abs=1e-4)
    with pytest.raises(DinoError, match="nothing to find"):
        gap(predicted, sure, np.full(5, -1))


def test_the_recorded_confidence() -> None:
    got = confidences(np.array([[0.9, 0.8, 0.7]]), np.array([[0, 1, 0]]), 10, 5)
    assert got == pytest.approx([0.730861], abs=1e-6)
    alone = confidences(np.array([[0.9]]), np.array([[0]]), 10, 5)
    assert alone == pytest.approx([np.exp(9) / (np.exp(9) + 4)])
    assert np.isfinite(confidences(np.array([[1.0, 1.0]]), np.array([[0, 1]]), 500, 5)).all()


def test_whitened_descriptors_have_the_identity_as_covariance() -> None:
    x = np.random.default_rng(0).normal(size=(500, 8)) @ np.random.default_rng(1).normal(size=(8, 8)) + 3
    w = fit_whitening(x, 4, chunk=77)
    y = (x - w.mean) @ w.directions
    assert np.allclose(y.T @ y / 500, np.eye(4), atol=1e-6)
    values = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
    assert np.allclose(np.linalg.norm(w.directions, axis=0) ** -2, values[:4])  # the leading ones
    assert np.allclose(np.linalg.norm(w(x), axis=1), 1)
    # dimensions without variance are left out instead of blown up
    assert fit_whitening(np.concatenate([x, x], 1), 16).directions.shape == (16, 8)


def test_neighbours_in_blocks_equal_the_whole_matrix() -> None:
    rng = np.random.default_rng(2)
    q, d = unit(rng.normal(size=(30, 6))), unit(rng.normal(size=(50, 6)))
    s, n = neighbours(q, d, 5)
    whole = q @ d.T
    assert np.array_equal(n, np.argsort(-whole, axis=1)[:, :5])
    assert np.allclose(s, np.sort(whole, axis=1)[:, ::-1][:, :5], atol=1e-6)
    assert neighbours(q, d[:3], 5)[1].shape == (30, 3)


def test_the_first_best_of_the_grid_is_chosen() -> None:
    similarity = np.array([[0.9, 0.2], [0.8, 0.79], [0.7, 0.1]])
    classes = np.array([[0, 1], [1, 2], [2, 0]])
    truth = np.array([0, -1, 2])  # the second is a distractor and ambiguous: two neighbours show it
    k, t, found = choose(similarity, classes, truth, 3)
    assert k == 2
    assert found == pytest.approx(1)
    assert t == 0.01  # the first that sets it apart
    assert choose(similarity, classes, np.array([0, 1, 2]), 3)[:2] == (1, 0.01)  # everything is best: the first


# ---- AmsterTime -----------------------------------------------------------------------------------------------------


def test_orthogonal_pairs_permuted() -> None:
    new = np.eye(4)
    assert amstertime_scores(new, new)["mAP"] == 100
    old = np.array([[1, 0, 0, 0], [0.5, 0.4, 0, 0], [0, 0.9, 0.8, 0.7], [0, 0, 0.1, 0.9]])
    # of new 1 the partner's cosine 0.4/|.| is behind old 2's; of new 2: first; of new 3: first; of new 0: first
    assert ranks_of_partners(new, old).tolist() == [1, 2, 1, 1]
    # of old 1: new 0 first; of old 2: new 1 first
    assert ranks_of_partners(old, new).tolist() == [1, 2, 2, 1]
    got = amstertime_scores(new, old)
    assert got["mAP new→old"] == pytest.approx(100 * (3 + 0.5) / 4)
    assert got["mAP old→new"] == pytest.approx(100 * (2 + 1) / 4)
    assert got["mAP"] == pytest.approx(100 * 6.5 / 8)
    assert amstertime_scores(new, old, depth=1)["mAP"] == pytest.approx(100 * 5 / 8)


def test_equal_cosines_do_not_all_come_first() -> None:
    same = np.ones((4, 2))
    assert ranks_of_partners(same, same).tolist() == [1, 2, 3, 4]


# ---- images and files ---------------------------------------------------------------------------------------------


def test_squares_are_padded_with_black_or_cropped() -> None:
    image = Image.new("RGB", (100, 50), (255, 255, 255))
    padded = np.asarray(squared(image, 20))
    assert padded[0].max() == 0
    assert padded[10].min() == 255
    assert np.asarray(squared(image, 20, "crop")).min() == 255


def noise(path: Path, seed: int, size: tuple[int, int] = (48, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 255, (4, 6, 3))
    image = np.kron(blocks, np.ones((8, 8, 1))).astype(np.uint8)
    Image.fromarray(image).resize(size).save(path, quality=95)


def test_images_are_cut_to_their_boxes_and_named_after_it(tmp_path: Path) -> None:
    noise(tmp_path / "a.png", 0)
    images = ImageList([tmp_path / "a.png"], boxes=[(8, 0, 24, 8)], square=16)
    assert images[0][0].size == (16, 16)
    assert images.name(0).endswith("a.png#8,0,24,8#pad16")
    assert ImageList([tmp_path / "a.png"])[0][0].size == (48, 32)


def oxford(root: Path, *, as_pickle: bool = True) -> Path:
    for i in range(4):
        noise(root / "jpg" / f"d{i}.jpg", i)
    noise(root / "jpg" / "q.jpg", 2)
    row = {"bbx": [0.0, 0.0, 48.0, 32.0], "easy": np.array([2]), "hard": [], "junk": np.array([0])}
    content = {"imlist": [f"d{i}" for i in range(4)], "qimlist": ["q"], "gnd": [row]}
    if as_pickle:
        (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content, protocol=2))
    return root


def test_the_same_image_is_found_first(tmp_path: Path) -> None:
    root, out = oxford(tmp_path / "roxford5k"), tmp_path / "out"
    words = [f"root={tmp_path}", "size=32", f"output_dir={out}", "model.device=cpu", "features.cache=none"]
    assert main(words) == 0
    results = json.loads((out / "results-retrieval.json").read_text())["results"]
    assert results["mAP-M"] == results["mAP-E"] == 100
    assert "mAP-H" not in results  # no query has a hard image
    read = data.revisited(root, "roxford5k")
    assert read.easy[0].tolist() == [2]
    assert read.boxes == [(0, 0, 48, 32)]


def test_a_pickle_that_would_run_something_is_not_opened(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return os.system, ("true",)

    oxford(tmp_path, as_pickle=False)
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(pickle.dumps({"gnd": [Evil()]}))
    with pytest.raises(UnsafeFile, match="wants to run"):
        data.revisited(tmp_path, "roxford5k")
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(b"hello")
    with pytest.raises(DinoError, match="no ground truth"):
        data.revisited(tmp_path, "roxford5k")
    with pytest.raises(DinoError, match="no folder of rparis6k"):
        data.revisited(tmp_path, "rparis6k")


def test_met_end_to_end(tmp_path: Path) -> None:
    rows = []
    for exhibit in range(6):
        for view in range(2):
            noise(tmp_path / "images" / "train" / f"{exhibit}_{view}.png", exhibit, (48 + 16 * view, 32))
            rows.append({"id": 100 + exhibit, "path": f"train/{exhibit}_{view}.png"})
    truth = tmp_path / "ground_truth"
    truth.mkdir()
    (truth / "MET_database.json").write_text(json.dumps(rows))
    for part in ("testset", "valset"):
        queries = []
        for exhibit in (0, 1, 2):
            noise(tmp_path / "images" / part / f"{exhibit}.png", exhibit)
            queries.append({"path": f"{part}/{exhibit}.png", "MET_id": 100 + exhibit})
        noise(tmp_path / "images" / part / "other.png", 77)
        queries.append({"path": f"{part}/other.png"})
        (truth / f"{part}.json").write_text(json.dumps(queries))
    out = tmp_path / "out"
    words = ["benchmark=met", f"root={tmp_path}", f"output_dir={out}", "model.device=cpu", "features.cache=none"]
    assert main([*words, "whitened=8"]) == 0
    results = json.loads((out / "results-retrieval.json").read_text())["results"]
    assert results["ACC"] == 100
    assert results["GAP-"] == 100
    assert results["val GAP"] == pytest.approx(results["GAP"])
    with pytest.raises(DinoError, match="no folder of Met"):
        data.met(truth / "x", "test")


def test_amstertime_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(4):
        noise(tmp_path / "new" / f"{i:04d}.png", i)
        noise(tmp_path / "old" / f"{i:04d}.jpg", i)
    out = tmp_path / "out"
    words = ["benchmark=amstertime", f"root={tmp_path}", f"output_dir={out}", "model.device=cpu", "features.cache=none"]
    words += ["transform.resize_size=36", "transform.crop_size=32"]
    assert main(words) == 0
    assert json.loads((out / "results-retrieval.json").read_text())["results"]["mAP"] == 100
    (tmp_path / "old" / "0002.jpg").unlink()
    assert main(words) == 1
    assert "0002 has no partner" in capsys.readouterr().err
