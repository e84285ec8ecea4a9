"""What watches a training run: k-NN accuracy of its features. (Whether it learns: `train.doctor`.)"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov3 import distributed
from dinov3.config.train import EvaluationConfig, TrainConfig
from dinov3.data.datasets import make_dataset
from dinov3.data.datasets.base import ImageDataset
from dinov3.data.images import DecodedImage, open_image
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.distributed import Group
from dinov3.errors import DinoError, ImageError
from dinov3.features import Features, batched, extract
from dinov3.neighbours import knn_accuracy
from dinov3.parallel import precision

# ---- k-NN accuracy ---------------------------------------------------------------------------------------------------
# k-NN accuracy of the features during training (DINO's protocol; paper §6, App. D).
#
# A small plain check on the current EMA teacher. The full evaluation, with its protocol and its options, is another
# activity. Every process takes its share of the images; the result is the same on all. Images are decoded by threads: a
# process that may be writing a checkpoint in another thread is not forked. An image that cannot be read is left out and
# named.


@lru_cache(maxsize=4)
def labelled_images(source: str, most: int | None) -> tuple[ImageDataset, list[int]]:
    """A data set, listed once in a run, and the numbers of at most so many of its labelled images."""
    data = make_dataset(source)
    labelled = [i for i in range(len(data)) if data.label(i) is not None]
    if not labelled:
        raise DinoError(f"{source} has no labels, and k-NN needs them: one sub-folder for each class")
    if most is not None and len(labelled) > most:
        step = len(labelled) / most  # spread over the classes, which lie in order
        labelled = [labelled[math.floor(i * step)] for i in range(most)]
    return data, labelled


def run_on_images(
    backbone: nn.Module,
    data: ImageDataset,
    chosen: Sequence[int],
    config: TrainConfig,
    device: torch.device,
    use: Callable[[list[int], Features], None],
    group: Group = None,
) -> dict[int, str]:
    """`use(places in chosen, features)` for each batch of this process's share of the images; what it could not read (a
    grey image instead), place → "name: reason". Places from `len(chosen)` on are of images taken twice."""
    e: EvaluationConfig = config.evaluation
    # sharded weights are gathered by all ranks together, so all of them run equally many batches
    rank, world = distributed.rank(group), distributed.world(group)
    places = [rank + i * world for i in range(-(-len(chosen) // world))]
    preprocessing = watching(backbone, config)
    unreadable: dict[int, str] = {}

    def read(place: int) -> DecodedImage:
        i = chosen[min(place, len(chosen) - 1)]
        try:
            return open_image(data.read(i), target_short_side=preprocessing.target_short_side)
        except ImageError as error:
            unreadable[place] = f"{data.name(i)}: {error}"
            grey = Image.new("RGB", (e.knn_image_size, e.knn_image_size))  # all ranks run equally many batches
            return DecodedImage(grey, *grey.size)

    done, workers = 0, max(1, config.train.num_workers)
    batches = batched(places, preprocessing, e.knn_batch_size, workers=workers, read=read)
    with precision(device, config.compute_precision.param_dtype):
        for features in extract(backbone, batches, preprocessing=preprocessing):
            use(places[done : done + len(features.cls)], features)
            done += len(features.cls)
    return unreadable


def watching(backbone: nn.Module, config: TrainConfig) -> Preprocessing:
    """What images that watch a run become: squares of `evaluation.knn_image_size`, with the training's statistics."""
    stride: Any = backbone.stride
    mean, std = ((x[0], x[1], x[2]) for x in (config.crops.rgb_mean, config.crops.rgb_std))
    return Preprocessing(size=config.evaluation.knn_image_size, multiple=stride, mean=mean, std=std)


def features_of(
    backbone: nn.Module, source: str, config: TrainConfig, device: torch.device, group: Group = None
) -> tuple[Tensor, Tensor, list[str]]:
    """CLS tokens [N, D] and labels [N] of a labelled data set; what this process could not read, "name: reason"."""
    data, labelled = labelled_images(source, config.evaluation.knn_max_images)
    parts: list[Tensor] = []
    places: list[int] = []

    def use(numbers: list[int], features: Features) -> None:
        parts.append(features.cls)
        places.extend(numbers)

    unreadable = run_on_images(backbone, data, labelled, config, device, use, group)
    labels = torch.tensor([int(data.label(labelled[min(p, len(labelled) - 1)]) or 0) for p in places], device=device)
    number = torch.tensor([len(labelled) if p in unreadable else p for p in places], device=device)
    cls, labels, number = (distributed.all_gather(x.clone(), group) for x in (torch.cat(parts), labels, number))
    real = (number < len(labelled)).nonzero().flatten()
    return cls[real], labels[real], list(unreadable.values())


def fixed_images(
    backbone: nn.Module,
    data: ImageDataset,
    n: int,
    mapped: int,
    config: TrainConfig,
    device: torch.device,
    group: Group = None,
) -> tuple[Tensor, Tensor]:
    """Of n images spread over a data set, always the same: CLS tokens [n, D], and the cosines between the patches of each
    of the first `mapped`, [mapped, P, P]; on the CPU, in the order of the images."""
    chosen = [i * len(data) // n for i in range(n)]
    found: dict[int, tuple[Tensor, Tensor | None]] = {}

    def use(numbers: list[int], features: Features) -> None:
        for place, cls, patches in zip(numbers, features.cls.float().cpu(), features.patches):
            unit = F.normalize(patches.flatten(0, 1).float(), dim=-1) if place < mapped else None  # [P, D]
            found[place] = cls, None if unit is None else (unit @ unit.T).cpu()

    run_on_images(backbone, data, chosen, config, device, use, group)
    every = {place: x for ranks in distributed.gather_objects(found, group) for place, x in ranks.items()}
    cosines = [every[i][1] for i in range(mapped)]
    return torch.stack([every[i][0] for i in range(n)]), torch.stack([c for c in cosines if c is not None])


def knn(backbone: nn.Module, config: TrainConfig, device: torch.device, group: Group = None) -> tuple[float, list[str]]:
    """Top-1 accuracy on `evaluation.knn_val_dataset` with the neighbours of `evaluation.knn_train_dataset`; what could not be
    read, on any process."""
    e = config.evaluation
    assert e.knn_train_dataset is not None
    assert e.knn_val_dataset is not None
    train, train_labels, bad = features_of(backbone, e.knn_train_dataset, config, device, group)
    test, test_labels, also_bad = features_of(backbone, e.knn_val_dataset, config, device, group)
    if not len(train) or not len(test):
        raise DinoError(f"no image for k-NN can be read; the first: {(bad or also_bad)[0]}")
    accuracy = knn_accuracy(train, train_labels, test, test_labels, k=e.knn_k, temperature=e.knn_temperature)
    return accuracy, sorted({line for lines in distributed.gather_objects(bad + also_bad, group) for line in lines})
