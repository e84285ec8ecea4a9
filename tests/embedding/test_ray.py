"""The Ray engine gives the rows of the single process, on two workers of a local cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_models import tiny_vit

from dinov3.data.sources import open_source
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.embedding.pipeline import embed_source
from dinov3.embedding.ray_engine import embed_with_ray, shard_of
from dinov3.embedding.store import EmbeddingStore

RULE = Preprocessing(size=32)


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="the ray extra is not installed")
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "images"
    place.mkdir()
    for i in range(150):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40 + i % 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i:03}.png")
    (place / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and nothing more")
    return place


@pytest.mark.slow
def test_two_workers_give_the_rows_of_one_process(cluster, folder, tmp_path) -> None:
    model = tiny_vit(depth=2, n_storage_tokens=4)
    options = {"preprocessing": RULE, "patches": "float16", "batch_size": 8}
    alone = embed_source(model, open_source(folder), tmp_path / "alone", **options)
    seen: list[int] = []
    spread = embed_with_ray(
        model,
        open_source(folder),
        tmp_path / "ray",
        workers=2,
        on_progress=lambda r: seen.append(r.embedded),
        **options,
    )
    assert (spread.found, spread.embedded, len(spread.failures)) == (alone.found, alone.embedded, 1) == (151, 150, 1)
    assert seen == sorted(seen)
    one, two = (EmbeddingStore.open(tmp_path / name) for name in ("alone", "ray"))
    assert one.facts == two.facts
    assert one.failures() == two.failures()
    tables = [sorted(s.rows().to_pylist(), key=lambda r: r["path"]) for s in (one, two)]
    assert tables[0] == tables[1]
    vectors = [dict(zip(*s.vectors())) for s in (one, two)]
    for path, vector in vectors[0].items():
        np.testing.assert_allclose(vectors[1][path], vector, atol=1e-5)
    some = sorted(vectors[0])[:5]
    np.testing.assert_allclose(np.stack(one.patches(some)), np.stack(two.patches(some)), atol=2e-3)

    again = embed_with_ray(model, open_source(folder), tmp_path / "ray", workers=2, **options)
    assert (again.embedded, again.skipped) == (0, 150)


def test_a_shard_is_a_function_of_the_path() -> None:
    shards = [shard_of(f"/photos/{i}.jpg", 4) for i in range(400)]
    assert shards == [shard_of(f"/photos/{i}.jpg", 4) for i in range(400)]
    assert min(shards.count(k) for k in range(4)) > 60


@pytest.mark.slow  # starts a cluster of its own
def test_a_cluster_that_the_job_started_ends_with_it(folder: Path, tmp_path: Path) -> None:
    code = """
import subprocess, sys, time
from dinov3.data.sources import open_source
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.embedding.ray_engine import embed_with_ray
from dinov3.models.architectures import ViTConfig
from dinov3.models.vit import VisionTransformer
model = VisionTransformer(ViTConfig(embed_dim=32, depth=2, num_heads=2)).eval()
model.init_weights()
report = embed_with_ray(model, open_source(sys.argv[1]), sys.argv[2], preprocessing=Preprocessing(size=32), batch_size=8)
for _ in range(50):  # the last ones need a moment
    left = subprocess.run(["pgrep", "-c", "-f", "ray::[_]Worker|ray::[M]apWorker"], capture_output=True, text=True).stdout
    if left.strip() == "0":
        break
    time.sleep(0.2)
import ray
print(report.embedded, ray.is_initialized(), left.strip())
"""
    done = subprocess.run([sys.executable, "-c", code, folder, tmp_path / "store"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "150 False 0", done.stderr[-2000:]
