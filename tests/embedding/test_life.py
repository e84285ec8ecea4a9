"""A store through ordinary life: its images are moved, touched, changed, copied, renamed, deleted; then its upkeep."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lancedb")

from toy_models import tiny_vit
from typer.testing import CliRunner

from dinov3 import cli, neighbours
from dinov3.data.sources import open_sources
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.embedding import flat, manage, pipeline
from dinov3.embedding.pipeline import Report, embed_source, is_gone
from dinov3.embedding.schema import Row, StoreFacts
from dinov3.embedding.store import EmbeddingStore
from dinov3.errors import DinoError, StoreError, UnknownName
from dinov3.models.vit import VisionTransformer

N = 12


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return tiny_vit(depth=1, n_storage_tokens=4)


def draw(path: Path, seed: int) -> None:
    """A smooth image with one bright rectangle, as JPEG."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((96, 72), Image.Resampling.BICUBIC)
    x, y = rng.integers(0, 60, 2)
    image.paste((250, 240, int(rng.integers(256))), (int(x), int(y), int(x) + 20, int(y) + 12))
    image.save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "holiday").mkdir(parents=True)
    for i in range(N):
        draw(folder / ("holiday" if i % 3 == 0 else ".") / f"{i:02}.jpg", i)
    return folder


class Life:
    """Embeds into one store and counts how many images went through the model."""

    def __init__(self, model: VisionTransformer, uri: Path) -> None:
        self.model, self.uri = model, uri

    def embed(self, *sources: Path, **options: object) -> Report:
        options = {"preprocessing": Preprocessing(size=32), "patches": "int8", "batch_size": 4} | options
        return embed_source(self.model, open_sources(sources), self.uri, **options)

    def vectors(self) -> dict[str, np.ndarray]:
        paths, vectors = EmbeddingStore.open(self.uri).vectors()
        assert len(set(paths)) == len(paths)
        assert all(map(os.path.exists, paths))
        return dict(zip(paths, vectors))


@pytest.fixture
def life(model, photos, tmp_path) -> Life:
    life = Life(model, tmp_path / "store")
    assert life.embed(photos).embedded == N
    return life


def counts(report: Report) -> dict[str, int]:
    names = ("embedded", "replaced", "skipped", "moved", "copied", "touched", "pruned")
    found = {name: getattr(report, name) for name in names} | {"deleted": len(report.deleted)}
    return {name: count for name, count in found.items() if count}


def test_a_moved_folder_is_a_moved_root(life, photos, tmp_path) -> None:
    before = life.vectors()
    stored = EmbeddingStore.open(life.uri)._stored_rows(["path"])["path"].to_pylist()
    assert "holiday/00.jpg" in stored  # relative to the root
    elsewhere = photos.rename(tmp_path / "elsewhere")
    assert counts(life.embed(elsewhere)) == {"moved": N}
    after = life.vectors()
    assert {Path(p).relative_to(elsewhere) for p in after} == {Path(p).relative_to(photos) for p in before}
    for path, vector in after.items():
        np.testing.assert_array_equal(vector, before[str(photos / Path(path).relative_to(elsewhere))])
    assert counts(life.embed(elsewhere)) == {"skipped": N}


def test_a_folder_that_was_copied_and_deleted_is_moved_by_content(life, photos, tmp_path) -> None:
    for i, path in enumerate(sorted(photos.rglob("*.jpg"))):  # other names, other times
        (tmp_path / "flat").mkdir(exist_ok=True)
        shutil.copyfile(path, tmp_path / "flat" / f"image{i}.jpg")
    shutil.rmtree(photos)
    with EmbeddingStore.open(life.uri) as store:
        store.add_column("label", lambda path: Path(path).stem)
    assert counts(life.embed(tmp_path / "flat")) == {"moved": N}
    assert len(life.vectors()) == N
    labels = EmbeddingStore.open(life.uri).rows(["label"])["label"].to_pylist()
    assert sorted(labels) == [f"{i:02}" for i in range(N)]  # what belongs to an image goes with it


def test_renamed_touched_changed_copied_and_deleted_files_are_each_counted(life, photos, monkeypatch) -> None:
    before = life.vectors()
    (photos / "01.jpg").rename(photos / "renamed.jpg")
    os.utime(photos / "02.jpg", ns=(1, 1))
    draw(photos / "04.jpg", 100)
    shutil.copy(photos / "05.jpg", photos / "copy of 05.jpg")
    (photos / "07.jpg").unlink()
    report = life.embed(photos)
    assert counts(report) == {
        "embedded": 1, "replaced": 1, "skipped": N - 4, "moved": 1, "copied": 1, "touched": 1, "deleted": 1,
    }  # fmt: skip
    assert report.deleted == [str(photos / "07.jpg")]
    again = life.embed(photos, prune=True)
    assert counts(again) == {"skipped": N, "deleted": 1, "pruned": 1}
    after = life.vectors()
    assert len(after) == N
    np.testing.assert_array_equal(after[str(photos / "renamed.jpg")], before[str(photos / "01.jpg")])
    np.testing.assert_array_equal(after[str(photos / "copy of 05.jpg")], before[str(photos / "05.jpg")])
    assert np.abs(after[str(photos / "04.jpg")] - before[str(photos / "04.jpg")]).max() > 1e-3
    assert counts(life.embed(photos)) == {"skipped": N}


def test_swapped_and_rotated_names_end_with_the_right_vectors(life, photos) -> None:
    before = life.vectors()
    (photos / "01.jpg").rename(photos / "x")
    (photos / "02.jpg").rename(photos / "01.jpg")
    (photos / "x").rename(photos / "02.jpg")
    (photos / "04.jpg").rename(photos / "99.jpg")  # and a new image takes its name
    draw(photos / "04.jpg", 200)
    life.embed(photos)
    after = life.vectors()
    for new, old in (("01", "02"), ("02", "01"), ("99", "04")):
        np.testing.assert_allclose(after[str(photos / f"{new}.jpg")], before[str(photos / f"{old}.jpg")], atol=1e-5)
    assert len(after) == N + 1


def test_a_second_source_keeps_absolute_paths_and_reports_no_other_images_as_deleted(life, photos, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    draw(other / "01.jpg", 300)
    draw(other / "02.jpg", 301)
    assert counts(life.embed(other)) == {"embedded": 2}
    (other / "02.jpg").unlink()
    (photos / "01.jpg").unlink()
    assert life.embed(other).deleted == [str(other / "02.jpg")]
    assert life.embed(photos).deleted == [str(photos / "01.jpg")]
    stored = EmbeddingStore.open(life.uri)._stored_rows(["path"])["path"].to_pylist()
    assert str(other / "01.jpg") in stored


def test_an_unmounted_disk_does_not_make_another_folder_the_root(life, photos, tmp_path) -> None:
    away = photos.rename(tmp_path / "away")
    other = tmp_path / "other"
    other.mkdir()
    draw(other / "01.jpg", 300)
    assert counts(life.embed(other)) == {"embedded": 1}
    away.rename(photos)
    assert counts(life.embed(photos)) == {"skipped": N}


def test_a_failure_is_new_once(life, photos) -> None:
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert [(r.new_failures, len(r.failures)) for r in (life.embed(photos), life.embed(photos))] == [(1, 1), (0, 1)]
    (photos / "broken.jpg").unlink()
    assert life.embed(photos).failures == []
    assert EmbeddingStore.open(life.uri).failures() == []


def test_a_member_of_a_container_is_gone_with_it_and_an_escaped_name_is_not(tmp_path) -> None:
    (tmp_path / "a.tar").touch()
    assert not is_gone(str(tmp_path / "a.tar#x.jpg"))
    assert is_gone(str(tmp_path / "b.tar#x.jpg"))
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb"):
        assert not is_gone(str(tmp_path / "caf\\xe9.jpg"))


def test_a_folder_whose_name_is_no_utf8_is_embedded_and_moved(model, photos, tmp_path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(photos, folder)
    life = Life(model, tmp_path / "store")
    assert counts(life.embed(folder)) == {"embedded": N}
    assert counts(life.embed(folder)) == {"skipped": N}
    folder.rename(tmp_path / "elsewhere")
    with EmbeddingStore.open(life.uri) as store:
        assert manage.prune(store) == ([], {str(tmp_path / "caf\\xe9"): N})
    assert counts(life.embed(tmp_path / "elsewhere")) == {"moved": N}


def test_many_moves_are_committed_together(life, photos, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "ASIDE", 5)
    for path in sorted(photos.rglob("*.jpg")):
        path.rename(path.with_name(f"new {path.name}"))
    report = life.embed(photos)
    assert counts(report) == {"moved": N}
    assert len(life.vectors()) == N


def test_several_folders_and_images_on_one_command(life, photos, tmp_path, capsys) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for i in range(3):
        draw(other / f"{i}.jpg", 500 + i)
    options = ["--model", "dinov3_vits16", "--weights", "random", "--size", "32", "--device", "cpu", "--json"]

    def embed(*sources: Path) -> dict:
        arguments = ["embed", *map(str, sources), "--out", str(tmp_path / "many"), *options]
        done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    assert embed(photos / "01.jpg", photos / "02.jpg", other)["embedded"] == 5
    report = embed(photos, other)
    assert (report["found"], report["embedded"], report["skipped"]) == (N + 3, N - 2, 5)
    (other / "1.jpg").unlink()
    assert embed(photos, other, other / "0.jpg")["deleted"] == [str(other / "1.jpg")]
    gathered = tmp_path / "gathered"
    gathered.mkdir()
    photos.rename(gathered / "photos")
    other.rename(gathered / "other")
    report = embed(gathered / "photos", gathered / "other")
    assert (report["moved"], report["embedded"]) == (N + 2, 0)


def test_a_member_that_left_its_tar_is_deleted_and_a_file_with_a_hash_sign_is_not(model, photos, tmp_path) -> None:
    life = Life(model, tmp_path / "tars")

    def pack(*names: str) -> Path:
        with tarfile.open(tmp_path / "shard.tar", "w") as tar:
            for name in names:
                tar.add(photos / name, name)
        return tmp_path / "shard.tar"

    assert counts(life.embed(pack("01.jpg", "02.jpg"))) == {"embedded": 2}
    report = life.embed(pack("02.jpg"))
    assert report.deleted == [str(tmp_path / "shard.tar#01.jpg")]
    for n in (1, 2):
        shutil.copy(photos / f"0{n}.jpg", photos / f"a#{n}.jpg")
    second = Life(model, tmp_path / "hashes")
    second.embed(photos)
    assert second.embed(photos / "a#1.jpg", prune=True).deleted == []


# ---- upkeep ---------------------------------------------------------------------------------------------------------


def test_a_pruned_exported_verified_life(life, photos, tmp_path) -> None:
    """Deleted images are pruned, a duplicate is found, the export holds what the store holds, and it is whole."""
    shutil.copy(photos / "01.jpg", photos / "again.jpg")
    (photos / "02.jpg").unlink()
    (photos / "04.jpg").unlink()
    life.embed(photos)
    with EmbeddingStore.open(life.uri) as store:
        gone = [str(photos / "02.jpg"), str(photos / "04.jpg")]
        assert manage.prune(store, dry_run=True) == (gone, {})
        assert len(store) == N + 1
        assert manage.prune(store) == (gone, {})
        assert manage.duplicates(store, 1) == [[str(photos / "01.jpg"), str(photos / "again.jpg")]]
        with pytest.raises(UnknownName, match=r"holds no image '.*/agian.jpg'; did you mean '.*/again.jpg'"):
            manage.remove(store, [str(photos / "01.jpg"), str(photos / "agian.jpg")])
        assert manage.remove(store, [str(photos / "again.jpg")]) == 1
        store.add_column("label", {str(photos / "01.jpg"): "=cat"})
        for ending in ("parquet", "csv", "npy", "safetensors"):
            done = [0]
            assert manage.export(store, tmp_path / f"{ending}.{ending}", on_progress=done.append) == N - 2
            assert done == [*range(N - 1 if ending in ("csv", "npy") else 1)]  # the slow ones tell every row
        assert manage.verify(store).whole
        paths, vectors = store.vectors()
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    table = pq.read_table(tmp_path / "parquet.parquet")
    assert table["path"].to_pylist() == paths
    np.testing.assert_array_equal(np.stack(table["vector"].to_pylist()), vectors)
    np.testing.assert_array_equal(np.load(tmp_path / "npy.npy"), vectors)
    tensors = load_file(tmp_path / "safetensors.safetensors")
    np.testing.assert_array_equal(tensors["vectors"], vectors)
    assert json.loads(tensors["path"].tobytes()) == paths
    with open(tmp_path / "csv.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == paths
    np.testing.assert_array_equal([[np.float32(row[f"v{i}"]) for i in range(32)] for row in rows], vectors)
    assert {row["label"] for row in rows} == {"", "'=cat"}  # no formula in a spreadsheet
    with open(tmp_path / "npy.csv", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == paths


def test_an_export_replaces_no_file_unless_overwrite(life, photos) -> None:
    store, photo = EmbeddingStore.open(life.uri), photos / "table.csv"
    photo.write_text("mine")
    with pytest.raises(DinoError, match=r"table.csv exists already: give another name, or --overwrite"):
        manage.export(store, photo)
    with pytest.raises(DinoError, match=r"table.csv, where the columns of table.npy would be written, exists already"):
        manage.export(store, photos / "table.npy")
    assert photo.read_text() == "mine"
    manage.export(store, photo, overwrite=True)
    with pytest.raises(DinoError, match=r"the ending of an export is one of .parquet, .*, not '.xlsx'"):
        manage.export(store, photos / "a.xlsx")


@pytest.fixture
def disk(tmp_path) -> Path:
    """A second folder of three images beside `photos`."""
    folder = tmp_path / "disk" / "album"
    folder.mkdir(parents=True)
    for i in range(3):
        draw(folder / f"{i}.jpg", 500 + i)
    return folder


@pytest.mark.parametrize("mount_point", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_images_of_a_source_that_is_away_are_never_pruned(model, photos, disk, tmp_path, mount_point, together) -> None:
    life = Life(model, tmp_path / "store")
    for sources in [[photos, disk]] if together else [[photos], [disk]]:
        life.embed(*sources)
    disk.rename(tmp_path / "away")
    if mount_point:
        disk.mkdir()
    (photos / "01.jpg").unlink()
    shutil.rmtree(photos / "holiday")  # a folder inside a source is deleted, not away
    with EmbeddingStore.open(life.uri) as store:
        gone, kept = manage.prune(store)
        assert (len(gone), kept, len(store)) == (N // 3 + 1, {str(disk): 3}, N - N // 3 - 1 + 3)
    prune = ["store", "prune", str(life.uri)]
    done = CliRunner().invoke(cli.app, prune, catch_exceptions=False)
    state = "empty" if mount_point else "not there"
    assert f"3 images are under {disk}, which is {state}: kept. Mount its disk" in done.stderr
    assert "0 images removed" in done.stderr
    done = CliRunner().invoke(cli.app, [*prune, "--missing-sources"], catch_exceptions=False)
    assert done.stdout.splitlines() == [str(disk / f"{i}.jpg") for i in range(3)]


def test_all_images_of_a_root_that_is_away_are_kept(life, photos, tmp_path) -> None:
    photos.rename(tmp_path / "away")
    with EmbeddingStore.open(life.uri) as store:
        assert manage.prune(store) == ([], {str(photos): N})


def test_embed_with_prune_keeps_a_source_that_is_away(model, photos, disk, tmp_path) -> None:
    life = Life(model, tmp_path / "store")
    other = tmp_path / "other"
    shutil.copytree(disk, other)
    life.embed(photos, disk.parent, other)
    life.embed(disk)  # now a source of its own below another one
    disk.rename(tmp_path / "away")
    other.rename(tmp_path / "away2")
    draw(disk.parent / "new.jpg", 600)
    (photos / "01.jpg").unlink()
    report = life.embed(photos, disk.parent, prune=True)
    assert (report.deleted, report.pruned) == ([str(photos / "01.jpg")], 1)
    assert report.away == {str(disk): 3, str(other): 3}
    (tmp_path / "away").rename(disk)
    assert counts(life.embed(disk)) == {"skipped": 3}


def test_a_list_of_files_on_a_missing_disk_deletes_nothing(model, photos, disk, tmp_path) -> None:
    life = Life(model, tmp_path / "store")
    (tmp_path / "list.txt").write_text("disk/album/0.jpg\ndisk/album/1.jpg\nphotos/01.jpg\n")
    life.embed(tmp_path / "list.txt")
    disk.rename(tmp_path / "away")
    (photos / "01.jpg").unlink()
    report = life.embed(tmp_path / "list.txt", prune=True)
    assert (report.deleted, report.away) == ([str(photos / "01.jpg")], {str(disk): 2})


def test_a_link_that_leads_nowhere_deletes_nothing(life, model, photos, disk, tmp_path) -> None:
    (photos / "linked").symlink_to(disk)
    life.embed(photos)
    disk.rename(tmp_path / "away")
    report = life.embed(photos, prune=True)
    assert (report.deleted, report.away) == ([], {str(photos / "linked"): 3})
    (tmp_path / "elsewhere").mkdir()
    source = tmp_path / "link"
    source.symlink_to(photos)
    second = Life(model, tmp_path / "store2")
    second.embed(source)
    photos.rename(tmp_path / "photos2")
    with EmbeddingStore.open(second.uri) as store:
        assert manage.prune(store) == ([], {str(source): N})


def test_a_store_that_names_no_sources_goes_by_the_folders_of_its_images(life, photos, tmp_path) -> None:
    with EmbeddingStore.open(life.uri) as store:
        assert store.sources == [str(photos)]
        store._sources = []
        (photos / "holiday").rename(tmp_path / "away")
        (photos / "01.jpg").unlink()
        assert manage.prune(store) == ([str(photos / "01.jpg")], {str(photos / "holiday"): N // 3})


def test_the_sources_move_with_the_root_and_are_merged(life, photos, disk, model, tmp_path) -> None:
    life.embed(disk)
    assert EmbeddingStore.open(life.uri).sources == [str(photos), str(disk)]
    elsewhere = photos.rename(tmp_path / "elsewhere")
    life.embed(elsewhere)
    assert EmbeddingStore.open(life.uri).sources == [str(elsewhere), str(disk)]
    second = Life(model, tmp_path / "store2")
    second.embed(disk)
    with EmbeddingStore.open(second.uri) as store:
        manage.merge(store, EmbeddingStore.open(life.uri))
        assert store.sources == [str(disk), str(elsewhere)]


def test_clusters_and_outliers_of_known_vectors(tmp_path) -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(3, 8)
    facts = StoreFacts(model="tiny@1", dim=8, preprocessing="s")
    vectors = [centres[i % 3 if i < 24 else 0] + 0.05 * rng.standard_normal(8) for i in range(30)]
    vectors.append(np.eye(8)[7])
    with EmbeddingStore.create(tmp_path / "s", facts) as store:
        store.append([Row(f"{i:02}", f"{i}", "1", 1, 1, v) for i, v in enumerate(vectors)])
        found = manage.clusters(store, 4)
        assert [list(found.values()).count(c) for c in range(4)] == [14, 8, 8, 1]
        assert found["30"] == 3
        for start in range(3):
            assert len({found[f"{i:02}"] for i in range(start, 24, 3)}) == 1
        assert manage.clusters(store, 4) == found
        ((path, score),) = manage.outliers(store, 1)
        assert path == "30"
        assert score < 0.2
        with pytest.raises(StoreError, match="40 clusters of 31 images"):
            manage.clusters(store, 40)
        groups = manage.duplicates(store, 0.8)
        assert [len(group) for group in groups] == [14, 8, 8]


def test_components_are_those_of_the_plain_loop(monkeypatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    monkeypatch.setattr(neighbours, "CHUNK", 11)
    x = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)
    x[40:50] = x[3]  # copies
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for threshold in (0.9, 0.98, 0.999):
        linked = unit @ unit.T >= threshold
        expected = np.arange(60)
        for _ in range(60):
            expected = np.array([expected[linked[i]].min() for i in range(60)])
        assert neighbours.components(x, threshold).tolist() == expected.tolist()


def test_stores_are_merged_with_columns_and_failures(model, life, photos, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    draw(other / "x.jpg", 400)
    (other / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    second = Life(model, tmp_path / "store2")
    second.embed(other)
    second.embed(photos)
    with EmbeddingStore.open(second.uri) as store:
        store.add_column("label", {str(other / "x.jpg"): "new", str(photos / "01.jpg"): "old"})
        vectors = dict(zip(*store.vectors()))
        patches = store.patches([str(other / "x.jpg")])[0]
    with EmbeddingStore.open(life.uri) as store, EmbeddingStore.open(second.uri) as added:
        assert manage.merge(store, added) == 1
        assert manage.merge(store, added) == 0
        assert manage.verify(store).whole
        merged = dict(zip(*store.vectors()))
        np.testing.assert_array_equal(merged[str(other / "x.jpg")], vectors[str(other / "x.jpg")])
        np.testing.assert_array_equal(store.patches([str(other / "x.jpg")])[0], patches)
        assert store.count("label = 'new'") == 1
        assert [Path(f.path).name for f in store.failures()] == ["broken.jpg"]
    facts = StoreFacts(model="tiny@1", dim=8, preprocessing="s")
    with EmbeddingStore.create(tmp_path / "third", facts) as third, EmbeddingStore.open(life.uri) as store:
        assert len(third) == 0
        with pytest.raises(StoreError, match="holds embeddings with model"):
            manage.merge(store, third)


def test_changed_bytes_are_found_and_mended(life, photos) -> None:
    """One flipped bit in each of the places that hold features; none goes unnoticed."""
    with EmbeddingStore.open(life.uri) as store:
        _, vectors = store.vectors()
    (data,) = (life.uri / "images.lance" / "data").iterdir()
    whole = data.read_bytes()
    vector = vectors[5].tobytes()
    at = whole.find(vector[:16])
    assert at > 0
    data.write_bytes(whole[: at + 3] + bytes([whole[at + 3] ^ 64]) + whole[at + 4 :])
    with EmbeddingStore.open(life.uri) as store:
        found = manage.verify(store)
        assert (found.rows, len(found.damaged), found.problems) == (N, 1, [])
        manage.verify(store, repair=True)
        assert manage.verify(store).whole
    assert counts(life.embed(photos)) == {"embedded": 1, "skipped": N - 1}
    assert manage.verify(EmbeddingStore.open(life.uri)).whole


@pytest.mark.slow
def test_a_hundred_damaged_files_are_errors_or_found(life, tmp_path) -> None:
    reference = dict(zip(*EmbeddingStore.open(life.uri).vectors()))
    rng = random.Random(0)
    silent = []
    for n in range(100):
        copy = tmp_path / f"damaged{n}"
        shutil.copytree(life.uri, copy)
        file = rng.choice([f for f in sorted((copy / "images.lance").rglob("*")) if f.is_file()])
        content = bytearray(file.read_bytes())
        for _ in range(rng.choice([1, 4, 64])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        try:
            store = EmbeddingStore.open(copy)
            same = {p: v.tobytes() for p, v in zip(*store.vectors())} == {p: v.tobytes() for p, v in reference.items()}
            if not same and manage.verify(store).whole:
                silent.append(file.relative_to(copy))
        except DinoError:
            pass
        shutil.rmtree(copy)
    assert silent == []


def test_a_lost_table_of_failures_is_noticed_and_mended(life, photos) -> None:
    shutil.rmtree(life.uri / "failed.lance")
    with pytest.raises(StoreError, match=r"table 'failed' of unreadable images is lost; .*store verify .* --repair"):
        life.embed(photos)
    with EmbeddingStore.open(life.uri) as store:
        assert not manage.verify(store, repair=True).whole
        assert manage.verify(store).whole
    assert counts(life.embed(photos)) == {"skipped": N}


def test_the_verbs_of_store_are_commands(life, photos, tmp_path, capsys) -> None:
    def run(*arguments: object) -> str:
        done = CliRunner().invoke(cli.app, ["store", *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    assert json.loads(run("info", life.uri, "--json"))["images"] == N
    assert json.loads(run("duplicates", life.uri, "--threshold", 1, "--json")) == []
    assert len(run("clusters", life.uri, "-k", 3, "--column", "group").splitlines()) == N
    assert len(run("outliers", life.uri, "--top", 4).splitlines()) == 4
    run("export", life.uri, tmp_path / "out.parquet", "--where", "width > 50")
    run("remove", life.uri, photos / "01.jpg")
    (photos / "02.jpg").rename(photos / "\n.txt")
    assert run("prune", life.uri).strip() == str(photos / "02.jpg")
    run("compact", life.uri)
    shutil.copytree(life.uri, tmp_path / "copy")
    run("merge", life.uri, tmp_path / "copy")
    run("merge", tmp_path / "all", life.uri, tmp_path / "copy")
    merged = EmbeddingStore.open(tmp_path / "all")
    assert (len(merged), merged.root, merged.sources) == (N - 2, str(photos), [str(photos)])
    run("compact", life.uri, "--flat")
    assert json.loads(run("verify", life.uri, "--json"))["whole"]
    assert json.loads(run("info", life.uri, "--json"))["images"] == N - 2


def test_a_flat_index_is_made_on_request_and_brought_up_to_date_by_every_job(life, photos) -> None:
    def rows_of_the_file() -> int:
        (file,) = life.uri.glob(f"{flat.FOLDER}/*/{flat.VECTORS}")
        with EmbeddingStore.open(life.uri) as store:
            assert file.parent == flat.write(store)  # of the present version: nothing is written
        return len(np.load(file))

    assert not (life.uri / flat.FOLDER).exists()
    with EmbeddingStore.open(life.uri) as store:
        manage.compact(store, flat_index=True)
    assert rows_of_the_file() == N
    shutil.copy(photos / "01.jpg", photos / "copy.jpg")
    assert counts(life.embed(photos)) == {"skipped": N, "copied": 1}
    assert rows_of_the_file() == N + 1
    with EmbeddingStore.open(life.uri) as store:
        store.add_column("label", lambda path: "a")
        manage.compact(store)
    assert rows_of_the_file() == N + 1
