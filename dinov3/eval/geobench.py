"""GEO-Bench: classes and class maps of satellite and aerial images on a frozen backbone (paper §8, Tab. 18).

Classification: a linear layer on features, SGD with momentum, 2,400 steps of 32, cosine; the learning rate between 1e-5
and 1 that is best on the validation images. Segmentation: a DPT decoder, the learning rate of {3e-5, 1e-4, 3e-4, 1e-3}
that is best there. Red, green and blue only. Metrics: accuracy; micro F1 for BigEarthNet's several labels; mean of the
classes' IoU for maps, over all pixels of the test images.

The paper gives neither size nor augmentation nor what happens to the bands' values, nor the decoder's steps: here 16
patches a side for classes and 32 for maps, flips, bands standardised with the benchmark's own statistics, 2,400 steps.

Legend: N images, D width, K classes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.config.bounds import Problem, setting
from dinov3.data.datasets.geo import GeoBench
from dinov3.errors import DinoError
from dinov3.eval import session as common
from dinov3.eval.arguments import EvalConfig
from dinov3.eval.features import columns_of
from dinov3.eval.session import Session
from dinov3.features import default_preprocessing, outputs
from dinov3.fit import FitConfig, fit, shuffled
from dinov3.heads.dpt import DPTHead
from dinov3.heads.encoder import FrozenLayers, resized, step_of
from dinov3.losses import LossTerms
from dinov3.metrics import IGNORED, accuracy, confusion_matrix, iou_scores, multilabel_f1


@dataclass
class GeoConfig(EvalConfig):
    POSITIONAL = (("FOLDER", "root"),)

    root: str = setting("", required="root=FOLDER, with classification_v1.0 and segmentation_v1.0 or a task's folder")
    task: str = "m-eurosat"
    partition: str = "default"  # or 0.10x_train, … for a share of the training images
    patches: int | None = None  # per side; null: 16 for classes, 32 for maps
    scaling: Literal["band_stats", "eight_bit"] = "band_stats"
    pool: Literal["cls", "mean", "cls+mean"] = "cls"
    steps: int = setting(2400, at_least=1)
    batch_size: int = setting(32, at_least=1)
    flips: bool = True
    class_lrs: list[float] = setting(
        [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0], required="at least one value"
    )
    map_lrs: list[float] = setting([3e-5, 1e-4, 3e-4, 1e-3], required="at least one value")
    dpt_channels: int = 256
    dpt_levels: list[int] = field(default_factory=lambda: [128, 256, 512, 1024])
    weight_decay: float = 1e-4  # of the decoder's AdamW
    # classes of maps that do not count (the paper has 6 of cashew's 7)
    dropped: list[int] = field(default_factory=list)
    seed: int = 0

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if len(self.dpt_levels) != 4:
            yield "dpt_levels", "are four widths"


# ---- a linear layer for every learning rate -------------------------------------------------------------------------


def linear_probes(
    x: Tensor, labels: Tensor, n_classes: int, lrs: Sequence[float], *, steps: int, batch_size: int, seed: int = 0
) -> list[nn.Linear]:
    """Linear layers trained by SGD (momentum 0.9, cosine to zero) on features, one per learning rate.

    x [N, V, D]: V views of every image, of which each step draws one. labels [N], or [N, K] for several an image.
    """
    N, V, D = x.shape
    weight = torch.zeros(len(lrs), n_classes, D, device=x.device, requires_grad=True)
    bias = torch.zeros(len(lrs), n_classes, device=x.device, requires_grad=True)
    learning_rates = torch.tensor(list(lrs), device=x.device)
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    rng = np.random.default_rng(seed)
    for step in range(steps):
        rows = torch.tensor(shuffled(N, min(batch_size, N), step, seed=seed), device=x.device)
        view = torch.from_numpy(rng.integers(0, V, len(rows))).to(x.device)
        logits = torch.einsum("bd,lkd->lbk", x[rows, view], weight) + bias[:, None]
        target = labels[rows]
        with torch.enable_grad():
            if target.ndim == 1:
                each = F.cross_entropy(logits.transpose(1, 2), target.expand(len(lrs), -1), reduction="none").mean(1)
            else:
                goal = target.to(logits.dtype).expand(len(lrs), -1, -1)
                each = F.binary_cross_entropy_with_logits(logits, goal, reduction="none").mean((1, 2))
            grads = torch.autograd.grad(each.sum(), [weight, bias])  # the layers do not meet: each has its own gradient
        factor = 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for p, momentum, grad in zip((weight, bias), momenta, grads):
                momentum.mul_(0.9).add_(grad)
                p -= (learning_rates * factor).view(-1, *[1] * (p.ndim - 1)) * momentum
    layers = []
    for w, b in zip(weight.detach(), bias.detach()):
        layer = nn.Linear(D, n_classes, device=x.device)
        with torch.no_grad():
            layer.weight.copy_(w)
            layer.bias.copy_(b)
        layers.append(layer)
    return layers


# ---- images -------------------------------------------------------------------------------------------------------


class _Inputs:
    """Bands to network inputs [3, side, side] and maps at that size or their own."""

    def __init__(self, model: Any, data: GeoBench, config: GeoConfig) -> None:
        patches = config.patches or (32 if data.task.kind == "map" else 16)
        self.side = patches * step_of(model)
        if config.scaling == "band_stats":
            mean, std = data.band_stats()
        else:
            preprocessing = default_preprocessing(model)
            mean, std = 255 * np.array(preprocessing.mean, np.float32), 255 * np.array(preprocessing.std, np.float32)
        self.mean = torch.from_numpy(mean).view(3, 1, 1)
        self.std = torch.from_numpy(std).clamp_min(1e-6).view(3, 1, 1)

    def __call__(self, bands: np.ndarray) -> Tensor:
        x = (torch.from_numpy(bands) - self.mean) / self.std
        return F.interpolate(x[None], (self.side, self.side), mode="bicubic", antialias=True)[0]


def _features(
    model: nn.Module, data: GeoBench, inputs: _Inputs, config: GeoConfig, *, flips: bool
) -> tuple[Tensor, Tensor]:
    """(features [N, V, D], labels) of the data set; each process computes a share, the result is the same on all."""
    rows, labels = [], []
    for i in distributed.share(range(len(data))):
        bands, label = data[i]
        x = inputs(bands)[None]
        ((out,),) = outputs(model, [torch.cat([x, x.flip(-1)]) if flips else x])
        rows.append(torch.cat([c.of(out) for c in columns_of([-1], config.pool)], -1).float().clone())
        labels.append(torch.as_tensor(label))
    x, y = torch.stack(rows), torch.stack(labels).to(rows[0].device)
    return distributed.all_gather(x), distributed.all_gather(y)


def classification(
    config: GeoConfig, session: Session, model: nn.Module, splits: Mapping[str, GeoBench]
) -> dict[str, Any]:
    task = splits["train"].task
    inputs = _Inputs(model, splits["train"], config)
    x, y = {}, {}
    for name, data in splits.items():
        x[name], y[name] = _features(model, data, inputs, config, flips=config.flips and name == "train")
        session.log(f"{name}: features of {len(data)} images")
    layers = linear_probes(
        x["train"], y["train"], task.n_classes, config.class_lrs, steps=config.steps, batch_size=config.batch_size,
        seed=config.seed,
    )  # fmt: skip

    def measure(scores: Tensor, labels: Tensor) -> float:
        several = task.kind == "labels"
        return 100 * (multilabel_f1(scores, labels, macro=False, threshold=0) if several else accuracy(scores, labels))

    with torch.no_grad():
        valid = [measure(layer(x["valid"][:, 0]), y["valid"]) for layer in layers]
        best = int(np.argmax(valid))
        score = measure(layers[best](x["test"][:, 0]), y["test"])
    name = "micro F1" if task.kind == "labels" else "accuracy"
    return {name: score, f"validation {name}": valid[best], "lr": config.class_lrs[best]}


class MapModel(nn.Module):
    """A frozen backbone's four layers and a DPT decoder: inputs [B, 3, h, w] → logits [B, K, h, w]."""

    def __init__(self, encoder: FrozenLayers, head: DPTHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> Tensor:
        return resized(self.head(self.encoder(x)), (x.shape[-2], x.shape[-1]))


def map_batches(data: GeoBench, inputs: _Inputs, config: GeoConfig, dropped: Sequence[int]) -> Callable[[int], Any]:
    """step → {"x" [B, 3, h, w], "target" [B, h, w]}, flipped both ways by draws of (seed, step)."""
    rank, world = distributed.rank(), distributed.world()
    size = max(1, config.batch_size // world)

    def batch(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((config.seed, step, rank))
        xs, targets = [], []
        for i in shuffled(len(data), size, step, seed=config.seed, rank=rank, world=world):
            bands, target = data[i]
            x, t = inputs(bands), torch.from_numpy(_without(target, dropped))
            t = F.interpolate(t[None, None].float(), x.shape[-2:], mode="nearest-exact")[0, 0].long()
            for axis in (-1, -2):
                if config.flips and rng.random() < 0.5:
                    x, t = x.flip(axis), t.flip(axis)
            xs.append(x)
            targets.append(t)
        return {"x": torch.stack(xs), "target": torch.stack(targets)}

    return batch


def _without(target: np.ndarray, dropped: Sequence[int]) -> np.ndarray:
    return np.where(np.isin(target, list(dropped)), IGNORED, target)


def map_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> LossTerms:
    terms = LossTerms()
    terms.add("ce", 1.0, F.cross_entropy(model(batch["x"]).float(), batch["target"], ignore_index=IGNORED))
    return terms


@torch.no_grad()
def map_confusion(
    model: nn.Module, data: GeoBench, inputs: _Inputs, dropped: Sequence[int], device: torch.device
) -> Tensor:
    """Counts [K, K] over all pixels of the images, at the images' own size."""
    K = data.task.n_classes
    total = torch.zeros(K, K, dtype=torch.long)
    for i in distributed.share(range(len(data))):
        bands, target = data[i]
        logits = resized(model(inputs(bands)[None].to(device)).float(), target.shape)
        logits[:, list(dropped)] = -math.inf
        total += confusion_matrix(logits[0].argmax(0).cpu(), torch.from_numpy(_without(target, dropped)), K)
    return distributed.all_reduce(total.to(device)).cpu()


def segmentation(config: GeoConfig, session: Session, model: Any, splits: Mapping[str, GeoBench]) -> dict[str, Any]:
    task = splits["train"].task
    if wrong := [c for c in config.dropped if not 0 <= c < task.n_classes]:
        raise DinoError(f"dropped={wrong[0]} is no class of {config.task}, which has {task.n_classes}, from 0")
    inputs = _Inputs(model, splits["train"], config)
    encoder = FrozenLayers(model, "FOUR_EVEN_INTERVALS")
    found: list[tuple[float, float, nn.Module]] = []
    for lr in config.map_lrs:
        torch.manual_seed(config.seed)
        head = DPTHead(
            encoder.widths, channels=config.dpt_channels, post_process_channels=config.dpt_levels,
            n_output_channels=task.n_classes, n_hidden_channels=max(32, task.n_classes),
        )  # fmt: skip
        one = MapModel(encoder, head.to(session.device))
        options = FitConfig(
            steps=config.steps,
            lr=lr,
            weight_decay=config.weight_decay,
            batch=config.batch_size,
            seed=config.seed,
            clip=1.0,
        )
        run = session.at(session.output / f"lr={lr:g}").run
        fit(one, map_batches(splits["train"], inputs, config, config.dropped), map_loss, options, run)
        valid = 100 * iou_scores(map_confusion(one, splits["valid"], inputs, config.dropped, session.device))["mIoU"]
        session.log(f"lr {lr:g}: validation mIoU {valid:.1f}")
        found.append((valid, lr, one))
    valid, lr, best = max(found, key=lambda row: row[0])
    confusion = map_confusion(best, splits["test"], inputs, config.dropped, session.device)
    scores = iou_scores(confusion)
    per_class = scores["IoU_per_class"]
    results: dict[str, Any] = {"mIoU": 100 * scores["mIoU"], "validation mIoU": valid, "lr": lr}
    return results | {f"IoU {i}": 100 * v for i, v in enumerate(per_class) if not math.isnan(v)}


def evaluate(config: GeoConfig, session: Session) -> dict[str, Any]:
    splits = {s: GeoBench(config.root, config.task, s, partition=config.partition) for s in ("train", "valid", "test")}
    model = session.model(config.model)
    evaluated = segmentation if splits["train"].task.kind == "map" else classification
    return evaluated(config, session, model, splits)


def main(argv: Sequence[str] | None = None) -> int:
    return common.main("geobench", GeoConfig, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
