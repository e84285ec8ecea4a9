"""The same job on many machines: Ray Data between the two halves of the pipeline.

The driver lists the source, leaves out what the store knows, and shards the rest by a hash of the path, so
that a shard's content does not depend on the cluster's size or on timing. Workers read, decode and run the model; the
driver commits whatever arrives, batch by batch, so a killed job continues as the single process does. Images must be
readable from the workers under the same paths. Rows are those of the single process. A worker that finds the content of
a stored image returns its hash only.

Left out: writing from the workers (one writer keeps the store's commits whole; vectors are small).
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from dinov3.data.sources import Item, Source
from dinov3.data.transforms.inputs import Preprocessing
from dinov3.embedding.pipeline import Embedder, Job, Report, Unchanged, auto_batch, batches_by_size, prepared
from dinov3.embedding.schema import Failure, PatchPrecision, Row
from dinov3.embedding.store import EmbeddingStore
from dinov3.errors import require
from dinov3.inference import faster

ITEMS_A_TASK = 64  # images a worker takes at a time: also what a killed worker repeats


class _Worker:
    """An actor: items in, rows or failures out. Holds the model for its lifetime."""

    def __init__(
        self, embedder_ref: Any, contents_ref: Any, batch_size: int, threads: int, device: str, precision: str
    ) -> None:
        import ray
        import torch

        embedder: Embedder = ray.get(embedder_ref)  # put once, fetched by each actor
        self.contents: frozenset[str] = ray.get(contents_ref)

        torch.set_num_threads(threads)
        self.embedder, self.batch_size, self.threads = embedder, batch_size, threads
        embedder.model = faster(embedder.model.to(device), precision)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        items: list[Item] = [pickle.loads(data) for data in batch["item"]]
        results: list[Row | Unchanged | Failure] = []
        ahead = prepared(items, self.embedder.preprocessing, self.threads, 2 * self.batch_size, self.contents)
        for group in batches_by_size(ahead, self.batch_size, results.append):
            results += self.embedder.rows(group)
        return {"result": [pickle.dumps(result) for result in results]}


def shard_of(path: str, shards: int) -> int:
    """Which shard a path belongs to: the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % shards


def embed_with_ray(
    model: nn.Module,
    source: Source,
    uri: str | os.PathLike[str],
    *,
    preprocessing: Preprocessing,
    pooling: str = "cls",
    patches: PatchPrecision = "none",
    batch_size: int | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    prune: bool = False,
    on_progress: Callable[[Report], None] | None = None,
    precision: str = "fp32",
) -> Report:
    """As `embed_source`, on a Ray cluster: RAY_ADDRESS names a running one, otherwise Ray starts locally, and
    is shut down at the end, its workers with it. A cluster that the program was connected to before stays connected.

    `model`: the plain one; each actor makes its form of `precision` (`inference.faster`).
    `workers`: actors, default one a GPU, or one for every two cores where there is none.
    """
    require("ray.data", "ray", "the ray engine")
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level=logging.WARNING, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    workers = workers or gpus or max(1, int(resources.get("CPU", 1)) // 2)
    device = "cuda" if gpus else "cpu"
    cpus = max(1, int(resources.get("CPU", 1)) // workers) if not gpus else 4

    embedder = Embedder(model, preprocessing, pooling, patches)
    batch_size = batch_size or auto_batch(model, preprocessing)

    def embed_items(job: Job, items: list[Item], contents: frozenset[str]) -> None:
        shards = max(1, min(len(items), 4 * workers, len(items) // ITEMS_A_TASK))
        items.sort(key=lambda item: (shard_of(item.path, shards), item.path))
        data = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=shards)
        results = data.map_batches(
            _Worker,
            fn_constructor_args=(ray.put(embedder), ray.put(contents), batch_size, cpus, device, precision),
            batch_size=min(ITEMS_A_TASK, -(-len(items) // workers)),
            concurrency=workers,
            num_cpus=cpus,
            num_gpus=1 if gpus else 0,
        )
        for block in results.iter_batches(batch_size=None, batch_format="numpy"):
            values = [pickle.loads(result) for result in block["result"]]
            for value in values:
                if not isinstance(value, Row):
                    job.aside(value)
            job.write([value for value in values if isinstance(value, Row)])

    interrupted = False
    facts = replace(embedder, model=faster(model, precision)).facts()
    with EmbeddingStore.open_or_create(uri, facts, source.root) as store:
        job = Job(store, source, retry_failed=retry_failed, prune=prune, on_progress=on_progress)
        try:
            if items := list(job.todo()):
                model.to("cpu")
                embed_items(job, items, frozenset(job.contents))
                job.flush()
            if job.again:
                embed_items(job, job.again, frozenset())
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if started:
                ray.shutdown()
        return job.close(interrupted)
