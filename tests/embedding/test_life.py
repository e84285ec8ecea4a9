"""A store through ordinary life: its images are moved, touched, changed, copied, renamed, deleted; then its upkeep."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lancedb")

from dinov3.data.sources import open_source
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.embedding import pipeline
from dinov3.embedding.pipeline import Report, embed_source, is_gone
from dinov3.embedding.store import EmbeddingStore
from dinov3.models.architectures import ViTConfig
from dinov3.models.vit import VisionTransformer

N = 12


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    net = VisionTransformer(ViTConfig(embed_dim=32, depth=1, num_heads=2, n_storage_tokens=4))
    net.init_weights()
    return net.eval()


def draw(path: Path, seed: int) -> None:
    """A smooth picture with one bright rectangle, as JPEG."""
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

    def embed(self, folder: Path, **options: object) -> Report:
        options = {"preprocessing": Preprocessing(size=32), "patches": "int8", "batch_size": 4} | options
        return embed_source(self.model, open_source(folder), self.uri, **options)

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


def test_many_moves_are_committed_together(life, photos, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "ASIDE", 5)
    for path in sorted(photos.rglob("*.jpg")):
        path.rename(path.with_name(f"new {path.name}"))
    report = life.embed(photos)
    assert counts(report) == {"moved": N}
    assert len(life.vectors()) == N
