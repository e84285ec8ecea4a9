"""Keypoint correspondence: geometric (NAVI: the same point of an object) and semantic (SPair: the same part of a class).

Paper §6.1.3 and Tab. 4. Geometric: every cell of one view is matched with the most similar cell of another; a match is
right if the two points, known from depth and cameras, coincide within 1, 2, 5 cm. Semantic: annotated keypoints of one
image are matched in another of the same class; PCK@0.1 of the object's box.

Legend: N cells, g×g grid of cells, h×w patch grid, D width. Points [.., 3] in metres, in their camera's frame.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.config.bounds import Problem, setting
from dinov3.data.datasets import retrieval
from dinov3.data.datasets.retrieval import NAVI_SHORT_SIDE, KeypointPair, View
from dinov3.data.images import open_file
from dinov3.dense.matching import nearest, sample
from dinov3.errors import DinoError
from dinov3.eval import session as common
from dinov3.eval.arguments import EvalConfig
from dinov3.eval.session import Session
from dinov3.features import check_patches, default_preprocessing, embed
from dinov3.heads.encoder import step_of

T = TypeVar("T")


@dataclass
class KeypointsConfig(EvalConfig):
    POSITIONAL = (("FOLDER", "root"),)

    benchmark: Literal["navi", "spair", "frames"] = "navi"  # frames: posed RGB-D images, scored as NAVI
    root: str = setting("", required="root=FOLDER of the benchmark's files")
    # pixels; null: 32 patches (navi, a square), 64 (spair, a square), 30 (frames, the short side)
    size: int | None = None
    layer: int = -1
    # with and without the final norm; the better counts
    norms: list[bool] = setting([True, False], required="at least one of true and false")
    # navi and frames
    # the paper's text, or Probe3D's code: one minus the ratio to the second best
    rank: Literal["cosine", "ratio"] = "cosine"
    keep: int = setting(1000, at_least=1)  # matches of a pair
    cells: float = setting(0.25, above=0, at_most=1)  # cells per pixel and axis
    every: int = setting(4, at_least=1)  # each so many views is a source
    max_rotation: float | None = None  # degrees between two views; null: 120 (navi), 45 (frames)
    min_overlap: float | None = None  # share of a view seen in the other; null: 0 (navi), 0.5 (frames)
    thresholds_cm: list[float] | None = None  # null: 1, 2, 5 (navi: things at arm's length), 5, 10, 20 (frames: rooms)
    # spair
    split: Literal["trn", "val", "test"] = "test"
    per_class: int = setting(200, at_least=1)
    pck: float = 0.1

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.thresholds_cm is not None and not self.thresholds_cm:
            yield "thresholds_cm", "needs at least one distance"


# ---- geometry: arrays in, numbers out -------------------------------------------------------------------------------


def back_project(depth_m: Tensor, focal_px: float, center_px: tuple[float, float]) -> Tensor:
    """Points [H, W, 3] at the pixels' centres; (0, 0, 0) where there is no depth."""
    H, W = depth_m.shape
    v, u = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    rays = torch.stack([(u - center_px[0]) / focal_px, (v - center_px[1]) / focal_px, torch.ones(H, W)], -1)
    return rays * depth_m[..., None]


def rotation_degrees(pose_a: np.ndarray, pose_b: np.ndarray) -> float:
    """Angle between two cameras [4, 4]."""
    cosine = (np.trace(pose_a[:3, :3] @ pose_b[:3, :3].T) - 1) / 2
    return math.degrees(math.acos(min(1.0, max(-1.0, float(cosine)))))


def draw_pairs(
    views: Sequence[View], *, max_rotation: float = 120, every: int = 4, seed: int = 8
) -> list[tuple[int, int]]:
    """(source, target): for every view another of its group, drawn among those turned by more than 0 and at most
    `max_rotation` degrees; then every `every`-th view is a source. Views without such a partner are left out."""
    generator = torch.Generator().manual_seed(seed)
    partners: dict[int, int] = {}
    for i, view in enumerate(views):
        others = [
            j for j, other in enumerate(views)
            if j != i and other.group == view.group
            and 0 < rotation_degrees(view.world_to_camera, other.world_to_camera) <= max_rotation
        ]  # fmt: skip
        if others:
            partners[i] = others[int(torch.randint(len(others), (1,), generator=generator))]
    return [(i, partners[i]) for i in range(0, len(views), every) if i in partners]


def square_around(mask: Tensor) -> tuple[int, int, int]:
    """(top, left, side) of the square that holds a mask [H, W], centred on it where it fits, else shifted inside."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    if not len(rows):
        raise DinoError("a view has no depth at all")
    r0, r1, c0, c1 = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    H, W = mask.shape
    side = min(max(r1 - r0, c1 - c0), H, W)
    top = min(max((r0 + r1 - side) // 2, 0), H - side)
    left = min(max((c0 + c1 - side) // 2, 0), W - side)
    return top, left, side


@dataclass(frozen=True)
class Matched:
    """Matches of one pair: weight [M] that ranked them, points [M, 3] of source and target."""

    weight: Tensor
    source: Tensor
    target: Tensor


def geometric_matches(
    features_a: Tensor,
    features_b: Tensor,
    points_a: Tensor,
    points_b: Tensor,
    *,
    rank: str = "cosine",
    keep: int = 1000,
) -> Matched:
    """The `keep` best-ranked matches of cells that have depth: features [g, g', D], points [g, g', 3]."""
    valid_a, valid_b = points_a[..., 2] > 0, points_b[..., 2] > 0
    if int(valid_a.sum()) == 0 or int(valid_b.sum()) < 2:
        raise DinoError("a view has no cells with depth: nothing can be matched")
    a, b = F.normalize(features_a[valid_a].float(), dim=-1), F.normalize(features_b[valid_b].float(), dim=-1)
    cosine, there = nearest(a, b, 2)
    weight = ratio_weight(1 - cosine[:, 0], 1 - cosine[:, 1]) if rank == "ratio" else cosine[:, 0]
    best = weight.topk(min(keep, len(weight))).indices
    return Matched(weight[best], points_a[valid_a][best], points_b[valid_b][there[best, 0]])


def ratio_weight(first: Tensor, second: Tensor) -> Tensor:
    """1 − d₁/d₂ of the cosine distances to the nearest and the second nearest: 1 is unmistakable, 0 ambiguous."""
    return 1 - first.clamp_min(1e-9) / second.clamp_min(1e-9)


def relative_pose(a: np.ndarray, b: np.ndarray) -> Tensor:
    """The transform [4, 4] from the frame of camera a to that of camera b."""
    return torch.from_numpy(b @ np.linalg.inv(a)).float()


def moved(points: Tensor, pose: Tensor) -> Tensor:
    """Points [.., 3] transformed by a pose [4, 4]."""
    return points @ pose[:3, :3].T + pose[:3, 3]


def metric_errors(matched: Matched, pose: Tensor) -> Tensor:
    """Distances in metres [M] between matched points and where they should be."""
    return (moved(matched.source, pose) - matched.target).norm(dim=-1)


def recalls(errors_m: Tensor, thresholds_cm: Sequence[float]) -> dict[str, float]:
    """Share of all matches below each distance, in percent, and their mean: the number that is reported."""
    if not len(errors_m):
        raise DinoError("there are no matches to score")
    found = {f"recall@{t:g}cm": 100 * float((errors_m < t / 100).float().mean()) for t in thresholds_cm}
    return {"recall": float(np.mean(list(found.values()))), **found}


def overlap(points_a: Tensor, points_b: Tensor, pose: Tensor, focal_px: float, center: tuple[float, float]) -> float:
    """Share of a's points seen in b: projected into its grid, they meet b's surface within 5 cm.

    focal_px and center are in cells of the grid.
    """
    a = moved(points_a[points_a[..., 2] > 0], pose)
    if not len(a):
        return 0.0
    in_front = a[:, 2] > 1e-3
    z = a[:, 2].clamp_min(1e-3)
    u = (a[:, 0] / z * focal_px + center[0]).floor().long()
    v = (a[:, 1] / z * focal_px + center[1]).floor().long()
    H, W = points_b.shape[:2]
    inside = in_front & (u >= 0) & (v >= 0) & (u < W) & (v < H)
    there = points_b[v[inside], u[inside]]
    met = (there[:, 2] > 0) & ((a[inside] - there).norm(dim=-1) < 0.05)
    return float(met.sum()) / len(a)


# ---- keypoints of a class: arrays in, numbers out -------------------------------------------------------------------


def semantic_errors(
    features_a: Tensor, features_b: Tensor, source_xy: Tensor, target_xy: Tensor, *, target_scale: float
) -> Tensor:
    """Distances [K] between where keypoints are found and where they are, in units of the target's box.

    features [h, w, D]; points (x, y) [K, 2] in units of the (square) image's side. A source keypoint's feature is a
    bilinear sample with aligned corners; the found place is the best patch's top left corner, as in the benchmark's code,
    which costs about half a patch. target_scale: longest side of the target's box over the longest side of the image.
    """
    h, w, D = features_b.shape
    a, b = F.normalize(features_a.float(), dim=-1), F.normalize(features_b.float(), dim=-1)
    grid = source_xy * source_xy.new_tensor([a.shape[1] - 1, a.shape[0] - 1])
    _, there = nearest(sample(a, grid), b.reshape(-1, D))
    found = torch.stack([there[:, 0] % w / w, there[:, 0] // w / h], -1)
    return (found - target_xy).norm(dim=-1) / target_scale


def pck(errors: dict[str, Tensor], threshold: float = 0.1) -> dict[str, float]:
    """Percent of each class's keypoints nearer than the threshold, and the mean of the classes."""
    per_class = {c: 100 * float((e < threshold).float().mean()) for c, e in sorted(errors.items()) if len(e)}
    if not per_class:
        raise DinoError("no pair has a keypoint that is visible in both images")
    return {"recall": float(np.mean(list(per_class.values()))), **per_class}


# ---- images -------------------------------------------------------------------------------------------------------


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def _nearest(x: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Nearest-neighbour resize of [C, H, W]: depth and points must not be mixed."""
    return F.interpolate(x[None], size_hw, mode="nearest")[0]


def navi_input(view: View, side: int) -> tuple[Tensor, Tensor]:
    """(image [3, side, side] in [0, 1], points [side, side, 3]) of the square around the object."""
    image, depth = view.image(), torch.from_numpy(view.depth_m())
    if min(image.size) > NAVI_SHORT_SIDE:
        scale = NAVI_SHORT_SIDE / min(image.size)
        W, H = (round(s * scale) for s in image.size)
        image = image.resize((W, H), Image.Resampling.BILINEAR)
    depth = _nearest(depth[None], (image.height, image.width))[0]
    short = min(image.size)
    H, W = int(side * image.height / short), int(side * image.width / short)
    x, d = _nearest(_tensor(image), (H, W)), _nearest(depth[None], (H, W))
    top, left = round((H - side) / 2), round((W - side) / 2)
    x, d = x[:, top : top + side, left : left + side], d[:, top : top + side, left : left + side]
    points = back_project(d[0], view.focal_px * side / min(view.size_wh), (side / 2, side / 2)).permute(2, 0, 1)
    t, l, s = square_around(d[0] > 0)  # noqa: E741
    x, points = x[:, t : t + s, l : l + s], points[:, t : t + s, l : l + s]
    return _nearest(x, (side, side)), _nearest(points, (side, side)).permute(1, 2, 0)


def frame_input(view: View, short_side: int, multiple: int) -> tuple[Tensor, Tensor, tuple[float, tuple[float, float]]]:
    """(image [3, H, W], points [H, W, 3], (focal, centre) in pixels) of a whole frame at multiples of the patch.

    The sides are rounded one by one, and the camera keeps one focal length: the image's shape changes by a hair.
    """
    image, depth = view.image(), torch.from_numpy(view.depth_m())
    scale = short_side / min(image.size)
    W, H = (max(multiple, round(s * scale / multiple) * multiple) for s in image.size)
    center = view.center_px or (image.width / 2, image.height / 2)
    if depth.shape != (image.height, image.width):
        depth = _nearest(depth[None], (image.height, image.width))[0]
    points = back_project(depth, view.focal_px, center).permute(2, 0, 1)  # before resizing: pixels stay their points
    x = _tensor(image.resize((W, H), Image.Resampling.BICUBIC)) if (W, H) != image.size else _tensor(image)
    focal, middle = view.focal_px * W / image.width, (center[0] * W / image.width, center[1] * H / image.height)
    return x, _nearest(points, (H, W)).permute(1, 2, 0), (focal, middle)


def spair_input(path: Any, points_xy: np.ndarray, side: int) -> tuple[Image.Image, Tensor, int]:
    """(square image, points in units of its side, longest side of the original).

    White to the right and below makes it square; points are cut to whole pixels of the resized image, as in the
    benchmark's code.
    """
    image = open_file(path)
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (255, 255, 255))
    square.paste(image, (0, 0))
    scaled = torch.from_numpy(np.trunc(points_xy * side / longest)).float() / side
    return square.resize((side, side), Image.Resampling.BICUBIC), scaled, longest


# ---- the evaluation -------------------------------------------------------------------------------------------------


Measure = Callable[[Tensor, Tensor], Tensor]  # two patch maps [h, w, D] → a row of numbers for each match [M, width]


def measured(
    config: KeypointsConfig,
    session: Session,
    model: nn.Module,
    pairs: Sequence[T],
    opened: Callable[[T], tuple[Any, Any, Measure] | None],
    width: int,
) -> tuple[dict[bool, Tensor], int]:
    """({norm: rows [M, width] of all matches}, number of pairs), the same on all ranks.

    opened(pair): its two images and how their patch maps are measured; None leaves the pair out.
    """
    preprocessing = default_preprocessing(model, shape="native")
    rows = {norm: [torch.zeros(0, width, device=session.device)] for norm in config.norms}
    count = torch.zeros(1, device=session.device)
    for pair in session.shared(pairs, "pairs"):
        found = opened(pair)
        if found is None:
            continue
        *images, measure = found
        count += 1
        for norm in config.norms:
            options: dict[str, Any] = {"preprocessing": preprocessing, "layer": config.layer, "norm": norm}
            a, b = (embed(model, image, **options).patches[0].float() for image in images)
            rows[norm].append(measure(a, b))
    every = {norm: distributed.all_gather(torch.cat(parts)).cpu() for norm, parts in rows.items()}
    return every, int(distributed.all_reduce(count))


def cell_features(patches: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """A patch map [h, w, D] at the resolution of the cells, bicubic."""
    return F.interpolate(patches.permute(2, 0, 1)[None], grid_hw, mode="bicubic", align_corners=False)[0].permute(
        1, 2, 0
    )


def geometric(config: KeypointsConfig, session: Session, model: Any) -> dict[str, float]:
    patch = step_of(model)
    is_navi = config.benchmark == "navi"
    views = retrieval.navi(config.root) if is_navi else retrieval.frames(config.root)
    size = config.size or (32 if is_navi else 30) * patch
    if is_navi:
        check_patches("size", size, patch)
    limit = config.max_rotation if config.max_rotation is not None else 120 if is_navi else 45
    least = config.min_overlap if config.min_overlap is not None else 0 if is_navi else 0.5
    thresholds = config.thresholds_cm or ([1.0, 2.0, 5.0] if is_navi else [5.0, 10.0, 20.0])
    pairs = draw_pairs(views, max_rotation=limit, every=config.every)

    def opened(pair: tuple[int, int]) -> tuple[Any, Any, Measure] | None:
        a, b = (views[i] for i in pair)
        pose = relative_pose(a.world_to_camera, b.world_to_camera)
        if is_navi:
            (xa, pa), (xb, pb) = navi_input(a, size), navi_input(b, size)
        else:
            (xa, pa, _), (xb, pb, (focal, center)) = frame_input(a, size, patch), frame_input(b, size, patch)
            if overlap(pa, pb, pose, focal, center) < least:
                return None
        grid = (round(pa.shape[0] * config.cells), round(pa.shape[1] * config.cells))
        ga, gb = (_nearest(p.permute(2, 0, 1), grid).permute(1, 2, 0).to(session.device) for p in (pa, pb))
        angle = rotation_degrees(a.world_to_camera, b.world_to_camera)

        def measure(fa: Tensor, fb: Tensor) -> Tensor:
            cells = cell_features(fa, grid), cell_features(fb, grid)
            matched = geometric_matches(*cells, ga, gb, rank=config.rank, keep=config.keep)
            errors = metric_errors(matched, pose.to(session.device))
            return torch.stack([errors, torch.full_like(errors, angle)], -1)

        return xa, xb, measure

    rows, n_pairs = measured(config, session, model, pairs, opened, 2)
    results: dict[bool, dict[str, float]] = {}
    for norm, every in rows.items():
        if not len(every):
            raise DinoError(f"no pair of {len(pairs)} overlaps by {least}; lower min_overlap or raise max_rotation")
        found = recalls(every[:, 0], thresholds)
        middle = thresholds[len(thresholds) // 2]
        for low in range(0, math.ceil(limit), 30):  # recall by the angle between the views
            part = every[(every[:, 1] > low) & (every[:, 1] <= low + 30)]
            if len(part):
                found[f"recall@{middle:g}cm {low}-{low + 30}°"] = 100 * float(
                    (part[:, 0] < middle / 100).float().mean()
                )
        results[norm] = found
    return _better(results) | {"pairs": n_pairs}


def semantic(config: KeypointsConfig, session: Session, model: Any) -> dict[str, float]:
    patch = step_of(model)
    size = config.size or 64 * patch
    check_patches("size", size, patch)
    pairs = retrieval.spair(config.root, split=config.split, per_class=config.per_class)
    classes = sorted({p.category for p in pairs})

    def opened(pair: KeypointPair) -> tuple[Any, Any, Measure] | None:
        if not len(pair.source_xy):
            return None
        a, source, _ = spair_input(pair.source, pair.source_xy, size)
        b, target, longest = spair_input(pair.target, pair.target_xy, size)
        x0, y0, x1, y1 = pair.target_box
        scale = max(x1 - x0, y1 - y0) / longest
        about = torch.tensor([[classes.index(pair.category), pair.viewpoint]], dtype=torch.float32)

        def measure(fa: Tensor, fb: Tensor) -> Tensor:
            errors = semantic_errors(fa, fb, source.to(fa.device), target.to(fa.device), target_scale=scale)
            return torch.cat([errors[:, None], about.to(fa.device).expand(len(errors), 2)], 1)

        return a, b, measure

    rows, _ = measured(config, session, model, pairs, opened, 3)
    results: dict[bool, dict[str, float]] = {}
    for norm, every in rows.items():
        found = pck({c: every[every[:, 1] == i, 0] for i, c in enumerate(classes)}, config.pck)
        for v in (0, 1, 2):
            part = every[every[:, 2] == v]
            if len(part):
                by_class = {c: part[part[:, 1] == i, 0] for i, c in enumerate(classes)}
                found[f"viewpoint {v}"] = pck(by_class, config.pck)["recall"]
        results[norm] = found
    return _better(results) | {"pairs": len(pairs)}


def _better(results: dict[bool, dict[str, float]]) -> dict[str, float]:
    """The results of the better setting of the norm, and the recall of each."""
    best = max(results, key=lambda norm: results[norm]["recall"])
    found: dict[str, Any] = {**results[best], "norm": best}
    for norm, one in results.items():
        found[f"recall {'with' if norm else 'without'} norm"] = one["recall"]
    return found


def evaluate(config: KeypointsConfig, session: Session) -> dict[str, float]:
    model = session.model(config.model)
    return (semantic if config.benchmark == "spair" else geometric)(config, session, model)


def main(argv: Sequence[str] | None = None) -> int:
    return common.main("keypoints", KeypointsConfig, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
