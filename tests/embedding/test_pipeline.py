"""Folder → store: resumable, nothing lost, nothing twice, and no image stops the job."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_models import tiny_vit

from dinov3.data.sources import Item, open_source
from dinov3.data.sources.items import Unreadable
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.embedding import pipeline
from dinov3.embedding.pipeline import (
    Embedder,
    Prepared,
    auto_batch,
    batches_by_size,
    embed_source,
    listening,
    model_of,
    query_vector,
)
from dinov3.embedding.search import search
from dinov3.embedding.store import EmbeddingStore
from dinov3.errors import DinoError, StoreError
from dinov3.features import embed
from dinov3.inference import faster
from dinov3.models.vit import VisionTransformer

pytest.importorskip("lancedb")
RULE = Preprocessing(size=32)


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return tiny_vit(depth=2, n_storage_tokens=4)


def image(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "images"
    (place / "sub").mkdir(parents=True)
    for i in range(9):
        image(i, 40 + i).save(place / ("sub" if i % 2 else ".") / f"{i}.png")
    return place


def rows(uri: Path) -> dict[str, tuple]:
    store = EmbeddingStore.open(uri)
    paths, vectors = store.vectors()
    facts = {r["path"]: (r["content_hash"], r["width"], r["height"]) for r in store.rows().to_pylist()}
    assert len(paths) == len(set(paths)) == len(facts)
    return {path: (facts[path], vector) for path, vector in zip(paths, vectors)}


def assert_same_rows(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for path in a:
        assert a[path][0] == b[path][0]
        # the batch an image travels in may change the last bits of a matrix product
        np.testing.assert_allclose(a[path][1], b[path][1], atol=1e-5, rtol=0, err_msg=path)


def test_a_store_holds_what_embed_gives(model, folder, tmp_path) -> None:
    report = embed_source(model, open_source(folder), tmp_path / "s", preprocessing=RULE, batch_size=4)
    assert (report.found, report.embedded, report.skipped, report.failures) == (9, 9, 0, [])
    for path, ((_, width, height), vector) in rows(tmp_path / "s").items():
        expected = embed(model, path, preprocessing=RULE)
        np.testing.assert_allclose(vector, expected.cls[0].numpy(), atol=1e-5)
        assert (width, height) == Image.open(path).size


def test_two_batches_at_a_time_give_the_rows_of_one(model, folder, tmp_path, monkeypatch) -> None:
    fast, calls = faster(model), []
    monkeypatch.setattr(
        fast, "class_tokens", lambda x: calls.append(threading.get_ident()) or type(fast).class_tokens(fast, x)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert (pipeline.streams_of(fast), pipeline.streams_of(model)) == (2, 1)
    for name, streams in (("one", 1), ("two", 2)):
        monkeypatch.setattr(pipeline, "MOST_STREAMS", streams)
        embed_source(fast, open_source(folder), tmp_path / name, preprocessing=RULE, batch_size=2)
    assert_same_rows(rows(tmp_path / "one"), rows(tmp_path / "two"))
    assert set(calls[:5]) == {threading.get_ident()}
    assert threading.get_ident() not in calls[5:]


@pytest.mark.parametrize("pooling, width", [("cls", 32), ("mean", 32), ("cls+mean", 64)])
def test_pooling_is_what_it_says(model, folder, tmp_path, pooling, width) -> None:
    embed_source(model, open_source(folder), tmp_path / "s", preprocessing=RULE, pooling=pooling, patches="float16")
    path = str(folder / "0.png")
    f = embed(model, path, preprocessing=RULE)
    expected = {"cls": f.cls[0], "mean": f.patches[0].mean((0, 1))}
    expected["cls+mean"] = torch.cat([expected["cls"], expected["mean"]])
    vector = rows(tmp_path / "s")[path][1]
    assert vector.shape == (width,)
    np.testing.assert_allclose(vector, expected[pooling].numpy(), atol=1e-5)
    (patches,) = EmbeddingStore.open(tmp_path / "s").patches([path])
    np.testing.assert_allclose(patches, f.patches[0].numpy(), atol=5e-3)


def test_running_again_embeds_only_what_is_new_or_changed(model, folder, tmp_path) -> None:
    store = tmp_path / "s"
    embed_source(model, open_source(folder), store, preprocessing=RULE)
    again = embed_source(model, open_source(folder), store, preprocessing=RULE)
    assert (again.embedded, again.skipped) == (0, 9)
    image(100).save(folder / "new.png")
    image(101, 77, 33).save(folder / "0.png")
    os.utime(folder / "0.png", ns=(1, 1))
    third = embed_source(model, open_source(folder), store, preprocessing=RULE)
    assert (third.embedded, third.skipped) == (2, 8)
    assert len(rows(store)) == 10
    assert rows(store)[str(folder / "0.png")][0][1:] == (77, 33)


def test_two_folders_with_equal_names_share_a_store(model, folder, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    image(200).save(other / "0.png")
    for place in (folder, other):
        embed_source(model, open_source(place), tmp_path / "s", preprocessing=RULE)
    assert {str(folder / "0.png"), str(other / "0.png")} <= set(rows(tmp_path / "s"))
    assert len(rows(tmp_path / "s")) == 10


@pytest.mark.parametrize(
    "change", [{"preprocessing": RULE.with_(size=48)}, {"pooling": "mean"}, {"patches": "int8"}, {"model": "other"}]
)
def test_a_store_takes_one_kind_of_features_only(model, folder, tmp_path, change) -> None:
    embed_source(model, open_source(folder), tmp_path / "s", preprocessing=RULE)
    options = {"preprocessing": RULE} | change
    if options.pop("model", None):
        model = VisionTransformer(model.config).eval()
        model.init_weights()
    with pytest.raises(StoreError, match="another --out") as caught:
        embed_source(model, open_source(folder), tmp_path / "s", **options)
    assert len(str(caught.value).splitlines()) == 1


def bad_files(folder: Path) -> dict[str, str]:
    """Files that cannot be embedded, with a word of the reason; and beside them some odd ones that can."""
    whole = folder / "whole.jpg"
    image(1, 300, 200).save(whole)
    (folder / "cut.jpg").write_bytes(whole.read_bytes()[:2000])
    (folder / "empty.png").touch()
    (folder / "page.jpg").write_text("<!DOCTYPE html><html>")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    bomb = bytearray((folder / "0.png").read_bytes())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    import zlib

    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(bomb)
    image(2).convert("CMYK").save(folder / "cmyk.jpg")
    image(3).convert("P").save(folder / "palette.gif")
    Image.fromarray((np.arange(1600).reshape(40, 40) * 40).astype(np.uint16)).save(folder / "sixteen.png")
    image(4).convert("RGBA").save(folder / "alpha.webp")
    shutil.copy(folder / "alpha.webp", folder / "really-webp.jpg")
    image(5).save(folder / "moving.gif", save_all=True, append_images=[image(6)])
    return {
        "cut.jpg": "truncated",
        "empty.png": "empty",
        "page.jpg": "html",
        "dangling.png": "dangling",
        "bomb.png": "bomb",
    }


def test_unreadable_images_are_listed_with_reasons_and_never_stop_the_job(model, folder, tmp_path) -> None:
    bad = bad_files(folder)
    report = embed_source(model, open_source(folder), tmp_path / "s", preprocessing=RULE, batch_size=3)
    assert {Path(f.path).name for f in report.failures} == set(bad)
    for failure in report.failures:
        assert bad[Path(failure.path).name].lower() in failure.reason.lower()
        assert "\n" not in failure.reason
    assert report.embedded == 9 + 7
    again = embed_source(model, open_source(folder), tmp_path / "s", preprocessing=RULE)
    assert (len(again.failures), again.new_failures) == (len(bad), 0)  # recorded, not tried again, still reported
    shutil.copy(folder / "0.png", folder / "empty.png")
    mended = embed_source(model, open_source(folder), tmp_path / "s", preprocessing=RULE)
    assert (mended.embedded, mended.copied) == (0, 1)  # the content of a stored image needs no model
    assert len(EmbeddingStore.open(tmp_path / "s").failures()) == len(bad) - 1
    forced = embed_source(model, open_source(folder), tmp_path / "s", preprocessing=RULE, retry_failed=True)
    assert (forced.embedded, len(forced.failures)) == (0, len(bad) - 1)


def test_every_kind_of_source_gives_the_same_vectors(model, folder, tmp_path) -> None:
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folder.rglob("*.png"))
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for f in files:
            tar.add(f, f.name)
    (tmp_path / "list.txt").write_text("\n".join(str(f) for f in files))
    images = [{"bytes": f.read_bytes(), "path": f.name} for f in files]
    pq.write_table(pa.table({"image": images, "label": list(range(len(files)))}), tmp_path / "table.parquet")
    results = []
    for source in (folder, tmp_path / "shard.tar", tmp_path / "list.txt", tmp_path / "table.parquet"):
        store = tmp_path / f"{source.name}.store"
        assert embed_source(model, open_source(source), store, preprocessing=RULE).embedded == 9
        results.append({facts[0]: vector for facts, vector in rows(store).values()})
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for key in other:
            np.testing.assert_allclose(other[key], results[0][key], atol=1e-5)


def test_images_of_many_sizes_are_batched_by_size(model, folder, tmp_path) -> None:
    preprocessing = Preprocessing(shape="native")
    report = embed_source(model, open_source(folder), tmp_path / "s", preprocessing=preprocessing, batch_size=2)
    assert report.embedded == 9
    for path, (_, vector) in rows(tmp_path / "s").items():
        np.testing.assert_allclose(vector, embed(model, path, preprocessing=preprocessing).cls[0].numpy(), atol=1e-5)


def test_a_batch_that_does_not_fit_is_halved(model, folder) -> None:
    embedder = Embedder(model, RULE)
    source = open_source(folder)
    prepared = [pipeline.prepare_item(item, RULE) for item in source]
    expected = [row.vector for row in embedder.rows(prepared)]
    original, sizes = pipeline.vectors_of, []

    def scarce(net, batches, **options):
        ((x, _),) = batches
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return original(net, batches, **options)

    pipeline.vectors_of = scarce
    try:
        got = [row.vector for row in embedder.rows(prepared)]
    finally:
        pipeline.vectors_of = original
    assert max(sizes) == 9
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_ctrl_c_keeps_what_was_committed_and_the_next_run_finishes(model, folder, tmp_path) -> None:
    def stop(report) -> None:
        if report.embedded == 4 and not report.interrupted:
            raise KeyboardInterrupt

    report = embed_source(
        model, open_source(folder), tmp_path / "s", preprocessing=RULE, batch_size=2, on_progress=stop
    )
    assert report.interrupted
    assert len(rows(tmp_path / "s")) == 4
    report = embed_source(model, open_source(folder), tmp_path / "s", preprocessing=RULE)
    assert (report.embedded, report.skipped) == (5, 4)


def test_a_search_finds_the_image_itself_and_needs_the_same_weights(folder, tmp_path) -> None:
    import dinov3

    net = dinov3.load("dinov3_vits16", "random", seed=5)
    embed_source(net, open_source(folder), tmp_path / "s", preprocessing=RULE, pooling="mean")
    store = EmbeddingStore.open(tmp_path / "s")
    again, preprocessing = model_of(store)
    assert preprocessing == RULE
    vector = query_vector(store, folder / "4.png", again, preprocessing)
    hits = search(store, vector, top=3)
    assert hits[0].path == str(folder / "4.png")
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    from dinov3.weights.writing import save

    save(dinov3.load("dinov3_vits16", "random", seed=6), tmp_path / "other.safetensors")
    with pytest.raises(DinoError, match="was filled with"):
        model_of(store, weights=str(tmp_path / "other.safetensors"))


def test_a_store_finds_its_weights_again_from_any_folder(folder, tmp_path, monkeypatch, model) -> None:
    """A path given relative to one folder is kept absolute; the packaged model is kept by name, not by place."""
    import dinov3
    from dinov3.weights.writing import save

    monkeypatch.chdir(tmp_path)
    save(dinov3.load("dinov3_vits16", "random", seed=5), "own.safetensors")
    nets = {"file": dinov3.load(weights="own.safetensors"), "packaged": dinov3.load(), "python": model}
    for name, net in nets.items():
        embed_source(net, open_source(folder), tmp_path / name, preprocessing=RULE)
    monkeypatch.chdir("/")
    for name in ("file", "packaged"):
        again, _ = model_of(EmbeddingStore.open(tmp_path / name))
        assert Embedder(again, RULE).facts().model == EmbeddingStore.open(tmp_path / name).facts.model
    assert EmbeddingStore.open(tmp_path / "packaged").facts.weights == ""
    named = {
        EmbeddingStore.open(tmp_path / name).facts.model: dinov3.embed(net, image(0, 32, 32)).model
        for name, net in nets.items()
    }
    assert len(named) == 3
    assert list(named) == list(named.values())  # `Features` and the store name one model alike
    with pytest.raises(DinoError, match="pass --weights"):
        model_of(EmbeddingStore.open(tmp_path / "python"))


def test_a_large_store_gets_its_index(model, tmp_path, monkeypatch) -> None:
    from dinov3.embedding.search import index_status

    place = tmp_path / "many"
    place.mkdir()
    for i in range(300):  # an index needs 256 rows to be trained on
        image(i, 32, 32).save(place / f"{i}.png", compress_level=1)
    embed_source(model, open_source(place), tmp_path / "small", preprocessing=RULE, batch_size=64)
    assert index_status(EmbeddingStore.open(tmp_path / "small")) is None
    monkeypatch.setattr(pipeline, "EXACT_LIMIT", 299)
    embed_source(model, open_source(place), tmp_path / "large", preprocessing=RULE, batch_size=64)
    status = index_status(EmbeddingStore.open(tmp_path / "large"))
    assert status is not None
    assert status.indexed == 300


def test_unknown_pooling_is_refused_before_anything_is_made(model, folder, tmp_path) -> None:
    with pytest.raises(DinoError, match="pooling is one of"):
        embed_source(model, open_source(folder), tmp_path / "s", preprocessing=RULE, pooling="max")
    assert not (tmp_path / "s").exists()


def test_the_automatic_batch_is_small_on_the_cpu(model) -> None:
    assert auto_batch(model, RULE) == 16


# ---- killed at any moment -------------------------------------------------------------------------------------------

N_IMAGES = 400


def job(source: Path, store: Path) -> list[str]:
    options = shlex.split("--model dinov3_vits16 --weights random --size 32 --batch 2 --device cpu --strict")
    return [sys.executable, "-m", "dinov3", "embed", str(source), "--out", str(store), *options]


def commits(store: Path) -> list[Path]:
    return list((store / "images.lance" / "_versions").glob("*"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_job_ends_with_the_rows_of_an_undisturbed_one(tmp_path, kills: int) -> None:
    source, reference, store = tmp_path / "images", tmp_path / "reference", tmp_path / "store"
    source.mkdir()
    number = 20 * kills  # ten commits to each kill, which needs half of them
    for i in range(number):
        image(i, 32, 32).save(source / f"{i:03}.png", compress_level=1)
    (source / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(where: Path) -> subprocess.Popen:
        return subprocess.Popen(job(source, where), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert run(reference).wait() == 3  # one unreadable image
    draw, counts = random.Random(0), []
    for _ in range(kills):
        process, before, more = run(store), len(commits(store)), draw.randrange(8)
        # a random number of commits later (none: already while starting up), and a random moment after that commit
        while len(commits(store)) <= before + more and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.02)
        assert process.poll() is None, "the job ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        counts.append(len(rows(store)))
    assert counts == sorted(counts), "a committed row was lost"
    assert 0 < counts[0], counts
    assert counts[-1] < number, counts
    assert run(store).wait() == 3
    assert_same_rows(rows(store), rows(reference))
    failures = [[(f.path, f.reason) for f in EmbeddingStore.open(uri).failures()] for uri in (store, reference)]
    assert failures[0] == failures[1]
    assert len(failures[0]) == 1


def test_ctrl_c_is_noted_once_and_interrupts_the_second_time() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with listening() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_ctrl_c_on_the_command_says_how_to_continue(tmp_path) -> None:
    source, store = tmp_path / "images", tmp_path / "store"
    source.mkdir()
    for i in range(N_IMAGES):
        image(i, 32, 32).save(source / f"{i:03}.png", compress_level=1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is ignored here is ignored there
    process = subprocess.Popen(job(source, store), stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    while len(commits(store)) < 4 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "run the same command to continue" in said
    assert "Traceback" not in said
    assert 0 < len(rows(store)) < N_IMAGES


def test_batches_of_large_images_are_smaller_and_few_wait() -> None:
    def image(height: int, width: int) -> Prepared:
        x = torch.empty(1).expand(3, height, width)
        return Prepared(Item("a", "", Unreadable("")), "", x, Preprocessing().plan(8, 8))

    sizes = [
        [len(b) for b in batches_by_size([image(side, side) for side in sides], 16, print)]
        for sides in ([2048] * 12, [512] * 40)
    ]
    assert sizes == [[4, 4, 4], [16, 16, 8]]
    strips = [image(4000, 3000 + i) for i in range(20)]  # 144 MB each
    assert [len(b) for b in batches_by_size(iter(strips), 64, print)] == [1] * 20
    read = iter(strips)
    next(batches_by_size(read, 64, print))
    assert len(list(read)) >= 11  # a gigabyte was waiting
