"""Endless batches of crops: which images, in which order, on which rank, and how to go on where one stopped.

The order is a function, not a process. Position p of the global stream (0, 1, 2, …, over all ranks and epochs) is image
`permutation(epoch)[p mod N]` with epoch = p // N; the permutation is computed for single positions (a Feistel network), so
nothing is stored or skipped through, at a billion images as at ten. A batch of B images on each of W ranks takes the
next B·W positions, rank r those at r, r + W, …. Everything else (crops, masks, resolution) is a function of position or
step, hence

    the state of the loader is one number, the samples consumed,

and a resumed run sees what the uninterrupted one would have seen: bit for bit, with any number of workers; with another
number of ranks (and the same B·W) the same images and crops, sharded differently.

Several resolutions (paper, section 4.2 high-resolution stage) share one set of workers: the step decides which crops apply,
by the same sequence as the reference (PCG64 of 65537), the same on all ranks.

An image that cannot be read is replaced by another, counted and named (`CropBatch.unreadable`, `CropLoader.unreadable`);
when nothing can be read the run stops with a sentence.

What differs from the reference: its order after a resume is another one (seed and position both change), its augmentation
restarts from the same seeds, and one broken file stops it. Its own index streams are at the end of this file, under names
that begin with `reference_`, for comparisons.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dinov3.data.crops import (
    CropBatch,
    CropConfig,
    MaskConfig,
    Sample,
    batch_masks,
    collate,
    generator,
    mask_grid,
    render,
)
from dinov3.data.datasets.base import Mixture
from dinov3.data.images import open_image
from dinov3.data.sources.items import Runs
from dinov3.errors import DinoError, ImageError

ROUNDS = 8
REPLACEMENTS = 64  # images tried in place of one unreadable one; all of them bad by chance needs a hopeless data set
RESOLUTION_SEED = 65537


class Images(Protocol):
    """What a data set must offer to be trained on: encoded images by number, each with a name for messages."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes: ...

    def name(self, index: int) -> str: ...

    # `runs`, where there is such an attribute: how its images should be read forwards (`sources.items.Runs`)


# ---------------------------------------------------------------------------------------------------------------------
# The order


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[np.ndarray, ...]:
    return tuple(np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS, np.uint64)[:, None])


def permuted(offsets: np.ndarray, length: int | np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Where a permutation of 0 … length−1 sends `offsets`, without building the permutation. `length` may differ between
    offsets.

    A Feistel network on the smallest even number of bits that holds `length` is a bijection of that larger range; what
    lands outside goes through again until it is inside ("cycle walking"), which keeps it a bijection of the smaller one.
    """
    x, lengths = np.broadcast_arrays(np.asarray(offsets, np.uint64), np.asarray(length, np.int64))
    bits = np.frexp(lengths - 1)[1]  # bit_length
    half = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    keys = _round_keys(seed, epoch)

    def once(x: np.ndarray, half: np.ndarray) -> np.ndarray:
        low = (np.uint64(1) << half) - np.uint64(1)
        left, right = x >> half, x & low
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & low)
        return (left << half) | right

    x = once(x, half)
    while (outside := x >= lengths).any():
        x[outside] = once(x[outside], half[outside])
    return x.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=4)
def _shuffled(runs: Runs, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(the runs' first images in the order of an epoch, where each run ends in that order, where the first lane begins)"""
    rng = np.random.default_rng((seed, epoch, 1))
    order = rng.permutation(len(runs.lengths))
    firsts = (np.cumsum(runs.lengths) - runs.lengths)[order]
    ends = np.cumsum(runs.lengths[order])
    return firsts, ends, int(rng.integers(ends[-1]))


def along(runs: Runs, offsets: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 … N−1 as `permuted`, which goes forwards through `runs` in several places at once.

    The runs are put in a random order, and this row is cut into lanes of equal length. Offset p belongs to lane p mod
    their number; in a lane images come in their order, but for neighbours within a window, which are permuted. So images of a
    batch come from all lanes, and one rank of 2, 4, … reads its own share of the lanes.
    """
    firsts, ends, start = _shuffled(runs, seed, epoch)
    length = int(ends[-1])
    lane, step = offsets % runs.lanes, offsets // runs.lanes
    lane_length = (length - lane + runs.lanes - 1) // runs.lanes
    lane_start = lane * (length // runs.lanes) + np.minimum(lane, length % runs.lanes)
    # of nearly equal size: step s is in window s·windows // lane_length
    windows = np.maximum(1, lane_length // runs.window)
    window = step * windows // lane_length
    begin, end = (-(-w * lane_length // windows) for w in (window, window + 1))
    step = begin + permuted(step - begin, end - begin, seed, epoch)
    place = (start + lane_start + step) % length
    run = np.searchsorted(ends, place, side="right")
    return firsts[run] + place - np.concatenate([[0], ends])[run]


@dataclass(frozen=True)
class Order:
    """The endless stream over a data set of `length` images; forwards along `runs` where it has some."""

    length: int
    seed: int = 0
    runs: Runs | None = None

    def __post_init__(self) -> None:
        if self.length < 1:
            raise DinoError("the data set is empty: there is nothing to train on")

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, indices) at positions of the global stream."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.length)
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            if self.runs is None:
                indices[here] = permuted(offsets[here], self.length, self.seed, epoch)
            else:
                indices[here] = along(self.runs, offsets[here], self.seed, epoch)
        return epochs, indices

    def replacement(self, position: int, attempt: int) -> int:
        """Which image is tried when the one at `position` and attempt − 1 others could not be read."""
        state = np.random.SeedSequence((self.seed, position, attempt)).generate_state(1, np.uint64)
        return int(state[0]) % self.length


@dataclass
class MixedOrder:
    """The stream over a mixture: each batch is drawn from one data set (paper §3: homogeneous batches of ImageNet among the
    others), whose own `Order` it continues."""

    images: Mixture
    seed: int
    batch: int  # images of all ranks

    @cached_property
    def orders(self) -> list[Order]:
        return [Order(len(part), self.seed, getattr(part, "runs", None)) for part in self.images.parts]

    @property
    def length(self) -> int:
        return len(self.images)

    def _taken(self, step: int) -> tuple[int, int]:
        """(data set, how many earlier steps took it): each is taken as evenly as its weight allows, exactly."""
        rest = sum(self.images.weights, Fraction(0))
        for part, weight in enumerate(self.images.weights[:-1]):
            before, with_it = (n * weight // rest for n in (step, step + 1))
            if with_it > before:
                return part, int(before)
            step, rest = step - int(before), rest - weight
        return len(self.images.weights) - 1, step

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        steps, within = np.divmod(np.asarray(positions, np.int64), self.batch)
        epochs, indices = np.empty_like(steps), np.empty_like(steps)
        for step in np.unique(steps).tolist():
            here, (part, nth) = steps == step, self._taken(step)
            epochs[here], found = self.orders[part].at(nth * self.batch + within[here])
            indices[here] = found + self.images.starts[part]
        return epochs, indices

    def replacement(self, position: int, attempt: int) -> int:
        part, _ = self._taken(position // self.batch)
        return self.images.starts[part] + self.orders[part].replacement(position, attempt)


def chosen_resolution(step: int, ratios: Sequence[float]) -> int:
    """Which of the resolutions a step uses: the reference's sequence, but as a function of the step."""
    if len(ratios) == 1:
        return 0
    bits = np.random.PCG64(RESOLUTION_SEED)
    bits.advance(step)
    shares = np.cumsum(np.asarray(ratios, float))
    return int(np.searchsorted(shares / shares[-1], np.random.Generator(bits).random(), side="right"))


# ---------------------------------------------------------------------------------------------------------------------
# What travels to and from the workers


@dataclass(frozen=True, slots=True)
class Draw:
    """One image to be made into crops."""

    position: int
    epoch: int
    index: int
    step: int
    resolution: int


@dataclass(frozen=True)
class _Hopeless:
    """Comes back from a worker in place of a batch; an exception would arrive wrapped in a traceback."""

    sentence: str


class _Renderer(Dataset[Any]):
    """In the workers: a draw to its crops."""

    def __init__(self, images: Images, configs: Sequence[CropConfig], order: Order | MixedOrder):
        self.images, self.configs, self.order = images, configs, order

    def __getitem__(self, draw: Draw) -> tuple[Draw, Sample] | _Hopeless:
        threads = torch.get_num_threads()
        if threads == 1:  # as in every worker
            return self._rendered(draw)
        # crops are too small to share out: several threads took ten times as long on a busy machine
        torch.set_num_threads(1)
        try:
            return self._rendered(draw)
        finally:
            torch.set_num_threads(threads)

    def _rendered(self, draw: Draw) -> tuple[Draw, Sample] | _Hopeless:
        config = self.configs[draw.resolution]
        unreadable: list[str] = []
        for attempt in range(REPLACEMENTS + 1):
            index = self.order.replacement(draw.position, attempt) if attempt else draw.index
            try:
                image = open_image(self.images.read(index), target_short_side=config.target_short_side)
            except (ImageError, OSError) as error:
                unreadable.append(f"{self.images.name(index)}: {error}")
                continue
            rng = generator(self.order.seed, draw.epoch, index)
            plan = config.plan(*image.image.size, rng)
            return draw, Sample(render(image.image, plan, config), index, tuple(unreadable))
        return _Hopeless(
            f"{len(unreadable)} images in a row could not be read, so training stops. The first: {unreadable[0]}"
        )


@dataclass(frozen=True)
class _Collator:
    """In the workers: samples to a batch with masks, which depend on the batch's first position only."""

    configs: Sequence[CropConfig]
    grids: Sequence[tuple[int, int]]
    masks: MaskConfig
    seed: int
    masked_images: int | None

    def __call__(self, drawn: Sequence[tuple[Draw, Sample] | _Hopeless]) -> CropBatch | _Hopeless:
        samples: list[Sample] = []
        for d in drawn:
            if isinstance(d, _Hopeless):
                return d
            samples.append(d[1])
        first = drawn[0]
        assert not isinstance(first, _Hopeless)
        draw = first[0]
        rng = random.Random(f"masks {self.seed} {draw.position}")
        images = self.masked_images or len(samples)
        masks = batch_masks(2 * images, self.grids[draw.resolution], self.masks, rng)
        return collate(samples, masks, self.configs[draw.resolution], step=draw.step, resolution=draw.resolution)


# ---------------------------------------------------------------------------------------------------------------------
# The loader


class CropLoader:
    """Endless `CropBatch`es of this rank.

        loader = CropLoader(images, CropConfig(), MaskConfig(), patch=16, batch_size=64, seed=0, rank=r, world=w, workers=8)
        for batch in loader:
            batch = batch.to(device, dtype)         # crops as normalised floats
            ...
            loader.state_dict()          # {"consumed": samples of all ranks}, to be saved with the weights

    configs: one, or several whose `ratio`s say how often each is used. patch: the student's, in pixels; global sizes that
    are no multiple of it are refused. masked_images: masks for another number of images than are loaded (multi-student
    distillation). workers, prefetch: as torch's DataLoader has them. device: where batches come, still as bytes.

    `wait_s` is how long the last batch was waited for, `waited_s` the sum: a loop that waits is short of workers.
    """

    def __init__(
        self,
        images: Images,
        configs: CropConfig | Sequence[CropConfig],
        masks: MaskConfig | None = None,
        *,
        patch: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        device: torch.device | None = None,
        masked_images: int | None = None,
    ):
        self.configs = [configs] if isinstance(configs, CropConfig) else list(configs)
        self.ratios = [config.ratio for config in self.configs]
        masks = masks or MaskConfig()
        if batch_size < 1 or not 0 <= rank < world:
            raise DinoError(
                f"batch size {batch_size}, rank {rank} of {world}: need a positive size and 0 ≤ rank < world"
            )
        self.order: Order | MixedOrder = Order(len(images), seed, getattr(images, "runs", None))
        if isinstance(images, Mixture):
            self.order = MixedOrder(images, seed, batch_size * world)
        self.images, self.batch_size, self.rank, self.world = images, batch_size, rank, world
        self.device = device or torch.device("cpu")
        self.consumed = 0
        self.wait_s = self.waited_s = 0.0
        self.unreadable: dict[str, int] = {}  # "name: reason" → how often
        grids = []
        for config in self.configs:
            config.check_patch(patch)
            grids.append(mask_grid(config.global_size, patch, masks.scale))
        self._loader: DataLoader[Any] = DataLoader(
            _Renderer(images, self.configs, self.order),
            batch_sampler=_Steps(self),
            collate_fn=_Collator(self.configs, grids, masks, seed, masked_images),
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or starting the workers would draw from the training's own generator
        )

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.consumed / self.order.length

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Takes effect with the next `iter(loader)`."""
        self.consumed = int(state["consumed"])

    def draws(self, consumed: int) -> list[Draw]:
        """This rank's next batch after `consumed` samples of all ranks."""
        positions = consumed + np.arange(self.rank, self.global_batch, self.world)
        epochs, indices = self.order.at(positions)
        step = consumed // self.global_batch
        resolution = chosen_resolution(step, self.ratios)
        rows = zip(positions.tolist(), epochs.tolist(), indices.tolist())
        return [Draw(position, epoch, index, step, resolution) for position, epoch, index in rows]

    def __iter__(self) -> Iterator[CropBatch]:
        batches = moved_ahead(iter(self._loader), self.device)
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self.wait_s = time.perf_counter() - start
            self.waited_s += self.wait_s
            if isinstance(batch, _Hopeless):
                raise DinoError(batch.sentence)
            self.consumed += self.global_batch
            for reason in batch.unreadable:
                self.unreadable[reason] = self.unreadable.get(reason, 0) + 1
            yield batch


def moved_ahead(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Endless batches on a device, as they are; on a GPU the next one is copied, in its own stream, while one is used."""
    if device.type != "cuda":
        yield from map(partial(_moved, device=device), batches)
        return
    side = torch.cuda.Stream(device)

    def queued(batch: Any) -> tuple[Any, torch.cuda.Event]:
        # after the step before: what that step needed may lie in the memory that the copy takes
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            return _moved(batch, device), side.record_event()

    ahead = queued(next(batches))
    while True:
        (batch, copied), ahead = ahead, queued(next(batches))
        torch.cuda.current_stream(device).wait_event(copied)
        yield batch


def _moved(batch: Any, device: torch.device) -> Any:
    return batch.to(device, None) if isinstance(batch, CropBatch) else batch  # or what ends the run


class _Steps:
    """The endless batch sampler, from the loader's position."""

    def __init__(self, loader: CropLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[list[Draw]]:
        start = self.loader.consumed
        for step in itertools.count():
            yield self.loader.draws(start + step * self.loader.global_batch)
