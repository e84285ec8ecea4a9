"""Video object segmentation by propagating the first frame's masks: J&F on DAVIS and its like (paper §6.1.5, Tab. 5).

The measures are DAVIS 2017's, semi-supervised: J is the overlap of the regions, F how well the contours agree; both per
object and frame, the first and the last frame not counted, then averaged per object and over all objects of all videos.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from dinov3.errors import DinoError

# ---- measures: arrays in, numbers out -------------------------------------------------------------------------------


def region_similarity(predicted: np.ndarray, truth: np.ndarray) -> float:
    """J of two boolean masks [H, W]: intersection over union, 1 where both are empty."""
    union = np.count_nonzero(predicted | truth)
    return float(np.count_nonzero(predicted & truth) / union) if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Contour pixels of a boolean mask [H, W]: those that differ from the right, lower or lower right neighbour."""
    # beyond the last row and column every pixel is its own neighbour
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    contour: np.ndarray = (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])
    # there the diagonal neighbour is the right (or lower) one again, and the corner has none: padding says it all
    return contour


def dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """A boolean mask [H, W] grown by a disk: pixels with one of the mask's within `radius`."""
    H, W = mask.shape
    out = np.zeros_like(mask)
    for dy in range(-radius, radius + 1):
        half = math.isqrt(radius * radius - dy * dy)  # the disk's half width in this row
        counts = np.zeros((H, W + 2 * half + 1), np.int32)
        np.cumsum(np.pad(mask, ((0, 0), (half, half))), axis=1, out=counts[:, 1:])
        hit = counts[:, 2 * half + 1 :] > counts[:, :W]  # some pixel of the mask within x ± half
        if dy >= 0:
            out[dy:] |= hit[: H - dy]
        else:
            out[:dy] |= hit[-dy:]
    return out


def contour_accuracy(predicted: np.ndarray, truth: np.ndarray, *, tolerance: float = 0.008) -> float:
    """F of two boolean masks [H, W]: contours that meet within `tolerance` of the diagonal (8 pixels at 480 × 854)."""
    radius = math.ceil(tolerance * math.hypot(*truth.shape))
    p, t = boundary(predicted), boundary(truth)
    n_p, n_t = np.count_nonzero(p), np.count_nonzero(t)
    if not n_p and not n_t:
        return 1.0
    if not n_p or not n_t:
        return 0.0  # precision or recall is 0
    precision = np.count_nonzero(p & dilated(t, radius)) / n_p
    recall = np.count_nonzero(t & dilated(p, radius)) / n_t
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def mean_recall_decay(values: Sequence[float]) -> tuple[float, float, float]:
    """Of one object's values over the frames: mean, share above 0.5, mean of the first quarter less that of the last."""
    v = np.asarray(values, float)
    if not len(v):
        raise DinoError("no frame is scored: a sequence needs three annotated frames, the first and last do not count")
    # DAVIS' bounds, 0-based and both included: quarters share their border frames
    edge = np.round(np.linspace(1, len(v), 5) + 1e-10).astype(int) - 1
    first, last = v[edge[0] : edge[1] + 1], v[edge[3] : edge[4] + 1]
    return float(v.mean()), float((v > 0.5).mean()), float(first.mean() - last.mean())


def sequence_scores(
    predicted: Sequence[np.ndarray], truth: Sequence[np.ndarray | None]
) -> list[tuple[list[float], list[float]]]:
    """(J per frame, F per frame) of every object of a video; masks of numbers [H, W], None where a frame has no truth.

    Objects are those up to the highest number in the first annotated frame that occur in it. The first and the last
    annotated frame are not scored.
    """
    annotated = [i for i, t in enumerate(truth) if t is not None]
    if len(annotated) < 3:
        raise DinoError(f"{len(annotated)} annotated frames: a sequence needs three, the first and last do not count")
    first = truth[annotated[0]]
    assert first is not None
    n_objects = int(first.max())
    if n_objects == 0:
        raise DinoError("the first annotated frame has no object to follow")
    highest = max(int(predicted[i].max()) for i in annotated)
    if highest > n_objects:
        raise DinoError(f"object {highest} was predicted and the first annotated frame has only {n_objects}")
    scores: list[tuple[list[float], list[float]]] = []
    for number in range(1, n_objects + 1):
        js, fs = [], []
        for i in annotated[1:-1]:
            p, t = predicted[i] == number, truth[i] == number
            js.append(region_similarity(p, t))
            fs.append(contour_accuracy(p, t))
        scores.append((js, fs))
    return scores


def davis_scores(sequences: Iterable[Sequence[tuple[Sequence[float], Sequence[float]]]]) -> dict[str, float]:
    """The table's numbers, in percent: every object of every sequence counts the same."""
    objects = [mean_recall_decay(js) + mean_recall_decay(fs) for sequence in sequences for js, fs in sequence]
    if not objects:
        raise DinoError("no sequence was scored")
    j, j_recall, j_decay, f, f_recall, f_decay = (100 * float(x) for x in np.mean(objects, axis=0))
    return {
        "J&F": (j + f) / 2, "J": j, "J-recall": j_recall, "J-decay": j_decay,
        "F": f, "F-recall": f_recall, "F-decay": f_decay, "objects": len(objects),
    }  # fmt: skip
