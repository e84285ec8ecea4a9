"""Video object segmentation by propagating the first frame's masks: J&F on DAVIS and its like (paper §6.1.5, Tab. 5).

The measures are DAVIS 2017's, semi-supervised: J is the overlap of the regions, F how well the contours agree; both per
object and frame, the first and the last frame not counted, then averaged per object and over all objects of all videos.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov3 import distributed
from dinov3.config.bounds import setting
from dinov3.data.datasets.video import MaskedVideo, MaskedVideos
from dinov3.dense.tracking import Propagation, masks, track
from dinov3.errors import DinoError
from dinov3.eval import session as common
from dinov3.eval.arguments import EvalConfig
from dinov3.eval.session import Session
from dinov3.features import default_preprocessing, embed
from dinov3.heads.encoder import step_of


@dataclass
class TrackingConfig(EvalConfig):
    POSITIONAL = (("FOLDER", "root"),)

    # the folder with JPEGImages and Annotations
    root: str = setting("", required="root=FOLDER, with JPEGImages and Annotations in it")
    split: str | None = None  # a list below ImageSets, such as 2017/val; null: all sequences
    sequences: list[str] = field(default_factory=list)  # only these
    # patches on the short side: 30, 60 (the family tables) and 90 are the paper's S, M, L, whatever the patch's size
    patches: int = setting(60, at_least=1)
    short_side: int | None = setting(None, at_least=1)  # or in pixels
    # sides to the nearest multiple of the patch (the paper's text), or up to the next one (its notebook)
    rounding: Literal["nearest", "up"] = "nearest"
    layer: int = -1
    norm: bool = True
    propagation: Propagation = field(default_factory=Propagation)
    upsampling: Literal["bilinear", "nearest"] = "bilinear"  # of soft labels to the frame: paper, notebook
    stretch: bool = True  # every object's map to [0, 1] before the largest wins (notebook)
    save_masks: bool = False  # masks/<sequence>/<frame>.png


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
    # there the diagonal neighbour is the right (or lower) one again, and the corner has none: edge padding covers both
    return contour


def dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """A boolean mask [H, W] grown by a disk: pixels with one of the mask's within `radius`."""
    H, W = mask.shape
    out = np.zeros_like(mask)
    for dy in range(-min(radius, H - 1), min(radius, H - 1) + 1):
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
    # only contour pixels are needed, so the image around both contours need not be grown through
    rows, columns = np.flatnonzero((p | t).any(1)), np.flatnonzero((p | t).any(0))
    inside = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    p, t = p[inside], t[inside]
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
    scored = [(predicted[i], t) for i in annotated[1:-1] if (t := truth[i]) is not None]
    scores: list[tuple[list[float], list[float]]] = []
    for number in range(1, n_objects + 1):
        js, fs = [], []
        for mask, target in scored:
            p, t = mask == number, target == number
            js.append(region_similarity(p, t))
            fs.append(contour_accuracy(p, t))
        scores.append((js, fs))
    return scores


def object_row(js: Sequence[float], fs: Sequence[float]) -> list[float]:
    """J mean, recall, decay and F mean, recall, decay of one object."""
    return [*mean_recall_decay(js), *mean_recall_decay(fs)]


def table(objects: Sequence[Sequence[float]]) -> dict[str, float]:
    """The paper's numbers, in percent, from the rows of all objects of all sequences: every object counts the same."""
    if not objects:
        raise DinoError("no sequence was scored")
    j, j_recall, j_decay, f, f_recall, f_decay = (100 * float(x) for x in np.mean(objects, axis=0))
    return {
        "J&F": (j + f) / 2, "J": j, "J-recall": j_recall, "J-decay": j_decay,
        "F": f, "F-recall": f_recall, "F-decay": f_decay, "objects": len(objects),
    }  # fmt: skip


# ---- the evaluation -------------------------------------------------------------------------------------------------


def frame_size(width: int, height: int, short_side: int, patch: int, rounding: str = "nearest") -> tuple[int, int]:
    """(width, height) at which the backbone sees a frame: multiples of the patch, the short side about `short_side`.

    "nearest": each side to the multiple nearest to its ideal length. "up": the short side up to the next multiple, and
    the long side, from that, up again. They agree for DAVIS at 960 and patch 16 (1712 × 960).
    """
    short, long = sorted((width, height))
    if rounding == "up":
        s = math.ceil(short_side / patch) * patch
        l = math.ceil(long * s / short / patch) * patch  # noqa: E741
    else:
        s, l = (max(patch, round(v / patch) * patch) for v in (short_side, short_side * long / short))  # noqa: E741
    return (l, s) if width > height else (s, l)


def followed(model: Any, video: MaskedVideo, config: TrackingConfig) -> list[np.ndarray]:
    """Masks of numbers [H, W] of every frame, from the model's features and the first annotated mask alone.

    Frames before the first mask are left without objects.
    """
    start = next((i for i in range(len(video)) if video.masks[i] is not None), None)
    first = None if start is None else video.mask(start)
    if start is None or first is None or not first.any():
        raise DinoError(f"{video.name}: the first annotated frame has no object to follow")
    H, W = first.shape
    patch = step_of(model)
    size = frame_size(W, H, config.short_side or config.patches * patch, patch, config.rounding)
    preprocessing = default_preprocessing(model, shape="native")

    def features() -> Iterator[Tensor]:
        for i in range(start, len(video)):
            frame = video.frame(i).resize(size, Image.Resampling.BICUBIC)
            yield embed(model, frame, preprocessing=preprocessing, layer=config.layer, norm=config.norm).patches[0]

    out = [np.zeros((H, W), np.uint8)] * start
    for labels in track(features(), torch.from_numpy(first), config.propagation):
        found = masks(labels, (H, W), upsampling=config.upsampling, stretch=config.stretch)
        out.append(found.to(torch.uint8).cpu().numpy())
    return out


def evaluate(config: TrackingConfig, session: Session) -> dict[str, float]:
    """J&F over the sequences; each process follows its share of them."""
    videos = MaskedVideos(config.root, split=config.split, sequences=config.sequences)
    model = session.model(config.model)
    rows: list[list[float]] = []
    for number in distributed.share(range(len(videos))):
        video = videos[number]
        predicted = followed(model, video, config)
        scores = sequence_scores(predicted, [video.mask(i) for i in range(len(video))])
        objects = [object_row(js, fs) for js, fs in scores]
        rows += [[number, *row] for row in objects]
        j, f = np.mean([row[0] for row in objects]), np.mean([row[3] for row in objects])
        session.log(f"{video.name}: J {100 * j:.1f}, F {100 * f:.1f}, {len(objects)} object(s), {len(video)} frames")
        if config.save_masks:
            save(predicted, video, session)
    every = distributed.all_gather(torch.tensor(rows, dtype=torch.float64, device=session.device).reshape(-1, 7)).cpu()
    results = table(every[:, 1:].tolist())
    names = every[:, 0].long()
    for number in names.unique().tolist():
        part = every[names == number]
        results[f"J&F {videos[number].name}"] = float(100 * (part[:, 1] + part[:, 4]).mean() / 2)
    return results


def save(predicted: Sequence[np.ndarray], video: MaskedVideo, session: Session) -> None:
    """The masks as palette images, in DAVIS' layout."""
    folder = session.output / "masks" / video.name
    folder.mkdir(parents=True, exist_ok=True)
    palette = [round(255 * c) for i in range(256) for c in (i & 1, i >> 1 & 1, i >> 2 & 1)]
    for path, mask in zip(video.frames, predicted):
        image = Image.fromarray(mask)
        image.putpalette(palette)
        image.save(folder / f"{path.stem}.png")


def main(argv: Sequence[str] | None = None) -> int:
    return common.main("tracking", TrackingConfig, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
