"""Numbers of models that know images and words: retrieval both ways, classes by their names (paper Tab. 16).

Pure functions of features, and the few lines that compute the features. Legend: N images, M captions, C classes,
E shared width; all features are rows of length one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dinov3.data.datasets.base import ImageDataset
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.errors import DinoError
from dinov3.eval.features import decoded
from dinov3.features import batched, check_patches, evaluating
from dinov3.heads.dinotxt.model import DinoTxt
from dinov3.metrics.classification import accuracy

# ---- features -------------------------------------------------------------------------------------------------------


def text_preprocessing(model: Any, size: int) -> Preprocessing:
    """As dino.txt is measured: the short side to `size`, bicubic, and a square of it from the middle."""
    origin = model.origin
    multiple = model.visual_model.backbone.stride
    check_patches("size", size, multiple)
    return Preprocessing.named(
        "classification", size=size, center_crop=size, multiple=multiple, mean=origin.mean, std=origin.std
    )


def image_features(
    model: DinoTxt, data: ImageDataset, rows: Sequence[int], *, size: int, batch_size: int = 32, workers: int = 4
) -> Tensor:
    """[N, E] of some of a data set's images, on the CPU in float32. The model's mode is restored."""
    weight = next(model.text_model.parameters())
    preprocessing = text_preprocessing(model, size)
    read = partial(decoded, data, target_short_side=preprocessing.target_short_side)
    batches = batched(rows, preprocessing, batch_size, workers=workers, read=read)
    with evaluating(model):
        parts = [
            model.encode_image(x.to(weight.device, weight.dtype), normalize=True).float().cpu() for x, _ in batches
        ]
    return torch.cat(parts)


# ---- numbers --------------------------------------------------------------------------------------------------------


def retrieval(images: Tensor, texts: Tensor, image_of: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall in percent: `text_to_image_R@k`, `image_to_text_R@k`.

    images [N, E] · texts [M, E] · image_of [M]: which image a caption belongs to. A caption is found when its
    image is among the k most similar; an image when any of its captions is. Every image needs a caption.
    """
    N, M = len(images), len(texts)
    if len(image_of) != M or set(image_of.tolist()) != set(range(N)):
        raise DinoError(f"retrieval needs a caption for each of {N} images, and an image for each of {M} captions")
    hits_text = torch.cat([(top == own[:, None]).cumsum(1) for top, own in _nearest(texts, images, max(ks), image_of)])
    found = [
        (image_of[top] == own[:, None]).cumsum(1) for top, own in _nearest(images, texts, max(ks), torch.arange(N))
    ]
    hits_image = torch.cat(found)

    def share(hits: Tensor, k: int) -> float:
        return 100 * float((hits[:, min(k, hits.shape[1]) - 1] > 0).double().mean())

    return {f"text_to_image_R@{k}": share(hits_text, k) for k in ks} | {
        f"image_to_text_R@{k}": share(hits_image, k) for k in ks
    }


def _nearest(queries: Tensor, rows: Tensor, k: int, own: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices [n, k] of the most similar rows, own [n]) for chunks of the queries."""
    for some, mine in zip(queries.split(1024), own.split(1024)):
        yield (some @ rows.T).topk(min(k, len(rows)), dim=1).indices, mine


def classification(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """`top-1` and `top-5` in percent of logits [N, C] and labels [N]."""
    return {f"top-{k}": 100 * accuracy(logits, labels, k) for k in (1, 5)}
