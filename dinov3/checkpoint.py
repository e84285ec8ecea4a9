"""Saving a run so that a crash at any moment loses nothing, and resuming from it (torch.distributed.checkpoint).

    ckpt/<it>/             a checkpoint: .metadata and *.distcp (tensors, sharded) and state.json (all else)
    ckpt/<it>_keep/        a hard-linked copy that is never deleted
    ckpt/.<it>.partial/    one being written, or left behind by a crash: removed at the next start

`<it>` is the number of the finished iteration, counted from 0. A checkpoint is written under its temporary name by all
ranks, reaches the disk, and is renamed by one: a directory with a number for a name is whole. Where training goes on, the
tensors are copied and written in the background, one checkpoint at a time. The tensors are one flat
dictionary of plain names, so a checkpoint does not depend on how many ranks wrote it, nor on wrapping.

torch reads `.metadata` with plain pickle, which runs any code in it; here only the few classes that it needs are allowed.

What is saved is handed in. What is not here: from what weights a fresh run starts (`train.teacher_files`).
"""

from __future__ import annotations

import base64
import enum
import json
import os
import pickle
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from dinov3 import distributed, files
from dinov3.distributed import Group
from dinov3.errors import DinoError, UnsafeFile, WeightsError
from dinov3.optim import plain_name

# from the thread that writes, where `catch_warnings` does not reach
warnings.filterwarnings("ignore", "torch.distributed is disabled", module=r"torch\.distributed\.checkpoint")

STATE_FILE = "state.json"
Tensors = dict[str, Tensor]
T = TypeVar("T")


class Damaged(DinoError):
    """A checkpoint that was whole once and cannot be read."""


class Checkpoints:
    """The `ckpt` folder of a run."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        max_to_keep: int | None = None,
        keep_every: int | None = None,
        group: Group = None,
    ) -> None:
        """`group`: the ranks that save together. Its first rank renames and deletes."""
        self.folder, self.group = Path(folder), group
        self.max_to_keep, self.keep_every = max_to_keep, keep_every
        self.protected: int | None = None  # an iteration whose checkpoint is not deleted, however old
        self.writer = distributed.rank(group) == 0
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._background_group: Group = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:  # perhaps on this rank alone: the others are not waited for
            self._wait()

    def all(self) -> list[tuple[int, Path]]:
        """(iteration, path) of every whole checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if p.name.isdecimal() and is_checkpoint(p)]
        return sorted((int(p.name), p) for p in found)

    def latest(self) -> Path | None:
        """The one to resume from; the same on every rank, whatever their file systems show."""
        self.finish()
        known = self.all()
        name = distributed.gather_objects(known[-1][1].name if known else None, self.group)[0]
        return None if name is None else self.folder / name

    def resume(self, read: Callable[[Path], T], log: Callable[[str], None]) -> T | None:
        """`read(path)` of the newest checkpoint that can be read; None if there is none. All ranks call.

        A newer one for which `read` raises `Damaged` on any rank is logged and renamed to <it>.damaged. Raises `Damaged`
        where there are checkpoints and none can be read.
        """
        there = [p for p in self.folder.iterdir() if p.name.isdecimal()] if self.folder.is_dir() else []
        numbers = sorted((int(p.name) for p in there if is_checkpoint(p) or (p / STATE_FILE).is_file()), reverse=True)
        damaged: list[tuple[Path, str]] = []
        for number in distributed.gather_objects(numbers, self.group)[0]:
            path, value, error = self.folder / str(number), None, None
            try:
                value = read(path)
            except Damaged as cause:
                error = str(cause)
            errors = [e for e in distributed.gather_objects(error, self.group) if e is not None]
            if errors:
                damaged.append((path, errors[0]))
                continue
            for other, why in damaged:
                aside = other.with_name(f"{other.name}.damaged")
                log(f"{why}; resuming from the older {path.name}, and keeping the damaged one as {aside.name}")
                if self.writer:
                    shutil.rmtree(aside, ignore_errors=True)
                    other.rename(aside)
            distributed.barrier(self.group)
            return value
        if damaged:
            raise Damaged(
                f"none of the {len(damaged)} checkpoints in {self.folder} can be read; the newest: {damaged[0][1]}. "
                "--no-resume, or another folder, starts from scratch"
            )
        return None

    def clean(self) -> list[str]:
        """Removes what crashed saves left behind; their names."""
        removed = []
        if self.writer and self.folder.is_dir():
            for path in self.folder.iterdir():
                if re.fullmatch(r"\.\d+(_keep)?\.(partial|old)", path.name):
                    whole = self.folder / path.name.split(".")[1]
                    if path.name.endswith(".old") and not whole.exists() and is_checkpoint(path):
                        path.rename(whole)  # the crash fell between two renames
                        continue
                    shutil.rmtree(path)
                    removed.append(path.name)
        distributed.barrier(self.group)
        return sorted(removed)

    def save(self, iteration: int, tensors: Tensors, state: Mapping[str, Any], *, wait: bool = True) -> Path:
        """Writes a checkpoint, then deletes those that are too many. All ranks call; returns its path.

        `tensors`: parameters, buffers, optimiser state; sharded ones each rank its part. `state`: JSON, of rank 0.
        Tensors that are not finite are refused: what is on the disk stays better than what is in memory. Without `wait`
        the tensors are copied to the CPU's memory, and it is there only after `finish` (or the next `save`).
        """
        self.finish()
        bad = not_finite(tensors, self.group)
        if bad:
            more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
            raise DinoError(f"no checkpoint of iteration {iteration}: {bad[0]}{more} hold NaN or infinity")
        target, partial = self.folder / str(iteration), self.folder / f".{iteration}.partial"
        if self.writer:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with files.atomically(partial / STATE_FILE) as file:
                file.write_text(json.dumps(dict(state)), encoding="utf-8")
        distributed.barrier(self.group)
        writing: dict[str, Any] = {
            "storage_writer": FileSystemWriter(partial, overwrite=True),
            "no_dist": not distributed.together(),
        }
        with warnings.catch_warnings(action="ignore"):  # that one process is one process
            if wait:
                with self._sentence(iteration):
                    dcp.save(tensors, process_group=self.group, **writing)
                self._complete(target, partial)
            else:
                if self._background_group is None:  # collectives of two threads must not meet in one group
                    self._background_group = distributed.twin(self.group)
                written: Any = dcp.async_save(tensors, process_group=self._background_group, **writing)
                self._pending = iteration, self._pool.submit(lambda: self._complete(target, partial, written.result()))
        if wait:
            distributed.barrier(self.group)
        return target

    def finish(self) -> None:
        """Waits until a checkpoint that is written in the background is there. All ranks call."""
        if self._wait():
            distributed.barrier(self.group)

    def _wait(self) -> bool:
        """Waits for this rank's part; whether there was one."""
        if self._pending is None:
            return False
        (iteration, written), self._pending = self._pending, None
        with self._sentence(iteration):
            written.result()
        return True

    @contextmanager
    def _sentence(self, iteration: int) -> Iterator[None]:
        try:
            yield
        except CheckpointException as error:  # the same one on all ranks
            rank, (cause, _) = next(iter(error.failures.items()))
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
            raise DinoError(
                f"the checkpoint of iteration {iteration} could not be written to {self.folder}, perhaps because the disk is "
                f"full (rank {rank}: {cause!r}); older ones are as they were, and the same command resumes from them"
            ) from error

    def _complete(self, target: Path, partial: Path, _: object = None) -> None:
        """All ranks have written: the checkpoint gets its name, and those that are too many go."""
        if self.writer:
            old = self.folder / f".{target.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            partial.rename(target)
            files.sync(self.folder)
            shutil.rmtree(old, ignore_errors=True)
            if self.keep_every is not None and (int(target.name) + 1) % self.keep_every == 0:
                self._keep(target)
            self._prune()

    def _keep(self, target: Path) -> None:
        copy, partial = target.with_name(f"{target.name}_keep"), target.with_name(f".{target.name}_keep.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            shutil.copytree(target, partial, copy_function=os.link)
        except OSError:  # a file system without hard links
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(target, partial)
        shutil.rmtree(copy, ignore_errors=True)
        partial.rename(copy)

    def _prune(self) -> None:
        if self.max_to_keep is not None:
            for number, path in self.all()[: -self.max_to_keep]:
                if number == self.protected:
                    continue
                gone = path.with_name(f".{path.name}.partial")  # renamed first: a half-deleted one is none
                path.rename(gone)
                shutil.rmtree(gone)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder holds a distributed checkpoint: its .metadata is written last."""
    return (path / ".metadata").is_file()


def read_state(path: Path, *needed: str) -> dict[str, Any]:
    """What was saved beside the tensors. Raises `Damaged` where it cannot be read or lacks one of the `needed` keys."""
    file = path / STATE_FILE
    if not file.is_file():
        raise Damaged(
            f"{path} was not written by this program (no {STATE_FILE}); a run can start from its weights "
            f"(student.resume_from_teacher_chkpt={path}) but not resume from it"
        )
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in needed if key not in state]
    except (ValueError, TypeError, OSError) as error:
        raise Damaged(f"the checkpoint {path} is damaged: its {STATE_FILE} cannot be read ({error})") from None
    if missing or not isinstance(state, dict):
        raise Damaged(f"the checkpoint {path} is damaged: its {STATE_FILE} lacks {', '.join(missing) or 'everything'}")
    return state


# What a checkpoint's metadata consists of: descriptions of tensors, of files, and paths.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
}  # fmt: skip
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")


def _enum_member(kind: Any, name: str) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise UnsafeFile("it would run builtins.getattr")
    return kind[name]


class _MetadataUnpickler(pickle._Unpickler):  # the one in Python: its opcodes can be overridden
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return PurePosixPath  # of any system; nothing is opened by it
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # how some versions of Python write the member of an enum
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise UnsafeFile(f"it would run {module}.{name}")

    def load_build(self) -> None:
        if callable(self.stack[-2]):  # type: ignore[attr-defined]  # a class or function
            raise UnsafeFile("it would change a class of torch")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


class SafeReader(FileSystemReader):
    """torch's reader of sharded checkpoints, without code in `.metadata`. Raises `UnsafeFile` where there is some."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise UnsafeFile(f"it holds a {type(metadata).__name__}")
        for info in (metadata.storage_data or {}).values():
            if PurePosixPath(info.relative_path).name != str(info.relative_path):
                raise UnsafeFile(f"it names a file outside the checkpoint: {info.relative_path}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def stored(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and types of the tensors in a checkpoint."""
    try:
        entries = SafeReader(path).read_metadata().state_dict_metadata
    except UnsafeFile as error:
        raise UnsafeFile(
            f"the checkpoint {path} is not read: its .metadata is no description of tensors ({error})"
        ) from None
    except Exception as error:
        raise Damaged(f"the checkpoint {path} cannot be read: {first_line(error)}") from None
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def load(path: Path, tensors: Tensors, *, group: Group = None, alone: bool = False) -> list[str]:
    """Fills `tensors` in place, each rank its part; the names that the checkpoint does not have, left as they were.

    `alone`: this process reads by itself, whatever others do.
    """
    there = stored(path)
    wrong = [n for n, t in tensors.items() if n in there and there[n][0] != tuple(t.shape)]
    if wrong:
        n = wrong[0]
        more = f", and {len(wrong) - 1} more tensors differ" if len(wrong) > 1 else ""
        raise DinoError(
            f"{path} was made by another configuration: {n} is {list(there[n][0])} there and {list(tensors[n].shape)} "
            f"here{more}; use the configuration it was made with, or another --output-dir"
        )
    found = {n: t for n, t in tensors.items() if n in there}
    try:
        with warnings.catch_warnings(action="ignore"):  # that one process is one process
            dcp.load(
                found,
                storage_reader=SafeReader(path),
                planner=DefaultLoadPlanner(),
                process_group=None if alone else group,
                no_dist=alone or not distributed.together(),
            )
    except (Exception, CheckpointException) as error:
        raise Damaged(f"the checkpoint {path} cannot be read: {first_line(error)}") from None
    for name, value in found.items():
        if tensors[name] is not value:
            tensors[name].copy_(value)
    return [n for n in tensors if n not in there]


def first_line(error: BaseException) -> str:
    """The first line of an error, of one rank where more failed."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def teacher_prefix(path: Path) -> str:
    """What the names of the teacher's tensors begin with in a training checkpoint (ours or the reference's) or a dump."""
    names, prefixes = stored(path), ("model.model_ema.", "model.teacher.", "model.", "teacher.")
    for prefix in prefixes:
        if any(name.startswith(f"{prefix}backbone.") for name in names):
            return prefix
    raise WeightsError(
        f"the checkpoint {path} holds no teacher (none of {', '.join(p + 'backbone.…' for p in prefixes)})"
    )


def read_tensors(path: Path, prefix: str = "") -> Tensors:
    """Whole tensors whose names begin with `prefix`, without it, in this process alone; of any writer's checkpoint."""
    tensors = {n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in stored(path).items() if n.startswith(prefix)}
    load(path, tensors, alone=True)
    return {n.removeprefix(prefix): t for n, t in tensors.items()}


# ---- what makes up a state ------------------------------------------------------------------------------------------


def module_tensors(module: nn.Module, prefix: str) -> Tensors:
    """Parameters and persistent buffers under plain names; the module's own storage, so that loading fills it."""
    return {prefix + plain_name(name): value.detach() for name, value in module.state_dict().items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module, prefix: str = "optimizer.state.") -> Tensors:
    """The optimiser's step and moments under their parameters' names. Rates are a function of the iteration: not saved.

    A parameter that was never stepped gets a state of zeros, which is what its first step would begin with.
    """
    tensors: Tensors = {}
    fused = bool(optimizer.param_groups[0].get("fused")) or bool(optimizer.param_groups[0].get("capturable"))
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        for key in state:
            tensors[f"{prefix}{plain_name(name)}.{key}"] = state[key].detach()
    return tensors


def random_states(group: Group = None) -> list[dict[str, Any]]:
    """Every rank's generators (torch on both devices, numpy, python) as JSON, in rank order."""

    def text(x: bytes) -> str:
        return base64.b64encode(x).decode()

    numpy_state: Any = np.random.get_state(legacy=True)
    own: dict[str, Any] = {
        "torch": text(torch.get_rng_state().numpy().tobytes()),
        "python": random.getstate(),
        "numpy": [numpy_state[0], text(numpy_state[1].tobytes()), *numpy_state[2:]],
    }
    if torch.cuda.is_available():
        own["cuda"] = text(torch.cuda.get_rng_state().numpy().tobytes())
    return distributed.gather_objects(own, group)


def restore_random_states(states: list[dict[str, Any]], group: Group = None) -> bool:
    """Sets this rank's generators; False if so many ranks were not saved, and they stay as they are."""
    if len(states) != distributed.world(group):
        return False
    own = states[distributed.rank(group)]

    def tensor(text: str) -> Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    torch.set_rng_state(tensor(own["torch"]))
    version, numbers, gauss = own["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = own["numpy"]
    np.random.set_state((kind, np.frombuffer(base64.b64decode(keys), np.uint32), *rest))
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(own["cuda"]))
    return True


def not_finite(tensors: Mapping[str, Tensor], group: Group = None) -> list[str]:
    """Names of tensors that hold NaN or infinity on any rank."""
    names = [n for n, t in tensors.items() if t.is_floating_point()]
    if not names:
        return []
    local = [getattr(tensors[n], "_local_tensor", tensors[n]) for n in names]
    # one number each: x·0 is NaN exactly where x is not finite, and so is the sum
    sums = torch.stack([(x.detach() * 0).sum(dtype=torch.float32).to(local[-1].device) for x in local])
    bad = distributed.all_reduce((sums != 0).float(), "max", group)
    return [n for n, b in zip(names, bad.tolist()) if b]
