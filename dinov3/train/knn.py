"""k-NN accuracy of the features during training (DINO's protocol; paper §6, App. D).

A small plain check on the current EMA teacher. The full evaluation, with its protocol and its options, is another
activity. Every process takes its share of the images; the result is the same on all. Images are decoded by threads: a
process that may be writing a checkpoint in another thread is not forked. An image that cannot be read is left out and named.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
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
from dinov3.features import batched, extract
from dinov3.neighbours import knn_accuracy
from dinov3.parallel import precision


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


def features_of(
    backbone: nn.Module, source: str, config: TrainConfig, device: torch.device, group: Group = None
) -> tuple[Tensor, Tensor, list[str]]:
    """CLS tokens [N, D] and labels [N] of a labelled data set; what this process could not read, "name: reason"."""
    e: EvaluationConfig = config.evaluation
    data, labelled = labelled_images(source, e.knn_max_images)
    # sharded weights are gathered by all ranks together, so all of them run equally many batches
    rank, world = distributed.rank(group), distributed.world(group)
    each = -(-len(labelled) // world)
    share = [labelled[min(rank + i * world, len(labelled) - 1)] for i in range(each)]
    stride: Any = backbone.stride
    mean, std = config.crops.rgb_mean, config.crops.rgb_std
    preprocessing = Preprocessing(
        size=e.knn_image_size, multiple=stride, mean=(mean[0], mean[1], mean[2]), std=(std[0], std[1], std[2])
    )
    unreadable: dict[int, str] = {}

    def read(i: int) -> DecodedImage:
        try:
            return open_image(data.read(i), target_short_side=preprocessing.target_short_side)
        except ImageError as error:
            unreadable[i] = f"{data.name(i)}: {error}"
            grey = Image.new("RGB", (e.knn_image_size, e.knn_image_size))  # all ranks run equally many batches
            return DecodedImage(grey, *grey.size)

    workers = max(1, config.train.num_workers)
    batches = batched(share, preprocessing, e.knn_batch_size, workers=workers, read=read)
    with precision(device, config.compute_precision.param_dtype):
        cls = torch.cat([f.cls for f in extract(backbone, batches, preprocessing=preprocessing)])
    labels = torch.tensor([int(data.label(i) or 0) for i in share], device=device)
    places = [len(labelled) if i in unreadable else rank + n * world for n, i in enumerate(share)]
    number = torch.tensor(places, device=device)
    cls, labels, number = (distributed.all_gather(x.clone(), group) for x in (cls, labels, number))
    real = (number < len(labelled)).nonzero().flatten()
    return cls[real], labels[real], list(unreadable.values())


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
