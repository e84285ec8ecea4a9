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
from collections import Counter
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dinov3.data.sources import Item, Source, read_stored
from dinov3.data.sources.items import spellings
from dinov3.data.transforms.inputs import Geometry, Preprocessing
from dinov3.embedding import flat
from dinov3.embedding.schema import Failure, PatchPrecision, Row, StoreFacts
from dinov3.embedding.search import EXACT_LIMIT, build_index
from dinov3.embedding.store import Copy, EmbeddingStore
from dinov3.errors import DinoError, ImageError, one_of
from dinov3.features import POOLINGS, auto_workers, extract, pool, prepare, vectors_of
from dinov3.threads import MOST_BYTES, prefetched
from dinov3.weights import catalog
from dinov3.weights.identity import name_of

if TYPE_CHECKING:
    from dinov3.hub import Origin


@dataclass(frozen=True)
class Prepared:
    """One decoded image on its way to the model."""

    item: Item
    content_hash: str  # sha256 of the bytes
    input: Tensor  # [3, h, w], normalised
    geometry: Geometry


@dataclass(frozen=True)
class Unchanged:
    """An item whose content the store holds already, under this path or another."""

    item: Item
    content_hash: str


def prepare_item(
    item: Item, preprocessing: Preprocessing, contents: Container[str] = ()
) -> Prepared | Unchanged | Failure:
    """Reads, hashes, decodes and transforms one image; what is wrong with it is returned, not raised.

    An image whose hash is among `contents` is not decoded.
    """
    try:
        data = item.read()
        content_hash = hashlib.sha256(data).hexdigest()
        if content_hash in contents:
            return Unchanged(item, content_hash)
        x, geometry = prepare(data, preprocessing)
    except (ImageError, DinoError) as error:
        return Failure(item.path, item.stamp, str(error))
    return Prepared(item, content_hash, x, geometry)


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
        given = [(inputs, [p.geometry for p in batch])]
        maps: Any = [None] * len(batch)
        try:
            if self.patches == "none":
                (pooled,) = vectors_of(self.model, given, preprocessing=self.preprocessing, pooling=self.pooling)
            else:
                (features,) = extract(self.model, given, preprocessing=self.preprocessing)
                pooled, maps = pool(features, self.pooling).float(), features.patches.float().cpu().numpy()
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise DinoError(
                    f"one image of {inputs.shape[-1]}×{inputs.shape[-2]} does not fit into the accelerator's memory; "
                    "use a smaller --size or --precision bf16"
                ) from None
            torch.cuda.empty_cache()
            half = len(batch) // 2
            return self.rows(batch[:half]) + self.rows(batch[half:])
        return [
            Row(p.item.path, p.content_hash, p.item.stamp, p.geometry.width, p.geometry.height, vector, patches)
            for p, vector, patches in zip(batch, pooled.cpu().numpy(), maps)
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
    """Counts of a run. `failures` are the unreadable images of this source, also those of earlier runs."""

    found: int = 0
    embedded: int = 0  # by the model: new images and changed ones
    replaced: int = 0  # of these, the changed ones
    skipped: int = 0  # in the store already
    moved: int = 0  # renamed in the store
    copied: int = 0  # new paths with the content of a stored image
    touched: int = 0  # a new time of modification, the same content
    deleted: list[str] = field(default_factory=list)  # stored, but gone from the source
    pruned: int = 0  # of these, removed from the store
    away: dict[str, int] = field(default_factory=dict)  # folder that is not there → its images, which are kept
    failures: list[Failure] = field(default_factory=list)
    new_failures: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def done(self) -> int:
        return self.embedded + self.skipped + self.moved + self.copied + self.touched + len(self.failures)

    @property
    def rate(self) -> float:
        """Images embedded a second."""
        return self.embedded / self.seconds if self.seconds else 0.0


@contextmanager
def listening() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, for the loop to check between batches; pressed again, it interrupts at once.

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


def streams_of(model: nn.Module) -> int:
    """How many batches are computed at a time: of a fast form on a CPU two with half of the threads each, which wait less for
    one another beside other work. Calls of other models may not overlap."""
    if not hasattr(model, "form") or next(model.parameters()).device.type != "cpu":
        return 1
    return min(MOST_STREAMS, torch.get_num_threads())


MOST_STREAMS = 2  # more were not measured
ASIDE = 500  # renames, copies, touches and failures that are committed together


class Job:
    """One run of a source into a store: which items are to do, the commits of their results, and the report.

    In a store an item is known by its absolute path, so that several folders with an `a.jpg` each can share one.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        source: Source,
        *,
        retry_failed: bool = False,
        prune: bool = False,
        on_progress: Callable[[Report], None] | None = None,
    ) -> None:
        self.store, self.source, self.retry_failed, self.prune = store, source, retry_failed, prune
        self.on_progress, self.report, self.start = on_progress, Report(), time.perf_counter()
        self.root_moved = follow_root(store, source)
        store.add_sources(source.folders)
        table = store.rows(["path", "stamp", "content_hash"])
        self.stamps = dict(zip(table["path"].to_pylist(), table["stamp"].to_pylist()))
        self.hashes = dict(zip(table["path"].to_pylist(), table["content_hash"].to_pylist()))
        self.failed = {failure.path: failure for failure in store.failures()}
        self.contents: dict[str, list[str]] = {}  # content hash → stored paths; filled when an item must be read
        self.seen: set[str] = set()
        self.again: list[Item] = []  # to be embedded after all
        self.unchanged: list[Unchanged] = []
        self.new_failures: list[Failure] = []

    def todo(self) -> Iterator[Item]:
        """The items that the store does not hold in their present state; the others are counted."""
        report = self.report
        for item in self.source:
            item = replace(item, path=os.path.join(self.source.root, item.path))
            if item.path in self.seen:  # a list file may name an image twice
                continue
            self.seen.add(item.path)
            report.found += 1
            failure = self.failed.get(item.path)
            if self.stamps.get(item.path) == item.stamp:
                report.moved += self.root_moved
                report.skipped += not self.root_moved
            elif not self.retry_failed and failure is not None and failure.stamp == item.stamp:
                report.failures.append(failure)
            else:
                if not self.contents:
                    for path, content_hash in self.hashes.items():
                        self.contents.setdefault(content_hash, []).append(path)
                yield item

    def aside(self, result: Unchanged | Failure) -> None:
        """A result that needs no model."""
        if isinstance(result, Unchanged):
            self.unchanged.append(result)
        else:
            old = self.failed.get(result.path)
            self.report.failures.append(result)
            self.report.new_failures += old is None or old.stamp != result.stamp
            self.new_failures.append(result)
        if len(self.unchanged) + len(self.new_failures) >= ASIDE:
            self.flush()

    def write(self, rows: list[Row]) -> None:
        """One commit for new images, one for those whose file changed."""
        changed = [row for row in rows if row.path in self.stamps]
        self.store.append([row for row in rows if row.path not in self.stamps])
        self.store.replace(changed)
        self._mended(row.path for row in rows)
        self.report.embedded += len(rows)
        self.report.replaced += len(changed)
        if self.new_failures:
            self.flush()
        self.tell()

    def flush(self) -> None:
        """Commits what came aside."""
        failures, self.new_failures = self.new_failures, []
        self.store.record_failures(failures)
        results, self.unchanged = self.unchanged, []
        touched: dict[str, str] = {}
        moves: list[Copy] = []
        copies: list[Copy] = []
        taken: set[str | None] = set()
        for result in results:
            path, content_hash = result.item.path, result.content_hash
            if self.hashes.get(path) == content_hash:
                touched[path] = result.item.stamp
            elif path in self.stamps:  # changed to what another image is or was
                self.again.append(result.item)
            else:
                old = self.contents[content_hash]
                gone = next((p for p in old if p not in taken and p not in self.seen and is_gone(p)), None)
                taken.add(gone)
                (copies if gone is None else moves).append(Copy(gone or old[0], path, result.item.stamp, content_hash))
        if touched:
            self.store.touch(touched)
        items = {result.item.path: result.item for result in results}
        lost = self.store.rename(moves)
        for move in moves:
            if move not in lost:  # further copies are made of the row under its new path
                self.contents[move.content_hash] = [move.new] + [
                    p for p in self.contents[move.content_hash] if p != move.old
                ]
                self.stamps.pop(move.old, None)
        copies = [replace(c, old=self.contents[c.content_hash][0]) for c in copies]
        lost = lost + self.store.copy(copies)
        self.again += [items[copy.new] for copy in lost]
        lost_paths = {copy.new for copy in lost}
        self._mended(set(items) - lost_paths)
        self.report.touched += len(touched)
        self.report.moved += sum(m.new not in lost_paths for m in moves)
        self.report.copied += sum(c.new not in lost_paths for c in copies)
        self.tell()

    def close(self, interrupted: bool) -> Report:
        """The end of the run: what is gone from the source, one fragment instead of thousands, an index if need be."""
        report = self.report
        report.interrupted = report.interrupted or interrupted
        self.flush()
        if not report.interrupted:
            self._sweep()
        if report.embedded or report.moved or report.copied or report.pruned:
            self.store.compact()
            if len(self.store) > EXACT_LIMIT:
                build_index(self.store)
        flat.refresh(self.store)
        self.tell()
        return report

    def _sweep(self) -> None:
        """Stored images of this source that are gone; their failures are dropped, their rows only with `prune`. Those of a
        source that is away are kept."""
        base = self.source.root.rstrip(os.sep) + os.sep
        containers = {path.partition("#")[0] for path in self.seen if "#" in path}
        unreadable = {failure.path for failure in self.report.failures}

        def gone(path: str) -> bool:
            below = path.startswith(base) and path not in self.seen
            if not (below or path in unreadable):
                return False
            listed = path.partition("#")[0] in containers and not os.path.lexists(path)  # its container was read anew
            return listed or is_gone(path)

        lost = {path for path in [*self.stamps, *self.failed] if gone(path)}
        kept = away(self.store, lost)
        self.report.away = dict(Counter(folder for path, folder in kept.items() if path in self.stamps))
        lost -= kept.keys()
        self.report.deleted = sorted(lost & self.stamps.keys())
        if self.prune and self.report.deleted:
            self.report.pruned = self.store.remove(self.report.deleted)
        self.store.clear_failures(lost & self.failed.keys() - self.seen)

    def _mended(self, paths: Iterable[str]) -> None:
        if self.failed:
            self.store.clear_failures(path for path in paths if path in self.failed)

    def tell(self) -> None:
        self.report.seconds = time.perf_counter() - self.start
        if self.on_progress:
            self.on_progress(self.report)


def is_gone(path: str) -> bool:
    """Whether the file of a stored path no longer exists. A folder that cannot be read does not say so.

    A member of a tar or a row of a table (`shard.tar#name`) exists while the container does.
    """
    for end in [len(path), *(i for i, letter in enumerate(path) if letter == "#")]:
        for spelling in spellings(path[:end]):
            try:
                os.lstat(spelling)
                return False
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValueError):
                return False
    return True


def away(store: EmbeddingStore, gone: Iterable[str]) -> dict[str, str]:
    """{path: folder} of those of these paths without a file whose source folder is away: it does not exist, or is empty as
    the mount point of a disk that is not mounted. Nobody knows then whether the image was deleted.

    A path below none of the store's sources (from a list file, say) goes by its own folder; any goes by a link above it.
    """
    sources, found = store.sources, {}
    is_away, existing = cache(_is_away), cache(_nearest_existing)
    for path in gone:
        folder = os.path.dirname(path.partition("#")[0]) or "."
        above = [s for s in sources if path.startswith(s.rstrip(os.sep) + os.sep)] or [folder]
        if os.path.islink(existing(folder)):
            above.append(existing(folder))
        if (missing := next(filter(is_away, above), None)) is not None:
            found[path] = missing
    return found


def _is_away(folder: str) -> bool:
    for spelling in spellings(folder):
        try:
            with os.scandir(spelling) as entries:
                return next(entries, None) is None
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            break
    return True


def _nearest_existing(folder: str) -> str:
    while not os.path.lexists(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    return folder


def follow_root(store: EmbeddingStore, source: Source) -> bool:
    """Whether the store's root was moved to where the source is; the store then takes that as its root.

    That is so if the old root is gone and most images have the names and sizes of stored ones.
    """
    if not store.root or source.root == store.root or not is_gone(store.root):
        return False
    table = store.rows(["path", "stamp"])
    names = map(store.stored, table["path"].to_pylist())
    sizes = {n: s.partition("-")[0] for n, s in zip(names, table["stamp"].to_pylist()) if not os.path.isabs(n)}
    base = source.root.rstrip(os.sep) + os.sep
    found = ((os.path.join(base, item.path).removeprefix(base), item.stamp.partition("-")[0]) for item in source)
    same = sum(sizes.get(name) == size for name, size in found)
    if 2 * same <= min(len(sizes), len(source)):
        return False
    store.set_root(source.root)
    return True


def prepared(
    items: Iterable[Item], preprocessing: Preprocessing, workers: int, ahead: int, contents: Container[str] = ()
) -> Generator[Prepared | Unchanged | Failure, None, None]:
    """The items prepared by threads, in order, at most `ahead` of them before they are used."""
    # one thread a worker: the image's own resize must not start a thread pool inside each of them
    one_thread = partial(torch.set_num_threads, 1)
    make = partial(prepare_item, preprocessing=preprocessing, contents=contents)
    return prefetched(make, items, workers, ahead, initializer=one_thread)


def batches_by_size(
    prepared: Iterable[Prepared | Unchanged | Failure], batch_size: int, aside: Callable[[Unchanged | Failure], None]
) -> Iterator[list[Prepared]]:
    """Batches of one input size each, then the rest. What needs no model goes aside. A full batch has `batch_size` images of
    a megapixel, or as many fewer as they are larger."""
    open_batches: dict[tuple[int, ...], list[Prepared]] = {}
    for p in prepared:
        if not isinstance(p, Prepared):
            aside(p)
            continue
        batch = open_batches.setdefault(tuple(p.input.shape), [])
        batch.append(p)
        if len(batch) == batch_size or (len(batch) + 1) * p.input[0].numel() > batch_size << 20:
            del open_batches[tuple(p.input.shape)]
            yield batch
            continue
        sizes = {shape: len(waiting) * waiting[0].input.nbytes for shape, waiting in open_batches.items()}
        if sum(map(len, open_batches.values())) >= 4 * batch_size or sum(sizes.values()) > MOST_BYTES:
            # images of many sizes: let none wait for ever, and keep memory bounded
            yield open_batches.pop(max(sizes, key=lambda shape: sizes[shape]))
    yield from open_batches.values()


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
    prune: bool = False,
    on_progress: Callable[[Report], None] | None = None,
) -> Report:
    """Embeds every image of `source` that the store at `uri` lacks; returns counts.

    An image is known by its content: a moved file is renamed in the store, a touched one stays, a changed one is
    replaced, a deleted one reported and with `prune` removed. `batch_size` None chooses one. `workers` decoding threads
    (`auto_workers` by default). Ctrl-C ends the job after the last commit with `report.interrupted`; nothing that was
    committed is lost. Raises `StoreError` where the store holds another model, preprocessing, pooling or precision.
    """
    one_of("pooling", pooling, POOLINGS)
    embedder = Embedder(model, preprocessing, pooling, patches)
    streams = streams_of(model)
    batch_size = batch_size or min(auto_batch(model, preprocessing), -(-len(source) // streams) or 1)
    workers = workers or auto_workers(model)
    some_threads = partial(torch.set_num_threads, max(1, torch.get_num_threads() // streams))

    def embed_items(job: Job, items: Iterable[Item], contents: Container[str], stop: Callable[[], bool]) -> None:
        ahead = prepared(items, preprocessing, workers, (1 + streams) * batch_size + workers, contents)
        batches = batches_by_size(ahead, batch_size, job.aside)
        computed = prefetched(embedder.rows, batches, streams if streams > 1 else 0, initializer=some_threads)
        with closing(ahead), closing(computed):
            for rows in computed:
                job.write(rows)
                if stop():
                    job.report.interrupted = True
                    return

    interrupted = False
    with EmbeddingStore.open_or_create(uri, embedder.facts(), source.root) as store:
        job = Job(store, source, retry_failed=retry_failed, prune=prune, on_progress=on_progress)
        try:
            with listening() as stop:
                embed_items(job, job.todo(), job.contents, stop)
                if not job.report.interrupted:
                    job.flush()
                    embed_items(job, job.again, (), stop)
        except KeyboardInterrupt:
            interrupted = True
        return job.close(interrupted)


# ---- queries --------------------------------------------------------------------------------------------------------


def model_of(
    store: EmbeddingStore,
    *,
    device: Any = "cpu",
    weights: str | None = None,
    backbone_weights: str | None = None,
    lasting: bool = False,
) -> tuple[nn.Module, Preprocessing]:
    """The model and preprocessing a store was filled with, so that a query is embedded the same way.

    lasting: it serves many queries, so that its fast form is worth the wait; the plain model is ready sooner.
    Raises `DinoError` if the weights found are not those of the store.
    """
    from dinov3.hub import load

    facts = store.facts
    if is_text_aligned(facts):
        from dinov3.hub.published_heads import ImageSide, open_towers, sources_of

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
    precision = facts.model.rpartition("-")[2]  # of a fast form; that of fp32 has the plain model's name
    fast = precision if precision in ("bf16", "int8", "fp8") else "fp32" if lasting else None
    form = {"fast": fast} if fast and _dtype_of(facts) == torch.float32 else {"dtype": _dtype_of(facts)}
    model = load(name_or_file, source, device=device, seed=seed, **form)
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
    return facts.model_name in catalog.DINOTXT


def both_sides(
    store: EmbeddingStore,
    *,
    device: Any = "cpu",
    weights: str | None = None,
    backbone_weights: str | None = None,
    vocabulary: str | None = None,
) -> tuple[nn.Module, Preprocessing, Callable[[str], np.ndarray]]:
    """Of a store that dino.txt filled: the model and preprocessing of its images, as `model_of`, and what makes a sentence a
    vector [D] in the store's space, with one set of weights.

    Raises `DinoError` for a store of another model and for other weights than the store's; the function for a sentence longer
    than the text tower's context.
    """
    facts = store.facts
    if not is_text_aligned(facts):
        raise DinoError(
            f"{store.uri} was filled by {facts.model_name}, which has no text tower: fill a store with `dinov3 embed --model "
            "dinov3_vitl16_dinotxt_tet1280d20h24l` and ask that one"
        )
    from dinov3.hub.published_heads import ImageSide, open_model, sources_of

    above, below = sources_of(facts.weights)
    model, tokenizer = open_model(
        weights or above, backbone_weights or below or None, vocabulary, device=device, dtype=_dtype_of(facts)
    )
    images = ImageSide(model)

    def vector_of(text: str) -> np.ndarray:
        tokens = tokenizer.tokenize([text], model.text_config.context_length, too_long="refuse")
        with torch.inference_mode():
            vector = model.encode_text(tokens.to(device))[0].float().cpu()  # [E], class half and patch half
        half = len(vector) // 2
        return {"cls+mean": vector, "cls": vector[:half], "mean": vector[half:]}[facts.pooling].numpy()

    return images, _checked_preprocessing(store, images, weights or above), vector_of


def query_vector(store: EmbeddingStore, image: Any, model: nn.Module, preprocessing: Preprocessing) -> Any:
    """The vector [D] of one image (path, bytes, PIL, array), made exactly as the store's rows were.

    A path may be one of a store's: a member of a container, a frame of a video (`clip.mp4#12.500s`).
    """
    name = f"{os.fspath(image)}: " if isinstance(image, (str, os.PathLike)) else ""
    try:
        x, geometry = prepare(read_stored(image) if name else image, preprocessing)
    except ImageError as error:
        raise ImageError(f"{name}{error}") from None
    pooling = store.facts.pooling
    (pooled,) = vectors_of(model, [(x[None], [geometry])], preprocessing=preprocessing, pooling=pooling)
    return pooled[0].cpu().numpy()
