"""The orders in which the reference's samplers visit a data set, for comparison with its recorded streams."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch


def reference_infinite(
    length: int, *, shuffle: bool = True, seed: int = 0, rank: int = 0, world: int = 1, advance: int = 0
) -> Iterator[int]:
    """`INFINITE`: each pass a Fisher-Yates shuffle, all from one generator; every rank draws the whole pass."""
    rng = torch.Generator().manual_seed(seed)

    def one_pass() -> Iterator[int]:
        items = list(range(length))
        for i in range(length):
            if shuffle:
                j = int(torch.randint(i, length, (1,), generator=rng))
                items[i], items[j] = items[j], items[i]
            yield items[i]

    passes = (itertools.islice(one_pass(), rank, None, world) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(passes), advance, None)


def reference_sharded_infinite(
    length: int, *, seed: int = 0, rank: int = 0, world: int = 1, advance: int = 0, new: bool = False
) -> Iterator[int]:
    """`SHARDED_INFINITE` (and `_NEW`): a rank keeps its share of one permutation and shuffles it anew in every pass."""
    mine = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[rank::world][: length // world]

    def one_pass(number: int) -> list[int]:
        rng = torch.Generator().manual_seed(seed + rank + (number << 24))
        if new:
            return mine[torch.randperm(len(mine), generator=rng)].tolist()
        items: list[int] = []
        for i, item in enumerate(mine.tolist()):  # inside-out
            j = int(torch.randint(0, i + 1, (1,), generator=rng)) if i else 0
            items.append(item)
            items[i], items[j] = items[j], item
        return items

    passes = (one_pass(number) for number in itertools.count(advance // length))
    return itertools.islice(itertools.chain.from_iterable(passes), advance % length, None)


def reference_epoch(
    length: int, *, size: int, epoch: int, shuffle: bool = False, seed: int = 0, rank: int = 0, world: int = 1
) -> list[int]:
    """`EPOCH`: the data set tiled, `size` of it drawn without replacement, every world-th index."""
    items = np.tile(np.arange(length), -(-size // length))
    if shuffle:
        items = np.random.default_rng(seed * epoch if seed else epoch).choice(items, size, replace=False)
    return items[:size][rank::world][: size // world].tolist()
