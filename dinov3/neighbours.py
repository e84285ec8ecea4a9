"""Exact k nearest neighbours by cosine, in chunks, and the vote of their labels (DINO's protocol: Caron et al. 2021, §F).

The bank may be larger than memory (a memory-mapped array, float16): it is read once, a chunk at a time, and only the
best K of every query are kept. Several processes each search a part of it and join their best. The result does not
depend on the size of the chunks or the number of parts.

Legend: Q queries, N rows of the bank, D width, K kept neighbours, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3 import distributed
from dinov3.distributed import Group
from dinov3.errors import DinoError
from dinov3.metrics import accuracy

Rows = Tensor | np.ndarray
CHUNK, BLOCK = 32768, 1024  # rows of the bank, queries: 128 MB of similarities at a time


def unit_rows(rows: Rows, device: Any = None) -> Tensor:
    """Rows of length 1 in float32 (float64 stays)."""
    x = torch.from_numpy(np.array(rows)) if isinstance(rows, np.ndarray) else rows
    x = x.to(device=device, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return F.normalize(x, dim=-1)


@torch.inference_mode()
def nearest(
    queries: Rows,
    bank: Rows,
    k: int,
    *,
    chunk: int = CHUNK,
    device: Any = None,
    split: bool = False,
    group: Group = None,
) -> tuple[Tensor, Tensor]:
    """(cosines [Q, K], rows of the bank [Q, K]), best first, K = min(k, N). Neither needs to be normalised.

    split: each process of `group` searches its share of the bank, which all of them have; the result is the same on all.
    """
    N = len(bank)
    if N == 0 or k < 1:
        raise DinoError(f"{k} neighbours among {N} rows: there must be at least one of both")
    each = -(-N // distributed.world(group)) if split else N
    first = min(distributed.rank(group) * each, N) if split else 0
    q = unit_rows(queries, device)
    best, where = _search(q, bank, first, min(first + each, N), min(k, N), chunk)
    if split and distributed.world(group) > 1:
        best, where = (_gathered_columns(x, group) for x in (best, where))
        best, order = best.topk(min(k, N), dim=1)
        where = where.gather(1, order)
    return best, where


def _gathered_columns(x: Tensor, group: Group) -> Tensor:
    """[Q, K] of every process side by side, [Q, W·K]."""
    return distributed.all_gather(x.T.contiguous(), group).T


def _search(q: Tensor, bank: Rows, first: int, last: int, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The best k of rows first … last − 1; a part with fewer rows fills up with −inf, which no real cosine loses to."""
    best = q.new_full((len(q), k), -torch.inf)
    where = torch.zeros(len(q), k, dtype=torch.int64, device=q.device)
    for start in range(first, last, chunk):
        rows = unit_rows(bank[start : min(start + chunk, last)], q.device)
        for i in range(0, len(q), BLOCK):
            here = slice(i, i + BLOCK)
            found, index = (q[here] @ rows.T).topk(min(k, len(rows)), dim=1)
            joined = torch.cat([best[here], found], 1)
            best[here], order = joined.topk(k, dim=1)
            where[here] = torch.cat([where[here], index + start], 1).gather(1, order)
    return best, where


@torch.inference_mode()
def components(rows: Rows, threshold: float, on_progress: Callable[[int], object] | None = None) -> Tensor:
    """Labels [N]: the smallest row number in each group of rows that are linked by cosines ≥ threshold, directly or not."""
    x = unit_rows(rows)
    parent = torch.arange(len(x))

    def join(a: Tensor, b: Tensor) -> None:
        """Puts the groups of rows a[i] and b[i] together."""
        nonlocal parent
        while bool((differ := parent[a] != parent[b]).any()):
            a, b = a[differ], b[differ]
            low, high = torch.minimum(parent[a], parent[b]), torch.maximum(parent[a], parent[b])
            parent = parent.scatter_reduce(0, high, low, "amin")
            while bool((parent[parent] != parent).any()):
                parent = parent[parent]

    for i in range(0, len(x), BLOCK):
        block = x[i : i + BLOCK]
        for c in range(i, len(x), CHUNK):
            linked = block @ x[c : c + CHUNK].T >= threshold
            # one link of each row and column first: of a thousand copies the other half million links are then inside
            for sides, dim in ((linked, 0), (linked, 1)):
                line = sides.any(dim).nonzero()[:, 0]
                first = sides.int().argmax(dim)[line]
                join(*((i + first, c + line) if dim == 0 else (i + line, c + first)))
            outside = linked & (parent[i : i + BLOCK, None] != parent[None, c : c + CHUNK])
            if bool(outside.any()):
                a, b = outside.nonzero().T
                join(i + a, c + b)
        if on_progress:
            on_progress(min(i + BLOCK, len(x)))
    return parent


@torch.inference_mode()
def k_means(
    rows: Rows, k: int, *, seed: int = 0, iterations: int = 30, on_progress: Callable[[int], object] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Spherical k-means (k-means++ start): (cluster [N], cosine to its centre [N]). Deterministic for a seed."""
    x, draw = unit_rows(rows), torch.Generator().manual_seed(seed)
    centres = x[torch.randint(len(x), (1,), generator=draw)]
    best = x @ centres[0]
    while len(centres) < k:
        distance = (1 - best).clamp(min=0) + 1e-12
        new = x[torch.multinomial(distance, 1, generator=draw)] if len(x) < 1 << 24 else x[distance.argmax()][None]
        centres, best = torch.cat([centres, new]), torch.maximum(best, x @ new[0])
    labels = torch.full((len(x),), -1)
    for iteration in range(iterations):
        cosines, found = nearest(x, centres, 1)
        cosines, found = cosines[:, 0], found[:, 0]
        if on_progress:
            on_progress(len(x) * (iteration + 1) // iterations)
        if torch.equal(found, labels):
            break
        labels = found
        sums = torch.zeros_like(centres).index_add_(0, labels, x)
        empty = sums.norm(dim=1) < 1e-6  # such a centre goes where an image is farthest from its own
        sums[empty] = x[cosines.argsort()[: int(empty.sum())]]
        centres = F.normalize(sums, dim=1)
    cosines, found = nearest(x, centres, 1)
    return found[:, 0].numpy(), cosines[:, 0].numpy()


def votes(cosines: Tensor, labels: Tensor, k: int, n_classes: int, temperature: float = 0.07) -> Tensor:
    """Class scores [Q, C] of the k best: each neighbour's weight goes to its class, or to each of its classes.

    cosines [Q, K], best first; labels int [Q, K], or multi-hot [Q, K, C]. The weights are a softmax of cosine /
    temperature over all K, so the scores sum to less than 1 where k < K.
    """
    weights = (cosines / temperature).softmax(1)[:, :k]  # [Q, k]
    if labels.ndim == 3:
        return torch.einsum("qk,qkc->qc", weights, labels[:, :k].to(weights.dtype))
    return weights.new_zeros(len(weights), n_classes).scatter_add_(1, labels[:, :k], weights)


def knn_scores(
    train: Rows,
    train_labels: Tensor,
    test: Rows,
    ks: Sequence[int],
    *,
    temperature: float = 0.07,
    skip_first: bool = False,
    n_classes: int | None = None,
    device: Any = None,
    split: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """(k, class scores [Q, C]) for each k, ascending, capped at the number of training rows.

    train_labels: int [N] or multi-hot [N, C]. The neighbours are found once; scores are made one k at a time, because
    50,000 × 1,000 of them are 200 MB. split: processes share the search.
    """
    ks = sorted({min(k, len(train) - skip_first) for k in ks})
    classes = n_classes or (train_labels.shape[1] if train_labels.ndim == 2 else int(train_labels.max()) + 1)
    cosines, where = nearest(test, train, max(ks) + skip_first, device=device, split=split)
    if skip_first:
        cosines, where = cosines[:, 1:], where[:, 1:]
    labels = train_labels.to(cosines.device)[where]
    for k in ks:
        yield k, votes(cosines, labels, k, classes, temperature)


def knn_accuracy(
    train: Rows, train_labels: Tensor, test: Rows, test_labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of the test rows [n, D] whose label wins among the k most similar training rows [N, D]."""
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    options: dict[str, Any] = {"temperature": temperature, "n_classes": classes, "device": train_labels.device}
    ((_, scores),) = knn_scores(train, train_labels, test, [k], **options)
    return accuracy(scores, test_labels)
