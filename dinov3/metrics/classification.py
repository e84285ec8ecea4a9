"""Scores → numbers: the metrics of image classification, each a pure function on arrays (named as in the specification).

Legend: N images, C classes. `scores` float [N, C], any monotone quantity; `target` int [N], multi-hot [N, C], or sets of
labels as int [N, L] padded with −1. Numbers are fractions; the evaluations print per cent. `accuracy`, `multilabel_f1`
and `average_precision` also take tensors, of any device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dinov3.errors import DinoError

Array = np.ndarray | Tensor
Numbers = dict[str, float]


class Metric(Enum):
    """Values of `*_metric_type`."""

    MEAN_ACCURACY = "mean_accuracy"
    MEAN_PER_CLASS_ACCURACY = "mean_per_class_accuracy"
    PER_CLASS_ACCURACY = "per_class_accuracy"
    MEAN_RECALL = "mean_recall"
    MEAN_PER_CLASS_RECALL = "mean_per_class_recall"
    AUROC = "auroc"
    MEAN_MULTICLASS_F1 = "mean_multiclass_f1"
    MEAN_PER_CLASS_MULTICLASS_F1 = "mean_per_class_multiclass_f1"
    MEAN_MULTILABEL_F1 = "mean_multilabel_f1"
    MEAN_PER_CLASS_MULTILABEL_F1 = "mean_per_class_multilabel_f1"
    MEAN_AVERAGE_PRECISION_VOC_2007 = "map_voc2007"
    MACRO_MULTILABEL_AVERAGE_PRECISION = "macro_multilabel_average_precision"
    ANY_MATCH_ACCURACY = "any_match_accuracy"
    GROUPBY_ANY_MATCH_ACCURACY_1 = "groupby_any_match_accuracy_1"
    GROUPBY_ANY_MATCH_ACCURACY_5 = "groupby_any_match_accuracy_5"
    IMAGENET_C_METRIC = "imagenet_c_metric"
    MACRO_AVERAGED_MEAN_RECIPROCAL_RANK = "macro_averaged_mean_reciprocal_rank"


Link = Literal["", "softmax", "sigmoid"]  # how logits become probabilities; "": scores are shares already
MULTILABEL = {
    Metric.MEAN_MULTILABEL_F1, Metric.MEAN_PER_CLASS_MULTILABEL_F1, Metric.MEAN_AVERAGE_PRECISION_VOC_2007,
    Metric.MACRO_MULTILABEL_AVERAGE_PRECISION,
}  # fmt: skip


def evaluate(
    metric: Metric, scores: np.ndarray, target: np.ndarray, *, groups: np.ndarray | None = None, link: Link = ""
) -> Numbers:
    """The metric under the keys `top-1` and, with five classes or more where it has a top-5, `top-5`.

    `link`: how a classifier's logits become probabilities, for the metrics that depend on more than an image's order of
    classes (thresholds, and ranks over images).
    `groups` (grouped metrics; ImageNet-C: corruption and severity as text "fog/3"): one word for each image.
    """
    scores, target = _matched(scores, target)
    if link and (metric in MULTILABEL or metric is Metric.AUROC):
        scores = probabilities(scores, link)
    if metric in MULTILABEL and target.ndim == 1:
        target = np.eye(scores.shape[1], dtype=np.int64)[target]
    if target.ndim == 1 and target.max() >= scores.shape[1]:
        raise DinoError(
            f"there are images of class {target.max()}, but scores for classes 0 to {scores.shape[1] - 1} only"
        )
    if target.ndim == 2 and metric in _TOP_K:
        several = ", ".join(sorted(m.value for m in MULTILABEL | {Metric.ANY_MATCH_ACCURACY}))
        raise DinoError(f"{metric.value} needs one label an image; for several take one of {several}")
    tops = (1, 5) if scores.shape[1] >= 5 else (1,)
    if metric in _TOP_K:
        return {f"top-{k}": _TOP_K[metric](scores, target, k) for k in tops}
    if metric is Metric.PER_CLASS_ACCURACY:
        return {
            f"top-{k}" + (f" class {c}" if c >= 0 else ""): v
            for k in tops
            for c, v in enumerate([accuracy(scores, target, k), *per_class_accuracy(scores, target, k)], start=-1)
        }
    if metric is Metric.ANY_MATCH_ACCURACY:
        return {f"top-{k}": any_match_accuracy(scores, target, k) for k in tops}
    if metric in (Metric.GROUPBY_ANY_MATCH_ACCURACY_1, Metric.GROUPBY_ANY_MATCH_ACCURACY_5):
        if groups is None:
            raise DinoError(f"{metric.value} needs a data set with groups (get_groupby_labels)")
        return grouped_any_match(scores, target, groups, 5 if metric is Metric.GROUPBY_ANY_MATCH_ACCURACY_5 else 1)
    if metric is Metric.IMAGENET_C_METRIC:
        if groups is None:
            raise DinoError("imagenet_c_metric needs a data set of corruptions: ImageNetC:root=…")
        return imagenet_c(hits(scores, target, 1), groups)
    return {"top-1": _WHOLE[metric](scores, target)}


def probabilities(logits: np.ndarray, link: Link) -> np.ndarray:
    """[N, C] in float64: softmax over the classes, or a sigmoid each; a logit of −inf (a class never seen) gives 0."""
    x = torch.from_numpy(np.asarray(logits, np.float64))
    return (x.softmax(1) if link == "softmax" else x.sigmoid()).numpy()


def _matched(scores: Array, target: Array) -> tuple[np.ndarray, np.ndarray]:
    """Both as numpy arrays, once there is something to measure."""
    if len(scores) != len(target) or len(scores) == 0:
        raise DinoError(f"{len(scores)} predictions for {len(target)} targets: nothing can be measured")
    scores, target = (x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x) for x in (scores, target))
    return scores, target


# ---- one label an image --------------------------------------------------------------------------------------------


def top_classes(scores: np.ndarray, k: int) -> np.ndarray:
    """[N, k] class numbers, best first; of equal scores the lower class."""
    if k == 1:
        return scores.argmax(1)[:, None]
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def hits(scores: np.ndarray, target: np.ndarray, k: int) -> np.ndarray:
    """bool [N]: the target is among the k best."""
    return (top_classes(scores, k) == target[:, None]).any(1)


def accuracy(scores: Array, target: Array, k: int = 1) -> float:
    """Share of the images whose class is among the k best."""
    return float(hits(*_matched(scores, target), k).mean())


def per_class_accuracy(scores: np.ndarray, target: np.ndarray, k: int = 1) -> np.ndarray:
    """[C]; 0 for a class without images."""
    right = np.bincount(target, hits(scores, target, k), scores.shape[1])
    return right / np.maximum(np.bincount(target, minlength=scores.shape[1]), 1)


def mean_per_class_accuracy(scores: np.ndarray, target: np.ndarray, k: int = 1) -> float:
    """Mean over the classes that have images."""
    return float(per_class_accuracy(scores, target, k)[np.unique(target)].mean())


def auroc(scores: np.ndarray, target: np.ndarray) -> float:
    """One class against the rest, from ranks (ties count half); the mean over classes that have both kinds."""
    values = []
    for c in range(scores.shape[1]):
        positive = target == c
        n, m = int(positive.sum()), int((~positive).sum())
        if n and m:
            values.append((_ranks(scores[:, c])[positive].sum() - n * (n + 1) / 2) / (n * m))
    return float(np.mean(values))


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values share their mean rank."""
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[where]


def multiclass_f1(scores: np.ndarray, target: np.ndarray, *, macro: bool) -> float:
    """Micro (then it is accuracy) or macro over the classes that occur in targets or predictions."""
    C = scores.shape[1]
    return _f1(np.eye(C, dtype=bool)[scores.argmax(1)], np.eye(C, dtype=bool)[target], macro=macro)


def mean_reciprocal_rank(scores: np.ndarray, target: np.ndarray) -> float:
    """1 / (number of scores as good as the target's or better), averaged in every class, then over all C classes."""
    rank = (scores >= scores[np.arange(len(target)), target][:, None]).sum(1)
    C = scores.shape[1]
    return float((np.bincount(target, 1 / rank, C) / (np.bincount(target, minlength=C) + 1e-6)).mean())


# ---- several labels an image ---------------------------------------------------------------------------------------


def multilabel_f1(scores: Array, target: Array, *, macro: bool, threshold: float = 0.5) -> float:
    """A label is predicted where its score exceeds the threshold: 0.5 suits shares, 0 logits."""
    scores, target = _matched(scores, target)
    return _f1(scores > threshold, target > 0, macro=macro)


def _f1(predicted: np.ndarray, true: np.ndarray, *, macro: bool) -> float:
    both, either = (predicted & true).sum(0), predicted.sum(0) + true.sum(0)
    if not macro:
        return float(2 * both.sum() / max(1, either.sum()))
    return float((2 * both[either > 0] / either[either > 0]).mean())


def precision_recall(scores: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of one class after each distinct score, best first."""
    order = np.argsort(-scores, kind="stable")
    true, ordered = (true[order] > 0), scores[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # equal scores are taken together
    found = true.cumsum()[last]
    return found / (last + 1), found / max(1, int(true.sum()))


def average_precision(scores: Array, true: Array) -> float:
    """Σ (gain in recall) × precision."""
    precision, recall = precision_recall(*_matched(scores, true))
    return float((np.diff(recall, prepend=0) * precision).sum())


def average_precision_11(scores: np.ndarray, true: np.ndarray) -> float:
    """VOC 2007: mean over recalls 0, 0.1, …, 1 of the best precision at that recall or beyond."""
    precision, recall = precision_recall(scores, true)
    return float(np.mean([precision[recall >= r - 1e-12].max(initial=0) for r in np.linspace(0, 1, 11)]))


def mean_over_classes(
    scores: np.ndarray, target: np.ndarray, precision: Callable[[np.ndarray, np.ndarray], float]
) -> float:
    """Over the classes that have a positive."""
    classes = np.flatnonzero((target > 0).any(0))
    return float(np.mean([precision(scores[:, c], target[:, c]) for c in classes]))


# ---- sets of labels, groups -----------------------------------------------------------------------------------------


def any_match(scores: np.ndarray, target: np.ndarray, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(bool [N] right, bool [N] counted): one of the k best is in the image's set, which is not empty."""
    if target.ndim != 2:
        raise DinoError("any-match metrics need sets of labels, int [N, L] padded with −1")
    best = top_classes(scores, k)
    right = (best[:, :, None] == target[:, None, :]).any(axis=(1, 2))
    return np.asarray(right), np.asarray((target >= 0).any(axis=1))


def any_match_accuracy(scores: np.ndarray, target: np.ndarray, k: int = 1) -> float:
    right, counted = any_match(scores, target, k)
    if not counted.any():
        raise DinoError("none of the images has a label")
    return float(right[counted].mean())


def grouped_any_match(scores: np.ndarray, target: np.ndarray, groups: np.ndarray, k: int) -> Numbers:
    """Any-match accuracy over all and of every group, e.g. income or region (the paper's fairness tables)."""
    right, counted = any_match(scores, target, k)
    numbers = {f"top-{k}": float(right[counted].mean())}
    for group in np.unique(groups[counted]):
        numbers[str(group)] = float(right[counted & (groups == group)].mean())
    return numbers


# ---- ImageNet-C -----------------------------------------------------------------------------------------------------

# AlexNet's error at severities 1 to 5 (Hendrycks & Dietterich 2019): what the error of a model is divided by
ALEXNET: dict[str, tuple[float, float, float, float, float]] = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
    "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
    "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}
ALEXNET_EXTRA: dict[str, tuple[float, float, float, float, float]] = {
    "speckle_noise": (0.66192, 0.74440, 0.90246, 0.94548, 0.97268),
    "gaussian_blur": (0.54732, 0.70444, 0.82574, 0.89864, 0.95940),
    "spatter": (0.47196, 0.62194, 0.75052, 0.84132, 0.90182),
    "saturate": (0.59342, 0.65514, 0.51174, 0.70834, 0.82260),
}


def mean_corruption_error(accuracies: Mapping[str, Mapping[int, float]], *, extra: bool = False) -> Numbers:
    """{corruption: {severity: accuracy}} → "mCE" (a fraction) and "CE <corruption>" of each.

    CE is the mean error over severities by AlexNet's mean over the same severities. Only the 15 standard corruptions count
    for mCE unless `extra`; those that are absent are left out, as long as one is there.
    """
    table = ALEXNET | (ALEXNET_EXTRA if extra else {})
    errors: Numbers = {}
    for corruption, levels in accuracies.items():
        if corruption in table and levels:
            alexnet = np.mean([table[corruption][s - 1] for s in levels])
            errors[corruption] = float((1 - np.mean(list(levels.values()))) / alexnet)
    if not errors:
        raise DinoError("mCE needs at least one of ImageNet-C's corruptions: " + ", ".join(table))
    return {"mCE": float(np.mean(list(errors.values())))} | {f"CE {name}": e for name, e in errors.items()}


def imagenet_c(right: np.ndarray, groups: np.ndarray) -> Numbers:
    """From hits [N] and words "fog/3" [N]; `top-1` is mCE, so that it is named as every other metric's number."""
    accuracies: dict[str, dict[int, float]] = {}
    for word in np.unique(groups):
        corruption, _, severity = str(word).rpartition("/")
        accuracies.setdefault(corruption, {})[int(severity)] = float(right[groups == word].mean())
    numbers = mean_corruption_error(accuracies)
    return {"top-1": numbers["mCE"]} | numbers


# ---- which metric is which function ---------------------------------------------------------------------------------

_TOP_K: dict[Metric, Callable[[np.ndarray, np.ndarray, int], float]] = {
    Metric.MEAN_ACCURACY: accuracy,
    Metric.MEAN_RECALL: accuracy,  # micro recall of one label an image is accuracy
    Metric.MEAN_PER_CLASS_ACCURACY: mean_per_class_accuracy,
    Metric.MEAN_PER_CLASS_RECALL: mean_per_class_accuracy,
}
_WHOLE: dict[Metric, Callable[[np.ndarray, np.ndarray], float]] = {
    Metric.AUROC: auroc,
    Metric.MEAN_MULTICLASS_F1: lambda s, t: multiclass_f1(s, t, macro=False),
    Metric.MEAN_PER_CLASS_MULTICLASS_F1: lambda s, t: multiclass_f1(s, t, macro=True),
    Metric.MEAN_MULTILABEL_F1: lambda s, t: multilabel_f1(s, t, macro=False),
    Metric.MEAN_PER_CLASS_MULTILABEL_F1: lambda s, t: multilabel_f1(s, t, macro=True),
    Metric.MEAN_AVERAGE_PRECISION_VOC_2007: lambda s, t: mean_over_classes(s, t, average_precision_11),
    Metric.MACRO_MULTILABEL_AVERAGE_PRECISION: lambda s, t: mean_over_classes(s, t, average_precision),
    Metric.MACRO_AVERAGED_MEAN_RECIPROCAL_RANK: mean_reciprocal_rank,
}
