"""The four tasks a head can be fitted to: examples, loss, scores and drawings.

Each task holds the data and knows nothing of the loop (`fit`) nor of folders of runs (`train_head.run`). An example is
(image [3, h, w], target) with an image of one size for all, unless the task takes lists (detection). What is drawn at
random is a function of (seed, epoch, index).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov3 import distributed, drawing
from dinov3.data.crops import draw_box
from dinov3.data.transforms.dense import (
    DepthTransform,
    SegmentationTransform,
    flipped,
    generator,
    photometric,
    resized_map,
)
from dinov3.data.transforms.inputs import Preprocessing, to_pixels
from dinov3.errors import DinoError
from dinov3.features import batched, evaluating
from dinov3.fit import shuffled
from dinov3.heads.encoder import class_maps, resized
from dinov3.heads.objectives import DepthLoss, segmentation_terms
from dinov3.losses import LossTerms
from dinov3.metrics import (
    IGNORED,
    accuracy,
    box_average_precision,
    confusion_matrix,
    depth_scores,
    iou_scores,
    mean_scores,
    reduce_zero_label,
)

CACHED_BYTES = 1 << 29  # of prepared examples: reading and resizing an image costs more than a linear head


class Task(ABC):
    """`data` and `val` are data sets of (image, target); `preprocessing` is how images become inputs."""

    name: str
    score: str  # the evaluation's number that chooses the best head …
    score_is: Literal["highest", "lowest"] = "highest"
    stacked: ClassVar[bool] = True  # whether a batch is one tensor

    def __init__(
        self, data: Any, val: Any | None, preprocessing: Preprocessing, *, augment: str, batch: int, seed: int
    ) -> None:
        self.data, self.val, self.preprocessing = data, val, preprocessing
        self.augment, self.batch_size, self.seed = augment, batch, seed
        self.class_names: list[str] = []
        self._cached: dict[tuple[int, bool], tuple[Tensor, Any]] = {}
        self._cached_bytes = 0

    @property
    def n_classes(self) -> int | None:
        return len(self.class_names) or None

    # ---- examples ------------------------------------------------------------------------------------------------

    @abstractmethod
    def example(self, index: int, rng: Any | None) -> tuple[Tensor, Any]:
        """One training example; without `rng` nothing is drawn."""

    @abstractmethod
    def flipped(self, target: Any, width: int) -> Any:
        """The target of the mirrored image."""

    def drawn(self, index: int, epoch: int) -> tuple[Tensor, Any]:
        """The training example of an image in an epoch."""
        rng = generator(self.seed, epoch, index)
        if self.augment == "full":
            return self.example(index, rng)
        return self.prepared(index, self.augment == "flip" and rng.random() < 0.5)

    def prepared(self, index: int, flip: bool) -> tuple[Tensor, Any]:
        """The training example of an image, or of the mirrored image; cached."""
        if (index, flip) not in self._cached:
            x, target = self.example(index, None)
            made = (x.flip(-1).contiguous(), self.flipped(target, x.shape[-1])) if flip else (x, target)
            size = x.numel() * x.element_size()
            if self._cached_bytes + size > CACHED_BYTES:
                return made
            self._cached[index, flip] = made
            self._cached_bytes += size
        return self._cached[index, flip]

    def batches(self, rank: int, world: int) -> Callable[[int], dict[str, Any]]:
        """What a rank's batch of a step is."""

        def batch(step: int) -> dict[str, Any]:
            n, first = len(self.data), (step * world + rank) * self.batch_size
            chosen = shuffled(n, self.batch_size, step, seed=self.seed, rank=rank, world=world)
            examples = [self.drawn(index, (first + i) // n) for i, index in enumerate(chosen)]
            xs, targets = [x for x, _ in examples], [target for _, target in examples]
            if not self.stacked:
                return {"x": xs, "target": targets, "step": step}
            if len({x.shape for x in xs}) > 1:
                raise DinoError("images of several shapes in one batch: pass shape='square'")
            return {"x": torch.stack(xs), "target": torch.stack(targets), "step": step}

        return batch

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Any]) -> LossTerms: ...

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def seen(self, dataset: Any, index: int) -> tuple[Image.Image, Any, Tensor]:
        """(image, target, input [1, 3, h, w]) of an evaluation."""
        image, target = dataset[index]
        return image, target, self.preprocessing(image)[0][None]

    @abstractmethod
    def scores(self, model: nn.Module, dataset: Any, device: torch.device) -> dict[str, float]: ...

    def evaluate(self, model: nn.Module, device: torch.device, most: int = 200) -> dict[str, float]:
        """Of the validation images; where there are none, of (at most 200) training images."""
        return self.scores(model, self.evaluated(most), device)

    def evaluated(self, most: int = 200) -> Any:
        """The data of an evaluation: those to validate with, or the first training images."""
        return self.val if self.val is not None else Selected(self.data, range(min(most, len(self.data))))

    @abstractmethod
    def panels(self, model: nn.Module, dataset: Any, index: int, device: torch.device) -> list[np.ndarray]:
        """[image, truth, prediction] for a drawing, uint8 [h, w, 3]."""


class Selected:
    """Some images of a data set, with their classes renumbered where `numbers` are given: class c becomes numbers[c]."""

    class_names: list[str]  # the data set's own, unless set

    def __init__(self, data: Any, indices: Sequence[int], numbers: Sequence[int] | None = None) -> None:
        self.data, self.indices = data, indices
        self.numbers = None if numbers is None else torch.tensor(numbers)

    def __len__(self) -> int:
        return len(self.indices)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self.data[self.indices[index]]
        if self.numbers is None:
            return image, target
        if isinstance(target, dict):
            return image, target | {"labels": self.numbers[target["labels"]]}
        return image, int(self.numbers[target])

    def label(self, index: int) -> int:
        label = self.data.label(self.indices[index])
        return int(label if self.numbers is None else self.numbers[label])

    def name(self, index: int) -> str:
        return self.data.name(self.indices[index])

    def read(self, index: int) -> bytes:
        return self.data.read(self.indices[index])


# ---- segmentation --------------------------------------------------------------------------------------------------


class Segmentation(Task):
    """Targets: class maps [h, w], 255 where nothing counts."""

    name, score = "segmentation", "mIoU"

    def __init__(self, *given: Any, head: str, criterion: Any = None, colours: Any = (), **options: Any) -> None:
        super().__init__(*given, **options)
        self.kind = "m2f" if head == "mask2former" else "linear"
        self.criterion, self.colours = criterion, np.array(colours, np.uint8)

    def labels(self, target: Any) -> Tensor:
        labels = torch.as_tensor(np.asarray(target)).long()
        return reduce_zero_label(labels) if getattr(self.data, "zero_is_other", False) else labels

    def example(self, index: int, rng: Any | None) -> tuple[Tensor, Tensor]:
        image, target = self.data[index]
        labels = self.labels(target)
        if rng is None:
            x, _ = self.preprocessing(image)
            return x, resized_map(labels, (x.shape[-2], x.shape[-1])).to(torch.uint8 if self._small else torch.int64)
        m = self.preprocessing.multiple
        side = -(-self.preprocessing.size // m) * m
        full = SegmentationTransform(
            img_size=self.preprocessing.size, ratio_range=(0.5, 2.0), crop_hw=(side, side), flip_prob=0.5,
            mean=tuple(255 * v for v in self.preprocessing.mean), std=tuple(255 * v for v in self.preprocessing.std),
        )  # fmt: skip
        return full(image, labels, rng)

    @property
    def _small(self) -> bool:
        return len(self.class_names) <= IGNORED

    def flipped(self, target: Tensor, width: int) -> Tensor:
        return target.flip(-1)

    def loss(self, model: Any, batch: dict[str, Any]) -> LossTerms:
        if self.kind == "linear":
            return segmentation_terms(model(batch["x"]), batch["target"], mean_over="valid")
        return self.criterion(model(batch["x"]), batch["target"].long())

    def classes(self, model: Any, x: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """The class of every pixel [h, w]."""
        return class_maps(model.predict(x, rescale_to=size_hw), self.kind)[0].argmax(0).cpu()

    def scores(self, model: nn.Module, dataset: Any, device: torch.device) -> dict[str, float]:
        K = len(self.class_names)
        total = torch.zeros(K, K, dtype=torch.int64)
        for index in range(len(dataset)):
            _, target, x = self.seen(dataset, index)
            labels = self.labels(target)
            total += confusion_matrix(self.classes(model, x.to(device), tuple(labels.shape)), labels, K)  # type: ignore[arg-type]
        scores = iou_scores(total)
        each = {f"IoU/{name}": value for name, value in zip(self.class_names, scores["IoU_per_class"])}
        return {name: scores[name] for name in ("mIoU", "aAcc", "mAcc")} | each

    def panels(self, model: nn.Module, dataset: Any, index: int, device: torch.device) -> list[np.ndarray]:
        image, target, x = self.seen(dataset, index)
        labels = self.labels(target)
        found = self.classes(model, x.to(device), tuple(labels.shape))  # type: ignore[arg-type]
        return [np.asarray(image), self.painted(labels.numpy()), self.painted(found.numpy())]

    def painted(self, classes: np.ndarray) -> np.ndarray:
        colours = np.concatenate([self.colours, np.zeros((1, 3), np.uint8)])  # what is ignored is black
        return colours[np.where(classes < len(self.colours), classes, len(self.colours))]


# ---- depth ---------------------------------------------------------------------------------------------------------


class Depth(Task):
    """Targets: metres [h, w], 0 where unknown."""

    name, score, score_is = "depth", "rmse", "lowest"

    def __init__(
        self, *given: Any, min_depth: float, max_depth: float, losses: dict[str, float], warm_up: int, **options: Any
    ) -> None:
        super().__init__(*given, **options)
        self.range = (min_depth, max_depth)
        self.criterion = DepthLoss(losses, min_depth=min_depth, max_depth=max_depth, warm_up=warm_up)

    def example(self, index: int, rng: Any | None) -> tuple[Tensor, Tensor]:
        image, target = self.data[index]
        if rng is None:
            x, _ = self.preprocessing(image)
            return x, resized_map(torch.as_tensor(target), (x.shape[-2], x.shape[-1]))[None]
        # a crop of 7/8 of the image, in whole patches: the same for all, as the images are
        h, w = (
            max(self.preprocessing.multiple, s * 7 // 8 // self.preprocessing.multiple * self.preprocessing.multiple)
            for s in self._input_hw()
        )
        full = DepthTransform(
            img_size=min(self._input_hw()),
            random_crop=(h, w),
            rotation_angle=2.5,
            mean=self.preprocessing.mean,
            std=self.preprocessing.std,
        )
        x, depth = full(image, target, rng)
        return x, depth[None]

    def _input_hw(self) -> tuple[int, int]:
        if not hasattr(self, "_hw"):
            image, _ = self.data[0]
            self._hw = self.preprocessing.plan(image.width, image.height).input_hw
        return self._hw

    def flipped(self, target: Tensor, width: int) -> Tensor:
        return target.flip(-1)

    def loss(self, model: Any, batch: dict[str, Any]) -> LossTerms:
        prediction = model.encoder.to_image(model(batch["x"]), tuple(batch["x"].shape[-2:]))
        return self.criterion(prediction, batch["target"], step=batch["step"])

    def metres(self, model: Any, x: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """[h, w]"""
        depth = model.in_image(x).float()
        return resized(depth, size_hw)[0, 0].cpu()

    def scores(self, model: nn.Module, dataset: Any, device: torch.device) -> dict[str, float]:
        rows = []
        for index in range(len(dataset)):
            _, target, x = self.seen(dataset, index)
            rows.append(depth_scores(self.metres(model, x.to(device), target.shape), target, *self.range))
        means = mean_scores(rows)
        return {name: means[name] for name in ("rmse", "abs_rel", "a1", "a2", "a3", "silog")}

    def panels(self, model: nn.Module, dataset: Any, index: int, device: torch.device) -> list[np.ndarray]:
        image, target, x = self.seen(dataset, index)
        found = self.metres(model, x.to(device), target.shape).numpy()
        known = target[(target > self.range[0]) & (target < self.range[1])]
        far = float(np.percentile(known, 98)) if known.size else self.range[1]
        return [np.asarray(image), coloured_depth(target, far), coloured_depth(found, far)]


def coloured_depth(metres: np.ndarray, far: float) -> np.ndarray:
    """Near is dark, `far` and beyond is bright, unknown is grey."""
    return drawing.ramp(np.where(metres > 0, metres / max(far, 1e-6), np.nan))


# ---- classes -------------------------------------------------------------------------------------------------------


class Classification(Task):
    """Targets: the number of the class."""

    name, score = "classification", "accuracy"

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.pooled: dict[bool, Tensor] = {}  # mirrored → [N, 2D] of the training images
        self.pooled_val: Tensor | None = None

    def pool(
        self, model: Any, *, most_bytes: int, workers: int = 0, log: Callable[[str], None] = lambda text: None
    ) -> bool:
        """Computes the classifier's input of every image once, so that a step is one matrix product of a few rows.

        False, and nothing is computed, where images are augmented at random or the features exceed `most_bytes`.
        """
        flips = [False, True] if self.augment == "flip" else [False]
        count = len(flips) * len(self.data) + len(self.val if self.val is not None else ())
        weight = model.linear_head.weight
        if self.augment == "full" or count * weight.shape[1] * weight.element_size() > most_bytes:
            return False

        def rows(dataset: Any, what: str, flips: Sequence[bool]) -> list[Tensor]:
            share = range(distributed.rank(), len(dataset), distributed.world())
            batches = batched(share, self.preprocessing, 32, workers=workers, read=lambda i: dataset[i][0])
            parts: list[list[Tensor]] = [[] for _ in flips]
            due = time.monotonic() + 5
            for x, _ in batches:
                for part, flip in zip(parts, flips):
                    part.append(model.pooled((x.flip(-1) if flip else x).to(weight.device)).cpu())
                if time.monotonic() > due:
                    log(f"features of {what} images: {sum(map(len, parts[0]))} of {len(share)}")
                    due = time.monotonic() + 5
            gathered = (distributed.gather_shares([row for rows in part for row in rows]) for part in parts)
            return [torch.stack(part) for part in gathered]

        with evaluating(model):
            self.pooled = dict(zip(flips, rows(self.data, "training", flips)))
            self.pooled_val = rows(self.val, "validation", [False])[0] if self.val is not None else self.pooled[False]
        return True

    def prepared(self, index: int, flip: bool) -> tuple[Tensor, Any]:
        if not self.pooled:
            return super().prepared(index, flip)
        return self.pooled[flip][index], torch.tensor(self.data.label(index))

    def example(self, index: int, rng: Any | None) -> tuple[Tensor, Tensor]:
        image, label = self.data[index]
        if rng is None:
            return self.preprocessing(image)[0], torch.tensor(label)
        top, left, h, w = draw_box(image.width, image.height, (0.35, 1.0), rng)
        pixels = to_pixels(image.crop((left, top, left + w, top + h)))
        pixels = photometric(pixels.flip(-1) if rng.random() < 0.5 else pixels, rng)
        side = self.preprocessing.center_crop or self.preprocessing.size
        x, _ = replace(self.preprocessing, shape="square", size=side, center_crop=None)(pixels)
        return x, torch.tensor(label)

    def flipped(self, target: Tensor, width: int) -> Tensor:
        return target

    def loss(self, model: Any, batch: dict[str, Any]) -> LossTerms:
        terms = LossTerms()
        logits = model.linear_head(batch["x"]) if self.pooled else model(batch["x"])
        terms.add("ce_loss", 1.0, F.cross_entropy(logits.float(), batch["target"]))
        return terms

    def predictions(self, model: Any, dataset: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """(logits [N, K], labels [N]) of the images of an evaluation."""
        labels = torch.tensor([dataset.label(i) for i in range(len(dataset))])
        if self.pooled_val is not None:
            return model.linear_head(self.pooled_val[: len(dataset)].to(device)).float().cpu(), labels
        logits = [model(self.seen(dataset, i)[2].to(device))[0].float().cpu() for i in range(len(dataset))]
        return torch.stack(logits), labels

    def scores(self, model: nn.Module, dataset: Any, device: torch.device) -> dict[str, float]:
        tops = {"accuracy": 1} | ({"top5": 5} if len(self.class_names) > 5 else {})
        logits, labels = self.predictions(model, dataset, device)
        return {name: accuracy(logits, labels, k) for name, k in tops.items()}

    def panels(self, model: nn.Module, dataset: Any, index: int, device: torch.device) -> list[np.ndarray]:
        image, label, x = self.seen(dataset, index)
        shares = model(x.to(device))[0].float().softmax(0)
        best = int(shares.argmax())
        ink = drawing.INK if best == label else (190, 30, 45)
        return [
            np.asarray(image),
            np.asarray(drawing.card(self.class_names[label])),
            np.asarray(drawing.card(f"{self.class_names[best]}\n{float(shares[best]):.0%}", ink=ink)),
        ]


# ---- boxes ---------------------------------------------------------------------------------------------------------


class Detection(Task):
    """Targets: dicts of boxes_xyxy_px [T, 4] in pixels of the input, and labels [T]. Images may differ in shape."""

    name, score, stacked = "detection", "AP", False

    def __init__(self, *given: Any, criterion: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.criterion = criterion
        box = {"boxes_xyxy_px": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([0])}
        # a missing library is an error before hours pass
        box_average_precision([box | {"scores": torch.ones(1)}], [box], ["any"])

    def example(self, index: int, rng: Any | None) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = self.data[index]
        preprocessing, boxes, labels = self.preprocessing, target["boxes_xyxy_px"], target["labels"]
        keep = ~target["crowd"]
        boxes, labels = boxes[keep], labels[keep]
        if rng is not None:
            preprocessing = replace(
                preprocessing, size=round(preprocessing.size * (0.6 + 0.4 * rng.random()) / 16) * 16
            )
            if rng.random() < 0.5:
                image, boxes, labels = cropped(image, boxes, labels, rng)
        x, geometry = preprocessing(image)
        scale = torch.tensor([geometry.scale_x, geometry.scale_y] * 2)
        made = {"boxes_xyxy_px": boxes * scale, "labels": labels}
        if rng is not None and rng.random() < 0.5:
            return x.flip(-1).contiguous(), self.flipped(made, x.shape[-1])
        return x, made

    def flipped(self, target: dict[str, Tensor], width: int) -> dict[str, Tensor]:
        return flipped(target, width)

    def loss(self, model: Any, batch: dict[str, Any]) -> LossTerms:
        return self.criterion(model.detector(batch["x"]), batch["target"])

    def found(self, model: Any, image: Image.Image, x: Tensor) -> dict[str, Tensor]:
        result = model([x[0]], [(image.height, image.width)])[0]
        named = {"boxes": "boxes_xyxy_px"}
        return {named.get(name, name): value.cpu() for name, value in result.items()}

    def scores(self, model: nn.Module, dataset: Any, device: torch.device) -> dict[str, float]:
        predictions, targets = [], []
        for index in range(len(dataset)):
            image, target, x = self.seen(dataset, index)
            predictions.append(self.found(model, image, x.to(device)))
            targets.append(target)
        numbers, rows = box_average_precision(predictions, targets, self.class_names)
        chosen = {name: numbers[name] for name in ("AP", "AP50", "AP75")} | {f"AP/{r['class']}": r["AP"] for r in rows}
        return {name: float("nan") if value is None else value for name, value in chosen.items()}

    def panels(self, model: nn.Module, dataset: Any, index: int, device: torch.device) -> list[np.ndarray]:
        image, target, x = self.seen(dataset, index)
        found = self.found(model, image, x.to(device))
        sure = found["scores"] >= 0.3
        labels, scores = found["labels"][sure].tolist(), found["scores"][sure].tolist()
        return [
            np.asarray(image),
            framed(image, target["boxes_xyxy_px"], [self.class_names[i] for i in target["labels"].tolist()]),
            framed(
                image, found["boxes_xyxy_px"][sure], [f"{self.class_names[i]} {s:.2f}" for i, s in zip(labels, scores)]
            ),
        ]


def framed(image: Image.Image, boxes: Tensor, labels: Sequence[str]) -> np.ndarray:
    return np.asarray(drawing.boxes_over(image, boxes.numpy(), labels, np.full((len(boxes), 3), (255, 64, 64))))


def cropped(image: Image.Image, boxes: Tensor, labels: Tensor, rng: Any) -> tuple[Image.Image, Tensor, Tensor]:
    """60 to 100 % of the image's area, and the boxes of which at least a quarter is left."""
    share = (0.6 + 0.4 * rng.random()) ** 0.5
    w, h = round(image.width * share), round(image.height * share)
    left, top = int(rng.random() * (image.width - w + 1)), int(rng.random() * (image.height - h + 1))
    moved = boxes - torch.tensor([left, top, left, top])
    inside = torch.stack([moved[:, 0::2].clamp(0, w), moved[:, 1::2].clamp(0, h)], -1).flatten(1)
    before = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    keep = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1]) >= 0.25 * before
    return image.crop((left, top, left + w, top + h)), inside[keep], labels[keep]
