"""Predictions and targets → numbers: of image classes, of dense predictions, of boxes. Used by train, fit and eval alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dinov3.errors import DinoError, one_of, require

# ---- a representation, without labels --------------------------------------------------------------------------------


def rank_me(features: Tensor) -> float:
    """RankMe (Garrido et al. 2023): the effective rank of features [n, D], exp of the entropy of their normalised singular
    values. From 1 (all on a line through 0) to min(n, D); give n ≥ 4 D where possible. NaN if not all are finite."""
    if not features.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum() + 1e-7
    return float((-share * share.log()).sum().exp())


def pattern_kept(before: Tensor, after: Tensor) -> float:
    """How far the cosines between an image's patches are those of before: the correlation over pairs of different patches,
    mean over images. before, after [n, P, P]; 1 for the same pattern, 0 for one that has nothing to do with it."""
    P = before.shape[-1]
    pairs = torch.triu_indices(P, P, 1)
    x, y = (s[:, pairs[0], pairs[1]].double() for s in (before, after))  # [n, pairs]
    return float(torch.nn.functional.cosine_similarity(x - x.mean(1, True), y - y.mean(1, True)).mean())


# ---- classes of an image ---------------------------------------------------------------------------------------------
# Named as in the specification.
#
# Legend: N images, C classes. `scores` float [N, C], any monotone quantity; `target` int [N], multi-hot [N, C], or sets of
# labels as int [N, L] padded with −1. Numbers are fractions; the evaluations print per cent. `accuracy`, `multilabel_f1`
# and `average_precision` also take tensors, of any device.


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


# ---- dense predictions -----------------------------------------------------------------------------------------------
# Class maps (paper §6.1.2, Tab. 3) and depth maps (§6.1.2; Eigen et al. 2014).
#
# Legend: K classes, t target, p prediction, I / L / P pixels of a class that are right / in the target / in the prediction.
#
# Class maps are counted into a confusion matrix [K, K] (row: target, column: prediction), the one thing that adds up over
# images and ranks; scores are computed from its sum, never averaged over images. Depth scores are the other way round:
# one set per image, then the mean over images that have a valid pixel. Everything is a share of 1 (`percentages`
# makes the table's numbers), metres stay metres. Arrays may be numpy or torch; nothing here knows a model.


IGNORED = 255

# ---- class maps ----------------------------------------------------------------------------------------------------


def reduce_zero_label(labels: Tensor) -> Tensor:
    """ADE20K's masks count classes from 1 and say "other" with 0: 0 → 255 (ignored), k → k − 1, 255 stays."""
    return torch.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)


def confusion_matrix(prediction: Array, target: Array, n_classes: int, ignore_index: int | None = IGNORED) -> Tensor:
    """Counts int64 [K, K] of (target, prediction) over all pixels whose target is not `ignore_index`.

    Both are class numbers of equal shape. The sum of two matrices is the matrix of both images.
    """
    p, t = _tensor(prediction), _tensor(target)
    if p.shape != t.shape:
        raise DinoError(
            f"the prediction is {list(p.shape)} and the target {list(t.shape)}: resize the prediction first"
        )
    if p.is_floating_point() or t.is_floating_point():
        raise DinoError("confusion_matrix takes class numbers; for logits [K, h, w] call .argmax(0) first")
    p, t = p.reshape(-1).long(), t.reshape(-1).long()
    if ignore_index is not None:
        seen = t != ignore_index
        p, t = p[seen], t[seen]
    for what, values in (("target", t), ("prediction", p)):
        if values.numel() and not (values.min() >= 0 and values.max() < n_classes):
            wrong = values.min() if values.min() < 0 else values.max()
            raise DinoError(
                f"the {what} holds class {int(wrong)}, but there are {n_classes} classes (0 to {n_classes - 1}) and "
                f"{ignore_index} is ignored: give another number of classes, or mark what should not count"
            )
    return torch.bincount(t * n_classes + p, minlength=n_classes**2).reshape(n_classes, n_classes)


def iou_scores(confusion: Array) -> dict[str, Any]:
    """Scores of a confusion matrix, as shares of 1.

    Means over the classes that have one (a class that is neither in the targets nor predicted has no IoU): `mIoU`, `mAcc`
    (= `recall` = the reference's `acc`), `dice`, `precision`, `fscore`; `aAcc` is the share of right pixels. Per class,
    NaN where undefined: `IoU_per_class` = I/(L+P−I), `acc_per_class` = I/L, `precision_per_class` = I/P,
    `dice_per_class` = 2I/(P+L).
    """
    c = _tensor(confusion).double()
    right, labelled, predicted = c.diagonal(), c.sum(1), c.sum(0)
    iou = right / (labelled + predicted - right)
    recall, precision = right / labelled, right / predicted
    dice = 2 * right / (labelled + predicted)
    fscore = 2 * precision * recall / (precision + recall)  # undefined for a class with no hit, where dice is 0
    per_class = {"IoU": iou, "acc": recall, "precision": precision, "dice": dice}
    means = {"mIoU": iou, "acc": recall, "mAcc": recall, "dice": dice, "fscore": fscore}
    means |= {"precision": precision, "recall": recall}
    scores: dict[str, Any] = {name: float(values.nanmean()) for name, values in means.items()}
    scores["aAcc"] = float(right.sum() / labelled.sum())
    return scores | {f"{name}_per_class": values.tolist() for name, values in per_class.items()}


SEGMENTATION_COLUMNS = ("mIoU", "acc", "aAcc", "dice", "fscore", "precision", "recall")


def percentages(scores: Mapping[str, Any]) -> dict[str, float]:
    """The documented columns of a segmentation result: percent, two decimals."""
    return {name: round(100 * scores[name], 2) for name in SEGMENTATION_COLUMNS}


# ---- depth maps ----------------------------------------------------------------------------------------------------

# Borders (top, bottom, left, right) of the region that counts, as shares of height and width, ends excluded.
REGIONS: dict[str, tuple[float, float, float, float]] = {
    "FULL": (0.0, 1.0, 0.0, 1.0),
    # NYUv2's inner frame: outside of it the sensor sees nothing
    "NYU_EIGEN": (45 / 480, 471 / 480, 41 / 640, 601 / 640),
    "KITTI_GARG": (0.40810811, 0.99189189, 0.03594771, 0.96405229),  # Garg et al. 2016: where the laser reaches
    "KITTI_EIGEN": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}
DEPTH_SCORES = ("a1", "a2", "a3", "abs_rel", "sq_rel", "rmse", "mae", "log_10", "rmse_log", "silog")


def region_mask(name: str, size_hw: tuple[int, int]) -> Tensor:
    """bool [h, w]: the pixels of an image that an evaluation counts, by the name of the region."""
    h, w = size_hw
    top, bottom, left, right = REGIONS[one_of("the region", name, REGIONS)]
    mask = torch.zeros(h, w, dtype=torch.bool)
    # a thousandth of a pixel is added because 45/480·480 may come out as 44.999…
    mask[int(h * top + 1e-3) : int(h * bottom + 1e-3), int(w * left + 1e-3) : int(w * right + 1e-3)] = True
    return mask


def align_least_squares(prediction: Array, target: Array, mask: Array | None = None) -> tuple[float, float]:
    """(a, b) of the least squares target ≈ a·prediction + b over the mask's pixels: depth up to scale and shift."""
    p, t = _tensor(prediction).double(), _tensor(target).double()
    chosen = torch.ones_like(t, dtype=torch.bool) if mask is None else _tensor(mask).bool()
    p, t = p[chosen], t[chosen]
    if p.numel() == 0:
        return 1.0, 0.0
    mean_p, mean_t = p.mean(), t.mean()
    spread = ((p - mean_p) ** 2).sum()
    if spread == 0:  # a flat prediction does not determine the scale
        return 0.0, float(mean_t)
    a = ((p - mean_p) * (t - mean_t)).sum() / spread
    return float(a), float(mean_t - a * mean_p)


def depth_scores(
    prediction_m: Array,
    target_m: Array,
    min_depth: float = 0.001,
    max_depth: float = 10.0,
    *,
    mask: Array | None = None,
    align: bool = False,
) -> dict[str, float]:
    """Scores of one depth map in metres, over pixels with min_depth < target < max_depth inside `mask`.

    align: first replace the prediction by its least-squares fit a·p + b to those pixels. The prediction is then clamped
    to [min_depth, max_depth]. With e = ln t − ln p and r = max(t/p, p/t): a1, a2, a3 shares of r < 1.25, 1.25², 1.25³;
    abs_rel mean |t−p|/t; sq_rel mean (t−p)²/t; rmse, mae in metres; log_10 mean |log₁₀t − log₁₀p|; rmse_log; silog
    100·√(mean e² − (mean e)²). All NaN where no pixel counts.
    """
    if not 0 < min_depth < max_depth:
        raise DinoError(
            f"depths lie in 0 < min_depth < max_depth, not {min_depth} and {max_depth} (logarithms are taken)"
        )
    p, t = _tensor(prediction_m).double(), _tensor(target_m).double()
    if p.shape != t.shape:
        raise DinoError(
            f"the prediction is {list(p.shape)} and the target {list(t.shape)}: resize the prediction first"
        )
    valid = (t > min_depth) & (t < max_depth)
    if mask is not None:
        valid &= _tensor(mask).bool().expand_as(t)
    if not valid.any():
        return dict.fromkeys(DEPTH_SCORES, math.nan)
    if align:
        a, b = align_least_squares(p, t, valid)
        p = a * p + b
    p, t = p[valid].clamp(min_depth, max_depth), t[valid]
    worse = torch.maximum(t / p, p / t)
    e = t.log() - p.log()
    scores = {f"a{k}": (worse < 1.25**k).double().mean() for k in (1, 2, 3)}
    scores |= {
        "abs_rel": ((t - p).abs() / t).mean(),
        "sq_rel": ((t - p) ** 2 / t).mean(),
        "rmse": ((t - p) ** 2).mean().sqrt(),
        "mae": (t - p).abs().mean(),
        "log_10": e.abs().mean() / math.log(10),
        "rmse_log": (e**2).mean().sqrt(),
        # the variance as such: the difference of two means can fall below zero by rounding
        "silog": 100 * e.var(correction=0).sqrt(),
    }
    return {name: float(value) for name, value in scores.items()}


def mean_scores(per_image: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every score over the images that have it (NaN: none)."""
    rows = list(per_image)
    names = list(rows[0]) if rows else []
    means = {}
    for name in names:
        values = [row[name] for row in rows if not math.isnan(row[name])]
        means[name] = sum(values) / len(values) if values else math.nan
    return means


# ---- canopy height -------------------------------------------------------------------------------------------------


@dataclass
class CanopySums:
    """What a map of heights adds to the scores; small, so that processes can exchange it."""

    n: int
    error: float  # Σ e, e = prediction − target
    absolute: float
    squared: float
    target: float
    target_squared: float
    blocks: list[tuple[float, float]]  # (prediction, target): means over blocks

    @staticmethod
    def of(prediction_m: Array, target_m: Array, *, block: int = 50, dropped: int = 3) -> CanopySums:
        """Of one map: heights below 0 count as 0, targets that are NaN do not count; whole blocks only, after the first
        `dropped` rows and columns."""
        p, t = _tensor(prediction_m).double().squeeze(), _tensor(target_m).double().squeeze()
        if p.shape != t.shape or p.ndim != 2:
            raise DinoError(f"heights are maps [h, w] of equal size, not {list(p.shape)} and {list(t.shape)}")
        p, t = p.clamp(min=0), t.clamp(min=0)
        known = ~t.isnan()
        p = torch.where(known, p, math.nan)
        e, seen = (p - t)[known], t[known]
        error, absolute, squared, target, target_squared = (float(x.sum()) for x in (e, e.abs(), e**2, seen, seen**2))
        rows, columns = (max(0, side - dropped) // block for side in t.shape)
        means = []
        for x in (p, t):
            cells = x[dropped : dropped + rows * block, dropped : dropped + columns * block]
            cells = cells.reshape(rows, block, columns, block).transpose(1, 2).flatten(2)
            means.append(cells.nanmean(-1).flatten().tolist())
        pairs = [(a, b) for a, b in zip(*means) if not math.isnan(b)]
        return CanopySums(len(seen), error, absolute, squared, target, target_squared, pairs)


def canopy_scores(maps: Iterable[CanopySums]) -> dict[str, float]:
    """`mae`, `rmse`, `bias` (prediction − target), all in metres, pixel `r2`, and `block_r2` over the means of 50 × 50 pixels
    (Tolan et al. 2024); NaN where there is nothing to compare."""
    maps = list(maps)
    n = sum(m.n for m in maps)
    if n == 0:
        return dict.fromkeys(("mae", "rmse", "bias", "r2", "block_r2"), math.nan)
    squared, target = sum(m.squared for m in maps), sum(m.target for m in maps)
    spread = sum(m.target_squared for m in maps) - target**2 / n
    blocks = [pair for m in maps for pair in m.blocks]
    middle = sum(t for _, t in blocks) / max(len(blocks), 1)
    return {
        "mae": sum(m.absolute for m in maps) / n,
        "rmse": math.sqrt(squared / n),
        "bias": sum(m.error for m in maps) / n,
        "r2": _r2(squared, spread),
        "block_r2": _r2(sum((p - t) ** 2 for p, t in blocks), sum((t - middle) ** 2 for _, t in blocks)),
    }


def _r2(residual: float, spread: float) -> float:
    return 1 - residual / spread if spread > 0 else math.nan


def _tensor(x: Array) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach().cpu()
    # torch has no arithmetic for numpy's wider unsigned integers, and none of its own for arrays that may not be written
    return torch.from_numpy(
        np.require(x.astype(np.int64) if x.dtype in (np.uint16, np.uint32) else x, None, ["C", "W"])
    )


# ---- boxes -----------------------------------------------------------------------------------------------------------
# COCO's measures of boxes, and how boxes of several views of one image are merged. Arrays in, numbers out.
#
# Average precision per class and IoU threshold: detections by falling score, each taking the best free truth it overlaps
# enough; precision made monotone and read at 101 recalls; then averaged over the thresholds .50, .55, … .95 and the
# classes that occur. At most 100 detections per image and class. Crowds are matched any number of times and
# count neither for nor against. faster-coco-eval computes it (equal to pycocotools, in C++).
#
# Legend: N images, T true boxes and n detections of one image.


# column of the results → key of the library; percent
COLUMNS = {
    "AP": "AP_all", "AP50": "AP_50", "AP75": "AP_75", "APs": "AP_small", "APm": "AP_medium", "APl": "AP_large",
    "AR1": "AR_all", "AR10": "AR_second", "AR100": "AR_third", "ARs": "AR_small", "ARm": "AR_medium", "ARl": "AR_large",
}  # fmt: skip


EPS = 1e-7


def area(boxes_xyxy: Tensor) -> Tensor:
    sides = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clamp_min(0)
    return sides[..., 0] * sides[..., 1]


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(intersection over union, generalised IoU), element by element, of xyxy boxes that broadcast against each other.

    GIoU (arXiv 1902.09630) = IoU − (hull − union) / hull: it still has a slope where boxes do not touch. All pairs:
    `overlap(a[:, None], b[None])`.
    """
    common = torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], dim=-1)
    hull = area(torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], dim=-1))
    both = area(common)
    union = area(a) + area(b) - both
    iou = both / union.clamp_min(EPS)
    return iou, iou - (hull - union) / hull.clamp_min(EPS)


def box_average_precision(
    found: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]], class_names: Sequence[str]
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """(COCO's twelve numbers in percent, a row per class) of N images.

    found: `boxes_xyxy_px` [n, 4], `scores` [n], `labels` [n] per image; truth: `boxes_xyxy_px` [T, 4], `labels` [T], and
    where known `crowd` and `area_px2` [T]. Labels count `class_names`. A number is None where nothing is there to be
    found: AP of small boxes without small boxes. (small: below 32² px of area, large: above 96².)
    """
    library = require("faster_coco_eval", "detection", "COCO's average precision")
    if len(found) != len(truth):
        raise DinoError(f"{len(found)} images with detections, {len(truth)} with true boxes: one each is needed")
    facts = coco_facts(truth, class_names)
    rows = coco_results(found)
    if not facts["annotations"]:
        raise DinoError("there is no true box in any of the images, so nothing can be scored")
    # the library prints nothing: its tables go to a function that drops them
    reference = library.COCO(facts, print_function=_quiet)
    if rows:
        evaluation = library.COCOeval_faster(reference, reference.loadRes(rows), iouType="bbox", print_function=_quiet)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        stats = evaluation.stats_as_dict
        precision = np.asarray(evaluation.eval["precision"])[..., 0, -1]  # [thresholds, recalls, classes]
        results = {name: _percent(stats[key]) for name, key in COLUMNS.items()}
    else:
        present = _sizes_present(facts)
        results = {name: 0.0 if name[-1] not in "sml" or name[-1] in present else None for name in COLUMNS}
        labels = {row["category_id"] for row in facts["annotations"] if not row["iscrowd"]}
        precision = np.stack([np.full((10, 101), 0.0 if i in labels else -1.0) for i in range(len(class_names))], -1)
    per_class = []
    for i, name in enumerate(class_names):
        count = sum(row["category_id"] == i and not row["iscrowd"] for row in facts["annotations"])
        here = precision[:, :, i]
        ap, ap50 = (_percent(float(part[part > -1].mean())) if (part > -1).any() else None for part in (here, here[0]))
        per_class.append({"class": name, "boxes": count, "AP": ap, "AP50": ap50})
    return results, per_class


def coco_facts(truth: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> dict[str, Any]:
    """True boxes in COCO's form; images and classes are numbered from 0, as here."""
    annotations: list[dict[str, Any]] = []
    for i, target in enumerate(truth):
        boxes = np.asarray(target["boxes_xyxy_px"], np.float64).reshape(-1, 4)
        labels = np.asarray(target["labels"]).reshape(-1)
        areas = target.get("area_px2")
        for t, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            if not 0 <= labels[t] < len(class_names):
                raise DinoError(f"image {i} has a box of class {labels[t]}; there are {len(class_names)} classes")
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": int(labels[t]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(areas[t]) if areas is not None else (x2 - x1) * (y2 - y1),
                    "iscrowd": int(bool(target["crowd"][t])) if "crowd" in target else 0,
                }
            )
    return {
        "images": [{"id": i} for i in range(len(truth))],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(class_names)],
    }


def coco_results(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Detections in the form of COCO's results files."""
    rows = []
    for i, image in enumerate(found):
        boxes = np.asarray(image["boxes_xyxy_px"], np.float64).reshape(-1, 4)
        for (x1, y1, x2, y2), score, label in zip(boxes.tolist(), image["scores"], image["labels"]):
            box = [x1, y1, x2 - x1, y2 - y1]
            rows.append({"image_id": i, "category_id": int(label), "bbox": box, "score": float(score)})
    return rows


def _sizes_present(facts: Mapping[str, Any]) -> set[str]:
    areas = [row["area"] for row in facts["annotations"] if not row["iscrowd"]]
    return {"s" if a < 32**2 else "m" if a < 96**2 else "l" for a in areas}


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * float(value)


def _quiet(*_words: object, **_options: object) -> None:
    pass


# ---- several views of one image ----------------------------------------------------------------------------------


def soft_nms(
    boxes_xyxy_px: Tensor, scores: Tensor, labels: Tensor, *, sigma: float = 0.5, most: int = 300, least: float = 1e-3
) -> tuple[Tensor, Tensor, Tensor]:
    """(boxes, scores, labels), best first, after SoftNMS (arXiv 1704.04503): the best box stays, all others of its class
    lose exp(−IoU²/σ), and so on until `most` boxes stand or none scores `least`."""
    scores, chosen = scores.float().clone(), []
    values = []
    for _ in range(min(most, len(scores))):
        best = int(scores.argmax())
        if scores[best] < least:
            break
        chosen.append(best)
        values.append(scores[best].clone())
        iou, _giou = overlap(boxes_xyxy_px[best], boxes_xyxy_px)
        scores = torch.where(labels == labels[best], scores * torch.exp(-(iou**2) / sigma), scores)
        scores[best] = -1.0
    rows = torch.tensor(chosen, dtype=torch.int64, device=scores.device)
    return boxes_xyxy_px[rows], torch.stack(values) if values else scores[:0], labels[rows]
