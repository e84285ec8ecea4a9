"""The loader: an order that is a function, exact resuming, several resolutions, images that cannot be read."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import GOLDEN_LOSSES
from PIL import Image
from reference_orders import reference_epoch, reference_infinite, reference_sharded_infinite

from dinov3.data import loading
from dinov3.data.crops import CropBatch, CropConfig, MaskConfig
from dinov3.data.datasets import Folder, make_dataset
from dinov3.data.loading import CropLoader, Order, along, chosen_resolution, permuted
from dinov3.data.sources import containers
from dinov3.data.sources.items import FORWARD, Runs, stamp_of
from dinov3.errors import DinoError, ImageError

GOLDEN = json.loads((GOLDEN_LOSSES / "samplers.json").read_text())
CONFIG = CropConfig(32, 16, 2)


@dataclass
class Toy:
    """n images in memory; those in `bad` cannot be read."""

    n: int
    bad: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return self.n

    def read(self, index: int) -> bytes:
        if index in self.bad:
            raise ImageError("truncated JPEG")
        pixels = np.random.Generator(np.random.PCG64(index)).integers(0, 256, (40, 50, 3), np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        return stream.getvalue()

    def name(self, index: int) -> str:
        return f"toy{index}"


def loader(images: Any = None, configs: Any = CONFIG, *, consumed: int = 0, **options: Any) -> CropLoader:
    made = CropLoader(images or Toy(10), configs, **{"patch": 8, "batch_size": 3, **options})
    made.load_state_dict({"consumed": consumed})
    return made


def first(n: int, batches: Any) -> list[CropBatch]:
    return list(islice(iter(batches), n))


def same(a: CropBatch, b: CropBatch) -> bool:
    assert vars(a).keys() == vars(b).keys()
    return all(v.equal(vars(b)[k]) if isinstance(v, torch.Tensor) else v == vars(b)[k] for k, v in vars(a).items())


# ---------------------------------------------------------------------------------------------------------------------
# The order


@pytest.mark.parametrize("length", (1, 2, 3, 10, 17, 64, 1000))
def test_the_permutation_meets_every_index_once(length: int) -> None:
    assert sorted(permuted(np.arange(length), length, 5, 1).tolist()) == list(range(length))


def test_the_permutation_of_a_billion_is_computed_for_single_positions() -> None:
    n = 1_600_000_000
    some = permuted(np.arange(1000) * 1_600_000, n, 0, 0)
    assert len(set(some.tolist())) == 1000
    assert some.min() >= 0
    assert some.max() < n
    assert abs(some.mean() / n - 0.5) < 4 * (1 / 12 / 1000) ** 0.5


def test_other_epochs_and_seeds_are_other_permutations() -> None:
    one, epoch, seed = (permuted(np.arange(100), 100, *key).tolist() for key in ((0, 0), (0, 1), (1, 0)))
    assert one != epoch
    assert one != seed
    assert one != list(range(100))


def test_every_place_gets_every_index_equally_often() -> None:
    n, epochs = 12, 1500
    table = np.stack([permuted(np.arange(n), n, 3, e) for e in range(epochs)])
    counts = np.stack([np.bincount(column, minlength=n) for column in table.T])
    chi_squared = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert chi_squared < 200  # 121 degrees of freedom: p < 1e-5
    follows = np.mean(table[:, 1:] == (table[:, :-1] + 1) % n)
    assert abs(follows - 1 / (n - 1)) < 0.01


def test_each_epoch_of_the_stream_is_a_permutation_across_ranks() -> None:
    order = Order(10, seed=4)
    epochs, indices = order.at(np.arange(30))
    assert epochs.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    for e in range(3):
        assert sorted(indices[epochs == e].tolist()) == list(range(10))


def test_ranks_share_the_global_order_out_without_overlap() -> None:
    whole = loader(Toy(100), batch_size=6).draws(12)
    parts = [loader(Toy(100), batch_size=2, rank=r, world=3).draws(12) for r in range(3)]
    dealt = [parts[i % 3][i // 3] for i in range(6)]
    assert dealt == whole


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize("workers", (0, 2))
def test_a_resumed_loader_continues_bit_for_bit_with_any_number_of_workers(workers: int) -> None:
    masks = MaskConfig(circular_shift=True)
    straight = first(6, loader(masks=masks, seed=7))
    started = loader(masks=masks, seed=7, workers=workers)
    begun = first(4, started)
    assert started.state_dict() == {"consumed": 12}  # what was handed out, not what workers have prefetched
    resumed = loader(masks=masks, seed=7)
    resumed.load_state_dict(started.state_dict())
    for a, b in zip(straight, begun + first(2, resumed), strict=True):
        assert same(a, b)


def test_a_loader_that_is_left_and_taken_up_again_loses_nothing() -> None:
    straight = first(4, loader())
    interrupted = loader(workers=1)
    for a, b in zip(straight, first(1, interrupted) + first(3, interrupted), strict=True):
        assert same(a, b)


def test_resuming_with_another_number_of_ranks_sees_the_same_images_and_crops() -> None:
    whole = first(2, loader(Toy(50), batch_size=4, consumed=8))[1]
    halves = [first(2, loader(Toy(50), batch_size=2, rank=r, world=2, consumed=8))[1] for r in (0, 1)]
    assert sorted(whole.indices) == sorted(halves[0].indices + halves[1].indices)
    for r, half in enumerate(halves):
        for b in range(2):
            assert half.global_crops[b].equal(whole.global_crops[2 * b + r])


def test_spawned_workers_give_the_same_batches() -> None:
    spawned = loader(workers=1)
    spawned._loader.multiprocessing_context = "spawn"
    for a, b in zip(first(2, loader()), first(2, spawned), strict=True):
        assert same(a, b)


def test_the_trainings_own_chance_is_not_touched() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first(2, loader(workers=1))
    assert torch.get_rng_state().equal(before)


def test_epochs_bring_other_crops_of_the_same_image() -> None:
    one, two = first(2, loader(Toy(1), batch_size=1))
    assert one.indices == two.indices == (0,)
    assert not one.global_crops.equal(two.global_crops)


def test_a_data_set_smaller_than_the_batch_is_repeated_within_it() -> None:
    (batch,) = first(1, loader(Toy(2), batch_size=5))
    assert sorted(batch.indices)[:2] == [0, 0]
    assert batch.global_crops.shape == (10, 3, 32, 32)


# ---------------------------------------------------------------------------------------------------------------------
# Several resolutions


def test_resolutions_follow_the_recorded_choices_of_the_reference() -> None:
    ratios = (0.3, 0.3, 0.3, 0.05, 0.05)
    recorded = GOLDEN["combined_loader_choice_seed65537"]
    assert [chosen_resolution(step, ratios) for step in range(len(recorded))] == recorded


def test_sizes_masks_and_choice_go_together_on_all_ranks_and_after_a_resume() -> None:
    rows = ((32, 16, 48, 0.4), (48, 16, 64, 0.3), (48, 24, 64, 0.3))
    configs = [CropConfig(g, l, 1, gram_size=q, ratio=ratio) for g, l, q, ratio in rows]  # noqa: E741
    chosen = []
    for batch in first(12, loader(configs=configs, batch_size=1)):
        crop_config = configs[batch.resolution]
        assert batch.global_crops.shape[-1] == crop_config.global_size
        assert batch.local_crops.shape[-1] == crop_config.local_size
        assert batch.gram_crops is not None
        assert batch.gram_crops.shape[-1] == crop_config.gram_size
        assert batch.masks.shape == (2, (crop_config.global_size // 8) ** 2)
        chosen.append(batch.resolution)
    assert set(chosen) == {0, 1, 2}
    other = loader(configs=configs, batch_size=1, rank=1, world=2, consumed=8)
    assert [b.resolution for b in first(8, other)] == chosen[4:]
    assert [b.step for b in first(1, other)] == [12]


def test_a_size_that_the_patch_does_not_divide_is_refused_before_anything_is_read() -> None:
    with pytest.raises(DinoError, match="global_size 32 is no multiple of the patch size 14; the nearest one is 28"):
        loader(patch=14)


def test_a_coarser_mask_grid_is_an_option() -> None:
    (batch,) = first(1, loader(masks=MaskConfig(scale=2.0)))
    assert batch.masks.shape == (6, 4)


def test_masks_can_be_drawn_for_another_number_of_images_than_are_loaded() -> None:
    (batch,) = first(1, loader(batch_size=3, masked_images=2))
    assert batch.masks.shape == (4, 16)
    assert batch.global_crops.shape[0] == 6


# ---------------------------------------------------------------------------------------------------------------------
# Sources that are read forwards


def runs(*lengths: int, lanes: int = 8, window: int = 5) -> Runs:
    return Runs(np.array(lengths, np.int64), lanes, window)


@pytest.mark.parametrize(
    "made", [runs(1), runs(3, 0, 40, 7), runs(*[13] * 30), runs(500, lanes=1), runs(2, 2, lanes=32)]
)
def test_an_epoch_along_runs_meets_every_image_once(made: Runs) -> None:
    n = int(made.lengths.sum())
    epochs = [along(made, np.arange(n), 3, epoch).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 10 or epochs[0] != epochs[1] != epochs[2]
    assert [int(along(made, np.array([p]), 3, 1)[0]) for p in range(n)] == epochs[1]  # a function of the position


def test_a_batch_along_runs_comes_from_all_lanes_and_a_rank_reads_its_own() -> None:
    order = Order(3200, 0, runs(*[100] * 32, lanes=8, window=10))
    _, indices = order.at(np.arange(0, 64))
    assert len(set((indices // 100).tolist())) >= 8
    _, own = order.at(np.arange(3, 800, 8))  # rank 3 of 8
    assert len(set((own // 100).tolist())) <= 3


def test_a_loader_along_runs_resumes_exactly_and_with_other_ranks() -> None:
    images = Toy(60)
    images.runs = runs(20, 25, 15, lanes=2)  # type: ignore[attr-defined]
    whole = first(6, loader(images, batch_size=4))
    assert all(same(a, b) for a, b in zip(first(3, loader(images, batch_size=4, consumed=12)), whole[3:], strict=True))
    halves = [first(6, loader(images, batch_size=2, rank=r, world=2)) for r in range(2)]
    for step, batch in enumerate(whole):
        assert sorted(batch.indices) == sorted([*halves[0][step].indices, *halves[1][step].indices])


@pytest.mark.parametrize("form", ["tar.gz", "parquet", pytest.param("one tar.gz", marks=pytest.mark.slow)])
def test_training_reads_packed_sources_forwards(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = list(np.random.default_rng(0).integers(0, 256, (1920, 1000), np.uint8))
    data = [row.tobytes() for row in data]
    if form == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"image": data}), tmp_path / "a.parquet", row_group_size=96)
    for shard in range(0 if form == "parquet" else 1 if form.startswith("one") else 8):
        with tarfile.open(tmp_path / f"{shard}.tar.gz", "w:gz") as archive:
            for i in range(1920 if form.startswith("one") else 240):
                member = tarfile.TarInfo(f"{shard}-{i:03}.jpg")
                member.size = 1000
                archive.addfile(member, io.BytesIO(data[240 * shard + i]))
    monkeypatch.setattr(FORWARD, "CACHED", 400_000)  # a fifth of it
    monkeypatch.setattr(containers, "PACKED_BLOCK", 1000)
    monkeypatch.setattr(containers, "BATCH", 1)
    decoded: list[int] = []
    for name in ("_unpacked", "_row_blocks"):
        real = getattr(containers, name)

        def counted(*place: Any, real: Any = real) -> Iterator[Any]:
            for block in real(*place):
                decoded.append(block[1])
                yield block

        monkeypatch.setattr(containers, name, counted)
    images = Folder(tmp_path)
    sizes = []
    for order in (CropLoader(images, CONFIG, patch=8, batch_size=8).order, Order(1920)):
        FORWARD.forget()
        decoded.clear()
        _, indices = order.at(np.arange(1920))
        assert sorted(images.read(i) for i in indices.tolist()) == sorted(data)
        sizes.append(sum(decoded))
    whole = 1920 * (1000 if form == "parquet" else 1536)
    assert sizes[0] < {"parquet": 2, "tar.gz": 4, "one tar.gz": 12}[form] * whole  # 1.4, 3.2, 9.2 times the source
    assert sizes[1] > 4 * sizes[0]  # a random order: 14, 22, 47 times


def test_a_small_packed_source_is_cached_and_read_in_any_order(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    assert Folder(tmp_path).runs is None


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures


def test_a_mixture_gives_whole_batches_of_each_data_set_by_weight(tmp_path: Path) -> None:
    for name, n in (("web", 30), ("few", 6), ("more", 9)):
        (tmp_path / name).mkdir()
        for i in range(n):
            (tmp_path / name / f"{i}.png").write_bytes(Toy(1).read(i))
    images = make_dataset(f"{tmp_path}/web:0.7+Folder:root={tmp_path}/few:0.1+{tmp_path}/more:0.2")
    assert len(images) == 45
    order = loader(images, batch_size=3).order
    _, indices = order.at(np.arange(3 * 200))
    parts = np.searchsorted([30, 36], indices, side="right").reshape(200, 3)
    assert (parts == parts[:, :1]).all()
    assert np.bincount(parts[:, 0]).tolist() == [140, 20, 40]
    assert [np.bincount(parts[s : s + 10, 0]).tolist() for s in (0, 50, 190)] == [[7, 1, 2]] * 3
    few = indices[indices // 6 == 5]
    assert sorted(few[:6].tolist()) == sorted(few[6:12].tolist()) == list(range(30, 36))  # epochs of its own
    whole = first(12, loader(images, batch_size=2))
    assert all(same(a, b) for a, b in zip(first(5, loader(images, batch_size=2, consumed=14)), whole[7:], strict=True))
    halves = [first(12, loader(images, batch_size=1, rank=r, world=2)) for r in range(2)]
    assert [[*a.indices, *b.indices] for a, b in zip(*halves)] == [list(batch.indices) for batch in whole]
    assert {images.name(i).count(".png") for i in range(45)} == {1}
    assert images.stamp(31) == stamp_of(tmp_path / "few" / "1.png")


def test_a_weight_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DinoError, match="weight of a in a mixture is 0: leave it out"):
        make_dataset("a:0+b:1")


# ---------------------------------------------------------------------------------------------------------------------
# Copies to a device


def test_on_a_gpu_the_next_batch_is_copied_while_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what is queued, with streams that only write it down."""
    queued: list[str] = []

    class Stream:
        def __init__(self, device: torch.device, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            queued.append(f"{self.name} waits for {other.name}")

        def record_event(self) -> str:
            return queued[-1]

        def wait_event(self, event: str) -> None:
            queued.append(f"{self.name} waits for {event}")

    main = Stream(torch.device("cuda"), "main")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(loading, "_moved", lambda batch, device: (queued.append(f"copy {batch}"), batch)[1])
    batches = loading.moved_ahead(iter("abcd"), torch.device("cuda"))
    for _ in range(2):
        queued.append(f"step {next(batches)}")
    first_step = ["side waits for main", "copy a", "side waits for main", "copy b", "main waits for copy a", "step a"]
    assert queued == [*first_step, "side waits for main", "copy c", "main waits for copy b", "step b"]


def test_batches_come_as_bytes_and_are_normalised_on_the_device() -> None:
    (batch,) = first(1, loader())
    assert batch.global_crops.dtype == torch.uint8
    (kept,) = loading.moved_ahead(iter([batch]), torch.device("cpu"))
    assert same(kept, batch)
    means, spread = (torch.tensor(v)[:, None, None] for v in (batch.mean, batch.std))
    torch.testing.assert_close(batch.to().global_crops, (batch.global_crops / 255 - means) / spread)


# ---------------------------------------------------------------------------------------------------------------------
# Images that cannot be read


@pytest.mark.parametrize("workers", (0, 1))
def test_an_unreadable_image_is_replaced_counted_and_named(workers: int) -> None:
    mended = loader(Toy(10, frozenset({4, 7})), workers=workers)
    batches = first(10, mended)  # three passes
    assert not {4, 7} & {i for b in batches for i in b.indices}
    assert sum(mended.unreadable.values()) >= 6
    assert set(mended.unreadable) == {"toy4: truncated JPEG", "toy7: truncated JPEG"}
    assert [b.unreadable for b in batches] == [b.unreadable for b in first(10, loader(Toy(10, frozenset({4, 7}))))]
    untouched = first(10, loader(Toy(10)))
    for a, b in zip(batches, untouched, strict=True):  # what could be read is what it was
        if not {4, 7} & set(b.indices):
            assert same(a, b)


@pytest.mark.parametrize("workers", (0, 1))
def test_a_data_set_without_a_readable_image_stops_with_one_sentence(workers: int) -> None:
    with pytest.raises(DinoError, match=r"^65 images in a row could not be read.* The first: toy\d: truncated JPEG$"):
        first(1, loader(Toy(3, frozenset({0, 1, 2})), workers=workers))


def test_files_that_vanish_or_break_on_disk_do_not_stop_the_run(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(Toy(4).read(i))
    images = Folder(tmp_path)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(b"<html>gone</html>")
    mended = loader(images, batch_size=4)
    (batch,) = first(1, mended)
    assert set(batch.indices) <= {0, 3}
    assert any(told.startswith("1.png: no such file") for told in mended.unreadable)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(DinoError, match="the data set is empty"):
        CropLoader(Toy(0), CONFIG, patch=8, batch_size=1)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(DinoError, match="rank 2 of 2"):
        loader(rank=2, world=2)


def test_the_wait_for_data_is_measured() -> None:
    slow = loader()
    batches = iter(slow)
    next(batches)
    assert 0 < slow.wait_s == slow.waited_s
    next(batches)
    assert slow.waited_s > slow.wait_s
    assert slow.epoch == 0.6


def test_batches_survive_the_way_between_processes() -> None:
    (batch,) = first(1, loader())
    assert same(pickle.loads(pickle.dumps(batch)), batch)


# ---------------------------------------------------------------------------------------------------------------------
# The reference's own streams


@pytest.mark.parametrize("row", GOLDEN["samplers"], ids=lambda r: "-".join(str(v) for v in list(r.values())[:7]))
def test_recorded_index_streams_are_reproduced(row: dict[str, Any]) -> None:
    options = {k: row[k] for k in ("seed", "rank", "world")}
    if row["type"] == "EPOCH":
        got = reference_epoch(
            row["sample_count"], size=row["size"], epoch=row["epoch"], shuffle=row["shuffle"], **options
        )
        assert got == row["indices"]
        assert len(got) == row["len"]
        return
    options["advance"] = row["advance"]
    if row["type"] == "INFINITE":
        stream: Iterator[int] = reference_infinite(row["sample_count"], shuffle=row["shuffle"], **options)
    else:
        stream = reference_sharded_infinite(row["sample_count"], new=row["type"].endswith("_NEW"), **options)
    assert list(islice(stream, len(row["first"]))) == row["first"]
