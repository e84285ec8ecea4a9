"""Classification evaluations: k-NN, logistic regression, linear heads, ImageNet's variants, and their metrics."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from ranks import run_ranks
from result_tables import read_table

from dinov3 import metrics as classification
from dinov3.data.datasets import make_dataset
from dinov3.errors import DinoError, UnknownName
from dinov3.eval import knn, linear, log_regression
from dinov3.eval.features import Targets
from dinov3.eval.linear import HeadKind, Heads
from dinov3.metrics import Metric, evaluate, mean_corruption_error
from dinov3.neighbours import knn_scores, nearest, votes
from tests.eval.test_eval_session import make_folder, write_tiny


def unit(*degrees: float) -> torch.Tensor:
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angle.cos(), angle.sin()], 1)


# ---- toys ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of 2 classes and the weights of a tiny model."""
    root = tmp_path_factory.mktemp("toy")
    make_folder(root / "train", each=8)
    make_folder(root / "val", each=3, seed=1)
    write_tiny(root / "tiny.safetensors")
    return root


def words(toy: Path, out: Path, *more: str) -> list[str]:
    sizes = ["transform.resize_size=36", "transform.crop_size=32", f"features.cache={toy / 'cache'}"]
    return [
        f"--output-dir={out}",
        f"model.weights={toy / 'tiny.safetensors'}",
        f"train.dataset={toy / 'train'}",
        *sizes,
        *more,
    ]


LINEAR = (
    "train.batch_size=8", "train.epochs=2", "train.epoch_length=6", "train.learning_rates=[0.1,1.0]",
    "train.n_last_blocks_list=[1,2]", "train.num_workers=1", "train.checkpoint_retention_policy=last_and_best",
)  # fmt: skip


def random_bank() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 16, generator=rng, dtype=torch.float64) for n in (200, 30))
    return bank, torch.randint(7, (200,), generator=rng), queries


def blobs(classes: int = 4, n: int = 120, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 6, generator=rng, dtype=torch.float64)
    labels = torch.randint(classes, (n,), generator=rng)
    return centres[labels] + spread * torch.randn(n, 6, generator=rng, dtype=torch.float64), labels


def split_search(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    bank, _, queries = random_bank()
    return nearest(queries, bank[:10], k, split=True, chunk=2)


def strengths_of_rank() -> list[tuple[float, float]]:
    x, labels = blobs(2, 40)
    targets = Targets(labels.numpy())
    return log_regression.select(
        x, labels, x.numpy(), targets, Metric.MEAN_ACCURACY, 2, str, tol=1e-6, max_iter=5, solver="torch"
    )


Together = dict[str, Any]


def work_of_rank(toy: str) -> Together:
    """Everything that is tested on two processes, in one start: importing costs more than the work."""
    return {
        "neighbours": {k: split_search(k) for k in (3, 9)},
        "strengths": strengths_of_rank(),
        "linear": linear.main(
            words(Path(toy), Path(toy) / "two", f"train.val_dataset={toy}/val", *LINEAR, "train.batch_size=4")
        ),
    }


@pytest.fixture(scope="module")
def two(toy: Path) -> list[Together]:
    return run_ranks(work_of_rank, 2, str(toy), timeout_s=200)


# ---- k-NN -----------------------------------------------------------------------------------------------------------

BANK, BANK_LABELS = unit(0, 10, 20, 90, 100, 180), torch.tensor([0, 0, 1, 1, 1, 2])


def test_votes_are_the_recorded_ones() -> None:
    found = dict(knn_scores(BANK, BANK_LABELS, unit(12, 95), [1, 3, 5]))
    recorded = {
        1: [[0.382252, 0, 0], [0, 0.499992, 0]],
        3: [[0.664450, 0.335545, 0], [0, 0.9999976, 0]],
        5: [[0.664450, 0.335550, 0], [1.1458e-6, 0.9999976, 1.1458e-6]],
    }
    assert list(found) == [1, 3, 5]
    for k, expected in recorded.items():
        torch.testing.assert_close(found[k], torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_an_image_is_not_its_own_neighbour() -> None:
    found = dict(knn_scores(BANK, BANK_LABELS, BANK[:1], [1, 3], skip_first=True))
    torch.testing.assert_close(found[1][0], torch.tensor([0.655770, 0, 0]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[3][0], torch.tensor([0.655770, 0.344230, 0]).double(), atol=1e-6, rtol=0)


def test_votes_equal_scikit_learns() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    bank, labels, queries = random_bank()
    unit_bank, unit_queries = (x / x.norm(dim=1, keepdim=True) for x in (bank, queries))
    for k, scores in knn_scores(bank, labels, queries, [1, 5, 20]):
        theirs = neighbors.KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        ).fit(unit_bank.numpy(), labels.numpy())
        assert (scores.argmax(1).numpy() == theirs.predict(unit_queries.numpy())).all()
        normed = scores / scores.sum(1, keepdim=True)
        np.testing.assert_allclose(normed.numpy(), theirs.predict_proba(unit_queries.numpy()), atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_size_of_the_chunks_changes_nothing(chunk: int) -> None:
    bank, _, queries = random_bank()
    cosines, where = nearest(queries, bank, 20, chunk=chunk)
    every = (queries / queries.norm(dim=1, keepdim=True)) @ (bank / bank.norm(dim=1, keepdim=True)).T
    expected, order = every.topk(20)
    torch.testing.assert_close(cosines, expected)
    assert (where == order).all()


def test_processes_that_search_a_part_each_find_the_same(two: list[Together]) -> None:
    for k in (3, 9):  # 9 is more than a rank's part holds
        alone, where = split_search(k)
        for rank in two:
            torch.testing.assert_close(rank["neighbours"][k][0], alone)
            assert (rank["neighbours"][k][1] == where).all()


def test_one_positive_label_of_several_is_the_single_label() -> None:
    bank, labels, queries = random_bank()
    hot = torch.nn.functional.one_hot(labels)
    for (_, single), (_, several) in zip(knn_scores(bank, labels, queries, [5]), knn_scores(bank, hot, queries, [5])):
        torch.testing.assert_close(single, several)


def test_numbers_of_neighbours_are_capped_at_the_bank() -> None:
    assert [k for k, _ in knn_scores(BANK, BANK_LABELS, unit(5), [20, 3, 10])] == [3, 6]
    assert [k for k, _ in knn_scores(BANK, BANK_LABELS, BANK, [3, 10], skip_first=True)] == [3, 5]
    with pytest.raises(DinoError, match="at least one"):
        nearest(unit(5), BANK[:0], 1)


def test_a_half_precision_memory_mapped_bank_is_searched(tmp_path: Path) -> None:
    bank, _, queries = random_bank()
    np.save(tmp_path / "bank.npy", bank.numpy().astype(np.float16))
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    cosines, where = nearest(queries.float(), mapped, 5)
    expected, order = nearest(queries, bank, 5)
    torch.testing.assert_close(cosines.double(), expected, atol=2e-3, rtol=0)
    assert (where[:, 0] == order[:, 0]).all()


def test_votes_of_a_temperature_near_zero_are_the_nearest() -> None:
    scores = votes(torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[1, 0, 0]]), 3, 2, temperature=1e-3)
    torch.testing.assert_close(scores, torch.tensor([[0.0, 1.0]]))


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_any_match_is_the_recorded_one() -> None:
    scores = np.eye(4)[[1, 0, 3]]
    sets = np.array([[1, 2], [3, -1], [-1, -1]])
    assert evaluate(Metric.ANY_MATCH_ACCURACY, scores, sets) == {"top-1": 0.5}
    grouped = evaluate(Metric.GROUPBY_ANY_MATCH_ACCURACY_1, scores, sets, groups=np.array(["low", "high", "low"]))
    assert grouped == {"top-1": 0.5, "low": 1.0, "high": 0.0}


def test_groups_have_their_own_hit_rates() -> None:
    scores = np.eye(5)[[0, 1, 2, 3, 0, 0]]
    sets = np.array([[0], [1], [2], [0], [0], [4]])
    groups = np.array(["a"] * 4 + ["b"] * 2)
    results = evaluate(Metric.GROUPBY_ANY_MATCH_ACCURACY_1, scores, sets, groups=groups)
    assert (results["a"], results["b"]) == (0.75, 0.5)
    assert (results["a"] - results["b"]) / results["a"] == pytest.approx(1 / 3)


def test_mean_reciprocal_rank_is_the_recorded_one() -> None:
    scores = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]])
    results = evaluate(Metric.MACRO_AVERAGED_MEAN_RECIPROCAL_RANK, scores, np.array([0, 0, 2]))
    assert results["top-1"] == pytest.approx(0.5555552, abs=1e-7)


def test_eleven_points_of_precision() -> None:
    scores, positive = np.array([0.9, 0.8, 0.7]), np.array([1, 0, 1])
    assert classification.average_precision_11(scores, positive) == pytest.approx((6 + 5 * 2 / 3) / 11)
    results = evaluate(Metric.MEAN_AVERAGE_PRECISION_VOC_2007, np.stack([scores] * 2, 1), np.stack([positive] * 2, 1))
    assert results["top-1"] == pytest.approx(0.8484848, abs=1e-7)


def test_corruption_errors_are_the_recorded_ones() -> None:
    halves = {c: {s + 1: 1 - e / 2 for s, e in enumerate(row)} for c, row in classification.ALEXNET.items()}
    assert mean_corruption_error(halves)["mCE"] == pytest.approx(0.5)
    assert len(mean_corruption_error(halves)) == 1 + 15
    two = {"fog": dict.fromkeys(range(1, 6), 0.8), "snow": dict.fromkeys(range(1, 6), 0.5)}
    assert mean_corruption_error(two)["mCE"] == pytest.approx(0.410464, abs=1e-6)
    extra = {"spatter": dict.fromkeys(range(1, 6), 0.0)}
    assert mean_corruption_error(two | extra)["mCE"] == mean_corruption_error(two)["mCE"]
    assert mean_corruption_error(two | extra, extra=True)["mCE"] != mean_corruption_error(two)["mCE"]
    with pytest.raises(DinoError, match="at least one"):
        mean_corruption_error({"rain": {1: 0.5}})


def test_alexnets_means_are_the_printed_ones() -> None:
    means = {c: np.mean(row) for c, row in (classification.ALEXNET | classification.ALEXNET_EXTRA).items()}
    printed = {
        "gaussian_noise": 0.886428,
        "elastic_transform": 0.646056,
        "jpeg_compression": 0.6065,
        "saturate": 0.658248,
    }
    assert {c: means[c] for c in printed} == pytest.approx(printed)
    assert len(means) == 19


def test_metrics_equal_those_of_public_libraries() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    target = rng.integers(0, 6, 200)
    scores = rng.random((200, 6)) + 0.5 * np.eye(6)[target]
    scores /= scores.sum(1, keepdims=True)
    predicted = scores.argmax(1)
    expected = {
        Metric.MEAN_ACCURACY: metrics.accuracy_score(target, predicted),
        Metric.MEAN_PER_CLASS_ACCURACY: metrics.balanced_accuracy_score(target, predicted),
        Metric.MEAN_PER_CLASS_RECALL: metrics.recall_score(target, predicted, average="macro"),
        Metric.AUROC: metrics.roc_auc_score(target, scores, multi_class="ovr"),
        Metric.MEAN_MULTICLASS_F1: metrics.f1_score(target, predicted, average="micro"),
        Metric.MEAN_PER_CLASS_MULTICLASS_F1: metrics.f1_score(target, predicted, average="macro"),
    }
    for metric, value in expected.items():
        assert evaluate(metric, scores, target)["top-1"] == pytest.approx(value), metric
    top_5 = metrics.top_k_accuracy_score(target, scores, k=5)
    assert evaluate(Metric.MEAN_ACCURACY, scores, target)["top-5"] == pytest.approx(top_5)
    several = (rng.random((200, 6)) < 0.3).astype(int)
    noisy = np.clip(0.4 * several + 0.6 * rng.random((200, 6)), 0, 1).round(1)  # with ties
    expected = {
        Metric.MEAN_MULTILABEL_F1: metrics.f1_score(several, noisy > 0.5, average="micro"),
        Metric.MEAN_PER_CLASS_MULTILABEL_F1: metrics.f1_score(several, noisy > 0.5, average="macro"),
        Metric.MACRO_MULTILABEL_AVERAGE_PRECISION: metrics.average_precision_score(several, noisy, average="macro"),
    }
    for metric, value in expected.items():
        assert evaluate(metric, noisy, several)["top-1"] == pytest.approx(value), metric


def six_classes(several: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(features [240, 16] of overlapping classes, labels, one-hot or multi-hot labels [240, 6])."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 240)
    x = rng.normal(size=(6, 16))[labels] + 1.5 * rng.normal(size=(240, 16))
    hot = np.eye(6, dtype=int)[labels]
    return (
        x,
        labels,
        np.maximum(hot, np.eye(6, dtype=int)[(labels + 1) % 6] * (rng.random((240, 1)) < 0.5)) if several else hot,
    )


@pytest.mark.parametrize("several", [False, True])
def test_f1_and_auroc_of_a_logistic_regression_take_probabilities(several: bool) -> None:
    metrics, linear_model = pytest.importorskip("sklearn.metrics"), pytest.importorskip("sklearn.linear_model")
    x, labels, hot = six_classes(several)
    target = hot if several else labels
    fitted = log_regression.fit(torch.from_numpy(x), torch.from_numpy(target), 1.0, 6)
    logits = fitted.scores(x)
    if several:
        columns = [
            linear_model.LogisticRegression(tol=1e-12, max_iter=1000).fit(x, y).predict_proba(x)[:, 1] for y in hot.T
        ]
        shares = np.stack(columns, 1)
    else:
        shares = linear_model.LogisticRegression(tol=1e-12, max_iter=1000).fit(x, labels).predict_proba(x)

    def measured(metric: Metric) -> float:
        return log_regression.measured(metric, logits, Targets(target), torch.from_numpy(target))["top-1"]

    right = metrics.f1_score(hot, shares > 0.5, average="micro")
    assert measured(Metric.MEAN_MULTILABEL_F1) == pytest.approx(right, abs=1e-4)
    assert evaluate(Metric.MEAN_MULTILABEL_F1, logits, target)["top-1"] != pytest.approx(right, abs=0.01)  # of log-odds
    precision = metrics.average_precision_score(hot, shares, average="macro")
    assert measured(Metric.MACRO_MULTILABEL_AVERAGE_PRECISION) == pytest.approx(precision, abs=1e-4)
    if not several:
        area = metrics.roc_auc_score(labels, shares, multi_class="ovr")
        assert measured(Metric.AUROC) == pytest.approx(area, abs=1e-4)
        assert evaluate(Metric.AUROC, logits, labels)["top-1"] < area - 0.002


def test_f1_of_a_linear_head_takes_probabilities() -> None:
    _, labels, _ = six_classes(False)
    logits = torch.randn(240, 6, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(6)[labels]
    heads = Heads({"one": HeadKind(1, False, 0.1)}, 6, 6)
    with torch.no_grad():
        heads.layers["one"].weight.copy_(torch.eye(6))

    def f1(link: classification.Link) -> float:
        data = linear.TestSet("x", [logits], logits, Targets(labels), Metric.MEAN_MULTILABEL_F1, link)
        return data.numbers(heads, "one")["top-1"]

    shares = {"softmax": logits.softmax(1), "sigmoid": logits.sigmoid(), "": logits}
    found = {link: classification.multilabel_f1(x, np.eye(6)[labels], macro=False) for link, x in shares.items()}
    assert {link: f1(link) for link in found} == pytest.approx(found)  # type: ignore[arg-type]
    assert len(set(found.values())) == 3


def test_accuracy_of_each_class_is_reported() -> None:
    results = evaluate(Metric.PER_CLASS_ACCURACY, np.eye(3)[[0, 1, 1]], np.array([0, 1, 2]))
    assert results == {"top-1": pytest.approx(2 / 3), "top-1 class 0": 1, "top-1 class 1": 1, "top-1 class 2": 0}


def test_only_the_columns_of_a_subset_count() -> None:
    scores = np.array([[9.0, 1, 2, 0], [0, 5, 1, 8]])
    targets = Targets(np.array([1, 0]), columns=[[1], [2, 3]])
    np.testing.assert_array_equal(targets.chosen(scores), [[1, 2], [5, 8]])
    with pytest.raises(DinoError, match="train on ImageNet-1k"):
        targets.chosen(scores[:, :3])


def test_metrics_refuse_targets_of_the_wrong_kind() -> None:
    with pytest.raises(DinoError, match="any_match_accuracy"):
        evaluate(Metric.MEAN_ACCURACY, np.eye(3), np.eye(3, dtype=int))
    with pytest.raises(DinoError, match=r"class 3.*0 to 2"):
        evaluate(Metric.MEAN_ACCURACY, np.eye(3), np.array([0, 1, 3]))
    with pytest.raises(DinoError, match="groups"):
        evaluate(Metric.GROUPBY_ANY_MATCH_ACCURACY_5, np.eye(3), np.eye(3, dtype=int))


# ---- logistic regression --------------------------------------------------------------------------------------------


def test_there_are_45_strengths() -> None:
    strengths = log_regression.STRENGTHS
    assert (len(strengths), strengths[0], strengths[-1]) == (45, pytest.approx(1e-6), pytest.approx(1e5))
    assert strengths[1] == pytest.approx(1.7783e-6, rel=1e-4)
    np.testing.assert_allclose(np.diff(np.log10(strengths)), 0.25)


def test_equally_good_strengths_give_the_smallest() -> None:
    assert log_regression.best_strength([(1.0, 0.5), (0.1, 0.7), (0.01, 0.7), (10.0, 0.6)]) == 0.01


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_regression_equals_scikit_learns(classes: int, strength: float) -> None:
    pytest.importorskip("sklearn")
    x, labels = blobs(classes)
    ours, theirs = (log_regression.fit(x, labels, strength, classes, solver=s) for s in ("torch", "sklearn"))
    a, b = (torch.from_numpy(f.scores(x.numpy())).softmax(1) for f in (ours, theirs))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_several_labels_are_as_many_regressions() -> None:
    pytest.importorskip("sklearn")
    x, labels = blobs()
    hot = torch.nn.functional.one_hot(labels)
    ours, theirs = (log_regression.fit(x, hot, 0.1, 4, solver=s).scores(x.numpy()) for s in ("torch", "sklearn"))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_regression_is_the_minimum_of_its_objective() -> None:
    x, labels = blobs()
    found = log_regression.fit(x, labels, 0.1, 4)
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    logits = x @ weight.T + bias
    loss = 0.5 * weight.square().sum() + 0.1 * torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    loss.backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-5


def test_a_class_without_training_images_is_never_predicted() -> None:
    x, labels = blobs(3)
    kept = labels != 1
    found = log_regression.fit(x[kept], labels[kept], 1.0, 3)
    scores = found.scores(x.numpy())
    assert np.isneginf(scores[:, 1]).all()
    assert set(scores.argmax(1)) <= {0, 2}


def test_a_tenth_of_each_class_is_set_apart() -> None:
    labels = np.array([0] * 40 + [1] * 5 + [2])
    train, apart = log_regression.validation_rows(labels)
    assert np.bincount(labels[apart], minlength=3).tolist() == [4, 1, 0]
    assert sorted([*train, *apart]) == list(range(46))
    assert (log_regression.validation_rows(labels)[1] == apart).all()


def test_two_processes_share_the_strengths(two: list[Together]) -> None:
    assert two[0]["strengths"] == two[1]["strengths"]
    assert tuple(c for c, _ in two[0]["strengths"]) == log_regression.STRENGTHS


# ---- linear heads ---------------------------------------------------------------------------------------------------


def train_section(**given: object) -> linear.TrainSection:
    return linear.TrainSection(dataset="a", val_dataset="b", **given)  # type: ignore[arg-type]


def test_rates_are_scaled_with_the_batch() -> None:
    assert linear.scaled(1.0, 128, 8) == 4
    assert linear.scaled(1.0, 128, 1) == 0.5


def test_heads_have_the_references_names_and_no_two_the_same() -> None:
    names = list(linear.grid(train_section(learning_rates=[1e-3, 0.1], n_last_blocks_list=[1, 4]), 8))
    assert names == [f"classifier_{n}_blocks_avgpool_True_lr_{lr}" for n in (1, 4) for lr in ("0_00400", "0_40000")]
    assert len(linear.grid(train_section(), 1)) == 13  # at five decimals 5e-6 and 1e-5 would be one
    with pytest.raises(DinoError, match="twice"):
        linear.grid(train_section(learning_rates=[0.1, 0.1]), 1)


def test_a_head_sees_the_last_blocks_and_the_mean_of_the_last() -> None:
    cls = [torch.full((1, 2), float(i)) for i in range(4)]
    mean = torch.full((1, 2), 9.0)
    assert linear.head_input(HeadKind(2, True, 1), cls, mean).tolist() == [[2, 2, 3, 3, 9, 9]]
    assert linear.head_input(HeadKind(1, False, 1), cls, mean).tolist() == [[3, 3]]


def trained(kinds: dict[str, HeadKind], section: linear.TrainSection, steps: int = 20) -> Heads:
    rng = torch.Generator().manual_seed(1)
    heads = Heads(kinds, 8, 3)
    optimiser, schedule = linear.make_optimizer(heads, section, steps)
    for _ in range(steps):
        cls, mean = torch.randn(2, 16, 8, generator=rng)
        target = (cls[:, 0] > 0).long() + (mean[:, 0] > 1).long()
        logits = heads([cls], mean)
        loss = torch.stack([linear.loss_of(section.loss_type, one, target) for one in logits.values()]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return heads


@pytest.mark.parametrize("scheduler", ["cosine_annealing", "one_cycle"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_heads_train_independently(optimizer: str, scheduler: str) -> None:
    section = train_section(optimizer_type=optimizer, scheduler_type=scheduler)
    kinds = {"a": HeadKind(1, True, 0.1), "b": HeadKind(1, True, 0.5), "c": HeadKind(1, False, 0.1)}
    together = trained(kinds, section)
    for name in kinds:
        alone = trained({name: kinds[name]}, section)
        weight, lone = (heads.layers[name].weight for heads in (together, alone))
        torch.testing.assert_close(weight, lone, atol=1e-6, rtol=0)
    assert not torch.allclose(together.layers["a"].weight, together.layers["b"].weight)


def test_the_first_of_the_best_heads_wins_even_at_zero() -> None:
    assert linear.best_head({"a": 0.0, "b": 0.0}) == "a"
    assert linear.best_head({"a": 0.1, "b": 0.3, "c": 0.3}) == "b"


def test_retention_policies_leave_the_named_checkpoints() -> None:
    keep = {p: linear.retained(p, [10, 20]) for p in ("none", "all", "best", "last", "last_and_best")}
    assert keep == {
        "none": set(), "all": {"10", "20", "best", "final"}, "best": {"best"}, "last": {"final"},
        "last_and_best": {"final", "best"},
    }  # fmt: skip


# ---- whole scripts --------------------------------------------------------------------------------------------------


def test_knn_from_images_to_files(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = words(toy, tmp_path, f"eval.test_dataset={toy / 'val'}", "train.ks=[3,10]", "save_results=true")
    assert knn.main(given) == 0
    (row,) = read_table(tmp_path / "results-knn.csv")
    assert list(row) == ["3 Top 1", "10 Top 1"]
    assert row["3 Top 1"] == 100  # two colours
    lines = (tmp_path / "results_eval_knn.json").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{k: v} for k, v in row.items()]
    assert np.load(tmp_path / "preds_k_3.npy").tolist() == np.load(tmp_path / "target_k_3.npy").tolist()
    assert "MEAN_ACCURACY" in (tmp_path / "eval_config.yaml").read_text()
    assert json.loads((tmp_path / "results-knn.json").read_text())["config"]["train"]["ks"] == [3, 10]
    assert "3 Top 1: 100" in capsys.readouterr().out
    assert knn.main([*given, f"config_file={tmp_path / 'eval_config.yaml'}"]) == 0, (
        "the saved configuration is read back"
    )


def test_knn_with_few_shots(toy: Path, tmp_path: Path) -> None:
    shots = ["few_shot.enable=true", "few_shot.k_or_percent=2", "few_shot.n_tries=3"]
    assert knn.main(words(toy, tmp_path, f"eval.test_dataset={toy / 'val'}", "train.ks=[1]", *shots)) == 0
    (row,) = read_table(tmp_path / "results-knn.csv")
    assert list(row) == ["1 Top 1", "1 Top 1_std"]


@pytest.mark.parametrize("evaluation", [knn, log_regression, linear])
def test_test_images_without_a_class_are_refused_before_the_model_is_opened(
    evaluation: Any, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "loose" / "a.png")
    key = "train.val_dataset" if evaluation is linear else "eval.test_dataset"
    assert evaluation.main(words(toy, tmp_path / "out", f"{key}={tmp_path / 'loose'}")) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'loose'}: 1 of 1 images have no class" in error
    assert "tiny.safetensors" not in error


def test_a_strength_at_the_end_of_its_values_is_noted(toy: Path, tmp_path: Path) -> None:
    few = make_folder(tmp_path / "few", each=2)
    given = words(
        toy, tmp_path / "out", f"train.dataset={few}", f"eval.test_dataset={toy / 'val'}", f"train.val_dataset={few}"
    )
    assert log_regression.main(given) == 0
    log = (tmp_path / "out" / "log.txt").read_text()
    equal = re.search(r"the end of the 45 values of C; (\d+) of them are as good on the 4 validation images", log)
    assert equal is not None
    assert int(equal[1]) > 1


def test_logistic_regression_from_images_to_files(toy: Path, tmp_path: Path) -> None:
    given = words(toy, tmp_path, f"eval.test_dataset={toy / 'val'}", "train.solver=torch", "train.max_train_iters=20")
    assert log_regression.main(given) == 0
    assert read_table(tmp_path / "results-log-regression.csv") == [{"top-1": 100}]


def test_knn_and_logistic_regression_share_features_where_their_transforms_agree(toy: Path, tmp_path: Path) -> None:
    same = words(toy, tmp_path, f"eval.test_dataset={toy / 'val'}", f"features.cache={tmp_path / 'cache'}")
    assert knn.main([*same, "train.ks=[1]"]) == 0
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.npy")}
    assert log_regression.main(same) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.npy")} == files
    page = (ROOT / "docs" / "evaluation.md").read_text()
    assert "transform.resize_size=256` it reads what k-NN has computed" in page
    assert (knn.KnnConfig().transform.resize_size, log_regression.LogRegressionConfig().transform.resize_size) == (
        256,
        224,
    )


def test_a_sweep_over_layers_and_pooling(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = words(
        toy, tmp_path, f"eval.test_dataset={toy / 'val'}", "train.ks=[1]", "--sweep", "layers=1,3,1+3,pool=cls,mean"
    )
    assert knn.main(given) == 0
    rows = read_table(tmp_path / "sweep-knn.csv")
    assert [(str(r["layers"]), r["pool"]) for r in rows] == [(x, p) for x in ("1", "3", "1+3") for p in ("cls", "mean")]
    assert "layers  pool" in capsys.readouterr().out
    assert (tmp_path / "sweep" / "layers=1+3,pool=mean" / "results-knn.csv").exists()


def test_linear_heads_from_images_to_files(toy: Path, tmp_path: Path) -> None:
    given = words(toy, tmp_path, f"train.val_dataset={toy / 'val'}", f"eval.test_datasets=[{toy / 'train'}]", *LINEAR)
    assert linear.main(given) == 0
    (row,) = read_table(tmp_path / "results-linear.csv")
    assert list(row) == [f"{toy / 'val'}_accuracy", f"{toy / 'train'}_accuracy", "best_classifier"]
    assert row[f"{toy / 'val'}_accuracy"] == 100
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best", "final"]
    state = linear.SavedHeads(tmp_path / "checkpoints").load("final")
    assert set(state) == {"iteration", "linear_classifiers", "optimizer", "scheduler", "best_accuracy"}
    lines = (tmp_path / "results_eval_linear.json").read_text().split("\n")
    assert lines[0] == "iter: 6"
    assert set(json.loads(lines[1])["best_classifier"]) == {"name", "accuracy"}
    assert lines[2] == ""


def test_a_stopped_linear_run_resumes_exactly(toy: Path, tmp_path: Path) -> None:
    base = (
        f"train.val_dataset={toy / 'val'}",
        *LINEAR,
        "train.checkpoint_retention_policy=all",
        "train.save_checkpoint_iterations=5",
    )
    assert linear.main(words(toy, tmp_path / "whole", *base)) == 0
    whole = linear.SavedHeads(tmp_path / "whole" / "checkpoints")
    half = linear.SavedHeads(tmp_path / "half" / "checkpoints")
    half.save("5", whole.load("5"))
    assert linear.main(words(toy, tmp_path / "half", *base)) == 0
    assert "resuming from iteration 5" in (tmp_path / "half" / "log.txt").read_text()
    for key, value in whole.load("final")["linear_classifiers"].items():
        torch.testing.assert_close(half.load("final")["linear_classifiers"][key], value, atol=0, rtol=0)

    loss, calls = linear.loss_of, itertools.count()

    def pressed(*given: Any) -> torch.Tensor:
        if next(calls) == 3 * 4:  # of four heads: in the fourth iteration
            signal.raise_signal(signal.SIGINT)
        return loss(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "loss_of", pressed)
        with pytest.raises(KeyboardInterrupt, match="4 of 12 iterations are done and saved"):
            linear.main(words(toy, tmp_path / "torn", *base))
    assert linear.main(words(toy, tmp_path / "torn", *base)) == 0
    log = (tmp_path / "torn" / "log.txt").read_text()
    assert "resuming from iteration 4" in log
    assert "is seen" not in log
    torn = linear.SavedHeads(tmp_path / "torn" / "checkpoints")
    for key, value in whole.load("final")["linear_classifiers"].items():
        torch.testing.assert_close(torn.load("final")["linear_classifiers"][key], value, atol=0, rtol=0)


def test_many_passes_over_few_images_are_noted(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MANY_VIEWS", 2)
    assert linear.main(words(toy, tmp_path, f"train.val_dataset={toy / 'val'}", *LINEAR)) == 0
    images = sum(1 for _ in (toy / "train").rglob("*.*"))
    note = f"note: each image is seen {12 * 8 / images:,.0f} times; train.epoch_length={-(-images // 8)} is a pass over them"
    assert note in (tmp_path / "log.txt").read_text()


def test_two_processes_train_the_same_heads_as_one(toy: Path, two: list[Together], tmp_path: Path) -> None:
    assert [rank["linear"] for rank in two] == [0, 0]
    assert linear.main(words(toy, tmp_path, f"train.val_dataset={toy / 'val'}", *LINEAR)) == 0
    one, both = (
        linear.SavedHeads(d / "checkpoints").load("final")["linear_classifiers"] for d in (tmp_path, toy / "two")
    )
    for key in one:
        torch.testing.assert_close(one[key], both[key], atol=1e-5, rtol=1e-4)


def test_all_mistakes_in_a_linear_configuration_are_reported(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(
        toy,
        tmp_path,
        f"train.val_dataset={toy / 'val'}",
        "train.learning_rates=[]",
        "features.pool=mean",
        "train.eposh=1",
    )
    assert linear.main(given) == 1
    error = capsys.readouterr().err
    assert "train.learning_rates" in error
    assert "train.n_last_blocks_list" in error
    assert "did you mean 'train.epochs'" in error


@pytest.mark.slow
def test_the_public_command_runs(toy: Path, tmp_path: Path) -> None:
    given = words(toy, tmp_path, f"eval.test_dataset={toy / 'val'}", "train.ks=[1]")
    command = [sys.executable, "-m", "dinov3.run.submit", "dinov3/eval/knn.py", "--ngpus", "2", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results-knn.csv").exists()
    assert json.loads((tmp_path / "results-knn.json").read_text())["processes"] == 2
    direct = subprocess.run(
        [sys.executable, "dinov3/eval/knn.py", *given], cwd=ROOT, capture_output=True, text=True, timeout=250, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert direct.returncode == 0, direct.stderr


# ---- data sets ------------------------------------------------------------------------------------------------------


def image(path: Path, colour: tuple[int, int, int] = (9, 9, 9), size: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)


def test_v2_counts_its_folders_as_numbers(tmp_path: Path) -> None:
    for number in (2, 10, 1):
        image(tmp_path / str(number) / "x.jpeg")
    assert make_dataset(f"ImageNetV2:root={tmp_path}").get_targets().tolist() == [1, 2, 10]
    image(tmp_path / "1000" / "x.jpeg")
    with pytest.raises(DinoError, match="0 to 999"):
        make_dataset(f"ImageNetV2:root={tmp_path}")


def test_subsets_number_their_own_classes_and_map_to_columns(tmp_path: Path) -> None:
    for wnid in ("n01498041", "n01440764", "n15075141"):
        image(tmp_path / wnid / "0.jpg")
    (tmp_path / "README.txt").write_text("")
    subset = make_dataset(f"ImageNetR:root={tmp_path}")
    assert subset.get_targets().tolist() == [0, 1, 2]
    assert subset.get_imagenet_class_mapping() == [[0], [6], [999]]
    assert make_dataset(f"ImageNetSketch:root={tmp_path}").get_targets().tolist() == [0, 6, 999]
    image(tmp_path / "n99999999" / "0.jpg")
    with pytest.raises(DinoError, match="none of ImageNet-1k's"):
        make_dataset(f"ImageNetA:root={tmp_path}")


def test_real_has_sets_of_labels(tmp_path: Path) -> None:
    for number, wnid in ((1, "n01440764"), (3, "n01443537"), (2, "n01443537")):
        image(tmp_path / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG")
    (tmp_path / "real.json").write_text("[[5, 7], [], [1]]")
    real = make_dataset(f"ImageNetReaL:root={tmp_path}:labels={tmp_path}/real.json")
    order = [real.name(i)[-7:-5] for i in range(3)]
    assert dict(zip(order, real.get_targets().tolist())) == {"01": [5, 7], "02": [-1, -1], "03": [1, -1]}
    scores = np.eye(8)[[7, 0, 0]]
    assert evaluate(Metric(real.metric), scores, real.get_targets())["top-1"] == 0.5
    with pytest.raises(DinoError, match="labels"):
        make_dataset(f"ImageNetReaL:root={tmp_path}")


def test_corruptions_are_grouped_and_extra_ones_left_out(tmp_path: Path) -> None:
    for corruption in ("weather/fog", "snow", "spatter"):
        for severity in range(1, 6):
            image(tmp_path / corruption / str(severity) / "n01440764" / "a.JPEG")
    data = make_dataset(f"ImageNetC:root={tmp_path}")
    assert sorted(set(data.get_groupby_labels())) == sorted(f"{c}/{s}" for c in ("fog", "snow") for s in range(1, 6))
    scores = np.zeros((10, 2))
    scores[:, 0] = data.get_groupby_labels() != "fog/1"
    scores[:, 1] = 0.5
    results = evaluate(Metric(data.metric), scores, data.get_targets(), groups=data.get_groupby_labels())
    assert results["CE snow"] == 0
    assert results["CE fog"] == pytest.approx(0.2 / 0.819324)
    assert results["top-1"] == results["mCE"] == pytest.approx(0.1 / 0.819324)


def test_objectnet_loses_its_frame_and_maps_to_several_columns(tmp_path: Path) -> None:
    frame = Image.new("RGB", (20, 16), (255, 0, 0))
    frame.paste((1, 2, 3), (2, 2, 18, 14))
    for folder in ("alarm_clock", "toy"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        frame.save(tmp_path / "images" / folder / "a.png")
    maps = tmp_path / "mappings"
    maps.mkdir()
    (maps / "folder_to_objectnet_label.json").write_text(json.dumps({"alarm_clock": "Alarm clock", "toy": "Toy"}))
    (maps / "objectnet_to_imagenet_1k.json").write_text(json.dumps({"Alarm clock": "analog clock; digital clock"}))
    (maps / "imagenet_to_label_2012_v2").write_text("digital clock\ntench\nanalog clock\n")
    (maps / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps({"530": 0, "0": 1, "409": 2}))
    data = make_dataset(f"ObjectNet:root={tmp_path}")
    assert len(data) == 1
    assert data.get_imagenet_class_mapping() == [[409, 530]]
    shown = np.asarray(data[0][0])
    assert shown.shape == (12, 16, 3)
    assert (shown == [1, 2, 3]).all()


def test_a_divided_folder_never_shows_a_image_on_both_sides(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "all", classes=3, each=7)
    line = f"FolderSplit:root={root}:train_per_class=4:split="
    train, test = make_dataset(f"{line}train"), make_dataset(f"{line}test:test_per_class=2")
    assert np.bincount(train.get_targets()).tolist() == [4, 4, 4]
    assert np.bincount(test.get_targets()).tolist() == [2, 2, 2]
    names = [{d.name(i) for i in range(len(d))} for d in (train, test)]
    assert not names[0] & names[1]
    without = make_dataset(f"{line}train:exclude=class0")
    assert without.class_names == ["class1", "class2"]
    assert {without.name(i) for i in range(len(without))} <= names[0], "a class keeps its division"
    with pytest.raises(UnknownName, match="did you mean 'class0'"):
        make_dataset(f"{line}train:exclude=clas0")
    with pytest.raises(DinoError, match="none is left"):
        make_dataset(f"FolderSplit:root={root}:train_per_class=7:split=test")


def test_a_linear_head_is_measured_on_the_variants_each_by_its_own_metric(toy: Path, tmp_path: Path) -> None:
    shots = {c: Image.open(toy / "val" / f"class{c}" / "0.png") for c in (0, 1)}
    wnids = {0: "n01440764", 1: "n01443537"}
    for c, wnid in wnids.items():
        for folder in ("real/val", "c/fog/1", "c/snow/5", "a"):
            (tmp_path / folder / wnid).mkdir(parents=True)
            shots[c].save(tmp_path / folder / wnid / f"ILSVRC2012_val_{c + 1:08d}.JPEG", quality=95)
    (tmp_path / "real.json").write_text("[[0, 1], [0]]")  # the second is labelled with the other class
    lines = [
        f"ImageNetReaL:root={tmp_path}/real:labels={tmp_path}/real.json",
        f"ImageNetC:root={tmp_path}/c",
        f"ImageNetA:root={tmp_path}/a",
    ]
    given = words(
        toy, tmp_path / "out", f"train.val_dataset={toy / 'val'}", *LINEAR, f"eval.test_datasets=[{','.join(lines)}]"
    )
    assert linear.main(given) == 0
    (row,) = read_table(tmp_path / "out" / "results-linear.csv")
    assert row[f"{lines[0]}_accuracy"] == 50
    assert row[f"{lines[1]}_accuracy"] == row[f"{lines[1]} mCE"] == row[f"{lines[1]} CE fog"] == 0
    assert row[f"{lines[2]}_accuracy"] == 100


# ---- real images --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.data
def test_the_shipped_model_knows_imagenettes_classes_better_than_chance(development_data: Path, tmp_path: Path) -> None:
    line = "FolderSplit:root={}/imagenette/train:split={}:train_per_class=20:test_per_class=10"
    given = [
        f"{k}={line.format(development_data, s)}"
        for k, s in (("train.dataset", "train"), ("eval.test_dataset", "test"))
    ]
    sizes = ["transform.resize_size=128", "transform.crop_size=112", f"features.cache={tmp_path / 'cache'}"]
    assert knn.main([*given, *sizes, "train.ks=[5]", f"--output-dir={tmp_path}"]) == 0
    assert read_table(tmp_path / "results-knn.csv")[0]["5 Top 1"] > 30
