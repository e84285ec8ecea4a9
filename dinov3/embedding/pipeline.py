"""A folder of images into an embedding store: read, decode, prepare, run, commit; resumable at any moment.

The plot: what the store already knows is skipped; threads read and decode ahead; images of one input size form a
batch; every batch is one commit. An image that cannot be read goes to the store's `failed` table with its reason and
never stops the job. Whatever kills the process, the store holds whole batches, and the same command continues.

`prepare_item` and `Embedder` are the two halves that any engine runs (`ray_engine.py` puts a cluster between them).
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dinov3.data.sources import Item, Source
from dinov3.data.transforms.inputs import Geometry, Preprocessing
from dinov3.embedding.schema import Failure, PatchPrecision, Row, StoreFacts
from dinov3.embedding.search import EXACT_LIMIT, build_index
from dinov3.embedding.store import EmbeddingStore
from dinov3.errors import DinoError, ImageError, UnknownName, choices_sentence, one_of
from dinov3.features import Features, extract, prepare
from dinov3.threads import prefetched
from dinov3.weights import catalog
from dinov3.weights.identity import name_of

if TYPE_CHECKING:
    from dinov3.hub import Origin

POOLINGS = ("cls", "mean", "cls+mean")


@dataclass(frozen=True)
class Prepared:
    """One decoded image on its way to the model."""

    item: Item
    content_hash: str  # sha256 of the bytes
    input: Tensor  # [3, h, w], normalised
    geometry: Geometry


def prepare_item(item: Item, preprocessing: Preprocessing) -> Prepared | Failure:
    """Reads, hashes, decodes and transforms one image; what is wrong with it is returned, not raised."""
    try:
        data = item.read()
        x, geometry = prepare(data, preprocessing)
    except (ImageError, DinoError) as error:
        return Failure(item.path, item.stamp, str(error))
    return Prepared(item, hashlib.sha256(data).hexdigest(), x, geometry)


def pool(features: Features, pooling: str) -> Tensor:
    """One vector an image [B, D], or [B, 2D] for "cls+mean"."""
    if pooling == "cls":
        return features.cls
    if pooling == "mean":
        return features.mean
    if pooling == "cls+mean":
        return torch.cat([features.cls, features.mean], dim=-1)
    raise UnknownName(f"pooling {choices_sentence(pooling, POOLINGS)}")


def lasting_source(origin: Origin) -> str:
    """Where the weights will be found again, from any folder: absolute if it is a path, "" for a model that ships with
    the package, which is wherever the package is."""
    row = next((row for row in catalog.ROWS if row.id == origin.name), None)
    if row is not None and row.packaged_path is not None and origin.source == str(row.packaged_path):
        return ""
    return os.path.abspath(origin.source) if os.path.exists(origin.source) else origin.source


@dataclass
class Embedder:
    """Batches of prepared images to rows of the store. Halves the batch when the accelerator's memory runs out."""

    model: nn.Module
    preprocessing: Preprocessing
    pooling: str = "cls"
    patches: PatchPrecision = "none"

    def rows(self, batch: list[Prepared]) -> list[Row]:
        inputs = torch.stack([p.input for p in batch])
        try:
            (features,) = extract(self.model, [(inputs, [p.geometry for p in batch])], preprocessing=self.preprocessing)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise DinoError(
                    f"one image of {inputs.shape[-1]}×{inputs.shape[-2]} does not fit into the accelerator's memory; "
                    "use a smaller --size or --dtype bfloat16"
                ) from None
            torch.cuda.empty_cache()
            half = len(batch) // 2
            return self.rows(batch[:half]) + self.rows(batch[half:])
        vectors = pool(features, self.pooling).float().cpu().numpy()
        maps = features.patches.float().cpu().numpy() if self.patches != "none" else [None] * len(batch)
        return [
            Row(p.item.path, p.content_hash, p.item.stamp, p.geometry.width, p.geometry.height, vector, patches)
            for p, vector, patches in zip(batch, vectors, maps)
        ]

    def facts(self, vector_dtype: Literal["float32", "float16"] = "float32") -> StoreFacts:
        """Metadata of a store filled by this embedder."""
        origin = getattr(self.model, "origin", None)
        name = name_of(self.model)
        model: Any = self.model
        width = model.embed_dim
        return StoreFacts(
            model=name,
            dim=2 * width if self.pooling == "cls+mean" else width,
            patch_dim=width,
            preprocessing=self.preprocessing.id,
            preprocessing_json=self.preprocessing.to_json(),
            model_name=name.partition("@")[0],
            weights=lasting_source(origin) if origin is not None else "",
            pooling=self.pooling,
            layer=model.n_blocks - 1,
            vector_dtype=vector_dtype,
            patches=self.patches,
        )


@dataclass
class Report:
    """What a run did. `failed` counts the images of this source that are listed as unreadable, also from earlier runs."""

    found: int = 0
    embedded: int = 0
    skipped: int = 0  # in the store already
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def rate(self) -> float:
        """Images embedded a second."""
        return self.embedded / self.seconds if self.seconds else 0.0


@contextmanager
def listening() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, for the loop to ask between batches; pressed again, it interrupts at once.

    The exception that Python raises by default comes in the middle of whatever runs, a commit or a library's call. Where
    the signal is ignored (a job in the background), somebody else listens, or outside the main thread, nothing changes.
    """
    pressed = threading.Event()

    def note(_number: int, _frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed.is_set
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def auto_batch(model: Any, preprocessing: Preprocessing) -> int:
    """A batch size: small on the CPU, where larger ones gain nothing; by free memory on an accelerator."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return 16
    h, w = preprocessing.input_hw or (preprocessing.size, 2 * preprocessing.size)
    # activations at inference: about 40 values per token and channel in flight, and the input itself
    grid_h, grid_w = model.patch_grid(h, w)
    values = 40 * grid_h * grid_w * model.embed_dim + 3 * h * w
    free, _ = torch.cuda.mem_get_info(device)
    size = int(0.5 * free / (values * next(model.parameters()).element_size()))
    return max(1, min(512, 2 ** (size.bit_length() - 1) if size else 1))


def auto_workers(model: nn.Module) -> int:
    """Decoding threads: every core where the model has a device of its own; beside a model on the CPU half of them,
    since decoding is the smaller part and a thread too many makes the model's own threads wait for each other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2) if next(model.parameters()).device.type == "cpu" else cores


def todo(source: Source, store: EmbeddingStore, report: Report, *, retry_failed: bool = False) -> Iterator[Item]:
    """The items that the store does not hold in their present state; the rest is counted in the report.

    In a store an item is known by its absolute path, so that several folders with an `a.jpg` each can share one.
    """
    known = store.known()
    failed = {f.path: f for f in store.failures()}
    seen: set[str] = set()
    for item in source:
        item = replace(item, path=os.path.join(source.root, item.path))
        if item.path in seen:  # a list file may name an image twice
            continue
        seen.add(item.path)
        report.found += 1
        if known.get(item.path) == item.stamp:
            report.skipped += 1
        elif not retry_failed and item.path in failed and failed[item.path].stamp == item.stamp:
            report.failures.append(failed[item.path])
        else:
            yield item


def prepared(
    items: Iterable[Item], preprocessing: Preprocessing, workers: int, ahead: int
) -> Generator[Prepared | Failure, None, None]:
    """The items prepared by threads, in order, at most `ahead` of them before they are used."""
    # one thread a worker: the image's own resize must not start a thread pool inside each of them
    one_thread = partial(torch.set_num_threads, 1)
    return prefetched(partial(prepare_item, preprocessing=preprocessing), items, workers, ahead, initializer=one_thread)


def batches_by_size(
    prepared: Iterable[Prepared | Failure], batch_size: int, failed: Callable[[Failure], None]
) -> Iterator[list[Prepared]]:
    """Full batches of one input size each, then the rest. Failures go aside."""
    open_batches: dict[tuple[int, ...], list[Prepared]] = {}
    for p in prepared:
        if isinstance(p, Failure):
            failed(p)
            continue
        batch = open_batches.setdefault(tuple(p.input.shape), [])
        batch.append(p)
        if len(batch) == batch_size:
            del open_batches[tuple(p.input.shape)]
            yield batch
        elif sum(map(len, open_batches.values())) >= 4 * batch_size:
            # images of many sizes: let none wait for ever, and keep memory bounded
            yield open_batches.pop(max(open_batches, key=lambda s: len(open_batches[s])))
    yield from open_batches.values()


def write(store: EmbeddingStore, rows: list[Row], known: dict[str, str]) -> None:
    """One commit for new images, one for those whose file changed."""
    store.append([row for row in rows if row.path not in known])
    store.replace([row for row in rows if row.path in known])


def finish(store: EmbeddingStore) -> None:
    """The end of a job: one fragment instead of thousands, and an index where scanning would take too long."""
    store.compact()
    if len(store) > EXACT_LIMIT:
        build_index(store)


def embed_source(
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
    on_progress: Callable[[Report], None] | None = None,
) -> Report:
    """Embeds every image of `source` that the store at `uri` lacks; the report says what happened.

    `batch_size` None chooses one. `workers` decoding threads (`auto_workers` by default). Ctrl-C ends the job after
    the last commit with `report.interrupted`; nothing that was committed is lost. Raises `StoreError` where the store
    holds another model, preprocessing, pooling or precision.
    """
    one_of("pooling", pooling, POOLINGS)
    embedder = Embedder(model, preprocessing, pooling, patches)
    batch_size = batch_size or auto_batch(model, preprocessing)
    workers = workers or auto_workers(model)
    report, start = Report(), time.perf_counter()
    new_failures: list[Failure] = []

    def failed(failure: Failure) -> None:
        report.failures.append(failure)
        new_failures.append(failure)

    def tell() -> None:
        report.seconds = time.perf_counter() - start
        if on_progress:
            on_progress(report)

    with EmbeddingStore.open_or_create(uri, embedder.facts()) as store:
        known, known_failed = store.known(), store.known_failed()
        items = todo(source, store, report, retry_failed=retry_failed)
        try:
            ahead = prepared(items, preprocessing, workers, ahead=2 * batch_size + workers)
            with listening() as stop, closing(ahead):
                for batch in batches_by_size(ahead, batch_size, failed):
                    write(store, embedder.rows(batch), known)
                    report.embedded += len(batch)
                    mended = [p.item.path for p in batch if p.item.path in known_failed]
                    store.clear_failures(mended)
                    if new_failures:
                        store.record_failures(new_failures)
                        new_failures.clear()
                    tell()
                    if stop():
                        report.interrupted = True
                        break
        except KeyboardInterrupt:
            report.interrupted = True
        if new_failures:
            store.record_failures(new_failures)
        if report.embedded:
            finish(store)
        tell()
    return report


# ---- asking ---------------------------------------------------------------------------------------------------------


def model_of(
    store: EmbeddingStore, *, device: Any = "cpu", weights: str | None = None, backbone_weights: str | None = None
) -> tuple[nn.Module, Preprocessing]:
    """The model and preprocessing a store was filled with, so that a query is embedded the same way.

    Raises `DinoError` if the weights found are not those of the store.
    """
    from dinov3.hub import load

    facts = store.facts
    if is_text_aligned(facts):
        from dinov3.hub.dinotxt import ImageSide, open_towers, sources_of

        above, below = sources_of(facts.weights)
        towers = open_towers(weights or above, backbone_weights or below or None, device=device, dtype=_dtype_of(facts))
        return ImageSide(towers), _checked_preprocessing(store, ImageSide(towers), weights or above)
    source: str | None = weights or facts.weights or None
    seed = 0
    if source is None and facts.model_name not in {row.id for row in catalog.ROWS if row.packaged}:
        raise DinoError(f"{store.uri} does not say where its weights ({facts.model}) are: pass --weights")
    if source == "random":
        raise DinoError(
            f"{store.uri} was filled with random weights of no known seed: fill another with weights of a file"
        )
    if source is not None and source.startswith("random"):
        seed, source = int(source.removeprefix("random (seed ").removesuffix(")")), "random"
    name_or_file = None if facts.model_name == "custom" else facts.model_name
    model = load(name_or_file, source, device=device, dtype=_dtype_of(facts), seed=seed)
    return model, _checked_preprocessing(store, model, source or facts.model_name)


def _dtype_of(facts: StoreFacts) -> torch.dtype:
    for name in ("bfloat16", "float16"):
        if facts.model.endswith(f"-{name}"):
            return getattr(torch, name)
    return torch.float32


def _checked_preprocessing(store: EmbeddingStore, model: nn.Module, where: str) -> Preprocessing:
    """The store's preprocessing, if the model is the store's."""
    facts = store.facts
    preprocessing = Preprocessing.from_json(facts.preprocessing_json)
    found = Embedder(model, preprocessing, facts.pooling, facts.patches).facts().model
    if found != facts.model:
        raise DinoError(
            f"{where} is now {found}, but the store was filled with {facts.model}: pass --weights with the file used then"
        )
    return preprocessing


def is_text_aligned(facts: StoreFacts) -> bool:
    """Whether a store was filled by dino.txt, so that it can be searched by text."""
    from dinov3.hub.dinotxt import NAME, OWN

    return facts.model_name in (NAME, OWN)


def text_query(
    store: EmbeddingStore,
    text: str,
    *,
    device: Any = "cpu",
    weights: str | None = None,
    backbone_weights: str | None = None,
    vocabulary: str | None = None,
) -> Any:
    """The vector [D] of a sentence in the space of a store that dino.txt filled.

    Raises `DinoError` for a store of another model, for other weights than the store's, and for a sentence longer than
    the text tower's context.
    """
    facts = store.facts
    if not is_text_aligned(facts):
        raise DinoError(
            f"{store.uri} was filled by {facts.model_name}, which has no text tower: fill a store with `dinov3 embed --model "
            "dinov3_vitl16_dinotxt_tet1280d20h24l` and ask that one"
        )
    from dinov3.hub.dinotxt import ImageSide, open_model, sources_of

    above, below = sources_of(facts.weights)
    model, tokenizer = open_model(
        weights or above, backbone_weights or below or None, vocabulary, device=device, dtype=_dtype_of(facts)
    )
    _checked_preprocessing(store, ImageSide(model), weights or above)
    tokens = tokenizer.tokenize([text], model.text_config.context_length, too_long="refuse")
    with torch.inference_mode():
        vector = model.encode_text(tokens.to(device))[0].float().cpu()  # [E], class half and patch half
    half = len(vector) // 2
    return {"cls+mean": vector, "cls": vector[:half], "mean": vector[half:]}[facts.pooling].numpy()


def query_vector(store: EmbeddingStore, image: Any, model: nn.Module, preprocessing: Preprocessing) -> Any:
    """The vector [D] of one image (path, bytes, PIL, array), made exactly as the store's rows were."""
    from dinov3.features import embed

    features = embed(model, image, preprocessing=preprocessing)
    return pool(features, store.facts.pooling)[0].float().cpu().numpy()
