"""Instance retrieval: the very same building or exhibit, by the cosine of CLS tokens (paper §6.2.3, Tab. 9).

Revisited Oxford and Paris (mAP medium and hard), Met (GAP, GAP−, accuracy), AmsterTime (mAP of street view and archive).

Legend: Q queries, N database images, D width, K neighbours.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dinov3.config.bounds import setting
from dinov3.data.datasets import retrieval as data
from dinov3.data.datasets.retrieval import ImageList
from dinov3.dense.matching import nearest
from dinov3.errors import DinoError
from dinov3.eval import session as common
from dinov3.eval.arguments import EvalConfig, FeatureSection, TransformSection
from dinov3.eval.session import Session
from dinov3.features import check_patches, default_preprocessing

MET_K = (1, 2, 3, 5, 7, 10, 15, 20, 50)
MET_T = (0.01, 0.1, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 50.0, 100.0, 500.0)


@dataclass
class RetrievalConfig(EvalConfig):
    POSITIONAL = (("FOLDER", "root"),)

    benchmark: Literal["roxford5k", "rparis6k", "met", "amstertime"] = "roxford5k"
    root: str = setting("", required="root=FOLDER of the benchmark's files")
    features: FeatureSection = field(default_factory=FeatureSection)
    batch_size: int = 64
    num_workers: int = 5
    # Oxford and Paris. The paper: longer side to 224, then a 224 crop from the middle, which can only pad
    size: int = 224
    square: Literal["pad", "crop"] = "pad"
    crop_queries: bool = True  # to the query's box, as the benchmark's own code does; the paper does not say
    # Met: images at their own size, each side to the nearest multiple of the patch
    whitened: int = setting(512, at_least=1)  # dimensions after whitening
    ks: list[int] = setting(list(MET_K), at_least=1, required="at least one value")
    temperatures: list[float] = setting(list(MET_T), required="at least one value")
    # AmsterTime
    transform: TransformSection = field(default_factory=TransformSection)
    depth: int | None = None  # ranks counted; null: all (the benchmark's own default is 1)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows as float32 unit vectors; similarities are their dot products."""
    return F.normalize(torch.from_numpy(np.array(x, np.float32)), dim=-1).numpy()


# ---- revisited Oxford and Paris: arrays in, numbers out -------------------------------------------------------------


def positions(ranking: np.ndarray, ok: np.ndarray, junk: np.ndarray) -> np.ndarray:
    """0-based ranks of the right images after the junk has been taken out of the ranking."""
    scored = ranking[~np.isin(ranking, junk)]
    return np.flatnonzero(np.isin(scored, ok))


def trapezoid_ap(ranks: np.ndarray, n_ok: int) -> float:
    """Average precision under the trapezoids between the recall steps; ranks of the right images, 0-based, rising.

    Not the usual step sum: a right image at rank r counts with the mean of the precision before it and at it.
    """
    j = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, j / np.maximum(ranks, 1))
    at = (j + 1) / (ranks + 1)
    return float(((before + at) / (2 * n_ok)).sum())


def precision_at(ranks: np.ndarray, k: int) -> float:
    """Share of right images among the first k, or up to the last right one where that comes earlier."""
    if not len(ranks):
        return 0.0
    k = min(k, int(ranks.max()) + 1)
    return float((ranks < k).sum() / k)


def revisited_scores(
    rankings: np.ndarray, easy: Sequence[np.ndarray], hard: Sequence[np.ndarray], junk: Sequence[np.ndarray]
) -> dict[str, float]:
    """mAP and mP@1, 5, 10 in percent, for easy, medium and hard; rankings [Q, N] of database numbers, best first.

    Easy ignores the hard images, hard ignores the easy ones, medium wants both. Queries without any right image are
    left out.
    """
    results: dict[str, float] = {}
    for name in ("E", "M", "H"):
        aps, precisions = [], []
        for ranking, e, h, u in zip(rankings, easy, hard, junk):
            ok = {"E": e, "M": np.concatenate([e, h]), "H": h}[name]
            ignored = {"E": np.concatenate([u, h]), "M": u, "H": np.concatenate([u, e])}[name]
            if len(ok):
                ranks = positions(ranking, ok, ignored)
                aps.append(trapezoid_ap(ranks, len(ok)))
                precisions.append([precision_at(ranks, k) for k in (1, 5, 10)])
        if aps:
            results[f"mAP-{name}"] = 100 * float(np.mean(aps))
            for k, value in zip((1, 5, 10), np.mean(precisions, axis=0)):
                results[f"mP@{k}-{name}"] = 100 * float(value)
    return results


def ranked(queries: np.ndarray, database: np.ndarray) -> np.ndarray:
    """Database numbers [Q, N] by falling cosine; equals in the database's order."""
    similarity = torch.from_numpy(unit(queries)) @ torch.from_numpy(unit(database)).T
    return similarity.argsort(dim=1, descending=True, stable=True).numpy()


# ---- Met: arrays in, numbers out ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whitening:
    """PCA whitening: (x − mean) @ directions has the identity as covariance."""

    mean: np.ndarray  # [D]
    directions: np.ndarray  # [D, k]

    def __call__(self, x: np.ndarray, *, chunk: int = 65536) -> np.ndarray:
        """Unit vectors [N, k] float32."""
        parts = [unit((x[i : i + chunk] - self.mean) @ self.directions) for i in range(0, len(x), chunk)]
        return np.concatenate(parts) if parts else np.zeros((0, self.directions.shape[1]), np.float32)


def fit_whitening(x: np.ndarray, dimensions: int, *, chunk: int = 65536) -> Whitening:
    """From descriptors [N, D], with the biased covariance and its leading dimensions; a memory-mapped array is fine."""
    if len(x) < 2:
        raise DinoError(f"whitening needs at least two descriptors, got {len(x)}")
    D = x.shape[1]
    total, square = np.zeros(D), np.zeros((D, D))
    for i in range(0, len(x), chunk):
        total += x[i : i + chunk].astype(np.float64).sum(0)
    mean = total / len(x)
    for i in range(0, len(x), chunk):
        part = x[i : i + chunk].astype(np.float64) - mean
        square += part.T @ part
    values, vectors = np.linalg.eigh(square / len(x))
    k = min(dimensions, D, int((values > values[-1] * 1e-10).sum()))  # directions without variance carry noise only
    values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
    return Whitening(mean, vectors / np.sqrt(values))


def neighbours(queries: np.ndarray, database: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(cosines [Q, k] falling, database numbers [Q, k]) of unit vectors; never more than a block of the matrix."""
    k = min(k, len(database))
    similarity, numbers = nearest(torch.from_numpy(queries), torch.from_numpy(database), k)
    return similarity.numpy(), numbers.numpy()


def confidences(similarity: np.ndarray, classes: np.ndarray, temperature: float, n_classes: int) -> np.ndarray:
    """Confidence in the nearest neighbour's class [Q]: similarities [Q, K] falling, and the classes of those neighbours.

    A class's score is its best neighbour's; the classes that are not among the neighbours count as similarity 0:
    e^(t·s) / (Σ over the present of e^(t·s) + number of the absent).
    """
    Q, K = classes.shape
    first = np.ones((Q, K), bool)  # the best neighbour of its class
    for i in range(1, K):
        first[:, i] = (classes[:, :i] != classes[:, i : i + 1]).all(1)
    e = np.exp(temperature * similarity.astype(np.float64))
    confidence: np.ndarray = e[:, 0] / ((e * first).sum(1) + n_classes - first.sum(1))
    return confidence


def gap(predicted: np.ndarray, confidence: np.ndarray, truth: np.ndarray) -> float:
    """Global average precision: all queries in one list, the surest first; −1 is the truth of a distractor."""
    order = np.argsort(-confidence, kind="stable")
    right = predicted[order] == truth[order]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    n = int((truth >= 0).sum())
    if n == 0:
        raise DinoError("no query belongs to an exhibit: there is nothing to find")
    return float((precision * right).sum() / n)


def met_scores(predicted: np.ndarray, confidence: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """GAP, GAP− (distractors left out) and accuracy (likewise), in percent."""
    real = truth >= 0
    return {
        "GAP": 100 * gap(predicted, confidence, truth),
        "GAP-": 100 * gap(predicted[real], confidence[real], truth[real]),
        "ACC": 100 * float((predicted[real] == truth[real]).mean()),
    }


def choose(
    similarity: np.ndarray,
    classes: np.ndarray,
    truth: np.ndarray,
    n_classes: int,
    *,
    ks: Sequence[int] = MET_K,
    temperatures: Sequence[float] = MET_T,
) -> tuple[int, float, float]:
    """(K, temperature, GAP): the best on validation queries; of equals the first of the grid."""
    best = (0, 0.0, -math.inf)
    for k in ks:
        for t in temperatures:
            found = gap(classes[:, 0], confidences(similarity[:, :k], classes[:, :k], t, n_classes), truth)
            if found > best[2]:
                best = (k, t, found)
    return best


# ---- AmsterTime: arrays in, numbers out -----------------------------------------------------------------------------


def ranks_of_partners(queries: np.ndarray, database: np.ndarray) -> np.ndarray:
    """1-based rank of database row i for query i; equals before it count against it no more than after it."""
    similarity = unit(queries) @ unit(database).T
    own = np.diagonal(similarity)[:, None]
    earlier = np.tri(len(own), k=-1, dtype=bool)
    ranks: np.ndarray = 1 + (similarity > own).sum(1) + ((similarity == own) & earlier).sum(1)
    return ranks


def amstertime_scores(new: np.ndarray, old: np.ndarray, depth: int | None = None) -> dict[str, float]:
    """mAP in percent, both ways and over all queries: with one right image each, AP is 1/rank (0 beyond `depth`)."""
    results: dict[str, float] = {}
    values = []
    for name, queries, database in (("old→new", old, new), ("new→old", new, old)):
        ranks = ranks_of_partners(queries, database)
        ap = np.where(ranks <= (depth or len(database)), 1 / ranks, 0.0)
        results[f"mAP {name}"] = 100 * float(ap.mean())
        results[f"top-1 {name}"] = 100 * float((ranks == 1).mean())
        values.append(ap)
    return {"mAP": 100 * float(np.concatenate(values).mean()), **results}


# ---- the evaluation -------------------------------------------------------------------------------------------------


def evaluate(config: RetrievalConfig, session: Session) -> dict[str, float]:
    model = session.model(config.model)
    kind = {"met": _met, "amstertime": _amstertime}.get(config.benchmark, _revisited)
    return kind(config, session, model)


def _revisited(config: RetrievalConfig, session: Session, model: Any) -> dict[str, float]:
    truth = data.revisited(config.root, config.benchmark)
    check_patches("size", config.size, model.stride)
    preprocessing = default_preprocessing(model, shape="native")
    boxes = truth.boxes if config.crop_queries else None
    listed = ImageList(truth.database, square=config.size, fit=config.square)
    query_images = ImageList(truth.queries, boxes=boxes, square=config.size, fit=config.square)
    batch = {"batch_size": config.batch_size, "workers": config.num_workers}
    database, queries = (
        session.features(model, images, preprocessing, config.features, **batch) for images in (listed, query_images)
    )
    return revisited_scores(ranked(queries, database), truth.easy, truth.hard, truth.junk)


def _met(config: RetrievalConfig, session: Session, model: nn.Module) -> dict[str, float]:
    preprocessing = default_preprocessing(model, shape="native")
    vectors: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for part in ("database", "val", "test"):
        paths, labels[part] = data.met(config.root, part)
        batch = {"batch_size": 1, "workers": config.num_workers}  # each has its own size
        vectors[part] = session.features(model, ImageList(paths), preprocessing, config.features, **batch)
    whitening = fit_whitening(vectors["database"], config.whitened)
    database = whitening(vectors["database"])
    n_classes = len(np.unique(labels["database"]))
    nearest_of = {p: neighbours(whitening(vectors[p]), database, max(config.ks)) for p in ("val", "test")}
    similarity, numbers = nearest_of["val"]
    k, t, found = choose(
        similarity,
        labels["database"][numbers],
        labels["val"],
        n_classes,
        ks=config.ks,
        temperatures=config.temperatures,
    )
    session.log(f"chosen on the validation queries: {k} neighbours, temperature {t:g} (GAP {100 * found:.2f})")
    similarity, numbers = nearest_of["test"]
    classes = labels["database"][numbers]
    confidence = confidences(similarity[:, :k], classes[:, :k], t, n_classes)
    return met_scores(classes[:, 0], confidence, labels["test"]) | {"k": k, "temperature": t, "val GAP": 100 * found}


def _amstertime(config: RetrievalConfig, session: Session, model: nn.Module) -> dict[str, float]:
    new, old = data.amstertime(config.root)
    preprocessing = session.preprocessing(model, config.transform)
    batch = {"batch_size": config.batch_size, "workers": config.num_workers}
    found = [session.features(model, ImageList(paths), preprocessing, config.features, **batch) for paths in (new, old)]
    return amstertime_scores(found[0], found[1], config.depth)


def main(argv: Sequence[str] | None = None) -> int:
    return common.main("retrieval", RetrievalConfig, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
